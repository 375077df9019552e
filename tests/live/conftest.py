"""A real pool for tests: schedulers and workers as processes of their own, on a real broker."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pika
import pytest

from mqworker.client import Client
from mqworker.errors import Unanswered
from mqworker.messages import RequestView
from mqworker.store import Store

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
            # It leads a session of its own, and yet must not outlive tests that are killed.
            ["setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-P", "-m", "mqworker", *command],
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
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        time_left = time.monotonic() + 20
        for process in self.processes.values():
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
