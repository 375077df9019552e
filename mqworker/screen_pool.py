"""What people see of the pool: workers, pauses, who can run a request, capability classes, and all of it live.

Draws what it is given and asks nobody, like screen, whose words and tables it uses.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mqworker.messages import (
    Capability,
    CapabilityList,
    Explanation,
    Offered,
    PauseView,
    Pool,
    RequestEvent,
    RequestView,
    Step,
    StuckEvent,
    WorkerEvent,
    WorkerView,
)
from mqworker.screen import (
    SHORT_ID,
    Screen,
    because,
    cell,
    clock,
    cut_cell,
    duration,
    facts,
    make_table,
    many,
    one_line,
    pending_table,
    printable,
    request_table,
    section,
    styled,
)

PoolEvent = RequestEvent | WorkerEvent | StuckEvent

VALUE_LENGTH: Final = 120  # characters of somebody's metadata in a line
OFFERED_SHOWN: Final = 4  # values a step
EXAMPLES_SHOWN: Final = 3
CLASSES_SHOWN: Final = 8
PAUSES_SHOWN: Final = 3
SHARED_SHOWN: Final = 12  # keys a class
MISSING: Final = "missing"  # what Offered.value says of a key that is not there
EVENTS_SHOWN: Final = 4
FRAME_LINES: Final = EVENTS_SHOWN + 1 + 7 + 6  # of the live screen: events, the state of the pool, heads of tables
FINAL_WORDS: Final = ("success", "failure", "error", "aborted", "rejected")
OPEN_WORDS: Final = ("pending", "offered", "running")


# ---------------------------------------------------------------- workers and pauses


def worker_table(workers: Iterable[WorkerView], now: float) -> Table:
    """Draw one line a worker."""
    table = make_table("worker", "state", "busy", "seen", "tasks", right=("busy", "seen"), wrap=("tasks",))
    for worker in workers:
        table.add_row(
            cell(worker.name, 24),
            styled(_standing(worker)),
            f"{len(worker.running)}/{worker.slots}",
            duration(now - worker.seen) if worker.seen else "",
            Text(one_line("; ".join(_about(worker)))),
        )
    return table


def _standing(worker: WorkerView) -> str:
    if worker.state == "online" and worker.draining:
        return "draining" if worker.running else "drained"
    return "paused" if worker.paused is not None and worker.state == "online" else worker.state


def _about(worker: WorkerView) -> Iterator[str]:
    if worker.tasks:
        yield ", ".join(sorted(worker.tasks))
    if worker.denied:
        yield f"denied {', '.join(sorted(worker.denied))}"
    if worker.paused:
        yield f"paused: {worker.paused}"
    elif worker.paused is not None and worker.state != "online":
        yield "paused"
    if worker.reason:
        yield worker.reason


def pool_line(pool: Pool) -> str:
    """Write how the pool is, in one line."""
    states = ", ".join(f"{count:,} {state}" for state, count in sorted(pool.requests.items()) if count)
    classes = many(pool.classes, "class", "classes")
    return f"{many(pool.workers, 'worker')} in {classes}; requests: {states or 'none'}"


def pause_table(pauses: Iterable[PauseView], now: float) -> Table:
    """Draw one line a pause."""
    table = make_table("paused", "name", "for", "reason", right=("for",), wrap=("reason",))
    for pause in pauses:
        table.add_row(pause.kind, cell(pause.name, 40), duration(now - pause.since), Text(one_line(pause.reason)))
    return table


# ---------------------------------------------------------------- explain


def explanation_page(told: Explanation) -> Group:
    """Draw who can run a request and who cannot: a funnel whose counts add up to the number of workers."""
    parts: list[RenderableType] = [Text(printable(_headline(told)), style="bold"), Text()]
    parts.append(_funnel(told))
    notes = [*_notes(told)]
    if notes:
        parts += [Text(), *(Text(printable(note)) for note in notes)]
    if told.advice:
        listed = Table.grid(padding=(0, 1, 0, 0))
        listed.add_column(no_wrap=True)
        listed.add_column(overflow="fold")
        for advice in told.advice:
            listed.add_row("-", Text(one_line(advice)))
        parts.append(section("What would help", listed))
    return Group(*parts)


def _headline(told: Explanation) -> str:
    if told.request is None:
        return f"a request like this for {told.task}: {told.verdict}"
    state = f" is {told.state}" if told.state else ""
    return f"request {told.request[:SHORT_ID]} ({told.task}){state}: {told.verdict}"


def _funnel(told: Explanation) -> Table:
    """Draw how many workers are left after each step, and how many it stopped."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(f"{told.workers:,}", "", "workers are known")
    for step in told.steps:
        stopped = f"-{step.stopped:,}" if step.stopped else ""
        table.add_row(f"{step.passed:,}", stopped, Group(Text(one_line(_asked(step))), *_offers(step)))
    table.add_row(Text(f"{told.able:,}", style="bold"), "", Text(_able(told), style="bold"))
    return table


