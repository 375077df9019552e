import pytest

from mqworker.topology import API_TTL_MS, CLASS_QUEUE_EXPIRES_MS, DELIVERY_LIMIT, Topology

POOL = Topology()
OTHER = Topology("farm.two")


def all_queues(topology):
    return [
        *topology.queues(),
        topology.class_queue("c1"),
        topology.report_queue("e1"),
        topology.worker_queue("w1", "e1"),
        topology.follower_queue("e1", ((topology.events, "request.#"),)),
    ]


def is_quorum(queue):
    return queue.arguments.get("x-queue-type") == "quorum"


@pytest.mark.parametrize("topology", [POOL, OTHER])
def test_every_name_carries_the_prefix_and_no_name_is_used_twice(topology):
    exchanges = [exchange.name for exchange in topology.exchanges()]
    queues = [queue.name for queue in all_queues(topology)]

    assert all(name.startswith(f"{topology.prefix}.") for name in (*exchanges, *queues))
    assert len(set(exchanges)) == len(exchanges)
    assert len(set(queues)) == len(queues)


def test_no_queue_has_the_name_of_an_exchange_since_who_may_write_there_could_bind_it():
    assert {exchange.name for exchange in POOL.exchanges()} & {queue.name for queue in all_queues(POOL)} == set()


def test_pools_of_two_prefixes_share_nothing():
    def names(topology):
        return {one.name for one in (*topology.exchanges(), *all_queues(topology))}

    assert names(POOL) & names(OTHER) == set()


def test_the_names_are_those_of_the_wire():
    assert {exchange.name: exchange.kind for exchange in POOL.exchanges()} == {
        "mqworker.submit": "direct",
        "mqworker.work": "direct",
        "mqworker.report": "direct",
        "mqworker.outcome": "direct",
        "mqworker.verdict": "direct",
        "mqworker.api": "direct",
        "mqworker.command": "direct",
        "mqworker.events": "topic",
        "mqworker.logs": "topic",
        "mqworker.rejected": "direct",
    }
    assert [queue.name for queue in all_queues(POOL)] == [
        "mqworker.queue.rejected",
        "mqworker.queue.submit",
        "mqworker.queue.outcome",
        "mqworker.queue.api",
        "mqworker.work.c1",
        "mqworker.report.e1",
        "mqworker.worker.w1.e1",
        "mqworker.follow.e1",
    ]


@pytest.mark.parametrize("topology", [POOL, OTHER])
def test_every_queue_is_bound_and_only_to_exchanges_of_its_pool(topology):
    exchanges = {exchange.name for exchange in topology.exchanges()}

    for queue in all_queues(topology):
        assert queue.bindings
        assert {exchange for exchange, _ in queue.bindings} <= exchanges


def test_what_is_published_reaches_its_queue():
    reached = {binding: queue.name for queue in all_queues(POOL) for binding in queue.bindings}

    for name in (POOL.submit, POOL.outcome, POOL.api, POOL.rejected):
        assert reached[name, name] == name.replace("mqworker.", "mqworker.queue.")
    assert reached[POOL.command, POOL.command] == POOL.api_queue().name
    assert reached[POOL.work, POOL.class_queue("c1").name] == "mqworker.work.c1"
    assert reached[POOL.report, POOL.report] == "mqworker.report.e1"
    assert reached[POOL.verdict, POOL.verdict_key("w1", "e1")] == "mqworker.worker.w1.e1"


def test_two_connections_of_one_worker_have_a_queue_and_a_key_each():
    first, second = POOL.worker_queue("w1", "e1"), POOL.worker_queue("w1", "e2")

    assert first.name != second.name
    assert first.bindings != second.bindings


def test_what_must_not_be_lost_and_what_all_declare_is_in_quorum_queues():
    assert [queue for queue in all_queues(POOL) if is_quorum(queue)] == [
        POOL.rejected_queue(),
        POOL.submit_queue(),
        POOL.outcome_queue(),
        POOL.api_queue(),
    ]
    assert all(is_quorum(queue) for queue in POOL.queues())


def test_quorum_queues_are_declared_as_every_broker_takes_them():
    for queue in filter(is_quorum, all_queues(POOL)):
        assert queue.durable  # else 406 ...
        assert not queue.exclusive  # ... here too
        assert queue.arguments.keys() <= {
            "x-queue-type",
            "x-delivery-limit",
            "x-dead-letter-exchange",
            "x-dead-letter-routing-key",
            "x-dead-letter-strategy",
            "x-overflow",
            "x-message-ttl",
        }
        # Said outright: 20 by default on 4.x, none on 3.10, and -1 there loses a message at its first requeue.
        assert queue.arguments["x-delivery-limit"] == DELIVERY_LIMIT > 20


def test_what_cannot_be_delivered_is_dead_lettered_at_least_once_to_a_queue_that_lasts():
    for queue in (POOL.submit_queue(), POOL.outcome_queue()):
        arguments = queue.arguments
        assert arguments["x-dead-letter-strategy"] == "at-least-once"
        assert arguments["x-overflow"] == "reject-publish"  # without it the broker silently does at most once
        target = (arguments["x-dead-letter-exchange"], arguments["x-dead-letter-routing-key"])
        assert target in POOL.rejected_queue().bindings
    assert "x-dead-letter-exchange" not in POOL.rejected_queue().arguments  # nothing goes in circles


def test_queues_that_do_not_last_are_exclusive_since_newer_brokers_deny_the_others():
    for queue in all_queues(POOL):
        assert queue.exclusive is not queue.durable


def test_classic_queues_carry_no_argument_that_some_broker_refuses():
    for queue in all_queues(POOL):
        if not is_quorum(queue):
            assert queue.arguments.keys() <= {"x-expires"}


def test_a_class_queue_lasts_through_a_restart_and_goes_when_nobody_has_used_it_for_a_day():
    queue = POOL.class_queue("c1")

    assert (queue.durable, queue.exclusive) == (True, False)
    assert queue.arguments == {"x-expires": CLASS_QUEUE_EXPIRES_MS}
    assert CLASS_QUEUE_EXPIRES_MS == 86_400_000


def test_questions_that_nobody_waits_for_any_more_are_dropped():
    assert POOL.api_queue().arguments["x-message-ttl"] == API_TTL_MS


def test_names_and_arguments_are_such_that_the_broker_takes_them():
    for queue in all_queues(Topology("p" * 50)):
        assert len(queue.name.encode()) <= 255
        assert all(len(key.encode()) <= 255 for _, key in queue.bindings)
        assert all(isinstance(value, (str, int)) for value in queue.arguments.values())


def test_events_have_keys_that_can_be_followed_by_task_and_by_state():
    assert POOL.request_event_key("sbuild", "success") == "request.sbuild.success"
    assert POOL.worker_event_key("online") == "worker.online"
