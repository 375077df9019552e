"""How requests and workers live and end, on real processes and a real broker."""

import os
import signal
import time
import uuid
from contextlib import ExitStack

import pytest

from mqworker.messages import Reason, Request

pytestmark = pytest.mark.live

SLEEPER = ["sleep", "1000"]


def _consumers(pool, client, name):
    """Count who consumes a worker's queue."""
    [queue] = [worker.queue for worker in client.workers() if worker.name == name]
    if queue is None:
        return 0
    with pool.channel() as channel:
        return channel.queue_declare(queue, passive=True).method.consumer_count


def sleepers(commands):
    return [pid for pid, command in commands.items() if command == SLEEPER]


# ---------------------------------------------------------------- timeouts


def test_a_run_over_its_timeout_that_ignores_sigterm_ends_in_error_and_nothing_of_it_is_left(
    pool, final, eventually, alive, commands_below
):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        agent = pool.processes["anna"].pid
        one = client.submit("badly", {"how": "stubborn"}, timeout=3)
        pids = eventually(lambda: len(found := sleepers(commands_below(agent))) == 2 and found, "its processes run")
        [view] = final(client, one)

        assert (view.state, view.reason.status) == ("error", "timeout")
        assert view.reason.text.startswith("ran longer than its timeout of 3 s")
        assert [(attempt.result, attempt.counted) for attempt in view.attempts] == [("error", True)]
        assert not [pid for pid in pids if alive(pid)]
        assert final(client, client.submit("noop", {}))[0].state == "success"


def test_a_run_over_its_timeout_that_stops_when_it_is_told_is_tried_again_if_that_is_wanted(pool, runs, final):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("journal", runs.data, timeout=1, retry_on=["error"], max_attempts=2)
        [view] = final(client, one)

        assert [attempt.reason.status for attempt in view.attempts] == ["timeout", "timeout"]
        assert view.state == "error"
        assert "attempt 2 of 2, none is left); before it: attempt 1 on anna: error, ran longer" in view.reason.text
        runs.assert_no_overlap()


# ---------------------------------------------------------------- aborts


def test_a_request_is_aborted_in_whatever_state_it_is(pool, runs, final, eventually):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        pool.worker("bert", MQWORKER_WORKER_TAGS="red")
        pool.await_workers(client, "bert")
        offered_data = {**runs.data, "tag": "red", "label": "offered"}
        final(client, client.submit("noop", {}))
        untagged = {"not": {"required": ["system:tags"]}}
        running = client.submit("journal", {**runs.data, "label": "running"}, requires=untagged)
        runs.await_starts(1)
        red = {"required": ["system:tags"]}
        final(client, client.submit("noop", {}, requires=red))
        eventually(lambda: _consumers(pool, client, "bert") == 1, "it is idle in the class that is its own by now")
        pool.processes["bert"].send_signal(signal.SIGSTOP)
        offered = client.submit("journal", offered_data)
        eventually(lambda: client.status(offered).state == "offered", "its ticket is out")
        pending = client.submit("journal", {**runs.data, "tag": "nobody", "label": "pending"})
        behind = client.submit("noop", {}, after=[pending])
        delayed = client.submit("journal", {**runs.data, "label": "delayed"}, not_before=time.time() + 3600)
        unknown = str(uuid.uuid4())
        marks, ends = [], []
        ids = [pending, delayed, offered, running]
        views = client.abort([*ids, unknown], "not wanted", on_mark=marks.append, on_end=ends.append)

        assert {view.request.id: view.state for view in views} == dict.fromkeys(ids, "aborted")
        assert [view.request.id for view in ends] == [running]
        assert {view.reason.text for view in views} == {"not wanted"}
        runs.open()  # whoever still waited for it would write its end
        assert marks == [unknown]
        client.submit_many([Request(id=unknown, task="journal", data={**runs.data, "label": "unknown"})])
        assert client.status(unknown).reason == Reason(text="not wanted", stage="abort")
        assert client.status(behind).reason.text == f"needs {pending}, which was aborted"
        pool.processes["bert"].send_signal(signal.SIGCONT)  # its claim comes now, if it comes
        assert final(client, client.submit("noop", {}, requires=red))[0].worker == "bert"
        assert [(line["what"], line["label"]) for line in runs.lines()] == [("start", "running")]


