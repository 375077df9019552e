import functools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from contextlib import ExitStack, closing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError

import mqworker.ledger
from mqworker import migrations, schema
from mqworker.errors import IllegalMove, LedgerInvalid, LedgerLocked, LedgerUnavailable, SettingsError
from mqworker.facts import (
    AbortAsked,
    AbortResult,
    Accept,
    Accepted,
    End,
    Ended,
    Grant,
    Import,
    ImportRefused,
    LaneCount,
    LaneRow,
    Move,
    Moved,
    Need,
    Offer,
    Own,
    Pause,
    Rekey,
    RequirementRow,
    Resume,
    Return,
    Stranded,
    Wake,
    Wanted,
)
from mqworker.ledger import PAGE, Ledger
from mqworker.lifecycle import FINAL, MOVES, Event, State, meets
from mqworker.messages import (
    After,
    Artifact,
    CountRequests,
    FileEntry,
    ListArtifacts,
    ListRequests,
    PauseView,
    Reason,
    Relation,
    Request,
    Take,
    decode,
)

BAD_DATA = Reason(text="no such key", stage="configure")
BROKEN = Reason(text="the compiler said no", stage="build", exit_code=2, status="failed", line="E: no")


FIRST, OTHER = "t1", "t2"  # tokens of claims
ACCEPTED = Accepted(seq=1, status="accepted", state=State.PENDING)
FACTS = [table for table in schema.schema.sorted_tables if table.name not in {"leader", "renewals"}]


def an_id(number=1):
    return f"00000000-0000-4000-8000-{number:012x}"


def accept(number=1, *, seq=None, at=1.0, rejected=None, requirement=1, inputs=(), **fields):
    return Accept(
        seq=number if seq is None else seq,
        request=Request(id=an_id(number), **{"task": "noop"} | fields),
        at=at,
        rejected=rejected,
        requirement=None if rejected else requirement,
        inputs=inputs,
    )


def offer(number=1, attempt=1, seq=None):
    return Offer(request=an_id(number), attempt=attempt, seq=number if seq is None else seq)


def give_back(number=1, attempt=1):
    return Return(request=an_id(number), attempt=attempt)


def grant(number=1, attempt=1, token=FIRST, worker="w1", at=3.0):
    return Grant(request=an_id(number), attempt=attempt, token=token, worker=worker, at=at)


def end(number=1, attempt=1, token=FIRST, result="success", to=State.SUCCESS, **fields):
    defaults = {
        "worker": "w1",
        "reason": None,
        "started": 4.0,
        "ended": 5.0,
        "counted": True,
        "not_before": None,
        "artifacts": [],
        "at": 6.0,
    }
    return End(request=an_id(number), attempt=attempt, token=token, result=result, to=to, **defaults | fields)


def lost(number=1, attempt=1, token=FIRST):
    return end(number, attempt, token, "lost", State.PENDING, not_before=20.0, reason=Reason(text="lost"), started=None)


def abort(number=1):
    return AbortAsked(request=an_id(number), reason="not needed", at=7.0)


def wake(number=1):
    return Wake(request=an_id(number))


def to_priority(priority, number=1):
    return Move(request=an_id(number), priority=priority)


def after(*numbers, need="success"):
    return [After(request=an_id(number), need=need) for number in numbers]


def take(number, into, category="test:thing"):
    return Take(into=into, request=an_id(number), category=category)


def run(number, **ending):
    """Return the writes that take an accepted request through a run."""
    return [offer(number), grant(number), end(number, **ending)]


FAILS = {"result": "failure", "to": State.FAILURE, "reason": BROKEN}


def artifact(handle="a", *relations, category="test:thing", files=("x",)):
    return Artifact(
        handle=handle,
        category=category,
        name=f"the {handle}",
        data={"about": handle},
        files=[FileEntry(path=path, size=len(path), sha256="0" * 64) for path in files],
        relations=list(relations),
    )


BRINGING = {
    State.PENDING: [accept()],
    State.OFFERED: [accept(), offer()],
    State.RUNNING: [accept(), offer(), grant()],
    State.SUCCESS: [accept(), offer(), grant(), end()],
    State.FAILURE: [accept(), offer(), grant(), end(result="failure", to=State.FAILURE, reason=BROKEN)],
    State.ERROR: [accept(), offer(), grant(), end(result="error", to=State.ERROR, reason=BROKEN)],
    State.ABORTED: [accept(), abort()],
    State.REJECTED: [accept(rejected=BAD_DATA)],
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request):
    return request.param


@pytest.fixture
def url(engine, path, request):
    """An empty ledger, on each kind of database."""
    return f"sqlite:///{path}" if engine == "sqlite" else request.getfixturevalue("postgresql_url")


@pytest.fixture
def ledger(url):
    with closing(Ledger.open(url)) as ledger:
        yield ledger


@pytest.fixture
def empty_ledgers(engine, request):
    """Make two ledgers empty, as often as asked."""
    with ExitStack() as stack:
        urls = ["sqlite://", "sqlite://"]
        if engine == "postgresql":
            urls = [request.getfixturevalue("postgresql_databases")(number) for number in (0, 1)]
        opened = [stack.enter_context(closing(Ledger.open(url))) for url in urls]

        def empty():
            for ledger in opened:
                with ledger._database.transaction() as connection:
                    for table in reversed(FACTS):
                        connection.execute(table.delete())
                    if engine == "postgresql":
                        connection.exec_driver_sql("ALTER SEQUENCE artifacts_id_seq RESTART")
                    else:
                        connection.exec_driver_sql("DELETE FROM sqlite_sequence")
            return opened

        yield empty


def given_some(**strategies):
    """Give many examples to the quick database, and a few to the one that is asked over TCP."""

    def decorate(test):
        @pytest.mark.parametrize("engine", ["sqlite", "postgresql"])
        @functools.wraps(test, assigned=("__name__", "__doc__", "__module__"))
        def several(engine, empty_ledgers):
            @settings(max_examples=10 if engine == "postgresql" else 100, deadline=None)
            @given(**strategies)
            def each(**given_values):
                test(empty_ledgers, **given_values)

            each()

        del several.__wrapped__  # pytest would ask for its arguments
        return several

    return decorate


def facts(ledger):
    """All that the ledger holds, but for who writes it."""
    with ledger._database.snapshot() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(table.select().order_by(*table.primary_key))]
            for table in FACTS
        }


def alive(ledger):
    """All requests of one requirement class that have not ended, the oldest first."""
    found = {live.seq: live for live in (*ledger.held(), *ledger.members(1, 1_000_000))}
    return [found[seq] for seq in sorted(found)]


def waiting(ledger):
    """The numbers of requests that can be offered, the oldest first; each lane's count must agree."""
    lanes = ledger.lanes()
    heads = ledger.heads([Wanted(*lane[:4], after=0, limit=1_000_000) for lane in lanes])
    assert [lane.number for lane in lanes] == [len(found) for found in heads]
    return sorted(live.seq for found in heads for live in found)


def assert_consistent(ledger):
    """Check what the ledger keeps twice: what a request waits for, and how much."""
    with ledger._database.snapshot() as connection:
        wrong = connection.exec_driver_sql("""
            SELECT id, state, unmet, count(d.after) FROM requests LEFT JOIN dependencies AS d ON d.request = seq
            GROUP BY seq
            HAVING unmet != count(d.after) AND state = 'pending' OR state != 'pending' AND count(d.after) > 0
        """).all()
        ended = connection.exec_driver_sql("""
            SELECT d.after, state FROM dependencies AS d JOIN requests ON id = d.after
            WHERE state NOT IN ('pending', 'offered', 'running')
        """).all()
        assert (wrong, ended) == ([], [])


def only(ledger, number=1):
    [view], missing = ledger.view([an_id(number)])
    assert not missing
    return view


# ---------------------------------------------------------------- submissions


def test_an_accepted_request_is_pending_and_waits_for_its_first_attempt(ledger):
    [result] = ledger.commit([accept(data={"n": [1, None]}, priority=3, at=1.5)])

    assert result == ACCEPTED
    [live] = ledger.members(1, 10)
    assert live.request == Request(id=an_id(), task="noop", data={"n": [1, None]}, priority=3)
    assert (live.state, live.attempt, live.tried, live.submitted) == (State.PENDING, 1, 0, 1.5)
    assert (live.worker, live.token, live.abort, live.not_before) == (None, None, None, None)
    assert (live.requirement, live.inputs, live.unmet) == (1, (), 0)


def test_the_same_submission_again_is_known_and_changes_nothing(ledger):
    ledger.commit([accept(data={"a": 1, "b": 2})])
    before = facts(ledger)

    [result] = ledger.commit([accept(seq=2, data={"b": 2, "a": 1}, at=99.0, requirement=2, inputs=(1,))])

    assert result == Accepted(seq=1, status="known")
    assert facts(ledger) == before


