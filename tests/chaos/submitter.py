"""A client under fire, in a process of its own: submit until told to stop, and give up on nothing.

What it is about to send and what it was answered stands in a record on disk before and after. So a successor of one
that was killed sends again whatever has no receipt, with the same ids.
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
from mqworker.messages import Request
from tests.chaos.record import Record, read

PATIENCE = 15.0  # seconds for one receipt; then the same requests are sent again
KEPT = 200  # receipted requests that may be sent once more
HOWS = {  # how often, and how long at most (seconds)
    "ok": (80, None),
    "fail": (5, 1.0),
    "raise": (3, 0.5),
    "again": (4, 0.5),
    "exit": (2, 0.5),
    "kill-slot": (3, 1.0),
    "kill-agent": (0.4, 1.0),
}


class Submitter:
    def __init__(self, client, record_path, pace, rng):
        self._client = client
        self._pace = pace
        self._rng = rng
        self._open = {}  # id to its request as a dictionary: sent, and without a receipt
        self._receipted = []
        for line in read(record_path):
            if line["what"] == "sent":
                self._open[line["request"]["id"]] = line["request"]
            elif line["what"] == "receipt":
                self._open.pop(line["id"], None)
        self._record = Record(record_path)

    def run(self):
        """Submit; return when the pace says stop and every request has its receipt."""
        if self._open:
            self._send([*self._open.values()], again=True)
        while True:
            pace = self._read_pace()
            if pace["stop"]:
                break
            if pace["rate"] <= 0:
                time.sleep(0.1)  # the backlog is long enough
                continue
            self._submit(pace["rate"])
        while self._open:
            self._send([*self._open.values()], again=True)
        self._record.note("done")

    def _read_pace(self):
        return json.loads(self._pace.read_text())

    def _submit(self, rate):
        number = self._rng.choice([1, 1, 1, 2, 3, 5, 10, 20])
        if self._rng.random() < 0.03:
            self._by_command()
        elif self._rng.random() < 0.04 and self._receipted:
            self._doubtful()
        else:
            requests = [self._make() for _ in range(number)]
            self._note_sent(requests)
            self._send(requests)
        time.sleep(self._rng.uniform(0.5, 1.5) * number / rate)

    def _make(self):
        rng = self._rng
        how = rng.choices([*HOWS], [often for often, _ in HOWS.values()])[0]
        most = HOWS[how][1]
        kinds = (0.0, rng.uniform(0.001, 0.05), rng.uniform(0.1, 2), rng.uniform(2, 8), rng.uniform(8, 20))
        seconds = rng.choices(kinds, [42, 25, 20, 9, 4])[0]  # the long ones are what a lease is for
        request_id = str(uuid.UUID(int=rng.getrandbits(64) << 64 | uuid.uuid4().int >> 64, version=4))
        data = {"id": request_id, "how": how, "seconds": round(seconds if most is None else min(seconds, most), 4)}
        if rng.random() < 0.1:
            data["artifacts"] = rng.choice([1, 1, 2, 3])
        if rng.random() < 0.1:
            data["children"] = rng.choices(["plain", "stubborn", "session", "parent", "left"], k=rng.choice([1, 1, 2]))
        if rng.random() < 0.05:
            data["stubborn"] = True
        if how == "again":
            data["agains"] = rng.choice([1, 1, 2, 5])
        if rng.random() < 0.5:
            data["tag"] = rng.choice(["left", "right"])
        if rng.random() < 0.01:
            data["seconds"] = -1  # no task takes this: it is to be rejected
        request = {
            "id": request_id,
            "task": rng.choice(["burn", "burn", "smoulder"]),
            "data": data,
            "priority": rng.choice([0, 0, 0, 5, -5]),
            "group": rng.choice(["default", "night", "day"]),
            "max_attempts": rng.choice([1, 2, 3, 3, 3, 5]),
        }
        if rng.random() < 0.3:
            request["lease"] = float(rng.choice([6, 8, 10]))
        if rng.random() < 0.02:
            request["concurrency_key"] = rng.choice(["one", "two"])
        if rng.random() < 0.03:
            request["timeout"] = rng.choice([1.0, 2.0, 5.0])
        if rng.random() < 0.03:
            request["not_before"] = time.time() + rng.uniform(0, 5)
        if rng.random() < 0.03:
            request["expires_at"] = request.get("not_before", time.time()) + rng.uniform(0.1, 5)
        if rng.random() < 0.1:
            request["retry_on"] = rng.choice([["failure"], ["error"], ["failure", "error"]])
        return request

    def _note_sent(self, requests, *, again=False, other=False):
        what = "sent-other" if other else "sent-again" if again else "sent"
        self._record.note_many([{"what": what, "request": request} for request in requests])
        if not again and not other:
            self._open.update({request["id"]: request for request in requests})

    def _send(self, requests, *, again=False, other=False):
        if again:
            self._note_sent(requests, again=True)
        try:
            receipts = self._client.submit_many([Request(**request) for request in requests])
        except OutsideError as error:
            self._record.note("unanswered", ids=[request["id"] for request in requests], why=str(error)[:300])
            if not other:
                self._send_later(requests)
            return
        self._take(receipts, other=other)

    def _send_later(self, requests):
        """Give the pool a moment; what is open is sent again until it has its receipt."""
        time.sleep(self._rng.uniform(0.1, 1.0))
        self._send(requests, again=True)

    def _take(self, receipts, *, other=False):
        what = "receipt-other" if other else "receipt"
        self._record.note_many(
            [{"what": what, "id": one.id, "status": one.status, "reason": one.reason} for one in receipts]
        )
        for one in receipts:
            request = self._open.pop(one.id, None)
            if request is not None:
                self._receipted = [*self._receipted[-KEPT:], request]

    def _doubtful(self):
        """Send what has its receipt once more, as it was or with other content."""
        request = self._rng.choice(self._receipted)
        if self._rng.random() < 0.5:
            self._send([request], again=True)
        else:
            other = {**request, "data": {**request["data"], "seconds": request["data"].get("seconds", 0) + 1}}
            self._note_sent([other], other=True)
            self._send([other], other=True)

    def _by_command(self):
        """Submit as a person does."""
        request = self._make()
        for special in ("concurrency_key", "timeout", "not_before", "expires_at", "retry_on"):
            request.pop(special, None)
        self._note_sent([request])
        command = [
            sys.executable,
            "-P",
            "-m",
            "mqworker",
            "submit",
            request["task"],
            "--data",
            json.dumps(request["data"]),
        ]
        command += ["--id", request["id"], f"--priority={request['priority']}", "--group", request["group"]]
        command += ["--max-attempts", str(request["max_attempts"])]
        if "lease" in request:
            command += ["--lease", str(request["lease"])]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        self._record.note("command", id=request["id"], exit=done.returncode, said=(done.stdout + done.stderr)[-300:])
        if done.returncode == 0:
            self._record.note("receipt", id=request["id"], status="accepted-by-command", reason=None)
            self._open.pop(request["id"], None)
        else:
            self._send([request], again=True)  # unanswered, or rejected: the receipt says which


def main():
    record, pace, seed = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    rng = random.Random(f"{seed} {os.getpid()} {time.time_ns()}")  # a successor must not make the same ids
    while True:
        client = Client(os.environ["MQWORKER_AMQP_URL"], prefix=os.environ["MQWORKER_PREFIX"], timeout=PATIENCE)
        try:
            with client:
                Submitter(client, record, pace, rng).run()
        except OutsideError as error:
            print(f"the client is down, and comes again: {error}", flush=True)
            time.sleep(0.3)
            continue
        except MqworkerError as error:
            print(f"the client fails: {error}", flush=True)
            raise
        return


if __name__ == "__main__":
    main()
