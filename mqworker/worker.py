"""The worker: hold slots, claim, report, drain. It carries out what its agent judges.

One process on one host: two connections to the broker, a child process for each slot, a state directory of its own.
Nothing slow runs on its loop: disks, /proc and the end of process trees have threads.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from mqworker import __version__, limits, processes, watchdog
from mqworker.agent import (
    Ack,
    Act,
    Agent,
    Analyze,
    Cancel,
    Consume,
    CountRefusal,
    Discard,
    KillSlot,
    PublishLog,
    PublishOutcomes,
    PublishReport,
    RecallRuns,
    RenewRun,
    Requeue,
    Spool,
    StartRun,
    StopRunIn,
    Unspool,
    check_task_names,
)
from mqworker.amqp import BLOCKED, Consumer, Delivery, Link, Plan
from mqworker.cgroup import Cgroup, Cgroups
from mqworker.errors import HostUnfit, NotPublished, PeerError, StateLocked, Unreadable
from mqworker.limits import Watch
from mqworker.messages import (
    MAX_LINE_BYTES,
    Analysis,
    Assign,
    Limits,
    Outcome,
    Outfit,
    Recall,
    Renew,
    RunRef,
    RunTask,
    SlotEnded,
    SlotOrder,
    SlotReady,
    SlotWord,
    StopRun,
    Tickets,
    Verdict,
    decode,
    encode,
    encode_line,
    tag_of,
)
from mqworker.metrics import Health, MetricsServer, WorkerMetrics
from mqworker.state import WorkerState
from mqworker.store import Store
from mqworker.topology import Topology

logger = logging.getLogger(__name__)

TICK: Final = 0.25  # seconds between looks at what is due; deadlines are held by the slots as well
DEAF_SECONDS: Final = 30.0  # without a word of the scheduler, who answers each heartbeat
ANALYSIS_SECONDS: Final = 120.0  # a look at the host that takes longer is given up
SETTLE_SECONDS: Final = 10.0  # for the ledger's answers, before the worker leaves its spool to its successor
STOP_NOW_SECONDS: Final = 3.0  # the same, when the worker is told twice
SLOT_PAUSE: Final = 1.0  # seconds before the next try, where slots do not start
DISK_SECONDS: Final = 5.0  # between two looks at free room
FEW_INODES: Final = 1000  # a file system that counts its files, and has fewer left, is full
LAST_WORDS: Final = 64 * 1024  # bytes: what a pipe holds
LAST_LINES: Final = 500  # characters of them, for an operator
HEARD_AT_ONCE: Final = 64 * 1024  # bytes of what a slot says: what a pipe holds
HEARING_PAUSE: Final = 0.002  # seconds between two looks at what a slot says that has enough to do
KEPT_VARIABLES: Final = ("MQWORKER_TASK_", "MQWORKER_SBUILD_")  # what tasks may read of ours: no URL with a password


class _Child:
    """One slot's process."""

    def __init__(self, process: asyncio.subprocess.Process, *, words: int, output: int) -> None:
        self.process = process
        self.identity = processes.identify(process.pid)
        self._words = words  # what it says
        self._output = output  # where its standard error goes; the slot itself reads it while it lives
        self.group: Cgroup | None = None
        self.deadlines: dict[str, int] = {}  # of the runs that it was told of, by token
        self.held = watchdog.NO_DEADLINE  # what the watchdog was told
        self.is_bounded = False  # its control group has the limits of a run
        self.ooms = 0  # what the kernel had killed on this host when the last run began
        self._orders: list[bytes] = []

    async def hear(self) -> bytes:
        """Return what it says next; nothing: it has ended."""
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(BlockingIOError):
                return os.read(self._words, HEARD_AT_ONCE)
            readable = loop.create_future()
            loop.add_reader(self._words, _set, readable)
            try:
                await readable
            finally:
                loop.remove_reader(self._words)

    def close(self) -> None:
        """Hear nothing more."""
        os.close(self._words)

    def last_words(self) -> str:
        """Return what it printed and did not live to read itself; once, when all that could write there has ended."""
        os.set_blocking(self._output, False)
        with open(self._output, "rb") as pipe:  # noqa: PTH123  # a descriptor, closed here
            return (pipe.read(LAST_WORDS) or b"").decode(errors="replace")

    def order(self, order: SlotOrder) -> None:
        self._orders.append(encode_line(order))

    def send(self) -> None:
        """Send what was ordered, in one piece."""
        if self._orders and self.process.stdin is not None and not self.process.stdin.is_closing():
            self.process.stdin.write(b"".join(self._orders))
        self._orders.clear()


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class _Watchdog:
    """The process that ends slots at their deadlines where they cannot."""

    def __init__(self, process: asyncio.subprocess.Process, ends: int) -> None:
        self.process = process
        self.ends = ends  # a pipe that ends with it

    def tell(self, slot: processes.Process, deadline_ns: int) -> None:
        if self.process.stdin is not None and not self.process.stdin.is_closing():
            self.process.stdin.write(watchdog.line(slot, deadline_ns))


