"""The client: submit, wait, look, command, follow and fetch, from a script or a shell.

A synchronous face: an asyncio loop in a background thread holds the broker connection, and every call waits on an
event there, so that Ctrl-C works at any time. Knows the broker by amqp, the bytes by store, and no ledger: whatever it
knows of requests, a scheduler has told it.
"""

import asyncio
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar, cast

import msgspec

from mqworker import requires as schemas
from mqworker.amqp import BLOCKED, REPLY_TO, Consumer, Delivery, Link, Plan
from mqworker.errors import (
    ArtifactInvalid,
    BrokerRefused,
    BrokerUnavailable,
    Conflict,
    Forbidden,
    MqworkerError,
    NotFound,
    NotPublished,
    OutsideError,
    PeerError,
    Rejected,
    SettingsError,
    StoreMismatch,
    Unanswered,
    Unreadable,
)
from mqworker.lifecycle import FINAL, MOVES, window_problem
from mqworker.messages import (
    FULL_ID,
    MAX_DESCRIBED_BYTES,
    MAX_REQUEST_BYTES,
    MAX_REQUESTS_IN_A_MESSAGE,
    AbortRequests,
    After,
    Answer,
    Artifact,
    ArtifactList,
    Capability,
    CapabilityList,
    Command,
    CountRequests,
    DrainWorkers,
    Explain,
    Explanation,
    FileEntry,
    ForgetWorker,
    GetCapabilities,
    GetPool,
    GetRequests,
    GetStates,
    ImportArtifact,
    Limits,
    ListArtifacts,
    ListPauses,
    ListRequests,
    ListWorkers,
    LogProgress,
    LogText,
    Pause,
    PauseList,
    PauseView,
    Pool,
    Problem,
    Query,
    Receipt,
    Receipted,
    RecordedArtifact,
    RefreshWorkers,
    Relation,
    Reprioritise,
    Request,
    RequestCount,
    RequestEvent,
    RequestEvents,
    RequestList,
    RequestState,
    RequestView,
    Resume,
    RetryRequest,
    StateList,
    StuckEvent,
    Submit,
    Take,
    WorkerEvent,
    WorkerList,
    WorkerView,
    decode,
    encode,
    tag_of,
)
from mqworker.store import Store
from mqworker.topology import Topology

logger = logging.getLogger(__name__)

Followed = LogText | LogProgress | RequestEvent
PoolEvent = RequestEvent | WorkerEvent | StuckEvent
Heard = Followed | PoolEvent
_Followed = LogText | LogProgress | RequestEvents | WorkerEvent | StuckEvent  # as it comes
Pausable = Literal["worker", "task", "group"]
Views = list[RequestView]  # in a class that has a method `list`, list[...] is no type
Workers = list[WorkerView]
Pauses = list[PauseView]
Events = list[PoolEvent]
Ids = list[str]
Artifacts = list[RecordedArtifact]
Paths = list[Path]
Receipts = list[Receipted]
Items = list[Followed]
Names = list[str]
_T = TypeVar("_T")
_Naming = TypeVar("_Naming", After, Take)
_Query = TypeVar("_Query", bound=Query)

FIRST_CONNECT_SECONDS: Final = 5.0  # who calls a command should not wait half a minute for a wrong port
RESEND_SECONDS: Final = 5.0  # without an answer; doubles each time: every copy costs the scheduler a look
ENOUGH_ENDED: Final = 1000  # requests to look at together ...
HUSH_SECONDS: Final = 0.02  # ... or as many as have ended when for so long no other has
LOOK_AGAIN_SECONDS: Final = 10.0  # a safety net under events
PAUSE_SECONDS: Final = 0.2  # after the broker refused a message that it was sent on a healthy connection
BATCH_BYTES: Final = 1024 * 1024  # an eighth of what a message may have
BATCHES_AT_ONCE: Final = 4
VIEWS_IN_AN_ANSWER: Final = 100  # as long as nobody knows how large they are
MOST_VIEWS_IN_AN_ANSWER: Final = 1000
FOLLOW_PREFETCH: Final = 500  # what a slow reader has in memory; the rest waits at the broker

_MOVE_TO: Final[Mapping[str, str]] = {to: event for (_, event), to in MOVES.items() if to in FINAL}
_PROBLEMS: Final[Mapping[str, type[MqworkerError]]] = {
    "unreadable": Unreadable,
    "not_found": NotFound,
    "too_large": Rejected,
    "conflict": Conflict,
    "rejected": Rejected,
    "artifact_invalid": ArtifactInvalid,
    "store_mismatch": StoreMismatch,
    "forbidden": Forbidden,
}


