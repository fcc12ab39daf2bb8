"""How a server is asked to go on with an answer that broke off."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import openai
import pytest
from libmesh_node.http import continuing
from libmesh_node.http.continuing import NobodyGoesOn, Succession
from libmesh_node.http.plain import track
from libmesh_node.snapshot import Model, Server

from tests.http.conftest import Llama, Node, call, llama_server, running_node

pytestmark = pytest.mark.llama

Json = dict[str, Any]

PATH = "/v1/chat/completions"


class Way:
    """A port that leads to a server, counts connections, and ends each after so many bytes of the answer.

    What comes after them is lost; the end comes only when the server's does, if `waits`.
    """

    def __init__(self, listener: socket.socket, to: int, limit: int | None, waits: bool = False) -> None:
        self._listener, self._to, self._limit, self._waits = listener, to, limit, waits
        self.taken = 0
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def run(self) -> None:
        with suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                self.taken += 1
                threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        # Of a server that was killed; a node has connections made in advance.
        with suppress(ConnectionError), near, socket.create_connection(("127.0.0.1", self._to)) as far:
            sending = threading.Thread(target=self._copy, args=(near, far, None), daemon=True)
            sending.start()
            self._copy(far, near, self._limit)
            for one in (near, far):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            sending.join()

    def _copy(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        left = limit
        with suppress(OSError):
            while (left is None or left > 0) and (data := source.recv(65536 if left is None else left)):
                sink.sendall(data)
                left = None if left is None else left - len(data)
            while left is not None and self._waits and source.recv(65536):
                pass


@contextmanager
def way(to: int, limit: int | None = None, *, waits: bool = False) -> Iterator[Way]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = Way(listener, to, limit, waits)
        thread = threading.Thread(target=made.run)
        thread.start()
        try:
            yield made
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_all_that_a_takeover_asks_goes_over_one_connection(llamas: dict[str, Llama]) -> None:
    """Each waits for its turn at the other node."""
    llama = llamas["small"]
    request = {
        "model": "small",
        "stream": True,
        "temperature": 0,
        "max_tokens": 40,
        "messages": [{"role": "user", "content": "Hello?"}],
    }
    unbroken = call(llama.port, "POST", "/v1/chat/completions", request)[2]
    with way(llama.port, len(unbroken) // 2) as dying, way(llama.port) as good:
        servers = (
            llama.server("dying", base_url=dying.url, digest="d", rtt=0.001, local=False),
            llama.server("good", base_url=good.url, digest="d", rtt=9.0, local=False),
        )
        with running_node(llama.served(*servers)) as node:
            status, headers, body = call(node.api_port, "POST", "/v1/chat/completions", request)
    assert (status, headers["x-libmesh-node"]) == (200, "dying")
    assert body.rstrip().endswith(b"data: [DONE]")
    assert b"error" not in body
    assert good.taken == 1


def test_text_goes_on_rightly_after_tokens_that_their_server_did_not_tell(llamas: dict[str, Llama]) -> None:
    """It tells the last only of those whose text it held back, as they might have become a stop string."""
    llama = llamas["small"]
    plain: Json = {
        "model": "small",
        "stream": True,
        "temperature": 0,
        "max_tokens": 40,
        "messages": [{"role": "user", "content": "Hello?"}],
        "stream_options": {"include_usage": True},
    }
    pieces = said(call(llama.port, "POST", PATH, plain)[2])[0]
    request = plain | {"stop": [f"{piece}##" for piece in pieces[2:12:3]]}
    whole = call(llama.port, "POST", PATH, request)[2]
    held, usage = said(whole)
    assert len(held) < len(pieces)
    with way(llama.port, len(whole)) as dying, way(llama.port) as good:
        servers = (
            llama.server("dying", base_url=dying.url, digest="d", rtt=0.001, local=False),
            llama.server("good", base_url=good.url, digest="d", rtt=9.0, local=False),
        )
        with running_node(llama.served(*servers)) as node:
            status, _, body = call(node.api_port, "POST", PATH, request)
    assert (status, good.taken) == (200, 1)
    text, counted = said(body)
    assert "".join(text) == "".join(held)
    assert [counted[key] for key in ("completion_tokens", "prompt_tokens")] == [
        usage[key] for key in ("completion_tokens", "prompt_tokens")
    ]


def said(stream: bytes) -> tuple[list[str], Json]:
    """The pieces of text, and the usage, of a streamed chat completion."""
    pieces: list[str] = []
    usage: Json = {}
    for line in stream.splitlines():
        if line.startswith(b"data: {"):
            value = json.loads(line.removeprefix(b"data: "))
            usage = value.get("usage") or usage
            pieces += [choice["delta"].get("content") or "" for choice in value["choices"]]
    return [piece for piece in pieces if piece], usage


class Killed:
    """Two servers of the same weights, the first of which is a process of its own that `kill` ends in mid-answer.

    However far it gets, the client has `LIMIT` bytes of its answer until then.
    """

    LIMIT = 4000
    WORDS = "Count to ten"  # of 24 tokens of the answer, none has a close rival: rounding changes none
    TOKENS = 24

    def __init__(self, doomed: Llama, node: Node, whole: str) -> None:
        self.kill, self.node, self.whole = doomed.process.kill, node, whole
        self.url = f"http://127.0.0.1:{node.api_port}"

    def check(self) -> None:
        metrics = call(self.node.console_port, "GET", "/metrics")[2]
        assert b"libmesh_streams_resumed_total 1\n" in metrics


@pytest.fixture
def killed(llama_binary: Path, model_files: dict[str, Path], llamas: dict[str, Llama]) -> Iterator[Killed]:
    good = llamas["small"]
    asked = {"messages": [{"role": "user", "content": Killed.WORDS}], "temperature": 0}
    answer = json.loads(call(good.port, "POST", PATH, asked | {"max_tokens": Killed.TOKENS})[2])
    with (
        llama_server(llama_binary, model_files["small"]) as doomed,
        way(doomed.port, Killed.LIMIT, waits=True) as dying,
    ):
        near = doomed.server("dying", base_url=dying.url, digest="d", rtt=0.001, local=False)
        with running_node(good.served(near, good.server("good", digest="d", rtt=9.0, local=False))) as node:
            yield Killed(doomed, node, answer["choices"][0]["message"]["content"])


def test_client_of_anthropic_reads_on_when_its_server_is_killed(killed: Killed) -> None:
    pieces: list[str] = []
    with (
        anthropic.Anthropic(base_url=killed.url, api_key="x", max_retries=0) as client,
        client.messages.stream(
            model="small",
            max_tokens=killed.TOKENS,
            messages=[{"role": "user", "content": killed.WORDS}],
            extra_body={"temperature": 0},
        ) as stream,
    ):
        for piece in stream.text_stream:
            pieces.append(piece)
            if len(pieces) == 2:
                killed.kill()
        message = stream.get_final_message()
    assert [block.text for block in message.content if block.type == "text"] == [killed.whole]
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", killed.TOKENS)
    killed.check()


def test_client_of_responses_reads_on_when_its_server_is_killed(killed: Killed) -> None:
    with (
        openai.OpenAI(base_url=f"{killed.url}/v1", api_key="x", max_retries=0) as client,
        client.responses.stream(
            model="small",
            max_output_tokens=killed.TOKENS,
            input=killed.WORDS,
            extra_body={"temperature": 0},
        ) as stream,
    ):
        numbers: list[int] = []
        for event in stream:
            numbers.append(event.sequence_number)
            if event.type == "response.output_text.delta":
                killed.kill()
        response = stream.get_final_response()
    assert numbers == list(range(len(numbers)))
    assert response.output_text == killed.whole
    assert response.usage is not None
    assert response.usage.output_tokens == killed.TOKENS
    killed.check()


TOOLS: list[Any] = [
    {"name": "look", "description": "Look.", "input_schema": {"type": "object", "properties": {}}}
]


def test_agent_reads_on_when_its_server_is_killed(killed: Killed) -> None:
    """With tools nobody can go on from the middle; at temperature 0 another server says the same again."""
    with anthropic.Anthropic(base_url=killed.url, api_key="x", max_retries=0) as client:
        ask: Any = {
            "model": "small",
            "max_tokens": killed.TOKENS,
            "tools": TOOLS,
            "messages": [{"role": "user", "content": killed.WORDS}],
            "extra_body": {"temperature": 0},
        }
        with client.messages.stream(**ask) as stream:
            for event in stream:
                if event.type == "content_block_delta":
                    killed.kill()
            message = stream.get_final_message()
        whole = client.messages.create(**ask)
    said, expected = ([block.to_dict() for block in one.content] for one in (message, whole))
    assert [block["text"] for block in said] == [block["text"] for block in expected]
    assert message.stop_reason == whole.stop_reason
    assert message.usage.output_tokens == whole.usage.output_tokens
    killed.check()


def test_probabilities_are_told_on_when_their_server_is_killed(killed: Killed) -> None:
    names, tokens, text = set(), 0, ""
    with openai.OpenAI(base_url=f"{killed.url}/v1", api_key="x", max_retries=0) as client:
        chunks = client.chat.completions.create(
            model="small",
            max_tokens=killed.TOKENS,
            messages=[{"role": "user", "content": killed.WORDS}],
            temperature=0,
            logprobs=True,
            stream=True,
        )
        for chunk in chunks:
            names.add(chunk.id)
            for choice in chunk.choices:
                text += choice.delta.content or ""
                tokens += len(choice.logprobs.content or ()) if choice.logprobs else 0
            if text:
                killed.kill()
    assert (len(names), tokens, text) == (1, killed.TOKENS, killed.whole)
    killed.check()


def test_server_is_counted_as_taken_from_when_it_is_asked_until_it_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that answers which lose their server together do not all choose the same one."""
    monkeypatch.setattr(continuing, "PATIENCE", 0.05)
    gone = Server(peer="gone", base_url="http://127.0.0.1:1", local=True, digest="d")
    model = Model(name="m", digest="d", size_bytes=1, context_length=0, servers=(gone,))
    path = "/v1/completions"
    transcript = track(path, {"model": "m", "prompt": "Hello", "stream": True})
    seats: list[Server | None] = []

    async def say() -> None:
        raise AssertionError

    async def main() -> None:
        assert transcript is not None
        async with aiohttp.ClientSession() as session:
            succession = Succession(
                session,
                lambda: model,
                lambda servers, refused: next((s for s in servers if s.base_url not in refused), None),
                "d",
                path,
            )
            with pytest.raises(NobodyGoesOn):
                await succession.next(transcript, "", say, seats.append)

    asyncio.run(main())
    assert seats == [gone, None]
