"""The client against a real broker and a small scheduler of our own that answers, or does not."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self

import msgspec
import pytest

from mqworker.amqp import Consumer, Delivery, Link, Plan
from mqworker.client import BATCH_BYTES, Client
from mqworker.errors import (
    ArtifactInvalid,
    BrokerRefused,
    BrokerUnavailable,
    Conflict,
    Corrupt,
    NotFound,
    Rejected,
    SettingsError,
    StoreMismatch,
    Unanswered,
    Unreadable,
)
from mqworker.messages import (
    AbortRequests,
    After,
    ArtifactList,
    FileEntry,
    GetPool,
    GetRequests,
    ImportArtifact,
    ListArtifacts,
    ListRequests,
    ListWorkers,
    LogProgress,
    LogText,
    Pool,
    Problem,
    Query,
    Receipt,
    Receipted,
    RecordedArtifact,
    RefreshWorkers,
    Request,
    RequestEvent,
    RequestList,
    RequestView,
    RetryRequest,
    Submit,
    Take,
    WorkerList,
    WorkerView,
    decode,
    encode,
)
from mqworker.store import Store
from mqworker.topology import Topology

pytestmark = pytest.mark.live

DEADLINE = 30.0


def until(condition) -> None:
    """Wait for something that tells no event."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)


