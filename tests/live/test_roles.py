"""Each role with a real user of a real broker: it can do its work, and nothing of anybody else's."""

import asyncio
import json
import shlex
import subprocess
import sys
import uuid
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit, urlunsplit

import msgspec
import pika
import pytest
from pika.exceptions import ChannelClosedByBroker

from mqworker.amqp import declare
from mqworker.client import Client
from mqworker.errors import BrokerRefused, BrokerUnavailable, Forbidden, NotFound, Rejected
from mqworker.messages import (
    Claim,
    GetPool,
    Heartbeat,
    Hello,
    Outcome,
    Outcomes,
    Pause,
    Problem,
    Report,
    decode,
    encode,
    tag_of,
)
from mqworker.privatenode import INSIDE
from mqworker.rights import ROLES, commands, definitions, rights_of
from mqworker.topology import Topology

pytestmark = pytest.mark.live

PASSWORD = "secret"  # noqa: S105  # of users that a test makes
TOKEN = "f" * 32


class Users:
    """Users of a broker of our own, with the rights of roles in the test's own vhost."""

    def __init__(self, url, prefix, manage):
        self.url = url
        self.prefix = prefix
        self.topology = Topology(prefix)
        self._manage = manage
        self.names = []

    def make(self, role, name=None):
        """Make a user and return the URL with which it logs in."""
        user = f"{self.prefix}-{name or role}"
        rights = rights_of(role, self.topology)
        self._manage("PUT", f"users/{user}", {"password": PASSWORD, "tags": ""})
        self.names.append(user)
        given = {"configure": rights.configure, "write": rights.write, "read": rights.read}
        self._manage("PUT", f"permissions/{self.prefix}/{user}", given)
        for topic in rights.topics:  # RabbitMQ 4.3 asks for the exchanges first
            self._manage("PUT", f"exchanges/{self.prefix}/{topic.exchange}", {"type": "topic", "durable": True})
            self._manage("PUT", f"topic-permissions/{self.prefix}/{user}", msgspec.structs.asdict(_Topic.of(topic)))
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=f"{user}:{PASSWORD}@{parts.hostname}:{parts.port}"))

    def declare(self):
        """Make what lasts: a client without rights waits only for a few seconds until somebody has."""
        asyncio.run(declare(self.url, self.topology))

    def close(self):
        for name in self.names:
            self._manage("DELETE", f"users/{name}")

    def queues(self):
        """List the queues of the vhost, as only an administrator can."""
        return [queue["name"] for queue in self._manage("GET", f"queues/{self.prefix}")]


class _Topic(msgspec.Struct):
    exchange: str
    write: str
    read: str

    @classmethod
    def of(cls, topic):
        return cls(topic.exchange, topic.write, topic.read)


@pytest.fixture
def users(own_amqp_url, prefix, manage):
    made = Users(own_amqp_url, prefix, manage)
    yield made
    made.close()


