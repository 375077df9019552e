"""From a seed, everything that happens to a pool from outside, as a list that can be cut short."""

import random
from dataclasses import dataclass, field, replace

import msgspec

from mqworker.messages import (
    After,
    Explain,
    GetCapabilities,
    GetPool,
    ListRequests,
    Pause,
    Reprioritise,
    Request,
    Resume,
    RetryRequest,
    Take,
)
from tests.sim import programs
from tests.sim.host import MADE
from tests.sim.loop import START, WALL

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
LATER_FAULTS = ("lose-tickets", "late-verdicts", "late-verdicts", "upgrade", "deny")
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
    deny: tuple = ()


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
    weights: dict = field(default_factory=dict)  # of groups
    limits: dict = field(default_factory=dict)  # of concurrency keys
    quick: bool = False  # most runs end in a moment
    heads: tuple | None = None  # the least and the most of a lane in memory


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
    more = _More(random.Random(f"more {seed}"), scenario, tasks, busy)
    more.draw(faults=faults)
    bounds = random.Random(f"bounds {seed}")
    if bounds.random() < 0.6:
        _bound(bounds, scenario)
    flood = random.Random(f"flood {seed}")
    if flood.random() < 0.3:
        _flood(flood, scenario, tasks)
    scenario.happenings.sort(key=lambda one: one.at)
    return scenario


def _flood(chance, scenario, tasks):
    """Have most runs end in a moment, and many requests come at once, so that workers take some ahead."""
    scenario.quick = True
    number = 500_000
    for _ in range(chance.choice([1, 3, 6])):
        at = chance.uniform(1, scenario.until - CALM)
        task, data = chance.choice(tasks), programs.data_of(chance)
        ids = [f"00000000-0000-4000-8000-{number + one:012x}" for one in range(chance.choice([20, 60, 150]))]
        number += len(ids)
        requests = [Request(id=id_, task=task, data=data, lease=chance.choice([None, 5.0])) for id_ in ids]
        for start in range(0, len(requests), 30):
            scenario.happenings.append(
                Happening(at=at, kind="submit", given={"requests": requests[start : start + 30]})
            )
        for id_ in chance.sample(ids, chance.choice([0, 0, 5])):
            after = chance.choice([0.01, 0.05, 0.3])
            scenario.happenings.append(Happening(at=at + after, kind="abort", given={"request": id_}))


def _bound(chance, scenario):
    """Give requests bounds in time, and results after which they are tried again; the same to one submitted again."""
    share = chance.choice([0.1, 0.5])
    known = {}
    for happening in sorted(scenario.happenings, key=lambda one: one.at):
        if happening.kind != "submit":
            continue
        now = WALL + START + happening.at
        for number, request in enumerate(happening.given["requests"]):
            if request.id not in known:
                more = {}
                if chance.random() < share:
                    more["timeout"] = chance.choice([1.0, 3.0, 10.0])
                if chance.random() < share:
                    more["retry_on"] = chance.choice([["failure"], ["error"], ["failure", "error"]])
                if chance.random() < share / 2:
                    more["not_before"] = now + chance.choice([-1.0, 0.5, 5.0, 30.0])
                if chance.random() < share / 2:
                    more["expires_at"] = now + chance.choice([-1.0, 0.3, 3.0, 20.0, 90.0])
                known[request.id] = msgspec.structs.replace(request, **more)
            happening.given["requests"][number] = known[request.id]


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
                    self.add(at, kind, worker=chance.choice(workers), down=chance.random() < 0.5)
                case "disk":
                    self.add(at, kind, worker=chance.choice(workers), seconds=short)
                case "wall":
                    who = chance.choice(["scheduler", *workers])
                    self.add(at, kind, who=who, step=chance.choice([-1800.0, -5.0, 5.0, 3600.0]))


