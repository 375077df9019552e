"""What each role may do on the broker: regular expressions over names, as commands or definitions to give it.

The least that a role needs. It rests on these: only named exchanges are written to; who may write to a name may bind
what has it, queue or exchange, to what he may read, so no lasting queue has an exchange's name, and no key of events or
logs is one that the direct exchanges know; exclusive queues are their connection's alone.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

from mqworker.topology import Topology

Role: TypeAlias = Literal["scheduler", "worker", "client", "observer"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
NOTHING: Final = "^$"
ANY: Final = ".*"
_REQUEST: Final = "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"  # what a worker's logs have as key
_EVENT: Final = r"^(request|worker)\..+$"


@dataclass(frozen=True, kw_only=True)
class TopicRights:
    """Say which routing keys may be written and bound at a topic exchange."""

    exchange: str
    write: str
    read: str


@dataclass(frozen=True, kw_only=True)
class Rights:
    """Say what RabbitMQ's permissions of one role are."""

    configure: str
    write: str
    read: str
    topics: tuple[TopicRights, ...]


def rights_of(role: Role, topology: Topology) -> Rights:
    """Return what a role needs, and nothing else."""
    t = topology
    events, logs = t.events, t.logs
    match role:
        case "scheduler":
            queues = [one.name for one in t.queues()]
            bound = [exchange for one in t.queues() for exchange, _ in one.bindings]
            return Rights(
                configure=_names(t, *(one.name for one in t.exchanges()), *queues, below=(t.work, t.report)),
                write=_names(
                    t,
                    # To write there: its probes go the way of what it hears.
                    *(t.work, t.verdict, t.events, t.rejected, t.report, t.submit, t.outcome, t.api),
                    *queues,  # ... and these to bind them
                    below=(t.work, t.report),
                    also=("amq.default",),  # answers
                ),
                read=_names(t, t.work, t.report, *bound, *queues, below=(t.report,)),
                topics=(TopicRights(exchange=events, write=_EVENT, read=NOTHING),),
            )
        case "worker":
            own = f"{t.prefix}.worker"
            return Rights(
                configure=_names(t, below=(own,)),
                write=_names(t, t.report, t.outcome, t.logs, t.rejected, below=(own,)),
                read=_names(t, t.verdict, below=(t.work, own)),
                topics=(TopicRights(exchange=logs, write=_REQUEST, read=NOTHING),),
            )
        case "client" | "observer":
            own = f"{t.prefix}.follow"
            writes = (t.submit, t.command, t.api) if role == "client" else (t.api,)
            return Rights(
                configure=_names(t, below=(own,)),
                write=_names(t, *writes, below=(own,)),
                read=_names(t, events, logs, below=(own,)),
                topics=tuple(TopicRights(exchange=one, write=NOTHING, read=ANY) for one in (events, logs)),
            )


def _names(topology: Topology, *names: str, below: Sequence[str] = (), also: Sequence[str] = ()) -> str:
    """Return a regular expression of names, of what begins with some and a dot, and of names without the prefix."""

    def bare(name: str) -> str:
        return name.removeprefix(f"{topology.prefix}.")

    parts = [*dict.fromkeys(_literal(bare(name)) for name in names)]
    whole = _one_of(parts) if parts else ""
    open_ended = rf"{_one_of([bare(name) for name in below])}\..+" if below else ""
    own = rf"{_literal(topology.prefix)}\.{_one_of([one for one in (whole, open_ended) if one])}"
    return f"^{_one_of([own, *map(_literal, also)])}$"


def _one_of(expressions: Sequence[str]) -> str:
    return expressions[0] if len(expressions) == 1 else f"({'|'.join(expressions)})"


def _literal(name: str) -> str:
    return name.replace(".", r"\.")  # nothing else that a prefix may have means anything to a regular expression


# ---------------------------------------------------------------- for rabbitmqctl


def commands(topology: Topology, vhost: str, users: Sequence[tuple[str, Role]]) -> Iterator[str]:
    """Give the lines of a shell that make users and give them their rights; rabbitmqctl asks for the passwords."""
    yield f"# rabbitmqctl {shlex.join(['add_vhost', vhost])}   (if it is not there yet)"
    given = [(user, role, rights_of(role, topology)) for user, role in users]
    for user, role, rights in given:
        yield f"# {role}"
        yield _ctl("add_user", user)
        yield _ctl("set_permissions", "-p", vhost, user, rights.configure, rights.write, rights.read)
    yield "# RabbitMQ 4.3 wants the exchanges there for these: run `mqworker topology declare` or a scheduler before"
    for user, _, rights in given:
        for topic in rights.topics:
            yield _ctl("set_topic_permissions", "-p", vhost, user, topic.exchange, topic.write, topic.read)


def _ctl(*words: str) -> str:
    return shlex.join(["rabbitmqctl", *words])


def definitions(
    topology: Topology, vhost: str, users: Sequence[tuple[str, Role]], *, with_users: bool = True
) -> dict[str, Any]:
    """Give what `rabbitmqctl import_definitions` reads; users come without a password, and cannot log in by one yet.

    `with_users`: those that are there already would lose their password by it.
    """
    given = [(user, rights_of(role, topology)) for user, role in users]
    made = [
        {"name": user, "password_hash": "", "hashing_algorithm": "rabbit_password_hashing_sha256", "tags": ""}
        for user, _ in users
    ]
    return {
        **({"users": made} if with_users else {}),
        "vhosts": [{"name": vhost}],
        "exchanges": [  # RabbitMQ 4.3 takes rights to topics only of exchanges that are there
            {
                "name": one.name,
                "vhost": vhost,
                "type": one.kind,
                "durable": True,
                "auto_delete": False,
                "internal": False,
                "arguments": {},
            }
            for one in topology.exchanges()
            if one.kind == "topic"
        ],
        "permissions": [
            {"user": user, "vhost": vhost, "configure": one.configure, "write": one.write, "read": one.read}
            for user, one in given
        ],
        "topic_permissions": [
            {"user": user, "vhost": vhost, "exchange": topic.exchange, "write": topic.write, "read": topic.read}
            for user, one in given
            for topic in one.topics
        ],
    }
