"""Members whose addresses have all changed find each other again by a relay that knows nothing of their mesh."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from libmesh import (
    Libp2pConfig,
    MeshConfig,
    RelayLimits,
    RelayUse,
    Scope,
    meeting,
    open_libp2p_network,
    open_mesh,
)
from libmesh.core.ways import is_circuit
from libmesh.meeting import namespace_of
from tests.members import MESH, key, seed

HOSTS = ("127.0.0.1",)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "LOOK_EVERY", 0.05)
    monkeypatch.setattr(meeting, "ASK_ALONE", 0.1)


def test_the_name_of_a_mesh_at_a_point_does_not_tell_its_id() -> None:
    assert len(namespace_of(MESH.mesh_id)) == 64
    assert MESH.mesh_id not in namespace_of(MESH.mesh_id)


async def test_who_knows_nobody_s_address_finds_members_by_the_relay() -> None:
    """The invite is of a time when its maker was elsewhere and used no relay; so none of its addresses leads anywhere."""
    opened = partial(open_mesh, mesh_key=key(100), listen=Libp2pConfig(hosts=HOSTS))
    async with opened(key(1)) as before:
        token = before.invite(scope=Scope.CLIENT, not_after_unix=None)
        assert not any(map(is_circuit, before.addresses))
    to_all = Libp2pConfig(hosts=HOSTS, relay=RelayLimits(), relay_open=True)
    async with open_libp2p_network(seed(77), to_all) as relay:
        config = MeshConfig(relays=RelayUse(known=(f"{relay.addresses()[0]}/p2p/{relay.peer}",)))
        async with (
            opened(key(1), config=config) as founder,
            open_mesh(
                key(2), invite=token, listen=Libp2pConfig(hosts=HOSTS), config=config, wait=False
            ) as member,
        ):
            with trio.fail_after(60):
                async with member.watch() as views:
                    async for view in views:
                        found = view.get(founder.peer)
                        if found is not None and found.path is not None:
                            break
            assert relay.relaying.point is not None
            assert relay.relaying.point.desk.registrations == 2


async def test_a_relay_that_knows_no_rendezvous_or_is_gone_harms_nobody() -> None:
    to_all = Libp2pConfig(hosts=HOSTS, relay=RelayLimits(), relay_open=True)
    async with open_libp2p_network(seed(77), to_all) as relay:
        config = MeshConfig(relays=RelayUse(known=(f"{relay.addresses()[0]}/p2p/{relay.peer}",)))
        del relay._server.handlers["/rendezvous/1.0.0"]
        listen = Libp2pConfig(hosts=HOSTS)
        async with open_mesh(key(1), mesh_key=key(100), listen=listen, config=config) as mesh:
            with trio.fail_after(60):
                while not any(map(is_circuit, mesh.addresses)):  # noqa: ASYNC110 - told in an event that the mesh takes
                    await trio.sleep(0.02)
            await trio.sleep(0.3)  # several looks
            assert mesh.view.peers == ()
