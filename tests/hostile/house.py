"""A whole pool in one process, on a virtual clock, and somebody who sends it whatever there is: all is counted.

The Scheduler, its Pool and its ledger, the Workers and their Agents are the product's own; broker, slots and disks are
those of tests/sim. What was sent must be what was answered, put aside or dropped by a rule, each message once.
"""

import asyncio
import logging
import random
import shutil
import tempfile
from collections import Counter, deque
from functools import partial
from pathlib import Path

from mqworker import client
from mqworker.access import Access
from mqworker.amqp import Consumer, Plan
from mqworker.ledger import Ledger
from mqworker.messages import (
    Outcomes,
    Probe,
    Query,
    Report,
    SlotWord,
    Submit,
    Tickets,
    Verdict,
)
from mqworker.metrics import SchedulerMetrics
from mqworker.pool import Moment
from mqworker.scheduler import Scheduler
from mqworker.task import load_tasks
from mqworker.topology import Topology
from tests.driving import a_delivery
from tests.hostile.attacks import ATTACKS
from tests.hostile.generate import TASKS, Maker, an_id
from tests.sim import programs
from tests.sim.broker import REPLY, Broker, Link, Message
from tests.sim.host import STORE, Host, Silent, conduct_of
from tests.sim.loop import NOBODY, Loop, Process
from tests.sim.scenario import Spec

TOPOLOGY = Topology()
WORKERS = ("anna", "bert")
WALL = 1_700_000_000.0
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108  # files that no disk slows down
SHARES = {"submit": 24, "report": 24, "outcome": 12, "api": 14, "ticket": 9, "verdict": 9, "slot": 4, "client": 4}
KINDS = {
    "submit": Submit,
    "report": Report | Probe,
    "outcome": Outcomes,
    "api": Query,
    "ticket": Tickets,
    "verdict": Verdict,
    "slot": SlotWord,
    "client": client.Heard,
}
AT_ONCE = 100  # messages between two looks at the clock
SECONDS = 0.4  # of virtual time for so many
SETTLE = 40.0  # virtual seconds until all is answered
KEPT = 300  # messages, of which the newest may be what ended somebody
WIRES = ("submit", "report", "outcome")
SETTLED_BY = {
    "mqworker.submit": "submit",
    "mqworker.report": "report",
    "mqworker.outcome": "outcome",
    "mqworker.work": "ticket",
}


class Stored:
    id = STORE


