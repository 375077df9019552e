import inspect
import json
import re
from functools import cache
from typing import get_args

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mqworker import messages
from mqworker.errors import NewerVersion, PeerError, Unreadable
from mqworker.messages import (
    MAX_MESSAGE_BYTES,
    MAX_REQUESTS_IN_A_MESSAGE,
    VERSION,
    Answer,
    Artifact,
    Claim,
    FileEntry,
    ListArtifacts,
    Outcome,
    Query,
    Relation,
    Report,
    Request,
    RunRef,
    SlotOrder,
    SlotWord,
    Submit,
    Tickets,
    decode,
    encode,
    encode_line,
)

AN_ID = "01234567-89ab-cdef-0123-456789abcdef"
A_SHA256 = "0" * 64
KINDS = [
    kind
    for _, kind in inspect.getmembers(messages, inspect.isclass)
    if issubclass(kind, msgspec.Struct) and kind.__module__ == messages.__name__ and not kind.__name__.startswith("_")
]
ENVELOPES = [kind for kind in KINDS if "v" in kind.__struct_fields__]
UNIONS = [Query, Answer, SlotOrder, SlotWord]

# ---------------------------------------------------------------- any message, made from its own description

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=3,
)


def described(kind):
    """Return a strategy for a type as msgspec describes it."""
    info = msgspec.inspect
    match kind:
        case info.AnyType():
            return JSON
        case info.NoneType():
            return st.none()
        case info.BoolType():
            return st.booleans()
        case info.IntType():
            return st.integers(-(2**63) if kind.ge is None else kind.ge, 2**63 - 1 if kind.le is None else kind.le)
        case info.FloatType():
            return NUMBER if kind.ge is None else st.floats(kind.ge, kind.le)
        case info.StrType():
            return (
                text_like(kind.pattern)
                if kind.pattern
                else TEXT.filter(lambda text: len(text) >= (kind.min_length or 0))
            )
        case info.LiteralType():
            return st.sampled_from(kind.values)
        case info.ListType():
            return st.lists(described(kind.item_type), min_size=kind.min_length or 0, max_size=2)
        case info.DictType():
            return st.dictionaries(described(kind.key_type), described(kind.value_type), max_size=2)
        case info.UnionType():
            return st.one_of([described(one) for one in kind.types])
        case info.StructType():
            return any_of(kind.cls)
    raise NotImplementedError(kind)


@cache
def text_like(pattern):
    # The two that are in nearly every message: from their patterns they would be drawn digit by digit.
    if re.search(pattern, AN_ID):
        return st.uuids().map(str)
    if re.search(pattern, A_SHA256):
        return st.binary(min_size=32, max_size=32).map(bytes.hex)
    return st.from_regex(pattern).filter(lambda text: len(text) <= 100)


@cache
def any_of(kind):
    fields = msgspec.inspect.type_info(kind).fields
    return st.builds(
        kind, **{field.name: st.just(VERSION) if field.name == "v" else described(field.type) for field in fields}
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_message_that_was_written_is_read_back_the_same(kind):
    @settings(max_examples=15, deadline=None)
    @given(any_of(kind))
    def check(message):
        body = encode(message)
        line = encode_line(message)

        assert decode(body, kind) == message
        assert json.loads(body) == msgspec.to_builtins(message)  # any other JSON reader sees the same
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert decode(line, kind) == message

    check()


@pytest.mark.parametrize("union", UNIONS)
def test_a_message_of_a_union_is_read_back_as_its_own_kind(union):
    @settings(max_examples=15, deadline=None)
    @given(st.one_of([any_of(kind) for kind in get_args(union)]))
    def check(message):
        assert type(decode(encode(message), union)) is type(message)
        assert decode(encode(message), union) == message

    check()


def test_no_two_kinds_of_message_have_one_tag():
    tags = [kind.__struct_config__.tag for kind in KINDS if kind.__struct_config__.tag is not None]

    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_message_that_crosses_the_broker_says_its_version(kind):
    parts = {
        part for union in (messages.ReportPart, messages.VerdictPart, SlotOrder, SlotWord) for part in get_args(union)
    }
    alone = kind.__struct_config__.tag is not None and kind not in parts

    @settings(max_examples=3, deadline=None)
    @given(any_of(kind))
    def check(message):
        said = json.loads(encode(message)).get("v")

        assert said == (VERSION if alone else None)

    check()


# ---------------------------------------------------------------- what is not a message


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([*KINDS, *UNIONS]))
def test_garbage_is_a_peers_error_and_nothing_else(body, kind):
    assume(not body.startswith(b"{"))  # which could, by a rare chance, be a message of no fields
    with pytest.raises(PeerError):
        decode(body, kind)


