import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError

import mqworker.ledger
from mqworker.errors import IllegalMove, LedgerInvalid, LedgerLocked, LedgerUnavailable, SettingsError
from mqworker.ledger import (
    PAGE,
    AbortAsked,
    AbortResult,
    Accept,
    Accepted,
    End,
    Ended,
    Grant,
    Import,
    ImportRefused,
    Ledger,
    Offer,
    Return,
)
from mqworker.lifecycle import FINAL, MOVES, Event, State
from mqworker.messages import Artifact, FileEntry, ListArtifacts, ListRequests, Reason, Relation, Request

BAD_DATA = Reason(text="no such key", stage="configure")
BROKEN = Reason(text="the compiler said no", stage="build", exit_code=2, status="failed", line="E: no")


FIRST, OTHER = "t1", "t2"  # tokens of claims


def an_id(number=1):
    return f"00000000-0000-4000-8000-{number:012x}"


def accept(number=1, *, at=1.0, rejected=None, **fields):
    return Accept(request=Request(id=an_id(number), **{"task": "noop"} | fields), at=at, rejected=rejected)


def offer(number=1, attempt=1):
    return Offer(request=an_id(number), attempt=attempt)


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


@pytest.fixture
def ledger(path):
    with closing(Ledger.open(f"sqlite:///{path}")) as ledger:
        yield ledger


def facts(ledger):
    """All that the ledger holds, as text."""
    with ledger._reading.connect() as connection:
        return [*connection.connection.driver_connection.iterdump()]


def only(ledger, number=1):
    [view], missing = ledger.view([an_id(number)])
    assert not missing
    return view


# ---------------------------------------------------------------- submissions


def test_an_accepted_request_is_pending_and_waits_for_its_first_attempt(ledger):
    [result] = ledger.commit([accept(data={"n": [1, None]}, priority=3, at=1.5)])

    assert result == Accepted(seq=1, status="accepted")
    [live] = ledger.live()
    assert live.request == Request(id=an_id(), task="noop", data={"n": [1, None]}, priority=3)
    assert (live.state, live.attempt, live.tried, live.submitted) == (State.PENDING, 1, 0, 1.5)
    assert (live.worker, live.token, live.abort, live.not_before) == (None, None, None, None)


def test_the_same_submission_again_is_known_and_changes_nothing(ledger):
    ledger.commit([accept(data={"a": 1, "b": 2})])
    before = facts(ledger)

    [result] = ledger.commit([accept(data={"b": 2, "a": 1}, at=99.0)])

    assert result == Accepted(seq=1, status="known")
    assert facts(ledger) == before


@pytest.mark.parametrize("other", [{"data": {"a": 2}}, {"task": "other"}, {"priority": 1}, {"lease": 60.0}])
def test_the_same_id_with_other_content_is_a_conflict_and_changes_nothing(ledger, other):
    ledger.commit([accept(data={"a": 1})])
    before = facts(ledger)

    [result] = ledger.commit([accept(**{"data": {"a": 1}} | other)])

    assert (result.seq, result.status) == (1, "conflict")
    assert an_id() in result.reason
    assert facts(ledger) == before


def test_true_and_one_are_not_the_same_content(ledger):
    results = ledger.commit([accept(data={"a": 1}), accept(data={"a": True})])

    assert [result.status for result in results] == ["accepted", "conflict"]


def test_a_rejected_request_is_kept_with_its_reason_and_stays_rejected(ledger):
    [first] = ledger.commit([accept(rejected=BAD_DATA)])
    before = facts(ledger)
    [second] = ledger.commit([accept()])

    assert first == second == Accepted(seq=1, status="rejected", reason="no such key")
    assert facts(ledger) == before
    assert (only(ledger).state, only(ledger).reason) == ("rejected", BAD_DATA)
    assert [*ledger.live()] == []


def test_one_id_twice_in_one_set_is_one_request(ledger):
    results = ledger.commit([accept(), accept(2), accept(), accept(2, priority=1)])

    assert [(result.seq, result.status) for result in results] == [
        (1, "accepted"),
        (2, "accepted"),
        (1, "known"),
        (2, "conflict"),
    ]


def test_age_is_the_order_of_arrival_also_behind_an_abort_that_came_too_early(ledger):
    ledger.commit([abort(2), accept(2), accept(1)])

    assert [live.request.id for live in ledger.live()] == [an_id(2), an_id(1)]


# ---------------------------------------------------------------- moves


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
    if state in FINAL:
        assert result == AbortResult(before=state, after=state)
        assert facts(ledger) == before
    elif state is State.RUNNING:
        assert result == AbortResult(before=state, after=state)
        assert (view.state, view.abort, view.reason) == ("running", "not needed", None)
    else:
        assert result == AbortResult(before=state, after=State.ABORTED)
        assert (view.state, view.ended, view.reason) == ("aborted", 7.0, Reason(text="not needed"))


