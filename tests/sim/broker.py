"""A broker in memory, and the Link to it: queues, confirms, returns, redelivery, and every way a connection can end."""

import random
from collections import deque
from dataclasses import dataclass, field

from mqworker.amqp import Delivery
from mqworker.errors import BrokerRefused, BrokerUnavailable, NotPublished
from tests.sim.loop import NOBODY, PROCESS

CONNECT_SECONDS = 10.0
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 3.0
REPLY = "amq.rabbitmq.reply-to."


@dataclass(slots=True)
class Message:
    exchange: str
    key: str
    body: bytes
    kind: str
    message_id: str | None
    correlation_id: str | None
    reply_to: str | None
    headers: dict
    persistent: bool


@dataclass(slots=True)
class Entry:
    """A message in a queue."""

    message: Message
    serial: int
    expires: float
    redelivered: bool = False


@dataclass(slots=True, eq=False)
class Subscription:
    connection: "Connection"
    consumer: object
    tag: int
    unacked: int = 0


@dataclass(slots=True)
class Queue:
    spec: object
    owner: "Connection | None"
    ttl: float
    entries: deque = field(default_factory=deque)
    subscriptions: deque = field(default_factory=deque)
    serial: int = 0


class Broker:
    """Hold the queues."""

    def __init__(self, loop, seed, watch):
        self.loop = loop
        self.seed = seed
        self.watch = watch
        self.running = True
        self.blocked = False
        self.queues = {}
        self.down = set()  # names of queues whose node is down
        self.bindings = {}
        self.connections = []
        self.echo = 0.0  # the share of messages that come a second time
        self.losing = 0.0  # the share of tickets that are confirmed, and lost with the node that had them
        self.lags = {}  # process name to the longest delay of its messages, in seconds
        self.late = {}  # likewise, of what it publishes alone
        self._opened = 0
        self._random = random.Random(f"{seed} broker")

    # ------------------------------------------------------------ connections

    def accept(self, link):
        self._opened += 1
        connection = Connection(self, link, self._opened)
        self.connections.append(connection)
        return connection

    def drop(self, connection, why):
        """End a connection at this end: what is unacknowledged goes back, what is exclusive dies."""
        if not connection.open_there:
            return
        connection.open_there = False
        self.connections.remove(connection)
        connection.down(connection.lost, why)
        for name, queue in list(self.queues.items()):
            if queue.owner is connection:
                self._remove(name)
        touched = {}
        for subscription in list(connection.subscriptions.values()):
            self._unsubscribe(subscription)
        for queue_name, entry, _ in connection.unacked.values():
            queue = self.queues.get(queue_name)
            if queue is not None:
                entry.redelivered = True
                queue.entries.append(entry)
                touched[queue_name] = queue
        connection.unacked.clear()
        for queue in touched.values():
            queue.entries = deque(sorted(queue.entries, key=lambda entry: entry.serial))
            self._pump(queue)

    def crash(self):
        """Die with everything that is not on disk."""
        self.running = self.blocked = False
        for connection in list(self.connections):
            self.drop(connection, "the broker died")
        for name, queue in list(self.queues.items()):
            if not queue.spec.durable:
                self._remove(name)
                continue
            kept = queue.spec.arguments.get("x-queue-type") == "quorum" or self._random.random() < 0.5
            queue.entries = deque(entry for entry in queue.entries if kept and entry.message.persistent)
            for entry in queue.entries:
                entry.redelivered = True

    def block(self, blocked):
        """Raise a memory alarm, or end it."""
        self.blocked = blocked
        for connection in list(self.connections):
            connection.down(connection.link.heard_blocked, connection, blocked)
            stalled, connection.stalled = connection.stalled, []
            for call, args in stalled:
                connection.arrive_up(call, args)

    def lose_queue(self, name, *, down):
        """Lose a queue with all that is in it; if its node is down, nobody can declare it again."""
        if down:
            self.down.add(name)
        queue = self.queues.get(name)
        if queue is None:
            return
        consumers = [subscription.connection for subscription in queue.subscriptions]
        self._remove(name)
        for connection in consumers:
            connection.down(connection.lost, f"the consumer of {name} was cancelled: the queue is gone")
            self.drop(connection, "closed by its client")

    # ------------------------------------------------------------ what connections ask

    def declare(self, connection, spec):
        if spec.name in self.down:
            return False
        if spec.name not in self.queues:
            ttl = spec.arguments.get("x-message-ttl")
            self.queues[spec.name] = Queue(
                spec=spec,
                owner=connection if spec.exclusive else None,
                ttl=float("inf") if ttl is None else ttl / 1000,
            )
        for binding in spec.bindings:
            bound = self.bindings.setdefault(binding, [])
            if spec.name not in bound:
                bound.append(spec.name)
        return True

    def delete(self, name):
        """Delete a queue that is neither used nor filled; say whether it is gone."""
        queue = self.queues.get(name)
        if queue is None:
            return True
        if queue.subscriptions or queue.entries:
            return False
        self._remove(name)
        return True

    def _remove(self, name):
        queue = self.queues.pop(name)
        for binding in queue.spec.bindings:
            bound = self.bindings.get(binding)
            if bound is not None and name in bound:
                bound.remove(name)
                if not bound:
                    del self.bindings[binding]
        for subscription in list(queue.subscriptions):
            subscription.connection.subscriptions.pop(subscription.tag, None)
        queue.subscriptions.clear()

    def subscribe(self, connection, consumer, tag):
        queue = self.queues.get(consumer.queue)
        if queue is None:
            connection.down(connection.lost, f"no queue {consumer.queue!r}")
            self.drop(connection, "closed by its client")
            return
        subscription = Subscription(connection, consumer, tag)
        connection.subscriptions[tag] = subscription
        queue.subscriptions.append(subscription)
        self._pump(queue)

    def cancel(self, connection, tag):
        subscription = connection.subscriptions.get(tag)
        if subscription is not None:
            self._unsubscribe(subscription)

    def _unsubscribe(self, subscription):
        subscription.connection.subscriptions.pop(subscription.tag, None)
        queue = self.queues.get(subscription.consumer.queue)
        if queue is not None and subscription in queue.subscriptions:
            queue.subscriptions.remove(subscription)

    def settle(self, connection, tag, requeue):
        queue_name, entry, subscription = connection.unacked.pop(tag, (None, None, None))
        if entry is None:
            return
        subscription.unacked -= 1
        queue = self.queues.get(queue_name)
        if queue is None:
            return
        if requeue:
            entry.redelivered = True
            queue.entries = deque(sorted([*queue.entries, entry], key=lambda one: one.serial))
        self._pump(queue)

    def publish(self, connection, number, message, mandatory):
        if message.exchange == "":
            to = next((one for one in self.connections if REPLY + one.epoch == message.key), None)
            if to is not None and to.link.replies is not None:
                to.down(to.link.replies, message)
            connection.confirm(number, None)
            return
        routed = list(self.bindings.get((message.exchange, message.key), ()))
        if not routed:
            text = f"the broker returned the message for {message.key}: 312 NO_ROUTE"
            connection.confirm(number, text if mandatory else None)
            return
        if message.kind == "tickets" and self.losing and self._random.random() < self.losing:
            connection.confirm(number, None)
            return
        for name in routed:
            self._enqueue(name, message)
        if self.echo and self._random.random() < self.echo:
            self.loop.call_later(self._random.uniform(0, 8), self._again, routed, message, context=NOBODY)
        connection.confirm(number, None)

    def _again(self, routed, message):
        if self.running:
            for name in routed:
                if name in self.queues:
                    self._enqueue(name, message)

    def _enqueue(self, name, message):
        queue = self.queues[name]
        queue.serial += 1
        queue.entries.append(Entry(message, queue.serial, self.loop.now + queue.ttl))
        self._pump(queue)

    def _pump(self, queue):
        while queue.entries:
            for _ in range(len(queue.subscriptions)):
                subscription = queue.subscriptions[0]
                queue.subscriptions.rotate(-1)
                consumer = subscription.consumer
                if consumer.no_ack or subscription.unacked < consumer.prefetch:
                    break
            else:
                return
            entry = queue.entries.popleft()
            if entry.expires < self.loop.now:
                continue
            connection = subscription.connection
            tag = 0
            if not consumer.no_ack:
                connection.delivered += 1
                tag = connection.delivered
                connection.unacked[tag] = (queue.spec.name, entry, subscription)
                subscription.unacked += 1
            connection.down(connection.link.heard, connection, subscription.tag, tag, entry)


