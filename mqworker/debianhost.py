"""This machine as a Debian host: its packages, its subordinate ids, and the chroots that sbuild builds in.

Works as root and as a user who may use sudo, on Debian 12 and 13. Knows apt, dpkg, mmdebstrap and user namespaces;
knows nothing of tasks, requests or the broker, and talks to people only through the `say` that it is given.
"""

import contextlib
import fcntl
import hashlib
import io
import os
import platform
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from mqworker import processes
from mqworker.errors import HostUnfit, OutsideError, SettingsError

Say = Callable[[str], None]
SampleVariant = Literal["ok", "fail", "missing", "skip", "slow", "silent"]

ETC_SUBUID: Final = Path("/etc/subuid")
ETC_SUBGID: Final = Path("/etc/subgid")
ETC_APT: Final = Path("/etc/apt")
SUBORDINATE_IDS: Final = 65536  # a Debian system uses ids up to 65534 (nobody)
FIRST_SUBORDINATE_ID: Final = 300_000  # above what useradd gives to the first few users

TAR_END: Final = 1024  # bytes of zeros at the end of a whole tar file
_SAFE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_OUTSIDE: Final = re.compile(
    r"Failed to fetch|Unable to fetch|Could not resolve|Could not connect|Cannot initiate the connection"
    r"|Connection (?:failed|timed out|refused)|Temporary failure|Could not get lock|Unable to acquire the dpkg"
    r"|failed to download|apt-get update .*failed|Hash Sum mismatch"
)
# What the machine's administrator told apt about reaching the archive holds inside a chroot too; mmdebstrap itself
# inherits none of it.
_INHERITED_APT: Final = re.compile(
    r'Acquire::(?:https?::Proxy(?:::[^ ]+)?|Check-Valid-Until|Check-Date|Retries) ".*";', re.IGNORECASE
)


# ---------------------------------------------------------------- packages


def missing_packages(names: Iterable[str]) -> list[str]:
    """List those of the Debian packages that are not installed.

    Raises:
        HostUnfit: this is no Debian machine.
    """
    wanted = list(names)
    _require("dpkg-query", "this works on Debian and its derivatives only")
    shown = _run(["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Abbrev}\n", *wanted])
    installed = {line.split()[0] for line in shown.stdout.splitlines() if line.split()[1:] == ["ii"]}
    return [name for name in wanted if name not in installed]


def install_packages(names: Iterable[str], say: Say) -> None:
    """Install those of the Debian packages that are missing, through sudo when not root.

    Raises:
        HostUnfit: they cannot be installed here; the text says what to type.
        OutsideError: the archive cannot be reached now, or somebody else is installing.
    """
    wanted = missing_packages(names)
    if not wanted:
        return
    _require("apt-get", "this works on Debian and its derivatives only")
    say(f"installs the Debian packages {' '.join(wanted)}")
    by_hand = f"apt-get install {' '.join(wanted)}"
    install = [*_apt_get(), "install", "--yes", "--no-install-recommends", *wanted]
    updated = _run([*_apt_get(), "--simulate", "install", *wanted]).returncode != 0
    if updated:
        _as_root([*_apt_get(), "update"], by_hand)
    done = _as_root(install, by_hand)
    if done.returncode != 0 and not updated:  # lists that are days old name files that the mirror has dropped
        _as_root([*_apt_get(), "update"], by_hand)
        done = _as_root(install, by_hand)
    if done.returncode != 0:
        raise _failed(f"cannot install {' '.join(wanted)}", done, by_hand)


