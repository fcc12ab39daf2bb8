"""The two ends of a tunnel, or of streams alone, by several libraries, for `streams.py`. Our tunnels are in `streams_mesh.py`.

python bench/streams_ends.py KIND far TARGET_PORT     prints an address
python bench/streams_ends.py KIND near ADDRESS        prints a local port that leads to the target
python bench/streams_ends.py KIND source ADDRESS      measures streams alone; prints a JSON object
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import statistics
import sys
import time
from contextlib import asynccontextmanager

import trio

PROTOCOL = "/bench/tunnel/1"
SINK = "/bench/sink/1"
ECHO = "/bench/echo/1"
SECONDS = 2.0


def say(text: str) -> None:
    print(text, flush=True)


# ---- libmesh ----------------------------------------------------------------------------------------------------


async def libmesh_far() -> None:
    from libmesh.net.libp2p import Libp2pConfig, open_libp2p_network

    async def sink(stream) -> None:
        total = 0
        while data := await stream.receive_some():
            total += len(data)
        await stream.send_all(total.to_bytes(8, "big"))

    async def echo(stream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async with open_libp2p_network(secrets.token_bytes(32), Libp2pConfig(hosts=("127.0.0.1",))) as network:
        network.set_handler(SINK, sink, admitted_only=False)
        network.set_handler(ECHO, echo, admitted_only=False)
        say(f"{network.addresses()[0]} {network.peer}")
        await trio.sleep_forever()


async def libmesh_near(address: str) -> None:
    from libmesh.net.libp2p import Libp2pConfig, open_libp2p_network

    where, peer = address.split()
    async with open_libp2p_network(secrets.token_bytes(32), Libp2pConfig(hosts=("127.0.0.1",))) as network:
        await network.connect(peer, [where])

        async def send(size: int) -> None:
            stream = await network.open_stream(peer, SINK)
            block = bytes(min(size, 1 << 20))
            for _ in range(size // len(block)):
                await stream.send_all(block)
            await stream.send_eof()
            assert int.from_bytes(await stream.receive_some(8), "big") == size
            await stream.aclose()

        @asynccontextmanager
        async def echo():
            async with await network.open_stream(peer, ECHO) as stream:

                async def ping(data: bytes) -> None:
                    await stream.send_all(data)
                    left = len(data)
                    while left:
                        left -= len(await stream.receive_some())

                yield ping

        await report(send, echo)


async def report(send, echo) -> None:
    await send(1 << 24)
    start = time.perf_counter()
    await send(1 << 27)
    size = int((1 << 27) * SECONDS / (time.perf_counter() - start)) >> 20 << 20
    start = time.perf_counter()
    await send(size)
    speed = size / (time.perf_counter() - start) / 2**20
    waits = []
    end = time.perf_counter() + SECONDS / 2
    async with echo() as ping:
        while (start := time.perf_counter()) < end:
            await ping(bytes(64))
            waits.append(time.perf_counter() - start)
    opened = 0
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS / 2:
        await send(64)
        opened += 1
    opens = opened / (time.perf_counter() - start)
    say(json.dumps({"MiB/s": speed, "ping-pong µs": statistics.median(waits) * 1e6, "opens/s": opens}))


async def listen(accept) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=1024)
    say(str(listeners[0].socket.getsockname()[1]))
    await trio.serve_listeners(accept, listeners)


# ---- stock py-libp2p --------------------------------------------------------------------------------------------


def stock_host(security: str):
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as x25519
    from libp2p.network.config import ConnectionConfig
    from libp2p.security.noise.transport import Transport as Noise
    from libp2p.security.tls.transport import TLSTransport

    keys = create_new_key_pair(secrets.token_bytes(32))
    sec = (
        {"/tls/1.0.0": TLSTransport(keys)}
        if security == "tls"
        else {"/noise": Noise(keys, noise_privkey=x25519().private_key)}
    )
    host = new_host(
        key_pair=keys, sec_opt=sec, connection_config=ConnectionConfig(low_watermark=0, min_connections=0)
    )
    host.get_network()._inbound_limiter = trio.CapacityLimiter(10**9)
    return host


async def stock_pump(stream, sock: trio.SocketStream) -> None:
    from libp2p.network.stream.exceptions import StreamError

    async def there() -> None:
        while data := await sock.receive_some(65536):
            await stream.write(data)
        await stream.close_write()

    async def back() -> None:
        try:
            while data := await stream.read(65536):
                await sock.send_all(data)
        except StreamError:
            pass
        await sock.send_eof()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there)
            nursery.start_soon(back)
    except* (OSError, StreamError, trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    with trio.CancelScope(shield=True):
        await stream.close()
        await sock.aclose()


async def stock_far(target: str, security: str) -> None:
    from libp2p.network.stream.exceptions import StreamEOF
    from multiaddr import Multiaddr

    host = stock_host(security)

    async def tunnel(stream) -> None:
        await stock_pump(stream, await trio.open_tcp_stream("127.0.0.1", int(target)))

    async def sink(stream) -> None:
        total = 0
        try:
            while data := await stream.read(65536):
                total += len(data)
        except StreamEOF:
            pass
        await stream.write(total.to_bytes(8, "big"))
        await stream.close()

    async def echo(stream) -> None:
        try:
            while data := await stream.read(65536):
                await stream.write(data)
        except StreamEOF:
            await stream.close()

    host.set_stream_handler(PROTOCOL, tunnel)
    host.set_stream_handler(SINK, sink)
    host.set_stream_handler(ECHO, echo)
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        say(str(host.get_addrs()[0]))
        await trio.sleep_forever()


async def stock_near(address: str, security: str, measure: bool) -> None:
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    host = stock_host(security)
    info = info_from_p2p_addr(Multiaddr(address))
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        await host.connect(info)
        if measure:

            async def send(size: int) -> None:
                stream = await host.new_stream(info.peer_id, [SINK])
                block = bytes(min(size, 1 << 20))
                for _ in range(size // len(block)):
                    await stream.write(block)
                await stream.close_write()
                assert int.from_bytes(await stream.read(8), "big") == size
                await stream.close()

            @asynccontextmanager
            async def echo():
                stream = await host.new_stream(info.peer_id, [ECHO])

                async def ping(data: bytes) -> None:
                    await stream.write(data)
                    left = len(data)
                    while left:
                        left -= len(await stream.read(left))

                yield ping
                await stream.close()

            await report(send, echo)
            os._exit(0)

        async def accept(sock: trio.SocketStream) -> None:
            await stock_pump(await host.new_stream(info.peer_id, [PROTOCOL]), sock)

        await listen(accept)


# ---- a bare relay, two hops -------------------------------------------------------------------------------------


async def relay(port: str) -> None:
    async def accept(sock: trio.SocketStream) -> None:
        other = await trio.open_tcp_stream("127.0.0.1", int(port))

        async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
            while data := await source.receive_some(65536):
                await sink.send_all(data)
            await sink.send_eof()

        try:
            async with sock, other, trio.open_nursery() as nursery:
                nursery.start_soon(pump, sock, other)
                nursery.start_soon(pump, other, sock)
        except* trio.BrokenResourceError:
            pass

    await listen(accept)


# ---- iroh, tuned: large buffers, relays off ---------------------------------------------------------------------


async def iroh_pump(bi, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async def there() -> None:
        send = bi.send()
        while data := await reader.read(1 << 20):
            await send.write_all(data)
        await send.finish()

    async def back() -> None:
        receive = bi.recv()
        while data := await receive.read(1 << 20):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()

    await asyncio.gather(there(), back(), return_exceptions=True)
    writer.close()


def tune_iroh() -> None:
    """Let its generated binding copy a buffer at once. As it comes it copies byte by byte: 6 MiB/s.

    We compare ourselves with the transport, not with that.
    """
    import ctypes

    from iroh import iroh_ffi

    def write(self, value) -> None:
        with self._reserve(len(value)):
            start = ctypes.addressof(self.rbuf.data.contents) + self.rbuf.len
            ctypes.memmove(start, bytes(value), len(value))

    iroh_ffi._UniffiRustBufferBuilder.write = write


async def iroh_endpoint():
    import iroh

    tune_iroh()
    options = iroh.EndpointOptions(
        preset=iroh.preset_minimal(),
        bind_addr="127.0.0.1:0",
        alpns=[PROTOCOL.encode()],
        relay_mode=iroh.RelayMode.disabled(),
    )
    return await iroh.Endpoint.bind(options)


async def iroh_far(target: str) -> None:
    endpoint = await iroh_endpoint()
    say(f"{endpoint.id()} {endpoint.bound_sockets()[0]}")

    async def tunnel(bi) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(target), limit=1 << 20)
        await iroh_pump(bi, reader, writer)

    async def serve(connection) -> None:
        tasks = set()
        while True:
            task = asyncio.create_task(tunnel(await connection.accept_bi()))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    while incoming := await endpoint.accept_next():
        await serve(await (await incoming.accept()).connect())


async def iroh_near(address: str) -> None:
    import iroh

    peer, where = address.split()
    endpoint = await iroh_endpoint()
    target = iroh.EndpointAddr(iroh.EndpointId.from_string(peer), None, [where])
    connection = await endpoint.connect(target, PROTOCOL.encode())

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await iroh_pump(await connection.open_bi(), reader, writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=1 << 20, backlog=1024)
    say(str(server.sockets[0].getsockname()[1]))
    await server.serve_forever()


def main() -> None:
    kind, role, argument = sys.argv[1:4]
    measure = role == "source"
    if kind == "libmesh":
        trio.run(libmesh_far) if role == "far" else trio.run(libmesh_near, argument)
    elif kind in ("stock", "stock-tls"):
        security = "tls" if kind.endswith("tls") else "noise"
        if role == "far":
            trio.run(stock_far, argument, security)
        else:
            trio.run(stock_near, argument, security, measure)
    elif kind == "relay":
        trio.run(relay, argument)
    else:
        asyncio.run(iroh_far(argument) if role == "far" else iroh_near(argument))


if __name__ == "__main__":
    main()