class Client:
    """Talk to a pool; a context manager.

    `timeout` (seconds) bounds each call that needs an answer. Calls may come from several threads. `on_blocked` hears,
    in a thread of the client's, when a memory or disk alarm stops the broker from taking what calls send, and when it
    takes it again; it must be quick.

        with Client("amqp://guest:guest@localhost/") as client:
            request = client.submit("noop", {"duration": 2})
            [view] = client.wait([request])
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "mqworker",
        store_url: str | None = None,
        timeout: float = 30.0,
        on_blocked: Callable[[bool], None] = lambda _blocked: None,
    ) -> None:
        self._url = url
        self._topology = Topology(prefix)
        self._store_url = store_url
        self._store: Store | None = None
        self._timeout = timeout
        self._on_blocked = on_blocked
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop: asyncio.Event | None = None
        self._broken: BaseException | None = None
        self._line: _Line | None = None
        self._answers: dict[str, asyncio.Future[bytes]] = {}
        self._follows: set[_Follow] = set()
        self._requests_at_once = _Fit()
        self._workers_at_once = _Fit()
        self._classes_at_once = _Fit()

    # ------------------------------------------------------------ open and close

    def open(self) -> Self:
        """Connect.

        Raises:
            BrokerRefused: the broker does not want these credentials or has no such vhost.
            BrokerUnavailable: nobody answers at that address.
            SettingsError: the URL is none.
        """
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), name="mqworker-client", daemon=True)
        self._thread.start()
        ready.wait()
        try:
            self._call(self._connected())
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Disconnect; a second call does nothing."""
        if self._thread is None:
            return
        if self._loop is not None and self._stop is not None and self._broken is None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._thread = None

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------ requests

    def submit(
        self,
        task: str,
        data: Mapping[str, Any] | None = None,
        *,
        priority: int = 0,
        max_attempts: int = 3,
        retry_on: Iterable[Literal["failure", "error"]] = (),
        lease: float | None = None,
        timeout: float | None = None,
        not_before: float | None = None,
        expires_at: float | None = None,
        limits: Limits | None = None,
        group: str = "default",
        concurrency_key: str | None = None,
        requires: Mapping[str, Any] | None = None,
        after: Iterable[str | After] = (),
        take: Iterable[Take] = (),
        id: str | None = None,  # noqa: A002  # the word for it everywhere else
    ) -> str:
        """Submit one request and return its id, once the ledger keeps it.

        `lease` and `timeout` are in seconds: how long a run may go on unheard, and how long at all. `not_before` and
        `expires_at` are seconds since the epoch, and bound when it may begin. `retry_on` are results that are tried
        again, up to `max_attempts`; what is lost is tried again anyway. `limits` bound what a run may use of its host.

        `requires` is a JSON Schema that a worker's metadata must satisfy; keys that must be there it has to name in
        `required`. `after` are requests that have to end first, ids (or unique beginnings) those that must succeed.
        `take` puts ids of artifacts that other requests make into the task data.

            many_cores = {"required": ["system:cpu_count"], "properties": {"system:cpu_count": {"minimum": 8}}}
            first = client.submit("noop", requires=many_cores)
            client.submit("noop", after=[first], group="night")

        Raises:
            Rejected: the scheduler, or this client, does not accept it; the text says why.
            Conflict: the id is taken by a request with other content.
            NotFound: there is no request to come after.
            Unanswered: no receipt came in time; the text says how far the request got.
        """
        try:
            request = Request(
                id=id or str(uuid.uuid4()),
                task=task,
                data=dict(data or {}),
                priority=priority,
                max_attempts=max_attempts,
                retry_on=[*retry_on],
                lease=lease,
                timeout=timeout,
                not_before=not_before,
                expires_at=expires_at,
                limits=limits,
                group=group,
                concurrency_key=concurrency_key,
                requires=None if requires is None else dict(requires),
                after=[self._after(one) for one in after],
                take=[self._named(one) for one in take],
            )
        except ValueError as error:
            raise Rejected(f"the request cannot be: {error}") from error
        [receipted] = self.submit_many([request])
        if receipted.status == "rejected":
            raise Rejected(f"request {request.id} was not accepted: {receipted.reason}")
        if receipted.status == "conflict":
            raise Conflict(receipted.reason or f"the id {request.id} is taken by a request with other content")
        return request.id

    def submit_many(self, requests: Iterable[Request]) -> Receipts:
        """Submit requests and return what became of each, in their order, once the ledger has answered for all.

        Sends many in one message, and each message again with the same ids until its receipt comes, so a call that
        failed may be repeated with the same requests.

        Raises:
            Rejected: a request cannot be written; none of its message was sent.
            Unanswered: a receipt did not come in time; the text says whether the broker has the requests.
        """
        receipts: Receipts = []
        under_way: deque[Future[Receipts]] = deque()
        try:
            for batch in _batches(requests):
                under_way.append(self._start(self._submit(batch)))
                if len(under_way) >= BATCHES_AT_ONCE:
                    oldest = self._result(under_way.popleft())
                    receipts += oldest
            while under_way:
                oldest = self._result(under_way.popleft())
                receipts += oldest
        finally:
            for future in under_way:
                future.cancel()
        return receipts

    def wait(
        self,
        ids: Iterable[str],
        timeout: float | None = None,
        *,
        on_end: Callable[[RequestView], None] = lambda _: None,
    ) -> Views:
        """Wait until requests are final and return them, in the order given.

        Outlives restarts of broker and scheduler. `timeout` is in seconds; None waits for ever. `on_end` is told of
        each as it ends, in a thread of this client's.

        Raises:
            NotFound: the ledger has no such request.
            Unanswered: some are not final yet at the timeout, or nobody answers at the beginning.
        """
        return self._call(self._wait(list(dict.fromkeys(ids)), timeout, on_end))

    def status(self, id: str) -> RequestView:  # noqa: A002  # the word for it everywhere else
        """Return one request with its attempts and artifacts; a unique beginning of the id is enough.

        Raises:
            NotFound: the ledger has no such request.
        """
        [view] = self._call(self._views([id], self._deadline()))
        return view

    def list(
        self,
        *,
        states: Sequence[RequestState] = (),
        task: str | None = None,
        worker: str | None = None,
        group: str | None = None,
        submitted_before: float | None = None,
        limit: int = 50,
        before: int | None = None,
        oldest: bool = False,
    ) -> Views:
        """Return the newest requests that match (or the oldest, oldest first), without their attempts.

        `before` is the seq to go on below; `submitted_before` is in seconds since the epoch.
        """
        query = ListRequests(
            states=[*states],
            task=task,
            worker=worker,
            group=group,
            submitted_before=submitted_before,
            limit=limit,
            before=before,
            oldest=oldest,
        )
        return self._ask(query, RequestList).requests

    def select(
        self,
        *,
        states: Sequence[RequestState] = (),
        task: str | None = None,
        worker: str | None = None,
        group: str | None = None,
        older_than: float | None = None,
        submitted_before: float | None = None,
        limit: int | None = None,
        before: int | None = None,
    ) -> Iterator[RequestView]:
        """Go through all requests that match, newest first, without their attempts; any number of them.

        `older_than` is in seconds, from this call on; what is submitted while the reader reads is not among them.
        """
        query = ListRequests(
            states=[*states],
            task=task,
            worker=worker,
            group=group,
            submitted_before=_earlier(submitted_before, older_than),
            before=before,
        )
        return self._pages(query, limit)

    def count(
        self,
        *,
        states: Sequence[RequestState] = (),
        task: str | None = None,
        worker: str | None = None,
        group: str | None = None,
        older_than: float | None = None,
        submitted_before: float | None = None,
    ) -> int:
        """Count the requests that match; as for `select`."""
        query = CountRequests(
            states=[*states],
            task=task,
            worker=worker,
            group=group,
            submitted_before=_earlier(submitted_before, older_than),
        )
        return self._ask(query, RequestCount).number

    def abort(
        self,
        ids: Iterable[str],
        reason: str,
        *,
        wait: bool = True,
        on_mark: Callable[[str], None] = lambda _: None,
        on_end: Callable[[RequestView], None] = lambda _: None,
        refused: dict[str, str] | None = None,
    ) -> Views:
        """Stop requests, wherever they are, and return them; with `wait`, once each has ended and nothing of it lives.

        One that runs ends within its task's grace, but for hosts that are away: then at the end of its lease. A full id
        that nobody knows is remembered for a day, and the request aborted when it comes: `on_mark` is told of it, and
        it is not returned. `on_end` is as for `wait`.

        Into `refused` goes why, by id, of those that this user may not command.

        Raises:
            NotFound: some are not there; the others are being stopped.
            Forbidden: this user may not command some, and no `refused` is given; the others are being stopped.
        """
        done = "are being stopped"
        views = self._command(ids, lambda part: AbortRequests(ids=part, reason=reason), done, refused, on_mark)
        running = [view.request.id for view in views if view.state not in FINAL] if wait else []
        ended = {view.request.id: view for view in self.wait(running, on_end=on_end)}
        return [ended.get(view.request.id, view) for view in views]

    def reprioritise(self, ids: Iterable[str], priority: int, *, refused: dict[str, str] | None = None) -> Views:
        """Give requests another priority, and return them; to those that have ended it means nothing.

        Into `refused` goes why, by id, of those that this user may not command.

        Raises:
            NotFound: some are not there; the others have it.
            Forbidden: this user may not command some, and no `refused` is given; the others have it.
            Rejected: there is no such priority.
        """
        return self._command(ids, lambda part: Reprioritise(ids=part, priority=priority), "have it", refused)

    def retry(self, id: str, *, new_id: str | None = None) -> str:  # noqa: A002  # the word for it everywhere else
        """Ask for an ended request to be done anew and return the id of the new request.

        With a `new_id` of the caller's own, the same call again is the same new request.

        Raises:
            NotFound: there is no such request.
            Conflict: it has not ended.
            Forbidden: this user may not command it.
            Rejected: the scheduler would not accept it any more.
        """
        new_id = new_id or str(uuid.uuid4())
        answer = self._ask(RetryRequest(id=id, new_id=new_id), RequestList)
        if answer.missing:
            raise NotFound(_no_request(answer.missing))
        return new_id

    def explain(self, id: str) -> Explanation:  # noqa: A002  # the word for it everywhere else
        """Say who can run a request and who cannot, and why it waits; a unique beginning of the id is enough.

        Raises:
            NotFound: the ledger has no such request.
        """
        return self._ask(Explain(id=self._full_id(id)), Explanation)

    def explain_task(
        self, task: str, data: Mapping[str, Any] | None = None, requires: Mapping[str, Any] | None = None
    ) -> Explanation:
        """Say who could run a request that is not submitted.

        Raises:
            Rejected: it would not be accepted.
        """
        schema = None if requires is None else dict(requires)
        return self._ask(Explain(task=task, data=dict(data or {}), requires=schema), Explanation)

    def follow_logs(self, id: str | None = None) -> Generator[Followed, None, None]:  # noqa: A002  # as above
        """Follow what a request prints, its progress and its changes of state, until it is final; None: all, for ever.

        Listens from this call on, so that a request may be submitted after it and before the first `next()`; what was
        printed earlier is not repeated. After a restart of the broker it goes on, with a gap. The last item is a
        RequestEvent with a final state.

        Raises:
            NotFound: there is no such request (at the first `next()`).
        """
        if id is not None:
            id = self._full_id(id)  # noqa: A001  # as above
        events = (self._topology.events, "request.#")
        logs = (self._topology.logs, id or "#")
        follow = self._call(self._open_follow((events, logs)))
        return self._stream(follow, id)

    # ------------------------------------------------------------ the pool

    def workers(self) -> Workers:
        """Return the workers that the scheduler knows, in the order of their names."""
        workers: Workers = []
        fit = self._workers_at_once
        while True:
            limit = fit.number
            page = self._ask(ListWorkers(limit=limit, after=workers[-1].name if workers else None), WorkerList)
            workers += page.workers
            if len(page.workers) != limit:
                return workers
            fit.learn(limit, page)

    def refresh_workers(self, names: Iterable[str] = ()) -> Workers:
        """Ask workers to look at their hosts again (no names: all), and return what is known now.

        Raises:
            Forbidden: this user is no operator.
        """
        self._ask(RefreshWorkers(names=[*names]), WorkerList)
        return self.workers()

    def forget_worker(self, name: str, *, user: str | None = None) -> None:
        """Make a worker's name that of whichever of the broker's users uses it next, or of `user`.

        Raises:
            NotFound: it is nobody's.
            Forbidden: this user is no operator.
            Rejected: it cannot be a name.
        """
        self._ask(ForgetWorker(name=name, user=user), WorkerList)

    def pool(self) -> Pool:
        """Return how the scheduler is."""
        return self._ask(GetPool(), Pool)

    def capabilities(self) -> CapabilityList:
        """Return the capability classes: workers that no known request tells apart."""
        classes: list[Capability] = []
        fit = self._classes_at_once
        while True:
            limit = fit.number
            query = GetCapabilities(limit=limit, after=classes[-1].name if classes else None)
            page = self._ask(query, CapabilityList)
            classes += page.classes
            if len(page.classes) != limit:
                return msgspec.structs.replace(page, classes=classes)
            fit.learn(limit, page)

    def pause(self, kind: Pausable, name: str, reason: str = "") -> Pauses:
        """Give a worker, a task or a group no slot any more, and return what is paused; what runs goes on.

        A name that nobody knows is paused too: it may come.

        Raises:
            Forbidden: this user is no operator.
            Rejected: it cannot be a name.
        """
        return self._ask(Pause(kind=kind, name=name, reason=reason), PauseList).pauses

    def resume(self, kind: Pausable, name: str) -> Pauses:
        """End a pause, if there is one, and return what is still paused.

        Raises:
            Forbidden: this user is no operator.
            Rejected: it cannot be a name.
        """
        return self._ask(Resume(kind=kind, name=name), PauseList).pauses

    def drain(
        self,
        names: Iterable[str] = (),
        *,
        classes: Iterable[str] = (),
        everybody: bool = False,
        reason: str = "",
        stop: bool = False,
    ) -> Workers:
        """Have workers take nothing more (or end, when nothing runs there), and return those that are known.

        They are paused until a `resume` of each, also when they come back.

        Raises:
            NotFound: there is no such capability class; nobody drains.
            Rejected: one cannot be a name.
        """
        query = DrainWorkers(names=[*names], classes=[*classes], everybody=everybody, reason=reason, stop=stop)
        return self._ask(query, WorkerList).workers

    def pauses(self) -> Pauses:
        """Return what is paused."""
        return self._ask(ListPauses(), PauseList).pauses

    def follow_events(self, *, quiet: float | None = None) -> Generator[Events, None, None]:
        """Follow what happens in the pool, for ever: in sets, as it comes.

        An empty set comes after `quiet` seconds without any, and with a new connection: of what happened before it
        nobody has heard. Listens from this call on.
        """
        return self._happenings(self._call(self._open_follow(((self._topology.events, "#"),))), quiet)

    # ------------------------------------------------------------ artifacts

    def artifacts(
        self,
        *,
        ids: Iterable[int] = (),
        request: str | None = None,
        category: str | None = None,
        limit: int = 50,
    ) -> Artifacts:
        """Return the artifacts that match, newest first.

        Raises:
            NotFound: some of the ids are not there.
        """
        query = ListArtifacts(ids=[*ids], request=request, category=category, limit=limit)
        answer = self._ask(query, ArtifactList)
        if answer.missing:
            raise NotFound(
                f"no artifact {', '.join(map(str, answer.missing))}; `mqworker artifact list` shows which are"
            )
        return answer.artifacts

    def fetch_artifact(self, id: int, directory: Path) -> Paths:  # noqa: A002  # the word for it everywhere else
        """Write an artifact's files into a directory, each checked against its sha256, and return their paths.

        Raises:
            NotFound: there is no such artifact, or the store lacks a file of it.
            Corrupt: a file in the store is not what its sha256 says.
            ArtifactInvalid: a file's name leads out of the directory; nothing was written.
        """
        [artifact] = self.artifacts(ids=[id])
        paths = [_inside(directory, entry.path, artifact.id) for entry in artifact.files]
        store = self.store
        for entry, path in zip(artifact.files, paths, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            store.get(entry.sha256, entry.size, path)
        return paths

    def read_file(self, entry: FileEntry) -> Iterator[bytes]:
        """Stream one file of an artifact from the store; it is verified only at its end.

        Raises:
            NotFound: the store lacks it.
            Corrupt: it was not what its sha256 says (at the end).
        """
        return self.store.open_stream(entry.sha256)

    def import_artifact(
        self,
        category: str,
        name: str,
        data: Mapping[str, Any],
        files: Mapping[str, Path],
        *,
        relations: Sequence[Relation] = (),
    ) -> RecordedArtifact:
        """Put files into the store and have them recorded as one artifact; returns it with its id.

        Raises:
            StoreMismatch: the scheduler has another store than this client.
            ArtifactInvalid: the category, the name or a file's name cannot be, or a file is not readable.
        """
        store = self.store
        theirs = self.pool().store
        if theirs != store.id:
            raise StoreMismatch(
                f"expected the scheduler's store, {theirs}, got {store.id} at {store.url}: "
                "give this client and the scheduler the same --store"
            )
        entries: list[FileEntry] = []
        for path, source in files.items():
            sha256, size = store.put(source)
            entries.append(FileEntry(path=path, size=size, sha256=sha256))
        try:
            artifact = Artifact(
                handle="imported",
                category=category,
                name=name,
                data=dict(data),
                files=entries,
                relations=[*relations],
            )
            body = encode(artifact)
            artifact = decode(body, Artifact)
        except (Unreadable, TypeError, ValueError, RecursionError) as error:
            raise ArtifactInvalid(
                f"expected a category like debian:upload, a name and plain file names: {error}"
            ) from error
        if len(body) > MAX_DESCRIBED_BYTES:
            raise ArtifactInvalid(
                f"expected an artifact that is described in at most {MAX_DESCRIBED_BYTES} bytes, got {len(body)}: put"
                " large data into files"
            )
        query = ImportArtifact(key=str(uuid.uuid4()), artifact=artifact, store=store.id)
        [recorded] = self._ask(query, ArtifactList).artifacts
        return recorded

    @property
    def store(self) -> Store:
        """The store of artifact bytes, opened at the first use.

        Raises:
            SettingsError: the client was made without a store URL.
            StoreUnavailable: it is not there, or cannot be read.
        """
        if self._store_url is None:
            raise SettingsError("expected the URL of the scheduler's store for artifacts; give Client a store_url")
        if self._store is None:
            self._store = Store.open(self._store_url)
        return self._store

    # ------------------------------------------------------------ the caller's side of the loop

    def _start(self, coroutine: Coroutine[Any, Any, _T]) -> "Future[_T]":
        if self._thread is None or self._loop is None or self._broken is not None:
            coroutine.close()
            raise self._ended()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _result(self, future: "Future[_T]") -> _T:
        try:
            return future.result()
        except CancelledError as error:
            raise self._ended() from error
        finally:
            future.cancel()  # Ctrl-C came meanwhile; without effect on one that is done

    def _call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return self._result(self._start(coroutine))

    def _ended(self) -> BaseException:
        return self._broken or BrokerUnavailable("expected an open client, got one that is closed: open it with `with`")

    def _full_id(self, id: str) -> str:  # noqa: A002  # the word for it everywhere else
        return id if FULL_ID.fullmatch(id) else self.status(id.lower()).request.id

    def _after(self, one: str | After) -> After:
        return After(request=self._full_id(one)) if isinstance(one, str) else self._named(one)

    def _named(self, one: _Naming) -> _Naming:
        return msgspec.structs.replace(one, request=self._full_id(one.request))

    def _ask(self, query: Query, kind: type[_T]) -> _T:
        return self._call(self._answer(_checked(query), kind, self._deadline()))

    def _command(
        self,
        ids: Iterable[str],
        query: Callable[[Ids], Query],
        done: str,
        refused: dict[str, str] | None,
        on_mark: Callable[[str], None] = lambda _: None,
    ) -> Views:
        """Ask for something to be done to any number of requests, and return them."""
        views: Views = []
        missing: Ids = []
        forbidden: dict[str, str] = {}
        left = [*ids]
        fit = self._requests_at_once
        while left:
            part = left[: fit.number]
            try:
                answer = self._ask(query(part), RequestList)
            except Rejected:
                fit.halve(len(part))
                continue
            left = left[len(part) :]
            fit.learn(len(answer.requests), answer)
            views += answer.requests
            missing += answer.missing
            forbidden |= answer.forbidden
            if refused is not None:
                refused |= answer.forbidden
            for one in answer.marked:
                on_mark(one)
        others = f"; the other {len(views)} {done}" if views else ""
        if missing:
            raise NotFound(f"{_no_request(missing)}{others}")
        if forbidden and refused is None:
            first = next(iter(forbidden.values()))
            raise Forbidden(f"not on {', '.join(forbidden)}: {first}{others}")
        return views

    def _pages(self, query: ListRequests, limit: int | None) -> Iterator[RequestView]:
        fit = self._requests_at_once
        while limit is None or limit > 0:
            number = fit.number if limit is None else min(fit.number, limit)
            try:
                page = self._ask(msgspec.structs.replace(query, limit=number), RequestList)
            except Rejected:
                fit.halve(number)
                continue
            yield from page.requests
            if len(page.requests) < number:
                return
            fit.learn(number, page)
            limit = None if limit is None else limit - number
            query = msgspec.structs.replace(query, before=page.requests[-1].seq)

    def _happenings(self, follow: "_Follow", quiet: float | None) -> Generator[Events, None, None]:
        try:
            while True:
                items = self._call(follow.take(quiet))
                yield [item for item in items if isinstance(item, PoolEvent)]
        finally:
            if self._thread is not None and self._broken is None:
                self._call(self._close_follow(follow))

    def _deadline(self) -> Callable[[], float]:
        """Return a clock of the seconds that are left for a call; it starts in the loop, at its first reading."""
        return _countdown(self._timeout)

    def _stream(self, follow: "_Follow", request: str | None) -> Generator[Followed, None, None]:
        try:
            while True:
                for item in self._call(self._followed(follow, request)):
                    yield item
                    if isinstance(item, RequestEvent) and item.request == request and item.state in FINAL:
                        return
        finally:
            if self._thread is not None and self._broken is None:
                self._call(self._close_follow(follow))

    # ------------------------------------------------------------ the loop's side

    def _serve(self, ready: threading.Event) -> None:
        try:
            asyncio.run(self._live(ready))
        except BaseException as error:  # noqa: BLE001  # handed to whoever calls, in their own thread
            self._broken = error
        finally:
            ready.set()

    async def _live(self, ready: threading.Event) -> None:
        self._stop = asyncio.Event()
        self._line = _Line(self._url, name="mqworker client", plan=self._plan, on_blocked=self._on_blocked)
        self._loop = asyncio.get_running_loop()
        ready.set()
        async with self._line as line:
            stop = asyncio.ensure_future(self._stop.wait())
            await asyncio.wait({stop, line.running}, return_when=asyncio.FIRST_COMPLETED)
            for follow in [*self._follows]:
                await self._close_follow(follow)

    def _plan(self, _epoch: str) -> Plan:
        topology = self._topology
        uses = (topology.api,)  # with an observer's rights too
        return Plan(exchanges=topology.exchanges(), queues=topology.queues(), replies=self._on_reply, uses=uses)

    def _on_reply(self, delivery: Delivery) -> None:
        answer = self._answers.get(delivery.correlation_id or "")
        if answer is not None and not answer.done():  # else a second answer to what was sent twice
            answer.set_result(delivery.body)

    async def _connected(self) -> None:
        line = cast("_Line", self._line)
        try:
            await line.link.wait_up(min(self._timeout, FIRST_CONNECT_SECONDS))
        except BrokerUnavailable:
            if not line.link.answered:
                raise
            await line.link.wait_up(self._timeout)

    async def _submit(self, batch: Sequence[Request]) -> Receipts:
        what = f"request {batch[0].id}" if len(batch) == 1 else f"{len(batch)} requests from {batch[0].id} on"
        body = await self._exchange(self._topology.submit, "submit", encode(Submit(requests=[*batch])), what, None)
        receipt = decode(body, Receipt)
        if receipt.problem is not None:
            raise Unreadable(f"the scheduler could not read {what}: {receipt.problem}")
        results = {result.id: result for result in receipt.results}
        try:
            return [results[request.id] for request in batch]
        except KeyError as error:
            raise Unreadable(f"expected a receipt for each of {what}, got none for {error}") from error

    async def _answer(self, query: Query, kind: type[_T], left: Callable[[], float]) -> _T:
        name = tag_of(query)
        exchange = self._topology.command if isinstance(query, Command) else self._topology.api
        body = await self._exchange(exchange, name, encode(query), f"the query {name}", left)
        answer = decode(body, cast("Any", Answer))
        if isinstance(answer, Problem):
            raise _PROBLEMS[answer.kind](answer.text)
        if not isinstance(answer, kind):
            raise Unreadable(f"expected an answer of type {kind.__name__} to {name}, got {type(answer).__name__}")
        return answer

    async def _exchange(
        self, exchange: str, kind: str, body: bytes, what: str, left: Callable[[], float] | None
    ) -> bytes:
        """Publish a message, again after a pause or on a new connection, until it is answered or no time is left."""
        left = left or self._deadline()
        line = cast("_Line", self._line)
        correlation = uuid.uuid4().hex
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._answers[correlation] = answer
        pause, confirmed, trouble = RESEND_SECONDS, False, "its confirm is still to come"
        try:
            while left() > 0:
                try:
                    await line.link.wait_up(left())
                except OutsideError as error:
                    trouble = str(error)
                    break
                over = line.life_over
                sent = line.link.publish(
                    exchange=exchange,
                    key=exchange,
                    body=body,
                    kind=kind,
                    correlation_id=correlation,
                    reply_to=REPLY_TO,
                )
                news: set[asyncio.Future[Any]] = {sent, answer, over}
                done, _ = await asyncio.wait(news, timeout=min(left(), pause), return_when=asyncio.FIRST_COMPLETED)
                while not done and line.link.blocked and left() > 0:  # another copy would only wait behind this one
                    done, _ = await asyncio.wait(news, timeout=min(left(), pause), return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    pause *= 2  # a queue that was deleted meanwhile, or lost its leader, may never confirm it
                if line.link.blocked:
                    trouble = BLOCKED
                if sent.done() and not answer.done():
                    try:
                        sent.result()
                        confirmed = True
                        news = {answer, over}
                        await asyncio.wait(news, timeout=min(left(), pause), return_when=asyncio.FIRST_COMPLETED)
                        pause *= 2
                    except BrokerRefused as error:
                        raise Forbidden(f"expected a user of the broker who may send {what}: {error}") from error
                    except NotPublished as error:
                        trouble = str(error)
                        await asyncio.wait({answer}, timeout=min(left(), PAUSE_SECONDS))
                if answer.done():
                    return answer.result()
        finally:
            del self._answers[correlation]
        raise Unanswered(_unanswered(what, self._timeout, kind=kind, confirmed=confirmed, trouble=trouble))

    async def _views(self, ids: Sequence[str], left: Callable[[], float]) -> Views:
        """Ask for requests, and return them in the order of the ids, which may be beginnings of them."""
        views: Views = []
        todo = [ids[start : start + VIEWS_IN_AN_ANSWER] for start in range(0, len(ids), VIEWS_IN_AN_ANSWER)]
        todo.reverse()
        while todo:
            part = todo.pop()
            try:
                answer = await self._answer(GetRequests(ids=[*part]), RequestList, left)
            except Rejected:  # they are too many for one answer
                if len(part) == 1:
                    raise
                todo += [part[len(part) // 2 :], part[: len(part) // 2]]
                continue
            if answer.missing:
                raise NotFound(_no_request(answer.missing))
            exact = {view.request.id: view for view in answer.requests}
            for asked in part:
                match = exact.get(asked) or next((v for i, v in exact.items() if i.startswith(asked)), None)
                if match is None:
                    raise Unreadable(f"expected an answer about request {asked}, got one about others")
                views.append(match)
        return views

    async def _states(self, ids: Sequence[str], left: Callable[[], float]) -> tuple[Names, Names]:
        """Return the full ids of requests, and of those the ones that have ended."""
        states: dict[str, str] = {}
        full = [id_ for id_ in ids if FULL_ID.fullmatch(id_)]
        for start in range(0, len(full), MOST_VIEWS_IN_AN_ANSWER):
            part = full[start : start + MOST_VIEWS_IN_AN_ANSWER]
            answer = await self._answer(GetStates(ids=part), StateList, left)
            if unknown := [id_ for id_ in part if id_ not in answer.states]:
                raise NotFound(_no_request(unknown))
            states |= answer.states
        short = [id_ for id_ in ids if id_ not in states]
        names = dict(zip(short, await self._views(short, left), strict=True))
        states |= {view.request.id: view.state for view in names.values()}
        order = dict.fromkeys(names[id_].request.id if id_ in names else id_ for id_ in ids)
        return [*order], [id_ for id_ in order if states[id_] in FINAL]

    async def _which_ended(self, ids: Sequence[str], left: Callable[[], float]) -> Names:
        """Ask which have ended, again and again while nobody answers; nothing when no time is left."""
        while left() > 0:
            with suppress(Unanswered):
                return (await self._states(ids, _countdown(min(self._timeout, left()))))[1]
        return []

    async def _look_patiently(self, ids: Sequence[str], left: Callable[[], float]) -> Views:
        """Ask again and again while nobody answers, since a wait outlives restarts; nothing when no time is left."""
        while left() > 0:
            with suppress(Unanswered):
                return await self._views(ids, _countdown(min(self._timeout, left())))
        return []

    async def _wait(self, ids: Sequence[str], seconds: float | None, on_end: Callable[[RequestView], None]) -> Views:
        if not ids:
            return []
        left = _countdown(seconds)
        final = tuple((self._topology.events, f"request.#.{state}") for state in sorted(FINAL))
        follow = await self._open_follow(final)
        try:
            # The first look has the call's own patience, so that a missing scheduler is told at once.
            order, over = await self._states(ids, self._deadline())
            done: dict[str, RequestView] = {}
            still = dict.fromkeys(order)
            ended = dict.fromkeys(over)  # they are looked at when there are enough
            while still:
                if left() <= 0:
                    raise Unanswered(
                        f"{len(still)} of {len(order)} requests are not final after {seconds:g} s, "
                        f"{next(iter(still))} among them; they go on"
                    )
                if len(ended) < min(len(still), ENOUGH_ENDED):
                    items = await follow.take(min(HUSH_SECONDS if ended else LOOK_AGAIN_SECONDS, left()))
                    told = [item.request for item in items if isinstance(item, RequestEvent)]
                    ended |= dict.fromkeys(request for request in told if request in still)
                    if None in items or not (items or ended):  # who knows what was missed
                        ended |= dict.fromkeys(await self._which_ended(list(still), left))
                    elif items:
                        continue
                for view in await self._look_patiently(list(ended), left):
                    if view.state in FINAL:
                        del still[view.request.id]
                        done[view.request.id] = view
                        on_end(view)
                ended = {}
        finally:
            await self._close_follow(follow)
        return [done[request] for request in order]

    async def _open_follow(self, bindings: tuple[tuple[str, str], ...]) -> "_Follow":
        follow = _Follow(self._url, self._topology, bindings)
        self._follows.add(follow)
        try:
            await follow.open(self._timeout)
        except BaseException:
            await self._close_follow(follow)
            raise
        return follow

    async def _close_follow(self, follow: "_Follow") -> None:
        if follow in self._follows:
            self._follows.remove(follow)
            await follow.close()

    async def _followed(self, follow: "_Follow", request: str | None) -> Items:
        """Return what came next; never nothing."""
        while True:
            items = await follow.take(LOOK_AGAIN_SECONDS)
            found = [item for item in items if isinstance(item, Followed) and request in {None, item.request}]
            missed = not items or None in items  # nothing for a while, or a new connection
            if missed and request is not None and not any(_is_end(item) for item in found):
                first, follow.looked = not follow.looked, True
                look = self._views if first else self._look_patiently
                [view] = await look([request], self._deadline() if first else _countdown(None))
                if view.state in FINAL:
                    more = follow.take_now()
                    found += [item for item in more if isinstance(item, Followed) and item.request == request]
                    if not any(_is_end(item) for item in found):
                        found.append(_end_of(view))
            if found:
                return found


class _Fit:
    """Learn how many views fit into an answer: of small ones many, so that few answers do; of large ones few."""

    def __init__(self) -> None:
        self.number = VIEWS_IN_AN_ANSWER

    def learn(self, number: int, answer: msgspec.Struct) -> None:
        """Take so many views in one answer as an example."""
        if number:
            self.number = max(1, min(MOST_VIEWS_IN_AN_ANSWER, number * BATCH_BYTES // len(encode(answer))))

    def halve(self, number: int) -> None:
        """Take it that so many do not fit; called while the refusal of a single one, or of all, is being handled."""
        if number <= 1:
            raise  # noqa: PLE0704  # called inside the except clause
        self.number = number // 2


class _Line:
    """Run a Link in this loop, and say when its present life is over; an async context manager."""

    def __init__(
        self,
        url: str,
        *,
        name: str,
        plan: Callable[[str], Plan],
        on_up: Callable[[], None] | None = None,
        on_blocked: Callable[[bool], None] = lambda _blocked: None,
    ) -> None:
        self.life_over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_up = on_up
        self.link = Link(url, name=name, plan=plan, on_up=self._up, on_down=self._down, on_blocked=on_blocked)
        self.running: asyncio.Task[None]

    def _up(self, _epoch: str) -> None:
        self.life_over = asyncio.get_running_loop().create_future()
        if self._on_up is not None:
            self._on_up()

    def _down(self, _reason: str) -> None:
        if not self.life_over.done():
            self.life_over.set_result(None)

    async def __aenter__(self) -> Self:
        self.running = asyncio.create_task(self.link.run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.link.close()
        await self.running


class _Follow:
    """Listen to events and logs on an exclusive queue, with a connection of its own."""

    def __init__(self, url: str, topology: Topology, bindings: tuple[tuple[str, str], ...]) -> None:
        self.looked = False  # whether the state was asked for since listening began
        self._topology = topology
        self._bindings = bindings
        # None stands for a new connection: whatever was said before it, nobody heard.
        self._arrived: asyncio.Queue[Delivery | None] = asyncio.Queue()
        self._line = _Line(url, name="mqworker follower", plan=self._plan, on_up=self._on_up)

    def _plan(self, epoch: str) -> Plan:
        queue = self._topology.follower_queue(epoch, self._bindings)
        consumer = Consumer(queue=queue.name, on_delivery=self._arrived.put_nowait, prefetch=FOLLOW_PREFETCH)
        return Plan(exchanges=self._topology.exchanges(), queues=(queue,), consumers=(consumer,))

    def _on_up(self) -> None:
        self._arrived.put_nowait(None)

    async def open(self, seconds: float) -> None:
        await self._line.__aenter__()
        await self._line.link.wait_up(seconds)

    async def close(self) -> None:
        await self._line.__aexit__(None, None, None)

    async def take(self, seconds: float | None) -> list[Heard | None]:
        """Return all that has arrived, waiting for the first of it; nothing if it does not come."""
        try:
            first = await asyncio.wait_for(self._arrived.get(), seconds)
        except TimeoutError:
            return []
        return [*self._heard(first), *self.take_now()]

    def take_now(self) -> list[Heard | None]:
        items: list[Heard | None] = []
        while not self._arrived.empty():
            items += self._heard(self._arrived.get_nowait())
        return items

    def _heard(self, delivery: Delivery | None) -> Sequence[Heard | None]:
        if delivery is None:
            return (None,)
        self._line.link.ack(delivery)
        return _read_heard(delivery.body)


def _read_heard(body: bytes) -> Sequence[Heard | None]:
    """Return events, or lines of a log; None is as if nothing had been heard: who waits looks for itself."""
    try:
        message = decode(body, cast("Any", _Followed))
    except PeerError as error:
        logger.warning("an unreadable message was passed over", extra={"reason": str(error)})
        return (None,)
    return message.events if isinstance(message, RequestEvents) else (message,)


def _countdown(seconds: float | None) -> Callable[[], float]:
    """Return a function that says how many of the seconds are left; they start to run when it is asked first."""
    end: float | None = None

    def left() -> float:
        nonlocal end
        if seconds is None:
            return float("inf")
        now = asyncio.get_running_loop().time()
        if end is None:
            end = now + seconds
        return end - now

    return left


def _earlier(submitted_before: float | None, older_than: float | None) -> float | None:
    """Return the time before which requests must have been submitted."""
    if older_than is None:
        return submitted_before
    then = time.time() - older_than
    return then if submitted_before is None else min(then, submitted_before)


def _checked(query: _Query) -> _Query:
    """Return a query as the scheduler will read it.

    Raises:
        Rejected: it cannot read it: a name, a number or a text is not what it may be.
    """
    try:
        return decode(encode(query), type(query))
    except (Unreadable, TypeError, ValueError, msgspec.MsgspecError) as error:
        raise Rejected(f"the query {tag_of(query)} cannot be: {error}") from error


def _batches(requests: Iterable[Request]) -> Iterator[list[Request]]:
    batch: list[Request] = []
    size = 0
    for request in requests:
        length = _checked_length(request)
        if batch and (len(batch) == MAX_REQUESTS_IN_A_MESSAGE or size + length > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(request)
        size += length
    if batch:
        yield batch


def _checked_length(request: Request) -> int:
    """Return the length of a request in bytes.

    Raises:
        Rejected: its fields cannot be, or it is too long.
    """
    try:
        body = encode(request)
        decode(body, Request)
    except (Unreadable, TypeError, ValueError, msgspec.MsgspecError) as error:
        raise Rejected(f"request {request.id} cannot be: {error}") from error
    if request.requires is not None and (trouble := schemas.problem(request.requires)) is not None:
        raise Rejected(f"request {request.id} cannot be: `requires`: {trouble}")
    if (trouble := window_problem(request)) is not None:
        raise Rejected(f"request {request.id} cannot be: {trouble}")
    if len(body) > MAX_REQUEST_BYTES:
        raise Rejected(
            f"expected a request of at most {MAX_REQUEST_BYTES} bytes, got {len(body)} for {request.id}: "
            "import large data as an artifact and name its id"
        )
    return len(body)


def _inside(directory: Path, name: str, artifact: int) -> Path:
    parts = PurePosixPath(name)
    root = directory.resolve()
    path = directory / parts
    if parts.is_absolute() or ".." in parts.parts or not path.parent.resolve().is_relative_to(root):
        raise ArtifactInvalid(
            f"artifact {artifact} names the file {name!r}, which leads out of {directory}: not fetched"
        )
    return path


def _is_end(item: Followed) -> bool:
    return isinstance(item, RequestEvent) and item.state in FINAL


def _end_of(view: RequestView) -> RequestEvent:
    """Say the event that was missed."""
    return RequestEvent(
        term=0,
        time=view.ended or view.submitted,
        request=view.request.id,
        task=view.request.task,
        state=view.state,
        event=_MOVE_TO[view.state],
        attempt=view.attempt,
        worker=view.worker,
        reason=view.reason,
    )


def _no_request(ids: Collection[str]) -> str:
    return (
        f"no request, or more than one, whose id is or begins with {', '.join(ids)}; `mqworker list` shows the newest"
    )


def _unanswered(what: str, timeout: float, *, kind: str, confirmed: bool, trouble: str) -> str:
    if not confirmed:
        again = "; it may not have arrived: submit it again with the same id" if kind == "submit" else ""
        return f"no answer to {what} within {timeout:g} s: the broker has not confirmed it ({trouble}){again}"
    if kind == "submit":
        return (
            f"the broker has {what} (confirmed), but no scheduler has recorded it within {timeout:g} s: it is done "
            "once one runs (`mqworker scheduler`); submitting it again with the same id is safe"
        )
    return f"no answer to {what} within {timeout:g} s: the broker has it, but no scheduler answers; is one running?"
