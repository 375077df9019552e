"""Everything at once, at random, with small bounds: memory and ledger agree after each turn, and all drains."""

import os
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from sqlalchemy import text

from mqworker import dispatch, pool, scheduler
from mqworker.lifecycle import FINAL, State
from mqworker.messages import (
    After,
    Artifact,
    Assign,
    Bye,
    Claim,
    Granted,
    Introduce,
    Outcome,
    Outcomes,
    Pause,
    Refusal,
    Request,
    RunRef,
    Take,
    Void,
)
from mqworker.task import Task
from tests.driving import Driven, Peer, an_id, restart

COLOURS = ("red", "blue")
WORKERS = ("w0", "w1", "w2", "w3")
GROUPS = ("default", "others")
LIMITS = {"*": 2, "one": 1}
STEPS = 60
MOST_TURNS = 400


@pytest.fixture
def small(monkeypatch):
    """Bounds so small that everything has to wait behind something."""
    monkeypatch.setattr(dispatch, "LEAST_HEADS", 2)
    monkeypatch.setattr(dispatch, "MOST_HEADS", 3)
    monkeypatch.setattr(dispatch, "ROWS_AT_ONCE", 6)
    monkeypatch.setattr(scheduler, "PLACED_AT_ONCE", 2)


class Moods:
    """What a task's answer may hang on besides metadata and data."""

    sulks: ClassVar[set[str]] = set()


@pytest.fixture
def tasks(coloured):
    class Picky(Task):
        """Look at more of the data on some workers."""

        TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {"type": "object"}

        def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
            data = self.data
            if worker_metadata.get("colour") != data.get("colour"):
                return False
            if worker_metadata.get("deep"):
                return bool(data.get("size", 0) <= worker_metadata.get("size", 0))
            return not worker_metadata.get("odd") or "extra" not in data

        def _execute(self) -> bool:
            return True

    class Planing(Task):
        """Look at what it is given by others."""

        TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {"type": "object", "required": ["input"]}

        def input_artifact_ids(self) -> list[int]:
            return [self.data["input"]]

        def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
            return bool(self.data["input"] % 2 == worker_metadata.get("size", 0) % 2)

        def _execute(self) -> bool:
            return True

    class Moody(Task):
        """Answer as it likes."""

        TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {"type": "object"}

        def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
            return worker_metadata.get("who") not in Moods.sulks

        def _execute(self) -> bool:
            return True

    Moods.sulks.clear()
    yield coloured, Picky, Planing, Moody
    Moods.sulks.clear()


TASKS = {"coloured": None, "picky": None, "planing": None, "moody": None, "noop": 1}


class Member(Peer):
    """A worker that also keeps in mind what it claims and runs."""

    def __init__(self, *args, **metadata):
        super().__init__(*args, tasks=TASKS, **metadata)
        self.claiming = {}  # token to (ref, request)
        self.running = {}

    def report(self, *more):
        runs, claims = ([ref for ref, _ in held.values()] for held in (self.running, self.claiming))
        self.say(*more, self.beat(*runs, claiming=claims, slots=self.slots))


