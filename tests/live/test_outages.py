"""What operators and full brokers do to a pool at work: alarms, deleted queues and exchanges, closed connections."""

import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import pytest

from mqworker.errors import ArtifactInvalid, Rejected, Unanswered
from mqworker.messages import Request
from mqworker.topology import Topology

pytestmark = pytest.mark.live


@contextmanager
def alarm(node, kind="memory"):
    """Have a node take nothing."""
    begin, end = {
        "memory": (("set_vm_memory_high_watermark", "0.00001"), ("set_vm_memory_high_watermark", "0.4")),
        "disk": (("set_disk_free_limit", "900000GB"), ("set_disk_free_limit", "50MB")),
    }[kind]
    node.ctl(*begin)
    try:
        yield
    finally:
        node.ctl(*end)


@pytest.fixture
def governed(as_own_user, prefix, make_pool):
    """A pool in a vhost of its own, whose user is called like it."""
    return make_pool(as_own_user(configure=".*", write=".*", read=".*"), prefix)


@pytest.fixture
def full(node_to_hurt, prefix, make_pool):
    """A node, and a pool in a vhost of its own there."""
    node_to_hurt.ctl("add_vhost", prefix)
    node_to_hurt.ctl("set_permissions", "-p", prefix, "mqworker", ".*", ".*", ".*")
    yield node_to_hurt, make_pool(node_to_hurt.url.replace("%2F", prefix), "mqworker")
    node_to_hurt.ctl("delete_vhost", prefix)


