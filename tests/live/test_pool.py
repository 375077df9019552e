"""The promises, on real processes and a real broker."""

import json
import os
import signal
import socket
import sqlite3
import threading
import time
import urllib.error
import urllib.request
import uuid
from contextlib import ExitStack, closing, nullcontext, suppress
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest

from mqworker.errors import Unanswered
from mqworker.messages import Request, Ticket, Tickets, encode
from mqworker.store import Store

pytestmark = pytest.mark.live


def _consumers(pool, queue: str) -> int:
    with pool.channel() as channel:
        return channel.queue_declare(queue, passive=True).method.consumer_count


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_noops_of_many_shapes_reach_their_outcomes_and_artifacts(pool, final, tmp_path):
    with ExitStack() as stack:
        client = pool.up(stack, "anna", "bert", slots=2)
        shapes = [
            ({"artifacts": [0, 1, 100_000], "log_lines": 3}, "success"),
            ({"result": "failure", "log_lines": 1}, "failure"),
            ({"result": "error"}, "error"),
            ({"progress": 5, "duration": 0.3}, "success"),
            ({"memory": 300_000_000}, "success"),
            ({}, "success"),
        ]
        ids = [client.submit("noop", data) for data, _ in shapes]
        views = final(client, *ids)

        assert [expected for _, expected in shapes] == [view.state for view in views]
        outputs = [artifact for artifact in views[0].artifacts if artifact.category == "mqworker:noop-output"]
        assert [artifact.files[0].size for artifact in outputs] == [0, 1, 100_000]
        for artifact in outputs:
            [path] = client.fetch_artifact(artifact.id, tmp_path / str(artifact.id))
            assert artifact.files[0].size == path.stat().st_size
        assert "asked for a failure" in views[1].reason.text
        assert views[1].artifacts[0].category == "mqworker:debug-logs"
        assert "RuntimeError" in views[2].reason.text
        assert all(len(view.attempts) == 1 for view in views)


def test_the_same_id_is_one_request_and_other_content_is_a_conflict(pool, final):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        request = Request(id=str(uuid.uuid4()), task="noop", data={"duration": 0.1})
        statuses = [client.submit_many([request])[0].status for _ in range(2)]
        final(client, request.id)
        statuses.append(client.submit_many([request])[0].status)
        other = Request(id=request.id, task="noop", data={"duration": 0.2})
        statuses.append(client.submit_many([other])[0].status)

        assert statuses == ["accepted", "known", "known", "conflict"]
        assert len(client.list()) == 1


def test_a_worker_with_full_slots_attracts_no_ticket_while_another_is_idle(pool, runs, final, eventually):
    """P5: the second request starts on the idle worker while the first one blocks the other."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna", "bert")
        queue = client.workers()[0].queue
        ids = []
        for number in (1, 2):
            ids.append(client.submit("journal", runs.data))
            runs.await_starts(number)
            eventually(lambda idle=2 - number: _consumers(pool, queue) == idle, "only idle workers consume")
        views = [client.status(one) for one in ids]

        assert {"anna", "bert"} == {view.worker for view in views}
        third = client.submit("journal", runs.data)
        pool.worker("carl")  # an idle one that comes later gets what waits
        runs.await_starts(3)
        assert client.status(third).worker == "carl"
        runs.open()
        assert {"success"} == {view.state for view in final(client, *ids, third)}


def test_a_worker_gets_only_what_it_can_run(pool, runs, final):
    """P6, and nothing else waits meanwhile."""
    with ExitStack() as stack:
        pool.scheduler()
        pool.worker("anna", MQWORKER_WORKER_TAGS="blue")
        pool.worker("bert", MQWORKER_WORKER_TAGS="red,green")
        client = stack.enter_context(pool.client())
        pool.await_workers(client, "anna", "bert")
        runs.open()
        red = [client.submit("journal", {**runs.data, "tag": "red"}) for _ in range(5)]
        blue = [client.submit("journal", {**runs.data, "tag": "blue"}) for _ in range(5)]
        nobody = client.submit("journal", {**runs.data, "tag": "violet"})

        assert {"bert"} == {view.worker for view in final(client, *red)}
        assert {"anna"} == {view.worker for view in final(client, *blue)}
        waiting = client.status(nobody)
        assert waiting.state == "pending"
        assert waiting.waits == "no worker can run it"
        pool.worker("carl", MQWORKER_WORKER_TAGS="violet")
        assert final(client, nobody)[0].worker == "carl"


def test_a_worker_that_must_not_run_it_by_its_own_view_refuses_and_another_gets_it(pool, runs, final, eventually):
    """P6: scheduler and worker disagree, and the worker's word counts."""
    with ExitStack() as stack:
        pool.scheduler()
        pool.worker("anna", JOURNAL_SHY="1")
        client = stack.enter_context(pool.client())
        pool.await_workers(client, "anna")
        runs.open()
        one = client.submit("journal", runs.data)
        eventually(lambda: client.status(one).waits == "every worker that could run it has declined it", "its word")
        assert runs.count("start") == 0
        pool.worker("bert")
        [view] = final(client, one)

        assert [attempt.worker for attempt in view.attempts] == ["bert"]


