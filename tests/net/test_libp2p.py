"""The adapter on real sockets: who may open what, and what strangers, garbage and failures cannot do."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio
import trio.testing

from libmesh import keys
from libmesh.errors import AddressUnavailable, PeerUnreachable
from libmesh.net.base import NetworkEvent, PeerConnected, PeerDisconnected, Stream, StreamReset
from libmesh.net.gossip import PROTOCOLS as GOSSIP_PROTOCOLS
from libmesh.net.libp2p import Libp2pConfig, open_libp2p_network
from libmesh.net.lines import encode_line
from libmesh.net.tcp import multiaddr_of
from libmesh.peers import PathKind, PeerId
from tests.members import peer, seed
from tests.net.hosts import HOSTS, LOCAL, PROTOCOL, answers, collect, echo, join, networks, until

# ── connecting ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_peer_is_reached_behind_addresses_that_are_dead() -> None:
    async with networks(2) as (one, two):
        (address,) = two.addresses()
        dead = (multiaddr_of("127.0.0.1", 1), "/ip4/127.0.0.1/udp/1/quic-v1", "nonsense")
        path = await one.connect(two.peer, (*dead, address))
        assert path.kind is PathKind.DIRECT
        assert path.address.startswith("/ip4/127.0.0.1/tcp/")


async def test_an_unreachable_peer_says_why_for_each_address_and_is_not_held_against_it() -> None:
    async with networks(2) as (one, two):
        dead = multiaddr_of("127.0.0.1", 1)
        with pytest.raises(PeerUnreachable) as caught:
            await one.connect(two.peer, (dead, "nonsense"))
        assert caught.value.attempts.keys() == {dead, "nonsense"}
        assert "refused" in caught.value.attempts[dead]
        with pytest.raises(PeerUnreachable, match="no address is known"):
            await one.connect(two.peer, ())
        await join(one, two)


async def test_another_peer_behind_the_address_is_not_taken_for_the_one_wanted() -> None:
    async with networks(2) as (one, two):
        with pytest.raises(PeerUnreachable):
            await one.connect(peer(9), two.addresses())
        assert one.path(two.peer) is None
        assert one.path(peer(9)) is None
        await join(one, two)


async def test_a_text_that_is_no_peer_id_is_unreachable() -> None:
    async with networks(2) as (one, two):
        for text in ("nonsense", "", "0OIl"):
            with pytest.raises(PeerUnreachable):
                await one.connect(PeerId(text), two.addresses())
            with pytest.raises(PeerUnreachable):
                await one.open_stream(PeerId(text), PROTOCOL)
            assert one.path(PeerId(text)) is None


async def test_a_port_that_is_taken_is_said() -> None:
    async with networks(1) as (one,):
        with pytest.raises(AddressUnavailable, match=str(one.port)):
            async with open_libp2p_network(seed(2), Libp2pConfig(hosts=HOSTS, port=one.port)):
                pass


async def test_a_port_is_free_again_after_closing() -> None:
    async with networks(2) as (one, two):
        await join(one, two)
        port = one.port
    async with open_libp2p_network(seed(1), Libp2pConfig(hosts=HOSTS, port=port)) as again:
        assert again.port == port


async def test_peer_ids_are_those_of_the_keys() -> None:
    async with networks(1) as (one,):
        assert one.peer == keys.peer_id_of(keys.public_key(seed(1)))


async def test_announced_addresses_come_first_and_none_is_unspecified() -> None:
    config = Libp2pConfig(hosts=("0.0.0.0",), announce=("/dns/example.com/tcp/443",))
    async with networks(1, config) as (one,):
        addresses = one.addresses()
    assert addresses[0] == "/dns/example.com/tcp/443"
    assert len(addresses) > 1
    assert not [address for address in addresses if "0.0.0.0" in address]


async def test_both_sides_are_told_of_a_connection_once_and_of_its_end() -> None:
    async with networks(2) as (one, two), trio.open_nursery() as nursery:
        seen: dict[PeerId, list[NetworkEvent]] = {one.peer: [], two.peer: []}
        for network in (one, two):
            nursery.start_soon(collect, network, seen[network.peer])
        await join(one, two)
        await one.connect(two.peer, two.addresses())
        await one.disconnect(two.peer)
        await until(lambda: all(len(events) == 2 for events in seen.values()))
        for me, other, inbound in ((one, two, False), (two, one, True)):
            connected, gone = seen[me.peer]
            assert isinstance(connected, PeerConnected)
            assert (connected.peer, connected.inbound) == (other.peer, inbound)
            assert gone == PeerDisconnected(other.peer)
        nursery.cancel_scope.cancel()


async def test_the_times_of_the_keepalive_are_those_of_the_configuration() -> None:
    config = Libp2pConfig(hosts=("127.0.0.1",), ping_interval=3.0, ping_timeout=2.0)
    async with networks(2, config) as (one, two):
        await join(one, two)
        for network, peer in ((one, two.peer), (two, one.peer)):
            (connection,) = network._connections.of(peer)
            keepalive = connection.muxed_conn._machine.keepalive
            assert (keepalive._interval, keepalive._timeout) == (3.0, 2.0)


async def test_a_time_that_cannot_work_is_named() -> None:
    with pytest.raises(ValueError, match="ping_timeout"):
        async with open_libp2p_network(seed(1), Libp2pConfig(ping_timeout=0.0)):
            raise AssertionError("it opened")


# ── strangers ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("protocol", [PROTOCOL, *GOSSIP_PROTOCOLS])
async def test_a_stranger_can_open_nothing(protocol: str) -> None:
    async with networks(2) as (one, two):
        two.set_handler(PROTOCOL, echo)
        await join(one, two, admit=False)
        stream = await one.open_stream(two.peer, protocol)
        await stream.send_all(b"let me in")
        with trio.fail_after(60), pytest.raises(StreamReset):
            await stream.receive_some()


async def test_a_stranger_may_open_what_is_for_strangers() -> None:
    async with networks(2) as (one, two):
        two.set_handler(PROTOCOL, echo, admitted_only=False)
        await join(one, two, admit=False)
        await answers(one, two)


async def test_a_stream_that_came_before_its_admission_is_held_until_then() -> None:
    config = Libp2pConfig(hosts=HOSTS, admission_limit=60)
    async with networks(2, config) as (one, two):
        two.set_handler(PROTOCOL, echo)
        await join(one, two, admit=False)
        stream = await one.open_stream(two.peer, PROTOCOL)
        await stream.send_all(b"early")
        await trio.sleep(0.05)
        two.admit(one.peer)
        with trio.fail_after(60):
            assert await stream.receive_some() == b"early"


async def test_a_strangers_further_streams_are_reset_at_once() -> None:
    config = Libp2pConfig(hosts=HOSTS, admission_limit=60, max_waiting=3)
    async with networks(2, config) as (one, two):
        two.set_handler(PROTOCOL, echo)
        await join(one, two, admit=False)
        held = [await one.open_stream(two.peer, PROTOCOL) for _ in range(3)]
        for stream in held:
            await stream.send_all(b"x")
        await until(lambda: two._connections.peers[one.peer].waiting == 3)
        further = await one.open_stream(two.peer, PROTOCOL)
        with trio.fail_after(60), pytest.raises(StreamReset):
            await further.receive_some()
        two.admit(one.peer)
        with trio.fail_after(60):
            assert [await stream.receive_some() for stream in held] == [b"x"] * 3


async def test_admission_ends_with_the_connection() -> None:
    async with networks(2) as (one, two):
        two.set_handler(PROTOCOL, echo)
        await join(one, two)
        await answers(one, two)
        await one.disconnect(two.peer)
        await until(lambda: two.path(one.peer) is None and one.path(two.peer) is None)
        await join(one, two, admit=False)
        stream = await one.open_stream(two.peer, PROTOCOL)
        with trio.fail_after(60), pytest.raises(StreamReset):
            await stream.receive_some()


async def test_a_handler_that_raises_is_logged_and_leaves_the_host_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(stream: Stream) -> None:
        await stream.receive_some()
        raise ValueError("on purpose")

    async with networks(2) as (one, two):
        two.set_handler("/fail/1", fail)
        two.set_handler(PROTOCOL, echo)
        await join(one, two)
        stream = await one.open_stream(two.peer, "/fail/1")
        await stream.send_all(b"x")
        with trio.fail_after(60), pytest.raises(StreamReset):
            await stream.receive_some()
        assert "the handler of /fail/1 failed" in caplog.text
        await answers(one, two)


@pytest.mark.parametrize("security", ["/plaintext/2.0.0", "/secio/1.0.0", "/mplex/6.7.0"])
async def test_no_security_but_noise_and_tls_is_spoken(security: str) -> None:
    async with networks(1) as (one,):
        async with await trio.open_tcp_stream("127.0.0.1", one.port) as stream:
            await stream.send_all(encode_line("/multistream/1.0.0") + encode_line(security))
            said = b""
            with trio.fail_after(60), suppress(trio.BrokenResourceError):
                while b"na\n" not in said and (data := await stream.receive_some()):
                    said += data
        assert security.encode() not in said
        assert one._swarm.get_total_connections() == 0


GARBAGE = (b"", b"\0" * 1000, b"\xff" * 1000, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(range(256)) * 40)


async def test_garbage_and_half_open_connections_do_not_stop_a_join() -> None:
    config = Libp2pConfig(hosts=HOSTS, max_handshakes=64, handshake_limit=30)
    async with networks(2, config) as (one, two), trio.open_nursery() as nursery:
        one.set_handler(PROTOCOL, echo)
        hold = trio.Event()

        async def pester(number: int) -> None:
            with suppress(OSError, trio.BrokenResourceError):
                async with await trio.open_tcp_stream("127.0.0.1", one.port) as stream:
                    await stream.send_all(GARBAGE[number % len(GARBAGE)] or b"\x13")
                    await hold.wait()

        for number in range(400):
            nursery.start_soon(pester, number)
        await trio.sleep(0.1)
        with trio.fail_after(60):
            await join(two, one)
        await answers(two, one)
        assert len(one._connections.handshakes) <= 64
        hold.set()


async def test_a_handshake_that_goes_nowhere_ends() -> None:
    config = Libp2pConfig(hosts=HOSTS, handshake_limit=0.2)
    async with networks(1, config) as (one,):
        async with await trio.open_tcp_stream("127.0.0.1", one.port) as stream:
            with trio.fail_after(60), suppress(trio.BrokenResourceError):
                while await stream.receive_some():
                    pass
        await until(lambda: not one._connections.handshakes)


# ── lasting ──────────────────────────────────────────────────────────────────────────────────────────────────────


def tasks(nursery: trio.Nursery) -> int:
    """All tasks below a nursery."""
    return sum(1 + sum(tasks(child) for child in task.child_nurseries) for task in nursery.child_tasks)


async def test_connections_that_come_and_go_leave_nothing_and_none_is_refused() -> None:
    """More than `max_connections` of them, one after the other: slots that leak would show."""
    config = Libp2pConfig(hosts=HOSTS, max_connections=10)
    async with networks(2, config) as (one, two):
        two.set_handler(PROTOCOL, echo)

        def alive() -> int:
            root = trio.lowlevel.current_root_task()
            assert root is not None
            return sum(tasks(nursery) for nursery in root.child_nurseries)

        async def come_and_go(times: int) -> None:
            for _ in range(times):
                await join(one, two)
                await answers(one, two)
                await one.disconnect(two.peer)
                await until(lambda: two.path(one.peer) is None)

        await come_and_go(10)
        await trio.sleep(0.2)
        before = alive()
        await come_and_go(50)
        await until(lambda: alive() <= before + 2)
        for network in (one, two):
            await until(lambda network=network: network._swarm.get_total_connections() == 0)  # type: ignore[misc]
            assert network._connections.peers == {}
            assert network._dialling == {}


async def test_many_different_peers_that_come_and_go_leave_nothing() -> None:
    config = Libp2pConfig(hosts=HOSTS, max_connections=10)
    async with networks(1, config) as (one,):
        one.set_handler(PROTOCOL, echo, admitted_only=False)
        for number in range(15):
            async with open_libp2p_network(seed(100 + number), LOCAL) as guest:
                await guest.connect(one.peer, one.addresses())
                await answers(guest, one)
        await until(lambda: one._connections.peers == {})
        await until(lambda: one._swarm.get_total_connections() == 0)
