"""The whole thing on one machine: a private broker, a scheduler, two workers, a real Debian build, twenty noops.

Everything runs as it would on a farm: each part is a process of its own, and the demo is a client like any other.
Whatever happens, it takes down what it has started; what it leaves is the directory with the artifacts, and the
build chroot in sbuild's own cache.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from rich.live import Live
from rich.table import Table

from mqworker import amqp, brokerurl, debianhost, processes
from mqworker.client import Client
from mqworker.errors import HostUnfit, MqworkerError, OutsideError, Unanswered
from mqworker.lifecycle import FINAL
from mqworker.messages import LogProgress, LogText, RecordedArtifact, Request, RequestEvent, RequestView
from mqworker.privatenode import PrivateNode
from mqworker.screen import Screen, artifact_table, duration, printable, request_table
from mqworker.topology import Topology

BROKER_PACKAGES: Final = ("rabbitmq-server",)
BUILD_PACKAGES: Final = ("sbuild", "mmdebstrap", "uidmap", "dpkg-dev")
SOURCE: Final = "hello"
NOOPS: Final = 20
WORKERS: Final = ("anna", "bert")
SLOTS: Final = 2
START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 20.0
NO_BUILD: Final = 3  # exit code: all is well, but sbuild cannot work here


@dataclass(frozen=True)
class _Build:
    """What a build needs: a chroot of this suite."""

    suite: str
    architecture: str


class _Interrupted(BaseException):
    """Raised by SIGTERM, as KeyboardInterrupt is by SIGINT."""


def run(*, amqp_url: str | None, build: bool, directory: Path | None, prepare_only: bool) -> int:
    """Run the demo and return its exit code: 0, 1 if a request did not succeed, 3 if nothing can be built here.

    Raises:
        HostUnfit: the broker cannot be installed or started.
        OutsideError: the broker or the package archive does not answer.
    """
    screen = Screen()

    def say(text: str) -> None:
        screen.print(f"[dim]demo[/]  {printable(text)}", soft_wrap=True)

    if amqp_url is None:
        debianhost.install_packages(BROKER_PACKAGES, say)
    wanted = _prepare_build(say) if build else None
    if prepare_only:
        say("ready" if not isinstance(wanted, str) else f"nothing can be built here: {wanted}")
        return NO_BUILD if isinstance(wanted, str) else 0
    keep = (directory or Path("mqworker-demo")).resolve()
    keep.mkdir(parents=True, exist_ok=True)
    with _terminable(), ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="mqworker-demo-", dir="/var/tmp"))  # builds are too large for /tmp
        stack.callback(processes.remove_tree, scratch)
        scratch.chmod(0o711)  # a build's own uid has to get through
        try:
            return _show(screen, say, stack, amqp_url=amqp_url, scratch=scratch, keep=keep, build=wanted)
        finally:
            say("takes everything down")
            for number in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C must not leave half of it behind
                signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM take everything down as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise _Interrupted

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except _Interrupted:
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare_build(say: Callable[[str], None]) -> _Build | str:
    """Install and make what a build needs; return in one line why nothing can be built here."""
    try:
        debianhost.install_packages(BUILD_PACKAGES, say)
        debianhost.ensure_subordinate_ids(say)
        build = _Build(debianhost.default_suite(), debianhost.native_architecture())
        debianhost.ensure_chroot(build.suite, build.architecture, say)
    except MqworkerError as error:
        return str(error)
    return build


# ---------------------------------------------------------------- the pool


def _show(
    screen: Screen,
    say: Callable[[str], None],
    stack: ExitStack,
    *,
    amqp_url: str | None,
    scratch: Path,
    keep: Path,
    build: _Build | str | None,  # a str says why nothing can be built
) -> int:
    prefix = "mqworker"
    if amqp_url is None:
        say("starts a private RabbitMQ node on loopback")
        amqp_url = stack.enter_context(_node(scratch / "broker")).url
    else:
        prefix = f"mqworker-demo-{uuid.uuid4().hex[:8]}"
        say(
            f"uses the broker {brokerurl.redact(amqp_url)}, where everything is named {prefix}.*,"
            " and is removed at the end"
        )
    settings = {
        "MQWORKER_AMQP_URL": amqp_url,
        "MQWORKER_PREFIX": prefix,
        "MQWORKER_STORE": f"file://{scratch / 'store'}",
        "MQWORKER_LEDGER": f"sqlite:///{scratch / 'ledger.db'}",
        "MQWORKER_WORKER_WORK_DIR": str(scratch / "work"),
        "MQWORKER_WORKER_SLOTS": str(SLOTS),
        "MQWORKER_WORKER_METRICS_LISTEN": "",
        "MQWORKER_WORKER_DRAIN_GRACE": "0",
        "MQWORKER_SCHEDULER_METRICS_LISTEN": "",
        "MQWORKER_LOG_LEVEL": "warning",
    }
    say(f"starts a scheduler, and the workers {' and '.join(WORKERS)} with {SLOTS} slots each")
    parts = _Parts(scratch, settings)
    if prefix != "mqworker":
        stack.callback(parts.clean_broker, amqp_url, prefix)
    stack.callback(parts.stop)
    client = Client(amqp_url, prefix=prefix, store_url=settings["MQWORKER_STORE"])
    parts.start("scheduler")
    stack.enter_context(client)
    parts.wait(client, workers=0)
    for name in WORKERS:
        parts.start(name, "worker", "--name", name, "--state-dir", str(scratch / "state" / name))
    parts.wait(client, workers=len(WORKERS))
    requests = [
        Request(
            id=str(uuid.uuid4()),
            task="noop",
            data={"duration": 0.2 * (number % 10 + 1), "progress": 10, "log_lines": 3},
        )
        for number in range(NOOPS)
    ]
    if isinstance(build, _Build):
        requests.insert(0, _build_request(client, scratch / "source", build, say))
    views = _follow(screen, client, parts, requests)
    return _close(screen, say, client, views=views, keep=keep, build=build)


@contextlib.contextmanager
def _node(directory: Path) -> Iterator[PrivateNode]:
    """Run a private broker; it is killed in the end, for nobody needs its data any more."""
    node = PrivateNode(directory, plugins=())
    try:
        node.start()
        yield node
    finally:
        node.kill()


class _Parts:
    """Hold the processes of the pool."""

    def __init__(self, scratch: Path, settings: dict[str, str]) -> None:
        self._scratch = scratch
        # A settings file of somebody's farm has no say here.
        empty = scratch / "mqworker.toml"
        empty.touch()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MQWORKER_")}
        tasks = {
            name: value for name, value in os.environ.items() if name.startswith(("MQWORKER_TASK_", "MQWORKER_SBUILD_"))
        }
        self._environment = {**inherited, **tasks, **settings, "MQWORKER_CONFIG": str(empty)}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._queues: set[str] = set()

    def start(self, name: str, *command: str) -> None:
        with (self._scratch / f"{name}.log").open("wb") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-P", "-m", "mqworker", *(command or (name,))],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the demo, which then stops each in its turn
                preexec_fn=processes.die_with_parent,  # noqa: PLW1509  # it makes one system call
            )

    def check(self) -> None:
        """Raise if a part has ended by itself."""
        for name, process in self._running.items():
            if process.poll() is not None:
                tail = (self._scratch / f"{name}.log").read_text(errors="replace").strip().splitlines()[-5:]
                raise HostUnfit(
                    f"{name} ended with exit code {process.returncode}: {' | '.join(tail) or 'it said nothing'}"
                )

    def wait(self, client: Client, *, workers: int) -> None:
        """Wait until the scheduler answers and has so many workers."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            self.check()
            with contextlib.suppress(Unanswered):
                online = [worker for worker in client.workers() if worker.state == "online" and worker.queue]
                self._queues.update(worker.queue for worker in online if worker.queue)
                if len(online) >= workers:
                    return
            if time.monotonic() > deadline:
                raise OutsideError(
                    f"expected {workers} workers within {START_SECONDS:g} s; the logs are in {self._scratch}"
                )
            time.sleep(0.1)  # between two questions to the scheduler

    def stop(self) -> None:
        """Stop the workers, then the scheduler."""
        names = [name for name in self._running if name != "scheduler"]
        for group in (names, ["scheduler"]):
            for name in group:
                if name in self._running:
                    self._running[name].terminate()
            for name in group:
                if name not in self._running:
                    continue
                try:
                    self._running[name].wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    self._running[name].kill()
                    self._running[name].wait()

    def clean_broker(self, url: str, prefix: str) -> None:
        """Remove from somebody's broker what was declared there."""
        asyncio.run(amqp.remove(url, Topology(prefix), extra_queues=sorted(self._queues)))


