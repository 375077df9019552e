"""A link through a proxy that cuts, holds, slows, refuses and leaves half-open, at random: it always comes back."""

import asyncio
import random
from contextlib import suppress
from pathlib import Path

import pytest

from mqworker.amqp import Consumer, Link, Plan
from mqworker.errors import BrokerUnavailable, NotPublished
from mqworker.topology import Exchange, Queue, Topology
from tests.proxy import Proxy

pytestmark = pytest.mark.live

SOON = 60
ROUNDS = 14


def descriptors():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("seed", [1, 2])
def test_a_link_comes_back_from_whatever_the_network_does_and_leaves_nothing_behind(amqp_url, prefix, seed):
    exchange, queue = Topology(prefix).work, f"{prefix}.q"
    received: set[bytes] = set()
    confirmed: set[bytes] = set()
    arrived = asyncio.Event()
    chance = random.Random(seed)  # noqa: S311  # a seed must give the same run again

    def plan(_epoch):
        return Plan(
            exchanges=(Exchange(name=exchange),),
            queues=(Queue(name=queue, arguments={"x-expires": 60_000}, bindings=((exchange, "k"),)),),
            consumers=(Consumer(queue=queue, on_delivery=take),),
        )

    def take(delivery):
        received.add(delivery.body)
        link.ack(delivery)
        arrived.set()

    async def publish(number):
        body = f"{number} ".encode() + b"x" * chance.choice([1, 100_000])
        try:
            await link.publish(exchange=exchange, key="k", body=body, kind="test")
        except NotPublished:
            return
        confirmed.add(body)

    async def ask():
        for question in (link.refresh(), link.delete(f"{prefix}.none")):
            try:
                await question
            except BrokerUnavailable:
                continue

    faults = {
        "cut": lambda proxy: proxy.cut(),
        "hold": lambda proxy: proxy.hold(),
        "slow": lambda proxy: proxy.slow(delay=0.01, piece=chance.choice([1, 7, 1000])),
        "refuse": lambda proxy: (proxy.refuse(), proxy.cut()),
        "deaf": lambda proxy: (proxy.deafen(), proxy.cut()),
        "half-open": lambda proxy: proxy.half_open(),
    }

    async def scenario(proxy):
        nonlocal link
        link = Link(f"{proxy.url(amqp_url)}?heartbeat=2&connection_timeout=2000", name="under fire", plan=plan)
        running = asyncio.create_task(link.run())
        await link.wait_up(SOON)
        work = set()
        for number in range(ROUNDS):
            with suppress(BrokerUnavailable):
                await link.wait_up(3)
            for step in range(10):
                if step == 5:  # half of them before it
                    await asyncio.to_thread(faults[chance.choice(sorted(faults))], proxy)
                work.add(asyncio.create_task(publish(number * 100 + step)))
            work.add(asyncio.create_task(ask()))
            await asyncio.sleep(chance.uniform(0, 0.7))  # while it lasts
            await asyncio.to_thread(proxy.heal)
            await asyncio.sleep(chance.uniform(0, 0.2))
        async with asyncio.timeout(SOON):
            await asyncio.gather(*work)  # each has its end
            while not any(body.startswith(b"last ") for body in confirmed):
                await link.wait_up()
                await publish("last")
            while confirmed - received:
                arrived.clear()
                await arrived.wait()
            await link.close()
            await running
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert proxy.accepted < 40 * ROUNDS  # it does not spin

    link = None
    before = descriptors()
    with Proxy.before(amqp_url) as proxy:
        asyncio.run(scenario(proxy))
    assert len(confirmed) >= ROUNDS
    assert descriptors() <= before
