"""Who lies, provably, is dropped by whoever hears it; nobody is for what others lied, or for old news. In virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import trio
import trio.testing

from libmesh import (
    Mesh,
    PeerState,
    PeerUnreachable,
    Scope,
    Stream,
    StreamReset,
    following,
    syncing,
    tokens,
    wire,
)
from libmesh.core.announcement import Record
from libmesh.core.credentials import Revocation
from libmesh.core.summary import Digest
from libmesh.framing import frame, receive_frame
from tests.members import HOUR, MESH, NOW, OTHER_MESH, credential, invited, peer, record
from tests.town import Town, client_invite, settled, state, town

Said = Record | Revocation

LIES: dict[str, Said] = {
    "another's announcement, unsigned": replace(record(50), signature=bytes(64)),
    "an announcement by whom another was let in": record(50, credential=credential(51)),
    "an announcement by a member of another mesh": record(50, credential=credential(50, mesh=OTHER_MESH)),
    "a member's farewell, unsigned": replace(record(2, incarnation=2**60, leaving=True), signature=bytes(64)),
    "a revocation that nobody signed": replace(MESH.revoke(credential(50).links), signature=bytes(64)),
}

OLD_NEWS: dict[str, Said] = {
    "an announcement that has ended": record(
        50, credential=invited(50, Scope.CLIENT, not_after_unix=NOW - HOUR)
    ),
    "an announcement of somebody revoked": record(50, credential=invited(50, Scope.CLIENT)),
    "an announcement": record(51),
    "a revocation": MESH.revoke(credential(52).links),
}


async def gossip(place: Town, said: Said) -> None:
    """Peer 3 says it to everybody."""
    await place.networks[3].publish(f"libmesh/1/{MESH.mesh_id}/peers", wire.encode_gossip(said))


async def sync(place: Town, said: Said) -> None:
    """Peer 3 says it to peer 1, in an exchange of its own."""
    async with await place.networks[3].open_stream(peer(1), syncing.PROTOCOL) as stream:
        await stream.send_all(frame(wire.encode_digest(Digest({}))))
        for _ in range(2):
            await receive_frame(stream, wire.MAX_RECORDS)
        records, revocations = ([said], []) if isinstance(said, Record) else ([], [said])
        await stream.send_all(frame(wire.encode_records(records, revocations)))
        await stream.send_eof()
        await trio.sleep(1)


async def echo(stream: Stream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def open_echo(one: Mesh, to: Mesh) -> Stream:
    stream = await one.open_service(to.peer, "echo")
    await stream.send_all(b"x")
    assert await stream.receive_some() == b"x"
    return stream


async def is_cut(stream: Stream) -> bool:
    with trio.move_on_after(1):
        try:
            await stream.receive_some()
        except StreamReset:
            return True
    return False


@pytest.mark.parametrize("tell", [gossip, sync])
@pytest.mark.parametrize("lie", LIES)
async def test_a_liar_is_dropped_and_those_it_lied_about_are_not(
    autojump_clock: trio.testing.MockClock, tell: Callable[[Town, Said], Awaitable[None]], lie: str
) -> None:
    async with town() as place:
        one, two, liar = await place.of(3)
        with one.offer("echo", echo):
            from_two, from_liar = await open_echo(two, one), await open_echo(liar, one)
            with trio.move_on_after(2):
                await tell(place, LIES[lie])
            assert await is_cut(from_liar)
            assert not await is_cut(from_two)
        assert state(one, two) is PeerState.ALIVE
        assert one.view.get(peer(50)) is None
        assert one.revocations == ()
        await settled([one, two, liar])  # it may come back, and lie again


@pytest.mark.parametrize("tell", [gossip, sync])
@pytest.mark.parametrize("news", OLD_NEWS)
async def test_who_tells_what_was_good_once_is_no_liar(
    autojump_clock: trio.testing.MockClock, tell: Callable[[Town, Said], Awaitable[None]], news: str
) -> None:
    async with town() as place:
        one, two, teller = await place.of(3)
        one.revoke(tokens.encode_chain(MESH.mesh_key, invited(50, Scope.CLIENT).links[:1]))
        with one.offer("echo", echo), two.offer("echo", echo):
            streams = [await open_echo(teller, one), await open_echo(teller, two)]
            with trio.move_on_after(2):
                await tell(place, OLD_NEWS[news])
            assert [await is_cut(stream) for stream in streams] == [False, False]


async def test_nobody_is_let_into_a_mesh_by_a_liar(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        liar = await place.found()
        lie = LIES["another's announcement, unsigned"]
        liar._driver.membership.newer_than = lambda _: [lie]  # type: ignore[method-assign, list-item, return-value]
        with pytest.raises(PeerUnreachable, match="never good"):
            await place.join(2, client_invite(liar))


async def test_who_compares_with_a_liar_drops_it(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        one, liar = await place.of(2)
        lie = LIES["another's announcement, unsigned"]
        liar._driver.membership.newer_than = lambda _: [lie]  # type: ignore[method-assign, list-item, return-value]
        liar.announce(b"so that they differ")
        with one.offer("echo", echo):
            stream = await open_echo(liar, one)
            del place.networks[2].handlers[syncing.COMPARE_PROTOCOL]  # so that all is compared
            assert not await one._driver._syncing.compare(liar.peer)
            assert await is_cut(stream)


async def test_who_follows_a_liar_drops_it(autojump_clock: trio.testing.MockClock) -> None:
    lied = trio.Event()

    async def lie(stream: Stream) -> None:
        await receive_frame(stream, wire.MAX_DIGEST)
        await lied.wait()
        await stream.send_all(frame(wire.encode_gossip(LIES["another's announcement, unsigned"])))
        await trio.sleep_forever()

    async with town() as place:
        (liar,) = await place.of(1)
        place.networks[1].set_handler(following.PROTOCOL, lie)
        with liar.offer("echo", echo):
            late = await place._open(9, invite=client_invite(liar), follow=True)
            stream = await open_echo(late, liar)
            lied.set()
            assert await is_cut(stream)
