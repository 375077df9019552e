"""What a predicate reads of two JSON documents: its answer, and the reads that are enough to know the answer again.

Pure; it knows neither workers nor tasks. `observe()` asks twice: with stand-ins that note what is read of them, and
with plain copies. The answer is always that of the plain call; the noted run only says what the answer hangs on. Two
documents that give the same tokens for all reads of an observation get the same answer.

A stand-in says that its class is dict (int, float, str, list) but is none, so that no C code reads it unseen: what
needs the real thing either asks it for its value, which is a read, or raises. A noted run counts only if it took the
same way as the plain one: same answer, and the same exceptions at the same places, swallowed ones included. Else it is
done again with plain values in a mapping that notes its keys; and if that goes another way too, as json.dumps(metadata)
and dict.get(metadata, key) do, everything counts as read. What stays unseen is a question for the exact type,
`type(metadata) is dict`; isinstance() is answered as for the real thing. Who remembers answers asks anew now and then.
"""

import json
import operator
import re
import sys
from abc import ABCMeta
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from types import CodeType, FrameType, NoneType
from typing import Any, Final, Literal, NamedTuple

type_of = type  # under its own name below, where `type` would hide it

Kind = Literal[
    "value",  # all of the value at a path; "" where there is none
    "object",  # that an object stands there, or all of another value
    "present",  # whether there is a value
    "kind",  # that an int, a float, a str or a list stands there, or all of another value
    "truth",  # whether it counts as true
    "==",  # how it compares with what stands last in the path
    "<",
    "<=",
    ">",
    ">=",
    "has",  # whether it contains what stands last in the path
    "length",  # of the object at a path
    "keys",  # of the object at a path, in order
    "whole",  # all of the object at a path
]
Key = tuple[Kind, tuple[str, ...]]  # what was read; the path () is the document
Ask = Callable[[Mapping[str, Any], Mapping[str, Any]], object]

MISSING: Final = ""  # the token of what is not there
WHOLE: Final[Key] = ("whole", ())
LONGEST_KEPT: Final = 1000  # characters of an operand that is remembered
MAX_CHANGES: Final = 4  # keys that an advice may change
BEAM: Final = 12  # half-way states of metadata that a search for advice follows up
SAMPLES: Final = (["?"], "?", 1, True)  # what a missing value is tried as, to hear what would be asked of it


