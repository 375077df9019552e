"""Carry out a scenario: start and end processes, do what happens, and let the check look on."""

import asyncio
import logging
import random
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path

import msgspec

from mqworker import dispatch
from mqworker.access import Access
from mqworker.amqp import Plan
from mqworker.errors import LedgerUnavailable
from mqworker.ledger import Ledger
from mqworker.messages import AbortRequests, Command, Receipt, RequestList, RetryRequest, Submit, decode, encode, tag_of
from mqworker.pool import Moment
from mqworker.scheduler import Scheduler
from mqworker.task import load_tasks
from mqworker.topology import Topology
from tests.sim import programs
from tests.sim.broker import REPLY, Broker, Link
from tests.sim.check import FINAL, Check
from tests.sim.host import SILENT, STORE, Host, conduct_of
from tests.sim.loop import NOBODY, START, WALL, Loop, Process
from tests.sim.scenario import SETTLE

LOOK = 0.05  # seconds between two looks for what stays as it is
LONGEST = 3000.0  # virtual seconds behind the last fault in which all must come to an end
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108  # files that no disk slows down
TOPOLOGY = Topology()
ORDINARY = ("join", "submit", "abort", "metadata", "command")  # what a healthy pool knows
HEADS = (dispatch.LEAST_HEADS, dispatch.MOST_HEADS)


class Stored:
    id = STORE


