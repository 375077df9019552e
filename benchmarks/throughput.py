"""How much work passes, how soon it begins, and what CPU it costs: mqworker beside its peers, on one private broker.

    python -m benchmarks.throughput                                             the whole of it, as JSON
    python -m benchmarks.throughput --quick
    python -m benchmarks.throughput --systems mqworker-sqlite,raw-quorum --tasks 20 --rounds 1 --samples 3

The same work for all (benchmarks.work), persistent messages, publisher confirms, acknowledged after the work, two
processes that work. Each round runs each system, in alternating order, on a virtual host of its own: first its queue
is filled while nobody works, and then emptied; then work is submitted while it works, one by one and together; then
single tasks go to an idle pool. Numbers of tasks are chosen so that each takes about as long. Each run is checked from
outside: every number ran, and what has results has told the submitter each of them.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks import work
from benchmarks.submitting import ONE_BY_ONE, TOGETHER
from benchmarks.systems import SYSTEMS, System
from benchmarks.world import World, world

FILLED: Final = "filled"
LIVE: Final = (ONE_BY_ONE, TOGETHER)
FIRST: Final = 300  # tasks, as long as nobody knows how fast it is; and the fewest
MOST: Final = 200_000
SETTLE_SECONDS: Final = 0.3  # until what a run leaves to do is done, and counted as its CPU time
TIMEOUT: Final = 600.0

Figures = dict[str, Any]


@dataclass
class Plan:
    """Say how many tasks make a run of about so many seconds."""

    seconds: float
    fixed: int | None
    _rates: dict[tuple[str, str], float] = field(default_factory=dict)

    def number(self, system: str, way: str) -> int:
        """Return how many tasks to take."""
        if self.fixed is not None:
            return self.fixed
        rate = self._rates.get((system, way))
        return FIRST if rate is None else min(MOST, max(FIRST, int(rate * self.seconds)))

    def learn(self, system: str, way: str, rate: float) -> None:
        """Remember how fast it is."""
        self._rates[system, way] = max(rate, self._rates.get((system, way), 0.0))


class Round:
    """Measure one system once."""

    def __init__(self, system: System, number_of: Callable[[str], int], cpu: Callable[[], tuple[float, float]]) -> None:
        self._system = system
        self._number_of = number_of
        self._cpu = cpu
        self._made = 0
        self.figures: Figures = {"tasks": {}, "rates": {}}

    def filled(self) -> None:
        """Fill the queue while nobody works; count from the first task's beginning to the last one's."""
        numbers = self._take(FILLED)
        self._system.order(do="send", way=TOGETHER, first=numbers.start, number=len(numbers))
        if work.count(self._system.notes):
            raise RuntimeError(f"{self._system.title}: expected nobody to work yet")
        self._system.start_workers()
        self._system.await_runs(self._made, TIMEOUT)
        self._check_results(self._system.order(do="results"), numbers)
        times = self._times(numbers)
        self.figures["rates"][FILLED] = (len(times) - 1) / (times[-1] - times[0]) * 1e9

    def live(self, way: str) -> None:
        """Submit while others work; count from the first submission to the last result that the submitter knows.

        For a system without results: to the last task's beginning.
        """
        numbers = self._take(way)
        before = (self._system.cpu(), *self._cpu())
        answer = self._system.order(do="send and wait", way=way, first=numbers.start, number=len(numbers))
        self._system.await_runs(self._made, TIMEOUT)
        time.sleep(SETTLE_SECONDS)
        after = (self._system.cpu(), *self._cpu())
        self._check_results(answer, numbers)
        known = answer["known"] if self._system.results else self._times(numbers)[-1]
        self.figures["rates"][way] = len(numbers) / (known - answer["began"]) * 1e9
        self.figures["cpu"] = [(late - early) / len(numbers) for early, late in zip(before, after, strict=True)]

    def waits(self, number: int) -> None:
        """Submit tasks to an idle pool; keep the seconds from the call to each one's beginning."""
        numbers = self._take_so_many(number)
        answer = self._system.order(do="pace", first=numbers.start, number=len(numbers))
        began = dict(zip(numbers, answer["began"], strict=True))
        notes = work.read(self._system.notes)
        self.figures["waits"] = [(at - began[number]) / 1e9 for number, at in notes if number in began]

    def check(self) -> None:
        """Raise unless all that was submitted ran; note what ran again."""
        ran = Counter(number for number, _ in work.read(self._system.notes))
        if set(ran) != set(range(self._made)):
            raise RuntimeError(f"{self._system.title}: expected {self._made} tasks to run, {len(ran)} did")
        self.figures["repeated"] = ran.total() - self._made

    def _take(self, way: str) -> range:
        self.figures["tasks"][way] = self._number_of(way)
        return self._take_so_many(self.figures["tasks"][way])

    def _take_so_many(self, number: int) -> range:
        self._made += number
        return range(self._made - number, self._made)

    def _times(self, numbers: range) -> list[int]:
        return [at for number, at in work.read(self._system.notes) if number in numbers]

    def _check_results(self, answer: Figures, numbers: range) -> None:
        if self._system.results and answer["results"] != len(numbers):
            raise RuntimeError(f"{self._system.title}: expected {len(numbers)} results, got {answer['results']}")


