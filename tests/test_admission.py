"""Whom one gets to know at the same time, and what is left of whoever was interrupted. All in virtual time."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from libmesh import AdmissionRefused, Mesh, PathKind, PeerId, Scope, Stream, StreamReset, hello
from libmesh.net.base import PathChanged
from libmesh.testing import memory
from tests.members import NOW
from tests.town import Town, town


async def _nothing(stream: Stream) -> None:
    await stream.receive_some()


async def _three(place: Town) -> tuple[Mesh, Mesh]:
    _, two, three = await place.of(3)
    await trio.sleep(1)
    return two, three


async def test_many_that_need_an_unconnected_peer_share_one_hello(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        two, three = await _three(place)
        opened: list[Stream] = []

        async def open_one() -> None:
            opened.append(await two.open_service(three.peer, "a"))

        with three.offer("a", _nothing):
            for ticks in range(20):
                await place.networks[2].disconnect(three.peer)
                while two._driver.admission.credential_of(three.peer) is not None:
                    await trio.lowlevel.checkpoint()
                for _ in range(ticks):
                    await trio.lowlevel.checkpoint()
                with trio.fail_after(1):
                    async with trio.open_nursery() as nursery:
                        for _ in range(8):
                            nursery.start_soon(open_one)
                for stream in opened:
                    await stream.aclose()
                opened.clear()
        assert not two._driver.admission._connecting


async def test_one_hello_waits_for_another_of_the_same_peer_and_a_third_does_not(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        two, three = await _three(place)
        admission, streams = two._driver.admission, []
        for _ in range(3):
            streams.append(await two._driver.network.open_stream(three.peer, hello.PROTOCOL))
            await trio.sleep(0.1)
        with pytest.raises(StreamReset):
            await streams.pop().receive_some()
        for stream in streams:
            async with stream:
                said = await hello.greet(stream, admission._greeting(three.peer))
                await admission._admit(stream, said, dialled=True)
        await trio.sleep(20)
        assert two.view.get(three.peer).path is not None  # type: ignore[union-attr]
        assert not three._driver.admission._answering


async def test_a_peer_that_may_have_forgotten_us_hears_another_hello(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        two, three = await _three(place)
        del three._driver.admission._admitted[two.peer]
        path = place.networks[2].path(three.peer)
        assert path is not None
        place.networks[2].emit(PathChanged(three.peer, path))
        await trio.sleep(1)
        assert three._driver.admission.credential_of(two.peer) is None
        place.networks[2].emit(PathChanged(three.peer, path, renewed=True))
        await trio.sleep(1)
        assert three._driver.admission.credential_of(two.peer) is not None


async def test_a_hello_lost_with_its_connection_costs_a_known_peer_no_other_one(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "RETIRE_AFTER", 3600.0)
    async with town() as place:
        two, three = await _three(place)
        dropped: list[object] = []
        said: list[Stream] = []
        repeated = False
        near, far = place.networks[2], place.networks[3]
        open_stream = near.open_stream

        async def disconnect(peer: PeerId) -> None:
            dropped.append(peer)

        async def opening(peer: PeerId, protocol: str) -> Stream:
            said.append(await open_stream(peer, protocol))
            return said[-1]

        near.disconnect = far.disconnect = disconnect  # type: ignore[method-assign]
        near.open_stream = opening  # type: ignore[method-assign]
        for ticks in range(40):
            said.clear()
            last = near.path(three.peer)
            assert last is not None
            spare = PathKind.PUNCHED if last.kind is PathKind.DIRECT else PathKind.DIRECT
            place.hub._link(near, three.peer, spare, "/there", "/back")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(two._driver.admission.greet, three.peer)
                for _ in range(ticks):
                    await trio.lowlevel.checkpoint()
                place.hub.cut(two.peer, three.peer, last.kind)
            await trio.sleep(0.1)
            assert not dropped, ticks
            repeated |= len(said) == 2
            assert near.path(three.peer) is not None
        assert repeated, "it is said again, over the connection that is left"
        assert two._driver.admission.credential_of(three.peer) is not None
        assert three._driver.admission.credential_of(two.peer) is not None


async def test_cancelled_hello_leaves_nobody_half_admitted(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        two, three = await _three(place)
        admission, membership = two._driver.admission, two._driver.membership
        addresses = membership.addresses_of(three.peer)
        for ticks in range(60):
            await place.networks[2].disconnect(three.peer)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(admission.connect, three.peer, addresses)
                    for _ in range(ticks):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            await trio.sleep(20)
            assert admission.credential_of(three.peer) is not None, ticks
            assert membership._peers[three.peer].connected, ticks


async def test_peers_whose_greeting_is_awaited_are_forgotten_with_their_connection(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        founder = await place.found()
        strangers = [await place.network(number) for number in range(2, 12)]
        for stranger in strangers:
            await stranger.connect(founder.peer, founder.addresses)
            await stranger.disconnect(founder.peer)
        await trio.sleep(30)
        assert not founder._driver.admission._waiting


async def test_node_whose_membership_has_ended_bothers_nobody(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        founder = await place.found()
        guest = await place.join(2, founder.invite(scope=Scope.CLIENT, not_after_unix=NOW + 10))
        await trio.sleep(60)
        dialled: list[object] = []
        place.networks[2].connect = lambda *_: dialled.append(_)  # type: ignore[assignment,method-assign]
        with pytest.raises(AdmissionRefused, match="has ended"):
            await guest.open_service(founder.peer, "a")
        await trio.sleep(60)
        assert not dialled
