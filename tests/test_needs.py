"""What a request needs of others: order, circles, and what it takes."""

import uuid

import pytest

from mqworker.errors import TakeInvalid
from mqworker.messages import After, Request, Take
from mqworker.needs import bind, in_order, needs


def id_of(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, name))


def request(name: str, *after: str) -> Request:
    return Request(id=id_of(name), task="noop", after=[After(request=id_of(one)) for one in after])


def test_taking_from_a_request_needs_its_success_whatever_else_is_said():
    one = Request(
        id=id_of("a"),
        task="noop",
        after=[
            After(request=id_of("b"), need="end"),
            After(request=id_of("c"), need="success"),
            After(request=id_of("c"), need="end"),
        ],
        take=[Take(into="/x", request=id_of("b"), category="a:b")],
    )
    assert needs(one) == {id_of("b"): "success", id_of("c"): "success"}


def test_requests_without_needs_keep_their_order():
    assert in_order([request("a"), request("b"), request("c", "elsewhere")]) == ([0, 1, 2], {})


def test_each_request_stands_behind_those_it_needs():
    requests = [request("d", "b", "c"), request("c", "a"), request("b", "a"), request("a")]
    order, problems = in_order(requests)
    place = {requests[number].id: at for at, number in enumerate(order)}
    assert not problems
    assert sorted(order) == [0, 1, 2, 3]
    for one in requests:
        assert all(place[needed] < place[one.id] for needed in needs(one))


def test_a_circle_is_named_on_each_of_its_members_and_on_what_needs_one_of_them_and_on_no_other():
    requests = [request("a", "b"), request("b", "c"), request("c", "a"), request("d", "a"), request("e")]
    order, problems = in_order([*requests, request("f", "e", "d")])
    assert order == [4, 0, 1, 2, 3, 5]
    assert problems.keys() == {0, 1, 2, 3, 5}
    assert problems[5].endswith(" needs ".join(id_of(name) for name in "fdabca"))
    assert problems[0].endswith(" needs ".join(id_of(name) for name in "abca"))
    assert problems[1].endswith(" needs ".join(id_of(name) for name in "bcab"))


def test_a_request_that_needs_itself_is_a_circle():
    _, problems = in_order([request("a", "a")])
    assert problems[0].endswith(f"{id_of('a')} needs {id_of('a')}")


def test_two_circles_that_share_a_member_are_both_refused():
    requests = [request("a", "b", "c"), request("b", "a"), request("c", "a")]
    _, problems = in_order(requests)
    assert problems.keys() == {0, 1, 2}


@pytest.mark.parametrize(
    ("pointer", "bound"),
    [
        ("/input/id", {"input": {"id": 7, "kept": 1}}),
        ("/other/deep", {"input": {"id": 1, "kept": 1}, "other": {"deep": 7}}),
        ("/a~1b~0c", {"input": {"id": 1, "kept": 1}, "a/b~c": 7}),
    ],
)
def test_a_taken_id_is_bound_at_its_place(pointer, bound):
    data = {"input": {"id": 1, "kept": 1}}
    assert bind(data, {pointer: 7}) == bound
    assert data == {"input": {"id": 1, "kept": 1}}, "what was submitted stays as it was"


def test_what_is_on_the_way_must_be_an_object():
    with pytest.raises(TakeInvalid, match=r"on the way to /input/id, got \[1\] at 'input'"):
        bind({"input": [1]}, {"/input/id": 7})
