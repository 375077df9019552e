import itertools
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mqworker.dispatch import (
    FADING,
    LEAST_HEADS,
    MOST_HEADS,
    Dispatch,
    Lane,
    Offer,
    Want,
)
from mqworker.errors import IllegalMove
from mqworker.pace import AHEAD_SECONDS, MOST_AHEAD

REQUIREMENTS = ("x", "y", "z")
WORKERS = ("w1", "w2", "w3")
WEIGHTS = {"heavy": 2.0}
LIMITS = {"two": 2}
LANES = [
    Lane("x", 0, "light", None),
    Lane("x", 0, "heavy", None),
    Lane("y", 0, "light", None),
    Lane("y", 1, "light", "one"),
    Lane("y", 0, "heavy", "two"),
    Lane("z", 1, "light", "one"),
    Lane("z", 0, "heavy", "two"),
]
MANY = LEAST_HEADS + 3


class DispatchIsFair(RuleBasedStateMachine):
    """Compare with a model that keeps all that waits in one dict, looks at all of it, and counts by hand.

    `waiting` is what dispatch was told; `ledger` is what an answer may be read from, which runs ahead of it.
    """

    def __init__(self):
        super().__init__()
        self.dispatch = Dispatch(weights=WEIGHTS, limits=LIMITS, heads=1)
        self.now = 0.0
        self.numbers = itertools.count(1)
        self.newest = 0
        self.capable: dict[str, set[str]] = {}
        self.ledger: dict[str, tuple[Lane, int]] = {}
        self.waiting: dict[str, tuple[Lane, int]] = {}
        self.untold: list[str] = []  # accepted in the ledger
        self.ended: list[str] = []  # ended in the ledger, but dispatch was not told
        self.in_memory: set[str] = set()
        self.known: dict[str, tuple[Lane, int]] = {}  # every request that has not ended
        self.out: dict[str, tuple[str, float]] = {}
        self.turn = 1.0
        self.lately: dict[str, float] = {}  # what each group was given
        self.running: set[str] = set()
        self.paused: set[str] = set()
        self.asked: list[tuple[Want, list[tuple[str, int]] | None]] = []
        self.supplies: dict[str, tuple[str | None, int, set[str]]] = {}

    # ------------------------------------------------------------ the plain way

    def classes_for(self, requirement):
        return [name for name, capable in self.capable.items() if requirement in capable]

    def idle(self, name):
        return sum(max(0, slots - len(busy)) for own, slots, busy in self.supplies.values() if own == name)

    def consumed(self, name):
        return any(own == name for own, _, _ in self.supplies.values())

    def used(self, **what):
        held = (self.known[request][0] for request in {*self.out, *self.running})
        return sum(all(getattr(lane, field) == value for field, value in what.items()) for lane in held)

    def share(self, group):
        return (self.used(group=group) / WEIGHTS.get(group, 1.0), self.lately.get(group, 0.0))

    def free(self, lane):
        full = lane.key is not None and self.used(key=lane.key) >= LIMITS.get(lane.key, 1)
        return not full and lane.requirement not in self.paused and lane.group not in self.paused

    def order(self, lane, seq):
        return (-lane.priority, self.share(lane.group), seq)

    def fit(self, name):
        """List what a class may be given, best first, in P8's order."""
        return sorted(
            (*self.order(lane, seq), request)
            for request, (lane, seq) in self.waiting.items()
            if request in self.ledger and lane.requirement in self.capable[name] and self.free(lane)
        )

    def blanks(self, name):
        """List the places of the lanes of which only the ledger knows what comes first."""
        return sorted(
            self.order(lane, one.horizon + 1)
            for lane, one in self.dispatch._lanes.items()
            if not one.heads
            and one.horizon < float("inf")
            and lane.requirement in self.capable[name]
            and self.free(lane)
        )

    def number(self):
        self.newest = next(self.numbers)
        return self.newest

    def enter(self, request, lane, seq):
        self.ledger[request] = self.waiting[request] = self.known[request] = (lane, seq)
        (self.in_memory.add if self.dispatch.wait(request, lane, seq) else self.in_memory.discard)(request)

    # ------------------------------------------------------------ what happens

    @initialize(restored=st.sets(st.sampled_from(LANES)), offered=st.booleans())
    def a_pool_at_work(self, restored, offered):
        for lane in sorted(restored, key=LANES.index):
            for _ in range(MANY):
                self.the_ledger_accepts(lane)
            self.dispatch.restore(lane, MANY)
        for request in self.untold:
            self.waiting[request] = self.known[request]
        self.untold.clear()
        for name, capable in (("a", {"x", "y"}), ("b", {"y", "z"})):
            self.dispatch.add_class(name)
            self.capable[name] = capable
            for requirement in sorted(capable):
                self.dispatch.gain(name, requirement)
        for worker, own in zip(WORKERS, ("a", "b", "b"), strict=True):
            self.dispatch.supply(worker, capability_class=own, slots=1, busy=())
            self.supplies[worker] = (own, 1, set())
        if offered:
            self.requests_are_offered()

    @rule(lane=st.sampled_from(LANES), number=st.sampled_from([1, 1, 2, MANY]))
    def requests_come(self, lane, number):
        for _ in range(number):
            seq = self.number()
            self.enter(f"r{seq}", lane, seq)

    @rule(lane=st.sampled_from(LANES))
    def the_ledger_accepts(self, lane):
        """It is read from before dispatch is told."""
        seq = self.number()
        self.ledger[f"r{seq}"] = self.known[f"r{seq}"] = (lane, seq)
        self.untold.append(f"r{seq}")

    @rule()
    def dispatch_is_told(self):
        for request in self.untold:
            if request in self.known and request not in self.out and request not in self.running:
                self.enter(request, *self.known[request])
        self.untold.clear()
        for request in self.ended:
            self.end(request)
        self.ended.clear()

    def end(self, request):
        if request in self.waiting and request not in self.in_memory:
            self.dispatch.absent(*self.waiting[request])
        else:
            self.dispatch.forget(request)
        for held in (self.known, self.ledger, self.waiting, self.out):
            held.pop(request, None)
        self.running.discard(request)
        self.in_memory.discard(request)

    @precondition(lambda self: self.known.keys() - {*self.untold})
    @rule(data=st.data(), told=st.booleans())
    def a_request_ends(self, data, told):
        request = data.draw(st.sampled_from(sorted(self.known.keys() - {*self.untold})))
        if told:
            self.end(request)
        else:
            self.ledger.pop(request, None)
            self.ended.append(request)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def an_offer_is_taken(self, data):
        request = data.draw(st.sampled_from(sorted(self.out)))
        assert self.dispatch.granted(request)
        del self.out[request]
        self.running.add(request)

    @rule(lane=st.sampled_from(LANES))
    def a_running_request_is_restored(self, lane):
        seq = self.number()
        self.known[f"r{seq}"] = (lane, seq)
        self.dispatch.hold(f"r{seq}", lane)
        self.running.add(f"r{seq}")

    @precondition(lambda self: {*self.out, *self.running} - {*self.ended})
    @rule(data=st.data(), other=st.none() | st.sampled_from(LANES))
    def a_request_comes_back(self, data, other):
        """It was offered or granted; a refusal may have given it another lane."""
        request = data.draw(st.sampled_from(sorted({*self.out, *self.running} - {*self.ended})))
        lane, seq = self.known[request]
        self.out.pop(request, None)
        self.running.discard(request)
        self.enter(request, other or lane, seq)

    @precondition(lambda self: self.waiting.keys() - {*self.ended})
    @rule(data=st.data(), lane=st.sampled_from(LANES))
    def a_request_moves(self, data, lane):
        request = data.draw(st.sampled_from(sorted(self.waiting.keys() - {*self.ended})))
        before, seq = self.waiting[request]
        if request not in self.in_memory:
            self.dispatch.absent(before, seq)
        self.enter(request, lane, seq)

    @rule()
    def heads_are_asked_for(self):
        self.asked += [(want, None) for want in self.dispatch.wants(self.newest)]

    @rule()
    def the_ledger_reads(self):
        """The answers arrive later, when this may be true no more."""
        for place, (want, rows) in enumerate(self.asked):
            if rows is None:
                found = sorted(
                    (seq, request)
                    for request, (lane, seq) in self.ledger.items()
                    if lane == want.lane and seq > want.after
                )
                self.asked[place] = (want, [(request, seq) for seq, request in found[: want.limit]])

    @rule()
    def answers_arrive(self):
        arrived = [ask for ask in self.asked if ask[1] is not None]
        self.asked = [ask for ask in self.asked if ask[1] is None]
        for want, rows in arrived:
            taken = self.dispatch.heads(want, rows)
            assert set(taken) <= {request for request, _ in rows} - self.in_memory
            for request in taken:
                self.in_memory.add(request)
                self.waiting[request] = self.known[request]

    @rule()
    def the_ledger_answers(self):
        self.heads_are_asked_for()
        self.the_ledger_reads()
        self.answers_arrive()

    @precondition(lambda self: len(self.capable) < 4)
    @rule(requirements=st.sets(st.sampled_from(REQUIREMENTS)))
    def a_class_is_made(self, requirements):
        name = f"c{next(self.numbers)}"
        self.dispatch.add_class(name)
        self.capable[name] = set()
        for requirement in requirements:
            self.capable[name].add(requirement)
            self.dispatch.gain(name, requirement)

    @precondition(lambda self: self.capable)
    @rule(data=st.data(), requirement=st.sampled_from(REQUIREMENTS))
    def a_class_gains(self, data, requirement):
        name = data.draw(st.sampled_from(sorted(self.capable)))
        if requirement not in self.capable[name]:
            self.capable[name].add(requirement)
            self.dispatch.gain(name, requirement)

    @rule(requirement=st.sampled_from(REQUIREMENTS))
    def a_requirement_is_dropped(self, requirement):
        if any(lane.requirement == requirement for lane, _ in self.known.values()):
            return  # it is still needed
        self.dispatch.drop(requirement)
        self.paused.discard(requirement)
        for capable in self.capable.values():
            capable.discard(requirement)

    @precondition(lambda self: self.capable)
    @rule(data=st.data())
    def a_class_goes(self, data):
        name = data.draw(st.sampled_from(sorted(self.capable)))
        stranded = self.dispatch.remove_class(name)
        assert sorted(stranded) == sorted(request for request, (own, _) in self.out.items() if own == name)
        del self.capable[name]
        self.supplies = {
            worker: (None if own == name else own, slots, busy) for worker, (own, slots, busy) in self.supplies.items()
        }
        for request in stranded:
            del self.out[request]
        for request in stranded:
            if request in self.ended:
                self.running.add(request)  # it counts until its end is told
            else:
                self.enter(request, *self.known[request])

    @rule(requirement=st.sampled_from(REQUIREMENTS), paused=st.booleans())
    def a_requirement_is_paused_or_resumed(self, requirement, paused):
        (self.dispatch.pause_requirement if paused else self.dispatch.resume_requirement)(requirement)
        (self.paused.add if paused else self.paused.discard)(requirement)

    @rule(group=st.sampled_from(["light", "heavy"]), paused=st.booleans())
    def a_group_is_paused_or_resumed(self, group, paused):
        (self.dispatch.pause_group if paused else self.dispatch.resume_group)(group)
        (self.paused.add if paused else self.paused.discard)(group)

    @rule(
        data=st.data(),
        worker=st.sampled_from(WORKERS),
        slots=st.sampled_from([0, 1, 2, 20]),
        busy=st.sets(st.sampled_from(["t1", "t2"])),
    )
    def a_worker_reports(self, data, worker, slots, busy):
        own = data.draw(st.sampled_from([None, "a class that is gone", *sorted(self.capable)]))
        self.dispatch.supply(worker, capability_class=own, slots=slots, busy=busy)
        self.supplies[worker] = (own if own in self.capable else None, slots, set(busy))

    @rule(worker=st.sampled_from(WORKERS))
    def a_worker_goes(self, worker):
        self.dispatch.no_supply(worker)
        self.supplies.pop(worker, None)

    @rule(worker=st.sampled_from(WORKERS), run=st.sampled_from(["t1", "t2", "t3"]))
    def a_slot_is_taken(self, worker, run):
        self.dispatch.taken(worker, run)
        if worker in self.supplies:
            self.supplies[worker][2].add(run)

    @rule(worker=st.sampled_from(WORKERS), run=st.sampled_from(["t1", "t2", "t3"]), runs=st.integers(1, 30))
    def slots_are_freed(self, worker, run, runs):
        for _ in range(runs):
            self.dispatch.freed(worker, run, self.now, 0.001)
        if worker in self.supplies:
            self.supplies[worker][2].discard(run)

    @rule(seconds=st.sampled_from([0.01, 0.5, 20.0]))
    def time_passes(self, seconds):
        self.now += seconds

    # ------------------------------------------------------------ what must hold

    def rank(self, name):
        """Say how good a home a class is: idle slots rather than lookahead, then little else to run, then most idle."""
        spare = self.idle(name) - sum(own == name for own, _ in self.out.values())
        return (spare <= 0, len(self.capable[name]), -spare)

    @rule()
    def requests_are_offered(self):
        credit = {name: self.dispatch.credit(name, self.now) for name in self.capable}
        for request, name in itertools.chain.from_iterable(iter(lambda: self.dispatch.offers(self.now), [])):
            lane, seq = self.waiting[request]
            mine = (*self.order(lane, seq), request)
            assert request not in self.out
            assert request not in self.running
            assert self.free(lane)
            assert lane.requirement in self.capable[name]
            assert min(self.fit(name), default=mine) >= mine  # P8
            for other in self.capable:
                if credit[other] > 0 and lane.requirement in self.capable[other] and not self.blanks(other):
                    assert self.rank(name) <= self.rank(other)
            self.turn *= FADING
            self.lately[lane.group] = self.lately.get(lane.group, 0.0) + self.turn / WEIGHTS.get(lane.group, 1.0)
            del self.waiting[request]
            self.in_memory.discard(request)
            self.ledger.pop(request, None)
            self.out[request] = (name, self.now)
            credit[name] -= 1
            assert credit[name] >= 0
        for name, left in credit.items():
            fit, blanks = self.fit(name), self.blanks(name)
            assert left <= 0 or not fit or (blanks and blanks[0] <= fit[0][:3])
        self.heads_are_asked_for()
        asked = [want.lane for want, _ in self.asked]
        assert len(asked) == len(set(asked))
        for name in self.capable:
            for lane, one in self.dispatch._lanes.items():
                if not one.heads and lane.requirement in self.capable[name] and self.free(lane):
                    assert lane in asked  # nobody passes for long

    @invariant()
    def what_is_not_beyond_the_horizon_is_in_memory_and_nothing_else_is(self):
        for request, (lane, seq) in self.waiting.items():
            if request in self.ledger:
                one = self.dispatch._lanes[lane]
                assert (request in self.in_memory) == (seq <= one.horizon)
        assert self.dispatch._waiting.keys() == self.in_memory

    @invariant()
    def nothing_is_lost_and_nothing_made_up(self):
        assert self.dispatch.waiting() >= len(self.in_memory)
        for request in self.known:
            assert self.dispatch.offered_to(request) == self.out.get(request, (None,))[0]
        for group in ("light", "heavy"):
            assert self.dispatch.shares().get(group, self.share(group)) == self.share(group)
            assert group in self.dispatch.shares() or not self.used(group=group)

    @invariant()
    def credit_is_idle_slots_and_lookahead_less_what_is_out(self):
        figures = self.dispatch.figures(self.now)
        assert set(figures) == set(self.capable)
        for name, (members, idle, lookahead, out) in figures.items():
            assert members == sum(own == name for own, _, _ in self.supplies.values())
            assert idle == self.idle(name) == self.dispatch.idle(name)
            assert 0 <= lookahead <= MOST_AHEAD
            assert out == sum(own == name for own, _ in self.out.values())
            assert self.dispatch.credit(name, self.now) == idle + lookahead - out

    @invariant()
    def stale_are_the_offers_that_nobody_took_in_time_and_those_in_queues_that_nobody_consumes(self):
        stale = {
            request for request, (name, since) in self.out.items() if self.now - since > 10 or not self.consumed(name)
        }
        assert set(self.dispatch.stale(self.now, 10)) == stale

    def teardown(self):
        """Let all end: nothing is left of lanes, groups and keys."""
        self.dispatch_is_told()
        for request in list(self.known):
            self.end(request)
        for pause in self.paused:
            self.dispatch.resume_group(pause)
            self.dispatch.resume_requirement(pause)
        for _ in range(3):
            self.the_ledger_answers()
        assert self.dispatch.waiting() == 0
        for name in self.capable:
            self.dispatch.remove_class(name)
        for held in ("lanes", "tiers", "line", "requirements", "groups", "keys", "waiting", "out", "running"):
            assert not getattr(self.dispatch, f"_{held}")


