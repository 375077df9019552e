"""How many runs are had ready: none for long ones, enough for short ones, and soon."""

import pytest

from mqworker.pace import AHEAD_SECONDS, MOST_AHEAD, SLOWEST_ANSWER, Pace


def follow(pace, *, each, number, slots=1, now=0.0, seconds=None):
    """Let runs of some length follow each other in some slots; return when the last has ended."""
    for _ in range(number):
        now += each / slots
        pace.ended(each if seconds is None else seconds, now)
    return now


@pytest.mark.parametrize("each", [0.2, 1.0, 3600.0])
def test_nothing_is_had_ready_behind_long_runs(each):
    pace = Pace()
    now = follow(pace, each=each, number=100)

    assert pace.ahead(1, now) == 0


def test_that_long_runs_end_at_the_same_time_is_no_flood():
    pace = Pace()
    for _ in range(100):
        pace.ended(600.0, 5.0)

    assert pace.ahead(100, 5.0) == 0


def test_two_short_runs_are_no_flood_either():
    pace = Pace()
    follow(pace, each=0.001, number=2)

    assert pace.ahead(2, 0.002) == 0


@pytest.mark.parametrize(("each", "slots"), [(0.001, 2), (0.01, 1), (0.02, 4)])
def test_of_short_runs_what_the_slots_end_in_a_moment_is_had_ready(each, slots):
    pace = Pace()
    now = follow(pace, each=each, number=2000, slots=slots)

    assert pace.ahead(slots, now) == pytest.approx(slots * AHEAD_SECONDS / each, abs=1)


def test_it_rises_with_each_round_while_answers_are_slow():
    """From nothing: what is had ready ends in the time that an answer takes, and not before."""
    pace = Pace()
    now, grown = 0.0, [1]
    for _ in range(12):
        now += 0.05
        for _ in range(grown[-1]):
            pace.ended(0.0005, now)
            pace.answered(0.05)
        grown.append(max(1, pace.ahead(2, now)))

    assert grown[-1] > 400
    assert grown[3] == 1 < grown[6] < grown[9]


def test_what_slow_answers_cost_is_had_ready_too_but_no_answer_counts_for_more_than_a_second():
    pace = Pace()
    now = follow(pace, each=0.01, number=1000)
    for _ in range(200):
        pace.answered(3600.0)

    assert pace.ahead(1, now) == pytest.approx((AHEAD_SECONDS + SLOWEST_ANSWER) / 0.01, abs=1)


def test_it_is_forgotten_when_nothing_ends_and_bounded_against_a_clock_that_lies():
    pace = Pace()
    now = follow(pace, each=0.001, number=1000)
    assert pace.ahead(1, now) > 0
    assert pace.ahead(1, now + 3) == 0
    for _ in range(100_000):
        pace.ended(0.0, now)

    assert pace.ahead(1000, now - 3600) == MOST_AHEAD
