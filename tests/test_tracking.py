import copy
import json
import operator
import pickle
import pprint
import random
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Mapping, MutableMapping, Sequence
from enum import StrEnum
from types import MappingProxyType

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mqworker.tracking import (
    MAX_CHANGES,
    WHOLE,
    Edit,
    Read,
    advise,
    ask_plainly,
    observe,
    probe,
    token,
    token_of,
    value_of,
)

METADATA = {
    "version": 1,
    "load": 2.5,
    "arch": "amd64",
    "chroots": ["sid-amd64", "trixie-amd64"],
    "gpu": {"model": "a", "cores": [1, 2]},
    "none": None,
    "available": True,
    "empty": [],
}
DATA = {"chroot": "trixie-amd64", "needs": {"memory": 1, "deep": {"list": [1]}}, "words": ["a", "b"]}


def plain(ask, metadata=METADATA, data=DATA):
    try:
        return bool(ask(copy.deepcopy(dict(metadata)), copy.deepcopy(dict(data)))), None
    except Exception as error:  # noqa: BLE001  # the model of what observe() does with any exception
        return False, f"{type(error).__name__}: {error}"


def seen(ask, metadata=METADATA, data=DATA):
    """Observe, and insist that the answer is that of the plain call and that nothing outside is hurt."""
    before = json.dumps([metadata, data])
    observation = observe(ask, metadata, data)
    assert (observation.answer, observation.error) == plain(ask, metadata, data)
    assert json.dumps([metadata, data]) == before
    assert len(set(observation.metadata)) == len(observation.metadata)
    assert all(token_of(metadata, key) == text for key, text in observation.metadata)
    assert all(token_of(data, key) == text for key, text in observation.data)
    return observation


def keys(ask, **others):
    return [key for key, _ in seen(ask, **others).metadata]


def known(observation):
    """Say which names were read, or "whole"."""
    return {key[1][0] if key[1] else key[0] for key, _ in observation.metadata}


# ---------------------------------------------------------------- each trap


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda m, _: m.get("arch") == "amd64", [("kind", ("arch",)), ("==", ("arch", '"amd64"'))]),
        (lambda m, _: m["arch"] == "amd64", [("kind", ("arch",)), ("==", ("arch", '"amd64"'))]),
        (lambda m, _: m.get("nothing") is None, [("kind", ("nothing",))]),
        (lambda m, _: m["nothing"], [("kind", ("nothing",))]),
        (lambda m, _: m.get("nothing", 7) == 7, [("kind", ("nothing",))]),
        (lambda m, _: "arch" in m and "nothing" not in m, [("present", ("arch",)), ("present", ("nothing",))]),
        (lambda m, _: m.get("available") is True, [("kind", ("available",))]),
        (lambda m, _: m["version"] >= 1, [("kind", ("version",)), (">=", ("version", "1"))]),
        (
            lambda m, _: 1 <= m["version"] < 2,
            [("kind", ("version",)), (">=", ("version", "1")), ("<", ("version", "2"))],
        ),
        (lambda m, _: m["load"] != 1, [("kind", ("load",)), ("==", ("load", "1"))]),
        (lambda m, d: d["chroot"] in m["chroots"], [("kind", ("chroots",)), ("has", ("chroots", '"trixie-amd64"'))]),
        (lambda m, _: not m["empty"], [("kind", ("empty",)), ("truth", ("empty",))]),
        (
            lambda m, _: m["arch"] in ("i386", "amd64"),
            [("kind", ("arch",)), ("==", ("arch", '"i386"')), ("==", ("arch", '"amd64"'))],
        ),
        (lambda m, _: m["arch"] in {"amd64", "i386"}, [("kind", ("arch",)), ("value", ("arch",))]),
        (lambda m, _: m["arch"].startswith("amd"), [("kind", ("arch",)), ("value", ("arch",))]),
        (lambda m, _: len(m["chroots"]) == 2, [("kind", ("chroots",)), ("value", ("chroots",))]),
        (lambda m, _: m["gpu"]["model"] == "a", [("kind", ("gpu",))]),
        (lambda m, _: len(m) == 8, [("length", ())]),
        (lambda m, _: bool(m), [("length", ())]),
        (lambda m, _: m and True, [("length", ())]),
        (lambda m, _: [name for name in m if name[0] == "a"] == ["arch", "available"], [("keys", ())]),
        (lambda m, _: next(reversed(m)) == "empty", [("keys", ())]),
        (lambda m, _: next(iter(m)) == "version", [("keys", ())]),
        (lambda m, _: set(m) > {"arch"}, [("keys", ())]),
        (lambda m, _: isinstance(m, dict) and isinstance(m, Mapping) and isinstance(m, MutableMapping), []),
        (lambda m, _: not isinstance(m, OrderedDict | list), []),
        (lambda m, _: m.__class__ is dict and callable(m.keys) and hasattr(m, "items"), []),
        (lambda m, _: not hasattr(m, "arch") and not hasattr(m, "__dict__") and not hasattr(m, "_origin"), []),
        (lambda _, __: True, []),
    ],
)
def test_a_look_is_recorded_as_what_it_can_tell(ask, expected):
    assert sorted(keys(ask)) == sorted(expected)
    assert seen(ask).tracked


