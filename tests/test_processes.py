import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from pathlib import Path

import pytest

from mqworker import processes
from mqworker.errors import HostUnfit
from mqworker.processes import Process

DEADLINE = 20  # seconds in which a thing that must happen has happened


@pytest.fixture(autouse=True)
def others():
    """The pids of descendants that are not the test's, like the broker of other tests; what the test leaves goes."""
    processes.become_subreaper()
    before = [process.pid for process in processes.descendants(os.getpid())]
    yield before
    processes.kill_descendants(spare=before)


@pytest.fixture
def start():
    """Start a program that says on its first line that it is ready, and collect it in the end."""
    with contextlib.ExitStack() as stack:

        def start(*command, **options):
            child = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options))
            stack.callback(child.kill)
            child.ready = child.stdout.readline().strip()
            return child

        yield start


def ends(pid):
    """Wait for a process to end, by the kernel's word."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], DEADLINE)[0])
    finally:
        os.close(pidfd)


def until(condition):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def comm(pid):
    return Path(f"/proc/{pid}/comm").read_text().strip()


def grandchildren(child):
    return [process.pid for process in processes.descendants(child.pid)]


# ---------------------------------------------------------------- clocks and kinship


def test_the_boottime_clock_counts_nanoseconds_and_never_goes_back():
    first = processes.boottime_ns()
    second = processes.boottime_ns()

    assert first <= second
    assert abs(first - time.clock_gettime(time.CLOCK_BOOTTIME) * 1e9) < 60e9


def test_an_orphan_comes_to_the_subreaper(start):
    child = start("sh", "-c", "sleep 1000 & echo $!; exec >&-; exit")
    orphan = int(child.ready)
    child.wait()

    assert orphan in [process.pid for process in processes.descendants(os.getpid())]


def test_a_child_dies_with_its_parent():
    code = """
        import subprocess, sys
        from mqworker.processes import die_with_parent
        child = subprocess.Popen(["sleep", "1000"], preexec_fn=die_with_parent)
        print(child.pid, flush=True)
        sys.stdin.read()
        """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        pid = int(parent.stdout.readline())

        assert processes.identify(pid) is not None

        parent.kill()

    assert ends(pid)


def test_a_child_whose_parent_is_already_gone_does_not_outlive_that():
    reader, writer = os.pipe()
    with warnings.catch_warnings(action="ignore"):  # of a fork while other tests' threads may run
        parent = os.fork()
    if parent == 0:
        parent_pid = os.getpid()
        if os.fork() == 0:
            while os.getppid() == parent_pid:
                time.sleep(0.001)
            processes.die_with_parent()
            os.write(writer, b"alive")
        os._exit(0)
    os.close(writer)
    os.waitpid(parent, 0)

    with os.fdopen(reader, "rb") as survivors:
        assert survivors.read() == b""


# ---------------------------------------------------------------- the process table


def test_a_process_is_named_by_pid_and_start(start):
    child = start("sh", "-c", "echo ready; exec sleep 1000")

    assert processes.identify(child.pid) == processes.identify(child.pid)
    assert processes.identify(child.pid).pid == child.pid
    assert processes.identify(child.pid).start >= processes.identify(os.getpid()).start


def test_a_zombie_is_gone(start):
    child = start("echo", "ready")
    ends(child.pid)

    assert Path(f"/proc/{child.pid}").exists()
    assert processes.identify(child.pid) is None
    assert child.pid not in [process.pid for process in processes.descendants(os.getpid())]


def test_a_process_whose_first_thread_has_ended_still_lives(start, others):
    code = """
        import ctypes, threading, time
        threading.Thread(target=time.sleep, args=(1000,)).start()
        print("ready", flush=True)
        ctypes.CDLL(None).pthread_exit(None)  # of this thread only
        """
    child = start(sys.executable, "-c", textwrap.dedent(code))
    until(lambda: ") Z " in Path(f"/proc/{child.pid}/stat").read_text())

    assert processes.identify(child.pid) is not None

    processes.kill_descendants(spare=others)

    assert processes.identify(child.pid) is None


def test_a_command_name_with_blanks_and_parentheses_is_read(start, tmp_path):
    program = tmp_path / "a) Z 1 (b"
    program.symlink_to("/bin/sleep")
    child = start("sh", "-c", 'echo ready; exec "$0" 1000', str(program))
    until(lambda: processes.identify(child.pid) is not None and "Z 1" in Path(f"/proc/{child.pid}/stat").read_text())

    assert processes.identify(child.pid) is not None


def test_descendants_are_listed_parents_first(start):
    child = start("sh", "-c", "sh -c 'sleep 1000 & echo ready; wait' & wait")

    names = []
    until(lambda: names.append([comm(pid) for pid in grandchildren(child)]) or names[-1] == ["sh", "sleep"])


# ---------------------------------------------------------------- ending processes


def test_descendants_are_killed_whatever_session_they_are_in_and_whatever_they_ignore(start, others):
    child = start("sh", "-c", "trap '' TERM; setsid sh -c \"trap '' TERM; sleep 1000 & echo ready; wait\" & wait")
    family = [child.pid, *grandchildren(child)]

    with processes.collecting(child.pid):
        killed = processes.kill_descendants(spare=others)

    assert killed == len(family) == 3
    assert [processes.identify(pid) for pid in family] == [None] * 3
    assert child.wait() == -signal.SIGKILL


def test_descendants_in_a_pid_namespace_are_killed(start, others):
    namespace = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("this kernel gives us no user namespaces")
    child = start(*namespace, "sh", "-c", "setsid sleep 1000 & echo ready; wait")
    family = grandchildren(child)

    processes.kill_descendants(spare=others)

    assert len(family) == 2
    assert [processes.identify(pid) for pid in family] == [None] * 2


def test_a_chain_that_forks_and_exits_all_the_time_is_ended(start, others):
    code = """
        import os, time
        end = time.monotonic() + 20
        if os.fork():
            os._exit(0)
        os.write(1, b"ready\\n")
        os.close(1)
        while time.monotonic() < end:
            if os.fork():
                os._exit(0)
        """
    start(sys.executable, "-c", textwrap.dedent(code)).wait()

    processes.kill_descendants(spare=others)

    assert [process.pid for process in processes.descendants(os.getpid())] == others


def test_an_orphan_that_ended_meanwhile_calls_for_another_look(start, monkeypatch, others):
    child = start("sh", "-c", "exec 3<&0; (read x <&3) & echo $!", stdin=subprocess.PIPE)
    child.wait()
    child.stdin.close()
    ends(int(child.ready))
    survivor = start("sh", "-c", "echo ready; exec sleep 1000")
    looks = []
    freeze = processes._freeze

    def freeze_but_see_nothing_at_first(*arguments):
        looks.append(arguments)
        return [] if len(looks) == 1 else freeze(*arguments)

    monkeypatch.setattr(processes, "_freeze", freeze_but_see_nothing_at_first)

    assert processes.kill_descendants(spare=others) == 1
    assert processes.identify(survivor.pid) is None


def test_nothing_to_kill_is_nothing_killed(others):
    assert processes.kill_descendants(spare=others) == 0


def test_spared_processes_keep_their_children_and_their_exit_status(start, others):
    spared = start("sh", "-c", "sleep 1000 & echo ready; wait; exit 7")
    ended = start("sh", "-c", "echo ready; exit 5")
    other = start("sh", "-c", "echo ready; exec sleep 1000")
    ends(ended.pid)

    killed = processes.kill_descendants(spare=[spared.pid, ended.pid, *others])

    assert killed == 1
    assert processes.identify(other.pid) is None
    assert [processes.identify(pid) is not None for pid in grandchildren(spared)] == [True]
    assert ended.wait() == 5


def test_killed_orphans_leave_no_zombies(start, others):
    child = start("sh", "-c", "sleep 1000 & echo $!; exec >&-; exit")
    orphan = int(child.ready)
    child.wait()

    assert processes.kill_descendants(spare=others) == 1
    assert not Path(f"/proc/{orphan}").exists()


def test_descendants_that_outlive_the_timeout_are_named(start, monkeypatch, others):
    start("sh", "-c", "echo ready; exec sleep 1000")
    monkeypatch.setattr(processes, "_signal", lambda *_: True)  # like a process in an uninterruptible sleep

    with pytest.raises(HostUnfit, match="sleep 1000"):
        processes.kill_descendants(spare=others, timeout=0.01)


def test_the_descendants_of_another_process_are_killed_and_it_lives_on(start):
    child = start("sh", "-c", "(setsid sleep 1000 & echo $!; wait) & sleep 1001 & wait; read x", stdin=subprocess.PIPE)
    sleeper = int(child.ready)
    until(lambda: len(grandchildren(child)) == 3)

    assert processes.kill_descendants(child.pid) == 3
    assert processes.identify(sleeper) is None
    assert processes.identify(child.pid) is not None


def test_a_descendant_is_gone_even_where_its_death_takes_time_and_its_parent_went_before_it(start):
    code = "import time; block = bytearray(300_000_000); block[::4096] = bytes(73243); print('ready', flush=True); "
    code += "time.sleep(1000)"
    child = start("sh", "-c", 'sh -c \'"$0" -c "$1" & wait\' "$0" "$1" & wait', sys.executable, code)
    _, slow = grandchildren(child)
    processes.kill_descendants(child.pid)

    assert processes.identify(slow) is None


def test_what_a_predecessor_left_is_killed_with_all_its_children(start):
    child = start("sh", "-c", "setsid sh -c 'sleep 1000 & echo ready; wait' & wait")
    family = [child.pid, *grandchildren(child)]

    processes.kill_tree(processes.identify(child.pid))

    assert len(family) == 3
    assert [processes.identify(pid) for pid in family] == [None] * 3


def test_a_process_that_got_the_pid_of_a_predecessor_is_left_alone(start):
    child = start("sh", "-c", "echo ready; exec sleep 1000")
    start_of_another = processes.identify(child.pid).start - 1

    processes.kill_tree(Process(pid=child.pid, start=start_of_another))

    assert processes.identify(child.pid) is not None
    assert child.poll() is None


def test_a_predecessor_that_is_gone_needs_no_killing(start):
    child = start("sh", "-c", "echo ready; exec sleep 1000")
    gone = processes.identify(child.pid)
    child.kill()
    child.wait()

    processes.kill_tree(gone)

    assert processes.identify(gone.pid) != gone


# ---------------------------------------------------------------- directories


def test_a_tree_is_removed_and_what_its_links_point_to_is_not(tmp_path):
    kept = tmp_path / "kept"
    (kept / "below").mkdir(parents=True)
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "file").write_text("x")
    (tree / "link").symlink_to(kept)

    processes.remove_tree(tree)

    assert not tree.exists()
    assert (kept / "below").is_dir()


def test_a_link_to_a_tree_is_removed_and_the_tree_is_not(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")

    processes.remove_tree(tmp_path / "link")

    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_missing_tree_is_fine(tmp_path):
    processes.remove_tree(tmp_path / "missing")

    assert list(tmp_path.iterdir()) == []


def test_a_tree_deeper_than_python_can_walk_is_removed(tmp_path):
    parent = os.open(tmp_path, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=parent)
        child = os.open("d", os.O_RDONLY, dir_fd=parent)
        os.close(parent)
        parent = child
    os.close(parent)

    processes.remove_tree(tmp_path / "d")

    assert list(tmp_path.iterdir()) == []


def test_an_ordinary_user_removes_directories_that_were_closed():
    if not processes.may_unshare():
        pytest.skip("this kernel gives us no user namespaces")
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        with warnings.catch_warnings(action="ignore"):  # of a fork while other tests' threads may run
            child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                if os.geteuid() == 0:  # root removes anything, so become somebody who does not
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
                tree = Path(directory) / "tree"
                (tree / "closed" / "below").mkdir(parents=True)
                (tree / "closed").chmod(0)
                processes.remove_tree(tree)
                os._exit(0)
            os._exit(1)

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert list(Path(directory).iterdir()) == []


def test_nothing_is_removed_while_something_is_mounted_below(tmp_path):
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("this kernel gives us no user namespaces")
    point = tmp_path / "tree" / "a mount"
    point.mkdir(parents=True)
    code = f"""
        from pathlib import Path
        from mqworker.errors import HostUnfit
        from mqworker.processes import remove_tree
        try:
            remove_tree(Path({str(tmp_path / "tree")!r}))
        except HostUnfit as error:
            print(error)
        """
    script = 'mount -t tmpfs none "$1" && touch "$1/kept" && "$2" -P -c "$3" && ls "$1"'

    done = subprocess.run(
        [*namespace, "sh", "-c", script, "sh", str(point), sys.executable, textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
    )

    assert "a mount; unmount it first" in done.stdout
    assert done.stdout.endswith("\nkept\n")


def test_a_tree_that_cannot_be_removed_is_reported(tmp_path, monkeypatch):
    if os.geteuid() == 0:
        tree = Path("/proc/self/fdinfo")  # nobody removes that
    else:
        tree = tmp_path / "parent" / "tree"
        tree.mkdir(parents=True)
        tree.parent.chmod(0o500)
    monkeypatch.setenv("PATH", "/nonexistent")

    with pytest.raises(HostUnfit, match=f"expected to remove {tree}, but: "):
        processes.remove_tree(tree)


# ---------------------------------------------------------------- the host


def test_a_worker_reports_its_host_as_json(tmp_path):
    found = processes.system_metadata(tmp_path)

    assert json.loads(json.dumps(found)) == found
    assert set(found) == {
        "system:hostname",
        "system:cpu_count",
        "system:total_physical_memory",
        "system:free_disk",
        "system:host_architecture",
        "system:architectures",
        "system:kernel",
        "system:mqworker_version",
    }
    memory_kib = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    assert found["system:total_physical_memory"] == memory_kib * 1024
    assert 1 <= found["system:cpu_count"] <= os.cpu_count()
    assert found["system:free_disk"] > 0
    assert found["system:host_architecture"] in found["system:architectures"]
    assert found["system:hostname"] == os.uname().nodename
    assert found["system:kernel"] == os.uname().release


def test_a_host_without_debian_has_an_architecture_too(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    processes._dpkg_architectures.cache_clear()

    own, foreign = processes._dpkg_architectures()
    processes._dpkg_architectures.cache_clear()

    assert own == processes._DEBIAN_ARCHITECTURES.get(os.uname().machine, os.uname().machine)
    assert foreign == frozenset()


def test_foreign_architectures_count_only_where_the_kernel_runs_them(monkeypatch):
    monkeypatch.setattr(processes, "_lines_of", lambda *_: [])
    monkeypatch.setattr(processes, "_emulated_architectures", lambda: {"riscv64"})

    runnable = processes._runnable_architectures("amd64", frozenset({"i386", "arm64"}))

    assert runnable == ["amd64", "i386", "riscv64"]


def test_what_was_copied_from_a_pipe_is_still_in_it():
    source, write_end = os.pipe()
    copies, target = os.pipe()
    os.write(write_end, b"some words")

    assert processes.tee(source, target, 4) == 4
    assert os.read(copies, 100) == b"some"
    assert processes.tee(source, target, 100) == 10
    assert os.read(copies, 100) == b"some words"
    assert os.read(source, 100) == b"some words"
    os.close(write_end)
    assert processes.tee(source, target, 100) == 0
    for descriptor in (source, copies, target):
        os.close(descriptor)


def test_the_peak_of_memory_is_a_programs_own_and_not_its_parents():
    filling = bytearray(b"x" * 300_000_000)
    code = "from mqworker import processes; print(processes.peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert processes.peak_memory() > len(filling)
    assert 1_000_000 < int(child.stdout) < 200_000_000
