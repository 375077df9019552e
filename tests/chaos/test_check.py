"""A judge that cannot say no is worth nothing: each piece of evidence here was doctored in one place."""

import copy
import json
from argparse import Namespace
from collections import Counter

import pytest

from tests.chaos import report
from tests.chaos.check import check
from tests.chaos.evidence import Evidence, _read_harness

NS = 1_000_000_000
BOOT = 1_000_000.0  # wall-clock time at which CLOCK_BOOTTIME was 0


class Story:
    """Tell what happened, in order, as honest parties would have recorded it."""

    def __init__(self):
        self.evidence = Evidence(
            tables={name: [] for name in ("requests", "attempts", "artifacts", "files", "moves", "happenings")}
        )

    def submit(self, name, at, *, how="ok", state="pending", status="accepted", **facts):
        data = {"id": name, "how": how, **facts}
        request = {"id": name, "task": "burn", "data": data}
        self.evidence.sent[name] = request
        self.evidence.receipts.append({"id": name, "status": status, "wall": BOOT + at})
        self.row = {"id": name, "seq": 1, "task": "burn", "state": None, "attempt": 1, "tried": 0, "priority": 0}
        self.row |= {"grp": "default", "submitted": BOOT + at, "reason": None, "body": json.dumps(request)}
        self.evidence.tables["requests"].append(self.row)
        return self.move(at, state)

    def move(self, at, state):
        moves = self.evidence.tables["moves"]
        old, self.row["state"] = self.row["state"], state
        facts = {"request": self.row["id"], "old": old, "new": state, "worker": None}
        moves.append({"n": len(moves), "at": BOOT + at, **facts})
        return self

    def grant(self, at, token, worker="w0"):
        self.move(at, "offered").move(at, "running")
        number = 1 + sum(one["request"] == self.row["id"] for one in self.evidence.tables["attempts"])
        self.attempt = {"request": self.row["id"], "number": number, "worker": worker, "token": token, "late": None}
        self.attempt |= {"granted": BOOT + at, "result": None, "counted": True}
        self.evidence.tables["attempts"].append(self.attempt)
        return self

    def line(self, at, what, **facts):
        token = self.attempt["token"]
        line = {
            "what": what,
            "request": self.row["id"],
            "token": token,
            "pid": 7,
            "ns": int(at * NS),
            "wall": BOOT + at,
        }
        self.evidence.journal.append({**line, **facts})
        return self

    def run(self, begin, end, how="ok"):
        self.line(begin, "start", alone=True)
        return self.line(end, "end", how=how)

    def beat(self, at):
        self.evidence.beats[self.attempt["token"]] = int(at * NS)
        return self

    def record(self, at, result, state):
        self.attempt["result"] = result
        self.row["tried"] += self.attempt["counted"]
        self.evidence.tables["happenings"].append(
            {"what": "ended", "request": self.row["id"], "attempt": self.attempt["number"], "at": BOOT + at}
        )
        return self.move(at, state)

    def artifact(self):
        one = {"request": self.row["id"], "attempt": self.attempt["number"], "category": "test:ashes"}
        self.evidence.tables["artifacts"].append({"id": 1, "name": "ashes", **one})

    def command(self, at, what, **facts):
        self.evidence.commands.append({"what": what, "wall": BOOT + at, **facts})


def honest():
    story = Story()
    story.submit("plain", 1, artifacts=1).grant(2, "plain-1").run(2.1, 3).record(3.1, "success", "success").artifact()
    story.submit("lost", 1).grant(2, "lost-1").line(2.1, "start", alone=True).beat(5).record(8, "lost", "pending")
    story.grant(9, "lost-2", "w1").run(9.1, 10).record(10.1, "success", "success")
    story.command(3.9, "abort", ids=["stopped", "early"])
    story.command(6, "aborted", began=BOOT + 3.9, states={"stopped": "aborted", "early": "aborted"})
    story.submit("stopped", 3).grant(3.5, "stopped-1").run(3.6, 4, "aborted").record(4.1, "aborted", "aborted")
    story.submit("early", 3).move(4, "aborted")
    story.submit("wrong", 3, state="rejected", status="rejected", seconds=-1)
    story.submit("failed", 3, how="fail").grant(4, "failed-1").run(4.1, 4.2, "fail").record(4.3, "failure", "failure")
    story.command(5, "paused", kind="worker", name="w1")
    story.command(7, "resume", kind="worker", name="w1")
    return story.evidence


def row(evidence, name):
    return next(one for one in evidence.tables["requests"] if one["id"] == name)


def attempt(evidence, token):
    return next(one for one in evidence.tables["attempts"] if one["token"] == token)


def line(evidence, token, what="start"):
    return next(one for one in evidence.journal if one["token"] == token and one["what"] == what)


