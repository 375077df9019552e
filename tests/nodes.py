"""Three RabbitMQ nodes on this machine, one cluster: to be killed, frozen, and parted from each other."""

import json
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from mqworker.errors import OutsideError
from mqworker.privatenode import PATH, PrivateNode, _free_ports, find_programs

NAMES = ("c0", "c1", "c2")
MENDS_ITSELF = 60.0  # seconds
STARTS = 180.0  # seconds


class Cluster:
    """Run three nodes; a context manager, whose thread has to outlive them."""

    def __init__(self, directory: Path, root: Path | None) -> None:
        self._stack = ExitStack()
        self._cookie = secrets.token_hex(16)
        [self._epmd_port] = _free_ports(1)
        settings = {
            "cluster_formation.peer_discovery_backend": "classic_config",
            "cluster_partition_handling": "pause_minority",  # 4.3 has no other way, and no such setting
            "default_user": "mqworker",
            "default_pass": self._cookie,
        }
        settings |= {
            f"cluster_formation.classic_config.nodes.{i}": f"{name}@localhost" for i, name in enumerate(NAMES, 1)
        }
        self.nodes = {
            name: PrivateNode(
                directory / name,
                settings=settings,
                plugins=(),
                root=root,
                name=name,
                epmd=self._epmd_port,
                cookie=self._cookie,
            )
            for name in NAMES
        }
        find_programs(root)

    def __enter__(self) -> Self:
        epmd = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "epmd", "-port", str(self._epmd_port), "-address", "127.0.0.1"],
            env={"PATH": PATH},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._stack.callback(epmd.wait)
        self._stack.callback(epmd.kill)
        for node in self.nodes.values():
            self._stack.callback(node.kill)
        try:
            for node in self.nodes.values():
                node.launch()
            for node in self.nodes.values():
                node.await_up()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def url(self, *names: str) -> str:
        """Return a URL of some nodes, or of all, in this order."""
        hosts = ",".join(f"127.0.0.1:{urlsplit(self.nodes[name].url).port}" for name in names or NAMES)
        return urlunsplit(urlsplit(self.nodes[NAMES[0]].url)._replace(netloc=f"mqworker:{self._cookie}@{hosts}"))

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl on a node that runs."""
        node = next(node for node in self.nodes.values() if node.pid is not None)
        return node.ctl(*arguments)

    def freeze(self, name: str) -> None:
        os.kill(self.nodes[name].pid or 0, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        os.kill(self.nodes[name].pid or 0, signal.SIGCONT)

    def whole(self) -> bool:
        """Tell whether each node runs, and sees all others run."""
        try:
            seen = [node.ctl("cluster_status", "--formatter", "json") for node in self.nodes.values()]
        except OutsideError:
            return False
        return all(len(json.loads(text)["running_nodes"]) == len(NAMES) for text in seen)

    def mend(self, name: str) -> None:
        """Wait until a node is one with the others again, and start it anew if that does not come by itself.

        RabbitMQ 3.10 can leave a node parted that was frozen for long; its documentation has operators do the same.
        """
        if not self._becomes_whole(MENDS_ITSELF):
            self.nodes[name].kill()
            self.nodes[name].start()
            if not self._becomes_whole(STARTS):
                raise AssertionError(f"the cluster is not whole {STARTS:g} s after {name} was started anew")

    def _becomes_whole(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self.whole():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)  # between two looks at what has no event
        return True

    def part(self, name: str) -> None:
        """Part a node from the others: each side lets the other in no more, since each expects another cookie."""
        self._introduce(name, lambda: secrets.token_hex(8))
        # At once on both sides: where two nodes see a third differently, RabbitMQ parts those two as well.
        self.nodes[name].ctl("eval", "[erlang:disconnect_node(Node) || Node <- nodes()].")

    def join(self, name: str) -> None:
        """Let a node meet the others again."""
        self._introduce(name, lambda: self._cookie)

    def _introduce(self, name: str, cookie: Callable[[], str]) -> None:
        others = [other for other in NAMES if other != name]
        told = [(name, other) for other in others] + [(other, name) for other in others]

        def tell(here: str, there: str) -> None:
            self.nodes[here].ctl("eval", f"erlang:set_cookie('{there}@localhost', '{cookie()}').")

        threads = [threading.Thread(target=tell, args=pair) for pair in told]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
