"""A fresh rpc-server: started for one session, asked what it has, and gone with it."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from libmesh_node.llama.engine import Binary
from libmesh_node.llama.process import GuardedProcess, Lines, open_guarded
from libmesh_node.llama.rpc.facts import Device, WorkerFacts
from libmesh_node.llama.rpc.frames import HELLO_ANSWER, MAJOR, Command, ProtocolError, frame
from libmesh_node.llama.rpc.opening import MAX_DEVICES, Protocol
from libmesh_node.llama.supervisor import free_port

log = logging.getLogger(__name__)

START_LIMIT = 30.0
"""Seconds until rpc-server has started and told of its devices. Builds for GPUs initialise those first."""

_ANSWER_LIMIT = 4096


@asynccontextmanager
async def fresh_rpc_server(
    binary: Binary, environment: Mapping[str, str], device: str | None
) -> AsyncIterator[tuple[GuardedProcess, trio.SocketStream, int]]:
    """A new process, the one connection to it, and its port. Raises `ProtocolError`, `ProgramNotStarted`, `TooSlowError`.

    Nobody else on this machine gets in as long as the connection stands: rpc-server serves one at a time.
    """
    port = free_port()
    argv = [str(binary.path), "-H", "127.0.0.1", "-p", str(port)]
    if device is not None:
        argv += ["-d", "CPU" if device.lower() == "cpu" else device]
    async with open_guarded(argv, environment=environment) as child, trio.open_nursery() as nursery:
        nursery.start_soon(_drain, child)
        with trio.fail_after(START_LIMIT):
            sock = await _connect(child, port)
        async with sock:
            yield child, sock, port
        nursery.cancel_scope.cancel()


async def _drain(child: GuardedProcess) -> None:
    lines = Lines(child.output)
    while (line := await lines.receive()) is not None:
        log.debug("rpc-server: %s", line)


async def _connect(child: GuardedProcess, port: int) -> trio.SocketStream:
    while True:
        try:
            sock = await trio.open_tcp_stream("127.0.0.1", port)
        except OSError:
            with trio.move_on_after(0.01):
                status = await child.wait()
                raise ProtocolError(f"the worker's rpc-server ended with {status} at once") from None
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock


async def ask_facts(
    sock: trio.SocketStream, granted: int, *, cpu: bool, protocol: Protocol = (MAJOR, 0, 0)
) -> WorkerFacts:
    """Say HELLO and learn of the devices. Their free memory is what was granted, shared in their proportion.

    Also what our end in front of the program can do.

    `protocol` is what the program is known to speak: old ones take no payload with HELLO, and answer with three bytes.
    """
    hello = await _exchange(sock, Command.HELLO, bytes(24) if protocol[0] >= MAJOR else b"")
    if not 3 <= len(hello) <= HELLO_ANSWER.size:
        raise ProtocolError("rpc-server's answer to HELLO makes no sense")
    major, minor, patch = hello[:3]
    (count,) = struct.unpack("<I", await _exchange(sock, Command.DEVICE_COUNT))
    if not 1 <= count <= MAX_DEVICES:
        raise ProtocolError(f"rpc-server has {count} devices")
    devices = []
    for number in range(count):
        which = struct.pack("<I", number)
        (alignment,) = struct.unpack("<Q", await _exchange(sock, Command.GET_ALIGNMENT, which))
        (max_size,) = struct.unpack("<Q", await _exchange(sock, Command.GET_MAX_SIZE, which))
        free, total = struct.unpack("<QQ", await _exchange(sock, Command.GET_DEVICE_MEMORY, which))
        devices.append(Device(alignment, max_size, free, total, cpu))
    whole = sum(device.free for device in devices) or 1
    shared = (replace(device, free=min(device.free, granted * device.free // whole)) for device in devices)
    return WorkerFacts((major, minor, patch), tuple(shared), unpacks=True)


async def _exchange(sock: trio.SocketStream, command: Command, payload: bytes = b"") -> bytes:
    await sock.send_all(frame(command, payload))
    data = b""
    while len(data) < 8 or len(data) < 8 + int.from_bytes(data[:8], "little"):
        received = await sock.receive_some(4096)
        if not received or len(data) > _ANSWER_LIMIT:
            raise ProtocolError(f"rpc-server does not answer command {int(command)} as it should")
        data += received
    return data[8:]
