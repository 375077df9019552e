import random
import re
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import mqworker.matching
from mqworker.matching import ESCAPED, NO_METADATA, REFUSED, Change, Gain, Matching, Question, WorkerFacts
from mqworker.tracking import Observation, Read, ask_plainly, observe

# ---------------------------------------------------------------- programs that a machine wrote

VALUE = [
    "m.get($n)",
    "m[$n]",
    "m.get($n, $s)",
    "m.get($n) or $s",
    "dict(m).get($n)",
    "dict.get(m, $n)",
    "m.get(m.get($n))",
]
TEST = [
    "($v) == $s",
    "($v) != ($v)",
    "$n in m",
    "($v) >= $s",
    "($v)",
    "not ($v)",
    "$s in ($v)",
    "len(m) > 2",
    "'b' in list(m)",
]
LINES = [
    "if $t: return $t",
    "try:\n  if $t: return $t\nexcept KeyError: return $t",
    "m.pop($n, None)",
    "if $t and $t: return False",
]


def written(chance):
    def fill(template):
        return re.sub(r"\$(\w)", lambda found: hole(found[1]), template)

    def hole(kind):
        if kind == "n":
            return repr(chance.choice("abc"))
        if kind == "s":
            return repr(chance.choice([0, 1, 2, "x", None, True]))
        return fill(chance.choice(VALUE if kind == "v" else TEST))

    lines = [line for _ in range(chance.choice([0, 1, 2])) for line in fill(chance.choice(LINES)).splitlines()]
    source = "def ask(m, d):\n" + "".join(f"  {line}\n" for line in [*lines, f"return {fill('$t')}"])
    scope = {}
    exec(compile(source, "<written>", "exec"), scope)  # noqa: S102  # the test wrote it
    return scope["ask"]


PROGRAMS = [written(random.Random(seed)) for seed in range(80)]  # noqa: S311  # seeds to come back to
TASKS = ["red", "blue"]


def question(ask, task="red", denied=()):
    return Question(
        task=task,
        observe=lambda metadata: observe(ask, metadata, {}),
        plain=lambda metadata: ask_plainly(ask, metadata, {}),
        denied=frozenset(denied),
    )


def facts(name, version=1, tasks=("red",), **metadata):
    return WorkerFacts(name=name, metadata=metadata, metadata_version=version, tasks=dict.fromkeys(tasks, 1))


# ---------------------------------------------------------------- against asking everybody


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


NAMES = st.sampled_from([f"w{number}" for number in range(8)])
REQUIREMENTS = st.sampled_from(range(8))
METADATA = st.dictionaries(
    st.sampled_from("abcd"), st.sampled_from([0, 1, 2, 1.5, True, None, "x", "b", [], ["x", 1], {"x": 1}])
)


