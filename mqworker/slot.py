"""The child process in which tasks run, one at a time: fetch, run, upload, say how it ended. Never sees the broker.

It may be told of the next runs while one is in hand, and begins them in their order. It hears orders on standard input
and speaks on standard output, one JSON a line; whatever a task prints goes to the live log instead. A thread watches
the orders and the deadline: when the deadline passes, or the agent is gone, it kills every descendant without grace and
ends this process, whatever the task is doing.

    python -P -m mqworker.slot [FD]       wait for runs; FD is a pipe that ends with the watchdog
    python -P -m mqworker.slot --analyze  say once what this host can do, and end
"""

import array
import codecs
import contextlib
import fcntl
import os
import queue
import select
import stat
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from mqworker import limits, processes, watchdog
from mqworker.errors import ArtifactInvalid, HostUnfit, MqworkerError, NotFound, OutsideError, Unreadable
from mqworker.messages import (
    MAX_DESCRIBED_BYTES,
    MAX_LINE_BYTES,
    MAX_LISTED,
    MAX_STAGE,
    SLOT_LAPSED,
    Analysis,
    Artifact,
    FileEntry,
    Limits,
    Outfit,
    Reason,
    Recall,
    RecordedArtifact,
    Relation,
    Renew,
    RunTask,
    SlotEnded,
    SlotOrder,
    SlotOutput,
    SlotProgress,
    SlotReady,
    SlotRecalled,
    SlotWord,
    StopRun,
    bounded,
    decode,
    encode_line,
)
from mqworker.store import Store
from mqworker.task import Task

CHUNK: Final = 64 * 1024
LIVE_BYTES_PER_SECOND: Final = 256 * 1024  # of output to the live log; more than anybody can read
PROGRESS_SECONDS: Final = 0.05  # between two words on the progress of one stage
LIVE_BURST: Final = 1024 * 1024
MEMORY_KEPT: Final = 256 * 1024 * 1024  # bytes of peak memory; a slot that has needed more makes room for a fresh one
MEMORY_LOOK: Final = 0.05  # seconds: shorter runs are looked at together


