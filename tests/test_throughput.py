"""The benchmarks with processes of their own still work, at sizes that take no time; no figure of theirs is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import builds, footprint, growth, throughput_table, work
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
    assert sorted(set(cells(text))) == [4, 9]


def cells(text):
    return [len(line.strip("|").split("|")) for line in text.splitlines() if line.startswith("|")]


def test_a_build_may_take_a_hundredth_and_a_second_longer():
    found = {"source": "hello.dsc", "plain": [100.0, 101.0, 99.0], "ours": [101.5, 103.0, 100.5]}
    text = builds.table(found)
    assert "**1.5 s** | at most 2 s | yes" in text
    assert "**2.5 s** | at most 2 s | no" in builds.table({**found, "ours": [102.5, 103.5, 101.5]})


def test_the_footprint_is_judged_by_process():
    mib = 2**20
    cpu = {"agent and slots": 0.002, "scheduler": 0.003}
    found = {"slots": 2, "seconds": 60.0, "agent": 90 * mib, "slot": [20 * mib, 24 * mib], "watchdog": mib, "cpu": cpu}
    text = footprint.table({**found, "scheduler": 50 * mib})
    assert "| memory of an agent | **90 MiB** | at most 80 MiB | no |" in text
    assert "| memory of an idle slot | **22 MiB** | at most 25 MiB | yes |" in text
    assert "| all processes of the agent | 135 MiB |" in text


def test_growth_is_shown_against_the_smallest():
    backlogs = [{"backlog": 10**n, "rates": [100.0 / n], "scheduler": [0.001], "memory": 2**20} for n in (1, 2)]
    agents = [{"agents": n, "idle": 0.01, "rate": 9.0, "scheduler": 0.001 * n, "memory": 2**20} for n in (1, 3)]
    farms = [{"workers": n, "scheduler": 0.001, "quiet second": 0.1} for n in (5, 6)]
    text = growth.table({"backlogs": backlogs, "agents": agents, "farms": farms})
    assert "| rate with 100 waiting, against 10 | **0.50 times** | at least 0.9 times | no |" in text
    assert "| 3 | 3.00 times |" in text
    assert cells(text) == [4] * 3 + [5] * 4 + [5] * 6


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
