"""The scheduler's judgement on a real ledger in memory; no broker: the tests carry its messages and turn its clock."""

import pytest

from mqworker.facts import Accept, Grant, Need, Offer
from mqworker.lifecycle import MAX_BACK_OFF, State
from mqworker.messages import (
    Abort,
    Alive,
    Artifact,
    Assign,
    Bye,
    Claim,
    Granted,
    Introduce,
    Outcome,
    Outcomes,
    Probe,
    Reason,
    Relation,
    Request,
    RunRef,
    Void,
    WorkerEvent,
)
from mqworker.pool import LEASE_MARGIN, NAME_IS_FREE_AFTER, SILENCE
from mqworker.scheduler import kept_by
from mqworker.task import Task
from tests.driving import A_SECOND, LEASE, OFFER_TIMEOUT, RETRY_DELAY, TOPOLOGY, Driven, Peer, an_id, restart

# ---------------------------------------------------------------- submissions


def test_a_submission_is_answered_only_behind_the_commit_and_in_its_order(driven):
    good = Request(id=an_id(101), task="noop")
    bad = Request(id=an_id(102), task="noop", data={"duration": -1})
    nobody = Request(id=an_id(103), task="nope")
    driven.submit(good, bad, nobody)
    assert driven.receipts == []
    driven.turn()

    [receipt] = driven.receipts
    assert [(one.id, one.status) for one in receipt.results] == [
        (good.id, "accepted"),
        (bad.id, "rejected"),
        (nobody.id, "rejected"),
    ]
    assert "duration" in receipt.results[1].reason
    assert "'nope'" in receipt.results[2].reason
    assert driven.states(good.id, bad.id, nobody.id) == ["pending", "rejected", "rejected"]
    assert driven.request_events() == ["accept", "reject", "reject"]


def test_the_same_id_is_known_with_the_same_content_and_a_conflict_with_other_whatever_its_state(driven, anna):
    request = Request(id=an_id(101), task="noop")
    other = Request(id=an_id(101), task="noop", data={"duration": 1})
    driven.submit(request, request, other)
    driven.turn()
    statuses = [[one.status for one in driven.receipts.pop().results]]
    ref = anna.run(request.id)
    for _ in range(2):
        driven.submit(request, other)
        driven.turn()
        statuses.append([one.status for one in driven.receipts.pop().results])
        if driven.states(request.id) == ["running"]:
            anna.end(ref)

    assert statuses == [["accepted", "known", "conflict"], ["known", "conflict"], ["known", "conflict"]]
    assert driven.states(request.id) == ["success"]
    assert len(driven.take_tickets()) == 1


def test_what_the_ledger_has_rejected_stays_so_and_is_never_offered(driven, anna):
    bad = Request(id=an_id(101), task="noop", data={"duration": -1})
    driven.submit(bad)
    driven.turn()
    driven.submit(bad)
    driven.turn()

    assert [one.results[0].status for one in driven.receipts] == ["rejected", "rejected"]
    assert driven.take_tickets() == []
    assert anna.hear() == []


def test_a_request_that_a_slot_waits_for_is_accepted_and_offered_in_one_transaction(driven, anna):
    one = driven.request()
    kinds = [[type(write) for write in writes] for writes in driven.sets if writes]

    assert kinds == [[Need, Accept, Offer]]
    [(queue, ticket)] = driven.take_tickets()
    assert (queue, ticket.request.id, ticket.attempt) == (anna.queue, one, 1)
    assert driven.states(one) == ["offered"]


def test_inputs_are_checked_at_the_door_and_their_manifests_come_with_the_grant(driven):
    driven.pool.import_artifact(
        an_id(900), Artifact(handle="a", category="test:wood", name="oak"), driven.moment, lambda _: None
    )
    driven.pool.import_artifact(
        an_id(901), Artifact(handle="a", category="test:stone", name="rock"), driven.moment, lambda _: None
    )
    driven.turn()
    anna = Peer(driven, colour="red").join()
    good, missing, wrong = (driven.request("coloured", {"colour": "red", "inputs": [number]}) for number in (1, 99, 2))

    assert driven.states(good, missing, wrong) == ["offered", "rejected", "rejected"]
    assert "99, which does not exist" in driven.view(missing).reason.text
    assert "category test:wood, got artifact 2 of category test:stone" in driven.view(wrong).reason.text
    for _ in range(2):  # said again, the same answer
        anna.claim(good)
        driven.turn()
        [granted] = anna.hear(Granted)
        assert [artifact.name for artifact in granted.inputs] == ["oak"]


def test_a_task_whose_own_code_fails_in_the_scheduler_rejects_its_request_and_hurts_nobody(
    driven, coloured, monkeypatch
):
    def fail(_self, _data):
        raise ZeroDivisionError("its own mistake")

    monkeypatch.setattr(coloured, "configure", fail)
    broken, fine = driven.request("coloured"), driven.request()

    assert driven.states(broken, fine) == ["rejected", "pending"]
    assert "ZeroDivisionError: its own mistake" in driven.view(broken).reason.text


# ---------------------------------------------------------------- offers


def test_age_is_the_order_of_arrival_also_behind_rejected_requests_and_for_what_comes_back(driven, anna):
    """P8."""
    for _ in range(3):
        driven.request("noop", {"duration": -1})
    first, second, third = (driven.request() for _ in range(3))
    assert [ticket.request.id for _, ticket in driven.take_tickets()] == [first]
    anna.refuse(first)
    anna.say(anna.hello(now="other"))  # with this metadata nobody has refused it
    driven.turn()
    anna.follow()
    order = []
    for _ in range(3):
        [(_, ticket)] = driven.take_tickets()
        order.append(ticket.request.id)
        anna.end(anna.run(order[-1]))

    assert order == [first, second, third]


