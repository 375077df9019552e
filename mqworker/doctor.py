"""What is wrong here: the broker, rights on it, the scheduler, the store, the ledger, directories, tasks and tools.

Looks and tells, and changes nothing. Draws nothing.
"""

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from mqworker.amqp import Consumer, Delivery, Link, Plan
from mqworker.brokerurl import redact
from mqworker.client import Client
from mqworker.debianhost import missing_packages, why_no_unshare
from mqworker.errors import (
    BrokerRefused,
    LedgerLocked,
    MqworkerError,
    NotPublished,
    OutsideError,
    StoreUnavailable,
    Unanswered,
)
from mqworker.ledger import Ledger
from mqworker.messages import Pool
from mqworker.rights import ROLES, Role
from mqworker.store import Store
from mqworker.task import Analysis, Task
from mqworker.topology import Topology

CONNECT_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 3.0
BUILD_PACKAGES: Final = ("sbuild", "mmdebstrap", "uidmap")


@dataclass(frozen=True, kw_only=True)
class Check:
    """Say what was found, and what to do about it; a note is nothing wrong by itself."""

    state: Literal["ok", "note", "problem"]
    what: str
    finding: str
    advice: str = ""


def examine(
    *, amqp_url: str, prefix: str, store_url: str, ledger_url: str, state_directory: Path, work_directory: Path
) -> Iterator[Check]:
    """Check one thing after the other."""
    pool: Pool | None = None
    broker = _broker(amqp_url)
    yield broker
    if broker.state == "ok":
        rights = _rights(amqp_url, Topology(prefix))
        yield rights
        if rights.state == "ok":
            pool, check = _scheduler(amqp_url, prefix)
            yield check
    yield _store(store_url, pool)
    yield _ledger(ledger_url)
    yield _directory("state", state_directory)
    yield _work_directory(work_directory)
    yield from _tasks()
    yield from _tools()


def _failed(what: str, error: MqworkerError, advice: str = "") -> Check:
    return Check(state="problem", what=what, finding=str(error), advice=advice)


# ---------------------------------------------------------------- the broker and who is behind it


def _broker(url: str) -> Check:
    async def reach() -> tuple[str, str]:
        async with _up(url, lambda _epoch: Plan()) as link:
            return link.server or ("a broker", "")

    try:
        product, version = asyncio.run(reach())
    except OutsideError as error:
        return _failed("broker", error, "start RabbitMQ, or say where it is with --amqp-url or MQWORKER_AMQP_URL")
    except MqworkerError as error:
        return _failed("broker", error, "correct --amqp-url, MQWORKER_AMQP_URL or amqp_url in the settings file")
    return Check(state="ok", what="broker", finding=f"{product} {version} at {redact(url)}")


def _rights(url: str, topology: Topology) -> Check:
    """Declare what everybody declares, and send words round to a queue of our own, as events and as answers go."""

    async def round_trip() -> bool:
        key = topology.worker_event_key(f"doctor-{uuid.uuid4().hex}")
        arrived = asyncio.Event()
        own = ""

        def plan(epoch: str) -> Plan:
            nonlocal own
            queue = topology.follower_queue(epoch, ((topology.events, key),))
            own = queue.name

            def on_delivery(_delivery: Delivery) -> None:
                arrived.set()

            return Plan(
                exchanges=topology.exchanges(),
                queues=(*topology.queues(), queue),
                consumers=(Consumer(queue=queue.name, on_delivery=on_delivery, no_ack=True),),
            )

        async with _up(url, plan) as link, asyncio.timeout(CONNECT_SECONDS):
            await link.publish(exchange=topology.events, key=key, body=b"{}", kind="doctor", persistent=False)
            await arrived.wait()
            try:
                await link.publish(exchange="", key=own, body=b"{}", kind="doctor", persistent=False)
            except NotPublished:
                return False
            return True

    advice = "give the user the rights of its role, as `mqworker topology permissions` prints them"
    try:
        answers = asyncio.run(round_trip())
    except NotPublished as error:
        return _failed("rights", error, f"see whether the broker is out of memory or disk; {advice}")
    except BrokerRefused as error:
        if roles := [role for role in ROLES if role != "scheduler" and asyncio.run(_may(url, topology, role))]:
            finding = f"may do what a {' or '.join(roles)} does, and not all that a scheduler does"
            return Check(state="ok", what="rights", finding=finding)
        return _failed("rights", error, advice)
    except MqworkerError as error:
        return _failed("rights", error, advice)
    except TimeoutError:
        finding = f"a message sent to {topology.events} did not come back within {CONNECT_SECONDS:g} s"
        return Check(state="problem", what="rights", finding=finding, advice="see whether the broker raises an alarm")
    if not answers:
        finding = f"may declare, write and read {topology.prefix}.*, but not answer clients through amq.default"
        advice = "the scheduler's user needs to write to amq.default; clients and workers do not"
        return Check(state="note", what="rights", finding=finding, advice=advice)
    return Check(state="ok", what="rights", finding=f"may declare, write and read {topology.prefix}.*, and answer")


async def _may(url: str, topology: Topology, role: Role) -> bool:
    """Try what a role does, with words that reach nobody."""
    writes = {
        "worker": (topology.report, topology.outcome, topology.rejected),
        "client": (topology.submit, topology.command, topology.api),
        "observer": (topology.api,),
    }[role]

    def plan(epoch: str) -> Plan:
        listens = ((topology.events, "#"), (topology.logs, "#"))
        worker = role == "worker"
        queue = topology.worker_queue("doctor", epoch) if worker else topology.follower_queue(epoch, listens)
        return Plan(exchanges=topology.exchanges(), queues=(queue,), uses=writes)

    try:
        async with _up(url, plan) as link:
            for exchange in writes:
                key = f"doctor-{uuid.uuid4().hex}"
                await link.publish(exchange=exchange, key=key, body=b"{}", kind="doctor", mandatory=False)
    except BrokerRefused:
        return False
    return True


