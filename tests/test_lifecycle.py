import itertools

import pytest

from mqworker.errors import IllegalMove
from mqworker.lifecycle import (
    FINAL,
    MAX_BACK_OFF,
    MOVES,
    Ending,
    Event,
    State,
    end_attempt,
    lease_deadline_ns,
    lease_seconds,
    meets,
    move,
)

EVERYWHERE = [*itertools.product([None, *State], Event)]


def ends(result, **given):
    defaults = {"again": False, "tried": 0, "max_attempts": 3, "abort_asked": False, "retry_delay": 10.0}
    return end_attempt(result, **defaults | given)


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize(("state", "event"), EVERYWHERE)
def test_a_move_leads_where_the_table_says_and_every_other_one_raises(state, event):
    before = dict(MOVES)
    if (state, event) in MOVES:
        assert move(state, event) is MOVES[state, event]
    else:
        with pytest.raises(IllegalMove, match=f"got {event.value}") as caught:
            move(state, event)
        for start, allowed in MOVES:
            assert start is not state or allowed.value in str(caught.value)

    assert before == MOVES


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        MOVES[State.SUCCESS, Event.RETRY] = State.PENDING


@pytest.mark.parametrize("state", sorted(FINAL))
def test_final_is_final(state):
    assert [event for start, event in MOVES if start is state] == []
    with pytest.raises(IllegalMove, match="it is final"):
        move(state, Event.ABORT)


def test_final_are_exactly_the_states_that_nothing_leaves():
    assert set(State) - {start for start, _ in MOVES} == FINAL


def reachable(state):
    found, rest = set(), [state]
    while rest:
        start = rest.pop()
        for following in [to for (one, _), to in MOVES.items() if one is start]:
            if following not in found:
                found.add(following)
                rest.append(following)
    return found


@pytest.mark.parametrize("state", sorted(set(State) - FINAL))
def test_every_state_that_is_not_final_can_reach_a_final_one_and_can_be_aborted(state):
    assert reachable(state) & FINAL
    assert move(state, Event.ABORT) is State.ABORTED


def test_every_state_can_be_reached_by_a_new_request():
    assert reachable(None) == set(State)


def test_a_request_runs_only_after_it_was_offered_and_ends_with_a_verdict_only_after_it_ran():
    assert [start for (start, _), to in MOVES.items() if to is State.RUNNING] == [State.OFFERED]
    for verdict in (State.SUCCESS, State.FAILURE, State.ERROR):
        assert [start for (start, _), to in MOVES.items() if to is verdict] == [State.RUNNING]


# ---------------------------------------------------------------- what comes after others


@pytest.mark.parametrize("need", ["success", "end"])
@pytest.mark.parametrize("state", sorted(set(State) - FINAL))
def test_a_request_that_has_not_ended_leaves_open_what_comes_after_it(need, state):
    assert meets(need, state) is None


@pytest.mark.parametrize("state", sorted(FINAL))
def test_any_end_is_an_end_and_only_success_is_a_success(state):
    assert meets("end", state) is True
    assert meets("success", state) is (state is State.SUCCESS)


# ---------------------------------------------------------------- how attempts end


@pytest.mark.parametrize(
    ("result", "event", "to"),
    [
        ("success", Event.SUCCEED, State.SUCCESS),
        ("failure", Event.FAIL, State.FAILURE),
        ("error", Event.ERR, State.ERROR),
        ("aborted", Event.ABORT, State.ABORTED),
    ],
)
@pytest.mark.parametrize("tried", [0, 2, 9])
@pytest.mark.parametrize("abort_asked", [False, True])
def test_a_workers_own_verdict_stands_whatever_was_tried_or_asked_before(result, event, to, tried, abort_asked):
    assert ends(result, tried=tried, abort_asked=abort_asked) == Ending(event=event, to=to, counted=True)


@pytest.mark.parametrize(("tried", "delay"), [(0, 10.0), (1, 20.0), (2, 40.0), (50, MAX_BACK_OFF)])
@pytest.mark.parametrize(("result", "again"), [("lost", False), ("failure", True), ("error", True)])
def test_what_was_lost_or_given_back_is_tried_again_later_and_later(result, again, tried, delay):
    ending = ends(result, again=again, tried=tried, max_attempts=100)

    assert ending == Ending(event=Event.RETRY, to=State.PENDING, counted=True, delay=delay)


@pytest.mark.parametrize(
    ("result", "again", "event"),
    [("lost", False, Event.ERR), ("error", True, Event.ERR), ("failure", True, Event.FAIL)],
)
@pytest.mark.parametrize(("tried", "max_attempts"), [(0, 1), (2, 3), (7, 3)])
def test_a_request_that_has_used_up_its_attempts_ends(result, again, event, tried, max_attempts):
    ending = ends(result, again=again, tried=tried, max_attempts=max_attempts)

    assert ending == Ending(event=event, to=MOVES[State.RUNNING, event], counted=True, exhausted=True)


@pytest.mark.parametrize("tried", [0, 2, 50])
def test_an_orderly_stop_never_counts_and_never_waits(tried):
    ending = ends("handed_back", tried=tried)

    assert ending == Ending(event=Event.HAND_BACK, to=State.PENDING, counted=False)


@pytest.mark.parametrize(
    ("result", "again"), [("lost", False), ("handed_back", False), ("failure", True), ("error", True)]
)
@pytest.mark.parametrize("tried", [0, 2])
def test_what_would_be_tried_again_is_aborted_if_that_was_asked_for(result, again, tried):
    ending = ends(result, again=again, tried=tried, abort_asked=True)

    assert ending == Ending(event=Event.ABORT, to=State.ABORTED, counted=True)


def test_a_success_is_a_success_even_if_the_tool_says_again():
    assert ends("success", again=True, abort_asked=True).to is State.SUCCESS


def test_lost_attempts_end_after_max_attempts_and_not_one_earlier():
    tried, endings = 0, []
    while not endings or endings[-1].to is State.PENDING:
        endings.append(ends("lost", tried=tried, max_attempts=3))
        tried += endings[-1].counted

    assert [ending.to for ending in endings] == [State.PENDING, State.PENDING, State.ERROR]


# ---------------------------------------------------------------- leases


@pytest.mark.parametrize(("asked", "lease"), [(None, 60.0), (900.0, 900.0), (5.0, 5.0)])
def test_a_request_may_ask_for_a_lease_of_its_own(asked, lease):
    assert lease_seconds(asked, 60.0) == lease


def test_a_lease_counts_from_when_the_worker_sent_what_was_answered():
    assert lease_deadline_ns(7, 1.5) == 1_500_000_007
