"""Tasks that only tests have: one that keeps a journal, and some that misbehave."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mqworker.task import Task, TaskRunCommandMixin


class Journal(Task):
    """Write to a file outside the pool when a run starts and ends; in between, wait for a gate file to appear."""

    TASK_VERSION = 1
    TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "journal": {"type": "string"},
            "gate": {"type": "string"},
            "tag": {"type": "string"},
            "label": {"type": "string"},
        },
        "required": ["journal"],
        "additionalProperties": False,
    }

    def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
        if not super().can_run_on(worker_metadata) or "JOURNAL_SHY" in os.environ:  # not by the metadata alone: a bug
            return False
        return "tag" not in self.data or self.data["tag"] in worker_metadata.get("system:tags", [])

    def _note(self, what: str) -> None:
        line = json.dumps(
            {
                "what": what,
                "pid": os.getpid(),
                "ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME),
                "label": self.data.get("label"),
            }
        )
        fd = os.open(self.data["journal"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, line.encode() + b"\n")
        os.fsync(fd)
        os.close(fd)

    def _execute(self) -> bool:
        self._note("start")
        gate = self.data.get("gate")
        while gate is not None and not Path(gate).exists():
            if self.wait_aborted(0.02):
                return False
        self._note("end")
        return True


class Poison(Journal):
    """Kill the agent that runs it, each time."""

    def _execute(self) -> bool:
        self._note("start")
        os.kill(os.getppid(), signal.SIGKILL)
        return bool(signal.pause())


class Picky(Task):
    """Fail on hosts that are not right, which the metadata do not say."""

    TASK_VERSION = 1

    def _execute(self) -> bool:
        return "PICKY_FAILS" not in os.environ


class Link(Task):
    """Make an artifact that has one word more than the one that it was given."""

    TASK_VERSION = 1
    TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "word": {"type": "string"},
            "input": {"type": "object", "properties": {"id": {"type": "integer", "minimum": 1}}},
            "fail": {"type": "boolean"},
        },
        "required": ["word"],
        "additionalProperties": False,
    }
    INPUT_ARTIFACT_CATEGORY = "test:chain"

    def input_artifact_ids(self) -> list[int]:
        return [self.data["input"]["id"]] if "input" in self.data else []

    def _execute(self) -> bool:
        if self.data.get("fail"):
            return False
        words = ""
        for number in self.input_artifact_ids():
            self.world.fetch_artifact(number, self.world.work_directory)
            words = (self.world.work_directory / "words").read_text()
        path = self.world.work_directory / "new"
        path.write_text(f"{words}{self.data['word']} ")
        self.world.upload_artifact(category="test:chain", name="chain", data={}, files={"words": path})
        return True


class Hungry(TaskRunCommandMixin, Task):
    """Use more of its host than it may, or hold on to it in ways that are hard to end."""

    TASK_VERSION = 1
    TERMINATE_GRACE = 1.0
    TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {"type": "object", "properties": {"how": {"type": "string"}}}

    SCRIPTS: ClassVar[dict[str, str]] = {
        "memory": 'for i in 1 2 3; do "$0" -c "b = b\'x\' * 80000000; input()" <>/dev/ptmx & done; wait',
        "oom": '"$0" -c "b = b\'x\' * 200000000"',
        "cpu": 'while :; do "$0" -S -c "sum(range(1000000))"; done',
        "disk": "mkdir -m 700 -p deep && head -c 50000000 /dev/zero > deep/file; exec sleep 1000",
        "processes": "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 1000 & done; wait",
        "cores": "nproc",
        "strays": "%s wait",
        "deaf": "trap '' TERM HUP; %s while :; do sleep 1000; done",
        "foreign": "{ $FOREIGN setsid sleep 1008; } & sleep 1009 & wait",
    }
    FOREIGN: ClassVar[list[str]] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    # In a session of its own, orphaned twice, stopped, in another namespace, and one that goes with its parent.
    STRAYS: ClassVar[str] = (
        "setsid sleep 1001 & (sh -c 'setsid sleep 1002 &' &) ; sh -c 'kill -STOP $$; sleep 1003' & "
        "unshare --user --map-root-user --pid --fork --mount-proc sh -c 'setsid sleep 1004 & sleep 1005' & "
        "setpriv --pdeathsig KILL sh -c 'sleep 1006 & sleep 1007' & "
    )

    def _execute(self) -> bool:
        how = self.data["how"]
        if how == "memory_error":
            return len(bytearray(400_000_000)) > 0
        if how in {"foreign_gil", "foreign_left"}:
            subprocess.Popen([*self.FOREIGN, "setsid", "sleep", "1008"])
        if how in {"gil", "foreign_gil"}:
            subprocess.Popen(["setsid", "sleep", "1009"])
            ctypes.PyDLL(None).sleep(1000)  # in C, and with Python's lock
        if how == "foreign_left":
            subprocess.Popen(["setsid", "sleep", "1009"])
            return not self.wait_aborted(3)  # until somebody has seen both
        script = self.SCRIPTS[how]
        script = script % self.STRAYS if "%s" in script else script.replace("$FOREIGN", " ".join(self.FOREIGN))
        return self.run_cmd(["sh", "-c", script, sys.executable], self.world.work_directory) == 0


class Badly(TaskRunCommandMixin, Task):
    """Misbehave as the request says."""

    TASK_VERSION = 1
    TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {"how": {"type": "string"}, "note": {"type": "string"}},
        "required": ["how"],
    }

    def _execute(self) -> bool:
        return bool(getattr(self, f"_{self.data['how']}")())

    def _raise(self) -> bool:
        raise RuntimeError("badly raised")

    def _sysexit(self) -> bool:
        sys.exit(7)

    def _exit(self) -> bool:
        print("these are my last words", flush=True)  # noqa: T201  # a task may print
        os._exit(23)

    def _segfault(self) -> bool:
        os.kill(os.getpid(), signal.SIGSEGV)
        return True

    def _gigabyte(self) -> bool:
        block = b"x" * 1023 + b"\n"
        for _ in range(1024):
            os.write(1, block * 1024)
        return True

    def _fork(self) -> bool:
        """Leave a child behind that has a session of its own, and one that comes back into the slot's code."""
        left = subprocess.Popen(["setsid", "sleep", "1000"])  # found by PATH
        Path(self.data["note"]).write_text(str(left.pid))
        return bool(os.fork() or True)

    def _stubborn(self) -> bool:
        """Ignore SIGTERM, the abort flag and everything else."""
        self.run_cmd(["sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000"], self.world.work_directory)
        while True:
            time.sleep(1)

    def _printed(self) -> bool:
        print("to be seen in the log")  # noqa: T201  # a task may print
        return True

    def _environment(self) -> bool:
        Path(self.data["note"]).write_text(json.dumps(dict(os.environ)))
        return True

    def _describe(self) -> bool:
        self.world.upload_artifact(category="test:large", name="large", data={"text": "x" * 20 * 2**20}, files={})
        return True
