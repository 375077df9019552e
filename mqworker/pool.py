"""What the pool is now, and what each message or moment does to it: the scheduler's judgement.

It is told what came and what time it is; it answers with writes for the ledger, and, once it is told that these have
been committed, with messages to send. It opens nothing, waits for nothing and starts nothing, so that a whole pool
can be run on a virtual clock. What it holds is a copy of what the ledger holds, and only a committed write changes it.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec

from mqworker.dispatch import Dispatch
from mqworker.errors import TaskConfigError
from mqworker.ledger import (
    AbortAsked,
    AbortResult,
    Accept,
    Accepted,
    End,
    Ended,
    Grant,
    Import,
    Live,
    Offer,
    Return,
    Write,
)
from mqworker.lifecycle import Event, State, end_attempt, lease_seconds
from mqworker.matching import Change, Matching, WorkerFacts
from mqworker.messages import (
    Abort,
    Alive,
    Artifact,
    Assign,
    Bye,
    Claim,
    Granted,
    Heartbeat,
    Hello,
    Introduce,
    Outcome,
    Outcomes,
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
    Ticket,
    Verdict,
    VerdictPart,
    Void,
    WorkerEvent,
    WorkerView,
)
from mqworker.metrics import SchedulerMetrics
from mqworker.task import Task
from mqworker.topology import Queue, Topology

logger = logging.getLogger(__name__)

SILENCE: Final = 16.0  # seconds without a report (three heartbeats and a bit) before a worker counts as offline
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
class Draft:
    """Hold a request that was examined, before the ledger has it."""

    request: Request
    task: Task | None
    problem: str | None
    inputs: tuple[int, ...] = ()


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


@dataclass(kw_only=True)
class _Entry:
    """One live request."""

    seq: int
    request: Request
    task: Task | None
    inputs: tuple[int, ...]
    requirement: tuple[str, ...]
    state: State = State.PENDING
    attempt: int = 1
    tried: int = 0
    abort: str | None = None
    submitted: float = 0.0  # wall
    lease: _Lease | None = None
    due: float | None = None  # steady; it waits out a delay until then


@dataclass(kw_only=True)
class _Worker:
    name: str
    epoch: str = ""
    incarnation: int = -1
    seq: int = -1
    hello: Hello | None = None
    state: str = "offline"
    reason: str | None = None
    seen: float = 0.0  # steady
    seen_wall: float = 0.0
    probe: int | None = None
    heartbeat: Heartbeat | None = None
    former: str | None = None  # the queue that it consumed before it was told of another
    leases: set[str] = field(default_factory=set)  # request ids


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
        self._matching = Matching(name_class=self._name_class)
        self._dispatch = Dispatch()
        self._entries: dict[str, _Entry] = {}
        self._users: dict[tuple[str, ...], int] = {}  # requirement to the number of live requests with it
        self._delayed: set[str] = set()
        self._running: dict[str, _Entry] = {}
        self._workers: dict[str, _Worker] = {}
        self._refused: dict[tuple[str, ...], set[tuple[str, int]]] = {}
        self._failing: dict[tuple[str, ...], str] = {}
        self._writes: list[tuple[Write | None, Callable[[Any], None]]] = []  # None: only an answer behind the commit
        self._committing: list[tuple[Write | None, Callable[[Any], None]]] = []
        self._sends: list[Send] = []
        self._verdicts: dict[tuple[str, str], list[VerdictPart]] = {}
        self._grants_wanted: set[int] = set()
        self._inputs: Mapping[int, RecordedArtifact] = {}
        self.declare: list[Queue] = []  # before the next sends
        self.delete: list[str] = []  # queues of classes that are gone

    # ------------------------------------------------------------ what the scheduler takes and gives back

    def take_writes(self) -> tuple[list[Write], set[int]]:
        """Hand over the writes judged since the last call, and the ids of the artifacts that grants will name."""
        self._committing, self._writes = self._writes, []
        wanted, self._grants_wanted = self._grants_wanted, set()
        return [write for write, _ in self._committing if write is not None], wanted

    def committed(self, results: Sequence[Any], inputs: Mapping[int, RecordedArtifact]) -> None:
        """Take over what the ledger has committed of the writes last handed over."""
        self._inputs = inputs
        remaining = iter(results)
        committing, self._committing = self._committing, []
        for write, then in committing:
            then(None if write is None else next(remaining))

    def take_sends(self) -> list[Send]:
        """Hand over the messages to publish."""
        sends, self._sends = self._sends, []
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
        return tuple(self._topology.class_queue(name) for name in self._matching.classes())

    def restore(self, live: Iterable[Live], moment: Moment) -> None:
        """Begin with what the ledger holds: offers go back, and each lease gets a full term."""
        for row in live:
            draft = self.examine(row.request)
            entry = self._entry(draft, seq=row.seq, submitted=row.submitted)
            entry.state, entry.attempt, entry.tried, entry.abort = row.state, row.attempt, row.tried, row.abort
            self._last_seq = max(self._last_seq, row.seq)
            if row.state is State.RUNNING:
                seconds = self._lease_of(entry)
                worker = self._workers.setdefault(row.worker or "", _Worker(name=row.worker or ""))
                worker.seen, worker.seen_wall = moment.steady, moment.wall
                worker.leases.add(row.request.id)
                self._running[row.request.id] = entry
                entry.lease = _Lease(
                    worker=worker.name,
                    run=RunProgress(
                        request=row.request.id, attempt=row.attempt, token=row.token or "", since=moment.wall
                    ),
                    seconds=seconds,
                    deadline=moment.steady + seconds + LEASE_MARGIN,
                )
            elif row.state is State.OFFERED:
                self._write(Return(request=row.request.id, attempt=row.attempt), self._returned(row.request.id))
            else:
                self._wait(entry, delay=(row.not_before or 0.0) - moment.wall, moment=moment)

    # ------------------------------------------------------------ submissions

    def examine(self, request: Request) -> Draft:
        """Ask the request's task whether it accepts the data; costs a construction and a validation."""
        if not Task.is_valid_task_name(request.task):
            return Draft(
                request=request,
                task=None,
                problem=f"expected the name of a task that this scheduler has, got {request.task!r}",
            )
        task = Task.class_from_name(request.task)()
        try:
            task.configure(request.data)
            return Draft(request=request, task=task, problem=None, inputs=tuple(task.input_artifact_ids()))
        except TaskConfigError as error:
            return Draft(request=request, task=None, problem=str(error))
        except Exception as error:  # noqa: BLE001  # a task's own code: it may raise anything, and must not end the scheduler
            return Draft(
                request=request,
                task=None,
                problem=f"task {request.task} could not be configured: {type(error).__name__}: {error}",
            )

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

        for index, draft in enumerate(drafts):
            problem = draft.problem or _wrong_input(draft, artifacts)
            request = draft.request
            rejected = None if problem is None else Reason(text=problem, stage="submission")
            fresh = rejected is None and request.id not in self._entries
            if fresh:
                self._last_seq += 1
                entry = self._entry(draft, seq=self._last_seq, submitted=moment.wall)
                self._enqueue(entry)  # so that it can be offered in the transaction that accepts it
            self._write(
                Accept(request=request, at=moment.wall, rejected=rejected),
                self._accepted(request, fresh=fresh, moment=moment, settle=partial(settle, index)),
            )

    def _accepted(
        self, request: Request, *, fresh: bool, moment: Moment, settle: Callable[[Receipted], None]
    ) -> Callable[[Accepted], None]:
        def then(result: Accepted) -> None:
            # An entry's age stays what it was judged by: the ledger's own numbers have gaps, but the same order.
            if fresh and result.status != "accepted":
                self._forget(self._entries[request.id])  # the ledger knew it: it has ended before
            if result.status == "accepted":
                self._tell(request, State.PENDING, Event.ACCEPT, attempt=1, wall=moment.wall)
            elif result.status == "rejected":
                self._tell(
                    request,
                    State.REJECTED,
                    Event.REJECT,
                    attempt=1,
                    wall=moment.wall,
                    reason=Reason(text=result.reason or ""),
                )
            settle(Receipted(id=request.id, status=result.status, reason=result.reason))

        return then

    # ------------------------------------------------------------ reports

    def report(self, report: Report, moment: Moment) -> None:
        """Take a worker's word; one that is older than the newest known is dropped."""
        worker = self._workers.setdefault(report.worker, _Worker(name=report.worker))
        if (report.incarnation, report.seq) <= (worker.incarnation, worker.seq):
            return
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
        queue = None if own is None else self._topology.class_queue(own).name
        if beat.assigned != queue:
            worker.former = beat.assigned
            self._say(worker, self._assignment(worker))
        elif worker.former is not None:
            self._retire(worker.former)  # a class of an earlier term; the worker consumes it no more
            worker.former = None
        self._dispatch.supply(
            worker.name, capability_class=own if beat.assigned == queue else None, slots=beat.slots, busy=busy
        )

    def _retire(self, queue: str) -> None:
        """Have a queue deleted that may be one of an earlier term's classes: nobody else would, for a day."""
        live = {one.name for one in self.class_queues()}
        if queue.startswith(f"{self._topology.work}.") and queue not in live:  # a worker may name any queue
            self.delete.append(queue)

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
        self._dispatch.forget(claim.request)
        self._dispatch.taken(worker.name, claim.token)
        self._metrics.wait_seconds.labels(task=entry.request.task.lower()).observe(
            max(0.0, moment.wall - entry.submitted)
        )
        self._tell(
            entry.request, State.RUNNING, Event.GRANT, attempt=entry.attempt, wall=moment.wall, worker=worker.name
        )
        self._granted(worker, claim, entry)

    def _granted(self, worker: _Worker, claim: Claim, entry: _Entry) -> None:
        self._say(
            worker,
            Granted(
                request=claim.request,
                attempt=claim.attempt,
                token=claim.token,
                lease=self._lease_of(entry),
                inputs=[self._inputs[number] for number in entry.inputs],
            ),
        )

    def _refusal(self, worker: _Worker, refusal: Refusal) -> None:
        entry = self._entries.get(refusal.request)
        if entry is not None and entry.attempt == refusal.attempt and entry.state is State.OFFERED:
            if self._matching.can_run(worker.name, entry.requirement):
                self._remember_refusal(entry, worker.name, refusal.metadata_version)
            self._return(entry)
        self._void(worker, refusal, "refused")

    def _remember_refusal(self, entry: _Entry, worker: str, metadata_version: int) -> None:
        """Give the request a requirement class of its own, which this worker does not meet with this metadata."""
        task, data, *_ = entry.requirement
        own = (task, data, entry.request.id)
        self._refused.setdefault(own, set()).add((worker, metadata_version))
        if entry.requirement != own:
            self._release(entry.requirement)
        else:
            self._matching.drop(own)
        entry.requirement = own
        self._users[own] = 1
        self._change(self._matching.need(own, self._accepts(own, entry.task)))

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
        holds = (
            entry is not None
            and entry.lease is not None
            and entry.lease.token == ref.token
            and entry.attempt == ref.attempt
        )
        ending = end_attempt(
            outcome.result,
            again=outcome.again,
            tried=entry.tried if entry is not None else 0,
            max_attempts=entry.request.max_attempts if entry is not None else 1,
            abort_asked=entry is not None and entry.abort is not None,
            retry_delay=self._retry_delay,
        )
        reason = outcome.reason
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
            held = entry.lease if entry is not None and holds else None
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
                    self._wait(entry, delay=ending.delay, moment=moment)
                else:
                    self._forget(entry)
            answer(result)

        self._write(write, then)

    # ------------------------------------------------------------ commands

    def abort(self, request: str, reason: str, moment: Moment, then: Callable[[AbortResult], None]) -> None:
        """Stop a request wherever it is."""

        def settled(result: AbortResult) -> None:
            entry = self._entries.get(request)
            if entry is not None and result.after is State.ABORTED:
                self._tell(
                    entry.request,
                    State.ABORTED,
                    Event.ABORT,
                    attempt=entry.attempt,
                    wall=moment.wall,
                    reason=Reason(text=reason),
                )
                self._forget(entry)
            elif entry is not None and result.after is State.RUNNING and entry.lease is not None:
                entry.abort = reason
                worker = self._workers[entry.lease.worker]
                self._say(worker, Abort(request=request, attempt=entry.attempt, token=entry.lease.token, reason=reason))
            then(result)

        self._write(AbortAsked(request=request, reason=reason, at=moment.wall), settled)

    def import_artifact(self, key: str, artifact: Artifact, moment: Moment, then: Callable[[int], None]) -> None:
        """Record an artifact that no request made."""
        self._write(Import(key=key, artifact=artifact, at=moment.wall), then)

    def refresh(self, names: Sequence[str]) -> None:
        """Ask workers for fresh metadata; no names: all that are online."""
        for worker in self._workers.values():
            if worker.state != "offline" and (not names or worker.name in names):
                self._say(worker, Introduce())

    # ------------------------------------------------------------ time

    def tick(self, moment: Moment) -> None:
        """Do what is due: delays that are over, offers nobody took, silent workers, leases that lapse.

        Only a probe that has come back through the report queue, behind whatever was queued in it, lets a lease
        lapse or a worker go offline: a blocked broker, a slow ledger or an own pause costs no run.
        """
        for request in [one for one in self._delayed if (self._entries[one].due or 0.0) <= moment.steady]:
            self._enqueue(self._entries[request])
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

    def probe(self, probe: Probe, moment: Moment) -> None:
        """Take back a probe: what has not been heard of since it was sent is gone."""
        if probe.term != self._term:
            return
        for entry in self._running.values():
            lease = entry.lease
            if lease is not None and lease.probe is not None and lease.probe <= probe.number:
                self._lost(entry, f"no heartbeat renewed its lease of {lease.seconds:g} s", moment)
        for worker in self._workers.values():
            if worker.probe is not None and worker.probe <= probe.number:
                self._offline(worker, "it has not reported any more", moment)

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
                Offer(request=offer.request, attempt=entry.attempt),
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
        if entry is None:
            return view
        progress = None if entry.lease is None else entry.lease.run
        return msgspec.structs.replace(view, progress=progress, waits=self._waits(entry))

    def _waits(self, entry: _Entry) -> str | None:
        if entry.state not in (State.PENDING, State.OFFERED):
            return None
        if entry.task is None:
            return "this scheduler cannot configure its task any more"
        if entry.due is not None:
            return "for its next attempt"
        if self._matching.capable_classes(entry.requirement):
            return "for a free slot"
        failing = self._failing.get(entry.requirement)
        return "no worker can run it" if failing is None else f"no worker can run it: {failing}"

    def workers(self) -> list[WorkerView]:
        """Show every worker that has been heard of."""
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
            )
            for worker in sorted(self._workers.values(), key=lambda worker: worker.name)
        ]

    def classes(self) -> int:
        """Count the capability classes."""
        return len(self._matching.classes())

    def show(self, moment: Moment) -> None:
        """Set the gauges."""
        states = dict.fromkeys((State.PENDING, State.OFFERED, State.RUNNING), 0)
        for entry in self._entries.values():
            states[entry.state] += 1
        for state, number in states.items():
            self._metrics.requests.labels(state=state).set(number)
        for word in ("online", "offline", "refused"):
            self._metrics.workers.labels(state=word).set(sum(worker.state == word for worker in self._workers.values()))
        self._metrics.classes.set(self.classes())
        self._metrics.requirements.set(len(self._users))
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

    def _entry(self, draft: Draft, *, seq: int, submitted: float) -> _Entry:
        request = draft.request
        requirement = (request.task.lower(), msgspec.json.encode(request.data, order="deterministic").decode())
        entry = _Entry(
            seq=seq,
            request=request,
            task=draft.task,
            inputs=draft.inputs,
            requirement=requirement,
            submitted=submitted,
        )
        self._entries[request.id] = entry
        self._users[requirement] = self._users.get(requirement, 0) + 1
        self._change(self._matching.need(requirement, self._accepts(requirement, draft.task)))
        return entry

    def _accepts(self, requirement: tuple[str, ...], task: Task | None) -> Callable[[WorkerFacts], bool]:
        def accepts(facts: WorkerFacts) -> bool:
            if task is None or task.name not in facts.tasks:
                return False
            if (facts.name, facts.metadata_version) in self._refused.get(requirement, ()):
                return False
            try:
                return bool(task.can_run_on(dict(facts.metadata)))
            except Exception as error:  # noqa: BLE001  # a task's own code: what raises counts as "no", and is shown
                self._failing[requirement] = f"can_run_on() raised {type(error).__name__}: {error}"
                return False

        return accepts

    def _release(self, requirement: tuple[str, ...]) -> None:
        self._users[requirement] -= 1
        if not self._users[requirement]:
            del self._users[requirement]
            self._refused.pop(requirement, None)
            self._failing.pop(requirement, None)
            self._matching.drop(requirement)

    def _forget(self, entry: _Entry) -> None:
        request = entry.request.id
        del self._entries[request]
        self._delayed.discard(request)
        self._dispatch.forget(request)
        self._release(entry.requirement)

    def _wait(self, entry: _Entry, *, delay: float, moment: Moment) -> None:
        if delay > 0:
            entry.due = moment.steady + delay
            self._delayed.add(entry.request.id)
        else:
            self._enqueue(entry)

    def _enqueue(self, entry: _Entry) -> None:
        request = entry.request.id
        entry.due = None
        self._delayed.discard(request)
        self._dispatch.wait(
            request,
            priority=entry.request.priority,
            seq=entry.seq,
            requirement=entry.requirement,
            classes=self._matching.capable_classes(entry.requirement),
        )

    def _return(self, entry: _Entry) -> None:
        self._write(Return(request=entry.request.id, attempt=entry.attempt), self._returned(entry.request.id))

    def _returned(self, request: str) -> Callable[[bool], None]:
        def then(moved: bool) -> None:  # noqa: FBT001  # the ledger's answer is a bool
            entry = self._entries.get(request)
            if moved and entry is not None:
                entry.state = State.PENDING
                self._dispatch.forget(request)
                self._enqueue(entry)

        return then

    def _lease_of(self, entry: _Entry) -> float:
        return lease_seconds(entry.request.lease, entry.task.LEASE if entry.task is not None else Task.LEASE)

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
        return Assign(queue=None if own is None else self._topology.class_queue(own).name)

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
        request: Request,
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


def _wrong_input(draft: Draft, artifacts: Mapping[int, RecordedArtifact]) -> str | None:
    """Say which input artifact is missing or of the wrong category."""
    wanted = draft.task.INPUT_ARTIFACT_CATEGORY if draft.task is not None else None
    for number in draft.inputs:
        artifact = artifacts.get(number)
        if artifact is None:
            return f"expected the id of an artifact, got {number}, which does not exist: see `mqworker artifact list`"
        if wanted is not None and artifact.category != wanted:
            return f"expected an artifact of category {wanted}, got artifact {number} of category {artifact.category}"
    return None


def _exhausted(reason: Reason | None, attempts: int) -> Reason:
    said = Reason(text="no reason was given") if reason is None else reason
    return msgspec.structs.replace(said, text=f"{said.text} (attempt {attempts} of {attempts}, none is left)")