@pytest.mark.parametrize(
    "ask",
    [
        lambda m, _: list(m.keys()),
        lambda m, _: list(m.values()),
        lambda m, _: [value for name, value in m.items() if name == "arch"] == ["amd64"],
        lambda m, _: m == METADATA,
        lambda m, _: METADATA == m,  # noqa: SIM300  # the other way round
        lambda m, _: m != {},
        lambda m, _: {} != m,  # noqa: SIM300  # the other way round
        lambda m, _: "amd64" in repr(m),
        lambda m, _: "amd64" in str(m),
        lambda m, _: "amd64" in f"{m}",
        lambda m, _: "amd64" in "{}".format(m),  # noqa: UP032  # another way to the same trap
        lambda m, _: "amd64" in "%s" % (m,),  # noqa: UP031  # another way to the same trap
        lambda m, _: m.copy()["arch"] == "amd64",
        lambda m, _: copy.copy(m)["arch"] == "amd64",
        lambda m, _: copy.deepcopy(m) == METADATA,
        lambda m, _: pickle.loads(pickle.dumps(m)) == METADATA,  # noqa: S301  # pickled here
        lambda m, _: dict(m)["arch"] == "amd64",
        lambda m, _: {**m}["arch"] == "amd64",
        lambda m, _: dict(**m)["arch"] == "amd64",
        lambda m, _: (m | {})["arch"] == "amd64",
        lambda m, _: ({} | m)["arch"] == "amd64",
        lambda m, _: operator.or_(m, m)["arch"] == "amd64",
        lambda m, _: MappingProxyType(dict(m))["arch"] == "amd64",
        lambda m, _: OrderedDict(m)["arch"] == "amd64",
        lambda m, _: "amd64" in pprint.pformat(m),
        lambda m, _: m.__repr__() and m.__len__() == 8 and m.__eq__(METADATA),
        lambda m, _: sys.getsizeof(m) > 0,
        # attempts to mutate change a copy that only this call sees
        lambda m, _: m.pop("arch") == "amd64" and "arch" not in m and len(m) == 7,
        lambda m, _: m.pop("nothing", 3) == 3,
        lambda m, _: m.popitem() == ("empty", []),
        lambda m, _: m.setdefault("arch", 1) == "amd64" and m.setdefault("new", 1) == 1 == m["new"],
        lambda m, _: m.update(arch="x") is None and m["arch"] == "x",
        lambda m, _: m.clear() is None and not m and m.get("arch") is None,
        lambda m, _: operator.setitem(m, "arch", "x") is None and m["arch"] == "x",
        lambda m, _: operator.delitem(m, "arch") is None and "arch" not in m,
        lambda m, _: operator.ior(m, {"arch": "x"})["arch"] == "x",
        lambda m, _: [m.pop(name) for name in list(m)] and not m,
    ],
)
def test_what_needs_all_of_it_reads_all_of_it(ask):
    observation = seen(ask)

    assert WHOLE in dict(observation.metadata)
    assert not observation.data
    assert observation.tracked


