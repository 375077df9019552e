"""The life of a request: states and events as one table, and the rules of retry and lease. Pure; told the time.

Whatever changes a request's state stands in MOVES, and nowhere else.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

import msgspec

from mqworker.errors import IllegalMove
from mqworker.messages import OutcomeResult, Reason, Request

MAX_BACK_OFF: Final = 600.0  # seconds
MOST_TOLD: Final = 10  # attempts in the reason of a request that has none left
MOST_TOLD_OF_ONE: Final = 200  # characters


class State(StrEnum):
    """Where a request stands; the last five are final."""

    PENDING = "pending"
    OFFERED = "offered"
    RUNNING = "running"
    SUCCESS = "success"
    FAILURE = "failure"
    ERROR = "error"
    ABORTED = "aborted"
    REJECTED = "rejected"


class Event(StrEnum):
    """What happens to a request."""

    ACCEPT = "accept"  # the ledger keeps it
    REJECT = "reject"  # its task says that its data is not valid
    OFFER = "offer"  # a ticket is published
    RETURN = "return"  # the offer was not taken, or was refused
    GRANT = "grant"  # a claim is granted
    SUCCEED = "succeed"  # the worker's outcomes ...
    FAIL = "fail"
    ERR = "err"
    ABORT = "abort"
    RETRY = "retry"  # lost, or "try again", with attempts left
    HAND_BACK = "hand_back"  # an orderly stop of the worker


FINAL: Final = frozenset({State.SUCCESS, State.FAILURE, State.ERROR, State.ABORTED, State.REJECTED})

MOVES: Final = MappingProxyType(
    {
        (None, Event.ACCEPT): State.PENDING,
        (None, Event.REJECT): State.REJECTED,
        (State.PENDING, Event.OFFER): State.OFFERED,
        (State.PENDING, Event.ABORT): State.ABORTED,
        (State.OFFERED, Event.RETURN): State.PENDING,
        (State.OFFERED, Event.GRANT): State.RUNNING,
        (State.OFFERED, Event.ABORT): State.ABORTED,
        (State.RUNNING, Event.SUCCEED): State.SUCCESS,
        (State.RUNNING, Event.FAIL): State.FAILURE,
        (State.RUNNING, Event.ERR): State.ERROR,
        (State.RUNNING, Event.ABORT): State.ABORTED,
        (State.RUNNING, Event.RETRY): State.PENDING,
        (State.RUNNING, Event.HAND_BACK): State.PENDING,
    }
)


def move(state: State | None, event: Event) -> State:
    """Return the state that an event leads to.

    Raises:
        IllegalMove: the table has no such move.
    """
    try:
        return MOVES[state, event]
    except KeyError:
        allowed = ", ".join(e for s, e in MOVES if s == state) or "nothing: it is final"
        raise IllegalMove(f"expected one of [{allowed}] for a request that is {state or 'new'}, got {event}") from None


def meets(need: Literal["success", "end"], state: State) -> bool | None:
    """Return whether a request in this state is what one that comes after it needs; None: it can still become so.

    The need for an end is met by any final state, rejection too, that for a success by success alone.
    """
    if state not in FINAL:
        return None
    return need == "end" or state is State.SUCCESS


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Say what the end of an attempt does to its request."""

    event: Event
    to: State
    counted: bool  # towards max_attempts
    delay: float = 0.0  # seconds before the next attempt
    exhausted: bool = False  # it would have been tried again, had attempts been left


def end_attempt(
    result: OutcomeResult,
    *,
    again: bool,
    tried: int,
    max_attempts: int,
    abort_asked: bool,
    retry_delay: float,
    retry_on: Collection[str] = (),
) -> Ending:
    """Judge how an attempt's end moves its request.

    `tried` counts the earlier attempts that count; `retry_on` names results that are tried again beside those that
    always are. A worker's own outcome stands, even if an abort was asked for; a run that was lost or handed back, or
    that would be tried again, while an abort was asked for is aborted.
    """
    again = again or result in retry_on

    def ending(event: Event, *, counted: bool = True, delay: float = 0.0, exhausted: bool = False) -> Ending:
        return Ending(event=event, to=move(State.RUNNING, event), counted=counted, delay=delay, exhausted=exhausted)

    if result == "success":
        return ending(Event.SUCCEED)
    if result == "aborted" or (abort_asked and (result in ("lost", "handed_back") or again)):
        return ending(Event.ABORT)
    if result == "handed_back":
        return ending(Event.HAND_BACK, counted=False)
    if result == "lost" or again:
        if tried + 1 < max_attempts:
            return ending(Event.RETRY, delay=min(retry_delay * 2**tried, MAX_BACK_OFF))
        return ending(Event.ERR if result in {"lost", "error"} else Event.FAIL, exhausted=True)
    return ending(Event.FAIL if result == "failure" else Event.ERR)


class Tried(NamedTuple):
    """Say how an attempt ended that counts."""

    number: int
    worker: str
    result: str
    why: str


def last_alone(history: Sequence[Tried], max_attempts: int) -> bool:
    """Say whether the next attempt runs alone on its worker: it is the last, and all before it were lost.

    Such a request may be what kills its workers; others are not to be there once more when it does.
    """
    return bool(history) and len(history) + 1 >= max_attempts and all(one.result == "lost" for one in history)


def exhausted(reason: Reason | None, history: Sequence[Tried], max_attempts: int) -> Reason:
    """Return why a request that has no attempt left ended: the last attempt's reason, and how those before it ended."""
    said = Reason(text="no reason was given") if reason is None else reason
    text = f"{said.text} (attempt {max_attempts} of {max_attempts}, none is left)"
    told = [f"attempt {one.number} on {one.worker}: {one.result}, {_cut(one.why)}" for one in history[-MOST_TOLD:]]
    if more := len(history) - len(told):
        told.insert(0, f"{more} more")
    if told:
        text = f"{text}; before it: {'; '.join(told)}"
    return msgspec.structs.replace(said, text=text)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_TOLD_OF_ONE else f"{text[:MOST_TOLD_OF_ONE]} [...]"


def delayed_until(request: Request, now: float) -> float | None:
    """Return the time before which a request that comes now must not be offered; None: there is none."""
    return request.not_before if request.not_before is not None and request.not_before > now else None


def has_expired(request: Request, now: float) -> bool:
    """Say whether a request must not be granted any more."""
    return request.expires_at is not None and request.expires_at <= now


def expiry_text(expires_at: float) -> str:
    """Say why a request that was not granted in time is aborted."""
    return f"expired: not granted by {_time(expires_at)}"


def window_problem(request: Request) -> str | None:
    """Return what is wrong with the time in which a request may be granted."""
    begins, ends = request.not_before, request.expires_at
    if begins is None or ends is None or begins < ends:
        return None
    return (
        f"expected expires_at behind not_before, got not_before {_time(begins)} and expires_at {_time(ends)}: it could "
        "never be granted; let it expire later, or begin earlier"
    )


def _time(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="seconds")


def lease_seconds(asked: float | None, task_lease: float) -> float:
    """Return the lease of a run: the request's, else its task's."""
    return task_lease if asked is None else asked


def lease_deadline_ns(sent_ns: int, lease: float) -> int:
    """Return until when a worker may run: counted from when it sent what was answered, on its own clock."""
    return sent_ns + int(lease * 1e9)
