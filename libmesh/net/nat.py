"""Has the router forward our port: by PCP, NAT-PMP or UPnP IGD, whichever it speaks; renews that, and gives it back.

A mapping lasts an hour and is renewed after five minutes, so that a router which lost it in a reboot has it again soon;
at once where there is reason to doubt it (`doubt`). Where no router forwards ports, that is tried again now and then.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from libmesh.net import nat_wire as wire
from libmesh.net import tcp
from libmesh.net.nat_wire import Granted, Refused
from libmesh.net.upnp import find_gateways, order

log = logging.getLogger(__name__)

LIFETIME = 3600
"""Seconds that a mapping is asked for."""

RENEW_AFTER = 300.0
"""Seconds after which it is renewed, or half of what was granted, if less."""

RETRY_MIN, RETRY_MAX = 30.0, 900.0
"""Pause while nothing forwards our port, doubling."""

DOUBT_GAP = 10.0
"""Least seconds between renewals out of doubt."""

FAREWELL = 0.5
"""Seconds that giving the port back may take."""

_TRIES = (
    0.25,
    0.5,
    1.0,
)  # RFC 6886, 3.1: from 250 ms, doubling; a LAN's router that is there answers the first
_LATER_PORTS = 3  # other ports that are tried where another machine has ours


@dataclass(frozen=True, slots=True)
class Mapping:
    """A port that leads to us. `address` is the multiaddr; `lifetime` in seconds, 0 for ever."""

    address: str
    port: int
    lifetime: float


class Method(Protocol):
    """A way to ask a router."""

    name: str

    async def ask(self, port: int, outside: int) -> Mapping:
        """Ask for `outside`, or another one, to lead to our `port`. Raises `OSError`, `ValueError` or `Refused`."""

    async def give_back(self, port: int, outside: int) -> None:
        """Have it forwarded no more. Raises likewise."""


class PortMapper:
    """Keeps one TCP port forwarded.

    Args:
        changed: told the multiaddrs that lead here now, none or one.

    Attributes:
        protocol: the one that works, such as `UPnP IGD`; empty while none does.
        failure: why none does, in words.
    """

    def __init__(self, changed: Callable[[tuple[str, ...]], None]) -> None:
        self._changed = changed
        self.protocol, self.failure = "", "not tried yet"
        self._method: Method | None = None
        self._mapping: Mapping | None = None
        self._hurry = trio.Event()
        self._doubted = float("-inf")

    def again(self) -> None:
        """The network may be another one: ask whatever router there is now."""
        self._method = None
        self._hurry.set()

    def doubt(self) -> None:
        """The router may have lost the mapping: ask again at once, though not all the time."""
        now = trio.current_time()
        if self._mapping is not None and now - self._doubted > DOUBT_GAP:
            self._doubted = now
            self._hurry.set()

    async def run(self, port: int) -> None:
        """Keep `port` forwarded until cancelled; then give it back."""
        pause = RETRY_MIN
        try:
            while True:
                self._hurry = trio.Event()
                await self._obtain(port)
                if (mapping := self._mapping) is not None:
                    half = mapping.lifetime / 2 if mapping.lifetime else RENEW_AFTER
                    wait, pause = min(half, RENEW_AFTER), RETRY_MIN
                else:
                    wait, pause = pause, min(pause * 2, RETRY_MAX)
                with trio.move_on_after(wait):
                    await self._hurry.wait()
                    pause = RETRY_MIN
        finally:
            if self._mapping is not None and self._method is not None:
                with (
                    trio.CancelScope(shield=True),
                    trio.move_on_after(FAREWELL),
                    suppress(OSError, ValueError, Refused),
                ):
                    await self._method.give_back(port, self._mapping.port)

    async def _obtain(self, port: int) -> None:
        """Renew the mapping, or get one from whichever router forwards ports."""
        failures: list[str] = []
        outside = self._mapping.port if self._mapping is not None else port
        found: Mapping | None = None
        for method in [self._method] if self._method is not None else _methods():
            try:
                found = await method.ask(port, outside)
            except (OSError, ValueError, Refused) as exc:
                failures.append(f"{method.name}: {tcp.reason(exc)}")
            else:
                self._method = method
                break
        if found is None and self._method is not None:  # it worked before: look at all again
            self._method = None
            await self._obtain(port)
            return
        self.protocol = self._method.name if found is not None and self._method is not None else ""
        self.failure = "" if found is not None else "; ".join(failures) or "there is no router"
        before = self._mapping.address if self._mapping is not None else None
        self._mapping = found
        if (found.address if found is not None else None) != before:
            log.info("port forwarding: %s", f"{self.protocol} {found.address}" if found else self.failure)
            self._changed((found.address,) if found is not None else ())


def _methods() -> list[Method]:
    """What to ask, the simplest first."""
    routers = default_gateways()
    return [
        *(Pcp(router) for router in routers),
        *(NatPmp(router) for router in routers),
        Upnp(),
    ]


def default_gateways() -> list[str]:
    """IPv4 addresses of routers: those of the default routes, or, where the system does not say, guesses."""
    if sys.platform == "linux":
        try:
            lines = Path("/proc/net/route").read_text().splitlines()[1:]
        except OSError:
            lines = []
        routes = [line.split() for line in lines]
        found = [route[2] for route in routes if len(route) > 7 and route[1] == route[7] == "00000000"]
        return list(dict.fromkeys(socket.inet_ntoa(struct.pack("=I", int(hexed, 16))) for hexed in found))
    hosts = [ipaddress.ip_address(host) for host in tcp.interface_hosts()]
    return [str(host - int(host) % 256 + 1) for host in hosts if host.version == 4 and not host.is_loopback]


async def exchange(router: str, request: bytes) -> tuple[bytes, str]:
    """The router's answer to a datagram, and the address that we have for it. Raises `OSError`, timeouts included."""
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        await sock.connect((router, wire.PMP_PORT))
        for patience in _TRIES:
            await sock.send(request)
            with trio.move_on_after(patience):
                return await sock.recv(1100), sock.getsockname()[0]
    raise TimeoutError("no answer")


