"""Requirement classes in the pool: shared, divided, escaped, re-keyed, private, and gone when nobody needs them."""

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from mqworker import dispatch, pool
from mqworker.messages import After, Assign, GetCapabilities, Pause, Void
from mqworker.task import Task
from tests.driving import A_SECOND, LEASE, Peer, restart


@pytest.fixture(autouse=True)
def picky(coloured):  # noqa: ARG001  # it forgets the tasks of a test
    """A task that reads more of its data on some workers."""

    class Picky(Task):
        TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {"type": "object"}

        def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
            data = self.data
            if worker_metadata.get("colour") != data.get("colour"):
                return False
            return not worker_metadata.get("deep") or bool(data.get("size", 0) <= worker_metadata["size"])

        def _execute(self) -> bool:
            return True

    return Picky


TASKS = {"picky": None, "coloured": None, "noop": 1}


def class_of(driven, request):
    return driven.view(request).requirement


# ---------------------------------------------------------------- private requirements


def test_a_refused_request_goes_also_to_a_worker_that_reads_what_nobody_has_read_of_it(driven):
    anna = Peer(driven, tasks=TASKS, colour="red").join()
    one = driven.request("picky", {"colour": "red", "size": 1})
    anna.follow()
    assert driven.states(one) == ["offered"]
    anna.refuse(one)
    driven.turn()
    assert len(anna.hear(Void)) == 1
    assert driven.states(one) == ["pending"]
    Peer(driven, "bert", tasks=TASKS, colour="red", deep=True, size=0).join()
    assert driven.states(one) == ["pending"]
    cora = Peer(driven, "cora", tasks=TASKS, colour="red", deep=True, size=3).join()

    cora.run(one)


# ---------------------------------------------------------------- tasks that change


def as_it_becomes(task, **members):
    """Put other code in the place of a task."""
    Task._sub_tasks.pop(task.name, None)
    own = {name: value for name, value in vars(task).items() if name in ("TASK_DATA_SCHEMA", "can_run_on", "_execute")}
    return type(task.__name__, (Task,), own | members)


def test_requests_of_a_task_that_is_gone_come_back_with_it_each_by_its_own_data(driven, picky):
    """Also if that which speaks for all of them is not fit for what the task has become."""
    bad, good = driven.request("picky", {"colour": 7}), driven.request("picky", {"colour": "red"})
    Task._sub_tasks.pop("picky")
    gone = restart(driven)
    assert class_of(gone, bad) == class_of(gone, good)
    assert gone.waits(good).startswith("this scheduler cannot configure its task any more: expected the name of a task")
    as_it_becomes(picky, TASK_DATA_SCHEMA={"properties": {"colour": {"type": "string"}}})
    back = restart(gone)
    anna = Peer(back, tasks=TASKS, colour="red").join()
    anna.follow()

    assert back.states(bad, good) == ["pending", "offered"]
    assert 'expected type "string"' in back.waits(bad)
    back.abort(bad)
    anna.end(anna.run(good))
    assert back.states(bad) == ["aborted"]
    assert not back.pool._entries


def test_a_request_that_is_unfit_still_speaks_for_none_that_was_so_for_the_same_reason(driven, picky):
    bad, good = driven.request("picky", {"colour": "grey"}), driven.request("picky", {"colour": "red"})

    def configure(self, data):
        if data["colour"] in broken:
            raise RuntimeError("no saw")
        Task.configure(self, data)

    broken = {"red", "grey"}
    picky.configure = configure
    picky.TASK_VERSION = 2
    worse = restart(driven)
    assert class_of(worse, bad) == class_of(worse, good)
    broken = {"grey"}
    better = restart(worse)

    assert "no saw" in better.waits(bad)
    assert better.waits(good) == "no worker can run it"


def test_a_task_that_has_other_code_now_is_asked_anew_about_its_requests(driven, picky, monkeypatch):
    monkeypatch.setattr(dispatch, "LEAST_HEADS", 2)
    monkeypatch.setattr(dispatch, "MOST_HEADS", 2)
    ids = [driven.request("picky", {"colour": "red", "size": size % 2}) for size in range(6)]
    running = driven.request("picky", {"colour": "green", "size": 1})
    anna = Peer(driven, tasks=TASKS, colour="green").join()
    ref = anna.run(running)
    assert len({class_of(driven, one) for one in ids}) == 1

    def can_run_on(self, worker_metadata):
        return worker_metadata.get("size") == self.data["size"]

    as_it_becomes(picky, TASK_VERSION=2, can_run_on=can_run_on)
    again = restart(driven)
    bert = Peer(again, "bert", tasks=TASKS, size=1).join()
    bert.follow()
    assert [class_of(again, one) for one in ids] == [class_of(again, ids[size % 2]) for size in range(6)]
    assert class_of(again, ids[0]) != class_of(again, ids[1])
    assert class_of(again, running) == class_of(again, ids[1])
    order = []
    while tickets := again.take_tickets():
        [(_, ticket)] = tickets
        order.append(ticket.request.id)
        bert.end(bert.run(order[-1]))

    assert order == ids[1::2]
    moved = Peer(again, tasks=TASKS)
    moved.seq = anna.seq
    assert moved.end(ref) == "recorded"


