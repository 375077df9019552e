"""The facts: requests, attempts and artifacts in SQL, changed by one writer in one transaction at a time.

Knows no broker, no clock (every time is told) and no rule of its own: which move is legal and what meets a need stands
in lifecycle, and what an outcome means is judged by the scheduler. Each move is a compare-and-set: it changes the row
only if the row is still as the writer believed. Synchronous, for one thread at a time.
"""

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
from sqlalchemy import (
    URL,
    BindParameter,
    ColumnClause,
    ColumnElement,
    Connection,
    Executable,
    Row,
    Select,
    bindparam,
    column,
    delete,
    exc,
    func,
    insert,
    make_url,
    not_,
    or_,
    select,
    text,
    true,
    update,
)

from mqworker import schema
from mqworker.database import Database, Many
from mqworker.errors import IllegalMove, SettingsError, TooLarge
from mqworker.facts import (
    AbortAsked,
    AbortResult,
    Accept,
    Accepted,
    End,
    Ended,
    Expired,
    Grant,
    Granting,
    Import,
    ImportRefused,
    LaneCount,
    LaneRow,
    Live,
    Move,
    Moved,
    Need,
    Offer,
    Own,
    Pause,
    Rekey,
    RequirementRow,
    Result,
    Resume,
    Return,
    Stranded,
    Unmark,
    Wake,
    Wanted,
    Write,
)
from mqworker.lifecycle import FINAL, MOVES, Event, State, Tried, delayed_until, meets, move
from mqworker.messages import (
    FULL_ID,
    MAX_MESSAGE_BYTES,
    Artifact,
    AttemptView,
    CountRequests,
    FileEntry,
    ListArtifacts,
    ListRequests,
    PauseView,
    Reason,
    RecordedArtifact,
    RecordedRelation,
    Request,
    RequestView,
    Selection,
)
from mqworker.needs import Condition, Made, Standing, fill, not_met, take_from
from mqworker.needs import needs as needs_of
from mqworker.postgresql import PostgresqlDatabase
from mqworker.sqlite import SqliteDatabase

PAGE: Final = 1000  # the most values in one IN (...)
SHORTEST_BEGINNING: Final = 4  # characters of an id
MOST_MARKS: Final = 10_000  # of one user: aborts of requests that may never come
FILE_LENGTH: Final = 200  # characters of a file's entry, about

# ---------------------------------------------------------------- statements, built once

_requests, _dependencies, _requirements, _pauses, _attempts, _artifacts = (
    schema.requests,
    schema.dependencies,
    schema.requirements,
    schema.pauses,
    schema.attempts,
    schema.artifacts,
)
_abort_marks = schema.abort_marks
_artifact_files, _artifact_relations, _imports = schema.artifact_files, schema.artifact_relations, schema.imports
_worker_names = schema.worker_names

_THE_ID: Final = "the_id"
_THE_ATTEMPT: Final = "the_attempt"
_THE_TOKEN: Final = "the_token"  # noqa: S105  # the name of a bound value, not a secret
_THE_SEQ: Final = "the_seq"
_ids: BindParameter[Any] = bindparam("ids", expanding=True)


def _if_still(state: State) -> tuple[Any, ...]:
    """Return the conditions of a compare-and-set on a request's state and attempt."""
    return (
        _requests.c.id == bindparam(_THE_ID),
        _requests.c.state == state,
        _requests.c.attempt == bindparam(_THE_ATTEMPT),
    )


_need = insert(_requirements)
_needed = select(_requirements.c.id).where(_requirements.c.id.in_(_ids))
_accept = Many(insert(_requests))
_known = select(
    _requests.c.id,
    _requests.c.seq,
    _requests.c.content,
    _requests.c.state,
    _requests.c.attempt,
    _requests.c.reason,
).where(_requests.c.id.in_(_ids))

_wake = Many(
    update(_requests)
    .where(
        _requests.c.id == bindparam(_THE_ID),
        _requests.c.state == State.PENDING,
        _requests.c.not_before.is_not(None),
    )
    .values(not_before=None)
)
_offer = Many(
    update(_requests)
    .where(
        _requests.c.seq == bindparam(_THE_SEQ),
        *_if_still(State.PENDING),
        _requests.c.unmet == 0,
        _requests.c.not_before.is_(None),
    )
    .values(state=move(State.PENDING, Event.OFFER))
)
_return = Many(update(_requests).where(*_if_still(State.OFFERED)).values(state=move(State.OFFERED, Event.RETURN)))

_grant = Many(
    update(_requests)
    .where(*_if_still(State.OFFERED))
    .values(
        state=move(State.OFFERED, Event.GRANT),
        token=bindparam("token"),
        worker=bindparam("worker"),
        granted=bindparam("granted"),
    )
)
_granted_attempt = Many(insert(_attempts))
_holder = select(_requests.c.state, _requests.c.attempt, _requests.c.token).where(_requests.c.id == bindparam(_THE_ID))

