"""The scheduler: read, judge, record, publish - in that order, one set of messages after the other.

Whatever came while the ledger was committing makes the next set, so nothing waits for a timer and nothing is
published before it is recorded. The judgement is the pool's; here are the doors, the loop and the clock.
"""

import asyncio
import gc
import logging
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any, Final, TypeVar, cast

import msgspec

from mqworker import __version__
from mqworker.access import Access, Rule, User
from mqworker.amqp import BLOCKED, REPLY_TO, Consumer, Delivery, Link, Plan
from mqworker.brokerurl import read_url
from mqworker.dispatch import Want
from mqworker.errors import (
    BrokerRefused,
    BrokerUnavailable,
    Impostor,
    LedgerLocked,
    LedgerLost,
    LedgerUnavailable,
    NotPublished,
    PeerError,
    TooLarge,
    Unreadable,
)
from mqworker.examiner import NOBODY, Draft
from mqworker.facts import ImportRefused, Wanted
from mqworker.hearing import Hearing
from mqworker.ledger import MOST_MARKS, Ledger
from mqworker.lifecycle import FINAL, State
from mqworker.messages import (
    FULL_ID,
    MAX_DESCRIBED_BYTES,
    MAX_INPUTS_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_REQUEST_BYTES,
    AbortRequests,
    Answer,
    ArtifactList,
    Command,
    CountRequests,
    DrainWorkers,
    Explain,
    ForgetWorker,
    GetCapabilities,
    GetPool,
    GetRequests,
    GetStates,
    ImportArtifact,
    ListArtifacts,
    ListPauses,
    ListRequests,
    ListWorkers,
    Outcomes,
    Pause,
    PauseList,
    PoolCommand,
    Probe,
    Problem,
    Query,
    Receipt,
    RecordedArtifact,
    RefreshWorkers,
    Report,
    Reprioritise,
    Request,
    RequestCount,
    RequestEvents,
    RequestList,
    Resume,
    RetryRequest,
    StateList,
    Submit,
    Tickets,
    Verdict,
    WorkerList,
    decode,
    encode,
    longer_than,
    tag_of,
)
from mqworker.metrics import Health, MetricsServer, SchedulerMetrics
from mqworker.outbox import Send
from mqworker.pool import EXPIRED_AT_ONCE, PLACED_AT_ONCE, Answers, Asks, Kept, Moment, Pool
from mqworker.processes import boottime_ns
from mqworker.store import Store
from mqworker.topology import Topology

logger = logging.getLogger(__name__)

TICK: Final = 0.25  # seconds between looks at what is due; leases and offers are counted in seconds
REFRESH: Final = 60.0  # seconds between declarations of what somebody may have deleted ...
REFRESH_DEAF: Final = 5.0  # ... and where it looks as if somebody has
SHOW: Final = 2.0  # seconds between settings of the gauges
STOP_SECONDS: Final = 10.0  # for the set in hand when the scheduler is stopped
GC_THRESHOLDS: Final = (10_000, 50, 10_000)  # a full collection of a large pool takes up to a second: hardly ever
IMPOSTOR_SECONDS: Final = 60.0  # between messages put aside of one who speaks in another's name
MOST_IMPOSTORS: Final = 1000  # of whom this is remembered
COMMIT_RETRY: Final = 1.0  # seconds before a commit that failed is tried again
MAX_WAITING_BYTES: Final = 256 * 1024 * 1024  # of reports, while the ledger commits; more are dropped: they come again
STANDBY_SECONDS: Final = 0.5  # between two tries of a standby to be elected
# What a frozen scheduler has been handed comes back when the broker misses its heartbeats: after 10 to 15 s.
READING_HEARTBEAT: Final = 5
STANDBY: Final = "standby"
STANDS_BY: Final = "for its turn, another scheduler is active"
HIGHEST_PRIORITY: Final = 2**31 - 1  # of a consumer

_T = TypeVar("_T")


def now() -> Moment:
    """Say what time it is on this host."""
    return Moment(steady=boottime_ns() / 1e9, wall=time.time())


def kept_by(ledger: Ledger) -> Kept:
    """Read what a new scheduler begins with."""
    held = ledger.held()
    return Kept(
        newest=ledger.newest(),
        newest_requirement=ledger.newest_requirement(),
        requirements=ledger.requirements(),
        lanes=ledger.lanes(),
        held=held,
        blocked=ledger.blocked(),
        histories=ledger.histories([row.request.id for row in held if row.tried]),
        pauses=ledger.pauses(),
        worker_names=ledger.worker_names(),
    )