def metric(port, name):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def healthy(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as page:
            return page.read().decode(), True
    except urllib.error.HTTPError as error:
        return error.read().decode(), False


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_submitters_are_told_of_an_alarm_and_all_goes_on_when_it_ends(full, kind, runs, final, eventually):
    node, pool = full
    port = 20000 + node.pid % 20000
    with ExitStack() as stack:
        pool.scheduler(MQWORKER_SCHEDULER_METRICS_LISTEN=f"127.0.0.1:{port}")
        pool.worker("anna", MQWORKER_WORKER_METRICS_LISTEN=f"127.0.0.1:{port + 1}")
        client = stack.enter_context(pool.client())
        pool.await_workers(client, "anna")
        running = client.submit("journal", runs.data)
        runs.await_starts(1)
        told = Path(pool.directory / "told")
        with alarm(node, kind), told.open("wb") as errors:
            submitting = subprocess.Popen(
                [sys.executable, "-P", "-m", "mqworker", "submit", "noop"],
                env={**pool.environment, "MQWORKER_TIMEOUT": "120"},
                stdout=subprocess.PIPE,
                stderr=errors,
            )
            eventually(lambda: b"waits: the broker takes nothing" in told.read_bytes(), "the submitter is told")
            with pool.client(timeout=1.0) as hasty, pytest.raises(Unanswered, match="memory or disk alarm"):
                hasty.submit("noop")
            for at in (port, port + 1):
                eventually(lambda at=at: metric(at, "mqworker_broker_blocked") == 1, "the metrics say so")
                assert healthy(at) == (pytest.approx(healthy(at)[0]), False)
                assert "alarm" in healthy(at)[0]
            runs.open()  # what ends now has to wait with its outcome
            eventually(lambda: runs.count("end") == 1, "the run ends")
            assert submitting.poll() is None
        submitted = submitting.communicate(timeout=120)[0].decode().strip()
        assert submitting.returncode == 0
        views = final(client, running, submitted)
        assert [view.state for view in views] == ["success", "success"]
        assert [len(view.attempts) for view in views] == [1, 1]
        assert runs.count("start") == 1
        assert b"takes messages again" in told.read_bytes()
        for at in (port, port + 1):
            eventually(lambda at=at: healthy(at)[1] and not metric(at, "mqworker_broker_blocked"), "all is well again")


def test_a_run_whose_lease_ends_in_an_alarm_ends_with_it_and_runs_again_once(full, runs, final, eventually, alive):
    """P2 comes before the work: nobody can know whether who cannot be heard still holds it."""
    node, pool = full
    with ExitStack() as stack:
        client = pool.up(stack, "anna", "bert")
        short = client.submit("journal", runs.data, lease=6)
        runs.await_starts(1)
        long = client.submit("journal", runs.data, lease=100)
        runs.await_starts(2)
        pid = runs.lines()[0]["pid"]
        with alarm(node):
            eventually(lambda: not alive(pid), "the short lease ends")
        runs.await_starts(3)
        runs.open()
        first, second = final(client, short, long)
        assert (first.state, second.state) == ("success", "success")
        assert [attempt.result for attempt in first.attempts] == ["lost", "success"]
        assert "lease of 6 s" in first.attempts[0].reason.text
        assert len(second.attempts) == 1
        assert runs.count("start") == 3


# ---------------------------------------------------------------- what an operator deletes


def test_a_pool_survives_the_loss_of_each_of_its_queues_and_exchanges(governed, manage, runs, final):
    pool, prefix, names = governed, governed.prefix, Topology(governed.prefix)
    runs.open()
    with ExitStack() as stack:
        client = pool.up(stack, "anna", "bert")
        done = []

        def delete(kind, name):
            with suppress(urllib.error.HTTPError):  # a queue of a connection that has ended with another queue
                manage("DELETE", f"{kind}/{prefix}/{quote(name, safe='')}")
            done.append(client.submit("journal", runs.data))
            [view] = final(client, done[-1])
            assert view.state == "success", (kind, name)

        queues = [queue["name"] for queue in manage("GET", f"queues/{prefix}")]
        ours = [name for name in queues if name.startswith(names.prefix) and ".follow." not in name]
        assert len(ours) >= 8  # four lasting ones, the scheduler's, two workers' and a class's
        for name in ours:
            delete("queues", name)
        for exchange in names.exchanges():
            if exchange.name not in (names.report, names.verdict):
                delete("exchanges", exchange.name)
        for process in pool.processes.values():
            assert process.poll() is None
        assert runs.count("start") == len(done)


@pytest.mark.parametrize("which", ["submit", "outcome", "api"])
def test_a_queue_that_is_deleted_and_made_again_at_once_is_heard_again(which, governed, final):
    """RabbitMQ 3.10 tells the scheduler nothing, and drops the first messages that the new queue has for it."""
    pool, names = governed, Topology(governed.prefix)
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        final(client, *(client.submit("noop") for _ in range(3)))
        queue = getattr(names, f"{which}_queue")()
        with pool.channel() as channel:
            channel.queue_delete(queue.name)
            channel.queue_declare(queue.name, durable=True, arguments=dict(queue.arguments))
            for exchange, key in queue.bindings:
                channel.queue_bind(queue.name, exchange, key)
        [view] = final(client, client.submit("noop"))
        assert [attempt.result for attempt in view.attempts] == ["success"]
        assert client.count() == 4
        assert pool.log("scheduler").count("connection to the broker lost") == 1


@pytest.mark.parametrize("which", ["report", "verdict"])
def test_who_is_not_heard_any_more_since_an_exchange_was_deleted_binds_anew(which, governed, manage, final):
    pool, prefix = governed, governed.prefix
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        manage("DELETE", f"exchanges/{prefix}/{getattr(Topology(prefix), which)}")
        [view] = final(client, client.submit("noop"))
        assert view.state == "success"


def test_submissions_in_a_queue_that_is_deleted_are_sent_again_until_the_receipt(governed, manage, eventually, final):
    pool, prefix, queue = governed, governed.prefix, Topology(governed.prefix).submit_queue().name
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        pool.end("scheduler", 9)
        future = client._start(client._submit([Request(id="6d0d1c44-5f27-4f3c-9b43-2b9b1f9b8a11", task="noop")]))
        waiting = f"queues/{prefix}/{queue}"
        with pool.channel() as channel:
            eventually(lambda: channel.queue_declare(queue, passive=True).method.message_count, "it waits there")
        manage("DELETE", waiting)
        pool.scheduler()
        [receipt] = future.result(120)
        assert receipt.status == "accepted"
        [view] = final(client, receipt.id)
        assert view.state == "success"


def test_tickets_in_a_queue_that_is_deleted_are_offered_again(governed, manage, final, eventually):
    pool, prefix = governed, governed.prefix
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        final(client, client.submit("noop"))  # its slot is ready
        eventually(lambda: client.workers()[0].queue, "it consumes")
        queue = client.workers()[0].queue
        pool.processes["anna"].send_signal(19)  # it consumes, and takes nothing in
        ids = [client.submit("noop") for _ in range(3)]
        eventually(lambda: any(view.state == "offered" for view in client.list()), "one is offered")
        manage("DELETE", f"queues/{prefix}/{queue}")
        pool.processes["anna"].send_signal(18)
        assert {view.state for view in final(client, *ids)} == {"success"}


def test_connections_that_the_operator_closes_cost_no_run(governed, manage, runs, final):
    pool, prefix = governed, governed.prefix
    with ExitStack() as stack:
        client = pool.up(stack, "anna", "bert")
        ids = [client.submit("journal", runs.data) for _ in range(2)]
        runs.await_starts(2)
        for _ in range(3):
            manage("DELETE", f"connections/username/{prefix}")
            assert client.count() == 2  # all are back, or coming
        runs.open()
        assert [[attempt.result for attempt in view.attempts] for view in final(client, *ids)] == [["success"]] * 2
        assert runs.count("start") == 2


# ---------------------------------------------------------------- what is too large


def test_what_is_too_large_is_refused_before_it_goes_out(pool, final, tmp_path):
    large = "x" * (20 * 1024 * 1024)
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        with pytest.raises(Rejected, match="bytes"):
            client.submit("noop", {"label": large})
        file = tmp_path / "file"
        file.write_bytes(b"x")
        with pytest.raises(ArtifactInvalid, match="bytes"):
            client.import_artifact("mqworker:noop-output", "name", {"text": large}, {"file": file})
        [view] = final(client, client.submit("badly", {"how": "describe"}))
        assert view.state == "error"
        assert "bytes" in view.reason.text
        [view] = final(client, client.submit("noop"))
        assert view.state == "success"
        assert "lost" not in pool.log("anna")  # no connection was
        assert "lost" not in pool.log("scheduler")
