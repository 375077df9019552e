"""The life of a request in the pool: when it may be granted, how often it is tried, what ends it from outside."""

import pytest

from mqworker import dispatch
from mqworker.messages import (
    After,
    Assign,
    Drain,
    DrainWorkers,
    Granted,
    Reason,
    Request,
    RequestEvent,
    Void,
    WorkerEvent,
)
from mqworker.pool import DECLARED_AT_ONCE, FORGET, HOURLY, SILENCE, SWEEP
from tests.driving import A_SECOND, RETRY_DELAY, Driven, Peer, an_id, restart

NOT_HERE = "00000000-0000-4000-8000-0000000000ff"


def at(driven, seconds):
    """Return a moment so many seconds from now, as the wall's clock shows it."""
    return driven.moment.wall + seconds


def lose(driven, peer, request, attempt):
    ref = peer.run(request, attempt)
    peer.say(peer.beat())  # it does not know it any more
    driven.turn()
    peer.hear()
    return ref


def meet(driven, peer, ref):
    """Let a worker that runs something meet another scheduler."""
    peer.driven = driven
    peer.say(peer.hello(), peer.beat(ref))
    driven.turn()
    for part in peer.hear(Assign):
        peer.queue = part.queue
    peer.say(peer.beat(ref))
    driven.turn()
    return driven


def offered(driven):
    return [ticket.request.id for _, ticket in driven.take_tickets()]


def ending(driven, request):
    view = driven.view(request)
    return view.state, None if view.reason is None else view.reason.stage


# ---------------------------------------------------------------- not before


def test_a_request_is_not_offered_before_its_time_and_at_it(driven, anna):
    one = driven.request(not_before=at(driven, 30))
    assert driven.waits(one).startswith("is not to be offered before 20")
    driven.pass_time(29)
    anna.say(anna.beat())
    driven.turn()
    assert offered(driven) == []
    driven.pass_time(1.5)

    assert offered(driven) == [one]
    assert anna.end(anna.run(one)) == "recorded"


def test_a_time_that_is_over_delays_nothing(driven, anna):
    assert offered(driven) == []
    one = driven.request(not_before=at(driven, -1))

    assert anna.run(one)
    assert driven.view(one).not_before is None


@pytest.mark.parametrize("before", [True, False])
def test_a_new_scheduler_keeps_to_the_time_of_a_request(driven, before):
    one = driven.request(not_before=at(driven, 5000 if before else 500))
    again = restart(driven)  # a thousand seconds later
    anna = Peer(again).join()
    assert offered(again) == ([] if before else [one])
    again.pass_time(4000)
    anna.say(anna.beat())
    again.turn()

    assert anna.run(one)


@pytest.mark.parametrize("met_first", [True, False])
@pytest.mark.parametrize("restarts", [True, False])
def test_a_request_that_has_a_time_and_needs_another_waits_for_both(driven, anna, met_first, restarts):
    first = driven.request()
    ref = anna.run(first)
    one = driven.request(after=[After(request=first)], not_before=at(driven, 2000 if met_first else 5))
    assert driven.waits(one) == f"waits for {first}"
    if restarts:
        driven = meet(restart(driven), anna, ref)
    else:
        driven.pass_time(10)
    assert driven.pool._held.blocked == 1
    assert one not in driven.pool._entries
    anna.end(ref)
    anna.say(anna.beat())
    driven.turn()
    assert driven.pool._held.blocked == 0
    assert (offered(driven)[-1:] == [one]) is not met_first, "nothing else need happen before it is offered"
    if met_first:
        assert offered(driven)[-1:] != [one]
        driven.pass_time(2100)
        anna.say(anna.beat())
        driven.turn()

    assert anna.run(one)


