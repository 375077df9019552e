"""Real builds by sbuild, through a real broker."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mqworker import debianhost, processes
from mqworker.messages import LogText
from tasks.debian import read_source_package

pytestmark = [pytest.mark.live, pytest.mark.debian]


@pytest.fixture
def work(pool) -> Iterator[Path]:
    """Let builds unpack their chroots in memory: it saves seconds."""
    directory = Path(tempfile.mkdtemp(prefix="mqworker-test-", dir="/dev/shm"))  # mkdtemp makes it safe
    directory.chmod(0o711)
    pool.environment["MQWORKER_WORKER_WORK_DIR"] = str(directory)
    yield directory
    pool.close()
    processes.remove_tree(directory)


@pytest.fixture
def build(chroot, tmp_path, work):  # noqa: ARG001  # work: the worker must know of it before it starts
    """Import a variant of the sample source and submit its build."""

    def submit(client, variant, **data) -> str:
        source = read_source_package(debianhost.write_sample_source(tmp_path / variant, variant))
        artifact = client.import_artifact(source.category, source.name, source.data, source.files)
        request = {
            "input": {"source_artifact_id": artifact.id},
            "sbuild_options": ["--no-apt-update", "--bd-uninstallable-explainer=none"],
            **chroot,
        }
        return client.submit("sbuild", {**request, **data}, max_attempts=2)

    return submit


def builds_of(work: Path) -> list[Path]:
    """List the directories of runs that are there."""
    return [entry for entry in work.glob("*/*") if entry.name != "lock"]


def test_a_build_comes_back_as_artifacts_or_with_its_reason(pool, build, work, final, eventually):
    """Success, failure with its log, a dependency that nobody has, a suite that nobody has."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna", slots=2)
        good = build(client, "ok", build_components=["any", "all"])
        bad = build(client, "fail")
        lacking = build(client, "missing")
        nowhere = build(client, "skip", distribution="no-such-suite")
        built, failed, given_back = final(client, good, bad, lacking)

        assert built.state == "success"
        made = {artifact.category: artifact for artifact in built.artifacts}
        assert {
            "debian:binary-package",
            "debian:binary-packages",
            "debian:upload",
            "debian:package-build-log",
            "mqworker:debug-logs",
        } == set(made)
        paths = client.fetch_artifact(made["debian:upload"].id, pool.directory / "upload")
        assert {".deb", ".changes", ".buildinfo"} == {path.suffix for path in paths}
        assert any(relation.type == "built-using" for relation in made["debian:binary-package"].relations)

        assert failed.state == "failure"
        assert (failed.reason.exit_code, failed.reason.status, failed.reason.stage) == (2, "attempted", "build")
        assert "debian:package-build-log" in {artifact.category for artifact in failed.artifacts}
        assert len(failed.attempts) == 1, "a verdict is not tried again"

        assert given_back.state == "failure"
        assert given_back.reason.status == "given-back"
        assert len(given_back.attempts) == 2, "given back means: try again"
        assert "none is left" in given_back.reason.text

        waiting = client.status(nowhere)
        assert (waiting.state, waiting.waits) == ("pending", "no worker can run it")
        eventually(lambda: not builds_of(work), "nothing of the runs is left on disk")


def await_silence(following) -> None:
    """Follow a build until it says nothing more: then only a signal ends it."""
    for item in following:
        if isinstance(item, LogText) and "sample: silent now" in item.text:
            return


def test_abort_of_a_running_build_leaves_no_process_and_no_chroot(pool, build, work, final, eventually):
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        following = client.follow_logs()
        one = build(client, "silent")
        await_silence(following)
        eventually(lambda: processes.inside(work), "processes of the build live in its chroot")
        client.abort([one], "not needed any more")
        [view] = final(client, one)

        assert view.state == "aborted"
        assert not processes.inside(work)
        slots = processes.descendants(pool.processes["anna"].pid)
        ours = (b"mqworker.slot", b"watchdog.main()")
        words = [Path(f"/proc/{slot.pid}/cmdline").read_bytes() for slot in slots]
        assert all(any(name in line for name in ours) for line in words)
        eventually(lambda: not builds_of(work), "the chroot is gone")


def test_a_killed_worker_leaves_nothing_that_its_successor_does_not_end(pool, build, work, eventually):
    """Agent and slot are both killed in the middle of a build: nobody is there to end it but the next agent."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        following = client.follow_logs()
        build(client, "silent")
        await_silence(following)
        eventually(lambda: processes.inside(work), "processes of the build live in its chroot")
        agent = pool.processes.pop("anna")
        [slot] = [
            process.pid
            for process in processes.descendants(agent.pid)
            if b"mqworker.slot" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        ]
        os.kill(agent.pid, 19)
        os.kill(slot, 9)
        agent.kill()
        agent.wait()
        assert processes.inside(work)
        pool.worker("anna")

        eventually(lambda: not processes.inside(work), "nothing of the build lives")
        eventually(lambda: not builds_of(work), "its chroot is gone")
