"""Who gets what, and when: groups, keys, dependencies, pauses, priorities, on real processes and a real broker."""

import json
import subprocess
import sys
import uuid
from contextlib import ExitStack

import pytest

from mqworker.errors import Rejected
from mqworker.messages import After, Request, Take

pytestmark = pytest.mark.live


def _mqworker(pool, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-P", "-m", "mqworker", *arguments],
        env=pool.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _labels(runs) -> list[str]:
    return [line["label"] for line in runs.lines() if line["what"] == "start"]


def _submit(client, runs, label: str, **fields) -> str:
    return client.submit("journal", {**runs.data, "label": label}, **fields)


def test_one_persons_crowd_does_not_bury_anothers_one(pool, runs, final):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        ids = [_submit(client, runs, "first", group="crowd")]
        runs.await_starts(1)
        ids += [_submit(client, runs, f"crowd {number}", group="crowd") for number in range(20)]
        ids += [_submit(client, runs, "single", group="single")]
        runs.open()

        final(client, *ids)
        assert _labels(runs)[:3] == ["first", "single", "crowd 0"]


def test_requests_with_one_key_run_as_many_at_a_time_as_settings_say(pool, runs, final):
    with ExitStack() as stack:
        pool.environment["MQWORKER_SCHEDULER_CONCURRENCY_LIMITS"] = json.dumps({"mirror": 2})
        client = pool.up(stack, "anna", slots=4)
        ids = [_submit(client, runs, str(number), concurrency_key="mirror") for number in range(4)]
        runs.await_starts(2)
        other = _submit(client, runs, "other")
        runs.await_starts(3)
        waits = [client.status(one).waits for one in ids[2:]]
        assert all("mirror" in why for why in waits), waits
        runs.open()

        final(client, *ids, other)
        running, most = set(), 0
        for line in runs.lines():
            if line["label"] != "other":
                (running.add if line["what"] == "start" else running.discard)(line["pid"])
                most = max(most, len(running))
        assert most == 2


def test_a_chain_hands_its_artifacts_on_and_a_broken_one_ends_with_the_reason(pool, final, tmp_path):
    def link(word: str, before: str | None = None, **data) -> Request:
        take = [Take(into="/input/id", request=before, category="test:chain")] if before else []
        return Request(id=str(uuid.uuid4()), task="link", data={"word": word, **data}, take=take)

    with ExitStack() as stack:
        client = pool.up(stack, "anna", "bert")
        one = link("one")
        two = link("two", one.id)
        three = link("three", two.id)
        broken = link("broken", one.id, fail=True)
        after = link("after", broken.id)
        whatever = Request(
            id=str(uuid.uuid4()), task="noop", after=[After(request=after.id, need="end"), After(request=two.id)]
        )
        receipts = client.submit_many([three, whatever, after, two, broken, one])
        assert [receipt.status for receipt in receipts] == ["accepted"] * 6

        views = final(client, *(request.id for request in (one, two, three, broken, after, whatever)))
        assert [view.state for view in views] == ["success", "success", "success", "failure", "aborted", "success"]
        assert broken.id in views[4].reason.text
        [chain] = [artifact for artifact in views[2].artifacts if artifact.category == "test:chain"]
        [path] = client.fetch_artifact(chain.id, tmp_path)
        assert path.read_text() == "one two three "


def test_a_circle_and_an_unknown_request_are_refused(pool):
    with ExitStack() as stack:
        client = pool.up(stack)
        a, b = str(uuid.uuid4()), str(uuid.uuid4())
        circle = [Request(id=one, task="noop", after=[After(request=other)]) for one, other in ((a, b), (b, a))]
        receipts = client.submit_many(circle)
        assert [receipt.status for receipt in receipts] == ["rejected", "rejected"]
        assert f"{a} needs {b} needs {a}" in receipts[0].reason
        nobody = str(uuid.uuid4())
        with pytest.raises(Rejected, match=nobody):
            client.submit("noop", {}, after=[After(request=nobody)])


@pytest.mark.parametrize("kind", ["worker", "task", "group"])
def test_what_is_paused_gets_no_slot_until_it_is_resumed_also_behind_a_restart(pool, runs, final, kind):
    name = {"worker": "anna", "task": "journal", "group": "slow"}[kind]
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        running = _submit(client, runs, "running", group="slow")
        runs.await_starts(1)
        client.pause(kind, name, "for the night")
        held = _submit(client, runs, "held", group="slow")
        runs.open()
        assert final(client, running)[0].state == "success", "what runs goes on"

        pool.end("scheduler")
        pool.scheduler()
        [pause] = client.pauses()
        assert (pause.kind, pause.name, pause.reason) == (kind, name, "for the night")
        if kind == "worker":
            pool.worker("bert")
            pool.await_workers(client, "bert")
            assert final(client, held)[0].worker == "bert"
        else:
            pool.await_workers(client, "anna")
            other = client.submit("noop", {})
            assert final(client, other)[0].state == "success"
            assert f"the {kind} {name} is paused" in client.status(held).waits
        client.resume(kind, name)
        assert client.pauses() == []
        assert final(client, held)[0].state == "success"


def test_a_new_priority_changes_who_goes_first_and_an_abort_takes_out_what_waits(pool, runs, final):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        ids = {"first": _submit(client, runs, "first")}
        runs.await_starts(1)
        for label in ("a", "b", "c", "gone"):
            ids[label] = _submit(client, runs, label)
        [moved] = client.reprioritise([ids["c"]], 7)
        assert moved.request.priority == 7
        [gone] = client.abort([ids["gone"]], "not needed")
        assert gone.state == "aborted"
        runs.open()

        final(client, *ids.values())
        assert _labels(runs) == ["first", "c", "a", "b"]


def test_a_schema_over_metadata_chooses_the_worker_and_a_bad_one_is_refused(pool, final):
    with ExitStack() as stack:
        pool.scheduler()
        pool.worker("anna", MQWORKER_WORKER_METADATA=json.dumps({"memory": 8, "disks": ["ssd"]}))
        pool.worker("bert", MQWORKER_WORKER_METADATA=json.dumps({"memory": 64, "disks": ["hdd", "nvme"]}))
        client = stack.enter_context(pool.client())
        pool.await_workers(client, "anna", "bert")
        large = {"properties": {"memory": {"minimum": 32}}, "required": ["memory"]}
        solid = {"properties": {"disks": {"contains": {"const": "ssd"}}}, "required": ["disks"]}
        ids = {
            "bert": [client.submit("noop", {}, requires=large) for _ in range(3)],
            "anna": [client.submit("noop", {}, requires=solid) for _ in range(3)],
        }
        none = client.submit("noop", {}, requires={"allOf": [large, solid]})
        for worker, requests in ids.items():
            assert {view.worker for view in final(client, *requests)} == {worker}
        assert client.status(none).waits == "no worker can run it"
        with pytest.raises(Rejected, match="requires"):
            client.submit("noop", {}, requires={"properties": {"memory": {"minimum": "much"}}})


def test_a_task_that_a_worker_may_not_run_goes_elsewhere(pool, final):
    with ExitStack() as stack:
        pool.scheduler()
        pool.worker("anna", MQWORKER_WORKER_DENY_TASKS="noop")
        pool.worker("bert")
        client = stack.enter_context(pool.client())
        pool.await_workers(client, "anna", "bert")
        ids = [client.submit("noop", {}) for _ in range(5)]
        assert {view.worker for view in final(client, *ids)} == {"bert"}
        assert [worker.denied for worker in client.workers()] == [["noop"], []]


def test_a_backlog_larger_than_memory_holds_survives_restarts_in_its_order(pool, runs, final):
    number = 700
    with ExitStack() as stack:
        client = pool.up(stack)
        requests = [
            Request(id=str(uuid.uuid4()), task="journal", data={"journal": runs.data["journal"], "label": str(one)})
            for one in range(number)
        ]
        client.submit_many(requests)
        pool.end("scheduler")
        pool.scheduler()
        pool.worker("anna", slots=1)
        final(client, requests[10].id)
        pool.end("scheduler")
        pool.scheduler()
        views = final(client, *(request.id for request in requests))
        assert {view.state for view in views} == {"success"}
        assert all(len(view.attempts) == 1 for view in views)
        order = [int(label) for label in _labels(runs)]
        assert sorted(order) == list(range(number))
        assert order == sorted(order)


def test_requests_that_came_before_any_worker_are_told_apart_once_one_comes(pool, runs, final):
    """Nothing was read of their data when they came: they are one class, which the first worker divides."""
    with ExitStack() as stack:
        client = pool.up(stack)
        ids = {
            tag: [client.submit("journal", {"journal": runs.data["journal"], "tag": tag}) for _ in range(3)]
            for tag in ("north", "south", "nowhere")
        }
        pool.worker("anna", MQWORKER_WORKER_TAGS="north")
        pool.worker("bert", MQWORKER_WORKER_TAGS="south")
        assert {view.worker for view in final(client, *ids["north"])} == {"anna"}
        assert {view.worker for view in final(client, *ids["south"])} == {"bert"}
        assert {client.status(one).waits for one in ids["nowhere"]} == {"no worker can run it"}


def test_what_nobody_can_run_is_told_after_a_while(pool, eventually):
    with ExitStack() as stack:
        pool.environment["MQWORKER_SCHEDULER_NO_WORKER_AFTER"] = "0.5"
        client = pool.up(stack, "anna")
        channel = stack.enter_context(pool.channel())
        queue = channel.queue_declare("", exclusive=True).method.queue
        channel.queue_bind(queue, f"{pool.prefix}.events", "request.*.stuck")
        request = client.submit("journal", {"journal": "/nowhere", "tag": "nowhere"})
        body = eventually(lambda: channel.basic_get(queue, auto_ack=True)[2], "an event")
        event = json.loads(body)
        assert (event["task"], event["number"], event["requests"]) == ("journal", 1, [request])


def test_explain_tells_from_a_shell_who_could_run_it_and_what_would_help(pool, runs, final):
    with ExitStack() as stack:
        client = pool.up(stack, "anna", "bert")
        request = client.submit("journal", {"journal": runs.data["journal"], "tag": "north"})
        told = _mqworker(pool, "explain", request[:8])
        assert told.returncode == 1, told.stderr
        assert "system:tags" in told.stdout
        assert "north" in told.stdout
        facts = json.loads(_mqworker(pool, "explain", request, "--json").stdout)
        assert facts["workers"] == 2
        assert facts["able"] == 0
        assert sum(step["stopped"] for step in facts["steps"]) + facts["able"] == 2
        assert any('"north"' in advice for advice in facts["advice"]), facts["advice"]

        before = _mqworker(pool, "explain", "--task", "noop", "--data", "{}", "--json")
        assert before.returncode == 0, before.stderr
        assert json.loads(before.stdout)["able"] == 2
        capabilities = json.loads(_mqworker(pool, "capabilities", "--json").stdout)
        assert sum(one["workers"] for one in capabilities["classes"]) == 2
        client.abort([request], "enough")
        final(client, request)