def again(evidence, name, state):
    old = row(evidence, name)["state"]
    row(evidence, name)["state"] = state
    evidence.tables["moves"].append({"n": 99, "at": BOOT + 90, "request": name, "old": old, "new": state})


def drop(evidence, name):
    for table, key in (("requests", "id"), ("moves", "request")):
        evidence.tables[table][:] = [one for one in evidence.tables[table] if one[key] != name]


def overlap_by_a_millisecond(evidence):
    evidence.beats["lost-1"] = int(9.101 * NS)


def child_outlives_its_run(evidence):
    evidence.journal.append({**line(evidence, "lost-1"), "what": "child-end", "ns": int(9.2 * NS)})


def forgotten_request(evidence):
    drop(evidence, "early")
    evidence.commands.clear()


def deleted_request(evidence):
    evidence.tables["requests"].remove(row(evidence, "early"))
    evidence.commands.clear()


def lock_still_held(evidence):
    line(evidence, "lost-2")["alone"] = False


def second_success(evidence):
    attempt(evidence, "lost-1")["result"] = "success"


def outcome_changed(evidence):
    evidence.tables["happenings"].append({"what": "changed", "request": "plain", "attempt": 1, "at": BOOT + 4})


def unknown_run(evidence):
    evidence.journal.append({**line(evidence, "plain-1"), "token": "nobody's"})


def second_start_of_a_run(evidence):
    evidence.journal.append({**line(evidence, "plain-1"), "ns": int(3.5 * NS)})


def run_of_an_aborted_request(evidence):
    line(evidence, "stopped-1", "end")["ns"] = int(4.2 * NS)


def run_after_a_confirmed_abort(evidence):
    line(evidence, "stopped-1", "end")["ns"] = int(6.1 * NS)


def success_without_an_end(evidence):
    evidence.journal.remove(line(evidence, "plain-1", "end"))


def success_of_what_should_fail(evidence):
    row(evidence, "failed")["state"] = evidence.tables["moves"][-1]["new"] = "success"


def aborted_success(evidence):
    row(evidence, "stopped")["state"] = "success"
    next(one for one in evidence.tables["moves"] if one["new"] == "aborted")["new"] = "success"


def paused_worker_granted(evidence):
    attempt(evidence, "lost-2")["granted"] = BOOT + 6
    next(one for one in evidence.commands if one["what"] == "resume")["wall"] = BOOT + 9.5


def priority_forgotten(evidence):
    evidence.commands.append({"what": "reprioritised", "priority": 10, "got": {"lost": ["pending", 10]}})


def late_outcome_forgotten(evidence):
    evidence.uncounted.append({"request": "lost", "attempt": "1", "worker": "w0", "reason": "the lease had lapsed"})


def lost_outcome(evidence):
    line = {**next(one for one in evidence.journal if one["token"].startswith("lost")), "what": "end", "how": "ok"}
    evidence.journal.append({**line, "ns": int(5.1 * NS)})
    attempt(evidence, "lost-1")["reason"] = "lost on w0: the worker was restarted and does not have this run any more"


DOCTORED = [
    (lost_outcome, "outcomes survive"),
    (forgotten_request, "nothing is lost"),
    (deleted_request, "nothing is lost"),
    (lambda e: e.receipts.clear(), "a receipt comes"),
    (lambda e: e.receipts.append({"id": "plain", "status": "accepted"}), "one request for one id"),
    (lambda e: e.receipts.append({"id": "plain", "status": "conflict"}), "one request for one id"),
    (lambda e: e.receipts.append({"id": "plain", "status": "rejected"}), "receipts are true"),
    (lambda e: e.sent.pop("plain"), "nothing unexpected"),
    (lambda e: again(e, "failed", "pending"), "each ends"),
    (lambda e: again(e, "plain", "error"), "exactly one final state"),
    (lambda e: row(e, "plain").update(state="error"), "exactly one final state"),
    (lambda e: again(e, "plain", "running"), "final is final"),
    (overlap_by_a_millisecond, "no two runs overlap"),
    (child_outlives_its_run, "no two runs overlap"),
    (lock_still_held, "no two runs overlap"),
    (second_start_of_a_run, "no attempt runs twice"),
    (unknown_run, "nothing unexpected runs"),
    (lambda e: line(e, "plain-1").update(wall=BOOT + 1.9), "nothing unexpected runs"),
    (lambda e: line(e, "plain-1").update(request="lost"), "nothing unexpected runs"),
    (run_of_an_aborted_request, "nothing runs after the end"),
    (run_after_a_confirmed_abort, "nothing runs after the end"),
    (second_success, "nothing is counted twice"),
    (outcome_changed, "nothing is counted twice"),
    (lambda e: e.tables["artifacts"].append(e.tables["artifacts"][0]), "nothing is counted twice"),
    (lambda e: e.tables["artifacts"].clear(), "artifacts come with the outcome"),
    (lambda e: e.tables["artifacts"][0].update(request="lost"), "artifacts come with the outcome"),
    (success_without_an_end, "ends are true"),
    (success_of_what_should_fail, "ends are true"),
    (aborted_success, "final is final"),
    (lambda e: e.commands.pop(0), "ends are true"),
    (lambda e: attempt(e, "lost-2").update(number=3), "attempts are counted"),
    (lambda e: attempt(e, "lost-1").update(result=None), "attempts are counted"),
    (lambda e: row(e, "lost").update(tried=1), "attempts are counted"),
    (lambda e: row(e, "lost").update(body=json.dumps({**e.sent["lost"], "max_attempts": 1})), "attempts are counted"),
    (paused_worker_granted, "commands hold"),
    (priority_forgotten, "commands hold"),
    (late_outcome_forgotten, "late outcomes are kept"),
    (lambda e: e.misdeeds.append("w0 ended by itself with exit code 1"), "what a party should never do"),
    (lambda e: e.left.append("the process 4711: sleep 1000"), "nothing is left"),
    (lambda e: e.spoilt.append("artifact 1: its bytes are not there"), "artifacts are whole"),
]


