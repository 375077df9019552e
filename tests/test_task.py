import contextlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import jsonschema
import pytest

import mqworker
import tasks
from mqworker import processes, task
from mqworker.errors import HostUnfit, OperatorError
from mqworker.task import FetchExecUploadMixin, Reason, Task, TaskConfigError, TaskRunCommandMixin

DEADLINE = 20  # seconds in which a thing that must happen has happened


class Context:
    """What a slot gives, with real files; what was said and uploaded is kept."""

    def __init__(self, work_directory):
        self.work_directory = work_directory
        self.text = ""
        self.stages = []
        self.uploads = []
        self.wrote = threading.Condition()

    def fetch_artifact(self, artifact_id, destination):
        (destination / f"{artifact_id}.dsc").write_text("x")

    def upload_artifact(self, *, category, name, data, files, relations=()):  # noqa: ARG002  # the slot's signature
        self.uploads.append((category, name, {path: file.read_text() for path, file in files.items()}))
        return f"handle-{len(self.uploads)}"

    def report_progress(self, stage=None, fraction=None):
        self.stages.append(stage if fraction is None else fraction)

    def write_log(self, text):
        with self.wrote:
            self.text += text
            self.wrote.notify_all()

    def settle_log(self):
        """Nothing is printed here."""

    def wait_for(self, text):
        with self.wrote:
            assert self.wrote.wait_for(lambda: text in self.text, DEADLINE)


@pytest.fixture(autouse=True)
def registry():
    """Let tests define tasks that nobody else sees."""
    task.load_tasks()
    kept = dict(Task._sub_tasks)
    yield Task._sub_tasks
    Task._sub_tasks.clear()
    Task._sub_tasks.update(kept)


@pytest.fixture
def context(tmp_path):
    return Context(tmp_path)


