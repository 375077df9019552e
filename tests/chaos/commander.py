"""Somebody who keeps changing their mind, in a process of their own: abort, reprioritise, pause, resume, retry, look.

Every command stands in a record before it is sent and when it is answered: what was confirmed must hold.
"""

import json
import os
import random
import subprocess
import sys
import time
import uuid
from pathlib import Path

from mqworker.client import Client
from mqworker.errors import MqworkerError, OutsideError
from tests.chaos.record import Record

PATIENCE = 10.0  # seconds
PAUSABLE = {"worker": ["w0", "w1", "w2", "w3"], "task": ["burn", "smoulder"], "group": ["night", "day"]}
COMMANDS = {
    "abort": 40,
    "reprioritise": 10,
    "pause": 8,
    "drain": 3,
    "retry": 6,
    "look": 8,
    "refresh": 2,
    "by_command": 2,
}


class Commander:
    def __init__(self, client, record, pace, rng):
        self._client = client
        self._record = record
        self._pace = pace
        self._rng = rng
        self._paused = {}  # (kind, name) to when it is to be resumed

    def run(self):
        for kind, names in PAUSABLE.items():  # what a predecessor left
            for name in names:
                self._resume(kind, name)
        while not json.loads(self._pace.read_text())["stop"]:
            command = self._rng.choices([*COMMANDS], [*COMMANDS.values()])[0]
            try:
                getattr(self, f"_{command}")()
            except OutsideError as error:
                self._record.note("unanswered", command=command, why=str(error)[:300])
            except MqworkerError as error:  # not found, conflict: such is life
                self._record.note("refused", command=command, why=str(error)[:300])
            for kind, name in [one for one, until in self._paused.items() if until < time.time()]:
                self._resume(kind, name)
            time.sleep(self._rng.uniform(0.1, 0.8))
        for kind, name in [*self._paused]:
            self._resume(kind, name)
        self._record.note("done")

    def _some(self, states=(), most=30):
        views = self._client.list(states=states, limit=most)
        return [view.request.id for view in self._rng.sample(views, min(len(views), self._rng.choice([1, 1, 1, 2, 5])))]

    def _abort(self):
        ids = self._some(self._rng.choice([["running"], ["running"], ["pending"], ["pending", "offered"], []]))
        if not ids:
            return
        self._record.note("abort", ids=ids)
        began = time.time()
        views = self._client.abort(ids, "changed my mind")
        states = {view.request.id: view.state for view in views}
        self._record.note("aborted", began=began, states=states)

    def _reprioritise(self):
        ids = self._some(["pending", "offered", "running"])
        if not ids:
            return
        priority = self._rng.choice([-10, 0, 10])
        self._record.note("reprioritise", ids=ids, priority=priority)
        views = self._client.reprioritise(ids, priority)
        got = {view.request.id: (view.state, view.request.priority) for view in views}
        self._record.note("reprioritised", priority=priority, got=got)

    def _pause(self):
        kind = self._rng.choice([*PAUSABLE])
        name = self._rng.choice(PAUSABLE[kind])
        if (kind, name) in self._paused:
            return
        self._paused[kind, name] = time.time() + self._rng.uniform(1, 6)
        self._record.note("pause", kind=kind, name=name)
        self._client.pause(kind, name, "for a moment")
        self._record.note("paused", kind=kind, name=name)

    def _drain(self):
        name = self._rng.choice(PAUSABLE["worker"])
        if ("worker", name) in self._paused:
            return
        self._paused["worker", name] = time.time() + self._rng.uniform(1, 6)
        stop = self._rng.random() < 0.5
        self._record.note("pause", kind="worker", name=name, drain=True, stop=stop)
        self._client.drain([name], reason="for a moment", stop=stop)
        self._record.note("paused", kind="worker", name=name)

    def _resume(self, kind, name):
        self._record.note("resume", kind=kind, name=name)
        while True:
            try:
                self._client.resume(kind, name)
            except OutsideError:
                continue  # it waits for an answer inside
            break
        self._paused.pop((kind, name), None)

    def _retry(self):
        ids = self._some(["failure", "error", "aborted"])
        if not ids:
            return
        new = str(uuid.uuid4())
        self._record.note("retry", old=ids[0], new=new)
        self._client.retry(ids[0], new_id=new)
        self._record.note("retried", old=ids[0], new=new)

    def _look(self):
        for one in self._some():
            self._client.status(one)
            self._client.explain(one)
        self._client.pool()
        self._client.workers()
        self._client.capabilities()

    def _refresh(self):
        self._client.refresh_workers()

    def _by_command(self):
        words = self._rng.choice([["list"], ["workers"], ["capabilities"], ["list", "--pending"]])
        command = [sys.executable, "-P", "-m", "mqworker", *words]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        self._record.note("command", words=words, exit=done.returncode, said=done.stderr[-300:])


def main():
    record, pace, seed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    rng = random.Random(f"{seed} {time.time_ns()}")
    while True:
        try:
            with Client(
                os.environ["MQWORKER_AMQP_URL"], prefix=os.environ["MQWORKER_PREFIX"], timeout=PATIENCE
            ) as client:
                Commander(client, Record(record), pace, rng).run()
        except OutsideError as error:
            print(f"the client is down, and comes again: {error}", flush=True)
            time.sleep(0.3)
            continue
        return


if __name__ == "__main__":
    main()
