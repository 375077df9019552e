"""The judge: what was sent, receipted, granted, started, ended and recorded must fit, without a gap or a surplus.

Pure: it is told everything and opens nothing, so that it can be shown evidence that was doctored.
"""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

FINAL = frozenset({"success", "failure", "error", "aborted", "rejected"})
LEGAL = {
    None: {"pending", "rejected", "aborted"},
    "pending": {"offered", "aborted"},
    "offered": {"pending", "running", "aborted"},
    "running": {"pending", "success", "failure", "error", "aborted"},
}
MAY_END = {  # how a run is to go, and how its request may end; an abort may come in between
    "ok": {"success", "error"},
    "fail": {"failure", "error"},
    "raise": {"error"},
    "exit": {"error"},
    "again": {"success", "failure", "error"},
    "kill-slot": {"error"},
    "kill-agent": {"error"},
}
BEFORE_SPOOLED = 3.0  # seconds, on a busy machine, from the end of a run until its outcome is on disk
ROUNDING = 0.005  # seconds; the ledger's clock and the journal's are one, but are read with a millisecond's grain


class Violation(NamedTuple):
    promise: str
    text: str


@dataclass
class Run:
    """One start in the journal, with all that is known of its life."""

    request: str  # as the ledger has it; None: the ledger knows nothing of this run
    named: str  # as its data say: that of the first request, if it was retried
    token: str
    pid: int
    start_ns: int
    last_ns: int
    wall: float  # of its start
    alone: bool
    end: str | None = None  # how it ended, in its own words; None: it was killed

    @property
    def last_wall(self):
        return self.wall + (self.last_ns - self.start_ns) / 1e9


def check(evidence):
    """Return every violation."""
    return _Check(evidence).all()


def runs_of(evidence):
    """Return the runs that the journal tells of, by token; of a token that started twice, the first."""
    attempts = {one["token"]: one for one in evidence.tables["attempts"]}
    runs = {}
    for line in evidence.journal:
        token = line["token"]
        if line["what"] == "start":
            if token not in runs:
                known = attempts.get(token)
                runs[token] = Run(
                    request=None if known is None else known["request"],
                    named=line["request"],
                    token=token,
                    pid=line["pid"],
                    start_ns=line["ns"],
                    last_ns=line["ns"],
                    wall=line["wall"],
                    alone=line["alone"],
                )
        elif token in runs:
            runs[token].last_ns = max(runs[token].last_ns, line["ns"])
            if line["what"] == "end":
                runs[token].end = line["how"]
    for token, ns in evidence.beats.items():
        if token in runs:
            runs[token].last_ns = max(runs[token].last_ns, ns)
    return runs


def _most_attempts(row):
    return json.loads(row["body"]).get("max_attempts", 3)  # a default is not written