@contextmanager
def channel_of(url):
    """Speak AMQP as an attacker does, who does not use our own programs."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel
    finally:
        connection.close()


def refusal(url, act):
    """Return the code with which the broker refuses an act, or None."""
    with channel_of(url) as channel:
        try:
            act(channel)
        except ChannelClosedByBroker as error:
            return error.reply_code
    return None


def publishing(exchange, key=None, body=b"{}", **properties):
    said = pika.BasicProperties(**properties)
    return lambda channel: channel.basic_publish(exchange, exchange if key is None else key, body, said)


@pytest.fixture
def farm(make_pool, users, prefix):
    """A scheduler and a worker, anna, each with a user of its own; the pool, and its client with a user likewise."""
    with ExitStack() as stack:
        users.declare()
        pool = make_pool(users.make("client"), prefix)
        pool.start("scheduler", "scheduler", MQWORKER_AMQP_URL=users.make("scheduler"), MQWORKER_ACCESS_OPERATORS="")
        pool.worker("anna", MQWORKER_AMQP_URL=users.make("worker", "anna"))
        client = stack.enter_context(pool.client())
        pool.await_workers(client, "anna")
        yield pool, client


# ---------------------------------------------------------------- what each may


def test_each_role_can_do_its_work(farm, users, runs, final, tmp_path):
    _, client = farm

    one = client.submit("noop", {"duration": 0.1, "log_lines": 2})
    followed = [*client.follow_logs(one)]
    assert followed[-1].state == "success"
    assert [view.state for view in final(client, one)] == ["success"]
    [view] = client.list(limit=1)
    assert view.submitter == f"{users.prefix}-client"
    running = client.submit("journal", runs.data)
    runs.await_starts(1)
    client.abort([running], "not wanted")
    assert [view.state for view in final(client, running)] == ["aborted"]
    note = tmp_path / "note"
    note.write_text("note")
    assert client.import_artifact("site:notes", "note", {}, {"note": note}).id

    with Client(users.make("observer"), prefix=users.prefix, timeout=20) as observer:
        assert observer.pool().workers == 1
        assert observer.workers()[0].user == f"{users.prefix}-anna"
        assert observer.status(one).state == "success"
        follow = observer.follow_events(quiet=60.0)
        client.submit("noop")
        assert next(events for events in follow if events)[0].request
        follow.close()
        for what in (lambda: observer.pause("worker", "anna"), lambda: observer.submit("noop")):
            with pytest.raises(Forbidden, match=r"a user of the broker who may send .*ACCESS_REFUSED"):
                what()


def test_a_role_that_may_not_declare_says_what_is_to_be_done_before_there_is_anything(users, prefix):
    worker = users.make("worker")
    refused = rf"user of the broker who may declare {prefix}\.\*, got one who may not; .*permissions --role scheduler"
    with pytest.raises(BrokerRefused, match=refused):
        asyncio.run(declare(worker, users.topology))
    client = Client(users.make("client"), prefix=prefix, timeout=1.0)
    with pytest.raises(BrokerUnavailable, match=r"no scheduler has set up .*mqworker topology declare"):
        client.open()

    asyncio.run(declare(users.make("scheduler"), users.topology))
    with client:
        pass
    with pytest.raises(BrokerRefused, match=refused):
        asyncio.run(declare(worker, users.topology))


# ---------------------------------------------------------------- what each may not


def own_queue(channel, name, *bindings, **arguments):
    channel.queue_declare(name, exclusive=True, arguments=arguments)
    for exchange, key in bindings:
        channel.queue_bind(name, exchange, key)


def writes(topology):
    names = [*(exchange.name for exchange in topology.exchanges()), ""]
    return {name: publishing(name, key=f"none-{uuid.uuid4().hex}") for name in names}


def takes(queues):
    """List ways to read, empty or spoil a queue."""
    return {
        f"{how} {queue}": act
        for queue in queues
        for how, act in {
            "get": lambda channel, queue=queue: channel.basic_get(queue, auto_ack=True),
            "consume": lambda channel, queue=queue: channel.basic_consume(queue, lambda *_: None),
            "purge": lambda channel, queue=queue: channel.queue_purge(queue),
            "delete": lambda channel, queue=queue: channel.queue_delete(queue),
        }.items()
    }


def test_a_worker_may_write_and_read_nothing_of_others(farm, users, eventually):
    pool, client = farm
    topology = users.topology
    mallory = users.make("worker", "mallory")
    eventually(lambda: client.workers()[0].queue, "anna has a queue")
    queues = users.queues()
    [annas] = [queue for queue in queues if queue.startswith(f"{topology.prefix}.worker.anna.")]
    [report] = [queue for queue in queues if queue.startswith(f"{topology.report}.")]
    epoch = annas.rpartition(".")[2]
    mine = f"{topology.prefix}.worker.mallory.{'0' * 16}"

    written = {name for name, act in writes(topology).items() if refusal(mallory, act) is None}
    assert written == {topology.report, topology.outcome, topology.rejected}
    key = str(uuid.uuid4())
    assert refusal(mallory, publishing(topology.logs, key=key)) is None
    assert refusal(mallory, publishing(topology.logs, key=topology.submit)) == 403, "no key but a request's"

    lasting = [queue.name for queue in topology.queues()]
    attacks = takes([*lasting, report, annas]) | {
        f"bind to {exchange}": lambda channel, exchange=exchange: own_queue(channel, mine, (exchange, exchange))
        for exchange in (topology.submit, topology.work, topology.report, topology.outcome, topology.rejected)
    }
    attacks |= {
        "bind to events": lambda channel: own_queue(channel, mine, (topology.events, "#")),
        "bind to logs": lambda channel: own_queue(channel, mine, (topology.logs, "#")),
        "bind to commands": lambda channel: own_queue(channel, mine, (topology.command, topology.command)),
        "bind anna's queue": lambda channel: channel.queue_bind(annas, topology.verdict, "k"),
        "unbind anna's queue": lambda channel: channel.queue_unbind(annas, topology.verdict, f"anna.{epoch}"),
        "take anna's name": lambda channel: channel.queue_declare(annas, exclusive=True),
        "dead letters to commands": lambda channel: own_queue(
            channel, mine, **{"x-dead-letter-exchange": topology.command}
        ),
        "bind exchanges": lambda channel: channel.exchange_bind(topology.outcome, topology.report, topology.report),
        "delete an exchange": lambda channel: channel.exchange_delete(topology.verdict),
        "make a ticket's queue": lambda channel: channel.queue_declare(f"{topology.work}.mine", durable=True),
        "delete the class's queue": lambda channel: channel.queue_delete(client.workers()[0].queue),
        "speak as anna": publishing(topology.report, user_id=f"{users.prefix}-anna"),
    }
    undone = {name: refusal(mallory, act) for name, act in attacks.items()}
    assert {name: code for name, code in undone.items() if code not in {403, 405, 406}} == {}
    assert undone["speak as anna"] == 406
    told = json.dumps(msgspec.to_builtins(client.workers())) + pool.log("scheduler") + pool.log("anna")
    assert epoch not in told, "who knows it could listen"
    assert client.submit("noop")


def test_a_client_may_submit_ask_command_and_follow_and_nothing_else(farm, users):
    _, client = farm
    topology = users.topology
    mallory = users.make("client", "mallory")
    mine = f"{topology.prefix}.follow.{'0' * 16}"
    theirs = users.queues()  # before there is one of mallory's own, which the broker removes only after its connection

    written = {name for name, act in writes(topology).items() if refusal(mallory, act) is None}
    assert written == {topology.submit, topology.command, topology.api}
    assert (
        refusal(mallory, lambda channel: own_queue(channel, mine, (topology.events, "#"), (topology.logs, "#"))) is None
    )
    private = [exchange.name for exchange in topology.exchanges() if exchange.kind == "direct"]
    attacks = takes(theirs) | {
        f"bind to {exchange}": lambda channel, exchange=exchange: own_queue(channel, mine, (exchange, exchange))
        for exchange in private
    }
    attacks |= {
        "unbind": lambda channel: channel.queue_unbind(topology.submit_queue().name, topology.submit, topology.submit),
        "delete": lambda channel: channel.exchange_delete(topology.submit),
    }
    undone = {name: refusal(mallory, act) for name, act in attacks.items()}
    assert {name: code for name, code in undone.items() if code not in {403, 405}} == {}
    assert client.submit("noop")


@pytest.mark.usefixtures("farm")
def test_an_observer_may_ask_and_follow_and_nothing_else(users):
    topology = users.topology
    mallory = users.make("observer", "mallory")
    mine = f"{topology.prefix}.follow.{'0' * 16}"

    written = {name for name, act in writes(topology).items() if refusal(mallory, act) is None}
    assert written == {topology.api}
    undone = {name: refusal(mallory, act) for name, act in takes(users.queues()).items()}
    assert {name: code for name, code in undone.items() if code not in {403, 405}} == {}
    assert refusal(mallory, lambda channel: own_queue(channel, mine, (topology.verdict, "k"))) == 403

    answer = asked(mallory, topology.api, Pause(kind="worker", name="anna"))
    problem = decode(answer, Problem)
    assert (problem.kind, f"by the exchange {topology.command}, got it by {topology.api}" in problem.text) == (
        "forbidden",
        True,
    ), problem


def asked(url, exchange, query):
    """Ask as another program does, and return the answer."""
    answers = []
    with channel_of(url) as channel:
        channel.basic_consume("amq.rabbitmq.reply-to", lambda *given: answers.append(given[3]), auto_ack=True)
        said = pika.BasicProperties(reply_to="amq.rabbitmq.reply-to")
        channel.basic_publish(exchange, exchange, encode(query), said)
        channel.connection.process_data_events(time_limit=30)
    return answers[0]


# ---------------------------------------------------------------- tricks


def test_the_scheduler_answers_no_queue_that_a_stranger_names(farm, users):
    _, client = farm
    topology = users.topology
    mallory = users.make("client", "mallory")
    [class_queue] = [queue for queue in users.queues() if queue.startswith(f"{topology.work}.")]
    for name in (topology.rejected_queue().name, class_queue, topology.outcome_queue().name):
        for exchange, body in ((topology.api, encode(GetPool())), (topology.submit, b"{"), (topology.api, b"{")):
            assert refusal(mallory, publishing(exchange, body=body, reply_to=name, headers={"CC": [name]})) is None

    assert client.submit("noop"), "all of that was read"
    for body in rejected(users, 3):
        assert body == b"{", "what could not be read was put aside, and no answer was written there"


def rejected(users, number):
    """Take what was put aside, as an operator does."""
    bodies = []
    with channel_of(users.url) as channel:
        for _, _, body in channel.consume(users.topology.rejected_queue().name, auto_ack=True, inactivity_timeout=30):
            bodies.append(body)
            if len(bodies) == number:
                return bodies
    return bodies


LED = {  # the exchanges to which each may bind others, and those others
    "client": (("submit", "command", "api"), ("events", "logs")),
    "observer": (("api",), ("events", "logs")),
    "worker": (("report", "outcome", "rejected"), ("verdict",)),
}


@pytest.mark.parametrize("role", LED)
def test_nobody_binds_a_lasting_queue_or_leads_anything_into_it(role, users):
    users.declare()
    topology = users.topology
    mallory = users.make(role, "mallory")
    exchanges = [*(exchange.name for exchange in topology.exchanges()), "amq.topic"]
    queues = [queue.name for queue in topology.queues()]

    def bound(bind, names):
        """Say what it could bind to what, with keys that everything has."""
        done = set()
        for name, exchange, key in ((one, other, key) for one in names for other in exchanges for key in ("#", one)):
            code = refusal(mallory, lambda channel, given=(name, exchange, key): bind(channel, *given))
            assert code in {None, 403}
            if code is None:
                done.add((name, exchange))
        return done

    assert bound(lambda channel, *given: channel.queue_bind(*given), queues) == set()
    own = [name for name in exchanges if name not in {topology.logs, topology.events}]
    to, what = ({f"{topology.prefix}.{name}" for name in names} for names in LED[role])
    assert bound(lambda channel, *given: channel.exchange_bind(*given), own) == {(a, b) for a in to for b in what}

    with channel_of(users.url) as channel:
        for exchange, key in (
            (topology.events, topology.request_event_key("noop", "success")),
            (topology.events, topology.worker_event_key("online")),
            (topology.logs, str(uuid.uuid4())),
            (topology.verdict, topology.verdict_key("anna", "e")),
        ):
            channel.basic_publish(exchange, key, b"{}")
        for queue in queues:  # what is confirmed is in its queues
            assert channel.queue_declare(queue, passive=True).method.message_count == 0


# ---------------------------------------------------------------- names of workers


def report(name, epoch, *parts, seq=1):
    return Report(worker=name, epoch=epoch, seq=seq, incarnation=10**6, parts=list(parts))


def say(url, topology, message, **properties):
    exchange = topology.outcome if isinstance(message, Outcomes) else topology.report
    given = {"type": tag_of(message), **properties}
    assert refusal(url, publishing(exchange, body=encode(message), **given)) is None


def test_what_is_said_in_another_workers_name_counts_for_nothing(farm, users, runs, final):
    pool, client = farm
    topology = users.topology
    mallory = users.make("worker", "mallory")
    running = client.submit("journal", runs.data)
    runs.await_starts(1)
    [anna] = client.workers()
    [run] = anna.running
    hello = Hello(
        host="h",
        slots=1,
        tasks={},
        metadata={},
        metadata_version=1,
        store="none",
        version="0",
    )
    beat = Heartbeat(queue=None, assigned=None, slots=0, running=[], claiming=[], unsettled=[])
    claim = Claim(request=running, attempt=1, token=TOKEN, metadata_version=1)
    outcome = Outcome(request=running, attempt=1, token=TOKEN, result="success", started=1.0, ended=2.0)
    epoch = "0" * 16
    user = f"{users.prefix}-mallory"

    for named in ({"user_id": user}, {}):  # who does not say who it is, is nobody
        say(mallory, topology, report("anna", epoch, hello, beat, claim), **named)
        say(mallory, topology, Outcomes(worker="anna", epoch=epoch, outcomes=[outcome]), **named)
    with channel_of(users.url) as channel:
        put_aside = []
        for _, properties, body in channel.consume(
            topology.rejected_queue().name, auto_ack=True, inactivity_timeout=30
        ):
            put_aside.append((properties.headers["x-mqworker-reason"], properties.headers.get("x-mqworker-user"), body))
            if len(put_aside) == 4:
                break
    assert all(f"from the broker's user {users.prefix}-anna" in reason for reason, _, _ in put_aside)
    assert [who for _, who, _ in put_aside].count(user) == 2
    assert client.status(running).state == "running"
    assert client.workers()[0].host == anna.host
    assert "token" not in run.__struct_fields__, "nobody is told what would let him speak for the run"

    runs.open()
    assert [view.state for view in final(client, running)] == ["success"]
    assert "impostor" in pool.log("scheduler")


def test_an_impostor_is_told_and_a_name_can_be_given_to_another_user(make_pool, users, prefix, eventually, final):
    users.declare()
    pool = make_pool(users.make("client"), prefix)
    with ExitStack() as stack:
        operators = f"{prefix}-client"
        pool.start(
            "scheduler", "scheduler", MQWORKER_AMQP_URL=users.make("scheduler"), MQWORKER_ACCESS_OPERATORS=operators
        )
        client = stack.enter_context(pool.client())
        first, second = users.make("worker", "first"), users.make("worker", "second")
        pool.worker("anna", MQWORKER_AMQP_URL=first)
        pool.await_workers(client, "anna")
        pool.end("anna")
        pool.worker("anna", MQWORKER_AMQP_URL=second)
        eventually(lambda: f"from the broker's user {prefix}-first" in pool.log("anna"), "the impostor is told")
        eventually(lambda: client.workers()[0].state == "offline", "it has not taken the name")
        assert client.workers()[0].user == f"{prefix}-first"

        client.forget_worker("anna", user=f"{prefix}-second")
        pool.await_workers(client, "anna")
        assert client.workers()[0].user == f"{prefix}-second"
        assert [view.state for view in final(client, client.submit("noop"))] == ["success"]
        client.forget_worker("anna")
        with pytest.raises(NotFound, match="name that is a user's, got nobody"):
            client.forget_worker("nobody")


# ---------------------------------------------------------------- whose requests


def test_who_may_command_whose_request_and_submit_into_which_group(make_pool, users, prefix):
    urls = [users.make("client", name) for name in ("chief", "anna", "bert")]
    users.declare()
    pool = make_pool(users.make("scheduler"), prefix)
    groups = {"release": [f"{prefix}-anna", f"{prefix}-bert"], "private": [f"{prefix}-anna"]}
    access = {"MQWORKER_ACCESS_GROUPS": json.dumps(groups), "MQWORKER_ACCESS_OPERATORS": f"{prefix}-chief"}
    pool.start("scheduler", "scheduler", **access)
    with ExitStack() as stack:
        operator, anna, bert = (stack.enter_context(Client(url, prefix=prefix, timeout=60.0)) for url in urls)
        hers, shared, private = (anna.submit("noop", group=group) for group in ("default", "release", "private"))
        assert bert.status(hers).submitter == f"{prefix}-anna", "everybody may look"

        with pytest.raises(Rejected, match=r"into the group private from one of its members"):
            bert.submit("noop", group="private")
        with pytest.raises(Forbidden, match=rf"not on {hers}.*the other 1 are being stopped"):
            bert.abort([hers, shared], "not wanted")
        assert [view.state for view in anna.wait([shared])] == ["aborted"]
        refused = {}
        assert bert.reprioritise([hers, private], 5, refused=refused) == []
        assert set(refused) == {hers, private}
        with pytest.raises(Forbidden, match="expected a command on a request"):
            bert.retry(private)
        again = bert.retry(shared)
        assert bert.status(again).submitter == f"{prefix}-bert"
        for command in (
            lambda: bert.pause("group", "default"),
            lambda: bert.resume("group", "default"),
            bert.refresh_workers,
            lambda: bert.forget_worker("w"),
        ):
            with pytest.raises(Forbidden, match="from an operator, got it from the broker's user"):
                command()
        assert bert.pauses() == []
        done = subprocess.run(
            [sys.executable, "-P", "-m", "mqworker", "abort", "--task", "noop", "--yes"],
            env={**pool.environment, "MQWORKER_AMQP_URL": urls[2]},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert "1 request aborted" in done.stdout
        assert f"request {private} is left alone: expected a command on a request of the broker's user" in done.stderr
        assert "2 requests of others left alone" in done.stderr

        assert anna.reprioritise([hers], 5)[0].request.priority == 5
        assert operator.pause("group", "default")
        assert operator.abort([hers], "not wanted")[0].state == "aborted"


# ---------------------------------------------------------------- rabbitmqctl


def test_what_is_printed_is_what_rabbitmqctl_takes(node_to_hurt):
    topology = Topology("builds.v2")
    node = node_to_hurt
    vhost = f"v{uuid.uuid4().hex[:8]}"
    users = [(f"{vhost}-{role}", role) for role in ROLES]
    (node.directory / "given.json").write_text(json.dumps(definitions(topology, vhost, users)))

    node.ctl("import_definitions", f"{node.directory if node.root is None else INSIDE}/given.json")
    first = rights_in(node, vhost)
    assert {row["user"] for row in first[0]} == {user for user, _ in users}
    node.ctl("clear_permissions", "-p", vhost, users[0][0])
    for line in commands(topology, vhost, users):
        words = shlex.split(line, comments=True)
        if words and words[1] != "add_user":  # they are there
            node.ctl(*words[1:])

    assert rights_in(node, vhost) == first
    node.ctl("delete_vhost", vhost)
    for user, _ in users:
        node.ctl("delete_user", user)


def rights_in(node, vhost):
    def listed(what):
        rows = json.loads(node.ctl(f"list_{what}", "-p", vhost, "--formatter", "json"))
        return sorted(rows, key=lambda row: (row["user"], row.get("exchange", "")))

    return listed("permissions"), listed("topic_permissions")
