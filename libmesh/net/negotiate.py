"""multistream-select 1.0 on streams: which protocol a stream speaks, agreed without waiting.

Source: libp2p/specs `connections` ("multistream-select") and multiformats/multistream-select. Both sides say
`/multistream/1.0.0`; the opener proposes a protocol; the other side repeats it, or says `na`. The lines are in `lines.py`.

The opener need not wait for any of it: header, proposal and the first bytes of the request leave together, and the
answer is looked at when the first byte of the response is wanted. A peer that refuses reads the request as a further
proposal and gives up; the opener then finds `na` where the answer should be. That costs a refused request its bytes,
and saves every other one two round trips (opens a second, measured: 660 without, 1858 with).
"""

from __future__ import annotations

from collections.abc import Callable

import trio
from libp2p.abc import IMuxedConn, IMuxedStream
from libp2p.connection_types import ConnectionType
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable, MuxedStreamError

from libmesh.errors import PeerUnreachable, ServiceRefused
from libmesh.net.base import Sink, Stream, StreamReset
from libmesh.net.lines import (
    HEADER,
    HEADER_LINE,
    NOT_AVAILABLE,
    NOT_AVAILABLE_LINE,
    LineReader,
    encode_line,
    opening_of,
)
from libmesh.net.muxed_stream import YamuxStream
from libmesh.net.muxer import YamuxConnection
from libmesh.net.stock import StockStream
from libmesh.peers import PeerId

MAX_PROPOSALS = 64
"""Proposals that are answered on one stream; then it is reset."""

NEGOTIATION_TIME = 10.0
"""Seconds that a peer has to name a protocol that we know; then the stream is reset."""

TOGETHER_BYTES = 512
"""A first message up to this waits a turn of the scheduler for what its sender does next, which mostly is to end the stream:
to send both at once takes a fifth less of both sides' time."""


