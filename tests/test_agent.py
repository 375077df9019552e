"""The worker's judgement on a virtual clock: no broker, no slot and no disk; the tests do its acts, or do not."""

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mqworker import task as task_room
from mqworker.agent import (
    ABORT_MARGIN_NS,
    BEHIND_NS,
    DEFAULT_GRACE,
    HEARTBEAT_NS,
    Ack,
    Agent,
    Analyze,
    Cancel,
    Consume,
    CountRefusal,
    Discard,
    KillSlot,
    PublishLog,
    PublishOutcomes,
    PublishReport,
    RecallRuns,
    RenewRun,
    Requeue,
    Spool,
    StartRun,
    StopRunIn,
    Unspool,
    check_task_names,
)
from mqworker.errors import SettingsError
from mqworker.messages import (
    MAX_MESSAGE_BYTES,
    SLOT_LAPSED,
    Abort,
    Alive,
    Analysis,
    Artifact,
    Assign,
    Bye,
    Claim,
    Drain,
    Granted,
    Heartbeat,
    Hello,
    Introduce,
    LogProgress,
    LogText,
    Outcome,
    Reason,
    Recorded,
    Refusal,
    Request,
    RunRef,
    SlotEnded,
    SlotOutput,
    SlotProgress,
    SlotReady,
    SlotRecalled,
    Ticket,
    Verdict,
    Void,
    encode,
)
from mqworker.task import Task

SECOND = 1_000_000_000
START = 1000 * SECOND
LEASE = 60.0


def an_id(number):
    return f"00000000-0000-4000-8000-{number:012x}"


def analysis(**metadata):
    return Analysis(metadata={"noop:version": 1, **metadata}, tasks={"noop": 1, "tagged": None}, failures={})


class Driven:
    """Turn an agent's clock, and keep what it wants done."""

    def __init__(self, *, slots=1, incarnation=1, allow=(), deny=(), **static):
        self.tokens = itertools.count(1)
        self.now = START
        self.agent = Agent(
            name="anna",
            host="host",
            incarnation=incarnation,
            slots=slots,
            store_id="store",
            static_metadata=static,
            allow_tasks=allow,
            deny_tasks=deny,
            make_token=lambda: f"t{next(self.tokens)}",
            wall=lambda: self.now / SECOND,
        )
        self.slots = slots
        self.term = 1
        self.acts = []

    def up(self):
        """Look at the host, connect, start the slots, and be assigned a queue."""
        self.agent.analyzed(analysis())
        self.agent.connected("e1")
        for number in range(self.slots):
            self.agent.slot_said(number, SlotReady())
        [report] = self.take(PublishReport)
        self.hear(Assign(queue="q"), Alive(seq=report.report.seq))
        self.do()
        self.take()
        return self

    def do(self):
        acts = self.agent.take_acts(self.now)
        self.acts += acts
        return acts

    def pass_time(self, seconds):
        self.now += int(seconds * SECOND)
        self.agent.tick(self.now)
        return self.do()

    def take(self, *kinds):
        """Return what was to be done since, of some kinds; the rest is forgotten."""
        self.do()
        acts, self.acts = self.acts, []
        return [act for act in acts if not kinds or isinstance(act, kinds)]

    def said(self, *kinds):
        """Return what was reported since, of some kinds."""
        parts = [part for act in self.take(PublishReport) for part in act.report.parts]
        return [part for part in parts if not kinds or isinstance(part, kinds)]

    def hear(self, *parts, term=None):
        self.agent.verdict(Verdict(term=self.term if term is None else term, parts=list(parts)), self.now)
        self.do()

    def tickets(self, numbers, *, attempt=1, delivery):
        requests = [Request(id=an_id(number), task="noop") for number in numbers]
        self.agent.tickets(delivery, [Ticket(attempt=attempt, request=request) for request in requests])

    def ticket(self, number=1, *, attempt=1, task="noop", data=None, delivery=None, alone=False, **fields):
        request = Request(id=an_id(number), task=task, data=data or {}, **fields)
        self.agent.tickets(delivery or f"d{number}", [Ticket(attempt=attempt, request=request, alone=alone)])

    def claim(self, number=1, **given):
        """Take a ticket; return what it was claimed with."""
        self.ticket(number, **given)
        [claim] = self.said(Claim)
        return RunRef(request=claim.request, attempt=claim.attempt, token=claim.token)

    @staticmethod
    def granted(ref, lease=LEASE):
        return Granted(request=ref.request, attempt=ref.attempt, token=ref.token, lease=lease, inputs=[])

    def grant(self, ref, lease=LEASE):
        self.hear(self.granted(ref, lease))

    def run(self, number=1, *, lease=LEASE, **given):
        """Have a run; return its reference and the act that starts it."""
        ref = self.claim(number, **given)
        self.grant(ref, lease)
        [start] = self.take(StartRun)
        return ref, start

    def beat(self):
        """Let a heartbeat be due, and return the report that has it."""
        self.pass_time(HEARTBEAT_NS / SECOND)
        [report] = [
            act.report
            for act in self.take(PublishReport)
            if any(isinstance(part, Heartbeat) for part in act.report.parts)
        ]
        return report

    def spool(self):
        """Do what is to be spooled; return it."""
        outcomes = [act.outcome for act in self.take(Spool)]
        for outcome in outcomes:
            self.agent.spooled(outcome)
        return outcomes


def beat_of(report):
    [beat] = [part for part in report.parts if isinstance(part, Heartbeat)]
    return beat


@pytest.fixture(autouse=True)
def tagged():
    """A task that only tests have."""
    task_room.load_tasks()
    kept = dict(Task._sub_tasks)

    class Tagged(Task):
        TERMINATE_GRACE = 15.0
        TASK_DATA_SCHEMA: ClassVar[dict[str, Any]] = {"type": "object", "properties": {"tag": {"type": "string"}}}

        def can_run_on(self, worker_metadata: Mapping[str, Any]) -> bool:
            if self.data.get("tag") == "raises":
                raise KeyError("no such tag")
            return self.data.get("tag") == worker_metadata.get("tag")

        def _execute(self) -> bool:
            return True

    class Fresh(Task):
        def _execute(self) -> bool:
            return True

    yield Tagged, Fresh
    Task._sub_tasks.clear()
    Task._sub_tasks.update(kept)


@pytest.fixture
def driven():
    return Driven().up()


@pytest.fixture
def two():
    return Driven(slots=2).up()


# ---------------------------------------------------------------- entering the pool


def test_a_worker_says_nothing_before_it_has_looked_at_its_host_and_then_all_at_once():
    driven = Driven()
    driven.agent.connected("e1")
    driven.pass_time(10)
    assert driven.take() == []
    driven.agent.analyzed(analysis())
    parts = driven.said()

    assert [type(part) for part in parts] == [Hello, Heartbeat]
    assert (parts[0].slots, parts[0].store, parts[0].tasks) == (1, "store", {"noop": 1, "tagged": None})
    assert (parts[1].queue, parts[1].assigned, parts[1].slots) == (None, None, 0)  # no slot is ready


def test_it_consumes_the_queue_that_it_is_assigned_once_a_slot_is_ready():
    driven = Driven()
    driven.agent.analyzed(analysis())
    driven.agent.connected("e1")
    driven.hear(Assign(queue="q"))
    assert driven.take(Consume) == []
    driven.agent.slot_said(0, SlotReady())
    acts = driven.take(Consume, PublishReport)

    assert acts[0] == Consume("q", 1)
    beat = beat_of(acts[1].report)
    assert (beat.queue, beat.assigned, beat.slots) == ("q", "q", 1)


def test_it_moves_to_another_queue_and_says_so_at_once(driven):
    driven.hear(Assign(queue="q2"))
    acts = driven.take(Cancel, Consume, PublishReport)

    assert acts[:2] == [Cancel("q"), Consume("q2", 1)]
    assert beat_of(acts[2].report).assigned == "q2"


def test_a_scheduler_that_does_not_want_it_says_why_and_it_consumes_nothing(driven):
    driven.hear(Assign(queue=None, reason="another store"))
    assert driven.take(Cancel) == [Cancel("q")]
    assert driven.agent.refused == "another store"
    driven.hear(Assign(queue="q"))

    assert driven.agent.refused is None
    assert driven.take(Consume) == [Consume("q", 1)]


