"""The facts as they go into the ledger and come out: writes, what becomes of them, and what is read again.

Data alone: what a write does stands in ledger, what a state means in lifecycle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from mqworker.lifecycle import State
from mqworker.messages import Artifact, OutcomeResult, PauseKind, Reason, Request

# ---------------------------------------------------------------- writes


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Keep a requirement class, as far as it is not kept already."""

    id: int  # given by the scheduler; never used twice
    task: str
    fingerprint: str
    reads: str  # JSON
    data: str  # JSON
    requires: str | None  # JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept:
    """Keep a submission: pending, or rejected for a reason.

    What it comes after and takes from must have been accepted before it, also in the same set; else it is rejected.
    What of that has ended already counts at once: if it cannot be met any more, the request is aborted at once. So is
    what was to be aborted before it came.
    """

    seq: int  # given by the scheduler; rises with each, gaps are fine
    request: Request
    at: float
    rejected: Reason | None = None
    requirement: int | None = None  # its requirement class; None only for what is rejected
    inputs: tuple[int, ...] = ()  # artifact ids that its data name
    submitter: str | None = None  # the broker's user; None: the broker did not say
    heeds: frozenset[str | None] | None = None  # users whose abort that came before it counts; None: everybody's


@dataclass(frozen=True, slots=True, kw_only=True)
class Wake:
    """End a pending request's delay; the result says whether it had one."""

    request: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Give a request that has not ended another priority."""

    request: str
    priority: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Move waiting to offered; the result says whether it did.

    Waiting means pending, with all needs met and no delay. A doubled submission's own seq moves nothing.
    """

    request: str
    attempt: int
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Return:
    """Move offered to pending; the result says whether it did."""

    request: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Move offered to running, for one token."""

    request: str
    attempt: int
    token: str
    worker: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """End the run of (request, attempt, token), and record its artifacts with it.

    An outcome whose artifacts contradict themselves (a relation to an artifact that does not exist, a handle used
    twice) is still recorded, since one worker's mistake must not hold up the set it came in; but its request ends in
    error, with a reason that names the contradiction, and its artifacts are kept without the relations in question.

    What comes after a request that ended for good is settled with it, and what comes after that, too.
    """

    request: str
    attempt: int
    token: str
    worker: str
    result: OutcomeResult
    reason: Reason | None
    started: float | None
    ended: float
    to: State
    counted: bool  # towards max_attempts
    not_before: float | None
    artifacts: Sequence[Artifact]
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortAsked:
    """Abort a request that does not run, mark one that does, leave one that has ended.

    What comes after a request that was aborted is settled with it, and what comes after that, too.
    """

    request: str
    reason: str
    at: float
    stage: str | None = None  # of the reason
    running: bool = True  # False: leave one that runs
    mark: bool = False  # keep it for a request that nobody knows yet
    known: bool = True  # False: leave one that has come meanwhile, since nobody has judged who may abort it
    user: str | None = None  # the broker's user that asked; None: the broker did not say


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmark:
    """Forget the aborts of requests that have not come; the result is their number."""

    before: float  # asked for before then


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """Record an artifact that no request made; the same key again is the same artifact."""

    key: str
    artifact: Artifact
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Remember a pause; the result says whether it is new.

    The same one again keeps the time of the first, and gets the reason of the last.
    """

    kind: PauseKind
    name: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """Forget a pause; the result says whether there was one."""

    kind: PauseKind
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """Make a worker's name that of a broker's user; None: nobody's. The result says whether it was somebody's."""

    name: str
    user: str | None
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rekey:
    """Put requests that have not ended into other requirement classes; the result is their number."""

    to: Mapping[int, int]  # seq to requirement class


Write: TypeAlias = (
    Need
    | Accept
    | Wake
    | Move
    | Offer
    | Return
    | Grant
    | End
    | AbortAsked
    | Unmark
    | Import
    | Pause
    | Resume
    | Own
    | Rekey
)

# ---------------------------------------------------------------- what is read


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """Show a request that has not ended, with all that a scheduler must know of it."""

    seq: int
    request: Request  # with its present priority, and the ids of the artifacts that it takes in its data
    requirement: int
    inputs: tuple[int, ...]  # artifact ids in its data, also those that it takes
    unmet: int  # requests that it still waits for
    state: State
    attempt: int
    tried: int
    worker: str | None
    token: str | None
    abort: str | None
    not_before: float | None
    submitted: float


class LaneRow(NamedTuple):
    """Say where a pending request stood; waiting: it had no delay, and nothing to wait for."""

    requirement: int
    priority: int
    group: str
    key: str | None
    seq: int
    waiting: bool


class LaneCount(NamedTuple):
    """Count the waiting requests that dispatch tells apart by age alone."""

    requirement: int
    priority: int
    group: str
    key: str | None
    number: int


class Wanted(NamedTuple):
    """Ask for the oldest waiting requests of a lane that are younger than `after`."""

    requirement: int
    priority: int
    group: str
    key: str | None
    after: int
    limit: int


class Expired(NamedTuple):
    """Show what is not granted by the time it had to be, and when the next will not be; None: there is no other."""

    requests: tuple[tuple[str, float], ...]  # with when each expired, the first of them first
    next: float | None


class RequirementRow(NamedTuple):
    """Show a requirement class."""

    id: int
    task: str
    fingerprint: str
    reads: str
    data: str
    requires: str | None


# ---------------------------------------------------------------- what becomes of writes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stranded:
    """Show a pending request that was aborted, since what it needed cannot be had any more."""

    seq: int
    id: str
    task: str
    reason: Reason
    requirement: int
    priority: int
    group: str
    key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """Say what became of an Accept."""

    seq: int
    status: Literal["accepted", "known", "rejected", "conflict"]
    reason: str | None = None  # why it is rejected, or a conflict
    state: State | None = None  # pending, rejected, or aborted at once; None: this Accept changed nothing
    unmet: int = 0  # requests that it waits for
    stranded: Reason | None = None  # why it was aborted at once
    live: Live | None = None  # if artifacts were put into its data at once; else it is as it was given


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Say what became of a Move; None: no such request, or it has ended."""

    live: Live | None
    before: int | None  # its priority until now


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Say what became of an End."""

    status: Literal["recorded", "refused", "unknown"]
    reason: str | None = None
    artifacts: dict[str, int] = field(default_factory=dict)  # handle to id
    state: State | None = None  # where this End took its request; None: it changed nothing
    freed: tuple[Live, ...] = ()  # those that came after it and wait for no other
    stranded: tuple[Stranded, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortResult:
    """Say what became of an AbortAsked; None: no such request."""

    before: State | None
    after: State | None
    marked: bool = False  # it is kept for a request that nobody knows yet
    full: bool = False  # it is not: its user has as many of these as one may
    task: str | None = None
    attempt: int | None = None
    before_lane: LaneRow | None = None  # where it stood, if it was pending
    freed: tuple[Live, ...] = ()  # those that came after it and wait for no other
    stranded: tuple[Stranded, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportRefused:
    """Say why an Import recorded nothing."""

    reason: str


Granting: TypeAlias = Literal["granted", "again", "void"]
Imported: TypeAlias = int
Rekeyed: TypeAlias = int
Unmarked: TypeAlias = int
Result: TypeAlias = (
    Accepted | bool | Moved | Granting | Ended | AbortResult | Imported | ImportRefused | Rekeyed | Unmarked
)
