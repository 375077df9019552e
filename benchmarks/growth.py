"""What it costs that a pool grows: a long backlog, many workers.

    python -m benchmarks.growth                                            the whole of it, as JSON
    python -m benchmarks.growth --backlogs 20,40 --agents 1,2 --farms 20 --seconds 0.1

Backlogs: the rate at which two slots work while at least so many requests like the running ones wait. Workers: real
agents with one slot each on this machine, for as many as it holds, which share its cores with all else; for more, the
scheduler's CPU time for a request by benchmarks.matching, on a real ledger, with workers that are simulated.
"""

import argparse
import json
import sys
import time
from statistics import median
from typing import Any, Final

from benchmarks import matching, work
from benchmarks.goals import Goal, goal_rows
from benchmarks.readme import head, middle, milliseconds, paragraph, row, times
from benchmarks.submitting import TOGETHER
from benchmarks.systems import Mqworker
from benchmarks.world import World, world
from mqworker import processes
from mqworker.client import Client

FIRST: Final = 200  # runs, as long as nobody knows how fast it is; and the fewest
ROUNDS: Final = 3
SPARE: Final = 100  # waiting requests that may be gone beyond those that are counted
QUIET_SECONDS: Final = 1.0
TIMEOUT: Final = 900.0
START_SECONDS: Final = 5.0  # each agent has to begin; several at a time
LESS: Final = 0.9  # of the rate at the smallest backlog

Figures = dict[str, Any]
Sizes = list[int]


class Pool:
    """Hold a pool whose task can be paused, and submit to it."""

    def __init__(self, system: Mqworker, client: Client) -> None:
        self._system, self._client = system, client
        self._made = 0
        self.rate = 0.0  # the best so far
        self.accepted = 0.0  # requests a second, at the last time that some were submitted

    def pause(self) -> None:
        """Let nothing begin any more, and wait until nothing does."""
        self._client.pause("task", work.NAME, "measured")
        before = -1
        while (now := work.count(self._system.notes)) != before:
            before = now
            time.sleep(QUIET_SECONDS)

    def fill(self, waiting: int) -> None:
        """Submit until so many wait."""
        missing = waiting - (self._made - work.count(self._system.notes))
        if missing <= 0:
            return
        began = time.monotonic()
        self._system.order(do="send", way=TOGETHER, first=self._made, number=missing)
        self.accepted = missing / (time.monotonic() - began)
        self._made += missing

    def number(self, seconds: float) -> int:
        """Return how many runs take about so long."""
        return max(FIRST, int(self.rate * seconds))

    def run(self, number: int) -> tuple[float, float]:
        """Let so many begin; return how many do in a second, and the scheduler's CPU seconds for each."""
        done = work.count(self._system.notes)
        before = self._scheduler()
        self._client.resume("task", work.NAME)
        self._system.await_runs(done + number, TIMEOUT)
        spent = self._scheduler() - before
        ran = work.count(self._system.notes) - done
        self.pause()
        times_of = [at for _, at in work.read(self._system.notes)][done : done + number]
        rate = (len(times_of) - 1) / (times_of[-1] - times_of[0]) * 1e9
        self.rate = max(self.rate, rate)
        return rate, spent / ran

    def _scheduler(self) -> float:
        return processes.usage([self._system.scheduler()])[self._system.scheduler()].cpu_seconds


def backlogs(shared: World, sizes: Sizes, seconds: float) -> list[Figures]:
    """Measure at each backlog."""
    found = []
    with shared.place("backlogs") as place, Mqworker(place) as system, system.client() as client:
        pool = Pool(system, client)
        system.start_workers()
        system.await_agents(client, 1)
        pool.pause()
        pool.fill(FIRST + SPARE)
        pool.run(FIRST)
        for size in sizes:
            rates, costs = [], []
            for _ in range(ROUNDS):
                number = pool.number(seconds)
                pool.fill(size + number + SPARE)
                rate, cost = pool.run(number)
                rates.append(rate)
                costs.append(cost)
            memory = processes.proportional_memory([system.scheduler()])
            found.append({"backlog": size, "rates": rates, "scheduler": costs, "memory": memory})
            print(f"{size} waiting: {middle(rates)} a second", file=sys.stderr)
    return found


