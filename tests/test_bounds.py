"""What strangers may not do: outgrow a bound, lock somebody out, or have a name of theirs become a path."""

import asyncio
import io
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from msgspec import inspect
from rich.console import Console

from mqworker import agent as agent_room
from mqworker import amqp, client, examiner, messages, pool, requires, scheduler, screen, screen_pool, settings
from mqworker.agent import Consume, CountRefusal, KillSlot, PublishLog, Requeue, Spool, Unspool
from mqworker.amqp import HEADERS_HEADER, _kept_headers
from mqworker.cli import main
from mqworker.errors import HostUnfit, Rejected, SettingsError, SubmitterError, TooLarge, Unreadable
from mqworker.facts import Accept, Import
from mqworker.ledger import MOST_MARKS, Ledger, _fault
from mqworker.messages import (
    MAX_DEPTH,
    MAX_DESCRIBED_BYTES,
    MAX_FILES,
    MAX_INPUTS_BYTES,
    MAX_LISTED,
    MAX_MESSAGE_BYTES,
    MAX_METADATA_BYTES,
    MAX_OUTCOME_BYTES,
    MAX_REASON,
    MAX_STAGE,
    After,
    Alive,
    Artifact,
    Assign,
    Explain,
    FileEntry,
    ListArtifacts,
    ListRequests,
    Outcome,
    Probe,
    Reason,
    Recorded,
    RecordedArtifact,
    Relation,
    Request,
    RunRef,
    SlotEnded,
    SlotOutput,
    SlotProgress,
    SlotReady,
    Verdict,
    Void,
    decode,
    encode,
    encode_line,
    longer_than,
)
from mqworker.metrics import WorkerMetrics
from mqworker.needs import in_order
from mqworker.pool import FORGET, SILENCE, SWEEP
from mqworker.state import WorkerState
from mqworker.topology import Topology
from mqworker.worker import Worker
from tests.driving import Peer, a_delivery, an_id
from tests.test_agent import Driven as DrivenAgent
from tests.test_agent import analysis

# ---------------------------------------------------------------- messages


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_json_beyond_some_levels_is_refused_before_anybody_walks_in_it(opening):
    closing = b"]" if opening == b"[" else b"}"

    def nested(levels):
        return b'{"type":"explain","data":{"x":' + opening * levels + b"1" + closing * levels + b"}}"

    assert decode(nested(MAX_DEPTH - 1), Explain).task is None
    for levels in (MAX_DEPTH, 900, 100_000):
        with pytest.raises(Unreadable, match=r"levels|recursion"):
            decode(nested(levels), Explain)


def test_what_is_wrong_with_a_message_is_told_in_a_few_words_however_long_it_is():
    for body in (b'{"type":"%s"}' % (b"x" * 1_000_000), b'{"type":"explain","v":%s}' % (b"9" * 4000)):
        with pytest.raises(Exception, match="expected") as caught:
            decode(body, Explain)
        assert len(str(caught.value)) < 1000


def test_a_message_is_measured_without_being_written_as_a_whole():
    artifacts = [RecordedArtifact(id=1, category="a:b", name="n", data={"x": "y" * 1000})] * 100
    answer = client.ArtifactList(artifacts=artifacts)

    assert longer_than(answer, 100_000)
    assert not longer_than(answer, len(encode(answer)))
    assert longer_than(answer, len(encode(answer)) - 1)


@pytest.mark.parametrize(
    "name", ["..", "../x", "/x", "a/../b", "a//b", "", "-x", "a\x00", "a" * 256, "/".join(["a" * 200] * 6)]
)
def test_no_name_of_a_file_leads_out_of_its_directory_or_is_too_long_for_one(name):
    body = b'{"path":%s,"size":1,"sha256":"%s"}' % (msgspec.json.encode(name), b"0" * 64)
    with pytest.raises(Unreadable, match="path"):
        decode(body, FileEntry)


@pytest.mark.parametrize("token", ["../x", "a/b", "", ".x", "a\x00", "x" * 201])
def test_no_token_is_a_path(token):
    with pytest.raises(Unreadable, match="token"):
        decode(msgspec.json.encode({"request": an_id(1), "attempt": 1, "token": token}), RunRef)


