"""Servers that die at chosen points of an answer: what the client sees, and what the node thinks of the server then."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
from libmesh_node.http import balance, proxy
from libmesh_node.http.sse import comment, data_event
from libmesh_node.snapshot import Model, Server

from tests.http.conftest import call, running_node

STREAM = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
PLAIN = {"messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(text: str, reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": reason}
    return data_event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]})


WHOLE = HEAD + chunk(event("Hello")) + chunk(event("", "stop")) + chunk(b"data: [DONE]\n\n") + chunk(b"")


def whole(status: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Script:
    """A server that says, for each request, the next of `answers` (the last one for ever) and hangs up.

    Each connection has its own thread: a node keeps some that ask nothing yet.
    """

    def __init__(self, listener: socket.socket, peer: str, answers: Sequence[bytes]) -> None:
        self.asked = 0
        self._listener, self._answers = listener, answers
        self._turn = threading.Lock()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        # The local one is the nearest: with nothing known of either it is asked first.
        self.server = Server(peer=peer, base_url=url, local=peer == "first", rtt=0.5, slots=4, digest="d")

    def stop(self) -> None:
        """Take no connection any more; its port stays its own."""
        with suppress(OSError):  # it does not already
            self._listener.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self._listener.accept()[:1], daemon=True).start()

    def _serve(self, accepted: socket.socket) -> None:
        with accepted, suppress(OSError):
            if self._read(accepted):
                with self._turn:
                    self.asked += 1
                    answer = self._answers[min(self.asked, len(self._answers)) - 1]
                accepted.sendall(answer)

    @staticmethod
    def _read(accepted: socket.socket) -> bool:
        received = b""
        while b"\r\n\r\n" not in received:
            if not (data := accepted.recv(1 << 16)):
                return False
            received += data
        head, _, body = received.partition(b"\r\n\r\n")
        (length,) = [
            int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
        ]
        while len(body) < length:
            body += accepted.recv(1 << 16)
        return True


@contextmanager
def scripts(**answers: Sequence[bytes]) -> Iterator[list[Script]]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in answers]
    made = [Script(at, peer, said) for at, (peer, said) in zip(listeners, answers.items(), strict=True)]
    threads = [threading.Thread(target=one.run) for one in made]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        for one, listener in zip(made, listeners, strict=True):
            one.stop()
            listener.close()
        for thread in threads:
            thread.join()


def model(*servers: Script) -> Model:
    return Model(
        name="m", digest="d", size_bytes=1, context_length=0, servers=tuple(one.server for one in servers)
    )


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize(
    "last_words",
    [HEAD, HEAD + chunk(b""), HEAD + chunk(event("He")[:20]), HEAD + chunk(event("He")[:-1])],
    ids=["head", "end", "part", "all but the end"],
)
def test_stream_that_dies_before_its_first_event_is_asked_of_another(last_words: bytes, tools: bool) -> None:
    more = {"tools": [{"type": "function"}]} if tools else {}
    with (
        scripts(first=[last_words], second=[WHOLE]) as (dying, good),
        running_node(model(dying, good)) as node,
    ):
        status, headers, body = call(node.api_port, "POST", PATH, STREAM | more)
    assert (status, headers["x-libmesh-node"], headers["x-libmesh-attempts"]) == (200, "second", "2")
    assert b"Hello" in body
    assert b"error" not in body


def test_stream_that_dies_after_comments_only_is_asked_of_another() -> None:
    """They are no answer: a server that waits for its own turn, or hangs, sends them."""
    last_words = HEAD + chunk(comment("computing")) + chunk(event("He")[:20])
    with (
        scripts(first=[last_words], second=[WHOLE]) as (dying, good),
        running_node(model(dying, good)) as node,
    ):
        status, headers, body = call(node.api_port, "POST", PATH, STREAM)
    assert (status, headers["x-libmesh-node"], headers["x-libmesh-attempts"]) == (200, "second", "2")
    assert (body.count(b"Hello"), body.count(b"data: "), b"error" in body) == (1, 3, False)


def test_answer_that_broke_off_is_no_success_of_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "REST", balance.MAX_REST)  # longer than all of this takes anywhere
    cut = HEAD + chunk(event("He"))
    tools = STREAM | {"tools": [{"type": "function"}]}
    with scripts(first=[cut], second=[WHOLE]) as (dying, good), running_node(model(dying, good)) as node:
        for _ in range(10):
            with suppress(Exception):
                call(node.api_port, "POST", PATH, tools)
        assert dying.asked == 3  # then it is left alone
        assert good.asked == 7


def test_broken_body_says_nothing_against_the_server() -> None:
    refusal = json.dumps(
        {"error": {"code": 500, "message": "[json.exception.parse_error.101] bad", "type": "x"}}
    )
    answers = [whole("500 Internal Server Error", refusal.encode())]
    with scripts(first=answers, second=[WHOLE]) as (only, other), running_node(model(only, other)) as node:
        for _ in range(8):
            assert call(node.api_port, "POST", PATH, PLAIN)[0] == 400
        assert (only.asked, other.asked) == (8, 0)


FAULT = [
    whole(
        "500 Internal Server Error",
        b'{"error":{"code":500,"message":"Compute error.","type":"server_error"}}',
    )
]


@pytest.mark.parametrize("streams", [False, True])
def test_fault_of_a_server_is_its_own_if_another_one_answers(
    monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    monkeypatch.setattr(balance, "REST", balance.MAX_REST)  # longer than all of this takes anywhere
    with scripts(first=FAULT, second=[WHOLE]) as (faulty, good), running_node(model(faulty, good)) as node:
        for number in range(5):  # each a conversation of its own: none is warm anywhere
            body = {"messages": [{"role": "user", "content": f"Hi {number}"}], "stream": streams}
            status, headers, answer = call(node.api_port, "POST", PATH, body)
            assert (status, headers["x-libmesh-node"]) == (200, "second")
            assert b"Hello" in answer
        assert (faulty.asked, good.asked) == (3, 5)  # then it is left alone


def test_fault_of_all_servers_is_the_requests() -> None:
    with scripts(first=FAULT, second=FAULT) as (one, other), running_node(model(one, other)) as node:
        for _ in range(5):
            status, headers, answer = call(node.api_port, "POST", PATH, PLAIN | {"stream": False})
            assert (status, headers["x-libmesh-attempts"]) == (500, "2")
            assert b"Compute error" in answer
        assert (one.asked, other.asked) == (5, 5)


def test_fault_is_passed_on_when_nobody_else_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was made anew every tenth of a second before, for as long as the other one was looked for."""
    monkeypatch.setattr(proxy, "PATIENCE", 60.0)
    with scripts(first=FAULT, gone=[]) as (faulty, gone), running_node(model(faulty, gone)) as node:
        gone.stop()
        status, _, answer = call(node.api_port, "POST", PATH, PLAIN | {"stream": False})
        assert (status, faulty.asked) == (500, 2)
        assert b"Compute error" in answer


