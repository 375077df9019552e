"""What a run has shown, in Markdown: counts, times, the verdict, and whether it proves anything at all."""

import importlib.metadata
import os
import platform
import sqlite3
from bisect import bisect_right
from collections import Counter, defaultdict
from statistics import quantiles

import sqlalchemy

from mqworker import __version__
from mqworker.screen import printable
from tests.chaos.check import FINAL, runs_of
from tests.chaos.faults import KINDS
from tests.chaos.record import read
from tests.chaos.world import SLOTS, SUBMITTERS, WORKERS

LONG = 30.0  # minutes; from here on a run is a long one
DEMANDS = {  # of a run's length: requests and faults a minute, and of each kind
    "requests": 10_000 / 60,
    "faults": 200 / 60,
    "each kind": 10 / 60,
}
QUICK = {"requests": 100, "faults": 8, "each kind": 0}


def facts(world, given, seed):
    """Note what is not in the evidence: who ran what where, and which faults there were."""
    lines = read(world.directory / "record" / "harness.jsonl")
    harm = {line["number"]: line for line in lines if line["what"] == "harm"}
    faults = [{**harm[line["number"]], "healed": line["wall"]} for line in lines if line["what"] == "heal"]
    starts = Counter(line["party"] for line in lines if line["what"] == "started")
    broker = world.ctl("version").strip() if world.node.pid is not None else "down"
    with open("/proc/meminfo") as file:  # noqa: PTH123  # it is no path of ours
        memory = int(file.readline().split()[1]) / 1024**2
    return {
        "seed": seed,
        "given": given,
        "ledger": f"SQLite {sqlite3.sqlite_version}" if world.audit.file is not None else _server(world),
        "broker": broker,
        "memory": memory,
        "faults": faults,
        "missed": Counter(line["kind"] for line in lines if line["what"] == "missed"),
        "starts": starts,
        "schedulers": len(world.scheduler_names),
        "began": lines[0]["wall"] if lines else 0.0,
    }


def _server(world):
    with sqlalchemy.create_engine(world.ledger_url).connect() as connection:
        return f"PostgreSQL {connection.execute(sqlalchemy.text('SHOW server_version')).scalar_one()}"


def verdict(found, violations):
    """Say it in one line."""
    by = Counter(violation.promise for violation in violations)
    lost = by["nothing is lost"] + by["a receipt comes"] + by["each ends"]
    twice = by["nothing is counted twice"] + by["exactly one final state"] + by["one request for one id"]
    overlapping = by["no two runs overlap"] + by["no attempt runs twice"]
    others = len(violations) - lost - twice - overlapping
    return (
        f"{len(found.tables['requests'])} requests, {len(runs_of(found))} runs:"
        f" {lost} lost, {overlapping} overlapping, {twice} counted twice, {others} other violations"
    )


def write(found, violations, known, *, seconds):
    """Return the report, and what it lacks to prove something."""
    figures = _Figures(found, known)
    unproven = figures.unproven()
    given = known["given"]
    holds = "IT DOES NOT HOLD." if violations else "IT PROVES NOTHING." if unproven else "It holds."
    command = f"python -m tests.chaos --minutes {given.minutes:g} --seed {known['seed']} --ledger {given.ledger}"
    where = (
        f"mqworker {__version__}, RabbitMQ {known['broker']}, {known['ledger']}, Python {platform.python_version()},"
        f" pika {importlib.metadata.version('pika')}, Linux {platform.release()},"
        f" {len(os.sched_getaffinity(0))} cores, {known['memory']:.0f} GiB."
    )
    who = (
        f"{known['schedulers']} scheduler(s), {len(WORKERS)} workers of {SLOTS} slots, {len(SUBMITTERS)} submitters,"
        " and one who aborts, reprioritises, pauses, resumes and retries; each has a TCP proxy before the broker."
    )
    parts = [
        "# Under fire",
        f"**{verdict(found, violations)}.** {holds}",
        f"`{command}{' --quick' if given.quick else ''}`, {seconds / 60:.1f} minutes.",
        where,
        who,
    ]
    if known["left_out"]:
        parts.append(f"**LEFT OUT** (they need root, or a standby): {', '.join(known['left_out'])}.")
    if violations:
        shown = "\n".join(f"- **{one.promise}**: {printable(one.text)[:500]}" for one in violations[:100])
        parts += [f"## Violations\n\n{shown}"]
    if unproven:
        parts += ["## It proves nothing\n\n" + "\n".join(f"- {text}" for text in unproven)]
    parts += ["## Counts", figures.counts(), "## Times (seconds)", figures.times(), "## Faults", figures.faults()]
    parts += ["## Ends of processes", figures.ends()]
    return "\n\n".join(parts) + "\n", unproven