class Read(NamedTuple):
    """Say what was read, and what it was: JSON text, or a word that is none."""

    key: Key
    token: str


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Hold an answer and what it hangs on, each thing once, in the order in which it was read."""

    answer: bool
    metadata: tuple[Read, ...]
    data: tuple[Read, ...]
    error: str | None = None  # what was raised; the answer is False then
    tracked: bool = True  # False: everything counts as read


class Edit(NamedTuple):
    """Say which value a metadata key should get."""

    key: str
    token: str  # JSON text; "" takes the key away


# ---------------------------------------------------------------- tokens

_NOTHING: Final = object()
_TAGS: Final[dict[type, str]] = {int: "int", float: "float", str: "str", list: "list"}
_COMPARE: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "==": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "has": operator.contains,
}
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=dict).encode  # order is part of a value
_SCALARS: Final[dict[type, Callable[[Any], str]]] = {
    str: json.encoder.encode_basestring,
    int: repr,
    bool: {True: "true", False: "false"}.__getitem__,
    NoneType: lambda _: "null",
}


def token(value: Any) -> str:
    """Return JSON text that only this value has: 1, 1.0, true and "1" are four."""
    write = _SCALARS.get(type_of(value))
    return write(value) if write else _encode(value)


def value_of(text: str) -> Any:
    """Return the value that has this JSON text for its token."""
    return json.loads(text)


_short_operand = lru_cache(maxsize=4096)(value_of)


def _operand(text: str) -> Any:
    """Return the operand of a comparison: never a list or an object, so that it can be shared."""
    return _short_operand(text) if len(text) <= LONGEST_KEPT else value_of(text)


def _found(document: Mapping[str, Any], path: Iterable[str]) -> Any:
    found: Any = document
    for name in path:
        if not isinstance(found, Mapping) or name not in found:
            return _NOTHING
        found = found[name]
    return found


def token_of(document: Mapping[str, Any], key: Key) -> str:
    """Return what a read of this key would be in a document."""
    kind, path = key
    compare = _COMPARE.get(kind)
    if compare is not None:
        found = document.get(path[0], _NOTHING)
        if found is _NOTHING:
            return MISSING
        try:
            return "true" if compare(found, _operand(path[1])) else "false"
        except TypeError:  # no such comparison, which is an answer too
            return MISSING
    found = document.get(path[0], _NOTHING) if len(path) == 1 else _found(document, path)
    if kind == "present":
        return MISSING if found is _NOTHING else "true"
    if found is _NOTHING:
        return MISSING
    if kind == "kind":
        return _TAGS.get(type_of(found)) or token(found)
    if kind == "truth":
        return "true" if found else "false"
    if kind == "object":
        return "object" if isinstance(found, Mapping) else token(found)
    if kind == "length":
        return str(len(found))
    if kind == "keys":
        return _encode(list(found))
    return token(found)


def asked_of(key: Key) -> tuple[Key, str | None]:
    """Return the key for the value that a read was about, and in words what it was compared with."""
    kind, path = key
    if kind in _COMPARE:
        return ("value", path[:1]), path[1] if kind in {"==", "has"} else f"{kind} {path[1]}"
    if kind in {"present", "kind", "truth", "object"}:
        return ("value", path), None
    return key, None


# ---------------------------------------------------------------- notes


class _Notes:
    """Keep what was read of one document, each thing once, and nothing that an earlier read implies."""

    __slots__ = ("_whole", "keys", "open")

    def __init__(self) -> None:
        self.keys: dict[Key, None] = {}
        self.open = True
        self._whole: set[tuple[str, ...]] = set()

    def add(self, kind: Kind, path: tuple[str, ...]) -> None:
        if not self.open or (kind, path) in self.keys or ("value", path[:1]) in self.keys:
            return
        if self._whole and any(path[:length] in self._whole for length in range(len(path) + 1)):
            return
        self.keys[kind, path] = None
        if kind == "whole":
            self._whole.add(path)

    def reads(self, document: Mapping[str, Any]) -> Iterator[Read]:
        return (Read(key, token_of(document, key)) for key in self.keys)


class _Origin:
    """Know where a stand-in's value comes from. `own` is a copy for this one run, which may be changed."""

    __slots__ = ("deep", "fine", "handed", "notes", "own", "path")

    def __init__(
        self, own: Any, notes: _Notes, path: tuple[str, ...], *, deep: bool = False, fine: bool = False
    ) -> None:
        self.own = own
        self.notes = notes
        self.path = path
        self.deep = deep  # objects inside are noted by their own paths
        self.fine = fine  # values are noted by what they are compared with
        self.handed: dict[str, Any] = {}  # so that the same key is the same object

    def settle(self) -> Any:
        """Count everything as read, and return it."""
        self.notes.add("whole" if isinstance(self.own, dict) else "value", self.path)
        return self.own

    def reduce(self, _protocol: int = 0, /) -> tuple[type, tuple[Any]]:
        """Have copy and pickle make the real thing."""
        return type_of(self.own), (self.settle(),)

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.settle(), name)(*args, **kwargs)

    def note_key(self, key: Any, kind: Kind) -> Any:
        """Note that a key is looked for, and return it as the plain thing that it is."""
        key = _plainly(key)
        exact = type_of(key)
        if (
            exact is not str
            and issubclass(exact, str)
            and exact.__hash__ is str.__hash__
            and exact.__eq__ is str.__eq__
        ):
            key, exact = str.__str__(key), str  # an enum's member
        if exact is str:
            self.notes.add(kind, (*self.path, key))
        elif exact not in _NEVER_KEYS:
            self.settle()  # it may equal whatever it likes
        return key

    def look_up(self, key: Any) -> Any:
        """Return what the mapping holds at a key, as a stand-in where that can tell more.

        Raises:
            KeyError: it holds nothing there.
        """
        key = self.note_key(key, "object" if self.deep else "kind" if self.fine else "value")
        found = self.own[key]
        exact = type_of(found)
        if exact is dict and self.deep:
            made: Any = _Object
        elif self.fine and exact in _STAND_INS:
            made = _STAND_INS[exact]
        else:
            return found
        handed = self.handed.get(key)
        if handed is None or _origin(handed).own is not found:
            handed = made(_Origin(found, self.notes, (*self.path, str(key)), deep=self.deep))
            self.handed[key] = handed
        return handed


_NEVER_KEYS: Final = frozenset({int, float, bool, NoneType, bytes, tuple, list, dict, set})  # never equal to a str


def _origin(stand_in: Any) -> _Origin:
    origin: _Origin = object.__getattribute__(stand_in, "_origin")
    return origin


def _plainly(value: Any) -> Any:
    return _origin(value).settle() if type_of(value) in _PROXIES else value


