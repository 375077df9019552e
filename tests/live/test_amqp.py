"""The broker's door against a real broker: confirms, returns, refusals, and every way to lose it."""

import asyncio
import gc
import itertools
import os
import select
import signal
import socket
import ssl
import subprocess
from collections import Counter
from contextlib import asynccontextmanager, suppress
from urllib.parse import unquote, urlsplit, urlunsplit

import pytest
from pika import spec
from pika.adapters.asyncio_connection import _AsyncioIOServicesAdapter
from pika.connection import Connection

from mqworker import amqp
from mqworker.amqp import REPLY_TO, Consumer, Link, Plan
from mqworker.brokerurl import check_url, read_url, redact
from mqworker.errors import BrokerRefused, BrokerUnavailable, NotPublished, SettingsError
from mqworker.topology import Exchange, Queue, Topology
from tests.proxy import Proxy

pytestmark = pytest.mark.live

SOON = 30  # seconds: a deadline for a broker under load, not an expectation


class Watch:
    """A link with everything it tells, to be awaited."""

    def __init__(self, url, plan=lambda _: Plan(), **arguments):
        self.ups = asyncio.Queue()
        self.downs = asyncio.Queue()
        self.blocks = asyncio.Queue()
        self.link = Link(
            url,
            name="test",
            plan=plan,
            on_up=self.ups.put_nowait,
            on_down=self.downs.put_nowait,
            on_blocked=self.blocks.put_nowait,
            **arguments,
        )


async def soon(awaitable):
    return await asyncio.wait_for(awaitable, SOON)


@asynccontextmanager
async def running(url, plan=lambda _: Plan(), *, wait=True, **arguments):
    """Run a link; what asyncio would only print fails the test."""
    printed = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: printed.append(context))
    watch = Watch(url, plan, **arguments)
    task = asyncio.create_task(watch.link.run())
    try:
        if wait:
            await watch.link.wait_up(SOON)
            await watch.ups.get()
        yield watch
    finally:
        await soon(watch.link.close())
        await soon(task)
    gc.collect()
    assert printed == []


class Names:
    """A direct exchange and a queue bound to it, under a test's own prefix."""

    def __init__(self, prefix, **queue):
        self.exchange = Topology(prefix).work  # a name that is cleared away on a foreign broker
        self.queue = f"{prefix}.q"
        self.exchanges = (Exchange(name=self.exchange),)
        self.queues = (Queue(**{"name": self.queue, "bindings": ((self.exchange, "k"),), **queue}),)

    def plan(self, *consumers):
        return lambda _: Plan(exchanges=self.exchanges, queues=self.queues, consumers=consumers, uses=(self.exchange,))

    def publish(self, link, body=b"{}", key="k", **properties):
        return link.publish(exchange=self.exchange, key=key, body=body, kind="test", **properties)

    async def barrier(self, link):
        """Wait for an answer that the broker gives after whatever it had to say or was told before."""
        await soon(self.publish(link, key="nobody", mandatory=False))


@pytest.fixture
def names(prefix):
    # it expires, so that a foreign broker keeps nothing; an exclusive one would be gone with its connection
    return Names(prefix, arguments={"x-expires": 60_000})


def other(url, **parts):
    return urlunsplit(urlsplit(url)._replace(**parts))


def with_user(url, user, password):
    return other(url, netloc=f"{user}:{password}@{urlsplit(url).hostname}:{urlsplit(url).port}")


# ---------------------------------------------------------------- publishing


def test_a_confirmed_message_arrives_with_all_it_carries(amqp_url, names):
    async def scenario():
        got = asyncio.Queue()
        async with running(amqp_url, names.plan(Consumer(queue=names.queue, on_delivery=got.put_nowait))) as watch:
            body = b"x" * 300_000  # more than two frames
            await soon(
                names.publish(
                    watch.link, body, message_id="m", correlation_id="c", reply_to="somewhere", headers={"n": 1}
                )
            )
            delivery = await soon(got.get())

            assert delivery.body == body
            assert (delivery.message_id, delivery.correlation_id, delivery.reply_to) == ("m", "c", "somewhere")
            assert (delivery.exchange, delivery.key, delivery.kind) == (names.exchange, "k", "test")
            assert (delivery.epoch, delivery.redelivered) == (watch.link.epoch, False)
            assert delivery.headers == {"n": 1}
            watch.link.ack(delivery)

    asyncio.run(scenario())


def test_a_returned_message_fails_its_publish_and_no_other(amqp_url, names):
    async def scenario():
        async with running(amqp_url, names.plan()) as watch:
            futures = []
            for number in range(50):
                futures.append(names.publish(watch.link, message_id=f"good {number}"))
                futures.append(names.publish(watch.link, key="nobody", message_id="the same one twice and more"))
            results = await soon(asyncio.gather(*futures, return_exceptions=True))

            assert results[0::2] == [None] * 50
            assert [type(result) for result in results[1::2]] == [NotPublished] * 50
            text = str(results[1])
            assert names.exchange in text
            assert "'nobody'" in text
            assert "312 NO_ROUTE" in text

    asyncio.run(scenario())


def test_a_message_that_need_not_be_routed_is_confirmed_without_a_queue(amqp_url, names):
    async def scenario():
        async with running(amqp_url, names.plan()) as watch:
            await soon(names.publish(watch.link, key="nobody", mandatory=False, persistent=False))

    asyncio.run(scenario())


