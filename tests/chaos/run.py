"""One run: light the fire, keep it burning, put it out, wait for the dust to settle, and judge."""

import dataclasses
import json
import os
import random
import secrets
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from sqlalchemy.exc import OperationalError

from mqworker.client import Client
from mqworker.errors import MqworkerError
from tests.chaos import evidence as proof
from tests.chaos import faults, report
from tests.chaos.check import FINAL, check
from tests.chaos.record import read
from tests.chaos.world import SUBMITTERS, WORKERS, Missed, World

RATE = 4.0  # requests a second, of each submitter
BACKLOG = 120  # live requests, above which the submitters wait
CALM = {
    True: (0.2, 1.0),
    False: (1.0, 3.0),
}  # seconds between two rounds, after the pool has recovered, in a quick run or a long one
RECOVERY = 45.0  # seconds; who has not recovered by then meets the next round all the same
LAST = {True: 35.0, False: 90.0}  # seconds kept for the drain and the verdict, of a quick run and of a long one
DRAIN = 240.0  # seconds; who still waits then waits for ever
TELL = 15.0  # seconds between two lines of progress


def run(given):
    """Do it, and return the exit code."""
    if given.list:
        print("\n".join(faults.KINDS))
        return 0
    if given.judge:
        violations = check(proof.Evidence(**json.loads(Path(given.judge).read_text())))
        print("\n".join(f"{one.promise}: {one.text}" for one in violations) or "no violation")
        return int(bool(violations))
    seed = secrets.randbelow(10**6) if given.seed is None else given.seed
    directory = Path(tempfile.mkdtemp(prefix="mqworker-chaos-", dir="/var/tmp"))
    directory.chmod(0o711)
    fire = _Fire(given, seed, directory)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, fire.interrupt)
    code = 1
    try:
        code = fire.burn()
    finally:
        if given.keep or code:
            _keep(directory, Path(given.keep or f"{directory}-failed"))
        shutil.rmtree(directory, ignore_errors=True)
    return code


def _keep(directory, to):
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    unneeded = shutil.ignore_patterns("locks", "broker", "store", "work", "fill")
    shutil.copytree(directory, to, dirs_exist_ok=True, ignore=unneeded)
    with suppress(FileNotFoundError):
        shutil.copy(directory / "broker" / "node.log", to / "logs" / "broker.log")
    print(f"logs, records, journal and ledger are in {to}", flush=True)


