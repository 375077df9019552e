"""Who gets what now: the backlog's order, the credit of each capability class, the offers that are out.

Pure; told the time in seconds of any clock that does not jump. It knows request ids, class names and numbers, and
nothing of what a request is.

Credit of a class = idle slots of its members + lookahead - offers out. Lookahead is what the class finishes in
LOOKAHEAD_SECONDS: nothing for builds of an hour, enough to keep the pipe full for tasks of a millisecond.
"""

import heapq
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from math import exp
from typing import Final, NamedTuple

LOOKAHEAD_SECONDS: Final = 0.1
MAX_LOOKAHEAD: Final = 200  # tickets a class; a bound against a clock that lies
RATE_WINDOW: Final = 1.0  # seconds over which a class's rate is remembered
SPARE_PLACES: Final = 64  # void places that a backlog may hold before it is worth a look at all of it


class Offer(NamedTuple):
    """Say that a request goes to a class now."""

    request: str
    capability_class: str


class _Place(NamedTuple):
    """Order a backlog: higher priority first, then older."""

    minus_priority: int
    seq: int
    request: str


@dataclass(kw_only=True)
class _Waiting:
    place: _Place
    requirement: Hashable


@dataclass(kw_only=True)
class _Out:
    capability_class: str
    since: float


@dataclass(kw_only=True)
class _Supply:
    """What one worker can take: `slots` that work, less what is known to sit in them."""

    capability_class: str | None = None  # whose queue it consumes or will, by its own word
    slots: int = 0
    busy: set[Hashable] = field(default_factory=set)


@dataclass(kw_only=True)
class _Class:
    heads: list[_Place] = field(default_factory=list)
    members: set[str] = field(default_factory=set)  # whose supply counts here
    out: set[str] = field(default_factory=set)
    rate: float = 0.0
    rated: float = 0.0


