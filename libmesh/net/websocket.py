"""Connections inside a WebSocket (RFC 6455), for networks that let nothing but the web through.

As libp2p has it (specs, `websockets`): `/ws` in a multiaddr is a WebSocket, `/wss` and `/tls/ws` one inside TLS; binary
messages whose bounds mean nothing carry one stream of bytes, and above it comes the same handshake as over TCP. TLS is
only what the web wants to see, with the certificates that the system trusts: who the peer is, Noise proves.

We listen without TLS. A proxy that ends it may stand before us, such as the web server that has port 443 already.

The framing is `wsproto`'s, which hands on what has come of a frame, so that no length which a peer claims makes us keep
more than we have read. Everything here is bytes in, bytes out; only `_take_in` and `_flush` wait.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import h11
import trio
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    Pong,
    RejectConnection,
    Request,
    TextMessage,
)
from wsproto.utilities import LocalProtocolError, ProtocolError, RemoteProtocolError

from libmesh.core.ways import is_websocket
from libmesh.net import tcp
from libmesh.net.base import Stream, StreamReset
from libmesh.net.pipes import SocketPipe
from libmesh.peers import PeerId

PIECE_BYTES = 65536
"""Most bytes in a message of ours, and most that are read at a time. js-libp2p and go-libp2p take any size."""

MAX_UNSENT = 256 * 1024
"""Bytes that wait for the peer to read, beyond which it is given up: it makes us answer and does not listen."""

_FORMS = {("ws",): False, ("wss",): True, ("tls", "ws"): True, ("tls", "sni", "ws"): True}


@dataclass(frozen=True, slots=True)
class Target:
    """What a WebSocket multiaddr says.

    Attributes:
        address: the TCP multiaddr to dial.
        host: for the request, and for the certificate.
        port: of both.
        secure: whether TLS comes first.
    """

    address: str
    host: str
    port: int
    secure: bool

    @property
    def authority(self) -> str:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def target_of(address: str) -> Target:
    """Take a WebSocket multiaddr apart. Raises `ValueError`, saying why, if it is not one that we can dial."""
    parts = tcp.parts_of(address)
    if parts[-1][0] == "p2p":
        parts.pop()
    form = tuple(name for name, _ in parts[2:])
    if form not in _FORMS:
        raise ValueError("not a WebSocket address of the form /dns4/HOST/tcp/PORT/wss")
    plain = "/" + "/".join(f"{name}/{value}" for name, value in parts[:2])
    host, port = tcp.host_and_port(plain)
    name = next((str(value) for part, value in parts if part == "sni"), host)
    return Target(plain, name, port, _FORMS[form])


def beside(addresses: Sequence[str], port: int | None) -> tuple[str, ...]:
    """The WebSocket addresses on the hosts of our own TCP addresses; none without a port."""
    return () if port is None else tuple(f"{a.rpartition('/')[0]}/{port}/ws" for a in addresses)


def open_listeners(hosts: Sequence[str], port: int | None) -> list[trio.SocketListener]:
    """Listeners as `tcp.open_listeners` makes them; none without a port. The caller closes them."""
    return [] if port is None else tcp.open_listeners(hosts, port, "WebSocket")


def port_of(listeners: Sequence[trio.SocketListener]) -> int | None:
    """The port that they are all on; `None` if there are none."""
    return listeners[0].socket.getsockname()[1] if listeners else None


async def dial(address: str) -> trio.SocketStream | WebSocket:
    """Connect to a TCP multiaddr, by a WebSocket if it says so; its handshake is done then.

    Raises `OSError`, `ValueError` or `StreamReset`; the caller bounds the time.
    """
    if not is_websocket(address):
        return await tcp.dial(address)
    target = target_of(address)
    context = await trio.to_thread.run_sync(_context) if target.secure else None
    stream = await tcp.dial(target.address)
    websocket = WebSocket(stream, Tls(context, target.host) if context is not None else None)
    try:
        await websocket.request(target.authority)
    except BaseException:
        websocket.reset()
        raise
    return websocket


def _context() -> ssl.SSLContext:
    """The system's trust, read anew for each dial: 20 ms in a thread, and certificates may be installed meanwhile."""
    context = ssl.create_default_context()
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