# ---------------------------------------------------------------- the work


def _build_request(client: Client, directory: Path, build: _Build, say: Callable[[str], None]) -> Request:
    """Import a source package and ask for its build."""
    from tasks.debian import read_source_package  # noqa: PLC0415  # only a demo that builds needs python-debian

    offline = False
    try:
        dsc = debianhost.fetch_source(SOURCE, directory, build.suite, say)
    except MqworkerError as error:
        say(f"the archive does not give {SOURCE} ({error}): takes the small source package that mqworker brings along")
        dsc = debianhost.write_sample_source(directory)
        offline = True
    source = read_source_package(dsc)
    artifact = client.import_artifact(source.category, source.name, source.data, source.files)
    say(f"imported {source.name} as artifact {artifact.id}")
    data: dict[str, Any] = {
        "input": {"source_artifact_id": artifact.id},
        "distribution": build.suite,
        "host_architecture": build.architecture,
    }
    if offline:
        data["sbuild_options"] = ["--no-apt-update", "--bd-uninstallable-explainer=none"]
    return Request(id=str(uuid.uuid4()), task="sbuild", data=data, priority=10)


def _follow(screen: Screen, client: Client, parts: _Parts, requests: list[Request]) -> list[RequestView]:
    """Submit, and show a line for each running request until all have ended."""
    waiting = {request.id: request for request in requests}
    running: dict[str, LogProgress] = {}
    ended = 0

    def lines() -> Table:
        table = Table.grid(padding=(0, 2, 0, 0))
        for request, progress in sorted(running.items(), key=lambda item: item[1].since):
            fraction = "" if progress.fraction is None else f"{progress.fraction:4.0%}"
            table.add_row(
                request[:8],
                progress.task,
                printable(progress.stage or "")[:32],
                fraction,
                duration(time.time() - progress.since),
                progress.worker,
            )
        table.add_row(f"{ended} of {len(requests)}", "ended", f"{len(waiting) - len(running)} waiting", "", "", "")
        return table

    following = client.follow_logs()
    client.submit_many(requests)
    with contextlib.ExitStack() as stack:
        if screen.is_terminal:
            stack.enter_context(Live(get_renderable=lines, console=screen, refresh_per_second=8, transient=True))
        while waiting:
            item = next(following)
            if isinstance(item, LogText) or item.request not in waiting:
                continue
            match item:
                case LogProgress():
                    before = running.get(item.request)
                    running[item.request] = item
                    if not screen.is_terminal and (before is None or before.stage != item.stage):
                        screen.print(_plain_line(item))
                case RequestEvent(state=state) if state in FINAL:
                    running.pop(item.request, None)
                    del waiting[item.request]
                    ended += 1
                    if not screen.is_terminal:
                        screen.print(f"{item.request[:8]}  {item.task:8} {state}  ({ended} of {len(requests)})")
            parts.check()
    following.close()
    return client.wait([request.id for request in requests], timeout=START_SECONDS)


