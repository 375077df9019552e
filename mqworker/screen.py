"""What people see: tables, progress lines, durations and sizes; and the log lines of the residents.

Draws what it is given and asks nobody. Everything fits 80 columns. What comes from others (logs, task data, names) is
shown without its control characters: a build log must not steer the reader's terminal.
"""

import datetime as dt
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mqworker.lifecycle import FINAL
from mqworker.messages import (
    AttemptView,
    Limits,
    LogProgress,
    LogText,
    Reason,
    RecordedArtifact,
    Request,
    RequestEvent,
    RequestView,
)

SHORT_ID: Final = 8
DEFAULT_GROUP: Final = "default"
STYLES: Final[Mapping[str, str]] = {
    "pending": "dim",
    "offered": "blue",
    "running": "cyan",
    "success": "green",
    "failure": "red",
    "error": "bold red",
    "lost": "red",
    "aborted": "yellow",
    "handed_back": "yellow",
    "rejected": "red",
    "online": "green",
    "offline": "dim",
    "refused": "red",
    "paused": "yellow",
    "draining": "yellow",
    "drained": "yellow",
    "stuck": "red",
    "ok": "green",
    "note": "yellow",
    "problem": "bold red",
}
WAITS: Final = frozenset({"pending", "offered"})
_ESCAPES: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Screen(Console):
    """A console that lets a broken pipe rise, and does not cut lines where nobody has a screen to cut them for."""

    def __init__(self, *, stderr: bool = False) -> None:
        terminal = (sys.stderr if stderr else sys.stdout).isatty()
        width = None if terminal or os.environ.get("COLUMNS", "").isdigit() else 200
        super().__init__(stderr=stderr, width=width, highlight=False, soft_wrap=False, emoji=False)

    def on_broken_pipe(self) -> None:
        """Raise what Rich has caught; called while it is being handled."""
        raise  # noqa: PLE0704  # Rich calls this inside its except clause


# ---------------------------------------------------------------- words


def printable(text: str) -> str:
    """Return text without escape sequences and control characters, but for newline and tab."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))


def printable_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Return what a file holds, fit for a terminal: in whole lines, since a chunk may end within a character."""
    rest = b""
    for chunk in chunks:
        whole, newline, rest = (rest + chunk).rpartition(b"\n")
        yield printable((whole + newline).decode(errors="replace"))
    yield printable(rest.decode(errors="replace"))


def duration(seconds: float) -> str:
    """Write a duration in at most six characters: 4ms, 0.4s, 59s, 3m12s, 2h05m, 3d04h, 120d."""
    seconds = max(seconds, 0.0)
    if seconds < 0.0995:  # noqa: PLR2004  # what would be 0.0s
        return f"{seconds * 1000:.0f}ms"
    if seconds < 9.95:  # noqa: PLR2004  # one digit behind the point, as long as it is worth it
        return f"{seconds:.1f}s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if minutes == 0:
        return f"{whole}s"
    if hours == 0:
        return f"{minutes}m{whole % 60:02d}s"
    if days == 0:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{days}d{hours % 24:02d}h" if days < 100 else f"{days}d"  # noqa: PLR2004  # six characters