def test_the_administrators_word_counts_more_than_what_was_found():
    driven = Driven(tag="blue")
    driven.agent.analyzed(analysis(tag="red"))
    driven.agent.connected("e1")
    [hello] = driven.said(Hello)

    assert hello.metadata["tag"] == "blue"


@pytest.mark.parametrize(
    ("lists", "tasks", "denied"),
    [
        ({}, {"noop", "tagged"}, []),
        ({"deny": ["noop"]}, {"tagged"}, ["noop"]),
        ({"deny": ["Tagged", "noop"]}, set(), ["noop", "tagged"]),
        ({"allow": ["NoOp"]}, {"noop"}, ["tagged"]),
        ({"allow": ["noop", "tagged"], "deny": ["noop"]}, {"tagged"}, ["noop"]),
        ({"deny": ["fresh"]}, {"noop", "tagged"}, []),  # which did not analyse cleanly, so it is not there to be denied
    ],
)
def test_tasks_that_the_administrator_does_not_allow_are_not_offered_but_named(lists, tasks, denied):
    driven = Driven(**lists)
    driven.agent.analyzed(analysis())
    driven.agent.connected("e1")
    [hello] = driven.said(Hello)

    assert (set(hello.tasks), hello.denied) == (tasks, denied)


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({"allow_tasks": ["noop", "tagd"]}, r"worker\.allow_tasks.* noop, .*got 'tagd'; did you mean 'tagged'"),
        ({"deny_tasks": ["no-such"]}, r"worker\.deny_tasks, which are .*noop.*, got 'no-such'$"),
    ],
)
def test_a_slip_in_the_lists_of_tasks_is_an_error_that_names_the_setting_and_the_tasks(lists, said):
    with pytest.raises(SettingsError, match=said):
        check_task_names(**{"allow_tasks": [], "deny_tasks": [], **lists})
    check_task_names(allow_tasks=["NOOP", "Tagged"], deny_tasks=["fresh"])


def test_a_hello_is_said_again_with_each_heartbeat_until_one_is_answered(driven):
    driven.agent.analyzed(analysis(tag="red"))
    first = driven.take(PublishReport)[-1].report.seq
    again = driven.beat()
    driven.hear(Alive(seq=first - 1))
    once_more = driven.beat()
    driven.hear(Alive(seq=again.seq))
    known = driven.beat()

    assert [any(isinstance(part, Hello) for part in one.parts) for one in (again, once_more, known)] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("value", [True, 1.0, "1"])
def test_metadata_that_python_calls_equal_are_still_another_value(driven, value):
    driven.agent.analyzed(analysis(cores=1))
    driven.take()

    driven.agent.analyzed(analysis(cores=value))

    [hello] = driven.said(Hello)
    assert type(hello.metadata["cores"]) is type(value)


def test_metadata_are_said_again_only_if_they_changed_and_then_under_a_higher_version(driven):
    driven.agent.analyzed(analysis())
    assert driven.said(Hello) == []
    versions = []
    for tag in ("red", "blue"):
        driven.agent.analyzed(analysis(tag=tag))
        [hello] = driven.said(Hello)
        versions.append(hello.metadata_version)

    assert versions == sorted(set(versions))
    other = Driven(incarnation=2)
    other.agent.analyzed(analysis())
    other.agent.connected("e1")
    assert other.said(Hello)[0].metadata_version > versions[-1]


def test_asked_to_introduce_itself_it_says_hello_and_looks_at_its_host_afresh(driven):
    driven.hear(Introduce())

    assert [type(act) for act in driven.acts] == [Analyze, PublishReport]
    assert [type(part) for part in driven.said()][:1] == [Hello]


# ---------------------------------------------------------------- tickets


def test_a_ticket_is_claimed_and_acknowledged_once_the_claim_is_answered(driven):
    driven.ticket()
    acts = driven.take(Ack, PublishReport, Cancel)
    [claim] = [act.report.parts[0] for act in acts if isinstance(act, PublishReport)]

    assert (claim.request, claim.attempt, claim.token) == (an_id(1), 1, "t1")
    assert Cancel("q") in acts  # its only slot is spoken for
    assert Ack("d1") not in acts
    driven.hear(Void(request=an_id(1), attempt=1, token="t1", reason="another was first"))  # noqa: S106  # a token of a claim
    assert driven.take(Ack, Consume) == [Ack("d1"), Consume("q", 1)]


def test_a_granted_claim_starts_a_run_and_its_ticket_is_acknowledged_before_it_ends(driven):
    ref = driven.claim()
    driven.grant(ref)
    acts = driven.take(Ack, StartRun, Consume)

    assert [type(act) for act in acts] == [Ack, StartRun]
    assert (acts[1].slot, acts[1].token, acts[1].request.id) == (0, ref.token, ref.request)
    driven.grant(ref)  # said twice
    assert driven.take(Ack, StartRun) == []


def test_there_are_never_more_unanswered_claims_than_free_slots(two):
    for number in (1, 2, 3):
        two.ticket(number)
    acts = two.take(Requeue, PublishReport, Cancel)

    assert Requeue("d3") in acts
    assert sum(len(act.report.parts) for act in acts if isinstance(act, PublishReport)) == 2


def test_a_worker_that_is_full_draining_or_blind_gives_tickets_back(driven):
    driven.run()
    driven.ticket(2)
    assert driven.take(Requeue) == [Requeue("d2")]
    idle = Driven().up()
    idle.agent.drain()
    idle.ticket(3)
    assert idle.take(Requeue, Cancel) == [Requeue("d3"), Cancel("q")]
    blind = Driven()
    blind.agent.connected("e1")
    blind.ticket(4)

    assert blind.take(Requeue) == [Requeue("d4")]


def test_a_second_ticket_of_a_claim_under_way_is_not_claimed_and_neither_stays_unacknowledged(two):
    ref = two.claim(delivery="first")
    two.ticket(delivery="second")
    assert two.said(Claim) == []
    two.ticket(delivery="third")
    assert two.take(Ack) == [Ack("second")]
    two.grant(ref)

    assert two.take(Ack) == [Ack("third")]


def test_a_ticket_of_what_runs_here_is_acknowledged(two):
    two.run()
    two.ticket(delivery="again")

    assert two.take(Ack, Requeue) == [Ack("again")]
    two.ticket(attempt=2, delivery="later")  # another attempt is another thing
    assert two.said(Claim)[0].attempt == 2


@pytest.mark.parametrize(
    ("task", "data", "why"),
    [
        ("tagged", {"tag": "red"}, "can_run_on() says no"),
        ("tagged", {"tag": "raises"}, "can_run_on() raised KeyError"),
        ("tagged", {"tag": 1}, "does not accept the data"),
        ("nope", {}, "has no task 'nope'"),
        ("fresh", {}, "did not analyse cleanly"),
    ],
)
def test_a_ticket_that_it_must_not_run_is_refused_with_the_reason_and_its_metadata_version(driven, task, data, why):
    """P6."""
    driven.ticket(task=task, data=data)
    acts = driven.take(CountRefusal, PublishReport)
    assert acts[0] == CountRefusal("unknown" if task == "nope" else task)  # names of strangers are no labels
    [refusal] = acts[1].report.parts

    assert isinstance(refusal, Refusal)
    assert why in refusal.reason
    assert refusal.metadata_version == 1001
    assert beat_of(driven.beat()).claiming == []
    driven.hear(Void(request=refusal.request, attempt=1, token=refusal.token, reason="refused"))
    assert driven.take(Ack) == [Ack("d1")]


@pytest.mark.parametrize(
    ("lists", "why"),
    [
        ({"deny": ["noop"]}, "does not let it run the task noop: worker.deny_tasks names it"),
        ({"allow": ["tagged"]}, "does not let it run the task noop: worker.allow_tasks does not name it"),
    ],
)
def test_a_ticket_of_a_task_that_is_not_allowed_is_refused_with_the_setting(lists, why):
    driven = Driven(**lists).up()
    driven.ticket()
    [refusal] = driven.said(Claim, Refusal)

    assert isinstance(refusal, Refusal)
    assert why in refusal.reason