class FakeScheduler:
    """Answer like a scheduler, from memory; `deaf` drops what comes, `mute_receipts` so many receipts."""

    def __init__(self, url: str, prefix: str) -> None:
        self.url, self.topology = url, Topology(prefix)
        self.views: dict[str, RequestView] = {}
        self.artifacts: list[RecordedArtifact] = []
        self.submits: list[Submit] = []
        self.queries: list[Query] = []
        self.deaf = False
        self.mute_receipts = 0
        self.quiet_events = False
        self.store_id = "none"

    def __enter__(self) -> Self:
        ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._live(ready)))
        self.thread.start()
        assert ready.wait(DEADLINE)
        return self

    def __exit__(self, *_) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()

    async def _live(self, ready: threading.Event) -> None:
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        self.link = Link(self.url, name="fake scheduler", plan=self._plan)
        running = asyncio.create_task(self.link.run())
        await self.link.wait_up(DEADLINE)
        ready.set()
        await self.stop.wait()
        await self.link.close()
        await running

    def _plan(self, _epoch: str) -> Plan:
        consumers = (
            Consumer(queue=self.topology.submit, on_delivery=self._on_submit),
            Consumer(queue=self.topology.api, on_delivery=self._on_query),
        )
        return Plan(exchanges=self.topology.exchanges(), queues=self.topology.queues(), consumers=consumers)

    def _on_submit(self, delivery: Delivery) -> None:
        self.link.ack(delivery)
        if self.deaf:
            return
        submit = decode(delivery.body, Submit)
        self.submits.append(submit)
        results = [self._accept(request) for request in submit.requests]
        if self.mute_receipts:
            self.mute_receipts -= 1
            return
        self._reply(delivery, Receipt(term=1, results=results[::-1]))

    def _accept(self, request: Request) -> Receipted:
        if request.task == "nope":
            return Receipted(id=request.id, status="rejected", reason="'nope' is not a registered task_name")
        if request.id in self.views:
            same = self.views[request.id].request == request
            return Receipted(id=request.id, status="known" if same else "conflict")
        self.views[request.id] = RequestView(
            seq=len(self.views) + 1, request=request, state="pending", attempt=0, submitted=1.0
        )
        return Receipted(id=request.id, status="accepted")

    def _on_query(self, delivery: Delivery) -> None:
        self.link.ack(delivery)
        if self.deaf:
            return
        query = decode(delivery.body, Query)
        self.queries.append(query)
        self._reply(delivery, self._answer(query))

    def _answer(self, query: Query):
        match query:
            case GetRequests(ids=ids) | AbortRequests(ids=ids):
                found = [v for i, v in self.views.items() if any(i.startswith(asked) for asked in ids)]
                missing = [asked for asked in ids if not any(i.startswith(asked) for i in self.views)]
                return RequestList(requests=found, missing=missing)
            case ListRequests(states=states, limit=limit):
                views = [v for v in self.views.values() if not states or v.state in states]
                return RequestList(requests=views[::-1][:limit])
            case RetryRequest(id=old, new_id=new):
                if self.views[old].state == "pending":
                    return Problem(kind="rejected", text=f"request {old} is pending: it has not ended")
                self._accept(msgspec.structs.replace(self.views[old].request, id=new))
                return RequestList(requests=[self.views[new]])
            case ListWorkers() | RefreshWorkers():
                return WorkerList(workers=[WorkerView(name="w1", host="h", state="online", slots=2)])
            case ListArtifacts(ids=ids):
                found = [a for a in self.artifacts if not ids or a.id in ids]
                return ArtifactList(artifacts=found, missing=[i for i in ids if i not in {a.id for a in found}])
            case ImportArtifact(artifact=artifact):
                if artifact.category == "debian:nope":
                    return Problem(kind="artifact_invalid", text="no such category")
                return ArtifactList(artifacts=[self.add_artifact(artifact.category, artifact.name, artifact.files)])
            case GetPool():
                return Pool(term=1, version="0", store=self.store_id, requests={}, workers=1, classes=1)

    def _reply(self, delivery: Delivery, message) -> None:
        self.link.publish(
            exchange="",
            key=delivery.reply_to,
            body=encode(message),
            kind="",
            correlation_id=delivery.correlation_id,
            mandatory=False,
            persistent=False,
        )

    def add_artifact(self, category: str, name: str, files: list[FileEntry]) -> RecordedArtifact:
        self.artifacts.append(
            RecordedArtifact(id=len(self.artifacts) + 1, category=category, name=name, files=list(files))
        )
        return self.artifacts[-1]

    def tell(self, exchange: str, key: str, message) -> None:
        def publish() -> None:
            self.link.publish(exchange=exchange, key=key, body=encode(message), kind="", mandatory=False)

        self.loop.call_soon_threadsafe(publish)

    def move(self, request: str, state: str) -> None:
        view = self.views[request] = msgspec.structs.replace(self.views[request], state=state, attempt=1)
        event = RequestEvent(
            term=1, time=2.0, request=request, task=view.request.task, state=state, event="succeed", attempt=1
        )
        if not self.quiet_events:
            self.tell(self.topology.events, f"request.{view.request.task}.{state}", event)

    def log(self, request: str, text: str, seq: int = 1) -> None:
        message = LogText(request=request, attempt=1, worker="w1", time=2.0, seq=seq, text=text)
        self.tell(self.topology.logs, request, message)


@pytest.fixture
def scheduler(amqp_url, prefix) -> Iterator[FakeScheduler]:
    with FakeScheduler(amqp_url, prefix) as fake:
        yield fake


@pytest.fixture
def client(scheduler) -> Iterator[Client]:
    with Client(scheduler.url, prefix=scheduler.topology.prefix, timeout=DEADLINE) as client:
        yield client


@contextmanager
def in_thread(work) -> Iterator[list]:
    """Run something beside the test; the list holds its result at the end, or its error is raised."""
    results: list = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  # raised in the test's own thread below
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield results
    finally:
        thread.join(DEADLINE)
    assert not thread.is_alive()
    for error in errors:
        raise error


# ---------------------------------------------------------------- submitting


def test_a_submitted_request_has_its_receipt(client, scheduler):
    request = client.submit("noop", {"duration": 2}, priority=5, max_attempts=1, lease=30)

    assert scheduler.views[request].request == Request(
        id=request, task="noop", data={"duration": 2}, priority=5, max_attempts=1, lease=30
    )