def test_a_request_goes_only_where_it_can_run_and_explains_what_it_waits_for(driven):
    red, blue = Peer(driven, "red", colour="red").join(), Peer(driven, "blue", colour="blue").join()
    wanted = {colour: driven.request("coloured", {"colour": colour}) for colour in ("red", "blue", "green", "raises")}
    for peer in (red, blue):
        peer.follow()

    queues = {ticket.request.id: queue for queue, ticket in driven.take_tickets()}
    assert queues == {wanted["red"]: red.queue, wanted["blue"]: blue.queue}
    assert driven.waits(wanted["red"]) == "is offered to a worker"
    assert driven.waits(wanted["green"]) == "no worker can run it"
    assert "can_run_on() raised KeyError" in driven.waits(wanted["raises"])
    green = Peer(driven, "green", colour="green").join()
    assert [(queue, ticket.request.id) for queue, ticket in driven.take_tickets()] == [(green.queue, wanted["green"])]


def test_a_worker_that_does_not_list_a_task_is_not_even_asked(driven):
    Peer(driven, tasks={"coloured": None}).join()
    one = driven.request()

    assert driven.states(one) == ["pending"]
    assert driven.waits(one) == "no worker can run it"


def test_a_busy_worker_gets_no_ticket_and_a_freed_slot_gets_the_next_at_once(driven, anna):
    first, second = driven.request(), driven.request()
    ref = anna.run(first)
    assert driven.states(first, second) == ["running", "pending"]
    anna.say(anna.beat(ref))
    driven.turn()
    assert driven.states(second) == ["pending"]
    anna.end(ref)

    assert driven.states(first, second) == ["success", "offered"]


def test_an_outcome_that_is_still_in_the_spool_keeps_no_slot(driven, anna):
    first, second = driven.request(), driven.request()
    ref = anna.run(first)
    anna.say(anna.beat(unsettled=[ref]))
    driven.turn()

    assert driven.states(first, second) == ["running", "offered"]
    assert anna.end(ref) == "recorded"


def test_a_worker_that_is_told_of_another_queue_counts_only_once_it_says_so(driven, anna):
    one = Peer(driven, "cora", colour="red")
    one.say(one.hello(), one.beat())
    driven.request("coloured", {"colour": "red"})
    assert driven.take_tickets() == []
    one.queue = one.hear(Assign)[-1].queue
    assert one.queue != anna.queue
    one.say(one.beat())
    driven.turn()

    assert [queue for queue, _ in driven.take_tickets()] == [one.queue]


def test_an_offer_that_nobody_takes_goes_back_and_out_again_and_counts_for_nothing(driven, anna):
    one = driven.request()
    driven.pass_time(OFFER_TIMEOUT - A_SECOND)
    assert len(driven.take_tickets()) == 1
    anna.say(anna.beat())
    driven.pass_time(2 * A_SECOND)
    driven.turn()

    assert [ticket.attempt for _, ticket in driven.take_tickets()] == [1]
    view = driven.view(one)
    assert (view.state, view.attempt, view.attempts) == ("offered", 1, [])


def test_a_ticket_that_the_broker_returns_is_offered_again_behind_a_new_declaration(driven, anna):
    one = driven.request()
    [(queue, _, returned)] = driven.tickets
    driven.tickets.clear()
    driven.queues.discard(queue)  # it has expired
    driven.returned.append(returned)
    driven.turn()

    assert [(again, ticket.request.id) for again, ticket in driven.take_tickets()] == [(queue, one)]
    assert queue in driven.queues
    driven.returned.append(returned)  # the late word on the first ticket
    anna.claim(one)
    driven.turn()
    driven.returned.append(returned)  # ... counts for nothing once it runs
    driven.turn()
    assert driven.states(one)[0] in ("offered", "running")


def test_a_returned_ticket_of_a_request_that_runs_or_has_ended_changes_nothing(driven, anna):
    one = driven.request()
    [(_, _, returned)] = driven.tickets
    ref = anna.run(one)
    driven.returned.append(returned)
    driven.turn()
    assert driven.states(one) == ["running"]
    anna.end(ref)
    driven.returned.append(returned)
    driven.turn()

    assert driven.states(one) == ["success"]


def test_a_returned_ticket_of_an_earlier_attempt_does_not_take_back_a_later_offer(driven, anna):
    one = driven.request()
    [(_, _, returned)] = driven.tickets
    anna.end(anna.run(one), "handed_back")
    assert [ticket.attempt for _, ticket in driven.take_tickets()] == [1, 2]
    driven.returned.append(returned)
    driven.turn()

    assert driven.take_tickets() == []
    assert driven.states(one) == ["offered"]


# ---------------------------------------------------------------- claims


def test_of_two_claims_one_is_granted_also_in_one_set(driven, anna, bert):
    one = driven.request()
    first, second = anna.claim(one), bert.claim(one)
    driven.turn()

    assert [(part.token, part.lease) for part in anna.hear(Granted)] == [(first.token, LEASE)]
    assert [part.token for part in bert.hear(Void)] == [second.token]
    assert driven.view(one).worker == "anna"
    late = bert.claim(one, token="late")  # noqa: S106  # a token of a claim
    driven.turn()
    assert [part.token for part in bert.hear(Void)] == [late.token]


