"""What llama-server says, in the client's protocol: pure functions, and what the real one says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.http.answers import LONGEST_ERROR, Told, refined_error, told

from tests.http.conftest import Node, call

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"


def llama_error(message: str, code: int = 400, kind: str = "invalid_request_error", **more: object) -> bytes:
    return json.dumps({"error": {"code": code, "message": message, "type": kind, **more}}).encode()


def test_openais_envelope_has_a_word_for_a_code_and_a_param() -> None:
    status, body = refined_error(
        400, llama_error("too long", kind="exceed_context_size_error", n_ctx=7), CHAT
    )
    assert status == 400
    assert json.loads(body)["error"] == {
        "code": "exceed_context_size_error",
        "message": "too long",
        "type": "exceed_context_size_error",
        "param": None,
        "n_ctx": 7,
    }


def test_anthropics_envelope_on_its_path() -> None:
    status, body = refined_error(503, llama_error("loading", 503, "unavailable_error"), MESSAGES)
    assert status == 503
    assert json.loads(body) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "loading"},
    }


@pytest.mark.parametrize(
    "message",
    [
        "[json.exception.parse_error.101] parse error at line 1",
        "'messages' is required",
        "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj",
    ],
)
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_what_a_client_got_wrong_is_no_fault_of_the_server(message: str, path: str) -> None:
    status, body = refined_error(500, llama_error(message, 500, "server_error"), path)
    assert status == 400
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_path_that_a_server_does_not_know_is_named() -> None:
    status, body = refined_error(404, llama_error("File Not Found", 404, "not_found_error"), "/v1/images")
    assert status == 404
    assert "/v1/images" in json.loads(body)["error"]["message"]


def test_fault_of_the_server_stays_one() -> None:
    status, body = refined_error(500, llama_error("out of memory", 500, "server_error"), CHAT)
    assert status == 500
    assert json.loads(body)["error"]["code"] == "server_error"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b'{"error": "words"}',
        b'{"error": {"message": 7}}',
        b"\xff",
        b"[" * 100_000,
        llama_error("x" * LONGEST_ERROR),
    ],
)
def test_what_is_not_understood_passes_as_it_is(body: bytes) -> None:
    assert refined_error(500, body, CHAT) == (500, body)


@given(st.binary(max_size=300))
def test_no_answer_is_too_strange(data: bytes) -> None:
    told(data)
    refined_error(500, data, CHAT)


def test_last_numbers_count() -> None:
    tail = b'{"completion_tokens": 3} "usage":{"completion_tokens":8,"prompt_tokens":19,"cached_tokens":5}'
    assert told(tail) == Told(completion=8, prompt=19, cached=5, speed=None)
    timed = told(b'"timings":{"cache_n":18,"prompt_n":1,"predicted_n":4,"predicted_per_second":361.402244}')
    assert replace(timed, speed=None) == Told(completion=4, cached=18)
    assert timed.speed == pytest.approx(361.4, rel=0.01)
    assert told(b"data: [DONE]") == Told()


@pytest.mark.llama
def test_real_servers_errors_have_the_protocols_shape(two_models: Node) -> None:
    port = two_models.api_port
    status, _, body = call(port, "POST", "/v1/chat/completions?model=tiny", b"{")
    error = json.loads(body)["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", None)
    assert isinstance(error["code"], str)
    status, _, body = call(port, "POST", "/v1/messages", {"model": "tiny"})
    assert status == 400
    assert json.loads(body)["type"] == "error"
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