@pytest.mark.parametrize(
    ("requires", "why"),
    [
        ({"required": ["tag"], "properties": {"tag": {"const": "blue"}}}, None),
        ({"required": ["tag"], "properties": {"tag": {"const": "red"}}}, "do not satisfy the request's `requires`"),
        ({"$ref": "#/nowhere"}, "the request's `requires` could not be judged: "),
    ],
)
def test_what_a_request_itself_requires_is_judged_by_this_workers_own_metadata(requires, why):
    """P6."""
    driven = Driven(tag="blue").up()
    driven.ticket(requires=requires)
    [answer] = driven.said(Claim, Refusal)

    assert isinstance(answer, Claim if why is None else Refusal)
    assert why is None or why in answer.reason


def test_claims_and_refusals_are_said_again_with_each_heartbeat_until_they_are_answered(two):
    ref = two.claim(1)
    two.ticket(2, task="tagged", data={"tag": "red"})
    two.take()
    for _ in range(2):
        two.pass_time(HEARTBEAT_NS / SECOND)
        [act] = two.take(PublishReport, CountRefusal)  # it was counted when it was said first
        assert [(type(part), part.token) for part in act.report.parts if isinstance(part, Claim | Refusal)] == [
            (Claim, ref.token),
            (Refusal, "t2"),
        ]
    two.hear(Void(request=ref.request, attempt=1, token=ref.token, reason="no"))

    assert [type(part) for part in two.beat().parts] == [Heartbeat, Refusal]


def test_changed_metadata_turn_a_ticket_in_hand_that_was_not_said_yet_into_a_refusal():
    driven = Driven().up()
    driven.agent.disconnected()
    driven.ticket(task="tagged")
    driven.agent.analyzed(analysis(tag="red"))
    driven.agent.connected("e2")
    [refusal] = driven.said(Claim, Refusal)

    assert isinstance(refusal, Refusal)
    assert refusal.metadata_version == 1002


def test_a_claim_stays_a_claim_when_metadata_change_and_its_grant_is_handed_back_if_it_no_longer_fits(driven):
    """Else its lease, granted meanwhile, would look forgotten, and cost the request an attempt."""
    ref = driven.claim(task="tagged")
    driven.agent.analyzed(analysis(tag="red"))
    parts = driven.said()
    assert [type(part) for part in parts] == [Hello, Heartbeat, Claim]
    assert parts[1].claiming == [ref]
    assert parts[2].metadata_version == parts[0].metadata_version
    driven.grant(ref)

    assert driven.take(StartRun) == []


def test_what_is_granted_but_no_longer_fits_is_handed_back_with_the_reason(driven):
    ref = driven.claim(task="tagged")
    driven.agent.analyzed(analysis(tag="red"))
    driven.grant(ref)
    [outcome] = driven.spool()

    assert (outcome.result, outcome.token) == ("handed_back", ref.token)
    assert "can_run_on() says no" in outcome.reason.text


def test_a_refusal_stays_the_refusal_that_it_was_when_metadata_change(driven):
    """Its answer acknowledges the ticket, so a claim behind it could be granted to nobody."""
    driven.ticket(task="tagged", data={"tag": "red"})
    [first] = driven.said(Refusal)
    driven.agent.analyzed(analysis(tag="red"))

    assert driven.said(Claim, Refusal) == [first]


# ---------------------------------------------------------------- leases


def test_a_lease_counts_from_when_its_claim_was_first_sent(driven):
    driven.ticket()
    sent = driven.now
    driven.do()
    for _ in range(3):
        driven.beat()
    driven.take()
    driven.grant(RunRef(request=an_id(1), attempt=1, token="t1"))  # noqa: S106  # a token of a claim
    [start] = driven.take(StartRun)

    assert start.deadline_ns == sent + LEASE * SECOND


def test_a_lease_is_renewed_from_when_the_answered_heartbeat_was_sent(driven):
    ref, start = driven.run()
    first = driven.beat()
    first_sent = driven.now
    second = driven.beat()
    second_sent = driven.now
    driven.pass_time(3)
    driven.hear(Alive(seq=first.seq))
    assert driven.take(RenewRun) == [RenewRun(slot=0, token=ref.token, deadline_ns=first_sent + int(LEASE * SECOND))]
    driven.hear(Alive(seq=second.seq))
    assert driven.take(RenewRun) == [RenewRun(slot=0, token=ref.token, deadline_ns=second_sent + int(LEASE * SECOND))]
    driven.hear(Alive(seq=second.seq))
    driven.hear(Alive(seq=second.seq + 1000))  # of what was never sent

    assert driven.take(RenewRun) == []
    assert start.deadline_ns < first_sent + LEASE * SECOND


def test_a_lease_shorter_than_the_usual_pause_is_asked_for_several_times_in_its_term(driven):
    driven.run(lease=5.0)
    driven.take()
    asked = 0
    for _ in range(19):
        driven.pass_time(0.25)
        asked += len(driven.said(Heartbeat))

    assert asked >= 2


def test_an_answer_that_comes_after_that_of_a_later_heartbeat_takes_nothing_back(driven):
    driven.run()
    first, second = driven.beat(), driven.beat()
    driven.hear(Alive(seq=second.seq))
    assert len(driven.take(RenewRun)) == 1
    driven.hear(Alive(seq=first.seq))

    assert driven.take(RenewRun) == []


def test_only_runs_that_a_heartbeat_listed_are_renewed_by_its_answer(two):
    two.run(1)
    report = two.beat()
    _, later = two.run(2)
    two.hear(Alive(seq=report.seq))

    assert [act.slot for act in two.take(RenewRun)] == [0]
    assert later.slot == 1


def test_a_run_is_killed_at_its_deadline_and_not_before_and_is_lost(driven):
    ref, start = driven.run()
    driven.now = start.deadline_ns - 1
    driven.agent.tick(driven.now)
    assert driven.take(KillSlot) == []
    driven.now += 1
    driven.agent.tick(driven.now)
    assert [act.slot for act in driven.take(KillSlot)] == [0]
    driven.pass_time(1)
    assert driven.take(KillSlot) == []  # once is enough
    assert beat_of(driven.beat()).slots == 0  # it is nobody's next slot
    driven.agent.slot_gone(0, -9)
    [outcome] = driven.spool()

    assert (outcome.result, outcome.token) == ("lost", ref.token)
    assert "lease of 60 s was not renewed" in outcome.reason.text


def test_a_slot_that_was_faster_to_end_its_run_at_the_deadline_has_lost_it_too(driven):
    driven.run()
    driven.agent.slot_said(0, SlotProgress(stage="build", fraction=None))
    driven.agent.slot_gone(0, SLOT_LAPSED)
    [outcome] = driven.spool()

    assert (outcome.result, outcome.reason.stage) == ("lost", "build")
    assert "lease of 60 s was not renewed" in outcome.reason.text


def test_a_grant_that_comes_after_its_lease_is_handed_back(driven):
    ref = driven.claim()
    driven.pass_time(LEASE)
    driven.grant(ref)
    acts = driven.take(Ack, StartRun, Spool)

    assert [type(act) for act in acts] == [Ack, Spool]
    assert acts[1].outcome.result == "handed_back"


def test_a_run_that_the_scheduler_does_not_know_is_killed_and_forgotten(two):
    ref, _ = two.run(1)
    other, _ = two.run(2)
    report = two.beat()
    two.hear(Alive(seq=report.seq, void=[ref]))
    acts = two.take(KillSlot, RenewRun)
    assert [type(act) for act in acts] == [KillSlot, RenewRun]
    assert [act.slot for act in acts] == [0, 1]
    two.agent.slot_gone(0, -9)

    assert two.spool() == []
    assert [run.token for run in beat_of(two.beat()).running] == [other.token]


# ---------------------------------------------------------------- aborts