# ---------------------------------------------------------------- the worker's judgement


@pytest.fixture
def driven_agent():
    return DrivenAgent().up()


def test_a_term_that_no_scheduler_reaches_keeps_the_real_one_away_for_a_minute_and_no_longer(driven_agent):
    driven_agent.hear(Assign(queue="q2"), term=2**63 - 1)
    assert driven_agent.take(Consume) == [Consume("q2", 1)]
    driven_agent.hear(Assign(queue="q3"), term=1)
    assert driven_agent.take(Consume) == []
    for _ in range(60):  # a worker that looks at nothing for longer than 2 s was frozen, and heard nobody
        driven_agent.pass_time(1)
        driven_agent.take()
    driven_agent.hear(Assign(queue="q3"), term=1)
    assert driven_agent.take(Consume) == [Consume("q3", 1)]


def test_an_answer_removes_the_outcome_that_it_is_for_and_no_other(driven_agent):
    ref, _ = driven_agent.run()
    driven_agent.agent.slot_said(0, SlotEnded(result="success"))
    [outcome] = driven_agent.spool()
    driven_agent.hear(Recorded(request=an_id(99), attempt=7, token=ref.token, status="recorded"))

    assert driven_agent.take(Unspool) == [Unspool(outcome)]


def test_a_slot_that_says_what_is_no_word_is_killed_and_its_run_ends_in_error(driven_agent):
    driven_agent.run()
    driven_agent.agent.slot_babbled(0, "expected JSON")
    driven_agent.agent.slot_said(0, SlotEnded(result="success"))  # too late
    assert driven_agent.take(KillSlot, Spool) == [KillSlot(slot=0, reason="expected JSON")]
    driven_agent.agent.slot_gone(0, -9)
    [outcome] = driven_agent.spool()

    assert outcome.result == "error"
    assert outcome.reason.text == "what its slot said cannot be read: expected JSON"


def test_a_slot_without_a_run_that_says_what_is_no_word_is_killed_once(driven_agent):
    driven_agent.agent.slot_babbled(0, "expected JSON")
    driven_agent.agent.slot_babbled(0, "expected JSON")
    assert driven_agent.take(KillSlot) == [KillSlot(slot=0, reason="expected JSON")]
    driven_agent.ticket()
    assert driven_agent.take(Requeue)


def test_progress_and_output_beyond_all_measure_are_cut(driven_agent):
    driven_agent.run()
    driven_agent.agent.slot_said(0, SlotProgress(stage="s" * 10_000, fraction=1e308))
    driven_agent.agent.slot_said(0, SlotOutput(text="x" * 9_000_000))
    progress, output = [act.message for act in driven_agent.take(PublishLog)]

    assert (progress.stage, progress.fraction) == ("s" * MAX_STAGE, 1.0)
    assert len(encode(output)) < MAX_MESSAGE_BYTES
    assert decode(encode(driven_agent.beat()), agent_room.Report)


def test_an_outcome_that_no_message_could_carry_ends_as_an_error_that_says_so(driven_agent):
    driven_agent.run()
    artifacts = [Artifact(handle="h", category="a:b", name="n", data={"x": "y" * MAX_OUTCOME_BYTES})]
    driven_agent.agent.slot_said(0, SlotEnded(result="success", artifacts=artifacts, reason=Reason(text="x" * 10**6)))
    [outcome] = driven_agent.spool()

    assert (outcome.result, outcome.reason.status, outcome.artifacts) == ("error", "success", [])
    assert str(MAX_DESCRIBED_BYTES) in outcome.reason.text


@pytest.mark.parametrize(("number", "size"), [("MAX_UNSETTLED", 1), ("MAX_UNSETTLED_BYTES", 100)])
def test_a_worker_whose_outcomes_nobody_answers_takes_no_more_work(driven_agent, monkeypatch, number, size):
    monkeypatch.setattr(agent_room, number, size)
    driven_agent.run()
    driven_agent.agent.slot_said(0, SlotEnded(result="success"))
    driven_agent.agent.slot_said(0, SlotReady())
    [outcome] = driven_agent.spool()
    driven_agent.ticket(2)
    assert driven_agent.take(Requeue)
    driven_agent.hear(Recorded(request=outcome.request, attempt=1, token=outcome.token, status="recorded"))
    assert driven_agent.claim(2)


