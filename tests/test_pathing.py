"""How members reach each other around routers: over relays at first, then directly where that is possible."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing

from libmesh import Mesh, PathKind, PeerUnreachable
from libmesh.core.ways import PUNCH
from libmesh.errors import NetworkError
from libmesh.net.base import Network, PathChanged, PathSilent
from libmesh.peers import Path, PeerId
from libmesh.testing.memory import MemoryNetwork
from tests.members import NOW
from tests.town import Town, client_invite, settled, town, until


async def through_a_relay(place: Town, *, punchable: bool) -> tuple[Mesh, Mesh, Mesh]:
    """Two members behind routers, and a third that everybody can dial and that relays for them."""
    relay = await place.found(1)
    token = client_invite(relay)
    near, far = await place.join(2, token), await place.join(3, token)
    for mesh, number in ((near, 2), (far, 3)):
        place.hub.hide(mesh.peer, punchable=punchable)
        place.networks[number].set_relays([f"{relay.addresses[0]}/p2p/{relay.peer}"])
    place.hub.cut(near.peer, far.peer)
    return relay, near, far


def path(near: Mesh, far: Mesh) -> Path | None:
    entry = near.view.get(far.peer)
    return None if entry is None else entry.path


def kind(near: Mesh, far: Mesh) -> PathKind | None:
    found = path(near, far)
    return None if found is None else found.kind


async def test_members_behind_routers_reach_each_other_through_a_relay(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        meshes = relay, near, far = await through_a_relay(place, punchable=False)
        await settled(list(meshes))
        assert kind(near, far) is kind(far, near) is PathKind.RELAYED
        assert kind(near, relay) is PathKind.DIRECT


async def test_a_relayed_path_says_since_when_and_why_there_is_no_better_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        meshes = _, near, far = await through_a_relay(place, punchable=False)
        await settled(list(meshes))
        await trio.sleep(100)
        found = path(near, far)
        assert found is not None
        assert NOW < found.since_unix < NOW + 60
        reasons = {attempt.way: attempt.reason for attempt in found.attempts}
        assert reasons == {far.addresses[0]: "no answer", PUNCH: "the routers do not let it through"}


async def test_a_hole_punch_replaces_the_relay(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        _, near, far = await through_a_relay(place, punchable=True)
        await until(lambda: kind(near, far) is kind(far, near) is PathKind.PUNCHED)
        found = path(near, far)
        assert found is not None
        assert {attempt.way for attempt in found.attempts} <= set(far.addresses)
        assert found.since_unix > NOW


async def test_a_router_that_is_gone_is_noticed_without_being_told(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        meshes = _, near, far = await through_a_relay(place, punchable=False)
        await settled(list(meshes))
        await trio.sleep(1000)
        place.hub.show(far.peer)
        assert await until(lambda: kind(near, far) is PathKind.DIRECT, 1000) <= 400


async def test_a_direct_path_that_is_cut_leaves_the_relay(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        meshes = _, near, far = await through_a_relay(place, punchable=True)
        await until(lambda: kind(near, far) is kind(far, near) is PathKind.PUNCHED)
        await trio.sleep(60)
        for mesh in (near, far):
            place.hub.hide(mesh.peer, punchable=False)
        place.hub.cut(near.peer, far.peer)
        assert await until(lambda: kind(near, far) is kind(far, near) is PathKind.RELAYED) < 2
        await settled(list(meshes))


async def test_the_log_tells_when_a_silent_peer_answers_again(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with town() as place:
        near, far = await place.of(2)
        found = path(near, far)
        assert found is not None
        with caplog.at_level(logging.INFO, "libmesh.pathing"):
            for event in (PathSilent(far.peer), PathChanged(far.peer, found), PathChanged(far.peer, found)):
                place.networks[1].emit(event)
            await trio.sleep(1)
    said = [record.getMessage() for record in caplog.records if record.name == "libmesh.pathing"]
    assert said == [f"no sign of life from {far.peer}: looking for another way", f"{far.peer} answers again"]


async def test_watchers_are_told_of_a_better_path(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        _, near, far = await through_a_relay(place, punchable=True)
        seen: list[PathKind | None] = []
        async with near.watch() as views:
            with trio.fail_after(60):
                async for view in views:
                    entry = view.get(far.peer)
                    seen.append(entry.path.kind if entry is not None and entry.path is not None else None)
                    if seen[-1] is PathKind.PUNCHED:
                        break


async def test_callers_share_one_search_and_one_that_leaves_harms_no_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        near, far = await place.of(2)
        pathing = near._driver.pathing
        network = place.networks[1]
        dialled = slow_dials(network, 5)
        slow_dials(place.networks[2], 15)
        place.hub.cut(near.peer, far.peer)
        await until(lambda: bool(dialled))
        done: list[Path] = []

        async def call() -> None:
            done.append(await pathing.connect(far.peer, far.addresses))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(call)
            with trio.move_on_after(1):
                await call()
        assert len(done) == 3
        assert len(dialled) == 1


async def test_when_all_callers_leave_the_search_ends(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        near, _ = await place.of(2)
        pathing = near._driver.pathing
        stranger = PeerId("nobody")
        slow_dials(place.networks[1], 15)
        with trio.move_on_after(1):
            await pathing.connect(stranger, ("/dns/nobody/tcp/1",))
        assert stranger not in pathing._machine._searches
        assert not [key for key in pathing._attempts if key[0] == stranger]


async def test_an_attempt_without_an_end_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        near, _ = await place.of(2)
        slow_dials(place.networks[1], 1e6)
        with pytest.raises(PeerUnreachable, match="no answer within 20 s"):
            await near._driver.pathing.connect(PeerId("nobody"), ("/dns/nobody/tcp/1",))


async def test_nobody_to_be_reached_says_so_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        near, _ = await place.of(2)
        with pytest.raises(PeerUnreachable, match="no address is known"):
            await near._driver.pathing.connect(PeerId("nobody"), ())


def slow_dials(network: MemoryNetwork, delay: float) -> list[str]:
    """Make each dial of `network` take so long; returns the list of those begun."""
    begun: list[str] = []
    dial = network.dial

    async def slow(peer: PeerId, address: str) -> Path:
        begun.append(address)
        await trio.sleep(delay)
        return await dial(peer, address)

    network.dial = slow  # type: ignore[method-assign]
    return begun


async def test_a_transport_without_addresses_or_punches_says_so() -> None:
    with pytest.raises(NetworkError, match="cannot dial"):
        await Network.dial(None, PeerId("x"), "/dns/x/tcp/1")  # type: ignore[arg-type]
    with pytest.raises(NetworkError, match="cannot punch"):
        await Network.punch(None, PeerId("x"))  # type: ignore[arg-type]
