"""Messages that are well formed, and meant to hurt: each returns the bytes of one."""

import msgspec

from tests.hostile.generate import SCHEMAS, TASKS, an_id

LATE = 2**63 - 1
MANY = 3000


def _submit(*requests):
    return msgspec.json.encode({"type": "submit", "v": 1, "requests": list(requests)})


def _request(house, **more):
    return {"id": an_id(house.random), "task": house.random.choice(TASKS[:6]), "data": {"arch": "amd64"}, **more}


def a_circle(house):
    ids = [f"11111111-0000-4000-8000-{number:012x}" for number in range(300)]
    return _submit(
        *(
            {"id": one, "task": "sim0", "after": [{"request": ids[(number + step) % 300]} for step in range(1, 60)]}
            for number, one in enumerate(ids)
        )
    )


def a_chain(house):
    start = house.random.randrange(10**9)
    ids = [f"22222222-{start % 65536:04x}-4000-8000-{start + number:012x}" for number in range(400)]
    return _submit(
        *(
            {"id": one, "task": "sim0", "after": [{"request": before}] if before else [], "not_before": 2e9}
            for one, before in zip(ids, [None, *ids], strict=False)
        )
    )


def itself(house):
    one = an_id(house.random)
    return _submit(
        {
            "id": one,
            "task": "sim0",
            "after": [{"request": one}],
            "take": [{"into": "/a", "request": one, "category": "a:b"}],
        }
    )


def a_large_request(house):
    return _submit(_request(house, data={"x": "y" * (1024 * 1024 + 1)}))


def almost_too_large(house):
    return _submit(_request(house, data={"arch": "amd64", "x": "\\" * (400 * 1024)}))


def a_schema(house):
    return _submit(*(_request(house, requires=one) for one in SCHEMAS))


def many_inputs(house):
    return _submit(
        _request(house, data={"input": list(range(1, 5000))}),
        _request(house, data={"input": {"a": 1}}),
        _request(house, data={"input": 2**70}),
    )


def deep(house):
    return _submit(_request(house)).replace(b'"amd64"', b"[" * 900 + b"]" * 900)


def deep_enough(house):
    return _submit(_request(house)).replace(b'"amd64"', b"[" * 48 + b"]" * 48)


def a_deep_place(house):
    return _submit(_request(house, take=[{"into": "/a" * 100, "request": an_id(house.random), "category": "a:b"}]))


def different_tasks(house):
    return _submit(
        *(
            _request(house, data={"arch": f"arch{house.random.randrange(10**9)}", "mem": number})
            for number in range(100)
        )
    )


def _report(worker, *parts, incarnation=1, seq=1, epoch="e1"):
    return msgspec.json.encode(
        {
            "type": "report",
            "v": 1,
            "worker": worker,
            "epoch": epoch,
            "seq": seq,
            "incarnation": incarnation,
            "parts": list(parts),
        }
    )


def _hello(**more):
    return {
        "type": "hello",
        "host": "h",
        "slots": 1,
        "tasks": dict.fromkeys(TASKS[:6]),
        "metadata": {},
        "metadata_version": 1,
        "store": "store",
        "version": "1",
        **more,
    }


def _beat(**more):
    return {
        "type": "heartbeat",
        "queue": None,
        "assigned": None,
        "slots": 1,
        "running": [],
        "claiming": [],
        "unsettled": [],
        **more,
    }


def _runs(number):
    return [
        {"request": f"33333333-0000-4000-8000-{one:012x}", "attempt": LATE, "token": f"t{one}"} for one in range(number)
    ]


def a_number_that_nobody_reaches(house):
    return _report(house.random.choice(["anna", "carl"]), _beat(), incarnation=2**62, seq=LATE)


def many_runs_of_others(house):
    runs = _runs(MANY)
    return _report(
        "carl",
        _hello(),
        _beat(running=[{**one, "since": 0.0} for one in runs], claiming=runs, unsettled=runs),
        seq=house.random.randrange(10**9),
    )


def all_slots_there_are(house):
    return _report(
        "dora",
        _hello(slots=10_000),
        _beat(slots=10_000, queue="mqworker.queue.submit", assigned=house.random.choice(house.known["queue"])),
        seq=house.random.randrange(10**9),
    )