class _Check:
    def __init__(self, evidence):
        self.evidence = evidence
        self.requests = {row["id"]: row for row in evidence.tables["requests"]}
        self.attempts = defaultdict(list)
        for row in sorted(evidence.tables["attempts"], key=lambda row: row["number"]):
            self.attempts[row["request"]].append(row)
        self.runs = runs_of(evidence)
        self.by_request = defaultdict(list)
        for run in sorted(self.runs.values(), key=lambda run: run.start_ns):
            self.by_request[run.request].append(run)
        self.final_at = {}
        self.violations = []

    def all(self):
        self._moves()  # first: it finds the times that others need
        self._submissions()
        self._finals()
        self._starts()
        self._overlaps()
        self._attempts()
        self._artifacts()
        self._commands()
        self._late()
        self._outcomes()
        for promise, texts in (
            ("what a party should never do", self.evidence.misdeeds),
            ("nothing is left", self.evidence.left),
            ("artifacts are whole", self.evidence.spoilt),
        ):
            for text in texts:
                self._find(promise, text)
        return self.violations

    def _find(self, promise, text):
        self.violations.append(Violation(promise, text))

    # ------------------------------------------------------------ requests

    def _moves(self):
        moves = defaultdict(list)
        for move in self.evidence.tables["moves"]:
            moves[move["request"]].append(move)
        for request, row in self.requests.items():
            state = None
            for move in moves.pop(request, []):
                if move["old"] != state or move["new"] not in LEGAL.get(state, set()):
                    self._find("final is final", f"{request} went from {state} ({move['old']}) to {move['new']}")
                state = move["new"]
                if state in FINAL:
                    if request in self.final_at:
                        self._find("exactly one final state", f"{request} became {state} after it was final")
                    self.final_at[request] = move["at"]
            if state != row["state"]:
                self._find("exactly one final state", f"{request} is {row['state']}, its last move was to {state}")
        for request in moves:
            self._find("nothing is lost", f"{request} was in the ledger and is gone")

    def _submissions(self):
        receipts = defaultdict(list)
        for receipt in self.evidence.receipts:
            receipts[receipt["id"]].append(receipt["status"])
        for request, sent in self.evidence.sent.items():
            statuses = receipts[request]
            row = self.requests.get(request)
            if not statuses:
                self._find("a receipt comes", f"{request} was sent until the end and has no receipt")
                continue
            if statuses.count("accepted") > 1:
                self._find("one request for one id", f"{request} was accepted {statuses.count('accepted')} times")
            if "conflict" in statuses:
                self._find("one request for one id", f"{request} was sent as it was, and is told to be another")
            wrong = sent["data"].get("seconds", 0) < 0
            if wrong != ("rejected" in statuses):
                self._find("receipts are true", f"{request} has the receipts {statuses}, its data being {sent['data']}")
            if wrong:
                if row is not None and row["state"] != "rejected":
                    self._find("receipts are true", f"{request} was rejected and is {row['state']}")
            elif row is None:
                self._find("nothing is lost", f"{request} has the receipts {statuses} and is not in the ledger")
            elif row["state"] == "rejected":
                self._find("receipts are true", f"{request} has the receipts {statuses} and is rejected")
        for line in self.evidence.commands:
            if line["what"] == "retried" and line["new"] not in self.requests:
                self._find("nothing is lost", f"{line['new']} was to retry {line['old']} and is not in the ledger")
        for request in self.requests:
            if request not in self.evidence.sent and request not in self.evidence.retried:
                self._find("nothing unexpected", f"{request} is in the ledger, and nobody has sent it")

    def _finals(self):
        for request, row in self.requests.items():
            if row["state"] not in FINAL:
                self._find("each ends", f"{request} is {row['state']} after everything was healed: {row['reason']}")
                continue
            body = json.loads(row["body"])
            data = body["data"]
            timed_out = "timeout" in body and '"timeout"' in (row["reason"] or "")
            may = MAY_END[data["how"]] | ({"error"} if timed_out else set())
            if row["state"] not in {"aborted", "rejected", *may}:
                self._find("ends are true", f"{request} was to go {data['how']!r} and is {row['state']}")
            expired = "expires_at" in body and "expired" in (row["reason"] or "")
            if row["state"] == "aborted" and not expired and not self._abort_asked(request):
                self._find("ends are true", f"{request} is aborted, and nobody asked for it")
            if row["state"] in {"success", "failure"}:
                self._has_ended_so(request, row)
            if data["how"] == "ok" and row["state"] == "error" and not timed_out and row["tried"] < _most_attempts(row):
                self._find("ends are true", f"{request} is error after {row['tried']} tries: {row['reason']}")

    def _abort_asked(self, request):
        return any(line["what"] == "abort" and request in line["ids"] for line in self.evidence.commands)

    def _has_ended_so(self, request, row):
        """A verdict of the work is in the journal, in the words of that very run."""
        wanted = {"success": {"ok"}, "failure": {"fail", "again"}}[row["state"]]
        verdicts = [one for one in self.attempts[request] if one["result"] == row["state"]]
        last = verdicts[-1] if verdicts else None
        run = None if last is None else self.runs.get(last["token"])
        if run is None or run.end not in wanted:
            self._find("ends are true", f"{request} is {row['state']}, and the journal has {run}")
        if sum(one["result"] == "success" for one in self.attempts[request]) > 1:
            self._find("nothing is counted twice", f"{request} has more than one success")

    # ------------------------------------------------------------ runs

    def _starts(self):
        starts = Counter(line["token"] for line in self.evidence.journal if line["what"] == "start")
        granted = {row["token"]: row for rows in self.attempts.values() for row in rows}
        for token, number in starts.items():
            run = self.runs[token]
            if number > 1:
                self._find("no attempt runs twice", f"{run.named}: the run {token} started {number} times")
            if run.request is None:
                self._find("nothing unexpected runs", f"{run.named}: the run {token} was never granted")
                continue
            if run.named not in {run.request, self._first(run.request)}:
                self._find("nothing unexpected runs", f"{run.request} ran the work of {run.named}")
            if run.wall < granted[token]["granted"] - ROUNDING:
                self._find("nothing unexpected runs", f"{run.request}: the run {token} started before its grant")
            body = json.loads(self.requests[run.request]["body"]) if run.request in self.requests else {}
            if run.wall < body.get("not_before", 0) - ROUNDING:
                self._find("nothing unexpected runs", f"{run.request}: the run {token} started before it may")
            if granted[token]["granted"] > body.get("expires_at", granted[token]["granted"]) + ROUNDING:
                self._find("nothing unexpected runs", f"{run.request}: {token} was granted after it had expired")
            final = self.final_at.get(run.request)
            if final is not None and run.last_wall > final + ROUNDING:
                late = (run.last_wall - final) * 1000
                self._find("nothing runs after the end", f"{run.request}: {run} lived {late:.1f} ms after it was final")

    def _first(self, request):
        """Return the id in the data of a request: a retried one has those of the first."""
        while request in self.evidence.retried:
            request = self.evidence.retried[request]
        return request

    def _overlaps(self):
        shared = Counter(self._first(request) for request in self.by_request if request is not None)
        for request, runs in self.by_request.items():
            if request is None:
                continue
            for number, run in enumerate(runs[1:], start=1):
                earlier = runs[:number]
                longest = max(earlier, key=lambda one: one.last_ns)
                if longest.last_ns >= run.start_ns:
                    by = (longest.last_ns - run.start_ns) / 1e6
                    self._find("no two runs overlap", f"{request}: by {by:.1f} ms, {longest} and {run}")
                elif run.alone or shared[self._first(request)] > 1:
                    continue
                elif not any(self._is_corpse(one, run) for one in earlier):
                    self._find("no two runs overlap", f"{request}: one of {earlier} still held the lock as {run} began")
            if runs and not runs[0].alone and shared[self._first(request)] == 1:
                self._find("no two runs overlap", f"{request}: somebody unknown held the lock when {runs[0]} began")

    def _is_corpse(self, run, other):
        """Tell whether a run was frozen, and its agent too, when another began: it did nothing any more."""
        return any(run.pid in pids and begin - 1 <= other.wall <= end for pids, begin, end in self.evidence.frozen)

    # ------------------------------------------------------------ attempts

    def _attempts(self):
        for request, rows in self.attempts.items():
            row = self.requests.get(request)
            if row is None:
                self._find("nothing unexpected", f"{request} has attempts and is not in the ledger")
                continue
            numbers = [one["number"] for one in rows]
            if numbers != [*range(1, len(rows) + 1)]:
                self._find("attempts are counted", f"{request} has the attempts {numbers}")
            if any(one["result"] is None for one in rows):
                self._find("attempts are counted", f"{request} has an attempt that never ended")
            counted = sum(bool(one["counted"]) for one in rows)
            most = _most_attempts(row)
            if row["tried"] != counted or counted > most:
                self._find(
                    "attempts are counted", f"{request}: {counted} of {most} count, the ledger says {row['tried']}"
                )
        for line in self.evidence.tables["happenings"]:
            if line["what"] == "changed":
                self._find("nothing is counted twice", f"{line['request']}: attempt {line['attempt']} ended anew")
        for request, row in self.requests.items():
            if row["state"] == "rejected" and self.attempts[request]:
                self._find("nothing unexpected runs", f"{request} was rejected and granted")

    def _artifacts(self):
        made = Counter(
            (one["request"], one["attempt"])
            for one in self.evidence.tables["artifacts"]
            if one["category"] == "test:ashes"
        )
        results = {(one["request"], one["number"]): one["result"] for rows in self.attempts.values() for one in rows}
        for (request, attempt), number in made.items():
            wanted = json.loads(self.requests[request]["body"])["data"].get("artifacts", 0)
            if number > wanted:
                self._find(
                    "nothing is counted twice", f"{request}: attempt {attempt} made {number} of {wanted} artifacts"
                )
            if results.get((request, attempt)) in {None, "lost", "handed_back"}:
                self._find("artifacts come with the outcome", f"{request}: attempt {attempt} has some and no outcome")
        for (request, attempt), result in results.items():
            wanted = json.loads(self.requests[request]["body"])["data"].get("artifacts", 0)
            if result == "success" and made[request, attempt] != wanted:
                self._find(
                    "artifacts come with the outcome", f"{request}: {made[request, attempt]} of {wanted} artifacts"
                )

    def _late(self):
        """What a worker was told does not count is kept as history."""
        for one in self.evidence.uncounted:
            rows = [row for row in self.attempts[one["request"]] if row["number"] == int(one["attempt"])]
            if not rows or rows[0]["late"] is None:
                self._find("late outcomes are kept", f"{one['request']}, attempt {one['attempt']}: {one.get('reason')}")

    def _outcomes(self):
        """What a run did to its end is not lost, unless its worker was hurt before it can have been on disk."""
        for rows in self.attempts.values():
            for one in rows:
                run = self.runs.get(one["token"])
                if run is None or run.end is None or one["result"] != "lost" or one["late"] is not None:
                    continue
                begin, end = run.last_wall - BEFORE_SPOOLED, run.last_wall + BEFORE_SPOOLED
                hurt = any(
                    who in {None, one["worker"]} and since < end and begin < until
                    for who, since, until in self.evidence.hurt
                )
                if not hurt and "its lease of" not in (one["reason"] or ""):  # it ended with its lease
                    self._find(
                        "outcomes survive", f"{one['request']}: {run} came to its end and is lost: {one['reason']}"
                    )

    # ------------------------------------------------------------ commands

    def _commands(self):
        priorities = {}
        pauses = {}
        for line in self.evidence.commands:
            match line["what"]:
                case "aborted":
                    for request, state in line["states"].items():
                        self._stays(request, state, line["wall"])
                case "reprioritise":
                    for request in line["ids"]:
                        priorities.pop(request, None)
                case "reprioritised":
                    for request, (state, priority) in line["got"].items():
                        if state not in FINAL and priority == line["priority"]:
                            priorities[request] = priority
                case "paused":
                    pauses[line["kind"], line["name"]] = line["wall"]
                case "resume":
                    since = pauses.pop((line["kind"], line["name"]), None)
                    if since is not None:
                        self._none_granted(line["kind"], line["name"], since, line["wall"])
        for request, priority in priorities.items():
            if self.requests[request]["priority"] != priority:
                self._find("commands hold", f"{request} was given the priority {priority} and lost it")

    def _stays(self, request, state, wall):
        """What was told to be final stays so, and nothing of it runs."""
        if state not in FINAL:
            return
        if self.requests[request]["state"] != state:
            self._find("final is final", f"{request} was told to be {state} and is {self.requests[request]['state']}")
        for run in self.by_request[request]:
            if run.last_wall > wall:
                self._find("nothing runs after the end", f"{request} was told to be {state}, and {run} went on")

    def _none_granted(self, kind, name, begin, end):
        for request, rows in self.attempts.items():
            row = self.requests[request]
            for one in rows:
                who = {"worker": one["worker"], "task": row["task"], "group": row["grp"]}[kind]
                if who == name and begin < one["granted"] < end:
                    self._find("commands hold", f"{request} was granted while the {kind} {name} was paused: {one}")
