"""Noop, a task that does nothing, in every way a task can do something: the one to copy.

A task is a class that inherits from Task; its name is the class name in lower case. Put it in a file of its own in this
directory and it is found. This one also serves as a load generator: time, memory, output and artifacts to order.
"""

import hashlib
from pathlib import Path
from typing import Any, ClassVar

from mqworker.task import Task

PAGE_BYTES = 4096  # memory counts as taken once each of its pages was written to


class Noop(Task):
    """Take the time, memory and output that the task data ask for, and end as they say."""

    # A worker gets a request only if its version is the scheduler's: raise it with every change that matters.
    TASK_VERSION = 1

    # What a request may say. Be strict: what is refused here never travels to a worker.
    TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "result": {"enum": ["success", "failure", "error"]},
            "duration": {"type": "number", "minimum": 0},  # seconds
            "progress": {"type": "integer", "minimum": 0, "maximum": 10_000},  # steps, spread over the duration
            "log_lines": {"type": "integer", "minimum": 0, "maximum": 1_000_000},
            "artifacts": {"type": "array", "items": {"type": "integer", "minimum": 0}},  # a size in bytes for each
            "seed": {"type": "integer"},  # another one gives artifacts of other content
            "memory": {"type": "integer", "minimum": 0},  # bytes
        },
        "additionalProperties": False,
    }

    def configure(self, task_data: dict[str, Any]) -> None:
        """Fill in what the request leaves open. The scheduler calls this too: look at nothing but the data."""
        super().configure(task_data)  # checks the schema and sets self.data
        defaults = {
            "result": "success",
            "duration": 0,
            "progress": 0,
            "log_lines": 0,
            "artifacts": [],
            "seed": 0,
            "memory": 0,
        }
        self.data = defaults | self.data

    # A task that needs something of its worker reports what is there in analyze_worker(), under keys made by
    # self.prefix_with_task_name(), and says in can_run_on() what it needs. Noop runs anywhere.

    def _execute(self) -> bool:
        """Do the work: True is success, False is failure, an exception is an error."""
        memory = bytearray(self.data["memory"])
        memory[::PAGE_BYTES] = bytes(len(range(0, len(memory), PAGE_BYTES)))

        self._write_lines(self.data["log_lines"])
        self._pass_time(self.data["duration"], steps=self.data["progress"])
        if self.aborted:  # look whenever it is cheap; what is returned then does not matter
            return False
        self._make_artifacts(self.data["artifacts"])

        if self.data["result"] == "error":
            raise RuntimeError("this request asked for an error")
        if self.data["result"] == "failure":
            self.conclude("this request asked for a failure", stage="run")  # why, for a person who has to act on it
            return False
        return True

    def _write_lines(self, count: int) -> None:
        # self.logger reaches those who follow the run, and is kept in the log artifact, whatever the result is.
        for number in range(1, count + 1):
            self.logger.info("line %d of %d", number, count)
            if self.aborted:
                return

    def _pass_time(self, seconds: float, *, steps: int) -> None:
        # Never time.sleep(): this wait is over at once when the work is aborted.
        pauses = max(1, steps)
        for step in range(1, pauses + 1):
            if self.wait_aborted(seconds / pauses):
                return
            if steps:
                self.world.report_progress(stage="run", fraction=step / steps)

    def _make_artifacts(self, sizes: list[int]) -> None:
        # self.world is what the slot gives a task: a directory of its own, and artifacts to fetch and to upload.
        for number, size in enumerate(sizes):
            path = self.world.work_directory / f"output-{number}"
            self._write_file(path, size, f"{self.data['seed']}:{number}")
            self.world.upload_artifact(
                category="mqworker:noop-output",
                name=path.name,
                data={"number": number, "size": size},
                files={path.name: path},
            )
            path.unlink()

    @staticmethod
    def _write_file(path: Path, size: int, label: str) -> None:
        # Different from the first byte on, and sparse after it: even gigabytes take no time.
        with path.open("wb") as file:
            file.write(hashlib.sha256(label.encode()).digest()[:size])
            file.truncate(size)