@pytest.mark.parametrize("first", [True, False])
def test_a_default_that_is_written_out_is_the_same_content_as_one_that_is_left_out(ledger, first):
    """A client in another language may write all, and its next version nothing."""
    short = {"id": an_id(), "task": "noop", "after": [{"request": an_id(9)}]}
    full = {**short, "data": {}, "priority": 0, "group": "default", "max_attempts": 3, "lease": None, "take": []}
    full["after"] = [{"request": an_id(9), "need": "success"}]
    ledger.commit([accept(9, seq=1)])

    submissions = [decode(json.dumps(one).encode(), Request) for one in ((full, short) if first else (short, full))]
    results = [ledger.commit([Accept(seq=2, request=one, at=1.0, requirement=1)])[0] for one in submissions]

    assert [result.status for result in results] == ["accepted", "known"]


@pytest.mark.parametrize("other", [{"data": {"a": 2}}, {"task": "other"}, {"priority": 1}, {"lease": 60.0}])
def test_the_same_id_with_other_content_is_a_conflict_and_changes_nothing(ledger, other):
    ledger.commit([accept(data={"a": 1})])
    before = facts(ledger)

    [result] = ledger.commit([accept(seq=2, **{"data": {"a": 1}} | other)])

    assert (result.seq, result.status) == (1, "conflict")
    assert an_id() in result.reason
    assert facts(ledger) == before


def test_true_and_one_are_not_the_same_content(ledger):
    results = ledger.commit([accept(data={"a": 1}), accept(data={"a": True})])

    assert [result.status for result in results] == ["accepted", "conflict"]


def test_a_rejected_request_is_kept_with_its_reason_and_stays_rejected(ledger):
    [first] = ledger.commit([accept(rejected=BAD_DATA)])
    before = facts(ledger)
    [second] = ledger.commit([accept(seq=2)])

    assert first == second == Accepted(seq=1, status="rejected", reason="no such key", state=State.REJECTED)
    assert facts(ledger) == before
    assert (only(ledger).state, only(ledger).reason) == ("rejected", BAD_DATA)
    assert alive(ledger) == []


def test_one_id_twice_in_one_set_is_one_request(ledger):
    results = ledger.commit([accept(), accept(2), accept(seq=3), accept(2, seq=4, priority=1)])

    assert [(result.seq, result.status) for result in results] == [
        (1, "accepted"),
        (2, "accepted"),
        (1, "known"),
        (2, "conflict"),
    ]


def test_age_is_the_seq_that_was_given_and_the_newest_is_known(ledger):
    assert ledger.newest() == 0

    ledger.commit([abort(2), accept(2, seq=5), accept(1, seq=9), accept(3, seq=11, rejected=BAD_DATA)])

    assert [(live.seq, live.request.id) for live in alive(ledger)] == [(5, an_id(2)), (9, an_id(1))]
    assert ledger.newest() == 11


def test_a_request_without_a_requirement_class_can_only_be_rejected(ledger):
    with pytest.raises(IntegrityError):
        ledger.commit([accept(requirement=None)])

    assert ledger.newest() == 0


# ---------------------------------------------------------------- moves


def test_a_look_at_a_ledger_does_not_raise_its_term(url):
    Ledger.open(url).close()

    for _ in range(2):
        assert Ledger.check(url).startswith("the ledger ")

    with closing(Ledger.open(url)) as ledger:
        assert (ledger.term, ledger.upgraded_from) == (2, None)


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize(
    ("event", "write"),
    [
        (Event.OFFER, offer()),
        (Event.RETURN, give_back()),
        (Event.GRANT, grant(token=OTHER)),
        (Event.SUCCEED, end(token=FIRST)),
    ],
)
def test_a_move_happens_where_the_table_has_it_and_changes_nothing_elsewhere(ledger, state, event, write):
    ledger.commit(BRINGING[state])
    before = facts(ledger)

    [result] = ledger.commit([write])

    if (state, event) in MOVES:
        assert result in (True, "granted") or result.state is State.SUCCESS
        assert only(ledger).state == MOVES[state, event]
    else:
        assert result in (False, "void") or result.state is None
        assert facts(ledger) == before


@pytest.mark.parametrize("state", State)
def test_an_abort_ends_what_does_not_run_and_marks_what_does(ledger, state):
    ledger.commit(BRINGING[state])
    before = facts(ledger)

    [result] = ledger.commit([abort()])

    view = only(ledger)
    assert (result.task, result.attempt, result.freed, result.stranded) == ("noop", 1, (), ())
    assert result.before_lane == (LaneRow(1, 0, "default", None, 1, True) if state is State.PENDING else None)
    if state in FINAL:
        assert (result.before, result.after) == (state, state)
        assert facts(ledger) == before
    elif state is State.RUNNING:
        assert (result.before, result.after) == (state, state)
        assert (view.state, view.abort, view.reason) == ("running", "not needed", None)
    else:
        assert (result.before, result.after) == (state, State.ABORTED)
        assert (view.state, view.ended, view.reason) == ("aborted", 7.0, Reason(text="not needed"))


def test_an_abort_of_an_unknown_request_says_so(ledger):
    assert ledger.commit([abort()]) == [AbortResult(before=None, after=None)]


def mark(number, user, reason="not needed", at=7.0):
    return AbortAsked(request=an_id(number), reason=reason, at=at, mark=True, user=user)


def test_each_user_has_a_mark_of_its_own_and_the_first_of_those_that_count_does(ledger):
    marks = [mark(1, "mallory"), mark(1, "anna", "hers"), mark(1, "anna", "again"), mark(1, None, at=1.0)]
    assert all(result.marked for result in ledger.commit([*marks, mark(1, "chief", "his", at=9.0), mark(2, "mallory")]))

    heeds = frozenset({"anna", "chief"})
    ledger.commit([replace(accept(1), heeds=heeds), replace(accept(2), heeds=heeds)])

    assert (only(ledger, 1).state, only(ledger, 1).reason.text) == ("aborted", "hers")
    assert only(ledger, 2).state == "pending"
    with ledger._database.transaction() as connection:
        assert connection.execute(schema.abort_marks.select()).all() == []


def test_a_user_has_so_many_marks_and_takes_nobody_elses_place(ledger, monkeypatch):
    monkeypatch.setattr("mqworker.ledger.MOST_MARKS", 2)
    full = AbortResult(before=None, after=None, full=True)

    first = ledger.commit([mark(number, "mallory") for number in range(1, 4)])
    assert [one.marked for one in first] == [True, True, False]
    assert ledger.commit([mark(3, "mallory"), mark(2, "mallory"), mark(3, "anna"), mark(4, None)]) == [
        full,
        *[AbortResult(before=None, after=None, marked=True)] * 3,
    ]
    ledger.commit([accept(1)])
    assert ledger.commit([mark(4, "mallory")])[0].marked, "there is room again"


def test_the_first_reason_of_an_abort_stays(ledger):
    ledger.commit(BRINGING[State.RUNNING])
    ledger.commit([abort()])

    ledger.commit([AbortAsked(request=an_id(), reason="another", at=8.0)])

    assert only(ledger).abort == "not needed"


@pytest.mark.parametrize(
    ("state", "write", "again"),
    [
        (State.PENDING, offer(), False),
        (State.OFFERED, give_back(), False),
        (State.OFFERED, grant(), "again"),
        (State.RUNNING, end(), Ended(status="recorded")),
        (State.RUNNING, end(artifacts=[artifact()]), Ended(status="recorded", artifacts={"a": 1})),
        (State.RUNNING, lost(), Ended(status="recorded")),
        (State.RUNNING, abort(), AbortResult(before=State.RUNNING, after=State.RUNNING, task="noop", attempt=1)),
        (State.PENDING, abort(), AbortResult(before=State.ABORTED, after=State.ABORTED, task="noop", attempt=1)),
        (State.PENDING, Pause(kind="task", name="noop", reason="", at=2.0), False),
        (State.PENDING, Resume(kind="task", name="noop"), False),
        (State.PENDING, Need(id=1, task="noop", fingerprint="f", reads="[]", data="{}", requires=None), False),
        (State.PENDING, Import(key="k", artifact=artifact(), at=1.0), 1),
    ],
)
def test_a_write_that_is_done_twice_changes_nothing_the_second_time(ledger, state, write, again):
    ledger.commit(BRINGING[state])
    ledger.commit([write])
    before = facts(ledger)

    assert ledger.commit([write]) == [again]

    assert facts(ledger) == before


@pytest.mark.parametrize(
    ("state", "write", "answer"),
    [
        (State.PENDING, offer(attempt=2), False),
        (State.PENDING, offer(seq=2), False),
        (State.PENDING, wake(), False),
        (State.SUCCESS, to_priority(1), Moved(live=None, before=None)),
        (State.PENDING, to_priority(1, number=9), Moved(live=None, before=None)),
        (State.SUCCESS, Rekey(to={1: 2, 9: 2}), 0),
        (State.OFFERED, give_back(attempt=2), False),
        (State.OFFERED, grant(attempt=2), "void"),
        (State.RUNNING, grant(token=OTHER), "void"),
        (State.RUNNING, grant(attempt=2), "void"),
        (State.PENDING, offer(number=9), False),
        (State.PENDING, grant(number=9), "void"),
    ],
)
def test_a_stale_attempt_or_token_moves_nothing(ledger, state, write, answer):
    ledger.commit(BRINGING[state])
    before = facts(ledger)

    assert ledger.commit([write]) == [answer]

    assert facts(ledger) == before


