"""From a seed, everything that happens to a pool from outside, as a list that can be cut short."""

import random
from dataclasses import dataclass, field

from mqworker.messages import Request
from tests.sim import programs

FAULTS = (
    "crash-worker",
    "crash-scheduler",
    "stop-worker",
    "stop-scheduler",
    "crash-broker",
    "cut",
    "freeze-worker",
    "freeze-scheduler",
    "lag",
    "echo",
    "alarm",
    "lose-queue",
    "disk",
    "ledger",
    "wall",
)
SETTLE = 45.0  # seconds behind the end of a fault until everybody knows of it
CALM = 60.0  # seconds with requests, but without a fault, at the end


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A worker's host."""

    name: str
    slots: int
    metadata: dict
    tasks: list
    boot: float
    drift: float


@dataclass(frozen=True, kw_only=True)
class Happening:
    """Something that happens at a virtual moment."""

    at: float
    kind: str
    given: dict

    def __str__(self):
        given = ", ".join(f"{name}={value!r}" for name, value in self.given.items())
        return f"{self.at:9.3f}  {self.kind}({given})"


@dataclass(kw_only=True)
class Scenario:
    """All that a run depends on."""

    seed: int
    sources: list
    hidden: dict
    specs: list
    happenings: list = field(default_factory=list)
    retry_delay: float
    offer_timeout: float
    slow: float  # seconds of the longest runs
    until: float


def draw(seed):
    """Draw a scenario."""
    chance = random.Random(f"scenario {seed}")
    tasks = [task.name for task in programs.TASKS[: chance.randint(1, len(programs.TASKS))]]
    specs = [
        Spec(
            name=f"w{number}",
            slots=chance.choice([1, 1, 1, 2, 3]),
            metadata=programs.metadata_of(chance, f"w{number}"),
            tasks=[task for task in tasks if chance.random() < 0.85] or tasks[:1],
            boot=chance.uniform(0, 1_000_000),
            drift=chance.uniform(-0.003, 0.003),
        )
        for number in range(chance.choice([1, 2, 3, 5, 6, 6, 8]))
    ]
    faults = chance.random() < 0.8
    busy = chance.uniform(40, 150)  # seconds in which faults happen
    scenario = Scenario(
        seed=seed,
        sources=[programs.write(chance) for _ in tasks],
        hidden={},
        specs=specs,
        retry_delay=chance.choice([0.5, 3.0, 10.0]),
        offer_timeout=chance.choice([5.0, 10.0]),
        slow=chance.choice([5.0, 20.0, 60.0]),
        until=(busy if faults else chance.uniform(20, 100)) + CALM,
    )
    if chance.random() < 0.2:
        who = chance.choice(["scheduler", *(spec.name for spec in specs)])
        scenario.hidden = {chance.choice(tasks): [who]}
    happen = _Drawing(chance, scenario)
    happen.joins()
    happen.requests(tasks, until=scenario.until)
    happen.changes(until=scenario.until)
    if faults:
        happen.faults(until=busy)
    scenario.happenings.sort(key=lambda one: one.at)
    return scenario


