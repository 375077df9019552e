"""The work of benchmarks.work by pika alone, on one queue: what is left if a task queue does nothing. The limit.

    python -m benchmarks.raw work      take messages, work, acknowledge each after its work
    python -m benchmarks.raw submit    the submitter

Both are at work until they are told to stop.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

import pika

from benchmarks import submitting, work

WINDOW: Final = 1000  # messages that wait for their confirms
PREFETCH: Final = 128  # as Celery has: 64 for each of two processes
PERSISTENT: Final = pika.BasicProperties(delivery_mode=2, content_type="application/json")


def _parameters() -> pika.URLParameters:
    parameters = pika.URLParameters(os.environ["BENCHMARK_BROKER"])
    parameters.heartbeat = 0  # the submitter is silent between two orders
    return parameters


def _body(number: int) -> bytes:
    return json.dumps(work.argument(number), separators=(",", ":")).encode()


class Windowed:
    """Publish numbers on a connection of its own, with so many confirms outstanding; `run` returns when all are in."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = iter(numbers)
        self._sent = 0
        self._open: dict[int, None] = {}  # delivery tags whose confirm has not come, in order
        self._channel: Any = None
        self._connection = pika.SelectConnection(
            _parameters(), on_open_callback=self._opened, on_close_callback=self._closed
        )

    def run(self) -> None:
        """Publish all."""
        self._connection.ioloop.start()

    def _opened(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._ready)

    def _closed(self, connection: Any, _reason: Exception) -> None:
        connection.ioloop.stop()

    def _ready(self, channel: Any) -> None:
        self._channel = channel
        channel.confirm_delivery(self._heard, callback=lambda _: self._fill())

    def _fill(self) -> None:
        while len(self._open) < WINDOW and (number := next(self._numbers, None)) is not None:
            self._channel.basic_publish("", work.NAME, _body(number), PERSISTENT)
            self._sent += 1
            self._open[self._sent] = None
        if not self._open:
            self._connection.close()

    def _heard(self, frame: Any) -> None:
        if frame.method.NAME != "Basic.Ack":
            raise RuntimeError(f"the broker did not take a message: {frame}")
        tag = frame.method.delivery_tag
        if frame.method.multiple:
            while self._open and (first := next(iter(self._open))) <= tag:
                del self._open[first]
        else:
            del self._open[tag]
        self._fill()


class Sender:
    """Submit by pika."""

    def __init__(self) -> None:
        self._channel = pika.BlockingConnection(_parameters()).channel()
        declare(self._channel)
        self._channel.confirm_delivery()

    def one_by_one(self, numbers: Sequence[int]) -> None:
        """Publish each on a blocking channel, which waits for its confirm."""
        for number in numbers:
            self._channel.basic_publish("", work.NAME, _body(number), PERSISTENT)

    def together(self, numbers: Sequence[int]) -> None:
        """Publish with a window of confirms."""
        Windowed(numbers).run()

    def results(self, _sent: None) -> int:
        """Say that there are none."""
        return 0


def declare(channel: Any) -> None:
    """Declare the queue."""
    channel.queue_declare(work.NAME, durable=True, arguments={"x-queue-type": os.environ["BENCHMARK_QUEUE"]})


class Worker:
    """Take messages for ever."""

    def __init__(self) -> None:
        self._connection = pika.SelectConnection(_parameters(), on_open_callback=self._opened)

    def run(self) -> None:
        """Work."""
        self._connection.ioloop.start()

    def _opened(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._ready)

    def _ready(self, channel: Any) -> None:
        channel.basic_qos(prefetch_count=PREFETCH)
        channel.basic_consume(work.NAME, self._work)

    @staticmethod
    def _work(channel: Any, deliver: Any, _properties: Any, body: bytes) -> None:
        work.run(**json.loads(body))
        channel.basic_ack(deliver.delivery_tag)


if __name__ == "__main__":
    Worker().run() if sys.argv[1] == "work" else submitting.serve(Sender())
