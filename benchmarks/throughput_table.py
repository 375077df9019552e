"""What benchmarks.throughput found, as the README shows it: ratios first, and beside each goal whether it is met."""

import os
import time
from collections.abc import Mapping
from statistics import median
from typing import Any, Final

from benchmarks.goals import Goal, goal_rows
from benchmarks.idle_slot import quantile
from benchmarks.readme import head, middle, milliseconds, paragraph, row, times
from benchmarks.submitting import ONE_BY_ONE, TOGETHER
from benchmarks.systems import SYSTEMS
from benchmarks.throughput import FILLED

OURS: Final = "mqworker-sqlite"

Figures = Mapping[str, Mapping[str, Any]]


LIVE_GOALS: Final = {"celery": 8.0, "celery-database": 25.0, "dramatiq": 6.0, "raw-quorum": 0.6}
FILLED_GOALS: Final = {"celery": 2.5, "celery-database": 12.0, "dramatiq": 1.5}
START_GOAL: Final = Goal("submission to start, p50, against Celery's", 1.5, at_least=False)
START_P99_GOAL: Final = Goal("submission to start, p99", 50.0, at_least=False, unit="ms")
CPU_GOAL: Final = Goal("CPU per task, against Celery's", 1.0, at_least=False)


def ratio(found: Figures, other: str, way: str) -> float | None:
    """Return how many times as fast mqworker is as another system; None if one of both was not measured."""
    if OURS not in found or other not in found:
        return None
    return float(median(found[OURS]["rates"][way]) / median(found[other]["rates"][way]))


def goals(found: Figures) -> list[tuple[Goal, float]]:
    """Return each goal of which there is a figure, with the figure."""
    judged: list[tuple[Goal, float]] = []
    for way, words, wanted in (
        (TOGETHER, "live, to the last result known", LIVE_GOALS),
        (FILLED, "filled first, the workers' side alone", FILLED_GOALS),
    ):
        for name, bound in wanted.items():
            figure = ratio(found, name, way)
            if figure is not None:
                judged.append((Goal(f"{words}, against {SYSTEMS[name].title}", bound, at_least=True), figure))
    if OURS in found and found[OURS]["waits"]:
        judged.append((START_P99_GOAL, quantile(found[OURS]["waits"], 0.99) * 1e3))
    if OURS in found and "celery" in found:
        ours, celery = found[OURS], found["celery"]
        if ours["waits"] and celery["waits"]:
            judged.append((START_GOAL, quantile(ours["waits"], 0.5) / quantile(celery["waits"], 0.5)))
        judged.append((CPU_GOAL, median(ours["cpu"][0]) / median(celery["cpu"][0])))
    return judged


def table(found: Figures, *, command: str) -> str:
    """Write the figures down."""
    rounds = max(len(one["rates"][TOGETHER]) for one in found.values())
    samples = max(len(one["waits"]) for one in found.values())
    words = (
        "The same work for all: tasks that do nothing, with an argument of 150 bytes, persistent messages, publisher "
        "confirms, acknowledged after the work, two processes that work; one private broker, each system alone on it "
        f"in its turn, in alternating order, {rounds} {'rounds' if rounds > 1 else 'round'}; {os.cpu_count()} cores, "
        f"{time.strftime('%Y-%m-%d')}, `{command}`. Rates are tasks a second: medians, and the lowest and highest in "
        "brackets. *Live* is from the first submission to the last result that the submitter knows (to the last "
        "task's beginning, where there are no results), submitted in one go (`submit_many`, or the peer's nearest) or "
        "one by one (`submit`); *filled* is from the first task to the last with all waiting before anybody works. CPU "
        "is that of all of a system's own processes, for each task of the live run; broker and database (where it is "
        "PostgreSQL) are apart. "
        f"*Start* is from the call to the task's first line, on an idle pool ({samples} tasks). "
        f"Of all tasks, {sum(one['repeated'] for one in found.values())} ran twice, and none was lost."
    )
    ways = (TOGETHER, ONE_BY_ONE, FILLED)
    titles = ("live", "live, one by one", "filled")
    lines = [*paragraph(words), ""]
    lines += head("mqworker (SQLite) is, against", *titles)
    for name in found:
        if name != OURS and (figures := [ratio(found, name, way) for way in ways])[0] is not None:
            lines.append(row(SYSTEMS[name].title, *(times(figure) for figure in figures if figure is not None)))
    lines += ["", *goal_rows(goals(found)), ""]
    lines += head("tasks a second", *titles, "CPU", "broker", "database", "start, p50", "p99")
    for name, one in found.items():
        rates = (middle(one["rates"][way]) for way in ways)
        cpu = (milliseconds(median(seconds)) for seconds in one["cpu"])
        waits = (milliseconds(quantile(one["waits"], part)) if one["waits"] else "" for part in (0.5, 0.99))
        lines.append(row(SYSTEMS[name].title, *rates, *cpu, *waits))
    lines += ["", "What was set:"]
    for name in found:
        lines += paragraph(f"- {SYSTEMS[name].title}: {SYSTEMS[name].settings}.", indent="  ")
    return "\n".join(lines) + "\n"
