"""Connections that fall silent without ending: noticed, replaced at once, and given up only when there is another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from libmesh.core import pulse
from libmesh.net import connections, vigil
from libmesh.net.base import NetworkEvent, PathChanged, PathSilent, StreamReset
from libmesh.net.libp2p import Libp2pNetwork
from libmesh.net.tcp import host_and_port
from tests.net.hosts import PROTOCOL, answers, collect, echo, networks, until


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vigil, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(pulse, "SILENT_FOR", 0.2)
    monkeypatch.setattr(pulse, "LEAST_PATIENCE", 0.1)
    monkeypatch.setattr(connections, "REPLACED_FOR", 0.1)


class Line:
    """A TCP port that leads to another one, until it is cut: then it takes all and carries nothing."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._whole = trio.Event()
        self.restore()

    def cut(self) -> None:
        self._whole = trio.Event()

    def restore(self) -> None:
        self._whole.set()

    async def carry(self, near: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream("127.0.0.1", self._port) as far, trio.open_nursery() as nursery:
            nursery.start_soon(self._one_way, near, far)
            nursery.start_soon(self._one_way, far, near)

    async def _one_way(self, here: trio.SocketStream, there: trio.SocketStream) -> None:
        try:
            async for data in here:
                await self._whole.wait()
                await there.send_all(data)
            await there.send_eof()
        except trio.BrokenResourceError:
            await there.aclose()


@asynccontextmanager
async def over_a_line() -> AsyncIterator[tuple[Libp2pNetwork, Libp2pNetwork, Line, list[NetworkEvent]]]:
    """Two peers, the line between them, and what the first is told."""
    async with networks(2) as (one, two), trio.open_nursery() as nursery:
        two.set_handler(PROTOCOL, echo)
        line = Line(host_and_port(two.addresses()[0])[1])
        listeners = await nursery.start(trio.serve_tcp, line.carry, 0)
        await one.dial(two.peer, f"/ip4/127.0.0.1/tcp/{listeners[0].socket.getsockname()[1]}")
        await until(lambda: two.path(one.peer))
        one.admit(two.peer)
        two.admit(one.peer)
        await answers(one, two)
        told: list[NetworkEvent] = []
        nursery.start_soon(collect, one, told)
        yield one, two, line, told
        nursery.cancel_scope.cancel()


async def test_a_connection_in_use_that_falls_silent_is_told_of_and_replaced_by_the_next() -> None:
    async with over_a_line() as (one, two, line, told):
        old = await one.open_stream(two.peer, PROTOCOL)
        line.cut()
        await old.send_all(b"x")
        await until(lambda: PathSilent(two.peer) in told)
        assert one.path(two.peer) is not None, "it has not ended"
        path = await one.connect(two.peer, two.addresses())
        assert path.address == two.addresses()[0], "a silent connection is none to whoever wants one"
        await answers(one, two)
        with pytest.raises(StreamReset):
            await old.receive_some()
        renewed = [event for event in told if isinstance(event, PathChanged)]
        assert [(event.path.address, event.renewed) for event in renewed] == [(path.address, True)]
        await until(lambda: len(two._connections.of(one.peer)) == 1)
        await answers(one, two)
        assert two.admitted(one.peer)


async def test_a_connection_that_speaks_again_stays_with_its_streams() -> None:
    async with over_a_line() as (one, two, line, told):
        old = await one.open_stream(two.peer, PROTOCOL)
        line.cut()
        await old.send_all(b"x")
        await until(lambda: PathSilent(two.peer) in told)
        await trio.sleep(0.5)  # for as long as there is no other one
        line.restore()
        assert await old.receive_some() == b"x"
        await until(lambda: any(isinstance(event, PathChanged) for event in told))
        assert not any(isinstance(event, PathChanged) and event.renewed for event in told)


async def test_a_connection_that_nobody_uses_is_asked_when_the_network_changed() -> None:
    async with over_a_line() as (one, two, line, told):
        await until(lambda: one._connections.idle(two.peer))
        line.cut()
        one._moved()
        await until(lambda: PathSilent(two.peer) in told)
        assert not one._connections.answers(two.peer)


async def test_a_new_connection_beside_one_that_works_costs_it_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pulse, "LEAST_PATIENCE", 30.0)  # more than a busy machine takes to answer
    async with over_a_line() as (one, two, _, told):
        old = await one.open_stream(two.peer, PROTOCOL)
        await old.send_all(b"x")
        assert await old.receive_some() == b"x"
        await one.dial(two.peer, two.addresses()[0])
        await trio.sleep(0.3)  # several looks at it
        await old.send_all(b"y")
        assert await old.receive_some() == b"y"
        assert PathSilent(two.peer) not in told


