"""A farm of unlike build hosts, the builds that people want of it, and its workers' side of the conversation.

No two workers have equal metadata. What they can run hangs on a list of chroots, an architecture, memory, disk, cores
and tags; what they report besides (host name, kernel, load, chroots of their own) makes each one unique.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar, Final

from mqworker.messages import Claim, Heartbeat, Hello, Outcome, Outcomes, Report, RunProgress, RunRef
from mqworker.task import Task

GIB: Final = 1024**3
ARCHITECTURES: Final = ("amd64", "arm64", "ppc64el", "riscv64", "s390x")
SUITES: Final = (
    *("buster", "bullseye", "bookworm", "trixie", "forky", "sid"),
    *("focal", "jammy", "noble", "resolute"),
)
SUITES_OF: Final = (
    *(SUITES, SUITES[:6], SUITES[6:], SUITES[2:6], SUITES[:3], SUITES[4:6]),
    *(("bookworm", "trixie", "noble"), ("sid",)),
)
MEMORY: Final = (2, 8, 32, 128)  # GiB
DISK: Final = 200 * GIB
REQUIRES: Final[tuple[dict[str, Any] | None, ...]] = (
    None,
    {"required": ["system:free_disk"], "properties": {"system:free_disk": {"minimum": DISK}}},
    {"required": ["system:cpu_count"], "properties": {"system:cpu_count": {"minimum": 16}}},
    {"required": ["system:tags"], "properties": {"system:tags": {"contains": {"const": "ssd"}}}},
    {
        "required": ["system:tags", "system:cpu_count"],
        "properties": {"system:tags": {"contains": {"enum": ["ssd", "nvme"]}}, "system:cpu_count": {"minimum": 8}},
    },
)
GROUPS: Final = ("archive", "ci", "nightly", "people")
PRIORITIES: Final = (-10, 0, 10)
STORE: Final = "benchmark"


class FarmBuild(Task):
    """Build a package: a task as its writer would write it, without a thought of matching."""

    TASK_VERSION = 1
    TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "package": {"type": "string"},
            "version": {"type": "string"},
            "suite": {"enum": list(SUITES)},
            "architecture": {"enum": list(ARCHITECTURES)},
            "memory": {"type": "number", "minimum": 0},  # GiB
        },
        "required": ["package", "version", "suite", "architecture", "memory"],
        "additionalProperties": False,
    }

    def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
        """Ask for the chroot and the memory."""
        if not super().can_run_on(worker_metadata):
            return False
        if self.data["architecture"] not in worker_metadata.get("farmbuild:architectures", []):
            return False
        if f"{self.data['suite']}-{self.data['architecture']}" not in worker_metadata.get("farmbuild:chroots", []):
            return False
        return bool(worker_metadata.get("system:memory", 0) >= self.data["memory"] * GIB)

    def _execute(self) -> bool:
        return True


@dataclass(frozen=True)
class Kind:
    """Hold what the requests of one requirement class have in common."""

    suite: str
    architecture: str
    memory: float  # GiB
    requires: dict[str, Any] | None

    def data(self, number: int) -> dict[str, Any]:
        """Return the task data of one request; nothing reads what is its own."""
        return {
            "package": f"package-{number}",
            "version": f"1.{number % 97}-1",
            "suite": self.suite,
            "architecture": self.architecture,
            "memory": self.memory,
        }


def kinds(number: int, seed: int = 1) -> list[Kind]:
    """Return so many kinds of requests, at most 1,000."""
    found = [Kind(*one) for one in product(SUITES, ARCHITECTURES, MEMORY, REQUIRES)]
    random.Random(seed).shuffle(found)
    return found[:number]


def metadata(number: int, seed: int = 1) -> dict[str, Any]:
    """Return the metadata of one worker of the farm."""
    dice = random.Random(seed * 1_000_003 + number)
    architecture = dice.choices(ARCHITECTURES, (50, 25, 10, 10, 5))[0]
    suites = dice.choice(SUITES_OF)
    chroots = [f"{suite}-{architecture}" for suite in suites]
    chroots.append(f"private-{number}-{architecture}")
    dice.shuffle(chroots)
    tags = [tag for tag, part in (("ssd", 0.5), ("nvme", 0.2), ("lent", 0.1)) if dice.random() < part]
    return {
        "farmbuild:version": 1,
        "farmbuild:architectures": [architecture, "all"],
        "farmbuild:chroots": chroots,
        "system:hostname": f"host-{number:05}.example",
        "system:kernel": f"6.{dice.randrange(1, 19)}.{number}-{architecture}",
        "system:memory": dice.choice((4, 8, 16, 64, 256)) * GIB - number * 4096,
        "system:free_disk": dice.randrange(10, 2000) * GIB + number,
        "system:cpu_count": dice.choice((2, 4, 8, 16, 64)),
        "system:load": dice.random() * 8,
        "system:uptime": dice.random() * 1e7,
        "system:tags": [*tags, f"rack-{number % 200}"],
    }


@dataclass
class Peer:
    """Speak as one worker with one slot."""

    number: int
    metadata: dict[str, Any]
    run: RunRef | None = None
    queue: str | None = None
    version: int = 1
    seq: int = 0
    names: Iterator[int] = field(default_factory=lambda: iter(range(1, 1_000_000)))

    @property
    def name(self) -> str:
        """The worker's name, which is its connection's, too."""
        return f"worker-{self.number:05}"

    def say(self, *parts: Any) -> Report:
        """Put words into a report."""
        self.seq += 1
        return Report(worker=self.name, epoch=self.name, seq=self.seq, incarnation=1, parts=list(parts))

    def hello(self) -> Hello:
        """Introduce itself."""
        return Hello(
            host=self.name,
            slots=1,
            tasks={"farmbuild": 1, "noop": 1},
            metadata=dict(self.metadata),
            metadata_version=self.version,
            store=STORE,
            version="0",
        )

    def changed(self, **values: Any) -> Report:
        """Say that some metadata have changed; names are those of `system:` metadata."""
        self.metadata |= {f"system:{name}": value for name, value in values.items()}
        self.version += 1
        return self.say(self.hello())

    def beat(self) -> Heartbeat:
        """Say what runs."""
        runs = [] if self.run is None else [self.run]
        return Heartbeat(
            queue=None if runs else self.queue,
            assigned=self.queue,
            slots=1,
            running=[
                RunProgress(request=run.request, attempt=run.attempt, token=run.token, since=1.0, stage="build")
                for run in runs
            ],
            claiming=[],
            unsettled=[],
        )

    def claim(self, request: str, attempt: int) -> Report:
        """Ask for a run, and reckon with a yes."""
        self.run = RunRef(request=request, attempt=attempt, token=f"{self.name}-{next(self.names)}-{request[:8]}")
        return self.say(
            Claim(request=request, attempt=attempt, token=self.run.token, metadata_version=self.version),
        )

    def adopt(self, request: str, attempt: int, token: str) -> None:
        """Have a run from before."""
        self.run = RunRef(request=request, attempt=attempt, token=token)

    def end(self) -> Outcomes:
        """End its run well."""
        run, self.run = self.run, None
        if run is None:
            raise AssertionError(f"expected {self.name} to have a run")
        outcome = Outcome(
            request=run.request, attempt=run.attempt, token=run.token, result="success", started=1.0, ended=2.0
        )
        return Outcomes(worker=self.name, epoch=self.name, outcomes=[outcome])
