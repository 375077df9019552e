"""What the ledger stands on: transactions of the one scheduler whose term it is, on whatever database.

Knows no request. Each kind of database keeps to this, and says in its own room how.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, Insert, Update, exc

from mqworker.errors import MqworkerError


class Many:
    """A statement for many rows.

    SQLAlchemy looks at each value of each row, which takes longer than SQLite does for the row. SQLite takes what we
    have as it is, so there the rows go to it at once; PostgreSQL does not take each text.
    """

    def __init__(self, statement: Insert | Update) -> None:
        self._statement = statement
        self._compiled: tuple[str, Sequence[str], Mapping[str, Any]] | None = None

    def execute(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> int:
        """Do it for rows that have all the same keys, and return how many rows of its table that concerned."""
        if connection.dialect.name != "sqlite":
            return connection.execute(self._statement, rows).rowcount
        if self._compiled is None:
            compiled = self._statement.compile(dialect=connection.dialect, column_keys=[*rows[0]])
            self._compiled = str(compiled), compiled.positiontup or (), compiled.params
        text, places, constant = self._compiled
        values = [tuple(map({**constant, **row}.__getitem__, places)) for row in rows]
        return connection.exec_driver_sql(text, values).rowcount


class Database(ABC):
    """Hold the one connection that writes, for as long as the term is ours. For one thread at a time.

    `name` is fit for showing: it has no password. `term` is 0 as long as nobody was elected.
    """

    def __init__(self, name: str, reading: Engine, writing: Engine) -> None:
        self.name = name
        self.term = 0
        self.found: str | None = None  # the schema that it had when it was opened; None: it was empty
        self._reading = reading
        self._writing = writing

    @property
    @abstractmethod
    def sure(self) -> bool:
        """Tell whether nobody else can have been elected yet; may be asked from any thread."""

    @property
    @abstractmethod
    def number(self) -> int:
        """Return the number of the newest transaction that was begun."""

    @abstractmethod
    def confirm(self) -> None:
        """Make sure that the term is still ours.

        Raises:
            LedgerLost: it is not.
            LedgerUnavailable: it cannot be told now.
        """

    @abstractmethod
    def has(self, number: int) -> bool:
        """Tell whether the transaction of a number was committed, if its commit was not answered.

        Raises:
            LedgerLost: the term is not ours any more, so that nobody can tell.
            LedgerUnavailable: it cannot be told now.
        """

    @abstractmethod
    def transaction(self) -> AbstractContextManager[Connection]:
        """Write in one transaction, which is undone if the term is not ours any more.

        Raises:
            LedgerLost: it is not; nothing was written.
            LedgerUnavailable: it cannot be committed now; nothing was written, unless only the answer to the commit
                was lost: see `has`.
        """

    @abstractmethod
    def explain(self, error: exc.DBAPIError) -> MqworkerError | None:
        """Return what a database's error means to whoever reads it; None: it is our own mistake."""

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """Read what is committed."""
        with self.explained(), self._reading.connect() as connection:
            yield connection

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say what a database's error means for the ledger, where it is known."""
        try:
            yield
        except exc.DBAPIError as error:
            explained = self.explain(error)
            if explained is None:
                raise
            raise explained from error

    @contextmanager
    def trial(self) -> Iterator[Connection]:
        """Write in a transaction that is undone."""
        with self.explained(), self._writing.connect() as connection:
            yield connection
            connection.rollback()

    def close(self) -> None:
        """Let go of the database and of the term; a second time does nothing."""
        self._writing.dispose()
