import os

import pytest

from mqworker.errors import StateLocked
from mqworker.worker import _take_work_directory


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
