"""The part of the control group tree (cgroup v2) that this process may divide, and one leaf of it for each slot.

May import only errors. Knows files below /sys/fs/cgroup, nothing of what runs there. The names of the files and what
they mean are from the kernel's Documentation/admin-guide/cgroup-v2.rst.
"""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mqworker.errors import HostUnfit

CONTROLLERS: Final = ("cpu", "memory", "pids")
AGENT: Final = "mqworker-agent"  # a group that has groups below it may hold no process itself: the agent moves there
_PERIOD: Final = 100_000  # microseconds, of cpu.max
_OURS: Final = re.compile(r"mqworker-(\d+)-slot-\d+")


@dataclass(frozen=True)
class Cgroup:
    """One group, with all processes that were put there or stem from them."""

    path: Path

    def put(self, pid: int) -> None:
        """Move a process into the group; what it starts from now on is born there.

        Raises:
            HostUnfit: the kernel refuses.
        """
        _write(self.path / "cgroup.procs", str(pid))

    def bound(self, *, memory: int | None, cpus: float | None, processes: int | None) -> None:
        """Set what all in the group may use together; None: anything.

        Raises:
            HostUnfit: the kernel refuses.
        """
        # Without this, the kernel ends one process of a run, and what is left of it goes on as if nothing had happened.
        _write(self.path / "memory.oom.group", "1")
        _write(self.path / "memory.max", "max" if memory is None else str(memory))
        if (self.path / "memory.swap.max").exists():  # not with a kernel that has no swap
            _write(self.path / "memory.swap.max", "max" if memory is None else "0")
        _write(self.path / "cpu.max", f"{'max' if cpus is None else max(1000, int(cpus * _PERIOD))} {_PERIOD}")
        _write(self.path / "pids.max", "max" if processes is None else str(processes))

    def memory(self) -> int:
        """Return the bytes in use now."""
        return int(_read(self.path / "memory.current"))

    def cpu_seconds(self) -> float:
        """Return the CPU time used so far, by those that have ended too."""
        return _counts(self.path / "cpu.stat")["usage_usec"] / 1e6

    def oom_kills(self) -> int:
        """Count the processes that were ended because the group's memory was used up."""
        return _counts(self.path / "memory.events").get("oom_kill", 0)

    def fork_refusals(self) -> int:
        """Count how often a process or thread was refused because there were too many."""
        return _counts(self.path / "pids.events").get("max", 0)

    def kill(self) -> None:
        """Kill all that is there, without grace.

        Raises:
            HostUnfit: the kernel refuses.
        """
        killer = self.path / "cgroup.kill"
        if killer.exists():  # from Linux 5.14 on; before, who wants them killed does it one by one
            _write(killer, "1")

    def remove(self) -> None:
        """Remove the group, with groups that its processes made below it; one that is not empty yet stays for now."""
        with contextlib.suppress(OSError):
            for below in sorted(self.path.glob("**/"), key=lambda one: len(one.parts), reverse=True):
                below.rmdir()


class Cgroups:
    """Make groups for slots."""

    def __init__(self, base: Path) -> None:
        self._base = base

    @classmethod
    def take(cls, *, proc: Path = Path("/proc/self")) -> "Cgroups":
        """Take over the group that this process is in, if it was given to this service to divide.

        The service manager says so by an extended attribute (systemd's `Delegate=yes`), or has given the group's
        directory to this user, or this is a container with a group tree of its own that it may write. All processes
        of the group, this one included, move into a group below it, and groups of agents that have ended are removed.

        Raises:
            HostUnfit: it was not; the text says what is missing.
        """
        base = _own_group(proc)
        if base.name == AGENT:  # who was here before has divided it
            base = base.parent
        if not _delegated(base):
            raise HostUnfit(f"expected a control group that this service may divide, got {base}; set Delegate=yes")
        offered = set(_read(base / "cgroup.controllers").split())
        if missing := [name for name in CONTROLLERS if name not in offered]:
            raise HostUnfit(
                f"expected the controllers {', '.join(CONTROLLERS)} in {base}, {', '.join(missing)} missing"
            )
        groups = cls(base)
        groups._clear()
        try:
            agent = base / AGENT
            agent.mkdir(exist_ok=True)
            for pid in _read(base / "cgroup.procs").split():
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    (agent / "cgroup.procs").write_text(pid)
            (base / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in CONTROLLERS))
        except OSError as error:
            raise HostUnfit(f"expected to divide the control group {base}, got: {error}") from error
        return groups

    def make(self, slot: int) -> Cgroup:
        """Make the group of a slot.

        Raises:
            HostUnfit: the kernel refuses.
        """
        group = Cgroup(self._base / f"mqworker-{os.getpid()}-slot-{slot}")
        group.remove()
        try:
            group.path.mkdir(exist_ok=True)
        except OSError as error:
            raise HostUnfit(f"expected to make the control group {group.path}, got: {error}") from error
        return group

    def _clear(self) -> None:
        """End and remove what agents left that have ended."""
        for path in self._base.iterdir():
            named = _OURS.fullmatch(path.name)
            if named is not None and not Path("/proc", named[1]).exists():
                Cgroup(path).kill()
                Cgroup(path).remove()


def _own_group(proc: Path) -> Path:
    """Find the directory of the group that a process is in."""
    entry = re.search(r"^0::(/.*)$", (proc / "cgroup").read_text(), re.MULTILINE)
    for mount in (proc / "mountinfo").read_text().splitlines():
        fields = mount.split(" ")
        kind = fields[fields.index("-") + 1]
        if entry is not None and kind == "cgroup2":
            root, point = Path(fields[3]), Path(fields[4])
            own = Path(entry[1])
            if own.is_relative_to(root):
                return point / own.relative_to(root)
    raise HostUnfit("expected a kernel that shows its control groups (cgroup v2), got none")


def _delegated(base: Path) -> bool:
    if not all(os.access(base / name, os.W_OK) for name in ("", "cgroup.procs", "cgroup.subtree_control")):
        return False
    for attribute in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):
            return os.getxattr(base, attribute) == b"1"
    if os.geteuid() != 0 and base.stat().st_uid == os.geteuid():
        return True
    # The root of a container's own tree: unlike the root of the host's, it can be frozen.
    return _is_namespace_root(base)


def _is_namespace_root(base: Path) -> bool:
    return Path(os.path.realpath(base)).is_mount() and (base / "cgroup.freeze").exists()


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError as error:
        raise HostUnfit(f"expected to read {file}, got: {error}") from error


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise HostUnfit(f"expected to write {text!r} to {file}, got: {error}") from error


def _counts(file: Path) -> dict[str, int]:
    return {name: int(number) for name, number in (line.split() for line in _read(file).splitlines())}