@pytest.mark.parametrize("write", [end(token=OTHER), end(attempt=2), end(number=9)])
def test_the_outcome_of_a_run_that_was_never_granted_is_unknown(ledger, write):
    ledger.commit(BRINGING[State.RUNNING])
    before = facts(ledger)

    [result] = ledger.commit([write])

    assert (result.status, result.state) == ("unknown", None)
    assert write.request in result.reason
    assert facts(ledger) == before


def test_a_granted_request_shows_its_holder_and_its_attempt(ledger):
    ledger.commit(BRINGING[State.RUNNING])

    [live] = ledger.held()
    assert (live.state, live.attempt, live.worker, live.token) == (State.RUNNING, 1, "w1", "t1")
    [attempt] = only(ledger).attempts
    assert (attempt.number, attempt.worker, attempt.granted, attempt.result) == (1, "w1", 3.0, None)


def test_the_end_of_a_run_ends_its_request_with_its_reason(ledger):
    ledger.commit(BRINGING[State.FAILURE])

    view = only(ledger)
    assert (view.state, view.ended, view.reason, view.worker) == ("failure", 6.0, BROKEN, "w1")
    [attempt] = view.attempts
    assert (attempt.started, attempt.ended, attempt.result, attempt.counted) == (4.0, 5.0, "failure", True)
    assert attempt.reason == BROKEN


def test_a_lost_run_gives_its_request_a_new_attempt(ledger):
    ledger.commit([*BRINGING[State.RUNNING], lost()])

    [live] = ledger.held()
    assert (live.state, live.attempt, live.tried) == (State.PENDING, 2, 1)
    assert (live.worker, live.token, live.not_before) == (None, None, 20.0)
    assert only(ledger).granted is None
    assert ledger.commit([offer(attempt=2), wake(), offer(), offer(attempt=2), grant(attempt=2, token=OTHER)]) == [
        False,
        True,
        False,
        True,
        "granted",
    ]
    assert [attempt.result for attempt in only(ledger).attempts] == ["lost", None]


def test_a_run_that_was_handed_back_does_not_count(ledger):
    ledger.commit([*BRINGING[State.RUNNING], end(result="handed_back", to=State.PENDING, counted=False)])

    [live] = ledger.members(1, 10)
    assert (live.state, live.attempt, live.tried) == (State.PENDING, 2, 0)
    assert only(ledger).attempts[0].counted is False


def test_an_outcome_that_comes_after_its_attempt_was_lost_is_kept_as_history_only(ledger):
    ledger.commit([*BRINGING[State.RUNNING], lost()])
    before = only(ledger)

    results = [ledger.commit([end(artifacts=[artifact()])])[0] for _ in range(2)]

    assert [(result.status, result.artifacts, result.state) for result in results] == [("refused", {}, None)] * 2
    assert "lapsed" in results[0].reason
    assert only(ledger) == before
    with ledger._database.snapshot() as connection:
        [(late,)] = connection.exec_driver_sql("SELECT late FROM attempts")
    assert '"result":"success"' in late
    assert '"handle":"a"' in late


def test_a_set_that_ends_a_run_in_a_state_no_run_ends_in_is_not_written_at_all(ledger):
    ledger.commit(BRINGING[State.RUNNING])
    before = facts(ledger)

    with pytest.raises(IllegalMove, match="offered"):
        ledger.commit([accept(2), end(to=State.OFFERED)])

    assert facts(ledger) == before
    assert ledger.commit([end()])[0].status == "recorded"


def test_one_set_can_take_a_request_through_its_whole_life(ledger):
    results = ledger.commit([accept(), offer(), give_back(), offer(), grant(), end()])

    assert results[:5] == [ACCEPTED, True, True, True, "granted"]
    assert results[5] == Ended(status="recorded", state=State.SUCCESS)


def test_one_stale_write_among_many_fails_alone(ledger):
    numbers = range(1, 31)
    ledger.commit([accept(number) for number in numbers])
    ledger.commit([abort(7)])

    offered = ledger.commit([offer(number) for number in numbers])
    ledger.commit([abort(8)])
    granted = ledger.commit([grant(number) for number in numbers])
    ended = ledger.commit([end(number, token=OTHER if number == 9 else FIRST) for number in numbers])

    assert [number for number, result in zip(numbers, offered, strict=True) if not result] == [7]
    assert [number for number, result in zip(numbers, granted, strict=True) if result != "granted"] == [7, 8]
    assert [number for number, result in zip(numbers, ended, strict=True) if result.status != "recorded"] == [7, 8, 9]
    assert ledger.counts() == {"aborted": 2, "running": 1, "success": 27}


def lives(number):
    """What can become of a request, each as the writes that a scheduler would do, and some that come out of place."""
    contradiction = [artifact("a", Relation(type="extends", target="nobody"))]
    chain = [artifact("b", Relation(type="extends", target="a")), artifact("a", category="test:log")]
    started = [accept(number), offer(number), grant(number)]
    again = [offer(number, 2), grant(number, 2, OTHER)]
    return [
        [*started, end(number, artifacts=chain)],
        [*started, end(number, artifacts=contradiction)],
        [*started, lost(number), end(number), *again, wake(number), *again, end(number, 2, OTHER)],
        [*started, abort(number), end(number, to=State.ABORTED, result="aborted")],
        [accept(number), offer(number), abort(number), grant(number), give_back(number)],
        [abort(number), accept(number), offer(number), give_back(number), offer(number), grant(number)],
        [accept(number, rejected=BAD_DATA), accept(number), offer(number)],
        [accept(number), accept(number, priority=1), grant(number), end(number), end(number, token=OTHER)],
    ]


def dependent_lives(number, others):
    """What can become of a request that comes after others."""
    takes = [take(other, f"/from/{other}") for other in others]
    return [
        [accept(number, after=after(*others)), *run(number)],
        [accept(number, after=after(*others, need="end")), *run(number, **FAILS), *run(number)],
        [accept(number, take=takes), to_priority(3, number), *run(number, artifacts=[artifact()])],
        [accept(number, after=after(*others)), abort(number), offer(number)],
        [accept(number, after=after(*others)), Rekey(to={number: 2}), offer(number), wake(number)],
    ]


@st.composite
def several_lives(draw):
    """Five lives at once, some writes twice, cut into sets."""
    rest = [draw(st.sampled_from(lives(number))) for number in (1, 2, 3)]
    for number in (4, 5, 6):
        others = draw(st.lists(st.integers(1, number - 1), min_size=1, max_size=2, unique=True))
        rest.append(draw(st.sampled_from(dependent_lives(number, others))))
    chosen = draw(st.randoms(use_true_random=False))
    writes = []
    while any(rest):
        life = chosen.choice([life for life in rest if life])
        writes += [life[0]] * chosen.choice([1, 1, 1, 2])
        life.pop(0)
    sets = []
    while writes:
        size = chosen.randint(1, len(writes))
        sets.append(writes[:size])
        writes = writes[size:]
    return sets


@given_some(sets=several_lives())
def test_a_set_of_writes_does_what_its_writes_do_one_by_one(empty_ledgers, sets):
    together, single = empty_ledgers()
    for writes in sets:
        assert together.commit(writes) == [single.commit([write])[0] for write in writes]
        assert facts(together) == facts(single)
        assert_consistent(together)


# ---------------------------------------------------------------- artifacts


def test_artifacts_are_recorded_with_their_outcome_and_its_relations(ledger):
    [source] = ledger.commit([Import(key="k", artifact=artifact("source", files=("a", "b/c")), at=1.0)])
    ledger.commit(BRINGING[State.RUNNING])

    [ended] = ledger.commit(
        [
            end(
                artifacts=[
                    artifact("log", Relation(type="relates-to", target="binary")),
                    artifact("binary", Relation(type="built-using", target=source)),
                ]
            )
        ]
    )

    log, binary = ended.artifacts["log"], ended.artifacts["binary"]
    found = ledger.artifacts_by_id([log, binary, source, 999])
    assert found.keys() == {log, binary, source}
    assert [(relation.type, relation.target) for relation in found[log].relations] == [("relates-to", binary)]
    assert [(relation.type, relation.target) for relation in found[binary].relations] == [("built-using", source)]
    assert (found[log].request, found[log].created, found[log].data) == (an_id(), 6.0, {"about": "log"})
    assert (found[source].request, [file.path for file in found[source].files]) == (None, ["a", "b/c"])
    assert [made.id for made in only(ledger).artifacts] == [log, binary]