class Worker:
    """Carry messages between the broker, the agent and the slots; `link` and `clock` are its doors in a simulation."""

    def __init__(
        self,
        *,
        amqp_url: str,
        topology: Topology,
        agent: Agent,
        state: WorkerState,
        store_url: str,
        slots: int,
        work_directory: Path,
        metadata_interval: float,
        drain_grace: float,
        metrics: WorkerMetrics,
        bounds: Limits | None = None,
        min_free_disk: int = 0,
        rooms: Collection[Path] = (),
        groups: Cgroups | None = None,
        link: Callable[..., Link] = Link,
        clock: Callable[[], int] = processes.boottime_ns,
    ) -> None:
        self._clock = clock
        self._topology = topology
        self._agent = agent
        self._state = state
        self._store_url = store_url
        self._slots = slots
        self._work_directory = work_directory
        self._metadata_interval = metadata_interval
        self._drain_grace = drain_grace
        self._metrics = metrics
        self._bounds = bounds
        self._min_free_disk = min_free_disk
        self._rooms = rooms  # directories that must have room
        self._groups = groups
        self._watches: dict[int, Watch] = {}  # runs with limits, by slot
        self._cores: dict[int, list[int]] = {}  # given to runs, by slot
        self._watchdog: _Watchdog | None = None
        self._children: dict[int, _Child] = {}
        self._analyzing = False
        self._heard_at = 0.0
        self._analyzed_at = 0.0
        self._analyst: int | None = None  # its pid
        self._spawning = asyncio.Lock()  # who ends orphans must not meet a child that is not known yet
        self._signals = 0
        self._signalled = asyncio.Event()
        self._idle = asyncio.Event()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._leaving = False
        self._disk_thread = ThreadPoolExecutor(1, thread_name_prefix="disk")
        # What must be killed does not wait for a disk, and not for another that does not die.
        self._kill_threads = ThreadPoolExecutor(slots + 2, thread_name_prefix="kill")
        self._look_thread = ThreadPoolExecutor(1, thread_name_prefix="look")
        self._room_thread = ThreadPoolExecutor(1, thread_name_prefix="room")  # an outcome waits for no chroot to go
        self._ooms = 0  # what the kernel had killed on this host a moment ago
        self._littered: set[str] = set()  # runs that have ended and left something in their directories
        self._unspooling: list[RunRef] = []
        self._is_unspooling = False
        self._spooling: list[Outcome] = []
        self._is_spooling = False
        self._watching = asyncio.Event()  # a run with limits has begun
        self._noted = True  # whose processes the slots are
        self._strays: list[processes.Process] = []  # of slots that have died, and not to be ended
        self._in_the_way = ""  # what is told of them
        self._lacking: dict[str, str | None] = {}  # room, by what is in the way
        self._reading = link(
            amqp_url,
            name=f"mqworker worker {agent.name} reading",
            plan=self._reading_plan,
            on_up=lambda _epoch: self._link_changed(),
            on_down=self._link_down,
        )
        uses = (topology.report, topology.outcome, topology.logs, topology.rejected)
        self._writing = link(
            amqp_url,
            name=f"mqworker worker {agent.name} writing",
            plan=lambda _epoch: Plan(exchanges=topology.exchanges(), queues=topology.queues(), uses=uses),
            on_up=lambda _epoch: self._link_changed(),
            on_down=self._link_down,
            on_blocked=self._blocked,
        )

    async def run(self) -> None:
        """Work until signalled, or drained to end; then drain, hand back what is left, and take leave.

        Raises:
            BrokerRefused: the broker does not let this worker in.
            HostUnfit: slots or the look at the host do not start, or, at the end, something cannot be ended.
        """
        for outcome in self._state.spooled():
            self._agent.spooled(outcome)
        await self._analyze()
        links = [asyncio.create_task(link.run()) for link in (self._writing, self._reading)]
        steady = [
            *links,
            *(asyncio.create_task(self._keep_slot(number)) for number in range(self._slots)),
            asyncio.create_task(self._tick()),
            asyncio.create_task(self._let_in()),
            asyncio.create_task(self._look_at_limits()),
            asyncio.create_task(self._look_at_disks()),
        ]
        for task in steady:
            task.add_done_callback(self._ended)
        try:
            signalled = asyncio.create_task(self._signalled.wait())
            ends: set[asyncio.Future[Any]] = {signalled, self._failed}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            signalled.cancel()
            if self._failed.done():
                self._failed.result()
            await self._leave()
        finally:
            self._leaving = True
            for task in (*steady[2:], *self._tasks):
                task.cancel()
            await asyncio.gather(*steady[2:], *self._tasks, return_exceptions=True)
            await self._end_children()
            await self._reading.close()
            await self._writing.close()
            await asyncio.gather(*links, return_exceptions=True)
            for threads in (self._disk_thread, self._kill_threads, self._look_thread, self._room_thread):
                threads.shutdown()
            with contextlib.suppress(OSError):  # those that are gone harm nobody, and those that are not are there
                self._state.note_slots(self._strays)
        if self._strays:
            raise HostUnfit(
                f"{self._in_the_way} (the worker has stopped beside it; the next one with this state directory does"
                " not start before it has gone)"
            )

    def signalled(self) -> None:
        """Drain; the second time, stop now."""
        self._signals += 1
        self._signalled.set()
        if self._signals > 1:
            self._idle.set()

    def refresh(self) -> None:
        """Look at the host afresh."""
        self._start(self._analyze())

    def health(self) -> Health:
        """Say whether the worker can take work."""
        if self._agent.refused is not None:
            return Health(well=False, text=self._agent.refused)
        for link in (self._reading, self._writing):
            if link.epoch is None:
                return Health(well=False, text=f"no connection to the broker: {link.last_error or 'connecting'}")
        if self._writing.blocked:
            return Health(well=False, text=BLOCKED)
        if not self._agent.heard:
            return Health(well=False, text="no scheduler has answered yet")
        if self._agent.held is not None:
            return Health(well=False, text=f"takes no work: {self._agent.held}")
        return Health(well=True, text=f"worker {self._agent.name}")

    # ------------------------------------------------------------ leaving

    async def _leave(self) -> None:
        logger.info("worker drains; a second signal stops it now", extra={"seconds": self._drain_grace})
        self._agent.drain()
        self._act()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._until(lambda: not self._agent.busy()), self._drain_grace)
        self._agent.stop_runs()
        self._act()
        settled = self._until(lambda: not self._agent.busy() and not self._agent.unsettled(), stop_now=False)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(settled, SETTLE_SECONDS if self._signals <= 1 else STOP_NOW_SECONDS)
        # What could not be written to disk exists here alone: it goes without, and a second signal gives it up.
        for outcome in self._spooling:
            logger.warning(
                "an outcome that cannot be spooled is sent from memory; the worker waits for its answer",
                extra={"request": outcome.request, "attempt": outcome.attempt},
            )
            self._agent.unspoolable(outcome)
        self._act()
        await self._until(lambda: not self._spooling)
        self._agent.bye("stopped")
        self._act()

    async def _until(self, met: Callable[[], bool], *, stop_now: bool = True) -> None:
        while not met():
            if stop_now and self._signals > 1:
                return
            self._idle.clear()
            await self._idle.wait()

    # ------------------------------------------------------------ tasks of our own

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        """End the worker with whatever one of its own tasks raised: it is built to be started again."""
        if task.cancelled() or self._failed.done():
            return
        error = task.exception()
        if error is not None:
            self._failed.set_exception(error)

    async def _in_disk_thread(self, call: Callable[[], object]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._disk_thread, call)

    async def _in_room_thread(self, call: Callable[[], object]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._room_thread, call)

    async def _in_kill_thread(self, call: Callable[[], object]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._kill_threads, call)

    # ------------------------------------------------------------ the broker

    def _reading_plan(self, epoch: str) -> Plan:
        own = self._topology.worker_queue(self._agent.name, epoch)
        return Plan(
            exchanges=self._topology.exchanges(),
            queues=(own,),
            consumers=(Consumer(queue=own.name, on_delivery=self._take_verdict, no_ack=True),),
        )

    async def _let_in(self) -> None:
        """Fail at once, and not by trying for ever, where the broker refuses this worker from the beginning."""
        for link in (self._writing, self._reading):
            await link.let_in(lambda why: logger.warning("waits for the broker", extra={"reason": why}))

    def _link_changed(self) -> None:
        if self._reading.epoch is not None and self._writing.epoch is not None:
            self._metrics.broker_up.set(1)
            logger.info("connected to the broker")
            self._agent.connected(self._reading.epoch)
            self._act()

    def _link_down(self, reason: str) -> None:
        logger.warning("connection to the broker lost", extra={"reason": reason})
        self._metrics.broker_up.set(0)
        self._metrics.reconnects.inc()
        if self._agent.consuming is not None:
            self._reading.cancel(self._agent.consuming)  # only the publishing link may be down
        self._agent.disconnected()

    def _blocked(self, blocked: bool) -> None:  # noqa: FBT001  # the broker's word is a bool
        self._metrics.broker_blocked.set(blocked)
        if blocked:
            logger.warning("the broker takes nothing: a memory or disk alarm; what runs goes on until its lease ends")
        self._agent.blocked(blocked=blocked)
        self._act()

    def _take_verdict(self, delivery: Delivery) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        try:
            verdict = decode(delivery.body, Verdict)
            self._check_queues(verdict)
        except PeerError as error:
            self._metrics.unreadable.labels(source="verdict").inc()
            logger.warning(
                "an unreadable verdict was dropped; what it answers comes again", extra={"reason": str(error)}
            )
            return
        self._agent.verdict(verdict, self._clock())
        self._act()

    def _check_queues(self, verdict: Verdict) -> None:
        """Refuse to consume what is no class's queue: whoever can write verdicts must not have this worker eat others'.

        Raises:
            Unreadable: the verdict names another queue.
        """
        for part in verdict.parts:
            if isinstance(part, Assign) and part.queue is not None and not self._topology.is_class_queue(part.queue):
                raise Unreadable(f"expected a queue {self._topology.work}.<class> to consume, got {part.queue!r}")

    def _take_tickets(self, delivery: Delivery) -> None:
        try:
            message = decode(delivery.body, Tickets)
        except PeerError as error:
            self._metrics.unreadable.labels(source="work").inc()
            self._start(self._reject(delivery, error))
            return
        self._agent.tickets(delivery, message.tickets)
        self._act()

    async def _reject(self, delivery: Delivery, error: PeerError) -> None:
        """Keep an unreadable ticket for the operator; its request is offered again by the scheduler."""
        logger.warning("an unreadable ticket went to %s", self._topology.rejected, extra={"reason": str(error)})
        try:
            await self._writing.put_aside(delivery, exchange=self._topology.rejected, reason=str(error))
        except NotPublished:
            self._reading.requeue(delivery)
        else:
            self._reading.ack(delivery)

    def _publish(self, exchange: str, key: str, message: msgspec.Struct, *, lasting: bool) -> None:
        future = self._writing.publish(
            exchange=exchange,
            key=key,
            body=encode(message),
            kind=tag_of(message),
            mandatory=lasting,
            persistent=lasting,
        )
        future.add_done_callback(self._published)

    def _published(self, future: asyncio.Future[None]) -> None:
        """Count what was not published: reports and outcomes are repeated with the next heartbeat."""
        if not future.cancelled() and future.exception() is not None:
            self._metrics.not_published.inc()

    # ------------------------------------------------------------ acts

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._agent.tick(self._clock())
            self._act()
            for state, number in self._agent.slot_states().items():
                self._metrics.slots.labels(state=state).set(number)
            self._metrics.unsettled.set(self._agent.unsettled())
            self._ooms = processes.oom_kills()
            for child in self._children.values():
                self._hold_deadlines(child)
            self._listen_anew()
            if not self._analyzing and asyncio.get_running_loop().time() - self._analyzed_at >= self._metadata_interval:
                self._start(self._analyze())

    def _listen_anew(self) -> None:
        """Declare our own queue once more, after a silence: an exchange that was deleted took its bindings along."""
        now = asyncio.get_running_loop().time()
        if self._reading.epoch is not None and now - self._heard_at > DEAF_SECONDS:
            self._heard_at = now
            self._reading.refresh()  # a refusal changes nothing: there may be no scheduler to hear

    def _act(self) -> None:
        for act in self._agent.take_acts(self._clock()):
            self._do(act)
        for child in self._children.values():
            child.send()
        self._idle.set()
        if self._agent.wants_to_end():
            self._signalled.set()

    def _do(self, act: Act) -> None:
        match act:
            case Ack(delivery):
                self._reading.ack(delivery)
            case Requeue(delivery):
                self._reading.requeue(delivery)
            case Consume(queue, prefetch):
                self._reading.consume(Consumer(queue=queue, on_delivery=self._take_tickets, prefetch=prefetch))
            case Cancel(queue):
                self._reading.cancel(queue)
            case StartRun():
                self._start_run(act)
            case RenewRun(slot, token, deadline_ns):
                self._renew(slot, token, deadline_ns)
            case StopRunIn(slot, token, reason):
                self._order(slot, StopRun(token=token, reason=reason))
            case RecallRuns(slot):
                self._order(slot, Recall())
            case KillSlot(slot, reason):
                logger.warning("slot killed", extra={"slot": slot, "reason": reason})
                self._start(self._kill(slot))
            case Spool(outcome, task, litter):
                self._metrics.child(self._metrics.runs, task, outcome.result).inc()
                self._run_over(outcome.token)
                if litter:
                    self._littered.add(outcome.token)
                self._spooling.append(outcome)
                if not self._is_spooling:
                    self._is_spooling = True
                    self._start(self._spool())
            case Discard(token):
                self._run_over(token)
                self._start(self._remove(self._directory(token)))
            case Unspool(ref):
                self._unspooling.append(ref)
                if not self._is_unspooling:
                    self._is_unspooling = True
                    self._start(self._unspool())
                self._spooling[:] = [one for one in self._spooling if one.token != ref.token]
            case PublishReport(report):
                self._publish(self._topology.report, self._topology.report, report, lasting=False)
            case PublishOutcomes(outcomes):
                self._publish(self._topology.outcome, self._topology.outcome, outcomes, lasting=True)
            case PublishLog(message):
                if not self._writing.blocked:  # it would only pile up here
                    self._publish(self._topology.logs, message.request, message, lasting=False)
            case CountRefusal(task):
                self._metrics.refusals.labels(task=task).inc()
            case Analyze():
                if not self._analyzing:
                    self._start(self._analyze())

    # ------------------------------------------------------------ runs

    def _order(self, slot: int, order: SlotOrder) -> None:
        child = self._children.get(slot)
        if child is not None:  # else it has just ended, and its run with it
            child.order(order)

    def _directory(self, token: str) -> Path:
        return self._work_directory / token

    def _start_run(self, act: StartRun) -> None:
        child = self._children.get(act.slot)
        if child is None:
            return  # it has just ended, and the agent is about to hear of it
        directory = self._directory(act.token)
        try:
            for_slot, cores = self._limit(act, child, directory)
        except HostUnfit as error:  # without its limits it must not run
            self._agent.hold("limits", str(error))
            self._lacking["limits"] = None  # until the next look at what is in the way
            self._agent.not_started(act.token, str(error))
            self._act()
            return
        child.deadlines[act.token] = act.deadline_ns
        self._hold_deadlines(child, soon=True)
        child.order(
            RunTask(
                token=act.token,
                request=act.request,
                attempt=act.attempt,
                inputs=act.inputs,
                directory=str(directory),
                deadline_ns=act.deadline_ns,
                limits=for_slot,
                cpus=cores,
            )
        )

    def _limit(self, act: StartRun, child: "_Child", directory: Path) -> tuple[Limits | None, list[int]]:
        """Watch a run that has limits; return what its slot has to see to itself."""
        bounds = limits.smaller(act.request.limits, self._bounds)
        child.ooms = self._ooms
        if not limits.any_of(bounds):
            if child.group is not None and child.is_bounded:
                child.group.bound(memory=None, cpus=None, processes=None)  # the run before this one had some
                child.is_bounded = False
            return None, []
        child.is_bounded = True
        watch = Watch(limits=bounds, slot=child.process.pid, directory=directory, cgroup=child.group)
        self._watches[act.slot] = watch
        self._watching.set()
        if watch.for_slot is None:
            return None, []
        cores = limits.spread(bounds.cpus, [cores for slot, cores in self._cores.items() if slot != act.slot])
        self._cores[act.slot] = cores
        return watch.for_slot, cores

    def _renew(self, slot: int, token: str, deadline_ns: int) -> None:
        child = self._children.get(slot)
        if child is not None and token in child.deadlines:
            child.deadlines[token] = deadline_ns
            self._hold_deadlines(child, soon=True)
            child.order(Renew(token=token, deadline_ns=deadline_ns))

    def _run_over(self, token: str) -> None:
        for slot, child in self._children.items():
            if child.deadlines.pop(token, None) is not None:
                self._forget_limits(slot)

    def _forget_limits(self, slot: int) -> None:
        self._watches.pop(slot, None)
        self._cores.pop(slot, None)

    async def _look_at_limits(self) -> None:
        """Look whether runs keep to their limits, while any has some."""
        loop = asyncio.get_running_loop()
        while True:
            self._watching.clear()
            if not self._watches:
                await self._watching.wait()
            began = loop.time()
            watched = dict(self._watches)
            try:
                found = await loop.run_in_executor(self._look_thread, limits.look, list(watched.values()))
            except HostUnfit as error:
                logger.warning("limits could not be looked at", extra={"reason": str(error)})
                found = {}
            for slot, watch in watched.items():
                child = self._children.get(slot)
                exceeded = found.get(watch.slot)
                if exceeded and child and child.deadlines and self._watches.get(slot) is watch:
                    self._agent.exceeded(slot, next(iter(child.deadlines)), exceeded.what, exceeded.text)
            self._act()
            await asyncio.sleep(max(limits.LOOK_SECONDS, limits.LOOK_SHARE * (loop.time() - began)))

    async def _look_at_disks(self) -> None:
        """Take no work while there is no room for it."""
        while self._rooms:
            await self._in_room_thread(self._find_room)
            if not self._noted:
                self._note_children()
            for what, why in self._lacking.items():
                self._agent.hold(what, why)
            self._metrics.held.set(self._agent.held is not None)
            self._act()
            await asyncio.sleep(DISK_SECONDS)

    def _find_room(self) -> None:
        self._lacking["free disk"] = _little_room(self._rooms, self._min_free_disk)
        try:
            probe = self._work_directory / "probe"
            probe.mkdir(exist_ok=True)
            probe.rmdir()
        except OSError as error:
            self._lacking["work directory"] = f"expected room for a run in {self._work_directory}, got: {error}"
        else:
            self._lacking["work directory"] = None

    async def _spool(self) -> None:
        """Write what has ended to disk, as one set, and send it; a disk that is full is waited for."""
        while self._spooling:
            outcomes = list(self._spooling)
            try:
                await self._in_disk_thread(partial(self._state.spool, outcomes))
            except OSError as error:
                self._agent.hold("spool", f"outcomes cannot be spooled, and are tried again: {error}")
                self._act()
                await asyncio.sleep(SLOT_PAUSE)
                continue
            self._agent.hold("spool", None)
            written = {outcome.token for outcome in outcomes}
            self._spooling[:] = [outcome for outcome in self._spooling if outcome.token not in written]
            for outcome in outcomes:
                if self._agent.is_unsettled(outcome.token):
                    self._agent.spooled(outcome)
                else:  # it was sent from memory, and answered meanwhile
                    await self._in_disk_thread(partial(self._state.unspool, [outcome]))
            self._act()
            for token in self._littered & written:
                self._littered.discard(token)
                self._start(self._remove(self._directory(token)))
        self._is_spooling = False
        self._agent.hold("spool", None)
        self._idle.set()

    async def _unspool(self) -> None:
        while self._unspooling:
            refs, self._unspooling = self._unspooling, []
            await self._in_disk_thread(partial(self._state.unspool, refs))
        self._is_unspooling = False

    async def _remove(self, directory: Path) -> None:
        try:
            await self._in_room_thread(partial(processes.remove_tree, directory))
        except HostUnfit as error:
            logger.error("a run's directory could not be removed", extra={"reason": str(error)})  # noqa: TRY400  # no traceback at an operator

    # ------------------------------------------------------------ slots

    async def _keep_slot(self, number: int) -> None:
        """Keep a slot's process running."""
        first = True
        while not self._leaving:
            if not first:
                self._metrics.slot_restarts.inc()
            first = False
            child = await self._spawn(number)
            try:
                was_ready = await self._listen(number, child)
            finally:
                child.close()
            exit_code = await child.process.wait()
            self._tell_watchdog(child, watchdog.GONE)
            await self._end_what_outlived(number, child)
            self._note_children()
            last_words = child.last_words()
            self._agent.tick(self._clock())  # a deadline that has passed meanwhile was the reason
            self._say_of_memory(number, child, exit_code)
            self._forget_limits(number)
            self._agent.slot_gone(number, exit_code, last_words)
            self._act()
            if not was_ready and not self._leaving:
                reason = f"exit code {exit_code}: {last_words.strip()[-LAST_LINES:]}"
                logger.error("a slot did not start", extra={"slot": number, "reason": reason})
                await asyncio.sleep(SLOT_PAUSE)

    async def _spawn(self, number: int) -> _Child:
        async with self._spawning:
            if self._watchdog is None:
                self._watchdog = await self._start_watchdog()
            output, printed = os.pipe()
            words, said = os.pipe()
            os.set_blocking(words, False)
            ends = self._watchdog.ends
            try:
                process = await self._python(
                    "mqworker.slot",
                    str(ends),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=said,
                    stderr=printed,
                    pass_fds=[ends],
                )
            finally:
                os.close(printed)
                os.close(said)
            child = self._children[number] = _Child(process, words=words, output=output)
        if self._groups is not None:
            try:
                group = self._groups.make(number)
                group.put(process.pid)
                child.group = group
            except HostUnfit as error:
                logger.warning("a slot has no control group", extra={"slot": number, "reason": str(error)})
        self._tell_watchdog(child, watchdog.NO_DEADLINE)
        self._note_children()
        child.order(Outfit(store=self._store_url))
        child.send()
        return child

    async def _start_watchdog(self) -> "_Watchdog":
        """Start the process that ends slots at their deadlines where they cannot; slots end with it."""
        ends, held = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *watchdog.command(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
                pass_fds=[held],
                env=_child_environment(),
            )
        finally:
            os.close(held)
        started = _Watchdog(process, ends)
        if process.stdout is None or await process.stdout.readline() != watchdog.READY:
            raise HostUnfit("expected the watchdog of the slots to start, but it has ended: see what it printed above")
        self._start(self._follow_watchdog(started))
        return started

    async def _follow_watchdog(self, one: "_Watchdog") -> None:
        """End the slots with their watchdog: those that can have done so; the next ones get another."""
        await one.process.wait()
        async with self._spawning:
            self._watchdog = None
            orphaned = list(self._children.values())
        os.close(one.ends)
        if self._leaving:
            return
        logger.error(
            "the watchdog of the slots has ended, and they with it", extra={"exit_code": one.process.returncode}
        )
        for child in orphaned:
            if child.identity is not None:
                self._start(self._kill_child(child))

    def _hold_deadlines(self, child: _Child, *, soon: bool = False) -> None:
        """Have the watchdog know the first deadline of a slot's runs; `soon`: only if it has to know it now.

        A later one may wait for the next tick, long before the former: short runs follow each other faster than
        another process should be woken. It may end a slot too early, where nobody has told it, and never too late.
        """
        first = min(child.deadlines.values(), default=watchdog.NO_DEADLINE)
        if first == child.held or (soon and child.held != watchdog.NO_DEADLINE and first > child.held):
            return
        self._tell_watchdog(child, first)

    def _tell_watchdog(self, child: _Child, deadline_ns: int) -> None:
        child.held = deadline_ns
        if self._watchdog is not None and child.identity is not None:
            self._watchdog.tell(child.identity, deadline_ns)

    async def _end_what_outlived(self, number: int, child: _Child) -> None:
        """End what a slot that has died left behind: its run is over, and its slot free, when all that has gone."""
        told = ""
        while True:
            try:
                await self._end_orphans(but=number)
            except HostUnfit as error:
                if str(error) != told:
                    told = str(error)
                    logger.error("a run goes on without its slot", extra={"slot": number, "reason": told})  # noqa: TRY400  # no traceback at an operator
                    self._agent.outlived(number, told)
                    self._act()
                await asyncio.sleep(SLOT_PAUSE)
            else:
                break
        del self._children[number]
        if child.group is not None:
            child.group.remove()

    def _say_of_memory(self, number: int, child: _Child, exit_code: int) -> None:
        """Tell the agent if it was for want of memory that a slot was killed, as far as the kernel tells."""
        watch = self._watches.get(number)
        if not child.deadlines or exit_code != -signal.SIGKILL:
            return
        exceeded = None if watch is None else watch.killed()
        if exceeded is not None:
            self._agent.exceeded(number, next(iter(child.deadlines)), exceeded.what, exceeded.text)
        elif processes.oom_kills() > child.ooms:
            self._agent.out_of_memory(number)

    async def _listen(self, number: int, child: _Child) -> bool:
        """Pass on what a slot says, until its process ends."""
        was_ready = False
        pieces: list[bytes] = []  # of a line that has no end yet
        while chunk := await child.hear():
            try:
                for word in _words(pieces, chunk):
                    was_ready = was_ready or isinstance(word, SlotReady)
                    self._hear_word(number, child, word)
            except PeerError as error:
                self._agent.slot_babbled(number, str(error))
                self._act()
                while await child.hear():
                    pass
                break
            self._act()
            if self._agent.is_supplied(number):
                await asyncio.sleep(HEARING_PAUSE)  # it can go on, and has said more by then
        return was_ready

    def _hear_word(self, number: int, child: _Child, word: SlotWord) -> None:
        badly = isinstance(word, SlotEnded) and word.result in {"failure", "error"}  # else nobody asks why
        if badly and child.deadlines and processes.oom_kills() > child.ooms:
            self._agent.out_of_memory(number)
        self._agent.slot_said(number, word)

    def _note_children(self) -> None:
        slots = [child.identity for child in self._children.values() if child.identity is not None]
        try:
            self._state.note_slots([*slots, *self._strays])
        except OSError as error:
            self._agent.hold("state directory", f"expected room in the state directory, got: {error}")
            self._noted = False
        else:
            self._agent.hold("state directory", None)
            self._noted = True

    async def _kill(self, slot: int) -> None:
        child = self._children.get(slot)
        if child is not None:
            await self._kill_child(child)

    async def _kill_child(self, child: _Child) -> None:
        try:
            if child.group is not None:
                child.group.kill()
            if child.identity is not None:
                await self._in_kill_thread(partial(processes.kill_tree, child.identity, comes_here=True))
        except HostUnfit as error:
            logger.error("a slot cannot be ended", extra={"reason": str(error)})  # noqa: TRY400  # no traceback at an operator

    async def _end_orphans(self, but: int | None = None) -> None:
        """End what a slot that has died left to this process, which is a subreaper."""
        async with self._spawning:
            spare = [child.process.pid for number, child in self._children.items() if number != but]
            if self._analyst is not None:
                spare.append(self._analyst)
            if self._watchdog is not None:
                spare.append(self._watchdog.process.pid)
            strays: list[processes.Process] = []
            try:
                await self._in_kill_thread(lambda: processes.kill_descendants(spare=spare))
            except HostUnfit as error:
                self._in_the_way = str(error)
                strays = processes.descendants(os.getpid(), spare=spare)
                raise
            finally:
                if strays != self._strays:  # a successor is to know them: who it is told has ended may run elsewhere
                    self._strays = strays
                    self._note_children()

    async def _end_children(self) -> None:
        """Close the slots' pipes: each ends its descendants and itself; then make sure."""
        children = list(self._children.values())
        for child in children:
            if child.process.stdin is not None:
                child.process.stdin.close()
        waits = [asyncio.ensure_future(child.process.wait()) for child in children]
        if waits:
            await asyncio.wait(waits, timeout=SETTLE_SECONDS)
        for child in children:
            if child.process.returncode is None:
                await self._kill_child(child)
            if child.group is not None:
                child.group.remove()
        self._children.clear()
        if self._watchdog is not None and self._watchdog.process.stdin is not None:
            self._watchdog.process.stdin.close()
            with contextlib.suppress(TimeoutError):  # it waits for slots that do not die
                await asyncio.wait_for(self._watchdog.process.wait(), SETTLE_SECONDS)
            self._watchdog = None
        try:
            await self._end_orphans()
        except HostUnfit as error:
            logger.error("something cannot be ended", extra={"reason": str(error)})  # noqa: TRY400  # no traceback at an operator
        for token in {*self._littered, *(token for child in children for token in child.deadlines)}:
            await self._remove(self._directory(token))

    async def _python(
        self,
        module: str,
        *arguments: str,
        stdin: int,
        stdout: int = asyncio.subprocess.PIPE,
        stderr: int | None = None,
        pass_fds: Collection[int] = (),
    ) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # a stray tasks.py in the working directory must not shadow the package
            "-m",
            module,
            *arguments,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # a terminal's Ctrl-C is for this process alone
            pass_fds=pass_fds,
            env=_child_environment(),
        )

    # ------------------------------------------------------------ the host

    async def _analyze(self) -> None:
        """Look at the host in a process of its own, which cannot hang or hurt this one."""
        self._analyzing = True
        try:
            self._agent.analyzed(await self._analysis())
        except HostUnfit as error:
            if not self._analyzed_at:
                raise
            logger.warning("the host could not be looked at; the last view stays", extra={"reason": str(error)})
        finally:
            self._analyzing = False
            self._analyzed_at = asyncio.get_running_loop().time()
        self._act()

    async def _analysis(self) -> Analysis:
        async with self._spawning:
            process = await self._python(
                "mqworker.slot", "--analyze", str(self._work_directory), stdin=asyncio.subprocess.DEVNULL
            )
            self._analyst = process.pid
        identity = processes.identify(process.pid)
        try:
            output, _ = await asyncio.wait_for(process.communicate(), ANALYSIS_SECONDS)
            analysis = decode(output, Analysis, limit=MAX_LINE_BYTES)
        except TimeoutError:
            raise HostUnfit(f"expected analyze_worker() of all tasks to end within {ANALYSIS_SECONDS:g} s") from None
        except PeerError as error:
            raise HostUnfit(
                f"expected tasks to say what this host can do, but the look at it ended with exit code"
                f" {process.returncode}: see what it printed above"
            ) from error
        finally:
            if identity is not None:
                await self._in_kill_thread(partial(processes.kill_tree, identity))
            self._analyst = None
        for name, failure in analysis.failures.items():
            logger.warning("a task cannot be used on this host", extra={"task": name, "reason": failure})
        return analysis


