"""A private RabbitMQ node: on loopback alone, its data kept, and nothing left behind."""

import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mqworker import privatenode
from mqworker.errors import HostUnfit, OutsideError
from mqworker.privatenode import PrivateNode

pytestmark = pytest.mark.live

LISTENING = "0A"
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1 and ::1 as /proc/net writes them
SOON = 30


def processes_of(directory):
    """List the living processes that mention a directory in their environment or command."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(directory).encode() in (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return [pid for pid in found if pid != os.getpid()]


def listening_addresses(pids):
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                inodes.add(str(fd.readlink()).removeprefix("socket:[").removesuffix("]"))
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                addresses.append(fields[1].split(":")[0])
    return addresses


def wait_until(condition):
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_node_listens_on_loopback_alone_and_nothing_is_left_of_it(private_node):
    node = private_node(plugins=("rabbitmq_management", "rabbitmq_prometheus"))
    epmd_and_node = [pid for pid in processes_of(node.directory) if Path(f"/proc/{pid}/fd").exists()]
    addresses = listening_addresses(epmd_and_node)
    assert len(addresses) >= 5  # AMQP, management, metrics, distribution, epmd
    assert set(addresses) <= LOOPBACK
    for url in (node.url, node.management_url, node.prometheus_url):
        socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=5).close()
    with pytest.raises(HostUnfit, match="it runs; stop it first"):
        node.start()
    with pytest.raises(OutsideError, match=r"rabbitmqctl no_such_command failed"):
        node.ctl("no_such_command")

    node.kill()
    wait_until(lambda: not processes_of(node.directory))
    shutil.rmtree(node.directory)
    with pytest.raises(OutsideError, match="start it first"):
        node.ctl("status")


def test_a_node_has_its_data_and_password_when_it_starts_again_even_after_a_kill(private_node):
    node = private_node(
        plugins=(), settings={"consumer_timeout": "5000"}, advanced="[{rabbit, [{channel_tick_interval, 1000}]}]."
    )
    node.ctl("add_vhost", "kept")
    assert node.ctl("eval", "application:get_env(rabbit, consumer_timeout).").strip() == "{ok,5000}"
    assert node.ctl("eval", "application:get_env(rabbit, channel_tick_interval).").strip() == "{ok,1000}"
    node.kill()

    with PrivateNode(node.directory, plugins=(), root=node.root) as again:
        assert "kept" in again.ctl("list_vhosts").split()
        assert urlsplit(again.url).password == urlsplit(node.url).password
        assert "Success" in again.ctl("authenticate_user", "mqworker", urlsplit(again.url).password)
        again.stop()
        assert again.pid is None
        assert not processes_of(node.directory)


PARENT = """
import encodings.idna, os, sys  # all that is imported later: this Python may be closed to other users
from pathlib import Path
from mqworker.privatenode import PrivateNode
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
node = PrivateNode(Path(sys.argv[1]), plugins=())
node.start()
print(node.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.usefixtures("private_node")  # skips where there is no RabbitMQ
def test_an_ordinary_user_can_run_a_node_and_it_dies_with_its_parent():
    directory = Path(tempfile.mkdtemp(prefix="mqworker-test-"))  # pytest's own are closed to other users
    try:
        if os.getuid() == 0:
            os.chown(directory, 65534, 65534)
        with subprocess.Popen(
            [sys.executable, "-c", PARENT, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as parent:
            assert select.select([parent.stdout], [], [], 60)[0]
            pid = int(parent.stdout.readline())
            assert Path(f"/proc/{pid}").stat().st_uid == (65534 if os.getuid() == 0 else os.getuid())
            assert len(processes_of(directory)) > 2  # the parent, epmd, the node
            parent.kill()
        wait_until(lambda: not processes_of(directory))
    finally:
        shutil.rmtree(directory)


@pytest.mark.usefixtures("private_node")
def test_a_node_that_cannot_start_says_why_and_leaves_nothing(tmp_path):
    node = PrivateNode(tmp_path / "node", settings={"no_such_setting": "1"})
    told = r"(?s)rabbitmq-server to run.*ended with exit code 1.*attempted to set unknown variable: no_such_setting"
    with pytest.raises(HostUnfit, match=told):
        node.start()
    assert node.pid is None
    wait_until(lambda: not processes_of(node.directory))


def test_the_ports_of_a_node_are_nobody_elses_until_it_listens():
    [port] = privatenode._free_ports(1)
    with privatenode._reserved([port]), socket.socket() as stranger, socket.socket() as listener:
        with pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the node does
        listener.bind(("127.0.0.1", port))
        listener.listen()
        with pytest.raises(HostUnfit, match=f"port {port} of the node to be free"), privatenode._reserved([port]):
            pass


def test_a_machine_without_rabbitmq_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(privatenode, "SCRIPTS", tmp_path)
    with pytest.raises(HostUnfit, match="apt-get install --no-install-recommends rabbitmq-server"):
        PrivateNode(tmp_path / "node").start()
