"""What a request's own `requires` means: a JSON Schema (draft 2020-12) that the metadata of a worker must satisfy.

Pure: it opens nothing and fetches nothing; a reference stays within its schema. Schemas come from strangers, so one is
used only if `problem()` finds nothing: it must end soon on any worker's metadata, and a slip must not make it mean
"any worker". Metadata may be any mapping that says it is a dict; of it, only what a schema asks for is read, since who
hands it in may count the reads: `anyOf`, `minimum`, `contains` and the like are ours here, because jsonschema's print
the whole, or look at each item.

JSON Schema says nothing of what is not there: `{"properties": {"system:cpu_count": {"minimum": 8}}}` lets a worker
pass that has no such key. Who needs it there says so: `"required": ["system:cpu_count"]`.
"""

import difflib
import json
import math
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final
from urllib.parse import unquote

import msgspec
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import best_match
from jsonschema.validators import extend
from referencing import Registry

from mqworker.errors import SubmitterError

MAX_BYTES: Final = 16 * 1024  # as JSON
MAX_DEPTH: Final = 20  # of what is written, and of its parts with references written out
MAX_PARTS: Final = 2000  # with references written out; a part is some 10 us of work on one worker
MAX_PATTERN: Final = 200  # characters
MAX_OPEN_REPEATS: Final = 4  # in one pattern
MAX_STEPS: Final = 10_000_000  # of one pattern on one text: about a tenth of a second
TEXT_LENGTH: Final = 200  # characters of the text that the steps are reckoned for
OPEN: Final = 16  # a repeat that goes beyond is as good as unbounded
MAX_WORK: Final = 100_000  # looks of one schema at one worker's metadata, of some 10 us each: about a second
STEPS_IN_A_LOOK: Final = 1000  # of a pattern
KEPT: Final = 1024  # compiled schemas; more requirement classes than that share the work less
SHOWN: Final = 200  # characters of what is wrong

DIALECT: Final[str] = Draft202012Validator.META_SCHEMA["$id"]

# Where the keywords of the draft have schemas: in a value, in a list, by name, or not at all.
_ONE: Final = frozenset(
    {"additionalProperties", "contains", "contentSchema", "else", "if", "items", "not", "propertyNames", "then"}
    | {"unevaluatedItems", "unevaluatedProperties"}
)
_MANY: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_NAMED: Final = frozenset({"$defs", "dependentSchemas", "patternProperties", "properties"})
_NONE: Final = frozenset(
    {"$anchor", "$comment", "$dynamicAnchor", "$dynamicRef", "$id", "$ref", "$schema", "$vocabulary", "const"}
    | {"contentEncoding", "contentMediaType", "default", "dependentRequired", "deprecated", "description", "enum"}
    | {"examples", "exclusiveMaximum", "exclusiveMinimum", "format", "maxContains", "maxItems", "maxLength"}
    | {"maxProperties", "maximum", "minContains", "minItems", "minLength", "minProperties", "minimum", "multipleOf"}
    | {"pattern", "readOnly", "required", "title", "type", "uniqueItems", "writeOnly"}
)
_KEYWORDS: Final = _ONE | _MANY | _NAMED | _NONE
_ROOT_ONLY: Final = ("$id", "$schema", "$vocabulary")  # elsewhere they would change what a reference or keyword means
_ADVICE: Final = 'a metadata key goes into "properties", and into "required", or workers without it pass'

_Path = tuple[str, ...]


def problem(schema: object) -> str | None:
    """Return why a schema cannot be used, with the place in it; None: it can."""
    try:
        canonical = _canonical(schema)
        if len(canonical) > MAX_BYTES:  # not remembered: a thousand of the largest would be a gigabyte
            return f"expected a JSON Schema of at most {MAX_BYTES} bytes, got {len(canonical)}"
        return _problem(canonical)
    except SubmitterError as error:
        return str(error)