def test_a_request_says_whose_it_is_what_it_needs_and_what_it_comes_after(client, scheduler):
    first, second = client.submit("noop"), client.submit("noop")
    schema = {"required": ["system:cpu_count"]}

    request = client.submit(
        "noop",
        group="night",
        concurrency_key="mirror",
        requires=schema,
        after=[first, second[:8], After(request=second[:8], need="end")],
        take=[Take(into="/input/id", request=first[:8], category="debian:upload")],
    )

    assert scheduler.views[request].request == Request(
        id=request,
        task="noop",
        group="night",
        concurrency_key="mirror",
        requires=schema,
        after=[After(request=first), After(request=second), After(request=second, need="end")],
        take=[Take(into="/input/id", request=first, category="debian:upload")],
    )
    with pytest.raises(NotFound, match="nobody"):
        client.submit("noop", after=["nobody"])


def test_submitting_the_same_again_is_the_same_request_and_other_content_is_a_conflict(client, scheduler):
    request = client.submit("noop", {"duration": 2})

    assert client.submit("noop", {"duration": 2}, id=request) == request
    with pytest.raises(Conflict, match=request):
        client.submit("noop", {"duration": 3}, id=request)
    assert len(scheduler.views) == 1


def test_a_rejected_request_is_an_error_with_the_schedulers_reason(client):
    with pytest.raises(Rejected, match="'nope' is not a registered task_name"):
        client.submit("nope")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"priority": 5000}, "<= 1000"),
        ({"id": "5"}, r"\$\.id"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"data": {"x": object()}}, "object"),
        ({"group": "my group"}, r"\$\.group"),
        ({"concurrency_key": ""}, r"\$\.concurrency_key"),
        ({"requires": {"require": ["x"]}}, "`requires`: .* did you mean 'required'"),
        ({"requires": {"$ref": "http://x/y"}}, "nothing is fetched"),
        ({"take": [Take(into="x", request=str(uuid.uuid4()), category="a:b")]}, r"\$\.take\[0\]\.into"),
        ({"data": {"x": "a" * 5_000_000}}, "import large data as an artifact"),
    ],
)
def test_a_request_that_cannot_be_is_refused_before_it_is_sent(client, scheduler, arguments, said):
    with pytest.raises(Rejected, match=said):
        client.submit("noop", **arguments)
    assert scheduler.submits == []


def test_many_requests_travel_in_few_messages_and_come_back_in_order(client, scheduler):
    requests = [Request(id=str(uuid.uuid4()), task="noop" if n % 7 else "nope") for n in range(2500)]

    receipts = client.submit_many(iter(requests))

    assert [receipted.id for receipted in receipts] == [request.id for request in requests]
    assert [r.status for r in receipts] == ["accepted" if n % 7 else "rejected" for n in range(2500)]
    assert [len(submit.requests) for submit in scheduler.submits] == [1000, 1000, 500]


def test_large_requests_travel_in_small_messages(client, scheduler):
    requests = [Request(id=str(uuid.uuid4()), task="noop", data={"x": "a" * 400_000}) for _ in range(6)]

    assert {receipted.status for receipted in client.submit_many(requests)} == {"accepted"}
    assert len(scheduler.submits) == 3
    assert all(len(encode(submit)) < BATCH_BYTES + 1000 for submit in scheduler.submits)


def test_a_lost_receipt_is_asked_for_again_with_the_same_ids(client, scheduler, monkeypatch):
    monkeypatch.setattr("mqworker.client.RESEND_SECONDS", 0.1)
    scheduler.mute_receipts = 2

    request = client.submit("noop")

    assert [[r.id for r in submit.requests] for submit in scheduler.submits] == [[request]] * 3
    assert len(scheduler.views) == 1


