"""Listening and dialling over TCP, and the addresses of this machine.

py-libp2p's own listener is not used: it shares busy ports in silence (SO_REUSEPORT), outlives its host, advertises
0.0.0.0, and keeps a slot and a task per inbound connection for ever. Nor is its dialler: it tries one address and
then blocks the peer for a minute.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import lru_cache

import psutil
import trio
from multiaddr import Multiaddr

from libmesh.errors import AddressUnavailable

STAGGER = 0.2
"""Seconds between attempts at a peer's addresses: RFC 8305 recommends 250 ms, and at least 100; addresses of a mesh
are mostly on one LAN, where a connection takes under 1 ms."""

DIAL_LIMIT = 10.0
"""Seconds that one address may take, the handshake included. Linux gives up on a silent address only after 127 s."""

_HOST_PROTOCOLS = ("ip4", "ip6", "dns", "dns4", "dns6")

_FAR = "192.0.2.1"  # of nobody (RFC 5737)

_KEEPALIVE_IDLE = 30

_CONNECTING = frozenset({errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK})
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
_RESOURCE_PAUSE = 0.1

log = logging.getLogger(__name__)


def host_and_port(address: str) -> tuple[str, int]:
    """The host and the port of a TCP multiaddr. Raises `ValueError`, saying why, if it is not one that we can dial."""
    parts = parts_of(address)
    if [name for name, _ in parts[1:]] not in (["tcp"], ["tcp", "p2p"]) or parts[0][0] not in _HOST_PROTOCOLS:
        raise ValueError("not a TCP address of the form /ip4/HOST/tcp/PORT")
    return str(parts[0][1]), int(str(parts[1][1]))


def parts_of(address: str) -> list[tuple[str, str | None]]:
    """The protocols of a multiaddr, at least one, with their values. Raises `ValueError`, whatever is wrong with it."""
    try:
        parts = [(p.name, value) for p, value in Multiaddr(address).items()]
    # multiaddr lets its codecs' own errors through (TypeError, struct.error, …), and peers choose what it reads.
    except Exception as exc:
        raise ValueError(f"not a multiaddr: {exc}") from exc
    if not parts:
        raise ValueError("not a multiaddr: there is nothing in it")
    return parts


def multiaddr_of(host: str, port: int) -> str:
    """The multiaddr of an IP address and a TCP port."""
    version = ipaddress.ip_address(host.split("%")[0]).version
    return f"/ip{version}/{host.split('%')[0]}/tcp/{port}"


def interface_hosts() -> list[str]:
    """The IP addresses of this machine's interfaces that are up: global, then private, then loopback ones.

    Of the private ones, that on the way to everybody else comes first: the others may be bridges to virtual machines or
    containers, of which there can be many. Link-local IPv6 addresses are left out: nobody can dial them without knowing an
    interface's name.
    """
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = {
        address.address
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6) and "%" not in address.address
    }
    return in_order(found, _outward())


def in_order(hosts: Iterable[str], outward: str) -> list[str]:
    """As `interface_hosts`, which are `hosts`; `outward` is the one on the way to everybody else."""

    def rank(host: str) -> tuple[int, bool, int, str]:
        ip = ipaddress.ip_address(host)
        kind = 2 if ip.is_loopback else 0 if ip.is_global else 1
        return (kind, host != outward, ip.version, host)

    return sorted((host for host in hosts if not ipaddress.ip_address(host).is_link_local), key=rank)


def _outward() -> str:
    """The IPv4 address that leads to everybody else, as the routes are now; empty if there is none. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return "" if sock.connect_ex((_FAR, 9)) else str(sock.getsockname()[0])


def open_listeners(hosts: Sequence[str], port: int, kind: str = "peer-to-peer") -> list[trio.SocketListener]:
    """Listen on `port` of each of `hosts` (IP addresses; `0.0.0.0` and `::` for all), 0 for one free port on all.

    A host of a family that this machine has not is passed over, unless it is the only one. Raises
    `AddressUnavailable` if the port is taken, naming it and its `kind`. The caller closes the listeners.
    """
    listeners: list[trio.SocketListener] = []
    try:
        for host in hosts:
            try:
                sock = _bound(host, port)
            except OSError as exc:
                if exc.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL) and len(hosts) > 1:
                    continue
                raise
            port = sock.getsockname()[1]
            sock.listen(1024)
            if hasattr(socket, "SO_REUSEPORT"):
                # From now on our own dials may leave from this port (see `dial_from`). Another node still cannot take
                # it: it would have had to ask for sharing before it was bound, which `_bound` does not.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listeners.append(trio.SocketListener(trio.socket.from_stdlib_socket(sock)))
    except OSError as exc:
        for listener in listeners:
            listener.socket.close()
        what = "is already in use" if exc.errno == errno.EADDRINUSE else f"cannot be used: {exc.strerror}"
        raise AddressUnavailable(f"the {kind} port {port} {what}") from exc
    if not listeners:
        raise AddressUnavailable(f"none of {', '.join(hosts)} is an address of this machine")
    return listeners


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # SO_REUSEADDR, as servers do, so that a restart need not wait for TIME_WAIT; never SO_REUSEPORT, with
        # which a second node on the port would get half of the connections and nobody an error.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setblocking(False)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


