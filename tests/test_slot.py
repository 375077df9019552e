"""Slots as the processes that they are, driven through their pipes."""

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

import pytest

from mqworker.errors import PeerError
from mqworker.messages import (
    SLOT_LAPSED,
    Analysis,
    FileEntry,
    Limits,
    Outfit,
    Recall,
    RecordedArtifact,
    Renew,
    Request,
    RunTask,
    SlotEnded,
    SlotOutput,
    SlotProgress,
    SlotReady,
    SlotRecalled,
    SlotWord,
    StopRun,
    decode,
    encode_line,
)
from mqworker.processes import boottime_ns, descendants, identify
from mqworker.slot import LIVE_BURST, LIVE_BYTES_PER_SECOND
from mqworker.store import Store

TASKS = Path(__file__).parent / "live" / "taskbox"
PATIENCE = 30.0  # seconds; nothing here takes so long, unless the machine is very busy
SECOND = 1_000_000_000
MUCH = 32 * 1024 * 1024  # bytes printed

ODD_TASKS = """
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

from mqworker import processes
from mqworker.errors import HostUnfit
from mqworker.task import Task


class Odd(Task):
    def input_artifact_ids(self):
        return self.data.get("inputs", [])

    def _execute(self):
        return getattr(self, self.data["how"])()

    def see(self):
        seen = {"cwd": os.getcwd(), "variable": os.environ.get("ODD"), "stdin": sys.stdin.read()}
        print(f"seen {seen} by {os.getpid()}")
        return True

    def leave_variable(self):
        os.environ["ODD"] = "1"
        return True

    def leave_file(self):
        (self.world.work_directory / "left").write_text("behind")
        return True

    def leave_directory(self):
        os.chdir(self.world.work_directory)
        return True

    def leave_streams_closed(self):
        sys.stdout.close()
        sys.stderr.close()
        return True

    def leave_no_streams(self):
        sys.stdout = sys.stderr = None
        return True

    def leave_thread(self):
        def go_on():
            while True:
                os.write(1, b"I am not over")
                threading.Event().wait(0.01)

        threading.Thread(target=go_on, daemon=True).start()
        return True

    def leave_printer(self):
        subprocess.run(["sh", "-c", "setsid sh -c 'while :; do echo I am not over; done' &"], check=True)
        return True

    def fork_a_speaker(self):
        pid = os.fork()
        if pid == 0:
            self.world.report_progress(stage="I am not who I seem")
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1

    def print_much(self):
        for _ in range(32 * 1024):
            os.write(1, b"x" * 1023 + b"\\n")
        return True

    def print_zeros(self):
        for _ in range(100):
            os.write(1, bytes(1000))
        os.write(1, b"\\xff\\xfe\\0mqworker 0123\\0")
        return True

    def print_with_no_room(self):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        for _ in range(1000):
            os.write(1, b"there is no room for this\\n" * 100)
        self.world.settle_log()
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return True

    def fetch(self):
        self.world.fetch_artifact(self.data["id"], self.world.work_directory)
        print(sorted((str(path), path.read_text()) for path in self.world.work_directory.rglob("*.txt")))
        return True

    def upload_too_much(self):
        for number in range(3):
            self.world.upload_artifact(category="test:odd", name=str(number), data={"x": "y" * 1_000_000}, files={})
        return True

    def upload_wrongly(self):
        self.world.upload_artifact(category="Not A Category", name="x", data={}, files={})
        return True

    def need_memory(self):
        return len(bytearray(1_000_000_000)) > 0

    def lose_logs(self):
        def fail():
            raise OSError("no room for logs")

        self.upload_debug_logs = fail
        return True

    def leave_what_cannot_be_ended(self):
        def fail():
            raise HostUnfit("process 7 is still there in state D")

        processes.kill_descendants = fail
        return True

    def ignore_everything(self):
        subprocess.Popen(["setsid", "sh", "-c", "trap '' TERM HUP INT; (trap '' TERM; sleep 1000) & sleep 1000"])
        print("deaf", flush=True)
        while True:
            try:
                threading.Event().wait(1000)
            except BaseException:
                pass
"""


