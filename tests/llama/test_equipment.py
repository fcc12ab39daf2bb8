"""Which of a machine's devices count, and for how much. llama.cpp is played; what it says was recorded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from libmesh_node import equipment
from libmesh_node.equipment import Equipment
from libmesh_node.errors import NodeError
from libmesh_node.hardware import CPU_SHARE, Gpu, Hardware
from libmesh_node.options import NodeOptions

GB = 10**9
LISTED = (
    "CUDA0: NVIDIA H100 80GB HBM3 (81090 MiB, 80576 MiB free)",
    "CUDA1: NVIDIA GeForce RTX 3090 (24124 MiB, 23847 MiB free)",
)
CARDS = (
    Gpu("NVIDIA H100 80GB HBM3", 80 << 30, "nvidia", 3.3e12),
    Gpu("NVIDIA GeForce RTX 3090", 24 << 30, "nvidia", 936e9),
)


async def set_up(
    monkeypatch: pytest.MonkeyPatch, listed: tuple[str, ...], gpus: tuple[Gpu, ...], **options: Any
) -> Equipment:
    engine = SimpleNamespace(require_llama_server=lambda: SimpleNamespace(path=Path("/x")), notes=())
    machine = Hardware(gpus=gpus, ram_bytes=64 * GB, cpu="", cores=8)
    monkeypatch.setattr(equipment, "find_engine", lambda _: engine)
    monkeypatch.setattr(equipment, "list_devices", lambda _: listed)
    monkeypatch.setattr(equipment, "detect", lambda: machine)
    monkeypatch.setattr(equipment, "memory_bandwidth", lambda _: 5e10)
    found = Equipment(NodeOptions(data_dir=Path("/nowhere"), **options))
    await found.measure()
    await found.set_up()
    return found


@pytest.mark.parametrize(
    ("device", "names", "memory", "bandwidth"),
    [
        (None, ("CUDA0", "CUDA1"), (81090 + 24124) << 20, 3.3e12),
        ("cuda1", ("CUDA1",), 24124 << 20, 936e9),
        ("CUDA1, CUDA0", ("CUDA0", "CUDA1"), (81090 + 24124) << 20, 3.3e12),
        ("cpu", (), int(64 * GB * CPU_SHARE), 5e10),
        ("none", (), int(64 * GB * CPU_SHARE), 5e10),
    ],
)
async def test_only_the_chosen_devices_count(
    monkeypatch: pytest.MonkeyPatch, device: str | None, names: tuple[str, ...], memory: int, bandwidth: float
) -> None:
    found = await set_up(monkeypatch, LISTED, CARDS, device=device)
    assert (found.own_devices, found.memory_bytes, found.bandwidth) == (names, memory, bandwidth)


async def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NodeError, match=r"no device cuda7 for --device.* llama-server has: CUDA0, CUDA1\."):
        await set_up(monkeypatch, LISTED, CARDS, device="CUDA0,CUDA7")
    with pytest.raises(NodeError, match="llama-server has: none"):
        await set_up(monkeypatch, (), (), device="CUDA0")


async def test_cards_that_llama_server_cannot_use_count_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = await set_up(monkeypatch, (), CARDS)
    assert (found.own_devices, found.memory_bytes) == ((), int(64 * GB * CPU_SHARE))


async def test_what_is_shared_with_the_processor_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    card = (Gpu("Apple M4 Max", 48 << 30, "apple"),)
    found = await set_up(monkeypatch, ("MTL0: Apple M4 Max (49152 MiB, 49151 MiB free)",), card)
    assert (found.own_devices, found.memory_bytes, found.bandwidth) == (("MTL0",), 48 << 30, 5e10)


async def test_the_cap_holds_for_whatever_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = await set_up(monkeypatch, LISTED, CARDS, device="CUDA1", max_vram_gb=10.0)
    assert found.memory_bytes == 10 * GB