class World:
    """One pool, from its first moment to its last."""

    def __init__(self, scenario, *, traced=False, directory=MEMORY):
        self.scenario = scenario
        self.trace = [] if traced else None
        self._chances = {}
        self.loop = Loop(self._delay)
        self.loop.complain = self._complained
        self.check = Check(self)
        self.broker = Broker(self.loop, scenario.seed, self.check)
        self.hosts = {spec.name: Host(self, spec) for spec in scenario.specs}
        self.client = Client(self)
        self.scheduler = None  # its process
        self.quiet_from = self.loop.now + 2.0
        self.calm = True  # nothing has ever gone wrong
        self._processes = []
        self._ledger = None
        self._ledger_away = False
        self._scheduler_wall = 0.0
        self._schedulers = 0
        self._upgrades = 1
        self._directory = Path(tempfile.mkdtemp(prefix="mqworker-sim-", dir=directory))

    # ------------------------------------------------------------ what all ask

    def chance(self, name):
        """Return a source of chance of its own, so that one thing less leaves the others alone."""
        known = self._chances.get(name)
        if known is None:
            known = self._chances[name] = random.Random(f"{self.scenario.seed} {name}")
        return known

    def conduct(self, request, attempt):
        return conduct_of(self.scenario.seed, request, attempt, self.scenario.slow, quick=self.scenario.quick)

    def wall(self):
        return WALL + self.loop.now

    def scheduler_wall(self):
        return self.wall() + self._scheduler_wall

    def clock_steps(self):
        """Say whether the scheduler's clock on the wall jumps in this scenario."""
        return any(one.kind == "wall" and one.given["who"] == "scheduler" for one in self.scenario.happenings)

    def note(self, who, text):
        if self.trace is not None and not self.loop.burying:
            self.trace.append(f"{self.loop.now - START:9.3f}  {who:12} {text}")

    def _delay(self, _executor):
        chance = self.chance("threads")
        return chance.uniform(0.0002, 0.003), chance.uniform(0.0001, 0.001)

    # ------------------------------------------------------------ running

    def run(self):
        """Carry out the scenario; return the promise that was broken, if any."""
        load_tasks()
        programs.install(self.scenario.sources, self.scenario.hidden)
        dispatch.LEAST_HEADS, dispatch.MOST_HEADS = self.scenario.heads or HEADS
        asyncio.events._set_running_loop(self.loop)
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            self._prepare()
            for happening in self.scenario.happenings:
                self.loop.call_at(START + happening.at, self._happen, happening, context=NOBODY)
            self.loop.run(START + self.scenario.until)
            until = self.quiet_from + LONGEST
            while self.check.violation is None and self.loop.now < until and not self.check.settled_down():
                self.loop.run(self.loop.now + 10.0)
            if self.check.violation is None:
                self.check.last()
        finally:
            try:
                self.loop.bury([*self._processes])
                if self._ledger is not None:
                    self._ledger.close()
                self.check.close()
            finally:
                logging.disable(level)
                dispatch.LEAST_HEADS, dispatch.MOST_HEADS = HEADS
                asyncio.events._set_running_loop(None)
                shutil.rmtree(self._directory)
        return self.check.violation

    def _prepare(self):
        path = self._directory / "ledger.db"
        path.write_bytes(_empty_ledger())
        self.check.open(path)
        self._start_scheduler()
        self.client.process = self._start("client", self.client.main)
        self.loop.call_later(LOOK, self._look, context=NOBODY)

    def _look(self):
        self.check.look()
        self.loop.call_later(LOOK, self._look, context=NOBODY)

    def _start(self, name, main):
        process = Process(name)
        self._processes.append(process)
        process.main = process.context.run(self.loop.create_task, main())
        process.main.add_done_callback(partial(self._ended, process), context=NOBODY)
        return process

    def _ended(self, process, task):
        process.dead = True
        for link in process.links:
            link.forget()
        if self.loop.burying or task.cancelled():
            return
        self.note(process.name, "has ended")
        if task.exception() is not None:
            self.check.fail("process", f"{process.name} ended with {task.exception()!r}")

    def _complained(self, context):
        error = context.get("exception")
        self.check.fail("process", f"{context.get('message')}: {error!r}")

    # ------------------------------------------------------------ processes

    def _start_scheduler(self):
        if self.scheduler is None or self.scheduler.dead:
            self._schedulers += 1
            self.scheduler = self._start(f"scheduler{self._schedulers}", self._scheduler_main)

    async def _scheduler_main(self):
        if self._ledger is not None:
            self._ledger.close()
        ledger = self._ledger = Ledger.open(f"sqlite:///{self._directory / 'ledger.db'}")
        self.check.opened(ledger.term)
        process = self.scheduler
        process.scheduler = Scheduler(
            amqp_url="",
            topology=TOPOLOGY,
            ledger=Watched(self, ledger),
            store=Stored,
            metrics=SILENT,
            retry_delay=self.scenario.retry_delay,
            offer_timeout=self.scenario.offer_timeout,
            no_worker_after=300.0,
            pause_after=3,
            group_weights=self.scenario.weights,
            concurrency_limits=self.scenario.limits,
            access=Access(operators={None}),  # this broker names nobody: all is one user's
            link=lambda url, **given: Link(self.broker, url, **given),
            clock=lambda: Moment(steady=self.loop.now + 12345.0, wall=self.scheduler_wall()),
        )
        await process.scheduler.run()

    def _start_worker(self, host):
        if host.process is None or host.process.dead:
            self.check.tickets.pop(host.name, None)
            host.process = self._start(host.name, host.main)

    def _kill(self, process):
        if process is None or process.dead:
            return
        process.dead = True
        for link in process.links:
            link.forget()
        host = self.hosts.get(process.name)
        if host is not None:
            host.died()
        elif process is self.scheduler:
            self._ledger.close()
            self._ledger = None

    def _freeze(self, process, seconds):
        if process is None or process.dead or process.frozen:
            return
        process.frozen = True
        self._later(seconds, self._thaw, process)
        for link in process.links:
            notices = self.chance("heartbeats").uniform(15, 29)
            if notices < seconds and link.connection is not None:
                self._later(notices, self.broker.drop, link.connection, "no heartbeat")

    def _thaw(self, process):
        if not process.dead:
            self.note(process.name, "thaws")
            self.loop.thaw(process)

    def _later(self, seconds, call, *args):
        self.loop.call_later(seconds, call, *args, context=NOBODY)

    # ------------------------------------------------------------ what happens

    def _happen(self, happening):
        self.note("WORLD", str(happening))
        given = dict(happening.given)
        seconds = given.get("seconds", 0.0)
        if happening.kind not in ORDINARY:
            self.calm = False
            self.quiet_from = max(self.quiet_from, self.loop.now + seconds + SETTLE)
        host = self.hosts.get(given.get("worker"))
        match happening.kind:
            case "join":
                self._start_worker(host)
            case "submit":
                self.client.submit(given["requests"])
            case "abort":
                self.check.aborts.add(given["request"])
                self.client.abort(given["request"])
            case "command":
                self.client.command(given["query"])
            case "metadata":
                host.metadata = given["metadata"]
                if self._runs(host):
                    host.process.context.run(host.worker.refresh)
            case "crash-worker":
                self._kill(host.process)
                self._later(seconds, self._start_worker, host)
            case "stop-worker":
                self._stop_worker(host, seconds, twice=given["twice"])
            case "freeze-worker":
                self._freeze(host.process, seconds)
            case "crash-scheduler":
                self._kill(self.scheduler)
                self._later(seconds, self._start_scheduler)
            case "stop-scheduler":
                self._stop_scheduler(seconds)
            case "freeze-scheduler":
                self._freeze(self.scheduler, seconds)
            case "crash-broker":
                if self.broker.running:
                    self.broker.crash()
                    self._later(seconds, setattr, self.broker, "running", True)
            case "alarm":
                if self.broker.running and not self.broker.blocked:
                    self.broker.block(True)
                    self._later(seconds, self._end_alarm)
            case "ledger":
                self._ledger_away = True
                self._later(seconds, setattr, self, "_ledger_away", False)
            case "cut":
                self._cut(given["who"], given["link"], given["here"], given["there"])
            case "lag":
                process = self._process(given["who"])
                if process is not None:
                    self.broker.lags[process.name] = given["lag"]
                    self._later(seconds, self.broker.lags.pop, process.name, None)
            case "lose-tickets":
                self.broker.losing = given["share"]
                self._later(seconds, setattr, self.broker, "losing", 0.0)
            case "deny":
                host.deny = given["deny"]
            case "upgrade":
                self._upgrade(given["sources"], seconds)
            case "late-words":
                self.broker.late[self.scheduler.name] = given["lag"]  # it will not live long enough to end that
            case "echo":
                self.broker.echo = given["share"]
                self._later(seconds, setattr, self.broker, "echo", 0.0)
            case "lose-queue":
                if host.worker is not None and host.worker._agent.consuming is not None:
                    self.broker.lose_queue(host.worker._agent.consuming, down=given["down"])
            case "disk":
                host.disk_full = True
                self._later(seconds, setattr, host, "disk_full", False)
            case "wall":
                if given["who"] == "scheduler":
                    self._scheduler_wall += given["step"]
                else:
                    self.hosts[given["who"]].wall_offset += given["step"]

    def _upgrade(self, sources, seconds):
        """Change the code of tasks, with everybody who has loaded it."""
        self._kill(self.scheduler)
        for host in self.hosts.values():
            if host.process is not None:
                self._kill(host.process)
                self._later(seconds, self._start_worker, host)
        self._later(seconds, self._start_scheduler)
        self._upgrades += 1
        programs.install(sources, self.scenario.hidden, version=self._upgrades)
        self.check.upgraded()

    @staticmethod
    def _runs(host):
        return host.process is not None and not host.process.dead and host.worker is not None

    def _process(self, who):
        return self.scheduler if who == "scheduler" else self.hosts[who].process

    def _end_alarm(self):
        if self.broker.blocked:
            self.broker.block(False)

    def _stop_worker(self, host, seconds, *, twice):
        if not self._runs(host):
            return
        host.draining = True
        host.process.context.run(host.worker.signalled)
        if twice:
            self._later(0.3, self._signal, host, host.process)
        self.quiet_from = max(self.quiet_from, self.loop.now + SETTLE + 60)
        self._await_end(host.process, seconds, partial(self._start_worker, host))

    def _signal(self, host, process):
        if host.process is process and self._runs(host):
            process.context.run(host.worker.signalled)

    def _stop_scheduler(self, seconds):
        if self.scheduler.dead:
            return
        scheduler = getattr(self.scheduler, "scheduler", None)
        if scheduler is not None:
            self.scheduler.context.run(scheduler.stop)
        self._await_end(self.scheduler, seconds, self._start_scheduler)

    def _await_end(self, process, seconds, start):
        """Start anew when a process has ended, but not before some time has passed."""
        if process.dead and seconds <= 0:
            start()
        else:
            self._later(0.5, self._await_end, process, seconds - 0.5, start)

    def _cut(self, who, which, here, there):
        """Let nothing pass any more; each end finds out in its own time."""
        process = self._process(who)
        if process is None or process.dead:
            return
        for link in process.links:
            connection = link.connection
            if link.short == which and connection is not None and connection.open_here:
                connection.cut = True
                self.quiet_from = max(self.quiet_from, self.loop.now + max(here, there) + SETTLE)
                self.loop.call_later(here, connection.lost, "no heartbeat", context=process.context)
                self._later(there, self.broker.drop, connection, "no heartbeat")


