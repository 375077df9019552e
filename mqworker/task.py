"""The Task API: what a task is, which tasks there are, and two mixins for those that run a command on files.

This is all that a task author reads. May import only errors, messages and processes: a task never sees the broker, the
ledger or the store; what it needs of the world comes through its `TaskContext`.
"""

import abc
import codecs
import contextlib
import copy
import datetime as dt
import fcntl
import functools
import importlib
import importlib.metadata
import inspect
import json
import logging
import marshal
import os
import pkgutil
import select
import selectors
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, ClassVar, Final, Literal, Protocol, TextIO, overload

import jsonschema
import msgspec

from mqworker import processes
from mqworker.errors import HostUnfit, OperatorError, TaskConfigError
from mqworker.messages import FileName, Reason, RecordedArtifact, Relation

__all__ = [
    "Analysis",
    "FetchExecUploadMixin",
    "Reason",
    "RecordedArtifact",
    "Relation",
    "Task",
    "TaskConfigError",
    "TaskContext",
    "TaskRunCommandMixin",
    "load_tasks",
]

OpenTextModeWriting = Literal["a", "w", "x"]
OpenBinaryModeWriting = Literal["ab", "wb", "xb"]

ENTRY_POINT_GROUP: Final = "mqworker.tasks"
MODULES_VARIABLE: Final = "MQWORKER_TASK_MODULES"
_MODES: Final = frozenset({"a", "w", "x", "ab", "wb", "xb"})
_SHOWN_VALUE: Final = 200  # characters of a bad value that an error repeats
_SHOWN_ERRORS: Final = 100  # a list of a million bad items needs no million lines
_SHOWN_FILES: Final = 1000  # of a command's directory in its log
_VALID_FORMS: Final = 1000  # of each task that are remembered ...
_VALID_BYTES: Final = 1000  # ... if they are no longer than this
_CHUNK: Final = 64 * 1024  # bytes read of a command's output at once: a pipe holds no more

_log = logging.getLogger(__name__)


class TaskContext(Protocol):
    """What a task reaches of the world; given by the slot, by `mqworker run`, or by a test.

    `work_directory` is fresh for this run; its parents can be searched by any uid.
    """

    @property
    def work_directory(self) -> Path:
        """The directory of this run."""

    def fetch_artifact(self, artifact_id: int, destination: Path) -> RecordedArtifact:
        """Download the verified files of an artifact into a directory."""

    def upload_artifact(
        self,
        *,
        category: str,
        name: str,
        data: dict[str, Any],
        files: Mapping[str, Path],
        relations: Sequence[Relation] = (),
    ) -> str:
        """Store files as an artifact of this run, and return its handle, for the relations of others."""

    def report_progress(self, stage: str | None = None, fraction: float | None = None) -> None:
        """Show how far the run is; the fraction goes from 0 to 1."""

    def write_log(self, text: str) -> None:
        """Add to what those who follow the run see."""

    def settle_log(self) -> None:
        """Wait until all that was printed so far is in the debug logs."""


@dataclass(frozen=True)
class Analysis:
    """What the tasks of a worker say about it.

    `tasks` are those that analysed cleanly, with their versions; `failures` says of the others what went wrong, and
    `unimported` of the modules that could not even be imported.
    """

    metadata: dict[str, Any]
    tasks: dict[str, int | None]
    failures: dict[str, str]
    unimported: dict[str, str]


# ---------------------------------------------------------------- the task


