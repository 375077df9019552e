"""A PostgreSQL of the tests' own, from Debian's package: in a directory, on a free port, as another user than root."""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

PATIENCE = 60.0  # seconds


def programs() -> Path | None:
    """Find where the newest PostgreSQL has its programs; Debian puts them on nobody's PATH."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = installed[-1] if installed else shutil.which("initdb")
    return None if found is None else Path(found).parent


class Cluster:
    """Run a server; a context manager. Nothing it writes outlives a machine that stops, so it is fast."""

    def __init__(self, settings: Sequence[str] = ()) -> None:
        home = programs()
        if home is None:
            raise FileNotFoundError("initdb, of the Debian package postgresql, is not there")
        self._home = home
        self._settings = settings
        self._owner = pwd.getpwnam("postgres") if os.geteuid() == 0 else None  # the server refuses to run as root
        self._other = [] if self._owner is None else ["--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
        self._secret = secrets.token_hex(8)
        self._server: subprocess.Popen | None = None
        self.port = _free_port()

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="mqworker-postgresql-"))
        if self._owner is not None:
            os.chown(self._directory, self._owner.pw_uid, self._owner.pw_gid)
        try:
            password = self._directory / "password"
            password.write_text(self._secret)
            self._run(
                "initdb",
                f"--pgdata={self._data}",
                "--username=mqworker",
                f"--pwfile={password}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C.UTF-8",
                "--no-sync",
                "--no-instructions",
            )
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self.stop("immediate")
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def _data(self) -> Path:
        return self._directory / "data"

    def url(self, database: str = "postgres", *, port: int | None = None) -> str:
        return f"postgresql://mqworker:{self._secret}@127.0.0.1:{port or self.port}/{database}"

    @property
    def pid(self) -> int:
        assert self._server is not None
        return self._server.pid

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        settings = (
            "listen_addresses=127.0.0.1",
            f"port={self.port}",
            "unix_socket_directories=",
            "max_connections=60",
            "fsync=off",
            "full_page_writes=off",
            "autovacuum_naptime=10s",
            *self._settings,
        )
        log = (self._directory / "log").open("ab")
        command = [self._home / "postgres", "-D", self._data, *(word for one in settings for word in ("-c", one))]
        self._server = subprocess.Popen(
            ["setpriv", *self._other, "--pdeathsig", "QUIT", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,  # Ctrl-C at the tests is not meant for it
        )
        log.close()
        self._await_answer()

    def _await_answer(self) -> None:
        pause = threading.Event()
        for _ in range(int(PATIENCE / 0.05)):
            assert self._server is not None
            if self._server.poll() is not None:
                raise RuntimeError(f"PostgreSQL ended: {(self._directory / 'log').read_text()[-2000:]}")
            ready = subprocess.run(
                [self._home / "pg_isready", "--quiet", "--host=127.0.0.1", f"--port={self.port}"], check=False
            )
            if ready.returncode == 0:
                return
            pause.wait(0.05)
        raise RuntimeError(f"PostgreSQL does not answer: {(self._directory / 'log').read_text()[-2000:]}")

    def stop(self, how: str = "fast") -> None:
        """Stop the server: fast (sessions end), or immediate (as if it had crashed)."""
        assert self._server is not None
        self._server.send_signal({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[how])
        self._server.wait(PATIENCE)
        self._server = None

    def _run(self, program: str, *arguments: str) -> None:
        command = ["setpriv", *self._other, "--", self._home / program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
        if done.returncode != 0:
            raise RuntimeError(f"{program}: {done.stdout[-1000:]}{done.stderr[-1000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
