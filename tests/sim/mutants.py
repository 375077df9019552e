"""Show that the simulator bites: break a copy of the tree in each known way, and find the seed that notices."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATCHES = Path(__file__).parent / "mutants"


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.sim.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="only these; else all")
    parser.add_argument("--jobs", default=str(len(os.sched_getaffinity(0))), help="processes")
    parser.add_argument("--seeds", default="1-150", help="look in these, until the first that fails")
    given = parser.parse_args()
    patches = sorted(PATCHES.glob("*.patch"))
    if given.names:
        unknown = set(given.names) - {patch.stem for patch in patches}
        if unknown:
            parser.error(f"expected some of {', '.join(patch.stem for patch in patches)}; got {', '.join(unknown)}")
        patches = [patch for patch in patches if patch.stem in given.names]
    missed = [patch.stem for patch in patches if not _caught(patch, given.seeds, given.jobs)]
    print(f"{len(patches)} ways to break it, {len(missed)} unnoticed: {', '.join(missed) or 'none'}")
    sys.exit(bool(missed))


def _caught(patch, seeds, jobs):
    """Break a copy, and look for the first seed that fails there and not here."""
    began = time.monotonic()
    print(f"{patch.stem}: {patch.read_text().partition(chr(10))[0]}", flush=True)
    with tempfile.TemporaryDirectory(prefix="mqworker-mutant-") as directory:
        copy = Path(directory)
        for part in ("mqworker", "tasks", "tests/sim"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        applied = subprocess.run(
            ["git", "apply", "--whitespace=nowarn", str(patch)], cwd=copy, capture_output=True, text=True, check=False
        )
        if applied.returncode:
            print(f"    DOES NOT APPLY any more: {applied.stderr.strip()}", flush=True)
            return False
        done = _simulate(copy, "--seeds", seeds, "--quick", "--jobs", jobs)
    told = [line for line in done.stdout.splitlines() if line.startswith("seed ")]
    if not told:
        print(f"    UNNOTICED {done.stderr.strip()[-300:]}  ({time.monotonic() - began:.0f} s)", flush=True)
        return False
    print(f"    {told[0][:200]}  ({time.monotonic() - began:.0f} s)", flush=True)
    seed = told[0].split()[1].rstrip(":")
    if _simulate(ROOT, "--seed", seed).returncode:
        print(f"    but seed {seed} fails without the break, too", flush=True)
        return False
    return True


def _simulate(tree, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "tests.sim", *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    main()