@pytest.mark.parametrize(
    "ask",
    [
        lambda m, _: "amd64" in json.dumps(m),  # the C encoder
        lambda m, _: "amd64" in json.dumps(m, sort_keys=True, ensure_ascii=False),
        lambda m, _: json.dumps({"in": m}) and json.dumps([m["chroots"], m["version"]]),
        lambda m, _: dict.get(m, "arch") == "amd64",
        lambda m, _: dict.__getitem__(m, "arch") == "amd64",
        lambda m, _: m.__class__.get(m, "arch") == "amd64",
        lambda m, _: list(dict.items(m))[2] == ("arch", "amd64"),
        lambda m, _: dict.pop(m, "arch") == "amd64" and "arch" not in m,
        lambda m, _: eval("arch", m) == "amd64",  # noqa: S307  # another way into C
        lambda m, d: json.dumps(d) != json.dumps(m),
    ],
)
def test_what_cannot_be_tracked_counts_as_reading_everything(ask):
    observation = seen(ask)

    assert observation.answer
    assert dict(observation.metadata)[WHOLE] == token_of(METADATA, WHOLE)
    assert dict(observation.data)[WHOLE] == token_of(DATA, WHOLE)
    assert not observation.tracked


def test_the_pure_json_encoder_reads_all_of_it():
    quote = json.encoder.py_encode_basestring
    write = json.encoder._make_iterencode({}, repr, quote, None, float.__repr__, ":", ",", False, False, False)
    observation = seen(lambda m, _: "amd64" in "".join(write(m, 0)))

    assert observation.answer
    assert observation.tracked
    assert WHOLE in dict(observation.metadata)


def test_a_match_statement_reads_the_keys_of_its_patterns_and_the_length():
    def ask(m, _):
        match m:
            case {"arch": "i386"}:
                return False
            case {"arch": "amd64", "chroots": [_, "trixie-amd64"], "version": int(version), "load": float()}:
                return version == 1
        return False

    observation = seen(ask)
    assert observation.answer
    assert known(observation) == {"length", "arch", "chroots", "version", "load"}


def test_a_class_pattern_and_an_empty_mapping_pattern_read_nothing():
    def ask(m, _):
        match m:
            case list() | str() | [*_]:
                return False
            case dict():
                match m:
                    case {}:
                        return True
        return False

    assert keys(ask) == []


def test_the_rest_of_a_mapping_pattern_is_everything():
    def ask(m, _):
        match m:
            case {"arch": _, **rest}:
                return rest["version"] == 1
        return False

    assert "whole" in known(seen(ask))


@pytest.mark.parametrize(
    "ask",
    [
        lambda m, _: list.append(m["chroots"], 1) is None and 1 in m["chroots"],
        lambda m, _: m["chroots"].append(1) is None and 1 in m["chroots"] and 1 in m.get("chroots"),
        lambda m, _: m["chroots"].clear() is None and not m["chroots"],
        lambda m, _: operator.iadd(m["chroots"], [1])[-1] == 1 and m["chroots"][2] == 1,
        lambda m, _: m["chroots"].sort(reverse=True) is None and m["chroots"][0] == "trixie-amd64",
        lambda m, _: operator.setitem(m["chroots"], 0, 5) is None and m["chroots"][0] == 5,
        lambda m, _: dict(m)["chroots"].append(1) is None and 1 in m["chroots"],
        lambda m, _: m["gpu"].update(model="b") is None and m["gpu"]["model"] == "b",
        lambda m, _: dict.update(m["gpu"], model="b") is None and m["gpu"]["model"] == "b",
        lambda m, _: m["gpu"]["cores"].append(1) is None and m["gpu"]["cores"] == [1, 2, 1],
        lambda _, d: d["words"].append("c") is None and d["words"] == ["a", "b", "c"],
        lambda _, d: d["needs"].pop("memory") == 1 and "memory" not in d["needs"] and "memory" not in dict(d)["needs"],
        lambda _, d: operator.setitem(d["needs"]["deep"], "x", 1) is None and d["needs"]["deep"]["x"] == 1,
    ],
)
def test_changing_a_nested_value_hurts_nothing_outside_this_observation(ask):
    before = copy.deepcopy((METADATA, DATA))

    assert seen(ask).answer
    assert seen(ask).answer
    assert before == (METADATA, DATA)