def test_what_takes_from_another_and_has_a_time_is_counted_once(driven, anna):
    first = driven.request()
    one = driven.request(after=[After(request=first)], not_before=at(driven, 50))
    anna.end(anna.run(first))
    assert driven.pool._dispatch.waiting() == 0
    driven.pass_time(51)

    assert driven.pool._dispatch.waiting() + len(driven.take_tickets()) == 2  # the first one's ticket, and it
    assert driven.states(one) != ["aborted"]


# ---------------------------------------------------------------- expiry


def test_a_request_that_is_not_granted_in_time_is_aborted_then_and_not_only_when_somebody_looks(driven):
    one = driven.request(expires_at=at(driven, 30))
    driven.pass_time(29.9)
    assert driven.states(one) == ["pending"]
    driven.pass_time(0.2)
    view = driven.view(one)

    assert view.state == "aborted"
    assert view.reason == Reason(text="expired: not granted by 2023-11-14T22:30:30+00:00", stage="expiry")
    assert not driven.pool._entries
    assert [event.state for event in driven.events if isinstance(event, RequestEvent)] == ["pending", "aborted"]


def test_an_offer_that_nobody_claims_in_time_expires_and_a_claim_behind_it_is_void(driven, anna):
    one = driven.request(expires_at=at(driven, 5))
    assert offered(driven) == [one]
    driven.steady += 5.5
    ref = anna.claim(one)
    driven.turn()

    assert [part.token for part in anna.hear(Void)] == [ref.token]
    assert ending(driven, one) == ("aborted", "expiry")


def test_a_claim_that_comes_in_time_counts_and_its_run_goes_on(driven, anna):
    one = driven.request(expires_at=at(driven, 5))
    ref = anna.run(one)
    driven.pass_time(10)
    assert driven.states(one) == ["running"]

    assert anna.end(ref) == "recorded"
    assert driven.states(one) == ["success"]


def test_a_request_that_waits_again_after_a_lost_attempt_expires_as_well(driven, anna):
    one = driven.request(expires_at=at(driven, 5))
    ref = anna.run(one)
    driven.pass_time(6)
    anna.say(anna.beat())
    driven.turn()
    driven.pass_time(1)

    assert ref.attempt == 1
    assert ending(driven, one) == ("aborted", "expiry")
    assert not driven.pool._delayed


def test_a_request_that_has_expired_before_it_comes_is_accepted_and_aborted_and_never_offered(driven, anna):
    one = driven.request(expires_at=at(driven, -1))
    driven.pass_time(1)

    assert anna.hear(Granted) == offered(driven) == []
    assert ending(driven, one) == ("aborted", "expiry")
    assert driven.receipts[-1].results[0].status == "accepted"


def test_what_waits_for_others_or_for_its_time_expires_and_what_comes_after_it_is_settled(driven, anna):
    first = driven.request()
    one = driven.request(after=[After(request=first)], expires_at=at(driven, 30))
    two = driven.request(after=[After(request=one)])
    three = driven.request(after=[After(request=one, need="end")])
    four = driven.request(not_before=at(driven, 20), expires_at=at(driven, 20.2))
    driven.pass_time(31)

    assert [ending(driven, request) for request in (one, two, four)] == [
        ("aborted", "expiry"),
        ("aborted", "after"),
        ("aborted", "expiry"),
    ]
    assert driven.pool._held.blocked == 0
    assert anna.end(anna.run(first)) == "recorded"
    assert anna.run(three)


def test_what_only_the_ledger_holds_expires_too(monkeypatch):
    monkeypatch.setattr(dispatch, "LEAST_HEADS", 1)
    monkeypatch.setattr(dispatch, "MOST_HEADS", 1)
    driven = Driven()
    ids = [driven.request(expires_at=at(driven, 30 + number)) for number in range(6)]
    assert len(driven.pool._entries) < 6
    driven.pass_time(33.5)

    assert driven.states(*ids) == ["aborted"] * 4 + ["pending"] * 2
    assert driven.pool._dispatch.waiting() == 2
    driven.pass_time(10)
    assert driven.states(*ids) == ["aborted"] * 6
    assert driven.pool._dispatch.waiting() == 0
    assert not driven.pool._entries