class Connection:
    """One life of a connection: two pipes that keep their order, and what each end knows."""

    def __init__(self, broker, link, number):
        self.broker = broker
        self.link = link
        self.epoch = f"{link.process.name}-{link.short}-{number}"
        self.open_here = True  # by the client
        self.open_there = True  # by the broker
        self.is_up = False
        self.cut = False  # nothing passes any more, and neither end knows
        self.published = 0
        self.blocked = False
        self.stalled = []
        self.unacked = {}
        self.subscriptions = {}
        self.delivered = 0
        self.tags = {}  # the client's: queue to tag
        self.consumers = {}  # the client's: tag to consumer
        self.numbered = 0
        self.unconfirmed = {}
        self.asked = []
        self.early = []
        self.ended = broker.loop.create_future()
        self.opened = broker.loop.create_future()
        self._up_free = self._down_free = 0.0
        self._coming = deque()
        self._random = random.Random(f"{broker.seed} {self.epoch}").random

    def _latency(self):
        lag = self.broker.lags.get(self.link.process.name)
        return 0.0002 + self._random() * (0.002 if lag is None else lag)

    def up(self, call, *args):
        """Send something to the broker."""
        if self.cut:
            return
        late = self.broker.late.get(self.link.process.name, 0.0) if self.link.short == "writing" else 0.0
        when = self._up_free = max(
            self._up_free, self.broker.loop.now + self._latency() + (late * self._random() if late else 0.0)
        )
        self.broker.loop.call_at(when, self.arrive_up, call, args, context=NOBODY)

    def reset(self):
        """End with the client's process: what it has sent arrives first, however long that is on its way."""
        if self.open_there and not self.cut:
            when = self._up_free = max(self._up_free, self.broker.loop.now + 0.001)
            self.broker.loop.call_at(when, self.broker.drop, self, "reset", context=NOBODY)

    def arrive_up(self, call, args):
        if self.cut or not self.open_there:
            return
        if self.broker.blocked and self.published:
            self.stalled.append((call, args))
            return
        call(*args)

    def down(self, call, *args):
        """Send something to the client."""
        if self.cut:
            return
        when = self._down_free = max(self._down_free, self.broker.loop.now + self._latency())
        self._coming.append((call, args))
        self.broker.loop.call_at(when, self._arrive_down, context=self.link.process.context).slow = True

    def _arrive_down(self):
        call, args = self._coming.popleft()  # in their order, whichever of the arrivals this is
        if self.open_here and not (self.cut and call != self.lost):
            call(*args)

    def confirm(self, number, fault):
        self.down(self.link.heard_confirm, self, number, fault)

    def lost(self, why):
        """End this life at the client's end."""
        if not self.open_here:
            return
        self.open_here = self.is_up = False
        self.early.clear()
        for future in self.unconfirmed.values():
            _fail(future, NotPublished(f"expected a confirm, but the connection ended before it: {why}"))
        self.unconfirmed.clear()
        for future in self.asked:
            _fail(future, BrokerUnavailable(why))
        self.asked.clear()
        for future in (self.opened, self.ended):
            if not future.done():
                future.set_result(why)


