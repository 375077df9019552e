import copy
import io
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mqworker import debianhost, processes
from mqworker.errors import HostUnfit, SettingsError
from mqworker.messages import Artifact, FileEntry, RecordedArtifact, Relation
from tasks import Task, TaskConfigError
from tasks.debian import read_source_package
from tasks.sbuild import OPTIONS, Sbuild, SbuildOutput

SOURCE_ID = 17
REQUEST = {"input": {"source_artifact_id": SOURCE_ID}, "distribution": "bookworm", "host_architecture": "amd64"}


def configured(**data) -> Sbuild:
    task = Sbuild()
    task.configure(REQUEST | data)
    return task


# ---------------------------------------------------------------- task data


def test_sbuild_is_registered_with_the_schema_that_the_document_gives():
    assert Task.class_from_name("Sbuild") is Sbuild
    assert Sbuild.TASK_VERSION == 1
    assert Sbuild.TASK_DATA_SCHEMA == {
        "additionalProperties": False,
        "properties": {
            "build_components": {"items": {"enum": ["any", "all", "source"]}, "type": "array", "uniqueItems": True},
            "distribution": {"type": "string"},
            "host_architecture": {"type": "string"},
            "input": {
                "additionalProperties": False,
                "properties": {"source_artifact_id": {"type": "integer"}},
                "required": ["source_artifact_id"],
                "type": "object",
            },
            "sbuild_options": {"items": {"type": "string"}, "type": "array"},
        },
        "required": ["input", "distribution", "host_architecture"],
        "type": "object",
    }


def test_what_a_request_leaves_open_is_filled_in_and_its_own_data_left_alone():
    data = copy.deepcopy(REQUEST)
    task = Sbuild()
    task.configure(data)

    assert task.data == REQUEST | {"build_components": ["any"], "sbuild_options": []}
    assert data == REQUEST
    assert task.input_artifact_ids() == [SOURCE_ID]


@pytest.mark.parametrize("name", ["", "Bookworm", "../bookworm", "book worm", "-x", "bookworm\n", "bookworm;id"])
@pytest.mark.parametrize("key", ["distribution", "host_architecture"])
def test_suite_and_architecture_are_plain_names(key, name):
    with pytest.raises(TaskConfigError, match=rf"\$\.{key}"):
        configured(**{key: name})


def test_every_wrong_value_is_told_at_once():
    with pytest.raises(TaskConfigError) as caught:
        configured(
            distribution="A", host_architecture="B", build_components=[], sbuild_options=["--no-apt-update", "-n"]
        )

    assert re.findall(r"\$\.[a-z_]+(?:\[\d\])?", str(caught.value)) == [
        "$.distribution",
        "$.host_architecture",
        "$.sbuild_options[1]",
        "$.build_components",
    ]


