"""What waits, in a pool that keeps few of it in memory: heads, duplicates, commands, limits, and what comes after."""

import pytest

from mqworker import dispatch
from mqworker.messages import (
    Granted,
)
from tests.driving import Driven, Peer


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
