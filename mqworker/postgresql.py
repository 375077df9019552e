"""A ledger in PostgreSQL: one scheduler is elected, by a term that every transaction checks; others stand by.

Two sessions: one reads and writes; the other only says, from a thread of its own, that the scheduler lives.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import URL, Connection, Float, bindparam, cast, create_engine, exc, extract, func, select, text, update
from sqlalchemy.pool import StaticPool

from mqworker import migrations
from mqworker.database import Database
from mqworker.errors import LedgerInvalid, LedgerLocked, LedgerLost, LedgerUnavailable, MqworkerError, SettingsError
from mqworker.processes import boottime_ns
from mqworker.schema import leader, renewals

RENEWAL_SECONDS: Final = 2.0  # how often the active scheduler says that it lives
STALE_SECONDS: Final = 6.0  # after so long without a word of it, another one is elected
SURE_SECONDS: Final = 5.0  # after so long it asks before it says anything
CONNECT_SECONDS: Final = 5
LOCK_SECONDS: Final = 5  # nobody else writes, but an administrator may hold a table for a moment
IDLE_SECONDS: Final = 60  # after so long in the middle of a transaction, the database ends a session whose owner froze
DEAD_SECONDS: Final = 30  # after so long without a word from the host of the database, a connection counts as cut
ELECTION: Final = 0x6D71776F726B6572  # "mqworker": of the lock that one election holds

_now = cast(extract("epoch", func.clock_timestamp()), Float)
_OPTIONS: Final = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": DEAD_SECONDS * 1000,
    "connect_timeout": CONNECT_SECONDS,
    "client_encoding": "utf8",
    "application_name": "mqworker scheduler",
}
# Each of our questions has an index, but the statistics that PostgreSQL plans by lag far behind a backlog that grows by
# thousands of requests a second: left to itself, it reads all of them. It would also compile what it thinks is dear.
_SETTINGS: Final = (
    ("enable_seqscan", "off"),
    ("jit", "off"),
    ("lock_timeout", f"{LOCK_SECONDS}s"),
    ("idle_in_transaction_session_timeout", f"{IDLE_SECONDS}s"),
    ("statement_timeout", "0"),
)

_judge = select(renewals.c.term, renewals.c.holder, func.abs(_now - renewals.c.at).label("age"))
_elect = (
    update(leader)
    .values(term=leader.c.term + 1, session=bindparam("pid"), session_began=bindparam("began"))
    .returning(leader.c.term)
)
_enter = update(renewals).values(term=bindparam("term"), holder=bindparam("holder"), at=_now)
_renew = update(renewals).where(renewals.c.term == bindparam("mine")).values(at=_now)
_count = (
    update(leader)
    .where(leader.c.term == bindparam("mine"))
    .values(commits=leader.c.commits + 1)
    .returning(leader.c.commits)
)
_counted = select(leader.c.commits).where(leader.c.term == bindparam("mine"))

# Of the session that the leader's row names; a process number alone may be somebody else's by now.
_END_SESSION: Final = """
    SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity AS a
    JOIN leader ON leader.session = a.pid AND leader.session_began = extract(epoch FROM a.backend_start)::float8
    WHERE a.pid != pg_backend_pid()
"""
_MY_SESSION: Final = """
    SELECT pid, extract(epoch FROM backend_start)::float8 AS began FROM pg_stat_activity WHERE pid = pg_backend_pid()