def size(count: int) -> str:
    """Write a number of bytes: 512 B, 1.5 KiB, 23 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000:  # noqa: PLR2004  # three digits
            return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"  # noqa: PLR2004  # likewise
        value /= 1024
    return f"{value:.1f} TiB"


def many(count: int, word: str, plural: str | None = None) -> str:
    """Write a number of things: 1 request, 1,234 requests."""
    return f"{count:,} {word if count == 1 else plural or f'{word}s'}"


def clock(at: float, *, day: bool = False) -> str:
    """Write a time of day, local; with the day if asked."""
    when = dt.datetime.fromtimestamp(at).astimezone()
    return when.strftime("%Y-%m-%d %H:%M:%S" if day else "%H:%M:%S")


def because(reason: Reason | None) -> str:
    """Write a reason in one line."""
    if reason is None:
        return ""
    details = [
        *([f"stage {reason.stage}"] if reason.stage else []),
        *([f"exit code {reason.exit_code}"] if reason.exit_code is not None else []),
        *([f"status {reason.status}"] if reason.status else []),
    ]
    return printable(reason.text) + (f" ({printable(', '.join(details))})" if details else "")


def styled(word: str, text: str | None = None) -> Text:
    """Write a state in its colour."""
    return Text(printable(text or word), style=STYLES.get(word, ""))


def one_line(text: str) -> str:
    """Write what others have written in one line."""
    return " ".join(printable(text).split())


def make_table(*columns: str, right: Sequence[str] = (), wrap: Sequence[str] = ()) -> Table:
    """Make a table in which only the columns of `wrap` give way where the line is too short."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for column in columns:
        table.add_column(
            column, justify="right" if column in right else "left", no_wrap=column not in wrap, overflow="fold"
        )
    return table


def cell(text: str, width: int) -> Text:
    """Make a cell of plain text: what others have written is no markup."""
    return Text(one_line(text)[:width])


def cut_cell(text: str) -> Text:
    """Make a cell that stays on one line, in a column that gives way."""
    return Text(one_line(text), no_wrap=True, overflow="ellipsis")


