"""Exchanges, queues, arguments and names, as data. Knows no broker: amqp declares what stands here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

DELIVERY_LIMIT: Final = 1000  # quorum queues: 20 by default on 4.x, none on 3.10, and -1 is lethal there
CLASS_QUEUE_EXPIRES_MS: Final = 24 * 3600 * 1000  # a class nobody has used for a day
API_TTL_MS: Final = 60 * 1000  # who asked has gone by then


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Describe an exchange; all are durable."""

    name: str
    kind: Literal["direct", "topic"] = "direct"


@dataclass(frozen=True, kw_only=True)
class Queue:
    """Describe a queue and the (exchange, routing key) pairs it is bound to."""

    name: str
    durable: bool = True
    exclusive: bool = False
    lasting: bool = False  # made once for everybody; who may not declare leaves it to others
    arguments: Mapping[str, Any] = field(default_factory=dict)
    bindings: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Topology:
    """Name everything on the broker that carries one pool's prefix."""

    prefix: str = "mqworker"

    @property
    def submit(self) -> str:
        """Where clients publish requests; the key is the exchange's name."""
        return f"{self.prefix}.submit"

    @property
    def work(self) -> str:
        """Where the scheduler publishes tickets; the key is the class queue's name."""
        return f"{self.prefix}.work"

    @property
    def report(self) -> str:
        """Where workers publish reports; the key is the exchange's name."""
        return f"{self.prefix}.report"

    @property
    def outcome(self) -> str:
        """Where workers publish outcomes; the key is the exchange's name."""
        return f"{self.prefix}.outcome"

    @property
    def verdict(self) -> str:
        """Where the scheduler publishes its answers; the key is `verdict_key()`."""
        return f"{self.prefix}.verdict"

    @property
    def api(self) -> str:
        """Where clients publish questions; the key is the exchange's name."""
        return f"{self.prefix}.api"

    @property
    def command(self) -> str:
        """Where clients publish commands; the key is the exchange's name, and the queue that of `api`."""
        return f"{self.prefix}.command"

    @property
    def events(self) -> str:
        """Where the scheduler tells of changes; the key is `request.<task>.<state>` or `worker.<event>`."""
        return f"{self.prefix}.events"

    @property
    def logs(self) -> str:
        """Where workers tell what runs print; the key is the request's id."""
        return f"{self.prefix}.logs"

    @property
    def rejected(self) -> str:
        """Where unreadable messages go; the key is the exchange's name."""
        return f"{self.prefix}.rejected"

    def exchanges(self) -> tuple[Exchange, ...]:
        """List the exchanges; whoever may declares all of them, and all alike."""
        direct = (
            self.submit,
            self.work,
            self.report,
            self.outcome,
            self.verdict,
            self.api,
            self.command,
            self.rejected,
        )
        topics = (self.events, self.logs)
        return (*(Exchange(name=name) for name in direct), *(Exchange(name=name, kind="topic") for name in topics))

    def queues(self) -> tuple[Queue, ...]:
        """List the lasting queues; whoever may declares all of them, so that no first publisher meets a void."""
        return (self.rejected_queue(), self.submit_queue(), self.outcome_queue(), self.api_queue())

    def submit_queue(self) -> Queue:
        """Describe the queue of requests."""
        return self._quorum("submit", self.submit)

    def outcome_queue(self) -> Queue:
        """Describe the queue of outcomes."""
        return self._quorum("outcome", self.outcome)

    def rejected_queue(self) -> Queue:
        """Describe the queue of what could not be read, for the operator."""
        return Queue(
            name=self._lasting("rejected"),
            lasting=True,
            arguments={"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT},
            bindings=((self.rejected, self.rejected),),
        )

    def api_queue(self) -> Queue:
        """Describe the queue of questions and commands."""
        return Queue(
            name=self._lasting("api"),
            lasting=True,
            # A quorum queue too: while a classic one's node is down nobody can declare it, and so nobody gets in.
            arguments={"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT, "x-message-ttl": API_TTL_MS},
            bindings=((self.api, self.api), (self.command, self.command)),
        )

    def _lasting(self, name: str) -> str:
        """Return a name that is no exchange's: whoever may write to an exchange may bind a queue of the same name."""
        return f"{self.prefix}.queue.{name}"

    def _quorum(self, name: str, exchange: str) -> Queue:
        return Queue(
            name=self._lasting(name),
            lasting=True,
            arguments={
                "x-queue-type": "quorum",
                "x-delivery-limit": DELIVERY_LIMIT,
                "x-dead-letter-exchange": self.rejected,
                "x-dead-letter-routing-key": self.rejected,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",  # without it at-least-once is silently at-most-once
            },
            bindings=((exchange, exchange),),
        )

    def class_queue(self, capability_class: str) -> Queue:
        """Describe the queue of a capability class: classic, since a lost ticket is issued again from the ledger."""
        name = f"{self.work}.{capability_class}"
        return Queue(name=name, arguments={"x-expires": CLASS_QUEUE_EXPIRES_MS}, bindings=((self.work, name),))

    def is_class_queue(self, name: str) -> bool:
        """Say whether a name is one that this pool's schedulers give to class queues: <work>.<term>-<number>."""
        return re.fullmatch(rf"{re.escape(self.work)}\.[0-9]+-[0-9]+", name) is not None

    def report_queue(self, epoch: str) -> Queue:
        """Describe the active scheduler's report queue: an outage leaves no stale flood in it."""
        return Queue(
            name=f"{self.report}.{epoch}", durable=False, exclusive=True, bindings=((self.report, self.report),)
        )

    def worker_queue(self, worker: str, epoch: str) -> Queue:
        """Describe the queue on which one worker's connection hears the scheduler."""
        return Queue(
            name=f"{self.prefix}.worker.{worker}.{epoch}",
            durable=False,
            exclusive=True,
            bindings=((self.verdict, self.verdict_key(worker, epoch)),),
        )

    def follower_queue(self, epoch: str, bindings: tuple[tuple[str, str], ...]) -> Queue:
        """Describe the queue of somebody who follows events or logs."""
        return Queue(name=f"{self.prefix}.follow.{epoch}", durable=False, exclusive=True, bindings=bindings)

    @staticmethod
    def verdict_key(worker: str, epoch: str) -> str:
        """Return the routing key that reaches one connection of one worker."""
        return f"{worker}.{epoch}"

    @staticmethod
    def request_event_key(task: str, state: str) -> str:
        """Return the routing key of a request's event."""
        return f"request.{task}.{state}"

    @staticmethod
    def worker_event_key(event: str) -> str:
        """Return the routing key of a worker's event."""
        return f"worker.{event}"
