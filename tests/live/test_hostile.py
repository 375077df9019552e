"""Strangers' messages over a real broker, to real processes: what pika and the broker make of them is part of it."""

import random
import struct
from collections import Counter
from contextlib import ExitStack

import pytest
from pika import BasicProperties

from mqworker import messages
from mqworker.errors import Rejected
from mqworker.messages import MAX_METADATA_BYTES, MAX_REQUEST_BYTES, Report, Submit, Verdict
from tests.hostile.generate import Maker, an_id

pytestmark = pytest.mark.live

EXCHANGES = ("submit", "report", "outcome", "api")
# What leaves the pool at work: one that is told to pause or to drain does so.
ASKING = (
    messages.GetRequests
    | messages.ListRequests
    | messages.CountRequests
    | messages.AbortRequests
    | messages.ListWorkers
    | messages.ListArtifacts
    | messages.ImportArtifact
    | messages.Explain
    | messages.GetCapabilities
    | messages.GetPool
)


class Raw(BasicProperties):
    """Send headers that no client would write."""

    def __init__(self, headers: bytes, **more) -> None:
        super().__init__(**more)
        self.raw = headers

    def encode(self):
        flags = BasicProperties.FLAG_HEADERS | (BasicProperties.FLAG_REPLY_TO if self.reply_to else 0)
        pieces = [struct.pack(">HI", flags, len(self.raw)), self.raw]
        if self.reply_to:
            pieces += [bytes([len(self.reply_to)]), self.reply_to.encode()]
        return pieces


def field(kind: bytes, value: bytes, name: bytes = b"a") -> bytes:
    return bytes([len(name)]) + name + kind + value


def nested(levels: int) -> bytes:
    table = b""
    for _ in range(levels):
        table = field(b"F", struct.pack(">I", len(table)) + table)
    return table


HEADERS = {
    "a time that no calendar has": field(b"T", struct.pack(">Q", 2**63)),
    "tables in tables": nested(1200),
    "a name that is no text": field(b"S", struct.pack(">I", 2) + b"\xff\xfe", name=b"\xff\xfe"),
    "as many as a frame holds": b"".join(
        field(b"S", struct.pack(">I", 1000) + b"x" * 1000, name=b"k%03d" % number) for number in range(125)
    ),
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
def test_headers_that_nobody_can_read_end_no_connection(pool, final, headers):
    """One such message would come again and again, and end each connection that it comes by."""
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        queue = client.workers()[0].queue
        keys = {**{name: f"{pool.prefix}.{name}" for name in EXCHANGES}, "work": queue}
        events = client.follow_logs(None)
        with pool.channel() as channel:
            for name, key in keys.items():
                channel.basic_publish(f"{pool.prefix}.{name}", key, b"not JSON", Raw(headers), mandatory=True)
            for name in ("events", "logs"):
                channel.basic_publish(f"{pool.prefix}.{name}", "x.y", b"not JSON", Raw(headers))
        one = client.submit("noop", {})

        assert final(client, one)[0].state == "success"
        assert any(item.request == one for item, _ in zip(events, range(20), strict=False))
        events.close()
        with pool.channel() as channel:
            kept = Counter()
            while kept.total() < len(keys) - 1:  # who asks the api is told
                _, properties, _ = channel.basic_get(f"{pool.prefix}.queue.rejected", auto_ack=True)
                if properties is not None:
                    kept[properties.headers["x-mqworker-exchange"].rpartition(".")[2]] += 1
        assert kept == dict.fromkeys(["submit", "report", "outcome", "work"], 1)
        for name in ("scheduler", "anna"):
            assert "connection to the broker lost" not in pool.log(name)
            assert "Traceback" not in pool.log(name)


def test_some_hundred_messages_of_every_kind_leave_a_pool_as_it_was(pool, final, eventually):
    maker = Maker(random.Random(20), {"worker": ["carl"], "task": ["noop"]})
    kinds = {"submit": Submit, "report": Report, "outcome": messages.Outcomes, "api": ASKING}
    with ExitStack() as stack:
        client = pool.up(stack, "anna")
        queue = client.workers()[0].queue
        answers: list[bytes] = []
        with pool.channel() as channel:
            channel.basic_consume("amq.rabbitmq.reply-to", lambda *got: answers.append(got[3]), auto_ack=True)
            for number in range(400):
                name = EXCHANGES[number % 4]
                reply_to = "amq.rabbitmq.reply-to" if name in {"submit", "api"} else None
                exchange = f"{pool.prefix}.{name}"
                body = maker.message(kinds[name])
                channel.basic_publish(
                    exchange, exchange, body, BasicProperties(reply_to=reply_to, type="x"), mandatory=True
                )
            for _ in range(50):
                channel.basic_publish(f"{pool.prefix}.work", queue, maker.message(messages.Tickets))
                channel.basic_publish(f"{pool.prefix}.verdict", "anna.x", maker.message(Verdict))

            def answered() -> bool:
                channel.connection.process_data_events(time_limit=0.1)
                return len(answers) >= 200

            eventually(answered, "each submission and each query is answered")
        assert final(client, client.submit("noop", {}))[0].state == "success"
        for name in ("scheduler", "anna"):
            assert pool.processes[name].poll() is None
            assert "Traceback" not in pool.log(name)


def test_what_is_too_large_is_refused_by_the_client_and_by_the_scheduler(pool, eventually):
    with ExitStack() as stack:
        client = pool.up(stack)
        with pytest.raises(Rejected, match=str(MAX_REQUEST_BYTES)):
            client.submit("noop", {"x": "y" * MAX_REQUEST_BYTES})
        request = messages.Request(id=an_id(random.Random(1)), task="noop", data={"x": "y" * MAX_REQUEST_BYTES})
        answers: list[bytes] = []
        with pool.channel() as channel:
            channel.basic_consume("amq.rabbitmq.reply-to", lambda *got: answers.append(got[3]), auto_ack=True)
            exchange = f"{pool.prefix}.submit"
            properties = BasicProperties(reply_to="amq.rabbitmq.reply-to")
            channel.basic_publish(exchange, exchange, messages.encode(Submit(requests=[request])), properties)

            def answered() -> bool:
                channel.connection.process_data_events(time_limit=0.1)
                return bool(answers)

            eventually(answered, "the scheduler answers")
        assert str(MAX_REQUEST_BYTES).encode() in answers[0]


def test_a_worker_whose_metadata_are_too_large_does_not_start_and_says_which(pool, eventually):
    config = pool.directory / "large.toml"
    config.write_text(f"[worker.metadata]\n'my:blob' = '{'x' * MAX_METADATA_BYTES}'\n")
    worker = pool.worker("anna", MQWORKER_CONFIG=str(config))
    eventually(lambda: worker.poll() is not None, "it ends")

    assert worker.returncode == 3
    assert "'my:blob'" in pool.log("anna")
    assert str(MAX_METADATA_BYTES) in pool.log("anna")
    assert "Traceback" not in pool.log("anna")