class Task(abc.ABC):
    """Base class for tasks: one kind of work, and the knowledge of who can do it.

    A subclass registers under its class name in lower case as soon as it exists, unless it is abstract or says
    `class Some(Task, mixin=True)`. It overrides `_execute()`; or `execute()`, if it wants no debug logs uploaded.

    The scheduler makes instances too: it calls `configure()`, `can_run_on()` and `input_artifact_ids()`, which
    therefore decide on the task data and the worker's metadata alone. The rest runs on a worker.
    """

    TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {}
    """The JSON Schema (draft 2020-12) of the task data."""

    TASK_VERSION: ClassVar[int | None] = None
    """Rises with each change of the task; a worker gets requests only for the version that its scheduler has."""

    LEASE: ClassVar[float] = 60.0
    """Seconds that a run goes on without a word from the scheduler, unless the request says otherwise."""

    INPUT_ARTIFACT_CATEGORY: ClassVar[str | None] = None
    """The category that every artifact of `input_artifact_ids()` must have; None allows any."""

    name: ClassVar[str] = "task"
    """The class name in lower case."""

    _sub_tasks: ClassVar[dict[str, type["Task"]]] = {}
    _validator: ClassVar[Any]
    _valid: ClassVar[set[bytes]]  # forms of data that were found valid: of floods, many are the same

    def __init_subclass__(cls, *, mixin: bool = False, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.name = cls.__name__.lower()
        try:
            jsonschema.Draft202012Validator.check_schema(cls.TASK_DATA_SCHEMA)
        except jsonschema.SchemaError as error:
            error.add_note(f"This is TASK_DATA_SCHEMA of the task {cls.__qualname__} in {cls.__module__}.")
            raise
        cls._validator = jsonschema.Draft202012Validator(
            cls.TASK_DATA_SCHEMA, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        cls._valid = set()
        if mixin or inspect.isabstract(cls):
            return
        if cls._execute is Task._execute and cls.execute is Task.execute:
            raise TypeError(
                f"expected the task {cls.__qualname__} to override _execute() or execute(), got neither; "
                "a mixin says so with `class Some(Task, mixin=True)`"
            )
        if Task._sub_tasks.setdefault(cls.name, cls) is not cls:
            raise AssertionError(f'Two Tasks with the same name: "{cls.name}"')

    def __init__(self) -> None:
        """Make an unconfigured task; whoever runs it calls `configure()` and `attach()` first."""
        self.data: dict[str, Any] = {}
        self.context: TaskContext | None = None
        self.reason: Reason | None = None
        self.try_again = False
        self.debug_logs_problem: str | None = None  # why the debug logs could not be uploaded
        self._aborted = threading.Event()
        self._abort_lock = threading.RLock()  # re-entrant: a signal handler may call abort() at any point
        self._abort_callbacks: list[Callable[[], None]] = []
        self._debug_log_directory: Path | None = None
        self._logged: TextIO | None = None

    # ------------------------------------------------------------ which tasks there are

    @staticmethod
    def class_from_name(sub_task_class_name: str) -> type["Task"]:
        """Return the class of a task name, in whatever case.

        Raises:
            ValueError: no task of this name is installed here.
        """
        name = sub_task_class_name.lower()
        if name not in Task._sub_tasks:
            load_tasks()
        try:
            return Task._sub_tasks[name]
        except KeyError:
            raise ValueError(f"{sub_task_class_name!r} is not a registered task_name") from None

    @staticmethod
    def is_valid_task_name(task_name: str) -> bool:
        """Say whether a task of this name is installed here."""
        name = task_name.lower()
        if name not in Task._sub_tasks:
            load_tasks()
        return name in Task._sub_tasks

    # ------------------------------------------------------------ configuration

    def configure(self, task_data: dict[str, Any]) -> None:
        """Check the task data against the schema and keep an own copy of it as `self.data`.

        A subclass extends it after `super().configure(task_data)`: with defaults, and with checks that look at nothing
        but the data, since the scheduler calls it too.

        Raises:
            TaskConfigError: the data does not fit; the text lists every error with its path.
        """
        form = _form(task_data)
        if form is None or form not in self._valid:
            self._validate(task_data)
            if form is not None and len(form) <= _VALID_BYTES:
                if len(self._valid) >= _VALID_FORMS:
                    self._valid.clear()
                self._valid.add(form)
        self.data = copy.deepcopy(task_data)

    def _validate(self, task_data: dict[str, Any]) -> None:
        errors = sorted(self._validator.iter_errors(task_data), key=lambda error: error.json_path)
        if errors:
            lines = [_describe_schema_error(error) for error in errors[:_SHOWN_ERRORS]]
            if len(errors) > _SHOWN_ERRORS:
                lines.append(f"... and {len(errors) - _SHOWN_ERRORS} more")
            raise TaskConfigError(f"task data of {self.name!r}: {'; '.join(lines)}", errors[0]) from errors[0]

    def input_artifact_ids(self) -> list[int]:
        """List the artifacts that a run needs, by the configured data alone."""
        return []

    # ------------------------------------------------------------ metadata and matching

    @classmethod
    def prefix_with_task_name(cls, text: str) -> str:
        """Return a metadata key that no other task uses."""
        return f"{cls.name}:{text}"

    def analyze_worker(self) -> dict[str, Any]:
        """Say what this task finds on this worker, as JSON values.

        A subclass adds to `super().analyze_worker()`, with keys made by `prefix_with_task_name()`.
        """
        return {self.prefix_with_task_name("version"): self.TASK_VERSION}

    @classmethod
    def analyze_worker_all_tasks(cls) -> dict[str, Any]:
        """Join what every registered task says about this worker.

        Raises:
            OperatorError: two tasks set one key to different values.
        """
        return cls.analyze_worker_tasks().metadata

    @classmethod
    def analyze_worker_tasks(cls) -> Analysis:
        """Ask every registered task about this worker; one that fails says nothing and hides no other.

        Raises:
            OperatorError: two tasks set one key to different values.
        """
        analysis = Analysis(metadata={}, tasks={}, failures={}, unimported=load_tasks())
        owners: dict[str, str] = {}
        for name, task_class in sorted(Task._sub_tasks.items()):
            try:
                found = _plain_metadata(task_class().analyze_worker())
            except Exception as error:  # noqa: BLE001  # one task's fault hides no other task
                _log.exception("task does not analyse this worker", extra={"task": name})
                analysis.failures[name] = _one_line(error)
                continue
            for key, value in found.items():
                owner = owners.setdefault(key, name)
                if owner != name and _canonical(analysis.metadata[key]) != _canonical(value):
                    raise OperatorError(
                        f"expected one value of the worker's metadata key {key!r}, got {analysis.metadata[key]!r} from "
                        f"the task {owner!r} and {value!r} from the task {name!r}; remove one of the two, or have them "
                        "prefix their keys with their names"
                    )
                analysis.metadata[key] = value
            analysis.tasks[name] = task_class.TASK_VERSION
        return analysis

    def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
        """Say whether a worker can run this request, by its metadata and the configured data alone.

        A subclass first asks `super().can_run_on(worker_metadata)`, which compares the task's version there and here.
        """
        return bool(worker_metadata.get(self.prefix_with_task_name("version")) == self.TASK_VERSION)

    # ------------------------------------------------------------ execution

    def attach(self, context: TaskContext) -> None:
        """Give the task its way to the world; called once, before `execute()`."""
        self.context = context

    @property
    def world(self) -> TaskContext:
        """The context, where it must be there.

        Raises:
            RuntimeError: the task was not attached to one.
        """
        if self.context is None:
            raise RuntimeError(f"expected the task {self.name!r} to have a context; call attach(context) first")
        return self.context

    def execute(self) -> bool:
        """Do the work, and upload the debug logs whatever came of it.

        True is success, False is failure (the work's verdict; `conclude()` says why), an exception is an error.
        """
        try:
            done = self._execute()
            self._insist_on_bool("_execute()", done)
        except Exception:
            self.logger.exception("the task raised")  # for its log; the slot makes an error of it
            raise
        else:
            return done
        finally:
            self._try_to_upload_debug_logs()

    def _execute(self) -> bool:
        """Do the work: True is success, False is failure."""
        raise NotImplementedError

    def conclude(
        self,
        text: str,
        *,
        stage: str | None = None,
        exit_code: int | None = None,
        status: str | None = None,
        line: str | None = None,
        try_again: bool = False,
    ) -> None:
        """Say why the work ends as it does, for a person who has to act on it; the last word counts.

        Args:
            text: the sentence.
            stage: where in the work.
            exit_code: of the tool.
            status: the tool's own word.
            line: the last line of the log that names the cause.
            try_again: the tool says "not now": a failure is then tried again by somebody, later.
        """
        self.reason = Reason(text=text, stage=stage, exit_code=exit_code, status=status, line=line)
        self.try_again = try_again

    def abort(self) -> None:
        """Ask the work to stop, once and for all; from any thread."""
        with self._abort_lock:
            self._aborted.set()
            for callback in self._abort_callbacks:
                callback()

    @property
    def aborted(self) -> bool:
        """Whether the work was asked to stop."""
        return self._aborted.is_set()

    def wait_aborted(self, seconds: float) -> bool:
        """Pause, but no longer than until the work is asked to stop; say whether it was."""
        return self._aborted.wait(seconds)

    @contextlib.contextmanager
    def _when_aborted(self, callback: Callable[[], None]) -> Iterator[None]:
        with self._abort_lock:
            self._abort_callbacks.append(callback)
            if self.aborted:
                callback()
        try:
            yield
        finally:
            with self._abort_lock:
                self._abort_callbacks.remove(callback)

    # ------------------------------------------------------------ logs

    @functools.cached_property
    def logger(self) -> logging.Logger:
        """A logger named after the task; what it gets is in the live log and in the debug log task.log."""
        # An own Logger, not one of logging's registry: what this run logs must not reach another run's live log.
        logger = logging.Logger(f"tasks.{self.name}", logging.INFO)  # noqa: LOG001  # for that reason
        logger.parent = logging.getLogger(logger.name)
        logger.addHandler(_LiveLogHandler(weakref.ref(self)))
        return logger

    @overload
    def open_debug_log_file(self, filename: str, *, mode: OpenTextModeWriting = "a") -> TextIO: ...

    @overload
    def open_debug_log_file(self, filename: str, *, mode: OpenBinaryModeWriting) -> BinaryIO: ...

    def open_debug_log_file(
        self, filename: str, *, mode: OpenTextModeWriting | OpenBinaryModeWriting = "a"
    ) -> TextIO | BinaryIO:
        """Open a file that is uploaded with the debug logs; the same name is the same file. The caller closes it.

        Raises:
            ValueError: the name has a path, or the mode does not write.
        """
        try:
            msgspec.convert(filename, FileName)
        except msgspec.ValidationError as error:
            raise ValueError(
                f"expected a log file name of letters, digits, blanks and _.+:~@=,- only, got {filename!r}"
            ) from error
        if "/" in filename or ".." in filename or filename == ".":
            raise ValueError(f"expected a log file name without a path, got {filename!r}")
        if mode not in _MODES:
            raise ValueError(f"expected one of the modes {', '.join(sorted(_MODES))}, got {mode!r}")
        path = self._ensure_debug_log_directory() / filename
        # A log takes what it gets: what is not text is escaped, not refused.
        text: dict[str, str] = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
        file: Any = path.open(mode, **text)  # type: ignore[call-overload]  # the arguments are right for the mode
        return file  # type: ignore[no-any-return]  # as above

    def _keep_and_show(self, text: str) -> None:
        """Write to the debug log task.log, which is kept open until the logs are uploaded, and to the live log."""
        if self._logged is None:
            self._logged = self.open_debug_log_file("task.log")
            weakref.finalize(self, self._logged.close)
        self._logged.write(text)
        self.world.write_log(text)

    def append_to_log_file(self, filename: str, lines: list[str]) -> None:
        """Add lines to a debug log, each with a newline."""
        with self.open_debug_log_file(filename) as file:
            file.writelines(f"{line}\n" for line in lines)

    def upload_debug_logs(self) -> str | None:
        """Upload the debug logs as one artifact and return its handle; None where there are none, or no context."""
        if self.context is None:
            return None
        self.context.settle_log()
        if self._logged is not None:
            self._logged.close()
            self._logged = None
        if self._debug_log_directory is None:
            return None
        files = {path.name: path for path in sorted(self._debug_log_directory.iterdir())}
        if not files:
            return None
        return self.context.upload_artifact(
            category="mqworker:debug-logs", name=f"{self.name}-logs", data={}, files=files
        )

    def find_file_by_suffix(self, directory: Path, suffix: str) -> Path | None:
        """Return the one regular file of a directory that ends so; None, and a line in a log, where it is not one."""
        entries = sorted(directory.iterdir())
        found = [path for path in entries if path.name.endswith(suffix) and path.is_file() and not path.is_symlink()]
        if len(found) == 1:
            return found[0]
        names = [path.name for path in entries]
        self.append_to_log_file(
            "configure_for_execution.log", [f"There must be one *{suffix} file. Current files: {names}"]
        )
        return None

    def _insist_on_bool(self, what: str, result: object) -> None:
        if not isinstance(result, bool):  # None is no verdict, but a forgotten `return`
            raise TypeError(f"expected {what} of the task {self.name!r} to return True or False, got {result!r}")

    def _try_to_upload_debug_logs(self) -> None:
        try:
            self.upload_debug_logs()
        except Exception as error:
            # The work's own verdict stands, with or without its logs; but whoever looks for them learns why.
            self.debug_logs_problem = _one_line(error)
            self.logger.exception("the debug logs could not be uploaded")

    def _ensure_debug_log_directory(self) -> Path:
        if self._debug_log_directory is None:
            parent = None if self.context is None else self.context.work_directory
            self._debug_log_directory = Path(tempfile.mkdtemp(prefix="debug-logs-", dir=parent))
            weakref.finalize(self, processes.remove_tree, self._debug_log_directory)
        return self._debug_log_directory


class _LiveLogHandler(logging.Handler):
    def __init__(self, task: "weakref.ref[Task]") -> None:
        super().__init__()
        self._task = task

    def emit(self, record: logging.LogRecord) -> None:
        task = self._task()
        if task is None or task.context is None:
            return
        try:
            task._keep_and_show(f"{record.levelname}: {self.format(record)}\n")  # noqa: SLF001  # one file, one matter
        except Exception:  # noqa: BLE001  # logging's own rule: a handler that fails says so on stderr
            self.handleError(record)


def _form(task_data: Any) -> bytes | None:
    """Return bytes that only equal data of equal types have; None: it has what no JSON has."""
    try:
        return marshal.dumps(task_data, 2)  # the newest version without references, which would differ between equals
    except ValueError:
        return None


def _describe_schema_error(error: Any) -> str:
    given = error.instance
    if error.validator == "required":
        missing = [name for name in error.validator_value if name not in given]
        expected = f"expected the properties {_show(error.validator_value)}, of which {_show(missing)} are missing"
    elif error.validator == "additionalProperties" and error.validator_value is False:
        known = error.schema.get("properties", {})
        expected = f"expected no properties but {_show(sorted(known))}"
        given = {name: value for name, value in given.items() if name not in known}
    elif error.validator == "enum":
        expected = f"expected one of {_show(error.validator_value)}"
    else:
        expected = f"expected {error.validator} {_show(error.validator_value)}"
    return f"{error.json_path}: {expected}, got {_show(given)}"


def _show(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # Python that is no JSON can be given by hand
        text = repr(value)
    return text if len(text) <= _SHOWN_VALUE else f"{text[:_SHOWN_VALUE]}..."


def _plain_metadata(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise TypeError(f"expected analyze_worker() to return a dictionary with text keys, got {found!r}")
    plain: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))  # as the scheduler will see it
    return plain


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)  # for which 1, 1.0 and True are three values


def _one_line(error: BaseException) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())


