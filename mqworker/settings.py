"""Settings: flags over MQWORKER_* variables over one TOML file over defaults, as one frozen struct.

Reads files and variables when asked, never at import, and opens nothing. Every error names the key and where its
value came from. Only cli asks it; everybody else gets plain arguments.
"""

import difflib
import os
import re
import socket
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import parse_qsl, unquote

import msgspec
from msgspec import Meta, Struct, field

from mqworker.errors import SettingsError
from mqworker.messages import Limits, Name

PREFIX: Final = "MQWORKER_"
CONFIG_VARIABLE: Final = "MQWORKER_CONFIG"
SECRET_OPTIONS: Final = ("password", "sslpassword", "secret_access_key", "aws_secret_access_key", "token")
TABLES: Final = ("worker", "worker.limits", "scheduler", "access")

# These are read elsewhere: by the command line, by tasks and by the tests.
FOREIGN_VARIABLES: Final = (CONFIG_VARIABLE, "MQWORKER_DEBUG", "MQWORKER_TASK_MODULES")
FOREIGN_BEGINNINGS: Final = ("MQWORKER_TEST_", "MQWORKER_CI_")

Seconds = Annotated[float, Meta(gt=0, le=7 * 86400)]
Grace = Annotated[float, Meta(ge=0, le=7 * 86400)]
Listen = Annotated[str, Meta(pattern=r"^$|^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$")]
Url = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9+.-]*://")]
Prefix = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=50)]
Weight = Annotated[float, Meta(gt=0, le=1_000_000)]
Limit = Annotated[int, Meta(ge=1, le=1_000_000)]
NameOrAny = Annotated[str, Meta(pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*|\*)\Z", max_length=100)]


def _data_home() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/mqworker")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "mqworker"


def _host_name() -> str:
    """Return this host's name as a routing key's word may have it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname()).strip("-._") or "worker"


def _config_home() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")


class SchedulerSettings(Struct, frozen=True, kw_only=True):
    """Keep what only `mqworker scheduler` reads."""

    metrics_listen: Listen = "127.0.0.1:9107"  # host:port; empty: off
    retry_delay: Seconds = 5.0  # before the second attempt; doubles with each
    no_worker_after: Seconds = 300.0  # how long nobody can run a request before an event says so
    pause_after: Annotated[int, Meta(ge=0, le=1000)] = 3  # requests that fail on a worker and not elsewhere; 0: never
    group_weights: dict[Name, Weight] = {}  # of groups' shares; a group that is not named has 1
    concurrency_limits: dict[NameOrAny, Limit] = {}  # by concurrency key; "*": of those not named, else 1


class WorkerSettings(Struct, frozen=True, kw_only=True):
    """Keep what only `mqworker worker` reads."""

    name: Name = field(default_factory=_host_name)
    slots: Annotated[int, Meta(ge=1, le=10000)] = field(default_factory=lambda: os.cpu_count() or 1)
    state_dir: Path | None = None  # None: see `state_directory()`
    work_dir: Path = field(default_factory=lambda: Path(f"/var/tmp/mqworker-{os.geteuid()}"))  # noqa: S108  # builds are too large for /tmp, and the uid keeps users apart
    metrics_listen: Listen = "127.0.0.1:9108"
    metadata_interval: Seconds = 300.0
    drain_grace: Grace = 60.0
    metadata: dict[str, Any] = {}
    tags: list[str] = []
    allow_tasks: list[str] = []  # empty: all
    deny_tasks: list[str] = []  # goes over allow_tasks
    limits: Limits = field(default_factory=Limits)  # of each run; a request may ask for less
    min_free_disk: Annotated[int, Meta(ge=0, le=2**60)] = 1024**3  # bytes; with less it takes no work; 0: off

    def state_directory(self) -> Path:
        """Return where the worker keeps its lock and its spool: by name, so that two on one host do not meet."""
        return self.state_dir or _data_home() / "workers" / self.name

    def static_metadata(self) -> dict[str, Any]:
        """Return what the administrator says of this host, tags included."""
        return {**self.metadata, "system:tags": self.tags} if self.tags else dict(self.metadata)


class AccessSettings(Struct, frozen=True, kw_only=True):
    """Keep who may do what; only `mqworker scheduler` reads it. Users are the broker's."""

    rule: Literal["group", "own", "anyone"] = "group"  # whose requests one may abort, retry and reprioritise
    operators: list[str] = []  # who may do everything; the scheduler's own user is one in any case
    groups: dict[Name, list[str]] = {}  # members, who alone submit into it; a group that is not named is open


class Settings(Struct, frozen=True, kw_only=True):
    """Keep every setting; times are in seconds."""

    amqp_url: Url = "amqp://guest:guest@127.0.0.1:5672/"
    prefix: Prefix = "mqworker"
    store: Url = field(default_factory=lambda: f"file://{_data_home() / 'store'}")
    ledger: Url = field(default_factory=lambda: f"sqlite:///{_data_home() / 'ledger.db'}")
    timeout: Seconds = 30.0  # how long a command waits for an answer
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    access: AccessSettings = field(default_factory=AccessSettings)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Hold the settings, and where each value that is no default came from."""

    settings: Settings
    sources: Mapping[str, str]  # key ("worker.slots") to source ("MQWORKER_WORKER_SLOTS", "--slots", a file's path)
    config: Path | None


def _leaves(struct: type[Struct], table: str = "") -> Iterator[tuple[str, Any]]:
    for item in msgspec.structs.fields(struct):
        key = f"{table}{item.name}"
        if isinstance(item.type, type) and issubclass(item.type, Struct):
            yield from _leaves(item.type, f"{key}.")
        else:
            yield key, item.type


KEYS: Final[Mapping[str, Any]] = dict(_leaves(Settings))
# The keys of these are the administrator's own; as variables they are JSON.
FREE_TABLES: Final = frozenset(
    {"worker.metadata", "scheduler.group_weights", "scheduler.concurrency_limits", "access.groups"}
)
# As variables, with commas.
LISTS: Final = frozenset({"worker.tags", "worker.allow_tasks", "worker.deny_tasks", "access.operators"})


URLS: Final = ("amqp_url", "ledger", "store")  # they may hold passwords: each may be given as the file that it is in
URL_FILES: Final = {f"{key}_file": key for key in URLS}


def variable(key: str) -> str:
    """Return the environment variable of a key: worker.slots is MQWORKER_WORKER_SLOTS."""
    return PREFIX + key.replace(".", "_").upper()


def load(flags: Mapping[str, Any], environ: Mapping[str, str], *, config: Path | None = None) -> Loaded:
    """Join flags, variables, a file and defaults.

    `flags` maps keys to values; None means not given.

    Raises:
        SettingsError: a value is unknown, unreadable or out of range; the text names its key and its source.
    """
    path = _find_config(config, environ)
    found: dict[str, tuple[Any, str]] = {}
    if path is not None:
        found |= _with_files({key: (value, str(path)) for key, value in _read_file(path)})
    found |= _with_files({key: (value, name) for key, name, value in _read_environ(environ)})
    found |= {key: (value, _flag(key)) for key, value in flags.items() if value is not None}
    values = {key: _convert(key, value, source) for key, (value, source) in found.items()}
    settings = Settings(
        **{key: value for key, value in values.items() if "." not in key},
        worker=WorkerSettings(**_table("worker", values), limits=Limits(**_table("worker.limits", values))),
        scheduler=SchedulerSettings(**_table("scheduler", values)),
        access=AccessSettings(**_table("access", values)),
    )
    return Loaded(settings=settings, sources={key: source for key, (_, source) in found.items()}, config=path)


def _with_files(found: dict[str, tuple[Any, str]]) -> dict[str, tuple[Any, str]]:
    """Put what stands in a file in the place of its name."""
    for key, meant in URL_FILES.items():
        if key not in found:
            continue
        name, source = found.pop(key)
        if meant in found:
            raise SettingsError(f"expected {meant} or {key}, got both (from {found[meant][1]} and {source})")
        try:
            text = Path(str(name)).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise SettingsError(
                f"expected a readable file with a URL at {name} ({key}, from {source}): {why}"
            ) from error
        found[meant] = text, f"{name}, named by {source}"
    return found


def passwords(settings: Settings) -> frozenset[str]:
    """Return the passwords in the URLs, as they are written and as they are meant."""
    return frozenset(one for key in URLS for one in passwords_in(getattr(settings, key)))


def passwords_in(url: str) -> frozenset[str]:
    """Return the password in a URL, as it is written and as it is meant; one that everybody knows is none."""
    before, at, _ = url.partition("://")[2].rpartition("@")
    password = before.partition(":")[2] if at else ""
    query = parse_qsl(url.partition("?")[2])
    found = {password, unquote(password), *(value for word, value in query if word.lower() in SECRET_OPTIONS)}
    return frozenset(found - {"", "guest"})


def _flag(key: str) -> str:
    flag = "--" + key.removeprefix("worker.").removeprefix("scheduler.").replace("_", "-")
    return flag.removesuffix("s") if key in LISTS else flag  # one at a time


def _table(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.rpartition(".")[2]: value for key, value in values.items() if key.rpartition(".")[0] == name}


def _find_config(config: Path | None, environ: Mapping[str, str]) -> Path | None:
    if config is not None:
        return config
    if environ.get(CONFIG_VARIABLE):
        return Path(environ[CONFIG_VARIABLE])
    places = (Path("mqworker.toml"), _config_home() / "mqworker.toml", Path("/etc/mqworker/mqworker.toml"))
    return next((place for place in places if place.is_file()), None)


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"expected a readable settings file at {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"expected TOML in {path}: {error}") from error
    yield from _walk(document, str(path))


def _walk(table: Mapping[str, Any], source: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        key = f"{prefix}{name}"
        if key in KEYS or key in URL_FILES:
            yield key, value
        elif key in TABLES and isinstance(value, dict):
            yield from _walk(value, source, f"{key}.")
        elif key in TABLES:
            raise SettingsError(f"expected a table [{key}] in {source}, got {value!r}")
        else:
            raise SettingsError(f"unknown setting {key!r} in {source}{_guess(key, [*KEYS, *TABLES])}")


def _read_environ(environ: Mapping[str, str]) -> Iterator[tuple[str, str, Any]]:
    known = {variable(key): key for key in (*KEYS, *URL_FILES)}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name in FOREIGN_VARIABLES or name.startswith(FOREIGN_BEGINNINGS):
            continue
        if name in known:
            yield known[name], name, _parse_text(known[name], name, text)
        # Others are an error only if they look like a slip: Kubernetes sets MQWORKER_PORT, MQWORKER_SERVICE_HOST
        # and the like for a service called mqworker.
        elif near := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            raise SettingsError(f"unknown setting {name} in the environment; did you mean {near[0]}?")


def _parse_text(key: str, name: str, text: str) -> Any:
    if key in LISTS:
        return [item.strip() for item in text.split(",") if item.strip()]
    if key in FREE_TABLES:
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise SettingsError(f"expected a JSON object for {key} (from {name}): {error}") from error
    return text


def _convert(key: str, value: Any, source: str) -> Any:
    # Text from a variable may be read as a number; a file has types of its own.
    try:
        converted = msgspec.convert(value, KEYS[key], strict=not source.startswith(PREFIX), dec_hook=_decode)
    except msgspec.ValidationError as error:
        if key in FREE_TABLES and isinstance(value, dict) and len(value) > 1:
            for name, one in value.items():  # the one that is wrong says so of itself
                _convert(key, {name: one}, source)
        shown = "what is no URL" if key in URLS else repr(value)  # a URL carries a password
        raise SettingsError(f"unusable value for {key} (from {source}): {error}; got {shown}") from error
    # Residents change their directory: a path means the same from anywhere.
    return converted.expanduser().absolute() if isinstance(converted, Path) else converted


def _decode(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str | Path) and str(value):
        return Path(value)
    raise msgspec.ValidationError(f"Expected a path, got {value!r}")


def _guess(key: str, known: list[str]) -> str:
    # People forget the table, or name the key of another program: look for the last word alone too.
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [other for other in known if other.rpartition(".")[2] == key]
    near = near or difflib.get_close_matches(key.rpartition(".")[2], known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(KEYS))}"
