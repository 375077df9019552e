"""What tasks say of requests: drafts, unfit ones, fingerprints, and questions that learn."""

import importlib.util
import sys
import threading
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from mqworker.examiner import LAST_PLACEHOLDER, Examiner, wrong_input
from mqworker.messages import RecordedArtifact, Request, Take
from mqworker.requirements import RequirementClass
from mqworker.task import Task
from tests.driving import an_id

pytestmark = pytest.mark.usefixtures("coloured")


@pytest.fixture
def examiner():
    return Examiner()


def request(task="coloured", data=None, **fields):
    return Request(id=an_id(1), task=task, data=data or {}, **fields)


def taking(*places, category="test:wood"):
    return [Take(into=place, request=an_id(7), category=category) for place in places]


def artifact(number, category="test:wood"):
    return RecordedArtifact(
        id=number, category=category, name="log", data={}, files=[], relations=[], request=None, created=0.0
    )


# ---------------------------------------------------------------- drafts


def test_a_draft_says_of_which_kind_a_request_is_and_what_it_needs(examiner, coloured):
    draft = examiner.examine(request(data={"colour": "red", "inputs": [4, 2]}, requires={"required": ["gpu"]}))

    assert draft.problem is None
    assert isinstance(draft.task, coloured)
    assert draft.task.data == draft.given == {"colour": "red", "inputs": [4, 2]}
    assert draft.inputs == (4, 2)
    assert draft.kind.task == "coloured"
    assert draft.kind.requires == '{"required":["gpu"]}'
    assert not draft.kind.whole


def test_the_task_of_a_kind_is_its_name_however_it_was_spelled(examiner):
    assert examiner.examine(request("CoLouRed")).kind == examiner.examine(request()).kind
    assert examiner.examine(request("NoBody")).kind.task == "nobody"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"task": "nobody"}, "expected the name of a task that this scheduler has, got 'nobody'"),
        ({"data": {"colour": 7}}, "colour"),
        ({"requires": {"type": "nonsense"}}, "requires: "),
        ({"data": {"inputs": [1], "at": 3}, "take": taking("/at/x")}, "got 3 at 'at'"),
    ],
)
def test_what_is_wrong_with_a_request_makes_it_unfit_and_is_told(examiner, wrong, told):
    draft = examiner.examine(request(**wrong))

    assert told in draft.problem
    assert draft.task is None
    assert draft.inputs == ()
    assert draft.kind.fingerprint != examiner.examine(request()).kind.fingerprint


@pytest.mark.parametrize("part", ["configure", "input_artifact_ids", "__init__"])
def test_a_task_that_raises_is_told_of_and_hurts_nobody(examiner, coloured, monkeypatch, part):
    def fail(*_args):
        raise ZeroDivisionError("its own mistake")

    monkeypatch.setattr(coloured, part, fail)
    draft = examiner.examine(request())

    assert draft.problem == "task coloured could not be configured: ZeroDivisionError: its own mistake"


def test_unfit_requests_are_apart_by_what_is_wrong_with_them(examiner):
    bad, worse = (examiner.examine(request(data={"colour": colour})) for colour in (7, 8))

    assert bad.kind != worse.kind
    assert bad.kind == examiner.examine(request(data={"colour": 7})).kind


# ---------------------------------------------------------------- what is taken


def test_what_is_taken_has_a_placeholder_until_it_is_there_and_is_no_input_before(examiner):
    class Joining(Task):
        TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {"properties": {"parts": {"required": ["left", "right"]}}}

        def input_artifact_ids(self) -> list[int]:
            return [*self.data["parts"].values()]

        def _execute(self) -> bool:
            return True

    one = request("joining", {"parts": {"top": 5}}, take=taking("/parts/left", "/parts/right"))
    draft = examiner.examine(one)

    assert draft.problem is None
    assert draft.given == {"parts": {"top": 5, "left": LAST_PLACEHOLDER, "right": LAST_PLACEHOLDER - 1}}
    assert draft.inputs == (5,)
    assert one.data == {"parts": {"top": 5}}
    bound = request("joining", {"parts": {"top": 5, "left": 8, "right": 9}}, take=one.take)
    assert examiner.examine(bound, bound=True).inputs == (5, 8, 9)
    assert examiner.examine(bound, bound=True).given == bound.data
    assert examiner.examine(bound).inputs == (5,)


