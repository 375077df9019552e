import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from mqworker import debianhost
from mqworker.errors import HostUnfit, OutsideError, SettingsError


def silent(text: str) -> None:
    raise AssertionError(f"nothing was to be said, got: {text}")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def id_files(tmp_path, monkeypatch):
    """Stand-ins for /etc/subuid and /etc/subgid: the real ones are the machine's."""
    files = (tmp_path / "subuid", tmp_path / "subgid")
    monkeypatch.setattr(debianhost, "_ID_FILES", tuple(zip(files, ("--add-subuids", "--add-subgids"), strict=True)))
    return files


@pytest.fixture
def apt_directory(tmp_path, monkeypatch):
    """A stand-in for /etc/apt, whose sources are the machine's."""
    directory = tmp_path / "apt"
    (directory / "sources.list.d").mkdir(parents=True)
    monkeypatch.setattr(debianhost, "ETC_APT", directory)
    return directory


# ---------------------------------------------------------------- packages


@pytest.mark.debian
def test_only_packages_that_are_not_installed_are_missing():
    assert debianhost.missing_packages(["dpkg", "a-package-that-nobody-has", "tar"]) == ["a-package-that-nobody-has"]


@pytest.mark.debian
def test_installing_what_is_there_says_and_does_nothing():
    debianhost.install_packages(["dpkg", "tar"], silent)


@pytest.mark.debian
def test_a_package_that_cannot_be_installed_says_what_to_type(said):
    with pytest.raises((HostUnfit, OutsideError), match="apt-get install a-package-that-nobody-has") as caught:
        debianhost.install_packages(["dpkg", "a-package-that-nobody-has"], said.append)

    assert "\n" not in str(caught.value)
    assert said == ["installs the Debian packages a-package-that-nobody-has"]


# ---------------------------------------------------------------- user namespaces