class Link:
    """Do what mqworker.amqp.Link does, with a broker in memory."""

    def __init__(
        self,
        broker,
        _url,
        *,
        name,
        plan,
        on_up=lambda _epoch: None,
        on_down=lambda _reason: None,
        on_blocked=lambda _blocked: None,
        heartbeat=None,  # here a connection is known to be dead when it is  # noqa: ARG002
    ):
        self.broker = broker
        self.process = PROCESS.get()
        self.process.links.append(self)
        self.short = name.rpartition(" ")[2]
        self.replies = None
        self.last_error = None
        self.connection = None
        self._plan = plan
        self._on_up = on_up
        self._on_down = on_down
        self._on_blocked = on_blocked
        self._closing = False
        self._random = random.Random(f"{broker.seed} {self.process.name} {self.short} pauses")
        self._waiters = []

    @property
    def epoch(self):
        return self.connection.epoch if self.connection is not None and self.connection.is_up else None

    @property
    def blocked(self):
        return self.connection is not None and self.connection.blocked

    # ------------------------------------------------------------ life

    async def run(self):
        failures = 0
        while not self._closing:
            was_up = False
            why = "nobody answers"
            began = self.broker.loop.now
            if self.broker.running:
                connection = self.connection = self.broker.accept(self)
                connection.up(self._set_up, connection)
                handle = self.broker.loop.call_later(CONNECT_SECONDS, connection.lost, "it did not let us in in time")
                await connection.opened
                handle.cancel()
                if connection.open_here:
                    was_up = connection.is_up = True
                    self.last_error = None
                    self._wake()
                    self._on_up(connection.epoch)
                    early, connection.early = connection.early, []
                    for call, args in early:
                        if connection.open_here:
                            call(*args)
                why = await connection.ended
                self._hang_up(connection)
                if connection.blocked:  # the next one is not, until it hears so
                    self.heard_blocked(connection, False)
            if self._closing:
                return
            self.last_error = BrokerUnavailable(why)
            self._wake()
            if was_up:
                self._on_down(why)
            failures = 0 if was_up and self.broker.loop.now - began > LONGEST_PAUSE else failures + 1
            longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(failures, 10))
            waiter = self.broker.loop.create_future()
            self._waiters.append(waiter)
            handle = self.broker.loop.call_later(longest * self._random.uniform(0.5, 1), _resolve, waiter)
            while not waiter.done():
                await waiter
            handle.cancel()

    def _set_up(self, connection):
        """Ask for the plan, at the client, and carry it out, at the broker."""
        connection.down(self._ask, connection)

    def _ask(self, connection):
        plan = self._plan(connection.epoch)
        self.replies = plan.replies
        tags = [(consumer, self._tag(connection, consumer)) for consumer in plan.consumers]
        connection.up(self._carry_out, connection, plan, tags)

    def _carry_out(self, connection, plan, tags):
        for queue in plan.queues:
            self.broker.declare(connection, queue)
        for consumer, tag in tags:
            if connection.open_there:
                self.broker.subscribe(connection, consumer, tag)
        connection.down(_resolve, connection.opened)

    def _hang_up(self, connection):
        connection.lost("given up")
        if connection.open_there and not connection.cut:
            self.broker.loop.call_later(0.001, self.broker.drop, connection, "closed by its client", context=NOBODY)

    async def wait_up(self, timeout=None):  # noqa: ASYNC109  # as the real one
        until = None if timeout is None else self.broker.loop.now + timeout
        while self.epoch is None:
            if self._closing or (until is not None and self.broker.loop.now >= until):
                raise self.last_error or BrokerUnavailable("closed")
            waiter = self.broker.loop.create_future()
            self._waiters.append(waiter)
            if until is not None:
                self.broker.loop.call_at(until, _resolve, waiter)
            await waiter
        return self.epoch

    async def let_in(self, tell):
        while True:
            try:
                await self.wait_up(5.0)
            except BrokerUnavailable as error:
                if self._closing:
                    raise
                tell(str(error))
            else:
                return

    def _wake(self):
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            _resolve(waiter)

    async def close(self):
        self._closing = True
        self._wake()
        if self.connection is not None:
            connection = self.connection
            if not self.broker.loop.burying and connection.is_up and connection.unconfirmed:
                # what is unconfirmed has left already: the pipe keeps its order, so the good-bye comes behind it
                connection.up(self.broker.drop, connection, "closed by its client")
            connection.lost("closed")

    def forget(self):
        """Die with the process: the kernel closes the connection, and the broker hears of it."""
        connection = self.connection
        if connection is not None and connection.open_here:
            connection.open_here = connection.is_up = False
            connection.reset()

    # ------------------------------------------------------------ what comes

    def heard(self, connection, consumer_tag, tag, entry):
        if not connection.is_up:
            connection.early.append((self.heard, (connection, consumer_tag, tag, entry)))
            return
        consumer = connection.consumers.get(consumer_tag)
        if consumer is None:  # cancelled: given back, as pika does
            if tag:
                connection.up(self.broker.settle, connection, tag, True)
            return
        message = entry.message
        delivery = Delivery(
            epoch=connection.epoch,
            tag=tag,
            exchange=message.exchange,
            key=message.key,
            redelivered=entry.redelivered,
            kind=message.kind,
            message_id=message.message_id,
            correlation_id=message.correlation_id,
            reply_to=message.reply_to,
            user_id=None,
            headers=message.headers,
            body=message.body,
        )
        self.broker.watch.delivered(self.process, delivery)
        consumer.on_delivery(delivery)

    def heard_confirm(self, connection, number, fault):
        future = connection.unconfirmed.pop(number)
        if fault is not None:
            _fail(future, NotPublished(fault))
        else:
            _resolve(future)

    def heard_blocked(self, connection, blocked):
        connection.blocked = blocked
        self._on_blocked(blocked)

    def renew(self, why):
        if self.epoch is not None:
            self.connection.lost(why)

    # ------------------------------------------------------------ what is asked

    def _tag(self, connection, consumer):
        connection.numbered += 1
        connection.tags[consumer.queue] = connection.numbered
        connection.consumers[connection.numbered] = consumer
        return connection.numbered

    def ack(self, delivery):
        self.broker.watch.settled(self.process, delivery, True)
        if delivery.tag and delivery.epoch == self.epoch:
            self.connection.up(self.broker.settle, self.connection, delivery.tag, False)

    def requeue(self, delivery):
        self.broker.watch.settled(self.process, delivery, False)
        if delivery.tag and delivery.epoch == self.epoch:
            self.connection.up(self.broker.settle, self.connection, delivery.tag, True)

    def consume(self, consumer):
        connection = self.connection
        if connection is not None and connection.is_up and consumer.queue not in connection.tags:
            self.broker.watch.consumes(self.process, consumer.queue)
            tag = self._tag(connection, consumer)
            connection.up(self.broker.subscribe, connection, consumer, tag)

    def cancel(self, queue):
        connection = self.connection
        if connection is not None and connection.is_up:
            tag = connection.tags.pop(queue, None)
            if tag is not None:
                del connection.consumers[tag]
                connection.up(self.broker.cancel, connection, tag)

    def declare(self, queue):
        connection, future = self._question()
        if connection is not None:
            connection.up(self._declare, connection, queue, future)
        return future

    def _declare(self, connection, queue, future):
        connection.down(self._answer, connection, future, self.broker.declare(connection, queue))

    def refresh(self):
        connection, future = self._question()
        if connection is not None:
            connection.up(self._refresh, connection, self._plan(connection.epoch), future)
        return future

    def _refresh(self, connection, plan, future):
        for queue in plan.queues:
            self.broker.declare(connection, queue)
        connection.down(self._answer, connection, future, True)

    def delete(self, queue):
        connection, future = self._question()
        if connection is not None:
            connection.up(self._delete, connection, queue, future)
        return future

    def _delete(self, connection, queue, future):
        connection.down(self._answer, connection, future, self.broker.delete(queue))

    def _question(self):
        future = self.broker.loop.create_future()
        connection = self.connection
        if connection is None or not connection.is_up:
            _fail(future, BrokerUnavailable("expected a connection that is up"))
            return None, future
        connection.asked.append(future)
        return connection, future

    def _answer(self, connection, future, well):
        if future in connection.asked:
            connection.asked.remove(future)
        if well:
            _resolve(future)
        else:
            _fail(future, BrokerRefused("expected the queue to be unused and empty, or its node to be up"))

    def publish(
        self,
        *,
        exchange,
        key,
        body,
        kind,
        message_id=None,
        correlation_id=None,
        reply_to=None,
        headers=None,
        mandatory=True,
        persistent=True,
    ):
        future = self.broker.loop.create_future()
        connection = self.connection
        if connection is None or not connection.is_up:
            _fail(future, NotPublished("expected a connection that is up"))
            return future
        message = Message(
            exchange, key, body, kind, message_id, correlation_id, reply_to, dict(headers or {}), persistent
        )
        self.broker.watch.published(self.process, message)
        connection.published += 1
        connection.unconfirmed[connection.published] = future
        connection.up(self.broker.publish, connection, connection.published, message, mandatory)
        return future

    def put_aside(self, delivery, *, exchange, reason):
        self.broker.watch.put_aside(self.process, delivery, reason)
        return self.publish(
            exchange=exchange, key=exchange, body=delivery.body, kind=delivery.kind or "", headers={"reason": reason}
        )


def _resolve(future, result=None):
    if not future.done():
        future.set_result(result)


def _fail(future, error):
    if not future.done():
        future.set_exception(error)
        future.exception()