@asynccontextmanager
async def two_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[Libp2pNetwork, Libp2pNetwork, list[NetworkEvent]]]:
    """Two peers, two connections that nothing but `turn` casts doubt on, and what the first is told."""
    monkeypatch.setattr(vigil, "LOOK_EVERY", 3600.0)
    monkeypatch.setattr(connections, "RETIRE_AFTER", 3600.0)
    async with networks(2) as (one, two):
        for _ in range(2):
            await one.dial(two.peer, two.addresses()[0])
        told: list[NetworkEvent] = []
        monkeypatch.setattr(one._connections, "_emit", told.append)
        yield one, two, told


def turn(network: Libp2pNetwork, connection: Any) -> None:
    """The connection falls silent, or speaks again."""
    network._connections.vigil._doubted ^= {connection}
    network._connections._doubt_changed(connection)


async def test_when_no_connection_answers_that_is_told_once_whichever_was_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for order in ((0, 1), (1, 0)):
        async with two_connections(monkeypatch) as (one, two, told):
            both = one._connections.of(two.peer)
            turn(one, both[order[0]])
            assert PathSilent(two.peer) not in told
            turn(one, both[order[1]])
            assert told.count(PathSilent(two.peer)) == 1, order
            assert told[-1] == PathSilent(two.peer)
            turn(one, one._connections.of(two.peer)[0])
            assert isinstance(told[-1], PathChanged)
            renewed = [event.renewed for event in told if isinstance(event, PathChanged)]
            assert renewed == ([True, False, False] if order == (0, 1) else [False]), (
                "another silent one proves nothing"
            )


async def test_when_one_of_several_silent_connections_ends_silence_is_told_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with two_connections(monkeypatch) as (one, two, told):
        both = one._connections.of(two.peer)
        for connection in both:
            turn(one, connection)
        told.clear()
        one._connections.of(two.peer)[0].muxed_conn.give_up("it ended")
        await until(lambda: PathSilent(two.peer) in told)
        changed, _ = told
        assert isinstance(changed, PathChanged)
        assert not changed.renewed


async def test_a_silent_connection_is_ended_only_when_the_one_in_its_place_was_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "REPLACED_FOR", 0.0)
    async with two_connections(monkeypatch) as (one, two, _):
        silent, other = one._connections.of(two.peer)
        turn(one, silent)
        one._connections._is_silent(silent)
        assert not silent.muxed_conn.is_closed, "the other one may be as dead"
        since = trio.current_time()
        await until(lambda: other.muxed_conn.heard_at > since)
        one._connections._is_silent(silent)
        assert silent.muxed_conn.is_closed


async def test_when_the_best_of_several_silent_connections_speaks_the_others_have_time_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "REPLACED_FOR", 3600.0)
    async with two_connections(monkeypatch) as (one, two, _):
        for connection in one._connections.of(two.peer):
            turn(one, connection)
        best, other = one._connections.of(two.peer)
        one._connections.peers[two.peer].best_since -= 7200
        turn(one, best)
        one._connections._is_silent(other)
        since = trio.current_time()
        await until(lambda: best.muxed_conn.heard_at > since)
        one._connections._is_silent(other)
        assert not other.muxed_conn.is_closed
