"""A worker's state directory: its lock, its own id, the number of its incarnation, its slots' pids, and the spool.

Knows files only. What is here lets a worker that was killed deliver what it had finished, and end what it had begun.
"""

import contextlib
import fcntl
import itertools
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from mqworker.errors import PeerError, StateLocked
from mqworker.messages import MAX_MESSAGE_BYTES, Outcome, RunRef, decode, encode_line, outcome_sets
from mqworker.processes import Process

MACHINE_IDS: Final = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))  # machine-id(5)
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")  # another one after each boot, random(4)


class WorkerState:
    """Hold a state directory, alone."""

    def __init__(self, directory: Path) -> None:
        """Lock a directory, made if it is missing.

        Raises:
            StateLocked: another worker holds it, or it cannot be written.
        """
        self._directory = directory
        self._spool = directory / "spool"
        try:
            self._spool.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateLocked(
                f"expected a state directory that this user can write, got {directory}: {error.strerror}; set state_dir"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._lock, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise StateLocked(
                f"expected a state directory of this worker's own, got {directory}, which the worker with pid {holder}"
                " holds: stop it, or give this one another state_dir and name"
            ) from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)
        self._files = itertools.count()
        self._file_of: dict[tuple[str, int, str], Path] = {}  # in which file an outcome is
        self._waiting: dict[Path, int] = {}  # outcomes of each file that have no answer yet
        self.copied: str | None = None  # why this directory is taken for a copy of another worker's
        try:
            self.home = self._find_home()
            self.incarnation = self._next_incarnation()
        except OSError as error:
            os.close(self._lock)
            raise StateLocked(
                f"expected a state directory with room for a few small files, got {directory}: {error.strerror};"
                " make room there: what is in its spool waits"
            ) from error

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self._lock)

    def _find_home(self) -> str:
        """Return the id of this directory, which is made with it; a copy of a directory gets one of its own.

        So the scheduler does not take two workers for one and its successor. What is in the spool of a copy may be
        told twice, which harms nobody: an outcome counts by its token, once.
        """
        file = self._directory / "home"
        place = f"{_machine_id()} {self._directory.stat().st_ino}"
        told = file.read_text(errors="replace").strip() if file.exists() else ""
        home, _, before = told.partition(" ") if re.match(r"[0-9a-f]{12} ", told) else ("", "", "")  # else none of ours
        if home and before == place:
            return home
        if home:
            self.copied = (
                f"expected the state directory {self._directory} where it was made ({before}), got it at ({place}): a"
                " copy, or one that was brought back from a backup; this worker goes on as a new one, and tells what"
                " its spool has"
            )
            (self._directory / "slots").unlink(missing_ok=True)  # they are another host's
            (self._directory / "incarnation").unlink(missing_ok=True)
        home = uuid.uuid4().hex[:12]
        self._write(file, f"{home} {place}\n".encode())
        return home

    def _next_incarnation(self) -> int:
        """Return a number above all earlier ones of this directory."""
        file = self._directory / "incarnation"
        before = file.read_bytes() if file.exists() else b""
        known = int(before) if re.fullmatch(rb"[0-9]{1,15}", before) else 0  # what is none of ours counts for nothing
        number = max(known + 1, int(time.time() * 1000))
        self._write(file, str(number).encode())
        return number

    # ------------------------------------------------------------ pids of slots

    def note_slots(self, slots: Iterable[Process]) -> None:
        """Keep which processes would be left if this worker were killed now."""
        lines = "".join(f"{slot.pid} {slot.start}\n" for slot in slots)
        data = f"{_boot_id()}\n{lines}".encode()
        self._write(self._directory / "slots", data, durable=False)  # a reboot ends them anyway

    def noted_slots(self) -> list[Process]:
        """List the processes that a predecessor has noted since the host's boot."""
        file = self._directory / "slots"
        if not file.exists():
            return []
        boot, *lines = file.read_text(errors="replace").splitlines() or [""]
        if boot != _boot_id():
            return []  # start times count from the boot: these may be anybody's by now
        pairs = [re.fullmatch(r"([1-9][0-9]{0,9}) ([0-9]{1,19})", line, re.ASCII) for line in lines]
        return [Process(pid=int(pair[1]), start=int(pair[2])) for pair in pairs if pair is not None]

    # ------------------------------------------------------------ the spool

    def spool(self, outcomes: Iterable[Outcome]) -> None:
        """Keep outcomes on disk, in one file: they survive this process and a power cut."""
        for outcomes_of_file in outcome_sets(outcomes):
            file = self._spool / f"{time.time_ns():020d}-{next(self._files):06d}.json"
            self._write(file, b"".join(map(encode_line, outcomes_of_file)), sync_directory=False)
            self._hold(file, outcomes_of_file)
        _fsync(self._spool)

    def unspool(self, refs: Iterable[RunRef]) -> None:
        """Remove outcomes that were answered: a file goes with the last of its own."""
        for ref in refs:
            file = self._file_of.pop(_name(ref), None)
            if file is not None:
                self._waiting[file] -= 1
                if not self._waiting[file]:
                    del self._waiting[file]
                    file.unlink(missing_ok=True)

    def spooled(self) -> Iterator[Outcome]:
        """Read what a predecessor left, also what was answered beside something that was not.

        A file that cannot be read is put aside, for a person, and what can be read of it is kept in another.
        """
        self._file_of.clear()
        self._waiting.clear()
        for file in sorted(self._spool.glob("*.json")):
            found, whole = self._read(file)
            outcomes = [outcome for outcome in found if _name(outcome) not in self._file_of]
            if whole and outcomes:
                self._hold(file, outcomes)
            elif whole:  # all of it is in another file
                file.unlink()
            else:
                self.spool(outcomes)
                file.rename(file.with_suffix(".unreadable"))
            yield from outcomes
        for file in self._spool.glob("*.new"):
            file.unlink()  # it was not finished, so nothing was said about it

    def _hold(self, file: Path, outcomes: Sequence[Outcome]) -> None:
        self._waiting[file] = len(outcomes)
        for outcome in outcomes:
            self._file_of[_name(outcome)] = file

    @staticmethod
    def _read(file: Path) -> tuple[list[Outcome], bool]:
        """Read what can be read of a file, and say whether that is all of it."""
        if not file.is_file() or file.stat().st_size > MAX_MESSAGE_BYTES:
            return [], False
        outcomes: dict[tuple[str, int, str], Outcome] = {}
        lines = file.read_bytes().splitlines()
        for line in lines:
            with contextlib.suppress(PeerError):
                outcome = decode(line, Outcome)
                outcomes[_name(outcome)] = outcome
        return list(outcomes.values()), bool(lines) and len(outcomes) == len(lines)

    @staticmethod
    def _write(file: Path, data: bytes, *, durable: bool = True, sync_directory: bool = True) -> None:
        new = file.with_suffix(".new")
        try:
            with new.open("wb") as stream:
                stream.write(data)
                stream.flush()
                if durable:
                    os.fsync(stream.fileno())
            new.replace(file)
        except OSError:
            new.unlink(missing_ok=True)  # the next try may have another name
            raise
        if durable and sync_directory:
            _fsync(file.parent)


def _name(ref: RunRef) -> tuple[str, int, str]:
    return ref.request, ref.attempt, ref.token


def _machine_id() -> str:
    for file in MACHINE_IDS:
        try:
            found = file.read_text().strip()
        except OSError:  # it is not there, or for root alone
            continue
        if found:
            return found
    return "unknown"


def _boot_id() -> str:
    return BOOT_ID.read_text().strip()


def _fsync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