def test_without_a_scheduler_a_submission_says_that_the_broker_has_it(amqp_url, prefix):
    with Client(amqp_url, prefix=prefix, timeout=0.5) as client:
        with pytest.raises(Unanswered, match=r"the broker has request .* \(confirmed\), but no scheduler has recorded"):
            client.submit("noop")
        with pytest.raises(Unanswered, match="no scheduler answers"):
            client.pool()

    with FakeScheduler(amqp_url, prefix) as scheduler:
        until(lambda: scheduler.views)


# ---------------------------------------------------------------- asking


def test_a_request_is_found_by_a_beginning_of_its_id(client):
    request = client.submit("noop")

    assert client.status(request[:8]).request.id == request
    with pytest.raises(NotFound, match="00000000"):
        client.status("00000000")


def test_requests_are_listed_newest_first(client, scheduler):
    first, second = client.submit("noop"), client.submit("noop")
    scheduler.move(first, "success")

    assert [view.request.id for view in client.list()] == [second, first]
    assert [view.request.id for view in client.list(states=["success"])] == [first]
    assert [view.request.id for view in client.list(limit=1)] == [second]


def test_an_abort_names_what_is_not_there(client, scheduler):
    request = client.submit("noop")

    assert [view.request.id for view in client.abort([request], "enough")] == [request]
    assert scheduler.queries[-1] == AbortRequests(ids=[request], reason="enough")
    with pytest.raises(NotFound, match=r"00000000.*the other 1 are being stopped"):
        client.abort([request, "00000000"], "enough")


def test_a_retry_is_a_new_request_and_only_of_an_ended_one(client, scheduler):
    request = client.submit("noop", {"duration": 1})
    with pytest.raises(Rejected, match="has not ended"):
        client.retry(request)

    scheduler.move(request, "failure")
    again = client.retry(request)

    assert again != request
    assert client.status(again).request.data == {"duration": 1}


def test_workers_and_pool_are_told(client, scheduler):
    assert [worker.name for worker in client.workers()] == ["w1"]
    assert [worker.name for worker in client.refresh_workers(["w1"])] == ["w1"]
    assert scheduler.queries[-1] == RefreshWorkers(names=["w1"])
    assert client.pool().workers == 1


# ---------------------------------------------------------------- waiting and following


def test_a_wait_ends_with_the_event_of_the_last_request(client, scheduler):
    one, two, done = (client.submit("noop") for _ in range(3))
    scheduler.move(done, "failure")

    with in_thread(lambda: client.wait([two, done, one])) as results:
        until(lambda: any(isinstance(query, GetRequests) for query in scheduler.queries))
        scheduler.move(one, "success")
        scheduler.move(two, "aborted")

    assert [(view.request.id, view.state) for view in results[0]] == [
        (two, "aborted"),
        (done, "failure"),
        (one, "success"),
    ]


def test_a_wait_looks_again_even_if_no_event_comes(client, scheduler, monkeypatch):
    monkeypatch.setattr("mqworker.client.LOOK_AGAIN_SECONDS", 0.1)
    scheduler.quiet_events = True
    request = client.submit("noop")

    with in_thread(lambda: client.wait([request])) as results:
        until(lambda: any(isinstance(query, GetRequests) for query in scheduler.queries))
        scheduler.move(request, "success")

    assert results[0][0].state == "success"


def test_a_wait_that_is_too_short_says_what_is_still_open(client):
    request = client.submit("noop")

    with pytest.raises(Unanswered, match=f"1 of 1 requests are not final after 0.2 s, {request}"):
        client.wait([request], timeout=0.2)


def test_waiting_for_nothing_and_for_nobody(client):
    assert client.wait([]) == []
    with pytest.raises(NotFound, match="00000000"):
        client.wait(["00000000"])


