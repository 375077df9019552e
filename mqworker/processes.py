"""Linux as the house needs it: processes with their descendants, directories of other uids, the host itself.

May import only errors. Knows no task, no broker and no ledger; everything is read from /proc or asked of the kernel.
"""

import contextlib
import ctypes
import errno
import functools
import importlib.metadata
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mqworker.errors import HostUnfit

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h
_MNT_DETACH: Final = 2  # sys/mount.h
_UMOUNT_NOFOLLOW: Final = 8  # sys/mount.h
OOM_SCORE_ADJ: Final = 800  # of children, proc(5): above all that nobody has marked, below what others have given up
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_FIRST_PAUSE: Final = 0.0005  # seconds between two looks at processes that are dying; doubled up to ...
_LONGEST_PAUSE: Final = 0.02

# Debian's names of what the kernel calls `uname -m` and what qemu calls its binfmt handlers.
_DEBIAN_ARCHITECTURES: Final[Mapping[str, str]] = {
    "aarch64": "arm64",
    "arm": "armhf",
    "armv7l": "armhf",
    "i386": "i386",
    "i686": "i386",
    "loongarch64": "loong64",
    "mips64el": "mips64el",
    "ppc64le": "ppc64el",
    "riscv64": "riscv64",
    "s390x": "s390x",
    "x86_64": "amd64",
}
# Which other architectures a kernel runs without an emulator, where dpkg is told to use them.
_NATIVE_SIBLINGS: Final[Mapping[str, frozenset[str]]] = {
    "amd64": frozenset({"i386", "x32"}),
    "arm64": frozenset({"armhf", "armel"}),
    "armhf": frozenset({"armel"}),
}

_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: a child between fork and exec must not load libraries
_forking = 0  # a process that forks leaves its pid here, and ...
_forked_by = 0  # ... its child finds it here; 0 in a fresh interpreter
_collected_elsewhere: set[int] = set()  # children whose exit status somebody in this process waits for


# ---------------------------------------------------------------- clocks and kinship


def boottime_ns() -> int:
    """Read the clock that does not stop while the host is suspended, in nanoseconds since its boot."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def become_subreaper() -> None:
    """Make orphaned descendants children of this process, so that none gets out of its sight.

    Raises:
        HostUnfit: the kernel refuses.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; made for `preexec_fn`.

    The kernel's "parent" is the *thread* that forked, so children must be started by a thread that lives as long as
    they shall. The setting does not reach grandchildren.

    Raises:
        HostUnfit: the kernel refuses.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if _forked_by and os.getppid() != _forked_by:  # it ended before the kernel knew our wish
        os.kill(os.getpid(), signal.SIGKILL)


def go_first_when_memory_ends() -> None:
    """Have the kernel's out-of-memory killer prefer this process, and all that it starts, to the rest of the host."""
    own = Path("/proc/self/oom_score_adj")
    if int(own.read_text()) < OOM_SCORE_ADJ:
        own.write_text(str(OOM_SCORE_ADJ))  # to raise it needs no right


def oom_kills() -> int:
    """Count what the kernel's out-of-memory killer has ended on this host since its boot."""
    found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    return 0 if found is None else int(found[1])  # a kernel older than 4.13 does not count them


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, *(ctypes.c_ulong(number) for number in (value, 0, 0, 0))) != 0:
        number = ctypes.get_errno()
        raise HostUnfit(
            f"expected a Linux kernel that grants prctl({option}, {value}), got: {os.strerror(number)}; "
            "look for a seccomp filter on this service"
        )


def _before_fork() -> None:
    global _forking  # noqa: PLW0603  # fork hooks get no arguments, and memory is all that a child inherits
    _forking = os.getpid()


def _after_fork() -> None:
    global _forked_by  # noqa: PLW0603  # as above
    _forked_by = _forking


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


# ---------------------------------------------------------------- the process table


@dataclass(frozen=True)
class Process:
    """Name a process for good: a pid is used again, a pid with its start time is not.

    `start` is in clock ticks since the host's boot (proc(5), /proc/PID/stat, field 22).
    """

    pid: int
    start: int


@dataclass(frozen=True)
class _Entry:
    process: Process
    parent: int
    zombie: bool
    threads: int
    ticks: int  # of CPU time, with that of children whose end it has been told
    pages: int  # in memory, shared ones among them


def identify(pid: int) -> Process | None:
    """Name the living process that has a pid now; None when there is none, or only a zombie."""
    entry = _entry(pid)
    return None if entry is None or entry.zombie else entry.process


