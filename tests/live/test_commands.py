"""The commands on many requests and on the pool, as a person or a script meets them; the scheduler is scripted."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import msgspec
import pytest

from mqworker import cli
from mqworker.messages import (
    AbortRequests,
    Capability,
    DrainWorkers,
    Explain,
    Explanation,
    GetPool,
    GetStates,
    Limits,
    ListRequests,
    ListWorkers,
    Request,
    RetryRequest,
    RunView,
    Step,
    WorkerEvent,
    WorkerView,
)

pytestmark = pytest.mark.live

DEADLINE = 60.0
NOT_HERE = "00000000-0000-4000-8000-0000000000ff"


class Done(NamedTuple):
    code: int
    output: str
    errors: str


@pytest.fixture
def environment(scheduler, tmp_path, monkeypatch) -> dict[str, str]:
    """Settings that lead to the scripted scheduler."""
    settings = {
        "HOME": str(tmp_path),
        "MQWORKER_AMQP_URL": scheduler.url,
        "MQWORKER_PREFIX": scheduler.topology.prefix,
        "MQWORKER_TIMEOUT": "30",
        "COLUMNS": "80",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return dict(os.environ)


@pytest.fixture
def run(environment, capsys) -> Callable[..., Done]:  # noqa: ARG001  # the settings are in the environment
    """Run a command in this process, with no terminal."""

    def run_(*arguments: str) -> Done:
        code = cli.main(arguments)
        return Done(code, *capsys.readouterr())

    return run_


class OnTerminal:
    """Run a command on a terminal of its own; a context manager."""

    def __init__(self, environment: dict[str, str], *arguments: str, stdout: int | None = None) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mqworker", *arguments],
            env=environment | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
            stdin=theirs,
            stdout=stdout or theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.drawn = ""

    def until(self, pattern: str) -> None:
        end = time.monotonic() + DEADLINE
        while not re.search(pattern, self.drawn):
            assert time.monotonic() < end, self.drawn
            assert self._read(), self.drawn

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        while self._read():
            pass
        return self.process.wait(DEADLINE)

    def _read(self) -> bool:
        assert select.select([self._ours], [], [], DEADLINE)[0], self.drawn
        try:
            more = os.read(self._ours, 65536)
        except OSError:  # the other side is closed
            return False
        self.drawn += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", more.decode(errors="replace"))
        return bool(more)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE)
        os.close(self._ours)


@pytest.fixture
def on_terminal(environment) -> Iterator[Callable[..., OnTerminal]]:
    def start(*arguments: str, **options) -> OnTerminal:
        return OnTerminal(environment, *arguments, **options)

    return start


def request(**given) -> Request:
    return Request(id=str(uuid.uuid4()), **{"task": "noop", **given})


def states(scheduler) -> list[str]:
    return [view.state for view in scheduler.views.values()]


# ---------------------------------------------------------------- what is meant


@pytest.mark.parametrize("command", [("abort",), ("retry",), ("reprioritise", "--priority", "1")])
def test_neither_ids_nor_a_filter_or_both_are_refused(run, scheduler, command):
    done = run(*command)
    assert done.code == 2
    assert f"expected what to {command[0]}: ids of requests, or a filter (--task, --group" in done.errors

    assert run(*command, "0123abcd", "--task", "noop").code == 2
    assert scheduler.queries == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["abort", "--state", "success"], r"can abort \(pending, offered, running\), got success"),
        (["retry", "--state", "running"], r"can retry \(success, failure, error, aborted, rejected\), got running"),
        (["abort", "--older-than", "2"], "expected a duration like 90s, 15m, 2h or 3d, got '2'"),
        (["abort", "--older-than", "h2"], "expected a duration"),
        (["reprioritise", "x"], "'--priority'"),
        (["reprioritise", "x", "--priority", "5000"], "'--priority'"),
        (["list", "--pending", "--state", "running"], "expected --pending or --state, got both"),
        (["explain"], "--task for one that is not submitted; got neither"),
        (["explain", "0123abcd", "--task", "noop"], "got both"),
        (["explain", "0123abcd", "--data", "{}"], "with --task only"),
        (["explain", "--task", "noop", "--data", "[]"], "expected one JSON object from --data, got list"),
        (["explain", "--task", "noop", "--requires", "@absent"], "expected a readable file at absent"),
        (["pause", "host", "w1"], "'worker'.*'task'.*'group'"),
        (["pause", "task", "two words"], r"\$\.name"),
        (["drain"], "expected what to drain"),
        (["drain", "w1", "--all"], "expected what to drain"),
        (["submit", "noop", "--timeout", "90"], "expected a duration like 90s"),
        (["submit", "noop", "--not-before", "tomorrow"], r"expected a time like 2030-01-31T22:15.*or \+30m from now"),
        (["submit", "noop", "--expires", "+x"], "expected a duration"),
        (["submit", "noop", "--expires", "2001-02-03T04:05"], "expected a time that is still to come, got '2001"),
        (["forget", "bad name"], "expected NAME to be at most 100 letters"),
        (["submit", "noop", "--memory", "lots"], "expected a size like 512M or 4G, got 'lots'"),
        (["submit", "noop", "--retry-on", "failure,eror"], "expected --retry-on failure, error or failure,error"),
        (["submit", "noop", "--timeout", "0.5s"], r">= 1.*\$\.timeout"),
        (["submit", "noop", "--not-before", "+2h", "--expires", "+1h"], "expires_at behind not_before"),
        (["submit", "noop", "--memory", "1M"], r"\$\.limits\.memory"),
        (["submit", "noop", "--time-out", "5s"], "No such option: --time-out.*--timeout"),
    ],
)
def test_what_cannot_be_meant_is_told_in_one_line(run, scheduler, arguments, said):
    done = run(*arguments)

    assert (done.code, done.output) == (2, "")
    assert re.fullmatch(r"mqworker: error: [^\n]+\n", done.errors)
    assert re.search(said, done.errors), done.errors
    assert scheduler.queries == []


def test_a_filter_asks_nobody_where_nobody_is_and_says_how_many_it_matches(run, scheduler):
    for _ in range(1200):
        scheduler.add()
    scheduler.add(state="running")
    scheduler.add(state="success")

    done = run("abort", "--task", "noop")

    assert (done.code, done.output) == (2, "")
    assert "expected --yes to abort 1,201 requests (1,200 pending, 1 running)" in done.errors
    assert "aborted" not in states(scheduler)


def test_a_filter_that_matches_nothing_is_no_error(run):
    done = run("abort", "--task", "noop", "--yes")

    assert done == (0, "", "mqworker: no request matches: nothing to abort\n")


def test_a_filter_asks_and_does_what_is_said(on_terminal, scheduler):
    ids = [scheduler.add() for _ in range(3)]
    with on_terminal("abort", "--state", "pending") as terminal:
        terminal.until(r"abort 3 requests \(3 pending\)\? \[y/N\]: ")
        terminal.type("n\n")
        assert terminal.end() == 1
    assert "nothing was done" in terminal.drawn
    assert states(scheduler) == ["pending"] * 3

    with on_terminal("abort", "--state", "pending") as terminal:
        terminal.until(r"\[y/N\]: ")
        late = scheduler.add()  # while somebody thinks
        terminal.type("y\n")
        assert terminal.end() == 0
    assert "3 requests aborted" in terminal.drawn
    assert [scheduler.views[one].state for one in ids] == ["aborted"] * 3
    assert scheduler.views[late].state == "pending"


def test_the_question_is_no_part_of_the_output(on_terminal, scheduler):
    scheduler.add(state="failure")
    with on_terminal("retry", "--task", "noop", stdout=subprocess.PIPE) as terminal:
        terminal.until(r"retry 1 request \(1 failure\)\? \[y/N\]: ")
        terminal.type("y\n")
        output = terminal.process.stdout.read().decode()
        terminal.process.stdout.close()
        assert terminal.end() == 0
    assert re.fullmatch(r"[0-9a-f-]{36}\n", output)


# ---------------------------------------------------------------- abort, reprioritise, retry


def test_requests_are_aborted_by_what_they_have_in_common(run, scheduler):
    now = time.time()
    old = scheduler.add(request(group="theirs"), submitted=now - 7200)
    running = scheduler.add(request(group="theirs"), submitted=now - 7200, state="running")
    scheduler.add(request(group="theirs"), submitted=now - 7200, state="success")
    scheduler.add(request(), submitted=now - 7200)
    scheduler.add(request(group="theirs"), submitted=now)

    done = run("abort", "--group", "theirs", "--older-than", "1h", "--yes", "--reason", "enough", "--no-wait")

    assert done == (0, "1 request aborted, 1 running one will end a little later\n", "")
    assert states(scheduler) == ["aborted", "running", "success", "pending", "pending"]
    assert scheduler.views[running].abort == "enough"
    assert [query.ids for query in scheduler.queries if isinstance(query, AbortRequests)] == [[running, old]]


def test_thousands_are_aborted_and_their_ids_are_one_json_document(run, scheduler):
    ids = [scheduler.add() for _ in range(2500)]

    done = run("abort", "--state", "pending", "--yes", "--json")

    assert done.code == 0
    assert json.loads(done.output) == {"number": 2500, "ids": ids[::-1]}
    assert set(states(scheduler)) == {"aborted"}


def test_ids_are_aborted_without_a_question_and_shown(run, scheduler):
    one, other = scheduler.add(), scheduler.add()

    done = run("abort", one[:8], other)

    assert done.code == 0
    assert [line.split()[:3] for line in done.output.splitlines()[1:]] == [
        [one[:8], "noop", "aborted"],
        [other[:8], "noop", "aborted"],
    ]
    assert [view["state"] for view in json.loads(run("abort", one, "--json").output)] == ["aborted"]
    assert run("abort", "nobody").code == 2


def test_an_abort_waits_until_what_runs_has_ended_and_is_told_otherwise_by_ctrl_c(on_terminal, run, scheduler):
    running = [scheduler.add(state="running", worker="w1") for _ in range(2)]

    def end(query):
        if isinstance(query, GetStates):
            for one in running:
                scheduler.views[one] = msgspec.structs.replace(scheduler.views[one], state="aborted", ended=2.0)

    with on_terminal("abort", *running) as terminal:
        terminal.until("stop")
        terminal.interrupt()
        assert terminal.end() == 130
    assert "2 requests of 2 still to end; their abort goes on" in terminal.drawn
    scheduler.before_answer = end
    done = run("abort", *running, "--json")

    assert done.code == 0
    assert [view["state"] for view in json.loads(done.output)] == ["aborted"] * 2


def test_an_abort_of_what_nobody_knows_yet_is_told(run):
    done = run("abort", NOT_HERE)

    assert done.code == 0
    assert f"nobody knows {NOT_HERE} yet: it is aborted when it comes" in done.errors


def test_requests_get_another_priority(run, scheduler):
    one = scheduler.add()
    for _ in range(1100):
        scheduler.add(request(group="theirs"))

    assert run("reprioritise", one[:8], "--priority", "9").code == 0
    assert scheduler.views[one].request.priority == 9
    done = run("reprioritise", "--group", "theirs", "-p", "-5", "-y")
    assert done == (0, "1,100 requests now of priority -5\n", "")
    assert {view.request.priority for view in scheduler.views.values()} == {9, -5}


def test_what_went_wrong_is_retried_once_however_often_it_is_asked(run, scheduler):
    olds = [scheduler.add(state=state) for state in ("failure", "error", "success", "aborted", "failure")]
    wrong = [olds[0], olds[1], olds[4]]

    done = run("retry", "--task", "noop", "--yes")
    news = done.output.split()

    assert done.code == 0
    assert [scheduler.views[new].state for new in news] == ["pending"] * 3
    asked = [(query.id, query.new_id) for query in scheduler.queries if isinstance(query, RetryRequest)]
    assert asked == list(zip(wrong, news, strict=True))  # oldest first
    assert run("retry", "--task", "noop", "--yes").output.split() == news
    assert len(scheduler.views) == 8


def test_requests_are_retried_by_their_ids_each_time_anew(run, scheduler):
    old = scheduler.add(state="failure")

    first, second = (run("retry", old).output.strip() for _ in range(2))
    [told] = json.loads(run("retry", old, "--json").output)

    assert len({first, second, told["id"], old}) == 4
    assert told["retries"] == old
    pending = scheduler.add()
    done = run("retry", old, pending)
    assert done.code == 2
    assert len(done.output.split()) == 1
    assert "1 of 2 requests are retried" in done.errors
    assert "has not ended" in done.errors


def test_ctrl_c_in_the_middle_says_how_far_it_got(environment, scheduler):
    for _ in range(3000):
        scheduler.add()
    reached, go_on = threading.Event(), threading.Event()

    def hold(query) -> None:
        if isinstance(query, AbortRequests) and states(scheduler).count("aborted") >= 1000:
            reached.set()
            go_on.wait(DEADLINE)

    scheduler.before_answer = hold
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "mqworker", "abort", "--task", "noop", "--yes"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert reached.wait(DEADLINE)
        process.send_signal(signal.SIGINT)
        process.wait(DEADLINE)
        go_on.set()
        output, errors = process.communicate(timeout=DEADLINE)

    assert (process.returncode, output) == (130, "")
    assert re.fullmatch(
        r"mqworker: [12],000 of 3,000 requests are aborted, and perhaps some of the next; "
        r"the same command goes on from there\n",
        errors,
    )


# ---------------------------------------------------------------- list


def test_what_waits_is_listed_oldest_first_with_its_reason(run, scheduler):
    first = scheduler.add(waits="no worker can run it")
    second = scheduler.add(request(group="theirs"), waits="the group theirs is paused")
    scheduler.add(state="running")

    done = run("list", "--pending")
    assert done.code == 0
    lines = [re.split(r"  +", line) for line in done.output.splitlines()]
    assert [line[0] for line in lines] == ["request", first[:8], second[:8]]
    assert [line[-1] for line in lines] == ["why it waits", "no worker can run it", "the group theirs is paused"]

    assert "these are the oldest 1 of 2; -n shows more" in run("list", "--pending", "-n", "1").errors
    assert [one["request"]["id"] for one in json.loads(run("list", "--group", "theirs", "--json").output)] == [second]
    assert scheduler.queries[-1] == ListRequests(group="theirs")


# ---------------------------------------------------------------- limits in time and space


def test_what_bounds_a_request_is_submitted_and_shown(run, scheduler):
    now = time.time()
    done = run(
        *("submit", "noop", "--quiet", "--timeout", "1h30m", "--not-before", "+30m", "--expires", "2100-01-31T22:15Z"),
        *("--retry-on", "failure,error", "--memory", "1.5G", "--cpus", "2", "--cpu-time", "2h", "--disk", "10G"),
        *("--processes", "1000", "--max-attempts", "5"),
    )
    assert done.code == 0, done.errors
    [submit] = scheduler.submits
    [one] = submit.requests

    assert (one.timeout, one.retry_on, one.max_attempts) == (5400.0, ["failure", "error"], 5)
    assert now + 1790 < one.not_before < now + 1900
    assert one.expires_at == 4105116900.0
    assert one.limits == Limits(memory=3 * 2**29, cpus=2.0, cpu_seconds=7200.0, disk=10 * 2**30, processes=1000)
    page = " ".join(run("show", one.id).output.split())
    assert "at most 5 attempts, again after failure and error, lease its task's, timeout 1h30m" in page
    assert "memory 1.5 GiB, cpus 2, cpu time 2h00m, disk 10 GiB, processes 1,000" in page
    assert "Expires 2100-0" in page
    assert re.search(r"expires", run("list", "--pending").output)


def test_a_request_without_bounds_names_none(run, scheduler):
    assert run("submit", "noop").code == 0
    [submit] = scheduler.submits

    assert submit.requests[0].limits is None
    assert "May use" not in run("show", submit.requests[0].id).output


# ---------------------------------------------------------------- drains


def test_workers_are_drained_by_name_by_class_and_altogether(run, scheduler):
    scheduler.workers = [WorkerView(name=name, host="h", state="online", slots=2) for name in ("w1", "w2")]
    done = run("drain", "w1", "wx", "--reason", "new kernel", "--stop")
    assert done.code == 0
    assert "no worker is called wx so far" in done.errors
    assert re.search(r"^w1 +drained ", done.output, re.MULTILINE)
    run("drain", "--class", "c1", "--json")
    run("drain", "--all", "--wait")
    drains = [query for query in scheduler.queries if isinstance(query, DrainWorkers)]

    assert drains == [
        DrainWorkers(names=["w1", "wx"], reason="new kernel", stop=True),
        DrainWorkers(classes=["c1"]),
        DrainWorkers(everybody=True),
    ]
    assert run("drain", "--class", "nope").code == 2


def test_a_drain_waits_until_nothing_runs_or_until_the_workers_have_gone(run, scheduler):
    run_ = RunView(request=NOT_HERE, attempt=1, since=1.0)
    scheduler.workers = [WorkerView(name="w1", host="h", state="online", slots=2, running=[run_])]
    looks = []

    def end(query):
        if isinstance(query, ListWorkers):
            looks.append(query)
            if len(looks) > 2:
                scheduler.workers = [msgspec.structs.replace(one, running=[]) for one in scheduler.workers]
                scheduler.tell(scheduler.topology.events, "worker.changed", changed())
            if len(looks) > 4:
                scheduler.workers = [msgspec.structs.replace(one, state="offline") for one in scheduler.workers]

    def changed():
        return WorkerEvent(term=1, time=2.0, worker="w1", event="changed")

    scheduler.before_answer = end
    done = run("drain", "w1", "--stop", "--wait", "--json")

    assert done.code == 0
    assert [one["state"] for one in json.loads(done.output)] == ["offline"]


# ---------------------------------------------------------------- pauses and workers


def test_pauses_are_made_listed_and_ended(run, scheduler):
    scheduler.workers = [WorkerView(name="anna", host="h", state="online", slots=1, tasks={"sbuild": 1})]

    assert run("pauses") == (0, "", "mqworker: nothing is paused\n")
    assert run("pause", "worker", "anna", "--reason", "disk full") == (
        0,
        "worker anna is paused; what runs goes on\n",
        "",
    )
    assert run("pause", "worker", "anna").code == 0
    assert run("pause", "task", "SBuild").errors == ""
    assert re.search(r"^worker +anna +", run("pauses").output, re.MULTILINE)
    assert {one["name"] for one in json.loads(run("pauses", "--json").output)} == {"anna", "SBuild"}
    assert run("resume", "worker", "anna") == (0, "worker anna goes on\n", "")
    done = run("resume", "worker", "anna")
    assert (done.code, done.output) == (0, "")
    assert "worker anna was not paused; paused are task SBuild" in done.errors


def named(name: str, arch: str) -> Capability:
    return Capability(
        name=name, queue=f"q.{name}", workers=1, examples=["anna"], shared={"arch": arch}, tasks=["noop"],
        requirements=1, idle=1, lookahead=0, out=0, backlog=0,
    )  # fmt: skip


def test_who_stops_waiting_for_a_drain_is_told_that_it_goes_on(on_terminal, scheduler):
    run = RunView(request=NOT_HERE, attempt=1, since=1.0)
    scheduler.workers = [WorkerView(name="w1", host="h", state="online", slots=1, running=[run], draining=True)]

    with on_terminal("drain", "w1", "--wait") as terminal:
        terminal.until("drain")
        terminal.interrupt()
        assert terminal.end() == 130
    assert "1 worker of 1 not done yet; the drain goes on until `mqworker resume`" in terminal.drawn


def test_an_abort_of_what_nobody_knows_shows_no_empty_table(run):
    said = f"mqworker: nobody knows {NOT_HERE} yet: it is aborted when it comes within a day\n"
    assert run("abort", NOT_HERE) == (0, "", said)


def test_what_is_paused_goes_on_by_name_by_class_or_all_of_it(run, scheduler):
    members = {"anna": "c1", "bert": "c2", "carl": "c1", "dora": "c1"}
    scheduler.workers = [
        WorkerView(name=name, host="h", state="online", slots=1, capability_class=one) for name, one in members.items()
    ]
    scheduler.classes = [named(name, "amd64") for name in ("c1", "c2", "c3")]

    def paused(*kinds_and_names):
        for kind, name in kinds_and_names:
            assert run("pause", kind, name).code == 0

    paused(*(("worker", name) for name in ("anna", "bert", "carl", "old")), ("task", "noop"))
    done = run("resume", "worker", "anna", "dora", "bert")
    assert (done.code, done.output) == (0, "worker anna goes on\nworker bert goes on\n")
    assert "worker dora was not paused; paused are " in done.errors
    paused(("worker", "anna"), ("worker", "bert"))
    assert run("resume", "worker", "--class", "c1").output == "worker carl goes on\nworker anna goes on\n"
    assert run("resume", "worker", "--class", "c3") == (0, "", "mqworker: no worker of that class is paused\n")
    assert run("resume", "worker", "--all").output == "worker old goes on\nworker bert goes on\n"
    assert [name for _, name in scheduler.pauses] == ["noop"]
    assert run("resume", "worker", "--all") == (0, "", "mqworker: no worker is paused\n")
    assert json.loads(run("resume", "task", "--all", "--json").output) == []

    for arguments, said in (
        (["worker", "--class", "c9"], "no class c9; `mqworker capabilities` lists them"),
        (["task", "--class", "c1"], "expected --class with workers, got it with task"),
        (["worker"], "expected what to resume: names, or --class, or --all"),
        (["worker", "anna", "--all"], "expected what to resume: names, or --class, or --all"),
    ):
        assert run("resume", *arguments) == (2, "", f"mqworker: error: {said}\n")


def test_a_pause_of_what_nobody_knows_is_made_with_a_warning(run, scheduler):
    scheduler.workers = [WorkerView(name="anna", host="h", state="online", slots=1, tasks={"sbuild": 1})]

    done = run("pause", "task", "sbiuld")
    assert done.output == "task sbiuld is paused; what runs goes on\n"
    assert "no worker has the task sbiuld so far; did you mean sbuild? `mqworker resume task sbiuld`" in done.errors
    assert "no worker is called ana so far; did you mean anna?" in run("pause", "worker", "ana").errors
    assert run("pause", "worker", "zzz").errors == "mqworker: no worker is called zzz so far\n"
    assert "no request is of the group nightly so far" in run("pause", "group", "nightly").errors
    assert len(scheduler.pauses) == 4

    scheduler.add(request(group="nightly"))
    assert run("pause", "group", "nightly").errors == ""


# ---------------------------------------------------------------- explain and capabilities


def explanation(**given) -> Explanation:
    counts = {"able": 0, "idle": 0, "busy": 0, "paused": 0, "offline": 0, "refused": 0}
    steps = [Step(looked_at="chroots", asked=['"sid"'], passed=0, stopped=2)]
    return Explanation(**{"task": "noop", "verdict": "nobody can", "workers": 2, "steps": steps, **counts, **given})


@pytest.mark.parametrize(
    ("counts", "code"),
    [
        ({}, 1),
        ({"able": 1, "idle": 1}, 0),
        ({"able": 1, "busy": 1}, 0),
        ({"able": 3, "paused": 1, "offline": 1, "refused": 1}, 1),
        ({"state": "running"}, 0),
    ],
)
def test_explain_tells_by_its_exit_code_whether_somebody_can(run, scheduler, counts, code):
    one = scheduler.add()
    scheduler.explanation = explanation(request=one, **counts)

    done = run("explain", one[:8])

    assert done.code == code
    assert done.output.startswith(f"request {one[:8]} (noop)")
    assert done.errors == ""


def test_what_is_not_submitted_is_explained_with_its_data_and_requirements(run, scheduler, tmp_path):
    scheduler.explanation = explanation()
    (tmp_path / "requires.json").write_text('{"required": ["gpu"]}')
    done = run(
        *("explain", "--task", "noop", "--data", '{"duration": 1}', "--requires", f"@{tmp_path}/requires.json"),
        "--json",
    )

    assert done.code == 1
    assert json.loads(done.output)["steps"][0]["asked"] == ['"sid"']
    assert scheduler.queries == [Explain(task="noop", data={"duration": 1}, requires={"required": ["gpu"]})]
    assert run("explain", "00000000").code == 2


def test_capability_classes_are_listed_and_shown(run, scheduler):
    scheduler.classes = [named("c1", "amd64"), named("c2", "arm64")]
    done = run("capabilities")
    assert re.search(r'^c1 +1 +1 +0 +0 +0 +arch="amd64"$', done.output, re.MULTILINE)
    assert "2 capability classes for 3 requirement classes, 1 of them asked anew each time" in done.output
    assert 'Differs in  arch = "arm64"' in done.output

    scheduler.classes = [named(f"c{n}", str(n)) for n in range(1, 6)]
    assert "Differs in" not in run("capabilities").output
    assert re.match(r'class c3\n(.+\n)+Differs in  arch = "3"\n\Z', run("capabilities", "c3").output)
    assert len(json.loads(run("capabilities", "--json").output)["classes"]) == 5
    assert [one["name"] for one in json.loads(run("capabilities", "c3", "--json").output)] == ["c3"]
    assert "no class c9" in run("capabilities", "c9").errors


# ---------------------------------------------------------------- watch


def test_watch_shows_the_pool_live_until_ctrl_c(on_terminal, scheduler):
    one = scheduler.add(waits="no worker can run it")
    scheduler.add(state="running", worker="anna", granted=2.0)
    with on_terminal("watch") as terminal:
        terminal.until("1 pending, 0 offered, 1 running")
        terminal.until("no worker can run it")
        terminal.until("anna")
        scheduler.move(one, "success")
        terminal.until(f"{one[:8]} noop success")
        terminal.until("0 pending, 0 offered, 1 running; 1 success")
        terminal.interrupt()
        assert terminal.end() == 130
    assert "Traceback" not in terminal.drawn


def test_watch_goes_on_while_nobody_answers(on_terminal, scheduler, environment):
    environment["MQWORKER_TIMEOUT"] = "0.5"
    scheduler.add()
    with on_terminal("watch") as terminal:
        terminal.until("1 pending")
        scheduler.deaf = True
        terminal.until(r"as it was .* ago: no answer")
        scheduler.deaf = False
        scheduler.add()
        terminal.until("2 pending")
        terminal.interrupt()
        assert terminal.end() == 130


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_watch_prints_a_line_an_event_where_there_is_no_terminal(environment, scheduler, flags):
    one = scheduler.add()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "mqworker", "watch", *flags],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        end = time.monotonic() + DEADLINE
        while not any(isinstance(query, GetPool) for query in scheduler.queries):
            assert time.monotonic() < end
            time.sleep(0.01)  # it listens before it asks
        scheduler.move(one, "success")
        online = WorkerEvent(term=1, time=2.0, worker="anna", event="online")
        scheduler.tell(scheduler.topology.events, "worker.online", online)
        lines = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE)

    assert (process.returncode, errors) == (130, "")
    if flags:
        assert [json.loads(line)["type"] for line in lines] == ["request_event", "worker_event"]
    else:
        assert [line.partition(" ")[2] for line in lines] == [f"{one[:8]} noop success\n", "worker anna online\n"]