def test_the_request_of_a_killed_worker_runs_again_elsewhere_once(pool, runs, final, eventually, alive):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("journal", runs.data, lease=5)
        runs.await_starts(1)
        pool.worker("bert")
        pool.await_workers(client, "bert")
        pool.end("anna", signal.SIGKILL)
        first = runs.lines()[0]["pid"]
        eventually(lambda: not alive(first), "the run ends with its agent")
        runs.await_starts(2)
        runs.open()
        [view] = final(client, one)

        assert view.state == "success"
        assert [(a.worker, a.result) for a in view.attempts] == [("anna", "lost"), ("bert", "success")]
        assert [runs.count("start"), runs.count("end")] == [2, 1]
        runs.assert_no_overlap()


def test_a_restarted_worker_gives_up_its_predecessors_run_at_once(pool, runs, final):
    """Its lease of an hour is not waited for, and a slot that did not notice the end of its agent is ended."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("journal", runs.data, lease=3600)
        runs.await_starts(1)
        os.kill(runs.lines()[0]["pid"], signal.SIGSTOP)
        pool.end("anna", signal.SIGKILL)
        pool.worker("anna")
        runs.await_starts(2)
        runs.open()
        [view] = final(client, one)

        assert [attempt.result for attempt in view.attempts] == ["lost", "success"]
        runs.assert_no_overlap()


def test_a_frozen_worker_ends_its_run_at_its_lease_by_its_own_clock(pool, runs, final, eventually, alive):
    """P2: the agent is stopped, but the slot holds the deadline too."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("journal", runs.data, lease=5)
        runs.await_starts(1)
        pool.processes["anna"].send_signal(signal.SIGSTOP)
        pool.worker("bert")
        first = runs.lines()[0]["pid"]
        eventually(lambda: not alive(first), "the slot ends at its deadline")
        runs.await_starts(2)
        runs.open()
        pool.processes["anna"].send_signal(signal.SIGCONT)
        [view] = final(client, one)

        assert [(a.worker, a.result) for a in view.attempts] == [("anna", "lost"), ("bert", "success")]
        runs.assert_no_overlap()


def test_an_agent_ends_a_frozen_slot_at_its_lease(pool, runs, final, eventually, alive):
    """P2: the slot is stopped and holds no deadline, and no scheduler renews the lease: the agent holds it too."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("journal", runs.data, lease=5)
        runs.await_starts(1)
        pool.end("scheduler", signal.SIGKILL)
        first = runs.lines()[0]["pid"]
        os.kill(first, signal.SIGSTOP)
        eventually(lambda: not alive(first), "the agent ends its slot")
        pool.scheduler()
        runs.await_starts(2)
        runs.open()
        [view] = final(client, one)

        assert [attempt.result for attempt in view.attempts] == ["lost", "success"]
        runs.assert_no_overlap()


def test_a_run_may_be_longer_than_its_lease(pool, runs, final):
    """P2: heartbeats renew it, also the shortest that there is."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("journal", runs.data, lease=5)
        runs.await_starts(1)
        time.sleep(8)  # beyond its first term, and what one answer more would add
        runs.open()
        [view] = final(client, one)

        assert view.state == "success"
        assert len(view.attempts) == 1


