"""What tasks say of requests: whether the data is valid, what they need, and which workers can run them.

The scheduler's side of the Task API: it makes tasks, configures them and asks them, and survives whatever they do. It
knows no worker, no queue and no ledger; what it hands on are drafts, and questions that matching puts to metadata.
"""

import copy
import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from mqworker.errors import TakeInvalid, TaskConfigError
from mqworker.matching import Question
from mqworker.messages import RecordedArtifact, Request, shortened
from mqworker.needs import bind
from mqworker.requirements import Kind, RequirementClass, schema_text
from mqworker.requires import problem as requires_problem
from mqworker.requires import satisfied
from mqworker.task import Task
from mqworker.tracking import Ask, Observation, Read, ask_plainly, observe

MAX_INPUTS: Final = 1000  # artifacts that the data of one request may name
LARGEST_ID: Final = 2**63 - 1  # of an artifact: what the ledger can keep
LAST_PLACEHOLDER: Final = 2**53 - 1  # ids of artifacts that do not exist yet count down from here: JSON's last integer
_OWN: Final = frozenset(vars(Task()))  # what each task has: its data, and what no data is in
NOBODY: Final = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Hold a request that was examined, before the ledger has it."""

    request: Request
    kind: Kind
    task: Task | None  # configured; None: there is a problem
    given: Mapping[str, Any]  # what it was configured with
    problem: str | None = None
    inputs: tuple[int, ...] = ()


class Examiner:
    """Ask tasks about requests."""

    def __init__(self) -> None:
        self._fingerprints: dict[type[Task], str] = {}
        self._fresh: dict[type[Task], Mapping[str, Any]] = {}

    def examine(self, request: Request, *, bound: bool = False) -> Draft:
        """Ask the request's task whether it accepts the data; costs a construction and a validation.

        `bound` says that what it takes is in its data already; else ids of no artifact stand in for it.
        """
        if not Task.is_valid_task_name(request.task):
            return _unfit(request, f"expected the name of a task that this scheduler has, got {request.task!r}")
        if request.requires is not None and (problem := requires_problem(request.requires)) is not None:
            return _unfit(request, f"requires: {problem}")
        task_class = Task.class_from_name(request.task)
        takes = {} if bound else {LAST_PLACEHOLDER - number: take for number, take in enumerate(request.take)}
        given = request.data
        try:
            if takes:
                given = bind(given, {take.into: placeholder for placeholder, take in takes.items()})
            task = task_class()
            task.configure(given)
            inputs = task.input_artifact_ids()
        except (TaskConfigError, TakeInvalid) as error:
            return _unfit(request, str(error))
        except Exception as error:  # noqa: BLE001  # a task's own code: it may raise anything, and must not end the scheduler
            return _unfit(request, f"task {request.task} could not be configured: {type(error).__name__}: {error}")
        if len(inputs) > MAX_INPUTS:
            return _unfit(request, f"expected at most {MAX_INPUTS} input artifacts, got {len(inputs)}")
        if not all(type(number) is int and 0 < number <= LARGEST_ID for number in inputs):
            return _unfit(request, f"expected ids of input artifacts from 1 to {LARGEST_ID}, got another")
        for placeholder in set(inputs) & takes.keys():
            if task.INPUT_ARTIFACT_CATEGORY not in (None, takes[placeholder].category):
                text = (
                    f"expected to take an artifact of category {task.INPUT_ARTIFACT_CATEGORY}, got "
                    f"{takes[placeholder].category}"
                )
                return _unfit(request, text)
        kind = Kind(
            task=task.name,
            fingerprint=self.fingerprint(task_class),
            requires=schema_text(request.requires),
            whole=self._keeps_data(task),
        )
        return Draft(
            request=request,
            kind=kind,
            task=task,
            given=given,
            inputs=tuple(number for number in inputs if number not in takes),
        )

    def recall(self, one: RequirementClass) -> Draft:
        """Examine the request that a requirement class of an earlier scheduler began with."""
        requires = msgspec.json.decode(one.kind.requires) if one.kind.requires else None
        return self.examine(Request(id=NOBODY, task=one.kind.task, data=dict(one.data), requires=requires))

    def question(self, one: RequirementClass, draft: Draft, learn: Callable[[Sequence[Read]], bool]) -> Question:
        """Return what a requirement class asks of workers; one of its requests speaks for all of them.

        `learn` is told of reads that its members need not agree on; it says whether the answer counts nevertheless.
        """
        if draft.task is None:
            never = Observation(answer=False, metadata=(), data=())
            return Question(task=one.kind.task, observe=lambda _: never, plain=lambda _: (False, None))
        data = draft.task.data
        ask = self.ask(draft)

        def watched(metadata: Mapping[str, Any]) -> Observation:
            observation = observe(ask, metadata, data)
            unknown = one.unknown(observation.data)
            if unknown and not learn(unknown):
                return Observation(
                    answer=False, metadata=observation.metadata, data=(), error=None, tracked=observation.tracked
                )
            return observation

        def plain(metadata: Mapping[str, Any]) -> tuple[bool, str | None]:
            if not one.divided:
                return ask_plainly(ask, metadata, data)
            seen = watched(metadata)  # one of its requests speaks for the others only in what they agree on
            return seen.answer, seen.error

        return Question(task=one.kind.task, observe=watched, plain=plain)

    def passing_question(self, draft: Draft) -> Question:
        """Return the question of one request alone: nothing is learned of it."""
        passing = RequirementClass(id=0, kind=draft.kind, data=draft.given)
        return self.question(passing, draft, lambda _reads: True)

    def ask(self, draft: Draft) -> Ask:
        """Return how to ask whether a request may run, by metadata and data that may be watched."""
        task, requires = draft.task, draft.request.requires

        def ask(metadata: Mapping[str, Any], data: Mapping[str, Any]) -> bool:
            asked = copy.copy(task)  # what one question leaves in it must not answer the next
            if asked is None:
                return False
            asked.data = data  # type: ignore[assignment]  # it passes for a dict
            # `requires` first: can_run_on() may change what it is handed.
            return (requires is None or satisfied(requires, metadata)) and bool(asked.can_run_on(metadata))

        return ask

    def fingerprint(self, task: type[Task]) -> str:
        """Return what changes when a task's code does."""
        known = self._fingerprints.get(task)
        if known is None:
            digest = hashlib.sha256(repr(task.TASK_VERSION).encode())
            for module in dict.fromkeys(one.__module__ for one in task.__mro__ if issubclass(one, Task)):
                digest.update(module.encode() + b"\0" + _source(module))
            known = self._fingerprints[task] = digest.hexdigest()
        return known

    def _keeps_data(self, task: Task) -> bool:
        """Say whether a configured task may keep data elsewhere, where nobody sees it being read."""
        fresh = self._fresh.get(type(task))
        if fresh is None:
            fresh = self._fresh[type(task)] = vars(type(task)())
        return any(
            name not in _OWN and (name not in fresh or not _same(value, fresh[name]))
            for name, value in vars(task).items()
        )


