"""What every measured system is given to do: nothing, but to note which number ran when. Knows none of the systems.

Each process that works has a file of its own in the directory that NOTES names, mapped into its memory: a count, and
then a number and a time for each run. A note takes a microsecond, and is read from outside while the work goes on.
"""

import mmap
import os
import struct
import time
from functools import cache
from pathlib import Path
from typing import Any, Final

NOTES: Final = "BENCHMARK_NOTES"  # the variable with the directory
NAME: Final = "counted"  # of the task, and of its queue where it needs one
ARGUMENT_BYTES: Final = 150
DIGITS: Final = 9
LIMIT: Final = 1_000_000  # runs of one process
COUNT: Final = struct.Struct("=q")
NOTE: Final = struct.Struct("=qq")  # number, nanoseconds


def argument(number: int) -> dict[str, Any]:
    """Return the argument of one task; as JSON it has 150 bytes."""
    named = f"{number:0{DIGITS}}"
    return {"number": named, "text": "x" * (ARGUMENT_BYTES - len(f'{{"number":"{named}","text":""}}'))}


def now() -> int:
    """Return nanoseconds on the clock of all notes."""
    return time.monotonic_ns()


def run(number: str, text: str) -> None:  # noqa: ARG001  # it is there to be carried
    """Do the work."""
    began = now()
    book = _book(os.getpid())  # a fork begins its own
    (count,) = COUNT.unpack_from(book)
    NOTE.pack_into(book, COUNT.size + count * NOTE.size, int(number), began)
    COUNT.pack_into(book, 0, count + 1)


@cache
def _book(pid: int) -> mmap.mmap:
    with (Path(os.environ[NOTES]) / str(pid)).open("w+b") as file:
        file.truncate(COUNT.size + LIMIT * NOTE.size)  # sparse: only what is written takes room
        return mmap.mmap(file.fileno(), 0)


def count(directory: Path) -> int:
    """Count the runs so far."""
    total = 0
    for path in directory.iterdir():
        with path.open("rb") as file:
            total += COUNT.unpack(file.read(COUNT.size))[0]
    return total


def read(directory: Path) -> list[tuple[int, int]]:
    """Return number and time of each run, by time."""
    notes: list[tuple[int, int]] = []
    for path in directory.iterdir():
        with path.open("rb") as file:
            (number,) = COUNT.unpack(file.read(COUNT.size))
            notes += NOTE.iter_unpack(file.read(number * NOTE.size))
    return sorted(notes, key=lambda note: note[1])
