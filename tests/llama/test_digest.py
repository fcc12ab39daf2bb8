from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from blake3 import blake3
from libmesh_node.models import digest
from libmesh_node.models.digest import model_digest


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


async def test_digest_is_blake3_of_the_joined_content(tmp_path: Path) -> None:
    content = os.urandom(20_000_000)
    parts = [put(tmp_path / "a", content[:9_000_000]), put(tmp_path / "b", content[9_000_000:])]
    assert await model_digest(parts, tmp_path / "cache") == blake3(content).hexdigest()


async def test_order_of_parts_counts(tmp_path: Path) -> None:
    a, b = put(tmp_path / "a", b"a"), put(tmp_path / "b", b"b")
    assert await model_digest([a, b], tmp_path) != await model_digest([b, a], tmp_path)


async def test_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    path = put(tmp_path / "a", b"before")
    first = await model_digest([path], tmp_path / "cache")
    times = path.stat().st_mtime_ns
    put(path, b"afterw")
    os.utime(path, ns=(times, times))
    assert await model_digest([path], tmp_path / "cache") == first
    assert await model_digest([path], tmp_path / "other") == blake3(b"afterw").hexdigest()


async def test_changed_file_has_another_digest(tmp_path: Path) -> None:
    path = put(tmp_path / "a", b"before")
    await model_digest([path], tmp_path / "cache")
    put(path, b"after")
    assert await model_digest([path], tmp_path / "cache") == blake3(b"after").hexdigest()


async def test_garbage_in_the_cache_is_ignored(tmp_path: Path) -> None:
    path = put(tmp_path / "a", b"content")
    expected = await model_digest([path], tmp_path / "cache")
    (entry,) = (tmp_path / "cache" / "digests").iterdir()
    put(entry, b"\xff garbage")
    assert await model_digest([path], tmp_path / "cache") == expected


async def test_cache_that_cannot_be_written_to_costs_only_time(tmp_path: Path) -> None:
    path = put(tmp_path / "a", b"content")
    blocked = put(tmp_path / "cache", b"a file where a folder should be")
    assert await model_digest([path], blocked) == blake3(b"content").hexdigest()


async def test_cancelling_stops_reading_and_remembers_nothing(tmp_path: Path) -> None:
    path = put(tmp_path / "large", b"")
    os.truncate(path, 1 << 40)  # a hole of a TB: minutes of hashing, no disk
    with trio.move_on_after(0.05) as scope:
        await model_digest([path], tmp_path / "cache")
    assert scope.cancelled_caught
    assert not (tmp_path / "cache").exists()


async def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await model_digest([tmp_path / "none"], tmp_path)


async def test_full_cache_forgets_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_REMEMBERED", 3)
    for number in range(6):
        await model_digest([put(tmp_path / f"{number}", b"x")], tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "digests").iterdir())) == 3
