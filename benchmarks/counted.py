"""The work of benchmarks.work as a task of mqworker."""

from typing import Any, ClassVar

from benchmarks import work
from mqworker.task import Task


class Counted(Task):
    """Note that it ran."""

    TASK_VERSION = 1
    TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {"number": {"type": "string"}, "text": {"type": "string"}},
        "required": ["number", "text"],
        "additionalProperties": False,
    }

    def _execute(self) -> bool:
        work.run(**self.data)
        return True