class _Mouth:
    """Say words to the agent, from any thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def say(self, word: SlotWord) -> None:
        if os.getpid() != self._pid:
            os._exit(1)  # a task has forked, and its child came back here: it must not speak for its parent
        line = memoryview(encode_line(word))
        with self._lock:
            while line:
                line = line[os.write(self._fd, line) :]


class _LiveLog:
    """Hand on what a run prints, as much of it as somebody could read."""

    def __init__(self, mouth: _Mouth) -> None:
        self._mouth = mouth
        self._lock = threading.Lock()
        self.begin()

    def begin(self) -> None:
        with self._lock:
            self._allowance: float = LIVE_BURST
            self._since = time.monotonic()
            self._skipped = 0

    def write(self, text: str) -> None:
        with self._lock:
            now = time.monotonic()
            self._allowance = min(LIVE_BURST, self._allowance + (now - self._since) * LIVE_BYTES_PER_SECOND)
            self._since = now
            if len(text) > self._allowance:
                self._skipped += len(text)
                return
            self._allowance -= len(text)
            text = self._take_gap() + text
        self._mouth.say(SlotOutput(text=text))

    def end(self) -> None:
        """Say what was left out last."""
        with self._lock:
            gap = self._take_gap()
        if gap:
            self._mouth.say(SlotOutput(text=gap))

    def _take_gap(self) -> str:
        skipped, self._skipped = self._skipped, 0
        return f"\n[... {skipped} characters are not shown live; the log artifact has them ...]\n" if skipped else ""


class _Output:
    """Catch what is printed to standard output and error, by the task or by whoever inherits them."""

    def __init__(self, live: _LiveLog) -> None:
        self._live = live
        if stat.S_ISFIFO(os.fstat(2).st_mode):
            # The agent's pipe: it reads what is left there when this process has ended without a word.
            self._write_end = os.dup(2)
            self._read_end = os.open("/proc/self/fd/2", os.O_RDONLY)
        else:
            self._read_end, self._write_end = os.pipe()
        self._copies_out, self._copies_in = os.pipe()
        for fd in (1, 2):
            os.dup2(self._write_end, fd)
        self._open_log: Callable[[], BinaryIO] | None = None
        self._log: BinaryIO | None = None
        self._log_lock = threading.Lock()  # who still prints when a run ends must not meet a log that is being closed
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._marks: dict[bytes, threading.Event] = {}
        threading.Thread(target=self._pump, name="output", daemon=True).start()

    @contextlib.contextmanager
    def kept(self, open_log: Callable[[], BinaryIO]) -> Iterator[None]:
        """Keep what is printed meanwhile in a log, opened when the first byte comes."""
        self._open_log = open_log
        try:
            yield
        finally:
            self.settle()
            with self._log_lock:
                self._close_log()
            self._live.end()

    def settle(self) -> None:
        """Wait until what was printed so far is in the log."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, ValueError, OSError):  # a task has closed or replaced it
                stream.flush()
        if not self._unread():
            self._to_log(None)
            return
        mark = b"\0mqworker " + os.urandom(16).hex().encode() + b"\0"
        passed = self._marks[mark] = threading.Event()
        os.write(self._write_end, mark)  # far below PIPE_BUF, so nobody's bytes come in between
        passed.wait()

    def _unread(self) -> int:
        """Count the bytes that were printed and are not in the log yet: the pump takes them out only afterwards."""
        count = array.array("i", [0])
        fcntl.ioctl(self._read_end, termios.FIONREAD, count)
        return count[0]

    def _pump(self) -> None:
        pending = b""
        while True:
            # What is not told yet stays in the pipe, where the agent finds it if the task ends this process now.
            count = processes.tee(self._read_end, self._copies_in, CHUNK)
            pending += os.read(self._copies_out, count)
            for mark in list(self._marks):
                before, found, after = pending.partition(mark)
                if found:
                    self._keep(before)
                    self._to_log(None)
                    self._marks.pop(mark).set()
                    pending = after
            if not (self._marks and b"\0" in pending[-64:]):  # else perhaps the beginning of a mark
                self._keep(pending)
                pending = b""
            os.read(self._read_end, count)

    def _keep(self, data: bytes) -> None:
        if not data:
            return
        self._to_log(data)
        text = self._decoder.decode(data)
        if text:
            self._live.write(text)

    def _to_log(self, data: bytes | None) -> None:
        """Write to the log, or flush it; go on without it if that fails, since a full disk must not stop the task."""
        with self._log_lock:
            try:
                self._write_log(data)
            except Exception as error:  # noqa: BLE001  # a task's own code opens the log
                failed: Exception | None = error
                self._close_log()
            else:
                failed = None
        if failed is not None:
            self._live.write(f"\n[... what is printed from here on is not kept: {failed} ...]\n")

    def _write_log(self, data: bytes | None) -> None:
        if data is not None and self._log is None and self._open_log is not None:
            self._log = self._open_log()
        if self._log is None:
            return
        if data is None:
            self._log.flush()
        else:
            self._log.write(data)

    def _close_log(self) -> None:
        log, self._log, self._open_log = self._log, None, None
        if log is not None:
            with contextlib.suppress(OSError):  # what it could not write was told when that failed
                log.close()


