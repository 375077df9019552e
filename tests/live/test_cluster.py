"""A pool on a cluster of three nodes, of which one is killed, frozen, or parted from the others."""

import asyncio
import threading
import uuid
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager

import pytest

from mqworker import amqp
from mqworker.amqp import Link, Plan
from mqworker.errors import HostUnfit, MqworkerError, NotPublished, OutsideError
from mqworker.topology import Topology
from tests import roots
from tests.nodes import NAMES, Cluster

pytestmark = [pytest.mark.live, pytest.mark.cluster]

UNANSWERED = 20.0  # seconds after which a submission says how far it got
SOON = 60.0  # seconds


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, missing):
    try:
        one = Cluster(tmp_path_factory.mktemp("cluster"), roots.chosen())
    except HostUnfit as error:
        missing("rabbitmq-server", str(error))
    with one:
        yield one


@pytest.fixture
def whole(cluster, prefix, eventually):
    """The cluster, with a vhost of the test's own, and all of it up again afterwards."""
    cluster.ctl("add_vhost", prefix)
    cluster.ctl("set_permissions", "-p", prefix, "mqworker", ".*", ".*", ".*")
    eventually(lambda: all(prefix in node.ctl("list_vhosts") for node in cluster.nodes.values()), "all have the vhost")
    return cluster


class Flow:
    """Submit all the time, from a thread, and know what was receipted."""

    def __init__(self, client, data):
        self.client = client
        self.data = data
        self.receipted = []
        self.unanswered = 0
        self.trouble = "nothing went wrong"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._submit)

    def _submit(self):
        while not self._stop.wait(0.1):
            try:
                self.receipted.append(self.client.submit("journal", {**self.data, "label": uuid.uuid4().hex}))
            except MqworkerError as error:  # while a node comes and goes
                self.unanswered += 1
                self.trouble = str(error)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def goes_on(self, eventually, runs):
        """Wait until some more were receipted, and some more have run."""
        receipted, ended = len(self.receipted), runs.count("end")
        try:
            eventually(lambda: len(self.receipted) >= receipted + 5, "five more are receipted")
            eventually(lambda: runs.count("end") >= ended + 5, "five more have run")
        except AssertionError as error:
            error.add_note(f"receipts: {receipted}, then {len(self.receipted)}")
            error.add_note(f"runs that have ended: {ended}, then {runs.count('end')}")
            error.add_note(f"submissions without a receipt: {self.unanswered}; of the last: {self.trouble}")
            raise


@pytest.fixture
def at_work(whole, make_pool, prefix, runs, eventually):
    """Have a pool at work, and see in the end that nothing was lost and nothing ran twice at a time."""
    pool = make_pool(whole.url().replace("%2F", prefix), prefix)

    @contextmanager
    def at_work():
        try:
            yield from _at_work(pool, runs, eventually)
        except AssertionError as error:
            for what in ("list_queues", "list_consumers"):
                error.add_note(_told(whole, what, "-p", prefix, *COLUMNS[what]))
            for name in pool.processes:
                error.add_note(f"{name}: {pool.log(name)[-2000:]}")
            raise

    return at_work


COLUMNS = {
    "list_queues": ("name", "pid", "state", "messages_ready", "messages_unacknowledged", "consumers", "online"),
    "list_consumers": ("queue_name", "channel_pid", "active"),
}


def _told(cluster, *arguments):
    try:
        return cluster.ctl(*arguments)
    except OutsideError as error:  # what there is to tell of the failure is not to hide it
        return str(error)


def _at_work(pool, runs, eventually):
    runs.open()
    with ExitStack() as stack:
        client = pool.up(stack, "anna", "bert", slots=2)
        with Flow(stack.enter_context(pool.client(timeout=UNANSWERED)), runs.data) as flow:
            flow.goes_on(eventually, runs)
            yield client, flow
            flow.goes_on(eventually, runs)
        views = client.wait(flow.receipted, timeout=120)
        assert {view.state for view in views} == {"success"}
        assert client.count() >= len(flow.receipted)
        running = set()
        for line in runs.lines():  # a run is over at once, so each has come to its end
            assert (line["label"] in running) == (line["what"] == "end"), line
            running ^= {line["label"]}
        ended = {line["label"] for line in runs.lines()}
        assert ended >= {view.request.data["label"] for view in views}
        for name, process in pool.processes.items():
            assert process.poll() is None, name


def node_of(cluster, prefix, queue):
    """Return the name of the node that has a queue (of a quorum queue: its leader); None if nobody knows."""
    for line in cluster.ctl("list_queues", "-p", prefix, "name", "pid").splitlines():
        name, _, pid = line.partition("\t")
        if name == queue:
            return next((node for node in NAMES if f"{node}@" in pid), None)
    return None


@pytest.mark.parametrize("what", ["class", "submit"])
def test_a_node_that_is_killed_takes_nothing_along(what, whole, at_work, runs, eventually):
    with at_work() as (client, flow):
        before, prefix = client.workers()[0].queue, client._topology.prefix
        queue = before if what == "class" else Topology(prefix).submit_queue().name
        home = eventually(lambda: node_of(whole, prefix, queue), "the queue has a home")
        whole.nodes[home].kill()
        try:
            flow.goes_on(eventually, runs)
            if what == "class":
                assert {worker.queue for worker in client.workers()} != {before}
        finally:
            whole.nodes[home].start()


def test_who_publishes_first_while_a_queue_has_no_leader_gets_in_when_it_has_one(whole, prefix):
    async def scenario():
        await amqp.declare(whole.url().replace("%2F", prefix), topology)
        home = await asyncio.to_thread(node_of, whole, prefix, topology.submit_queue().name)
        others = whole.url(*(name for name in NAMES if name != home)).replace("%2F", prefix)
        async with AsyncExitStack() as stack:
            links = [await stack.enter_async_context(up(others)) for _ in range(8)]
            whole.nodes[home].kill()
            try:
                async with asyncio.timeout(SOON):
                    await asyncio.gather(*(gets_in(link) for link in links))
            finally:
                whole.nodes[home].start()  # not in another thread: the node would end with that

    @asynccontextmanager
    async def up(url):
        link = Link(url, name="test", plan=lambda _: Plan())
        running = asyncio.create_task(link.run())
        try:
            await link.wait_up(SOON)
            yield link
        finally:
            await link.close()
            await running

    async def gets_in(link):
        while True:
            await link.wait_up(SOON)
            try:
                await link.publish(exchange=topology.submit, key=topology.submit, body=b"{}", kind="test")
            except NotPublished:
                await asyncio.sleep(0.05)  # between two tries of what has no event
            else:
                return

    topology = Topology(prefix)
    asyncio.run(scenario())


def test_a_leader_that_is_frozen_stops_work_for_a_while_only(whole, at_work, prefix, runs, eventually):
    with at_work() as (_, flow):
        home = eventually(
            lambda: node_of(whole, prefix, Topology(prefix).outcome_queue().name), "the queue has a leader"
        )
        whole.freeze(home)
        try:
            flow.goes_on(eventually, runs)
        finally:
            whole.thaw(home)
        whole.mend(home)


def test_work_goes_on_in_the_majority_when_a_node_is_parted_from_it(whole, at_work, prefix, runs, eventually):
    with at_work() as (client, flow):
        home = eventually(lambda: node_of(whole, prefix, client.workers()[0].queue), "the queue has a home")
        whole.part(home)
        try:
            flow.goes_on(eventually, runs)
        finally:
            whole.join(home)
        whole.mend(home)
