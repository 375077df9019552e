import hashlib
import subprocess
import sys

import pytest

from mqworker import debianhost
from mqworker.errors import ArtifactInvalid, HostUnfit
from tasks.debian import MAX_CONTROL_BYTES, SbuildValidatorMixin, read_binary_package, read_source_package, read_upload


@pytest.fixture
def dsc(tmp_path):
    return debianhost.write_sample_source(tmp_path)


@pytest.fixture
def deb(tmp_path):
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: hello-bin\nSource: hello (1:2.0-1)\nVersion: 1:2.0-1+b1\nArchitecture: amd64\n"
        "Maintainer: A B <a@example.org>\nDescription: says hello\n"
    )
    (tree / "DEBIAN" / "md5sums").write_text("")
    path = tmp_path / "hello-bin_2.0-1+b1_amd64.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, path], check=True, capture_output=True)
    return path


def write_changes(directory, *names, **fields):
    """Write a .changes that lists files of a directory."""
    entries = [(name, (directory / name).read_bytes()) for name in names]
    md5 = "".join(
        f" {hashlib.md5(body, usedforsecurity=False).hexdigest()} {len(body)} misc optional {name}\n"
        for name, body in entries
    )
    sha256 = "".join(f" {hashlib.sha256(body).hexdigest()} {len(body)} {name}\n" for name, body in entries)
    values = {"Source": "hello", "Version": "1:2.0-1", "Architecture": "amd64", "Distribution": "sid", **fields}
    changes = directory / "hello_2.0-1_amd64.changes"
    changes.write_text(
        "".join(f"{name}: {value}\n" for name, value in values.items()) + f"Checksums-Sha256:\n{sha256}Files:\n{md5}"
    )
    return changes


# ---------------------------------------------------------------- reading


def test_a_source_package_is_its_dsc_and_what_that_lists(dsc):
    source = read_source_package(dsc)

    assert source.category == "debian:source-package"
    assert source.name == "mqworker-sample_1.0"
    assert {key: source.data[key] for key in ("name", "version", "type")} == {
        "name": "mqworker-sample",
        "version": "1.0",
        "type": "dpkg",
    }
    assert source.data["dsc_fields"]["Build-Depends"] == "debhelper-compat (= 13)"
    assert source.files == {
        name: dsc.parent / name for name in ("mqworker-sample_1.0.dsc", "mqworker-sample_1.0.tar.xz")
    }


def test_a_signature_around_a_dsc_is_no_part_of_it(dsc):
    plain = read_source_package(dsc)
    dsc.write_text(
        "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\n"
        + dsc.read_text()
        + "\n-----BEGIN PGP SIGNATURE-----\n\niQIzBAEB\n=abcd\n-----END PGP SIGNATURE-----\n"
    )

    assert read_source_package(dsc).data == plain.data


@pytest.mark.parametrize("field", ["Format", "Source", "Version", "Architecture", "Files", "Checksums-Sha256"])
def test_a_dsc_without_a_field_that_each_has_is_none(dsc, field):
    dsc.write_text(dsc.read_text().replace(f"{field}:", f"X-{field}:"))

    with pytest.raises(ArtifactInvalid, match=field):
        read_source_package(dsc)


@pytest.mark.parametrize("body", [b"", b"no fields at all", b"\xff\xfe\x00", b"Source: x\n"])
def test_garbage_is_no_dsc(tmp_path, body):
    dsc = tmp_path / "x_1.dsc"
    dsc.write_bytes(body)

    with pytest.raises(ArtifactInvalid):
        read_source_package(dsc)


@pytest.mark.parametrize(
    "change",
    [
        ("Source: mqworker-sample", "Source: ../sample"),
        ("Version: 1.0", "Version: 1.0/2"),
        ("Version: 1.0", "Version: none at all"),
    ],
)
def test_a_source_has_a_plain_name_and_a_version(dsc, change):
    dsc.write_text(dsc.read_text().replace(*change))

    with pytest.raises(ArtifactInvalid, match="expected"):
        read_source_package(dsc)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "sub/x.tar.xz", ".hidden", "-rf", "a b", "x\ty", "x;y"]
)
def test_a_file_that_is_named_by_a_path_is_refused_before_it_is_looked_at(dsc, name):
    dsc.write_text(dsc.read_text().replace("mqworker-sample_1.0.tar.xz", name))

    with pytest.raises(ArtifactInvalid, match=r"file name|a new name|a checksum"):
        read_source_package(dsc)


def test_a_file_that_is_listed_with_two_sizes_is_refused(dsc):
    text = dsc.read_text()
    size = (dsc.parent / "mqworker-sample_1.0.tar.xz").stat().st_size
    head, _, files = text.partition("Files:")
    dsc.write_text(f"{head}Files:{files.replace(f' {size} ', ' 1 ')}")

    with pytest.raises(ArtifactInvalid, match="the same sizes"):
        read_source_package(dsc)


def test_a_file_that_is_listed_twice_is_refused(dsc):
    text = dsc.read_text()
    line = next(line for line in text.splitlines() if line.endswith("tar.xz") and len(line.split()[0]) == 64)
    dsc.write_text(text.replace(line, f"{line}\n{line}"))

    with pytest.raises(ArtifactInvalid, match="a new name"):
        read_source_package(dsc)


