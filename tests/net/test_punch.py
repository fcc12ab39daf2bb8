"""Hole punching on loopback, where nothing is in the way: the agreement, the roles, and what must not come of it."""

from __future__ import annotations

import pytest
import trio

from libmesh.errors import NetworkError
from libmesh.framing import receive_frame
from libmesh.net import punch, tcp
from libmesh.net import relay_wire as wire
from libmesh.net.base import Stream, StreamReset
from libmesh.net.libp2p import Libp2pNetwork
from libmesh.net.relay_wire import PunchAddresses, PunchNow
from libmesh.peers import Path, PathKind
from tests.net.hosts import PROTOCOL, answers, join, networks, until
from tests.net.pairs import drain
from tests.net.relayed import circuit_of, kind, relayed

NOWHERE = "/ip4/127.0.0.1/tcp/1"


async def say(stream: Stream, message: PunchAddresses | PunchNow) -> None:
    await stream.send_all(wire.encode_punch(message))


async def hear(stream: Stream) -> PunchAddresses | PunchNow:
    return wire.decode_punch(await receive_frame(stream, wire.MAX_MESSAGE))


@pytest.fixture
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punch, "DIAL_TIME", 0.3)
    monkeypatch.setattr(punch, "SYNC_LIMIT", 0.3)


@pytest.mark.parametrize("asker", ["target", "source"])
async def test_either_side_may_ask_and_both_come_to_a_punched_path(asker: str) -> None:
    async with relayed() as nodes:
        await nodes.connect()
        near, far = nodes.target, nodes.source
        if asker == "source":
            near, far = far, near
        path = await near.punch(far.peer)
        assert path.kind is PathKind.PUNCHED
        await until(lambda: kind(near, far) is PathKind.PUNCHED and kind(far, near) is PathKind.PUNCHED)
        await answers(nodes.source, nodes.target)


async def test_a_dial_that_overtakes_the_sign_to_start_belongs_to_the_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sign takes another way, over the relay. Taken for any connection, the path would be direct here, punched there."""
    async with relayed() as nodes:
        dialled = trio.Event()
        take, meet = nodes.source.puncher.take, nodes.source.puncher._meet

        def tell(stream: trio.SocketStream) -> bool:
            dialled.set()
            return take(stream)

        async def hear_the_sign_late(attempt: punch._Attempt) -> Path:
            await dialled.wait()
            return await meet(attempt)

        await nodes.connect()
        monkeypatch.setattr(nodes.source.puncher, "take", tell)
        monkeypatch.setattr(nodes.source.puncher, "_meet", hear_the_sign_late)
        assert (await nodes.target.punch(nodes.source.peer)).kind is PathKind.PUNCHED
        await until(lambda: kind(nodes.source, nodes.target) is PathKind.PUNCHED)
        await answers(nodes.source, nodes.target)


async def test_holes_are_punched_over_ipv6_too() -> None:
    async with relayed(hosts=("::1",)) as nodes:
        await nodes.connect()
        path = await nodes.target.punch(nodes.source.peer)
        assert path.kind is PathKind.PUNCHED
        assert path.address.startswith("/ip6/::1/")


async def test_what_runs_over_the_relay_goes_on_there() -> None:
    async with relayed() as nodes:
        await nodes.connect()
        stream = await nodes.source.open_stream(nodes.target.peer, PROTOCOL)
        await stream.send_all(b"before")
        assert await stream.receive_some() == b"before"
        await nodes.target.punch(nodes.source.peer)
        await until(lambda: kind(nodes.source, nodes.target) is PathKind.PUNCHED)
        await stream.send_all(b"after")
        assert await stream.receive_some() == b"after"


async def test_both_sides_asking_at_once_do_not_stand_in_each_others_way() -> None:
    async with relayed() as nodes:
        await nodes.connect()
        done: list[Path] = []

        async def ask(near: Libp2pNetwork, far: Libp2pNetwork) -> None:
            done.append(await near.punch(far.peer))

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(ask, nodes.source, nodes.target)
                nursery.start_soon(ask, nodes.target, nodes.source)
        assert {path.kind for path in done} == {PathKind.PUNCHED}
        await answers(nodes.source, nodes.target)


async def test_a_listener_that_does_not_know_whom_it_accepts_is_spoken_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As ours does not, when a router shows another address than was told."""
    async with relayed() as nodes:
        monkeypatch.setattr(nodes.source.puncher, "take", lambda stream: False)

        async def no_dial(*_: object) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(nodes.source.puncher, "_dial", no_dial)
        await nodes.connect()
        assert (await nodes.target.punch(nodes.source.peer)).kind is PathKind.PUNCHED
        await until(lambda: kind(nodes.source, nodes.target) is PathKind.DIRECT)
        await answers(nodes.source, nodes.target)