class Child:
    """A slot's process, and what it says."""

    def __init__(self, directory: Path, *, modules: str = "live_tasks,odd_tasks") -> None:
        self.directory = directory
        self.store_url = f"file://{directory / 'store'}"
        self.store = Store.open(self.store_url, create=True)
        (directory / "odd_tasks.py").write_text(ODD_TASKS)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mqworker.slot"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(directory, modules),
            cwd=directory,
            start_new_session=True,
        )
        self.words: queue.SimpleQueue[SlotWord | None] = queue.SimpleQueue()
        self.was_ready = False
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        self.order(Outfit(store=self.store_url))

    def _read(self):
        for line in self.process.stdout:
            self.words.put(decode(line, SlotWord))
        self.words.put(None)

    def order(self, order):
        self.process.stdin.write(encode_line(order))
        self.process.stdin.flush()

    def hear(self, kind):
        """Wait for a word of one kind; return it with what came before it."""
        before = []
        while not isinstance(before[-1] if before else None, kind):
            word = self.words.get(timeout=PATIENCE)
            assert word is not None, f"the slot ended with {self.process.wait()} before it said {kind}, after {before}"
            before.append(word)
        return before[-1], before[:-1]

    def ready(self):
        """Wait until the slot takes its first run."""
        if not self.was_ready:
            self.was_ready = True
            self.hear(SlotReady)

    def start(self, task="noop", data=None, *, seconds=3600.0, inputs=(), limits=None, cpus=()):
        self.token = uuid.uuid4().hex
        self.order(
            RunTask(
                token=self.token,
                request=Request(id=str(uuid.uuid4()), task=task, data=data or {}, limits=limits),
                attempt=1,
                inputs=list(inputs),
                directory=str(self.directory / self.token),
                deadline_ns=boottime_ns() + int(seconds * SECOND),
                limits=limits,
                cpus=list(cpus),
            )
        )
        return self.token

    def run(self, task="noop", data=None, **given):
        """Run a task in a slot that is ready; return how it ended, and what the slot said meanwhile."""
        self.ready()
        self.start(task, data, **given)
        return self.hear(SlotEnded)

    def await_end(self):
        code = self.process.wait(PATIENCE)
        self.reader.join()
        return code

    def file(self, ended, name):
        """Read a file of the artifacts of a run."""
        [entry] = [entry for artifact in ended.artifacts for entry in artifact.files if entry.path == name]
        target = self.directory / uuid.uuid4().hex
        self.store.get(entry.sha256, entry.size, target)
        return target.read_bytes()

    def close(self):
        left = descendants(self.process.pid)
        self.process.stdin.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self.reader.join()
            self.process.stdout.close()
        assert not [one for one in left if identify(one.pid) == one]


def environment(directory, modules):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MQWORKER_")}
    path = os.pathsep.join(filter(None, (str(TASKS), str(directory), os.environ.get("PYTHONPATH"))))
    return {**inherited, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "MQWORKER_TASK_MODULES": modules}


def eventually(met):
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + PATIENCE
    while not (found := met()):
        assert time.monotonic() < deadline
        time.sleep(0.01)  # between two looks at what has no event
    return found


def shown(words):
    return "".join(word.text for word in words if isinstance(word, SlotOutput))


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """Start slots, and see to it that they end with nothing left."""
    with ExitStack() as stack:

        def start(**given):
            child = Child(tmp_path_factory.mktemp("slot"), **given)
            stack.callback(child.close)
            return child

        yield start


@pytest.fixture
def child(children):
    """A slot of this test's own."""
    return children()


@pytest.fixture(scope="module")
def shared(children):
    """A slot that has been used before, by tests whose runs leave it as it was."""
    return children()


# ---------------------------------------------------------------- runs


