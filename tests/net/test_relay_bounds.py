"""What a relay of ours gives at most, and what liars, garbage and silence cost it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import trio

from libmesh.core.relay_desk import RelayLimits
from libmesh.errors import NetworkError
from libmesh.framing import receive_frame
from libmesh.net import relay_server
from libmesh.net import relay_wire as wire
from libmesh.net.base import Stream, StreamReset
from libmesh.net.relay_client import split_relay
from libmesh.net.relay_wire import Answer, Connect, Reserve, Status
from libmesh.peers import PathKind
from tests.net.hosts import PROTOCOL, answers, join, networks, until
from tests.net.relayed import (
    RELAY,
    address_of,
    asked,
    both_ways,
    circuit_of,
    kind,
    networks_of,
    relayed,
    take_place,
)

DATA = hashlib.shake_128(b"data").digest(3 * 1024 * 1024)


# ---- bounds -------------------------------------------------------------------------------------------------------


async def test_a_circuit_ends_when_it_has_carried_its_bytes() -> None:
    async with relayed(replace(RELAY, relay=RelayLimits(data=300_000))) as nodes:
        await nodes.connect()
        stream = await nodes.source.open_stream(nodes.target.peer, PROTOCOL)
        with pytest.raises((StreamReset, trio.ClosedResourceError)):
            await both_ways_or_raise(stream)
        await until(lambda: not nodes.server.circuits)
        assert nodes.server.carried_bytes < 2_000_000


async def test_a_circuit_ends_in_its_time() -> None:
    async with relayed(replace(RELAY, relay=RelayLimits(duration=3))) as nodes:
        await nodes.connect()
        await until(lambda: not nodes.server.circuits)
        await until(lambda: nodes.source.path(nodes.target.peer) is None)


async def test_a_limited_rate_still_carries_everything() -> None:
    async with relayed(replace(RELAY, relay=RelayLimits(bandwidth=4e6, bandwidth_per_peer=3e6))) as nodes:
        await nodes.connect()
        stream = await nodes.source.open_stream(nodes.target.peer, PROTOCOL)
        assert await both_ways(stream, DATA[:1_000_000]) == DATA[:1_000_000]


async def test_a_greedy_peer_gives_way_when_the_relay_is_full() -> None:
    async with (
        relayed(replace(RELAY, relay=RelayLimits(circuits=3))) as nodes,
        networks(4) as (_, _, third, fourth),
    ):
        for _ in range(3):
            await nodes.source.dial(nodes.target.peer, circuit_of(nodes.target))
        for other in (third, fourth):
            await join(other, nodes.relay)
        await third.dial(nodes.target.peer, circuit_of(nodes.target))
        with pytest.raises(NetworkError, match="no room"):
            await nodes.source.dial(nodes.target.peer, circuit_of(nodes.target))
        await until(lambda: sum(c.source == nodes.source.peer for c in nodes.server.circuits) == 2)
        assert kind(third, nodes.target) is PathKind.RELAYED


async def test_a_full_relay_refuses_places() -> None:
    async with relayed(replace(RELAY, relay=RelayLimits(reservations=1))) as nodes:
        assert await asked(nodes, Reserve()) == Answer(Status.RESERVATION_REFUSED)


# ---- lies, garbage, silence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"\x00", b"\x03xyz", wire.encode_hop_answer(Answer(100)), b"\xff\xff\xff\xff"]
)
async def test_garbage_at_a_relay_is_answered_and_harms_nobody(data: bytes) -> None:
    async with relayed() as nodes:
        await nodes.connect()
        async with await nodes.source.open_stream(nodes.relay.peer, wire.HOP) as stream:
            await stream.send_all(data)
            answer = wire.decode_hop_answer(await receive_frame(stream, wire.MAX_MESSAGE))
            assert answer == Answer(Status.MALFORMED_MESSAGE)
        await answers(nodes.source, nodes.target)


async def test_silence_and_vanishing_clients_cost_a_relay_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_server, "REQUEST_LIMIT", 0.2)
    async with relayed() as nodes:
        silent = await nodes.source.open_stream(nodes.relay.peer, wire.HOP)
        await silent.send_all(b"")
        await silent.send_all(b"\x02")
        with pytest.raises(StreamReset):
            await silent.receive_some()
        monkeypatch.undo()
        for _ in range(5):
            stream = await nodes.source.open_stream(nodes.relay.peer, wire.HOP)
            await stream.send_all(wire.encode_hop_request(Connect(nodes.target.peer)))
            stream.reset()
        await until(lambda: not nodes.server.circuits)
        await nodes.connect()
        await answers(nodes.source, nodes.target)


@pytest.mark.parametrize("said", [wire.encode_stop_answer(203), b"\x02xx", b"", None])
async def test_a_target_that_will_not_is_told_of_and_costs_nothing(
    said: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_server, "STOP_LIMIT", 0.3)
    async with relayed() as nodes:

        async def unwilling(stream: Stream) -> None:
            await receive_frame(stream, wire.MAX_MESSAGE)
            if said is None:
                await trio.sleep_forever()
            await stream.send_all(said)

        nodes.target.set_handler(wire.STOP, unwilling, admitted_only=False)
        with pytest.raises(NetworkError, match="could not reach the peer"):
            await nodes.source.dial(nodes.target.peer, circuit_of(nodes.target))
        assert nodes.server.circuits == ()


async def test_a_target_that_agrees_and_says_nothing_more_costs_a_failed_dial() -> None:
    async with relayed() as nodes:

        async def mute(stream: Stream) -> None:
            await receive_frame(stream, wire.MAX_MESSAGE)
            await stream.send_all(wire.encode_stop_answer(100))
            await stream.send_all(b"not multistream\n")

        nodes.target.set_handler(wire.STOP, mute, admitted_only=False)
        with pytest.raises(NetworkError):
            await nodes.source.dial(nodes.target.peer, circuit_of(nodes.target))
        await until(lambda: not nodes.server.circuits)


@pytest.mark.parametrize(
    "said", [b"\x02xx", b"", wire.encode_hop_answer(Answer(100)), wire.encode_hop_answer(Answer(999))]
)
async def test_a_relay_that_makes_no_sense_is_no_relay(said: bytes) -> None:
    async with networks(3) as (fake, target, source):

        async def serve(stream: Stream) -> None:
            await receive_frame(stream, wire.MAX_MESSAGE)
            await stream.send_all(said)

        fake.set_handler(wire.HOP, serve, admitted_only=False)
        await join(target, fake)
        await join(source, fake)
        target.set_relays([address_of(fake)])
        with pytest.raises(NetworkError):
            await source.dial(target.peer, f"{address_of(fake)}/p2p-circuit")
        assert target.relaying.client.relays == ()


@pytest.mark.parametrize("address", [f"/dns4/{'.'.join(['a' * 49] * 4)}/tcp/1", "/ip4/192.0.2.9/udp/1"])
async def test_what_a_relay_calls_itself_is_told_on_only_if_it_can_be_dialled(address: str) -> None:
    async with networks(1) as (target,), networks_of(77) as (relay,):
        server = relay.relaying.server
        assert server is not None
        server._addresses = lambda: (address, "/ip4/192.0.2.1/tcp/4001")
        await take_place(target, relay)
        told = [a for a in target.addresses() if "/p2p-circuit" in a]
        assert f"/ip4/192.0.2.1/tcp/4001/p2p/{relay.peer}/p2p-circuit" in told
        assert not any(a.startswith(address) for a in told)


async def test_nobody_keeps_a_place_who_is_gone_already(monkeypatch: pytest.MonkeyPatch) -> None:
    async with relayed() as nodes:
        held = nodes.server.reservations
        stream = await nodes.source.open_stream(nodes.relay.peer, wire.HOP)
        monkeypatch.setattr(nodes.relay, "path", lambda peer: None)  # as when it hung up right after asking
        await stream.send_all(wire.encode_hop_request(Reserve()))
        with pytest.raises((StreamReset, trio.BrokenResourceError)):
            await receive_frame(stream, wire.MAX_MESSAGE)
        assert nodes.server.reservations == held


async def test_cancelling_a_dial_leaves_nothing() -> None:
    async with relayed() as nodes:
        for checkpoints in range(0, 60, 4):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(nodes.source.dial, nodes.target.peer, circuit_of(nodes.target))
                    for _ in range(checkpoints):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            await nodes.source.disconnect(nodes.target.peer)
        await until(lambda: not nodes.server.circuits)
        await nodes.connect()
        await answers(nodes.source, nodes.target)


@pytest.mark.parametrize(
    "text", ["", "/ip4/192.0.2.1/tcp/1", "/p2p/QmX", "/ip4/192.0.2.1/tcp/1/p2p/a/b", "/p2p-circuit"]
)
def test_what_names_no_relay_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="names no relay"):
        split_relay(text)


async def both_ways_or_raise(stream: Stream) -> None:
    while True:
        await stream.send_all(bytes(65536))
        await stream.receive_some()