GOOD_OPTIONS = [
    "--profiles=nocheck",
    "--profiles=nocheck,pkg.hello.Stage1",
    "--build-dep-resolver=aspcud",
    "--bd-uninstallable-explainer=none",
    "--resolve-alternatives",
    "--no-resolve-alternatives",
    "--add-depends=libfoo-dev (>= 1.0~rc1), bar:native | baz",
    "--add-conflicts=libfoo-dev",
    "--binNMU=3",
    "--make-binNMU=Rebuild against libfoo 2; it's needed",
    "--append-to-version=+b1~deb12",
    "--force-orig-source",
    "--source-only-changes",
    "--no-apt-update",
    "--debbuildopt=-j4",
]
BAD_OPTIONS = [
    "--profiles=",
    "--profiles=a b",
    "--profiles",
    "--build-dep-resolver=/bin/sh",
    "--bd-uninstallable-explainer=apt\n",
    "--resolve-alternatives=1",
    "--no-resolve-alternatives=",
    "--add-depends=foo\nX-Field: bar",
    "--add-depends=$(id)",
    "--add-conflicts=",
    "--binNMU=-1",
    "--binNMU=12345",
    "--make-binNMU=",
    "--make-binNMU=one\ntwo",
    "--append-to-version=/x",
    "--force-orig-source=yes",
    "--source-only-changes=x",
    "--no-apt-update=no",
    "--debbuildopt=-rfakeroot",
    "--debbuildopt=-j0",
    "--debbuildopt=--hook-init=id",
    # run commands on this host, read its files, write to them, or open its network
    "--pre-build-commands=id",
    "--post-build-commands=id",
    "--post-build-failed-commands=id",
    "--anything-failed-commands=id",
    "--chroot-setup-commands=id",
    "--setup-hook=id",
    "--run-piuparts",
    "--piuparts-root-args=id",
    "--run-autopkgtest",
    "--autopkgtest-root-args=id",
    "--autopkgtest-virt-server=/bin/sh",
    "--chroot-mode=schroot",
    "--chroot=/etc/passwd",
    "--mail-log-to=x; id",
    "--keyid=1",
    "--dpkg-source-opt=-x",
    "--extra-package=/etc",
    "--extra-repository=deb http://127.0.0.1 x main",
    "--extra-repository-key=/etc/shadow",
    "--build-dir=/etc",
    "--stats-dir=/etc",
    "--enable-network",
    "--no-clean-source",
    "--run-lintian",
    # abbreviations, other spellings, single letters, separate words, and what follows the .dsc
    "--pre-b=id",
    "--no-apt-upd",
    "--binnmu=1",
    "-no-apt-update",
    "--profiles nocheck",
    "-j4",
    "-d",
    "sid",
    "--",
    "",
    "/etc",
    "other.dsc",
]


@pytest.mark.parametrize("option", GOOD_OPTIONS)
def test_an_allowed_option_is_passed_as_one_word(option):
    task = configured(sbuild_options=[option])

    assert option in task._command("unshare", "/c.tar", Path("/s/x.dsc"))


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_any_other_option_is_refused_by_name_with_what_is_allowed(option):
    with pytest.raises(TaskConfigError) as caught:
        configured(sbuild_options=[option])

    assert repr(option) in str(caught.value)
    assert "--" in str(caught.value).replace(repr(option), "")


def test_every_option_of_the_table_is_tried_with_good_and_bad_values():
    assert {text.partition("=")[0] for text in GOOD_OPTIONS} == set(OPTIONS)
    assert {text.partition("=")[0] for text in BAD_OPTIONS} >= set(OPTIONS)


@pytest.mark.parametrize("components", [["any", "all"], ["source", "any"], ["all"]])
@pytest.mark.parametrize("option", ["--make-binNMU=Rebuild", "--append-to-version=+b1"])
def test_a_rebuild_is_of_architecture_dependent_packages_only(option, components):
    with pytest.raises(TaskConfigError, match=r"\$\.build_components"):
        configured(sbuild_options=[option], build_components=components)


def test_the_command_line_says_everything_that_differs_between_versions_and_ends_in_the_dsc():
    task = configured(build_components=["all", "source"], sbuild_options=["--no-apt-update"])

    assert task._command("unshare", "/c/bookworm-amd64.tar", Path("/s/x_1.dsc")) == [
        "sbuild",
        "--verbose",
        "--chroot-mode=unshare",
        "--chroot=/c/bookworm-amd64.tar",
        "--no-run-lintian",
        "--no-clean-source",
        "--no-arch-any",
        "--arch-all",
        "--source",
        "--arch=amd64",
        "--dist=bookworm",
        "--no-apt-update",
        "/s/x_1.dsc",
    ]


def test_a_rebuild_is_signed_because_sbuild_insists_on_it():
    command = configured(sbuild_options=["--make-binNMU=Rebuild"])._command("unshare", "/c.tar", Path("/s/x.dsc"))

    assert any(word.startswith("--maintainer=") for word in command)


# ---------------------------------------------------------------- workers


def worker(**changes) -> dict[str, Any]:
    found = {"sbuild:version": 1, "sbuild:available": True, "sbuild:chroots": ["bookworm-amd64", "sid-arm64"]}
    return found | {f"sbuild:{key}": value for key, value in changes.items()}


