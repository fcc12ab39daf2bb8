"""What a worker tells of its rpc-server when a session is opened."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """A device of the worker's rpc-server, as it answers for it. `cpu`: its buffers are plain memory."""

    alignment: int
    max_size: int
    free: int
    total: int
    cpu: bool


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What the worker told when the session was opened. `unpacks`: it takes graphs packed, too (`packing.py`)."""

    protocol: tuple[int, int, int]
    devices: tuple[Device, ...]
    unpacks: bool = False
