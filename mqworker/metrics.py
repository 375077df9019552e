"""Every Prometheus name, label and help text, and the page that shows them. Knows no ledger, broker or task.

Names follow the Prometheus conventions: base units, `_total` for counters, labels with few values. No request id and
no host name is ever a label. One endpoint a process; a task's child never loads this room.
"""

import threading
from collections.abc import Callable, Iterable
from functools import partial
from socketserver import ThreadingMixIn
from typing import Any, Final, NamedTuple, TypeVar, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, make_wsgi_app
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from mqworker.errors import SettingsError

RUN_SECONDS: Final = (0.05, 0.25, 1, 5, 15, 60, 300, 900, 3600, 3 * 3600, 8 * 3600, 24 * 3600)
COMMIT_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5, 30)


_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)


class Health(NamedTuple):
    """Say whether a process does its work, and why not."""

    well: bool
    text: str


class _Process:
    """Hold what each process shows of itself."""

    def __init__(self, *, role: str, version: str) -> None:
        self.registry = CollectorRegistry()
        self._children: dict[tuple[object, tuple[str, ...]], object] = {}
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        Info("mqworker_build", "Version and role of this process.", registry=self.registry).info(
            {"version": version, "role": role}
        )
        self.broker_up = self._gauge("mqworker_broker_up", "1 while both connections to the broker are up.")
        self.broker_blocked = self._gauge(
            "mqworker_broker_blocked", "1 while the broker blocks publishing (memory or disk alarm)."
        )
        self.reconnects = self._counter(
            "mqworker_broker_connections_lost_total", "Connections to the broker that were lost and built anew."
        )
        self.not_published = self._counter(
            "mqworker_messages_not_published_total", "Messages returned, refused or cut off before their confirm."
        )
        self.unreadable = self._counter(
            "mqworker_messages_unreadable_total", "Messages that could not be read.", ["source"]
        )

    def child(self, metric: _Metric, *values: str) -> _Metric:
        """Return the one of a metric with these labels; to look it up in the metric takes longer than to count."""
        known = self._children.get((metric, values))
        if known is None:
            known = self._children[metric, values] = metric.labels(*values)
        return cast("_Metric", known)

    def _gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float], labels: Iterable[str] = ()) -> Histogram:
        return Histogram(name, text, labels, buckets=tuple(buckets), registry=self.registry)


class SchedulerMetrics(_Process):
    """Name what a scheduler shows."""

    def __init__(self, *, version: str) -> None:
        super().__init__(role="scheduler", version=version)
        self.active = self._gauge("mqworker_scheduler_active", "1 while this scheduler is active, not standby.")
        self.term = self._gauge("mqworker_scheduler_term", "The term of this scheduler.")
        self.requests = self._gauge("mqworker_requests", "Requests that are not final, by state.", ["state"])
        self.impostors = self._counter(
            "mqworker_impostor_messages_total", "Reports and outcomes in a worker's name that is another user's."
        )
        self.received = self._counter(
            "mqworker_requests_received_total", "Requests received, by what became of them.", ["status"]
        )
        self.moves = self._counter(
            "mqworker_request_events_total", "Moves of requests, by task and event.", ["task", "event"]
        )
        self.outcomes = self._counter(
            "mqworker_outcomes_total", "Outcomes received, by the answer they got.", ["status"]
        )
        self.attempts_lost = self._counter(
            "mqworker_attempts_lost_total", "Runs whose lease lapsed or whose worker forgot them."
        )
        self.wait_seconds = self._histogram(
            "mqworker_request_wait_seconds", "From a request's submission to its grant.", RUN_SECONDS, ["task"]
        )
        self.run_seconds = self._histogram(
            "mqworker_request_run_seconds",
            "From a run's start to its end, by its result.",
            RUN_SECONDS,
            ["task", "result"],
        )
        self.workers = self._gauge("mqworker_workers", "Workers, by state.", ["state"])
        self.classes = self._gauge("mqworker_capability_classes", "Capability classes.")
        self.requirements = self._gauge(
            "mqworker_requirement_classes",
            "Requirement classes that the scheduler knows; near the number of requests, nothing is shared.",
        )
        self.escaped = self._gauge(
            "mqworker_requirement_classes_escaped",
            "Requirement classes whose task answers in two ways, asked worker by worker.",
        )
        self.class_idle = self._gauge(
            "mqworker_capability_class_idle_slots", "Idle slots of a capability class.", ["capability_class"]
        )
        self.class_offers = self._gauge(
            "mqworker_capability_class_offers", "Tickets out to a capability class.", ["capability_class"]
        )
        self.commit_seconds = self._histogram(
            "mqworker_ledger_commit_seconds", "How long a set of writes took to commit.", COMMIT_SECONDS
        )
        self.commit_writes = self._histogram(
            "mqworker_ledger_commit_writes", "How many writes a set had.", (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000)
        )
        self.commit_failures = self._counter(
            "mqworker_ledger_commit_failures_total", "Commits that failed and were tried again."
        )


class WorkerMetrics(_Process):
    """Name what a worker shows."""

    def __init__(self, *, version: str) -> None:
        super().__init__(role="worker", version=version)
        self.slots = self._gauge("mqworker_worker_slots", "Slots of this worker, by state.", ["state"])
        self.unsettled = self._gauge(
            "mqworker_worker_unsettled_outcomes", "Outcomes in the spool that the ledger has not answered."
        )
        self.runs = self._counter(
            "mqworker_worker_runs_total", "Runs that ended here, by task and result.", ["task", "result"]
        )
        self.refusals = self._counter("mqworker_worker_refusals_total", "Tickets that this worker refused.", ["task"])
        self.held = self._gauge(
            "mqworker_worker_held", "1 while the worker takes no work for want of room; /healthz says where."
        )
        self.slot_restarts = self._counter(
            "mqworker_worker_slot_restarts_total", "Slot processes started after the first ones."
        )


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the overridden method names it so
        """Say nothing: a scrape every few seconds is no news."""


class MetricsServer:
    """Serve /metrics and /healthz in a thread of their own."""

    def __init__(self, listen: str, *, registry: CollectorRegistry, health: Callable[[], Health]) -> None:
        """Listen on `host:port` (port 0: any free one).

        Raises:
            SettingsError: the address is no address, or taken.
        """
        host, separator, port = listen.rpartition(":")
        if not separator or not port.isdecimal():
            raise SettingsError(f"expected an address like 127.0.0.1:9107 for metrics, got {listen!r}")
        metrics = make_wsgi_app(registry)

        def page(environ: dict[str, Any], start_response: Any) -> Any:
            path = environ.get("PATH_INFO", "")
            if path == "/metrics":
                return metrics(environ, start_response)
            if path == "/healthz":
                state = health()
                start_response(
                    "200 OK" if state.well else "503 Service Unavailable",
                    [("Content-Type", "text/plain; charset=utf-8")],
                )
                return [(state.text + "\n").encode()]
            start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
            return [b"here are /metrics and /healthz\n"]

        try:
            self._server = make_server(
                host.strip("[]"), int(port), page, server_class=_Server, handler_class=_QuietHandler
            )
        except (OSError, OverflowError) as error:
            raise SettingsError(f"expected a free address for metrics, got {listen}: {error}") from error
        self.port: int = self._server.server_port
        serve = partial(self._server.serve_forever, poll_interval=0.05)  # seconds that `close` may wait
        self._thread = threading.Thread(target=serve, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