@pytest.mark.parametrize(
    ("metadata", "can"),
    [
        (worker(), True),
        (worker(version=2), False),
        (worker(available=False), False),
        (worker(chroots=["bookworm-arm64"]), False),
        (worker(chroots=[]), False),
        (worker(chroots=None), False),
        ({}, False),
    ],
)
def test_a_build_goes_where_sbuild_and_the_chroot_are(metadata, can):
    assert configured().can_run_on(metadata) is can


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An own ~/.cache/sbuild, on a machine where user namespaces work."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tasks.sbuild._can_unshare", lambda: True)
    directory = tmp_path / "sbuild"
    directory.mkdir()
    return directory


def tar_of(size: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("x")
        member.size = size
        tar.addfile(member, io.BytesIO(b"x" * size))
    return file.getvalue()


def test_only_whole_tarballs_count_as_chroots(cache):
    whole = tar_of(2_000_000)
    for name, body in {
        "bookworm-amd64-sbuild.tar": whole,
        "bookworm-backports-arm64.tar": whole,
        "sid-amd64-sbuild.tar.zst": b"\x28\xb5\x2f\xfd" + whole,
        "empty-amd64-sbuild.tar": b"",
        "small-amd64-sbuild.tar": tar_of(30_000),
        "cut-amd64-sbuild.tar": whole[:-100_000],
        "other-amd64-sbuild.tar": b"\0" * 2_000_000,
        "wrong-amd64-sbuild.tar.gz": whole,
        "noarch.tar": whole,
        ".new-amd64.tar": whole,
        "bookworm-i386-sbuild.log": whole,
    }.items():
        (cache / name).write_bytes(body)
    (cache / "directory-amd64-sbuild.tar").mkdir()

    assert Sbuild().analyze_worker()["sbuild:chroots"] == ["bookworm-amd64", "bookworm-backports-arm64", "sid-amd64"]


def test_without_user_namespaces_no_tarball_counts(cache, monkeypatch):
    (cache / "bookworm-amd64-sbuild.tar").write_bytes(tar_of(2_000_000))
    monkeypatch.setattr("tasks.sbuild._can_unshare", lambda: False)

    assert Sbuild().analyze_worker()["sbuild:chroots"] == []


def test_schroot_counts_only_where_the_administrator_allows_it(cache, tmp_path, monkeypatch):
    (cache / "bookworm-amd64-sbuild.tar").write_bytes(tar_of(2_000_000))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "schroot").write_text(
        "#!/bin/sh\necho chroot:bookworm-amd64-sbuild\necho chroot:sid-i386\necho source:trixie-amd64-sbuild\n"
    )
    (programs / "schroot").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    default = Sbuild().analyze_worker()["sbuild:chroots"]
    monkeypatch.setenv("MQWORKER_SBUILD_BACKENDS", "unshare, schroot")
    both = Sbuild().analyze_worker()["sbuild:chroots"]
    monkeypatch.setenv("MQWORKER_SBUILD_BACKENDS", "schroot")
    schroot = Sbuild().analyze_worker()["sbuild:chroots"]

    assert default == ["bookworm-amd64"]
    assert both == ["bookworm-amd64", "sid-i386"]
    assert schroot == ["bookworm-amd64", "sid-i386"]


def test_an_unknown_backend_is_told_to_the_administrator(monkeypatch):
    monkeypatch.setenv("MQWORKER_SBUILD_BACKENDS", "sudo")

    with pytest.raises(SettingsError, match="MQWORKER_SBUILD_BACKENDS"):
        Sbuild().analyze_worker()


def test_a_machine_without_sbuild_says_so(cache, monkeypatch, tmp_path):
    (cache / "bookworm-amd64-sbuild.tar").write_bytes(tar_of(2_000_000))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("tasks.sbuild.PATH", str(tmp_path))

    assert Sbuild().analyze_worker() == {
        "sbuild:version": 1,
        "sbuild:available": False,
        "sbuild:tool_version": None,
        "sbuild:chroots": [],
        "sbuild:host_architecture": None,
    }


# ---------------------------------------------------------------- what sbuild prints