def test_a_task_that_is_as_it_was_keeps_the_classes_of_its_requests(driven):
    ids = [driven.request("picky", {"colour": colour, "size": 1}) for colour in ("red", "blue", "red")]
    Peer(driven, tasks=TASKS, colour="red").join()
    classes = [class_of(driven, one) for one in ids]
    again = restart(driven)
    young = again.request("picky", {"colour": "blue", "size": 2})

    assert [class_of(again, one) for one in ids] == classes
    assert class_of(again, young) == classes[1]


# ---------------------------------------------------------------- shared and divided


def test_requests_share_a_class_whatever_is_in_data_that_nobody_reads(driven):
    Peer(driven, tasks=TASKS).join()
    ids = [driven.request("picky", {"colour": "red", "size": size, "other": [size]}) for size in range(3)]
    blue = driven.request("picky", {"colour": "blue"})

    assert len({class_of(driven, one) for one in ids}) == 1
    assert class_of(driven, blue) != class_of(driven, ids[0])
    assert len(driven.pool._requirements) == 2


def test_a_schema_of_its_own_gives_a_request_a_class_of_its_own(driven):
    plain = driven.request("picky", {"colour": "red"})
    ids = [driven.request("picky", {"colour": "red"}, requires={"required": [name]}) for name in ("gpu", "disk")]
    anna = Peer(driven, tasks=TASKS, colour="red", gpu=1).join()
    anna.follow()

    assert len({class_of(driven, one) for one in [plain, *ids]}) == 3
    assert driven.states(plain, *ids) == ["offered", "pending", "pending"]
    anna.end(anna.run(plain))
    assert driven.states(*ids) == ["offered", "pending"]


def test_a_worker_that_has_more_read_divides_a_class_behind_its_heads_too(driven, monkeypatch):
    monkeypatch.setattr(dispatch, "LEAST_HEADS", 2)
    monkeypatch.setattr(dispatch, "MOST_HEADS", 2)
    driven.request("picky", {"colour": "red", "size": 0})
    ids = [driven.request("picky", {"colour": "red", "size": size}) for size in (2, 1, 2, 1, 1, 2, 1)]
    deep = Peer(driven, tasks=TASKS, colour="red", deep=True, size=1).join()
    deep.follow()
    assert len({class_of(driven, one) for one in ids}) == 2
    assert driven.pool._dispatch.waiting() == 7
    order = []
    while tickets := driven.take_tickets():
        [(_, ticket)] = tickets
        order.append(ticket.request.data["size"])
        deep.end(deep.run(ticket.request.id))

    assert order == [0, 1, 1, 1, 1]
    plain = Peer(driven, "bert", tasks=TASKS, colour="red").join()
    plain.follow()
    assert driven.states(ids[0]) == ["offered"]
    assert not driven.pool._divided


def test_what_is_out_or_runs_when_its_class_is_divided_goes_on(driven):
    anna = Peer(driven, tasks=TASKS, slots=2, colour="red").join()
    running, offered = (driven.request("picky", {"colour": "red", "size": size}) for size in (5, 5))
    anna.follow()
    ref = anna.run(running)
    first = class_of(driven, running)
    Peer(driven, "deep", tasks=TASKS, colour="red", deep=True, size=1).join()

    assert class_of(driven, running) == class_of(driven, offered) != first
    anna.run(offered)
    assert anna.end(ref, "handed_back") == "recorded"
    assert driven.states(running) == ["offered"]
    assert first not in driven.pool._uses


# ---------------------------------------------------------------- escaped


class Mood:
    good = True


@pytest.fixture
def moody():
    class Moody(Task):
        TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {"type": "object"}

        def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
            return Mood.good and bool(worker_metadata)

        def _execute(self) -> bool:
            return True

    Mood.good = True
    yield Moody
    Mood.good = True