def test_two_tokens_of_one_worker_are_two_claims(driven, anna):
    one = driven.request()
    tokens = [anna.claim(one, token=token).token for token in ("t1", "t2")]
    driven.turn()
    parts = anna.hear((Granted, Void))

    assert [(type(part), part.token) for part in parts] == [(Granted, tokens[0]), (Void, tokens[1])]


@pytest.mark.parametrize("between", [True, False])
def test_the_same_token_again_is_granted_again_and_told_once(driven, anna, between):
    one = driven.request()
    anna.claim(one)
    if between:
        driven.turn()
    anna.claim(one)
    driven.turn()

    assert [part.request for part in anna.hear(Granted)] == [one, one]
    assert driven.request_events() == ["accept", "grant"]
    assert len(driven.view(one).attempts) == 1
    assert sum(isinstance(write, Grant) for writes in driven.sets for write in writes) == 1 + (not between)


def test_claims_that_cannot_be_granted_are_void_each_for_its_reason(driven, anna):
    done = driven.request()
    anna.end(anna.run(done))
    pending = driven.request("coloured", {"colour": "none has it"})
    lost = driven.request()
    anna.end(anna.run(lost), "lost")
    driven.pass_time(RETRY_DELAY)
    anna.say(anna.beat())
    driven.turn()
    assert driven.view(lost).attempt == 2
    for request in (done, pending, an_id(999), lost):
        anna.claim(request, 1)
    driven.turn()
    reasons = {part.request: part.reason for part in anna.hear(Void)}

    assert set(reasons) == {done, pending, an_id(999), lost}
    assert "has ended" in reasons[done]
    assert "pending, not offered" in reasons[pending]
    assert "attempt 1 is over" in reasons[lost]


@pytest.mark.parametrize(("others", "then"), [((), "pending"), (("bert",), "offered")], ids=["alone", "beside-bert"])
def test_a_worker_whose_metadata_changed_after_the_offer_is_not_granted_it(driven, others, then):
    """P6; the offer goes back, also if another worker of its class could take it."""
    for name in others:
        Peer(driven, name, colour="red").join()
    anna = Peer(driven, colour="red").join()
    one = driven.request("coloured", {"colour": "red"})
    anna.say(anna.hello(colour="blue"))
    anna.claim(one)
    driven.turn()

    assert [part.request for part in anna.hear(Void)] == [one]
    assert driven.states(one) == [then]


def test_a_claim_by_metadata_that_the_scheduler_has_not_seen_waits_for_a_hello(driven, anna):
    one = driven.request()
    hello = anna.hello(something="new")
    anna.claim(one)
    driven.turn()
    assert [type(part) for part in anna.hear()] == [Introduce]
    anna.say(hello)
    anna.claim(one)
    driven.turn()

    assert len(anna.hear(Granted)) == 1


# ---------------------------------------------------------------- refusals


def test_a_refusal_by_metadata_that_the_scheduler_has_not_seen_waits_for_a_hello(driven, anna, bert):
    one = driven.request()
    hello = anna.hello(now="other")
    anna.refuse(one)
    driven.turn()
    assert [type(part) for part in anna.hear()] == [Introduce]
    assert driven.states(one) == ["offered"]
    anna.say(hello)
    anna.refuse(one)
    driven.turn()

    assert [part.token for part in anna.hear(Void)] == ["refused"]
    bert.follow()
    assert [ticket.request.id for _, ticket in driven.take_tickets()] == [one, one], "now it goes to another"


def test_each_hello_has_its_class_queue_made_again_for_it_may_have_gone(driven, anna):
    driven.queues.clear()
    anna.say(anna.hello())
    driven.turn()

    assert driven.queues == {anna.queue}


def test_a_refused_request_goes_to_another_worker_and_not_back_to_who_refused_it(driven, anna, bert):
    one = driven.request()
    anna.refuse(one)
    driven.turn()
    assert [part.request for part in anna.hear(Void)] == [one]
    driven.take_tickets()
    for peer in (anna, bert):
        peer.follow()

    assert [queue for queue, _ in driven.take_tickets()] == [bert.queue]
    assert anna.queue != bert.queue
    anna.claim(one)  # as if it had the old ticket still
    driven.turn()
    assert anna.hear(Granted) == []
    assert driven.view(one).attempt == 1


def test_a_refusal_counts_for_this_request_and_these_metadata_alone(driven, anna):
    one = driven.request()
    anna.refuse(one)
    driven.turn()
    assert driven.waits(one) == "every worker that could run it has declined it"
    same = driven.request()  # the very same data
    anna.end(anna.run(same))
    assert driven.states(one, same) == ["pending", "success"]
    anna.say(anna.hello(disk="fixed"))
    driven.turn()
    anna.follow()

    assert driven.states(one) == ["offered"]
    anna.refuse(one)
    driven.turn()
    assert driven.states(one) == ["pending"]


def test_a_refusal_by_two_workers_in_one_set_is_remembered_of_both(driven, anna, bert):
    one = driven.request()
    anna.refuse(one)
    bert.refuse(one)
    driven.turn()
    for peer in (anna, bert):
        peer.follow()

    assert driven.states(one) == ["pending"]
    assert driven.waits(one) == "every worker that could run it has declined it"
    Peer(driven, "cora").join()
    assert driven.states(one) == ["offered"]