def python(code, **environment):
    """Run code in an interpreter of its own, where nothing is imported yet."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    return json.loads(done.stdout)


def make(**members):
    """Make an instance of a new task called Example."""
    return type("Example", (Task,), {"_execute": lambda _self: True, "__module__": __name__} | members)()


# ---------------------------------------------------------------- the registry


def test_a_task_registers_under_its_class_name_in_lower_case(registry):
    class SomeTask(Task):
        def _execute(self):
            return True

    assert registry["sometask"] is SomeTask
    assert SomeTask.name == "sometask"
    assert SomeTask().name == "sometask"


def test_the_task_is_handed_on_by_both_packages():
    assert mqworker.Task is tasks.Task is Task
    assert mqworker.TaskConfigError is tasks.TaskConfigError is TaskConfigError


def test_an_abstract_task_does_not_register_and_its_concrete_child_does(registry):
    class AbstractTask(Task):
        @abstractmethod
        def hook(self):
            """Be overridden."""

        def _execute(self):
            return self.hook()

    class ConcreteTask(AbstractTask):
        def hook(self):
            return True

    assert "abstracttask" not in registry
    assert registry["concretetask"] is ConcreteTask


def test_mixins_do_not_register(registry):
    class OwnMixin(Task, mixin=True):
        pass

    class PlainMixin:
        def _execute(self):
            return True

    class Mixed(PlainMixin, OwnMixin, TaskRunCommandMixin, Task):
        pass

    assert registry["mixed"] is Mixed
    assert not {name for name in registry if name.endswith("mixin")}


def test_a_second_class_of_the_same_name_is_refused():
    make()

    with pytest.raises(AssertionError, match=r'^Two Tasks with the same name: "example"$'):
        make()


def test_the_same_class_may_register_again(registry):
    example = make()

    type(example).__init_subclass__()

    assert registry["example"] is type(example)


def test_a_concrete_task_that_does_nothing_fails_at_class_creation(registry):
    with pytest.raises(TypeError, match=r"Empty to override _execute\(\) or execute\(\), got neither"):
        type("Empty", (Task,), {})

    assert "empty" not in registry


def test_a_task_may_override_execute_itself(registry):
    class Bare(Task):
        def execute(self):
            return False

    assert registry["bare"]().execute() is False


def test_an_invalid_schema_fails_at_class_creation(registry):
    with pytest.raises(jsonschema.SchemaError) as raised:
        make(TASK_DATA_SCHEMA={"type": "no such type"})

    assert raised.value.__notes__ == [f"This is TASK_DATA_SCHEMA of the task Example in {__name__}."]
    assert "example" not in registry


def test_a_class_is_found_by_its_name_in_any_case():
    assert Task.class_from_name("NOOP") is importlib.import_module("tasks.noop").Noop
    assert Task.is_valid_task_name("Noop")


def test_an_unknown_name_is_no_task():
    with pytest.raises(ValueError, match=r"^'nope' is not a registered task_name$"):
        Task.class_from_name("nope")

    assert not Task.is_valid_task_name("nope")


def test_tasks_are_imported_on_the_first_need_and_not_before():
    found = python("""
        import json, sys
        from mqworker.task import Task
        before = "tasks.noop" in sys.modules
        print(json.dumps([before, Task.is_valid_task_name("noop"), "tasks.noop" in sys.modules]))
        """)

    assert found == [False, True, True]


def test_the_task_api_loads_no_broker_no_ledger_no_store_and_no_command_line():
    loaded = python("""
        import json, sys
        import mqworker.task
        print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
        """)

    assert "mqworker" in loaded
    assert not {"pika", "sqlalchemy", "obstore", "typer", "rich", "prometheus_client", "tasks"} & set(loaded)


def test_a_module_that_does_not_import_is_reported_and_hides_no_other(tmp_path):
    good = "from mqworker.task import Task\nclass {}(Task):\n    def _execute(self): return True\n"
    (tmp_path / "also").mkdir()
    (tmp_path / "also" / "aaa_broken.py").write_text(good.format("HalfTask") + "import no_such_module\n")
    (tmp_path / "also" / "exits.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "also" / "zzz_good.py").write_text(good.format("GoodTask"))
    found = python(
        f"""
        import json, logging, tasks
        logging.disable()
        tasks.__path__.append({str(tmp_path / "also")!r})
        from mqworker.task import Task, load_tasks
        names = ["noop", "goodtask", "halftask"]
        print(json.dumps([load_tasks(), [Task.is_valid_task_name(name) for name in names]]))
        """
    )

    assert found == [
        {
            "tasks.aaa_broken": "ModuleNotFoundError: No module named 'no_such_module'",
            "tasks.exits": "SystemExit: 3",
        },
        [True, True, False],
    ]


def test_installed_packages_and_a_variable_add_tasks(tmp_path):
    for name in ("alpha", "beta", "gamma"):
        (tmp_path / f"{name}_tasks.py").write_text(
            f"from mqworker.task import Task\nclass {name}(Task):\n    def _execute(self): return True\n"
        )
    info = tmp_path / "gamma-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gamma\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mqworker.tasks]\ngood = gamma_tasks\nbad = no_such_tasks\n")
    found = python(
        """
        import json, logging
        logging.disable()
        from mqworker.task import Task, load_tasks
        print(json.dumps([load_tasks(), [Task.is_valid_task_name(name) for name in ("alpha", "beta", "gamma")]]))
        """,
        PYTHONPATH=str(tmp_path),
        MQWORKER_TASK_MODULES=" alpha_tasks,beta_tasks, missing_tasks,",
    )

    assert found == [
        {
            "bad (no_such_tasks)": "ModuleNotFoundError: No module named 'no_such_tasks'",
            "missing_tasks": "ModuleNotFoundError: No module named 'missing_tasks'",
        },
        [True, True, True],
    ]


def test_another_package_called_tasks_is_not_taken_for_ours(tmp_path):
    (tmp_path / "tasks.py").write_text("")
    found = python(
        """
        import json
        from mqworker.errors import OperatorError
        from mqworker.task import load_tasks
        try:
            load_tasks()
        except OperatorError as error:
            print(json.dumps(str(error)))
        """,
        PYTHONPATH=str(tmp_path),
    )

    assert found.startswith("expected the package `tasks` of mqworker, got <module 'tasks' from ")


# ---------------------------------------------------------------- configuration

SCHEMA = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 1},
        "inner": {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}},
        "kind": {"enum": ["any", "all"]},
        "list": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["count"],
    "additionalProperties": False,
}


def test_valid_data_is_kept_as_an_own_copy():
    example = make(TASK_DATA_SCHEMA=SCHEMA)
    data = {"count": 1, "list": [1]}
    example.configure(data)
    data["list"].append("changed")

    assert example.data == {"count": 1, "list": [1]}


def test_the_empty_schema_accepts_anything():
    example = make()
    example.configure({"whatever": [1, None]})

    assert example.data == {"whatever": [1, None]}


def test_every_error_is_named_with_its_path_what_was_expected_and_what_was_given():
    example = make(TASK_DATA_SCHEMA=SCHEMA)

    with pytest.raises(TaskConfigError) as raised:
        example.configure({"inner": {"day": "30 Feb"}, "kind": "some", "list": [1, "two"], "foo": 5})

    given = '{"inner": {"day": "30 Feb"}, "kind": "some", "list": [1, "two"], "foo": 5}'
    assert str(raised.value).split("; ") == [
        f'task data of \'example\': $: expected the properties ["count"], of which ["count"] are missing, got {given}',
        '$: expected no properties but ["count", "inner", "kind", "list"], got {"foo": 5}',
        '$.inner.day: expected format "date", got "30 Feb"',
        '$.kind: expected one of ["any", "all"], got "some"',
        '$.list[1]: expected type "integer", got "two"',
    ]
    assert isinstance(raised.value.original_exception, jsonschema.ValidationError)
    assert raised.value.__cause__ is raised.value.original_exception
    assert example.data == {}


def test_a_million_errors_and_a_long_value_make_a_text_of_bearable_length():
    example = make(TASK_DATA_SCHEMA=SCHEMA)

    with pytest.raises(TaskConfigError, match=r"and 901 more$") as raised:
        example.configure({"count": 0, "list": ["x" * 10_000] * 1000})

    assert len(str(raised.value)) < 50_000


def test_the_validator_is_built_once_for_a_class():
    example = make(TASK_DATA_SCHEMA=SCHEMA)

    assert example._validator is type(example)._validator
    assert type(example)._validator is type(example)()._validator


def test_the_error_may_carry_what_caused_it():
    cause = ValueError("x")

    assert TaskConfigError("text", cause).original_exception is cause
    assert TaskConfigError("text").original_exception is None
    assert str(TaskConfigError("text")) == "text"


def test_a_task_needs_no_artifacts_and_a_lease_of_a_minute_unless_it_says_so():
    assert make().input_artifact_ids() == []
    assert Task.LEASE == 60
    assert Task.INPUT_ARTIFACT_CATEGORY is None
    assert Task.TASK_VERSION is None
    assert Task.TASK_DATA_SCHEMA == {}


# ---------------------------------------------------------------- metadata and matching


def test_a_task_reports_its_version_under_its_own_name():
    example = make(TASK_VERSION=3)

    assert example.analyze_worker() == {"example:version": 3}
    assert example.prefix_with_task_name("x") == "example:x"


@pytest.mark.parametrize(
    ("ours", "metadata", "can"),
    [
        (1, {"example:version": 1}, True),
        (1, {"example:version": 2}, False),
        (1, {}, False),
        (None, {"example:version": None}, True),
        (None, {}, True),
        (None, {"example:version": 1}, False),
    ],
)
def test_a_task_runs_where_its_version_is_the_same(ours, metadata, can):
    assert make(TASK_VERSION=ours).can_run_on(metadata) is can


def test_the_tasks_of_a_worker_are_joined_and_one_that_fails_hides_no_other(registry, caplog):
    registry.clear()
    type("Good", (Task,), {"_execute": bool, "TASK_VERSION": 2})
    type("Raising", (Task,), {"_execute": bool, "analyze_worker": lambda _self: 1 // 0})
    type("Wordless", (Task,), {"_execute": bool, "analyze_worker": lambda _self: None})
    type("Unspeakable", (Task,), {"_execute": bool, "analyze_worker": lambda _self: {"unspeakable:path": Path("/")}})

    analysis = Task.analyze_worker_tasks()

    assert analysis.metadata == Task.analyze_worker_all_tasks() == {"good:version": 2}
    assert analysis.tasks == {"good": 2}
    assert analysis.failures == {
        "raising": "ZeroDivisionError: integer division or modulo by zero",
        "unspeakable": "TypeError: Object of type PosixPath is not JSON serializable",
        "wordless": "TypeError: expected analyze_worker() to return a dictionary with text keys, got None",
    }
    assert {record.task for record in caplog.records} == {"raising", "unspeakable", "wordless"}


def test_metadata_is_what_the_scheduler_will_see(registry):
    registry.clear()
    type("Tuples", (Task,), {"_execute": bool, "analyze_worker": lambda _self: {"tuples:all": (1, 2)}})

    assert Task.analyze_worker_all_tasks() == {"tuples:all": [1, 2]}


def test_two_tasks_may_agree_on_a_key_but_not_differ(registry):
    registry.clear()
    type("One", (Task,), {"_execute": bool, "analyze_worker": lambda _self: {"shared": 1, "compiler": 12}})
    type("Two", (Task,), {"_execute": bool, "analyze_worker": lambda _self: {"shared": 1}})

    assert Task.analyze_worker_all_tasks() == {"shared": 1, "compiler": 12}

    type("Three", (Task,), {"_execute": bool, "analyze_worker": lambda _self: {"compiler": 13}})

    with pytest.raises(OperatorError, match="'compiler', got 12 from the task 'one' and 13 from the task 'three'"):
        Task.analyze_worker_all_tasks()


# ---------------------------------------------------------------- execution and logs


@pytest.mark.parametrize("result", [True, False])
def test_execute_returns_what_the_work_returns_and_uploads_the_debug_logs(context, result):
    def work(self):
        self.append_to_log_file("one.log", ["a", "b"])
        self.append_to_log_file("two.log", ["c"])
        return result

    example = make(_execute=work)
    example.attach(context)

    assert example.execute() is result
    assert context.uploads == [("mqworker:debug-logs", "example-logs", {"one.log": "a\nb\n", "two.log": "c\n"})]


def test_what_the_logger_gets_and_the_traceback_of_an_error_are_live_and_kept(context):
    def work(self):
        self.logger.warning("on %s", "fire")
        raise KeyError("the task's own")

    example = make(_execute=work)
    example.attach(context)
    with pytest.raises(KeyError):
        example.execute()
    [(_, _, logs)] = context.uploads

    assert logs["task.log"].startswith("WARNING: on fire\nERROR: the task raised\nTraceback")
    assert 'KeyError: "the task\'s own"' in logs["task.log"]
    assert context.text == logs["task.log"]


def test_debug_logs_are_uploaded_after_an_exception_too(context):
    def work(self):
        self.append_to_log_file("one.log", ["a"])
        raise KeyError("the task's own")

    example = make(_execute=work)
    example.attach(context)

    with pytest.raises(KeyError, match="the task's own"):
        example.execute()

    assert len(context.uploads) == 1


@pytest.mark.parametrize("raises", [True, False])
def test_a_log_upload_that_fails_changes_no_result_and_masks_no_exception(context, raises):
    def work(self):
        self.append_to_log_file("one.log", ["a"])
        if raises:
            raise KeyError("the task's own")
        return False

    def refuse(**_):
        raise OSError("store is full")

    example = make(_execute=work)
    example.attach(context)
    context.upload_artifact = refuse

    if raises:
        with pytest.raises(KeyError, match="the task's own"):
            example.execute()
    else:
        assert example.execute() is False

    assert example.debug_logs_problem == "OSError: store is full"
    assert "the debug logs could not be uploaded" in context.text


def test_without_debug_logs_nothing_is_uploaded(context):
    example = make()
    example.attach(context)

    assert example.execute() is True
    assert context.uploads == []


def test_a_forgotten_return_is_no_verdict(context):
    example = make(_execute=lambda _self: None)
    example.attach(context)

    with pytest.raises(TypeError, match="to return True or False, got None"):
        example.execute()


def test_a_task_without_a_context_says_so():
    with pytest.raises(RuntimeError, match=r"'example' to have a context; call attach\(context\) first"):
        _ = make().world


def test_the_work_says_why_it_ends_so():
    example = make()

    assert example.reason is None
    assert example.try_again is False

    example.conclude("the build failed", stage="run", exit_code=2, status="attempted", line="E: x", try_again=True)

    assert example.reason == Reason(text="the build failed", stage="run", exit_code=2, status="attempted", line="E: x")
    assert example.try_again is True


def test_an_abort_is_for_good_and_may_come_from_another_thread():
    example = make()

    assert example.aborted is False

    aborter = threading.Thread(target=example.abort)
    aborter.start()

    assert example.wait_aborted(DEADLINE) is True

    aborter.join()
    example.abort()

    assert example.aborted is True
    with pytest.raises(AttributeError):
        example.aborted = False


def test_a_debug_log_is_the_same_file_for_the_same_name():
    example = make()
    with example.open_debug_log_file("a.log") as file:
        file.write("one\n")
    with example.open_debug_log_file("a.log", mode="ab") as file:
        file.write(b"two\xff\n")
    example.append_to_log_file("a.log", ["three \udcff"])

    path = Path(file.name)

    assert path.read_bytes() == b"one\ntwo\xff\nthree \\udcff\n"

    with example.open_debug_log_file("a.log", mode="w"):
        pass

    assert path.read_bytes() == b""


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a..b", "new\nline", "nul\0"])
def test_a_debug_log_stays_in_its_directory(name):
    with pytest.raises(ValueError, match="expected a log file name"):
        make().open_debug_log_file(name)


def test_a_debug_log_is_for_writing():
    with pytest.raises(ValueError, match="expected one of the modes a, ab, w, wb, x, xb, got 'r'"):
        make().open_debug_log_file("a.log", mode="r")


def test_debug_logs_go_with_the_task():
    example = make()
    with example.open_debug_log_file("a.log") as file:
        directory = Path(file.name).parent

    assert directory.is_dir()

    del example

    assert not directory.exists()


def test_what_a_task_logs_goes_to_the_live_log_and_to_logging(context, caplog):
    example = make()
    example.logger.info("before it is attached")
    example.attach(context)
    example.logger.info("hello %s", "there")
    example.logger.debug("too much")

    assert isinstance(example.logger, logging.Logger)
    assert example.logger.name == "tasks.example"
    assert context.text == "INFO: hello there\n"
    assert [record.getMessage() for record in caplog.records] == ["before it is attached", "hello there"]


def test_one_run_does_not_log_to_another(tmp_path):
    first, second = make(), None
    second = type(first)()
    first.attach(Context(tmp_path))
    second.attach(Context(tmp_path))
    first.logger.warning("mine")

    assert first.context.text == "WARNING: mine\n"
    assert second.context.text == ""


def test_the_one_file_that_ends_so_is_found(tmp_path):
    (tmp_path / "a.dsc").touch()
    (tmp_path / "b.txt").touch()
    (tmp_path / "link.dsc").symlink_to("a.dsc")
    (tmp_path / "directory.dsc").mkdir()
    (tmp_path / "directory.dsc" / "below.dsc").touch()

    assert make().find_file_by_suffix(tmp_path, ".dsc") == tmp_path / "a.dsc"


@pytest.mark.parametrize("names", [[], ["b.txt", "a.txt"], ["b.dsc", "a.dsc"]])
def test_no_file_or_several_that_end_so_are_logged(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    example = make()

    assert example.find_file_by_suffix(tmp_path, ".dsc") is None
    with example.open_debug_log_file("configure_for_execution.log") as file:
        line = f"There must be one *.dsc file. Current files: {sorted(names)}\n"
        assert Path(file.name).read_text() == line


# ---------------------------------------------------------------- running commands


@pytest.fixture
def command(context):
    class Command(TaskRunCommandMixin, Task):
        TERMINATE_GRACE: ClassVar[float] = 0.2

        def _execute(self):
            return True

    command = Command()
    command.attach(context)
    return command


@pytest.fixture
def directory(tmp_path):
    directory = tmp_path / "directory"
    directory.mkdir()
    return directory


def log_of(command):
    with command.open_debug_log_file("cmd-output.log") as file:
        return Path(file.name).read_text(errors="replace")


def pid_in(directory):
    """Wait until a command has written its pid into a file, all at once."""
    file = directory / "pid"
    deadline = time.monotonic() + DEADLINE
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return int(file.read_text())


def test_a_command_is_logged_with_its_output_its_end_and_its_files(command, directory):
    (directory / "there.txt").write_text("12345")

    assert command.run_cmd(["sh", "-c", "echo out; echo err >&2; exit 3"], directory) == 3
    assert (
        log_of(command)
        == command.context.text
        == textwrap.dedent(f"""\
        cmd: sh -c 'echo out; echo err >&2; exit 3'
        output:
        out
        err
        aborted: False
        returncode: 3
        files in {directory}:
          there.txt (5 bytes)
        {"-" * 72}
        """)
    )
    assert command.last_returncode == 3


def test_commands_share_one_log(command, directory):
    command.run_cmd(["echo", "one"], directory)
    command.run_cmd(["printf", "two"], directory)

    assert log_of(command).count("returncode: 0\n") == 2
    assert "output:\ntwo\naborted" in log_of(command)


def test_the_output_is_seen_while_the_command_runs(command, directory):
    runner = threading.Thread(target=command.run_cmd, args=(["sh", "-c", "echo early; exec sleep 1000"], directory))
    runner.start()
    command.context.wait_for("early\n")

    assert "early\n" in log_of(command)
    assert runner.is_alive()

    command.abort()
    runner.join(DEADLINE)

    assert not runner.is_alive()


def test_a_character_that_comes_in_two_pieces_is_one_and_what_is_no_text_is_marked(command, directory):
    command.run_cmd(
        [
            sys.executable,
            "-c",
            r"""
