"""What the scheduler has to say, kept until what it rests on is committed: each message, addressed and in words.

Knows where each kind of message goes, and not when there is reason for one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import msgspec

from mqworker.lifecycle import Event, State
from mqworker.messages import (
    MAX_EVENTS_IN_A_MESSAGE,
    MAX_TICKETS_IN_A_MESSAGE,
    Probe,
    Reason,
    Request,
    RequestEvent,
    RequestEvents,
    StuckEvent,
    Ticket,
    Tickets,
    Verdict,
    VerdictPart,
    WorkerEvent,
)
from mqworker.metrics import SchedulerMetrics
from mqworker.task import Task
from mqworker.topology import Topology

UNKNOWN: Final = "unknown"  # a task whose name is none: names of strangers are no labels


@dataclass(frozen=True, kw_only=True)
class Send:
    """Ask for a message to be published; `returned` is called if it was not."""

    exchange: str
    key: str
    message: msgspec.Struct
    mandatory: bool = True
    persistent: bool = True
    returned: Callable[[], None] | None = None


class Outbox:
    """Keep messages until they are taken."""

    def __init__(self, *, term: int, topology: Topology, metrics: SchedulerMetrics) -> None:
        self._term = term
        self._topology = topology
        self._metrics = metrics
        self._sends: list[Send] = []
        self._tickets: dict[str, _Tickets] = {}  # by queue
        self._events: dict[str, list[RequestEvent]] = {}  # by routing key
        self._verdicts: dict[tuple[str, str], list[VerdictPart]] = {}  # by worker and its epoch

    def take(self, lives: Callable[[str], bool]) -> list[Send]:
        """Hand over all messages, but for tickets into queues that do not live."""
        sends, self._sends = self._sends, []
        tickets, self._tickets = self._tickets, {}
        for queue, some in tickets.items():
            if lives(queue):
                sends += self._in_sets(queue, some)
        events, self._events = self._events, {}
        for key, moves in events.items():
            for start in range(0, len(moves), MAX_EVENTS_IN_A_MESSAGE):
                part = moves[start : start + MAX_EVENTS_IN_A_MESSAGE]
                sends.append(self._event(key, RequestEvents(events=part)))
        verdicts, self._verdicts = self._verdicts, {}
        for (worker, epoch), parts in verdicts.items():
            sends.append(
                Send(
                    exchange=self._topology.verdict,
                    key=self._topology.verdict_key(worker, epoch),
                    message=Verdict(term=self._term, parts=parts),
                    persistent=False,
                )
            )
        return sends

    def offer(
        self,
        queue: str,
        request: Request,
        *,
        attempt: int,
        alone: bool,
        returned: Callable[[], None],
        together: int,
    ) -> None:
        """Send a class a ticket, with at most so many in one message."""
        some = self._tickets.setdefault(queue, _Tickets())
        some.together = min(together, MAX_TICKETS_IN_A_MESSAGE)
        some.tickets.append(Ticket(attempt=attempt, request=request, alone=alone))
        some.returned.append(returned)

    def _in_sets(self, queue: str, some: "_Tickets") -> Iterator[Send]:
        for start in range(0, len(some.tickets), some.together):
            part = slice(start, start + some.together)
            yield Send(
                exchange=self._topology.work,
                key=queue,
                message=Tickets(term=self._term, tickets=some.tickets[part]),
                returned=partial(_call_all, some.returned[part]),
            )

    def say(self, worker: str, epoch: str, part: VerdictPart) -> None:
        """Say something to one worker; what is said in one turn goes in one message."""
        self._verdicts.setdefault((worker, epoch), []).append(part)

    def probe(self, number: int, secret: str, returned: Callable[[], None]) -> None:
        """Send a probe through the queue in which workers report."""
        self._sends.append(
            Send(
                exchange=self._topology.report,
                key=self._topology.report,
                message=Probe(term=self._term, number=number, secret=secret),
                persistent=False,
                returned=returned,
            )
        )

    def tell_move(  # the fields of one event
        self,
        request: str,
        task: str,
        state: State,
        event: Event,
        *,
        attempt: int,
        wall: float,
        worker: str | None = None,
        reason: Reason | None = None,
    ) -> None:
        """Tell whoever listens what became of a request, and count it."""
        label = task.lower() if Task.is_valid_task_name(task) else UNKNOWN
        self._metrics.child(self._metrics.moves, label, event).inc()
        self._events.setdefault(self._topology.request_event_key(label, state), []).append(
            RequestEvent(
                term=self._term,
                time=wall,
                request=request,
                task=task,
                state=state.value,
                event=event,
                attempt=attempt,
                worker=worker,
                reason=reason,
            )
        )

    def tell_stuck(
        self,
        task: str,
        requirement: int,
        *,
        since: float,
        number: int,
        requests: list[str],
        reason: str,
        wall: float,
    ) -> None:
        """Tell whoever listens that nobody can run some requests."""
        self._tell(
            self._topology.request_event_key(task, "stuck"),
            StuckEvent(
                term=self._term,
                time=wall,
                task=task,
                requirement=requirement,
                since=since,
                number=number,
                requests=requests,
                reason=reason,
            ),
        )

    def tell_worker(self, worker: str, event: str, reason: str | None, *, wall: float) -> None:
        """Tell whoever listens what became of a worker."""
        self._tell(
            self._topology.worker_event_key(event),
            WorkerEvent(
                term=self._term,
                time=wall,
                worker=worker,
                event=event,  # type: ignore[arg-type]  # one of the five words
                reason=reason,
            ),
        )

    def _tell(self, key: str, event: StuckEvent | WorkerEvent) -> None:
        self._sends.append(self._event(key, event))

    def _event(self, key: str, event: RequestEvents | StuckEvent | WorkerEvent) -> Send:
        return Send(exchange=self._topology.events, key=key, message=event, mandatory=False, persistent=False)


@dataclass(kw_only=True)
class _Tickets:
    """Hold what is to go to one queue."""

    together: int = 1
    tickets: list[Ticket] = field(default_factory=list)
    returned: list[Callable[[], None]] = field(default_factory=list)


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()