@pytest.mark.parametrize(
    ("artifacts", "named", "kept"),
    [
        ([artifact("a", Relation(type="extends", target="nobody"))], "nobody", {"a": 1}),
        ([artifact("a", Relation(type="extends", target=99))], "99", {"a": 1}),
        ([artifact("a"), artifact("a")], "'a'", {"a": 1}),
    ],
)
def test_an_outcome_that_contradicts_itself_ends_in_error_and_holds_up_nobody(ledger, artifacts, named, kept):
    ledger.commit([write for number in (1, 2) for write in (accept(number), offer(number), grant(number))])

    bad, good = ledger.commit([end(artifacts=artifacts), end(2)])

    assert (bad.status, bad.state, bad.artifacts) == ("recorded", State.ERROR, kept)
    assert named in bad.reason
    assert good == Ended(status="recorded", state=State.SUCCESS)
    view = only(ledger)
    assert (view.state, view.reason.text) == ("error", bad.reason)
    assert all(made.relations == [] for made in view.artifacts)


def test_an_import_with_a_relation_to_nothing_is_refused_alone(ledger):
    bad, good = ledger.commit(
        [
            Import(key="k1", artifact=artifact("a", Relation(type="extends", target=99)), at=1.0),
            Import(key="k2", artifact=artifact("a"), at=1.0),
        ]
    )

    assert isinstance(bad, ImportRefused)
    assert "99" in bad.reason
    assert good == 1
    assert [made.id for made in ledger.artifacts(ListArtifacts())] == [1]


def test_artifacts_are_found_by_request_by_category_and_by_id(ledger):
    ledger.commit([*BRINGING[State.RUNNING], end(artifacts=[artifact("a"), artifact("b", category="test:log")])])
    ledger.commit([Import(key="k", artifact=artifact("c"), at=1.0)])

    def ids(**query):
        return [made.id for made in ledger.artifacts(ListArtifacts(**query))]

    assert ids() == [3, 2, 1]
    assert ids(limit=2) == [3, 2]
    assert ids(request=an_id()) == [2, 1]
    assert ids(category="test:thing") == [3, 1]
    assert ids(ids=[1, 3, 77]) == [3, 1]
    assert ids(ids=[1, 2, 3], category="test:log", request=an_id()) == [2]
    assert ids(ids=[*range(1, 300_001)], limit=1) == [3]  # more than SQLite takes in one statement


# ---------------------------------------------------------------- reading


def test_a_request_is_found_by_a_unique_beginning_of_its_id(ledger):
    ids = [f"{start}-0000-4000-8000-000000000000" for start in ("abcd1111", "abcd2222", "ffff0000")]
    ledger.commit(
        [Accept(seq=seq, request=Request(id=id_, task="noop"), at=1.0, requirement=1) for seq, id_ in enumerate(ids)]
    )

    views, missing = ledger.view(["abcd2", "fff", "ffff", "abcd", "dead", ids[0], ids[2], ""])

    assert [view.request.id for view in views] == [ids[1], ids[2], ids[0]]
    assert missing == ["fff", "abcd", "dead", ""]


def test_the_newest_requests_that_match_are_listed(ledger):
    ledger.commit([accept(1), accept(2, task="sbuild"), accept(3), accept(4, rejected=BAD_DATA)])
    ledger.commit([offer(3), grant(3, worker="w3")])

    def seqs(**query):
        return [view.seq for view in ledger.list(ListRequests(**query))]

    assert seqs() == [4, 3, 2, 1]
    assert seqs(limit=2) == [4, 3]
    assert seqs(limit=2, before=3) == [2, 1]
    assert seqs(states=["pending", "rejected"]) == [4, 2, 1]
    assert seqs(task="sbuild") == [2]
    assert seqs(worker="w3", states=["running"], task="noop") == [3]
    assert ledger.counts() == {"pending": 2, "rejected": 1, "running": 1}


def test_requests_are_listed_and_counted_by_every_selection(ledger):
    ledger.commit(
        [
            accept(1, at=10.0, group="ann"),
            accept(2, at=20.0, group="bob", task="sbuild"),
            accept(3, at=30.0, group="ann", task="sbuild"),
            accept(4, at=40.0, group="ann", rejected=BAD_DATA),
            accept(5, at=50.0, group="ann", task="sbuild"),
            *run(3, **FAILS),
            offer(5),
            grant(5, worker="w5"),
        ]
    )

    def seqs(**query):
        found = [view.seq for view in ledger.list(ListRequests(**query))]
        assert ledger.count(CountRequests(**query)) == len(found)
        assert ledger.list(ListRequests(limit=1, **query)) == ledger.list(ListRequests(**query))[:1]
        below = [view.seq for view in ledger.list(ListRequests(before=4, **query))]
        assert below == [seq for seq in found if seq < 4]
        return found

    assert seqs() == [5, 4, 3, 2, 1]
    assert seqs(group="ann") == [5, 4, 3, 1]
    assert seqs(group="ann", task="sbuild") == [5, 3]
    assert seqs(submitted_before=30.0) == [2, 1]
    assert seqs(states=["pending", "running", "pending"]) == [5, 2, 1]
    assert seqs(states=["failure", "running", "pending"], group="ann", task="sbuild", submitted_before=50.0) == [3]
    assert seqs(worker="w1") == [3]
    assert seqs(worker="w5", states=["running", "success"], group="ann", submitted_before=60.0) == [5]
    assert seqs(worker="w5", states=["failure"]) == []
    assert seqs(group="nobody") == []


# ---------------------------------------------------------------- lanes


def test_requests_wait_in_lanes_and_leave_them_when_they_do_not_wait(ledger):
    ledger.commit(
        [
            *(accept(number) for number in (1, 2, 3)),
            *(accept(number, requirement=2, priority=7, group="ann", concurrency_key="k") for number in (4, 5)),
            accept(6, requirement=2, priority=7, group="ann"),
            accept(7, after=after(1)),
            accept(8, rejected=BAD_DATA),
        ]
    )
    assert {*ledger.lanes()} == {
        LaneCount(1, 0, "default", None, 3),
        LaneCount(2, 7, "ann", None, 1),
        LaneCount(2, 7, "ann", "k", 2),
    }

    ledger.commit([offer(1), offer(2), grant(2), lost(2), abort(4), to_priority(-1, 6)])

    assert {*ledger.lanes()} == {
        LaneCount(1, 0, "default", None, 1),
        LaneCount(2, -1, "ann", None, 1),
        LaneCount(2, 7, "ann", "k", 1),
    }
    assert [(live.seq, live.state) for live in ledger.held()] == [(1, State.OFFERED), (2, State.PENDING)]

    ledger.commit([give_back(1), wake(2)])

    assert waiting(ledger) == [1, 2, 3, 5, 6]
    assert ledger.held() == []


def test_the_heads_of_a_lane_are_its_oldest_behind_what_is_known(ledger):
    ledger.commit([accept(number, concurrency_key="k" if number % 2 else None) for number in range(1, 9)])

    heads = ledger.heads(
        [
            Wanted(1, 0, "default", None, after=0, limit=2),
            Wanted(1, 0, "default", None, after=4, limit=9),
            Wanted(1, 0, "default", "k", after=0, limit=2),
            Wanted(1, 0, "default", "other", after=0, limit=2),
            Wanted(2, 0, "default", None, after=0, limit=2),
        ]
    )

    assert [[live.seq for live in found] for found in heads] == [[2, 4], [6, 8], [1, 3], [], []]
    assert heads[2][0].request == Request(id=an_id(1), task="noop", concurrency_key="k")


def test_the_members_of_a_requirement_class_come_best_first_whatever_they_wait_for(ledger):
    ledger.commit([*(accept(number) for number in range(1, 6)), accept(6, requirement=2)])
    ledger.commit([offer(2), grant(2), lost(2), offer(3), accept(7, after=after(3)), to_priority(1, 7)])

    assert [live.seq for live in ledger.members(1, 10)] == [7, 1, 2, 4, 5]
    assert [live.seq for live in ledger.members(1, 2)] == [7, 1]


@pytest.mark.parametrize("state", [State.PENDING, State.OFFERED, State.RUNNING])
def test_a_moved_request_shows_its_present_priority_everywhere_and_is_still_the_same_submission(ledger, state):
    ledger.commit(BRINGING[state])

    [moved] = ledger.commit([to_priority(9)])

    assert (moved.before, moved.live.request.priority, moved.live.state) == (0, 9, state)
    assert only(ledger).request.priority == 9
    assert ledger.list(ListRequests())[0].request.priority == 9
    assert [live.request.priority for live in alive(ledger)] == [9]
    assert ledger.commit([accept()]) == [Accepted(seq=1, status="known")]
    assert ledger.commit([accept(priority=9)])[0].status == "conflict"


def test_only_a_delayed_request_is_woken(ledger):
    ledger.commit([accept(1), accept(2), offer(2), grant(2), lost(2), accept(3), *run(3)])

    assert ledger.commit([wake(1), wake(2), wake(3), wake(4)]) == [False, True, False, False]
    assert waiting(ledger) == [1, 2]


