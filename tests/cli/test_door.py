"""The way in to a server: nodes share it, a greedy one is refused in HTTP, and nobody's place is lost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio
import trio.testing
from libmesh_node import door as door_module
from libmesh_node.door import PER_SLOT, SPARE, Door

from libmesh import ServiceRefused


class Server:
    """A server with `slots` slots, each of which takes a second of virtual time for a request, first come, first served."""

    def __init__(self, door: Door, slots: int) -> None:
        self._door, self._slots = door, trio.Semaphore(slots)
        self.answered: Counter[str] = Counter()
        self.longest: dict[str, float] = {}

    async def ask(self, peer: str) -> None:
        began = trio.current_time()
        async with self._door(peer) as elsewhere:
            assert elsewhere is None
            async with self._slots:
                await trio.sleep(1)
        self.answered[peer] += 1
        self.longest[peer] = max(self.longest.get(peer, 0.0), trio.current_time() - began)

    async def ask_for_ever(self, peer: str) -> None:
        while True:
            await self.ask(peer)


async def test_greedy_node_takes_nothing_from_a_modest_one(autojump_clock: trio.abc.Clock) -> None:
    """Four slots. One node has 30 requests under way at any time, the other one."""
    server = Server(Door("m", 4), 4)
    with trio.move_on_after(60.5):
        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(server.ask_for_ever, "greedy")
            await trio.sleep(0.25)
            nursery.start_soon(server.ask_for_ever, "modest")
    assert server.longest["modest"] <= 3  # what is at the server already, and itself
    assert server.answered["modest"] >= 20
    assert server.answered.total() >= 4 * 59  # no slot was ever idle


async def test_two_nodes_that_ask_for_too_much_get_the_same(autojump_clock: trio.abc.Clock) -> None:
    server = Server(Door("m", 4), 4)
    with trio.move_on_after(60.5):
        async with trio.open_nursery() as nursery:
            for peer, lines in (("one", 30), ("other", 8)):
                for _ in range(lines):
                    nursery.start_soon(server.ask_for_ever, peer)
    # Who of two equals comes first in the same instant is left to trio's dice: of 240, each had 120, give or take 7 (150 runs).
    assert 0.75 < server.answered["one"] / server.answered["other"] < 1.33


async def test_node_that_holds_places_and_does_nothing_holds_only_its_own(
    autojump_clock: trio.abc.Clock,
) -> None:
    server = Server(door := Door("m", 2), 2)

    async def hold() -> None:
        async with door("idle"):
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(hold)
        await trio.sleep(0.25)
        began = trio.current_time()
        async with trio.open_nursery() as asking:
            for _ in range(8):
                asking.start_soon(server.ask, "busy")
        assert trio.current_time() - began == 4
        nursery.cancel_scope.cancel()
    assert (door.turns.held, door.turns.waiting) == (0, 0)


async def test_who_is_cancelled_in_line_or_on_its_turn_leaves_its_place_to_others(
    autojump_clock: trio.abc.Clock,
) -> None:
    door = Door("m", 1)

    async def hold(scope: trio.CancelScope) -> None:
        with scope:
            async with door("a"):
                await trio.sleep_forever()

    scopes = [trio.CancelScope() for _ in range(1 + SPARE + 3)]
    async with trio.open_nursery() as nursery:
        for scope in scopes:
            nursery.start_soon(hold, scope)
        await trio.sleep(1)
        assert (door.turns.held, door.turns.waiting) == (3, 3)
        scopes[0].cancel()  # the next in line is told of its turn and leaves in the same moment
        scopes[3].cancel()
        await trio.sleep(1)
        assert (door.turns.held, door.turns.waiting) == (3, 1)
        nursery.cancel_scope.cancel()
    assert (door.turns.held, door.turns.waiting) == (0, 0)


@asynccontextmanager
async def full_door() -> AsyncIterator[Door]:
    """A door that runs, at which the peer `a` has all that it may."""
    door = Door("m", 1)

    async def hold() -> None:
        async with door("a"):
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        await nursery.start(door.run)
        for _ in range(1 + SPARE + PER_SLOT):
            nursery.start_soon(hold)
        await trio.testing.wait_all_tasks_blocked()
        yield door
        nursery.cancel_scope.cancel()


REQUEST = b"POST /v1/%b HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n" + bytes(300_000)


async def refusal(door: Door, request: bytes) -> bytes:
    """What the peer `a` reads in answer to `request`."""
    async with door("a") as where:
        assert where is not None
        async with await trio.open_tcp_stream(*where) as stream:
            with trio.fail_after(60):
                await stream.send_all(request)
                return b"".join([bytes(data) async for data in stream])


@pytest.mark.parametrize("path", [b"chat/completions", b"messages"])
async def test_node_with_too_many_in_line_is_told_so_in_its_protocol(path: bytes) -> None:
    async with full_door() as door:
        answer = await refusal(door, REQUEST % path)
        async with door("b") as where:
            assert where is None  # another node is let in all the same
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 429 ")
    assert b"\r\nRetry-After: 15\r\n" in head  # 9 requests of 5 s each, at 3 places
    error = json.loads(body)["error"]
    assert error["type"] == ("rate_limit_error" if path == b"messages" else "invalid_request_error")
    assert "15 s" in error["message"]


async def test_refused_head_gets_no_body_and_harms_nobody() -> None:
    async with full_door() as door:
        answer = await refusal(door, b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await refusal(door, REQUEST % b"completions")).startswith(b"HTTP/1.1 429 ")
    assert answer.startswith(b"HTTP/1.1 429 ")
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "garbage", [b"", b"\x00" * 100_000, b"GET", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"]
)
async def test_refused_garbage_ends_its_own_connection_only(garbage: bytes) -> None:
    async with full_door() as door:
        async with door("a") as where:
            assert where is not None
            stream = await trio.open_tcp_stream(*where)
            with trio.fail_after(60):
                async with stream:
                    with suppress(trio.BrokenResourceError):  # it does not read all of it
                        await stream.send_all(garbage)
                        await stream.send_eof()
                        assert not await stream.receive_some()
        assert (await refusal(door, REQUEST % b"completions")).startswith(b"HTTP/1.1 429 ")


async def test_refused_one_that_stays_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "REFUSAL_LIMIT", 0.05)
    async with full_door() as door, door("a") as where:
        assert where is not None
        async with await trio.open_tcp_stream(*where) as stream:
            with trio.fail_after(60):
                assert not await stream.receive_some()


async def test_no_more_are_refused_with_words_than_there_is_room_for() -> None:
    async with full_door() as door, trio.open_nursery() as nursery:

        async def stay(*, task_status: trio.TaskStatus[None]) -> None:
            async with door("a"):
                task_status.started()
                await trio.sleep_forever()

        for _ in range(door_module.MAX_REFUSALS):
            await nursery.start(partial(stay))
        with pytest.raises(ServiceRefused):
            async with door("a"):
                pass
        nursery.cancel_scope.cancel()
