"""Why a request waits, for a person: the funnel of who cannot run it, who can, and what would help.

Pure: it is told what matching, dispatch and the pool know, and puts it into the words of an Explanation.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from mqworker.matching import Funnel
from mqworker.messages import Offered, Step
from mqworker.tracking import MISSING, Ask, Edit, Key, advise, token

MAX_TRIED: Final = 4  # workers for which a change of metadata is sought
MAX_ADVICE: Final = 3  # changes that are told
MAX_SHOWN: Final = 5  # values that a step names, and names of workers that a class shows
DECLINED: Final = "every worker that could run it has declined it"
PAUSED: Final = "all that can run it are paused"


@dataclass(kw_only=True)
class Standing:
    """Hold the names of the workers that can run it, by what keeps each from doing so now."""

    idle: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    paused: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # each has declined this very request
    offline: list[str] = field(default_factory=list)  # each could, were it here


def steps(funnel: Funnel, *, offline: Sequence[str]) -> list[Step]:
    """Put a funnel into words, with those that are not here as its first step."""
    found = []
    if offline:
        names = Offered(value="offline", workers=len(offline), examples=list(offline[:MAX_SHOWN]))
        found.append(Step(looked_at="is it online", passed=funnel.workers, stopped=len(offline), offered=[names]))
    for step in funnel.steps:
        if not step.stopped:
            continue
        found.append(
            Step(
                looked_at=step.looked_at if isinstance(step.looked_at, str) else name_of(step.looked_at),
                asked=list(step.asked),
                passed=step.passed,
                stopped=step.stopped,
                offered=[
                    Offered(value=value_of(one.token), workers=one.workers, examples=list(one.examples))
                    for one in step.offered[:MAX_SHOWN]
                ],
            )
        )
    return found


def time_of(at: float) -> str:
    """Write a time as anybody reads it, whatever the clocks of those who talk about it say of their zones."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def name_of(key: Key) -> str:
    """Return a metadata key as a person writes it."""
    _, path = key
    return path[0] if path else "the metadata as a whole"


def value_of(text: str) -> str:
    """Return a read's token as a person reads it."""
    return "missing" if text == MISSING else text


def advice(
    ask: Ask,
    data: Mapping[str, Any],
    candidates: Iterable[tuple[str, Mapping[str, Any]]],
    values: Mapping[str, Sequence[str]],
) -> list[str]:
    """Find the smallest changes of metadata that would make one worker able, each tried out."""
    found: dict[str, tuple[int, int]] = {}
    for order, (worker, metadata) in enumerate(candidates):
        if order >= MAX_TRIED:
            break
        edits = advise(ask, metadata, data, values)
        if edits:
            text = f"on {worker}: " + ", and ".join(_edit(edit) for edit in edits)
            found[text] = (len(edits), order)
    return sorted(found, key=lambda text: found[text])[:MAX_ADVICE]


def _edit(edit: Edit) -> str:
    return f"take {edit.key} away" if edit.token == MISSING else f"set {edit.key} to {edit.token}"


def verdict(standing: Standing, *, ahead: int, failing: str | None) -> str:
    """Say in one line why a request that nothing else holds back does not run."""
    if standing.idle:
        return "it can run now"
    if standing.busy:
        return busy(ahead)
    if standing.paused:
        return PAUSED
    if standing.refused:
        return DECLINED
    if standing.offline:
        return "all that could run it are offline"
    return nobody(failing)


def nobody(failing: str | None) -> str:
    """Say in one line that no worker can run a request."""
    return "no worker can run it" + ("" if failing is None else f": can_run_on() raised {failing}")


def busy(ahead: int) -> str:
    """Say in one line where in line a request is."""
    return "all that can run it are busy; " + (
        "it is next" if not ahead else f"about {ahead} go{'es' if ahead == 1 else ''} first"
    )


def limited(key: str | None) -> str:
    """Say in one line that a concurrency key holds a request back."""
    return f"as many run with the concurrency key {key} as may"


def shared(metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what all of some workers have in common."""
    if not metadata:
        return {}
    first, *others = metadata
    if not others:
        return dict(first)
    common = {key: token(value) for key, value in first.items()}
    for other in others:
        for key in [key for key, text in common.items() if key not in other or token(other[key]) != text]:
            del common[key]
    return {key: msgspec.json.decode(text) for key, text in common.items()}