async def test_a_listener_that_waits_to_be_spoken_to_is_spoken_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """As js-libp2p's does, which knows nothing of punches."""
    async with relayed() as nodes, trio.open_nursery() as nursery:

        async def agree_and_do_nothing(stream: Stream) -> None:
            await hear(stream)
            await say(stream, PunchAddresses(nodes.source.addresses()))
            await hear(stream)

        async def answer_when_spoken_to(stream: trio.SocketStream) -> None:
            await trio.lowlevel.wait_readable(stream.socket)
            await nodes.source.adopt(stream, peer=None, initiator=False, address="", kind=PathKind.DIRECT)

        def take(stream: trio.SocketStream) -> bool:
            nursery.start_soon(answer_when_spoken_to, stream)
            return True

        monkeypatch.setattr(nodes.source.puncher, "take", take)
        nodes.source.set_handler(wire.DCUTR, agree_and_do_nothing)
        await nodes.connect()
        assert (await nodes.target.punch(nodes.source.peer)).kind is PathKind.PUNCHED
        await until(lambda: kind(nodes.source, nodes.target) is PathKind.DIRECT)
        await answers(nodes.source, nodes.target)


async def test_a_peer_with_a_direct_path_needs_no_punch() -> None:
    async with networks(2) as (near, far):
        await join(near, far)
        assert (await near.punch(far.peer)).kind is PathKind.DIRECT


async def test_without_a_relayed_path_there_is_nothing_to_punch_over() -> None:
    async with networks(2) as (near, far):
        with pytest.raises(NetworkError, match="no relayed connection"):
            await near.punch(far.peer)


async def test_a_peer_that_knows_nothing_of_punches_stays_relayed() -> None:
    async with relayed() as nodes:
        await nodes.connect()
        del nodes.source._server.handlers[wire.DCUTR]
        with pytest.raises(NetworkError, match="does not take part"):
            await nodes.target.punch(nodes.source.peer)
        await answers(nodes.source, nodes.target)


async def test_strangers_cannot_make_us_dial() -> None:
    async with relayed() as nodes:
        await nodes.source.dial(nodes.target.peer, circuit_of(nodes.target))
        nodes.source.admit(nodes.target.peer)
        stream = await nodes.source.open_stream(nodes.target.peer, wire.DCUTR)
        await say(stream, PunchAddresses((NOWHERE,)))
        with pytest.raises(StreamReset):
            await stream.receive_some()


async def test_what_the_dials_came_to_is_told_rather_than_that_a_later_attempt_was_declined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcomes = [NetworkError("a: no answer"), punch._Declined("not now"), punch._Declined("not now")]

    async def once(*_: object) -> None:
        raise outcomes.pop(0)

    monkeypatch.setattr(punch, "_BETWEEN", 0.1)
    monkeypatch.setattr(punch.Puncher, "_punch_once", once)
    async with relayed() as nodes:
        await nodes.connect()
        began = trio.current_time()
        with pytest.raises(NetworkError, match="a: no answer"):
            await nodes.target.punch(nodes.source.peer)
        assert trio.current_time() - began >= 0.2, "the other side was left no time between the attempts"
    assert not outcomes


async def test_who_was_asked_instead_tells_what_its_own_dials_came_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(punch.Puncher, "_own_addresses", lambda self: (NOWHERE,))
    monkeypatch.setattr(punch, "DIAL_TIME", 0.5)
    told: list[str] = []

    async def ask(one: Libp2pNetwork, other: Libp2pNetwork) -> None:
        with pytest.raises(NetworkError) as failure:
            await one.punch(other.peer)
        told.append(str(failure.value))

    async with relayed() as nodes:
        await nodes.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, nodes.source, nodes.target)
            nursery.start_soon(ask, nodes.target, nodes.source)
    assert all(NOWHERE in reason for reason in told), told  # not that the other one did not take part


async def test_a_failure_names_each_address_and_leaves_the_relayed_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(punch.Puncher, "_own_addresses", lambda self: (NOWHERE,))
    monkeypatch.setattr(punch, "ATTEMPTS", 1)
    async with relayed() as nodes:
        await nodes.connect()
        with pytest.raises(NetworkError, match=r"127\.0\.0\.1/tcp/1: connection refused"):
            await nodes.target.punch(nodes.source.peer)
        assert kind(nodes.target, nodes.source) is PathKind.RELAYED
        await answers(nodes.source, nodes.target)