def large_metadata(house):
    metadata = {f"k{one}": "v" * 1000 for one in range(house.random.choice([1200, 500]))}
    return _report("emil", _hello(metadata=metadata), seq=house.random.randrange(10**9))


def many_keys(house):
    start = house.random.randrange(10**9)
    metadata = {f"{start}-{one}": {f"{start}-{one}": one} for one in range(5000)}
    return _report("emil", _hello(metadata=metadata), seq=house.random.randrange(10**9))


def many_tasks(house):
    return _report(
        "emil",
        _hello(tasks={f"task{one}": one for one in range(5000)}, denied=[f"d{one}" for one in range(5000)]),
        seq=house.random.randrange(10**9),
    )


def a_new_worker(house):
    one = house.random.randrange(10**9)
    return _report(f"w{one}", _hello(metadata={"arch": f"arch{one}", "host": str(one), "free": one}), _beat())


def refusals(house):
    """Refuse again and again, each time with other metadata."""
    version = house.random.randrange(10**9)
    parts = [
        {"type": "refusal", "request": one, "attempt": 1, "token": "t", "reason": "no", "metadata_version": version}
        for one in house.known["id"][:100]
    ]
    return _report(
        house.random.choice(["anna", "carl"]),
        _hello(metadata_version=version, metadata={"arch": "amd64", "mem": 9}),
        *parts,
        seq=house.random.randrange(10**9),
    )


def claims_of_what_was_never_offered(house):
    parts = [
        {"type": "claim", "request": one, "attempt": 1, "token": f"c{number}", "metadata_version": 1}
        for number, one in enumerate(house.known["id"])
    ]
    return _report("carl", _hello(), *parts, seq=house.random.randrange(10**9))


def a_probe(house):
    return msgspec.json.encode({"type": "probe", "v": 1, "term": 1, "number": house.random.choice([0, 1, 5, LATE])})


def _outcome(request, artifacts, **more):
    return {
        "request": request,
        "attempt": 1,
        "token": "t",
        "result": "success",
        "started": 0.0,
        "ended": 1.0,
        "artifacts": artifacts,
        **more,
    }


def _outcomes(*outcomes):
    return msgspec.json.encode(
        {"type": "outcomes", "v": 1, "worker": "carl", "epoch": "e1", "outcomes": list(outcomes)}
    )


def many_artifacts(house):
    artifacts = [{"handle": f"h{one}", "category": "a:b", "name": "n"} for one in range(10_000)]
    return _outcomes(
        _outcome(house.random.choice(house.known["id"]), artifacts, token=house.random.choice(house.known["token"]))
    )


def the_same_artifact_often(house):
    artifacts = [
        {"handle": "h", "category": "a:b", "name": "n", "relations": [{"type": "extends", "target": "h"}] * 1000}
    ] * 10
    return _outcomes(
        _outcome(house.random.choice(house.known["id"]), artifacts, token=house.random.choice(house.known["token"]))
    )


def many_relations(house):
    relations = [{"type": "extends", "target": one} for one in range(1, 10_000)]
    return _outcomes(
        _outcome(
            house.random.choice(house.known["id"]),
            [{"handle": "h", "category": "a:b", "name": "n", "relations": relations}],
        )
    )


def what_is_not_in_the_store(house):
    files = [{"path": "a", "size": LATE, "sha256": "f" * 64}] * 100
    return _outcomes(
        _outcome(
            house.random.choice(house.known["id"]),
            [{"handle": "h", "category": "a:b", "name": "n", "files": files}],
            token=house.random.choice(house.known["token"]),
        )
    )


def a_contradiction(house):
    return _outcomes(
        *(
            _outcome(
                one,
                [],
                result=result,
                again=True,
                reason={"text": "x" * 100_000, "status": "success", "exit_code": 10**30},
                token=token,
            )
            for one, result, token in zip(
                house.known["id"], ["success", "aborted", "lost", "handed_back"] * 5, house.known["token"], strict=False
            )
        )
    )


def _query(kind, **more):
    return msgspec.json.encode({"type": kind, "v": 1, **more})