def test_a_late_refusal_takes_nothing_from_who_runs_it(driven, anna, bert):
    one = driven.request()
    anna.run(one)
    bert.refuse(one)
    driven.turn()

    assert driven.states(one) == ["running"]
    assert len(bert.hear(Void)) == 1


# ---------------------------------------------------------------- leases


def test_a_lease_lapses_only_once_a_probe_sent_after_its_deadline_has_come_back(driven, anna):
    one = driven.request()
    anna.run(one)
    driven.pass_time(LEASE)  # the margin is not over
    assert not [write for writes in driven.sets for write in writes if getattr(write, "result", None) == "lost"]
    driven.pass_probes()  # that of the silent worker
    assert driven.states(one) == ["running"]
    driven.pass_time(LEASE_MARGIN + A_SECOND)
    assert driven.states(one) == ["running"]
    driven.pass_time(1000.0)
    assert driven.states(one) == ["running"]
    assert len(driven.probes) == 1  # and not one more with each turn
    driven.pass_probes()

    view = driven.view(one)
    assert (view.state, view.attempt, view.attempts[0].result) == ("pending", 2, "lost")
    assert "lost on anna" in view.attempts[0].reason.text
    assert driven.request_events()[-1] == "retry"


def test_a_heartbeat_that_comes_before_the_probe_saves_the_run(driven, anna):
    one = driven.request()
    ref = anna.run(one)
    driven.pass_time(LEASE + LEASE_MARGIN + A_SECOND)
    anna.say(anna.beat(ref))
    driven.pass_probes()
    driven.turn()

    assert driven.states(one) == ["running"]
    assert [part.void for part in anna.hear(Alive)] == [[]]
    assert driven.worker("anna").state == "online"
    driven.pass_time(LEASE)
    driven.pass_probes()
    assert driven.states(one) == ["running"]  # a full term from the heartbeat on


def test_an_old_probe_or_one_of_an_older_term_ends_no_lease(driven, anna):
    one = driven.request()
    ref = anna.run(one)
    driven.pass_time(LEASE + LEASE_MARGIN + A_SECOND)
    [(old, _)] = driven.probes
    driven.probes.clear()
    anna.say(anna.beat(ref))
    driven.turn()
    driven.pass_time(LEASE + LEASE_MARGIN + A_SECOND)  # overdue again, with a probe of its own
    others = [Probe(term=term, number=99, secret="guessed") for term in (0, 1)]  # noqa: S106  # no password
    driven.inbox += [old, *others]
    driven.turn()

    assert driven.states(one) == ["running"]
    driven.pass_probes()
    assert driven.states(one) == ["pending"]


@pytest.mark.parametrize("how", ["returned", "disconnected"])
def test_a_probe_that_was_not_published_is_sent_anew(driven, anna, how):
    one = driven.request()
    anna.run(one)
    driven.pass_time(LEASE + LEASE_MARGIN + A_SECOND)
    [(_, returned)] = driven.probes
    driven.probes.clear()
    if how == "returned":
        driven.returned.append(returned)
    else:
        driven.pool.disconnected()
    driven.turn()

    assert len(driven.probes) == 1
    driven.pass_probes()
    assert driven.states(one) == ["pending"]


def test_a_ledger_that_stalls_lapses_nothing(driven, anna):
    one, two = driven.request(), driven.request()
    ref = anna.run(one)
    driven.request()
    anna.say(anna.beat(ref))
    driven.turn(commit_seconds=10 * LEASE)
    anna.say(anna.beat(ref))  # what came meanwhile is read first
    driven.turn()
    driven.pass_probes()
    assert driven.states(one) == ["running"]
    anna.end(ref)
    second = anna.claim(two)
    driven.turn(commit_seconds=10 * LEASE)  # granted, and told long after
    anna.say(anna.beat(claiming=[second]))
    driven.turn()
    driven.pass_probes()

    assert driven.states(one, two) == ["success", "running"]


def test_the_lease_is_the_requests_else_its_tasks(driven):
    anna = Peer(driven, slots=2, colour="red").join()
    for request, lease in (
        (driven.request("coloured", {"colour": "red"}), 20.0),
        (driven.request("coloured", {"colour": "red"}, lease=7.0), 7.0),
    ):
        anna.claim(request)
        driven.turn()
        assert [part.lease for part in anna.hear(Granted)] == [lease]


def test_a_run_that_no_list_names_is_lost_at_once_and_one_that_any_names_is_not(driven):
    anna = Peer(driven, slots=4).join()
    refs = [anna.run(driven.request()) for _ in range(4)]
    anna.say(anna.beat(refs[0], claiming=[refs[1]], unsettled=[refs[2]], slots=4))
    driven.turn()

    assert driven.states(*(ref.request for ref in refs)) == ["running", "running", "running", "pending"]
    assert driven.view(refs[3].request).attempts[0].result == "lost"


def test_a_heartbeat_in_the_report_of_the_claim_itself_does_not_lose_the_run(driven, anna):
    one = driven.request()
    ref = RunRef(request=one, attempt=1, token="t")  # noqa: S106  # a token of a claim
    claim = Claim(request=one, attempt=1, token="t", metadata_version=1)  # noqa: S106  # a token of a claim
    anna.say(anna.beat(claiming=[ref]), claim)
    driven.turn()
    anna.say(anna.beat(claiming=[ref]), claim)  # said again before the answer came
    driven.turn()
    anna.say(anna.beat(ref))
    driven.turn()

    assert driven.states(one) == ["running"]


