"""A funnel in words for people."""

from mqworker import explain
from mqworker.explain import Standing
from mqworker.matching import Funnel, FunnelStep, Offered
from mqworker.tracking import MISSING, WHOLE

COLOUR = ("value", ("colour",))


def step(looked_at, stopped, passed, offered=(), asked=()):
    return FunnelStep(looked_at=looked_at, asked=list(asked), stopped=stopped, passed=passed, offered=list(offered))


def test_a_funnel_in_words_adds_up_and_begins_with_those_that_are_not_here():
    offered = [Offered('"red"', 3, ["a", "b", "c"]), Offered(MISSING, 1, ["d"])]
    funnel = Funnel(
        workers=6,
        steps=[step("task sawing", 0, 6), step(COLOUR, 4, 2, offered, ['"blue"']), step(WHOLE, 1, 1)],
        able=1,
    )
    first, second, third = explain.steps(funnel, offline=["x", "y"])

    assert (first.looked_at, first.stopped, first.passed) == ("is it online", 2, 6)
    assert first.offered[0].examples == ["x", "y"]
    assert (second.looked_at, second.asked, second.stopped, second.passed) == ("colour", ['"blue"'], 4, 2)
    assert [(one.value, one.workers) for one in second.offered] == [('"red"', 3), ("missing", 1)]
    assert third.looked_at == "the metadata as a whole"
    assert sum(one.stopped for one in (first, second, third)) + funnel.able == 6 + 2


def test_a_step_names_a_few_values_and_a_few_of_those_that_are_not_here():
    offered = [Offered(str(number), 1, ["w"]) for number in range(9)]
    first, second = explain.steps(
        Funnel(workers=9, steps=[step(COLOUR, 9, 0, offered)], able=0), offline=[str(number) for number in range(9)]
    )

    assert len(first.offered[0].examples) == explain.MAX_SHOWN
    assert len(second.offered) == explain.MAX_SHOWN


def test_the_verdict_is_what_is_nearest_to_running():
    def verdict(ahead=0, failing=None, **names):
        return explain.verdict(Standing(**{kind: ["w"] for kind in names}), ahead=ahead, failing=failing)

    everything = ("idle", "busy", "paused", "refused", "offline")
    texts = [verdict(2, **dict.fromkeys(everything[number:])) for number in range(6)]
    assert texts == [
        "it can run now",
        "all that can run it are busy; about 2 go first",
        "all that can run it are paused",
        "every worker that could run it has declined it",
        "all that could run it are offline",
        "no worker can run it",
    ]
    assert verdict(busy=1) == "all that can run it are busy; it is next"
    assert verdict(failing="KeyError: 'x'") == "no worker can run it: can_run_on() raised KeyError: 'x'"


def ask(metadata, data):
    return metadata.get("colour") == data["colour"] and metadata.get("memory", 0) >= 8


def test_advice_is_the_smallest_changes_first_of_a_few_workers():
    candidates = [
        ("far", {"colour": "blue", "memory": 1}),
        ("near", {"colour": "red", "memory": 4}),
        ("other", {"colour": "blue", "memory": 9}),
        ("fourth", {"memory": 9}),
        ("never asked", {"colour": "red"}),
    ]
    advice = explain.advice(ask, {"colour": "red"}, candidates, {"colour": ['"red"', '"blue"']})

    assert advice == [
        "on near: set memory to 8",
        'on other: set colour to "red"',
        'on fourth: set colour to "red"',
    ]


def test_there_is_no_advice_where_nothing_would_help():
    assert explain.advice(lambda _metadata, _data: False, {}, [("w", {"colour": "red"})], {}) == []
    assert explain.advice(ask, {"colour": "red"}, [], {}) == []


def test_a_key_that_is_in_the_way_is_to_be_taken_away():
    advice = explain.advice(lambda metadata, _data: "broken" not in metadata, {}, [("w", {"broken": True})], {})

    assert advice == ["on w: take broken away"]


def test_what_workers_have_in_common_is_told_by_value_and_type():
    assert explain.shared([]) == {}
    assert explain.shared([{"a": 1, "b": [1]}]) == {"a": 1, "b": [1]}
    assert explain.shared([{"a": 1, "b": [1], "c": 1, "d": 1}, {"a": True, "b": [1], "c": 1}, {"b": [1], "c": 2}]) == {
        "b": [1]
    }
