"""What a request needs of other requests: which, in what order, when it is met, and what it takes from them.

Pure; knows requests and states, no ledger and no artifacts but their ids and categories.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import msgspec

from mqworker.errors import TakeInvalid
from mqworker.lifecycle import State
from mqworker.messages import Reason, Request

Condition: TypeAlias = Literal["success", "end"]  # what a request needs of one that it comes after
Made: TypeAlias = Mapping[tuple[str, int], Sequence[tuple[str, int]]]  # (request, attempt) to (category, artifact)

MOST_SHOWN: Final = 100  # characters of what is in the way of an artifact's id

CIRCLES_LOOKED_FOR: Final = 1_000_000  # needs looked at, of one message: a tenth of a second; a thousand requests may
# have two hundred each, and what is left then is refused all the same
CIRCLE_SHOWN: Final = 10  # requests of a circle that are named


def needs(request: Request) -> dict[str, Condition]:
    """Return the requests that have to end before this one may be offered; taking from one needs its success."""
    found: dict[str, Condition] = {}
    for after in request.after:
        if found.get(after.request) != "success":
            found[after.request] = after.need
    for take in request.take:
        found[take.request] = "success"
    return found


def in_order(requests: Sequence[Request]) -> tuple[list[int], dict[int, str]]:
    """Order requests that come together so that each stands behind those that it needs.

    Returns the positions in that order, and what is wrong with those that need each other in a circle and with those
    that need one of these; they stand at the end.
    """
    position = {request.id: number for number, request in enumerate(requests)}
    wanted = [[position[id_] for id_ in needs(request) if id_ in position] for request in requests]
    if not any(wanted):
        return list(range(len(requests))), {}
    followers: dict[int, list[int]] = {}
    missing = []
    for number, before in enumerate(wanted):
        missing.append(len(before))
        for one in before:
            followers.setdefault(one, []).append(number)
    order = [number for number, count in enumerate(missing) if not count]
    for number in order:  # it grows as it goes
        for follower in followers.get(number, ()):
            missing[follower] -= 1
            if not missing[follower]:
                order.append(follower)
    left = [number for number, count in enumerate(missing) if count]
    problems = {}
    looks = CIRCLES_LOOKED_FOR
    for number in left:
        circle = _way_to_circle(number, wanted, missing, looks)
        looks -= circle.looks
        if circle.way:
            shown = [requests[one].id for one in circle.way]
            if len(shown) > CIRCLE_SHOWN:
                shown[CIRCLE_SHOWN - 1 : -1] = ["..."]
            names = " needs ".join(shown)
            problems[number] = f"expected requests that can be done one after the other, got a circle: {names}"
        else:
            problems[number] = "expected requests that can be done one after the other, got many that need each other"
    return [*order, *left], problems


class _Circle(NamedTuple):
    way: list[int]  # from a request back to itself; nothing if there is none
    looks: int  # at what a request needs, to find out


def _circle(start: int, wanted: Sequence[Sequence[int]], missing: Sequence[int], most: int) -> _Circle:
    """Look for the way from a request back to itself, at most at so many needs."""
    came_from: dict[int, int] = {}
    reached = [start]
    looks = 0
    for number in reached:  # it grows as it goes
        looks += len(wanted[number])
        if looks > most:
            break
        for one in wanted[number]:
            if not missing[one] or one in came_from:
                continue
            came_from[one] = number
            if one == start:
                way = [start]
                while came_from[way[-1]] != start:
                    way.append(came_from[way[-1]])
                return _Circle([start, *way[:0:-1], start], looks)
            reached.append(one)
    return _Circle([], looks)


def _way_to_circle(start: int, wanted: Sequence[Sequence[int]], missing: Sequence[int], most: int) -> _Circle:
    """Look for the way from a request to a circle, and around it: at once, if the request stands in one."""
    way = [start]
    looks = 0
    while True:
        found = _circle(way[-1], wanted, missing, most - looks)
        looks += found.looks
        if found.way or looks > most:
            return _Circle([*way[:-1], *found.way] if found.way else [], looks)
        way.append(next(one for one in wanted[way[-1]] if missing[one]))


class Standing(NamedTuple):
    """Where a request stands that others come after."""

    id: str
    state: State
    attempt: int
    at: float


def not_met(cause: Standing) -> Reason:
    """Say why what needs a request is aborted: this one ended, and not as it had to."""
    how = {State.ABORTED: "was aborted", State.REJECTED: "was rejected"}.get(cause.state, f"ended in {cause.state}")
    return Reason(text=f"needs {cause.id}, which {how}", stage="after")


def take_from(request: Request, cause: Standing, made: Made, bound: dict[str, int]) -> Reason | None:
    """Add to `bound` what a request takes from one that has succeeded; return why it cannot, and add nothing."""
    more = {}
    for take in request.take:
        if take.request != cause.id:
            continue
        found = [id_ for category, id_ in made.get((cause.id, cause.attempt), ()) if category == take.category]
        if len(found) != 1:
            return Reason(
                text=f"expected one artifact of category {take.category} made by {cause.id}, got {len(found)}",
                stage="take",
            )
        more[take.into] = found[0]
    if more:
        try:
            bind(request.data, bound | more)
        except TakeInvalid as error:
            return Reason(text=str(error), stage="take")
    bound.update(more)
    return None


def bind(data: Mapping[str, Any], bound: Mapping[str, int]) -> dict[str, Any]:
    """Return a copy of task data with each artifact's id at its JSON Pointer: see `fill`.

    Raises:
        TakeInvalid: what is on the way is no object.
    """
    filled = copy.deepcopy(dict(data))
    fill(filled, bound)
    return filled


def fill(data: dict[str, Any], bound: Mapping[str, int]) -> None:
    """Put each artifact's id at its JSON Pointer (RFC 6901); objects on the way are made where there are none.

    Raises:
        TakeInvalid: what is on the way is no object.
    """
    for pointer, id_ in bound.items():
        *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in pointer.removeprefix("/").split("/"))
        place = data
        for part in parents:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                got = msgspec.json.encode(place).decode()
                raise TakeInvalid(
                    f"expected objects in the task data on the way to {pointer}, got "
                    f"{got[:MOST_SHOWN]}{'...' * (len(got) > MOST_SHOWN)} at {part!r}; name another place"
                )
        place[last] = id_