import os, time
os.write(1, b"\xc3"); time.sleep(0.05); os.write(1, b"\xa9 \xff")
""",
        ],
        directory,
    )

    assert "é \N{REPLACEMENT CHARACTER}\n" in command.context.text


def test_there_is_no_shell_no_input_and_a_session_of_its_own(command, directory):
    code = "import os, sys; print(sys.argv[1], sys.stdin.read() == '', os.getsid(0) == os.getpid(), os.getcwd())"
    command.run_cmd([sys.executable, "-c", code, "$HOME; ls"], directory)

    assert f"$HOME; ls True True {directory}\n" in command.context.text


def test_a_command_as_one_text_is_refused(command, directory):
    with pytest.raises(TypeError, match="expected a list"):
        command.run_cmd("ls -l", directory)


def test_the_environment_is_the_one_given_or_our_own(command, directory, monkeypatch):
    monkeypatch.setenv("OURS", "1")
    command.run_cmd(["/bin/sh", "-c", 'echo "[$OURS$GIVEN]"'], directory)
    command.run_cmd(["/bin/sh", "-c", 'echo "[$OURS$GIVEN]"'], directory, env={"GIVEN": "2"})

    assert "\n[1]\n" in command.context.text
    assert "\n[2]\n" in command.context.text


def test_the_standard_output_can_go_to_a_file(command, directory):
    script = "printf 'a\\0b'; echo err >&2"

    assert command.run_cmd(["sh", "-c", script], directory, capture_stdout_filename="out.bin") == 0
    assert (directory / "out.bin").read_bytes() == b"a\0b"
    assert "stdout: in out.bin\noutput:\nerr\naborted" in command.context.text


def test_a_captured_output_is_not_written_through_a_link(command, directory, tmp_path):
    (directory / "out").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OSError, match="out"):
        command.run_cmd(["echo", "x"], directory, capture_stdout_filename="out")

    assert not (tmp_path / "elsewhere").exists()


def test_a_command_that_cannot_start_is_logged_and_an_error(command, directory):
    with pytest.raises(HostUnfit, match=r"expected to run 'no-such-program' in .* could not be started"):
        command.run_cmd(["no-such-program", "x"], directory)

    assert "cmd: no-such-program x\noutput:\nmqworker.errors.HostUnfit: expected to run" in log_of(command)
    assert f"aborted: False\nreturncode: None\nfiles in {directory}:\n{'-' * 72}\n" in log_of(command)


def test_a_command_in_a_missing_directory_is_logged_and_an_error(command, directory):
    with pytest.raises(HostUnfit, match="missing"):
        command.run_cmd(["true"], directory / "missing")

    assert "No such file or directory" in log_of(command)


def test_after_a_failed_start_the_next_command_runs(command, directory):
    with pytest.raises(HostUnfit):
        command.run_cmd(["no-such-program"], directory)

    assert command.run_cmd(["true"], directory) == 0


def test_a_signal_that_ends_the_command_is_its_exit_code(command, directory):
    assert command.run_cmd(["sh", "-c", "kill -SEGV $$"], directory) == -signal.SIGSEGV


def test_an_abort_lets_the_command_end_in_its_own_way(command, directory):
    command.TERMINATE_GRACE = 600
    script = "trap 'echo ending; exit 0' TERM; echo ready; while :; do sleep 0.01; done"
    results = []
    runner = threading.Thread(target=lambda: results.append(command.run_cmd(["sh", "-c", script], directory)))
    runner.start()
    command.context.wait_for("ready\n")
    command.abort()
    runner.join(DEADLINE)

    assert results == [None]
    assert "ending\naborted: True\nreturncode: None\n" in log_of(command)
    assert command.last_returncode is None


def test_an_abort_kills_every_descendant_whatever_its_session_and_whatever_it_ignores(command, directory):
    script = """
        trap '' TERM
        setsid sh -c "trap '' TERM; sleep 1000 & echo \\$\\$ > tmp; mv tmp pid; sleep 1000" &
        sleep 1000 & sleep 1000
        """
    results = []
    others = processes.descendants(os.getpid())
    runner = threading.Thread(target=lambda: results.append(command.run_cmd(["sh", "-c", script], directory)))
    runner.start()
    deep = pid_in(directory)
    family = [process for process in processes.descendants(os.getpid()) if process not in others]
    command.abort()
    runner.join(DEADLINE)

    assert results == [None]
    assert deep in [process.pid for process in family]
    assert [process for process in family if processes.identify(process.pid) == process] == []


def test_after_an_abort_no_command_starts(command, directory):
    command.abort()

    assert command.run_cmd(["touch", "started"], directory) is None
    assert "cmd: touch started\noutput:\naborted: True\nreturncode: None\n" in log_of(command)
    assert list(directory.iterdir()) == []


def test_a_command_ends_at_its_timeout_and_the_reason_says_so(command, directory):
    script = "trap 'exit 0' TERM; while :; do sleep 0.01; done"

    assert command.run_cmd(["sh", "-c", script], directory, timeout=0.1) is None
    assert command.last_timed_out
    assert command.reason.text == "the command 'sh' was ended at its timeout of 0.1 s"
    assert "aborted: False\ntimed out: after 0.1 s\nreturncode: None\n" in log_of(command)
    assert command.run_cmd(["true"], directory, timeout=DEADLINE) == 0
    assert not command.last_timed_out


def test_a_daemon_that_is_left_is_ended_and_does_not_hold_up_the_end(command, directory):
    script = "(setsid sh -c 'trap \"\" TERM; echo $$ > pid; echo from the daemon; sleep 1000' &) ; "
    script += "while ! test -s pid; do sleep 0.01; done; exit 4"

    assert command.run_cmd(["sh", "-c", script], directory) == 4
    assert processes.identify(int((directory / "pid").read_text())) is None


def test_a_stranger_who_holds_the_pipe_does_not_hold_up_the_end(command, directory):
    script = "echo said; echo $$ > tmp; mv tmp pid; until test -e go; do sleep 0.01; done"
    results = []
    runner = threading.Thread(target=lambda: results.append(command.run_cmd(["sh", "-c", script], directory)))
    runner.start()
    with Path(f"/proc/{pid_in(directory)}/fd/1").open("wb"):  # as a service that the command handed its output to
        (directory / "go").touch()
        runner.join(DEADLINE)

        assert results == [0]

    assert "output:\nsaid\naborted" in command.context.text


def test_what_ran_before_the_command_is_left_alone(command, directory):
    with subprocess.Popen(["sh", "-c", "sleep 1000 & wait"]) as before:
        command.run_cmd(["sh", "-c", "setsid sleep 1000 & exit"], directory)

        assert before.poll() is None
        assert processes.identify(before.pid) is not None

        processes.kill_tree(processes.identify(before.pid))


def test_all_that_the_command_wrote_before_its_end_is_logged(command, directory):
    code = """
