"""The measured systems: how the processes of each are started, and what was set for it.

Each has two processes that work, a submitter, and what else it needs: mqworker its scheduler and its agent, Celery and
Dramatiq their main processes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from benchmarks import work
from mqworker import processes
from mqworker.client import Client
from mqworker.errors import Unanswered
from mqworker.store import Store

ROOT: Final = Path(__file__).parents[1]
START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 20.0
POLL_SECONDS: Final = 0.05
AGENTS_POLL_SECONDS: Final = 0.5  # each look is the scheduler's work
WORKING: Final = 2  # processes of each system that work


@dataclass(frozen=True)
class Place:
    """Hold where one system runs in one round."""

    directory: Path
    broker: str
    database: str  # PostgreSQL; empty where no system needs it
    peers: Path | None  # the interpreter that has Celery and Dramatiq


class System:
    """Run one system; a context manager. Nobody works until `start_workers`."""

    title = ""
    settings = ""  # what was set, for the reader of the table
    results = False  # whether the submitter learns how each task ended

    def __init__(self, place: Place) -> None:
        self.place = place
        self.notes = place.directory / "notes"
        self.notes.mkdir()
        self._running: dict[str, subprocess.Popen[str]] = {}

    # ------------------------------------------------------------ what each says of itself

    def environment(self) -> Mapping[str, str]:
        """Return what its processes read besides."""
        return {"BENCHMARK_BROKER": self.place.broker}

    def submitter(self) -> Sequence[str]:
        """Return the submitter's command."""
        raise NotImplementedError

    def start_workers(self) -> None:
        """Start who works, and do not wait."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Start what has to be there before anything can be submitted."""

    # ------------------------------------------------------------ what is alike for all

    def __enter__(self) -> Self:
        try:
            self.prepare()
            self._start("submitter", *self.submitter(), talks=True)
            self._hear()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._running.values()):  # workers before a scheduler, which answers what they say last
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                processes.kill_descendants(process.pid)
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def order(self, **order: Any) -> dict[str, Any]:
        """Tell the submitter to do something, and return its answer."""
        pipe = self._running["submitter"].stdin
        assert pipe is not None  # noqa: S101  # it was asked for
        pipe.write(json.dumps(order) + "\n")
        pipe.flush()
        return self._hear()

    def roots(self) -> Collection[int]:
        """Return the processes of which all of this system's stem."""
        return [process.pid for process in self._running.values()]

    def cpu(self) -> float:
        """Return the CPU seconds that all its processes have used."""
        return sum(one.cpu_seconds for one in processes.usage(self.roots()).values())

    def await_runs(self, number: int, timeout: float) -> None:
        """Wait until so many tasks have run, in all."""
        deadline = time.monotonic() + timeout
        while (found := work.count(self.notes)) < number:
            self.check()
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.title}: expected {number} runs within {timeout:g} s, got {found}")
            time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Raise if a process has ended."""
        for name, process in self._running.items():
            if process.poll() is not None:
                raise RuntimeError(f"{self.title}: {name} ended with {process.returncode}: {self._log(name)}")

    def _start(self, name: str, *command: str, talks: bool = False) -> subprocess.Popen[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MQWORKER_")}
        with (self.place.directory / f"{name}.log").open("w") as log:
            process = self._running[name] = subprocess.Popen(
                command,
                env={
                    **inherited,
                    "PYTHONPATH": str(ROOT),
                    work.NOTES: str(self.notes),
                    **self.environment(),
                },
                cwd=self.place.directory,
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else log,
                stderr=log,
                text=True,
                preexec_fn=processes.die_with_parent,  # noqa: PLW1509  # it makes one system call
            )
        return process

    def _hear(self) -> dict[str, Any]:
        pipe = self._running["submitter"].stdout
        assert pipe is not None  # noqa: S101  # it was asked for
        line = pipe.readline()
        if not line:
            raise RuntimeError(f"{self.title}: the submitter ended: {self._log('submitter')}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _log(self, name: str) -> str:
        return (self.place.directory / f"{name}.log").read_text(errors="replace")[-2000:]


class Mqworker(System):
    """Run mqworker: a scheduler, and one agent with two slots."""

    title = "mqworker, SQLite"
    settings = "one agent with two slots; SQLite with full sync; everything else as it comes"
    results = True

    def ledger(self) -> str:
        """Return the ledger's URL."""
        return f"sqlite:///{self.place.directory / 'ledger.db'}"

    def environment(self) -> Mapping[str, str]:
        """Return its settings."""
        directory = self.place.directory
        return {
            "MQWORKER_TASK_MODULES": "benchmarks.counted",
            "MQWORKER_AMQP_URL": self.place.broker,
            "MQWORKER_STORE": f"file://{directory / 'store'}",
            "MQWORKER_LEDGER": self.ledger(),
            "MQWORKER_SCHEDULER_METRICS_LISTEN": "",
            "MQWORKER_WORKER_METRICS_LISTEN": "",
            "MQWORKER_WORKER_WORK_DIR": str(directory / "work"),
            "MQWORKER_WORKER_DRAIN_GRACE": "1",
            "MQWORKER_LOG_LEVEL": "warning",
            "MQWORKER_CONFIG": os.devnull,
        }

    def submitter(self) -> Sequence[str]:
        """Return the program that uses mqworker's client."""
        return [sys.executable, "-m", "benchmarks.mqworker_submitter"]

    def prepare(self) -> None:
        """Start the scheduler, and wait until it answers."""
        Store.open(self.environment()["MQWORKER_STORE"], create=True)
        self._start("scheduler", sys.executable, "-P", "-m", "mqworker", "scheduler")
        deadline = time.monotonic() + START_SECONDS
        with self.client() as client:
            while True:
                self.check()
                with suppress(Unanswered):
                    client.pool()
                    return
                if time.monotonic() > deadline:
                    raise RuntimeError(f"expected a scheduler within {START_SECONDS:g} s")

    def start_workers(self) -> None:
        """Start the agent."""
        self.start_agent("w", WORKING)

    def start_agent(self, name: str, slots: int) -> int:
        """Start an agent, and return its process."""
        state = ("--state-dir", str(self.place.directory / "state" / name))
        command = ("-P", "-m", "mqworker", "worker", "--name", name, "--slots", str(slots), *state)
        return self._start(name, sys.executable, *command).pid

    def scheduler(self) -> int:
        """Return the scheduler's process."""
        return self._running["scheduler"].pid

    def client(self) -> Client:
        """Return a client, which is not connected yet."""
        return Client(self.place.broker, store_url=self.environment()["MQWORKER_STORE"], timeout=START_SECONDS)

    def await_agents(self, client: Client, number: int, timeout: float = START_SECONDS) -> None:
        """Wait until so many agents consume."""
        deadline = time.monotonic() + timeout
        while sum(one.state == "online" and one.queue is not None for one in client.workers()) < number:
            self.check()
            if time.monotonic() > deadline:
                raise RuntimeError(f"expected {number} agents within {timeout:g} s")
            time.sleep(AGENTS_POLL_SECONDS)