def measure(given: argparse.Namespace) -> dict[str, Figures]:
    """Measure all rounds, and put together what was found for each system."""
    systems: list[str] = given.systems
    plan = Plan(given.seconds, given.tasks)
    found: dict[str, list[Figures]] = {name: [] for name in systems}
    with world(systems) as shared:
        for number in range(-1 if given.tasks is None else 0, given.rounds):  # the first one tells only how fast it is
            for name in systems if number % 2 else reversed(systems):
                samples = -(-given.samples // given.rounds) if number >= 0 else 0
                figures = _one(shared, name, plan, samples)
                print(f"round {number + 1} {name} {_brief(figures)}", file=sys.stderr)
                for way, rate in figures["rates"].items():
                    plan.learn(name, way, rate)
                if number >= 0:
                    found[name].append(figures)
    return {name: _together(each) for name, each in found.items()}


def _one(shared: World, name: str, plan: Plan, samples: int) -> Figures:
    with shared.place(name) as place, SYSTEMS[name](place) as system:
        one = Round(system, lambda way: plan.number(name, way), shared.cpu)
        one.filled()
        for way in LIVE:
            one.live(way)
        one.waits(samples)
        one.check()
    return one.figures


def _brief(figures: Figures) -> str:
    rates = ", ".join(f"{way} {figures['tasks'][way]} at {rate:.0f}/s" for way, rate in figures["rates"].items())
    own, broker, database = (seconds * 1e3 for seconds in figures["cpu"])
    return f"{rates}; CPU {own:.2f} ms, broker {broker:.2f} ms, database {database:.2f} ms"


def _together(rounds: Sequence[Figures]) -> Figures:
    ways = (FILLED, *LIVE)
    return {
        "tasks": {way: max(one["tasks"][way] for one in rounds) for way in ways},
        "rates": {way: [one["rates"][way] for one in rounds] for way in ways},
        "cpu": [list(each) for each in zip(*(one["cpu"] for one in rounds), strict=True)],  # own, broker, database
        "waits": sorted(wait for one in rounds for wait in one["waits"]),
        "repeated": sum(one["repeated"] for one in rounds),
    }


def parser() -> argparse.ArgumentParser:
    """Say what can be asked for."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    made.add_argument(
        "--systems", type=_names, default=list(SYSTEMS), help=f"with commas, some of {', '.join(SYSTEMS)}"
    )
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--seconds", type=float, default=6.0, help="that a run takes")
    made.add_argument("--tasks", type=int, help="so many in each run, whatever it takes")
    made.add_argument("--samples", type=int, default=500, help="tasks that go to an idle pool")
    made.add_argument("--quick", action="store_const", const=(1, 2.0, 50), help="one round, runs of 2 s, 50 samples")
    return made


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(SYSTEMS):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(SYSTEMS)}, got {', '.join(sorted(unknown))}")
    return names


def run(given: argparse.Namespace) -> dict[str, Figures]:
    """Measure, and put it together."""
    if given.quick is not None:
        given.rounds, given.seconds, given.samples = given.quick
    return measure(given)


def main() -> None:
    """Measure, and print JSON."""
    print(json.dumps(run(parser().parse_args()), indent=1))


if __name__ == "__main__":
    main()