def test_nothing_is_lost_when_the_scheduler_is_killed(pool, runs, final, eventually):
    """P1 and P3: a run goes on, what waits is done afterwards, and each is done once."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        running = client.submit("journal", runs.data)
        runs.await_starts(1)
        waiting = [str(uuid.uuid4()) for _ in range(20)]
        client.submit_many([Request(id=one, task="noop") for one in waiting])
        pool.end("scheduler", signal.SIGKILL)
        pool.scheduler()
        eventually(
            lambda: [one for one in client.workers() if one.state == "online" and one.running],
            "worker and scheduler know the run again",
        )
        runs.open()
        views = final(client, running, *waiting)

        assert {"success"} == {view.state for view in views}
        assert {1} == {len(view.attempts) for view in views}
        assert [runs.count("start"), runs.count("end")] == [1, 1]


def test_what_was_on_offer_when_the_scheduler_was_killed_is_offered_again(pool, final, eventually):
    """P1: the old ticket is still under way when a new scheduler comes, and counts for nothing."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        final(client, client.submit("noop", {}))  # its slot is ready
        pool.processes["anna"].send_signal(signal.SIGSTOP)
        one = client.submit("noop", {})
        eventually(lambda: client.status(one).state == "offered", "the ticket is out")
        pool.end("scheduler", signal.SIGKILL)
        pool.scheduler()
        pool.processes["anna"].send_signal(signal.SIGCONT)
        [view] = final(client, one)

        assert view.state == "success"
        assert len(view.attempts) == 1


def test_what_the_ledger_does_not_have_has_no_receipt_and_is_still_in_the_broker(pool, final, eventually):
    """P1: the scheduler is killed in the middle of a commit."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        request = Request(id=str(uuid.uuid4()), task="noop")
        ledger = stack.enter_context(closing(sqlite3.connect(pool.directory / "ledger.db", isolation_level=None)))
        ledger.execute("BEGIN IMMEDIATE")
        with pool.client(timeout=1.5) as hurried, pytest.raises(Unanswered, match="broker has"):
            hurried.submit_many([request])
        pool.end("scheduler", signal.SIGKILL)
        ledger.execute("ROLLBACK")
        pool.scheduler()
        eventually(client.list, "the scheduler has read what the broker held")

        assert final(client, request.id)[0].state == "success"


def test_a_ticket_that_is_lost_is_issued_again_and_counts_for_nothing(pool, final, eventually):
    """A stranger takes it out of the queue."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        stolen: list[bytes] = []
        with pool.channel() as channel:
            channel.basic_consume(
                client.workers()[0].queue,
                lambda *got: stolen.append(got[3]),
                auto_ack=True,
                arguments={"x-priority": 10},
            )
            one = client.submit("noop", {}, max_attempts=1)
            eventually(lambda: channel.connection.process_data_events(time_limit=0.1) or stolen, "the ticket is stolen")
        [view] = final(client, one)

        assert view.state == "success"
        assert len(view.attempts) == 1