import fcntl, os
open("tmp", "w").write(str(os.getpid()))
os.rename("tmp", "pid")
fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 2**20)
os.write(1, b"x" * 500_000 + b"last")
"""
    passed = command.context.write_log

    def write_log_when_the_command_has_ended(text):
        if text.startswith("x"):
            deadline = time.monotonic() + DEADLINE
            while processes.identify(pid_in(directory)):
                assert time.monotonic() < deadline
        passed(text)

    command.context.write_log = write_log_when_the_command_has_ended

    assert command.run_cmd([sys.executable, "-c", code], directory) == 0
    assert f"\n{'x' * 500_000}last\naborted: False\n" in log_of(command)


def test_a_process_that_was_no_subreaper_finds_what_its_command_left(tmp_path):
    script = "(setsid sh -c 'echo $$ > tmp; mv tmp pid; sleep 1000' &); until test -e pid; do sleep 0.01; done"
    code = f"""
        import json
        from pathlib import Path
        from mqworker.processes import identify
        from mqworker.task import Task, TaskRunCommandMixin
        class Command(TaskRunCommandMixin, Task):
            def _execute(self): return True
        Command().run_cmd(["sh", "-c", {script!r}], Path({str(tmp_path)!r}))
        print(json.dumps(identify(int(Path({str(tmp_path / "pid")!r}).read_text())) is None))
        """

    assert python(code) is True


def test_output_beyond_measure_takes_no_memory(tmp_path):
    code = f"""
        import json, resource
        from pathlib import Path
        from mqworker.task import Task, TaskRunCommandMixin
        class Chatty(TaskRunCommandMixin, Task):
            def _execute(self): return True
        class Context:
            work_directory = Path({str(tmp_path)!r})
            heard = 0
            def write_log(self, text): self.heard += len(text)
            def settle_log(self): pass
        chatty = Chatty()
        chatty.attach(Context())
        chatty.run_cmd(["true"], chatty.context.work_directory)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        chatty.run_cmd(["head", "-c", "200000000", "/dev/zero"], chatty.context.work_directory)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps([chatty.context.heard, after - before]))
        """
    heard, grown_kib = python(code)

    assert heard > 200_000_000
    assert grown_kib < 20_000


def test_one_process_runs_one_command_at_a_time(command, directory):
    runner = threading.Thread(target=command.run_cmd, args=(["sh", "-c", "echo ready; exec sleep 1000"], directory))
    runner.start()
    command.context.wait_for("ready\n")
    other = type(command)()

    with pytest.raises(RuntimeError, match="expected one command at a time in one process, got true while another"):
        other.run_cmd(["true"], directory)

    command.abort()
    runner.join(DEADLINE)

    assert other.run_cmd(["true"], directory) == 0


def test_a_live_log_that_fails_ends_the_command(command, directory):
    def fail(text):
        if text == "ready\n":
            raise ConnectionError("nobody listens")

    command.context.write_log = fail

    with pytest.raises(ConnectionError):
        command.run_cmd(["sh", "-c", "echo $$ > pid; echo ready; exec sleep 1000"], directory)

    assert processes.identify(pid_in(directory)) is None


# ---------------------------------------------------------------- fetch, configure, run, check, upload


class Stages(FetchExecUploadMixin, Task, mixin=True):
    """Does all five stages; `trouble` maps a stage to what goes wrong in it."""

    def __init__(self):
        super().__init__()
        self.trouble = {}
        self.seen = []

    def _do(self, stage, directory):
        self.seen.append(stage)
        self.directories = [*getattr(self, "directories", []), directory]
        return self.trouble.get(stage, lambda: True)()

    def fetch_input(self, destination):
        self.world.fetch_artifact(7, destination)
        return self._do("fetch", destination)

    def configure_for_execution(self, download_directory):
        assert self.find_file_by_suffix(download_directory, ".dsc")
        return self._do("configure", download_directory)

    def run(self, execute_directory):
        assert list(execute_directory.iterdir()) == []
        (execute_directory / "build.log").write_text("made")
        return self._do("run", execute_directory)

    def check_directory_for_consistency_errors(self, build_directory):
        found = self._do("check", build_directory)
        return [] if found is True else found

    def upload_artifacts(self, execute_directory, *, execution_success):
        self.execution_success = execution_success
        self.world.upload_artifact(
            category="mqworker:x", name="x", data={}, files={"build.log": execute_directory / "build.log"}
        )
        return self._do("upload", execute_directory)


def raise_fault():
    raise LookupError("at fault")


@pytest.fixture
def staged(context):
    staged = type("Staged", (Stages,), {})()
    staged.attach(context)
    return staged


ALL = ["fetch", "configure", "run", "check", "upload"]


def test_the_five_stages_run_in_order_and_are_shown_and_stamped(staged, context):
    assert staged.execute() is True
    assert staged.seen == context.stages == ALL
    assert staged.execution_success is True
    assert staged.reason is None
    assert context.uploads[0] == ("mqworker:x", "x", {"build.log": "made"})

    category, name, logs = context.uploads[1]

    assert (category, name, list(logs)) == ("mqworker:debug-logs", "staged-logs", ["stages.log"])
    lines = [line.split(" ", 1) for line in logs["stages.log"].splitlines()]
    assert [text.split(" after")[0] for _, text in lines] == [f"{s}: {w}" for s in ALL for w in ("started", "done")]
    assert all(stamp.endswith("+00:00") for stamp, _ in lines)
    assert logs["stages.log"] in context.text


@pytest.mark.parametrize(
    ("stage", "seen"),
    [("fetch", 1), ("configure", 2), ("run", 5), ("check", 5), ("upload", 5)],
)
def test_a_hook_that_returns_false_is_a_failure_that_names_its_stage(staged, stage, seen):
    staged.trouble[stage] = lambda: False

    assert staged.execute() is False
    assert staged.seen == ALL[:seen]
    assert staged.reason.stage == stage


@pytest.mark.parametrize(("stage", "seen"), [("fetch", 1), ("configure", 2), ("run", 3), ("check", 4), ("upload", 5)])
def test_a_hook_that_raises_is_an_error_with_its_traceback_in_a_log(staged, context, stage, seen):
    staged.trouble[stage] = raise_fault

    with pytest.raises(LookupError, match="at fault"):
        staged.execute()

    assert staged.seen == ALL[:seen]
    assert staged.reason == Reason(text="LookupError: at fault", stage=stage)
    log = context.uploads[-1][2][f"{stage}.log"]
    assert log.startswith("Traceback ")
    assert log.endswith("LookupError: at fault\n")


def test_what_a_failed_run_made_is_uploaded_and_known_to_be_of_a_failure(staged, context):
    staged.trouble["run"] = lambda: False

    assert staged.execute() is False
    assert staged.execution_success is False
    assert context.uploads[0] == ("mqworker:x", "x", {"build.log": "made"})


def test_inconsistent_files_are_a_failure_that_lists_what_is_wrong(staged, context):
    staged.trouble["check"] = lambda: ["a.deb is missing", "b.deb has another size"]

    assert staged.execute() is False
    assert staged.execution_success is False
    assert staged.reason.stage == "check"
    assert "a.deb is missing; b.deb has another size" in staged.reason.text
    assert context.uploads[-1][2]["check.log"] == "a.deb is missing\nb.deb has another size\n"


def test_the_reason_that_a_hook_gives_stands(staged):
    def fail():
        staged.conclude("sbuild gave it back", stage="install-deps", try_again=True)
        return False

    staged.trouble["run"] = fail

    assert staged.execute() is False
    assert staged.reason == Reason(text="sbuild gave it back", stage="install-deps")
    assert staged.try_again is True


@pytest.mark.parametrize("stage", ALL[:4])
def test_nothing_follows_an_abort(staged, stage):
    def abort():
        staged.abort()
        return True

    staged.trouble[stage] = abort

    assert staged.execute() is False
    assert staged.seen == ALL[: ALL.index(stage) + 1]
    assert staged.reason is None


@pytest.mark.parametrize("stage", ALL[:3])
def test_a_hook_that_forgets_its_return_is_an_error(staged, stage):
    staged.trouble[stage] = lambda: None

    with pytest.raises(TypeError, match=f"expected {stage} of the task 'staged' to return True or False, got None"):
        staged.execute()


@pytest.mark.parametrize("trouble", [{}, {"run": lambda: False}, {"run": raise_fault}, {"fetch": raise_fault}])
def test_both_directories_are_removed_whatever_happens(staged, context, trouble):
    staged.trouble = trouble
    with contextlib.suppress(LookupError):
        staged.execute()

    assert {path.parent for path in staged.directories} == {context.work_directory}
    assert [path for path in staged.directories if path.exists()] == []


def test_a_task_without_its_hooks_is_abstract(registry):
    unfinished = type("Unfinished", (FetchExecUploadMixin, Task), {"run": lambda _self, _directory: True})

    assert "unfinished" not in registry
    with pytest.raises(TypeError, match="abstract"):
        unfinished()
