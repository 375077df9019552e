"""A task that takes its time, and notes outside the pool when each run begins and ends. For benchmarks/idle_slot.py."""

import json
import os
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from mqworker.task import Task


class Timed(Task):
    """Wait; write down when, in which slot, and for which request."""

    TASK_VERSION = 1
    TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "journal": {"type": "string"},
            "label": {"type": "string"},
            "seconds": {"type": "number", "minimum": 0},
            "tag": {"type": "string"},
        },
        "required": ["journal", "label", "seconds"],
        "additionalProperties": False,
    }

    def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
        """Ask for a tag, if the request names one."""
        if not super().can_run_on(worker_metadata):
            return False
        return "tag" not in self.data or self.data["tag"] in worker_metadata.get("system:tags", [])

    def _note(self, what: str) -> None:
        line = {
            "what": what,
            "label": self.data["label"],
            "slot": os.getpid(),
            "worker": os.environ.get("MQWORKER_TASK_TIMED_WORKER", ""),
            "ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        }
        journal = os.open(self.data["journal"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(journal, json.dumps(line).encode() + b"\n")
        finally:
            os.close(journal)

    def _execute(self) -> bool:
        self._note("start")
        self.wait_aborted(self.data["seconds"])
        self._note("end")
        return not self.aborted
