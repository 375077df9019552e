"""The demo as a newcomer runs it: what it shows, and that it leaves nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytestmark = pytest.mark.live


def demo(directory: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MQWORKER_")}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "mqworker", "demo", "--directory", str(directory), *arguments],
        env={**inherited, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def leaves_nothing(eventually):
    """Assert that nothing of a demo is left: no directory, no process that worked in one."""

    def scratch() -> set[Path]:
        return set(Path("/var/tmp").glob("mqworker-demo-*"))  # noqa: S108  # where the demo works

    def processes() -> list[Path]:
        entries = (entry for entry in Path("/proc").iterdir() if entry.name.isdecimal())
        return [entry for entry in entries if b"mqworker-demo-" in _environment(entry)]

    before = scratch()
    yield
    # Somebody else's demo ends some time; what ours has left does not.
    eventually(lambda: scratch() <= before and not processes(), "nothing of a demo is left")


def _environment(entry: Path) -> bytes:
    try:
        return (entry / "environ").read_bytes()
    except OSError:
        return b""


@pytest.mark.usefixtures("leaves_nothing")
def test_without_a_build_the_noops_run_and_it_ends_well(tmp_path):
    process = demo(tmp_path / "out", "--no-build")
    output, _ = process.communicate(timeout=120)

    assert process.returncode == 0, output
    assert output.count("success") >= 40  # twenty events, twenty lines of the table
    assert "Traceback" not in output


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_the_middle_takes_everything_down(tmp_path, number):
    process = demo(tmp_path / "out", "--no-build")
    seen = []
    for line in process.stdout:
        seen.append(line)
        if " noop " in line:
            break
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)

    assert process.returncode == 128 + number, "".join(seen) + rest
    assert "Traceback" not in rest


@pytest.mark.usefixtures("leaves_nothing")
def test_where_nothing_can_be_built_one_line_says_why_and_the_noops_run(tmp_path, amqp_url):
    """Mmdebstrap fails, and there is no chroot yet."""
    programs = tmp_path / "bin"
    programs.mkdir()
    fake = programs / "mmdebstrap"
    fake.write_text("#!/bin/sh\necho 'E: no archive today' >&2\nexit 25\n")
    fake.chmod(0o755)
    process = demo(
        tmp_path / "out",
        PATH=f"{programs}:{os.environ['PATH']}",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        MQWORKER_AMQP_URL=amqp_url,
    )
    output, _ = process.communicate(timeout=120)

    assert process.returncode == 3, output
    assert output.count("no archive today") == 1
    assert output.count("success") >= 40
    assert not list((tmp_path / "cache").rglob("*.tar"))


@pytest.mark.usefixtures("leaves_nothing")
def test_a_named_broker_is_used_and_left_as_it_was(tmp_path, own_amqp_url, prefix, manage):
    def there() -> list[set[str]]:
        return [{one["name"] for one in manage("GET", f"{kind}/{prefix}")} for kind in ("queues", "exchanges")]

    before = there()
    process = demo(tmp_path / "out", "--no-build", MQWORKER_AMQP_URL=own_amqp_url)
    output, _ = process.communicate(timeout=120)

    assert process.returncode == 0, output
    assert "uses the broker" in output
    assert urlsplit(own_amqp_url).password not in output, "the password is not shown"
    assert there() == before
