"""What this machine has for models: GPUs and their memory, main memory, processors.

Each source is asked directly, without a vendor's tool that may not be installed: NVIDIA through the driver's own NVML
library, AMD through the kernel's sysfs, Apple through sysctl. What cannot be asked is absent, never guessed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAC_SHARE = 0.75
"""Part of a Mac's memory that Metal lets a GPU use: recommendedMaxWorkingSetSize is 2/3 to 3/4 of it."""

CPU_SHARE = 0.75
"""Part of main memory for models where there is no GPU; the rest is for the system and everything else."""

_PROBE_BYTES = 64 << 20
_MEMORY_CLOCK = 2  # NVML_CLOCK_MEM
_AMD = "0x1002"
_DEVICE_MEMORY = re.compile(
    r"\((\d{1,9}) MiB, \d+ MiB free\)$"
)  # llama.cpp, common/arg.cpp, `--list-devices`
_NAME_LENGTH = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `memory_bytes` is all that it has. `kind`: `nvidia`, `amd` or `apple`.

    `bandwidth`: of its memory in bytes per second, by its clock and width; 0 if the driver does not tell.
    """

    name: str
    memory_bytes: int
    kind: str
    bandwidth: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """This machine. `ram_bytes` is what this process may use: less than the machine's inside a container."""

    gpus: tuple[Gpu, ...]
    ram_bytes: int
    cpu: str
    cores: int

    def model_memory(self, *, devices: Sequence[str] | None = None, max_vram_gb: float | None = None) -> int:
        """Bytes for models: the GPUs' memory, or `CPU_SHARE` of main memory if there are none.

        Args:
            devices: what llama-server says of those it shall compute on (`probe.list_devices`), empty for the processor
                alone; `None` while it has not been asked. What it says of their memory counts: it knows what it can use.
            max_vram_gb: the owner's limit, in units of 10^9 bytes.
        """
        told = sum(int(found[1]) << 20 for found in map(_DEVICE_MEMORY.search, devices or ()) if found)
        usable = self.gpus if devices is None or devices else ()
        gpus = told or sum(gpu.memory_bytes for gpu in usable)
        memory = gpus or int(self.ram_bytes * CPU_SHARE)
        return memory if max_vram_gb is None else min(memory, int(max_vram_gb * 1e9))


def memory_bandwidth(cache: Path) -> float:
    """Bytes per second that this machine's processors read from main memory, all together; 0 if it cannot be told.

    Measured once in about 0.2 s, with as many threads as llama.cpp would use, then remembered in the file `cache` for this
    processor. Blocks.
    """
    key = f"{_cpu_name()} x {_cores()}"
    try:
        known = json.loads(cache.read_bytes()[:65536])
        if isinstance(known, dict) and isinstance(known.get(key), int | float):
            return float(known[key])
    except (OSError, ValueError):
        known = {}
    measured = _read_speed(max(1, _cores() // 2))
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps({**(known if isinstance(known, dict) else {}), key: measured}))
    return measured


def _read_speed(threads: int) -> float:
    """Sum up arrays that no cache holds; numpy does so without the interpreter's lock. The best of five rounds."""
    arrays = [np.ones(_PROBE_BYTES // 4, np.float32) for _ in range(threads)]
    best = math.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(lambda array: array.max(), arrays))
            best = min(best, time.perf_counter() - start)
    return float(round(threads * _PROBE_BYTES / best, -8))


def detect(*, sysfs: Path = Path("/sys"), nvml: str = "libnvidia-ml.so.1") -> Hardware:
    """Look. Takes milliseconds, tens where an NVIDIA driver wakes up. Raises nothing."""
    ram = _ram_bytes(sysfs)
    if sys.platform == "darwin":
        gpus = _apple_gpus(ram)
    else:
        gpus = (*_nvidia_gpus(nvml), *_amd_gpus(sysfs / "class" / "drm"))
    return Hardware(gpus=gpus, ram_bytes=ram, cpu=_cpu_name(), cores=_cores())


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _nvidia_gpus(library: str) -> tuple[Gpu, ...]:
    """By NVML, NVIDIA's API reference, "Device Queries". Every function returns 0 for success."""
    try:
        nvml = ctypes.CDLL(library)
        if nvml.nvmlInit_v2() != 0:  # no device, or a driver that does not match its library
            return ()
    except (OSError, AttributeError):
        return ()
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return ()
        found = (_nvidia_gpu(nvml, index) for index in range(count.value))
        return tuple(gpu for gpu in found if gpu is not None)
    finally:
        nvml.nvmlShutdown()


def _nvidia_gpu(nvml: ctypes.CDLL, index: int) -> Gpu | None:
    device, memory, name = ctypes.c_void_p(), _Memory(), ctypes.create_string_buffer(_NAME_LENGTH)
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
        return None
    if nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) != 0:
        return None
    nvml.nvmlDeviceGetName(device, name, ctypes.c_uint(_NAME_LENGTH))
    return Gpu(
        name.value.decode("utf-8", "replace") or "NVIDIA GPU",
        memory.total,
        "nvidia",
        _nvidia_bandwidth(nvml, device),
    )


def _nvidia_bandwidth(nvml: ctypes.CDLL, device: ctypes.c_void_p) -> float:
    """Width by clock, twice: data moves at both edges. Older drivers do not tell the width."""
    width, clock = ctypes.c_uint(), ctypes.c_uint()
    try:
        if nvml.nvmlDeviceGetMemoryBusWidth(device, ctypes.byref(width)) != 0:
            return 0.0
        if nvml.nvmlDeviceGetMaxClockInfo(device, ctypes.c_uint(_MEMORY_CLOCK), ctypes.byref(clock)) != 0:
            return 0.0
    except AttributeError:
        return 0.0
    return width.value / 8 * clock.value * 1e6 * 2


def _amd_gpus(cards: Path) -> tuple[Gpu, ...]:
    """By the kernel's amdgpu documentation, "GPU memory usage information"."""
    found = []
    for card in sorted(cards.glob("card[0-9]*")):
        device = card / "device"
        total = _read(device / "mem_info_vram_total")
        if _read(device / "vendor") == _AMD and total.isdigit():
            found.append(Gpu(_read(device / "product_name") or "AMD GPU", int(total), "amd"))
    return tuple(found)


def _apple_gpus(ram: int) -> tuple[Gpu, ...]:
    if platform.machine() != "arm64":
        return ()
    return (Gpu(_sysctl("machdep.cpu.brand_string") or "Apple GPU", int(ram * MAC_SHARE), "apple"),)


def _ram_bytes(sysfs: Path) -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (_read(sysfs / "fs/cgroup/memory.max"), _read(sysfs / "fs/cgroup/memory/memory.limit_in_bytes"))
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string")
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _sysctl(name: str) -> str:
    try:
        return subprocess.run(
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
