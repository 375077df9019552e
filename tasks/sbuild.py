"""Sbuild, a task that builds a Debian source package in a clean chroot, with Debian's own build tool.

The worker's administrator says in the environment variable MQWORKER_SBUILD_BACKENDS where builds may run: `unshare`
(the default), or `unshare,schroot` (the first that has the chroot is taken). Under schroot a build runs with the
worker's own uid and with network: only for sources that are trusted. Chroots for unshare are the tarballs that sbuild
itself looks for, `<suite>-<architecture>-sbuild.tar` and the like in ~/.cache/sbuild.

Task data come from strangers, and sbuild has options that run commands on this host, read its files or open its
network. So options are built from an allow-list, each in one word; sbuild gets a home and a configuration of its own
(they are Perl programs) and an environment of its own, and everything it makes is below the run's own directory.
"""

import importlib.util
import os
import pwd
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from mqworker.errors import HostUnfit, SettingsError
from mqworker.task import (
    FetchExecUploadMixin,
    RecordedArtifact,
    Relation,
    Task,
    TaskConfigError,
    TaskContext,
    TaskRunCommandMixin,
)
from tasks.debian import DebianArtifact, SbuildValidatorMixin, read_binary_package, read_source_package, read_upload

BACKENDS_VARIABLE: Final = "MQWORKER_SBUILD_BACKENDS"
BACKENDS: Final = ("unshare", "schroot")

MAINTAINER: Final = "mqworker <mqworker@localhost>"  # signs the changelog entry of a binNMU; sbuild insists on a name
PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
PROBE_SECONDS: Final = 30  # each of the quick questions to this host
SMALLEST_CHROOT: Final = 1_000_000  # bytes; Debian's smallest is 50 MB, what mmdebstrap leaves on failure below 0.1 MB

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_TARBALL: Final = re.compile(
    r"(?P<chroot>[a-z0-9][a-z0-9.+-]*?-[a-z0-9]+)(?:-sbuild)?\.(?P<ending>tar|tar\.(?:gz|bz2|xz|zst|lz4)|tgz|txz)"
)
# Where in a file which bytes show that it is what its name says; from file(1)'s magic.
_MAGIC: Final[Mapping[str, tuple[int, bytes]]] = {
    "tar": (257, b"ustar"),
    "gz": (0, b"\x1f\x8b"),
    "tgz": (0, b"\x1f\x8b"),
    "bz2": (0, b"BZh"),
    "xz": (0, b"\xfd7zXZ\x00"),
    "txz": (0, b"\xfd7zXZ\x00"),
    "zst": (0, b"\x28\xb5\x2f\xfd"),
    "lz4": (0, b"\x04\x22\x4d\x18"),
}


# ---------------------------------------------------------------- the options that a request may give


@dataclass(frozen=True)
class _Option:
    """One long option of sbuild: what its value must match (None: it has none), and how to say so."""

    value: re.Pattern[str] | None = None
    says: str = ""


_RELATION = r"[a-z0-9][a-z0-9.+-]+(?::[a-z0-9-]+)?(?: ?\((?:<<|<=|=|>=|>>) ?[A-Za-z0-9.+:~-]+\))?"
_RELATIONS = _Option(
    re.compile(rf"{_RELATION}(?:(?:, ?| ?\| ?){_RELATION})*"), "<package relations, as in debian/control>"
)