def test_fault_at_what_another_server_refuses_says_nothing_against_the_first() -> None:
    refusal = whole(
        "400 Bad Request", b'{"error":{"code":400,"message":"no","type":"invalid_request_error"}}'
    )
    with scripts(first=FAULT, second=[refusal]) as (one, other), running_node(model(one, other)) as node:
        for _ in range(5):
            assert call(node.api_port, "POST", PATH, PLAIN | {"stream": False})[0] == 400
        assert (one.asked, other.asked) == (5, 5)


@pytest.mark.parametrize("request_body", [STREAM, PLAIN], ids=["stream", "plain"])
def test_request_that_kills_its_servers_does_not_kill_them_all(request_body: dict[str, object]) -> None:
    names = [f"server{index}" for index in range(8)]
    with scripts(**{name: [b""] for name in names}) as dying, running_node(model(*dying)) as node:
        assert call(node.api_port, "POST", PATH, request_body)[0] == 502
    assert sum(one.asked > 0 for one in dying) == 4


def test_what_is_known_of_servers_that_are_gone_is_forgotten() -> None:
    answer = [whole("200 OK", b'{"choices":[]}')]
    with scripts(first=answer, second=answer) as (one, two), running_node(model(one)) as node:
        assert call(node.api_port, "POST", PATH, PLAIN)[0] == 200
        node.publish(model(two))
        assert call(node.api_port, "POST", PATH, PLAIN)[0] == 200
        counted = call(node.console_port, "GET", "/metrics")[2].decode()
    assert 'libmesh_requests_in_flight{model="m",node="second"} 0' in counted


@contextmanager
def hesitating_server(answer: bytes, told: threading.Event) -> Iterator[Server]:
    """Takes requests, and answers each when it is told to. The nearest, so it is asked first."""

    def serve(accepted: socket.socket) -> None:
        accepted.recv(1 << 16)
        told.wait(60)
        accepted.sendall(answer)

    with sockets_served("hesitant", serve) as server:
        try:
            yield server
        finally:
            told.set()


@contextmanager
def sockets_served(peer: str, serve: Callable[[socket.socket], None]) -> Iterator[Server]:
    """A server of this machine whose connections, all at once, are each given to `serve`, in a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(accepted: socket.socket) -> None:
        with accepted, suppress(OSError):
            serve(accepted)

    def run() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=listener.accept()[:1], daemon=True).start()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield Server(peer=peer, base_url=url, local=True, slots=4, digest="d")
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.fixture
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "FIRST_BYTE", 0.05)
    monkeypatch.setattr(balance, "DOUBT", 0.0)
    monkeypatch.setattr(proxy, "LOOK", 0.05)


@pytest.mark.usefixtures("in_a_hurry")
@pytest.mark.parametrize("request_body", [STREAM, PLAIN], ids=["stream", "plain"])
def test_server_that_says_nothing_for_too_long_is_replaced(request_body: dict[str, object]) -> None:
    with (
        hesitating_server(WHOLE, threading.Event()) as hesitant,
        scripts(second=[WHOLE]) as (good,),
        running_node(replace(model(good), servers=(hesitant, good.server))) as node,
    ):
        status, headers, body = call(node.api_port, "POST", PATH, request_body)
    assert (status, headers["x-libmesh-node"], headers["x-libmesh-attempts"]) == (200, "second", "2")
    assert b"Hello" in body


@pytest.mark.usefixtures("in_a_hurry")
def test_only_server_is_waited_for_and_another_that_comes_meanwhile_is_asked() -> None:
    told = threading.Event()
    with (
        hesitating_server(WHOLE, told) as hesitant,
        scripts(second=[WHOLE]) as (good,),
        running_node(replace(model(good), servers=(hesitant,))) as node,
    ):
        later = threading.Timer(0.3, told.set)
        later.start()
        assert call(node.api_port, "POST", PATH, STREAM)[1]["x-libmesh-node"] == "hesitant"
        told.clear()
        later = threading.Timer(
            0.3, lambda: node.publish(replace(model(good), servers=(hesitant, good.server)))
        )
        later.start()
        assert call(node.api_port, "POST", PATH, STREAM)[1]["x-libmesh-node"] == "second"
        later.join()