_runs_still = (*_if_still(State.RUNNING), _requests.c.token == bindparam(_THE_TOKEN))
_end_for_good = Many(
    update(_requests)
    .where(*_runs_still)
    .values(
        state=bindparam("state"),
        tried=_requests.c.tried + bindparam("more"),
        ended=bindparam("ended"),
        reason=bindparam("reason"),
    )
)
_end_for_now = Many(
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
_ended_attempt = Many(
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

_places = select(
    _requests.c.id,
    _requests.c.seq,
    _requests.c.task,
    _requests.c.requirement,
    _requests.c.priority,
    _requests.c.grp,
    _requests.c.ckey,
    _requests.c.unmet,
    _requests.c.state,
    _requests.c.attempt,
    _requests.c.not_before,
).where(_requests.c.id.in_(_ids))
_of_seq = update(_requests).where(_requests.c.seq == bindparam(_THE_SEQ))
_abort_now = _of_seq.values(
    state=bindparam("state"), abort=bindparam("abort"), ended=bindparam("ended"), reason=bindparam("reason")
)
_abort_later = _of_seq.where(_requests.c.abort.is_(None)).values(abort=bindparam("abort"))
_move = _of_seq.values(priority=bindparam("to_priority"))
_rekey = _of_seq.where(schema.IS_LIVE).values(requirement=bindparam("to_requirement"))

_mark = insert(_abort_marks)
_marked = select(_abort_marks).where(_abort_marks.c.id.in_(_ids)).order_by(_abort_marks.c.at, _abort_marks.c.user)
_marks_of = select(func.count()).select_from(_abort_marks).where(_abort_marks.c.user == bindparam("user"))
_take_marks = delete(_abort_marks).where(_abort_marks.c.id.in_(_ids))
_unmark = delete(_abort_marks).where(_abort_marks.c.at < bindparam("before"))

_new_dependency = insert(_dependencies)
_anybody_waits = select(_dependencies.c.request).limit(1)
_waited_for = select(_dependencies.c.after).where(_dependencies.c.after.in_(_ids)).distinct()
_delete_met = delete(_dependencies).where(_dependencies.c.after.in_(_ids))
_delete_waiting = delete(_dependencies).where(_dependencies.c.request.in_(_ids))
_unmet_of = (
    select(_dependencies.c.request, _dependencies.c.after)
    .where(_dependencies.c.request.in_(_ids))
    .order_by(_dependencies.c.request, _dependencies.c.after)
)
_met = _of_seq.values(unmet=bindparam("still_unmet"), bound=bindparam("now_bound"))
_strand = _of_seq.values(state=bindparam("state"), ended=bindparam("ended"), reason=bindparam("reason"))
_made_by = (
    select(_artifacts.c.request, _artifacts.c.attempt, _artifacts.c.category, _artifacts.c.id)
    .where(_artifacts.c.request.in_(_ids))
    .order_by(_artifacts.c.id)
)

_pause = insert(_pauses)
_pause_again = (
    update(_pauses)
    .where(_pauses.c.kind == bindparam("the_kind"), _pauses.c.name == bindparam("the_name"))
    .values(reason=bindparam("reason"))
)
_resume = delete(_pauses).where(_pauses.c.kind == bindparam("the_kind"), _pauses.c.name == bindparam("the_name"))

_disown = delete(_worker_names).where(_worker_names.c.name == bindparam("the_name"))
_own = insert(_worker_names)
_all_worker_names = select(_worker_names.c.name, _worker_names.c.user)

_new_artifact = insert(_artifacts).returning(_artifacts.c.id, sort_by_parameter_order=True)
_new_file = insert(_artifact_files)
_new_relation = insert(_artifact_relations)
_new_import = insert(_imports)
_imported = select(_imports.c.key, _imports.c.artifact).where(_imports.c.key.in_(_ids))
_artifact_ids = select(_artifacts.c.id).where(_artifacts.c.id.in_(_ids))

_LIVE: Final = (
    "seq",
    "id",
    "body",
    "requirement",
    "priority",
    "inputs",
    "unmet",
    "bound",
    "state",
    "attempt",
    "tried",
    "worker",
    "token",
    "abort",
    "not_before",
    "submitted",
)


def _column(name: str) -> ColumnClause[Any]:
    """Name a column of the requests without naming their table, with its type."""
    return column(name, _requests.c[name].type)


def _from(index: str, *columns: str) -> Select[*tuple[Any, ...]]:
    return select(*(_column(name) for name in columns)).select_from(schema.RequestsBy(index))


_live_of_ids = select(*(_requests.c[name] for name in _LIVE)).where(_requests.c.id.in_(_ids))
_held = _from("requests_held", *_LIVE).where(schema.IS_HELD).order_by(_column("seq"))
_REQUEST: Final = tuple(_requests.c.keys())
_LANE: Final = ("requirement", "priority", "grp", "ckey")
_lanes = (
    _from("requests_lanes", *_LANE)
    .add_columns(func.count().label("number"))
    .where(schema.IS_WAITING)
    .group_by(*(_column(name) for name in _LANE))
)
_heads_of_group = (
    _from("requests_lanes", *_LIVE)
    .where(
        schema.IS_WAITING,
        _column("requirement") == bindparam("requirement"),
        _column("priority") == bindparam("priority"),
        _column("grp") == bindparam("group"),
        _column("seq") > bindparam("after"),
    )
    # By the key too, which is always the same. Else PostgreSQL may take all requests by their age, to save a look into
    # the index of lanes; and pass a million that have ended before it comes to one that waits.
    .order_by(_column("ckey"), _column("seq"))
    .limit(bindparam("limit"))
)
_heads = _heads_of_group.where(_column("ckey") >= bindparam("key"), _column("ckey") <= bindparam("key"))
# By itself, since no index of PostgreSQL serves a comparison that also holds between two NULLs.
_heads_without_key = _heads_of_group.where(_column("ckey").is_(None))
_members = (
    _from("requests_members", *_LIVE)
    .where(schema.IS_PENDING, _column("requirement") == bindparam("requirement"))
    .order_by(_column("priority").desc(), _column("seq"))
    .limit(bindparam("limit"))
)
_dependents = (
    select(
        _dependencies.c.after, _dependencies.c.need, *(_requests.c[name] for name in (*_LIVE, "grp", "ckey", "task"))
    )
    .join(_requests, _requests.c.seq == _dependencies.c.request)
    .where(_dependencies.c.after.in_(_ids))
    .order_by(_dependencies.c.request)
)
_used = _from("requests_members", "requirement").where(schema.IS_PENDING, _column("requirement").in_(_ids)).distinct()
_blocked = select(func.count(_dependencies.c.request.distinct()))
_expired = (
    _from("requests_expiring", "id", "expires_at")
    .where(schema.IS_EXPIRING, _column("expires_at") <= bindparam("now"))
    .order_by(_column("expires_at"))
    .limit(bindparam("limit"))
)
_expires_next = (
    _from("requests_expiring", "expires_at")
    .where(schema.IS_EXPIRING, _column("expires_at") > bindparam("now"))
    .order_by(_column("expires_at"))
    .limit(1)
)
_newest = select(func.max(_requests.c.seq))
_newest_requirement = select(func.max(_requirements.c.id))
_has_live_requests = or_(
    _from("requests_members", "seq").where(schema.IS_PENDING, text("requirement = requirements.id")).exists(),
    _requirements.c.id.in_(_from("requests_held", "requirement").where(schema.IS_HELD)),
)
_live_requirements = select(*_requirements.c).where(_has_live_requests).order_by(_requirements.c.id)
_old_requirements = delete(_requirements).where(
    not_(_has_live_requests),
    # The newest id stays known, so that it is not given again.
    _requirements.c.id < _newest_requirement.scalar_subquery(),
)
_all_pauses = select(_pauses).order_by(_pauses.c.kind, _pauses.c.name)

_views = select(_requests).where(_requests.c.id.in_(_ids))
_begins_with = (
    select(_requests.c.id)
    .where(_requests.c.id >= bindparam("beginning"), _requests.c.id < bindparam("beyond"))
    .limit(2)  # two are enough to know that it is not unique
)
_attempts_of = (
    select(*(one for one in _attempts.c if one.name != "late"))
    .where(_attempts.c.request.in_(_ids))
    .order_by(_attempts.c.number)
)
_artifacts_of = select(_artifacts.c.id).where(_artifacts.c.request.in_(_ids))
_length_of_requests = select(func.length(_requests.c.body).label("length")).where(_requests.c.id.in_(_ids))
_length_of_artifacts = select(_artifacts.c.id, func.length(_artifacts.c.data).label("length")).where(
    _artifacts.c.id.in_(_ids)
)
_number_of_files = (
    select(_artifact_files.c.artifact, func.count().label("number"))
    .where(_artifact_files.c.artifact.in_(_ids))
    .group_by(_artifact_files.c.artifact)
)
_artifacts_briefly = select(_artifacts.c.id, _artifacts.c.category, _artifacts.c.name).where(_artifacts.c.id.in_(_ids))
_artifacts_with_id = select(_artifacts).where(_artifacts.c.id.in_(_ids))
_files_of = select(_artifact_files).where(_artifact_files.c.artifact.in_(_ids)).order_by(_artifact_files.c.position)
_relations_of = (
    select(_artifact_relations).where(_artifact_relations.c.artifact.in_(_ids)).order_by(_artifact_relations.c.position)
)
_counts = select(_requests.c.state, func.count().label("number")).group_by(_requests.c.state)

_canonical = msgspec.json.Encoder(order="sorted")
_read_request = msgspec.json.Decoder(Request).decode
_read_bound = msgspec.json.Decoder(dict[str, int]).decode
_read_inputs = msgspec.json.Decoder(tuple[int, ...]).decode
_read_reason = msgspec.json.Decoder(Reason).decode
_ENDS: Final = frozenset(to for (state, _), to in MOVES.items() if state is State.RUNNING)


class Ledger:
    """Keep the facts of one pool; its only writer for as long as it is open."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._doubt: _Doubt | None = None
        with database.transaction() as connection:
            connection.execute(_old_requirements)

    @classmethod
    def open(cls, url: str) -> "Ledger":
        """Open a ledger, make it if there is none, bring its schema up to date, and raise its term by one.

        `sqlite:///path` is a file (four slashes: from the root), `sqlite://` lives in memory, and
        `postgresql://user:password@host:port/database` is PostgreSQL.

        Raises:
            LedgerLocked: another scheduler has it open, or is active; see `may_stand_by`.
            LedgerInvalid: it is no ledger, of another schema, or may not be read and written.
            LedgerUnavailable: the database cannot commit now.
            SettingsError: the URL is of another kind of database, or its package is missing.
        """
        kind, parsed = _read_url(url)
        database = kind.open(parsed)
        try:
            return cls(database)
        except BaseException:
            database.close()
            raise

    @staticmethod
    def check(url: str) -> str:
        """Try whether a ledger could be opened, and change nothing; return what was found.

        Raises:
            MqworkerError: as `open` does.
        """
        kind, parsed = _read_url(url)
        name, found = kind.check(parsed)
        match found:
            case None:
                return f"{name} is empty; the first scheduler makes its tables"
            case schema.REVISION:
                return name
            case _:
                return f"{name} has the schema {found}; the next scheduler brings it up to {schema.REVISION}"

    @staticmethod
    def may_stand_by(url: str) -> bool:
        """Tell whether a second scheduler of a ledger waits for its turn; else it is one too many.

        Raises:
            SettingsError: the URL is of another kind of database.
        """
        return _read_url(url)[0] is PostgresqlDatabase

    @property
    def name(self) -> str:
        """Say which ledger it is, fit for showing."""
        return self._database.name

    @property
    def term(self) -> int:
        """Return the term for which it was opened."""
        return self._database.term

    @property
    def upgraded_from(self) -> str | None:
        """Name the older schema that it had until it was opened; None: it had none, or this one."""
        return None if self._database.found == schema.REVISION else self._database.found

    @property
    def sure(self) -> bool:
        """Tell whether nobody else can have been elected yet; if not, `commit` finds out."""
        return self._database.sure

    def close(self) -> None:
        """Let go of the database and of the term; a second time does nothing."""
        self._database.close()

    # ---------------------------------------------------------------- writing

    def commit(self, writes: Sequence[Write]) -> list[Result]:
        """Do all writes in one transaction, and return one result each.

        They do what they would do one by one. But writes that concern different requests are independent of each
        other, as a rule, so they are done kind by kind, many rows with one statement.

        After LedgerUnavailable, the very same sequence may be given again, and is done once, even if a database that
        was cut off has committed it without an answer.

        Raises:
            IllegalMove: an End names a state that a run cannot end in; nothing is written.
            LedgerUnavailable: the database cannot commit now; nothing is written, as far as one can know.
            LedgerLost: another scheduler was elected; nothing is written.
        """
        doubt = self._doubt
        if doubt is not None:
            committed = self._database.has(doubt.number)
            self._doubt = None
            if committed and doubt.writes is writes:
                return doubt.results
        if not writes:
            if not self._database.sure:
                self._database.confirm()
            return []
        done: dict[int, Result] = {}
        with self._database.transaction() as connection:
            for (_, kind), numbers in sorted(_plan(writes, _entangled(connection, writes)).items()):
                of_kind = _DO[kind](connection, [writes[number] for number in numbers])
                done.update(zip(numbers, of_kind, strict=True))
            results = [done[number] for number in range(len(writes))]
            self._doubt = _Doubt(writes, results, self._database.number)  # until the commit is answered
        self._doubt = None
        return results

    # ---------------------------------------------------------------- reading

    def held(self) -> list[Live]:
        """Return every request that is offered, runs, or is pending with a delay, the oldest first."""
        with self._database.snapshot() as connection:
            return [_live(row) for row in connection.execute(_held)]

    def lanes(self) -> list[LaneCount]:
        """Count the waiting requests of each lane that has any."""
        with self._database.snapshot() as connection:
            return [LaneCount(*row) for row in connection.execute(_lanes)]

    def heads(self, wants: Sequence[Wanted]) -> list[list[Live]]:
        """Return for each want the requests that it asks for, the oldest first."""
        with self._database.snapshot() as connection:
            return [
                [
                    _live(row)
                    for row in connection.execute(_heads_without_key if want.key is None else _heads, want._asdict())
                ]
                for want in wants
            ]

    def members(self, requirement: int, limit: int) -> list[Live]:
        """Return the pending requests of a requirement class, whatever they wait for, the best first."""
        with self._database.snapshot() as connection:
            rows = connection.execute(_members, {"requirement": requirement, "limit": limit})
            return [_live(row) for row in rows]

    def requirements(self) -> list[RequirementRow]:
        """Return the requirement classes of requests that have not ended."""
        with self._database.snapshot() as connection:
            return [RequirementRow(*row) for row in connection.execute(_live_requirements)]

    def pauses(self) -> list[PauseView]:
        """Return what is paused."""
        with self._database.snapshot() as connection:
            return [
                PauseView(kind=row.kind, name=row.name, reason=row.reason, since=row.since)
                for row in connection.execute(_all_pauses)
            ]

    def worker_names(self) -> dict[str, str]:
        """Return whose each worker's name is, of those that are somebody's."""
        with self._database.snapshot() as connection:
            return {row.name: row.user for row in connection.execute(_all_worker_names)}

    def used(self, requirements: Collection[int]) -> frozenset[int]:
        """Return those of the requirement classes that have a pending request."""
        with self._database.snapshot() as connection:
            return frozenset(row.requirement for row in _rows(connection, _used, requirements))

    def blocked(self) -> int:
        """Count the requests that wait for others."""
        with self._database.snapshot() as connection:
            return connection.scalar(_blocked) or 0

    def expired(self, now: float, limit: int) -> Expired:
        """Return requests that are not granted and had to be by now, and when the next ones have to be."""
        with self._database.snapshot() as connection:
            rows = connection.execute(_expired, {"now": now, "limit": limit}).all()
            return Expired(
                tuple((row.id, row.expires_at) for row in rows), connection.scalar(_expires_next, {"now": now})
            )

    def histories(self, ids: Collection[str]) -> dict[str, tuple[Tried, ...]]:
        """Return how the attempts of requests ended that count, the oldest first; of each that has any."""
        found: defaultdict[str, list[Tried]] = defaultdict(list)
        with self._database.snapshot() as connection:
            for row in _rows(connection, _attempts_of, ids):
                if row.counted and row.result is not None:
                    reason = _reason_from(row.reason)
                    why = "no reason was given" if reason is None else reason.text
                    found[row.request].append(Tried(row.number, row.worker, row.result, why))
        return {id_: tuple(tried) for id_, tried in found.items()}

    def newest(self) -> int:
        """Return the highest seq that any request has; 0: there is none."""
        with self._database.snapshot() as connection:
            return connection.scalar(_newest) or 0

    def newest_requirement(self) -> int:
        """Return the highest id that a requirement class has ever had; 0: there was none."""
        with self._database.snapshot() as connection:
            return connection.scalar(_newest_requirement) or 0

    def view(self, ids: Sequence[str]) -> tuple[list[RequestView], list[str]]:
        """Return requests with their attempts and artifacts, and those ids that name none, or more than one.

        An id may be a beginning of at least SHORTEST_BEGINNING characters.

        Raises:
            TooLarge: they are more than an answer may hold; found out before they are read.
        """
        with self._database.snapshot() as connection:
            known = {row.id for row in _rows(connection, _known, [id_ for id_ in ids if FULL_ID.fullmatch(id_)])}
            full = {given: given if given in known else self._resolve(connection, given) for given in ids}
            wanted = [id_ for id_ in dict.fromkeys(full.values()) if id_ is not None]
            attempts: defaultdict[str, list[AttemptView]] = defaultdict(list)
            for row in _rows(connection, _attempts_of, wanted):
                attempts[row.request].append(_attempt_view(row))
            artifacts: defaultdict[str, list[RecordedArtifact]] = defaultdict(list)
            made = [row.id for row in _rows(connection, _artifacts_of, wanted)]
            _require_room(
                sum(row.length for row in _rows(connection, _length_of_requests, wanted))
                + sum(_weights(connection, made).values())
            )
            for _, artifact in sorted(_read_artifacts(connection, made).items()):
                artifacts[artifact.request or ""].append(artifact)
            rows = [*_rows(connection, _views, wanted)]
            after = _still_waited_for(connection, rows)
            views = {row.id: _request_view(row, after[row.seq], attempts[row.id], artifacts[row.id]) for row in rows}
        return [views[id_] for id_ in wanted], [given for given, id_ in full.items() if id_ is None]

    @staticmethod
    def _resolve(connection: Connection, given: str) -> str | None:
        if len(given) < SHORTEST_BEGINNING or FULL_ID.fullmatch(given):
            return None
        found = connection.execute(_begins_with, {"beginning": given, "beyond": given + "~"}).scalars().all()
        return found[0] if len(found) == 1 else None

    def states(self, ids: Sequence[str]) -> dict[str, str]:
        """Return the states of those requests, by their full ids, that are known."""
        with self._database.snapshot() as connection:
            return {row.id: row.state for row in _rows(connection, _known, ids)}

    def artifacts(self, query: ListArtifacts) -> list[RecordedArtifact]:
        """Return the newest artifacts that match.

        Raises:
            TooLarge: they are more than an answer may hold; found out before they are read.
        """
        statement = select(_artifacts.c.id).order_by(_artifacts.c.id.desc()).limit(query.limit)
        if query.request is not None:
            statement = statement.where(_artifacts.c.request == query.request)
        if query.category is not None:
            statement = statement.where(_artifacts.c.category == query.category)
        with self._database.snapshot() as connection:
            if query.ids:
                matching = [row.id for row in _rows(connection, statement.where(_artifacts.c.id.in_(_ids)), query.ids)]
                ids = sorted(set(matching), reverse=True)[: query.limit]
            else:
                ids = [*connection.execute(statement).scalars()]
            _require_room(sum(_weights(connection, ids).values()))
            found = _read_artifacts(connection, ids)
        return [found[id_] for id_ in ids]

    def artifacts_by_id(self, ids: Collection[int], *, limit: int | None = None) -> dict[int, RecordedArtifact]:
        """Return those of the artifacts that the ledger knows; with a limit, none larger, in characters about."""
        with self._database.snapshot() as connection:
            if limit is not None:
                ids = [number for number, weight in _weights(connection, ids).items() if weight <= limit]
            return _read_artifacts(connection, ids)

    def artifacts_briefly(self, ids: Collection[int]) -> dict[int, RecordedArtifact]:
        """Return those of the artifacts that the ledger knows, without data and files."""
        with self._database.snapshot() as connection:
            return {
                row.id: RecordedArtifact(id=row.id, category=row.category, name=row.name)
                for row in _rows(connection, _artifacts_briefly, ids)
            }

    def counts(self) -> dict[str, int]:
        """Return the number of requests in each state that has any."""
        with self._database.snapshot() as connection:
            return {row.state: row.number for row in connection.execute(_counts)}

    def count(self, query: CountRequests) -> int:
        """Return how many requests match."""
        with self._database.snapshot() as connection:
            return sum(
                connection.execute(one.with_only_columns(func.count(), maintain_column_froms=True)).scalar_one()
                for one in _selections(query)
            )

    def list(self, query: ListRequests) -> list[RequestView]:
        """Return the newest requests that match, or the oldest, without attempts.

        Raises:
            TooLarge: they are more than an answer may hold; found out before they are read.
        """
        order: ColumnElement[int] = _column("seq") if query.oldest else _column("seq").desc()
        older = true() if query.before is None else _column("seq") < query.before
        with self._database.snapshot() as connection:
            lengths = [
                (row.seq, row.length)
                for one in _selections(query)
                for row in connection.execute(
                    one.with_only_columns(
                        _column("seq"), func.length(_column("body")).label("length"), maintain_column_froms=True
                    )
                    .where(older)
                    .order_by(order)
                    .limit(query.limit)
                )
            ]
            chosen = heapq.nlargest(query.limit, lengths, key=lambda one: -one[0] if query.oldest else one[0])
            _require_room(sum(length for _, length in chosen))
            found = [
                row
                for one in _selections(query)
                for row in connection.execute(one.where(older).order_by(order).limit(query.limit))
            ]
            rows = heapq.nlargest(query.limit, found, key=lambda row: -row.seq if query.oldest else row.seq)
            after = _still_waited_for(connection, rows)
        return [_request_view(row, after[row.seq], [], []) for row in rows]


class _Doubt(NamedTuple):
    """A set of writes whose commit was not answered."""

    writes: Sequence[Write]
    results: list[Result]
    number: int


_Kind: TypeAlias = type[SqliteDatabase | PostgresqlDatabase]
_KINDS_OF_DATABASE: Final[dict[str, _Kind]] = {"sqlite": SqliteDatabase, "postgresql": PostgresqlDatabase}


def _read_url(url: str) -> tuple[_Kind, URL]:
    wanted = (
        "expected a ledger's URL like sqlite:////var/lib/mqworker/ledger.db or "
        "postgresql://USER:PASSWORD@HOST:5432/DATABASE"
    )
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError) as error:
        raise SettingsError(f"{wanted}, got something that is no URL") from error
    kind = _KINDS_OF_DATABASE.get(parsed.drivername)
    if kind is None:
        raise SettingsError(f"{wanted}, got one that begins with {parsed.drivername}://")
    return kind, parsed


# ---------------------------------------------------------------- the order of writes

_BLOCKED: Final = "what waits for others"


class _Entangled(NamedTuple):
    """Which requests of a set of writes others wait for, and which may wait for others (by seq)."""

    awaited: Collection[str]
    blocked: Collection[int]


def _entangled(connection: Connection, writes: Sequence[Write]) -> _Entangled:
    ending = {write.request for write in writes if isinstance(write, End | AbortAsked)}
    if not ending:
        return _Entangled((), ())
    new = {write.seq: needs_of(write.request) for write in writes if isinstance(write, Accept)}
    awaited = _awaited(connection, ending).union(*(ending & needs.keys() for needs in new.values()))
    if not awaited:
        return _Entangled((), ())
    offered = [write.seq for write in writes if isinstance(write, Offer)]
    blocked = {row.request for row in _rows(connection, _unmet_of, offered)}
    return _Entangled(awaited, blocked.union(seq for seq, needs in new.items() if needs))


def _awaited(connection: Connection, ids: Collection[str]) -> set[str]:
    """Return those requests that others wait for."""
    if connection.scalar(_anybody_waits) is None:
        return set()
    return {row.after for row in _rows(connection, _waited_for, ids)}


def _plan(writes: Sequence[Write], entangled: _Entangled) -> dict[tuple[int, int], list[int]]:
    """Return which writes are done together: those of one kind in one turn; turn by turn, and kind by kind in it."""
    groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    last: dict[str, tuple[int, int]] = {}  # the turn and kind of the latest write about something
    numbered = first = 0
    for number, write in enumerate(writes):
        kind = _KINDS[type(write)]
        if isinstance(write, Rekey):  # concerns any number of requests: behind all before it, before all behind it
            turn = max((turn for turn, _ in groups), default=0)
            first = turn + 1
            groups[turn, kind].append(number)
            continue
        turn = max(first, numbered) if kind in _NUMBERING else first
        about = _about(write)
        if about in last:
            before, other = last[about]
            turn = max(turn, before + (other >= kind))
        shared = _shared(write, entangled)
        for one in shared:
            if one in last:
                before, other = last[one]
                turn = max(turn, before + (other > kind))  # one kind minds its own order
        for one in (about, *shared):
            last[one] = turn, kind
        if kind in _NUMBERING:
            numbered = turn
        groups[turn, kind].append(number)
    return groups


def _about(write: Write) -> str:
    match write:
        case Accept():
            return write.request.id
        case Import():
            return f"import {write.key}"
        case Need():
            return f"requirement {write.id}"
        case Pause() | Resume():
            return f"pause {write.kind} {write.name}"
        case Own():
            return f"worker {write.name}"
        case Unmark():
            return "marks"
        case Rekey():
            return "all"
        case _:
            return write.request


def _shared(write: Write, entangled: _Entangled) -> Collection[str]:
    """Return what a write reads or changes besides what it is about."""
    needs: Collection[str] = ()
    match write:
        case Accept():
            needs = needs_of(write.request)
            blocked = bool(needs and entangled.awaited)
        case AbortAsked() | Move():
            blocked = bool(entangled.awaited)
        case End():
            blocked = write.request in entangled.awaited
        case Offer():
            blocked = write.seq in entangled.blocked
        case _:
            blocked = False
    return (*needs, _BLOCKED) if blocked else needs


# ---------------------------------------------------------------- each kind of write; within one, no request twice


def _do_needs(connection: Connection, writes: Sequence[Need]) -> list[Result]:
    known = {row.id for row in _rows(connection, _needed, [write.id for write in writes])}
    rows = [
        {
            "id": write.id,
            "task": write.task,
            "fingerprint": write.fingerprint,
            "reads": write.reads,
            "data": write.data,
            "requires": write.requires,
        }
        for write in writes
        if write.id not in known
    ]
    if rows:
        connection.execute(_need, rows)
    return [write.id not in known for write in writes]


def _do_accepts(connection: Connection, writes: Sequence[Accept]) -> list[Result]:
    needs = {write.request.id: needs_of(write.request) for write in writes}
    wanted = dict.fromkeys(needs)
    for named in needs.values():
        wanted.update(dict.fromkeys(named))
    known = {row.id: row for row in _rows(connection, _known, wanted)}
    contents = {write.request.id: _content(write.request) for write in writes}
    new = [write for write in writes if write.request.id not in known]
    standing = {id_: Standing(id_, State(row.state), row.attempt, 0.0) for id_, row in known.items()}
    made = _made(connection, {take.request for write in new for take in write.request.take} & standing.keys())
    marks = defaultdict(list)
    for mark in _rows(connection, _marked, [write.request.id for write in new]):
        marks[mark.id].append((mark.user or None, mark.reason))
    results: dict[str, Accepted] = {}
    rows = []
    dependencies = []
    for write in new:
        request = write.request
        beginning = _begin(write, needs[request.id], standing, made)
        heeded = [why for user, why in marks.get(request.id, ()) if write.heeds is None or user in write.heeds]
        if heeded and beginning.state not in FINAL:
            reason = Reason(text=heeded[0], stage="abort")
            beginning = _Beginning(state=move(beginning.state, Event.ABORT), reason=reason)
        standing[request.id] = Standing(request.id, beginning.state, 1, write.at)
        row = _new_request(write, contents[request.id], beginning)
        rows.append(row)
        dependencies += [{"request": write.seq, "after": id_, "need": need} for id_, need in beginning.unmet.items()]
        results[request.id] = _accepted(write, row, beginning)
    if rows:
        _accept.execute(connection, rows)
    if dependencies:
        connection.execute(_new_dependency, dependencies)
    _forget(connection, _take_marks, marks)

    def result(write: Accept) -> Accepted:
        before = known.get(write.request.id)
        if before is None:
            return results[write.request.id]
        if before.content != contents[write.request.id]:
            return Accepted(
                seq=before.seq,
                status="conflict",
                reason=f"expected a new id, got {write.request.id}, which is a request with other content; "
                "submit it with an id of its own",
            )
        if before.state == State.REJECTED:
            reason = _reason_from(before.reason)
            text_ = None if reason is None else reason.text
            return Accepted(seq=before.seq, status="rejected", reason=text_, state=State.REJECTED)
        return Accepted(seq=before.seq, status="known")

    return [result(write) for write in writes]


@dataclass(slots=True, kw_only=True)
class _Beginning:
    """Where a new request stands, and why."""

    state: State
    reason: Reason | None = None
    unmet: dict[str, Condition] = field(default_factory=dict)
    bound: dict[str, int] = field(default_factory=dict)


def _begin(
    write: Accept,
    needs: Mapping[str, Condition],
    standing: Mapping[str, Standing],
    made: Made,
) -> _Beginning:
    if write.rejected is not None:
        return _Beginning(state=move(None, Event.REJECT), reason=write.rejected)
    unknown = [id_ for id_ in needs if id_ not in standing]
    if unknown:
        return _Beginning(
            state=move(None, Event.REJECT),
            reason=Reason(
                text=f"expected it to come after requests that were submitted before it, got {', '.join(unknown)}, "
                "which nobody knows; submit that first",
                stage="after",
            ),
        )
    beginning = _Beginning(state=move(None, Event.ACCEPT))
    for id_, need in needs.items():
        met = meets(need, standing[id_].state)
        if met is None:
            beginning.unmet[id_] = need
            continue
        fault = take_from(write.request, standing[id_], made, beginning.bound) if met else not_met(standing[id_])
        if fault is not None:
            return _Beginning(state=move(beginning.state, Event.ABORT), reason=fault)
    return beginning


def _accepted(write: Accept, row: dict[str, Any], beginning: _Beginning) -> Accepted:
    match beginning.state:
        case State.REJECTED:
            reason = None if beginning.reason is None else beginning.reason.text
            return Accepted(seq=write.seq, status="rejected", reason=reason, state=beginning.state)
        case State.ABORTED:
            return Accepted(seq=write.seq, status="accepted", state=beginning.state, stranded=beginning.reason)
    live = None
    if beginning.bound:
        live = Live(
            seq=write.seq,
            request=_read_request(row["body"]),
            requirement=row["requirement"],
            inputs=write.inputs,
            unmet=row["unmet"],
            state=beginning.state,
            attempt=row["attempt"],
            tried=row["tried"],
            worker=None,
            token=None,
            abort=None,
            not_before=row["not_before"],
            submitted=write.at,
        )
        live = _filled(live, beginning.bound)
    return Accepted(seq=write.seq, status="accepted", state=beginning.state, unmet=len(beginning.unmet), live=live)


def _content(request: Request) -> str:
    fields = _told(request)
    del fields["id"]
    return hashlib.sha256(_canonical.encode(fields)).hexdigest()


def _told(struct: msgspec.Struct) -> dict[str, Any]:
    """Return what a struct says beyond its defaults: whether one is written out or left out says nothing.

    msgspec itself leaves a default out only if it is that very object, which a text from a message never is.
    """
    told: dict[str, Any] = {}
    for name, encoded, default in _defaults(type(struct)):
        value = getattr(struct, name)
        if value is not default and value != default:
            told[encoded] = _told_value(value)
    return told


@cache
def _defaults(kind: type[msgspec.Struct]) -> tuple[tuple[str, str, Any], ...]:
    """Return each field's name, its name on the wire, and its default."""
    return tuple(
        (one.name, one.encode_name, one.default if one.default_factory is msgspec.NODEFAULT else one.default_factory())
        for one in msgspec.structs.fields(kind)
    )


def _told_value(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return _told(value)
    if isinstance(value, list):
        return [_told_value(one) for one in value]
    return value


def _new_request(write: Accept, content: str, beginning: _Beginning) -> dict[str, Any]:
    request = write.request
    return {
        "seq": write.seq,
        "id": request.id,
        "task": request.task,
        "body": _json(request),
        "content": content,
        "requirement": write.requirement,
        "priority": request.priority,
        "grp": request.group,
        "ckey": request.concurrency_key,
        "inputs": _json(write.inputs),
        "unmet": len(beginning.unmet),
        "bound": _json(beginning.bound) if beginning.bound else None,
        "state": beginning.state,
        "attempt": 1,
        "tried": 0,
        "not_before": delayed_until(request, write.at) if beginning.state not in FINAL else None,
        "expires_at": request.expires_at,
        "submitted": write.at,
        "submitter": write.submitter,
        "ended": write.at if beginning.state in FINAL else None,
        "reason": _reason_json(beginning.reason),
    }


def _do_wakes(connection: Connection, writes: Sequence[Wake]) -> list[Result]:
    return [*_compare_and_set(connection, _wake, [{_THE_ID: write.request} for write in writes])]


def _do_moves(connection: Connection, writes: Sequence[Move]) -> list[Result]:
    rows = {row.id: row for row in _rows(connection, _live_of_ids, [write.request for write in writes])}
    live = [write for write in writes if write.request in rows and State(rows[write.request].state) not in FINAL]
    changes = [{_THE_SEQ: rows[write.request].seq, "to_priority": write.priority} for write in live]
    if changes:
        connection.execute(_move, changes)
    moved: dict[str, Result] = {}
    for write in live:
        before = _live(rows[write.request])
        request = msgspec.structs.replace(before.request, priority=write.priority)
        moved[write.request] = Moved(live=replace(before, request=request), before=before.request.priority)
    return [moved.get(write.request, Moved(live=None, before=None)) for write in writes]


def _do_offers(connection: Connection, writes: Sequence[Offer]) -> list[Result]:
    rows = [_cas(write) | {_THE_SEQ: write.seq} for write in writes]
    return [*_compare_and_set(connection, _offer, rows)]


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
        _granted_attempt.execute(connection, rows)

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
        _ended_attempt.execute(connection, [_attempt_row(writes[number], judged[number][1]) for number in recorded])
    made = _record_artifacts(
        connection,
        [
            (writes[number].artifacts, writes[number].request, writes[number].attempt, writes[number].at)
            for number in recorded
        ],
        targets,
    )
    final = [number for number in recorded if judged[number][0] in FINAL]
    settled = _settle(
        connection,
        [
            Standing(writes[number].request, judged[number][0], writes[number].attempt, writes[number].at)
            for number in final
        ],
    )
    followed = {final[number]: one for number, one in settled.items()}
    for number, handles in zip(recorded, made, strict=True):
        to, _, fault = judged[number]
        freed, stranded = followed.get(number, ((), ()))
        results[number] = Ended(
            status="recorded", reason=fault, artifacts=handles, state=to, freed=freed, stranded=stranded
        )
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
    """Abort one after the other, as far as one can change what the next finds: if others come after it."""
    awaited = _awaited(connection, [write.request for write in writes])
    results: list[Result] = []
    together: list[AbortAsked] = []
    for write in writes:
        together.append(write)
        if write.request in awaited:
            results += _abort(connection, together)
            together = []
    return [*results, *_abort(connection, together)]


def _abort(connection: Connection, writes: Sequence[AbortAsked]) -> list[AbortResult]:
    rows = {row.id: row for row in _rows(connection, _places, [write.request for write in writes])}
    marked = _keep_marks(connection, [write for write in writes if write.mark and write.request not in rows])
    results: list[AbortResult] = []
    now, later, blocked = [], [], []
    for write in writes:
        row = rows.get(write.request)
        if row is None:
            kept = write.request in marked
            results.append(AbortResult(before=None, after=None, marked=kept, full=write.mark and not kept))
            continue
        before = after = State(row.state)
        lane = None
        if not write.known:
            results.append(AbortResult(before=before, after=after))
            continue
        if before is State.RUNNING:
            if write.running:
                later.append({_THE_SEQ: row.seq, "abort": write.reason})
        elif before not in FINAL:
            after = move(before, Event.ABORT)
            now.append(
                {
                    _THE_SEQ: row.seq,
                    "state": after,
                    "abort": write.reason,
                    "ended": write.at,
                    "reason": _reason_json(Reason(text=write.reason, stage=write.stage)),
                }
            )
            if before is State.PENDING:
                waiting = row.unmet == 0 and row.not_before is None
                lane = LaneRow(row.requirement, row.priority, row.grp, row.ckey, row.seq, waiting)
            if row.unmet:
                blocked.append(row.seq)
        results.append(AbortResult(before=before, after=after, task=row.task, attempt=row.attempt, before_lane=lane))
    for statement, changes in ((_abort_now, now), (_abort_later, later)):
        if changes:
            connection.execute(statement, changes)
    _forget(connection, _delete_waiting, blocked)
    ended = [number for number, result in enumerate(results) if result.before is not result.after]
    settled = _settle(
        connection,
        [
            Standing(writes[number].request, State.ABORTED, rows[writes[number].request].attempt, writes[number].at)
            for number in ended
        ],
    )
    for number, (freed, stranded) in settled.items():
        results[ended[number]] = replace(results[ended[number]], freed=freed, stranded=stranded)
    return results


def _keep_marks(connection: Connection, writes: Sequence[AbortAsked]) -> set[str]:
    """Keep what is to be aborted once it comes, and return it; what a user asked first stays, up to so many."""
    known = {(row.id, row.user) for row in _rows(connection, _marked, [write.request for write in writes])}
    users = {write.user or "" for write in writes}
    numbers = {user: connection.scalar(_marks_of, {"user": user}) or 0 for user in users}
    kept = set()
    rows = []
    for write in writes:
        user = write.user or ""
        if (write.request, user) not in known:
            if numbers[user] >= MOST_MARKS:
                continue
            numbers[user] += 1
            rows.append({"id": write.request, "reason": write.reason, "user": user, "at": write.at})
        kept.add(write.request)
    if rows:
        connection.execute(_mark, rows)
    return kept


def _do_unmarks(connection: Connection, writes: Sequence[Unmark]) -> list[Result]:
    return [connection.execute(_unmark, {"before": write.before}).rowcount for write in writes]


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


def _do_pauses(connection: Connection, writes: Sequence[Pause]) -> list[Result]:
    return [_do_pause(connection, write) for write in writes]


def _do_pause(connection: Connection, write: Pause) -> bool:
    again = {"the_kind": write.kind, "the_name": write.name, "reason": write.reason}
    if connection.execute(_pause_again, again).rowcount:
        return False
    connection.execute(_pause, {"kind": write.kind, "name": write.name, "reason": write.reason, "since": write.at})
    return True


def _do_resumes(connection: Connection, writes: Sequence[Resume]) -> list[Result]:
    return [
        connection.execute(_resume, {"the_kind": write.kind, "the_name": write.name}).rowcount == 1 for write in writes
    ]


def _do_owns(connection: Connection, writes: Sequence[Own]) -> list[Result]:
    def own(write: Own) -> bool:
        owned = connection.execute(_disown, {"the_name": write.name}).rowcount == 1
        if write.user is not None:
            connection.execute(_own, {"name": write.name, "user": write.user, "since": write.at})
        return owned

    return [own(write) for write in writes]


def _do_rekeys(connection: Connection, writes: Sequence[Rekey]) -> list[Result]:
    def rekey(write: Rekey) -> int:
        rows = [{_THE_SEQ: seq, "to_requirement": requirement} for seq, requirement in write.to.items()]
        return connection.execute(_rekey, rows).rowcount if rows else 0

    return [rekey(write) for write in writes]


_Doing: TypeAlias = Callable[[Connection, Sequence[Any]], list[Result]]
_ORDER: Final[tuple[tuple[type, _Doing], ...]] = (
    (Need, _do_needs),
    (Accept, _do_accepts),
    (Wake, _do_wakes),
    (Move, _do_moves),
    (Offer, _do_offers),
    (Return, _do_returns),
    (Grant, _do_grants),
    (End, _do_ends),
    (AbortAsked, _do_aborts),
    (Unmark, _do_unmarks),
    (Import, _do_imports),
    (Pause, _do_pauses),
    (Resume, _do_resumes),
    (Own, _do_owns),
    (Rekey, _do_rekeys),  # the last: see _plan
)
_KINDS: Final = {kind: number for number, (kind, _) in enumerate(_ORDER)}
_DO: Final = [do for _, do in _ORDER]
_NUMBERING: Final = frozenset({_KINDS[End], _KINDS[Import]})  # an artifact's id rises in the order given


def _cas(write: Offer | Return | Grant | End) -> dict[str, Any]:
    return {_THE_ID: write.request, _THE_ATTEMPT: write.attempt}


def _compare_and_set(connection: Connection, statement: Many, rows: Sequence[dict[str, Any]]) -> list[bool]:
    """Return which rows changed, each of its own request.

    As a rule all do, and one statement for all of them proves it by their sum. If one does not, the sum cannot say
    which, so the whole is undone and done again one by one.
    """
    if len(rows) > 1:
        with connection.begin_nested() as attempt:
            if statement.execute(connection, rows) == len(rows):
                return [True] * len(rows)
            attempt.rollback()
    return [statement.execute(connection, [row]) == 1 for row in rows]


# ---------------------------------------------------------------- what comes after others


_Settled: TypeAlias = tuple[tuple[Live, ...], tuple[Stranded, ...]]  # freed, stranded


@dataclass(slots=True, kw_only=True)
class _Dependent:
    """A request that comes after others, as it is while these are settled."""

    row: Row[Any]
    request: Request  # as it was submitted
    unmet: int
    bound: dict[str, int]
    fault: Reason | None = None
    at: float = 0.0  # when it was aborted

    def live(self) -> Live:
        return _filled(replace(_live(self.row), unmet=self.unmet), self.bound)

    def stranded(self, fault: Reason) -> Stranded:
        return Stranded(
            seq=self.row.seq,
            id=self.row.id,
            task=self.row.task,
            reason=fault,
            requirement=self.row.requirement,
            priority=self.row.priority,
            group=self.row.grp,
            key=self.row.ckey,
        )


def _settle(connection: Connection, ended: Sequence[Standing]) -> dict[int, _Settled]:
    """Settle what comes after each of the requests that ended, one after the other.

    Return what that did, by number, if anything: who waits for nobody any more, and who was aborted for it. What
    comes after an aborted one is settled with it.
    """
    if not ended or connection.scalar(_anybody_waits) is None:
        return {}
    met: dict[int, _Dependent] = {}  # by seq
    first = _waiting_for(connection, [one.id for one in ended], met)
    if not first:
        return {}
    takers = {take.request for dependent in met.values() for take in dependent.request.take}
    made = _made(connection, takers & first.keys())
    results: dict[int, _Settled] = {}
    causes = [*first]
    for number, one in enumerate(ended):
        if one.id not in first:
            continue
        freed: list[_Dependent] = []
        stranded: list[_Dependent] = []
        wave, waiting = [one], first
        while wave:
            following = []
            for cause in wave:
                for need, dependent in waiting.get(cause.id, ()):
                    if dependent.fault is not None:
                        continue
                    fulfilled = meets(need, cause.state)
                    dependent.fault = (
                        take_from(dependent.request, cause, made, dependent.bound) if fulfilled else not_met(cause)
                    )
                    if dependent.fault is not None:
                        dependent.at = one.at
                        stranded.append(dependent)
                        after = move(State.PENDING, Event.ABORT)
                        following.append(Standing(dependent.row.id, after, dependent.row.attempt, one.at))
                        continue
                    dependent.unmet -= 1
                    if dependent.unmet == 0:
                        freed.append(dependent)
            wave = following
            waiting = _waiting_for(connection, [cause.id for cause in wave], met) if wave else {}
            causes += waiting
        freed.sort(key=lambda dependent: dependent.row.seq)
        results[number] = (
            tuple(dependent.live() for dependent in freed),
            tuple(dependent.stranded(dependent.fault) for dependent in stranded if dependent.fault is not None),
        )
    _write_settled(connection, causes, met.values())
    return results


def _waiting_for(
    connection: Connection, ids: Collection[str], met: dict[int, _Dependent]
) -> dict[str, list[tuple[Condition, _Dependent]]]:
    """Return who waits for each of the requests, if anybody, the oldest first; those met before as they are now."""
    waiting: defaultdict[str, list[tuple[Condition, _Dependent]]] = defaultdict(list)
    for row in _rows(connection, _dependents, ids):
        if row.seq not in met:
            met[row.seq] = _Dependent(
                row=row,
                request=_read_request(row.body),
                unmet=row.unmet,
                bound=_read_bound(row.bound) if row.bound is not None else {},
            )
        waiting[row.after].append((row.need, met[row.seq]))
    return dict(waiting)


def _write_settled(connection: Connection, causes: Collection[str], dependents: Collection[_Dependent]) -> None:
    connection.execute(
        _met,
        [
            {
                _THE_SEQ: dependent.row.seq,
                "still_unmet": dependent.unmet,
                "now_bound": _json(dependent.bound) if dependent.bound else None,
            }
            for dependent in dependents
        ],
    )
    stranded = [dependent for dependent in dependents if dependent.fault is not None]
    if stranded:
        after = move(State.PENDING, Event.ABORT)
        connection.execute(
            _strand,
            [
                {
                    _THE_SEQ: dependent.row.seq,
                    "state": after,
                    "ended": dependent.at,
                    "reason": _reason_json(dependent.fault),
                }
                for dependent in stranded
            ],
        )
    _forget(connection, _delete_met, causes)
    _forget(connection, _delete_waiting, [dependent.row.seq for dependent in stranded])


def _forget(connection: Connection, statement: Executable, ids: Collection[Any]) -> None:
    """Delete the rows of a statement over any number of ids."""
    wanted = [*ids]
    for start in range(0, len(wanted), PAGE):
        connection.execute(statement, {"ids": wanted[start : start + PAGE]})


def _made(connection: Connection, ids: Collection[str]) -> Made:
    """Return the artifacts that the attempts of requests made."""
    made: defaultdict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
    for row in _rows(connection, _made_by, ids):
        made[row.request, row.attempt].append((row.category, row.id))
    return made


# ---------------------------------------------------------------- artifacts


def _known_targets(connection: Connection, artifacts: Iterable[Artifact]) -> frozenset[int]:
    """Return those artifact ids that the relations name and the ledger has."""
    named = {
        relation.target for artifact in artifacts for relation in artifact.relations if isinstance(relation.target, int)
    }
    return frozenset(row.id for row in _rows(connection, _artifact_ids, named))


def _fault(artifacts: Sequence[Artifact], targets: Collection[int]) -> str | None:
    """Return what is wrong with the artifacts of one outcome."""
    handles = Counter(artifact.handle for artifact in artifacts)
    for artifact in artifacts:
        if handles[artifact.handle] > 1:
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


def _weights(connection: Connection, ids: Collection[int]) -> dict[int, int]:
    """Return how large the descriptions of artifacts are, in characters, about, without reading them."""
    files = {row.artifact: row.number for row in _rows(connection, _number_of_files, ids)}
    return {
        row.id: row.length + FILE_LENGTH * files.get(row.id, 0) for row in _rows(connection, _length_of_artifacts, ids)
    }


def _require_room(characters: int) -> None:
    """Refuse to read what is too large for an answer.

    Raises:
        TooLarge: it is.
    """
    if characters > MAX_MESSAGE_BYTES:
        raise TooLarge(
            f"expected a question with an answer of at most {MAX_MESSAGE_BYTES} bytes; ask for fewer at a time"
        )


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


def _live(row: Row[Any]) -> Live:
    live = Live(
        seq=row.seq,
        request=_request(row),
        requirement=row.requirement,
        inputs=() if row.inputs == "[]" else _read_inputs(row.inputs),
        unmet=row.unmet,
        state=State(row.state),
        attempt=row.attempt,
        tried=row.tried,
        worker=row.worker,
        token=row.token,
        abort=row.abort,
        not_before=row.not_before,
        submitted=row.submitted,
    )
    return live if row.bound is None else _filled(live, _read_bound(row.bound))


def _filled(live: Live, bound: Mapping[str, int]) -> Live:
    """Put artifacts that a request takes into its data, which nobody else must hold, and among its inputs."""
    fill(live.request.data, bound)  # nothing is in the way: that was tried before it was bound
    return replace(live, inputs=(*dict.fromkeys((*live.inputs, *bound.values())),))


def _request(row: Row[Any]) -> Request:
    """Return a request with its present priority."""
    request = _read_request(row.body)
    return request if row.priority == request.priority else msgspec.structs.replace(request, priority=row.priority)


def _selections(query: Selection) -> list[Select[*tuple[Any, ...]]]:
    """Select the requests that match, in parts that have none in common.

    The index by state holds all that one can select by, but for the worker, and has only each state's requests in
    order of age. So it is asked state by state, unless there is an index for just what is wanted.
    """
    wanted = {"task": query.task, "grp": query.group, "worker": query.worker}
    conditions = [_column(name) == value for name, value in wanted.items() if value is not None]
    if query.submitted_before is not None:
        conditions.append(_column("submitted") < query.submitted_before)
    states = sorted(set(query.states))
    if query.worker is None and (states or query.submitted_before is not None or len(conditions) > 1):
        statement = _from("requests_by_state", *_REQUEST).where(*conditions)
        return [statement.where(_column("state") == state) for state in states or State]
    if states:
        conditions.append(_column("state").in_(states))
    return [select(*(_column(name) for name in _REQUEST)).select_from(text("requests")).where(*conditions)]


def _still_waited_for(connection: Connection, rows: Iterable[Row[Any]]) -> defaultdict[int, list[str]]:
    """Return what each of the requests still waits for."""
    after: defaultdict[int, list[str]] = defaultdict(list)
    blocked = [row.seq for row in rows if row.unmet]
    for row in _rows(connection, _unmet_of, blocked):
        after[row.request].append(row.after)
    return after


def _request_view(
    row: Row[Any], after: list[str], attempts: list[AttemptView], artifacts: list[RecordedArtifact]
) -> RequestView:
    request = _request(row)
    if row.bound is not None:  # see _filled
        fill(request.data, _read_bound(row.bound))
    return RequestView(
        seq=row.seq,
        request=request,
        requirement=row.requirement,
        after=[id_ for id_ in needs_of(request) if id_ in after],
        state=row.state,
        attempt=row.attempt,
        submitted=row.submitted,
        submitter=row.submitter,
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
