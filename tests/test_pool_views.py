"""What the pool shows: why requests wait, who could run them, what its classes are; and pauses and limits."""

import pytest

from mqworker.messages import After, Bye, GetCapabilities, Outcome, Pause, Request, StuckEvent, Void
from tests.driving import A_SECOND, LEASE, Driven, Peer, an_id, restart


@pytest.fixture
def limited(coloured):  # noqa: ARG001  # its tasks are there
    one = Driven(concurrency_limits={"one": 1}, no_worker_after=20.0)
    yield one
    one.ledger.close()


def pause(driven, kind, name):
    driven.pool.pause(Pause(kind=kind, name=name, reason="now"), driven.moment, lambda _: None)
    driven.turn()


def resume(driven, kind, name):
    driven.pool.resume(kind, name, lambda _: None)
    driven.turn()


def explain(driven, request):
    view = driven.view(request)
    draft = driven.pool.examine(view.request, bound=not view.after)
    found = driven.pool.views.explanation(draft, view)
    assert sum(step.stopped for step in found.steps) + found.able == found.workers
    assert found.idle + found.busy + found.paused == found.able
    return found


def red(driven, **fields):
    return driven.request("coloured", {"colour": "red"}, **fields)


# ---------------------------------------------------------------- why it waits


def test_each_reason_to_wait_is_told_in_a_line(limited):
    anna = Peer(limited, colour="red").join()
    offered = red(limited, concurrency_key="one")
    anna.follow()
    assert limited.waits(offered) == "is offered to a worker"
    keyed, next_one, later = red(limited, concurrency_key="one"), red(limited), red(limited)
    nobody = limited.request("coloured", {"colour": "none"}, concurrency_key="one")
    raises = limited.request("coloured", {"colour": "raises"})
    after = limited.request(after=[After(request=offered)])
    group = red(limited, group="theirs")
    pause(limited, "group", "theirs")
    assert limited.waits(keyed) == "as many run with the concurrency key one as may"
    assert (
        limited.waits(next_one) == "all that can run it are busy; about 1 goes first"
    )  # as the key may be free by then
    assert limited.waits(later) == "all that can run it are busy; about 2 go first"
    assert limited.waits(nobody) == "no worker can run it"
    assert limited.waits(raises) == "no worker can run it: can_run_on() raised KeyError: 'no such colour'"
    assert limited.waits(after) == f"waits for {offered}"
    assert limited.waits(group) == "the group theirs is paused"
    pause(limited, "worker", "anna")
    assert limited.waits(later) == "all that can run it are paused"
    pause(limited, "task", "coloured")
    assert limited.waits(later) == "the task coloured is paused"
    limited.abort(later)
    limited.turn()
    assert limited.waits(later) is None


def test_an_explanation_tells_impossible_from_busy_paused_declined_and_offline(driven):
    one = red(driven)
    found = explain(driven, one)
    assert (found.verdict, found.workers, found.able, found.steps, found.advice) == (
        "no worker can run it", 0, 0, [], []
    )  # fmt: skip
    blue = Peer(driven, "blue", colour="blue").join()
    found = explain(driven, one)
    assert (found.verdict, found.advice) == ("no worker can run it", ['on blue: set colour to "red"'])
    [step] = found.steps
    assert (step.looked_at, step.asked, step.stopped) == ("colour", ['"red"'], 1)
    anna = Peer(driven, colour="red").join()
    anna.follow()
    assert explain(driven, one).verdict == "is offered to a worker"
    ref = anna.run(one)
    found = explain(driven, one)
    assert (found.verdict, found.state, found.able, found.busy) == ("it is running", "running", 1, 1)
    two = red(driven)
    assert explain(driven, two).verdict == "all that can run it are busy; it is next"
    pause(driven, "worker", "anna")
    found = explain(driven, two)
    assert (found.verdict, found.paused) == ("all that can run it are paused", 1)
    resume(driven, "worker", "anna")
    anna.follow()
    anna.end(ref)
    assert driven.states(two) == ["offered"]
    anna.refuse(two)
    driven.turn()
    found = explain(driven, two)
    assert (found.verdict, found.refused, found.able) == ("every worker that could run it has declined it", 1, 0)
    anna.say(Bye(reason="tired"))
    driven.turn()
    found = explain(driven, two)
    assert (found.verdict, found.offline, found.steps[0].looked_at) == (
        "all that could run it are offline", 1, "is it online"
    )  # fmt: skip
    assert blue.name == "blue"


def test_a_request_that_is_not_submitted_is_explained_and_nothing_is_kept_of_it(driven):
    anna = Peer(driven, colour="red").join()
    draft = driven.pool.examine(Request(id=an_id(900), task="coloured", data={"colour": "red"}))
    found = driven.pool.views.explanation(draft, None)

    assert (found.verdict, found.able, found.idle, found.requirement, found.request) == (
        "it can run now", 1, 1, None, None
    )  # fmt: skip
    assert len(driven.pool._requirements) == 0
    assert not driven.pool._requirements._roots
    assert not driven.pool._matching.requirements()
    red(driven)
    anna.follow()
    found = driven.pool.views.explanation(draft, None)
    assert found.requirement is not None
    assert found.classes == [anna.queue.rpartition(".")[2]]