def test_an_abort_is_passed_on_once_and_the_slot_killed_if_its_task_does_not_stop_in_its_own_grace(driven):
    ref, _ = driven.run(task="tagged", lease=3600)
    abort = Abort(request=ref.request, attempt=1, token=ref.token, reason="not wanted")
    driven.hear(abort, abort)
    driven.hear(abort)
    assert driven.take(StopRunIn) == [StopRunIn(slot=0, token=ref.token, reason="not wanted")]
    driven.pass_time(15 + ABORT_MARGIN_NS / SECOND - 0.01)
    assert driven.take(KillSlot) == []
    driven.pass_time(0.02)
    assert len(driven.take(KillSlot)) == 1
    driven.agent.slot_gone(0, -9)
    [outcome] = driven.spool()

    assert outcome.result == "aborted"
    assert "not wanted (it did not stop in time" in outcome.reason.text


def test_a_task_that_says_nothing_of_its_grace_gets_the_usual_one(driven):
    ref, _ = driven.run()
    driven.hear(Abort(request=ref.request, attempt=1, token=ref.token, reason="not wanted"))
    driven.pass_time(DEFAULT_GRACE + ABORT_MARGIN_NS / SECOND)

    assert len(driven.take(KillSlot)) == 1


def test_an_aborted_run_that_ends_by_itself_is_what_it_says(driven):
    ref, _ = driven.run()
    driven.hear(Abort(request=ref.request, attempt=1, token=ref.token, reason="not wanted"))
    driven.agent.slot_said(0, SlotEnded(result="success"))

    assert [outcome.result for outcome in driven.spool()] == ["success"]


def test_an_abort_of_what_does_not_run_here_does_nothing(driven):
    driven.hear(Abort(request=an_id(1), attempt=1, token="strange", reason="not wanted"))  # noqa: S106  # of a claim

    assert driven.take(StopRunIn, KillSlot) == []


def test_a_claim_whose_request_is_aborted_is_not_started_when_it_is_granted(driven):
    ref = driven.claim()
    driven.hear(Abort(request=ref.request, attempt=1, token=ref.token, reason="not wanted"))
    driven.grant(ref)
    [outcome] = driven.spool()

    assert driven.take(StartRun) == []
    assert (outcome.result, outcome.reason.text) == ("aborted", "not wanted")


# ---------------------------------------------------------------- timeouts

OVER = "ran longer than its timeout of 30 s"


def test_a_run_that_is_over_its_timeout_is_told_to_stop_and_ends_in_error_with_what_it_has_made(driven):
    ref, _ = driven.run(timeout=30)
    made = Artifact(handle="a0", category="a:log", name="log")
    driven.pass_time(29.9)
    assert driven.take(StopRunIn) == []
    driven.pass_time(0.2)
    assert driven.take(StopRunIn) == [StopRunIn(slot=0, token=ref.token, reason=OVER)]
    driven.agent.slot_said(0, SlotProgress(stage="build", fraction=None))
    driven.agent.slot_said(0, SlotEnded(result="aborted", reason=Reason(text=OVER), artifacts=[made]))
    [outcome] = driven.spool()

    assert (outcome.token, outcome.result, outcome.artifacts) == (ref.token, "error", [made])
    assert outcome.reason == Reason(text=OVER, stage="build", status="timeout")


def test_a_run_that_ignores_its_timeout_is_killed_behind_the_tasks_grace(driven):
    driven.run(task="tagged", lease=3600, timeout=30)
    driven.pass_time(30)
    driven.take()
    driven.pass_time(15 + ABORT_MARGIN_NS / SECOND - 0.01)
    assert driven.take(KillSlot) == []
    driven.pass_time(0.02)
    assert len(driven.take(KillSlot)) == 1
    driven.agent.slot_gone(0, -9)
    [outcome] = driven.spool()

    assert (outcome.result, outcome.reason.status) == ("error", "timeout")
    assert outcome.reason.text.startswith(f"{OVER} (it did not stop in time")


def test_a_slot_ends_a_run_over_its_timeout_by_itself_if_nobody_tells_it_to(driven):
    _, start = driven.run(task="tagged", lease=3600, timeout=30)
    alone_ns = driven.now + int((30 + 15) * SECOND) + ABORT_MARGIN_NS + BEHIND_NS
    assert start.deadline_ns == alone_ns
    report = driven.beat()
    driven.hear(Alive(seq=report.seq))
    assert driven.take(RenewRun) == []  # its lease is longer, and its time is not
    driven.agent.slot_gone(0, SLOT_LAPSED)
    [outcome] = driven.spool()

    assert (outcome.result, outcome.reason.status) == ("error", "timeout")


def test_a_lease_that_ends_before_the_timeout_is_what_counts(driven):
    _, start = driven.run(timeout=3000)
    assert start.deadline_ns == driven.now + int(LEASE * SECOND)
    driven.agent.slot_gone(0, SLOT_LAPSED)

    assert [outcome.result for outcome in driven.spool()] == ["lost"]


def test_a_run_that_succeeds_just_when_its_time_is_over_has_succeeded(driven):
    driven.run(timeout=30)
    driven.pass_time(31)
    driven.agent.slot_said(0, SlotEnded(result="success"))

    assert [outcome.result for outcome in driven.spool()] == ["success"]


def test_an_abort_that_came_before_the_timeout_stays_an_abort(driven):
    ref, _ = driven.run(timeout=30)
    driven.pass_time(29.9)
    driven.hear(Abort(request=ref.request, attempt=1, token=ref.token, reason="not wanted"))
    driven.pass_time(2)
    assert driven.take(StopRunIn) == [StopRunIn(slot=0, token=ref.token, reason="not wanted")]
    driven.agent.slot_said(0, SlotEnded(result="aborted", reason=Reason(text="not wanted")))

    assert [outcome.result for outcome in driven.spool()] == ["aborted"]


def test_an_abort_of_a_run_that_is_over_its_timeout_gives_it_no_more_time(driven):
    ref, _ = driven.run(timeout=30)
    driven.pass_time(30)
    driven.pass_time(DEFAULT_GRACE)
    driven.take()
    driven.hear(Abort(request=ref.request, attempt=1, token=ref.token, reason="not wanted"))
    assert driven.take(StopRunIn) == []
    driven.pass_time(ABORT_MARGIN_NS / SECOND)

    assert len(driven.take(KillSlot)) == 1


def test_a_lower_term_counts_when_the_highest_was_silent_while_this_worker_listened_and_not_while_it_was_frozen(driven):
    def hear(term, queue):
        driven.agent.verdict(Verdict(term=term, parts=[Assign(queue=queue)]), driven.now)
        return driven.agent._assigned

    assert hear(9, "q9") == "q9"
    driven.now += 100 * SECOND
    assert hear(8, "q8") == "q9"
    for _ in range(61):
        driven.now += SECOND
        driven.agent.take_acts(driven.now)
    assert hear(8, "q8") == "q8"


# ---------------------------------------------------------------- what runs alone


def test_what_runs_alone_is_claimed_at_once_and_starts_when_nothing_else_runs(two):
    other, _ = two.run(1)
    ref = two.claim(2, alone=True)
    assert two.agent.consuming is None
    two.ticket(3)
    assert [act.delivery for act in two.take(Requeue)] == ["d3"]
    two.grant(ref)
    assert two.take(StartRun) == []
    beat = beat_of(two.beat())
    assert ({run.token for run in beat.running}, beat.slots) == ({other.token, ref.token}, 0)
    two.agent.slot_said(0, SlotEnded(result="success"))
    [spool] = two.take(StartRun, Spool)
    two.pass_time(1)
    two.agent.spooled(spool.outcome)  # what has ended must not be lost with what may kill this worker
    began = two.now / SECOND
    [start] = two.take(StartRun)
    [run] = beat_of(two.beat()).running
    assert (run.stage, run.since) == ("start", began)

    assert (start.token, start.slot) == (ref.token, 0)
    assert two.agent.consuming is None
    two.agent.slot_said(0, SlotEnded(result="success"))
    assert beat_of([act.report for act in two.take(PublishReport)][-1]).slots == 2
    assert two.agent.consuming == "q"


