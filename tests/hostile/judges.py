"""Each reader and judge as a function of bytes that must not raise: for coverage-guided fuzzing, and for a corpus."""

import itertools
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec
from pika.data import encode_table

from mqworker import messages, requires
from mqworker.agent import Agent
from mqworker.amqp import MAX_HEADERS_BYTES, _kept_headers, _Properties
from mqworker.client import Heard
from mqworker.errors import HostUnfit, PeerError, SettingsError
from mqworker.messages import Analysis, Outcomes, Probe, Report, SlotReady, SlotWord, Submit, Tickets, Verdict, decode
from mqworker.settings import load
from mqworker.state import WorkerState
from mqworker.task import load_tasks
from tests.driving import Driven

KINDS = [
    Submit,
    Report | Probe,
    Outcomes,
    messages.Query,
    Tickets,
    Verdict,
    SlotWord,
    messages.SlotOrder,
    messages.Answer,
    Heard,
    messages.Receipt,
    messages.Outcome,
]
AFRESH = 2000  # inputs, after which a judge begins anew
SECOND = 1_000_000_000
METADATA = {
    "arch": "amd64",
    "mem": 2,
    "tags": ["a", "b", "a" * 500],
    "system:cpu_count": 8,
    "tools": {"gcc": 12},
    "rows": [{"n": n} for n in range(300)],
}


def reading(data):
    """Read bytes as a message of the kind that the first of them chooses, and write it again."""
    kind = KINDS[data[0] % len(KINDS)] if data else KINDS[0]
    try:
        message = decode(data[1:], kind)
    except PeerError:
        return
    written = messages.encode(message)
    assert messages.encode(decode(written, kind)) == written


class Scheduling:
    """Let the scheduler's judgement, on a ledger in memory, have what can be read."""

    def __init__(self):
        load_tasks()
        self._count = itertools.count()
        self._driven = None

    def __call__(self, data):
        if next(self._count) % AFRESH == 0:
            if self._driven is not None:
                self._driven.ledger.close()
            self._driven = Driven()
        driven = self._driven
        try:
            message = decode(data, Submit | Report | Probe | Outcomes)
        except PeerError:
            return
        if isinstance(message, Submit):
            driven.submit(*message.requests)
        else:
            driven.inbox.append(message)
        driven.turn()
        driven.pass_time(1.0)
        driven.take_tickets()


class Working:
    """Let a worker's judgement have what can be read."""

    def __init__(self):
        load_tasks()
        self._count = itertools.count()
        self._agent = None
        self._now = SECOND

    def __call__(self, data):
        if next(self._count) % AFRESH == 0:
            tokens = itertools.count()
            self._agent = Agent(
                name="anna",
                host="anna",
                incarnation=1,
                slots=2,
                store_id="store",
                static_metadata={},
                make_token=lambda: f"t{next(tokens)}",
                wall=lambda: 1.7e9,
            )
            self._agent.analyzed(Analysis(metadata=METADATA, tasks={"noop": 1}, failures={}))
            self._agent.connected("e1")
            for number in range(2):
                self._agent.slot_said(number, SlotReady())
        agent = self._agent
        self._now += SECOND
        try:
            message = decode(data, Tickets | Verdict | SlotWord)
        except PeerError as error:
            if not data:
                agent.slot_babbled(0, str(error))
                agent.slot_gone(0, -9)
                agent.slot_said(0, SlotReady())
            return
        match message:
            case Tickets(tickets=tickets):
                agent.tickets(None, tickets)
            case Verdict():
                agent.verdict(message, self._now)
            case Analysis():
                try:
                    agent.analyzed(message)
                except HostUnfit:
                    return
            case _:
                agent.slot_said(0, message)
        agent.tick(self._now)
        for act in agent.take_acts(self._now):
            msgspec.to_builtins(getattr(act, "report", None))
            if report := getattr(act, "report", None):
                assert decode(messages.encode(report), Report) == report
            if (outcome := getattr(act, "outcome", None)) is not None:
                assert decode(messages.encode(outcome), messages.Outcome) == outcome
                agent.spooled(outcome)
            if outcomes := getattr(act, "outcomes", None):
                assert decode(messages.encode(outcomes), Outcomes) == outcomes


def asking(data):
    """Read bytes as a schema of a request; one in which nothing is wrong must be judged in bounded steps."""
    try:
        schema = msgspec.json.decode(data, type=dict)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    if requires.problem(schema) is None:
        with suppress(Exception):  # who asks takes it for a no; what counts is that it ends
            requires.satisfied(schema, METADATA)


def receiving(data):
    """Read bytes as AMQP properties, and write their headers again."""
    properties = _Properties()
    properties.decode(b"\xa0\x20\x01x" + len(data).to_bytes(4, "big") + data + b"\x01t")  # as the broker writes them
    assert encode_table([], _kept_headers(properties.headers or {})) <= MAX_HEADERS_BYTES


def setting(data):
    """Read bytes as a settings file."""
    path = Path(tempfile.gettempdir()) / "hostile-settings.toml"
    path.write_bytes(data)
    with suppress(SettingsError):
        load({}, {}, config=path)


def remembering(data):
    """Read bytes as each of the files that a worker's predecessor may have left."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "spool").mkdir()
        (directory / "incarnation").write_bytes(data)
        (directory / "slots").write_bytes(data)
        (directory / "spool" / "x.json").write_bytes(data)
        state = WorkerState(directory)
        try:
            assert 0 < state.incarnation < 2**63
            for process in state.noted_slots():
                assert process.pid > 0
            assert list(state.spooled()) == []
        finally:
            state.close()


JUDGES = {
    "reading": reading,
    "scheduling": Scheduling(),
    "working": Working(),
    "asking": asking,
    "receiving": receiving,
    "setting": setting,
    "remembering": remembering,
}
