"""How long a slot is idle between two runs while there is work for it: real processes, a real private broker.

    python -m benchmarks.idle_slot                      the whole of it, as JSON
    python -m benchmarks.idle_slot --requests 200

Three kinds of workers, told apart by tags and metadata, and a backlog of several priorities, groups and requirement
classes. The task writes down when it begins and ends (CLOCK_BOOTTIME); a wait is from the end of one run to the
beginning of the next in that slot, and counts if all the while a request was pending that this worker may run. So the
wait holds all that lies between two runs: the slot's own clearing up, the outcome on disk and in the ledger, the offer,
the ticket, the claim, the grant, and the next run's directory.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mqworker import processes
from mqworker.client import Client
from mqworker.errors import Unanswered
from mqworker.messages import Request
from mqworker.privatenode import PrivateNode
from mqworker.store import Store

ROOT: Final = Path(__file__).parents[1]
START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 20.0
AT_ONCE: Final = 20  # requests that are submitted together while the pool works
SECONDS: Final = (0.1, 0.6)  # a run takes


@dataclass(frozen=True)
class Host:
    """Hold what tells one kind of workers apart."""

    name: str
    tags: tuple[str, ...]
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Sort:
    """Hold what a sort of requests asks of workers, and by plain reasoning which can run it."""

    tag: str | None
    requires: dict[str, Any] | None
    hosts: frozenset[str]


HOSTS: Final = (
    Host("quick", ("fast",), {"rack": 1}),
    Host("large", ("fast", "big"), {"rack": 2}),
    Host("special", ("big",), {"rack": 3, "gpus": 2}),
)
GPUS: Final = {"required": ["gpus"], "properties": {"gpus": {"minimum": 1}}}
RACKS: Final = {"required": ["rack"], "properties": {"rack": {"maximum": 2}}}
SORTS: Final = (
    Sort(None, None, frozenset({"quick", "large", "special"})),
    Sort("fast", None, frozenset({"quick", "large"})),
    Sort("big", None, frozenset({"large", "special"})),
    Sort(None, GPUS, frozenset({"special"})),
    Sort(None, RACKS, frozenset({"quick", "large"})),
)


class Pool:
    """Hold the processes of a pool."""

    def __init__(self, directory: Path, amqp_url: str) -> None:
        self._directory = directory
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.amqp_url, self.store = amqp_url, f"file://{directory / 'store'}"
        Store.open(self.store, create=True)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MQWORKER_")}
        self._environment = {
            **inherited,
            "PYTHONPATH": str(ROOT),
            "MQWORKER_TASK_MODULES": "benchmarks.timed",
            "MQWORKER_AMQP_URL": amqp_url,
            "MQWORKER_STORE": self.store,
            "MQWORKER_LEDGER": f"sqlite:///{directory / 'ledger.db'}",
            "MQWORKER_SCHEDULER_METRICS_LISTEN": "",
            "MQWORKER_WORKER_METRICS_LISTEN": "",
            "MQWORKER_WORKER_WORK_DIR": str(directory / "work"),
            "MQWORKER_WORKER_DRAIN_GRACE": "1",
            "MQWORKER_LOG_LEVEL": "warning",
            "MQWORKER_CONFIG": os.devnull,
        }

    def start(self, name: str, *command: str, **environment: str) -> None:
        """Start a process of the pool."""
        with (self._directory / f"{name}.log").open("wb") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-P", "-m", "mqworker", *command],
                env={**self._environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=processes.die_with_parent,  # noqa: PLW1509  # it makes one system call
            )

    def worker(self, host: Host, slots: int) -> None:
        """Start a worker."""
        self.start(
            host.name,
            *("worker", "--name", host.name, "--slots", str(slots)),
            *("--state-dir", str(self._directory / "state" / host.name)),
            MQWORKER_WORKER_TAGS=",".join(host.tags),
            MQWORKER_WORKER_METADATA=json.dumps(dict(host.metadata)),
            MQWORKER_TASK_TIMED_WORKER=host.name,
        )

    def await_workers(self, client: Client, number: int) -> None:
        """Wait until so many workers consume."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for name, process in self._running.items():
                if process.poll() is not None:
                    log = (self._directory / f"{name}.log").read_text(errors="replace")
                    raise RuntimeError(f"{name} ended with exit code {process.returncode}: {log[-2000:]}")
            with suppress(Unanswered):
                if sum(worker.state == "online" and worker.queue is not None for worker in client.workers()) == number:
                    return
            time.sleep(0.1)  # between two questions to the scheduler
        raise RuntimeError(f"expected {number} workers within {START_SECONDS:g} s")

    def stop(self) -> None:
        """End all of it."""
        for process in reversed(self._running.values()):
            process.terminate()
        for process in reversed(self._running.values()):
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def pool_on(directory: Path) -> Iterator[Pool]:
    """Run a private broker, and a pool on it."""
    with PrivateNode(directory / "node", plugins=()) as node:
        pool = Pool(directory, node.url)
        try:
            yield pool
        finally:
            pool.stop()


