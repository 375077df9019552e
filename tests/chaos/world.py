"""Everything that burns: a private broker, and schedulers, workers and clients as processes of their own.

Each process reaches the broker by a proxy of its own, and is started again when it dies.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import HTTPBasicAuthHandler, HTTPPasswordMgrWithDefaultRealm, Request, build_opener

from mqworker.privatenode import PrivateNode
from mqworker.processes import identify
from mqworker.store import Store
from mqworker.topology import Topology
from tests.chaos.audit import Audit
from tests.chaos.record import Record
from tests.proxy import Proxy

ROOT = Path(__file__).resolve().parents[2]
WORKERS = {"w0": ["left"], "w1": ["left"], "w2": ["right"], "w3": ["right"]}  # name to tags
SLOTS = 3
SUBMITTERS = ("s0", "s1")
POLL = 0.05  # seconds
TMPFS = {"ledger": "512m", "store": "96m", "state": "24m"}  # what the disks hold that can be full
MARK = "MQWORKER_TASK_CHAOS"  # in the environment of everything that stems from a pool; tasks may read it
YOUNG_QUEUE = 4.0  # seconds; a quorum queue younger than about one does not survive a kill of its broker


class Missed(Exception):
    """Say that a fault could not be done now, since another was in its way."""


class Party:
    """A process that is started again when it dies."""

    def __init__(self, name, command, environment, log):
        self.name = name
        self.command = command
        self.environment = environment
        self.log = log
        self.process = None
        self.wanted = False
        self.ends = False  # it comes to an end of its own, with exit code 0
        self.finished = False
        self.due = 0.0  # when it is to be started, on the monotonic clock
        self.started = 0.0
        self.starts = 0
        self.by_us = None  # what we have done to it that may end it
        self.restart_after = 0.3

    @property
    def pid(self):
        return self.process.pid if self.process is not None and self.process.poll() is None else None

    def signal(self, number, why):
        """Send a signal; False if there is nobody to get it."""
        if self.process is None or self.process.poll() is not None:
            return False
        if number in {signal.SIGKILL, signal.SIGTERM}:
            self.by_us = why
        self.process.send_signal(number)
        return True


class Supervisor:
    """Start parties, and start them again; in one thread that outlives them, for the kernel ends them with it."""

    def __init__(self, record, rng):
        self.parties = {}
        self._record = record
        self._rng = rng
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self):
        self._thread.start()

    def add(self, party):
        self.parties[party.name] = party
        party.wanted = True

    def stop(self):
        self._over.set()
        self._thread.join()

    def _run(self):
        while not self._over.wait(POLL):
            for party in [*self.parties.values()]:
                self._look_after(party)

    def _look_after(self, party):
        if party.process is not None:
            code = party.process.poll()
            if code is None:
                return
            self._record.note("ended", party=party.name, pid=party.process.pid, exit=code, by_us=party.by_us)
            party.process = None
            party.by_us = None
            if party.ends and code == 0:
                party.wanted, party.finished = False, True
            party.due = time.monotonic() + party.restart_after * self._rng.uniform(0.2, 2)
        if party.wanted and time.monotonic() >= party.due:
            with party.log.open("ab") as log:
                party.process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-P", "-m", *party.command],
                    env=party.environment,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            party.starts += 1
            party.started = time.monotonic()
            self._record.note("started", party=party.name, pid=party.process.pid)


class World:
    """Hold the pool, its broker and the ways to hurt them; a context manager."""

    def __init__(self, directory, *, rng, ledger="sqlite"):
        self.directory = directory
        self.rng = rng
        self.kind = ledger
        self.over = threading.Event()  # everything that waits, stops waiting
        self.prefix = "fire"
        self.topology = Topology(self.prefix)
        self.quorum_queues = {queue.name for queue in self.topology.queues()}
        self.box = directory / "box"
        self.mounted = False
        self._stack = ExitStack()
        self._node_thread = ThreadPoolExecutor(1, thread_name_prefix="node")  # outlives the node that it starts
        self._quorum_deleted = 0.0
        self.node = None
        self.cluster = None
        self.proxies = {}
        self.taken = {worker: threading.Lock() for worker in WORKERS}  # by a fault that must not meet another there

    # ------------------------------------------------------------ up and down

    def __enter__(self):
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_):
        self._stack.close()

    def _open(self):
        for name in ("ledger", "store", "state", "work", "box", "record", "logs"):
            (self.directory / name).mkdir(parents=True)
        self._mount()
        for name in ("locks", "beats", "again"):
            (self.box / name).mkdir()
        (self.box / "journal").touch()
        self.pace_file = self.directory / "record" / "pace"
        self.pace(rate=0.0)
        self.record = Record(self.directory / "record" / "harness.jsonl")
        self._stack.callback(self.record.close)
        self.node = PrivateNode(self.directory / "broker", settings={"collect_statistics_interval": "1000"})
        self._stack.callback(self._node_thread.shutdown)
        self._stack.callback(lambda: self._on_node(self.node.kill))
        self._on_node(self.node.start)
        self._quorum_deleted = time.monotonic()
        self.store_url = f"file://{self.directory / 'store'}"
        Store.open(self.store_url, create=True)  # workers may start before their scheduler
        self._make_ledger()
        self.audit = Audit(self.ledger_url)
        self.supervisor = Supervisor(self.record, self.rng)
        self.supervisor.start()
        self._stack.callback(self._end_parties)
        for name in self.scheduler_names:
            self._scheduler(name)
        self.audit.install()
        for name, tags in WORKERS.items():
            self._worker(name, tags)

    def _mount(self):
        """Put what can be full on small disks of its own; they go with this process, which has its own mounts."""
        if os.geteuid() != 0 or os.environ.get("MQWORKER_CHAOS_MOUNTS") != "private":
            return
        for name, size in TMPFS.items():
            command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0755", "chaos", str(self.directory / name)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                return
            self._stack.callback(subprocess.run, ["umount", "--lazy", str(self.directory / name)], check=False)
        self.mounted = True

    def _make_ledger(self):
        if self.kind == "sqlite":
            self.ledger_url = f"sqlite:///{self.directory / 'ledger' / 'ledger.db'}"
            return
        from tests.cluster import Cluster  # noqa: PLC0415  # needs PostgreSQL, which SQLite does not

        tempfile.tempdir = str(self.directory / "ledger")  # on the small disk
        (self.directory / "ledger").chmod(0o711)
        self.cluster = Cluster(["max_wal_size=64MB", "min_wal_size=32MB"])
        tempfile.tempdir = None
        self._stack.callback(lambda: self._on_node(lambda: self.cluster.__exit__(None, None, None)))
        self._on_node(self._start_cluster)
        self.ledger_url = self.cluster.url()

    def _start_cluster(self):
        tempfile.tempdir = str(self.directory / "ledger")
        try:
            self.cluster.__enter__()
        finally:
            tempfile.tempdir = None

    def database_runs(self):
        return self.cluster is not None and alive(self.cluster.pid)

    def kill_database(self):
        """End the database as a crash would."""
        os.kill(self.cluster.pid, signal.SIGQUIT)
        self._on_node(self._bury_database)

    def start_database(self):
        """Start the database, unless it runs."""
        if self.cluster is not None and not self.database_runs():
            self._on_node(self._bury_database)
            self._on_node(self.cluster.start)

    def _bury_database(self):
        deadline = time.monotonic() + 20
        while self.database_runs() and time.monotonic() < deadline:
            time.sleep(0.05)

    @property
    def scheduler_names(self):
        return ("scheduler",) if self.kind == "sqlite" else ("first", "second")

    def active(self):
        """Return the name of the active scheduler."""
        if self.kind == "sqlite":
            return "scheduler"
        pid = self.audit.active()
        for name in self.scheduler_names:
            if pid is not None and self.party(name).pid == pid:
                return name
        raise Missed("no scheduler is active")

    def standby(self):
        """Return the name of the scheduler that stands by."""
        active = self.active()
        return next(name for name in self.scheduler_names if name != active)

    def _environment(self, name):
        proxy = self.proxies.get(name)
        if proxy is None:
            proxy = self.proxies[name] = self._stack.enter_context(Proxy.before(self.node.url))
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("MQWORKER_")},
            "PYTHONPATH": str(ROOT),
            "MQWORKER_TASK_MODULES": "tests.chaos.taskbox.burning",
            MARK: str(self.box),
            "MQWORKER_AMQP_URL": proxy.url(self.node.url),
            "MQWORKER_PREFIX": self.prefix,
            "MQWORKER_STORE": self.store_url,
            "MQWORKER_LEDGER": self._ledger_url(name),
            "MQWORKER_LOG_FORMAT": "json",
            "MQWORKER_SCHEDULER_METRICS_LISTEN": "",
            "MQWORKER_SCHEDULER_RETRY_DELAY": "0.3",
            "MQWORKER_SCHEDULER_CONCURRENCY_LIMITS": '{"two": 2}',
            "MQWORKER_SCHEDULER_PAUSE_AFTER": "0",  # it is no worker's fault what happens to it here
            "MQWORKER_WORKER_WORK_DIR": str(self.directory / "work"),
            "MQWORKER_WORKER_METRICS_LISTEN": "",
            "MQWORKER_WORKER_DRAIN_GRACE": "2",
            "MQWORKER_WORKER_MIN_FREE_DISK": str(2 << 20),  # of small disks
            "MQWORKER_CONFIG": os.devnull,
        }

    def _ledger_url(self, name):
        """Return the ledger's URL for a party: a scheduler reaches a database server by a proxy of its own, too."""
        if self.kind == "sqlite" or name not in self.scheduler_names:
            return self.ledger_url if self.kind == "sqlite" else "sqlite:///nowhere"
        key = f"{name}'s ledger"
        if key not in self.proxies:
            self.proxies[key] = self._stack.enter_context(Proxy.before(self.ledger_url))
        return self.proxies[key].url(self.ledger_url)

    def _party(self, name, *command, **environment):
        log = self.directory / "logs" / f"{name}.log"
        self.supervisor.add(Party(name, command, {**self._environment(name), **environment}, log))

    def _scheduler(self, name):
        self._party(name, "mqworker", "scheduler")

    def _worker(self, name, tags):
        state = str(self.directory / "state" / name)
        arguments = ("--name", name, "--slots", str(SLOTS), "--state-dir", state)
        self._party(name, "mqworker", "worker", *arguments, MQWORKER_WORKER_TAGS=",".join(tags))

    def let_clients_in(self, seed):
        """Start the submitters and the commander."""
        for name in (*SUBMITTERS, "commander"):
            module = "tests.chaos.commander" if name == "commander" else "tests.chaos.submitter"
            record = str(self.directory / "record" / f"{name}.jsonl")
            self._party(name, module, record, str(self.pace_file), f"{seed}-{name}")
            self.party(name).ends = True

    def pace(self, *, rate, stop=False):
        """Tell the submitters how many requests a second each may make."""
        new = self.pace_file.with_suffix(".new")
        new.write_text(json.dumps({"rate": rate, "stop": stop}))
        new.replace(self.pace_file)

    def _end_parties(self):
        """End what is left, at once: an orderly end is what a run does itself, before it checks."""
        for party in self.supervisor.parties.values():
            party.wanted = False
        self.supervisor.stop()
        for party in self.supervisor.parties.values():
            if party.process is not None:
                party.process.kill()
                party.process.wait()

    def party(self, name):
        return self.supervisor.parties[name]

    def stop_party(self, name, seconds):
        """Stop a party in order, for good; return its exit code, or None if it had to be killed."""
        party = self.party(name)
        party.wanted = False
        process = party.process
        if process is None:
            return 0
        party.signal(signal.SIGCONT, "")
        party.signal(signal.SIGTERM, "the end")
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None

    # ------------------------------------------------------------ processes

    def slots(self, worker):
        """Return the slots' processes of a worker, those of now."""
        pid = self.party(worker).pid
        return [] if pid is None else [one for one in map(identify, children(pid)) if one and is_slot(one.pid)]

    def ours(self):
        """Return (pid, command) of every living process that stems from this pool."""
        found = []
        mark = f"{MARK}={self.box}\0".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    if mark in (entry / "environ").read_bytes() + b"\0":
                        found.append((int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()))
        return found

    # ------------------------------------------------------------ the broker

    def _on_node(self, call):
        return self._node_thread.submit(call).result()

    def kill_broker(self):
        wait = self._quorum_deleted + YOUNG_QUEUE - time.monotonic()
        if wait > 0:
            self.over.wait(wait)
        self._on_node(self.node.kill)

    def stop_broker(self):
        self._on_node(self.node.stop)

    def start_broker(self):
        if self.node.pid is None:
            self._on_node(self.node.start)

    def ctl(self, *arguments):
        if self.node.pid is None:
            raise Missed("the broker is down")
        return self.node.ctl(*arguments)

    def manage(self, method, path):
        """Ask the management API."""
        parts = urlsplit(self.node.management_url)
        bare = urlunsplit(parts._replace(netloc=f"{parts.hostname}:{parts.port}"))
        passwords = HTTPPasswordMgrWithDefaultRealm()
        passwords.add_password(None, bare, parts.username, parts.password)
        request = Request(f"{bare}/api/{path}", method=method)  # noqa: S310  # our own broker's
        try:
            with build_opener(HTTPBasicAuthHandler(passwords)).open(request, timeout=10) as answer:
                return json.loads(answer.read() or b"null")
        except (URLError, OSError) as error:
            raise Missed(f"the management API: {error}") from error

    def queues(self):
        return {one["name"]: one for one in self.manage("GET", "queues/%2F")}

    def delete_queue(self, name):
        if name in self.quorum_queues:
            self._quorum_deleted = time.monotonic() + 60  # until it is seen to be there again
        # The management API would refuse to delete what belongs to one connection alone.
        resource = f'rabbit_misc:r(<<"/">>, queue, <<"{name}">>)'
        said = self.ctl(
            "eval",
            f'{{ok, Q}} = rabbit_amqqueue:lookup({resource}), rabbit_amqqueue:delete(Q, false, false, <<"fire">>).',
        )
        if "ok" not in said:
            raise Missed(f"the queue {name}: {said[:200]}")

    def await_quorum_queues(self):
        """Wait until the quorum queues are there again, for a kill must not meet a young one."""
        deadline = time.monotonic() + 60
        while not self.over.is_set() and time.monotonic() < deadline:
            with suppress(Missed):
                if self.quorum_queues <= {*self.queues()}:
                    break
            self.over.wait(0.2)
        self._quorum_deleted = time.monotonic()

    def close_connection(self, chosen):
        names = sorted(one["name"] for one in self.manage("GET", "connections") if "name" in one)
        if not names:
            raise Missed("there is no connection")
        name = names[int(chosen * len(names))]
        self.manage("DELETE", f"connections/{quote(name, safe='')}")
        return name

    # ------------------------------------------------------------ disks

    def fill(self, what):
        """Leave no byte free on one of the small disks."""
        if not self.mounted:
            raise Missed("there are no small disks")
        path = self.directory / what / "fill"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            size = 1 << 20
            while size:
                try:
                    while True:
                        os.posix_fallocate(fd, os.fstat(fd).st_size, size)
                except OSError:
                    size //= 2
                    if size < 512:
                        return
        finally:
            os.close(fd)

    def unfill(self, what):
        (self.directory / what / "fill").unlink(missing_ok=True)

    def heal(self):
        """End every fault that may still be there."""
        for proxy in self.proxies.values():
            proxy.heal()
        for what in TMPFS:
            self.unfill(what)
        for party in self.supervisor.parties.values():
            party.signal(signal.SIGCONT, "")
            if party.name in WORKERS:
                for slot in self.slots(party.name):
                    with suppress(ProcessLookupError):
                        os.kill(slot.pid, signal.SIGCONT)
        self.start_broker()
        self.start_database()


def alive(pid):
    """Tell whether a process lives; a zombie does not."""
    return identify(pid) is not None


def children(pid):
    with suppress(OSError):
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    return []


def is_slot(pid):
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b"mqworker.slot" in words and b"--analyze" not in words
    return False
