"""What the scheduler holds in memory of requests, runs and workers: data, which pool alone changes.

Knows what a thing is, and not what becomes of it.
"""

from dataclasses import dataclass, field

from mqworker.access import WorkerNames
from mqworker.dispatch import Dispatch, Lane
from mqworker.examiner import Examiner
from mqworker.lifecycle import State, Tried
from mqworker.matching import Matching, Requirement
from mqworker.messages import Drain, Heartbeat, Hello, PauseView, Request, RunProgress
from mqworker.requirements import RequirementClass, Requirements


@dataclass(kw_only=True)
class Lease:
    """Say how long a run may go on, by the scheduler's view."""

    worker: str
    run: RunProgress  # by the worker's newest word
    seconds: float
    deadline: float  # steady
    probe: int | None = None

    @property
    def token(self) -> str:
        """Return the token of the claim that was granted."""
        return self.run.token


@dataclass(kw_only=True, slots=True)
class Entry:
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
    lease: Lease | None = None
    history: tuple[Tried, ...] = ()  # of its attempts that count; known from the offer of a later one on
    due: float | None = None  # steady; it waits out a delay until then

    @property
    def requirement(self) -> Requirement:
        """Return what workers are asked for it."""
        return self.one.id if self.own is None else self.own

    @property
    def lane(self) -> Lane:
        """Return where it waits, or would."""
        request = self.request
        return Lane(self.requirement, request.priority, request.group, request.concurrency_key)


@dataclass(kw_only=True)
class Use:
    """Say how a requirement class is used."""

    entries: int = 0  # in memory
    idle_since: float = 0.0  # steady
    stuck_since: float | None = None  # steady; since when no worker can run it
    told: bool = False  # that it is stuck


@dataclass(kw_only=True)
class KnownWorker:
    """Hold what a worker has said of itself, and what it was granted."""

    name: str
    epoch: str = ""
    home: str = ""
    incarnation: int = -1
    seq: int = -1
    any_number: bool = False  # its next report counts, whatever number it has
    hello: Hello | None = None
    metadata_bytes: int = 0
    state: str = "offline"
    reason: str | None = None
    seen: float = 0.0  # steady
    seen_wall: float = 0.0
    probe: int | None = None
    heartbeat: Heartbeat | None = None
    former: str | None = None  # the queue that it consumed before it was told of another
    leases: set[str] = field(default_factory=set)  # request ids


@dataclass(kw_only=True)
class Holdings:
    """Keep it all together, for those who look at it."""

    matching: Matching
    dispatch: Dispatch
    examiner: Examiner = field(default_factory=Examiner)
    requirements: Requirements = field(default_factory=Requirements)
    entries: dict[str, Entry] = field(default_factory=dict)  # by request
    delayed: set[str] = field(default_factory=set)  # requests that wait out a delay
    refused: dict[str, frozenset[tuple[str, int]]] = field(default_factory=dict)  # request to who declined it
    workers: dict[str, KnownWorker] = field(default_factory=dict)
    pauses: dict[tuple[str, str], PauseView] = field(default_factory=dict)
    names: WorkerNames = field(default_factory=WorkerNames)
    renamed: dict[str, str] = field(default_factory=dict)  # classes whose queue was lost, to the name of another
    drains: dict[str, Drain] = field(default_factory=dict)  # worker to what it is told until it does it
    blocked: int = 0  # requests that wait for others
    newest: int = 0  # the highest age ever given

    def queue_name(self, capability_class: str) -> str:
        """Return what a class's queue is called: like the class, unless that one was lost."""
        return self.renamed.get(capability_class, capability_class)
