import hashlib
import os
import subprocess
import sys
import textwrap
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

import mqworker.store
from mqworker.errors import ArtifactInvalid, Corrupt, NotFound, SettingsError, StoreUnavailable
from mqworker.store import CHUNK, LEFT_OVER_AFTER, Store

ABSENT = "0" * 64


@pytest.fixture
def root(tmp_path):
    return tmp_path / "a" / "store"


@pytest.fixture
def store(root):
    return Store.open(f"file://{root}", create=True)


def a_file(folder, content, name="file"):
    path = folder / name
    path.write_bytes(content)
    return path


def kept(root):
    """Every file in the store but its id."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.name != "store-id")


def object_of(root, sha256):
    return root / "sha256" / sha256[:2] / sha256


# ---------------------------------------------------------------- put and get


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_what_is_put_is_got_back_byte_for_byte(store, root, tmp_path, size):
    content = os.urandom(size)
    sha256 = hashlib.sha256(content).hexdigest()

    assert store.put(a_file(tmp_path, content)) == (sha256, size)
    store.get(sha256, size, tmp_path / "back")

    assert (tmp_path / "back").read_bytes() == content
    assert kept(root) == [f"sha256/{sha256[:2]}/{sha256}"]
    assert b"".join(store.open_stream(sha256)) == content
    assert store.has(sha256, size)
    assert not store.has(sha256, size + 1)
    assert not store.has(ABSENT, size)


def test_bytes_that_are_there_are_not_written_again(store, root, tmp_path):
    sha256, _ = store.put(a_file(tmp_path, b"same", "one"))
    before = object_of(root, sha256).stat()

    assert store.put(a_file(tmp_path, b"same", "two")) == (sha256, 4)

    after = object_of(root, sha256).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_object_of_another_size_is_replaced(store, root, tmp_path):
    path = a_file(tmp_path, b"whole")
    sha256, _ = store.put(path)
    object_of(root, sha256).write_bytes(b"who")

    store.put(path)

    assert object_of(root, sha256).read_bytes() == b"whole"


def test_a_file_is_on_the_disk_before_it_has_its_final_name_and_that_name_before_put_returns(
    store, root, tmp_path, monkeypatch
):
    synced = []
    fsync = mqworker.store._fsync

    def watch(path):
        synced.append((path.is_file(), object_of(root, sha256).exists(), path))
        fsync(path)

    sha256 = hashlib.sha256(b"x").hexdigest()
    monkeypatch.setattr(mqworker.store, "_fsync", watch)
    store.put(a_file(tmp_path, b"x"))

    assert synced[0][:2] == (True, False)
    final = object_of(root, sha256)
    assert [path for _, exists, path in synced if exists] == [final.parent, final.parent.parent, root]


@pytest.mark.parametrize("size", [10, CHUNK * 2])
def test_a_file_that_changes_while_it_is_stored_is_refused_and_leaves_nothing(store, root, tmp_path, monkeypatch, size):
    path = a_file(tmp_path, b"a" * size)

    def change_then_has(*_):  # between the first reading, for the sha256, and the second, for the bytes
        path.write_bytes(b"a" * (size - 1) + b"b")
        return False

    monkeypatch.setattr(Store, "has", change_then_has)
    with pytest.raises(ArtifactInvalid, match="changed"):
        store.put(path)

    assert kept(root) == []


@pytest.mark.parametrize("size", [9, 11, CHUNK * 3])
def test_a_file_that_grows_or_shrinks_while_it_is_stored_is_refused(store, root, tmp_path, monkeypatch, size):
    path = a_file(tmp_path, b"a" * 10)

    def change_then_has(*_):
        path.write_bytes(b"a" * size)
        return False

    monkeypatch.setattr(Store, "has", change_then_has)
    with pytest.raises(ArtifactInvalid, match="changed"):
        store.put(path)

    assert kept(root) == []


def test_bytes_that_were_written_wrong_never_get_a_final_name(store, root, tmp_path, monkeypatch):
    def bad_disk(path):
        if path.is_file():
            path.write_bytes(b"wrong")

    monkeypatch.setattr(mqworker.store, "_fsync", bad_disk)
    with pytest.raises(Corrupt, match=hashlib.sha256(b"right").hexdigest()):
        store.put(a_file(tmp_path, b"right"))

    assert kept(root) == []


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo, lambda _: None])
def test_what_is_no_regular_file_is_refused(store, tmp_path, make):
    make(tmp_path / "thing")

    with pytest.raises(ArtifactInvalid, match="thing"):
        store.put(tmp_path / "thing")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"X" + content[1:],
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda _: b"",
    ],
    ids=["altered", "truncated", "longer", "empty"],
)
@pytest.mark.parametrize("size", [100, CHUNK + 100])
def test_damaged_bytes_are_never_handed_out(store, root, tmp_path, damage, size):
    content = b"a" * size
    sha256, _ = store.put(a_file(tmp_path, content))
    object_of(root, sha256).write_bytes(damage(content))
    (tmp_path / "out").mkdir()

    with pytest.raises(Corrupt, match=sha256):
        store.get(sha256, size, tmp_path / "out" / "back")
    stream = store.open_stream(sha256)
    with pytest.raises(Corrupt, match=sha256):
        list(stream)

    assert [*(tmp_path / "out").iterdir()] == []


def test_bytes_of_another_size_than_asked_for_are_not_handed_out(store, tmp_path):
    sha256, size = store.put(a_file(tmp_path, b"abc"))

    with pytest.raises(Corrupt, match="size 4"):
        store.get(sha256, size + 1, tmp_path / "back")

    assert not (tmp_path / "back").exists()


def test_a_destination_that_is_there_is_replaced_only_by_good_bytes(store, root, tmp_path):
    sha256, size = store.put(a_file(tmp_path, b"new"))
    back = a_file(tmp_path, b"old", "back")
    object_of(root, sha256).write_bytes(b"bad")
    with pytest.raises(Corrupt):
        store.get(sha256, size, back)
    assert back.read_bytes() == b"old"

    object_of(root, sha256).write_bytes(b"new")
    store.get(sha256, size, back)

    assert back.read_bytes() == b"new"


@pytest.mark.parametrize("sha256", [ABSENT, "../../etc/passwd", "", "A" * 64, ABSENT + "\n"])
def test_what_the_store_does_not_have_is_not_found(store, tmp_path, sha256):
    with pytest.raises(NotFound):
        store.get(sha256, 1, tmp_path / "back")
    with pytest.raises(NotFound):
        list(store.open_stream(sha256))

    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_destination_that_cannot_be_written_is_told(store, tmp_path):
    sha256, size = store.put(a_file(tmp_path, b"abc"))

    with pytest.raises(StoreUnavailable, match="nowhere"):
        store.get(sha256, size, tmp_path / "nowhere" / "back")


# ---------------------------------------------------------------- the store and its id


def test_a_store_keeps_its_id(store, root):
    again = Store.open(f"file://{root}")

    assert again.id == store.id == str(uuid.UUID(store.id))
    assert Store.open(f"file://{root}", create=True).id == store.id
    assert again.url == f"file://{root}"


def test_a_store_on_a_full_disk_is_opened_by_who_may_make_one(store):
    opening = """
        import resource, sys
        from mqworker.store import Store
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        print(Store.open(sys.argv[1], create=True).id)
    """
    with child(opening, store.url) as opener:
        output = opener.stdout.read()

    assert output.strip() == store.id


def test_creators_that_race_agree_on_one_id(root):
    with ThreadPoolExecutor(8) as creators:
        ids = [*creators.map(lambda _: Store.open(f"file://{root}", create=True).id, range(16))]

    assert len(set(ids)) == 1


@pytest.mark.parametrize("there", [False, True])
def test_a_missing_store_is_told_and_not_made(root, there):
    if there:
        root.mkdir(parents=True)  # a mount point without its mount

    with pytest.raises(StoreUnavailable, match="mount it"):
        Store.open(f"file://{root}")

    assert root.exists() is there


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"not a uuid"])
def test_a_store_with_a_damaged_id_is_refused(store, root, content):
    (root / "store-id").write_bytes(content)

    with pytest.raises(StoreUnavailable, match="UUID"):
        Store.open(store.url)


@pytest.mark.parametrize(
    "url", ["", "store", "/var/store", "file://host/store", "file:store", "foo://bar", "s3://", "file:///a?b", "x://["]
)
def test_a_url_of_no_kind_of_store_is_a_wrong_setting(url):
    with pytest.raises(SettingsError, match="file:///"):
        Store.open(url, create=True)


def test_secrets_in_a_wrong_url_are_not_repeated():
    with pytest.raises(SettingsError) as caught:
        Store.open("foo://me:secret@host/x")

    assert "secret" not in str(caught.value)


def test_a_folder_with_a_space_in_its_name_is_one(tmp_path):
    store = Store.open(f"file://{tmp_path}/my%20store", create=True)

    assert (tmp_path / "my store" / "store-id").read_text() == store.id


def test_other_kinds_of_store_follow_from_the_same_code(tmp_path):
    store = Store.open("memory:///", create=True)
    for size in (0, 10, CHUNK + 1):
        content = os.urandom(size)
        sha256, _ = store.put(a_file(tmp_path, content))
        store.get(sha256, size, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content
    with pytest.raises(NotFound):
        store.get(ABSENT, 1, tmp_path / "back")
    with pytest.raises(StoreUnavailable):
        Store.open("memory:///")


# ---------------------------------------------------------------- when the world is unwell


def test_a_store_that_vanishes_is_unavailable_and_nothing_is_written_in_its_place(store, root, tmp_path):
    sha256, size = store.put(a_file(tmp_path, b"abc"))
    root.rename(tmp_path / "gone")
    root.mkdir()

    with pytest.raises(StoreUnavailable):
        store.get(sha256, size, tmp_path / "back")
    with pytest.raises(StoreUnavailable):
        store.put(a_file(tmp_path, b"other"))

    assert [*root.iterdir()] == []


def test_another_store_in_the_place_of_ours_is_told(store, root, tmp_path):
    root.rename(tmp_path / "gone")
    Store.open(store.url, create=True)

    with pytest.raises(StoreUnavailable, match="another one"):
        store.put(a_file(tmp_path, b"abc"))


def test_a_store_that_cannot_be_written_is_unavailable(store, root, tmp_path):
    (root / "incoming").touch()  # where a folder must be: it stops even root

    with pytest.raises(StoreUnavailable, match="look at"):
        store.put(a_file(tmp_path, b"abc"))


def test_a_folder_that_cannot_be_made_is_unavailable(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(StoreUnavailable, match="look at"):
        Store.open(f"file://{tmp_path}/file/store", create=True)


def child(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("size", [CHUNK // 2, CHUNK * 2])
def test_a_full_disk_leaves_nothing_under_a_final_name(store, root, tmp_path, size):
    filling = """
        import pathlib, resource, sys
        from mqworker.errors import StoreUnavailable
        from mqworker.store import Store
        store = Store.open(sys.argv[1])
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, unlimited[1]))
        try:
            store.put(pathlib.Path(sys.argv[2]))
        except StoreUnavailable as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    """
    path = a_file(tmp_path, os.urandom(size))
    with child(filling, store.url, path) as filler:
        output = filler.stdout.read()

    assert "free space" in output
    assert kept(root) == []
    store.put(path)
    assert len(kept(root)) == 1


def test_a_killed_upload_leaves_only_what_the_next_start_clears_once_it_is_old(store, root, tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(512 * 1024 * 1024)
    putting = (
        "import pathlib, sys; from mqworker.store import Store; Store.open(sys.argv[1]).put(pathlib.Path(sys.argv[2]))"
    )
    incoming = root / "incoming"
    with child(putting, store.url, path) as putter:
        deadline = time.monotonic() + 60
        while not (incoming.exists() and any(incoming.iterdir())):
            assert putter.poll() is None
            assert time.monotonic() < deadline
        putter.kill()

    assert not (root / "sha256").exists()
    [left] = incoming.iterdir()
    Store.open(store.url, create=True)
    assert left.exists()
    old = time.time() - LEFT_OVER_AFTER - 60
    os.utime(left, (old, old))
    Store.open(store.url)
    assert left.exists()
    Store.open(store.url, create=True)
    assert kept(root) == []


def test_a_large_file_needs_little_memory(store, tmp_path):
    measuring = """
        import pathlib, re, sys
        from mqworker.store import Store
        def peak():  # of this program alone, unlike getrusage, which remembers the one that started it
            return int(re.search(r"VmHWM:\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
        store = Store.open(sys.argv[1])
        before = peak()
        sha256, size = store.put(pathlib.Path(sys.argv[2]))
        store.get(sha256, size, pathlib.Path(sys.argv[3]))
        print((peak() - before) // 1024)
    """
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(300 * 1024 * 1024)
    with child(measuring, store.url, path, tmp_path / "back") as measured:
        mib = int(measured.stdout.read())

    assert (tmp_path / "back").stat().st_size == 300 * 1024 * 1024
    assert mib < 100