@pytest.mark.parametrize(
    ("read", "index"),
    [
        ("_held", "requests_held"),
        ("_lanes", "requests_lanes"),
        ("_heads", "requests_lanes (requirement=? AND priority=? AND grp=? AND ckey>? AND ckey<?)"),
        ("_heads_without_key", "requests_lanes (requirement=? AND priority=? AND grp=? AND ckey=? AND seq>?)"),
        ("_members", "requests_members (requirement=?)"),
    ],
)
def test_what_a_scheduler_reads_is_found_by_an_index_and_not_sorted(path, read, index):
    with closing(Ledger.open(f"sqlite:///{path}")) as ledger, ledger._database.snapshot() as connection:
        compiled = getattr(mqworker.ledger, read).compile(dialect=connection.dialect)
        [plan] = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}", (1,) * len(compiled.positiontup)).all()

    assert plan[-1].endswith(index)


@pytest.mark.parametrize(
    ("read", "values", "index"),
    [
        (
            "_heads",
            {"requirement": 1, "priority": 0, "group": "default", "key": "k", "after": 0, "limit": 9},
            "requests_lanes",
        ),
        (
            "_heads_without_key",
            {"requirement": 1, "priority": 0, "group": "default", "after": 0, "limit": 9},
            "requests_lanes",
        ),
        ("_members", {"requirement": 1, "limit": 9}, "requests_members"),
    ],
)
def test_postgresql_finds_what_a_scheduler_reads_by_an_index_whatever_it_knows_of_the_table(
    postgresql_url, read, values, index
):
    with closing(Ledger.open(postgresql_url)) as ledger:
        ledger.commit([accept(number, concurrency_key=[None, "k"][number % 2]) for number in range(1, 900)])
        ledger.commit([abort(number) for number in range(1, 600)])
        for analysed in (False, True):
            with ledger._database._writing.begin() as connection:
                if analysed:
                    connection.exec_driver_sql("ANALYZE requests")
                statement = getattr(mqworker.ledger, read)
                compiled = statement.compile(dialect=connection.dialect, compile_kwargs={"render_postcompile": True})
                plan = connection.exec_driver_sql(f"EXPLAIN {compiled}", compiled.params | values).scalars().all()
            text = "\n".join(plan)
            assert f"using {index} on requests" in text, text
            assert "Sort" not in text, text


# ---------------------------------------------------------------- requirement classes and pauses


def need(number, task="noop", requires=None):
    return Need(id=number, task=task, fingerprint=f"f{number}", reads='["x"]', data='{"x":1}', requires=requires)


def test_requirement_classes_are_kept_while_requests_of_theirs_live(url):
    with closing(Ledger.open(url)) as ledger:
        assert ledger.newest_requirement() == 0
        results = ledger.commit([accept(1, requirement=2), need(1), need(2, requires="{}"), need(1)])
        assert results[1:] == [True, True, False]
        ledger.commit([need(3), accept(3, requirement=3), offer(3), need(4), accept(4, requirement=4), *run(4)])
        ledger.commit([need(5)])
        expected = [
            RequirementRow(2, "noop", "f2", '["x"]', '{"x":1}', "{}"),
            RequirementRow(3, "noop", "f3", '["x"]', '{"x":1}', None),
        ]
        assert ledger.requirements() == expected

    with closing(Ledger.open(url)) as ledger:
        assert ledger.requirements() == expected
        assert ledger.newest_requirement() == 5  # is not given again, though nobody has it
        assert ledger.commit([need(4), need(3), need(5)]) == [True, False, False]


def test_live_requests_are_put_into_other_requirement_classes(ledger):
    ledger.commit([*(accept(number) for number in range(1, 6)), accept(6, after=after(5)), offer(2), *run(3)])

    results = ledger.commit([Rekey(to={1: 7, 2: 7, 3: 7, 6: 8, 99: 7}), Rekey(to={1: 9}), Rekey(to={})])

    assert results == [3, 1, 0]
    assert [only(ledger, number).requirement for number in range(1, 7)] == [9, 7, 1, 1, 1, 8]
    assert [(lane.requirement, lane.number) for lane in sorted(ledger.lanes())] == [(1, 2), (9, 1)]


def test_rekeying_happens_between_what_was_written_before_and_after_it(ledger):
    results = ledger.commit([need(1), accept(1), Rekey(to={1: 2, 2: 2}), accept(2), Rekey(to={2: 3}), abort(2)])

    assert (results[2], results[4]) == (1, 1)
    assert [only(ledger, number).requirement for number in (1, 2)] == [2, 3]


def test_pauses_are_kept_until_they_are_resumed(url):
    first = Pause(kind="task", name="noop", reason="broken", at=1.0)
    with closing(Ledger.open(url)) as ledger:
        results = ledger.commit(
            [
                first,
                Pause(kind="group", name="noop", reason="", at=2.0),
                Pause(kind="task", name="noop", reason="still broken", at=3.0),
                Pause(kind="worker", name="w1", reason="hot", at=4.0),
                Resume(kind="worker", name="w1"),
                Resume(kind="worker", name="w2"),
            ]
        )
        assert results == [True, True, False, True, True, False]

    with closing(Ledger.open(url)) as ledger:
        assert ledger.pauses() == [
            PauseView(kind="group", name="noop", reason="", since=2.0),
            PauseView(kind="task", name="noop", reason="still broken", since=1.0),
        ]
        assert ledger.commit([Resume(kind="task", name="noop"), first]) == [True, True]


# ---------------------------------------------------------------- what comes after others

ENDING = {
    State.SUCCESS: run(1),
    State.FAILURE: run(1, **FAILS),
    State.ERROR: run(1, result="error", to=State.ERROR, reason=BROKEN),
    State.ABORTED: [abort(1)],
}
UNMET = {
    State.FAILURE: "ended in failure",
    State.ERROR: "ended in error",
    State.ABORTED: "was aborted",
    State.REJECTED: "was rejected",
}


def freed_and_stranded(results):
    """The seqs that the results of a commit tell to be free, and to be stranded."""
    told = [result for result in results if isinstance(result, Ended | AbortResult)]
    return (
        [live.seq for result in told for live in result.freed],
        [one.seq for result in told for one in result.stranded],
    )


@pytest.mark.parametrize("need", ["success", "end"])
@pytest.mark.parametrize("state", sorted(ENDING))
def test_a_request_waits_for_another_and_is_freed_or_aborted_by_its_end(ledger, need, state):
    [_, result] = ledger.commit([accept(1), accept(2, after=after(1, need=need))])
    assert result == Accepted(seq=2, status="accepted", state=State.PENDING, unmet=1)
    assert (only(ledger, 2).after, ledger.list(ListRequests())[0].after) == ([an_id(1)], [an_id(1)])
    assert ledger.commit([offer(2)]) == [False]

    told = freed_and_stranded(ledger.commit(ENDING[state]))

    assert_consistent(ledger)
    view = only(ledger, 2)
    assert view.after == []
    if need == "end" or state is State.SUCCESS:
        assert (told, view.state, waiting(ledger)) == (([2], []), "pending", [2])
        assert ledger.commit([offer(2)]) == [True]
    else:
        assert (told, view.state, waiting(ledger)) == (([], [2]), "aborted", [])
        assert view.reason == Reason(text=f"needs {an_id(1)}, which {UNMET[state]}", stage="after")
        assert view.ended == (7.0 if state is State.ABORTED else 6.0)


@pytest.mark.parametrize("need", ["success", "end"])
@pytest.mark.parametrize("state", [*sorted(ENDING), State.REJECTED])
def test_what_has_ended_before_counts_at_once(ledger, need, state):
    ledger.commit([accept(1, rejected=BAD_DATA)] if state is State.REJECTED else [accept(1), *ENDING[state]])

    [result] = ledger.commit([accept(2, after=after(1, need=need))])

    assert_consistent(ledger)
    if need == "end" or state is State.SUCCESS:
        assert result == Accepted(seq=2, status="accepted", state=State.PENDING)
        assert waiting(ledger) == [2]
    else:
        reason = Reason(text=f"needs {an_id(1)}, which {UNMET[state]}", stage="after")
        assert result == Accepted(seq=2, status="accepted", state=State.ABORTED, stranded=reason)
        assert (only(ledger, 2).state, only(ledger, 2).reason, only(ledger, 2).ended) == ("aborted", reason, 1.0)
        assert waiting(ledger) == []


@pytest.mark.parametrize("others", [after(1), after(2), after(3, 9)], ids=["later", "itself", "unknown"])
@pytest.mark.parametrize("how", ["after", "take"])
def test_a_request_after_one_that_was_not_submitted_before_it_is_rejected(ledger, others, how):
    ledger.commit([accept(3)])
    fields = {"after": others} if how == "after" else {"take": [take(9, "/a")]}

    results = ledger.commit([accept(2, **fields), accept(1)])

    unknown = (fields.get("take") or others)[-1].request
    assert (results[0].status, results[0].state, results[1].status) == ("rejected", State.REJECTED, "accepted")
    assert unknown in results[0].reason
    assert (only(ledger, 2).state, only(ledger, 2).reason.stage) == ("rejected", "after")
    assert ledger.commit([accept(2, **fields)])[0].status == "rejected"  # though it is known by now
    assert_consistent(ledger)


