"""Which requests share a requirement class, by what is read of their data."""

import pytest

from mqworker.requirements import Kind, RequirementClass, Requirements, reads_from, reads_text, schema_text
from mqworker.tracking import WHOLE, Read, token_of

KIND = Kind(task="sawing", fingerprint="f", requires="", whole=False)
WOOD = ("value", ("wood",))
SIZE = ("value", ("size",))
SHAPE = ("object", ("shape",))
ROUND = ("value", ("shape", "round"))


def reads_of(data, *keys):
    return [Read(key, token_of(data, key)) for key in keys]


def made(requirements, data, *keys, kind=KIND):
    """Begin a class whose task reads these of its data on the workers that are there."""
    one = requirements.make(kind, data, data)
    if keys:
        requirements.extend(one, one.unknown(reads_of(data, *keys)))
    one.open = False
    return one


def nodes(requirements):
    """Count what the tries consist of."""

    def below(node):
        return 1 + sum(below(child) for child in node.children.values())

    return sum(below(root) for root in requirements._roots.values())


@pytest.fixture
def requirements():
    return Requirements()


def test_requests_that_agree_on_all_that_was_read_share_a_class_whatever_else_they_hold(requirements):
    one = made(requirements, {"wood": "oak", "size": 1}, WOOD)

    assert requirements.find(KIND, {"wood": "oak", "size": 7}) is one
    assert requirements.find(KIND, {"wood": "elm"}) is None
    assert requirements.find(KIND, {}) is None
    assert [*requirements] == [one]
    assert requirements.get(one.id) is one
    assert requirements.get(None) is None


@pytest.mark.parametrize("data", [{"wood": 1}, {"wood": True}, {"wood": 1.0}, {"wood": "1"}, {"wood": None}, {}])
def test_values_that_only_their_types_or_absence_tell_apart_are_different(requirements, data):
    every = ({"wood": 1}, {"wood": True}, {"wood": 1.0}, {"wood": "1"}, {"wood": None}, {})
    classes = [
        made(requirements, one, WOOD) if not number else made(requirements, one) for number, one in enumerate(every)
    ]

    assert len({one.id for one in classes}) == 6
    assert requirements.find(KIND, data) in classes


def test_a_task_that_reads_nothing_has_one_class(requirements):
    one = made(requirements, {"wood": "oak"})

    assert requirements.find(KIND, {"wood": "elm"}) is one
    assert requirements.find(KIND, {}) is one


@pytest.mark.parametrize(
    "other",
    [
        KIND._replace(task="planing"),
        KIND._replace(fingerprint="g"),
        KIND._replace(requires='{"required":["x"]}'),
        KIND._replace(whole=True),
    ],
)
def test_what_was_learned_of_one_kind_says_nothing_of_another(requirements, other):
    made(requirements, {"wood": "oak"})

    assert requirements.find(other, {"wood": "oak"}) is None


def test_looking_for_a_class_keeps_nothing(requirements):
    for number in range(3):
        assert requirements.find(KIND._replace(requires=str(number)), {}) is None

    assert nodes(requirements) == 0


def test_a_task_that_keeps_data_unseen_reads_all_of_it(requirements):
    kind = KIND._replace(whole=True)
    one = made(requirements, {"wood": "oak"}, kind=kind)
    other = made(requirements, {"wood": "elm"}, kind=kind)

    assert one is not other
    assert requirements.find(kind, {"wood": "oak"}) is one
    assert requirements.find(kind, {"wood": "oak", "size": 1}) is None
    assert one.unknown(reads_of({"wood": "oak"}, WOOD, SIZE, WHOLE)) == ()


def test_a_class_that_comes_to_what_others_have_learned_is_placed_by_it(requirements):
    made(requirements, {"wood": "oak", "size": 1}, WOOD, SIZE)
    other = made(requirements, {"wood": "elm", "size": 2}, SIZE)

    assert [read.key for read in other.reads] == [WOOD, SIZE]
    assert requirements.find(KIND, {"wood": "elm", "size": 2}) is other
    assert requirements.find(KIND, {"wood": "elm", "size": 3}) is None


def test_what_is_known_implies_what_is_read_inside_of_it(requirements):
    one = made(requirements, {"shape": {"round": 1}, "wood": "oak"}, WOOD, ("whole", ("shape",)))

    assert one.unknown(reads_of(one.data, ROUND, SHAPE, ("present", ("shape", "flat")), ("truth", ("wood",)))) == ()
    assert [read.key for read in one.unknown(reads_of(one.data, SIZE, WOOD, WHOLE))] == [SIZE, WHOLE]


def test_that_an_object_stands_there_says_nothing_of_what_is_in_it(requirements):
    one = made(requirements, {"shape": {"round": 1}}, SHAPE)

    assert [read.key for read in one.unknown(reads_of(one.data, SHAPE, ROUND))] == [ROUND]


def test_a_divided_class_takes_nobody_in_and_whoever_comes_there_learns_anew(requirements):
    old = made(requirements, {"wood": "oak", "size": 1}, WOOD)
    requirements.divide(old, reads_of(old.data, SIZE, ROUND))
    assert old.divided
    assert requirements.find(KIND, {"wood": "oak", "size": 1}) is None
    one = made(requirements, {"wood": "oak", "size": 1}, WOOD, SIZE)
    other = made(requirements, {"wood": "oak", "size": 2}, WOOD, SIZE)
    requirements.forget(old)

    assert requirements.find(KIND, {"wood": "oak", "size": 1}) is one
    assert requirements.find(KIND, {"wood": "oak", "size": 2}) is other
    assert [*requirements] == [one, other]
    assert len({old.id, one.id, other.id}) == 3


