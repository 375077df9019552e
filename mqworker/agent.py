"""What a worker holds now, and what each message, slot or moment does to it: the worker's judgement.

It is told what came and what time it is, and answers with acts for the worker to carry out: publish, acknowledge,
consume, start, stop, spool. It opens nothing, waits for nothing and starts nothing, so that a whole pool can be run
on a virtual clock. Its clock is CLOCK_BOOTTIME in nanoseconds: a lease goes on while the host is suspended.
"""

import difflib
import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import islice
from math import inf
from typing import Any, Final

import msgspec

from mqworker import __version__, requires
from mqworker.errors import HostUnfit, SettingsError, TaskConfigError
from mqworker.lifecycle import lease_deadline_ns
from mqworker.messages import (
    MAX_DESCRIBED_BYTES,
    MAX_LISTED,
    MAX_METADATA_BYTES,
    MAX_OUTCOME_BYTES,
    MAX_STAGE,
    SLOT_LAPSED,
    Abort,
    Alive,
    Analysis,
    Assign,
    Bye,
    Claim,
    Drain,
    Granted,
    Heartbeat,
    Hello,
    Introduce,
    LogProgress,
    LogText,
    Outcome,
    OutcomeResult,
    Outcomes,
    Reason,
    Recorded,
    RecordedArtifact,
    Refusal,
    Report,
    ReportPart,
    Request,
    RunProgress,
    RunRef,
    SlotEnded,
    SlotOutput,
    SlotProgress,
    SlotReady,
    SlotRecalled,
    SlotWord,
    Ticket,
    Verdict,
    Void,
    bounded,
    encode,
    outcome_sets,
    shortened,
)
from mqworker.pace import AHEAD_SECONDS, Pace
from mqworker.task import Task, load_tasks
from mqworker.tracking import ask_plainly

logger = logging.getLogger(__name__)

HEARTBEAT_NS: Final = 5_000_000_000
BEATS_IN_A_LEASE: Final = 3  # at least: one may be lost, or its answer be late
NEWS_NS: Final = 1_000_000_000  # a run's new stage is told so soon after the last heartbeat
ABSENCE_NS: Final = 2_000_000_000  # without doing anything: a worker looks at its clock several times a second
TERM_PATIENCE_NS: Final = 60_000_000_000  # without a word of the highest term: whoever said it was no scheduler
ABORT_MARGIN_NS: Final = 1_000_000_000  # beyond the task's own grace before its slot is killed: gone in 2 s with that
BEHIND_NS: Final = 1_000_000_000  # so much later than this process a slot itself ends a run that is over its timeout
DEFAULT_GRACE: Final = 5.0  # seconds; of a task that does not say
BEATS_KEPT: Final = 100  # heartbeats that may still be answered
MAX_UNSETTLED: Final = 1000  # outcomes without an answer, and ...
MAX_UNSETTLED_BYTES: Final = 64 * 1024 * 1024  # ... their bytes; with more of either, it takes no ticket
MAX_LOG: Final = 1024 * 1024  # characters of output in one message; a slot says far less at once
LARGEST: Final = 3  # keys that are named where metadata are too large, ...
LARGEST_KEY: Final = 100  # ... with so many of their characters
AHEAD_NS: Final = int(AHEAD_SECONDS * 1e9)
MAX_AHEAD: Final = 500  # runs of one worker, which others could have
FLOOD_PREFETCH: Final = 20  # messages in hand beyond the slots, where each slot ends a run in less than AHEAD_SECONDS
GIVEN_PART: Final = 0.2  # of what is taken ahead for a slot, it is given so much beside what it runs, ...
MAX_GIVEN: Final = 100  # ... and no more runs
STUCK_NS: Final = 500_000_000  # without an end: what waits for a slot is handed back
UNTOLD_NS: Final = 200_000_000  # a run that takes longer is told of, even if it says nothing itself
LOG_TAIL: Final = 2000  # characters of output kept, for the reason of a run whose slot died


# ---------------------------------------------------------------- acts


@dataclass(frozen=True)
class Ack:
    """Acknowledge a message of tickets."""

    delivery: Any


@dataclass(frozen=True)
class Requeue:
    """Give a message of tickets back to its queue."""

    delivery: Any


@dataclass(frozen=True)
class Consume:
    """Consume a queue, with so many messages in hand."""

    queue: str
    prefetch: int


@dataclass(frozen=True)
class Cancel:
    """Stop consuming a queue."""

    queue: str


@dataclass(frozen=True)
class StartRun:
    """Give a slot a run, behind those that it has."""

    slot: int
    token: str
    request: Request
    attempt: int
    inputs: list[RecordedArtifact]
    deadline_ns: int


@dataclass(frozen=True)
class RenewRun:
    """Tell a slot that a run may go on."""

    slot: int
    token: str
    deadline_ns: int


@dataclass(frozen=True)
class StopRunIn:
    """Tell a slot to abort a run."""

    slot: int
    token: str
    reason: str


@dataclass(frozen=True)
class RecallRuns:
    """Take back from a slot the runs that it has not begun."""

    slot: int


@dataclass(frozen=True)
class KillSlot:
    """Kill a slot with all its descendants."""

    slot: int
    reason: str


@dataclass(frozen=True)
class Spool:
    """Write an outcome to disk, for good; its run's directory is not needed any more, if it has one."""

    outcome: Outcome
    task: str
    litter: bool


@dataclass(frozen=True)
class Discard:
    """Remove what a run has left, of which nobody wants an outcome."""

    token: str


@dataclass(frozen=True)
class Unspool:
    """Remove an outcome that the ledger has answered."""

    ref: RunRef


@dataclass(frozen=True)
class PublishReport:
    """Publish a report."""

    report: Report


@dataclass(frozen=True)
class PublishOutcomes:
    """Publish outcomes that are on disk, or must go without."""

    outcomes: Outcomes


@dataclass(frozen=True)
class PublishLog:
    """Tell whoever follows what a run prints, or how far it is."""

    message: LogText | LogProgress


@dataclass(frozen=True)
class CountRefusal:
    """Count a ticket that was refused."""

    task: str


@dataclass(frozen=True)
class Analyze:
    """Look at the host afresh."""


Act = (
    Ack
    | Requeue
    | Consume
    | Cancel
    | StartRun
    | RenewRun
    | StopRunIn
    | RecallRuns
    | KillSlot
    | Spool
    | Discard
    | Unspool
    | PublishReport
    | PublishOutcomes
    | PublishLog
    | CountRefusal
    | Analyze
)


# ---------------------------------------------------------------- what is held


@dataclass(eq=False)
class _Hand:
    """A message with tickets, which is acknowledged when all of them are answered."""

    delivery: Any
    unanswered: int = 0


