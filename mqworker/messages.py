"""The words on the wire: every message as a struct, and the one way to read and write them.

Knows no broker, no ledger and no clock: it says things and does nothing. Times are seconds since the epoch (UTC);
what ends in `_ns` is nanoseconds of the sender's own CLOCK_BOOTTIME and means nothing to anybody else.
Unknown fields are ignored on read; a message whose `v` is above VERSION is refused.

Whatever somebody else may send has a bound: in bytes, in levels, and in each text, list and object that is kept, or
that somebody works through. Where a field has none of its own, its reader keeps it no longer than the message, or cuts
it: what the scheduler says to clients and workers, and what a slot says to its agent.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from mqworker.errors import NewerVersion, Unreadable

VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 8 * 1024 * 1024  # half of what RabbitMQ 4.x lets through by default
MAX_REQUEST_BYTES: Final = 1024 * 1024
MAX_METADATA_BYTES: Final = 1024 * 1024  # of one worker
MAX_OUTCOME_BYTES: Final = 4 * 1024 * 1024
MAX_DESCRIBED_BYTES: Final = 2 * 1024 * 1024  # of the artifacts of one outcome, together
MAX_INPUTS_BYTES: Final = 4 * 1024 * 1024  # of the artifacts that one request names, together: they go with its grant
MAX_LINE_BYTES: Final = 16 * 1024 * 1024  # of one word between an agent and its slot
MAX_DEPTH: Final = 50  # levels of task data, `requires`, metadata and the data of artifacts
MAX_REQUESTS_IN_A_MESSAGE: Final = 1000
MAX_TICKETS_IN_A_MESSAGE: Final = 100
MAX_EVENTS_IN_A_MESSAGE: Final = 500
MAX_SLOTS: Final = 10_000  # of one worker
MAX_LISTED: Final = 10_000  # of anything that a worker lists: tasks, outcomes that are not answered, artifacts of one
MAX_FILES: Final = 50_000  # of one artifact
MAX_REASON: Final = 4000  # characters of each part of a reason
MAX_STAGE: Final = 200  # characters
CUT: Final = " [...]"  # behind a text that was cut
LATEST: Final = 2**37  # seconds since the epoch: in the year 6325, which every calendar has

FULL_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# \Z and not $, which would let a line feed through at the end.
Id = Annotated[str, Meta(pattern=rf"^{FULL_ID.pattern}\Z")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=100)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]  # what the ledger can keep
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Time = Annotated[float, Meta(ge=0, le=LATEST)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
# PostgreSQL keeps no NUL; and what is shown in one line, and in terminals, has no control characters.
Line = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z", max_length=300)]
Word = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z", max_length=100)]
TaskName = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]+\Z", max_length=100)]
Text = Annotated[str, Meta(pattern=r"^[^\x00]*\Z", max_length=1000)]
# Made by who sends them, and parts of file names and routing keys at who reads them.
Token = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=200)]
QueueName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=255)]
_PART: Final = (
    r"(?!\.\.?(?:/|\Z))[A-Za-z0-9_.+:~@=,][A-Za-z0-9_.+:~@=, -]{0,254}"  # no "." or "..", nothing like an option
)
FileName = Annotated[str, Meta(pattern=rf"^{_PART}(?:/{_PART})*\Z", max_length=1000)]

RequestId = Annotated[str, Meta(pattern=r"^[^\x00]*\Z", max_length=36)]  # or a beginning of one
RequestIds = Annotated[list[RequestId], Meta(max_length=1000)]

OutcomeResult = Literal["success", "failure", "error", "aborted", "lost", "handed_back"]
PauseKind = Literal["worker", "task", "group"]
RequestState = Literal["pending", "offered", "running", "success", "failure", "error", "aborted", "rejected"]


def _check_depth(*documents: Any) -> None:
    """Refuse what is so deep that those who walk in it would reach the end of their stack.

    Raises:
        ValueError: it is.
    """
    layer = [one for one in documents if one]
    for _ in range(MAX_DEPTH):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not layer:
            return
    raise ValueError(f"expected JSON of at most {MAX_DEPTH} levels, got more")


# ---------------------------------------------------------------- parts, used in several messages


class After(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Name a request that has to end first."""

    request: Id
    need: Literal["success", "end"] = "success"


