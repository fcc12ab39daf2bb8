"""Finds members of a mesh on the LANs that this machine is on, and is found by them: multicast DNS (see `mdns_wire`).

Each interface is told of itself only, so an address comes with the network on which it means something. IPv4 only: where
there is IPv6 on a LAN there is IPv4, too.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import random
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

import trio

from libmesh.net import tcp
from libmesh.net.discovery import mdns_wire as wire
from libmesh.net.discovery.mdns_wire import Notice
from libmesh.net.relay_client import split_relay
from libmesh.net.swarm import libp2p_id
from libmesh.peers import MeshId, PeerId

log = logging.getLogger(__name__)

GROUP, PORT = "224.0.0.251", 5353

EAGER = (0.0, 1.0, 3.0, 9.0)
"""Seconds after a start or a change of the network at which we ask and tell: packets get lost on wireless LANs."""

ASK_EVERY = 60.0
"""Seconds between questions later on, a quarter more or less."""

ANSWER_GAP = 1.0
"""Least seconds between two notices of ours on one LAN, however many ask (RFC 6762, 6)."""

MAX_FOUND = 64
"""Peers told in `FOUND_TIME` seconds; more are left out, as who floods a LAN with names would have us dial them all."""

FOUND_TIME = 10.0

MAX_NEARBY = 256
"""Nodes that one look around finds."""

Found = Callable[[PeerId, tuple[str, ...]], None]


class LanDiscovery:
    """Tells the LAN that a member of a mesh is here, and hears of others.

    Args:
        mesh_id: only nodes of that mesh are found.
        me: this node.
        port: where it listens, asked each time.
        found: told of a peer and its multiaddrs, without `/p2p/…`; again whenever it says that it is there.
        silent: while it says so, hear of others only, and tell nothing of this node.
    """

    def __init__(
        self,
        mesh_id: MeshId,
        me: PeerId,
        port: Callable[[], int],
        found: Found,
        *,
        silent: Callable[[], bool] = lambda: False,
    ) -> None:
        self._mesh_id, self._me, self._port, self._found = mesh_id, me, port, found
        self._silent = silent
        self._mark = wire.mesh_mark(mesh_id, os.urandom(8))
        self._instance = os.urandom(16).hex()  # libp2p's specification wants it random, too
        self._told: dict[str, float] = {}
        self._recent: list[float] = []
        self._again = trio.Event()

    def again(self) -> None:
        """The network is another one: ask and tell anew."""
        self._again.set()

    async def run(self) -> None:
        """Ask and answer until cancelled; then say goodbye. Where multicast is not possible, does nothing."""
        while True:
            self._again = trio.Event()
            try:
                with _open_socket() as sock:
                    await sock.bind(("", PORT))
                    await self._run_with(sock)
            except* OSError as exc:  # in a group where a task met it
                log.debug("no discovery on the LAN now: %s", tcp.reason(exc))
            with trio.move_on_after(ASK_EVERY):  # no time at all where the network has changed
                await self._again.wait()

    async def _run_with(self, sock: trio.socket.SocketType) -> None:
        """With one socket, until the network changes."""
        hosts = _join_all(sock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, sock, hosts)
            try:
                for pause in EAGER:
                    with trio.move_on_after(pause):
                        await self._again.wait()
                        break
                    await self._ask_and_tell(sock, hosts)
                else:
                    while not self._again.is_set():
                        with trio.move_on_after(ASK_EVERY * random.uniform(0.75, 1.25)):
                            await self._again.wait()
                            break
                        await self._ask_and_tell(sock, hosts)
            finally:
                nursery.cancel_scope.cancel()
                if not self._again.is_set() and self._told:
                    with trio.CancelScope(shield=True), trio.move_on_after(0.2):
                        for host in hosts:
                            await self._send(sock, host, wire.encode_notice(self._notice(host, ttl=0)))

    async def _ask_and_tell(self, sock: trio.socket.SocketType, hosts: list[str]) -> None:
        for host in hosts:
            await self._send(sock, host, wire.encode_question())
            await self._tell(sock, host)

    async def _tell(self, sock: trio.socket.SocketType, host: str) -> None:
        now = trio.current_time()
        if not self._silent() and now - self._told.get(host, float("-inf")) >= ANSWER_GAP:
            self._told[host] = now
            await self._send(sock, host, wire.encode_notice(self._notice(host)))

    def _notice(self, host: str, ttl: int = wire.TTL) -> Notice:
        address = f"{tcp.multiaddr_of(host, self._port())}/p2p/{self._me}"
        return Notice(self._instance, self._mark, (address,), ttl)

    @staticmethod
    async def _send(sock: trio.socket.SocketType, host: str, data: bytes) -> None:
        with suppress(OSError):  # an interface that has gone meanwhile
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(host))
            await sock.sendto(data, (GROUP, PORT))

    async def _listen(self, sock: trio.socket.SocketType, hosts: list[str]) -> None:
        while True:
            data, sender = await sock.recvfrom(9000)
            try:
                if wire.is_question(data):
                    near = [host for host in hosts if _near(host, str(sender[0]))]
                    for host in near or hosts:
                        await self._tell(sock, host)
                for notice in wire.decode_notices(data):
                    self._hear(notice, str(sender[0]))
            except ValueError:
                continue

    def _hear(self, notice: Notice, sender: str) -> None:
        """Take in a notice.

        Marks can be copied, so only its sender's own addresses are believed: otherwise anybody on a LAN could have all
        members there dial whom he likes.
        """
        if notice.instance == self._instance or not notice.ttl:
            return
        if not wire.is_marked(notice.mesh, self._mesh_id):
            return
        peers: dict[PeerId, list[str]] = {}
        for address in notice.addresses:
            with suppress(ValueError):
                peer, where = split_relay(address)
                if tcp.host_and_port(where)[0] != sender:
                    continue
                peers.setdefault(peer, []).append(where)
        now = trio.current_time()
        self._recent = [then for then in self._recent if then > now - FOUND_TIME]
        for peer, addresses in peers.items():
            if peer != self._me and libp2p_id(peer) is not None and len(self._recent) < MAX_FOUND:
                self._recent.append(now)
                self._found(peer, tuple(addresses))


async def look_around(seconds: float) -> list[Notice]:
    """What nodes of whatever mesh say on the LANs here, one notice of each; at most `MAX_NEARBY`. Says nothing of us.

    Raises `OSError` where multicast is not possible.
    """
    found: dict[str, Notice] = {}
    with _open_socket() as sock:
        await sock.bind(("", PORT))
        hosts = _join_all(sock)

        async def ask() -> None:
            for _ in range(2):  # the first may be lost
                for host in hosts:
                    await LanDiscovery._send(sock, host, wire.encode_question())
                await trio.sleep(seconds / 3)

        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                while len(found) < MAX_NEARBY:
                    try:
                        data, _ = await sock.recvfrom(9000)
                    except OSError:  # an interface that has gone meanwhile
                        break
                    with suppress(ValueError):
                        found.update((notice.instance, notice) for notice in wire.decode_notices(data))
                nursery.cancel_scope.cancel()
    return [notice for notice in found.values() if notice.ttl]


def _open_socket() -> trio.socket.SocketType:
    sock = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        # The system's own resolver has the port, too; multicast reaches all who have it.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
    except OSError:
        sock.close()
        raise
    return sock


def _join_all(sock: trio.socket.SocketType) -> list[str]:
    """Hear the group on every LAN; our addresses on those where that worked."""
    hosts = []
    for host in tcp.interface_hosts():
        if "." not in host:
            continue
        with suppress(OSError):
            membership = struct.pack("4s4s", socket.inet_aton(GROUP), socket.inet_aton(host))
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
            hosts.append(host)
    return hosts


def _near(host: str, other: str) -> bool:
    return ipaddress.ip_address(other) in ipaddress.ip_network((host, 24), strict=False)