def test_metadata_beyond_the_bound_are_refused_with_the_largest_and_the_last_view_stays(driven_agent):
    with pytest.raises(HostUnfit, match=rf"{MAX_METADATA_BYTES}.*'blob' \({MAX_METADATA_BYTES + 2} bytes\)"):
        driven_agent.agent.analyzed(analysis(blob="x" * MAX_METADATA_BYTES))
    assert driven_agent.claim()


def test_a_task_that_nobody_has_is_no_label(driven_agent):
    driven_agent.ticket(task="x" * 100)
    assert driven_agent.take(CountRefusal) == [CountRefusal("unknown")]


# ---------------------------------------------------------------- the worker's ears and hands


def test_only_names_that_schedulers_of_this_pool_give_are_class_queues():
    topology = Topology("a.b")
    assert topology.is_class_queue(topology.class_queue("12-3").name)
    for name in (
        "a.b.queue.submit",
        "a.b.work.submit",
        "aXb.work.1-1",
        "c.work.1-1",
        "1-1",
        "a.b.work.1-1.x",
        "a.b.work.1-1\n",
    ):
        assert not topology.is_class_queue(name)


class Listening:
    """Take the place of an agent."""

    name = "anna"

    def __init__(self):
        self.heard = []

    def slot_said(self, _number, word):
        self.heard.append(word)

    def slot_babbled(self, _number, problem):
        self.heard.append(problem)

    def verdict(self, verdict, _now):
        self.heard.append(verdict)

    def take_acts(self, _now):
        return []

    def wants_to_end(self):
        return False

    def is_supplied(self, _number):
        return False


def listening(metrics=None):
    """Make a worker that is connected to nothing; in a loop."""
    return Worker(
        amqp_url="amqp://nowhere",
        topology=Topology("t"),
        agent=Listening(),
        state=None,
        store_url="",
        slots=1,
        work_directory=None,
        metadata_interval=60.0,
        drain_grace=1.0,
        metrics=metrics or WorkerMetrics(version="0"),
        link=lambda *_given, **_doors: None,
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode_line(SlotReady()) + b'{"type":"slot_ended","res', [SlotReady()]),  # it was killed in mid-word
        (b"no JSON\n" + encode_line(SlotReady()), ["expected"]),
        (b"x" * 5000 + b"\n" + encode_line(SlotReady()), ["expected lines of at most 1000 bytes"]),
        (b"x" * 50_000, ["expected lines of at most 1000 bytes"]),
        (b"\n", ["expected"]),
        (b'{"type":"slot_ended","result":"lost"}\n', ["result"]),
    ],
)
def test_whatever_a_slot_says_does_not_end_the_agent(monkeypatch, data, expected):
    async def listen():
        worker = listening()
        chunks = [data[start : start + 700] for start in range(0, len(data), 700)]

        async def hear():
            return chunks.pop(0) if chunks else b""

        await worker._listen(0, SimpleNamespace(hear=hear, deadlines={}))
        return worker._agent.heard

    monkeypatch.setattr("mqworker.worker.MAX_LINE_BYTES", 1000)
    heard = asyncio.run(listen())
    assert len(heard) == len(expected)
    for one, wanted in zip(heard, expected, strict=True):
        assert one == wanted if not isinstance(wanted, str) else re.search(wanted, one)


@pytest.mark.parametrize("queue", ["t.queue.submit", "t.work.submit", "other.work.1-1"])
def test_a_worker_consumes_no_queue_that_is_no_class_of_its_pool(queue):
    metrics = WorkerMetrics(version="0")

    async def heard(name):
        worker = listening(metrics)
        worker._take_verdict(a_delivery(encode(Verdict(term=1, parts=[Assign(queue=name)]))))
        return len(worker._agent.heard)

    assert asyncio.run(heard(queue)) == 0
    assert asyncio.run(heard("t.work.1-1")) == 1
    assert metrics.registry.get_sample_value("mqworker_messages_unreadable_total", {"source": "verdict"}) == 1


