"""What all measured systems share: one private broker, one database with fsync, and the peers' environment."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import psycopg

from benchmarks import peers
from benchmarks.systems import SYSTEMS, Peer, Place
from mqworker import processes
from mqworker.privatenode import USER, PrivateNode
from tests.cluster import Cluster

DURABLE: Final = ("fsync=on", "full_page_writes=on")
NEED_DATABASE: Final = frozenset({"mqworker-postgresql", "celery-database"})


class World:
    """Hold what all systems share: a broker, and a database if one of them wants it."""

    def __init__(self, directory: Path, node: PrivateNode, cluster: Cluster | None, python: Path | None) -> None:
        self._directory, self._node, self._cluster, self._python = directory, node, cluster, python
        self._made = 0

    @contextmanager
    def place(self, name: str) -> Iterator[Place]:
        """Give a system a virtual host, a database and a directory that nobody had before."""
        self._made += 1
        own = f"{name}-{self._made}"
        directory = self._directory / own
        directory.mkdir(mode=0o711)
        self._node.ctl("add_vhost", own)
        self._node.ctl("set_permissions", "-p", own, USER, ".*", ".*", ".*")
        broker = urlunsplit(urlsplit(self._node.url)._replace(path=f"/{own}"))
        yield Place(directory, broker, self._database(own), self._python)
        self._node.ctl("delete_vhost", own)

    def _database(self, name: str) -> str:
        if self._cluster is None:
            return ""
        with psycopg.connect(self._cluster.url(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return self._cluster.url(name)

    def cpu(self) -> tuple[float, float]:
        """Return the CPU seconds of broker and database."""
        pids = [self._node.pid or 0, self._cluster.pid if self._cluster else 0]
        used = processes.usage(pids)
        return used[pids[0]].cpu_seconds, used[pids[1]].cpu_seconds if self._cluster else 0.0


@contextmanager
def world(systems: Sequence[str]) -> Iterator[World]:
    """Run what these systems need. It is on disk, and builds of another uid can get through."""
    python = peers.environment() if any(issubclass(SYSTEMS[name], Peer) for name in systems) else None
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="mqworker-bench-", dir="/var/tmp"))
        stack.callback(processes.remove_tree, directory)
        directory.chmod(0o711)
        node = stack.enter_context(PrivateNode(directory / "node", plugins=()))
        alone = NEED_DATABASE.isdisjoint(systems)
        cluster = None if alone else stack.enter_context(Cluster(DURABLE))
        yield World(directory, node, cluster, python)
