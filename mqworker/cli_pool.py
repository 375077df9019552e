"""The commands on the pool: workers, pauses, explain, capabilities, and a live view of it."""

import difflib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from mqworker.client import Client
from mqworker.errors import OutsideError, SubmitterError
from mqworker.messages import Explanation, PauseView, WorkerView, encode_line
from mqworker.screen import Counting, many, printable
from mqworker.screen_pool import (
    Sight,
    Watching,
    capability_line,
    capability_page,
    capability_table,
    event_line,
    explanation_page,
    pause_table,
    pool_line,
    telling_keys,
    worker_table,
)
from mqworker.shell import (
    DID_NOT_SUCCEED,
    POOL,
    AsJson,
    Shell,
    print_json,
    read_data,
    read_name,
    read_requires,
    show,
    tell,
)

application = typer.Typer()

LOOK_SECONDS: Final = 2.0  # without any event
PAUSE_SECONDS: Final = 0.5  # between looks, however much happens
PAGES_SHOWN: Final = 3  # classes of which all is told without being asked for


class Kind(StrEnum):
    """What can be paused."""

    WORKER = "worker"
    TASK = "task"
    GROUP = "group"


PauseKind = Annotated[Kind, typer.Argument(metavar="worker|task|group", help="What kind of thing.")]
PauseName = Annotated[str, typer.Argument(metavar="NAME", help="Its name.")]


