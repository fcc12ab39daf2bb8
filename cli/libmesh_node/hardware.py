"""What this machine has for models: GPUs and their memory, main memory, processors.

Each source is asked directly, without a vendor's tool that may not be installed: NVIDIA through the driver's own NVML
library, AMD through the kernel's sysfs, Apple through sysctl. What cannot be asked is absent, never guessed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MAC_SHARE = 0.75
"""Part of a Mac's memory that Metal lets a GPU use: recommendedMaxWorkingSetSize is 2/3 to 3/4 of it."""

CPU_SHARE = 0.75
"""Part of main memory for models where there is no GPU; the rest is for the system and everything else."""

_AMD = "0x1002"
_NAME_LENGTH = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `memory_bytes` is all that it has. `kind`: `nvidia`, `amd` or `apple`."""

    name: str
    memory_bytes: int
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """This machine. `ram_bytes` is what this process may use: less than the machine's inside a container."""

    gpus: tuple[Gpu, ...]
    ram_bytes: int
    cpu: str
    cores: int

    def model_memory(self, *, gpu_usable: bool = True, max_vram_gb: float | None = None) -> int:
        """Bytes for models: the GPUs' memory, or `CPU_SHARE` of main memory if there are none.

        Args:
            gpu_usable: whether the llama-server at hand was built for these GPUs (`probe.list_devices`).
            max_vram_gb: the owner's limit, in units of 10^9 bytes.
        """
        gpus = sum(gpu.memory_bytes for gpu in self.gpus) if gpu_usable else 0
        memory = gpus or int(self.ram_bytes * CPU_SHARE)
        return memory if max_vram_gb is None else min(memory, int(max_vram_gb * 1e9))


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
    return Gpu(name.value.decode("utf-8", "replace") or "NVIDIA GPU", memory.total, "nvidia")


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
