"""Every way to hurt the pool: each fault does its harm, waits, and heals; how long and whom, its own dice say."""

import os
import signal
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from random import Random

from mqworker.processes import descendants, identify
from tests.chaos.world import SUBMITTERS, WORKERS, Missed

LEASE = 5.0  # seconds; of most runs, and none is shorter
BEYOND = (7.0, 11.0)  # seconds: longer than most leases
CLIENTS = (*SUBMITTERS, "commander")


@dataclass(frozen=True)
class Kind:
    """Describe a kind of fault: who does it, what it must not meet in one round, whose recovery is looked at."""

    name: str
    do: object
    excludes: str | None = None  # no two of one round share it
    scope: str = "pool"  # "worker": what is looked at is the next grant to this worker
    needs: str | None = None  # "disks" or "standby": what has to be there


class Dice:
    """Give one fault its chances."""

    def __init__(self, rng, *, quick):
        self.rng = rng
        self.quick = quick

    def party(self, world):
        ledgers = [name for name in world.proxies if name.endswith("ledger")]
        return self.rng.choice([*WORKERS, *WORKERS, *world.scheduler_names, *world.scheduler_names, *CLIENTS, *ledgers])

    def seconds(self, low, high):
        return self.rng.uniform(low, high)


class Doing:
    """Note one fault as it goes; `harm` and `heal` are the moments that the report counts from."""

    def __init__(self, world, kind, number):
        self.world = world
        self.kind = kind
        self.number = number
        self.target = None

    def harm(self, target, **facts):
        self.target = target
        self._note("harm", **facts)

    def heal(self):
        self._note("heal")

    def wait(self, seconds):
        self.world.over.wait(seconds)

    def _note(self, what, **facts):
        self.world.record.note(
            what, kind=self.kind.name, number=self.number, target=self.target, scope=self.kind.scope, **facts
        )


# ---------------------------------------------------------------- processes


@contextmanager
def _worker_alone(world, dice):
    """Choose a worker that nobody else freezes or kills.

    Whose agent and slot are frozen at once, and its children not, has nobody left who could end them: that is no host.
    """
    for worker in dice.rng.sample([*WORKERS], len(WORKERS)):
        if world.taken[worker].acquire(blocking=False):
            try:
                yield worker
            finally:
                world.taken[worker].release()
            return
    raise Missed("no worker is free")


def _target_slot(world, worker, dice):
    slots = world.slots(worker)
    if not slots:
        raise Missed(f"{worker} has no slot")
    return dice.rng.choice(slots)


def _signal(process, number):
    with suppress(ProcessLookupError):
        if identify(process.pid) == process:
            os.kill(process.pid, number)


def kill_slot(world, dice, doing):
    with _worker_alone(world, dice) as worker:
        slot = _target_slot(world, worker, dice)
        doing.harm(worker, pid=slot.pid)
        _signal(slot, signal.SIGKILL)
        doing.heal()


def _freeze_slot(world, dice, doing, low, high):
    with _worker_alone(world, dice) as worker:
        slot = _target_slot(world, worker, dice)
        doing.harm(worker, pids=[slot.pid])
        _signal(slot, signal.SIGSTOP)
        doing.wait(dice.seconds(low, high))
        _signal(slot, signal.SIGCONT)
        doing.heal()


def freeze_slot_briefly(world, dice, doing):
    _freeze_slot(world, dice, doing, 0.3, 3)


def freeze_slot_long(world, dice, doing):
    _freeze_slot(world, dice, doing, *BEYOND)


def _kill_party(world, doing, name):
    _end_party(world, doing, name, signal.SIGKILL)


def _end_party(world, doing, name, number):
    """Signal a party, and wait until the next one has been started."""
    party = world.party(name)
    before = party.starts
    if not party.signal(number, doing.kind.name):
        raise Missed(f"{name} is down")
    doing.harm(name)
    deadline = time.monotonic() + 60
    while party.starts == before and time.monotonic() < deadline and not world.over.is_set():
        world.over.wait(0.05)
    doing.heal()


@contextmanager
def _frozen(world, name):
    party = world.party(name)
    process = party.process
    if process is None or not party.signal(signal.SIGSTOP, ""):
        raise Missed(f"{name} is down")
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def kill_agent(world, dice, doing):
    with _worker_alone(world, dice) as worker:
        _kill_party(world, doing, worker)


