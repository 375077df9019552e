"""A few seeds of the simulator; `make sim` runs many, and `make sim-mutants` shows that it bites."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_a_pool_keeps_its_promises_through_everything_that_some_seeds_do_to_it():
    run = subprocess.run(
        [sys.executable, "-m", "tests.sim", "--seeds", "1-12"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "12 seeds, 0 failed" in run.stdout


@pytest.mark.parametrize("folder", ["sim", "chaos"])
def test_each_way_to_break_a_pool_still_applies(folder):
    patches = sorted((ROOT / "tests" / folder / "mutants").glob("*.patch"))
    assert patches
    for patch in patches:
        done = subprocess.run(
            ["git", "apply", "--check", str(patch)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{patch.name}: {done.stderr}"


def test_a_seed_does_the_same_each_time():
    command = [sys.executable, "-m", "tests.sim", "--seed", "3", "--trace"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    one, other = (
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert one == other
    assert one.endswith("seed 3: well\n")
