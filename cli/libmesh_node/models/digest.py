"""The identity of a model: BLAKE3 over the content of its files, in order."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import trio
from blake3 import blake3

from libmesh_node.llama.engine import cache_root

_CHUNK = 8 << 20
_REMEMBERED = 1024
"""Digests kept. When full, the ones written longest ago are dropped, and computed again when asked for."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


async def model_digest(parts: Sequence[Path], cache: Path | None = None) -> str:
    """The digest of the files' joined content, as 64 hex digits.

    Computed in a worker thread, at the speed of the disk or 6 GB/s, and remembered by path, size, time of change and
    inode, so that the next start asks no disk. Cancelling is noticed within 8 MiB and remembers nothing.

    Raises `OSError` if a file cannot be read.
    """
    return await trio.to_thread.run_sync(_remembered, tuple(parts), (cache or cache_root()) / "digests")


def _remembered(parts: tuple[Path, ...], folder: Path) -> str:
    entry = folder / _key(parts)
    with contextlib.suppress(OSError):
        known = entry.read_text("ascii", "replace")
        if _DIGEST.fullmatch(known):
            return known
    digest = _compute(parts)
    if entry.name == _key(parts):  # else a file changed while it was read: true of neither state, so not kept
        with contextlib.suppress(OSError):
            _remember(entry, digest)
    return digest


def _key(parts: tuple[Path, ...]) -> str:
    key = blake3()
    for path in parts:
        status = path.stat()
        key.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}\0".encode())
    return key.hexdigest(16)


def _compute(parts: tuple[Path, ...]) -> str:
    digest = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(_CHUNK))
    for path in parts:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                trio.from_thread.check_cancelled()
                digest.update(buffer[:count])
    return digest.hexdigest()


def _remember(entry: Path, digest: str) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=entry.parent, delete=False) as file:
        file.write(digest)
    os.replace(file.name, entry)
    kept = sorted(entry.parent.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for old in kept[_REMEMBERED:]:
        old.unlink(missing_ok=True)
