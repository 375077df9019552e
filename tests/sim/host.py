"""A worker's host: its clock, its disk and its slots, behind the product's own Worker."""

import asyncio
import random
from dataclasses import dataclass

from mqworker.agent import Agent
from mqworker.messages import (
    SLOT_LAPSED,
    Analysis,
    Artifact,
    Reason,
    Recall,
    Renew,
    RunTask,
    SlotEnded,
    SlotProgress,
    SlotReady,
    SlotRecalled,
    StopRun,
    encode_line,
)
from mqworker.topology import Topology
from mqworker.worker import Worker
from tests.sim.broker import Link
from tests.sim.loop import NOBODY

STORE = "store"
MADE = "sim:made"  # the category of what runs make


class Silent:
    """Take the place of metrics: say nothing, to everybody."""

    def labels(self, **_labels):
        return self

    def child(self, metric, *_labels):
        return metric

    def inc(self, *_amount):
        pass

    set = observe = clear = inc

    def __getattr__(self, _name):
        return self


SILENT = Silent()


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """Say how a run goes: drawn for each attempt."""

    seconds: float
    end: str  # success, failure, error, again, killed, broken
    obeys: bool  # an abort
    stages: int
    fresh: bool  # the slot's process ends behind it
    made: int  # artifacts


def conduct_of(seed, request, attempt, slow, *, quick=False):
    draw = random.Random(f"{seed} {request} {attempt}")
    seconds = draw.choice([0.005, 0.05, 0.5, 0.5, 2.0, 2.0, 5.0, slow]) * draw.uniform(0.5, 1.5)
    if quick and draw.random() < 0.97:
        seconds = draw.choice([0.0003, 0.001, 0.004])
    return Conduct(
        seconds=seconds,
        end=draw.choices(["success", "failure", "error", "again", "killed", "broken"], weights=[70, 8, 5, 5, 6, 4])[0],
        obeys=draw.random() < 0.7,
        stages=draw.randrange(3),
        fresh=draw.random() < 0.1,
        made=draw.choices([0, 1, 2], weights=[1, 12, 1])[0],
    )


class Host:
    """One machine: what outlives its worker's process."""

    def __init__(self, world, spec):
        self.world = world
        self.name = spec.name
        self.slots = spec.slots
        self.metadata = spec.metadata
        self.installed = list(spec.tasks)
        self.deny = spec.deny  # by its settings
        self.denied = spec.deny  # by those that its process has read
        self.boot = spec.boot
        self.drift = spec.drift
        self.wall_offset = 0.0
        self.disk_full = False
        self.spool = {}  # token to outcome: on disk
        self.incarnation = 0
        self.seen = None  # the metadata and tasks that the worker goes by
        self.process = None
        self.worker = None
        self.children = []
        self.draining = False

    @property
    def tasks(self):
        """Name the tasks that it may run."""
        return dict.fromkeys(task for task in self.installed if task not in self.denied)

    def boottime_ns(self):
        return int((self.boot + self.world.loop.now * (1 + self.drift)) * 1e9)

    def at_boottime(self, ns):
        """Return when this host's clock shows that."""
        return (ns / 1e9 - self.boot) / (1 + self.drift)

    def wall(self):
        return self.world.wall() + self.wall_offset

    async def main(self):
        """Be the worker's process."""
        self.incarnation += 1
        self.draining = False
        self.seen = None
        self.denied = self.deny
        for child in self.children:
            child.die(-9)  # the sweep
        self.children = []
        numbered = iter(range(1_000_000))
        agent = Agent(
            name=self.name,
            host=self.name,
            incarnation=self.incarnation,
            slots=self.slots,
            store_id=STORE,
            static_metadata={},
            deny_tasks=self.denied,
            make_token=lambda: f"{self.name}.{self.incarnation}.{next(numbered)}",
            wall=self.wall,
        )
        self.worker = HostedWorker(
            self,
            amqp_url="",
            topology=Topology(),
            agent=agent,
            state=State(self),
            store_url="",
            slots=self.slots,
            work_directory=None,
            metadata_interval=60.0,
            drain_grace=20.0,
            metrics=SILENT,
            link=lambda url, **given: Link(self.world.broker, url, **given),
            clock=self.boottime_ns,
        )
        await self.worker.run()

    def died(self):
        """Close the pipes of the slots: each ends its run and itself."""
        for child in self.children:
            child.close()

    def idle(self):
        """Count the slots that wait for a run."""
        return sum(child.ready for child in self.children)


class State:
    """Do what mqworker.state.WorkerState does, on the host's disk."""

    def __init__(self, host):
        self._host = host

    def spool(self, outcomes):
        if self._host.disk_full:
            raise OSError(28, "no space left on device")
        for outcome in outcomes:
            self._host.spool[outcome.token] = outcome
            self._host.world.check.spooled(outcome)

    def unspool(self, refs):
        for ref in refs:
            self._host.spool.pop(ref.token, None)
            self._host.world.check.unspooled(self._host, ref)

    def spooled(self):
        return list(self._host.spool.values())

    def note_slots(self, slots):
        pass


class HostedWorker(Worker):
    """The product's own worker, whose slots, disk and /proc are the host's."""

    def __init__(self, host, **given):
        super().__init__(**given)
        self._host = host

    async def _spawn(self, number):
        async with self._spawning:
            await asyncio.sleep(self._host.world.chance(f"spawn {self._host.name}").uniform(0.005, 0.03))
            child = self._children[number] = Child(self._host)
            self._host.children.append(child)
        return child

    async def _kill(self, slot):
        child = self._children.get(slot)
        if child is not None:
            await self._in_kill_thread(lambda: child.die(-9))

    async def _end_orphans(self, but=None):  # noqa: ARG002  # as the worker calls it
        await self._in_kill_thread(lambda: None)

    async def _end_children(self):
        for child in self._children.values():
            child.close()
        self._children.clear()

    def _directory(self, token):
        return token

    async def _remove(self, directory):
        pass

    async def _analysis(self):
        await asyncio.sleep(self._host.world.chance(f"analysis {self._host.name}").uniform(0.005, 0.05))
        self._host.seen = (self._host.metadata, dict(self._host.tasks))
        return Analysis(metadata=self._host.metadata, tasks=dict.fromkeys(self._host.installed), failures={})


