"""What `/api/status` and `libmesh-node status` tell of a real mesh."""

from __future__ import annotations

import json
import time

import httpx
import pytest

from tests.node.conftest import Pair
from tests.node.nodes import PATIENCE, chat, peer

pytestmark = pytest.mark.llama

FIRST_MESH = {
    "node_id", "token", "node_status", "is_host", "is_client", "llama_ready", "model_name", "api_port",
    "my_vram_gb", "model_size_gb", "peers", "mesh_models", "mesh_id", "version",
}  # fmt: skip
"""The fields that the first mesh had, under their names."""

FIRST_MESH_PEER = {"id", "role", "models", "vram_gb", "serving", "version"}

OURS_PEER = {"path", "rtt_ms", "state", "since"}


def test_serving_node_tells_of_itself(pair: Pair) -> None:
    status = pair.server.status()
    assert set(status) >= FIRST_MESH
    assert status["node_status"] == "Serving"
    assert (status["is_host"], status["is_client"], status["llama_ready"]) == (True, False, True)
    assert status["model_name"] == "demo"
    assert status["api_port"] == pair.server.api_port
    assert status["my_vram_gb"] > 0
    assert status["token"] == pair.machine.invite_file.read_text().strip()
    (model,) = status["mesh_models"]
    assert model == {"name": "demo", "status": "warm", "node_count": 1, "size_gb": model["size_gb"]}
    assert 0.001 < model["size_gb"] < 0.003
    (process,) = status["processes"]
    assert (process["model"], process["status"], process["restarts"]) == ("demo", "ready", 0)
    assert process["pid"] in {child.pid for child in pair.server.note_family()}


def test_client_tells_of_the_server(pair: Pair) -> None:
    status = pair.client.status()
    assert set(status) >= FIRST_MESH
    assert (status["node_status"], status["is_client"], status["llama_ready"]) == ("Client", True, False)
    assert status["processes"] == []
    entry = peer(status, pair.server.node_id)
    assert set(entry) >= FIRST_MESH_PEER | OURS_PEER
    assert (entry["role"], entry["models"], entry["serving"]) == ("Host", ["demo"], "demo")
    assert (entry["state"], entry["path"]) == ("alive", "direct")
    assert entry["version"] == status["version"]
    assert entry["vram_gb"] > 0
    assert abs(time.time() - entry["since"]) < 3600
    measured = pair.client.until(lambda status: peer(status, entry["id"])["rtt_ms"], what="a round-trip time")
    assert peer(measured, entry["id"])["rtt_ms"] > 0
    seen = peer(pair.server.status(), pair.client.node_id)
    assert (seen["role"], seen["models"], seen["serving"]) == ("Client", [], None)


def test_digest_of_the_model_is_the_same_everywhere(pair: Pair) -> None:
    digests = {node.status()["models"][0]["digest"] for node in (pair.server, pair.client)}
    assert len(digests) == 1
    assert len(digests.pop()) == 64


def test_requests_in_flight_are_counted(pair: Pair) -> None:
    body = {"model": "demo", "max_tokens": 8000, "stream": True, "prompt": "Once"}
    with httpx.stream("POST", f"{pair.client.api}/v1/completions", json=body, timeout=PATIENCE) as response:
        pieces = response.iter_raw()  # kept: the response ends with its iterator
        next(pieces)
        assert pair.client.status()["models"][0]["servers"][0]["in_flight"] == 1
    pair.client.until(
        lambda status: status["models"][0]["servers"][0]["in_flight"] == 0, what="none in flight"
    )


def test_events_begin_with_the_whole_status(pair: Pair) -> None:
    with httpx.stream("GET", f"{pair.client.console}/api/events", timeout=PATIENCE) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        line = next(line for line in response.iter_lines() if line)
    assert json.loads(line.removeprefix("data: "))["node_id"] == pair.client.node_id


def test_status_command(pair: Pair) -> None:
    done = pair.client.run("status", "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) >= FIRST_MESH
    table = pair.client.run("status")
    assert table.returncode == 0, table.stderr
    for text in ("demo", "alive", "direct", pair.server.node_id[-8:]):
        assert text in table.stdout


def test_token_is_told_to_this_machine_only(pair: Pair) -> None:
    """A page of another site, which a browser here might open, has another host name in `Host`."""
    answer = httpx.get(
        f"{pair.server.console}/api/status", headers={"Host": "evil.example"}, timeout=PATIENCE
    )
    assert answer.status_code == 403
    posted = httpx.post(
        f"{pair.server.console}/api/stop", json={}, headers={"Origin": "http://evil.example"}, timeout=5
    )
    assert posted.status_code == 403
    assert chat(pair.server).status_code == 200


def test_log_has_no_secrets_and_no_accidents(pair: Pair) -> None:
    """The invite is for the person at the terminal, not for the log file."""
    token = pair.machine.invite_file.read_text().strip()
    assert token in pair.server.words
    assert token not in (pair.server.folder / "logs" / "node.log").read_text()
    for node in (pair.server, pair.client):
        assert "Traceback" not in node.words