def test_of_two_tickets_for_one_attempt_one_is_granted(pool, runs, final):
    """P2: a worker that is idle is offered what another runs."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna", "bert")
        one = client.submit("journal", runs.data)
        runs.await_starts(1)
        view = client.status(one)
        queue = client.workers()[0].queue
        with pool.channel() as channel:
            body = encode(Tickets(term=1, tickets=[Ticket(attempt=view.attempt, request=view.request)]))
            channel.basic_publish(f"{pool.prefix}.work", queue, body, mandatory=True)
        behind = client.submit("noop", {})

        assert final(client, behind)[0].state == "success"
        assert runs.count("start") == 1
        runs.open()
        assert [attempt.worker for attempt in final(client, one)[0].attempts] == [view.worker]


class _Relay:
    """Stand between a worker and its broker: see what it says, and cut the line."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._broker = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = urlunsplit(parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{port}"))
        self.said = bytearray()
        self._whole = threading.Event()
        self._whole.set()
        self._ends: list[tuple[socket.socket, socket.socket]] = []
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                worker, _ = self._listener.accept()
                self._whole.wait()
                broker = socket.create_connection(self._broker)
                self._ends.append((worker, broker))
                for way in ((worker, broker, self.said), (broker, worker, bytearray())):
                    self._threads.append(threading.Thread(target=self._pass, args=way))
                    self._threads[-1].start()

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, heard: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                heard += data
                with suppress(OSError):  # what is for the worker after the cut
                    target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)  # all that was said before reaches the broker

    def cut(self) -> None:
        self._whole.clear()
        for worker, _ in self._ends:
            with suppress(OSError):
                worker.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._whole.set()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.mend()
        self._threads[0].join()
        self.cut()
        for thread in self._threads:
            thread.join()
        for one in (self._listener, *(end for pair in self._ends for end in pair)):
            one.close()


def test_a_claim_whose_answer_is_lost_gets_the_same_answer_again(pool, runs, final, eventually):
    """P2: it is granted while the worker's line is cut, and no attempt is lost by that."""
    with ExitStack() as stack:
        relay = stack.enter_context(closing(_Relay(pool.amqp_url)))
        stack.callback(pool.close)
        pool.scheduler()
        pool.worker("anna", MQWORKER_AMQP_URL=relay.url)
        client = stack.enter_context(pool.client())
        final(client, client.submit("noop", {}))  # its slot is ready
        pool.processes["anna"].send_signal(signal.SIGSTOP)
        one = client.submit("journal", runs.data, max_attempts=1)
        eventually(lambda: client.status(one).state == "offered", "the ticket is out")
        pool.processes["scheduler"].send_signal(signal.SIGSTOP)
        claims = relay.said.count(b'"type":"claim"')
        pool.processes["anna"].send_signal(signal.SIGCONT)
        eventually(lambda: relay.said.count(b'"type":"claim"') > claims, "the worker claims")
        relay.cut()
        pool.processes["scheduler"].send_signal(signal.SIGCONT)
        eventually(lambda: client.status(one).state == "running", "the claim is granted")
        relay.mend()
        runs.await_starts(1)
        runs.open()
        [view] = final(client, one)

        assert view.state == "success"
        assert runs.count("start") == 1