@pytest.mark.parametrize(
    "ask",
    [
        lambda m, _: type(m["gpu"]) is dict and type(m["available"]) is bool and m["none"] is None,
        lambda m, _: isinstance(m["version"], int) and not isinstance(m["version"], bool | str | float | Sequence),
        lambda m, _: isinstance(m["load"], float) and isinstance(m["arch"], str) and isinstance(m["chroots"], list),
        lambda m, _: isinstance(m["chroots"], Sequence) and not isinstance(m["version"], Sequence),
        lambda m, _: m["version"] + 1 == 2 == 1 + m["version"] and m["version"] * 3 == 3 and -m["version"] == -1,
        lambda m, _: divmod(m["version"], 2) == (0, 1) and 2 ** m["version"] == 2 and pow(m["version"], 2, 3) == 1,
        lambda m, _: m["version"] + m["load"] == 3.5 and m["load"] // m["version"] == 2 and round(m["load"]) == 2,
        lambda m, _: range(m["version"])[-1] == 0 and [7, 8][m["version"]] == 8 and "ab"[m["version"] :] == "b",
        lambda m, _: int(m["load"]) == 2 and float(m["version"]) == 1.0 and str(m["version"]) == "1",
        lambda m, _: f"{m['version']:03}{m['arch']}" == "001amd64" == "%03d%s" % (m["version"], m["arch"]),  # noqa: UP031  # a trap
        lambda m, _: m["arch"] + "x" == "amd64x" and "x" + m["arch"] == "xamd64" and m["arch"] * 2 == 2 * m["arch"],
        lambda m, _: (
            {"amd64": 1}[m["arch"]] == 1 and {m["arch"]: 2} == {"amd64": 2} and hash(m["arch"]) == hash("amd64")
        ),
        lambda m, _: m["arch"][0] == "a" and "md" in m["arch"] and list(m["arch"])[-1] == "4" and m["arch"] < "b",
        lambda m, _: m["chroots"][0] == "sid-amd64" and m["chroots"] + [1] == ["sid-amd64", "trixie-amd64", 1],
        lambda m, _: [1] + m["chroots"] == [1, *m["chroots"]] and m["chroots"] == ["sid-amd64", "trixie-amd64"],
        lambda m, _: sorted(m["chroots"]) == m["chroots"] and any(one.startswith("sid") for one in m["chroots"]),
        lambda m, _: max(m["version"], 3) == 3 and min(m["version"], m["load"]) == 1 and sum([m["version"], 1]) == 2,
        lambda m, _: m["version"].bit_length() == 1 and m["load"].is_integer() is False and m["version"].real == 1,
        lambda m, _: m["arch"] is m["arch"] and m["chroots"] is m.get("chroots") and m["gpu"] is m["gpu"],
        lambda m, _: m["version"] == m["available"] and m["version"] == 1.0 and m["version"] != "1",
        lambda m, _: bool(m["version"]) and not m["empty"] and (m["none"] or m["arch"]) == "amd64",
        lambda m, d: d["needs"]["memory"] <= m["load"] and m["version"] in [0, d["needs"]["memory"]],
        lambda m, _: re.search("md", m["arch"]) is not None,
        lambda m, _: "".join([m["arch"], "x"]) == "amd64x" and m["arch"] in "x amd64 x" and int("1") == m["version"],
        lambda m, _: json.loads(json.dumps(m["chroots"])) == m["chroots"] and json.dumps(m["version"]) == "1",
        lambda m, _: copy.deepcopy(m["chroots"]) == m["chroots"] and pickle.loads(pickle.dumps(m["version"])) == 1,  # noqa: S301  # pickled here
    ],
)
def test_values_behave_as_what_they_stand_for_and_only_their_keys_are_read(ask):
    observation = seen(ask)

    assert observation.answer
    assert observation.tracked
    assert "whole" not in known(observation)


