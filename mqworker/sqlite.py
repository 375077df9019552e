"""A ledger in an SQLite file, or in memory: one scheduler at a time, by a lock beside the file."""

import errno
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, select, update
from sqlalchemy.pool import StaticPool

from mqworker import migrations
from mqworker.database import Database
from mqworker.errors import LedgerInvalid, LedgerLocked, LedgerUnavailable, MqworkerError, SettingsError
from mqworker.schema import leader

BUSY_TIMEOUT: Final = 5.0  # seconds; nobody else writes, but a backup may hold the file for a moment
CACHE_KIB: Final = 64 * 1024  # ids are random, so each acceptance touches its own page of their index


class SqliteDatabase(Database):
    """Write an SQLite file, which nobody else does: see `Database`."""

    def __init__(self, name: str, engine: Engine, lock: int | None) -> None:
        super().__init__(
            name, engine.execution_options(begin="BEGIN"), engine.execution_options(begin="BEGIN IMMEDIATE")
        )
        self._lock = lock

    @classmethod
    def open(cls, url: URL) -> "SqliteDatabase":
        """Open the file, make it if there is none, and raise its term by one.

        Raises:
            LedgerLocked: another scheduler has it open.
            LedgerInvalid: it is no ledger, of another schema, or may not be read and written.
            LedgerUnavailable: the database cannot commit now.
            SettingsError: the URL has more than a path.
        """
        database = cls._take(url)
        try:
            with database.transaction() as connection:
                database.found = migrations.bring_up(connection, database.name)
                database.term = connection.execute(select(leader.c.term)).scalar_one() + 1
                connection.execute(update(leader).values(term=database.term))
        except BaseException:
            database.close()
            raise
        return database

    @classmethod
    def check(cls, url: URL) -> tuple[str, str | None]:
        """Do what opening does, and undo it; return the ledger's name and its schema (None: there is nothing yet).

        Raises:
            MqworkerError: as `open` does.
        """
        database = cls._take(url)
        try:
            with database.trial() as connection:
                found = migrations.bring_up(connection, database.name)
        finally:
            database.close()
        return database.name, found

    @classmethod
    def _take(cls, url: URL) -> "SqliteDatabase":
        path = _path(url)
        lock = None if path is None else _take_lock(path)
        name = "the ledger in memory" if path is None else f"the ledger {path}"
        # One connection for life: there is one writer, and a second would not see a database in memory.
        engine = create_engine(
            "sqlite://",
            creator=lambda: _connect(":memory:" if path is None else str(path), name),
            poolclass=StaticPool,
            query_cache_size=200,
        )

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

        return cls(name, engine, lock)

    @property
    def sure(self) -> bool:
        """Tell that nobody else was elected: the lock is ours."""
        return True

    @property
    def number(self) -> int:
        """Return nothing of use: a commit that fails here is undone."""
        return 0

    def confirm(self) -> None:
        """Do nothing: the lock is ours."""

    def has(self, number: int) -> bool:  # noqa: ARG002  # PostgreSQL needs it
        """Tell that what was not answered was not committed."""
        return False

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Write in one transaction."""
        with self.explained(), self._writing.begin() as connection:
            yield connection

    def close(self) -> None:
        """Let go of the file and its lock; a second time does nothing."""
        super().close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def explain(self, error: exc.DBAPIError) -> MqworkerError | None:
        """Return what an error of SQLite means."""
        code = getattr(error.orig, "sqlite_errorcode", None)
        primary = None if code is None else code & 0xFF  # extended codes carry their primary one in the low byte
        if primary in {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_FORMAT}:
            return LedgerInvalid(
                f"expected {self.name} to be an SQLite database, got one that cannot be read ({error.orig}); "
                "name another file, or bring back a backup"
            )
        if isinstance(error, exc.OperationalError) and primary != sqlite3.SQLITE_ERROR:
            return LedgerUnavailable(
                f"{self.name} cannot commit now: {error.orig}; nothing was written. "
                "Free space on its disk, and end what else holds the file open"
            )
        return None


def _path(url: URL) -> Path | None:
    """Return the file that a ledger's URL names; None: memory."""
    if url.host is not None or url.query:
        raise SettingsError(
            "expected a ledger's URL like sqlite:////var/lib/mqworker/ledger.db, got "
            f"{url.render_as_string(hide_password=True)}; an SQLite file has no host and takes no parameters"
        )
    if url.database in (None, "", ":memory:"):
        return None
    return Path(os.path.realpath(url.database))  # so that two names of one file meet at one lock


def _take_lock(path: Path) -> int:
    """Take the lock beside a ledger and write the pid into it; it is held until the descriptor closes."""
    lock_path = f"{path}.lock"
    if path.is_dir():
        raise LedgerInvalid(f"expected a file for the ledger, got the directory {path}; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _explain_os(error, path) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise LedgerLocked(
            f"expected to be the only scheduler of the ledger {path}, but process {holder} holds {lock_path}; "
            "stop that scheduler, or use another ledger"
        ) from error
    except OSError as error:
        os.close(lock)
        raise _explain_os(error, path) from error
    return lock


def _explain_os(error: OSError, path: Path) -> MqworkerError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO}:
        return LedgerUnavailable(
            f"the ledger {path} cannot be written now: {error}; free space there, or look at its disk"
        )
    return LedgerInvalid(
        f"expected a path for the ledger where this user may make files, got {path}: {error}; "
        "name another path, or give this user the right to write there"
    )


def _connect(database: str, name: str) -> sqlite3.Connection:
    """Open the database file, make sure that it is ours before anything in it is changed, and set it up."""
    connection = sqlite3.connect(database, timeout=BUSY_TIMEOUT, check_same_thread=False)
    try:
        _set_up(connection, name)
    except BaseException:
        connection.close()
        raise
    return connection


def _set_up(connection: sqlite3.Connection, name: str) -> None:
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and not tables >= migrations.EVER:  # before anything in it is changed
        raise LedgerInvalid(
            f"expected {name} to be a ledger or an empty file, got an SQLite database of something else; "
            "name another file"
        )
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode not in {"wal", "memory"}:
        raise LedgerInvalid(
            f"expected a file system that can keep a write-ahead log for {name}, got one that cannot "
            f"(journal mode {mode}); put the ledger on a local disk"
        )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute(f"PRAGMA cache_size = {-CACHE_KIB}")
