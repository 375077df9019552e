"""What the ledger itself says, told apart from what it answers: triggers that keep every move, and plain reading.

A trigger writes in the transaction of the move it tells of. So the tables here hold each change of a request's state
that has ever been committed, by whatever scheduler, with its time.
"""

import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import sqlalchemy

TABLES = {
    "requests": "SELECT id, seq, task, state, attempt, tried, worker, token, abort, priority, grp, submitted, granted,"
    " ended, reason, body FROM requests",
    "attempts": "SELECT request, number, worker, token, granted, started, ended, result, counted, reason, late"
    " FROM attempts",
    "artifacts": "SELECT id, request, attempt, category, name FROM artifacts",
    "files": "SELECT artifact, size, sha256 FROM artifact_files",
    "moves": "SELECT n, at, request, old, new, attempt, worker, token FROM chaos_moves ORDER BY n",
    "happenings": "SELECT n, at, what, request, attempt, worker, detail FROM chaos_happenings ORDER BY n",
}
MOVES = "chaos_moves (at, request, old, new, attempt, worker, token)"
HAPPENINGS = "chaos_happenings (at, what, request, attempt, worker, detail)"
COLUMNS = {
    "chaos_moves": "at FLOAT, request TEXT, old TEXT, new TEXT, attempt INTEGER, worker TEXT, token TEXT",
    "chaos_happenings": "at FLOAT, what TEXT, request TEXT, attempt INTEGER, worker TEXT, detail TEXT",
}
# Name, event, table, condition, where it is written and what; `{now}` is the database's clock.
TRIGGERS = (
    ("accept", "INSERT", "requests", None, MOVES, "new.id, NULL, new.state, new.attempt, NULL, NULL"),
    (
        "move",
        "UPDATE",
        "requests",
        "old.state <> new.state",
        MOVES,
        "new.id, old.state, new.state, new.attempt, new.worker, new.token",
    ),
    ("gone", "DELETE", "requests", None, MOVES, "old.id, old.state, NULL, old.attempt, old.worker, old.token"),
    (
        "abort",
        "UPDATE",
        "requests",
        "old.abort IS NULL AND new.abort IS NOT NULL",
        HAPPENINGS,
        "'abort', new.id, new.attempt, new.worker, old.state",
    ),
    (
        "ended",
        "UPDATE",
        "attempts",
        "old.result IS NULL AND new.result IS NOT NULL",
        HAPPENINGS,
        "'ended', new.request, new.number, new.worker, new.result",
    ),
    (
        "changed",
        "UPDATE",
        "attempts",
        "old.result IS NOT NULL AND (new.result IS NULL OR old.result <> new.result)",
        HAPPENINGS,
        "'changed', new.request, new.number, new.worker, new.result",
    ),
    (
        "late",
        "UPDATE",
        "attempts",
        "old.late IS NULL AND new.late IS NOT NULL",
        HAPPENINGS,
        "'late', new.request, new.number, new.worker, NULL",
    ),
)
TERMS = {  # as the ledger keeps its term
    "leader": ("term", "UPDATE", "leader", "old.term <> new.term", HAPPENINGS, "'term', NULL, new.term, NULL, NULL"),
    "meta": ("term", "UPDATE", "meta", "new.key = 'term'", HAPPENINGS, "'term', NULL, new.value, NULL, NULL"),
}


def _in_sqlite(triggers):
    for table, columns in COLUMNS.items():
        yield f"CREATE TABLE IF NOT EXISTS {table} (n INTEGER PRIMARY KEY AUTOINCREMENT, {columns})"
    for name, event, table, when, into, values in triggers:
        condition = "" if when is None else f" WHEN {when}"
        now = "(julianday('now') - 2440587.5) * 86400.0"
        yield (
            f"CREATE TRIGGER IF NOT EXISTS chaos_{name} AFTER {event} ON {table}{condition}"  # noqa: S608  # constants
            f" BEGIN INSERT INTO {into} VALUES ({now}, {values}); END"
        )