def test_runs_follow_each_other_in_one_process_and_their_files_are_in_the_store(shared):
    ended, words = shared.run("noop", {"artifacts": [10, 0], "progress": 2, "log_lines": 2})

    assert ended.result == "success"
    assert shared.file(ended, "task.log").endswith(b"line 2 of 2\n")
    assert [len(shared.file(ended, f"output-{number}")) for number in (0, 1)] == [10, 0]
    assert [word.fraction for word in words if isinstance(word, SlotProgress)][-1] == 1.0
    assert "line 2 of 2" in shown(words)
    ended, words = shared.run("noop", {"artifacts": [10]})
    assert [artifact.handle for artifact in ended.artifacts] == ["a0"]
    assert shared.process.poll() is None


@pytest.mark.parametrize(
    ("task", "data", "expected"),
    [
        ("noop", {"result": "failure"}, ("failure", "asked for a failure", None)),
        ("noop", {"result": "error"}, ("error", "raised RuntimeError: this request asked", "noop.py")),
        ("badly", {"how": "raise"}, ("error", "raised RuntimeError: badly raised", "live_tasks.py")),
        ("badly", {"how": "sysexit"}, ("error", "raised SystemExit: 7", "live_tasks.py")),
        ("badly", {"how": 7}, ("error", "7", None)),
        ("nope", {}, ("error", "'nope' is not a registered", "task.py")),
        ("odd", {"how": "upload_wrongly"}, ("error", "expected an artifact of a known form", None)),
        ("odd", {"how": "upload_too_much"}, ("error", "put large data into files", None)),
        ("odd", {"how": "fetch", "id": 7}, ("error", "one of this request's input artifacts ([]), got 7", None)),
    ],
)
def test_how_a_run_ended_is_said_with_a_reason_to_act_on(shared, task, data, expected):
    result, text, line = expected
    ended, _ = shared.run(task, data)

    assert ended.result == result
    assert text in ended.reason.text
    assert line is None or ended.reason.line.startswith(line)


@pytest.mark.parametrize(("how", "exit_code"), [("exit", 23), ("segfault", -11)])
def test_a_task_that_ends_its_process_says_nothing_but_its_last_words(child, how, exit_code):
    child.ready()
    child.start("badly", {"how": how})

    assert child.await_end() == exit_code
    words = list(iter(child.words.get, None))
    assert not [word for word in words if isinstance(word, SlotEnded)]


def test_inputs_are_fetched_by_their_ids_and_verified(shared):
    file = shared.directory / "in.txt"
    file.write_text("what it needs")
    sha256, size = shared.store.put(file)
    entry = FileEntry(path="deep/in.txt", size=size, sha256=sha256)
    artifact = RecordedArtifact(id=7, category="test:odd", name="in", files=[entry])
    ended, words = shared.run("odd", {"how": "fetch", "id": 7, "inputs": [7]}, inputs=[artifact])

    assert ended.result == "success"
    assert "deep/in.txt', 'what it needs'" in shown(words)


def test_a_store_that_is_away_says_nothing_of_the_request_which_is_tried_again(child):
    child.ready()
    shutil.rmtree(child.directory / "store")
    (child.directory / "store").write_text("this is no directory any more")
    child.start("noop", {"artifacts": [10]})
    ended, _ = child.hear(SlotEnded)

    assert (ended.result, ended.again) == ("error", True)


def test_a_run_that_needed_much_memory_makes_room_for_a_fresh_process(child):
    ended, _ = child.run("noop", {"memory": 300_000_000})

    assert ended.result == "success"
    assert child.await_end() == 0


# ---------------------------------------------------------------- what is printed


def test_what_is_printed_is_shown_live_and_kept(shared):
    ended, words = shared.run("badly", {"how": "printed"})

    assert "to be seen in the log\n" in shown(words)
    assert shared.file(ended, "output.log") == b"to be seen in the log\n"


def test_output_without_end_is_kept_and_shown_as_far_as_somebody_could_read_it(shared):
    began = time.monotonic()
    ended, words = shared.run("odd", {"how": "print_much"})
    took = time.monotonic() - began
    text = shown(words)
    told = sum(int(number) for number in re.findall(r"\n\[\.\.\. (\d+) characters are not shown live", text))

    assert len(shared.file(ended, "output.log")) == MUCH
    assert MUCH - told <= LIVE_BURST + took * LIVE_BYTES_PER_SECOND
    assert told + len(re.sub(r"\n\[\.\.\. \d+ [^\n]*\n", "", text)) == MUCH


