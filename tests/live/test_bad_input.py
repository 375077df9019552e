"""Bad input of every kind: a clear error, and nothing lost."""

import json
import re
import signal
import uuid
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pika
import pytest

from mqworker.errors import ArtifactInvalid, Conflict, NotFound, Rejected
from mqworker.messages import Request

pytestmark = pytest.mark.live


def receipt_for(pool, body: bytes) -> dict:
    """Publish a submission with bare pika, and return the answer to it."""
    answers: list[bytes] = []
    with pool.channel() as channel:
        channel.basic_consume("amq.rabbitmq.reply-to", lambda *got: answers.append(got[3]), auto_ack=True)
        channel.basic_publish(
            f"{pool.prefix}.submit",
            f"{pool.prefix}.submit",
            body,
            pika.BasicProperties(reply_to="amq.rabbitmq.reply-to", delivery_mode=2, content_type="application/json"),
            mandatory=True,
        )
        for _ in range(300):
            channel.connection.process_data_events(time_limit=0.1)
            if answers:
                return json.loads(answers[0])
    raise AssertionError("no receipt came")


def in_rejected(pool, eventually) -> tuple[bytes, dict]:
    """Take the message that went to the operator."""
    with pool.channel() as channel:

        def take():
            method, properties, body = channel.basic_get(f"{pool.prefix}.queue.rejected", auto_ack=True)
            return method and (body, properties.headers)

        return eventually(take, "the message is in the queue of what was rejected")


def test_a_submission_is_one_json_message_from_any_language(pool, final):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = str(uuid.uuid4())
        body = json.dumps(
            {"type": "submit", "v": 1, "requests": [{"id": one, "task": "noop", "data": {"progress": 2}}]}
        )
        receipt = receipt_for(pool, body.encode())

        assert [{"id": one, "status": "accepted"}] == receipt["results"]
        assert final(client, one)[0].state == "success"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"this is no JSON", "JSON"),
        (b"\xff\xfe\x00", "JSON"),
        (b'{"type": "submit", "v": 1, "requests": []}', "requests"),
        (
            b'{"type": "submit", "v": 1, "requests": [{"id": "x", "task": "noop"}]}',
            r"requests\[0\]\.id|requests\[...\]\.id",
        ),
        (b'{"type": "gossip", "v": 1}', "gossip"),
        (b'{"type": "submit", "v": 2, "requests": [], "new": true}', "version 2"),
        (b"x" * (12 * 1024 * 1024), "bytes"),  # RabbitMQ 4.x takes no more than 16 MiB itself
    ],
    ids=["text", "bytes", "empty", "bad-id", "other-type", "newer", "12-MiB"],
)
def test_what_cannot_be_read_goes_to_the_operator_with_the_reason(pool, eventually, body, expected, final):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        receipt = receipt_for(pool, body)
        kept, headers = in_rejected(pool, eventually)

        assert re.search(expected, receipt["problem"])
        assert re.search(expected, headers["x-mqworker-reason"])
        assert body == kept
        assert final(client, client.submit("noop", {}))[0].state == "success"
        assert "Traceback" not in pool.log("scheduler")