@pytest.mark.parametrize("number", [b"", b"x", b"-1", b"9" * 5000, b"1e9", b"\xff", b"9" * 16])
def test_a_state_directory_with_nonsense_in_it_is_taken_for_an_empty_one(tmp_path, number):
    (tmp_path / "spool").mkdir()
    (tmp_path / "incarnation").write_bytes(number)
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    (tmp_path / "slots").write_bytes(boot + b"-1 5\n0 1\n1 x\n\n1 2 3\n" + number)
    state = WorkerState(tmp_path)

    assert abs(state.incarnation - time.time() * 1000) < 60_000
    assert state.noted_slots() == []
    state.close()


def test_what_is_in_the_spool_and_is_none_of_ours_is_put_aside_and_what_is_there_twice_goes(tmp_path):
    """Else it would come back with each start."""
    outcome = Outcome(request=an_id(1), attempt=1, token="t", result="success", started=1.0, ended=2.0)  # noqa: S106  # a token of a claim
    state = WorkerState(tmp_path)
    state.spool([outcome])
    (tmp_path / "spool" / "other.json").write_bytes(encode(outcome))
    (tmp_path / "spool" / "dir.json").mkdir()
    with (tmp_path / "spool" / "large.json").open("wb") as file:
        file.truncate(2**40)

    assert list(state.spooled()) == [outcome]
    assert sorted(path.name for path in (tmp_path / "spool").glob("*.unreadable")) == [
        "dir.unreadable",
        "large.unreadable",
    ]
    state.unspool([outcome])
    assert list((tmp_path / "spool").glob("*.json")) == []
    state.close()


# ---------------------------------------------------------------- the scheduler's judgement


def test_a_number_that_nobody_reaches_keeps_a_worker_away_only_while_its_thief_goes_on(driven):
    anna = Peer(driven, incarnation=5, colour="red").join()
    thief = Peer(driven, incarnation=2**53, colour="red")
    thief.seq = 2**62
    thief.say(thief.beat())
    driven.turn()
    anna.say(anna.hello(), anna.beat())
    driven.turn()
    assert anna.hear(Alive) == []
    driven.pass_time(SILENCE + 1)
    driven.pass_probes()
    assert driven.worker("anna").state == "offline"
    anna.say(anna.hello(), anna.beat())
    driven.turn()

    assert len(anna.hear(Alive)) == 1
    assert driven.worker("anna").state == "online"


def test_a_probe_that_was_never_sent_ends_no_lease(driven, anna):
    ref = anna.run(driven.request())
    driven.pass_time(70)
    driven.probes.clear()  # under way
    driven.inbox.append(Probe(term=1, number=2**62, secret=driven.pool._secret))
    driven.turn()
    assert driven.states(ref.request) == ["running"]


def test_a_worker_with_more_metadata_than_fit_is_refused_with_the_reason_and_may_come_back(driven, monkeypatch):
    large = Peer(driven, "large", blob="x" * MAX_METADATA_BYTES)
    large.say(large.hello(), large.beat())
    driven.turn()
    assert str(MAX_METADATA_BYTES) in large.hear(Assign)[-1].reason
    assert driven.worker("large").state == "refused"
    monkeypatch.setattr("mqworker.pool.MAX_POOL_METADATA_BYTES", 2000)
    first = Peer(driven, "first", blob="x" * 1500).join()
    second = Peer(driven, "second", blob="x" * 1500)
    second.say(second.hello(), second.beat())
    driven.turn()
    assert "2000" in second.hear(Assign)[-1].reason
    first.say(first.hello(blob="x"))
    second.say(second.hello(), second.beat())
    driven.turn()
    assert [driven.worker(name).state for name in ("first", "second")] == ["online", "online"]


def test_what_a_worker_runs_goes_on_when_its_metadata_have_grown_too_large(driven):
    anna = Peer(driven).join()
    ref = anna.run(driven.request())
    anna.say(anna.hello(blob="x" * MAX_METADATA_BYTES))
    driven.turn()
    assert driven.worker("anna").state == "refused"
    anna.hear()
    for _ in range(30):
        driven.pass_time(5.0)
        anna.say(anna.beat(ref))
        driven.turn()
    [alive, *_] = anna.hear(Alive)
    assert alive.void == []
    other = driven.request()
    driven.turn()

    assert driven.states(ref.request, other) == ["running", "pending"]
    assert anna.end(ref) == "recorded"


