"""Real parts for tests. What is missing skips its tests loudly, or fails them where MQWORKER_TEST_REQUIRE=all."""

import asyncio
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import HTTPBasicAuthHandler, HTTPPasswordMgrWithDefaultRealm, Request, build_opener

import psycopg
import pytest

from mqworker import debianhost
from mqworker import task as task_room
from mqworker.amqp import remove
from mqworker.errors import HostUnfit, OutsideError
from mqworker.ledger import Ledger
from mqworker.privatenode import PrivateNode
from mqworker.schema import REVISION, schema
from mqworker.task import Task
from mqworker.topology import Topology
from tests import roots
from tests.cluster import Cluster
from tests.driving import Driven, Peer

IMAGE = "rabbitmq:4-management"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background jobs ignore Ctrl-C, and so would every child that a test wants to interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Who ends the tests by `timeout`, or a CI that cancels them, wants nothing left: as Ctrl-C does it.
signal.signal(signal.SIGTERM, signal.default_int_handler)


def missing(what: str, why: str) -> NoReturn:
    """Skip a test for want of something, or fail it where nothing may be missing."""
    text = f"needs {what}: {why}"
    if os.environ.get("MQWORKER_TEST_REQUIRE") == "all":
        pytest.fail(text, pytrace=False)
    pytest.skip(text)


@pytest.fixture(name="missing", scope="session")
def missing_fixture() -> Callable[[str, str], NoReturn]:
    """Hand `missing` to tests: they cannot import this file."""
    return missing


# ---------------------------------------------------------------- tests in several processes (pytest-xdist)