def test_what_is_held_by_its_key_or_waits_for_others_is_explained_so(limited):
    Peer(limited, slots=3).join()
    first = limited.request(concurrency_key="one")
    second = limited.request(concurrency_key="one")
    after = limited.request(after=[After(request=second)])

    assert explain(limited, first).verdict == "is offered to a worker"
    assert explain(limited, second).verdict == "as many run with the concurrency key one as may"
    assert explain(limited, after).verdict == f"waits for {second}"
    limited.abort(second)
    limited.turn()
    assert explain(limited, second).verdict == "it is aborted"


def test_capability_classes_show_what_their_workers_share_and_what_waits_for_them(driven):
    empty = driven.pool.views.capabilities(GetCapabilities(), driven.steady)
    assert (empty.classes, empty.requirements, empty.escaped) == ([], 0, 0)
    anna = Peer(driven, colour="red", disk=1).join()
    bert = Peer(driven, "bert", colour="red", disk=2).join()
    cora = Peer(driven, "cora", colour="blue", disk=3, tasks={"coloured": None}).join()
    red(driven)
    for peer in (anna, bert, cora):
        peer.follow()
    for _ in range(3):
        red(driven)
    found = driven.pool.views.capabilities(GetCapabilities(), driven.steady)
    [both] = [one for one in found.classes if one.workers == 2]

    assert len(found.classes) == 2
    assert (both.examples, both.queue, both.shared) == (
        ["anna", "bert"], anna.queue, {"noop:version": 1, "colour": "red"}
    )  # fmt: skip
    assert (both.tasks, both.requirements, both.idle, both.out, both.backlog) == (["coloured", "noop"], 1, 2, 2, 2)
    names = [one.name for one in found.classes]
    [first] = driven.pool.views.capabilities(GetCapabilities(limit=1), driven.steady).classes
    [second] = driven.pool.views.capabilities(GetCapabilities(after=first.name), driven.steady).classes
    assert [first.name, second.name] == names == sorted(names)


# ---------------------------------------------------------------- nobody can


def stuck(driven):
    return [event for event in driven.events if isinstance(event, StuckEvent)]


def test_that_nobody_can_run_some_requests_for_a_while_is_told_once_and_again_if_it_comes_back(limited):
    one, two = red(limited), red(limited)
    for _ in range(25):
        limited.pass_time(A_SECOND)
    [event] = stuck(limited)
    assert (event.task, event.number, event.requests) == ("coloured", 2, [one, two])
    assert event.reason == "no worker can run it"
    assert event.time - event.since >= 20.0
    anna = Peer(limited, colour="red").join()
    anna.follow()
    limited.pass_time(2 * A_SECOND)
    anna.say(Bye(reason="tired"))
    for _ in range(25):
        limited.pass_time(A_SECOND)

    assert len(stuck(limited)) == 2


def test_that_all_have_declined_a_request_for_a_while_is_told_too(limited):
    anna = Peer(limited, colour="red").join()
    one = red(limited)
    anna.follow()
    anna.refuse(one)
    limited.turn()
    for _ in range(25):
        anna.say(anna.beat())
        limited.pass_time(A_SECOND)

    assert [(event.number, event.requests) for event in stuck(limited)] == [(1, [one])]
    limited.abort(one)
    limited.turn()
    assert not limited.pool._alone


# ---------------------------------------------------------------- pauses


@pytest.mark.parametrize(("kind", "name"), [("worker", "anna"), ("task", "noop"), ("group", "default")])
def test_a_pause_before_and_after_offers_are_out_lets_nothing_start_and_its_end_everything(driven, anna, kind, name):
    running, offered, waiting = (driven.request() for _ in range(3))
    ref = anna.run(running)
    anna.say(anna.beat(ref, slots=2))
    driven.turn()
    assert driven.states(offered, waiting) == ["offered", "pending"]
    pause(driven, kind, name)
    anna.claim(offered)
    driven.turn()
    [void] = anna.hear(Void)
    assert void.reason == (  # what its only worker is not to take any more has been taken back already
        "the request is pending, not offered" if kind == "worker" else f"the {kind} {name} is paused"
    )
    assert driven.states(running, offered, waiting) == ["running", "pending", "pending"]
    assert anna.end(ref) == "recorded"
    anna.follow()
    anna.follow()
    assert driven.states(offered, waiting) == ["pending", "pending"]
    assert (anna.queue is None) == (kind == "worker")
    again = restart(driven)
    moved = Peer(again, incarnation=2)
    moved.join()
    assert [(one.kind, one.name) for one in again.pool.pauses()] == [(kind, name)]
    assert (moved.queue is None) == (kind == "worker")
    assert again.states(offered, waiting) == ["pending", "pending"]
    resume(again, kind, name)
    moved.follow()
    moved.follow()

    assert again.states(offered, waiting) == ["offered", "pending"]
    assert again.pool.pauses() == []