def test_a_queue_that_is_full_fails_the_publish(amqp_url, prefix):
    full = {"x-max-length": 1, "x-overflow": "reject-publish", "x-expires": 60_000}

    async def scenario():
        names = Names(prefix, arguments=full)
        async with running(amqp_url, names.plan()) as watch:
            await soon(names.publish(watch.link))
            with pytest.raises(NotPublished, match=f"exchange '{names.exchange}' and key 'k' refused"):
                await soon(names.publish(watch.link))

    asyncio.run(scenario())


def test_a_connection_on_which_everything_is_refused_is_built_anew(amqp_url, prefix, monkeypatch):
    monkeypatch.setattr(amqp, "REFUSED_SECONDS", 0.3)
    full = {"x-max-length": 1, "x-overflow": "reject-publish", "x-expires": 60_000}

    async def refused(names, link):
        results = await soon(asyncio.gather(*(names.publish(link) for _ in range(20)), return_exceptions=True))
        assert {type(result) for result in results} == {NotPublished}

    async def scenario():
        names = Names(prefix, arguments=full)
        async with running(amqp_url, names.plan()) as watch:
            await soon(names.publish(watch.link))
            async with asyncio.timeout(SOON):
                while watch.downs.empty():
                    await refused(names, watch.link)
            assert f"refuses all that we publish to exchange '{names.exchange}'" in watch.downs.get_nowait()
            await soon(watch.ups.get())
            async with running(amqp_url, names.plan(Consumer(queue=names.queue, on_delivery=_drop, no_ack=True))):
                async with asyncio.timeout(SOON):
                    while True:  # what another consumer takes makes room, when the broker has told the queue
                        with suppress(NotPublished):
                            await names.publish(watch.link)
                            break

    asyncio.run(scenario())


def _drop(_delivery):
    pass


def test_a_queue_that_takes_a_message_now_and_then_costs_no_connection(amqp_url, prefix, monkeypatch):
    monkeypatch.setattr(amqp, "REFUSED_SECONDS", 0.3)
    full = {"x-max-length": 1, "x-overflow": "reject-publish", "x-expires": 60_000}

    async def scenario():
        names, taken = Names(prefix, arguments=full), 0
        names.queues += (Queue(name=f"{prefix}.free", bindings=((names.exchange, "free"),), arguments=full),)
        names.queues[-1].arguments.pop("x-overflow")
        async with running(amqp_url, names.plan()) as watch:
            until = asyncio.get_running_loop().time() + 1
            while asyncio.get_running_loop().time() < until:
                taken += 1
                await soon(names.publish(watch.link, key="free"))
                with suppress(NotPublished):
                    await soon(names.publish(watch.link))
            assert taken > 1
            assert watch.downs.empty()

    asyncio.run(scenario())


def test_of_a_queue_that_stays_full_connections_are_built_anew_ever_less_often():
    refusals, now, anew = amqp._Refusals(), 0.0, []
    while now < 400:
        if refusals.refused("e", now):
            anew.append(now)
            refusals.anew()
        now += 0.5

    waits = [later - earlier for earlier, later in itertools.pairwise([0.0, *anew])]
    assert waits[0] == amqp.REFUSED_SECONDS
    assert waits == sorted(waits)
    assert amqp.MOST_REFUSED_SECONDS <= waits[-1] <= amqp.MOST_REFUSED_SECONDS + 1

    refusals.taken("e")
    assert not refusals.refused("e", now)
    assert not refusals.refused("other", now + amqp.REFUSED_SECONDS)
    assert refusals.refused("e", now + amqp.REFUSED_SECONDS)


def test_publishing_to_a_missing_exchange_fails_what_is_outstanding_and_the_link_comes_back(amqp_url, names):
    async def scenario():
        async with running(amqp_url, names.plan()) as watch:
            first = watch.link.epoch
            lost = [watch.link.publish(exchange="no.such", key="k", body=b"", kind="test")]
            lost += [names.publish(watch.link) for _ in range(3)]
            results = await soon(asyncio.gather(*lost, return_exceptions=True))
            assert {type(result) for result in results} == {NotPublished}
            assert "no exchange 'no.such'" in str(results[-1])
            assert "'k'" in str(results[-1])
            assert "no exchange 'no.such'" in await soon(watch.downs.get())

            assert await soon(watch.ups.get()) != first
            await soon(names.publish(watch.link))

    asyncio.run(scenario())


def test_ten_thousand_publishes_are_all_confirmed(amqp_url, names):
    async def scenario():
        async with running(amqp_url, names.plan()) as watch:
            futures = [names.publish(watch.link, str(number).encode()) for number in range(10_000)]
            assert await soon(asyncio.gather(*futures)) == [None] * 10_000

        seen = set()
        all_seen = asyncio.Event()

        def on_delivery(delivery):
            seen.add(delivery.body)
            if len(seen) == 10_000:
                all_seen.set()

        consumer = Consumer(queue=names.queue, on_delivery=on_delivery, no_ack=True)
        async with running(amqp_url, names.plan(consumer)):
            await soon(all_seen.wait())

    asyncio.run(scenario())


