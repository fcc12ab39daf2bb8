"""A member of a mesh in a process of its own, for the lab: takes orders on stdin and answers on stdout, JSON by line.

It offers the service `echo`. The first line that it says is its id, with an invite if it holds the mesh's key. Orders:

    {"id": 1, "do": "connect", "peer": ID}      from nothing: seconds to the first byte back, and the path's kind then
    {"id": 7, "do": "climb", "peer": ID}        the same, and then: seconds from there to a direct or punched path
    {"id": 4, "do": "echo", "peer": ID}         as `connect`, over the path that there is
    {"id": 2, "do": "path", "peer": ID}         the path now
    {"id": 5, "do": "carry", "peer": ID}        carry bytes through a tunnel to it from now on (`carrying.py`)
    {"id": 6, "do": "carried", "stop": false}   how far that has come
    {"id": 8, "do": "tunnel", "peer": ID}       the local port of a new tunnel to its echo, which stays for good
    {"id": 9, "do": "through", "port": PORT}    whether a byte comes back through it
    {"id": 3, "do": "state"}                    its addresses and how others reach it
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import random
import signal
import socket
import sys
from typing import Any

import trio

from libmesh import (
    Libp2pConfig,
    Mesh,
    MeshConfig,
    MeshError,
    PathKind,
    PeerId,
    RelayLimits,
    RelayUse,
    Scope,
    SecretKey,
    Stream,
    open_mesh,
    serve_tunnel,
)
from tests.netlab.carrying import SERVICE, Carrier, comes_back, expose_echo

ECHO = "echo"


async def main(options: dict[str, Any]) -> None:
    """Be a member until stdin ends."""
    listen = Libp2pConfig(
        port=options["port"],
        websocket_port=options.get("websocket_port"),
        announce=tuple(options.get("announce", ())),
        relay=RelayLimits(),
        map_port=True,
    )
    use = RelayUse(offer=options.get("relay", False), known=tuple(options.get("relays", ())))
    config = MeshConfig(relays=use, lan=options.get("lan", False))
    seed = options.get("seed")
    me, mesh_key = (
        SecretKey.generate() if seed is None else SecretKey(bytes([seed, n]) + bytes(30)) for n in (1, 2)
    )
    founded = mesh_key if "invite" not in options else None
    opened = open_mesh(
        me,
        mesh_key=founded,
        invite=options.get("invite"),
        listen=listen,
        config=config,
        wait=False,
    )
    async with opened as mesh, trio.open_nursery() as nursery:
        with mesh.offer(ECHO, echo):
            nursery.start_soon(expose_echo, mesh)
            invite = mesh.invite(scope=Scope.INVITE, not_after_unix=None) if founded is not None else ""
            say({"peer": mesh.peer, "invite": invite})
            async for line in lines():
                nursery.start_soon(obey, mesh, json.loads(line), nursery)
            nursery.cancel_scope.cancel()


async def lines() -> Any:
    """Lines of stdin."""
    received = b""
    stdin = trio.lowlevel.FdStream(0)
    while piece := await stdin.receive_some(65536):
        *complete, received = (received + piece).split(b"\n")
        for line in complete:
            yield line


async def echo(stream: Stream) -> None:
    """Give back what comes."""
    async for data in stream:
        await stream.send_all(data)
    await stream.send_eof()


async def obey(mesh: Mesh, order: dict[str, Any], nursery: trio.Nursery) -> None:
    """Do one thing, and tell what came of it."""
    try:
        answer = await act(mesh, order, nursery)
    except (MeshError, trio.BrokenResourceError) as exc:
        answer = {"error": str(exc)}
    say({"id": order["id"], **answer})


CARRIERS: list[Carrier] = []


async def act(mesh: Mesh, order: dict[str, Any], nursery: trio.Nursery) -> dict[str, Any]:
    """See the module's docstring."""
    match order["do"]:
        case "connect":
            peer = PeerId(order["peer"])
            await mesh._driver.network.disconnect(peer)
            return await ask_echo(mesh, peer)
        case "climb":
            return await climb(mesh, PeerId(order["peer"]))
        case "echo":
            return await ask_echo(mesh, PeerId(order["peer"]))
        case "carry":
            CARRIERS.append(Carrier(mesh, PeerId(order["peer"])))
            nursery.start_soon(CARRIERS[-1].run)
            return {}
        case "tunnel":
            return {"port": await nursery.start(serve_tunnel, mesh, PeerId(order["peer"]), SERVICE)}
        case "through":
            return {"came": await comes_back(order["port"])}
        case "carried":
            if order.get("stop"):
                CARRIERS[-1].stop()
            return CARRIERS[-1].picture()
        case "path":
            return path_to(mesh, PeerId(order["peer"]))
        case "state":
            reaching = mesh._driver.network.reaching()
            return {
                "addresses": mesh.addresses,
                "standing": reaching.standing,
                "nat": reaching.nat,
                "mapping": reaching.mapping,
                "peers": len(mesh.view.peers),
            }
    raise MeshError(f"unknown order {order}")