def test_bytes_that_are_no_text_are_kept_as_they_are(shared):
    ended, words = shared.run("odd", {"how": "print_zeros"})

    assert shared.file(ended, "output.log") == bytes(100_000) + b"\xff\xfe\0mqworker 0123\0"
    assert shown(words).endswith("\ufffd\ufffd\0mqworker 0123\0")


def test_a_log_that_cannot_be_written_changes_no_result_and_hangs_nobody(child):
    ended, words = child.run("odd", {"how": "print_with_no_room"})

    assert ended.result == "success"
    assert "is not kept: [Errno 27]" in shown(words)
    ended, words = child.run("badly", {"how": "printed"})
    assert child.file(ended, "output.log") == b"to be seen in the log\n"


# ---------------------------------------------------------------- one run and the next


@pytest.mark.parametrize(
    "how",
    ["leave_variable", "leave_directory", "leave_streams_closed", "leave_no_streams", "leave_thread", "leave_printer"],
)
def test_a_run_is_not_affected_by_what_the_former_left(children, how):
    child = children()
    ended, words = child.run("odd", {"how": how})
    assert ended.result == "success", ended.reason
    if ended.last:  # it makes room for a process that is not spoilt
        assert child.await_end() == 0
        child = children()
        child.ready()
    child.start("odd", {"how": "see"})
    ended, words = child.hear(SlotEnded)

    assert ended.result == "success", ended.reason
    assert child.file(ended, "output.log").decode() == (
        f"seen {{'cwd': '/', 'variable': None, 'stdin': ''}} by {child.process.pid}\n"
    )
    assert "not over" not in shown(words)


def test_a_forked_child_that_comes_back_speaks_for_nobody_and_nothing_of_the_run_is_left(child, tmp_path):
    note = tmp_path / "note"
    ended, _ = child.run("badly", {"how": "fork", "note": str(note)})
    assert ended.result == "success"
    assert identify(int(note.read_text())) is None
    assert descendants(child.process.pid) == []
    child.start()
    assert child.hear(SlotEnded)[0].result == "success"


def test_a_forked_child_that_speaks_for_its_parent_ends(shared):
    ended, words = shared.run("odd", {"how": "fork_a_speaker"})

    assert ended.result == "success"
    assert "I am not who I seem" not in [word.stage for word in words if isinstance(word, SlotProgress)]


def test_debug_logs_that_could_not_be_uploaded_are_told_of_with_the_result(shared):
    ended, _ = shared.run("odd", {"how": "lose_logs"})

    assert (ended.result, ended.artifacts) == ("success", [])
    assert ended.reason.text == "its debug logs could not be uploaded: OSError: no room for logs"


def test_a_run_keeps_to_the_limits_of_a_process_and_the_next_one_is_free_of_them(child):
    child.ready()
    child.start("odd", {"how": "need_memory"}, limits=Limits(memory=100_000_000), cpus=[0])
    ended, _ = child.hear(SlotEnded)
    assert (ended.result, ended.reason.status) == ("error", "memory")
    assert "with a limit of 100000000 bytes: the task raised MemoryError" in ended.reason.text
    assert os.sched_getaffinity(child.process.pid) == os.sched_getaffinity(0)
    ended, _ = child.run("odd", {"how": "need_memory"})

    assert ended.result == "success"


def test_a_slot_that_cannot_end_what_a_run_left_says_so_beside_the_result_and_ends_itself(child):
    ended, _ = child.run("odd", {"how": "leave_what_cannot_be_ended"})

    assert (ended.result, ended.left) == ("success", "process 7 is still there in state D")
    assert child.await_end() == 1


# ---------------------------------------------------------------- orders