def test_a_message_that_cannot_be_encoded_does_not_shift_the_confirms_of_others(amqp_url, names):
    async def scenario():
        async with running(amqp_url, names.plan()) as watch:
            with pytest.raises(NotPublished, match="at most 255 bytes"):
                await names.publish(watch.link, key="\N{EURO SIGN}" * 100)
            await soon(asyncio.gather(*(names.publish(watch.link) for _ in range(10))))

    asyncio.run(scenario())


def test_publishing_while_down_fails_at_once_and_needs_no_awaiting(names):
    async def scenario():
        with socket.socket() as nobody:  # bound, but it does not listen
            nobody.bind(("127.0.0.1", 0))
            url = f"amqp://u:secret@127.0.0.1:{nobody.getsockname()[1]}/v"
            async with running(url, wait=False) as watch:
                future = names.publish(watch.link)
                assert future.done()
                assert isinstance(future.exception(), NotPublished)
                names.publish(watch.link)  # thrown away: must not print "exception was never retrieved"
                with pytest.raises(BrokerUnavailable, match=r"declare queue 'q', but .* is down"):
                    await watch.link.declare(Queue(name="q"))
                with pytest.raises(BrokerUnavailable, match=r"delete queue 'q', but .* is down"):
                    await watch.link.delete("q")

    asyncio.run(scenario())


def test_close_waits_for_the_confirms_of_what_was_published(amqp_url, names):
    async def scenario():
        async with running(amqp_url, names.plan()) as watch:
            futures = [names.publish(watch.link, b"x" * 1000) for _ in range(2000)]
            assert not any(future.done() for future in futures)
            await soon(watch.link.close())
            assert [future.exception() for future in futures] == [None] * 2000
            await soon(watch.link.close())  # a second time changes nothing
            assert watch.downs.empty()  # nothing went wrong
            with pytest.raises(BrokerUnavailable, match="it is closed"):
                await watch.link.wait_up()

    asyncio.run(scenario())


def test_an_answer_comes_by_direct_reply_to_on_the_connection_that_asked(amqp_url, names):
    async def scenario():
        answers = asyncio.Queue()

        def on_question(delivery):
            answerer.link.ack(delivery)
            answerer.link.publish(
                exchange="", key=delivery.reply_to, body=delivery.body * 2, kind="answer", mandatory=False,
                correlation_id=delivery.correlation_id,
            )  # fmt: skip

        def asking(_):
            return Plan(exchanges=names.exchanges, replies=answers.put_nowait)

        answering = names.plan(Consumer(queue=names.queue, on_delivery=on_question))
        async with running(amqp_url, answering) as answerer, running(amqp_url, asking) as asker:
            await soon(names.publish(asker.link, b"ab", reply_to=REPLY_TO, correlation_id="7"))
            answer = await soon(answers.get())
            assert (answer.body, answer.kind, answer.correlation_id) == (b"abab", "answer", "7")
            asker.link.ack(answer)  # a no-op: such answers are not acknowledged, and the broker would end the channel
            await soon(names.publish(asker.link, b"cd", reply_to=REPLY_TO))
            assert (await soon(answers.get())).body == b"cdcd"

    asyncio.run(scenario())


# ---------------------------------------------------------------- consuming


def test_a_worker_asks_for_no_more_than_its_prefetch(amqp_url, names):
    async def scenario():
        got = asyncio.Queue()
        consumer = Consumer(queue=names.queue, on_delivery=got.put_nowait, prefetch=2)
        async with running(amqp_url, names.plan()) as watch:
            await soon(asyncio.gather(*(names.publish(watch.link, bytes([number])) for number in range(5))))
            watch.link.consume(consumer)
            watch.link.consume(consumer)  # it runs already: changes nothing
            first, second = await soon(got.get()), await soon(got.get())
            await names.barrier(watch.link)
            assert got.empty()
            watch.link.ack(second)
            third = await soon(got.get())
            watch.link.requeue(first)
            assert {(await soon(got.get())).body, third.body} == {first.body, b"\x02"}

    asyncio.run(scenario())


def test_a_cancelled_consumer_gets_nothing_more_and_the_rest_stays_in_the_queue(amqp_url, names):
    async def scenario():
        got = []
        some = asyncio.Event()

        def on_delivery(delivery):
            got.append(delivery)
            if len(got) == 1:
                watch.link.cancel(names.queue)  # more is on its way by now
                watch.link.cancel(names.queue)  # not consumed any more: changes nothing
                some.set()

        async with running(amqp_url, names.plan()) as watch:
            await soon(asyncio.gather(*(names.publish(watch.link, bytes([number])) for number in range(20))))
            watch.link.consume(Consumer(queue=names.queue, on_delivery=on_delivery))
            await soon(some.wait())
            await names.barrier(watch.link)
            assert [delivery.body for delivery in got] == [b"\x00"]
            watch.link.requeue(got[0])

            again = asyncio.Queue()
            watch.link.consume(Consumer(queue=names.queue, on_delivery=again.put_nowait))
            bodies = {(await soon(again.get())).body for _ in range(20)}
            assert bodies == {bytes([number]) for number in range(20)}
            assert watch.downs.empty()

    asyncio.run(scenario())


