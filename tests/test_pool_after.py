"""What comes after others in the pool: met, freed, stranded, and what it takes."""

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from mqworker import dispatch
from mqworker.messages import After, Artifact, Granted, Request, Take
from mqworker.task import Task
from tests.driving import Peer, an_id, restart

TASKS = {"noop": 1, "coloured": None, "planing": None}


@pytest.fixture(autouse=True)
def planing(coloured):  # noqa: ARG001  # it forgets the tasks of a test
    """A task that looks at which artifact it is given."""

    class Planing(Task):
        TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {
            "type": "object",
            "required": ["input"],
            "properties": {"input": {"type": "integer"}},
        }
        INPUT_ARTIFACT_CATEGORY = "test:wood"

        def input_artifact_ids(self) -> list[int]:
            return [self.data["input"]]

        def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
            return bool(worker_metadata.get("planes") in ("all", self.data["input"]))

        def _execute(self) -> bool:
            return True

    return Planing


def wood(number=1, category="test:wood"):
    return [Artifact(handle=f"a{one}", category=category, name=f"log {one}") for one in range(number)]


def taking(source, **fields):
    return {"task": "planing", "take": [Take(into="/input", request=source, category="test:wood")], **fields}


def after(*ids, need="success"):
    return [After(request=one, need=need) for one in ids]


def test_what_takes_an_artifact_is_asked_about_with_the_artifact_that_it_got(driven):
    anna = Peer(driven, tasks=TASKS, planes="none").join()
    first, second = driven.request(), driven.request()
    one, two = driven.request(**taking(first)), driven.request(**taking(second))
    assert driven.waits(one) == f"waits for {first}"
    for request in (first, second):
        anna.end(anna.run(request), artifacts=wood())
    assert driven.view(one).request.data == {"input": 1}
    assert driven.states(one, two) == ["pending"] * 2
    assert driven.view(one).requirement != driven.view(two).requirement
    bert = Peer(driven, "bert", tasks=TASKS, planes=2).join()
    bert.follow()

    assert driven.states(one, two) == ["pending", "offered"]
    bert.claim(two)
    driven.turn()
    [granted] = bert.hear(Granted)
    assert [artifact.id for artifact in granted.inputs] == [2]
    assert driven.waits(one) == "no worker can run it"


def test_what_takes_of_one_that_has_succeeded_already_is_asked_about_at_once(driven):
    anna = Peer(driven, tasks=TASKS, planes=1).join()
    first = driven.request()
    anna.end(anna.run(first), artifacts=wood())
    one = driven.request(**taking(first))
    anna.follow()
    ref = anna.claim(one)
    driven.turn()

    assert [[artifact.name for artifact in part.inputs] for part in anna.hear(Granted)] == [["log 0"]]
    assert ref.request == one


def test_what_has_taken_is_asked_about_with_it_after_a_refusal_and_by_a_new_scheduler_too(driven, planing):
    anna = Peer(driven, tasks=TASKS, planes=1).join()
    first = driven.request()
    anna.end(anna.run(first), artifacts=wood())
    one = driven.request(**taking(first))
    anna.follow()
    assert driven.states(one) == ["offered"]
    anna.refuse(one)
    driven.turn()
    bert = Peer(driven, "bert", tasks=TASKS, planes=1).join()
    assert driven.states(one) == ["offered"]
    bert.refuse(one)
    driven.turn()
    planing.TASK_VERSION = 2  # its code is another now
    again = restart(driven)
    cora = Peer(again, "cora", tasks=TASKS, planes=1).join()

    assert again.states(one) == ["offered"]
    cora.run(one)


def test_what_has_taken_is_explained_with_it(driven):
    anna = Peer(driven, tasks=TASKS, planes=1).join()
    first = driven.request()
    anna.end(anna.run(first), artifacts=wood())
    one = driven.request(**taking(first))
    anna.follow()
    view = driven.view(one)
    draft = driven.pool.examine(view.request, bound=True)

    assert draft.inputs == (1,)
    assert driven.pool.views.explanation(draft, view).able == 1


def test_many_that_take_at_once_each_wait_in_the_lane_of_what_they_got(driven, monkeypatch):
    """Also those that do not fit into memory; the ledger has them elsewhere until the next commit."""
    monkeypatch.setattr(dispatch, "LEAST_HEADS", 1)
    monkeypatch.setattr(dispatch, "MOST_HEADS", 1)
    anna = Peer(driven, tasks=TASKS, planes="none").join()
    first = driven.request()
    takers = [driven.request(**taking(first)) for _ in range(5)]
    lane = [driven.request("planing", {"input": 1}) for _ in range(3)]
    assert driven.states(*lane) == ["rejected"] * 3  # there is no such artifact yet
    anna.end(anna.run(first), artifacts=wood())
    older = [driven.request("planing", {"input": 1}) for _ in range(3)]
    bert = Peer(driven, "bert", tasks=TASKS, planes=1).join()
    bert.follow()
    order = []
    driven.tickets = [one for one in driven.tickets if one[1].request.id != first]
    while tickets := driven.take_tickets():
        for _, ticket in tickets:
            order.append(ticket.request.id)
            bert.end(bert.run(order[-1]))

    assert order == [*takers, *older]


