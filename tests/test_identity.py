"""Secret keys on disk and in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from libmesh import MeshError, SecretKey
from tests.members import MESH, key, peer, seed


def test_a_key_is_made_once_and_then_kept(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    made = SecretKey.load_or_create(path)
    assert SecretKey.load_or_create(path) == made
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_two_keys_are_the_same() -> None:
    assert SecretKey.generate() != SecretKey.generate()


def test_the_text_of_a_key_gives_the_key() -> None:
    assert SecretKey.from_text(key(1).to_text()) == key(1)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"libmesh ed25519 seed 1\n",
        b"libmesh ed25519 seed 1\n" + b"0" * 62,
        b"libmesh ed25519 seed 1\n" + b"0" * 66,
        b"libmesh ed25519 seed 1\n" + b"x" * 64,
        b"libmesh ed25519 seed 1\n" + b"\xff" * 64,
        b"-----BEGIN PRIVATE KEY-----\n",
        bytes(32),
    ],
)
def test_other_texts_are_no_keys_and_are_left_alone(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(text)
    with pytest.raises(MeshError, match="no libmesh key"):
        SecretKey.load_or_create(path)
    assert path.read_bytes() == text


def test_a_folder_that_is_missing_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SecretKey.load_or_create(tmp_path / "missing" / "identity.key")


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_seed_has_32_bytes(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        SecretKey(bytes(length))


def test_the_seed_is_never_printed() -> None:
    assert seed(1).hex() not in repr(key(1))
    assert repr(seed(1)) not in repr(key(1))
    assert repr(key(1)) == "SecretKey()"


def test_a_key_knows_its_peer_and_its_mesh() -> None:
    assert key(1).peer == peer(1)
    assert key(100).mesh_id == MESH.mesh_id