@dataclass(kw_only=True)
class _Asking:
    """A ticket in hand whose claim or refusal is not answered yet."""

    hand: _Hand
    ticket: Ticket
    token: str
    refusal: str | None  # why it must not run here
    metadata_version: int  # by which that was judged
    claims: bool | None = None  # what was said first, claim or refusal, is said until it is answered; None: nothing
    sent_ns: int | None = None  # of the first time it was said: the lease counts from there
    abort: str | None = None  # why it is not wanted any more; its grant may be on the way

    def asks_to_run(self) -> bool:
        return self.refusal is None if self.claims is None else self.claims

    def ref(self) -> RunRef:
        return RunRef(request=self.ticket.request.id, attempt=self.ticket.attempt, token=self.token)


@dataclass(kw_only=True, eq=False)
class _Run:
    slot: int | None  # None: it waits for one
    request: Request
    attempt: int
    token: str
    inputs: list[RecordedArtifact]
    lease: float
    deadline_ns: int
    grace: float
    since: float
    judged: int  # by which version of the metadata it may run here
    granted_ns: int
    begun_ns: int | None = None  # None: as far as we know, others are before it
    told: bool = False  # that it has begun
    doomed: tuple[str, str] | None = None  # how it is to be killed, and why, if its slot has begun it already
    alone: bool = False
    timeout_ns: int | None = None  # when it has run for as long as it may
    over: bool = False  # ... and was told to stop for that
    stage: str | None = None
    fraction: float | None = None
    abort: str | None = None
    kill_ns: int | None = None
    killed: str | None = None  # why: "lease", "void", "abort", "stop", "timeout", "limit", "babble", "unable"
    exceeded: Reason | None = None  # a limit
    out_of_memory: bool = False
    ended: SlotEnded | None = None  # what its slot said before it ended itself, because of what it could not end
    babble: str = ""  # what is wrong with what its slot said
    log_seq: int = 0
    tail: str = ""

    def ref(self) -> RunRef:
        return RunRef(request=self.request.id, attempt=self.attempt, token=self.token)

    def slot_ends_ns(self) -> int:
        """Return when the slot is to end it by itself, should nobody tell it anything more."""
        if self.timeout_ns is None:
            return self.deadline_ns
        return min(self.deadline_ns, self.timeout_ns + int(self.grace * 1e9) + ABORT_MARGIN_NS + BEHIND_NS)


@dataclass(kw_only=True)
class _Unsettled:
    outcome: Outcome
    size: int  # bytes
    sendable: bool = False  # it is on disk, or cannot be, and the worker leaves
    sent_ns: int | None = None


@dataclass(kw_only=True)
class _Slot:
    ready: bool = False
    runs: list[str] = field(default_factory=list)  # tokens, in their order; it has begun the first
    dying: bool = False
    overtaken: list[_Run] = field(default_factory=list)  # killed, and ended before that: the next may have begun
    recalled: bool = False  # it was told to give back what it has not begun, and has not answered

    @property
    def run(self) -> str | None:
        """Return the token of the run that it has begun."""
        return self.runs[0] if self.runs else None


@dataclass(kw_only=True)
class _Beat:
    sent_ns: int
    tokens: list[str] = field(default_factory=list)


def check_task_names(*, allow_tasks: Collection[str], deny_tasks: Collection[str]) -> None:
    """Make sure that each name is that of an installed task: a deny list with a slip in it would deny nothing.

    Raises:
        SettingsError: one is not; the text names the setting and the tasks that are known.
    """
    unimported = load_tasks()
    known = sorted(Task._sub_tasks)  # noqa: SLF001  # the document's name for it
    for setting, names in (("allow_tasks", allow_tasks), ("deny_tasks", deny_tasks)):
        for name in names:
            if name.lower() not in known:
                near = difflib.get_close_matches(name.lower(), known, n=1)
                guess = f"; did you mean {near[0]!r}?" if near else ""
                broken = f" ({', '.join(sorted(unimported))} did not import)" if unimported else ""
                raise SettingsError(
                    f"expected names of tasks that are installed here in worker.{setting}, which are"
                    f" {', '.join(known)}{broken}, got {name!r}{guess}"
                )