def test_nothing_is_delivered_before_the_owner_knows_that_the_link_is_up(amqp_url, names):
    async def scenario():
        async with running(amqp_url, names.plan()) as watch:
            await soon(asyncio.gather(*(names.publish(watch.link) for _ in range(50))))

        seen = []
        done = asyncio.Event()

        def on_delivery(delivery):
            seen.append(delivery.epoch == link.epoch)
            link.ack(delivery)
            if len(seen) == 51:
                done.set()

        # one consumer has to wait for the answer to the other: its deliveries are there long before the plan is done
        more = Consumer(queue=f"{names.queue}.2", on_delivery=on_delivery)
        plan = Plan(
            exchanges=names.exchanges,
            queues=(*names.queues, Queue(name=more.queue, arguments={"x-expires": 60_000})),
            consumers=(Consumer(queue=names.queue, on_delivery=on_delivery), more),
        )
        link = Link(amqp_url, name="test", plan=lambda _: plan, on_up=lambda _: seen.append("up"))
        task = asyncio.create_task(link.run())
        await soon(done.wait())
        assert seen == ["up"] + [True] * 50
        await soon(link.close())
        await soon(task)

    asyncio.run(scenario())


def test_an_exception_of_the_owner_comes_out_of_run(amqp_url, names):
    async def scenario():
        def on_delivery(_):
            raise ZeroDivisionError

        link = Link(amqp_url, name="test", plan=names.plan(Consumer(queue=names.queue, on_delivery=on_delivery)))
        task = asyncio.create_task(link.run())
        await link.wait_up(SOON)
        names.publish(link)
        with pytest.raises(ZeroDivisionError):
            await soon(task)
        await soon(link.close())
        assert link.epoch is None

    asyncio.run(scenario())


