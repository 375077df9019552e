"""Which requests share a requirement class: for each task, a trie over what `can_run_on()` reads of the task data.

Pure: it is told of task data and of reads, and keeps the trie. It knows no Task, no worker, no ledger.

Requests that agree on all that was read of their data are in one class. A class is born with one request, whose
reads on all workers make its place in the trie. If a worker that comes later has more read than its members are known
to agree on, the class is divided: it takes no new members, and those that it has are to be placed anew, one by one.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import msgspec

from mqworker.tracking import WHOLE, Key, Read, token_of

_encode = msgspec.json.Encoder().encode


class Kind(NamedTuple):
    """Name what a trie is of."""

    task: str
    fingerprint: str  # of the task's code: what was learned of other code says nothing
    requires: str  # the request's own schema as JSON; empty: none
    whole: bool  # all of the data counts as read


@dataclass(eq=False, kw_only=True)
class RequirementClass:
    """Hold what the requests of one class agree on."""

    id: int
    kind: Kind
    data: Mapping[str, Any]  # of one of them, as it was submitted
    reads: tuple[Read, ...] = ()
    open: bool = True  # it has had one member only, so that more may be learned of it
    divided: bool = False  # its members are to be placed anew
    escaped: bool = False  # what its task reads does not say what it answers
    problem: str | None = None  # why its task cannot be asked at all
    known: set[Key] = field(default_factory=set)

    def unknown(self, reads: Iterable[Read]) -> tuple[Read, ...]:
        """Return those of the reads that its members need not agree on."""
        return tuple(read for read in reads if not _implied(read.key, self.known))


@dataclass(eq=False)
class _Node:
    """Either a question, with a child for each answer, or the end of a path, with a class once there is one."""

    key: Key | None = None
    children: dict[str, "_Node"] = field(default_factory=dict)
    found: RequirementClass | None = None
    escaped: bool = False  # and so is whatever is below


WHOLE_DATA: Final = Read(WHOLE, "")


class Requirements:
    """Keep requests in classes that `can_run_on()` cannot tell apart."""

    def __init__(self) -> None:
        self._newest = 0
        self._roots: dict[Kind, _Node] = {}
        self._classes: dict[int, RequirementClass] = {}

    def __len__(self) -> int:
        return len(self._classes)

    def __iter__(self) -> Iterator[RequirementClass]:
        return iter(self._classes.values())

    def count_from(self, newest: int) -> None:
        """Give new classes higher numbers than this."""
        self._newest = newest

    def get(self, number: int | None) -> RequirementClass | None:
        """Return a class by its number."""
        return None if number is None else self._classes.get(number)

    def find(self, kind: Kind, data: Mapping[str, Any]) -> RequirementClass | None:
        """Return the class of configured task data; None: it would be the first of its class."""
        node = self._roots.get(kind)
        while node is not None and node.key is not None:
            node = node.children.get(token_of(data, node.key))
        return None if node is None else node.found

    def make(self, kind: Kind, data: Mapping[str, Any], submitted: Mapping[str, Any]) -> RequirementClass:
        """Begin a class with one request: its data as configured, and as submitted."""
        node = self._root(kind)
        reads = []
        escaped = node.escaped
        while node.key is not None:
            reads.append(Read(node.key, token_of(data, node.key)))
            node = node.children.setdefault(reads[-1].token, _Node())
            escaped = escaped or node.escaped
        self._newest += 1
        made = RequirementClass(id=self._newest, kind=kind, data=submitted, reads=tuple(reads), escaped=escaped)
        made.known = {read.key for read in reads}
        node.found = self._classes[made.id] = made
        return made

    def extend(self, one: RequirementClass, reads: Sequence[Read]) -> None:
        """Learn what else was read of the data of a class that has one member only."""
        path = self._path_to(one)
        if path:
            path[-1].found = None
            self._lead(path[-1], reads).found = one
        one.reads += tuple(reads)
        one.known.update(read.key for read in reads)

    def divide(self, one: RequirementClass, reads: Sequence[Read]) -> None:
        """Learn that a class's members need not agree on all that is read: it takes no new ones from now on."""
        path = self._path_to(one)
        if path:
            path[-1].found = None
            path[-1].key = reads[0].key  # the others are learned by whoever comes there
        one.divided = True

    def escape(self, one: RequirementClass) -> None:
        """Learn that a class's reads do not say what it answers: each of its requests is to be asked for itself."""
        path = self._path_to(one)
        one.escaped = True
        if path:
            path[-1].escaped = True
        if one.unknown([WHOLE_DATA]):
            self.divide(one, [WHOLE_DATA])

    def restore(self, one: RequirementClass) -> None:
        """Take back a class that was made earlier; one that its trie has no place for is divided."""
        self._classes[one.id] = one
        one.known = {read.key for read in one.reads}
        if one.divided:
            return
        node = self._root(one.kind)
        for read in one.reads:
            if node.found is not None or node.key not in (None, read.key):
                one.divided = True  # another learned otherwise
                return
            node.key = read.key
            node = node.children.setdefault(read.token, _Node())
        if node.key is not None or node.found is not None:
            one.divided = True
        else:
            node.found = one

    def forget(self, one: RequirementClass) -> None:
        """End a class that no request is in; what leads to other classes stays learned."""
        self._classes.pop(one.id, None)
        way = self._way_to(one)
        if way and way[-1].found is one:
            way[-1].found = None
        while way and not way[-1].children and way[-1].found is None:
            way.pop()
            if way:
                del way[-1].children[one.reads[len(way) - 1].token]
            else:
                del self._roots[one.kind]

    def _root(self, kind: Kind) -> _Node:
        root = self._roots.get(kind)
        if root is None:
            root = self._roots[kind] = _Node(key=WHOLE if kind.whole else None)
        return root

    @staticmethod
    def _lead(node: _Node, reads: Sequence[Read]) -> _Node:
        for read in reads:
            node.key = read.key
            node = node.children.setdefault(read.token, _Node())
        return node

    def _path_to(self, one: RequirementClass) -> list[_Node]:
        """Return the nodes from the root to a class; none: it has no place in the trie any more."""
        way = self._way_to(one)
        return way if len(way) > len(one.reads) and way[-1].found is one else []

    def _way_to(self, one: RequirementClass) -> list[_Node]:
        """Return the nodes from the root towards the place of a class, as far as there are any."""
        root = self._roots.get(one.kind)
        way = [] if root is None else [root]
        for read in one.reads if way else ():
            child = way[-1].children.get(read.token) if way[-1].key == read.key else None
            if child is None:
                break
            way.append(child)
        return way


def _implied(key: Key, known: Collection[Key]) -> bool:
    """Say whether what is known leaves no doubt what a read of this key is."""
    _, path = key
    return key in known or any(
        (kind, path[:length]) in known for kind in ("whole", "value") for length in range(len(path) + 1)
    )


def schema_text(requires: Mapping[str, Any] | None) -> str:
    """Write a request's own schema as the text that its requirement class goes by."""
    return "" if requires is None else _encode(requires).decode()


def reads_text(reads: Iterable[Read]) -> str:
    """Write reads as JSON, for the ledger."""
    return _encode([(*read.key, read.token) for read in reads]).decode()


def reads_from(text: str) -> tuple[Read, ...]:
    """Read what `reads_text` wrote."""
    return tuple(Read((kind, tuple(path)), token) for kind, path, token in msgspec.json.decode(text))
