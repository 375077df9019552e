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
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from pika import BasicProperties, spec
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.adapters.utils.connection_workflow import AMQPConnectionWorkflowFailed, AMQPConnectorPhaseErrorBase
from pika.channel import Channel
from pika.connection import URLParameters
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
PATIENCE_SECONDS: Final = 5.0  # let_in() tells after so long, each time, what is in the way
CONFIRM_SECONDS: Final = 5.0  # close() waits so long for outstanding confirms
FIRST_PAUSE: Final = 0.1  # seconds before the next try, doubled with each ...
LONGEST_PAUSE: Final = 3.0  # ... up to this, so that runs outlive outages shorter than their lease
REASON_HEADER: Final = "x-mqworker-reason"
EXCHANGE_HEADER: Final = "x-mqworker-exchange"
REASON_CHARACTERS: Final = 2000
HEADERS_HEADER: Final = "x-mqworker-headers-lost"  # on what is put aside without the headers that it came with
MAX_HEADERS_BYTES: Final = 32 * 1024  # of what is put aside: all properties have to fit into one frame of 128 KiB
REPLY_TO: Final = "amq.rabbitmq.reply-to"

CONNECTION_FORCED: Final = 320  # the broker is told to stop, or somebody closed the connection


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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """List everything a connection has to have; made anew for each epoch."""

    exchanges: tuple[Exchange, ...] = ()
    queues: tuple[Queue, ...] = ()  # declared and bound in this order, after the exchanges
    consumers: tuple[Consumer, ...] = ()
    replies: Callable[[Delivery], None] | None = None  # answers to what is published with reply_to=REPLY_TO


def check_url(url: str) -> str:
    """Check an AMQP URL and return it fit for showing, without its password.

    Raises:
        SettingsError: it is none; the text says what is wrong and never holds the password.
    """
    _read_url(url)
    return redact(url)


def redact(url: str) -> str:
    """Return an AMQP URL fit for showing: without its password and its options."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port is not None else ""
    except ValueError:
        return "(an unreadable URL)"  # no telling where the password ends
    if not parts.hostname:
        return "(an unreadable URL)"
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    user = f"{parts.username}:***@" if parts.password is not None else f"{parts.username}@" if parts.username else ""
    return f"{parts.scheme}://{user}{host}{port}{parts.path}"


def _read_url(url: str) -> URLParameters:
    form = "amqp://USER:PASSWORD@HOST:PORT/VHOST (or amqps://; the vhost / is written %2F)"
    try:
        parts = urlsplit(url)
        fit = parts.scheme in {"amqp", "amqps"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, fit = urlsplit(""), False  # its text could hold a piece of the password
    if not fit:
        raise SettingsError(
            f"expected a broker URL of the form {form}, got {redact(url)}; "
            "characters such as / # ? @ in user or password have to be %-encoded"
        )
    if (parts.username is None) != (parts.password is None):
        raise SettingsError(f"expected user and password, or neither, got {redact(url)}; write {form}")
    if parts.path.count("/") > 1:
        raise SettingsError(f"expected one vhost after the host, got {parts.path!r}; write / within it as %2F")
    try:
        return URLParameters(url)
    except Exception as error:  # noqa: BLE001  # pika evaluates options as Python: anything can come
        raise SettingsError(f"expected options that pika knows in the query of {redact(url)}, got: {error}") from None


@dataclass(frozen=True)
class _Where:
    """Say which broker is meant, in every error's words."""

    host: str
    port: int
    vhost: str
    user: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port} (vhost {self.vhost!r}, user {self.user!r})"

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
                "add its authority to this machine's, or name it in the URL's ssl_options"
            )
        if isinstance(error, AMQPError):
            return BrokerUnavailable(
                f"lost the broker at {self}: {error!r}; does it run, and is this its AMQP port (5672, with TLS 5671)?"
            )
        return BrokerUnavailable(
            f"nobody answers at {self}: {str(error) or repr(error)}; does the broker run, and are host and port right?"
        )


