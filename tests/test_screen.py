"""What people see: words, tables at 80 columns, a run that is followed, log lines."""

import io
import json
import logging
import re
import sys

import pytest
from rich.console import Console

from mqworker import screen
from mqworker.messages import (
    After,
    AttemptView,
    FileEntry,
    LogProgress,
    LogText,
    Reason,
    RecordedArtifact,
    Request,
    RequestEvent,
    RequestView,
    RunView,
    Take,
)

NOW = 1_800_000_000.0
ID = "0123abcd-0000-4000-8000-000000000000"


def drawn(drawing, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    console.print(drawing)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def view(**changes) -> RequestView:
    given = {
        "seq": 1,
        "request": Request(id=ID, task="sbuild", data={"distribution": "bookworm"}),
        "state": "running",
        "attempt": 1,
        "submitted": NOW - 100,
        "worker": "w1",
        "granted": NOW - 90,
    }
    return RequestView(**{**given, **changes})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0ms"),
        (0.004, "4ms"),
        (0.4, "0.4s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (192, "3m12s"),
        (7500, "2h05m"),
        (273_600, "3d04h"),
        (120 * 86400, "120d"),
    ],
)
def test_durations_are_short_and_never_a_mere_number(seconds, text):
    assert screen.duration(seconds) == text
    assert len(text) <= 6


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KiB"), (1536, "1.5 KiB"), (24_000, "23 KiB"), (2 << 30, "2.0 GiB")],
)
def test_sizes_have_a_unit(count, text):
    assert screen.size(count) == text


def test_control_characters_never_reach_the_terminal():
    evil = "a\x1b[2Jb\x1b]0;title\x07c\x1b]52;c;ZXZpbA==\x1b\\d\x9b31me\rf\u202eg\th\n"

    assert screen.printable(evil) == "abcd31me\nfg\th\n"


def test_a_file_is_shown_in_whole_characters_however_its_chunks_fall():
    text = "käse\nöl"
    body = text.encode()

    assert all("".join(screen.printable_lines([body[:n], body[n:]])) == text for n in range(len(body)))


def test_a_list_has_one_line_a_request_at_80_columns():
    long = Reason(text="the build failed because " + "of something long\n" * 20)
    progress = RunView(request=ID, attempt=1, since=NOW - 5, stage="Build", fraction=0.25)
    views = [
        view(progress=progress),
        view(progress=progress, abort="enough"),
        view(state="failure", ended=NOW, reason=long, worker="a-worker-with-a-very-long-name.example.org"),
        view(state="pending", granted=None, worker=None, waits="no worker has sbuild"),
        view(state="success", ended=NOW - 80),
    ]

    lines = drawn(screen.request_table(views, NOW)).splitlines()

    assert len(lines) == 1 + len(views)
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["request", "task", "state", "age", "took", "worker", "stage"]
    assert lines[1].split() == ["0123abcd", "sbuild", "running", "1m40s", "1m30s", "w1", "Build", "25%"]
    assert "stopping; Build" in lines[2]
    assert lines[3].endswith("…")
    assert "no worker has" in lines[4]


def test_a_request_is_shown_with_timeline_attempts_reason_and_artifacts():
    lost = AttemptView(
        number=1, worker="w1", granted=NOW - 90, ended=NOW - 50, result="lost", reason=Reason(text="gone")
    )
    failed = AttemptView(
        number=2, worker="w2", granted=NOW - 40, started=NOW - 38, ended=NOW - 10, result="failure", counted=True
    )
    reason = Reason(text="the build failed", stage="build", exit_code=2, status="attempted", line="E: no rule")
    artifact = RecordedArtifact(
        id=7,
        category="debian:package-build-log",
        name="hello_2.10-3_amd64-2026-11-23T13:13:28Z.build",
        files=[FileEntry(path="x", size=2048, sha256="0" * 64)],
    )

    text = drawn(
        screen.request_page(
            view(
                state="failure",
                ended=NOW - 10,
                worker="w2",
                reason=reason,
                attempts=[lost, failed],
                artifacts=[artifact],
            ),
            NOW,
        )
    )

    assert max(map(len, text.splitlines())) <= 80
    assert ID in text
    assert re.search(r"State +failure on w2, ran 1m20s", text)
    assert "the build failed (stage build, exit code 2, status attempted)" in text
    assert re.search(r"Cause +E: no rule", text)
    timeline = re.findall(r"\d\d:\d\d:\d\d +(?:\+(\S+) +)?(.*)", text)
    assert timeline == [
        ("", "submitted"),
        ("10s", "attempt 1 granted to w1"),
        ("50s", "attempt 1 ended: lost"),
        ("1m00s", "attempt 2 granted to w2"),
        ("1m02s", "attempt 2 started"),
        ("1m30s", "attempt 2 ended: failure"),
    ]
    assert re.search(r"1 +w1 +40s +lost +gone", text)
    assert re.search(r"7 +debian:package-build-log +hello_2.10-3_amd64\S*… +1 +2.0 KiB", text)