def test_a_key_of_another_type_is_missing_without_a_read_and_an_enum_is_its_text():
    class Name(StrEnum):
        ARCH = "arch"

    assert keys(lambda m, _: 1 not in m and None not in m and m.get(("arch",)) is None and m.get(2.5) is None) == []
    assert keys(lambda m, _: m[[]]) == []
    assert keys(lambda m, _: m[Name.ARCH] == "amd64")[0] == ("kind", ("arch",))


def test_a_key_that_may_equal_anything_reads_everything():
    class Chameleon:
        def __hash__(self):
            return hash("arch")

        def __eq__(self, other):
            return other == "arch"

    assert "whole" in known(seen(lambda m, _: m[Chameleon()] == "amd64"))
    assert seen(lambda m, _: m[Chameleon()] == "amd64").answer


def test_a_value_may_be_a_key():
    observation = seen(lambda m, _: m.get(m["arch"]) is None and m["arch"] not in m)

    assert observation.answer
    assert ("value", ("arch",)) in dict(observation.metadata)
    assert ("kind", ("amd64",)) in dict(observation.metadata)


@pytest.mark.parametrize(
    "value", [1, 1.0, True, "1", None, [1], [True], {}, {"a": 1}, 0.0, -0.0, "", [], "true", "int"]
)
def test_a_token_is_of_one_value_only(value):
    others = [1, 1.0, True, "1", None, [1], [True], {}, {"a": 1}, 0.0, -0.0, "", [], "true", "int"]

    assert [repr(one) for one in others if token(one) == token(value)] == [repr(value)]
    assert repr(value_of(token(value))) == repr(value)
    assert token_of({}, ("value", ("x",))) not in [token(one) for one in others]
    for kind in ("value", "kind"):
        assert token_of({"x": value}, (kind, ("x",))) != token_of({}, (kind, ("x",)))


def test_the_order_of_names_is_part_of_a_value():
    assert token({"a": 1, "b": 2}) != token({"b": 2, "a": 1})


# ---------------------------------------------------------------- exceptions


@pytest.mark.parametrize(
    "ask",
    [
        lambda m, _: m["nothing"],
        lambda m, _: m["arch"] > 3,
        lambda m, _: m["none"].x,
        lambda m, _: m < {},
        lambda m, _: {m},
    ],
)
def test_an_exception_counts_as_no_and_is_told(ask):
    observation = seen(ask)

    assert not observation.answer
    assert observation.error
    assert observation.tracked


def test_a_key_error_that_the_program_swallows_costs_no_tracking():
    def ask(m, _):
        try:
            return m["nothing"] == 1
        except KeyError:
            return m["version"] == 1

    observation = seen(ask)
    assert observation.answer
    assert observation.tracked
    assert known(observation) == {"nothing", "version"}


@pytest.mark.parametrize("kind", [TypeError, Exception])
def test_an_exception_of_ours_that_the_program_swallows_is_seen(kind):
    def ask(m, _):
        try:
            return dict.get(m, "version") == 1
        except kind:
            return False

    for version in (1, 2):
        observation = seen(ask, metadata={"version": version})
        assert observation.answer == (version == 1)
        assert not observation.tracked
    assert seen(lambda m, _: re.match("a", m["arch"]), metadata={"arch": "b"}).metadata[-1].key == ("value", ("arch",))


