import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from mqworker.errors import StateLocked
from mqworker.worker import _little_room, _take_work_directory


def test_a_work_directory_lets_builds_through_and_has_one_worker_of_a_name(tmp_path):
    base = tmp_path / "work"
    directory, lock = _take_work_directory(base, "anna")
    _, other = _take_work_directory(base, "bert")

    assert directory == base / "anna"
    assert all(one.stat().st_mode & 0o711 == 0o711 for one in (base, directory))
    with pytest.raises(StateLocked, match="another worker of the same name"):
        _take_work_directory(base, "anna")
    os.close(lock)
    os.close(_take_work_directory(base, "anna")[1])
    os.close(other)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_work_directory_that_somebody_else_has_made_is_not_used(tmp_path):
    """In /var/tmp anybody may make a directory of a known name first."""
    base = tmp_path / "work"
    base.mkdir()
    os.chown(base, 12345, 12345)
    with pytest.raises(StateLocked, match="uid 12345"):
        _take_work_directory(base, "anna")


def test_what_a_run_has_left_mounted_is_unmounted_and_what_was_bound_there_stays(tmp_path, missing):
    """A directory of the host must not go with the run's."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode != 0:
        missing("user namespaces", "this kernel gives us none")
    host, run = tmp_path / "host", tmp_path / "work" / "run"
    for point in (host, run / "home", run / "deep" / "one"):
        point.mkdir(parents=True)
    (host / "precious").write_text("x")
    code = f"""
        from contextlib import closing
        from pathlib import Path
        from mqworker.state import WorkerState
        from mqworker.worker import _sweep
        with closing(WorkerState(Path({str(tmp_path / "state")!r}))) as state:
            _sweep(state, Path({str(tmp_path / "work")!r}))
    """
    script = (
        'mount --bind "$1" "$2/home" && mount -t tmpfs none "$2/deep" && mkdir "$2/deep/one" && '
        'mount --bind "$1" "$2/deep/one" && exec "$3" -P -c "$4"'
    )
    subprocess.run(
        [*namespace, "sh", "-c", script, "sh", str(host), str(run), sys.executable, textwrap.dedent(code)], check=True
    )

    assert list((tmp_path / "work").iterdir()) == []
    assert (host / "precious").read_text() == "x"


def test_a_file_system_with_too_little_room_is_named_and_0_is_enough_for_all(tmp_path):
    free = shutil.disk_usage(tmp_path).free

    assert _little_room([tmp_path], 1) is None
    assert f"free in {tmp_path}, got" in _little_room([tmp_path], free + 2**40)
    assert _little_room([tmp_path], 0) is None
    assert "expected to ask how much room is in" in _little_room([tmp_path / "missing"], 1)
