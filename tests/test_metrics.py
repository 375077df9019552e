import re
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mqworker.errors import SettingsError
from mqworker.metrics import Health, MetricsServer, SchedulerMetrics, WorkerMetrics

OTHER_UNITS = re.compile(r"_(ms|milliseconds|minutes|hours|kib|kb|mb|gb|percent|count|sum|bucket|total)$")


@pytest.fixture(params=[SchedulerMetrics, WorkerMetrics])
def metrics(request):
    return request.param(version="1.2.3")


@pytest.fixture
def serve():
    """Serve metrics on a free port; the health can be changed meanwhile."""
    servers = []

    def start(registry, health):
        servers.append(MetricsServer("127.0.0.1:0", registry=registry, health=lambda: health[0]))
        return servers[-1].port

    yield start
    for server in servers:
        server.close()


def fetch(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def own(registry):
    return [family for family in registry.collect() if not family.name.startswith(("process_", "python_"))]


# ---------------------------------------------------------------- names


def test_every_metric_is_ours_by_name_and_has_a_sentence_of_help(metrics):
    for family in own(metrics.registry):
        assert re.fullmatch(r"mqworker_[a-z]+(_[a-z]+)*", family.name)
        assert re.fullmatch(r"(1|[A-Z]).{8,}\.", family.documentation)


def test_names_follow_the_conventions_of_prometheus(metrics):
    """Base units, `_total` for counters and for nothing else (prometheus.io/docs/practices/naming)."""
    for family in own(metrics.registry):
        names = {sample.name for sample in family.samples}
        if family.type == "counter":  # its family has the name without the ending
            assert names <= {f"{family.name}_total", f"{family.name}_created"}
        assert not OTHER_UNITS.search(family.name), family.name
        if family.type == "histogram":
            assert family.documentation.startswith("How many ") or family.name.endswith(("_seconds", "_bytes"))


def test_no_label_can_have_as_many_values_as_there_are_requests_or_hosts(metrics):
    few = {"state", "status", "task", "event", "result", "source", "capability_class"}
    for collector in vars(metrics).values():
        assert set(getattr(collector, "_labelnames", ())) <= few


def test_durations_have_buckets_from_noops_to_builds_of_a_day():
    metrics = SchedulerMetrics(version="1.2.3")
    metrics.run_seconds.labels(task="noop", result="success").observe(0.01)
    bounds = [
        float(sample.labels["le"])
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "mqworker_request_run_seconds_bucket"
    ]

    assert bounds[0] <= 0.05
    assert bounds[-2] >= 24 * 3600


def test_two_processes_in_one_interpreter_do_not_share_their_numbers():
    one, two = SchedulerMetrics(version="1"), SchedulerMetrics(version="1")
    one.term.set(7)

    assert two.registry.get_sample_value("mqworker_scheduler_term") == 0


# ---------------------------------------------------------------- the pages


def test_the_page_shows_what_was_counted_and_the_build(serve, metrics):
    port = serve(metrics.registry, [Health(well=True, text="fine")])
    metrics.reconnects.inc(3)
    status, page = fetch(port, "/metrics")
    families = {family.name: family for family in text_string_to_metric_families(page)}

    assert status == 200
    assert families["mqworker_broker_connections_lost"].samples[0].value == 3
    [build] = families["mqworker_build_info"].samples
    assert build.labels["version"] == "1.2.3"
    assert build.labels["role"] in ("scheduler", "worker")
    assert "process_resident_memory_bytes" in families


def test_health_is_200_or_503_and_says_why(serve, metrics):
    health = [Health(well=True, text="worker anna")]
    port = serve(metrics.registry, health)
    assert fetch(port, "/healthz") == (200, "worker anna\n")
    health[0] = Health(well=False, text="no connection to the broker: größte Not")

    assert fetch(port, "/healthz") == (503, "no connection to the broker: größte Not\n")


@pytest.mark.parametrize("path", ["/", "/metrics/", "/healthz/x", "/etc/passwd"])
def test_other_pages_are_not_there_and_say_what_is(serve, metrics, path):
    status, page = fetch(serve(metrics.registry, [Health(well=True, text="")]), path)

    assert status == 404
    assert "/metrics and /healthz" in page


def test_a_scrape_says_nothing_on_the_terminal(serve, metrics, capfd):
    fetch(serve(metrics.registry, [Health(well=True, text="")]), "/metrics")

    assert capfd.readouterr() == ("", "")


def test_a_taken_address_is_a_setting_to_change_and_free_again_after_its_end(metrics):
    def listen(port):
        return MetricsServer(f"127.0.0.1:{port}", registry=metrics.registry, health=lambda: Health(well=True, text=""))

    first = listen(0)
    try:
        with pytest.raises(SettingsError, match=f"free address for metrics, got 127.0.0.1:{first.port}"):
            listen(first.port)
    finally:
        first.close()
    listen(first.port).close()


@pytest.mark.parametrize(
    "listen",
    ["", "9107", "localhost", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:99999", "127.0.0.1:²", "nowhere.invalid:1"],
)
def test_what_is_no_address_is_a_setting_to_change(metrics, listen):
    with pytest.raises(SettingsError, match="expected"):
        MetricsServer(listen, registry=metrics.registry, health=lambda: Health(well=True, text=""))