# Not named here is not allowed; a deny-list would be wrong, since sbuild takes abbreviations.
OPTIONS: Final[Mapping[str, _Option]] = {
    "--profiles": _Option(re.compile(r"[a-z0-9][A-Za-z0-9.+-]*(?:,[a-z0-9][A-Za-z0-9.+-]*)*"), "<profile,...>"),
    "--build-dep-resolver": _Option(re.compile(r"apt|aptitude|aspcud|xapt|null"), "apt|aptitude|aspcud|xapt|null"),
    "--bd-uninstallable-explainer": _Option(re.compile(r"apt|dose3|none"), "apt|dose3|none"),
    "--resolve-alternatives": _Option(),
    "--no-resolve-alternatives": _Option(),
    "--add-depends": _RELATIONS,
    "--add-conflicts": _RELATIONS,
    "--binNMU": _Option(re.compile(r"[0-9]{1,4}"), "<0 to 9999>"),
    "--make-binNMU": _Option(re.compile(r"[!-~](?:[ -~]{0,198}[!-~])?"), "<one line of up to 200 ASCII characters>"),
    "--append-to-version": _Option(re.compile(r"[A-Za-z0-9.+~]{1,50}"), "<up to 50 letters, digits and .+~>"),
    "--force-orig-source": _Option(),
    "--source-only-changes": _Option(),
    "--no-apt-update": _Option(),
    "--debbuildopt": _Option(re.compile(r"-j[1-9][0-9]{0,3}"), "-j<number>"),
}
_REBUILD_OPTIONS: Final = ("--make-binNMU", "--append-to-version")


def _allowed_options() -> str:
    return ", ".join(name if option.value is None else f"{name}={option.says}" for name, option in OPTIONS.items())


def _option_problem(text: str) -> str | None:
    name, equals, value = text.partition("=")
    option = OPTIONS.get(name)
    if option is None:
        return f"expected one of {_allowed_options()}; got {text!r}"
    if option.value is None:
        return f"expected {name} without a value, got {text!r}" if equals else None
    if not option.value.fullmatch(value):
        return f"expected {name}={option.says}, got {text!r}"
    return None


# ---------------------------------------------------------------- the chroots of this worker


def _backends() -> list[str]:
    wanted = [word.strip() for word in os.environ.get(BACKENDS_VARIABLE, "unshare").split(",")]
    if not set(wanted) <= set(BACKENDS):
        raise SettingsError(f"expected {BACKENDS_VARIABLE} to be a list of {', '.join(BACKENDS)}, got {wanted}")
    return wanted


def _chroots() -> dict[str, tuple[str, str]]:
    """Find what builds can run in here: `<suite>-<architecture>` to the backend and the name that sbuild wants."""
    finders = {"unshare": _unshare_chroots, "schroot": _schroot_chroots}
    found: dict[str, tuple[str, str]] = {}
    for backend in _backends():
        for chroot, name in finders[backend]():
            found.setdefault(chroot, (backend, name))
    return found


def _unshare_chroots() -> Iterator[tuple[str, str]]:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(cache) / "sbuild"
    if not directory.is_dir() or not _can_unshare():
        return
    # As sbuild prefers them: those that end in -sbuild first.
    for path in sorted(directory.iterdir(), key=lambda path: ("-sbuild." not in path.name, path.name)):
        match = _TARBALL.fullmatch(path.name)
        if match and _looks_whole(path, match["ending"]):
            yield match["chroot"], str(path.resolve())


def _looks_whole(path: Path, ending: str) -> bool:
    if not path.is_file() or path.stat().st_size < SMALLEST_CHROOT or not os.access(path, os.R_OK):
        return False
    offset, magic = _MAGIC[ending.removeprefix("tar.")]
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(len(magic)) != magic:
            return False
        if ending != "tar":
            return True
        file.seek(-1024, os.SEEK_END)
        return not any(file.read())  # a whole tar file ends in zeros


def _can_unshare() -> bool:
    flags = ("--user", "--map-root-user", "--map-auto", "--mount", "--pid", "--fork")
    # Where namespaces are not allowed, --map-auto would leave a helper behind that waits for ever.
    return all(_ask("unshare", *given, "true") is not None for given in (("--user",), flags))


def _schroot_chroots() -> Iterator[tuple[str, str]]:
    for line in (_ask("schroot", "--list") or "").splitlines():
        name = line.strip().removeprefix("chroot:")
        if _NAME.fullmatch(name):  # "source:" ones are to be changed, not to be built in
            yield name.removesuffix("-sbuild"), name


