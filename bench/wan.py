"""One stream over a long path that loses packets, beside bare TCP with the same congestion control over the same link.

    python bench/wan.py [--rounds 3] [--seconds 15]          needs root: network namespaces, and a TUN device as the link

Two machines (namespaces) joined by a cable of `tests/netlab/link.py`. Each run opens a new connection and sends for some
seconds; what arrived within that time of the first byte counts. Runs are interleaved, and a run of each kind sees the
same seed of losses. The ratio is that of the sums over all rounds, since one loss early in a run changes all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import trio

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

KINDS = ("tcp", "libmesh")
PROTOCOL = "/bench/wan/1.0.0"
PIECE = bytes(256 * 1024)
SEEDS = (b"a" * 32, b"b" * 32)

PATHS = {
    "50 ms, 1 % loss, cubic": ("cubic", {"delay": 0.025, "loss": 0.01, "rate": 12_500_000}),
    "50 ms, 1 % loss, bbr": ("bbr", {"delay": 0.025, "loss": 0.01, "rate": 4_000_000}),
    "100 ms, no loss, cubic": ("cubic", {"delay": 0.05, "loss": 0.0, "rate": 8_000_000}),
}
"""Name: congestion control, and the cable (seconds one way, share of packets, bytes per second)."""


# ---- the receiving machine --------------------------------------------------------------------------------------


async def measure(kind: str, stream: trio.abc.ReceiveStream, seconds: float) -> None:
    """Print how much comes within `seconds` of the first byte."""
    count, ends = 0, float("inf")
    try:
        while data := await stream.receive_some(len(PIECE)):
            now = trio.current_time()
            ends = min(ends, now + seconds)
            if now < ends:
                count += len(data)
    except trio.BrokenResourceError:
        pass
    print(json.dumps({"kind": kind, "rate": count / seconds}), flush=True)


async def receive(address: str, seconds: float) -> None:
    from libmesh import Libp2pConfig, open_libp2p_network

    async def over_libmesh(stream: trio.abc.ReceiveStream) -> None:
        await measure("libmesh", stream, seconds)

    async def over_tcp(stream: trio.abc.ReceiveStream) -> None:
        await measure("tcp", stream, seconds)

    config = Libp2pConfig(hosts=(address,), port=4001)
    async with open_libp2p_network(SEEDS[1], config) as network, trio.open_nursery() as nursery:
        network.set_handler(PROTOCOL, over_libmesh, admitted_only=False)
        listeners = await nursery.start(trio.serve_tcp, over_tcp, 4002)
        print(json.dumps({"peer": network.peer, "listeners": len(listeners)}), flush=True)
        await trio.sleep_forever()


# ---- the sending machine ----------------------------------------------------------------------------------------


async def send(own: str, address: str, peer: str, kind: str, control: str, seconds: float) -> None:
    from libmesh import Libp2pConfig, PeerId, open_libp2p_network

    dial = trio.open_tcp_stream

    async def dial_with_control(*where: Any, **how: Any) -> trio.SocketStream:
        stream = await dial(*where, **how)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control.encode())
        return stream

    trio.open_tcp_stream = dial_with_control  # a namespace's default may only be what everybody may choose
    with trio.move_on_after(60):
        if kind == "tcp":
            async with await dial_with_control(address, 4002) as stream:
                await pour(stream, seconds)
            return
        async with open_libp2p_network(SEEDS[0], Libp2pConfig(hosts=(own,))) as network:
            await network.connect(PeerId(peer), [f"/ip4/{address}/tcp/4001"])
            stream = await network.open_stream(PeerId(peer), PROTOCOL)
            await pour(stream, seconds)
            stream.reset()


async def pour(stream: trio.abc.SendStream, seconds: float) -> None:
    with trio.move_on_after(seconds + 1):  # the first byte takes its way, too
        while True:
            await stream.send_all(PIECE)


# ---- the measurement --------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="One stream over a long path, beside bare TCP.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--path", choices=PATHS, action="append", help="only this path")
    parser.add_argument("--end", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.end is None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and so the lab is taken down
        run(options.path or list(PATHS), options.rounds, options.seconds)
    elif options.end[0] == "receive":
        trio.run(receive, options.end[1], options.seconds)
    else:
        trio.run(send, *options.end[1:], options.seconds)


def run(paths: list[str], rounds: int, seconds: float) -> None:
    from tests.netlab.lab import Kind, open_lab
    from tests.netlab.namespaces import available

    if missing := available():
        print(f"not measured: {missing}")
        return
    print(f"{'path':26}{'kind':10}{'MB/s median':>12}{'lowest':>8}{'highest':>9}   of bare TCP")
    with ExitStack() as stack:
        lab = stack.enter_context(open_lab())
        near, far = lab.site(Kind.PUBLIC), lab.site(Kind.PUBLIC)
        command = (sys.executable, str(Path(__file__).resolve()), "--seconds", str(seconds), "--end")
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        receiver = far.host.popen(
            *command, "receive", far.host.address, stdout=subprocess.PIPE, text=True, env=env
        )
        stack.callback(receiver.kill)
        assert receiver.stdout is not None
        peer = json.loads(receiver.stdout.readline())["peer"]
        for name in paths:
            control, cable = PATHS[name]
            rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for turn in range(rounds):
                for kind in KINDS if turn % 2 else reversed(KINDS):
                    near.cable.set(seed=turn, **cable)
                    arguments = (near.host.address, far.host.address, peer, kind, control)
                    sender = near.host.popen(*command, "send", *arguments, env=env)
                    rates[kind].append(json.loads(receiver.stdout.readline())["rate"] / 1e6)
                    sender.wait()
            for kind in KINDS:
                found = rates[kind]
                print(
                    f"{name:26}{kind:10}{median(found):12.2f}{min(found):8.2f}{max(found):9.2f}"
                    f"   x{sum(found) / sum(rates['tcp']):.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