@pytest.mark.parametrize(("category", "fits"), [("test:wood", True), ("test:stone", False)])
def test_what_is_taken_as_an_input_must_be_of_the_category_that_its_task_wants(examiner, coloured, category, fits):
    coloured.input_artifact_ids = lambda self: [self.data["input"]]
    draft = examiner.examine(request(take=taking("/input", category=category)))
    beside = examiner.examine(request(data={"input": 3}, take=taking("/other", category=category)))

    assert (draft.problem is None) is fits
    assert beside.problem is None
    assert beside.inputs == (3,)


def test_an_input_is_wrong_if_it_is_missing_or_of_another_category(examiner):
    draft = examiner.examine(request(data={"inputs": [1, 2]}))

    assert wrong_input(draft, {1: artifact(1), 2: artifact(2)}) is None
    assert "got 2, which does not exist" in wrong_input(draft, {1: artifact(1)})
    assert "got artifact 2 of category test:stone" in wrong_input(draft, {1: artifact(1), 2: artifact(2, "test:stone")})


# ---------------------------------------------------------------- what a task's code is


SOURCE = """
from mqworker.task import Task

class Carving(Task):
    TASK_VERSION = {version}

    def can_run_on(self, worker_metadata):
        return {answer}

    def _execute(self):
        return True
"""