def test_runs_that_the_scheduler_does_not_know_are_void(driven, anna):
    one = driven.request()
    ref = anna.run(one)
    strange = RunRef(request=an_id(999), attempt=1, token="strange")  # noqa: S106  # a token of a claim
    former = RunRef(request=one, attempt=1, token="former")  # noqa: S106  # a token of a claim
    anna.say(anna.beat(ref, strange, former))
    driven.turn()

    [alive] = anna.hear(Alive)
    assert alive.void == [strange, former]
    assert alive.seq == anna.seq


def test_a_restarted_worker_loses_what_its_predecessor_ran_but_not_what_is_in_the_spool(driven):
    anna = Peer(driven, slots=2).join()
    kept, gone = (anna.run(driven.request()) for _ in range(2))
    again = Peer(driven, slots=2, incarnation=2)
    again.say(again.beat(unsettled=[kept]))
    driven.turn()
    assert [type(part) for part in again.hear()] == [Introduce]  # who knows what it can do?
    assert driven.states(kept.request, gone.request) == ["running", "running"]
    again.say(again.hello(), again.beat(unsettled=[kept]))
    driven.turn()

    assert driven.states(kept.request, gone.request) == ["running", "pending"]
    assert again.end(kept) == "recorded"
    assert driven.states(kept.request) == ["success"]


# ---------------------------------------------------------------- workers


def test_a_silent_worker_goes_offline_only_behind_a_probe_and_its_runs_keep_their_leases(driven, anna):
    one = driven.request()
    ref = anna.run(one)
    driven.pass_time(SILENCE + A_SECOND)
    assert driven.worker("anna").state == "online"
    driven.pass_probes()
    assert driven.worker("anna").state == "offline"
    assert driven.states(one) == ["running"]
    two = driven.request()
    assert driven.waits(two) == "no worker can run it"
    anna.hear()
    anna.say(anna.beat(ref))  # it is back
    driven.turn()

    assert driven.worker("anna").state == "online"
    assert [part.queue is not None for part in anna.hear(Assign)][-1:] == [True]
    assert driven.waits(two) == "all that can run it are busy; it is next"
    assert anna.end(ref) == "recorded"
    assert [event.event for event in driven.events if isinstance(event, WorkerEvent)] == ["online", "offline", "online"]


def test_offers_to_a_class_whose_last_worker_left_go_back_at_once(driven, anna):
    one = driven.request()
    anna.say(Bye(reason="stopped"))
    driven.turn()

    assert driven.states(one) == ["pending"]
    assert driven.worker("anna").reason == "stopped"
    assert anna.queue not in driven.queues
    bert = Peer(driven, "bert").join()
    assert bert.queue != anna.queue  # names are never used twice
    assert driven.states(one) == ["offered"]


def test_a_worker_that_left_gives_its_class_no_credit(driven, anna, bert):
    assert anna.queue == bert.queue
    anna.say(Bye(reason="stopped"))
    driven.turn()

    assert driven.states(driven.request(), driven.request()) == ["offered", "pending"]


def test_a_queue_of_an_earlier_term_is_deleted_once_its_worker_consumes_another(driven, anna):
    again = restart(driven)
    moved = Peer(again)
    moved.seq, moved.queue = anna.seq, anna.queue
    deleted = []
    for _ in range(3):
        moved.say(moved.hello(), moved.beat())
        again.queues.add(anna.queue)
        again.turn()
        deleted.append(anna.queue not in again.queues)
        for part in moved.hear(Assign):
            moved.queue = part.queue

    assert deleted == [False, True, False]
    assert moved.queue in again.queues


def test_no_worker_can_have_a_queue_deleted_that_is_no_class_of_workers(driven, anna):
    for queue in (TOPOLOGY.submit_queue().name, "a stranger's", anna.queue):
        own = Peer(driven, "bert")
        own.queue = queue
        driven.queues.add(queue)
        own.say(own.hello(), own.beat())
        driven.turn()
        own.follow()
        own.say(Bye(reason="stopped"))
        driven.turn()
        assert queue in driven.queues


def test_a_worker_that_left_is_unknown_until_it_introduces_itself(driven, anna):
    anna.say(Bye(reason="stopped"))
    driven.turn()
    one = driven.request()
    again = Peer(driven, incarnation=2)
    again.claim(one)
    driven.turn()

    assert [type(part) for part in again.hear()] == [Introduce]


def test_a_worker_with_another_store_is_refused_and_told_why(driven):
    one = driven.request()
    anna = Peer(driven, store="elsewhere").join()
    anna.say(anna.beat())
    driven.turn()

    parts = anna.hear(Assign)
    assert parts
    assert all(part.queue is None and "elsewhere" in part.reason for part in parts)
    assert driven.worker("anna").state == "refused"
    assert driven.states(one) == ["pending"]
    anna.claim(one)
    driven.turn()
    assert len(anna.hear(Void)) == 1
    good = Peer(driven, incarnation=2).join()
    assert driven.worker("anna").state == "online"
    assert driven.states(one) == ["offered"]
    assert good.queue is not None


def test_reports_that_are_older_than_the_newest_are_dropped(driven, anna):
    one = driven.request()
    ref = anna.run(one)
    anna.say(anna.beat(), seq=anna.seq)  # of before the claim; it would lose the run
    former = Peer(driven, incarnation=0)
    former.say(former.hello(), Bye(reason="late"), seq=1000)
    driven.turn()

    assert driven.states(one) == ["running"]
    assert driven.worker("anna").state == "online"
    [word] = former.hear()  # it may be there in two copies: then it must know
    assert (word.queue, "one worker of the name anna" in word.reason) == (None, True)
    anna.say(anna.beat(ref))
    driven.turn()
    assert len(anna.hear(Alive)) == 1


