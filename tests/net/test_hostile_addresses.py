"""What a member announces of its addresses is dialled or not, and harms nobody."""

from __future__ import annotations

import pytest

from libmesh import Libp2pConfig, open_mesh
from libmesh.core.membership_io import RecordHeard
from tests.members import NOW, key, peer, record
from tests.net.hosts import HOSTS, until


@pytest.mark.parametrize(
    "address",
    [
        "/ip6zone/\x06\x06\x06\x06\x06\x06/tcp/1542/tcp/1542/tcp/2774",  # multiaddr raises TypeError
        "/ip6zone/\x06\x06\x06\x06\x06\x06/tcp/1542/tcp/2774/ws",
        "/ip4/127.0.0.1/tcp/0",
    ],
    ids=["no codec", "no codec, by WebSocket", "port 0"],
)
async def test_address_that_cannot_be_dialled_is_a_failed_dial(address: str) -> None:
    listen = Libp2pConfig(hosts=HOSTS)
    async with open_mesh(key(1), mesh_key=key(100), listen=listen, wall_clock=lambda: NOW) as mesh:
        machine = mesh._driver.membership
        mesh._driver.handle(RecordHeard(record(2, addresses=(address,)), gossiped=False))
        await until(lambda: machine._peers[peer(2)].failures >= 2)
        assert mesh.view.get(peer(2)) is not None
