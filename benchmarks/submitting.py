"""The submitter's side of a measurement, alike for every system: orders on standard input, figures on standard output.

    {"do": "send", "way": "one by one", "first": 0, "number": 100}   submit
    {"do": "results"}                                                wait for what results there are of what was sent
    {"do": "send and wait", "way": "together", ...}                  both
    {"do": "pace", "first": 100, "number": 50}                       submit each when the one before has begun

A program of each system calls `serve` with what it has to send by. Knows none of the systems.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from benchmarks import work

ONE_BY_ONE: Final = "one by one"
TOGETHER: Final = "together"
POLL_SECONDS: Final = 0.0005
REST_SECONDS: Final = 0.01  # between two paced tasks: all that the last one caused has happened
PATIENCE: Final = 60.0


class Sender(Protocol):
    """What a system must be able to do for its submitter."""

    def one_by_one(self, numbers: Sequence[int]) -> Any:
        """Submit each by a call of its own that returns once it is safe, and return what `results` needs."""

    def together(self, numbers: Sequence[int]) -> Any:
        """Submit all in the quickest way that is as safe, and return what `results` needs."""

    def results(self, sent: Any) -> int:
        """Wait until the submitter knows all results, and return how many it knows; 0 if the system has none."""


def serve(sender: Sender) -> None:
    """Follow orders until there are no more."""
    notes = Path(os.environ[work.NOTES])
    sent = None
    _say({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "pace":
            _say(_paced(sender, range(order["first"], order["first"] + order["number"]), notes))
            continue
        answer = {}
        if order["do"] != "results":
            answer["began"] = work.now()
            submit = sender.one_by_one if order["way"] == ONE_BY_ONE else sender.together
            sent = submit(range(order["first"], order["first"] + order["number"]))
        if order["do"] != "send":
            answer["results"] = sender.results(sent)
            answer["known"] = work.now()
        _say(answer)


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def _paced(sender: Sender, numbers: Sequence[int], notes: Path) -> dict[str, Any]:
    began = []
    seen = work.count(notes)
    for wanted, number in enumerate(numbers, start=seen + 1):
        time.sleep(REST_SECONDS)
        began.append(work.now())
        sender.one_by_one([number])
        deadline = time.monotonic() + PATIENCE
        while work.count(notes) < wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"task {number} did not begin within {PATIENCE:g} s")
            time.sleep(POLL_SECONDS)
    return {"began": began}