def test_honest_evidence_is_believed():
    assert check(honest()) == []


@pytest.mark.parametrize(("doctor", "promise"), DOCTORED)
def test_doctored_evidence_is_seen_through(doctor, promise):
    evidence = copy.deepcopy(honest())
    doctor(evidence)

    assert promise in {violation.promise for violation in check(evidence)}


def test_a_frozen_run_that_does_nothing_more_does_not_overlap_the_next_one():
    evidence = honest()
    lock_still_held(evidence)
    evidence.frozen.append(([7], BOOT + 4, BOOT + 12))

    assert check(evidence) == []


def test_a_frozen_run_may_hold_the_lock_as_later_ones_come_and_go():
    story = Story()
    story.submit("thrice", 1).grant(2, "one").line(2.1, "start", alone=True).beat(4).record(8, "lost", "pending")
    story.grant(9, "two", "w1").run(9.1, 9.4, "raise").record(9.5, "error", "pending")
    story.grant(10, "three", "w2").run(10.1, 11).record(11.1, "success", "success")
    for pid, name in enumerate(("one", "two", "three")):
        line(story.evidence, name).update(pid=pid, alone=pid == 0)
    overlaps = "no two runs overlap"

    story.evidence.frozen.append(([0], BOOT + 4, BOOT + 12))
    assert overlaps not in {violation.promise for violation in check(story.evidence)}
    story.evidence.frozen[0] = ([0], BOOT + 4, BOOT + 9)
    assert overlaps in {violation.promise for violation in check(story.evidence)}


def test_a_frozen_run_that_wakes_beside_the_next_one_does():
    evidence = honest()
    lock_still_held(evidence)
    evidence.frozen.append(([7], BOOT + 4, BOOT + 12))
    evidence.beats["lost-1"] = int(9.5 * NS)

    assert "no two runs overlap" in {violation.promise for violation in check(evidence)}


def test_a_run_that_has_shown_too_little_says_that_it_proves_nothing():
    given = Namespace(quick=False, minutes=60.0, only=[], ledger="sqlite")
    known = {"given": given, "faults": [], "left_out": [], "missed": Counter(), "starts": Counter(), "seed": 1}
    known |= {"broker": "3.10.8", "ledger": "SQLite", "memory": 1.0, "schedulers": 1}
    text, lacking = report.write(honest(), [], known, seconds=3600)

    assert "IT PROVES NOTHING" in text
    assert "6 requests, and not 10000" in lacking
    assert "0 faults, and not 200" in lacking
    assert "0 times agent killed, and not 10" in lacking
    assert "no refused outcomes" in lacking


def test_who_ends_by_itself_has_done_wrong_but_a_worker_that_finds_no_room_to_begin():
    def end(party, wall, code):
        return {"what": "ended", "party": party, "wall": wall, "exit": code, "by_us": None}

    full = {"kind": "spool's disk full", "number": 1, "target": "state", "scope": "pool"}
    ends = [end("w0", 11.0, 3), end("w0", 11.5, 1), end("active", 12.0, 3), end("w1", 30.0, 3), end("w1", 31.0, 4)]
    evidence = Evidence()
    _read_harness([{"what": "harm", "wall": 10.0, **full}, *ends, {"what": "heal", "wall": 15.0, **full}], evidence)

    assert evidence.misdeeds == [
        "w0 ended by itself with exit code 1",
        "active ended by itself with exit code 3",
        "w1 ended by itself with exit code 3",
    ]