# ---------------------------------------------------------------- the registry


_load_lock = threading.RLock()  # re-entrant: a task module may ask for another task while it is imported
_unimported: dict[str, str] | None = None


def load_tasks() -> dict[str, str]:
    """Import every task module once, and return what went wrong, by the name of the module or entry point.

    These are the modules of the package `tasks`, those that the environment variable MQWORKER_TASK_MODULES names
    (importable names, separated by commas), and the entry points of the group `mqworker.tasks` of any installed
    package.
    """
    global _unimported  # noqa: PLW0603  # what is imported is a fact of the process
    with _load_lock:
        if _unimported is None:
            _unimported = {}
            for name, load in _task_modules():
                try:
                    load()
                except (Exception, SystemExit) as error:  # noqa: BLE001  # one module's fault, even sys.exit(), hides no other
                    _unimported[name] = _one_line(error)
                    _log.exception("task module does not import", extra={"task_module": name})
                    _forget_tasks_of_unimported_modules()
        return dict(_unimported)


def _task_modules() -> Iterator[tuple[str, Callable[[], object]]]:
    package = importlib.import_module("tasks")
    if getattr(package, "Task", None) is not Task:
        raise OperatorError(
            f"expected the package `tasks` of mqworker, got {package!r}; "
            "something else of that name comes first in the search path: start Python with -P"
        )
    names = [f"tasks.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    names += filter(None, (name.strip() for name in os.environ.get(MODULES_VARIABLE, "").split(",")))
    for name in names:
        yield name, functools.partial(importlib.import_module, name)
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        yield f"{point.name} ({point.value})", point.load


def _forget_tasks_of_unimported_modules() -> None:
    # Half a module is no task: what it defined before it failed is not offered.
    registry = Task._sub_tasks  # noqa: SLF001  # the registry is this module's
    for name in [name for name, task_class in registry.items() if task_class.__module__ not in sys.modules]:
        del registry[name]


# ---------------------------------------------------------------- for tasks that run a command


class TaskRunCommandMixin(Task, mixin=True):
    """Run commands so that their output is seen as it comes and nothing of them is left."""

    CMD_LOG_FILENAME: ClassVar[str] = "cmd-output.log"
    """The debug log that gets the output."""

    TERMINATE_GRACE: ClassVar[float] = 5.0
    """Seconds between SIGTERM to the command and SIGKILL to all that is left of it."""

    last_returncode: int | None = None
    """The exit code of the newest command (negative: the signal that ended it); None if it was not left to end."""

    last_timed_out: bool = False
    """Whether the newest command was ended at its timeout."""

    def run_cmd(
        self,
        cmd: Sequence[str | os.PathLike[str]],
        working_directory: Path,
        *,
        env: Mapping[str, str] | None = None,
        capture_stdout_filename: str | None = None,
        timeout: float | None = None,
    ) -> int | None:
        """Run a command to its end and return its exit code; None if it was ended by an abort or at its timeout.

        It gets a session of its own, no standard input and no shell. Both outputs go to the debug log and to the live
        log as they come. Whatever it has left running is killed when it ends, in whichever session or namespace: so
        one process runs one command at a time.

        Args:
            cmd: the program and its arguments.
            working_directory: where it runs.
            env: its whole environment; None is this process's own.
            capture_stdout_filename: a file in the working directory that gets the standard output instead of the logs.
            timeout: seconds after which it is ended like on abort.

        Raises:
            HostUnfit: it could not be started, or not be ended.
            RuntimeError: this process is running a command already.
            TypeError: the command is one text; there is no shell to split it.
        """
        if isinstance(cmd, str):
            raise TypeError(f"expected a list of the program and its arguments, got the text {cmd!r}")
        words = [os.fspath(word) for word in cmd]
        self.last_returncode = None
        self.last_timed_out = False
        with _one_command(words), self.open_debug_log_file(self.CMD_LOG_FILENAME, mode="ab") as log:
            output = _CommandOutput(log, self.context)
            output.say(f"cmd: {shlex.join(words)}\n")
            if capture_stdout_filename is not None:
                output.say(f"stdout: in {capture_stdout_filename}\n")
            output.say("output:\n")
            try:
                if not self.aborted:
                    self._run_to_its_end(
                        words, working_directory, output, env=env, captured=capture_stdout_filename, timeout=timeout
                    )
            except Exception as error:
                output.say(f"{_one_line(error)}\n")
                raise
            finally:
                output.finish_line()
                output.say(f"aborted: {self.aborted}\n")
                if self.last_timed_out:
                    output.say(f"timed out: after {timeout} s\n")
                output.say(f"returncode: {self.last_returncode}\n")
                output.say(f"files in {working_directory}:\n")
                output.say("".join(f"  {line}\n" for line in _list_files(working_directory)))
                output.say("-" * 72 + "\n")
        return self.last_returncode

    def _run_to_its_end(
        self,
        words: list[str],
        working_directory: Path,
        output: "_CommandOutput",
        *,
        env: Mapping[str, str] | None,
        captured: str | None,
        timeout: float | None,
    ) -> None:
        processes.become_subreaper()  # orphans of the command come here, where they are found
        before = processes.descendants(os.getpid())
        with contextlib.ExitStack() as stack:
            reader, writer = os.pipe()
            stack.callback(os.close, reader)
            os.set_blocking(reader, False)
            with open(writer, "wb") as pipe:  # noqa: PTH123  # a descriptor, closed here so that only the command has it
                stdout: IO[bytes] = pipe
                if captured is not None:
                    stdout = stack.enter_context(_open_captured(working_directory / captured))
                process = _start(words, working_directory, env, stdout, pipe)
            try:
                stack.enter_context(processes.collecting(process.pid))
                timed_out = self._watch(process.pid, reader, output, timeout)
            finally:
                # Ended or not: what it left running holds files and the pipe. Then everything that was written is in
                # the pipe, and its end need not be waited for, since a stranger may hold that too.
                spare = [old.pid for old in before if processes.identify(old.pid) == old]
                processes.kill_descendants(spare=spare)
                returncode = process.wait()
            output.drain(reader)
        if timed_out:
            self.last_timed_out = True
            self.conclude(f"the command {words[0]!r} was ended at its timeout of {timeout} s", stage="run")
        elif not self.aborted:
            self.last_returncode = returncode

    def _watch(self, pid: int, reader: int, output: "_CommandOutput", timeout: float | None) -> bool:
        """Pass on the output until the command ends or its grace is over; say whether it timed out."""
        ends = None if timeout is None else time.monotonic() + timeout
        terminated = timed_out = False
        with contextlib.ExitStack() as stack:
            pidfd = os.pidfd_open(pid)
            stack.callback(os.close, pidfd)
            alarm = os.eventfd(0)
            stack.callback(os.close, alarm)
            stack.enter_context(self._when_aborted(lambda: os.eventfd_write(alarm, 1)))
            selector = stack.enter_context(selectors.DefaultSelector())
            for descriptor in (pidfd, alarm, reader):
                selector.register(descriptor, selectors.EVENT_READ)
            while True:
                left = None if ends is None else max(0.0, ends - time.monotonic())
                ready = {key.fd for key, _ in selector.select(left)}
                if reader in ready and not output.pass_on(reader):
                    selector.unregister(reader)
                if pidfd in ready:
                    return timed_out
                over = ends is not None and time.monotonic() >= ends
                if over and terminated:
                    return timed_out
                if over or alarm in ready:
                    terminated, timed_out = True, alarm not in ready
                    selector.unregister(alarm)
                    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
                    signal.pidfd_send_signal(pidfd, signal.SIGCONT)  # who is stopped would not hear it
                    ends = time.monotonic() + self.TERMINATE_GRACE


class _CommandOutput:
    """Where the words of and about one command go: its debug log, and the live log as text."""

    def __init__(self, log: BinaryIO, context: TaskContext | None) -> None:
        self._log = log
        self._context = context
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may come in two pieces
        self._at_line_start = True

    def say(self, text: str) -> None:
        self._write(text.encode("utf-8", "backslashreplace"), text)

    def pass_on(self, reader: int) -> bool:
        """Write what a pipe has now; False at its end."""
        try:
            chunk = os.read(reader, _CHUNK)
        except BlockingIOError:
            return True
        if chunk:
            self._write(chunk, self._decoder.decode(chunk))
        return bool(chunk)

    def drain(self, reader: int) -> None:
        """Write what is left in a pipe whose writers are gone; a stranger who goes on writing is not waited for."""
        left = fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ)
        while left > 0 and select.select([reader], [], [], 0)[0] and self.pass_on(reader):
            left -= _CHUNK

    def finish_line(self) -> None:
        """End the command's own text, so that what follows starts a line."""
        if rest := self._decoder.decode(b"", final=True):
            self._write(b"", rest)
        if not self._at_line_start:
            self.say("\n")

    def _write(self, data: bytes, text: str) -> None:
        self._log.write(data)
        self._log.flush()  # who looks at the file sees it grow
        if data:
            self._at_line_start = data.endswith(b"\n")
        if self._context is not None and text:
            self._context.write_log(text)