def test_an_abort_ends_a_run_and_tells_why(shared, tmp_path):
    shared.ready()
    journal = tmp_path / "journal"
    shared.start("journal", {"journal": str(journal), "gate": str(tmp_path / "never")})
    eventually(journal.exists)
    shared.order(StopRun(token=shared.token, reason="not wanted"))
    ended, _ = shared.hear(SlotEnded)

    assert (ended.result, ended.reason.text) == ("aborted", "not wanted")
    assert [json.loads(line)["what"] for line in journal.read_text().splitlines()] == ["start"]


def test_an_abort_on_the_heels_of_its_run_is_not_missed_and_none_reaches_the_next_run(shared):
    shared.ready()
    shared.start("noop", {"duration": 1000})
    shared.order(StopRun(token=shared.token, reason="not wanted"))
    assert shared.hear(SlotEnded)[0].result == "aborted"
    shared.order(StopRun(token=shared.token, reason="too late"))

    assert shared.run("noop")[0].result == "success"


def test_a_renewed_run_goes_on_beyond_its_first_deadline(shared):
    shared.ready()
    shared.start("noop", {"duration": 1.2}, seconds=1)
    shared.order(Renew(token=shared.token, deadline_ns=boottime_ns() + 60 * SECOND))

    assert shared.hear(SlotEnded)[0].result == "success"


def test_a_renewal_that_comes_after_its_run_kills_no_idle_slot(shared):
    shared.run("noop")
    shared.ready()
    shared.order(Renew(token=shared.token, deadline_ns=1))
    with pytest.raises(subprocess.TimeoutExpired):
        shared.process.wait(0.5)
    shared.start()

    assert shared.hear(SlotEnded)[0].result == "success"


def test_runs_that_were_told_of_together_begin_one_after_the_other(shared, tmp_path):
    shared.ready()
    journal = tmp_path / "journal"
    gate = tmp_path / "gate"
    shared.start("journal", {"journal": str(journal), "gate": str(gate), "label": "first"})
    shared.start("journal", {"journal": str(journal), "label": "second"})
    shared.start("noop", {"result": "failure"})
    eventually(journal.exists)
    gate.touch()

    assert [shared.hear(SlotEnded)[0].result for _ in range(3)] == ["success", "success", "failure"]
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [(line["label"], line["what"]) for line in lines] == [
        ("first", "start"),
        ("first", "end"),
        ("second", "start"),
        ("second", "end"),
    ]


def test_what_has_not_begun_can_be_taken_back_and_what_has_goes_on(shared, tmp_path):
    shared.ready()
    journal, gate = tmp_path / "journal", tmp_path / "gate"
    shared.start("journal", {"journal": str(journal), "gate": str(gate)})
    behind = [shared.start("journal", {"journal": str(journal)}) for _ in range(2)]
    eventually(journal.exists)
    shared.order(Recall())
    recalled, _ = shared.hear(SlotRecalled)
    assert recalled.tokens == behind
    gate.touch()
    assert shared.hear(SlotEnded)[0].result == "success"
    last = shared.start("noop")
    ended, before = shared.hear(SlotEnded)

    assert (ended.result, before) == ("success", [])
    assert last not in recalled.tokens
    assert [json.loads(line)["what"] for line in journal.read_text().splitlines()] == ["start", "end"]
    shared.order(Recall())
    assert shared.hear(SlotRecalled)[0].tokens == []


def test_a_run_that_waits_behind_another_has_a_deadline_and_an_abort_of_its_own(child, tmp_path):
    """P2: it is ended by what it was told itself, and not by what was told of the one before it."""
    child.ready()
    journal, gate = tmp_path / "journal", tmp_path / "gate"
    child.start("journal", {"journal": str(journal), "gate": str(gate)}, seconds=0.8)
    first = child.token
    aborted = child.start("noop", {"duration": 1000})
    lapses = child.start("noop", {"duration": 1000}, seconds=3600)
    eventually(journal.exists)
    child.order(Renew(token=first, deadline_ns=boottime_ns() + 3600 * SECOND))
    child.order(StopRun(token=aborted, reason="not wanted"))
    child.order(Renew(token=lapses, deadline_ns=boottime_ns() + SECOND))
    with pytest.raises(subprocess.TimeoutExpired):
        child.process.wait(1.2)  # the first goes on behind the deadlines that it had, and that others have
    gate.touch()
    assert child.hear(SlotEnded)[0].result == "success"
    ended, _ = child.hear(SlotEnded)
    assert (ended.result, ended.reason.text) == ("aborted", "not wanted")

    assert child.await_end() == SLOT_LAPSED