def satisfied(schema: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    """Say whether metadata satisfy a schema in which `problem()` finds nothing; of another one it may raise anything.

    `format` is a remark, as the draft has it, and checks nothing.

    Raises:
        SubmitterError: the metadata are so large that it would take too long to tell.
    """
    _left.set([MAX_WORK])
    return bool(_validator(_canonical(schema)).is_valid(metadata))


def _canonical(schema: object) -> bytes:
    """Write a schema so that equal ones are equal.

    Raises:
        SubmitterError: it is no JSON object, or too deep.
    """
    if not isinstance(schema, Mapping):
        raise SubmitterError(f"expected a JSON Schema as an object, got {type(schema).__name__}")
    layer: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        layer = [inner for outer in layer for inner in _within(outer)]
        if not layer:
            break
    else:
        raise SubmitterError(f"expected a JSON Schema at most {MAX_DEPTH} levels deep, got a deeper one")
    try:
        return msgspec.json.encode(schema, order="sorted")
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise SubmitterError(f"expected a JSON Schema, got what is not JSON: {error}") from error


def _within(value: Any) -> list[Any]:
    """List the objects and arrays that are directly in one."""
    items: Iterable[Any] = value.values() if isinstance(value, Mapping) else value
    return [item for item in items if isinstance(item, Mapping | list | tuple)]


# ---------------------------------------------------------------- evaluating

_left: ContextVar[list[int]] = ContextVar("looks that are left")


def _spend(looks: int) -> None:
    """Count work: what a schema costs hangs on the metadata, too, and both may be strangers'.

    Raises:
        SubmitterError: it is more than one schema on one worker may cost.
    """
    left = _left.get()
    left[0] -= looks
    if left[0] < 0:
        raise SubmitterError(
            f"expected `requires` that takes at most {MAX_WORK} looks at a worker, got more: ask less of what is long"
        )


def _counted(keyword: Callable[..., Any]) -> Callable[..., Any]:
    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        _spend(1)
        return keyword(validator, value, instance, schema)

    return counted


def _counting_keys(keyword: Callable[..., Any]) -> Callable[..., Any]:
    """Count what a keyword costs that matches the schema's patterns with each key of an object."""

    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        _spend(1)
        if validator.is_type(instance, "object"):
            for key in instance:
                _spend(1)
                for pattern in schema.get("patternProperties", ()):
                    _spend_match(pattern, key)
                if len(key) > TEXT_LENGTH and "unevaluatedProperties" in schema:
                    _spend(MAX_WORK)  # patterns further down meet this key as well
        return keyword(validator, value, instance, schema)

    return counted


def _spend_match(pattern: str, text: str) -> None:
    ways, places = _cost(pattern)
    _spend(1 + len(text) // STEPS_IN_A_LOOK + ways * math.comb(len(text), places) // STEPS_IN_A_LOOK)


def _pattern(validator: Any, pattern: str, instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(instance, "string"):
        text = str(instance)
        _spend_match(pattern, text)
        if not re.search(pattern, text):
            yield ValidationError(f"does not match {pattern!r}")


def _unique(validator: Any, wanted: Any, instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if wanted and validator.is_type(instance, "array"):
        seen: set[Any] = set()
        for item in instance:
            known = len(seen)
            seen.add(_sameness(item))
            if len(seen) == known:
                yield ValidationError("has an item twice")
                return


def _sameness(value: Any) -> Any:
    """Return what is equal for values that JSON Schema calls equal: 1 and 1.0 are, 1 and true are not."""
    _spend(1)
    if isinstance(value, Mapping):
        return "object", frozenset((key, _sameness(one)) for key, one in value.items())
    if isinstance(value, list):
        return "array", tuple(_sameness(one) for one in value)
    return isinstance(value, bool), value


def _holds(validator: Any, schema: Any, instance: Any) -> bool:
    # A `false` is no reason to print the instance either.
    return schema if isinstance(schema, bool) else bool(validator.evolve(schema=schema).is_valid(instance))


def _all_of(validator: Any, schemas: list[Any], instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if not all(_holds(validator, one, instance) for one in schemas):
        yield ValidationError("not valid under all of the schemas")


def _any_of(validator: Any, schemas: list[Any], instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if not any(_holds(validator, one, instance) for one in schemas):
        yield ValidationError("not valid under any of the schemas")


def _one_of(validator: Any, schemas: list[Any], instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if sum(_holds(validator, one, instance) for one in schemas) != 1:
        yield ValidationError("not valid under exactly one of the schemas")


def _not(validator: Any, schema: Any, instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if _holds(validator, schema, instance):
        yield ValidationError("valid under the schema of `not`")


def _if(validator: Any, schema: Any, instance: Any, whole: Any) -> Iterator[ValidationError]:
    then = whole.get("then" if _holds(validator, schema, instance) else "else", True)
    if not _holds(validator, then, instance):
        yield ValidationError("not valid under `then` or `else`")


def _dependent(validator: Any, schemas: dict[str, Any], instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(instance, "object") and not all(
        _holds(validator, one, instance) for key, one in schemas.items() if key in instance
    ):
        yield ValidationError("not valid under all of the dependent schemas")


def _bound(fails: Callable[[Any, Any], bool]) -> Callable[..., Iterator[ValidationError]]:
    def keyword(validator: Any, bound: Any, instance: Any, _schema: Any) -> Iterator[ValidationError]:
        if validator.is_type(instance, "number") and fails(instance, bound):
            yield ValidationError(f"beyond {bound!r}")

    return keyword


def _enum(validator: Any, values: list[Any], instance: Any, _schema: Any) -> Iterator[ValidationError]:
    if not any(_holds(validator, {"const": one}, instance) for one in values):
        yield ValidationError(f"not one of {values!r}")


def _contains(validator: Any, schema: Any, instance: Any, whole: Any) -> Iterator[ValidationError]:
    words = _words_of(schema)
    if words is None or "minContains" in whole or "maxContains" in whole:
        yield from Draft202012Validator.VALIDATORS["contains"](validator, schema, instance, whole)
    elif validator.is_type(instance, "array") and not any(word in instance for word in words):
        yield ValidationError(f"contains none of {words!r}")


def _words_of(schema: Any) -> list[str] | None:
    """Return the strings that a schema lets pass, if it does nothing else: to look for these is no look at the rest."""
    match schema:
        case {"const": word, **more} if not more:
            words = [word]
        case {"enum": list(words), **more} if not more:
            pass
        case _:
            return None
    return words if all(isinstance(word, str) for word in words) else None


def _counting_items(keyword: Callable[..., Any]) -> Callable[..., Any]:
    """Count what a keyword costs that looks for each item of an array among those that others have looked at."""

    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        _spend(1 + (len(instance) ** 2 // STEPS_IN_A_LOOK if validator.is_type(instance, "array") else 0))
        return keyword(validator, value, instance, schema)

    return counted


def _counting(name: str, keyword: Callable[..., Any]) -> Callable[..., Any]:
    if name in {"additionalProperties", "patternProperties", "unevaluatedProperties"}:
        return _counting_keys(keyword)
    return _counting_items(keyword) if name == "unevaluatedItems" else _counted(keyword)


_OURS: Final[dict[str, Callable[..., Any]]] = {
    **Draft202012Validator.VALIDATORS,
    "allOf": _all_of,
    "anyOf": _any_of,
    "oneOf": _one_of,
    "not": _not,
    "if": _if,
    "dependentSchemas": _dependent,
    "minimum": _bound(operator.lt),
    "maximum": _bound(operator.gt),
    "exclusiveMinimum": _bound(operator.le),
    "exclusiveMaximum": _bound(operator.ge),
    "enum": _enum,
    "contains": _contains,
    "pattern": _pattern,
    "uniqueItems": _unique,
}
_Validator: Final[Any] = extend(
    Draft202012Validator,
    {name: _counting(name, keyword) for name, keyword in _OURS.items()},
)
_nothing: Final[Registry[Any]] = Registry()  # beside the draft itself; without it jsonschema would fetch from the web
_meta: Final[Any] = Draft202012Validator(Draft202012Validator.META_SCHEMA, registry=_nothing)


@lru_cache(maxsize=KEPT)
def _validator(canonical: bytes) -> Any:
    schema = msgspec.json.decode(canonical)
    schema.pop("$id", None)  # references begin with #, and an id that is no URL would break even these
    return _Validator(schema, registry=_nothing)


# ---------------------------------------------------------------- what is wrong with a schema


@lru_cache(maxsize=KEPT)
def _problem(canonical: bytes) -> str | None:
    schema = msgspec.json.decode(canonical)
    error = best_match(_meta.iter_errors(schema))
    if error is not None:
        return f"expected a JSON Schema (draft 2020-12), got at {_place(map(str, error.path))}: {_cut(error.message)}"
    parts = _parts(schema)
    try:
        anchors = _anchors(parts)
        for path, part in parts.items():
            if isinstance(part, dict):
                _check_keywords(path, part)
                _check_patterns(path, part)
        _Expansion(parts, anchors).check()
    except SubmitterError as found:
        return str(found)
    return None


def _parts(schema: Any) -> dict[_Path, Any]:
    """Map places to the schemas that a schema is made of; itself is at ()."""
    parts: dict[_Path, Any] = {}
    todo: list[tuple[_Path, Any]] = [((), schema)]
    while todo:
        path, part = todo.pop()
        parts[path] = part
        todo += [((*path, *more), inner) for more, inner in _inner(part)]
    return parts


def _inner(part: Any) -> Iterator[tuple[_Path, Any]]:
    """List the schemas that are directly in one, with their places."""
    if not isinstance(part, dict):
        return
    for keyword, value in part.items():
        if keyword in _ONE:
            yield (keyword,), value
        elif keyword in _MANY:
            yield from (((keyword, str(index)), one) for index, one in enumerate(value))
        elif keyword in _NAMED:
            yield from (((keyword, name), one) for name, one in value.items())


def _anchors(parts: Mapping[_Path, Any]) -> dict[str, _Path]:
    anchors: dict[str, _Path] = {}
    for path, part in parts.items():
        for keyword in ("$anchor", "$dynamicAnchor"):
            if isinstance(part, dict) and keyword in part and anchors.setdefault(part[keyword], path) != path:
                raise SubmitterError(
                    f"{_place((*path, keyword))}: expected a name of its own, got {part[keyword]!r} again"
                )
    return anchors


def _check_keywords(path: _Path, part: Mapping[str, Any]) -> None:
    for keyword in part:
        if keyword not in _KEYWORDS:
            near = difflib.get_close_matches(keyword, sorted(_KEYWORDS), n=1, cutoff=0.6)
            guess = f"did you mean {near[0]!r}?" if near else _ADVICE
            raise SubmitterError(f"{_place(path)}: unknown keyword {_shown(keyword)}; {guess}")
        if path and keyword in _ROOT_ONLY:
            raise SubmitterError(f"{_place(path)}: expected {keyword} at the top only")
    if part.get("$schema", DIALECT).rstrip("#") != DIALECT:
        raise SubmitterError(f"{_place((*path, '$schema'))}: expected {DIALECT}, got {_shown(part['$schema'])}")


def _check_patterns(path: _Path, part: Mapping[str, Any]) -> None:
    patterns = [((*path, "patternProperties"), pattern) for pattern in part.get("patternProperties", {})]
    if "pattern" in part:
        patterns.append(((*path, "pattern"), part["pattern"]))
    for place, pattern in patterns:
        try:
            _check_pattern(pattern)
        except SubmitterError as error:
            raise SubmitterError(f"{_place(place)}: {error}, got {_shown(pattern)}") from error


class _Expansion:
    """Reckon a schema with its references written out, which may be far larger than what was written."""

    def __init__(self, parts: Mapping[_Path, Any], anchors: Mapping[str, _Path]) -> None:
        self._parts = parts
        self._anchors = anchors
        self._known: dict[tuple[_Path, bool], tuple[int, int]] = {}

    def check(self) -> None:
        for path, part in self._parts.items():  # also those that nobody refers to
            self._targets(path, part)
        _, size = self._reckon((), 1, watched=False)
        if size > MAX_PARTS:
            raise SubmitterError(
                f"expected a JSON Schema of at most {MAX_PARTS} parts with its references written out, got a larger one"
            )

    def _reckon(self, path: _Path, depth: int, *, watched: bool) -> tuple[int, int]:
        """Return height and size of a part; `watched`: `unevaluated...` above it has it looked at again."""
        part = self._parts[path]
        known = self._known.get((path, watched))
        if known is None and depth <= MAX_DEPTH:
            watches = isinstance(part, dict) and not part.keys().isdisjoint(
                {"unevaluatedItems", "unevaluatedProperties"}
            )
            inner = [(*path, *more) for more, _ in _inner(part) if more[0] != "$defs"] + self._targets(path, part)
            below = [self._reckon(one, depth + 1, watched=watched or watches) for one in inner]
            again = 3 if watches else 2 if watched else 1
            height = 1 + max((one for one, _ in below), default=0)
            known = self._known[path, watched] = height, 1 + again * sum(one for _, one in below)
        if known is None or depth + known[0] - 1 > MAX_DEPTH:
            raise SubmitterError(
                f"expected references that end within {MAX_DEPTH} levels, got deeper or endless ones at {_place(path)}"
            )
        return known

    def _targets(self, path: _Path, part: Any) -> list[_Path]:
        if not isinstance(part, dict):
            return []
        return [self._target((*path, word), part[word]) for word in ("$ref", "$dynamicRef") if word in part]

    def _target(self, place: _Path, reference: str) -> _Path:
        if not reference.startswith("#"):
            raise SubmitterError(
                f"{_place(place)}: expected a reference within this schema, like '#/$defs/name', got"
                f" {_shown(reference)}: nothing is fetched"
            )
        target = self._anchors.get(reference[1:]) if reference != "#" else ()
        if reference.startswith("#/"):
            words = unquote(reference[2:]).split("/")
            target = tuple(word.replace("~1", "/").replace("~0", "~") for word in words)
        if target is None or target not in self._parts:
            raise SubmitterError(
                f"{_place(place)}: expected a reference to a schema that is in this one, got {_shown(reference)}"
            )
        return target


# ---------------------------------------------------------------- patterns


@dataclass
class _Repeats:
    total: int = 0  # that are open
    loose: int = 0  # of these, where the end is not told by what comes next: each multiplies the steps


@lru_cache(maxsize=KEPT)
def _cost(pattern: str) -> tuple[int, int]:
    return _check_pattern(pattern)


def _check_pattern(pattern: str) -> tuple[int, int]:
    """Refuse a regular expression that is none, or that could go on for ever; else return what its steps hang on.

    These are the ways through what is bounded, and the number of places in the text that it may choose.

    The steps of a backtracking matcher are reckoned from above: ways through what is bounded, times the places where
    loose repeats can end, and where a match can begin.

    Raises:
        SubmitterError: the text says what was expected.
    """
    if len(pattern) > MAX_PATTERN:
        raise SubmitterError(f"expected a pattern of at most {MAX_PATTERN} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of what may mean something else in a later Python
            # The only public way to a pattern's tree is a debug print.
            tree = re._parser.parse(pattern)  # type: ignore[attr-defined]  # noqa: SLF001  # for that reason
            if tree.state.flags & ~re.UNICODE.value:
                raise SubmitterError("expected a pattern without flags")
            if tree.state.groupdict:  # jsonschema joins patterns, where a name may come twice
                raise SubmitterError("expected a pattern without names of groups")
            nodes = list(_flat(tree))
            found = _Repeats()
            ways = _ways(nodes, 1, found, ends=True)
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise SubmitterError(f"expected a regular expression ({error})") from error
    if found.total > MAX_OPEN_REPEATS:
        raise SubmitterError(f"expected a pattern with at most {MAX_OPEN_REPEATS} unbounded repeats")
    anchored = bool(nodes) and _name(nodes[0]) == "AT" and str(nodes[0][1]) in {"AT_BEGINNING", "AT_BEGINNING_STRING"}
    if ways * math.comb(TEXT_LENGTH, found.loose + (not anchored)) > MAX_STEPS:
        raise SubmitterError("expected a pattern with fewer ways to match: begin it with ^, and bound its repeats")
    return ways, found.loose + (not anchored) + bool(found.total)  # each repeat walks, too, where texts are long


_Node = tuple[Any, Any]


def _name(node: _Node | None) -> str:
    return "" if node is None else str(node[0])


def _flat(tree: Iterable[_Node]) -> Iterator[_Node]:
    """List the nodes of a sequence, without the groups that only hold a part of it together."""
    for node in tree:
        if _name(node) == "SUBPATTERN":
            _, added, removed, inner = node[1]
            if added or removed:
                raise SubmitterError("expected a pattern without flags")
            yield from _flat(inner)
        elif _name(node) == "ATOMIC_GROUP":
            yield from _flat(node[1])
        else:
            yield node


def _ways(nodes: list[_Node], weight: int, found: _Repeats, *, ends: bool = False) -> int:
    """Reckon the ways through a sequence, open repeats left out; these are counted, `weight` times."""
    ways = 1
    for index, node in enumerate(nodes):
        after = nodes[index + 1] if index + 1 < len(nodes) else None
        match _name(node):
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                low, high, body = node[1]
                inner = list(_flat(body))
                before = found.total
                each = _ways(inner, weight * min(max(1, high), OPEN), found)
                if high <= OPEN:
                    ways *= sum(each**number for number in range(low, high + 1))
                    continue
                if each > 1 or found.total > before:
                    raise SubmitterError("expected a pattern without a repeat or a choice inside an unbounded repeat")
                if low < high:
                    found.total += weight
                    found.loose += 0 if (ends and after is None) or _ends_before(inner, after) else weight
            case "BRANCH":
                ways *= sum(_ways(list(_flat(branch)), weight, found) for branch in node[1][1])
            case "ASSERT" | "ASSERT_NOT":
                ways *= _ways(list(_flat(node[1][1])), weight, found)
            case "GROUPREF" | "GROUPREF_EXISTS":
                raise SubmitterError("expected a pattern without back-references")
            case _:
                pass  # one character, or a place between two
        ways = min(ways, MAX_STEPS + 1)
    return ways


def _ends_before(body: list[_Node], after: _Node | None) -> bool:
    """Say whether a repeat can end at one place only: what comes next is a character that it cannot repeat."""
    if len(body) != 1 or _name(after) != "LITERAL" or after is None:
        return False
    character = chr(after[1])
    kind, value = _name(body[0]), body[0][1]
    if kind == "LITERAL":
        return bool(value != after[1])
    if kind == "NOT_LITERAL":
        return bool(value == after[1])
    if kind == "IN":
        negated = _name(value[0]) == "NEGATE"
        return any(_has(item, character) for item in value) == negated
    return False


def _has(item: _Node, character: str) -> bool:
    kind, value = _name(item), item[1]
    if kind == "LITERAL":
        return bool(value == ord(character))
    if kind == "RANGE":
        return bool(value[0] <= ord(character) <= value[1])
    if kind == "CATEGORY":
        classes = {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w", "NOT_DIGIT": r"\D", "NOT_SPACE": r"\S"}
        return re.match(classes.get(str(value).removeprefix("CATEGORY_"), r"\W"), character) is not None
    return False


# ---------------------------------------------------------------- words


def _place(path: Iterable[str]) -> str:
    return "$" + "".join(f".{word}" if re.fullmatch(r"[\w$]+", word) else f"[{word!r}]" for word in path)


def _shown(value: object) -> str:
    return _cut(json.dumps(value, default=repr))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
