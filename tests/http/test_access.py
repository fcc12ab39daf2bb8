"""Who may ask, and for what."""

from __future__ import annotations

import pytest
from libmesh_node.http.access import is_allowed_origin, is_loopback, is_private_host
from libmesh_node.http.errors import ApiError
from libmesh_node.http.exposure import check_endpoint, forwarded_headers, returned_headers

from tests.http.conftest import Llama, Node, call, get_json, running_node


@pytest.mark.parametrize(
    ("host", "private"),
    [
        ("localhost:9337", True),
        ("LOCALHOST", True),
        ("127.0.0.1:9337", True),
        ("[::1]:9337", True),
        ("192.168.1.5", True),
        ("studio", True),
        ("studio.local", True),
        ("host.docker.internal:9337", True),
        ("box.example.net", True),
        ("", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost:80@evil.example", False),
        ("evil.example:9337", False),
        ("[::1", False),
        ("localhost:99999999", False),
    ],
)
def test_host_must_be_a_name_that_no_stranger_can_own(host: str, private: bool) -> None:
    assert is_private_host(host, "box.example.net") == private


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("http://127.0.0.1:8080", True),
        ("https://app.localhost", True),
        ("http://[::1]:5173", True),
        ("http://gpu.lan:9337", True),  # the very server that was asked
        ("https://app.example", True),  # listed
        ("vscode-webview://abc", True),
        ("chrome-extension://abc", True),
        ("http://gpu.lan:9338", False),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://127.0.0.1.evil.example", False),
        ("null", False),
        ("", False),
        ("http://[", False),
    ],
)
def test_origin_must_be_of_this_machine_or_listed(origin: str, allowed: bool) -> None:
    assert is_allowed_origin(origin, "gpu.lan:9337", ("https://app.example",)) == allowed


def test_any_origin_may_be_allowed_on_purpose() -> None:
    assert is_allowed_origin("https://evil.example", "x", ("*",))


def test_loopback_is_told_in_both_versions() -> None:
    assert [is_loopback(address) for address in ("127.3.2.1", "::1", "::ffff:127.0.0.1")] == [True] * 3
    assert [is_loopback(address) for address in ("10.0.0.1", "fe80::1", "", "localhost")] == [False] * 4


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/slots/0", 403),
        ("POST", "/slots/0/", 403),
        ("POST", "/props", 403),
        ("POST", "/lora-adapters", 403),
        ("POST", "/models/load", 403),
        ("POST", "/v1/models/unload", 403),
        ("POST", "/models", 403),
        ("GET", "/models/sse", 403),
        ("POST", "/v1/chat/completions/control", 403),
        ("GET", "/v1/stream", 403),
        ("POST", "/v1/streams/lookup", 403),
        ("GET", "/cors-proxy", 403),
        ("POST", "/tools", 403),
        ("DELETE", "/v1/stream", 405),
        ("PUT", "/v1/files", 405),
        ("POST", "//slots/0", 404),
        ("POST", "/x/../slots/0", 404),
        ("POST", "/slots/%30", 404),
        ("POST", "/slots\x00", 404),
        ("POST", "/./slots/0", 404),
    ],
)
def test_administration_is_refused_however_it_is_spelled(method: str, path: str, status: int) -> None:
    with pytest.raises(ApiError) as caught:
        check_endpoint(method, path)
    assert caught.value.status == status


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/responses/input_tokens",
        "/rerank",
        "/infill",
        "/apply-template",
        "/a.b-c_d:e",
    ],
)
def test_computation_passes(path: str) -> None:
    check_endpoint("POST", path)
    check_endpoint("GET", "/slots")


def test_secrets_and_hop_by_hop_headers_stay_here() -> None:
    sent = {"Authorization": "Bearer sk", "Cookie": "c", "X-Api-Key": "k", "Origin": "o", "Content-Type": "t"}
    assert forwarded_headers(sent | {"Connection": "close", "X-Secret": "s"}) == {"Content-Type": "t"}
    answered = [
        ("Connection", "X-Inner, close"),
        ("X-Inner", "1"),
        ("Transfer-Encoding", "chunked"),
        ("X-A", "1"),
    ]
    kept = returned_headers(
        [*answered, ("Access-Control-Allow-Origin", "*"), ("Set-Cookie", "a"), ("Set-Cookie", "b")]
    )
    assert list(kept.items()) == [("X-A", "1"), ("Set-Cookie", "a"), ("Set-Cookie", "b")]


@pytest.mark.llama
def test_page_of_this_machine_may_use_the_api_and_a_strangers_may_not(two_models: Node) -> None:
    port = two_models.api_port
    ask = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    status, headers, _ = call(
        port, "OPTIONS", "/v1/completions", headers=ask | {"Origin": "http://localhost:3000"}
    )
    assert status == 204
    assert headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "POST" in headers["access-control-allow-methods"]
    assert headers["access-control-allow-headers"] == "authorization,content-type"
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1, "stream": True}
    status, headers, _ = call(port, "POST", "/v1/completions", body, {"Origin": "http://localhost:3000"})
    assert status == 200
    assert headers["access-control-allow-origin"] == "http://localhost:3000"
    assert headers["vary"] == "Origin"
    status, headers, _ = call(port, "POST", "/v1/completions", body, {"Origin": "https://evil.example"})
    assert status == 403
    assert "access-control-allow-origin" not in headers
    assert call(port, "OPTIONS", "/v1/models", headers=ask | {"Origin": "https://evil.example"})[0] == 403
    assert call(port, "GET", "/v1/models", headers={"Host": "evil.example"})[0] == 403


@pytest.mark.llama
def test_operator_may_open_the_api_to_more_pages(llamas: dict[str, Llama]) -> None:
    with running_node(llamas["tiny"].served(), origins=("https://app.example",)) as node:
        _, headers, _ = call(node.api_port, "GET", "/v1/models", headers={"Origin": "https://app.example"})
        assert headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.llama
def test_slots_cannot_be_saved_through_the_mesh(two_models: Node, llamas: dict[str, Llama]) -> None:
    for path in ("/slots/0?action=erase&model=tiny", "/%73lots/0?action=erase", "//slots/0?action=erase"):
        status, _, _ = call(two_models.api_port, "POST", path, {"model": "tiny"})
        assert status in (403, 404)
    assert get_json(two_models.api_port, "/slots?model=tiny")


@pytest.mark.llama
def test_head_is_answered_without_a_body(two_models: Node) -> None:
    for path in ("/v1/models", "/health", "/props?model=tiny"):
        status, headers, body = call(two_models.api_port, "HEAD", path)
        assert status == 200
        assert body == b""
        assert int(headers["content-length"]) > 0