def _words(pieces: list[bytes], chunk: bytes) -> Iterator[SlotWord]:
    """Read the words that a chunk completes; `pieces` is the beginning of the next one, before and after.

    Raises:
        PeerError: a line is no word, or has no end.
    """
    *lines, rest = chunk.split(b"\n")
    for line in lines:
        whole = b"".join([*pieces, line])
        pieces.clear()
        yield decode(whole, SlotWord, limit=MAX_LINE_BYTES)  # type: ignore[arg-type]  # a union of structs
    pieces.append(rest)
    if sum(map(len, pieces)) > MAX_LINE_BYTES:
        raise Unreadable(f"expected lines of at most {MAX_LINE_BYTES} bytes from a slot, got more without an end")


def _little_room(directories: Collection[Path], least: int) -> str | None:
    """Say which file system has less room than it must have; None: none. `least` is in bytes; 0: any is enough."""
    for directory in directories if least else ():
        try:
            found = os.statvfs(directory)
        except OSError as error:
            return f"expected to ask how much room is in {directory}, got: {error}"
        free = found.f_bavail * found.f_frsize
        if free < least:
            return f"expected min_free_disk ({least} bytes) free in {directory}, got {free}; make room there"
        if found.f_files and found.f_favail < FEW_INODES:
            return f"expected room for {FEW_INODES} files in {directory}, got {found.f_favail}; make room there"
    return None


