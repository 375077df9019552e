"""The watchdog as the process that it is."""

import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from mqworker import watchdog
from mqworker.processes import boottime_ns, descendants, identify

PATIENCE = 30.0  # seconds
SECOND = 1_000_000_000


def eventually(met):
    deadline = time.monotonic() + PATIENCE
    while not (found := met()):
        assert time.monotonic() < deadline
        time.sleep(0.01)  # between two looks at what has no event
    return found


@pytest.fixture
def dog():
    """A watchdog that has started."""
    command = [sys.executable, *watchdog.command()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == watchdog.READY
        yield process
        process.stdin.close()


@contextmanager
def slot():
    """Something with descendants that hear nothing."""
    script = "trap '' TERM HUP; setsid sh -c 'trap \"\" TERM HUP; sleep 1000 & wait' & echo ready; wait"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        eventually(lambda: len(descendants(process.pid)) == 2)
        yield process, [identify(process.pid), *descendants(process.pid)]
        process.kill()


def tell(dog, one, deadline):
    dog.stdin.write(watchdog.line(one, deadline))
    dog.stdin.flush()


def alive(family):
    return [one for one in family if identify(one.pid) == one]


def test_a_slot_ends_with_all_its_descendants_at_its_deadline_and_not_before_and_another_lives_on(dog):
    with slot() as (_, family), slot() as (_, others):
        deadline = boottime_ns() + SECOND
        tell(dog, others[0], watchdog.NO_DEADLINE)
        tell(dog, family[0], deadline - SECOND // 2)
        tell(dog, family[0], deadline)
        eventually(lambda: not alive(family))

        assert boottime_ns() >= deadline
        assert alive(others) == others
        dog.stdin.close()  # the agent is gone
        assert dog.wait(PATIENCE) == 0
        assert alive(others) == []


def test_a_deadline_that_was_taken_back_and_a_slot_that_has_gone_are_left_alone(dog):
    with slot() as (_, family), slot() as (_, gone):
        for one, word in ((family[0], watchdog.NO_DEADLINE), (gone[0], watchdog.GONE)):
            tell(dog, one, boottime_ns() + SECOND // 2)
            tell(dog, one, word)
        with pytest.raises(subprocess.TimeoutExpired):
            dog.wait(1.5)
        dog.stdin.close()
        dog.wait(PATIENCE)

        assert alive(family) == []
        assert alive(gone) == gone
        for one in gone[1:]:
            subprocess.run(["kill", "-KILL", str(one.pid)], check=True)


def test_it_is_small(dog):
    text = Path(f"/proc/{dog.pid}/smaps_rollup").read_text()
    pss = int(text.split("\nPss:")[1].split()[0])

    assert pss < 20_000  # kB; it is one for all slots