def descendants(pid: int, *, spare: Collection[int] = ()) -> list[Process]:
    """List the living descendants of a process, parents before children, without those that stem from `spare`.

    Zombies are not living.
    """
    return _living_below(_table(), pid, spare)


def _entry(pid: int) -> _Entry | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name may hold blanks and parentheses; what follows the last one is plain (proc(5)).
    fields = text[text.rindex(b")") + 2 :].split()
    # A process whose first thread has ended looks like a zombie while its other threads run on.
    threads = int(fields[17])
    zombie = fields[0] in {b"X", b"x"} or (fields[0] == b"Z" and threads <= 1)
    return _Entry(
        process=Process(pid=pid, start=int(fields[19])),
        parent=int(fields[1]),
        zombie=zombie,
        threads=threads,
        ticks=sum(map(int, fields[11:15])),
        pages=int(fields[21]),
    )


@dataclass(frozen=True)
class Usage:
    """What a process and its descendants use now; its CPU time includes that of descendants that have ended."""

    memory: int  # resident bytes; what several share is counted for each
    cpu_seconds: float
    threads: int
    pids: tuple[int, ...]


def usage(roots: Collection[int]) -> dict[int, Usage]:
    """Say what each of some processes uses, with all its descendants, by one look at all of them.

    The CPU time is right for a subreaper: there, who ends has its time added to that of an ancestor.
    """
    table = _table()
    children = _children(table)
    found = {}
    for root in roots:
        entries = [table[root]] if root in table else []
        for entry in entries:  # it grows
            entries += children.get(entry.process.pid, ())
        found[root] = Usage(
            memory=sum(entry.pages for entry in entries) * _PAGE,
            cpu_seconds=sum(entry.ticks for entry in entries) / _TICKS,
            threads=sum(entry.threads for entry in entries if not entry.zombie),
            pids=tuple(entry.process.pid for entry in entries),
        )
    return found


def proportional_memory(pids: Collection[int]) -> int:
    """Add up the memory of processes in bytes, with what several share divided among them (PSS).

    Of one that is somebody else's, and does not let this user look, all is counted that it holds.
    """
    return sum(map(_proportional, pids))


def _proportional(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except PermissionError:
        entry = _entry(pid)
        return 0 if entry is None else entry.pages * _PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"^Pss:\s*(\d+) kB$", text, re.MULTILINE)
    return 0 if found is None else int(found[1]) * 1024


def _table() -> dict[int, _Entry]:
    entries = (_entry(int(name)) for name in os.listdir("/proc") if name.isdecimal())  # noqa: PTH208  # names are all we need, and this is walked often
    return {entry.process.pid: entry for entry in entries if entry is not None}


def _children(table: Mapping[int, _Entry]) -> dict[int, list[_Entry]]:
    children: dict[int, list[_Entry]] = {}
    for entry in table.values():
        children.setdefault(entry.parent, []).append(entry)
    return children


def _living_below(table: Mapping[int, _Entry], pid: int, spare: Collection[int]) -> list[Process]:
    children = _children(table)
    found: list[Process] = []
    parents = [pid]
    while parents:
        for entry in children.get(parents.pop(), ()):
            if entry.process.pid in spare:
                continue
            if not entry.zombie:
                found.append(entry.process)
            parents.append(entry.process.pid)
    return found


# ---------------------------------------------------------------- ending processes


@contextlib.contextmanager
def collecting(pid: int) -> Iterator[None]:
    """Keep the exit status of a child for who waits for it: `kill_descendants` will not reap it meanwhile."""
    _collected_elsewhere.add(pid)
    try:
        yield
    finally:
        _collected_elsewhere.discard(pid)