def _asked(step: Step) -> str:
    asked = " or ".join(_short(value) for value in step.asked[:OFFERED_SHOWN])
    if len(step.asked) > OFFERED_SHOWN:
        asked += f" and {len(step.asked) - OFFERED_SHOWN:,} more"
    return f"{step.looked_at}: {asked} is asked for" if asked else step.looked_at


def _offers(step: Step) -> Iterator[Text]:
    """Say what those offered that a step stopped, the most frequent first."""
    width = max((len(f"{one.workers:,}") for one in step.offered), default=0)
    for one in step.offered[:OFFERED_SHOWN]:
        text = Text(f"{one.workers:,}".rjust(width), style="dim")
        text.append(f" {_value(one)}")
        text.append(f"  {_names(one.examples, one.workers)}")
        yield text
    if rest := step.stopped - sum(one.workers for one in step.offered[:OFFERED_SHOWN]):
        yield Text(f"{rest:,} others" if step.offered else "", style="dim")


def _value(one: Offered) -> str:
    return "do not have it" if one.value == MISSING else f"have {_short(one.value)}"


def _names(examples: Sequence[str], number: int) -> str:
    names = ", ".join(one_line(name) for name in examples[:EXAMPLES_SHOWN])
    return f"({names}{', ...' if number > min(len(examples), EXAMPLES_SHOWN) else ''})" if names else ""


