"""Messages of every kind, made from the structs' own descriptions, and everything that can be wrong with them.

All chance comes from one `random.Random`, so that a seed makes the same messages again, and Hypothesis can be the
chance. What a field is called says what makes sense in it; all else is drawn from its type and its bounds.
"""

import json
import re
from functools import cache

import msgspec
from msgspec import inspect

from mqworker import messages

ESCAPES = ["\x1b[31m", "\x1b]0;title\x07", "\x9b2J", "\u202egnp.exe", "\x00", "\r", "\n", "\x7f", "\u2028", "\ufeff"]
PATHS = [
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/../../b",
    ".",
    "",
    "con",
    "a" * 4096,
    "-rf",
    "a\x00b",
    "~",
    "a//b",
    "A/a",
]
TEXTS = [
    *ESCAPES,
    *PATHS,
    "'; DROP TABLE requests; --",
    "$(touch /tmp/pwned)",
    "%s%n{0}",
    "[bold]markup[/bold]",
    "\U0001f4a9" * 10,
    "mqworker.submit",
    "mqworker.queue.submit",
    "mqworker.work.1-1",
    "amq.gen-x",
    "#",
    "*",
    "x" * 101,
    "x" * 301,
    "x" * 1001,
    "x" * 5000,
]
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    2**31,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    -(2**63) - 1,
    True,
    1.0,
    -0.0,
    1e308,
    5e-324,
    0.5,
]
# What no value of Python's becomes as JSON.
RAW = [
    b"1e999",
    b"-1e999",
    b"1e-999",
    b"9" * 5000,
    b"-" + b"9" * 300,
    b"NaN",
    b"Infinity",
    b'"\\ud800"',
    b'"\\udc00\\ud800"',
    b'"\\u0000"',
    b'"\xff\xfe"',
    b'"\xed\xa0\x80"',
    b'{"a":1,"a":2}',
    b"[" * 60 + b"]" * 60,
    b'{"a":' * 60 + b"1" + b"}" * 60,
    b"[" * 100_000,
    b"[" * 2000 + b"]" * 2000,
    b"01",
    b".5",
    b"'x'",
    b"",
    b"1,2",
    b"null",
    b"[]",
    b"{}",
    b'"' + b"x" * 70_000 + b'"',
]
AN_ID = "00000000-0000-4000-8000-000000000000"
MARK = "@@%d@@"
MOST_PLACES = 2000
TASKS = ["sim0", "sim1", "Sim2", "sim3", "sim4", "sim5", "noop"]
KEYS = ["arch", "mem", "n", "tags", "tools", "free", "host", "system:cpu_count"]
SCHEMAS = [
    {"required": ["mem"], "properties": {"mem": {"minimum": 1}}},
    {"$ref": "#"},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"$ref": "http://127.0.0.1:1/x"},
    {"properties": {"host": {"pattern": "^(a+)+$"}}},
    {"properties": {"host": {"pattern": "(a|a)*b"}}},
    {"properties": {"tags": {"uniqueItems": True}}},
    {"allOf": [{"anyOf": [{"not": {"enum": list(range(50))}}] * 20}] * 20},
    {"patternProperties": {"^.*.*.*$": {"type": "string"}}},
    {"unevaluatedProperties": False, "properties": {"arch": True}},
    {"multipleOf": 1e-300, "properties": {"mem": {"multipleOf": 1e-300}}},
    {"minimum": 10**300},
]


