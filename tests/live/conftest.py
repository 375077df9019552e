"""A real pool for tests: schedulers and workers as processes of their own, on a real broker."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

import msgspec
import pika
import pytest

from mqworker.amqp import Consumer, Delivery, Link, Plan
from mqworker.client import Client
from mqworker.errors import Unanswered
from mqworker.messages import (
    FULL_ID,
    AbortRequests,
    ArtifactList,
    Capability,
    CapabilityList,
    CountRequests,
    DrainWorkers,
    Explain,
    Explanation,
    FileEntry,
    GetCapabilities,
    GetPool,
    GetRequests,
    GetStates,
    ImportArtifact,
    ListArtifacts,
    ListPauses,
    ListRequests,
    ListWorkers,
    LogText,
    Pause,
    PauseList,
    PauseView,
    Pool,
    Problem,
    Query,
    Receipt,
    Receipted,
    RecordedArtifact,
    RefreshWorkers,
    Reprioritise,
    Request,
    RequestCount,
    RequestEvent,
    RequestEvents,
    RequestList,
    RequestView,
    Resume,
    RetryRequest,
    StateList,
    Submit,
    WorkerList,
    WorkerView,
    decode,
    encode,
)
from mqworker.store import Store
from mqworker.topology import Topology

TASKS = Path(__file__).parent / "taskbox"
PATIENCE = 180.0  # seconds; nothing here takes a third of it, unless the machine is very busy


def eventually(met: Callable[[], object], what: str, seconds: float = PATIENCE):
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + seconds
    while True:
        found = met()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)  # between two looks at what has no event


def alive(pid: int) -> bool:
    """Tell whether a process lives; a zombie does not."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