class Take(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Put the id of an artifact that another request makes into the task data, once that request has succeeded."""

    into: Annotated[str, Meta(pattern=r"^(/[^/]+){1,20}\Z", max_length=300)]  # a JSON Pointer into the task data
    request: Id
    category: Word  # exactly one of its artifacts must be of this category


class Limits(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Bound what one run may use of its host; what is not given is not bounded by the request."""

    memory: Annotated[int, Meta(ge=16 * 1024 * 1024, le=2**50)] | None = None  # bytes, of all its processes together
    cpus: Annotated[float, Meta(ge=0.01, le=4096)] | None = None  # cores' worth of time; more is throttled, not ended
    cpu_seconds: Annotated[float, Meta(ge=1, le=31 * 86400)] | None = None  # of all its processes together
    disk: Annotated[int, Meta(ge=1024 * 1024, le=2**60)] | None = None  # bytes in its work directory
    processes: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None  # that live at one time, threads among them


class Request(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Say what somebody wants done."""

    id: Id
    task: TaskName
    data: dict[str, Any] = {}
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0
    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 3
    retry_on: Annotated[list[Literal["failure", "error"]], Meta(max_length=2)] = []  # lost ones are retried anyway
    lease: Annotated[float, Meta(ge=5, le=86400)] | None = None  # seconds; None: what the task says
    timeout: Annotated[float, Meta(ge=1, le=31 * 86400)] | None = None  # seconds of one run, by the worker's clock
    not_before: Time | None = None  # seconds since the epoch
    expires_at: Time | None = None  # seconds since the epoch; counts until the grant
    limits: Limits | None = None
    group: Name = "default"  # whose share of the slots it uses
    concurrency_key: Name | None = None  # requests with one key run a few at a time: settings say how many
    requires: dict[str, Any] | None = None  # a JSON Schema that a worker's metadata must satisfy
    after: Annotated[list[After], Meta(max_length=100)] = []
    take: Annotated[list[Take], Meta(max_length=100)] = []  # each means "after its success", too

    def __post_init__(self) -> None:
        """Refuse task data, or a schema, that are too deep."""
        _check_depth(self.data, self.requires)


class Reason(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Say why something ended as it did, for a person who has to act on it; who reads it cuts it with `bounded()`."""

    text: str
    stage: str | None = None
    exit_code: int | None = None
    status: str | None = None  # the tool's own word
    line: str | None = None  # the last line that names the cause


class FileEntry(Struct, frozen=True, kw_only=True):
    """Name one file of an artifact."""

    path: FileName
    size: Count
    sha256: Sha256


class Relation(Struct, frozen=True, kw_only=True):
    """Say how an artifact belongs to another: its id, or its handle in the same outcome."""

    type: Literal["built-using", "relates-to", "extends"]
    target: Positive | Word


class Artifact(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Describe a set of files whose bytes are in the store already, before the ledger gives it an id."""

    handle: Word  # unique within one outcome
    category: Annotated[str, Meta(pattern=r"^[a-z0-9-]+:[a-z0-9-]+\Z", max_length=100)]
    name: Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]+\Z", max_length=300)]
    data: dict[str, Any] = {}
    files: Annotated[list[FileEntry], Meta(max_length=MAX_FILES)] = []
    relations: Annotated[list[Relation], Meta(max_length=MAX_LISTED)] = []

    def __post_init__(self) -> None:
        """Refuse data that are too deep."""
        _check_depth(self.data)


class RecordedRelation(Struct, frozen=True, kw_only=True):
    """Say how an artifact belongs to another, both known to the ledger."""

    type: str
    target: int


class RecordedArtifact(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Describe an artifact that the ledger keeps."""

    id: int
    category: str
    name: str
    data: dict[str, Any] = {}
    files: list[FileEntry] = []
    relations: list[RecordedRelation] = []
    request: str | None = None  # the request that made it; None: imported
    created: float = 0.0


class RunRef(Struct, frozen=True, kw_only=True):
    """Name one run: an attempt and the token that its claim carried."""

    request: Id
    attempt: Positive
    token: Token


class RunProgress(RunRef, frozen=True, kw_only=True, omit_defaults=True):
    """Say how far a run is."""

    since: Time
    stage: Annotated[str, Meta(max_length=MAX_STAGE)] | None = None
    fraction: Fraction | None = None


# ---------------------------------------------------------------- client -> scheduler (mqworker.submit), and its answer


class Submit(Struct, frozen=True, kw_only=True, tag="submit"):
    """Ask for requests to be done; answered by a Receipt if the message has a reply_to."""

    v: int = VERSION
    requests: Annotated[list[Request], Meta(min_length=1, max_length=MAX_REQUESTS_IN_A_MESSAGE)]


class Receipted(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Say what became of one submitted request."""

    id: str
    status: Literal["accepted", "known", "rejected", "conflict"]
    reason: str | None = None


class Receipt(Struct, frozen=True, kw_only=True, tag="receipt"):
    """Answer a Submit once the ledger has committed."""

    v: int = VERSION
    term: int = 0
    results: list[Receipted] = []
    problem: str | None = None  # the message as a whole could not be read


# ---------------------------------------------------------------- scheduler -> workers (mqworker.work)


class Ticket(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Offer a request, for one attempt, to a capability class; it has no authority of its own."""

    attempt: Positive
    request: Request
    alone: bool = False  # the last attempt of a request whose others were lost: nothing else may run beside it


class Tickets(Struct, frozen=True, kw_only=True, tag="tickets"):
    """Carry tickets for one capability class: one, or several where the class ends runs faster than messages come."""

    v: int = VERSION
    term: Count
    tickets: Annotated[list[Ticket], Meta(min_length=1, max_length=MAX_TICKETS_IN_A_MESSAGE)]


# ---------------------------------------------------------------- worker -> scheduler (mqworker.report)


_Tasks = Annotated[dict[Word, Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None], Meta(max_length=MAX_LISTED)]


class Hello(Struct, frozen=True, kw_only=True, tag="hello"):
    """Introduce a worker, or its changed metadata."""

    host: Line
    slots: Annotated[int, Meta(ge=1, le=MAX_SLOTS)]
    tasks: _Tasks  # name to version, of those that analysed cleanly
    metadata: dict[str, Any]  # at most MAX_METADATA_BYTES, which the scheduler looks at
    metadata_version: Count
    store: Line  # the id of the store it writes to
    version: Line
    denied: Annotated[list[Word], Meta(max_length=MAX_LISTED)] = []  # that it has, and is not let run

    def __post_init__(self) -> None:
        """Refuse metadata that are too deep."""
        _check_depth(self.metadata)


class Heartbeat(Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """Say what a worker holds; each run listed asks for its lease to be renewed."""

    queue: QueueName | None  # the queue consumed; None: it does not consume (its slots are full, or it drains)
    assigned: QueueName | None  # the queue it was last told to consume
    slots: Annotated[int, Meta(ge=0, le=MAX_SLOTS)]  # how many can take a run or have one
    running: Annotated[list[RunProgress], Meta(max_length=MAX_SLOTS)]
    claiming: Annotated[list[RunRef], Meta(max_length=MAX_SLOTS)]  # claims that are not answered yet
    # Outcomes in the spool: a lease that none of the three lists names is lost.
    unsettled: Annotated[list[RunRef], Meta(max_length=MAX_LISTED)]
    draining: bool = False  # it was told to take nothing more
    leaving: bool = False  # it ends when nothing runs any more
    held: Annotated[str, Meta(max_length=2 * MAX_REASON)] | None = None  # why it takes no work now: a full disk, say


class Claim(RunRef, frozen=True, kw_only=True, tag="claim"):
    """Ask: may I run this attempt?"""

    metadata_version: Count


class Refusal(RunRef, frozen=True, kw_only=True, tag="refusal"):
    """Decline a ticket, by the worker's own fresh view."""

    reason: Annotated[str, Meta(max_length=2 * MAX_REASON)]
    metadata_version: Count


class Bye(Struct, frozen=True, kw_only=True, tag="bye"):
    """Say that the worker leaves and holds nothing any more."""

    reason: Text


ReportPart = Hello | Heartbeat | Claim | Refusal | Bye


class Report(Struct, frozen=True, kw_only=True, tag="report"):
    """Carry a set of a worker's words; each is repeated until it is answered."""

    v: int = VERSION
    worker: Name
    epoch: Token  # of the worker's connection: where the answer goes
    seq: Count  # rises with each report of one agent process
    incarnation: Count  # rises with each agent process of one state directory
    home: Annotated[str, Meta(max_length=40)] = ""  # of that directory; the tokens of its claims begin with it
    parts: Annotated[list[ReportPart], Meta(max_length=2 * MAX_SLOTS)]


class Probe(Struct, frozen=True, kw_only=True, tag="probe"):
    """Come back to the scheduler that sent it, behind every report that was queued before."""

    v: int = VERSION
    term: Count
    number: Count
    secret: Word  # of the scheduler that sent it


# ---------------------------------------------------------------- worker -> scheduler (mqworker.outcome)


class Outcome(RunRef, frozen=True, kw_only=True, omit_defaults=True):
    """Say how a run ended, and what it made."""

    result: OutcomeResult
    reason: Reason | None = None
    again: bool = False  # the tool says: not now, try again
    started: Time
    ended: Time
    artifacts: Annotated[list[Artifact], Meta(max_length=MAX_LISTED)] = []


class Outcomes(Struct, frozen=True, kw_only=True, tag="outcomes"):
    """Carry outcomes that are on the worker's disk; repeated until each is answered by Recorded."""

    v: int = VERSION
    worker: Name
    epoch: Token
    outcomes: Annotated[list[Outcome], Meta(max_length=MAX_LISTED)]


# ---------------------------------------------------------------- scheduler -> one worker (mqworker.verdict)


class Alive(Struct, frozen=True, kw_only=True, tag="alive"):
    """Answer a report: every run it listed is renewed, but for those that are void."""

    seq: Count
    void: list[RunRef] = []


class Assign(Struct, frozen=True, kw_only=True, tag="assign"):
    """Tell a worker which queue is its own; None: none, for this reason."""

    queue: QueueName | None
    reason: str | None = None


class Granted(RunRef, frozen=True, kw_only=True, tag="granted"):
    """Answer a claim: run it."""

    lease: Annotated[float, Meta(ge=0, le=LATEST)]  # seconds, counted from when the claim was sent
    inputs: list[RecordedArtifact]


class Void(RunRef, frozen=True, kw_only=True, tag="void"):
    """Answer a claim or a refusal: the ticket is settled, do not run it."""

    reason: str


class Abort(RunRef, frozen=True, kw_only=True, tag="abort"):
    """Tell a worker to stop a run; repeated until its outcome comes."""

    reason: str


class Recorded(RunRef, frozen=True, kw_only=True, tag="recorded"):
    """Answer an outcome: it counts, it came too late and is kept as history, or nobody knows its run."""

    status: Literal["recorded", "refused", "unknown"]
    reason: str | None = None


class Introduce(Struct, frozen=True, kw_only=True, tag="introduce"):
    """Ask a worker for a Hello: the scheduler does not know it, or wants fresh metadata."""


class Drain(Struct, frozen=True, kw_only=True, tag="drain"):
    """Tell a worker to take nothing more; repeated until it says that it does. A queue assigned to it ends it."""

    reason: str
    stop: bool = False  # it is to end when nothing runs any more


VerdictPart = Alive | Assign | Granted | Void | Abort | Recorded | Introduce | Drain


class Verdict(Struct, frozen=True, kw_only=True, tag="verdict"):
    """Carry a set of the scheduler's answers to one worker."""

    v: int = VERSION
    term: Count
    parts: list[VerdictPart]


# ---------------------------------------------------------------- client -> scheduler (mqworker.api, mqworker.command)


class GetRequests(Struct, frozen=True, kw_only=True, tag="get_requests"):
    """Ask for some requests with their attempts and artifacts; an id may be a unique beginning of one."""

    v: int = VERSION
    ids: RequestIds


class GetStates(Struct, frozen=True, kw_only=True, tag="get_states"):
    """Ask for the states of some requests, by their full ids, and nothing else of them."""

    v: int = VERSION
    ids: RequestIds


class Selection(Struct, frozen=True, kw_only=True):
    """Choose requests; what is not given chooses all."""

    states: Annotated[list[RequestState], Meta(max_length=100)] = []
    task: Text | None = None
    worker: Text | None = None
    group: Text | None = None
    submitted_before: float | None = None  # seconds since the epoch


class ListRequests(Selection, frozen=True, kw_only=True, tag="list_requests"):
    """Ask for the newest requests that match, or the oldest, without attempts."""

    v: int = VERSION
    limit: Annotated[int, Meta(ge=1, le=10000)] = 50
    before: Positive | None = None  # seq: go on below it
    oldest: bool = False  # the oldest that match, and first of all the very oldest


class CountRequests(Selection, frozen=True, kw_only=True, tag="count_requests"):
    """Ask how many requests match."""

    v: int = VERSION


class Reprioritise(Struct, frozen=True, kw_only=True, tag="reprioritise"):
    """Ask for another priority of requests that have not ended."""

    v: int = VERSION
    ids: RequestIds
    priority: Annotated[int, Meta(ge=-1000, le=1000)]


class AbortRequests(Struct, frozen=True, kw_only=True, tag="abort_requests"):
    """Ask for requests to be stopped, wherever they are; one with a full id that nobody knows, when it comes."""

    v: int = VERSION
    ids: RequestIds
    reason: Text


class RetryRequest(Struct, frozen=True, kw_only=True, tag="retry_request"):
    """Ask for an ended request to be done anew, as a new request."""

    v: int = VERSION
    id: RequestId
    new_id: Id


class ListWorkers(Struct, frozen=True, kw_only=True, tag="list_workers"):
    """Ask who is in the pool, in the order of their names."""

    v: int = VERSION
    limit: Annotated[int, Meta(ge=1, le=10000)] = 10000
    after: Text | None = None  # go on behind this name


class RefreshWorkers(Struct, frozen=True, kw_only=True, tag="refresh_workers"):
    """Ask workers to look at their hosts again; no names: all."""

    v: int = VERSION
    names: Annotated[list[Text], Meta(max_length=MAX_LISTED)] = []


class ForgetWorker(Struct, frozen=True, kw_only=True, tag="forget_worker"):
    """Ask that a worker's name be nobody's any more, or another user's."""

    v: int = VERSION
    name: Name
    user: Annotated[str, Meta(min_length=1, max_length=255)] | None = None  # whose it is from now on; None: the next's


class ListArtifacts(Struct, frozen=True, kw_only=True, tag="list_artifacts"):
    """Ask for artifacts, newest first."""

    v: int = VERSION
    ids: Annotated[list[Positive], Meta(max_length=MAX_LISTED)] = []
    request: RequestId | None = None
    category: Text | None = None
    limit: Annotated[int, Meta(ge=1, le=10000)] = 50


class ImportArtifact(Struct, frozen=True, kw_only=True, tag="import_artifact"):
    """Ask for an artifact to be recorded whose bytes are in the store already."""

    v: int = VERSION
    key: Id  # the same key again is the same artifact
    artifact: Artifact
    store: Text


class Pause(Struct, frozen=True, kw_only=True, tag="pause"):
    """Ask that a worker, a task or a group gets no slot any more; what runs goes on."""

    v: int = VERSION
    kind: PauseKind
    name: Name
    reason: Text = ""


class Resume(Struct, frozen=True, kw_only=True, tag="resume"):
    """Ask for the end of a pause."""

    v: int = VERSION
    kind: PauseKind
    name: Name


class DrainWorkers(Struct, frozen=True, kw_only=True, tag="drain_workers"):
    """Ask that workers take nothing more, and end if that is wanted when nothing runs; a Resume of each ends it."""

    v: int = VERSION
    names: Annotated[list[Name], Meta(max_length=10000)] = []
    classes: Annotated[list[Name], Meta(max_length=1000)] = []  # all workers of these capability classes
    everybody: bool = False  # all workers that are known
    reason: Annotated[str, Meta(max_length=1000)] = ""
    stop: bool = False


class ListPauses(Struct, frozen=True, kw_only=True, tag="list_pauses"):
    """Ask what is paused."""

    v: int = VERSION


class Explain(Struct, frozen=True, kw_only=True, tag="explain"):
    """Ask who can run a request, and why it waits: of a submitted one by its id, else of a task and its data."""

    v: int = VERSION
    id: RequestId | None = None
    task: Word | None = None
    data: dict[str, Any] = {}
    requires: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse task data, or a schema, that are too deep."""
        _check_depth(self.data, self.requires)


class GetCapabilities(Struct, frozen=True, kw_only=True, tag="get_capabilities"):
    """Ask for the capability classes, in the order of their names."""

    v: int = VERSION
    limit: Annotated[int, Meta(ge=1, le=10000)] = 10000
    after: Text | None = None  # go on behind this name


class GetPool(Struct, frozen=True, kw_only=True, tag="get_pool"):
    """Ask the scheduler how it is."""

    v: int = VERSION


# What asks goes to mqworker.api, what changes something to mqworker.command: so the broker's rights can keep some users
# from the latter.
Question = (
    GetRequests
    | GetStates
    | ListRequests
    | CountRequests
    | ListWorkers
    | ListArtifacts
    | ListPauses
    | Explain
    | GetCapabilities
    | GetPool
)
PoolCommand = RefreshWorkers | ForgetWorker | DrainWorkers | Pause | Resume  # operators' alone
Command = Reprioritise | AbortRequests | RetryRequest | ImportArtifact | PoolCommand
Query = Question | Command


class RunView(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Show a run, without its token: who knows that could speak for it."""

    request: str
    attempt: int
    since: float
    stage: str | None = None
    fraction: float | None = None


class AttemptView(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Show one attempt."""

    number: int
    worker: str
    granted: float
    started: float | None = None
    ended: float | None = None
    result: OutcomeResult | None = None
    counted: bool = True
    reason: Reason | None = None


class RequestView(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Show one request."""

    seq: int
    request: Request
    state: RequestState
    attempt: int
    submitted: float
    submitter: str | None = None  # the broker's user that submitted it; None: the broker did not say
    worker: str | None = None
    abort: str | None = None  # why it is to be stopped
    not_before: float | None = None
    granted: float | None = None
    ended: float | None = None
    reason: Reason | None = None
    progress: RunView | None = None
    waits: str | None = None  # what a pending request waits for
    requirement: int | None = None  # its requirement class
    after: list[str] = []  # requests that it still waits for
    attempts: list[AttemptView] = []
    artifacts: list[RecordedArtifact] = []


class RequestList(Struct, frozen=True, kw_only=True, tag="request_list"):
    """Answer GetRequests, ListRequests, and commands on requests."""

    v: int = VERSION
    requests: list[RequestView] = []
    missing: list[str] = []
    forbidden: dict[str, str] = {}  # ids of those that a command was not allowed on, and why
    marked: list[str] = []  # of AbortRequests: nobody knows them yet; they are aborted when they come


class WorkerView(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Show one worker."""

    name: str
    host: str
    state: Literal["online", "offline", "refused"]
    slots: int
    running: list[RunView] = []
    queue: str | None = None
    tasks: dict[str, int | None] = {}
    metadata: dict[str, Any] = {}
    version: str = ""
    seen: float = 0.0
    reason: str | None = None
    paused: str | None = None  # why; empty: no reason was given
    denied: list[str] = []
    draining: bool = False  # by its own word, it takes nothing more
    capability_class: str | None = None
    user: str | None = None  # the broker's user whose name it is; None: nobody's


class WorkerList(Struct, frozen=True, kw_only=True, tag="worker_list"):
    """Answer ListWorkers and DrainWorkers; RefreshWorkers and ForgetWorker with nobody: what they find comes later."""

    v: int = VERSION
    workers: list[WorkerView]


class ArtifactList(Struct, frozen=True, kw_only=True, tag="artifact_list"):
    """Answer ListArtifacts and ImportArtifact."""

    v: int = VERSION
    artifacts: list[RecordedArtifact] = []
    missing: list[int] = []


class StateList(Struct, frozen=True, kw_only=True, tag="state_list"):
    """Answer GetStates; what nobody knows is left out."""

    v: int = VERSION
    states: dict[str, str]  # by id, in the words of RequestState


class RequestCount(Struct, frozen=True, kw_only=True, tag="request_count"):
    """Answer CountRequests."""

    v: int = VERSION
    number: int


class PauseView(Struct, frozen=True, kw_only=True):
    """Show a pause."""

    kind: PauseKind
    name: str
    reason: str
    since: float


class PauseList(Struct, frozen=True, kw_only=True, tag="pause_list"):
    """Answer Pause, Resume and ListPauses."""

    v: int = VERSION
    pauses: list[PauseView] = []


class Offered(Struct, frozen=True, kw_only=True):
    """Say how many workers offer a value."""

    value: str  # as JSON; "missing" where the key is not there
    workers: int
    examples: list[str]  # names of some of them


class Step(Struct, frozen=True, kw_only=True):
    """Show one step of the funnel: what was looked at, and how many workers went on from there."""

    looked_at: str  # a metadata key, or words
    asked: list[str] = []  # values that it was compared with, as JSON
    passed: int
    stopped: int
    offered: list[Offered] = []  # by those that it stopped, the most frequent first


class Explanation(Struct, frozen=True, kw_only=True, tag="explanation"):
    """Answer Explain: each worker either stops at one step or is able, so that the counts add up."""

    v: int = VERSION
    task: str
    request: str | None = None
    state: RequestState | None = None
    verdict: str  # one line: why it waits, or where it is
    workers: int  # that the scheduler knows, online or not
    steps: list[Step]
    able: int
    idle: int  # these five are the able ones
    busy: int
    paused: int
    offline: int
    refused: int  # that declined this very request
    ahead: int | None = None  # requests that go first, about
    advice: list[str] = []  # changes of metadata, the cheapest first, each tried out
    requirement: int | None = None
    escaped: bool = False
    failing: str | None = None  # what can_run_on() raised
    classes: list[str] = []


class Capability(Struct, frozen=True, kw_only=True):
    """Show a capability class."""

    name: str
    queue: str
    workers: int
    examples: list[str]
    shared: dict[str, Any]  # metadata that all its workers have
    tasks: list[str]
    requirements: int  # requirement classes that it can run
    idle: int
    lookahead: int
    out: int  # tickets
    backlog: int  # pending requests that it can run


class CapabilityList(Struct, frozen=True, kw_only=True, tag="capability_list"):
    """Answer GetCapabilities."""

    v: int = VERSION
    classes: list[Capability]
    requirements: int
    escaped: int


class Pool(Struct, frozen=True, kw_only=True, tag="pool"):
    """Answer GetPool."""

    v: int = VERSION
    term: int
    version: str
    store: str
    requests: dict[str, int]  # state to number
    workers: int  # online
    classes: int
    paused: int = 0  # of those online
    offline: int = 0
    refused: int = 0
    slots: int = 0  # of those online; paused ones give none
    busy: int = 0  # slots that run something


class Problem(Struct, frozen=True, kw_only=True, tag="problem"):
    """Answer a query that cannot be answered as asked."""

    v: int = VERSION
    kind: Literal[
        "unreadable",
        "not_found",
        "conflict",
        "rejected",
        "too_large",
        "artifact_invalid",
        "store_mismatch",
        "forbidden",
    ]
    text: str


Answer = (
    RequestList
    | StateList
    | RequestCount
    | WorkerList
    | ArtifactList
    | PauseList
    | Explanation
    | CapabilityList
    | Pool
    | Problem
)


# ---------------------------------------------------------------- to everybody (mqworker.events, mqworker.logs)


class RequestEvent(Struct, frozen=True, kw_only=True, tag="request_event"):
    """Tell that a request changed its state."""

    v: int = VERSION
    term: int
    time: float
    request: Id
    task: str
    state: RequestState
    event: str  # the move's name in lifecycle.MOVES
    attempt: int
    worker: str | None = None
    reason: Reason | None = None


class RequestEvents(Struct, frozen=True, kw_only=True, tag="request_events"):
    """Carry events of requests of one task that have come to the same state: all that came at the same time."""

    v: int = VERSION
    events: Annotated[list[RequestEvent], Meta(max_length=MAX_EVENTS_IN_A_MESSAGE)]


class StuckEvent(Struct, frozen=True, kw_only=True, tag="stuck_event"):
    """Tell that no worker can run some requests, and has not been able to for a while."""

    v: int = VERSION
    term: int
    time: float
    task: str
    requirement: int
    since: float
    number: int  # of requests
    requests: list[Id]  # the oldest of them
    reason: str


class WorkerEvent(Struct, frozen=True, kw_only=True, tag="worker_event"):
    """Tell that a worker came, changed or went."""

    v: int = VERSION
    term: int
    time: float
    worker: str
    event: Literal["online", "changed", "offline", "refused", "paused", "impostor"]
    reason: str | None = None


class LogText(Struct, frozen=True, kw_only=True, tag="log_text"):
    """Carry what a run has printed."""

    v: int = VERSION
    request: Id
    attempt: int
    worker: str
    time: float
    seq: int  # rises by one within one attempt: a gap means lines that were not sent
    text: str


class LogProgress(Struct, frozen=True, kw_only=True, tag="log_progress"):
    """Tell how far a run is, as it happens."""

    v: int = VERSION
    request: Id
    attempt: int
    task: str
    worker: str
    time: float
    since: float
    stage: str | None = None
    fraction: float | None = None


# ---------------------------------------------------------------- agent <-> slot (a pipe on one host; one JSON a line)

SLOT_LAPSED: Final = 113  # the exit code of a slot that has ended its run, and itself, at the deadline


class Outfit(Struct, frozen=True, kw_only=True, tag="outfit"):
    """Give a new slot what every run of it needs; not on its command line, where everybody could read it."""

    store: str  # URL


class RunTask(Struct, frozen=True, kw_only=True, tag="run_task"):
    """Tell a slot to run a request behind those it was told of before; after deadline_ns nothing of it may live."""

    token: Token
    request: Request
    attempt: int
    inputs: list[RecordedArtifact]
    directory: str
    deadline_ns: int
    limits: Limits | None = None  # that the slot is to see to itself, as far as the kernel helps one process with it
    cpus: list[int] = []  # the run keeps to these; empty: to all that its slot has


class Renew(Struct, frozen=True, kw_only=True, tag="renew"):
    """Tell a slot that a run may go on."""

    token: Token
    deadline_ns: int


class StopRun(Struct, frozen=True, kw_only=True, tag="stop_run"):
    """Tell a slot to abort a run."""

    token: Token
    reason: str


class Recall(Struct, frozen=True, kw_only=True, tag="recall"):
    """Take back from a slot the runs that it has not begun; it answers with a SlotRecalled."""


SlotOrder = Outfit | RunTask | Renew | StopRun | Recall


class SlotReady(Struct, frozen=True, kw_only=True, tag="slot_ready"):
    """Tell the agent that the slot waits for its first run."""


class SlotProgress(Struct, frozen=True, kw_only=True, tag="slot_progress"):
    """Tell the agent how far the run is that the slot has begun last; so do the words below."""

    stage: str | None
    fraction: float | None


class SlotOutput(Struct, frozen=True, kw_only=True, tag="slot_output"):
    """Hand the agent what the run has printed."""

    text: str


class SlotEnded(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="slot_ended"):
    """Tell the agent how the run ended: artifacts are in the store, and all descendants gone but what is `left`."""

    result: Literal["success", "failure", "error", "aborted"]
    reason: Reason | None = None
    again: bool = False
    artifacts: list[Artifact] = []
    left: str | None = None  # what could not be ended: when that has gone, the slot ends itself, and the run is over
    last: bool = False  # the slot ends itself now: the next run is better off in a process of its own
    litter: bool = False  # the run has left something in its directory
    unfit: str | None = None  # there was no room for its directory


class SlotRecalled(Struct, frozen=True, kw_only=True, tag="slot_recalled"):
    """Tell the agent which runs the slot has not begun, and will not."""

    tokens: list[Token]


class Analysis(Struct, frozen=True, kw_only=True, tag="analysis"):
    """Tell the agent what its host can do; from a process of its own, which looks afresh and ends."""

    metadata: dict[str, Any]
    tasks: _Tasks
    failures: dict[str, str]  # task or module to what went wrong

    def __post_init__(self) -> None:
        """Refuse metadata that are too deep."""
        _check_depth(self.metadata)


SlotWord = Analysis | SlotReady | SlotProgress | SlotOutput | SlotEnded | SlotRecalled


# ---------------------------------------------------------------- reading and writing


class _Peek(Struct):
    type: str | UnsetType = UNSET
    v: int | UnsetType = UNSET


_SHOWN: Final = 200  # characters of what is wrong with a message, each time
_encoder = msgspec.json.Encoder()
_peek = msgspec.json.Decoder(_Peek)
_T = TypeVar("_T")


def encode(message: Struct) -> bytes:
    """Write a message as JSON."""
    return _encoder.encode(message)


def tag_of(message: Struct) -> str:
    """Return a message's type, for the `type` property."""
    return str(message.__struct_config__.tag)


def encode_line(message: Struct) -> bytes:
    """Write a message as one line of JSON, for a pipe."""
    return _encoder.encode(message) + b"\n"


def outcome_sets(outcomes: Iterable[Outcome]) -> Iterator[list[Outcome]]:
    """Divide outcomes into sets that fit into a message, or into a file of the spool."""
    one: list[Outcome] = []
    size = 0
    for outcome in outcomes:
        bytes_more = len(encode(outcome))
        if one and (size + bytes_more > MAX_OUTCOME_BYTES or len(one) >= MAX_LISTED):
            yield one
            one, size = [], 0
        one.append(outcome)
        size += bytes_more
    if one:
        yield one


def bounded(reason: Reason) -> Reason:
    """Cut what a task, or a stranger, says of an end to what a person reads."""
    cut = {
        name: shortened(value)
        for name in ("text", "stage", "status", "line")
        if isinstance(value := getattr(reason, name), str) and len(value) > MAX_REASON
    }
    return msgspec.structs.replace(reason, **cut) if cut else reason


def shortened(text: str, length: int = MAX_REASON) -> str:
    """Cut a text to so many characters, and a mark that it was cut."""
    return text if len(text) <= length else text[:length] + CUT


def longer_than(message: Struct, limit: int) -> bool:
    """Say whether a message is longer than so many bytes, and find out without writing far more than these."""
    left = limit
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, list):
            for one in value:
                left -= len(_encoder.encode(one))
                if left < 0:
                    return True
    return len(_encoder.encode(message)) > limit


@cache
def _decoder(kind: Any) -> Callable[[bytes], Any]:
    return msgspec.json.Decoder(kind).decode


def decode(body: bytes, kind: type[_T], *, limit: int = MAX_MESSAGE_BYTES) -> _T:
    """Read a message of a kind (a struct, or a union of structs) of at most so many bytes.

    Raises:
        NewerVersion: it was written by a newer mqworker.
        Unreadable: it is not JSON, too large, of another type, or lacks its fields; the text names the path.
    """
    if len(body) > limit:
        raise Unreadable(f"expected a message of at most {limit} bytes, got {len(body)}; put large data into artifacts")
    try:
        message: _T = _decoder(kind)(body)  # type: ignore[arg-type]  # a union of structs is hashable too
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        why = shortened(str(error), _SHOWN)
        try:
            peek = _peek.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise Unreadable(f"expected a JSON object with a type, got something else: {why}") from error
        _refuse_newer(peek.v)
        what = "message" if peek.type is UNSET else repr(shortened(peek.type, _SHOWN))
        raise Unreadable(f"expected a readable {what}: {why}") from error
    _refuse_newer(getattr(message, "v", UNSET))
    return message


def _refuse_newer(v: int | UnsetType) -> None:
    if v is not UNSET and v > VERSION:
        shown = shortened(str(v), _SHOWN)
        raise NewerVersion(
            f"expected a message of version {VERSION} or older, got version {shown}; upgrade this mqworker"
        )