def test_a_new_scheduler_knows_what_expires_and_what_has(driven):
    soon, later, never = (driven.request(expires_at=at(driven, seconds)) for seconds in (500, 1500, 90000))
    again = restart(driven)  # a thousand seconds later
    assert again.states(soon, later, never) == ["aborted", "pending", "pending"]
    again.pass_time(600)

    assert again.states(soon, later, never) == ["aborted", "aborted", "pending"]


def test_the_ledger_is_asked_only_when_something_may_have_expired(driven):
    driven.request(expires_at=at(driven, 1000))
    driven.turn()
    asked = []
    ask = driven.ledger.expired
    driven.ledger.expired = lambda now, limit: asked.append(now) or ask(now, limit)
    for _ in range(10):
        driven.pass_time(10)

    assert asked == []
    driven.pass_time(1000)
    assert len(asked) == 1


def test_more_than_one_answer_has_is_asked_for_again(driven, monkeypatch):
    monkeypatch.setattr("mqworker.pool.EXPIRED_AT_ONCE", 2)
    monkeypatch.setattr("mqworker.scheduler.EXPIRED_AT_ONCE", 2)
    ids = [driven.request(expires_at=at(driven, 5)) for _ in range(5)]
    for _ in range(4):
        driven.pass_time(5)

    assert driven.states(*ids) == ["aborted"] * 5


def test_a_request_that_expires_before_it_may_begin_is_rejected_with_a_word(driven):
    one = driven.request(not_before=at(driven, 30), expires_at=at(driven, 20))
    view = driven.view(one)

    assert view.state == "rejected"
    assert "expires_at behind not_before" in view.reason.text


def test_what_has_expired_takes_nothing_from_its_group(driven, anna):
    first, second = an_id(701), an_id(702)
    driven.submit(
        Request(id=an_id(700), task="noop", group="a", expires_at=at(driven, -1)),
        Request(id=first, task="noop", group="a"),
        Request(id=second, task="noop", group="b"),
    )
    driven.turn()

    assert offered(driven) == [first]
    assert driven.states(an_id(700), second) == ["aborted", "pending"]
    assert anna.run(first)


# ---------------------------------------------------------------- tried again


@pytest.mark.parametrize("result", ["failure", "error"])
def test_a_result_that_the_request_names_is_tried_again_with_its_history_at_the_end(driven, anna, result):
    one = driven.request(retry_on=[result], max_attempts=2)
    anna.end(anna.run(one), result, reason=Reason(text="first"))
    assert driven.states(one) == ["pending"]
    driven.pass_time(RETRY_DELAY)
    anna.end(anna.run(one, 2), result, reason=Reason(text="second"))

    view = driven.view(one)
    assert view.state == result
    assert view.reason.text == (f"second (attempt 2 of 2, none is left); before it: attempt 1 on anna: {result}, first")


def test_a_new_scheduler_tells_the_history_of_an_attempt_that_it_found_running(driven, anna):
    one = driven.request(max_attempts=2)
    lose(driven, anna, one, 1)
    driven.pass_time(RETRY_DELAY + A_SECOND)
    ref = anna.run(one, 2)
    again = meet(restart(driven), anna, ref)
    anna.end(ref, "lost", reason=Reason(text="gone"))

    view = again.view(one)
    assert view.state == "error"
    assert "gone (attempt 2 of 2, none is left); before it: attempt 1 on anna: lost, lost on anna:" in view.reason.text


# ---------------------------------------------------------------- poison


def attempt(driven, peer, request, number):
    """Let the delay pass, and return the ticket of an attempt."""
    driven.pass_time(RETRY_DELAY * 2**number + A_SECOND)
    peer.say(peer.beat())
    driven.turn()
    [ticket] = [ticket for _, ticket in driven.take_tickets() if ticket.attempt == number]
    assert ticket.request.id == request
    return ticket


