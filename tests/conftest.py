"""Real parts for tests. What is missing skips its tests loudly, or fails them where MQWORKER_TEST_REQUIRE=all."""

import asyncio
import json
import os
import shutil
import signal
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import HTTPBasicAuthHandler, HTTPPasswordMgrWithDefaultRealm, Request, build_opener

import pytest

from mqworker import debianhost
from mqworker.amqp import remove
from mqworker.errors import HostUnfit, OutsideError
from mqworker.privatenode import PrivateNode, find_programs
from mqworker.topology import Topology

IMAGE = "rabbitmq:4-management"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background jobs ignore Ctrl-C, and so would every child that a test wants to interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@dataclass(frozen=True)
class Broker:
    """A broker that tests share."""

    url: str
    management_url: str | None
    node: PrivateNode | None


@pytest.fixture(scope="session")
def broker(tmp_path_factory) -> Iterator[Broker]:
    """The broker of MQWORKER_TEST_AMQP_URL, else one in a container, else a node of our own."""
    url = os.environ.get("MQWORKER_TEST_AMQP_URL")
    if url:
        yield Broker(url, os.environ.get("MQWORKER_TEST_MANAGEMENT_URL"), None)
        return
    with ExitStack() as stack:
        docker = "no Docker engine answers"
        if _docker_answers():
            try:
                container = _container(stack)
            except Exception as error:  # noqa: BLE001  # no image and no network, say: a node of our own will do
                docker = f"Docker could not run {IMAGE}: {error}"
            else:
                yield container
                return
        yield _own(stack, tmp_path_factory, f"or MQWORKER_TEST_AMQP_URL, or Docker, but {docker}")


@pytest.fixture(scope="session")
def own_broker(broker, tmp_path_factory) -> Iterator[Broker]:
    """A node of our own, which a test may disturb but neither kill nor fill; the same as `broker` where that is one."""
    with ExitStack() as stack:
        yield broker if broker.node is not None else _own(stack, tmp_path_factory, "no other broker may be disturbed")


@pytest.fixture
def private_node(tmp_path) -> Iterator[Callable[..., PrivateNode]]:
    """Start nodes that a test may kill and restart; takes what PrivateNode takes, but for the directory."""
    try:
        find_programs()
    except HostUnfit as error:
        missing("rabbitmq-server", str(error))
    with ExitStack() as stack:

        def start(**arguments) -> PrivateNode:
            directory = tmp_path / f"node-{uuid.uuid4().hex[:8]}"
            node = PrivateNode(directory, **arguments)
            stack.callback(shutil.rmtree, directory, ignore_errors=True)  # it may not have come to be
            stack.callback(node.kill)
            node.start()
            return node

        yield start


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
    """The URL of a vhost of the test's own, on a node of our own."""
    with _vhost(own_broker, prefix) as url:
        yield url


def _own(stack: ExitStack, tmp_path_factory, otherwise: str) -> Broker:
    try:
        find_programs()
    except HostUnfit as error:
        missing("rabbitmq-server", f"{error} ({otherwise})")
    directory = tmp_path_factory.mktemp("broker")
    stack.callback(shutil.rmtree, directory)
    node = stack.enter_context(PrivateNode(directory))
    return Broker(node.url, node.management_url, node)


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
        None,
    )


def _manage(management_url: str, method: str, path: str, body: object = None) -> None:
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
    build_opener(HTTPBasicAuthHandler(passwords)).open(request, timeout=30).close()


@pytest.fixture(scope="session")
def chroot() -> dict[str, str]:
    """The suite and architecture of a build chroot; made once, and kept where sbuild keeps them."""
    what = "a build chroot"
    if lacking := debianhost.missing_packages(["sbuild", "mmdebstrap", "uidmap"]):
        missing(what, f"not installed: {', '.join(lacking)}")
    try:
        debianhost.ensure_subordinate_ids(print)
        suite, architecture = debianhost.default_suite(), debianhost.native_architecture()
        path = debianhost.ensure_chroot(suite, architecture, print)
        assert debianhost.ensure_chroot(suite, architecture, pytest.fail) == path
    except (HostUnfit, OutsideError) as error:
        missing(what, str(error))
    return {"distribution": suite, "host_architecture": architecture}