def kill_descendants(pid: int | None = None, *, spare: Collection[int] = (), timeout: float = 10) -> int:
    """Kill every descendant of a process (this one by default) until none is left, and return how many were killed.

    A process group is not enough: a build may live in a session, a pid namespace and a uid of its own. In each round
    all are stopped first, so that none forks while others are killed. Where `pid` is this process, a subreaper, the
    answer is certain: orphans come here, and a round counts as the last only if no new zombie has come either.

    Args:
        pid: whose descendants; None is this process.
        spare: pids that are left alone, with all that stems from them; their exit status is not collected either.
        timeout: seconds.

    Raises:
        HostUnfit: some are still there at the timeout, or may not be signalled; all others have been ended.
    """
    root = os.getpid() if pid is None else pid
    deadline = time.monotonic() + timeout
    killed: set[Process] = set()
    pause = _FIRST_PAUSE
    while True:
        if root == os.getpid() and not _has_children():
            return len(killed)
        living = _freeze(root, spare, deadline)
        forbidden: dict[Process, HostUnfit] = {}
        for process in living:
            try:
                if _signal(process, signal.SIGKILL):
                    killed.add(process)
            except HostUnfit as error:
                forbidden[process] = error
        reaped = _reap(spare) if root == os.getpid() else 0
        # What was killed may have another ancestor by now, and is not gone before the kernel says so.
        living += [process for process in killed.difference(living) if identify(process.pid) == process]
        if not living and not reaped:
            return len(killed)
        if forbidden and forbidden.keys() >= set(living):
            raise next(iter(forbidden.values()))
        if time.monotonic() > deadline:
            raise HostUnfit(
                f"expected to end every descendant of process {root} within {timeout:g} s, but "
                f"{', '.join(map(_describe, living)) or 'new ones keep coming'}; end them by hand"
            )
        if living:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def kill_tree(process: Process, *, comes_here: bool = False) -> None:
    """Kill a process, if it is still the same, and all its descendants.

    What cannot be ended keeps its ancestor: stopped, that shows whose it is. Not so where orphans come here (this is
    a subreaper, and the process stems from it): there the process itself ends, whatever is left of it.

    Raises:
        HostUnfit: something is still there after 10 s, or may not be signalled.
    """
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if identify(process.pid) != process:
            return
        _signal(process, signal.SIGSTOP)  # it starts no more children, and is still there as their ancestor
        try:
            kill_descendants(process.pid)
        except HostUnfit:
            if comes_here:
                _signal(process, signal.SIGKILL)
            raise
        _signal(process, signal.SIGKILL)
        if not select.select([pidfd], [], [], 10)[0]:
            raise HostUnfit(f"expected to end process {process.pid} within 10 s, but {_describe(process)}")
        kill_descendants(process.pid)
    finally:
        os.close(pidfd)


def _freeze(root: int, spare: Collection[int], deadline: float) -> list[Process]:
    frozen: dict[Process, None] = {}
    while True:
        living = _living_below(_table(), root, spare)
        fresh = [process for process in living if process not in frozen]
        for process in fresh:
            with contextlib.suppress(HostUnfit):  # who may not be stopped may not be killed either: that reports it
                _signal(process, signal.SIGSTOP)
            frozen[process] = None
        if not fresh or time.monotonic() > deadline:
            return living


def _signal(process: Process, number: signal.Signals) -> bool:
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if identify(process.pid) != process:  # the pid belongs to somebody else by now
            return False
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise HostUnfit(
            f"expected to be allowed to end a process that was started here, but {_describe(process)} and belongs to "
            "somebody else; end it by hand, and keep set-uid programs out of tasks"
        ) from error
    finally:
        os.close(pidfd)
    return True


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _reap(spare: Collection[int]) -> int:
    here = os.getpid()
    reaped = 0
    for entry in _table().values():
        pid = entry.process.pid
        if entry.parent == here and entry.zombie and pid not in spare and pid not in _collected_elsewhere:
            with contextlib.suppress(ChildProcessError):  # another thread was faster
                reaped += os.waitpid(pid, os.WNOHANG)[0] == pid
    return reaped