def test_an_abort_of_an_unknown_request_says_so(ledger):
    assert ledger.commit([abort()]) == [AbortResult(before=None, after=None)]


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
        (State.RUNNING, abort(), AbortResult(before=State.RUNNING, after=State.RUNNING)),
        (State.PENDING, abort(), AbortResult(before=State.ABORTED, after=State.ABORTED)),
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

    [live] = ledger.live()
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

    [live] = ledger.live()
    assert (live.state, live.attempt, live.tried) == (State.PENDING, 2, 1)
    assert (live.worker, live.token, live.not_before) == (None, None, 20.0)
    assert only(ledger).granted is None
    assert ledger.commit([offer(attempt=1), offer(attempt=2), grant(attempt=2, token=OTHER)]) == [
        False,
        True,
        "granted",
    ]
    assert [attempt.result for attempt in only(ledger).attempts] == ["lost", None]


def test_a_run_that_was_handed_back_does_not_count(ledger):
    ledger.commit([*BRINGING[State.RUNNING], end(result="handed_back", to=State.PENDING, counted=False)])

    [live] = ledger.live()
    assert (live.state, live.attempt, live.tried) == (State.PENDING, 2, 0)
    assert only(ledger).attempts[0].counted is False


def test_an_outcome_that_comes_after_its_attempt_was_lost_is_kept_as_history_only(ledger, path):
    ledger.commit([*BRINGING[State.RUNNING], lost()])
    before = only(ledger)

    results = [ledger.commit([end(artifacts=[artifact()])])[0] for _ in range(2)]

    assert [(result.status, result.artifacts, result.state) for result in results] == [("refused", {}, None)] * 2
    assert "lapsed" in results[0].reason
    assert only(ledger) == before
    with closing(sqlite3.connect(path)) as outside:
        [(late,)] = outside.execute("SELECT late FROM attempts")
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

    assert results[:5] == [Accepted(seq=1, status="accepted"), True, True, True, "granted"]
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
    chain = [artifact("b", Relation(type="extends", target="a")), artifact("a")]
    started = [accept(number), offer(number), grant(number)]
    return [
        [*started, end(number, artifacts=chain)],
        [*started, end(number, artifacts=contradiction)],
        [*started, lost(number), end(number), offer(number, 2), grant(number, 2, OTHER), end(number, 2, OTHER)],
        [*started, abort(number), end(number, to=State.ABORTED, result="aborted")],
        [accept(number), offer(number), abort(number), grant(number), give_back(number)],
        [abort(number), accept(number), offer(number), give_back(number), offer(number), grant(number)],
        [accept(number, rejected=BAD_DATA), accept(number), offer(number)],
        [accept(number), accept(number, priority=1), grant(number), end(number), end(number, token=OTHER)],
    ]


@st.composite
def several_lives(draw):
    """Three lives at once, some writes twice, cut into sets."""
    rest = [draw(st.sampled_from(lives(number))) for number in (1, 2, 3)]
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


@settings(max_examples=100, deadline=None)
@given(several_lives())
def test_a_set_of_writes_does_what_its_writes_do_one_by_one(sets):
    with closing(Ledger.open("sqlite://")) as together, closing(Ledger.open("sqlite://")) as single:
        for writes in sets:
            assert together.commit(writes) == [single.commit([write])[0] for write in writes]
            assert facts(together) == facts(single)


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
    ledger.commit([Accept(request=Request(id=id_, task="noop"), at=1.0) for id_ in ids])

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


def test_all_live_requests_are_read_in_order_of_age_while_others_are_written(ledger):
    count = PAGE * 2 + 1
    for start in range(0, count, PAGE):
        ledger.commit([accept(number) for number in range(start, min(start + PAGE, count))])
    ledger.commit([abort(5)])

    reading = ledger.live()
    first = next(reading)
    ledger.commit([offer(count - 1)])
    rest = [*reading]

    assert [one.seq for one in (first, *rest)] == [seq for seq in range(1, count + 1) if seq != 6]
    assert rest[-1].state is State.OFFERED


def test_a_new_scheduler_does_not_read_requests_that_have_ended(ledger):
    with ledger._reading.connect() as connection:
        compiled = mqworker.ledger._live.compile(connection)
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}", (0, PAGE, 0)).all()

    assert "requests_live" in plan[0][-1]


# ---------------------------------------------------------------- the file


def test_the_term_rises_with_each_opening(path):
    terms = []
    for _ in range(3):
        with closing(Ledger.open(f"sqlite:///{path}")) as ledger:
            terms.append(ledger.term)

    assert terms == [1, 2, 3]


