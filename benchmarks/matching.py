"""What matching and dispatch cost: the product's own pool on a real ledger file, without a broker.

    python -m benchmarks.matching                                   the whole of it, as JSON
    python -m benchmarks.matching --workers 60 --kinds 20 --backlogs 40,80 --rounds 1 --operations 2

A ledger (SQLite, with its full sync) grows from one backlog to the next. For each, a process of its own starts a pool
on it as a new scheduler does, the farm's workers come back, and then single things happen, one at a time: the whole of
what the scheduler does for each is counted, from the message's bytes to the bytes of the answers, with the commits.
Most of a backlog is put straight into the ledger by the ledger's own writes; one request of each kind, and all that is
measured, is submitted to the pool. Costs are CPU seconds of the process, the median of several rounds.
"""

import argparse
import gc
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec

from benchmarks.farm import GROUPS, PRIORITIES, STORE, FarmBuild, Kind, Peer, kinds, metadata
from mqworker.client import VIEWS_IN_AN_ANSWER
from mqworker.facts import Accept, Grant, Offer
from mqworker.ledger import Ledger
from mqworker.messages import (
    Assign,
    Bye,
    GetCapabilities,
    Outcomes,
    Probe,
    Report,
    Request,
    Submit,
    Tickets,
    Verdict,
    decode,
    encode,
)
from mqworker.metrics import SchedulerMetrics
from mqworker.pool import Moment, Pool
from mqworker.requires import satisfied
from mqworker.scheduler import kept_by, look_up
from mqworker.topology import Topology

BUSY: Final = 0.9  # of the workers are at work when a scheduler starts
AT_ONCE: Final = 200  # reports in one set when all workers come back
ACCEPTED_AT_ONCE: Final = 10_000  # requests in one set of the ledger while a backlog is made
IN_A_MESSAGE: Final = 100  # requests that are submitted together
PACE: Final = 0.01  # seconds between two slots that come free: else the pool takes builds for tasks of no length
TOPOLOGY: Final = Topology("b")
SHARED_ROOMS: Final = ("_matching", "_dispatch", "_requirements")


class Driver:
    """Do for a pool what the scheduler does in a turn: read, judge, record, publish - in that order."""

    def __init__(self, url: str) -> None:
        self.steady = 1000.0
        self.ledger = Ledger.open(url)
        self.metrics = SchedulerMetrics(version="0")
        self.pool = Pool(
            term=self.ledger.term,
            topology=TOPOLOGY,
            store_id=STORE,
            retry_delay=5.0,
            offer_timeout=10.0,
            metrics=self.metrics,
        )
        self.kept = kept_by(self.ledger)
        self.pool.restore(self.kept, self.moment)
        self.sent: list[Any] = []  # (key, message)
        self.bytes_sent = 0

    @property
    def moment(self) -> Moment:
        """The time; it stands still while things are measured."""
        return Moment(steady=self.steady, wall=1_700_000_000.0 + self.steady)

    def settle(self, bodies: Iterable[bytes] = (), *, offer: bool = True) -> None:
        """Read messages, and go on while something was committed."""
        for body in bodies:
            match decode(body, Report | Probe | Outcomes | Submit):  # type: ignore[arg-type]  # a union of structs
                case Report() as report:
                    self.pool.report(report, self.moment)
                case Outcomes() as outcomes:
                    self.pool.outcomes(outcomes, self.moment)
                case Submit(requests=requests):
                    drafts = [self.pool.examine(request) for request in requests]
                    self.pool.submit(drafts, {}, self.moment, lambda receipt: self._send("receipt", receipt))
        going_on = True
        while going_on:
            if offer:
                self.pool.offer(self.moment)
            writes, asks = self.pool.take_writes()
            self.pool.committed(self.ledger.commit(writes), look_up(self.ledger, asks))
            self.pool.declare, self.pool.delete = [], []
            for send in self.pool.take_sends():
                self._send(send.key, send.message)
            going_on = bool(writes or asks) and offer

    def _send(self, key: str, message: msgspec.Struct) -> None:
        self.bytes_sent += len(encode(message))
        self.sent.append((key, message))