def _apt_get() -> list[str]:
    settings = ("Acquire::Retries=1", "Acquire::http::Timeout=20", "DPkg::Lock::Timeout=60")
    options = [word for setting in settings for word in ("-o", setting)]
    return ["env", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C.UTF-8", "apt-get", "--quiet", *options]


# ---------------------------------------------------------------- user namespaces


def ensure_subordinate_ids(say: Say) -> None:
    """Give the user who calls the 65536 subordinate uids and gids that unshare builds need, unless they are there.

    Raises:
        HostUnfit: they cannot be given; the text says what to type.
    """
    user = _user_name()
    lacking = [(path, flag) for path, flag in _ID_FILES if _given_ids(path, user) == 0]
    if lacking:
        first = _first_free_id()
        span = f"{first}-{first + SUBORDINATE_IDS - 1}"
        command = ["usermod", *(word for _, flag in lacking for word in (flag, span)), user]
        say(f"gives {user} the subordinate ids {span} for unshare builds")
        done = _as_root(command, shlex.join(command))
        if done.returncode != 0:
            raise _failed(f"cannot give {user} subordinate ids", done, shlex.join(command))
    for path, _ in _ID_FILES:
        if (given := _given_ids(path, user)) < SUBORDINATE_IDS:
            raise HostUnfit(
                f"expected the first line of {user} in {path} to give {SUBORDINATE_IDS} ids, it gives {given}; edit it"
            )


def why_no_unshare() -> str | None:
    """Try a user namespace as sbuild uses it; return in one line why it cannot work here, or None."""
    for program, package in (("unshare", "util-linux"), ("newuidmap", "uidmap"), ("newgidmap", "uidmap")):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian package {package})"
    user = _user_name()
    for path, _ in _ID_FILES:
        if _given_ids(path, user) < SUBORDINATE_IDS:
            return f"{user} has no {SUBORDINATE_IDS} subordinate ids in {path}"
    if not processes.may_unshare():
        return "user namespaces are not allowed here"
    flags = ("--user", "--map-root-user", "--map-auto", "--mount", "--pid", "--fork")
    # A container that masks parts of /proc refuses this mount, and builds without /proc fail in strange ways.
    tried = _run(["unshare", *flags, "mount", "-t", "proc", "proc", "/proc"])
    if tried.returncode == 0:
        return None
    return f"user namespaces do not work here: {_last_line(tried)}"


_ID_FILES: Final = ((ETC_SUBUID, "--add-subuids"), (ETC_SUBGID, "--add-subgids"))


def _id_lines(path: Path) -> Iterator[tuple[str, int, int]]:
    if path.exists():
        for line in path.read_text().splitlines():
            fields = line.split(":")
            if len(fields) == 3 and fields[1].isdigit() and fields[2].isdigit():  # noqa: PLR2004  # name:first:count
                yield fields[0], int(fields[1]), int(fields[2])


def _given_ids(path: Path, user: str) -> int:
    # sbuild looks for the name, never for the number, and takes the first line
    return next((count for name, _, count in _id_lines(path) if name == user), 0)


def _first_free_id() -> int:
    ends = [first + count for path, _ in _ID_FILES for _, first, count in _id_lines(path)]
    return max([FIRST_SUBORDINATE_ID, *ends])


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError as error:
        raise HostUnfit(f"expected uid {os.geteuid()} to have a name in /etc/passwd, it has none; add one") from error


# ---------------------------------------------------------------- build chroots


def default_suite() -> str:
    """Return the codename of the Debian release that runs here.

    Raises:
        HostUnfit: /etc/os-release does not say.
    """
    try:
        codename = platform.freedesktop_os_release().get("VERSION_CODENAME")
    except OSError as error:
        raise HostUnfit(f"expected /etc/os-release to name the Debian release, got: {error}") from error
    if not codename:
        raise HostUnfit("expected VERSION_CODENAME in /etc/os-release, it is not there; name a suite")
    return codename


def native_architecture() -> str:
    """Return Debian's name of this machine's architecture.

    Raises:
        HostUnfit: this is no Debian machine.
    """
    _require("dpkg", "this works on Debian and its derivatives only")
    return _run(["dpkg", "--print-architecture"]).stdout.strip()


def chroot_path(suite: str, arch: str) -> Path:
    """Return where sbuild itself looks for the tarball of a build chroot.

    Raises:
        SettingsError: the suite or the architecture is no name.
    """
    for word in (suite, arch):
        if not _SAFE_NAME.fullmatch(word):
            raise SettingsError(f"expected the name of a suite or an architecture, got {word!r}")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sbuild" / f"{suite}-{arch}-sbuild.tar"


def ensure_chroot(suite: str, arch: str, say: Say, include: Sequence[str] = ("debhelper", "fakeroot")) -> Path:
    """Make the tarball of a build chroot with mmdebstrap, unless it is there; return its path.

    It appears under its name only when it is whole; a failure or Ctrl-C leaves nothing.
    About 30 s, 150 MB of download and 520 MB on disk on two cores.

    Raises:
        HostUnfit: chroots cannot be made or used here; the text says what to do.
        OutsideError: the archive cannot be reached now.
        SettingsError: the suite or the architecture is no name.
    """
    path = chroot_path(suite, arch)
    if _is_build_chroot(path):
        return path
    if (why := why_no_unshare()) is not None:
        raise HostUnfit(f"cannot make a build chroot: {why}")
    _require("mmdebstrap", "install it: apt-get install mmdebstrap")
    mirrors = [source.line("deb") for source in _archive(suite)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / f".{suite}-{arch}.lock", say):
        if _is_build_chroot(path):  # somebody else has made it meanwhile
            return path
        say(f"makes a build chroot for {suite} on {arch}: about 30 s, 150 MB of download, 520 MB in {path.parent}")
        # sbuild takes this name for no chroot, and the file's ending tells mmdebstrap the format.
        making = path.parent / f".making-{suite}-{arch}"
        processes.remove_tree(making)  # of a predecessor that was killed: we hold the lock
        making.mkdir()
        try:
            new = making / "chroot.tar"
            _mmdebstrap(suite, arch, new, include=include, mirrors=mirrors)
            if not _is_build_chroot(new):
                raise HostUnfit(
                    f"expected mmdebstrap to make a build chroot, got a tarball without dpkg-buildpackage; "
                    f"does {suite} exist in {', '.join(mirrors)}?"
                )
            new.replace(path)
        finally:
            processes.remove_tree(making)
    say(f"made {path}")
    return path


