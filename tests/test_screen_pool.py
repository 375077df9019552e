"""What people see of the pool: workers, pauses, the funnel, classes, and all of it live, at 80 columns and fewer."""

import io
import re
import sys

import pytest
from rich.console import Console

from mqworker import screen_pool
from mqworker.messages import (
    Capability,
    CapabilityList,
    Explanation,
    Offered,
    PauseView,
    Pool,
    Reason,
    Request,
    RequestEvent,
    RequestView,
    RunView,
    Step,
    StuckEvent,
    WorkerEvent,
    WorkerView,
)

NOW = 1_800_000_000.0
ID = "0123abcd-0000-4000-8000-000000000000"


def drawn(drawing, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    console.print(drawing)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def worker(**changes) -> WorkerView:
    return WorkerView(**{"name": "w1", "host": "h", "state": "online", "slots": 2, "seen": NOW - 2, **changes})


# ---------------------------------------------------------------- workers and pauses


def test_workers_fit_80_columns_and_say_what_keeps_them_from_work():
    workers = [
        worker(tasks={f"task{n}": 1 for n in range(30)}),
        worker(name="w2", state="refused", reason="another store"),
        worker(name="w3", paused="disk full", tasks={"noop": 1}, denied=["sbuild"]),
        worker(name="w4", paused=""),
        worker(name="w5", paused="", state="offline"),
        worker(name="[b]"),
    ]

    text = drawn(screen_pool.worker_table(workers, NOW))

    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"w2 +refused +0/2 +2.0s +another store", text)
    assert re.search(r"w3 +paused +0/2 +2.0s +noop; denied sbuild; paused: disk full", text)
    assert re.search(r"w4 +paused +0/2 +2.0s$", text, re.MULTILINE)
    assert re.search(r"w5 +offline +0/2 +2.0s +paused", text)
    assert "[b]" in text


def test_the_pool_is_one_line():
    pool = Pool(term=1, version="1", store="s", requests={"running": 2, "error": 0}, workers=1, classes=2)

    assert screen_pool.pool_line(pool) == "1 worker in 2 classes; requests: 2 running"


def test_pauses_are_listed_with_their_age_and_reason():
    pause = PauseView(kind="task", name="sbuild", reason="chroots are [b]new[/b]", since=NOW - 7500)

    assert re.search(r"task +sbuild +2h05m +chroots are \[b\]new\[/b\]", drawn(screen_pool.pause_table([pause], NOW)))


# ---------------------------------------------------------------- explain


def explanation(**changes) -> Explanation:
    given = {
        "task": "sbuild",
        "request": ID,
        "state": "pending",
        "verdict": "all that can run it are busy or paused",
        "workers": 10_000,
        "steps": [
            Step(
                looked_at="has the task sbuild",
                passed=9000,
                stopped=1000,
                offered=[Offered(value="missing", workers=1000, examples=["zoe"])],
            ),
            Step(looked_at="system:os", passed=9000, stopped=0),
            Step(
                looked_at="sbuild:chroots",
                asked=['"trixie-amd64"'],
                passed=12,
                stopped=8988,
                offered=[
                    Offered(value='["bookworm-amd64"]', workers=8000, examples=["anna", "bert", "carl", "dora"]),
                    Offered(value="missing", workers=900, examples=["eve"]),
                ],
            ),
        ],
        "able": 12,
        "idle": 0,
        "busy": 10,
        "paused": 2,
        "offline": 0,
        "refused": 0,
        "ahead": 41,
        "classes": [f"c{n}" for n in range(10)],
        "advice": ['on anna: set sbuild:chroots to ["bookworm-amd64", "trixie-amd64"]'],
    }
    return Explanation(**{**given, **changes})


def test_the_funnel_shows_who_is_left_and_who_was_stopped_by_what():
    text = drawn(screen_pool.explanation_page(explanation()))

    assert text.splitlines() == [
        "request 0123abcd (sbuild) is pending: all that can run it are busy or paused",
        "",
        "10,000          workers are known",
        " 9,000  -1,000  has the task sbuild",
        "                1,000 do not have it  (zoe, ...)",
        " 9,000          system:os",
        '    12  -8,988  sbuild:chroots: "trixie-amd64" is asked for',
        '                8,000 have ["bookworm-amd64"]  (anna, bert, carl, ...)',
        "                  900 do not have it  (eve, ...)",
        "                88 others",
        "    12          can run it: 10 busy, 2 paused",
        "",
        "Their classes are c0, c1, c2, c3, c4, c5, c6, c7 and 2 more.",
        "About 41 requests go first.",
        "",
        "What would help",
        '  - on anna: set sbuild:chroots to ["bookworm-amd64", "trixie-amd64"]',
    ]