def box(title: str) -> str:
    edge = f"+{'-' * 78}+"
    return f"{edge}\n| {title:<76} |\n{edge}\n\n"


def summary(**fields: str) -> str:
    return (
        box("Summary")
        + "".join(f"{key.replace('_', '-')}: {value}\n" for key, value in fields.items())
        + "-" * 80
        + "\n"
    )


@pytest.mark.parametrize("title", ["Build", "Build                Mon, 23 Nov 2026 10:09:58 +0000"])
def test_a_box_is_a_stage_with_or_without_a_date(title):
    output = SbuildOutput()
    output.feed(box(title))

    assert output.stage == "Build"


def test_a_line_between_bars_that_is_in_no_box_is_no_stage():
    output = SbuildOutput()
    output.feed("| Build    |\n+----+\n| Build   |\n")

    assert output.stage is None


def test_the_last_summary_counts_and_not_what_the_build_itself_prints():
    output = SbuildOutput()
    output.feed(summary(Status="successful", Package="forged"))
    output.feed("E: from the build\nStatus: successful\n")
    output.feed(box("Post Build") + "E: Build failure (dpkg-buildpackage died)\n")
    output.feed(summary(Build_Space="10", Fail_Stage="build", Status="attempted"))
    output.feed("Status: successful\n")

    assert output.summary == {"Build-Space": "10", "Fail-Stage": "build", "Status": "attempted"}
    assert output.cause == "E: Build failure (dpkg-buildpackage died)"


def test_output_may_come_in_pieces_of_any_size():
    output = SbuildOutput()
    for character in box("Build") + "E: no\n" + summary(Status="attempted"):
        output.feed(character)

    assert (output.stage, output.cause, output.summary) == ("Summary", "E: no", {"Status": "attempted"})


def test_a_line_without_end_does_not_fill_the_memory():
    output = SbuildOutput()
    for _ in range(1000):
        output.feed("x" * 1000)

    assert len(output._partial) < 1000


# ---------------------------------------------------------------- real builds


@dataclass
class RunContext:
    """What the slot gives, with a directory for a store and a source package to fetch."""

    work_directory: Path
    source: Path
    store: Path
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    log: str = ""
    on_log: Callable[[str], None] = lambda _: None

    def fetch_artifact(self, artifact_id: int, destination: Path) -> RecordedArtifact:
        assert artifact_id == SOURCE_ID
        source = read_source_package(self.source)
        for path in source.files.values():
            shutil.copy(path, destination)
        return RecordedArtifact(id=artifact_id, category=source.category, name=source.name)

    def upload_artifact(self, *, category, name, data, files, relations=()) -> str:
        handle = f"artifact-{len(self.artifacts)}"
        (self.store / handle).mkdir()
        entries = []
        for path, file in files.items():
            shutil.copy(file, self.store / handle / path)
            entries.append(FileEntry(path=path, size=file.stat().st_size, sha256="0" * 64))
        artifact = Artifact(
            handle=handle, category=category, name=name, data=data, files=entries, relations=list(relations)
        )
        # As it goes over the wire: what is no JSON, or no name of a file, is found here.
        self.artifacts[handle] = msgspec.json.decode(msgspec.json.encode(artifact), type=Artifact)
        return handle

    def report_progress(self, stage: str | None = None, fraction: float | None = None) -> None:
        self.stages.append(stage or str(fraction))

    def write_log(self, text: str) -> None:
        self.log += text
        self.on_log(text)

    def settle_log(self):
        """Nothing is printed here."""

    def of(self, category: str) -> list[Artifact]:
        return [artifact for artifact in self.artifacts.values() if artifact.category == category]


