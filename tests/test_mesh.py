"""Who gets into a mesh, who is kept out, and what is seen of those that come and go. All in virtual time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import pytest
import trio
import trio.testing

from libmesh import (
    AdmissionRefused,
    InviteDenied,
    InviteExpired,
    InviteMalformed,
    Mesh,
    Path,
    PeerState,
    PeerUnreachable,
    Scope,
    hello,
    open_mesh,
    probing,
)
from libmesh.net.base import PathChanged
from tests.members import NOW, key, peer, seed
from tests.town import MESH_KEY, client_invite, clock, settled, state, town, until

# ── getting in ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_joiner_and_all_members_see_each_other_within_two_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        meshes = await place.of(4)
        late = await place.join(9, client_invite(meshes[2] if meshes[2].scope is Scope.INVITE else meshes[0]))
        assert await settled([*meshes, late]) < 2
        assert {mesh.mesh_id for mesh in (*meshes, late)} == {MESH_KEY.mesh_id}


async def test_a_client_cannot_invite_and_is_told_what_to_do(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        _, client = await place.of(2)
        with pytest.raises(InviteDenied, match="ask for an invite with the scope 'invite'"):
            client_invite(client)


async def test_an_inviter_lets_others_in_while_the_founder_is_away(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        founder = await place.found()
        inviter = await place.join(2, founder.invite(scope=Scope.INVITE, not_after_unix=None))
        place.hub.partition({inviter.peer, peer(3)}, {founder.peer})
        guest = await place.join(3, client_invite(inviter))
        await until(lambda: state(inviter, guest) is PeerState.ALIVE)
        place.hub.partition()
        await settled([founder, inviter, guest])


async def test_an_expired_invite_is_refused_by_its_own_holder(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        founder = await place.found()
        token = founder.invite(scope=Scope.CLIENT, not_after_unix=NOW + 10)
        await trio.sleep(11)
        with pytest.raises(InviteExpired):
            await place.join(2, token)


async def test_a_token_that_is_none_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        founder = await place.found()
        for use in (partial(place.join, 2), founder.join):
            with pytest.raises(InviteMalformed):
                await use("lm1nonsense")


async def test_an_invite_to_another_mesh_is_refused_on_both_ways_in(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        ours, theirs = await place.found(1), await place.found(2, mesh_key=key(200))
        with pytest.raises(AdmissionRefused) as caught:
            await ours.join(client_invite(theirs))
        assert caught.value.reason == "wrong_mesh"
        assert ours.view.peers == ()


async def test_a_member_of_another_mesh_is_refused_and_learns_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        ours, _ = (await place.of(2))[:2]
        stranger = await place.network(9)
        outsider = await place._stack.enter_async_context(
            open_mesh(key(9), mesh_key=key(200), network=stranger, wall_clock=clock)
        )
        outsider._driver.admission.add_contacts([(ours.peer, ours.addresses)])
        with pytest.raises(AdmissionRefused) as caught:
            await outsider._driver.admission.seek()
        assert caught.value.reason == "wrong_mesh"
        await trio.sleep(60)
        assert outsider.view.peers == ()
        assert state(ours, outsider) is None


async def test_nobody_at_home_is_unreachable_and_without_waiting_it_is_tried_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        founder = await place.found()
        token = client_invite(founder)
        place.hub.partition({founder.peer}, {peer(2), peer(3)})
        with pytest.raises(PeerUnreachable):
            await place.join(2, token)
        patient = await place.join(3, token, wait=False)
        await trio.sleep(30)
        assert patient.view.peers == ()
        place.hub.partition()
        await settled([founder, patient])


async def test_a_silent_stranger_is_dropped(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        founder = await place.found()
        stranger = await place.network(9)
        await stranger.connect(founder.peer, founder.addresses)
        await trio.sleep(9)
        assert stranger.path(founder.peer) is not None
        await trio.sleep(2)
        assert stranger.path(founder.peer) is None


@pytest.mark.parametrize("said", [b"", b"\x80\x80\x80\x80", b"\x02\xff\xff", b"GET / HTTP/1.1\r\n\r\n"])
async def test_a_stranger_that_talks_nonsense_is_dropped(
    autojump_clock: trio.testing.MockClock, said: bytes
) -> None:
    async with town() as place:
        founder = await place.found()
        stranger = await place.network(9)
        await stranger.connect(founder.peer, founder.addresses)
        stream = await stranger.open_stream(founder.peer, hello.PROTOCOL)
        await stream.send_all(said)
        await stream.send_eof()
        await until(lambda: stranger.path(founder.peer) is None, limit=12)


async def test_exactly_one_of_mesh_key_and_invite_is_needed(autojump_clock: trio.testing.MockClock) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        async with open_mesh(key(1)):
            pass


# ── coming and going ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_goodbye_is_seen_by_all_within_a_second(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        meshes = await place.of(3)
        async with (
            place.hub.open_network(seed(9)) as network,
            open_mesh(key(9), invite=client_invite(meshes[0]), network=network, wall_clock=clock) as guest,
        ):
            await settled([*meshes, guest])
            left = guest.peer
        await until(lambda: all(m.view.get(left).state is PeerState.LEFT for m in meshes), limit=1)  # type: ignore[union-attr]


async def test_a_peer_that_vanishes_is_suspected_and_then_dead(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        one, two, three = await place.of(3)
        place.hub.partition({one.peer, two.peer}, {three.peer})
        await until(lambda: state(one, three) is PeerState.SUSPECT, limit=2)
        await until(lambda: state(one, three) is state(two, three) is PeerState.DEAD, limit=15)
        assert state(one, two) is PeerState.ALIVE


async def test_a_short_break_is_no_death(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        one, two = await place.of(2)
        seen: list[PeerState | None] = []
        place.hub.cut(one.peer, two.peer)
        for _ in range(100):
            seen.append(state(one, two))
            await trio.sleep(0.05)
        assert PeerState.DEAD not in seen
        assert state(one, two) is PeerState.ALIVE


async def test_a_partition_heals_and_what_was_missed_is_learned(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        meshes = await place.of(4)
        left, right = {meshes[0].peer, meshes[1].peer}, {meshes[2].peer, meshes[3].peer}
        place.hub.partition(left, right)
        await until(lambda: state(meshes[0], meshes[3]) is PeerState.DEAD)
        meshes[3].announce(b"said while apart")
        await trio.sleep(1)
        place.hub.partition()
        await settled(meshes, limit=90)
        for mesh in meshes[:3]:
            entry = mesh.view.get(meshes[3].peer)
            assert entry is not None
            assert entry.attributes == b"said while apart"


async def test_a_restarted_peer_is_not_taken_for_its_ghost(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        founder = await place.found()
        token = client_invite(founder)
        incarnations: list[int] = []
        for _ in range(3):
            async with (
                place.hub.open_network(seed(9)) as network,
                open_mesh(key(9), invite=token, network=network, wall_clock=clock) as guest,
            ):
                await settled([founder, guest])
                entry = founder.view.get(guest.peer)
                assert entry is not None
                incarnations.append(entry.incarnation)
            await trio.sleep(1)
        assert incarnations == sorted(set(incarnations))


async def test_a_membership_that_ends_is_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        founder = await place.found()
        guest = await place.join(2, founder.invite(scope=Scope.CLIENT, not_after_unix=NOW + 100))
        await settled([founder, guest])
        assert guest.expires_unix == NOW + 100
        await trio.sleep(140)
        assert state(founder, guest) is PeerState.DEAD
        assert place.networks[1].path(guest.peer) is None


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[Mesh], None]:
    """Lets a peer hear no answer to a probe, and nobody learn that it wonders."""

    async def unanswered(*_: object) -> bool:
        await trio.lowlevel.checkpoint()
        return False

    def make(mesh: Mesh) -> None:
        monkeypatch.setattr(mesh._driver._prober, "_ask", unanswered)
        monkeypatch.setattr(mesh._driver, "_publish", lambda _: None)

    caplog.set_level(logging.INFO, "libmesh.driver")
    return make


async def test_another_path_is_no_sign_of_life_by_itself(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    deaf: Callable[[Mesh], None],
) -> None:
    """Where two connections stand, the network turns from the one that fell silent to the other, which is no better."""
    async with town() as place:
        one, two = await place.of(2)
        path = place.networks[1].path(two.peer)
        assert path is not None
        deaf(one)
        monkeypatch.setattr(one._driver._prober, "_addresses_of", lambda _: ())
        await until(lambda: state(one, two) is PeerState.SUSPECT)
        place.networks[1].emit(PathChanged(two.peer, path, True))
        assert await until(lambda: "is dead" in caplog.text) <= 4.0


async def test_of_two_peers_one_that_is_silent_and_can_be_reached_anew_is_alive(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    deaf: Callable[[Mesh], None],
) -> None:
    """Of two that lose many packets, each connection may be stuck; that they can make new ones tells that both live."""

    async def hang(*_: object) -> Path:
        await trio.sleep_forever()
        raise AssertionError

    async with town() as place:
        one, _ = await place.of(2)
        deaf(one)
        await trio.sleep(60)
        assert "is suspect" in caplog.text
        assert "is dead" not in caplog.text
        monkeypatch.setattr(place.networks[1], "dial", hang)
        assert await until(lambda: "is dead" in caplog.text) <= 5.0
        assert one._driver._prober._anew <= probing.MAX_ANEW
