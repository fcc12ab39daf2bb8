"""TLS 1.3 of libp2p as a py-libp2p security transport: the second choice, for peers that have no Noise.

Source: libp2p/specs `tls/tls.md`, and `connections/inlined-muxer-negotiation` for the muxer in ALPN. Both sides show a
certificate (`certificate.py`); nobody is asked to vouch for it. Offered behind Noise: through the whole tunnel it is
slower, since OpenSSL's records are at most 16 KiB and each byte is copied into and out of its buffers.

Python's `ssl` can neither ask a client for a certificate that no authority signed nor be told how to judge one; so this
stands on pyOpenSSL, which can. py-libp2p's own, which stands on `ssl`, js-libp2p refuses for that reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio
from cryptography.hazmat.primitives.serialization import Encoding
from libp2p.abc import IRawConnection, ISecureConn, ISecureTransport
from libp2p.crypto.keys import KeyPair
from libp2p.peer.id import ID
from OpenSSL import SSL

from libmesh.net.base import StreamReset
from libmesh.net.certificate import TlsFailure, identity_of, make_certificate
from libmesh.net.noise import YAMUX_ID
from libmesh.net.pipes import BufferPool, Pipe, SocketPipe, pipe_of
from libmesh.net.records import BUFFER_BYTES, Channel, Piece
from libmesh.net.session import Session, not_the_peer

PROTOCOL_ID = "/tls/1.0.0"

ALPN = b"libp2p"
"""What is agreed on in ALPN where no muxer is."""

MAX_HANDSHAKE_BYTES = 64 * 1024
"""Received before the peer has proved anything; a handshake takes 2 KiB. More is cut off."""

MAX_ANSWERS = 64 * 1024
"""Bytes that the peer can make us queue without taking them: key updates, alerts. More ends the connection."""

_RECORD_BYTES = 16384
_READ_BYTES = 256 * 1024


class TlsSession(Session):
    """A connection secured by TLS, to an authenticated peer."""


class Tls(ISecureTransport):
    """TLS for `sec_opt["/tls/1.0.0"]`. One for each host; it holds the host's certificate and buffers.

    Args:
        key_pair: the host's identity.
        muxers: the muxers to offer in the handshake, best first; empty to always negotiate afterwards.
        handshake_timeout: seconds within which a handshake must be done.
    """

    def __init__(
        self, key_pair: KeyPair, *, muxers: Sequence[str] = (YAMUX_ID,), handshake_timeout: float = 10.0
    ) -> None:
        self._identity = key_pair
        self._peer = ID.from_pubkey(key_pair.public_key)
        self._timeout = handshake_timeout
        self._pool = BufferPool(BUFFER_BYTES)
        self._offers = [*(muxer.encode() for muxer in muxers), ALPN]
        own = make_certificate(key_pair)
        context = self._context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.set_max_proto_version(SSL.TLS1_3_VERSION)
        context.use_privatekey(own.key)
        context.use_certificate(own.certificate)
        # Judged by `identity_of`, after the handshake and before any byte is believed: nobody vouches for them.
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, lambda *_: True)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)  # a resumed session would show no certificate
        context.set_options(SSL.OP_NO_TICKET)
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)
        context.set_alpn_protos(self._offers)
        context.set_alpn_select_callback(self._select)

    def _select(self, _: SSL.Connection, offered: list[bytes]) -> bytes:
        """The client's first muxer that we have. Without any the handshake fails, as the specification wants it to."""
        for offer in offered:
            if offer in self._offers:
                return offer
        raise TlsFailure(f"the client wants to speak {b', '.join(offered)[:100]!r}")

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        """Answer a handshake. Raises `TlsFailure`, whatever the other side sends or does not send."""
        return await self._secure(conn, None, initiator=False)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        """Start a handshake with `peer_id`. Raises `TlsFailure`, also when somebody else answers."""
        return await self._secure(conn, peer_id, initiator=True)

    async def _secure(self, conn: IRawConnection, expected: ID | None, *, initiator: bool) -> ISecureConn:
        tls = SSL.Connection(self._context, None)
        (tls.set_connect_state if initiator else tls.set_accept_state)()
        channel = TlsChannel(pipe_of(conn), tls, self._pool)
        try:
            with trio.fail_after(self._timeout):
                await channel.handshake()
                identity = identity_of(channel.certificate())
                peer = ID.from_pubkey(identity)
                if expected is not None and peer != expected:
                    raise TlsFailure(not_the_peer(peer, self._peer))
        except trio.TooSlowError:
            raise TlsFailure(f"no TLS handshake within {self._timeout} s") from None
        except (SSL.Error, StreamReset) as exc:
            raise TlsFailure(f"TLS handshake failed: {exc!r}") from exc
        agreed = tls.get_alpn_proto_negotiated()
        return TlsSession(
            conn,
            channel,
            agreed.decode() if agreed and agreed != ALPN else None,
            local_peer=self._peer,
            local_private_key=self._identity.private_key,
            remote_peer=peer,
            remote_permanent_pubkey=identity,
            is_initiator=initiator,
        )