class World:
    def __init__(self, seed):
        self.random = random.Random(seed)  # noqa: S311  # a seed must give the same run again
        self.driven = Driven(concurrency_limits=LIMITS, no_worker_after=20.0)
        self.members = {}
        self.left = {}
        self.requests = {}
        self.numbers = iter(range(1, 10**6))
        self.tokens = iter(range(1, 10**6))
        self.incarnations = iter(range(1, 10**6))
        self.trace = []
        self.pauses = set()
        self.calm = False  # nothing goes wrong any more

    # ------------------------------------------------------------ what may happen

    def data_for(self, task):
        pick = self.random
        if task in ("coloured", "picky"):
            data = {"colour": pick.choice(COLOURS)}
            if task == "picky":
                data |= {"size": pick.randrange(3)} if pick.random() < 0.7 else {}
                data |= {"extra": 1} if pick.random() < 0.3 else {}
                data |= {"unread": pick.randrange(5)}
            return data
        return {}

    def make_request(self):
        pick = self.random
        task = pick.choice(("noop", "coloured", "picky", "picky", "moody", "planing"))
        fields = {
            "priority": pick.choice((0, 0, 0, 5)),
            "group": pick.choice(("default", *GROUPS)),
            "concurrency_key": pick.choice((None, None, None, "one", "two")),
            "max_attempts": pick.choice((1, 2)),
        }
        known = list(self.requests)
        if task == "planing":
            source = pick.choice(known) if known else an_id(10**7)
            fields["take"] = [Take(into="/input", request=source, category="test:wood")]
        elif known and pick.random() < 0.25:
            chosen = {pick.choice(known[-12:]) for _ in range(pick.randrange(1, 3))}
            fields["after"] = [After(request=one, need=pick.choice(("success", "end"))) for one in sorted(chosen)]
        request = Request(id=an_id(next(self.numbers)), task=task, data=self.data_for(task), **fields)
        self.requests[request.id] = request
        return request

    def submit(self):
        self.driven.submit(*(self.make_request() for _ in range(self.random.randrange(1, 6))))

    def submit_again(self):
        if self.requests:
            one = self.requests[self.random.choice(list(self.requests))]
            if self.random.random() < 0.2:
                one = Request(id=one.id, task="noop", data={"duration": 0.5})
            self.driven.submit(one)

    def some(self):
        return self.random.choice(list(self.requests)) if self.requests else an_id(0)

    def abort(self):
        self.driven.abort(self.some())

    def reprioritise(self):
        self.driven.pool.reprioritise(self.some(), self.random.choice((-5, 0, 5)), lambda _: None)

    def pause(self):
        kind = self.random.choice(("worker", "task", "group"))
        names = {"worker": WORKERS, "task": list(TASKS), "group": GROUPS}
        name = self.random.choice(names[kind])
        self.pauses.add((kind, name))
        pause = Pause(kind=kind, name=name, reason="now")
        self.driven.pool.pause(pause, self.driven.moment, lambda _: None)

    def resume(self):
        if self.pauses:
            kind, name = self.random.choice(sorted(self.pauses))
            self.pauses.discard((kind, name))
            self.driven.pool.resume(kind, name, lambda _: None)

    def join(self, name=None, **metadata):
        name = name or self.random.choice(WORKERS)
        if name in self.members:
            return
        metadata = metadata or self.metadata(name)
        member = self.left.pop(name, None) or Member(
            self.driven, name, slots=self.random.randrange(1, 4), incarnation=next(self.incarnations), **metadata
        )
        member.driven = self.driven
        self.members[name] = member
        member.report(member.hello(**metadata))

    def metadata(self, name):
        pick = self.random
        return {
            "who": name,
            "colour": pick.choice(COLOURS),
            "deep": pick.random() < 0.4,
            "odd": pick.random() < 0.3,
            "size": pick.randrange(3),
            "disk": pick.randrange(10**6),
        }

    def member(self):
        return self.random.choice(list(self.members.values())) if self.members else None

    def leave(self):
        if member := self.member():
            del self.members[member.name]
            if self.random.random() < 0.5:
                member.say(Bye(reason="tired"))
            if self.random.random() < 0.5:
                self.left[member.name] = member

    def change(self):
        if member := self.member():
            hello = member.hello(**self.metadata(member.name))
            member.report(hello)

    def change_moods(self):
        Moods.sulks ^= {self.random.choice(WORKERS)}

    def work(self):
        """Let a ticket reach somebody who consumes its queue, or get lost."""
        tickets = self.driven.tickets
        if not tickets:
            return
        queue, ticket, returned = tickets.pop(self.random.randrange(len(tickets)))
        takers = [one for one in self.members.values() if one.queue == queue]
        luck = 0.5 if self.calm else self.random.random()
        if luck < 0.05:
            return
        if luck < 0.1:
            self.driven.returned.append(returned)
            return
        if not takers:
            return
        member = self.random.choice(takers)
        token = f"t{next(self.tokens)}"
        ref = RunRef(request=ticket.request.id, attempt=ticket.attempt, token=token)
        said = {"request": ref.request, "attempt": ref.attempt, "token": token, "metadata_version": member.version}
        if not self.could(member, ticket.request) or luck > 0.97:
            member.say(Refusal(**said, reason="no"))
            return
        member.claiming[token] = (ref, ticket.request)
        for _ in range(1 + (luck > 0.9)):
            member.say(Claim(**said))

    @staticmethod
    def could(member, request):
        task = Task.class_from_name(request.task)()
        task.configure(request.data)
        return task.can_run_on(member.metadata)

    def finish(self):
        members = [one for one in self.members.values() if one.running]
        if not members:
            return
        member = self.random.choice(members)
        token = self.random.choice(list(member.running))
        ref, request = member.running.pop(token)
        result = self.random.choice(("success",) * 6 + ("failure", "error", "lost", "handed_back"))
        made = self.random.choice((0, 1, 1, 1, 2)) if result == "success" else 0
        outcome = Outcome(
            request=ref.request,
            attempt=ref.attempt,
            token=token,
            result=result,
            started=1.0,
            ended=2.0,
            artifacts=[Artifact(handle=f"a{n}", category="test:wood", name=request.task) for n in range(made)],
        )
        again = 1 + (self.random.random() < 0.1)
        self.driven.inbox.append(Outcomes(worker=member.name, epoch=member.epoch, outcomes=[outcome] * again))

    def forget_runs(self):
        if member := self.member():
            member.running.clear()
            member.report()

    def beat(self):
        for member in self.members.values():
            if self.random.random() < 0.8:
                member.report()

    def pass_time(self):
        self.driven.steady += self.random.choice((0.1, 1.0, 1.0, 5.0, 11.0, 30.0))

    def pass_probes(self):
        self.driven.inbox += [probe for probe, _ in self.driven.probes]
        self.driven.probes.clear()

    def restart(self):
        self.turn()
        self.driven = restart(self.driven)
        for member in self.members.values():
            member.driven = self.driven
            member.report()

    # ------------------------------------------------------------ a turn, and what must hold then

    def turn(self):
        turns = 0
        while self.driven._turn(0.0):
            turns += 1
            assert turns < MOST_TURNS, "it never comes to rest"
        self.listen()
        self.check()

    def listen(self):
        for member in [*self.members.values(), *self.left.values()]:
            for part in member.hear():
                match part:
                    case Assign():
                        member.queue = part.queue
                    case Introduce():
                        member.report(member.hello())
                    case Granted():
                        held = member.claiming.pop(part.token, None)
                        if held is not None:
                            member.running[part.token] = held
                            assert part.inputs is not None
                            request = held[1]
                            assert len(part.inputs) == (request.task == "planing")
                    case Void():
                        member.claiming.pop(part.token, None)

    def rows(self):
        with self.driven.ledger._database.snapshot() as connection:
            return connection.execute(
                text("SELECT id, seq, requirement, priority, grp, ckey, unmet, state, not_before FROM requests")
            ).all()

    def check(self):  # one thing after the other
        own = self.driven.pool
        lines = own._dispatch
        live = [row for row in self.rows() if State(row.state) not in FINAL]
        in_memory = set()
        behind = Counter()
        used = Counter()
        blocked = 0
        for row in live:
            one = row.id
            entry = own._entries.get(one)
            assert own._requirements.get(row.requirement) is not None, f"{one} has an unknown requirement class"
            if row.state == State.PENDING and row.unmet:
                blocked += 1
                assert entry is None, f"{one} waits for others, yet is in memory"
                continue
            if row.state == State.PENDING and row.not_before is None and entry is None:
                lane = dispatch.Lane(row.requirement, row.priority, row.grp, row.ckey)
                known = lines._lanes.get(lane)
                assert known is not None, f"{one} is in no lane"
                assert row.seq > known.horizon, f"{one} is forgotten"
                behind[lane] += 1
                continue
            in_memory.add(one)
            assert entry is not None, f"{one} is {row.state}, and not in memory"
            assert (entry.seq, entry.one.id, entry.request.priority) == (row.seq, row.requirement, row.priority), one
            assert entry.state == row.state, f"{one} is {row.state} in the ledger, {entry.state} in memory"
            if row.state == State.PENDING and row.not_before is not None:
                assert one in own._delayed
            elif row.state == State.PENDING:
                lane, seq = lines._waiting[one]
                assert lane.lane == entry.lane, f"{one} waits in another lane than its own"
                assert seq == row.seq, f"{one} waits at another place than its own"
            elif row.state == State.OFFERED:
                assert one in lines._out, f"{one} is offered, but not out"
            else:
                assert one in lines._running, f"{one} runs, and is not counted"
                assert entry.lease is not None
            if row.state in (State.OFFERED, State.RUNNING) and row.ckey is not None:
                used[row.ckey] += 1
        assert own._entries.keys() == in_memory
        assert lines._waiting.keys() | lines._out.keys() | lines._running.keys() <= in_memory
        assert own._held.blocked == blocked
        assert own._running.keys() == lines._running.keys()
        assert {one.request.id for one in own._entries.values() if one.due is not None} == own._delayed
        for lane, known in lines._lanes.items():
            assert known.asked is None
            assert known.behind == behind[lane], f"{lane} counts {known.behind} behind, of {behind[lane]}"
        for key, number in used.items():
            assert number <= LIMITS.get(key, LIMITS["*"]), key
        entries = Counter(entry.one.id for entry in own._entries.values())
        assert {number: use.entries for number, use in own._uses.items() if use.entries} == dict(entries)
        assert own._uses.keys() == {one.id for one in own._requirements}
        private = {entry.own for entry in own._entries.values() if entry.own is not None}
        assert set(own._matching.requirements()) == own._uses.keys() | private
        assert not own._divided
        self.check_busy(own, lines)

    def check_busy(self, own, lines):
        """P5: nobody who has credit leaves alone what may run."""
        now = self.driven.steady
        for name in own._matching.names():
            if lines.credit(name, now) <= 0:
                continue
            runs = set(own._matching.runs(name))
            for lane, known in lines._lanes.items():
                if lane.requirement in runs and (known.heads or known.behind):
                    assert lines.held_by(lane) is not None, f"{name} has credit, and {lane} waits"

    # ------------------------------------------------------------ all of it

    def run(self):
        often = {
            self.submit: 6,
            self.submit_again: 2,
            self.abort: 2,
            self.reprioritise: 2,
            self.pause: 1,
            self.resume: 2,
            self.join: 3,
            self.leave: 1,
            self.change: 2,
            self.change_moods: 1,
            self.work: 12,
            self.finish: 8,
            self.forget_runs: 0.3,
            self.beat: 6,
            self.pass_time: 2,
            self.pass_probes: 2,
            self.restart: 0.4,
        }
        for _ in range(STEPS):
            for _ in range(self.random.choice((1, 1, 2, 4, 8))):
                [act] = self.random.choices(list(often), list(often.values()))
                self.trace.append(act.__name__)
                act()
            self.trace.append("turn")
            self.turn()
        self.drain()

    def drain(self):
        self.calm = True
        for kind, name in sorted(self.pauses):
            self.driven.pool.resume(kind, name, lambda _: None)
        Moods.sulks.clear()
        self.left.clear()
        for number, colour in enumerate(COLOURS * 2):
            self.join(f"last{number}", who="last", colour=colour, deep=number > 1, odd=False, size=3 + number % 2)
        for _ in range(300):
            self.turn()
            if not [row for row in self.rows() if State(row.state) not in FINAL]:
                break
            for _ in range(20):
                self.work()
                self.finish()
            self.driven.steady += 3.0
            self.pass_probes()
            for member in self.members.values():
                member.report()
        else:
            left = [row.id for row in self.rows() if State(row.state) not in FINAL]
            views, _ = self.driven.ledger.view(left)
            pytest.fail(
                f"not drained: {[(one.request.id, self.driven.pool.views.decorate(one).waits) for one in views]}"
            )
        self.settle_memory()

    def settle_memory(self):
        for _ in range(4):
            self.driven.steady += pool.LINGER + pool.SWEEP
            for member in self.members.values():
                member.report()
            self.pass_probes()
            self.turn()
        own = self.driven.pool
        lines = own._dispatch
        assert not own._entries
        assert not own._uses
        assert not own._refused
        assert not own._delayed
        assert len(own._requirements) == 0
        assert own._requirements._roots == {}
        assert not own._matching.requirements()
        for left in ("_lanes", "_waiting", "_out", "_running", "_tiers", "_line", "_requirements", "_groups", "_keys"):
            assert not getattr(lines, left), left
        assert lines.waiting() == 0
        assert not [name for name, worker in own._workers.items() if worker.leases]


@pytest.mark.usefixtures("small", "tasks")
@pytest.mark.parametrize("seed", range(int(os.environ.get("MQWORKER_TEST_SEEDS", "12"))))
def test_memory_and_ledger_agree_whatever_happens_and_all_drains(seed):
    world = World(seed)
    try:
        world.run()
    finally:
        world.driven.ledger.close()
