from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mqworker.matching import Change, Gain, Matching, WorkerFacts

NAMES = st.sampled_from([f"w{number}" for number in range(6)])
VALUES = st.integers(0, 5)
REQUIREMENTS = st.sampled_from(range(7))


def facts(name, value=0, version=1):
    return WorkerFacts(name=name, metadata={"value": value}, metadata_version=version, tasks={"noop": 1})


class Mirror:
    """Know the partition from the Changes alone, and insist that each says something new and nothing false."""

    def __init__(self):
        self.members: dict[str, set[str]] = {}
        self.capable: dict[str, set[object]] = {}
        self.class_of: dict[str, str] = {}
        self.used: set[str] = set()

    def apply(self, change: Change, *, left: str | None = None):
        assert max(Counter((*change.made, *change.gone)).values(), default=1) == 1
        for name in change.made:
            assert name not in self.used
            self.used.add(name)
            self.members[name], self.capable[name] = set(), set()
        for name, requirement in change.gained:
            assert requirement not in self.capable[name]
            self.capable[name].add(requirement)
        if left is not None:
            self.members[self.class_of.pop(left)].discard(left)
        for worker, name in change.assigned.items():
            before = self.class_of.get(worker)
            assert before != name
            if before is not None:
                self.members[before].discard(worker)
            self.members[name].add(worker)
            self.class_of[worker] = name
        for name in change.gone:
            assert not self.members.pop(name)
            del self.capable[name]

    def drop(self, requirement):
        for capable in self.capable.values():
            capable.discard(requirement)


class MatchingIsThePlainAnswer(RuleBasedStateMachine):
    """After any sequence of facts, the partition gives the answers that asking everybody would give."""

    def __init__(self):
        super().__init__()
        self.made = 0
        self.matching = Matching(name_class=self.name_class)
        self.mirror = Mirror()
        self.workers: dict[str, WorkerFacts] = {}
        self.live: dict[int, frozenset[int]] = {}

    def name_class(self):
        self.made += 1
        return f"c{self.made}"

    def accepts(self, requirement, worker):
        return worker.metadata["value"] in self.live[requirement]

    def snapshot(self):
        return {name: set(capable) for name, capable in self.mirror.capable.items()}

    @rule(name=NAMES, value=VALUES)
    def join(self, name, value):
        before, new = self.snapshot(), name not in self.workers
        own = self.mirror.class_of.get(name)
        self.workers[name] = facts(name, value)
        able = {one for one in self.live if self.accepts(one, self.workers[name])}
        change = self.matching.join(self.workers[name])
        self.mirror.apply(change)
        assert set(change.assigned) <= {name}
        assert change.assigned or not new
        if not new and before[own] == able:
            assert change == Change()  # a changed figure that decides nothing costs nothing
        if change.made:
            assert able not in [capable for one, capable in before.items() if one not in change.gone]
        after = self.snapshot()
        assert all(after[one] == before[one] for one in before.keys() & after.keys())

    @rule(name=NAMES)
    def leave(self, name):
        before = self.snapshot()
        change = self.matching.leave(name)
        known = self.workers.pop(name, None)
        self.mirror.apply(change, left=name if known is not None else None)
        assert change == Change(gone=change.gone)
        after = self.snapshot()
        assert all(after[one] == before[one] for one in before.keys() & after.keys())

    @rule(requirement=REQUIREMENTS, values=st.frozensets(VALUES))
    def need(self, requirement, values):
        before, members = self.snapshot(), {name: set(who) for name, who in self.mirror.members.items()}
        known = requirement in self.live
        self.live.setdefault(requirement, values)
        change = self.matching.need(requirement, lambda worker: worker.metadata["value"] in values)
        self.mirror.apply(change)
        assert not change.gone
        if known:
            assert change == Change()
        after = self.snapshot()
        assert all(before[one] <= after[one] <= before[one] | {requirement} for one in before)
        for name, who in members.items():
            assert 2 * len(self.mirror.members[name]) >= len(who)  # the larger part keeps the name, and its queue

    @rule(requirement=REQUIREMENTS)
    def drop(self, requirement):
        self.live.pop(requirement, None)
        self.matching.drop(requirement)
        self.mirror.drop(requirement)

    @invariant()
    def the_classes_are_a_partition_of_the_workers(self):
        classes = self.matching.classes()
        assert Counter(worker for members in classes.values() for worker in members) == Counter(
            dict.fromkeys(self.workers, 1)
        )
        assert all(classes.values())
        for name, members in classes.items():
            assert {self.matching.class_of(worker) for worker in members} == {name}

    @invariant()
    def every_answer_is_that_of_the_predicate(self):
        classes = self.matching.classes()
        for requirement in self.live:
            able = {name for name, worker in self.workers.items() if self.accepts(requirement, worker)}
            assert {name for name in self.workers if self.matching.can_run(name, requirement)} == able
            capable = self.matching.capable_classes(requirement)
            assert sorted(capable) == sorted(name for name, members in classes.items() if members <= able)
            assert {worker for name in capable for worker in classes[name]} == able

    @invariant()
    def the_changes_tell_everything(self):
        assert {name: frozenset(members) for name, members in self.mirror.members.items()} == self.matching.classes()
        for name, capable in self.mirror.capable.items():
            assert capable == {one for one in self.live if name in self.matching.capable_classes(one)}