def test_what_waits_to_be_alone_is_handed_back_once_this_worker_may_not_run_it(two):
    two.agent.analyzed(analysis(tag="red"))
    other, _ = two.run(1)
    ref = two.claim(2, task="tagged", data={"tag": "red"}, alone=True)
    two.grant(ref)
    two.agent.analyzed(analysis(tag="red", cores=5))
    assert two.take(Spool) == []
    two.agent.analyzed(analysis(tag="blue"))
    [spooled] = two.take(Spool)
    two.agent.slot_said(0, SlotEnded(result="success"))  # now it would be alone
    acts = two.take(Spool | StartRun)

    assert (spooled.outcome.token, spooled.outcome.result) == (ref.token, "handed_back")
    assert "it waited to run alone here, and" in spooled.outcome.reason.text
    assert [type(act) for act in acts] == [Spool]
    assert acts[0].outcome.token == other.token


def test_of_two_that_run_alone_one_waits_for_the_other(two):
    two.grant(two.claim(1, alone=True))
    assert len(two.take(StartRun)) == 1
    two.ticket(2, alone=True)

    assert [act.delivery for act in two.take(Requeue)] == ["d2"]


def test_what_runs_alone_waits_for_claims_under_way_too(two):
    other = two.claim(1)
    two.ticket(2, alone=True)
    alone = two.said(Claim)[-1]
    two.grant(alone)
    assert two.take(StartRun) == []
    two.grant(other)
    assert [act.token for act in two.take(StartRun)] == [other.token]
    two.agent.slot_said(0, SlotEnded(result="success"))
    two.spool()

    assert [act.token for act in two.take(StartRun)] == [alone.token]


def test_the_lease_of_what_waits_to_be_alone_is_renewed_and_its_time_counts_from_its_start(two):
    two.run(1, lease=3600)
    ref = two.claim(2, alone=True, timeout=100)
    two.grant(ref)
    two.take()
    for _ in range(20):
        two.hear(Alive(seq=two.beat().seq))
    assert two.take(Spool, KillSlot) == []
    two.agent.slot_said(0, SlotEnded(result="success"))
    two.spool()
    [start] = two.take(StartRun)

    assert start.token == ref.token
    two.pass_time(30)
    assert two.take(StopRunIn) == []


@pytest.mark.parametrize(
    ("end", "result"), [("abort", "aborted"), ("lease", "handed_back"), ("drain", "handed_back"), ("void", None)]
)
def test_what_waits_to_be_alone_can_end_before_it_began(two, end, result):
    two.run(1, lease=3600)
    ref = two.claim(2, alone=True)
    two.grant(ref)
    two.spool()
    match end:
        case "abort":
            two.hear(Abort(request=ref.request, attempt=1, token=ref.token, reason="not wanted"))
        case "lease":
            two.pass_time(LEASE)
        case "drain":
            two.agent.drain()
        case "void":
            two.hear(Alive(seq=two.beat().seq, void=[ref]))
    outcomes = two.spool()

    assert [(one.token, one.result) for one in outcomes] == ([(ref.token, result)] if result else [])
    assert [run.token for run in beat_of(two.beat()).running] != [ref.token]
    assert (two.agent.consuming == "q") is (end != "drain")


def test_one_that_is_refused_keeps_nobody_away(two):
    two.ticket(1, task="tagged", data={"tag": "other"}, alone=True)
    two.do()

    assert two.agent.consuming == "q"


# ---------------------------------------------------------------- told to drain


def test_a_worker_that_is_told_to_drain_takes_nothing_more_until_a_queue_is_assigned(driven):
    driven.run()
    driven.hear(Assign(queue=None), Drain(reason="new kernel"))
    driven.ticket(2)
    [beat] = driven.said(Heartbeat)
    driven.ticket(3)
    assert len(driven.take(Requeue)) == 1
    assert (beat.draining, beat.leaving, beat.slots, len(beat.running)) == (True, False, 0, 1)
    driven.agent.slot_said(0, SlotEnded(result="success"))
    driven.agent.slot_said(0, SlotReady())
    assert driven.agent.consuming is None
    assert not driven.agent.wants_to_end()
    driven.hear(Assign(queue="q"))

    assert driven.agent.consuming == "q"
    assert not driven.said(Heartbeat)[-1].draining


def test_a_worker_that_is_told_to_end_does_so_when_nothing_runs_and_all_is_recorded(driven):
    ref, _ = driven.run()
    driven.hear(Assign(queue=None), Drain(reason="new kernel", stop=True))
    assert [beat.leaving for beat in driven.said(Heartbeat)] == [True]
    assert not driven.agent.wants_to_end()
    driven.agent.slot_said(0, SlotEnded(result="success"))
    driven.spool()
    assert not driven.agent.wants_to_end()
    driven.hear(Recorded(request=ref.request, attempt=1, token=ref.token, status="recorded"))

    assert driven.agent.wants_to_end()
    driven.hear(Assign(queue="q"))
    assert driven.agent.consuming is None  # it is as good as gone


# ---------------------------------------------------------------- slots


@pytest.mark.parametrize(
    ("exit_code", "result", "why"),
    [
        (-9, "lost", "SIGKILL"),
        (-11, "error", "signal 11"),
        (-6, "error", "signal 6"),
        (0, "error", "exit code 0"),
        (1, "error", "exit code 1"),
        (23, "error", "exit code 23"),
    ],
)
def test_the_death_of_a_slot_in_the_middle_of_a_run_is_judged(driven, exit_code, result, why):
    driven.run()
    driven.agent.slot_said(0, SlotProgress(stage="build", fraction=0.5))
    driven.agent.slot_said(0, SlotOutput(text="x" * 5000 + "\nE: the cause\n\n"))
    driven.agent.slot_gone(0, exit_code)
    [outcome] = driven.spool()

    assert (outcome.result, outcome.reason.stage, outcome.reason.line) == (result, "build", "E: the cause")
    assert why in outcome.reason.text
    assert outcome.reason.exit_code == exit_code


def test_a_slot_that_ends_without_a_run_harms_nobody_and_is_not_counted_until_it_is_back(driven):
    driven.agent.slot_gone(0, 0)
    assert beat_of(driven.take(PublishReport)[0].report).slots == 0
    driven.ticket()
    assert driven.take(Requeue) == [Requeue("d1")]
    driven.agent.slot_said(0, SlotReady())

    assert driven.take(Consume) == [Consume("q", 1)]


def test_a_slot_takes_its_next_run_at_once_unless_it_ends_its_process(driven):
    driven.run()
    driven.agent.slot_said(0, SlotEnded(result="success"))
    assert driven.take(Consume) == [Consume("q", 1)]
    driven.run(2)
    driven.agent.slot_said(0, SlotEnded(result="success", last=True))
    assert driven.take(Consume) == []
    assert beat_of(driven.beat()).slots == 0
    assert driven.agent.slot_states() == {"idle": 0, "running": 0, "starting": 1}
    driven.agent.slot_gone(0, 0)
    driven.agent.slot_said(0, SlotReady())
    acts = driven.take(Consume, PublishReport)

    assert acts[0] == Consume("q", 1)
    assert beat_of(acts[1].report).slots == 1


def test_what_a_slot_says_while_it_is_being_killed_does_not_count(driven):
    ref, start = driven.run()
    driven.now = start.deadline_ns
    driven.agent.tick(driven.now)
    driven.agent.slot_said(0, SlotEnded(result="success"))
    driven.agent.slot_said(0, SlotReady())
    assert driven.take(Spool, Consume) == []
    driven.agent.slot_gone(0, -9)

    assert [(outcome.result, outcome.token) for outcome in driven.spool()] == [("lost", ref.token)]


def test_output_and_progress_reach_those_who_follow_in_order_and_late_words_reach_nobody(driven):
    ref, _ = driven.run()
    driven.agent.slot_said(0, SlotOutput(text="one"))
    driven.agent.slot_said(0, SlotProgress(stage="build", fraction=0.5))
    driven.agent.slot_said(0, SlotOutput(text="two"))
    driven.agent.slot_said(0, SlotProgress(stage=None, fraction=0.75))
    messages = [act.message for act in driven.take(PublishLog)]

    assert [(text.seq, text.text) for text in messages if isinstance(text, LogText)] == [(1, "one"), (2, "two")]
    assert [(one.stage, one.fraction) for one in messages if isinstance(one, LogProgress)] == [
        ("build", 0.5),
        ("build", 0.75),
    ]
    [run] = beat_of(driven.beat()).running
    assert (run.token, run.stage, run.fraction) == (ref.token, "build", 0.75)
    driven.agent.slot_said(0, SlotEnded(result="success"))
    driven.agent.slot_said(0, SlotOutput(text="late"))
    assert driven.take(PublishLog) == []


