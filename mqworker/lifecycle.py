"""The life of a request: states and events as one table, and the rules of retry and lease. Pure; told the time.

Whatever changes a request's state stands in MOVES, and nowhere else.
"""

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal

from mqworker.errors import IllegalMove
from mqworker.messages import OutcomeResult

MAX_BACK_OFF: Final = 600.0  # seconds


class State(StrEnum):
    """Where a request stands; the last five are final."""

    PENDING = "pending"
    OFFERED = "offered"
    RUNNING = "running"
    SUCCESS = "success"
    FAILURE = "failure"
    ERROR = "error"
    ABORTED = "aborted"
    REJECTED = "rejected"


class Event(StrEnum):
    """What happens to a request."""

    ACCEPT = "accept"  # the ledger keeps it
    REJECT = "reject"  # its task says that its data is not valid
    OFFER = "offer"  # a ticket is published
    RETURN = "return"  # the offer was not taken, or was refused
    GRANT = "grant"  # a claim is granted
    SUCCEED = "succeed"  # the worker's outcomes ...
    FAIL = "fail"
    ERR = "err"
    ABORT = "abort"
    RETRY = "retry"  # lost, or "try again", with attempts left
    HAND_BACK = "hand_back"  # an orderly stop of the worker


FINAL: Final = frozenset({State.SUCCESS, State.FAILURE, State.ERROR, State.ABORTED, State.REJECTED})

MOVES: Final = MappingProxyType(
    {
        (None, Event.ACCEPT): State.PENDING,
        (None, Event.REJECT): State.REJECTED,
        (State.PENDING, Event.OFFER): State.OFFERED,
        (State.PENDING, Event.ABORT): State.ABORTED,
        (State.OFFERED, Event.RETURN): State.PENDING,
        (State.OFFERED, Event.GRANT): State.RUNNING,
        (State.OFFERED, Event.ABORT): State.ABORTED,
        (State.RUNNING, Event.SUCCEED): State.SUCCESS,
        (State.RUNNING, Event.FAIL): State.FAILURE,
        (State.RUNNING, Event.ERR): State.ERROR,
        (State.RUNNING, Event.ABORT): State.ABORTED,
        (State.RUNNING, Event.RETRY): State.PENDING,
        (State.RUNNING, Event.HAND_BACK): State.PENDING,
    }
)


def move(state: State | None, event: Event) -> State:
    """Return the state that an event leads to.

    Raises:
        IllegalMove: the table has no such move.
    """
    try:
        return MOVES[state, event]
    except KeyError:
        allowed = ", ".join(e for s, e in MOVES if s == state) or "nothing: it is final"
        raise IllegalMove(f"expected one of [{allowed}] for a request that is {state or 'new'}, got {event}") from None


def meets(need: Literal["success", "end"], state: State) -> bool | None:
    """Return whether a request in this state is what one that comes after it needs; None: it can still become so.

    The need for an end is met by any final state, rejection too, that for a success by success alone.
    """
    if state not in FINAL:
        return None
    return need == "end" or state is State.SUCCESS


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Say what the end of an attempt does to its request."""

    event: Event
    to: State
    counted: bool  # towards max_attempts
    delay: float = 0.0  # seconds before the next attempt
    exhausted: bool = False  # it would have been tried again, had attempts been left


def end_attempt(
    result: OutcomeResult, *, again: bool, tried: int, max_attempts: int, abort_asked: bool, retry_delay: float
) -> Ending:
    """Judge how an attempt's end moves its request.

    `tried` counts the earlier attempts that count. A worker's own outcome stands, even if an abort was asked for;
    a run that was lost or handed back while an abort was asked for is aborted, not tried again.
    """

    def ending(event: Event, *, counted: bool = True, delay: float = 0.0, exhausted: bool = False) -> Ending:
        return Ending(event=event, to=move(State.RUNNING, event), counted=counted, delay=delay, exhausted=exhausted)

    if result == "success":
        return ending(Event.SUCCEED)
    if result == "aborted" or (abort_asked and (result in ("lost", "handed_back") or again)):
        return ending(Event.ABORT)
    if result == "handed_back":
        return ending(Event.HAND_BACK, counted=False)
    if result == "lost" or again:
        if tried + 1 < max_attempts:
            return ending(Event.RETRY, delay=min(retry_delay * 2**tried, MAX_BACK_OFF))
        return ending(Event.ERR if result in {"lost", "error"} else Event.FAIL, exhausted=True)
    return ending(Event.FAIL if result == "failure" else Event.ERR)


def lease_seconds(asked: float | None, task_lease: float) -> float:
    """Return the lease of a run: the request's, else its task's."""
    return task_lease if asked is None else asked


def lease_deadline_ns(sent_ns: int, lease: float) -> int:
    """Return until when a worker may run: counted from when it sent what was answered, on its own clock."""
    return sent_ns + int(lease * 1e9)
