import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import pytest

import mqworker.state
from mqworker.errors import StateLocked
from mqworker.messages import Outcome, Reason, RunRef
from mqworker.processes import Process, identify
from mqworker.state import WorkerState

PATIENCE = 30.0  # seconds


def outcome(number=1, *, token="t1", **fields):  # noqa: S107  # a token of a claim
    return Outcome(
        request=f"00000000-0000-4000-8000-{number:012x}",
        attempt=1,
        token=token,
        **{"result": "success", "started": 1.0, "ended": 2.0} | fields,
    )


def child(code, directory):
    """Run code in a process of its own, which has the directory as `directory`."""
    setup = f"""
        import os, signal, sys
        from pathlib import Path
        from mqworker.messages import Outcome
        from mqworker.state import WorkerState
        directory = Path({str(directory)!r})
    """
    return subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(setup) + textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# ---------------------------------------------------------------- the lock


def test_a_second_holder_is_refused_and_told_who_holds_it_until_that_one_ends(tmp_path):
    holder = child("state = WorkerState(directory)\nprint('held', flush=True)\nsys.stdin.read()", tmp_path)
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StateLocked, match=f"the worker with pid {holder.pid} holds"):
            WorkerState(tmp_path)
        holder.send_signal(signal.SIGKILL)
    assert holder.returncode == -signal.SIGKILL

    WorkerState(tmp_path).close()


