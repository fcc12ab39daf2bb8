"""What streams cost when nothing moves, and what a small request suffers beside bulk. For `streams.py`; also alone.

    python bench/streams_costs.py

Two processes over loopback for each measure. Memory is the growth of resident pages.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from libmesh.net.libp2p import Libp2pConfig, Libp2pNetwork, open_libp2p_network

HOLD, ECHO, SINK = "/bench/hold/1", "/bench/echo/1", "/bench/sink/1"
STREAMS = 10_000
CONNECTIONS = 40
TUNNELS = 2000
IDLE_SECONDS = 10.0
BULK = 8
REQUEST = bytes(1024)
CONFIG = Libp2pConfig(hosts=("127.0.0.1",))
PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")


def resident(pid: int | str) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def processor(pid: int | str) -> float:
    """CPU seconds so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


async def far() -> None:
    """Serve the three protocols; print where."""

    async def hold(stream) -> None:
        await stream.send_all(b".")
        async for _ in stream:
            pass

    async def echo(stream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async def sink(stream) -> None:
        async for _ in stream:
            pass

    async with open_libp2p_network(secrets.token_bytes(32), CONFIG) as network:
        for protocol, handler in ((HOLD, hold), (ECHO, echo), (SINK, sink)):
            network.set_handler(protocol, handler, admitted_only=False)
        print(network.addresses()[0], network.peer, flush=True)
        await trio.sleep_forever()


async def idle_streams(network: Libp2pNetwork, peer: str, far_pid: int) -> dict[str, float]:
    async def memory() -> int:
        await trio.sleep(0.5)
        return resident("self") + resident(far_pid)

    before = await memory()
    streams = []
    for _ in range(STREAMS):
        stream = await network.open_stream(peer, HOLD)
        await stream.send_all(b"?")
        await stream.receive_some()
        streams.append(stream)
    after = await memory()
    for stream in streams:
        stream.reset()
    return {f"KiB per idle stream, both ends ({STREAMS:,} open)": (after - before) / STREAMS / 1024}


async def idle_connections(where: str, peer: str, far_pid: int) -> dict[str, float]:
    async with AsyncExitStack() as stack:
        networks = [
            await stack.enter_async_context(open_libp2p_network(secrets.token_bytes(32), CONFIG))
            for _ in range(CONNECTIONS)
        ]
        before, lonely = resident(far_pid), processor(far_pid)
        await trio.sleep(IDLE_SECONDS)
        lonely = processor(far_pid) - lonely
        for network in networks:
            await network.connect(peer, [where])
        await trio.sleep(5)
        after, busy = resident(far_pid), processor(far_pid)
        await trio.sleep(IDLE_SECONDS)
        busy = processor(far_pid) - busy
    return {
        f"KiB per idle connection, one end ({CONNECTIONS} open)": (after - before) / CONNECTIONS / 1024,
        "µs of CPU per second and idle connection": (busy - lonely) / IDLE_SECONDS / CONNECTIONS * 1e6,
    }


async def beside_bulk(network: Libp2pNetwork, peer: str) -> dict[str, float]:
    async def bulk() -> None:
        stream = await network.open_stream(peer, SINK)
        block = bytes(1 << 20)
        while True:
            await stream.send_all(block)

    async def waits(seconds: float) -> list[float]:
        found = []
        async with await network.open_stream(peer, ECHO) as stream:
            end = time.perf_counter() + seconds
            while (start := time.perf_counter()) < end:
                await stream.send_all(REQUEST)
                left = len(REQUEST)
                while left:
                    left -= len(await stream.receive_some())
                found.append((time.perf_counter() - start) * 1e3)
                await trio.sleep(0.005)
        return found

    alone = await waits(2)
    async with trio.open_nursery() as nursery:
        for _ in range(BULK):
            nursery.start_soon(bulk)
        await trio.sleep(0.5)
        beside = await waits(5)
        nursery.cancel_scope.cancel()

    def p99(values: list[float]) -> float:
        return statistics.quantiles(values, n=100)[98]

    return {
        "ms, 1 KiB request alone, p99": p99(alone),
        f"ms, 1 KiB request beside {BULK} bulk streams, median": statistics.median(beside),
        f"ms, 1 KiB request beside {BULK} bulk streams, p99": p99(beside),
    }


async def near(name: str, where: str, peer: str, far_pid: int) -> dict[str, float]:
    if name == "connections":
        return await idle_connections(where, peer, far_pid)
    async with open_libp2p_network(secrets.token_bytes(32), CONFIG) as network:
        await network.connect(peer, [where])
        if name == "streams":
            return await idle_streams(network, peer, far_pid)
        return await beside_bulk(network, peer)


def idle_tunnels() -> dict[str, float]:
    """Between two members of a mesh; the target and the clients are other processes."""
    here = Path(__file__).resolve().parent
    children: list[subprocess.Popen] = []

    def start(script: str, *arguments: str) -> tuple[str, int]:
        command = [sys.executable, str(here / script), *arguments]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return children[-1].stdout.readline().strip(), children[-1].pid

    clients: list[socket.socket] = []
    try:
        target, _ = start("streams_load.py")
        invite, far_pid = start("streams_mesh.py", "far", target)
        port, near_pid = start("streams_mesh.py", "near", invite)

        def use() -> None:
            clients.append(socket.create_connection(("127.0.0.1", int(port)), timeout=60))
            clients[-1].sendall(b"E?")
            clients[-1].recv(1)

        for _ in range(100):  # what is there once, whatever comes
            use()
        before = resident(near_pid) + resident(far_pid)
        for _ in range(TUNNELS):
            use()
        grown = resident(near_pid) + resident(far_pid) - before
        burnt = processor(near_pid) + processor(far_pid)
        time.sleep(IDLE_SECONDS)
        burnt = processor(near_pid) + processor(far_pid) - burnt
    finally:
        for client in clients:
            client.close()
        for child in children:
            child.kill()
            child.wait()
    return {
        f"KiB per idle tunnel, both ends ({TUNNELS:,} open)": grown / TUNNELS / 1024,
        f"ms of CPU per second, both ends, {TUNNELS:,} idle tunnels": burnt / IDLE_SECONDS * 1e3,
    }


def measure() -> dict[str, float]:
    """Name of each cost, with its unit, and the figure. Fresh processes for each: memory that was freed is not given back."""
    found: dict[str, float] = {}
    for name in ("bulk", "streams", "connections"):
        child = subprocess.Popen([sys.executable, __file__, "far"], stdout=subprocess.PIPE, text=True)
        try:
            address = child.stdout.readline().split()
            command = [sys.executable, __file__, name, *address, str(child.pid)]
            found |= json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        finally:
            child.kill()
            child.wait()
    return found | idle_tunnels()


def main() -> None:
    """Measure, or be one of the processes."""
    match sys.argv[1:]:
        case []:
            print(json.dumps(measure(), ensure_ascii=False, indent=2))
        case ["far"]:
            trio.run(far)
        case [name, where, peer, far_pid]:
            print(json.dumps(trio.run(near, name, where, peer, int(far_pid))))


if __name__ == "__main__":
    main()
