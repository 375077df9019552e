"""The facts: requests, attempts and artifacts in SQL, changed by one writer in one transaction at a time.

Knows no broker, no clock (every time is told) and no rule of its own: which move is legal stands in lifecycle, and
what an outcome means is judged by the scheduler. Each move is a compare-and-set: it changes the row only if the row
is still as the writer believed. Synchronous, for one thread at a time.
"""

import errno
import fcntl
import hashlib
import os
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import msgspec
from sqlalchemy import (
    BindParameter,
    Boolean,
    Column,
    Connection,
    Engine,
    Executable,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    bindparam,
    column,
    create_engine,
    event,
    exc,
    func,
    insert,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.pool import StaticPool

from mqworker.errors import IllegalMove, LedgerInvalid, LedgerLocked, LedgerUnavailable, MqworkerError, SettingsError
from mqworker.lifecycle import FINAL, MOVES, Event, State, move
from mqworker.messages import (
    Artifact,
    AttemptView,
    FileEntry,
    ListArtifacts,
    ListRequests,
    OutcomeResult,
    Reason,
    RecordedArtifact,
    RecordedRelation,
    Request,
    RequestView,
)

SCHEMA_VERSION: Final = 1
BUSY_TIMEOUT: Final = 5.0  # seconds; nobody else writes, but a backup may hold the file for a moment
CACHE_KIB: Final = 64 * 1024  # ids are random, so each acceptance touches its own page of their index
PAGE: Final = 1000  # rows read at a time; also the most values in one IN (...)
SHORTEST_BEGINNING: Final = 4  # characters of an id

# ---------------------------------------------------------------- writes


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept:
    """Keep a submission: pending, or rejected for a reason."""

    request: Request
    at: float
    rejected: Reason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Move pending to offered; the result says whether it did."""

    request: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Return:
    """Move offered to pending; the result says whether it did."""

    request: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Move offered to running, for one token."""

    request: str
    attempt: int
    token: str
    worker: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """End the run of (request, attempt, token), and record its artifacts with it.

    An outcome whose artifacts contradict themselves (a relation to an artifact that does not exist, a handle used
    twice) is still recorded, since one worker's mistake must not hold up the set it came in; but its request ends in
    error, with a reason that names the contradiction, and its artifacts are kept without the relations in question.
    """

    request: str
    attempt: int
    token: str
    worker: str
    result: OutcomeResult
    reason: Reason | None
    started: float | None
    ended: float
    to: State
    counted: bool  # towards max_attempts
    not_before: float | None
    artifacts: Sequence[Artifact]
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortAsked:
    """Abort a request that does not run, mark one that does, leave one that has ended."""

    request: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """Record an artifact that no request made; the same key again is the same artifact."""

    key: str
    artifact: Artifact
    at: float


Write: TypeAlias = Accept | Offer | Return | Grant | End | AbortAsked | Import

# ---------------------------------------------------------------- their results


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """Say what became of an Accept."""

    seq: int
    status: Literal["accepted", "known", "rejected", "conflict"]
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Say what became of an End."""

    status: Literal["recorded", "refused", "unknown"]
    reason: str | None = None
    artifacts: dict[str, int] = field(default_factory=dict)  # handle to id
    state: State | None = None  # where this End took its request; None: it changed nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortResult:
    """Say what became of an AbortAsked; None: no such request."""

    before: State | None
    after: State | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportRefused:
    """Say why an Import recorded nothing."""

    reason: str


Granting: TypeAlias = Literal["granted", "again", "void"]
Imported: TypeAlias = int
Result: TypeAlias = Accepted | bool | Granting | Ended | AbortResult | Imported | ImportRefused

# ---------------------------------------------------------------- what is read


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """Show a request that has not ended, with all that a new scheduler must know of it."""

    seq: int
    request: Request
    state: State
    attempt: int
    tried: int
    worker: str | None
    token: str | None
    abort: str | None
    not_before: float | None
    submitted: float


# ---------------------------------------------------------------- tables

_schema = MetaData()

_meta = Table("meta", _schema, Column("key", String, primary_key=True), Column("value", Integer, nullable=False))

_requests = Table(
    "requests",
    _schema,
    Column("seq", Integer, primary_key=True),  # its age
    Column("id", String, nullable=False, unique=True),
    Column("task", String, nullable=False),
    Column("body", String, nullable=False),  # the Request as JSON
    Column("content", String, nullable=False),  # sha256 of the canonical JSON of the Request without its id
    Column("priority", Integer, nullable=False),
    Column("state", String, nullable=False),
    Column("attempt", Integer, nullable=False),  # the newest, or the next if none runs
    Column("tried", Integer, nullable=False),  # attempts that ended and count
    Column("worker", String),
    Column("token", String),
    Column("abort", String),  # why it is to be stopped
    Column("not_before", Float),
    Column("submitted", Float, nullable=False),
    Column("granted", Float),
    Column("ended", Float),
    Column("reason", String),  # a Reason as JSON
    sqlite_autoincrement=True,  # a seq is never used twice
)

# Written out, since SQLite proves that a query fits a partial index only from the text, never from bound values.
_is_live = text(f"state IN ({', '.join(repr(str(state)) for state in State if state not in FINAL)})")

Index("requests_live", _requests.c.seq, sqlite_where=_is_live)
Index("requests_by_state", _requests.c.state, _requests.c.seq)
Index("requests_by_task", _requests.c.task, _requests.c.seq)
Index("requests_by_worker", _requests.c.worker, _requests.c.seq, sqlite_where=_requests.c.worker.is_not(None))

_attempts = Table(
    "attempts",
    _schema,
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

_artifacts = Table(
    "artifacts",
    _schema,
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

Index("artifacts_by_request", _artifacts.c.request, _artifacts.c.attempt)
Index("artifacts_by_category", _artifacts.c.category, _artifacts.c.id)

_artifact_files = Table(
    "artifact_files",
    _schema,
    Column("artifact", Integer, ForeignKey("artifacts.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("path", String, nullable=False),
    Column("size", Integer, nullable=False),
    Column("sha256", String, nullable=False),
    sqlite_with_rowid=False,
)

_artifact_relations = Table(
    "artifact_relations",
    _schema,
    Column("artifact", Integer, ForeignKey("artifacts.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("type", String, nullable=False),
    Column("target", Integer, ForeignKey("artifacts.id"), nullable=False),
    sqlite_with_rowid=False,
)

_imports = Table(
    "imports",
    _schema,
    Column("key", String, primary_key=True),
    Column("artifact", Integer, ForeignKey("artifacts.id"), nullable=False),
    sqlite_with_rowid=False,
)

# ---------------------------------------------------------------- statements, built once

_THE_ID: Final = "the_id"
_THE_ATTEMPT: Final = "the_attempt"
_THE_TOKEN: Final = "the_token"  # noqa: S105  # the name of a bound value, not a secret
_ids: BindParameter[Any] = bindparam("ids", expanding=True)


def _if_still(state: State) -> tuple[Any, ...]:
    """Return the conditions of a compare-and-set on a request's state and attempt."""
    return (
        _requests.c.id == bindparam(_THE_ID),
        _requests.c.state == state,
        _requests.c.attempt == bindparam(_THE_ATTEMPT),
    )


_accept = insert(_requests)
_known = select(_requests.c.id, _requests.c.seq, _requests.c.content, _requests.c.state, _requests.c.reason).where(
    _requests.c.id.in_(_ids)
)

_offer = update(_requests).where(*_if_still(State.PENDING)).values(state=move(State.PENDING, Event.OFFER))
_return = update(_requests).where(*_if_still(State.OFFERED)).values(state=move(State.OFFERED, Event.RETURN))

_grant = (
    update(_requests)
    .where(*_if_still(State.OFFERED))
    .values(
        state=move(State.OFFERED, Event.GRANT),
        token=bindparam("token"),
        worker=bindparam("worker"),
        granted=bindparam("granted"),
    )
)
_granted_attempt = insert(_attempts)
_holder = select(_requests.c.state, _requests.c.attempt, _requests.c.token).where(_requests.c.id == bindparam(_THE_ID))

_runs_still = (*_if_still(State.RUNNING), _requests.c.token == bindparam(_THE_TOKEN))
_end_for_good = (
    update(_requests)
    .where(*_runs_still)
    .values(
        state=bindparam("state"),
        tried=_requests.c.tried + bindparam("more"),
        ended=bindparam("ended"),
        reason=bindparam("reason"),
    )
)
_end_for_now = (
    update(_requests)
    .where(*_runs_still)
    .values(
        state=bindparam("state"),
        attempt=_requests.c.attempt + 1,
        tried=_requests.c.tried + bindparam("more"),
        worker=None,
        token=None,
        granted=None,
        not_before=bindparam("not_before"),
    )
)
_ended_attempt = (
    update(_attempts)
    .where(_attempts.c.request == bindparam(_THE_ID), _attempts.c.number == bindparam(_THE_ATTEMPT))
    .values(
        started=bindparam("started"),
        ended=bindparam("ended"),
        result=bindparam("result"),
        counted=bindparam("counted"),
        reason=bindparam("reason"),
    )
)
_attempt_of_token = select(_attempts.c.result).where(
    _attempts.c.request == bindparam(_THE_ID),
    _attempts.c.number == bindparam(_THE_ATTEMPT),
    _attempts.c.token == bindparam(_THE_TOKEN),
)
_late_outcome = (
    update(_attempts)
    .where(
        _attempts.c.request == bindparam(_THE_ID),
        _attempts.c.number == bindparam(_THE_ATTEMPT),
        _attempts.c.late.is_(None),
    )
    .values(late=bindparam("late"))
)
_artifacts_of_attempt = (
    select(_artifacts.c.handle, _artifacts.c.id)
    .where(_artifacts.c.request == bindparam(_THE_ID), _artifacts.c.attempt == bindparam(_THE_ATTEMPT))
    .order_by(_artifacts.c.id)
)

_state_of = select(_requests.c.state).where(_requests.c.id == bindparam(_THE_ID))
_abort_now = (
    update(_requests)
    .where(_requests.c.id == bindparam(_THE_ID), _requests.c.state == bindparam("before"))
    .values(state=bindparam("state"), abort=bindparam("abort"), ended=bindparam("ended"), reason=bindparam("reason"))
)
_abort_later = (
    update(_requests)
    .where(_requests.c.id == bindparam(_THE_ID), _requests.c.state == State.RUNNING, _requests.c.abort.is_(None))
    .values(abort=bindparam("abort"))
)

_new_artifact = insert(_artifacts).returning(_artifacts.c.id, sort_by_parameter_order=True)
_new_file = insert(_artifact_files)
_new_relation = insert(_artifact_relations)
_new_import = insert(_imports)
_imported = select(_imports.c.key, _imports.c.artifact).where(_imports.c.key.in_(_ids))
_artifact_ids = select(_artifacts.c.id).where(_artifacts.c.id.in_(_ids))

_live: Executable = (
    select(
        *(
            column(name)
            for name in (
                "seq",
                "body",
                "state",
                "attempt",
                "tried",
                "worker",
                "token",
                "abort",
                "not_before",
                "submitted",
            )
        )
    )
    # Left to itself, SQLite goes by state and sorts all that is live, for each page anew.
    .select_from(text("requests INDEXED BY requests_live"))
    .where(_is_live, column("seq") > bindparam("after"))
    .order_by(column("seq"))
    .limit(PAGE)
)
_views = select(_requests).where(_requests.c.id.in_(_ids))
_begins_with = (
    select(_requests.c.id)
    .where(_requests.c.id >= bindparam("beginning"), _requests.c.id < bindparam("beyond"))
    .limit(2)  # two are enough to know that it is not unique
)
_attempts_of = select(_attempts).where(_attempts.c.request.in_(_ids)).order_by(_attempts.c.number)
_artifacts_of = select(_artifacts.c.id).where(_artifacts.c.request.in_(_ids))
_artifacts_with_id = select(_artifacts).where(_artifacts.c.id.in_(_ids))
_files_of = select(_artifact_files).where(_artifact_files.c.artifact.in_(_ids)).order_by(_artifact_files.c.position)
_relations_of = (
    select(_artifact_relations).where(_artifact_relations.c.artifact.in_(_ids)).order_by(_artifact_relations.c.position)
)
_counts = select(_requests.c.state, func.count().label("number")).group_by(_requests.c.state)

_canonical = msgspec.json.Encoder(order="sorted")
_read_request = msgspec.json.Decoder(Request).decode
_read_reason = msgspec.json.Decoder(Reason).decode
_ENDS: Final = frozenset(to for (state, _), to in MOVES.items() if state is State.RUNNING)


class Ledger:
    """Keep the facts of one pool; its only writer for as long as it is open."""

    def __init__(self, engine: Engine, name: str, lock: int | None, term: int) -> None:
        self._reading = engine.execution_options(begin="BEGIN")
        self._writing = engine.execution_options(begin="BEGIN IMMEDIATE")
        self._name = name
        self._lock = lock
        self.term = term

    @classmethod
    def open(cls, url: str) -> "Ledger":
        """Open a ledger, make it if there is none, and raise its term by one.

        `sqlite:///path` is a file (four slashes: from the root), `sqlite://` lives in memory.

        Raises:
            LedgerLocked: another Ledger has it open.
            LedgerInvalid: it is no ledger, of another schema, or may not be read and written.
            LedgerUnavailable: the database cannot commit now.
            SettingsError: the URL is not of SQLite.
        """
        path = _path(url)
        if path is None:
            return cls._start(":memory:", "the ledger in memory", None)
        name = f"the ledger {path}"
        lock = _take_lock(path)
        try:
            return cls._start(str(path), name, lock)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def _start(cls, database: str, name: str, lock: int | None) -> "Ledger":
        # One connection for life: there is one writer, and a second would not see a database in memory.
        engine = create_engine(
            "sqlite://",
            creator=lambda: _connect(database, name),
            poolclass=StaticPool,
            query_cache_size=200,
        )

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            connection.exec_driver_sql(connection.get_execution_options()["begin"])

        ledger = cls(engine, name, lock, 0)
        try:
            with ledger._transaction() as connection:
                ledger.term = _raise_term(connection, name)
        except BaseException:
            engine.dispose()
            raise
        return ledger

    def close(self) -> None:
        """Let go of the file and its lock; a second time does nothing."""
        self._writing.dispose()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # ---------------------------------------------------------------- writing

    def commit(self, writes: Sequence[Write]) -> list[Result]:
        """Do all writes in one transaction, and return one result each.

        Writes that concern one request happen in their order. Those that do not are independent of each other, so
        they are done kind by kind, many rows with one statement.

        Raises:
            IllegalMove: an End names a state that a run cannot end in; nothing is written.
            LedgerUnavailable: the database cannot commit now; nothing is written.
        """
        if not writes:
            return []
        groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        earlier: defaultdict[str, int] = defaultdict(int)  # turns that a request's earlier writes take
        numbered: defaultdict[int, int] = defaultdict(int)  # a seq and an artifact's id rise in the order given
        for number, write in enumerate(writes):
            about, kind = _about(write), _KINDS[type(write)]
            turn = max(earlier[about], numbered[kind] if kind in _NUMBERING else 0)
            groups[turn, kind].append(number)
            earlier[about] = turn + 1
            numbered[kind] = turn
        results: dict[int, Result] = {}
        with self._transaction() as connection:
            for turn, kind in sorted(groups):
                numbers = groups[turn, kind]
                done = _DO[kind](connection, [writes[number] for number in numbers])
                results.update(zip(numbers, done, strict=True))
        return [results[number] for number in range(len(writes))]

    # ---------------------------------------------------------------- reading

    def live(self) -> Iterator[Live]:
        """Go through every request that has not ended, the oldest first, a page in memory at a time."""
        after = 0
        while True:
            with self._snapshot() as connection:
                page = connection.execute(_live, {"after": after}).all()
            for row in page:
                yield Live(
                    seq=row.seq,
                    request=_read_request(row.body),
                    state=State(row.state),
                    attempt=row.attempt,
                    tried=row.tried,
                    worker=row.worker,
                    token=row.token,
                    abort=row.abort,
                    not_before=row.not_before,
                    submitted=row.submitted,
                )
            if len(page) < PAGE:
                return
            after = page[-1].seq

    def view(self, ids: Sequence[str]) -> tuple[list[RequestView], list[str]]:
        """Return requests with their attempts and artifacts, and those ids that name none, or more than one.

        An id may be a beginning of at least SHORTEST_BEGINNING characters.
        """
        with self._snapshot() as connection:
            full = {given: self._resolve(connection, given) for given in ids}
            wanted = [id_ for id_ in dict.fromkeys(full.values()) if id_ is not None]
            attempts: defaultdict[str, list[AttemptView]] = defaultdict(list)
            for row in _rows(connection, _attempts_of, wanted):
                attempts[row.request].append(_attempt_view(row))
            artifacts: defaultdict[str, list[RecordedArtifact]] = defaultdict(list)
            made = [row.id for row in _rows(connection, _artifacts_of, wanted)]
            for _, artifact in sorted(_read_artifacts(connection, made).items()):
                artifacts[artifact.request or ""].append(artifact)
            views = {
                row.id: _request_view(row, attempts[row.id], artifacts[row.id])
                for row in _rows(connection, _views, wanted)
            }
        return [views[id_] for id_ in wanted], [given for given, id_ in full.items() if id_ is None]

    @staticmethod
    def _resolve(connection: Connection, given: str) -> str | None:
        if len(given) < SHORTEST_BEGINNING:
            return None
        found = connection.execute(_begins_with, {"beginning": given, "beyond": given + "~"}).scalars().all()
        return found[0] if len(found) == 1 else None

    def artifacts(self, query: ListArtifacts) -> list[RecordedArtifact]:
        """Return the newest artifacts that match."""
        statement = select(_artifacts.c.id).order_by(_artifacts.c.id.desc()).limit(query.limit)
        if query.request is not None:
            statement = statement.where(_artifacts.c.request == query.request)
        if query.category is not None:
            statement = statement.where(_artifacts.c.category == query.category)
        with self._snapshot() as connection:
            if query.ids:
                matching = [row.id for row in _rows(connection, statement.where(_artifacts.c.id.in_(_ids)), query.ids)]
                ids = sorted(set(matching), reverse=True)[: query.limit]
            else:
                ids = [*connection.execute(statement).scalars()]
            found = _read_artifacts(connection, ids)
        return [found[id_] for id_ in ids]

    def artifacts_by_id(self, ids: Collection[int]) -> dict[int, RecordedArtifact]:
        """Return those of the artifacts that the ledger knows."""
        with self._snapshot() as connection:
            return _read_artifacts(connection, ids)

    def counts(self) -> dict[str, int]:
        """Return the number of requests in each state that has any."""
        with self._snapshot() as connection:
            return {row.state: row.number for row in connection.execute(_counts)}

    def list(self, query: ListRequests) -> list[RequestView]:
        """Return the newest requests that match, without attempts."""
        statement = select(_requests).order_by(_requests.c.seq.desc()).limit(query.limit)
        if query.states:
            statement = statement.where(_requests.c.state.in_(query.states))
        if query.task is not None:
            statement = statement.where(_requests.c.task == query.task)
        if query.worker is not None:
            statement = statement.where(_requests.c.worker == query.worker)
        if query.before is not None:
            statement = statement.where(_requests.c.seq < query.before)
        with self._snapshot() as connection:
            return [_request_view(row, [], []) for row in connection.execute(statement)]

    # ---------------------------------------------------------------- transactions

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self._explained(), self._writing.begin() as connection:
            yield connection

    @contextmanager
    def _snapshot(self) -> Iterator[Connection]:
        with self._explained(), self._reading.connect() as connection:
            yield connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what a database's error means for the ledger, where it is known."""
        try:
            yield
        except exc.DatabaseError as error:
            explained = _explain(error, self._name)
            if explained is None:
                raise
            raise explained from error


# ---------------------------------------------------------------- each kind of write; within one, no request twice


def _do_accepts(connection: Connection, writes: Sequence[Accept]) -> list[Result]:
    ids = [write.request.id for write in writes]
    known = {row.id: row for row in _rows(connection, _known, ids)}
    contents = {write.request.id: _content(write.request) for write in writes}
    rows = [_new_request(write, contents[write.request.id]) for write in writes if write.request.id not in known]
    if rows:
        connection.execute(_accept, rows)
    seqs = {row.id: row.seq for row in _rows(connection, _known, [row["id"] for row in rows])}

    def result(write: Accept) -> Accepted:
        before = known.get(write.request.id)
        if before is None:
            seq = seqs[write.request.id]
            if write.rejected is None:
                return Accepted(seq=seq, status="accepted")
            return Accepted(seq=seq, status="rejected", reason=write.rejected.text)
        if before.content != contents[write.request.id]:
            return Accepted(
                seq=before.seq,
                status="conflict",
                reason=f"expected a new id, got {write.request.id}, which is a request with other content; "
                "submit it with an id of its own",
            )
        if before.state == State.REJECTED:
            reason = _reason_from(before.reason)
            return Accepted(seq=before.seq, status="rejected", reason=None if reason is None else reason.text)
        return Accepted(seq=before.seq, status="known")

    return [result(write) for write in writes]


def _content(request: Request) -> str:
    fields = msgspec.to_builtins(request)
    del fields["id"]
    return hashlib.sha256(_canonical.encode(fields)).hexdigest()


def _new_request(write: Accept, content: str) -> dict[str, Any]:
    request = write.request
    rejected = write.rejected is not None
    return {
        "id": request.id,
        "task": request.task,
        "body": _json(request),
        "content": content,
        "priority": request.priority,
        "state": move(None, Event.REJECT if rejected else Event.ACCEPT),
        "attempt": 1,
        "tried": 0,
        "submitted": write.at,
        "ended": write.at if rejected else None,
        "reason": _reason_json(write.rejected),
    }


def _do_offers(connection: Connection, writes: Sequence[Offer]) -> list[Result]:
    return [*_compare_and_set(connection, _offer, [_cas(write) for write in writes])]


def _do_returns(connection: Connection, writes: Sequence[Return]) -> list[Result]:
    return [*_compare_and_set(connection, _return, [_cas(write) for write in writes])]


def _do_grants(connection: Connection, writes: Sequence[Grant]) -> list[Result]:
    won = _compare_and_set(
        connection,
        _grant,
        [_cas(write) | {"token": write.token, "worker": write.worker, "granted": write.at} for write in writes],
    )
    rows = [
        {
            "request": write.request,
            "number": write.attempt,
            "worker": write.worker,
            "token": write.token,
            "granted": write.at,
            "counted": True,
        }
        for write, granted in zip(writes, won, strict=True)
        if granted
    ]
    if rows:
        connection.execute(_granted_attempt, rows)

    def result(write: Grant) -> Granting:
        row = connection.execute(_holder, {_THE_ID: write.request}).one_or_none()
        held = row is not None and (State(row.state), row.attempt, row.token) == (
            State.RUNNING,
            write.attempt,
            write.token,
        )
        return "again" if held else "void"

    return ["granted" if granted else result(write) for write, granted in zip(writes, won, strict=True)]


def _do_ends(connection: Connection, writes: Sequence[End]) -> list[Result]:
    for write in writes:
        if write.to not in _ENDS:
            raise IllegalMove(f"expected a run to end in one of [{', '.join(sorted(_ENDS))}], got {write.to}")
    targets = _known_targets(connection, [artifact for write in writes for artifact in write.artifacts])
    results: dict[int, Result] = {}
    recorded: list[int] = []
    judged = [_judge(write, targets) for write in writes]
    for statement, for_good in ((_end_for_good, True), (_end_for_now, False)):
        numbers = [number for number, (to, _, _) in enumerate(judged) if (to in FINAL) is for_good]
        rows = [_end_row(writes[number], *judged[number][:2], for_good=for_good) for number in numbers]
        won = _compare_and_set(connection, statement, rows)
        for number, ended in zip(numbers, won, strict=True):
            if ended:
                recorded.append(number)
            else:
                results[number] = _late(connection, writes[number])
    if recorded:
        recorded.sort()
        connection.execute(_ended_attempt, [_attempt_row(writes[number], judged[number][1]) for number in recorded])
    made = _record_artifacts(
        connection,
        [
            (writes[number].artifacts, writes[number].request, writes[number].attempt, writes[number].at)
            for number in recorded
        ],
        targets,
    )
    for number, handles in zip(recorded, made, strict=True):
        to, _, fault = judged[number]
        results[number] = Ended(status="recorded", reason=fault, artifacts=handles, state=to)
    return [results[number] for number in range(len(writes))]


def _judge(write: End, targets: Collection[int]) -> tuple[State, Reason | None, str | None]:
    """Return where an End leads, why, and what is wrong with its artifacts."""
    fault = _fault(write.artifacts, targets)
    if fault is None:
        return write.to, write.reason, None
    status = None if write.reason is None else write.reason.text
    return move(State.RUNNING, Event.ERR), Reason(text=fault, stage="record", status=write.result, line=status), fault


def _end_row(write: End, to: State, reason: Reason | None, *, for_good: bool) -> dict[str, Any]:
    row = _cas(write) | {_THE_TOKEN: write.token, "state": to, "more": int(write.counted)}
    if for_good:
        return row | {"ended": write.at, "reason": _reason_json(reason)}
    return row | {"not_before": write.not_before}


def _attempt_row(write: End, reason: Reason | None) -> dict[str, Any]:
    return _cas(write) | {
        "started": write.started,
        "ended": write.ended,
        "result": write.result,
        "counted": write.counted,
        "reason": _reason_json(reason),
    }


def _late(connection: Connection, write: End) -> Ended:
    """Answer an End whose run does not count any more, or never did."""
    run = _cas(write)
    row = connection.execute(_attempt_of_token, run | {_THE_TOKEN: write.token}).one_or_none()
    if row is None:
        return Ended(
            status="unknown",
            reason=f"expected the outcome of a run, got that of attempt {write.attempt} of {write.request} with a "
            "token that was never granted",
        )
    if row.result == "lost" and write.result != "lost":
        late = {
            "result": write.result,
            "reason": write.reason,
            "started": write.started,
            "ended": write.ended,
            "artifacts": list(write.artifacts),
            "at": write.at,
        }
        connection.execute(_late_outcome, run | {"late": _json(late)})
        return Ended(
            status="refused",
            reason=f"the lease of attempt {write.attempt} had lapsed and the request went on without it; "
            "the outcome is kept as history, without its artifacts",
        )
    handles: dict[str, int] = {}
    for handle, id_ in connection.execute(_artifacts_of_attempt, run):
        handles.setdefault(handle, id_)
    return Ended(status="recorded", artifacts=handles)


def _do_aborts(connection: Connection, writes: Sequence[AbortAsked]) -> list[Result]:
    return [_abort(connection, write) for write in writes]


def _abort(connection: Connection, write: AbortAsked) -> AbortResult:
    found = connection.execute(_state_of, {_THE_ID: write.request}).scalar_one_or_none()
    if found is None:
        return AbortResult(before=None, after=None)
    before = State(found)
    if before in FINAL:
        return AbortResult(before=before, after=before)
    if before is State.RUNNING:
        connection.execute(_abort_later, {_THE_ID: write.request, "abort": write.reason})
        return AbortResult(before=before, after=before)
    after = move(before, Event.ABORT)
    connection.execute(
        _abort_now,
        {
            _THE_ID: write.request,
            "before": before,
            "state": after,
            "abort": write.reason,
            "ended": write.at,
            "reason": _reason_json(Reason(text=write.reason)),
        },
    )
    return AbortResult(before=before, after=after)


def _do_imports(connection: Connection, writes: Sequence[Import]) -> list[Result]:
    results: dict[str, Result] = {
        row.key: row.artifact for row in _rows(connection, _imported, [write.key for write in writes])
    }
    targets = _known_targets(connection, [write.artifact for write in writes])
    new = []
    for write in writes:
        if write.key in results:
            continue
        fault = _fault([write.artifact], targets)
        if fault is None:
            new.append(write)
        else:
            results[write.key] = ImportRefused(reason=fault)
    made = _record_artifacts(connection, [([write.artifact], None, None, write.at) for write in new], targets)
    for write, handles in zip(new, made, strict=True):
        results[write.key] = handles[write.artifact.handle]
    if new:
        connection.execute(_new_import, [{"key": write.key, "artifact": results[write.key]} for write in new])
    return [results[write.key] for write in writes]


_Doing: TypeAlias = Callable[[Connection, Sequence[Any]], list[Result]]
_ORDER: Final[tuple[tuple[type, _Doing], ...]] = (
    (Accept, _do_accepts),
    (Offer, _do_offers),
    (Return, _do_returns),
    (Grant, _do_grants),
    (End, _do_ends),
    (AbortAsked, _do_aborts),
    (Import, _do_imports),
)
_KINDS: Final = {kind: number for number, (kind, _) in enumerate(_ORDER)}
_DO: Final = [do for _, do in _ORDER]
_NUMBERING: Final = frozenset({_KINDS[Accept], _KINDS[End], _KINDS[Import]})


def _about(write: Write) -> str:
    if isinstance(write, Accept):
        return write.request.id
    return f"import {write.key}" if isinstance(write, Import) else write.request


def _cas(write: Offer | Return | Grant | End) -> dict[str, Any]:
    return {_THE_ID: write.request, _THE_ATTEMPT: write.attempt}


def _compare_and_set(connection: Connection, statement: Executable, rows: Sequence[dict[str, Any]]) -> list[bool]:
    """Return which rows changed, each of its own request.

    As a rule all do, and one statement for all of them proves it by their sum. If one does not, the sum cannot say
    which, so the whole is undone and done again one by one.
    """
    if len(rows) > 1:
        with connection.begin_nested() as attempt:
            if connection.execute(statement, rows).rowcount == len(rows):
                return [True] * len(rows)
            attempt.rollback()
    return [connection.execute(statement, row).rowcount == 1 for row in rows]


# ---------------------------------------------------------------- artifacts


def _known_targets(connection: Connection, artifacts: Iterable[Artifact]) -> frozenset[int]:
    """Return those artifact ids that the relations name and the ledger has."""
    named = {
        relation.target for artifact in artifacts for relation in artifact.relations if isinstance(relation.target, int)
    }
    return frozenset(row.id for row in _rows(connection, _artifact_ids, named))


def _fault(artifacts: Sequence[Artifact], targets: Collection[int]) -> str | None:
    """Return what is wrong with the artifacts of one outcome."""
    handles = [artifact.handle for artifact in artifacts]
    for artifact in artifacts:
        if handles.count(artifact.handle) > 1:
            return f"expected each handle once in an outcome, got {artifact.handle!r} twice; name each artifact"
        for relation in artifact.relations:
            if relation.target not in targets and relation.target not in handles:
                return (
                    f"expected {artifact.name!r} to be {relation.type} an artifact of the ledger or of its own "
                    f"outcome, got {relation.target!r}, which is neither; name its id or its handle"
                )
    return None


def _record_artifacts(
    connection: Connection,
    sets: Sequence[tuple[Sequence[Artifact], str | None, int | None, float]],
    targets: Collection[int],
) -> list[dict[str, int]]:
    """Insert the artifacts of each outcome, leave out relations that lead nowhere, return handle to id."""
    rows = [
        {
            "request": request,
            "attempt": attempt,
            "handle": artifact.handle,
            "category": artifact.category,
            "name": artifact.name,
            "data": _json(artifact.data),
            "created": at,
        }
        for artifacts, request, attempt, at in sets
        for artifact in artifacts
    ]
    ids = iter(connection.execute(_new_artifact, rows).scalars().all() if rows else ())
    made: list[dict[str, int]] = []
    files: list[dict[str, Any]] = []
    relations: list[dict[str, Any]] = []
    for artifacts, _, _, _ in sets:
        numbered = [(next(ids), artifact) for artifact in artifacts]
        handles: dict[str, int] = {}
        for id_, artifact in numbered:
            handles.setdefault(artifact.handle, id_)
        for id_, artifact in numbered:
            files.extend(
                {"artifact": id_, "position": position, "path": file.path, "size": file.size, "sha256": file.sha256}
                for position, file in enumerate(artifact.files)
            )
            for position, relation in enumerate(artifact.relations):
                if isinstance(relation.target, str):
                    target = handles.get(relation.target)
                else:
                    target = relation.target if relation.target in targets else None
                if target is not None:
                    relations.append({"artifact": id_, "position": position, "type": relation.type, "target": target})
        made.append(handles)
    if files:
        connection.execute(_new_file, files)
    if relations:
        connection.execute(_new_relation, relations)
    return made


def _read_artifacts(connection: Connection, ids: Collection[int]) -> dict[int, RecordedArtifact]:
    files: defaultdict[int, list[FileEntry]] = defaultdict(list)
    for row in _rows(connection, _files_of, ids):
        files[row.artifact].append(FileEntry(path=row.path, size=row.size, sha256=row.sha256))
    relations: defaultdict[int, list[RecordedRelation]] = defaultdict(list)
    for row in _rows(connection, _relations_of, ids):
        relations[row.artifact].append(RecordedRelation(type=row.type, target=row.target))
    return {
        row.id: RecordedArtifact(
            id=row.id,
            category=row.category,
            name=row.name,
            data=msgspec.json.decode(row.data),
            files=files[row.id],
            relations=relations[row.id],
            request=row.request,
            created=row.created,
        )
        for row in _rows(connection, _artifacts_with_id, ids)
    }


# ---------------------------------------------------------------- rows


def _rows(connection: Connection, statement: Executable, ids: Collection[Any]) -> Iterator[Row[Any]]:
    """Go through the rows of a statement over any number of ids."""
    wanted = [*ids]
    for start in range(0, len(wanted), PAGE):
        yield from connection.execute(statement, {"ids": wanted[start : start + PAGE]})


def _request_view(row: Row[Any], attempts: list[AttemptView], artifacts: list[RecordedArtifact]) -> RequestView:
    return RequestView(
        seq=row.seq,
        request=_read_request(row.body),
        state=row.state,
        attempt=row.attempt,
        submitted=row.submitted,
        worker=row.worker,
        abort=row.abort,
        not_before=row.not_before,
        granted=row.granted,
        ended=row.ended,
        reason=_reason_from(row.reason),
        attempts=attempts,
        artifacts=artifacts,
    )


def _attempt_view(row: Row[Any]) -> AttemptView:
    return AttemptView(
        number=row.number,
        worker=row.worker,
        granted=row.granted,
        started=row.started,
        ended=row.ended,
        result=row.result,
        counted=row.counted,
        reason=_reason_from(row.reason),
    )


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _reason_json(reason: Reason | None) -> str | None:
    return None if reason is None else _json(reason)


def _reason_from(stored: str | None) -> Reason | None:
    return None if stored is None else _read_reason(stored)


# ---------------------------------------------------------------- the file


def _path(url: str) -> Path | None:
    """Return the file that a ledger's URL names; None: memory."""
    wanted = "expected a ledger's URL like sqlite:////var/lib/mqworker/ledger.db"
    try:
        parsed = make_url(url)
    except exc.ArgumentError as error:
        raise SettingsError(f"{wanted}, got something that is no URL; write sqlite:/// and the path") from error
    if parsed.drivername != "sqlite" or parsed.host is not None or parsed.query:
        given = parsed.render_as_string(hide_password=True)
        raise SettingsError(f"{wanted}, got {given}; only SQLite files are supported, without parameters")
    if parsed.database in (None, "", ":memory:"):
        return None
    return Path(os.path.realpath(parsed.database))  # so that two names of one file meet at one lock


def _take_lock(path: Path) -> int:
    """Take the lock beside a ledger and write the pid into it; it is held until the descriptor closes."""
    lock_path = f"{path}.lock"
    if path.is_dir():
        raise LedgerInvalid(f"expected a file for the ledger, got the directory {path}; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _explain_os(error, path) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise LedgerLocked(
            f"expected to be the only scheduler of the ledger {path}, but process {holder} holds {lock_path}; "
            "stop that scheduler, or use another ledger"
        ) from error
    except OSError as error:
        os.close(lock)
        raise _explain_os(error, path) from error
    return lock


def _explain_os(error: OSError, path: Path) -> MqworkerError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO}:
        return LedgerUnavailable(
            f"the ledger {path} cannot be written now: {error}; free space there, or look at its disk"
        )
    return LedgerInvalid(
        f"expected a path for the ledger where this user may make files, got {path}: {error}; "
        "name another path, or give this user the right to write there"
    )


