"""What the pool is now, and what each message or moment does to it: the scheduler's judgement.

It is told what came and what time it is; it answers with writes for the ledger, and, once it is told that these have
been committed, with messages to send. It opens nothing, waits for nothing and starts nothing, so that a whole pool
can be run on a virtual clock. What it holds is a part of what the ledger holds, and only a committed write changes it:
of what waits, the first few of each lane; the rest is read when their turn comes.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import nsmallest
from itertools import islice
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgspec

from mqworker import explain
from mqworker.dispatch import Dispatch, Lane, Want
from mqworker.examiner import Draft, Examiner, wrong_input
from mqworker.facts import (
    AbortAsked,
    AbortResult,
    Accept,
    Accepted,
    End,
    Ended,
    Grant,
    Import,
    LaneCount,
    Live,
    Move,
    Moved,
    Need,
    Offer,
    Rekey,
    RequirementRow,
    Resume,
    Return,
    Stranded,
    Wake,
    Write,
)
from mqworker.facts import Pause as KeepPause
from mqworker.lifecycle import Event, State, end_attempt, lease_seconds
from mqworker.matching import Change, Funnel, Matching, Question, Requirement, WorkerFacts
from mqworker.messages import (
    MAX_INPUTS_BYTES,
    MAX_METADATA_BYTES,
    Abort,
    Alive,
    Artifact,
    Assign,
    Bye,
    Capability,
    CapabilityList,
    Claim,
    Explanation,
    GetCapabilities,
    Granted,
    Heartbeat,
    Hello,
    Introduce,
    ListWorkers,
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
    RequestEvent,
    RequestView,
    RunProgress,
    RunRef,
    StuckEvent,
    Ticket,
    Verdict,
    VerdictPart,
    Void,
    WorkerEvent,
    WorkerView,
    bounded,
)
from mqworker.messages import Pool as PoolView
from mqworker.metrics import SchedulerMetrics
from mqworker.needs import in_order, needs
from mqworker.requirements import Kind, RequirementClass, Requirements, reads_from, reads_text
from mqworker.task import Task
from mqworker.topology import Queue, Topology
from mqworker.tracking import Read

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
LEASE_MARGIN: Final = 1.0  # seconds: two clocks may run at rates that differ by 1/60 over the shortest lease


class Moment(NamedTuple):
    """Say what time it is: on a clock that never jumps, and in seconds since the epoch."""

    steady: float
    wall: float


@dataclass(frozen=True, kw_only=True)
class Send:
    """Ask for a message to be published; `returned` is called if it was not."""

    exchange: str
    key: str
    message: msgspec.Struct
    mandatory: bool = True
    persistent: bool = True
    returned: Callable[[], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Asks:
    """Ask to have read from the ledger, right behind the writes."""

    artifacts: frozenset[int]  # that grants will name
    heads: Sequence[Want]
    members: Sequence[int]  # requirement classes whose requests are to be placed anew
    unused: frozenset[int]  # requirement classes that may have no live request any more

    def __bool__(self) -> bool:
        return bool(self.artifacts or self.heads or self.members or self.unused)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Hold what was read."""

    artifacts: Mapping[int, RecordedArtifact] = field(default_factory=dict)
    heads: Sequence[Sequence[Live]] = ()  # for each want
    members: Sequence[Sequence[Live]] = ()  # for each of the requirement classes, the best first
    used: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Hold what a new scheduler begins with."""

    newest: int  # the highest age ever given
    newest_requirement: int  # the highest number of a requirement class ever given
    requirements: Sequence[RequirementRow]
    lanes: Sequence[LaneCount]
    held: Sequence[Live]  # offered, running, or waiting out a delay
    blocked: int  # requests that wait for others
    pauses: Sequence[PauseView]


class _Named(NamedTuple):
    """Name a request that is not in memory."""

    id: str
    task: str


@dataclass(kw_only=True)
class _Lease:
    worker: str
    run: RunProgress  # by the worker's newest word
    seconds: float
    deadline: float  # steady
    probe: int | None = None

    @property
    def token(self) -> str:
        return self.run.token


@dataclass(kw_only=True, slots=True)
class _Entry:
    """One live request that is in memory."""

    seq: int
    request: Request
    inputs: tuple[int, ...]
    one: RequirementClass
    own: Requirement | None = None  # a requirement of its own, once a worker has refused it
    state: State = State.PENDING
    attempt: int = 1
    tried: int = 0
    abort: str | None = None
    submitted: float = 0.0  # wall
    lease: _Lease | None = None
    due: float | None = None  # steady; it waits out a delay until then

    @property
    def requirement(self) -> Requirement:
        return self.one.id if self.own is None else self.own

    @property
    def lane(self) -> Lane:
        request = self.request
        return Lane(self.requirement, request.priority, request.group, request.concurrency_key)


@dataclass(kw_only=True)
class _Use:
    """Say how a requirement class is used."""

    entries: int = 0  # in memory
    idle_since: float = 0.0  # steady
    stuck_since: float | None = None  # steady; since when no worker can run it
    told: bool = False  # that it is stuck


@dataclass(kw_only=True)
class _Worker:
    name: str
    epoch: str = ""
    incarnation: int = -1
    seq: int = -1
    any_number: bool = False  # its next report counts, whatever number it has
    hello: Hello | None = None
    state: str = "offline"
    reason: str | None = None
    seen: float = 0.0  # steady
    seen_wall: float = 0.0
    probe: int | None = None
    heartbeat: Heartbeat | None = None
    former: str | None = None  # the queue that it consumed before it was told of another
    leases: set[str] = field(default_factory=set)  # request ids
    metadata_bytes: int = 0


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
    ) -> None:
        self._term = term
        self._topology = topology
        self._store_id = store_id
        self._retry_delay = retry_delay
        self._offer_timeout = offer_timeout
        self._metrics = metrics
        self._classes_made = 0
        self._probes = 0
        self._last_seq = 0
        self._no_worker_after = no_worker_after
        self._examiner = Examiner()
        self._requirements = Requirements()
        self._uses: dict[int, _Use] = {}
        self._divided: dict[int, RequirementClass] = {}
        self._matching = Matching(name_class=self._name_class)
        self._dispatch = Dispatch(weights=group_weights, limits=concurrency_limits)
        self._entries: dict[str, _Entry] = {}
        self._blocked = 0
        self._delayed: set[str] = set()
        self._running: dict[str, _Entry] = {}
        self._workers: dict[str, _Worker] = {}
        self._metadata_bytes = 0  # of them all
        self._pauses: dict[tuple[str, str], PauseView] = {}
        self._swept = 0.0
        self._unused: set[int] = set()
        self._rekeyed: dict[int, int] = {}  # age of a request to its new requirement class
        self._refused: dict[str, frozenset[tuple[str, int]]] = {}  # request to the workers that declined it
        self._refusals = 0
        self._alone: dict[str, _Use] = {}  # by the requests that were refused: how their own requirements are used
        self._steady = self._wall = 0.0  # when it last looked at what is due
        self._looked = 0.0  # when it last looked for requests that nobody can run
        self._asks = Asks(artifacts=frozenset(), heads=(), members=(), unused=frozenset())
        self._writes: list[tuple[Write | None, Callable[[Any], None]]] = []  # None: only an answer behind the commit
        self._committing: list[tuple[Write | None, Callable[[Any], None]]] = []
        self._sends: list[Send] = []
        self._verdicts: dict[tuple[str, str], list[VerdictPart]] = {}
        self._grants_wanted: set[int] = set()
        self._inputs: Mapping[int, RecordedArtifact] = {}
        self.declare: list[Queue] = []  # before the next sends
        self.delete: list[str] = []  # queues of classes that are gone

    # ------------------------------------------------------------ what the scheduler takes and gives back

    def take_writes(self) -> tuple[list[Write], Asks]:
        """Hand over the writes judged since the last call, and what is to be read right behind them."""
        if self._rekeyed:
            self._write(Rekey(to=self._rekeyed), lambda _: None)
            self._rekeyed = {}
        self._committing, self._writes = self._writes, []
        self._asks = Asks(
            artifacts=frozenset(self._grants_wanted),
            heads=self._dispatch.wants(self._last_seq),
            members=tuple(islice(self._divided, DIVIDED_AT_ONCE)),
            unused=frozenset(self._unused),
        )
        self._grants_wanted = set()
        self._unused = set()
        return [write for write, _ in self._committing if write is not None], self._asks

    def committed(self, results: Sequence[Any], answers: Answers) -> None:
        """Take over what the ledger has committed of the writes last handed over, and what was read behind them."""
        asks = self._asks
        self._inputs = answers.artifacts
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

    def _heads(self, want: Want, rows: Sequence[Live]) -> None:
        """Take the next requests of a lane into memory."""
        by_id = {row.request.id: row for row in rows}
        for request in self._dispatch.heads(want, [(row.request.id, row.seq) for row in rows]):
            self._entry_of(by_id[request])

    def take_sends(self) -> list[Send]:
        """Hand over the messages to publish, but for tickets to classes that have gone since: they went back."""
        sends = [send for send in self._sends if not isinstance(send.message, Ticket) or self._is_class(send.key)]
        self._sends = []
        verdicts, self._verdicts = self._verdicts, {}
        for (worker, epoch), parts in verdicts.items():
            sends.append(
                Send(
                    exchange=self._topology.verdict,
                    key=self._topology.verdict_key(worker, epoch),
                    message=Verdict(term=self._term, parts=parts),
                    persistent=False,
                )
            )
        return sends

    def class_queues(self) -> tuple[Queue, ...]:
        """List the queues of the classes that live."""
        return tuple(self._topology.class_queue(name) for name in self._matching.names())

    def restore(self, kept: Kept, moment: Moment) -> None:
        """Begin with what the ledger holds: offers go back, and each lease gets a full term."""
        self._steady, self._wall = moment
        self._last_seq = kept.newest
        self._requirements.count_from(kept.newest_requirement)
        self._blocked = kept.blocked
        for pause in kept.pauses:
            self._pauses[pause.kind, pause.name] = pause
            if pause.kind == "group":
                self._dispatch.pause_group(pause.name)
        for row in kept.requirements:
            self._recall(row)
        for lane in kept.lanes:
            self._dispatch.restore(Lane(lane.requirement, lane.priority, lane.group, lane.key), lane.number)
        for held in kept.held:
            entry = self._entry_of(held)
            if held.state is State.RUNNING:
                seconds = self._lease_of(entry)
                worker = self._workers.setdefault(held.worker or "", _Worker(name=held.worker or ""))
                worker.seen, worker.seen_wall = moment.steady, moment.wall
                worker.leases.add(held.request.id)
                self._running[held.request.id] = entry
                self._dispatch.hold(held.request.id, entry.lane)
                entry.lease = _Lease(
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
                self._delay(entry, due=moment.steady + (held.not_before or 0.0) - moment.wall)

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
        self._uses[one.id] = _Use(idle_since=self._steady)
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

    def _reclass(self, seq: int, request: Request, entry: _Entry | None, *, bound: bool) -> RequirementClass:
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
    ) -> None:
        """Accept or reject requests; the answer is given once the ledger has them."""
        results: list[Receipted | None] = [None] * len(drafts)

        def settle(index: int, one: Receipted) -> None:
            results[index] = one
            self._metrics.received.labels(status=one.status).inc()
            done = [result for result in results if result is not None]
            if len(done) == len(results):
                answer(Receipt(term=self._term, results=done))

        order, circular = in_order([draft.request for draft in drafts])
        for index in order:
            draft = drafts[index]
            request = draft.request
            problem = draft.problem or circular.get(index) or wrong_input(draft, artifacts)
            self._last_seq += 1
            seq = self._last_seq
            if problem is not None:
                write = Accept(
                    seq=seq, request=request, at=moment.wall, rejected=Reason(text=problem, stage="submission")
                )
                self._write(
                    write, partial(self._accepted, request=request, moment=moment, settle=partial(settle, index))
                )
                continue
            one = self._class_of(draft)
            entry = _Entry(seq=seq, request=request, inputs=draft.inputs, one=one, submitted=moment.wall)
            fresh = later = behind = None
            if needs(request):
                later = entry
            elif request.id not in self._entries:
                # Placed at once, so that it can be offered in the transaction that accepts it.
                if self._place(self._new_entry(entry)):
                    fresh = entry
                else:
                    behind = entry
            self._write(
                Accept(seq=seq, request=request, at=moment.wall, requirement=one.id, inputs=draft.inputs),
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
        fresh: _Entry | None = None,
        behind: _Entry | None = None,
        later: _Entry | None = None,
    ) -> None:
        if result.status != "accepted":  # the ledger knew it
            if fresh is not None and self._entries.get(request.id) is fresh:
                self._forget(fresh)
            if behind is not None:
                self._dispatch.absent(behind.lane, behind.seq)
        if result.status == "accepted":
            self._tell(request, State.PENDING, Event.ACCEPT, attempt=1, wall=moment.wall)
        elif result.status == "rejected":
            reason = Reason(text=result.reason or "")
            self._tell(request, State.REJECTED, Event.REJECT, attempt=1, wall=moment.wall, reason=reason)
        if result.stranded is not None:
            self._tell(request, State.ABORTED, Event.ABORT, attempt=1, wall=moment.wall, reason=result.stranded)
        elif result.unmet:
            self._blocked += 1
        elif result.status == "accepted" and later is not None:
            if result.live is None:
                self._place(self._new_entry(later))
            else:
                self._free(result.live)
        settle(Receipted(id=request.id, status=result.status, reason=result.reason))

    def _free(self, row: Live) -> None:
        """Let a request wait for a slot that needs no other request any more."""
        entry = self._entry_of(row)
        if row.request.take:  # only now it is known what its task sees
            self._reclass(row.seq, row.request, entry, bound=True)
            self._dispatch.absent(_lane_of(row), row.seq)  # the ledger has it there until the next commit
        self._place(entry)

    def _settle_dependents(self, freed: Sequence[Live], stranded: Sequence[Stranded], moment: Moment) -> None:
        """Take over what the end of one request meant for those that needed it."""
        self._blocked -= len(freed) + len(stranded)
        for row in freed:
            self._free(row)
        for gone in stranded:
            self._tell(gone, State.ABORTED, Event.ABORT, attempt=1, wall=moment.wall, reason=gone.reason)

    # ------------------------------------------------------------ reports

    def report(self, report: Report, moment: Moment) -> None:
        """Take a worker's word; one that is older than the newest known is dropped."""
        worker = self._workers.setdefault(report.worker, _Worker(name=report.worker))
        if not worker.any_number and (report.incarnation, report.seq) <= (worker.incarnation, worker.seq):
            return
        worker.any_number = False
        if report.incarnation != worker.incarnation:
            worker.hello = worker.heartbeat = None
        worker.incarnation, worker.seq, worker.epoch = report.incarnation, report.seq, report.epoch
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

    def _hello(self, worker: _Worker, hello: Hello, moment: Moment) -> None:
        known = worker.hello is not None and worker.state == "online"
        size = len(msgspec.json.encode(hello.metadata))
        others = self._metadata_bytes - worker.metadata_bytes
        if size > MAX_METADATA_BYTES or others + size > MAX_POOL_METADATA_BYTES:
            reason = (
                f"expected metadata of at most {MAX_METADATA_BYTES} bytes, and of all workers together of at most"
                f" {MAX_POOL_METADATA_BYTES}, got {size} beside {others}: have the worker say less"
            )
            if worker.state != "refused":
                self._offline(worker, reason, moment, state="refused")
            worker.hello = msgspec.structs.replace(hello, metadata={}, tasks={})  # it is known, and holds no room
            self._metadata_bytes, worker.metadata_bytes = others, 0
            self._say(worker, Assign(queue=None, reason=reason))
            return
        self._metadata_bytes, worker.metadata_bytes = others + size, size
        worker.hello = hello
        if hello.store != self._store_id:
            reason = (
                f"expected the store {self._store_id} that this scheduler uses, got the store {hello.store}:"
                " give the worker the scheduler's store URL"
            )
            if worker.state != "refused":
                self._offline(worker, reason, moment, state="refused")
            self._say(worker, Assign(queue=None, reason=reason))
            return
        if not known:
            worker.state, worker.reason = "online", None
        self._tell_worker(worker, "changed" if known else "online", moment)
        self._enter(worker, hello)

    def _enter(self, worker: _Worker, hello: Hello) -> None:
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
            self.declare.append(self._topology.class_queue(own))  # it may have gone: who consumed it comes back anew
        self._say(worker, self._assignment(worker))

    def _heartbeat(self, worker: _Worker, beat: Heartbeat, moment: Moment) -> None:
        if worker.state == "refused":
            self._say(worker, Assign(queue=None, reason=worker.reason))
            return
        if worker.state == "offline":  # it was silent, and is back
            worker.state, worker.reason = "online", None
            self._tell_worker(worker, "online", moment)
            if worker.hello is not None:
                self._enter(worker, worker.hello)
        worker.heartbeat = beat
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
            elif lease.token not in settled_soon:  # and its claim came in an earlier report than this
                self._lost(entry, "the worker was restarted and does not have this run any more", moment)
        mine = {lease.token for lease in map(self._lease_held, worker.leases) if lease is not None}
        void = [
            RunRef(request=ref.request, attempt=ref.attempt, token=ref.token)
            for ref in beat.running
            if ref.token not in mine
        ]
        self._say(worker, Alive(seq=worker.seq, void=void))
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

    def _retire(self, queue: str) -> None:
        """Have a queue deleted that may be one of an earlier term's classes: nobody else would, for a day."""
        if queue.startswith(f"{self._topology.work}.") and not self._is_class(queue):  # a worker may name any queue
            self.delete.append(queue)

    def _is_class(self, queue: str) -> bool:
        """Say whether a queue is that of a class that lives."""
        return queue.removeprefix(f"{self._topology.work}.") in self._matching.names()

    def _lease_held(self, request: str) -> _Lease | None:
        return self._entries[request].lease

    def _claim(self, worker: _Worker, claim: Claim, moment: Moment) -> None:
        hello = worker.hello
        if hello is None or hello.metadata_version != claim.metadata_version or worker.state == "offline":
            self._say(worker, Introduce())  # unanswered, the claim comes again behind the Hello
            return
        entry = self._entries.get(claim.request)
        if entry is None:
            self._void(worker, claim, "the request has ended")
        elif entry.lease is not None and entry.lease.token == claim.token and entry.attempt == claim.attempt:
            self._grants_wanted.update(entry.inputs)
            self._writes.append((None, lambda _: self._granted(worker, claim, entry)))  # the same answer again
        elif entry.state is not State.OFFERED:
            self._void(worker, claim, f"the request is {entry.state}, not offered")
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

    def _claim_settled(self, result: str, *, worker: _Worker, claim: Claim, entry: _Entry, moment: Moment) -> None:
        if result == "void":
            self._void(worker, claim, "another worker was first")
            return
        if entry.lease is not None and entry.lease.token == claim.token:  # the claim came twice in one set
            self._granted(worker, claim, entry)
            return
        seconds = self._lease_of(entry)
        entry.state = State.RUNNING
        entry.lease = _Lease(
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
        self._metrics.wait_seconds.labels(task=entry.request.task.lower()).observe(
            max(0.0, moment.wall - entry.submitted)
        )
        self._tell(
            entry.request, State.RUNNING, Event.GRANT, attempt=entry.attempt, wall=moment.wall, worker=worker.name
        )
        self._granted(worker, claim, entry)

    def _granted(self, worker: _Worker, claim: Claim, entry: _Entry) -> None:
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

    def _too_much_input(self, worker: _Worker, claim: Claim) -> None:
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

    def _refusal(self, worker: _Worker, refusal: Refusal) -> None:
        if worker.hello is None or worker.hello.metadata_version != refusal.metadata_version:
            self._say(worker, Introduce())  # unanswered, the refusal comes again behind the Hello
            return
        entry = self._entries.get(refusal.request)
        if entry is not None and entry.attempt == refusal.attempt and entry.state is State.OFFERED:
            if self._matching.can_run(worker.name, entry.requirement):
                self._remember_refusal(entry, worker.name, refusal.metadata_version)
            self._return(entry)
        self._void(worker, refusal, "refused")

    def _remember_refusal(self, entry: _Entry, worker: str, metadata_version: int) -> None:
        """Give the request a requirement of its own, which this worker does not meet with this metadata."""
        if entry.own is None:
            self._change(self._matching.escape(entry.one.id))  # the same metadata, another answer
        draft = self._examiner.examine(entry.request, bound=True)
        earlier = (one for one in self._refused.get(entry.request.id, ()) if one[0] != worker)  # it has other ones now
        denied = frozenset({*earlier, (worker, metadata_version)})
        self._refused[entry.request.id] = denied
        self._alone.setdefault(entry.request.id, _Use())
        if entry.own is not None:
            self._matching.drop(entry.own)
            self._dispatch.drop(entry.own)
        self._refusals += 1
        entry.own = (entry.one.id, entry.request.id, self._refusals)
        if ("task", entry.one.kind.task) in self._pauses:
            self._dispatch.pause_requirement(entry.own)
        question = replace(self._passing_question(draft), denied=denied)  # it is shared with none: no read divides it
        self._change(self._matching.need(entry.own, question))
        self._note_escapes()

    # ------------------------------------------------------------ outcomes

    def outcomes(self, message: Outcomes, moment: Moment) -> None:
        """Take a worker's outcomes; each is answered, whatever becomes of it."""
        for outcome in message.outcomes:
            self._outcome(message.worker, message.epoch, outcome, moment)

    def _outcome(self, worker: str, epoch: str, outcome: Outcome, moment: Moment) -> None:
        def answer(ended: Ended) -> None:
            self._metrics.outcomes.labels(status=ended.status).inc()
            recorded = Recorded(
                request=outcome.request,
                attempt=outcome.attempt,
                token=outcome.token,
                status=ended.status,
                reason=ended.reason,
            )
            self._verdicts.setdefault((worker, epoch), []).append(recorded)

        self._end(
            RunRef(request=outcome.request, attempt=outcome.attempt, token=outcome.token),
            worker=worker,
            outcome=outcome,
            artifacts=outcome.artifacts,
            moment=moment,
            answer=answer,
        )

    def _lost(self, entry: _Entry, why: str, moment: Moment) -> None:
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
        )
        reason = None if outcome.reason is None else bounded(outcome.reason)
        if ending.exhausted and entry is not None:
            reason = _exhausted(reason, entry.tried + 1)
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
                self._dispatch.freed(held.worker, ref.token, moment.steady)
                self._metrics.run_seconds.labels(task=entry.request.task.lower(), result=outcome.result).observe(
                    max(0.0, outcome.ended - outcome.started)
                )
                to = result.state  # not always what was judged: an outcome may contradict itself
                self._tell(
                    entry.request,
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
                    self._dispatch.forget(ref.request)
                    if ending.delay:
                        self._delay(entry, due=moment.steady + ending.delay)
                    else:
                        self._place(entry)
                else:
                    self._forget(entry)
            self._settle_dependents(result.freed, result.stranded, moment)
            answer(result)

        self._write(write, then)

    # ------------------------------------------------------------ commands

    def abort(self, request: str, reason: str, moment: Moment, then: Callable[[AbortResult], None]) -> None:
        """Stop a request wherever it is."""

        def settled(result: AbortResult) -> None:
            stood = result.before_lane
            entry = self._entries.get(request) if stood is None else self._entry_with(request, stood.seq)
            if result.after is State.ABORTED and result.before is not State.ABORTED:
                one = _Named(id=request, task=result.task or "")
                attempt = result.attempt or 1
                self._tell(
                    one, State.ABORTED, Event.ABORT, attempt=attempt, wall=moment.wall, reason=Reason(text=reason)
                )
                if entry is not None:
                    self._forget(entry)
                elif stood is not None and stood.waiting:
                    self._dispatch.absent(Lane(stood.requirement, stood.priority, stood.group, stood.key), stood.seq)
                else:
                    self._blocked -= 1
            elif entry is not None and result.after is State.RUNNING and entry.lease is not None:
                entry.abort = reason
                worker = self._workers[entry.lease.worker]
                self._say(worker, Abort(request=request, attempt=entry.attempt, token=entry.lease.token, reason=reason))
            self._settle_dependents(result.freed, result.stranded, moment)
            then(result)

        self._write(AbortAsked(request=request, reason=reason, at=moment.wall), settled)

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
            if self._pauses.pop((kind, name), None) is not None:
                self._apply_pause(kind, name)
            then(result)

        self._write(Resume(kind=kind, name=name), settled)

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

    def _paused(self, worker: str, entry: _Entry) -> str | None:
        """Say what is paused, if something keeps a request from a worker."""
        for kind, name in (("worker", worker), ("task", entry.one.kind.task), ("group", entry.request.group)):
            if (kind, name) in self._pauses:
                return f"the {kind} {name} is paused"
        return None

    def import_artifact(self, key: str, artifact: Artifact, moment: Moment, then: Callable[[int], None]) -> None:
        """Record an artifact that no request made."""
        self._write(Import(key=key, artifact=artifact, at=moment.wall), then)

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
            self._delayed.discard(request)
            self._entries[request].due = None
            self._write(Wake(request=request), lambda _: None)
            self._place(self._entries[request])  # so that it can be offered in the transaction that ends its delay
        self._steady, self._wall = moment
        self._note_escapes()
        if moment.steady - self._swept > SWEEP:
            self._swept = moment.steady
            self._sweep()
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
            self._sends.append(
                Send(
                    exchange=self._topology.report,
                    key=self._topology.report,
                    message=Probe(term=self._term, number=self._probes),
                    persistent=False,
                    returned=self._forget_probes,
                )
            )

    def _tell_stuck(self, moment: Moment) -> None:
        """Tell of requests that no worker has been able to run for a while."""
        for one in self._requirements:
            self._look_for_able(one, one.id, self._uses[one.id], moment)
        for request, use in self._alone.items():
            entry = self._entries[request]
            self._look_for_able(entry.one, entry.requirement, use, moment)

    def _look_for_able(self, one: RequirementClass, requirement: Requirement, use: _Use, moment: Moment) -> None:
        number = self._dispatch.waiting_for(requirement)
        if not number or one.divided or self._matching.capable_classes(requirement):
            use.stuck_since, use.told = None, False
        elif use.stuck_since is None:
            use.stuck_since = moment.steady
        elif not use.told and moment.steady - use.stuck_since > self._no_worker_after:
            use.told = True
            self._sends.append(
                Send(
                    exchange=self._topology.events,
                    key=self._topology.request_event_key(one.kind.task, "stuck"),
                    message=StuckEvent(
                        term=self._term,
                        time=moment.wall,
                        task=one.kind.task,
                        requirement=one.id,
                        since=moment.wall - (moment.steady - use.stuck_since),
                        number=number,
                        requests=self._dispatch.oldest(requirement, STUCK_SHOWN),
                        reason=one.problem or explain.nobody(self._matching.errors(requirement)),
                    ),
                    mandatory=False,
                    persistent=False,
                )
            )

    def probe(self, probe: Probe, moment: Moment) -> None:
        """Take back a probe: what has not been heard of since it was sent is gone."""
        if probe.term != self._term or probe.number > self._probes:
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

    def _leases(self) -> list[_Lease]:
        return [entry.lease for entry in self._running.values() if entry.lease is not None]

    def offer(self, moment: Moment) -> None:
        """Offer requests to the classes that have credit."""
        for offer in self._dispatch.offers(moment.steady):
            entry = self._entries[offer.request]
            entry.state = State.OFFERED
            self._write(
                Offer(request=offer.request, attempt=entry.attempt, seq=entry.seq),
                self._offered(entry, entry.attempt, offer.capability_class),
            )

    def _offered(self, entry: _Entry, attempt: int, capability_class: str) -> Callable[[bool], None]:
        def then(moved: bool) -> None:  # noqa: FBT001  # the ledger's answer is a bool
            if not moved or self._entries.get(entry.request.id) is not entry:
                return  # the ledger knew it, or an abort was first
            queue = self._topology.class_queue(capability_class)

            def returned() -> None:
                if entry.state is State.OFFERED and entry.attempt == attempt:
                    self.declare.append(queue)  # it has expired, or its node is down
                    self._return(entry)

            self._sends.append(
                Send(
                    exchange=self._topology.work,
                    key=queue.name,
                    message=Ticket(term=self._term, attempt=attempt, request=entry.request),
                    returned=returned,
                )
            )

        return then

    # ------------------------------------------------------------ views

    def decorate(self, view: RequestView) -> RequestView:
        """Add what only memory knows: progress, and what a pending request waits for."""
        entry = self._entries.get(view.request.id)
        progress = None if entry is None or entry.lease is None else entry.lease.run
        return msgspec.structs.replace(view, progress=progress, waits=self._waits(view, entry))

    def _waits(self, view: RequestView, entry: _Entry | None) -> str | None:
        """Say in a line why a request does not run."""
        if view.state not in (State.PENDING, State.OFFERED):
            return None
        held = self._held_back(view, entry)
        one = self._requirements.get(view.requirement)
        if held is not None or one is None:
            return held
        request, requirement = view.request, one.id if entry is None else entry.requirement
        if not self._matching.capable_classes(requirement):
            if entry is not None and entry.own is not None:
                return explain.DECLINED
            return explain.nobody(self._matching.errors(requirement))
        lane = Lane(requirement, request.priority, request.group, request.concurrency_key)
        if self._dispatch.held_by(lane) is not None:
            return explain.limited(lane.key)
        paused = [name for kind, name in self._pauses if kind == "worker" and self._matching.can_run(name, requirement)]
        if paused and len(paused) == len(self._matching.able(requirement)):
            return explain.PAUSED
        return explain.busy(self._dispatch.ahead(lane, view.seq))

    def _held_back(self, view: RequestView, entry: _Entry | None) -> str | None:
        """Say in a line what keeps a request from being offered, whoever could run it."""
        if view.after:
            others = len(view.after) - 1
            return f"waits for {view.after[0]}" + (f" and {others} more" if others else "")
        if entry is not None and entry.due is not None:
            return "waits out the delay before its next attempt"
        one = self._requirements.get(view.requirement)
        if one is None:
            return None
        for kind, name in (("task", one.kind.task), ("group", view.request.group)):
            if (kind, name) in self._pauses:
                return f"the {kind} {name} is paused"
        if view.state == "offered":
            return "is offered to a worker"
        if one.problem is not None:
            return f"this scheduler cannot configure its task any more: {one.problem}"
        return None

    def explanation(self, draft: Draft, view: RequestView | None) -> Explanation:
        """Say who can run a request, submitted or not, and why it waits."""
        entry = None if view is None else self._entries.get(view.request.id)
        task = draft.task
        one = self._requirements.find(draft.kind, task.data if task is not None else {})
        requirement: Requirement | None = one.id if one is not None else None
        if entry is not None:
            requirement = entry.requirement
        if requirement is not None:
            funnel, able = self._matching.funnel(requirement), self._matching.able(requirement)
        else:
            one = None
            funnel, able = self._matching.survey(self._passing_question(draft))
        standing = self._standing(draft, able, self._refused.get(view.request.id, frozenset()) if view else frozenset())
        offline = sorted(name for name, worker in self._workers.items() if worker.state != "online")
        lane = Lane(requirement, draft.request.priority, draft.request.group, draft.request.concurrency_key)
        seq = self._last_seq + 1 if view is None else view.seq
        ahead = self._dispatch.ahead(lane, seq) if requirement is not None else self._dispatch.waiting()
        failing = self._matching.errors(requirement) if requirement is not None else None
        verdict = explain.verdict(standing, ahead=ahead, failing=failing)
        if view is not None and view.state in (State.PENDING, State.OFFERED):
            limited = (standing.idle or standing.busy) and self._dispatch.held_by(lane) is not None
            verdict = self._held_back(view, entry) or (explain.limited(lane.key) if limited else verdict)
        elif view is not None:
            verdict = f"it is {view.state}"
        return Explanation(
            request=None if view is None else view.request.id,
            state=None if view is None else view.state,
            task=draft.kind.task,
            verdict=verdict,
            workers=funnel.workers + len(offline),
            steps=explain.steps(funnel, offline=offline),
            able=funnel.able,
            idle=len(standing.idle),
            busy=len(standing.busy),
            paused=len(standing.paused),
            refused=len(standing.refused),
            offline=len(standing.offline),
            ahead=ahead if funnel.able else None,
            advice=[] if funnel.able or task is None else self._advice(draft, funnel),
            requirement=None if one is None else one.id,
            escaped=requirement in self._matching.escaped(),
            failing=failing,
            classes=sorted(self._matching.capable_classes(requirement)) if requirement is not None else [],
        )

    def _passing_question(self, draft: Draft) -> Question:
        """Return the question of one request alone: nothing is learned of it."""
        passing = RequirementClass(id=0, kind=draft.kind, data=draft.given)
        return self._examiner.question(passing, draft, lambda _reads: True)

    def _standing(self, draft: Draft, able: Sequence[str], denied: frozenset[tuple[str, int]]) -> explain.Standing:
        standing = explain.Standing()
        for name in able:
            if ("worker", name) in self._pauses:
                standing.paused.append(name)
            else:
                (standing.idle if self._dispatch.idle_slots(name) else standing.busy).append(name)
        question = self._passing_question(draft)
        for name, worker in sorted(self._workers.items()):
            hello = worker.hello
            if hello is None:
                continue
            if worker.state == "online":
                if (name, hello.metadata_version) in denied and self._could(question, hello):
                    standing.refused.append(name)
            elif worker.state == "offline" and self._could(question, hello):
                standing.offline.append(name)
        return standing

    @staticmethod
    def _could(question: Question, hello: Hello) -> bool:
        return question.task in hello.tasks and question.plain(hello.metadata)[0]

    def _advice(self, draft: Draft, funnel: Funnel) -> list[str]:
        """Look for the smallest change of a worker that got furthest."""
        furthest = [name for step in reversed(funnel.steps) for offered in step.offered for name in offered.examples]
        offered = {
            explain.name_of(step.looked_at): [one.token for one in step.offered]
            for step in funnel.steps
            if not isinstance(step.looked_at, str)
        }
        candidates = (
            (name, facts.metadata)
            for name in dict.fromkeys(furthest)
            if draft.kind.task in (facts := self._matching.facts(name)).tasks
        )
        task = draft.task
        return explain.advice(self._examiner.ask(draft), {} if task is None else task.data, candidates, offered)

    def capabilities(self, query: GetCapabilities, moment: Moment) -> CapabilityList:
        """Show capability classes."""
        names = (name for name in self._matching.names() if query.after is None or name > query.after)
        classes = []
        for name in nsmallest(query.limit, names):
            members = sorted(self._matching.members(name))
            facts = [self._matching.facts(worker) for worker in members]
            classes.append(
                Capability(
                    name=name,
                    queue=self._topology.class_queue(name).name,
                    workers=len(members),
                    examples=members[: explain.MAX_SHOWN],
                    shared=explain.shared([one.metadata for one in facts]),
                    tasks=sorted(set.intersection(*(set(one.tasks) for one in facts))) if facts else [],
                    requirements=len(self._matching.runs(name)),
                    idle=self._dispatch.idle(name),
                    lookahead=self._dispatch.lookahead(name, moment.steady),
                    out=self._dispatch.out(name),
                    backlog=self._dispatch.backlog(name),
                )
            )
        return CapabilityList(
            classes=classes, requirements=len(self._requirements), escaped=len(self._matching.escaped())
        )

    def pool(self, requests: Mapping[str, int], version: str) -> PoolView:
        """Show how many of everything there are."""
        online = [worker for worker in self._workers.values() if worker.state == "online"]
        at_work = [worker for worker in online if ("worker", worker.name) not in self._pauses]
        return PoolView(
            term=self._term,
            version=version,
            store=self._store_id,
            requests=dict(requests),
            workers=len(online),
            classes=self.classes(),
            paused=len(online) - len(at_work),
            offline=sum(worker.state == "offline" for worker in self._workers.values()),
            refused=sum(worker.state == "refused" for worker in self._workers.values()),
            slots=sum(worker.hello.slots for worker in at_work if worker.hello is not None),
            busy=sum(len(worker.leases) for worker in online),
        )

    def workers(self, query: ListWorkers) -> list[WorkerView]:
        """Show workers that have been heard of."""
        names = (name for name in self._workers if query.after is None or name > query.after)
        return [
            WorkerView(
                name=worker.name,
                host=worker.hello.host if worker.hello else "",
                state=worker.state,  # type: ignore[arg-type]  # one of the three words
                slots=worker.hello.slots if worker.hello else 0,
                running=[lease.run for lease in map(self._lease_held, sorted(worker.leases)) if lease is not None],
                queue=worker.heartbeat.assigned if worker.heartbeat else None,
                tasks=worker.hello.tasks if worker.hello else {},
                metadata=worker.hello.metadata if worker.hello else {},
                version=worker.hello.version if worker.hello else "",
                seen=worker.seen_wall,
                reason=worker.reason,
                paused=pause.reason if (pause := self._pauses.get(("worker", worker.name))) is not None else None,
                denied=worker.hello.denied if worker.hello else [],
                capability_class=self._matching.class_of(worker.name),
            )
            for worker in map(self._workers.__getitem__, nsmallest(query.limit, names))
        ]

    def classes(self) -> int:
        """Count the capability classes."""
        return self._matching.number_of_classes()

    def show(self, moment: Moment) -> None:
        """Set the gauges."""
        states = dict.fromkeys((State.PENDING, State.OFFERED, State.RUNNING), 0)
        for entry in self._entries.values():
            states[entry.state] += entry.state is not State.PENDING
        states[State.PENDING] = self._dispatch.waiting() + len(self._delayed) + self._blocked
        for state, number in states.items():
            self._metrics.requests.labels(state=state).set(number)
        for word in ("online", "offline", "refused"):
            self._metrics.workers.labels(state=word).set(sum(worker.state == word for worker in self._workers.values()))
        self._metrics.classes.set(self.classes())
        self._metrics.requirements.set(len(self._requirements))
        self._metrics.escaped.set(len(self._matching.escaped()))
        self._metrics.class_idle.clear()
        self._metrics.class_offers.clear()
        for name, (_, idle, _, out) in self._dispatch.figures(moment.steady).items():
            self._metrics.class_idle.labels(capability_class=name).set(idle)
            self._metrics.class_offers.labels(capability_class=name).set(out)

    # ------------------------------------------------------------ inside

    def _name_class(self) -> str:
        self._classes_made += 1
        return f"{self._term}-{self._classes_made}"  # the term makes it a name that was never used

    def _write(self, write: Write, then: Callable[[Any], None]) -> None:
        self._writes.append((write, then))

    def _entry_of(self, row: Live, one: RequirementClass | None = None) -> _Entry:
        """Take a request of the ledger into memory."""
        one = one or self._requirements.get(row.requirement)
        if one is None:
            one = self._class_of(self._examiner.examine(row.request, bound=not row.unmet))
            self._rekeyed[row.seq] = one.id
        return self._new_entry(
            _Entry(
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

    def _new_entry(self, entry: _Entry) -> _Entry:
        self._entry_with(entry.request.id, entry.seq)
        self._entries[entry.request.id] = entry
        self._uses[entry.one.id].entries += 1
        return entry

    def _entry_with(self, request: str, seq: int) -> _Entry | None:
        """Return what is in memory of a request that the ledger has; a doubled submission of it makes way."""
        entry = self._entries.get(request)
        if entry is None or entry.seq == seq:
            return entry
        self._forget(entry)
        return None

    def _drop_entry(self, entry: _Entry) -> None:
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

    def _forget(self, entry: _Entry) -> None:
        """Let go of a request that has ended, or never was."""
        self._dispatch.forget(entry.request.id)
        self._drop_entry(entry)

    def _delay(self, entry: _Entry, *, due: float) -> None:
        entry.due = due
        self._delayed.add(entry.request.id)

    def _place(self, entry: _Entry) -> bool:
        """Let a request wait for a slot: in memory, or behind those of its lane that are. Say whether in memory."""
        kept = self._dispatch.wait(entry.request.id, entry.lane, entry.seq)
        if not kept:
            self._drop_entry(entry)
        return kept

    def _return(self, entry: _Entry) -> None:
        self._write(Return(request=entry.request.id, attempt=entry.attempt), self._returned(entry.request.id))

    def _returned(self, request: str) -> Callable[[bool], None]:
        def then(moved: bool) -> None:  # noqa: FBT001  # the ledger's answer is a bool
            entry = self._entries.get(request)
            if moved and entry is not None:
                entry.state = State.PENDING
                self._dispatch.forget(request)
                self._place(entry)

        return then

    def _lease_of(self, entry: _Entry) -> float:
        task = entry.one.kind.task
        known = Task.class_from_name(task) if Task.is_valid_task_name(task) else Task
        return lease_seconds(entry.request.lease, known.LEASE)

    def _change(self, change: Change) -> None:
        for name in change.made:
            self._dispatch.add_class(name)
            self.declare.append(self._topology.class_queue(name))
        for gain in change.gained:
            self._dispatch.gain(gain.capability_class, gain.requirement)
        for worker in change.assigned:
            self._say(self._workers[worker], self._assignment(self._workers[worker]))
        for name in change.gone:
            self.delete.append(self._topology.class_queue(name).name)
            for request in self._dispatch.remove_class(name):
                self._return(self._entries[request])

    def _assignment(self, worker: _Worker) -> Assign:
        own = self._matching.class_of(worker.name)
        if own is None or ("worker", worker.name) in self._pauses:
            return Assign(queue=None)
        return Assign(queue=self._topology.class_queue(own).name)

    def _offline(self, worker: _Worker, reason: str, moment: Moment, *, state: str = "offline") -> None:
        if worker.state == state:
            return
        worker.state, worker.reason, worker.probe = state, reason, None
        self._change(self._matching.leave(worker.name))
        self._dispatch.no_supply(worker.name)
        self._tell_worker(worker, state, moment)

    def _say(self, worker: _Worker, part: VerdictPart) -> None:
        self._verdicts.setdefault((worker.name, worker.epoch), []).append(part)

    def _void(self, worker: _Worker, ref: RunRef, reason: str) -> None:
        self._say(worker, Void(request=ref.request, attempt=ref.attempt, token=ref.token, reason=reason))

    def _tell(
        self,
        request: Request | Stranded | _Named,
        state: State,
        event: Event,
        *,
        attempt: int,
        wall: float,
        worker: str | None = None,
        reason: Reason | None = None,
    ) -> None:
        task = (
            request.task.lower() if Task.is_valid_task_name(request.task) else "unknown"
        )  # names of strangers are no labels
        self._metrics.moves.labels(task=task, event=event).inc()
        self._sends.append(
            Send(
                exchange=self._topology.events,
                key=self._topology.request_event_key(task, state),
                message=RequestEvent(
                    term=self._term,
                    time=wall,
                    request=request.id,
                    task=request.task,
                    state=state.value,
                    event=event,
                    attempt=attempt,
                    worker=worker,
                    reason=reason,
                ),
                mandatory=False,
                persistent=False,
            )
        )

    def _tell_worker(self, worker: _Worker, event: str, moment: Moment) -> None:
        self._sends.append(
            Send(
                exchange=self._topology.events,
                key=self._topology.worker_event_key(event),
                message=WorkerEvent(
                    term=self._term,
                    time=moment.wall,
                    worker=worker.name,
                    event=event,  # type: ignore[arg-type]  # one of the four words
                    reason=worker.reason,
                ),
                mandatory=False,
                persistent=False,
            )
        )


def _lane_of(row: Live) -> Lane:
    return Lane(row.requirement, row.request.priority, row.request.group, row.request.concurrency_key)


def _exhausted(reason: Reason | None, attempts: int) -> Reason:
    said = Reason(text="no reason was given") if reason is None else reason
    return msgspec.structs.replace(said, text=f"{said.text} (attempt {attempts} of {attempts}, none is left)")