class Watched:
    """The product's own ledger, looked at with each commit."""

    def __init__(self, world, ledger):
        self._world = world
        self._ledger = ledger
        self._asked = (None, 0.0)  # the newest set, and when it first came

    def __getattr__(self, name):
        return getattr(self._ledger, name)

    def commit(self, writes):
        if writes is not self._asked[0]:
            self._asked = (writes, self._world.loop.now)
        if self._world._ledger_away:
            raise LedgerUnavailable("the disk is full")
        results = self._ledger.commit(writes)
        self._world.check.committed(writes, results, self._asked[1])
        return results


class Client:
    """Submit, and submit again until the receipt comes."""

    def __init__(self, world):
        self._world = world
        self.process = None
        self.waiting = {}  # id to request, until it is receipted
        self.accepted = set()
        self._aborts = []
        self._commands = []  # each is said until it is answered; then the next
        self._said = 0
        self._link = None

    async def main(self):
        self._link = Link(
            self._world.broker,
            "",
            name="client all",
            plan=lambda _epoch: Plan(exchanges=TOPOLOGY.exchanges(), queues=TOPOLOGY.queues(), replies=self._replied),
            on_up=lambda _epoch: self._again(),
        )
        task = asyncio.get_running_loop().create_task(self._link.run())
        while not task.done():
            await asyncio.sleep(3.0)
            self._again()

    def submit(self, requests):
        for request in requests:
            self._world.check.requests[request.id] = request
            self.waiting[request.id] = request
        self.process.context.run(self._send, requests)

    def abort(self, request):
        self._aborts.append(request)
        self.process.context.run(self._again, only_aborts=True)

    def command(self, query):
        self._commands.append(query)
        if isinstance(query, RetryRequest) and query.id in self._world.check.requests:
            old = self._world.check.requests[query.id]
            anew = msgspec.structs.replace(old, id=query.new_id, not_before=None, expires_at=None)
            self._world.check.requests[query.new_id] = anew
        if len(self._commands) == 1:
            self.process.context.run(self._command)

    def _command(self):
        if self._commands and self._link is not None and self._link.epoch is not None:
            query = self._commands[0]
            self._ask(_way(query), query, tag_of(query), f"command {self._said}")

    def _again(self, *, only_aborts=False):
        if self._link is None or self._link.epoch is None:
            return
        if not only_aborts:
            self._command()
        if self.waiting and not only_aborts:
            self._send(list(self.waiting.values()))
        if self._aborts:
            self._ask(TOPOLOGY.command, AbortRequests(ids=self._aborts, reason="not wanted any more"), "abort_requests")

    def _send(self, requests):
        if self._link is not None and self._link.epoch is not None:
            self._ask(TOPOLOGY.submit, Submit(requests=requests), "submit")

    def _ask(self, exchange, message, kind, correlation_id=None):
        self._link.publish(
            exchange=exchange,
            key=exchange,
            body=encode(message),
            kind=kind,
            correlation_id=correlation_id,
            reply_to=REPLY + self._link.epoch,
        )

    def _replied(self, message):
        if message.correlation_id is not None:
            if message.correlation_id == f"command {self._said}":
                self._world.note("client", f"{message.kind} answers {self._commands.pop(0)}")
                self._said += 1
                self._command()
            return
        if message.kind == "receipt":
            receipt = decode(message.body, Receipt)
            self._world.check.receipted(receipt)
            for one in receipt.results:
                self.waiting.pop(one.id, None)
                self.accepted.add(one.id)
        elif message.kind == "request_list":
            for view in decode(message.body, RequestList).requests:
                if view.request.id in self._aborts:
                    self._aborts.remove(view.request.id)
                    if view.state not in FINAL and view.abort is None:
                        self._world.check.fail("P3", f"the abort of {view.request.id} has left it {view.state}")


def _way(query):
    return TOPOLOGY.command if isinstance(query, Command) else TOPOLOGY.api


@cache
def _empty_ledger():
    """Make a ledger to copy: its tables take longer than a run's."""
    with tempfile.TemporaryDirectory(prefix="mqworker-sim-", dir=MEMORY) as directory:
        path = Path(directory) / "empty.db"
        Ledger.open(f"sqlite:///{path}").close()
        return path.read_bytes()
