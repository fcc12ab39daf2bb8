"""What a node takes back: its own invites, those that others made by them, and memberships. In a real mesh, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio.testing
from libmesh_node.announced import NodeStatus, encode_status
from libmesh_node.bridge import CommandFailed
from libmesh_node.datadir import DataDir
from libmesh_node.inviting import Inviting
from libmesh_node.kept import load_kept
from libmesh_node.options import NodeOptions

from libmesh import Mesh, PeerState, Scope
from tests.town import settled, state, town, until

HOURS = 1.7e9
"""A ttl that reaches beyond the virtual clock's date, whatever the real one's is."""


@dataclass
class Chain:
    """The founder let ada in, who let bob in; each can look after its invites."""

    founder: Mesh
    ada: Mesh
    bob: Mesh
    founder_s: Inviting
    ada_s: Inviting
    folder: DataDir


@asynccontextmanager
async def chain(tmp_path: Path) -> AsyncIterator[Chain]:
    def inviting(mesh: Mesh, name: str) -> Inviting:
        return Inviting(mesh, DataDir(tmp_path / name), NodeOptions(data_dir=tmp_path / name))

    async with town() as place:
        founder = await place.found()
        founder_s = inviting(founder, "founder")
        ada = await place.join(2, founder_s.make(Scope.INVITE, HOURS))
        ada_s = inviting(ada, "ada")
        bob = await place.join(3, ada_s.make(Scope.WORKER, HOURS))
        for mesh, name in ((ada, "ada"), (bob, "bob")):
            mesh.announce(encode_status(NodeStatus(hostname=name)))
        await settled([founder, ada, bob])
        await until(lambda: all(peer.attributes for peer in founder.view.peers))
        yield Chain(founder, ada, bob, founder_s, ada_s, DataDir(tmp_path / "founder"))


async def test_an_invite_of_one_s_own_is_taken_back_by_the_beginning_of_its_id(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with chain(tmp_path) as c:
        (made,) = c.ada_s.invites
        done = c.ada_s.revoke(made.id[:6].upper())
        assert done == f"The invite {made.id[:8]} is revoked, and with it everybody that it let in."
        assert [one.revoked for one in c.ada_s.invites if one.id == made.id] == [True]
        await until(lambda: state(c.founder, c.bob) is PeerState.DEAD)
        assert state(c.founder, c.ada) is PeerState.ALIVE


async def test_who_stands_above_takes_back_an_invite_that_another_made(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with chain(tmp_path) as c:
        *_, by_ada = c.founder.invites_of(c.bob.peer)
        assert "is revoked" in c.founder_s.revoke(by_ada.id[:8])
        await until(lambda: state(c.ada, c.bob) is PeerState.DEAD)
        assert state(c.founder, c.ada) is PeerState.ALIVE
        assert load_kept(c.folder, c.founder.mesh_id).revocations == c.founder.revocations != ()


async def test_who_stands_below_takes_nothing_back(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with chain(tmp_path) as c:
        by_founder, *_ = c.ada.invites_of(c.bob.peer)
        for name in (by_founder.id, c.founder.peer):
            with pytest.raises(CommandFailed, match="only those who let it in"):
                c.ada_s.revoke(name)
        assert c.ada.revocations == ()


async def test_a_membership_is_taken_back_by_a_name_and_what_is_left_of_its_invite_is_told(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with chain(tmp_path) as c:
        *_, by_ada = c.founder.invites_of(c.bob.peer)
        done = c.founder_s.revoke("bob")
        assert done.startswith("The membership of bob is revoked.")
        assert f"invite {by_ada.id[:8]} still holds" in done
        await until(lambda: state(c.ada, c.bob) is PeerState.DEAD)
        assert "is revoked" in c.founder_s.revoke(by_ada.id)


@pytest.mark.parametrize("name", ["nobody", "ab", "", "f" * 32])
async def test_a_name_of_nothing_is_told(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, name: str
) -> None:
    async with chain(tmp_path) as c:
        with pytest.raises(CommandFailed, match="Neither an invite nor a peer"):
            c.founder_s.revoke(name)


async def test_a_name_of_several_is_no_name(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with chain(tmp_path) as c:
        for mesh in (c.ada, c.bob):
            mesh.announce(encode_status(NodeStatus(hostname="twin")))
        twins = encode_status(NodeStatus(hostname="twin"))
        await until(lambda: all(peer.attributes == twins for peer in c.founder.view.peers))
        with pytest.raises(CommandFailed, match="2 peers are called twin"):
            c.founder_s.revoke("twin")


async def test_a_peer_s_name_is_not_taken_for_the_beginning_of_another_s_invite(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with chain(tmp_path) as c:
        *_, by_ada = c.founder.invites_of(c.bob.peer)
        c.ada.announce(encode_status(NodeStatus(hostname=by_ada.id[:8])))
        await until(lambda: c.founder_s._peers_named(by_ada.id[:8]) != [])
        assert c.founder_s.revoke(by_ada.id[:8]).startswith(f"The membership of {by_ada.id[:8]} is revoked")


async def test_a_peer_called_by_the_whole_id_of_its_invite_does_not_keep_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with chain(tmp_path) as c:
        *_, by_ada = c.founder.invites_of(c.bob.peer)
        c.bob.announce(encode_status(NodeStatus(hostname=by_ada.id)))
        await until(lambda: c.founder_s._peers_named(by_ada.id) != [])
        assert c.founder_s.revoke(by_ada.id).startswith(f"The invite {by_ada.id[:8]} is revoked")
