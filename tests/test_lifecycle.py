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
    Tried,
    delayed_until,
    end_attempt,
    exhausted,
    expiry_text,
    has_expired,
    last_alone,
    lease_deadline_ns,
    lease_seconds,
    meets,
    move,
    window_problem,
)
from mqworker.messages import Reason, Request

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


@pytest.mark.parametrize("result", ["failure", "error"])
def test_a_result_that_the_request_names_is_tried_again_like_one_that_was_lost(result):
    assert ends(result, retry_on=[result]) == ends("lost")
    assert ends(result, retry_on=[result], tried=2).exhausted
    assert ends(result, retry_on=[result], abort_asked=True).event is Event.ABORT
    assert ends("success", retry_on=[result]).event is Event.SUCCEED
    other = {"failure": "error", "error": "failure"}[result]
    assert ends(other, retry_on=[result]) == ends(other)


# ---------------------------------------------------------------- what has no attempt left


def tried(*results):
    return tuple(Tried(number, f"w{number}", result, "why") for number, result in enumerate(results, 1))


@pytest.mark.parametrize(
    ("history", "max_attempts", "alone"),
    [
        ((), 1, False),
        ((), 2, False),
        (("lost",), 2, True),
        (("lost",), 3, False),
        (("lost", "lost"), 3, True),
        (("lost", "failure"), 3, False),
        (("error", "lost"), 3, False),
    ],
)
def test_the_last_attempt_is_alone_if_all_before_it_were_lost(history, max_attempts, alone):
    assert last_alone(tried(*history), max_attempts) is alone


def test_the_reason_of_a_request_that_has_no_attempt_left_tells_how_each_ended():
    reason = exhausted(Reason(text="gone", stage="lease"), tried("lost", "failure"), 3)

    assert reason.stage == "lease"
    assert reason.text == (
        "gone (attempt 3 of 3, none is left); before it: attempt 1 on w1: lost, why; attempt 2 on w2: failure, why"
    )


def test_the_reason_of_a_request_that_was_tried_often_is_bounded():
    history = [Tried(number, "w", "lost", "x" * 5000) for number in range(1, 100)]
    text = exhausted(None, history, 100).text

    assert text.startswith(
        "no reason was given (attempt 100 of 100, none is left); before it: 89 more; attempt 90 on w"
    )
    assert len(text) < 3000


# ---------------------------------------------------------------- when it may be granted


def timed(**given):
    return Request(id="00000000-0000-4000-8000-000000000000", task="noop", **given)


def test_a_request_waits_for_its_time_and_expires_at_it():
    assert delayed_until(timed(), 5.0) is None
    assert delayed_until(timed(not_before=7.0), 5.0) == 7.0
    assert delayed_until(timed(not_before=7.0), 7.0) is None
    assert [has_expired(timed(expires_at=7.0), now) for now in (6.9, 7.0, 7.1)] == [False, True, True]
    assert not has_expired(timed(), 1e12)
    assert expiry_text(1_700_000_000.5) == "expired: not granted by 2023-11-14T22:13:20+00:00"


@pytest.mark.parametrize(("begins", "ends_", "right"), [(1.0, 2.0, True), (2.0, 2.0, False), (3.0, 2.0, False)])
def test_a_request_that_expires_before_it_may_begin_is_told_so(begins, ends_, right):
    problem = window_problem(timed(not_before=begins, expires_at=ends_))

    assert (problem is None) is right
    assert right or "expires_at behind not_before" in problem
    assert window_problem(timed(not_before=begins)) is window_problem(timed(expires_at=ends_)) is None