class Spent:
    """Count CPU and wall seconds of a call."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    def on(self, call: Callable[[], Any]) -> Any:
        """Add what a call takes."""
        wall, cpu = time.perf_counter(), time.process_time()
        done = call()
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall
        return done

    def add(self, other: "Spent") -> None:
        """Add what something else took."""
        self.cpu += other.cpu
        self.wall += other.wall


class Watched:
    """Stand in for a room of the pool, and count the seconds that the pool spends in it."""

    def __init__(self, room: Any, total: list[float]) -> None:
        self._room, self._total = room, total

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._room, name)
        if not callable(found):
            return found

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return found(*arguments, **named)
            finally:
                self._total[0] += time.perf_counter() - began

        return timed


def seed_id(stage: int, number: int) -> str:
    """Return the id of the request of one kind that a stage begins with."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{stage} {number}"))


class Bench:
    """Drive a pool with a whole farm around it."""

    def __init__(self, url: str, *, workers: int, number_of_kinds: int, rounds: int, operations: int) -> None:
        self.rounds, self.operations = rounds, operations
        self.kinds = kinds(number_of_kinds)
        self.dice = random.Random(7)
        self.peers = {peer.name: peer for peer in (Peer(number, metadata(number)) for number in range(workers))}
        self.names = list(self.peers)
        self.made = 0
        self.collecting = 0.0
        self.pauses: list[float] = []  # of Python's garbage collector, while things are measured
        self.figures: dict[str, Any] = {}
        before = memory()
        opened, joined, followed = Spent(), Spent(), Spent()
        self.driver: Driver = opened.on(lambda: self._open(url))
        for held in self.driver.kept.held:
            if held.worker is not None:
                self.peers[held.worker].adopt(held.request.id, held.attempt, held.token or "")
        peers = list(self.peers.values())
        offered: float | None = None
        for start in range(0, workers, AT_ONCE):
            some = peers[start : start + AT_ONCE]
            bodies = [encode(peer.say(peer.hello(), peer.beat())) for peer in some]
            joined.on(lambda bodies=bodies: self.driver.settle(bodies))  # type: ignore[misc]  # a default is enough
            self._deliver()
            bodies = [encode(peer.say(peer.beat())) for peer in some]
            followed.on(lambda bodies=bodies: self.driver.settle(bodies))  # type: ignore[misc]  # as above
            if offered is None and any(isinstance(message, Tickets) for _, message in self.driver.sent):
                offered = opened.wall + joined.wall + followed.wall
            self._deliver()
        self.figures["restart"] = {
            "ready": [opened.cpu, opened.wall],
            "first offer": offered,
            "all workers": [opened.cpu + joined.cpu + followed.cpu, opened.wall + joined.wall + followed.wall],
            "before": before,
        }

    @staticmethod
    def _open(url: str) -> Driver:
        driver = Driver(url)
        driver.settle()
        return driver

    # ------------------------------------------------------------ the workers' side

    def _deliver(self) -> list[str]:
        """Let the workers hear what was said, follow their assignments and take their tickets; return who did."""
        takers: list[str] = []
        while self.driver.sent:
            sent, self.driver.sent = self.driver.sent, []
            bodies, tickets = [], []
            for key, message in sent:
                if isinstance(message, Tickets):
                    tickets += [(key, ticket) for ticket in message.tickets]
                elif isinstance(message, Verdict):
                    peer = self.peers.get(key.partition(".")[0])
                    assigned = [part.queue for part in message.parts if isinstance(part, Assign)]
                    if peer is not None and assigned and assigned[-1] != peer.queue:
                        peer.queue = assigned[-1]
                        if self.measuring:
                            bodies.append(encode(peer.say(peer.beat())))
            waiting = self._idle_by_queue() if tickets else {}
            for queue, ticket in tickets:
                if waiting.get(queue):
                    peer = waiting[queue].pop()
                    bodies.append(encode(peer.claim(ticket.request.id, ticket.attempt)))
                    takers.append(peer.name)
            if bodies:
                self.driver.settle(bodies)
        return takers

    measuring = False  # else who has joined says so itself

    def _idle_by_queue(self) -> dict[str, list[Peer]]:
        idle: dict[str, list[Peer]] = {}
        for peer in self.peers.values():
            if peer.run is None and peer.queue is not None:
                idle.setdefault(peer.queue, []).append(peer)
        return idle

    # ------------------------------------------------------------ what is measured

    def measure(self, backlog: int) -> None:
        """Let each thing happen, many times, and keep what it took."""
        self.measuring = True
        gc.callbacks.append(self._collected)
        while self.driver.pool._dispatch.waiting() < backlog:  # workers who were idle have taken some
            self.driver.settle([encode(Submit(requests=[self.request() for _ in range(IN_A_MESSAGE)]))])
            self._deliver()
        for peer in self.peers.values():
            self._employ(peer)
        self._new_and_free()
        self._joins()
        self._changes()
        self._heartbeats()
        self._quiet_second()
        self._questions()
        self.figures["classes"] = self.driver.pool.views.classes()
        self.figures["requirements"] = len(self.driver.pool._requirements)
        self.figures["escaped"] = len(self.driver.pool._matching.escaped())
        self.figures["pending"] = self.driver.pool._dispatch.waiting()
        self.figures["heads"] = len(self.driver.pool._entries)
        self.figures["memory"] = memory()
        self.figures["collector"] = max(self.pauses, default=0.0)
        self._shares()
        self._plain()
        self._first()
        self._together()  # last, for it makes the backlog longer

    def _collected(self, phase: str, _: Mapping[str, int]) -> None:
        if phase == "start":
            self.collecting = time.process_time()
        else:
            self.pauses.append(time.process_time() - self.collecting)

    def request(self, kind: Kind | None = None, id_: str | None = None) -> Request:
        """Make a request that nobody has submitted."""
        self.made += 1
        return request_of(self.dice, kind or self.dice.choice(self.kinds), self.made, id_)

    def _employ(self, peer: Peer) -> None:
        """Give an idle worker something that it can run, so that what is new has to wait at any backlog."""
        kind = None if peer.run is not None else able_kind(self.dice, self.kinds, peer.metadata)
        if kind is not None:
            self.driver.settle([encode(Submit(requests=[self.request(self.kinds[kind])]))])
            self._deliver()

    def _at_work(self) -> Peer:
        """Return a worker that has a run."""
        while (peer := self.peers[self.dice.choice(self.names)]).run is None:
            pass
        return peer

    def _many(
        self, name: str, happen: Callable[[], tuple[Sequence[bytes], Callable[[], None]]], divide: int = 1
    ) -> None:
        """Have something happen in each round; keep the median round's seconds for one of it."""
        cpu, wall = [], []
        for _ in range(self.rounds):
            spent = Spent()
            for _ in range(self.operations):
                bodies, after = happen()
                spent.on(lambda bodies=bodies: self.driver.settle(bodies))  # type: ignore[misc]  # as above
                after()
            cpu.append(spent.cpu / self.operations / divide)
            wall.append(spent.wall / self.operations / divide)
        self.figures[name] = [median(cpu), median(wall)]

    def _quietly(self) -> None:
        self._deliver()

    def _new_and_free(self) -> None:
        """New requests and free slots by turns, so that the backlog stays as long as it is."""
        cpu: dict[str, list[float]] = {"new": [], "free": [], "claim": []}
        wall: dict[str, list[float]] = {"new": [], "free": [], "claim": []}
        emptied = 0
        for _ in range(self.rounds):
            new, free, claim = Spent(), Spent(), Spent()
            freed = 0
            for _ in range(self.operations):
                body = encode(Submit(requests=[self.request()]))
                new.on(lambda body=body: self.driver.settle([body]))  # type: ignore[misc]  # as above
                self._deliver()
            while freed < self.operations:
                peer = self._at_work()
                emptied += 1
                self.driver.steady += PACE
                body = encode(peer.end())
                spent = Spent()
                spent.on(lambda body=body: self.driver.settle([body]))  # type: ignore[misc]  # as above
                sent = [message for _, message in self.driver.sent]
                tickets = [one for message in sent if isinstance(message, Tickets) for one in message.tickets]
                if len(tickets) == 1:
                    freed += 1
                    free.add(spent)
                    self.driver.sent.clear()
                    body = encode(peer.claim(tickets[0].request.id, tickets[0].attempt))
                    claim.on(lambda body=body: self.driver.settle([body]))  # type: ignore[misc]  # as above
                self._deliver()
                self._employ(peer)
            for name, spent in (("new", new), ("free", free), ("claim", claim)):
                cpu[name].append(spent.cpu / self.operations)
                wall[name].append(spent.wall / self.operations)
        for name, each in cpu.items():
            self.figures[name] = [median(each), median(wall[name])]
        self.figures["filled"] = self.rounds * self.operations / emptied

    def _first(self) -> None:
        self.operations = 4  # each leaves a class behind
        sizes = iter(self.dice.sample(range(200, 10_000), self.rounds * self.operations))

        def happen() -> tuple[Sequence[bytes], Callable[[], None]]:
            kind = replace(self.dice.choice(self.kinds), memory=next(sizes) / 100)
            return [encode(Submit(requests=[self.request(kind)]))], self._quietly

        self._many("first", happen)

    def _together(self) -> None:
        def happen() -> tuple[Sequence[bytes], Callable[[], None]]:
            return [encode(Submit(requests=[self.request() for _ in range(IN_A_MESSAGE)]))], self._quietly

        self.operations = 1
        self._many("new together", happen, IN_A_MESSAGE)

    def _joins(self) -> None:
        def happen() -> tuple[Sequence[bytes], Callable[[], None]]:
            number = len(self.peers) + self.dice.randrange(10**6)
            peer = Peer(number, metadata(number))

            def after() -> None:
                self.driver.settle([encode(peer.say(Bye(reason="measured")))])
                self._deliver()

            return [encode(peer.say(peer.hello(), peer.beat()))], after

        self._many("join", happen)

    def _changes(self) -> None:
        def changing(values: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Callable[[], Any]:
            def happen() -> tuple[Sequence[bytes], Callable[[], None]]:
                peer = self.peers[self.dice.choice(self.names)]
                return [encode(peer.changed(**values(peer.metadata)))], self._quietly

            return happen

        self._many("change unread", changing(lambda _: {"load": self.dice.random(), "uptime": self.dice.random()}))
        self._many(
            "change read",
            changing(lambda now: {"free_disk": now["system:free_disk"] + 4096, "memory": now["system:memory"] + 4096}),
        )
        gib = 1024**3
        self._many(
            "change decision",
            changing(lambda now: {"memory": (4 if now["system:memory"] > 20 * gib else 64) * gib + self.dice.random()}),
        )

    def _heartbeats(self) -> None:
        def happen() -> tuple[Sequence[bytes], Callable[[], None]]:
            peer = self.peers[self.dice.choice(self.names)]
            return [encode(peer.say(peer.beat()))], self._quietly

        self._many("heartbeat", happen)

    def _quiet_second(self) -> None:
        """Look at what is due, as a scheduler does four times a second, and show gauges every other second."""
        took = []
        for _ in range(2 * self.rounds):
            spent = Spent()
            for _ in range(4):
                self.driver.steady += 0.25 / (2 * self.rounds)  # so that nobody counts as silent in the end
                spent.on(lambda: self.driver.pool.tick(self.driver.moment))
            spent.on(lambda: self.driver.pool.views.show(self.driver.moment.steady))
            self.driver.settle()
            took.append(spent.cpu)
        self.figures["quiet second"] = [median(took), max(took)]

    def _questions(self) -> None:
        pool, ledger = self.driver.pool, self.driver.ledger
        submitted = [seed_id(self.stage, number) for number in range(min(len(self.kinds), 40))]
        slowest: dict[str, list[tuple[float, float]]] = {}

        def ask(name: str, question: Callable[[], Any]) -> None:
            spent = Spent()
            spent.on(lambda: encode(question()))
            slowest.setdefault(name, []).append((spent.cpu, spent.wall))

        def of_id(id_: str) -> Any:
            [view], _ = ledger.view([id_])
            return pool.views.explanation(pool.examine(view.request), view)

        def of_data(**changed: Any) -> Any:
            kind = self.dice.choice(self.kinds)
            request = Request(id=seed_id(0, 0), task="farmbuild", data=kind.data(1) | changed, requires=kind.requires)
            return pool.views.explanation(pool.examine(request), None)

        for id_ in submitted:
            if ledger.view([id_])[0]:
                ask("explain a request", lambda id_=id_: of_id(id_))  # type: ignore[misc]  # as above
        for _ in range(20):
            ask("explain a known kind", of_data)
            ask("explain an impossible kind", lambda: of_data(memory=5000 + self.dice.randrange(1000)))
            ask("explain a new kind", lambda: of_data(memory=self.dice.randrange(3, 100)))
            ask(
                "capabilities",
                lambda: pool.views.capabilities(GetCapabilities(limit=VIEWS_IN_AN_ANSWER), self.driver.moment.steady),
            )
        self.figures["questions"] = {
            name: {
                "median": [median(cpu for cpu, _ in each), median(wall for _, wall in each)],
                "most": [max(cpu for cpu, _ in each), max(wall for _, wall in each)],
            }
            for name, each in slowest.items()
            if each
        }

    def _shares(self) -> None:
        """Measure, apart from all else, how long the pool is in its rooms for matching and dispatch."""
        pool, total = self.driver.pool, [0.0]
        rooms = {name: getattr(pool, name) for name in SHARED_ROOMS}
        for name, room in rooms.items():
            setattr(pool, name, Watched(room, total))
        shares: dict[str, list[float]] = {"new": [], "free": []}
        for _ in range(self.rounds * self.operations):
            body = encode(Submit(requests=[self.request()]))
            total[0] = 0.0
            self.driver.settle([body])
            shares["new"].append(total[0])
            self.driver.sent.clear()
            peer = self._at_work()
            self.driver.steady += PACE
            body = encode(peer.end())
            total[0] = 0.0
            self.driver.settle([body])
            if any(isinstance(message, Tickets) for _, message in self.driver.sent):
                shares["free"].append(total[0])
            self._deliver()
            self._employ(peer)
        for name, room in rooms.items():
            setattr(pool, name, room)
        self.figures["share"] = {name: median(each or [0.0]) for name, each in shares.items()}

    def _plain(self) -> None:
        """Ask some workers for some requests as one would without any of this."""
        workers = self.dice.sample(list(self.peers.values()), min(len(self.peers), 500))
        spent, asked = Spent(), 0
        for _ in range(40):
            request = self.request()
            task = FarmBuild()
            task.configure(request.data)
            requires = request.requires

            def ask(task: FarmBuild = task, requires: dict[str, Any] | None = requires) -> None:
                for peer in workers:
                    if task.can_run_on(peer.metadata) and requires is not None:
                        satisfied(requires, peer.metadata)

            spent.on(ask)
            asked += len(workers)
        self.figures["plain ask"] = spent.cpu / asked

    # ------------------------------------------------------------ the ledger's growth

    stage = 0

    def close(self, *, stage: int) -> None:
        """Submit a request of each kind for the next stage, let some workers be idle, and close."""
        self._deliver()
        requests = [self.request(kind, seed_id(stage, number)) for number, kind in enumerate(self.kinds)]
        for start in range(0, len(requests), IN_A_MESSAGE):
            self.driver.settle([encode(Submit(requests=requests[start : start + IN_A_MESSAGE]))], offer=False)
        running = [peer for peer in self.peers.values() if peer.run is not None]
        self.dice.shuffle(running)
        for peer in running[int(BUSY * len(self.peers)) :]:
            self.driver.settle([encode(peer.end())], offer=False)
        self.driver.ledger.close()


def request_of(dice: random.Random, kind: Kind, number: int, id_: str | None = None) -> Request:
    """Make a request of a kind."""
    return Request(
        id=id_ or str(uuid.UUID(int=dice.getrandbits(128), version=4)),
        task="farmbuild",
        data=kind.data(number),
        requires=kind.requires,
        priority=dice.choice(PRIORITIES),
        group=dice.choice(GROUPS),
    )


def grow(url: str, *, to: int, stage: int, workers: int, number_of_kinds: int) -> dict[str, float]:
    """Fill the backlog up with the ledger's own writes; at the first time, have most workers at work, too."""
    dice = random.Random(stage)
    ledger = Ledger.open(url)
    wanted = kinds(number_of_kinds)
    views = {view.request.id: view for view in ledger.view([seed_id(stage, n) for n in range(len(wanted))])[0]}
    numbers = [views[seed_id(stage, n)].requirement or 0 for n in range(len(wanted))]
    seq = ledger.newest()
    missing = to - sum(lane.number for lane in ledger.lanes())
    spent = Spent()
    if not ledger.held():
        writes: list[Any] = []
        for number in dice.sample(range(workers), int(BUSY * workers)):
            one = able_kind(dice, wanted, metadata(number))
            if one is None:
                continue
            seq += 1
            request = request_of(dice, wanted[one], seq)
            name = Peer(number, {}).name
            writes += [
                Accept(seq=seq, request=request, at=1.0, requirement=numbers[one]),
                Offer(request=request.id, attempt=1, seq=seq),
                Grant(request=request.id, attempt=1, token=f"{name}-0-{request.id[:8]}", worker=name, at=1.0),
            ]
        ledger.commit(writes)
    for start in range(0, missing, ACCEPTED_AT_ONCE):
        accepts = []
        for _ in range(min(ACCEPTED_AT_ONCE, missing - start)):
            one = dice.randrange(len(wanted))
            seq += 1
            request = request_of(dice, wanted[one], seq)
            accepts.append(Accept(seq=seq, request=request, at=2.0, requirement=numbers[one]))
        spent.on(lambda accepts=accepts: ledger.commit(accepts))  # type: ignore[misc]  # a default is enough
    ledger.close()
    return {"added": max(0, missing), "cpu": spent.cpu, "wall": spent.wall}


def able_kind(dice: random.Random, wanted: Sequence[Kind], facts: Mapping[str, Any]) -> int | None:
    """Find a kind that a worker can run, by asking plainly."""
    for number in dice.sample(range(len(wanted)), len(wanted)):
        kind = wanted[number]
        task = FarmBuild()
        task.data = kind.data(0)
        if task.can_run_on(facts) and (kind.requires is None or satisfied(kind.requires, facts)):
            return number
    return None


def memory() -> dict[str, int]:
    """Return this process's memory in bytes: its proportional share now, and the most that was resident."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    found = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"pss": found["Pss:"], "rss": found["Rss:"], "most": most}


def in_process(stage: int, directory: str, given: argparse.Namespace, backlog: int) -> dict[str, Any]:
    """Run one stage in a process of its own, so that its memory is its own."""
    command = [sys.executable, "-m", "benchmarks.matching", "--stage", str(stage), "--directory", directory]
    for name in ("workers", "kinds", "rounds", "operations"):
        command += [f"--{name}", str(getattr(given, name))]
    command += ["--backlogs", str(backlog)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def stage_of(given: argparse.Namespace) -> dict[str, Any]:
    """Do what one process has to: grow the ledger, or measure on it."""
    url = f"sqlite:///{given.directory}/ledger.db"
    size = {"workers": given.workers, "number_of_kinds": given.kinds}
    [backlog] = given.backlogs
    grown = grow(url, to=backlog, stage=given.stage, **size) if given.stage else {}
    bench = Bench(url, rounds=given.rounds, operations=given.operations, **size)
    bench.stage = given.stage
    if given.stage:
        bench.measure(backlog)
    bench.close(stage=given.stage + 1)
    file = Path(given.directory) / "ledger.db"
    return {"backlog": backlog, "grown": grown, "file": file.stat().st_size, **bench.figures}


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure at each backlog."""
    with tempfile.TemporaryDirectory(prefix="mqworker-bench-", dir=given.directory) as directory:
        in_process(0, directory, given, 0)
        found = []
        for stage, backlog in enumerate(given.backlogs, start=1):
            found.append(in_process(stage, directory, given, backlog))
            print(f"measured at {backlog} pending requests", file=sys.stderr, flush=True)
        return found


def parser() -> argparse.ArgumentParser:
    """Say what can be asked for."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.matching", description=__doc__)
    made.add_argument("--workers", type=int, default=10_000)
    made.add_argument("--kinds", type=int, default=1_000, help="requirement classes, at most 1000")
    made.add_argument(
        "--backlogs", type=lambda text: [int(one) for one in text.split(",")], default=[1_000, 100_000, 1_000_000]
    )
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--operations", type=int, default=20, help="in a round")
    made.add_argument("--directory", help="where to keep the ledger meanwhile")
    made.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Measure, and print JSON."""
    given = parser().parse_args()
    print(json.dumps(run(given) if given.stage is None else stage_of(given), indent=1))


if __name__ == "__main__":
    main()