def test_the_metadata_of_a_worker_that_is_long_gone_hold_no_room_any_more(driven, monkeypatch):
    monkeypatch.setattr("mqworker.pool.MAX_POOL_METADATA_BYTES", 2000)
    Peer(driven, "gone", blob="x" * 1500).join()
    driven.pass_time(SILENCE + 1)
    driven.pass_probes()
    driven.pass_time(FORGET + SWEEP)
    assert "gone" not in driven.pool._workers
    Peer(driven, "next", blob="x" * 1500).join()

    assert driven.worker("next").state == "online"


def test_refusals_with_ever_new_metadata_are_remembered_for_the_newest_alone(driven):
    anna = Peer(driven, colour="red").join()
    one = driven.request()
    for number in range(20):
        driven.take_tickets()
        anna.refuse(one)
        driven.turn()
        anna.say(anna.hello(number=number))
        anna.follow()
    [denied] = driven.pool._refused.values()
    assert len(denied) == 1


def test_inputs_that_no_grant_could_carry_end_their_request_with_the_reason(driven):
    anna = Peer(driven, colour="red").join()
    artifact = Artifact(handle="h", category="test:wood", name="n", data={"x": "y" * (MAX_INPUTS_BYTES // 3)})
    numbers = driven.ledger.commit([Import(key=an_id(9000 + one), artifact=artifact, at=1.0) for one in range(4)])
    few = driven.request("coloured", {"colour": "red", "inputs": numbers[:2]})
    anna.follow()
    anna.end(anna.run(few))
    many = driven.request("coloured", {"colour": "red", "inputs": numbers})
    anna.follow()
    anna.claim(many)
    driven.turn()
    view = driven.view(many)

    assert (view.state, view.attempts[0].result) == ("error", "error")
    assert str(MAX_INPUTS_BYTES) in view.reason.text
    assert len(anna.hear(Void)) == 1


@pytest.mark.parametrize("inputs", [list(range(1, 2000)), [0], [2**63], [True], ["1"], [{}], [1.5]])
def test_inputs_that_are_no_ids_or_too_many_are_rejected_and_hurt_nobody(driven, inputs):
    one = driven.request("coloured", {"inputs": inputs})
    assert driven.states(one) == ["rejected"]


def test_the_reason_of_an_outcome_is_cut_before_anybody_keeps_it(driven, anna):
    one = driven.request()
    anna.end(anna.run(one), "failure", reason=Reason(text="x" * 1_000_000, line="y" * 1_000_000))
    assert len(driven.view(one).reason.text) < MAX_REASON + 10


# ---------------------------------------------------------------- the ledger and the scheduler


def a_ledger_with(number, size):
    ledger = Ledger.open("sqlite://")
    requests = [Request(id=an_id(one), task="noop", data={"x": "y" * size}) for one in range(number)]
    ledger.commit(
        [Accept(seq=seq, request=request, at=1.0, rejected=Reason(text="r")) for seq, request in enumerate(requests, 1)]
    )
    artifact = Artifact(handle="h", category="a:b", name="n", data={"x": "y" * size})
    ledger.commit([Import(key=an_id(one), artifact=artifact, at=1.0) for one in range(number)])
    return ledger


def test_an_answer_that_no_message_could_carry_is_refused_before_it_is_read():
    ledger = a_ledger_with(10, 1_000_000)
    ids = [an_id(one) for one in range(10)]
    for ask in (
        lambda: ledger.list(ListRequests(limit=10_000)),
        lambda: ledger.list(ListRequests(limit=9, oldest=True, states=["rejected", "pending"])),
        lambda: ledger.view(ids),
        lambda: ledger.artifacts(ListArtifacts(limit=10_000)),
        lambda: ledger.artifacts(ListArtifacts(ids=list(range(1, 11)))),
    ):
        with pytest.raises(TooLarge, match=str(MAX_MESSAGE_BYTES)):
            ask()
    assert len(ledger.list(ListRequests(limit=8))) == 8
    assert len(ledger.view(ids[:8])[0]) == 8
    assert len(ledger.artifacts(ListArtifacts(limit=8))) == 8
    assert ledger.artifacts_by_id([1, 2], limit=999_999) == {}
    assert ledger.artifacts_by_id([1], limit=1_000_100).keys() == {1}
    assert ledger.artifacts_briefly([1, 99])[1].data == {}
    ledger.close()


def test_many_artifacts_with_many_relations_are_judged_in_one_look_at_each():
    """Their number squared would be a hundred million looks at each of the two."""
    looks = []

    class Handle(str):
        __slots__ = ()

        def __eq__(self, other):
            looks.append(1)
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    artifacts = [
        Artifact(
            handle=Handle(f"h{one}"),
            category="a:b",
            name="n",
            relations=[Relation(type="extends", target=Handle(f"h{(one + 1) % MAX_LISTED}"))],
        )
        for one in range(MAX_LISTED)
    ]
    assert _fault(artifacts, ()) is None
    assert len(looks) < 20 * MAX_LISTED


def test_circles_of_many_requests_are_refused_in_bounded_work_and_few_words():
    number = 1000
    ids = [an_id(one) for one in range(number)]
    requests = [
        Request(id=one, task="noop", after=[After(request=ids[(at + step) % number]) for step in range(1, 101)])
        for at, one in enumerate(ids)
    ]
    order, problems = in_order(requests)

    assert sorted(order) == list(range(number))
    assert len(problems) == number
    assert max(map(len, problems.values())) < 1000


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"rows": {"uniqueItems": True}}},
        {"properties": {"rows": {"contains": {"properties": {"n": {"minimum": 10**9}}}}}},
        {"properties": {"rows": {"unevaluatedItems": {"type": "object"}}}},
        {"properties": {"long": {"pattern": "a*b"}}},
        {"properties": {"texts": {"items": {"pattern": "^(.*x)?.*y?"}}}},
        {"patternProperties": {"k*z": {"type": "string"}}},
        {"additionalProperties": True, "patternProperties": {"k*z": True}},
        {"allOf": [{"patternProperties": {"k*z": True}}], "unevaluatedProperties": True},
    ],
)
def test_a_schema_costs_bounded_work_on_whatever_metadata(schema):
    metadata = {
        "rows": [{"n": n} for n in range(60_000)],
        "long": "a" * 900_000,
        "texts": ["a" * 200] * 5000,
        "k" * 100_000: 1,
    }
    assert requires.problem(schema) is None
    with pytest.raises(SubmitterError, match=str(requires.MAX_WORK)):
        requires.satisfied(schema, metadata)


