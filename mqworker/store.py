"""Artifact bytes by their sha256: in a folder, or wherever a URL that obstore knows leads.

Knows no artifact, no request and no ledger: only bytes. What it returns as written is on the disk, whole, under its
final name; what it hands out has been compared with its sha256. The only file that imports obstore. Synchronous.
"""

import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, from_url

from mqworker.errors import ArtifactInvalid, Corrupt, NotFound, SettingsError, StoreUnavailable

CHUNK: Final = 8 * 1024 * 1024  # bytes; S3 takes 10,000 parts of an object: 80 GB
CONCURRENCY: Final = 2  # chunks on their way at once: bounds memory
LEFT_OVER_AFTER: Final = 24 * 3600.0  # seconds since the last write to what a killed upload left behind
_ID_KEY: Final = "store-id"
_INCOMING: Final = "incoming"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class Store:
    """Keep artifact bytes by sha256."""

    def __init__(self, objects: Any, url: str, root: Path | None) -> None:
        self._objects = objects
        self.folder = root  # which needs fsync; None: the store is not on a disk of this host
        self.url = url  # fit for showing
        self.id = ""

    @classmethod
    def open(cls, url: str, *, create: bool = False) -> "Store":
        """Open the store at a URL; with `create`, make it if there is none and clear what killed uploads left there.

        Raises:
            SettingsError: the URL is of no kind of store.
            StoreUnavailable: no store is there, or it cannot be read, or, with `create`, not written.
        """
        root = _root(url)
        shown = _without_secrets(url)
        if root is None:
            try:
                objects: Any = from_url(url)
            except (BaseError, ValueError) as error:
                # Not the error's own text, which repeats the URL, and with it what secrets it holds.
                raise SettingsError(
                    f"{_WANTED}, got {shown}, which names no store that obstore knows; correct the URL"
                ) from error
        else:
            with _guarded(f"open the store at {shown}"):
                if create:
                    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
                    root.mkdir(parents=True, exist_ok=True)
                    for folder in missing:
                        _fsync(folder.parent)
                elif not root.is_dir():
                    raise _no_store(shown)
                objects = LocalStore(root)
        store = cls(objects, shown, root)
        if create:
            store._take_id()
            store._clear_left_overs()
        store.id = store._read_id()
        return store

    # ---------------------------------------------------------------- whole files

    def put(self, path: Path) -> tuple[str, int]:
        """Store a file and return its sha256 and its size in bytes.

        Bytes that are there already are not written again. In a folder the file is written under another name,
        synced, compared, and only then renamed, so that even a power cut leaves no half file under a final name;
        elsewhere an upload appears as a whole by itself.

        Raises:
            ArtifactInvalid: it is no regular file, cannot be read, or changed while it was read.
            Corrupt: what was written differs from what was sent.
            StoreUnavailable: the store cannot be written now.
        """
        with _opened(path) as file:
            sha256, size = _digest(path, file)
            self._require_presence()  # an unmounted folder must not fill with what then disappears under the mount
            if self.has(sha256, size):
                return sha256, size
            key = _key(sha256)
            arriving = key if self.folder is None else f"{_INCOMING}/{uuid.uuid4()}"
            with _guarded(f"write to the store at {self.url}"):
                try:
                    self._send(path, file, arriving, sha256, size)
                    if self.folder is not None:
                        _fsync(self.folder / arriving)
                    for _ in self._verified(arriving, sha256, size):
                        pass
                except BaseException:
                    if arriving != key:
                        with suppress(FileNotFoundError):
                            obstore.delete(self._objects, arriving)
                    raise
                if self.folder is not None:
                    obstore.rename(self._objects, arriving, key)
                    final = self.folder / key
                    for folder in (final.parent, final.parent.parent, self.folder):
                        _fsync(folder)
        return sha256, size

    def get(self, sha256: str, size: int, destination: Path) -> None:
        """Fetch bytes into a file, which appears only when they are whole and right.

        Raises:
            Corrupt: they are not what their sha256 and size say.
            NotFound: the store does not have them.
            StoreUnavailable: the store cannot be read now, or the destination not written.
        """
        arriving = destination.with_name(f".{uuid.uuid4()}.part")
        chunks = self._verified(_key(sha256), sha256, size)
        try:
            with _guarded(f"write {destination}"), arriving.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
            with _guarded(f"write {destination}"):
                arriving.replace(destination)
        except BaseException:
            arriving.unlink(missing_ok=True)
            raise

    def open_stream(self, sha256: str) -> Iterator[bytes]:
        """Go through bytes as they come; only when the iterator has ended are they known to be right.

        Raises:
            Corrupt: at the end: they are not what their sha256 says.
            NotFound: the store does not have them.
            StoreUnavailable: the store cannot be read now.
        """
        return self._verified(_key(sha256), sha256, None)

    def has(self, sha256: str, size: int) -> bool:
        """Say whether the store has bytes of this sha256 and size, without reading them.

        Raises:
            StoreUnavailable: the store cannot be read now.
        """
        with _guarded(f"read the store at {self.url}"):
            try:
                return bool(obstore.head(self._objects, _key(sha256))["size"] == size)
            except FileNotFoundError:
                return False

    # ---------------------------------------------------------------- bytes, out and in

    def _send(self, path: Path, file: IO[bytes], key: str, sha256: str, size: int) -> None:
        if size <= CHUNK:  # in one piece: some stores refuse an upload of no parts
            obstore.put(self._objects, key, b"".join(_unchanged(path, file, sha256, size)), use_multipart=False)
        else:
            obstore.put(
                self._objects, key, _unchanged(path, file, sha256, size), chunk_size=CHUNK, max_concurrency=CONCURRENCY
            )

    def _verified(self, key: str, sha256: str, size: int | None) -> Iterator[bytes]:
        digest = hashlib.sha256()
        count = 0
        with _guarded(f"read {key} from the store at {self.url}"):
            try:
                found = obstore.get(self._objects, key)
            except FileNotFoundError as error:
                self._require_presence()
                raise NotFound(
                    f"expected the bytes of {sha256} in the store at {self.url}, got none; "
                    "make or import their artifact again"
                ) from error
            for chunk in found.stream(min_chunk_size=CHUNK):
                digest.update(chunk)
                count += len(chunk)
                yield chunk
        if digest.hexdigest() != sha256 or size not in (None, count):
            raise Corrupt(
                f"expected bytes with sha256 {sha256}{'' if size is None else f' and size {size}'} as {key} in the "
                f"store at {self.url}, got sha256 {digest.hexdigest()} and size {count}; bring that object back from "
                "a backup, or delete it and make its artifact again"
            )

    # ---------------------------------------------------------------- the store itself

    def _take_id(self) -> None:
        with _guarded(f"make a store at {self.url}"):
            with suppress(FileNotFoundError):
                obstore.head(self._objects, _ID_KEY)
                return  # a disk that is full keeps nobody from what is there
            try:
                obstore.put(self._objects, _ID_KEY, str(uuid.uuid4()).encode(), mode="create")
            except AlreadyExistsError:
                return  # another creator was first, and its id counts
            if self.folder is not None:
                _fsync(self.folder / _ID_KEY)
                _fsync(self.folder)

    def _read_id(self) -> str:
        with _guarded(f"read the store at {self.url}"):
            try:
                given = bytes(obstore.get(self._objects, _ID_KEY).bytes())
            except FileNotFoundError as error:
                raise _no_store(self.url) from error
        try:
            return str(uuid.UUID(given.decode()))
        except ValueError as error:
            raise StoreUnavailable(
                f"expected a UUID as {_ID_KEY} in the store at {self.url}, got {given[:40]!r}; "
                "bring that object back from a backup"
            ) from error

    def _require_presence(self) -> None:
        found = self._read_id()
        if found != self.id:
            raise StoreUnavailable(
                f"expected store {self.id} at {self.url}, got store {found}; another one was put in its place: "
                "bring it back, or start again with this one"
            )

    def _clear_left_overs(self) -> None:
        if self.folder is None:
            return  # an upload that was cut off elsewhere is for that store's own rules
        with _guarded(f"clear {_INCOMING} in the store at {self.url}"), suppress(FileNotFoundError):
            for left in (self.folder / _INCOMING).iterdir():
                with suppress(FileNotFoundError):  # its upload has ended meanwhile
                    if time.time() - left.stat().st_mtime > LEFT_OVER_AFTER:
                        left.unlink()


