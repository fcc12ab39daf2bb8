"""A network without a mesh in a process of its own, for the lab: takes orders on stdin and answers on stdout, JSON by line.

Takes whoever connects for a member, so that peers of other implementations can take part. Argument: JSON with `seed`, and
`relay` to be one for everybody. The first line that it says has its id and addresses. Orders, of which one is obeyed at a
time:

    {"do": "relays", "relays": [ADDRESS, …]}              be reached through these; the circuits that lead here then
    {"do": "held", "count": N}                            once there are places at so many relays: their ids
    {"do": "until", "relays": [ID, …]}                    once there are places at these and no others: their ids
    {"do": "dial", "peer": ID, "address": ADDRESS}        the path
    {"do": "punch", "peer": ID}                           the path
    {"do": "path", "peer": ID, "kinds": [KIND, …]}        the path, once it is of one of these kinds
    {"do": "echo", "peer": ID, "size": N}                 whether N bytes came back from `/echo/1.0.0`, and the stream was not cut
    {"do": "map", "by": NAME}                             have the router forward our port by `NAT-PMP`, …: the address then
    {"do": "unmap", "by": NAME}                           have it forward the port no more
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio

from libmesh import Libp2pConfig, Libp2pNetwork, MeshError, PeerId, RelayLimits, Stream, open_libp2p_network
from libmesh.net.base import PeerConnected, StreamReset
from libmesh.net.nat import Method, _methods
from libmesh.net.nat_wire import Refused

ECHO = "/echo/1.0.0"
METHODS: dict[str, Method] = {}
MAPPED: dict[str, int] = {}


async def main(options: dict[str, Any]) -> None:
    """Obey until stdin ends."""
    relay = options.get("relay", False)
    config = Libp2pConfig(port=4001, relay=RelayLimits() if relay else None, relay_open=relay)
    async with (
        open_libp2p_network(bytes([options["seed"]]) * 32, config) as network,
        trio.open_nursery() as nursery,
    ):
        network.set_handler(ECHO, echo, admitted_only=False)
        nursery.start_soon(admit_all, network)
        say({"peer": network.peer, "addresses": network.addresses()})
        received = b""
        stdin = trio.lowlevel.FdStream(0)
        while piece := await stdin.receive_some(65536):
            *lines, received = (received + piece).split(b"\n")
            for line in lines:
                try:
                    say(await act(network, json.loads(line)))
                except MeshError as exc:
                    say({"error": str(exc)})
        nursery.cancel_scope.cancel()


async def admit_all(network: Libp2pNetwork) -> None:
    """Take everybody for a member."""
    async with network.events() as events:
        async for event in events:
            if isinstance(event, PeerConnected):
                network.admit(event.peer)


async def echo(stream: Stream) -> None:
    """Give back what comes."""
    async for data in stream:
        await stream.send_all(data)
    await stream.send_eof()


async def act(network: Libp2pNetwork, order: dict[str, Any]) -> dict[str, Any]:
    """See the module's docstring."""
    peer = PeerId(order.get("peer", ""))
    match order["do"]:
        case "relays":
            network.set_relays(order["relays"])
            await until(network.relaying.circuits)
            return {"circuits": network.relaying.circuits()}
        case "held":
            client = network.relaying.client
            await until(lambda: len(client.relays) == order["count"])
            return {"relays": client.relays}
        case "until":
            client = network.relaying.client
            await until(lambda: list(client.relays) == order["relays"])
            return {"relays": client.relays}
        case "dial":
            await network.dial(peer, order["address"])
        case "punch":
            await network.punch(peer)
        case "path":
            await until(lambda: kind_to(network, peer) in order["kinds"])
        case "map":
            METHODS.update({method.name: method for method in _methods() if method.name not in METHODS})
            return {"address": await mapped(METHODS[order["by"]], network.port)}
        case "unmap":
            await unmapped(METHODS[order["by"]], network.port)
            return {}
        case "echo":
            stream = await network.open_stream(peer, ECHO)
            try:
                return {"same": await echoed(stream, order["size"])}
            except* StreamReset:
                pass
            return {"same": False}
    return {"kind": kind_to(network, peer)}


def kind_to(network: Libp2pNetwork, peer: PeerId) -> str | None:
    """The kind of the path there is."""
    path = network.path(peer)
    return path.kind.value if path else None


async def echoed(stream: Stream, size: int) -> bool:
    """Whether all comes back."""
    data = bytes(i & 255 for i in range(size))
    got = bytearray()
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        nursery.start_soon(send)
        async for piece in stream:
            got += piece
    return bytes(got) == data


async def mapped(method: Method, port: int) -> str:
    """The router forwards `port` by this method. It may only be starting."""
    with trio.move_on_after(90):
        while True:
            with suppress(OSError, ValueError, Refused):
                mapping = await method.ask(port, port)
                MAPPED[method.name] = mapping.port
                return mapping.address
            await trio.sleep(0.2)
    return ""


async def unmapped(method: Method, port: int) -> None:
    """The router forwards `port` no more. It may be slow to say so, and refuse to hear it again."""
    with trio.move_on_after(90), suppress(Refused):
        while True:
            with suppress(OSError, ValueError):
                await method.give_back(port, MAPPED[method.name])
                return
            await trio.sleep(0.2)


async def until(condition: Callable[[], object]) -> None:
    """Wait for what is bound to come."""
    with trio.move_on_after(90):
        while not condition():  # noqa: ASYNC110 - the events go to `admit_all`
            await trio.sleep(0.05)


def say(value: dict[str, Any]) -> None:
    """Answer."""
    sys.stdout.write(f"{json.dumps(value)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    trio.run(main, json.loads(sys.argv[1]))
