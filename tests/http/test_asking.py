"""What the API tells the node of the requests that come in."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from libmesh_node.asked import Asked
from libmesh_node.http import asking
from libmesh_node.http.asking import Asking
from libmesh_node.snapshot import Model, Server

from tests.http.conftest import call, running_node, wait_until

SERVER = Server(peer="p", base_url="http://127.0.0.1:1", local=True)


def model(name: str, *servers: Server) -> Model:
    return Model(name=name, digest=f"digest of {name}", size_bytes=1, context_length=1, servers=servers)


def exchange(*, seeking: bool = True) -> Any:
    return SimpleNamespace(seeking=seeking)


def asked(name: str, requests: int, waiting: int) -> Asked:
    return Asked(digest=f"digest of {name}", name=name, requests=requests, waiting=waiting)


def test_request_that_nobody_can_answer_is_told_at_once_and_as_long_as_it_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asking, "EVERY", 0.01)
    monkeypatch.setattr(asking, "SOONEST", 0.0)
    told: list[tuple[Asked, ...]] = []

    async def main() -> None:
        counting, waits = Asking(told.append), exchange()
        with counting.counted(waits, model("m")):
            while len(told) < 2:  # noqa: ASYNC110 - the loop's own timers
                await asyncio.sleep(0.001)
            waits.seeking = False
            while told[-1]:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    asyncio.run(main())
    assert told[0] == (asked("m", 1, 1),)
    assert told[1] == (asked("m", 0, 1),)
    assert told[-1] == ()


def test_however_many_wait_the_node_is_told_of_them_now_and_then_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asking, "SOONEST", 3600.0)
    told: list[tuple[Asked, ...]] = []

    async def main() -> None:
        counting = Asking(told.append)
        for _ in range(50):
            with counting.counted(exchange(), model("m")):
                await asyncio.sleep(0.001)

    asyncio.run(main())
    assert told == [(asked("m", 1, 1),)]


def test_requests_are_gathered_and_models_without_a_digest_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "EVERY", 0.01)
    monkeypatch.setattr(asking, "SOONEST", 0.0)
    monkeypatch.setattr(asking, "MAX_MODELS", 2)
    told: list[tuple[Asked, ...]] = []

    async def main() -> None:
        counting = Asking(told.append)
        unknown = Model(name="unknown", digest="", size_bytes=1, context_length=1)
        for each in (model("m", SERVER), model("n", SERVER), unknown, model("too many"), model("m", SERVER)):
            with counting.counted(exchange(seeking=False), each):
                pass
        while not told:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)

    asyncio.run(main())
    assert told == [(asked("m", 2, 0), asked("n", 1, 0))]


def test_node_hears_what_its_api_is_asked_for() -> None:
    with running_node(model("cold")) as node:
        asking_for = b'{"model": "cold", "messages": []}'
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(asking_for)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", node.api_port)) as waiting:
            waiting.sendall(head.encode() + asking_for)
            wait_until(lambda: bool(node.commands.asked_for))
        assert node.commands.asked_for[0] == asked("cold", 1, 1)
        assert call(node.api_port, "GET", "/v1/models")[0] == 200
        assert sum(one.requests for one in node.commands.asked_for) == 1
