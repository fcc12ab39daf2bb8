"""A cable between two network namespaces, as long and as bad as asked: delay, jitter, loss, a rate, and cut.

One process joins pairs of TUN devices and carries their packets, because kernels without `sch_netem` cannot delay any.
It runs as a script of its own (`python link.py`), with nothing but the standard library, and obeys one JSON object a
line on stdin, each answered by a line with `{}` or `{"error": …}`:

    {"add": 0, "ends": [[NAMESPACE_FILE, DEVICE], [NAMESPACE_FILE, DEVICE]]}
    {"set": 0, "delay": 0.01, "jitter": 0.0, "loss": 0.0, "rate": 0, "cut": false, "seed": 1}

It ends with its stdin. The devices end with it, so the caller configures addresses after `add` and never cleans up.

While nothing is lost or slowed, segmentation is left to the far end (the packets' virtio header is passed along), so a
read carries up to 64 KiB: over 300 Mbit/s on a slow core. With loss or a rate, packets are those of a wire, 1500 bytes.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import random
import select
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TSO = 0x01 | 0x02 | 0x04  # checksum, TSO for IPv4, TSO for IPv6

_HEADER = 10  # of virtio, in front of each packet
_READ = 65536 + _HEADER
_BATCH = 64  # packets read from one end before the others have their turn
_QUEUE_BYTES = 32 << 20
"""Packets under way in one direction. More are dropped, as by any full queue."""
_QUEUE_SECONDS = 0.2
"""What a queue in front of a rate holds."""


@dataclass(slots=True)
class _Direction:
    """Packets on their way from one end to the other, in the order in which they arrive."""

    source: int
    target: int
    under_way: deque[tuple[float, bytes]] = field(default_factory=deque)
    size: int = 0
    free_at: float = 0.0  # when the sender's rate allows the next packet
    last_due: float = 0.0  # jitter never reorders


@dataclass(slots=True)
class _Link:
    directions: tuple[_Direction, _Direction]
    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    rate: float = 0.0  # bytes per second and direction; 0 for no limit
    cut: bool = False
    rng: random.Random = field(default_factory=lambda: random.Random(1))

    def set(self, *, seed: int | None = None, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)
        if seed is not None:
            self.rng = random.Random(seed)
        for direction in self.directions:
            fcntl.ioctl(direction.source, _TUNSETOFFLOAD, 0 if self.loss or self.rate else _TSO)
            if self.cut:
                direction.under_way.clear()
                direction.size = 0

    def take(self, direction: _Direction, packet: bytes, now: float) -> None:
        """A packet enters the cable, or is lost."""
        if self.cut or direction.size > _QUEUE_BYTES or (self.loss and self.rng.random() < self.loss):
            return
        sent = now
        if self.rate:
            if direction.free_at > now + _QUEUE_SECONDS:
                return
            direction.free_at = max(direction.free_at, now) + (len(packet) - _HEADER) / self.rate
            sent = direction.free_at
        due = sent + self.delay + (self.jitter * self.rng.random() if self.jitter else 0.0)
        direction.last_due = due = max(due, direction.last_due)
        direction.under_way.append((due, packet))
        direction.size += len(packet)

    def deliver(self, direction: _Direction, now: float) -> None:
        """Packets whose time has come leave at the other end, unless that end is down."""
        under_way = direction.under_way
        while under_way and under_way[0][0] <= now:
            _, packet = under_way.popleft()
            direction.size -= len(packet)
            try:
                os.write(direction.target, packet)
            except OSError:  # down, or its queue is full: lost, as on a real wire
                continue


def _tun(namespace: str, device: str) -> int:
    """A TUN device in the namespace; the file descriptor of its packets."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    away = os.open(namespace, os.O_RDONLY)
    try:
        if libc.setns(away, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", device.encode(), flags))
        return fd
    finally:
        libc.setns(home, _CLONE_NEWNET)
        os.close(home)
        os.close(away)


class _Cables:
    def __init__(self) -> None:
        self.links: dict[int, _Link] = {}
        self.sources: dict[int, tuple[_Link, _Direction]] = {}

    def obey(self, order: dict[str, Any]) -> None:
        if "add" in order:
            (first, second) = (_tun(*end) for end in order["ends"])
            link = _Link((_Direction(first, second), _Direction(second, first)))
            link.set()
            self.links[order["add"]] = link
            self.sources |= {direction.source: (link, direction) for direction in link.directions}
        else:
            values = {key: value for key, value in order.items() if key != "set"}
            self.links[order["set"]].set(**values)

    def wait(self, now: float) -> list[int]:
        """Descriptors with something to read, or none when a packet is due."""
        dues = [direction.under_way[0][0] for _, direction in self.sources.values() if direction.under_way]
        timeout = max(0.0, min(dues) - now) if dues else None
        readable, _, _ = select.select([0, *self.sources], [], [], timeout)
        return readable

    def carry(self, readable: list[int]) -> None:
        for fd in readable:
            if fd not in self.sources:
                continue
            link, direction = self.sources[fd]
            now = time.monotonic()
            for _ in range(_BATCH):
                try:
                    link.take(direction, os.read(fd, _READ), now)
                except BlockingIOError:
                    break
                except OSError:  # the device is down
                    break
        now = time.monotonic()
        for link, direction in self.sources.values():
            if direction.under_way:
                link.deliver(direction, now)


def main() -> None:
    """Carry packets until stdin ends."""
    cables, orders = _Cables(), b""
    while True:
        readable = cables.wait(time.monotonic())
        if 0 in readable:
            received = os.read(0, 65536)
            if not received:
                return
            orders += received
            *lines, orders = orders.split(b"\n")
            for line in lines:
                try:
                    cables.obey(json.loads(line))
                    answer = "{}"
                except (OSError, ValueError, KeyError, TypeError) as exc:
                    answer = json.dumps({"error": repr(exc)})
                sys.stdout.write(f"{answer}\n")
                sys.stdout.flush()
        cables.carry(readable)


if __name__ == "__main__":
    main()