@application.command(rich_help_panel=POOL)
def workers(
    context: typer.Context,
    *,
    refresh: Annotated[bool, typer.Option("--refresh", help="Ask them to look at their hosts again.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the workers that the scheduler knows."""
    shell: Shell = context.obj
    with shell.client() as client:
        found = client.refresh_workers() if refresh else client.workers()
        pool = client.pool()
    if as_json:
        print_json(found)
        return
    show(worker_table(found, time.time()))
    typer.echo(f"\n{pool_line(pool)}")


@application.command(rich_help_panel=POOL)
def forget(
    context: typer.Context,
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A worker's name.")],
    give_to: Annotated[
        str | None, typer.Option("--give-to", metavar="USER", help="Whose it is now; default: whoever uses it next.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Release a worker's name, which is that of the broker's user who used it first; what runs there goes on."""
    shell: Shell = context.obj
    read_name(name, "NAME")
    with shell.client() as client:
        client.forget_worker(name, user=give_to)
    if as_json:
        print_json({"name": name, "user": give_to})
    else:
        whose = f"{printable(give_to)}'s now" if give_to else "that of whoever uses it next"
        typer.echo(f"worker name {printable(name)} is {whose}")


# ---------------------------------------------------------------- pauses


@application.command(rich_help_panel=POOL)
def pause(
    context: typer.Context,
    *,
    kind: PauseKind,
    name: PauseName,
    reason: Annotated[str, typer.Option("--reason", "-r", help="Why; others see it.")] = "",
    as_json: AsJson = False,
) -> None:
    """Give a worker, a task or a group no slot any more; what runs goes on."""
    shell: Shell = context.obj
    with shell.client() as client:
        paused = client.pause(kind.value, name, reason)
        for doubt in _doubts(client, kind, name):
            tell(doubt)
    if as_json:
        print_json(paused)
    else:
        typer.echo(f"{kind.value} {printable(name)} is paused; what runs goes on")


def _doubts(client: Client, kind: Kind, name: str) -> Iterator[str]:
    """Say that nobody knows a name: it may be a slip, or of something that is still to come."""
    if kind is Kind.GROUP:
        if not client.count(group=name):
            yield f"no request is of the group {name} so far"
        return
    found = client.workers()
    if kind is Kind.WORKER:
        known = {worker.name for worker in found}
        missing = f"no worker is called {name} so far"
    else:
        name = name.lower()
        known = {task for worker in found for task in (*worker.tasks, *worker.denied)}
        missing = f"no worker has the task {name} so far"
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        yield missing + (f"; did you mean {near[0]}? `mqworker resume {kind.value} {name}` undoes it" if near else "")


@application.command(rich_help_panel=POOL)
def drain(
    context: typer.Context,
    *,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[WORKER...]", help="Workers' names.", show_default=False)
    ] = None,
    of_class: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="CLASS", help="All workers of a capability class; may be repeated."),
    ] = None,
    everybody: Annotated[bool, typer.Option("--all", help="All workers.")] = False,
    reason: Annotated[str, typer.Option("--reason", "-r", help="Why; others see it.")] = "",
    stop: Annotated[bool, typer.Option("--stop", help="They end when nothing runs there any more.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until nothing runs there any more.")] = False,
    as_json: AsJson = False,
) -> None:
    """Have workers take nothing more; what runs goes on. `mqworker resume worker NAME` ends it.

    A drained worker is paused, also when it comes back.
    """
    if bool(names) + bool(of_class) + everybody != 1:
        raise SubmitterError("expected what to drain: names of workers, or --class, or --all")
    shell: Shell = context.obj
    with shell.client() as client, closing(client.follow_events(quiet=LOOK_SECONDS)) as events:
        for name in names or ():
            for doubt in _doubts(client, Kind.WORKER, name):
                tell(doubt)
        found = client.drain(names or (), classes=of_class or (), everybody=everybody, reason=reason, stop=stop)
        if wait:
            found = _see_drained(client, events, [worker.name for worker in found], stop=stop)
    if as_json:
        print_json(found)
    elif found:
        show(worker_table(found, time.time()))
    else:
        tell("no worker that is known drains")


def _see_drained(client: Client, events: Iterator[list[Any]], names: Sequence[str], *, stop: bool) -> list[WorkerView]:
    """Wait until nothing runs on workers, or until they have gone."""
    busy: Sized = names
    try:
        with Counting("drain", len(names)) as counting:
            while True:
                found = [worker for worker in client.workers() if worker.name in names]
                busy = [one for one in found if one.state == "online" and (stop or one.running or not one.draining)]
                counting.show(len(found) - len(busy))
                if not busy:
                    return found
                next(events)
    except KeyboardInterrupt:
        tell(f"{many(len(busy), 'worker')} of {len(names):,} not done yet; the drain goes on until `mqworker resume`")
        raise


@application.command(rich_help_panel=POOL)
def resume(
    context: typer.Context,
    *,
    kind: PauseKind,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="Names.", show_default=False)] = None,
    of_class: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="CLASS", help="All paused workers of a capability class; may be repeated."),
    ] = None,
    everybody: Annotated[bool, typer.Option("--all", help="All of the kind that are paused.")] = False,
    as_json: AsJson = False,
) -> None:
    """End pauses and drains."""
    if bool(names) + bool(of_class) + everybody != 1:
        raise SubmitterError("expected what to resume: names, or --class, or --all")
    if of_class and kind is not Kind.WORKER:
        raise SubmitterError(f"expected --class with workers, got it with {kind.value}")
    shell: Shell = context.obj
    with shell.client() as client:
        before = left = client.pauses()
        chosen = names or [one.name for one in before if one.kind == kind.value]
        if of_class:
            members = _members(client, of_class)
            chosen = [name for name in chosen if name in members]
        for name in chosen:
            left = client.resume(kind.value, name)
            if as_json:
                continue
            if _has(before, kind, name):
                typer.echo(f"{kind.value} {printable(name)} goes on")
            else:
                others = ", ".join(f"{one.kind} {one.name}" for one in left)
                tell(f"{kind.value} {name} was not paused{f'; paused are {others}' if others else ''}")
    if as_json:
        print_json(left)
    elif not chosen:
        tell(f"no {kind.value}{' of that class' if of_class else ''} is paused")


def _members(client: Client, classes: Sequence[str]) -> set[str]:
    """Return the workers of capability classes."""
    known = {one.name for one in client.capabilities().classes}
    if unknown := [name for name in classes if name not in known]:
        raise SubmitterError(f"no class {', '.join(unknown)}; `mqworker capabilities` lists them")
    return {worker.name for worker in client.workers() if worker.capability_class in classes}


def _has(pauses: Iterable[PauseView], kind: Kind, name: str) -> bool:
    wanted = name.lower() if kind is Kind.TASK else name
    return any(one.kind == kind.value and one.name == wanted for one in pauses)


