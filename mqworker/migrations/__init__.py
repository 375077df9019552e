"""The ledger's schema over time: made in an empty database, brought up to date in an older one, refused in others.

Works in the transaction that it is given, so that a half-made schema is none. Knows no engine but by its name.
"""

import logging
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, inspect, select
from sqlalchemy.dialects import sqlite

from mqworker import schema
from mqworker.errors import LedgerInvalid

# What it does is told by who asked for it, once and in our words.
logging.getLogger("alembic").setLevel(logging.WARNING)

EVER: Final = frozenset({"requests", "attempts", "artifacts", "imports"})  # tables of every version
FIRST: Final = EVER | {"meta"}  # of the time before Alembic
FIRST_SCHEMA: Final = 2  # as that time called the schema of revision 0001


def revision(connection: Connection, name: str) -> str | None:
    """Return which schema a database has; None: it is empty. `name` is the ledger's, for errors.

    Raises:
        LedgerInvalid: the database is of something else, or its ledger is too old or too new for this mqworker.
    """
    tables = {*inspect(connection).get_table_names()}
    ours = {*schema.schema.tables, schema.revisions.name, *FIRST} & tables
    if not ours and (not tables or connection.dialect.name != sqlite.dialect.name):
        return None  # a schema of PostgreSQL may be shared with others, as long as no name is taken
    if schema.revisions.name in tables and tables >= EVER:
        found = connection.scalar(select(schema.revisions.c.version_num))
        if found not in _known():
            raise LedgerInvalid(
                f"expected {name} to have the schema {schema.REVISION} or an older one, got the schema {found}, which "
                "a newer mqworker made; use that one, or a backup from before it"
            )
        return str(found)
    if schema.revisions.name not in tables and tables >= FIRST:
        meta = {str(row.key): row.value for row in connection.exec_driver_sql("SELECT key, value FROM meta")}
        if meta.get("schema") == FIRST_SCHEMA and "term" in meta:
            return "0001"
        raise LedgerInvalid(
            f"expected {name} to have schema {FIRST_SCHEMA} or a later one, got schema "
            f"{meta.get('schema', 'unknown')}; use the mqworker that wrote it, or another ledger"
        )
    raise LedgerInvalid(
        f"expected {name} to be a ledger or empty, got a database of something else, with the tables "
        f"{', '.join(sorted(tables)[:5])}; name another one"
    )


def bring_up(connection: Connection, name: str) -> str | None:
    """Give a database this version's schema; return which one it had, and None if it was empty.

    Raises:
        LedgerInvalid: see `revision`.
    """
    before = revision(connection, name)
    if before is None:
        schema.schema.create_all(connection)
        _stamp(connection, schema.REVISION)
        connection.execute(schema.leader.insert().values(one=1, term=0, commits=0))
        connection.execute(schema.renewals.insert().values(one=1, term=0, at=0.0))
    elif before != schema.REVISION:
        if not inspect(connection).has_table(schema.revisions.name):
            _stamp(connection, before)
        upgrade(connection, schema.REVISION)
    return before


def upgrade(connection: Connection, to: str) -> None:
    """Run the migrations from a database's schema to another one, in the transaction that is open."""
    from alembic import command  # noqa: PLC0415  # slow to load, and hardly ever needed
    from alembic.config import Config  # noqa: PLC0415  # likewise

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    command.upgrade(config, to)


def _stamp(connection: Connection, to: str) -> None:
    schema.revisions.create(connection, checkfirst=True)
    connection.execute(schema.revisions.delete())
    connection.execute(schema.revisions.insert().values(version_num=to))


def _known() -> frozenset[str]:
    """Return the revisions that this version knows: they are numbered."""
    return frozenset(f"{number:04}" for number in range(1, int(schema.REVISION) + 1))