def test_an_exception_of_the_plan_comes_out_of_run(amqp_url):
    async def scenario():
        with pytest.raises(ZeroDivisionError):
            await soon(Link(amqp_url, name="test", plan=lambda _: 1 // 0).run())

    asyncio.run(scenario())


def test_a_cancelled_run_closes_its_connection(amqp_url):
    async def scenario():
        link = Link(amqp_url, name="test", plan=lambda _: Plan())
        task = asyncio.create_task(link.run())
        await link.wait_up(SOON)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(task)
        assert link.epoch is None
        await soon(link.close())

    asyncio.run(scenario())


# ---------------------------------------------------------------- queues and exchanges


def test_everything_in_the_topology_is_declared_on_a_real_broker(amqp_url, prefix):
    topology = Topology(prefix)

    def plan(epoch):
        return Plan(
            exchanges=topology.exchanges(),
            queues=(
                *topology.queues(),
                topology.class_queue("c1"),
                topology.report_queue(epoch),
                topology.worker_queue("w1", epoch),
                topology.follower_queue(epoch, ((topology.events, "request.#"), (topology.logs, "#"))),
            ),
        )

    async def scenario():
        async with running(amqp_url, plan) as one, running(amqp_url, plan) as two:
            worker = Topology.verdict_key("w1", one.link.epoch)
            routes = {
                topology.submit: topology.submit,
                topology.work: topology.class_queue("c1").name,
                topology.report: topology.report,
                topology.outcome: topology.outcome,
                topology.verdict: worker,
                topology.api: topology.api,
                topology.command: topology.command,
                topology.events: Topology.request_event_key("noop", "success"),
                topology.logs: "8a1f",
                topology.rejected: topology.rejected,
            }
            for exchange, key in routes.items():  # mandatory: it fails unless a queue takes it
                await soon(two.link.publish(exchange=exchange, key=key, body=b"{}", kind="test"))
            assert one.link.server[0] == "RabbitMQ"
            assert one.link.server[1][0].isdigit()

    asyncio.run(scenario())


def test_a_queue_is_deleted_only_if_unused_and_empty_and_a_refusal_harms_nothing(amqp_url, names):
    async def scenario():
        got = asyncio.Queue()
        async with running(amqp_url, names.plan()) as watch:
            epoch = watch.link.epoch
            await soon(names.publish(watch.link))
            with pytest.raises(BrokerRefused, match=f"'{names.queue}' to be unused and empty, but: .*not empty"):
                await soon(watch.link.delete(names.queue))

            watch.link.consume(Consumer(queue=names.queue, on_delivery=got.put_nowait))
            watch.link.ack(await soon(got.get()))
            with pytest.raises(BrokerRefused, match="in use"):
                await soon(watch.link.delete(names.queue))

            watch.link.cancel(names.queue)
            await names.barrier(watch.link)
            await soon(watch.link.delete(names.queue))
            await soon(watch.link.delete(names.queue))  # it is gone: that is what was asked for
            with pytest.raises(NotPublished, match="NO_ROUTE"):
                await soon(names.publish(watch.link))
            await soon(watch.link.declare(names.queues[0]))
            await soon(names.publish(watch.link))
            assert watch.link.epoch == epoch

    asyncio.run(scenario())


def test_a_plan_that_the_broker_refuses_is_said_at_once_and_by_name(amqp_url, names):
    async def scenario():
        async with running(amqp_url, names.plan()):
            conflict = Names(names.queue.removesuffix(".q"), arguments={"x-expires": 61_000})
            async with running(amqp_url, conflict.plan(), wait=False) as watch:
                with pytest.raises(BrokerRefused, match=f"PRECONDITION_FAILED.*{names.queue}"):
                    await watch.link.wait_up()
                assert watch.downs.empty()  # it has never been up

    asyncio.run(scenario())


def test_a_declaration_that_the_broker_refuses_fails_and_harms_nothing_else(amqp_url, names):
    async def scenario():
        async with running(amqp_url, names.plan()) as watch:
            epoch = watch.link.epoch
            with pytest.raises(BrokerRefused, match=f"to declare queue '{names.queue}', but: PRECONDITION_FAILED"):
                await soon(watch.link.declare(Queue(name=names.queue)))
            many = [Queue(name=f"{names.queue}.{number}", exclusive=True, durable=False) for number in range(100)]
            await soon(asyncio.gather(*(watch.link.declare(queue) for queue in many)))
            await soon(names.publish(watch.link))
            assert watch.link.epoch == epoch

    asyncio.run(scenario())


# ---------------------------------------------------------------- losing the broker


def test_a_connection_closed_by_the_broker_is_rebuilt_and_old_tags_are_ignored(as_own_user, names, prefix, manage):
    async def scenario():
        got = asyncio.Queue()
        epochs = []

        def plan(epoch):
            epochs.append(epoch)
            own = Queue(name=f"{names.queue}.{epoch}", durable=False, exclusive=True)
            return Plan(
                exchanges=names.exchanges,
                queues=(*names.queues, own),
                consumers=(
                    Consumer(queue=names.queue, on_delivery=got.put_nowait),
                    Consumer(queue=own.name, on_delivery=got.put_nowait, no_ack=True),
                ),
            )

        async with running(as_own_user(configure=".*", write=".*", read=".*"), plan) as watch:
            first = watch.link.epoch
            await soon(names.publish(watch.link, b"1"))
            old = await soon(got.get())

            await asyncio.to_thread(manage, "DELETE", f"connections/username/{prefix}")
            assert "CONNECTION_FORCED" in await soon(watch.downs.get())
            second = await soon(watch.ups.get())
            assert second == watch.link.epoch != first
            assert epochs == [first, second]

            again = await soon(got.get())
            assert (again.body, again.redelivered, again.epoch) == (b"1", True, second)
            assert again.tag == old.tag  # so that acknowledging the old one would settle the new one
            watch.link.ack(old)
            watch.link.requeue(old)
            watch.link.requeue(again)
            assert (await soon(got.get())).body == b"1"  # had the old ack counted, this would have ended the channel
            await soon(watch.link.publish(exchange="", key=f"{names.queue}.{second}", body=b"2", kind="test"))
            assert (await soon(got.get())).body == b"2"
            assert watch.downs.empty()

    asyncio.run(scenario())


def test_a_consumer_cancelled_by_the_broker_is_started_again(own_amqp_url, names, prefix, manage):
    async def scenario():
        got = asyncio.Queue()
        async with running(own_amqp_url, names.plan(Consumer(queue=names.queue, on_delivery=got.put_nowait))) as watch:
            await asyncio.to_thread(manage, "DELETE", f"queues/{prefix}/{names.queue}")
            assert f"cancelled our consumer of queue '{names.queue}'" in await soon(watch.downs.get())
            await soon(watch.ups.get())
            await soon(names.publish(watch.link, b"1"))
            assert (await soon(got.get())).body == b"1"

    asyncio.run(scenario())


def test_a_broker_that_is_killed_and_started_again_has_every_confirmed_message(private_node, prefix):
    node = private_node(plugins=())
    names = Names(prefix, arguments={"x-queue-type": "quorum"})

    async def scenario():
        async with running(node.url, names.plan()) as watch:
            # RabbitMQ loses a quorum queue that is younger than about a second when it is killed (3.10 to 4.3)
            await asyncio.sleep(2)
            await soon(asyncio.gather(*(names.publish(watch.link, str(number).encode()) for number in range(300))))

            await asyncio.to_thread(node.kill)
            await soon(watch.downs.get())
            with pytest.raises(NotPublished, match="is down"):
                await names.publish(watch.link)
            with pytest.raises(BrokerUnavailable):
                await watch.link.wait_up(0.2)
            await asyncio.to_thread(node.start)
            await soon(watch.ups.get())
            await soon(names.publish(watch.link, b"300"))

        bodies = set()
        whole = asyncio.Event()

        def on_delivery(delivery):
            bodies.add(delivery.body)
            if len(bodies) == 301:
                whole.set()

        consumer = Consumer(queue=names.queue, on_delivery=on_delivery, prefetch=1000)
        async with running(node.url, names.plan(consumer)):
            await soon(whole.wait())
            assert bodies == {str(number).encode() for number in range(301)}

    asyncio.run(scenario())


def test_an_alarm_of_the_broker_is_told_and_ends_the_connection_when_it_lasts(node_to_hurt, names):
    async def scenario():
        async with (
            running(node_to_hurt.url, names.plan()) as patient,
            running(node_to_hurt.url, names.plan(), blocked_seconds=0.5) as hasty,
        ):
            try:
                await asyncio.to_thread(node_to_hurt.ctl, "set_vm_memory_high_watermark", "0.00001")
                waiting, lost = names.publish(patient.link), names.publish(hasty.link)
                assert await soon(patient.blocks.get()) is True
                assert await soon(hasty.blocks.get()) is True
                assert patient.link.blocked

                with pytest.raises(NotPublished, match="memory or disk alarm"):
                    await soon(lost)
                assert "memory or disk alarm" in await soon(hasty.downs.get())
                assert await soon(hasty.blocks.get()) is False
                assert not waiting.done()
            finally:
                await asyncio.to_thread(node_to_hurt.ctl, "set_vm_memory_high_watermark", "0.4")
            assert await soon(patient.blocks.get()) is False
            await soon(waiting)
            assert not patient.link.blocked
            await soon(hasty.ups.get())
            await soon(names.publish(hasty.link))

    asyncio.run(scenario())


def test_close_gives_up_on_a_frozen_broker(node_to_hurt, names, monkeypatch):
    monkeypatch.setattr(amqp, "CONFIRM_SECONDS", 0.5)

    async def scenario():
        async with running(node_to_hurt.url, names.plan()) as watch:
            os.kill(node_to_hurt.pid, signal.SIGSTOP)
            try:
                future = names.publish(watch.link)
                await soon(watch.link.close())
                assert isinstance(future.exception(), NotPublished)
            finally:
                os.kill(node_to_hurt.pid, signal.SIGCONT)

    asyncio.run(scenario())


def test_close_gives_up_on_a_stranger_that_never_answers():
    async def scenario():
        met, gone = asyncio.Event(), asyncio.Event()

        async def listen(reader, writer):
            met.set()
            await reader.read()
            gone.set()
            writer.close()

        server = await asyncio.start_server(listen, "127.0.0.1", 0)
        async with running(f"amqp://127.0.0.1:{server.sockets[0].getsockname()[1]}", wait=False) as watch:
            await soon(met.wait())
            with pytest.raises(BrokerUnavailable, match="nobody answers"):
                await watch.link.wait_up(0.1)
            await soon(watch.link.close())
            await soon(gone.wait())  # it has hung up
        server.close()
        await server.wait_closed()

    asyncio.run(scenario())


# ---------------------------------------------------------------- not getting in


@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param(lambda url: with_user(url, "nobody", "secret"), "ACCESS_REFUSED", id="wrong user"),
        pytest.param(lambda url: other(url, path="/no-such-vhost"), "no-such-vhost not found", id="missing vhost"),
    ],
)
def test_who_is_refused_is_told_at_once_where_and_as_whom(amqp_url, change, told, caplog):
    async def scenario():
        url = change(amqp_url)
        async with running(url, wait=False) as watch:
            with pytest.raises(BrokerRefused, match=told) as caught:
                await soon(watch.link.wait_up())
            text = str(caught.value)
            parts = urlsplit(url)
            assert f"{parts.hostname}:{parts.port}" in text
            assert f"vhost {unquote(parts.path[1:])!r}" in text
            assert f"user {parts.username!r}" in text
            assert parts.password not in text
            assert watch.link.last_error is caught.value
            assert caplog.records == []  # pika would tell it in ten lines

    asyncio.run(scenario())