def test_items_are_the_same_as_json_schema_has_it():
    for items, unique in [
        ([1, 1.0], False),
        ([1, True], True),
        ([0, False], True),
        ([[1], [True]], True),
        ([{"a": 1, "b": 2}, {"b": 2, "a": 1.0}], False),
        ([[1, 2], [2, 1]], True),
        (["1", 1, None, [], {}], True),
        ([None, None], False),
    ]:
        assert requires.satisfied({"properties": {"x": {"uniqueItems": True}}}, {"x": items}) is unique


def test_what_is_remembered_of_schemas_and_of_comparisons_is_small():
    requires._problem.cache_clear()
    for number in range(10):
        assert "bytes" in requires.problem({"title": "x" * 100_000, "$comment": str(number)})
    assert requires._problem.cache_info().currsize == 0


def test_headers_that_cannot_be_written_again_are_left_out_and_that_is_told():
    assert _kept_headers({"a": 1, "b": [None, {"c": b"x"}]}) == {"a": 1, "b": [None, {"c": b"x"}]}
    for headers in ({"a": object()}, {"a": "x" * 40_000}, {"a": 2**70}, {"x" * 300: 1}):
        assert _kept_headers(headers).keys() == {HEADERS_HEADER}


# ---------------------------------------------------------------- the client