async def ask_echo(mesh: Mesh, peer: PeerId) -> dict[str, Any]:
    """One byte there and back."""
    start = trio.current_time()
    with trio.move_on_after(10):
        stream = await mesh.open_service(peer, ECHO)
        try:
            await stream.send_all(b"?")
            if await stream.receive_some(1) == b"?":
                return {"first_byte": trio.current_time() - start, **path_to(mesh, peer)}
        finally:
            stream.reset()
    return {"error": "no echo within 10 s"}


async def climb(mesh: Mesh, peer: PeerId) -> dict[str, Any]:
    """Connect from nothing, and wait for a path that no relay carries."""
    await mesh._driver.network.disconnect(peer)
    answer = await ask_echo(mesh, peer)
    start = trio.current_time()
    with trio.move_on_after(30):
        async with mesh.watch() as views:
            async for view in views:
                entry = view.get(peer)
                if entry is not None and entry.path is not None and entry.path.kind is not PathKind.RELAYED:
                    return {**answer, "direct_after": trio.current_time() - start}
    return {"error": f"no direct path within 30 s: {path_to(mesh, peer)}"}


def path_to(mesh: Mesh, peer: PeerId) -> dict[str, Any]:
    """What is known of the way to a peer."""
    entry = mesh.view.get(peer)
    addresses = entry.addresses if entry is not None else ()
    if entry is None or entry.path is None:
        return {"kind": None, "address": "", "why": [], "addresses": addresses}
    why = [f"{attempt.way}: {attempt.reason}" for attempt in entry.path.attempts]
    return {"kind": entry.path.kind.value, "address": entry.path.address, "why": why, "addresses": addresses}


def say(answer: dict[str, Any]) -> None:
    """One line on stdout."""
    sys.stdout.write(f"{json.dumps(answer)}\n")
    sys.stdout.flush()


def serve_forks(orders: socket.socket) -> None:
    """Fork a peer for each order: JSON with the namespace and the options, and its stdin, stdout and stderr with it.

    Loading libmesh takes longer than all that a short test does; this does it once. Answers with the child's pid.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    while True:
        data, files, _, _ = socket.recv_fds(orders, 65536, 3)
        if not data:
            return
        pid = os.fork()
        if pid:
            for file in files:
                os.close(file)
            orders.send(str(pid).encode())
            continue
        orders.close()
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)
        order = json.loads(data)
        libc = ctypes.CDLL(None, use_errno=True)
        with open(order["namespace"]) as namespace:
            if libc.setns(namespace.fileno(), 0x40000000):
                raise OSError(ctypes.get_errno(), "setns")
        random.seed()
        start(order["options"])
        return


def start(options: dict[str, Any]) -> None:
    """Run one peer. `trusted` is a file of certificates to believe."""
    if trusted := options.get("trusted"):
        os.environ["SSL_CERT_FILE"] = trusted
    logging.basicConfig(
        level=logging.DEBUG if options.get("debug") else logging.INFO,
        format="%(asctime)s.%(msecs)03d %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    trio.run(main, options)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        serve_forks(channel)