# Whose tests may run at the same time. All other files are for one process each: they share fixtures that are dear, or
# what there is once on a machine: apt, and the places where the demo leaves things if it leaves any.
SPREAD = {
    f"tests/{file}.py"
    for file in (
        "live/test_bad_input",
        "live/test_builds",
        "live/test_farm",
        "live/test_pool",
        "live/test_privatenode",
        "live/test_standby",
        "tasks/test_sbuild",
    )
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Hand out tests in the order of the files, which begins with the long ones: those of tests/live."""
    from xdist.scheduler import LoadScopeScheduling  # noqa: PLC0415  # only xdist calls this, and it may be missing

    class InOrder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file in SPREAD else file

    config.option.loadscopereorder = False
    return InOrder(config, log)


# ---------------------------------------------------------------- brokers, each one for a whole run


@dataclass(frozen=True)
class Broker:
    """A broker that tests share, in all processes of a run."""

    url: str
    management_url: str | None
    ours: bool


class Lacking(Exception):
    """Say what no broker can be had without, and why, as `missing` takes it."""


class Brokers:
    """Start each broker, and a PostgreSQL, when the first test asks for it; a context manager, which ends them.

    With pytest-xdist they belong to the process that runs no test itself. So one broker serves all that do, and none of
    them has it among its own descendants, where a test might meet or kill it.
    """

    def __init__(self, new_directory: Callable[[], Path]) -> None:
        self._new_directory = new_directory
        self._started: dict[str, Broker | Exception] = {}
        self._stack = ExitStack()
        self._kinds = {"broker": self._any, "own_broker": self._own, "postgresql": self._cluster}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, name: str) -> Broker:
        """Return the broker of the fixture of that name.

        Raises:
            Lacking: none can be had here.
        """
        if name not in self._started:
            try:
                self._started[name] = self._kinds[name]()
            except Exception as error:  # noqa: BLE001  # for each test that asks, in whatever process
                self._started[name] = error
        found = self._started[name]
        if isinstance(found, Exception):
            raise found
        return found

    def _any(self) -> Broker:
        if os.environ.get("MQWORKER_TEST_RABBITMQ"):
            return self._node("or another value of MQWORKER_TEST_RABBITMQ")
        url = os.environ.get("MQWORKER_TEST_AMQP_URL")
        if url:
            return Broker(url, os.environ.get("MQWORKER_TEST_MANAGEMENT_URL"), ours=False)
        docker = "no Docker engine answers"
        if _docker_answers():
            try:
                return _container(self._stack)
            except Exception as error:  # noqa: BLE001  # no image and no network, say: a node of our own will do
                docker = f"Docker could not run {IMAGE}: {error}"
        return self._node(f"or MQWORKER_TEST_AMQP_URL, or Docker, but {docker}")

    def _own(self) -> Broker:
        broker = self.get("broker")
        return broker if broker.ours else self._node("no other broker may be changed")

    def _node(self, otherwise: str) -> Broker:
        try:
            root = roots.chosen()
        except HostUnfit as error:
            raise Lacking("rabbitmq-server", f"{error} ({otherwise})") from error
        directory = self._new_directory()
        self._stack.callback(shutil.rmtree, directory)
        node = self._stack.enter_context(PrivateNode(directory, root=root))
        return Broker(node.url, node.management_url, ours=True)

    def _cluster(self) -> Broker:
        try:
            cluster = self._stack.enter_context(Cluster())
        except FileNotFoundError as error:
            raise Lacking("PostgreSQL", str(error)) from error
        return Broker(cluster.url(), None, ours=True)


def _answer(listener: Listener, brokers: Brokers) -> None:
    """Give brokers to who asks for them, until somebody asks for none."""
    name: str | None = ""
    with listener, brokers:  # in this thread: the kernel ends a node with the thread that started it
        while name is not None:
            with suppress(AuthenticationError, EOFError, OSError), listener.accept() as caller:  # else it is gone
                name = caller.recv()
                try:
                    caller.send(brokers.get(name) if name is not None else None)
                except Exception as error:  # noqa: BLE001  # it is raised where it was asked for
                    caller.send(error)


def _ask(port: int, secret: str, name: str | None) -> Broker | None:
    with Client(("127.0.0.1", port), authkey=bytes.fromhex(secret)) as answers:
        answers.send(name)
        found = answers.recv()
    if isinstance(found, Exception):
        raise found
    return found


ANSWERING = pytest.StashKey[tuple[threading.Thread, dict[str, int | str]]]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """Tell a process of pytest-xdist, before it starts, where to ask for brokers."""
    config = node.config
    if ANSWERING not in config.stash:
        secret = secrets.token_bytes(16)
        listener = Listener(("127.0.0.1", 0), backlog=16, authkey=secret)
        brokers = Brokers(partial(config._tmp_path_factory.mktemp, "broker"))
        thread = threading.Thread(target=_answer, args=(listener, brokers), name="brokers", daemon=True)
        thread.start()
        config.stash[ANSWERING] = thread, {"port": listener.address[1], "secret": secret.hex()}
    node.workerinput["brokers"] = config.stash[ANSWERING][1]


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the brokers of a run whose tests run in other processes."""
    if ANSWERING in config.stash:
        thread, where = config.stash[ANSWERING]
        _ask(**where, name=None)
        thread.join()


@pytest.fixture(scope="session")
def brokers(request, tmp_path_factory) -> Iterator[Callable[[str], Broker]]:
    """Give the broker of the fixture of a name, or skip its test."""
    where = getattr(request.config, "workerinput", {}).get("brokers")
    with Brokers(partial(tmp_path_factory.mktemp, "broker")) as own:
        get = partial(_ask, **where) if where else own.get

        def give(name: str) -> Broker:
            try:
                return get(name=name)
            except Lacking as lacking:
                missing(*lacking.args)

        yield give


@pytest.fixture(scope="session")
def broker(brokers) -> Broker:
    """The broker of MQWORKER_TEST_AMQP_URL, else one in a container, else a node of our own."""
    return brokers("broker")


@pytest.fixture(scope="session")
def own_broker(brokers) -> Broker:
    """A broker of our own, which a test may change in what is the test's alone; it must not disturb other tests."""
    return brokers("own_broker")


@pytest.fixture(scope="session")
def postgresql_databases(brokers) -> Callable[[int], str]:
    """Give the URL of the first, second, ... database of this process's own, with no facts in it."""
    server = brokers("postgresql").url
    own = f"t{uuid.uuid4().hex[:12]}"
    made: set[int] = set()

    def empty(number: int = 0) -> str:
        url = urlunsplit(urlsplit(server)._replace(path=f"/{own}_{number}"))
        if number not in made:
            with psycopg.connect(server, autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {own}_{number}")
            made.add(number)
            Ledger.open(url).close()
        tables = ", ".join(f'"{table.name}"' for table in schema.sorted_tables)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"TRUNCATE {tables} RESTART IDENTITY")
            connection.execute("UPDATE alembic_version SET version_num = %s", [REVISION])
            connection.execute("INSERT INTO leader (one, term, commits) VALUES (1, 0, 0)")
            connection.execute("INSERT INTO renewals (one, term, at) VALUES (1, 0, 0)")
        return url

    return empty


@pytest.fixture
def postgresql_void(brokers) -> Iterator[str]:
    """The URL of a database in PostgreSQL without any table."""
    server = brokers("postgresql").url
    name = f"v{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield urlunsplit(urlsplit(server)._replace(path=f"/{name}"))
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgresql_url(postgresql_databases) -> str:
    """The URL of an empty ledger in PostgreSQL, the test's own."""
    return postgresql_databases(0)


@pytest.fixture
def private_node(tmp_path) -> Iterator[Callable[..., PrivateNode]]:
    """Start nodes that a test may kill and restart; takes what PrivateNode takes, but for the directory."""
    with _private_nodes(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def nodes_of_module(tmp_path_factory) -> Iterator[Callable[..., PrivateNode]]:
    """Start nodes for all tests of a file; takes what PrivateNode takes, with `own` for a directory of the test's."""
    with _private_nodes(tmp_path_factory.mktemp("nodes")) as start:
        yield start


@pytest.fixture(scope="module")
def node_to_hurt(nodes_of_module) -> PrivateNode:
    """A node without plugins that each test may freeze or fill, and leaves well."""
    return nodes_of_module(plugins=())


@pytest.fixture
def prefix() -> str:
    """A name of its own for everything that a test declares."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture
def amqp_url(broker, prefix) -> Iterator[str]:
    """The URL of a vhost of the test's own (its name is the prefix), or of a broker on which it keeps to its prefix."""
    with _vhost(broker, prefix) as url:
        yield url


@pytest.fixture
def own_amqp_url(own_broker, prefix) -> Iterator[str]:
    """The URL of a vhost of the test's own, on a broker of our own."""
    with _vhost(own_broker, prefix) as url:
        yield url


@pytest.fixture
def manage(own_broker) -> Callable[..., object]:
    """Ask the management API of the broker of our own: a method, a path below /api, and what is to be sent."""
    return partial(_manage, own_broker.management_url)


@pytest.fixture
def as_own_user(own_amqp_url, manage, prefix) -> Iterator[Callable[..., str]]:
    """Make a user, who is called like the vhost of the test's own, with given rights there; return the user's URL."""

    def make(**rights: str) -> str:
        manage("PUT", f"users/{prefix}", {"password": "secret", "tags": ""})
        manage("PUT", f"permissions/{prefix}/{prefix}", rights)
        parts = urlsplit(own_amqp_url)
        return urlunsplit(parts._replace(netloc=f"{prefix}:secret@{parts.hostname}:{parts.port}"))

    yield make
    manage("DELETE", f"users/{prefix}")


@contextmanager
def _private_nodes(directory: Path) -> Iterator[Callable[..., PrivateNode]]:
    try:
        root = roots.chosen()
    except HostUnfit as error:
        missing("rabbitmq-server", str(error))
    with ExitStack() as stack:

        def start(**arguments) -> PrivateNode:
            own = arguments.pop("own", directory / f"node-{uuid.uuid4().hex[:8]}")
            node = PrivateNode(own, **{"root": root, **arguments})
            stack.callback(shutil.rmtree, own, ignore_errors=True)  # it may not have come to be
            stack.callback(node.kill)
            node.start()
            return node

        yield start


@contextmanager
def _vhost(broker: Broker, prefix: str) -> Iterator[str]:
    if broker.management_url is None:
        yield broker.url
        asyncio.run(remove(broker.url, Topology(prefix)))  # class queues expire
        return
    user = quote(unquote(urlsplit(broker.url).username or "guest"), safe="")
    _manage(broker.management_url, "PUT", f"vhosts/{prefix}")
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    _manage(broker.management_url, "PUT", f"permissions/{prefix}/{user}", everything)
    yield urlunsplit(urlsplit(broker.url)._replace(path=f"/{prefix}"))
    _manage(broker.management_url, "DELETE", f"vhosts/{prefix}")


def _docker_answers() -> bool:
    """Tell whether a Docker engine answers at all, quickly: the client library would wait a minute."""
    at = urlsplit(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"))
    if at.scheme != "unix":
        return bool(os.environ.get("DOCKER_HOST"))
    with socket.socket(socket.AF_UNIX) as engine:
        engine.settimeout(5)
        try:
            engine.connect(at.path)
            engine.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            return b" 200 " in engine.recv(64)
        except OSError:
            return False


def _container(stack: ExitStack) -> Broker:
    if Path("/.dockerenv").exists():  # testcontainers would take this machine for a neighbour of its containers
        os.environ.setdefault("TESTCONTAINERS_CONNECTION_MODE", "docker_host")
        os.environ.setdefault("TC_HOST", "127.0.0.1")
    from testcontainers.core.container import DockerContainer  # noqa: PLC0415  # slow, and reads the lines above
    from testcontainers.core.wait_strategies import LogMessageWaitStrategy  # noqa: PLC0415  # likewise

    container = (
        DockerContainer(IMAGE)
        .with_env("RABBITMQ_DEFAULT_USER", "mqworker")
        .with_env("RABBITMQ_DEFAULT_PASS", "mqworker")
        .with_exposed_ports(5672, 15672)
        .waiting_for(LogMessageWaitStrategy("Server startup complete").with_startup_timeout(120))
    )
    stack.enter_context(container)
    host = container.get_container_host_ip()
    return Broker(
        f"amqp://mqworker:mqworker@{host}:{container.get_exposed_port(5672)}/%2F",
        f"http://mqworker:mqworker@{host}:{container.get_exposed_port(15672)}",
        ours=True,
    )


def _manage(management_url: str, method: str, path: str, body: object = None) -> Any:
    parts = urlsplit(management_url)
    bare = urlunsplit(parts._replace(netloc=f"{parts.hostname}:{parts.port}"))
    passwords = HTTPPasswordMgrWithDefaultRealm()
    passwords.add_password(None, bare, unquote(parts.username or "guest"), unquote(parts.password or "guest"))
    request = Request(  # noqa: S310  # the scheme is that of the test's own settings
        f"{bare}/api/{path}",
        method=method,
        headers={"content-type": "application/json"},
        data=None if body is None else json.dumps(body).encode(),
    )
    with build_opener(HTTPBasicAuthHandler(passwords)).open(request, timeout=30) as answer:
        return json.loads(answer.read() or b"null")


@pytest.fixture(scope="session")
def chroot(tmp_path_factory) -> dict[str, str]:
    """The suite and architecture of a build chroot; made once, and kept where sbuild keeps them."""
    what = "a build chroot"
    if lacking := debianhost.missing_packages(["sbuild", "mmdebstrap", "uidmap"]):
        missing(what, f"not installed: {', '.join(lacking)}")
    try:
        with (tmp_path_factory.getbasetemp().parent / "subordinate-ids.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # else two processes of one run would take the same ids
            debianhost.ensure_subordinate_ids(print)
        suite, architecture = debianhost.default_suite(), debianhost.native_architecture()
        path = debianhost.ensure_chroot(suite, architecture, print)
        assert debianhost.ensure_chroot(suite, architecture, pytest.fail) == path
    except (HostUnfit, OutsideError) as error:
        missing(what, str(error))
    return {"distribution": suite, "host_architecture": architecture}


# ---------------------------------------------------------------- pools without a broker


@pytest.fixture
def coloured() -> Iterator[type[Task]]:
    """A task that only tests have; what its data name wrong raises in the scheduler."""
    task_room.load_tasks()
    kept = dict(Task._sub_tasks)

    class Coloured(Task):
        LEASE = 20.0
        TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {
            "type": "object",
            "properties": {"colour": {"type": "string"}, "inputs": {"type": "array"}},
        }
        INPUT_ARTIFACT_CATEGORY = "test:wood"

        def input_artifact_ids(self) -> list[int]:
            return list(self.data.get("inputs", []))

        def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
            if self.data.get("colour") == "raises":
                raise KeyError("no such colour")
            return worker_metadata.get("colour") == self.data.get("colour")

        def _execute(self) -> bool:
            return True

    yield Coloured
    Task._sub_tasks.clear()
    Task._sub_tasks.update(kept)


@pytest.fixture
def driven(coloured: type[Task]) -> Iterator[Driven]:  # noqa: ARG001  # its tasks are there
    one = Driven()
    yield one
    one.ledger.close()


@pytest.fixture
def anna(driven: Driven) -> Peer:
    return Peer(driven).join()


@pytest.fixture
def bert(driven: Driven) -> Peer:
    return Peer(driven, "bert").join()