class Tls:
    """The client's side of TLS as bytes in, bytes out."""

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)

    def handshake(self, received: bytes) -> bool:
        """Go on with the handshake; whether it is done. Raises `ssl.SSLError`."""
        self._incoming.write(received)
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def open(self, received: bytes) -> bytes:
        """What arrived in clear. Raises `ssl.SSLError`."""
        self._incoming.write(received)
        found = bytearray()
        with suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            while piece := self._object.read(PIECE_BYTES):
                found += piece
        return bytes(found)

    def seal(self, data: bytes) -> None:
        """Encrypt; `to_send` has it then."""
        if data:
            self._object.write(data)

    def to_send(self) -> bytes:
        """What is to be sent to the other side now."""
        return self._outgoing.read()


class WebSocket(Stream):
    """A WebSocket as the bytes beneath a secure channel. Owns the socket. One task may send while another receives.

    A server's answers the request in the first call that reads: so the limits of inbound handshakes are its limits, too.

    It has no half-close: an end of file ends both directions. A cancelled `send_all` has sent an unknown part, and others
    may follow; a cancelled `receive_some` has taken nothing.

    Args:
        stream: the connected socket.
        tls: what encrypts beneath the frames; `None` for nothing.

    Attributes:
        peer: empty; nobody has proved anything yet.
    """

    peer = PeerId("")
    protocol = "/ws"

    def __init__(self, stream: trio.SocketStream, tls: Tls | None = None) -> None:
        self._stream = stream
        self._tls = tls
        self._pipe = SocketPipe(stream)
        self._frames = WSConnection(ConnectionType.SERVER)
        self._open = False
        self._ended = False
        self._arrived = bytearray()
        self._unsent = bytearray()  # whole frames, less what of them was sent
        self._pong: Pong | None = (
            None  # waits for the frames before it; RFC 6455, 5.5.3: the last one is enough
        )

    async def request(self, authority: str) -> None:
        """Be the client, and return when the server has accepted. Raises `StreamReset`."""
        self._frames = WSConnection(ConnectionType.CLIENT)
        try:
            await self._secure()
        except ssl.SSLError as exc:
            raise StreamReset(_words(exc)) from exc
        self._put(Request(host=authority, target="/"))
        await self._flush()
        while not self._open:
            await self._take_in()

    async def _secure(self) -> None:
        received = b""
        while self._tls is not None and not self._tls.handshake(received):
            self._unsent += self._tls.to_send()
            await self._flush()
            received = await self._read()

    # ── receiving ────────────────────────────────────────────────────────────────────────────────────────────────

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `Stream`."""
        while not self._arrived and not self._ended:
            await self._take_in()
        data = bytes(self._arrived[:max_bytes])
        del self._arrived[:max_bytes]
        return data

    def receive_nowait(self, max_bytes: int | None = None) -> bytes | None:
        """See `Stream.receive_nowait`."""
        if not self._arrived:
            return None
        data = bytes(self._arrived[:max_bytes])
        del self._arrived[:max_bytes]
        return data

    async def _read(self) -> bytes:
        await self._pipe.wait_readable()  # so that no connection holds a buffer while it waits
        buffer = bytearray(PIECE_BYTES)
        count = await self._pipe.receive_into(memoryview(buffer))
        if not count:
            raise StreamReset("connection lost: it ended without a farewell")
        return bytes(memoryview(buffer)[:count])

    async def _take_in(self) -> None:
        """Wait for bytes, and do what they say. Raises `StreamReset` if they are no WebSocket's."""
        data = await self._read()
        try:
            if self._tls is not None:
                data = self._tls.open(data)
            if data:  # TLS has records of its own, such as session tickets, and to `h11` nothing is the end
                self._frames.receive_data(data)
                for event in self._frames.events():
                    self._hear(event)
        except ssl.SSLError as exc:
            raise StreamReset(_words(exc)) from exc
        except RemoteProtocolError as exc:
            if isinstance(
                exc.event_hint, RejectConnection
            ):  # a browser, or a proxy that asks whether we live
                with suppress(StreamReset, h11.ProtocolError):
                    self._put(exc.event_hint)
                    self._send_now()
            raise StreamReset(f"not a WebSocket: {exc}") from exc
        except (ProtocolError, ValueError) as exc:  # ValueError: headers that are no text
            raise StreamReset(f"not a WebSocket: {exc}") from exc
        self._send_now()
        if len(self._unsent) > MAX_UNSENT:
            raise StreamReset("the other side makes us answer and does not read")

    def _hear(self, event: Event) -> None:
        match event:
            case BytesMessage():
                self._arrived += event.data
            case Ping():
                self._pong = event.response()
            case Request():
                self._put(AcceptConnection())
                self._open = True
            case AcceptConnection():
                self._open = True
            case RejectConnection():
                raise StreamReset(f"the server answered with HTTP {event.status_code}")
            case CloseConnection():
                broken = (
                    self._frames.state is ConnectionState.OPEN
                )  # wsproto's way to tell of frames that are none
                with suppress(StreamReset):
                    self._put(CloseConnection(code=event.code) if broken else event.response())
                self._ended = True
                if broken:
                    raise StreamReset(f"broken frames: {event.reason}")
            case TextMessage():
                raise StreamReset("text where bytes were expected")

    # ── sending ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `Stream`."""
        while not self._open:
            await self._take_in()
        view = memoryview(data)
        await self._flush()  # what a cancelled call left
        for start in range(0, len(view), PIECE_BYTES):
            self._put(BytesMessage(data=bytes(view[start : start + PIECE_BYTES])))
            await self._flush()

    async def wait_send_all_might_not_block(self) -> None:
        """See `Stream`."""
        await self._pipe.wait_writable()

    def _put(self, event: Event) -> None:
        try:
            data = self._frames.send(event)
        except LocalProtocolError as exc:
            raise StreamReset("the WebSocket is closed") from exc
        if self._tls is not None:
            self._tls.seal(data)
            data = self._tls.to_send()
        self._unsent += data

    def _send_now(self) -> None:
        """Send what can be sent without waiting."""
        if self._tls is not None:
            self._unsent += self._tls.to_send()
        while True:
            if self._pong is not None and not self._unsent and not self._ended:
                pong, self._pong = self._pong, None
                self._put(pong)
            if not self._unsent:
                return
            with memoryview(self._unsent) as view:
                sent = self._pipe.send_nowait(view)
            if not sent:
                return
            del self._unsent[:sent]

    async def _flush(self) -> None:
        self._send_now()
        while self._unsent:
            await self._pipe.wait_writable()
            self._send_now()

    async def send_eof(self) -> None:
        """Say farewell: nothing more is sent or received."""
        self._farewell()
        await self._flush()

    # ── ending ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _farewell(self) -> None:
        with suppress(StreamReset, ssl.SSLError):
            if self._open and not self._ended:
                self._put(CloseConnection(code=1000))
                self._send_now()

    async def aclose(self) -> None:
        """Say farewell, if that can be done without waiting, and close the socket."""
        self._farewell()
        self._ended = True
        await self._pipe.aclose()

    def reset(self) -> None:
        """See `Stream.reset`."""
        self._ended = True
        self._stream.socket.close()


def _words(exc: ssl.SSLError) -> str:
    """What went wrong, without the name of a source file of OpenSSL."""
    said = exc.verify_message if isinstance(exc, ssl.SSLCertVerificationError) else exc.reason or str(exc)
    return f"TLS: {said.replace('_', ' ').lower()}"