class Maker:
    """Make messages; `known` are ids, tokens, epochs and the like that mean something to whoever reads them."""

    def __init__(self, random, known=None):
        self.random = random
        self.known = known or {}

    # ------------------------------------------------------------ what is right

    def valid(self, kind):
        """Return a message of a kind (a struct or a union), as JSON's values."""
        return self._value(_described(kind), "", 0)

    def _value(self, info, name, depth):
        choose = self.random
        known = self.known.get(name)
        if known and isinstance(info, inspect.StrType | inspect.IntType) and choose.random() < 0.9:
            return choose.choice(known)
        match info:
            case inspect.StructType():
                return self._struct(info.cls, depth)
            case inspect.UnionType():
                return self._value(choose.choice(info.types), name, depth)
            case inspect.LiteralType():
                return choose.choice(info.values)
            case inspect.NoneType():
                return None
            case inspect.BoolType():
                return choose.random() < 0.5
            case inspect.IntType():
                return self._integer(info)
            case inspect.FloatType():
                least = 0.0 if info.ge is None else info.ge
                most = 2e9 if info.le is None else info.le
                return choose.choice([float(least), choose.uniform(least, most), float(most)])
            case inspect.StrType():
                return self._text(info, name)
            case inspect.ListType():
                most = min(3 if depth < 6 else 1, info.max_length or 3)
                number = max(info.min_length or 0, choose.randint(0, most))
                return [self._value(info.item_type, name, depth + 1) for _ in range(number)]
            case inspect.DictType():
                if name == "requires":
                    return choose.choice(SCHEMAS)
                return {
                    self._key(name): self._value(info.value_type, name, depth + 1) for _ in range(choose.randint(0, 3))
                }
            case inspect.AnyType():
                return self.anything(3)
        raise NotImplementedError(info)

    def _struct(self, kind, depth):
        config = kind.__struct_config__
        made = {} if config.tag is None else {config.tag_field or "type": config.tag}
        for field in _fields(kind):
            if field.name == "v":
                made["v"] = messages.VERSION
            elif field.required or self.random.random() < 0.5:
                made[field.encode_name] = self._value(field.type, field.name, depth + 1)
        return made

    def _integer(self, info):
        least = -(2**63) if info.ge is None else info.ge
        most = 2**63 - 1 if info.le is None else info.le
        return self.random.choice([least, most, *(max(least, min(most, one)) for one in (1, 1, 1, 2, 3))])

    def _text(self, info, name):
        if info.pattern is None or "x00" in info.pattern:
            odd = info.pattern is None or "x1f" not in info.pattern
            text = (
                self.random.choice(TEXTS)
                if odd and self.random.random() < 0.2
                else f"{name}-{self.random.randrange(50)}"
            )
            return text[: info.max_length]
        if _fits(info.pattern, AN_ID):
            return an_id(self.random)
        return next(like for like in ("a1", "0" * 64, "test:one", "/input") if _fits(info.pattern, like))

    def _key(self, name):
        if name == "tasks":
            return self.random.choice(TASKS)
        return self.random.choice(KEYS) if self.random.random() < 0.8 else f"key{self.random.randrange(10**6)}"

    def anything(self, depth):
        """Return any JSON value."""
        choose = self.random
        which = choose.randrange(7 if depth else 5)
        if which == 5:
            return [self.anything(depth - 1) for _ in range(choose.randrange(4))]
        if which == 6:
            return {self._key(""): self.anything(depth - 1) for _ in range(choose.randrange(4))}
        return choose.choice([None, True, False, choose.choice(NUMBERS), choose.choice(TEXTS), "amd64", 1, ["a"]])

    # ------------------------------------------------------------ what is wrong

    def message(self, kind):
        """Return the bytes of a message: a valid one, or one that is wrong in some way."""
        made = self.valid(kind)
        dice = self.random.random()
        if dice < 0.35:
            return _written(made)
        if dice < 0.75:
            return self._bent(msgspec.json.decode(_written(made)))  # a copy, in which no part is another's
        return self.damaged(_written(made))

    def _bent(self, made):
        """Change what a message says, here and there."""
        raws = {}
        most = 200
        for _ in range(self.random.choice([1, 1, 1, 2, 3])):
            places = _places(made)
            if not places:
                break
            holder, key = self.random.choice(places)
            match self.random.randrange(8):
                case 0:
                    del holder[key]
                case 1:
                    holder[key] = self.random.choice(NUMBERS)
                case 2:
                    holder[key] = self.random.choice(TEXTS)
                case 3:
                    mark = MARK % len(raws)
                    raws[mark] = self.random.choice(RAW)
                    holder[key] = mark
                case 4:
                    holder[key] = self.anything(2)
                case 5 if isinstance(holder, dict):
                    holder[self.random.choice(TEXTS)] = self.anything(1)
                case 6 if isinstance(holder, list):
                    holder *= min(most, self.random.choice([2, 20, 200]))
                    most = 1  # what is in it more than once would be so more than once each time
                case _:
                    holder[key] = None
        body = _written(made)
        for mark, raw in raws.items():
            body = body.replace(json.dumps(mark).encode(), raw, 3)
        return body

    def damaged(self, body):
        """Change bytes, whatever they say."""
        choose = self.random
        data = bytearray(body)
        for _ in range(choose.choice([1, 1, 2, 5, 20])):
            at = choose.randrange(len(data) + 1)
            match choose.randrange(8):
                case 0 if data:
                    data[min(at, len(data) - 1)] ^= 1 << choose.randrange(8)
                case 1:
                    del data[at:]
                case 2:
                    del data[at : at + choose.randrange(1, 20)]
                case 3:
                    data[at:at] = bytes(choose.randrange(256) for _ in range(choose.randrange(1, 8)))
                case 4:
                    data[at:at] = choose.choice([b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u", b"\x00"])
                case 5:
                    data[at:at] = data[max(0, at - 40) : at]
                case 6:
                    data[:0] = choose.choice([b"\xef\xbb\xbf", b"\xff\xfe", b" " * 100, b"\n"])
                case _:
                    data += choose.choice([b"x", b"{}", b"\x00", b"\n\n", bytes(data[:100])])
        return bytes(data)


def an_id(random):
    return f"00000000-0000-4000-8000-{random.randrange(3000):012x}"


def _written(made):
    return msgspec.json.encode(made)


def _places(made):
    """List places of a document, each as its holder and key or index: of a large one not all."""
    places, holders = [], [made]
    for holder in holders:  # it grows as it goes
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                holders.append(holder[key])
        if len(places) > MOST_PLACES:
            break
    return places


@cache
def _described(kind):
    return inspect.type_info(kind)


@cache
def _fields(kind):
    return inspect.type_info(kind).fields


@cache
def _fits(pattern, text):
    return re.search(pattern, text) is not None
