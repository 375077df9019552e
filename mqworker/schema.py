"""The ledger's tables and indexes, as data: what is kept, and which questions are answered without a search.

Knows no connection and no rule: what a state means stands in lifecycle, and who writes here is the ledger alone.
"""

from typing import Final

from sqlalchemy import (
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

from mqworker.lifecycle import FINAL, State

SCHEMA_VERSION: Final = 3
EVER: Final = frozenset({"meta", "requests", "attempts", "artifacts", "imports"})  # tables of every version

schema: Final = MetaData()

meta = Table("meta", schema, Column("key", String, primary_key=True), Column("value", Integer, nullable=False))

# ---------------------------------------------------------------- requests

requests = Table(
    "requests",
    schema,
    Column("seq", Integer, primary_key=True, autoincrement=False),  # its age
    Column("id", String, nullable=False, unique=True),
    Column("task", String, nullable=False),
    Column("content", String, nullable=False),  # sha256 of the canonical JSON of the Request without its id
    Column("requirement", Integer),  # its requirement class; None: rejected
    Column("priority", Integer, nullable=False),  # the present one
    Column("grp", String, nullable=False),
    Column("ckey", String),
    Column("inputs", String, nullable=False),  # artifact ids that its data name, as JSON
    Column("unmet", Integer, nullable=False),  # requests that it still waits for
    Column("bound", String),  # JSON Pointer into the data to the id of the artifact put there, as JSON
    Column("state", String, nullable=False),
    Column("attempt", Integer, nullable=False),  # the newest, or the next if none runs
    Column("tried", Integer, nullable=False),  # attempts that ended and count
    Column("worker", String),
    Column("token", String),
    Column("abort", String),  # why it is to be stopped
    Column("not_before", Float),
    Column("expires_at", Float),  # it is aborted if it is not granted until then
    Column("submitted", Float, nullable=False),
    Column("submitter", String),  # the broker's user; None: the broker did not say
    Column("granted", Float),
    Column("ended", Float),
    Column("reason", String),  # a Reason as JSON
    Column("body", String, nullable=False),  # the Request as JSON, as it was submitted; last, since it can be long
    CheckConstraint(f"requirement IS NOT NULL OR state = '{State.REJECTED}'", name="all_but_rejected_have_one"),
)

# Written out, since SQLite proves that a query fits a partial index only from the text, never from bound values.
IS_LIVE: Final = text(f"state IN ({', '.join(repr(str(state)) for state in State if state not in FINAL)})")
IS_PENDING: Final = text(f"state = '{State.PENDING}'")
IS_WAITING: Final = text(f"state = '{State.PENDING}' AND unmet = 0 AND not_before IS NULL")
IS_HELD: Final = text(
    f"state IN ('{State.OFFERED}', '{State.RUNNING}') OR state = '{State.PENDING}' AND not_before IS NOT NULL"
)
IS_EXPIRING: Final = text(f"state IN ('{State.PENDING}', '{State.OFFERED}') AND expires_at IS NOT NULL")

_r = requests.c
Index("requests_lanes", _r.requirement, _r.priority, _r.grp, _r.ckey, _r.seq, sqlite_where=IS_WAITING)
Index("requests_held", _r.seq, sqlite_where=IS_HELD)
Index("requests_members", _r.requirement, _r.priority.desc(), _r.seq, sqlite_where=IS_PENDING)
Index("requests_expiring", _r.expires_at, sqlite_where=IS_EXPIRING)
# Holds all that a selection can ask for, so that counting reads no request.
Index("requests_by_state", _r.state, _r.seq, _r.task, _r.grp, _r.submitted)
Index("requests_by_task", _r.task, _r.seq)
Index("requests_by_group", _r.grp, _r.seq)
Index("requests_by_worker", _r.worker, _r.seq, sqlite_where=_r.worker.is_not(None))

# What is not met yet: a row goes when its request of `after` has ended, or when its dependent does not wait any more.
dependencies = Table(
    "dependencies",
    schema,
    Column("request", Integer, ForeignKey("requests.seq"), primary_key=True),  # that waits
    Column("after", String, ForeignKey("requests.id"), primary_key=True),
    Column("need", String, nullable=False),
    sqlite_with_rowid=False,
)

Index("dependencies_by_after", dependencies.c.after)

requirements = Table(
    "requirements",
    schema,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("task", String, nullable=False),
    Column("fingerprint", String, nullable=False),
    Column("reads", String, nullable=False),  # JSON
    Column("data", String, nullable=False),  # JSON
    Column("requires", String),  # a JSON Schema
)

pauses = Table(
    "pauses",
    schema,
    Column("kind", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("reason", String, nullable=False),
    Column("since", Float, nullable=False),
    sqlite_with_rowid=False,
)

# Requests that were to be aborted before anybody knew them: the submission behind the abort arrives aborted.
abort_marks = Table(
    "abort_marks",
    schema,
    Column("id", String, primary_key=True),
    Column("reason", String, nullable=False),
    Column("user", String),  # the broker's user that asked; None: the broker did not say
    Column("at", Float, nullable=False),
    sqlite_with_rowid=False,
)

# Whose a worker's name is: the broker's user that used it first.
worker_names = Table(
    "worker_names",
    schema,
    Column("name", String, primary_key=True),
    Column("user", String, nullable=False),
    Column("since", Float, nullable=False),
    sqlite_with_rowid=False,
)

# ---------------------------------------------------------------- what became of them

attempts = Table(
    "attempts",
    schema,
    Column("request", String, ForeignKey("requests.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("worker", String, nullable=False),
    Column("token", String, nullable=False),
    Column("granted", Float, nullable=False),
    Column("started", Float),
    Column("ended", Float),
    Column("result", String),
    Column("counted", Boolean(create_constraint=False), nullable=False),
    Column("reason", String),  # a Reason as JSON
    Column("late", String),  # an outcome that came after the attempt was lost, as JSON
    sqlite_with_rowid=False,
)

artifacts = Table(
    "artifacts",
    schema,
    Column("id", Integer, primary_key=True),
    Column("request", String),  # with attempt: the run that made it; None: imported
    Column("attempt", Integer),
    Column("handle", String, nullable=False),
    Column("category", String, nullable=False),
    Column("name", String, nullable=False),
    Column("data", String, nullable=False),  # JSON
    Column("created", Float, nullable=False),
    ForeignKeyConstraint(["request", "attempt"], ["attempts.request", "attempts.number"]),
    sqlite_autoincrement=True,  # an id is never used twice: task data names artifacts by it
)

Index("artifacts_by_request", artifacts.c.request, artifacts.c.attempt)
Index("artifacts_by_category", artifacts.c.category, artifacts.c.id)

artifact_files = Table(
    "artifact_files",
    schema,
    Column("artifact", Integer, ForeignKey("artifacts.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("path", String, nullable=False),
    Column("size", Integer, nullable=False),
    Column("sha256", String, nullable=False),
    sqlite_with_rowid=False,
)

artifact_relations = Table(
    "artifact_relations",
    schema,
    Column("artifact", Integer, ForeignKey("artifacts.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("type", String, nullable=False),
    Column("target", Integer, ForeignKey("artifacts.id"), nullable=False),
    sqlite_with_rowid=False,
)

imports = Table(
    "imports",
    schema,
    Column("key", String, primary_key=True),
    Column("artifact", Integer, ForeignKey("artifacts.id"), nullable=False),
    sqlite_with_rowid=False,
)