@pytest.fixture
def sbuild(chroot, tmp_path):
    """Make a task and its context for a variant of the sample source."""
    memory = Path("/dev/shm")  # noqa: S108  # unpacking a chroot in memory saves seconds
    work = Path(tempfile.mkdtemp(prefix="mqworker-test-", dir=memory if memory.is_dir() else None))
    work.chmod(0o711)
    (tmp_path / "store").mkdir()

    def make(variant: debianhost.SampleVariant = "ok", **data) -> tuple[Sbuild, RunContext]:
        task = Sbuild()
        request = {"input": {"source_artifact_id": SOURCE_ID}, "sbuild_options": ["--no-apt-update"], **chroot}
        task.configure(request | data)
        source = debianhost.write_sample_source(tmp_path / "source", variant)
        context = RunContext(work, source, tmp_path / "store")
        task.attach(context)
        return task, context

    yield make
    processes.remove_tree(work)


@pytest.mark.debian
def test_this_worker_offers_the_chroot_that_it_has(chroot):
    found = Sbuild().analyze_worker()

    assert found["sbuild:available"] is True
    assert re.match(r"\d+\.\d+", found["sbuild:tool_version"])
    assert found["sbuild:host_architecture"] == chroot["host_architecture"]
    assert f"{chroot['distribution']}-{chroot['host_architecture']}" in found["sbuild:chroots"]


@pytest.mark.debian
def test_a_build_becomes_packages_groups_an_upload_and_a_log_that_know_each_other(sbuild, chroot):
    task, context = sbuild("ok", build_components=["any", "all"])

    assert task.execute() is True, context.log

    architecture = chroot["host_architecture"]
    packages = {artifact.data["deb_fields"]["Package"]: artifact for artifact in context.of("debian:binary-package")}
    assert set(packages) == {"mqworker-sample", "mqworker-sample-dbgsym", "mqworker-sample-data"}
    built_using = [Relation(type="built-using", target=SOURCE_ID)]
    assert all(artifact.relations == built_using for artifact in packages.values())
    assert packages["mqworker-sample"].data["srcpkg_name"] == "mqworker-sample"
    assert packages["mqworker-sample"].data["srcpkg_version"] == "1.0"
    assert "control" in packages["mqworker-sample"].data["deb_control_files"]

    groups = {artifact.data["architecture"]: artifact for artifact in context.of("debian:binary-packages")}
    assert groups[architecture].data == {
        "srcpkg_name": "mqworker-sample",
        "srcpkg_version": "1.0",
        "version": "1.0",
        "architecture": architecture,
        "packages": ["mqworker-sample-dbgsym", "mqworker-sample"],
    }
    assert [entry.path for entry in groups["all"].files] == ["mqworker-sample-data_1.0_all.deb"]
    assert groups["all"].relations == built_using

    handles = [artifact.handle for artifact in packages.values()]
    [upload] = context.of("debian:upload")
    assert upload.data["type"] == "dpkg"
    assert upload.data["changes_fields"]["Source"] == "mqworker-sample"
    assert {(relation.type, relation.target) for relation in upload.relations} == {
        (kind, handle) for kind in ("extends", "relates-to") for handle in handles
    }
    assert f"mqworker-sample_1.0_{architecture}.buildinfo" in [entry.path for entry in upload.files]

    [log] = context.of("debian:package-build-log")
    assert log.data == {"source": "mqworker-sample", "version": "1.0", "filename": log.files[0].path}
    assert {(relation.type, relation.target) for relation in log.relations} == {
        ("relates-to", target) for target in (SOURCE_ID, *handles)
    }
    assert "Status: successful" in (context.store / log.handle / log.files[0].path).read_text()

    stages = iter(context.stages)
    assert all(stage in stages for stage in ("fetch", "run", "Build", "Summary", "upload"))  # in this order
    assert task.try_again is False


@pytest.mark.debian
def test_a_failed_build_is_a_failure_with_its_reason_and_keeps_its_log(sbuild):
    task, context = sbuild("fail")

    assert task.execute() is False
    assert (task.reason.stage, task.reason.exit_code, task.reason.status) == ("build", 2, "attempted")
    assert task.reason.line.startswith("E: Build failure")
    assert task.try_again is False
    [log] = context.of("debian:package-build-log")
    assert "fails on purpose" in (context.store / log.handle / log.files[0].path).read_text()
    assert log.relations == [Relation(type="relates-to", target=SOURCE_ID)]
    assert {artifact.category for artifact in context.artifacts.values()} == {
        "debian:package-build-log",
        "mqworker:debug-logs",
    }