def test_a_waiting_request_says_for_what():
    text = drawn(screen.request_page(view(state="pending", granted=None, worker=None, waits="a free slot"), NOW))

    assert re.search(r"State +pending for 1m40s", text)
    assert re.search(r"Waits for +a free slot", text)


def test_a_request_is_shown_with_what_it_was_given_and_without_what_it_was_not():
    plain = drawn(screen.request_page(view(), NOW))
    for name in ("Group", "Key", "Requires", "After", "Takes"):
        assert not re.search(rf"^{name} ", plain, re.MULTILINE)

    other = ID.replace("0123", "4567")
    request = Request(
        id=ID,
        task="sbuild",
        group="security",
        concurrency_key="mirror",
        requires={"required": ["gpu"]},
        after=[After(request=other, need="end")],
        take=[Take(into="/input/id", request=ID, category="debian:source")],
    )
    text = drawn(screen.request_page(view(request=request, state="pending", after=[other], waits="w"), NOW))

    assert re.search(r"Group +security", text)
    assert re.search(r"Key +mirror", text)
    assert re.search(r'Requires +{"required": \["gpu"\]}', text)
    assert re.search(rf"After +{other} \(end\), not yet\n +{ID} \(success\)$", text, re.MULTILINE)
    assert re.search(rf"Takes +debian:source of {ID} into /input/id", " ".join(text.split()))


def test_what_waits_is_listed_with_its_reason_in_full():
    why = "all that can run it are busy; about 1,234 go first, and this is a long story"
    views = [view(state="pending", worker=None, waits=why), view(state="offered", worker=None)]
    text = drawn(screen.pending_table(views, NOW))

    assert max(map(len, text.splitlines())) <= 80
    assert text.splitlines()[0].split("  ")[:1] == ["request"]
    assert "this is a long story" in " ".join(text.split())
    assert text.splitlines()[-1].split() == ["0123abcd", "sbuild", "1m40s", "offered"]
    assert "priority" not in text
    assert "group" not in text


def test_what_waits_is_listed_with_priority_and_group_where_they_differ():
    request = Request(id=ID, task="sbuild", priority=5, group="security")
    text = drawn(screen.pending_table([view(request=request), view()], NOW))

    assert text.splitlines()[0].split() == ["request", "task", "age", "priority", "group", "why", "it", "waits"]
    assert text.splitlines()[1].split()[:5] == ["0123abcd", "sbuild", "1m40s", "5", "security"]


@pytest.mark.parametrize(("count", "text"), [(0, "0 requests"), (1, "1 request"), (1234, "1,234 requests")])
def test_numbers_of_things_are_words(count, text):
    assert screen.many(count, "request") == text


def test_a_long_command_says_nothing_where_nobody_has_a_terminal(capsys):
    with screen.Counting("abort", 10) as counting:
        counting.show(5)

    assert capsys.readouterr() == ("", "")


