"""Who can run what: requirement classes, and capability classes of workers that none of them tells apart.

Pure: it is told of workers and requirements and keeps the partition. It knows no Task, no clock, no queue; a
requirement brings its own way of asking.

Each requirement class keeps a trie of decisions over what its predicate reads of a worker's metadata; a worker's answer
is a walk in it, and only who falls off is asked. Sets of workers, and of requirements, are the bits of an int. For each
read the workers are indexed by what it would tell of them, so that the answer of one is that of all who would be led
down the same way. A worker's changed metadata is looked at only where some trie reads it.

What a capability class can run never shrinks while it lives, except by drop(): workers move between classes, and a
class that a new requirement divides keeps its larger part. So a ticket that is out for a class stays right for it.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final, NamedTuple

from mqworker.tracking import MISSING, WHOLE, Key, Observation, Read, asked_of, token, token_of, value_of

Requirement = Hashable  # the name of a requirement class

MAX_LEAVES: Final = 1024  # of one trie: one that has more is begun anew, for it remembers what is not seen again
MAX_IDLE_KEYS: Final = 256  # indexes kept for reads that no live requirement has just now
MAX_OFFERED: Final = 10  # values that a step of a funnel names
MAX_EXAMPLES: Final = 3  # workers that it names for each

REFUSED: Final = "an earlier refusal by the worker itself"
ESCAPED: Final = "can_run_on(), whose answers do not hang on the metadata alone"
NO_METADATA: Final = "can_run_on(), which looks at no metadata"


@dataclass(frozen=True, kw_only=True)
class WorkerFacts:
    """Hold what a worker says of itself."""

    name: str
    metadata: Mapping[str, Any]
    metadata_version: int
    tasks: Mapping[str, int | None]


@dataclass(frozen=True, kw_only=True)
class Question:
    """Say how to ask whether a worker meets a requirement."""

    task: str  # only workers that list it are asked
    observe: Callable[[Mapping[str, Any]], Observation]  # noting what is read
    plain: Callable[[Mapping[str, Any]], tuple[bool, str | None]]  # the answer, and what was raised
    denied: frozenset[tuple[str, int]] = frozenset()  # worker and version of its metadata that refused


class Gain(NamedTuple):
    """Say that a class can run what it was not known to run."""

    capability_class: str
    requirement: Requirement


@dataclass(kw_only=True)
class Change:
    """Say what one fact changed in the partition."""

    assigned: dict[str, str] = field(default_factory=dict)  # worker to its new class
    made: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    gained: list[Gain] = field(default_factory=list)


class Offered(NamedTuple):
    """Say how many workers have a value."""

    token: str  # JSON text; "" where the value is missing, or where there is no value to tell
    workers: int
    examples: list[str]


@dataclass(frozen=True, kw_only=True)
class FunnelStep:
    """Show what was the last thing looked at for the workers that stopped there."""

    looked_at: Key | str  # words for what is no metadata
    asked: list[str]  # what the value was compared with
    stopped: int
    passed: int
    offered: list[Offered]  # the most frequent first


@dataclass(frozen=True, kw_only=True)
class Funnel:
    """Show where the workers of the pool stop: each stops at one step, or is able."""

    workers: int
    steps: list[FunnelStep]
    able: int


# ---------------------------------------------------------------- parts


@dataclass(slots=True)
class _Leaf:
    answer: bool
    error: str | None
    hits: int = 0


@dataclass(slots=True)
class _Node:
    key: Key
    number: int  # of the key: quicker to look up
    branches: dict[str, "_Node | _Leaf"] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Class:
    name: str
    mask: int  # the requirements that it can run
    members: int = 0


@dataclass(slots=True, eq=False)
class _Worker:
    facts: WorkerFacts
    position: int
    bit: int
    home: _Class | None = None


@dataclass(slots=True, eq=False)
class _Requirement:
    name: Requirement
    question: Question
    position: int
    bit: int
    root: _Node | _Leaf | None = None
    leaves: int = 0
    failing: bool = False  # some leaf has an error
    keys: set[Key] = field(default_factory=set)
    classes: dict[str, None] = field(default_factory=dict)
    escaped: bool = False
    errors: dict[str, str] = field(default_factory=dict)  # of an escaped one, by worker


@dataclass(slots=True, eq=False)
class _Column:
    """Index the workers by one key of their metadata."""

    values: dict[str, int] = field(default_factory=dict)
    present: int = 0
    derived: dict[Key, dict[str, int]] = field(default_factory=dict)  # by what a read would tell


@dataclass(slots=True, eq=False)
class _Moves:
    """Gather what one fact changes; a class that is made and gone at once is none."""

    before: dict[str, str | None] = field(default_factory=dict)
    made: dict[str, _Class] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    gained: list[tuple[_Class, _Requirement]] = field(default_factory=list)


_NOTHING: Final = object()


def _positions(bits: int) -> Iterator[int]:
    text = format(bits, "b")[::-1]
    at = text.find("1")
    while at >= 0:
        yield at
        at = text.find("1", at + 1)


def _put(index: dict[str, int], text: str, bit: int) -> None:
    index[text] = index.get(text, 0) | bit


def _take(index: dict[str, int], text: str, bit: int) -> None:
    left = index[text] & ~bit
    if left:
        index[text] = left
    else:
        del index[text]


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name, value in new.items():
        was = old.get(name, _NOTHING)
        if was is value:
            continue
        kind = type(value)
        if was != value or type(was) is not kind:
            yield name
        elif (kind is list or kind is dict or (kind is float and not value)) and token(was) != token(value):
            yield name  # [1] equals [True], and 0.0 equals -0.0
    for name in old:
        if name not in new:
            yield name


# ---------------------------------------------------------------- the partition


class Matching:
    """Keep workers in capability classes by equal decisions over the live requirement classes.

    Past `max_shared_classes` a worker that needs another class gets one of its own, which nothing divides any more;
    only merge() brings such classes together.
    """

    def __init__(self, *, name_class: Callable[[], str], max_shared_classes: int = 2000) -> None:
        self._name_class = name_class
        self._max_shared_classes = max_shared_classes
        self._workers: dict[str, _Worker] = {}
        self._at: list[_Worker] = []  # by position; at a free one, who left it
        self._free: list[int] = []
        self._everybody = 0
        self._having: dict[str, int] = {}  # task to the workers that list it
        self._classes: dict[str, _Class] = {}
        self._by_mask: dict[int, dict[str, _Class]] = {}
        self._twins: set[int] = set()  # masks of more than one class
        self._requirements: dict[Requirement, _Requirement] = {}
        self._asking: list[_Requirement] = []  # by position; at a free one, what was dropped
        self._free_asking: list[int] = []
        self._of_task: dict[str, int] = {}  # task to its requirements
        self._refused: dict[str, int] = {}  # worker to the requirements that some version of its metadata refused
        self._escaped = 0
        self._contradicted: list[_Requirement] = []  # escaped, and not asked anew yet
        self._key_numbers: dict[Key, int] = {}
        self._next_key = count()
        self._readers: dict[Key, int] = {}  # what is read to the requirements that read it
        self._idle_keys: dict[Key, None] = {}  # read by none just now, the longest so first
        self._columns: dict[str, _Column] = {}
        self._documents: dict[Key, dict[str, int]] = {}  # likewise for reads of no single key

    # ---------------------------------------------------------------- facts

    def join(self, facts: WorkerFacts) -> Change:
        """Place a worker, new or with changed metadata, in the class of its decisions."""
        worker, listed = self._workers.get(facts.name), 0
        for task in facts.tasks:
            listed |= self._of_task.get(task, 0)
        if worker is None:
            worker, mask, affected = self._admit(facts), 0, listed
        else:
            affected = self._update(worker, facts)
            mask = (worker.home.mask if worker.home else 0) & ~affected
            for requirement in self._asked(affected & ~listed & self._escaped):
                requirement.errors.pop(facts.name, None)
        if worker.home is None or affected:
            mask |= self._ask_all(affected & listed, worker)
        moves = _Moves()
        self._settle(worker, mask, moves)
        return self._finish(moves)

    def leave(self, worker: str) -> Change:
        """Forget a worker."""
        moves = _Moves()
        known = self._workers.pop(worker, None)
        if known is not None:
            if known.home is not None:
                self._take_from(known.home, known.bit, moves)
            self._dismiss(known)
        return self._finish(moves)

    def need(self, requirement: Requirement, question: Question) -> Change:
        """Make a requirement class live; one that is live already changes nothing."""
        moves = _Moves()
        if requirement in self._requirements:
            return self._finish(moves)
        made = self._enlist(requirement, question)
        able = 0
        for leaf, _, group in self._groups(made, self._asked_bits(made), verify=True):
            if leaf.answer:
                able |= group
        if not made.escaped:  # else it is asked anew below
            self._apply(made, able, moves)
        return self._finish(moves)

    def _enlist(self, requirement: Requirement, question: Question) -> _Requirement:
        position = self._free_asking.pop() if self._free_asking else len(self._asking)
        made = _Requirement(requirement, question, position, 1 << position)
        if position == len(self._asking):
            self._asking.append(made)
        else:
            self._asking[position] = made
        self._requirements[requirement] = made
        self._of_task[question.task] = self._of_task.get(question.task, 0) | made.bit
        for worker, _ in question.denied:
            self._refused[worker] = self._refused.get(worker, 0) | made.bit
        return made

    def drop(self, requirement: Requirement) -> None:
        """Forget a requirement class that no live request has."""
        known = self._requirements.pop(requirement, None)
        if known is None:
            return
        for name in known.classes:
            one = self._classes[name]
            self._relist(one, one.mask ^ known.bit)
        self._free_asking.append(known.position)
        self._of_task[known.question.task] &= ~known.bit
        if not self._of_task[known.question.task]:
            del self._of_task[known.question.task]
        for worker in {worker for worker, _ in known.question.denied}:
            self._refused[worker] &= ~known.bit
            if not self._refused[worker]:
                del self._refused[worker]
        self._escaped &= ~known.bit
        if known in self._contradicted:
            self._contradicted.remove(known)
        self._forget_trie(known)

    def merge(self) -> Change:
        """Make one class of those that no live requirement tells apart any more; the largest keeps its queue."""
        moves = _Moves()
        for mask in list(self._twins):
            twins = sorted(self._by_mask[mask].values(), key=lambda one: one.members.bit_count(), reverse=True)
            for one in twins[1:]:
                self._shift(one.members, one, twins[0], moves)
        return self._finish(moves)

    def escape(self, requirement: Requirement) -> Change:
        """Ask every worker plainly from now on: the answers do not hang on the metadata alone."""
        known = self._requirements.get(requirement)
        if known is not None and not known.escaped:
            self._escape(known)
        return self._finish(_Moves())

    # ---------------------------------------------------------------- questions

    def escaped(self) -> AbstractSet[Requirement]:
        """Return the live requirements whose answers did not hang on the metadata alone."""
        return {one.name for one in self._asked(self._escaped)}

    def requirements(self) -> Collection[Requirement]:
        """Return the live requirements."""
        return self._requirements.keys()

    def capable_classes(self, requirement: Requirement) -> Collection[str]:
        """Return the classes that can run a requirement."""
        known = self._requirements.get(requirement)
        return known.classes.keys() if known is not None else ()

    def runs(self, capability_class: str) -> Collection[Requirement]:
        """Return the live requirements that a class can run."""
        one = self._classes.get(capability_class)
        return [known.name for known in self._asked(one.mask)] if one is not None else ()

    def can_run(self, worker: str, requirement: Requirement) -> bool:
        """Say whether a worker can run a live requirement, by its newest facts."""
        known, asking = self._workers.get(worker), self._requirements.get(requirement)
        return (
            known is not None and asking is not None and known.home is not None and bool(known.home.mask & asking.bit)
        )

    def facts(self, worker: str) -> WorkerFacts:
        """Return what a worker of the pool says of itself.

        Raises:
            KeyError: it is not in the pool.
        """
        return self._workers[worker].facts

    def class_of(self, worker: str) -> str | None:
        """Return a worker's class; None: it is not in the pool."""
        known = self._workers.get(worker)
        return known.home.name if known is not None and known.home is not None else None

    def classes(self) -> Mapping[str, frozenset[str]]:
        """Return the members of each class."""
        return {name: self.members(name) for name in self._classes}

    def members(self, capability_class: str) -> frozenset[str]:
        """Return the workers of a class."""
        one = self._classes.get(capability_class)
        return frozenset(self._names(one.members)) if one is not None else frozenset()

    def names(self) -> Collection[str]:
        """Return the names of the classes."""
        return self._classes.keys()

    def number_of_classes(self) -> int:
        """Count the classes."""
        return len(self._classes)

    def errors(self, requirement: Requirement) -> str | None:
        """Return what asking raised for some worker that is in the pool now, if it did."""
        known = self._requirements.get(requirement)
        if known is None:
            return None
        if not known.escaped and known.failing:
            for leaf, _, _ in self._groups(known, self._asked_bits(known), verify=False):
                if leaf.error is not None:
                    return leaf.error
        return next(iter(known.errors.values()), None)

    def decide(self, requirement: Requirement, facts: WorkerFacts) -> tuple[bool, Key | str | None]:
        """Say whether a worker that need not be in the pool could run a requirement, and where it stops if not.

        Raises:
            KeyError: the requirement is not live.
        """
        known = self._requirements[requirement]
        question = known.question
        if question.task not in facts.tasks:
            return False, f"task {question.task}"
        if (facts.name, facts.metadata_version) in question.denied:
            return False, REFUSED
        seen = question.observe(facts.metadata)
        if seen.answer:
            return True, None
        if seen.error is not None:
            return False, f"can_run_on() raised {seen.error}"
        return False, asked_of(seen.metadata[-1].key)[0] if seen.metadata else NO_METADATA

    def funnel(self, requirement: Requirement) -> Funnel:
        """Show where the workers of the pool stop on the way to a live requirement.

        Raises:
            KeyError: the requirement is not live.
        """
        known = self._requirements[requirement]
        return self._funnel(known, self._able(known))

    def able(self, requirement: Requirement) -> list[str]:
        """Name the workers that can run a live requirement.

        Raises:
            KeyError: the requirement is not live.
        """
        return list(self._names(self._able(self._requirements[requirement])))

    def survey(self, question: Question) -> tuple[Funnel, list[str]]:
        """Show where workers stop on the way to a requirement that is not live, and who is able; nothing changes."""
        made = self._enlist(object(), question)
        able = 0
        for leaf, _, group in self._groups(made, self._asked_bits(made), verify=True):
            able |= group if leaf.answer else 0
        if made.escaped:
            able = self._ask_everybody(made)
        funnel = self._funnel(made, able)
        self.drop(made.name)
        return funnel, list(self._names(able))

    def _able(self, requirement: _Requirement) -> int:
        able = 0
        for name in requirement.classes:
            able |= self._classes[name].members
        return able

    def _ask_everybody(self, requirement: _Requirement) -> int:
        able = 0
        for worker in self._there(self._asked_bits(requirement)):
            if self._ask_plainly(requirement, worker):
                able |= worker.bit
        return able

    def _funnel(self, known: _Requirement, able: int) -> Funnel:
        task = known.question.task
        having, asked = self._everybody & self._having.get(task, 0), self._asked_bits(known)
        stops: list[tuple[Key | str, int, Collection[str]]] = [(f"task {task}", self._everybody & ~having, ())]
        if having != asked:
            stops.append((REFUSED, having & ~asked, ()))
        places: dict[Key | str, tuple[int, int, dict[str, None]]] = {}  # depth, who stops, what was asked
        failing: dict[str, int] = {}
        if not known.escaped:
            for leaf, path, group in self._groups(known, asked, verify=False):
                if leaf.answer:
                    continue
                if leaf.error is not None:
                    failing[leaf.error] = failing.get(leaf.error, 0) | group
                    continue
                last: Key | str = asked_of(path[-1].key)[0] if path else NO_METADATA
                depth, stopped, wanted = places.get(last, (len(path), 0, {}))
                for read in path:
                    key, compared = asked_of(read.key)
                    if key == last and compared is not None:
                        wanted[compared] = None
                places[last] = min(depth, len(path)), stopped | group, wanted
        if known.escaped:
            failing = {}
            for name, error in known.errors.items():
                failing[error] = failing.get(error, 0) | self._workers[name].bit
            unable = asked & ~able
            for stopped in failing.values():
                unable &= ~stopped
            places = {ESCAPED: (0, unable, {})} if unable else {}
        stops += [
            (last, stopped, wanted)
            for last, (_, stopped, wanted) in sorted(places.items(), key=lambda item: item[1][0])
        ]
        stops += [(f"can_run_on() raised {error}", stopped, ()) for error, stopped in failing.items()]
        steps, left = [], len(self._workers)
        for last, stopped, words in stops:
            number = stopped.bit_count()
            left -= number
            offered = self._offered(last, stopped)
            steps.append(FunnelStep(looked_at=last, asked=list(words), stopped=number, passed=left, offered=offered))
        return Funnel(workers=len(self._workers), steps=steps, able=left)

    def _offered(self, looked_at: Key | str, stopped: int) -> list[Offered]:
        found: dict[str, int] = {}
        if not isinstance(looked_at, str) and looked_at[1]:
            column = self._columns[looked_at[1][0]]
            found = {text: bits & stopped for text, bits in column.values.items() if bits & stopped}
            missing = stopped & ~column.present
        else:
            missing = stopped
        if missing:
            found[MISSING] = missing
        ranked = sorted(found.items(), key=lambda item: item[1].bit_count(), reverse=True)[:MAX_OFFERED]
        return [Offered(text, bits.bit_count(), self._examples(bits)) for text, bits in ranked]

    def _examples(self, bits: int) -> list[str]:
        found: list[str] = []
        while bits and len(found) < MAX_EXAMPLES:
            low = bits & -bits
            found.extend(self._names(low))
            bits ^= low
        return found

    # ---------------------------------------------------------------- asking

    def _asked(self, bits: int) -> Iterator[_Requirement]:
        return (self._asking[position] for position in _positions(bits))

    def _there(self, bits: int) -> Iterator[_Worker]:
        return (self._at[position] for position in _positions(bits))

    def _names(self, bits: int) -> Iterator[str]:
        return (one.facts.name for one in self._there(bits))

    def _asked_bits(self, requirement: _Requirement) -> int:
        bits = self._having.get(requirement.question.task, 0)
        for name, version in requirement.question.denied:
            worker = self._workers.get(name)
            if worker is not None and worker.facts.metadata_version == version:
                bits &= ~worker.bit
        return bits

    def _ask_all(self, asked: int, worker: _Worker) -> int:
        """Return which of some requirements a worker meets; it lists the tasks of all of them."""
        facts, metadata, able = worker.facts, worker.facts.metadata, 0
        for requirement in self._asked(asked & self._refused.get(facts.name, 0)):
            if (facts.name, facts.metadata_version) in requirement.question.denied:
                asked ^= requirement.bit
                requirement.errors.pop(facts.name, None)
        tokens: dict[int, str] = {}
        for requirement in self._asked(asked):
            node = requirement.root
            while type(node) is _Node:  # as _leaf() does, without its calls: this is the way of each join
                text = tokens.get(node.number)
                if text is None:
                    text = tokens[node.number] = token_of(metadata, node.key)
                node = node.branches.get(text)
            if type(node) is _Leaf and node.hits & (node.hits + 1):
                node.hits += 1
                answer = node.answer
            else:
                leaf = None if requirement.escaped else self._leaf(requirement, metadata, tokens, verify=True)
                answer = self._ask_plainly(requirement, worker) if leaf is None else leaf.answer
            if answer:
                able |= requirement.bit
        return able

    def _ask_plainly(self, requirement: _Requirement, worker: _Worker) -> bool:
        answer, error = requirement.question.plain(worker.facts.metadata)
        if error is None:
            requirement.errors.pop(worker.facts.name, None)
        else:
            requirement.errors[worker.facts.name] = error
        return answer

    def _leaf(
        self,
        requirement: _Requirement,
        metadata: Mapping[str, Any],
        tokens: dict[int, str],
        *,
        verify: bool,
        path: list[Read] | None = None,
    ) -> _Leaf | None:
        """Walk to the leaf for some metadata, or make it; `path` gets the reads. None: the requirement just escaped."""
        node = requirement.root
        while isinstance(node, _Node):
            text = tokens.get(node.number)
            if text is None:
                text = tokens[node.number] = token_of(metadata, node.key)
            if path is not None:
                path.append(Read(node.key, text))
            node = node.branches.get(text)
        if node is None:
            seen = requirement.question.observe(metadata)
            if path is not None:
                path[:] = seen.metadata
            node = self._graft(requirement, seen)
        elif verify:  # a leaf's 1st, 2nd, 4th, 8th ... use asks anew
            node.hits += 1
            if not node.hits & (node.hits - 1) and requirement.question.plain(metadata)[0] != node.answer:
                node = None
        if node is None:
            self._escape(requirement)
        return node

    def _graft(self, requirement: _Requirement, seen: Observation) -> _Leaf | None:
        """Put an observation into the trie. None: it contradicts what is there."""
        if requirement.leaves >= MAX_LEAVES:
            requirement.root, requirement.leaves = None, 0
        leaf = _Leaf(seen.answer, seen.error)
        branches, text = {"": requirement.root} if requirement.root is not None else {}, ""
        root = branches
        for read in seen.metadata:
            if read.key not in requirement.keys:
                self._read_by(requirement, read.key)
            node = branches.setdefault(text, _Node(read.key, self._key_numbers[read.key]))
            if not isinstance(node, _Node) or node.key != read.key:
                return None
            branches, text = node.branches, read.token
        found = branches.setdefault(text, leaf)
        if not isinstance(found, _Leaf) or found.answer != leaf.answer:
            return None
        requirement.root = root[""]
        requirement.leaves += found is leaf
        requirement.failing |= leaf.error is not None
        return found

    def _groups(self, requirement: _Requirement, bits: int, *, verify: bool) -> Iterator[tuple[_Leaf, list[Read], int]]:
        """Divide workers by what is read of them: one is asked for all that would be read alike."""
        while bits and not requirement.escaped:
            worker = self._at[(bits & -bits).bit_length() - 1]
            path: list[Read] = []
            leaf = self._leaf(requirement, worker.facts.metadata, {}, verify=verify, path=path)
            if leaf is None:
                return
            group = bits
            for read in path:
                group &= self._reading(read, worker)
            group |= worker.bit  # also if what was read is not what is there
            other = self._at[group.bit_length() - 1]
            if verify and other is not worker and not self._leaf(requirement, other.facts.metadata, {}, verify=True):
                return
            leaf.hits = max(leaf.hits, group.bit_count())
            bits &= ~group
            yield leaf, path, group

    def _escape(self, requirement: _Requirement) -> None:
        self._forget_trie(requirement)
        requirement.escaped = True
        self._escaped |= requirement.bit
        self._contradicted.append(requirement)

    def _forget_trie(self, requirement: _Requirement) -> None:
        requirement.root, requirement.leaves, requirement.failing = None, 0, False
        for key in requirement.keys:
            self._readers[key] &= ~requirement.bit
            if not self._readers[key]:
                self._idle_keys[key] = None
        requirement.keys.clear()
        while len(self._idle_keys) > MAX_IDLE_KEYS:
            key = next(iter(self._idle_keys))
            del self._idle_keys[key], self._readers[key], self._key_numbers[key]
            self._documents.pop(key, None)
            if key[1]:
                column = self._columns[key[1][0]]
                del column.derived[key]
                if not column.derived:
                    del self._columns[key[1][0]]

    # ---------------------------------------------------------------- the index

    def _read_by(self, requirement: _Requirement, key: Key) -> None:
        requirement.keys.add(key)
        if key not in self._readers:
            self._readers[key] = 0
            self._key_numbers[key] = next(self._next_key)
            if key[1]:
                self._derive(key)
            elif key != WHOLE:  # which few workers would share
                index = self._documents[key] = {}
                for worker in self._workers.values():
                    _put(index, token_of(worker.facts.metadata, key), worker.bit)
        self._idle_keys.pop(key, None)
        self._readers[key] |= requirement.bit

    def _derive(self, key: Key) -> None:
        name = key[1][0]
        column = self._columns.get(name)
        if column is None:
            column = self._columns[name] = _Column()
            for worker in self._workers.values():
                if name in worker.facts.metadata:
                    _put(column.values, token(worker.facts.metadata[name]), worker.bit)
                    column.present |= worker.bit
        index = column.derived[key] = {}
        for text, bits in column.values.items():
            _put(index, token_of({name: value_of(text)}, key), bits)

    def _reading(self, read: Read, worker: _Worker) -> int:
        """Return the workers of which a read would tell the same as of this one."""
        key, text = read
        if key == WHOLE:
            return worker.bit
        if not key[1]:
            return self._documents[key].get(text, 0)
        column = self._columns[key[1][0]]
        bits = column.derived[key].get(text, 0)
        return bits | (self._everybody & ~column.present) if text == MISSING else bits

    def _admit(self, facts: WorkerFacts) -> _Worker:
        position = self._free.pop() if self._free else len(self._at)
        worker = _Worker(facts, position, 1 << position)
        if position == len(self._at):
            self._at.append(worker)
        else:
            self._at[position] = worker
        self._workers[facts.name] = worker
        self._everybody |= worker.bit
        for task in facts.tasks:
            _put(self._having, task, worker.bit)
        for name in facts.metadata:
            if name in self._columns:
                self._reindex(name, worker.bit, {}, facts.metadata)
        for key, index in self._documents.items():
            _put(index, token_of(facts.metadata, key), worker.bit)
        return worker

    def _dismiss(self, worker: _Worker) -> None:
        facts = worker.facts
        for task in facts.tasks:
            _take(self._having, task, worker.bit)
        for name in facts.metadata:
            if name in self._columns:
                self._reindex(name, worker.bit, facts.metadata, {})
        for key, index in self._documents.items():
            _take(index, token_of(facts.metadata, key), worker.bit)
        for requirement in self._asked(self._escaped):
            requirement.errors.pop(facts.name, None)
        self._everybody &= ~worker.bit
        self._free.append(worker.position)

    def _update(self, worker: _Worker, facts: WorkerFacts) -> int:
        """Take in what changed about a worker; return the requirements that may decide otherwise now."""
        old, worker.facts = worker.facts, facts
        affected = self._escaped
        if old.tasks != facts.tasks:
            for task in old.tasks.keys() - facts.tasks.keys():
                _take(self._having, task, worker.bit)
                affected |= self._of_task.get(task, 0)
            for task in facts.tasks.keys() - old.tasks.keys():
                _put(self._having, task, worker.bit)
                affected |= self._of_task.get(task, 0)
        if old.metadata_version != facts.metadata_version:
            affected |= self._refused.get(facts.name, 0)
        changed = list(_changed(old.metadata, facts.metadata))
        for name in changed:
            if name in self._columns:
                affected |= self._reindex(name, worker.bit, old.metadata, facts.metadata)
        for key, index in self._documents.items():
            was, now = token_of(old.metadata, key), token_of(facts.metadata, key)
            if was != now:
                _take(index, was, worker.bit)
                _put(index, now, worker.bit)
                affected |= self._readers[key]
        whole = self._readers.get(WHOLE, 0)
        if whole and (changed or list(old.metadata) != list(facts.metadata)):
            affected |= whole
        return affected

    def _reindex(self, name: str, bit: int, old: Mapping[str, Any], new: Mapping[str, Any]) -> int:
        """Move a worker in the index of one metadata key; return the requirements that read something else now."""
        column, affected = self._columns[name], 0
        there, here = name in old, name in new
        if there:
            _take(column.values, token(old[name]), bit)
        if here:
            _put(column.values, token(new[name]), bit)
            column.present |= bit
        else:
            column.present &= ~bit
        for key, index in column.derived.items():
            was, now = token_of(old, key), token_of(new, key)
            if was != now:
                affected |= self._readers[key]
            elif there and here:
                continue
            if there:
                _take(index, was, bit)
            if here:
                _put(index, now, bit)
        return affected

    # ---------------------------------------------------------------- classes

    def _settle(self, worker: _Worker, mask: int, moves: _Moves) -> None:
        home = worker.home
        if home is not None and home.mask == mask:
            return
        target = self._find(mask)
        if target is None and home is not None and home.members == worker.bit and not home.mask & ~mask:
            for requirement in self._asked(mask & ~home.mask):
                self._gain(home, requirement, moves)
            return
        if target is None:
            target = self._make(mask, moves)
        moves.before.setdefault(worker.facts.name, home.name if home is not None else None)
        worker.home = target
        target.members |= worker.bit
        if home is not None:
            self._take_from(home, worker.bit, moves)

    def _apply(self, requirement: _Requirement, able: int, moves: _Moves) -> None:
        """Have the classes decide a requirement: who is able belongs to classes that can run it, and nobody else."""
        for one in self._concerned(requirement, able):
            there = one.members & able
            unable = one.members ^ there
            if one.mask & requirement.bit:  # it may not shrink: who is unable leaves
                if unable:
                    self._shift(unable, one, self._target(one.mask & ~requirement.bit, moves), moves)
            elif not unable:
                self._gain(one, requirement, moves)
            elif there.bit_count() <= unable.bit_count():
                self._shift(there, one, self._target(one.mask | requirement.bit, moves), moves)
            else:
                self._shift(unable, one, self._make(one.mask, moves), moves)
                self._gain(one, requirement, moves)

    def _concerned(self, requirement: _Requirement, able: int) -> list[_Class]:
        if able.bit_count() < len(self._classes):
            found = {name: self._classes[name] for name in requirement.classes}
            found |= {worker.home.name: worker.home for worker in self._there(able) if worker.home is not None}
            return list(found.values())
        return [one for one in self._classes.values() if one.mask & requirement.bit or one.members & able]

    def _find(self, mask: int) -> _Class | None:
        if len(self._classes) >= self._max_shared_classes:
            return None
        twins = self._by_mask.get(mask)
        return next(iter(twins.values())) if twins else None

    def _target(self, mask: int, moves: _Moves) -> _Class:
        return self._find(mask) or self._make(mask, moves)

    def _make(self, mask: int, moves: _Moves) -> _Class:
        made = _Class(self._name_class(), mask)
        self._classes[made.name] = moves.made[made.name] = made
        self._list(made)
        for requirement in self._asked(mask):
            requirement.classes[made.name] = None
        return made

    def _gain(self, one: _Class, requirement: _Requirement, moves: _Moves) -> None:
        self._relist(one, one.mask | requirement.bit)
        requirement.classes[one.name] = None
        moves.gained.append((one, requirement))

    def _relist(self, one: _Class, mask: int) -> None:
        self._unlist(one)
        one.mask = mask
        self._list(one)

    def _list(self, one: _Class) -> None:
        twins = self._by_mask.setdefault(one.mask, {})
        if twins:
            self._twins.add(one.mask)
        twins[one.name] = one

    def _unlist(self, one: _Class) -> None:
        twins = self._by_mask[one.mask]
        del twins[one.name]
        if len(twins) < 2:  # noqa: PLR2004  # one has no twin
            self._twins.discard(one.mask)
        if not twins:
            del self._by_mask[one.mask]

    def _shift(self, bits: int, source: _Class, target: _Class, moves: _Moves) -> None:
        for worker in self._there(bits):
            moves.before.setdefault(worker.facts.name, source.name)
            worker.home = target
        target.members |= bits
        self._take_from(source, bits, moves)

    def _take_from(self, one: _Class, bits: int, moves: _Moves) -> None:
        one.members &= ~bits
        if one.members:
            return
        for requirement in self._asked(one.mask):
            del requirement.classes[one.name]
        self._unlist(one)
        del self._classes[one.name]
        if moves.made.pop(one.name, None) is None:
            moves.gone.append(one.name)

    def _finish(self, moves: _Moves) -> Change:
        while self._contradicted:
            requirement = self._contradicted.pop()
            self._apply(requirement, self._ask_everybody(requirement), moves)
        change = Change(made=list(moves.made), gone=moves.gone)
        for name, before in moves.before.items():
            worker = self._workers[name]
            if worker.home is not None and worker.home.name != before:
                change.assigned[name] = worker.home.name
        for one in moves.made.values():
            change.gained.extend(Gain(one.name, requirement.name) for requirement in self._asked(one.mask))
        change.gained.extend(
            Gain(one.name, requirement.name)
            for one, requirement in moves.gained
            if one.name in self._classes and one.name not in moves.made
        )
        return change