class _Context:
    """Give a task its access to the world."""

    def __init__(self, *, order: RunTask, store: Store, mouth: _Mouth, live: _LiveLog, output: _Output) -> None:
        self._directory = Path(order.directory)
        self._made = False
        self.unfit: str | None = None  # there was no room for it
        self.artifacts: list[Artifact] = []
        self._inputs = {artifact.id: artifact for artifact in order.inputs}
        self._store = store
        self._mouth = mouth
        self._described = 0  # bytes
        self._told: tuple[str | None, float] = (None, 0.0)
        self._live = live
        self._output = output

    @property
    def work_directory(self) -> Path:
        """The directory of this run, made when it is first asked for: many runs need none."""
        if not self._made:
            try:
                self._directory.mkdir(mode=0o755)
            except OSError as error:
                self.unfit = f"expected room for a run in {self._directory.parent}, got: {error}"
                raise HostUnfit(self.unfit) from error
            self._made = True
        return self._directory

    def leave(self) -> bool:
        """Remove the directory if it is empty, and say whether something is left in it."""
        if not self._made:
            return False
        try:
            self._directory.rmdir()
        except OSError:
            return self._directory.exists()
        return False

    def fetch_artifact(self, artifact_id: int, destination: Path) -> RecordedArtifact:
        try:
            artifact = self._inputs[artifact_id]
        except KeyError:
            raise NotFound(
                f"expected one of this request's input artifacts ({sorted(self._inputs)}), got {artifact_id}:"
                " name it in input_artifact_ids()"
            ) from None
        for entry in artifact.files:
            target = destination / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            self._store.get(entry.sha256, entry.size, target)
        return artifact

    def upload_artifact(
        self,
        *,
        category: str,
        name: str,
        data: dict[str, Any],
        files: Mapping[str, Path],
        relations: Sequence[Relation] = (),
    ) -> str:
        entries = []
        for path, source in files.items():
            sha256, size = self._store.put(source)
            entries.append(FileEntry(path=path, size=size, sha256=sha256))
        try:
            artifact = Artifact(
                handle=f"a{len(self.artifacts)}",
                category=category,
                name=name,
                data=data,
                files=entries,
                relations=list(relations),
            )
            line = encode_line(artifact)
            decode(line, Artifact)  # what the scheduler could not read is better refused here
        except (Unreadable, ValueError, TypeError, RecursionError) as error:
            raise ArtifactInvalid(f"expected an artifact of a known form: {error}") from error
        self._described += len(line)
        if self._described > MAX_DESCRIBED_BYTES or len(self.artifacts) >= MAX_LISTED:
            raise ArtifactInvalid(
                f"expected at most {MAX_LISTED} artifacts of one run, described in at most {MAX_DESCRIBED_BYTES} bytes"
                " together: put large data into files"
            )
        self.artifacts.append(artifact)
        return artifact.handle

    def report_progress(self, stage: str | None = None, fraction: float | None = None) -> None:
        now = time.monotonic()
        if stage == self._told[0] and fraction != 1 and now - self._told[1] < PROGRESS_SECONDS:
            return
        self._told = (stage, now)
        stage = None if stage is None else stage[:MAX_STAGE]
        self._mouth.say(SlotProgress(stage=stage, fraction=fraction))

    def write_log(self, text: str) -> None:
        self._live.write(text)

    def settle_log(self) -> None:
        self._output.settle()


