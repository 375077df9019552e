"""The command line: reads settings, opens one door or wakes one resident, and prints.

Residents are imported by the command that runs them: `mqworker list` has no use for a database driver.
"""

import asyncio
import platform
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from mqworker import Task, __version__, cli_artifact, cli_pool, cli_requests, cli_topology
from mqworker.client import Client, Followed
from mqworker.errors import SubmitterError
from mqworker.lifecycle import FINAL
from mqworker.messages import After, Limits, RequestView, encode_line
from mqworker.rehearsal import Given, kept_directory, rehearse
from mqworker.screen import (
    Following,
    artifact_table,
    because,
    check_table,
    printable_lines,
    request_page,
    task_table,
)
from mqworker.shell import (
    DID_NOT_SUCCEED,
    INTERRUPTED,
    POOL,
    REQUESTS,
    AsJson,
    Shell,
    print_json,
    read_data,
    read_deadline,
    read_duration,
    read_moment,
    read_name,
    read_requires,
    read_results,
    read_size,
    read_take,
    run,
    show,
    silence_logging,
    tell,
    without_secrets,
)
from mqworker.task import load_tasks

EXIT_CODES: Final = (
    "Exit codes: 0 it went well; 1 the work did not succeed, or nobody can do it, or something unexpected; 2 what was "
    "asked for cannot be done; 3 this machine or its settings are not right; 4 the world outside is unwell, try again; "
    "130 Ctrl-C.\n\n"
    "Settings: a flag, else MQWORKER_* in the environment, else the first of --config, MQWORKER_CONFIG, "
    "./mqworker.toml, ~/.config/mqworker.toml and /etc/mqworker/mqworker.toml, else a default."
)
MACHINE_NOT_RIGHT: Final = 3
RESIDENTS: Final = "Residents"
HERE: Final = "Here and now"
BUILD_LOG: Final = "debian:package-build-log"
DEBUG_LOGS: Final = "mqworker:debug-logs"

application = typer.Typer(
    name="mqworker",
    help="A worker pool on RabbitMQ: requests go to hosts that can run them.",
    epilog=EXIT_CODES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
application.add_typer(cli_requests.application)  # without a name: its commands are ours
application.add_typer(cli_pool.application)
application.add_typer(cli_artifact.application, name="artifact", rich_help_panel=REQUESTS)
application.add_typer(cli_topology.application, name="topology", rich_help_panel=POOL)

RequestId = Annotated[str, typer.Argument(metavar="ID", help="A request's id, or a unique beginning of it.")]
TaskName = Annotated[str, typer.Argument(metavar="TASK", help="The task's name; `mqworker tasks` lists them.")]
Data = Annotated[str | None, typer.Option("--data", "-d", metavar="JSON", help="Task data, one JSON object.")]
DataFile = Annotated[
    Path | None, typer.Option("--file", "-f", metavar="FILE", help="Task data from a file; - is standard input.")
]
MetricsListen = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where /metrics answers; empty: off.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    return run(application, arguments)


@application.callback()
def general(
    context: typer.Context,
    *,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="The settings file.")] = None,
    amqp_url: Annotated[str | None, typer.Option(metavar="URL", help="amqp://USER:PASSWORD@HOST:PORT/VHOST")] = None,
    prefix: Annotated[str | None, typer.Option(help="What all names on the broker begin with.")] = None,
    store: Annotated[str | None, typer.Option(metavar="URL", help="Where artifact bytes are: file:///PATH")] = None,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="How long to wait for an answer.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.")] = None,
) -> None:
    """Keep the flags that every command has."""
    flags = {
        "amqp_url": amqp_url,
        "prefix": prefix,
        "store": store,
        "timeout": timeout,
        "log_level": log_level,
        "log_format": log_format,
    }
    context.obj = Shell(flags=flags, config=config)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# ---------------------------------------------------------------- requests


