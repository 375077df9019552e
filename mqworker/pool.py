"""What the pool is now, and what each message or moment does to it: the scheduler's judgement.

It is told what came and what time it is; it answers with writes for the ledger, and, once it is told that these have
been committed, with messages to send. It opens nothing, waits for nothing and starts nothing, so that a whole pool
can be run on a virtual clock. What it holds is a part of what the ledger holds, and only a committed write changes it:
of what waits, the first few of each lane; the rest is read when their turn comes.
"""

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import heappop, heappush
from itertools import islice
from math import inf
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgspec

from mqworker import explain
from mqworker.blame import Blame
from mqworker.dispatch import Dispatch, Lane, Want
from mqworker.errors import Impostor
from mqworker.examiner import Draft, wrong_input
from mqworker.facts import (
    AbortAsked,
    AbortResult,
    Accept,
    Accepted,
    End,
    Ended,
    Expired,
    Grant,
    Import,
    LaneCount,
    Live,
    Move,
    Moved,
    Need,
    Offer,
    Own,
    Rekey,
    RequirementRow,
    Resume,
    Return,
    Stranded,
    Unmark,
    Wake,
    Write,
)
from mqworker.facts import Pause as KeepPause
from mqworker.holdings import Entry, Holdings, KnownWorker, Lease, Use
from mqworker.lifecycle import (
    MAX_BACK_OFF,
    Event,
    State,
    Tried,
    delayed_until,
    end_attempt,
    exhausted,
    expiry_text,
    has_expired,
    last_alone,
    lease_seconds,
    window_problem,
)
from mqworker.matching import Change, Matching, Question, Requirement, WorkerFacts
from mqworker.messages import (
    MAX_INPUTS_BYTES,
    MAX_METADATA_BYTES,
    Abort,
    Alive,
    Artifact,
    Assign,
    Bye,
    Claim,
    Drain,
    DrainWorkers,
    Granted,
    Heartbeat,
    Hello,
    Introduce,
    Outcome,
    Outcomes,
    Pause,
    PauseKind,
    PauseView,
    Probe,
    Reason,
    Receipt,
    Receipted,
    Recorded,
    RecordedArtifact,
    Refusal,
    Report,
    Request,
    RunProgress,
    RunRef,
    VerdictPart,
    Void,
    bounded,
)
from mqworker.metrics import SchedulerMetrics
from mqworker.needs import in_order, needs
from mqworker.outbox import Outbox, Send
from mqworker.requirements import Kind, RequirementClass, reads_from, reads_text
from mqworker.task import Task
from mqworker.topology import Queue, Topology
from mqworker.tracking import Read
from mqworker.views import Views

logger = logging.getLogger(__name__)

SILENCE: Final = 16.0  # seconds without a report (three heartbeats and a bit) before a worker counts as offline
LOOK: Final = 1.0  # seconds between looks for requests that nobody can run
SWEEP: Final = 30.0  # seconds between looks for classes that are not needed apart, or at all, any more
LINGER: Final = 600.0  # seconds that a requirement class is kept for requests that may come
MAX_IDLE: Final = 2000  # requirement classes without requests that are kept
DIVIDED_AT_ONCE: Final = 10  # divided classes whose requests are placed anew before other work goes on
PLACED_AT_ONCE: Final = 200  # requests of them all together
STUCK_SHOWN: Final = 100  # requests that a StuckEvent names
MAX_POOL_METADATA_BYTES: Final = 512 * 1024 * 1024  # of all workers together; as Python's objects some five times that
IMPOSTORS_TOLD: Final = 1000  # of whom an event has told, and does not again; then all are forgotten
FORGET: Final = 86400.0  # seconds: of who is offline for so long, and of aborts whose requests did not come
HOURLY: Final = 3600.0  # seconds between declarations of the classes' queues, and sweeps of such aborts
DECLARED_AT_ONCE: Final = 20  # of these queues, before other work goes on
EXPIRED_AT_ONCE: Final = 1000  # requests
NAME_IS_FREE_AFTER: Final = 20.0  # seconds of silence: four heartbeats
LEASE_MARGIN: Final = 1.0  # seconds: two clocks may run at rates that differ by 1/60 over the shortest lease


class Moment(NamedTuple):
    """Say what time it is: on a clock that never jumps, and in seconds since the epoch."""

    steady: float
    wall: float


@dataclass(frozen=True, kw_only=True)
class Asks:
    """Ask to have read from the ledger, right behind the writes."""

    artifacts: frozenset[int]  # that grants will name
    heads: Sequence[Want]
    members: Sequence[int]  # requirement classes whose requests are to be placed anew
    unused: frozenset[int]  # requirement classes that may have no live request any more
    histories: frozenset[str]  # requests of which is wanted how their attempts ended
    expired: float | None  # wall: what had to be granted by then

    def __bool__(self) -> bool:
        asked = self.artifacts or self.heads or self.members or self.unused or self.histories
        return bool(asked) or self.expired is not None


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Hold what was read."""

    artifacts: Mapping[int, RecordedArtifact] = field(default_factory=dict)
    heads: Sequence[Sequence[Live]] = ()  # for each want
    members: Sequence[Sequence[Live]] = ()  # for each of the requirement classes, the best first
    used: frozenset[int] = frozenset()
    histories: Mapping[str, tuple[Tried, ...]] = field(default_factory=dict)
    expired: Expired | None = None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Hold what a new scheduler begins with."""

    newest: int  # the highest age ever given
    newest_requirement: int  # the highest number of a requirement class ever given
    requirements: Sequence[RequirementRow]
    lanes: Sequence[LaneCount]
    held: Sequence[Live]  # offered, running, or waiting out a delay
    histories: Mapping[str, tuple[Tried, ...]]  # of those held: how their attempts ended
    blocked: int  # requests that wait for others
    pauses: Sequence[PauseView]
    worker_names: Mapping[str, str]  # to the broker's user whose each is


