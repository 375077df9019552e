"""Who may do what: submit into a group, command a request or the pool, speak as a worker. The rule, without its world.

Knows no broker and no ledger: a user is a name that the broker has validated, or None, where it was told none. Who is
nobody may do what everybody may, and no more.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

MOST_NAMES: Final = 20_000  # of workers, of one user: more is no farm, but an attack on memory

Rule: TypeAlias = Literal["group", "own", "anyone"]
User: TypeAlias = str | None


@dataclass(frozen=True, kw_only=True)
class Access:
    """Judge who may do what; each answer is None if it is allowed, else the reason why not."""

    rule: Rule = "group"
    operators: Collection[User] = ()
    groups: Mapping[str, Collection[str]] = field(default_factory=dict)  # name to members; open if it is not named

    def operate(self, user: User) -> str | None:
        """Judge a command on the pool: workers, pauses, other people's work."""
        if user in self.operators:
            return None
        return f"expected a command on the pool from an operator, got it from {_name(user)}: see [access] operators"

    def submit(self, user: User, group: str) -> str | None:
        """Judge a submission into a group."""
        members = self.groups.get(group)
        if members is None or user in members or user in self.operators:
            return None
        return (
            f"expected a submission into the group {group} from one of its members, got it from {_name(user)}: "
            "name another group, or see [access.groups]"
        )

    def command(self, user: User, *, submitter: User, group: str) -> str | None:
        """Judge a command on one request.

        By the rule "group", members of a group that settings name may command each other's requests in it. In a group
        that they do not name, which is open to everybody, nobody may command those of another.
        """
        if self.rule == "anyone" or user in self.operators:
            return None
        if user is not None and user == submitter:
            return None
        if self.rule == "group" and user in self.groups.get(group, ()):
            return None
        whose = "its submitter" if self.rule == "own" else "its submitter, a member of its group"
        return (
            f"expected a command on a request of {_name(submitter)} in the group {group} from {whose} or an operator, "
            f"got it from {_name(user)}"
        )

    def commanders(self, submitter: User, group: str) -> frozenset[User] | None:
        """Return who may command a request; None: everybody."""
        if self.rule == "anyone":
            return None
        members = self.groups.get(group, ()) if self.rule == "group" else ()
        return frozenset({*self.operators, *members, *(() if submitter is None else (submitter,))})


def _name(user: User) -> str:
    return "somebody whom the broker did not name (no user_id)" if user is None else f"the broker's user {user}"


class WorkerNames:
    """Know whose each worker's name is: that of the broker's user that used it first."""

    def __init__(self) -> None:
        self._users: dict[str, str] = {}
        self._numbers: Counter[str] = Counter()

    def user(self, name: str) -> User:
        """Return whose a name is; None: nobody's."""
        return self._users.get(name)

    def give(self, name: str, user: User) -> None:
        """Make a name a user's; None: nobody's."""
        before = self._users.pop(name, None)
        if before is not None:
            self._numbers[before] -= 1
        if user is not None:
            self._users[name] = user
            self._numbers[user] += 1

    def speak(self, name: str, user: User) -> str | None:
        """Judge what a user says in a worker's name."""
        owner = self._users.get(name)
        if owner == user:
            return None
        if owner is None:
            if self._numbers[user or ""] < MOST_NAMES:
                return None
            return f"expected at most {MOST_NAMES} names of workers of {_name(user)}, got one more: {name}"
        return (
            f"expected what is said as worker {name} from {_name(owner)}, who was the first to say so, got it from "
            f"{_name(user)}: give that worker another name or user, or release the name: `mqworker forget {name}`"
        )
