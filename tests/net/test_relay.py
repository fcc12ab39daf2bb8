"""A relay of ours and its clients, over real sockets: who gets in, what crosses, what ends with what."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import trio

from libmesh.errors import NetworkError
from libmesh.framing import receive_frame
from libmesh.net import relay_client, relay_server
from libmesh.net import relay_wire as wire
from libmesh.net.base import Stream, StreamReset
from libmesh.net.relay_wire import Answer, Connect, Reserve, Status
from libmesh.peers import PathKind
from tests.members import peer
from tests.net.hosts import PROTOCOL, answers, join, networks, until
from tests.net.pairs import fill
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


# ---- what crosses -------------------------------------------------------------------------------------------------


async def test_a_circuit_is_a_connection_like_any_other_with_proof_of_the_peer_at_its_end() -> None:
    async with relayed() as nodes:
        path = await nodes.source.dial(nodes.target.peer, circuit_of(nodes.target))
        assert path.kind is PathKind.RELAYED
        assert path.address == circuit_of(nodes.target)
        await until(lambda: kind(nodes.target, nodes.source) is PathKind.RELAYED)
        nodes.target.admit(nodes.source.peer)
        stream = await nodes.source.open_stream(nodes.target.peer, PROTOCOL)
        assert await both_ways(stream, DATA) == DATA
        assert [(c.source, c.target) for c in nodes.server.circuits] == [
            (nodes.source.peer, nodes.target.peer)
        ]


async def test_the_relay_sees_ciphertext_only(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = bytearray()
    original = relay_server.join_streams

    async def spied(near: object, far: object, **kwargs: object) -> None:
        for stream in (near, far):
            send = stream.send_nowait  # type: ignore[attr-defined]

            def listening(data: bytes, send: object = send) -> int:
                passed.extend(data)
                return send(data)  # type: ignore[operator, no-any-return]

            stream.send_nowait = listening  # type: ignore[attr-defined]
        await original(near, far, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(relay_server, "join_streams", spied)
    async with relayed() as nodes:
        await nodes.connect()
        secret = b"nobody else's business " * 1000
        assert await both_ways(await nodes.source.open_stream(nodes.target.peer, PROTOCOL), secret) == secret
        assert len(passed) > 2 * len(secret)
        assert b"business" not in passed


async def test_a_peer_that_is_not_the_one_at_the_other_end_is_not_taken_for_it() -> None:
    async with relayed() as nodes, networks(3) as (_, _, third):
        await take_place(third, nodes.relay)
        with pytest.raises(NetworkError):
            await nodes.source.dial(peer(50), circuit_of(third))
        assert nodes.source.path(peer(50)) is None


async def test_many_streams_and_a_slow_reader_do_not_disturb_each_other() -> None:
    async with relayed() as nodes:
        never = trio.Event()

        async def sleepy(stream: Stream) -> None:
            await never.wait()

        nodes.target.set_handler("/sleepy/1", sleepy)
        await nodes.connect()

        async def flood() -> None:
            stream = await nodes.source.open_stream(nodes.target.peer, "/sleepy/1")
            with pytest.raises((StreamReset, trio.ClosedResourceError)):
                await fill(stream)

        async def carry() -> None:
            stream = await nodes.source.open_stream(nodes.target.peer, PROTOCOL)
            assert await both_ways(stream, DATA[: 256 * 1024]) == DATA[: 256 * 1024]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            async with trio.open_nursery() as carrying:
                for _ in range(8):
                    carrying.start_soon(carry)
            await nodes.source.disconnect(nodes.target.peer)


# ---- what ends with what ------------------------------------------------------------------------------------------


async def test_circuits_to_one_peer_do_not_end_each_other() -> None:
    async with relayed() as nodes, networks(3) as (_, _, third):
        await nodes.connect()
        await join(third, nodes.relay)
        await third.dial(nodes.target.peer, circuit_of(nodes.target))
        await until(lambda: len(nodes.server.circuits) == 2)
        await third.disconnect(nodes.target.peer)
        await until(lambda: len(nodes.server.circuits) == 1)
        await answers(nodes.source, nodes.target)


async def test_a_circuit_ends_for_both_when_either_side_closes_it() -> None:
    async with relayed() as nodes:
        await nodes.connect()
        stream = await nodes.source.open_stream(nodes.target.peer, PROTOCOL)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
        await nodes.target.disconnect(nodes.source.peer)
        with pytest.raises(StreamReset):
            await stream.receive_some()
        await until(lambda: not nodes.server.circuits)
        await until(lambda: nodes.source.path(nodes.target.peer) is None)


async def test_the_end_of_the_relay_is_the_end_of_its_circuits_and_a_new_one_is_used() -> None:
    async with networks(2) as (target, source), networks_of(78, 79) as (second, third):
        async with networks_of(77) as (first,):
            for relay in (first, second, third):
                await join(target, relay)
                await join(source, relay)
            target.set_relays([address_of(relay) for relay in (first, second, third)])
            await until(lambda: target.relaying.client.relays == (first.peer, second.peer))
            await source.dial(target.peer, circuit_of(target))
        await until(lambda: source.path(target.peer) is None)
        await until(lambda: target.relaying.client.relays == (second.peer, third.peer))
        await source.dial(target.peer, circuit_of(target))
        assert kind(source, target) is PathKind.RELAYED


async def test_a_relay_that_comes_back_is_used_again() -> None:
    async with networks(1) as (target,):
        async with networks_of(77) as (relay,):
            port, where = relay.port, address_of(relay)
            target.set_relays([where])
            await until(lambda: relay.path(target.peer))
            relay.admit(target.peer)
            await until(lambda: target.relaying.client.relays)
        await until(lambda: not target.relaying.client.relays)
        config = replace(RELAY, port=port, relay_open=True)
        async with networks_of(77, config=config):
            await until(lambda: target.relaying.client.relays)


async def test_which_relays_there_are_how_far_they_are_and_why_one_is_not_used_is_told() -> None:
    async with networks(1) as (target,):
        async with networks_of(77) as (relay,):
            target.set_relays([f"/ip4/127.0.0.1/tcp/1/p2p/{peer(5)}", address_of(relay)])
            await until(lambda: relay.path(target.peer))
            relay.admit(target.peer)
            await until(lambda: target.reaching().relays[0].failure)
            await until(lambda: target.reaching().relays[1].held and target.reaching().relays[1].rtt)
            refused, used = target.reaching().relays
            assert (refused.held, refused.rtt) == (False, None)
            assert "connection refused" in refused.failure
            assert (used.relay, used.address, used.failure) == (relay.peer, relay.addresses()[0], "")
        await until(lambda: target.reaching().relays[1].failure)
        assert not target.reaching().relays[1].held


async def test_a_relay_that_falls_silent_is_given_up_for_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_client, "WATCH_LIMIT", 1.0)
    monkeypatch.setattr(relay_client, "WATCH_EVERY", 0.2)

    async def silent(stream: Stream) -> None:
        await trio.sleep_forever()

    async with (
        networks(1) as (target,),
        networks_of(77, 78, 79, config=replace(RELAY, relay_open=True)) as relays,
    ):
        relays[0].set_handler(relay_client.PING, silent, admitted_only=False)
        target.set_relays([address_of(relay) for relay in relays])
        first, second, third = (relay.peer for relay in relays)
        await until(lambda: target.relaying.client.relays == (first, second))
        await until(lambda: target.relaying.client.relays == (second, third))
        assert target.path(first) is not None


async def test_others_are_told_the_addresses_of_a_relay_that_may_lead_there() -> None:
    async with relayed() as nodes:
        client, relay = nodes.target.relaying.client, nodes.relay.peer
        assert client.circuits() == (f"{address_of(nodes.relay)}/p2p-circuit",), (
            "it has no other than loopback"
        )
        here, far = nodes.relay.addresses()[0], [f"/ip4/192.0.2.{n}/tcp/4001" for n in range(1, 6)]
        client._granted[relay] = (here, "/ip6/::1/tcp/4001", *far)
        assert client.circuits() == tuple(f"{way}/p2p/{relay}/p2p-circuit" for way in far[:3])


async def test_others_are_told_where_a_relay_takes_websockets() -> None:
    async with relayed(replace(RELAY, websocket_port=0)) as nodes:
        web = [circuit for circuit in nodes.target.relaying.circuits() if "/ws/p2p/" in circuit]
        assert len(web) == 1
        assert (await nodes.source.dial(nodes.target.peer, web[0])).kind is PathKind.RELAYED


# ---- who gets in --------------------------------------------------------------------------------------------------


async def test_strangers_learn_nothing_not_even_who_is_there() -> None:
    async with relayed() as nodes, networks(3) as (_, _, stranger):
        await join(stranger, nodes.relay, admit=False)
        for request in (Connect(nodes.target.peer), Connect(peer(51)), Reserve()):
            stream = await stranger.open_stream(nodes.relay.peer, wire.HOP)
            await stream.send_all(wire.encode_hop_request(request))
            with pytest.raises(StreamReset):
                await stream.receive_some()


async def test_who_has_no_place_and_who_is_not_there_look_the_same() -> None:
    async with relayed() as nodes, networks(3) as (_, _, third):
        await join(third, nodes.relay)
        for target in (third.peer, peer(51), nodes.source.peer):
            assert await asked(nodes, Connect(target)) == Answer(Status.NO_RESERVATION)


async def test_an_open_relay_serves_whoever_comes() -> None:
    async with (
        networks_of(77, config=replace(RELAY, relay_open=True)) as (relay,),
        networks(2) as (target, source),
    ):
        target.set_relays([address_of(relay)])
        await until(lambda: target.relaying.client.relays)
        await source.dial(target.peer, circuit_of(target))
        assert kind(source, target) is PathKind.RELAYED


async def test_nothing_is_relayed_over_what_is_relayed_itself() -> None:
    async with relayed(RELAY) as nodes, networks_of(79) as (inner,):
        inner.set_relays([address_of(nodes.relay)])
        await until(lambda: nodes.relay.path(inner.peer))
        nodes.relay.admit(inner.peer)
        await until(lambda: inner.relaying.client.relays)
        await nodes.source.dial(inner.peer, circuit_of(inner))
        await until(lambda: kind(inner, nodes.source))
        inner.admit(nodes.source.peer)
        for request in (Reserve(), Connect(nodes.target.peer)):
            async with await nodes.source.open_stream(inner.peer, wire.HOP) as stream:
                await stream.send_all(wire.encode_hop_request(request))
                answer = wire.decode_hop_answer(await receive_frame(stream, wire.MAX_MESSAGE))
                assert answer == Answer(Status.PERMISSION_DENIED)


async def test_only_a_relay_that_one_uses_may_lead_somebody_here() -> None:
    async with relayed() as nodes, await nodes.source.open_stream(nodes.relay.peer, wire.STOP) as stream:
        await stream.send_all(wire.encode_stop_request(Connect(peer(51))))
        status = wire.decode_stop_answer(await receive_frame(stream, wire.MAX_MESSAGE))
        assert status == Status.PERMISSION_DENIED


async def test_a_node_leads_nobody_back_to_itself() -> None:
    async with relayed() as nodes:
        with pytest.raises(NetworkError, match="is that relay"):
            await nodes.relay.dial(nodes.target.peer, circuit_of(nodes.target))