def test_a_user_who_may_not_declare_is_told_what_nobody_has_declared(as_own_user, names):
    async def scenario():
        async with running(as_own_user(configure="^$", write=".*", read=".*"), names.plan(), wait=False) as watch:
            missing = f"no scheduler has set up .*NOT_FOUND.*{names.exchange}.*`mqworker topology declare`"
            with pytest.raises(BrokerUnavailable, match=missing):
                await soon(watch.link.wait_up(1.0))

    asyncio.run(scenario())


def test_a_user_who_may_not_declare_uses_what_others_have_declared(own_amqp_url, as_own_user, prefix):
    topology = Topology(prefix)

    def plan(_epoch):
        return Plan(exchanges=topology.exchanges(), queues=topology.queues(), uses=(topology.submit,))

    async def scenario():
        async with running(own_amqp_url, plan):
            pass
        submits = rf"^{prefix}\.submit$"  # RabbitMQ 4.3 refuses a look at anything else
        async with running(as_own_user(configure="^$", write=submits, read="^$"), plan) as watch:
            await soon(watch.link.publish(exchange=topology.submit, key=topology.submit, body=b"{}", kind="test"))

    asyncio.run(scenario())


def test_a_user_who_may_not_declare_a_queue_of_its_own_is_told_which(own_amqp_url, as_own_user, prefix):
    topology = Topology(prefix)

    def plan(epoch):
        return Plan(exchanges=topology.exchanges(), queues=(topology.worker_queue("anna", epoch),))

    async def scenario():
        async with running(own_amqp_url, lambda _: Plan(exchanges=topology.exchanges())):
            pass
        async with running(as_own_user(configure="^$", write=".*", read=".*"), plan, wait=False) as watch:
            with pytest.raises(BrokerRefused, match=rf"ACCESS_REFUSED.*{prefix}\.worker\.anna"):
                await soon(watch.link.wait_up())

    asyncio.run(scenario())


