"""Tasks that keep a journal outside the pool, and end in every way that a task can.

The journal is proof against everything that is done to the pool: each line is one write at the end of a file, synced.
Who is killed writes no end. So a run, with all its children, holds a lock of its request, which the kernel releases
when the last of them is gone, and leaves the time in a file every few milliseconds.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self

from mqworker.task import Task

BEAT = 0.02  # seconds between two signs of life
OFFSPRING = Path(__file__).with_name("offspring.py")


class Burn(Task):
    """Live for a while as the data say, and end as they say."""

    TASK_VERSION = 1
    TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "seconds": {"type": "number", "minimum": 0},
            "how": {"enum": ["ok", "fail", "raise", "again", "exit", "kill-slot", "kill-agent"]},
            "agains": {"type": "integer"},
            "artifacts": {"type": "integer"},
            "children": {"type": "array", "items": {"enum": ["plain", "stubborn", "session", "parent", "left"]}},
            "stubborn": {"type": "boolean"},
            "tag": {"type": "string"},
        },
        "required": ["id", "how"],
        "additionalProperties": False,
    }
    LEASE = 5.0

    def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
        if not super().can_run_on(worker_metadata):
            return False
        return "tag" not in self.data or self.data["tag"] in worker_metadata.get("system:tags", [])

    def _execute(self) -> bool:
        with _Life(self.data["id"], self.world.work_directory.name) as life:
            return self._burn(life)

    def _burn(self, life: "_Life") -> bool:
        how = self.data["how"]
        children = [life.bear(kind, self.data.get("seconds", 0)) for kind in self.data.get("children", ())]
        end = time.monotonic() + self.data.get("seconds", 0)
        if self.data.get("stubborn"):
            while (left := end - time.monotonic()) > 0:
                time.sleep(min(0.05, left))
        elif self.wait_aborted(max(0.0, end - time.monotonic())):
            life.how = "aborted"
            return False
        for number in range(self.data.get("artifacts", 0)):
            self._upload(number)
        for kind, child in children:
            if kind != "left":  # what is left behind, the slot has to end
                child.kill()
                child.wait()
        if how == "again":
            how = self._after(life, self.data.get("agains", 1))
        if how == "raise":
            raise RuntimeError("burnt down, as asked for")
        if how == "exit":
            os._exit(23)
        if how == "kill-slot":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "kill-agent":
            _kill_agent()
        life.how = how
        return how == "ok"

    def _upload(self, number: int) -> None:
        path = self.world.work_directory / f"ashes-{number}"
        path.write_text(f"{self.data['id']} {number} {os.getpid()}\n" * (1 + number * 50))
        self.world.upload_artifact(category="test:ashes", name="ashes", data={"number": number}, files={"ashes": path})

    def _after(self, life: "_Life", agains: int) -> str:
        """Say "try again" so often, and then go well: counted where no attempt can forget it."""
        count = life.box / "again" / self.data["id"]
        with count.open("ab") as file:
            file.write(b".")
            file.flush()
            if file.tell() > agains:
                return "ok"
        self.conclude("not now", try_again=True)
        return "again"


class Smoulder(Burn):
    """Do the same under another name, so that one task can be paused and the other not."""


class _Life:
    """Tell of a run while it lives."""

    def __init__(self, request: str, token: str) -> None:
        self.box = Path(os.environ["MQWORKER_TASK_CHAOS"])
        self.how = "exception"
        self._request, self._token = request, token
        self._beats = self.box / "beats" / token
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self._lock = os.open(self.box / "locks" / self._request, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False  # an earlier run of this request, or a child of it, is still there
        self._note("start", alone=alone, agent=os.getppid())
        self._heart = threading.Thread(target=self._beat, name="heart")
        self._heart.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._over.set()
        self._heart.join()  # a slot that had one thread more than before would be replaced
        self._note("end", how=self.how)
        with suppress(FileNotFoundError):
            self._beats.unlink()
        os.close(self._lock)

    def bear(self, kind: str, seconds: float) -> tuple[str, subprocess.Popen[bytes]]:
        """Start a child that holds the lock, too."""
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", OFFSPRING, kind, self.box, self._token, self._request, str(seconds)],
            pass_fds=(self._lock,),
            stdin=subprocess.DEVNULL,
            start_new_session=kind == "session",
        )
        return kind, child

    def _beat(self) -> None:
        fd = os.open(self._beats, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not self._over.is_set():
                os.pwrite(fd, b"%d" % time.clock_gettime_ns(time.CLOCK_BOOTTIME), 0)
                self._over.wait(BEAT)
        finally:
            os.close(fd)

    def _note(self, what: str, **facts: object) -> None:
        line = {
            "what": what,
            "request": self._request,
            "token": self._token,
            "pid": os.getpid(),
            "ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME),
            "wall": time.time(),
            **facts,
        }
        fd = os.open(self.box / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, json.dumps(line).encode() + b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)


def _kill_agent() -> None:
    """Take the worker's agent along, as a task could that fills the memory."""
    agent = os.getppid()
    words = Path(f"/proc/{agent}/cmdline").read_bytes().split(b"\0")
    if b"worker" in words:  # else it is gone already, and this is somebody else
        os.kill(agent, signal.SIGKILL)