def test_a_lost_attempt_of_another_is_not_its_end(ledger):
    ledger.commit([accept(1), accept(2, after=after(1, need="end")), offer(1), grant(1)])

    [ended] = ledger.commit([lost(1)])

    assert (ended.state, ended.freed, ended.stranded) == (State.PENDING, (), ())
    assert only(ledger, 2).after == [an_id(1)]
    assert freed_and_stranded(ledger.commit([wake(1), offer(1, 2), grant(1, 2), end(1, 2)])) == ([2], [])


def test_a_request_that_needs_two_waits_for_both(ledger):
    ledger.commit([accept(1), accept(2), accept(3, after=after(2, 1))])
    assert only(ledger, 3).after == [an_id(2), an_id(1)]

    assert freed_and_stranded(ledger.commit(run(2))) == ([], [])
    assert (only(ledger, 3).after, waiting(ledger)) == ([an_id(1)], [1])
    assert freed_and_stranded(ledger.commit(run(1))) == ([3], [])


def test_one_that_is_named_twice_is_one_need_and_the_stronger_one(ledger):
    results = ledger.commit(
        [
            accept(1),
            accept(2, after=[*after(1), *after(1, need="end")]),
            accept(3, after=[*after(1, need="end"), *after(1)]),
            accept(4, after=after(1, need="end"), take=[take(1, "/a")]),
        ]
    )
    assert [result.unmet for result in results] == [0, 1, 1, 1]

    assert freed_and_stranded(ledger.commit([abort(1)])) == ([], [2, 3, 4])
    assert [only(ledger, number).reason.stage for number in (2, 3, 4)] == ["after"] * 3


def test_an_abort_goes_through_a_chain_and_a_diamond_and_stops_where_an_end_is_enough(ledger, url):
    ledger.commit(
        [
            accept(1),
            accept(2, after=after(1)),
            accept(3, after=after(1), priority=4, group="ann", concurrency_key="k", requirement=3),
            accept(4, after=after(2, 3)),
            accept(5, after=after(4, need="end")),
            accept(6, after=after(5)),
            accept(7, after=after(1, need="end")),
        ]
    )

    [*_, ended] = ledger.commit(run(1, **FAILS))

    assert [one.seq for one in ended.stranded] == [2, 3, 4]
    assert ended.stranded[1] == Stranded(
        seq=3,
        id=an_id(3),
        task="noop",
        reason=Reason(text=f"needs {an_id(1)}, which ended in failure", stage="after"),
        requirement=3,
        priority=4,
        group="ann",
        key="k",
    )
    assert [(live.seq, live.unmet) for live in ended.freed] == [(5, 0), (7, 0)]
    assert only(ledger, 4).reason.text == f"needs {an_id(2)}, which was aborted"
    assert_consistent(ledger)
    before = facts(ledger)
    ledger.close()
    with closing(Ledger.open(url)) as again:
        assert facts(again) == before
        assert waiting(again) == [5, 7]
        assert freed_and_stranded(again.commit(run(5))) == ([6], [])


def test_an_abort_of_a_waiting_request_forgets_what_it_waited_for(ledger):
    ledger.commit([accept(1), accept(2, after=after(1)), accept(3, after=after(2))])

    [result] = ledger.commit([abort(2)])

    assert (result.before, result.before_lane) == (State.PENDING, LaneRow(1, 0, "default", None, 2, False))
    assert [one.seq for one in result.stranded] == [3]
    assert only(ledger, 2).reason == Reason(text="not needed")
    assert freed_and_stranded(ledger.commit(run(1))) == ([], [])
    assert_consistent(ledger)


def test_aborts_in_one_set_find_what_the_ones_before_them_did(ledger):
    ledger.commit([accept(1), accept(2, after=after(1)), accept(3, after=after(2)), accept(4, after=after(3))])

    results = ledger.commit([abort(3), abort(1), abort(2), abort(4)])

    assert [result.before for result in results] == [State.PENDING, State.PENDING, State.ABORTED, State.ABORTED]
    assert [[one.seq for one in result.stranded] for result in results] == [[4], [2], [], []]


def test_a_submission_in_one_set_finds_what_the_end_before_it_did(ledger):
    ledger.commit([accept(1), accept(2, after=after(1)), offer(1), grant(1)])

    results = ledger.commit([accept(3, after=after(2)), end(1, **FAILS), accept(4, after=after(2)), offer(4)])

    assert [results[0].state, results[2].state, results[3]] == [State.PENDING, State.ABORTED, False]
    assert [one.seq for one in results[1].stranded] == [2, 3]


def test_a_request_that_is_freed_in_a_set_can_be_offered_in_it(ledger):
    ledger.commit([accept(1), offer(1), grant(1), accept(2, after=after(1)), accept(3, after=after(1))])

    ended, moved, offered = ledger.commit([end(1), to_priority(5, 3), offer(2)])

    assert [(live.seq, live.request.priority) for live in ended.freed] == [(2, 0), (3, 0)]
    assert (moved.live.unmet, moved.live.request.priority, offered) == (0, 5, True)


def test_an_outcome_that_comes_twice_frees_once(ledger):
    ledger.commit([accept(1), accept(2, after=after(1)), offer(1), grant(1)])

    results = ledger.commit([end(1), end(1)])

    assert [[live.seq for live in result.freed] for result in results] == [[2], []]


def test_many_that_come_after_one_are_settled_at_once(ledger):
    count = PAGE + 10
    ledger.commit([accept(1), *(accept(number, after=after(1)) for number in range(2, count))])

    freed, stranded = freed_and_stranded(ledger.commit(run(1)))

    assert (freed, stranded) == ([*range(2, count)], [])
    assert waiting(ledger) == freed


@st.composite
def graphs(draw):
    """Requests that come after earlier ones, and the order in which they are tried to be brought to an end."""
    needs = [
        draw(st.dictionaries(st.integers(1, number - 1), st.sampled_from(["success", "end"]), max_size=3))
        if number > 1
        else {}
        for number in range(1, 9)
    ]
    order = draw(st.permutations(range(1, 9)))
    endings = draw(st.lists(st.sampled_from(["success", "failure", "abort"]), min_size=8, max_size=8))
    return needs, [*zip(order, endings, strict=True)], draw(st.integers(0, 8))


@given_some(graph=graphs())
def test_a_request_is_free_exactly_when_all_its_needs_are_met_and_aborted_when_one_cannot_be(empty_ledgers, graph):
    needs, endings, early = graph
    states = {}

    def verdicts(number):
        return [meets(kind, states.get(other, State.PENDING)) for other, kind in needs[number - 1].items()]

    def settle():
        for number in range(1, 9):  # all that one comes after is earlier
            if number not in states and False in verdicts(number):
                states[number] = State.ABORTED

    def submission(number):
        return accept(
            number, after=[one for other, kind in needs[number - 1].items() for one in after(other, need=kind)]
        )

    ledger, _ = empty_ledgers()
    ledger.commit([submission(number) for number in range(1, early + 1)])
    for number, ending in [*endings, *endings]:
        if number > early or number in states or (ending != "abort" and not all(verdicts(number))):
            continue
        before = {number: not all(verdicts(number)) for number in range(1, early + 1)}
        how = {"success": run(number), "failure": run(number, **FAILS), "abort": [abort(number)]}[ending]
        states[number] = State.ABORTED if ending == "abort" else State(ending)
        gone = {*states}
        settle()
        freed, stranded = freed_and_stranded(ledger.commit(how))
        assert sorted(stranded) == sorted(states.keys() - gone - {*range(early + 1, 9)})
        assert freed == [one for one, blocked in before.items() if blocked and one not in states and all(verdicts(one))]
    settle()
    ledger.commit([submission(number) for number in range(early + 1, 9)])
    for number in range(1, 9):
        view = only(ledger, number)
        assert view.state == states.get(number, State.PENDING)
        open_ = [other for other in needs[number - 1] if other not in states]
        assert view.after == ([] if number in states else [an_id(other) for other in open_])
    assert waiting(ledger) == [number for number in range(1, 9) if number not in states and all(verdicts(number))]
    assert_consistent(ledger)


# ---------------------------------------------------------------- artifacts of one as inputs of the next