class House:
    """One pool, for as long as a round lasts."""

    def __init__(self, seed):
        self.seed = seed
        self.sent = Counter()
        self.told = Counter()  # what became of it, by consumer and word
        self.failures = []
        self.newest = deque(maxlen=KEPT)
        self.random = random.Random(f"{seed} hostile")
        self.check = self  # what the simulator's host tells is of no interest here
        self._chances = {}
        self.loop = Loop(self._delay)
        self.loop.complain = self._complained
        self.broker = Broker(self.loop, seed, self)
        self._directory = Path(tempfile.mkdtemp(prefix="mqworker-hostile-", dir=MEMORY))
        self._processes = []
        self._asked = {"submit": 0, "api": 0}
        self._recorded = 0  # outcomes that were answered
        self._to_record = 0  # and those that were read
        self.known = {
            "id": [an_id(self.random) for _ in range(400)],
            "task": TASKS,
            "worker": ["anna", *(f"w{number}" for number in range(60))],
            "incarnation": [1, 1, 1, 2],
            "seq": range(1, 300),
            "term": [*[1] * 200, 0, 2],
            "attempt": [1, 1, 1, 2],
            "slots": [1, 2, 3],
            "metadata_version": [1, 1, 2],
            "number": range(1, 20),
            "limit": [1, 10, 50],
            "epoch": ["e1"],
            "store": [STORE],
            "queue": [f"mqworker.work.1-{number}" for number in range(1, 6)],
            "name": [*WORKERS, "sim1", "default"],
            "group": ["default", "night"],
            "host": ["anna"],
            "token": [f"{name}.1.{number}" for name in WORKERS for number in range(300)],
        }
        self.known |= {"request": self.known["id"], "ids": self.known["id"], "assigned": self.known["queue"]}
        self.known["new_id"] = self.known["id"]
        self.maker = Maker(self.random, self.known)

    # ------------------------------------------------------------ what the simulator's parts ask

    def chance(self, name):
        return self._chances.setdefault(name, random.Random(f"{self.seed} {name}"))

    def wall(self):
        return WALL + self.loop.now

    def note(self, *_, **_more):
        pass

    def conduct(self, request, attempt):
        return conduct_of(self.seed, request, attempt, 8.0)

    def _delay(self, _executor):
        return 0.0005, 0.0002

    started = runs_now = ended = spooled = unspooled = delivered = consumes = note

    def settled(self, process, delivery, acked):
        if delivery.exchange == TOPOLOGY.work and delivery.body in self._tickets:
            self._tickets.discard(delivery.body)
            aside = (process.name, delivery.tag, delivery.epoch) in self._aside
            self.told["ticket", "put aside" if aside else "claimed or refused" if acked else "given back"] += 1

    def put_aside(self, process, delivery, _reason):
        if delivery.kind == "hostile":  # a ticket counts when it is acknowledged
            self.told[SETTLED_BY[delivery.exchange], "put aside"] += 1
        self._aside.add((process.name, delivery.tag, delivery.epoch))

    def published(self, process, message):
        if message.kind == "verdict" and process.name == "scheduler":
            self._recorded += message.body.count(b'"type":"recorded"')

    def _complained(self, context):
        self._failed(f"{context.get('message')}: {context.get('exception')!r}")

    def _failed(self, text):
        self.failures.append(text)

    # ------------------------------------------------------------ a round

    def run(self, number):
        """Send so many messages, and wait until all is answered."""
        load_tasks()
        programs.install(SOURCES, {})
        asyncio.events._set_running_loop(self.loop)
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        self._tickets, self._aside = set(), set()
        try:
            self._begin()
            self.loop.run(self.loop.now + 3.0)
            assert not self.failures, self.failures
            self._look_around()
            while sum(self.sent.values()) < number and not self.failures:
                for _ in range(AT_ONCE):
                    self._send()
                self.loop.run(self.loop.now + SECONDS)
                self._look_around()
            self.loop.run(self.loop.now + SETTLE)
            self._count()
        finally:
            try:
                self.loop.bury(self._processes)
                self._ledger.close()
            finally:
                logging.disable(level)
                asyncio.events._set_running_loop(None)
                shutil.rmtree(self._directory)
        return self

    def _begin(self):
        self._ledger = Ledger.open(f"sqlite:///{self._directory / 'ledger.db'}")
        self._start("scheduler", self._scheduler_main)
        self.hosts = {}
        for number, name in enumerate(WORKERS):
            metadata = {"arch": ["amd64", "arm64"][number], "mem": 2, "free": 30, "tags": ["a"], "host": name}
            spec = Spec(name=name, slots=3, metadata=metadata, tasks=tuple(TASKS[:6]), deny=(), boot=1.0, drift=0.0)
            host = self.hosts[name] = Host(self, spec)
            host.process = self._start(name, host.main)
        self._start("attacker", self._attacker_main)

    def _start(self, name, main):
        process = Process(name)
        self._processes.append(process)
        process.main = process.context.run(self.loop.create_task, main())
        process.main.add_done_callback(partial(self._ended, process), context=NOBODY)
        return process

    def _ended(self, process, task):
        if self.loop.burying or task.cancelled():
            return
        error = task.exception()
        if error is None and process.name in self.hosts:  # it was told to drain and end, as an operator may have it
            self.loop.call_later(1.0, self._start_again, self.hosts[process.name], context=NOBODY)
            return
        self._failed(f"{process.name} ended with {error!r}")
        if error is not None:
            self.traceback = error

    def _start_again(self, host):
        host.process = self._start(host.name, host.main)

    async def _scheduler_main(self):
        self.metrics = SchedulerMetrics(version="0")
        self.scheduler = Scheduler(
            amqp_url="",
            topology=TOPOLOGY,
            ledger=self._ledger,
            store=Stored,
            metrics=self.metrics,
            retry_delay=1.0,
            offer_timeout=10.0,
            no_worker_after=30.0,
            pause_after=3,
            access=Access(operators={None}),  # this broker names nobody: all is one user's
            group_weights={},
            concurrency_limits={},
            link=lambda url, **given: Link(self.broker, url, **given),
            clock=lambda: Moment(steady=self.loop.now + 12345.0, wall=self.wall()),
        )
        pool = self.scheduler._pool
        report, outcomes, probe = pool.report, pool.outcomes, pool.probe

        def count_report(message, *more):
            worker = pool._workers.get(message.worker)
            before = None if worker is None else (worker.incarnation, worker.seq, worker.seen)
            report(message, *more)
            worker = pool._workers.get(message.worker)
            taken = worker is not None and before != (worker.incarnation, worker.seq, worker.seen)
            if self._hostile:
                self.told["report", "taken" if taken else "dropped: older, or of a name that another has"] += 1

        def count_outcomes(message, *more):
            outcomes(message, *more)
            self._to_record += len(message.outcomes)

        def count_probe(message, *more):
            if self._hostile:
                self.told["report", "taken for a probe"] += 1
            probe(message, *more)

        read = self.scheduler._read

        async def know_whose(delivery):
            self._hostile = delivery.kind == "hostile"
            return await read(delivery)

        said_lately = self.scheduler._said_lately

        def count_said_lately(exchange, text):
            lately = said_lately(exchange, text)
            if lately and self._hostile:
                self.told[SETTLED_BY[exchange], "an impostor's, like one that was put aside"] += 1
            return lately

        self._hostile = False
        self.scheduler._read = know_whose
        self.scheduler._said_lately = count_said_lately
        pool.report, pool.outcomes, pool.probe = count_report, count_outcomes, count_probe
        await self.scheduler.run()

    async def _attacker_main(self):
        self.link = Link(self.broker, "", name="client all", plan=self._plan)
        await self.link.run()

    def _plan(self, _epoch):
        rejected = Consumer(queue=TOPOLOGY.rejected_queue().name, on_delivery=self.link.ack, prefetch=1000)
        return Plan(
            exchanges=TOPOLOGY.exchanges(), queues=TOPOLOGY.queues(), consumers=(rejected,), replies=self._replied
        )

    def _replied(self, message):
        kind = "submit" if message.kind == "receipt" else "api"
        if message.correlation_id == "hostile":
            self.told[kind, "answered"] += 1

    def _look_around(self):
        """Learn what somebody who listens could know."""
        for host in self.hosts.values():
            epoch = host.worker._reading.epoch if host.worker is not None else None
            if epoch is not None and epoch not in self.known["epoch"]:
                self.known["epoch"].append(epoch)
        names = list(self.scheduler._pool._matching.names())
        if names:
            self.known["queue"] = [f"{TOPOLOGY.work}.{name}" for name in names[:20]]

    # ------------------------------------------------------------ one message

    def _send(self):
        consumer = self.random.choices(list(SHARES), weights=SHARES.values())[0]
        attack = self.random.random() < 0.003 and ATTACKS.get(consumer)
        body = attack and self.random.choice(attack)(self)
        self.put(consumer, body or self.maker.message(KINDS[consumer]))

    def put(self, consumer, body):
        """Hand a message to one of those that read."""
        if consumer == "ticket":
            if body in self._tickets:
                return
            self._tickets.add(body)
        self.sent[consumer] += 1
        self.newest.append((consumer, body))
        match consumer:
            case "ticket":
                host = self.random.choice(list(self.hosts.values()))
                host.process.context.run(
                    host.worker._take_tickets, a_delivery(body, TOPOLOGY.work, sum(self.sent.values()))
                )
            case "verdict":
                self._verdict(body)
            case "slot":
                self._slot(body)
            case "client":
                items = client._read_heard(body)
                self.told["client", "passed over" if items == (None,) else "taken"] += 1
            case _:
                name = getattr(TOPOLOGY, consumer)
                if consumer == "api" and self.random.random() < 0.5:  # where commands count
                    name = TOPOLOGY.command
                self._publish(name, name, body)

    def _publish(self, exchange, key, body):
        connection = self.link.connection
        message = Message(exchange, key, body, "hostile", None, "hostile", REPLY + self.link.epoch, {}, True)
        connection.published += 1
        connection.unconfirmed[connection.published] = self.loop.create_future()
        connection.up(self.broker.publish, connection, connection.published, message, False)

    def _verdict(self, body):
        """Hand a verdict to a worker, as one who can write to its queue."""
        host = self.random.choice(list(self.hosts.values()))
        agent = host.worker._agent
        if not isinstance(host.worker._metrics, Counting):
            host.worker._metrics = Counting()
        before = host.worker._metrics.count
        host.process.context.run(host.worker._take_verdict, a_delivery(body))
        unreadable = host.worker._metrics.count > before
        self.told["verdict", "dropped: unreadable" if unreadable else "taken, or of an older term"] += 1
        assert agent.consuming is None or TOPOLOGY.is_class_queue(agent.consuming)

    def _slot(self, body):
        """Have a slot say something to its agent."""
        children = [child for host in self.hosts.values() for child in host.children if child.alive]
        if children:
            child = self.random.choice(children)
            child._words.feed_data(body.replace(b"\n", b" ") + b"\n")
        self.told["slot", "said"] += 1

    # ------------------------------------------------------------ what it comes to

    def _count(self):
        """Check that what was sent is what was told."""
        if self.failures:
            return
        told = Counter()
        for (consumer, _), number in self.told.items():
            told[consumer] += number
        if self._recorded < self._to_record:
            self._failed(f"{self._to_record} outcomes were read, {self._recorded} answered")
        read = self.sent["outcome"] - told["outcome"]
        self.told["outcome", "read, and each in it answered"] = read
        told["outcome"] = self.sent["outcome"]
        for consumer, number in self.sent.items():
            had = told[consumer] - (self.told[consumer, "put aside"] if consumer == "submit" else 0)
            if consumer == "ticket":
                self.told["ticket", "still asked about"] = len(self._tickets)
                had += len(self._tickets)
            if had != number:
                self._failed(f"{number} sent to {consumer}, but {had} accounted for: {dict(self.told)}")


class Counting(Silent):
    """Take the place of a worker's metrics: count what could not be read."""

    def __init__(self):
        self.count = 0
        self.unreadable = _Counter(self)


class _Counter:
    def __init__(self, owner):
        self._owner = owner

    def labels(self, **_):
        return self

    def inc(self):
        self._owner.count += 1


SOURCES = [
    "return m.get('arch') == d.get('arch', 'amd64')",
    "return m.get('mem', 0) >= d.get('mem', 0)",
    "return True",
    "return all(t in m.get('tags', []) for t in d.get('tags', []))",
    "return json.dumps(m, sort_keys=True) > json.dumps(d, sort_keys=True)",
    "return m.get('tools', {}).get('gcc', 0) >= 12",
]