def test_an_error_text_that_quotes_the_metadata_is_no_read():
    def complain(m):
        raise ValueError(m)

    def ask(m, _):
        try:
            complain(m)
        except ValueError:
            return m["version"] == 1

    assert known(seen(ask)) == {"version"}


def test_an_exception_that_has_no_text_does_not_matter():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    def ask(_, __):
        raise Mute

    assert not observe(ask, {}, {}).answer
    assert "Mute" in (observe(ask, {}, {}).error or "")


def test_endless_recursion_counts_as_no():
    def ask(m, d):
        return ask(m, d)

    assert (observe(ask, METADATA, DATA).answer, observe(ask, METADATA, DATA).error is None) == (False, False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_no_exception_passes_through_and_leaves_no_trace_function(error):
    def ask(_, __):
        raise error

    before = sys.gettrace()
    with pytest.raises(error):
        observe(ask, {}, {})
    assert sys.gettrace() is before


def test_what_is_no_bool_counts_as_one():
    assert seen(lambda m, _: m["chroots"]).answer
    assert not seen(lambda m, _: m["empty"]).answer
    assert keys(lambda m, _: m["empty"]) == [("kind", ("empty",)), ("truth", ("empty",))]


def test_a_question_for_the_exact_type_is_answered_plainly():
    assert seen(lambda m, _: type(m) is dict).answer
    assert not seen(lambda m, _: type(m) is dict).tracked


# ---------------------------------------------------------------- data


def test_data_is_tracked_by_path():
    observation = seen(
        lambda m, d: d["needs"]["memory"] <= m["version"] and "deep" in d["needs"] and d["words"][0] == "a"
    )

    assert observation.data == (
        Read(("object", ("needs",)), "object"),
        Read(("object", ("needs", "memory")), "1"),
        Read(("present", ("needs", "deep")), "true"),
        Read(("object", ("words",)), '["a","b"]'),
    )


def test_an_object_in_data_that_is_read_wholly_is_read_by_its_path():
    observation = seen(lambda _, d: d["needs"]["deep"] == {"list": [1]} and d["needs"] is d["needs"])

    assert observation.data[-1] == Read(("whole", ("needs", "deep")), '{"list":[1]}')
    assert seen(lambda _, d: len(d["needs"]) == 2 and next(iter(d["needs"])) == "memory").data[1:] == (
        Read(("length", ("needs",)), "2"),
        Read(("keys", ("needs",)), '["memory","deep"]'),
    )


def test_nothing_below_what_was_read_wholly_is_recorded_again():
    observation = seen(lambda m, d: dict(d)["needs"] and d["needs"]["memory"] and {**m} and m["arch"] and "x" in m)

    assert [read.key for read in observation.metadata] == [WHOLE]
    assert [read.key for read in observation.data] == [WHOLE]


SCHEMA = {
    "type": "object",
    "required": ["arch", "version"],
    "properties": {
        "arch": {"enum": ["amd64", "arm64"]},
        "version": {"type": "integer", "minimum": 1, "maximum": 3},
        "chroots": {"type": "array", "contains": {"const": "trixie-amd64"}},
    },
    "anyOf": [{"properties": {"load": {"maximum": 1}}}, {"properties": {"available": {"const": True}}}],
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"arch": "i386"}, {"version": "1"}, {"version": True}, {"version": 4}, {"chroots": ["sid"]}, {"chroots": 1}],
)
def test_a_json_schema_reads_what_it_names(changes):
    validator = jsonschema.Draft202012Validator(SCHEMA)
    observation = seen(lambda m, _: validator.is_valid(m), metadata={**METADATA, **changes})

    assert observation.answer == (not changes)
    assert observation.tracked
    assert known(observation) <= {"arch", "version", "chroots", "load", "available"}


# ---------------------------------------------------------------- the invariants, on programs that a machine wrote