def test_logs_are_followed_from_the_call_on_until_the_request_is_final(client, scheduler):
    request, other = str(uuid.uuid4()), str(uuid.uuid4())
    stream = client.follow_logs(request)  # before it exists: nothing of it may be missed
    client.submit("noop", id=request)
    client.submit("noop", id=other)
    scheduler.move(request, "running")
    scheduler.log(other, "not ours\n")
    scheduler.log(request, "one\n")
    scheduler.move(other, "success")
    progress = LogProgress(
        request=request, attempt=1, task="noop", worker="w1", time=2.0, since=1.0, stage="sleep", fraction=0.5
    )
    scheduler.tell(scheduler.topology.logs, request, progress)
    scheduler.move(request, "success")

    followed = list(stream)

    assert [type(item).__name__ for item in followed] == ["RequestEvent", "LogText", "LogProgress", "RequestEvent"]
    assert {item.request for item in followed} == {request}
    assert followed[1].text == "one\n"
    assert followed[-1].state == "success"


def test_following_a_request_that_has_ended_says_at_once_how(client, scheduler, monkeypatch):
    monkeypatch.setattr("mqworker.client.LOOK_AGAIN_SECONDS", 1e6)
    request = client.submit("noop")
    scheduler.move(request, "failure")

    with in_thread(lambda: list(client.follow_logs(request[:8]))) as followed:
        pass

    [[event]] = followed
    assert (event.request, event.state, event.event) == (request, "failure", "fail")


def test_all_logs_are_followed_until_the_reader_stops(client, scheduler):
    one, two = client.submit("noop"), client.submit("noop")

    with closing(client.follow_logs()) as stream:
        scheduler.log(one, "one\n")
        scheduler.log(two, "two\n")
        assert [next(stream).text, next(stream).text] == ["one\n", "two\n"]


def test_following_an_unknown_request_is_an_error(client):
    with pytest.raises(NotFound):
        next(client.follow_logs(str(uuid.uuid4())))


# ---------------------------------------------------------------- artifacts


@pytest.fixture
def storing(amqp_url, prefix, scheduler, tmp_path) -> Iterator[Client]:
    url = f"file://{tmp_path}/store"
    scheduler.store_id = Store.open(url, create=True).id
    with Client(amqp_url, prefix=prefix, store_url=url, timeout=DEADLINE) as client:
        yield client


def test_an_artifact_comes_back_as_it_went_in(storing, tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second")

    artifact = storing.import_artifact(
        "site:notes", "notes", {"n": 1}, {"a.txt": tmp_path / "a.txt", "more/b.txt": tmp_path / "b.txt"}
    )
    paths = storing.fetch_artifact(artifact.id, tmp_path / "out")

    assert paths == [tmp_path / "out" / "a.txt", tmp_path / "out" / "more" / "b.txt"]
    assert [path.read_text() for path in paths] == ["first", "second"]
    assert b"".join(storing.read_file(artifact.files[0])) == b"first"
    assert [found.id for found in storing.artifacts(category="site:notes")] == [artifact.id]
    with pytest.raises(NotFound, match="no artifact 99"):
        storing.fetch_artifact(99, tmp_path)


def test_an_altered_artifact_is_not_fetched(storing, tmp_path):
    (tmp_path / "a.txt").write_text("first")
    artifact = storing.import_artifact("site:notes", "notes", {}, {"a.txt": tmp_path / "a.txt"})
    [stored] = [path for path in (tmp_path / "store" / "sha256").rglob("*") if path.is_file()]
    stored.chmod(0o644)
    stored.write_text("other")

    with pytest.raises(Corrupt):
        storing.fetch_artifact(artifact.id, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["../out-of.txt", "/etc/out-of.txt", "a/../../out-of.txt", "link/out-of.txt"])
def test_a_file_name_never_leads_out_of_the_directory(storing, scheduler, tmp_path, name):
    sha256, size = storing.store.put(Path(__file__))
    outside = tmp_path / "outside"
    outside.mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "link").symlink_to(outside)
    good = FileEntry(path="good.txt", size=size, sha256=sha256)
    artifact = scheduler.add_artifact("site:notes", "evil", [good, FileEntry(path=name, size=size, sha256=sha256)])

    # "/etc/..." is refused as a message already: no file name begins so.
    with pytest.raises((ArtifactInvalid, Unreadable)):
        storing.fetch_artifact(artifact.id, out)
    assert [path.name for path in out.iterdir()] == ["link"]
    assert not list(outside.iterdir())


