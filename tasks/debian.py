"""Debian's own files as artifacts: .dsc (source packages), .changes (uploads) and .deb, read and checked.

What is read here comes from strangers: a name may be no path, a file no symbolic link, and its size and sha256 must be
those that its .dsc or .changes says. Registers no task. python-debian is loaded only when something is read, because
a farm without Debian does not install it.
"""

import hashlib
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mqworker.errors import ArtifactInvalid, HostUnfit

MAX_CONTROL_BYTES: Final = 4 * 1024 * 1024  # its fields travel in one message; the largest in Debian is below 1 MB

# libdpkg refuses "/" in these names, python-debian does not; no leading dot or dash either
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._~-]*")
_PACKAGE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9+.-]*")
_SOURCE_FIELD: Final = re.compile(r"(?P<name>\S+)(?: \((?P<version>\S+)\))?")


@dataclass(frozen=True)
class DebianArtifact:
    """Hold what an artifact is made of; `files` maps the names within it to where they are now."""

    category: str
    name: str
    data: dict[str, Any]
    files: dict[str, Path]


@dataclass(frozen=True)
class _Listed:
    """One file as a .dsc or a .changes lists it."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class _Control:
    """A .dsc or a .changes, well-formed; what it lists is not looked at yet."""

    path: Path
    fields: dict[str, str]
    listed: tuple[_Listed, ...]

    @property
    def source(self) -> str:
        return _source_of(self.fields)[0]

    @property
    def files(self) -> dict[str, Path]:
        names = [self.path.name, *(listed.name for listed in self.listed)]
        return {name: self.path.with_name(name) for name in names}

    def problems(self) -> list[str]:
        return [problem for listed in self.listed for problem in _problems(self.path.with_name(listed.name), listed)]


# ---------------------------------------------------------------- reading


def read_source_package(dsc: Path) -> DebianArtifact:
    """Read a .dsc, and check that what it lists lies beside it, unaltered.

    Raises:
        ArtifactInvalid: it is no .dsc, or a file is missing, truncated, altered, no plain file, or named by a path.
        HostUnfit: python-debian is not installed.
    """
    control = _read_control(dsc, ".dsc", required=("Format", "Source", "Version", "Architecture"))
    _raise_if(dsc, control.problems())
    data = {
        "name": control.source,
        "version": control.fields["Version"],
        "type": "dpkg",
        "dsc_fields": control.fields,
    }
    return DebianArtifact("debian:source-package", dsc.stem, data, control.files)


def read_upload(changes: Path) -> DebianArtifact:
    """Read a .changes, and check that what it lists lies beside it, unaltered.

    Raises:
        ArtifactInvalid: it is no .changes, or a file is missing, truncated, altered, no plain file, or named by a path.
        HostUnfit: python-debian is not installed.
    """
    control = _read_control(changes, ".changes", required=("Source", "Version", "Architecture", "Distribution"))
    _raise_if(changes, control.problems())
    data = {"type": "dpkg", "changes_fields": control.fields}
    return DebianArtifact("debian:upload", changes.stem, data, control.files)


def read_binary_package(deb: Path) -> DebianArtifact:
    """Read the control part of a .deb or .udeb.

    Raises:
        ArtifactInvalid: it is no binary package, or lacks a field that each has.
        HostUnfit: python-debian is not installed.
    """
    _import_debian()
    from debian import arfile, debfile  # noqa: PLC0415  # an extra: see the module's docstring

    _raise_if(deb, [*_name_problems(deb.name), *_regular_problems(deb)])
    try:
        with debfile.DebFile(str(deb)) as opened, opened.control.tgz() as members:
            fields = {str(name): str(value) for name, value in opened.debcontrol().items()}
            names = sorted(member.name.removeprefix("./") for member in members.getmembers() if member.isfile())
    except (arfile.ArError, OSError, EOFError, ValueError) as error:
        raise ArtifactInvalid(f"expected a Debian binary package, {deb} is none: {error}") from error
    _require_fields(deb, fields, ("Package", "Version", "Architecture"))
    source, source_version = _source_of(fields)
    data = {
        "srcpkg_name": source,
        "srcpkg_version": source_version,
        "deb_fields": fields,
        "deb_control_files": names,
    }
    return DebianArtifact("debian:binary-package", deb.stem, data, {deb.name: deb})


def _read_control(path: Path, suffix: str, *, required: Iterable[str]) -> _Control:
    _import_debian()
    from debian import deb822, debian_support  # noqa: PLC0415  # an extra: see the module's docstring

    if path.suffix != suffix:
        raise ArtifactInvalid(f"expected a file that ends in {suffix}, got {path.name}")
    _raise_if(path, [*_name_problems(path.name), *_regular_problems(path)])
    if (size := path.stat().st_size) > MAX_CONTROL_BYTES:
        raise ArtifactInvalid(f"expected {path} to have at most {MAX_CONTROL_BYTES} bytes, it has {size}")
    try:
        text = path.read_bytes().decode()
        _, payload, _ = deb822.Deb822.split_gpg_and_payload(iter(text.encode().splitlines()))
        fields = {str(name): str(value) for name, value in deb822.Deb822(payload).items()}
    except (EOFError, ValueError) as error:
        raise ArtifactInvalid(f"expected {path} to be a {suffix} file in UTF-8, it is not readable: {error}") from error
    _require_fields(path, fields, (*required, "Files", "Checksums-Sha256"))
    problems = []
    if not _PACKAGE_NAME.fullmatch(name := _source_of(fields)[0]):
        problems.append(f"expected the name of a source package in Source, got {name!r}")
    try:
        debian_support.Version(fields["Version"])
    except ValueError:
        problems.append(f"expected a version in Version, got {fields['Version']!r}")
    listed = tuple(_checksums(path, fields["Checksums-Sha256"]))
    by_size = {entry.name: entry.size for entry in listed}
    if by_size != _files_field(path, fields["Files"]):
        problems.append("expected Files and Checksums-Sha256 to list the same files with the same sizes, they do not")
    problems += [problem for entry in listed for problem in _name_problems(entry.name)]
    _raise_if(path, problems)
    return _Control(path, fields, listed)


def _checksums(path: Path, value: str) -> Iterator[_Listed]:
    seen = set()
    for line in filter(str.strip, value.splitlines()):
        match line.split():
            case [sha256, size, name] if (
                re.fullmatch(r"[0-9a-f]{64}", sha256) and size.isdecimal() and name not in seen
            ):
                seen.add(name)
                yield _Listed(name, int(size), sha256)
            case _:
                raise ArtifactInvalid(f"expected a sha256, a size and a new name in {path}, got {line.strip()!r}")


def _files_field(path: Path, value: str) -> dict[str, int]:
    found = {}
    for line in filter(str.strip, value.splitlines()):
        match line.split():  # a .changes has section and priority in between
            case [_, size, name] | [_, size, _, _, name] if size.isdecimal():
                found[name] = int(size)
            case _:
                raise ArtifactInvalid(f"expected a checksum, a size and a name in {path}, got {line.strip()!r}")
    return found


def _source_of(fields: dict[str, str]) -> tuple[str, str]:
    """Find the source package's name and version; a .deb and a binNMU name them only where they differ."""
    match = _SOURCE_FIELD.fullmatch(fields.get("Source") or fields.get("Package", ""))
    if match is None:
        return fields.get("Source", ""), fields["Version"]
    return match["name"], match["version"] or fields["Version"]


