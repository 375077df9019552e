"""What a worker does for its host, and what it does when the host is unwell: on real processes and small real disks."""

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mqworker.messages import Limits, Request
from mqworker.processes import OOM_SCORE_ADJ, descendants, identify

pytestmark = pytest.mark.live

MIB = 1024 * 1024
BUSY = 5.0  # seconds that a machine may need more than one that is quiet


@pytest.fixture
def small_disk(missing) -> Iterator:
    """Mount small file systems; a test gives each a directory that is there."""
    mounted = []

    def mount(directory: Path, options: str) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"{options},mode=0711", "tmpfs", str(directory)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            missing("the right to mount", done.stderr.strip())
        mounted.append(directory)
        return directory

    yield mount
    for directory in mounted:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(directory: Path) -> Path:
    """Leave no room in the file system of a directory."""
    path = directory / "filling"
    with path.open("wb", buffering=0) as file:
        for size in (MIB, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    return path


def ask(client, task: str, data: dict, **words) -> str:
    """Submit a request with words that only a Request has."""
    request = Request(id=str(uuid.uuid4()), task=task, data=data, **words)
    client.submit_many([request])
    return request.id


def command(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def below(pool, name: str) -> dict:
    """Return the processes of a worker, by the command that each runs."""
    return {one: b" ".join(command(one.pid)) for one in descendants(pool.processes[name].pid)}


def sleepers(pool, name: str) -> list:
    return [one for one, words in below(pool, name).items() if words.startswith(b"sleep 100")]


def the(pool, name: str, part: bytes):
    """Return the one process of a worker whose command has this in it."""
    [found] = [one for one, words in below(pool, name).items() if part in words]
    return found


# ---------------------------------------------------------------- limits


def test_a_run_that_exceeds_a_limit_ends_as_error_and_says_which(pool, final):
    """Those of the request and those of the worker: the smaller one counts."""
    with ExitStack() as stack:
        pool.environment |= {
            "MQWORKER_WORKER_LIMITS_DISK": str(10 * MIB),
            "MQWORKER_WORKER_LIMITS_CPU_SECONDS": "100",
        }
        client = pool.up(stack, "anna", slots=3)
        asked = {
            "memory": Limits(memory=100 * MIB),
            "memory_error": Limits(memory=100 * MIB),
            "cpu": Limits(cpu_seconds=1),
            "disk": None,
            "processes": Limits(processes=8),
        }
        ids = {how: ask(client, "hungry", {"how": how}, limits=limits, max_attempts=2) for how, limits in asked.items()}
        views = dict(zip(ids, final(client, *ids.values()), strict=True))

        for how, view in views.items():
            assert (how, view.state, len(view.attempts)) == (how, "error", 1)
            assert view.reason.status == how.removesuffix("_error"), view.reason
            assert "limit" in view.reason.text
        assert sleepers(pool, "anna") == []


def test_a_run_within_its_limits_succeeds_on_the_cores_that_it_may_have(pool, final):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        roomy = Limits(memory=1024 * MIB, cpus=1, cpu_seconds=1000, disk=1024 * MIB, processes=1000)
        one, other = final(
            client,
            ask(client, "hungry", {"how": "cores"}, limits=roomy),
            client.submit("hungry", {"how": "cores"}),
        )

        assert [one.state, other.state] == ["success", "success"]
        logs = [b"".join(client.read_file(entry)) for view in (one, other) for a in view.artifacts for entry in a.files]
        assert b"\n1\n" in logs[0]
        assert b"\n%d\n" % len(os.sched_getaffinity(0)) in logs[-1]


@pytest.fixture
def little_memory(tmp_path, eventually) -> Iterator:
    """Have what a process begins from now on share a little memory, of which the kernel keeps the account."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    v2_on = "memory" in _read(v2 / "cgroup.subtree_control").split()
    group, limit = (v2, "memory.max") if v2_on else (v1, "memory.limit_in_bytes")
    group /= f"mqworker-{tmp_path.name}"
    try:
        group.mkdir()
        (group / limit).write_text(str(100 * MIB))
    except OSError as error:
        pytest.skip(f"no control group of memory can be made here: {error}")
    yield lambda pid: (group / "cgroup.procs").write_text(str(pid))
    eventually(lambda: _gone(group), "the control group is gone")


def _gone(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:  # the kernel still has the last of them
        return False
    return True


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_a_run_whose_child_the_kernel_killed_for_want_of_memory_says_so(little_memory, pool, final):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        final(client, client.submit("noop", {}))
        little_memory(the(pool, "anna", b"mqworker.slot").pid)
        [view] = final(client, client.submit("hungry", {"how": "oom"}))
        [well] = final(client, client.submit("noop", {}))

    assert (view.state, view.reason.status) == ("failure", "memory")
    assert "the kernel killed processes, perhaps of this run" in view.reason.text
    assert (well.state, well.reason) == ("success", None)


# ---------------------------------------------------------------- the end of a run


@pytest.mark.parametrize(("how", "grace"), [("strays", 0.0), ("deaf", 1.0)])
def test_an_aborted_run_is_confirmed_when_every_descendant_has_gone(pool, final, eventually, how, grace):
    """Within 2 s, or the task's grace and 2 s where it ignores SIGTERM."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("hungry", {"how": how})
        eventually(lambda: len(sleepers(pool, "anna")) >= 6, "all strays are there")
        family = below(pool, "anna")
        slot = the(pool, "anna", b"mqworker.slot")
        began = time.monotonic()
        client.abort([one], reason="not wanted")
        [view] = final(client, one)
        took = time.monotonic() - began
        left = sleepers(pool, "anna")

        assert (view.state, left) == ("aborted", [])
        assert grace <= took < grace + 2 + BUSY
        assert [one for one in family if b"sleep" in family[one] and identify(one.pid) == one] == []
        assert identify(slot.pid) == slot  # which takes the next run


@pytest.mark.parametrize("how", ["foreign", "foreign_gil"])
def test_a_child_that_the_worker_may_not_kill_keeps_its_run_going_until_it_is_ended_by_hand(
    pool, final, eventually, missing, how
):
    """P2: whoever is told that a run has ended may start it elsewhere."""
    if os.geteuid() != 0:
        missing("root", "another user's process cannot be made")
    pool.launcher += ["--bounding-set=-kill", "--inh-caps=-kill"]
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("hungry", {"how": how}, lease=5)
        eventually(lambda: len(sleepers(pool, "anna")) == 2, "both children are there")
        stray, other = sorted(sleepers(pool, "anna"), key=lambda child: command(child.pid))
        stack.callback(subprocess.run, ["kill", "-KILL", str(stray.pid)], check=False, capture_output=True)
        slot = the(pool, "anna", b"mqworker.slot")
        client.abort([one], reason="not wanted", wait=False)

        def told() -> str:
            [worker] = client.workers()
            return next((run.stage or "" for run in worker.running if (run.stage or "").startswith("ending: ")), "")

        assert f"process {stray.pid} ('sleep 1008')" in eventually(told, "what is in the way is told", 60)
        if how == "foreign_gil":
            eventually(lambda: identify(slot.pid) != slot, "its slot has ended")
        assert identify(other.pid) != other  # the one that could be ended
        time.sleep(6)  # beyond the lease
        assert identify(stray.pid) == stray
        assert client.status(one).state == "running"
        os.kill(stray.pid, signal.SIGKILL)

        [view] = final(client, one)
        assert (view.state, len(view.attempts)) == ("aborted", 1)
        assert final(client, client.submit("noop", {}))[0].state == "success"


@pytest.fixture
def foreign(pool, missing, eventually) -> Callable:
    """Start a run with a child that the worker may not kill."""
    if os.geteuid() != 0:
        missing("root", "another user's process cannot be made")
    pool.launcher += ["--bounding-set=-kill", "--inh-caps=-kill"]

    def begin(stack, client, how: str) -> tuple:
        one = client.submit("hungry", {"how": how})
        eventually(lambda: len(sleepers(pool, "anna")) == 2, "both children are there")
        stray, other = sorted(sleepers(pool, "anna"), key=lambda child: command(child.pid))
        stack.callback(subprocess.run, ["kill", "-KILL", str(stray.pid)], check=False, capture_output=True)
        return one, stray, other

    return begin


@pytest.mark.parametrize("agent", ["frozen", "working", "has_ended_the_slot"])
def test_after_a_killed_agent_the_next_one_does_not_start_beside_what_nobody_may_kill(
    pool, foreign, final, eventually, agent
):
    """P2: whom a worker names as ended may run elsewhere at once."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one, stray, other = foreign(stack, client, "foreign_gil" if agent == "has_ended_the_slot" else "foreign")
        slot, dog = the(pool, "anna", b"mqworker.slot"), the(pool, "anna", b"watchdog.main()")
        if agent == "frozen":
            pool.processes["anna"].send_signal(signal.SIGSTOP)
            os.kill(dog.pid, signal.SIGKILL)  # then the slot ends itself
            eventually(lambda: identify(other.pid) != other, "what can be ended has gone")
        client.abort([one], reason="not wanted", wait=False)
        if agent == "has_ended_the_slot":
            eventually(lambda: identify(slot.pid) != slot, "its slot has ended")
            eventually(lambda: "a run goes on without its slot" in pool.log("anna"), "the agent knows what is left")
        pool.end("anna", signal.SIGKILL)
        eventually(lambda: identify(other.pid) != other, "what can be ended has gone")
        for _ in range(2):
            assert pool.worker("anna").wait(60) == 3

        assert f"process {stray.pid} ('sleep 1008')" in pool.log("anna").splitlines()[-1]
        assert "this one does not start before it has gone" in pool.log("anna").splitlines()[-1]
        assert "Traceback" not in pool.log("anna")
        assert (identify(slot.pid) == slot) == (agent != "has_ended_the_slot")
        assert client.status(one).state == "running"
        os.kill(stray.pid, signal.SIGKILL)
        eventually(lambda: identify(stray.pid) != stray and identify(dog.pid) != dog, "both end")
        pool.worker("anna")
        [view] = final(client, one)
        assert identify(slot.pid) != slot
        assert (view.state, len(view.attempts)) == ("aborted", 1)
        assert final(client, client.submit("noop", {}))[0].state == "success"


def test_a_worker_that_stops_beside_what_it_may_not_kill_takes_leave_and_says_what_is_left(pool, foreign, final):
    with ExitStack() as stack:
        client = pool.up(stack, "anna", slots=2)
        one, stray, other = foreign(stack, client, "foreign")
        assert pool.end("anna") == 3

        last = pool.log("anna").splitlines()[-1]
        assert last.startswith("mqworker: error: expected to be allowed to end a process that was started here")
        assert f"process {stray.pid} ('sleep 1008')" in last
        assert "the worker has stopped beside it" in last
        assert "Traceback" not in pool.log("anna")
        assert (identify(stray.pid), identify(other.pid)) == (stray, None)
        assert [(worker.state, worker.reason) for worker in client.workers()] == [("offline", "stopped")]
        assert pool.worker("anna").wait(60) == 3
        os.kill(stray.pid, signal.SIGKILL)
        client.abort([one], reason="seen enough", wait=False)
        pool.worker("anna")
        assert final(client, one)[0].state == "aborted"


def test_an_outcome_beside_what_the_worker_may_not_kill_is_recorded_when_the_worker_stops(
    pool, foreign, final, eventually
):
    """P4."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one, stray, other = foreign(stack, client, "foreign_left")
        slot = the(pool, "anna", b"mqworker.slot")
        eventually(lambda: identify(other.pid) != other, "its task has ended")
        eventually(lambda: (client.workers()[0].running[0].stage or "").startswith("ending: "), "that is told")
        assert identify(slot.pid) == slot  # as the ancestor of what is left
        assert client.status(one).state == "running"
        assert pool.end("anna") == 3

        [view] = final(client, one)
        assert (view.state, len(view.attempts)) == ("success", 1)
        assert "at its end, this was in the way: expected to be allowed to end a process" in view.reason.text
        assert f"process {stray.pid} ('sleep 1008')" in view.reason.text
        assert (identify(stray.pid), identify(slot.pid)) == (stray, None)


def test_a_run_that_holds_pythons_lock_ends_at_its_lease_though_its_agent_is_frozen(pool, final, eventually):
    """P2: beside the slot there is somebody who can."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("hungry", {"how": "gil"}, lease=5, max_attempts=1)
        eventually(lambda: sleepers(pool, "anna"), "the run has a child")
        slot, [child] = the(pool, "anna", b"mqworker.slot"), sleepers(pool, "anna")
        # Alone, the agent renews the lease: who holds the lock is not ended for that.
        time.sleep(6)  # beyond the first lease
        assert identify(slot.pid) == slot
        agent = pool.processes["anna"]
        agent.send_signal(signal.SIGSTOP)

        eventually(lambda: identify(slot.pid) != slot and identify(child.pid) != child, "both have ended", 5 + BUSY)
        assert Path(f"/proc/{agent.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        agent.send_signal(signal.SIGCONT)
        [view] = final(client, one)
        assert (view.state, view.attempts[0].result) == ("error", "lost")


def test_slots_end_with_their_watchdog_and_get_another(pool, final, eventually):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("hungry", {"how": "gil"})
        eventually(lambda: sleepers(pool, "anna"), "the run has a child")
        slot, child = the(pool, "anna", b"mqworker.slot"), sleepers(pool, "anna")[0]
        os.kill(the(pool, "anna", b"watchdog.main()").pid, signal.SIGKILL)
        eventually(lambda: identify(slot.pid) != slot and identify(child.pid) != child, "both have ended")
        client.abort([one], reason="seen enough")
        final(client, one)

        assert final(client, client.submit("noop", {}))[0].state == "success"
        assert the(pool, "anna", b"watchdog.main()")
        assert "the watchdog of the slots has ended" in pool.log("anna")


def test_children_know_no_secret_and_die_before_their_agent(pool, runs, final):
    """The URL has a password: it is in no child's environment, and on no command line."""
    with ExitStack() as stack:
        secret = urlsplit(pool.amqp_url).netloc.encode()
        client = pool.up(stack, "anna")
        one = client.submit("hungry", {"how": "strays"})
        two = client.submit("journal", runs.data)
        while len(sleepers(pool, "anna")) < 6:
            time.sleep(0.05)  # between two looks at what has no event
        children = descendants(pool.processes["anna"].pid)
        agent = pool.processes["anna"].pid
        scores = {}
        for child in children:
            words = b" ".join(command(child.pid))
            environment = Path(f"/proc/{child.pid}/environ").read_bytes()
            for said in (words, environment):
                assert secret not in said, words
                assert b"AMQP_URL" not in said, words
                assert b"MQWORKER_LEDGER" not in said, words
            scores[words] = int(Path(f"/proc/{child.pid}/oom_score_adj").read_text())
        own = int(Path(f"/proc/{agent}/oom_score_adj").read_text())
        assert secret not in Path(f"/proc/{agent}/cmdline").read_bytes()

        assert own < OOM_SCORE_ADJ
        watchdogs = [score for words, score in scores.items() if b"watchdog.main()" in words]
        others = [score for words, score in scores.items() if b"watchdog.main()" not in words]
        assert (watchdogs, set(others)) == ([own], {max(own, OOM_SCORE_ADJ)})
        runs.open()
        client.abort([one], reason="seen enough")
        final(client, one, two)


# ---------------------------------------------------------------- no room


def test_a_worker_takes_no_work_while_its_disk_has_too_little_room_and_goes_on_by_itself(
    pool, final, eventually, small_disk
):
    work = small_disk(pool.directory / "work", "size=40m")
    with ExitStack() as stack:
        pool.environment["MQWORKER_WORKER_MIN_FREE_DISK"] = str(20 * MIB)
        client = pool.up(stack, "anna")
        filling = fill(work)
        held = eventually(
            lambda: next((one.reason for one in client.workers() if one.reason is not None), None), "it says so"
        )
        assert "expected min_free_disk (20971520 bytes) free in" in held
        one = client.submit("noop", {})
        with pytest.raises(AssertionError):
            eventually(lambda: client.status(one).state != "pending", "nobody takes it", 2)
        filling.unlink()

        assert final(client, one)[0].state == "success"
        assert pool.log("anna").count("the worker takes no work") == 1
        eventually(lambda: client.workers()[0].reason is None, "it is well again")


def test_a_run_that_finds_no_room_for_its_directory_is_handed_back_and_counts_for_nothing(
    pool, final, eventually, small_disk
):
    work = small_disk(pool.directory / "work", "size=10m,nr_inodes=20")
    with ExitStack() as stack:
        pool.environment["MQWORKER_WORKER_MIN_FREE_DISK"] = "0"
        client = pool.up(stack, "anna")
        for number in range(100):
            try:
                (work / f"filling-{number}").mkdir()
            except OSError:
                break
        one = client.submit("noop", {}, max_attempts=1)
        eventually(lambda: "takes no work" in pool.log("anna"), "it says so")
        for path in work.glob("filling-*"):
            path.rmdir()

        [view] = final(client, one)
        assert view.state == "success"
        assert {attempt.result for attempt in view.attempts} <= {"handed_back", "success"}
        assert pool.processes["anna"].poll() is None


def test_a_full_state_directory_stops_nobody_and_loses_nothing_though_the_worker_is_told_to_stop(
    pool, runs, final, eventually, small_disk
):
    """P4: what could not be written to disk is sent from memory in the end."""
    state = small_disk(pool.directory / "state" / "anna", "size=1m")
    with ExitStack() as stack:
        pool.environment["MQWORKER_WORKER_MIN_FREE_DISK"] = "0"
        client = pool.up(stack, "anna", slots=2)
        one = client.submit("journal", runs.data)
        runs.await_starts(1)
        fill(state)
        runs.open()
        eventually(lambda: "cannot be spooled" in pool.log("anna"), "it says so")
        other = client.submit("noop", {})
        assert client.status(one).state == "running"

        assert pool.end("anna") == 0
        assert final(client, one)[0].state == "success"
        assert client.status(other).state == "pending"
        assert runs.count("end") == 1
        second = pool.start("anna", "worker", "--name", "anna", "--state-dir", str(state))
        assert second.wait(60) == 3
        assert "with room for a few small files" in pool.log("anna")
        assert "Traceback" not in pool.log("anna")
        (state / "filling").unlink()
        pool.worker("anna")
        assert final(client, other)[0].state == "success"


def test_a_full_store_says_nothing_of_a_request_which_is_tried_again(pool, final, eventually, small_disk):
    store = Path(urlsplit(pool.store_url).path)
    shutil.move(store, store.with_name("moved"))
    small_disk(store, "size=1m")
    shutil.copytree(store.with_name("moved"), store, dirs_exist_ok=True)
    with ExitStack() as stack:
        pool.environment["MQWORKER_WORKER_MIN_FREE_DISK"] = "0"
        client = pool.up(stack, "anna")
        filling = fill(store)
        one = client.submit("noop", {"artifacts": [100_000]}, max_attempts=100)
        eventually(lambda: [tried for tried in client.status(one).attempts if tried.result == "error"], "it was tried")
        filling.unlink()

        [view] = final(client, one)
        assert view.state == "success"
        assert view.attempts[0].result == "error"
        assert "No space left" in view.attempts[0].reason.text


# ---------------------------------------------------------------- who is who


def test_of_two_workers_with_one_name_the_second_is_refused_with_a_clear_word_and_waits(
    pool, runs, final, eventually, live_directory
):
    """As from two hosts: each has a state directory and a work directory of its own."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("journal", runs.data)
        runs.await_starts(1)
        other = {"MQWORKER_WORKER_WORK_DIR": str(live_directory / "work2")}
        state = str(live_directory / "state" / "other")
        pool.start("second", "worker", "--name", "anna", "--slots", "1", "--state-dir", state, **other)
        eventually(lambda: "expected one worker of the name anna" in pool.log("second"), "it is told")
        runs.open()
        assert final(client, one)[0].state == "success"
        assert [len(client.status(one).attempts), runs.count("start")] == [1, 1]
        assert final(client, client.submit("noop", {}))[0].state == "success"

        assert pool.end("anna") == 0  # the name is free
        assert final(client, client.submit("noop", {}))[0].state == "success"
        assert pool.log("second").count("does not take this worker") == 1


def test_a_copied_state_directory_is_told_and_what_its_spool_has_counts_once(pool, runs, final, eventually):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("journal", runs.data)
        runs.await_starts(1)
        pool.end("scheduler", signal.SIGKILL)
        runs.open()
        state = pool.directory / "state" / "anna"
        eventually(lambda: list((state / "spool").glob("*.json")), "the outcome is on disk")
        pool.end("anna", signal.SIGKILL)
        shutil.copytree(state, pool.directory / "state" / "bert")
        pool.scheduler()
        pool.worker("anna")
        assert final(client, one)[0].state == "success"
        pool.worker("bert")
        pool.await_workers(client, "anna", "bert")

        assert "the state directory is a copy" in pool.log("bert")
        assert "the state directory is a copy" not in pool.log("anna")
        eventually(lambda: not list((pool.directory / "state").glob("*/spool/*.json")), "both spools are answered")
        assert [len(client.status(one).attempts), runs.count("start")] == [1, 1]
