"""The work of benchmarks.work as a Celery task, and its submitter: `python -m benchmarks.celery_app`.

Runs in an environment of its own that has Celery. Settings are what Celery's documentation advises for many short tasks
that must not be lost; each says where.
"""

import os
from collections.abc import Sequence
from typing import Any, Final

from celery import Celery
from celery.result import ResultSet

from benchmarks import submitting, work

BACKEND: Final = os.environ.get("BENCHMARK_RESULTS")  # None: no results; rpc:// or db+postgresql+psycopg://...
POLL_SECONDS: Final = 0.05  # between two looks into a database; 0.5 if one does not say

app = Celery(work.NAME, broker=os.environ["BENCHMARK_BROKER"], backend=BACKEND)
app.conf.update(
    task_default_queue_type="quorum",  # "Using Quorum Queues"
    task_default_exchange_type="topic",  # so that its native delayed delivery, which quorum queues bring, can start
    broker_transport_options={"confirm_publish": True},  # Kombu, "Publisher confirms"
    task_acks_late=True,  # "Should I use retry or acks_late?"
    task_ignore_result=BACKEND is None,  # "Ignore results you don't want"
    worker_prefetch_multiplier=64,  # "Prefetch Limits": large for many short tasks, 64 or 128
)
counted = app.task(name=work.NAME)(work.run)


class Sender:
    """Submit by Celery."""

    def one_by_one(self, numbers: Sequence[int]) -> list[Any]:
        """Call `apply_async` for each: it returns once the broker has confirmed the message."""
        return [counted.apply_async(kwargs=work.argument(number)) for number in numbers]

    def together(self, numbers: Sequence[int]) -> list[Any]:
        """Keep one producer for all, as "Calling Tasks" advises; each message is confirmed before the next."""
        with app.producer_pool.acquire(block=True) as producer:
            return [counted.apply_async(kwargs=work.argument(number), producer=producer) for number in numbers]

    def results(self, sent: list[Any]) -> int:
        """Wait for all results, if there are any."""
        if BACKEND is None:
            return 0
        ResultSet(sent).join(timeout=None, interval=POLL_SECONDS)  # raises for a task that failed
        return len(sent)


if __name__ == "__main__":
    if BACKEND is not None and BACKEND.startswith("db+"):
        app.backend.session_manager.forked = True  # else each look connects anew; a forked process keeps connections
    submitting.serve(Sender())