def test_new_subordinate_ids_lie_above_everybody_elses(id_files, monkeypatch):
    id_files[0].write_text("alice:100000:65536\nbob:400000:65536\n# a remark\n")
    typed = []
    monkeypatch.setattr(debianhost, "_user_name", lambda: "carol")

    def usermod(command, _):
        typed.append(command)
        for path in id_files:
            with path.open("a") as file:
                file.write("carol:465536:65536\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(debianhost, "_as_root", usermod)

    debianhost.ensure_subordinate_ids(lambda _: None)
    debianhost.ensure_subordinate_ids(silent)

    assert typed == [["usermod", "--add-subuids", "465536-531071", "--add-subgids", "465536-531071", "carol"]]


def test_too_few_subordinate_ids_are_told_and_left_as_they_are(id_files, monkeypatch):
    for path in id_files:
        path.write_text("carol:100000:1000\n")
    monkeypatch.setattr(debianhost, "_user_name", lambda: "carol")

    with pytest.raises(HostUnfit, match="gives 1000; edit it"):
        debianhost.ensure_subordinate_ids(silent)


def test_without_subordinate_ids_unshare_builds_are_refused_with_the_reason(id_files):
    assert not id_files[0].exists()

    assert str(id_files[0]) in str(debianhost.why_no_unshare())


WITHOUT_NAMESPACES = {
    "a look at the host": "debianhost._given_ids = lambda *_: 65536; print(debianhost.why_no_unshare())",
    "a tree": "processes.remove_tree(Path('/proc/self/fdinfo'))",  # nobody removes that
    "a size": "processes._size_as_namespace_root(Path('/proc/self/fdinfo'), PermissionError('closed'))",
    "sbuild": "print('not allowed' * (not sbuild._can_unshare()))",
}


@pytest.mark.parametrize("what", WITHOUT_NAMESPACES)
def test_where_user_namespaces_are_not_allowed_nothing_waits_for_them(what):
    """As in most containers: there, `unshare --map-auto` leaves a helper that keeps its output open."""
    imports = "from pathlib import Path; from mqworker import debianhost, processes; from tasks import sbuild"
    within = ["unshare", "--user", "--map-root-user", "sh", "-c"]
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@" 2>&1'
    if subprocess.run([*within, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("this kernel gives us no user namespaces")
    done = subprocess.run(
        [*within, forbid, "sh", sys.executable, "-P", "-c", f"{imports}\n{WITHOUT_NAMESPACES[what]}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert "not allowed" in done.stdout


# ---------------------------------------------------------------- the archive


def test_both_ways_to_write_sources_are_read_and_other_peoples_repositories_left_out(apt_directory):
    (apt_directory / "sources.list").write_text(
        "# deb http://old.example/debian bookworm main\n"
        "deb cdrom:[Debian 12]/ bookworm main\n"
        "deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://a.example/debian bookworm"
        " main contrib # ours\n"
        "deb-src http://a.example/debian bookworm main\n"
        "deb [signed-by=/etc/apt/keyrings/other.gpg] http://other.example/debian bookworm main\n"
        "deb http://other.example/debian bookworm stable\n"
    )
    (apt_directory / "sources.list.d" / "debian.sources").write_text(
        "Types: deb deb-src\n# a remark\nURIs: http://b.example/security\n"
        "Suites: bookworm-security bookworm-backports\n"
        "Components: main\n\n"
        "Types: deb\nEnabled: no\nURIs: http://c.example/debian\nSuites: bookworm\nComponents: main\n\n"
        "Types: deb\nURIs: http://d.example/debian\nSuites: bookworm\nComponents: main\n"
        "Signed-By:\n -----BEGIN PGP\n .\n"
    )

    assert [source.line("deb") for source in debianhost._archive("bookworm")] == [
        "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://a.example/debian bookworm main contrib",
        "deb http://b.example/security bookworm-security main",
    ]


def test_another_release_comes_from_the_same_mirror(apt_directory):
    (apt_directory / "sources.list").write_text(
        "deb http://s.example/security bookworm-security main\ndeb http://a.example/debian bookworm main\n"
    )

    assert [source.line("deb-src") for source in debianhost._archive("trixie")] == [
        "deb-src http://a.example/debian trixie main"
    ]


def test_a_machine_without_debians_archive_is_told_so(apt_directory):
    with pytest.raises(HostUnfit, match=str(apt_directory)):
        debianhost._archive("bookworm")


@pytest.mark.debian
def test_a_mirror_that_does_not_answer_is_an_outside_error_in_one_line_and_leaves_nothing(
    apt_directory, tmp_path, said
):
    (apt_directory / "sources.list").write_text("deb http://127.0.0.1:9/debian bookworm main\n")

    with pytest.raises(OutsideError) as caught:
        debianhost.fetch_source("hello", tmp_path / "fetched", "bookworm", said.append)

    assert "\n" not in str(caught.value)
    assert list((tmp_path / "fetched").iterdir()) == []


@pytest.mark.debian
def test_a_source_package_is_fetched_from_this_machines_mirror(tmp_path, said):
    try:
        dsc = debianhost.fetch_source("hello", tmp_path, debianhost.default_suite(), said.append)
    except (HostUnfit, OutsideError) as error:  # mirrors come and go: no other test needs one
        pytest.skip(f"needs a Debian mirror with the source of hello: {error}")

    assert dsc.parent == tmp_path
    assert dsc.name.startswith("hello_")
    assert len(list(tmp_path.iterdir())) >= 2


def test_only_a_plain_name_is_fetched(tmp_path):
    with pytest.raises(SettingsError):
        debianhost.fetch_source("--help", tmp_path, "bookworm", silent)


# ---------------------------------------------------------------- chroots


def test_chroots_lie_where_sbuild_looks(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert debianhost.chroot_path("bookworm", "amd64") == tmp_path / "sbuild" / "bookworm-amd64-sbuild.tar"


@pytest.mark.parametrize("suite", ["../bookworm", "", "a b", "Bookworm"])
def test_a_chroot_has_a_plain_name(suite):
    with pytest.raises(SettingsError):
        debianhost.chroot_path(suite, "amd64")


@pytest.mark.debian
def test_what_mmdebstrap_leaves_when_it_fails_is_no_chroot(tmp_path):
    empty = tmp_path / "empty.tar"
    empty.touch()
    bare = tmp_path / "bare.tar"
    with tarfile.open(bare, "w") as tar:
        tar.addfile(tarfile.TarInfo("./etc"))
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w") as tar:
        tar.addfile(tarfile.TarInfo("./usr/bin/dpkg-buildpackage"))
        tar.addfile(tarfile.TarInfo("./zzz"))
    truncated = tmp_path / "truncated.tar"
    truncated.write_bytes(whole.read_bytes()[:700])

    usable = [path.name for path in (empty, bare, whole, truncated) if debianhost._is_build_chroot(path)]

    assert usable == ["whole.tar"]


@pytest.mark.debian
def test_a_chroot_that_cannot_be_made_leaves_nothing(apt_directory, tmp_path, monkeypatch, said):
    if (why := debianhost.why_no_unshare()) is not None:
        pytest.skip(f"needs user namespaces: {why}")
    (apt_directory / "sources.list").write_text("deb http://127.0.0.1:9/debian bookworm main\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    with pytest.raises(OutsideError) as caught:
        debianhost.ensure_chroot("bookworm", debianhost.native_architecture(), said.append)

    assert "\n" not in str(caught.value)
    assert "30 s" in said[0]
    assert [path.suffix for path in (tmp_path / "cache" / "sbuild").iterdir()] == [".lock"]


@pytest.mark.debian
def test_ctrl_c_while_a_chroot_is_made_leaves_nothing(tmp_path):
    if (why := debianhost.why_no_unshare()) is not None:
        pytest.skip(f"needs user namespaces: {why}")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    tmp_path.chmod(0o755)
    program = "from mqworker import debianhost as d; d.ensure_chroot('bookworm', d.native_architecture(), print)"
    child = subprocess.Popen([sys.executable, "-u", "-c", program], env=environment, stdout=subprocess.PIPE)
    try:
        child.stdout.readline()  # it says what it begins
        while not list(tmp_path.glob("mqworker-chroot-*/*/etc/apt")) and child.poll() is None:
            time.sleep(0.01)  # no event tells that mmdebstrap has begun
        child.send_signal(signal.SIGINT)
        child.wait(30)
    finally:
        child.kill()
        child.communicate()

    assert [path.suffix for path in (tmp_path / "cache" / "sbuild").iterdir()] == [".lock"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert str(tmp_path) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


# ---------------------------------------------------------------- the sample source


@pytest.mark.parametrize("variant", ["ok", "fail", "missing", "skip", "slow", "silent"])
def test_dpkg_unpacks_each_sample_source(tmp_path, variant):
    dsc = debianhost.write_sample_source(tmp_path, variant)

    subprocess.run(
        ["dpkg-source", "--extract", dsc.name, "unpacked"], cwd=tmp_path, check=True, capture_output=True, text=True
    )

    assert os.access(tmp_path / "unpacked" / "debian" / "rules", os.X_OK)


def test_the_same_sample_source_is_the_same_bytes(tmp_path):
    first = debianhost.write_sample_source(tmp_path / "a")
    second = debianhost.write_sample_source(tmp_path / "b")

    assert [path.read_bytes() for path in sorted(first.parent.iterdir())] == [
        path.read_bytes() for path in sorted(second.parent.iterdir())
    ]
    assert sum(path.stat().st_size for path in first.parent.iterdir()) < 3000