def test_a_back_off_is_no_longer_than_it_may_be_though_the_clock_was_set_back_before_a_restart(driven, anna):
    one = driven.request()
    anna.end(anna.run(one), "lost")
    again = Driven(driven.ledger, term=2)
    again.steady = -36000.0
    again.pool.restore(kept_by(again.ledger), again.moment)
    anna = Peer(again, incarnation=2).join()
    again.pass_time(MAX_BACK_OFF + 1)
    anna.say(anna.beat())
    again.turn()

    assert again.states(one) == ["offered"]


def test_of_two_workers_with_one_name_the_second_is_refused_until_the_first_is_silent(driven, anna):
    one = driven.request()
    ref = anna.run(one)
    second = Peer(driven, incarnation=5, home="other")
    second.say(second.hello(), second.beat())
    driven.turn()
    [word] = second.hear()
    assert (word.queue, "another one, on the host anna, has it" in word.reason) == (None, True)
    second.say(Bye(reason="stopped"))
    driven.turn()
    assert (driven.worker("anna").state, driven.states(one)) == ("online", ["running"])

    driven.pass_time(NAME_IS_FREE_AFTER)
    second.say(second.hello(), second.beat())
    driven.turn()
    assert second.hear(Assign)[-1].queue is not None
    # The run of the first may go on, for all that the second knows: its lease has to lapse.
    assert driven.states(one) == ["running"]
    anna.say(anna.beat(ref))
    driven.turn()
    assert [word.queue for word in anna.hear(Assign)] == [None]


def test_a_successor_in_the_same_state_directory_takes_over_at_once_and_one_with_a_lower_number_where_it_was_lost(
    driven,
):
    first = Peer(driven, incarnation=7, home="one").join()
    one = driven.request()
    ref = first.claim(one, token="one-1")  # noqa: S106  # a token of a claim
    driven.turn()
    assert [part.token for part in first.hear(Granted)] == [ref.token]
    again = Peer(driven, incarnation=8, home="one").join()
    assert driven.view(one).attempts[0].result == "lost"

    again.say(Bye(reason="stopped"))
    driven.turn()
    Peer(driven, incarnation=2, home="two").join()
    assert driven.worker("anna").state == "online"


def test_fresh_metadata_are_asked_of_those_named_or_of_all_that_are_there(driven, anna, bert):
    gone = Peer(driven, "gone").join()
    gone.say(Bye(reason="stopped"))
    driven.turn()
    driven.pool.refresh(["bert"])
    driven.turn()
    assert [len(peer.hear(Introduce)) for peer in (anna, bert, gone)] == [0, 1, 0]
    driven.pool.refresh([])
    driven.turn()

    assert [len(peer.hear(Introduce)) for peer in (anna, bert, gone)] == [1, 1, 0]


def test_what_is_shown_of_a_run_is_what_its_worker_said_last(driven, anna):
    one = driven.request()
    ref = anna.run(one)
    anna.say(anna.beat(ref))
    driven.turn()
    driven.pool.views.show(driven.steady)

    assert driven.pool.views.decorate(driven.view(one)).progress.stage == "build"
    [run] = driven.worker("anna").running
    assert (run.request, run.stage) == (one, "build")
    assert "token" not in run.__struct_fields__, "who knows it could speak for the run"
    value = driven.pool._metrics.registry.get_sample_value
    assert value("mqworker_requests", {"state": "running"}) == 1
    assert value("mqworker_workers", {"state": "online"}) == 1
    assert value("mqworker_capability_classes") == 1


# ---------------------------------------------------------------- the end of attempts


def lose(driven, peer, request, attempt):
    ref = peer.run(request, attempt)
    peer.say(peer.beat())  # it does not know it any more
    driven.turn()
    peer.hear()
    return ref


def test_a_lost_run_is_tried_again_later_and_later_and_ends_in_error_with_its_history(driven, anna):
    one = driven.request()
    for attempt, delay in ((1, RETRY_DELAY), (2, 2 * RETRY_DELAY)):
        lose(driven, anna, one, attempt)
        assert driven.waits(one) == "waits out the delay before its next attempt"
        driven.pass_time(delay - A_SECOND)
        assert driven.states(one) == ["pending"]
        anna.say(anna.beat())
        driven.pass_time(2 * A_SECOND)
        assert driven.states(one) == ["offered"]
    lose(driven, anna, one, 3)

    view = driven.view(one)
    assert view.state == "error"
    assert "attempt 3 of 3, none is left" in view.reason.text
    assert [(attempt.number, attempt.worker, attempt.result) for attempt in view.attempts] == [
        (number, "anna", "lost") for number in (1, 2, 3)
    ]


def test_what_is_handed_back_counts_for_nothing_and_is_offered_at_once(driven, anna):
    one = driven.request(max_attempts=1)
    for attempt in (1, 2, 3):
        anna.end(anna.run(one, attempt), "handed_back")
        assert driven.states(one) == ["offered"]
    anna.end(anna.run(one, 4), "failure", reason=Reason(text="it does not compile"))

    view = driven.view(one)
    assert (view.state, view.reason.text) == ("failure", "it does not compile")
    assert [attempt.counted for attempt in view.attempts] == [False, False, False, True]