class Dispatch:
    """Give each class with credit the best request that it can run."""

    def __init__(self) -> None:
        self._classes: dict[str, _Class] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._by_requirement: dict[Hashable, set[str]] = {}
        self._out: dict[str, _Out] = {}
        self._supplies: dict[str, _Supply] = {}

    # ------------------------------------------------------------ the backlog

    def wait(self, request: str, *, priority: int, seq: int, requirement: Hashable, classes: Iterable[str]) -> None:
        """Put a request into the backlog of every class that can run it."""
        place = _Place(-priority, seq, request)
        self._waiting[request] = _Waiting(place=place, requirement=requirement)
        self._by_requirement.setdefault(requirement, set()).add(request)
        for name in classes:
            self._push(self._classes[name], place)

    def forget(self, request: str) -> None:
        """Take a request out, whether it waits, is offered, or neither."""
        self._unwait(request)
        out = self._out.pop(request, None)
        if out is not None and out.capability_class in self._classes:
            self._classes[out.capability_class].out.discard(request)

    def waiting(self) -> int:
        """Count the requests in the backlog."""
        return len(self._waiting)

    def _unwait(self, request: str) -> None:
        waiting = self._waiting.pop(request, None)
        if waiting is not None:
            peers = self._by_requirement[waiting.requirement]
            peers.discard(request)
            if not peers:
                del self._by_requirement[waiting.requirement]

    def _push(self, one: _Class, place: _Place) -> None:
        heapq.heappush(one.heads, place)
        if len(one.heads) > 2 * len(self._waiting) + SPARE_PLACES:  # others have had the most of it
            one.heads = [head for head in one.heads if self._holds(head)]
            heapq.heapify(one.heads)

    def _holds(self, place: _Place) -> bool:
        """Say whether a place is that of its request now: one that came back has another, though it looks the same."""
        waiting = self._waiting.get(place.request)
        return waiting is not None and waiting.place is place

    # ------------------------------------------------------------ classes and workers

    def add_class(self, name: str) -> None:
        """Begin a class; it can run nothing yet."""
        self._classes[name] = _Class()

    def remove_class(self, name: str) -> list[str]:
        """End a class; return the requests whose offers it had, which have to go back."""
        gone = self._classes.pop(name)
        for worker in gone.members:
            self._supplies[worker].capability_class = None
        for request in gone.out:
            del self._out[request]
        return sorted(gone.out)

    def gain(self, name: str, requirement: Hashable) -> None:
        """Let a class run a requirement: what waits with it enters its backlog."""
        for request in self._by_requirement.get(requirement, ()):
            self._push(self._classes[name], self._waiting[request].place)

    def supply(self, worker: str, *, capability_class: str | None, slots: int, busy: Iterable[Hashable]) -> None:
        """Take a worker's own word: whose queue it consumes, how many slots work, what sits in them."""
        supply = self._supplies.setdefault(worker, _Supply())
        if supply.capability_class in self._classes:
            self._classes[supply.capability_class].members.discard(worker)
        if capability_class not in self._classes:
            capability_class = None  # a queue of a class that is gone, or of another scheduler
        supply.capability_class = capability_class
        supply.slots = slots
        supply.busy = set(busy)
        if capability_class is not None:
            self._classes[capability_class].members.add(worker)

    def no_supply(self, worker: str) -> None:
        """Count nothing of a worker any more."""
        supply = self._supplies.pop(worker, None)
        if supply is not None and supply.capability_class in self._classes:
            self._classes[supply.capability_class].members.discard(worker)

    def taken(self, worker: str, run: Hashable) -> None:
        """Count a slot as taken: its worker's claim was granted."""
        if worker in self._supplies:
            self._supplies[worker].busy.add(run)

    def freed(self, worker: str, run: Hashable, now: float) -> None:
        """Count a slot as free: its run's outcome came."""
        supply = self._supplies.get(worker)
        if supply is None:
            return
        supply.busy.discard(run)
        if supply.capability_class is not None:
            one = self._classes[supply.capability_class]
            one.rate = one.rate * exp((one.rated - now) / RATE_WINDOW) + 1 / RATE_WINDOW
            one.rated = now

    # ------------------------------------------------------------ credit and offers

    def idle(self, name: str) -> int:
        """Count the idle slots of a class."""
        return sum(
            max(0, supply.slots - len(supply.busy))
            for supply in map(self._supplies.__getitem__, self._classes[name].members)
        )

    def lookahead(self, name: str, now: float) -> int:
        """Return how many tickets a class finishes in LOOKAHEAD_SECONDS, by its recent rate."""
        one = self._classes[name]
        if not any(self._supplies[worker].slots for worker in one.members):
            return 0
        rate = one.rate * exp((one.rated - now) / RATE_WINDOW)
        return min(MAX_LOOKAHEAD, int(rate * LOOKAHEAD_SECONDS))

    def credit(self, name: str, now: float) -> int:
        """Return how many tickets a class may be given now."""
        return self.idle(name) + self.lookahead(name, now) - len(self._classes[name].out)

    def offers(self, now: float) -> list[Offer]:
        """Choose, for each class with credit, the best requests that it can run; they count as out from now."""
        chosen = []
        for name, one in self._classes.items():
            if not one.heads:
                continue
            credit = self.credit(name, now)
            while credit > 0 and one.heads:
                place = heapq.heappop(one.heads)
                if not self._holds(place):
                    continue  # another class had it, or it was aborted
                self._unwait(place.request)
                self._out[place.request] = _Out(capability_class=name, since=now)
                one.out.add(place.request)
                chosen.append(Offer(place.request, name))
                credit -= 1
        return chosen

    def stale(self, now: float, timeout: float) -> list[str]:
        """List the requests whose offer nobody took in time, or whose class nobody consumes any more."""
        return [
            request
            for request, out in self._out.items()
            if now - out.since > timeout or not self._classes[out.capability_class].members
        ]

    def offered_to(self, request: str) -> str | None:
        """Return the class that a request is offered to."""
        out = self._out.get(request)
        return None if out is None else out.capability_class

    def figures(self, now: float) -> dict[str, tuple[int, int, int, int]]:
        """Return for each class its workers, idle slots, lookahead and offers out."""
        return {
            name: (len(one.members), self.idle(name), self.lookahead(name, now), len(one.out))
            for name, one in self._classes.items()
        }
