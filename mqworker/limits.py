"""What a run may use of its host: which limits count for it, what of them the kernel keeps, and who has exceeded one.

Knows processes, control groups and directories; no broker, no store and no task. Where the host gives this worker
control groups (cgroup v2, delegated), the kernel keeps memory, cores and processes. Elsewhere a process has bounds of
its own (memory that it asks for, cores that it may use), and a look at the whole tree, a few times a second, finds who
uses too much. CPU time and the directory's size are looked at in both cases.
"""

import contextlib
import math
import os
import resource
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

from mqworker import processes
from mqworker.cgroup import Cgroup
from mqworker.messages import Limits
from mqworker.processes import Usage

LOOK_SECONDS: Final = 0.25  # between two looks at processes ...
LOOK_SHARE: Final = 20  # ... and no more than this part of the time is spent on looking
SIZE_SECONDS: Final = 2.0  # between two walks through a directory; the same part of the time counts

What = Literal["memory", "cpu", "disk", "processes"]


@dataclass(frozen=True)
class Exceeded:
    """Say which limit a run has exceeded, and by what measure."""

    what: What
    text: str


def smaller(one: Limits | None, other: Limits | None) -> Limits:
    """Join two sets of limits: of each, the smaller one counts."""
    sides = [side for side in (one, other) if side is not None]
    return Limits(
        **{
            name: min((value for side in sides if (value := getattr(side, name)) is not None), default=None)
            for name in Limits.__struct_fields__
        }
    )


def spread(cpus: float | None, taken: Collection[Sequence[int]]) -> list[int]:
    """Choose the cores for a run that may use so many: those that the fewest others were given; empty: all."""
    own = sorted(os.sched_getaffinity(0))
    if cpus is None or math.ceil(cpus) >= len(own):
        return []
    uses = {core: sum(core in cores for cores in taken) for core in own}
    return sorted(sorted(own, key=lambda core: uses[core])[: math.ceil(cpus)])


# ---------------------------------------------------------------- in the slot


@contextlib.contextmanager
def kept(limits: Limits | None, cpus: Collection[int]) -> Iterator[None]:
    """Bind this process, and what it starts meanwhile, as far as the kernel does that for one process.

    Memory: what each may ask for in writable private pages (RLIMIT_DATA), beyond what this one has already.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    cores = os.sched_getaffinity(0)
    if limits is not None and limits.memory is not None:
        most = limits.memory + processes.private_memory()
        soft, hard = before
        bounds = [most, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    if cpus:
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
        os.sched_setaffinity(0, cores)


# ---------------------------------------------------------------- beside it


class Watch:
    """Look whether one run keeps to its limits; `slot` is the pid of its slot, which was idle a moment ago."""

    def __init__(self, *, limits: Limits, slot: int, directory: Path, cgroup: Cgroup | None) -> None:
        self.limits = limits
        self.slot = slot
        self._directory = directory
        self._cgroup = cgroup
        self._size_due = 0.0  # monotonic
        start = processes.usage([slot])[slot]
        self._base, self._own_threads = start.memory, start.threads
        self._cpu_base = start.cpu_seconds if cgroup is None else cgroup.cpu_seconds()
        if cgroup is not None:
            cgroup.bound(
                memory=None if limits.memory is None else limits.memory + cgroup.memory(),
                cpus=limits.cpus,
                processes=None if limits.processes is None else limits.processes + start.threads,
            )
            self._ooms, self._refusals = cgroup.oom_kills(), cgroup.fork_refusals()

    @property
    def for_slot(self) -> Limits | None:
        """The limits that the slot has to see to itself."""
        return self.limits if self._cgroup is None else None

    @property
    def looks_at_processes(self) -> bool:
        """Whether `look` needs to know what the processes use."""
        wanted = (self.limits.memory, self.limits.cpu_seconds, self.limits.processes)
        return self._cgroup is None and any(limit is not None for limit in wanted)

    def look(self, used: Usage | None) -> Exceeded | None:
        """Say which limit is exceeded now; None: none."""
        return self.killed() or self._looked_at(used) or self._cpu(used) or self._size()

    def killed(self) -> Exceeded | None:
        """Ask what the kernel itself did about the limits of the run's control group."""
        if self._cgroup is None:
            return None
        if self.limits.memory is not None and self._cgroup.oom_kills() > self._ooms:
            return Exceeded("memory", f"the run needed more memory than its limit of {self.limits.memory} bytes")
        if self.limits.processes is not None and self._cgroup.fork_refusals() > self._refusals:
            return Exceeded("processes", f"the run needed more than its limit of {self.limits.processes} processes")
        return None

    def _looked_at(self, used: Usage | None) -> Exceeded | None:
        if used is None:
            return None
        most = self.limits.processes
        threads = used.threads - self._own_threads
        if most is not None and threads > most:
            return Exceeded("processes", f"the run has {threads} processes and threads, and its limit is {most}")
        most = self.limits.memory
        # What processes share counts for each of them at first; the fair measure is dear, and rarely needed.
        if most is not None and used.memory - self._base > most:
            fair = processes.proportional_memory(used.pids) - self._base
            if fair > most:
                return Exceeded("memory", f"the run has {fair} bytes of memory in use, and its limit is {most}")
        return None

    def _cpu(self, used: Usage | None) -> Exceeded | None:
        most = self.limits.cpu_seconds
        if most is None:
            return None
        if self._cgroup is not None:
            spent = self._cgroup.cpu_seconds() - self._cpu_base
        elif used is not None:
            spent = used.cpu_seconds - self._cpu_base
        else:
            return None
        if spent <= most:
            return None
        return Exceeded("cpu", f"the run has used {spent:.1f} s of CPU time, and its limit is {most:g} s")

    def _size(self) -> Exceeded | None:
        began = time.monotonic()
        if self.limits.disk is None or began < self._size_due:
            return None
        size = processes.size_of_tree(self._directory)
        now = time.monotonic()
        self._size_due = now + max(SIZE_SECONDS, LOOK_SHARE * (now - began))
        if size <= self.limits.disk:
            return None
        return Exceeded("disk", f"the run has {size} bytes in its work directory, and its limit is {self.limits.disk}")


def look(watches: Collection[Watch]) -> dict[int, Exceeded]:
    """Look at several runs at once; return those that have exceeded a limit, by the pid of their slots."""
    used = processes.usage([watch.slot for watch in watches if watch.looks_at_processes])
    found = {}
    for watch in watches:
        exceeded = watch.look(used.get(watch.slot))
        if exceeded is not None:
            found[watch.slot] = exceeded
    return found


def any_of(limits: Limits) -> bool:
    """Say whether anything is limited."""
    return any(value is not None for value in msgspec.structs.astuple(limits))
