"""A short while of what `make hostile` does for long, and what it once found."""

import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mqworker import messages
from mqworker.messages import (
    Artifact,
    Claim,
    Explain,
    Hello,
    Outcomes,
    Probe,
    Query,
    Report,
    Request,
    SlotWord,
    Submit,
    Tickets,
    Verdict,
)
from tests.hostile.generate import Maker
from tests.hostile.house import House
from tests.hostile.judges import JUDGES, KINDS, reading

CORPUS = Path(__file__).parent / "corpus"

# What others may send, to whoever keeps it or works through it.
FROM_OUTSIDE = [Submit, Report, Probe, Outcomes, Query, Tickets]
# Fields without a bound of their own, and why the message's is enough.
UNBOUNDED = {
    ("Request", "data"): "the request has at most MAX_REQUEST_BYTES, and MAX_DEPTH levels",
    ("Request", "requires"): "a schema has at most requires.MAX_BYTES",
    ("Hello", "metadata"): "the scheduler takes at most MAX_METADATA_BYTES, and MAX_DEPTH levels",
    ("Artifact", "data"): "a slot, an agent and a scheduler take at most MAX_DESCRIBED_BYTES, or one message",
    ("Explain", "data"): "it is gone with the answer",
    ("Explain", "requires"): "it is gone with the answer",
    ("Reason", "text"): "who reads it cuts it: bounded()",
    ("Reason", "stage"): "who reads it cuts it: bounded()",
    ("Reason", "status"): "who reads it cuts it: bounded()",
    ("Reason", "line"): "who reads it cuts it: bounded()",
}


def test_a_pool_survives_some_thousand_hostile_messages_and_accounts_for_each():
    house = House(7).run(3000)

    assert not house.failures
    assert sum(house.sent.values()) >= 3000
    assert {consumer for consumer, _ in house.told} == set(house.sent)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_took_a_reader_or_judge_a_way_of_its_own_is_survived(path):
    JUDGES[path.parent.name](path.read_bytes())


@settings(deadline=None, max_examples=100)
@given(st.randoms(use_true_random=False), st.integers(0, len(KINDS) - 1))
def test_any_message_is_read_or_refused_with_a_word(chance, number):
    reading(bytes([number]) + Maker(chance).message(KINDS[number]))


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_any_headers_are_read_and_can_be_put_aside(data):
    JUDGES["receiving"](data)


def structs_in(info, seen):
    """Go through all structs that a type is made of."""
    match info:
        case msgspec.inspect.StructType():
            if info.cls not in seen:
                seen.add(info.cls)
                for field in msgspec.inspect.type_info(info.cls).fields:
                    structs_in(field.type, seen)
        case msgspec.inspect.ListType():
            structs_in(info.item_type, seen)
        case msgspec.inspect.DictType():
            structs_in(info.value_type, seen)
        case msgspec.inspect.UnionType():
            for one in info.types:
                structs_in(one, seen)
    return seen


def unbounded(info):
    """Say whether a text, list or object may have any size, or a number any."""
    match info:
        case msgspec.inspect.StrType() | msgspec.inspect.ListType() | msgspec.inspect.DictType():
            fixed = (
                isinstance(info, msgspec.inspect.StrType)
                and info.pattern
                and "{" in info.pattern
                and "*" not in info.pattern
            )
            inner = [getattr(info, name) for name in ("item_type", "key_type", "value_type") if hasattr(info, name)]
            return (info.max_length is None and not fixed) or any(map(unbounded, inner))
        case msgspec.inspect.UnionType():
            return any(map(unbounded, info.types))
        case msgspec.inspect.AnyType():
            return True
    return False


def test_each_text_list_and_object_from_outside_has_a_bound_or_a_reason():
    seen = set()
    for kind in FROM_OUTSIDE:
        structs_in(msgspec.inspect.type_info(kind), seen)
    found = {
        (kind.__name__, field.name)
        for kind in seen
        for field in msgspec.inspect.type_info(kind).fields
        if unbounded(field.type)
    }
    assert found == UNBOUNDED.keys()
    assert {Hello, Request, Artifact, Claim, Explain} <= seen


@pytest.mark.parametrize("kind", [*FROM_OUTSIDE, Verdict, SlotWord], ids=str)
def test_what_is_made_from_a_description_can_be_read(kind):
    """Else what is sent would be hostile in one way only."""
    maker = Maker(random.Random(3))
    read = 0
    for _ in range(100):
        try:
            messages.decode(msgspec.json.encode(maker.valid(kind)), kind)
        except messages.Unreadable:
            continue
        read += 1
    assert read > 90
