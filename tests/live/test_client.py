"""The client against a real broker and a small scheduler of our own that answers, or does not."""

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

import msgspec
import pytest

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
    Capability,
    Explain,
    Explanation,
    FileEntry,
    GetRequests,
    GetStates,
    LogProgress,
    RefreshWorkers,
    Request,
    RequestView,
    StuckEvent,
    Take,
    WorkerEvent,
    WorkerView,
    encode,
)
from mqworker.store import Store
from tests.proxy import Proxy

pytestmark = pytest.mark.live

DEADLINE = 30.0


def until(condition) -> None:
    """Wait for something that tells no event."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)


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


def test_without_a_scheduler_a_submission_says_that_the_broker_has_it(amqp_url, prefix, fake_scheduler):
    with Client(amqp_url, prefix=prefix, timeout=0.5) as client:
        with pytest.raises(Unanswered, match=r"the broker has request .* \(confirmed\), but no scheduler has recorded"):
            client.submit("noop")
        with pytest.raises(Unanswered, match="no scheduler answers"):
            client.pool()

    with fake_scheduler(amqp_url, prefix) as scheduler:
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
    with pytest.raises(Conflict, match="has not ended"):
        client.retry(request)

    scheduler.move(request, "failure")
    again = client.retry(request)

    assert again != request
    assert client.status(again).request.data == {"duration": 1}


def test_workers_and_pool_are_told(client, scheduler):
    assert [worker.name for worker in client.workers()] == ["w1"]
    assert [worker.name for worker in client.refresh_workers(["w1"])] == ["w1"]
    assert [query for query in scheduler.queries if isinstance(query, RefreshWorkers)] == [RefreshWorkers(names=["w1"])]
    assert client.pool().workers == 1


# ---------------------------------------------------------------- many requests at a time


def test_any_number_of_requests_is_selected_page_by_page_newest_first(client, scheduler):
    ids = [scheduler.add(submitted=float(n)) for n in range(2500)]
    scheduler.add(Request(id=str(uuid.uuid4()), task="other"))

    assert [view.request.id for view in client.select(task="noop")] == ids[::-1]
    asked = [query.limit for query in scheduler.queries]
    assert asked[0] == 100
    assert len(asked) < 6
    assert [view.request.id for view in client.select(task="noop", limit=150)] == ids[::-1][:150]
    assert [view.request.id for view in client.select(task="noop", before=3)] == ids[1::-1]
    assert list(client.select(task="none")) == []


def test_large_requests_come_in_small_answers(client, scheduler):
    for _ in range(130):
        scheduler.add(Request(id=str(uuid.uuid4()), task="noop", data={"x": "a" * 50_000}))

    assert len(list(client.select())) == 130
    assert [query.limit for query in scheduler.queries] == [100, 20, 20]


def test_requests_are_counted_and_selected_by_what_they_have_in_common(client, scheduler):
    def request(**given) -> Request:
        return Request(id=str(uuid.uuid4()), **{"task": "noop", **given})

    now = time.time()
    old = scheduler.add(request(), submitted=now - 7200)
    young = scheduler.add(request(), submitted=now - 60)
    theirs = scheduler.add(request(group="theirs"), submitted=now, state="running", worker="w1")
    other = scheduler.add(request(task="other"), submitted=now, state="success")

    for given, expected in (
        ({}, [other, theirs, young, old]),
        ({"older_than": 3600}, [old]),
        ({"older_than": 3600, "submitted_before": now - 9000}, []),
        ({"submitted_before": now - 30}, [young, old]),
        ({"group": "theirs"}, [theirs]),
        ({"worker": "w1"}, [theirs]),
        ({"task": "other"}, [other]),
        ({"states": ["pending", "running"]}, [theirs, young, old]),
    ):
        assert [view.request.id for view in client.select(**given)] == expected
        assert client.count(**given) == len(expected)
    assert [view.request.id for view in client.list(group="theirs", submitted_before=now + 1)] == [theirs]
    assert [view.request.id for view in client.list(oldest=True, limit=2)] == [old, young]


def test_many_are_aborted_and_reprioritised_in_sets(client, scheduler):
    ids = [scheduler.add() for _ in range(2300)]

    assert [view.request.priority for view in client.reprioritise(ids, 7)] == [7] * 2300
    sets = [len(query.ids) for query in scheduler.queries]
    assert (sum(sets), max(sets) <= 1000, len(sets) < 6) == (2300, True, True)
    assert {view.state for view in client.abort(ids, "enough")} == {"aborted"}
    with pytest.raises(NotFound, match=r"nobody.*the other 1 have it"):
        client.reprioritise([ids[0], "nobody"], 1)


def test_a_retry_with_an_id_of_ones_own_is_done_once(client, scheduler):
    request, new_id = scheduler.add(state="failure"), str(uuid.uuid4())

    assert [client.retry(request, new_id=new_id) for _ in range(2)] == [new_id] * 2
    assert len(scheduler.views) == 2


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda client: client.reprioritise(["x"], 5000), "priority"),
        (lambda client: client.pause("task", "two words"), r"pause.*\$\.name"),
        (lambda client: client.pause("host", "w1"), "kind"),
        (lambda client: client.list(states=["bogus"]), "bogus"),
        (lambda client: client.explain_task("noop", {"x": object()}), "object"),
    ],
)
def test_what_the_scheduler_could_not_read_is_refused_before_it_is_sent(client, scheduler, ask, said):
    with pytest.raises(Rejected, match=said):
        ask(client)
    assert scheduler.queries == []


# ---------------------------------------------------------------- the pool


def test_pauses_come_and_go(client):
    assert client.pauses() == []
    [pause] = client.pause("worker", "w1", "disk full")
    assert (pause.kind, pause.name, pause.reason) == ("worker", "w1", "disk full")
    assert client.pauses() == client.pause("worker", "w1", "disk full")
    assert client.resume("worker", "w1") == client.resume("worker", "w1") == []


def test_a_request_is_explained_by_a_beginning_of_its_id_and_one_that_is_none_by_its_data(client, scheduler):
    request = scheduler.add()
    scheduler.explanation = Explanation(
        task="noop", verdict="v", workers=0, steps=[], able=0, idle=0, busy=0, paused=0, offline=0, refused=0
    )

    assert client.explain(request[:8]).verdict == "v"
    assert scheduler.queries[-1] == Explain(id=request)
    client.explain_task("noop", {"duration": 1}, {"required": ["x"]})
    assert scheduler.queries[-1] == Explain(task="noop", data={"duration": 1}, requires={"required": ["x"]})
    with pytest.raises(NotFound):
        client.explain("00000000")


def test_thousands_of_workers_and_classes_come_in_several_answers(client, scheduler):
    name = "w{:04}".format
    big = {"x": "a" * 20_000}
    scheduler.workers = [WorkerView(name=name(n), host="h", state="online", slots=1, metadata=big) for n in range(450)]
    scheduler.classes = [
        Capability(
            name=name(n), queue="q", workers=1, examples=[], shared=big, tasks=[], requirements=1, idle=0, lookahead=0,
            out=0, backlog=0,
        )
        for n in range(450)
    ]  # fmt: skip

    assert [worker.name for worker in client.workers()] == [name(n) for n in range(450)]
    told = client.capabilities()
    assert [one.name for one in told.classes] == [name(n) for n in range(450)]
    assert (told.requirements, told.escaped) == (3, 1)
    assert max(query.limit for query in scheduler.queries) == 100
    assert len(scheduler.queries) > 8


def test_events_of_all_kinds_are_followed_in_sets(client, scheduler):
    topology, request = scheduler.topology, str(uuid.uuid4())
    stuck = StuckEvent(
        term=1, time=2.0, task="noop", requirement=1, since=1.0, number=1, requests=[request], reason="nobody"
    )
    worker = WorkerEvent(term=1, time=2.0, worker="w1", event="online")
    with closing(client.follow_events(quiet=0.05)) as stream:
        scheduler.tell(topology.events, topology.request_event_key("noop", "stuck"), stuck)
        scheduler.tell(topology.events, topology.worker_event_key("online"), worker)
        heard = []
        while len(heard) < 2:
            heard += next(stream)
        assert heard == [stuck, worker]
        assert next(stream) == []  # as time passes


def test_what_is_stuck_does_not_disturb_who_follows_logs(client, scheduler):
    request = client.submit("noop")
    stuck = StuckEvent(
        term=1, time=2.0, task="noop", requirement=1, since=1.0, number=1, requests=[request], reason="nobody"
    )
    with closing(client.follow_logs()) as stream:
        scheduler.tell(scheduler.topology.events, "request.noop.stuck", stuck)
        scheduler.log(request, "one\n")
        assert next(stream).text == "one\n"


# ---------------------------------------------------------------- waiting and following


def test_a_wait_ends_with_the_event_of_the_last_request(client, scheduler):
    one, two, done = (client.submit("noop") for _ in range(3))
    scheduler.move(done, "failure")

    with in_thread(lambda: client.wait([two, done, one])) as results:
        until(lambda: any(isinstance(query, GetRequests | GetStates) for query in scheduler.queries))
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
        until(lambda: any(isinstance(query, GetRequests | GetStates) for query in scheduler.queries))
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


def test_queries_waits_and_streams_survive_a_restart_of_the_broker(private_node, fake_scheduler):
    node = private_node(plugins=())
    with fake_scheduler(node.url, "p") as scheduler, Client(node.url, prefix="p", timeout=120) as client:
        request = client.submit("noop")
        scheduler.quiet_events = True  # it ends while nobody can hear it
        stream = client.follow_logs(request)
        with in_thread(lambda: client.wait([request])) as waited, in_thread(lambda: list(stream)) as followed:
            until(lambda: sum(isinstance(query, GetRequests | GetStates) for query in scheduler.queries) >= 2)
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
        until(lambda: any(isinstance(query, GetRequests | GetStates) for query in scheduler.queries))
        os.kill(child.pid, signal.SIGINT)
        _, errors = child.communicate(timeout=DEADLINE)

    assert child.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_a_client_may_be_used_from_several_threads(client):
    with in_thread(lambda: [client.submit("noop") for _ in range(20)]) as one:
        two = [client.submit("noop") for _ in range(20)]

    assert {view.request.id for view in client.list(limit=100)} == {*one[0], *two}


@pytest.mark.usefixtures("scheduler")
def test_a_broker_that_lets_us_in_and_takes_its_time_with_the_queues_is_waited_for(amqp_url, prefix, monkeypatch):
    """Who names a wrong port is told soon; but a busy broker needs some seconds for what a new pool has."""
    monkeypatch.setattr("mqworker.client.FIRST_CONNECT_SECONDS", 1.2)
    with Proxy.before(amqp_url) as proxy:
        proxy.slow(delay=0.15)
        with Client(proxy.url(amqp_url), prefix=prefix, timeout=30) as client:
            assert client.pauses() == []
        proxy.slow(delay=2.0)
        client = Client(proxy.url(amqp_url), prefix=prefix, timeout=30)
        with pytest.raises(BrokerUnavailable, match=r"within 1\.2 s"):
            client.open()