def _scheduler(url: str, prefix: str) -> tuple[Pool | None, Check]:
    try:
        with Client(url, prefix=prefix, timeout=ANSWER_SECONDS) as client:
            pool = client.pool()
    except Unanswered:
        finding = f"none answers under the prefix {prefix!r}"
        return None, Check(state="note", what="scheduler", finding=finding, advice="start one: `mqworker scheduler`")
    except MqworkerError as error:
        return None, _failed("scheduler", error)
    finding = f"version {pool.version}, term {pool.term}; {pool.workers} workers in {pool.classes} classes"
    return pool, Check(state="ok", what="scheduler", finding=finding)


@contextlib.asynccontextmanager
async def _up(url: str, plan: Callable[[str], Plan]) -> AsyncIterator[Link]:
    """Hold a link that is up."""
    link = Link(url, name="mqworker doctor", plan=plan)
    running = asyncio.create_task(link.run())
    try:
        await link.wait_up(CONNECT_SECONDS)
        yield link
    finally:
        await link.close()
        await running


# ---------------------------------------------------------------- this machine's files


def _store(url: str, pool: Pool | None) -> Check:
    try:
        store = Store.open(url)
    except StoreUnavailable as error:
        if pool is None:
            advice = "the first `mqworker scheduler` makes it; give all workers and clients the same --store"
            return Check(state="note", what="store", finding=str(error), advice=advice)
        return _failed("store", error, "the scheduler has one: give this machine the same --store")
    except MqworkerError as error:
        return _failed("store", error)
    if pool is not None and pool.store != store.id:
        finding = f"{store.url} is the store {store.id}, and the scheduler has {pool.store}"
        return Check(state="problem", what="store", finding=finding, advice="give this machine the scheduler's --store")
    return Check(state="ok", what="store", finding=f"{store.url} ({store.id})")


def _ledger(url: str) -> Check:
    path = Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:///") and not path.exists():
        home = _existing(path)
        if os.access(home, os.W_OK | os.X_OK):
            return Check(state="note", what="ledger", finding=f"{path} is not there; the first scheduler makes it")
        return Check(
            state="problem",
            what="ledger",
            finding=f"{path} is not there, and {home} may not be written",
            advice="only the scheduler needs it: give that one --ledger sqlite:///PATH, or another user",
        )
    try:
        finding = Ledger.check(url)
    except LedgerLocked as error:
        return Check(state="ok", what="ledger", finding=f"in use: {error}")
    except MqworkerError as error:
        return _failed("ledger", error)
    return Check(state="ok", what="ledger", finding=f"{finding}; no scheduler uses it")


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _directory(what: str, path: Path) -> Check:
    at = path if path.exists() else _existing(path)
    if not at.is_dir() or not os.access(at, os.W_OK | os.X_OK):
        advice = f"only a worker needs it: give that one --{what}-dir, or another user"
        return Check(state="problem", what=what, finding=f"{at} may not be written", advice=advice)
    if at is path:
        return Check(state="ok", what=what, finding=str(path))
    return Check(state="ok", what=what, finding=f"{path} is not there yet; the worker makes it")


def _work_directory(path: Path) -> Check:
    """Check also that other users may pass: a build in a chroot runs as one of them."""
    check = _directory("work", path)
    closed = [
        folder for folder in (path, *path.absolute().parents) if folder.exists() and not folder.stat().st_mode & 1
    ]
    if check.state == "ok" and closed:
        finding = f"other users may not search {closed[-1]}, so builds in a chroot cannot reach {path}"
        return Check(state="problem", what="work", finding=finding, advice=f"chmod o+x {closed[-1]}, or --work-dir")
    return check


# ---------------------------------------------------------------- tasks and tools


def _tasks() -> Iterator[Check]:
    try:
        analysis = Task.analyze_worker_tasks()
    except MqworkerError as error:
        yield _failed("tasks", error)
        return
    for module, text in analysis.unimported.items():
        advice = "its tasks are not offered; correct the module or remove it"
        yield Check(state="problem", what="tasks", finding=f"{module} does not import: {text}", advice=advice)
    for task, text in analysis.failures.items():
        yield Check(state="problem", what="tasks", finding=f"{task} cannot look at this host: {text}")
    yield Check(state="ok", what="tasks", finding=", ".join(analysis.tasks))
    yield from _chroots(analysis)


def _chroots(analysis: Analysis) -> Iterator[Check]:
    if not analysis.metadata.get("sbuild:available"):
        return
    chroots = analysis.metadata.get("sbuild:chroots") or []
    if chroots:
        yield Check(state="ok", what="chroots", finding=", ".join(map(str, chroots)))
    else:
        yield Check(
            state="note",
            what="chroots",
            finding="sbuild has none, so no build comes here",
            advice="`mqworker demo --prepare-only` makes one for this suite and architecture",
        )


def _tools() -> Iterator[Check]:
    try:
        missing = missing_packages(BUILD_PACKAGES)
    except MqworkerError as error:
        yield Check(state="note", what="tools", finding=f"no Debian packages are built here: {error}")
        return
    if missing:
        finding = f"not installed: {', '.join(missing)}; only builds of Debian packages need them"
        yield Check(state="note", what="tools", finding=finding, advice=f"apt-get install {' '.join(missing)}")
    elif why := why_no_unshare():
        yield Check(state="note", what="tools", finding=f"builds in a chroot do not work here: {why}")
    else:
        yield Check(state="ok", what="tools", finding=f"{', '.join(BUILD_PACKAGES)}; user namespaces work")