def facts(*rows: tuple[str, RenderableType | None]) -> Table:
    """Draw names and values, without those that have none."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value not in (None, ""):
            table.add_row(name, Text(printable(value)) if isinstance(value, str) else value)
    return table


def section(title: str, body: RenderableType) -> Group:
    """Draw something under a title."""
    return Group(Text(), Text(title, style="bold"), Padding(body, (0, 0, 0, 2)))


# ---------------------------------------------------------------- requests


def request_table(views: Iterable[RequestView], now: float) -> Table:
    """Draw one line a request."""
    table = make_table(
        "request", "task", "state", "age", "took", "worker", "stage", right=("age", "took"), wrap=("stage",)
    )
    for view in views:
        took = (view.ended or now) - view.granted if view.granted else None
        table.add_row(
            view.request.id[:SHORT_ID],
            cell(view.request.task, 16),
            styled(view.state),
            duration(now - view.submitted),
            "" if took is None else _took(view, took),
            cell(view.worker or "", 20),
            cut_cell(_stage(view)),
        )
    return table


def _took(view: RequestView, seconds: float) -> str:
    """Say how long a request has taken, and of one that runs how long it may."""
    may = view.request.timeout if view.state == "running" else None
    return duration(seconds) if may is None else f"{duration(seconds)} of {duration(may)}"


def pending_table(views: Sequence[RequestView], now: float, *, whole: bool = True) -> Table:
    """Draw requests that wait, and why: in whole, or cut to a line each; priority and group where they matter."""
    priorities = {view.request.priority for view in views}
    groups = {view.request.group for view in views}
    columns = [
        "request",
        "task",
        "age",
        *(["priority"] if priorities - {0} else []),
        *(["group"] if groups - {DEFAULT_GROUP} else []),
        *(["expires"] if any(view.request.expires_at is not None for view in views) else []),
        "why it waits",
    ]
    table = make_table(*columns, right=("age", "priority", "expires"), wrap=("why it waits",))
    for view in views:
        cells: dict[str, RenderableType] = {
            "request": view.request.id[:SHORT_ID],
            "task": cell(view.request.task, 16),
            "age": duration(now - view.submitted),
            "priority": str(view.request.priority),
            "group": cell(view.request.group, 16),
            "expires": "" if view.request.expires_at is None else f"in {duration(view.request.expires_at - now)}",
            "why it waits": (Text if whole else cut_cell)(one_line(view.waits or view.state)),
        }
        table.add_row(*(cells[column] for column in columns))
    return table


def _stage(view: RequestView) -> str:
    """Say in a few words where a request is, or why it ended."""
    if view.state == "running" and view.progress is not None:
        fraction = "" if view.progress.fraction is None else f" {view.progress.fraction:.0%}"
        return f"{'stopping; ' if view.abort else ''}{view.progress.stage or ''}{fraction}".strip()
    if view.state in WAITS:
        return view.waits or ""
    return "" if view.state == "success" or view.reason is None else view.reason.text


def request_page(view: RequestView, now: float) -> Group:
    """Draw all that is known of a request."""
    request = view.request
    state = styled(view.state)
    state.append(_how_long(view, now), style="default")
    reason = view.reason
    parts: list[RenderableType] = [
        facts(
            ("Request", request.id),
            ("Task", request.task),
            ("State", state),
            ("Stage", _stage(view) if view.state == "running" else None),
            ("Waits for", view.waits),
            ("Reason", because(reason)),
            ("Cause", None if reason is None else reason.line),
            ("Abort", None if view.state in FINAL else view.abort),
            ("Data", json.dumps(request.data, ensure_ascii=False)),
            ("Limits", ", ".join(_limits(request))),
            ("May use", ", ".join(_may_use(request.limits))),
            ("Not before", None if request.not_before is None else clock(request.not_before, day=True)),
            ("Expires", None if request.expires_at is None else clock(request.expires_at, day=True)),
            ("Group", None if request.group == DEFAULT_GROUP else request.group),
            ("Submitter", view.submitter),
            ("Key", request.concurrency_key),
            ("Requires", None if request.requires is None else json.dumps(request.requires, ensure_ascii=False)),
            ("After", "\n".join(_after(view))),
            ("Takes", "\n".join(f"{one.category} of {one.request} into {one.into}" for one in request.take)),
        ),
        section("Timeline", _timeline(view)),
    ]
    if view.attempts:
        parts.append(section("Attempts", _attempt_table(view.attempts, now)))
    if view.artifacts:
        parts.append(section("Artifacts", artifact_table(view.artifacts)))
    return Group(*parts)


def _limits(request: Request) -> Iterator[str]:
    yield f"priority {request.priority}"
    yield f"at most {request.max_attempts} attempts"
    if request.retry_on:
        yield f"again after {' and '.join(request.retry_on)}"
    yield "lease its task's" if request.lease is None else f"lease {duration(request.lease)}"
    if request.timeout is not None:
        yield f"timeout {duration(request.timeout)}"


def _may_use(limits: Limits | None) -> Iterator[str]:
    if limits is None:
        return
    if limits.memory is not None:
        yield f"memory {size(limits.memory)}"
    if limits.cpus is not None:
        yield f"cpus {limits.cpus:g}"
    if limits.cpu_seconds is not None:
        yield f"cpu time {duration(limits.cpu_seconds)}"
    if limits.disk is not None:
        yield f"disk {size(limits.disk)}"
    if limits.processes is not None:
        yield f"processes {limits.processes:,}"


def _after(view: RequestView) -> Iterator[str]:
    """Say which requests it needs, and which of them it still waits for."""
    needs: dict[str, str] = {one.request: one.need for one in view.request.after}
    needs |= {one.request: "success" for one in view.request.take}
    for request, need in needs.items():
        yield f"{request} ({need}){', not yet' if request in view.after else ''}"


def _how_long(view: RequestView, now: float) -> str:
    on = f" on {printable(view.worker)}" if view.worker else ""
    if view.ended is not None and view.granted is not None:
        return f"{on}, ran {duration(view.ended - view.granted)}"
    if view.state == "running" and view.granted is not None:
        return f"{on} for {duration(now - view.granted)}"
    if view.state in FINAL:
        return on
    return f" for {duration(now - view.submitted)}"


def _timeline(view: RequestView) -> Table:
    moments: list[tuple[float, str]] = [(view.submitted, "submitted")]
    for attempt in view.attempts:
        moments.append((attempt.granted, f"attempt {attempt.number} granted to {attempt.worker}"))
        if attempt.started is not None and attempt.started - attempt.granted > 1:
            moments.append((attempt.started, f"attempt {attempt.number} started"))
        if attempt.ended is not None:
            counted = "" if attempt.counted else ", not counted"
            moments.append((attempt.ended, f"attempt {attempt.number} ended: {attempt.result}{counted}"))
    if view.ended is not None and not (view.attempts and view.attempts[-1].result == view.state):
        moments.append((view.ended, view.state))
    if view.ended is None and view.not_before is not None:
        moments.append((view.not_before, "not tried again before" if view.attempts else "not begun before"))
    if view.ended is None and view.granted is None and view.request.expires_at is not None:
        moments.append((view.request.expires_at, "expires"))
    moments.sort(key=lambda moment: moment[0])
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for at, what in moments:
        since = "" if at == view.submitted else f"+{duration(at - view.submitted)}"
        table.add_row(clock(at, day=at == view.submitted).rjust(19), since, Text(printable(what)))
    return table


def _attempt_table(attempts: Iterable[AttemptView], now: float) -> Table:
    table = make_table("#", "worker", "ran", "result", "reason", right=("#", "ran"), wrap=("reason",))
    for attempt in attempts:
        ran = (attempt.ended or now) - (attempt.started or attempt.granted)
        table.add_row(
            str(attempt.number),
            cell(attempt.worker, 20),
            duration(ran),
            styled(attempt.result or "running"),
            Text(because(attempt.reason)),
        )
    return table


# ---------------------------------------------------------------- artifacts, tasks, checks


def artifact_table(artifacts: Iterable[RecordedArtifact]) -> Table:
    """Draw one line an artifact."""
    table = make_table("id", "category", "name", "files", "size", right=("id", "files", "size"), wrap=("name",))
    for artifact in artifacts:
        table.add_row(
            str(artifact.id),
            cell(artifact.category, 40),
            cut_cell(artifact.name),
            str(len(artifact.files)),
            size(sum(entry.size for entry in artifact.files)),
        )
    return table


def artifact_page(artifact: RecordedArtifact) -> Group:
    """Draw all that is known of an artifact."""
    files = make_table("size", "sha256", "name", right=("size",), wrap=("name",))
    for entry in artifact.files:
        files.add_row(size(entry.size), entry.sha256[:12], Text(printable(entry.path)))
    parts: list[RenderableType] = [
        facts(
            ("Artifact", str(artifact.id)),
            ("Category", artifact.category),
            ("Name", artifact.name),
            ("Made by", artifact.request or "an import"),
            ("Recorded", clock(artifact.created, day=True) if artifact.created else None),
            ("Relations", "\n".join(f"{relation.type} {relation.target}" for relation in artifact.relations)),
            ("Data", json.dumps(artifact.data, ensure_ascii=False, indent=2) if artifact.data else None),
        )
    ]
    if artifact.files:
        parts.append(section("Files", files))
    return Group(*parts)


def task_table(tasks: Iterable[tuple[str, int | None, str]]) -> Table:
    """Draw one line a task: name, version, what it is."""
    table = make_table("task", "version", "what", right=("version",), wrap=("what",))
    for name, version, what in tasks:
        table.add_row(cell(name, 40), "-" if version is None else str(version), Text(one_line(what)))
    return table


def check_table(checks: Iterable[tuple[str, str, str, str]]) -> Table:
    """Draw one line a check: state (ok, note, problem), what, finding; and what to do about it."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=7)  # fixed, so that checks drawn one by one stand below each other
    table.add_column(no_wrap=True, min_width=9)
    table.add_column(overflow="fold")
    for state, what, finding, advice in checks:
        text = Text(printable(finding))
        if advice:
            text.append(f"\n-> {printable(advice)}", style="bold")
        table.add_row(styled(state), Text(what), text)
    return table