def _ask(*command: str) -> str | None:
    """Return what a quick command says, None if it cannot or will not."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=PROBE_SECONDS,
            env={**os.environ, "LC_ALL": "C.UTF-8", "PATH": f"{os.environ.get('PATH', '')}:{PATH}"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


# ---------------------------------------------------------------- what sbuild prints


class SbuildOutput:
    """Read sbuild's log as it comes: stages, the last summary, the last line that names a cause.

    The build itself can print the same boxes. So a stage is only a hint, and the last summary counts: sbuild writes its
    own after the build is over.
    """

    _LONGEST_LINE: Final = 400  # characters; boxes have 80, and no output may fill the memory
    _EDGE: Final = re.compile(r"\+-{70,}\+")
    _RULE: Final = re.compile(r"-{70,}")
    # From 0.88 on the box has a date too.
    _TITLE: Final = re.compile(r"\| (?P<title>\S.*?)(?:\s{2,}\w{3}, \d\d \w{3} \d{4} [\d:]{8} [+-]\d{4})?\s*\|")
    _FIELD: Final = re.compile(r"(?P<key>[A-Z][A-Za-z-]*(?: [A-Z][a-z]*)?): (?P<value>.*)")

    def __init__(self) -> None:
        self.stage: str | None = None
        self.summary: dict[str, str] = {}
        self.cause: str | None = None
        self._partial = ""
        self._previous = ""
        self._in_summary = False

    def feed(self, text: str) -> None:
        """Take what sbuild printed next, in pieces of any size."""
        *lines, partial = (self._partial + text).split("\n")
        for line in lines:
            self._line(line.rstrip()[: self._LONGEST_LINE])
        self._partial = partial[: self._LONGEST_LINE]

    def _line(self, line: str) -> None:
        if self._EDGE.fullmatch(self._previous) and (match := self._TITLE.fullmatch(line)):
            self.stage = match["title"]
            self._in_summary = self.stage == "Summary"
            if self._in_summary:
                self.summary = {}
        elif self._in_summary and self._RULE.fullmatch(line):
            self._in_summary = False
        elif self._in_summary and (match := self._FIELD.fullmatch(line)):
            self.summary[match["key"]] = match["value"]
        elif line.startswith("E: "):
            self.cause = line
        self._previous = line


class _SbuildContext:
    """The task's context, with sbuild's own stages shown as progress while its log goes by."""

    def __init__(self, context: TaskContext, output: SbuildOutput) -> None:
        self.work_directory = context.work_directory
        self._context = context
        self._output = output

    def write_log(self, text: str) -> None:
        before = self._output.stage
        self._output.feed(text)
        self._context.write_log(text)
        if self._output.stage != before:
            self.report_progress(stage=self._output.stage)

    def settle_log(self) -> None:
        self._context.settle_log()

    def report_progress(self, stage: str | None = None, fraction: float | None = None) -> None:
        self._context.report_progress(stage=stage, fraction=fraction)

    def fetch_artifact(self, artifact_id: int, destination: Path) -> RecordedArtifact:
        return self._context.fetch_artifact(artifact_id, destination)

    def upload_artifact(
        self,
        *,
        category: str,
        name: str,
        data: dict[str, Any],
        files: Mapping[str, Path],
        relations: Sequence[Relation] = (),
    ) -> str:
        return self._context.upload_artifact(category=category, name=name, data=data, files=files, relations=relations)


# ---------------------------------------------------------------- the task


class Sbuild(SbuildValidatorMixin, TaskRunCommandMixin, FetchExecUploadMixin, Task):
    """Build a Debian source package with sbuild."""

    TASK_VERSION = 1
    LEASE = 900.0  # a build of hours may go on while the scheduler is away for a quarter of an hour
    TERMINATE_GRACE = 15.0  # sbuild needs up to 5 s to take its chroot down
    INPUT_ARTIFACT_CATEGORY = "debian:source-package"

    TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "input": {
                "type": "object",
                "properties": {"source_artifact_id": {"type": "integer"}},
                "required": ["source_artifact_id"],
                "additionalProperties": False,
            },
            "distribution": {"type": "string"},
            "host_architecture": {"type": "string"},
            "build_components": {
                "type": "array",
                "items": {"enum": ["any", "all", "source"]},
                "uniqueItems": True,
            },
            "sbuild_options": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["input", "distribution", "host_architecture"],
        "additionalProperties": False,
    }

    def __init__(self) -> None:
        super().__init__()
        self._output = SbuildOutput()
        self._source: DebianArtifact | None = None
        self._built = False

    # ------------------------------------------------------------ for the scheduler too

    def configure(self, task_data: dict[str, Any]) -> None:
        """Check the data, with every option of sbuild against the allow-list, and fill in the defaults.

        Raises:
            TaskConfigError: the data does not fit; the text lists every error.
        """
        super().configure(task_data)
        self.data = {"build_components": ["any"], "sbuild_options": []} | self.data
        problems = [
            f"$.{key}: expected a name like {example!r} of a-z, 0-9 and .+-, got {self.data[key]!r}"
            for key, example in (("distribution", "trixie"), ("host_architecture", "amd64"))
            if not _NAME.fullmatch(self.data[key])
        ]
        for index, option in enumerate(self.data["sbuild_options"]):
            if problem := _option_problem(option):
                problems.append(f"$.sbuild_options[{index}]: {problem}")
        components = self.data["build_components"]
        if not components:
            problems.append("$.build_components: expected at least one of 'any', 'all', 'source', got []")
        elif components != ["any"] and (given := self._given(_REBUILD_OPTIONS)):
            problems.append(f"$.build_components: expected ['any'] with {given[0]}, got {components!r}")
        if problems:
            raise TaskConfigError(f"task data of {self.name!r}: {'; '.join(problems)}")
        self.data["input"]["source_artifact_id"] = int(
            self.data["input"]["source_artifact_id"]
        )  # 7.0 is an integer too

    def input_artifact_ids(self) -> list[int]:
        """List the one source package."""
        return [self._source_id]

    def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
        """Ask for sbuild, and for the chroot of the distribution and the architecture."""
        if not super().can_run_on(worker_metadata):
            return False
        if not worker_metadata.get(self.prefix_with_task_name("available")):
            return False
        return self._chroot in (worker_metadata.get(self.prefix_with_task_name("chroots")) or ())

    @property
    def _source_id(self) -> int:
        source_id: int = self.data["input"]["source_artifact_id"]
        return source_id

    @property
    def _chroot(self) -> str:
        return f"{self.data['distribution']}-{self.data['host_architecture']}"

    def _given(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if any(text.startswith(f"{name}=") for text in self.data["sbuild_options"])]

    # ------------------------------------------------------------ on the worker

    def analyze_worker(self) -> dict[str, Any]:
        """Look for sbuild, and for the chroots of the backends that the administrator allows."""
        version = _ask("sbuild", "--version")
        match = re.search(r"\(Debian sbuild\) (\S+)", version or "")
        architecture = _ask("dpkg", "--print-architecture")
        found = {
            "available": version is not None and importlib.util.find_spec("debian") is not None,
            "tool_version": match[1] if match else None,
            "chroots": sorted(_chroots()) if version is not None else [],
            "host_architecture": architecture.strip() if architecture else None,
        }
        return super().analyze_worker() | {self.prefix_with_task_name(key): value for key, value in found.items()}

    def attach(self, context: TaskContext) -> None:
        """Take the context, and read along what sbuild prints."""
        super().attach(_SbuildContext(context, self._output))

    def fetch_input(self, destination: Path) -> bool:
        """Fetch the source package."""
        self.world.fetch_artifact(self._source_id, destination)
        return True

    def configure_for_execution(self, download_directory: Path) -> bool:
        """Find the .dsc, and check what it lists.

        Raises:
            ArtifactInvalid: the source package is not what its .dsc says.
        """
        dsc = self.find_file_by_suffix(download_directory, ".dsc")
        if dsc is None:
            self.conclude(f"expected one .dsc in artifact {self._source_id}, got none or several", stage="configure")
            return False
        self._source = read_source_package(dsc)
        return True

    def run(self, execute_directory: Path) -> bool:
        """Run sbuild, and judge how it ended."""
        chroots = _chroots()
        if self._chroot not in chroots:
            self.conclude(
                f"expected a chroot for {self._chroot} on this worker, it has {', '.join(sorted(chroots)) or 'none'}",
                stage="create-session",
                try_again=True,  # nothing is said about the source; another worker may have it
            )
            return False
        dsc = next(path for name, path in self._source_package.files.items() if name.endswith(".dsc"))
        returncode = self.run_cmd(
            self._command(*chroots[self._chroot], dsc), execute_directory, env=self._environment()
        )
        if self.aborted or returncode is None:
            return False
        self._built = self._judge(returncode)
        return self._built

    @property
    def _source_package(self) -> DebianArtifact:
        if self._source is None:
            raise RuntimeError("expected the source package to be configured first")
        return self._source

    def _command(self, backend: str, chroot: str, dsc: Path) -> list[str]:
        components = self.data["build_components"]
        return [
            "sbuild",
            "--verbose",  # else it prints nothing where there is no terminal
            f"--chroot-mode={backend}",  # the default differs between versions
            f"--chroot={chroot}",
            "--no-run-lintian",  # on by default, and it would install lintian into every chroot
            "--no-clean-source",
            "--arch-any" if "any" in components else "--no-arch-any",
            "--arch-all" if "all" in components else "--no-arch-all",
            "--source" if "source" in components else "--no-source",
            f"--arch={self.data['host_architecture']}",
            f"--dist={self.data['distribution']}",
            *([f"--maintainer={MAINTAINER}"] if self._given(_REBUILD_OPTIONS) else []),
            *self.data["sbuild_options"],
            str(dsc.absolute()),
        ]

    def _environment(self) -> dict[str, str]:
        """Make sbuild's own home and temporary directory, and the whole of its environment."""
        work = self.world.work_directory
        if not re.fullmatch(r"[A-Za-z0-9_./+:@=,~ -]+", str(work)):
            raise HostUnfit(f"expected a work directory whose path can stand in a Perl program and a shell, got {work}")
        home = work / "sbuild-home"
        home.mkdir(mode=0o700)
        # sbuild unpacks the chroot here: it goes with the run's directory whatever happens. Its uids must pass through.
        temporary = work / "sbuild-tmp"
        temporary.mkdir()
        temporary.chmod(0o711)
        configuration = home / "sbuild.conf"
        configuration.write_text(
            f"$unshare_tmpdir_template = '{temporary}/chroot.XXXXXXXXXX';\n"
            # The default, dose3, has to be installed into the chroot just when installing does not work.
            "$bd_uninstallable_explainer = 'apt';\n"
            # From 0.87 on sbuild makes a chroot that it lacks. Older ones do not know this variable; in a string of its
            # own the error is theirs alone.
            "eval '$unshare_mmdebstrap_auto_create = 0;';\n"
            "1;\n"
        )
        user = pwd.getpwuid(os.geteuid()).pw_name
        return {
            "HOME": str(home),
            "LC_ALL": "C.UTF-8",
            "LOGNAME": user,
            "PATH": PATH,
            "SBUILD_CONFIG": str(configuration),
            "TMPDIR": str(temporary),
            "USER": user,
        }

    def _judge(self, returncode: int) -> bool:
        """Say how sbuild ended: its exit code alone does not tell (0 is "skipped" too, 1 and 2 are many things)."""
        summary = self._output.summary
        status = summary.get("Status")
        if returncode == 0 and status == "successful":
            return True
        stage, cause = summary.get("Fail-Stage"), self._output.cause
        text = {
            "skipped": "sbuild skipped the build",
            "given-back": "sbuild gave the build back: its build dependencies cannot be installed now",
            "attempted": "the build failed",
        }.get(status or "", "sbuild could not build")
        self.conclude(
            f"{text}{f' (stage {stage})' if stage else ''}: {cause or 'cmd-output.log in the debug logs may say why'}",
            stage=stage,
            exit_code=returncode,
            status=status,
            line=cause,
            # What went wrong before the source was touched says nothing about the source.
            try_again=status == "given-back" or stage == "create-session",
        )
        return False

    def check_directory_for_consistency_errors(self, build_directory: Path) -> list[str]:
        """Check what .changes and .dsc list; a build that went well has a .changes."""
        if self._built and not any(build_directory.glob("*.changes")):
            return ["expected a .changes from a successful build, got none"]
        return super().check_directory_for_consistency_errors(build_directory)

    def upload_artifacts(self, execute_directory: Path, *, execution_success: bool) -> None:
        """Upload the log whatever happened, and after a success what was built."""
        built_using = [Relation(type="built-using", target=self._source_id)]
        binaries: dict[str, str] = {}  # a .deb to the artifact that it is
        if execution_success:
            uploads = [read_upload(path) for path in sorted(execute_directory.glob("*.changes"))]
            files = {name: path for upload in uploads for name, path in upload.files.items()}
            packages = [
                read_binary_package(path) for name, path in sorted(files.items()) if name.endswith((".deb", ".udeb"))
            ]
            for package in packages:
                binaries |= dict.fromkeys(package.files, self._upload_debian(package, built_using))
            for group in _groups(packages):
                self._upload_debian(group, built_using)
            for upload in uploads:
                held = [handle for name, handle in binaries.items() if name in upload.files]
                extends = [Relation(type="extends", target=handle) for handle in held]
                relates = [Relation(type="relates-to", target=handle) for handle in held]
                self._upload_debian(upload, [*extends, *relates])
        for log in sorted(execute_directory.glob("*.build")):
            if log.is_symlink():  # sbuild's own short name of the same log
                continue
            source = self._source_package.data
            data = {"source": source["name"], "version": source["version"], "filename": log.name}
            targets: list[int | str] = [self._source_id, *binaries.values()]
            self._upload_debian(
                DebianArtifact("debian:package-build-log", log.stem, data, {log.name: log}),
                [Relation(type="relates-to", target=target) for target in targets],
            )

    def _upload_debian(self, artifact: DebianArtifact, relations: Sequence[Relation]) -> str:
        return self.world.upload_artifact(
            category=artifact.category,
            name=artifact.name,
            data=artifact.data,
            files=artifact.files,
            relations=relations,
        )


def _groups(packages: Iterable[DebianArtifact]) -> Iterator[DebianArtifact]:
    """Put together the packages for each architecture: what build_components calls any and all."""
    by_architecture: dict[str, list[DebianArtifact]] = {}
    for package in packages:
        by_architecture.setdefault(package.data["deb_fields"]["Architecture"], []).append(package)
    for architecture, members in sorted(by_architecture.items()):
        first = members[0].data
        data = {
            "srcpkg_name": first["srcpkg_name"],
            "srcpkg_version": first["srcpkg_version"],
            "version": first["deb_fields"]["Version"],
            "architecture": architecture,
            "packages": [member.data["deb_fields"]["Package"] for member in members],
        }
        files = {name: path for member in members for name, path in member.files.items()}
        name = f"{data['srcpkg_name']}_{data['version'].partition(':')[2] or data['version']}_{architecture}"
        yield DebianArtifact("debian:binary-packages", name, data, files)