@pytest.mark.parametrize("body", [b"", b"\xff", b'{"type":"log_text","v":9}', b"[" * 100_000, b'{"type":"log_text"}'])
def test_an_event_or_a_log_that_cannot_be_read_is_passed_over_as_if_it_were_not_heard(body):
    assert client._read_heard(body) == (None,)


def test_a_client_refuses_what_no_scheduler_would_take_before_it_sends_it():
    deep: list = []
    for _ in range(200):
        deep = [deep]
    one = client.Client("amqp://nowhere")
    with pytest.raises(Rejected, match="levels"):
        one.submit("noop", {"x": deep})
    with pytest.raises(Rejected, match="bytes"):
        client._checked_length(Request(id=an_id(1), task="noop", data={"x": "y" * 1024 * 1024}))
    for fields in ({"task": "a\x1b[2J"}, {"task": "x", "take": [{"into": "/a" * 100}]}):
        with pytest.raises(Unreadable):
            decode(msgspec.json.encode({"id": an_id(1), **fields}), Request)


# ---------------------------------------------------------------- what is told of all that


def test_the_readme_states_each_bound_as_the_code_has_it():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = readme.partition("<!-- sizes -->")[2].partition("<!-- /sizes -->")[0]
    mib = 1024 * 1024
    most_metadata = pool.MAX_POOL_METADATA_BYTES
    stated = {
        "tickets, or events of requests": (
            f"{messages.MAX_TICKETS_IN_A_MESSAGE}, or {messages.MAX_EVENTS_IN_A_MESSAGE}"
        ),
        "a message, either way": f"{messages.MAX_MESSAGE_BYTES // mib} MiB",
        "a request, as JSON": f"{messages.MAX_REQUEST_BYTES // mib} MiB",
        "`requires`": f"{requires.MAX_BYTES // 1024} KiB, and {requires.MAX_WORK:,} looks",
        "input artifacts": f"{examiner.MAX_INPUTS}, described in {messages.MAX_INPUTS_BYTES // mib} MiB",
        "metadata of a worker": f"{MAX_METADATA_BYTES // mib} MiB, of all workers {most_metadata // mib} MiB",
        "artifacts of a run": f"{MAX_LISTED:,}, described in {MAX_DESCRIBED_BYTES // mib} MiB; {MAX_FILES:,} files",
        "an outcome": f"{MAX_OUTCOME_BYTES // mib} MiB",
        "each part of a reason": f"{MAX_REASON} characters",
        "outcomes that": f"{agent_room.MAX_UNSETTLED}, or {agent_room.MAX_UNSETTLED_BYTES // mib} MiB",
        "a word of a slot": f"{messages.MAX_LINE_BYTES // mib} MiB",
        "aborts of requests": f"{MOST_MARKS:,} of one user",
        "reports that wait": f"{scheduler.MAX_WAITING_BYTES // mib} MiB",
        "what is put aside": f"{amqp.MAX_HEADERS_BYTES // 1024} KiB",
    }
    for what, bound in stated.items():
        assert re.search(rf"^\| {re.escape(what)}.*\| {re.escape(bound)}", table, re.MULTILINE), (what, bound)
    assert len(stated) == table.count("\n|") - 2
    assert f"at most {MAX_DEPTH} levels" in readme


# ---------------------------------------------------------------- terminals, settings and the command line