def test_the_last_attempt_of_what_was_lost_each_time_is_alone(driven, anna):
    one = driven.request(max_attempts=3)
    assert not driven.take_tickets()[0][1].alone
    lose(driven, anna, one, 1)
    assert not attempt(driven, anna, one, 2).alone
    lose(driven, anna, one, 2)
    assert attempt(driven, anna, one, 3).alone
    lose(driven, anna, one, 3)

    view = driven.view(one)
    assert view.state == "error"
    assert "attempt 1 on anna: lost" in view.reason.text
    assert "attempt 2 on anna: lost" in view.reason.text


def test_the_last_attempt_of_what_failed_once_is_like_any_other(driven, anna):
    one = driven.request(max_attempts=3, retry_on=["failure"])
    anna.end(anna.run(one), "failure")
    driven.take_tickets()
    driven.pass_time(RETRY_DELAY + A_SECOND)
    driven.take_tickets()
    lose(driven, anna, one, 2)

    assert not attempt(driven, anna, one, 3).alone


def test_a_worker_that_runs_something_alone_is_offered_nothing_until_it_says_so(driven):
    anna = Peer(driven, slots=2).join()
    one = driven.request(max_attempts=2)
    driven.take_tickets()
    lose(driven, anna, one, 1)
    assert attempt(driven, anna, one, 2).alone
    ref = anna.run(one, 2)
    other = driven.request()
    assert offered(driven) == []
    anna.say(anna.beat(ref, slots=0))
    driven.turn()
    assert offered(driven) == []
    anna.end(ref)
    anna.say(anna.beat())
    driven.turn()

    assert offered(driven) == [other]


# ---------------------------------------------------------------- blame


class Farm:
    """Two workers, of which a test says which one is next."""

    def __init__(self, **settings):
        self.driven = Driven(**settings)
        self.peers = {name: Peer(self.driven, name).join() for name in ("anna", "bert")}

    def only(self, name):
        for other, peer in self.peers.items():
            for part in peer.hear(Assign):
                peer.queue = part.queue
            peer.say(peer.beat(slots=1 if other == name else 0))
        self.driven.turn()
        return self.peers[name]

    def run(self, name, request, result, number=1):
        peer = self.only(name)
        peer.end(peer.run(request, number), result)
        self.driven.pass_time(RETRY_DELAY * 2**number + A_SECOND)

    def fail_on(self, name, other):
        one = self.driven.request(retry_on=["failure"])
        self.run(name, one, "failure")
        self.run(other, one, "success", 2)
        return one

    def paused(self):
        return [event for event in self.driven.events if isinstance(event, WorkerEvent) and event.event == "paused"]


def test_a_worker_on_which_request_after_request_fails_that_passes_elsewhere_is_paused_with_the_reason():
    farm = Farm()
    ids = [farm.fail_on("anna", "bert") for _ in range(2)]
    assert farm.driven.worker("anna").paused is None
    ids.append(farm.fail_on("anna", "bert"))

    assert all(one in farm.driven.worker("anna").paused for one in ids)
    [event] = farm.paused()
    assert (event.worker, event.reason) == ("anna", farm.driven.worker("anna").paused)
    assert farm.driven.worker("bert").paused is None
    again = restart(farm.driven)
    assert [pause.name for pause in again.pool.pauses()] == ["anna"]


def test_a_success_in_between_clears_a_worker():
    farm = Farm()
    for _ in range(2):
        farm.fail_on("anna", "bert")
    farm.run("anna", farm.driven.request(), "success")
    farm.fail_on("anna", "bert")

    assert not farm.paused()


