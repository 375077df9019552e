"""Whether a queue still gives what is in it, as probes tell."""

import msgspec
import pytest

from mqworker.hearing import AWAY, DEAF, EVERY, Hearing

STEP = AWAY / 2


@pytest.fixture
def hearing():
    return Hearing(term=1, queues=["a", "b"])


def listen(hearing, begin, seconds, *, busy=()):
    """Look often, for so long, and return what was found deaf and when."""
    steady = begin
    while steady <= begin + seconds:
        if found := hearing.deaf(steady, busy):
            return found, steady
        steady += STEP
    return [], steady


def confirmed(hearing, steady):
    """Have probes in all queues."""
    probes = dict(hearing.due(steady))
    assert probes.keys() == {"a", "b"}
    hearing.deaf(steady, ())
    for name, probe in probes.items():
        hearing.confirmed(name, probe, steady)
    return probes


def test_each_queue_has_one_probe_under_way_at_a_time_and_not_too_often(hearing):
    probes = dict(hearing.due(100.0))
    assert not [*hearing.due(100.0 + EVERY)]
    hearing.back("a", probes["a"])
    assert not [*hearing.due(100.0 + EVERY / 2)]
    [(name, probe)] = hearing.due(100.0 + EVERY)
    assert name == "a"
    assert probe != probes["a"]


def test_a_queue_that_keeps_a_probe_for_too_long_is_found(hearing):
    probes = confirmed(hearing, 100.0)
    hearing.back("b", probes["b"])
    found, when = listen(hearing, 100.0, 3 * DEAF)
    assert found == ["a"]
    assert when >= 100.0 + DEAF


def test_whatever_else_comes_shows_that_a_queue_is_well_however_long_it_is(hearing):
    confirmed(hearing, 100.0)
    steady = 100.0
    while steady < 100.0 + 5 * DEAF:
        steady += STEP
        hearing.heard("a", steady)
        hearing.heard("b", steady)
        hearing.heard("of somebody else", steady)
        assert not hearing.deaf(steady, ())


def test_who_did_not_listen_blames_nobody(hearing):
    confirmed(hearing, 100.0)
    assert not hearing.deaf(100.0 + 10 * DEAF, ())
    found, _ = listen(hearing, 100.0 + 10 * DEAF, 2 * DEAF)
    assert sorted(found) == ["a", "b"]


def test_a_queue_is_not_blamed_while_its_consumer_is_busy(hearing):
    probes = confirmed(hearing, 100.0)
    hearing.back("b", probes["b"])
    assert listen(hearing, 100.0, 3 * DEAF, busy=["a"])[0] == []


def test_a_probe_that_the_broker_does_not_have_proves_nothing(hearing):
    probes = dict(hearing.due(100.0))
    assert listen(hearing, 100.0, 3 * DEAF)[0] == []
    for name, probe in probes.items():
        hearing.not_published(name, probe)
    assert dict(hearing.due(100.0 + 3 * DEAF)).keys() == {"a", "b"}


@pytest.mark.parametrize("change", [{"secret": "x"}, {"number": 99}, {"term": 2}])
def test_nobody_else_can_say_that_a_queue_is_well_with_a_probe(hearing, change):
    probes = confirmed(hearing, 100.0)
    hearing.back("b", probes["b"])
    hearing.back("a", msgspec.structs.replace(probes["a"], **change))
    hearing.back("of somebody else", probes["a"])
    assert listen(hearing, 100.0, 3 * DEAF)[0] == ["a"]


def test_new_consumers_begin_anew(hearing):
    probes = confirmed(hearing, 100.0)
    hearing.anew()
    for name, probe in probes.items():
        hearing.confirmed(name, probe, 100.0)  # late
    assert listen(hearing, 100.0, 3 * DEAF)[0] == []
    assert dict(hearing.due(100.0 + 3 * DEAF)).keys() == {"a", "b"}