class MqworkerPostgresql(Mqworker):
    """Run mqworker with its ledger on PostgreSQL."""

    title = "mqworker, PostgreSQL"
    settings = "likewise; PostgreSQL with the defaults of its initdb, fsync among them"

    def ledger(self) -> str:
        """Return the ledger's URL."""
        return self.place.database


class Peer(System):
    """Run what has an environment of its own."""

    def _python(self) -> str:
        if self.place.peers is None:
            raise RuntimeError(f"{self.title} needs the peers' environment")
        return str(self.place.peers)


class Celery(Peer):
    """Run Celery without results."""

    title = "Celery, no results"
    settings = (
        "`worker --concurrency 2 --pool prefork`, quorum queue, `confirm_publish`, `task_acks_late`, "
        "`worker_prefetch_multiplier` 64, `task_ignore_result`; submitted with one producer for all"
    )

    def results_url(self) -> str | None:
        """Return where results go."""
        return None

    def environment(self) -> Mapping[str, str]:
        """Return what benchmarks.celery_app reads."""
        url = self.results_url()
        return {**super().environment(), **({} if url is None else {"BENCHMARK_RESULTS": url})}

    def submitter(self) -> Sequence[str]:
        """Return the program that uses Celery."""
        return [self._python(), "-m", "benchmarks.celery_app"]

    def start_workers(self) -> None:
        """Start its main process, which forks two."""
        options = ("--concurrency", str(WORKING), "--pool", "prefork", "--loglevel", "WARNING")
        self._start("worker", self._python(), "-m", "celery", "-A", "benchmarks.celery_app", "worker", *options)