@settings(max_examples=200, deadline=None)
@given(JSON, st.sampled_from([*KINDS, *UNIONS]))
def test_json_of_something_else_is_read_or_is_a_peers_error(value, kind):
    try:
        decode(json.dumps(value).encode(), kind)
    except PeerError as error:
        assert "expected" in str(error)  # noqa: PT017  # either way is right here


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_message_is_read_or_is_a_peers_error(data):
    kind = data.draw(st.sampled_from(KINDS))
    body = bytearray(encode(data.draw(any_of(kind))))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(body[: data.draw(st.integers(0, len(body)))]), kind)
    except PeerError as error:
        assert "expected" in str(error)  # noqa: PT017  # either way is right here


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'"\\ud800"',
        b"[" * 100_000,
        b'{"type":"submit","requests":[{"id":"x","task":"x","data":{"a":' + b"[" * 100_000,
        b'{"type":"submit","requests":[{"id":"'
        + AN_ID.encode()
        + b'","task":"x","data":'
        + b'{"a":' * 5000
        + b"1"
        + b"}" * 5003,
        b'{"type":"submit","v":' + b"9" * 10_000 + b"}",
        b'{"type":"submit","v":"1","requests":[]}',
        b'{"type":"submit","requests":[]}',
        b'{"type":"nonsense"}',
        b'{"requests":[]}',
    ],
)
def test_what_cannot_be_read_is_unreadable(body):
    with pytest.raises(Unreadable, match="expected"):
        decode(body, Submit)
    with pytest.raises(Unreadable, match="expected"):
        decode(body, Query)


def test_the_text_names_the_message_and_the_path_of_what_is_wrong():
    body = b'{"type":"submit","requests":[{"id":"%s","task":"x","priority":"high"}]}' % AN_ID.encode()

    with pytest.raises(Unreadable, match=r"'submit'.*int.*str.*\$\.requests\[0\]\.priority"):
        decode(body, Submit)


def test_a_message_that_is_too_large_is_refused_before_it_is_read():
    body = encode(Submit(requests=[Request(id=AN_ID, task="x", data={"a": "x" * MAX_MESSAGE_BYTES})]))

    with pytest.raises(Unreadable, match="put large data into artifacts"):
        decode(body, Submit)


def test_a_message_of_the_greatest_size_is_read():
    message = Submit(requests=[Request(id=AN_ID, task="x", data={"a": ""})])
    filling = MAX_MESSAGE_BYTES - len(encode(message))
    message = Submit(requests=[Request(id=AN_ID, task="x", data={"a": "x" * filling})])

    assert decode(encode(message), Submit) == message
    with pytest.raises(Unreadable, match=str(MAX_MESSAGE_BYTES)):
        decode(encode(message) + b" ", Submit)


@pytest.mark.parametrize("count", [0, MAX_REQUESTS_IN_A_MESSAGE + 1])
def test_a_submit_carries_at_least_one_request_and_not_too_many(count):
    with pytest.raises(Unreadable, match="length"):
        decode(encode(Submit(requests=[Request(id=AN_ID, task="x")] * count)), Submit)


# ---------------------------------------------------------------- other versions


@pytest.mark.parametrize("kind", ENVELOPES, ids=lambda kind: kind.__name__)
def test_a_message_of_a_newer_version_is_named_as_such_even_if_all_else_is_other(kind):
    @settings(max_examples=3, deadline=None)
    @given(any_of(kind))
    def check(message):
        tag = kind.__struct_config__.tag
        for body in (
            {"type": tag, "v": VERSION + 1},
            {"type": "of the future", "v": VERSION + 1},
            {"v": 10**30, "requests": 7},
            json.loads(encode(message)) | {"v": VERSION + 1},
        ):
            with pytest.raises(NewerVersion, match="upgrade"):
                decode(json.dumps(body).encode(), kind)

    check()


@pytest.mark.parametrize("kind", ENVELOPES, ids=lambda kind: kind.__name__)
def test_a_message_that_says_no_version_is_of_ours(kind):
    @settings(max_examples=3, deadline=None)
    @given(any_of(kind))
    def check(message):
        body = json.loads(encode(message))
        del body["v"]

        assert decode(json.dumps(body).encode(), kind) == message

    check()


@settings(max_examples=100, deadline=None)
@given(st.one_of(any_of(Tickets), any_of(messages.Outcomes), any_of(messages.Verdict), any_of(Report)))
def test_fields_that_are_not_known_are_ignored_at_every_depth(message):
    def without_free_data(value):
        # What is free of a schema keeps what it is given: task data, artifact data, metadata, and maps by name.
        if isinstance(value, dict):
            free = ("data", "metadata", "tasks", "requires", "shared")
            return {key: {} if key in free else without_free_data(one) for key, one in value.items()}
        return [without_free_data(one) for one in value] if isinstance(value, list) else value

    body = without_free_data(json.loads(encode(message)))
    plain = decode(json.dumps(body).encode(), type(message))

    def add(value):
        if isinstance(value, dict):
            return {key: add(one) if one != {} else one for key, one in value.items()} | {"of_the_future": {"a": [1]}}
        return [add(one) for one in value] if isinstance(value, list) else value

    assert decode(json.dumps(add(body)).encode(), type(message)) == plain