class Slot:
    """Run what the agent orders, until it is gone."""

    def __init__(self, *, orders: int, words: int, watchdog: int | None = None) -> None:
        self._orders = orders
        self._watchdog = watchdog  # a pipe that ends with the watchdog
        self._mouth = _Mouth(words)
        self._live = _LiveLog(self._mouth)
        self._output = _Output(self._live)
        self._alarm = processes.BoottimeAlarm()
        self._runs: queue.SimpleQueue[RunTask] = queue.SimpleQueue()
        self._store: Store | None = None
        self._store_url = ""
        self._lock = threading.Lock()
        self._told: dict[str, int] = {}  # runs that have not begun, by token: when each has to have ended
        self._stops: dict[str, str] = {}  # why runs are to be aborted, by token
        self._token: str | None = None  # of the run in hand
        self._deadline_ns: int | None = None  # of that
        self._task: Task | None = None
        self._looked = 0.0  # when memory was looked at

    def serve(self) -> None:
        """Take runs one after the other."""
        processes.become_subreaper()
        threading.Thread(target=self._watch, name="orders", daemon=True).start()
        fresh = _condition()
        self._mouth.say(SlotReady())
        while True:
            order = self._runs.get()
            if not self._begin(order):
                continue
            ended = self._run(order)
            last = ended.left is not None or _condition() != fresh or self._has_needed_much()
            self._mouth.say(msgspec.structs.replace(ended, last=True) if last else ended)
            if ended.left is not None:
                self._die()
            if last:
                return

    def _has_needed_much(self) -> bool:
        """Say whether this process has had much memory; at the end of a burst of short runs, and now and then in it."""
        now = time.monotonic()
        if now - self._looked < MEMORY_LOOK and not self._runs.empty():
            return False
        self._looked = now
        return processes.peak_memory() > MEMORY_KEPT

    def _begin(self, order: RunTask) -> bool:
        """Begin a run, unless it was taken back."""
        with self._lock:
            deadline = self._told.pop(order.token, None)
            if deadline is None:
                return False
            self._token = order.token
            self._hold(deadline)
        return True

    def _hold(self, deadline_ns: int | None) -> None:
        self._deadline_ns = deadline_ns
        self._alarm.set(deadline_ns)

    def _has_lapsed(self) -> bool:
        """Say whether the run in hand is over its deadline; the alarm may have rung for one that has just ended."""
        with self._lock:
            return self._deadline_ns is not None and processes.boottime_ns() >= self._deadline_ns

    # ------------------------------------------------------------ the watching thread

    def _watch(self) -> None:
        try:
            self._hear()
        except Exception:  # noqa: BLE001  # whatever it is, nobody holds the deadline any more
            traceback.print_exc()
        finally:
            self._die()

    def _hear(self) -> None:
        pending = b""
        watched = [self._orders, self._alarm.fileno(), *([] if self._watchdog is None else [self._watchdog])]
        while True:
            ready, _, _ = select.select(watched, [], [])
            if self._alarm.fileno() in ready and self._has_lapsed():
                self._die(SLOT_LAPSED)
            if self._watchdog in ready:  # nobody would hold the deadline if this process could not
                self._die()
            if self._orders not in ready:
                continue
            chunk = os.read(self._orders, CHUNK)
            if not chunk:
                self._die()
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._obey(decode(line, SlotOrder, limit=MAX_LINE_BYTES))  # type: ignore[arg-type]  # a union of structs

    def _obey(self, order: SlotOrder) -> None:
        match order:
            case Outfit(store=url):
                self._store_url = url
            case RunTask(token=token, deadline_ns=deadline):
                with self._lock:
                    self._told[token] = deadline
                self._runs.put(order)
            case Renew(token=token, deadline_ns=deadline):
                with self._lock:
                    if token == self._token:
                        self._hold(deadline)
                    elif token in self._told:  # else it has just ended
                        self._told[token] = deadline
            case StopRun(token=token, reason=reason):
                with self._lock:
                    if token == self._token or token in self._told:
                        self._stops[token] = reason
                    task = self._task if token == self._token else None
                if task is not None:
                    task.abort()
            case Recall():
                with self._lock:
                    tokens, self._told = list(self._told), {}
                    for token in tokens:
                        self._stops.pop(token, None)
                self._mouth.say(SlotRecalled(tokens=tokens))

    @staticmethod
    def _die(exit_code: int = 1) -> None:
        """End everything that stems from this process, and then itself.

        While something cannot be ended, this process stays as its ancestor, for who is to know it; but as another
        program, so that the task itself goes on in no case.
        """
        try:
            processes.kill_descendants()
        except HostUnfit:
            os.execv(sys.executable, [sys.executable, *watchdog.command("--below", str(exit_code))])  # noqa: S606  # no shell is wanted
        finally:
            os._exit(exit_code)

    # ------------------------------------------------------------ one run

    def _run(self, order: RunTask) -> SlotEnded:
        self._live.begin()
        task: Task | None = None
        context: _Context | None = None
        reason: Reason | None = None
        again = False
        try:
            task = Task.class_from_name(order.request.task)()
            if self._store is None:
                self._store = Store.open(self._store_url)
            context = _Context(
                order=order,
                store=self._store,
                mouth=self._mouth,
                live=self._live,
                output=self._output,
            )
            task.attach(context)
            task.configure(order.request.data)
            with self._lock:
                self._task = task
                stop = self._stops.get(order.token)
            if stop is not None:
                task.abort()
            with limits.kept(order.limits, order.cpus), self._output.kept(_log_opener(task)):
                result = "success" if task.execute() else "failure"
        except BaseException as error:  # noqa: BLE001  # a task's own code: SystemExit and the like are its errors, too
            result = "error"
            again = isinstance(error, OutsideError)  # a store that is away says nothing of the request
            reason = _explain(error, None if task is None else task.reason, order.request.limits)
        with self._lock:
            self._task = None
        os.chdir("/")
        left = None
        try:
            processes.kill_descendants()  # what forked away goes, whatever its task said
        except HostUnfit as error:  # the host's fault: the task has said what it had to say
            left = str(error)
        if task is not None and task.aborted:
            with self._lock:
                reason = Reason(text=self._stops.get(order.token, "aborted"), stage=_stage(task))
            result = "aborted"
        elif task is not None and result != "error":
            reason = task.reason
        if result == "failure" and reason is None:
            reason = Reason(text="the task says that its work failed, and does not say why; its logs may")
        with self._lock:
            self._token = None
            self._stops.pop(order.token, None)
            self._deadline_ns = None
            if not self._told:  # else the next run sets it
                self._alarm.set(None)
        return SlotEnded(
            result=result,  # type: ignore[arg-type]  # one of the four words
            reason=_with_logs_problem(None if reason is None else bounded(reason), task),
            again=result in {"failure", "error"} and (again or (task is not None and task.try_again)),
            artifacts=[] if context is None else context.artifacts,
            left=left,
            litter=context is not None and context.leave(),
            unfit=None if context is None else context.unfit,
        )