def test_what_was_committed_is_there_after_opening_again(path):
    with closing(Ledger.open(f"sqlite:///{path}")) as ledger:
        ledger.commit([*BRINGING[State.RUNNING], accept(2)])
    with closing(Ledger.open(f"sqlite:///{path}")) as ledger:
        assert [(live.request.id, live.state, live.token) for live in ledger.live()] == [
            (an_id(), State.RUNNING, "t1"),
            (an_id(2), State.PENDING, None),
        ]


def test_commits_reach_the_disk_before_they_are_answered(ledger):
    with ledger._reading.connect() as connection:
        settings = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]

    assert settings == ["wal", 2, 1]  # 2 is FULL


def test_a_ledger_may_be_used_in_another_thread_than_it_was_opened_in(ledger):
    results = []
    thread = threading.Thread(target=lambda: results.extend(ledger.commit([accept()])))
    thread.start()
    thread.join()

    assert results == [Accepted(seq=1, status="accepted")]
    assert ledger.counts() == {"pending": 1}


def test_folders_that_are_missing_are_made(tmp_path):
    with closing(Ledger.open(f"sqlite:///{tmp_path}/a/b/ledger.db")):
        pass

    assert (tmp_path / "a" / "b" / "ledger.db").is_file()


@pytest.mark.parametrize(
    "url", ["postgresql://me:secret@db/mq", "sqlite://host/x", "sqlite:///x?mode=ro", "/var/lib/ledger.db", ""]
)
def test_a_url_that_is_not_of_a_sqlite_file_is_a_wrong_setting(url):
    with pytest.raises(SettingsError, match="sqlite:///") as caught:
        Ledger.open(url)

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


def test_a_ledger_of_another_schema_is_refused(path):
    Ledger.open(f"sqlite:///{path}").close()
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE meta SET value = 99 WHERE key = 'schema'")

    with pytest.raises(LedgerInvalid, match="got schema 99"):
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
        cut.setattr(mqworker.ledger, "SCHEMA_VERSION", None)  # fails once all tables have been made
        with pytest.raises(IntegrityError):
            Ledger.open(f"sqlite:///{path}")

    with closing(Ledger.open(f"sqlite:///{path}")) as ledger:
        assert ledger.term == 1


# ---------------------------------------------------------------- one writer


def child(code, *arguments):
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
        [sys.executable, "-c", textwrap.dedent(preamble) + textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


HOLDING = """
    ledger = Ledger.open(sys.argv[1])
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_second_ledger_in_the_same_process_is_refused(ledger, path):
    with pytest.raises(LedgerLocked, match=f"process {os.getpid()} .*ledger.db.lock"):
        Ledger.open(f"sqlite:///{path}")

    assert ledger.commit([accept()])[0].status == "accepted"


@pytest.mark.usefixtures("ledger")
def test_another_name_of_the_same_file_is_refused_too(path, tmp_path):
    (tmp_path / "link.db").symlink_to(path)

    with pytest.raises(LedgerLocked):
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
    writing = """
        ledger = Ledger.open(sys.argv[1])
        number = int(sys.argv[2])
        while True:
            numbers = range(number, number + 3)
            ledger.commit([write for n in numbers for write in (helpers.accept(n), helpers.offer(n))])
            number += 3
            print(number, flush=True)
    """
    url = f"sqlite:///{path}"
    answered = 0
    for round_ in range(4):
        with child(writing, url, str(answered)) as writer:
            lines = [writer.stdout.readline() for _ in range(5 + 7 * round_)]
            writer.send_signal(signal.SIGKILL)
            lines += writer.stdout.readlines()  # what it had still answered when it died
            answered = int(lines[-1])

        with closing(Ledger.open(url)) as ledger:
            states = {live.request.id: live.state for live in ledger.live()}
        assert set(states.values()) == {State.OFFERED}
        assert {an_id(number) for number in range(answered)} <= states.keys()
        assert len(states) % 3 == 0
        answered = len(states)


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
    monkeypatch.setattr(mqworker.ledger, "BUSY_TIMEOUT", 0.05)
    with closing(Ledger.open(f"sqlite:///{path}")) as ledger:
        before = facts(ledger)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerUnavailable, match="locked"):
                ledger.commit([accept()])
            assert ledger.counts() == {}  # readers wait for nobody
            assert facts(ledger) == before
            other.execute("ROLLBACK")

        assert ledger.commit([accept()]) == [Accepted(seq=1, status="accepted")]


def test_a_damaged_file_is_told_as_such(path):
    with closing(Ledger.open(f"sqlite:///{path}")) as ledger:
        ledger.commit([accept(number, data={"filling": "x" * 500}) for number in range(500)])
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * (size - 8192))

    with pytest.raises(LedgerInvalid, match="backup"), closing(Ledger.open(f"sqlite:///{path}")) as ledger:
        [*ledger.live()]