def test_a_holder_that_was_refused_leaves_the_holders_name_and_no_file_open(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    with closing(WorkerState(tmp_path)):
        for _ in range(2):
            with pytest.raises(StateLocked, match=f"pid {os.getpid()} holds"):
                WorkerState(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_holder_that_is_named_is_the_newest_whatever_was_there_before(tmp_path):
    (tmp_path / "lock").write_text("12345678901234567890")
    with closing(WorkerState(tmp_path)), pytest.raises(StateLocked, match=f"pid {os.getpid()} holds"):
        WorkerState(tmp_path)


def test_the_lock_is_not_inherited_by_children(tmp_path):
    state = WorkerState(tmp_path)
    with subprocess.Popen(["sleep", "1000"], close_fds=False) as heir:
        state.close()
        try:
            WorkerState(tmp_path).close()
        finally:
            heir.kill()


def test_a_directory_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(StateLocked, match="that this user can write"):
        WorkerState(tmp_path / "file" / "state")


# ---------------------------------------------------------------- the incarnation


def incarnation(directory):
    with closing(WorkerState(directory)) as state:
        return state.incarnation


def test_the_incarnation_rises_with_each_holder(tmp_path):
    numbers = [incarnation(tmp_path) for _ in range(5)]

    assert numbers == sorted(set(numbers))


def test_the_incarnation_rises_though_the_clock_goes_back(tmp_path, monkeypatch):
    first = incarnation(tmp_path)
    monkeypatch.setattr(mqworker.state.time, "time", lambda: 1000.0)

    assert incarnation(tmp_path) == first + 1


def test_the_incarnation_rises_though_the_directory_was_lost(tmp_path, monkeypatch):
    first = incarnation(tmp_path / "one")
    now = mqworker.state.time.time()
    monkeypatch.setattr(mqworker.state.time, "time", lambda: now + 1)

    assert incarnation(tmp_path / "two") > first


# ---------------------------------------------------------------- the directory itself


def home(directory):
    with closing(WorkerState(directory)) as state:
        return state.home, state.copied


def test_a_directory_keeps_its_id_and_no_two_have_one(tmp_path):
    first, copied = home(tmp_path / "one")

    assert (home(tmp_path / "one"), copied) == ((first, None), None)
    assert home(tmp_path / "two")[0] != first


@pytest.mark.parametrize("nonsense", [b"\xff\xfe", b"", b"../../etc 1", b"0123456789ab"])
def test_a_home_that_says_nothing_of_ours_is_made_anew(tmp_path, nonsense):
    (tmp_path / "home").write_bytes(nonsense)

    made, copied = home(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{12}", made)
    assert copied is None
    assert home(tmp_path) == (made, None)


def test_a_copy_of_a_directory_is_told_gets_an_id_of_its_own_and_keeps_what_is_in_the_spool(tmp_path):
    with closing(WorkerState(tmp_path / "one")) as state:
        state.spool([outcome(1)])
        state.note_slots([identify(os.getpid())])
        first = state.home
    shutil.copytree(tmp_path / "one", tmp_path / "two")

    with closing(WorkerState(tmp_path / "two")) as state:
        assert state.home != first
        assert "a copy, or one that was brought back from a backup" in state.copied
        assert list(state.spooled()) == [outcome(1)]
        assert state.noted_slots() == []
    assert home(tmp_path / "two")[1] is None
    assert home(tmp_path / "one") == (first, None)


def test_a_directory_on_another_machine_is_a_copy(tmp_path, monkeypatch):
    first, _ = home(tmp_path / "one")
    machine = tmp_path / "machine-id"
    machine.write_text("of another machine\n")
    monkeypatch.setattr(mqworker.state, "MACHINE_IDS", (tmp_path / "missing", machine))

    assert home(tmp_path / "one")[0] != first


def test_a_disk_without_room_for_what_a_worker_is_says_so(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WorkerState, "_write", staticmethod(fail))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StateLocked, match="No space left on device; make room there"):
        WorkerState(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# ---------------------------------------------------------------- pids of slots


def test_a_successor_knows_the_slots_of_its_predecessor(tmp_path):
    mine = identify(os.getpid())
    with closing(WorkerState(tmp_path)) as state:
        assert state.noted_slots() == []
        state.note_slots([mine, Process(pid=1, start=2)])
        state.note_slots([mine])
    with closing(WorkerState(tmp_path)) as state:
        assert state.noted_slots() == [mine]
        state.note_slots([])
        assert state.noted_slots() == []


def test_after_a_reboot_nobody_is_taken_for_a_slot(tmp_path, monkeypatch):
    """Start times count from the boot, so a pid and a start time may name somebody else by then."""
    with closing(WorkerState(tmp_path)) as state:
        state.note_slots([identify(os.getpid())])
        boot = tmp_path / "boot_id"
        boot.write_text("00000000-0000-4000-8000-000000000000\n")
        monkeypatch.setattr(mqworker.state, "BOOT_ID", boot)

        assert state.noted_slots() == []


# ---------------------------------------------------------------- the spool


def test_what_was_spooled_survives_a_kill_and_is_read_as_it_was(tmp_path):
    """P4."""
    with child(
        """
        state = WorkerState(directory)
        state.spool(
            Outcome(
                request=f"00000000-0000-4000-8000-{number:012x}",
                attempt=1, token="t1", result="success", started=1.0, ended=2.0,
            )
            for number in (1, 2, 3)
        )
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    ) as killed:
        assert killed.wait(PATIENCE) == -signal.SIGKILL
    with closing(WorkerState(tmp_path)) as state:
        assert list(state.spooled()) == [outcome(1), outcome(2), outcome(3)]
        assert list(state.spooled()) == [outcome(1), outcome(2), outcome(3)]


def test_an_outcome_is_removed_only_by_its_own_answer(tmp_path):
    with closing(WorkerState(tmp_path)) as state:
        kept = outcome(1, token="t2", reason=Reason(text="no"))  # noqa: S106  # a token of a claim
        state.spool([outcome(1), kept, outcome(2)])
        for token in ("t1", "t1", "strange"):
            state.unspool([RunRef(request=outcome(1).request, attempt=1, token=token)])
        state.unspool([RunRef(request=outcome(2).request, attempt=2, token="t1")])  # noqa: S106  # a token of a claim
        [file] = (tmp_path / "spool").iterdir()
        state.unspool([kept])
        assert file.exists()
        state.unspool([outcome(2)])

        assert not file.exists()


def test_what_was_answered_beside_something_that_was_not_is_told_again_by_a_successor(tmp_path):
    with closing(WorkerState(tmp_path)) as state:
        state.spool([outcome(1), outcome(2)])
        state.unspool([outcome(1)])
    with closing(WorkerState(tmp_path)) as state:
        assert list(state.spooled()) == [outcome(1), outcome(2)]
        state.unspool([outcome(2), outcome(1)])
        assert list(state.spooled()) == []


def test_a_file_that_was_not_finished_is_not_read_and_does_not_stay(tmp_path):
    with closing(WorkerState(tmp_path)) as state:
        state.spool([outcome(1)])
        half = tmp_path / "spool" / f"{outcome(2).request}.1.t1.new"
        half.write_bytes(b'{"request": "00000000-0000')

        assert list(state.spooled()) == [outcome(1)]
        assert not half.exists()


@pytest.mark.parametrize("content", [b"", b"not json", b'{"request": 7}', b"\xff\xfe"])
def test_an_unreadable_file_is_put_aside_for_a_person_and_hides_no_other(tmp_path, content):
    with closing(WorkerState(tmp_path)) as state:
        state.spool([outcome(1), outcome(3)])
        broken = tmp_path / "spool" / f"{outcome(2).request}.1.t1.json"
        broken.write_bytes(content)
        assert list(state.spooled()) == [outcome(1), outcome(3)]

        assert broken.with_suffix(".unreadable").read_bytes() == content
        assert not broken.exists()
        assert list(state.spooled()) == [outcome(1), outcome(3)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_is_an_error_and_leaves_nothing_to_be_read(tmp_path, monkeypatch):
    with closing(WorkerState(tmp_path)) as state:
        monkeypatch.setattr(mqworker.state.time, "time_ns", lambda: 7)
        (tmp_path / "spool" / f"{7:020d}-{0:06d}.new").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left"):
            state.spool([outcome(1)])

        assert list((tmp_path / "spool").iterdir()) == []
        state.spool([outcome(1)])
        assert list(state.spooled()) == [outcome(1)]


def test_outcomes_are_on_the_disk_and_not_only_in_memory_when_they_count_as_spooled(tmp_path, monkeypatch):
    """The file before it gets its name, and then the directory that has the name."""
    calls = []
    synced = os.fsync
    monkeypatch.setattr(
        mqworker.state.os, "fsync", lambda fd: (calls.append(Path(f"/proc/self/fd/{fd}").readlink().name), synced(fd))
    )
    with closing(WorkerState(tmp_path)) as state:
        calls.clear()
        state.spool([outcome(1), outcome(2)])

        [file] = (tmp_path / "spool").iterdir()

    assert calls == [f"{file.stem}.new", "spool"]