def test_unreadable_words_to_any_exchange_are_kept_and_hurt_nobody(pool, final, eventually):
    """Whatever is sent to the exchanges of the scheduler and the workers, both go on; who asks something is told."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        queue = client.workers()[0].queue
        key = {
            "work": queue,
            "report": f"{pool.prefix}.report",
            "outcome": f"{pool.prefix}.outcome",
            "api": f"{pool.prefix}.api",
        }
        bodies = [b"", b"null", b"[]", b'{"type":"report"}', b'{"type":"tickets","v":9}', b"\x00" * 100]
        with pool.channel() as channel:
            for name, routing_key in key.items():
                for body in bodies:
                    channel.basic_publish(f"{pool.prefix}.{name}", routing_key, body)

        assert {"success"} == {view.state for view in final(client, *(client.submit("noop", {}) for _ in range(3)))}
        kept = Counter(in_rejected(pool, eventually)[1]["x-mqworker-exchange"] for _ in range(3 * len(bodies)))
        assert kept == {f"{pool.prefix}.{name}": len(bodies) for name in ("work", "report", "outcome")}
        for name in ("scheduler", "anna"):
            assert pool.processes[name].poll() is None
            assert "Traceback" not in pool.log(name)


def test_an_unknown_task_and_wrong_data_are_told_with_all_paths(pool):
    with ExitStack() as stack:
        client = pool.up(stack)
        with pytest.raises(Rejected, match="'nope'"):
            client.submit("nope", {})
        with pytest.raises(Rejected) as caught:
            client.submit("noop", {"duration": "long", "progress": -1, "colour": "red"})
        for part in ("$.duration", "$.progress", "colour"):
            assert part in str(caught.value)
        states = {view.request.task: view for view in client.list()}

        assert {"rejected"} == {view.state for view in states.values()}
        assert "$.duration" in states["noop"].reason.text
        with pytest.raises(Rejected):
            client.retry(states["noop"].request.id)


def test_one_bad_request_does_not_sink_the_others_of_its_message(pool, final):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        requests = [Request(id=str(uuid.uuid4()), task=task) for task in ("noop", "nope", "noop")]
        receipts = client.submit_many(requests)

        assert [receipt.status for receipt in receipts] == ["accepted", "rejected", "accepted"]
        assert {"success"} == {view.state for view in final(client, requests[0].id, requests[2].id)}


def test_the_id_of_a_request_with_other_content_is_a_conflict(pool):
    with ExitStack() as stack:
        client = pool.up(stack)
        one = client.submit("noop", {"duration": 1})
        with pytest.raises(Conflict, match=one):
            client.submit("noop", {"duration": 2}, id=one)


def test_an_input_that_does_not_exist_or_is_of_another_category_is_refused_at_submission(pool, tmp_path):
    with ExitStack() as stack:
        client = pool.up(stack)
        plain = tmp_path / "plain.txt"
        plain.write_text("no source")
        artifact = client.import_artifact("example:plain", "plain", {}, {"plain.txt": plain})
        build = {"distribution": "bookworm", "host_architecture": "amd64"}
        with pytest.raises(Rejected, match="4711"):
            client.submit("sbuild", {**build, "input": {"source_artifact_id": 4711}})
        with pytest.raises(Rejected, match="example:plain"):
            client.submit("sbuild", {**build, "input": {"source_artifact_id": artifact.id}})


@pytest.mark.parametrize(
    "option",
    [
        "--pre-build-commands=touch /tmp/pwned",
        "--pre-b=touch /tmp/pwned",
        "--mail-log-to=x; touch /tmp/pwned",
        "--chroot=/etc/passwd",
        "-j8",
        "--debbuildopt=--hook-done=touch /tmp/pwned",
    ],
)
def test_an_sbuild_option_that_could_run_on_the_host_is_refused_at_submission(pool, option):
    with ExitStack() as stack:
        client = pool.up(stack)
        with pytest.raises(Rejected) as caught:
            client.submit(
                "sbuild",
                {
                    "input": {"source_artifact_id": 1},
                    "distribution": "bookworm",
                    "host_architecture": "amd64",
                    "sbuild_options": [option],
                },
            )
        assert option.split("=", 1)[0] in str(caught.value)


def test_bytes_that_are_gone_or_altered_in_the_store_are_told_and_never_handed_out(pool, tmp_path):
    with ExitStack() as stack:
        client = pool.up(stack)
        source = tmp_path / "file"
        source.write_bytes(b"a" * 1000)
        artifact = client.import_artifact("example:plain", "plain", {}, {"file": source})
        sha256 = artifact.files[0].sha256
        [stored] = (pool.directory / "store").glob(f"**/{sha256}")
        for damage in (b"b" * 1000, b"a" * 999, None):
            if damage is None:
                stored.unlink()
            else:
                stored.write_bytes(damage)
            with pytest.raises(Exception, match=sha256):
                client.fetch_artifact(artifact.id, tmp_path / "fetched")
            assert not (tmp_path / "fetched" / "file").exists()
        with pytest.raises(NotFound):
            client.fetch_artifact(4711, tmp_path / "fetched")
        with pytest.raises(ArtifactInvalid):
            client.import_artifact("example:plain", "plain", {}, {"file": tmp_path / "missing"})
        with pytest.raises(ArtifactInvalid):
            client.import_artifact("example:plain", "plain", {}, {"../../etc/passwd": source})


def test_a_run_that_finds_no_store_is_tried_again(pool, final, eventually):
    """An unmounted file system is nobody's request's fault."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        store = pool.directory / "store"
        store.rename(pool.directory / "unmounted")
        one = client.submit("noop", {"artifacts": [10]}, max_attempts=50)
        eventually(lambda: client.status(one).attempts[1:], "a second attempt")
        (pool.directory / "unmounted").rename(store)
        [view] = final(client, one)

        assert view.state == "success"
        assert {"error"} == {attempt.result for attempt in view.attempts[:-1]}
        assert "store" in view.attempts[0].reason.text