def test_a_run_has_a_directory_when_it_asks_for_one_and_what_it_leaves_there_is_told(shared):
    assert shared.run("noop")[0].litter is False
    assert not (shared.directory / shared.token).exists()
    assert shared.run("noop", {"artifacts": [10]})[0].litter is False
    assert not (shared.directory / shared.token).exists()
    assert shared.run("odd", {"how": "leave_file"})[0].litter is True
    assert (shared.directory / shared.token).is_dir()


def test_a_run_without_room_for_its_directory_says_so(child):
    child.ready()
    in_the_way = child.directory / "file"
    in_the_way.touch()
    child.order(
        RunTask(
            token="t1",  # noqa: S106  # a token of a claim
            request=Request(id=str(uuid.uuid4()), task="noop", data={"artifacts": [1]}),
            attempt=1,
            inputs=[],
            directory=str(in_the_way / "t1"),
            deadline_ns=boottime_ns() + 60 * SECOND,
        )
    )
    ended, _ = child.hear(SlotEnded)

    assert ended.result == "error"
    assert ended.unfit.startswith(f"expected room for a run in {in_the_way}, got: ")


def await_deaf(child):
    """Wait until a task that ignores everything has its children, and return them."""
    child.ready()
    child.start("odd", {"how": "ignore_everything"}, seconds=1.5)
    while "deaf" not in shown([child.hear(SlotOutput)[0]]):
        pass
    eventually(lambda: len(descendants(child.process.pid)) >= 3)
    return descendants(child.process.pid)


def test_at_its_deadline_a_slot_ends_its_run_with_all_descendants_and_itself_whatever_the_task_does(child):
    """P2."""
    before = boottime_ns()
    family = await_deaf(child)
    child.order(StopRun(token=child.token, reason="it does not hear this"))

    assert child.await_end() == SLOT_LAPSED
    assert boottime_ns() >= before + int(1.5 * SECOND)
    assert not [one for one in family if identify(one.pid) == one]


@pytest.mark.parametrize("how", ["closed", "nonsense"])
def test_a_slot_whose_orders_end_or_make_no_sense_ends_with_all_descendants(child, how):
    family = await_deaf(child)
    child.order(Renew(token=child.token, deadline_ns=boottime_ns() + 3600 * SECOND))
    if how == "closed":
        child.process.stdin.close()
    else:
        child.process.stdin.write(b"this is no order\n")
        child.process.stdin.flush()

    assert child.await_end() == 1
    assert not [one for one in family if identify(one.pid) == one]


def test_an_idle_slot_ends_when_its_agent_is_gone(child):
    child.ready()
    child.process.stdin.close()

    assert child.await_end() == 1


# ---------------------------------------------------------------- the look at the host


def test_the_look_at_the_host_says_what_it_can_do_and_what_is_broken_and_nothing_else(tmp_path):
    (tmp_path / "chatty_tasks.py").write_text("print('good morning')\n")
    modules = "live_tasks,broken_tasks,chatty_tasks"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mqworker.slot", "--analyze", str(tmp_path)],
        env=environment(tmp_path, modules),
        capture_output=True,
        timeout=PATIENCE,
        check=True,
    )
    analysis = decode(done.stdout, Analysis)

    assert {"noop", "journal", "badly"} <= analysis.tasks.keys()
    assert analysis.metadata["noop:version"] == analysis.tasks["noop"] == 1
    assert analysis.metadata["system:cpu_count"] >= 1
    assert "broken on purpose" in analysis.failures["broken_tasks"]
    assert b"good morning" in done.stderr
    with pytest.raises(PeerError):
        decode(done.stdout + done.stdout, Analysis)