# ---------------------------------------------------------------- when it may begin


def test_times_of_requests_are_kept_over_a_restart_of_the_scheduler(pool, runs, final, eventually):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        runs.open()
        begins = time.time() + 8
        later = client.submit("journal", runs.data, not_before=begins, expires_at=begins + 3600)
        expires = time.time() + 4
        meanwhile = client.submit("journal", {**runs.data, "tag": "nobody"}, expires_at=expires)
        behind = client.submit("journal", runs.data, after=[meanwhile])
        blocked = client.submit("journal", runs.data, after=[later], expires_at=expires)
        far = client.submit("journal", {**runs.data, "tag": "nobody"}, expires_at=time.time() + 3600)
        pool.end("scheduler", signal.SIGKILL)
        eventually(lambda: time.time() > expires, "the time is over while no scheduler is there")
        pool.scheduler()
        done, gone, stranded, held = final(client, later, meanwhile, behind, blocked)

        assert done.state == "success"
        assert done.granted >= begins
        assert {view.state for view in (gone, stranded, held)} == {"aborted"}
        assert gone.reason.stage == held.reason.stage == "expiry"
        assert gone.reason.text.startswith("expired: not granted by 20")
        assert stranded.reason.stage == "after"
        assert client.status(far).state == "pending"
        assert runs.count("start") == 1


# ---------------------------------------------------------------- poison and blame


def test_what_kills_its_worker_each_time_ends_with_its_history_and_its_last_attempt_hurts_nobody(
    pool, runs, final, eventually
):
    with ExitStack() as stack:
        client = pool.up(stack, "anna", slots=2)
        data = {"journal": str(runs.path)}
        innocent = client.submit("journal", {**runs.data, "label": "innocent"}, max_attempts=10)
        runs.await_starts(1)
        poison = client.submit("poison", {**data, "label": "poison"}, max_attempts=3)
        lines_then = []
        for kill in (1, 2, 3):
            if kill == 3:
                runs.open()
            process = pool.processes["anna"]
            eventually(lambda process=process: process.poll() is not None, f"death {kill} of the worker")
            lines_then.append(runs.lines())
            pool.worker("anna", slots=2)
        dead, well = final(client, poison, innocent)

        assert dead.state == "error"
        assert [(attempt.worker, attempt.result) for attempt in dead.attempts] == [("anna", "lost")] * 3
        assert "attempt 3 of 3, none is left); before it: attempt 1 on anna: lost" in dead.reason.text
        assert "attempt 2 on anna: lost" in dead.reason.text
        assert well.state == "success"
        assert [attempt.result for attempt in well.attempts].count("lost") in (1, 2)
        since = lines_then[2][len(lines_then[1]) :]  # in the life of the worker that the last attempt has killed
        last = next(number for number, line in enumerate(since) if line["label"] == "poison")
        assert since[last + 1 :] == []
        begun = [line["label"] for line in since[:last] if line["what"] == "start"]
        assert begun == [line["label"] for line in since[:last] if line["what"] == "end"]
        assert sum(line["label"] == "poison" for line in runs.lines()) == 3


def test_a_worker_that_fails_what_passes_elsewhere_is_paused_until_it_is_resumed(pool, final, eventually):
    with ExitStack() as stack:
        pool.scheduler(MQWORKER_SCHEDULER_PAUSE_AFTER="2")
        pool.worker("anna", PICKY_FAILS="1")
        pool.worker("bert")
        client = stack.enter_context(pool.client())
        pool.await_workers(client, "anna", "bert")

        def paused():
            final(client, *(client.submit("picky", retry_on=["failure"], max_attempts=100) for _ in range(2)))
            return client.pauses()

        [pause] = eventually(paused, "the worker is paused")
        assert (pause.kind, pause.name) == ("worker", "anna")
        assert "2 requests ended badly here and then succeeded on other workers" in pause.reason
        assert {view.worker for view in final(client, *(client.submit("picky") for _ in range(4)))} == {"bert"}
        client.resume("worker", "anna")
        failing = lambda: final(client, client.submit("picky"))[0].worker == "anna"  # noqa: E731  # read in a line
        assert eventually(failing, "it gets work again")