def _same(value: Any, fresh: Any) -> bool:
    """Say whether configuring has left a value as it was; who cannot tell says no."""
    try:
        return type(value) is type(fresh) and (bool(value == fresh) or _parts(value) == _parts(fresh) != {})
    except Exception:  # noqa: BLE001  # a stranger's comparison
        return False


def _parts(value: Any) -> Mapping[str, Any]:
    return getattr(value, "__dict__", {})


def wrong_input(draft: Draft, artifacts: Mapping[int, RecordedArtifact]) -> str | None:
    """Say which input artifact is missing or of the wrong category."""
    wanted = draft.task.INPUT_ARTIFACT_CATEGORY if draft.task is not None else None
    for number in draft.inputs:
        artifact = artifacts.get(number)
        if artifact is None:
            return f"expected the id of an artifact, got {number}, which does not exist: see `mqworker artifact list`"
        if wanted is not None and artifact.category != wanted:
            return f"expected an artifact of category {wanted}, got artifact {number} of category {artifact.category}"
    return None


def _unfit(request: Request, problem: str) -> Draft:
    problem = shortened(problem)  # it may show the data
    kind = Kind(task=request.task.lower(), fingerprint=f"unfit: {problem}", requires="", whole=False)
    return Draft(request=request, kind=kind, task=None, given=request.data, problem=problem)


def _source(module: str) -> bytes:
    try:
        return inspect.getsource(sys.modules[module]).encode()
    except (OSError, TypeError, KeyError):  # it has no source here: then its version alone speaks for it
        return b""
