"""Revocation: whoever stands above a link can take it back, everywhere and for ever; nobody else can."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from libmesh import (
    AdmissionRefused,
    InviteDenied,
    InviteMalformed,
    Mesh,
    Path,
    PeerId,
    PeerState,
    PeerUnreachable,
    Scope,
    SecretKey,
    Stream,
    StreamReset,
    open_mesh,
    read_invite,
)
from libmesh.core import credentials
from libmesh.refusals import REST
from libmesh.testing.memory import MemoryHub, MemoryNetwork

FOUNDER, GUEST, OTHER = (SecretKey(bytes([n]) * 32) for n in range(1, 4))
MESH_KEY = SecretKey(b"m" * 32)


async def until(mesh: Mesh, peer: SecretKey, state: PeerState) -> None:
    with trio.fail_after(60):
        async with mesh.watch() as views:
            async for view in views:
                entry = view.get(peer.peer)
                if entry is not None and entry.state is state:
                    return


async def echo(stream: Stream) -> None:
    async for data in stream:
        await stream.send_all(data)


@asynccontextmanager
async def three(hub: MemoryHub, at_guest: MemoryNetwork) -> AsyncIterator[tuple[Mesh, Mesh, Mesh, str]]:
    """A founder, another member and a guest, who is known to it; and the guest's invite."""
    async with (
        hub.open_network(FOUNDER.seed) as at_founder,
        hub.open_network(OTHER.seed) as at_other,
        open_mesh(FOUNDER, mesh_key=MESH_KEY, network=at_founder) as founder,
    ):
        token = founder.invite(scope=Scope.WORKER, not_after_unix=None)
        kept = founder.invite(scope=Scope.WORKER, not_after_unix=None)
        async with (
            open_mesh(OTHER, invite=kept, network=at_other) as other,
            open_mesh(GUEST, invite=token, network=at_guest) as guest,
        ):
            await until(other, GUEST, PeerState.ALIVE)
            yield founder, other, guest, token


async def test_a_revoked_invite_ends_streams_and_keeps_its_holder_out(autojump_clock: object) -> None:
    hub = MemoryHub()
    async with (
        hub.open_network(GUEST.seed) as at_guest,
        three(hub, at_guest) as (founder, other, guest, token),
    ):
        with other.offer("echo", echo):
            stream = await guest.open_service(OTHER.peer, "echo")
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            founder.revoke(read_invite(token).chain)
            with pytest.raises(StreamReset):
                await stream.receive_some()
        await until(other, GUEST, PeerState.DEAD)
        await trio.sleep(1)  # virtual: until the founder has hung up, too
        with pytest.raises(AdmissionRefused) as refused:
            await guest.join(token)
        assert refused.value.reason == "revoked"
        entry = other.view.get(FOUNDER.peer)
        assert entry is not None
        assert entry.state is PeerState.ALIVE


async def test_an_invite_in_place_of_a_revoked_one_does_not_name_who_was_revoked(
    autojump_clock: object,
) -> None:
    hub = MemoryHub()
    async with (
        hub.open_network(FOUNDER.seed) as at_founder,
        hub.open_network(GUEST.seed) as at_guest,
        open_mesh(FOUNDER, mesh_key=MESH_KEY, network=at_founder) as founder,
    ):
        token = founder.invite(scope=Scope.WORKER, not_after_unix=None)
        async with open_mesh(GUEST, invite=token, network=at_guest):
            await until(founder, GUEST, PeerState.ALIVE)
            assert GUEST.peer in read_invite(founder.readdress(token)).contacts
            founder.revoke_peer(GUEST.peer)
            assert at_founder.path(GUEST.peer) is not None  # it is hung up on in a moment
            assert read_invite(founder.readdress(token)).contacts == (FOUNDER.peer,)