NAMES = ["a", "b", "c"]
SCALARS = st.sampled_from([0, 1, 2, True, False, None, "", "a", "b", "x", 1.0, 2.5])
DOCUMENTS = st.dictionaries(
    st.sampled_from(NAMES),
    SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.sampled_from(NAMES), SCALARS, max_size=2),
)

VALUE = ["m.get($n)", "m[$n]", "m.get($n, $s)", "d.get($n)", "m.pop($n, $s)", "m.setdefault($n, $s)", "dict.get(m, $n)"]
VALUE += [
    "len(m)",
    "list(m)",
    "{**m}.get($n)",
    "dict(m).get($n)",
    "json.dumps(m)",
    "repr(m)",
    "same($s)",
    "m.get($n, [])",
]
VALUE += [
    "(m.get($n) or $s)",
    "m.get(m.get($n))",
    "m.get(d.get($n), $s)",
    "type(m.get($n)).__name__",
    "(m | d).get($n)",
]
TEST = ["$v == $v", "$v != $s", "$s in $v", "$n in m", "$v >= $s", "$s > $v", "$v", "not $v", "isinstance($v, int)"]
TEST += ["$v in ($s, $s)", "$v is None", "$v + $v == $s", "$v.append($s)", "list.append($v, $s)", "str($v) < 'b'"]
TEST += [
    "any(x == $s for x in $v)",
    "$v[0] == $s",
    "hash($v) == hash($s)",
    "m == d",
    "copy.copy(m) == {}",
    "len($v) > 1",
]
STATEMENT = [
    "if $t: return $t",
    "try:\n  if $t: return $t\nexcept $e: return $t",
    "for x in m:\n  if m[x] == $s: return $t",
    "match m:\n  case {$n: $l}: return $t\n  case {$n: [_, *_], **rest}: return rest",
    "m[$n] = $s",
    "try: y = $v\nexcept $e: pass",
    "if $t and ($t or $t): return $t",
]


def written(draw):
    """Write a program; `draw` picks one of several."""

    def fill(template):
        return re.sub(r"\$(\w)", lambda found: hole(found[1]), template)

    def hole(kind):
        if kind == "n":
            return repr(draw(NAMES))
        if kind in "sl":
            return repr(draw([0, 1, 2, True, None, "a", "x", 2.5] if kind == "s" else [0, 1, "a", None]))
        if kind == "e":
            return draw(["KeyError", "TypeError", "Exception", "(KeyError, TypeError)"])
        return fill(draw(VALUE if kind == "v" else TEST))

    lines = [line for _ in range(draw([1, 2, 3])) for line in fill(draw(STATEMENT)).splitlines()]
    source = "def ask(m, d):\n" + "".join(f"  {line}\n" for line in [*lines, f"return {fill(draw(TEST))}"])
    scope = {"json": json, "copy": copy, "same": lambda value: value}
    exec(compile(source, "<written>", "exec"), scope)  # noqa: S102  # the test wrote it
    return source, scope["ask"]


@settings(max_examples=400, deadline=None)
@given(st.randoms(use_true_random=False), DOCUMENTS, st.lists(DOCUMENTS, min_size=2, max_size=6))
def test_the_answer_is_the_plain_one_and_equal_reads_mean_equal_answers(chance, data, documents):
    source, ask = written(chance.choice)
    observations = [seen(ask, metadata=one, data=data) for one in documents]
    for observation in observations:
        for other, metadata in zip(observations, documents, strict=True):
            if all(token_of(metadata, key) == text for key, text in observation.metadata):
                assert (other.answer, other.metadata) == (observation.answer, observation.metadata), source


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False), DOCUMENTS, st.lists(DOCUMENTS, min_size=2, max_size=6))
def test_equal_reads_of_the_data_mean_equal_answers_too(chance, metadata, documents):
    source, ask = written(chance.choice)
    observations = [seen(ask, metadata=metadata, data=one) for one in documents]
    for observation in observations:
        for other, data in zip(observations, documents, strict=True):
            if all(token_of(data, key) == text for key, text in observation.data):
                assert (other.answer, other.data) == (observation.answer, observation.data), source