def _import_debian() -> None:
    try:
        import debian  # noqa: F401, PLC0415  # an extra: see the module's docstring
    except ImportError as error:
        raise HostUnfit(
            "expected python-debian to be installed, it is not; install the extra: pip install 'mqworker[debian]'"
        ) from error


# ---------------------------------------------------------------- checking


class SbuildValidatorMixin:
    """Check what a build has left in its directory."""

    def check_directory_for_consistency_errors(self, build_directory: Path) -> list[str]:
        """Compare a build's directory with its .changes and .dsc files; return what is wrong, one sentence each.

        Every file that they list must be there as they say, and none that they do not list; build logs aside.
        Without a .changes there is nothing to compare: a failed build makes none.
        """
        controls = sorted(path for path in build_directory.iterdir() if path.suffix in {".changes", ".dsc"})
        if not any(path.suffix == ".changes" for path in controls):
            return []
        problems = []
        known = {path.name for path in controls}
        for path in controls:
            try:
                control = _read_control(path, path.suffix, required=("Source", "Version"))
            except ArtifactInvalid as error:
                problems.append(str(error))
                continue
            problems += control.problems()
            known |= control.files.keys()
        unknown = sorted(
            path.name
            for path in build_directory.iterdir()
            if path.name not in known and not path.name.endswith(".build")
        )
        problems += [f"expected no file that neither .changes nor .dsc lists, got {name}" for name in unknown]
        return list(dict.fromkeys(problems))


def _problems(path: Path, listed: _Listed) -> list[str]:
    if problems := _regular_problems(path):
        return problems
    if (size := path.stat().st_size) != listed.size:
        return [f"expected {path.name} to have {listed.size} bytes, it has {size}; it may be truncated: fetch it again"]
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != listed.sha256:
        return [f"expected {path.name} to have the sha256 {listed.sha256}, it has {sha256}; it has been altered"]
    return []


def _regular_problems(path: Path) -> list[str]:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return [f"expected {path.name} in {path.parent}, it is missing"]
    if stat.S_ISREG(mode):
        return []
    return [f"expected {path.name} to be a regular file, it is {'a symbolic link' if stat.S_ISLNK(mode) else 'none'}"]


def _name_problems(name: str) -> list[str]:
    if _FILE_NAME.fullmatch(name):
        return []
    return [f"expected a plain file name of letters, digits and +._~-, got {name!r}"]


def _require_fields(path: Path, fields: dict[str, str], required: Iterable[str]) -> None:
    if lacking := [name for name in required if not fields.get(name, "").strip()]:
        raise ArtifactInvalid(f"expected the fields {', '.join(lacking)} in {path}, they are missing or empty")


def _raise_if(path: Path, problems: list[str]) -> None:
    if problems:
        raise ArtifactInvalid(f"{path} makes no artifact: {'; '.join(problems)}")