async def test_who_is_kept_out_knows_why_and_is_logged_once(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    hub = MemoryHub()
    async with (
        hub.open_network(FOUNDER.seed) as at_founder,
        hub.open_network(GUEST.seed) as at_guest,
        open_mesh(FOUNDER, mesh_key=MESH_KEY, network=at_founder) as founder,
    ):
        token = founder.invite(scope=Scope.WORKER, not_after_unix=None)
        async with open_mesh(GUEST, invite=token, network=at_guest) as guest:
            assert guest.refusal is None
            caplog.set_level(logging.INFO, "libmesh")
            founder.revoke(read_invite(token).chain)
            await trio.sleep(600)  # virtual; it tries again and again
            assert guest.refusal is not None
            assert guest.refusal.reason == "revoked"
            assert caplog.text.count(f"refused the peer {GUEST.peer}") == 1
            assert "path to" not in caplog.text
            other = founder.invite(scope=Scope.WORKER, not_after_unix=None)
            await guest.renew(other)
            assert guest.refusal is None
            assert f"path to {GUEST.peer}" in caplog.text


async def test_who_is_revoked_asks_nobody_again_for_minutes(
    autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = MemoryHub()
    async with (
        hub.open_network(GUEST.seed) as at_guest,
        three(hub, at_guest) as (founder, other, guest, token),
    ):
        founder.revoke(read_invite(token).chain)
        await trio.sleep(30)  # virtual: everybody has told it
        asked: list[PeerId] = []
        dial = at_guest.dial

        async def counted(peer: PeerId, address: str) -> Path:
            asked.append(peer)
            return await dial(peer, address)

        monkeypatch.setattr(at_guest, "dial", counted)
        await trio.sleep(REST - 60)
        assert asked == []
        await trio.sleep(2 * REST)
        assert set(asked) == {FOUNDER.peer, OTHER.peer}
        assert len(asked) <= 6
        asked.clear()
        with pytest.raises(AdmissionRefused, match="the invite was revoked"):
            await guest.join(token)
        assert asked == [FOUNDER.peer]
        with pytest.raises(AdmissionRefused, match="the invite was revoked"):
            await guest.open_service(FOUNDER.peer, "any")
        assert asked == [FOUNDER.peer]
        await guest.renew(founder.invite(scope=Scope.CLIENT, not_after_unix=None))
        await until(other, GUEST, PeerState.ALIVE)


async def test_a_kept_revocation_holds_after_a_restart(autojump_clock: object) -> None:
    hub = MemoryHub()
    async with (
        hub.open_network(FOUNDER.seed) as network,
        open_mesh(FOUNDER, mesh_key=MESH_KEY, network=network) as mesh,
    ):
        token = mesh.invite(scope=Scope.WORKER, not_after_unix=None)
        mesh.revoke(read_invite(token).chain)
        kept = mesh.revocations
    assert len(kept) == 1
    async with (
        hub.open_network(FOUNDER.seed) as network,
        hub.open_network(GUEST.seed) as at_guest,
        open_mesh(FOUNDER, mesh_key=MESH_KEY, network=network, revocations=[b"damaged", *kept]),
    ):
        with pytest.raises(AdmissionRefused, match="revoked"):
            async with open_mesh(GUEST, invite=token, network=at_guest):
                raise AssertionError("a revoked invite let somebody in")


async def test_one_peer_can_be_put_out_and_come_back_with_another_invite(autojump_clock: object) -> None:
    hub = MemoryHub()
    async with (
        hub.open_network(FOUNDER.seed) as at_founder,
        open_mesh(FOUNDER, mesh_key=MESH_KEY, network=at_founder) as founder,
    ):
        token = founder.invite(scope=Scope.INVITE, not_after_unix=None)
        another = founder.invite(scope=Scope.CLIENT, not_after_unix=None)
        async with (
            hub.open_network(GUEST.seed) as network,
            open_mesh(GUEST, invite=token, network=network) as guest,
        ):
            await until(founder, GUEST, PeerState.ALIVE)
            with pytest.raises(InviteDenied):
                guest.revoke_peer(FOUNDER.peer)
            with pytest.raises(PeerUnreachable):
                founder.revoke_peer(OTHER.peer)
            founder.revoke_peer(GUEST.peer)
            await until(founder, GUEST, PeerState.DEAD)
        async with hub.open_network(GUEST.seed) as network:
            with pytest.raises(AdmissionRefused, match="revoked"):
                async with open_mesh(GUEST, invite=token, network=network):
                    raise AssertionError("who was put out came back")
        async with hub.open_network(GUEST.seed) as network, open_mesh(GUEST, invite=another, network=network):
            await until(founder, GUEST, PeerState.ALIVE)
            assert [one.id for one in founder.invites_of(GUEST.peer)] == [read_invite(another).id]
            assert founder.invites_of(GUEST.peer)[0].chain == read_invite(another).chain
            assert founder.invites_of(OTHER.peer) == ()


async def test_what_is_no_chain_is_refused_in_words() -> None:
    hub = MemoryHub()
    async with (
        hub.open_network(FOUNDER.seed) as network,
        open_mesh(FOUNDER, mesh_key=MESH_KEY, network=network) as mesh,
    ):
        with pytest.raises(InviteMalformed, match="names no invite"):
            mesh.revoke(b"garbage")


async def test_what_is_not_taken_back_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An invite of another mesh, and one too many."""
    monkeypatch.setattr(credentials, "MAX_REVOCATIONS", 1)
    hub = MemoryHub()
    async with (
        hub.open_network(FOUNDER.seed) as network,
        hub.open_network(OTHER.seed) as elsewhere,
        open_mesh(FOUNDER, mesh_key=MESH_KEY, network=network) as mesh,
        open_mesh(OTHER, mesh_key=OTHER, network=elsewhere) as another,
    ):
        foreign = another.invite(scope=Scope.CLIENT, not_after_unix=None)
        with pytest.raises(InviteDenied, match="not of this mesh"):
            mesh.revoke(read_invite(foreign).chain)
        one, two = (mesh.invite(scope=Scope.CLIENT, not_after_unix=None) for _ in range(2))
        for _ in range(2):
            mesh.revoke(read_invite(one).chain)
        with pytest.raises(InviteDenied, match="keeps no more"):
            mesh.revoke(read_invite(two).chain)
        assert len(mesh.revocations) == 1
