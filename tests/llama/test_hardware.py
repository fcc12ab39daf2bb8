from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from libmesh_node import hardware
from libmesh_node.hardware import CPU_SHARE, Gpu, Hardware, detect, memory_bandwidth

GB = 10**9
H100 = "CUDA0: NVIDIA H100 80GB HBM3 (81090 MiB, 80576 MiB free)"  # as `llama-server --list-devices` has it

NVML = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory;
static int cards[2] = {0, 1};
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if (index == 1) return 15;  /* NVML_ERROR_GPU_IS_LOST */
    *device = &cards[index / 2]; return 0;
}
int nvmlDeviceGetMemoryInfo(void *device, memory *m) {
    m->total = 85899345920ull; m->free = 1; m->used = 2; return device >= (void *)cards ? 0 : 1;
}
int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    strncpy(name, device == &cards[0] ? "NVIDIA H100" : "", length); return 0;
}
#ifdef WIDTH
int nvmlDeviceGetMemoryBusWidth(void *device, unsigned *width) { *width = WIDTH; return device == &cards[0] ? 0 : 3; }
int nvmlDeviceGetMaxClockInfo(void *device, int kind, unsigned *clock) { *clock = CLOCK; return kind != 2; }
#endif
"""


def library(folder: Path, *defined: str, init: int = 0) -> str:
    """A driver library with NVML's own signatures, compiled; pointers and structures cross as they really do."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None, "a C compiler is needed, as for llama.cpp"
    source, built = folder / "nvml.c", folder / "libnvml.so"
    source.write_text(NVML)
    flags = ["-shared", "-fPIC", f"-DINIT={init}", *defined]
    subprocess.run([compiler, *flags, "-o", built, source], check=True)
    return str(built)


def sysfs(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content + "\n")
    return folder


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's ways of telling its hardware")


def test_this_machine_is_told(tmp_path: Path) -> None:
    found = detect()
    assert found.ram_bytes > 500_000_000
    assert found.cores >= 1
    assert found.cpu
    assert found.model_memory() > 0


def test_nvidia_cards_are_told_by_the_driver_and_a_lost_one_is_left_out(tmp_path: Path) -> None:
    found = detect(sysfs=tmp_path, nvml=library(tmp_path))
    assert found.gpus == (Gpu("NVIDIA H100", 80 << 30, "nvidia"), Gpu("NVIDIA GPU", 80 << 30, "nvidia"))


@pytest.mark.parametrize(
    ("width", "clock", "bandwidth"), [(5120, 2619, 3.352e12), (384, 10501, 1.008e12), (384, 9751, 936e9)]
)
def test_nvidia_bandwidth_is_that_of_the_data_sheet(
    tmp_path: Path, width: int, clock: int, bandwidth: float
) -> None:
    """What NVML tells of an H100 SXM, a 4090 and a 3090. A card that does not tell has none."""
    told = library(tmp_path, f"-DWIDTH={width}", f"-DCLOCK={clock}")
    first, second = detect(sysfs=tmp_path, nvml=told).gpus
    assert first.bandwidth == pytest.approx(bandwidth, rel=0.001)
    assert second.bandwidth == 0.0


def test_apples_memory_is_what_metal_may_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With what sysctl says on an M4 Max. Played: there is no Mac here."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(hardware, "_sysctl", lambda name: "Apple M4 Max" if "brand" in name else "")
    monkeypatch.setattr(hardware, "_ram_bytes", lambda _: 64 << 30)
    found = detect(sysfs=tmp_path)
    assert found.gpus == (Gpu("Apple M4 Max", 48 << 30, "apple"),)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert detect(sysfs=tmp_path).gpus == ()


def test_driver_without_a_card_or_without_its_functions_is_none(tmp_path: Path) -> None:
    assert detect(sysfs=tmp_path, nvml=library(tmp_path, init=9)).gpus == ()
    assert detect(sysfs=tmp_path, nvml="libc.so.6").gpus == ()
    assert detect(sysfs=tmp_path, nvml="no-such-library.so").gpus == ()


def test_amd_cards_are_told_by_the_kernel(tmp_path: Path) -> None:
    card = "class/drm/card{}/device/{}"
    files = {
        card.format(0, "vendor"): "0x1002",
        card.format(0, "mem_info_vram_total"): str(24 * GB),
        card.format(0, "product_name"): "Radeon PRO W7900",
        card.format(1, "vendor"): "0x8086",
        card.format(1, "mem_info_vram_total"): str(GB),
        card.format(2, "vendor"): "0x1002",
        card.format(2, "mem_info_vram_total"): "garbage",
        card.format(3, "vendor"): "0x1002",
        card.format(3, "mem_info_vram_total"): str(GB),
        "class/drm/card0-DP-1/status": "connected",
    }
    found = detect(sysfs=sysfs(tmp_path, files), nvml="none.so")
    assert found.gpus == (Gpu("Radeon PRO W7900", 24 * GB, "amd"), Gpu("AMD GPU", GB, "amd"))


@pytest.mark.parametrize("name", ["fs/cgroup/memory.max", "fs/cgroup/memory/memory.limit_in_bytes"])
def test_container_has_no_more_than_its_limit(tmp_path: Path, name: str) -> None:
    assert detect(sysfs=sysfs(tmp_path, {name: "123456789"}), nvml="none.so").ram_bytes == 123456789
    unlimited = detect(sysfs=sysfs(tmp_path, {name: "max"}), nvml="none.so").ram_bytes
    assert unlimited == detect(sysfs=tmp_path / "nothing", nvml="none.so").ram_bytes


@pytest.mark.parametrize(
    ("gpus", "devices", "limit", "memory"),
    [
        ((), None, None, int(64 * GB * CPU_SHARE)),
        ((24 * GB, 8 * GB), None, None, 32 * GB),
        ((24 * GB,), (), None, int(64 * GB * CPU_SHARE)),
        ((24 * GB,), ("Vulkan0: a card",), None, 24 * GB),
        ((24 * GB,), None, 10.5, 10_500_000_000),
        ((24 * GB,), None, 100, 24 * GB),
        ((24 * GB,), None, 0, 0),
        ((24 * GB, 8 * GB), (H100,), None, 81_090 << 20),
        ((), ("MTL0: Apple M4 Max (49152 MiB, 49151 MiB free)",), None, 48 << 30),
        ((), (H100, "CUDA1: NVIDIA H100 80GB HBM3 (81090 MiB, 1 MiB free)"), 100, 100 * GB),
    ],
)
def test_memory_for_models(
    gpus: tuple[int, ...], devices: tuple[str, ...] | None, limit: float | None, memory: int
) -> None:
    cards = tuple(Gpu("x", size, "nvidia") for size in gpus)
    machine = Hardware(gpus=cards, ram_bytes=64 * GB, cpu="", cores=8)
    assert machine.model_memory(devices=devices, max_vram_gb=limit) == memory


def test_bandwidth_is_measured_once_and_remembered(tmp_path: Path) -> None:
    cache = tmp_path / "folder" / "hardware.json"
    first = memory_bandwidth(cache)
    assert first > 0
    cache.write_text(cache.read_text().replace(str(first), "12345.0"))
    assert memory_bandwidth(cache) == 12345.0
    cache.write_text("[garbage")
    assert memory_bandwidth(cache) > 0
