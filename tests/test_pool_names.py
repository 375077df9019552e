"""Whose a worker's name is: who speaks in another's counts for nothing."""

from functools import partial

from mqworker.access import Access
from mqworker.errors import Impostor
from mqworker.messages import Assign, Outcome, Outcomes, Recorded, Report, Request
from tests.driving import Peer, an_id, restart


def as_user(driven, user, act):
    """Let a turn pass in which all that is said comes from one of the broker's users; return what was refused."""
    act()
    said, driven.inbox = driven.inbox, []
    refused = []
    for message in said:
        take = driven.pool.outcomes if isinstance(message, Outcomes) else driven.pool.report
        try:
            take(message, driven.moment, user)
        except Impostor as error:
            refused.append(str(error))
    driven.turn()
    return refused


def test_a_name_is_its_first_users_also_for_the_next_scheduler(driven):
    anna = Peer(driven)
    assert as_user(driven, "u1", lambda: anna.say(anna.hello())) == []
    assert driven.worker("anna").user == "u1"
    mallory = Peer(driven, "anna", incarnation=7)

    for _ in range(2):
        [refused] = as_user(driven, "u2", lambda: mallory.say(mallory.hello(colour="red")))
        assert "from the broker's user u1, who was the first" in refused
    assert "colour" not in driven.worker("anna").metadata
    [told, again] = mallory.hear(Assign)
    assert told == again
    assert (told.queue, told.reason) == (None, refused)
    assert [event.event for event in driven.events if getattr(event, "worker", "") == "anna"] == ["online", "impostor"]

    later = restart(driven)
    assert len(as_user(later, None, lambda: later.inbox.append(last_report(mallory)))) == 1
    was = []
    later.pool.forget_worker("anna", None, later.moment, was.append)
    later.turn()
    assert was == [True]
    assert as_user(later, "u2", lambda: later.inbox.append(last_report(mallory))) == []
    assert restart(later).pool._names.user("anna") == "u2"


def last_report(peer):
    return Report(worker=peer.name, epoch=peer.epoch, seq=99, incarnation=peer.incarnation, parts=[peer.hello()])


def test_the_rightful_worker_is_not_told_what_an_impostor_should_hear(driven):
    anna = Peer(driven)
    as_user(driven, "u1", lambda: anna.say(anna.hello()))
    anna.hear()

    [_] = as_user(driven, "u2", lambda: anna.say(anna.hello()))  # with her epoch, as if it were known
    assert anna.hear() == []


def test_an_outcome_of_another_users_run_is_refused_whatever_name_it_comes_under(driven):
    anna, mallory = Peer(driven), Peer(driven, "mallory")
    as_user(driven, "u1", lambda: anna.say(anna.hello(), anna.beat()))
    anna.hear()
    anna.queue = driven.worker("anna").queue or next(iter(driven.queues))
    as_user(driven, "u1", lambda: anna.say(anna.beat()))
    one = driven.request()
    ref = None

    def claim():
        nonlocal ref
        ref = anna.claim(one)

    as_user(driven, "u1", claim)
    assert driven.states(one) == ["running"]
    outcome = Outcome(request=one, attempt=1, token=ref.token, result="failure", started=1.0, ended=2.0)

    def send(name):
        driven.inbox.append(Outcomes(worker=name, epoch="e", outcomes=[outcome]))

    mine = Outcome(request=an_id(77), attempt=1, token="mine", result="failure", started=1.0, ended=2.0)  # noqa: S106  # a token of a claim

    def send_both():
        driven.inbox.append(Outcomes(worker="mallory", epoch=mallory.epoch, outcomes=[outcome, mine]))

    [refused] = as_user(driven, "u2", send_both)
    assert "run of the broker's user u1" in refused
    assert [part.request for part in mallory.hear(Recorded)] == [mine.request], "what is none of theirs is answered"
    assert driven.states(one) == ["running"]
    assert as_user(driven, "u1", lambda: send("anna2")) == [], "the same user, under another name"
    assert driven.states(one) == ["failure"]
    assert mallory.hear() == []


def test_an_abort_that_came_first_counts_only_if_it_is_of_who_may_command_the_request(driven):
    judge = Access(operators={"chief"})
    for number, (user, state) in enumerate([("anna", "aborted"), ("chief", "aborted"), ("bert", "pending")]):
        request = Request(id=an_id(500 + number), task="noop")
        driven.pool.abort(request.id, "not wanted", driven.moment, lambda _: None, user=user)
        driven.turn()
        heeds = partial(judge.commanders, "anna")
        drafts = [driven.pool.examine(request)]
        driven.pool.submit(drafts, {}, driven.moment, driven.receipts.append, submitter="anna", heeds=heeds)
        driven.turn()
        assert (driven.states(request.id), driven.view(request.id).submitter) == ([state], "anna")


def test_the_mark_of_a_stranger_does_not_take_the_place_of_a_rightful_one(driven):
    rightful = [("anna", "hers"), ("chief", "his")]
    for number, marks in enumerate(([("mallory", "spite"), *rightful], [*reversed(rightful), ("mallory", "spite")])):
        request = Request(id=an_id(600 + number), task="noop")
        for user, reason in marks:
            driven.pool.abort(request.id, reason, driven.moment, lambda _: None, user=user)
            driven.pass_time(1)
        drafts = [driven.pool.examine(request)]
        heeds = partial(Access(operators={"chief"}).commanders, "anna")
        driven.pool.submit(drafts, {}, driven.moment, driven.receipts.append, submitter="anna", heeds=heeds)
        driven.turn()

        assert driven.states(request.id) == ["aborted"]
        assert driven.view(request.id).reason.text == ("hers", "his")[number], "what was asked first"


def test_an_abort_of_what_nobody_knew_leaves_alone_what_came_meanwhile(driven):
    results = []
    one = driven.request()
    driven.pool.abort(one, "not wanted", driven.moment, results.append, user="mallory", known=False)
    driven.turn()

    assert driven.states(one) == ["pending"]
    assert not results[0].marked
