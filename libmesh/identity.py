"""Secret keys, in memory and on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from libmesh import keys
from libmesh.errors import MeshError
from libmesh.peers import MeshId, PeerId

_FILE_HEADER = b"libmesh ed25519 seed 1\n"


@dataclass(frozen=True, slots=True)
class SecretKey:
    """An Ed25519 secret key: a node's identity, or a whole mesh's. `seed` is its 32 bytes and never printed."""

    seed: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.seed, bytes):
            raise TypeError(f"a secret key is bytes, not {type(self.seed).__name__}")
        if len(self.seed) != keys.KEY_LENGTH:
            raise ValueError(f"a secret key has {keys.KEY_LENGTH} bytes, not {len(self.seed)}")

    @classmethod
    def generate(cls) -> SecretKey:
        """A new key from the operating system's randomness."""
        return cls(os.urandom(keys.KEY_LENGTH))

    @classmethod
    def from_text(cls, data: bytes) -> SecretKey:
        """The inverse of `to_text`. Raises `MeshError` for anything else."""
        try:
            if not data.startswith(_FILE_HEADER):
                raise ValueError("its first line is not that of a key")
            return cls(bytes.fromhex(data[len(_FILE_HEADER) :].decode("ascii").strip()))
        except ValueError as exc:
            raise MeshError(f"this is no libmesh key: {exc}") from exc

    @classmethod
    def load_or_create(cls, path: Path | str) -> SecretKey:
        """The key in the file `path`, made with mode 0600 if there is none. Raises `MeshError` or `OSError`."""
        try:
            return cls.from_text(Path(path).read_bytes())
        except FileNotFoundError:
            key = cls.generate()
            with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(key.to_text())
            return key

    def to_text(self) -> bytes:
        """What a key file holds: a line that says what it is, and the seed in hex."""
        return _FILE_HEADER + self.seed.hex().encode("ascii") + b"\n"

    @property
    def public(self) -> bytes:
        """The 32 bytes of the public key."""
        return keys.public_key(self.seed)

    @property
    def peer(self) -> PeerId:
        """The peer id of a node with this key."""
        return keys.peer_id_of(self.public)

    @property
    def mesh_id(self) -> MeshId:
        """The id of a mesh with this key."""
        return keys.mesh_id_of(self.public)