def test_a_missing_file_is_named(dsc):
    (dsc.parent / "mqworker-sample_1.0.tar.xz").unlink()

    with pytest.raises(ArtifactInvalid, match=r"mqworker-sample_1.0.tar.xz .*missing"):
        read_source_package(dsc)


def test_a_truncated_file_is_named_with_both_sizes(dsc):
    tarball = dsc.parent / "mqworker-sample_1.0.tar.xz"
    size = tarball.stat().st_size
    tarball.write_bytes(tarball.read_bytes()[:100])

    with pytest.raises(ArtifactInvalid, match=f"{size} bytes, it has 100"):
        read_source_package(dsc)


def test_an_altered_file_of_the_same_size_is_found_by_its_sha256(dsc):
    tarball = dsc.parent / "mqworker-sample_1.0.tar.xz"
    tarball.write_bytes(tarball.read_bytes()[:-1] + b"!")

    with pytest.raises(ArtifactInvalid, match="altered"):
        read_source_package(dsc)


def test_a_symbolic_link_is_no_file_of_a_source_package(dsc, tmp_path):
    tarball = dsc.parent / "mqworker-sample_1.0.tar.xz"
    tarball.rename(tmp_path / "elsewhere")
    tarball.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(ArtifactInvalid, match="symbolic link"):
        read_source_package(dsc)


def test_a_dsc_that_fills_no_message_is_refused_unread(dsc):
    with dsc.open("a") as file:
        file.truncate(MAX_CONTROL_BYTES + 1)

    with pytest.raises(ArtifactInvalid, match=str(MAX_CONTROL_BYTES)):
        read_source_package(dsc)


def test_only_a_dsc_is_a_source_package(dsc):
    with pytest.raises(ArtifactInvalid, match=r"ends in \.dsc"):
        read_source_package(dsc.with_name("mqworker-sample_1.0.tar.xz"))


def test_an_upload_is_its_changes_and_what_that_lists(tmp_path, deb):
    upload = read_upload(write_changes(tmp_path, deb.name))

    assert upload.category == "debian:upload"
    assert upload.name == "hello_2.0-1_amd64"
    assert upload.data["type"] == "dpkg"
    assert upload.data["changes_fields"]["Distribution"] == "sid"
    assert list(upload.files) == ["hello_2.0-1_amd64.changes", deb.name]


def test_an_upload_with_an_altered_package_is_refused(tmp_path, deb):
    changes = write_changes(tmp_path, deb.name)
    deb.write_bytes(deb.read_bytes()[:-1] + b"!")

    with pytest.raises(ArtifactInvalid, match="altered"):
        read_upload(changes)


def test_a_binary_package_says_what_it_was_built_from(deb):
    package = read_binary_package(deb)

    assert package.category == "debian:binary-package"
    assert package.files == {deb.name: deb}
    assert package.data["srcpkg_name"] == "hello"
    assert package.data["srcpkg_version"] == "1:2.0-1"
    assert package.data["deb_fields"]["Package"] == "hello-bin"
    assert package.data["deb_control_files"] == ["control", "md5sums"]


def test_garbage_is_no_binary_package(deb):
    deb.write_bytes(b"!<arch>\ngarbage")

    with pytest.raises(ArtifactInvalid, match="Debian binary package"):
        read_binary_package(deb)


def test_without_python_debian_the_extra_is_named(dsc, monkeypatch):
    monkeypatch.setitem(sys.modules, "debian", None)

    with pytest.raises(HostUnfit, match=r"mqworker\[debian\]"):
        read_source_package(dsc)


# ---------------------------------------------------------------- a build's directory


def errors_of(directory):
    return SbuildValidatorMixin().check_directory_for_consistency_errors(directory)


@pytest.fixture
def built(tmp_path, deb):
    """A directory as sbuild leaves it."""
    directory = tmp_path / "built"
    directory.mkdir()
    deb.rename(directory / deb.name)
    write_changes(directory, deb.name)
    (directory / "hello_2.0-1_amd64-2026-01-01T00:00:00Z.build").write_text("log")
    (directory / "hello_2.0-1_amd64.build").symlink_to("hello_2.0-1_amd64-2026-01-01T00:00:00Z.build")
    return directory


def test_what_a_build_leaves_is_consistent(built):
    assert errors_of(built) == []


def test_without_changes_there_is_nothing_to_compare(built):
    (built / "hello_2.0-1_amd64.changes").unlink()

    assert errors_of(built) == []


def test_a_file_that_nothing_lists_is_an_error(built):
    (built / "surplus.deb").touch()

    assert errors_of(built) == ["expected no file that neither .changes nor .dsc lists, got surplus.deb"]


def test_every_inconsistency_is_told(built):
    source = debianhost.write_sample_source(built)
    source.with_name("mqworker-sample_1.0.tar.xz").unlink()
    next(built.glob("*.deb")).write_bytes(b"short")

    errors = errors_of(built)

    assert len(errors) == 2
    assert "truncated" in errors[0]
    assert "missing" in errors[1]


def test_changes_that_name_a_path_are_an_error(built):
    changes = built / "hello_2.0-1_amd64.changes"
    changes.write_text(changes.read_text().replace("hello-bin_2.0-1+b1_amd64.deb", "../../etc/passwd"))

    assert any("'../../etc/passwd'" in error for error in errors_of(built))
