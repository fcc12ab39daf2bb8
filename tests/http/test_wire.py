"""What clients do on the wire: streaming, leaving, half-open connections, garbage. Raw sockets, real servers."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.http.conftest import (
    PATIENCE,
    Llama,
    Node,
    call,
    get_json,
    llama_server,
    running_node,
    wait_until,
)

pytestmark = pytest.mark.llama


def connect(port: int, data: bytes = b"") -> socket.socket:
    opened = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    if data:
        opened.sendall(data)
    return opened


def post(path: str, body: object, *headers: str, version: str = "1.1") -> bytes:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: localhost", f"Content-Length: {len(payload)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + payload


def read_all(opened: socket.socket) -> bytes:
    """To the end of the connection, in order or not."""
    received = bytearray()
    try:
        while data := opened.recv(1 << 16):
            received += data
    except ConnectionResetError:
        received += b"<reset>"
    return bytes(received)


def read_answers(opened: socket.socket, count: int) -> list[bytes]:
    """`count` answers with a Content-Length, in order."""
    answers, buffer = [], b""
    while len(answers) < count:
        head, found, rest = buffer.partition(b"\r\n\r\n")
        if found:
            lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            length = int(lengths[0].partition(b":")[2]) if lengths else 0
            if len(rest) >= length:
                answers.append(head + found + rest[:length])
                buffer = rest[length:]
                continue
        data = opened.recv(1 << 16)
        assert data, f"the connection ended after {len(answers)} answers: {buffer!r}"
        buffer += data
    assert not buffer
    return answers


LONG = {"prompt": "Hello", "max_tokens": 4000, "stream": True}
SHORT = {"prompt": "Hello", "max_tokens": 1}


def test_chunks_arrive_as_they_are_made(one_model: Node, llamas: dict[str, Llama]) -> None:
    with connect(one_model.api_port, post("/v1/completions", LONG)) as opened:
        received = b""
        while received.count(b"data: ") < 3:
            received += opened.recv(1 << 16)
        assert llamas["small"].busy_slots() == 1  # a proxy that buffers would show nothing before the end
    with connect(one_model.api_port, post("/v1/completions", LONG | {"max_tokens": 150})) as opened:
        received = b""
        while b"[DONE]" not in received:
            received += opened.recv(1 << 16)
    assert received.count(b"data: ") >= 100


def test_leaving_client_frees_the_slot(one_model: Node, llamas: dict[str, Llama]) -> None:
    with connect(one_model.api_port, post("/v1/completions", LONG)) as opened:
        assert b"200 OK" in opened.recv(1 << 16)
        wait_until(lambda: llamas["small"].busy_slots() == 1)
    wait_until(lambda: llamas["small"].busy_slots() == 0)


def test_leaving_client_frees_the_slot_of_an_answer_not_streamed(
    one_model: Node, llamas: dict[str, Llama]
) -> None:
    with connect(one_model.api_port, post("/v1/completions", LONG | {"stream": False})):
        wait_until(lambda: llamas["small"].busy_slots() == 1)
    # llama-server looks for its client after a second without any result, and the answer to /slots is one.
    wait_until(lambda: llamas["small"].busy_slots() == 0, every=1.2)


def test_many_requests_share_one_connection(two_models: Node) -> None:
    with connect(two_models.api_port) as opened:
        for model in ("tiny", "other", "nope", "tiny"):
            opened.sendall(post("/v1/completions", SHORT | {"model": model}))
            (answer,) = read_answers(opened, 1)
            assert answer.startswith(b"HTTP/1.1 404" if model == "nope" else b"HTTP/1.1 200")


def test_pipelined_requests_are_each_routed_on_their_own(two_models: Node) -> None:
    names = ["tiny", "other", "nope", "other", "tiny"] * 8
    requests = [post("/tokenize", {"model": name, "content": "x"}) for name in names]
    props = [f"GET /props?model={name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() for name in names]
    with connect(
        two_models.api_port, b"".join(a + b for a, b in zip(requests, props, strict=True))
    ) as opened:
        answers = read_answers(opened, 2 * len(names))
    for name, answer in zip(names, answers[1::2], strict=True):
        assert (b"404 Not Found" if name == "nope" else f"{name}.gguf".encode()) in answer


def test_chunked_body_is_routed_by_a_model_at_its_end(two_models: Node) -> None:
    body = json.dumps({"prompt": "x" * 3000, "max_tokens": 1, "model": "other"}).encode()
    pieces = [body[i : i + 100] for i in range(0, len(body), 100)]
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(two_models.api_port, head) as opened:
        for piece in pieces:
            opened.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        opened.sendall(b"0\r\n\r\n")
        (answer,) = read_answers(opened, 1)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["model"] == "other"


def test_gzip_body_is_understood_by_us_for_the_server(two_models: Node) -> None:
    body = gzip.compress(json.dumps(SHORT | {"model": "other"}).encode())
    status, _, answer = call(
        two_models.api_port,
        "POST",
        "/v1/completions",
        body,
        {"Content-Encoding": "gzip", "Content-Type": "application/json"},
    )
    assert status == 200
    assert json.loads(answer)["model"] == "other"


def test_client_that_waits_to_be_asked_is_asked(two_models: Node) -> None:
    body = json.dumps(SHORT | {"model": "tiny"}).encode()
    head, _, _ = post("/v1/completions", body, "Expect: 100-continue").partition(b"\r\n\r\n")
    with connect(two_models.api_port, head + b"\r\n\r\n") as opened:
        assert opened.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        opened.sendall(body)
        (answer,) = read_answers(opened, 1)
    assert answer.startswith(b"HTTP/1.1 200")


def test_client_that_waits_to_be_asked_hears_of_a_body_too_large_at_once(two_models: Node) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\nExpect: 100-continue\r\n\r\n"
    with connect(two_models.api_port, head) as opened:
        answer = opened.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 413")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("chunked", [False, True])
def test_hundred_megabytes_are_refused_and_others_are_served(two_models: Node, chunked: bool) -> None:
    size = 100_000_000
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    with connect(
        two_models.api_port, f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n".encode()
    ) as big:
        block = b"x" * 1_000_000
        framed = b"%x\r\n%s\r\n" % (len(block), block) if chunked else block
        for sent in range(size // len(block)):
            big.sendall(framed)
            if sent == 30:
                assert (
                    call(two_models.api_port, "POST", "/v1/completions", SHORT | {"model": "tiny"})[0] == 200
                )
        if chunked:
            big.sendall(b"0\r\n\r\n")
        answer = read_all(big)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"request_too_large" in answer


def test_thousand_half_open_connections_do_not_stop_service(two_models: Node) -> None:
    with ExitStack() as stack:
        for index in range(1000):
            start = (
                b"",
                b"GET /v1/mod",
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
            )
            stack.enter_context(connect(two_models.api_port, start[index % 3]))
        assert call(two_models.api_port, "POST", "/v1/completions", SHORT | {"model": "tiny"})[0] == 200
        assert call(two_models.console_port, "GET", "/api/status")[0] == 200


GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    b"\x00" * 5000,
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET  HTTP/1.1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(5000)) + b"\r\n",
    b"\r\n\r\n\r\n\xff\xfe\xfd",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_ends_its_own_connection_only(two_models: Node, garbage: bytes) -> None:
    for port in (two_models.api_port, two_models.console_port):
        with connect(port) as opened:
            with suppress(OSError):  # it may be cut off before it has sent all of it
                opened.sendall(garbage)
                opened.shutdown(socket.SHUT_WR)
            answer = read_all(opened)
        assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4", b"<reset>")), answer
    assert call(two_models.api_port, "POST", "/v1/completions", SHORT | {"model": "tiny"})[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b'"model"',
        b"null",
        b"\xff\xfe",
        b'{"model":',
        b'{"model": 5}',
        b'{"model": "tiny"',
        b"{}" * 9,
    ],
)
def test_bodies_that_are_no_request_are_refused_in_openais_shape(two_models: Node, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    status, _, answer = call(two_models.api_port, "POST", "/v1/completions", body, headers)
    assert 400 <= status < 500 or b"JSON" in answer or b"json" in answer
    assert json.loads(answer)["error"]["message"]


def test_hostile_body_does_not_hold_up_the_others(two_models: Node) -> None:
    with connect(two_models.api_port, post("/v1/completions", b"[" * 10_000_000 + b'{"model"')) as opened:
        assert call(two_models.api_port, "GET", "/v1/models")[0] == 200
        assert b"HTTP/1.1 400" in opened.recv(1 << 16)
    with connect(two_models.api_port, post("/v1/completions", b"{" * 10_000_000)) as opened:
        for _ in range(5):
            assert call(two_models.api_port, "GET", "/v1/models")[0] == 200
        assert b"HTTP/1.1 400" in opened.recv(1 << 16)


def test_dead_server_in_mid_stream_is_told_and_is_no_clean_end(
    llama_binary: Path, model_files: dict[str, Path]
) -> None:
    with llama_server(llama_binary, model_files["small"]) as llama, running_node(llama.served()) as node:
        with connect(node.api_port, post("/v1/completions", LONG)) as opened:
            received = opened.recv(1 << 16)
            llama.process.kill()
            received += read_all(opened)
        assert received.startswith(b"HTTP/1.1 200")
        assert not received.endswith(b"0\r\n\r\n")
        events = [line for line in received.split(b"\n") if line.startswith(b"data: ")]
        assert json.loads(events[-1].removeprefix(b"data: ").strip())["error"]["code"] == "server_failed"
        status, headers, _ = call(node.api_port, "POST", "/v1/completions", SHORT)
        assert status == 502
        assert headers["retry-after"]


def test_dead_server_in_mid_stream_is_a_reset_for_an_old_client(
    llama_binary: Path, model_files: dict[str, Path]
) -> None:
    with (
        llama_server(llama_binary, model_files["small"]) as llama,
        running_node(llama.served()) as node,
        connect(node.api_port, post("/v1/completions", LONG, version="1.0")) as opened,
    ):
        opened.recv(1)
        llama.process.kill()
        assert read_all(opened).endswith(b"<reset>")


def test_next_server_is_tried_before_the_first_byte(llamas: dict[str, Llama]) -> None:
    llama = llamas["tiny"]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = llama.server("peer-gone", base_url=f"http://127.0.0.1:{closed.getsockname()[1]}")
        with running_node(llama.served(gone, llama.server("peer-z", local=False, rtt=0.05))) as node:
            for _ in range(3):
                status, headers, _ = call(node.api_port, "POST", "/v1/completions", SHORT)
                assert status == 200
                assert headers["x-libmesh-node"] == "peer-z"
                assert headers["x-libmesh-attempts"] == "2"


@pytest.mark.parametrize("politely", [False, True])
def test_server_that_hangs_up_is_asked_once_more_and_then_replaced(
    llamas: dict[str, Llama], politely: bool
) -> None:
    llama = llamas["tiny"]
    with socket.create_server(("127.0.0.1", 0)) as liar:
        liar.settimeout(PATIENCE)

        def hang_up() -> None:
            for _ in range(2):
                accepted, _ = liar.accept()
                accepted.recv(1 << 16 if politely else 10)  # with data unread, closing is a reset
                accepted.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        bad = llama.server("peer-bad", base_url=f"http://127.0.0.1:{liar.getsockname()[1]}")
        with running_node(llama.served(bad, llama.server("peer-good", local=False))) as node:
            status, headers, _ = call(node.api_port, "POST", "/v1/completions", SHORT)
        thread.join()
    assert status == 200
    assert headers["x-libmesh-node"] == "peer-good"
    assert headers["x-libmesh-attempts"] == "3"


def test_requests_spread_over_equal_servers(llamas: dict[str, Llama]) -> None:
    llama = llamas["tiny"]
    first, second = (
        llama.server("peer-1"),
        llama.server("peer-2", base_url=llama.url.replace("127.0.0.1", "localhost")),
    )
    with running_node(llama.served(first, second)) as node:
        nodes = [
            call(node.api_port, "POST", "/v1/completions", SHORT)[1]["x-libmesh-node"] for _ in range(40)
        ]
    assert 5 <= nodes.count("peer-1") <= 35


def test_automatic_choice_is_named_in_the_answer(two_models: Node) -> None:
    status, headers, body = call(two_models.api_port, "POST", "/v1/completions", SHORT | {"model": "auto"})
    assert status == 200
    assert headers["x-libmesh-model"] == json.loads(body)["model"] == "tiny"


def test_stopping_node_ends_a_stream(llamas: dict[str, Llama]) -> None:
    with (
        running_node(llamas["small"].served()) as node,
        connect(node.api_port, post("/v1/completions", LONG)) as opened,
    ):
        received = opened.recv(1 << 16)
        node.end()
        received += read_all(opened)
    last = [line for line in received.split(b"\n") if line.startswith(b"data: ")][-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "node_ending"
    assert not received.endswith(b"0\r\n\r\n")
    wait_until(lambda: llamas["small"].busy_slots() == 0)


def test_models_follow_the_snapshot(llamas: dict[str, Llama]) -> None:
    with running_node() as node:
        assert get_json(node.api_port, "/v1/models") == {"object": "list", "data": []}
        node.publish(llamas["tiny"].served())
        assert call(node.api_port, "POST", "/v1/completions", SHORT)[0] == 200
        node.publish()
        assert call(node.api_port, "POST", "/v1/completions", SHORT)[0] == 503