def test_a_task_module_that_does_not_import_is_named_and_hides_no_other(pool, final):
    with ExitStack() as stack:
        pool.environment["MQWORKER_TASK_MODULES"] = "broken_tasks,live_tasks"
        client = pool.up(stack, "anna")

        assert final(client, client.submit("noop", {}))[0].state == "success"
        assert "broken_tasks" in pool.log("anna")
        assert "broken on purpose" in pool.log("anna")
        assert "journal" in client.workers()[0].tasks


def test_a_task_that_misbehaves_ends_with_a_reason_and_spoils_nothing(pool, final, alive, tmp_path):
    """Raise, exit, end the process, crash, fork away, print a gigabyte: the slot is fit for the next run."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")

        def ended(how: str, **more: str):
            view = final(client, client.submit("badly", {"how": how, **more}, max_attempts=1))[0]
            assert final(client, client.submit("noop", {}))[0].state == "success"
            return view

        raised = ended("raise")
        assert (raised.state, raised.reason.text.rpartition(": ")[2]) == ("error", "badly raised")
        assert "live_tasks.py" in raised.reason.line
        left = ended("sysexit")
        assert left.state == "error"
        assert "SystemExit" in left.reason.text
        gone = ended("exit")
        assert (gone.state, gone.reason.exit_code) == ("error", 23)
        assert gone.reason.line == "these are my last words"
        crashed = ended("segfault")
        assert (crashed.state, crashed.reason.exit_code) == ("error", -signal.SIGSEGV)
        note = tmp_path / "pid"
        forked = ended("fork", note=str(note))
        assert forked.state == "success"
        assert not alive(int(note.read_text()))
        printed = ended("gigabyte")
        assert printed.state == "success"
        [log] = [artifact for artifact in printed.artifacts if artifact.category == "mqworker:debug-logs"]
        assert {entry.path: entry.size for entry in log.files}["output.log"] == 1024**3
        rss = Path(f"/proc/{pool.processes['anna'].pid}/status").read_text()
        [peak] = [int(line.split()[1]) for line in rss.splitlines() if line.startswith("VmHWM")]
        assert peak < 200_000  # KiB: the agent has not taken the gigabyte in
        assert "Traceback" not in pool.log("anna")


def test_what_a_task_prints_is_in_its_log_artifact_and_in_the_live_log(pool, final, tmp_path):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = str(uuid.uuid4())
        following = client.follow_logs(one)
        client.submit_many([Request(id=one, task="badly", data={"how": "printed"})])
        live = "".join(getattr(item, "text", "") for item in following)
        [view] = final(client, one)
        [log] = view.artifacts

        assert "to be seen in the log\n" in live
        client.fetch_artifact(log.id, tmp_path)
        assert (tmp_path / "output.log").read_text() == "to be seen in the log\n"


def test_abort_ends_every_process_of_a_task_that_ignores_it(pool, final, eventually, alive):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("badly", {"how": "stubborn"})
        pattern = b"sleep\x001000\x00"

        def sleepers() -> set[int]:
            return {
                int(entry.name)
                for entry in Path("/proc").iterdir()
                if entry.name.isdecimal()
                and _command(entry) == pattern
                and _below(int(entry.name), pool.processes["anna"].pid)
            }

        eventually(lambda: len(sleepers()) >= 2, "the task's processes run")
        pids = sleepers()
        client.abort([one], "enough of it")
        [view] = final(client, one)

        assert view.state == "aborted"
        assert "enough of it" in view.reason.text
        assert not [pid for pid in pids if alive(pid)]
        assert final(client, client.submit("noop", {}))[0].state == "success"


def _command(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


def _below(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False