class Child:
    """A slot's process: it holds its run's deadline itself, by the host's clock, whatever becomes of the agent."""

    def __init__(self, host):
        self._host = host
        self._loop = host.world.loop
        self.process = self  # as the worker sees it
        self.identity = self.group = None
        self.deadlines = {}
        self.held = self.ooms = self.pid = 0
        self.is_bounded = False
        self._words = asyncio.StreamReader(loop=self._loop)
        self.alive = True
        self.ready = False
        self.run = None  # the order
        self._told = {}  # token to order and deadline of those that have not begun
        self._stops = {}  # token to reason
        self._exit_code = None
        self._exited = self._loop.create_future()
        self._alarm = self._end = None
        self._conduct = None
        self._later(0.002, self._say_ready)

    # ------------------------------------------------------------ what the worker does with it

    def order(self, order):
        if self.alive:
            if isinstance(order, RunTask):
                self._host.world.check.started(self._host, order)
            self._later(0.0003, self._obey, order)

    def send(self):
        pass

    async def hear(self):
        return await self._words.read(65536)

    async def wait(self):
        while self._exit_code is None:
            await asyncio.wait([self._exited])
        return self._exit_code

    def last_words(self):
        return ""

    def close(self):
        """Let it find its pipe closed."""
        self._later(0.003, self.die, 1)

    # ------------------------------------------------------------ inside

    def _later(self, delay, call, *args):
        return self._loop.call_later(delay, call, *args, context=NOBODY)

    def _say(self, word):
        if self.alive:
            self._words.feed_data(encode_line(word))

    def _say_ready(self):
        if self.alive:
            self._next()
            self._say(SlotReady())

    def _obey(self, order):
        if not self.alive:
            return
        match order:
            case RunTask():
                self._told[order.token] = (order, order.deadline_ns)
                if self.ready:
                    self._next()
            case Renew(token=token, deadline_ns=deadline):
                if self.run is not None and self.run.token == token:
                    self._set_alarm(deadline)
                elif token in self._told:
                    self._told[token] = (self._told[token][0], deadline)
            case StopRun(token=token, reason=reason):
                self._stops[token] = reason
                self._heed()
            case Recall():
                self._say(SlotRecalled(tokens=list(self._told)))
                self._told.clear()

    def _next(self):
        """Begin what was told first of what has not begun, or be idle."""
        if not self.alive:
            return
        self.ready = not self._told
        if self.ready:
            return
        order, deadline = self._told.pop(next(iter(self._told)))
        self.run = order
        self._set_alarm(deadline)
        conduct = self._conduct = self._host.world.conduct(order.request.id, order.attempt)
        self._host.world.check.runs_now(self._host, order)
        for number in range(conduct.stages):
            self._later(conduct.seconds * (number + 1) / (conduct.stages + 1), self._stage, order, number)
        self._end = self._later(conduct.seconds, self._conclude, conduct.end)
        self._heed()

    def _heed(self):
        """Obey who has said to stop what runs, if it does."""
        if self.run is not None and self.run.token in self._stops and self._conduct.obeys:
            self._end.cancel()
            self._end = self._later(0.05, self._finish, "aborted", self._stops.pop(self.run.token), False)

    def _set_alarm(self, deadline_ns):
        if self._alarm is not None:
            self._alarm.cancel()
        when = max(self._loop.now, self._host.at_boottime(deadline_ns))
        self._alarm = self._loop.call_at(when, self.die, SLOT_LAPSED, context=NOBODY)

    def _stage(self, order, number):
        if self.run is order:
            self._say(SlotProgress(stage=f"stage {number}", fraction=None))

    def _conclude(self, end):
        match end:
            case "killed":
                self.die(-9)
            case "broken":
                self.die(3)
            case "again":
                self._finish("failure", "not now", True)
            case _:
                self._finish(end, None if end == "success" else "as it was drawn", False)

    def _finish(self, result, reason, again):
        if not self.alive or self.run is None:
            return
        order = self._leave_run()
        word = SlotEnded(
            result=result,
            reason=None if reason is None else Reason(text=reason),
            again=again,
            artifacts=[
                Artifact(handle=f"made-{number}", category=MADE, name="made") for number in range(self._conduct.made)
            ],
            last=self._conduct.fresh,
        )
        self._host.world.check.ended(self._host, order, word)
        self._say(word)
        if self._conduct.fresh:
            self._later(0.001, self.die, 0)
        else:
            self._later(0.001, self._next)

    def _leave_run(self):
        order, self.run = self.run, None
        for handle in (self._alarm, self._end):
            if handle is not None:
                handle.cancel()
        self._alarm = self._end = None
        return order

    def die(self, exit_code):
        """End, with all that stems from it."""
        if not self.alive:
            return
        self.alive = self.ready = False
        if self.run is not None:
            self._host.world.check.ended(self._host, self._leave_run(), None, lapsed=exit_code == SLOT_LAPSED)
        self._words.feed_eof()
        self._exit_code = exit_code
        if not self._exited.done():
            self._exited.set_result(None)
        if self in self._host.children:
            self._host.children.remove(self)