def look_up(ledger: Ledger, asks: Asks) -> Answers:
    """Read what the pool wants to know; right behind a commit, it is what that has left."""
    return Answers(
        artifacts=ledger.artifacts_by_id(asks.artifacts, limit=MAX_INPUTS_BYTES) if asks.artifacts else {},
        heads=ledger.heads([_wanted(want) for want in asks.heads]) if asks.heads else (),
        members=[ledger.members(number, max(1, PLACED_AT_ONCE // len(asks.members))) for number in asks.members],
        used=ledger.used(asks.unused) if asks.unused else frozenset(),
        histories=ledger.histories(asks.histories) if asks.histories else {},
        expired=None if asks.expired is None else ledger.expired(asks.expired, EXPIRED_AT_ONCE),
    )


def _wanted(want: Want) -> Wanted:
    requirement, priority, group, key = want.lane  # a requirement of one request alone is in memory altogether
    return Wanted(cast("int", requirement), priority, group, key, want.after, want.limit)


class Scheduler:
    """Carry messages between the broker, the pool and the ledger; `link` and `clock` are its doors in a simulation."""

    def __init__(
        self,
        *,
        amqp_url: str,
        topology: Topology,
        ledger: Ledger,
        store: Store,
        metrics: SchedulerMetrics,
        retry_delay: float,
        offer_timeout: float,
        no_worker_after: float,
        pause_after: int,
        group_weights: Mapping[str, float],
        concurrency_limits: Mapping[str, int],
        access: Access,
        link: Callable[..., Link] = Link,
        clock: Callable[[], Moment] = now,
    ) -> None:
        self._now = clock
        self._topology = topology
        self._ledger = ledger
        self._store_id = store.id
        self._metrics = metrics
        self._access = access
        self._put_aside: dict[tuple[str, str], float] = {}  # of impostors' messages, when the last was put aside
        self._pool = Pool(
            term=ledger.term,
            topology=topology,
            store_id=store.id,
            retry_delay=retry_delay,
            offer_timeout=offer_timeout,
            metrics=metrics,
            group_weights=group_weights,
            concurrency_limits=concurrency_limits,
            no_worker_after=no_worker_after,
            pause_after=pause_after,
        )
        # Nothing else tells that the broker has forgotten us.
        self._hearing = Hearing(term=ledger.term, queues=(topology.submit, topology.outcome, topology.api))
        self._inbox: list[Delivery] = []
        self._waiting_bytes = 0  # of reports in it
        self._flooded = False  # some were dropped
        self._calls: list[Callable[[], None]] = []  # judged with the next set, never while one is being committed
        self._serving: set[asyncio.Task[None]] = set()
        self._failed: BaseException | None = None
        self._awake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._working = False
        self._ticked = self._shown = 0.0
        self._refreshed = clock().steady
        self._deaf = False
        self._ledger_thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._ledger_well = True
        self._reading = link(
            amqp_url,
            name=f"mqworker scheduler {topology.prefix} reading",
            plan=self._reading_plan,
            on_up=self._reading_up,
            on_down=self._reading_down,
            heartbeat=READING_HEARTBEAT,
        )
        self._writing = link(
            amqp_url,
            name=f"mqworker scheduler {topology.prefix} writing",
            plan=self._writing_plan,
            on_up=self._link_changed,
            on_down=self._link_down,
            on_blocked=self._blocked,
        )

    async def run(self) -> None:
        """Work until `stop()`; then finish the set in hand and take leave of the broker.

        Raises:
            BrokerRefused: the broker does not let this scheduler in.
            LedgerLost: another scheduler was elected.
        """
        moment = self._now()
        self._pool.restore(await self._in_ledger_thread(lambda: kept_by(self._ledger)), moment)
        self._metrics.active.set(1)
        self._metrics.term.set(self._ledger.term)
        links = [asyncio.create_task(link.run()) for link in (self._writing, self._reading)]
        ticker = asyncio.create_task(self._tick())
        work = asyncio.create_task(self._work())
        stopped = asyncio.create_task(self._stopping.wait())
        ends: set[asyncio.Task[Any]] = {*links, ticker, work, stopped}
        try:
            # Whatever of these ends first ends the scheduler: it is built to be started again.
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if self._working:
                await asyncio.wait([work], timeout=STOP_SECONDS)  # for the set in hand
        finally:
            mine = (ticker, work, stopped, *self._serving)
            for task in mine:
                task.cancel()
            await asyncio.gather(*mine, return_exceptions=True)
            await self._reading.close()
            await self._writing.close()
            await asyncio.gather(*links, return_exceptions=True)
            self._ledger_thread.shutdown()

    def stop(self) -> None:
        """Ask `run()` to end."""
        self._stopping.set()
        self._awake.set()

    def health(self) -> Health:
        """Say whether the scheduler does its work."""
        for link in (self._reading, self._writing):
            if link.epoch is None:
                return Health(well=False, text=f"no connection to the broker: {link.last_error or 'connecting'}")
        if not self._ledger_well:
            return Health(well=False, text="the ledger does not answer")
        if self._writing.blocked:
            return Health(well=False, text=BLOCKED)
        return Health(well=True, text=f"scheduler of term {self._ledger.term}")

    # ------------------------------------------------------------ doors

    def _reading_plan(self, epoch: str) -> Plan:
        topology = self._topology
        report = topology.report_queue(epoch)

        # A predecessor that is frozen consumes still: it gets nothing more as long as we take what comes.
        priority = min(self._ledger.term, HIGHEST_PRIORITY)

        def consumer(queue: str, *, prefetch: int = 200) -> Consumer:
            return Consumer(queue=queue, on_delivery=self._take, prefetch=prefetch, priority=priority)

        return Plan(
            exchanges=topology.exchanges(),
            queues=(*topology.queues(), report),
            consumers=(
                Consumer(queue=report.name, on_delivery=self._take_report, no_ack=True),
                consumer(topology.outcome_queue().name),
                consumer(topology.submit_queue().name, prefetch=50),
                Consumer(queue=topology.api_queue().name, on_delivery=self._take_query, prefetch=50, priority=priority),
            ),
        )

    def _writing_plan(self, _epoch: str) -> Plan:
        return Plan(exchanges=self._topology.exchanges(), queues=self._topology.queues())

    def _take(self, delivery: Delivery) -> None:
        self._hearing.heard(delivery.exchange, self._now().steady)
        self._inbox.append(delivery)
        self._awake.set()

    def _take_report(self, delivery: Delivery) -> None:
        """Take a report; nothing but this bounds how many wait, since they come without acknowledgement."""
        if self._waiting_bytes > MAX_WAITING_BYTES:
            self._metrics.unreadable.labels(source="flood").inc()
            self._flooded = True
            return
        self._waiting_bytes += len(delivery.body)
        self._take(delivery)

    def _take_query(self, delivery: Delivery) -> None:
        self._hearing.heard(self._topology.api, self._now().steady)
        task = asyncio.get_running_loop().create_task(self._serve(delivery))
        self._serving.add(task)
        task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failed = task.exception()  # ours: end the scheduler with it
            self._awake.set()

    def _link_changed(self, _epoch: str) -> None:
        self._metrics.broker_up.set(self._reading.epoch is not None and self._writing.epoch is not None)
        self._awake.set()

    def _link_down(self, reason: str) -> None:
        logger.warning("connection to the broker lost", extra={"reason": reason})
        self._metrics.reconnects.inc()
        self._metrics.broker_up.set(0)

    def _reading_up(self, epoch: str) -> None:
        self._hearing.anew()
        self._pool.declare += self._pool.class_queues()  # not by the plan: one that cannot be had must not stop all
        self._link_changed(epoch)

    def _reading_down(self, reason: str) -> None:
        self._link_down(reason)
        self._pool.disconnected()

    def _blocked(self, blocked: bool) -> None:  # noqa: FBT001  # the broker's word is a bool
        self._metrics.broker_blocked.set(blocked)
        if blocked:
            logger.warning("the broker takes nothing: a memory or disk alarm; what runs goes on until its lease ends")
        else:
            self._calls.append(lambda: self._pool.unblocked(self._now()))
        self._awake.set()

    # ------------------------------------------------------------ the loop

    async def _in_ledger_thread(self, call: Callable[[], _T]) -> _T:
        """Ask the ledger, again and again while it is away."""
        while True:
            try:
                found = await asyncio.get_running_loop().run_in_executor(self._ledger_thread, call)
            except LedgerUnavailable as error:
                if self._stopping.is_set():
                    raise
                self._ledger_well = False
                self._metrics.commit_failures.inc()
                logger.error(  # noqa: TRY400  # no traceback at an operator
                    "the ledger does not answer, trying again", extra={"reason": str(error)}
                )
                await asyncio.sleep(COMMIT_RETRY)
            else:
                self._ledger_well = True
                return found

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._awake.set()

    async def _work(self) -> None:
        for link in (self._writing, self._reading):
            await link.let_in(lambda why: logger.warning("waits for the broker", extra={"reason": why}))
        self._working = True
        while not self._stopping.is_set():
            await self._awake.wait()
            self._awake.clear()
            if self._failed is not None:
                raise self._failed
            await self._turn()

    async def _turn(self) -> None:
        inbox, self._inbox, self._waiting_bytes = self._inbox, [], 0
        calls, self._calls = self._calls, []
        for call in calls:
            call()
        if self._flooded:
            self._flooded = False
            self._pool.disconnected()  # its probe may have been among what was dropped
        settled: list[Delivery] = []
        for delivery in inbox:
            try:
                settle = await self._read(delivery)
            except PeerError as error:
                await self._reject(delivery, error)
                continue
            if settle:
                settled.append(delivery)
        moment = self._now()
        if moment.steady - self._ticked >= TICK:
            self._ticked = moment.steady
            self._pool.tick(moment)
        if moment.steady - self._refreshed >= (REFRESH_DEAF if self._deaf else REFRESH):
            self._refresh(moment.steady)
        if self._writing.epoch is not None and not self._writing.blocked:
            self._pool.offer(moment)
        await self._record()
        await self._declare()
        for send in self._pool.take_sends():
            self._publish(send)
        for delivery in settled:
            self._reading.ack(delivery)
        self._listen()
        if moment.steady - self._shown >= SHOW:
            self._shown = moment.steady
            self._pool.views.show(moment.steady)

    async def _record(self) -> None:
        """Commit what the pool has judged; nothing else happens until the ledger has it."""
        writes, asks = self._pool.take_writes()

        results: Sequence[Any] | None = None
        answers: Answers | None = None

        def commit() -> None:
            nonlocal results, answers
            if results is None:  # else it was the look that failed: what is committed is not to be done twice
                results = self._ledger.commit(writes)
            answers = look_up(self._ledger, asks)

        # Also what is said without a write to the ledger is said in our term only.
        if not writes and not asks and self._ledger.sure:
            self._pool.committed([], Answers())
            return
        began = time.monotonic()
        await self._in_ledger_thread(commit)
        if writes:
            self._metrics.commit_seconds.observe(time.monotonic() - began)
            self._metrics.commit_writes.observe(len(writes))
        self._awake.set()  # what came free is offered at once, and not at the next tick
        self._pool.committed(results or [], answers or Answers())

    async def _declare(self) -> None:
        """Make the queues of new classes before anybody is told of them; a new connection makes all of them anyway."""
        for last in (False, True):  # a queue that cannot be had gets another name, once
            queues = {queue.name: queue for queue in self._pool.declare}
            self._pool.declare = []
            epoch = self._reading.epoch
            made = [(name, self._reading.declare(queue)) for name, queue in queues.items()]
            for name, future in made:
                try:
                    await future
                except (BrokerUnavailable, BrokerRefused) as error:
                    logger.warning("a class queue was not declared", extra={"reason": str(error)})
                    if not last and epoch is not None and self._reading.epoch == epoch:
                        self._pool.queue_lost(name)
        names, self._pool.delete = self._pool.delete, []
        for name in names:
            self._reading.delete(name)  # if unused and empty; else it expires

    def _refresh(self, steady: float) -> None:
        """Have exchanges, queues and bindings declared again: an exchange that was deleted took its bindings along."""
        self._refreshed = steady
        self._deaf = False
        if self._reading.epoch is not None:
            self._reading.refresh().add_done_callback(_tell_refusal)

    def _listen(self) -> None:
        """Send probes through the queues that we consume; where one stays away, build the connection anew."""
        steady = self._now().steady
        # As many questions as the broker may hand out at a time may wait for the ledger.
        deaf = self._hearing.deaf(steady, busy=(self._topology.api,) if self._serving else ())
        if deaf:
            self._hearing.anew()
            self._reading.renew(f"nothing comes any more from {', '.join(deaf)}, though something waits there")
        if self._reading.epoch is None or self._writing.epoch is None or self._writing.blocked:
            return
        for queue, probe in self._hearing.due(steady):
            future = self._writing.publish(
                exchange=queue, key=queue, body=encode(probe), kind=tag_of(probe), persistent=False
            )
            future.add_done_callback(partial(self._probed, queue, probe))

    def _probed(self, queue: str, probe: Probe, future: asyncio.Future[None]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._hearing.confirmed(queue, probe, self._now().steady)
        else:
            self._hearing.not_published(queue, probe)

    def _publish(self, send: Send) -> None:
        body = encode(send.message)
        if len(body) > MAX_MESSAGE_BYTES and (halves := _halved(send.message)):
            for half in halves:
                self._publish(replace(send, message=half))
            return
        future = self._writing.publish(
            exchange=send.exchange,
            key=send.key,
            body=body,
            kind=tag_of(send.message),
            mandatory=send.mandatory,
            persistent=send.persistent,
        )
        future.add_done_callback(partial(self._published, send))

    def _published(self, send: Send, future: asyncio.Future[None]) -> None:
        if future.cancelled() or future.exception() is None:
            return
        self._metrics.not_published.inc()
        if send.exchange == self._topology.report:
            self._deaf = True  # our own queue does not hear us, nor anybody else
        if send.returned is not None:
            self._calls.append(send.returned)
            self._awake.set()

    # ------------------------------------------------------------ reading

    async def _read(self, delivery: Delivery) -> bool:
        """Let the pool judge one message; return whether it is to be acknowledged once that is recorded."""
        moment = self._now()
        if delivery.exchange == self._topology.report:
            report = decode(delivery.body, Report | Probe)  # type: ignore[arg-type]  # a union of structs
            if isinstance(report, Probe):
                self._pool.probe(report, moment)
            else:
                self._pool.report(report, moment, delivery.user_id)
            return False  # consumed without acknowledgement
        if delivery.exchange == self._topology.outcome:
            outcomes = decode(delivery.body, Outcomes | Probe)  # type: ignore[arg-type]  # a union of structs
            if isinstance(outcomes, Probe):
                self._hearing.back(delivery.exchange, outcomes)
            else:
                self._pool.outcomes(outcomes, moment, delivery.user_id)
        else:
            await self._submit(delivery, moment)
        return True

    async def _submit(self, delivery: Delivery, moment: Moment) -> None:
        submit = decode(delivery.body, Submit | Probe)  # type: ignore[arg-type]  # a union of structs
        if isinstance(submit, Probe):
            self._hearing.back(delivery.exchange, submit)
            return
        if len(delivery.body) > MAX_REQUEST_BYTES:
            for request in submit.requests:
                if (size := len(encode(request))) > MAX_REQUEST_BYTES:
                    raise Unreadable(
                        f"expected requests of at most {MAX_REQUEST_BYTES} bytes, got {size} for {request.id}: import"
                        " large data as an artifact and name its id"
                    )
        drafts = [self._draft(request, delivery.user_id) for request in submit.requests]
        artifacts = await self._artifacts(drafts)
        user = delivery.user_id
        heeds = partial(self._access.commanders, user)
        self._pool.submit(drafts, artifacts, moment, partial(self._answer, delivery), submitter=user, heeds=heeds)

    def _draft(self, request: Request, user: User) -> Draft:
        """Ask whether this user may submit it, and whether its task accepts the data."""
        draft = self._pool.examine(request)
        refused = self._access.submit(user, request.group)
        return draft if refused is None else replace(draft, problem=refused)

    async def _artifacts(self, drafts: Sequence[Draft]) -> Mapping[int, RecordedArtifact]:
        wanted = {number for draft in drafts for number in draft.inputs}
        if not wanted:
            return {}
        return await self._in_ledger_thread(lambda: self._ledger.artifacts_briefly(wanted))

    async def _reject(self, delivery: Delivery, error: PeerError) -> None:
        """Keep what does not count for the operator, as it came, and tell who sent it if it can be told."""
        if isinstance(error, Impostor):
            self._metrics.impostors.inc()
            if self._said_lately(delivery.exchange, str(error)):
                self._reading.ack(delivery)  # whoever means it says it again and again, and has it
                return
            logger.warning("an impostor's message went to %s", self._topology.rejected, extra={"reason": str(error)})
        else:
            self._metrics.unreadable.labels(source=delivery.exchange.rpartition(".")[2]).inc()
            logger.warning("an unreadable message went to %s", self._topology.rejected, extra={"reason": str(error)})
        if delivery.exchange == self._topology.submit:
            self._answer(delivery, Receipt(term=self._ledger.term, problem=str(error)))
        try:
            await self._writing.put_aside(delivery, exchange=self._topology.rejected, reason=str(error))
        except NotPublished:
            self._reading.requeue(delivery)
        else:
            self._reading.ack(delivery)

    def _said_lately(self, exchange: str, text: str) -> bool:
        """Tell whether the like of an impostor's message was just put aside: one every few seconds fills disks."""
        now = self._now().steady
        if now - self._put_aside.get((exchange, text), -inf) < IMPOSTOR_SECONDS:
            return True
        if len(self._put_aside) >= MOST_IMPOSTORS:
            self._put_aside.clear()
        self._put_aside[exchange, text] = now
        return False

    def _answer(self, delivery: Delivery, message: msgspec.Struct) -> None:
        # Any other name would have us write, with our rights, where whoever asks may not: into a class's queue, say.
        if delivery.reply_to is None or not delivery.reply_to.startswith(f"{REPLY_TO}."):
            return
        self._writing.publish(
            exchange="",
            key=delivery.reply_to,
            body=encode(message),
            kind=tag_of(message),
            correlation_id=delivery.correlation_id,
            mandatory=False,
            persistent=False,
        )

    # ------------------------------------------------------------ queries and commands

    async def _serve(self, delivery: Delivery) -> None:
        """Answer one query; reads and writes take their turn among the ledger's sets."""
        try:
            query: Query | Probe = decode(delivery.body, cast("Any", Query | Probe))  # a union of structs
            if isinstance(query, Probe):
                self._hearing.back(delivery.exchange, query)
                self._reading.ack(delivery)
                return
            refused = self._refused(query, delivery)
            answer = await self._respond(query, delivery.user_id) if refused is None else refused
        except PeerError as error:
            self._metrics.unreadable.labels(source="api").inc()
            answer = Problem(kind="unreadable", text=str(error))
        except TooLarge as error:
            answer = Problem(kind="too_large", text=str(error))
        if longer_than(answer, MAX_MESSAGE_BYTES):
            text = f"expected a question with an answer of at most {MAX_MESSAGE_BYTES} bytes; ask for fewer at a time"
            answer = Problem(kind="too_large", text=text)
        self._answer(delivery, answer)
        self._reading.ack(delivery)

    def _refused(self, query: Query, delivery: Delivery) -> Problem | None:
        """Refuse a command that came by another way than that for commands, or from who may not give it."""
        why = None
        if isinstance(query, Command) and delivery.exchange != self._topology.command:
            why = f"expected a command by the exchange {self._topology.command}, got it by {delivery.exchange}"
        elif isinstance(query, PoolCommand):
            why = self._access.operate(delivery.user_id)
        return None if why is None else Problem(kind="forbidden", text=why)

    async def _respond(self, query: Query, user: User) -> Answer:
        match query:
            case GetRequests(ids=ids):
                return await self._requests(ids)
            case GetStates(ids=ids):
                return StateList(states=await self._in_ledger_thread(lambda: self._ledger.states(ids)))
            case ListRequests():
                views = await self._in_ledger_thread(lambda: self._ledger.list(query))
                return RequestList(requests=[self._pool.views.decorate(view) for view in views])
            case CountRequests():
                return RequestCount(number=await self._in_ledger_thread(lambda: self._ledger.count(query)))
            case AbortRequests(ids=ids, reason=reason):
                return await self._abort(ids, reason, user)
            case Reprioritise(ids=ids, priority=priority):
                return await self._each(ids, user, lambda one: partial(self._pool.reprioritise, one, priority))
            case Pause():
                await self._settled(partial(self._pool.pause, query, self._now()))
                return PauseList(pauses=self._pool.pauses())
            case Resume(kind=kind, name=name):
                await self._settled(partial(self._pool.resume, kind, name))
                return PauseList(pauses=self._pool.pauses())
            case DrainWorkers():
                return await self._drain(query)
            case ListPauses():
                return PauseList(pauses=self._pool.pauses())
            case Explain():
                return await self._explain(query)
            case GetCapabilities():
                return self._pool.views.capabilities(query, self._now().steady)
            case RetryRequest():
                return await self._retry(query, user)
            case ListWorkers():
                return WorkerList(workers=self._pool.views.workers(query))
            case RefreshWorkers(names=names):
                self._pool.refresh(names)
                self._awake.set()
                return WorkerList(workers=[])
            case ForgetWorker(name=name, user=owner):
                if not await self._settled(partial(self._pool.forget_worker, name, owner, self._now())) and not owner:
                    return Problem(kind="not_found", text=f"expected a worker's name that is a user's, got {name}")
                return WorkerList(workers=[])
            case ListArtifacts():
                artifacts = await self._in_ledger_thread(lambda: self._ledger.artifacts(query))
                found = {artifact.id for artifact in artifacts}
                return ArtifactList(artifacts=artifacts, missing=[one for one in query.ids if one not in found])
            case ImportArtifact():
                return await self._import(query)
            case GetPool():
                return self._pool.views.pool(await self._in_ledger_thread(self._ledger.counts), __version__)

    async def _requests(self, ids: Sequence[str]) -> RequestList:
        views, missing = await self._in_ledger_thread(lambda: self._ledger.view(ids))
        return RequestList(requests=[self._pool.views.decorate(view) for view in views], missing=missing)

    async def _each(self, ids: Sequence[str], user: User, ask: Callable[[str], Callable[..., None]]) -> RequestList:
        """Let the pool judge a command on each request that the user may command, and show what became of them."""
        known = await self._requests(ids)
        found: list[str] = []
        forbidden: dict[str, str] = {}
        for view in known.requests:
            why = self._access.command(user, submitter=view.submitter, group=view.request.group)
            if why is None:
                found.append(view.request.id)
            else:
                forbidden[view.request.id] = why
        await asyncio.gather(*(self._settled(ask(one)) for one in found))
        answer = await self._requests(found)
        return msgspec.structs.replace(answer, missing=known.missing, forbidden=forbidden)

    async def _abort(self, ids: Sequence[str], reason: str, user: User) -> RequestList:
        """Abort what is known; what has a full id and is not known yet is aborted when it comes."""

        def abort(one: str) -> Callable[..., None]:
            return partial(self._pool.abort, one, reason, self._now())

        answer = await self._each(ids, user, abort)
        to_come = [one for one in answer.missing if FULL_ID.fullmatch(one)]
        asks = (partial(abort(one), user=user, known=False) for one in to_come)
        results = await asyncio.gather(*(self._settled(ask) for ask in asks))
        came = [one for one, result in zip(to_come, results, strict=True) if not (result.marked or result.full)]
        text = f"expected at most {MOST_MARKS} aborts a day of requests that nobody knows from one user, got one more"
        full = {one: text for one, result in zip(to_come, results, strict=True) if result.full}
        late = await self._each(came, user, abort)
        return RequestList(
            requests=[*answer.requests, *late.requests],
            missing=[one for one in answer.missing if one not in to_come],
            forbidden={**answer.forbidden, **late.forbidden, **full},
            marked=[one for one, result in zip(to_come, results, strict=True) if result.marked],
        )

    async def _drain(self, query: DrainWorkers) -> Answer:
        if unknown := self._pool.unknown_classes(query.classes):
            text = f"expected names of capability classes, got {', '.join(unknown)}; `mqworker capabilities` lists them"
            return Problem(kind="not_found", text=text)
        names = await self._settled(partial(self._pool.drain, query, self._now()))
        workers = self._pool.views.workers(ListWorkers())
        return WorkerList(workers=[worker for worker in workers if worker.name in names])

    async def _explain(self, query: Explain) -> Answer:
        view = None
        if query.id is not None:
            known = await self._requests([query.id])
            if not known.requests:
                text = f"expected the id of a request, got {query.id}, which nobody knows"
                return Problem(kind="not_found", text=text)
            view = known.requests[0]
        request = (
            view.request
            if view is not None
            else Request(id=NOBODY, task=query.task or "", data=query.data, requires=query.requires)
        )
        bound = view is not None and not view.after and view.state not in (State.ABORTED, State.REJECTED)
        draft = self._pool.examine(request, bound=bound)
        if draft.problem is not None and view is None:
            return Problem(kind="rejected", text=draft.problem)
        return self._pool.views.explanation(draft, view)

    async def _retry(self, query: RetryRequest, user: User) -> Answer:
        known = await self._requests([query.id])
        if not known.requests:
            return Problem(kind="not_found", text=f"expected the id of a request, got {query.id}, which nobody knows")
        old = known.requests[0]
        refused = self._access.command(user, submitter=old.submitter, group=old.request.group)
        if refused is not None:
            return Problem(kind="forbidden", text=refused)
        if old.state not in FINAL:
            text = f"expected a request that has ended, got {old.request.id}, which is {old.state}"
            return Problem(kind="conflict", text=text)
        # When it had to be done is over, or nobody knows.
        anew = msgspec.structs.replace(old.request, id=query.new_id, not_before=None, expires_at=None)
        draft = self._draft(anew, user)
        artifacts = await self._artifacts([draft])
        heeds = partial(self._access.commanders, user)
        ask = partial(self._pool.submit, [draft], artifacts, self._now(), submitter=user, heeds=heeds)
        receipt = await self._settled(ask)
        result = receipt.results[0]
        if result.status in ("rejected", "conflict"):
            return Problem(kind=result.status, text=result.reason or "")
        return await self._requests([query.new_id])

    async def _import(self, query: ImportArtifact) -> Answer:
        if query.store != self._store_id:
            text = (
                f"expected bytes in the store {self._store_id}, got the store {query.store}: use the scheduler's store"
            )
            return Problem(kind="store_mismatch", text=text)
        if (size := len(encode(query.artifact))) > MAX_DESCRIBED_BYTES:
            text = (
                f"expected an artifact that is described in at most {MAX_DESCRIBED_BYTES} bytes, got {size}: put large"
                " data into files"
            )
            return Problem(kind="artifact_invalid", text=text)
        number = await self._settled(partial(self._pool.import_artifact, query.key, query.artifact, self._now()))
        if isinstance(number, ImportRefused):
            return Problem(kind="artifact_invalid", text=number.reason)
        found = await self._in_ledger_thread(lambda: self._ledger.artifacts_by_id([number]))
        return ArtifactList(artifacts=list(found.values()))

    async def _settled(self, ask: Callable[[Callable[[Any], None]], None]) -> Any:
        """Let the pool judge a command, and wait until the ledger has what it judged."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def settle(result: Any) -> None:
            if not future.done():  # who asked may be gone: the scheduler is stopping
                future.set_result(result)

        self._calls.append(partial(ask, settle))
        self._awake.set()
        return await future


def _halved(message: msgspec.Struct) -> tuple[msgspec.Struct, ...]:
    """Divide what is too long for one message; nothing: it has no parts."""
    for name, kind in (("parts", Verdict), ("tickets", Tickets), ("events", RequestEvents)):
        parts = getattr(message, name, ()) if isinstance(message, kind) else ()
        if len(parts) > 1:
            half = len(parts) // 2
            return tuple(msgspec.structs.replace(message, **{name: some}) for some in (parts[:half], parts[half:]))
    return ()


def _tell_refusal(future: asyncio.Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        logger.warning("what the broker should have was not declared again", extra={"reason": str(error)})


async def run(
    *,
    amqp_url: str,
    prefix: str,
    ledger_url: str,
    store_url: str,
    retry_delay: float,
    no_worker_after: float,
    pause_after: int,
    group_weights: Mapping[str, float],
    concurrency_limits: Mapping[str, int],
    rule: Rule,
    operators: Collection[str],
    groups: Mapping[str, Collection[str]],
    metrics_listen: str,
    offer_timeout: float = 10.0,
) -> None:
    """Run a scheduler until SIGTERM or SIGINT. On PostgreSQL it stands by as long as another one is active.

    Raises:
        MqworkerError: a door does not open: the ledger is locked, the store is not there, the broker refuses.
    """
    gc.set_threshold(*GC_THRESHOLDS)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    store = await asyncio.to_thread(Store.open, store_url, create=True)
    own = read_url(amqp_url).user
    access = Access(rule=rule, operators={*operators, *([] if own is None else [own])}, groups=groups)
    while not stopping.is_set():
        metrics = SchedulerMetrics(version=__version__)  # of this turn: a standby has no pool to show
        duty = _Duty()
        with ExitStack() as doors:
            if metrics_listen:
                server = MetricsServer(metrics_listen, registry=metrics.registry, health=duty.health)
                doors.callback(server.close)
            ledger = await _elected(ledger_url, stopping, duty)
            if ledger is None:
                return
            doors.callback(ledger.close)
            if ledger.upgraded_from is not None:
                logger.info("the ledger's schema was brought up to date", extra={"before": ledger.upgraded_from})
            scheduler = Scheduler(
                amqp_url=amqp_url,
                topology=Topology(prefix),
                ledger=ledger,
                store=store,
                metrics=metrics,
                retry_delay=retry_delay,
                offer_timeout=offer_timeout,
                group_weights=group_weights,
                concurrency_limits=concurrency_limits,
                no_worker_after=no_worker_after,
                pause_after=pause_after,
                access=access,
            )
            duty.scheduler = scheduler
            stop = asyncio.create_task(_then(stopping, scheduler.stop))
            logger.info("scheduler starts", extra={"term": ledger.term, "ledger": ledger.name, "store": store.id})
            try:
                await scheduler.run()
            except LedgerLost as error:
                logger.warning("another scheduler was elected, this one stands by", extra={"reason": str(error)})
            except LedgerUnavailable as error:
                if not stopping.is_set():
                    raise
                logger.warning("scheduler has stopped before it could begin", extra={"reason": str(error)})
                return
            else:
                logger.info("scheduler has stopped")
                return
            finally:
                stop.cancel()


class _Duty:
    """Know whether this process is the active scheduler, or a standby."""

    def __init__(self) -> None:
        self.scheduler: Scheduler | None = None
        self.waits = "for the ledger"

    def health(self) -> Health:
        """Say so; a standby that cannot reach the ledger is not well."""
        if self.scheduler is not None:
            return self.scheduler.health()
        return Health(well=self.waits == STANDS_BY, text=f"{STANDBY}: waits {self.waits}")


async def _elected(url: str, stopping: asyncio.Event, duty: _Duty) -> Ledger | None:
    """Open a ledger as soon as no other scheduler is active; None: this one was stopped before.

    Raises:
        MqworkerError: it cannot be opened, and waiting will not help.
    """
    told: type[Exception] | None = None
    while not stopping.is_set():
        try:
            return await asyncio.to_thread(Ledger.open, url)
        except (LedgerLocked, LedgerUnavailable) as error:
            if not Ledger.may_stand_by(url):
                raise
            duty.waits = STANDS_BY if isinstance(error, LedgerLocked) else str(error)
            if told is not type(error):
                logger.info("scheduler stands by", extra={"reason": str(error)})
            told = type(error)
        with suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), STANDBY_SECONDS)
    return None


async def _then(event: asyncio.Event, call: Callable[[], None]) -> None:
    await event.wait()
    call()
