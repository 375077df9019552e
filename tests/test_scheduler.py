"""The scheduler's loop without a broker: what is committed, how often, and when commands are judged."""

import asyncio
from functools import partial
from types import SimpleNamespace

import pytest

from mqworker import scheduler as scheduler_room
from mqworker.access import Access
from mqworker.errors import LedgerLost, LedgerUnavailable
from mqworker.ledger import Ledger
from mqworker.messages import MAX_MESSAGE_BYTES, Abort, Request, Verdict, decode
from mqworker.metrics import SchedulerMetrics
from mqworker.outbox import Send
from mqworker.scheduler import Scheduler, kept_by
from tests.driving import TOPOLOGY, a_delivery, an_id


class Unplugged:
    """A link to no broker."""

    epoch = "here"
    blocked = False
    last_error = None

    def __init__(self, *_args, **_doors):
        self.published = []

    def publish(self, **message):
        self.published.append(message)
        return asyncio.get_running_loop().create_future()


@pytest.fixture
def scheduler():
    ledger = Ledger.open("sqlite://")
    one = Scheduler(
        amqp_url="amqp://nowhere",
        topology=TOPOLOGY,
        ledger=ledger,
        store=SimpleNamespace(id="store"),
        metrics=SchedulerMetrics(version="0"),
        retry_delay=1.0,
        offer_timeout=10.0,
        no_worker_after=300.0,
        pause_after=3,
        group_weights={},
        concurrency_limits={},
        access=Access(),
        link=Unplugged,
    )
    one._pool.restore(kept_by(ledger), one._now())
    yield one
    one._ledger_thread.shutdown()
    ledger.close()


def test_a_set_whose_reading_fails_behind_its_commit_is_committed_once(scheduler, monkeypatch):
    monkeypatch.setattr(scheduler_room, "COMMIT_RETRY", 0.0)
    failures = [LedgerUnavailable("the disk is full")] * 2
    look_up = scheduler_room.look_up

    def fail_first(ledger, asks):
        if failures:
            raise failures.pop()
        return look_up(ledger, asks)

    monkeypatch.setattr(scheduler_room, "look_up", fail_first)
    receipts = []
    draft = scheduler._pool.examine(Request(id=an_id(1), task="noop"))
    submit = partial(scheduler._pool.submit, [draft], {}, scheduler._now())
    submit(receipts.append)
    asyncio.run(scheduler._record())

    assert [one.status for receipt in receipts for one in receipt.results] == ["accepted"]
    assert scheduler._pool._dispatch.waits(an_id(1))
    assert scheduler._metrics.registry.get_sample_value("mqworker_ledger_commit_failures_total") == 2


def test_a_command_that_comes_while_a_set_is_committed_is_judged_with_the_next(scheduler):
    """Else it would find memory as it was judged to be, and what is read behind the commit as it was before it."""
    asked = []

    async def command():
        waits = asyncio.create_task(scheduler._settled(asked.append))
        await asyncio.sleep(0)
        assert asked == []
        await scheduler._turn()
        [settle] = asked
        settle("done")
        return await waits

    assert asyncio.run(command()) == "done"


def test_nothing_is_said_while_another_scheduler_may_have_been_elected(scheduler):
    class Lost:
        sure = False

        def commit(self, writes):
            assert writes == []
            raise LedgerLost("another one was elected")

    asyncio.run(scheduler._record())  # what it asks at first
    scheduler._ledger = Lost()
    with pytest.raises(LedgerLost):
        asyncio.run(scheduler._record())

    assert scheduler._writing.published == []


def test_a_question_to_a_ledger_that_is_away_is_asked_again(scheduler, monkeypatch):
    monkeypatch.setattr(scheduler_room, "COMMIT_RETRY", 0.0)
    failures = [LedgerUnavailable("the session was cut")] * 2

    def count():
        if failures:
            raise failures.pop()
        return 3

    assert asyncio.run(scheduler._in_ledger_thread(count)) == 3
    assert scheduler._ledger_well


def test_reports_that_come_faster_than_the_ledger_commits_are_dropped_and_counted(scheduler, monkeypatch):
    monkeypatch.setattr(scheduler_room, "MAX_WAITING_BYTES", 1000)
    for _ in range(100):
        scheduler._take_report(a_delivery(b"x" * 100))

    assert len(scheduler._inbox) == 11
    assert scheduler._metrics.registry.get_sample_value("mqworker_messages_unreadable_total", {"source": "flood"}) == 89
    assert scheduler._flooded


def test_verdicts_that_are_too_large_together_go_one_by_one(scheduler):
    reason = "x" * 3_000_000
    parts = [Abort(request=an_id(number), attempt=1, token="t", reason=reason) for number in range(5)]  # noqa: S106  # a token of a claim

    async def publish():
        scheduler._publish(Send(exchange="v", key="k", message=Verdict(term=1, parts=parts)))

    asyncio.run(publish())
    published = [message["body"] for message in scheduler._writing.published]
    assert all(len(body) < MAX_MESSAGE_BYTES for body in published)
    assert [part for body in published for part in decode(body, Verdict).parts] == parts