class Agent:
    """Judge everything that reaches a worker.

    Of the tasks that it has, `allow_tasks` names those that it may run (none: all), and `deny_tasks` those that it may
    not, whatever the former says. `bounded`: all runs here have limits.

    Where runs end faster than messages come, it takes some ahead of its slots, and gives each slot the next ones
    before it asks; where they take longer, none.
    """

    def __init__(
        self,
        *,
        name: str,
        host: str,
        incarnation: int,
        home: str = "",
        slots: int,
        store_id: str,
        static_metadata: Mapping[str, Any],
        allow_tasks: Collection[str] = (),
        deny_tasks: Collection[str] = (),
        bounded: bool = False,
        make_token: Callable[[], str],
        wall: Callable[[], float],
    ) -> None:
        self.name = name
        self._host = host
        self._incarnation = incarnation
        self._home = home
        self._slots = {number: _Slot() for number in range(slots)}
        self._store_id = store_id
        self._static_metadata = dict(static_metadata)
        self._allowed = frozenset(name.lower() for name in allow_tasks)
        self._denied = frozenset(name.lower() for name in deny_tasks)
        self._bounded = bounded
        self._make_token = make_token
        self._wall = wall
        self._acts: list[Act] = []
        self._epoch: str | None = None
        self._term = 0
        self._term_heard_ns = 0
        self._present_ns = 0  # when we last did anything
        self._seq = 0
        self._analysis: Analysis | None = None
        self._metadata: dict[str, Any] = {}
        self._metadata_version = incarnation * 1000
        self._asking: dict[str, _Asking] = {}
        self._runs: dict[str, _Run] = {}
        self._queue: deque[_Run] = deque()  # granted, and waiting for a slot; not those that wait to be alone
        self._pace = Pace()
        self._ended: list[float] = []  # what runs have taken that ended since we last did anything
        self._ended_ns = 0  # when we last heard of an end
        self._unsettled: dict[str, _Unsettled] = {}
        self._unsettled_bytes = 0
        self._beats: dict[int, _Beat] = {}
        self._assigned: str | None = None
        self._consuming: str | None = None
        self._prefetch = slots
        self._draining = False  # for good
        self._told_to_drain = False  # by the scheduler, until it assigns a queue again
        self._leaving = False  # ... and to end when nothing runs
        self._holds: dict[str, str] = {}  # what is in the way of taking work, and why
        self._hello_wanted = self._beat_wanted = False
        self._hello_since: int | None = (
            None  # the first heartbeat with what has to be known; None: answered, or not said
        )
        self._stage_news = False
        self._beaten_ns = 0
        self._blocked = False  # the broker takes nothing
        self.refused: str | None = None  # why the scheduler does not want this worker
        self.heard = False  # whether the scheduler has answered in this life of the connection

    # ------------------------------------------------------------ what the worker takes

    def take_acts(self, now_ns: int) -> list[Act]:
        """Hand over what is to be done, in order."""
        self._note_absence(now_ns)
        for seconds in self._ended:
            self._pace.ended(seconds, now_ns / 1e9)
            self._ended_ns = now_ns
        self._ended.clear()
        self._fill(now_ns)
        self._start_alone(now_ns)
        self._adjust_consumer()
        self._report(now_ns)
        acts, self._acts = self._acts, []
        return acts

    # ------------------------------------------------------------ the connection

    def connected(self, epoch: str) -> None:
        """Begin with a new connection: nobody consumes yet, and everything unanswered is said again."""
        self._epoch = epoch
        self._assigned = self._consuming = None
        self._resend()

    def disconnected(self) -> None:
        """Hold on to runs and claims without a connection."""
        self._epoch = self._consuming = None
        self.heard = False

    def blocked(self, *, blocked: bool) -> None:
        """Say nothing while the broker takes nothing: it would only pile up here; say all of it when it ends."""
        if self._blocked and not blocked:
            self._resend()
        self._blocked = blocked

    def _resend(self) -> None:
        self._hello_wanted = self._beat_wanted = True
        for unsettled in self._unsettled.values():
            unsettled.sent_ns = None

    # ------------------------------------------------------------ the host

    def analyzed(self, analysis: Analysis) -> None:
        """Take a fresh look at the host; the administrator's word counts more than what was found.

        Raises:
            HostUnfit: there are more metadata than a scheduler takes; the text names the largest. The last view stays.
        """
        metadata = {**analysis.metadata, **self._static_metadata}
        encoded = msgspec.json.encode(metadata)
        if len(encoded) > MAX_METADATA_BYTES:
            raise HostUnfit(_too_many(metadata, len(encoded)))
        same = encoded == msgspec.json.encode(self._metadata)  # 1, True and 1.0 are three values
        if self._analysis is not None and same and analysis.tasks == self._analysis.tasks:
            return
        self._analysis = analysis
        self._metadata = metadata
        self._metadata_version += 1
        self._hello_wanted = self._beat_wanted = True
        for asking in self._asking.values():
            if asking.claims is not False:
                asking.refusal = self._why_not(asking.ticket.request, analysis)
                asking.metadata_version = self._metadata_version
        for run in [run for run in self._runs.values() if run.slot is None]:  # it may wait to be alone for long
            self._judge_anew(run)
        for number in self._slots:  # what comes back is judged before it begins
            self._recall(number)

    def _judge_anew(self, run: _Run) -> None:
        """Give a run back that has not begun, if it may not run here any more."""
        if run.judged == self._metadata_version or self._analysis is None:
            return
        run.judged = self._metadata_version
        if (refusal := self._why_not(run.request, self._analysis)) is not None:
            self._kill(run, "unable", refusal)

    # ------------------------------------------------------------ tickets

    def tickets(self, delivery: Any, tickets: Sequence[Ticket]) -> None:
        """Take the tickets of one message: claim or refuse each, or give them all back if no slot is free."""
        hand = _Hand(delivery)
        asked = {(one.ticket.request.id, one.ticket.attempt): one for one in self._asking.values()}
        running = {(run.request.id, run.attempt) for run in self._runs.values()}
        new: list[Ticket] = []
        for ticket in tickets:
            name = ticket.request.id, ticket.attempt
            if name in asked:
                # Offered twice, or redelivered on a new connection: there, acknowledging the former does nothing.
                self._let_go(asked[name].hand)
                asked[name].hand = hand
                hand.unanswered += 1
            elif name not in running:
                new.append(ticket)
        out = self._draining or self._told_to_drain or self._holds
        if new and (out or self._analysis is None or self._free() <= 0):
            if not hand.unanswered:  # else they are offered again in a while
                self._acts.append(Requeue(delivery))
            return
        for ticket in new:
            self._ask(hand, ticket)
        if not hand.unanswered:
            self._acts.append(Ack(delivery))

    def _ask(self, hand: _Hand, ticket: Ticket) -> None:
        hand.unanswered += 1
        self._beat_wanted = self._beat_wanted or ticket.alone  # its other slots are not to be had now
        token = self._make_token()
        self._asking[token] = _Asking(
            hand=hand,
            ticket=ticket,
            token=token,
            refusal=None if self._analysis is None else self._why_not(ticket.request, self._analysis),
            metadata_version=self._metadata_version,
        )

    def _let_go(self, hand: _Hand) -> None:
        """Count a ticket as answered; its message is acknowledged with the last one."""
        hand.unanswered -= 1
        if not hand.unanswered:
            self._acts.append(Ack(hand.delivery))

    def _why_not(self, request: Request, analysis: Analysis) -> str | None:
        """Re-check a request against this worker's own metadata; return why it must not run here."""
        if not Task.is_valid_task_name(request.task):
            return f"this worker has no task {request.task!r}"
        task = Task.class_from_name(request.task)()
        if task.name not in analysis.tasks:
            return f"task {task.name} did not analyse cleanly here: {analysis.failures.get(task.name, 'it is new')}"
        if (setting := self._denial(task.name)) is not None:
            return f"this worker's administrator does not let it run the task {task.name}: {setting}"
        try:
            if request.requires is not None and not requires.satisfied(request.requires, self._metadata):
                return "this worker's own metadata do not satisfy the request's `requires`"
        except Exception as error:  # noqa: BLE001  # a schema from a stranger: what raises counts as "no", and is told
            return f"the request's `requires` could not be judged: {type(error).__name__}: {error}"
        try:
            task.configure(request.data)
        except TaskConfigError as error:
            return f"this worker's version of the task does not accept the data: {error}"
        except Exception as error:  # noqa: BLE001  # a task's own code: what raises counts as "no", and is told
            return f"this worker's version of the task could not be configured: {type(error).__name__}: {error}"
        able, problem = ask_plainly(lambda metadata, _: task.can_run_on(metadata), self._metadata, {})
        if problem is not None:
            return f"can_run_on() raised {problem}"
        return None if able else "can_run_on() says no, by this worker's own metadata"

    def _denial(self, task: str) -> str | None:
        """Return the setting by which this worker must not run a task."""
        if task in self._denied:
            return "worker.deny_tasks names it"
        if self._allowed and task not in self._allowed:
            return "worker.allow_tasks does not name it"
        return None

    # ------------------------------------------------------------ verdicts

    def _note_absence(self, now_ns: int) -> None:
        """Do not take the time in which we were frozen for a silence of the scheduler's."""
        away_ns, self._present_ns = now_ns - self._present_ns, now_ns
        if away_ns > ABSENCE_NS:
            self._term_heard_ns += away_ns

    def verdict(self, verdict: Verdict, now_ns: int) -> None:
        """Take the scheduler's answers; those of an older term count for nothing while the newer one is heard."""
        self._note_absence(now_ns)
        if verdict.term < self._term and now_ns - self._term_heard_ns < TERM_PATIENCE_NS:
            return
        self._term_heard_ns = now_ns
        if verdict.term != self._term:
            if self._term:
                self._resend()
            self._term = verdict.term
        self.heard = True
        for part in verdict.parts:
            match part:
                case Granted():
                    self._granted(part, now_ns)
                case Void():
                    asking = self._asking.pop(part.token, None)
                    if asking is not None:
                        self._let_go(asking.hand)
                        self._beat_wanted = self._beat_wanted or asking.ticket.alone
                case Drain():
                    self._told_to_drain = True
                    self._leaving = self._leaving or part.stop
                    self._beat_wanted = True
                case Alive():
                    self._alive(part)
                case Abort():
                    self._abort(part, now_ns)
                case Recorded():
                    if (known := self._unsettled.pop(part.token, None)) is not None:
                        self._unsettled_bytes -= known.size
                        self._acts.append(Unspool(known.outcome))  # and not whatever else the answer may name
                        if part.status != "recorded":
                            logger.warning(
                                "an outcome does not count",
                                extra={"request": part.request, "attempt": part.attempt, "reason": part.reason},
                            )
                case Assign():
                    self._assign(part)
                case Introduce():
                    self._hello_wanted = self._beat_wanted = True
                    self._acts.append(Analyze())

    def _granted(self, granted: Granted, now_ns: int) -> None:
        asking = self._asking.pop(granted.token, None)
        if asking is None:
            return  # said twice
        self._let_go(asking.hand)
        request = asking.ticket.request
        sent_ns = asking.sent_ns or 0
        deadline_ns = lease_deadline_ns(sent_ns, granted.lease)
        self._pace.answered((now_ns - sent_ns) / 1e9)
        if asking.abort is not None:
            self._settle(granted, request.task, "aborted", Reason(text=asking.abort))
            return
        if asking.refusal is not None:
            self._settle(granted, request.task, "handed_back", Reason(text=asking.refusal))
            return
        alone = asking.ticket.alone
        self._beat_wanted = self._beat_wanted or alone
        if self._draining or self._holds or now_ns >= deadline_ns:
            why = self.held or "the worker could not start it in time, or is stopping"
            self._settle(granted, request.task, "handed_back", Reason(text=why))
            return
        run = _Run(
            slot=None,
            request=request,
            attempt=granted.attempt,
            token=granted.token,
            inputs=granted.inputs,
            lease=granted.lease,
            deadline_ns=deadline_ns,
            grace=float(getattr(Task.class_from_name(request.task), "TERMINATE_GRACE", DEFAULT_GRACE)),
            since=self._wall(),
            judged=asking.metadata_version,
            granted_ns=now_ns,
            alone=alone,
        )
        self._runs[granted.token] = run
        if alone:
            self._progress(run, stage="waits to be alone", fraction=None)
        else:
            self._queue.append(run)

    def _fill(self, now_ns: int) -> None:
        """Give slots what waits for them: idle ones first, then those that will be idle before they could ask."""
        while self._queue:
            slot = self._slot_for(self._queue[0], now_ns)
            if slot is None:
                break
            run = self._queue.popleft()
            self._judge_anew(run)
            if run.token in self._runs:
                self._give(run, slot, now_ns)
        self._note_begun(now_ns)

    def _slot_for(self, run: _Run, now_ns: int) -> int | None:
        best, fewest = None, self._depth() if not self._is_apart(run) else 1
        for number, slot in self._slots.items():
            if len(slot.runs) < fewest and slot.ready and not slot.dying and self._may_follow(slot, now_ns):
                best, fewest = number, len(slot.runs)
        return best

    def _may_follow(self, slot: _Slot, now_ns: int) -> bool:
        """Say whether a run may be put behind those of a slot: they seem short, and nothing looks at one of them."""
        if not slot.runs:
            return True
        first, last = self._runs[slot.runs[0]], self._runs[slot.runs[-1]]
        slow = first.begun_ns is None or now_ns - first.begun_ns > AHEAD_NS
        return not (slow or slot.recalled or self._is_apart(last) or first.abort is not None)

    def _is_apart(self, run: _Run) -> bool:
        """Say whether a run needs its slot for itself from the beginning: it is measured."""
        return self._bounded or run.alone or run.request.limits is not None or run.request.timeout is not None

    def _depth(self) -> int:
        """Return how many runs a slot is given: one, and a part of what is taken ahead for it."""
        return 1 + min(MAX_GIVEN, int(self._pace.ahead(1, self._present_ns / 1e9) * GIVEN_PART))

    def is_supplied(self, number: int) -> bool:
        """Say whether a slot has so much to do that what it says may wait for a moment."""
        return len(self._slots[number].runs) > 1 + self._depth() // 4

    def _give(self, run: _Run, number: int, now_ns: int) -> None:
        slot = self._slots[number]
        run.slot, run.stage = number, None
        if run.request.timeout is not None:
            run.timeout_ns = now_ns + int(run.request.timeout * 1e9)
        slot.runs.append(run.token)
        self._acts.append(
            StartRun(
                slot=number,
                token=run.token,
                request=run.request,
                attempt=run.attempt,
                inputs=run.inputs,
                deadline_ns=run.slot_ends_ns(),
            )
        )
        self._look_who_begins(slot)

    def _look_who_begins(self, slot: _Slot) -> None:
        """Take it that a slot has begun the first of its runs."""
        run = self._runs.get(slot.run or "")
        if run is not None and run.stage is None:
            run.stage = "start"
            run.since = self._wall()
            if run.doomed is not None:
                self._kill(run, *run.doomed)

    def _note_begun(self, now_ns: int) -> None:
        """Look when runs began that had begun at the last look, or later."""
        for slot in self._slots.values():
            run = self._runs.get(slot.run or "")
            if run is not None and run.begun_ns is None:
                run.begun_ns = now_ns

    def _start_alone(self, now_ns: int) -> None:
        """Start what waits to be alone, once nothing else runs here or may come to run, and what has is on disk."""
        waiting = next((run for run in self._runs.values() if run.alone), None)
        if waiting is None or self._asking or self._queue or any(run.slot is not None for run in self._runs.values()):
            return
        idle = self._idle()
        if idle and not self._draining and all(one.sendable for one in self._unsettled.values()):
            self._give(waiting, idle[0], now_ns)

    def _ahead(self) -> int:
        """Return how many runs to take ahead of the slots."""
        return min(MAX_AHEAD, self._pace.ahead(len(self._slots), self._present_ns / 1e9))

    def _has_begun(self, run: _Run) -> bool:
        return run.slot is not None and self._slots[run.slot].run == run.token

    def _recall(self, number: int) -> None:
        """Take back from a slot what it has not begun."""
        slot = self._slots[number]
        if len(slot.runs) > 1 and slot.ready and not slot.dying and not slot.recalled:
            slot.recalled = True
            self._acts.append(RecallRuns(slot=number))

    def _take_back(self, tokens: Sequence[str]) -> None:
        """Let runs wait for a slot again, before all others, which their slot has not begun."""
        for run in [self._runs[token] for token in reversed(tokens)]:
            if run.slot is None or run.killed is not None:
                continue
            self._slots[run.slot].runs.remove(run.token)
            run.slot = run.stage = run.begun_ns = None
            if run.abort is not None:
                self._end(run, "aborted", Reason(text=run.abort))
            elif run.doomed is not None:
                self._kill(run, *run.doomed)
            else:
                self._queue.appendleft(run)

    def _alive(self, alive: Alive) -> None:
        if self._hello_since is not None and alive.seq >= self._hello_since:
            self._hello_since = None
        beat = self._beats.get(alive.seq)
        if beat is None:
            return
        void = {ref.token for ref in alive.void}
        for token in beat.tokens:
            run = self._runs.get(token)
            if run is None:
                continue
            if token in void:
                self._kill(run, "void", "the scheduler does not know this run any more")
            else:
                before = run.slot_ends_ns()
                run.deadline_ns = max(run.deadline_ns, lease_deadline_ns(beat.sent_ns, run.lease))
                if run.slot is not None and run.slot_ends_ns() > before:
                    self._acts.append(RenewRun(slot=run.slot, token=token, deadline_ns=run.slot_ends_ns()))
        for seq in [seq for seq in self._beats if seq <= alive.seq]:
            del self._beats[seq]

    def _abort(self, abort: Abort, now_ns: int) -> None:
        asking = self._asking.get(abort.token)
        if asking is not None:
            asking.abort = abort.reason
        run = self._runs.get(abort.token)
        if run is None or run.abort is not None or run.over:
            return
        run.abort = abort.reason
        if run.slot is None:
            self._end(run, "aborted", Reason(text=abort.reason))
        else:
            self._stop(run, run.slot, abort.reason, now_ns)

    def _stop(self, run: _Run, slot: int, reason: str, now_ns: int) -> None:
        run.kill_ns = now_ns + int(run.grace * 1e9) + ABORT_MARGIN_NS
        self._acts.append(StopRunIn(slot=slot, token=run.token, reason=reason))
        if not self._has_begun(run):
            self._recall(slot)

    def _assign(self, assign: Assign) -> None:
        before, self.refused = self.refused, assign.reason
        if assign.reason is not None and assign.reason != before:
            logger.error("the scheduler does not take this worker", extra={"reason": assign.reason})
        if assign.queue is not None and self._told_to_drain and not self._leaving:
            self._told_to_drain = False
            self._beat_wanted = True
        if assign.queue != self._assigned:
            self._assigned = assign.queue
            self._beat_wanted = True

    # ------------------------------------------------------------ slots

    def slot_said(self, number: int, word: SlotWord) -> None:
        """Take a slot's word."""
        slot = self._slots[number]
        run = self._runs.get(slot.run) if slot.run is not None else None
        if isinstance(word, SlotEnded) and run is not None and run.out_of_memory:
            word = _with_memory(word)
        match word:
            case SlotReady():
                slot.ready = not slot.dying  # else it is killed all the same
                if slot.run is None:
                    self._beat_wanted = True
            case SlotProgress(stage=stage, fraction=fraction) if run is not None:
                run.told = True
                self._progress(run, stage=stage, fraction=fraction)
            case SlotOutput(text=text) if run is not None:
                self._show(run, text)
            case SlotRecalled(tokens=tokens):
                slot.recalled = False
                self._take_back([token for token in tokens if token in slot.runs])
            case SlotEnded() if run is not None:
                if word.last or word.left is not None:
                    slot.ready = False  # until the next process says so
                    self._take_back(slot.runs[1:])
                self._slot_ended(slot, run, word)

    def _slot_ended(self, slot: _Slot, run: _Run, word: SlotEnded) -> None:
        self._ended.append(max(0.0, self._wall() - run.since))
        if run.killed is not None:  # too late; but the slot may begin the next one before it dies
            if not word.last:
                slot.overtaken.append(run)
                slot.runs.remove(run.token)
                self._look_who_begins(slot)
        elif word.left is not None:
            run.ended = word
            self._progress(run, stage=f"ending: {word.left}", fraction=None)
        elif run.over and word.result == "aborted":  # by us, and not by anybody's wish
            self._end(run, "error", _over(run), ended=word)
        elif word.unfit is not None and word.result == "error":
            self.hold("work directory", word.unfit)
            self.not_started(run.token, f"the worker has no room for it: {word.unfit}")
        else:
            self._end(run, word.result, word.reason, ended=word)

    def outlived(self, number: int, what: str) -> None:
        """Take what still lives of a slot that has ended: its run is not over before that is gone, too."""
        run = self._runs.get(self._slots[number].run or "")
        if run is not None:
            self._progress(run, stage=f"ending: {what}", fraction=None)

    def out_of_memory(self, number: int) -> None:
        """Take what the kernel says: during a run, it has ended something on this host for want of memory."""
        run = self._runs.get(self._slots[number].run or "")
        if run is not None:
            run.out_of_memory = True

    def exceeded(self, number: int, token: str, status: str, text: str) -> None:
        """Take a limit that a run has exceeded: that ends it."""
        run = self._runs.get(token)
        if run is not None and self._slots[number].run == token:
            run.exceeded = Reason(text=text, stage=run.stage, status=status)
            self._kill(run, "limit", text)

    def not_started(self, token: str, why: str) -> None:
        """Take a run back that its slot was not told of, because there is no room to work."""
        run = self._runs.get(token)
        if run is not None:
            self._end(run, "handed_back", Reason(text=why, stage="start"))

    def hold(self, what: str, why: str | None) -> None:
        """Take no work while something is in the way; None: it is not any more."""
        if why == self._holds.get(what):
            return
        if why is None:
            del self._holds[what]
            logger.info("the worker may take work again", extra={"what": what})
        else:
            if what not in self._holds:
                logger.warning("the worker takes no work", extra={"what": what, "reason": why})
            self._holds[what] = why
            for run in list(self._queue):
                self._end(run, "handed_back", Reason(text=why, stage="start"))
        self._beat_wanted = True

    @property
    def held(self) -> str | None:
        """Say why this worker takes no work now; None: it does."""
        return "; ".join(self._holds.values()) or None

    def slot_babbled(self, number: int, problem: str) -> None:
        """Take it that a slot has said what is no word: whatever runs in it speaks for it, and is killed with it."""
        slot = self._slots[number]
        run = self._runs.get(slot.run) if slot.run is not None else None
        if run is not None and run.killed is None:
            run.babble = problem
            self._kill(run, "babble", problem)
        elif not slot.dying:
            slot.ready, slot.dying = False, True
            self._acts.append(KillSlot(slot=number, reason=problem))

    def slot_gone(self, number: int, exit_code: int, last_words: str = "") -> None:
        """Take the end of a slot's process, and what it had still to say; nothing that stems from it lives any more."""
        slot = self._slots[number]
        slot.ready = slot.dying = slot.recalled = False
        self._beat_wanted = True
        overtaken, slot.overtaken = slot.overtaken, []
        begun = self._runs.get(slot.run or "")
        self._take_back(slot.runs[1:])
        if begun is not None and overtaken and begun.killed is None:
            why = f"its slot was killed because of the run before it ({overtaken[-1].request.id})"
            self._end(begun, "handed_back", Reason(text=why, stage=begun.stage))
        elif begun is not None:
            overtaken.append(begun)
        for run in overtaken:
            self._judge_gone(run, exit_code, last_words)

    def _judge_gone(self, run: _Run, exit_code: int, last_words: str) -> None:
        """Say how a run ended whose slot has."""
        if news := _after(run.tail, last_words):
            self._show(run, news)
        stage = run.stage
        match self._why_gone(run, exit_code):
            case "void":
                self._leave_slot(run)
                self._acts.append(Discard(run.token))
            case "abort":
                self._end(
                    run, "aborted", Reason(text=f"{run.abort} (it did not stop in time and was killed)", stage=stage)
                )
            case "stop":
                self._end(run, "handed_back", Reason(text="the worker was stopped", stage=stage))
            case "unable":
                self._end(run, "handed_back", Reason(text=run.doomed[1] if run.doomed else "", stage=stage))
            case "babble":
                self._end(run, "error", Reason(text=f"what its slot said cannot be read: {run.babble}", stage=stage))
            case "timeout":
                self._end(run, "error", _over(run, "it did not stop in time and was killed"))
            case "limit":
                self._end(run, "error", run.exceeded)
            case _ if run.ended is not None:
                self._end_as_said(run, run.ended)
            case "lease":
                self._end(
                    run, "lost", Reason(text=f"its lease of {run.lease:g} s was not renewed in time", stage=stage)
                )
            case _:
                self._end(run, *_judge_death(exit_code, stage, run.tail, out_of_memory=run.out_of_memory))

    @staticmethod
    def _why_gone(run: _Run, exit_code: int) -> str | None:
        """Say why a slot ended in the middle of a run; None: by nobody's order."""
        if run.killed is None and exit_code == SLOT_LAPSED:
            return "timeout" if run.slot_ends_ns() < run.deadline_ns else "lease"
        return "timeout" if run.killed is None and run.over else run.killed

    def _end_as_said(self, run: _Run, ended: SlotEnded) -> None:
        said = "" if ended.reason is None else f"{ended.reason.text} "
        text = f"{said}(at its end, this was in the way: {ended.left})"
        self._end(run, ended.result, msgspec.structs.replace(ended.reason or Reason(text=""), text=text), ended=ended)

    def _end(self, run: _Run, result: OutcomeResult, reason: Reason | None, *, ended: SlotEnded | None = None) -> None:
        self._leave_slot(run)
        self._settle(run.ref(), run.request.task, result, reason, since=run.since, ended=ended)

    def _leave_slot(self, run: _Run) -> None:
        del self._runs[run.token]
        self._beat_wanted = self._beat_wanted or run.alone  # other slots are to be had again
        if run.slot is None:
            if run in self._queue:
                self._queue.remove(run)
            return
        slot = self._slots[run.slot]
        if run.token in slot.runs:
            slot.runs.remove(run.token)
            self._look_who_begins(slot)

    def _settle(
        self,
        ref: RunRef,
        task: str,
        result: OutcomeResult,
        reason: Reason | None,
        *,
        since: float | None = None,
        ended: SlotEnded | None = None,
    ) -> None:
        now = self._wall()
        outcome = Outcome(
            request=ref.request,
            attempt=ref.attempt,
            token=ref.token,
            result=result,
            reason=None if reason is None else bounded(reason),
            again=ended is not None and ended.again,
            started=now if since is None else since,
            ended=now,
            artifacts=[] if ended is None else ended.artifacts,
        )
        size = len(encode(outcome))
        if size > MAX_OUTCOME_BYTES or len(outcome.artifacts) > MAX_LISTED:
            text = (
                f"expected artifacts that are described in at most {MAX_DESCRIBED_BYTES} bytes, at most {MAX_LISTED} of"
                f" them, got an outcome of {size} bytes with {len(outcome.artifacts)}: put large data into files"
            )
            stage = None if outcome.reason is None else outcome.reason.stage
            outcome = msgspec.structs.replace(
                outcome, result="error", reason=Reason(text=text, stage=stage, status=result), artifacts=[]
            )
            size = len(encode(outcome))
        self._keep(outcome, size)
        self._acts.append(Spool(outcome, task.lower(), litter=ended is None or ended.litter))

    def _keep(self, outcome: Outcome, size: int) -> _Unsettled:
        self._unsettled_bytes += size
        unsettled = self._unsettled[outcome.token] = _Unsettled(outcome=outcome, size=size)
        return unsettled

    def _show(self, run: _Run, text: str) -> None:
        run.log_seq += 1
        run.tail = (run.tail + text)[-LOG_TAIL:]
        self._acts.append(
            PublishLog(
                LogText(
                    request=run.request.id,
                    attempt=run.attempt,
                    worker=self.name,
                    time=self._wall(),
                    seq=run.log_seq,
                    text=shortened(text, MAX_LOG),
                )
            )
        )

    def _progress(self, run: _Run, *, stage: str | None, fraction: float | None) -> None:
        if stage is not None and (stage := stage[:MAX_STAGE]) != run.stage:
            run.stage = stage
            self._stage_news = True
        run.fraction = None if fraction is None else min(1.0, max(0.0, fraction))
        self._acts.append(
            PublishLog(
                LogProgress(
                    request=run.request.id,
                    attempt=run.attempt,
                    task=run.request.task,
                    worker=self.name,
                    time=self._wall(),
                    since=run.since,
                    stage=run.stage,
                    fraction=run.fraction,
                )
            )
        )

    def _kill(self, run: _Run, why: str, text: str) -> None:
        if run.slot is None:
            if why == "void":
                self._leave_slot(run)
            else:
                waited = "to run alone here" if run.alone else "for a slot"
                self._end(run, "handed_back", Reason(text=f"it waited {waited}, and {text}"))
        elif not self._has_begun(run):
            run.doomed = run.doomed or (why, text)
            self._recall(run.slot)
        elif run.killed is None:
            run.killed = why
            self._slots[run.slot].dying = True
            self._acts.append(KillSlot(slot=run.slot, reason=text))

    # ------------------------------------------------------------ the spool

    def unspoolable(self, outcome: Outcome) -> None:
        """Take an outcome that cannot be written to disk, where there is no time to wait for that: it is sent so."""
        unsettled = self._unsettled.get(outcome.token)
        if unsettled is not None:
            unsettled.sendable = True

    def is_unsettled(self, token: str) -> bool:
        """Say whether an outcome is not answered yet."""
        return token in self._unsettled

    def spooled(self, outcome: Outcome) -> None:
        """Take an outcome that is on disk: now it can be sent."""
        unsettled = self._unsettled.get(outcome.token) or self._keep(outcome, len(encode(outcome)))
        unsettled.sendable = True

    # ------------------------------------------------------------ time

    def tick(self, now_ns: int) -> None:
        """Do what is due: leases that end, aborts that are ignored, heartbeats."""
        for run in list(self._runs.values()):
            if run.deadline_ns <= now_ns:
                self._kill(run, "lease", f"its lease of {run.lease:g} s was not renewed in time")
            elif run.ended is not None:
                continue  # nothing can be asked of it, and its slot is there to show what is left
            elif run.kill_ns is not None and run.kill_ns <= now_ns:
                self._kill(run, "timeout" if run.over else "abort", "it does not stop")
            elif run.slot is not None and run.abort is None and not run.over and now_ns >= (run.timeout_ns or inf):
                run.over = True
                self._stop(run, run.slot, _over(run).text, now_ns)
            if not run.told and self._epoch is not None and now_ns - (run.begun_ns or now_ns) >= UNTOLD_NS:
                run.told = self._stage_news = True
                self._progress(run, stage=run.stage, fraction=run.fraction)
        self._undo_what_was_too_much(now_ns)
        since = now_ns - self._beaten_ns
        if since >= self._beat_interval_ns() or (self._stage_news and since >= NEWS_NS):
            self._beat_wanted = True

    def _undo_what_was_too_much(self, now_ns: int) -> None:
        """Take runs back that wait behind one which takes long, and hand back what waits where nothing ends."""
        for number, slot in self._slots.items():
            begun_ns = self._runs[slot.runs[0]].begun_ns if slot.runs else None
            if begun_ns is not None and now_ns - begun_ns > AHEAD_NS:
                self._recall(number)
        if now_ns - self._ended_ns > STUCK_NS:
            for run in [run for run in self._queue if now_ns - run.granted_ns > STUCK_NS]:
                self._end(run, "handed_back", Reason(text="no slot came free for it in time", stage="start"))

    def _beat_interval_ns(self) -> int:
        """Return how long may pass between two heartbeats: a short lease needs several of them in its term."""
        return min([HEARTBEAT_NS, *(int(run.lease * 1e9) // BEATS_IN_A_LEASE for run in self._runs.values())])

    # ------------------------------------------------------------ leaving

    def drain(self) -> None:
        """Take no more tickets."""
        self._draining = True
        self._beat_wanted = True
        for run in [run for run in self._runs.values() if run.alone and run.slot is None]:
            self._kill(run, "stop", "the worker is stopping")

    def stop_runs(self) -> None:
        """Kill what runs, to hand it back; what has ended beside something that cannot be ended counts as it is."""
        for run in list(self._runs.values()):
            if run.ended is not None and run.killed is None:
                self._end_as_said(run, run.ended)
            else:
                self._kill(run, "stop", "the worker is stopping")

    def busy(self) -> bool:
        """Say whether a run is in a slot, or may come into one."""
        return bool(self._runs or self._asking)

    def wants_to_end(self) -> bool:
        """Say whether it was told to end when nothing runs, and nothing does."""
        return self._leaving and not self.busy() and not self._unsettled

    @property
    def consuming(self) -> str | None:
        """Return the queue that is consumed now."""
        return self._consuming

    def unsettled(self) -> int:
        """Count the outcomes that the ledger has not answered."""
        return len(self._unsettled)

    def slot_states(self) -> Mapping[str, int]:
        """Count the slots by state."""
        states = {"idle": 0, "running": 0, "starting": 0}
        for slot in self._slots.values():
            states["running" if slot.runs else "idle" if slot.ready else "starting"] += 1
        return states

    def bye(self, reason: str) -> None:
        """Say that this worker leaves."""
        if self._epoch is not None:
            self._send([Bye(reason=reason)])

    # ------------------------------------------------------------ inside

    def _idle(self) -> list[int]:
        return [number for number, slot in self._slots.items() if slot.ready and not slot.runs and not slot.dying]

    def _free(self) -> int:
        """Count what may be asked for: runs for idle slots, and ahead; none, while the ledger answers too little."""
        if len(self._unsettled) >= MAX_UNSETTLED or self._unsettled_bytes >= MAX_UNSETTLED_BYTES or self._has_alone():
            return 0
        waiting = len(self._asking) + len(self._queue) + sum(len(slot.runs[1:]) for slot in self._slots.values())
        return len(self._idle()) + self._ahead() - waiting

    def _has_alone(self) -> bool:
        """Say whether something here is to run alone: nothing else is to come."""
        return any(run.alone for run in self._runs.values()) or any(
            asking.ticket.alone and asking.asks_to_run() for asking in self._asking.values()
        )

    def _adjust_consumer(self) -> None:
        """Consume while a slot is free, and only then: a busy worker must attract no ticket."""
        wanted = None
        able = self._analysis is not None and not (self._draining or self._told_to_drain or self._holds)
        # To cancel and consume costs as much as some messages: so it begins again where it is worth it.
        ahead, slots = self._ahead(), len(self._slots)
        least = 0 if self._consuming is not None else ahead // 4
        if self._epoch is not None and not self._blocked and able and self._free() > least:
            wanted = self._assigned
        flooded = ahead >= (slots / 2 if self._prefetch > slots else slots)
        prefetch = slots + FLOOD_PREFETCH if flooded else slots
        if wanted == self._consuming and (wanted is None or prefetch == self._prefetch):
            return
        if self._consuming is not None:
            self._acts.append(Cancel(self._consuming))
        if wanted is not None:
            self._acts.append(Consume(wanted, prefetch))
        self._consuming, self._prefetch = wanted, prefetch

    def _report(self, now_ns: int) -> None:
        """Say what has not been said yet; with each heartbeat, all that is unanswered again."""
        if self._epoch is None or self._analysis is None or self._blocked:
            return
        parts: list[ReportPart] = []
        beat = self._beat_wanted
        if self._hello_wanted:
            self._hello_since = self._seq + 1
        if self._hello_wanted or (beat and self._hello_since is not None):
            self._hello_wanted = False
            parts.append(self._hello(self._analysis))
        if beat:
            self._beat_wanted = self._stage_news = False
            self._beaten_ns = now_ns
            parts.append(self._heartbeat())
        for asking in self._asking.values():
            if asking.sent_ns is None or beat:
                asking.sent_ns = asking.sent_ns or now_ns
                if asking.claims is None and asking.refusal is not None:
                    task = asking.ticket.request.task
                    known = Task.is_valid_task_name(task)
                    self._acts.append(CountRefusal(task.lower() if known else "unknown"))  # as in the scheduler's
                asking.claims = asking.asks_to_run()
                parts.append(self._question(asking))
        if parts:
            self._send(parts)
            if beat:
                self._beats[self._seq] = _Beat(sent_ns=now_ns, tokens=list(self._runs))
                if len(self._beats) > BEATS_KEPT:
                    del self._beats[min(self._beats)]
        due = [
            unsettled
            for unsettled in self._unsettled.values()
            if unsettled.sendable
            and (unsettled.sent_ns is None or (beat and now_ns - unsettled.sent_ns >= HEARTBEAT_NS))
        ]
        for unsettled in due:
            unsettled.sent_ns = now_ns
        for outcomes in outcome_sets(unsettled.outcome for unsettled in due):
            self._acts.append(PublishOutcomes(Outcomes(worker=self.name, epoch=self._epoch, outcomes=outcomes)))

    def _send(self, parts: list[ReportPart]) -> None:
        self._seq += 1
        self._acts.append(
            PublishReport(
                Report(
                    worker=self.name,
                    epoch=self._epoch or "",
                    seq=self._seq,
                    incarnation=self._incarnation,
                    home=self._home,
                    parts=parts,
                )
            )
        )

    def _hello(self, analysis: Analysis) -> Hello:
        return Hello(
            host=self._host,
            slots=len(self._slots),
            tasks={name: version for name, version in analysis.tasks.items() if self._denial(name) is None},
            denied=sorted(name for name in analysis.tasks if self._denial(name) is not None),
            metadata=self._metadata,
            metadata_version=self._metadata_version,
            store=self._store_id,
            version=__version__,
        )

    def _heartbeat(self) -> Heartbeat:
        alive = sum((slot.ready or bool(slot.runs)) and not slot.dying for slot in self._slots.values())
        draining = self._draining or self._told_to_drain
        return Heartbeat(
            queue=self._consuming,
            assigned=self._assigned,
            slots=0 if draining or self._has_alone() else len(self._runs) if self._holds else alive,
            draining=draining,
            leaving=self._draining or self._leaving,
            running=[
                RunProgress(
                    request=run.request.id,
                    attempt=run.attempt,
                    token=run.token,
                    since=run.since,
                    stage=run.stage,
                    fraction=run.fraction,
                )
                for run in self._runs.values()
            ],
            claiming=[asking.ref() for asking in self._asking.values() if asking.asks_to_run()],
            unsettled=[
                RunRef(request=one.outcome.request, attempt=one.outcome.attempt, token=one.outcome.token)
                for one in islice(self._unsettled.values(), MAX_LISTED)  # what a predecessor left may be more
            ],
            held=self.held,
        )

    def _question(self, asking: _Asking) -> Claim | Refusal:
        ref = asking.ref()
        if asking.asks_to_run():
            return Claim(
                request=ref.request, attempt=ref.attempt, token=ref.token, metadata_version=self._metadata_version
            )
        return Refusal(
            request=ref.request,
            attempt=ref.attempt,
            token=ref.token,
            reason=shortened(asking.refusal or ""),
            metadata_version=asking.metadata_version,
        )


def _after(told: str, left: str) -> str:
    """Cut from what a slot left what it had told already: a slot that dies between the two has done both."""
    for length in range(min(len(told), len(left)), 0, -1):
        if told.endswith(left[:length]):
            return left[length:]
    return left


def _too_many(metadata: Mapping[str, Any], size: int) -> str:
    sizes = {key[:LARGEST_KEY]: len(msgspec.json.encode(value)) for key, value in metadata.items()}
    largest = ", ".join(f"{key!r} ({sizes[key]} bytes)" for key in nlargest(LARGEST, sizes, key=sizes.__getitem__))
    return (
        f"expected metadata of at most {MAX_METADATA_BYTES} bytes as JSON, got {size}; the largest are {largest}: have"
        " the tasks, or worker.metadata, say less"
    )


def _over(run: _Run, more: str | None = None) -> Reason:
    """Say that a run has taken longer than it may."""
    text = f"ran longer than its timeout of {run.request.timeout:g} s"
    return Reason(text=f"{text} ({more})" if more else text, stage=run.stage, status="timeout")


def _with_memory(ended: SlotEnded) -> SlotEnded:
    """Tell beside a bad end that the kernel was killing: perhaps a child of the run, whose task cannot know that."""
    if ended.result not in {"failure", "error"}:
        return ended
    said = "" if ended.reason is None else f"{ended.reason.text} "
    text = f"{said}(meanwhile this host was out of memory, and the kernel killed processes, perhaps of this run)"
    status = None if ended.reason is None else ended.reason.status
    reason = msgspec.structs.replace(ended.reason or Reason(text=""), text=text, status=status or "memory")
    return msgspec.structs.replace(ended, reason=reason)


def _judge_death(exit_code: int, stage: str | None, tail: str, *, out_of_memory: bool) -> tuple[OutcomeResult, Reason]:
    """Say what it means that a slot's process ended in the middle of a run, by nobody's order."""
    line = next((line.strip() for line in reversed(tail.splitlines()) if line.strip()), None)
    if exit_code == -9:  # noqa: PLR2004  # SIGKILL, which no task sends to itself by mistake
        if out_of_memory:
            text = "the slot's process was killed (SIGKILL) when this host was out of memory"
            return "lost", Reason(text=text, stage=stage, exit_code=exit_code, status="memory", line=line)
        text = "the slot's process was killed (SIGKILL) by somebody on this host"
        return "lost", Reason(text=text, stage=stage, exit_code=exit_code, line=line)
    how = f"exit code {exit_code}" if exit_code >= 0 else f"signal {-exit_code}"
    text = f"the task ended its process ({how}) without an outcome"
    return "error", Reason(text=text, stage=stage, exit_code=exit_code, line=line)
