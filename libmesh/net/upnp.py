"""Finds UPnP routers on the LAN and gives them orders: SSDP over multicast, then SOAP over HTTP. See `nat_wire`."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import urlsplit

import h11
import trio

from libmesh.net import nat_wire as wire
from libmesh.net import tcp
from libmesh.net.nat_wire import Gateway

SEARCH_TIME = 1.5
"""Seconds that routers have to answer a search; they are told to take at most 1."""

HTTP_LIMIT = 5.0
"""Seconds for a request."""

MAX_BODY = 128 * 1024
MAX_GATEWAYS = 4

_ORDER_LIMIT = 4.0


async def find_gateways() -> list[Gateway]:
    """The routers that answer and forward ports."""
    found: list[Gateway] = []
    hosts = [host for host in tcp.interface_hosts() if "." in host and not host.startswith("127.")]
    locations: dict[str, None] = {}

    async def search(host: str) -> None:
        locations.update(dict.fromkeys(await _search(host)))

    async with trio.open_nursery() as nursery:
        for host in hosts:
            nursery.start_soon(search, host)
    for location in list(locations)[:MAX_GATEWAYS]:
        try:
            status, body = await request("GET", location)
            if status == 200:
                found.append(wire.decode_description(body, location))
        except (OSError, ValueError):
            continue
    return found


async def _search(host: str) -> Iterable[str]:
    """URLs of descriptions that routers on `host`'s LAN answered with."""
    found: dict[str, None] = {}
    with (
        suppress(OSError),  # an interface that has gone meanwhile
        trio.move_on_after(SEARCH_TIME),
        trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(host))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 2)
        await sock.bind((host, 0))
        for target in wire.SEARCHES:
            await sock.sendto(wire.search_request(target), wire.SSDP_ADDRESS)
        while len(found) < MAX_GATEWAYS:
            data, sender = await sock.recvfrom(4096)
            with suppress(ValueError):
                found[wire.decode_search_answer(data, str(sender[0]))] = None
    return found


async def order(gateway: Gateway, action: str, **arguments: object) -> dict[str, str]:
    """Give an order; what the router returned.

    `NewInternalClient=None` stands for our address on its side. Raises `OSError`, `ValueError` or `Refused`.
    """
    with trio.move_on_after(_ORDER_LIMIT):
        parts = urlsplit(gateway.control)
        stream = await trio.open_tcp_stream(parts.hostname or "", parts.port or 80)
        async with stream:
            if "NewInternalClient" in arguments:
                arguments = {**arguments, "NewInternalClient": stream.socket.getsockname()[0]}
            headers, body = wire.soap_request(gateway, action, **arguments)
            status, answer = await _exchange(stream, "POST", gateway.control, headers, body)
            return wire.decode_soap_answer(status, answer)
    raise TimeoutError("the router took an order and did not answer")


async def request(method: str, url: str) -> tuple[int, bytes]:
    """A plain HTTP request: status and body. Raises `OSError` or `ValueError`."""
    with trio.move_on_after(HTTP_LIMIT):
        parts = urlsplit(url)
        async with await trio.open_tcp_stream(parts.hostname or "", parts.port or 80) as stream:
            return await _exchange(stream, method, url, {}, b"")
    raise TimeoutError("no answer")


async def _exchange(
    stream: trio.SocketStream, method: str, url: str, headers: dict[str, str], body: bytes
) -> tuple[int, bytes]:
    parts = urlsplit(url)
    machine = h11.Connection(h11.CLIENT)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    fields = {"Host": parts.netloc, "Connection": "close", "Content-Length": str(len(body)), **headers}
    sent = machine.send(h11.Request(method=method, target=target, headers=list(fields.items()))) or b""
    sent += machine.send(h11.Data(data=body)) or b""
    sent += machine.send(h11.EndOfMessage()) or b""
    status, received = 0, bytearray()
    try:
        await stream.send_all(sent)
        while True:
            event = machine.next_event()
            if event is h11.NEED_DATA:
                machine.receive_data(await stream.receive_some(16384))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                received += event.data
                if len(received) > MAX_BODY:
                    raise ValueError("an answer that is too long")
            else:
                return status, bytes(received)
    except (h11.ProtocolError, trio.BrokenResourceError) as exc:
        raise ValueError(f"a broken HTTP answer: {exc}") from exc