def test_a_new_stage_is_reported_soon_and_a_fraction_with_the_next_heartbeat(driven):
    driven.run()
    driven.beat()
    driven.agent.slot_said(0, SlotProgress(stage="build", fraction=None))
    driven.pass_time(0.5)
    assert driven.said(Heartbeat) == []
    driven.pass_time(0.5)
    assert len(driven.said(Heartbeat)) == 1
    driven.agent.slot_said(0, SlotProgress(stage="build", fraction=0.5))
    driven.pass_time(2)

    assert driven.said(Heartbeat) == []


# ---------------------------------------------------------------- outcomes


def end(driven, **fields):
    driven.agent.slot_said(0, SlotEnded(**{"result": "success"} | fields))
    driven.agent.slot_said(0, SlotReady())


def test_an_outcome_is_sent_only_once_it_is_on_disk(driven):
    """P4."""
    ref, _ = driven.run()
    end(driven, result="failure", reason=Reason(text="no"), again=True, artifacts=[])
    [spool] = driven.take(Spool, PublishOutcomes)
    for _ in range(3):
        driven.beat()
        assert driven.take(PublishOutcomes) == []
    driven.agent.spooled(spool.outcome)
    [sent] = driven.take(PublishOutcomes)

    assert sent.outcomes.outcomes == [spool.outcome]
    assert (sent.outcomes.worker, sent.outcomes.epoch) == ("anna", "e1")
    assert (spool.outcome.token, spool.outcome.result, spool.outcome.again) == (ref.token, "failure", True)
    assert (spool.outcome.started, spool.outcome.ended) == (START / SECOND, START / SECOND)


@pytest.mark.parametrize("status", ["recorded", "refused", "unknown"])
def test_an_outcome_is_sent_with_each_heartbeat_until_it_is_answered_and_then_removed(driven, status):
    driven.run()
    end(driven)
    [outcome] = driven.spool()
    assert len(driven.take(PublishOutcomes)) == 1
    for _ in range(2):
        driven.pass_time(HEARTBEAT_NS / SECOND)
        acts = driven.take(PublishOutcomes, PublishReport)
        assert [type(act) for act in acts] == [PublishReport, PublishOutcomes]
        assert [ref.token for ref in beat_of(acts[0].report).unsettled] == [outcome.token]
    driven.hear(Recorded(request=outcome.request, attempt=1, token=outcome.token, status=status))
    [unspool] = driven.take(Unspool)
    assert unspool.ref.token == outcome.token
    assert driven.agent.unsettled() == 0
    driven.hear(Recorded(request=outcome.request, attempt=1, token=outcome.token, status=status))
    driven.pass_time(HEARTBEAT_NS / SECOND)

    assert driven.take(PublishOutcomes, Unspool) == []


def test_what_a_predecessor_left_in_the_spool_is_sent_at_once_and_named_until_it_is_answered():
    driven = Driven()
    left = Outcome(request=an_id(9), attempt=2, token="former", result="success", started=1.0, ended=2.0)  # noqa: S106  # a token of a claim
    driven.agent.spooled(left)
    driven.agent.analyzed(analysis())
    driven.agent.connected("e1")
    acts = driven.take(PublishReport, PublishOutcomes)

    assert [ref.token for ref in beat_of(acts[0].report).unsettled] == ["former"]
    assert acts[1].outcomes.outcomes == [left]


