"""The short version: a real pool burns for three minutes. `make chaos` runs the long one."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mqworker.errors import HostUnfit
from mqworker.privatenode import find_programs

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 1200  # seconds; on a busy machine the drain takes long
SEED = os.environ.get("MQWORKER_TEST_CHAOS_SEED", "1")

pytestmark = pytest.mark.live


@pytest.fixture
def chaos(missing, tmp_path):
    """Start a run; who leaves the test ends it in order."""
    try:
        find_programs()
    except HostUnfit as error:
        missing("rabbitmq-server", str(error))
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos", "--seed", SEED, "--keep", str(tmp_path / "kept"), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(120)
        process.stdout.close()


def test_a_pool_on_fire_loses_nothing_and_runs_nothing_twice(chaos, tmp_path):
    process = chaos("--quick", "--minutes", "3", "--report", str(tmp_path / "report.md"))
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, f"logs and evidence are in {tmp_path / 'kept'}\n{said}"
    assert "0 lost, 0 overlapping, 0 counted twice, 0 other violations" in said
    assert "It holds." in (tmp_path / "report.md").read_text()
    shutil.rmtree(tmp_path / "kept")
    if "LEFT OUT" in said:
        pytest.skip("it holds, but full disks, which need root and mounts of its own, were LEFT OUT")


def test_an_interrupted_run_stops_everything_and_says_so(chaos):
    process = chaos("--minutes", "10")
    said = ""
    while "the submitters begin" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    directory = said.partition("everything is in ")[2].splitlines()[0]
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "interrupted by SIGINT" in rest
    assert "it was interrupted: no verdict" in rest
    assert not Path(directory).exists()
    mark = f"MQWORKER_TASK_CHAOS={directory}".encode()
    assert not [entry for entry in Path("/proc").glob("[0-9]*") if mark in _environment(entry)]


def _environment(entry):
    try:
        return (entry / "environ").read_bytes()
    except OSError:
        return b""
