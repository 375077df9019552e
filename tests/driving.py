"""A pool on a real ledger in memory, and a worker that speaks to it: tests carry the messages and turn the clock."""

import itertools
import weakref

from mqworker.amqp import Delivery
from mqworker.ledger import Ledger
from mqworker.messages import (
    Assign,
    Claim,
    Granted,
    Heartbeat,
    Hello,
    ListWorkers,
    Outcome,
    Outcomes,
    Probe,
    Recorded,
    Refusal,
    Report,
    Request,
    RequestEvent,
    RequestEvents,
    RunProgress,
    RunRef,
    StuckEvent,
    Tickets,
    Verdict,
    WorkerEvent,
)
from mqworker.metrics import SchedulerMetrics
from mqworker.pool import Moment, Pool
from mqworker.scheduler import kept_by, look_up
from mqworker.topology import Topology

TOPOLOGY = Topology("t")
RETRY_DELAY = 10.0
OFFER_TIMEOUT = 10.0
LEASE = 60.0  # of noop
WALL = 1_700_000_000.0
A_SECOND = 1.0


def an_id(number):
    return f"00000000-0000-4000-8000-{number:012x}"


def a_delivery(body, exchange="", tag=0):
    """Make a message as it comes from a broker."""
    return Delivery(
        epoch="e",
        tag=tag,
        exchange=exchange,
        key="",
        redelivered=False,
        kind=None,
        message_id=None,
        correlation_id=None,
        reply_to=None,
        user_id=None,
        headers={},
        body=body,
    )


class Driven:
    """Do for a pool what the scheduler does in a turn: read, judge, record, publish - in that order."""

    def __init__(self, ledger=None, *, term=1, **settings):
        self.ledger = ledger or Ledger.open("sqlite://")
        if ledger is None:  # Python 3.13 warns of databases that nobody has closed
            weakref.finalize(self.ledger, self.ledger._database.close)
        self.term = term
        self.settings = settings  # group_weights, concurrency_limits, no_worker_after
        self.steady = 1000.0 * term
        self.pool = Pool(
            term=term,
            topology=TOPOLOGY,
            store_id="store",
            retry_delay=RETRY_DELAY,
            offer_timeout=OFFER_TIMEOUT,
            metrics=SchedulerMetrics(version="0"),
            **settings,
        )
        self.inbox = []
        self.returned = []
        self.sets = []  # of writes, as they were committed
        self.tickets = []
        self.probes = []
        self.events = []
        self.told = {}  # (worker, epoch) to verdict parts
        self.receipts = []
        self.queues = set()
        self.submitted = itertools.count(1)

    @property
    def moment(self):
        return Moment(steady=self.steady, wall=WALL + self.steady)

    def turn(self, *, commit_seconds=0.0):
        """Take what is there, and go on while something was committed: it may have set slots or requests free."""
        while self._turn(commit_seconds):
            commit_seconds = 0.0

    def _turn(self, commit_seconds):
        inbox, self.inbox = self.inbox, []
        returned, self.returned = self.returned, []
        for call in returned:
            call()
        for message in inbox:
            match message:
                case Report():
                    self.pool.report(message, self.moment)
                case Probe():
                    self.pool.probe(message, self.moment)
                case Outcomes():
                    self.pool.outcomes(message, self.moment)
        self.pool.tick(self.moment)
        self.pool.offer(self.moment)
        writes, asks = self.pool.take_writes()
        results, answers = self.ledger.commit(writes), look_up(self.ledger, asks)
        self.sets.append(writes)
        self.steady += commit_seconds
        self.pool.committed(results, answers)
        self.queues |= {queue.name for queue in self.pool.declare}
        self.queues -= set(self.pool.delete)
        self.pool.declare, self.pool.delete = [], []
        for send in self.pool.take_sends():
            self._take(send)
        return bool(writes or asks)

    def _take(self, send):
        match send.message:
            case Tickets(tickets=tickets):
                assert (send.exchange, send.message.term) == (TOPOLOGY.work, self.term)
                assert send.key in self.queues
                self.tickets += [(send.key, ticket, send.returned) for ticket in tickets]
            case Probe():
                self.probes.append((send.message, send.returned))
            case Verdict():
                assert send.message.term == self.term
                worker, epoch = send.key.split(".")
                self.told.setdefault((worker, epoch), []).extend(send.message.parts)
            case RequestEvents(events=events):
                self.events += events
            case WorkerEvent() | StuckEvent():
                self.events.append(send.message)

    def submit(self, *requests):
        drafts = [self.pool.examine(request) for request in requests]
        wanted = {number for draft in drafts for number in draft.inputs}
        self.pool.submit(drafts, self.ledger.artifacts_by_id(wanted), self.moment, self.receipts.append)

    def request(self, task="noop", data=None, **fields):
        """Submit a request of its own, and let a turn pass."""
        request = Request(id=an_id(next(self.submitted)), task=task, data=data or {}, **fields)
        self.submit(request)
        self.turn()
        return request.id

    def abort(self, request):
        self.pool.abort(request, "not wanted", self.moment, lambda _: None)

    def pass_time(self, seconds):
        self.steady += seconds
        self.turn()

    def pass_probes(self):
        """Let the probes come back through the report queue, behind what is there already."""
        self.inbox += [probe for probe, _ in self.probes]
        self.probes.clear()
        self.turn()

    def take_tickets(self):
        tickets, self.tickets = [(queue, ticket) for queue, ticket, _ in self.tickets], []
        return tickets

    def view(self, request):
        [view], _ = self.ledger.view([request])
        return view

    def states(self, *requests):
        return [self.view(one).state for one in requests]

    def request_events(self):
        return [event.event for event in self.events if isinstance(event, RequestEvent)]

    def waits(self, request):
        return self.pool.views.decorate(self.view(request)).waits

    def worker(self, name):
        return next(one for one in self.pool.views.workers(ListWorkers()) if one.name == name)