class _Fire:
    def __init__(self, given, seed, directory):
        self.given = given
        self.seed = seed
        self.directory = directory
        self.rng = random.Random(seed)
        self.world = None
        self.interrupted = False
        self.began = time.monotonic()
        self.told = 0.0
        self.done = 0

    def interrupt(self, number, _frame):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print(f"interrupted by {signal.Signals(number).name}: heals and stops; once more: stops at once", flush=True)
        if self.world is not None:
            self.world.over.set()

    def say(self, text):
        since = int(time.monotonic() - self.began)
        print(f"{since // 60:02}:{since % 60:02} {text}", flush=True)

    def burn(self):
        self.say(f"seed {self.seed}; everything is in {self.directory}")
        with World(self.directory, rng=self.rng, ledger=self.given.ledger) as world:
            self.world = world
            if not world.mounted:
                self.say("LEFT OUT: full disks, which need root and mounts of its own")
            self._await_workers()
            world.let_clients_in(self.seed)
            self.say(f"{len(WORKERS)} workers are there; the submitters begin")
            self._rounds()
            found = self._settle()
        return self._judge(found)

    # ------------------------------------------------------------ burning

    def _client(self, timeout=30.0):
        return Client(self.world.node.url, prefix=self.world.prefix, timeout=timeout)

    def _await_workers(self):
        with self._client() as client:
            deadline = time.monotonic() + 120
            while not self.world.over.is_set():
                with suppress(MqworkerError):
                    if len([one for one in client.workers() if one.state == "online" and one.queue]) == len(WORKERS):
                        return
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the pool does not come up; see {self.directory / 'logs'}")
                time.sleep(0.1)

    def _rounds(self):
        end = self.began + self.given.minutes * 60 - LAST[self.given.quick]
        kinds, self.left_out = faults.kinds_here(self.world)
        if self.given.only:
            kinds = [kind for kind in kinds if any(word in kind.name for word in self.given.only)]
        times = 1 if self.given.quick else max(1, round(self.given.minutes / 60 * 11))
        sizes = (3, 4) if self.given.quick else (1, 2, 3, 3)
        plan = faults.plan(kinds, times, self.rng, sizes=sizes)
        doing = faults.Round(self.world, self.rng, quick=self.given.quick)
        self._calm(2, end)
        while time.monotonic() < end and not self.interrupted:
            if not plan:
                plan = faults.plan(kinds, 1, self.rng)  # time is left: everything once more
            now = plan.pop(0)
            missed = doing.do(now, self._tick)
            self.done += len(now) - len(missed)
            if missed:
                plan.append(missed)
            self._recover(end)
        self.say(f"the last of {self.done} faults is over")

    def _recover(self, end):
        """Wait until something is granted and recorded again, then a little more."""
        before = self._news() or (0, 0)
        deadline = min(end, time.monotonic() + RECOVERY)
        while time.monotonic() < deadline and not self.interrupted:
            now = self._news()
            if now is not None and all(new > old for new, old in zip(now, before, strict=True)):
                break
            self._calm(0.3, end)
        self._calm(self.rng.uniform(*CALM[self.given.quick]), end)

    def _news(self):
        try:
            return self.world.audit.newest()
        except OperationalError:
            return None

    def _calm(self, seconds, end):
        until = min(end, time.monotonic() + seconds)
        while (left := until - time.monotonic()) > 0 and not self.interrupted:
            self._tick()
            self.world.over.wait(min(0.25, left))

    def _tick(self):
        """Keep the backlog short, and say how it goes."""
        try:
            states, results = self.world.audit.counts()
        except OperationalError:  # the ledger is on fire, too
            return
        live = sum(number for state, number in states.items() if state not in FINAL)
        self.world.pace(rate=RATE if live < BACKLOG else 0.0)
        if time.monotonic() - self.told > TELL:
            self.told = time.monotonic()
            final = " ".join(f"{number} {state}" for state, number in sorted(states.items()) if state in FINAL)
            self.say(
                f"{live} live, {final}; {sum(results.values())} runs, {results.get('lost', 0)} lost; {self.done} faults"
            )

    # ------------------------------------------------------------ settling

    def _settle(self):
        """Heal, let everybody finish, stop everything in order, and gather what is left."""
        world = self.world
        world.over.clear()
        self.say("heals, and lets everything come to its end")
        world.heal()
        world.pace(rate=0.0, stop=True)
        left = []
        left += [
            f"{name} has not come to its end: {self._last_words(name)}"
            for name in (*SUBMITTERS, "commander")
            if not self._finished(name)
        ]
        left += self._drained()
        left += self._after_the_drain()
        for name in (*WORKERS, *world.scheduler_names):
            code = world.stop_party(name, 60)
            if code != 0:
                left.append(f"{name} did not stop in order: exit code {code}")
        left += self._after_the_stop()
        found = proof.gather(world)
        found.left += left
        self.facts = report.facts(world, self.given, self.seed)
        self.facts["left_out"] = self.left_out
        return found

    def _finished(self, name):
        party = self.world.party(name)
        _await(lambda: party.finished or self.interrupted, DRAIN)
        party.wanted = False
        if not party.finished:
            party.signal(signal.SIGKILL, "the end")
        return party.finished or self.interrupted

    def _last_words(self, name):
        log = self.directory / "logs" / f"{name}.log"
        return log.read_text(errors="replace")[-500:] if log.exists() else ""

    def _drained(self):
        deadline = time.monotonic() + DRAIN
        while time.monotonic() < deadline and not self.interrupted:
            states, _ = self.world.audit.counts()
            if not any(number for state, number in states.items() if state not in FINAL):
                return []
            self._tick_quietly(states)
            time.sleep(0.2)
        return ["interrupted before everything was final"] if self.interrupted else self._explained()

    def _tick_quietly(self, states):
        if time.monotonic() - self.told > TELL:
            self.told = time.monotonic()
            self.say(f"waits for {sum(n for state, n in states.items() if state not in FINAL)} requests to end")

    def _explained(self):
        """Say why what still waits does so."""
        with self._client() as client:
            views = client.list(states=["pending", "offered", "running"], limit=5)
            return [
                f"{view.request.id} is {view.state}, attempt {view.attempt}, {view.waits or view.worker}"
                for view in views
            ]

    def _after_the_drain(self):
        """With everything ended, and everybody there: what is left of the runs, and on the broker?"""
        world = self.world
        left = []
        for name in WORKERS:
            _await(lambda name=name: not any(faults.descendants(slot.pid) for slot in world.slots(name)), 10)
            left += [
                f"a process of a run: {faults.descendants(slot.pid)}"
                for slot in world.slots(name)
                if faults.descendants(slot.pid)
            ]
            spool = world.directory / "state" / name / "spool"
            _await(lambda spool=spool: not [*spool.iterdir()], 20)
            left += [f"in the spool of {name}: {path.name}" for path in spool.iterdir()]
            work = world.directory / "work" / name
            _await(lambda work=work: {path.name for path in work.iterdir()} == {"lock"}, 10)
            left += [f"in the work directory of {name}: {path.name}" for path in work.iterdir() if path.name != "lock"]
        topology = world.topology
        known = {queue.name for queue in topology.queues()}
        assigned = set()
        with suppress(MqworkerError), self._client() as client:
            assigned = {worker.queue for worker in client.workers()}
        _await(lambda: not self._full_queues(known), 30)
        for name in self._full_queues(known):
            left.append(f"messages in the queue {name}")
        for name, queue in world.queues().items():
            lives = name in assigned or name.startswith((f"{world.prefix}.worker.", f"{topology.report}."))
            # Those of schedulers that were killed with their classes are nobody's, and the broker's own to remove.
            expires = name.startswith(f"{topology.work}.") and "x-expires" in queue.get("arguments", {})
            if name not in known and not lives and not expires:
                left.append(f"the queue {name}, with {queue.get('messages')} messages, which nobody uses")
        return left

    def _full_queues(self, known):
        """Ask for the queues in which messages wait for somebody."""
        return [name for name, queue in self.world.queues().items() if name in known and queue.get("messages", 0)]

    def _after_the_stop(self):
        world = self.world
        ours = world.ours()
        left = [f"the process {pid}: {command[:200]}" for pid, command in ours]
        for pid, _ in ours:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        inside = [line.split()[4] for line in mounts if str(world.directory) in line]
        allowed = {str(world.directory / name) for name in ("ledger", "store", "state")}
        left += [f"the mount {point}" for point in inside if point not in allowed]
        pids = {line["pid"] for line in read(self.directory / "record" / "harness.jsonl") if line["what"] == "started"}
        groups = Path("/sys/fs/cgroup").glob("**/mqworker-*-slot-*")
        left += [f"the cgroup {group}" for group in groups if int(group.name.split("-")[1]) in pids]
        with suppress(Missed):
            transient = (f"{world.prefix}.worker.", f"{world.topology.report}.", f"{world.prefix}.follow.")
            _await(lambda: not [name for name in world.queues() if name.startswith(transient)], 10)
            left += [f"the queue {name}" for name in world.queues() if name.startswith(transient)]
        return left

    # ------------------------------------------------------------ judging

    def _judge(self, found):
        (self.directory / "evidence.json").write_text(json.dumps(dataclasses.asdict(found)))
        violations = check(found)
        text, unproven = report.write(found, violations, self.facts, seconds=time.monotonic() - self.began)
        if self.given.report:
            Path(self.given.report).write_text(text)
        (self.directory / "report.md").write_text(text)
        for violation in violations[:30]:
            print(f"VIOLATION {violation.promise}: {violation.text[:1000]}", flush=True)
        for lacking in unproven:
            print(f"PROVES NOTHING: {lacking}", flush=True)
        self.say(report.verdict(found, violations))
        if self.interrupted:
            print("it was interrupted: no verdict", flush=True)
        return int(bool(violations or unproven or self.interrupted))


def _await(met, seconds):
    """Wait until something is true, or no time is left."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(Missed, FileNotFoundError):
            if met():
                return
        time.sleep(0.1)
