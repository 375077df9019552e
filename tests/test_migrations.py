"""The ledger's schema over time: what older versions wrote is read, and nothing differs from what is made anew."""

from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, event

from mqworker import migrations
from mqworker.errors import LedgerInvalid
from mqworker.facts import Accept, End, Grant, Offer, Pause
from mqworker.ledger import Ledger
from mqworker.lifecycle import State
from mqworker.messages import After, Artifact, CountRequests, ListArtifacts, ListRequests, Request
from mqworker.schema import REVISION, schema

VERSIONS = Path(migrations.__file__).parent / "versions"
OLD = (Path(__file__).parent / "ledger_of_schema_2.sql").read_text().partition("\n")[2].split(";\n")[:-1]

QUESTIONS = [
    "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
    """SELECT table_name, column_name, data_type, is_nullable, column_default, collation_name
    FROM information_schema.columns WHERE table_schema = 'public'""",
    "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE connamespace = 'public'::regnamespace",
]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """A place without anything."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.db"
    return request.getfixturevalue("postgresql_void")


def connected(url):
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def set_up(connection, _record):
            connection.execute("PRAGMA foreign_keys = ON")

    return engine


def first_schema(url, *, stamped):
    """Make the first schema with data in it, as it was before Alembic, or as Alembic makes it."""
    engine = connected(url)
    with engine.begin() as connection:
        migrations.upgrade(connection, "0001")
        for statement in OLD:
            connection.exec_driver_sql(statement)
        if not stamped:
            connection.exec_driver_sql("DROP TABLE alembic_version")
    engine.dispose()


def shape(url):
    """Say all that a database knows of its tables and indexes, but for the order of columns."""
    engine = connected(url)
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            tables = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars().all()
            indexes = "SELECT name, replace(sql, '\"', '') FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
            found = [
                *(tuple(row) for row in connection.exec_driver_sql(indexes)),
                *(
                    (table, *row[1:])
                    for table in tables
                    for row in connection.exec_driver_sql(f"PRAGMA table_xinfo({table})")
                ),
                *(
                    (table, *row[2:])
                    for table in tables
                    for row in connection.exec_driver_sql(f"PRAGMA foreign_key_list({table})")
                ),
            ]
        else:
            found = [tuple(row) for question in QUESTIONS for row in connection.exec_driver_sql(question)]
    engine.dispose()
    return sorted(map(repr, found))


@pytest.mark.parametrize("stamped", [False, True])
def test_a_ledger_of_the_first_schema_is_brought_up_to_date_with_all_that_it_holds(url, stamped):
    first_schema(url, stamped=stamped)
    assert Ledger.check(url).endswith(f"has the schema 0001; the next scheduler brings it up to {REVISION}")

    with closing(Ledger.open(url)) as ledger:
        assert (ledger.term, ledger.upgraded_from) == (42, "0001")
        views = {view.seq: view for view in ledger.list(ListRequests(limit=100))}
        assert [views[seq].state for seq in range(1, 11)] == [
            *("success", "failure", "error", "aborted", "rejected", "running", "offered"),
            *("pending", "pending", "pending"),
        ]
        assert views[2].reason.text == "no"
        [[one], _] = ledger.view([views[1].request.id])
        assert [(attempt.number, attempt.result) for attempt in one.attempts] == [(1, "lost"), (2, "success")]
        assert [(artifact.id, artifact.files[0].size) for artifact in one.artifacts] == [(1, 3)]
        assert ledger.artifacts(ListArtifacts())[0].relations[0].target == 1
        assert [pause.name for pause in ledger.pauses()] == ["w9"]
        assert (ledger.blocked(), ledger.newest(), ledger.newest_requirement()) == (1, 10, 1)
        assert [live.seq for live in ledger.held()] == [6, 7, 9]
        assert views[8].request.data == {"n": 8, "x": 1}

        new = Request(id="00000000-0000-4000-8000-0000000000ff", task="noop", expires_at=50.0)
        after = After(request=views[6].request.id, need="end")
        results = ledger.commit(
            [
                Accept(seq=11, request=new, at=7.0, requirement=1),
                Accept(
                    seq=12, request=Request(id=new.id[:-1] + "e", task="noop", after=[after]), at=7.0, requirement=1
                ),
                End(
                    request=views[6].request.id,
                    attempt=1,
                    token="t6",  # noqa: S106  # of a claim
                    worker="w2",
                    result="success",
                    reason=None,
                    started=4.0,
                    ended=8.0,
                    to=State.SUCCESS,
                    counted=True,
                    not_before=None,
                    artifacts=[Artifact(handle="b", category="test:thing", name="new")],
                    at=8.0,
                ),
                Offer(request=views[8].request.id, attempt=1, seq=8),
                Grant(request=views[8].request.id, attempt=1, token="t8", worker="w1", at=9.0),  # noqa: S106
                Pause(kind="worker", name="w9", reason="hot", at=9.0),
            ]
        )
        assert results[2].status == "recorded"
        assert results[2].artifacts == {"b": 3}  # no id is given twice
        assert sorted(live.seq for live in results[2].freed) == [10, 12]
        assert results[3:] == [True, "granted", False]
        assert ledger.expired(60.0, 10).requests == ((new.id, 50.0),)
        assert ledger.count(CountRequests(states=["running"])) == 1


def test_migrations_make_what_a_new_ledger_is_made_of(url, request, tmp_path):
    engine = connected(url)
    with engine.begin() as connection:
        migrations.upgrade(connection, "head")
        differences = compare_metadata(MigrationContext.configure(connection), schema)
    engine.dispose()
    assert differences == []
    migrated = shape(url)

    fresh = f"sqlite:///{tmp_path}/fresh.db" if url.startswith("sqlite") else request.getfixturevalue("postgresql_url")
    Ledger.open(fresh).close()
    assert [one for one in shape(fresh) if "sqlite_sequence" not in one] == [
        one for one in migrated if "sqlite_sequence" not in one
    ]


def test_the_newest_migration_is_the_one_that_the_ledger_asks_for():
    script = ScriptDirectory(str(VERSIONS.parent))

    assert script.get_heads() == [REVISION]
    assert [one.revision for one in script.walk_revisions()] == [f"{n:04}" for n in range(int(REVISION), 0, -1)]


def test_a_migration_that_fails_leaves_the_first_schema_as_it_was(url, monkeypatch):
    first_schema(url, stamped=False)
    before = shape(url)
    upgrade = migrations.upgrade

    def cut(connection, to):
        upgrade(connection, to)
        raise RuntimeError("the power fails")

    with monkeypatch.context() as patch:
        patch.setattr(migrations, "upgrade", cut)
        with pytest.raises(RuntimeError):
            Ledger.open(url)
    assert shape(url) == before

    with closing(Ledger.open(url)) as ledger:
        assert ledger.term == 42


def test_a_database_of_somebody_else_is_refused_and_left_alone(url):
    engine = connected(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('0002')")
        connection.exec_driver_sql("CREATE TABLE requests (url VARCHAR)")
    engine.dispose()
    before = shape(url)

    with pytest.raises(LedgerInvalid, match="something else"):
        Ledger.open(url)

    assert shape(url) == before


def test_tables_of_others_in_the_same_schema_of_postgresql_are_no_hindrance(postgresql_void):
    engine = connected(postgresql_void)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE customers (name VARCHAR)")
    engine.dispose()

    Ledger.open(postgresql_void).close()