# ---------------------------------------------------------------- met or not


def test_what_comes_after_others_is_offered_once_all_of_them_have_ended_as_it_needs(driven):
    anna = Peer(driven, slots=4).join()
    good, bad = driven.request(), driven.request()
    one = driven.request(after=[*after(good), *after(bad, need="end")])
    assert driven.waits(one) == f"waits for {good} and 1 more"
    assert one not in driven.pool._entries
    anna.end(anna.run(bad), "failure")
    assert driven.waits(one) == f"waits for {good}"
    anna.end(anna.run(good))

    assert driven.states(one) == ["offered"]
    assert driven.pool._held.blocked == 0
    assert driven.request_events().count("accept") == 3


def test_what_comes_after_one_that_has_ended_already_is_offered_or_aborted_at_once(driven, anna):
    good, bad = driven.request(), driven.request()
    anna.end(anna.run(good))
    anna.end(anna.run(bad), "failure")
    one, never = driven.request(after=after(good)), driven.request(after=after(bad))

    assert driven.states(one, never) == ["offered", "aborted"]
    assert driven.view(never).reason.text == f"needs {bad}, which ended in failure"
    assert [receipt.results[0].status for receipt in driven.receipts[-2:]] == ["accepted", "accepted"]
    assert driven.pool._held.blocked == 0
    assert never not in driven.pool._entries


@pytest.mark.parametrize("how", ["failure", "abort", "abort of a run", "lost"])
def test_the_failure_of_one_ends_those_that_needed_it_and_theirs_but_not_who_needed_its_end(driven, anna, how):
    first = driven.request(max_attempts=1)
    second = driven.request(after=after(first))
    third = driven.request(after=after(second))
    fourth = driven.request(after=after(third, need="end"), priority=1)
    if how == "abort":
        driven.abort(first)
        driven.turn()
    else:
        ref = anna.run(first)
        if how == "abort of a run":
            driven.abort(first)
            driven.turn()
        anna.end(ref, {"abort of a run": "aborted"}.get(how, how))

    assert driven.states(second, third, fourth) == ["aborted", "aborted", "offered"]
    assert first in driven.view(second).reason.text
    assert second in driven.view(third).reason.text
    assert driven.pool._held.blocked == 0
    told = {event.request: (event.state, event.reason.text) for event in driven.events if event.event == "abort"}
    assert told[third] == ("aborted", f"needs {second}, which was aborted")
    assert [*driven.pool._entries] == [fourth]


def test_an_abort_of_what_waits_for_others_leaves_no_count_behind(driven, anna):
    first = driven.request()
    one = driven.request(after=after(first))
    other = driven.request(after=after(one, need="end"))
    driven.abort(one)
    driven.turn()
    anna.end(anna.run(first))

    assert driven.states(one, other) == ["aborted", "offered"]
    assert driven.pool._held.blocked == 0


def test_what_needs_an_unknown_request_or_itself_is_rejected(driven, anna):
    unknown = driven.request(after=after(an_id(999)))
    circle = [
        Request(id=an_id(501), task="noop", after=after(an_id(502))),
        Request(id=an_id(502), task="noop", after=after(an_id(501))),
        Request(id=an_id(503), task="noop", after=after(an_id(503))),
    ]
    driven.submit(*circle)
    driven.turn()

    assert driven.states(unknown, an_id(501), an_id(502), an_id(503)) == ["rejected"] * 4
    assert an_id(999) in driven.view(unknown).reason.text
    assert "a circle" in driven.view(an_id(501)).reason.text
    assert driven.pool._held.blocked == 0
    assert not driven.pool._entries
    assert anna.queue is not None


def test_requests_of_one_message_may_need_each_other_in_any_order(driven, anna):
    last = Request(id=an_id(501), task="noop", after=after(an_id(502)))
    first = Request(id=an_id(502), task="noop")
    driven.submit(last, first)
    driven.turn()

    assert [one.id for one in driven.receipts[-1].results] == [last.id, first.id]
    assert driven.states(last.id, first.id) == ["pending", "offered"]
    anna.end(anna.run(first.id))
    assert driven.states(last.id) == ["offered"]