# ---------------------------------------------------------------- following a run


class Following:
    """Show a request as it runs: its log if asked, and one progress line where there is a terminal; a context manager.

    The log goes to standard output, as it is if that is no terminal.
    """

    def __init__(self, request: str, *, logs: bool, clock: Callable[[], float] = time.time) -> None:
        self._request = request
        self._logs = logs
        self._clock = clock
        self._plain = not sys.stdout.isatty()
        self._console = Screen(stderr=self._plain or not logs)
        self._spinner = Spinner("dots")
        self._stage = "waiting for the scheduler"
        self._fraction: float | None = None
        self._worker = ""
        self._since = clock()
        self._rest = ""  # of a line whose end has not come
        self._attempt, self._seq = 0, 0
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._line, console=self._console, transient=True, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._rest:
            self._print(self._rest + "\n")
        if self._live is not None:
            self._live.stop()

    def show(self, item: LogText | LogProgress | RequestEvent) -> None:
        """Take one word of a run."""
        match item:
            case LogText():
                self._show_text(item)
            case LogProgress():
                self._stage, self._fraction = item.stage or self._stage, item.fraction
                self._worker, self._since = item.worker, item.since
            case RequestEvent():
                self._stage, self._fraction, self._since = item.state, None, item.time
                self._worker = item.worker or ""

    def _show_text(self, item: LogText) -> None:
        if not self._logs:
            return
        if item.attempt == self._attempt and item.seq > self._seq + 1:
            self._print("\n[... some lines did not get here; the log artifact has them ...]\n")
        self._attempt, self._seq = item.attempt, item.seq
        if self._plain:
            sys.stdout.write(item.text)
            sys.stdout.flush()
            return
        whole, newline, self._rest = (self._rest + item.text).rpartition("\n")
        if newline:
            self._print(whole + newline)

    def _print(self, text: str) -> None:
        if self._plain:
            sys.stdout.write(text)
        else:
            self._console.print(Text(printable(text)), end="", soft_wrap=True)

    def _line(self) -> Table:
        line = Table.grid(padding=(0, 1, 0, 0))
        cells: list[RenderableType] = [self._spinner, self._request[:SHORT_ID], Text(one_line(self._stage)[:32])]
        if self._fraction is not None:
            cells.append(ProgressBar(total=1.0, completed=self._fraction, width=16))
        cells += [duration(self._clock() - self._since), Text(printable(self._worker)[:20], style="dim")]
        line.add_row(*cells)
        return line