@pytest.mark.debian
def test_a_build_dependency_that_nobody_has_is_to_be_tried_again(sbuild):
    task, context = sbuild("missing")

    assert task.execute() is False
    assert (task.reason.stage, task.reason.status) == ("install-deps", "given-back")
    assert task.try_again is True
    assert len(context.of("debian:package-build-log")) == 1


@pytest.mark.debian
def test_a_skipped_build_is_a_failure_though_sbuild_exits_with_0(sbuild):
    task, context = sbuild("skip")

    assert task.execute() is False
    assert (task.reason.exit_code, task.reason.status) == (0, "skipped")
    assert "skipp" in task.reason.text
    assert task.try_again is False
    assert context.of("debian:binary-package") == []


@pytest.mark.debian
def test_a_chroot_that_this_worker_lacks_is_no_verdict_on_the_source(sbuild):
    task, context = sbuild("ok", distribution="a-suite-that-nobody-has")

    assert task.execute() is False
    assert "a-suite-that-nobody-has" in task.reason.text
    assert task.try_again is True
    assert "cmd: sbuild" not in context.log


@pytest.mark.debian
def test_a_broken_chroot_is_no_verdict_on_the_source(sbuild, chroot, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "sbuild").mkdir()
    name = f"{chroot['distribution']}-{chroot['host_architecture']}"
    (tmp_path / "sbuild" / f"{name}.tar").write_bytes(tar_of(2_000_000))
    task, _ = sbuild("ok")

    assert task.execute() is False
    assert task.reason.stage == "create-session"
    assert task.try_again is True


@pytest.mark.debian
@pytest.mark.parametrize("grace", [15.0, 0.0], ids=["asked", "killed"])
def test_an_aborted_silent_build_leaves_no_process_and_no_chroot(sbuild, monkeypatch, grace):
    monkeypatch.setattr(Sbuild, "TERMINATE_GRACE", grace)
    task, context = sbuild("silent")
    before = processes.descendants(os.getpid())
    context.on_log = lambda _: task.abort() if "sample: silent now\n" in context.log else None

    assert task.execute() is False

    assert task.aborted
    assert set(processes.descendants(os.getpid())) <= set(before)
    assert context.of("debian:package-build-log") == []
    unpacked = list((context.work_directory / "sbuild-tmp").iterdir())
    assert unpacked == [] or grace == 0
    processes.remove_tree(context.work_directory)  # as the slot does
    assert not context.work_directory.exists()


@pytest.mark.debian
def test_a_build_of_a_source_that_was_altered_does_not_begin(sbuild):
    task, context = sbuild("ok")
    fetch = context.fetch_artifact

    def altered(artifact_id, destination):
        fetched = fetch(artifact_id, destination)
        tarball = next(destination.glob("*.tar.xz"))
        tarball.write_bytes(tarball.read_bytes()[:-1] + b"!")
        return fetched

    context.fetch_artifact = altered

    with pytest.raises(Exception, match="altered"):
        task.execute()

    assert "cmd: sbuild" not in context.log


@pytest.mark.debian
def test_the_build_sees_neither_the_workers_environment_nor_its_home(sbuild, monkeypatch):
    monkeypatch.setenv("WORKER_SECRET", "s3cr3t")
    task, context = sbuild("ok")
    environment = task._environment()

    assert set(environment) == {"HOME", "LC_ALL", "LOGNAME", "PATH", "SBUILD_CONFIG", "TMPDIR", "USER"}
    assert Path(environment["HOME"]).is_relative_to(context.work_directory)
    assert Path(environment["SBUILD_CONFIG"]).is_relative_to(environment["HOME"])
    assert Path(environment["HOME"]).stat().st_mode & 0o077 == 0


def test_a_work_directory_whose_path_would_be_code_is_refused(tmp_path):
    work = tmp_path / "it's"
    work.mkdir()
    task = configured()
    task.attach(RunContext(work, tmp_path, tmp_path))

    with pytest.raises(HostUnfit, match="Perl"):
        task._environment()
