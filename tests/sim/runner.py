"""Run scenarios, many at a time; cut a failing one down to what it needs to fail, and tell it."""

import dataclasses
import gc
import multiprocessing
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial

from tests.sim.scenario import draw
from tests.sim.world import MEMORY, World


def play(seed, *, only=None, traced=False, directory=MEMORY):
    """Run a seed, all of its happenings or only some; return what it broke, and its trace."""
    scenario = draw(seed)
    if only is not None:
        scenario = dataclasses.replace(scenario, happenings=[scenario.happenings[number] for number in only])
    world = World(scenario, traced=traced, directory=directory)
    violation = world.run()
    return violation, world


def _try(seed, directory):
    violation, _ = play(seed, directory=directory)
    gc.collect()
    return seed, violation


@contextmanager
def _pool(jobs):
    pool = multiprocessing.Pool(jobs)
    try:
        yield pool
    finally:
        pool.terminate()
        pool.join()


def run(given):
    """Do what the command line says."""
    if given.seed is not None:
        only = None if given.only is None else [int(number) for number in given.only.split(",")]
        violation, world = play(given.seed, only=only, traced=True)
        if violation is not None or given.trace:
            print("\n".join(world.trace))
        print(f"seed {given.seed}: {'well' if violation is None else violation}")
        return int(violation is not None)
    first, _, last = given.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    began = time.monotonic()
    failed = []
    gc.disable()
    # A directory for all: who is stopped in the middle removes nothing.
    with tempfile.TemporaryDirectory(prefix="mqworker-sim-", dir=MEMORY) as directory, _pool(given.jobs) as pool:
        results = pool.imap_unordered(partial(_try, directory=directory), seeds, chunksize=4)
        for number, (seed, violation) in enumerate(results, start=1):
            if number % 100 == 0:
                print(f"{number} of {len(seeds)} seeds, {len(failed)} failed", file=sys.stderr)
            if violation is not None:
                failed.append((seed, violation))
                print(f"seed {seed}: {violation.promise}: {violation.text[:300]}", flush=True)
                if given.quick:
                    break
    seconds = time.monotonic() - began
    print(f"{len(seeds)} seeds, {len(failed)} failed, {len(seeds) / seconds:.1f} a second")
    for seed, _ in sorted(failed)[:3]:
        tell(seed) if not given.quick else None
    return int(bool(failed))


def shrink(seed, promise):
    """Leave out one happening after the other, as long as the same promise is broken."""
    kept = list(range(len(draw(seed).happenings)))
    size = max(1, len(kept) // 2)
    until = time.monotonic() + 60
    while size and time.monotonic() < until:
        start = 0
        while start < len(kept) and time.monotonic() < until:
            fewer = kept[:start] + kept[start + size :]
            violation, _ = play(seed, only=fewer)
            if violation is not None and violation.promise == promise:
                kept = fewer
            else:
                start += size
        size //= 2
    return kept


def tell(seed):
    """Print how to see a failing seed again, and the shortest trace of it."""
    violation, _ = play(seed)
    kept = shrink(seed, violation.promise)
    only = ",".join(map(str, kept))
    violation, world = play(seed, only=kept, traced=True)
    print(f"\nseed {seed} breaks {violation.promise}: {violation.text}")
    print(f"the whole of it: python -m tests.sim --seed {seed}")
    print(f"what is needed:  python -m tests.sim --seed {seed} --only {only}")
    for line in world.trace[-120:]:
        print(f"  {line[:400]}")