@pytest.mark.parametrize("width", [30, 50, 80])
def test_the_funnel_fits_narrow_screens_and_long_values(width):
    long = explanation(
        verdict="v" * 300,
        steps=[
            Step(
                looked_at="k" * 100,
                asked=[str(n) * 90 for n in range(9)],
                passed=1,
                stopped=1,
                offered=[Offered(value="o" * 5000, workers=1, examples=["e" * 100])],
            )
        ],
        advice=["a" * 500],
        failing="boom " * 50,
        escaped=True,
    )
    text = drawn(screen_pool.explanation_page(long), width)

    assert max(map(len, text.splitlines())) <= width
    assert "and 5 more is asked for" in " ".join(text.split()) or width < 80
    assert text.count("o") < 500
    assert "boom" in text


def test_what_is_not_submitted_is_explained_as_such():
    told = explanation(request=None, state=None, verdict="no worker can run it", able=0, busy=0, paused=0, ahead=None)
    text = drawn(screen_pool.explanation_page(told))

    assert text.startswith("a request like this for sbuild: no worker can run it\n")
    assert re.search(r"^ +0 +can run it$", text, re.MULTILINE)
    assert "go first" not in text


def test_markup_and_control_characters_in_metadata_are_text():
    told = explanation(
        steps=[
            Step(
                looked_at="[b]k",
                asked=["[b]a\x1b[2J"],
                passed=0,
                stopped=1,
                offered=[Offered(value="[b]v", workers=1, examples=["[b]w"])],
            )
        ],
        advice=["[b]x"],
    )
    text = drawn(screen_pool.explanation_page(told))

    assert text.count("[b]") == 5
    assert "\x1b" not in text


# ---------------------------------------------------------------- capability classes


def capability(**changes) -> Capability:
    given = {
        "name": "c1",
        "queue": "mqworker.work.c1",
        "workers": 3,
        "examples": ["anna", "bert"],
        "shared": {"system:arch": "amd64", "chroots": ["bookworm"]},
        "tasks": ["noop", "sbuild"],
        "requirements": 7,
        "idle": 2,
        "lookahead": 0,
        "out": 1,
        "backlog": 1500,
    }
    return Capability(**{**given, **changes})


def test_classes_are_told_apart_by_the_keys_that_differ_those_with_few_values_first():
    classes = [
        capability(name=f"c{n}", shared={"os": "linux", "host": f"h{n}", "arch": arch, **more})
        for n, (arch, more) in enumerate([("amd64", {}), ("arm64", {}), ("amd64", {"gpu": True})])
    ]
    keys = screen_pool.telling_keys(classes)
    text = drawn(screen_pool.capability_table(CapabilityList(classes=classes, requirements=7, escaped=0)), 120)

    assert keys == ["arch", "gpu", "host"]
    assert re.search(r'c2 +3 +2 +1 +0 +1,500 +arch="amd64", gpu=true, host="h2"', text)
    assert screen_pool.telling_keys(classes[:1]) == []


def test_classes_fit_80_columns():
    classes = [capability(name="c" * 30, shared={f"k{n}": "v" * 200 for n in range(30)}), capability()]
    told = CapabilityList(classes=classes, requirements=7, escaped=1)
    keys = screen_pool.telling_keys(classes)

    assert max(map(len, drawn(screen_pool.capability_table(told)).splitlines())) <= 80
    page = drawn(screen_pool.capability_page(classes[0], keys[:4]))
    assert max(map(len, page.splitlines())) <= 80
    assert "and 18 more (--json)" in page
    assert screen_pool.capability_line(told) == (
        "2 capability classes for 7 requirement classes, 1 of them asked anew each time"
    )


def test_a_class_is_shown_with_who_is_in_it_and_what_waits_for_it():
    text = drawn(screen_pool.capability_page(capability(), ["chroots"]))

    assert text.splitlines() == [
        "class c1",
        "Workers     3: anna, bert, ...",
        "Queue       mqworker.work.c1",
        "Tasks       noop, sbuild",
        "Now         2 idle slots, 1 ticket out, lookahead 0; backlog of 1,500 requests;",
        "            can run 7 requirement classes",
        'Differs in  chroots = ["bookworm"]',
        'Shares      system:arch = "amd64"',
    ]