def test_what_was_handed_back_leaves_all_attempts_to_what_comes_after(driven, anna):
    one = driven.request(max_attempts=2)
    anna.end(anna.run(one, 1), "handed_back")
    anna.end(anna.run(one, 2), "lost")
    assert driven.waits(one) == "waits out the delay before its next attempt"
    driven.pass_time(RETRY_DELAY)
    anna.end(anna.run(one, 3), "lost")

    assert driven.states(one) == ["error"]
    assert "attempt 2 of 2" in driven.view(one).reason.text


def test_a_verdict_that_means_try_again_is_tried_again(driven, anna):
    one = driven.request(max_attempts=2)
    anna.end(anna.run(one), "failure", again=True)
    assert driven.states(one) == ["pending"]
    driven.pass_time(RETRY_DELAY)
    anna.end(anna.run(one, 2), "failure", again=True, reason=Reason(text="given back"))

    view = driven.view(one)
    assert view.state == "failure"
    assert view.reason.text == (
        "given back (attempt 2 of 2, none is left); before it: attempt 1 on anna: failure, no reason was given"
    )


def test_a_strangers_spelling_of_a_task_makes_no_label(driven, anna):
    anna.end(anna.run(driven.request("NoOp")))

    value = driven.pool._metrics.registry.get_sample_value
    assert value("mqworker_request_run_seconds_count", {"task": "noop", "result": "success"}) == 1
    assert value("mqworker_request_wait_seconds_count", {"task": "noop"}) == 1
    assert value("mqworker_request_events_total", {"task": "noop", "event": "grant"}) == 1


def test_an_outcome_is_answered_the_same_each_time_and_counts_once(driven, anna):
    one = driven.request()
    ref = anna.run(one)

    assert [anna.end(ref) for _ in range(3)] == ["recorded"] * 3
    assert driven.request_events() == ["accept", "grant", "succeed"]


def test_an_outcome_that_comes_too_late_is_history_and_one_of_nobody_is_unknown(driven, anna):
    one = driven.request()
    ref = lose(driven, anna, one, 1)
    strange = RunRef(request=one, attempt=1, token="strange")  # noqa: S106  # a token of a claim
    nowhere = RunRef(request=an_id(999), attempt=1, token="t")  # noqa: S106  # a token of a claim

    assert anna.end(ref) == "refused"
    assert anna.end(strange) == "unknown"
    assert anna.end(nowhere) == "unknown"
    assert driven.states(one) == ["pending"]


def test_an_outcome_and_the_lapse_of_its_lease_in_one_set_end_the_run_once(driven, anna):
    """Whichever is judged first counts; memory and ledger agree."""
    one = driven.request()
    ref = anna.run(one)
    outcome = Outcome(request=one, attempt=1, token=ref.token, result="success", started=1.0, ended=2.0)
    driven.inbox.append(Outcomes(worker="anna", epoch=anna.epoch, outcomes=[outcome, outcome]))
    anna.say(anna.beat())
    driven.turn()

    assert driven.states(one) == ["success"]
    assert driven.request_events() == ["accept", "grant", "succeed"]
    assert driven.worker("anna").state == "online"
    anna.say(anna.beat())
    driven.turn()
    assert driven.states(driven.request()) == ["offered"]


def test_an_outcome_that_contradicts_itself_ends_its_request_in_error_here_too(driven, anna):
    one, two = driven.request(), driven.request()
    artifact = Artifact(
        handle="a", category="test:wood", name="oak", relations=[Relation(type="relates-to", target=4711)]
    )

    assert anna.end(anna.run(one), artifacts=[artifact]) == "recorded"
    assert driven.states(one, two) == ["error", "offered"]
    assert driven.request_events()[-1] == "err"


# ---------------------------------------------------------------- aborts


def test_an_abort_ends_at_once_what_does_not_run(driven, anna):
    offered, pending = driven.request(), driven.request()
    delayed = driven.request("coloured", {"colour": "none"})
    assert driven.states(offered, pending, delayed) == ["offered", "pending", "pending"]
    for request in (offered, pending, delayed):
        driven.abort(request)
    driven.turn()
    assert driven.states(offered, pending, delayed) == ["aborted"] * 3
    assert driven.view(pending).reason.text == "not wanted"
    anna.claim(offered)
    driven.turn()

    assert "has ended" in anna.hear(Void)[0].reason
    assert driven.states(driven.request()) == ["offered"]  # the slot is nobody's


def test_an_abort_of_a_running_request_is_said_until_its_outcome_comes(driven, anna):
    one = driven.request()
    ref = anna.run(one)
    driven.abort(one)
    driven.turn()
    assert [(part.token, part.reason) for part in anna.hear(Abort)] == [(ref.token, "not wanted")]
    for _ in range(2):
        anna.say(anna.beat(ref))
        driven.turn()
        assert len(anna.hear(Abort)) == 1
    anna.end(ref, "aborted", reason=Reason(text="stopped", stage="build"))

    view = driven.view(one)
    assert (view.state, view.reason.text, view.reason.stage) == ("aborted", "not wanted", "build")


@pytest.mark.parametrize(("result", "state"), [("success", "success"), ("failure", "failure"), ("lost", "aborted")])
def test_the_workers_own_outcome_stands_against_an_abort_and_a_lost_run_is_aborted(driven, anna, result, state):
    one = driven.request()
    ref = anna.run(one)
    driven.abort(one)
    driven.turn()
    anna.end(ref, result)

    assert driven.states(one) == [state]