"""

# What a code of an error (SQLSTATE) means for the ledger; the longest beginning counts.
_CODES: Final[dict[str, tuple[type[MqworkerError], str]]] = {
    "08": (LedgerUnavailable, "see whether the database runs, and the network to it"),
    "25006": (LedgerUnavailable, "the database may only be read: name the primary server, and not a replica"),
    "25P": (LedgerUnavailable, "the database has ended a transaction that stood still"),
    "28": (LedgerInvalid, "correct user and password in the ledger's URL, or the server's pg_hba.conf"),
    "3D": (LedgerInvalid, "make the database, or name another one"),
    "3F": (LedgerInvalid, "make the schema that the URL names"),
    "40": (LedgerUnavailable, "somebody else works in the ledger's tables"),
    "42501": (LedgerInvalid, "make the ledger's user the owner of its tables, or grant what is missing"),
    "53": (LedgerUnavailable, "free disk, memory or connections of the database's server"),
    "53100": (LedgerUnavailable, "free space on the disk of the database's server"),
    "53300": (LedgerUnavailable, "raise max_connections of the database's server, or end what uses them up"),
    "55P03": (LedgerUnavailable, "somebody else holds a table of the ledger: end that"),
    "57": (LedgerUnavailable, "the database stops, starts, or an administrator has ended the session"),
    "58": (LedgerUnavailable, "look at the disk of the database's server"),
    "XX001": (LedgerInvalid, "bring back a backup"),
    "XX002": (LedgerInvalid, "bring back a backup"),
}
# A refusal at the door has no code, only words.
_REFUSALS: Final = (
    "authentication failed",
    "pg_hba.conf",
    "does not exist",
    "no password supplied",
    "not permitted",
    "permission denied",
    "does not support SSL",
    "certificate verify failed",
)


class PostgresqlDatabase(Database):
    """Write a database of PostgreSQL for as long as nobody else was elected: see `Database`."""

    def __init__(self, url: URL) -> None:
        self._connecting = _connecting(url)
        engine = create_engine("postgresql+psycopg://", creator=self._connect, poolclass=StaticPool)
        super().__init__(
            f"the ledger {url.set(query={}).render_as_string(hide_password=True)}",
            engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True),
            engine,
        )
        self._number = 0
        self._renewed = 0.0  # when the newest renewal that was answered was sent, by the clock that never stops
        self._lost = False
        self._leaving = threading.Event()
        self._renewing: threading.Thread | None = None

    @classmethod
    def open(cls, url: URL) -> "PostgresqlDatabase":
        """Be elected, make the tables if there are none, and go on renewing the term in a thread.

        Raises:
            LedgerLocked: another scheduler is active.
            LedgerInvalid: it is no ledger, of another schema, or may not be read and written.
            LedgerUnavailable: the database cannot commit now.
            SettingsError: psycopg is missing, or does not know an option of the URL.
        """
        database = cls(url)
        try:
            database._begin()
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
        database = cls(url)
        try:
            with database.trial() as connection:
                database._look(connection)
                found = migrations.bring_up(connection, database.name)
        finally:
            database.close()
        return database.name, found

    # ------------------------------------------------------------ election

    def _begin(self) -> None:
        began = _steady()
        with self.explained(), self._writing.begin() as connection:
            if self._look(connection):
                connection.execute(text(_END_SESSION))
                connection.execute(select(leader).with_for_update())
            self.found = migrations.bring_up(connection, self.name)
            session = connection.execute(text(_MY_SESSION)).one()
            term = connection.scalar(_elect, {"pid": session.pid, "began": session.began})
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            connection.execute(_enter, {"term": term, "holder": holder})
        self.term, self._renewed = term, began
        self._renewing = threading.Thread(target=self._renew, name="term", daemon=True)
        self._renewing.start()

    def _look(self, connection: Connection) -> bool:
        """Make sure that nobody is active, nor just being elected; return whether anybody ever was."""
        if not connection.scalar(select(func.pg_try_advisory_xact_lock(ELECTION))):
            raise LedgerLocked(f"expected {self.name} to be free, but another scheduler is just being elected for it")
        if migrations.revision(connection, self.name) in {None, "0001"}:  # they have no leader
            return False
        last = connection.execute(_judge).one()
        if last.holder is not None and last.age < STALE_SECONDS:
            raise LedgerLocked(
                f"expected to be the only scheduler of {self.name}, but {last.holder} is active and said so "
                f"{last.age:.1f} s ago (term {last.term}); stop that one, or stand by until it is gone"
            )
        return True

    def _renew(self) -> None:
        """Say that this scheduler lives, until it leaves. What cannot be said makes it unsure: see `sure`."""
        import psycopg  # noqa: PLC0415  # of an extra

        leaving = False
        connection = None
        while not leaving:
            leaving = self._leaving.wait(RENEWAL_SECONDS)
            began = _steady()
            try:
                if connection is None:
                    connection = psycopg.connect(
                        **self._connecting
                        | {
                            "autocommit": True,
                            "application_name": "mqworker scheduler's term",
                            "tcp_user_timeout": CONNECT_SECONDS * 1000,
                        },
                    )
                    connection.execute(f"SET statement_timeout = '{CONNECT_SECONDS}s'")
                if leaving:
                    connection.execute(
                        "UPDATE renewals SET at = 0, holder = NULL WHERE term = %s", [self.term], prepare=False
                    )
                elif connection.execute(_RENEW, [self.term]).rowcount == 1:
                    self._renewed = began
                else:
                    self._lost = leaving = True
            except psycopg.Error:
                with contextlib.suppress(psycopg.Error):  # it is cut, and another one is made
                    if connection is not None:
                        connection.close()
                connection = None
        if connection is not None:
            connection.close()

    @property
    def sure(self) -> bool:
        """Tell whether nobody else can have been elected yet."""
        return not self._lost and _steady() - self._renewed < SURE_SECONDS

    def confirm(self) -> None:
        """Renew the term here and now."""
        began = _steady()
        with self.explained(), self._writing.begin() as connection:
            if connection.execute(_renew, {"mine": self.term}).rowcount != 1:
                raise self._loss()
        self._renewed = began

    def _loss(self) -> LedgerLost:
        return LedgerLost(
            f"expected to be the scheduler of {self.name} in term {self.term}, but another one was elected since; "
            "what this one still had in hand does not count"
        )

    # ------------------------------------------------------------ sessions and transactions

    def _connect(self) -> Any:
        """Begin a session. If it follows another one of this term, that is over, and what it did is known."""
        import psycopg  # noqa: PLC0415  # of an extra

        connection = psycopg.connect(**self._connecting, autocommit=True)
        try:
            _set_up(connection, self.name)
            if self.term:
                connection.execute(f"{_END_SESSION} AND leader.term = %s", [self.term])  # else it is another's
                [session] = connection.execute(_MY_SESSION)
                resumed = connection.execute(  # waits for what the session before it may still commit
                    "UPDATE leader SET session = %s, session_began = %s WHERE term = %s", [*session, self.term]
                )
                if resumed.rowcount != 1:
                    raise self._loss()  # noqa: TRY301  # what ends the session is the same for all that goes wrong
            connection.autocommit = False
        except BaseException:
            connection.close()
            raise
        return connection

    @property
    def number(self) -> int:
        """Return the number of the newest transaction that was begun."""
        return self._number

    def has(self, number: int) -> bool:
        """Tell whether a transaction was committed, by what the leader's row counts."""
        with self.explained(), self._writing.begin() as connection:
            commits = connection.scalar(_counted, {"mine": self.term})
        if commits is None:
            raise self._loss()
        return bool(commits >= number)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Write in one transaction, which counts in the leader's row."""
        with self.explained(), self._writing.begin() as connection:
            commits = connection.scalar(_count, {"mine": self.term})
            if commits is None:
                raise self._loss()
            self._number = commits
            yield connection

    def close(self) -> None:
        """End the sessions, and let the next one be elected at once; a second time does nothing."""
        super().close()
        self._leaving.set()
        if self._renewing is not None:
            self._renewing.join(2 * CONNECT_SECONDS)  # a database that hangs finds out by itself
            self._renewing = None

    def explain(self, error: exc.DBAPIError) -> MqworkerError | None:
        """Return what an error of PostgreSQL means."""
        code = getattr(error.orig, "sqlstate", None)
        said = " ".join(str(error.orig).split())
        if code is None and isinstance(error, exc.ProgrammingError):
            return SettingsError(f"expected options that PostgreSQL knows in the URL of {self.name}, got: {said}")
        if code is None and isinstance(error, exc.OperationalError):
            if any(words in said for words in _REFUSALS):
                return LedgerInvalid(f"expected to be let into {self.name}, but: {said}; {_CODES['28'][1]}")
            return LedgerUnavailable(f"{self.name} cannot commit now: {said}; {_CODES['08'][1]}")
        for length in (5, 3, 2):
            kind, advice = _CODES.get((code or "")[:length], (None, ""))
            if kind is LedgerUnavailable:
                return kind(f"{self.name} cannot commit now: {said}; {advice}")
            if kind is not None:
                return kind(f"expected {self.name} to be readable and writable, but: {said}; {advice}")
        return None