# ---------------------------------------------------------------- stand-ins


def _settling(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _origin(self).call(name, *map(_plainly, args), **kwargs)

    return method


def _forward(act: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        return act(_origin(self).settle(), *map(_plainly, args))

    return method


def _backward(act: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        return act(_plainly(other), _origin(self).settle())

    return method


def _comparing(kind: Kind, *, negate: bool = False) -> Callable[..., Any]:
    compare = _COMPARE[kind]

    def method(self: Any, other: Any) -> Any:
        origin = _origin(self)
        if type_of(other) in _SCALARS or type_of(other) is float:
            origin.notes.add(kind, (*origin.path, token(other)))
            answer = compare(origin.own, other)
        else:
            answer = compare(origin.settle(), _plainly(other))
        return not answer if negate else answer

    return method


def _truth(self: Any) -> bool:
    origin = _origin(self)
    origin.notes.add("truth", origin.path)
    return bool(origin.own)


def _attribute(self: Any, name: str) -> Any:
    origin = _origin(self)
    if name == "__class__":
        return type_of(origin.own)
    if name == "__reduce_ex__":
        return origin.reduce
    found = getattr(origin.own, name)  # an AttributeError is that of the real thing
    return partial(origin.call, name) if callable(found) else getattr(origin.settle(), name)


def _no_attribute(self: Any, name: str, value: Any) -> None:
    setattr(_origin(self).own, name, value)  # raises as the real thing does


def _start(self: Any, origin: _Origin) -> None:
    object.__setattr__(self, "_origin", origin)


_BINARY: Final[dict[str, Callable[..., Any]]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "divmod": divmod,
    "pow": pow,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}
_OURS: Final = frozenset(
    {
        "__class__",
        "__class_getitem__",
        "__delattr__",
        "__dir__",
        "__doc__",
        "__getattribute__",
        "__getstate__",
        "__init__",
        "__init_subclass__",
        "__new__",
        "__setattr__",
        "__subclasshook__",
    }
)


def _stand_in(real: type) -> Any:
    """Make a class that answers as `real` does, and notes what is asked."""
    members: dict[str, Any] = {"__slots__": ("_origin",), "__init__": _start}
    for name in dir(real):
        if name.startswith("__") and name not in _OURS and callable(getattr(real, name)):
            members[name] = _settling(name)
    for name, act in _BINARY.items():
        if f"__{name}__" in members:
            members[f"__{name}__"] = _forward(act)
            members[f"__r{name}__"] = _backward(act)
    members |= {
        "__getattribute__": _attribute,
        "__setattr__": _no_attribute,
        "__eq__": _comparing("=="),
        "__ne__": _comparing("==", negate=True),
        "__lt__": _comparing("<"),
        "__le__": _comparing("<="),
        "__gt__": _comparing(">"),
        "__ge__": _comparing(">="),
        "__bool__": _truth,
    }
    if "__contains__" in members:
        members["__contains__"] = _comparing("has")
    if real.__hash__ is None:
        members["__hash__"] = None
    return ABCMeta(real.__name__, (Sequence,) if real is list else (), members)  # `match` asks for the base's flag


class _Object(Mapping[str, Any]):
    """Stand in for a dict. A lookup is a read of its key; what is no lookup reads everything."""

    __slots__ = ("_origin",)
    _origin: _Origin
    __init__ = _start
    __hash__ = None  # type: ignore[assignment]  # as a dict
    __setattr__ = _no_attribute

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return dict
        if name in _LOOKUPS:
            return object.__getattribute__(self, name)
        return _attribute(self, name)

    def __getitem__(self, key: Any) -> Any:
        return _origin(self).look_up(key)

    def get(self, key: Any, default: Any = None, /) -> Any:
        try:
            return _origin(self).look_up(key)
        except KeyError:
            return default

    def __contains__(self, key: object) -> bool:
        origin = _origin(self)
        return origin.note_key(key, "present") in origin.own

    def __len__(self) -> int:
        origin = _origin(self)
        origin.notes.add("length", origin.path)
        return len(origin.own)

    def __iter__(self) -> Iterator[str]:
        origin = _origin(self)
        origin.notes.add("keys", origin.path)
        return iter(origin.own)

    def __reversed__(self) -> Iterator[str]:
        origin = _origin(self)
        origin.notes.add("keys", origin.path)
        backwards: Iterator[str] = reversed(origin.own)
        return backwards

    __eq__ = _forward(operator.eq)
    __ne__ = _forward(operator.ne)
    __or__ = _forward(operator.or_)
    __ror__ = _backward(operator.or_)
    __ior__ = _forward(operator.ior)
    __repr__ = _settling("__repr__")
    __str__ = _settling("__str__")
    __format__ = _settling("__format__")
    __sizeof__ = _settling("__sizeof__")
    __setitem__ = _settling("__setitem__")
    __delitem__ = _settling("__delitem__")


_Object.__name__ = _Object.__qualname__ = "dict"  # exceptions name it
_LOOKUPS: Final = frozenset({"get", "__getitem__", "__contains__", "__len__", "__iter__", "__reversed__"})
_STAND_INS: Final[dict[type, Any]] = {real: _stand_in(real) for real in _TAGS}
_PROXIES: Final = frozenset({_Object, *_STAND_INS.values()})


# ---------------------------------------------------------------- runs


_ADDRESS: Final = re.compile(r"0x[0-9a-f]+|\d{9,}")  # which differs from run to run


@dataclass(frozen=True)
class _Run:
    answer: bool
    error: str | None
    raised: tuple[tuple[CodeType, int, type, str], ...] | None  # where, and what, also if swallowed; None: not watched

    def is_like(self, plain: "_Run") -> bool:
        return (self.answer, self.error, self.raised) == (plain.answer, plain.error, plain.raised or ())


def _copied(value: Any) -> Any:
    exact = type_of(value)
    if exact in _SCALARS or exact is float:
        return value
    if exact is list:
        return [_copied(one) for one in value]
    return {name: _copied(one) for name, one in value.items()}  # another Mapping becomes a dict


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001  # the text is a stranger's code too, and its type says enough
        return "(its text cannot be made)"


_HERE: Final = _words.__code__.co_filename


def _run(
    ask: Ask, metadata: Mapping[str, Any], data: Mapping[str, Any], notes: Collection[_Notes] = (), *, watch: bool
) -> _Run:
    raised: list[tuple[CodeType, int, type, str]] = []

    def text(error: BaseException) -> str:
        for one in notes:
            one.open = False  # what an error's text reads decides nothing
        try:
            return _words(error)
        finally:
            for one in notes:
                one.open = True

    def inside(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "exception" and not issubclass(arg[0], StopIteration | GeneratorExit):  # these only end a loop
            raised.append((frame.f_code, frame.f_lasti, arg[0], _ADDRESS.sub("", text(arg[1]))))
        return inside

    def entered(frame: FrameType, _event: str, _arg: Any) -> Any:
        if frame.f_code.co_filename == _HERE:
            return None
        frame.f_trace_lines = False
        return inside

    answer, problem = False, None
    before = sys.gettrace()
    if watch:
        sys.settrace(entered)  # nothing else sees an exception that a program swallows
    try:
        answer = bool(ask(metadata, data))
    except Exception as error:  # noqa: BLE001  # a stranger's code: what raises counts as "no", and is told
        problem = f"{type_of(error).__name__}: {text(error)}"
    finally:
        if watch:
            sys.settrace(before)
    return _Run(answer, problem, tuple(raised) if watch else None)


def ask_plainly(ask: Ask, metadata: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[bool, str | None]:
    """Ask without tracking: the answer, and what was raised if it is no for that."""
    run = _run(ask, _copied(metadata), _copied(data), watch=False)
    return run.answer, run.error


def observe(ask: Ask, metadata: Mapping[str, Any], data: Mapping[str, Any]) -> Observation:
    """Ask, and note what the answer hangs on. What is no bool counts as one; an exception counts as no."""
    documents = (metadata, data)
    reads: tuple[dict[Read, None], dict[Read, None]] = ({}, {})

    def ask_noting(*, fine: bool) -> _Run:
        notes = _Notes(), _Notes()
        run = _run(
            ask,
            _Object(_Origin(_copied(metadata), notes[0], (), fine=fine)),
            _Object(_Origin(_copied(data), notes[1], (), deep=True)),
            notes,
            watch=True,
        )
        for found, noted, document in zip(reads, notes, documents, strict=True):
            found.update(dict.fromkeys(noted.reads(document)))
        return run

    def ask_again(*, watch: bool) -> _Run:
        return _run(ask, _copied(metadata), _copied(data), watch=watch)

    run = ask_noting(fine=True)
    plain = ask_again(watch=bool(run.raised))
    tracked = run.is_like(plain)
    if not tracked:
        run = ask_noting(fine=False)
        if run.raised and plain.raised is None:
            plain = ask_again(watch=True)
        tracked = run.is_like(plain)
    if not tracked:
        for found, document in zip(reads, documents, strict=True):
            found[Read(WHOLE, token_of(document, WHOLE))] = (
                None  # behind the others, as every such run reads those first
            )
    return Observation(
        answer=plain.answer, metadata=tuple(reads[0]), data=tuple(reads[1]), error=plain.error, tracked=tracked
    )


# ---------------------------------------------------------------- for people


def _glance(ask: Ask, metadata: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[bool, list[Key]]:
    """Ask once, unchecked: the answer, and what was read of the metadata."""
    notes = _Notes()
    noted = _Object(_Origin(_copied(metadata), notes, (), fine=True))
    run = _run(ask, noted, _copied(data), (notes,), watch=False)
    return run.answer, list(notes.keys)


def _asked(
    ask: Ask, metadata: Mapping[str, Any], data: Mapping[str, Any], reads: Iterable[Key]
) -> dict[str, list[Key]]:
    """List by metadata key what its value was compared with; of one that tells nothing, what a sample would be."""
    asked: dict[str, dict[Key, None]] = {}
    for key in reads:
        if key[1]:
            asked.setdefault(key[1][0], {})[key] = None
    for name, keys in asked.items():
        if metadata.get(name) is None or isinstance(metadata[name], bool):
            for sample in SAMPLES:
                _, others = _glance(ask, {**metadata, name: sample}, data)
                keys.update(dict.fromkeys(key for key in others if key[1] and key[1][0] == name))
    return {name: list(keys) for name, keys in asked.items()}


def probe(ask: Ask, metadata: Mapping[str, Any], data: Mapping[str, Any]) -> dict[Key, list[str]]:
    """List the metadata that is looked at and what each value is compared with, in words for people: `"x"`, `>= 8`."""
    asked: dict[Key, list[str]] = {}
    for name, keys in _asked(ask, metadata, data, _glance(ask, metadata, data)[1]).items():
        wanted = dict.fromkeys(words for key in keys if (words := asked_of(key)[1]) is not None)
        asked["value", (name,)] = list(wanted)
    return asked


def _candidates(current: Any, asked: Iterable[Key]) -> Iterator[Any]:
    for kind, path in asked:
        if kind not in _COMPARE:
            continue
        wanted = _operand(path[1])
        if kind == "has":
            yield [*current, wanted] if isinstance(current, list) else [wanted]
        else:
            yield wanted
            if kind != "==" and isinstance(wanted, int | float):
                yield wanted + 1
                yield wanted - 1
    yield from (False,) if current is True else (True,)


def advise(
    ask: Ask,
    metadata: Mapping[str, Any],
    data: Mapping[str, Any],
    offered: Mapping[str, Sequence[str]] | None = None,
    *,
    runs: int = 1000,
) -> list[Edit] | None:
    """Search the fewest changes of metadata that turn a no into a yes; each answer is tried out on plain documents.

    `offered` has tokens by metadata key: what other workers have there. None: not found within so many runs.
    """
    if ask_plainly(ask, metadata, data)[0]:
        return []
    beam: list[dict[str, str]] = [{}]
    known: set[frozenset[tuple[str, str]]] = set()
    for _ in range(MAX_CHANGES):
        ahead: list[tuple[int, dict[str, str]]] = []
        for edits in beam:
            now = _edited(metadata, edits)
            asked = _asked(ask, now, data, _glance(ask, now, data)[1])
            for name in reversed(asked):  # what was looked at last, decided
                if name in edits:
                    continue
                tokens = [token(value) for value in _candidates(now.get(name), asked[name])]
                for text in dict.fromkeys((*tokens, *(offered or {}).get(name, ()), MISSING)):
                    tried = {**edits, name: text}
                    if text == token_of(now, ("value", (name,))) or frozenset(tried.items()) in known:
                        continue
                    known.add(frozenset(tried.items()))
                    changed = _edited(metadata, tried)
                    answer, reads = _glance(ask, changed, data)
                    if answer and ask_plainly(ask, changed, data)[0]:
                        return [Edit(key, value) for key, value in tried.items()]
                    ahead.append((len(reads), tried))
                    if len(known) >= runs:
                        return None
        ahead.sort(key=operator.itemgetter(0), reverse=True)  # who is asked more got further
        beam = [edits for _, edits in ahead[:BEAM]]
    return None


def _edited(metadata: Mapping[str, Any], edits: Mapping[str, str]) -> dict[str, Any]:
    changed = {name: value for name, value in metadata.items() if edits.get(name) != MISSING}
    return changed | {name: value_of(text) for name, text in edits.items() if text != MISSING}