def test_a_task_that_answers_as_it_likes_is_asked_each_time_and_each_request_for_itself(driven, moody):
    tasks = {"moody": None, "noop": 1}
    ids = [driven.request("moody", {"number": number}) for number in range(3)]
    anna = Peer(driven, tasks=tasks).join()
    anna.follow()
    assert driven.states(*ids) == ["offered", "pending", "pending"]
    Mood.good = False
    for number in range(4):
        Peer(driven, f"worker {number}", tasks=tasks, disk=number).join()
    driven.pass_time(A_SECOND)
    assert len({class_of(driven, one) for one in ids}) == 3
    assert len(driven.pool._matching.escaped()) == 3
    anna.claim(ids[0])
    driven.turn()
    assert len(anna.hear(Void)) == 1
    assert driven.states(*ids) == ["pending"] * 3
    young = driven.request("moody", {"number": 9})
    assert driven.pool._requirements.get(class_of(driven, young)).escaped
    Mood.good = True
    anna.say(anna.hello(now="in another mood"))
    driven.turn()
    anna.follow()

    anna.run(ids[0])
    assert moody.name == "moody"


def test_a_worker_that_refuses_what_the_scheduler_thinks_it_can_run_has_each_request_asked_for_itself(driven):
    anna, bert = Peer(driven, tasks=TASKS, colour="red").join(), Peer(driven, "bert", tasks=TASKS, colour="red").join()
    ids = [driven.request("picky", {"colour": "red", "size": size}) for size in range(3)]
    anna.refuse(ids[0])
    driven.turn()
    for peer in (anna, bert):
        peer.follow()

    assert len({class_of(driven, one) for one in ids}) == 3
    assert all(driven.pool._requirements.get(class_of(driven, one)).escaped for one in ids[1:])
    assert driven.view(ids[0]).requirement in driven.pool._uses
    assert [queue for queue, ticket in driven.take_tickets() if ticket.request.id == ids[0]][-1] == bert.queue


def test_a_refusal_by_newer_metadata_than_the_scheduler_has_escapes_nothing(driven):
    anna = Peer(driven, tasks=TASKS, colour="red").join()
    one, other = (driven.request("picky", {"colour": "red", "size": size}) for size in range(2))
    anna.follow()
    hello = anna.hello(colour="blue")
    anna.refuse(one)
    driven.turn()
    assert not driven.pool._matching.escaped()
    anna.say(hello)
    driven.turn()

    assert class_of(driven, one) == class_of(driven, other)
    assert driven.states(one, other) == ["pending", "pending"]


# ---------------------------------------------------------------- private requirements


def test_what_a_refused_request_has_alone_is_gone_with_it(driven):
    anna = Peer(driven, tasks=TASKS, colour="red").join()
    bert = Peer(driven, "bert", tasks=TASKS, colour="red").join()
    one = driven.request("picky", {"colour": "red"}, concurrency_key="saw")
    bert.follow()
    anna.follow()
    anna.refuse(one)
    driven.turn()
    bert.follow()
    assert driven.pool._refused.keys() == {one}
    own = driven.pool._entries[one].own
    assert own in driven.pool._matching.requirements()
    bert.end(bert.run(one))

    assert not driven.pool._refused
    assert own not in driven.pool._matching.requirements()
    assert own not in driven.pool._dispatch._requirements
    assert not driven.pool._dispatch._keys


def test_a_pause_of_a_task_holds_back_what_is_refused_too_also_if_it_is_refused_later(driven):
    anna = Peer(driven, tasks=TASKS, colour="red").join()
    bert = Peer(driven, "bert", tasks=TASKS, colour="red").join()
    one, two = (driven.request("picky", {"colour": "red", "size": size}) for size in range(2))
    for peer in (anna, bert):
        peer.follow()
    anna.refuse(one)
    driven.pool.pause(Pause(kind="task", name="Picky", reason="now"), driven.moment, lambda _: None)
    driven.turn()
    anna.refuse(two)
    driven.turn()
    for peer in (anna, bert):
        peer.follow()
    assert driven.states(one, two) == ["pending", "pending"]
    assert driven.waits(one) == driven.waits(two) == "the task picky is paused"
    driven.pool.resume("task", "PICKY", lambda _: None)
    driven.turn()

    assert driven.states(one, two) == ["offered", "pending"]
    bert.end(bert.run(one))
    assert driven.states(two) == ["offered"]


# ---------------------------------------------------------------- classes that nobody needs


def settle(driven, seconds):
    for peer in driven.peers:
        peer.say(peer.beat())
    driven.pass_time(seconds)
    driven.turn()


