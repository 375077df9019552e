"""The ledger's tables and indexes, as data: what is kept, and which questions are answered without a search.

Knows no connection and no rule: what a state means stands in lifecycle, and who writes here is the ledger alone. A
change here is a change of the schema: it takes a migration too, and REVISION names the newest one.
"""

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    TextClause,
    TypeDecorator,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ColumnElement

from mqworker.lifecycle import FINAL, State

REVISION: Final = "0002"

schema: Final = MetaData()


class _PostgresText(TypeDecorator[str]):
    """Keep text that may hold a NUL, which PostgreSQL cannot keep: the sign for what cannot be shown stands for it."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002  # the overridden method has it
        """Return what is kept for a value."""
        return value.replace("\0", "\ufffd") if isinstance(value, str) and "\0" in value else value


# Sorted and compared by code point on both, as Python does it: whatever language the database was made for.
_TEXT: Final = String().with_variant(_PostgresText(collation="C"), "postgresql")
_WHOLE: Final = BigInteger().with_variant(Integer(), "sqlite")  # SQLite's Integer has 64 bits, too

# Which schema a database has, as Alembic keeps it.
revisions: Final = Table(
    "alembic_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)


class RequestsBy(TextClause):
    """Name the requests by an index of our choice where SQLite is asked: it would sort all that matches, each time."""

    inherit_cache = True

    def __init__(self, index: str) -> None:
        super().__init__(f"requests INDEXED BY {index}")


@compiles(RequestsBy, "postgresql")
def _without_index(_element: RequestsBy, _compiler: SQLCompiler, **_given: Any) -> str:
    return "requests"


def _index(name: str, *columns: ColumnElement[Any], where: ColumnElement[Any] | TextClause | None = None) -> Index:
    return Index(name, *columns, sqlite_where=where, postgresql_where=where)


# ---------------------------------------------------------------- who writes

# Which scheduler writes: one row. On PostgreSQL every set of writes counts in it, so each waits for the one before it.
leader = Table(
    "leader",
    schema,
    Column("one", Integer, primary_key=True, autoincrement=False),
    Column("term", _WHOLE, nullable=False),
    Column("commits", _WHOLE, nullable=False),  # sets of writes, ever
    Column("session", Integer),  # the process of the database that serves the scheduler
    Column("session_began", Float),
    CheckConstraint("one = 1", name="one_leader"),
)

# When that scheduler last said that it lives, by the database's clock; apart from `leader`, which a long set locks.
renewals = Table(
    "renewals",
    schema,
    Column("one", Integer, primary_key=True, autoincrement=False),
    Column("term", _WHOLE, nullable=False),
    Column("holder", _TEXT),  # host and process; None: it has taken its leave
    Column("at", Float, nullable=False),
    CheckConstraint("one = 1", name="one_renewal"),
)

# ---------------------------------------------------------------- requests

requests = Table(
    "requests",
    schema,
    Column("seq", _WHOLE, primary_key=True, autoincrement=False),  # its age
    Column("id", _TEXT, nullable=False, unique=True),
    Column("task", _TEXT, nullable=False),
    Column("content", _TEXT, nullable=False),  # sha256 of the canonical JSON of the Request without its id
    Column("requirement", _WHOLE),  # its requirement class; None: rejected
    Column("priority", Integer, nullable=False),  # the present one
    Column("grp", _TEXT, nullable=False),
    Column("ckey", _TEXT),
    Column("inputs", _TEXT, nullable=False),  # artifact ids that its data name, as JSON
    Column("unmet", Integer, nullable=False),  # requests that it still waits for
    Column("bound", _TEXT),  # JSON Pointer into the data to the id of the artifact put there, as JSON
    Column("state", _TEXT, nullable=False),
    Column("attempt", Integer, nullable=False),  # the newest, or the next if none runs
    Column("tried", Integer, nullable=False),  # attempts that ended and count
    Column("worker", _TEXT),
    Column("token", _TEXT),
    Column("abort", _TEXT),  # why it is to be stopped
    Column("not_before", Float),
    Column("expires_at", Float),  # it is aborted if it is not granted until then
    Column("submitted", Float, nullable=False),
    Column("submitter", _TEXT),  # the broker's user; None: the broker did not say
    Column("granted", Float),
    Column("ended", Float),
    Column("reason", _TEXT),  # a Reason as JSON
    Column("body", _TEXT, nullable=False),  # the Request as JSON, as it was submitted; last, since it can be long
    CheckConstraint(f"requirement IS NOT NULL OR state = '{State.REJECTED}'", name="all_but_rejected_have_one"),
)

# Written out, since a query is proven to fit a partial index from its text only, never from bound values.
IS_LIVE: Final = text(f"state IN ({', '.join(repr(str(state)) for state in State if state not in FINAL)})")
IS_PENDING: Final = text(f"state = '{State.PENDING}'")
IS_WAITING: Final = text(f"state = '{State.PENDING}' AND unmet = 0 AND not_before IS NULL")
IS_HELD: Final = text(
    f"state IN ('{State.OFFERED}', '{State.RUNNING}') OR state = '{State.PENDING}' AND not_before IS NOT NULL"
)
IS_EXPIRING: Final = text(f"state IN ('{State.PENDING}', '{State.OFFERED}') AND expires_at IS NOT NULL")

_r = requests.c
_index("requests_lanes", _r.requirement, _r.priority, _r.grp, _r.ckey, _r.seq, where=IS_WAITING)
_index("requests_held", _r.seq, where=IS_HELD)
_index("requests_members", _r.requirement, _r.priority.desc(), _r.seq, where=IS_PENDING)
_index("requests_expiring", _r.expires_at, where=IS_EXPIRING)
# Holds all that a selection can ask for, so that counting reads no request.
_index("requests_by_state", _r.state, _r.seq, _r.task, _r.grp, _r.submitted)
_index("requests_by_task", _r.task, _r.seq)
_index("requests_by_group", _r.grp, _r.seq)
_index("requests_by_worker", _r.worker, _r.seq, where=_r.worker.is_not(None))

# What is not met yet: a row goes when its request of `after` has ended, or when its dependent does not wait any more.
dependencies = Table(
    "dependencies",
    schema,
    Column("request", _WHOLE, ForeignKey("requests.seq"), primary_key=True),  # that waits
    Column("after", _TEXT, ForeignKey("requests.id"), primary_key=True),
    Column("need", _TEXT, nullable=False),
    sqlite_with_rowid=False,
)

_index("dependencies_by_after", dependencies.c.after)

requirements = Table(
    "requirements",
    schema,
    Column("id", _WHOLE, primary_key=True, autoincrement=False),
    Column("task", _TEXT, nullable=False),
    Column("fingerprint", _TEXT, nullable=False),
    Column("reads", _TEXT, nullable=False),  # JSON
    Column("data", _TEXT, nullable=False),  # JSON
    Column("requires", _TEXT),  # a JSON Schema
)

pauses = Table(
    "pauses",
    schema,
    Column("kind", _TEXT, primary_key=True),
    Column("name", _TEXT, primary_key=True),
    Column("reason", _TEXT, nullable=False),
    Column("since", Float, nullable=False),
    sqlite_with_rowid=False,
)

# Requests that were to be aborted before anybody knew them: the submission behind the abort arrives aborted, if one of
# those who asked may do that. Each user has a mark of its own, so that no stranger's takes the place of a rightful one.
abort_marks = Table(
    "abort_marks",
    schema,
    Column("id", _TEXT, primary_key=True),
    Column("user", _TEXT, primary_key=True),  # the broker's user that asked; "": the broker did not say
    Column("reason", _TEXT, nullable=False),
    Column("at", Float, nullable=False),
    Index("abort_marks_of_user", "user"),  # to count them
    sqlite_with_rowid=False,
)

# Whose a worker's name is: the broker's user that used it first.
worker_names = Table(
    "worker_names",
    schema,
    Column("name", _TEXT, primary_key=True),
    Column("user", _TEXT, nullable=False),
    Column("since", Float, nullable=False),
    sqlite_with_rowid=False,
)

# ---------------------------------------------------------------- what became of them

attempts = Table(
    "attempts",
    schema,
    Column("request", _TEXT, ForeignKey("requests.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("worker", _TEXT, nullable=False),
    Column("token", _TEXT, nullable=False),
    Column("granted", Float, nullable=False),
    Column("started", Float),
    Column("ended", Float),
    Column("result", _TEXT),
    Column("counted", Boolean(create_constraint=False), nullable=False),
    Column("reason", _TEXT),  # a Reason as JSON
    Column("late", _TEXT),  # an outcome that came after the attempt was lost, as JSON
    sqlite_with_rowid=False,
)

artifacts = Table(
    "artifacts",
    schema,
    Column("id", _WHOLE, primary_key=True),
    Column("request", _TEXT),  # with attempt: the run that made it; None: imported
    Column("attempt", Integer),
    Column("handle", _TEXT, nullable=False),
    Column("category", _TEXT, nullable=False),
    Column("name", _TEXT, nullable=False),
    Column("data", _TEXT, nullable=False),  # JSON
    Column("created", Float, nullable=False),
    ForeignKeyConstraint(["request", "attempt"], ["attempts.request", "attempts.number"]),
    sqlite_autoincrement=True,  # an id is never used twice: task data names artifacts by it
)

_index("artifacts_by_request", artifacts.c.request, artifacts.c.attempt)
_index("artifacts_by_category", artifacts.c.category, artifacts.c.id)

artifact_files = Table(
    "artifact_files",
    schema,
    Column("artifact", _WHOLE, ForeignKey("artifacts.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("path", _TEXT, nullable=False),
    Column("size", _WHOLE, nullable=False),
    Column("sha256", _TEXT, nullable=False),
    sqlite_with_rowid=False,
)

artifact_relations = Table(
    "artifact_relations",
    schema,
    Column("artifact", _WHOLE, ForeignKey("artifacts.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("type", _TEXT, nullable=False),
    Column("target", _WHOLE, ForeignKey("artifacts.id"), nullable=False),
    sqlite_with_rowid=False,
)

imports = Table(
    "imports",
    schema,
    Column("key", _TEXT, primary_key=True),
    Column("artifact", _WHOLE, ForeignKey("artifacts.id"), nullable=False),
    sqlite_with_rowid=False,
)