def test_most_written_programs_are_tracked():
    chance = random.Random(1)  # noqa: S311  # a seed to come back to
    count = Counter(
        observe(written(chance.choice)[1], {"a": 1, "b": "a", "c": [1]}, {"a": "b"}).tracked for _ in range(300)
    )

    assert count[True] > 2 * count[False] > 0


# ---------------------------------------------------------------- for people


def sbuild(m, d):
    if m.get("sbuild:version") != 1 or not m.get("sbuild:available"):
        return False
    return d["chroot"] in (m.get("sbuild:chroots") or ()) and m.get("memory", 0) >= 8


DEBIAN = {"sbuild:version": 1, "sbuild:available": True, "sbuild:chroots": ["sid"], "memory": 16, "hostname": "x"}


def without(*names):
    return {name: value for name, value in DEBIAN.items() if name not in names}


def test_a_probe_tells_what_each_value_is_compared_with():
    able = {**DEBIAN, "sbuild:chroots": ["trixie"]}

    assert probe(sbuild, able, {"chroot": "trixie"}) == {
        ("value", ("sbuild:version",)): ["1"],
        ("value", ("sbuild:available",)): [],
        ("value", ("sbuild:chroots",)): ['"trixie"'],
        ("value", ("memory",)): [">= 8"],
    }
    assert probe(sbuild, without("sbuild:version"), {"chroot": "trixie"}) == {("value", ("sbuild:version",)): ["1"]}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({**DEBIAN, "sbuild:chroots": ["trixie"]}, []),
        (DEBIAN, [("sbuild:chroots", '["sid","trixie"]')]),
        ({**DEBIAN, "sbuild:chroots": ["trixie"], "memory": 4}, [("memory", "8")]),
        ({**DEBIAN, "sbuild:version": None}, [("sbuild:version", "1"), ("sbuild:chroots", '["sid","trixie"]')]),
        (without("memory"), [("sbuild:chroots", '["sid","trixie"]'), ("memory", "8")]),
        (
            {"hostname": "x"},
            [("sbuild:version", "1"), ("sbuild:available", "true"), ("sbuild:chroots", '["trixie"]'), ("memory", "8")],
        ),
    ],
)
def test_advice_is_the_fewest_changes_that_do(metadata, expected):
    assert advise(sbuild, metadata, {"chroot": "trixie"}) == [Edit(*one) for one in expected]


def test_advice_may_take_what_others_have_or_take_a_key_away():
    assert advise(
        lambda m, _: m["os"].endswith("13"), {"os": "debian12"}, {}, {"os": ['"debian11"', '"debian13"']}
    ) == [Edit("os", '"debian13"')]
    assert advise(lambda m, _: "drained" not in m, {"drained": "yes"}, {}) == [Edit("drained", "")]
    assert advise(lambda m, _: not m["drained"], {"drained": True}, {}) == [Edit("drained", "false")]
    assert advise(lambda m, _: m["load"] < 5, {"load": 5}, {}) == [Edit("load", "4")]


def test_there_is_no_advice_where_nothing_helps():
    assert advise(lambda _, __: False, DEBIAN, {}) is None
    assert advise(lambda m, _: all(m[f"k{number}"] for number in range(MAX_CHANGES + 1)), {}, {}) is None
    assert advise(sbuild, {}, {"chroot": "trixie"}, runs=3) is None


def test_asking_plainly_hurts_nothing():
    metadata = copy.deepcopy(METADATA)

    assert ask_plainly(
        lambda m, d: m["chroots"].pop() == d["chroot"] and m.pop("arch") and m["nothing"], metadata, DATA
    ) == (
        False,
        "KeyError: 'nothing'",
    )
    assert metadata == METADATA
