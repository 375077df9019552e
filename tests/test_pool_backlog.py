"""What waits, in a pool that keeps few of it in memory: heads, duplicates, commands, limits, and what comes after."""

import pytest

from mqworker import dispatch
from mqworker.messages import Granted, Request
from tests.driving import OFFER_TIMEOUT, Driven, Peer, an_id


@pytest.fixture(autouse=True)
def few_heads(monkeypatch):
    monkeypatch.setattr(dispatch, "LEAST_HEADS", 2)
    monkeypatch.setattr(dispatch, "MOST_HEADS", 2)


@pytest.fixture
def limited(coloured):  # noqa: ARG001  # its tasks are there
    one = Driven(concurrency_limits={"one": 1, "two": 2})
    yield one
    one.ledger.close()


def requests(driven, number, **fields):
    """Submit some that only their age tells apart."""
    return [driven.request(**fields) for _ in range(number)]


def next_of(driven):
    """Return the request that is out, and only that."""
    [(_, ticket)] = driven.take_tickets()
    return ticket.request.id


def in_memory(driven, *ids):
    return [one in driven.pool._entries for one in ids]


def drain(driven, peer):
    """Run all that is offered to a worker, one after the other; return the order."""
    order = []
    while tickets := driven.take_tickets():
        for _, ticket in tickets:
            order.append(ticket.request.id)
            peer.end(peer.run(ticket.request.id, ticket.attempt))
    return order


# ---------------------------------------------------------------- limits by key


def test_a_run_whose_class_went_with_its_claim_counts_towards_its_key_still(limited):
    anna, bert = Peer(limited, colour="red").join(), Peer(limited, "bert", colour="blue").join()
    first = limited.request("coloured", {"colour": "red"}, concurrency_key="one")
    anna.follow()
    assert limited.states(first) == ["offered"]
    anna.claim(first)
    anna.say(anna.hello(colour="green"))  # in the set of the claim: its class has no worker any more
    limited.turn()
    assert [part.request for part in anna.hear(Granted)] == [first]
    second = limited.request("coloured", {"colour": "blue"}, concurrency_key="one")
    bert.follow()

    assert limited.states(first, second) == ["running", "pending"]
    assert limited.waits(second) == "as many run with the concurrency key one as may"
    assert limited.pool._dispatch.shares()["default"][0] == 1


def test_nobody_else_gets_the_place_of_a_run_that_is_granted_while_its_class_goes(limited):
    anna, bert = Peer(limited, colour="red").join(), Peer(limited, "bert", colour="blue").join()
    first = limited.request("coloured", {"colour": "red"}, concurrency_key="one")
    anna.follow()
    second = limited.request("coloured", {"colour": "blue"}, concurrency_key="one")
    bert.follow()
    assert limited.states(first, second) == ["offered", "pending"]
    anna.claim(first)
    anna.say(anna.hello(colour="green"))
    limited.turn()

    assert limited.states(first, second) == ["running", "pending"]


# ---------------------------------------------------------------- behind the heads


def test_a_backlog_beyond_the_heads_waits_in_the_ledger_and_is_run_in_its_order(driven):
    """P8."""
    anna = Peer(driven).join()
    ids = requests(driven, 9)
    assert driven.states(*ids) == ["offered", *["pending"] * 8]
    assert in_memory(driven, *ids) == [True] * 3 + [False] * 6
    assert driven.pool._dispatch.waiting() == 8
    assert driven.waits(ids[8]) == "all that can run it are busy; about 7 go first"

    assert drain(driven, anna) == ids
    assert not driven.pool._entries


def test_what_comes_back_while_others_wait_behind_keeps_its_age(driven):
    anna = Peer(driven).join()
    ids = requests(driven, 6)
    anna.end(anna.run(ids[0]), "handed_back")
    anna.say(anna.beat(slots=0))
    driven.pass_time(2 * OFFER_TIMEOUT)
    assert driven.states(*ids) == ["pending"] * 6
    driven.tickets.clear()
    anna.follow()

    assert drain(driven, anna) == ids


def test_submissions_while_others_wait_behind_the_heads_stand_behind_them(driven):
    anna = Peer(driven).join()
    first = requests(driven, 5)
    more = [Request(id=an_id(500 + number), task="noop") for number in range(4)]
    ref = anna.run(first[0])
    driven.submit(*more[:2])
    anna.end(ref)
    driven.submit(*more[2:])
    driven.turn()

    driven.tickets = driven.tickets[-1:]

    assert drain(driven, anna) == first[1:] + [one.id for one in more]