def test_a_worker_that_goes_on_after_a_pause_begins_anew():
    farm = Farm(pause_after=2)
    for _ in range(2):
        farm.fail_on("anna", "bert")
    assert len(farm.paused()) == 1
    farm.driven.pool.resume("worker", "anna", lambda _: None)
    farm.driven.turn()
    farm.fail_on("anna", "bert")
    assert len(farm.paused()) == 1
    farm.fail_on("anna", "bert")

    assert len(farm.paused()) == 2


def test_a_resume_forgets_what_speaks_against_a_worker():
    farm = Farm(pause_after=2)
    farm.fail_on("anna", "bert")
    farm.driven.pool.resume("worker", "anna", lambda _: None)
    farm.driven.turn()
    farm.fail_on("anna", "bert")

    assert not farm.paused()


def test_nobody_is_paused_where_that_is_not_wanted():
    farm = Farm(pause_after=0)
    for _ in range(5):
        farm.fail_on("anna", "bert")

    assert not farm.paused()


# ---------------------------------------------------------------- aborts of what is not there yet


def marked(driven, request, reason="not wanted"):
    results = []
    driven.pool.abort(request, reason, driven.moment, results.append)
    driven.turn()
    return results[0].marked


def test_a_submission_behind_its_abort_arrives_aborted(driven, anna):
    later = driven.request()
    anna.end(anna.run(later))
    assert marked(driven, NOT_HERE)
    assert marked(driven, NOT_HERE, "a second reason")
    driven.submit(Request(id=NOT_HERE, task="noop"))
    driven.turn()
    view = driven.view(NOT_HERE)

    assert (view.state, view.reason) == ("aborted", Reason(text="not wanted", stage="abort"))
    assert NOT_HERE not in driven.pool._entries
    assert NOT_HERE not in offered(driven)
    assert driven.receipts[-1].results[0].status == "accepted"
    assert [event.state for event in driven.events if getattr(event, "request", "") == NOT_HERE] == [
        "pending",
        "aborted",
    ]


def test_an_abort_and_its_submission_in_one_set_end_it_in_either_order(driven):
    early, late = an_id(901), an_id(902)
    driven.abort(early)
    driven.submit(Request(id=early, task="noop"))
    driven.submit(Request(id=late, task="noop"))
    driven.abort(late)
    driven.turn()

    assert driven.states(early, late) == ["aborted"] * 2
    assert not driven.pool._entries
    assert driven.pool._dispatch.waiting() == 0


def test_a_mark_outlives_the_scheduler_and_counts_once(driven):
    marked(driven, NOT_HERE)
    again = restart(driven)
    again.submit(Request(id=NOT_HERE, task="noop", after=[After(request=an_id(1))]))
    again.turn()
    assert again.states(NOT_HERE) == ["rejected"]  # it could not be anyway
    again = restart(again)
    marked(again, an_id(77))
    first = again.request()
    again.submit(Request(id=an_id(77), task="noop", after=[After(request=first)], not_before=at(again, 5)))
    again.submit(Request(id=an_id(78), task="noop", after=[After(request=an_id(77), need="end")]))
    again.turn()

    assert again.states(an_id(77), an_id(78)) == ["aborted", "pending"]
    assert again.pool._held.blocked == 0


def test_a_mark_of_what_does_not_come_is_forgotten_after_a_day(driven):
    marked(driven, NOT_HERE)
    driven.pass_time(FORGET - 10)
    driven.request()
    driven.pass_time(HOURLY + 20)
    driven.submit(Request(id=NOT_HERE, task="noop"))
    driven.turn()

    assert driven.states(NOT_HERE) == ["pending"]


def test_the_reason_of_the_first_abort_stays(driven, anna):
    one = driven.request()
    ref = anna.run(one)
    for reason in ("first", "second"):
        driven.pool.abort(one, reason, driven.moment, lambda _: None)
        driven.turn()
    assert driven.pool._entries[one].abort == "first"
    anna.end(ref, "aborted")

    assert driven.view(one).reason.text == "first"


# ---------------------------------------------------------------- drain


