"""Whether what is put into a queue still comes out of it to its consumer, as probes tell that are sent through it.

A broker may forget a consumer that both ends believe to be there: RabbitMQ 3.10 moves the consumer of a quorum queue
that is deleted and made again at once to the new one, and then drops as seen what its channel had been sent before.
Pure; told what was published and what came, and when.
"""

import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

from mqworker.messages import Probe

EVERY: Final = 2.0  # seconds between probes of a queue
DEAF: Final = 5.0  # seconds without anything, while a probe waits there: a leader's election takes less
AWAY: Final = 1.0  # seconds between two looks after which nobody knows what would have come: we did not listen


@dataclass(slots=True)
class _Queue:
    probe: Probe | None = None  # the last one, until it comes back
    sent: float = 0.0
    waits_since: float | None = None  # for the consumer, as the broker has confirmed


class Hearing:
    """Probe queues, one probe at a time in each; times are in seconds of one steady clock."""

    def __init__(self, *, term: int, queues: Collection[str]) -> None:
        self._term = term
        self._secret = secrets.token_hex(8)  # others may write to these queues: they cannot make us hear
        self._number = 0
        self._looked = 0.0
        self._queues = {name: _Queue() for name in queues}

    def anew(self) -> None:
        """Begin with new consumers."""
        for queue in self._queues.values():
            queue.probe = queue.waits_since = None

    def due(self, steady: float) -> Iterator[tuple[str, Probe]]:
        """Give the probes that are to be sent now."""
        for name, queue in self._queues.items():
            if queue.probe is None and steady - queue.sent >= EVERY:
                self._number += 1
                queue.probe = Probe(term=self._term, number=self._number, secret=self._secret)
                queue.sent = steady
                yield name, queue.probe

    def confirmed(self, name: str, probe: Probe, steady: float) -> None:
        """Take it that the broker has a probe in its queue."""
        queue = self._queues[name]
        if queue.probe is probe:
            queue.waits_since = steady

    def not_published(self, name: str, probe: Probe) -> None:
        """Forget a probe that the broker has not."""
        queue = self._queues[name]
        if queue.probe is probe:
            queue.probe = None

    def heard(self, name: str, steady: float) -> None:
        """Take it that something came from a queue."""
        queue = self._queues.get(name)
        if queue is not None and queue.waits_since is not None:
            queue.waits_since = steady

    def back(self, name: str, probe: Probe) -> None:
        """Take a probe that came; another's, or an older one, says nothing."""
        queue = self._queues.get(name)
        if queue is not None and queue.probe == probe:
            queue.probe = queue.waits_since = None

    def deaf(self, steady: float, busy: Collection[str]) -> list[str]:
        """Name the queues whose consumer gets nothing, though something waits and it is not among the busy."""
        if steady - self._looked > AWAY:
            for name in self._queues:
                self.heard(name, steady)
        self._looked = steady
        return [
            name
            for name, queue in self._queues.items()
            if queue.waits_since is not None and name not in busy and steady - queue.waits_since >= DEAF
        ]
