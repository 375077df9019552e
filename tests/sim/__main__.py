"""Run seeds: `python -m tests.sim --seed 7`, `--seeds 1-1000`; a failing one is cut down and told."""

import argparse
import os
import sys


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="run one seed, with its trace if it fails")
    parser.add_argument("--seeds", default="1-100", help="run these: 1-1000")
    parser.add_argument("--only", help="leave in only these happenings, by number: 0,3,17")
    parser.add_argument("--trace", action="store_true", help="print the trace in any case")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument(
        "--quick", action="store_true", help="stop at the first seed that fails, and do not cut it down"
    )
    given = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of a set in the product must not change a run
        os.execve(  # noqa: S606  # no shell is wanted
            sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"}
        )
    from tests.sim import runner  # noqa: PLC0415  # slow, and for nothing before the line above

    sys.exit(runner.run(given))


if __name__ == "__main__":
    main()