class Peer:
    """Speak as a worker does."""

    def __init__(self, driven, name="anna", *, slots=1, incarnation=1, home="", store="store", tasks=None, **metadata):
        self.driven = driven
        self.name = name
        self.epoch = f"{name}{home}{incarnation}"
        self.slots = slots
        self.incarnation = incarnation
        self.home = home
        self.store = store
        self.tasks = tasks or {"noop": 1, "coloured": None}
        self.metadata = {"noop:version": 1, **metadata}
        self.version = 1
        self.seq = 0
        self.queue = None

    def join(self):
        self.say(self.hello(), self.beat())
        self.driven.turn()
        self.follow()
        self.hear()
        return self

    def follow(self):
        """Consume what was assigned, and say so."""
        for part in self.hear(Assign):
            self.queue = part.queue
        self.say(self.beat())
        self.driven.turn()

    def say(self, *parts, seq=None):
        self.seq += 1
        self.driven.inbox.append(
            Report(
                worker=self.name,
                epoch=self.epoch,
                seq=self.seq if seq is None else seq,
                incarnation=self.incarnation,
                home=self.home,
                parts=list(parts),
            )
        )

    def hear(self, kind=object):
        """Return what was told to this worker since, of one kind."""
        parts = self.driven.told.pop((self.name, self.epoch), [])
        return [part for part in parts if isinstance(part, kind)]

    def hello(self, **changed):
        if changed:
            self.metadata |= changed
            self.version += 1
        return Hello(
            host=self.name,
            slots=self.slots,
            tasks=self.tasks,
            metadata=dict(self.metadata),
            metadata_version=self.version,
            store=self.store,
            version="0",
        )

    def beat(self, *running, claiming=(), unsettled=(), slots=None, **fields):
        return Heartbeat(
            queue=self.queue,
            assigned=self.queue,
            slots=self.slots if slots is None else slots,
            running=[
                RunProgress(request=ref.request, attempt=ref.attempt, token=ref.token, since=0.0, stage="build")
                for ref in running
            ],
            claiming=list(claiming),
            unsettled=list(unsettled),
            **fields,
        )

    def claim(self, request, attempt=1, token=None):
        ref = RunRef(request=request, attempt=attempt, token=token or f"{self.name}-{request[-4:]}-{attempt}")
        self.say(Claim(request=ref.request, attempt=ref.attempt, token=ref.token, metadata_version=self.version))
        return ref

    def refuse(self, request, attempt=1):
        self.say(
            Refusal(request=request, attempt=attempt, token="refused", reason="no", metadata_version=self.version)  # noqa: S106  # a token of a claim
        )

    def run(self, request, attempt=1):
        """Claim an attempt and be granted it."""
        ref = self.claim(request, attempt)
        self.driven.turn()
        assert [(part.request, part.attempt, part.token) for part in self.hear(Granted)] == [
            (ref.request, ref.attempt, ref.token)
        ]
        return ref

    def end(self, ref, result="success", **fields):
        """Send an outcome; return the answer."""
        outcome = Outcome(
            request=ref.request, attempt=ref.attempt, token=ref.token, result=result, started=1.0, ended=2.0, **fields
        )
        self.driven.inbox.append(Outcomes(worker=self.name, epoch=self.epoch, outcomes=[outcome]))
        self.driven.turn()
        [recorded] = self.hear(Recorded)
        return recorded.status


def restart(driven):
    """Go on with what the ledger has, as the next term, and nothing else."""
    again = Driven(driven.ledger, term=driven.term + 1, **driven.settings)
    again.submitted = driven.submitted
    again.pool.restore(kept_by(driven.ledger), again.moment)
    again.turn()
    return again
