"""The throughput benchmark still works, at a size that takes no time; no figure of it is judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import throughput_table, work
from benchmarks.throughput import Plan
from mqworker.errors import HostUnfit
from mqworker.privatenode import find_programs

ROOT = Path(__file__).parents[1]


def figures(rate, **changed):
    ways = ("filled", "one by one", "together")
    return {
        "tasks": dict.fromkeys(ways, 10),
        "rates": {way: [rate / 2, rate, rate * 3] for way in ways},
        "cpu": [[0.001], [0.002], [0.0]],
        "waits": [0.001, 0.002, 0.003],
        "repeated": 0,
        **changed,
    }


def test_the_argument_has_as_many_bytes_as_is_said():
    for number in (0, 123456789):
        argument = work.argument(number)
        assert len(json.dumps(argument, separators=(",", ":"))) == work.ARGUMENT_BYTES
        assert int(argument["number"]) == number


def test_notes_are_counted_and_read_in_the_order_of_their_times(tmp_path, monkeypatch):
    monkeypatch.setenv(work.NOTES, str(tmp_path))
    for number in (3, 1, 2):
        work.run(**work.argument(number))
    assert work.count(tmp_path) == 3
    notes = work.read(tmp_path)
    assert [number for number, _ in notes] == [3, 1, 2]
    assert notes[0][1] <= notes[1][1] <= notes[2][1]


def test_a_plan_takes_as_many_tasks_as_fill_its_time():
    plan = Plan(seconds=5.0, fixed=None)
    first = plan.number("a", "filled")
    plan.learn("a", "filled", 4_000.0)
    plan.learn("a", "filled", 3_000.0)
    assert plan.number("a", "filled") == 20_000
    assert plan.number("b", "filled") == first
    assert Plan(seconds=5.0, fixed=7).number("a", "filled") == 7


def test_the_ratio_is_of_medians_and_missing_where_one_was_not_measured():
    found = {"mqworker-sqlite": figures(800.0), "celery": figures(100.0)}
    assert throughput_table.ratio(found, "celery", "together") == 8.0
    assert throughput_table.ratio(found, "dramatiq", "together") is None


def test_each_goal_says_whether_it_is_met():
    found = {"mqworker-sqlite": figures(700.0, waits=[0.06]), "celery": figures(100.0)}
    judged = {goal.text: goal.met(figure) for goal, figure in throughput_table.goals(found)}
    assert judged == {
        "live, to the last result known, against Celery, no results": False,
        "filled first, the workers' side alone, against Celery, no results": True,
        "submission to start, p99": False,
        "submission to start, p50, against Celery's": False,
        "CPU per task, against Celery's": True,
    }


def test_the_table_has_as_many_cells_in_each_row_as_in_its_head():
    names = ("mqworker-sqlite", "celery", "celery-database", "dramatiq", "raw-quorum")
    text = throughput_table.table({name: figures(100.0) for name in names}, command="x")
    rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert sorted(set(rows)) == [5, 10]


@pytest.mark.live
def test_the_throughput_benchmark_measures_mqworker_and_pika_alone(missing):
    try:
        find_programs()
    except HostUnfit as error:
        missing("rabbitmq-server", str(error))
    systems = ("--systems", "mqworker-sqlite,raw-quorum")
    small = ("--tasks", "20", "--rounds", "1", "--samples", "2")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.throughput", *systems, *small],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"mqworker-sqlite", "raw-quorum"}
    for one in found.values():
        assert all(rate > 0 for rates in one["rates"].values() for rate in rates)
        assert len(one["waits"]) == 2
        assert one["repeated"] == 0