def _child_environment() -> dict[str, str]:
    """Leave out of a child's environment what is ours: URLs have passwords."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MQWORKER_") or name.startswith(KEPT_VARIABLES)
    }
    return {**kept, "PYTHONUNBUFFERED": "1"}


def _take_work_directory(base: Path, name: str) -> tuple[Path, int]:
    """Make and lock the directory of this worker's runs; return it with the lock.

    Raises:
        StateLocked: it is another's, or cannot be made.
    """
    directory = base / name
    try:
        base.mkdir(parents=True, exist_ok=True)
        directory.mkdir(exist_ok=True)
        for one in (base, directory):
            owner = one.lstat().st_uid
            if owner not in {os.getuid(), 0}:  # in /var/tmp anybody may have been here first
                raise StateLocked(
                    f"expected a work directory that belongs to this user or root, got {one} of uid {owner};"
                    " remove it, or set work_dir"
                )
            if owner == os.getuid():
                one.chmod(one.stat().st_mode | 0o711)  # a build's own uid has to get through
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StateLocked(
            f"expected a work directory that this user can write, got {directory}: {error.strerror}; set work_dir"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise StateLocked(
            f"expected a work directory of this worker's own, got {directory}, which another worker of the same name"
            " uses: give this one another name or work_dir"
        ) from error
    return directory, lock


def _sweep(state: WorkerState, work_directory: Path) -> None:
    """End what a predecessor left running, and remove its mounts and its runs' directories, chroots and all."""
    left: Sequence[processes.Process] = [*state.noted_slots(), *processes.inside(work_directory)]
    problems = []
    for process in left:
        try:
            processes.kill_tree(process)
        except HostUnfit as error:
            problems.append(str(error))
    if problems:  # the scheduler takes what a predecessor ran as ended when it hears of this worker
        raise HostUnfit(
            f"{problems[0]} (a worker that ran here before has left it; this one does not start before it has gone)"
        )
    for point in processes.unmount_below(work_directory):
        logger.warning("a run has left something mounted, which is unmounted", extra={"path": point})
    for entry in work_directory.iterdir():
        if entry.name != "lock":
            processes.remove_tree(entry)