def _condition() -> tuple[Any, ...]:
    """Look at what a run may leave changed in its process, to the harm of the next one."""
    streams = tuple((stream, getattr(stream, "closed", True)) for stream in (sys.stdout, sys.stderr))
    variables = os.environ._data  # type: ignore[attr-defined]  # noqa: SLF001  # its copy takes longer than a short run
    return variables.copy(), threading.active_count(), streams


def _log_opener(task: Task) -> Callable[[], BinaryIO]:
    return lambda: task.open_debug_log_file("output.log", mode="ab")


def _stage(task: Task) -> str | None:
    return None if task.reason is None else task.reason.stage


def _with_logs_problem(reason: Reason | None, task: Task | None) -> Reason | None:
    """Tell who will look for the logs of a run why there are none."""
    if task is None or task.debug_logs_problem is None:
        return reason
    text = f"its debug logs could not be uploaded: {task.debug_logs_problem}"
    if reason is None:
        return Reason(text=text)
    return msgspec.structs.replace(reason, text=f"{reason.text} ({text})")


def _explain(error: BaseException, said: Reason | None, asked: Limits | None) -> Reason:
    """Make a reason of what a task raised: its own words, and where it was."""
    if isinstance(error, MemoryError):
        limit = "" if asked is None or asked.memory is None else f", with a limit of {asked.memory} bytes"
        return Reason(
            text=f"the run needed more memory than it may have{limit}: the task raised {type(error).__name__}",
            stage=None if said is None else said.stage,
            status="memory",
        )
    if isinstance(error, MqworkerError):
        return Reason(text=str(error), stage=None if said is None else said.stage)
    frames = traceback.extract_tb(error.__traceback__)
    line = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}" if frames else None
    return Reason(
        text=f"the task raised {type(error).__name__}: {error}", stage=None if said is None else said.stage, line=line
    )


def _analyze(words: int, work_directory: Path) -> None:
    """Say what this host can do."""
    found = Task.analyze_worker_tasks()
    metadata = {**found.metadata, **processes.system_metadata(work_directory)}
    _Mouth(words).say(
        Analysis(metadata=metadata, tasks=dict(found.tasks), failures={**found.unimported, **found.failures})
    )


def main() -> None:
    """Be a slot, or look at the host."""
    processes.go_first_when_memory_ends()
    words = os.dup(1)  # not inherited by anybody
    os.dup2(2, 1)  # what tasks print while their modules load is for the agent's own log
    if sys.argv[1:2] == ["--analyze"]:
        _analyze(words, Path(sys.argv[2]))
        return
    watchdog = int(sys.argv[1]) if sys.argv[1:] else None
    if watchdog is not None:
        os.set_inheritable(watchdog, False)
    orders = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.chdir("/")
    Slot(orders=orders, words=words, watchdog=watchdog).serve()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the agent is gone: there is nobody left to tell
        main()