async def accept_all(listener: trio.SocketListener, take: Callable[[trio.SocketStream], None]) -> None:
    """Hand each connection to `take`, which owns it, until cancelled. Closes the listener.

    Unlike `trio.serve_listeners` it does not tie a connection's life to a task of its own. While the process is out of
    file descriptors it waits and tries again, as trio does.
    """
    async with listener:
        while True:
            try:
                stream = await listener.accept()
            except OSError as exc:
                if exc.errno not in _OUT_OF_RESOURCES:
                    raise
                log.warning("cannot accept a connection now: %s", exc.strerror)
                await trio.sleep(_RESOURCE_PAUSE)
            else:
                take(stream)


async def dial(address: str) -> trio.SocketStream:
    """Connect to a TCP multiaddr. Raises `OSError` or `ValueError`; the caller bounds the time."""
    host, port = host_and_port(address)
    stream = await trio.open_tcp_stream(host, port)
    set_options(stream)
    return stream


async def dial_from(port: int, address: str) -> trio.SocketStream:
    """Connect to a multiaddr with an IP address from a port that this process listens on, for hole punching.

    Raises `OSError` or `ValueError`; the caller bounds the time.
    """
    host, remote_port = host_and_port(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        await sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
        await sock.connect((host, remote_port))
    except BaseException:
        sock.close()
        raise
    stream = trio.SocketStream(sock)
    set_options(stream)
    return stream


async def connect(host: str, port: int, limit: float) -> trio.socket.SocketType:
    """Connect to what listens at an address nearby. Raises `OSError`, also if nobody accepts within `limit` seconds.

    For an IP address this makes one attempt, in the calling task: `trio.open_tcp_stream` takes two tasks and four turns
    of the scheduler even where there is nothing to choose, a tenth of what carrying a short connection costs. On loopback it
    has connected when the first call returns, so there may be no checkpoint. The caller closes the socket, of which no
    option is set.
    """
    family = _family(host)
    try:
        if family is None:
            with trio.fail_after(limit):
                return (await trio.open_tcp_stream(host, port)).socket
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            error = sock.connect_ex((host, port))
            if error in _CONNECTING:
                error = sock.connect_ex((host, port))  # says whether it is done already
            if error in _CONNECTING:
                with trio.fail_after(limit):
                    while error in _CONNECTING:
                        await trio.lowlevel.wait_writable(sock)
                        error = sock.connect_ex((host, port))
            if error not in (0, errno.EISCONN):
                raise OSError(error, os.strerror(error))
            return trio.socket.from_stdlib_socket(sock)
        except BaseException:
            sock.close()
            raise
    except trio.TooSlowError:
        raise TimeoutError(f"it accepts no connection within {limit:g} s") from None
    except UnicodeError as exc:
        raise OSError(f"{host!r} cannot be the name of a host: {exc}") from exc


@lru_cache(maxsize=64)
def _family(host: str) -> socket.AddressFamily | None:
    """Of an IP address; `None` for a name. Remembered, as there are few: what is behind the services of this process."""
    try:
        return socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        return None


def remote_address(stream: trio.SocketStream) -> str:
    """The multiaddr of the other end; empty if it is gone already."""
    try:
        host, port = stream.socket.getpeername()[:2]
    except OSError:
        return ""
    return multiaddr_of(host, port)


def set_options(stream: trio.SocketStream) -> None:
    """NODELAY is trio's default already; keepalive lets the kernel notice a dead peer that the muxer could not ask."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE)


Attempt = Callable[[str], Awaitable[object]]


async def first_success(addresses: Sequence[str], attempt: Attempt) -> tuple[str | None, dict[str, str]]:
    """Try `addresses` as happy eyeballs do (RFC 8305): each one `STAGGER` after the last, or as soon as it failed.

    The first success cancels the others. Returns its address, or `None`, and why each that failed did so.
    `attempt` raises `Exception` to fail, and must undo what it did if it is cancelled.
    """
    failures: dict[str, str] = {}
    winner: str | None = None
    failed_events = [trio.Event() for _ in addresses]

    async def run(address: str, scope: trio.CancelScope, failed: trio.Event) -> None:
        nonlocal winner
        try:
            with trio.fail_after(DIAL_LIMIT):
                await attempt(address)
        except trio.TooSlowError:
            failures[address] = f"no answer within {DIAL_LIMIT:.0f} s"
        except Exception as exc:  # noqa: BLE001 - whatever one address does, the others are tried
            failures[address] = reason(exc)
        else:
            winner = winner or address
            scope.cancel()
        failed.set()

    async with trio.open_nursery() as nursery:
        for address, failed in zip(addresses, failed_events, strict=True):
            nursery.start_soon(run, address, nursery.cancel_scope, failed)
            with trio.move_on_after(STAGGER):
                await failed.wait()
    return winner, failures


def reason(exc: BaseException) -> str:
    """The innermost cause in words; trio and py-libp2p wrap it in layers that say less."""
    while True:
        if isinstance(exc, BaseExceptionGroup):
            exc = exc.exceptions[0]
        elif exc.__cause__ is not None and not isinstance(exc, ValueError):
            exc = exc.__cause__
        else:
            break
    if isinstance(exc, OSError) and exc.errno is not None and not isinstance(exc, ssl.SSLError):
        return os.strerror(exc.errno).lower()
    return str(exc) or type(exc).__name__
