"""Send a pool as many hostile messages as are wanted, and say what became of each.

python -m tests.hostile --messages 1000000 --seed 1
"""

import argparse
import ctypes
import gc
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.hostile.house import House

IN_A_ROUND = 20_000  # with one pool; the next begins with another seed
GROWTH = 64 * 1024  # KiB that memory may grow from the first rounds to the last
WARM = 2  # rounds


def main():
    """Run rounds until all messages are sent."""
    parser = argparse.ArgumentParser(prog="tests.hostile")
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("hostile-failure"), help="where to put what ended somebody")
    given = parser.parse_args()
    sent, told = Counter(), Counter()
    began, warm, peak = time.monotonic(), None, 0
    rounds = seed = 0
    while sum(sent.values()) < given.messages:
        seed = given.seed + rounds
        house = House(seed).run(min(IN_A_ROUND, given.messages - sum(sent.values())))
        sent += house.sent
        told += house.told
        rounds += 1
        for text in house.failures:
            print(f"seed {seed}: FAILED: {text}")
        if house.failures:
            if error := getattr(house, "traceback", None):
                traceback.print_exception(error)
            given.keep.mkdir(exist_ok=True)
            for number, (consumer, body) in enumerate(house.newest):
                (given.keep / f"{number:03}-{consumer}").write_bytes(body)
            print(f"the newest {len(house.newest)} messages are in {given.keep}")
            return 1
        del house
        gc.collect()
        peak = max(peak, resident())
        if rounds == WARM:
            warm = resident()
        print(f"seed {seed}: {sum(sent.values())} messages, {resident() // 1024} MiB", flush=True)
    seconds = time.monotonic() - began
    for consumer, number in sorted(sent.items()):
        print(f"{consumer:9}{number:9} sent")
        for (one, word), part in sorted(told.items()):
            if one == consumer:
                print(f"{'':9}{part:9} {word}")
    grown = 0 if warm is None else resident() - warm
    print(f"{sum(sent.values())} messages in {seconds:.0f} s, all accounted for; 0 exceptions")
    print(f"memory: {peak // 1024} MiB at most behind a round, {grown // 1024} MiB more at the end than after {WARM}")
    if grown > GROWTH:
        print(f"FAILED: memory grew by more than {GROWTH // 1024} MiB")
        return 1
    return 0


def resident():
    """Return this process's memory in KiB, without what its allocator has only not given back."""
    ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise AssertionError


if __name__ == "__main__":
    sys.exit(main())