def test_an_abort_in_the_set_of_the_claim_reaches_the_run(driven, anna):
    one = driven.request()
    anna.claim(one)
    driven.inbox, later = [], driven.inbox
    for report in later:
        driven.pool.report(report, driven.moment)
    driven.abort(one)
    driven.turn()

    assert [type(part) for part in anna.hear((Granted, Abort))] == [Granted, Abort]


def test_an_abort_before_the_claim_in_one_set_leaves_it_void(driven, anna):
    one = driven.request()
    driven.abort(one)
    anna.claim(one)
    driven.turn()

    assert [type(part) for part in anna.hear((Granted, Void))] == [Void]
    assert driven.states(one) == ["aborted"]


def test_an_abort_while_a_request_is_about_to_be_offered_lets_no_ticket_out(driven, anna):
    first, second = driven.request(), driven.request()
    ref = anna.run(first)
    driven.take_tickets()
    driven.abort(second)  # judged before the outcome, which makes room for it
    anna.end(ref)

    assert driven.take_tickets() == []
    assert driven.states(second) == ["aborted"]


def test_an_abort_for_an_unknown_or_ended_request_changes_nothing(driven, anna):
    one = driven.request()
    anna.end(anna.run(one))
    results = []
    for request in (one, an_id(999)):
        driven.pool.abort(request, "not wanted", driven.moment, results.append)
    driven.turn()

    assert [(result.before, result.after) for result in results] == [(State.SUCCESS, State.SUCCESS), (None, None)]


# ---------------------------------------------------------------- a new scheduler


@pytest.mark.usefixtures("anna")
def test_a_new_scheduler_takes_offers_back_and_keeps_age_and_priority(driven):
    offered, young, urgent = driven.request(), driven.request(), driven.request(priority=1)
    assert driven.states(offered, young, urgent) == ["offered", "pending", "pending"]
    again = restart(driven)
    assert again.states(offered, young, urgent) == ["pending"] * 3
    newest = again.request()
    bert = Peer(again, "bert").join()
    order = []
    for _ in range(4):
        [(_, ticket)] = again.take_tickets()
        order.append(ticket.request.id)
        bert.end(bert.run(order[-1], ticket.attempt))

    assert order == [urgent, offered, young, newest]


def test_a_new_scheduler_names_its_queues_anew(driven, anna):
    again = restart(driven)

    assert Peer(again).join().queue != anna.queue


def test_a_new_scheduler_gives_each_lease_a_full_term_and_outcomes_still_count(driven):
    anna = Peer(driven, slots=2).join()
    reported, forgotten = (anna.run(driven.request()) for _ in range(2))
    driven.pass_time(LEASE - A_SECOND)
    again = restart(driven)
    again.pass_time(LEASE)
    again.pass_probes()
    assert again.states(reported.request, forgotten.request) == ["running", "running"]
    moved = Peer(again, slots=2)  # it has not introduced itself to this scheduler
    moved.seq = anna.seq
    assert moved.end(reported) == "recorded"
    again.pass_time(LEASE_MARGIN + A_SECOND)
    again.pass_probes()

    assert again.states(reported.request, forgotten.request) == ["success", "pending"]


def test_a_new_scheduler_recognises_runs_and_claims_by_their_tokens(driven):
    anna = Peer(driven, slots=2).join()
    ref = anna.run(driven.request())
    other = driven.request()
    assert driven.states(other) == ["offered"]
    unheard = anna.claim(other)
    driven.turn()  # granted, but the answer is lost with the scheduler
    again = restart(driven)
    moved = Peer(again, slots=2)
    moved.seq = anna.seq
    moved.say(moved.hello(), moved.beat(ref, claiming=[unheard]))
    moved.claim(other)
    again.turn()

    assert [part.token for part in moved.hear(Granted)] == [unheard.token]
    assert again.states(ref.request, other) == ["running", "running"]
    moved.say(moved.beat(ref))
    again.turn()
    assert again.states(ref.request, other) == ["running", "pending"]


def test_a_new_scheduler_waits_out_delays_and_goes_on_with_aborts_and_counts(driven, anna):
    one = driven.request(max_attempts=2)
    lose(driven, anna, one, 1)
    two = driven.request()
    ref = anna.run(two)
    driven.abort(two)
    driven.turn()
    again = Driven(driven.ledger, term=2)
    again.steady = driven.steady  # the same wall clock
    again.submitted = driven.submitted
    again.pool.restore(kept_by(driven.ledger), again.moment)
    moved = Peer(again, slots=2)
    moved.seq = anna.seq
    moved.say(moved.hello(), moved.beat(ref))
    again.turn()

    assert len(moved.hear(Abort)) == 1
    assert again.waits(one) == "waits out the delay before its next attempt"
    [queue] = again.pool.class_queues()
    moved.queue = queue.name
    moved.say(moved.beat(ref))
    again.pass_time(RETRY_DELAY)
    assert again.states(one) == ["offered"]
    lose_ref = moved.run(one, 2)
    moved.say(moved.beat(ref))
    again.turn()
    assert lose_ref.attempt == 2
    assert again.states(one) == ["error"]


def test_a_request_whose_task_is_gone_after_a_restart_waits_and_says_so(driven, coloured):
    one = driven.request("coloured", {"colour": "red"})
    del Task._sub_tasks[coloured.name]
    again = restart(driven)
    Peer(again, colour="red").join()

    assert again.states(one) == ["pending"]
    assert again.waits(one) == (
        "this scheduler cannot configure its task any more: "
        "expected the name of a task that this scheduler has, got 'coloured'"
    )
    again.abort(one)
    again.turn()
    assert again.states(one) == ["aborted"]