@pytest.fixture
def carving(tmp_path):
    """Load a task's module again and again, each time with another source."""
    names = []

    def load(version=1, answer="True"):
        Task._sub_tasks.pop("carving", None)
        name = f"carving_{len(names)}"
        names.append(name)
        file = tmp_path / f"{name}.py"
        file.write_text(SOURCE.format(version=version, answer=answer))
        spec = importlib.util.spec_from_file_location("carving_module", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules["carving_module"] = module
        spec.loader.exec_module(module)
        return module.Carving

    yield load
    sys.modules.pop("carving_module", None)


def test_a_fingerprint_changes_with_the_source_of_a_task_and_with_its_version_only(carving):
    same, again, other, newer = (
        Examiner().fingerprint(carving(**one)) for one in ({}, {}, {"answer": "False"}, {"version": 2})
    )

    assert same == again
    assert len({same, other, newer}) == 3


def test_a_task_without_a_source_goes_by_its_version(examiner, carving):
    task = carving()
    sys.modules.pop("carving_module")
    first = examiner.fingerprint(task)
    second = carving(version=2)
    sys.modules.pop("carving_module")

    assert first != examiner.fingerprint(second)


def keeping(**methods):
    return type("Keeping", (Task,), {"_execute": lambda _self: True, **methods})


def test_a_task_that_puts_data_elsewhere_counts_as_reading_all_of_it(examiner):
    def configure(self, data):
        Task.configure(self, data)
        self.colour = data.get("colour")

    keeping(configure=configure)

    assert examiner.examine(request("keeping", {"colour": "red"})).kind.whole
    assert examiner.examine(request("keeping", {})).kind.whole


class Options:
    def __init__(self):
        self.colour = "any"


class Touchy:
    def __eq__(self, _other):
        raise ZeroDivisionError

    __hash__ = None


@pytest.mark.parametrize("place", ["attribute", "list", "object"])
def test_a_task_that_puts_data_into_what_it_has_from_the_start_does_too(examiner, place):
    def start(self):
        Task.__init__(self)
        self.colour, self.colours, self.options = None, [], Options()

    def configure(self, data):
        Task.configure(self, data)
        if "colour" in data:
            if place == "attribute":
                self.colour = data["colour"]
            elif place == "list":
                self.colours.append(data["colour"])
            else:
                self.options.colour = data["colour"]

    keeping(configure=configure, __init__=start)

    assert examiner.examine(request("keeping", {"colour": "red"})).kind.whole
    assert not examiner.examine(request("keeping", {})).kind.whole


@pytest.mark.parametrize("made", [threading.Lock, Touchy])
def test_a_task_of_whose_parts_nobody_can_say_whether_they_changed_does_too(examiner, made):
    def start(self):
        Task.__init__(self)
        self.part = made()

    keeping(__init__=start)

    assert examiner.examine(request("keeping")).kind.whole


def test_the_tasks_that_come_along_keep_no_data_elsewhere(examiner):
    assert not examiner.examine(request("noop", {"duration": 1})).kind.whole
    sbuild = {"input": {"source_artifact_id": 1}, "host_architecture": "amd64", "distribution": "bookworm"}
    draft = examiner.examine(request("sbuild", sbuild))
    assert draft.problem is None
    assert not draft.kind.whole


# ---------------------------------------------------------------- questions


def asked(examiner, draft, *, learns=True):
    """Return a question of a class of its own, and what it learns."""
    one = RequirementClass(id=1, kind=draft.kind, data=draft.given)
    learned = []

    def learn(reads):
        learned.append([read.key for read in reads])
        one.known.update(read.key for read in reads)
        return learns

    return examiner.question(one, draft, learn), learned


def test_a_question_learns_what_is_read_of_the_data_once(examiner):
    question, learned = asked(examiner, examiner.examine(request(data={"colour": "red"})))

    assert question.task == "coloured"
    assert question.observe({"colour": "red"}).answer
    assert not question.observe({"colour": "blue"}).answer
    assert not question.observe({}).answer
    assert learned == [[("object", ("colour",))]]


def test_an_answer_that_hangs_on_what_its_class_does_not_agree_on_is_no(examiner):
    question, learned = asked(examiner, examiner.examine(request(data={"colour": "red"})), learns=False)
    seen = question.observe({"colour": "red"})

    assert len(learned) == 1
    assert (seen.answer, seen.error, seen.data) == (False, None, ())
    assert {read.key[1][0] for read in seen.metadata} == {"colour"}
    assert question.plain({"colour": "red"}) == (True, None)


def test_a_divided_class_answers_plainly_as_it_does_when_watched(examiner):
    """Else the two contradict each other, and one of its requests would answer for all."""
    draft = examiner.examine(request(data={"colour": "red"}))
    one = RequirementClass(id=1, kind=draft.kind, data=draft.given, open=False, divided=True)
    question = examiner.question(one, draft, lambda _reads: False)

    assert not question.observe({"colour": "red"}).answer
    assert question.plain({"colour": "red"}) == (False, None)


def test_what_a_task_raises_is_no_and_told(examiner):
    question, _ = asked(examiner, examiner.examine(request(data={"colour": "raises"})))

    assert question.observe({}).error == "KeyError: 'no such colour'"
    assert question.plain({}) == (False, "KeyError: 'no such colour'")


def test_a_requests_own_schema_is_asked_too(examiner):
    schema = {"properties": {"memory": {"type": "integer", "minimum": 8}}, "required": ["memory"]}
    question, _ = asked(examiner, examiner.examine(request(data={"colour": "red"}, requires=schema)))

    assert [question.observe({"colour": "red", "memory": memory}).answer for memory in (4, 8)] == [False, True]
    assert question.plain({"colour": "red"}) == (False, None)
    assert question.plain({"colour": "red", "memory": 9}) == (True, None)


def test_an_unfit_request_can_run_nowhere(examiner):
    question, learned = asked(examiner, examiner.examine(request("nobody")))

    assert question.plain({}) == (False, None)
    assert (question.observe({}).answer, question.observe({}).metadata) == (False, ())
    assert learned == []


def test_what_one_question_leaves_in_a_task_does_not_answer_the_next(examiner):
    def can_run_on(self, _metadata: Mapping[str, Any]) -> bool:
        self.asked = getattr(self, "asked", 0) + 1
        return self.asked == 1

    keeping(can_run_on=can_run_on)
    draft = examiner.examine(request("keeping"))
    question, _ = asked(examiner, draft)

    assert [question.plain({})[0] for _ in range(2)] == [True, True]
    assert question.observe({}).answer
    assert draft.task.data == {}


def test_a_class_of_an_earlier_scheduler_is_examined_by_what_it_began_with(examiner):
    first = examiner.examine(request(data={"colour": "red"}, requires={"required": ["gpu"]}))
    draft = examiner.recall(RequirementClass(id=1, kind=first.kind, data=first.given))

    assert draft.kind == first.kind
    assert draft.task.data == {"colour": "red"}
    assert draft.request.requires == {"required": ["gpu"]}