class _More:
    """Draw what there is more than bare requests and bare workers, by a source of chance of its own."""

    def __init__(self, chance, scenario, tasks, busy):
        self.chance = chance
        self.scenario = scenario
        self.tasks = tasks
        self.busy = busy
        self.groups = ["default"]
        self.keys = []
        self.number = 0

    def add(self, at, kind, **given):
        self.scenario.happenings.append(Happening(at=at, kind=kind, given=given))

    def draw(self, *, faults):
        chance, scenario = self.chance, self.scenario
        if chance.random() < 0.5:
            self.groups = ["default", "a", "b", "c"][: chance.randint(2, 4)]
            scenario.weights = chance.choice([{}, {"a": 2.0}, {"a": 3.0, "b": 0.5}, {"*": 0.5, "default": 1.0}])
        if chance.random() < 0.5:
            self.keys = ["k1", "k2", "k3"]
            scenario.limits = chance.choice([{}, {"k1": 2}, {"k1": 1, "*": 3}, {"k1": 0, "k2": 2, "*": 4}])
        if chance.random() < 0.5:
            least = chance.randint(1, 4)
            scenario.heads = (least, max(least, chance.randint(1, 4)))
        if chance.random() < 0.3:
            self.deny()
        if chance.random() < 0.15:
            self.late_workers()
        if chance.random() < 0.5:
            self.bursts()
        self.decorate()
        if chance.random() < 0.5:
            self.commands()
        if faults and chance.random() < 0.5:
            self.faults()

    def deny(self):
        self.scenario.specs[:] = [
            replace(spec, deny=tuple(self.chance.sample(self.tasks, 1)) if self.chance.random() < 0.5 else ())
            for spec in self.scenario.specs
        ]

    def late_workers(self):
        """Let requests come before any worker."""
        first = self.chance.uniform(5, 40)
        self.scenario.happenings[:] = [
            replace(one, at=one.at + first) if one.kind == "join" else one for one in self.scenario.happenings
        ]

    def bursts(self):
        """Let much come at once that little tells apart, so that not all of it is kept in memory."""
        for _ in range(self.chance.choice([1, 1, 3])):
            requests = []
            task, data = self.chance.choice(self.tasks), [programs.data_of(self.chance) for _ in range(2)]
            for _ in range(self.chance.choice([10, 30, 60])):
                self.number += 1
                requests.append(
                    Request(
                        id=f"00000000-0000-4000-9000-{self.number:012x}",
                        task=task,
                        data=self.chance.choice(data),
                        priority=self.chance.choice([0, 0, 0, 0, 1]),
                        max_attempts=3,
                    )
                )
            self.add(self.chance.uniform(0.3, self.scenario.until - CALM / 2), "submit", requests=requests)

    # ------------------------------------------------------------ requests

    def decorate(self):
        """Give requests groups, keys, schemas and needs; one that is submitted again stays as it is."""
        chance = self.chance
        known = {}
        before = []
        needy = chance.choice([0, 0, 0.1, 0.4])
        schemas = chance.choice([0, 0, 0.1, 0.5])
        keyed = chance.choice([0.1, 0.5]) if self.keys else 0
        drawn = sorted(self.scenario.happenings, key=lambda one: one.at)
        for happening in drawn:
            if happening.kind != "submit":
                continue
            for number, request in enumerate(happening.given["requests"]):
                if request.id not in known:
                    more = {"group": chance.choice(self.groups)}
                    if chance.random() < keyed:
                        more["concurrency_key"] = chance.choice(self.keys)
                    if chance.random() < schemas:
                        more["requires"] = chance.choice(programs.SCHEMAS)
                        if chance.random() < 0.03:
                            more["requires"] = programs.BAD_SCHEMA
                    if before and chance.random() < needy:
                        more |= self.needs(before)
                    known[request.id] = msgspec.structs.replace(request, **more)
                    before.append(request.id)
                happening.given["requests"][number] = known[request.id]

    def needs(self, before):
        chance = self.chance
        newest = before[-12:]
        more = {}
        if chance.random() < 0.7:
            names = chance.sample(newest, min(len(newest), chance.choice([1, 1, 2, 3])))
            more["after"] = [After(request=name, need=chance.choice(["success", "end"])) for name in names]
        if chance.random() < 0.5:
            into = chance.choice(["/input", "/input", "/mem", "/deep/made"])
            category = MADE if chance.random() < 0.95 else "sim:other"
            more["take"] = [Take(into=into, request=chance.choice(newest), category=category)]
        return more

    # ------------------------------------------------------------ commands

    def commands(self):
        chance, until = self.chance, self.scenario.until
        names = {"worker": [spec.name for spec in self.scenario.specs], "task": self.tasks, "group": self.groups}
        ids = [
            (one.at, request.id)
            for one in self.scenario.happenings
            if one.kind == "submit"
            for request in one.given["requests"]
        ]
        for _ in range(chance.choice([1, 3, 10])):
            kind = chance.choice(sorted(names))
            name = chance.choice(names[kind])
            at = chance.uniform(0.5, until)
            self.add(at, "command", query=Pause(kind=kind, name=name, reason="for a while"))
            if chance.random() < 0.8:
                self.add(at + chance.choice([0.003, 0.5, 5.0, 40.0]), "command", query=Resume(kind=kind, name=name))
        for at, id_ in chance.sample(ids, len(ids) // chance.choice([3, 10])):
            command = Reprioritise(ids=[id_], priority=chance.choice([-1, 0, 1, 7]))
            self.add(at + chance.choice([0.002, 0.02, 0.5, 5.0]), "command", query=command)
        for number, (at, id_) in enumerate(chance.sample(ids, min(len(ids), 3))):
            command = RetryRequest(id=id_, new_id=f"00000000-0000-4000-a000-{number:012x}")
            self.add(at + chance.choice([5.0, 20.0]), "command", query=command)
        for query in (GetPool(), GetCapabilities(), ListRequests(), Explain(id=chance.choice(ids)[1])):
            self.add(chance.uniform(0.5, until), "command", query=query)

    # ------------------------------------------------------------ faults

    def faults(self):
        chance = self.chance
        workers = [spec.name for spec in self.scenario.specs]
        for _ in range(chance.choice([1, 2, 4])):
            at = chance.uniform(2, self.busy)
            match chance.choice(LATER_FAULTS):
                case "lose-tickets":
                    self.add(at, "lose-tickets", seconds=chance.choice([1.0, 10.0]), share=chance.choice([0.2, 1.0]))
                case "late-verdicts":
                    self.late_verdicts(at)
                case "upgrade":
                    sources = [
                        programs.write(chance) if chance.random() < 0.5 else source for source in self.scenario.sources
                    ]
                    self.add(at, "upgrade", sources=sources, seconds=chance.choice([0.3, 3.0]))
                case "deny":
                    who = chance.choice(workers)
                    self.add(at, "deny", worker=who, deny=tuple(chance.sample(self.tasks, chance.randint(0, 1))))
                    self.add(at + 0.001, "crash-worker", worker=who, seconds=0.5, twice=False)

    def late_verdicts(self, at):
        """Let a scheduler die whose last words are on their way for long, just when workers have changed."""
        self.add(at, "late-words", lag=15.0)
        for spec in self.scenario.specs:
            for before in (0.6, 0.3, 0.0, -0.1):  # some of them are just told when it dies
                metadata = spec.metadata | {"free": self.chance.randrange(1000)}
                self.add(max(0.5, at - before), "metadata", worker=spec.name, metadata=metadata)
        self.add(at + self.chance.uniform(0.1, 0.4), "crash-scheduler", seconds=self.chance.choice([0.05, 0.5]))