def agents(shared: World, sizes: Sizes, seconds: float) -> list[Figures]:
    """Measure with each number of agents."""
    found = []
    with shared.place("agents") as place, Mqworker(place) as system, system.client() as client:
        pool = Pool(system, client)
        pool.pause()
        started = 0
        for size in sizes:
            while started < size:
                started += 1
                system.start_agent(f"w{started}", 1)
            system.await_agents(client, size, START_SECONDS * size + TIMEOUT)
            time.sleep(QUIET_SECONDS)
            before = processes.usage([system.scheduler()])[system.scheduler()].cpu_seconds
            time.sleep(seconds)
            idle = processes.usage([system.scheduler()])[system.scheduler()].cpu_seconds - before
            number = max(pool.number(seconds), size)
            pool.fill(number + SPARE + size)
            rate, cost = pool.run(number)
            memory = processes.proportional_memory([system.scheduler()])
            one = {"agents": size, "idle": idle / seconds, "rate": rate, "scheduler": cost, "memory": memory}
            found.append(one)
            print(f"{size} agents: {rate:.0f} a second", file=sys.stderr)
    return found


def farms(sizes: Sizes) -> list[Figures]:
    """Simulate farms; add up what the scheduler does for a request: new, granted, ended."""
    found = []
    for size in sizes:
        asked = ("--workers", str(size), "--kinds", "10", "--backlogs", "1000", "--rounds", "3")
        [one] = matching.run(matching.parser().parse_args(asked))
        cost = sum(one[name][0] for name in ("new", "claim", "free"))
        found.append({"workers": size, "scheduler": cost, "quiet second": one["quiet second"][0]})
        print(f"{size} simulated workers: {milliseconds(cost)}", file=sys.stderr)
    return found


def run(given: argparse.Namespace) -> Figures:
    """Measure, and put it together."""
    if given.quick is not None:
        given.backlogs, given.agents, given.farms, given.seconds = given.quick
    with world(()) as shared:
        found = {
            "backlogs": backlogs(shared, given.backlogs, given.seconds),
            "agents": agents(shared, given.agents, given.seconds),
        }
    return {**found, "farms": farms(given.farms)}


def table(found: Figures) -> str:
    """Write the figures down."""
    first, last = found["backlogs"][0], found["backlogs"][-1]
    kept = median(last["rates"]) / median(first["rates"])
    goal = Goal(f"rate with {last['backlog']:,} waiting, against {first['backlog']:,}", LESS, at_least=True)
    mib = 2**20
    lines = [
        *paragraph("One agent with two slots, while at least so many requests like the running ones wait (SQLite):"),
        "",
        *goal_rows([(goal, kept)]),
        "",
        *head("waiting", "against the fewest", "tasks a second", "scheduler's CPU for each", "scheduler's memory"),
    ]
    for one in found["backlogs"]:
        part = times(median(one["rates"]) / median(first["rates"]))
        cost, memory = milliseconds(median(one["scheduler"])), f"{one['memory'] / mib:,.0f} MiB"
        lines.append(row(f"{one['backlog']:,}", part, middle(one["rates"]), cost, memory))
    words = (
        "Agents with one slot each, all on this machine, whose cores they share with all else; and for larger farms "
        "the scheduler's CPU time for a request (alone in its commits, all that it does for it) with simulated workers:"
    )
    few, small = found["agents"][0], found["farms"][0]
    lines += ["", *paragraph(words), ""]
    lines += head("workers", "scheduler's CPU for each, against the fewest", "likewise", "when idle", "tasks a second")
    for one in found["agents"]:
        part, cost = times(one["scheduler"] / few["scheduler"]), milliseconds(one["scheduler"])
        lines.append(row(f"{one['agents']:,}", part, cost, f"{one['idle']:.1%} of a core", f"{one['rate']:,.0f}"))
    for one in found["farms"]:
        part, cost = times(one["scheduler"] / small["scheduler"]), milliseconds(one["scheduler"])
        lines.append(row(f"{one['workers']:,}, simulated", part, cost, f"{one['quiet second']:.1%} of a core", ""))
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Say what can be asked for."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    made.add_argument(
        "--quick", action="store_const", const=([100, 1_000], [1, 5], [200, 1_000], 2.0), help="small sizes"
    )
    made.add_argument("--backlogs", type=_sizes, default=[1_000, 10_000, 100_000])
    made.add_argument("--agents", type=_sizes, default=[1, 10, 50, 200])
    made.add_argument("--farms", type=_sizes, default=[200, 1_000, 10_000])
    made.add_argument("--seconds", type=float, default=6.0, help="that a run takes")
    return made


def _sizes(text: str) -> Sizes:
    return [int(one) for one in text.split(",")]


def main() -> None:
    """Measure, and print JSON."""
    print(json.dumps(run(parser().parse_args()), indent=1))


if __name__ == "__main__":
    main()