def _describe(process: Process) -> str:
    try:
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        state = Path(f"/proc/{process.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return f"process {process.pid} has just ended"
    return f"process {process.pid} ({command.strip()[:100]!r}) is still there in state {state}"


# ---------------------------------------------------------------- directories


def remove_tree(path: Path) -> None:
    """Remove a directory with all that is in it, whoever owns it; a missing one is fine.

    Symbolic links are removed, not followed. What belongs to this user's subordinate uids (an unpacked chroot) is
    removed from inside a user namespace. Nothing is removed while anything is mounted below the path.

    Raises:
        HostUnfit: it cannot be removed; the text says what was in the way.
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    if mounts := _mounts_below(path):
        raise HostUnfit(f"expected nothing to be mounted below {path}, got {', '.join(mounts)}; unmount it first")
    try:
        shutil.rmtree(path)
    except (OSError, RecursionError) as error:
        _remove_as_namespace_root(path, error)


def _remove_as_namespace_root(path: Path, first: Exception) -> None:
    # Plain `rm` manages depths that Python does not; the first namespace opens this user's own closed directories
    # without any set-up of the host, the second also what belongs to its subordinate uids.
    remove = ["rm", "-rf", "--", str(path.absolute())]
    namespace = ["unshare", "--user", "--map-root-user"]
    problems = [str(first)]
    for prefix in ([], namespace, [*namespace, "--map-auto"]):
        if prefix and not may_unshare():
            problems.append("user namespaces are not allowed here")
            break
        try:
            done = subprocess.run(
                [*prefix, *remove],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as error:
            problems.append(str(error))
            continue
        if not os.path.lexists(path):
            return
        problems.extend(done.stderr.splitlines()[:3])
    raise HostUnfit(
        f"expected to remove {path}, but: {'; '.join(problems)}. Files of subordinate uids need the package uidmap and "
        "a line for this user in /etc/subuid and /etc/subgid"
    ) from first


def size_of_tree(path: Path) -> int:
    """Add up the bytes that a directory takes on its disk, whoever owns them; what several names have counts once.

    What closed directories of this user's subordinate uids hold is asked of `du` in a user namespace, as
    `remove_tree` does it. What is mounted below the path is not counted.

    Raises:
        HostUnfit: a directory cannot be looked into.
    """
    total = 0
    seen: set[int] = set()  # inodes that have several names
    waiting = [path]
    device = None
    try:
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # it has just gone
                        found = entry.stat(follow_symlinks=False)
                        device = found.st_dev if device is None else device
                        if found.st_dev != device or found.st_ino in seen:
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(Path(entry.path))
                        elif found.st_nlink > 1:
                            seen.add(found.st_ino)
                        total += found.st_blocks * 512
    except PermissionError as error:
        return _size_as_namespace_root(path, error)
    except (FileNotFoundError, NotADirectoryError):  # a directory has just gone; the next look tells more
        return total
    return total


def _size_as_namespace_root(path: Path, first: Exception) -> int:
    measure = ["du", "--summarize", "--one-file-system", "--block-size=1", "--", str(path.absolute())]
    namespace = ["unshare", "--user", "--map-root-user", "--map-auto"]
    if not may_unshare():
        raise HostUnfit(f"expected to measure {path}, but: {first}; user namespaces are not allowed here") from first
    done = subprocess.run(
        [*namespace, *measure], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    size = done.stdout.partition("\t")[0]
    if not size.isdecimal():
        raise HostUnfit(f"expected to measure {path}, but: {first}; {done.stderr.strip()[:300]}") from first
    return int(size)


def may_unshare() -> bool:
    """Tell whether user namespaces are allowed here; ask before `unshare --map-auto`.

    Where they are not, that fails and leaves a helper that holds its output open for ever (util-linux 2.38 and 2.41).
    """
    probe = ["unshare", "--user", "true"]
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def unmount_below(path: Path) -> list[str]:
    """Take away what is mounted below a directory, the deepest first, and return what was.

    What is mounted there may be a directory of the host, bound to another place: it stays as it is.

    Raises:
        HostUnfit: something stays mounted.
    """
    mounts = sorted(_mounts_below(path), key=len, reverse=True)
    for point in mounts:
        if _libc.umount2(os.fsencode(point), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
            number = ctypes.get_errno()
            raise HostUnfit(
                f"expected to unmount {point}, which a run has left behind, got: {os.strerror(number)}; unmount it"
            )
    return mounts


def _mounts_below(path: Path) -> list[str]:
    inside = os.fsencode(path.resolve()) + b"/"
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    # Blanks and the like are written as \040 (proc(5)).
    points = (re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), line.split()[4]) for line in lines)
    return [os.fsdecode(point) for point in points if point.startswith(inside)]


# ---------------------------------------------------------------- the host


def private_memory() -> int:
    """Return what this process has asked for in writable pages of its own, in bytes: what RLIMIT_DATA bounds."""
    return _own_status("VmData")


def peak_memory() -> int:
    """Return the most memory that this program has had in use, in bytes.

    Not what getrusage(2) says: its figure is handed down by whoever started this program.
    """
    return _own_status("VmHWM")


def _own_status(what: str) -> int:
    found = re.search(rf"^{what}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise HostUnfit(f"expected /proc/self/status to say {what}, as Linux does")
    return int(found[1]) * 1024


def system_metadata(work_directory: Path) -> dict[str, Any]:
    """Say what a worker reports of its host beside what its tasks say.

    Memory and disk are in bytes; the free disk is that of the work directory's file system, for this user.
    `system:architectures` lists what runs here: what arch-test finds where it is installed; otherwise the host's own,
    what dpkg is told to use and the kernel can, and what an emulator is registered for.
    """
    architecture, foreign = _dpkg_architectures()
    return {
        "system:hostname": os.uname().nodename,
        "system:cpu_count": len(os.sched_getaffinity(0)),
        "system:total_physical_memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system:free_disk": shutil.disk_usage(work_directory).free,
        "system:host_architecture": architecture,
        "system:architectures": _runnable_architectures(architecture, foreign),
        "system:kernel": os.uname().release,
        "system:mqworker_version": importlib.metadata.version("mqworker"),
    }


@functools.cache
def _dpkg_architectures() -> tuple[str, frozenset[str]]:
    own = _lines_of("dpkg", "--print-architecture")
    if not own:  # no Debian, but tasks may run there all the same
        machine = os.uname().machine
        return _DEBIAN_ARCHITECTURES.get(machine, machine), frozenset()
    return own[0], frozenset(_lines_of("dpkg", "--print-foreign-architectures"))


def _runnable_architectures(own: str, foreign: frozenset[str]) -> list[str]:
    if tested := _lines_of("arch-test"):
        return sorted({own, *tested})
    return sorted({own, *(foreign & _NATIVE_SIBLINGS.get(own, frozenset())), *_emulated_architectures()})


def _emulated_architectures() -> set[str]:
    found = set()
    for handler in Path("/proc/sys/fs/binfmt_misc").glob("qemu-*"):
        architecture = _DEBIAN_ARCHITECTURES.get(handler.name.removeprefix("qemu-"))
        if architecture and handler.read_text().startswith("enabled"):
            found.add(architecture)
    return found


def _lines_of(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # each of these programs is optional
        return []
    return done.stdout.split()


# ---------------------------------------------------------------- what a dead predecessor left


def inside(directory: Path) -> list[Process]:
    """List the living processes that work in a directory or are rooted in it: what of a run outlived its ancestors."""
    root = os.fsencode(directory.resolve())
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208  # names are all we need
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        for link in (b"cwd", b"root"):
            try:
                target = os.readlink(b"/proc/" + name.encode() + b"/" + link)  # noqa: PTH115  # names may be no UTF-8
            except OSError:  # it has ended, or is somebody else's: then it is none of ours
                continue
            if target == root or target.startswith(root + b"/"):
                process = identify(int(name))
                if process is not None:
                    found.append(process)
                break
    return found


# ---------------------------------------------------------------- an alarm on the clock that does not stop

_CLOCK_BOOTTIME: Final = 7  # linux/time.h; Python 3.11 has no timerfd of its own
_TFD_TIMER_ABSTIME: Final = 1
_TFD_CLOEXEC: Final = 0o2000000


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class BoottimeAlarm:
    """A file descriptor that becomes readable at a time of CLOCK_BOOTTIME, also if the host slept meanwhile."""

    def __init__(self) -> None:
        self._fd = _libc.timerfd_create(_CLOCK_BOOTTIME, _TFD_CLOEXEC)
        if self._fd < 0:
            raise HostUnfit(f"expected a kernel with timerfd and CLOCK_BOOTTIME: {os.strerror(ctypes.get_errno())}")

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""
        return int(self._fd)

    def set(self, at_ns: int | None) -> None:
        """Ring at a time, in nanoseconds of `boottime_ns()`; None: never."""
        seconds, nanoseconds = (0, 0) if at_ns is None else divmod(max(1, at_ns), 1_000_000_000)
        value = _Itimerspec(_Timespec(0, 0), _Timespec(seconds, nanoseconds))
        if _libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, ctypes.byref(value), None) != 0:
            raise HostUnfit(f"expected to set an alarm, got: {os.strerror(ctypes.get_errno())}")


# ---------------------------------------------------------------- pipes


def tee(source: int, target: int, size: int) -> int:
    """Copy what waits in a pipe, once something does, into another pipe without taking it out; return its size.

    Raises:
        OSError: one of the two is no pipe, or the target is full.
    """
    while True:
        copied: int = _libc.tee(source, target, ctypes.c_size_t(size), ctypes.c_uint(0))
        if copied >= 0:
            return copied
        number = ctypes.get_errno()
        if number != errno.EINTR:  # a signal that another thread handles
            raise OSError(number, os.strerror(number))