class Counting:
    """Show how much of a long command is done, where there is a terminal; a context manager."""

    def __init__(self, what: str, number: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Screen(stderr=True)
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(what, total=number)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, done: int) -> None:
        """Say how many are done."""
        self._progress.update(self._task, completed=done)


# ---------------------------------------------------------------- log lines of the residents

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    """Return what was given in `extra`, the worker's and request's first."""
    given = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    first = [name for name in ("worker", "request", "attempt") if name in given]
    return {name: given[name] for name in [*first, *(name for name in given if name not in first)]}


class TextLines(logging.Formatter):
    """Write log records for people: time, level, room, event, and key=value for what was given in `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        when = dt.datetime.fromtimestamp(record.created).astimezone().isoformat(sep=" ", timespec="milliseconds")
        extras = "".join(f" {name}={_value(value)}" for name, value in _extras(record).items())
        room = record.name.removeprefix("mqworker.")
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return f"{when} {record.levelname.lower():7} {room}: {printable(record.getMessage())}{extras}{trace}"


class JsonLines(logging.Formatter):
    """Write log records for machines: one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        line = {
            "time": dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _value(value: object) -> str:
    text = printable(str(value))
    return json.dumps(text, ensure_ascii=False) if re.search(r"[\s\"=]", text) or not text else text