class MatchingIsThePlainAnswer(RuleBasedStateMachine):
    """After any sequence of facts, the partition gives the answers that asking everybody would give."""

    bound, leaves, idle = 2000, 1024, 256

    def __init__(self):
        super().__init__()
        mqworker.matching.MAX_LEAVES, mqworker.matching.MAX_IDLE_KEYS = self.leaves, self.idle
        self.made = 0
        self.matching = Matching(name_class=self.name_class, max_shared_classes=self.bound)
        self.mirror = Mirror()
        self.workers: dict[str, WorkerFacts] = {}
        self.live: dict[int, tuple[Question, object]] = {}

    def teardown(self):
        mqworker.matching.MAX_LEAVES, mqworker.matching.MAX_IDLE_KEYS = 1024, 256

    def name_class(self):
        self.made += 1
        return f"c{self.made}"

    def accepts(self, requirement, worker):
        """Say yes or no, and what was raised."""
        own, ask = self.live[requirement]
        if own.task not in worker.tasks or (worker.name, worker.metadata_version) in own.denied:
            return False, None
        return ask_plainly(ask, worker.metadata, {})

    def able(self, worker):
        return {requirement for requirement in self.live if self.accepts(requirement, worker)[0]}

    def snapshot(self):
        return {name: set(capable) for name, capable in self.mirror.capable.items()}

    @rule(name=NAMES, metadata=METADATA, tasks=st.sets(st.sampled_from(TASKS)) | st.just({"red"}), newer=st.booleans())
    def join(self, name, metadata, tasks, newer):
        before, known = self.snapshot(), self.workers.get(name)
        own = self.mirror.class_of.get(name)
        version = known.metadata_version + newer if known else 1
        self.workers[name] = facts(name, version, tasks, **metadata)
        able = self.able(self.workers[name])
        change = self.matching.join(self.workers[name])
        self.mirror.apply(change)
        assert set(change.assigned) <= {name}
        assert change.assigned or known
        if known and before[own] == able:
            assert change == Change()  # a changed figure that decides nothing costs nothing
        if change.made and len(before) < self.bound:
            assert able not in [capable for one, capable in before.items() if one not in change.gone]
        after = self.snapshot()
        assert all(after[one] >= before[one] for one in before.keys() & after.keys())
        assert all(
            after[one] == before[one] for one in before.keys() & after.keys() if self.mirror.members[one] != {name}
        )

    @rule(name=NAMES)
    def leave(self, name):
        before = self.snapshot()
        change = self.matching.leave(name)
        known = self.workers.pop(name, None)
        self.mirror.apply(change, left=name if known is not None else None)
        assert change == Change(gone=change.gone)
        after = self.snapshot()
        assert all(after[one] == before[one] for one in before.keys() & after.keys())

    @rule(
        requirement=REQUIREMENTS,
        ask=st.sampled_from(PROGRAMS),
        task=st.sampled_from(TASKS),
        denied=st.sets(st.tuples(NAMES, st.integers(1, 2)), max_size=2),
    )
    def need(self, requirement, ask, task, denied):
        before, members = self.snapshot(), {name: set(who) for name, who in self.mirror.members.items()}
        known, escaped = requirement in self.live, set(self.matching.escaped())
        self.live.setdefault(requirement, (question(ask, task, denied), ask))
        change = self.matching.need(requirement, question(ask, task, denied))
        self.mirror.apply(change)
        assert self.matching.escaped() == escaped  # these programs are pure
        if known:
            assert change == Change()
        assert not change.gone
        after = self.snapshot()
        assert all(before[one] <= after[one] <= before[one] | {requirement} for one in before)
        for name, who in members.items():
            assert 2 * len(self.mirror.members[name]) >= len(who)  # the larger part keeps the name, and its queue

    @rule(requirement=REQUIREMENTS)
    def drop(self, requirement):
        self.live.pop(requirement, None)
        self.matching.drop(requirement)
        self.mirror.drop(requirement)

    @rule(requirement=REQUIREMENTS)
    def escape(self, requirement):
        change = self.matching.escape(requirement)
        assert change == Change()  # the same answers, dearer
        assert (requirement in self.matching.escaped()) == (requirement in self.live)

    @rule()
    def merge(self):
        before, members = self.snapshot(), {name: set(who) for name, who in self.mirror.members.items()}
        change = self.matching.merge()
        self.mirror.apply(change)
        assert not change.made
        assert not change.gained
        after = self.snapshot()
        assert all(after[one] == before[one] for one in after)
        assert len({frozenset(capable) for capable in after.values()}) == len(after)
        for one in change.gone:
            [heir] = [other for other, capable in after.items() if capable == before[one]]
            assert len(members[heir]) >= len(members[one])
        assert self.matching.merge() == Change()

    @invariant()
    def the_classes_are_a_partition_of_the_workers(self):
        classes = self.matching.classes()
        assert Counter(worker for members in classes.values() for worker in members) == Counter(
            dict.fromkeys(self.workers, 1)
        )
        assert all(classes.values())
        assert self.matching.number_of_classes() == len(classes)
        for name, members in classes.items():
            assert {self.matching.class_of(worker) for worker in members} == {name}
            assert self.matching.members(name) == members
            assert set(self.matching.runs(name)) == {
                one for one in self.live if name in self.matching.capable_classes(one)
            }

    @invariant()
    def every_answer_is_that_of_the_predicate(self):
        classes = self.matching.classes()
        assert set(self.matching.requirements()) == set(self.live)
        for requirement in self.live:
            answers = {name: self.accepts(requirement, worker) for name, worker in self.workers.items()}
            able = {name for name, (answer, _) in answers.items() if answer}
            assert {name for name in self.workers if self.matching.can_run(name, requirement)} == able
            capable = self.matching.capable_classes(requirement)
            assert sorted(capable) == sorted(name for name, members in classes.items() if members <= able)
            assert {worker for name in capable for worker in classes[name]} == able
            errors = {error for _, error in answers.values()} - {None}
            assert self.matching.errors(requirement) in (errors or {None})

    @invariant()
    def the_changes_tell_everything(self):
        assert {name: frozenset(members) for name, members in self.mirror.members.items()} == self.matching.classes()
        for name, capable in self.mirror.capable.items():
            assert capable == {one for one in self.live if name in self.matching.capable_classes(one)}

    @invariant()
    def the_funnel_adds_up_and_a_worker_stops_where_it_says(self):
        for requirement in self.live:
            funnel = self.matching.funnel(requirement)
            left = len(self.workers)
            assert funnel.workers == left
            for step in funnel.steps:
                left -= step.stopped
                assert step.passed == left
                assert sum(one.workers for one in step.offered) == step.stopped  # fewer values than it names
                for one in step.offered:
                    assert 0 < len(one.examples) <= one.workers
            assert funnel.able == left == sum(self.accepts(requirement, one)[0] for one in self.workers.values())
            places = Counter(self.matching.decide(requirement, worker)[1] for worker in self.workers.values())
            if requirement not in self.matching.escaped():
                assert places == Counter(
                    {step.looked_at: step.stopped for step in funnel.steps if step.stopped}
                ) + Counter({None: funnel.able})


