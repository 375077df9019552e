"""Two schedulers on one ledger in PostgreSQL, as real processes: one is active, whatever befalls it or the database."""

import signal
import socket
import threading
import time
import urllib.request
import uuid
from contextlib import ExitStack, suppress

import psycopg
import pytest

from mqworker.errors import OutsideError
from mqworker.messages import Request
from tests.cluster import Cluster

pytestmark = pytest.mark.live

TAKE_OVER = 10.0  # seconds, as promised


@pytest.fixture(scope="module")
def cluster(missing):
    """A database server that tests may stop."""
    try:
        one = Cluster()
    except FileNotFoundError as error:
        missing("PostgreSQL", str(error))
    with one:
        yield one


class Standing:
    """A pool with a ledger in PostgreSQL, and two schedulers for it."""

    def __init__(self, pool, cluster, eventually, final, runs):
        self.pool, self.cluster, self.eventually, self.final, self.runs = pool, cluster, eventually, final, runs
        self.name = f"l{uuid.uuid4().hex[:12]}"
        self.ask("postgres", f"CREATE DATABASE {self.name}")
        pool.environment["MQWORKER_LEDGER"] = cluster.url(self.name)
        self.ids = []

    def ask(self, database, statement):
        with psycopg.connect(self.cluster.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def term(self):
        with suppress(psycopg.Error):
            return self.ask(self.name, "SELECT term FROM leader")[0][0]
        return 0

    def up(self, stack, **environment):
        """Start both, the first of which is active, and a worker; return a client."""
        self.first = self.pool.start("first", "scheduler")
        self.eventually(lambda: self.term() == 1, "the first scheduler is active")
        self.second = self.pool.start("second", "scheduler", **environment)
        self.eventually(lambda: "scheduler stands by" in self.pool.log("second"), "the second one stands by")
        self.pool.worker("anna", 2)
        client = stack.enter_context(self.pool.client())
        self.pool.await_workers(client, "anna")
        return client

    def wait_for_term(self, term, began):
        self.eventually(lambda: self.term() == term, f"term {term}")
        return time.monotonic() - began

    def submit(self, client, number, **data):
        requests = [
            Request(id=str(uuid.uuid4()), task="journal", data={"journal": self.runs.data["journal"], **data})
            for _ in range(number)
        ]
        self.ids += [request.id for request in requests]
        self.eventually(lambda: self._receipted(client, requests), "the submissions are receipted")

    def _receipted(self, client, requests):
        with suppress(OutsideError):  # a scheduler that was just killed may have had the words of it in hand
            return all(one.status in ("accepted", "known") for one in client.submit_many(requests))

    @staticmethod
    def load(method):
        """Run something in a thread of its own until the block ends."""
        return _Load(method)

    def assert_each_ran_once(self, client):
        views = self.final(client, *self.ids)
        assert {view.state for view in views} == {"success"}
        assert {len(view.attempts) for view in views} == {1}
        assert (self.runs.count("start"), self.runs.count("end")) == (len(self.ids), len(self.ids))


class _Load:
    def __init__(self, method):
        self._method = method
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go)

    def _go(self):
        while not self._over.is_set():
            self._method()

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


@pytest.fixture
def standing(pool, cluster, eventually, final, runs):
    return Standing(pool, cluster, eventually, final, runs)


def test_a_standby_takes_over_from_a_scheduler_that_is_killed_and_at_once_from_one_that_stops(standing, eventually):
    port = _free_port()
    with ExitStack() as stack:
        client = standing.up(stack, MQWORKER_SCHEDULER_METRICS_LISTEN=f"127.0.0.1:{port}")
        assert _get(port, "healthz").startswith("standby: waits for its turn")
        assert "mqworker_scheduler_active 0.0" in _get(port, "metrics")
        standing.submit(client, 1, gate=standing.runs.data["gate"])
        standing.runs.await_starts(1)

        with standing.load(lambda: standing.submit(client, 3)):
            began = time.monotonic()
            standing.pool.end("first", signal.SIGKILL)
            assert standing.wait_for_term(2, began) < TAKE_OVER
            eventually(lambda: client.pool().term == 2, "the standby answers")
        standing.runs.open()
        standing.assert_each_ran_once(client)
        eventually(lambda: "scheduler of term 2" in _get(port, "healthz"), "the standby is active")
        assert "mqworker_scheduler_active 1.0" in _get(port, "metrics")

        standing.pool.start("third", "scheduler")
        eventually(lambda: "scheduler stands by" in standing.pool.log("third"), "a third one stands by")
        began = time.monotonic()
        assert standing.pool.end("second") == 0
        standing.wait_for_term(3, began)
        assert "elected for it" in standing.pool.log("third") or "is active" in standing.pool.log("third")
        standing.submit(client, 1)
        standing.assert_each_ran_once(client)
        _assert_no_secret(standing)


def test_nothing_that_a_frozen_scheduler_does_after_it_wakes_counts(standing, eventually):
    with ExitStack() as stack:
        client = standing.up(stack)
        standing.submit(client, 1, gate=standing.runs.data["gate"])
        standing.runs.await_starts(1)
        with standing.load(lambda: standing.submit(client, 3)):
            began = time.monotonic()
            standing.first.send_signal(signal.SIGSTOP)
            assert standing.wait_for_term(2, began) < TAKE_OVER
            eventually(lambda: client.pool().term == 2, "the standby answers")
            standing.submit(client, 3)
            standing.first.send_signal(signal.SIGCONT)
            eventually(lambda: "another scheduler was elected" in standing.pool.log("first"), "the first one notices")
            eventually(lambda: standing.pool.log("first").count("scheduler stands by") == 1, "it stands by")
        assert standing.term() == 2
        standing.runs.open()
        standing.assert_each_ran_once(client)

        began = time.monotonic()
        assert standing.pool.end("second") == 0
        standing.wait_for_term(3, began)
        standing.submit(client, 1)
        standing.assert_each_ran_once(client)


def test_an_active_scheduler_outlives_its_sessions_and_a_restart_of_the_database(standing, eventually):
    with ExitStack() as stack:
        client = standing.up(stack)
        standing.submit(client, 1, gate=standing.runs.data["gate"])
        standing.runs.await_starts(1)
        with standing.load(lambda: standing.submit(client, 3)):
            for round_ in range(3):
                standing.ask(
                    standing.name,
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid != pg_backend_pid()",
                )
                done = len(standing.ids)
                eventually(lambda done=done: len(standing.ids) > done + 3, f"work goes on after cut {round_}")
            assert standing.term() == 1
            for how in ("fast", "immediate"):
                standing.cluster.stop(how)
                standing.cluster.start()
                done = len(standing.ids)
                eventually(lambda done=done: len(standing.ids) > done + 3, f"work goes on after the {how} restart")
        standing.runs.open()
        standing.assert_each_ran_once(client)
        assert "trying again" in standing.pool.log("first")


def _assert_no_secret(standing):
    secret = standing.cluster.url().partition("mqworker:")[2].partition("@")[0]
    for name in ("first", "second", "third"):
        assert secret not in standing.pool.log(name)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _get(port, page):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=30) as answer:
        return answer.read().decode()
