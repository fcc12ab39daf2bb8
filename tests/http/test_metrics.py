"""`/metrics`: the text format, bounded labels, and what a real request leaves in it."""

from __future__ import annotations

import pytest
from libmesh_node.http.answers import Told
from libmesh_node.http.metrics import MOST_MODELS, Metrics
from libmesh_node.snapshot import Model, Peer, Process
from prometheus_client.parser import text_string_to_metric_families

from tests.http.conftest import Llama, Node, call, running_node, snapshot_of


def samples(text: str) -> dict[str, float]:
    """Each sample by its name and labels as written, if Prometheus' own parser reads the same."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation and family.type != "unknown" for family in families)
    assert sorted(sample.value for family in families for sample in family.samples) == sorted(found.values())
    return found


def scrape(metrics: Metrics, **changes: object) -> dict[str, float]:
    return samples(metrics.text(snapshot_of(**changes), {}, 0, {}, {}))


def model(name: str) -> Model:
    return Model(name=name, digest="", size_bytes=1, context_length=1)


def peer(name: str, state: str, path: str | None) -> Peer:
    return Peer(
        id=name,
        hostname=name,
        role="Serving",
        scope="worker",
        state=state,
        since_unix=0.0,
        version="1",
        vram_gb=1.0,
        models=(),
        serving=(),
        path=path,
        address="",
        rtt_ms=None,
    )


def test_requests_are_counted_by_endpoint_model_and_status() -> None:
    metrics = Metrics()
    for status in (200, 200, 503):
        metrics.answered("/v1/completions", status, 0.2, model="m", attempts=1)
    found = scrape(metrics)
    assert found['libmesh_requests_total{endpoint="/v1/completions",model="m",status="200"}'] == 2
    assert found['libmesh_requests_total{endpoint="/v1/completions",model="m",status="503"}'] == 1
    assert found['libmesh_request_seconds_bucket{endpoint="/v1/completions",le="0.1"}'] == 0
    assert found['libmesh_request_seconds_bucket{endpoint="/v1/completions",le="0.25"}'] == 3
    assert found['libmesh_request_seconds_bucket{endpoint="/v1/completions",le="+Inf"}'] == 3
    assert found['libmesh_request_seconds_count{endpoint="/v1/completions"}'] == 3


def test_retries_and_failovers_are_told_apart() -> None:
    metrics = Metrics()
    metrics.answered("/v1/completions", 200, 0.1, attempts=1)
    metrics.answered("/v1/completions", 200, 0.1, attempts=3)
    metrics.answered("/v1/completions", 502, 0.1, attempts=4)
    found = scrape(metrics)
    assert found["libmesh_retries_total"] == 5
    assert found["libmesh_failovers_total"] == 1


def test_streams_that_another_server_went_on_with_are_counted() -> None:
    metrics = Metrics()
    metrics.answered("/v1/completions", 200, 0.1, attempts=1, resumed=2)
    metrics.answered("/v1/completions", 200, 0.1, attempts=1)
    assert scrape(metrics)["libmesh_streams_resumed_total"] == 2


def test_lines_are_shown_by_model_also_the_empty_ones() -> None:
    found = samples(
        Metrics().text(snapshot_of(model("busy"), model("calm")), {}, 0, {"busy": 3, "gone": 1}, {})
    )
    assert found['libmesh_requests_queued{model="busy"}'] == 3
    assert found['libmesh_requests_queued{model="calm"}'] == 0
    assert found['libmesh_requests_queued{model="gone"}'] == 1


def test_labels_are_bounded_and_harmless() -> None:
    metrics = Metrics()
    for number in range(3 * MOST_MODELS):
        metrics.answered(f"/made/up/{number}", 404, 0.1, model=f'a "quoted"\\\n{number}')
    found = [name for name in scrape(metrics) if name.startswith("libmesh_requests_total")]
    assert len(found) == MOST_MODELS + 1
    assert all('endpoint="other"' in name for name in found)
    assert r'libmesh_requests_total{endpoint="other",model="a \"quoted\"\\\n7",status="404"}' in found


def test_speed_of_one_token_says_nothing() -> None:
    metrics = Metrics()
    metrics.generated("m", Told(completion=1, speed=1e6))
    assert 'libmesh_tokens_per_second_count{model="m"}' not in scrape(metrics)
    metrics.generated("m", Told(completion=10, prompt=4, cached=3, speed=50.0))
    found = scrape(metrics)
    assert found['libmesh_tokens_per_second_sum{model="m"}'] == 50
    assert found['libmesh_tokens_total{model="m",kind="completion"}'] == 11
    assert found['libmesh_tokens_total{model="m",kind="cached"}'] == 3


def test_snapshot_is_shown_as_gauges() -> None:
    found = scrape(
        Metrics(),
        peers=(peer("a", "alive", "direct"), peer("b", "alive", "direct"), peer("c", "dead", None)),
        processes=(Process(name="server", pid=1, port=1, model="m", status="ready", restarts=4),),
    )
    assert found['libmesh_peers{state="alive",path="direct"}'] == 2
    assert found['libmesh_peers{state="dead",path="none"}'] == 1
    assert found['libmesh_process_restarts_total{process="server"}'] == 4
    assert found['libmesh_info{version="0.0.1",node="me"}'] == 1


@pytest.mark.llama
def test_real_requests_leave_their_marks(llamas: dict[str, Llama]) -> None:
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 8}
    with running_node(llamas["tiny"].served()) as node:
        assert call(node.api_port, "POST", "/v1/completions", body)[0] == 200
        assert call(node.api_port, "POST", "/v1/completions", body | {"stream": True})[0] == 200
        status, headers, text = call(node.console_port, "GET", "/metrics")
        found = samples(text.decode())
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert found['libmesh_requests_total{endpoint="/v1/completions",model="tiny",status="200"}'] == 2
    assert found['libmesh_tokens_total{model="tiny",kind="completion"}'] == 16
    assert found['libmesh_first_token_seconds_count{model="tiny"}'] == 1
    assert found['libmesh_server_bytes_total{direction="received",path="local"}'] > 0
    assert found['libmesh_requests_in_flight{model="tiny",node="peer-a"}'] == 0
    assert found["libmesh_requests_waiting"] == 0
    assert found['libmesh_tunnel_bytes_total{direction="sent",path="relayed"}'] == 7


def test_metrics_are_not_shown_to_strangers_pages(two_models: Node) -> None:
    assert call(two_models.console_port, "GET", "/metrics", headers={"Host": "evil.example"})[0] == 403