def _freeze_party(world, doing, name, seconds):
    with _frozen(world, name):
        doing.harm(name, seconds=seconds)
        doing.wait(seconds)
    doing.heal()


def freeze_agent_briefly(world, dice, doing):
    with _worker_alone(world, dice) as worker:
        _freeze_party(world, doing, worker, dice.seconds(0.3, 3))


def freeze_agent_long(world, dice, doing):
    with _worker_alone(world, dice) as worker:
        _freeze_party(world, doing, worker, dice.seconds(*BEYOND))


def freeze_worker(world, dice, doing):
    """Freeze an agent with all that stems from it, as a host is that stands still; the agent wakes first.

    Were all woken at once, a run beyond its lease would live on for the moment until its slot has killed it.
    """
    with _worker_alone(world, dice) as worker:
        with _frozen(world, worker):
            below = descendants(world.party(worker).process.pid)
            for process in below:
                _signal(process, signal.SIGSTOP)
            doing.harm(worker, pids=[process.pid for process in below])
            doing.wait(dice.seconds(*BEYOND))
        try:
            doing.wait(1.0)
        finally:
            for process in below:
                _signal(process, signal.SIGCONT)
        doing.heal()


def stop_agent(world, dice, doing):
    with _worker_alone(world, dice) as worker:
        _end_party(world, doing, worker, signal.SIGTERM)


def kill_scheduler(world, _dice, doing):
    _kill_party(world, doing, world.active())


def stop_scheduler(world, _dice, doing):
    _end_party(world, doing, world.active(), signal.SIGTERM)


def freeze_scheduler_briefly(world, dice, doing):
    _freeze_party(world, doing, world.active(), dice.seconds(0.3, 3))


def freeze_scheduler_long(world, dice, doing):
    _freeze_party(world, doing, world.active(), dice.seconds(7, 16) if world.cluster else dice.seconds(*BEYOND))


def kill_standby(world, _dice, doing):
    _kill_party(world, doing, world.standby())


def freeze_standby(world, dice, doing):
    _freeze_party(world, doing, world.standby(), dice.seconds(*BEYOND))


def kill_client(world, dice, doing):
    _kill_party(world, doing, dice.rng.choice(CLIENTS))


# ---------------------------------------------------------------- the broker


def kill_broker(world, dice, doing):
    if world.node.pid is None:
        raise Missed("the broker is down")
    world.kill_broker()
    doing.harm("broker")
    try:
        doing.wait(dice.seconds(0, 6))
    finally:
        world.start_broker()
    doing.heal()


def restart_broker(world, dice, doing):
    if world.node.pid is None:
        raise Missed("the broker is down")
    doing.harm("broker")
    try:
        world.stop_broker()
        doing.wait(dice.seconds(0, 3))
    finally:
        world.start_broker()
    doing.heal()


def freeze_broker(world, dice, doing):
    pid = world.node.pid
    if pid is None:
        raise Missed("the broker is down")
    doing.harm("broker")
    os.kill(pid, signal.SIGSTOP)
    try:
        doing.wait(dice.seconds(1, 8))
    finally:
        os.kill(pid, signal.SIGCONT)
    doing.heal()


def _delete(world, doing, name):
    doing.harm(name)
    world.delete_queue(name)
    if name in world.quorum_queues:
        world.await_quorum_queues()
    doing.heal()


def delete_submit_queue(world, _dice, doing):
    _delete(world, doing, world.topology.submit_queue().name)


def delete_outcome_queue(world, _dice, doing):
    _delete(world, doing, world.topology.outcome_queue().name)


def delete_api_queue(world, _dice, doing):
    _delete(world, doing, world.topology.api_queue().name)


def _delete_one(world, dice, doing, beginning):
    names = sorted(name for name in world.queues() if name.startswith(beginning))
    if not names:
        raise Missed(f"there is no queue {beginning}...")
    _delete(world, doing, dice.rng.choice(names))


def delete_class_queue(world, dice, doing):
    _delete_one(world, dice, doing, f"{world.topology.work}.")


def delete_worker_queue(world, dice, doing):
    _delete_one(world, dice, doing, f"{world.prefix}.worker.")


def delete_report_queue(world, dice, doing):
    _delete_one(world, dice, doing, f"{world.topology.report}.")


def close_connection(world, dice, doing):
    chosen = dice.rng.random()
    doing.harm("connection")
    world.close_connection(chosen)
    doing.heal()