def _short(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= VALUE_LENGTH else f"{line[: VALUE_LENGTH - 3]}..."


def _able(told: Explanation) -> str:
    counts = (
        ("idle", told.idle),
        ("busy", told.busy),
        ("paused", told.paused),
        ("offline", told.offline),
        ("refused it", told.refused),
    )
    parts = [f"{count:,} {word}" for word, count in counts if count]
    return f"can run it{': ' if parts else ''}{', '.join(parts)}"


def _notes(told: Explanation) -> Iterator[str]:
    if told.classes:
        more = f" and {len(told.classes) - CLASSES_SHOWN:,} more" if len(told.classes) > CLASSES_SHOWN else ""
        shown = ", ".join(told.classes[:CLASSES_SHOWN])
        yield f"{'Their classes are' if len(told.classes) > 1 else 'Their class is'} {shown}{more}."
    if told.ahead:
        yield f"About {many(told.ahead, 'request')} go first."
    if told.failing:
        yield f"can_run_on() fails on some workers, which counts as no: {told.failing}"
    if told.escaped:
        yield "can_run_on() does not always say the same of the same metadata, so each worker is asked each time."


# ---------------------------------------------------------------- capability classes


def telling_keys(classes: Iterable[Capability]) -> list[str]:
    """Return the keys of which classes have different values, those with the fewest values first."""
    listed = [*classes]
    values: dict[str, set[str]] = {}
    having: dict[str, int] = {}
    for one in listed:
        for key, value in one.shared.items():
            values.setdefault(key, set()).add(json.dumps(value, sort_keys=True))
            having[key] = having.get(key, 0) + 1
    different = {key: len(found) + (having[key] < len(listed)) for key, found in values.items()}
    return sorted((key for key, number in different.items() if number > 1), key=lambda key: (different[key], key))


def capability_table(told: CapabilityList) -> Table:
    """Draw one line a capability class."""
    keys = telling_keys(told.classes)
    columns = ("class", "workers", "idle", "tickets", "lookahead", "backlog", "told apart by")
    table = make_table(*columns, right=columns[1:-1], wrap=columns[-1:])
    for one in told.classes:
        table.add_row(
            cell(one.name, 12),
            f"{one.workers:,}",
            f"{one.idle:,}",
            f"{one.out:,}",
            f"{one.lookahead:,}",
            f"{one.backlog:,}",
            cut_cell(", ".join(f"{key}={_json(one.shared[key])}" for key in keys if key in one.shared)),
        )
    return table


def capability_page(one: Capability, keys: Sequence[str]) -> Group:
    """Draw all that is known of a capability class; `keys` are those that tell it from others."""
    examples = ", ".join(one.examples) + (", ..." if len(one.examples) < one.workers else "")
    others = sorted(one.shared.keys() - {*keys})
    left = max(SHARED_SHOWN - sum(key in one.shared for key in keys), 0)
    more = f"and {len(others) - left:,} more (--json)" if len(others) > left else ""
    return Group(
        Text(f"class {printable(one.name)}", style="bold"),
        facts(
            ("Workers", f"{one.workers:,}: {examples}"),
            ("Queue", one.queue),
            ("Tasks", ", ".join(one.tasks)),
            ("Now", _now(one)),
            ("Differs in", _pairs(one.shared, [key for key in keys if key in one.shared])),
            ("Shares", "\n".join(part for part in (_pairs(one.shared, others[:left]), more) if part)),
        ),
    )


def _now(one: Capability) -> str:
    can = many(one.requirements, "requirement class", "requirement classes")
    return (
        f"{many(one.idle, 'idle slot')}, {many(one.out, 'ticket')} out, lookahead {one.lookahead:,}; "
        f"backlog of {many(one.backlog, 'request')}; can run {can}"
    )


def _pairs(shared: Mapping[str, Any], keys: Iterable[str]) -> str:
    return "\n".join(f"{key} = {_short(_json(shared[key]))}" for key in keys)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def capability_line(told: CapabilityList) -> str:
    """Write in one line how many classes there are."""
    escaped = f", {told.escaped:,} of them asked anew each time" if told.escaped else ""
    classes = many(len(told.classes), "capability class", "capability classes")
    return f"{classes} for {many(told.requirements, 'requirement class', 'requirement classes')}{escaped}"


# ---------------------------------------------------------------- watching


def event_line(event: PoolEvent) -> Text:
    """Write an event in one line."""
    text = Text(f"{clock(event.time)} ", style="dim")
    match event:
        case RequestEvent():
            text.append(f"{event.request[:SHORT_ID]} {one_line(event.task)} ", style="default")
            text.append_text(styled(event.state))
            text.append(f" on {one_line(event.worker)}" if event.worker else "", style="default")
            text.append(f": {one_line(because(event.reason))}" if event.reason else "", style="default")
        case WorkerEvent():
            text.append(f"worker {one_line(event.worker)} ", style="default")
            text.append_text(styled(event.event))
            text.append(f": {one_line(event.reason)}" if event.reason else "", style="default")
        case StuckEvent():
            text.append(f"{many(event.number, 'request')} for {one_line(event.task)} ", style="default")
            text.append_text(styled("stuck"))
            since = duration(event.time - event.since)
            text.append(f" for {since}, like {event.requests[0][:SHORT_ID]}" if event.requests else f" for {since}")
            text.append(f": {one_line(event.reason)}", style="default")
    return text


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Hold what was seen of the pool at one time."""

    at: float
    pool: Pool
    running: Sequence[RequestView] = field(default_factory=list)
    waiting: Sequence[RequestView] = field(default_factory=list)  # the oldest
    pauses: Sequence[PauseView] = field(default_factory=list)


class Watching:
    """Show the pool live on a terminal; a context manager."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._console = Screen()
        self._sight: Sight | None = None
        self._trouble: str | None = None
        self._events: deque[PoolEvent] = deque(maxlen=EVENTS_SHOWN)
        self._live = Live(
            get_renderable=self._page, console=self._console, refresh_per_second=4, vertical_overflow="crop"
        )

    @property
    def rows(self) -> int:
        """How many requests fit on the screen."""
        return max(self._console.height - FRAME_LINES, 6)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def heard(self, events: Iterable[PoolEvent]) -> None:
        """Take what happened."""
        self._events.extend(events)

    def saw(self, sight: Sight) -> None:
        """Take a fresh look at the pool."""
        self._sight, self._trouble = sight, None

    def missed(self, trouble: str) -> None:
        """Say that nobody answers; the last look stays."""
        self._trouble = trouble

    def _page(self) -> RenderableType:
        sight, now = self._sight, self._clock()
        if sight is None:
            return Text(printable(self._trouble or "looks at the pool"))
        parts: list[RenderableType] = [_state(sight, now)]
        if self._trouble:
            text = f"as it was {duration(now - sight.at)} ago: {one_line(self._trouble)}"
            parts.insert(0, Text(text, style="red", no_wrap=True, overflow="ellipsis"))
        runs, waits = _share(len(sight.running), len(sight.waiting), self.rows)
        if sight.running:
            number = sight.pool.requests.get("running", 0)
            parts.append(_part(number, "running", request_table(sight.running[:runs], now)))
        if sight.waiting:
            number = sum(sight.pool.requests.get(state, 0) for state in ("pending", "offered"))
            table = pending_table(sight.waiting[:waits], now, whole=False)
            parts.append(_part(number, "waiting, the oldest first", table))
        if self._events:
            parts.append(Group(Text(), *(_one_row(event_line(event)) for event in self._events)))
        return Group(*parts)


def _part(number: int, title: str, table: Table) -> Group:
    shown = f"{number:,} {title}" + (f" ({table.row_count:,} shown)" if table.row_count < number else "")
    return Group(Text(), Text(shown, style="bold"), table)


def _share(runs: int, waits: int, rows: int) -> tuple[int, int]:
    """Return how many of each are shown in so many rows: half each, and what one does not need the other has."""
    shown = min(runs, max(rows // 2, rows - waits))
    return shown, min(waits, rows - shown)


def _one_row(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _state(sight: Sight, now: float) -> Table:
    pool = sight.pool
    open_ = ", ".join(f"{pool.requests.get(state, 0):,} {state}" for state in OPEN_WORDS)
    final = ", ".join(f"{pool.requests[state]:,} {state}" for state in FINAL_WORDS if pool.requests.get(state))
    workers = [
        f"{pool.workers:,} online{f' ({pool.paused:,} paused)' if pool.paused else ''}",
        *([f"{pool.offline:,} offline"] if pool.offline else []),
        *([f"{pool.refused:,} refused"] if pool.refused else []),
    ]
    slots = f"{pool.busy:,} of {many(pool.slots, 'slot')} busy"
    classes = many(pool.classes, "class", "classes")
    return facts(
        ("At", clock(sight.at)),
        ("Requests", open_ + (f"; {final}" if final else "")),
        ("Workers", f"{', '.join(workers)}; {slots}; {classes}"),
        ("Paused", "\n".join(_pauses(sight.pauses, now))),
    )


def _pauses(pauses: Sequence[PauseView], now: float) -> Iterator[str]:
    yield from (_pause(pause, now) for pause in pauses[:PAUSES_SHOWN])
    if len(pauses) > PAUSES_SHOWN:
        yield f"and {len(pauses) - PAUSES_SHOWN:,} more (`mqworker pauses`)"


def _pause(pause: PauseView, now: float) -> str:
    reason = f": {one_line(pause.reason)}" if pause.reason else ""
    return f"{pause.kind} {pause.name} for {duration(now - pause.since)}{reason}"
