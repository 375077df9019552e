"""Run all benchmarks, or some, and put their tables into the README: `python -m benchmarks`, or `make bench`."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import builds, footprint, growth, idle_slot, matching, readme, throughput, throughput_table
from benchmarks.readme import paragraph, times

COMMAND: Final = "make bench"

Found = dict[str, Any]


def table(found: Sequence[Found], idle: Found | None, *, workers: int, kinds: int) -> str:
    """Write the figures down, ratios first."""
    plain = sum(one["plain ask"] for one in found) / len(found)

    def milliseconds(name: str) -> Callable[[Found], str]:
        return lambda one: f"{one[name][0] * 1e3:.3g} ms"

    def question(name: str) -> Callable[[Found], str]:
        def show(one: Found) -> str:
            asked = one["questions"][name]
            return f"{asked['median'][0] * 1e3:.3g} ms"

        return show

    rows: list[tuple[str, Callable[[Found], str]]] = [
        (
            "**all workers and all requests, matched from nothing**: plain way against restart with all workers back",
            lambda one: times(one["pending"] * workers * plain / one["restart"]["all workers"][0]),
        ),
        (
            "**a new request**: plain way against its matching and dispatch",
            lambda one: times(workers * plain / one["share"]["new"]),
        ),
        (
            "likewise, against all that the scheduler does for it, commit included",
            lambda one: times(workers * plain / one["new"][0]),
        ),
        ("**a worker joins**: plain way against all", lambda one: times(one["pending"] * plain / one["join"][0])),
        (
            "**a decision changes**: plain way against all",
            lambda one: times(one["pending"] * plain / one["change decision"][0]),
        ),
        (
            "a new request, against the same at the smallest backlog",
            lambda one: times(one["new"][0] / found[0]["new"][0]),
        ),
        (
            "a free slot, against the same at the smallest backlog",
            lambda one: times(one["free"][0] / found[0]["free"][0]),
        ),
        ("a new request, alone in its commit", milliseconds("new")),
        ("of it matching and dispatch", lambda one: f"{one['share']['new'] * 1e3:.3g} ms"),
        ("a new request, with 99 others in its message", milliseconds("new together")),
        ("the first request of a requirement class", milliseconds("first")),
        ("a slot comes free: outcome kept, next request chosen, offer kept", milliseconds("free")),
        ("of it matching and dispatch", lambda one: f"{one['share']['free'] * 1e3:.3g} ms"),
        ("a claim is granted", milliseconds("claim")),
        ("a worker joins", milliseconds("join")),
        ("metadata change, nothing that is read", milliseconds("change unread")),
        ("metadata change, read, but the same decisions", milliseconds("change read")),
        ("metadata change, other decisions: another class", milliseconds("change decision")),
        ("Python's garbage collector, longest pause meanwhile", lambda one: f"{one['collector'] * 1e3:.3g} ms"),
        ("a heartbeat", milliseconds("heartbeat")),
        ("a second in which nothing happens", milliseconds("quiet second")),
        ("`mqworker explain` of a request", question("explain a request")),
        ("likewise of task data that nobody can run", question("explain an impossible kind")),
        ("`mqworker capabilities`, each page", question("capabilities")),
        ("scheduler starts: ready for reports (wall)", lambda one: f"{one['restart']['ready'][1]:.2g} s"),
        (
            "likewise, its first offer (wall)",
            lambda one: "none" if one["restart"]["first offer"] is None else f"{one['restart']['first offer']:.2g} s",
        ),
        (
            f"likewise, all {workers:,} workers back, idle ones at work (CPU)",
            lambda one: f"{one['restart']['all workers'][0]:.2g} s",
        ),
        ("memory, the farm's own metadata included", lambda one: f"{one['memory']['pss'] / 2**20:,.0f} MiB"),
        ("capability classes", lambda one: f"{one['classes']:,}"),
    ]
    cores = os.cpu_count()
    command = f"{COMMAND} BENCH=--alone" if idle is not None and idle["alone"] else COMMAND
    head = " | ".join(f"{one['backlog']:,}" for one in found)
    words = (
        f"{workers:,} workers, all with different metadata, {kinds:,} requirement classes; {cores} cores, "
        f"{time.strftime('%Y-%m-%d')}, `{command}`. Costs are CPU time of the scheduler's own code on a real ledger "
        "(SQLite, full sync), without the connection to the broker: medians. The plain way asks each worker about each "
        f"request: {plain * 1e6:.2g} µs each, sampled and scaled."
    )
    lines = [
        *paragraph(words),
        "",
        f"| pending requests | {head} |",
        f"| --- |{' ---: |' * len(found)}",
        *(f"| {name} | {' | '.join(show(one) for one in found)} |" for name, show in rows),
    ]
    if idle is not None:
        words = (
            "A slot waits for its next run, from end to start, while there is work for it: median "
            f"{idle['p50'] * 1e3:.0f} ms, p99 {idle['p99'] * 1e3:.0f} ms ({idle['samples']:,} waits of "
            f"{idle['slots']} slots; real processes and a real broker on the same {cores} cores, three kinds of "
            "workers, runs of 0.1 to 0.6 s"
            f"{', all at real-time priority' if idle['alone'] else ''})."
        )
        lines += ["", *paragraph(words)]
    return "\n".join(lines) + "\n"


def matching_part(given: argparse.Namespace) -> str:
    """Measure what matching costs, and how long a slot is idle."""
    size = matching.parser().parse_args([])
    found = _earlier(given.matching) or matching.run(size)
    idle = _earlier(given.idle_slot) or idle_slot.run(idle_slot.parser().parse_args(["--alone"] if given.alone else []))
    return table(found, idle, workers=size.workers, kinds=size.kinds)


def throughput_part(given: argparse.Namespace) -> str:
    """Measure how much work passes, beside the peers."""
    found = _earlier(given.throughput) or throughput.run(_options(throughput.parser(), given))
    return throughput_table.table(found, command=f"{COMMAND} BENCH='--only throughput'")


def builds_part(given: argparse.Namespace) -> str:
    """Measure what a build takes longer."""
    return builds.table(_earlier(given.builds) or builds.run(_options(builds.parser(), given)))


def footprint_part(given: argparse.Namespace) -> str:
    """Measure what an idle pool takes."""
    return footprint.table(_earlier(given.footprint) or footprint.run(_options(footprint.parser(), given)))


def growth_part(given: argparse.Namespace) -> str:
    """Measure what it costs that a pool grows."""
    return growth.table(_earlier(given.growth) or growth.run(_options(growth.parser(), given)))


def _options(parser: argparse.ArgumentParser, given: argparse.Namespace) -> argparse.Namespace:
    return parser.parse_args(["--quick"] if given.quick else [])


def _earlier(path: Path | None) -> Any:
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))


PARTS: Final[Mapping[str, Callable[[argparse.Namespace], str]]] = {  # by the name of the README's block
    "throughput": throughput_part,
    "builds": builds_part,
    "footprint": footprint_part,
    "growth": growth_part,
    "matching": matching_part,
}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be given again")
    parser.add_argument("--quick", action="store_true", help="all but matching small and once, to see that it works")
    for name in (*PARTS, "idle-slot"):
        module = f"benchmarks.{name.replace('-', '_')}"
        parser.add_argument(f"--{name}", type=Path, help=f"figures of an earlier `python -m {module}`, as JSON")
    parser.add_argument(
        "--alone", action="store_true", help="at real-time priority, as if nothing else ran on the machine; needs root"
    )
    parser.add_argument("--no-readme", action="store_true", help="print only")
    given = parser.parse_args()
    if given.alone:
        idle_slot.stand_alone()  # whoever is started inherits it
    for name in given.only or PARTS:
        text = PARTS[name](given)
        sys.stdout.write(text)
        if not given.no_readme:
            readme.write(name, text)


if __name__ == "__main__":
    main()
