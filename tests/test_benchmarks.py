"""The benchmarks still work, at sizes that take no time; no figure of theirs is judged here."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ("--workers", "40", "--kinds", "20", "--rounds", "1", "--operations", "2", "--backlogs", "30,60")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What the matching benchmark finds, in processes of its own: its task is none of this process's."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.matching", *SMALL, "--directory", str(tmp_path_factory.mktemp("bench"))],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return json.loads(done.stdout)


def test_the_matching_benchmark_measures_at_each_backlog(measured):
    assert [one["backlog"] for one in measured] == [30, 60]
    for one in measured:
        assert one["pending"] >= one["backlog"]
        assert one["requirements"] >= 20
        assert one["escaped"] == 0
        assert all(
            one[name][0] > 0 for name in ("new", "first", "free", "claim", "join", "heartbeat", "change decision")
        )


def test_the_table_has_a_column_for_each_backlog_and_a_figure_in_each_cell(measured):
    code = (
        "import json, sys; from benchmarks.__main__ import table;"
        "sys.stdout.write(table(json.load(sys.stdin), None, workers=40, kinds=20))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        input=json.dumps(measured),
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    rows = [line.strip("|").split("|") for line in said.splitlines() if line.startswith("|")]
    assert rows[0][1:] == [" 30 ", " 60 "]
    assert all(len(row) == 3 and all(cell.strip() for cell in row) for row in rows)


def test_only_waits_with_work_there_all_the_while_are_counted(tmp_path):
    spec = importlib.util.spec_from_file_location("idle_slot", ROOT / "benchmarks" / "idle_slot.py")
    idle_slot = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = idle_slot
    spec.loader.exec_module(idle_slot)
    journal = tmp_path / "journal"
    runs = [("a", "quick", 1, 10, 20), ("b", "quick", 1, 25, 30), ("c", "quick", 1, 50, 60), ("d", "large", 2, 5, 70)]
    journal.write_text(
        "".join(
            json.dumps({"what": what, "label": label, "slot": slot, "worker": worker, "ns": int(at * 1e9)}) + "\n"
            for label, worker, slot, start, end in runs
            for what, at in (("start", start), ("end", end))
        )
    )
    anybody, only_large = idle_slot.SORTS[0], idle_slot.Sort("x", None, frozenset({"large"}))
    sorts = {"a": anybody, "b": anybody, "c": anybody, "d": only_large}
    accepted = {"a": 0, "b": 0, "c": int(31e9), "d": 0}  # when b ends, there is nothing for its slot
    assert idle_slot.waits(journal, sorts, accepted) == [5.0]
    assert idle_slot.quantile([1, 2, 3, 4], 0.5) == 2
    assert idle_slot.quantile([1, 2, 3, 4], 0.99) == 4
