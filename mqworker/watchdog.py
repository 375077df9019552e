"""The process beside the slots that ends each at its deadline, where the slot cannot: a task may hold Python's lock.

It hears from the agent, one line for each slot, what its deadline is now. Slots end when it ends; it ends all slots
when the agent is gone. It does not read what the agent and its slots say to each other. Its package has no contents
but what it needs itself: it waits for hours beside the slots of a small host.

    python -I -S -c <START> <the folder of mqworker>     hears on standard input, says once on standard output: ready
    ... --below EXIT_CODE     ends what stems from this process, which was a slot, and then itself with this code
"""

import os
import select
import sys
import threading
import time
from pathlib import Path
from typing import Final

from mqworker import processes
from mqworker.errors import HostUnfit
from mqworker.processes import Process

# The package itself is not imported: it loads the Task API.
START: Final = (
    "import sys, types; package = types.ModuleType('mqworker'); package.__path__ = [sys.argv[1]]; "
    "sys.modules['mqworker'] = package; from mqworker import watchdog; watchdog.main()"
)
READY: Final = b"ready\n"
MARGIN_NS: Final = 250_000_000  # beyond the deadline, at which a slot that can ends itself
PAUSE: Final = 1.0  # seconds before the next try, where something does not end
NO_DEADLINE: Final = 0
GONE: Final = -1


def command(*arguments: str) -> list[str]:
    """Return what Python is to be told to be this program."""
    return ["-I", "-S", "-c", START, str(Path(__file__).parent), *arguments]


def line(slot: Process, deadline_ns: int) -> bytes:
    """Say what the deadline of a slot is now: NO_DEADLINE while it is idle, GONE when its process has ended."""
    return f"{slot.pid} {slot.start} {deadline_ns}\n".encode()


class Watchdog:
    """Hold the deadlines of slots."""

    def __init__(self, orders: int) -> None:
        self._orders = orders
        self._alarm = processes.BoottimeAlarm()
        self._deadlines: dict[Process, int] = {}

    def watch(self) -> None:
        """End slots at their deadlines, until the agent is gone; then end those that are left."""
        pending = b""
        while True:
            held = [deadline for deadline in self._deadlines.values() if deadline > 0]
            self._alarm.set(min(held) + MARGIN_NS if held else None)
            ready, _, _ = select.select([self._orders, self._alarm.fileno()], [], [])
            if self._orders in ready:
                chunk = os.read(self._orders, 65536)
                if not chunk:
                    self._end(list(self._deadlines))
                    return
                *lines, pending = (pending + chunk).split(b"\n")
                for one in lines:
                    self._hear(one)
            now = processes.boottime_ns()
            for slot, deadline in list(self._deadlines.items()):
                if 0 < deadline <= now - MARGIN_NS:
                    del self._deadlines[slot]
                    self._end([slot], wait=False)

    def _hear(self, one: bytes) -> None:
        pid, start, deadline = map(int, one.split())
        slot = Process(pid=pid, start=start)
        if deadline == GONE:
            self._deadlines.pop(slot, None)
        else:
            self._deadlines[slot] = deadline

    def _end(self, slots: list[Process], *, wait: bool = True) -> None:
        """End slots with all that stems from them; all at the same time, for one may be slow to die."""
        threads = [threading.Thread(target=_end_for_good, args=(slot,), daemon=True) for slot in slots]
        for thread in threads:
            thread.start()
        for thread in threads if wait else ():
            thread.join()


def _end_for_good(slot: Process) -> None:
    told = ""
    while processes.identify(slot.pid) == slot:
        try:
            processes.kill_tree(slot)
        except HostUnfit as error:
            if not told:
                print(f"mqworker watchdog: {error}", file=sys.stderr, flush=True)  # noqa: T201  # it has no log
            told = str(error)
            time.sleep(PAUSE)


def _end_below() -> None:
    while True:
        try:
            processes.kill_descendants()
        except HostUnfit:  # who looks at the slot tells it
            time.sleep(PAUSE)
        else:
            return


def main() -> None:
    """Be the watchdog, or what a slot becomes that cannot end all that stems from it."""
    if sys.argv[2:3] == ["--below"]:
        _end_below()
        sys.exit(int(sys.argv[3]))
    os.write(1, READY)
    Watchdog(0).watch()