def test_artifacts_tasks_and_checks_fit_80_columns():
    artifact = RecordedArtifact(
        id=1,
        category="a:b",
        name="n" * 100,
        data={"x": "y" * 200},
        files=[FileEntry(path="f" * 90, size=1, sha256="0" * 64)],
    )
    tables = [
        screen.artifact_table([artifact]),
        screen.artifact_page(artifact),
        screen.task_table([("noop", 1, "what " * 40), ("other", None, "")]),
        screen.check_table([("problem", "broker", "finding " * 20, "advice " * 20)]),
    ]

    for table in tables:
        assert max(map(len, drawn(table).splitlines())) <= 80
    assert "f" * 50 in drawn(tables[1])
    assert "-> advice" in drawn(tables[3])


def test_markup_in_foreign_text_is_text():
    assert "[red]x[/red]" in drawn(screen.request_page(view(reason=Reason(text="[red]x[/red]"), state="error"), NOW))
    assert "[b]" in drawn(screen.artifact_table([RecordedArtifact(id=1, category="a:b", name="[b]")]))
    assert "[b]" in drawn(screen.request_table([view(worker="[b]")], NOW))
    assert "[b]" in drawn(screen.check_table([("ok", "broker", "[b]", "")]))


# ---------------------------------------------------------------- following a run


def text_of(text: str, seq: int, attempt: int = 1) -> LogText:
    return LogText(request=ID, attempt=attempt, worker="w1", time=NOW, seq=seq, text=text)


def test_a_followed_log_is_passed_on_as_it_is_where_nobody_reads_a_terminal(capsys):
    with screen.Following(ID, logs=True) as following:
        following.show(text_of("\x1b[1mone\x1b[0m\ntw", 1))
        following.show(text_of("o\n", 2))

    assert capsys.readouterr().out == "\x1b[1mone\x1b[0m\ntwo\n"


def test_a_gap_in_a_followed_log_is_told(capsys):
    with screen.Following(ID, logs=True) as following:
        following.show(text_of("one\n", 5))  # it may have begun before us
        following.show(text_of("four\n", 8))
        following.show(text_of("new attempt\n", 1, attempt=2))

    lines = capsys.readouterr().out.split("\n")
    assert [line for line in lines if line] == [
        "one",
        "[... some lines did not get here; the log artifact has them ...]",
        "four",
        "new attempt",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_whole_clean_lines_and_a_progress_line(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")

    with screen.Following(ID, logs=True, clock=lambda: NOW) as following:
        following.show(
            LogProgress(
                request=ID, attempt=1, task="noop", worker="w1", time=NOW, since=NOW - 75, stage="Build", fraction=0.5
            )
        )
        line = drawn(following._line())
        following.show(text_of("on\x1b[2Je\ntw", 1))
        following.show(text_of("o", 2))
    output = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stdout.getvalue())

    assert "0123abcd Build" in line
    assert "1m15s w1" in line
    assert [part for part in re.split(r"[\r\n]+", output) if part in {"one", "two", "tw", "on"}] == ["one", "two"]


def test_the_progress_line_follows_the_state(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    following = screen.Following(ID, logs=False, clock=lambda: NOW)
    following.show(
        RequestEvent(term=1, time=NOW - 3, request=ID, task="noop", state="pending", event="accept", attempt=0)
    )

    assert "pending" in drawn(following._line())
    assert "3.0s" in drawn(following._line())


# ---------------------------------------------------------------- log lines


def record(**extra) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"name": "mqworker.worker", "levelno": 20, "levelname": "INFO", "msg": "run %s", "args": ("began",), **extra}
    )
    made.created = NOW
    return made


def test_text_lines_carry_what_was_given_in_extra():
    line = screen.TextLines().format(record(seconds=1.5, attempt=2, request=ID, why='a "b" c', worker="w1"))

    assert line.endswith(f' info    worker: run began worker=w1 request={ID} attempt=2 seconds=1.5 why="a \\"b\\" c"')


def test_json_lines_are_one_object_each():
    try:
        raise ValueError("boom\nbang")  # noqa: TRY301  # its traceback is wanted
    except ValueError:
        line = screen.JsonLines().format(record(request=ID, thing=object(), exc_info=sys.exc_info()))

    assert "\n" not in line
    read = json.loads(line)
    assert (read["level"], read["logger"], read["message"]) == ("info", "mqworker.worker", "run began")
    assert read["request"] == ID
    assert read["traceback"].endswith("ValueError: boom\nbang")
