"""The commands on requests that are chosen by what they have in common: list, abort, retry, reprioritise."""

import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import chain, islice
from typing import Annotated, Any, Final

import typer

from mqworker.client import Client
from mqworker.errors import Forbidden, MqworkerError, SubmitterError
from mqworker.lifecycle import FINAL, State
from mqworker.messages import RequestView
from mqworker.screen import Counting, many, pending_table, request_table
from mqworker.shell import DID_NOT_SUCCEED, REQUESTS, AsJson, Shell, print_json, read_duration, show, tell

application = typer.Typer()

AT_ONCE: Final = 1000
REFUSED_SHOWN: Final = 20
WAITING: Final = (State.PENDING, State.OFFERED)
OPEN: Final = (State.PENDING, State.OFFERED, State.RUNNING)
WENT_WRONG: Final = (State.FAILURE, State.ERROR)

MaybeIds = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[ID...]", help="Requests' ids, or unique beginnings of them; else a filter.", show_default=False
    ),
]
States = Annotated[list[State] | None, typer.Option("--state", help="Only those in this state; may be repeated.")]
OfTask = Annotated[str | None, typer.Option("--task", metavar="NAME", help="Only those of this task.")]
OfGroup = Annotated[str | None, typer.Option("--group", metavar="NAME", help="Only those of this group.")]
OnWorker = Annotated[str | None, typer.Option("--worker", metavar="NAME", help="Only those on this worker.")]
OlderThan = Annotated[
    float | None,
    typer.Option(
        "--older-than",
        parser=read_duration,
        metavar="DURATION",
        help="Only those submitted so long ago: 90s, 15m, 2h, 3d.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="With a filter: do not ask.")]


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Say what requests have in common."""

    states: tuple[State, ...]
    task: str | None
    group: str | None
    worker: str | None
    submitted_before: float | None

    @classmethod
    def of(
        cls,
        *,
        states: Iterable[State] | None,
        task: str | None,
        group: str | None,
        worker: str | None,
        older_than: float | None,
    ) -> "Filter":
        """Take what was typed; ages count from now."""
        before = None if older_than is None else time.time() - older_than
        return cls(states=tuple(states or ()), task=task, group=group, worker=worker, submitted_before=before)

    def __bool__(self) -> bool:
        """Tell whether anything was given."""
        return self != Filter(states=(), task=None, group=None, worker=None, submitted_before=None)

    def words(self, *states: State) -> dict[str, Any]:
        """Return it as the client takes it."""
        return {
            "states": [state.value for state in states or self.states],
            "task": self.task,
            "group": self.group,
            "worker": self.worker,
            "submitted_before": self.submitted_before,
        }


# ---------------------------------------------------------------- looking


@application.command("list", rich_help_panel=REQUESTS)
def list_(
    context: typer.Context,
    *,
    pending: Annotated[bool, typer.Option("--pending", help="What waits, oldest first, and why it does.")] = False,
    state: States = None,
    task: OfTask = None,
    group: OfGroup = None,
    worker: OnWorker = None,
    older_than: OlderThan = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=10000, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List requests, newest first."""
    if pending and state:
        raise SubmitterError("expected --pending or --state, got both")
    states = WAITING if pending else state
    chosen = Filter.of(states=states, task=task, group=group, worker=worker, older_than=older_than)
    shell: Shell = context.obj
    with shell.client() as client:
        views = client.list(**chosen.words(), limit=limit, oldest=pending)
        total = client.count(**chosen.words()) if pending and len(views) == limit and not as_json else len(views)
    if as_json:
        print_json(views)
        return
    now = time.time()
    show(pending_table(views, now) if pending else request_table(views, now))
    if total > len(views):
        tell(f"these are the oldest {len(views):,} of {total:,}; -n shows more")


# ---------------------------------------------------------------- choosing


@dataclass(frozen=True)
class _Chosen:
    number: int
    parts: Iterator[tuple[str, ...]]
    filtered: bool


def _check(verb: str, ids: Sequence[str], given: Filter, possible: Iterable[State]) -> None:
    """Refuse what cannot be meant, before anything is opened."""
    if ids and given:
        raise SubmitterError(f"expected the ids of requests to {verb}, or a filter, got both")
    if not ids and not given:
        raise SubmitterError(
            f"expected what to {verb}: ids of requests, or a filter (--task, --group, --worker, --state, --older-than)"
        )
    if wrong := [state.value for state in given.states if state not in possible]:
        can = ", ".join(state.value for state in State if state in possible)
        raise SubmitterError(f"expected states of requests that one can {verb} ({can}), got {', '.join(wrong)}")


def _choose(
    client: Client, verb: str, ids: Sequence[str], given: Filter, states: Iterable[State], *, yes: bool
) -> _Chosen | None:
    """Find the requests that are meant, and ask whether they are; None: there are none."""
    if ids:
        return _Chosen(len(ids), _sets(ids), filtered=False)
    # What comes while somebody thinks about the question is not meant: what is chosen ends at the newest of now.
    newest = client.list(**given.words(*states), limit=1)
    counts = {state: client.count(**given.words(state)) for state in states} if newest else {}
    number = sum(counts.values())
    if not number:
        tell(f"no request matches: nothing to {verb}")
        return None
    each = ", ".join(f"{count:,} {state.value}" for state, count in counts.items() if count)
    if not yes:
        _ask(f"{verb} {many(number, 'request')} ({each})")
    found = client.select(**given.words(*states), before=newest[0].seq + 1)
    return _Chosen(number, _sets(view.request.id for view in found), filtered=True)


def _sets(ids: Iterable[str]) -> Iterator[tuple[str, ...]]:
    left = iter(ids)
    while part := tuple(islice(left, AT_ONCE)):
        yield part


def _ask(what: str) -> None:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise SubmitterError(f"expected --yes to {what}: nobody is at the terminal to be asked")
    with redirect_stdout(sys.stderr):  # Python prints a part of the question where it thinks the terminal is
        agreed = typer.confirm(f"{what}?", err=True)
    if not agreed:
        tell("nothing was done")
        raise typer.Exit(DID_NOT_SUCCEED)


def _carry_out(chosen: _Chosen, verb: str, past: str, act: Callable[[tuple[str, ...]], None]) -> None:
    """Do something to all that is chosen; whoever stops it in the middle is told how far it got."""
    done = 0
    try:
        with Counting(verb, chosen.number) as counting:
            for part in chosen.parts:
                act(part)
                done += len(part)
                counting.show(done)
    except (KeyboardInterrupt, MqworkerError) as error:
        if done or (isinstance(error, KeyboardInterrupt) and chosen.filtered):
            again = "; the same command goes on from there" if chosen.filtered else ""
            tell(f"{done:,} of {many(chosen.number, 'request')} {past}, and perhaps some of the next{again}")
        raise


# ---------------------------------------------------------------- doing


@application.command(rich_help_panel=REQUESTS)
def abort(
    context: typer.Context,
    *,
    ids: MaybeIds = None,
    state: States = None,
    task: OfTask = None,
    group: OfGroup = None,
    worker: OnWorker = None,
    older_than: OlderThan = None,
    reason: Annotated[str, typer.Option("--reason", "-r", help="Why; it is kept.")] = "aborted from the command line",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until nothing of them runs any more.")] = True,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Stop requests, wherever they are, and wait for the end of those that run.

    Either those with the ids, or all that match a filter and have not ended: then it says how many, and asks first.
    A full id that nobody knows yet is remembered for a day, and its request aborted when it comes.
    """
    given = Filter.of(states=state, task=task, group=group, worker=worker, older_than=older_than)
    _check("abort", ids or (), given, OPEN)
    shell: Shell = context.obj
    with shell.client() as client:
        chosen = _choose(client, "abort", ids or (), given, given.states or OPEN, yes=yes)
        if chosen is not None:
            ended = _Ended(chosen)
            running: list[str] = []

            def act(part: tuple[str, ...]) -> None:
                views = client.abort(part, reason, wait=False, on_mark=_tell_mark, refused=ended.refused)
                still = [view.request.id for view in views if wait and view.state not in FINAL]
                running.extend(still)
                ended.add(view for view in views if view.request.id not in still)

            _carry_out(chosen, "abort", "are aborted", act)
            ended.add(_see_end(client, running))
            ended.show(_aborted, as_json=as_json)


def _tell_mark(request: str) -> None:
    tell(f"nobody knows {request} yet: it is aborted when it comes within a day")


def _see_end(client: Client, running: Sequence[str]) -> list[RequestView]:
    """Wait until requests that are being stopped have ended; whoever stops that is told how many have not."""
    ends = 0
    try:
        with Counting("stop", len(running)) as counting:

            def count(_: RequestView) -> None:
                nonlocal ends
                ends += 1
                counting.show(ends)

            return client.wait(running, on_end=count)
    except KeyboardInterrupt:
        tell(f"{many(len(running) - ends, 'request')} of {len(running):,} still to end; their abort goes on")
        raise


@application.command(rich_help_panel=REQUESTS)
def reprioritise(
    context: typer.Context,
    *,
    ids: MaybeIds = None,
    priority: Annotated[int, typer.Option("--priority", "-p", min=-1000, max=1000, help="Higher goes first.")],
    state: States = None,
    task: OfTask = None,
    group: OfGroup = None,
    worker: OnWorker = None,
    older_than: OlderThan = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Give requests another priority; it counts from the next offer on.

    Either those with the ids, or all that match a filter and have not ended: then it says how many, and asks first.
    """
    given = Filter.of(states=state, task=task, group=group, worker=worker, older_than=older_than)
    _check("reprioritise", ids or (), given, OPEN)
    shell: Shell = context.obj
    with shell.client() as client:
        chosen = _choose(client, "reprioritise", ids or (), given, given.states or OPEN, yes=yes)
        if chosen is not None:
            ended = _Ended(chosen)

            def act(part: tuple[str, ...]) -> None:
                ended.add(client.reprioritise(part, priority, refused=ended.refused))

            _carry_out(chosen, "reprioritise", f"have priority {priority}", act)
            ended.show(lambda states: _reprioritised(states, priority), as_json=as_json)


@application.command(rich_help_panel=REQUESTS)
def retry(
    context: typer.Context,
    *,
    ids: MaybeIds = None,
    state: States = None,
    task: OfTask = None,
    group: OfGroup = None,
    worker: OnWorker = None,
    older_than: OlderThan = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Do ended requests anew, as new requests, and print their ids.

    Either those with the ids, or all that match a filter and ended in failure or error (or in another --state): then it
    says how many, and asks first. By a filter, a request is done anew once, however often that is asked.
    """
    given = Filter.of(states=state, task=task, group=group, worker=worker, older_than=older_than)
    _check("retry", ids or (), given, FINAL)
    shell: Shell = context.obj
    made: list[dict[str, str]] = []
    refused: dict[str, str] = {}
    with shell.client() as client:
        chosen = _choose(client, "retry", ids or (), given, given.states or WENT_WRONG, yes=yes)
        if chosen is None:
            return
        filtered, olds = chosen.filtered, [*chain.from_iterable(chosen.parts)]
        if filtered:
            olds.reverse()  # the oldest first: so they come in the order in which they came at first

        def act(part: tuple[str, ...]) -> None:
            [old] = part
            try:
                new = client.retry(old, new_id=_next_id(old) if filtered else None)
            except Forbidden as error:
                refused[old] = str(error)
                return
            made.append({"id": new, "retries": old})
            if not as_json:
                typer.echo(new)

        try:
            one_by_one = _Chosen(chosen.number, ((old,) for old in olds), filtered=filtered)
            _carry_out(one_by_one, "retry", "are retried", act)
        finally:
            if as_json and made:
                print_json(made)
            _tell_refused(refused)


def _next_id(old: str) -> str:
    """Return the id that a retry by a filter gives: always the same, so that nothing is done twice."""
    return str(uuid.uuid5(uuid.UUID(old), "retry"))


class _Ended:
    """Gather what became of requests: of those with ids all is shown, of those of a filter how many there are."""

    def __init__(self, chosen: _Chosen) -> None:
        self._filtered = chosen.filtered
        self._views: list[RequestView] = []
        self._ids: list[str] = []
        self._states: Counter[State] = Counter()
        self.refused: dict[str, str] = {}

    def add(self, views: Iterable[RequestView]) -> None:
        for view in views:
            self._ids.append(view.request.id)
            self._states[State(view.state)] += 1
            if not self._filtered:
                self._views.append(view)

    def show(self, sentence: Callable[[Counter[State]], str], *, as_json: bool) -> None:
        if not self._filtered:
            if as_json:
                print_json(self._views)
            elif self._views:
                show(request_table(self._views, time.time()))
        elif as_json:
            print_json({"number": len(self._ids), "ids": self._ids})
        else:
            typer.echo(sentence(self._states))
        _tell_refused(self.refused)


def _tell_refused(refused: Mapping[str, str]) -> None:
    """Say of each request that it was not ours to command, and end with the code of that."""
    if not refused:
        return
    for request, why in islice(refused.items(), REFUSED_SHOWN):
        tell(f"request {request} is left alone: {why}")
    if len(refused) > REFUSED_SHOWN:
        tell(f"... and {len(refused) - REFUSED_SHOWN:,} more")
    raise Forbidden(f"{many(len(refused), 'request')} of others left alone", refused)


def _aborted(states: Counter[State]) -> str:
    ending = sum(states[state] for state in OPEN)
    ended = sum(states[state] for state in FINAL if state is not State.ABORTED)
    parts = [
        *([f"{many(states[State.ABORTED], 'request')} aborted"] if states[State.ABORTED] or not ending else []),
        *([f"{many(ending, 'running one')} will end a little later"] if ending else []),
        *([f"{ended:,} had ended before"] if ended else []),
    ]
    return ", ".join(parts)


def _reprioritised(states: Counter[State], priority: int) -> str:
    ended = sum(states[state] for state in FINAL)
    return f"{many(states.total() - ended, 'request')} now of priority {priority}" + (
        f", {ended:,} had ended before" if ended else ""
    )