def drain(driven, **given):
    names = []
    driven.pool.drain(DrainWorkers(**given), driven.moment, names.extend)
    driven.turn()
    return names


def test_a_worker_that_is_drained_is_paused_and_told_until_it_says_that_it_drains(driven, anna):
    one = driven.request()
    ref = anna.run(one)
    assert drain(driven, names=["anna"], reason="new kernel", stop=True) == ["anna"]
    told = anna.hear()
    assert Assign(queue=None) in told
    assert Drain(reason="new kernel", stop=True) in told
    assert driven.worker("anna").paused == "drained, to end: new kernel"
    for draining, leaving in ((False, False), (True, False)):
        anna.say(anna.beat(ref, slots=0, draining=draining, leaving=leaving))
        driven.turn()
        assert len(anna.hear(Drain)) == 1
        assert driven.worker("anna").draining is draining
    anna.say(anna.beat(ref, slots=0, draining=True, leaving=True))
    driven.turn()
    assert anna.hear(Drain) == []
    assert anna.end(ref) == "recorded"
    driven.request()

    assert offered(driven) == [one]


def test_a_drain_ends_with_a_resume(driven, anna):
    drain(driven, names=["anna"])
    anna.hear()
    driven.pool.resume("worker", "anna", lambda _: None)
    driven.turn()
    [assign] = anna.hear(Assign)
    assert assign.queue is not None
    anna.say(anna.beat())
    driven.turn()

    assert anna.hear(Drain) == []
    assert driven.worker("anna").paused is None


def test_a_class_and_everybody_can_be_drained(driven, anna):
    bert = Peer(driven, "bert", slots=2).join()
    [name] = driven.pool._matching.names()
    assert driven.pool.unknown_classes([name, "no-such"]) == ["no-such"]
    assert drain(driven, classes=[name]) == ["anna", "bert"]
    assert drain(driven, everybody=True) == ["anna", "bert"]
    assert drain(driven) == []
    assert [driven.worker(peer.name).paused for peer in (anna, bert)] == ["drained"] * 2


# ---------------------------------------------------------------- housekeeping


def test_a_worker_that_is_long_gone_is_forgotten_but_not_while_it_has_a_lease(driven, anna):
    bert = Peer(driven, "bert", noop="x").join()
    one = driven.request()
    [peer] = [peer for peer in (anna, bert) if (peer.queue or "") in {queue for queue, _ in driven.take_tickets()}]
    ref = peer.run(one)
    for _ in range(3):
        driven.pass_time(SILENCE + A_SECOND)
        driven.probes.clear()  # nothing comes back: no lease may lapse
    driven.pass_probes()
    for other in (anna, bert):
        if other is not peer:
            other.say(other.beat())
    driven.turn()
    for name in ("anna", "bert"):
        driven.pool._workers[name].state = "offline"
    driven.pass_time(FORGET + SWEEP + A_SECOND)

    assert [*driven.pool._workers] == [peer.name]
    assert ref.attempt == 1


def test_the_queues_of_classes_are_declared_anew_each_hour_a_few_at_a_time(driven, anna):
    for number in range(DECLARED_AT_ONCE):
        Peer(driven, f"w{number}", colour=f"c{number}").join()
        driven.request("coloured", {"colour": f"c{number}"})
    names = {queue.name for queue in driven.pool.class_queues()}
    assert anna.queue in names
    assert len(names) > DECLARED_AT_ONCE
    driven.queues.clear()
    driven.pool.tick(driven.moment)
    assert driven.pool.declare == []
    driven.steady += HOURLY + A_SECOND
    rounds = []
    while not rounds or rounds[-1]:
        driven.pool.tick(driven.moment)
        rounds.append({queue.name for queue in driven.pool.declare})
        driven.pool.declare = []

    assert max(map(len, rounds)) == DECLARED_AT_ONCE
    assert set().union(*rounds) == names