def test_a_submission_without_a_scheduler_is_done_when_one_comes(pool, final, eventually):
    """P1: the broker holds it meanwhile."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        pool.end("scheduler")
        request = Request(id=str(uuid.uuid4()), task="noop")
        with ExitStack() as other:
            hurried = other.enter_context(pool.client(timeout=1.5))
            with pytest.raises(Unanswered, match="broker has"):
                hurried.submit_many([request])
        pool.scheduler()
        eventually(client.list, "the scheduler has read what the broker held")

        assert final(client, request.id)[0].state == "success"


def test_a_run_goes_on_while_the_broker_restarts_and_its_outcome_arrives(
    private_node, make_pool, runs, final, eventually
):
    """P4 and P7."""
    node = private_node()
    pool = make_pool(node.url)
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("journal", runs.data)
        runs.await_starts(1)
        time.sleep(2)  # a quorum queue younger than that does not survive a kill: the broker's own limit
        node.kill()
        runs.open()
        eventually(lambda: runs.count("end"), "the run ends while there is no broker")
        node.start()
        [view] = final(client, one)

        assert view.state == "success"
        assert len(view.attempts) == 1
        assert [runs.count("start"), runs.count("end")] == [1, 1]
        assert final(client, client.submit("noop", {}))[0].state == "success"


def test_a_task_may_take_much_longer_than_the_brokers_consumer_timeout(private_node, make_pool, final):
    """P7: the ticket is acknowledged at the claim, so that no timeout of the broker can end a run."""
    node = private_node(settings={"consumer_timeout": "2000"}, advanced="[{rabbit,[{channel_tick_interval,500}]}].\n")
    pool = make_pool(node.url)
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("noop", {"duration": 8})
        [view] = final(client, one)

        assert view.state == "success"
        assert len(view.attempts) == 1
        assert "connection to the broker lost" not in pool.log("anna")


def test_an_orderly_stop_hands_a_run_back_without_counting_it(pool, runs, final):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("journal", runs.data, max_attempts=1)
        runs.await_starts(1)
        assert pool.end("anna") == 0
        pool.worker("bert")
        runs.await_starts(2)
        runs.open()
        [view] = final(client, one)

        assert view.state == "success"
        assert [(a.result, a.counted) for a in view.attempts] == [("handed_back", False), ("success", True)]
        runs.assert_no_overlap()


def test_a_draining_worker_ends_its_run_and_takes_no_other(pool, runs, final, eventually):
    with ExitStack() as stack:
        pool.environment["MQWORKER_WORKER_DRAIN_GRACE"] = "60"
        client = pool.up(stack, "anna")
        first = client.submit("journal", runs.data)
        runs.await_starts(1)
        pool.processes["anna"].terminate()
        eventually(lambda: "drains" in pool.log("anna"), "the worker drains")
        second = client.submit("noop", {})
        runs.open()

        assert final(client, first)[0].state == "success"
        assert pool.processes.pop("anna").wait(30) == 0
        assert client.status(second).state == "pending"
        pool.worker("bert")
        assert final(client, second)[0].worker == "bert"


def test_a_second_signal_stops_a_worker_now(pool, runs, eventually):
    with ExitStack() as stack:
        pool.environment["MQWORKER_WORKER_DRAIN_GRACE"] = "600"
        client = pool.up(stack, "anna")
        one = client.submit("journal", runs.data)
        runs.await_starts(1)
        process = pool.processes.pop("anna")
        process.terminate()
        eventually(lambda: "drains" in pool.log("anna"), "the worker drains")
        process.terminate()

        assert process.wait(30) == 0
        assert [attempt.result for attempt in client.status(one).attempts] == ["handed_back"]


def test_an_outcome_survives_the_death_of_its_agent(pool, runs, final, eventually):
    """P4: it was spooled while no scheduler answered; the successor delivers it."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("journal", runs.data)
        runs.await_starts(1)
        pool.end("scheduler", signal.SIGKILL)
        runs.open()
        spool = pool.directory / "state" / "anna" / "spool"
        eventually(lambda: list(spool.glob("*.json")), "the outcome is on disk")
        pool.end("anna", signal.SIGKILL)
        client.close()
        # What the dead agent had sent already must not be what answers.
        pool.worker("anna")
        pool.scheduler()
        again = stack.enter_context(pool.client())
        [view] = final(again, one)

        assert view.state == "success"
        assert [runs.count("start"), runs.count("end")] == [1, 1]
        eventually(lambda: not list(spool.glob("*.json")), "the spool is empty once the ledger has answered")