def _cause(error: BaseException) -> BaseException:
    """Unwrap what pika's connection workflow has wrapped: of several addresses the last."""
    if isinstance(error, AMQPConnectionWorkflowFailed):
        return _cause(error.exceptions[-1])
    if isinstance(error, AMQPConnectorPhaseErrorBase):
        return _cause(error.exception)
    if isinstance(error, AMQPError) and error.args and isinstance(error.args[0], AMQPConnectionWorkflowFailed):
        return _cause(error.args[0])
    return error


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
    ) -> None:
        parameters = _read_url(url)
        options = parse_qs(urlsplit(url).query)
        parameters.client_properties = {"connection_name": name, "product": "mqworker"}
        parameters.connection_attempts = 1  # the tries are ours
        parameters.socket_timeout = SOCKET_SECONDS
        parameters.stack_timeout = None  # ours too: pika's trips over an assertion of its own in mid-handshake
        if "heartbeat" not in options:
            parameters.heartbeat = HEARTBEAT_SECONDS
        if "blocked_connection_timeout" not in options:
            parameters.blocked_connection_timeout = blocked_seconds
        self._parameters = parameters
        self._where = _Where(
            parameters.host, parameters.port, parameters.virtual_host, unquote(urlsplit(url).username or "guest")
        )
        self._plan = plan
        self._on_up = on_up
        self._on_down = on_down
        self._on_blocked = on_blocked
        self._life: _Life | None = None
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
    def blocked(self) -> bool:
        """Tell whether a memory or disk alarm stops the broker from taking what is published."""
        return self._life is not None and self._life.blocked

    async def run(self) -> None:
        """Connect, and rebuild for ever, until close().

        An exception of a callback (plan, on_delivery, ...) comes out here: it is the owner's bug, not an outage.
        """
        self._idle.clear()
        failures = 0
        try:
            while not self._closing.is_set():
                life = _Life(self._parameters, self._where, self._plan, self._on_blocked)
                self._life = life
                began = time.monotonic()
                try:
                    if await life.opened:
                        self._rise(life)
                    end = await life.ended
                finally:
                    was_up, life.up = life.up_once, False
                    await life.bury()
                if self._closing.is_set():
                    return
                if not isinstance(end, MqworkerError):
                    raise end
                self.last_error = end
                self._tell_waiters()
                if was_up:
                    self._on_down(str(end))
                failures = 0 if was_up and time.monotonic() - began > LONGEST_PAUSE else failures + 1
                await self._pause(failures)
        finally:
            self._closing.set()
            self._life = None
            self._idle.set()
            self._tell_waiters()

    async def wait_up(self, timeout: float | None = None) -> str:  # noqa: ASYNC109  # it has an error of its own to raise
        """Wait until the connection is up, and return its epoch.

        Raises:
            BrokerRefused: at once if the very first try was refused, else at the timeout.
            BrokerUnavailable: at the timeout (seconds; None: never), or when the link is closed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.epoch is None:
            if self._closing.is_set():
                raise BrokerUnavailable(f"expected a link to {self._where} that is open, but it is closed")
            if not self._been_up and isinstance(self.last_error, BrokerRefused):
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

        The future fails with BrokerUnavailable or BrokerRefused; the latter also ends this life of the connection.
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
        connection is lost before the confirm, it is down now, or the key has more than AMQP's 255 bytes. It need not be
        awaited. After NotPublished the message may have arrived all the same: use its message_id again.
        """
        if self._life is None or not self._life.up:
            return _failed(
                NotPublished(
                    f"expected to publish to exchange {exchange!r} with key {key!r}, but the broker at {self._where} "
                    f"is down: {self.last_error or 'not connected yet'}; publish it again when it is up"
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
        )
        return self._life.publish(exchange, key, body, properties, mandatory=mandatory)

    def put_aside(self, delivery: Delivery, *, exchange: str, reason: str) -> asyncio.Future[None]:
        """Publish a delivery as it came, for a person to look at, with the reason and its first exchange in headers."""
        told = {REASON_HEADER: reason[:REASON_CHARACTERS], EXCHANGE_HEADER: delivery.exchange}
        headers = {**_kept_headers(delivery.headers), **told}
        return self.publish(
            exchange=exchange,
            key=exchange,
            body=delivery.body,
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

    async def _pause(self, failures: int) -> None:
        """Wait before the next try, unlike all others that have lost the same broker; a close() ends it."""
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(failures, 10))
        pause = longest * random.uniform(0.5, 1)  # noqa: S311  # spreads load, keeps no secret
        closing = asyncio.ensure_future(self._closing.wait())
        await asyncio.wait([closing], timeout=pause)
        closing.cancel()


class _Life:
    """One life of a connection: from the first try to the first thing that goes wrong."""

    def __init__(
        self,
        parameters: URLParameters,
        where: _Where,
        plan: Callable[[str], Plan],
        on_blocked: Callable[[bool], None],
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
        self._closed: asyncio.Future[None] = loop.create_future()
        self._tags: dict[str, str] = {}  # queue -> consumer tag
        self._early: list[Callable[[], None]] = []  # deliveries that came before all of the plan was carried out
        self._unconfirmed: OrderedDict[int, tuple[asyncio.Future[None], str, str, str]] = OrderedDict()
        self._returned: dict[tuple[str, str, str], list[str]] = {}
        self._published = 0
        self._asked: set[asyncio.Future[None]] = set()
        self._deadline = loop.call_later(CONNECT_SECONDS, self._too_slow)
        self._connection = AsyncioConnection(
            parameters,
            on_open_callback=self._on_connection,
            on_open_error_callback=self._on_closed,
            on_close_callback=self._on_closed,
            custom_ioloop=loop,
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
            plan = self._plan(self.epoch)
            for exchange in plan.exchanges:  # without waiting for answers: a refusal closes the channel in any case
                channel.exchange_declare(exchange.name, exchange.kind, durable=True)
            for queue in plan.queues:
                self._declare(queue)
            if plan.replies is not None:
                self._consume(Consumer(queue=REPLY_TO, on_delivery=plan.replies, no_ack=True))
            for consumer in plan.consumers:
                self.consume(consumer)
            channel.confirm_delivery(self._on_confirm, callback=self._on_ready)  # its answer comes after all others

    def _on_ready(self, _frame: Any) -> None:
        self._deadline.cancel()
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
        self._deadline.cancel()
        self._early.clear()
        self.ended.set_result(error)
        if not self.opened.done():
            self.opened.set_result(False)
        for future, _, exchange, key in self._unconfirmed.values():
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
                f"the broker at {self._where} did not let us in within {CONNECT_SECONDS:.0f} s; "
                "is it overloaded, and is this its AMQP port (5672, with TLS 5671)?"
            )
        )

    def _on_closed(self, _connection: AsyncioConnection, error: BaseException) -> None:
        if not self._closed.done():
            self._closed.set_result(None)
        self.end(self._where.explain(error))

    def _on_channel_closed(self, _channel: Channel, error: Exception) -> None:
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
                self.channel.basic_qos(prefetch_count=consumer.prefetch)  # for consumers started after it
            self._consume(consumer)

    def cancel(self, queue: str) -> None:
        """Stop a consumer; pika gives back what still arrives for it."""
        tag = self._tags.pop(queue, None)
        if tag is not None:
            self.channel.basic_cancel(tag, callback=_ignore)  # with a callback pika waits for the broker's answer

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

        self._tags[consumer.queue] = self.channel.basic_consume(consumer.queue, on_message, auto_ack=consumer.no_ack)

    # ---- queues

    def declare(self, queue: Queue) -> asyncio.Future[None]:
        """Declare and bind a queue on the live channel."""
        future = self._ask()
        self._declare(queue, lambda _frame: self._answer(future))
        return future

    def _declare(self, queue: Queue, on_done: Callable[[Any], None] | None = None) -> None:
        self.channel.queue_declare(
            queue.name,
            durable=queue.durable,
            exclusive=queue.exclusive,
            arguments=dict(queue.arguments),
            callback=None if queue.bindings else on_done,  # without one, the broker is not asked for an answer
        )
        for number, (exchange, key) in enumerate(queue.bindings, start=1):
            last = number == len(queue.bindings)
            self.channel.queue_bind(queue.name, exchange, key, callback=on_done if last else None)

    def delete(self, queue: str) -> asyncio.Future[None]:
        """Delete an unused, empty queue on a throw-away channel: a refusal closes the channel that asks."""
        future = self._ask()

        def on_channel(channel: Channel) -> None:
            channel.queue_delete(queue, if_unused=True, if_empty=True, callback=lambda _frame: on_deleted(channel))

        def on_deleted(channel: Channel) -> None:
            self._answer(future)
            channel.close()

        def on_closed(_channel: Channel, error: Exception) -> None:
            if future in self._asked:
                self._asked.discard(future)
                told = error.reply_text if isinstance(error, ChannelClosedByBroker) else repr(error)
                _fail(future, BrokerRefused(f"expected queue {queue!r} to be unused and empty, but: {told}"))

        self._connection.channel(on_open_callback=on_channel).add_on_close_callback(on_closed)
        return future

    def remove(self, queues: Iterable[str], exchanges: Iterable[str]) -> asyncio.Future[None]:
        """Delete in order; the answer to the last deletion stands for all."""
        future = self._ask()
        for queue in queues:
            self.channel.queue_delete(queue, callback=_ignore)
        *most, last = exchanges
        for exchange in most:
            self.channel.exchange_delete(exchange, callback=_ignore)
        self.channel.exchange_delete(last, callback=lambda _frame: self._answer(future))
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
        self._unconfirmed[self._published] = (future, properties.message_id, exchange, key)
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

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        refused = isinstance(method, Basic.Nack)
        if not method.multiple:
            self._confirm(self._unconfirmed.pop(method.delivery_tag), refused=refused)
            return
        while self._unconfirmed and next(iter(self._unconfirmed)) <= method.delivery_tag:  # they are in their order
            self._confirm(self._unconfirmed.popitem(last=False)[1], refused=refused)

    def _confirm(self, entry: tuple[asyncio.Future[None], str, str, str], *, refused: bool) -> None:
        future, message_id, exchange, key = entry
        if refused:
            _fail(
                future,
                NotPublished(
                    f"a queue behind exchange {exchange!r} and key {key!r} refused the message: it is full, or its "
                    "leader just moved; publish it again with the same message_id"
                ),
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
        elif not future.done():
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
