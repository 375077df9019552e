"""What every command needs: settings, a client, one way to print, logging, and errors as one line and an exit code."""

import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import typer
from rich.console import RenderableType

from mqworker import requires
from mqworker.amqp import BLOCKED
from mqworker.client import Client
from mqworker.errors import MqworkerError, SettingsError, SubmitterError
from mqworker.messages import Name, Take
from mqworker.screen import JsonLines, Screen, TextLines, printable
from mqworker.settings import URLS, Loaded, Settings, load, passwords, passwords_in

INTERRUPTED: Final = 130  # as a shell says it of SIGINT
BROKEN_PIPE: Final = 141  # ... and of SIGPIPE
USAGE: Final = 2
UNEXPECTED: Final = 1
DID_NOT_SUCCEED: Final = 1

# What `--help` puts together.
REQUESTS: Final = "Requests"
POOL: Final = "The pool"

SECONDS: Final[Mapping[str, float]] = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

BETTER: Final = (
    "put the URL into a variable, the settings file or a file of its own (amqp_url_file, ledger_file, store_file)"
)
USERINFO: Final = re.compile(r"(://[^/\s:@]*):[^\s@]+@")
SHORTEST_STRUCK: Final = 4  # characters; a shorter one is in every second word
_secrets: Final[set[str]] = set()  # passwords of the settings that were read

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@dataclass
class Shell:
    """Hold the flags before the command; it travels as Typer's context object."""

    flags: dict[str, Any] = field(default_factory=dict)
    config: Path | None = None

    def load(self, flags: Mapping[str, Any] | None = None) -> Loaded:
        """Read the settings, with the command's own flags over the general ones.

        Raises:
            SettingsError: one is unknown, unreadable or out of range.
        """
        given = {**self.flags, **(flags or {})}
        loaded = load(given, os.environ, config=self.config)
        _secrets.update(passwords(loaded.settings))
        if shown := _shown_by_ps(given):
            tell(f"{shown} shows its password to everybody on this machine (ps): {BETTER}")
        return loaded

    def resident(self, flags: Mapping[str, Any] | None = None) -> Settings:
        """Read the settings of a command that runs on, and set up its log lines.

        Raises:
            SettingsError: as `load`; or a password is on the command line, where it would stay to be read.
        """
        if shown := _shown_by_ps({**self.flags, **(flags or {})}):
            raise SettingsError(
                f"expected {shown} without a password, which everybody on this machine can read: {BETTER}"
            )
        settings = self.load(flags).settings
        set_up_logging(settings)
        return settings

    def client(self) -> Client:
        """Make a client; open it with `with`."""
        loaded = self.load()
        if "log_level" in loaded.sources:  # a command tells its errors itself: log lines only where asked for
            set_up_logging(loaded.settings)
        else:
            silence_logging()
        settings = loaded.settings
        return Client(
            settings.amqp_url,
            prefix=settings.prefix,
            store_url=settings.store,
            timeout=settings.timeout,
            on_blocked=lambda blocked: tell(f"waits: {BLOCKED}" if blocked else "the broker takes messages again"),
        )


def _shown_by_ps(flags: Mapping[str, Any]) -> str:
    """Name a flag whose URL holds a password."""
    return next((f"--{key.replace('_', '-')}" for key in URLS if passwords_in(flags.get(key) or "")), "")


def without_secrets(text: str) -> str:
    """Strike the passwords of the settings out of a text; no text of ours has one, but others' may."""
    for secret in _secrets:
        if len(secret) >= SHORTEST_STRUCK:
            text = text.replace(secret, "***")
    return USERINFO.sub(r"\1:***@", text)  # also in what was typed in the wrong place


class _Struck(logging.Formatter):
    """Write log records as another formatter does, and strike out passwords."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(self._inner.format(record))


def set_up_logging(settings: Settings) -> None:
    """Write log records to standard error, as lines of text or JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Struck(JsonLines() if settings.log_format == "json" else TextLines()))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # it logs as errors what the link tells in our words


def silence_logging() -> None:
    """Keep log records off the terminal of somebody who did not ask for them."""
    logging.basicConfig(handlers=[logging.NullHandler()], force=True)


def show(drawing: RenderableType) -> None:
    """Print a drawing; where no terminal reads it, without the blanks that fill its lines."""
    screen = Screen()
    if screen.is_terminal:
        screen.print(drawing)
        return
    with screen.capture() as drawn:
        screen.print(drawing)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in drawn.get().splitlines()))


