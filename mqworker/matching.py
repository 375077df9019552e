"""Who can run what: requirement classes, and capability classes of workers that none of them tells apart.

Pure: it is told of workers and requirements and keeps the partition. It knows no Task, no clock, no queue;
a requirement brings its own predicate. Now it asks every worker for each new requirement.

What a capability class can run never changes while it lives: workers move between classes, and a class that a new
requirement divides keeps its larger part. So a ticket that is out for a class stays right for it.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Requirement = Hashable  # the name of a requirement class


@dataclass(frozen=True, kw_only=True)
class WorkerFacts:
    """Hold what a worker says of itself."""

    name: str
    metadata: Mapping[str, Any]
    metadata_version: int
    tasks: Mapping[str, int | None]


class Gain(NamedTuple):
    """Say that a class can run what it was not known to run."""

    capability_class: str
    requirement: Requirement


@dataclass(kw_only=True)
class Change:
    """Say what one fact changed in the partition."""

    assigned: dict[str, str] = field(default_factory=dict)  # worker to its new class
    made: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    gained: list[Gain] = field(default_factory=list)


@dataclass(kw_only=True)
class _Class:
    name: str
    members: set[str] = field(default_factory=set)
    capable: set[Requirement] = field(default_factory=set)


class Matching:
    """Keep workers in capability classes by equal decisions over the live requirement classes."""

    def __init__(self, *, name_class: Callable[[], str]) -> None:
        self._name_class = name_class
        self._workers: dict[str, WorkerFacts] = {}
        self._class_of: dict[str, str] = {}
        self._classes: dict[str, _Class] = {}
        self._requirements: dict[Requirement, Callable[[WorkerFacts], bool]] = {}

    def join(self, facts: WorkerFacts) -> Change:
        """Place a worker, new or with changed metadata, in the class of its decisions."""
        self._workers[facts.name] = facts
        capable = {name for name, accepts in self._requirements.items() if accepts(facts)}
        change = Change()
        current = self._class_of.get(facts.name)
        if current is not None:
            if self._classes[current].capable == capable:
                return change
            self._remove(facts.name, change)
        for candidate in self._classes.values():
            if candidate.capable == capable:
                target = candidate
                break
        else:
            target = self._make(capable, change)
        self._place(facts.name, target, change)
        return change

    def leave(self, worker: str) -> Change:
        """Forget a worker."""
        change = Change()
        if self._workers.pop(worker, None) is not None:
            self._remove(worker, change)
        return change

    def need(self, requirement: Requirement, accepts: Callable[[WorkerFacts], bool]) -> Change:
        """Make a requirement class live; one that is live already changes nothing."""
        change = Change()
        if requirement in self._requirements:
            return change
        self._requirements[requirement] = accepts
        for one in list(self._classes.values()):
            able = {name for name in one.members if accepts(self._workers[name])}
            unable = one.members - able
            if not unable:
                one.capable.add(requirement)
                change.gained.append(Gain(one.name, requirement))
            elif able:
                self._split(one, requirement, able=able, unable=unable, change=change)
        return change

    def drop(self, requirement: Requirement) -> None:
        """Forget a requirement class that no live request has."""
        if self._requirements.pop(requirement, None) is not None:
            for one in self._classes.values():
                one.capable.discard(requirement)

    def capable_classes(self, requirement: Requirement) -> list[str]:
        """List the classes that can run a requirement."""
        return [one.name for one in self._classes.values() if requirement in one.capable]

    def can_run(self, worker: str, requirement: Requirement) -> bool:
        """Say whether a worker can run a live requirement, by its newest facts."""
        one = self._class_of.get(worker)
        return one is not None and requirement in self._classes[one].capable

    def class_of(self, worker: str) -> str | None:
        """Return a worker's class; None: it is not in the pool."""
        return self._class_of.get(worker)

    def classes(self) -> Mapping[str, frozenset[str]]:
        """Return the members of each class."""
        return {name: frozenset(one.members) for name, one in self._classes.items()}

    def _make(self, capable: Iterable[Requirement], change: Change) -> _Class:
        made = _Class(name=self._name_class(), capable=set(capable))
        self._classes[made.name] = made
        change.made.append(made.name)
        change.gained.extend(Gain(made.name, requirement) for requirement in made.capable)
        return made

    def _place(self, worker: str, target: _Class, change: Change) -> None:
        target.members.add(worker)
        self._class_of[worker] = target.name
        change.assigned[worker] = target.name

    def _remove(self, worker: str, change: Change) -> None:
        one = self._classes[self._class_of.pop(worker)]
        one.members.discard(worker)
        if not one.members:
            del self._classes[one.name]
            change.gone.append(one.name)

    def _split(
        self, one: _Class, requirement: Requirement, *, able: set[str], unable: set[str], change: Change
    ) -> None:
        leaving = able if len(able) <= len(unable) else unable
        other = self._make(one.capable, change)
        for worker in sorted(leaving):
            one.members.discard(worker)
            self._place(worker, other, change)
        winner = other if leaving is able else one
        winner.capable.add(requirement)
        change.gained.append(Gain(winner.name, requirement))
