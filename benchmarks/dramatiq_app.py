"""The work of benchmarks.work as a Dramatiq actor, and its submitter: `python -m benchmarks.dramatiq_app`.

Runs in an environment of its own that has Dramatiq. An actor's message is acknowledged after it ran, and persistent, in
any case; results over RabbitMQ it has none.
"""

import os
from collections.abc import Sequence

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from benchmarks import submitting, work

broker = RabbitmqBroker(url=os.environ["BENCHMARK_BROKER"], confirm_delivery=True)
dramatiq.set_broker(broker)
counted = dramatiq.actor(work.run, actor_name=work.NAME)


class Sender:
    """Submit by Dramatiq."""

    def one_by_one(self, numbers: Sequence[int]) -> None:
        """Call `send` for each: it returns once the broker has confirmed the message."""
        for number in numbers:
            counted.send(**work.argument(number))

    def together(self, numbers: Sequence[int]) -> None:
        """Run a group; each message is confirmed before the next."""
        dramatiq.group([counted.message(**work.argument(number)) for number in numbers]).run()

    def results(self, _sent: None) -> int:
        """Say that there are none."""
        return 0


if __name__ == "__main__":
    submitting.serve(Sender())
