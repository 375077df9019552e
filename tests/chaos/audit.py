"""What the ledger itself says, told apart from what it answers: triggers that keep every move, and plain reading.

A trigger writes in the transaction of the move it tells of. So the tables here hold each change of a request's state
that has ever been committed, by whatever scheduler, with its time.
"""

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
NOW_IN_SQLITE = "(julianday('now') - 2440587.5) * 86400.0"
IN_SQLITE = f"""
CREATE TABLE IF NOT EXISTS chaos_moves (n INTEGER PRIMARY KEY AUTOINCREMENT, at REAL, request TEXT, old TEXT, new TEXT,
    attempt INTEGER, worker TEXT, token TEXT);
CREATE TABLE IF NOT EXISTS chaos_happenings (n INTEGER PRIMARY KEY AUTOINCREMENT, at REAL, what TEXT, request TEXT,
    attempt INTEGER, worker TEXT, detail TEXT);
CREATE TRIGGER IF NOT EXISTS chaos_accept AFTER INSERT ON requests BEGIN
    INSERT INTO {MOVES} VALUES ({NOW_IN_SQLITE}, new.id, NULL, new.state, new.attempt, NULL, NULL); END;
CREATE TRIGGER IF NOT EXISTS chaos_move AFTER UPDATE ON requests WHEN old.state IS NOT new.state BEGIN
    INSERT INTO {MOVES} VALUES ({NOW_IN_SQLITE}, new.id, old.state, new.state, new.attempt, new.worker, new.token); END;
CREATE TRIGGER IF NOT EXISTS chaos_gone AFTER DELETE ON requests BEGIN
    INSERT INTO {MOVES} VALUES ({NOW_IN_SQLITE}, old.id, old.state, NULL, old.attempt, old.worker, old.token); END;
CREATE TRIGGER IF NOT EXISTS chaos_abort AFTER UPDATE ON requests WHEN old.abort IS NULL AND new.abort IS NOT NULL BEGIN
    INSERT INTO {HAPPENINGS} VALUES ({NOW_IN_SQLITE}, 'abort', new.id, new.attempt, new.worker, old.state); END;
CREATE TRIGGER IF NOT EXISTS chaos_ended AFTER UPDATE ON attempts
    WHEN old.result IS NULL AND new.result IS NOT NULL BEGIN
    INSERT INTO {HAPPENINGS} VALUES ({NOW_IN_SQLITE}, 'ended', new.request, new.number, new.worker, new.result); END;
CREATE TRIGGER IF NOT EXISTS chaos_changed AFTER UPDATE ON attempts
    WHEN old.result IS NOT NULL AND old.result IS NOT new.result BEGIN
    INSERT INTO {HAPPENINGS} VALUES ({NOW_IN_SQLITE}, 'changed', new.request, new.number, new.worker, new.result); END;
CREATE TRIGGER IF NOT EXISTS chaos_late AFTER UPDATE ON attempts WHEN old.late IS NULL AND new.late IS NOT NULL BEGIN
    INSERT INTO {HAPPENINGS} VALUES ({NOW_IN_SQLITE}, 'late', new.request, new.number, new.worker, NULL); END;
CREATE TRIGGER IF NOT EXISTS chaos_term AFTER UPDATE ON meta WHEN new.key = 'term' BEGIN
    INSERT INTO {HAPPENINGS} VALUES ({NOW_IN_SQLITE}, 'term', NULL, new.value, NULL, NULL); END;
"""  # noqa: S608  # constants


class Audit:
    """Look at a pool's ledger from outside, by its URL."""

    def __init__(self, url):
        self.url = url
        self.file = Path(urlsplit(url).path) if url.startswith("sqlite") else None
        # A reader takes no lock that a writer waits for.
        self._engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)

    def install(self, seconds=60.0):
        """Wait for the ledger's tables, and watch them."""
        deadline = time.monotonic() + seconds
        while not self._has_tables():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no scheduler has made its tables in {self.url} within {seconds:g} s")
            time.sleep(0.05)
        with closing(sqlite3.connect(self.file, timeout=30)) as connection:
            connection.executescript(IN_SQLITE)

    def _has_tables(self):
        if self.file is not None and not self.file.exists():
            return False
        return {"requests", "attempts", "meta"} <= {*sqlalchemy.inspect(self._engine).get_table_names()}

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
        """Keep the ledger from committing until an event is set."""
        with closing(sqlite3.connect(self.file, timeout=30, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            over()
            connection.execute("ROLLBACK")

    def _rows(self, query):
        with self._engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sqlalchemy.text(query))]