def test_an_outcome_is_sent_only_once_it_is_on_disk(pool, runs, final, eventually):
    """P4: as long as the disk does not take it, nobody is told."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("journal", runs.data)
        runs.await_starts(1)
        spool = pool.directory / "state" / "anna" / "spool"
        aside = spool.rename(spool.with_name("aside"))
        runs.open()
        eventually(lambda: "cannot be spooled" in pool.log("anna"), "it was tried")

        assert client.status(one).state == "running"
        aside.rename(spool)
        assert final(client, one)[0].state == "success"
        eventually(lambda: not list(spool.iterdir()), "the spool is empty once the ledger has answered")


def test_a_second_scheduler_on_the_same_ledger_refuses_to_start(pool):
    with ExitStack() as stack:
        pool.up(stack)
        second = pool.start("second", "scheduler")

        assert second.wait(30) == 3
        assert str(pool.processes["scheduler"].pid) in pool.log("second")
        assert "Traceback" not in pool.log("second")


def test_a_second_worker_in_the_same_state_directory_refuses_to_start(pool):
    with ExitStack() as stack:
        pool.up(stack, "anna")
        state = str(pool.directory / "state" / "anna")
        second = pool.start("second", "worker", "--name", "other", "--state-dir", state)

        assert second.wait(30) == 3
        assert "Traceback" not in pool.log("second")


def test_a_second_worker_of_the_same_name_refuses_to_start_beside_the_first_ones_runs(pool, runs, final):
    """Its state directory is its own, its work directory is not."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("journal", runs.data)
        runs.await_starts(1)
        second = pool.start(
            "second", "worker", "--name", "anna", "--state-dir", str(pool.directory / "state" / "other")
        )

        assert second.wait(30) == 3
        assert "Traceback" not in pool.log("second")
        runs.open()
        assert len(final(client, one)[0].attempts) == 1


def test_a_worker_with_another_store_is_refused_with_a_clear_word(pool, eventually):
    with ExitStack() as stack:
        client = pool.up(stack)
        other = pool.directory / "other"
        Store.open(f"file://{other}", create=True)
        pool.worker("anna", MQWORKER_STORE=f"file://{other}")
        [worker] = eventually(
            lambda: [worker for worker in client.workers() if worker.state == "refused"], "the worker is refused"
        )
        one = client.submit("noop", {})

        assert "store" in worker.reason
        assert client.status(one).state == "pending"
        assert "store" in pool.log("anna")


def test_fresh_metadata_reaches_the_scheduler_on_request_and_on_a_signal(pool, eventually):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")

        def free() -> int:
            return client.workers()[0].metadata["system:free_disk"]

        before = free()
        filler = pool.directory / "filler"
        filler.write_bytes(os.urandom(30_000_000))
        client.refresh_workers(["anna"])
        after = eventually(lambda: free() != before and free(), "the refreshed figure")
        filler.unlink()
        pool.processes["anna"].send_signal(signal.SIGHUP)

        assert after < before
        eventually(lambda: free() > after, "the figure after SIGHUP")


def test_metrics_and_health_are_served_by_scheduler_and_worker(pool, eventually):
    def get(port: int, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.read().decode()

    def unwell(port: int) -> bool:
        with suppress(urllib.error.URLError) if not _listens(port) else nullcontext():
            return bool(get(port, "/healthz"))
        return False

    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    with ExitStack() as stack:
        pool.environment["MQWORKER_SCHEDULER_METRICS_LISTEN"] = f"127.0.0.1:{ports[0]}"
        pool.environment["MQWORKER_WORKER_METRICS_LISTEN"] = f"127.0.0.1:{ports[1]}"
        client = pool.up(stack, "anna")
        client.wait([client.submit("noop", {})], timeout=30)

        assert "scheduler of term 1" in get(ports[0], "/healthz")
        assert 'mqworker_requests_received_total{status="accepted"} 1.0' in get(ports[0], "/metrics")
        assert "worker anna" in get(ports[1], "/healthz")
        assert 'mqworker_worker_runs_total{result="success",task="noop"} 1.0' in get(ports[1], "/metrics")
        pool.end("scheduler")
        pool.environment["MQWORKER_AMQP_URL"] = "amqp://127.0.0.1:1/"
        pool.scheduler()
        with pytest.raises(urllib.error.HTTPError, match="503"):
            eventually(lambda: unwell(ports[0]), "an unwell scheduler says so")


def test_secrets_do_not_reach_a_tasks_environment(pool, final, tmp_path):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        note = tmp_path / "environment"
        [view] = final(client, client.submit("badly", {"how": "environment", "note": str(note)}))

        assert view.state == "success"
        names = json.loads(note.read_text())
        assert "MQWORKER_TASK_MODULES" in names
        assert not [name for name, value in names.items() if "amqp://" in value or name == "MQWORKER_AMQP_URL"]
        assert Path("/proc/self").exists()