def test_a_class_that_was_divided_already_is_divided_and_extended_without_a_place(requirements):
    old = made(requirements, {"wood": "oak"}, WOOD)
    requirements.divide(old, reads_of(old.data, SIZE))
    one = made(requirements, {"wood": "oak", "size": 1})
    requirements.divide(old, reads_of(old.data, ROUND))
    requirements.extend(old, reads_of(old.data, ROUND))

    assert requirements.find(KIND, {"wood": "oak", "size": 1}) is one
    assert not one.divided


def test_requests_of_an_escaped_class_have_each_a_class_of_its_own_and_are_escaped_too(requirements):
    old = made(requirements, {"wood": "oak", "size": 1}, WOOD)
    requirements.escape(old)
    assert (old.escaped, old.divided) == (True, True)
    one, other = (made(requirements, {"wood": "oak", "size": size}) for size in (1, 2))
    elm = made(requirements, {"wood": "elm"})

    assert (one.escaped, other.escaped, elm.escaped) == (True, True, False)
    assert requirements.find(KIND, {"wood": "oak", "size": 2}) is other
    assert not one.divided


def test_an_escaped_class_of_one_request_alone_stays_where_it_is(requirements):
    one = made(requirements, {"wood": "oak"}, WHOLE)
    requirements.escape(one)

    assert (one.escaped, one.divided) == (True, False)
    assert requirements.find(KIND, {"wood": "oak"}) is one


def restored(requirements, number, data, *keys, **fields):
    one = RequirementClass(id=number, kind=KIND, data=data, reads=tuple(reads_of(data, *keys)), open=False, **fields)
    requirements.restore(one)
    return one


def test_classes_of_an_earlier_scheduler_come_back_to_their_places_and_numbers(requirements):
    requirements.count_from(9)
    oak = restored(requirements, 3, {"wood": "oak"}, WOOD)
    elm = restored(requirements, 9, {"wood": "elm", "size": 1}, WOOD, SIZE)

    assert requirements.find(KIND, {"wood": "oak", "size": 4}) is oak
    assert requirements.find(KIND, {"wood": "elm", "size": 1}) is elm
    assert oak.unknown(reads_of(oak.data, WOOD)) == ()
    assert not oak.divided
    assert made(requirements, {"wood": "ash"}).id == 10


@pytest.mark.parametrize(
    ("first", "second"),
    [((WOOD,), (SIZE,)), ((WOOD, SIZE), (WOOD,)), ((WOOD,), (WOOD, SIZE)), ((), (WOOD,)), ((WOOD,), (WOOD,))],
)
def test_a_class_that_learned_otherwise_than_another_is_divided_when_it_comes_back(requirements, first, second):
    data = {"wood": "oak", "size": 1}
    one, other = restored(requirements, 1, data, *first), restored(requirements, 2, data, *second)

    assert (one.divided, other.divided) == (False, True)
    assert requirements.find(KIND, data) is one
    assert requirements.get(2) is other


def test_a_class_that_comes_back_divided_has_no_place(requirements):
    one = restored(requirements, 1, {"wood": "oak"}, WOOD, divided=True)

    assert requirements.get(1) is one
    assert requirements.find(KIND, {"wood": "oak"}) is None
    assert nodes(requirements) == 0


def test_forgetting_keeps_what_others_stand_on_and_nothing_else(requirements):
    oak, elm = (made(requirements, {"wood": wood, "size": 1}, WOOD, SIZE) for wood in ("oak", "elm"))
    small = made(requirements, {"wood": "oak", "size": 0})
    sizes = [nodes(requirements)]
    for one in (oak, small, elm):
        requirements.forget(one)
        sizes.append(nodes(requirements))
        assert requirements.find(KIND, one.data) is None

    assert sizes == [6, 5, 3, 0]
    assert len(requirements) == 0


def divide(requirements, one):
    requirements.divide(one, reads_of(one.data, SIZE))


@pytest.mark.parametrize("end", [divide, Requirements.escape])
def test_forgetting_a_class_that_has_no_place_any_more_leaves_nothing_of_it(requirements, end):
    one = made(requirements, {"wood": "oak", "size": 1}, WOOD)
    end(requirements, one)
    requirements.forget(one)

    assert nodes(requirements) == 0
    assert len(requirements) == 0


def test_forgetting_what_came_back_without_a_place_leaves_that_of_the_others(requirements):
    one = restored(requirements, 1, {"wood": "oak", "size": 1}, WOOD)
    other = restored(requirements, 2, {"wood": "oak", "size": 1}, WOOD, SIZE)
    third = restored(requirements, 3, {"wood": "elm", "size": 1}, WOOD, SIZE, ROUND)
    fourth = restored(requirements, 4, {"wood": "elm", "size": 1}, WOOD, ROUND)
    requirements.forget(other)
    requirements.forget(fourth)
    requirements.forget(fourth)
    assert requirements.find(KIND, {"wood": "oak"}) is one
    assert requirements.find(KIND, {"wood": "elm", "size": 1}) is third
    requirements.forget(one)
    requirements.forget(third)

    assert nodes(requirements) == 0


def test_reads_come_back_from_the_ledger_as_they_were():
    reads = tuple(reads_of({"wood": 'o"ak', "shape": {"round": 1.5}}, WOOD, SHAPE, ROUND, WHOLE, ("==", ("size", "1"))))

    assert reads_from(reads_text(reads)) == reads
    assert reads_from(reads_text(())) == ()


def test_a_schema_is_known_by_its_text():
    assert schema_text(None) == ""
    assert schema_text({}) == "{}"
    assert schema_text({"required": ["x"]}) == '{"required":["x"]}'