def test_what_is_published_names_its_user_and_what_is_put_aside_the_first_one(own_amqp_url, as_own_user, names, prefix):
    async def put_aside():
        got = asyncio.Queue()
        plan = names.plan(Consumer(queue=names.queue, on_delivery=got.put_nowait))
        theirs = as_own_user(configure=".*", write=".*", read=".*")
        async with running(own_amqp_url, plan) as watch, running(theirs, names.plan()) as other:
            await soon(names.publish(other.link, headers={"CC": ["elsewhere"], "n": 1}))
            first = await soon(got.get())
            mine = Queue(name=f"{names.queue}.2", exclusive=True, bindings=((names.exchange, names.exchange),))
            await soon(watch.link.declare(mine))
            watch.link.consume(Consumer(queue=f"{names.queue}.2", on_delivery=got.put_nowait))
            await soon(watch.link.put_aside(first, exchange=names.exchange, reason="no"))
            second = await soon(got.get())
            return first, second

    first, second = asyncio.run(put_aside())
    assert first.user_id == prefix
    assert second.user_id == unquote(urlsplit(own_amqp_url).username)
    assert second.headers == {
        "n": 1,
        "x-mqworker-reason": "no",
        "x-mqworker-exchange": names.exchange,
        "x-mqworker-user": prefix,
    }


def test_nobody_at_the_address_is_told_at_the_timeout():
    async def scenario():
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            port = nobody.getsockname()[1]
            async with running(f"amqp://u:secret@127.0.0.1:{port}/v", wait=False) as watch:
                with pytest.raises(
                    BrokerUnavailable, match=f"127.0.0.1:{port} .vhost 'v', user 'u'.*refused"
                ) as caught:
                    await watch.link.wait_up(0.5)
                assert "secret" not in str(caught.value)

    asyncio.run(scenario())


def test_a_host_that_does_not_exist_is_unavailable():
    async def scenario():
        async with running("amqp://no-such-host.invalid", wait=False) as watch:
            while watch.link.last_error is None:
                with suppress(BrokerUnavailable):
                    await watch.link.wait_up(0.1)
            assert isinstance(watch.link.last_error, BrokerUnavailable)
            assert "no-such-host.invalid:5672" in str(watch.link.last_error)

    asyncio.run(scenario())


def test_a_port_that_speaks_something_else_is_unavailable():
    async def scenario():
        async def greet(_reader, writer):
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        async with running(f"amqp://127.0.0.1:{server.sockets[0].getsockname()[1]}", wait=False) as watch:
            while watch.link.last_error is None:
                with suppress(BrokerUnavailable):
                    await watch.link.wait_up(0.1)
            assert "is this its AMQP port" in str(watch.link.last_error)
        server.close()
        await server.wait_closed()

    asyncio.run(scenario())


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path):
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-nodes",
            "-newkey",
            "rsa:2048",
            "-days",
            "1",
            "-subj",
            "/CN=localhost",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

    async def scenario():
        server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0, ssl=context)
        async with running(f"amqps://127.0.0.1:{server.sockets[0].getsockname()[1]}", wait=False) as watch:
            with pytest.raises(BrokerRefused, match="expected a certificate that we trust"):
                await soon(watch.link.wait_up())
        server.close()
        await server.wait_closed()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@host/",
        "amqp:",
        "amqp://",
        "amqp://user:secret@host:port/",
        "amqp://user:secret@host:0/",
        "amqp://user:secret/with-a-slash@host:5672/",
        "amqp://user:secret#hash@host:5672/",
        "amqp://[::1/",
        "amqp://user@host/",
        "amqp://user:secret@host/a/b",
        "amqp://user:secret@host/v?no_such_option=1",
        "amqp://user:secret@host/v?heartbeat=secret",
        "amqp://user:secret@host/v?heartbeat=5&heartbeat=6",
        "amqp://user:secret@host/v?heartbeat=",
        "amqp://user:secret@host/v?cacertfile=/ca.pem",
        "amqp://user:5672#hash@host/",
        "amqp://user:5672?query@host/",
        "amqp://user:secret@host,,other/",
        "amqp://user:secret@host,other:99999/",
        "amqp://user:secret@host,other/v,w/x",
        "amqps://user:secret@host/?verify=perhaps",
        "amqps://user:secret@host/?keyfile=/key.pem",
        "amqps://user:secret@host/?cacertfile=/no/such/ca.pem",
        "amqps://user:secret@host/?certfile=/cert.pem&auth_mechanism=external",
        "amqps://host/?auth_mechanism=external",
        "",
        "localhost:5672",
    ],
)
def test_what_is_no_broker_url_is_a_settings_error_without_the_password(url):
    with pytest.raises(SettingsError, match="expected") as caught:
        check_url(url)
    assert "secret@" not in str(caught.value)
    assert "secret/" not in str(caught.value)
    assert "secret#" not in str(caught.value)
    assert ":5672" not in str(caught.value)
    with pytest.raises(SettingsError):
        Link(url, name="test", plan=lambda _: Plan())


def test_who_logs_in_by_certificate_may_say_as_whom():
    url = "amqps://{}host/?certfile=/cert.pem&auth_mechanism=external"

    assert (read_url(url.format("")).user, read_url(url.format("")).password) == (None, None)
    assert (read_url(url.format("anna@")).user, read_url(url.format("anna@")).password) == ("anna", None)