def test_a_request_that_only_the_ledger_knows_is_known_or_a_conflict_and_waits_where_it_did(driven):
    anna = Peer(driven).join()
    ids = requests(driven, 6)
    same = driven.view(ids[5]).request
    other = Request(id=ids[4], task="noop", priority=2)  # in a lane where it is the first
    driven.submit(same, other, same)
    driven.turn()

    assert [one.status for one in driven.receipts[-1].results] == ["known", "conflict", "known"]
    assert driven.pool._dispatch.waiting() == 5
    assert sum(use.entries for use in driven.pool._uses.values()) == len(driven.pool._entries) == 3
    assert drain(driven, anna) == ids


def test_a_request_that_has_ended_is_known_behind_the_heads_too(driven):
    anna = Peer(driven).join()
    ended = driven.request()
    anna.end(anna.run(ended))
    driven.take_tickets()
    ids = requests(driven, 5)
    driven.submit(driven.view(ended).request)
    driven.turn()

    assert driven.receipts[-1].results[0].status == "known"
    assert driven.pool._dispatch.waiting() == 4
    assert drain(driven, anna) == ids


def test_an_abort_reaches_what_waits_in_the_ledger_alone(driven):
    anna = Peer(driven).join()
    ids = requests(driven, 7)
    for one in (ids[0], ids[2], ids[5]):  # offered, in memory, and behind
        driven.abort(one)
    driven.turn()
    assert driven.states(ids[0], ids[2], ids[5]) == ["aborted"] * 3
    assert driven.pool._dispatch.waiting() == 3
    assert driven.request_events().count("abort") == 3
    driven.abort(ids[5])
    driven.turn()
    assert driven.pool._dispatch.waiting() == 3
    driven.tickets = driven.tickets[-1:]

    assert drain(driven, anna) == [ids[1], ids[3], ids[4], ids[6]]


@pytest.mark.parametrize("which", [1, 5])
def test_another_priority_takes_a_request_to_the_front_or_the_end_wherever_it_waits(driven, which):
    anna = Peer(driven).join()
    ids = requests(driven, 7)
    driven.pool.reprioritise(ids[which], 9, lambda _: None)
    driven.turn()
    assert driven.view(ids[which]).request.priority == 9
    last = ids[3]
    driven.pool.reprioritise(last, -1, lambda _: None)
    driven.turn()

    rest = [one for one in ids[1:] if one not in (ids[which], last)]
    assert drain(driven, anna) == [ids[0], ids[which], *rest, last]


def test_another_priority_for_what_is_offered_delayed_or_runs_is_its_next_attempts(driven):
    anna = Peer(driven, slots=3).join()
    offered, running, delayed = requests(driven, 3, max_attempts=2)
    ref = anna.run(running)
    anna.end(anna.run(delayed), "lost")
    moved = []
    for one in (offered, running, delayed, an_id(999)):
        driven.pool.reprioritise(one, 3, moved.append)
    driven.turn()
    assert [None if one.live is None else one.live.state for one in moved] == ["offered", "running", "pending", None]
    anna.end(ref, "handed_back")
    anna.end(anna.run(offered), "handed_back")
    assert {driven.pool._entries[one].lane.priority for one in (offered, running, delayed)} == {3}
    driven.pool.reprioritise(running, 4, lambda _: None)
    driven.turn()

    assert driven.view(running).request.priority == 4


def test_another_priority_and_the_same_submission_again_in_one_set_lose_nothing(driven):
    anna = Peer(driven).join()
    ids = requests(driven, 6)
    again, conflict = driven.view(ids[5]).request, Request(id=ids[4], task="noop", priority=2)
    for one in (ids[5], ids[4]):
        driven.pool.reprioritise(one, 9, lambda _: None)
    driven.submit(again, conflict)
    driven.turn()

    assert drain(driven, anna) == [ids[0], ids[4], ids[5], *ids[1:4]]
    assert driven.pool._dispatch.waiting() == 0


def test_an_abort_and_a_conflicting_submission_in_one_set_leave_no_count_behind(driven):
    anna = Peer(driven).join()
    ids = requests(driven, 6)
    driven.abort(ids[5])
    driven.submit(Request(id=ids[5], task="noop", priority=2), driven.view(ids[4]).request)
    driven.turn()

    assert driven.pool._dispatch.waiting() == 4
    assert sum(use.entries for use in driven.pool._uses.values()) == 3
    assert drain(driven, anna) == ids[:5]