def _alarm(world, dice, doing, on, off):
    doing.harm("broker")
    try:
        world.ctl(*on)
        doing.wait(dice.seconds(3, 9))
    finally:
        if world.node.pid is not None:
            world.ctl(*off)
    doing.heal()


def memory_alarm(world, dice, doing):
    _alarm(world, dice, doing, ("set_vm_memory_high_watermark", "0.0001"), ("set_vm_memory_high_watermark", "0.4"))


def disk_alarm(world, dice, doing):
    _alarm(world, dice, doing, ("set_disk_free_limit", "900000GB"), ("set_disk_free_limit", "50MB"))


# ---------------------------------------------------------------- the network


def _network(world, dice, doing, *, seconds, spoil, mend):
    """Spoil the network of one party for some time."""
    name = dice.party(world)
    proxy = world.proxies[name]
    doing.harm(name)
    spoil(proxy)
    try:
        doing.wait(dice.seconds(*seconds))
    finally:
        mend(proxy)
    doing.heal()


def cut_network(world, dice, doing):
    def cut(proxy):
        proxy.refuse()
        proxy.cut()

    _network(world, dice, doing, seconds=(0.2, 8), spoil=cut, mend=lambda proxy: proxy.refuse(False))


def stall_network(world, dice, doing):
    """Hold every byte; what was held arrives when it is over, late."""
    seconds = BEYOND if dice.quick else (2, 20)
    _network(world, dice, doing, seconds=seconds, spoil=lambda proxy: proxy.hold(), mend=lambda proxy: proxy.release())


def leave_half_open(world, dice, doing):
    """Lose every byte of the connections that are open, without a word to their ends."""

    def lose(proxy):
        proxy.deafen()
        proxy.half_open()

    def mend(proxy):
        proxy.deafen(False)
        proxy.cut()  # what the kernel does at last with a connection that nobody answers

    _network(world, dice, doing, seconds=BEYOND if dice.quick else (2, 25), spoil=lose, mend=mend)


def slow_network(world, dice, doing):
    def slow(proxy):
        proxy.slow(delay=dice.seconds(0.05, 0.5), piece=dice.rng.choice([64, 512, 65536]))

    _network(world, dice, doing, seconds=(2, 8), spoil=slow, mend=lambda proxy: proxy.slow())


# ---------------------------------------------------------------- disks and the ledger


def _fill(world, dice, doing, what):
    world.fill(what)
    doing.harm(what)
    try:
        doing.wait(dice.seconds(2, 7))
    finally:
        world.unfill(what)
    doing.heal()


def fill_store(world, dice, doing):
    _fill(world, dice, doing, "store")


def fill_spool(world, dice, doing):
    _fill(world, dice, doing, "state")


def fill_ledger(world, dice, doing):
    try:
        _fill(world, dice, doing, "ledger")
    finally:
        world.start_database()  # without room for its log a database server ends


def kill_database(world, dice, doing):
    doing.harm("database")
    world.kill_database()
    try:
        doing.wait(dice.seconds(0, 5))
    finally:
        world.start_database()
    doing.heal()


def freeze_session(world, dice, doing):
    """Freeze the database's process that serves the active scheduler."""
    pid = world.audit.session()
    if pid is None:
        raise Missed("the scheduler has no session")
    process = identify(pid)
    doing.harm("ledger", pid=pid)
    _signal(process, signal.SIGSTOP)
    try:
        doing.wait(dice.seconds(9, 12) if dice.quick else 40.0)
    finally:
        _signal(process, signal.SIGCONT)
    doing.heal()


def stall_ledger(world, dice, doing):
    def over():
        doing.harm("ledger")
        doing.wait(dice.seconds(9, 12) if dice.quick else 40.0)

    world.audit.stall(over)
    doing.heal()


