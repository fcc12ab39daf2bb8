"""What the libp2p adapter is told: where to listen, and how much of everything it takes."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

from multiaddr import Multiaddr

from libmesh.core.ranges import check_counts, check_numbers
from libmesh.core.relay_desk import RelayLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class Libp2pConfig:
    """Limits of the adapter.

    Attributes:
        hosts: IP addresses to listen on.
        port: TCP port, the same on all hosts; 0 takes a free one.
        websocket_port: likewise, for peers that come by WebSocket, without TLS; `None` for none.
        map_port: ask the router to forward the port (PCP, NAT-PMP, UPnP).
        announce: multiaddrs at which others reach us besides, or despite, our interfaces' own. Told first.
        max_connections: more are refused at once, so that those there are keep working.
        max_handshakes: inbound connections that have not proved a key yet. When full, the oldest one is dropped: in
            a flood the honest, who need milliseconds, get through between the others.
        handshake_limit: seconds for an inbound connection to prove its key and agree on a muxer.
        admission_limit: seconds that a stream of a peer which is not yet admitted is held.
        max_waiting: streams of one such peer that are held; more are reset.
        max_events: events not yet read, beyond which gossip messages are dropped. Never other events.
        private_only: of what others name, dial addresses of private networks only: in hole punches, and for those who want to
            know whether they can be reached. What `Network.connect` and `Network.dial` are told is not looked at.
        ping_interval: seconds between pings on each connection.
        ping_timeout: seconds without any sign of life after a ping until a connection is dead, and its streams with it. A
            peer that vanishes is noticed within the sum of both. Less costs packets on connections that are idle, and
            ends those over links that pause for as long.
        relay: what this node gives as a relay for others; `None` to be none.
        relay_open: be a relay for whoever comes, not for admitted peers only.
    """

    hosts: tuple[str, ...] = ("0.0.0.0", "::")
    port: int = 0
    websocket_port: int | None = None
    map_port: bool = False
    announce: tuple[str, ...] = ()
    max_connections: int = 2048
    max_handshakes: int = 256
    handshake_limit: float = 10.0
    admission_limit: float = 5.0
    max_waiting: int = 32
    max_events: int = 1024
    private_only: bool = False
    ping_interval: float = 10.0
    ping_timeout: float = 5.0
    relay: RelayLimits | None = None
    relay_open: bool = False

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the field, when a value cannot work."""
        for name in ("port", "websocket_port"):
            port = getattr(self, name)
            none = port is None and name == "websocket_port"
            if not (none or (isinstance(port, int) and 0 <= port <= 65535)):
                raise ValueError(f"{name}={port!r}: from 0 to 65535")
        for name in ("hosts", "announce"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r}: a tuple of texts, not one text")
        if not self.hosts:
            raise ValueError("hosts: there must be at least one")
        for host in self.hosts:
            try:
                ip_address(host)
            except ValueError as exc:
                raise ValueError(f"hosts: {host!r} is no IP address, like 127.0.0.1") from exc
        for address in self.announce:
            try:
                Multiaddr(address)
            except ValueError as exc:
                raise ValueError(
                    f"announce: {address!r} is no multiaddr, like /ip4/192.0.2.1/tcp/4001"
                ) from exc
        check_counts(self, "max_connections", "max_handshakes", "max_waiting", "max_events")
        check_numbers(self, "handshake_limit", "ping_interval", "ping_timeout")
        check_numbers(self, "admission_limit", zero=True)