# ---------------------------------------------------------------- watching


def event(**changes) -> RequestEvent:
    given = {"term": 1, "time": NOW, "request": ID, "task": "noop", "state": "running", "event": "grant", "attempt": 1}
    return RequestEvent(**{**given, **changes})


def test_every_kind_of_event_is_one_line():
    reason = Reason(text="it\nfailed", exit_code=2)
    stuck = StuckEvent(
        term=1, time=NOW, task="sbuild", requirement=3, since=NOW - 90, number=12, requests=[ID], reason="no chroot"
    )
    lines = [
        screen_pool.event_line(one).plain.partition(" ")[2]
        for one in (
            event(worker="w1"),
            event(state="failure", worker="w1", reason=reason),
            WorkerEvent(term=1, time=NOW, worker="w1", event="offline", reason="it has\nleft"),
            stuck,
        )
    ]

    assert lines == [
        "0123abcd noop running on w1",
        "0123abcd noop failure on w1: it failed (exit code 2)",
        "worker w1 offline: it has left",
        "12 requests for sbuild stuck for 1m30s, like 0123abcd: no chroot",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def watching(monkeypatch) -> screen_pool.Watching:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    return screen_pool.Watching(clock=lambda: NOW)


def view(**changes) -> RequestView:
    given = {"seq": 1, "request": Request(id=ID, task="noop"), "state": "pending", "attempt": 0, "submitted": NOW - 9}
    return RequestView(**{**given, **changes})


def sight(**changes) -> screen_pool.Sight:
    requests = {"pending": 1200, "running": 1, "success": 5}
    given = {"term": 1, "version": "1", "store": "s", "requests": requests, "workers": 9, "classes": 2}
    pool = Pool(**given, paused=1, offline=3, slots=12, busy=8)
    return screen_pool.Sight(**{"at": NOW - 1, "pool": pool, **changes})


def test_the_live_screen_shows_counts_runs_what_waits_and_why_pauses_and_events(watching):
    progress = RunView(request=ID, attempt=1, since=NOW - 5, stage="Build", fraction=0.25)
    running = view(state="running", granted=NOW - 5, worker="w1", progress=progress)
    waiting = [view(waits="no worker can run it" + " at all" * 20) for _ in range(50)]
    pause = PauseView(kind="worker", name="w2", reason="disk full", since=NOW - 60)
    watching.saw(sight(running=[running], waiting=waiting, pauses=[pause] * 9))
    watching.heard([event(time=NOW, state="success") for _ in range(50)])
    text = drawn(watching._page())

    assert re.search(r"Requests +1,200 pending, 0 offered, 1 running; 5 success", text)
    assert "9 online (1 paused), 3 offline; 8 of 12 slots busy; 2 classes" in " ".join(text.split())
    assert re.search(r"Paused +worker w2 for 1m00s: disk full", text)
    assert re.search(r"0123abcd +noop +running +9.0s +5.0s +w1 +Build 25%", text)
    assert "and 6 more (`mqworker pauses`)" in text
    assert "1,200 waiting, the oldest first (5 shown)" in text
    assert text.count("no worker can run it") == 5
    assert "0123abcd noop success" in text
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("runs", "waits", "shown"), [(50, 50, (5, 5)), (50, 2, (8, 2)), (3, 50, (3, 7)), (1, 1, (1, 1)), (0, 50, (0, 10))]
)
def test_what_runs_and_what_waits_share_the_screen(runs, waits, shown):
    assert screen_pool._share(runs, waits, 10) == shown


def test_the_live_screen_says_when_nobody_answers_and_keeps_the_last_look(watching):
    assert "looks at the pool" in drawn(watching._page())
    watching.saw(sight())
    watching.missed("no scheduler answers; is one running?")
    text = drawn(watching._page())

    assert text.startswith("as it was 1.0s ago: no scheduler answers")
    assert "1,200 pending" in text
    watching.saw(sight())
    assert "no scheduler" not in drawn(watching._page())


def test_the_live_screen_is_drawn_on_a_terminal(watching, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())  # pytest has taken it back since
    with watching:
        watching.saw(sight())

    assert "1,200 pending" in sys.stdout.getvalue()