def _in_postgresql(triggers):
    for table, columns in COLUMNS.items():
        yield f"CREATE TABLE IF NOT EXISTS {table} (n BIGSERIAL PRIMARY KEY, {columns})"
    for name, event, table, when, into, values in triggers:
        condition = "" if when is None else f" WHEN ({when})"
        now = "extract(epoch FROM clock_timestamp())"
        yield (
            f"CREATE OR REPLACE FUNCTION chaos_{name}() RETURNS trigger LANGUAGE plpgsql AS $$"  # noqa: S608  # constants
            f" BEGIN INSERT INTO {into} VALUES ({now}, {values}); RETURN NULL; END $$"
        )
        yield (
            f"CREATE OR REPLACE TRIGGER chaos_{name} AFTER {event} ON {table} FOR EACH ROW{condition}"
            f" EXECUTE FUNCTION chaos_{name}()"
        )


class Audit:
    """Look at a pool's ledger from outside, by its URL."""

    def __init__(self, url):
        self.url = url
        self.file = Path(urlsplit(url).path) if url.startswith("sqlite") else None
        # A reader takes no lock that a writer waits for.
        self._engine = sqlalchemy.create_engine(
            url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sqlalchemy.NullPool
        )

    def install(self, seconds=60.0):
        """Wait for the ledger's tables, and watch them."""
        deadline = time.monotonic() + seconds
        while not (tables := self._tables()) >= {"requests", "attempts"}:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no scheduler has made its tables within {seconds:g} s")
            time.sleep(0.05)
        triggers = [*TRIGGERS, TERMS["leader" if "leader" in tables else "meta"]]
        if self.file is not None:
            with closing(sqlite3.connect(self.file, timeout=30)) as connection:
                connection.executescript("BEGIN IMMEDIATE;" + ";\n".join(_in_sqlite(triggers)) + ";\nCOMMIT;")
            return
        with self._engine.begin() as connection:
            for statement in _in_postgresql(triggers):
                connection.exec_driver_sql(statement)

    def _tables(self):
        if self.file is not None and not self.file.exists():
            return set()
        try:
            return {*sqlalchemy.inspect(self._engine).get_table_names()}
        except sqlalchemy.exc.OperationalError:  # it is just being made
            return set()

    def active(self):
        """Return the pid of the active scheduler; None: nobody, or it cannot be told."""
        if self.file is not None:
            return None
        [[holder]] = self._rows("SELECT holder FROM renewals")
        found = re.match(r"process (\d+) on ", holder or "")
        return int(found[1]) if found else None

    def session(self):
        """Return the pid of the database's process that serves the active scheduler."""
        rows = self._rows("SELECT pid FROM pg_stat_activity WHERE application_name = 'mqworker scheduler' LIMIT 1")
        return rows[0][0] if rows else None

    def counts(self):
        """Return the number of requests by state, and the number of attempts by result."""
        states = dict(self._rows("SELECT state, count(*) FROM requests GROUP BY state"))
        results = dict(self._rows("SELECT result, count(*) FROM attempts GROUP BY result"))
        return states, results

    def tables(self):
        """Return every row of every table that the check looks at, as dictionaries."""
        with self._engine.connect() as connection:
            return {
                name: [dict(row) for row in connection.execute(sqlalchemy.text(query)).mappings()]
                for name, query in TABLES.items()
            }

    def newest(self):
        """Return the numbers of the newest move and happening."""
        [[move, happening]] = self._rows(
            "SELECT (SELECT coalesce(max(n), 0) FROM chaos_moves), (SELECT coalesce(max(n), 0) FROM chaos_happenings)"
        )
        return move, happening

    def stall(self, over):
        """Keep the ledger from committing until a call returns."""
        if self.file is not None:
            with closing(sqlite3.connect(self.file, timeout=30, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                over()
                connection.execute("ROLLBACK")
            return
        with self._engine.connect() as connection:
            connection.exec_driver_sql("LOCK TABLE requests IN EXCLUSIVE MODE")
            over()
            connection.rollback()

    def _rows(self, query):
        with self._engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sqlalchemy.text(query))]
