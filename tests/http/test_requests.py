"""A request's id and its line in the log."""

from __future__ import annotations

import json
import logging

import pytest
from libmesh_node.http.api import request_id
from libmesh_node.logs import JsonFormatter

from tests.http.conftest import Llama, Node, call, running_node

pytestmark = pytest.mark.llama

BODY = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "stream": True}


def test_client_may_name_its_request(two_models: Node) -> None:
    port = two_models.api_port
    for path, body in (("/v1/completions", BODY), ("/v1/models", None)):
        method = "GET" if body is None else "POST"
        _, headers, _ = call(port, method, path, body, headers={"X-Request-Id": "mine-1"})
        assert headers["x-request-id"] == "mine-1"


def test_every_answer_has_an_id_of_its_own(two_models: Node) -> None:
    port = two_models.api_port
    asked = (
        ("GET", "/v1/models"),
        ("GET", "/v1/models/nope"),
        ("PUT", "/x"),
        ("OPTIONS", "/v1/models"),
        ("GET", "/health"),
    )
    ids = {call(port, method, path)[1]["x-request-id"] for method, path in asked}
    assert len(ids) == len(asked)


def test_page_may_read_the_id(two_models: Node) -> None:
    _, headers, _ = call(two_models.api_port, "GET", "/v1/models", headers={"Origin": "http://localhost:1"})
    assert "X-Request-Id" in headers["access-control-expose-headers"]


@pytest.mark.parametrize("asked", ["", "a b", "x" * 129, "a\x1b[2J", "é"])
def test_name_that_garbles_a_log_is_replaced(asked: str) -> None:
    assert request_id(asked).startswith("req-")
    assert request_id(asked) != request_id(asked)


def test_log_line_tells_all_of_a_request(llamas: dict[str, Llama], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "libmesh_node.http.access")
    with running_node(llamas["tiny"].served()) as node:
        call(node.api_port, "POST", "/v1/completions", BODY, headers={"X-Request-Id": "mine-2"})
    (record,) = [each for each in caplog.records if each.name == "libmesh_node.http.access"]
    assert record.getMessage().startswith("POST /v1/completions 200 ")
    assert record.getMessage().endswith(" model=tiny node=peer-a attempts=1 id=mine-2")
    line = json.loads(JsonFormatter().format(record))
    assert (line["id"], line["status"], line["model"], line["tokens"]) == ("mine-2", 200, "tiny", 4)
    assert 0 < line["first_byte_seconds"] <= line["seconds"]
    assert line["received"] > 0