class CeleryRpc(Celery):
    """Run Celery with results as messages to the submitter."""

    title = "Celery, results over RPC"
    settings = "likewise, with `rpc://` (transient messages, as it comes)"
    results = True

    def results_url(self) -> str | None:
        """Return where results go."""
        return "rpc://"


class CeleryDatabase(Celery):
    """Run Celery with results in PostgreSQL."""

    title = "Celery, results in a database"
    settings = (
        "likewise, results in the same PostgreSQL by SQLAlchemy; the submitter looks every 50 ms, not 500, and is made "
        "to keep its connections, which Celery does in forked processes alone: else it connects anew for each look"
    )
    results = True

    def results_url(self) -> str | None:
        """Return where results go."""
        return self.place.database.replace("postgresql://", "db+postgresql+psycopg://", 1)


class Dramatiq(Peer):
    """Run Dramatiq."""

    title = "Dramatiq"
    settings = "`--processes 2 --threads 1`, `confirm_delivery`, `dramatiq_queue_prefetch` 64; submitted as a group"

    def environment(self) -> Mapping[str, str]:
        """Have it prefetch as Celery does."""
        return {**super().environment(), "dramatiq_queue_prefetch": "64"}

    def submitter(self) -> Sequence[str]:
        """Return the program that uses Dramatiq."""
        return [self._python(), "-m", "benchmarks.dramatiq_app"]

    def start_workers(self) -> None:
        """Start its main process, which starts two."""
        options = ("--processes", str(WORKING), "--threads", "1")
        self._start("worker", self._python(), "-m", "dramatiq", "benchmarks.dramatiq_app", *options)


class RawQuorum(System):
    """Run two consumers of pika's on a quorum queue."""

    title = "pika alone, quorum queue"
    settings = "two processes, prefetch 128, a window of 1,000 confirms"
    queue = "quorum"

    def environment(self) -> Mapping[str, str]:
        """Say what queue it is."""
        return {**super().environment(), "BENCHMARK_QUEUE": self.queue}

    def submitter(self) -> Sequence[str]:
        """Return the program that publishes."""
        return [sys.executable, "-m", "benchmarks.raw", "submit"]

    def start_workers(self) -> None:
        """Start two consumers."""
        for number in range(WORKING):
            self._start(f"worker-{number}", sys.executable, "-m", "benchmarks.raw", "work")


class RawClassic(RawQuorum):
    """Run them on a classic queue."""

    title = "pika alone, classic queue"
    settings = "likewise"
    queue = "classic"


SYSTEMS: Final[Mapping[str, type[System]]] = {
    "mqworker-sqlite": Mqworker,
    "mqworker-postgresql": MqworkerPostgresql,
    "celery": Celery,
    "celery-rpc": CeleryRpc,
    "celery-database": CeleryDatabase,
    "dramatiq": Dramatiq,
    "raw-quorum": RawQuorum,
    "raw-classic": RawClassic,
}