def _mmdebstrap(suite: str, arch: str, target: Path, *, include: Sequence[str], mirrors: Sequence[str]) -> None:
    command = [
        "mmdebstrap",
        "--mode=unshare",  # root too: then nothing runs as the real root, and no mount of it can stay behind
        "--variant=buildd",
        f"--architectures={arch}",
        f"--include={','.join(include)}",
        *(f"--aptopt={line}" for line in _inherited_apt_options()),
        suite,
        str(target),
        *mirrors,
    ]
    # Of its own, so that it goes whatever happens; in /tmp, because the uids of the namespace must be able to enter it.
    scratch = Path(tempfile.mkdtemp(prefix="mqworker-chroot-"))
    log = target.with_name("log")
    try:
        scratch.chmod(0o755)
        with log.open("wb") as output:
            # A session of its own: Ctrl-C is ours to pass on, once.
            child = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "--", *command],  # noqa: S607  # found as the user would find it
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**_plain_environment(), "TMPDIR": str(scratch)},
                start_new_session=True,
            )
        _wait(child)
    finally:
        processes.remove_tree(scratch)
    if child.returncode != 0:
        printed = log.read_text(errors="replace")
        done = subprocess.CompletedProcess(command, child.returncode, printed, "")
        raise _failed(f"cannot make a build chroot for {suite} on {arch}", done, shlex.join(command))


