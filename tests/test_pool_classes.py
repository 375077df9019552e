"""Requirement classes in the pool: shared, divided, escaped, re-keyed, private, and gone when nobody needs them."""

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from mqworker.messages import (
    Void,
)
from mqworker.task import Task
from tests.driving import Peer


@pytest.fixture(autouse=True)
def picky(coloured):  # noqa: ARG001  # it forgets the tasks of a test
    """A task that reads more of its data on some workers."""

    class Picky(Task):
        TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {"type": "object"}

        def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
            data = self.data
            if worker_metadata.get("colour") != data.get("colour"):
                return False
            return not worker_metadata.get("deep") or bool(data.get("size", 0) <= worker_metadata["size"])

        def _execute(self) -> bool:
            return True

    return Picky


TASKS = {"picky": None, "coloured": None, "noop": 1}


def class_of(driven, request):
    return driven.view(request).requirement


# ---------------------------------------------------------------- private requirements


def test_a_refused_request_goes_also_to_a_worker_that_reads_what_nobody_has_read_of_it(driven):
    anna = Peer(driven, tasks=TASKS, colour="red").join()
    one = driven.request("picky", {"colour": "red", "size": 1})
    anna.follow()
    assert driven.states(one) == ["offered"]
    anna.refuse(one)
    driven.turn()
    assert len(anna.hear(Void)) == 1
    assert driven.states(one) == ["pending"]
    Peer(driven, "bert", tasks=TASKS, colour="red", deep=True, size=0).join()
    assert driven.states(one) == ["pending"]
    cora = Peer(driven, "cora", tasks=TASKS, colour="red", deep=True, size=3).join()

    cora.run(one)


# ---------------------------------------------------------------- what requires sees


def test_requires_sees_the_metadata_as_they_are_whatever_the_task_has_done_to_its_own(driven):
    class Changing(Task):
        TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {"type": "object"}

        def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
            return worker_metadata.pop("mem", None) is not None  # type: ignore[attr-defined]  # as tasks do

        def _execute(self) -> bool:
            return True

    one = driven.request("changing", {}, requires={"required": ["mem"]})
    anna = Peer(driven, tasks={"changing": None}, mem=4).join()

    anna.run(one)