def test_a_requirement_class_is_kept_for_a_while_and_then_gone_altogether(driven):
    anna = Peer(driven, tasks=TASKS, colour="red").join()
    driven.peers = [anna]
    one, stays = driven.request("picky", {"colour": "red"}), driven.request("picky", {"colour": "none"})
    anna.follow()
    anna.end(anna.run(one))
    number = class_of(driven, one)
    settle(driven, pool.LINGER - A_SECOND)
    assert number in driven.pool._uses
    again = driven.request("picky", {"colour": "red", "size": 3})
    assert class_of(driven, again) == number
    anna.follow()
    anna.end(anna.run(again))
    settle(driven, pool.LINGER + pool.SWEEP)

    assert driven.pool._uses.keys() == {class_of(driven, stays)}
    assert set(driven.pool._matching.requirements()) == {class_of(driven, stays)}
    assert len(driven.pool._requirements) == 1
    newer = driven.request("picky", {"colour": "red"})
    assert class_of(driven, newer) > class_of(driven, stays) > number


def test_only_so_many_requirement_classes_without_requests_are_kept(driven, monkeypatch):
    monkeypatch.setattr(pool, "MAX_IDLE", 2)
    anna = Peer(driven, tasks=TASKS).join()
    numbers = []
    for colour in ("red", "blue", "green", "grey"):
        one = driven.request("picky", {"colour": colour})
        numbers.append(class_of(driven, one))
        driven.abort(one)
        driven.pass_time(A_SECOND)
    anna.say(anna.beat())
    driven.pass_time(pool.SWEEP + A_SECOND)

    assert [*driven.pool._uses] == numbers[2:]


def test_a_class_that_only_what_waits_for_others_has_is_kept(driven, monkeypatch):
    monkeypatch.setattr(pool, "MAX_IDLE", 0)
    first = driven.request()
    blocked = driven.request("picky", {"colour": "red"}, after=[After(request=first)])
    number = class_of(driven, blocked)
    kept = []
    for _ in range(2):
        driven.pass_time(pool.SWEEP + A_SECOND)
        kept.append(number in driven.pool._uses)
        driven.abort(blocked)
        driven.turn()

    assert kept == [True, False]
    assert class_of(driven, first) in driven.pool._uses


def test_capability_classes_that_nothing_tells_apart_any_more_become_one(driven):
    anna, bert = (Peer(driven, name, tasks=TASKS, colour=name).join() for name in ("red", "blue"))
    driven.peers = [anna, bert]
    assert anna.queue == bert.queue
    one = driven.request("picky", {"colour": "red"})
    for peer in (anna, bert):
        peer.follow()
    assert anna.queue != bert.queue
    anna.end(anna.run(one))
    for _ in range(2):
        settle(driven, pool.LINGER + pool.SWEEP)
    for peer in (anna, bert):
        peer.follow()

    assert anna.queue == bert.queue
    assert driven.pool.views.classes() == 1
    assert driven.queues == {anna.queue}
    assert driven.states(driven.request()) == ["offered"]


# ---------------------------------------------------------------- what requires sees


def test_requires_sees_the_metadata_as_they_are_whatever_the_task_has_done_to_its_own(driven):
    class Changing(Task):
        TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {"type": "object"}

        def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
            return worker_metadata.pop("mem", None) is not None  # type: ignore[attr-defined]  # as tasks do

        def _execute(self) -> bool:
            return True

    one = driven.request("changing", {}, requires={"required": ["mem"]})
    anna = Peer(driven, tasks={"changing": None}, mem=4).join()

    anna.run(one)


def test_a_class_whose_queue_is_lost_gets_another_and_what_was_in_it_is_offered_anew(driven):
    anna = Peer(driven).join()
    request = driven.request()
    [(queue, ticket)] = driven.take_tickets()
    assert anna.queue == queue

    driven.pool.queue_lost(queue)
    driven.turn()
    [assign] = anna.hear(Assign)
    assert assign.queue not in {queue, None}
    assert assign.queue in driven.queues
    [(other, again)] = driven.take_tickets()
    assert (other, again.request.id, again.attempt) == (assign.queue, request, ticket.attempt)
    driven.pool.queue_lost(queue)  # said twice: it has another
    driven.turn()
    assert anna.hear(Assign) == []
    [shown] = driven.pool.views.capabilities(GetCapabilities(), driven.steady).classes
    assert shown.queue == other

    anna.queue = other
    anna.say(anna.beat())
    driven.turn()
    assert anna.end(anna.run(request)) == "recorded"


def test_when_the_broker_takes_messages_again_leases_and_silences_begin_anew(driven):
    anna = Peer(driven).join()
    request = driven.request()
    anna.run(request)
    driven.pass_time(LEASE + 10)  # a probe is under way
    assert driven.probes
    driven.pool.unblocked(driven.moment)
    driven.pass_probes()
    assert driven.states(request) == ["running"]
    assert driven.worker("anna").state == "online"
    driven.pass_time(LEASE + 10)
    driven.pass_probes()
    assert driven.worker("anna").state == "offline"
    assert driven.view(request).attempts[0].result == "lost"