class LivePool:
    """Start, signal and look at the processes of a pool."""

    def __init__(self, directory: Path, amqp_url: str, prefix: str) -> None:
        self.directory = directory
        self.amqp_url = amqp_url
        self.prefix = prefix
        self.processes: dict[str, subprocess.Popen] = {}
        # Each leads a session of its own, and yet must not outlive tests that are killed.
        self.launcher = ["setpriv", "--pdeathsig", "KILL"]
        self.store_url = f"file://{directory / 'store'}"
        Store.open(self.store_url, create=True)  # workers may start before their scheduler
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MQWORKER_")},
            "PYTHONPATH": os.pathsep.join(filter(None, (str(TASKS), os.environ.get("PYTHONPATH")))),
            "MQWORKER_TASK_MODULES": "live_tasks",
            "MQWORKER_AMQP_URL": amqp_url,
            "MQWORKER_PREFIX": prefix,
            "MQWORKER_STORE": self.store_url,
            "MQWORKER_LEDGER": f"sqlite:///{directory / 'ledger.db'}",
            "MQWORKER_SCHEDULER_METRICS_LISTEN": "",
            "MQWORKER_SCHEDULER_RETRY_DELAY": "0.2",
            "MQWORKER_WORKER_WORK_DIR": str(directory / "work"),
            "MQWORKER_WORKER_METRICS_LISTEN": "",
            "MQWORKER_WORKER_DRAIN_GRACE": "2",
            "MQWORKER_CONFIG": os.devnull,
        }

    def client(self, **arguments) -> Client:
        return Client(self.amqp_url, prefix=self.prefix, store_url=self.store_url, **{"timeout": PATIENCE, **arguments})

    def start(self, name: str, *command: str, **environment: str) -> subprocess.Popen:
        log = (self.directory / f"{name}.log").open("ab")
        process = subprocess.Popen(
            [*self.launcher, "--", sys.executable, "-P", "-m", "mqworker", *command],
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()
        self.processes[name] = process
        return process

    def scheduler(self, **environment: str) -> subprocess.Popen:
        return self.start("scheduler", "scheduler", **environment)

    def worker(self, name: str, slots: int = 1, **environment: str) -> subprocess.Popen:
        state = str(self.directory / "state" / name)
        return self.start(name, "worker", "--name", name, "--slots", str(slots), "--state-dir", state, **environment)

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def await_workers(self, client: Client, *names: str) -> None:
        """Wait until the scheduler has these workers, and each consumes its queue."""

        def there() -> bool:
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended with {process.returncode}: {self.log(name)}"
            try:
                online = {worker.name for worker in client.workers() if worker.state == "online" and worker.queue}
            except Unanswered:
                return False
            return online.issuperset(names)

        eventually(there, f"workers {names} online")

    def up(self, stack: ExitStack, *workers: str, slots: int = 1) -> Client:
        """Start a scheduler and workers, and return a client that they answer."""
        self.scheduler()
        for name in workers:
            self.worker(name, slots)
        client = stack.enter_context(self.client())
        self.await_workers(client, *workers)
        return client

    @contextmanager
    def channel(self) -> Iterator[pika.channel.Channel]:
        """Speak AMQP as a program does that has never heard of mqworker's own client."""
        connection = pika.BlockingConnection(pika.URLParameters(self.amqp_url))
        try:
            channel = connection.channel()
            channel.confirm_delivery()
            yield channel
        finally:
            connection.close()

    def end(self, name: str, number: int = signal.SIGTERM) -> int:
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(PATIENCE)

    def close(self) -> None:
        # The workers first, since they wait for a scheduler's answer to what they hand back; told twice, not for long.
        schedulers = [process for name, process in self.processes.items() if name.startswith("scheduler")]
        workers = [process for process in self.processes.values() if process not in schedulers]
        for group, signals in ((workers, (signal.SIGTERM, signal.SIGINT)), (schedulers, (signal.SIGTERM,))):
            for process in group:
                for number in (signal.SIGCONT, *signals):
                    process.send_signal(number)
            time_left = time.monotonic() + 20
            for process in group:
                try:
                    process.wait(max(0.1, time_left - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@pytest.fixture
def live_directory() -> Iterator[Path]:
    """A directory that other uids can search, for the chroots of builds."""
    directory = Path(tempfile.mkdtemp(prefix="mqworker-test-", dir="/var/tmp"))
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def pool(live_directory, amqp_url, prefix) -> Iterator[LivePool]:
    """A pool on the shared broker, in a vhost of its own."""
    one = LivePool(live_directory, amqp_url, prefix)
    yield one
    one.close()


@pytest.fixture
def make_pool(live_directory) -> Iterator[Callable[[str, str], LivePool]]:
    """Make a pool on any broker: for tests that hurt theirs."""
    made = []

    def make(url: str, prefix: str = "mqworker") -> LivePool:
        made.append(LivePool(live_directory, url, prefix))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(name="eventually", scope="session")
def eventually_fixture():
    return eventually


def commands_below(ancestor: int) -> dict[int, list[str]]:
    """Return the command lines of what stems from a process."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    below = {ancestor}
    for _ in parents:
        more = {pid for pid, parent in parents.items() if parent in below} - below
        if not more:
            break
        below |= more
    found = {}
    for pid in below - {ancestor}:
        with suppress(OSError):
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    return found


@pytest.fixture(name="commands_below", scope="session")
def commands_below_fixture():
    return commands_below


@pytest.fixture(name="alive", scope="session")
def alive_fixture():
    return alive


class Runs:
    """Read what the Journal task wrote."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "journal"
        self.gate = directory / "gate"
        self.data = {"journal": str(self.path), "gate": str(self.gate)}

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def count(self, what: str) -> int:
        return sum(line["what"] == what for line in self.lines())

    def open(self) -> None:
        self.gate.touch()

    def await_starts(self, number: int) -> None:
        eventually(lambda: self.count("start") >= number, f"{number} starts in the journal")

    def assert_no_overlap(self) -> None:
        """Assert that when a run started, the process of every earlier one had ended, or its run had."""
        running: set[int] = set()
        for line in self.lines():
            if line["what"] == "start":
                assert not [pid for pid in running if pid != line["pid"] and alive(pid)], self.lines()
                running.add(line["pid"])
            else:
                running.discard(line["pid"])


@pytest.fixture
def runs(live_directory) -> Runs:
    return Runs(live_directory)


def final(client: Client, *ids: str) -> list[RequestView]:
    return client.wait(list(ids), timeout=PATIENCE)


@pytest.fixture(name="final", scope="session")
def final_fixture():
    return final


class FakeScheduler:
    """Answer like a scheduler, from memory; `deaf` drops what comes, `mute_receipts` so many receipts."""

    def __init__(self, url: str, prefix: str) -> None:
        self.url, self.topology = url, Topology(prefix)
        self.views: dict[str, RequestView] = {}
        self.artifacts: list[RecordedArtifact] = []
        self.workers = [WorkerView(name="w1", host="h", state="online", slots=2)]
        self.classes: list[Capability] = []
        self.pauses: dict[tuple[str, str], PauseView] = {}
        self.explanation: Explanation | None = None
        self.submits: list[Submit] = []
        self.queries: list[Query] = []
        self.deaf = False
        self.mute_receipts = 0
        self.quiet_events = False
        self.store_id = "none"
        self.before_answer: Callable[[Query], None] = lambda _: None

    def __enter__(self) -> Self:
        ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._live(ready)))
        self.thread.start()
        assert ready.wait(PATIENCE)
        return self

    def __exit__(self, *_) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()

    async def _live(self, ready: threading.Event) -> None:
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        self.link = Link(self.url, name="fake scheduler", plan=self._plan)
        running = asyncio.create_task(self.link.run())
        await self.link.wait_up(PATIENCE)
        ready.set()
        await self.stop.wait()
        await self.link.close()
        await running

    def _plan(self, _epoch: str) -> Plan:
        consumers = (
            Consumer(queue=self.topology.submit_queue().name, on_delivery=self._on_submit),
            Consumer(queue=self.topology.api_queue().name, on_delivery=self._on_query),
        )
        return Plan(exchanges=self.topology.exchanges(), queues=self.topology.queues(), consumers=consumers)

    def _on_submit(self, delivery: Delivery) -> None:
        self.link.ack(delivery)
        if self.deaf:
            return
        submit = decode(delivery.body, Submit)
        self.submits.append(submit)
        results = [self._accept(request) for request in submit.requests]
        if self.mute_receipts:
            self.mute_receipts -= 1
            return
        self._reply(delivery, Receipt(term=1, results=results[::-1]))

    def _accept(self, request: Request) -> Receipted:
        if request.task == "nope":
            return Receipted(id=request.id, status="rejected", reason="'nope' is not a registered task_name")
        if request.id in self.views:
            same = self.views[request.id].request == request
            return Receipted(id=request.id, status="known" if same else "conflict")
        self.add(request)
        return Receipted(id=request.id, status="accepted")

    def add(self, request: Request | None = None, **facts) -> str:
        """Have a request that nobody has submitted here; returns its id."""
        request = request or Request(id=str(uuid.uuid4()), task="noop")
        given = {"state": "pending", "attempt": 0, "submitted": 1.0, **facts}
        self.views[request.id] = RequestView(seq=len(self.views) + 1, request=request, **given)
        return request.id

    def _on_query(self, delivery: Delivery) -> None:
        self.link.ack(delivery)
        if self.deaf:
            return
        query = decode(delivery.body, Query)
        self.queries.append(query)
        self.before_answer(query)
        self._reply(delivery, self._answer(query))

    def _answer(self, query: Query):
        match query:
            case GetRequests(ids=ids):
                return self._found(ids)
            case GetStates(ids=ids):
                return StateList(states={view.request.id: view.state for view in self._found(ids).requests})
            case AbortRequests(ids=ids, reason=reason):
                for view in self._found(ids).requests:
                    if view.state in {"pending", "offered"}:
                        self._change(view, state="aborted")
                    elif view.state == "running":
                        self._change(view, abort=reason)
                found = self._found(ids)
                marked = [one for one in found.missing if FULL_ID.fullmatch(one)]
                missing = [one for one in found.missing if one not in marked]
                return RequestList(requests=found.requests, missing=missing, marked=marked)
            case Reprioritise(ids=ids, priority=priority):
                for view in self._found(ids).requests:
                    if view.state in {"pending", "offered", "running"}:
                        self._change(view, request=msgspec.structs.replace(view.request, priority=priority))
                return self._found(ids)
            case ListRequests(limit=limit, before=before, oldest=oldest):
                views = [view for view in self._selected(query) if before is None or view.seq < before]
                return RequestList(requests=(views if oldest else views[::-1])[:limit])
            case CountRequests():
                return RequestCount(number=len(self._selected(query)))
            case RetryRequest(id=old, new_id=new):
                if self.views[old].state in {"pending", "offered", "running"}:
                    return Problem(kind="conflict", text=f"request {old} is pending: it has not ended")
                self._accept(msgspec.structs.replace(self.views[old].request, id=new))
                return RequestList(requests=[self.views[new]])
            case Pause(kind=kind, name=name, reason=reason):
                self.pauses[kind, name] = PauseView(kind=kind, name=name, reason=reason, since=1.0)
                return PauseList(pauses=[*self.pauses.values()])
            case Resume(kind=kind, name=name):
                self.pauses.pop((kind, name), None)
                return PauseList(pauses=[*self.pauses.values()])
            case ListPauses():
                return PauseList(pauses=[*self.pauses.values()])
            case Explain(id=asked):
                return self.explanation or Problem(kind="not_found", text=f"no request {asked}")
            case GetCapabilities(limit=limit, after=after):
                classes = [one for one in self.classes if after is None or one.name > after]
                return CapabilityList(classes=classes[:limit], requirements=3, escaped=1)
            case ListWorkers(limit=limit, after=after):
                workers = [worker for worker in self.workers if after is None or worker.name > after]
                return WorkerList(workers=workers[:limit])
            case DrainWorkers(names=names, classes=classes):
                if "nope" in classes:
                    return Problem(kind="not_found", text="expected names of capability classes, got nope")
                chosen = [one for one in self.workers if one.name in names or query.everybody or classes]
                for one in chosen:
                    self.workers[self.workers.index(one)] = msgspec.structs.replace(
                        one, draining=True, paused="drained"
                    )
                return WorkerList(workers=[one for one in self.workers if one.name in {each.name for each in chosen}])
            case RefreshWorkers():
                return WorkerList(workers=self.workers)
            case ListArtifacts(ids=ids):
                found = [a for a in self.artifacts if not ids or a.id in ids]
                return ArtifactList(artifacts=found, missing=[i for i in ids if i not in {a.id for a in found}])
            case ImportArtifact(artifact=artifact):
                if artifact.category == "debian:nope":
                    return Problem(kind="artifact_invalid", text="no such category")
                return ArtifactList(artifacts=[self.add_artifact(artifact.category, artifact.name, artifact.files)])
            case GetPool():
                states = Counter(view.state for view in self.views.values())
                return Pool(term=1, version="0", store=self.store_id, requests=dict(states), workers=1, classes=1)

    def _found(self, ids: list[str]) -> RequestList:
        known = {asked: asked if asked in self.views else self._full(asked) for asked in ids}
        return RequestList(
            requests=[self.views[full] for full in known.values() if full],
            missing=[asked for asked, full in known.items() if not full],
        )

    def _full(self, beginning: str) -> str | None:
        return next((id_ for id_ in self.views if id_.startswith(beginning)), None)

    def _selected(self, query: ListRequests | CountRequests) -> list[RequestView]:
        return [
            view
            for view in self.views.values()
            if (not query.states or view.state in query.states)
            and query.task in {None, view.request.task}
            and query.group in {None, view.request.group}
            and query.worker in {None, view.worker}
            and (query.submitted_before is None or view.submitted < query.submitted_before)
        ]

    def _change(self, view: RequestView, **facts) -> None:
        self.views[view.request.id] = msgspec.structs.replace(view, **facts)

    def _reply(self, delivery: Delivery, message) -> None:
        self.link.publish(
            exchange="",
            key=delivery.reply_to,
            body=encode(message),
            kind="",
            correlation_id=delivery.correlation_id,
            mandatory=False,
            persistent=False,
        )

    def add_artifact(self, category: str, name: str, files: list[FileEntry]) -> RecordedArtifact:
        self.artifacts.append(
            RecordedArtifact(id=len(self.artifacts) + 1, category=category, name=name, files=list(files))
        )
        return self.artifacts[-1]

    def tell(self, exchange: str, key: str, message) -> None:
        def publish() -> None:
            self.link.publish(exchange=exchange, key=key, body=encode(message), kind="", mandatory=False)

        self.loop.call_soon_threadsafe(publish)

    def move(self, request: str, state: str) -> None:
        view = self.views[request] = msgspec.structs.replace(self.views[request], state=state, attempt=1)
        event = RequestEvent(
            term=1, time=2.0, request=request, task=view.request.task, state=state, event="succeed", attempt=1
        )
        if not self.quiet_events:
            self.tell(self.topology.events, f"request.{view.request.task}.{state}", RequestEvents(events=[event]))

    def log(self, request: str, text: str, seq: int = 1) -> None:
        message = LogText(request=request, attempt=1, worker="w1", time=2.0, seq=seq, text=text)
        self.tell(self.topology.logs, request, message)


@pytest.fixture
def fake_scheduler() -> type[FakeScheduler]:
    """Hand the class to tests: they cannot import this file."""
    return FakeScheduler


@pytest.fixture
def scheduler(amqp_url, prefix) -> Iterator[FakeScheduler]:
    """A scheduler that answers from memory, on a real broker."""
    with FakeScheduler(amqp_url, prefix) as fake:
        yield fake
