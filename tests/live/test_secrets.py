"""Passwords of URLs stay where they belong: looked for wherever our programs say or show anything."""

import os
import re
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.live

COMMAND = (sys.executable, "-P", "-m", "mqworker")
BROKER, LEDGER, STORE = "n0t-f0r-y0u-br0ker", "n0t-f0r-y0u-ledger", "n0t-f0r-y0u-st0re"
SECRET = re.compile(r"n0t-f0r-y0u-\w+")
DEADLINE = 120.0
AN_ID = "00000000-0000-4000-8000-000000000001"
DEAD = {
    "AMQP_URL": f"amqp://me:{BROKER}@127.0.0.1:1,localhost:1/vhost?heartbeat=5",
    "LEDGER": f"postgresql://me:{LEDGER}@127.0.0.1:1/ledger?connect_timeout=1",
    "STORE": f"s3://key:{STORE}@bucket/there?aws_secret_access_key={STORE}",
}
NONE_AT_ALL = {
    "AMQP_URL": f"amqp://me:{BROKER}@127.0.0.1:port/vhost",
    "LEDGER": f"postgresql://me:{LEDGER}@127.0.0.1:port/ledger",
    "STORE": f"nothing://key:{STORE}@bucket:port/there",
}
COMMANDS = [
    ["list"],
    ["show", AN_ID],
    ["submit", "noop", "--wait"],
    ["pause", "worker", "anna"],
    ["forget", "anna"],
    ["explain", "--task", "noop"],
    ["watch"],
    ["artifact", "import", "note", "--category", "site:notes", "--name", "note"],
    ["topology", "declare"],
    ["topology", "show"],
    ["topology", "permissions"],
    ["doctor", "--json"],
    ["scheduler", "--metrics-listen", ""],
    ["worker", "--metrics-listen", "", "--slots", "1", "--state-dir", "state", "--work-dir", "work"],
]


class Home:
    """Run commands in a directory of their own, and look at all that they say."""

    def __init__(self, directory):
        self.directory = directory
        (directory / "note").write_text("note")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MQWORKER_", "XDG_"))}
        self.environment = {
            **kept,
            "HOME": str(directory),
            "MQWORKER_TIMEOUT": "1",
            "MQWORKER_DEBUG": "1",
            "MQWORKER_LOG_LEVEL": "debug",
        }

    def run(self, arguments, urls):
        """Return what a command says; here each ends by itself."""
        given = {f"MQWORKER_{key}": url for key, url in urls.items()}
        with subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=self.directory,
            env={**self.environment, **given},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            said, _ = process.communicate(timeout=DEADLINE)
        return said.decode(errors="replace")

    def leaks(self, commands, urls):
        with ThreadPoolExecutor(4) as pool:
            said = dict(zip(map(" ".join, commands), pool.map(lambda one: self.run(one, urls), commands), strict=True))
        assert all(said.values()), said
        return {command: text for command, text in said.items() if SECRET.search(text)}


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


def test_no_command_tells_a_password_when_nobody_answers(home):
    assert home.leaks(COMMANDS, DEAD) == {}


def test_no_command_tells_the_password_of_a_url_that_is_none(home):
    assert home.leaks([["list"], ["doctor"], ["scheduler"], ["worker"], ["topology", "permissions"]], NONE_AT_ALL) == {}
    one_is_well = {"STORE": f"file://{home.directory}/store", "LEDGER": NONE_AT_ALL["LEDGER"]}
    assert home.leaks([["scheduler"], ["doctor"]], one_is_well) == {}


def test_no_command_tells_a_password_that_the_broker_refuses(home, own_amqp_url):
    refused = {**DEAD, "AMQP_URL": re.sub(r"//([^:]+):[^@]+@", rf"//\1:{BROKER}@", own_amqp_url)}
    refused |= {"STORE": f"file://{home.directory}/store", "LEDGER": f"sqlite:///{home.directory}/ledger.db"}
    commands = [["list"], ["submit", "noop"], ["doctor"], ["topology", "declare"], ["scheduler"], ["watch"]]
    assert home.leaks(commands, refused) == {}