_WANTED: Final = "expected a store's URL like file:///var/lib/mqworker/store or s3://bucket/prefix"


def _root(url: str) -> Path | None:
    """Return the folder that a file:// URL names; None: another kind of store."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise SettingsError(f"{_WANTED}, got something that is no URL ({error}); correct it") from error
    if parts.scheme != "file":
        return None
    path = unquote(parts.path)
    if parts.netloc not in {"", "localhost"} or not path.startswith("/") or parts.query or parts.fragment:
        raise SettingsError(f"{_WANTED}, got {url}; write file:// and an absolute path")
    return Path(path)


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _key(sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        raise NotFound(f"expected a sha256 of 64 lower-case hexadecimal digits, got {sha256!r}")
    return f"sha256/{sha256[:2]}/{sha256}"


def _no_store(url: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"expected a store at {url}, got nothing of that kind; mount it, correct the URL, "
        "or start the scheduler, which makes a new one there"
    )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]  # obstore adds pages of debugging text


@contextmanager
def _guarded(doing: str) -> Iterator[None]:
    try:
        yield
    except (BaseError, OSError) as error:
        raise StoreUnavailable(
            f"cannot {doing}: {_first_line(error)}; look at its free space, its rights and its network, then try again"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    if not path.is_file():
        raise ArtifactInvalid(f"expected a regular file to store, got {path}, which is none")
    try:
        file = path.open("rb")
    except OSError as error:
        raise ArtifactInvalid(f"expected a readable file to store, got {path}: {error}") from error
    with file:
        yield file


def _read(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while True:
        try:
            chunk = file.read(CHUNK)
        except OSError as error:
            raise ArtifactInvalid(f"expected a readable file to store, got {path}: {error}") from error
        if not chunk:
            return
        yield chunk


def _digest(path: Path, file: IO[bytes]) -> tuple[str, int]:
    digest = hashlib.sha256()
    size = 0
    for chunk in _read(path, file):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def _unchanged(path: Path, file: IO[bytes], sha256: str, size: int) -> Iterator[bytes]:
    """Read a file again, and fail, which calls the upload off, as soon as it is not what it was."""
    digest = hashlib.sha256()
    count = 0
    for chunk in _read(path, file):
        digest.update(chunk)
        count += len(chunk)
        if count > size:
            break
        yield chunk
    if count != size or digest.hexdigest() != sha256:
        raise ArtifactInvalid(f"expected {path} to stay as it was while it was stored, but it changed; store it again")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
