"""Set a whole pool on fire, and judge what is left: `python -m tests.chaos --minutes 60 --seed 1 --report FILE`."""

import argparse
import os
import shutil
import sys


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long, from the first process to the verdict")
    parser.add_argument("--seed", type=int, help="of faults, requests and commands; default: a random one")
    parser.add_argument("--report", help="write the report to this file, in Markdown")
    parser.add_argument("--ledger", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--quick", action="store_true", help="shorter faults, and lower demands on what was proven")
    parser.add_argument("--keep", help="keep everything in this directory; else it is kept only if the run fails")
    parser.add_argument("--only", action="append", default=[], help="only faults whose kind contains this; repeatable")
    parser.add_argument("--list", action="store_true", help="list the kinds of fault")
    parser.add_argument("--judge", metavar="FILE", help="judge the evidence.json of an earlier run again")
    given = parser.parse_args()
    if os.geteuid() == 0 and "MQWORKER_CHAOS_MOUNTS" not in os.environ and shutil.which("unshare"):
        # Mounts of its own: the small disks that faults fill go with the last process, however that ends.
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.chaos", *sys.argv[1:]]
        os.execvpe("unshare", command, {**os.environ, "MQWORKER_CHAOS_MOUNTS": "private"})  # noqa: S606  # no shell is wanted
    from tests.chaos import run  # noqa: PLC0415  # slow, and for nothing before the line above

    sys.exit(run.run(given))


if __name__ == "__main__":
    main()
