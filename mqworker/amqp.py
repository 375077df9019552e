"""The broker's door: one AMQP connection that is built anew from its plan after any failure. The only room with pika.

Knows exchanges, queues and bytes; not what the messages say, nor who its owner is. It never repairs: whatever goes
wrong (connection, channel, consumer) ends that life of the connection, and the next one starts from nothing.
Everything runs on one asyncio loop; nothing here may be called from another thread.
"""

import asyncio
import logging
import random
import re
import secrets
import ssl
import struct
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from pika import BasicProperties, spec
from pika.adapters.asyncio_connection import AsyncioConnection, _AsyncioIOServicesAdapter
from pika.adapters.utils.connection_workflow import AMQPConnectionWorkflowFailed, AMQPConnectorPhaseErrorBase
from pika.channel import Channel
from pika.connection import ConnectionParameters, SSLOptions
from pika.credentials import ExternalCredentials, PlainCredentials
from pika.data import encode_table
from pika.exceptions import (
    AMQPError,
    AMQPHeartbeatTimeout,
    ChannelClosedByBroker,
    ConnectionBlockedTimeout,
    ConnectionClosedByBroker,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
    ShortStringTooLong,
)
from pika.spec import Basic

from mqworker.brokerurl import BrokerUrl, Host, check_url, read_url
from mqworker.errors import BrokerRefused, BrokerUnavailable, MqworkerError, NotPublished, SettingsError
from mqworker.topology import Exchange, Queue, Topology

# Every failure that pika knows of also reaches a callback here and is told from there, in our words and once. pika logs
# the same as errors with tracebacks, up to ten lines for a refused connection; what it alone knows is critical.
logging.getLogger("pika").setLevel(logging.CRITICAL)

HEARTBEAT_SECONDS: Final = 10  # either side notices a dead peer after about 15 to 29 s
BLOCKED_SECONDS: Final = 60.0  # for how long a memory or disk alarm may stop us before we look for a healthier node
CONNECT_SECONDS: Final = 10.0  # for name, TCP, TLS, AMQP and the plan together
SOCKET_SECONDS: Final = 5.0  # for TCP, each address
TEARDOWN_SECONDS: Final = 2.0  # for a good-bye that the broker answers
ASKED_AT_ONCE: Final = 16  # questions about queues, each on a channel
ANSWER_SECONDS: Final = 15.0  # for an answer on the one channel: behind one that never comes, all others wait
UNCONFIRMED_SECONDS: Final = 30.0  # for a confirm, alarms aside: three times what a leader's election takes
UNCONFIRMED_LOOK: Final = 5.0  # seconds between two looks whether one is that late
REFUSED_SECONDS: Final = 2.0  # of nothing but nacks from an exchange before a new connection is to try; doubled ...
MOST_REFUSED_SECONDS: Final = 60.0  # ... each time, up to this: a queue that is full nacks on each connection
MOST_MUTE: Final = 100  # questions that were not answered, before a new connection is to ask them
ASK_SECONDS: Final = 5.0  # for an answer about a queue: one whose node hangs gives none for up to 75 s
REFRESH_SECONDS: Final = 1.0  # between two declarations of the plan because messages are returned
MAX_BODY_BYTES: Final = 16 * 1024 * 1024  # RabbitMQ 4.x closes the channel that publishes more
PATIENCE_SECONDS: Final = 5.0  # let_in() tells after so long, each time, what is in the way
CONFIRM_SECONDS: Final = 5.0  # close() waits so long for outstanding confirms
FIRST_PAUSE: Final = 0.1  # seconds before the next try, doubled with each ...
LONGEST_PAUSE: Final = 3.0  # ... up to this, so that runs outlive outages shorter than their lease
BLOCKED: Final = "the broker takes nothing: a memory or disk alarm, see `rabbitmq-diagnostics alarms`"
REASON_HEADER: Final = "x-mqworker-reason"
EXCHANGE_HEADER: Final = "x-mqworker-exchange"
USER_HEADER: Final = "x-mqworker-user"
SENDING_HEADERS: Final = ("CC", "BCC")  # RabbitMQ's sender-selected distribution
REASON_CHARACTERS: Final = 2000
HEADERS_HEADER: Final = "x-mqworker-headers-lost"  # on what is put aside without the headers that it came with
MAX_HEADERS_BYTES: Final = 32 * 1024  # of what is put aside: all properties have to fit into one frame of 128 KiB
REPLY_TO: Final = "amq.rabbitmq.reply-to"

CONNECTION_FORCED: Final = 320  # the broker is told to stop, or somebody closed the connection
ACCESS_REFUSED: Final = 403
NOT_FOUND: Final = 404


class _Properties(BasicProperties):  # type: ignore[misc]  # pika's has no type here
    """Read a message's properties, whatever a stranger has put into its headers.

    A header that pika cannot read (a time beyond the calendar's end, tables in tables a thousand deep) would end the
    connection that the message comes by; and, since it would come again, each later one.
    """

    def decode(self, encoded: bytes, offset: int = 0) -> Any:
        try:
            return super().decode(encoded, offset)
        except Exception:  # noqa: BLE001  # pika converts what it finds: anything can come
            return super().decode(_without_headers(encoded[offset:]))


def _without_headers(encoded: bytes) -> bytes:
    """Write encoded properties with an empty table of headers: it stands behind at most two short strings."""
    (flags,) = struct.unpack_from(">H", encoded)
    at = 2
    for flag in (BasicProperties.FLAG_CONTENT_TYPE, BasicProperties.FLAG_CONTENT_ENCODING):
        at += 1 + encoded[at] if flags & flag else 0
    if not flags & BasicProperties.FLAG_HEADERS:
        return encoded
    (length,) = struct.unpack_from(">I", encoded, at)
    return encoded[:at] + bytes(4) + encoded[at + 4 + length :]


spec.props[BasicProperties.INDEX] = _Properties  # where pika looks for who reads them