def test_an_artifact_of_one_request_gets_into_the_data_of_the_next(ledger, url):
    data = {"source": 5, "a/b": {"~": {}}}
    takes = [take(1, "/binary"), take(1, "/log/of/build", "test:log"), take(2, "/a~1b/~0/x~01")]
    [_, _, accepted] = ledger.commit([accept(1), accept(2), accept(3, data=data, take=takes, inputs=(5, 2))])
    assert (accepted.unmet, accepted.live) == (2, None)

    ledger.commit(run(1, artifacts=[artifact("a"), artifact("b", category="test:log"), artifact("c", category="x:y")]))
    [_, live] = ledger.members(1, 2)
    assert (live.unmet, live.request.data["binary"], live.inputs) == (1, 1, (5, 2, 1))
    [*_, ended] = ledger.commit(run(2, artifacts=[artifact("a")]))

    filled = {"source": 5, "binary": 1, "log": {"of": {"build": 2}}, "a/b": {"~": {"x~1": 4}}}
    assert [live.request.data for live in ended.freed] == [filled]
    assert [live.inputs for live in ended.freed] == [(5, 2, 1, 4)]
    assert only(ledger, 3).request.data == filled
    assert ledger.commit([accept(3, data=data, take=takes)])[0].status == "known"
    ledger.close()
    with closing(Ledger.open(url)) as again:
        assert again.members(1, 9) == [*ended.freed]


def test_what_was_made_before_is_taken_at_once(ledger):
    ledger.commit([accept(1), *run(1, artifacts=[artifact()]), accept(2)])
    given = accept(3, data={"n": 1}, take=[take(1, "/x"), take(2, "/y")], inputs=(8,))

    [result] = ledger.commit([given])

    assert (result.state, result.unmet) == (State.PENDING, 1)
    assert (result.live.request.data, result.live.inputs) == ({"n": 1, "x": 1}, (8, 1))
    assert given.request.data == {"n": 1}
    assert [result.live] == [live for live in ledger.members(1, 9) if live.seq == 3]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    ("made", "data", "said"),
    [
        ([], {}, "expected one artifact of category test:thing made by {}, got 0"),
        ([artifact("a"), artifact("b")], {}, "expected one artifact of category test:thing made by {}, got 2"),
        ([artifact("a", category="test:log")], {}, "got 0"),
        ([artifact("a")], {"x": [1]}, "expected objects in the task data on the way to /x/y, got [1] at 'x'"),
        ([artifact("a")], {"x": None}, "got null at 'x'"),
    ],
)
def test_a_request_whose_artifact_cannot_be_had_is_aborted_with_the_reason(ledger, made, data, said, at_once):
    first = [accept(1), *run(1, artifacts=made)]
    second = accept(2, data=data, take=[take(1, "/x/y")])

    if at_once:
        ledger.commit(first)
        [result] = ledger.commit([second])
        assert result.stranded == only(ledger, 2).reason
    else:
        results = ledger.commit([first[0], second, *first[1:]])
        assert results[-1].stranded[0].reason == only(ledger, 2).reason

    view = only(ledger, 2)
    assert (view.state, view.reason.stage) == ("aborted", "take")
    assert said.format(an_id(1)) in view.reason.text
    assert_consistent(ledger)


def test_only_the_attempt_that_succeeded_counts_for_what_is_taken(ledger):
    again = end(1, result="failure", to=State.PENDING, reason=BROKEN, artifacts=[artifact()])
    ledger.commit([accept(1), accept(2, take=[take(1, "/x")]), offer(1), grant(1), again])

    [*_, ended] = ledger.commit([offer(1, 2), grant(1, 2, OTHER), end(1, 2, OTHER, artifacts=[artifact()])])

    assert [live.request.data for live in ended.freed] == [{"x": 2}]


def test_what_is_taken_cannot_go_below_what_was_taken_before(ledger):
    ledger.commit([accept(1), accept(2), accept(3, take=[take(1, "/x"), take(2, "/x/y")])])

    ledger.commit([*run(1, artifacts=[artifact()]), *run(2, artifacts=[artifact()])])

    view = only(ledger, 3)
    assert "got 1 at 'x'" in view.reason.text
    assert view.request.data == {"x": 1}


# ---------------------------------------------------------------- the file


def test_the_term_rises_with_each_opening(url):
    terms = []
    for _ in range(3):
        with closing(Ledger.open(url)) as ledger:
            terms.append(ledger.term)

    assert terms == [1, 2, 3]


def test_what_was_committed_is_there_after_opening_again(url):
    with closing(Ledger.open(url)) as ledger:
        ledger.commit([*BRINGING[State.RUNNING], accept(2)])
    with closing(Ledger.open(url)) as ledger:
        assert [(live.request.id, live.state, live.token) for live in alive(ledger)] == [
            (an_id(), State.RUNNING, "t1"),
            (an_id(2), State.PENDING, None),
        ]


def test_commits_reach_the_disk_before_they_are_answered(path):
    with closing(Ledger.open(f"sqlite:///{path}")) as ledger, ledger._database.snapshot() as connection:
        settings = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]

    assert settings == ["wal", 2, 1]  # 2 is FULL


@pytest.mark.parametrize(("wanted", "got"), [("off", "on"), ("remote_apply", "remote_apply")])
def test_commits_in_postgresql_are_as_durable_as_wished_and_never_less_than_a_disk(postgresql_url, wanted, got):
    url = f"{postgresql_url}?options=-csynchronous_commit%3D{wanted}"
    with closing(Ledger.open(url)) as ledger, ledger._database.snapshot() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == got


def test_a_ledger_may_be_used_in_another_thread_than_it_was_opened_in(ledger):
    results = []
    thread = threading.Thread(target=lambda: results.extend(ledger.commit([accept()])))
    thread.start()
    thread.join()

    assert results == [ACCEPTED]
    assert ledger.counts() == {"pending": 1}


def test_folders_that_are_missing_are_made(tmp_path):
    with closing(Ledger.open(f"sqlite:///{tmp_path}/a/b/ledger.db")):
        pass

    assert (tmp_path / "a" / "b" / "ledger.db").is_file()


@pytest.mark.parametrize(
    "wrong",
    [
        "mysql://me:secret@db/mq",
        "postgresql://me:secret@db:x/mq",
        "postgresql://me:secret@db",
        "postgresql://me:secret@127.0.0.1:1/mq?nonsense=secret",
        "sqlite://host/x",
        "sqlite:///x?mode=ro",
        "/var/lib/ledger.db",
        "",
    ],
)
def test_a_url_that_is_not_of_a_ledger_is_a_wrong_setting(wrong):
    with pytest.raises(SettingsError, match=r"expected a ledger's URL|expected options") as caught:
        Ledger.open(wrong)

    assert "secret" not in str(caught.value)


def test_a_folder_is_no_ledger(tmp_path):
    with pytest.raises(LedgerInvalid, match="directory"):
        Ledger.open(f"sqlite:///{tmp_path}")