TestDispatchIsFair = DispatchIsFair.TestCase
TestDispatchIsFair.settings = settings(
    max_examples=400, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


# ------------------------------------------------------------ one class


@pytest.fixture
def dispatch():
    """One class `a`, which can run `x`, with one worker of one slot."""
    made = Dispatch(weights=WEIGHTS, limits=LIMITS)
    made.add_class("a")
    made.gain("a", "x")
    made.supply("w1", capability_class="a", slots=1, busy=())
    return made


def lane(requirement="x", *, priority=0, group="", key=None):
    return Lane(requirement, priority, group, key)


def wait(dispatch, *requests, **what):
    return [dispatch.wait(request, lane(**what), int(request[1:])) for request in requests]


def finish(dispatch, *, each, seconds, start=0.0):
    """Let runs of some length follow each other in the one slot."""
    now = start
    while now < start + seconds:
        now += each
        dispatch.taken("w1", "t")
        dispatch.freed("w1", "t", now, each)
    return now


def slots(dispatch, number):
    dispatch.supply("w1", capability_class="a", slots=number, busy=())


def offered(dispatch):
    return [offer.request for offer in dispatch.offers(0.0)]


def answer(dispatch, want, waiting):
    """Answer from a ledger in which `waiting` numbers wait in the lane."""
    rows = [(f"r{seq}", seq) for seq in sorted(waiting) if seq > want.after]
    return dispatch.heads(want, rows[: want.limit])


def test_a_better_request_that_came_later_goes_first_and_equals_go_by_age(dispatch):
    slots(dispatch, 4)
    wait(dispatch, "r3", "r1")
    wait(dispatch, "r4", priority=5)
    wait(dispatch, "r2", priority=-5)

    assert offered(dispatch) == ["r4", "r1", "r3", "r2"]


@pytest.mark.parametrize("each", [0.15, 1.0, 3600.0])
def test_a_class_whose_runs_are_long_gets_no_ticket_ahead_of_a_free_slot(dispatch, each):
    now = finish(dispatch, each=each, seconds=100 * each)
    dispatch.taken("w1", "t")
    wait(dispatch, "r1")

    assert dispatch.lookahead("a", now) == 0
    assert dispatch.offers(now) == []


@pytest.mark.parametrize("each", [0.001, 0.005, 0.02])
def test_a_class_whose_runs_are_short_gets_what_it_finishes_in_the_lookahead(dispatch, each):
    now = finish(dispatch, each=each, seconds=5)

    assert dispatch.lookahead("a", now) == pytest.approx(AHEAD_SECONDS / each, abs=1.5)
    assert dispatch.lookahead("a", now) >= 1
    assert dispatch.lookahead("a", now + 10) == 0  # it has been idle: nothing is known any more


def test_lookahead_is_bounded_and_needs_a_slot_that_works(dispatch):
    finish(dispatch, each=0.00001, seconds=1)
    slots(dispatch, 10)
    assert dispatch.lookahead("a", 1.0) == MOST_AHEAD
    slots(dispatch, 0)

    assert dispatch.lookahead("a", 1.0) == 0


def test_offers_that_are_out_use_up_credit_until_they_are_forgotten_or_granted(dispatch):
    wait(dispatch, "r1", "r2", "r3")
    assert dispatch.offers(0.0) == [Offer("r1", "a")]
    assert dispatch.offers(0.0) == []
    dispatch.forget("r1")
    assert dispatch.offers(0.0) == [Offer("r2", "a")]
    assert dispatch.granted("r2")

    assert dispatch.offers(0.0) == [Offer("r3", "a")]
    assert not dispatch.granted("r1")


def test_a_class_that_goes_gives_back_its_offers_and_the_slots_of_its_workers_count_nowhere(dispatch):
    wait(dispatch, "r1", "r2", key="one")
    dispatch.offers(0.0)

    assert dispatch.remove_class("a") == ["r1"]
    assert dispatch.offered_to("r1") is None
    assert dispatch.held_by(lane(key="one")) == "limit"  # a claim of it may be granted yet
    dispatch.forget("r1")
    assert dispatch.stale(1e9, 10) == []
    assert dispatch.held_by(lane(key="one")) is None
    dispatch.add_class("b")
    dispatch.freed("w1", "t", 0.0, 0.001)
    dispatch.gain("b", "x")
    assert dispatch.offers(0.0) == []
    dispatch.supply("w1", capability_class="b", slots=1, busy=())
    assert dispatch.offers(0.0) == [Offer("r2", "b")]


def test_what_was_offered_to_a_class_that_is_gone_may_run_and_its_place_is_never_free(dispatch):
    wait(dispatch, "r1", "r2", key="one")
    dispatch.offers(0.0)
    dispatch.remove_class("a")
    assert dispatch.granted("r1")

    assert dispatch.held_by(lane(key="one")) == "limit"
    dispatch.forget("r1")
    assert dispatch.held_by(lane(key="one")) is None


def test_slots_that_are_fewer_than_what_sits_in_them_take_no_credit_from_others(dispatch):
    dispatch.supply("w1", capability_class="a", slots=0, busy={"t1", "t2"})
    dispatch.supply("w2", capability_class="a", slots=1, busy=())

    assert dispatch.idle("a") == 1


def test_a_worker_counts_where_it_consumes_and_nowhere_else(dispatch):
    dispatch.add_class("b")
    dispatch.supply("w1", capability_class="b", slots=2, busy=())

    assert [dispatch.idle("a"), dispatch.idle("b")] == [0, 2]
    dispatch.supply("w1", capability_class=None, slots=2, busy=())
    assert [dispatch.idle("a"), dispatch.idle("b")] == [0, 0]


def test_runs_of_a_worker_that_nobody_knows_count_nowhere(dispatch):
    dispatch.taken("w9", "t")
    dispatch.freed("w9", "t", 0.0, 0.001)
    dispatch.no_supply("w9")

    assert dispatch.figures(0.0) == {"a": (1, 1, 0, 0)}


# ------------------------------------------------------------ groups, keys, pauses


def test_one_request_of_a_person_goes_before_the_hundred_that_another_had_waiting_first(dispatch):
    wait(dispatch, *(f"r{number}" for number in range(1, 101)), group="light")
    wait(dispatch, "r101", group="heavy")
    slots(dispatch, 2)

    assert offered(dispatch) == ["r1", "r101"]


def test_groups_share_by_their_weights_whatever_their_backlogs(dispatch):
    wait(dispatch, *(f"r{number}" for number in range(1, 101)), group="light")
    wait(dispatch, *(f"r{number}" for number in range(101, 201)), group="heavy")
    slots(dispatch, 30)
    shares = Counter(int(request[1:]) > 100 for request in offered(dispatch))

    assert shares == {True: 20, False: 10}
    assert {group: share for group, (share, _) in dispatch.shares().items()} == {"light": 10.0, "heavy": 10.0}


def test_groups_take_turns_at_a_single_slot_by_their_weights(dispatch):
    """Between two runs nobody has anything: then it counts who was given less lately."""
    wait(dispatch, *(f"r{number}" for number in range(1, 101)), group="light")
    wait(dispatch, *(f"r{number}" for number in range(101, 201)), group="heavy")
    given = []
    for _ in range(30):
        slots(dispatch, 1)
        [request] = offered(dispatch)
        dispatch.forget(request)
        given.append("heavy" if int(request[1:]) > 100 else "light")
    assert Counter(given) == {"heavy": 20, "light": 10}
    assert "light" not in given[given.index("light") + 1 :][:1], "in turns"


def test_what_a_group_was_given_counts_also_when_it_comes_back_and_fades(dispatch):
    wait(dispatch, *(f"r{number}" for number in range(1, 51)), group="crowd")
    wait(dispatch, "r1000", group="single")
    order = []
    for number in range(1001, 1060):
        slots(dispatch, 1)
        [request] = offered(dispatch)
        dispatch.forget(request)
        order.append(request)
        if int(request[1:]) >= 1000:  # it submits one after the other, and is nowhere in between
            wait(dispatch, f"r{number}", group="single")
    assert sum(int(request[1:]) >= 1000 for request in order) == pytest.approx(len(order) / 2, abs=3)


def test_what_runs_counts_towards_the_share_until_it_ends_and_what_a_restart_restores_as_well(dispatch):
    dispatch.hold("r1", lane(group="light"))
    wait(dispatch, "r2", "r3", group="light")
    wait(dispatch, "r4", group="other")
    assert offered(dispatch) == ["r4"]
    dispatch.granted("r4")
    dispatch.forget("r1")

    assert offered(dispatch) == ["r2"]


def test_no_more_requests_of_a_key_are_out_or_running_than_its_limit(dispatch):
    slots(dispatch, 9)
    wait(dispatch, "r1", "r2", key="one")
    wait(dispatch, "r3", key="one", priority=1)
    wait(dispatch, "r4", "r5", "r6", key="two")
    wait(dispatch, "r7", group="other", key="two")

    assert offered(dispatch) == ["r3", "r7", "r4"]
    assert dispatch.held_by(lane(key="one")) == "limit"
    assert dispatch.held_by(lane()) is None
    dispatch.granted("r3")
    assert offered(dispatch) == []
    dispatch.forget("r3")
    assert offered(dispatch) == ["r1"]


def test_a_limit_of_nothing_holds_everything_and_any_stands_for_keys_without_their_own():
    dispatch = Dispatch(weights={}, limits={"shut": 0, "*": 2})
    dispatch.add_class("a")
    dispatch.gain("a", "x")
    slots(dispatch, 9)
    wait(dispatch, "r1", key="shut")
    wait(dispatch, "r2", "r3", "r4", key="some")

    assert offered(dispatch) == ["r2", "r3"]
    assert dispatch.held_by(lane(key="shut")) == "limit"


def test_nothing_of_what_is_paused_is_offered_until_it_is_resumed(dispatch):
    slots(dispatch, 9)
    dispatch.pause_group("light")
    dispatch.pause_requirement("x")
    wait(dispatch, "r1", group="light")
    wait(dispatch, "r2")
    assert offered(dispatch) == []
    assert dispatch.held_by(lane(group="light")) == "task paused"
    dispatch.resume_requirement("x")
    assert offered(dispatch) == ["r2"]
    assert dispatch.held_by(lane(group="light")) == "group paused"
    dispatch.resume_group("light")

    assert offered(dispatch) == ["r1"]


# ------------------------------------------------------------ many classes


def test_a_request_goes_to_an_idle_slot_then_to_who_can_run_the_least_else_then_to_the_most_idle():
    dispatch = Dispatch(weights={}, limits={})
    for name, requirements in (("any", "xy"), ("only", "x"), ("large", "x"), ("quick", "x")):
        dispatch.add_class(name)
        for requirement in requirements:
            dispatch.gain(name, requirement)
    for number in range(100):
        dispatch.supply("w1", capability_class="quick", slots=1, busy=())
        dispatch.freed("w1", number, 0.0, 0.01)
    dispatch.supply("w1", capability_class="quick", slots=1, busy=["t"])
    assert dispatch.lookahead("quick", 0.0) == 10
    for worker, (name, number) in enumerate({"any": 9, "only": 1, "large": 2}.items()):
        dispatch.supply(f"v{worker}", capability_class=name, slots=number, busy=())
    assert dispatch.offers(0.0) == []

    went = []
    for number in range(1, 15):
        wait(dispatch, f"r{number}")
        went += [offer.capability_class for offer in dispatch.offers(0.0)]
    assert went == ["large", "only", "large"] + 9 * ["any"] + 2 * ["quick"]


def test_what_many_may_run_leaves_to_the_specialist_what_only_it_can_run(dispatch):
    dispatch.add_class("both")
    dispatch.gain("both", "x")
    dispatch.gain("both", "y")
    dispatch.supply("w2", capability_class="both", slots=1, busy=())
    wait(dispatch, "r1")
    wait(dispatch, "r2", requirement="y")

    assert set(dispatch.offers(0.0)) == {Offer("r1", "a"), Offer("r2", "both")}


def idle_classes(**classes):
    """Make classes that each run what is named, have one idle slot, and have found nothing yet."""
    made = Dispatch(weights={}, limits={})
    for name, requirements in classes.items():
        made.add_class(name)
        for requirement in requirements:
            made.gain(name, requirement)
        made.supply(f"worker of {name}", capability_class=name, slots=1, busy=())
    assert made.offers(0.0) == []
    return made


def test_as_many_idle_classes_are_woken_as_there_are_requests_for_them():
    dispatch = idle_classes(a="x", b="x", c="x", d="y")
    wait(dispatch, "r1", "r2")
    assert len(dispatch.offers(0.0)) == 2
    wait(dispatch, "r3", "r4")

    assert len(dispatch.offers(0.0)) == 1


def test_a_class_that_was_woken_for_many_leaves_what_it_has_no_credit_for_to_the_next():
    dispatch = idle_classes(a="xyz", b="xyz", c="xyz")
    for number, requirement in enumerate("xyz"):
        wait(dispatch, f"r{number + 1}", requirement=requirement)

    assert sorted(offer.capability_class for offer in dispatch.offers(0.0)) == ["a", "b", "c"]


def test_a_class_with_lookahead_does_not_take_a_second_before_another_has_filled_its_idle_slot():
    dispatch = idle_classes(a="xy", b="yz")
    for number in range(10):
        dispatch.freed("worker of a", number, 0.0, 0.1)
    assert dispatch.offers(0.0) == []
    assert dispatch.credit("a", 0.0) == 2
    wait(dispatch, "r1")
    wait(dispatch, "r2", requirement="y")

    assert set(dispatch.offers(0.0)) == {Offer("r1", "a"), Offer("r2", "b")}


def test_a_starved_class_whose_lookahead_has_run_out_meanwhile_gets_nothing():
    dispatch = idle_classes(a="x", b="x")
    for number in range(10):
        dispatch.freed("worker of a", number, 0.0, 0.1)
    for name in "ab":
        dispatch.taken(f"worker of {name}", "t")
    assert dispatch.offers(0.0) == []
    assert dispatch.credit("a", 0.0) == 1
    wait(dispatch, "r1")
    assert dispatch.offers(60.0) == []
    dispatch.freed("worker of b", "t", 60.0, 0.001)

    assert dispatch.offers(60.0) == [Offer("r1", "b")]


def test_a_class_gets_what_it_gains_though_others_ran_it_before():
    dispatch = idle_classes(a="x", b="y")
    dispatch.taken("worker of b", "t")
    wait(dispatch, "r1", requirement="y")
    assert dispatch.offers(0.0) == []
    dispatch.gain("a", "y")

    assert dispatch.offers(0.0) == [Offer("r1", "a")]


# ------------------------------------------------------------ heads and horizon


@pytest.fixture
def short():
    """Like `dispatch`, but with as few heads in memory as may be, and no slot."""
    made = Dispatch(weights={}, limits={}, heads=1)
    made.add_class("a")
    made.gain("a", "x")
    return made


def test_only_the_heads_of_a_lane_are_kept_and_the_rest_is_counted(short):
    kept = wait(short, *(f"r{number}" for number in range(1, 101)))

    assert kept == [True] * LEAST_HEADS + [False] * (100 - LEAST_HEADS)
    assert short.waiting() == short.backlog("a") == 100
    assert short.wants(100) == []


def test_heads_are_asked_for_when_under_a_quarter_is_left_and_once_at_a_time(short):
    wait(short, *(f"r{number}" for number in range(1, 101)))
    slots(short, LEAST_HEADS * 3 // 4)
    offered(short)
    assert short.wants(100) == []
    slots(short, LEAST_HEADS * 3 // 4 + 1)
    offered(short)

    [want] = short.wants(100)
    assert want == Want(lane(), LEAST_HEADS, LEAST_HEADS - 1)
    assert short.wants(100) == []
    assert answer(short, want, range(8, 101)) == [f"r{seq}" for seq in range(9, 16)]
    assert short.waiting() == 93


def test_all_that_a_restart_finds_waiting_is_offered_in_order(short):
    slots(short, 1)
    short.restore(lane(), 100)
    waiting = set(range(1, 101))
    went = []
    while waiting:
        for want in short.wants(100):
            answer(short, want, waiting)
        for request in offered(short):
            went.append(int(request[1:]))
            waiting.remove(went[-1])
            short.forget(request)

    assert went == list(range(1, 101))
    assert short.waiting() == 0


def test_a_class_passes_while_what_is_best_for_it_is_not_known(short):
    slots(short, 3)
    short.restore(lane(priority=1), 1)
    wait(short, "r1")
    assert offered(short) == []
    [want] = short.wants(9)
    assert offered(short) == []
    short.heads(want, [("r5", 5)])

    assert offered(short) == ["r5", "r1"]


def test_an_answer_without_any_row_lets_the_next_best_go(short):
    slots(short, 3)
    short.restore(lane(priority=1), 1)
    wait(short, "r1")
    assert offered(short) == []
    short.absent(lane(priority=1), 5)
    [want] = short.wants(9)
    short.heads(want, [])

    assert offered(short) == ["r1"]
    assert short.waiting() == 0


def test_what_comes_while_an_answer_is_under_way_is_neither_lost_nor_doubled(short):
    short.restore(lane(), 3)
    [want] = short.wants(3)
    assert wait(short, "r4", "r5") == [False, False]
    assert answer(short, want, range(1, 5)) == ["r1", "r2", "r3"]  # read when r5 was not there
    assert short.waiting() == 5
    assert wait(short, "r2") == [True]
    slots(short, 9)
    assert offered(short) == ["r1", "r2", "r3"]
    [want] = short.wants(5)
    assert answer(short, want, {4, 5}) == ["r4", "r5"]
    assert wait(short, "r6") == [True]

    assert offered(short) == ["r4", "r5", "r6"]


def test_an_old_request_that_comes_back_after_the_ledger_was_read_is_not_passed_over(short):
    short.restore(lane(), 3)
    short.hold("r2", lane())
    [want] = short.wants(9)
    rows = [("r1", 1), ("r3", 3), ("r4", 4)]
    assert wait(short, "r2") == [False]
    assert short.heads(want, rows) == ["r1"]
    slots(short, 9)
    assert offered(short) == ["r1"]
    [want] = short.wants(9)
    answer(short, want, {2, 3, 4})

    assert offered(short) == ["r2", "r3", "r4"]


def test_an_offer_that_comes_back_takes_its_old_place_at_the_head(short):
    slots(short, 1)
    wait(short, *(f"r{number}" for number in range(1, 101)))
    assert offered(short) == ["r1"]
    assert wait(short, "r1") == [True]

    assert offered(short) == ["r1"]
    assert short.waiting() == 99


def test_what_ended_while_an_answer_is_under_way_is_not_taken_from_it(short):
    short.restore(lane(), 3)
    [want] = short.wants(3)
    short.absent(lane(), 2)

    assert answer(short, want, {1, 2, 3}) == ["r1", "r3"]
    assert short.waiting() == 2


def test_a_want_is_answered_once(short):
    short.restore(lane(), 9)
    [want] = short.wants(9)
    answer(short, want, range(1, 10))

    with pytest.raises(IllegalMove, match="once"):
        short.heads(want, [])


def test_nothing_is_read_of_what_cannot_go_until_it_can(short):
    short.restore(lane(), 100)
    short.restore(lane("y"), 100)
    short.restore(lane(group="light"), 100)
    short.restore(lane(key="one"), 100)
    short.pause_group("light")
    short.hold("r1", lane(key="one"))

    assert [want.lane for want in short.wants(999)] == [lane()]
    short.gain("a", "y")
    assert [want.lane for want in short.wants(999)] == [lane("y")]
    short.resume_group("light")
    assert [want.lane for want in short.wants(999)] == [lane(group="light")]
    short.forget("r1")
    assert [want.lane for want in short.wants(999)] == [lane(key="one")]


def test_few_lanes_have_many_heads_each_and_many_lanes_few():
    dispatch = Dispatch(weights={}, limits={}, heads=1000)
    kept = sum(wait(dispatch, *(f"r{number}" for number in range(1, 1000))))
    assert kept == MOST_HEADS
    for number in range(99):
        wait(dispatch, *(f"s{1000 * number + each}" for each in range(1000, 2000)), requirement=number)

    assert kept <= len(dispatch._waiting) <= kept + 5000
    wait(dispatch, *(f"t{number}" for number in range(200_000, 200_100)), requirement="new")
    assert sum(request.startswith("t") for request in dispatch._waiting) == 1000 // 101


# ------------------------------------------------------------ telling


def test_ahead_counts_what_goes_first_of_all_that_compete(short):
    short.add_class("b")
    short.gain("b", "y")
    short.gain("b", "x")
    short.add_class("c")
    short.gain("c", "z")
    wait(short, *(f"r{number}" for number in range(1, 7)))
    wait(short, *(f"r{number}" for number in range(11, 16)), requirement="y", priority=1)
    wait(short, "r21", "r22", requirement="z", priority=9)

    assert [short.ahead(lane(), seq) for seq in (1, 4, 99)] == [5, 8, 11]
    assert short.ahead(lane("z"), 30) == 2
    assert short.ahead(lane("z", priority=9), 30) == 2
    short.pause_requirement("y")
    assert short.ahead(lane(), 4) == 3
    assert short.ahead(lane("unheard of"), 1) == 0


def test_ahead_takes_what_is_behind_as_evenly_spread(short):
    wait(short, *(f"r{number}" for number in range(1, 1001)))

    assert short.ahead(lane(), 500) == pytest.approx(499, abs=2)
    assert short.ahead(lane(), 1001) == 1000


def test_ahead_lets_the_groups_take_turns_by_their_weights(dispatch):
    wait(dispatch, *(f"r{number}" for number in range(1, 101)), group="light")
    wait(dispatch, *(f"r{number}" for number in range(101, 111)), group="heavy")

    assert dispatch.ahead(lane(group="heavy"), 110) == pytest.approx(9 + 5, abs=1)
    assert dispatch.ahead(lane(group="light"), 3) == pytest.approx(2 + 4, abs=1)
    assert dispatch.ahead(lane(group="light"), 100) == 99 + 10
    slots(dispatch, 110)
    order = offered(dispatch)
    assert order.index("r110") == pytest.approx(14, abs=1)
    assert order.index("r3") == pytest.approx(6, abs=1)