def test_a_password_on_the_command_line_is_refused_to_residents_and_warned_of_elsewhere(home):
    url = DEAD["AMQP_URL"]
    for resident in ("scheduler", "worker"):
        said = home.run(["--amqp-url", url, resident], {})
        assert "error: expected --amqp-url without a password" in said
        assert "amqp_url_file" in said
    said = home.run(["scheduler", "--ledger", DEAD["LEDGER"]], {})
    assert "error: expected --ledger without a password" in said
    said = home.run(["--amqp-url", url, "list"], {})
    assert "--amqp-url shows its password to everybody on this machine (ps)" in said
    assert not SECRET.search(said)
    assert not SECRET.search(home.run(["list", url], {})), "what was typed in a wrong place"


def test_a_url_comes_from_a_file_of_its_own(home):
    (home.directory / "broker").write_text(f"{DEAD['AMQP_URL']}\n")
    assert "127.0.0.1:1" in home.run(["list"], {"AMQP_URL_FILE": str(home.directory / "broker")})

    (home.directory / "mqworker.toml").write_text('amqp_url_file = "broker"\n')
    assert "127.0.0.1:1" in home.run(["list"], {})
    both = {"AMQP_URL_FILE": "broker", "AMQP_URL": DEAD["AMQP_URL"]}
    assert "expected amqp_url or amqp_url_file, got both" in home.run(["list"], both)
    assert "nobody answers at 127.0.0.1:2" in home.run(["list"], {"AMQP_URL": "amqp://guest:guest@127.0.0.1:2/"})
    (home.directory / "broker").unlink()
    said = home.run(["list"], {})
    assert "expected a readable file with a URL at broker (amqp_url_file, from mqworker.toml): No such file" in said


def test_what_residents_show_of_themselves_and_hand_to_children_has_no_password(
    make_pool, own_amqp_url, prefix, manage, runs
):
    user = f"{prefix}-all"
    manage("PUT", f"users/{user}", {"password": BROKER, "tags": ""})
    try:
        manage("PUT", f"permissions/{prefix}/{user}", {"configure": ".*", "write": ".*", "read": ".*"})
        pool = make_pool(re.sub(r"//[^@]+@", f"//{user}:{BROKER}@", own_amqp_url), prefix)
        pages = [f"127.0.0.1:{port}" for port in _free_ports(2)]
        debug = {"MQWORKER_LOG_LEVEL": "debug", "MQWORKER_DEBUG": "1"}
        pool.scheduler(MQWORKER_SCHEDULER_METRICS_LISTEN=pages[0], **debug)
        pool.worker("anna", MQWORKER_WORKER_METRICS_LISTEN=pages[1], **debug)
        with pool.client() as client:
            pool.await_workers(client, "anna")
            running = client.submit("journal", runs.data)
            runs.await_starts(1)
            ours = [process.pid for process in pool.processes.values()]
            children = _descendants(ours)
            assert children
            told = {
                **{f"cmdline of {pid}": _read(pid, "cmdline") for pid in (*ours, *children)},
                **{f"environment of {pid}": _read(pid, "environ") for pid in children},
                **{
                    url: urllib.request.urlopen(url, timeout=30).read().decode()  # noqa: S310  # our own
                    for page in pages
                    for url in (f"http://{page}/metrics", f"http://{page}/healthz")
                },
            }
            assert {what for what, text in told.items() if SECRET.search(text)} == set()
            runs.open()
            client.wait([running], timeout=60)
        for name in ("anna", "scheduler"):
            pool.end(name)
            assert not SECRET.search(pool.log(name))
            assert pool.log(name)
    finally:
        manage("DELETE", f"users/{user}")


def _free_ports(number):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _read(pid, what):
    return Path(f"/proc/{pid}/{what}").read_bytes().decode(errors="replace")


def _descendants(pids):
    """List all processes below some; with them gone, what is asked of them is nothing."""
    below = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            below.setdefault(parent, []).append(int(entry.name))
    found, left = [], [*pids]
    while left:
        left += (children := below.get(left.pop(), []))
        found += children
    return found