TestMatchingIsThePlainAnswer = MatchingIsThePlainAnswer.TestCase
TestMatchingIsThePlainAnswer.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture
def matching():
    names = iter("abcdefgh")
    return Matching(name_class=lambda: next(names))


def odd(worker):
    return worker.metadata["value"] % 2 == 1


def never(_worker):
    return False


def test_workers_that_nothing_tells_apart_share_one_class_however_much_their_metadata_differ(matching):
    for number in range(5):
        matching.join(facts(f"w{number}", value=number))

    assert list(matching.classes()) == ["a"]


@pytest.mark.parametrize(("values", "leaving"), [([1, 1, 1, 2, 2], [2, 2]), ([1, 2, 2], [1]), ([1, 2], [1])])
def test_a_class_that_a_requirement_divides_keeps_its_larger_part(matching, values, leaving):
    for number, value in enumerate(values):
        matching.join(facts(f"w{number}", value=value))
    change = matching.need("odd", odd)

    assert [values[int(worker[1:])] for worker in sorted(change.assigned)] == leaving
    assert change.made == ["b"]
    assert change.gained == [Gain("a" if 2 in leaving else "b", "odd")]


def test_what_a_divided_class_could_run_its_new_part_can_run_too(matching):
    matching.need("any", lambda _worker: True)
    matching.join(facts("w0", value=1))
    matching.join(facts("w1", value=2))
    change = matching.need("odd", odd)

    assert sorted(matching.capable_classes("any")) == ["a", "b"]
    assert Gain("b", "any") in change.gained


def test_a_worker_whose_new_metadata_decide_otherwise_moves_and_its_empty_class_goes(matching):
    matching.need("odd", odd)
    matching.join(facts("w0", value=1))
    matching.join(facts("w1", value=2))
    change = matching.join(facts("w0", value=4, version=2))

    assert change == Change(assigned={"w0": "b"}, gone=["a"])
    assert not matching.can_run("w0", "odd")
    assert not matching.capable_classes("odd")


def test_a_requirement_that_nobody_meets_has_no_class_and_nothing_changes(matching):
    matching.join(facts("w0"))

    assert matching.need("never", never) == Change()
    assert matching.capable_classes("never") == []


def test_a_requirement_that_was_dropped_is_answered_by_its_new_predicate(matching):
    matching.join(facts("w0", value=1))
    matching.need("one", odd)
    matching.drop("one")
    matching.drop("one")
    assert not matching.can_run("w0", "one")
    matching.need("one", never)

    assert not matching.can_run("w0", "one")


def test_who_is_not_in_the_pool_can_run_nothing_and_leaves_without_a_trace(matching):
    matching.need("any", lambda _worker: True)

    assert not matching.can_run("w0", "any")
    assert matching.class_of("w0") is None
    assert matching.leave("w0") == Change()
