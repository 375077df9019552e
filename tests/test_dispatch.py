import itertools

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mqworker.dispatch import LOOKAHEAD_SECONDS, MAX_LOOKAHEAD, Dispatch, Offer

REQUIREMENTS = ("x", "y", "z")
WORKERS = ("w1", "w2", "w3")


class DispatchIsFair(RuleBasedStateMachine):
    """Compare with a model that keeps one plain list, looks at all of it, and counts by hand."""

    def __init__(self):
        super().__init__()
        self.dispatch = Dispatch()
        self.now = 0.0
        self.numbers = itertools.count(1)
        self.capable: dict[str, set[str]] = {}
        self.waiting: dict[str, tuple[int, int, str]] = {}  # request to (-priority, seq, requirement)
        self.out: dict[str, tuple[str, float]] = {}
        self.known: dict[str, tuple[int, int, str]] = {}  # every request that has not ended
        self.supplies: dict[str, tuple[str | None, int, set[str]]] = {}

    def classes_for(self, requirement):
        return [name for name, capable in self.capable.items() if requirement in capable]

    def idle(self, name):
        return sum(max(0, slots - len(busy)) for own, slots, busy in self.supplies.values() if own == name)

    def consumed(self, name):
        return any(own == name for own, _, _ in self.supplies.values())

    def enter(self, request, priority, seq, requirement):
        self.waiting[request] = self.known[request] = (-priority, seq, requirement)
        self.dispatch.wait(
            request, priority=priority, seq=seq, requirement=requirement, classes=self.classes_for(requirement)
        )

    @initialize(offered=st.booleans())
    def a_pool_at_work(self, offered):
        for name, capable in (("a", {"x", "y"}), ("b", {"y", "z"})):
            self.dispatch.add_class(name)
            self.capable[name] = capable
            for requirement in sorted(capable):
                self.dispatch.gain(name, requirement)
        for worker, own in zip(WORKERS, ("a", "b", "b"), strict=True):
            self.dispatch.supply(worker, capability_class=own, slots=1, busy=())
            self.supplies[worker] = (own, 1, set())
        for requirement in (*REQUIREMENTS, *REQUIREMENTS):
            self.a_request_comes(0, requirement)
        if offered:
            self.requests_are_offered()

    @rule(priority=st.integers(-1, 1), requirement=st.sampled_from(REQUIREMENTS))
    def a_request_comes(self, priority, requirement):
        seq = next(self.numbers)
        self.enter(f"r{seq}", priority, seq, requirement)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def a_request_ends(self, data):
        request = data.draw(st.sampled_from(sorted(self.known)))
        self.dispatch.forget(request)
        for held in (self.known, self.waiting, self.out):
            held.pop(request, None)

    @precondition(lambda self: self.known.keys() - self.waiting.keys())
    @rule(data=st.data(), other=st.none() | st.sampled_from(REQUIREMENTS))
    def a_request_comes_back(self, data, other):
        """It was offered, granted or stranded; a refusal may have given it another requirement."""
        request = data.draw(st.sampled_from(sorted(self.known.keys() - self.waiting.keys())))
        minus_priority, seq, requirement = self.known[request]
        self.dispatch.forget(request)
        self.out.pop(request, None)
        self.enter(request, -minus_priority, seq, other or requirement)

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

    @precondition(lambda self: self.capable)
    @rule(data=st.data())
    def a_class_goes(self, data):
        name = data.draw(st.sampled_from(sorted(self.capable)))
        stranded = self.dispatch.remove_class(name)
        assert sorted(stranded) == sorted(request for request, (own, _) in self.out.items() if own == name)
        for request in stranded:
            del self.out[request]
        del self.capable[name]
        self.supplies = {
            worker: (None if own == name else own, slots, busy) for worker, (own, slots, busy) in self.supplies.items()
        }

    @rule(
        data=st.data(),
        worker=st.sampled_from(WORKERS),
        slots=st.integers(0, 3),
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
            self.dispatch.freed(worker, run, self.now)
        if worker in self.supplies:
            self.supplies[worker][2].discard(run)

    @rule(seconds=st.sampled_from([0.01, 0.5, 20.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def requests_are_offered(self):
        credit = {name: self.dispatch.credit(name, self.now) for name in self.capable}
        offered = dict.fromkeys(self.capable, 0)
        for request, name in self.dispatch.offers(self.now):
            fit = [(*place[:2], one) for one, place in self.waiting.items() if place[2] in self.capable[name]]
            assert min(fit, default=None) == (*self.known[request][:2], request)  # P8
            assert request not in self.out
            del self.waiting[request]
            self.out[request] = (name, self.now)
            offered[name] += 1
        for name, number in offered.items():
            assert number <= max(0, credit[name])
            if number < credit[name]:
                assert not [one for one, place in self.waiting.items() if place[2] in self.capable[name]]
        assert self.dispatch.offers(self.now) == []

    @invariant()
    def nothing_is_lost_and_nothing_made_up(self):
        assert self.dispatch.waiting() == len(self.waiting)
        for request in self.known:
            assert self.dispatch.offered_to(request) == self.out.get(request, (None,))[0]

    @invariant()
    def credit_is_idle_slots_and_lookahead_less_what_is_out(self):
        figures = self.dispatch.figures(self.now)
        assert set(figures) == set(self.capable)
        for name, (members, idle, lookahead, out) in figures.items():
            assert members == sum(own == name for own, _, _ in self.supplies.values())
            assert idle == self.idle(name) == self.dispatch.idle(name)
            assert 0 <= lookahead <= MAX_LOOKAHEAD
            assert out == sum(own == name for own, _ in self.out.values())
            assert self.dispatch.credit(name, self.now) == idle + lookahead - out

    @invariant()
    def stale_are_the_offers_that_nobody_took_in_time_and_those_in_queues_that_nobody_consumes(self):
        stale = {
            request for request, (name, since) in self.out.items() if self.now - since > 10 or not self.consumed(name)
        }
        assert set(self.dispatch.stale(self.now, 10)) == stale


TestDispatchIsFair = DispatchIsFair.TestCase
TestDispatchIsFair.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture
def dispatch():
    """One class `a`, which can run `x`, with one worker of one slot."""
    made = Dispatch()
    made.add_class("a")
    made.gain("a", "x")
    made.supply("w1", capability_class="a", slots=1, busy=())
    return made


def wait(dispatch, *requests, priority=0):
    for request in requests:
        dispatch.wait(request, priority=priority, seq=int(request[1:]), requirement="x", classes=["a"])


def finish(dispatch, *, each, seconds, start=0.0):
    """Let runs of some length follow each other in the one slot."""
    now = start
    while now < start + seconds:
        now += each
        dispatch.taken("w1", "t")
        dispatch.freed("w1", "t", now)
    return now


def test_a_better_request_that_came_later_goes_first_and_equals_go_by_age(dispatch):
    dispatch.supply("w1", capability_class="a", slots=4, busy=())
    wait(dispatch, "r3", "r1")
    wait(dispatch, "r4", priority=5)
    wait(dispatch, "r2", priority=-5)

    assert [offer.request for offer in dispatch.offers(0.0)] == ["r4", "r1", "r3", "r2"]


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

    assert dispatch.lookahead("a", now) == pytest.approx(LOOKAHEAD_SECONDS / each, abs=1.5)
    assert dispatch.lookahead("a", now) >= 1
    assert dispatch.lookahead("a", now + 10) == 0  # it has been idle: nothing is known any more


def test_lookahead_is_bounded_and_needs_a_slot_that_works(dispatch):
    finish(dispatch, each=0.00001, seconds=1)
    assert dispatch.lookahead("a", 1.0) == MAX_LOOKAHEAD
    dispatch.supply("w1", capability_class="a", slots=0, busy=())

    assert dispatch.lookahead("a", 1.0) == 0


def test_offers_that_are_out_use_up_credit_until_they_are_forgotten(dispatch):
    wait(dispatch, "r1", "r2")
    assert dispatch.offers(0.0) == [Offer("r1", "a")]
    assert dispatch.offers(0.0) == []
    dispatch.forget("r1")

    assert dispatch.offers(0.0) == [Offer("r2", "a")]


def test_a_class_that_goes_gives_back_its_offers_and_the_slots_of_its_workers_count_nowhere(dispatch):
    wait(dispatch, "r1", "r2")
    dispatch.offers(0.0)

    assert dispatch.remove_class("a") == ["r1"]
    assert dispatch.offered_to("r1") is None
    assert dispatch.stale(1e9, 10) == []
    dispatch.add_class("b")
    dispatch.freed("w1", "t", 0.0)
    dispatch.gain("b", "x")
    assert dispatch.offers(0.0) == []
    dispatch.supply("w1", capability_class="b", slots=1, busy=())
    assert dispatch.offers(0.0) == [Offer("r2", "b")]


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
    dispatch.freed("w9", "t", 0.0)
    dispatch.no_supply("w9")

    assert dispatch.figures(0.0) == {"a": (1, 1, 0, 0)}


def test_a_request_that_came_back_is_offered_once_only_by_what_it_needs_now(dispatch):
    """Its place in the backlog of a class that cannot run it any more is void."""
    dispatch.add_class("b")
    for _ in range(2):  # offered to b, and returned: class a has seen it once more each time
        dispatch.wait("r1", priority=0, seq=1, requirement="x", classes=["a", "b"])
        dispatch.supply("w1", capability_class="b", slots=1, busy=())
        assert dispatch.offers(0.0) == [Offer("r1", "b")]
        dispatch.forget("r1")
    dispatch.wait("r1", priority=0, seq=1, requirement="refused by all of a", classes=["b"])
    dispatch.supply("w1", capability_class="a", slots=1, busy=())

    assert dispatch.offers(0.0) == []


def test_a_class_without_credit_does_not_remember_all_that_others_have_run(dispatch):
    dispatch.add_class("b")
    dispatch.gain("b", "x")
    dispatch.supply("w1", capability_class="b", slots=1, busy=())
    shuffled = [f"r{9001 + number * 7 % 30}" for number in range(30)]
    wait(dispatch, *shuffled, priority=-1)
    for number in range(5000):
        dispatch.wait(f"r{number}", priority=0, seq=number, requirement="x", classes=["a", "b"])
        assert dispatch.offers(0.0) == [Offer(f"r{number}", "b")]
        dispatch.forget(f"r{number}")

    assert len(dispatch._classes["a"].heads) < 500
    dispatch.supply("w1", capability_class="a", slots=30, busy=())
    assert [offer.request for offer in dispatch.offers(0.0)] == sorted(shuffled)
