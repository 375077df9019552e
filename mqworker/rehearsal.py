"""One task, here and now: no broker, no ledger, no store, no slot. For those who write tasks.

Gives the task a context of plain files: inputs come from where the author says, artifacts go to a directory.
"""

import contextlib
import hashlib
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any, Final, Literal

from mqworker import processes
from mqworker.errors import ArtifactInvalid, MqworkerError, NotFound, Unreadable
from mqworker.messages import Artifact, FileEntry, Reason, RecordedArtifact, RecordedRelation, Relation, decode, encode
from mqworker.task import Task, load_tasks

LOOK_SECONDS: Final = 0.2  # a join that never returns to the interpreter would keep Ctrl-C waiting


@dataclass(frozen=True, kw_only=True)
class Given:
    """Hold an input: what an artifact would say, and where its files are."""

    category: str
    name: str
    data: Mapping[str, Any]
    files: Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """Say how a rehearsal ended, and what it made; ids are the order of upload."""

    result: Literal["success", "failure", "error", "aborted"]
    reason: Reason | None
    artifacts: list[RecordedArtifact] = field(default_factory=list)


class _Context:
    """Give a task plain files for the world."""

    def __init__(
        self, work_directory: Path, inputs: Mapping[int, Given], keep: Path | None, say: Callable[[str], object]
    ) -> None:
        self.work_directory = work_directory
        self.artifacts: list[RecordedArtifact] = []
        self._inputs = inputs
        self._keep = keep
        self._say = say

    def fetch_artifact(self, artifact_id: int, destination: Path) -> RecordedArtifact:
        if artifact_id not in self._inputs:
            raise NotFound(
                f"expected an input for artifact {artifact_id}, got {sorted(self._inputs) or 'none'}: "
                f"say where its files are with --input {artifact_id}=PATH"
            )
        given = self._inputs[artifact_id]
        entries = []
        for name, source in given.files.items():
            target = destination / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            entries.append(_entry(name, source))
        return RecordedArtifact(
            id=artifact_id, category=given.category, name=given.name, data=dict(given.data), files=entries
        )

    def upload_artifact(
        self,
        *,
        category: str,
        name: str,
        data: dict[str, Any],
        files: Mapping[str, Path],
        relations: Sequence[Relation] = (),
    ) -> str:
        number = len(self.artifacts) + 1
        entries = [_entry(path, source) for path, source in files.items()]
        try:
            artifact = Artifact(
                handle=f"a{number}",
                category=category,
                name=name,
                data=data,
                files=entries,
                relations=list(relations),
            )
            decode(encode(artifact), Artifact)
        except (Unreadable, TypeError, ValueError) as error:
            raise ArtifactInvalid(f"the scheduler could not read the artifact {name!r}: {error}") from error
        if self._keep is not None:
            for path, source in files.items():
                if ".." in PurePosixPath(path).parts:
                    raise ArtifactInvalid(f"expected a file name within the artifact, got {path!r}")
                target = kept_directory(self._keep, number, category) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        self.artifacts.append(
            RecordedArtifact(
                id=number,
                category=category,
                name=name,
                data=data,
                files=artifact.files,
                relations=[
                    RecordedRelation(type=relation.type, target=self._number(relation.target)) for relation in relations
                ],
            )
        )
        return artifact.handle

    def report_progress(self, stage: str | None = None, fraction: float | None = None) -> None:
        words = [*([stage] if stage else []), *([f"{fraction:.0%}"] if fraction is not None else [])]
        self._say(f"[{' '.join(words)}]\n")

    def write_log(self, text: str) -> None:
        self._say(text)

    def settle_log(self) -> None:
        """Do nothing: what is printed is on the author's screen already."""

    @staticmethod
    def _number(target: int | str) -> int:
        return target if isinstance(target, int) else int(target.removeprefix("a"))


def kept_directory(keep: Path, number: int, category: str) -> Path:
    """Return where the files of an artifact are kept."""
    return keep / f"{number}-{category.replace(':', '-')}"


def rehearse(
    task: str,
    data: Mapping[str, Any],
    *,
    inputs: Mapping[int, Given],
    keep: Path | None,
    say: Callable[[str], object],
) -> Rehearsed:
    """Run a task in this process and return how it ended; what it prints goes to `say`. Ctrl-C aborts the task.

    Raises:
        NotFound: there is no such task.
        TaskConfigError: the task does not accept its data.
    """
    unimported = load_tasks()
    if not Task.is_valid_task_name(task):
        broken = "".join(f"; {module} does not import: {error}" for module, error in unimported.items())
        raise NotFound(f"expected the name of a task, got {task!r}: `mqworker tasks` lists them{broken}")
    instance = Task.class_from_name(task)()
    instance.configure(dict(data))
    processes.become_subreaper()
    directory = Path(tempfile.mkdtemp(prefix="mqworker-run-"))
    try:
        directory.chmod(0o755)  # a build chroot's user has to pass
        context = _Context(directory, inputs, keep, say)
        instance.attach(context)
        result, reason = _execute(instance, say)
    finally:
        processes.kill_descendants()
        processes.remove_tree(directory)
    return Rehearsed(result=result, reason=reason, artifacts=context.artifacts)


def _execute(
    task: Task, say: Callable[[str], object]
) -> tuple[Literal["success", "failure", "error", "aborted"], Reason | None]:
    ended: list[bool | BaseException] = []

    def run() -> None:
        try:
            ended.append(task.execute())
        except BaseException as error:  # noqa: BLE001  # a task's own code: SystemExit and the like are its errors, too
            ended.append(error)

    # In a thread of its own, so that Ctrl-C reaches abort() whatever the task is doing.
    thread = threading.Thread(target=run, name="task", daemon=True)
    with contextlib.redirect_stdout(sys.stderr), _aborting(task):
        thread.start()
        while thread.is_alive():
            thread.join(LOOK_SECONDS)
    [outcome] = ended
    if task.aborted:
        return "aborted", Reason(text="aborted with Ctrl-C", stage=task.reason.stage if task.reason else None)
    if isinstance(outcome, MqworkerError):
        return "error", Reason(text=str(outcome))
    if isinstance(outcome, BaseException):
        say("".join(traceback.format_exception(outcome)))
        return "error", Reason(text=f"the task raised {type(outcome).__name__}: {outcome}")
    if outcome:
        return "success", task.reason
    return "failure", task.reason or Reason(text="the task says that its work failed, and does not say why")


@contextlib.contextmanager
def _aborting(task: Task) -> Iterator[None]:
    """Have the first Ctrl-C abort the task, and the second end everything."""

    def on_interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        task.abort()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _entry(name: str, path: Path) -> FileEntry:
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return FileEntry(path=name, size=file.seek(0, 2), sha256=sha256)
    except OSError as error:
        raise ArtifactInvalid(f"expected a readable file at {path}: {error.strerror}") from error