def print_json(value: object) -> None:
    """Print one JSON document."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def tell(text: str) -> None:
    """Say something beside the output."""
    sys.stderr.write(f"mqworker: {printable(without_secrets(text))}\n")


def read_object(text: str | bytes, source: str) -> dict[str, Any]:
    """Read a JSON object that somebody typed.

    Raises:
        SubmitterError: it is none; the text names where it came from.
    """
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise SubmitterError(f"expected one JSON object from {source}: {error}") from error
    if not isinstance(value, dict):
        raise SubmitterError(f"expected one JSON object from {source}, got {type(value).__name__}")
    return value


def read_data(data: str | None, file: Path | None) -> dict[str, Any]:
    """Read task data from --data, or a file, or standard input (-); none of them is an empty object.

    Raises:
        SubmitterError: both are given, or what is there is no JSON object.
    """
    if data is not None and file is not None:
        raise SubmitterError("expected --data or --file, got both")
    if data is not None:
        return read_object(data, "--data")
    if file is None:
        return {}
    if str(file) == "-":
        return read_object(sys.stdin.buffer.read(), "standard input")
    try:
        return read_object(file.read_bytes(), str(file))
    except OSError as error:
        raise SubmitterError(f"expected a readable file at {file}: {error.strerror}") from error


def read_requires(text: str | None) -> dict[str, Any] | None:
    """Read a JSON Schema over worker metadata, typed or (@FILE) from a file.

    Raises:
        SubmitterError: it is none that can be used.
    """
    if text is None:
        return None
    source = "--requires"
    if text.startswith("@"):
        source = text.removeprefix("@")
        try:
            schema = read_object(Path(source).read_bytes(), source)
        except OSError as error:
            raise SubmitterError(f"expected a readable file at {source}: {error.strerror}") from error
    else:
        schema = read_object(text, source)
    if (trouble := requires.problem(schema)) is not None:
        raise SubmitterError(f"{source}: {trouble}")
    return schema


def read_name(text: str, flag: str) -> str:
    """Check a name that somebody typed.

    Raises:
        SubmitterError: it has what a name cannot have.
    """
    try:
        return msgspec.convert(text, Name)
    except msgspec.ValidationError as error:
        raise SubmitterError(
            f"expected {flag} to be at most 100 letters, digits and ._-, beginning with a letter or digit, got {text!r}"
        ) from error


def read_take(text: str) -> Take:
    """Read /POINTER=ID:CATEGORY: where in the task data, of which request, of which category.

    Raises:
        SubmitterError: it is not of that form.
    """
    match = re.fullmatch(r"((?:/[^/]+)+)=([0-9A-Fa-f-]+):([a-z0-9-]+:[a-z0-9-]+)", text)
    if match is None:
        raise SubmitterError(
            "expected --take /POINTER=ID:CATEGORY, like"
            f" /input/source_artifact_id=0b9de263:debian:source-package, got {text!r}"
        )
    return Take(into=match[1], request=match[2].lower(), category=match[3])


def read_duration(text: str) -> float:
    """Read a duration like 90s, 15m, 2h, 3d or 1h30m, in seconds.

    Raises:
        BadParameter: it is none.
    """
    if not re.fullmatch(r"(\d+(\.\d+)?[smhdw])+", text):
        raise typer.BadParameter(f"expected a duration like 90s, 15m, 2h or 3d, got {text!r}")
    return sum(float(number) * SECONDS[unit] for number, unit in re.findall(r"([\d.]+)([smhdw])", text))


def read_moment(text: str) -> float:
    """Read a time: +30m from now, or ISO 8601 (local, if it names no zone); in seconds since the epoch.

    Raises:
        BadParameter: it is none.
    """
    if text.startswith("+"):
        return time.time() + read_duration(text[1:])
    try:
        return datetime.fromisoformat(text).astimezone().timestamp()
    except ValueError as error:
        raise typer.BadParameter(
            f"expected a time like 2030-01-31T22:15 (or with its zone: 2030-01-31T22:15+01:00), or +30m from now,"
            f" got {text!r}"
        ) from error


def read_deadline(text: str) -> float:
    """Read a time, as `read_moment` does, that is still to come.

    Raises:
        BadParameter: it is none, or has passed.
    """
    moment = read_moment(text)
    if moment <= time.time():
        raise typer.BadParameter(f"expected a time that is still to come, got {text!r}, which has passed")
    return moment


def read_size(text: str) -> int:
    """Read a number of bytes: 512M, 4G, 1.5T, by powers of 1024.

    Raises:
        BadParameter: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:iB|B)?", text)
    if match is None:
        raise typer.BadParameter(f"expected a size like 512M or 4G, got {text!r}")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


def read_results(text: str) -> list[Literal["failure", "error"]]:
    """Read the results after which to try again.

    Raises:
        SubmitterError: one of them is no such result.
    """
    names = [name.strip() for name in text.split(",")]
    try:
        return msgspec.convert(list(dict.fromkeys(names)), list[Literal["failure", "error"]])
    except msgspec.ValidationError as error:
        raise SubmitterError(f"expected --retry-on failure, error or failure,error, got {text!r}") from error


def run(application: typer.Typer, arguments: Iterable[str] | None) -> int:
    """Run a command line and return its exit code; an error is one line on standard error.

    MQWORKER_DEBUG=1 shows its traceback too.
    """
    try:
        code = typer.main.get_command(application).main(
            args=None if arguments is None else [*arguments], prog_name="mqworker", standalone_mode=False
        )
        sys.stdout.flush()
    except MqworkerError as error:
        return _fail(error, str(error), error.exit_code)
    except typer.TyperException as error:
        return _fail(error, _usage(error), USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return _leave_broken_pipe()
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # Typer has its own way with it
            return _leave_broken_pipe()
        raise
    except Exception as error:  # noqa: BLE001  # the last door: nobody above could say it better
        text = f"unexpected {type(error).__name__}: {error}; MQWORKER_DEBUG=1 shows where, please report it"
        return _fail(error, text, UNEXPECTED)
    return int(code or 0)


def _usage(error: typer.TyperException) -> str:
    """Say what is wrong with a command line, and where to read more."""
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", None)
    if context is None:
        return f"{error.format_message()} (`mqworker --help` shows how)"
    here, above = (any(option in one.opts for one in level.command.params) for level in (context, context.find_root()))
    if above and not here:
        command = context.command_path.removeprefix("mqworker ")
        return f"{option} is for all commands, and goes before them: `mqworker {option} ... {command} ...`"
    return f"{error.format_message()} (`{context.command_path} --help` shows how)"


def _fail(error: BaseException, text: str, code: int) -> int:
    if os.environ.get("MQWORKER_DEBUG"):
        sys.stderr.write(without_secrets("".join(traceback.format_exception(error))))
    sys.stderr.write(f"mqworker: error: {' '.join(printable(without_secrets(text)).split())}\n")
    return code


def _leave_broken_pipe() -> int:
    # The interpreter flushes standard output once more on its way out.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
    return BROKEN_PIPE