class NatPmp:
    """RFC 6886."""

    name = "NAT-PMP"

    def __init__(self, router: str) -> None:
        self._router = router

    async def ask(self, port: int, outside: int) -> Mapping:
        """See `Method.ask`."""
        answer, _ = await exchange(self._router, wire.pmp_address_request())
        ip = wire.decode_pmp_address(answer)
        answer, _ = await exchange(self._router, wire.pmp_map_request(port, outside, LIFETIME))
        granted = wire.decode_pmp_map(answer, port)
        return _mapping(Granted(granted.port, granted.lifetime, ip))

    async def give_back(self, port: int, outside: int) -> None:
        """See `Method.give_back`."""
        await exchange(self._router, wire.pmp_map_request(port, 0, 0))


class Pcp:
    """RFC 6887."""

    name = "PCP"

    def __init__(self, router: str) -> None:
        self._router = router
        self._nonce = os.urandom(12)

    async def ask(self, port: int, outside: int) -> Mapping:
        """See `Method.ask`."""
        answer = await self._exchange(port, outside, LIFETIME)
        return _mapping(wire.decode_pcp_map(answer, self._nonce, port))

    async def give_back(self, port: int, outside: int) -> None:
        """See `Method.give_back`."""
        await self._exchange(port, outside, 0)

    async def _exchange(self, port: int, outside: int, lifetime: int) -> bytes:
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            await sock.connect((self._router, wire.PMP_PORT))
            own = sock.getsockname()[0]
        request = wire.pcp_map_request(own, self._nonce, port, outside, lifetime)
        return (await exchange(self._router, request))[0]


class Upnp:
    """UPnP Internet Gateway Device, `WANIPConnection` and `WANPPPConnection`."""

    name = "UPnP IGD"

    def __init__(self) -> None:
        self._gateway: wire.Gateway | None = None

    async def ask(self, port: int, outside: int) -> Mapping:
        """See `Method.ask`."""
        failure: Exception = OSError("no router answers")
        for gateway in [self._gateway] if self._gateway is not None else await find_gateways():
            try:
                return await self._ask(gateway, port, outside)
            except (OSError, ValueError, Refused) as exc:
                failure = exc
        self._gateway = None
        raise failure

    async def _ask(self, gateway: wire.Gateway, port: int, outside: int) -> Mapping:
        ip = (await order(gateway, "GetExternalIPAddress")).get("NewExternalIPAddress", "")
        lifetime = LIFETIME
        for attempt in range(_LATER_PORTS + 1):
            try:
                await order(
                    gateway, "AddPortMapping", NewRemoteHost="", NewExternalPort=outside + attempt, NewProtocol="TCP",
                    NewInternalPort=port, NewInternalClient=None, NewEnabled=1,
                    NewPortMappingDescription="libmesh", NewLeaseDuration=lifetime,
                )  # fmt: skip
            except Refused as exc:
                if exc.code == 725 and lifetime:  # "OnlyPermanentLeasesSupported"
                    lifetime = 0
                elif (
                    exc.code != 718 or attempt == _LATER_PORTS
                ):  # "ConflictInMappingEntry": another machine's
                    raise
            else:
                self._gateway = gateway
                return _mapping(Granted(outside + attempt, lifetime, ip))
        raise Refused("the ports are taken", 718)

    async def give_back(self, port: int, outside: int) -> None:
        """See `Method.give_back`."""
        if self._gateway is not None:
            await order(
                self._gateway,
                "DeletePortMapping",
                NewRemoteHost="",
                NewExternalPort=outside,
                NewProtocol="TCP",
            )


def _mapping(granted: Granted) -> Mapping:
    ip = ipaddress.ip_address(granted.ip)
    if not ip.is_global:
        raise Refused(f"the router's own address, {ip}, is not public: there is another router behind it", 0)
    return Mapping(tcp.multiaddr_of(granted.ip, granted.port), granted.port, granted.lifetime)