class TlsChannel(Channel):
    """A pipe secured with TLS. Owns the pipe."""

    def __init__(self, pipe: Pipe, tls: SSL.Connection, pool: BufferPool) -> None:
        self._pipe = pipe
        self._tls = tls
        self._pool = pool
        self._out = bytearray()  # ciphertext; from _sent on it waits to be sent
        self._sent = 0
        self._answers = 0
        self._flushing = False
        self._ended = False

    # ---- the handshake ----------------------------------------------------------------------------------------

    async def handshake(self) -> None:
        """Agree on keys. Raises `SSL.Error` or `StreamReset`. If cancelled, the connection is of no more use."""
        received = 0
        while not self._shake():
            await self._flush_all()
            received += await self._feed()
            if self._ended:
                raise StreamReset("the peer hung up in the handshake")
            if received > MAX_HANDSHAKE_BYTES:
                raise StreamReset("the peer's handshake does not end")
        await self._flush_all()

    def _shake(self) -> bool:
        """Whether the handshake is done."""
        try:
            self._tls.do_handshake()
        except SSL.WantReadError:
            return False
        finally:
            self._seal()  # an alert, too
        return True

    def certificate(self) -> bytes:
        """The peer's only certificate, in DER. Raises `TlsFailure` if there is none, or more than one."""
        chain = self._tls.get_peer_cert_chain(as_cryptography=True) or []
        own = self._tls.get_peer_certificate(as_cryptography=True)
        if own is None or any(other != own for other in chain):
            raise TlsFailure(f"the peer showed {len(chain)} certificates, not one")
        return own.public_bytes(Encoding.DER)

    async def _flush_all(self) -> None:
        while not self.flush_nowait():
            await self.flush()

    # ---- receiving --------------------------------------------------------------------------------------------

    async def receive(self) -> list[bytes]:
        """See `Channel.receive`."""
        records = self._open()  # what came behind the handshake
        while not records and not self._ended:
            await self._feed()
            before = len(self._out)
            records = self._open()
            if not records and self.heard is not None:
                self.heard()
            if (answers := len(self._out) - before) and not self.flush_nowait():
                self._answers += answers
                if self._answers > MAX_ANSWERS:
                    raise StreamReset("the peer does not read the answers that it causes")
        return records

    async def _feed(self) -> int:
        """Give OpenSSL what comes next; how much that was."""
        pipe, pool = self._pipe, self._pool
        await pipe.wait_readable()  # so that no connection holds a buffer while it waits
        buffer = pool.take()
        try:
            with memoryview(buffer) as view:
                count = await pipe.receive_into(view)
                if count:
                    self._tls.bio_write(view[:count])
                else:
                    self._tls.bio_shutdown()
                    self._ended = True
        finally:
            pool.give(buffer)
        return count

    def _open(self) -> list[bytes]:
        records: list[bytes] = []
        try:
            while True:
                records.append(self._tls.recv(_RECORD_BYTES))
        except SSL.WantReadError:
            pass
        except SSL.ZeroReturnError:
            self._ended = True
        except SSL.Error as exc:
            if self._ended:
                raise StreamReset("connection lost") from exc
            raise StreamReset(f"a record was damaged on the way: {exc!r}") from exc
        self._seal()
        return records

    # ---- sending ----------------------------------------------------------------------------------------------

    def put(self, pieces: Sequence[Piece]) -> None:
        """See `Channel.put`."""
        joined = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if len(joined):
            try:
                self._tls.sendall(joined)
            except SSL.Error as exc:
                raise StreamReset(f"connection lost: {exc!r}") from exc
            self._seal()

    def _seal(self) -> None:
        """Take what OpenSSL wants to be sent."""
        try:
            while True:
                self._out += self._tls.bio_read(_READ_BYTES)
        except SSL.WantReadError:
            return

    def flush_nowait(self) -> bool:
        """See `Channel.flush_nowait`."""
        if self._flushing:
            return False  # `receive` has answers while `flush` waits with what is first
        with memoryview(self._out) as view:
            while self._sent < len(view):
                sent = self._pipe.send_nowait(view[self._sent :])
                if not sent:
                    return False
                self._sent += sent
        self._emptied()
        return True

    def _emptied(self) -> None:
        self._out, self._sent, self._answers = bytearray(), 0, 0

    async def flush(self) -> bool:
        """See `Channel.flush`."""
        if not self._out:
            await trio.lowlevel.checkpoint()
            return False
        pipe = self._pipe
        if isinstance(pipe, SocketPipe):
            await pipe.wait_writable()
            self.flush_nowait()
            return True
        self._flushing = True
        try:
            sent = await pipe.send_some(memoryview(bytes(self._out[self._sent : self._sent + _READ_BYTES])))
        finally:
            self._flushing = False
        self._sent += sent
        if self._sent == len(self._out):
            self._emptied()
        return False

    def shorten(self) -> None:
        """See `Channel.shorten`."""
        self._pipe.shorten()

    async def aclose(self) -> None:
        """See `Channel.aclose`. Says goodbye if there is room for it."""
        try:
            self._tls.shutdown()
            self._seal()
            self.flush_nowait()
        except (SSL.Error, StreamReset):
            pass  # it was over already
        await self._pipe.aclose()