# ---------------------------------------------------------------- drains and upgrades


def test_a_drained_worker_ends_what_it_runs_and_then_itself_and_stays_away_until_it_is_resumed(
    pool, runs, final, eventually
):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        one = client.submit("journal", runs.data)
        runs.await_starts(1)
        [view] = client.drain(["anna"], reason="new kernel", stop=True)
        assert view.paused == "drained, to end: new kernel"
        eventually(lambda: client.workers()[0].draining, "it says that it drains")
        waiting = client.submit("noop", {})
        assert pool.processes["anna"].poll() is None
        runs.open()
        assert final(client, one)[0].state == "success"
        assert pool.processes.pop("anna").wait(60) == 0
        pool.worker("anna")
        eventually(lambda: client.workers()[0].state == "online", "it is back")
        assert client.status(waiting).state == "pending"
        client.resume("worker", "anna")

        assert final(client, waiting)[0].state == "success"


ROLLING = """
from live_tasks import Journal

class Rolling(Journal):
    TASK_VERSION = {version}
    PROPERTIES = {{**Journal.TASK_DATA_SCHEMA["properties"], **{more}}}
    TASK_DATA_SCHEMA = {{**Journal.TASK_DATA_SCHEMA, "properties": PROPERTIES}}

    def _execute(self):
        self._note("version {version}")
        return super()._execute()
"""


def test_a_rolling_upgrade_under_load_loses_nothing_and_repeats_nothing(pool, runs, final):
    """Scheduler and workers come to a new version of a task one after the other, while requests flow."""
    boxes = []
    for version, more in ((1, "{}"), (2, '{"new": {"type": "boolean"}}')):
        box = pool.directory / f"box{version}"
        box.mkdir()
        (box / "rolling_tasks.py").write_text(ROLLING.format(version=version, more=more))
        path = os.pathsep.join((str(box), pool.environment["PYTHONPATH"]))
        boxes.append({"PYTHONPATH": path, "MQWORKER_TASK_MODULES": "live_tasks,rolling_tasks"})
    old, new = boxes
    names = ("anna", "bert", "carl")
    data = {"journal": str(runs.path)}
    ids = []
    with ExitStack() as stack:
        pool.scheduler(**old)
        for name in names:
            pool.worker(name, slots=2, **old)
        client = stack.enter_context(pool.client())
        pool.await_workers(client, *names)

        def flow(number, **more):
            requests = [Request(id=str(uuid.uuid4()), task="rolling", data={}) for _ in range(number)]
            requests = [Request(id=one.id, task="rolling", data={**data, "label": one.id, **more}) for one in requests]
            assert {one.status for one in client.submit_many(requests)} == {"accepted"}
            ids.extend(one.id for one in requests)
            return [one.id for one in requests]

        flow(15)
        runs.await_starts(5)
        for name in ("scheduler", *names):
            flow(10)
            assert pool.end(name) == 0
            flow(5) if name != "scheduler" else None
            if name == "scheduler":
                pool.scheduler(**new)
                special = flow(10, new=True)
            else:
                pool.worker(name, slots=2, **new)
                pool.await_workers(client, name)
        views = final(client, *ids)

        assert {view.state for view in views} == {"success"}
        assert {len([one for one in view.attempts if one.counted]) for view in views} == {1}
        journal = runs.lines()
        assert sorted(line["label"] for line in journal if line["what"] == "start") == sorted(ids)
        assert sorted(line["label"] for line in journal if line["what"] == "end") == sorted(ids)
        versions = {line["label"]: line["what"] for line in journal if line["what"].startswith("version")}
        assert {versions[one] for one in special} == {"version 2"}
        assert {"version 1", "version 2"} == set(versions.values())
        assert runs.count("start") == len(ids)