class Libp2pStream(Stream):
    """A stream of a libp2p connection that speaks, or will speak, one protocol. See `Stream`.

    While the peer has not answered, sending goes ahead; the first receive waits for the answer and raises
    `ServiceRefused` with reason `unknown_protocol` if it is no. A send that fails because of that raises it, too.
    """

    def __init__(
        self, inner: YamuxStream | StockStream, peer: PeerId, protocol: str, *, agreed: bool
    ) -> None:
        self.peer = peer
        self.protocol = protocol
        self._inner = inner
        self._proposed = agreed
        self._answers: LineReader | None = None if agreed else LineReader(inner)
        self._header_seen = False
        self._refused = False
        self._closed: trio.Event | None = None  # for whoever waits for it

    @property
    def relayed(self) -> bool:
        """Whether the connection goes through a relay. Not told of a stock muxer's."""
        if not isinstance(self._inner, YamuxStream):
            return False
        return self._inner.muxed_conn.get_connection_type() is ConnectionType.RELAYED

    @property
    def connection_lost(self) -> bool:
        """See `Stream`."""
        return isinstance(self._inner, YamuxStream) and self._inner.muxed_conn.is_closed

    # ---- receiving --------------------------------------------------------------------------------------------

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """See `Stream`."""
        if self._answers is not None:
            await self._await_answer(self._answers)
        return await self._inner.receive_some(max_bytes)

    def receive_nowait(self, max_bytes: int | None = None) -> bytes | None:
        """See `Stream`."""
        if self._answers is not None and not self._check_answer(self._answers):
            return None
        return self._inner.receive_nowait(max_bytes)

    async def receive_past(self, sink: Sink) -> bytes:
        """See `Stream`."""
        if self._answers is not None:
            await self._await_answer(self._answers)
        if isinstance(self._inner, YamuxStream):
            return await self._inner.receive_past(sink)
        return await self._inner.receive_some()

    async def wait_receivable(self, sink: Sink | None = None) -> None:
        """Wait until `receive_nowait` may have something. To be called only right after it answered `None`.

        Once the peer has agreed, what arrives is offered to `sink` first; see `YamuxStream.wait_receivable`.
        """
        if self._answers is None and isinstance(self._inner, YamuxStream):
            await self._inner.wait_receivable(sink)
        else:
            await self._inner.wait_receivable()

    async def _await_answer(self, answers: LineReader) -> None:
        self._propose()
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._check_answer(answers):
            await self._inner.wait_receivable()

    async def wait_agreed(self) -> None:
        """Wait for the peer's answer. Raises `ServiceRefused`; the stream is then reset."""
        if self._answers is not None:
            await self._await_answer(self._answers)

    def _check_answer(self, answers: LineReader) -> bool:
        """Whether the peer has agreed. Raises `ServiceRefused`, or `StreamReset` for nonsense."""
        self._propose()
        if self._refused:
            raise self._refusal()
        try:
            if not self._header_seen and answers.skip_nowait(opening_of(self.protocol)):
                self._answers = None
                return True
            while (line := answers.read_nowait()) is not None:
                if not self._header_seen and line == HEADER:
                    self._header_seen = True
                elif self._header_seen and line == self.protocol:
                    self._answers = None
                    return True
                elif self._header_seen and line == NOT_AVAILABLE:
                    self._refused = True
                    self._inner.reset_nowait()
                    raise self._refusal()
                else:
                    raise StreamReset("the peer answered the proposal of a protocol with something else")
        except StreamReset:
            self._inner.reset_nowait()
            raise
        return False

    def _refusal(self) -> ServiceRefused:
        return ServiceRefused(
            f"the peer does not know the protocol {self.protocol}", reason="unknown_protocol"
        )

    def _propose(self) -> None:
        if not self._proposed:
            self._proposed = True
            self._inner.post(opening_of(self.protocol))

    # ---- sending ----------------------------------------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `Stream`."""
        try:
            if not self._proposed and len(data) <= TOGETHER_BYTES and isinstance(self._inner, YamuxStream):
                await trio.lowlevel.checkpoint_if_cancelled()
                self._proposed = True
                try:
                    await self._inner.send_all(opening_of(self.protocol) + bytes(data), soon=True)
                except trio.BusyResourceError:
                    self._proposed = False  # nothing of it was sent
                    raise
                return
            self._propose()
            await self._inner.send_all(data)
        except (StreamReset, trio.ClosedResourceError):
            self._raise_refusal()
            raise

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """See `Stream`."""
        if not self._proposed:
            self._propose()
        try:
            return self._inner.send_nowait(data)
        except (StreamReset, trio.ClosedResourceError):
            self._raise_refusal()
            raise

    def post(self, data: bytes) -> bool:
        """See `Stream`."""
        if not isinstance(self._inner, YamuxStream):
            return False
        self._propose()
        return self._inner.post(data, hurry=not self._inner.unread)

    def _raise_refusal(self) -> None:
        if self._refused:
            raise self._refusal()
        if self._answers is not None:
            try:
                self._check_answer(self._answers)
            except (StreamReset, trio.ClosedResourceError):
                return

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream.wait_send_all_might_not_block`."""
        await self._inner.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """See `Stream`."""
        self._propose()
        await self._inner.send_eof()

    # ---- the end ----------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """See `Stream`."""
        if self._closed is not None:
            self._closed.set()
        await self._inner.aclose()

    def reset(self) -> None:
        """See `Stream`."""
        if self._closed is not None:
            self._closed.set()
        self._inner.reset_nowait()

    def when_lost(self, scope: trio.CancelScope | None) -> bool:
        """See `Stream`."""
        if not isinstance(self._inner, YamuxStream):
            return False
        self._inner.when_lost(scope)
        return True

    async def wait_closed(self) -> None:
        """Wait until whoever the stream was given to closes or resets it. For one waiter, from before that happens."""
        self._closed = trio.Event()
        await self._closed.wait()


async def open_lazy_stream(muxed_conn: IMuxedConn, peer: PeerId, protocol: str) -> Stream:
    """Open a stream for `protocol` without waiting for the peer's consent.

    On a stock muxer, where a stream costs a round trip anyway, the answer is waited for.

    Raises:
        PeerUnreachable: the connection is over.
        ServiceRefused: at once on a stock muxer; otherwise later, see `Libp2pStream`.
    """
    try:
        if isinstance(muxed_conn, YamuxConnection):
            return Libp2pStream(await muxed_conn.open_stream(silent=True), peer, protocol, agreed=False)
        muxed = await muxed_conn.open_stream()
    except (MuxedConnUnavailable, MuxedStreamError) as exc:
        raise PeerUnreachable(f"the connection to {peer} is over: {exc}", {}) from exc
    stream = Libp2pStream(StockStream(muxed), peer, protocol, agreed=False)
    await stream.wait_agreed()
    return stream


class Answerer:
    """The answering side of the negotiation of one stream, as far as the proposals have come.

    Not a byte beyond the negotiation is taken off the stream, so it can also be handed to py-libp2p's handlers.

    Args:
        inner: the stream; not owned.
        known: says which protocols are served here.
    """

    def __init__(self, inner: YamuxStream | StockStream, known: Callable[[str], bool]) -> None:
        self._inner = inner
        self._known = known
        self._lines = LineReader(inner)
        self._header_seen = False
        self._refused = 0

    def step(self) -> str | None:
        """Answer what has arrived; return the protocol once one is agreed on, `None` to be called again with more.

        The answer to an opener that did not wait for it, as ours never do, may wait for the first bytes of the
        response: a wake-up less for the peer. Any other leaves at once. Raises `StreamReset` on garbage and on too many
        proposals; the stream must then be reset.
        """
        lines, inner = self._lines, self._inner
        answers, line = b"", None
        try:
            if not self._header_seen and (line := lines.behind_nowait(HEADER_LINE)) is not None:
                self._header_seen = True
                answers = HEADER_LINE
            while line is not None or (line := lines.read_nowait()) is not None:
                if not self._header_seen:
                    if line != HEADER:
                        raise StreamReset("the peer does not speak multistream-select 1.0")
                    self._header_seen = True
                    answers = HEADER_LINE
                elif self._known(line):
                    inner.post(answers + encode_line(line), hurry=not inner.unread)
                    return line
                elif self._refused == MAX_PROPOSALS - 1:
                    raise StreamReset(f"none of {MAX_PROPOSALS} proposed protocols is known")
                else:
                    self._refused += 1
                    answers += NOT_AVAILABLE_LINE
                line = None
        except StreamReset:
            if answers:
                inner.post(
                    answers
                )  # what does not read as a proposal may be a request that came with the one before
            raise
        if answers:
            inner.post(answers)
        return None

    def give_up(self) -> None:
        """End the stream after a failure. An opener that was refused is to see that first, and not a mere reset."""
        if 0 < self._refused < MAX_PROPOSALS - 1 and isinstance(self._inner, YamuxStream):
            self._inner.close_nowait()
        else:
            self._inner.reset_nowait()


async def accept_stream(muxed_stream: IMuxedStream, peer: PeerId, known: Callable[[str], bool]) -> Stream:
    """Answer the peer's proposals on a stream that it opened, until one is `known`; return the stream.

    Raises `StreamReset`, having reset the stream, on garbage, on too many proposals, and after `NEGOTIATION_TIME`.
    """
    inner = muxed_stream if isinstance(muxed_stream, YamuxStream) else StockStream(muxed_stream)
    answerer = Answerer(inner, known)
    protocol = None
    try:
        with trio.move_on_after(NEGOTIATION_TIME):
            while (protocol := answerer.step()) is None:
                await inner.wait_receivable()
    except BaseException:
        answerer.give_up()
        raise
    if protocol is None:
        answerer.give_up()
        raise StreamReset(f"no protocol was named within {NEGOTIATION_TIME} s")
    return Libp2pStream(inner, peer, protocol, agreed=True)
