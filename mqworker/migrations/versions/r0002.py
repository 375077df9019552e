"""Revision 0002: limits in time, whose a request and a name is, aborts in advance, and a leader beside a standby."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_TEXT = sa.String().with_variant(sa.String(collation="C"), "postgresql")
_WHOLE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Add columns and tables, and move the term to where a standby looks for it."""
    op.add_column("requests", sa.Column("expires_at", sa.Float))
    op.add_column("requests", sa.Column("submitter", _TEXT))
    expiring = sa.text("state IN ('pending', 'offered') AND expires_at IS NOT NULL")
    op.create_index("requests_expiring", "requests", ["expires_at"], sqlite_where=expiring, postgresql_where=expiring)
    op.create_table(
        "abort_marks",
        sa.Column("id", _TEXT, primary_key=True),
        sa.Column("user", _TEXT, primary_key=True),
        sa.Column("reason", _TEXT, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("abort_marks_of_user", "abort_marks", ["user"])
    op.create_table(
        "worker_names",
        sa.Column("name", _TEXT, primary_key=True),
        sa.Column("user", _TEXT, nullable=False),
        sa.Column("since", sa.Float, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "leader",
        sa.Column("one", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("term", _WHOLE, nullable=False),
        sa.Column("commits", _WHOLE, nullable=False),
        sa.Column("session", sa.Integer),
        sa.Column("session_began", sa.Float),
        sa.CheckConstraint("one = 1", name="one_leader"),
    )
    op.create_table(
        "renewals",
        sa.Column("one", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("term", _WHOLE, nullable=False),
        sa.Column("holder", _TEXT),
        sa.Column("at", sa.Float, nullable=False),
        sa.CheckConstraint("one = 1", name="one_renewal"),
    )
    op.execute("INSERT INTO leader (one, term, commits) SELECT 1, value, 0 FROM meta WHERE key = 'term'")
    op.execute("INSERT INTO renewals (one, term, at) SELECT 1, term, 0 FROM leader")
    op.drop_table("meta")