_RENEW: Final = "UPDATE renewals SET at = extract(epoch FROM clock_timestamp()) WHERE term = %s"


def _steady() -> float:
    return boottime_ns() / 1e9


def _connecting(url: URL) -> dict[str, Any]:
    """Return what a session is opened with.

    Raises:
        SettingsError: psycopg is missing, or the URL names no database.
    """
    try:
        from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg  # noqa: PLC0415  # of an extra

        dialect: Any = PGDialect_psycopg  # untyped
        dialect.import_dbapi()
    except ImportError as error:
        raise SettingsError(
            f"expected the package psycopg for a ledger in PostgreSQL, but: {error}; pip install 'mqworker[postgresql]'"
        ) from error
    if not url.database:
        raise SettingsError(
            "expected a ledger's URL like postgresql://USER:PASSWORD@HOST:5432/DATABASE, got "
            f"{url.set(query={}).render_as_string(hide_password=True)}; name the database"
        )
    _, given = dialect().create_connect_args(url)
    return {**_OPTIONS, **given}


def _set_up(connection: Any, name: str) -> None:
    settings = ", ".join(f"set_config('{setting}', '{value}', false)" for setting, value in _SETTINGS)
    connection.execute(f"SELECT {settings}")
    durable, encoding = connection.execute(
        "SELECT current_setting('synchronous_commit'), current_setting('server_encoding')"
    ).fetchone()
    if durable == "off":  # else it may be more than we need, and is left alone
        connection.execute("SET synchronous_commit = 'on'")
    if encoding != "UTF8":
        raise LedgerInvalid(
            f"expected {name} to be a database in UTF8, got one in {encoding}; make one with ENCODING 'UTF8'"
        )
