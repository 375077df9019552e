"""Limits, on real processes and directories."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from mqworker import limits, processes
from mqworker.cgroup import Cgroup
from mqworker.limits import Watch
from mqworker.messages import Limits

MIB = 1024 * 1024
PATIENCE = 30.0  # seconds
FILL = '"$0" -c "b = b\'x\' * 60000000; import time; time.sleep(1000)"'


def eventually(met):
    deadline = time.monotonic() + PATIENCE
    while not (found := met()):
        assert time.monotonic() < deadline
        time.sleep(0.01)  # between two looks at what has no event
    return found


@contextmanager
def tree(script):
    """A process that begins with its script when it is told to."""
    code = "import os, subprocess, sys; sys.stdin.readline(); subprocess.run(['sh', '-c', sys.argv[1], sys.executable])"
    with subprocess.Popen(
        [sys.executable, "-c", f"from mqworker import processes; processes.become_subreaper(); {code}", script],
        stdin=subprocess.PIPE,
        text=True,
    ) as process:

        def begin():
            process.stdin.write("go\n")
            process.stdin.flush()

        eventually(lambda: b"-c" in Path(f"/proc/{process.pid}/cmdline").read_bytes())
        yield process, begin
        processes.kill_tree(processes.identify(process.pid))


def test_of_two_sets_of_limits_the_smaller_one_of_each_counts():
    one = Limits(memory=2**30, cpus=2, processes=10)
    other = Limits(memory=2**29, cpus=3, disk=2**20)

    assert limits.smaller(one, other) == Limits(memory=2**29, cpus=2, processes=10, disk=2**20)
    assert limits.smaller(None, one) == limits.smaller(one, None) == one
    assert not limits.any_of(limits.smaller(None, Limits()))
    assert limits.any_of(Limits(cpus=1))


def test_runs_that_may_use_a_few_cores_get_different_ones(monkeypatch):
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _: {0, 1, 2, 5})

    assert limits.spread(None, []) == limits.spread(4, []) == limits.spread(3.5, []) == []
    assert limits.spread(1.5, []) == [0, 1]
    assert limits.spread(2, [[0, 1]]) == [2, 5]
    assert limits.spread(1, [[0, 1], [2]]) == [5]


@pytest.mark.parametrize(
    ("script", "bounds", "what"),
    [
        ("for i in 1 2 3; do sleep 1000 & done; wait", Limits(processes=3), "processes"),
        ("while :; do \"$0\" -S -c 'sum(range(10**6))'; done", Limits(cpu_seconds=1), "cpu"),
        (f"{FILL} & {FILL} & wait", Limits(memory=100 * MIB), "memory"),
    ],
)
def test_what_a_whole_tree_uses_beyond_a_limit_is_seen(tmp_path, script, bounds, what):
    with tree(script) as (process, begin):
        watch = Watch(limits=bounds, slot=process.pid, directory=tmp_path, cgroup=None)
        assert watch.looks_at_processes
        assert watch.for_slot == bounds
        assert limits.look([watch]) == {}
        begin()
        found = eventually(lambda: limits.look([watch]))

        assert found[process.pid].what == what
        assert "limit" in found[process.pid].text


def test_memory_that_processes_share_counts_once(tmp_path):
    fork = "[os.fork() and None for _ in range(2)]"
    script = f'"$0" -c "import os, time; b = b\'x\' * 60000000; {fork}; time.sleep(1000)" & wait'
    with tree(script) as (process, begin):
        watch = Watch(limits=Limits(memory=100 * MIB), slot=process.pid, directory=tmp_path, cgroup=None)
        begin()
        eventually(lambda: processes.usage([process.pid])[process.pid].memory > 240_000_000)

        assert limits.look([watch]) == {}


def test_a_directory_that_grows_beyond_its_limit_is_seen_and_what_has_two_names_counts_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(os.urandom(3 * MIB))
    os.link(tmp_path / "a" / "file", tmp_path / "again")
    (tmp_path / "away").symlink_to("/usr")
    assert 3 * MIB <= processes.size_of_tree(tmp_path) < 4 * MIB
    assert processes.size_of_tree(tmp_path / "missing") == 0

    one = Watch(limits=Limits(disk=4 * MIB), slot=os.getpid(), directory=tmp_path, cgroup=None)
    assert limits.look([one]) == {}
    (tmp_path / "more").write_bytes(os.urandom(2 * MIB))
    other = Watch(limits=Limits(disk=4 * MIB), slot=os.getpid(), directory=tmp_path, cgroup=None)
    assert limits.look([other])[os.getpid()].what == "disk"


class Copy:
    """A control group's files, as Linux 6.1 shows them, which the test fills as the kernel would."""

    def __init__(self, path):
        self.path = path
        path.mkdir()
        self.has("memory.current", "30000000\n")
        self.has("memory.events", "low 0\nhigh 0\nmax 0\noom 0\noom_kill 2\noom_group_kill 0\n")
        self.has("pids.events", "max 5\n")
        self.has("cpu.stat", "usage_usec 7000000\nuser_usec 5000000\nsystem_usec 2000000\n")
        for name in ("memory.oom.group", "memory.max", "memory.swap.max", "cpu.max", "pids.max"):
            self.has(name, "")

    def has(self, name, text):
        (self.path / name).write_text(text)

    def got(self, name):
        return (self.path / name).read_text()


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("memory.events", "low 0\nhigh 0\nmax 9\noom 1\noom_kill 3\noom_group_kill 1\n", "memory"),
        ("pids.events", "max 6\n", "processes"),
        ("cpu.stat", "usage_usec 10100000\nuser_usec 5000000\nsystem_usec 5100000\n", "cpu"),
    ],
)
def test_where_the_kernel_keeps_the_limits_it_is_asked_what_it_did(tmp_path, name, text, what):
    """On a copy of the files: what they do was tried by hand."""
    copy = Copy(tmp_path / "group")
    bounds = Limits(memory=100 * MIB, cpus=0.5, cpu_seconds=3, processes=8)
    watch = Watch(limits=bounds, slot=os.getpid(), directory=tmp_path, cgroup=Cgroup(copy.path))
    assert (watch.for_slot, watch.looks_at_processes) == (None, False)
    assert copy.got("memory.max") == str(100 * MIB + 30_000_000)
    assert (copy.got("memory.oom.group"), copy.got("memory.swap.max"), copy.got("cpu.max")) == (
        "1",
        "0",
        "50000 100000",
    )
    assert int(copy.got("pids.max")) == 8 + processes.usage([os.getpid()])[os.getpid()].threads
    assert limits.look([watch]) == {}

    copy.has(name, text)
    assert limits.look([watch])[os.getpid()].what == what