def _take_groups() -> Cgroups | None:
    """Take over the control group of this service, if it is there to be divided; without, limits are watched."""
    try:
        groups = Cgroups.take()
    except HostUnfit as error:
        logger.info("limits of runs are kept without control groups", extra={"reason": str(error)})
        return None
    logger.info("limits of runs are kept by the kernel, in control groups")
    return groups


async def run(
    *,
    amqp_url: str,
    prefix: str,
    store_url: str,
    name: str,
    slots: int,
    state_dir: Path,
    work_dir: Path,
    metadata_interval: float,
    drain_grace: float,
    static_metadata: Mapping[str, Any],
    allow_tasks: Collection[str],
    deny_tasks: Collection[str],
    metrics_listen: str,
    bounds: Limits | None = None,
    min_free_disk: int = 0,
) -> None:
    """Run a worker until SIGTERM or SIGINT: the first drains it, the second stops it now; SIGHUP looks at the host.

    Raises:
        MqworkerError: its directories are another's, its store is not there, the broker refuses it, or it is to allow
            or deny a task that nobody has.
    """
    check_task_names(allow_tasks=allow_tasks, deny_tasks=deny_tasks)
    state = await asyncio.to_thread(WorkerState, state_dir)
    server = None
    lock = None
    try:
        if state.copied is not None:
            logger.warning("the state directory is a copy", extra={"reason": state.copied})
        directory, lock = _take_work_directory(work_dir, name)
        processes.become_subreaper()
        await asyncio.to_thread(_sweep, state, directory)
        store = await asyncio.to_thread(Store.open, store_url)
        metrics = WorkerMetrics(version=__version__)
        agent = Agent(
            name=name,
            host=socket.gethostname(),
            incarnation=state.incarnation,
            home=state.home,
            slots=slots,
            store_id=store.id,
            static_metadata=static_metadata,
            allow_tasks=allow_tasks,
            deny_tasks=deny_tasks,
            bounded=bounds is not None and limits.any_of(bounds),
            make_token=lambda: f"{state.home}-{uuid.uuid4().hex}",
            wall=time.time,
        )
        worker = Worker(
            amqp_url=amqp_url,
            topology=Topology(prefix),
            agent=agent,
            state=state,
            store_url=store_url,
            slots=slots,
            work_directory=directory,
            metadata_interval=metadata_interval,
            drain_grace=drain_grace,
            metrics=metrics,
            bounds=bounds,
            min_free_disk=min_free_disk,
            rooms=[one for one in (directory, state_dir, store.folder) if one is not None],
            groups=_take_groups(),
        )
        if metrics_listen:
            server = MetricsServer(metrics_listen, registry=metrics.registry, health=worker.health)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, worker.signalled)
        loop.add_signal_handler(signal.SIGHUP, worker.refresh)
        logger.info("worker starts", extra={"worker": name, "slots": slots, "store": store.id})
        await worker.run()
        logger.info("worker has stopped")
    finally:
        if server is not None:
            server.close()
        if lock is not None:
            os.close(lock)
        state.close()