@pytest.mark.usefixtures("_hurried")
async def test_somebody_else_at_the_address_is_not_taken_for_the_peer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with relayed() as nodes, networks(3) as (_, _, third):
        await nodes.connect()
        monkeypatch.setattr(punch.Puncher, "_own_addresses", lambda self: third.addresses())
        with pytest.raises(NetworkError):
            await nodes.target.punch(nodes.source.peer)
        assert kind(nodes.target, nodes.source) is PathKind.RELAYED


@pytest.mark.usefixtures("_hurried")
@pytest.mark.parametrize("said", [b"\x02\xff\xff", b"\x03\x08\xac\x02", b"", b"\xff\xff\xff\xff", None])
async def test_nonsense_and_silence_end_in_words(said: bytes | None) -> None:
    async with relayed() as nodes:

        async def answer(stream: Stream) -> None:
            await hear(stream)
            if said is None:
                await trio.sleep_forever()
            await stream.send_all(said)

        nodes.source.set_handler(wire.DCUTR, answer)
        await nodes.connect()
        with pytest.raises(NetworkError):
            await nodes.target.punch(nodes.source.peer)
        await answers(nodes.source, nodes.target)


@pytest.mark.usefixtures("_hurried")
@pytest.mark.parametrize(
    "said",
    [
        [],
        [b"\x02\xff\xff"],
        [wire.encode_punch(PunchNow())],
        [wire.encode_punch(PunchAddresses((NOWHERE,)))] * 2,
        [wire.encode_punch(PunchAddresses(())), wire.encode_punch(PunchNow())],
        [wire.encode_punch(PunchAddresses((NOWHERE,))), wire.encode_punch(PunchNow())],
    ],
)
async def test_whoever_asks_for_a_punch_in_nonsense_gets_none(said: list[bytes]) -> None:
    async with relayed() as nodes:
        await nodes.connect()
        stream = await nodes.source.open_stream(nodes.target.peer, wire.DCUTR)
        for data in said:
            await stream.send_all(data)
        with pytest.raises(StreamReset):
            await drain(stream)
        assert kind(nodes.target, nodes.source) is PathKind.RELAYED
        assert nodes.target.puncher._attempts == []


async def test_cancelling_a_punch_leaves_nothing() -> None:
    async with relayed() as nodes:
        await nodes.connect()
        for checkpoints in range(0, 40, 5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(nodes.target.punch, nodes.source.peer)
                for _ in range(checkpoints):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            assert nodes.target.puncher._attempts == []
            assert nodes.target.puncher._running == {}
        await until(lambda: not nodes.source.puncher._answering)
        await nodes.target.punch(nodes.source.peer)
        await answers(nodes.source, nodes.target)


async def test_a_dial_from_the_listeners_port_says_where_one_listens_and_the_port_stays_ours() -> None:
    async with networks(2) as (near, far):
        stream = await tcp.dial_from(near.port, far.addresses()[0])
        assert stream.socket.getsockname()[1] == near.port
        stream.socket.close()
        with pytest.raises(Exception, match="already in use"):
            tcp.open_listeners(("127.0.0.1",), near.port)


OWN = ("/ip4/10.0.0.2/tcp/4001", "/ip6/fd00::2/tcp/4001", "/ip4/127.0.0.1/tcp/4001")


@pytest.mark.parametrize(
    ("address", "dialled"),
    [
        ("/ip4/203.0.113.7/tcp/4001", True),
        ("/ip6/2001:db8::7/tcp/4001", True),
        ("/ip4/203.0.113.7/tcp/4001/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN", True),
        ("/ip4/10.0.0.2/tcp/4002", True),
        ("/ip4/10.0.0.2/tcp/4001", False),
        ("/ip4/127.0.0.1/tcp/4002", False),
        ("/ip4/224.0.0.1/tcp/4001", False),
        ("/ip4/0.0.0.0/tcp/4002", False),
        ("/ip6/::/tcp/4002", False),
        ("/ip6/::ffff:127.0.0.1/tcp/4002", False),
        ("/ip4/203.0.113.7/tcp/0", False),
        ("/dns4/example.org/tcp/4001", False),
        ("/ip4/203.0.113.7/udp/4001", False),
        ("nonsense", False),
    ],
)
def test_only_what_may_lead_to_the_peer_is_dialled(address: str, dialled: bool) -> None:
    assert bool(punch._dialable((address,), OWN)) is dialled
    assert punch._dialable(("/ip6/2001:db8::7/tcp/4001",), OWN[:1]) == (), "no way there from here"
