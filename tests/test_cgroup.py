"""Control groups: on a copy of their files, and where this host lets us, on a real group without controllers."""

import os
import signal
import subprocess
import uuid
from pathlib import Path

import pytest

from mqworker.cgroup import AGENT, Cgroup, Cgroups
from mqworker.errors import HostUnfit


@pytest.fixture
def given(tmp_path, missing):
    """A group that was given to this service, and the /proc files that show it."""
    base = tmp_path / "sys" / "unit.service"
    base.mkdir(parents=True)
    for name, text in (("controllers", "cpuset cpu io memory pids\n"), ("procs", "7\n8\n"), ("subtree_control", "")):
        (base / f"cgroup.{name}").write_text(text)
    try:
        os.setxattr(base, "user.delegate", b"1")
    except OSError as error:
        missing("a file system with attributes", str(error))
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text("9:name=systemd:/\n0::/outer/unit.service\n")
    (proc / "mountinfo").write_text(
        "30 1 0:26 / / rw - ext4 /dev/vda rw\n"
        f"31 30 0:27 /outer {tmp_path / 'sys'} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    return base, proc


def test_a_group_that_was_given_to_this_service_is_divided(given):
    base, proc = given
    groups = Cgroups.take(proc=proc)
    one = groups.make(3)

    assert (base / AGENT / "cgroup.procs").read_text() == "8"  # the last of those that moved
    assert (base / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    assert one.path == base / f"mqworker-{os.getpid()}-slot-3"


def test_who_was_moved_by_a_predecessor_divides_the_same_group(given):
    base, proc = given
    (base / AGENT).mkdir()
    (proc / "cgroup").write_text(f"0::/outer/unit.service/{AGENT}\n")

    assert Cgroups.take(proc=proc).make(0).path.parent == base


def test_groups_of_agents_that_have_ended_are_removed_and_those_of_others_stay(given):
    base, proc = given
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in (f"mqworker-{ended.pid}-slot-0", f"mqworker-{os.getpid()}-slot-0", "somebody-else"):
        (base / name).mkdir()
    Cgroups.take(proc=proc)

    assert {path.name for path in base.iterdir() if path.is_dir()} == {
        AGENT,
        f"mqworker-{os.getpid()}-slot-0",
        "somebody-else",
    }


def test_a_group_without_the_controllers_or_that_is_another_services_is_left_alone(given):
    base, proc = given
    (base / "cgroup.controllers").write_text("cpuset cpu io\n")
    with pytest.raises(HostUnfit, match="memory, pids missing"):
        Cgroups.take(proc=proc)
    os.setxattr(base, "user.delegate", b"0")
    with pytest.raises(HostUnfit, match="set Delegate=yes"):
        Cgroups.take(proc=proc)
    (proc / "cgroup").write_text("9:name=systemd:/\n")
    with pytest.raises(HostUnfit, match="shows its control groups"):
        Cgroups.take(proc=proc)
    assert not (base / AGENT).exists()


@pytest.fixture
def real(missing):
    """A real group, which has no controllers where the host uses them in another way."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"]
    if not roots:
        missing("cgroup v2", "nothing of that kind is mounted")
    group = Cgroup(roots[0] / f"mqworker-test-{uuid.uuid4().hex[:8]}")
    try:
        group.path.mkdir()
    except OSError as error:
        missing("the right to make control groups", str(error))
    yield group
    group.remove()
    assert not group.path.exists()


def test_all_in_a_group_are_killed_and_their_time_is_known(real):
    with subprocess.Popen(["sh", "-c", "read x; setsid sleep 1000 & sleep 1000"], stdin=subprocess.PIPE) as child:
        real.put(child.pid)
        child.stdin.write(b"\n")
        child.stdin.flush()
        while len((real.path / "cgroup.procs").read_text().split()) < 3:
            assert child.poll() is None
        real.kill()
        assert child.wait() == -signal.SIGKILL
        while (real.path / "cgroup.procs").read_text():  # the kernel says so a moment later
            pass

    assert real.cpu_seconds() > 0
    with pytest.raises(HostUnfit, match="expected to write"):
        real.put(child.pid)