_command_lock = threading.Lock()


@contextlib.contextmanager
def _one_command(words: Sequence[str]) -> Iterator[None]:
    # The descendants of two commands at once could not be told apart when the first of them ends.
    if not _command_lock.acquire(blocking=False):
        raise RuntimeError(
            f"expected one command at a time in one process, got {shlex.join(words)} while another runs; "
            "run them one after the other"
        )
    try:
        yield
    finally:
        _command_lock.release()


def _start(
    words: list[str], directory: Path, env: Mapping[str, str] | None, stdout: IO[bytes], stderr: IO[bytes]
) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(
            words,
            cwd=directory,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    except OSError as error:
        raise HostUnfit(
            f"expected to run {words[0]!r} in {directory}, but it could not be started: {error}; "
            "install it, or keep such requests from this worker with can_run_on()"
        ) from error


def _open_captured(path: Path) -> IO[bytes]:
    # What a command finds in its directory may come from strangers: a symbolic link is not written through.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o644), "wb")


def _list_files(directory: Path) -> list[str]:
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        return [str(error)]
    lines = [f"{path.name} ({path.lstat().st_size} bytes)" for path in entries[:_SHOWN_FILES]]
    if len(entries) > _SHOWN_FILES:
        lines.append(f"... and {len(entries) - _SHOWN_FILES} more")
    return lines


# ---------------------------------------------------------------- for tasks that make artifacts of artifacts


class FetchExecUploadMixin(Task, mixin=True):
    """Give a task five stages: fetch, configure, run, check, upload.

    Each has a method of its own. One that returns False makes the task a failure, one that raises makes it an error;
    each is stamped in `stages.log` and shown as progress. What a failed run has made is uploaded too, but nothing
    after an abort. Both directories are below the context's work directory and are removed whatever happens.
    """

    @abc.abstractmethod
    def fetch_input(self, destination: Path) -> bool:
        """Fetch the input artifacts into a directory."""

    @abc.abstractmethod
    def configure_for_execution(self, download_directory: Path) -> bool:
        """Find in the fetched files what the run needs to know."""

    @abc.abstractmethod
    def run(self, execute_directory: Path) -> bool:
        """Do the work in an empty directory; the fetched files are still there."""

    def check_directory_for_consistency_errors(self, build_directory: Path) -> list[str]:  # noqa: ARG002  # for those who override it
        """Say what is wrong with the files that the run has made, one sentence each; called after a failed run too."""
        return []

    @abc.abstractmethod
    def upload_artifacts(self, execute_directory: Path, *, execution_success: bool) -> bool | None:
        """Upload what the run has made; `execution_success` says whether it and its check went well."""

    def _execute(self) -> bool:
        with self._directory("download") as download, self._directory("execute") as execute:
            if not self._stage("fetch", self.fetch_input, download):
                return False
            if not self._stage("configure", self.configure_for_execution, download):
                return False
            success = self._stage("run", self.run, execute)
            success = self._stage("check", self._check, execute) and success
            return self._stage("upload", self._upload, execute, success) and success

    def _check(self, directory: Path) -> bool:
        errors: Any = self.check_directory_for_consistency_errors(directory)
        if isinstance(errors, bool):
            return errors
        if errors:
            self.append_to_log_file("check.log", errors)
            if self.reason is None:
                self.conclude(f"the files that were made are not consistent: {'; '.join(errors)}", stage="check")
        return not errors

    def _upload(self, directory: Path, success: bool) -> bool:  # noqa: FBT001  # only called by _stage()
        return self.upload_artifacts(directory, execution_success=success) is not False

    def _stage(self, stage: str, hook: Callable[..., bool], *arguments: Any) -> bool:
        """Run one stage; False if it failed or the task is aborted."""
        if self.aborted:
            return False
        self.world.report_progress(stage=stage)
        self._stamp(f"{stage}: started")
        started = time.monotonic()
        try:
            result = hook(*arguments)
            self._insist_on_bool(stage, result)
        except Exception as error:
            self.append_to_log_file(f"{stage}.log", traceback.format_exc().splitlines())
            if self.reason is None:
                self.conclude(_one_line(error), stage=stage)
            self._stamp(f"{stage}: raised an exception after {time.monotonic() - started:.3f} s")
            raise
        self._stamp(f"{stage}: {'done' if result else 'failed'} after {time.monotonic() - started:.3f} s")
        if not result and self.reason is None and not self.aborted:
            self.conclude(f"the {stage} stage failed; its debug logs may say more", stage=stage)
        return result

    def _stamp(self, text: str) -> None:
        line = f"{dt.datetime.now(dt.UTC).isoformat(timespec='milliseconds')} {text}"
        self.append_to_log_file("stages.log", [line])
        self.world.write_log(f"{line}\n")

    @contextlib.contextmanager
    def _directory(self, name: str) -> Iterator[Path]:
        directory = self.world.work_directory / name
        directory.mkdir()
        directory.chmod(0o711)  # a build's other uids pass through, and cannot list it
        try:
            yield directory
        finally:
            processes.remove_tree(directory)