@application.command(rich_help_panel=REQUESTS)
def submit(
    context: typer.Context,
    *,
    task: TaskName,
    data: Data = None,
    file: DataFile = None,
    priority: Annotated[int, typer.Option(min=-1000, max=1000, help="Higher goes first.")] = 0,
    max_attempts: Annotated[int, typer.Option(min=1, max=100, help="How often to try, if workers are lost.")] = 3,
    lease: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="How long a run may go on unheard; default: the task's.")
    ] = None,
    retry_on: Annotated[
        str | None,
        typer.Option(metavar="RESULTS", help="Try again after these, too: failure, error, or failure,error."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(parser=read_duration, metavar="DURATION", help="End a run that takes longer: 90s, 15m, 2h."),
    ] = None,
    not_before: Annotated[
        float | None,
        typer.Option(parser=read_moment, metavar="TIME", help="Do not begin before then: 2030-01-31T22:15, or +30m."),
    ] = None,
    expires: Annotated[
        float | None, typer.Option(parser=read_deadline, metavar="TIME", help="Abort it if it has not begun by then.")
    ] = None,
    memory: Annotated[
        int | None, typer.Option(parser=read_size, metavar="SIZE", help="What a run may use of memory: 512M, 4G.")
    ] = None,
    cpus: Annotated[float | None, typer.Option(metavar="N", help="... of cores; more is slowed.")] = None,
    cpu_time: Annotated[
        float | None, typer.Option(parser=read_duration, metavar="DURATION", help="... of processor time in all.")
    ] = None,
    disk: Annotated[
        int | None, typer.Option(parser=read_size, metavar="SIZE", help="... of disk in its work directory.")
    ] = None,
    processes: Annotated[int | None, typer.Option(metavar="N", help="... of processes at one time.")] = None,
    group: Annotated[str, typer.Option(metavar="NAME", help="Whose share of the slots it uses.")] = "default",
    concurrency_key: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of requests with one key, a few run at a time.")
    ] = None,
    requires: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEMA",
            help="A JSON Schema that a worker's metadata must satisfy, or @FILE; keys that must be there: `required`.",
        ),
    ] = None,
    after: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Wait for a request's success; may be repeated.")
    ] = None,
    after_end: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Wait for a request's end, whatever it is; may be repeated.")
    ] = None,
    take: Annotated[
        list[str] | None,
        typer.Option(
            metavar="/POINTER=ID:CATEGORY",
            help="Put the id of an artifact that a request makes into the task data; may be repeated.",
        ),
    ] = None,
    own_id: Annotated[
        uuid.UUID | None, typer.Option("--id", help="An id of your own: the same again is the same request.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait for its end.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Show its log as it runs, and wait for its end.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the id alone.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a request and print its id, once the ledger keeps it.

    The exit code is that of the work with --wait and --follow: 0 for success only.
    """
    request_words: dict[str, Any] = {
        "data": read_data(data, file),
        "priority": priority,
        "max_attempts": max_attempts,
        "retry_on": [] if retry_on is None else read_results(retry_on),
        "lease": lease,
        "timeout": timeout,
        "not_before": not_before,
        "expires_at": expires,
        "limits": Limits(memory=memory, cpus=cpus, cpu_seconds=cpu_time, disk=disk, processes=processes),
        "group": read_name(group, "--group"),
        "concurrency_key": None if concurrency_key is None else read_name(concurrency_key, "--concurrency-key"),
        "requires": read_requires(requires),
        "after": [*(after or ()), *(After(request=one, need="end") for one in after_end or ())],
        "take": [read_take(one) for one in take or ()],
    }
    if request_words["limits"] == Limits():
        request_words["limits"] = None
    shell: Shell = context.obj
    request = str(own_id or uuid.uuid4())
    alone = quiet or not sys.stdout.isatty()
    with ExitStack() as stack:
        client = stack.enter_context(shell.client())
        # Listening begins before the request exists, so that nothing of it is missed.
        stream = stack.enter_context(closing(client.follow_logs(request))) if wait or follow else None
        client.submit(task, id=request, **request_words)
        if stream is None and as_json:
            print_json({"id": request})
        elif follow and alone:
            tell(f"request {request} is accepted")  # standard output is the log's
        elif not as_json:
            typer.echo(request if alone else f"request {request} is accepted")
            sys.stdout.flush()
        if stream is None:
            return
        _watch(stream, request, logs=follow and not as_json)
        view = client.status(request)
    _end(view, as_json=as_json, alone=alone)


def _watch(stream: Iterable[Followed], request: str, *, logs: bool) -> None:
    try:
        with Following(request, logs=logs) as following:
            for item in stream:
                following.show(item)
    except KeyboardInterrupt:
        tell(f"request {request} goes on; `mqworker abort {request[:8]}` stops it")
        raise


def _end(view: RequestView, *, as_json: bool, alone: bool) -> None:
    if as_json:
        print_json(view)
    elif not alone:
        show(request_page(view, time.time()))
    elif view.state != "success":
        tell(f"request {view.request.id} ended in {view.state}: {because(view.reason)}")
    if view.state != "success":
        raise typer.Exit(DID_NOT_SUCCEED)


@application.command("show", rich_help_panel=REQUESTS)
def show_(context: typer.Context, *, request: RequestId, as_json: AsJson = False) -> None:
    """Show all that is known of a request."""
    shell: Shell = context.obj
    with shell.client() as client:
        view = client.status(request)
    print_json(view) if as_json else show(request_page(view, time.time()))


@application.command(rich_help_panel=REQUESTS)
def logs(
    context: typer.Context,
    *,
    request: RequestId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show what a request prints, until its end.")] = False,
    whole: Annotated[bool, typer.Option("--all", help="All logs, not the build log alone.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the logs of a request that has ended, or follow one that runs."""
    shell: Shell = context.obj
    with shell.client() as client:
        view = client.status(request)
        if view.state in FINAL:
            _print_logs(client, view, whole=whole, as_json=as_json)
        elif follow:
            _follow_logs(client, view.request.id, as_json=as_json)
        else:
            tell(f"request {view.request.id} is {view.state}: its log is kept at its end; -f follows it")


def _print_logs(client: Client, view: RequestView, *, whole: bool, as_json: bool) -> None:
    builds = [artifact for artifact in view.artifacts if artifact.category == BUILD_LOG]
    debug = [artifact for artifact in view.artifacts if artifact.category == DEBUG_LOGS]
    files = [(a, entry) for a in ([*builds, *debug] if whole else builds or debug) for entry in a.files]
    if as_json:
        texts = [b"".join(client.read_file(entry)).decode(errors="replace") for _, entry in files]
        print_json(
            [
                {"artifact": artifact.id, "file": entry.path, "text": text}
                for (artifact, entry), text in zip(files, texts, strict=True)
            ]
        )
        return
    if not files:
        tell(f"request {view.request.id} has no log: it ended in {view.state}. {because(view.reason)}")
    for artifact, entry in files:
        if len(files) > 1:
            typer.echo(f"==> {entry.path} (artifact {artifact.id}) <==")
        chunks = client.read_file(entry)
        if sys.stdout.isatty():
            sys.stdout.writelines(printable_lines(chunks))
        else:
            sys.stdout.flush()
            sys.stdout.buffer.writelines(chunks)


def _follow_logs(client: Client, request: str, *, as_json: bool) -> None:
    with closing(client.follow_logs(request)) as stream:
        if as_json:
            for item in stream:  # a document each line: there is no end to wait for
                sys.stdout.write(encode_line(item).decode())
                sys.stdout.flush()
            return
        _watch(stream, request, logs=True)


# ---------------------------------------------------------------- tasks


@application.command(rich_help_panel=HERE)
def tasks(
    *,
    name: Annotated[str | None, typer.Argument(metavar="TASK", help="One task: print its schema.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the tasks of this installation: names and versions; or print the schema of one's data."""
    silence_logging()
    for module, text in load_tasks().items():
        tell(f"{module} does not import, so its tasks are missing: {text}")
    known = {one: Task.class_from_name(one) for one in sorted(Task._sub_tasks)}  # noqa: SLF001  # the document's name for it
    if name is not None and name.lower() not in known:
        raise SubmitterError(f"expected the name of a task ({', '.join(known)}), got {name!r}")
    chosen = known if name is None else {name.lower(): known[name.lower()]}
    if as_json:
        print_json([_describe(one, task) for one, task in chosen.items()])
    elif name is not None:
        print_json(chosen[name.lower()].TASK_DATA_SCHEMA)
    else:
        show(task_table((one, task.TASK_VERSION, _what(task)) for one, task in chosen.items()))


def _describe(name: str, task: type[Task]) -> dict[str, Any]:
    return {"name": name, "version": task.TASK_VERSION, "what": _what(task), "schema": task.TASK_DATA_SCHEMA}


def _what(task: type[Task]) -> str:
    return (task.__doc__ or "").strip().partition("\n")[0]


# ---------------------------------------------------------------- residents


@application.command(rich_help_panel=RESIDENTS)
def scheduler(
    context: typer.Context,
    *,
    ledger: Annotated[str | None, typer.Option(metavar="URL", help="sqlite:////PATH or postgresql://...")] = None,
    metrics_listen: MetricsListen = None,
    retry_delay: Annotated[float | None, typer.Option(metavar="SECONDS", help="Before a second attempt.")] = None,
    no_worker_after: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="When an event says that nobody can run a request.")
    ] = None,
) -> None:
    """Run the scheduler: it keeps the ledger and gives requests to workers."""
    shell: Shell = context.obj
    settings = shell.resident(
        {
            "ledger": ledger,
            "scheduler.metrics_listen": metrics_listen,
            "scheduler.retry_delay": retry_delay,
            "scheduler.no_worker_after": no_worker_after,
        }
    )
    from mqworker import scheduler as resident  # noqa: PLC0415  # loads the database driver

    asyncio.run(
        resident.run(
            amqp_url=settings.amqp_url,
            prefix=settings.prefix,
            ledger_url=settings.ledger,
            store_url=settings.store,
            retry_delay=settings.scheduler.retry_delay,
            no_worker_after=settings.scheduler.no_worker_after,
            pause_after=settings.scheduler.pause_after,
            group_weights=settings.scheduler.group_weights,
            concurrency_limits=settings.scheduler.concurrency_limits,
            rule=settings.access.rule,
            operators=settings.access.operators,
            groups=settings.access.groups,
            metrics_listen=settings.scheduler.metrics_listen,
        )
    )


@application.command(rich_help_panel=RESIDENTS)
def worker(
    context: typer.Context,
    *,
    name: Annotated[str | None, typer.Option(help="A name of its own in the pool; default: the host's.")] = None,
    slots: Annotated[int | None, typer.Option(help="How many tasks at a time; default: as many as cores.")] = None,
    state_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Its lock, and outcomes not yet told.")] = None,
    work_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where tasks work; other users may search it.")
    ] = None,
    metrics_listen: MetricsListen = None,
    metadata_interval: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Between looks at this host.")
    ] = None,
    drain_grace: Annotated[float | None, typer.Option(metavar="SECONDS", help="For runs in hand, at SIGTERM.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Reported in system:tags; may be repeated.")] = None,
    allow_task: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="Run no other; may be repeated; default: all.")
    ] = None,
    deny_task: Annotated[list[str] | None, typer.Option(metavar="TASK", help="Do not run it; may be repeated.")] = None,
    min_free_disk: Annotated[
        int | None, typer.Option(metavar="BYTES", help="Take no work with less free; 0: take it always.")
    ] = None,
) -> None:
    """Run a worker: it runs what this host can run."""
    shell: Shell = context.obj
    settings = shell.resident(
        {
            "worker.name": name,
            "worker.slots": slots,
            "worker.state_dir": state_dir,
            "worker.work_dir": work_dir,
            "worker.metrics_listen": metrics_listen,
            "worker.metadata_interval": metadata_interval,
            "worker.drain_grace": drain_grace,
            "worker.tags": tag or None,
            "worker.allow_tasks": allow_task or None,
            "worker.deny_tasks": deny_task or None,
            "worker.min_free_disk": min_free_disk,
        }
    )
    from mqworker import worker as resident  # noqa: PLC0415  # the other commands do without

    asyncio.run(
        resident.run(
            amqp_url=settings.amqp_url,
            prefix=settings.prefix,
            store_url=settings.store,
            name=settings.worker.name,
            slots=settings.worker.slots,
            state_dir=settings.worker.state_directory(),
            work_dir=settings.worker.work_dir,
            metadata_interval=settings.worker.metadata_interval,
            drain_grace=settings.worker.drain_grace,
            static_metadata=settings.worker.static_metadata(),
            allow_tasks=settings.worker.allow_tasks,
            deny_tasks=settings.worker.deny_tasks,
            metrics_listen=settings.worker.metrics_listen,
            bounds=settings.worker.limits,
            min_free_disk=settings.worker.min_free_disk,
        )
    )