def _wait(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait()
    except BaseException:
        # It does not stop quickly when asked; and all that it has is in its scratch directory and its own namespaces.
        if (process := processes.identify(child.pid)) is not None:
            processes.kill_tree(process)
        child.wait()
        raise


def _is_build_chroot(tarball: Path) -> bool:
    if not tarball.is_file() or tarball.stat().st_size < TAR_END:  # mmdebstrap and a full disk leave empty ones
        return False
    with tarball.open("rb") as file:
        file.seek(-TAR_END, os.SEEK_END)
        if any(file.read()):  # tar itself says nothing if one ends between two members
            return False
    return _run(["tar", "--list", "--file", str(tarball), "./usr/bin/dpkg-buildpackage"]).returncode == 0


@contextlib.contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waits for another process that holds {path}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------- the archive


@dataclass(frozen=True)
class _Source:
    """One line of apt's sources, however it was written."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str | None

    def line(self, kind: Literal["deb", "deb-src"]) -> str:
        options = f"[signed-by={self.signed_by}] " if self.signed_by else ""
        return f"{kind} {options}{self.uri} {self.suite} {' '.join(self.components)}"


def _archive(suite: str) -> list[_Source]:
    """List where this machine gets Debian's own archive from, for a suite with its updates and security.

    Other people's repositories stay out: their keys are in no chroot, and their packages in no Debian build.
    """
    ours = [
        source
        for source in _apt_sources()
        if "main" in source.components and (source.signed_by is None or "debian-archive" in source.signed_by)
    ]
    wanted = (suite, f"{suite}-updates", f"{suite}-security")
    found = [source for source in ours if source.suite in wanted]
    if any(source.suite == suite for source in found):
        return found
    for source in ours:  # another release from the same mirror
        if "-" not in source.suite:
            return [_Source(source.uri, suite, source.components, source.signed_by)]
    raise HostUnfit(f"expected an entry for Debian's archive (component main) in {ETC_APT}/sources.list.d, found none")


def _apt_sources() -> Iterator[_Source]:
    for path in (ETC_APT / "sources.list", *sorted((ETC_APT / "sources.list.d").glob("*"))):
        if path.suffix == ".list" and path.is_file():
            yield from _one_line_sources(path.read_text(errors="replace"))
        elif path.suffix == ".sources" and path.is_file():
            yield from _stanza_sources(path.read_text(errors="replace"))


def _one_line_sources(text: str) -> Iterator[_Source]:
    entry = re.compile(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>[^#]+)")
    for line in text.splitlines():
        if match := entry.match(line.strip()):
            options = dict(word.split("=", 1) for word in (match["options"] or "").split() if "=" in word)
            if not match["uri"].startswith("cdrom:"):
                components = tuple(match["components"].split())
                yield _Source(match["uri"], match["suite"], components, options.get("signed-by"))


def _stanza_sources(text: str) -> Iterator[_Source]:
    for stanza in re.split(r"\n\s*\n", re.sub(r"(?m)^#.*\n?", "", text)):
        fields = {
            match["name"].lower(): match["value"].strip()
            for match in re.finditer(r"(?m)^(?P<name>[A-Za-z-]+):(?P<value>.*(?:\n[ \t].*)*)", stanza)
        }
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield _Source(uri, suite, tuple(fields.get("components", "").split()), fields.get("signed-by") or None)


def _inherited_apt_options() -> list[str]:
    shown = _run(["apt-config", "dump", "--no-empty", "--format", '%f "%v";%n'])
    return [line for line in shown.stdout.splitlines() if _INHERITED_APT.fullmatch(line)]


def fetch_source(package: str, directory: Path, suite: str, say: Say) -> Path:
    """Fetch a source package from the archive that this machine uses; return its .dsc in the directory.

    Uses apt with lists of its own, so that the machine's sources stay as they are: 40 MB for a moment, a few seconds.

    Raises:
        HostUnfit: apt or the archive's address is not there.
        OutsideError: the archive cannot be reached now, or does not have all of the package.
        SettingsError: the package is no name.
    """
    if not _SAFE_NAME.fullmatch(package):
        raise SettingsError(f"expected the name of a source package, got {package!r}")
    _require("apt-get", "this works on Debian and its derivatives only")
    sources = [source.line("deb-src") for source in _archive(suite)]
    say(f"fetches the source of {package} in {suite}")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as private_name:
        private = Path(private_name)
        for name in ("lists/partial", "cache/archives/partial", "download"):
            (private / name).mkdir(parents=True)
        (private / "sources.list").write_text("".join(f"{line}\n" for line in sources))
        settings = {
            "Dir::Etc::sourcelist": private / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State::lists": private / "lists",
            "Dir::Cache": private / "cache",
            "APT::Sandbox::User": "root",  # the directory is ours alone
        }
        (private / "apt.conf").write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()))
        environment = {"APT_CONFIG": str(private / "apt.conf")}
        for arguments in (["update"], ["source", "--download-only", "--only-source", package]):
            done = _run([*_apt_get(), *arguments], environment=environment, directory=private / "download")
            if done.returncode != 0:
                raise OutsideError(f"cannot fetch the source of {package} in {suite}: {_last_line(done)}")
        fetched = [path.replace(directory / path.name) for path in (private / "download").iterdir()]
    for path in fetched:
        if path.suffix == ".dsc":
            return path
    raise OutsideError(f"expected a .dsc of {package} in {suite}, got {sorted(path.name for path in fetched)}")


# ---------------------------------------------------------------- a source package of our own

_SAMPLE_NAME: Final = "mqworker-sample"
_SAMPLE_RULES: Final[Mapping[str, str]] = {
    "ok": "",
    "missing": "",
    "skip": "",
    "fail": "\noverride_dh_auto_test:\n\t@echo 'sample: this build fails on purpose' >&2\n\texit 1\n",
    "slow": '\noverride_dh_auto_test:\n\tfor i in $$(seq 600); do echo "sample: second $$i"; sleep 1; done\n',
    "silent": "\noverride_dh_auto_test:\n\t@echo 'sample: silent now'\n\t@sleep 600\n",
}


def write_sample_source(directory: Path, variant: SampleVariant = "ok") -> Path:
    """Write a native source package of about 1 kB, a C program and its data; return its .dsc.

    It builds offline in what ensure_chroot() makes, in about 10 s. The variants: `fail` fails, `missing` needs a
    package that nobody has, `skip` is for an architecture that nobody has, `slow` prints a line a second for 600 s,
    `silent` says nothing for 600 s. The same variant is the same bytes.
    """
    name = _SAMPLE_NAME if variant == "ok" else f"{_SAMPLE_NAME}-{variant}"
    architectures = ("m32r", "m32r") if variant == "skip" else ("any", "all")
    needs = "debhelper-compat (= 13)" + (", package-that-nobody-has" if variant == "missing" else "")
    maintainer = "mqworker <mqworker@localhost>"
    files = {
        "debian/control": (
            f"Source: {name}\nSection: misc\nPriority: optional\nMaintainer: {maintainer}\nStandards-Version: 4.6.2\n"
            f"Rules-Requires-Root: no\nBuild-Depends: {needs}\n\n"
            f"Package: {name}\nArchitecture: {architectures[0]}\n"
            f"Depends: {name}-data, ${{shlibs:Depends}}, ${{misc:Depends}}\n"
            "Description: program of a sample package\n Says hello.\n\n"
            f"Package: {name}-data\nArchitecture: {architectures[1]}\nDepends: ${{misc:Depends}}\n"
            "Description: data of a sample package\n A line of text.\n"
        ),
        "debian/changelog": (
            f"{name} (1.0) unstable; urgency=low\n\n  * A sample.\n\n"
            f" -- {maintainer}  Wed, 01 Jan 2025 00:00:00 +0000\n"
        ),
        "debian/copyright": "Written for mqworker; MIT license.\n",
        "debian/source/format": "3.0 (native)\n",
        "debian/rules": f"#!/usr/bin/make -f\n%:\n\tdh $@\n{_SAMPLE_RULES[variant]}",
        f"debian/{name}.install": "sample usr/bin\n",
        f"debian/{name}-data.install": f"sample.txt usr/share/{name}\n",
        "Makefile": "sample: sample.c\nclean:\n\trm -f sample\n",
        "sample.c": '#include <stdio.h>\nint main(void) { puts("Hello."); return 0; }\n',
        "sample.txt": "Hello.\n",
    }
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz", format=tarfile.USTAR_FORMAT) as tar:
        for path, text in files.items():
            entry = tarfile.TarInfo(f"{name}-1.0/{path}")
            entry.size = len(text.encode())
            entry.mode = 0o755 if path == "debian/rules" else 0o644
            entry.mtime = 1735689600  # the changelog's date
            tar.addfile(entry, io.BytesIO(text.encode()))
    tarball = f"{name}_1.0.tar.xz"
    body = archive.getvalue()
    sums = {"Checksums-Sha1": "sha1", "Checksums-Sha256": "sha256", "Files": "md5"}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / tarball).write_bytes(body)
    dsc = directory / f"{name}_1.0.dsc"
    dsc.write_text(
        f"Format: 3.0 (native)\nSource: {name}\nBinary: {name}, {name}-data\n"
        f"Architecture: {' '.join(dict.fromkeys(architectures))}\nVersion: 1.0\nMaintainer: {maintainer}\n"
        f"Standards-Version: 4.6.2\nBuild-Depends: {needs}\n"
        + "".join(
            f"{field}:\n {hashlib.new(algorithm, body).hexdigest()} {len(body)} {tarball}\n"
            for field, algorithm in sums.items()
        )
    )
    return dsc


# ---------------------------------------------------------------- running programs


def _plain_environment() -> dict[str, str]:
    """Keep what programs need and people set on purpose, with messages in English, which we read."""
    kept = ("HOME", "LOGNAME", "USER", "TERM", "http_proxy", "https_proxy", "no_proxy", "SUDO_ASKPASS")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    # A user's PATH has no sbin, where usermod and chroot are.
    return {**environment, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def _run(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, directory: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**_plain_environment(), **(environment or {})},
        cwd=directory,
    )


def _as_root(command: Sequence[str], by_hand: str) -> subprocess.CompletedProcess[str]:
    if os.geteuid() == 0:
        return _run(command)
    if shutil.which("sudo") is None:
        raise HostUnfit(f"root is needed, and sudo is not installed; type as root: {by_hand}")
    # sudo asks on the terminal by itself where there is one; without one it must not wait for an answer
    ask = [] if sys.stdin is not None and sys.stdin.isatty() else ["--non-interactive"]
    return _run(["sudo", *ask, "--", *command])


def _require(program: str, advice: str) -> None:
    if shutil.which(program) is None:
        raise HostUnfit(f"expected the program {program}, it is not installed; {advice}")


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    causes = [line for line in lines if line.startswith(("E: ", "Err:", "W: Failed"))]
    return (causes or lines or [f"exit code {done.returncode} and no message"])[-1]


def _failed(what: str, done: subprocess.CompletedProcess[str], by_hand: str) -> HostUnfit | OutsideError:
    cause = _last_line(done)
    if _OUTSIDE.search(done.stdout + done.stderr):
        return OutsideError(f"{what} now: {cause}; try again, or see what it says: {by_hand}")
    return HostUnfit(f"{what}: {cause}; type as root: {by_hand}")