class _Drawing:
    """Draw what happens."""

    def __init__(self, chance, scenario):
        self.chance = chance
        self.scenario = scenario

    def add(self, at, kind, **given):
        self.scenario.happenings.append(Happening(at=at, kind=kind, given=given))

    def some_time(self, until):
        """Draw a moment; half of them are where something else is just going on."""
        submissions = [one.at for one in self.scenario.happenings if one.kind == "submit" and 3 < one.at < until]
        if submissions and self.chance.random() < 0.5:
            return self.chance.choice(submissions) + self.chance.choice([0.01, 0.03, 0.3]) * self.chance.random()
        return self.chance.uniform(0.5, until)

    def joins(self):
        for spec in self.scenario.specs:
            late = self.chance.random() < 0.25
            self.add(self.chance.uniform(1, 60) if late else self.chance.uniform(0, 0.3), "join", worker=spec.name)

    def requests(self, tasks, until):
        chance = self.chance
        pool = [programs.data_of(chance) for _ in range(chance.choice([2, 5, 20]))]
        priorities = chance.choice([[0], [0, 0, 0, 5], [-1, 0, 1]])
        number = 0
        ids = []
        for _ in range(chance.choice([8, 20, 40])):
            at = chance.uniform(0.5, until) if chance.random() < 0.8 else chance.uniform(0.3, 3)
            requests = []
            for _ in range(chance.choice([1, 1, 1, 2, 5])):
                number += 1
                requests.append(
                    Request(
                        id=f"00000000-0000-4000-8000-{number:012x}",
                        task=chance.choice(tasks),
                        data=chance.choice(pool),
                        priority=chance.choice(priorities),
                        max_attempts=chance.choice([1, 2, 3, 3]),
                        lease=chance.choice([None, None, 5.0, 12.0, 30.0]),
                    )
                )
            self.add(at, "submit", requests=requests)
            ids += [(at, request.id) for request in requests]
            if chance.random() < 0.1:
                self.add(at + chance.choice([0.002, 0.5, 10.0]), "submit", requests=requests)  # once more
        for at, id_ in ids:
            if chance.random() < 0.08:
                self.add(at + chance.choice([0.001, 0.01, 0.5, 3.0, 10.0]), "abort", request=id_)

    def changes(self, until):
        """Draw metadata that change: often, rarely or never."""
        chance = self.chance
        rate = chance.choice([0, 2, 10, 40])
        for spec in self.scenario.specs:
            metadata = spec.metadata
            for at in sorted(self.some_time(until) for _ in range(chance.randint(0, rate))):
                metadata = programs.changed(chance, metadata)
                self.add(at, "metadata", worker=spec.name, metadata=metadata)

    def faults(self, until):
        chance = self.chance
        kinds = chance.sample(FAULTS, chance.choice([1, 2, 4, len(FAULTS)]))
        workers = [spec.name for spec in self.scenario.specs]
        at = None
        for _ in range(chance.choice([1, 2, 5, 10])):
            at = at + chance.uniform(0, 8) if at and chance.random() < 0.4 else self.some_time(until)
            kind = chance.choice(kinds)
            short = chance.choice([0.3, 2.0, 12.0])
            long = chance.choice([0.3, 3.0, 20.0, 70.0]) * chance.uniform(0.7, 1.3)
            match kind:
                case "crash-worker" | "stop-worker" | "freeze-worker":
                    self.add(at, kind, worker=chance.choice(workers), seconds=long, twice=chance.random() < 0.3)
                case "crash-scheduler" | "stop-scheduler" | "freeze-scheduler" | "crash-broker" | "alarm" | "ledger":
                    self.add(at, kind, seconds=chance.choice([short, long]) * chance.uniform(0.5, 1))
                case "cut":
                    who = chance.choice(["scheduler", *workers, *workers])
                    here, there = (chance.choice([0.001, 1.0, chance.uniform(5, 29)]) for _ in range(2))
                    self.add(at, kind, who=who, link=chance.choice(["reading", "writing"]), here=here, there=there)
                case "lag":
                    who = chance.choice(["scheduler", *workers])
                    self.add(at, kind, who=who, seconds=long, lag=chance.choice([0.2, 1.0, 6.0]))
                case "echo":
                    self.add(at, kind, seconds=long, share=chance.choice([0.1, 0.5]))
                case "lose-queue":
                    self.add(at, kind, worker=chance.choice(workers))
                case "disk":
                    self.add(at, kind, worker=chance.choice(workers), seconds=short)
                case "wall":
                    who = chance.choice(["scheduler", *workers])
                    self.add(at, kind, who=who, step=chance.choice([-3600.0, -5.0, 5.0, 3600.0]))