class _Services(_AsyncioIOServicesAdapter):  # type: ignore[misc]  # pika's has no type here
    """Tell who connects of a peer that resets the connection when it has just been made.

    pika raises that into the loop, where nobody hears it: the try would hang until its deadline.
    """

    def create_streaming_connection(self, *, on_done: Callable[[BaseException], None], **how: Any) -> Any:
        try:
            return super().create_streaming_connection(on_done=on_done, **how)
        except ValueError:  # it has no address of a peer any more; the socket is closed
            error = ConnectionResetError("the connection was reset as soon as it was made")
            return self.call_later(0, lambda: on_done(error))


def _text(value: str | bytes | None) -> str | None:
    """Return a property as text: pika leaves as bytes what is no UTF-8; of that, the ASCII stays."""
    return value.decode("ascii", errors="ignore") if isinstance(value, bytes) else value


def _kept_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return headers that can be written again, in a frame with other properties; else the word that they are lost."""
    pieces: list[bytes] = []
    try:
        if encode_table(pieces, dict(headers)) <= MAX_HEADERS_BYTES:
            return dict(headers)
        lost = f"they have more than {MAX_HEADERS_BYTES} bytes"
    except Exception as error:  # noqa: BLE001  # pika reads more than it can write: anything can come
        lost = f"they cannot be written: {type(error).__name__}"
    return {HEADERS_HEADER: lost}


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """Carry one message from a queue; its tag means something in its own epoch only."""

    epoch: str
    tag: int  # 0: the consumer does not acknowledge
    exchange: str
    key: str
    redelivered: bool
    kind: str | None  # the `type` property
    message_id: str | None
    correlation_id: str | None
    reply_to: str | None
    user_id: str | None
    headers: Mapping[str, Any]
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """Describe a consumer of a queue; on_delivery is called on the loop and must be quick."""

    queue: str
    on_delivery: Callable[[Delivery], None]
    prefetch: int = 100
    no_ack: bool = False
    priority: int = 0  # as long as one of a higher one can take a message, one of a lower gets none


@dataclass(frozen=True, kw_only=True)
class Plan:
    """List everything a connection has to have; made anew for each epoch."""

    exchanges: tuple[Exchange, ...] = ()
    queues: tuple[Queue, ...] = ()  # declared and bound in this order, after the exchanges
    consumers: tuple[Consumer, ...] = ()
    replies: Callable[[Delivery], None] | None = None  # answers to what is published with reply_to=REPLY_TO
    uses: tuple[str, ...] = ()  # exchanges for which a user looks who may not declare; 4.3 refuses those it may not use


@dataclass(frozen=True, kw_only=True)
class _Where:
    """Say which broker is meant, in every error's words."""

    hosts: tuple[Host, ...]
    at: Host | None = None  # the one that was tried; None: all of them
    vhost: str
    user: str | None

    def __str__(self) -> str:
        hosts = ", ".join(map(str, self.hosts))
        one_of = "" if self.at is None or len(self.hosts) == 1 else f"one of {hosts}; "
        user = "the user whom our certificate names" if self.user is None else f"user {self.user!r}"
        return f"{hosts if self.at is None else self.at} ({one_of}vhost {self.vhost!r}, {user})"

    def explain(self, error: BaseException) -> MqworkerError:
        """Translate what pika reports as the end of a connection or channel, or of a try to open one."""
        error = _cause(error)
        if isinstance(error, ProbableAuthenticationError | ProbableAccessDeniedError):
            told = re.search(r"ConnectionClosedByBroker: \((\d+)\) (.*)", str(error.args[0]))
            if told and int(told[1]) != CONNECTION_FORCED:
                what = "user and password" if isinstance(error, ProbableAuthenticationError) else "the vhost"
                return BrokerRefused(
                    f"expected the broker at {self} to let us in, but it refuses: {told[2]}; check {what} "
                    "in the broker's URL against `rabbitmqctl list_users`, `list_vhosts` and `list_permissions`"
                )
            return BrokerUnavailable(f"the broker at {self} hung up before we were in; is it starting or stopping?")
        if isinstance(error, ConnectionClosedByBroker | ChannelClosedByBroker):
            kind = BrokerUnavailable if error.reply_code == CONNECTION_FORCED else BrokerRefused
            return kind(f"the broker at {self} ended it: {error.reply_text}")
        if isinstance(error, ConnectionBlockedTimeout):
            return BrokerUnavailable(
                f"the broker at {self} has taken nothing for too long: a memory or disk alarm; "
                "see `rabbitmq-diagnostics alarms`"
            )
        if isinstance(error, AMQPHeartbeatTimeout):
            return BrokerUnavailable(f"the broker at {self} has sent nothing for too long, not even heartbeats")
        if isinstance(error, ssl.SSLCertVerificationError):
            return BrokerRefused(
                f"expected a certificate that we trust from {self}, but: {error.verify_message}; "
                "name its authority by cacertfile in the broker's URL, and the host as the certificate does"
            )
        # What comes after TLS 1.3's handshake, as the other end's last word on it, pika has only as text.
        if tls := error.reason if isinstance(error, ssl.SSLError) else _told_in(error, r"\[SSL: ([A-Z0-9_]+)\]"):
            return self._explain_tls(tls)
        if isinstance(error, AMQPError):
            return BrokerUnavailable(
                f"lost the broker at {self}: {error!r}; does it run, and is this its AMQP port (5672, with TLS 5671)?"
            )
        return BrokerUnavailable(
            f"nobody answers at {self}: {str(error) or repr(error)}; does the broker run, and are host and port right?"
        )

    def _explain_tls(self, reason: str) -> MqworkerError:
        if reason in {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"}:
            return BrokerRefused(
                f"expected TLS at {self}, but it speaks something else: is this the port without TLS? "
                "Then write amqp:// in the broker's URL, or give the port of its TLS listener (5671)"
            )
        if "ALERT" in reason:
            return BrokerRefused(
                f"the broker at {self} does not want us in TLS: {reason.lower().replace('_', ' ')}; "
                "does it ask for a certificate of ours (certfile and keyfile in its URL), and trust it?"
            )
        return BrokerUnavailable(f"lost the broker at {self} in TLS: {reason.lower().replace('_', ' ')}")


def _told_in(error: BaseException, pattern: str) -> str | None:
    match = re.search(pattern, str(error))
    return None if match is None else match[1]


def _cause(error: BaseException) -> BaseException:
    """Unwrap what pika's connection workflow has wrapped: of several addresses the last."""
    if isinstance(error, AMQPConnectionWorkflowFailed):
        return _cause(error.exceptions[-1])
    if isinstance(error, AMQPConnectorPhaseErrorBase):
        return _cause(error.exception)
    if isinstance(error, AMQPError) and error.args and isinstance(error.args[0], AMQPConnectionWorkflowFailed):
        return _cause(error.args[0])
    return error


class _Refusals:
    """Judge by nacks, over the lives of a link, when a channel does no more.

    RabbitMQ 3.10 asks the leader of a quorum queue for its version at a channel's first message to it. If the leader's
    node is down and the next one not elected yet, that message is nacked, and so is each later one on this channel, for
    as long as the node stays down: the channel never looks for another leader. A new channel does.
    """

    def __init__(self) -> None:
        self._since: dict[str, float] = {}  # exchange -> time of the first nack, in this life
        self._patience: dict[str, float] = {}  # exchange -> seconds

    def anew(self) -> None:
        """Begin with a new channel."""
        self._since.clear()

    def taken(self, exchange: str) -> None:
        """Take it that a queue has a message."""
        if self._since or self._patience:
            self._since.pop(exchange, None)
            self._patience.pop(exchange, None)

    def refused(self, exchange: str, now: float) -> bool:
        """Take it that a queue refused a message; return whether a new channel is to try."""
        patience = self._patience.get(exchange, REFUSED_SECONDS)
        if now - self._since.setdefault(exchange, now) < patience:
            return False
        self._patience[exchange] = min(patience * 2, MOST_REFUSED_SECONDS)
        return True


class Link:
    """Keep one AMQP connection, with one channel in confirm mode, and build it anew from its plan after any failure.

    `name` shows in the broker's list of connections. Use one link for consuming and another for publishing: under an
    alarm the broker stops reading from a connection that has published, acknowledgements included.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        plan: Callable[[str], Plan],
        on_up: Callable[[str], None] = lambda _epoch: None,
        on_down: Callable[[str], None] = lambda _reason: None,
        on_blocked: Callable[[bool], None] = lambda _blocked: None,
        blocked_seconds: float = BLOCKED_SECONDS,
        heartbeat: int = HEARTBEAT_SECONDS,  # unless the URL says another one
    ) -> None:
        check_url(url)
        self._url = read_url(url)
        self._name = name
        self._blocked_seconds = blocked_seconds
        self._heartbeat = heartbeat
        self._where = _Where(hosts=self._url.hosts, vhost=self._url.vhost, user=self._url.user)
        self._turn = random.randrange(len(self._url.hosts))  # noqa: S311  # spreads load, keeps no secret
        self._failures = 0  # since the last life that was worth the name
        self._plan = plan
        self._on_up = on_up
        self._on_down = on_down
        self._on_blocked = on_blocked
        self.looks_only = False  # whether this user may not declare what lasts
        self._life: _Life | None = None
        self._refusals = _Refusals()
        self._running = False
        self._closing = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._been_up = False
        self._waiters: set[asyncio.Future[None]] = set()
        self.last_error: MqworkerError | None = None
        self.server: tuple[str, str] | None = None  # what the broker calls itself: product and version

    @property
    def epoch(self) -> str | None:
        """Name this life of the connection; None while it is down."""
        return self._life.epoch if self._life is not None and self._life.up else None

    @property
    def answered(self) -> bool:
        """Tell whether the broker has let us in; it may take its time to make what should be there."""
        return self._life is not None and self._life.server != ("", "")

    @property
    def blocked(self) -> bool:
        """Tell whether a memory or disk alarm stops the broker from taking what is published."""
        return self._life is not None and self._life.blocked

    async def run(self) -> None:
        """Connect, and rebuild for ever, until close().

        An exception of a callback (plan, on_delivery, ...) comes out here: it is the owner's bug, not an outage.
        """
        self._idle.clear()
        try:
            while not self._closing.is_set():
                began = time.monotonic()
                end, was_up = await self._live()
                if self._closing.is_set():
                    return
                if not isinstance(end, MqworkerError):
                    raise end
                if not self.looks_only and self._life is not None and self._life.denied:
                    self.looks_only = True  # whoever may has declared it, as a rule: look at once
                    continue
                self.last_error = end
                lasted = was_up and time.monotonic() - began > LONGEST_PAUSE
                self._failures = 0 if lasted else self._failures + 1
                self._turn += 1
                self._tell_waiters()
                if was_up:
                    self._on_down(str(end))
                await self._pause()
        finally:
            self._closing.set()
            self._life = None
            self._idle.set()
            self._tell_waiters()

    async def _live(self) -> tuple[Exception, bool]:
        """Lead one life of the connection; return its end, and whether it was up."""
        host = self._url.hosts[self._turn % len(self._url.hosts)]
        try:
            parameters = _parameters(
                self._url, host, name=self._name, blocked_seconds=self._blocked_seconds, heartbeat=self._heartbeat
            )
        except SettingsError as error:  # a file that was there when we began
            return error, False
        timeout = self._url.connection_timeout or CONNECT_SECONDS
        where = replace(self._where, at=host)
        self._refusals.anew()
        life = self._life = _Life(
            parameters,
            where,
            self._plan,
            self._on_blocked,
            self._refusals,
            looks_only=self.looks_only,
            connect_seconds=timeout,
        )
        try:
            if await life.opened:
                self._rise(life)
            end = await life.ended
        finally:
            was_up, life.up = life.up_once, False
            await life.bury()
        return end, was_up

    async def wait_up(self, timeout: float | None = None) -> str:  # noqa: ASYNC109  # it has an error of its own to raise
        """Wait until the connection is up, and return its epoch.

        Raises:
            BrokerRefused: at once if the very first try, at each host, was refused, else at the timeout.
            BrokerUnavailable: at the timeout (seconds; None: never), or when the link is closed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.epoch is None:
            if self._closing.is_set():
                raise BrokerUnavailable(f"expected a link to {self._where} that is open, but it is closed")
            tried_all = self._failures >= len(self._url.hosts)
            if not self._been_up and tried_all and isinstance(self.last_error, BrokerRefused):
                raise self.last_error
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise self.last_error or BrokerUnavailable(
                    f"nobody answers at {self._where} within {timeout} s; does the broker run, "
                    "and are host and port right?"
                )
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            await asyncio.wait([waiter], timeout=left)
            self._waiters.discard(waiter)
        return self.epoch

    async def let_in(self, tell: Callable[[str], None]) -> None:
        """Wait until the connection is up, however long it takes, telling now and then what is in the way.

        Raises:
            BrokerRefused: the very first try was refused.
        """
        while True:
            try:
                await self.wait_up(PATIENCE_SECONDS)
            except BrokerUnavailable as error:
                if self._closing.is_set():
                    raise
                tell(str(error))
            else:
                return

    async def close(self) -> None:
        """Wait for outstanding confirms (at most 5 s), then close; a second call changes nothing."""
        life = self._life
        if life is not None and life.up and not self._closing.is_set():
            await life.settle(CONFIRM_SECONDS)
        self._closing.set()
        if self._life is not None:
            self._life.end(BrokerUnavailable(f"the link to {self._where} is closed"))
        await self._idle.wait()

    def renew(self, why: str) -> None:
        """End this life of the connection, since its owner knows that it does not do; nothing happens while down."""
        if self._life is not None and self._life.up:
            self._life.end(BrokerUnavailable(f"the connection to {self._where} is built anew: {why}"))

    def ack(self, delivery: Delivery) -> None:
        """Tell the broker that a delivery is settled; nothing happens if it is from another epoch."""
        if delivery.tag and delivery.epoch == self.epoch and self._life is not None:
            self._life.channel.basic_ack(delivery.tag)

    def requeue(self, delivery: Delivery) -> None:
        """Give a delivery back to its queue; nothing happens if it is from another epoch."""
        if delivery.tag and delivery.epoch == self.epoch and self._life is not None:
            self._life.channel.basic_nack(delivery.tag, requeue=True)

    def consume(self, consumer: Consumer) -> None:
        """Start one more consumer, for this epoch only; nothing happens while down, or if it runs already.

        If the queue does not exist, the broker ends this life of the connection.
        """
        if self._life is not None and self._life.up:
            self._life.consume(consumer)

    def cancel(self, queue: str) -> None:
        """Stop consuming a queue; nothing happens while down, or if it is not consumed.

        What the broker had sent already and on_delivery has not seen is given back to the queue (with no_ack: dropped).
        """
        if self._life is not None and self._life.up:
            self._life.cancel(queue)

    def declare(self, queue: Queue) -> asyncio.Future[None]:
        """Declare and bind a queue; what is published before the answer may overtake it.

        The future fails with BrokerRefused, which harms nothing else, or with BrokerUnavailable, after 5 s without an
        answer too: a queue whose node is down is refused, one whose node hangs is not answered for.
        """
        if self._life is None or not self._life.up:
            return _failed(self._down(f"declare queue {queue.name!r}"))
        return self._life.declare(queue)

    def delete(self, queue: str) -> asyncio.Future[None]:
        """Delete a queue if nobody consumes it and nothing is in it; one that does not exist counts as deleted.

        The future fails with BrokerRefused if it is used or not empty, which harms nothing else, or BrokerUnavailable.
        """
        if self._life is None or not self._life.up:
            return _failed(self._down(f"delete queue {queue!r}"))
        return self._life.delete(queue)

    def refresh(self) -> asyncio.Future[None]:
        """Declare and bind once more all that the plan has: somebody may have deleted exchanges or bindings.

        The future fails as that of declare().
        """
        if self._life is None or not self._life.up:
            return _failed(self._down("refresh exchanges and queues"))
        return self._life.refresh()

    def remove(self, *, queues: Iterable[str], exchanges: Iterable[str]) -> asyncio.Future[None]:
        """Delete queues and exchanges, used or not; those that do not exist count as deleted."""
        if self._life is None or not self._life.up:
            return _failed(self._down("remove queues and exchanges"))
        return self._life.remove(queues, exchanges)

    def publish(
        self,
        *,
        exchange: str,
        key: str,
        body: bytes,
        kind: str,
        message_id: str | None = None,
        correlation_id: str | None = None,
        reply_to: str | None = None,
        headers: Mapping[str, Any] | None = None,
        mandatory: bool = True,
        persistent: bool = True,
    ) -> asyncio.Future[None]:
        """Publish a message; the future resolves when the broker has confirmed it.

        The future fails with NotPublished if no queue takes the message (unless not mandatory), a queue refuses it, the
        connection is lost before the confirm, it is down now, or it can never be taken: the key has more than AMQP's
        255 bytes, or the body more than MAX_BODY_BYTES; with BrokerRefused if this user may not write to the exchange.
        It need not be awaited. After NotPublished the message may have arrived all the same: use its message_id again.
        """
        if self._life is None or not self._life.up:
            return _failed(
                NotPublished(
                    f"expected to publish to exchange {exchange!r} with key {key!r}, but the broker at {self._where} "
                    f"is down: {self.last_error or 'not connected yet'}; publish it again when it is up"
                )
            )
        if len(body) > MAX_BODY_BYTES:
            return _failed(
                NotPublished(
                    f"expected a message of at most {MAX_BODY_BYTES} bytes for exchange {exchange!r}, got {len(body)}; "
                    "it will never be taken as it is"
                )
            )
        properties = BasicProperties(
            content_type="application/json",
            headers=dict(headers) if headers else None,
            delivery_mode=2 if persistent else 1,
            correlation_id=correlation_id,
            reply_to=reply_to,
            message_id=message_id or str(uuid.uuid4()),
            timestamp=int(time.time()),
            type=kind,
            app_id="mqworker",
            user_id=self._url.user,  # which the broker lets stand for nobody else
        )
        return self._life.publish(exchange, key, body, properties, mandatory=mandatory)

    def put_aside(self, delivery: Delivery, *, exchange: str, reason: str) -> asyncio.Future[None]:
        """Publish a delivery as it came, for a person to look at, with reason, first exchange and user in headers.

        Of one that is longer than any broker is sure to take, it is the beginning. Its user_id is ours: another's would
        be a lie. And headers by which the broker would send it elsewhere too stay behind.
        """
        if len(delivery.body) > MAX_BODY_BYTES:
            reason = f"the first {MAX_BODY_BYTES} of {len(delivery.body)} bytes: {reason}"
        kept = {name: value for name, value in delivery.headers.items() if name not in SENDING_HEADERS}
        told = {REASON_HEADER: reason[:REASON_CHARACTERS], EXCHANGE_HEADER: delivery.exchange}
        headers = {**_kept_headers(kept), **told}
        if delivery.user_id is not None:
            headers[USER_HEADER] = delivery.user_id
        return self.publish(
            exchange=exchange,
            key=exchange,
            body=delivery.body[:MAX_BODY_BYTES],
            kind=delivery.kind or "",
            message_id=delivery.message_id,
            headers=headers,
        )

    def _rise(self, life: "_Life") -> None:
        life.up = life.up_once = True
        self.last_error = None
        self.server = life.server
        self._been_up = True
        self._tell_waiters()
        self._on_up(life.epoch)
        life.deliver_early()

    def _down(self, what: str) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"expected to {what}, but the broker at {self._where} is down: {self.last_error or 'not connected yet'}"
        )

    def _tell_waiters(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _pause(self) -> None:
        """Wait before the next try, unlike all others that have lost the same broker; a close() ends it."""
        rounds = min(self._failures // len(self._url.hosts), 10)
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2**rounds)
        pause = longest * random.uniform(0.5, 1)  # noqa: S311  # spreads load, keeps no secret
        closing = asyncio.ensure_future(self._closing.wait())
        await asyncio.wait([closing], timeout=pause)
        closing.cancel()


def _parameters(
    url: BrokerUrl, host: Host, *, name: str, blocked_seconds: float, heartbeat: int
) -> ConnectionParameters:
    """Tell pika what it needs for one host.

    Raises:
        SettingsError: a file of TLS cannot be read.
    """
    parameters = ConnectionParameters(
        host=host.name,
        port=host.port,
        virtual_host=url.vhost,
        credentials=ExternalCredentials() if url.password is None else PlainCredentials(url.user or "", url.password),
        heartbeat=heartbeat if url.heartbeat is None else url.heartbeat,
        blocked_connection_timeout=blocked_seconds,
        client_properties={"connection_name": name, "product": "mqworker"},
        connection_attempts=1,  # the tries are ours
        socket_timeout=min(SOCKET_SECONDS, url.connection_timeout or SOCKET_SECONDS),
        stack_timeout=None,  # ours too: pika's trips over an assertion of its own in mid-handshake
    )
    if url.channel_max is not None:
        parameters.channel_max = url.channel_max
    if url.tls is not None:
        parameters.ssl_options = SSLOptions(url.tls.context(), url.tls.server_name or host.name)
    return parameters


_Unconfirmed = tuple[asyncio.Future[None], str, str, str, float]  # its id, exchange and key, and when it was published
_Begin = Callable[[Channel, Callable[[Any], None]], None]  # asks on a channel, and names who takes the last answer


class _Life:
    """One life of a connection: from the first try to the first thing that goes wrong."""

    def __init__(
        self,
        parameters: ConnectionParameters,
        where: _Where,
        plan: Callable[[str], Plan],
        on_blocked: Callable[[bool], None],
        refusals: _Refusals,
        *,
        looks_only: bool,
        connect_seconds: float,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.epoch = secrets.token_hex(8)
        self.up = False
        self.up_once = False
        self.blocked = False
        self.server = ("", "")
        self.opened: asyncio.Future[bool] = loop.create_future()  # True: the plan is carried out
        self.ended: asyncio.Future[Exception] = loop.create_future()
        self.channel: Channel
        self._loop = loop
        self._where = where
        self._plan = plan
        self._on_blocked = on_blocked
        self._refusals = refusals
        self._looks_only = looks_only
        self.denied = False  # something of the plan
        self._closed: asyncio.Future[None] = loop.create_future()
        self._tags: dict[str, str] = {}  # queue -> consumer tag
        self._early: list[Callable[[], None]] = []  # deliveries that came before all of the plan was carried out
        self._unconfirmed: OrderedDict[int, _Unconfirmed] = OrderedDict()
        self._unblocked_at = 0.0
        self._returned: dict[tuple[str, str, str], list[str]] = {}
        self._published = 0
        self._asked: set[asyncio.Future[None]] = set()
        self._asides: deque[tuple[asyncio.Future[None], str, _Begin]] = deque()  # questions for throw-away channels
        self._aside = 0  # of them, under way
        self._mute: set[asyncio.Future[None]] = set()  # given up, while their channels wait for answers still
        self._made = Plan()
        self._refreshed = 0.0
        self._connect_seconds = connect_seconds
        self._deadline = loop.call_later(connect_seconds, self._too_slow)
        self._timers: set[asyncio.TimerHandle] = set()  # deadlines of answers on the channel
        self._connection = AsyncioConnection(
            parameters,
            on_open_callback=self._on_connection,
            on_open_error_callback=self._on_closed,
            on_close_callback=self._on_closed,
            custom_ioloop=_Services(loop),
        )

    # ---- from the first try to the plan carried out

    def _on_connection(self, connection: AsyncioConnection) -> None:
        about = connection.server_properties or {}
        self.server = (str(about.get("product", "")), str(about.get("version", "")))
        connection.add_on_connection_blocked_callback(lambda _connection, _frame: self._set_blocked(blocked=True))
        connection.add_on_connection_unblocked_callback(lambda _connection, _frame: self._set_blocked(blocked=False))
        if not self.ended.done():
            connection.channel(on_open_callback=self._on_channel)

    def _on_channel(self, channel: Channel) -> None:
        self.channel = channel
        channel.add_on_close_callback(self._on_channel_closed)
        channel.add_on_cancel_callback(self._on_cancelled)
        channel.add_on_return_callback(self._on_returned)
        with self._owners_code():
            plan = self._made = self._plan(self.epoch)
            self._set_up(channel)  # without waiting for answers: a refusal closes the channel in any case
            if plan.replies is not None:
                self._consume(Consumer(queue=REPLY_TO, on_delivery=plan.replies, no_ack=True))
            for consumer in plan.consumers:
                self.consume(consumer)
            channel.confirm_delivery(self._on_confirm, callback=self._on_ready)  # its answer comes after all others

    def _on_ready(self, _frame: Any) -> None:
        self._deadline.cancel()
        self._deadline = self._loop.call_later(UNCONFIRMED_LOOK, self._look_for_confirms)
        if not self.opened.done():
            self.opened.set_result(True)

    def deliver_early(self) -> None:
        """Hand over what came before the owner knew that the connection is up."""
        early, self._early = self._early, []
        for deliver in early:
            deliver()

    # ---- from the first thing that goes wrong to the end

    def end(self, error: Exception) -> None:
        """End this life: at once for the owner, with bury() for the broker."""
        if self.ended.done():
            return
        self.up = False
        for timer in (self._deadline, *self._timers):
            timer.cancel()
        self._timers.clear()
        self._early.clear()
        self.ended.set_result(error)
        if not self.opened.done():
            self.opened.set_result(False)
        for future, _, exchange, key, _ in self._unconfirmed.values():
            if isinstance(error, BrokerRefused) and f"access to exchange '{exchange}'" in str(error):
                _fail(future, BrokerRefused(str(error)))  # in vain however often
                continue
            _fail(
                future,
                NotPublished(
                    f"expected a confirm for a message to exchange {exchange!r} with key {key!r}, but the connection "
                    f"ended before it: {error}; publish it again with the same message_id"
                ),
            )
        self._unconfirmed.clear()
        for future in self._asked:
            kind = type(error) if isinstance(error, BrokerRefused | BrokerUnavailable) else BrokerUnavailable
            _fail(future, kind(str(error)))
        self._asked.clear()

    async def bury(self) -> None:
        """Close the connection, in order if the broker answers in time, and leave nothing behind."""
        self.end(BrokerUnavailable(f"the link to {self._where} is given up"))
        if self.blocked:
            self._set_blocked(blocked=False)
        if self._connection.is_open:
            self._connection.close()
            await asyncio.wait([self._closed], timeout=TEARDOWN_SECONDS)
        if not self._closed.done():
            # pika has no public way to drop a connection: close() waits for ever for a frozen broker, and in
            # mid-handshake trips over an assertion. Its own heartbeat ends a connection in this way.
            self._connection._terminate_stream(AMQPError("given up"))  # noqa: SLF001  # see above
            await asyncio.wait([self._closed], timeout=TEARDOWN_SECONDS)

    def _too_slow(self) -> None:
        self.end(
            BrokerUnavailable(
                f"the broker at {self._where} did not let us in within {self._connect_seconds:g} s; "
                "is it overloaded, and is this its AMQP port (5672, with TLS 5671)?"
            )
        )

    def _answered(self, what: str) -> Callable[[Any], None]:
        """Return who takes an answer on the channel; this life ends if it does not come in time."""
        if not self.opened.done():  # the plan has a deadline as a whole
            return _ignore

        def too_late() -> None:
            text = f"the broker at {self._where} has not answered within {ANSWER_SECONDS:g} s: {what}"
            self.end(BrokerUnavailable(text))

        def on_answer(_frame: Any) -> None:
            timer.cancel()
            self._timers.discard(timer)

        timer = self._loop.call_later(ANSWER_SECONDS, too_late)
        self._timers.add(timer)
        return on_answer

    def _look_for_confirms(self) -> None:
        now = self._loop.time()
        if self._unconfirmed and not self.blocked:
            _, _, exchange, key, published_at = next(iter(self._unconfirmed.values()))  # the oldest
            if now - max(published_at, self._unblocked_at) > UNCONFIRMED_SECONDS:
                text = (
                    f"the broker at {self._where} has not confirmed a message to exchange {exchange!r} with key "
                    f"{key!r} within {UNCONFIRMED_SECONDS:g} s: has a queue there no leader?"
                )
                self.end(BrokerUnavailable(text))
                return
        self._deadline = self._loop.call_later(UNCONFIRMED_LOOK, self._look_for_confirms)

    def _on_closed(self, _connection: AsyncioConnection, error: BaseException) -> None:
        if not self._closed.done():
            self._closed.set_result(None)
        self.end(self._where.explain(error))

    def _on_channel_closed(self, _channel: Channel, error: Exception) -> None:
        if isinstance(error, ChannelClosedByBroker) and not self.opened.done():  # in the middle of the plan
            self.denied = error.reply_code == ACCESS_REFUSED
            if self._looks_only and error.reply_code == NOT_FOUND:
                self.end(
                    BrokerUnavailable(
                        f"no scheduler has set up what this user needs of the broker at {self._where} and may not "
                        f"declare: {error.reply_text}; start one or run `mqworker topology declare`"
                    )
                )
                return
        self.end(self._where.explain(error))

    def _on_cancelled(self, frame: Any) -> None:
        queue = next((queue for queue, tag in self._tags.items() if tag == frame.method.consumer_tag), None)
        if queue is not None:  # None: we have cancelled it ourselves
            self.end(
                BrokerUnavailable(
                    f"the broker at {self._where} cancelled our consumer of queue {queue!r}: it was deleted, "
                    "its node is down, or a delivery was not acknowledged in time"
                )
            )

    def _set_blocked(self, *, blocked: bool) -> None:
        self.blocked = blocked
        self._unblocked_at = self._loop.time()
        with self._owners_code():
            self._on_blocked(blocked)

    @contextmanager
    def _owners_code(self) -> Iterator[None]:
        """Hand an exception of the owner's to run(): pika would log it and call it a lost connection."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # run() raises it
            self.end(error)

    # ---- consuming

    def consume(self, consumer: Consumer) -> None:
        """Start a consumer with its own prefetch."""
        if consumer.queue not in self._tags:
            if not consumer.no_ack:
                answered = self._answered(f"a prefetch of {consumer.prefetch}")
                self.channel.basic_qos(prefetch_count=consumer.prefetch, callback=answered)  # for consumers after it
            self._consume(consumer)

    def cancel(self, queue: str) -> None:
        """Stop a consumer; pika gives back what still arrives for it."""
        tag = self._tags.pop(queue, None)
        if tag is not None:
            # With a callback pika waits for the broker's answer.
            self.channel.basic_cancel(tag, callback=self._answered(f"the end of a consumer of queue {queue!r}"))

    def _consume(self, consumer: Consumer) -> None:
        def on_message(_channel: Channel, method: Basic.Deliver, properties: BasicProperties, body: bytes) -> None:
            delivery = Delivery(
                epoch=self.epoch,
                tag=0 if consumer.no_ack else method.delivery_tag,
                exchange=_text(method.exchange) or "",
                key=_text(method.routing_key) or "",
                redelivered=method.redelivered,
                kind=_text(properties.type),
                message_id=_text(properties.message_id),
                correlation_id=_text(properties.correlation_id),
                reply_to=_text(properties.reply_to),
                user_id=_text(properties.user_id),
                headers=properties.headers or {},
                body=body,
            )
            if self.up:
                deliver(delivery)
            elif not self.ended.done():
                self._early.append(lambda: deliver(delivery))

        def deliver(delivery: Delivery) -> None:
            with self._owners_code():
                consumer.on_delivery(delivery)

        self._tags[consumer.queue] = self.channel.basic_consume(
            consumer.queue,
            on_message,
            auto_ack=consumer.no_ack,
            callback=self._answered(f"a consumer of queue {consumer.queue!r}"),
            arguments={"x-priority": consumer.priority} if consumer.priority else None,
        )

    # ---- queues

    def declare(self, queue: Queue) -> asyncio.Future[None]:
        """Declare and bind a queue."""
        return self._ask_aside(
            f"to declare queue {queue.name!r}", lambda channel, answer: self._declare(channel, queue, answer, _ignore)
        )

    def refresh(self) -> asyncio.Future[None]:
        """Carry out once more what the plan has of exchanges and queues."""
        self._refreshed = self._loop.time()

        def begin(channel: Channel, answer: Callable[[Any], None]) -> None:
            self._set_up(channel, _ignore)
            channel.basic_qos(callback=answer)  # its answer comes after all others

        return self._ask_aside("to declare again what the plan has", begin)

    def _set_up(self, channel: Channel, on_done: Callable[[Any], None] | None = None) -> None:
        """Make what the plan has of exchanges and queues; who may not make what lasts looks at what it uses of it."""
        for exchange in self._made.exchanges:
            if not self._looks_only or exchange.name in self._made.uses:
                channel.exchange_declare(
                    exchange.name, exchange.kind, durable=True, passive=self._looks_only, callback=on_done
                )
        for queue in self._made.queues:
            if not (queue.lasting and self._looks_only):
                self._declare(channel, queue, on_done)

    def _declare(
        self,
        channel: Channel,
        queue: Queue,
        on_done: Callable[[Any], None] | None = None,
        on_made: Callable[[Any], None] | None = None,
    ) -> None:
        """Declare and bind; with `on_made` only if the queue itself answers: 4.3 also binds one whose node is down."""
        channel.queue_declare(
            queue.name,
            durable=queue.durable,
            exclusive=queue.exclusive,
            arguments=dict(queue.arguments),
            callback=on_made if queue.bindings else on_done,  # without one, the broker is not asked for an answer
        )
        for number, (exchange, key) in enumerate(queue.bindings, start=1):
            last = number == len(queue.bindings)
            channel.queue_bind(queue.name, exchange, key, callback=on_done if last else None)

    def delete(self, queue: str) -> asyncio.Future[None]:
        """Delete an unused, empty queue."""
        return self._ask_aside(
            f"queue {queue!r} to be unused and empty",
            lambda channel, answer: channel.queue_delete(queue, if_unused=True, if_empty=True, callback=answer),
        )

    def _ask_aside(self, expected: str, begin: _Begin) -> asyncio.Future[None]:
        """Ask on a throw-away channel, a few at a time: a refusal closes the channel that asks."""
        future = self._ask()
        self._asides.append((future, expected, begin))
        self._open_asides()
        return future

    def _open_asides(self) -> None:
        while self._asides and self._aside < ASKED_AT_ONCE and not self.ended.done():
            self._aside += 1
            self._open_aside(*self._asides.popleft())

    def _open_aside(self, future: asyncio.Future[None], expected: str, begin: _Begin) -> None:
        def on_channel(channel: Channel) -> None:
            begin(channel, lambda _frame: on_answer(channel))

        def on_answer(channel: Channel) -> None:
            self._mute.discard(future)
            self._answer(future)
            if channel.is_open:
                channel.close()

        def on_closed(_channel: Channel, error: Exception) -> None:
            self._mute.discard(future)
            told = error.reply_text if isinstance(error, ChannelClosedByBroker) else repr(error)
            refuse(BrokerRefused(f"expected {expected}, but: {told}"))

        def too_slow() -> None:  # the channel stays as it is: it has to wait for this answer
            text = f"expected {expected}, but the broker at {self._where} does not answer within {ASK_SECONDS:g} s"
            refuse(BrokerUnavailable(text))
            self._mute.add(future)
            if len(self._mute) >= MOST_MUTE:
                self.end(BrokerUnavailable(f"{text}; {MOST_MUTE} channels wait for such answers"))

        def refuse(error: MqworkerError) -> None:
            if future in self._asked:  # else it is answered, or this life has ended
                self._asked.discard(future)
                _fail(future, error)

        def done(_future: asyncio.Future[None]) -> None:
            give_up.cancel()
            self._aside -= 1
            self._open_asides()

        give_up = self._loop.call_later(ASK_SECONDS, too_slow)
        future.add_done_callback(done)
        try:
            self._connection.channel(on_open_callback=on_channel).add_on_close_callback(on_closed)
        except AMQPError as error:  # none is free: of a small number that the URL allows, all wait for answers
            refuse(BrokerUnavailable(f"expected {expected}, but there is no channel to ask on: {error!r}"))

    def remove(self, queues: Iterable[str], exchanges: Iterable[str]) -> asyncio.Future[None]:
        """Delete in order; the answer to the last deletion stands for all."""
        future = self._ask()
        in_time = self._answered("the removal of queues and exchanges")

        def answered(frame: Any) -> None:
            in_time(frame)
            self._answer(future)

        for queue in queues:
            self.channel.queue_delete(queue, callback=_ignore)
        *most, last = exchanges
        for exchange in most:
            self.channel.exchange_delete(exchange, callback=_ignore)
        self.channel.exchange_delete(last, callback=answered)
        return future

    def _ask(self) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        self._asked.add(future)
        return future

    def _answer(self, future: asyncio.Future[None]) -> None:
        self._asked.discard(future)
        if not future.done():
            future.set_result(None)

    # ---- publishing

    def publish(
        self, exchange: str, key: str, body: bytes, properties: BasicProperties, *, mandatory: bool
    ) -> asyncio.Future[None]:
        """Write a message to the channel and note what its confirm is for."""
        try:
            self.channel.basic_publish(exchange, key, body, properties, mandatory)
        except ShortStringTooLong as error:  # nothing was written
            return _failed(
                NotPublished(
                    f"expected keys and properties of at most 255 bytes for exchange {exchange!r}, got {error}; "
                    "it will never be taken as it is"
                )
            )
        self._published += 1  # as the broker counts them
        future: asyncio.Future[None] = self._loop.create_future()
        self._unconfirmed[self._published] = (future, properties.message_id, exchange, key, self._loop.time())
        return future

    async def settle(self, seconds: float) -> None:
        """Wait until nothing is unconfirmed."""
        futures = [entry[0] for entry in self._unconfirmed.values()]  # end() fails them
        if futures:
            await asyncio.wait(futures, timeout=seconds)

    def _on_returned(self, _channel: Channel, method: Basic.Return, properties: BasicProperties, _body: bytes) -> None:
        # The broker acks a returned message all the same, after this: here it is only remembered for then.
        message = (properties.message_id, method.exchange, method.routing_key)
        self._returned.setdefault(message, []).append(f"{method.reply_code} {method.reply_text}")
        if self._loop.time() - self._refreshed > REFRESH_SECONDS:
            self.refresh()  # an exchange that was deleted, and made again by somebody else, has none of our bindings

    def _on_confirm(self, frame: Any) -> None:
        if self.ended.done():  # all have been told that theirs does not come
            return
        method = frame.method
        refused = isinstance(method, Basic.Nack)
        if not method.multiple:
            self._confirm(self._unconfirmed.pop(method.delivery_tag), refused=refused)
            return
        while self._unconfirmed and next(iter(self._unconfirmed)) <= method.delivery_tag:  # they are in their order
            self._confirm(self._unconfirmed.popitem(last=False)[1], refused=refused)

    def _confirm(self, entry: _Unconfirmed, *, refused: bool) -> None:
        future, message_id, exchange, key, _ = entry
        if refused:
            _fail(
                future,
                NotPublished(
                    f"a queue behind exchange {exchange!r} and key {key!r} refused the message: it is full, or its "
                    "leader just moved; publish it again with the same message_id"
                ),
            )
            if self._refusals.refused(exchange, self._loop.time()):
                self.end(
                    BrokerUnavailable(
                        f"the broker at {self._where} refuses all that we publish to exchange {exchange!r}: perhaps it "
                        "asks for a leader that is gone, and not on a new connection; or a queue there is full"
                    )
                )
        elif self._returned and (texts := self._returned.get((message_id, exchange, key))):
            text = texts.pop(0)
            if not texts:
                del self._returned[message_id, exchange, key]
            _fail(
                future,
                NotPublished(
                    f"expected a queue behind exchange {exchange!r} for key {key!r}, but the broker returned the "
                    f"message: {text}; does whoever reads it run?"
                ),
            )
        else:
            self._refusals.taken(exchange)
            if not future.done():
                future.set_result(None)


def _fail(future: asyncio.Future[None], error: MqworkerError) -> None:
    """Fail a future that perhaps nobody awaits."""
    if not future.done():
        future.set_exception(error)
        future.exception()  # counts as retrieved: otherwise asyncio complains when it is thrown away


def _failed(error: MqworkerError) -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    _fail(future, error)
    return future


def _ignore(_frame: Any) -> None:
    """Take an answer that says nothing more than that it came."""


async def remove(url: str, topology: Topology, *, extra_queues: Iterable[str] = ()) -> None:
    """Remove everything that a topology has on a broker, with whatever is in it.

    Raises:
        BrokerUnavailable: nobody answers within a few seconds.
        BrokerRefused: the broker does not let us.
    """
    link = Link(url, name=f"mqworker removes {topology.prefix}", plan=lambda _epoch: Plan())
    running = asyncio.create_task(link.run())
    try:
        await link.wait_up(timeout=SOCKET_SECONDS)
        await link.remove(
            queues=[*extra_queues, *(queue.name for queue in topology.queues())],
            exchanges=[exchange.name for exchange in topology.exchanges()],
        )
    finally:
        await link.close()
        await running


async def declare(url: str, topology: Topology) -> None:
    """Make everything that lasts of a topology.

    Raises:
        BrokerUnavailable: nobody answers within a few seconds.
        BrokerRefused: the broker does not let us, or has something else of one of the names.
    """
    link = Link(
        url,
        name=f"mqworker declares {topology.prefix}",
        plan=lambda _epoch: Plan(exchanges=topology.exchanges(), queues=topology.queues()),
    )
    running = asyncio.create_task(link.run())
    try:
        await link.wait_up(timeout=SOCKET_SECONDS)
    finally:
        await link.close()
        await running
    if link.looks_only:
        raise BrokerRefused(
            f"expected a user of the broker who may declare {topology.prefix}.*, got one who may not; "
            "`mqworker topology permissions --role scheduler` prints the rights that it takes"
        )