def boottime() -> int:
    """Return nanoseconds on the clock that the journal uses."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def measure(directory: Path, *, requests: int, slots: int, timeout: float) -> list[float]:
    """Run a backlog down, and return each wait in seconds."""
    dice = random.Random(7)
    journal = directory / "journal"
    sorts: dict[str, Sort] = {}
    accepted: dict[str, int] = {}

    def make() -> Request:
        one = Request(
            id=str(uuid.UUID(int=dice.getrandbits(128), version=4)),
            task="timed",
            priority=dice.choice((-5, 0, 0, 5)),
            group=dice.choice(("archive", "ci", "people")),
            requires=(sort := dice.choice(SORTS)).requires,
        )
        data = {"journal": str(journal), "label": one.id, "seconds": round(dice.uniform(*SECONDS), 3)}
        sorts[one.id] = sort
        one.data.update(data if sort.tag is None else {**data, "tag": sort.tag})
        return one

    with ExitStack() as stack:
        pool = stack.enter_context(pool_on(directory))
        pool.start("scheduler", "scheduler")
        client = stack.enter_context(Client(pool.amqp_url, store_url=pool.store, timeout=START_SECONDS))
        for host in HOSTS:
            pool.worker(host, slots)
        pool.await_workers(client, len(HOSTS))
        wanted = [make() for _ in range(requests)]
        early = max(1, requests * 4 // 5)

        def submit(some: Sequence[Request]) -> None:
            client.submit_many(some)
            accepted.update(dict.fromkeys((one.id for one in some), boottime()))

        submit(wanted[:early])
        for start in range(early, requests, AT_ONCE):  # others come while it works
            submit(wanted[start : start + AT_ONCE])
            time.sleep(sum(SECONDS))
        views = client.wait([one.id for one in wanted], timeout=timeout)
        if wrong := [view for view in views if view.state != "success"]:
            raise RuntimeError(f"expected all to succeed, got {wrong[0]}")
    return waits(journal, sorts, accepted)


def waits(journal: Path, sorts: Mapping[str, Sort], accepted: Mapping[str, int]) -> list[float]:
    """Return how long each slot waited between two runs, where there was work for it all the while."""
    notes = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    began = {note["label"]: note["ns"] for note in notes if note["what"] == "start"}
    slots: dict[int, list[dict[str, Any]]] = {}
    for note in sorted(notes, key=lambda note: note["ns"]):
        slots.setdefault(note["slot"], []).append(note)
    found = []
    for each in slots.values():
        for end, start in zip(each[1::2], each[2::2], strict=False):
            there = any(
                accepted[label] <= end["ns"] and began[label] >= start["ns"] and end["worker"] in sort.hosts
                for label, sort in sorts.items()
            )
            if there:
                found.append((start["ns"] - end["ns"]) / 1e9)
    return sorted(found)


def quantile(ordered: Sequence[float], part: float) -> float:
    """Return the value that this part of all values does not exceed."""
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def parser() -> argparse.ArgumentParser:
    """Say what can be asked for."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.idle_slot", description=__doc__)
    made.add_argument("--requests", type=int, default=1_400)
    made.add_argument("--slots", type=int, default=4, help="of each of the three workers")
    made.add_argument(
        "--alone", action="store_true", help="at real-time priority, as if nothing else ran on the machine; needs root"
    )
    made.add_argument("--timeout", type=float, default=600.0, help="seconds for all requests to end")
    return made


def stand_alone() -> None:
    """Go before all other programs on this machine, with whoever is started from here."""
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure, and put it together."""
    if given.alone:
        stand_alone()
    with tempfile.TemporaryDirectory(prefix="mqworker-bench-", dir="/var/tmp") as directory:
        found = measure(Path(directory), requests=given.requests, slots=given.slots, timeout=given.timeout)
    return {
        "alone": given.alone,
        "slots": given.slots * len(HOSTS),
        "samples": len(found),
        "p50": quantile(found, 0.5),
        "p99": quantile(found, 0.99),
        "most": found[-1],
        "under 100 ms": sum(one < 0.1 for one in found) / len(found),  # noqa: PLR2004  # as its name says
    }


def main() -> None:
    """Measure, and print JSON."""
    print(json.dumps(run(parser().parse_args()), indent=1))


if __name__ == "__main__":
    main()
