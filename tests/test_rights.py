"""The rights of each role, as what its regular expressions match."""

import json
import re
import shlex

import pytest

from mqworker.rights import ROLES, commands, definitions, rights_of
from mqworker.topology import Topology

POOL = Topology("mq.w")
OTHER = Topology("mq-w")
EXCHANGES = [exchange.name for exchange in POOL.exchanges()]
LASTING = [queue.name for queue in POOL.queues()]
OWN = [
    *LASTING,
    POOL.class_queue("1-1").name,
    POOL.report_queue("e").name,
    POOL.worker_queue("anna", "e").name,
    POOL.follower_queue("e", ()).name,
]
NAMES = [*EXCHANGES, *OWN, "amq.default", "amq.topic", "amq.rabbitmq.trace", "", "x"]
STRANGE = [
    *(exchange.name for exchange in OTHER.exchanges()),
    OTHER.worker_queue("anna", "e").name,
    "mqxw.submit",
    "mq.w",
    "mq.w.submit.more",
    "mq.w.submitted",
    "xmq.w.submit",
    "mq.w.work.",
    "mq.w.queue.more",
    "mq.w.queue-submit",
    "mq.w.worker.",
]


def matched(expression, names=NAMES):
    return {name.removeprefix("mq.w.") for name in names if re.search(expression, name)}


@pytest.mark.parametrize(
    ("role", "configure", "write", "read"),
    [
        (
            "worker",
            {"worker.anna.e"},
            {"report", "outcome", "logs", "rejected", "worker.anna.e"},
            {"verdict", "work.1-1", "worker.anna.e"},
        ),
        ("client", {"follow.e"}, {"submit", "command", "api", "follow.e"}, {"events", "logs", "follow.e"}),
        ("observer", {"follow.e"}, {"api", "follow.e"}, {"events", "logs", "follow.e"}),
        (
            "scheduler",
            {name.removeprefix("mq.w.") for name in [*EXCHANGES, *LASTING]} | {"work.1-1", "report.e"},
            {
                *("work", "verdict", "events", "rejected", "report", "work.1-1", "report.e", "amq.default"),
                *("submit", "outcome", "api"),
                *("queue.rejected", "queue.submit", "queue.outcome", "queue.api"),
            },
            {
                *("work", "command", "rejected", "submit", "outcome", "api", "report", "report.e"),
                *("queue.rejected", "queue.submit", "queue.outcome", "queue.api"),
            },
        ),
    ],
)
def test_a_role_may_do_what_it_needs_and_nothing_else(role, configure, write, read):
    rights = rights_of(role, POOL)

    assert (matched(rights.configure), matched(rights.write), matched(rights.read)) == (configure, write, read)
    for expression in (rights.configure, rights.write, rights.read):
        assert matched(expression, STRANGE) == set(), expression


def test_keys_of_topics_are_what_is_sent_there():
    def allowed(role, exchange, how, key):
        [topic] = [topic for topic in rights_of(role, POOL).topics if topic.exchange == exchange]
        return bool(re.search(getattr(topic, how), key))

    request = "00000000-0000-4000-8000-000000000001"
    assert allowed("worker", POOL.logs, "write", request)
    assert not allowed("worker", POOL.logs, "write", POOL.submit)
    assert not allowed("worker", POOL.logs, "read", "#")
    assert allowed("scheduler", POOL.events, "write", POOL.request_event_key("noop", "success"))
    assert allowed("scheduler", POOL.events, "write", POOL.worker_event_key("impostor"))
    for role in ("client", "observer"):
        assert allowed(role, POOL.events, "read", "#")
        assert not allowed(role, POOL.events, "write", POOL.worker_event_key("online"))
        assert not allowed(role, POOL.logs, "write", request)


def test_commands_and_definitions_say_the_same():
    users = [(f"the {role}", role) for role in ROLES]
    given = definitions(POOL, "a b", users)
    lines = [shlex.split(line, comments=True) for line in commands(POOL, "a b", users)]

    said = [line[2:] for line in lines if line[1:2] == ["set_permissions"]]
    assert said == [
        ["-p", row["vhost"], row["user"], row["configure"], row["write"], row["read"]] for row in given["permissions"]
    ]
    said = [line[2:] for line in lines if line[1:2] == ["set_topic_permissions"]]
    assert said == [
        ["-p", row["vhost"], row["user"], row["exchange"], row["write"], row["read"]]
        for row in given["topic_permissions"]
    ]
    assert {row["exchange"] for row in given["topic_permissions"]} == {row["name"] for row in given["exchanges"]}
    assert [line[2] for line in lines if line[1:2] == ["add_user"]] == [user["name"] for user in given["users"]]
    assert "password" not in json.dumps(given).replace("password_hash", "").replace("rabbit_password", "")
    assert "users" not in definitions(POOL, "a b", users, with_users=False)
