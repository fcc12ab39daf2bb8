"""How a server is asked to go on with an answer that broke off."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import aiohttp
import pytest
from libmesh_node.http import continuing
from libmesh_node.http.continuing import NobodyGoesOn, Succession
from libmesh_node.http.transcript import track
from libmesh_node.snapshot import Model, Server

from tests.http.conftest import Llama, call, running_node

pytestmark = pytest.mark.llama


class Way:
    """A port that leads to a server, counts connections, and ends each after so many bytes of the answer."""

    def __init__(self, listener: socket.socket, to: int, limit: int | None) -> None:
        self._listener, self._to, self._limit = listener, to, limit
        self.taken = 0
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def run(self) -> None:
        with suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                self.taken += 1
                threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", self._to)) as far:
            sending = threading.Thread(target=self._copy, args=(near, far, None), daemon=True)
            sending.start()
            self._copy(far, near, self._limit)
            for one in (near, far):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            sending.join()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        left = limit
        with suppress(OSError):
            while (left is None or left > 0) and (data := source.recv(65536 if left is None else left)):
                sink.sendall(data)
                left = None if left is None else left - len(data)


@contextmanager
def way(to: int, limit: int | None = None) -> Iterator[Way]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = Way(listener, to, limit)
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


def test_server_is_counted_as_taken_from_when_it_is_asked_until_it_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that answers which lose their server together do not all choose the same one."""
    monkeypatch.setattr(continuing, "PATIENCE", 0.05)
    gone = Server(peer="gone", base_url="http://127.0.0.1:1", local=True, digest="d")
    model = Model(name="m", digest="d", size_bytes=1, context_length=0, servers=(gone,))
    path = "/v1/completions"
    transcript = track(path, json.dumps({"model": "m", "prompt": "Hello", "stream": True}).encode())
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