class Pool:
    """Judge everything that reaches the scheduler."""

    def __init__(
        self,
        *,
        term: int,
        topology: Topology,
        store_id: str,
        retry_delay: float,
        offer_timeout: float,
        metrics: SchedulerMetrics,
        group_weights: Mapping[str, float] = MappingProxyType({}),
        concurrency_limits: Mapping[str, int] = MappingProxyType({}),
        no_worker_after: float = 300.0,
        pause_after: int = 3,
    ) -> None:
        self._term = term
        self._topology = topology
        self._store_id = store_id
        self._retry_delay = retry_delay
        self._offer_timeout = offer_timeout
        self._metrics = metrics
        self._classes_made = 0
        self._probes = 0
        self._secret = secrets.token_hex()  # a probe that somebody else made would let leases lapse too early
        self._no_worker_after = no_worker_after
        held = self._held = Holdings(
            matching=Matching(name_class=self._name_class),
            dispatch=Dispatch(weights=group_weights, limits=concurrency_limits),
        )
        self._examiner = held.examiner
        self._requirements = held.requirements
        self._uses: dict[int, Use] = {}
        self._divided: dict[int, RequirementClass] = {}
        self._matching = held.matching
        self._dispatch = held.dispatch
        self._entries = held.entries
        self._delayed = held.delayed
        self._running: dict[str, Entry] = {}
        self._workers = held.workers
        self._metadata_bytes = 0  # of them all
        self._pauses = held.pauses
        self._names = held.names
        self._impostors: dict[tuple[str, str | None], None] = {}  # (name, user) of whom an event has told
        self._swept = 0.0
        self._unused: set[int] = set()
        self._rekeyed: dict[int, int] = {}  # age of a request to its new requirement class
        self._refused = held.refused
        self._refusals = 0
        self._alone: dict[str, Use] = {}  # by the requests that were refused: how their own requirements are used
        self._steady = 0.0  # when it last looked at what is due
        self._wall = 0.0  # ... by the other clock
        self._looked = 0.0  # when it last looked for requests that nobody can run
        self._hourly = 0.0  # when it last began what is done hourly
        self._to_declare: list[str] = []  # classes, for what is done hourly
        self._blame = Blame(pause_after)
        self._expires = -inf  # wall: nothing expires before then
        self._expiring: list[tuple[float, str]] = []  # wall; of requests in memory, as a heap; perhaps long gone
        self._expired_by: float | None = None  # wall: what has expired by then is to be asked for
        self._histories_wanted: set[str] = set()
        self._histories: Mapping[str, tuple[Tried, ...]] = {}
        self._asks = Asks(
            artifacts=frozenset(), heads=(), members=(), unused=frozenset(), histories=frozenset(), expired=None
        )
        self._writes: list[tuple[Write | None, Callable[[Any], None]]] = []  # None: only an answer behind the commit
        self._committing: list[tuple[Write | None, Callable[[Any], None]]] = []
        self._outbox = Outbox(term=term, topology=topology, metrics=metrics)
        self._grants_wanted: set[int] = set()
        self._inputs: Mapping[int, RecordedArtifact] = {}
        self.views = Views(held, term=term, topology=topology, store_id=store_id, metrics=metrics)
        self.declare: list[Queue] = []  # before the next sends
        self.delete: list[str] = []  # queues of classes that are gone

    # ------------------------------------------------------------ what the scheduler takes and gives back

    def take_writes(self) -> tuple[list[Write], Asks]:
        """Hand over the writes judged since the last call, and what is to be read right behind them."""
        if self._rekeyed:
            self._write(Rekey(to=self._rekeyed), lambda _: None)
            self._rekeyed = {}
        self._committing, self._writes = self._writes, []
        self._asks = self._take_asks()
        return [write for write, _ in self._committing if write is not None], self._asks

    def _take_asks(self) -> Asks:
        asks = Asks(
            artifacts=frozenset(self._grants_wanted),
            heads=self._dispatch.wants(self._held.newest),
            members=tuple(islice(self._divided, DIVIDED_AT_ONCE)),
            unused=frozenset(self._unused),
            histories=frozenset(self._histories_wanted),
            expired=self._expired_by,
        )
        self._grants_wanted, self._unused, self._histories_wanted = set(), set(), set()
        if self._expired_by is not None:
            self._expires, self._expired_by = inf, None  # the answer says when it is next, or what comes meanwhile
        return asks

    def committed(self, results: Sequence[Any], answers: Answers) -> None:
        """Take over what the ledger has committed of the writes last handed over, and what was read behind them."""
        asks = self._asks
        self._inputs = answers.artifacts
        self._histories = answers.histories
        remaining = iter(results)
        committing, self._committing = self._committing, []
        for write, then in committing:
            then(None if write is None else next(remaining))
        for want, rows in zip(asks.heads, answers.heads, strict=True):
            self._heads(want, rows)
        for number, members in zip(asks.members, answers.members, strict=True):
            if number in self._divided:
                self._place_anew(self._divided[number], members)
        for number in asks.unused - answers.used:
            self._drop_unused(number)
        if answers.expired is not None:
            self._take_expired(answers.expired)

    def _heads(self, want: Want, rows: Sequence[Live]) -> None:
        """Take the next requests of a lane into memory."""
        by_id = {row.request.id: row for row in rows}
        for request in self._dispatch.heads(want, [(row.request.id, row.seq) for row in rows]):
            self._entry_of(by_id[request])

    def take_sends(self) -> list[Send]:
        """Hand over the messages to publish, but for tickets to classes that have gone since: they went back."""
        return self._outbox.take(self._is_class)

    def class_queues(self) -> tuple[Queue, ...]:
        """List the queues of the classes that live."""
        return tuple(self._queue(name) for name in self._matching.names())

    def queue_lost(self, queue: str) -> None:
        """Give a class whose queue cannot be had another one, and offer anew what was in it.

        It is a queue on one node: while that is down nobody can declare, consume or reach it.
        """
        own = queue.removeprefix(f"{self._topology.work}.")
        name = next((name for name in self._matching.names() if self._held.queue_name(name) == own), None)
        if name is None:
            return  # its class has gone, or has another already
        self._held.renamed[name] = self._name_class()
        self.declare.append(self._queue(name))
        for member in sorted(self._matching.members(name)):
            worker = self._workers[member]
            self._say(worker, self._assignment(worker))
        for request in self._dispatch.offered(name):
            self._return(self._entries[request])

    def _queue(self, capability_class: str) -> Queue:
        return self._topology.class_queue(self._held.queue_name(capability_class))

    def restore(self, kept: Kept, moment: Moment) -> None:
        """Begin with what the ledger holds: offers go back, and each lease gets a full term."""
        self._steady = self._hourly = moment.steady
        self._held.newest = kept.newest
        self._wall = moment.wall
        self._requirements.count_from(kept.newest_requirement)
        self._held.blocked = kept.blocked
        for name, user in kept.worker_names.items():
            self._names.give(name, user)
        for pause in kept.pauses:
            self._pauses[pause.kind, pause.name] = pause
            if pause.kind == "group":
                self._dispatch.pause_group(pause.name)
        for row in kept.requirements:
            self._recall(row)
        for lane in kept.lanes:
            self._dispatch.restore(Lane(lane.requirement, lane.priority, lane.group, lane.key), lane.number)
        for held in kept.held:
            if held.unmet:  # it waits for others first
                continue
            entry = self._entry_of(held)
            entry.history = kept.histories.get(held.request.id, ())
            if held.state is State.RUNNING:
                seconds = self._lease_of(entry)
                worker = self._workers.setdefault(held.worker or "", KnownWorker(name=held.worker or ""))
                worker.seen, worker.seen_wall = moment.steady, moment.wall
                worker.leases.add(held.request.id)
                self._running[held.request.id] = entry
                self._dispatch.hold(held.request.id, entry.lane)
                entry.lease = Lease(
                    worker=worker.name,
                    run=RunProgress(
                        request=held.request.id, attempt=held.attempt, token=held.token or "", since=moment.wall
                    ),
                    seconds=seconds,
                    deadline=moment.steady + seconds + LEASE_MARGIN,
                )
            elif held.state is State.OFFERED:
                self._return(entry)
            else:
                wait = (held.not_before or 0.0) - moment.wall
                if held.not_before != held.request.not_before:  # a back-off; the clock may have been set back since
                    wait = min(wait, MAX_BACK_OFF)
                self._delay(entry, due=moment.steady + wait)

    # ------------------------------------------------------------ requirement classes

    def _recall(self, row: RequirementRow) -> None:
        """Take back a requirement class; if its task has changed since, or is unfit, its requests are placed anew."""
        before = Kind(task=row.task, fingerprint=row.fingerprint, requires=row.requires or "", whole=False)
        one = RequirementClass(
            id=row.id, kind=before, data=msgspec.json.decode(row.data), reads=reads_from(row.reads), open=False
        )
        draft = self._examiner.recall(one)
        if draft.kind._replace(whole=False) == before and draft.problem is None:  # one unfit speaks for no other
            one.kind = draft.kind
        else:
            one.divided = True
        self._requirements.restore(one)
        self._begin(one, draft)

    def _class_of(self, draft: Draft) -> RequirementClass:
        """Return the requirement class of a request; the first of its class is asked about on all workers."""
        data = draft.task.data if draft.task is not None else {}
        one = self._requirements.find(draft.kind, data)
        if one is not None:
            one.open = False
        else:
            one = self._requirements.make(draft.kind, data, draft.given)
            self._begin(one, draft)
            self._write(
                Need(
                    id=one.id,
                    task=one.kind.task,
                    fingerprint=one.kind.fingerprint,
                    reads=reads_text(one.reads),
                    data=msgspec.json.encode(one.data).decode(),
                    requires=one.kind.requires or None,
                ),
                lambda _: None,
            )
        self._uses[one.id].idle_since = self._steady
        return one

    def _begin(self, one: RequirementClass, draft: Draft) -> None:
        """Make a requirement class live."""
        self._uses[one.id] = Use(idle_since=self._steady)
        one.problem = draft.problem
        if one.divided:
            self._divided[one.id] = one
        if ("task", one.kind.task) in self._pauses:
            self._dispatch.pause_requirement(one.id)
        self._change(self._matching.need(one.id, self._question(one, draft)))
        if one.escaped:
            self._change(self._matching.escape(one.id))

    def _question(self, one: RequirementClass, draft: Draft) -> Question:
        def learn(reads: Sequence[Read]) -> bool:
            if one.open:
                self._requirements.extend(one, reads)
            elif not one.divided:
                self._requirements.divide(one, reads)
                self._divided[one.id] = one
            return one.open

        return self._examiner.question(one, draft, learn)

    def _note_escapes(self) -> None:
        """Ask each request for itself whose class has answered in two ways."""
        for requirement in self._matching.escaped():
            one = self._requirements.get(requirement) if isinstance(requirement, int) else None
            if one is not None and not one.escaped:
                self._requirements.escape(one)
                if one.divided:
                    self._divided[one.id] = one

    def _place_anew(self, old: RequirementClass, rows: Sequence[Live]) -> None:
        """Give requests of a class that was divided, or whose task has changed, the classes that are theirs now."""
        if not rows:  # what is left of it does not wait
            for entry in [entry for entry in self._entries.values() if entry.one is old]:
                self._reclass(entry.seq, entry.request, entry, bound=True)
            del self._divided[old.id]
            self._end_class(old)
            return
        for row in rows:
            there = self._entries.get(row.request.id)
            one = self._reclass(row.seq, row.request, there, bound=not row.unmet)
            if there is None and row.state is State.PENDING and row.unmet == 0 and row.not_before is None:
                self._dispatch.absent(_lane_of(row), row.seq)
                self._place(self._entry_of(row, one))

    def _reclass(self, seq: int, request: Request, entry: Entry | None, *, bound: bool) -> RequirementClass:
        """Find the requirement class of a request anew."""
        one = self._class_of(self._examiner.examine(request, bound=bound))
        self._rekeyed[seq] = one.id
        if entry is not None:
            waits = entry.own is None and self._dispatch.waits(request.id)
            if waits:
                self._dispatch.forget(request.id)
            self._uses[entry.one.id].entries -= 1
            self._uses[one.id].entries += 1
            entry.one = one
            if waits:
                self._place(entry)
        return one

    def _end_class(self, one: RequirementClass) -> None:
        del self._uses[one.id]
        self._requirements.forget(one)
        self._matching.drop(one.id)
        self._dispatch.drop(one.id)

    def _drop_unused(self, number: int) -> None:
        one = self._requirements.get(number)
        if one is not None and not one.divided and self._idle(one):
            self._end_class(one)

    def _idle(self, one: RequirementClass) -> bool:
        return not self._uses[one.id].entries and not self._dispatch.waiting_for(one.id)

    def _sweep(self) -> None:
        """Look for requirement classes that nobody has used for long, and for workers that nothing tells apart."""
        idle = sorted((one for one in self._requirements if self._idle(one)), key=self._idle_since)
        surplus = len(idle) - MAX_IDLE
        self._unused = {
            one.id
            for number, one in enumerate(idle)
            if number < surplus or self._steady - self._idle_since(one) > LINGER
        }
        self._change(self._matching.merge())
        long_gone = [
            worker.name
            for worker in self._workers.values()
            if worker.state != "online" and not worker.leases and self._steady - worker.seen > FORGET
        ]
        for name in long_gone:
            self._metadata_bytes -= self._workers.pop(name).metadata_bytes
            self._blame.forget(name)
            self._held.drains.pop(name, None)

    def _idle_since(self, one: RequirementClass) -> float:
        return self._uses[one.id].idle_since

    # ------------------------------------------------------------ submissions

    def examine(self, request: Request, *, bound: bool = False) -> Draft:
        """Ask the request's task whether it accepts the data; `bound`: with what it takes from others in it."""
        return self._examiner.examine(request, bound=bound)

    def submit(
        self,
        drafts: Sequence[Draft],
        artifacts: Mapping[int, RecordedArtifact],
        moment: Moment,
        answer: Callable[[Receipt], None],
        *,
        submitter: str | None = None,
        heeds: Callable[[str], frozenset[str | None] | None] = lambda _group: None,
    ) -> None:
        """Accept or reject requests of a broker's user; the answer is given once the ledger has them."""
        results: dict[int, Receipted] = {}

        def settle(index: int, one: Receipted) -> None:
            results[index] = one
            self._metrics.child(self._metrics.received, one.status).inc()
            if len(results) == len(drafts):
                answer(Receipt(term=self._term, results=[results[place] for place in range(len(drafts))]))

        order, circular = in_order([draft.request for draft in drafts])
        for index in order:
            draft = drafts[index]
            request = draft.request
            problem = draft.problem or circular.get(index) or window_problem(request) or wrong_input(draft, artifacts)
            self._held.newest += 1
            seq = self._held.newest
            if problem is not None:
                write = Accept(
                    seq=seq,
                    request=request,
                    at=moment.wall,
                    rejected=Reason(text=problem, stage="submission"),
                    submitter=submitter,
                    heeds=heeds(request.group),
                )
                self._write(
                    write, partial(self._accepted, request=request, moment=moment, settle=partial(settle, index))
                )
                continue
            one = self._class_of(draft)
            entry = Entry(seq=seq, request=request, inputs=draft.inputs, one=one, submitted=moment.wall)
            fresh = later = behind = None
            self._note_expiry(request)
            if needs(request) or delayed_until(request, moment.wall) is not None:
                later = entry
            elif request.id not in self._entries:
                # Placed at once, so that it can be offered in the transaction that accepts it.
                if self._place(self._new_entry(entry)):
                    fresh = entry
                else:
                    behind = entry
            self._write(
                Accept(
                    seq=seq,
                    request=request,
                    at=moment.wall,
                    requirement=one.id,
                    inputs=draft.inputs,
                    submitter=submitter,
                    heeds=heeds(request.group),
                ),
                partial(
                    self._accepted,
                    request=request,
                    fresh=fresh,
                    behind=behind,
                    later=later,
                    moment=moment,
                    settle=partial(settle, index),
                ),
            )

    def _accepted(
        self,
        result: Accepted,
        *,
        request: Request,
        moment: Moment,
        settle: Callable[[Receipted], None],
        fresh: Entry | None = None,
        behind: Entry | None = None,
        later: Entry | None = None,
    ) -> None:
        if result.status != "accepted" or result.state is State.ABORTED:  # the ledger knew it, or its abort
            if fresh is not None and self._entries.get(request.id) is fresh:
                self._forget(fresh)
            if behind is not None:
                self._dispatch.absent(behind.lane, behind.seq)
        if result.status == "accepted":
            self._outbox.tell_move(request.id, request.task, State.PENDING, Event.ACCEPT, attempt=1, wall=moment.wall)
        elif result.status == "rejected":
            reason = Reason(text=result.reason or "")
            self._outbox.tell_move(
                request.id, request.task, State.REJECTED, Event.REJECT, attempt=1, wall=moment.wall, reason=reason
            )
        if result.stranded is not None:
            self._outbox.tell_move(
                request.id,
                request.task,
                State.ABORTED,
                Event.ABORT,
                attempt=1,
                wall=moment.wall,
                reason=result.stranded,
            )
        elif result.unmet:
            self._held.blocked += 1
        elif result.status == "accepted" and later is not None:
            if result.live is None:
                self._let_wait(self._new_entry(later), delayed_until(request, moment.wall), moment)
            else:
                self._free(result.live, moment)
        settle(Receipted(id=request.id, status=result.status, reason=result.reason))

    def _free(self, row: Live, moment: Moment) -> None:
        """Let a request wait for a slot that needs no other request any more."""
        entry = self._entry_of(row)
        if row.request.take:  # only now it is known what its task sees
            self._reclass(row.seq, row.request, entry, bound=True)
            if row.not_before is None:
                self._dispatch.absent(_lane_of(row), row.seq)  # the ledger has it there until the next commit
        self._let_wait(entry, row.not_before, moment)

    def _let_wait(self, entry: Entry, not_before: float | None, moment: Moment) -> None:
        """Let a request wait for its time, if it has one, and for a slot."""
        if not_before is None:
            self._place(entry)
        elif not_before <= moment.wall:  # its time came while it needed others
            self._end_delay(entry)
        else:
            self._delay(entry, due=moment.steady + not_before - moment.wall)

    def _settle_dependents(self, freed: Sequence[Live], stranded: Sequence[Stranded], moment: Moment) -> None:
        """Take over what the end of one request meant for those that needed it."""
        self._held.blocked -= len(freed) + len(stranded)
        for row in freed:
            self._free(row, moment)
        for gone in stranded:
            self._outbox.tell_move(
                gone.id, gone.task, State.ABORTED, Event.ABORT, attempt=1, wall=moment.wall, reason=gone.reason
            )

    # ------------------------------------------------------------ reports

    def report(self, report: Report, moment: Moment, user: str | None = None) -> None:
        """Take a worker's word; one that is older than the newest known is dropped.

        Raises:
            Impostor: the worker's name is that of another of the broker's users.
        """
        try:
            self._check_name(report.worker, user, moment)
        except Impostor as error:
            self._tell_impostor(report, error)
            raise
        worker = self._workers.setdefault(report.worker, KnownWorker(name=report.worker))
        if (intrudes := self._intrudes(worker, report, moment)) is not None:
            self._outbox.say(worker.name, report.epoch, Assign(queue=None, reason=intrudes))
            return
        late = worker.home == report.home and (report.incarnation, report.seq) <= (worker.incarnation, worker.seq)
        if late and not worker.any_number:
            return
        worker.any_number = False
        if report.incarnation != worker.incarnation or report.home != worker.home:
            worker.hello = worker.heartbeat = None
        worker.home, worker.incarnation = report.home, report.incarnation
        worker.seq, worker.epoch = report.seq, report.epoch
        worker.seen, worker.seen_wall, worker.probe = moment.steady, moment.wall, None
        for part in report.parts:
            match part:
                case Hello():
                    self._hello(worker, part, moment)
                case Bye():
                    self._offline(worker, part.reason, moment)
                    return
                case _ if worker.hello is None:
                    self._say(worker, Introduce())
                case Heartbeat():
                    self._heartbeat(worker, part, moment)
                case Claim():
                    self._claim(worker, part, moment)
                case Refusal():
                    self._refusal(worker, part)

    def _check_name(self, name: str, user: str | None, moment: Moment) -> None:
        """Make a worker's name that of the user who is the first to use it, and let nobody else use it."""
        refused = self._names.speak(name, user)
        if refused is None:
            if self._names.user(name) != user:
                self._names.give(name, user)
                self._write(Own(name=name, user=user, at=moment.wall), lambda _: None)
            return
        if (name, user) not in self._impostors:
            if len(self._impostors) >= IMPOSTORS_TOLD:
                self._impostors.clear()
            self._impostors[name, user] = None
            self._outbox.tell_worker(name, "impostor", refused, wall=moment.wall)
        raise Impostor(refused)

    def _tell_impostor(self, report: Report, error: Impostor) -> None:
        """Answer who speaks in another's name, but never where the rightful one hears."""
        rightful = self._workers.get(report.worker)
        if rightful is None or rightful.epoch != report.epoch:
            self._outbox.say(report.worker, report.epoch, Assign(queue=None, reason=str(error)))

    @staticmethod
    def _intrudes(worker: KnownWorker, report: Report, moment: Moment) -> str | None:
        """Say why a report is not that of the worker which has its name; None: it is, or the name is free.

        A successor in the same state directory takes over at once, since there its predecessor is known to have ended.
        From another one, it is a successor only if the worker is silent: two agents may be given one name by mistake.
        """
        if worker.incarnation < 0 or worker.any_number:
            return None
        if report.home == worker.home:
            if report.incarnation >= worker.incarnation:
                return None
            other = "a newer one, which has a copy of its state directory or is its successor,"
        elif worker.state == "offline" or moment.steady - worker.seen >= NAME_IS_FREE_AFTER:
            return None
        else:
            other = f"another one, on the host {worker.hello.host if worker.hello else 'unknown'},"
        return (
            f"expected one worker of the name {worker.name} in the pool, but {other} has it: give one of the two"
            " another name and state_dir, or stop it"
        )

    def _hello(self, worker: KnownWorker, hello: Hello, moment: Moment) -> None:
        known = worker.hello is not None and worker.state == "online"
        size = len(msgspec.json.encode(hello.metadata))
        others = self._metadata_bytes - worker.metadata_bytes
        if size > MAX_METADATA_BYTES or others + size > MAX_POOL_METADATA_BYTES:
            reason = (
                f"expected metadata of at most {MAX_METADATA_BYTES} bytes, and of all workers together of at most"
                f" {MAX_POOL_METADATA_BYTES}, got {size} beside {others}: have the worker say less"
            )
            worker.hello = msgspec.structs.replace(hello, metadata={}, tasks={})  # it is known, and holds no room
            self._metadata_bytes, worker.metadata_bytes = others, 0
            self._refuse(worker, reason, moment)
            return
        self._metadata_bytes, worker.metadata_bytes = others + size, size
        worker.hello = hello
        if hello.store != self._store_id:
            reason = (
                f"expected the store {self._store_id} that this scheduler uses, got the store {hello.store}:"
                " give the worker the scheduler's store URL"
            )
            self._refuse(worker, reason, moment)
            return
        if not known:
            worker.state, worker.reason = "online", None
        self._outbox.tell_worker(worker.name, "changed" if known else "online", worker.reason, wall=moment.wall)
        self._enter(worker, hello)

    def _refuse(self, worker: KnownWorker, reason: str, moment: Moment) -> None:
        self._offline(worker, reason, moment, state="refused")
        worker.reason = reason  # it may have been refused for another one before
        self._say(worker, Assign(queue=None, reason=reason))

    def _enter(self, worker: KnownWorker, hello: Hello) -> None:
        self._change(
            self._matching.join(
                WorkerFacts(
                    name=worker.name,
                    metadata=hello.metadata,
                    metadata_version=hello.metadata_version,
                    tasks=hello.tasks,
                )
            )
        )
        own = self._matching.class_of(worker.name)
        if own is not None:
            self.declare.append(self._queue(own))  # it may have gone: who consumed it comes back anew
        self._say(worker, self._assignment(worker))

    def _heartbeat(self, worker: KnownWorker, beat: Heartbeat, moment: Moment) -> None:
        if worker.state == "refused":  # what it runs goes on; it gets nothing more
            self._renew(worker, beat, moment)
            self._say(worker, Assign(queue=None, reason=worker.reason))
            return
        if worker.state == "offline":  # it was silent, and is back
            worker.state, worker.reason = "online", None
            self._outbox.tell_worker(worker.name, "online", worker.reason, wall=moment.wall)
            if worker.hello is not None:
                self._enter(worker, worker.hello)
        worker.heartbeat = beat
        self._tell_to_drain(worker, beat)
        busy = self._renew(worker, beat, moment)
        own = self._matching.class_of(worker.name)
        queue = self._assignment(worker).queue
        if beat.assigned != queue:
            worker.former = beat.assigned
            self._say(worker, self._assignment(worker))
        elif worker.former is not None:
            self._retire(worker.former)  # a class of an earlier term; the worker consumes it no more
            worker.former = None
        self._dispatch.supply(
            worker.name,
            capability_class=own if queue is not None and beat.assigned == queue else None,
            slots=beat.slots,
            busy=busy,
        )

    def _renew(self, worker: KnownWorker, beat: Heartbeat, moment: Moment) -> set[str]:
        """Renew the leases of what a worker has, and tell it which of its runs do not count; return their tokens."""
        running = {run.token: run for run in beat.running}
        has = {*running, *(ref.token for ref in beat.claiming)}
        settled_soon = {ref.token for ref in beat.unsettled}
        busy = set()
        for request in list(worker.leases):
            entry = self._entries[request]
            lease = entry.lease
            if lease is None:
                continue
            if lease.token in has:
                busy.add(lease.token)
                lease.run = running.get(lease.token, lease.run)
                lease.deadline, lease.probe = moment.steady + lease.seconds + LEASE_MARGIN, None
                if entry.abort is not None:
                    self._say(
                        worker, Abort(request=request, attempt=entry.attempt, token=lease.token, reason=entry.abort)
                    )
            elif lease.token not in settled_soon and lease.token.startswith(worker.home):
                # Its claim came in an earlier report than this. One from another state directory lapses by time.
                self._lost(entry, "the worker was restarted and does not have this run any more", moment)
        mine = {lease.token for lease in map(self._lease_held, worker.leases) if lease is not None}
        void = [
            RunRef(request=ref.request, attempt=ref.attempt, token=ref.token)
            for ref in beat.running
            if ref.token not in mine
        ]
        self._say(worker, Alive(seq=worker.seq, void=void))
        return busy

    def _tell_to_drain(self, worker: KnownWorker, beat: Heartbeat) -> None:
        """Repeat that a worker is to take nothing more until it says that it does."""
        drain = self._held.drains.get(worker.name)
        if drain is None:
            return
        if beat.draining and (beat.leaving or not drain.stop):
            del self._held.drains[worker.name]
        else:
            self._say(worker, drain)

    def _retire(self, queue: str) -> None:
        """Have a queue deleted that may be one of an earlier term's classes: nobody else would, for a day."""
        if queue.startswith(f"{self._topology.work}.") and not self._is_class(queue):  # a worker may name any queue
            self.delete.append(queue)

    def _is_class(self, queue: str) -> bool:
        """Say whether a queue is that of a class that lives."""
        own = queue.removeprefix(f"{self._topology.work}.")
        renamed = self._held.renamed
        return own in renamed.values() or (own in self._matching.names() and own not in renamed)

    def _lease_held(self, request: str) -> Lease | None:
        return self._entries[request].lease

    def _claim(self, worker: KnownWorker, claim: Claim, moment: Moment) -> None:
        hello = worker.hello
        if hello is None or hello.metadata_version != claim.metadata_version or worker.state == "offline":
            self._say(worker, Introduce())  # unanswered, the claim comes again behind the Hello
            return
        entry = self._entries.get(claim.request)
        if entry is None:
            self._void(worker, claim, "the request has ended")
        elif entry.lease is not None and entry.lease.token == claim.token and entry.attempt == claim.attempt:
            self._grants_wanted.update(entry.inputs)
            self._writes.append((None, lambda _: self._granted_before(worker, claim, entry)))
        elif entry.state is not State.OFFERED:
            self._void(worker, claim, f"the request is {entry.state}, not offered")
        elif has_expired(entry.request, moment.wall):
            self._void(worker, claim, "the request has expired")
            self._expire(entry.request.id, entry.request.expires_at or 0.0, moment)
        elif entry.attempt != claim.attempt:
            self._void(worker, claim, f"attempt {claim.attempt} is over, the request is at attempt {entry.attempt}")
        elif worker.state != "online" or not self._matching.can_run(worker.name, entry.requirement):
            self._void(worker, claim, "by the scheduler's view this worker cannot run it")
            self._return(entry)
        elif (paused := self._paused(worker.name, entry)) is not None:
            self._void(worker, claim, paused)
            self._return(entry)
        else:
            self._grants_wanted.update(entry.inputs)
            grant = Grant(
                request=claim.request, attempt=claim.attempt, token=claim.token, worker=worker.name, at=moment.wall
            )
            self._write(
                grant,
                partial(self._claim_settled, worker=worker, claim=claim, entry=entry, moment=moment),
            )

    def _claim_settled(self, result: str, *, worker: KnownWorker, claim: Claim, entry: Entry, moment: Moment) -> None:
        if result == "void":
            self._void(worker, claim, "another worker was first")
            return
        if entry.lease is not None and entry.lease.token == claim.token:  # the claim came twice in one set
            self._granted(worker, claim, entry)
            return
        seconds = self._lease_of(entry)
        entry.state = State.RUNNING
        entry.lease = Lease(
            worker=worker.name,
            run=RunProgress(
                request=claim.request, attempt=claim.attempt, token=claim.token, since=moment.wall, stage="start"
            ),
            seconds=seconds,
            deadline=moment.steady + seconds + LEASE_MARGIN,
        )
        worker.leases.add(claim.request)
        self._running[claim.request] = entry
        self._dispatch.hold(claim.request, entry.lane)  # also if its class has gone since the claim was judged
        self._dispatch.taken(worker.name, claim.token)
        if last_alone(entry.history, entry.request.max_attempts):
            self._dispatch.no_supply(worker.name)  # until its next heartbeat says what else it takes
        waited = max(0.0, moment.wall - entry.submitted)
        self._metrics.child(self._metrics.wait_seconds, entry.request.task.lower()).observe(waited)
        self._outbox.tell_move(
            entry.request.id,
            entry.request.task,
            State.RUNNING,
            Event.GRANT,
            attempt=entry.attempt,
            wall=moment.wall,
            worker=worker.name,
        )
        self._granted(worker, claim, entry)

    def _granted_before(self, worker: KnownWorker, claim: Claim, entry: Entry) -> None:
        """Give the same answer again, unless the run has ended since it was asked for."""
        if entry.lease is not None and entry.lease.token == claim.token:
            self._granted(worker, claim, entry)
        else:
            self._void(worker, claim, "the run has ended")

    def _granted(self, worker: KnownWorker, claim: Claim, entry: Entry) -> None:
        inputs = [self._inputs[number] for number in entry.inputs if number in self._inputs]
        if len(inputs) < len(entry.inputs) or sum(len(msgspec.json.encode(one)) for one in inputs) > MAX_INPUTS_BYTES:
            self._too_much_input(worker, claim)
            return
        self._say(
            worker,
            Granted(
                request=claim.request,
                attempt=claim.attempt,
                token=claim.token,
                lease=self._lease_of(entry),
                inputs=inputs,
            ),
        )

    def _too_much_input(self, worker: KnownWorker, claim: Claim) -> None:
        """End a request whose grant no message could carry, before it has begun."""
        reason = Reason(
            text=f"expected input artifacts that are described in at most {MAX_INPUTS_BYTES} bytes together, got more:"
            " name fewer of them",
            stage="grant",
        )
        outcome = Outcome(
            request=claim.request,
            attempt=claim.attempt,
            token=claim.token,
            result="error",
            reason=reason,
            started=self._wall,
            ended=self._wall,
        )
        self._end(
            claim,
            worker=worker.name,
            outcome=outcome,
            artifacts=(),
            moment=Moment(steady=self._steady, wall=self._wall),
            answer=lambda _: None,
        )
        self._void(worker, claim, reason.text)

    def _refusal(self, worker: KnownWorker, refusal: Refusal) -> None:
        if worker.hello is None or worker.hello.metadata_version != refusal.metadata_version:
            self._say(worker, Introduce())  # unanswered, the refusal comes again behind the Hello
            return
        entry = self._entries.get(refusal.request)
        if entry is not None and entry.attempt == refusal.attempt and entry.state is State.OFFERED:
            if self._matching.can_run(worker.name, entry.requirement):
                self._remember_refusal(entry, worker.name, refusal.metadata_version)
            self._return(entry)
        self._void(worker, refusal, "refused")

    def _remember_refusal(self, entry: Entry, worker: str, metadata_version: int) -> None:
        """Give the request a requirement of its own, which this worker does not meet with this metadata."""
        if entry.own is None:
            self._change(self._matching.escape(entry.one.id))  # the same metadata, another answer
        draft = self._examiner.examine(entry.request, bound=True)
        earlier = (one for one in self._refused.get(entry.request.id, ()) if one[0] != worker)  # it has other ones now
        denied = frozenset({*earlier, (worker, metadata_version)})
        self._refused[entry.request.id] = denied
        self._alone.setdefault(entry.request.id, Use())
        if entry.own is not None:
            self._matching.drop(entry.own)
            self._dispatch.drop(entry.own)
        self._refusals += 1
        entry.own = (entry.one.id, entry.request.id, self._refusals)
        if ("task", entry.one.kind.task) in self._pauses:
            self._dispatch.pause_requirement(entry.own)
        alone = self._examiner.passing_question(draft)  # it is shared with none: no read divides it
        self._change(self._matching.need(entry.own, replace(alone, denied=denied)))
        self._note_escapes()

    # ------------------------------------------------------------ outcomes

    def outcomes(self, message: Outcomes, moment: Moment, user: str | None = None) -> None:
        """Take a worker's outcomes; each is answered, whatever becomes of it.

        Raises:
            Impostor: the worker's name is that of another of the broker's users. They are not answered, so that they
                stay in the spool of a worker whose user was changed until its name is released. Or a run that one of
                them is of is another user's; the others count.
        """
        self._check_name(message.worker, user, moment)
        foreign = None
        for outcome in message.outcomes:
            holder = self._holder(outcome)
            if holder is None or holder == user:
                self._outcome(message.worker, message.epoch, outcome, moment)
            else:
                foreign = holder
        if foreign is not None:
            raise Impostor(f"expected the outcome of a run of the broker's user {foreign} from that user, got {user}'s")

    def _holder(self, outcome: Outcome) -> str | None:
        """Return the user who alone may end this run; a worker may have another name than when it was granted."""
        entry = self._entries.get(outcome.request)
        lease = None if entry is None else entry.lease
        return None if lease is None or lease.token != outcome.token else self._names.user(lease.worker)

    def _outcome(self, worker: str, epoch: str, outcome: Outcome, moment: Moment) -> None:
        def answer(ended: Ended) -> None:
            self._metrics.child(self._metrics.outcomes, ended.status).inc()
            recorded = Recorded(
                request=outcome.request,
                attempt=outcome.attempt,
                token=outcome.token,
                status=ended.status,
                reason=ended.reason,
            )
            self._outbox.say(worker, epoch, recorded)

        self._end(
            RunRef(request=outcome.request, attempt=outcome.attempt, token=outcome.token),
            worker=worker,
            outcome=outcome,
            artifacts=outcome.artifacts,
            moment=moment,
            answer=answer,
        )

    def _lost(self, entry: Entry, why: str, moment: Moment) -> None:
        lease = entry.lease
        if lease is None:
            return
        self._metrics.attempts_lost.inc()
        ref = RunRef(request=entry.request.id, attempt=entry.attempt, token=lease.token)
        outcome = Outcome(
            request=ref.request,
            attempt=ref.attempt,
            token=ref.token,
            result="lost",
            reason=Reason(text=f"lost on {lease.worker}: {why}", stage="lease"),
            started=moment.wall,
            ended=moment.wall,
        )
        self._end(ref, worker=lease.worker, outcome=outcome, artifacts=(), moment=moment, answer=lambda _: None)

    def _end(
        self,
        ref: RunRef,
        *,
        worker: str,
        outcome: Outcome,
        artifacts: Sequence[Artifact],
        moment: Moment,
        answer: Callable[[Ended], None],
    ) -> None:
        entry = self._entries.get(ref.request)
        ending = end_attempt(
            outcome.result,
            again=outcome.again,
            tried=entry.tried if entry is not None else 0,
            max_attempts=entry.request.max_attempts if entry is not None else 1,
            abort_asked=entry is not None and entry.abort is not None,
            retry_delay=self._retry_delay,
            retry_on=entry.request.retry_on if entry is not None else (),
        )
        reason = None if outcome.reason is None else bounded(outcome.reason)
        if ending.exhausted and entry is not None:
            reason = exhausted(reason, entry.history, entry.tried + 1)
        if ending.event is Event.ABORT and entry is not None and entry.abort is not None:
            reason = Reason(text=entry.abort, stage=None if reason is None else reason.stage)
        write = End(
            request=ref.request,
            attempt=ref.attempt,
            token=ref.token,
            worker=worker,
            result=outcome.result,
            reason=reason,
            started=outcome.started,
            ended=outcome.ended,
            to=ending.to,
            counted=ending.counted,
            not_before=moment.wall + ending.delay if ending.delay else None,
            artifacts=artifacts,
            at=moment.wall,
        )

        def then(result: Ended) -> None:
            held = None if entry is None else entry.lease
            if entry is not None and held is not None and held.token == ref.token and result.state is not None:
                entry.lease = None
                del self._running[ref.request]
                self._workers[held.worker].leases.discard(ref.request)
                seconds = max(0.0, outcome.ended - outcome.started)
                self._dispatch.freed(held.worker, ref.token, moment.steady, seconds)
                ran = self._metrics.child(self._metrics.run_seconds, entry.request.task.lower(), outcome.result)
                ran.observe(seconds)
                to = result.state  # not always what was judged: an outcome may contradict itself
                self._outbox.tell_move(
                    entry.request.id,
                    entry.request.task,
                    to,
                    ending.event if to is ending.to else Event.ERR,
                    attempt=ref.attempt,
                    wall=moment.wall,
                    worker=held.worker,
                    reason=reason,
                )
                if to is State.PENDING:
                    entry.attempt += 1
                    entry.tried += ending.counted
                    entry.state = State.PENDING
                    self._note_expiry(entry.request)
                    self._dispatch.forget(ref.request)
                    if ending.delay:
                        self._delay(entry, due=moment.steady + ending.delay)
                    else:
                        self._place(entry)
                else:
                    self._forget(entry)
                    if to is State.SUCCESS:
                        self._look_for_blame(entry, held.worker, moment)
            self._settle_dependents(result.freed, result.stranded, moment)
            answer(result)

        self._write(write, then)

    def _look_for_blame(self, entry: Entry, worker: str, moment: Moment) -> None:
        """Pause the workers on which too many requests ended badly that went well elsewhere."""
        for name in self._blame.succeeded(entry.request.id, worker, entry.history):
            if ("worker", name) not in self._pauses:
                reason = self._blame.reason(name)
                logger.warning("a worker is paused", extra={"worker": name, "reason": reason})
                self.pause(Pause(kind="worker", name=name, reason=reason), moment, lambda _: None)
                self._outbox.tell_worker(name, "paused", reason, wall=moment.wall)
            self._blame.forget(name)

    # ------------------------------------------------------------ commands

    def abort(
        self,
        request: str,
        reason: str,
        moment: Moment,
        then: Callable[[AbortResult], None],
        *,
        user: str | None = None,
        known: bool = True,
    ) -> None:
        """Stop a request wherever it is; one that nobody knows yet, when it comes, if its submitter heeds the user."""
        write = AbortAsked(request=request, reason=reason, at=moment.wall, mark=True, user=user, known=known)
        self._abort(write, moment, then)

    def _note_expiry(self, request: Request) -> None:
        if request.expires_at is not None:
            self._expires = min(self._expires, request.expires_at)

    def _take_expired(self, expired: Expired) -> None:
        """Take what has expired, and when to ask again."""
        for request, expires_at in expired.requests:
            self._expire(request, expires_at, Moment(steady=self._steady, wall=self._wall))
        if len(expired.requests) == EXPIRED_AT_ONCE:
            self._expires = -inf  # there may be more
        elif expired.next is not None:
            self._expires = min(self._expires, expired.next)

    def _expire(self, request: str, expires_at: float, moment: Moment) -> None:
        """Abort a request that was not granted in time."""
        reason = expiry_text(expires_at)
        write = AbortAsked(request=request, reason=reason, at=moment.wall, stage="expiry", running=False)
        self._abort(write, moment, lambda _: None)

    def _abort(self, write: AbortAsked, moment: Moment, then: Callable[[AbortResult], None]) -> None:
        request, reason = write.request, Reason(text=write.reason, stage=write.stage)

        def settled(result: AbortResult) -> None:
            stood = result.before_lane
            entry = self._entries.get(request) if stood is None else self._entry_with(request, stood.seq)
            if result.after is State.ABORTED and result.before is not State.ABORTED:
                task, attempt = result.task or "", result.attempt or 1
                self._outbox.tell_move(
                    request, task, State.ABORTED, Event.ABORT, attempt=attempt, wall=moment.wall, reason=reason
                )
                if entry is not None:
                    self._forget(entry)
                elif stood is not None and stood.waiting:
                    self._dispatch.absent(Lane(stood.requirement, stood.priority, stood.group, stood.key), stood.seq)
                else:
                    self._held.blocked -= 1
            elif (
                entry is not None
                and result.after is State.RUNNING
                and entry.lease is not None
                and write.running
                and write.known
            ):
                entry.abort = entry.abort or write.reason  # as in the ledger, the first is it
                worker, token = self._workers[entry.lease.worker], entry.lease.token
                self._say(worker, Abort(request=request, attempt=entry.attempt, token=token, reason=entry.abort))
            self._settle_dependents(result.freed, result.stranded, moment)
            then(result)

        self._write(write, settled)

    def reprioritise(self, request: str, priority: int, then: Callable[[Moved], None]) -> None:
        """Give a request that has not ended another priority."""

        def settled(moved: Moved) -> None:
            live = moved.live
            entry = None if live is None else self._entry_with(request, live.seq)
            if entry is not None:
                waits = self._dispatch.waits(request)
                if waits:
                    self._dispatch.forget(request)
                entry.request = msgspec.structs.replace(entry.request, priority=priority)
                if waits:
                    self._place(entry)
            elif live is not None and live.state is State.PENDING and not live.unmet and live.not_before is None:
                self._dispatch.absent(_lane_of(live)._replace(priority=moved.before or 0), live.seq)
                self._place(self._entry_of(live))
            then(moved)

        self._write(Move(request=request, priority=priority), settled)

    def pause(self, pause: Pause, moment: Moment, then: Callable[[Any], None]) -> None:
        """Give a worker, a task or a group no slot any more; what runs goes on."""
        name = pause.name.lower() if pause.kind == "task" else pause.name
        view = PauseView(kind=pause.kind, name=name, reason=pause.reason, since=moment.wall)

        def settled(result: Any) -> None:
            self._pauses[view.kind, view.name] = view
            self._apply_pause(view.kind, view.name)
            then(result)

        self._write(KeepPause(kind=view.kind, name=view.name, reason=view.reason, at=moment.wall), settled)

    def resume(self, kind: PauseKind, name: str, then: Callable[[Any], None]) -> None:
        """End a pause."""
        name = name.lower() if kind == "task" else name

        def settled(result: Any) -> None:
            if kind == "worker":
                self._blame.forget(name)
                self._held.drains.pop(name, None)
            if self._pauses.pop((kind, name), None) is not None:
                self._apply_pause(kind, name)
            then(result)

        self._write(Resume(kind=kind, name=name), settled)

    def drain(self, query: DrainWorkers, moment: Moment, then: Callable[[list[str]], None]) -> None:
        """Pause workers, and tell them to take nothing more, or to end; `then` gets their names.

        A name that nobody knows is paused too: it may come.
        """
        names = dict.fromkeys(query.names)
        for one in query.classes:
            names.update(dict.fromkeys(sorted(self._matching.members(one))))
        if query.everybody:
            names.update(dict.fromkeys(sorted(self._workers)))
        left = set(names)
        if not names:
            self._writes.append((None, lambda _: then([])))

        def settled(name: str) -> None:
            self._held.drains[name] = Drain(reason=query.reason, stop=query.stop)
            worker = self._workers.get(name)
            if worker is not None and worker.state == "online":
                self._say(worker, self._held.drains[name])
            left.discard(name)
            if not left:
                then([*names])

        for name in names:
            reason = f"drained{', to end' if query.stop else ''}{': ' if query.reason else ''}{query.reason}"
            self.pause(Pause(kind="worker", name=name, reason=reason), moment, lambda _, name=name: settled(name))  # type: ignore[misc]  # mypy does not see the default

    def unknown_classes(self, names: Sequence[str]) -> list[str]:
        """Return those of the names that are no capability class."""
        return [name for name in names if name not in self._matching.names()]

    def pauses(self) -> list[PauseView]:
        """Show what is paused."""
        return [self._pauses[key] for key in sorted(self._pauses)]

    def _apply_pause(self, kind: str, name: str) -> None:
        paused = (kind, name) in self._pauses
        if kind == "group":
            (self._dispatch.pause_group if paused else self._dispatch.resume_group)(name)
        elif kind == "task":
            change = self._dispatch.pause_requirement if paused else self._dispatch.resume_requirement
            for one in self._requirements:
                if one.kind.task == name:
                    change(one.id)
            for entry in self._entries.values():
                if entry.own is not None and entry.one.kind.task == name:
                    change(entry.own)
        elif name in self._workers:
            worker = self._workers[name]
            if paused:
                self._dispatch.no_supply(name)  # until its next heartbeat says what it has
            self._say(worker, self._assignment(worker))

    def _paused(self, worker: str, entry: Entry) -> str | None:
        """Say what is paused, if something keeps a request from a worker."""
        for kind, name in (("worker", worker), ("task", entry.one.kind.task), ("group", entry.request.group)):
            if (kind, name) in self._pauses:
                return f"the {kind} {name} is paused"
        return None

    def import_artifact(self, key: str, artifact: Artifact, moment: Moment, then: Callable[[int], None]) -> None:
        """Record an artifact that no request made."""
        self._write(Import(key=key, artifact=artifact, at=moment.wall), then)

    def forget_worker(self, name: str, user: str | None, moment: Moment, then: Callable[[bool], None]) -> None:
        """Make a worker's name nobody's, or another user's; what runs there goes on."""
        self._names.give(name, user)
        for key in [key for key in self._impostors if key[0] == name]:
            del self._impostors[key]
        self._write(Own(name=name, user=user, at=moment.wall), then)

    def refresh(self, names: Sequence[str]) -> None:
        """Ask workers for fresh metadata; no names: all that are online."""
        wanted = frozenset(names)
        for worker in self._workers.values():
            if worker.state != "offline" and (not names or worker.name in wanted):
                self._say(worker, Introduce())

    # ------------------------------------------------------------ time

    def tick(self, moment: Moment) -> None:
        """Do what is due: delays that are over, offers nobody took, silent workers, leases that lapse.

        Only a probe that has come back through the report queue, behind whatever was queued in it, lets a lease
        lapse or a worker go offline: a blocked broker, a slow ledger or an own pause costs no run.
        """
        for request in [one for one in self._delayed if (self._entries[one].due or 0.0) <= moment.steady]:
            self._end_delay(self._entries[request])
        self._steady, self._wall = moment.steady, moment.wall
        if self._expires <= moment.wall:
            self._expired_by = moment.wall
        self._note_escapes()
        if moment.steady - self._swept > SWEEP:
            self._swept = moment.steady
            self._sweep()
        self._do_hourly(moment)
        if moment.steady - self._looked > LOOK:
            self._looked = moment.steady
            self._tell_stuck(moment)
        for request in self._dispatch.stale(moment.steady, self._offer_timeout):
            self._return(self._entries[request])
        overdue = [lease for lease in self._leases() if lease.deadline < moment.steady and lease.probe is None]
        silent = [
            worker
            for worker in self._workers.values()
            if worker.state == "online" and worker.seen + SILENCE < moment.steady and worker.probe is None
        ]
        if overdue or silent:
            self._probes += 1
            for lease in overdue:
                lease.probe = self._probes
            for worker in silent:
                worker.probe = self._probes
            self._outbox.probe(self._probes, self._secret, self._forget_probes)

    def _do_hourly(self, moment: Moment) -> None:
        """Declare the queues of classes anew, since who is busy does not keep its own; forget aborts of nothing."""
        if moment.steady - self._hourly > HOURLY:
            self._hourly = moment.steady
            self._to_declare = [*self._matching.names()]
            self._write(Unmark(before=moment.wall - FORGET), lambda _: None)
        now, self._to_declare = self._to_declare[:DECLARED_AT_ONCE], self._to_declare[DECLARED_AT_ONCE:]
        self.declare += [self._queue(name) for name in now if name in self._matching.names()]

    def _tell_stuck(self, moment: Moment) -> None:
        """Tell of requests that no worker has been able to run for a while."""
        for one in self._requirements:
            self._look_for_able(one, one.id, self._uses[one.id], moment)
        for request, use in self._alone.items():
            entry = self._entries[request]
            self._look_for_able(entry.one, entry.requirement, use, moment)

    def _look_for_able(self, one: RequirementClass, requirement: Requirement, use: Use, moment: Moment) -> None:
        number = self._dispatch.waiting_for(requirement)
        if not number or one.divided or self._matching.capable_classes(requirement):
            use.stuck_since, use.told = None, False
        elif use.stuck_since is None:
            use.stuck_since = moment.steady
        elif not use.told and moment.steady - use.stuck_since > self._no_worker_after:
            use.told = True
            self._outbox.tell_stuck(
                one.kind.task,
                one.id,
                since=moment.wall - (moment.steady - use.stuck_since),
                number=number,
                requests=self._dispatch.oldest(requirement, STUCK_SHOWN),
                reason=one.problem or explain.nobody(self._matching.errors(requirement)),
                wall=moment.wall,
            )

    def probe(self, probe: Probe, moment: Moment) -> None:
        """Take back a probe: what has not been heard of since it was sent is gone."""
        if (probe.term, probe.secret) != (self._term, self._secret) or probe.number > self._probes:
            return  # an earlier scheduler's, or nobody's
        for entry in self._running.values():
            lease = entry.lease
            if lease is not None and lease.probe is not None and lease.probe <= probe.number:
                self._lost(entry, f"no heartbeat renewed its lease of {lease.seconds:g} s", moment)
        for worker in self._workers.values():
            if worker.probe is not None and worker.probe <= probe.number:
                self._offline(worker, "it has not reported any more", moment)
                # Whoever used its name with a number that it will not reach must not keep it away for ever.
                worker.any_number = True

    def _forget_probes(self) -> None:
        """Send probes anew: the last one was not published."""
        for lease in self._leases():
            lease.probe = None
        for worker in self._workers.values():
            worker.probe = None

    def disconnected(self) -> None:
        """Forget probes that were under way: the report queue died with its connection."""
        self._forget_probes()

    def unblocked(self, moment: Moment) -> None:
        """Begin to count anew when the broker takes messages again: until now nobody could renew or report anything."""
        self._forget_probes()
        for lease in self._leases():
            lease.deadline = max(lease.deadline, moment.steady + lease.seconds + LEASE_MARGIN)
        for worker in self._workers.values():
            worker.seen = moment.steady

    def _leases(self) -> list[Lease]:
        return [entry.lease for entry in self._running.values() if entry.lease is not None]

    def offer(self, moment: Moment) -> None:
        """Offer requests to the classes that have credit."""
        while self._expiring and self._expiring[0][0] <= moment.wall:  # first, since they would count for their groups
            expires_at, request = heappop(self._expiring)
            if self._dispatch.waits(request):
                self._dispatch.forget(request)
                self._expire(request, expires_at, moment)
        for offer in self._dispatch.offers(moment.steady):
            entry = self._entries[offer.request]
            if has_expired(entry.request, moment.wall):  # it has come back since
                self._expire(offer.request, entry.request.expires_at or 0.0, moment)
                continue
            entry.state = State.OFFERED
            if entry.tried:
                self._histories_wanted.add(offer.request)
            self._write(
                Offer(request=offer.request, attempt=entry.attempt, seq=entry.seq),
                self._offered(entry, entry.attempt, offer.capability_class),
            )

    def _offered(self, entry: Entry, attempt: int, capability_class: str) -> Callable[[bool], None]:
        def then(moved: bool) -> None:  # noqa: FBT001  # the ledger's answer is a bool
            if not moved or self._entries.get(entry.request.id) is not entry:
                return  # the ledger knew it, or an abort was first
            queue = self._queue(capability_class)
            entry.history = self._histories.get(entry.request.id, ())
            alone = last_alone(entry.history, entry.request.max_attempts)

            def returned() -> None:
                if entry.state is State.OFFERED and entry.attempt == attempt:
                    if self._is_class(queue.name):
                        self.declare.append(queue)  # it has expired, or its node is down
                    self._return(entry)

            self._outbox.offer(
                queue.name,
                entry.request,
                attempt=attempt,
                alone=alone,
                returned=returned,
                together=1 if alone else self._dispatch.set_size(capability_class, self._steady),
            )

        return then

    # ------------------------------------------------------------ inside

    def _name_class(self) -> str:
        self._classes_made += 1
        return f"{self._term}-{self._classes_made}"  # the term makes it a name that was never used

    def _write(self, write: Write, then: Callable[[Any], None]) -> None:
        self._writes.append((write, then))

    def _entry_of(self, row: Live, one: RequirementClass | None = None) -> Entry:
        """Take a request of the ledger into memory."""
        one = one or self._requirements.get(row.requirement)
        if one is None:
            one = self._class_of(self._examiner.examine(row.request, bound=not row.unmet))
            self._rekeyed[row.seq] = one.id
        return self._new_entry(
            Entry(
                seq=row.seq,
                request=row.request,
                inputs=row.inputs,
                one=one,
                state=row.state,
                attempt=row.attempt,
                tried=row.tried,
                abort=row.abort,
                submitted=row.submitted,
            )
        )

    def _new_entry(self, entry: Entry) -> Entry:
        self._entry_with(entry.request.id, entry.seq)
        self._entries[entry.request.id] = entry
        if entry.request.expires_at is not None:
            heappush(self._expiring, (entry.request.expires_at, entry.request.id))
        self._uses[entry.one.id].entries += 1
        return entry

    def _entry_with(self, request: str, seq: int) -> Entry | None:
        """Return what is in memory of a request that the ledger has; a doubled submission of it makes way."""
        entry = self._entries.get(request)
        if entry is None or entry.seq == seq:
            return entry
        self._forget(entry)
        return None

    def _drop_entry(self, entry: Entry) -> None:
        """Let go of a request; the ledger has it."""
        request = entry.request.id
        del self._entries[request]
        self._delayed.discard(request)
        self._uses[entry.one.id].entries -= 1
        self._uses[entry.one.id].idle_since = self._steady
        self._refused.pop(request, None)
        self._alone.pop(request, None)
        if entry.own is not None:
            self._matching.drop(entry.own)
            self._dispatch.drop(entry.own)

    def _forget(self, entry: Entry) -> None:
        """Let go of a request that has ended, or never was."""
        self._dispatch.forget(entry.request.id)
        self._drop_entry(entry)

    def _delay(self, entry: Entry, *, due: float) -> None:
        entry.due = due
        self._delayed.add(entry.request.id)

    def _end_delay(self, entry: Entry) -> None:
        self._delayed.discard(entry.request.id)
        entry.due = None
        self._write(Wake(request=entry.request.id), lambda _: None)
        self._place(entry)  # so that it can be offered in the transaction that ends its delay

    def _place(self, entry: Entry) -> bool:
        """Let a request wait for a slot: in memory, or behind those of its lane that are. Say whether in memory."""
        kept = self._dispatch.wait(entry.request.id, entry.lane, entry.seq)
        if not kept:
            self._drop_entry(entry)
        return kept

    def _return(self, entry: Entry) -> None:
        self._write(Return(request=entry.request.id, attempt=entry.attempt), self._returned(entry.request.id))

    def _returned(self, request: str) -> Callable[[bool], None]:
        def then(moved: bool) -> None:  # noqa: FBT001  # the ledger's answer is a bool
            entry = self._entries.get(request)
            if moved and entry is not None:
                entry.state = State.PENDING
                self._dispatch.forget(request)
                self._place(entry)

        return then

    def _lease_of(self, entry: Entry) -> float:
        task = entry.one.kind.task
        known = Task.class_from_name(task) if Task.is_valid_task_name(task) else Task
        return lease_seconds(entry.request.lease, known.LEASE)

    def _change(self, change: Change) -> None:
        for name in change.made:
            self._dispatch.add_class(name)
            self.declare.append(self._queue(name))
        for gain in change.gained:
            self._dispatch.gain(gain.capability_class, gain.requirement)
        for worker in change.assigned:
            self._say(self._workers[worker], self._assignment(self._workers[worker]))
        for name in change.gone:
            self.delete.append(self._queue(name).name)
            self._held.renamed.pop(name, None)
            for request in self._dispatch.remove_class(name):
                self._return(self._entries[request])

    def _assignment(self, worker: KnownWorker) -> Assign:
        own = self._matching.class_of(worker.name)
        if own is None or ("worker", worker.name) in self._pauses:
            return Assign(queue=None)
        return Assign(queue=self._queue(own).name)

    def _offline(self, worker: KnownWorker, reason: str, moment: Moment, *, state: str = "offline") -> None:
        if worker.state == state:
            return
        worker.state, worker.reason, worker.probe = state, reason, None
        self._change(self._matching.leave(worker.name))
        self._dispatch.no_supply(worker.name)
        self._outbox.tell_worker(worker.name, state, reason, wall=moment.wall)

    def _say(self, worker: KnownWorker, part: VerdictPart) -> None:
        self._outbox.say(worker.name, worker.epoch, part)

    def _void(self, worker: KnownWorker, ref: RunRef, reason: str) -> None:
        self._say(worker, Void(request=ref.request, attempt=ref.attempt, token=ref.token, reason=reason))


def _lane_of(row: Live) -> Lane:
    return Lane(row.requirement, row.request.priority, row.request.group, row.request.concurrency_key)
