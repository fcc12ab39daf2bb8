"""What idle peers cost: real processes, each with one peer, all in one mesh. CPU and memory of each, averaged.

    python bench/processes.py                  30 processes of libmesh, then as many of stock py-libp2p
    python bench/processes.py --count 10 --seconds 20

The peer program is stock py-libp2p: a host with its own muxer, Noise and gossipsub (heartbeat 1 s), where each process
is connected to all the others, as it is in a mesh of libmesh of this size, and pings another one in turn each second,
as one must to notice a machine that is gone. Nobody is proved or announced there.
CPU is user and system time in hundredths of one core. Memory is the proportional set size (PSS), which counts a page
that several processes share in parts, and the resident set size (RSS), which counts it in each.

They start one after the other, each when the one before is in: starting Python and libp2p takes two seconds of CPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from itertools import cycle
from pathlib import Path
from statistics import mean

import trio

TICKS = os.sysconf("SC_CLK_TCK")
SETTLE = 30.0
"""Seconds after everybody has met everybody, for what was started then to end."""


def say(text: str) -> None:
    print(text, flush=True)


# ---- one process ------------------------------------------------------------------------------------------------


async def libmesh_member(count: int, token: str) -> None:
    """Found a mesh and print an invite, or join one and print `in`; print `all` when every other peer is there and connected."""
    from libmesh import Libp2pConfig, PeerState, Scope, SecretKey, open_mesh

    founding = token == "-"
    mesh_key = SecretKey.generate() if founding else None
    listen = Libp2pConfig(hosts=("127.0.0.1",))
    async with open_mesh(
        SecretKey.generate(), mesh_key=mesh_key, invite=None if founding else token, listen=listen
    ) as mesh:
        if founding:
            say(mesh.invite(scope=Scope.CLIENT, not_after_unix=None))
        else:
            say("in")
        async with mesh.watch() as views:
            async for view in views:
                met = [p for p in view.peers if p.state is PeerState.ALIVE and p.path is not None]
                if len(met) == count - 1:
                    break
        say("all")
        await trio.sleep_forever()


async def stock_member(count: int, number: int) -> None:
    """Print an address, read everybody's, connect to those before us; print `all` when connected to every other."""
    from libp2p.abc import IHost
    from libp2p.custom_types import TProtocol
    from libp2p.host.ping import PingService
    from libp2p.peer.peerinfo import info_from_p2p_addr
    from libp2p.pubsub.gossipsub import GossipSub
    from libp2p.pubsub.pubsub import Pubsub
    from libp2p.tools.anyio_service import background_trio_service
    from multiaddr import Multiaddr
    from streams_ends import stock_host

    host: IHost = stock_host("noise")
    router = GossipSub([TProtocol("/meshsub/1.1.0")], 8, 6, 12, heartbeat_interval=1)
    pubsub = Pubsub(host, router, strict_signing=True)
    async with (
        host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]),
        background_trio_service(pubsub),
        background_trio_service(router),
    ):
        await pubsub.wait_until_ready()
        await pubsub.subscribe("idle")
        say(str(host.get_addrs()[0]))
        addresses = [await trio.to_thread.run_sync(sys.stdin.readline) for _ in range(count)]
        for address in addresses[:number]:
            await host.connect(info_from_p2p_addr(Multiaddr(address.strip())))
        while len(host.get_connected_peers()) < count - 1:  # noqa: ASYNC110 - it has no event for that
            await trio.sleep(0.1)
        say("all")
        pings, peers = PingService(host), cycle(host.get_connected_peers())
        while True:
            with suppress(Exception):  # at the end the others go first
                await pings.ping(next(peers))
            await trio.sleep(1)


# ---- all of them ------------------------------------------------------------------------------------------------


class Member:
    """A process, and what the kernel counts of it."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, __file__, "--member", *map(str, arguments)]
        pipe = subprocess.PIPE
        # py-libp2p logs hundreds of lines of a mesh that settles.
        said = subprocess.DEVNULL if "stock" in command else None
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, text=True)

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"a process ended with {self.process.wait()}")
        return line

    def tell(self, text: str) -> None:
        """Write to its input."""
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def cpu(self) -> float:
        """Seconds of user and system time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory(self) -> tuple[float, float]:
        """PSS and RSS, in MiB."""
        lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()
        sizes = {line.split()[0]: int(line.split()[1]) / 1024 for line in lines if line.endswith("kB")}
        return sizes["Pss:"], sizes["Rss:"]

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()


def start_libmesh(count: int, kept: ExitStack) -> list[Member]:
    founder = Member("libmesh", count, "-")
    kept.callback(founder.end)
    token = founder.line()
    members = [founder]
    for _ in range(count - 1):
        members.append(Member("libmesh", count, token))
        kept.callback(members[-1].end)
        assert members[-1].line() == "in"
    return members


def start_stock(count: int, kept: ExitStack) -> list[Member]:
    members, addresses = [], []
    for number in range(count):
        members.append(Member("stock", count, number))
        kept.callback(members[-1].end)
        addresses.append(members[-1].line())
    for member in members:
        member.tell("".join(f"{address}\n" for address in addresses))
    return members


STARTS = {"libmesh": start_libmesh, "stock": start_stock}


def measure(kind: str, count: int, seconds: float) -> tuple[float, float, float]:
    """CPU in hundredths of a core, PSS and RSS in MiB, of one process on average."""
    with ExitStack() as kept:
        started = time.monotonic()
        members = STARTS[kind](count, kept)
        for member in members:
            assert member.line() == "all"
        met = time.monotonic() - started
        time.sleep(SETTLE)
        before, begun = [member.cpu() for member in members], time.monotonic()
        time.sleep(seconds)
        took = time.monotonic() - begun
        used = [member.cpu() - cpu for member, cpu in zip(members, before, strict=True)]
        memory = [member.memory() for member in members]
    cpu = 100 * mean(used) / took
    pss, rss = mean(m[0] for m in memory), mean(m[1] for m in memory)
    worst = 100 * max(used) / took
    say(
        f"{kind:<8} {count} processes, all met in {met:.0f} s: {cpu:.2f} % of a core each (most {worst:.2f} %), "
        f"{pss:.0f} MiB each (RSS {rss:.0f} MiB), over {took:.0f} s"
    )
    return cpu, pss, rss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=30, help="processes (default: 30)")
    parser.add_argument("--seconds", type=float, default=60.0, help="measured (default: 60)")
    parser.add_argument("--only", choices=sorted(STARTS), help="without the other, and without ratios")
    parser.add_argument("--member", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.member:
        kind, count, which = options.member
        if kind == "libmesh":
            trio.run(libmesh_member, int(count), which)
        else:
            trio.run(stock_member, int(count), int(which))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process is left
    kinds = [options.only] if options.only else list(STARTS)
    found = {kind: measure(kind, options.count, options.seconds) for kind in kinds}
    if len(found) == len(STARTS):
        (cpu, pss, _), (stock_cpu, stock_pss, _) = found["libmesh"], found["stock"]
        say(f"libmesh / stock py-libp2p: CPU x{cpu / stock_cpu:.2f}, memory x{pss / stock_pss:.2f}")


if __name__ == "__main__":
    main()
