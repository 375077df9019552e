"""Revision 0001: the first schema that any release may have written, as it was before Alembic."""

from typing import Any

from alembic import op
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    text,
)

revision = "0001"
down_revision = None

_schema = MetaData()
_TEXT = String().with_variant(String(collation="C"), "postgresql")
_WHOLE = BigInteger().with_variant(Integer(), "sqlite")


def _where(condition: Any) -> dict[str, Any]:
    return {"sqlite_where": condition, "postgresql_where": condition}


Table("meta", _schema, Column("key", _TEXT, primary_key=True), Column("value", _WHOLE, nullable=False))

_requests = Table(
    "requests",
    _schema,
    Column("seq", _WHOLE, primary_key=True, autoincrement=False),
    Column("id", _TEXT, nullable=False, unique=True),
    Column("task", _TEXT, nullable=False),
    Column("content", _TEXT, nullable=False),
    Column("requirement", _WHOLE),
    Column("priority", Integer, nullable=False),
    Column("grp", _TEXT, nullable=False),
    Column("ckey", _TEXT),
    Column("inputs", _TEXT, nullable=False),
    Column("unmet", Integer, nullable=False),
    Column("bound", _TEXT),
    Column("state", _TEXT, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("tried", Integer, nullable=False),
    Column("worker", _TEXT),
    Column("token", _TEXT),
    Column("abort", _TEXT),
    Column("not_before", Float),
    Column("submitted", Float, nullable=False),
    Column("granted", Float),
    Column("ended", Float),
    Column("reason", _TEXT),
    Column("body", _TEXT, nullable=False),
    CheckConstraint("requirement IS NOT NULL OR state = 'rejected'", name="all_but_rejected_have_one"),
)

_IS_PENDING = text("state = 'pending'")
_IS_WAITING = text("state = 'pending' AND unmet = 0 AND not_before IS NULL")
_IS_HELD = text("state IN ('offered', 'running') OR state = 'pending' AND not_before IS NOT NULL")

_r = _requests.c
Index("requests_lanes", _r.requirement, _r.priority, _r.grp, _r.ckey, _r.seq, **_where(_IS_WAITING))
Index("requests_held", _r.seq, **_where(_IS_HELD))
Index("requests_members", _r.requirement, _r.priority.desc(), _r.seq, **_where(_IS_PENDING))
Index("requests_by_state", _r.state, _r.seq, _r.task, _r.grp, _r.submitted)
Index("requests_by_task", _r.task, _r.seq)
Index("requests_by_group", _r.grp, _r.seq)
Index("requests_by_worker", _r.worker, _r.seq, **_where(_r.worker.is_not(None)))

_dependencies = Table(
    "dependencies",
    _schema,
    Column("request", _WHOLE, ForeignKey("requests.seq"), primary_key=True),
    Column("after", _TEXT, ForeignKey("requests.id"), primary_key=True),
    Column("need", _TEXT, nullable=False),
    sqlite_with_rowid=False,
)

Index("dependencies_by_after", _dependencies.c.after)

Table(
    "requirements",
    _schema,
    Column("id", _WHOLE, primary_key=True, autoincrement=False),
    Column("task", _TEXT, nullable=False),
    Column("fingerprint", _TEXT, nullable=False),
    Column("reads", _TEXT, nullable=False),
    Column("data", _TEXT, nullable=False),
    Column("requires", _TEXT),
)

Table(
    "pauses",
    _schema,
    Column("kind", _TEXT, primary_key=True),
    Column("name", _TEXT, primary_key=True),
    Column("reason", _TEXT, nullable=False),
    Column("since", Float, nullable=False),
    sqlite_with_rowid=False,
)

Table(
    "attempts",
    _schema,
    Column("request", _TEXT, ForeignKey("requests.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("worker", _TEXT, nullable=False),
    Column("token", _TEXT, nullable=False),
    Column("granted", Float, nullable=False),
    Column("started", Float),
    Column("ended", Float),
    Column("result", _TEXT),
    Column("counted", Boolean(create_constraint=False), nullable=False),
    Column("reason", _TEXT),
    Column("late", _TEXT),
    sqlite_with_rowid=False,
)

_artifacts = Table(
    "artifacts",
    _schema,
    Column("id", _WHOLE, primary_key=True),
    Column("request", _TEXT),
    Column("attempt", Integer),
    Column("handle", _TEXT, nullable=False),
    Column("category", _TEXT, nullable=False),
    Column("name", _TEXT, nullable=False),
    Column("data", _TEXT, nullable=False),
    Column("created", Float, nullable=False),
    ForeignKeyConstraint(["request", "attempt"], ["attempts.request", "attempts.number"]),
    sqlite_autoincrement=True,
)

Index("artifacts_by_request", _artifacts.c.request, _artifacts.c.attempt)
Index("artifacts_by_category", _artifacts.c.category, _artifacts.c.id)

Table(
    "artifact_files",
    _schema,
    Column("artifact", _WHOLE, ForeignKey("artifacts.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("path", _TEXT, nullable=False),
    Column("size", _WHOLE, nullable=False),
    Column("sha256", _TEXT, nullable=False),
    sqlite_with_rowid=False,
)

Table(
    "artifact_relations",
    _schema,
    Column("artifact", _WHOLE, ForeignKey("artifacts.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("type", _TEXT, nullable=False),
    Column("target", _WHOLE, ForeignKey("artifacts.id"), nullable=False),
    sqlite_with_rowid=False,
)

Table(
    "imports",
    _schema,
    Column("key", _TEXT, primary_key=True),
    Column("artifact", _WHOLE, ForeignKey("artifacts.id"), nullable=False),
    sqlite_with_rowid=False,
)


def upgrade() -> None:
    """Make the tables and indexes."""
    _schema.create_all(op.get_bind())
    op.execute("INSERT INTO meta VALUES ('schema', 2), ('term', 0)")