def test_outcomes_that_are_large_together_travel_in_several_messages():
    driven = Driven()
    bulk = Artifact(handle="a", category="test:data", name="bulk", data={"x": "y" * (MAX_MESSAGE_BYTES // 5)})
    for number in range(5):
        driven.agent.spooled(
            Outcome(
                request=an_id(number),
                attempt=1,
                token=f"t{number}",
                result="success",
                started=1.0,
                ended=2.0,
                artifacts=[bulk],
            )
        )
    driven.agent.analyzed(analysis())
    driven.agent.connected("e1")
    sets = driven.take(PublishOutcomes)

    assert [outcome.token for one in sets for outcome in one.outcomes.outcomes] == ["t0", "t1", "t2", "t3", "t4"]
    assert all(len(encode(one.outcomes)) < MAX_MESSAGE_BYTES for one in sets)


def test_a_reason_without_end_is_cut(driven):
    driven.run()
    end(driven, result="failure", reason=Reason(text="x" * 1_000_000, exit_code=2, line="y" * 1_000_000))
    [outcome] = driven.spool()

    assert len(encode(outcome)) < 20_000
    assert (outcome.reason.exit_code, outcome.reason.text[:5]) == (2, "xxxxx")


# ---------------------------------------------------------------- connections and schedulers


def test_without_a_connection_it_says_nothing_and_keeps_running(driven):
    driven.run()
    driven.agent.disconnected()
    driven.pass_time(20)
    assert driven.take() == []
    driven.agent.connected("e2")
    report = driven.take(PublishReport)[0].report

    assert report.epoch == "e2"
    assert [type(part) for part in report.parts] == [Hello, Heartbeat]
    assert len(beat_of(report).running) == 1
    assert driven.agent.heard is False


def test_after_a_reconnect_all_that_is_unanswered_is_said_again_with_the_same_tokens():
    driven = Driven(slots=3).up()
    driven.run(1)
    driven.agent.slot_said(0, SlotEnded(result="success"))
    [outcome] = driven.spool()
    driven.take()
    running, _ = driven.run(2)
    claim = driven.claim(3)
    driven.agent.disconnected()
    driven.agent.connected("e2")
    acts = driven.take(PublishReport, PublishOutcomes, Consume)

    assert Consume("q", 1) not in acts  # until it is assigned anew
    [report] = [act.report for act in acts if isinstance(act, PublishReport)]
    assert [part.token for part in report.parts if isinstance(part, Claim)] == [claim.token]
    assert [run.token for run in beat_of(report).running] == [running.token]
    [sent] = [act.outcomes for act in acts if isinstance(act, PublishOutcomes)]
    assert (sent.epoch, sent.outcomes) == ("e2", [outcome])


def test_on_a_new_connection_it_consumes_nothing_until_it_is_assigned_a_queue_anew(driven):
    driven.agent.disconnected()
    driven.agent.connected("e2")
    assert driven.take(Consume) == []
    driven.hear(Assign(queue="q"))

    assert driven.take(Consume) == [Consume("q", 1)]


def test_a_ticket_that_is_redelivered_on_a_new_connection_is_not_claimed_twice(driven):
    ref = driven.claim(delivery="old")
    driven.agent.disconnected()
    driven.agent.connected("e2")
    driven.take()
    driven.ticket(delivery="new")
    assert driven.said(Claim) == []
    driven.grant(ref)

    acts = driven.take(Ack, StartRun)
    assert acts[-2:] == [Ack("new"), acts[-1]]
    assert isinstance(acts[-1], StartRun)


def test_a_higher_term_gets_everything_that_is_unsettled_again(two):
    two.run(1)
    two.agent.slot_said(0, SlotEnded(result="success"))
    [outcome] = two.spool()
    claim = two.claim(2)
    two.take()
    two.term = 2
    two.hear(Introduce())
    acts = two.take(PublishReport, PublishOutcomes)

    parts = acts[0].report.parts
    assert [type(part) for part in parts] == [Hello, Heartbeat, Claim]
    assert parts[2].token == claim.token
    assert acts[1].outcomes.outcomes == [outcome]


def test_the_words_of_a_lower_term_count_for_nothing(driven):
    driven.term = 2
    driven.hear(Introduce())
    ref = driven.claim()
    driven.hear(
        Granted(request=ref.request, attempt=1, token=ref.token, lease=LEASE, inputs=[]),
        Assign(queue="old"),
        Introduce(),
        term=1,
    )

    assert driven.take(StartRun, Ack, Consume, Analyze) == []
    driven.grant(ref)
    assert len(driven.take(StartRun)) == 1


def test_each_report_of_an_agent_has_a_higher_number(driven):
    numbers = [driven.beat().seq for _ in range(3)]
    driven.agent.disconnected()
    driven.agent.connected("e2")
    numbers.append(driven.take(PublishReport)[0].report.seq)

    assert numbers == sorted(set(numbers))


# ---------------------------------------------------------------- leaving


def test_a_worker_that_drains_takes_nothing_more_and_lets_run_what_runs(two):
    two.run(1)
    ref = two.claim(2)
    two.agent.drain()
    acts = two.take(Cancel, PublishReport)
    assert acts == [acts[0]]
    beat = beat_of(acts[0].report)
    assert (beat.slots, beat.queue, len(beat.running), len(beat.claiming)) == (0, None, 1, 1)
    assert two.agent.busy()
    two.grant(ref)
    [outcome] = two.spool()
    assert (outcome.result, outcome.token) == ("handed_back", ref.token)
    assert two.agent.busy()
    end(two)

    assert not two.agent.busy()
    assert two.agent.unsettled() == 2


def test_runs_that_are_stopped_are_handed_back(driven):
    ref, _ = driven.run()
    driven.agent.drain()
    driven.agent.stop_runs()
    driven.agent.stop_runs()
    assert [act.slot for act in driven.take(KillSlot)] == [0]
    driven.agent.slot_gone(0, -9)
    [outcome] = driven.spool()

    assert (outcome.result, outcome.token) == ("handed_back", ref.token)


def test_it_takes_leave_only_of_who_can_hear_it(driven):
    driven.agent.bye("stopped")
    assert driven.said(Bye) == [Bye(reason="stopped")]
    driven.agent.disconnected()
    driven.agent.bye("stopped")

    assert driven.take(PublishReport) == []


# ---------------------------------------------------------------- whatever comes


class AgentKeepsItsSlots(RuleBasedStateMachine):
    """Whatever comes in whatever order: each run begins once at most and ends once, and little is taken ahead."""

    SLOTS = 2

    def __init__(self):
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        self.patches.setattr("mqworker.agent.GIVEN_PART", 1.0)  # so that few ends make it give slots several runs
        self.driven = Driven(slots=self.SLOTS).up()
        self.agent = self.driven.agent
        self.connected = True
        self.epochs = itertools.count(2)
        self.inside: dict[int, list[str]] = {slot: [] for slot in range(self.SLOTS)}  # as each process knows it
        self.killed: set[int] = set()
        self.recalled: list[int] = []  # slots that have not answered
        self.claims: dict[str, Claim] = {}  # without an answer
        self.in_hand: set[str] = set()  # deliveries that are neither acknowledged nor requeued
        self.deliveries = itertools.count(1)
        self.begun: dict[str, None] = {}
        self.deadlines: dict[str, int] = {}  # of what was started
        self.over: set[str] = set()  # has an outcome, or was void and begun
        self.void: set[str] = set()
        self.consuming = None
        self.settle()
        self.consuming = "q"

    def teardown(self):
        self.patches.undo()

    def settle(self):
        for act in self.driven.take():
            match act:
                case Ack(delivery) | Requeue(delivery):
                    self.in_hand.discard(delivery)
                case StartRun(slot=slot, token=token, deadline_ns=deadline):
                    assert slot not in self.killed
                    assert token not in self.begun
                    assert token not in self.over
                    assert not [inside for inside in self.inside.values() if token in inside]
                    assert deadline > self.driven.now
                    self.inside[slot].append(token)
                    self.deadlines[token] = deadline
                    self.begin(slot)
                case RenewRun(token=token, deadline_ns=deadline):
                    assert deadline > self.deadlines[token]
                    self.deadlines[token] = deadline
                case RecallRuns(slot=slot):
                    assert slot not in self.recalled
                    self.recalled.append(slot)
                case KillSlot(slot=slot):
                    assert self.inside[slot]
                    self.killed.add(slot)
                case Spool(outcome=outcome):
                    assert outcome.token not in self.over
                    self.over.add(outcome.token)
                    self.agent.spooled(outcome)
                case Discard(token=token):
                    self.over.add(token)
                case Consume():
                    assert self.consuming is None
                    assert self.connected
                    self.consuming = act.queue
                case Cancel():
                    assert self.consuming == act.queue
                    self.consuming = None
                case PublishReport(report):
                    assert self.connected
                    self.claims |= {part.token: part for part in report.parts if isinstance(part, Claim)}

    def begin(self, slot):
        """Let a slot begin the first of its runs, as it does by itself."""
        self.begun |= dict.fromkeys(self.inside[slot][:1])

    @precondition(lambda self: self.connected)
    @rule(first=st.integers(1, 12), number=st.integers(1, 3), attempt=st.integers(1, 2))
    def tickets_come(self, first, number, attempt):
        delivery = f"d{next(self.deliveries)}"
        self.in_hand.add(delivery)
        free, asking = self.agent._free(), len(self.agent._asking)
        self.driven.tickets(range(first, first + number), attempt=attempt, delivery=delivery)
        assert free > 0 or len(self.agent._asking) == asking
        self.settle()

    @precondition(lambda self: self.connected and self.claims)
    @rule(data=st.data(), granted=st.booleans(), again=st.booleans())
    def a_claim_is_answered(self, data, granted, again):
        claim = self.claims[data.draw(st.sampled_from(sorted(self.claims)))]
        if granted:
            self.driven.grant(claim)
        else:
            self.driven.hear(Void(request=claim.request, attempt=claim.attempt, token=claim.token, reason="no"))
        if not again:
            del self.claims[claim.token]
        self.settle()

    @precondition(lambda self: self.claims)
    @rule()
    def all_claims_are_granted(self):
        if self.connected:
            self.driven.hear(*(self.driven.granted(claim) for claim in self.claims.values()))
            self.claims.clear()
            self.settle()

    @rule(slot=st.integers(0, SLOTS - 1), number=st.integers(1, 3), last=st.booleans())
    def runs_end(self, slot, number, last):
        ended = self.inside[slot][:number]
        for token in ended:
            self.inside[slot].remove(token)
            goes = last and token == ended[-1]
            if goes:
                self.inside[slot] = []
            self.begin(slot)
            self.agent.slot_said(slot, SlotEnded(result="success", last=goes))
            self.settle()
            if goes:
                self.die(slot, 0)

    @precondition(lambda self: self.recalled)
    @rule()
    def a_recall_is_answered(self):
        slot = self.recalled.pop(0)
        begun, back = self.inside[slot][:1], self.inside[slot][1:]
        self.inside[slot] = begun
        self.agent.slot_said(slot, SlotRecalled(tokens=back))
        self.settle()

    @rule(slot=st.integers(0, SLOTS - 1), exit_code=st.sampled_from([-9, 1, SLOT_LAPSED]))
    def a_slot_dies_and_is_replaced(self, slot, exit_code):
        self.die(slot, exit_code)

    def die(self, slot, exit_code):
        self.inside[slot] = []
        self.recalled = [one for one in self.recalled if one != slot]
        self.agent.slot_gone(slot, exit_code)
        self.killed.discard(slot)
        self.settle()
        self.agent.slot_said(slot, SlotReady())
        self.settle()

    @rule(seconds=st.sampled_from([0.01, 0.25, 5.0, 30.0, 61.0]))
    def time_passes(self, seconds):
        self.driven.pass_time(seconds)
        self.settle()
        for slot, inside in self.inside.items():
            if inside and slot not in self.killed:
                assert self.deadlines[inside[0]] > self.driven.now  # else it would have been killed

    @precondition(lambda self: self.connected)
    @rule(void=st.booleans())
    def a_heartbeat_is_answered(self, void):
        running = [RunRef(request=an_id(1), attempt=1, token=token) for token in self.agent._runs] if void else []
        self.void |= {ref.token for ref in running}
        self.driven.hear(Alive(seq=self.agent._seq, void=running))
        self.settle()

    @rule()
    def the_connection_is_lost_or_made(self):
        self.connected = not self.connected
        self.consuming = None
        if self.connected:
            self.agent.connected(f"e{next(self.epochs)}")
            self.driven.hear(Assign(queue="q"))
        else:
            self.in_hand.clear()  # the broker has them again
            self.agent.disconnected()
        self.settle()

    @invariant()
    def no_ticket_is_kept_that_is_not_claimed(self):
        assert len(self.in_hand) <= len(self.agent._asking)

    @invariant()
    def it_consumes_while_it_has_room(self):
        free = self.agent._free()
        if self.consuming is not None:
            assert self.connected
            assert free > 0
        elif self.connected:
            assert free <= self.agent._ahead() // 4

    @invariant()
    def every_run_is_in_a_slot_or_waits_or_has_an_outcome_or_was_void(self):
        waiting = [run.token for run in self.agent._queue]
        inside = [token for slot in self.agent._slots.values() for token in slot.runs]
        dying = [run.token for slot in self.agent._slots.values() for run in slot.overtaken]
        assert sorted([*waiting, *inside, *dying]) == sorted(self.agent._runs)
        for token in self.deadlines:
            if token in self.begun or token not in self.void:
                assert (token in self.over) != (token in self.agent._runs)
        for slot, inside in self.inside.items():
            if slot not in self.killed:
                assert self.agent._slots[slot].runs == inside


TestAgentKeepsItsSlots = AgentKeepsItsSlots.TestCase
TestAgentKeepsItsSlots.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize(
    ("told", "left", "news"),
    [
        ("", "last\n", ["last\n"]),
        ("first\n", "last\n", ["last\n"]),
        ("first\nlast", "last\n", ["\n"]),  # told, but not yet out of the pipe
        ("last\n", "last\n", []),
        ("first\n", "", []),
    ],
)
def test_what_a_slot_leaves_in_its_pipe_is_told_once(driven, told, left, news):
    driven.run()
    driven.agent.slot_said(0, SlotOutput(text=told))
    driven.take(PublishLog)
    driven.agent.slot_gone(0, 23, left)

    assert [act.message.text for act in driven.take(PublishLog) if isinstance(act.message, LogText)] == news


# ---------------------------------------------------------------- a host that is unwell


def test_while_something_is_in_the_way_it_takes_no_work_says_so_and_goes_on_by_itself(driven, caplog):
    driven.agent.hold("free disk", "there is too little")
    driven.agent.hold("free disk", "there is too little")
    acts = driven.take(Cancel, PublishReport)
    assert isinstance(acts[0], Cancel)
    beat = beat_of(acts[1].report)
    assert (beat.held, beat.slots) == ("there is too little", 0)
    driven.ticket()
    assert driven.take(Requeue) == [Requeue("d1")]
    assert [record.message for record in caplog.records].count("the worker takes no work") == 1

    driven.agent.hold("free disk", None)
    assert driven.take(Consume) == [Consume("q", 1)]
    assert (driven.agent.held, beat_of(driven.beat()).slots) == (None, 1)


def test_a_grant_that_finds_something_in_the_way_is_handed_back_and_a_run_in_hand_goes_on(two):
    two.run(1)
    ref = two.claim(2)
    two.agent.hold("spool", "it is full")
    two.grant(ref)
    acts = two.take(StartRun, Spool)

    assert [(type(act), act.outcome.result, act.outcome.reason.text) for act in acts] == [
        (Spool, "handed_back", "it is full")
    ]
    beat = beat_of(two.beat())
    assert (beat.slots, len(beat.running)) == (1, 1)


def test_a_run_whose_directory_cannot_be_made_is_handed_back(driven):
    ref, _ = driven.run()
    driven.agent.not_started(ref.token, "no room")
    [outcome] = driven.spool()

    assert (outcome.result, outcome.reason.text) == ("handed_back", "no room")
    assert driven.agent.busy() is False


def test_a_run_that_exceeds_a_limit_is_killed_and_an_error_whatever_its_slot_still_says(driven):
    ref, _ = driven.run()
    driven.agent.exceeded(0, "of another run", "cpu", "too much")
    assert driven.take(KillSlot) == []
    driven.agent.exceeded(0, ref.token, "cpu", "too much")
    driven.agent.exceeded(0, ref.token, "cpu", "too much")
    assert len(driven.take(KillSlot)) == 1
    end(driven)
    driven.agent.slot_gone(0, -9)
    [outcome] = driven.spool()

    assert (outcome.result, outcome.reason.text, outcome.reason.status) == ("error", "too much", "cpu")


def test_a_run_is_not_over_while_something_of_it_lives_and_then_is_what_its_slot_said(driven):
    ref, _ = driven.run()
    driven.hear(Abort(request=ref.request, attempt=1, token=ref.token, reason="not wanted"))
    driven.agent.slot_said(
        0, SlotEnded(result="aborted", reason=Reason(text="not wanted"), left="process 7 is still there in state D")
    )
    assert driven.take(Spool) == []
    [run] = beat_of(driven.beat()).running
    assert run.stage == "ending: process 7 is still there in state D"
    driven.agent.outlived(0, "process 8 is still there in state D")
    [run] = beat_of(driven.beat()).running
    assert run.stage == "ending: process 8 is still there in state D"
    driven.agent.slot_gone(0, 1)
    [outcome] = driven.spool()

    assert outcome.result == "aborted"
    assert outcome.reason.text == "not wanted (at its end, this was in the way: process 7 is still there in state D)"


def test_a_run_that_has_ended_beside_what_cannot_be_ended_counts_as_it_is_where_the_worker_leaves(driven):
    """P4: the slot itself, which waits for the end of what it left, is killed with the others."""
    driven.run()
    driven.agent.slot_said(0, SlotEnded(result="success", left="process 7 is still there in state D"))
    driven.agent.drain()
    driven.agent.stop_runs()
    [outcome] = driven.spool()
    driven.agent.slot_gone(0, -9)

    assert outcome.result == "success"
    assert not driven.agent.busy()
    assert (driven.take(KillSlot), driven.take(Spool)) == ([], [])


def test_a_slot_that_is_killed_when_the_host_is_out_of_memory_has_lost_its_run_for_that_reason(driven):
    driven.run()
    driven.agent.out_of_memory(0)
    driven.agent.slot_gone(0, -9)
    [outcome] = driven.spool()

    assert (outcome.result, outcome.reason.status) == ("lost", "memory")


@pytest.mark.parametrize(
    ("result", "status", "told"),
    [("failure", None, "memory"), ("error", "given-back", "given-back"), ("success", None, None)],
)
def test_a_bad_end_while_the_kernel_was_killing_for_want_of_memory_tells_so_and_stays_what_it_is(
    driven, result, status, told
):
    driven.run()
    driven.agent.out_of_memory(0)
    driven.agent.slot_said(0, SlotEnded(result=result, reason=Reason(text="cc1 was killed", status=status)))
    [outcome] = driven.spool()

    assert (outcome.result, outcome.reason.status) == (result, told)
    assert outcome.reason.text.startswith("cc1 was killed")
    assert ("this host was out of memory" in outcome.reason.text) == (result != "success")


def test_an_outcome_that_cannot_be_spooled_is_sent_without_where_the_worker_leaves(driven):
    driven.run()
    end(driven)
    [spool] = driven.take(Spool)
    driven.agent.unspoolable(spool.outcome)

    [sent] = driven.take(PublishOutcomes)
    assert sent.outcomes.outcomes == [spool.outcome]
    assert driven.agent.is_unsettled(spool.outcome.token)


def test_while_the_broker_takes_nothing_it_says_and_takes_nothing_and_then_says_all_at_once(driven):
    driven.agent.blocked(blocked=True)
    driven.now += 20 * SECOND
    driven.agent.tick(driven.now)
    assert not [act for act in driven.agent.take_acts(driven.now) if not isinstance(act, Cancel)]
    assert driven.agent.consuming is None
    driven.agent.blocked(blocked=False)
    acts = driven.agent.take_acts(driven.now)
    [report] = [act.report for act in acts if isinstance(act, PublishReport)]
    assert [type(part) for part in report.parts] == [Hello, Heartbeat]