def everything(house):
    return house.random.choice(
        [
            _query("list_requests", limit=10_000),
            _query("list_requests", states=["pending"] * 100, submitted_before=1e308, limit=10_000),
            _query("count_requests", task="x\x1b[2J"),
            _query("list_workers", limit=10_000),
            _query("list_artifacts", limit=10_000, ids=list(range(1, 10_000))),
            _query("get_capabilities", limit=10_000),
            _query("get_requests", ids=["00000000"] * 1000),
            _query("get_requests", ids=house.known["id"]),
            _query("refresh_workers", names=[f"n{one}" for one in range(10_000)]),
            _query("explain", task="sim0", data={"arch": "amd64"}, requires=house.random.choice(SCHEMAS)),
        ]
    )


def abort_all(house):
    return _query("abort_requests", ids=house.known["id"], reason="\x1b[31mno\x00"[:5])


def move_all(house):
    return _query("reprioritise", ids=house.known["id"], priority=house.random.choice([-1000, 1000]))


def import_much(house):
    artifact = {
        "handle": "h",
        "category": "a:b",
        "name": "n",
        "data": {"x": "y" * house.random.choice([10, 3_000_000])},
    }
    return _query("import_artifact", key=an_id(house.random), artifact=artifact, store="store")


def _verdict(*parts, term=1):
    return msgspec.json.encode({"type": "verdict", "v": 1, "term": term, "parts": list(parts)})


def the_last_term(house):
    return _verdict({"type": "assign", "queue": "mqworker.work.1-1"}, term=house.random.choice([LATE, 2]))


def eat_the_submissions(house):
    queue = house.random.choice(
        ["mqworker.queue.submit", "mqworker.work.submit", "other.work.1-1", "mqworker.work.1-1.x", "mqworker.report"]
    )
    return _verdict({"type": "assign", "queue": queue})


def answers_to_nothing(house):
    run = {
        "request": house.random.choice(house.known["id"]),
        "attempt": 1,
        "token": house.random.choice(["../../x", "t", "anna.1.1"]),
    }
    return _verdict(
        *(
            {"type": "granted", **run, "lease": 1e12, "inputs": []},
            {"type": "void", **run, "reason": "r"},
            {"type": "abort", **run, "reason": "r" * 10_000},
            {"type": "recorded", **run, "status": "recorded"},
            {"type": "alive", "seq": LATE, "void": [run] * 100},
            {"type": "introduce"},
        )
    )


def far_terms(house):
    return msgspec.json.encode(
        {"type": "tickets", "v": 1, "term": LATE, "tickets": [{"attempt": LATE, "request": _request(house, lease=5)}]}
    )


def an_end_with_much(house):
    artifacts = [
        {"handle": f"h{one}", "category": "a:b", "name": "n", "data": {"x": "y" * 1000}} for one in range(5000)
    ]
    return msgspec.json.encode({"type": "slot_ended", "result": "success", "artifacts": artifacts})


def much_output(house):
    return msgspec.json.encode({"type": "slot_output", "text": "\x1b[2J" * 500_000})


def a_line_without_an_end(house):
    return b"[" * (1024 * 1024)


def strange_progress(house):
    return house.random.choice(
        [
            msgspec.json.encode({"type": "slot_progress", "stage": "s" * 100_000, "fraction": 1e308}),
            msgspec.json.encode({"type": "slot_progress", "stage": "", "fraction": -1}),
            msgspec.json.encode({"type": "slot_ended", "result": "error", "reason": {"text": "x" * 1_000_000}}),
        ]
    )


ATTACKS = {
    "submit": [
        a_circle,
        a_chain,
        itself,
        a_large_request,
        almost_too_large,
        a_schema,
        many_inputs,
        deep,
        deep_enough,
        a_deep_place,
        different_tasks,
    ],
    "report": [
        a_number_that_nobody_reaches,
        many_runs_of_others,
        all_slots_there_are,
        large_metadata,
        many_keys,
        many_tasks,
        a_new_worker,
        refusals,
        claims_of_what_was_never_offered,
        a_probe,
    ],
    "outcome": [many_artifacts, the_same_artifact_often, many_relations, what_is_not_in_the_store, a_contradiction],
    "api": [everything, abort_all, move_all, import_much],
    "ticket": [far_terms],
    "verdict": [the_last_term, eat_the_submissions, answers_to_nothing],
    "slot": [an_end_with_much, much_output, a_line_without_an_end, strange_progress],
}
