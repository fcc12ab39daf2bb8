"""One peer of the soak: a member of a real mesh in a process of its own, that uses the others and is used by them.

    python -m tests.soak.peer NUMBER SEED [TOKEN]

Without a token it founds the mesh, and prints one. Then it prints a line of JSON every few seconds: what it has done, and
what it holds. Lines on stdin: `work`, `quiet`, and `tasks` to have
them named. It ends with status 3 if a byte ever came wrong.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import trio

import libmesh
from libmesh import Libp2pConfig, MeshError, PeerState, Scope, SecretKey, Stream, StreamReset

ECHO, TCP_ECHO = "soak/echo", "soak/tcp"
USERS = 6
REPORT_EVERY = 2.0  # seconds
BROKEN = (MeshError, trio.BrokenResourceError, trio.ClosedResourceError)


class Corrupted(Exception):
    """A stream ended as if all were well, with other bytes than were sent."""


class Peer:
    """What one peer does. `lots` decides everything that is left to chance here."""

    def __init__(self, mesh: libmesh.Mesh, lots: random.Random) -> None:
        self.mesh, self.lots = mesh, lots
        self.counts: Counter[str] = Counter()
        self.working = trio.CancelScope()

    async def echo(self, stream: Stream) -> None:
        """Send back what comes, with pauses of the reader."""
        try:
            while data := await stream.receive_some():
                if self.lots.random() < 0.01:
                    await trio.sleep(self.lots.uniform(0, 2))
                await stream.send_all(data)
            await stream.aclose()
        except trio.BrokenResourceError:
            return
        finally:
            stream.reset()  # half an echo must not look like a whole one

    async def work(self) -> None:
        """Use random peers in random ways, until cancelled."""
        self.working = trio.CancelScope()
        with self.working:
            async with trio.open_nursery() as nursery:
                for _ in range(USERS):
                    nursery.start_soon(self.use)

    async def use(self) -> None:
        while True:
            await trio.sleep(self.lots.uniform(0, 0.02))
            others = [entry.peer for entry in self.mesh.view.peers if entry.state is PeerState.ALIVE]
            if not others:
                continue
            limit = self.lots.choice((0.0005, 0.002, 0.01, 0.05, 0.5, 20, 20, 20))
            with trio.move_on_after(limit) as scope:
                try:
                    service = self.lots.choice((ECHO, ECHO, TCP_ECHO))
                    wait = self.lots.random() < 0.5
                    await self.transfer(
                        await self.mesh.open_service(self.lots.choice(others), service, wait=wait)
                    )
                    self.counts["whole"] += 1
                except BROKEN:
                    self.counts["cut"] += 1
            self.counts["cancelled"] += scope.cancelled_caught

    async def transfer(self, stream: Stream) -> None:
        """Send, and compare what comes back."""
        data = self.lots.randbytes(self.lots.choice((10, 1000, 50_000, 600_000)))
        got, ended = hashlib.sha256(), False
        try:
            async with sending(stream, data):
                while piece := await stream.receive_some():
                    got.update(piece)
                    if self.lots.random() < 0.01:
                        await trio.sleep(self.lots.uniform(0, 1))
            if got.digest() != hashlib.sha256(data).digest():
                raise Corrupted
            ended = True
        finally:
            if ended or self.lots.random() < 0.5:
                with trio.CancelScope(shield=True), suppress(*BROKEN):
                    await stream.aclose()
            else:
                stream.reset()

    async def report(self) -> None:
        """Say what was done and what is held."""
        while True:
            print(json.dumps(self.held()), flush=True)  # noqa: T201
            await trio.sleep(REPORT_EVERY)

    def held(self) -> dict[str, int]:
        """What a leak would show in; memory in KiB."""
        gc.collect()
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
        alive = sum(entry.state is PeerState.ALIVE for entry in self.mesh.view.peers)
        return {
            **self.counts,
            "alive": alive,
            "resident": resident,
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "objects": len(gc.get_objects()),
        }

    async def obey(self, nursery: trio.Nursery) -> None:
        """Do what stdin says; the end of it is the end."""
        unread = b""
        async with trio.lowlevel.FdStream(os.dup(0)) as stdin:
            while data := await stdin.receive_some(100):
                *lines, unread = (unread + data).split(b"\n")
                for line in lines:
                    if line == b"work":
                        nursery.start_soon(self.work)
                    elif line == b"quiet":
                        self.working.cancel()
                    elif line == b"tasks":
                        print(json.dumps({"names": tasks()}), flush=True)  # noqa: T201
        nursery.cancel_scope.cancel()


def tasks() -> dict[str, int]:
    """The tasks that live, by their names."""
    found: Counter[str] = Counter()
    left = [trio.lowlevel.current_root_task()]
    while left:
        task = left.pop()
        if task is not None:
            found[task.name] += 1
            left += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return dict(found)


@asynccontextmanager
async def sending(stream: Stream, data: bytes) -> AsyncIterator[None]:
    """Send `data` and an end of file beside the body. An error of the body comes out alone."""

    async def send() -> None:
        with suppress(*BROKEN):
            await stream.send_all(data)
            await stream.send_eof()

    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        try:
            yield
        except BROKEN as exc:
            failure = exc
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise StreamReset(str(failure)) from failure


async def tcp_echo(stream: trio.SocketStream) -> None:
    """What is exposed: a TCP server."""
    with suppress(trio.BrokenResourceError):
        async for data in stream:
            await stream.send_all(data)


async def main(number: int, seed: int, token: str | None) -> None:
    """Be a peer until stdin ends."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    key, mesh_key = SecretKey(bytes([number + 1]) * 32), SecretKey(bytes([255]) * 32)
    listen = Libp2pConfig(hosts=("127.0.0.1",))
    opening = (
        libmesh.open_mesh(key, mesh_key=mesh_key, listen=listen)
        if token is None
        else libmesh.open_mesh(key, invite=token, listen=listen, wait=False)
    )
    async with opening as mesh, trio.open_nursery() as nursery:
        if token is None:
            print(json.dumps({"token": mesh.invite(scope=Scope.CLIENT, not_after_unix=None)}), flush=True)  # noqa: T201
        peer = Peer(mesh, random.Random(f"{seed} {number} {os.getpid()}"))
        nursery.start_soon(partial(trio.serve_listeners, tcp_echo, listeners))
        await nursery.start(libmesh.expose, mesh, TCP_ECHO, "127.0.0.1", port)
        with mesh.offer(ECHO, peer.echo):
            nursery.start_soon(peer.report)
            nursery.start_soon(peer.obey, nursery)
            await trio.sleep_forever()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    try:
        trio.run(main, int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
    except* Corrupted:
        sys.exit(3)
