"""Show that the fire bites: break a copy of the tree, burn it for three minutes, and say what the judge notices.

Takes the breaks of its own folder, and by name also those of the simulator.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OWN = Path(__file__).parent / "mutants"
SIMULATED = ROOT / "tests" / "sim" / "mutants"


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="only these; else all of its own folder")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--minutes", default="3")
    given = parser.parse_args()
    patches = [_find(parser, name) for name in given.names] or sorted(OWN.glob("*.patch"))
    missed = [patch.stem for patch in patches if not _noticed(patch, given.seed, given.minutes)]
    print(f"{len(patches)} ways to break it, {len(missed)} unnoticed: {', '.join(missed) or 'none'}")
    sys.exit(bool(missed))


def _find(parser, name):
    for folder in (OWN, SIMULATED):
        patch = folder / f"{name}.patch"
        if patch.exists():
            return patch
    return parser.error(f"expected one of {', '.join(patch.stem for patch in OWN.glob('*.patch'))}; got {name}")


def _noticed(patch, seed, minutes):
    began = time.monotonic()
    print(f"{patch.stem}: {patch.read_text().partition(chr(10))[0]}", flush=True)
    with tempfile.TemporaryDirectory(prefix="mqworker-mutant-") as directory:
        copy = Path(directory)
        copy.chmod(0o755)
        for part in ("mqworker", "tasks", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        applied = subprocess.run(
            ["git", "apply", "--whitespace=nowarn", str(patch)], cwd=copy, capture_output=True, text=True, check=False
        )
        if applied.returncode:
            print(f"    DOES NOT APPLY any more: {applied.stderr.strip()}", flush=True)
            return False
        command = [sys.executable, "-m", "tests.chaos", "--quick", "--minutes", minutes, "--seed", seed]
        done = subprocess.run(
            [*command, "--keep", str(copy / "kept")],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            check=False,
        )
    told = [line for line in done.stdout.splitlines() if line.startswith("VIOLATION")]
    for line in told[:3] or [f"UNNOTICED {done.stdout[-200:]} {done.stderr[-500:]}"]:
        print(f"    {line[:300]}", flush=True)
    print(f"    {len(told)} violations shown ({time.monotonic() - began:.0f} s)", flush=True)
    return bool(told)


if __name__ == "__main__":
    main()