def test_a_good_url_is_shown_without_its_password_and_options():
    shown = {
        "amqp://user:secret@host:5672/%2F?heartbeat=5": "amqp://user:***@host:5672/%2F",
        "amqps://host": "amqps://host",
        "amqp://user:secret@[::1]:1/v": "amqp://user:***@[::1]:1/v",
        "amqp://user:secret@h1:1,h2,[::1]:3/v?connection_timeout=500": "amqp://user:***@h1:1,h2,[::1]:3/v",
    }
    for url, expected in shown.items():
        assert check_url(url) == expected == redact(url)


def test_a_broker_that_hangs_up_is_tried_again_and_again():
    async def scenario():
        connects = Counter()
        server = await asyncio.start_server(
            lambda _reader, writer: (connects.update(n=1), writer.close()), "127.0.0.1", 0
        )
        async with running(f"amqp://127.0.0.1:{server.sockets[0].getsockname()[1]}", wait=False) as watch:
            while connects["n"] < 4:
                with suppress(BrokerUnavailable):
                    await watch.link.wait_up(0.1)
        server.close()
        await server.wait_closed()

    asyncio.run(asyncio.wait_for(scenario(), SOON))


@pytest.mark.parametrize("silent", ["BasicConsumeOk", "BasicCancelOk", "BasicAck"])
def test_what_the_broker_never_answers_ends_this_life_and_the_next_one_asks_anew(silent, amqp_url, names, monkeypatch):
    """Of the questions on a channel, pika asks one at a time: behind a missing answer, all others would wait."""
    monkeypatch.setattr(amqp, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(amqp, "UNCONFIRMED_SECONDS", 0.5)
    monkeypatch.setattr(amqp, "UNCONFIRMED_LOOK", 0.1)
    kind = {"BasicConsumeOk": spec.Basic.ConsumeOk, "BasicCancelOk": spec.Basic.CancelOk, "BasicAck": spec.Basic.Ack}
    process = Connection._process_frame

    def swallow(connection, frame):
        if not isinstance(getattr(frame, "method", None), kind[silent]):
            process(connection, frame)

    async def scenario():
        got = asyncio.Queue()
        consumer = Consumer(queue=names.queue, on_delivery=got.put_nowait)
        plan = names.plan(consumer) if silent == "BasicCancelOk" else names.plan()
        async with running(amqp_url, plan) as watch:
            monkeypatch.setattr(Connection, "_process_frame", swallow)
            sent = None
            if silent == "BasicConsumeOk":
                watch.link.consume(consumer)
            elif silent == "BasicCancelOk":
                watch.link.cancel(names.queue)
            else:
                sent = names.publish(watch.link)
            why = await soon(watch.downs.get())
            assert ("has not confirmed" if sent else "has not answered within") in why
            if sent:
                with pytest.raises(NotPublished, match="has not confirmed"):
                    await sent
            monkeypatch.setattr(Connection, "_process_frame", process)
            await soon(watch.link.wait_up())
            watch.link.consume(consumer)
            await soon(names.publish(watch.link))
            watch.link.ack(await soon(got.get()))

    asyncio.run(scenario())


@pytest.mark.parametrize("tls", [False, True])
def test_a_peer_that_resets_at_once_costs_a_try_and_not_its_whole_time(tls, amqp_url, monkeypatch):
    connect = _AsyncioIOServicesAdapter.create_streaming_connection

    def late(services, *, sock, **how):
        """Go on when the reset has come: in between, pika looks no more."""
        poll = select.poll()
        poll.register(sock, select.POLLHUP)
        assert poll.poll(SOON * 1000)
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return connect(services, sock=sock, **how)

    async def scenario(proxy):
        url = f"{proxy.url(amqp_url)}?connection_timeout=600000"
        url = url.replace("amqp://", "amqps://") if tls else url
        async with running(url, wait=False) as watch:
            while proxy.accepted < 4:  # noqa: ASYNC110  # the proxy counts in a thread of its own
                await asyncio.sleep(0.02)
            assert "reset" in str(watch.link.last_error)

    monkeypatch.setattr(_AsyncioIOServicesAdapter, "create_streaming_connection", late)
    with Proxy.before(amqp_url) as proxy:
        proxy.refuse()
        asyncio.run(asyncio.wait_for(scenario(proxy), SOON))


def test_who_waits_to_be_let_in_is_told_what_is_in_the_way(amqp_url, monkeypatch):
    monkeypatch.setattr("mqworker.amqp.PATIENCE_SECONDS", 0.2)
    told: list[str] = []

    async def wait() -> None:
        twice = asyncio.Event()

        def tell(text: str) -> None:
            told.append(text)
            if len(told) == 2:
                twice.set()

        nobody = Link("amqp://127.0.0.1:1/", name="test", plan=lambda _epoch: Plan())
        running = asyncio.create_task(nobody.run())
        waiting = asyncio.create_task(nobody.let_in(tell))
        await asyncio.wait_for(twice.wait(), 30)
        await nobody.close()
        with pytest.raises(BrokerUnavailable):
            await waiting
        await running
        monkeypatch.undo()  # a broker under load may need more
        somebody = Link(amqp_url, name="test", plan=lambda _epoch: Plan())
        running = asyncio.create_task(somebody.run())
        await somebody.let_in(tell)
        assert somebody.epoch is not None
        await somebody.close()
        await running

    asyncio.run(wait())
    assert all("127.0.0.1:1" in text for text in told)