SPITEFUL = "a\x1b[2Jb\x1b]0;title\x07c\r\x9b31md\x00e\u202ef[bold]g"
UGLY = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def spoiled(kind, depth=0):
    """Make a message in which every text is spiteful."""
    match kind:
        case inspect.StructType():
            fields = msgspec.inspect.type_info(kind.cls).fields
            return kind.cls(**{field.name: spoiled(field.type, depth + 1) for field in fields if field.name != "v"})
        case inspect.UnionType():
            return spoiled(next(one for one in kind.types if not isinstance(one, inspect.NoneType)), depth)
        case inspect.StrType():
            return SPITEFUL if kind.pattern is None or re.search(kind.pattern, SPITEFUL) else an_id(1)
        case inspect.LiteralType():
            return kind.values[0]
        case inspect.IntType():
            return 3
        case inspect.FloatType():
            return 1.0
        case inspect.BoolType():
            return True
        case inspect.ListType():
            return [spoiled(kind.item_type, depth + 1)] if depth < 8 else []
        case inspect.DictType():
            return {SPITEFUL: spoiled(kind.value_type, depth + 1)}
        case inspect.AnyType():
            return [SPITEFUL]
    raise NotImplementedError(kind)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: screen.request_page(spoiled(inspect.type_info(messages.RequestView)), 5.0),
        lambda: screen.request_table([spoiled(inspect.type_info(messages.RequestView))], 5.0),
        lambda: screen.artifact_page(spoiled(inspect.type_info(RecordedArtifact))),
        lambda: screen.artifact_table([spoiled(inspect.type_info(RecordedArtifact))]),
        lambda: screen_pool.worker_table([spoiled(inspect.type_info(messages.WorkerView))], 5.0),
        lambda: screen_pool.pause_table([spoiled(inspect.type_info(messages.PauseView))], 5.0),
        lambda: screen_pool.explanation_page(spoiled(inspect.type_info(messages.Explanation))),
        lambda: screen_pool.capability_table(spoiled(inspect.type_info(messages.CapabilityList))),
        lambda: screen_pool.capability_page(spoiled(inspect.type_info(messages.Capability)), []),
        lambda: screen.pending_table([spoiled(inspect.type_info(messages.RequestView))], 5.0),
        lambda: screen_pool.event_line(spoiled(inspect.type_info(messages.RequestEvent))),
        lambda: screen_pool.event_line(spoiled(inspect.type_info(messages.WorkerEvent))),
        lambda: screen_pool.event_line(spoiled(inspect.type_info(messages.StuckEvent))),
    ],
)
def test_no_text_of_a_stranger_steers_a_terminal(draw):
    console = Console(file=io.StringIO(), width=200, force_terminal=False, color_system=None)
    console.print(draw())
    assert not UGLY.search(console.file.getvalue())


@settings_of_hypothesis(deadline=None, max_examples=200)
@given(
    st.sampled_from([*settings.KEYS, "worker.nope", "x"]),
    st.text(max_size=30) | st.sampled_from([SPITEFUL, "9" * 5000, "nan", "inf", "-1", "1e999", "[", "{}", "\x00"]),
)
def test_any_setting_is_taken_or_refused_with_a_word(key, value):
    with suppress(SettingsError):
        settings.load({}, {settings.variable(key): value})
    with suppress(SettingsError):
        settings.load({key: value} if key in settings.KEYS else {}, {})


@settings_of_hypothesis(deadline=None, max_examples=200)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_settings_file_is_taken_or_refused_with_a_word(data):
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(data)
        file.flush()
        with suppress(SettingsError):
            settings.load({}, {}, config=Path(file.name))


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit", SPITEFUL, "-"],
        ["submit", "noop", "--data", "[" * 100_000],
        ["submit", "noop", "--data", '{"a":' * 200 + "1" + "}" * 200],
        ["submit", "noop", "--data", '{"a":"\ud800"}'],
        ["submit", "noop", "--data", '{"a":1e999}'],
        ["submit", "noop", "--requires", '{"$ref":"#"}'],
        ["submit", "noop", "--priority", "9" * 5000],
        ["list", "--older-than", "9" * 5000 + "d"],
        ["pause", "worker", SPITEFUL],
        ["artifact", "get", "9" * 5000],
        ["artifact", "import", SPITEFUL],
        ["run", "noop", "--data", "[" * 100_000],
        ["--prefix", "../x", "list"],
        [SPITEFUL],
    ],
    ids=lambda arguments: " ".join(arguments)[:30].encode("unicode_escape").decode(),
)
def test_whatever_is_typed_ends_in_a_line_that_says_what_is_wrong(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MQWORKER_AMQP_URL", "amqp://127.0.0.1:1/")
    monkeypatch.setenv("MQWORKER_CONFIG", str(tmp_path / "none.toml"))
    (tmp_path / "none.toml").touch()
    monkeypatch.setattr("sys.stdin", io.StringIO("{}"))
    code = main(arguments)
    told = capsys.readouterr()

    assert code
    assert "Traceback" not in told.err
    assert not UGLY.search(told.err)