class _Figures:
    def __init__(self, found, known):
        self.found = found
        self.known = known
        self.runs = runs_of(found)
        self.requests = {row["id"]: row for row in found.tables["requests"]}
        self.attempts = found.tables["attempts"]
        self.by_request = defaultdict(list)
        for row in sorted(self.attempts, key=lambda row: row["number"]):
            self.by_request[row["request"]].append(row)
        self.happenings = found.tables["happenings"]
        self.ended_at = {
            (one["request"], one["attempt"]): one["at"] for one in self.happenings if one["what"] == "ended"
        }
        self.results = Counter(row["result"] for row in self.attempts)
        self.statuses = Counter(one["status"] for one in found.receipts)
        self.reissues = sum(row["number"] > 1 for row in self.attempts)
        self.refused = sum(row["late"] is not None for row in self.attempts)
        self.by_kind = Counter(one["kind"] for one in known["faults"])

    def unproven(self):
        """Say what the run has not shown."""
        given = self.known["given"]
        long = {name: int(rate * given.minutes) for name, rate in DEMANDS.items()}
        least = QUICK if given.quick else long
        lacking = []
        if len(self.requests) < least["requests"]:
            lacking.append(f"{len(self.requests)} requests, and not {least['requests']}")
        if len(self.known["faults"]) < least["faults"]:
            lacking.append(f"{len(self.known['faults'])} faults, and not {least['faults']}")
        if not given.only:
            lacking += [
                f"{self.by_kind[kind]} times {kind}, and not {least['each kind']}"
                for kind in KINDS
                if kind not in self.known["left_out"] and self.by_kind[kind] < least["each kind"]
            ]
        needed = {"re-issues": self.reissues, "lost leases": self.results["lost"]}
        if not given.quick:  # in three minutes, luck decides whether one comes too late
            needed["refused outcomes"] = self.refused
        lacking += [f"no {name}" for name, number in needed.items() if not number]
        return lacking

    def counts(self):
        aborts = [line for line in self.found.commands if line["what"] == "abort"]
        states = Counter(row["state"] for row in self.requests.values())
        rows = [
            ("requests in the ledger", len(self.requests)),
            *((f"... {state}", states[state]) for state in sorted(FINAL)),
            ("receipts", sum(self.statuses.values())),
            ("duplicates suppressed (receipt `known`)", self.statuses["known"]),
            ("attempts granted", len(self.attempts)),
            ("runs in the journal", len(self.runs)),
            ("runs that were killed", sum(run.end is None for run in self.runs.values())),
            ("children in the journal", sum(line["what"] == "child" for line in self.found.journal)),
            ("re-issues (attempts after the first)", self.reissues),
            ("lost leases (attempts that ended `lost`)", self.results["lost"]),
            ("handed back", self.results["handed_back"]),
            ("refused outcomes (kept as history)", self.refused),
            ("artifacts", sum(one["category"] == "test:ashes" for one in self.found.tables["artifacts"])),
            ("requests that were to be aborted", len({one for line in aborts for one in line["ids"]})),
            ("terms of schedulers", sum(one["what"] == "term" for one in self.happenings)),
            ("faults", len(self.known["faults"])),
        ]
        return _table(("what", "number"), rows)

    def times(self):
        rows = [
            ("wait: submitted to first grant", self._waits()),
            ("run: started to ended", self._lives()),
            ("take-over: lost to granted again", self._take_overs()),
            ("abort of a running request: asked to confirmed", self._abort_times()),
            ("dead before its request ran again", self._gaps()),
            ("dead before it was given up as lost", self._margins()),
            ("scheduler killed to the next term", self._terms("scheduler killed")),
            ("scheduler frozen to the next term, while it is frozen", self._terms("scheduler frozen beyond the lease")),
        ]
        shown = [(name, len(values), *_percentiles(values)) for name, values in rows]
        return _table(("what", "number", "min", "p50", "p90", "p99", "max"), shown)

    def _waits(self):
        return [rows[0]["granted"] - self.requests[request]["submitted"] for request, rows in self.by_request.items()]

    def _lives(self):
        return [(run.last_ns - run.start_ns) / 1e9 for run in self.runs.values() if run.end is not None]

    def _take_overs(self):
        return [
            after["granted"] - self.ended_at[before["request"], before["number"]]
            for rows in self.by_request.values()
            for before, after in zip(rows, rows[1:], strict=False)
            if before["result"] == "lost" and (before["request"], before["number"]) in self.ended_at
        ]

    def _abort_times(self):
        asked = {
            one["request"]: one["at"]
            for one in self.happenings
            if one["what"] == "abort" and one["detail"] == "running"
        }
        return [
            move["at"] - asked[move["request"]]
            for move in self.found.tables["moves"]
            if move["new"] == "aborted" and move["request"] in asked
        ]

    def _gaps(self):
        by_request = defaultdict(list)
        for run in self.runs.values():
            by_request[run.request].append(run)
        gaps = []
        for runs in by_request.values():
            runs.sort(key=lambda run: run.start_ns)
            gaps += [(b.start_ns - a.last_ns) / 1e9 for a, b in zip(runs, runs[1:], strict=False)]
        return gaps

    def _margins(self):
        return [
            self.ended_at[row["request"], row["number"]] - self.runs[row["token"]].last_wall
            for row in self.attempts
            if row["result"] == "lost"
            and row["token"] in self.runs
            and self.runs[row["token"]].end is None
            and (row["request"], row["number"]) in self.ended_at
        ]

    def _terms(self, kind):
        terms = [one["at"] for one in self.happenings if one["what"] == "term"]
        found = []
        for one in self.known["faults"]:
            if one["kind"] == kind:
                end = float("inf") if "killed" in kind else one["healed"]
                found += [term - one["wall"] for term in terms if one["wall"] < term < end][:1]
        return found

    def faults(self):
        grants = sorted((one["at"], one["worker"]) for one in self.found.tables["moves"] if one["new"] == "running")
        ends = sorted(one["at"] for one in self.happenings if one["what"] == "ended")
        rows = []
        for kind in KINDS.values():
            again, recorded = [], []
            for one in self.known["faults"]:
                if one["kind"] == kind.name:
                    who = one["target"] if kind.scope == "worker" else None
                    again += _first_after(one["healed"], [at for at, worker in grants if who in {None, worker}])
                    recorded += _first_after(one["healed"], ends)
            missed = self.known["missed"][kind.name]
            if not missed and not self.by_kind[kind.name]:
                continue
            rows.append(
                (kind.name, self.by_kind[kind.name], missed, *_percentiles(again)[1::3], *_percentiles(recorded)[1::3])
            )
        head = ("kind", "times", "could not be done then", "grant p50", "grant max", "record p50", "record max")
        return (
            "Recovery, in seconds from the end of the fault: until the next grant (for a fault of one worker, to that"
            " worker) and until the next outcome is recorded. Other faults may still be there.\n\n" + _table(head, rows)
        )

    def ends(self):
        rows = [(name, number) for name, number in sorted(self.known["starts"].items())]
        return _table(("party", "starts"), rows)


def _first_after(moment, times):
    place = bisect_right(times, moment)
    return [times[place] - moment] if place < len(times) else []


def _percentiles(values):
    if not values:
        return ("-",) * 5
    if len(values) == 1:
        return (_seconds(values[0]),) * 5
    cuts = quantiles(values, n=100, method="inclusive")
    return tuple(_seconds(one) for one in (min(values), cuts[49], cuts[89], cuts[98], max(values)))


def _seconds(value):
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