def _connect(database: str, name: str) -> sqlite3.Connection:
    """Open the database file, make sure that it is ours before anything in it is changed, and set it up."""
    connection = sqlite3.connect(database, timeout=BUSY_TIMEOUT, check_same_thread=False)
    try:
        _set_up(connection, name)
    except BaseException:
        connection.close()
        raise
    return connection


def _set_up(connection: sqlite3.Connection, name: str) -> None:
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and not tables >= _schema.tables.keys():
        raise LedgerInvalid(
            f"expected {name} to be a ledger or an empty file, got an SQLite database of something else; "
            "name another file"
        )
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode not in {"wal", "memory"}:
        raise LedgerInvalid(
            f"expected a file system that can keep a write-ahead log for {name}, got one that cannot "
            f"(journal mode {mode}); put the ledger on a local disk"
        )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute(f"PRAGMA cache_size = {-CACHE_KIB}")


def _raise_term(connection: Connection, name: str) -> int:
    """Make the schema in an empty database, refuse another one, and return the new term."""
    if not connection.exec_driver_sql("SELECT 1 FROM sqlite_master").first():
        _schema.create_all(connection)
        connection.execute(insert(_meta), [{"key": "schema", "value": SCHEMA_VERSION}, {"key": "term", "value": 0}])
    meta = {row.key: row.value for row in connection.execute(select(_meta))}
    if meta.get("schema") != SCHEMA_VERSION or "term" not in meta:
        raise LedgerInvalid(
            f"expected {name} to have schema {SCHEMA_VERSION}, got schema {meta.get('schema', 'unknown')}; "
            "use the mqworker that wrote it, or another file"
        )
    term: int = meta["term"] + 1
    connection.execute(update(_meta).where(_meta.c.key == "term").values(value=term))
    return term


def _explain(error: exc.DatabaseError, name: str) -> MqworkerError | None:
    """Return what a database error means to whoever reads it; None: it is our own mistake."""
    code = getattr(error.orig, "sqlite_errorcode", None)
    primary = None if code is None else code & 0xFF  # extended codes carry their primary one in the low byte
    if primary in {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_FORMAT}:
        return LedgerInvalid(
            f"expected {name} to be an SQLite database, got one that cannot be read ({error.orig}); "
            "name another file, or bring back a backup"
        )
    if isinstance(error, exc.OperationalError) and primary != sqlite3.SQLITE_ERROR:
        return LedgerUnavailable(
            f"{name} cannot commit now: {error.orig}; nothing was written. "
            "Free space on its disk, and end what else holds the file open"
        )
    return None