@application.command(rich_help_panel=POOL)
def pauses(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List what is paused."""
    shell: Shell = context.obj
    with shell.client() as client:
        found = client.pauses()
    if as_json:
        print_json(found)
    elif found:
        show(pause_table(found, time.time()))
    else:
        tell("nothing is paused")


# ---------------------------------------------------------------- who can run what


@application.command(rich_help_panel=POOL)
def explain(
    context: typer.Context,
    *,
    request: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="A request's id, or a unique beginning of it.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", help="Of a request that is not submitted: its task.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", metavar="JSON", help="... its task data.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="... its task data from a file; - is stdin.")
    ] = None,
    requires: Annotated[
        str | None, typer.Option("--requires", metavar="JSON|@FILE", help="... what it requires of a worker.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which workers can run a request, why the others cannot, and what would help.

    The exit code is 1 if none can run it now.
    """
    if (request is None) == (task is None):
        given = "neither" if task is None else "both"
        raise SubmitterError(f"expected the id of a request, or --task for one that is not submitted; got {given}")
    if request is not None and (data is not None or file is not None or requires is not None):
        raise SubmitterError("expected --data, --file and --requires with --task only: a submitted request has its own")
    task_data = read_data(data, file)
    schema = read_requires(requires)
    shell: Shell = context.obj
    with shell.client() as client:
        told = client.explain(request) if request else client.explain_task(str(task), task_data, schema)
    print_json(told) if as_json else show(explanation_page(told))
    if not _runnable(told):
        raise typer.Exit(DID_NOT_SUCCEED)


def _runnable(told: Explanation) -> bool:
    return told.state == "running" or told.idle + told.busy > 0


@application.command(rich_help_panel=POOL)
def capabilities(
    context: typer.Context,
    *,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[CLASS...]", help="Tell all of these.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the capability classes: workers that no known request tells apart; each has one queue."""
    shell: Shell = context.obj
    with shell.client() as client:
        told = client.capabilities()
    known = {one.name: one for one in told.classes}
    if unknown := [name for name in names or () if name not in known]:
        raise SubmitterError(f"no class {', '.join(unknown)}; `mqworker capabilities` lists them")
    chosen = [known[name] for name in names or ()]
    if as_json:
        print_json(chosen if names else told)
        return
    keys = telling_keys(told.classes)
    if not names:
        show(capability_table(told))
        typer.echo(f"\n{capability_line(told)}")
        chosen = told.classes if len(told.classes) <= PAGES_SHOWN else []
    for number, one in enumerate(chosen):
        if number or not names:
            typer.echo()
        show(capability_page(one, keys))


# ---------------------------------------------------------------- live


@application.command(rich_help_panel=POOL)
def watch(context: typer.Context, *, as_json: AsJson = False) -> None:
    """Show the pool live, until Ctrl-C: what runs, what waits and why, and what happens.

    Where no terminal reads it, or with --json, it prints what happens: a line or a JSON document each.
    """
    shell: Shell = context.obj
    with shell.client() as client, closing(client.follow_events(quiet=PAUSE_SECONDS)) as stream:
        client.pool()  # a scheduler that is not there is told at once
        if not as_json and sys.stdout.isatty():
            _watch(client, stream)
            return
        for events in stream:
            for event in events:
                line = encode_line(event).decode() if as_json else f"{printable(event_line(event).plain)}\n"
                sys.stdout.write(line)
            sys.stdout.flush()


def _watch(client: Client, stream: Iterable[list[Any]]) -> None:
    with Watching() as watching:
        watching.saw(_look(client, watching.rows))
        looked, news = time.monotonic(), False
        for events in stream:
            watching.heard(events)
            news = news or bool(events)
            since = time.monotonic() - looked
            if since < (PAUSE_SECONDS if news else LOOK_SECONDS):
                continue
            try:
                watching.saw(_look(client, watching.rows))
            except OutsideError as error:  # it may come back, and the screen says so until then
                watching.missed(str(error))
            looked, news = time.monotonic(), False


def _look(client: Client, rows: int) -> Sight:
    return Sight(
        at=time.time(),
        pool=client.pool(),
        running=client.list(states=["running"], limit=rows),
        waiting=client.list(states=["pending", "offered"], limit=rows, oldest=True),
        pauses=client.pauses(),
    )
