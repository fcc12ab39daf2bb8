"""What a balancer in front of nodes, and a list of models, are told of models that nobody serves at this moment."""

from __future__ import annotations

from dataclasses import replace

import pytest
from libmesh_node.http.api import is_healthy
from libmesh_node.snapshot import LocalModel, Model, NodeSnapshot, Server

from tests.http.conftest import call, get_json, running_node, snapshot_of

GONE = Model(name="m", digest="d", size_bytes=1, context_length=0)
SERVED = replace(GONE, servers=(Server(peer="a", base_url="http://127.0.0.1:1", local=False),))
ON_CALL = replace(GONE, coming=True)
ON_DISK = replace(GONE, standbys=1)


def here(status: str, *models: Model) -> NodeSnapshot:
    local = LocalModel(name="m", digest="d", size_bytes=1, status=status, named=True)
    return snapshot_of(*models, local_models=(local,))


@pytest.mark.parametrize(
    ("snapshot", "healthy"),
    [
        (snapshot_of(), False),
        (snapshot_of(GONE), False),
        (snapshot_of(replace(GONE, wanted=True)), False),
        (snapshot_of(SERVED), True),
        (here("loading", ON_CALL), False),
        (here("restarting", ON_CALL), False),
        (here("restarting", replace(ON_CALL, servers=SERVED.servers)), True),
        (here("loading", ON_CALL, replace(ON_CALL, name="other")), True),
        (here("asleep", ON_CALL), True),
        (snapshot_of(ON_CALL), True),
        (snapshot_of(ON_DISK), True),
    ],
)
def test_node_is_healthy_if_a_request_to_it_would_be_answered(snapshot: NodeSnapshot, healthy: bool) -> None:
    assert is_healthy(snapshot) is healthy


def test_health_while_all_models_sleep_is_good_and_counts_what_is_served() -> None:
    with running_node(ON_CALL) as node:
        assert get_json(node.api_port, "/health") == {"status": "ok", "models": 0}
        node.publish(SERVED)
        assert get_json(node.api_port, "/health") == {"status": "ok", "models": 1}
        node.publish(GONE)
        assert call(node.api_port, "GET", "/health")[0] == 503


def test_model_that_is_gone_is_not_listed_and_is_still_another_thing_than_an_unknown_one() -> None:
    listed = [
        replace(model, name=name)
        for name, model in (("served", SERVED), ("asleep", ON_CALL), ("on disk", ON_DISK))
    ]
    wanted = replace(GONE, name="wanted", wanted=True)
    with running_node(GONE, wanted, *listed) as node:
        found = get_json(node.api_port, "/v1/models")
        assert isinstance(found, dict)
        assert [entry["id"] for entry in found["data"]] == ["wanted", "served", "asleep", "on disk"]
        asked = {"prompt": "Hi"}
        assert call(node.api_port, "POST", "/v1/completions", asked | {"model": "m"})[0] == 503
        assert call(node.api_port, "POST", "/v1/completions", asked | {"model": "no"})[0] == 404
