import hashlib
import threading
from pathlib import Path

import pytest

from mqworker.task import Reason, Task, TaskConfigError
from tasks.noop import Noop

DEADLINE = 20  # seconds in which a thing that must happen has happened


class Context:
    """What a slot gives, with real files; what was said and uploaded is kept."""

    def __init__(self, work_directory):
        self.work_directory = work_directory
        self.text = ""
        self.progress = []
        self.uploads = []
        self.progressed = threading.Event()

    def upload_artifact(self, *, category, name, data, files, relations=()):  # noqa: ARG002  # the slot's signature
        contents = {path: file.read_bytes() for path, file in files.items()}
        self.uploads.append((category, name, data, contents))
        return f"handle-{len(self.uploads)}"

    def report_progress(self, stage=None, fraction=None):
        self.progress.append((stage, fraction))
        self.progressed.set()

    def write_log(self, text):
        self.text += text

    def settle_log(self):
        """Nothing is printed here."""


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path)


@pytest.fixture
def noop(context):
    """Make a configured Noop that is attached to the context."""

    def noop(**task_data):
        task = Noop()
        task.configure(task_data)
        task.attach(context)
        return task

    return noop


def test_noop_is_registered():
    assert Task.class_from_name("noop") is Noop
    assert Noop.TASK_VERSION == 1
    assert Noop().analyze_worker() == {"noop:version": 1}
    assert Noop().can_run_on({"noop:version": 1})
    assert not Noop().can_run_on({"noop:version": 2})


def test_nothing_asked_for_is_success_and_nothing_else(noop, context):
    assert noop().execute() is True
    assert context.uploads == []
    assert context.progress == []
    assert context.text == ""
    assert list(context.work_directory.iterdir()) == []


def test_a_failure_has_a_reason(noop):
    task = noop(result="failure")

    assert task.execute() is False
    assert task.reason == Reason(text="this request asked for a failure", stage="run")


def test_an_error_is_raised(noop):
    with pytest.raises(RuntimeError, match="asked for an error"):
        noop(result="error").execute()


def test_progress_is_reported_in_steps(noop, context):
    assert noop(progress=4, duration=0.02).execute() is True
    assert context.progress == [("run", 0.25), ("run", 0.5), ("run", 0.75), ("run", 1.0)]


def test_lines_are_seen_live_and_kept_in_a_debug_log(noop, context):
    assert noop(log_lines=3).execute() is True
    lines = "INFO: line 1 of 3\nINFO: line 2 of 3\nINFO: line 3 of 3\n"
    assert context.text == lines
    assert context.uploads == [("mqworker:debug-logs", "noop-logs", {}, {"task.log": lines.encode()})]


def test_artifacts_have_their_sizes_and_contents_of_their_own(noop, context):
    assert noop(artifacts=[100_000, 100_000, 5, 0]).execute() is True
    assert [(category, name, data) for category, name, data, _ in context.uploads] == [
        ("mqworker:noop-output", f"output-{number}", {"number": number, "size": size})
        for number, size in enumerate([100_000, 100_000, 5, 0])
    ]

    contents = [files[name] for _, name, _, files in context.uploads]

    assert [len(content) for content in contents] == [100_000, 100_000, 5, 0]
    assert len({hashlib.sha256(content).digest() for content in contents}) == 4


def test_the_same_seed_gives_the_same_artifacts_and_another_others(noop, context):
    noop(artifacts=[50]).execute()
    noop(artifacts=[50], seed=0).execute()
    noop(artifacts=[50], seed=1).execute()
    first, same, other = (files["output-0"] for _, _, _, files in context.uploads)

    assert first == same
    assert first != other


def test_a_large_artifact_takes_no_space(noop, context):
    blocks = []
    context.upload_artifact = lambda *, files, **_: blocks.append(files["output-0"].stat().st_blocks)

    assert noop(artifacts=[2**31]).execute() is True
    assert blocks[0] * 512 < 2**20


def test_memory_is_taken_for_real(noop, context):
    taken = []

    def measure(**_):
        status = Path("/proc/self/status").read_text()
        taken.append(int(status.split("VmRSS:")[1].split()[0]))

    context.report_progress = measure
    noop(progress=1).execute()
    noop(progress=1, memory=100_000_000).execute()

    assert taken[1] - taken[0] > 50_000


def test_an_abort_ends_the_wait_at_once_and_makes_no_artifacts(noop, context):
    task = noop(duration=100_000, progress=10_000, artifacts=[5])
    runner = threading.Thread(target=task.execute, daemon=True)
    runner.start()
    task.abort()
    runner.join(DEADLINE)

    assert not runner.is_alive()
    assert context.uploads == []


@pytest.mark.parametrize(
    ("task_data", "path"),
    [
        ({"result": "maybe"}, "$.result"),
        ({"duration": -1}, "$.duration"),
        ({"duration": "1"}, "$.duration"),
        ({"progress": 1.5}, "$.progress"),
        ({"log_lines": -1}, "$.log_lines"),
        ({"artifacts": [1, -1]}, "$.artifacts[1]"),
        ({"memory": -1}, "$.memory"),
        ({"unknown": 1}, "$"),
    ],
)
def test_other_task_data_is_refused(task_data, path):
    with pytest.raises(TaskConfigError) as raised:
        Noop().configure(task_data)

    assert str(raised.value).startswith(f"task data of 'noop': {path}: expected ")