def test_a_path_below_a_file_is_no_place_for_a_ledger(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(LedgerInvalid, match="name another path"):
        Ledger.open(f"sqlite:///{tmp_path}/file/ledger.db")


def test_a_file_of_something_else_is_no_ledger_and_is_left_alone(path):
    path.write_text("This is a diary. " * 100)
    before = path.read_bytes()

    with pytest.raises(LedgerInvalid, match="not a database"):
        Ledger.open(f"sqlite:///{path}")

    assert path.read_bytes() == before


def test_a_database_of_something_else_is_no_ledger_and_is_left_alone(path):
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE meta (key TEXT, value TEXT)")
    before = path.read_bytes()

    with pytest.raises(LedgerInvalid, match="something else"):
        Ledger.open(f"sqlite:///{path}")

    assert path.read_bytes() == before


def test_a_ledger_of_a_newer_schema_is_refused(url):
    with closing(Ledger.open(url)) as ledger, ledger._database.transaction() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0999'")

    with pytest.raises(LedgerInvalid, match="got the schema 0999, which a newer mqworker made"):
        Ledger.open(url)


def test_a_ledger_of_the_first_schema_is_told_as_such(path):
    with closing(sqlite3.connect(path)) as other, other:
        for table in migrations.FIRST:
            other.execute(f"CREATE TABLE {table} (key TEXT, value INTEGER)")
        other.execute("INSERT INTO meta VALUES ('schema', 1), ('term', 7)")

    with pytest.raises(LedgerInvalid, match="to have schema 2 or a later one, got schema 1"):
        Ledger.open(f"sqlite:///{path}")


def test_an_opening_that_failed_holds_no_lock(path):
    path.write_text("This is a diary. " * 100)
    for _ in range(2):
        with pytest.raises(LedgerInvalid):
            Ledger.open(f"sqlite:///{path}")
    path.unlink()

    Ledger.open(f"sqlite:///{path}").close()


def test_a_ledger_whose_making_was_cut_off_is_made_anew(path, monkeypatch):
    with monkeypatch.context() as cut:
        cut.setattr(schema, "REVISION", None)  # fails once all tables have been made
        with pytest.raises(IntegrityError):
            Ledger.open(f"sqlite:///{path}")

    with closing(Ledger.open(f"sqlite:///{path}")) as ledger:
        assert ledger.term == 1


# ---------------------------------------------------------------- one writer


def child(code, *arguments, before=()):
    """Start a process of its own that runs some code, with `Ledger` and this file's helpers at hand."""
    preamble = f"""
        import sys
        import importlib.util
        spec = importlib.util.spec_from_file_location("helpers", {__file__!r})
        helpers = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(helpers)
        from mqworker.ledger import Ledger
    """
    return subprocess.Popen(
        [*before, sys.executable, "-c", textwrap.dedent(preamble) + textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


HOLDING = """
    ledger = Ledger.open(sys.argv[1])
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_second_ledger_in_the_same_process_is_refused(ledger, url):
    for opening in (Ledger.open, Ledger.check):
        with pytest.raises(LedgerLocked, match=f"process {os.getpid()} ") as caught:
            opening(url)
        assert "mqworker:***@" in str(caught.value) or "ledger.db.lock" in str(caught.value)

    assert ledger.commit([accept()])[0].status == "accepted"


def test_another_name_of_the_same_file_is_refused_too(path, tmp_path):
    (tmp_path / "link.db").symlink_to(path)

    with closing(Ledger.open(f"sqlite:///{path}")), pytest.raises(LedgerLocked):
        Ledger.open(f"sqlite:///{tmp_path}/link.db")


def test_a_process_is_refused_what_another_holds_and_gets_it_when_that_one_is_killed(path):
    url = f"sqlite:///{path}"
    with child(HOLDING, url) as holder:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(LedgerLocked, match=f"process {holder.pid} "):
            Ledger.open(url)
        holder.kill()
        holder.wait()

        Ledger.open(url).close()


def test_a_closed_ledger_can_be_opened_by_another_process(path):
    url = f"sqlite:///{path}"
    ledger = Ledger.open(url)
    ledger.close()
    ledger.close()

    with child(HOLDING, url) as holder:
        assert holder.stdout.readline() == "open\n"
        holder.stdin.close()
        assert holder.wait() == 0


# ---------------------------------------------------------------- when the world is unwell


def test_a_killed_writer_leaves_every_answered_commit_whole(path):
    url = f"sqlite:///{path}"
    writing = """
        ledger = Ledger.open(sys.argv[1])
        number = int(sys.argv[2])
        while True:
            numbers = range(number, number + 3)
            ledger.commit([write for n in numbers for write in (helpers.accept(n), helpers.offer(n))])
            number += 3
            print(number, flush=True)
    """
    answered = 0
    for round_ in range(4):
        with child(writing, url, str(answered)) as writer:
            lines = [writer.stdout.readline() for _ in range(5 + 7 * round_)]
            writer.send_signal(signal.SIGKILL)
            lines += writer.stdout.readlines()  # what it had still answered when it died
            answered = int(lines[-1])

        with closing(Ledger.open(url)) as ledger:
            states = {live.request.id: live.state for live in alive(ledger)}
        assert set(states.values()) == {State.OFFERED}
        assert {an_id(number) for number in range(answered)} <= states.keys()
        assert len(states) % 3 == 0
        answered = len(states)


def test_a_killed_writer_leaves_nothing_half_settled(path):
    url = f"sqlite:///{path}"
    writing = """
        ledger = Ledger.open(sys.argv[1])
        for first in range(1, 100_000, 4):
            one, two, three, four = range(first, first + 4)
            ledger.commit([helpers.accept(one), helpers.accept(two, after=helpers.after(one))])
            ledger.commit([helpers.accept(three, after=helpers.after(two)), helpers.offer(one), helpers.grant(one)])
            ledger.commit([helpers.accept(four, after=helpers.after(three, need="end"))])
            ledger.commit([helpers.end(one, **helpers.FAILS)])
            print(first, flush=True)
    """
    with child(writing, url) as writer:
        lines = [writer.stdout.readline() for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        answered = int([*lines, *writer.stdout.readlines()][-1])

    with closing(Ledger.open(url)) as ledger:
        assert_consistent(ledger)
        answered_fours = range(4, answered + 4, 4)
        assert {*answered_fours} <= {*waiting(ledger)}
        assert ledger.count(CountRequests(states=["aborted"])) >= 2 * len(answered_fours)


def test_a_full_disk_is_told_writes_nothing_and_is_survived(path):
    filling = """
        import resource
        from mqworker.errors import LedgerUnavailable
        ledger = Ledger.open(sys.argv[1])
        ledger.commit([helpers.accept(1)])
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512 * 1024, unlimited[1]))
        before = helpers.facts(ledger)
        number = 2
        while True:
            try:
                ledger.commit([helpers.accept(number, data={"filling": "x" * 50_000}), helpers.offer(1)])
            except LedgerUnavailable as error:
                assert "nothing was written" in str(error), error
                break
            ledger.commit([helpers.give_back(1)])
            before = helpers.facts(ledger)
            number += 1
        assert number > 2, "the limit came too early to prove anything"
        assert helpers.facts(ledger) == before
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        [accepted, offered] = ledger.commit([helpers.accept(number), helpers.offer(1)])
        assert (accepted.status, accepted.seq, offered) == ("accepted", number, True)
        print("survived", flush=True)
    """
    with child(filling, f"sqlite:///{path}") as filler:
        output = filler.stdout.read()

    assert output == "survived\n"


def test_a_file_system_without_room_is_told_loses_nothing_and_is_written_when_there_is_room(tmp_path, missing):
    filling = """
        from pathlib import Path
        from mqworker.errors import LedgerUnavailable
        directory = Path(sys.argv[1])
        ledger = Ledger.open(f"sqlite:///{directory}/ledger.db")
        ledger.commit([helpers.accept(1)])
        print("begins", flush=True)
        for round_ in range(3):
            other = directory / "other"
            number = 1000 * (round_ + 1)
            with other.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
            failed = None
            while failed is None:
                before = helpers.facts(ledger)
                writes = [helpers.accept(number, data={"filling": "x" * 20_000})]
                try:
                    ledger.commit(writes)
                    number += 1
                except LedgerUnavailable as error:
                    failed = error
            assert "Free space on its disk" in str(failed), failed
            assert helpers.facts(ledger) == before
            other.unlink()
            assert ledger.commit(writes)[0].status == "accepted"
        ledger.close()
        print(len(before["requests"]), flush=True)
        with_all = Ledger.open(f"sqlite:///{directory}/ledger.db")
        assert len(helpers.facts(with_all)["requests"]) == len(before["requests"]) + 1
        print("survived", flush=True)
    """
    mounting = 'mount -t tmpfs -o size=3m none "$0" && exec "$@"'
    inside = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounting, str(tmp_path))
    with child(filling, str(tmp_path), before=inside) as filler:
        lines = filler.stdout.read().splitlines()
    if not lines:
        missing("a file system of its own", "unshare and mount do not make one here")

    assert lines[-1] == "survived"


def test_a_disk_without_room_for_a_ledger_is_told_at_opening(tmp_path):
    opening = """
        import resource
        from mqworker.errors import LedgerUnavailable
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            Ledger.open(sys.argv[1])
        except LedgerUnavailable as error:
            print(error)
    """
    with child(opening, f"sqlite:///{tmp_path}/ledger.db") as opener:
        output = opener.stdout.read()

    assert "Free space" in output


def test_a_database_that_somebody_else_holds_is_told_and_used_when_it_is_free_again(path, monkeypatch):
    monkeypatch.setattr("mqworker.sqlite.BUSY_TIMEOUT", 0.05)
    with closing(Ledger.open(f"sqlite:///{path}")) as ledger:
        before = facts(ledger)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerUnavailable, match="locked"):
                ledger.commit([accept()])
            assert ledger.counts() == {}  # readers wait for nobody
            assert facts(ledger) == before
            other.execute("ROLLBACK")

        assert ledger.commit([accept()]) == [ACCEPTED]


def test_a_damaged_file_is_told_as_such(path):
    with closing(Ledger.open(f"sqlite:///{path}")) as ledger:
        ledger.commit([accept(number, data={"filling": "x" * 500}) for number in range(500)])
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * (size - 8192))

    with pytest.raises(LedgerInvalid, match="backup"), closing(Ledger.open(f"sqlite:///{path}")) as ledger:
        alive(ledger)


# ---------------------------------------------------------------- whose is what


def test_a_workers_name_is_kept_for_its_user_until_it_is_given_away(ledger):
    def own(name, user):
        return Own(name=name, user=user, at=1.0)

    assert ledger.commit([own("anna", "u1"), own("bert", "u1"), own("anna", "u2")]) == [False, False, True]
    assert ledger.worker_names() == {"anna": "u2", "bert": "u1"}
    assert ledger.commit([own("anna", None), own("carl", None)]) == [True, False]
    assert ledger.worker_names() == {"bert": "u1"}


def test_a_request_stays_its_first_submitters(ledger):
    first, again = replace(accept(), submitter="anna"), replace(accept(seq=2), submitter="bert")

    assert [result.status for result in ledger.commit([need(1), first, again])[1:]] == ["accepted", "known"]
    [view], _ = ledger.view([an_id(1)])
    assert view.submitter == "anna"