KINDS = {
    kind.name: kind
    for kind in (
        Kind("slot killed", kill_slot, scope="worker"),
        Kind("slot frozen briefly", freeze_slot_briefly, scope="worker"),
        Kind("slot frozen beyond the lease", freeze_slot_long, scope="worker"),
        Kind("agent killed", kill_agent, scope="worker"),
        Kind("agent stopped in order", stop_agent, scope="worker"),
        Kind("agent frozen briefly", freeze_agent_briefly, scope="worker"),
        Kind("agent frozen beyond the lease", freeze_agent_long, scope="worker"),
        Kind("worker frozen as a whole beyond the lease", freeze_worker, scope="worker"),
        Kind("scheduler killed", kill_scheduler),
        Kind("scheduler stopped in order", stop_scheduler),
        Kind("scheduler frozen briefly", freeze_scheduler_briefly),
        Kind("scheduler frozen beyond the lease", freeze_scheduler_long),
        Kind("standby killed", kill_standby, needs="standby"),
        Kind("standby frozen beyond the lease", freeze_standby, needs="standby"),
        Kind("client killed", kill_client),
        Kind("broker killed", kill_broker, excludes="broker"),
        Kind("broker restarted in order", restart_broker, excludes="broker"),
        Kind("broker frozen", freeze_broker, excludes="broker"),
        Kind("submit queue deleted", delete_submit_queue, excludes="broker"),
        Kind("outcome queue deleted", delete_outcome_queue, excludes="broker"),
        Kind("api queue deleted", delete_api_queue, excludes="broker"),
        Kind("class queue deleted", delete_class_queue, excludes="broker"),
        Kind("worker queue deleted", delete_worker_queue, excludes="broker"),
        Kind("report queue deleted", delete_report_queue, excludes="broker"),
        Kind("connection closed", close_connection, excludes="broker"),
        Kind("memory alarm", memory_alarm, excludes="broker"),
        Kind("disk alarm", disk_alarm, excludes="broker"),
        Kind("network cut", cut_network, excludes="network"),
        Kind("network stalled", stall_network, excludes="network"),
        Kind("network half-open", leave_half_open, excludes="network"),
        Kind("network slow", slow_network, excludes="network"),
        Kind("store's disk full", fill_store, needs="disks"),
        Kind("spool's disk full", fill_spool, needs="disks"),
        Kind("ledger's disk full", fill_ledger, excludes="ledger", needs="disks"),
        Kind("ledger stalled", stall_ledger, excludes="ledger"),
        Kind("database killed", kill_database, excludes="ledger", needs="standby"),
        Kind("database's session frozen", freeze_session, excludes="ledger", needs="standby"),
    )
}


def kinds_here(world):
    """Return the kinds of fault that can be done here, and the names of those that cannot."""
    have = {"disks": world.mounted, "standby": len(world.scheduler_names) > 1, None: True}
    return [kind for kind in KINDS.values() if have[kind.needs]], [k.name for k in KINDS.values() if not have[k.needs]]


def plan(kinds, times, rng, *, sizes=(1, 2, 3, 3)):
    """Return rounds of so many faults, each kind so many times, in random order; some faults may be alone."""
    left = [kind for kind in kinds for _ in range(times)]
    rng.shuffle(left)
    rounds = []
    while left:
        wanted = rng.choice(sizes)
        chosen = []
        for kind in [*left]:
            if len(chosen) < wanted and not any(kind.excludes and kind.excludes == other.excludes for other in chosen):
                chosen.append(kind)
                left.remove(kind)
        rounds.append(chosen)
    return rounds


class Round:
    """Do some faults at once, each in a thread of its own, and wait for all of them."""

    def __init__(self, world, rng, *, quick):
        self._world = world
        self._rng = rng
        self._quick = quick
        self._number = 0

    def do(self, kinds, tick):
        """Do them, ticking meanwhile, and return the kinds that could not be done now."""
        missed = []
        threads = []
        for kind in kinds:
            self._number += 1
            seed = self._rng.getrandbits(64)
            delay = self._rng.uniform(0, 3) if len(kinds) > 1 else 0
            thread = threading.Thread(target=self._one, args=(kind, self._number, seed, delay, missed), name=kind.name)
            thread.start()
            threads.append(thread)
        while any(thread.is_alive() for thread in threads):
            tick()
            self._world.over.wait(0.25)
        return missed

    def _one(self, kind, number, seed, delay, missed):
        doing = Doing(self._world, kind, number)
        self._world.over.wait(delay)
        if self._world.over.is_set():
            return
        try:
            kind.do(self._world, Dice(Random(seed), quick=self._quick), doing)
        except Exception as error:  # noqa: BLE001  # a fault that fails to be done is not the pool's
            missed.append(kind)
            self._world.record.note(
                "missed", kind=kind.name, number=number, why=f"{type(error).__name__}: {error}"[:300]
            )