class MatchingWithTightBounds(MatchingIsThePlainAnswer):
    """The same with few shared classes, tries that are begun anew all the time, and no index kept."""

    bound, leaves, idle = 3, 2, 0


BUDGET = settings(max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TestMatchingIsThePlainAnswer = MatchingIsThePlainAnswer.TestCase
TestMatchingIsThePlainAnswer.settings = BUDGET
TestMatchingWithTightBounds = MatchingWithTightBounds.TestCase
TestMatchingWithTightBounds.settings = BUDGET


# ---------------------------------------------------------------- one by one


@pytest.fixture
def matching():
    names = iter("abcdefghijklmnopqrstuvwxyz")
    return Matching(name_class=lambda: next(names))


class Asked:
    """Count how often a predicate is asked, and how."""

    def __init__(self, ask, **others):
        self.noted, self.plainly = 0, 0
        self._ask = ask
        self.question = Question(task="red", observe=self._observe, plain=self._plain, **others)

    def _observe(self, metadata):
        self.noted += 1
        return observe(self._ask, metadata, {})

    def _plain(self, metadata):
        self.plainly += 1
        return ask_plainly(self._ask, metadata, {})


def odd(metadata, _):
    return metadata["value"] % 2 == 1


def big(metadata, _):
    return metadata["memory"] >= 8


def test_workers_that_nothing_tells_apart_share_one_class_however_much_their_metadata_differ(matching):
    for number in range(5):
        matching.join(facts(f"w{number}", value=number))

    assert list(matching.classes()) == ["a"]


@pytest.mark.parametrize(("values", "leaving"), [([1, 1, 1, 2, 2], [2, 2]), ([1, 2, 2], [1]), ([1, 2], [1])])
def test_a_class_that_a_requirement_divides_keeps_its_larger_part(matching, values, leaving):
    for number, value in enumerate(values):
        matching.join(facts(f"w{number}", value=value))
    change = matching.need("odd", question(odd))

    assert [values[int(worker[1:])] for worker in sorted(change.assigned)] == leaving
    assert change.made == ["b"]
    assert change.gained == [Gain("a" if 2 in leaving else "b", "odd")]


def test_what_a_divided_class_could_run_its_new_part_can_run_too(matching):
    matching.need("any", question(lambda _, __: True))
    matching.join(facts("w0", value=1))
    matching.join(facts("w1", value=2))
    change = matching.need("odd", question(odd))

    assert sorted(matching.capable_classes("any")) == ["a", "b"]
    assert Gain("b", "any") in change.gained


def test_a_worker_whose_new_metadata_decide_otherwise_moves_and_its_empty_class_goes(matching):
    matching.need("odd", question(odd))
    matching.join(facts("w0", value=1))
    matching.join(facts("w1", value=2))
    change = matching.join(facts("w0", 2, value=4))

    assert change == Change(assigned={"w0": "b"}, gone=["a"])
    assert not matching.can_run("w0", "odd")
    assert not matching.capable_classes("odd")


def test_a_class_of_one_that_can_run_more_keeps_its_queue(matching):
    matching.need("odd", question(odd))
    matching.join(facts("w0", value=2))

    assert matching.join(facts("w0", 2, value=3)) == Change(gained=[Gain("a", "odd")])


def test_a_requirement_that_nobody_meets_has_no_class_and_nothing_changes(matching):
    matching.join(facts("w0"))

    assert matching.need("never", question(lambda _, __: False)) == Change()
    assert not matching.capable_classes("never")


def test_a_requirement_that_was_dropped_is_answered_by_its_new_predicate(matching):
    matching.join(facts("w0", value=1))
    matching.need("one", question(odd))
    matching.drop("one")
    matching.drop("one")
    assert not matching.can_run("w0", "one")
    matching.need("one", question(lambda _, __: False))

    assert not matching.can_run("w0", "one")


def test_classes_that_no_live_requirement_tells_apart_become_one_and_the_largest_keeps_its_queue(matching):
    for number in range(5):
        matching.join(facts(f"w{number}", value=number))
    matching.need("odd", question(odd))
    assert matching.merge() == Change()
    matching.drop("odd")
    assert matching.number_of_classes() == 2

    assert matching.merge() == Change(assigned={"w1": "a", "w3": "a"}, gone=["b"])


def test_who_is_not_in_the_pool_can_run_nothing_and_leaves_without_a_trace(matching):
    matching.need("any", question(lambda _, __: True))

    assert not matching.can_run("w0", "any")
    assert matching.class_of("w0") is None
    assert matching.leave("w0") == Change()
    assert matching.members("a") == frozenset()
    assert matching.runs("a") == ()
    assert matching.errors("nothing") is None
    assert matching.escape("nothing") == Change()


def test_a_worker_that_does_not_list_the_task_is_not_asked(matching):
    asked = Asked(big)
    matching.join(facts("w0", tasks=["blue"], memory=8))
    matching.need("big", asked.question)
    assert (matching.can_run("w0", "big"), asked.noted, asked.plainly) == (False, 0, 0)
    matching.join(facts("w0", tasks=["blue", "red"], memory=8))
    assert matching.can_run("w0", "big")
    matching.join(facts("w0", tasks=["blue"], memory=8))

    assert not matching.can_run("w0", "big")


def test_a_refusal_counts_for_that_version_of_the_metadata_only(matching):
    matching.join(facts("w0", 3, memory=8))
    matching.join(facts("w1", 3, memory=8))
    matching.need("big", question(big, denied={("w0", 3)}))
    assert [matching.can_run(name, "big") for name in ("w0", "w1")] == [False, True]
    matching.join(facts("w0", 4, memory=8))

    assert matching.can_run("w0", "big")


# ---------------------------------------------------------------- what it costs


def test_one_answer_decides_all_workers_that_would_be_read_alike(matching):
    for number in range(500):
        matching.join(facts(f"w{number}", hostname=f"host{number}", memory=number))
    asked = Asked(big)
    matching.need("big", asked.question)

    assert len({one for name in matching.capable_classes("big") for one in matching.members(name)}) == 492
    assert asked.noted == 2  # enough memory, and not: however many figures there are
    assert asked.plainly <= 2


def test_workers_that_miss_a_key_are_decided_together_whoever_had_it_before(matching):
    for number in range(100):
        matching.join(facts(f"w{number}", hostname=f"host{number}"))
    matching.need("other", question(lambda m, _: m.get("memory") == 5))
    matching.join(facts("w7", 2, memory=5))
    matching.join(facts("w7", 3))
    asked = Asked(lambda m, _: m.get("memory", 0) == 0)
    matching.need("none", asked.question)

    assert (asked.noted, asked.plainly) == (1, 1)
    assert matching.funnel("other").steps[-1].offered == [("", 100, ["w0", "w1", "w2"])]


def test_a_worker_that_joins_is_walked_and_hardly_ever_asked(matching):
    asked = Asked(big)
    matching.need("big", asked.question)
    for number in range(1000):
        matching.join(facts(f"w{number}", hostname=f"host{number}", memory=number))

    assert asked.noted == 2
    assert asked.plainly <= 20  # the 1st, 2nd, 4th ... 512th time that a leaf is used


def test_changed_metadata_that_no_predicate_reads_asks_nobody(matching):
    asked = Asked(lambda m, _: m["memory"] >= 8 and "x" in m["list"])
    for number in range(4):
        matching.join(facts(f"w{number}", memory=number * 4, list=["x"]))
    matching.need("big", asked.question)
    before = (asked.noted, asked.plainly)
    for version in range(100):
        assert matching.join(facts("w3", version, memory=12, list=["x"], free_disk=version)) == Change()
    for version in range(100, 200):  # read, but no decision changes
        assert matching.join(facts("w3", version, memory=9 + version, list=["x", version])) == Change()

    assert (asked.noted, asked.plainly) <= (before[0], before[1] + 7)


@pytest.mark.parametrize(
    ("old", "new"), [(1, True), ([1], [True]), (0.0, -0.0), (1, 1.0), ({"a": 1, "b": 2}, {"b": 2, "a": 1})]
)
def test_values_that_are_equal_but_not_the_same_are_a_change(matching, old, new):
    matching.need("new", question(lambda m, _: repr(m["x"]) == repr(new)))
    matching.join(facts("w0", x=old))
    assert not matching.can_run("w0", "new")
    matching.join(facts("w0", 2, x=new))

    assert matching.can_run("w0", "new")


@pytest.mark.parametrize(
    "ask", [lambda m, _: len(m) == 1, lambda m, _: m.get("b") is None, lambda m, _: "b" not in list(m)]
)
def test_what_a_worker_was_that_left_is_not_held_against_who_takes_its_place(matching, ask):
    matching.need("first", question(ask))
    matching.join(facts("w0", a=1))
    matching.join(facts("w1", a=1))
    matching.leave("w1")
    matching.join(facts("w2", a=1, b=1))
    matching.need("second", question(ask))
    matching.join(facts("w0", 2, a=1, b=1))
    matching.join(facts("w3", a=1))
    matching.need("third", question(ask))

    assert [[matching.can_run(f"w{one}", name) for one in (0, 2, 3)] for name in ("first", "second", "third")] == [
        [False, False, True]
    ] * 3


def test_the_order_of_the_keys_is_a_change_for_who_reads_it(matching):
    matching.need("first", question(lambda m, _: next(iter(m)) == "b"))
    matching.need("text", question(lambda m, _: str(m).startswith("{'b'")))
    matching.join(facts("w0", a=1, b=1))
    matching.join(facts("w0", 2, b=1, a=1))

    assert matching.can_run("w0", "first")
    assert matching.can_run("w0", "text")


def test_a_trie_does_not_grow_with_figures_that_are_not_seen_again(matching, monkeypatch):
    monkeypatch.setattr(mqworker.matching, "MAX_LEAVES", 10)
    asked = Asked(lambda m, _: str(m["free_disk"]) == "1")
    matching.need("disk", asked.question)
    for version in range(10):
        matching.join(facts("w0", version, free_disk=version))
    matching.join(facts("w0", 10, free_disk=1))
    assert (asked.noted, matching.can_run("w0", "disk")) == (10, True)
    matching.join(facts("w0", 11, free_disk=11))
    matching.join(facts("w0", 12, free_disk=1))

    assert (asked.noted, matching.can_run("w0", "disk")) == (12, True)


def test_past_the_bound_on_classes_a_worker_that_moves_gets_one_of_its_own():
    names = iter("abcdefgh")
    matching = Matching(name_class=lambda: next(names), max_shared_classes=2)
    matching.need("odd", question(odd))
    for number in range(6):
        matching.join(facts(f"w{number}", value=number))

    assert sorted(map(sorted, matching.classes().values())) == [["w0"], ["w1"], ["w2"], ["w3"], ["w4"], ["w5"]]
    matching.merge()
    assert sorted(map(sorted, matching.classes().values())) == [["w0", "w2", "w4"], ["w1", "w3", "w5"]]


# ---------------------------------------------------------------- who breaks the rules


def test_other_reads_for_the_same_metadata_are_a_contradiction(matching):
    names = iter("ab")

    def observed(metadata):
        name = next(names)
        return observe(lambda m, _: m.get(name) == 1, metadata, {})

    matching.join(facts("w0", a=1))
    matching.need("fickle", Question(task="red", observe=observed, plain=lambda m: (m.get("b") == 1, None)))
    assert matching.can_run("w0", "fickle")
    matching.join(facts("w1", b=1))

    assert matching.escaped() == {"fickle"}
    assert [matching.can_run(name, "fickle") for name in ("w0", "w1")] == [False, True]


def test_a_leaf_that_is_wrong_is_found_out_and_everybody_is_asked_anew(matching):
    mood = {"answer": True}
    matching.need("moody", question(lambda m, _: m["x"] == 1 and mood["answer"]))
    matching.join(facts("w0", x=1))
    mood["answer"] = False
    assert matching.can_run("w0", "moody")
    change = matching.join(facts("w1", x=1))

    assert matching.escaped() == {"moody"}
    assert not matching.capable_classes("moody")
    assert set(change.assigned) == {"w0", "w1"}
    mood["answer"] = True
    matching.join(facts("w1", x=1))
    assert [matching.can_run(name, "moody") for name in ("w0", "w1")] == [False, True]


def test_a_group_whose_members_answer_otherwise_escapes_at_once(matching):
    def observed(_):
        return Observation(answer=True, metadata=(Read(("value", ("x",)), "1"),), data=())

    for number in range(3):
        matching.join(facts(f"w{number}", x=1, y=number))
    plain = Question(task="red", observe=observed, plain=lambda m: (m["y"] == 0, None))
    matching.need("liar", plain)

    assert matching.escaped() == {"liar"}
    assert [matching.can_run(f"w{number}", "liar") for number in range(3)] == [True, False, False]


def test_reads_that_are_not_what_is_there_do_not_keep_it_for_ever(matching):
    def observed(_):
        return Observation(answer=True, metadata=(Read(("value", ("x",)), "2"),), data=())

    matching.join(facts("w0", x=1))
    matching.need("liar", Question(task="red", observe=observed, plain=lambda _: (True, None)))

    assert matching.can_run("w0", "liar")


def test_reads_that_lead_to_another_answer_are_a_contradiction(matching):
    def observed(metadata):
        return Observation(answer=metadata["x"] == 1, metadata=(Read(("value", ("x",)), "1"),), data=())

    matching.need("liar", Question(task="red", observe=observed, plain=lambda m: (m["x"] == 1, None)))
    matching.join(facts("w0", x=1))
    matching.join(facts("w1", x=2))

    assert matching.escaped() == {"liar"}
    assert [matching.can_run(name, "liar") for name in ("w0", "w1")] == [True, False]


def test_a_question_for_the_exact_type_escapes_when_it_shows(matching):
    matching.need("typed", question(lambda m, _: type(m) is dict and m["x"] == 1))
    matching.join(facts("w0", x=2))
    matching.join(facts("w1", x=1))

    assert matching.can_run("w1", "typed")
    assert not matching.can_run("w0", "typed")


def test_an_escaped_requirement_is_decided_by_asking_each_worker_whenever_it_comes(matching):
    matching.join(facts("w0", value=1))
    matching.need("odd", question(odd))
    matching.escape("odd")
    matching.join(facts("w1", value=3))
    matching.join(facts("w2"))

    assert [matching.can_run(f"w{number}", "odd") for number in range(3)] == [True, True, False]
    assert matching.errors("odd") == "KeyError: 'value'"
    matching.leave("w2")
    assert matching.errors("odd") is None
    matching.drop("odd")
    assert matching.escaped() == set()


def test_what_asking_raises_is_told_while_a_worker_is_there_that_raises_it(matching):
    matching.need("odd", question(odd))
    matching.join(facts("w0", value=1))
    assert matching.errors("odd") is None
    matching.join(facts("w1"))
    assert matching.errors("odd") == "KeyError: 'value'"
    matching.join(facts("w1", 2, value=2))

    assert matching.errors("odd") is None


# ---------------------------------------------------------------- the funnel


def sbuild(m, _):
    if m.get("tool") != 1 or not m.get("available"):
        return False
    return "trixie" in m["chroots"] and m["memory"] >= 8


ABLE = {"tool": 1, "available": True, "chroots": ["trixie"], "memory": 8}


def test_a_funnel_tells_where_the_workers_stop_and_what_they_offer(matching):
    def join(name, **changes):
        matching.join(facts(name, **{**ABLE, **changes}))

    matching.join(facts("other", tasks=["blue"]))
    join("able")
    join("refuser")
    for number in range(5):
        join(f"old{number}", tool=2)
    join("none", tool=None)
    join("sid", chroots=["sid"])
    join("bare", chroots=[])
    join("small", memory=4)
    join("mute", chroots=None)
    matching.need("build", question(sbuild, denied={("refuser", 1)}))
    funnel = matching.funnel("build")

    assert [(step.looked_at, step.asked, step.stopped, step.passed, step.offered) for step in funnel.steps] == [
        ("task red", [], 1, 12, [("", 1, ["other"])]),
        (REFUSED, [], 1, 11, [("", 1, ["refuser"])]),
        (("value", ("tool",)), ["1"], 6, 5, [("2", 5, ["old0", "old1", "old2"]), ("null", 1, ["none"])]),
        (("value", ("chroots",)), ['"trixie"'], 2, 3, [('["sid"]', 1, ["sid"]), ("[]", 1, ["bare"])]),
        (("value", ("memory",)), [">= 8"], 1, 2, [("4", 1, ["small"])]),
        ("can_run_on() raised TypeError: argument of type 'NoneType' is not iterable", [], 1, 1, [("", 1, ["mute"])]),
    ]
    assert (funnel.workers, funnel.able) == (13, 1)


def test_a_funnel_of_who_looks_at_nothing_or_cannot_be_tracked_adds_up_too(matching):
    for number in range(12):
        matching.join(facts(f"w{number}", x=number))
    matching.need("never", question(lambda _, __: False))
    matching.need("text", question(lambda m, _: str(m) == "{'x': 3}"))
    matching.need("escaped", question(lambda m, _: m["x"] == 3))
    matching.need("many", question(lambda m, _: m["x"] == 12))
    matching.escape("escaped")

    last = {name: matching.funnel(name).steps[-1] for name in matching.requirements()}
    assert (last["never"].looked_at, last["never"].stopped) == (NO_METADATA, 12)
    assert (last["text"].looked_at, last["text"].stopped) == (("whole", ()), 11)
    assert (last["escaped"].looked_at, last["escaped"].stopped) == (ESCAPED, 11)
    assert (last["many"].stopped, len(last["many"].offered)) == (12, mqworker.matching.MAX_OFFERED)


def test_a_worker_that_is_not_in_the_pool_is_decided_without_joining(matching):
    matching.need("build", question(sbuild, denied={("w0", 7)}))

    assert matching.decide("build", facts("w0", **ABLE)) == (True, None)
    assert matching.decide("build", facts("w0", **{**ABLE, "memory": 2})) == (False, ("value", ("memory",)))
    assert matching.decide("build", facts("w0", 7, **ABLE)) == (False, REFUSED)
    assert matching.decide("build", facts("w0", tasks=[], **ABLE)) == (False, "task red")
    assert matching.decide("build", facts("w0", tool=1, available=True)) == (
        False,
        "can_run_on() raised KeyError: 'chroots'",
    )
    assert not matching.classes()