@application.command(rich_help_panel=HERE)
def demo(
    context: typer.Context,
    *,
    build: Annotated[bool, typer.Option(help="Build a Debian package, too.")] = True,
    directory: Annotated[Path | None, typer.Option(metavar="DIR", help="Where everything goes.")] = None,
    prepare_only: Annotated[bool, typer.Option("--prepare-only", help="Make the build chroot, and stop.")] = False,
) -> None:
    """Show the whole thing on this machine: a private broker, a scheduler, two workers, and a real build.

    With --amqp-url or MQWORKER_AMQP_URL it uses that broker.
    """
    shell: Shell = context.obj
    silence_logging()
    loaded = shell.load()
    from mqworker import demo as resident  # noqa: PLC0415  # the other commands do without

    # A broker in a settings file is somebody's farm: a demo goes there only if told so here and now.
    named = loaded.sources.get("amqp_url") in {"--amqp-url", "MQWORKER_AMQP_URL"}
    code = resident.run(
        amqp_url=loaded.settings.amqp_url if named else None,
        build=build,
        directory=directory,
        prepare_only=prepare_only,
    )
    raise typer.Exit(code)


# ---------------------------------------------------------------- here and now


@application.command("run", rich_help_panel=HERE)
def run_(
    *,
    task: TaskName,
    data: Data = None,
    file: DataFile = None,
    given: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", metavar="ID=PATH", help="An input artifact: a .dsc, a .changes or a directory."),
    ] = None,
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the artifacts there.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run one task here and now, without a broker: for those who write tasks. Its log goes to standard error."""
    silence_logging()
    inputs = dict(_input(text, task) for text in given or ())
    ended = rehearse(task, read_data(data, file), inputs=inputs, keep=keep, say=sys.stderr.write)
    if as_json:
        print_json(ended)
    else:
        show(artifact_table(ended.artifacts))
        if keep is not None:
            for artifact in ended.artifacts:
                typer.echo(f"artifact {artifact.id} is in {kept_directory(keep, artifact.id, artifact.category)}")
        typer.echo(f"{task}: {ended.result}{': ' if ended.reason else ''}{because(ended.reason)}")
    if ended.result != "success":
        raise typer.Exit(INTERRUPTED if ended.result == "aborted" else DID_NOT_SUCCEED)


def _input(text: str, task: str) -> tuple[int, Given]:
    number, _, name = text.partition("=")
    if not number.isdecimal() or not name:
        raise SubmitterError(f"expected --input ID=PATH, got {text!r}")
    path = Path(name)
    if path.is_dir():
        load_tasks()
        category = Task.class_from_name(task).INPUT_ARTIFACT_CATEGORY if Task.is_valid_task_name(task) else None
        files = {str(one.relative_to(path)): one for one in sorted(path.rglob("*")) if one.is_file()}
        return int(number), Given(category=category or "local:files", name=path.name, data={}, files=files)
    return int(number), cli_artifact.read_debian(path)


@application.command(rich_help_panel=HERE)
def doctor(context: typer.Context, *, as_json: AsJson = False) -> None:
    """Look at broker, rights, scheduler, store, ledger, directories, tasks and tools: each line ok, or what to do."""
    silence_logging()
    shell: Shell = context.obj
    settings = shell.load().settings
    from mqworker.doctor import examine  # noqa: PLC0415  # loads every door

    checks = examine(
        amqp_url=settings.amqp_url,
        prefix=settings.prefix,
        store_url=settings.store,
        ledger_url=settings.ledger,
        state_directory=settings.worker.state_directory(),
        work_directory=settings.worker.work_dir,
    )
    found = []
    for one in checks:
        check = replace(one, finding=without_secrets(one.finding))  # what others say can have them
        found.append(check)
        if not as_json:
            show(check_table([(check.state, check.what, check.finding, check.advice)]))
    if as_json:
        print_json(found)
    if any(check.state == "problem" for check in found):
        raise typer.Exit(MACHINE_NOT_RIGHT)


@application.command(rich_help_panel=HERE)
def version(*, as_json: AsJson = False) -> None:
    """Print the version."""
    python = platform.python_version()
    print_json({"mqworker": __version__, "python": python}) if as_json else typer.echo(
        f"mqworker {__version__} (Python {python})"
    )