def _plain_line(progress: LogProgress) -> str:
    stage = printable(progress.stage or "")
    took = duration(time.time() - progress.since)
    return f"{progress.request[:8]}  {progress.task:8} {stage:32} {took:>6}  {progress.worker}"


# ---------------------------------------------------------------- the end


def _close(
    screen: Screen,
    say: Callable[[str], None],
    client: Client,
    *,
    views: list[RequestView],
    keep: Path,
    build: _Build | str | None,  # a str says why nothing can be built
) -> int:
    """Show tables, fetch the build's files, and say how it went."""
    screen.print(request_table(views, time.time()))
    made = [artifact for view in views if view.request.task == "sbuild" for artifact in view.artifacts]
    shown = made or [artifact for view in views for artifact in view.artifacts][:10]
    if shown:
        screen.print(artifact_table(shown))
    debs = _fetch(client, made, keep)
    failed = [view for view in views if view.state != "success"]
    for view in failed:
        reason = "" if view.reason is None else view.reason.text
        say(f"{view.request.task} {view.request.id[:8]} ended as {view.state}: {reason}")
    if isinstance(build, str):
        say(f"no package was built: {build}")
    for deb in debs:
        say(f"built {deb}")
    if made:
        say(f"its .changes, build log and the rest are in {keep}")
    if failed:
        return 1
    return NO_BUILD if isinstance(build, str) else 0


def _fetch(client: Client, made: list[RecordedArtifact], keep: Path) -> list[Path]:
    for artifact in made:
        client.fetch_artifact(artifact.id, keep)
    names = {entry.path for artifact in made for entry in artifact.files}
    return sorted(keep / name for name in names if name.endswith(".deb"))