def test_what_comes_after_what_is_rejected_in_the_same_message_is_aborted(driven, anna):
    bad = Request(id=an_id(501), task="noop", data={"duration": -1})
    never = Request(id=an_id(502), task="noop", after=after(bad.id))
    ends = Request(id=an_id(503), task="noop", after=after(bad.id, need="end"))
    driven.submit(bad, never, ends)
    driven.turn()

    assert driven.states(bad.id, never.id, ends.id) == ["rejected", "aborted", "offered"]
    assert anna.queue is not None


def test_the_end_of_one_and_what_comes_after_it_may_be_in_one_set_either_way_round(driven):
    anna = Peer(driven, slots=4).join()
    first, second = anna.run(driven.request()), anna.run(driven.request())
    one = Request(id=an_id(501), task="noop", after=after(first.request))
    two = Request(id=an_id(502), task="noop", after=after(second.request))
    driven.submit(one)
    anna.end(first)
    driven.submit(two)
    anna.end(second)

    assert driven.states(one.id, two.id) == ["offered", "offered"]
    assert driven.pool._held.blocked == 0


@pytest.mark.parametrize(("number", "category"), [(0, "test:wood"), (2, "test:wood"), (1, "test:stone")])
def test_what_cannot_be_taken_aborts_who_would_take_it(driven, number, category):
    anna = Peer(driven, tasks=TASKS, planes="all").join()
    first = driven.request()
    one = driven.request(**taking(first))
    anna.end(anna.run(first), artifacts=wood(number, category))

    assert driven.states(one) == ["aborted"]
    found = number if category == "test:wood" else 0
    assert driven.view(one).reason.text == f"expected one artifact of category test:wood made by {first}, got {found}"
    assert driven.pool._held.blocked == 0


def test_a_request_that_would_take_what_its_task_does_not_want_is_rejected_at_the_door(driven):
    first = driven.request()
    one = driven.request("planing", take=[Take(into="/input", request=first, category="test:stone")])

    assert driven.states(one) == ["rejected"]
    assert "expected to take an artifact of category test:wood, got test:stone" in driven.view(one).reason.text


def test_what_waits_for_others_is_reprioritised_and_known_and_a_conflict_as_all_are(driven, anna):
    first = driven.request(priority=5)
    one = Request(id=an_id(501), task="noop", after=after(first))
    driven.submit(one)
    driven.turn()
    driven.request()
    driven.submit(one, Request(id=one.id, task="noop"))
    driven.pool.reprioritise(one.id, 5, lambda _: None)
    driven.turn()
    assert [result.status for result in driven.receipts[-1].results] == ["known", "conflict"]
    assert driven.pool._held.blocked == 1
    anna.end(anna.run(first))

    assert driven.states(one.id) == ["offered"]
    assert driven.pool._entries[one.id].request.priority == 5


def test_a_conflict_with_what_waits_for_others_in_the_set_that_frees_or_aborts_it_changes_nothing(driven, anna):
    first, second = driven.request(), driven.request()
    one, two = (driven.request(after=after(each)) for each in (first, second))
    older = driven.request()
    ref = anna.run(first)
    conflicts = [Request(id=each, task="noop", data={"duration": 0.5}) for each in (one, two)]
    driven.abort(two)
    driven.submit(*conflicts)
    anna.end(ref)
    driven.submit(*conflicts)
    driven.turn()

    assert driven.states(one, two, second, older) == ["pending", "aborted", "offered", "pending"]
    assert driven.pool._held.blocked == 0
    own = driven.pool._dispatch
    assert [own._waiting[each][1] for each in (one, older)] == [driven.view(each).seq for each in (one, older)]
    assert sum(use.entries for use in driven.pool._uses.values()) == 3


def test_what_waits_for_others_still_does_so_for_a_new_scheduler(driven, anna):
    first, other = driven.request(), driven.request()
    one, two = driven.request(after=after(first)), driven.request(after=after(first, other))
    again = restart(driven)
    assert again.pool._held.blocked == 2
    assert again.waits(one) == f"waits for {first}"
    moved = Peer(again, "bert").join()
    for request in (first, other):
        moved.end(moved.run(request))

    assert again.states(one, two) == ["offered", "pending"]
    assert again.pool._held.blocked == 0
    assert anna.name == "anna"


def test_what_waits_out_a_delay_before_its_next_attempt_has_not_ended_for_who_comes_after_it(driven, anna):
    first = driven.request(max_attempts=2)
    one = driven.request(after=after(first))
    anna.end(anna.run(first), "lost")
    assert driven.waits(one) == f"waits for {first}"
    driven.abort(first)
    driven.turn()

    assert driven.states(first, one) == ["aborted", "aborted"]
    assert not driven.pool._delayed