def test_a_paused_worker_is_shown_as_such_and_gives_no_credit_to_its_class(driven, anna, bert):
    pause(driven, "worker", "anna")
    anna.follow()
    ids = [driven.request() for _ in range(2)]

    assert driven.states(*ids) == ["offered", "pending"]
    assert driven.worker("anna").paused == "now"
    assert driven.worker("bert").paused is None
    assert driven.pool.views.pool({}, "0").paused == 1
    assert bert.run(ids[0]).request == ids[0]


def test_a_pause_of_what_nobody_knows_is_kept_for_when_it_comes(driven):
    for kind, name in (("worker", "cora"), ("task", "Coloured"), ("group", "theirs")):
        pause(driven, kind, name)
    resume(driven, "worker", "nobody")
    cora = Peer(driven, "cora", colour="red").join()
    assert cora.queue is None
    dora = Peer(driven, "dora", colour="red").join()
    one, two = red(driven), driven.request(group="theirs")
    dora.follow()

    assert driven.states(one, two) == ["pending", "pending"]
    for kind, name in (("task", "coloured"), ("group", "theirs")):
        resume(driven, kind, name)
    assert driven.states(one, two) == ["offered", "pending"]


# ---------------------------------------------------------------- limits: every way out


def succeed(_driven, peer, one):
    peer.end(peer.run(one))


def lose(_driven, peer, one):
    peer.end(peer.run(one), "lost")


def hand_back(driven, peer, one):
    peer.end(peer.run(one), "handed_back")
    driven.abort(one)
    driven.turn()


def abort(driven, _peer, one):
    driven.abort(one)
    driven.turn()


def refuse(driven, peer, one):
    peer.refuse(one)
    driven.turn()


def give_back(driven, peer, one):
    peer.say(peer.hello(colour="blue"))
    peer.claim(one)
    driven.turn()


def lapse(driven, peer, one):
    peer.run(one)
    driven.pass_time(2 * LEASE)
    driven.pass_probes()


def leave(driven, peer, _one):
    peer.say(Bye(reason="tired"))
    driven.turn()


@pytest.mark.parametrize("way", [succeed, lose, hand_back, abort, refuse, give_back, lapse, leave])
def test_the_place_of_a_key_is_free_whichever_way_a_request_goes(limited, way):
    anna = Peer(limited, colour="red").join()
    one = red(limited, concurrency_key="one", max_attempts=1)
    anna.follow()
    bert = Peer(limited, "bert").join()
    two = limited.request(concurrency_key="one")
    bert.follow()
    anna.follow()
    assert limited.states(one, two) == ["offered", "pending"]
    limited.take_tickets()
    way(limited, anna, one)
    for peer in (bert, *([anna] if way not in (lapse, leave) else []), bert):  # who was silent is back first
        peer.follow()

    assert limited.states(two) == ["offered"]
    assert limited.pool._dispatch._keys["one"].used == 1
    limited.abort(one)
    limited.abort(two)
    limited.turn()
    assert not limited.pool._dispatch._keys


def test_a_ticket_that_the_broker_returns_keeps_its_place(limited):
    anna = Peer(limited).join()
    one, two = limited.request(concurrency_key="one"), limited.request(concurrency_key="one")
    [(_, _, returned)] = limited.tickets
    limited.returned.append(returned)
    limited.turn()

    assert limited.states(one, two) == ["offered", "pending"]
    anna.end(anna.run(one))
    assert limited.states(two) == ["offered"]


def test_runs_that_a_new_scheduler_finds_count_towards_key_and_group(limited):
    anna = Peer(limited, slots=2).join()
    ref = anna.run(limited.request(concurrency_key="one", group="theirs"))
    two = limited.request(concurrency_key="one")
    again = restart(limited)
    moved = Peer(again, slots=2)
    moved.seq = anna.seq
    moved.say(moved.hello(), moved.beat(ref))
    again.turn()
    moved.queue = again.pool.class_queues()[0].name
    moved.say(moved.beat(ref))
    again.turn()
    assert again.states(two) == ["pending"]
    assert again.waits(two) == "as many run with the concurrency key one as may"
    assert again.pool._dispatch.shares()["theirs"][0] == 1
    moved.end(ref)

    assert again.states(two) == ["offered"]
    assert "theirs" not in again.pool._dispatch.shares()


def test_an_outcome_in_the_set_of_its_claim_leaves_nothing_running(driven, anna):
    one = driven.request()
    anna.claim(one, token="t")  # noqa: S106  # a token of a claim
    for report in driven.inbox:
        driven.pool.report(report, driven.moment)
    driven.inbox.clear()
    outcome = Outcome(request=one, attempt=1, token="t", result="success", started=1.0, ended=2.0)  # noqa: S106  # a token of a claim
    driven.pool._outcome("anna", anna.epoch, outcome, driven.moment)
    driven.turn()

    assert driven.states(one) == ["success"]
    assert not driven.pool._entries
    assert driven.worker("anna").running == []