# ---------------------------------------------------------------- what may stand in a field


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "a.deb",
        "foo_1.2-3~rc1+b2_amd64.changes",
        ".hidden",
        "a b",
        "x..y",
        "...",
        "d/e/f",
        "d/.x",
        "a=b,c@d:e",
        "..a",
    ],
)
def test_a_file_name_may_be_what_tools_name_files(name):
    assert _file(name).path == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a",
        "a/..",
        "a/../b",
        "./a",
        "a/.",
        "a/./b",
        "/a",
        "/",
        "a/",
        "a//b",
        "-a",
        "--output=x",
        "d/-a",
        " a",
        "d/ a",
        "a\n",
        "a\nb",
        "a\x00",
        "a\tb",
        "a\x7f",
        "a\\b",
        "a;b",
        "$a",
        "`a`",
        "a*",
        "é",
        "a\u202eb",
        "..\n",
        "../\n",
    ],
)
def test_a_file_name_that_could_lead_elsewhere_or_be_taken_for_something_else_is_refused(name):
    with pytest.raises(Unreadable, match=r"\$\.path"):
        _file(name)


def _file(name):
    return decode(json.dumps({"path": name, "size": 1, "sha256": "0" * 64}).encode(), FileEntry)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("./-a \n~"), max_size=8))
def test_no_file_name_leaves_its_folder(name):
    try:
        path = _file(name).path
    except PeerError:
        return
    parts = path.split("/")
    assert all(part not in ("", ".", "..") and part[0] not in "- " for part in parts)
    assert path.isprintable()


@pytest.mark.parametrize(
    "id_",
    ["", "x", AN_ID.upper(), AN_ID + "\n", AN_ID + "0", AN_ID[:-1], AN_ID.replace("-", ""), f" {AN_ID}", "../" + AN_ID],
)
def test_an_id_is_a_uuid_in_lower_case(id_):
    with pytest.raises(Unreadable, match=r"\$\.id"):
        decode(json.dumps({"id": id_, "task": "x"}).encode(), Request)


@pytest.mark.parametrize("sha256", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "0" * 64 + "\n"])
def test_a_sha256_is_64_digits_in_lower_case(sha256):
    with pytest.raises(Unreadable, match=r"\$\.sha256"):
        decode(json.dumps({"path": "a", "size": 1, "sha256": sha256}).encode(), FileEntry)


@pytest.mark.parametrize("name", ["", ".a", "-a", "a b", "a/b", "a#", "a*", "a\n", "é", "a" * 101])
def test_a_workers_name_is_safe_in_a_routing_key(name):
    body = {"type": "report", "worker": name, "epoch": "e", "seq": 1, "incarnation": 1, "parts": []}

    with pytest.raises(Unreadable, match=r"\$\.worker"):
        decode(json.dumps(body).encode(), Report)
    assert decode(json.dumps(body | {"worker": "host-1.example_x"}).encode(), Report).worker == "host-1.example_x"


@pytest.mark.parametrize("category", ["", "thing", "a:b:c", "A:b", "a:", "a:b\n"])
def test_a_category_has_two_words(category):
    with pytest.raises(Unreadable, match=r"\$\.category"):
        decode(json.dumps({"handle": "a", "category": category, "name": "a"}).encode(), Artifact)


@pytest.mark.parametrize("number", [0, -1, 2**63, 10**30])
def test_a_number_that_the_ledger_cannot_keep_is_unreadable(number):
    run = {"request": AN_ID, "attempt": number, "token": "t"}
    for body, kind in (
        (run, RunRef),
        (run | {"type": "claim", "metadata_version": 1}, Claim),
        (run | {"result": "success", "started": 1.0, "ended": 1.0}, Outcome),
        ({"type": "extends", "target": number}, Relation),
        ({"type": "list_artifacts", "ids": [number]}, ListArtifacts),
        ({"type": "list_requests", "before": number}, messages.ListRequests),
        ({"path": "a", "size": number or -1, "sha256": "0" * 64}, FileEntry),
    ):
        with pytest.raises(Unreadable, match="int"):
            decode(json.dumps(body).encode(), kind)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_time_is_a_finite_number(number):
    body = f'{{"request":"{AN_ID}","attempt":1,"token":"t","result":"success","started":{number},"ended":1}}'

    with pytest.raises(Unreadable):
        decode(body.encode(), Outcome)
