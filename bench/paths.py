"""How fast a relayed path is: through our relay, beside the direct path, and beside stock py-libp2p's relay.

    python bench/paths.py [--rounds 3] [--seconds 2]

Three processes over loopback for each way: source, relay, target. Rounds are interleaved, so that what else the machine
does falls on all alike; figures are medians. The last line has the ratios.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import trio

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))

SINK, ECHO = "/bench/sink/1", "/bench/echo/1"
PIECE = bytes(64 * 1024)
PINGS = 300
WAYS = ("direct", "relayed", "stock relayed")


def say(text: str) -> None:
    print(text, flush=True)


# ---- ours ---------------------------------------------------------------------------------------------------------


def network(relay: bool = False):
    from libmesh import Libp2pConfig, RelayLimits, open_libp2p_network

    limits = RelayLimits() if relay else None
    config = Libp2pConfig(hosts=("127.0.0.1",), relay=limits, relay_open=relay)
    return open_libp2p_network(secrets.token_bytes(32), config)


async def our_relay() -> None:
    async with network(relay=True) as relay:
        say(f"{relay.addresses()[0]}/p2p/{relay.peer}")
        await trio.sleep_forever()


async def our_target(relay: str | None) -> None:
    async with network() as target:

        async def sink(stream) -> None:
            count = 0
            async for data in stream:
                count += len(data)
            await stream.send_all(count.to_bytes(8, "big"))

        async def echo(stream) -> None:
            async for data in stream:
                await stream.send_all(data)

        target.set_handler(SINK, sink, admitted_only=False)
        target.set_handler(ECHO, echo, admitted_only=False)
        if relay is not None:
            target.set_relays([relay])
            while len(target.addresses()) < 2:  # noqa: ASYNC110 - the events are for a mesh, and there is none
                await trio.sleep(0.02)
        say(json.dumps([target.peer, target.addresses()[-1]]))
        await trio.sleep_forever()


async def our_source(where: str, seconds: float) -> None:
    peer, address = json.loads(where)
    async with network() as source:
        await source.dial(peer, address)
        stream = await source.open_stream(peer, ECHO)
        times: list[float] = []
        for _ in range(PINGS):
            started = time.perf_counter()
            await stream.send_all(PIECE[:64])
            await stream.receive_some()
            times.append(time.perf_counter() - started)
        stream = await source.open_stream(peer, SINK)
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            await stream.send_all(PIECE)
        await stream.send_eof()
        count = int.from_bytes(await stream.receive_some(), "big")
        report(count, time.perf_counter() - started, times)


# ---- stock py-libp2p ----------------------------------------------------------------------------------------------


def stock_parts(hop: bool):
    from libp2p import new_host
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as x25519
    from libp2p.network.config import ConnectionConfig
    from libp2p.relay.circuit_v2.config import RelayConfig, RelayRole
    from libp2p.relay.circuit_v2.protocol import CircuitV2Protocol
    from libp2p.relay.circuit_v2.resources import RelayLimits
    from libp2p.relay.circuit_v2.transport import CircuitV2Transport
    from libp2p.security.noise.transport import Transport as Noise

    keys = create_new_key_pair(secrets.token_bytes(32))
    host = new_host(
        key_pair=keys,
        sec_opt={"/noise": Noise(keys, noise_privkey=x25519().private_key)},
        connection_config=ConnectionConfig(low_watermark=0, min_connections=0),
    )
    limits = RelayLimits(duration=0, data=2**62, max_circuit_conns=64, max_reservations=64)
    protocol = CircuitV2Protocol(host, limits=limits, allow_hop=hop)
    transport = CircuitV2Transport(host, protocol, RelayConfig(roles=RelayRole.STOP, limits=limits))
    return host, protocol, transport


async def stock(role: str, where: str, seconds: float) -> None:
    from libp2p.tools.anyio_service import background_trio_service
    from multiaddr import Multiaddr

    host, protocol, transport = stock_parts(hop=role == "relay")
    async with (
        host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]),
        background_trio_service(protocol),
        trio.open_nursery() as nursery,
    ):
        await protocol.event_started.wait()
        if role == "relay":
            say(str(host.get_addrs()[0]))
            await trio.sleep_forever()
        elif role == "target":
            await stock_target(host, transport, where, nursery)
        else:
            await stock_source(host, transport, where, seconds)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True), trio.move_on_after(1):
            await host.close()


async def stock_target(host, transport, relay: str, nursery: trio.Nursery) -> None:
    from libp2p.network.stream.exceptions import StreamEOF, StreamError
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from libp2p.relay.circuit_v2.protocol import PROTOCOL_ID
    from multiaddr import Multiaddr

    async def sink(stream) -> None:
        count = 0
        try:
            while True:
                count += len(await stream.read(65536))
        except StreamEOF:
            await stream.write(count.to_bytes(8, "big"))

    async def echo(stream) -> None:
        try:
            while True:
                await stream.write(await stream.read(65536))
        except StreamError:
            return

    host.set_stream_handler(SINK, sink)
    host.set_stream_handler(ECHO, echo)
    info = info_from_p2p_addr(Multiaddr(relay))
    await host.connect(info)
    stream = await host.new_stream(info.peer_id, [PROTOCOL_ID])
    if not await transport.reserve(stream, info.peer_id, nursery):
        raise SystemExit("the stock relay gave no place")
    say(f"{relay}/p2p-circuit/p2p/{host.get_id()}")
    await trio.sleep_forever()


async def stock_source(host, transport, where: str, seconds: float) -> None:
    from libp2p.peer.id import ID
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from multiaddr import Multiaddr

    peer = ID.from_base58(where.rpartition("/p2p/")[2])
    await host.connect(info_from_p2p_addr(Multiaddr(where.partition("/p2p-circuit")[0])))
    await transport.dial(Multiaddr(where))
    stream = await host.new_stream(peer, [ECHO])
    times: list[float] = []
    for _ in range(PINGS):
        started = time.perf_counter()
        await stream.write(PIECE[:64])
        await stream.read(64)
        times.append(time.perf_counter() - started)
    stream = await host.new_stream(peer, [SINK])
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        await stream.write(PIECE)
    await stream.close_write()
    count = int.from_bytes(await stream.read(8), "big")
    report(count, time.perf_counter() - started, times)


# ---- measuring ----------------------------------------------------------------------------------------------------


def report(count: int, elapsed: float, times: list[float]) -> None:
    say(json.dumps([count / elapsed / 2**20, statistics.median(times) * 1e6]))


def measure(way: str, seconds: float) -> tuple[float, float]:
    """MiB/s and the median round trip in microseconds."""
    children: list[subprocess.Popen] = []

    def start(*arguments: str) -> str:
        command = [sys.executable, "-W", "ignore", str(HERE), "--seconds", str(seconds), "--role", *arguments]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        children.append(child)
        line = child.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{' '.join(arguments[:1])} said nothing: {child.stderr.read()[-2000:]}")
        return line

    kind = "stock" if way.startswith("stock") else "our"
    try:
        relay = [] if way == "direct" else [start(f"{kind}-relay")]
        rate, rtt = json.loads(start(f"{kind}-source", start(f"{kind}-target", *relay)))
        return rate, rtt
    finally:
        for child in children:
            child.kill()
            child.communicate()


def play(role: str, where: str | None, seconds: float) -> None:
    kind, _, part = role.partition("-")
    if kind == "stock":
        trio.run(stock, part, where or "", seconds)
    elif part == "relay":
        trio.run(our_relay)
    elif part == "target":
        trio.run(our_target, where)
    else:
        trio.run(our_source, where, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        play(args.role[0], args.role[1] if len(args.role) > 1 else None, args.seconds)
        return
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(args.rounds):
        for way in WAYS:
            found[way].append(measure(way, args.seconds))
    rates = {way: statistics.median(rate for rate, _ in found[way]) for way in WAYS}
    rtts = {way: statistics.median(rtt for _, rtt in found[way]) for way in WAYS}
    for way in WAYS:
        print(f"{way:<14} {rates[way]:8.1f} MiB/s   {rtts[way]:7.0f} µs round trip")
    print(
        f"paths: relayed / stock relayed = {rates['relayed'] / rates['stock relayed']:.1f} x throughput, "
        f"{rtts['stock relayed'] / rtts['relayed']:.1f} x shorter round trip; "
        f"relayed / direct = {rates['relayed'] / rates['direct']:.2f} x throughput, "
        f"{rtts['relayed'] / rtts['direct']:.1f} x round trip"
    )


if __name__ == "__main__":
    main()
