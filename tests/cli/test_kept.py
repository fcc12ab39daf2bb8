"""What a node keeps of its meshes: each mesh's own, whole, and bounded."""

from __future__ import annotations

from pathlib import Path

import pytest
from libmesh_node.datadir import DataDir
from libmesh_node.errors import NodeError
from libmesh_node.kept import MAX_MESHES, Kept, load_kept, save_kept
from libmesh_node.snapshot import Invite

from libmesh import MeshId, PeerId

INVITE = Invite(id="ab" * 16, scope="worker", expires_unix=2_000_000_000, created_unix=1_900_000_000)


def kept(mesh: str) -> Kept:
    return Kept(
        MeshId(mesh),
        invites=[INVITE],
        chains={INVITE.id: b"chain"},
        revocations=(b"revoked",),
        contacts=((PeerId("peer"), ("/ip4/192.0.2.1/tcp/1",)),),
    )


def test_what_was_saved_is_there_again(tmp_path: Path) -> None:
    save_kept(DataDir(tmp_path), kept("one"))
    assert load_kept(DataDir(tmp_path), MeshId("one")) == kept("one")


def test_a_visit_to_another_mesh_loses_nothing_of_the_own_one(tmp_path: Path) -> None:
    folder = DataDir(tmp_path)
    save_kept(folder, kept("own"))
    save_kept(folder, Kept(MeshId("other")))
    assert load_kept(folder, MeshId("own")) == kept("own")
    assert load_kept(folder, MeshId("other")) == Kept(MeshId("other"))


def test_the_mesh_left_longest_ago_is_forgotten_first(tmp_path: Path) -> None:
    folder = DataDir(tmp_path)
    for number in range(MAX_MESHES):
        save_kept(folder, kept(str(number)))
    save_kept(folder, kept("0"))
    save_kept(folder, kept("new"))
    assert load_kept(folder, MeshId("1")) == Kept(MeshId("1"))
    assert load_kept(folder, MeshId("0")) == kept("0")


@pytest.mark.parametrize("data", [b"garbage", b"[]", b'{"one": 1}', b'{"one": {}}'])
def test_a_damaged_file_is_said_and_not_overwritten(tmp_path: Path, data: bytes) -> None:
    folder = DataDir(tmp_path)
    folder.write_secret(folder.kept, data)
    with pytest.raises(NodeError, match="damaged"):
        load_kept(folder, MeshId("one"))
    assert folder.kept.read_bytes() == data
