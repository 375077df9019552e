"""What an idle pool takes: the memory of scheduler, agent and slots, and their CPU time.

    python -m benchmarks.footprint                     as JSON
    python -m benchmarks.footprint --slots 2 --seconds 5

Memory is each process's proportional share (PSS): what several share is divided among them.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any, Final

from benchmarks.goals import Goal, goal_rows
from benchmarks.readme import head, paragraph, row
from benchmarks.systems import Mqworker
from benchmarks.world import world
from mqworker import processes

SLOT: Final = "mqworker.slot"  # in the command line of a slot
REST_SECONDS: Final = 5.0  # until what begins has begun
AGENT_GOAL: Final = Goal("memory of an agent", 80.0, at_least=False, unit="MiB")
SLOT_GOAL: Final = Goal("memory of an idle slot", 25.0, at_least=False, unit="MiB")
IDLE_GOAL: Final = Goal("CPU of an agent with its idle slots", 1.0, at_least=False, unit="% of a core")

Figures = dict[str, Any]


def run(given: argparse.Namespace) -> Figures:
    """Measure, and put it together."""
    with world(()) as shared, shared.place("footprint") as place, Mqworker(place) as system, system.client() as client:
        agent = system.start_agent("w", given.slots)
        system.await_agents(client, 1)
        time.sleep(REST_SECONDS)
        roots = (agent, system.scheduler())
        before = processes.usage(roots)
        time.sleep(given.seconds)
        after = processes.usage(roots)
        slots: list[int] = []
        others: list[int] = []
        for one in processes.descendants(agent):
            command = Path(f"/proc/{one.pid}/cmdline").read_bytes().decode().split("\0")
            (slots if SLOT in command else others).append(processes.proportional_memory([one.pid]))
        cpu = [(after[root].cpu_seconds - before[root].cpu_seconds) / given.seconds for root in roots]
        if len(slots) != given.slots:
            raise RuntimeError(f"expected {given.slots} slots, got {len(slots)}")
        return {
            "slots": given.slots,
            "seconds": given.seconds,
            "agent": processes.proportional_memory([agent]),
            "scheduler": processes.proportional_memory([system.scheduler()]),
            "slot": slots,
            "watchdog": sum(others),
            "cpu": {"agent and slots": cpu[0], "scheduler": cpu[1]},
        }


def table(found: Figures) -> str:
    """Write the figures down."""
    mib = 2**20
    judged = [
        (AGENT_GOAL, found["agent"] / mib),
        (SLOT_GOAL, mean(found["slot"]) / mib),
        (IDLE_GOAL, found["cpu"]["agent and slots"] * 100),
    ]
    words = (
        f"An idle agent with {found['slots']} slots, as it comes; proportional shares (PSS), CPU time over "
        f"{found['seconds']:g} s:"
    )
    others = {
        "a scheduler, with an empty ledger": found["scheduler"],
        "the agent's watchdog": found["watchdog"],
        "all processes of the agent": found["agent"] + sum(found["slot"]) + found["watchdog"],
    }
    lines = [
        *paragraph(words),
        "",
        *goal_rows(judged),
        "",
        *head("besides", "memory"),
        *(row(what, f"{used / mib:,.0f} MiB") for what, used in others.items()),
        "",
        f"The scheduler takes {found['cpu']['scheduler']:.1%} of a core meanwhile.",
    ]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Say what can be asked for."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.footprint", description=__doc__)
    made.add_argument("--slots", type=int, default=16)
    made.add_argument("--seconds", type=float, default=60.0)
    made.add_argument("--quick", action="store_const", const=10.0, dest="seconds", help="ten seconds")
    return made


def main() -> None:
    """Measure, and print JSON."""
    print(json.dumps(run(parser().parse_args()), indent=1))


if __name__ == "__main__":
    main()
