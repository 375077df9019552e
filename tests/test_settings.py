"""Settings: which source wins, and what a wrong value says."""

import os
import socket
from pathlib import Path

import pytest

from mqworker import settings as rooms
from mqworker.errors import SettingsError
from mqworker.messages import Limits
from mqworker.settings import KEYS, load, variable


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_without_any_source_the_defaults_stand():
    loaded = load({}, {})

    assert loaded.settings.amqp_url == "amqp://guest:guest@127.0.0.1:5672/"
    assert loaded.settings.prefix == "mqworker"
    assert loaded.settings.worker.name == socket.gethostname()
    assert loaded.settings.worker.slots == os.cpu_count()
    assert loaded.settings.worker.work_dir == Path(f"/var/tmp/mqworker-{os.geteuid()}")  # noqa: S108  # only named
    assert loaded.settings.worker.drain_grace == 60.0
    assert loaded.settings.scheduler.metrics_listen == "127.0.0.1:9107"
    assert loaded.sources == {}
    assert loaded.config is None


def test_root_and_users_have_different_default_places(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert load({}, {}).settings.store == "file:///var/lib/mqworker/store"
    assert load({}, {}).settings.ledger == "sqlite:////var/lib/mqworker/ledger.db"

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert load({}, {}).settings.store == f"file://{tmp_path}/home/.local/share/mqworker/store"
    assert load({}, {}).settings.ledger == f"sqlite:///{tmp_path}/home/.local/share/mqworker/ledger.db"
    assert load({}, {}).settings.worker.work_dir == Path("/var/tmp/mqworker-1000")  # noqa: S108  # only named


def test_a_flag_beats_a_variable_which_beats_the_file_which_beats_the_default(tmp_path):
    config = write(tmp_path / "a.toml", 'prefix = "file"\n[worker]\nslots = 3\nname = "file"\n')
    environ = {"MQWORKER_PREFIX": "environ", "MQWORKER_WORKER_SLOTS": "5"}

    loaded = load({"prefix": "flag", "worker.slots": None}, environ, config=config)

    assert loaded.settings.prefix == "flag"
    assert loaded.settings.worker.slots == 5
    assert loaded.settings.worker.name == "file"
    assert loaded.settings.timeout == 30.0
    assert loaded.sources == {
        "prefix": "--prefix",
        "worker.slots": "MQWORKER_WORKER_SLOTS",
        "worker.name": str(config),
    }


def test_the_first_settings_file_that_exists_is_the_only_one_read(tmp_path):
    home = write(tmp_path / "home" / ".config" / "mqworker.toml", 'prefix = "home"\n')
    assert load({}, {}).config == home

    write(tmp_path / "mqworker.toml", 'ledger = "sqlite:////here.db"\n')
    assert load({}, {}).config == Path("mqworker.toml")
    assert load({}, {}).settings.prefix == "mqworker"

    named = write(tmp_path / "named.toml", 'prefix = "named"\n')
    assert load({}, {"MQWORKER_CONFIG": str(named)}).settings.prefix == "named"

    flagged = write(tmp_path / "flagged.toml", 'prefix = "flagged"\n')
    assert load({}, {"MQWORKER_CONFIG": str(named)}, config=flagged).settings.prefix == "flagged"


def test_a_named_settings_file_must_exist(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere\.toml: No such file"):
        load({}, {}, config=tmp_path / "nowhere.toml")


def test_a_file_that_is_no_toml_is_named(tmp_path):
    config = write(tmp_path / "a.toml", "prefix = \n")

    with pytest.raises(SettingsError, match=r"expected TOML in .*a\.toml"):
        load({}, {}, config=config)


@pytest.mark.parametrize(
    ("text", "key", "guess"),
    [
        ('amqpurl = "amqp://x"', "amqpurl", "amqp_url"),
        ("[worker]\nslot = 3", "worker.slot", "worker.slots"),
        ("slots = 3", "slots", "worker.slots"),
        ("[schedular]\nretry_delay = 3", "schedular", "scheduler"),
    ],
)
def test_an_unknown_key_is_an_error_with_a_guess(tmp_path, text, key, guess):
    config = write(tmp_path / "a.toml", text)

    with pytest.raises(SettingsError) as caught:
        load({}, {}, config=config)

    assert f"unknown setting {key!r} in {config}" in str(caught.value)
    assert f"did you mean {guess!r}?" in str(caught.value)


def test_an_unknown_variable_is_an_error_only_if_it_looks_like_a_slip():
    with pytest.raises(SettingsError, match="MQWORKER_AMQP_URI in the environment; did you mean MQWORKER_AMQP_URL"):
        load({}, {"MQWORKER_AMQP_URI": "amqp://x"})

    kubernetes = {"MQWORKER_PORT": "tcp://10.0.0.1:9107", "MQWORKER_SERVICE_HOST": "10.0.0.1"}
    assert load({}, {**kubernetes, "MQWORKER_DEBUG": "1", "MQWORKER_TEST_REQUIRE": "all"}).sources == {}


@pytest.mark.parametrize(
    ("flags", "environ", "text", "said"),
    [
        ({"worker.slots": 0}, {}, "", r"worker\.slots \(from --slots\).*>= 1.*got 0"),
        ({}, {"MQWORKER_WORKER_SLOTS": "many"}, "", r"worker\.slots \(from MQWORKER_WORKER_SLOTS\).*got 'many'"),
        ({}, {}, 'worker.slots = "2"', r"worker\.slots \(from .*a\.toml\).*got '2'"),
        ({}, {"MQWORKER_LOG_LEVEL": "loud"}, "", r"log_level \(from MQWORKER_LOG_LEVEL\).*got 'loud'"),
        ({"worker.name": "a name"}, {}, "", r"worker\.name \(from --name\).*got 'a name'"),
        ({"scheduler.metrics_listen": "9107"}, {}, "", r"scheduler\.metrics_listen \(from --metrics-listen\)"),
        ({}, {"MQWORKER_WORKER_METADATA": "{"}, "", r"JSON object for worker\.metadata \(from MQWORKER_WORKER_META"),
        ({}, {}, "worker = 3", r"expected a table \[worker\] in .*a\.toml, got 3"),
        ({"scheduler.no_worker_after": 0}, {}, "", r"scheduler\.no_worker_after \(from --no-worker-after\).*> 0"),
        (
            {},
            {"MQWORKER_SCHEDULER_GROUP_WEIGHTS": "a=2"},
            "",
            r"JSON object for scheduler\.group_weights \(from MQWORKER_SCHEDULER_GROUP_WEIGHTS\)",
        ),
        ({}, {"MQWORKER_SCHEDULER_GROUP_WEIGHTS": "[2]"}, "", r"scheduler\.group_weights \(from .*got \[2\]"),
        ({}, {}, "scheduler.group_weights = {a = 1, b = 0, c = 2}", r"scheduler\.group_weights \(from .*got {'b': 0}"),
        ({}, {}, "scheduler.group_weights = {a = nan}", r"scheduler\.group_weights \(from .*got {'a': nan}"),
        ({}, {}, "scheduler.group_weights = {a = inf}", r"scheduler\.group_weights \(from .*got {'a': inf}"),
        ({}, {}, 'scheduler.group_weights = {"*" = 2}', r"scheduler\.group_weights \(from .*got {'\*': 2}"),
        ({}, {}, "scheduler.concurrency_limits = {a = 0}", r"scheduler\.concurrency_limits \(from .*>= 1.*{'a': 0}"),
        ({}, {}, "scheduler.concurrency_limits = {a = 1.5}", r"scheduler\.concurrency_limits \(from .*{'a': 1\.5}"),
        ({}, {}, 'scheduler.concurrency_limits = {"a b" = 1}', r"scheduler\.concurrency_limits \(from .*{'a b': 1}"),
        ({"worker.allow_tasks": [1]}, {}, "", r"worker\.allow_tasks \(from --allow-task\)"),
        ({}, {}, 'worker.deny_tasks = "noop"', r"worker\.deny_tasks \(from .*a\.toml\).*got 'noop'"),
    ],
)
def test_a_wrong_value_names_its_key_its_source_and_itself(tmp_path, flags, environ, text, said):
    config = write(tmp_path / "a.toml", text)

    with pytest.raises(SettingsError, match=said):
        load(flags, environ, config=config)


@pytest.mark.parametrize("key", ["AMQP_URL", "LEDGER", "STORE"])
def test_a_wrong_url_is_not_shown_with_its_password(key):
    with pytest.raises(SettingsError) as caught:
        load({}, {f"MQWORKER_{key}": "//me:secret@host"})

    assert f"{key.lower()} (from MQWORKER_{key})" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_odd_host_name_still_makes_a_worker_name(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "-odd host!.lan-")

    assert load({}, {}).settings.worker.name == "odd-host-.lan"


def test_tags_and_metadata_come_from_text_and_from_tables(tmp_path):
    config = write(tmp_path / "a.toml", '[worker]\ntags = ["big", "ssd"]\n[worker.metadata]\n"site:rack" = 4\n')

    assert load({}, {}, config=config).settings.worker.static_metadata() == {
        "site:rack": 4,
        "system:tags": ["big", "ssd"],
    }
    environ = {"MQWORKER_WORKER_TAGS": "small, hdd", "MQWORKER_WORKER_METADATA": '{"site:rack": 5}'}
    assert load({}, environ, config=config).settings.worker.static_metadata() == {
        "site:rack": 5,
        "system:tags": ["small", "hdd"],
    }


def test_weights_and_limits_come_from_tables_and_from_json(tmp_path):
    text = '[scheduler.group_weights]\nrelease = 3\n[scheduler.concurrency_limits]\n"*" = 4\nmirror = 2\n'
    config = write(tmp_path / "a.toml", text)

    given = load({}, {}, config=config).settings.scheduler
    assert given.group_weights == {"release": 3.0}
    assert given.concurrency_limits == {"*": 4, "mirror": 2}
    environ = {
        "MQWORKER_SCHEDULER_GROUP_WEIGHTS": '{"night": 0.5}',
        "MQWORKER_SCHEDULER_CONCURRENCY_LIMITS": '{"disk": 7}',
    }
    given = load({}, environ, config=config).settings.scheduler
    assert given.group_weights == {"night": 0.5}
    assert given.concurrency_limits == {"disk": 7}


def test_limits_of_a_worker_come_from_their_table_and_from_variables_and_are_checked(tmp_path):
    text = "[worker]\nmin_free_disk = 0\n[worker.limits]\nmemory = 1073741824\ncpus = 1.5\n"
    config = write(tmp_path / "a.toml", text)
    given = load({}, {"MQWORKER_WORKER_LIMITS_CPUS": "2", "MQWORKER_WORKER_LIMITS_PROCESSES": "9"}, config=config)

    assert given.settings.worker.limits == Limits(memory=2**30, cpus=2.0, processes=9)
    assert given.settings.worker.min_free_disk == 0
    assert load({}, {}).settings.worker.limits == Limits()
    assert load({}, {}).settings.worker.min_free_disk == 2**30
    with pytest.raises(SettingsError, match=r"worker\.limits\.memory \(from .*a\.toml\): .*got 5"):
        load({}, {}, config=write(tmp_path / "a.toml", "[worker.limits]\nmemory = 5\n"))
    with pytest.raises(SettingsError, match=r"unknown setting 'worker\.limits\.memry'.*did you mean"):
        load({}, {}, config=write(tmp_path / "a.toml", "[worker.limits]\nmemry = 5\n"))


def test_without_settings_groups_are_equal_keys_have_no_limit_of_their_own_and_every_task_is_allowed():
    settings = load({}, {}).settings

    assert (settings.scheduler.group_weights, settings.scheduler.concurrency_limits) == ({}, {})
    assert settings.scheduler.no_worker_after == 300.0
    assert (settings.worker.allow_tasks, settings.worker.deny_tasks) == ([], [])


def test_lists_of_tasks_come_from_flags_from_text_and_from_the_file(tmp_path):
    config = write(tmp_path / "a.toml", '[worker]\nallow_tasks = ["a"]\ndeny_tasks = ["b"]\n')
    environ = {"MQWORKER_WORKER_ALLOW_TASKS": "c, d"}

    loaded = load({"worker.deny_tasks": ["e"]}, environ, config=config)
    assert (loaded.settings.worker.allow_tasks, loaded.settings.worker.deny_tasks) == (["c", "d"], ["e"])
    assert loaded.sources["worker.deny_tasks"] == "--deny-task"
    assert load({}, {}, config=config).settings.worker.deny_tasks == ["b"]


def test_two_workers_on_one_host_get_two_state_directories():
    one = load({"worker.name": "one"}, {}).settings.worker
    two = load({"worker.name": "two"}, {}).settings.worker

    assert one.state_directory() != two.state_directory()
    assert load({"worker.state_dir": "/srv/w"}, {}).settings.worker.state_directory() == Path("/srv/w")


def test_a_relative_directory_means_the_one_below_here(tmp_path):
    assert load({"worker.work_dir": Path("work")}, {}).settings.worker.work_dir == tmp_path / "work"
    assert load({"worker.work_dir": "~/work"}, {}).settings.worker.work_dir == tmp_path / "home" / "work"


def test_every_key_has_a_variable_of_its_own():
    names = [variable(key) for key in KEYS]

    assert len(set(names)) == len(names)
    assert variable("worker.metrics_listen") == "MQWORKER_WORKER_METRICS_LISTEN"
    assert not set(names) & set(rooms.FOREIGN_VARIABLES)
