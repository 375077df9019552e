"""What a request's own `requires` means: what it lets pass, what it reads, and which schemas are refused."""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from referencing import Registry

from mqworker import requires
from mqworker.requires import problem, satisfied
from mqworker.tracking import observe


class Watched(Mapping):
    """A mapping that says it is a dict, is none, and notes what is read of it."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values_ = values
        self.read: list[str] = []

    @property
    def __class__(self):
        return dict

    def __getitem__(self, key: str) -> Any:
        self.read.append(key)
        return self.values_[key]

    def __contains__(self, key: object) -> bool:
        self.read.append(str(key))
        return key in self.values_

    def __iter__(self) -> Iterator[str]:
        self.read.append("*")
        return iter(self.values_)

    def __len__(self) -> int:
        self.read.append("*")
        return len(self.values_)

    def __repr__(self) -> str:
        self.read.append("*")
        return repr(self.values_)

    def __eq__(self, other: object) -> bool:
        self.read.append("*")
        return self.values_ == other

    __hash__ = None


HOST = {"cpus": 8, "free": 2.5, "arch": "amd64", "tags": ["big", "ssd"], "nested": {"a": {"b": 1}}, "none": None}


def asked(schema, metadata=HOST) -> tuple[bool, set[str]]:
    """Ask once of a plain dict and once of a watched one; return the answer and what was read."""
    assert problem(schema) is None
    watched = Watched(copy.deepcopy(metadata))
    answer = satisfied(schema, watched)
    assert answer is satisfied(schema, copy.deepcopy(metadata))
    return answer, set(watched.read)


# ---------------------------------------------------------------- what a schema lets pass


@pytest.mark.parametrize(
    ("schema", "answer", "read"),
    [
        ({}, True, set()),
        ({"type": "object"}, True, set()),
        ({"type": ["array", "object"]}, True, set()),
        ({"required": ["cpus"]}, True, {"cpus"}),
        ({"required": ["gpus"]}, False, {"gpus"}),
        ({"properties": {"cpus": {"minimum": 8}}}, True, {"cpus"}),
        ({"properties": {"cpus": {"minimum": 9}}}, False, {"cpus"}),
        ({"properties": {"free": {"exclusiveMinimum": 2.5}}}, False, {"free"}),
        ({"properties": {"arch": {"enum": ["amd64", "arm64"]}}}, True, {"arch"}),
        ({"properties": {"arch": {"const": "arm64"}}}, False, {"arch"}),
        ({"properties": {"arch": {"pattern": "^amd"}}}, True, {"arch"}),
        ({"properties": {"tags": {"contains": {"const": "ssd"}}}}, True, {"tags"}),
        ({"properties": {"tags": {"contains": {"const": "hdd"}}}}, False, {"tags"}),
        ({"properties": {"tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}}}, True, {"tags"}),
        ({"properties": {"nested": {"properties": {"a": {"required": ["b"]}}}}}, True, {"nested"}),
        ({"properties": {"none": {"type": "null"}}}, True, {"none"}),
        ({"anyOf": [{"required": ["gpus"]}, {"required": ["cpus"]}]}, True, {"gpus", "cpus"}),
        ({"anyOf": [{"required": ["gpus"]}, {"required": ["tpus"]}]}, False, {"gpus", "tpus"}),
        ({"anyOf": [{"required": ["cpus"]}, {"required": ["tpus"]}]}, True, {"cpus"}),
        ({"oneOf": [{"required": ["cpus"]}, {"required": ["arch"]}]}, False, {"cpus", "arch"}),
        ({"oneOf": [{"required": ["cpus"]}, {"required": ["gpus"]}]}, True, {"cpus", "gpus"}),
        ({"allOf": [{"required": ["cpus"]}, {"required": ["arch"]}]}, True, {"cpus", "arch"}),
        ({"allOf": [{"required": ["gpus"]}, {"required": ["arch"]}]}, False, {"gpus"}),
        ({"not": {"required": ["gpus"]}}, True, {"gpus"}),
        ({"not": {"required": ["cpus"]}}, False, {"cpus"}),
        ({"if": {"required": ["gpus"]}, "then": {"required": ["cuda"]}}, True, {"gpus"}),
        ({"if": {"required": ["cpus"]}, "then": {"required": ["cuda"]}}, False, {"cpus", "cuda"}),
        ({"if": {"required": ["cpus"]}, "then": False}, False, {"cpus"}),
        ({"if": {"required": ["gpus"]}, "else": {"required": ["arch"]}}, True, {"gpus", "arch"}),
        ({"dependentRequired": {"cpus": ["arch"]}}, True, {"cpus", "arch"}),
        ({"dependentSchemas": {"cpus": {"required": ["gpus"]}}}, False, {"cpus", "gpus"}),
        ({"dependentSchemas": {"gpus": False}}, True, {"gpus"}),
        ({"$defs": {"x": {"required": ["cpus"]}}, "$ref": "#/$defs/x"}, True, {"cpus"}),
        ({"$defs": {"a/b": {"$anchor": "x", "required": ["gpus"]}}, "not": {"$ref": "#x"}}, True, {"gpus"}),
        ({"$defs": {"a/b": {"required": ["gpus"]}}, "not": {"$ref": "#/$defs/a~1b"}}, True, {"gpus"}),
    ],
)
def test_a_schema_reads_of_the_metadata_only_what_it_asks_for(schema, answer, read):
    assert asked(schema) == (answer, read)


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        ({"properties": {"cpus": True}, "additionalProperties": {"type": ["string", "array"]}}, False),
        ({"patternProperties": {".": True}, "additionalProperties": False}, True),
        ({"properties": {"cpus": True}, "unevaluatedProperties": False}, False),
        ({"allOf": [{"properties": dict.fromkeys(HOST, True)}], "unevaluatedProperties": False}, True),
        ({"anyOf": [{"properties": dict.fromkeys(HOST, True)}, False], "unevaluatedProperties": False}, True),
        ({"propertyNames": {"maxLength": 6}}, True),
        ({"minProperties": 7}, False),
        ({"const": HOST}, True),
        ({"enum": [{}, HOST]}, True),
        ({"type": "array"}, False),
    ],
)
def test_a_schema_of_all_keys_holds_of_watched_metadata_as_of_plain_ones(schema, answer):
    assert asked(schema)[0] is answer


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        ({"properties": {"cpus": {"minimum": 9}}}, False),
        ({"properties": {"cpus": {"maximum": 7}}}, False),
        ({"properties": {"free": {"exclusiveMinimum": 2.5}}}, False),
        ({"properties": {"free": {"exclusiveMaximum": 2.5}}}, False),
        ({"properties": {"arch": {"enum": ["arm64", "s390x"]}}}, False),
        ({"properties": {"tags": {"contains": {"const": "hdd"}}}}, False),
        ({"properties": {"tags": {"contains": {"enum": ["hdd", "ssd"]}}}}, True),
    ],
)
def test_what_is_compared_is_not_read_for_its_value_whatever_the_answer(schema, answer):
    seen = observe(lambda metadata, _: satisfied(schema, metadata), HOST, {})
    assert seen.tracked
    assert seen.answer is answer
    assert not [read.key for read in seen.metadata if read.key[0] in {"value", "whole"}]


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        ({"contains": {"const": 1}}, False),
        ({"contains": {"enum": ["big", True]}}, True),
        ({"contains": {"enum": []}}, False),
        ({"contains": {"const": "big", "minLength": 9}}, False),
        ({"contains": {"const": "big"}, "minContains": 2}, False),
        ({"contains": {"const": "big"}, "maxContains": 0, "minContains": 0}, False),
        ({"contains": True}, True),
    ],
)
def test_contains_means_the_same_for_words_and_for_all_else(schema, answer):
    assert asked({"properties": {"tags": schema}})[0] is answer


def test_true_one_and_one_point_oh_are_told_apart_as_json_schema_does():
    assert satisfied({"properties": {"x": {"const": 1}}}, {"x": 1.0})
    assert not satisfied({"properties": {"x": {"const": 1}}}, {"x": True})
    assert not satisfied({"properties": {"x": {"type": "integer"}}}, {"x": True})
    assert not satisfied({"properties": {"x": {"const": True}}}, {"x": 1})


def test_what_is_not_there_passes_unless_it_is_required():
    minimum = {"properties": {"gpus": {"minimum": 2}}}

    assert satisfied(minimum, HOST)
    assert not satisfied({**minimum, "required": ["gpus"]}, HOST)


@pytest.mark.parametrize("own", ["http://[", "x", "", requires.DIALECT, "https://example.org/schema.json#"])
def test_the_formalities_of_a_schema_file_change_nothing(own):
    schema = {"$schema": requires.DIALECT, "$id": own, "title": "x", "$comment": "y"}
    schema |= {"$defs": {"x": {"required": ["gpus"]}, "y": {"$anchor": "y", "required": ["cpus"]}}}

    assert asked({**schema, "anyOf": [{"$ref": "#/$defs/x"}, {"$ref": "#y"}]}) == (True, {"gpus", "cpus"})


_keys = st.sampled_from(["a", "b", "c"])
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "x", "y"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_keys, inner, max_size=2),
    max_leaves=4,
)


def _schemas(inner):
    lists = st.lists(inner, min_size=1, max_size=3)
    return st.fixed_dictionaries(
        {},
        optional={
            "allOf": lists,
            "anyOf": lists,
            "oneOf": lists,
            "not": inner,
            "if": inner,
            "then": inner,
            "else": inner,
            "properties": st.dictionaries(_keys, inner, max_size=3),
            "dependentSchemas": st.dictionaries(_keys, inner, max_size=2),
            "additionalProperties": inner,
            "unevaluatedProperties": inner,
            "items": inner,
            "contains": inner,
            "required": st.lists(_keys, unique=True, max_size=2),
        },
    )


_leaves = st.booleans() | st.builds(lambda value: {"const": value}, _values) | st.just({"type": "object"})


@settings(max_examples=200, deadline=None)
@given(_schemas(st.recursive(_leaves, _schemas, max_leaves=6)), st.dictionaries(_keys, _values, max_size=3))
def test_it_means_what_jsonschema_says_that_it_means(schema, metadata):
    if problem(schema) is None:
        expected = Draft202012Validator(schema, registry=Registry()).is_valid(metadata)

        assert satisfied(schema, metadata) is expected
        assert satisfied(schema, Watched(metadata)) is expected


def test_equal_schemas_are_compiled_once_in_whatever_order_they_are_written():
    requires._validator.cache_clear()
    for schema in ({"required": ["a"], "type": "object"}, {"type": "object", "required": ["a"]}):
        assert satisfied(schema, {"a": 1})

    assert requires._validator.cache_info().misses == 1
    assert requires._validator.cache_info().maxsize == requires.KEPT


# ---------------------------------------------------------------- schemas that are refused


def deep(levels):
    schema = {}
    for _ in range(levels - 1):
        schema = {"not": schema}
    return schema


def laughs(levels):
    """Write a schema that is small, and vast with its references written out."""
    definitions = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 3} for n in range(levels)}
    return {"$defs": {**definitions, f"d{levels}": {"type": "object"}}, "$ref": "#/$defs/d0"}


def chain(length):
    definitions = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(length)}
    return {"$defs": {**definitions, f"d{length}": {}}, "$ref": "#/$defs/d0"}


def nested_ifs(levels):
    schema = {"unevaluatedProperties": False}
    for _ in range(levels):
        schema = {"unevaluatedProperties": False, "if": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ([], "expected a JSON Schema as an object, got list"),
        (True, "expected a JSON Schema as an object, got bool"),
        ({"const": {1, (2, 3)}, "enum": [object()]}, "what is not JSON"),
        ({"type": "objekt"}, r"at \$\.type: 'objekt' is not"),
        ({"properties": {"system:cpu_count": {"minimum": "8"}}}, r"\$\.properties\['system:cpu_count'\]\.minimum: '8'"),
        ({"required": "cpus"}, r"\$\.required: 'cpus' is not of type 'array'"),
        ({"propertys": {}}, r"\$: unknown keyword \"propertys\"; did you mean 'properties'\?"),
        ({"properties": {"x": {"minimun": 3}}}, r"\$\.properties\.x: unknown keyword .*did you mean 'minimum'"),
        ({"system:tags": {"contains": {"const": "x"}}}, 'a metadata key goes into "properties", and into "required"'),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, r"\$\.\$schema: expected https://json-schema.org/dr"),
        ({"not": {"$id": "http://x/"}}, r"\$\.not: expected \$id at the top only"),
        ({"description": "x" * 16 * 1024}, "at most 16384 bytes, got 16402"),
        (deep(21), "at most 20 levels deep"),
        ({"const": [[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]}, "at most 20 levels deep"),
        (
            {"$ref": "http://127.0.0.1/schema.json"},
            r"\$\.\$ref: expected a reference within this schema.*nothing is fet",
        ),
        ({"$ref": "other.json#/x"}, "expected a reference within this schema"),
        ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, "expected a reference within this schema"),
        ({"$defs": {"x": {"$dynamicRef": "http://x/#y"}}}, r"\$\.\$defs\.x\.\$dynamicRef: expected a reference within"),
        ({"$ref": "#/$defs/y", "$defs": {"x": {}}}, r"expected a reference to a schema that is in this one, got .*/y"),
        ({"$ref": "#y"}, "expected a reference to a schema that is in this one"),
        ({"$ref": "#/const", "const": {"pattern": "(a+)+$"}}, "expected a reference to a schema that is in this one"),
        ({"$defs": {"x": {"$anchor": "x"}, "y": {"$anchor": "x"}}}, "expected a name of its own, got 'x' again"),
        ({"$ref": "#"}, "references that end within 20 levels"),
        ({"properties": {"x": {"$ref": "#"}}}, "references that end within 20 levels"),
        (
            {"$defs": {"x": {"$ref": "#/$defs/y"}, "y": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"},
            "that end within 20",
        ),
        (chain(20), "references that end within 20 levels"),
        (laughs(8), "at most 2000 parts with its references written out"),
        (nested_ifs(8), "at most 2000 parts"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_with_the_place_and_what_was_expected(schema, said):
    found = problem(schema)

    assert found is not None
    assert re.search(said, found), found
    assert "\n" not in found
    assert len(found) < 600


@pytest.mark.parametrize("schema", [deep(20), chain(18), laughs(5), nested_ifs(4), {"description": "x" * 16_000}])
def test_what_is_just_within_the_bounds_is_used(schema):
    assert problem(schema) is None
    assert isinstance(satisfied(schema, HOST), bool)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", r"expected a regular expression \(missing \)"),
        (r"\p{L}", "expected a regular expression"),
        ("[[a]", "expected a regular expression"),  # warned of
        ("a" * 201, "at most 200 characters"),
        ("(a+)+$", "without a repeat or a choice inside an unbounded repeat"),
        ("(a|aa)*$", "without a repeat or a choice inside an unbounded repeat"),
        ("(a{1,2})*$", "without a repeat or a choice inside an unbounded repeat"),
        ("(?:(?=a+)a)*$", "without a repeat or a choice inside an unbounded repeat"),
        ("(?:a?){1,999}$", "without a repeat or a choice inside an unbounded repeat"),
        (r"(a)\1", "without back-references"),
        ("(a)?(?(1)b|c)", "without back-references"),
        ("^a+b+c+d+e+$", "at most 4 unbounded repeats"),
        (".*.*.*x", "fewer ways to match"),
        ("^.*.*.*.*x", "fewer ways to match"),
        ("((a|ab){9}){9}", "fewer ways to match"),
        ("(?:a*b?){3}c", "fewer ways to match"),
        ("(?i)a", "without flags"),
        ("(?P<x>a)", "without names of groups"),
        ("(?i:a)", "without flags"),
    ],
)
def test_a_pattern_that_could_go_on_for_ever_is_refused_wherever_it_is(pattern, said):
    for schema in (
        {"properties": {"x": {"pattern": pattern}}},
        {"$defs": {"x": {"patternProperties": {pattern: True}}}},
    ):
        found = problem(schema)

        assert found is not None
        assert re.search(said, found), found
        assert found.startswith("$.")


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "^trixie-",
        "^(amd64|arm64)$",
        r"^linux-6\.[0-9]+\.[0-9]+-.*$",
        r"^\d+\.\d+\.\d+\.\d+$",
        "^[^:]+:[^:]+:[^:]+:.+$",
        "-ssd-.*-big$",
        r"^1(\.[0-9]+)?(\.[0-9]+)?$",
        "^[a-z]{1,8}(-[a-z]{1,8}){0,2}$",
        "^(?!.*-old$)",
        "^(?:a?){9}$",
    ],
)
def test_patterns_as_people_write_them_are_used(pattern):
    assert problem({"properties": {"x": {"pattern": pattern}}}) is None


def test_words_that_look_like_keywords_but_are_names_or_values_are_left_alone():
    schema = {
        "properties": {"pattern": {"const": {"$ref": "nowhere", "pattern": "(a+)+"}}, "$ref": True, "bogus": {}},
        "required": ["not"],
        "enum": [{"if": 3}],
    }

    assert problem(schema) is None