def test_another_store_than_the_schedulers_is_refused_before_anything_is_written(storing, scheduler, tmp_path):
    scheduler.store_id = "another"
    before = sorted((tmp_path / "store").rglob("*"))

    with pytest.raises(StoreMismatch, match="expected the scheduler's store, another"):
        storing.import_artifact("site:notes", "notes", {}, {"a": Path(__file__)})
    assert sorted((tmp_path / "store").rglob("*")) == before


@pytest.mark.parametrize(
    ("category", "files"), [("nonsense", {}), ("debian:nope", {}), ("site:notes", {"../a": Path(__file__)})]
)
def test_what_makes_no_artifact_is_refused(storing, category, files):
    with pytest.raises(ArtifactInvalid):
        storing.import_artifact(category, "notes", {}, files)


def test_artifacts_need_a_store_url(client):
    with pytest.raises(SettingsError, match="store_url"):
        client.import_artifact("site:notes", "notes", {}, {})


# ---------------------------------------------------------------- bad brokers, outages, Ctrl-C


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda url: url.replace("amqp://", "http://"), SettingsError),
        (lambda url: url.rpartition("/")[0] + "/nowhere", BrokerRefused),
        (lambda url: url.replace("@", "x@"), BrokerRefused),
        (lambda _url: "amqp://a:b@127.0.0.1:1/", BrokerUnavailable),
    ],
)
def test_a_broker_that_does_not_let_us_in_is_told_at_once(amqp_url, prefix, change, error):
    with pytest.raises(error), Client(change(amqp_url), prefix=prefix, timeout=1):
        pytest.fail("the client was let in")


def test_a_closed_client_says_so(amqp_url, prefix):
    client = Client(amqp_url, prefix=prefix)
    with client:
        pass
    with pytest.raises(BrokerUnavailable, match="closed"):
        client.pool()


def test_queries_waits_and_streams_survive_a_restart_of_the_broker(private_node):
    node = private_node(plugins=())
    with FakeScheduler(node.url, "p") as scheduler, Client(node.url, prefix="p", timeout=120) as client:
        request = client.submit("noop")
        scheduler.quiet_events = True  # it ends while nobody can hear it
        stream = client.follow_logs(request)
        with in_thread(lambda: client.wait([request])) as waited, in_thread(lambda: list(stream)) as followed:
            until(lambda: sum(isinstance(query, GetRequests) for query in scheduler.queries) >= 2)
            node.stop()
            scheduler.views[request] = replace_state(scheduler.views[request], "success")
            with in_thread(lambda: client.status(request)) as asked:
                node.start()
        assert waited[0][0].state == "success"
        assert followed[0][-1].state == "success"
        assert asked[0].state == "success"


def replace_state(view: RequestView, state: str) -> RequestView:
    return msgspec.structs.replace(view, state=state)


def test_ctrl_c_ends_a_wait_at_once(amqp_url, prefix, scheduler):
    script = (
        "import sys\n"
        "from mqworker.client import Client\n"
        "with Client(sys.argv[1], prefix=sys.argv[2]) as client:\n"
        "    request = client.submit('noop')\n"
        "    print(request, flush=True)\n"
        "    client.wait([request])\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, amqp_url, prefix], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout.readline()
        until(lambda: any(isinstance(query, GetRequests) for query in scheduler.queries))
        os.kill(child.pid, signal.SIGINT)
        _, errors = child.communicate(timeout=DEADLINE)

    assert child.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_a_client_may_be_used_from_several_threads(client):
    with in_thread(lambda: [client.submit("noop") for _ in range(20)]) as one:
        two = [client.submit("noop") for _ in range(20)]

    assert {view.request.id for view in client.list(limit=100)} == {*one[0], *two}
