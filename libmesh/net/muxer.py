"""Our yamux under py-libp2p: the driver of `core.yamux`.

Three tasks a connection: one reads, one sends what could not be sent at once, one keeps time. Nothing else ever waits
for the socket, so cancelling the user of a stream cannot leave a record half sent, and no stream can hold up another.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable
from multiaddr import Multiaddr

from libmesh.core.yamux import Yamux
from libmesh.core.yamux_frames import (
    Broken,
    Data,
    Event,
    Finished,
    GoneAway,
    OpenAllowed,
    Opened,
    Options,
    Reset,
    Writable,
)
from libmesh.net.base import Pieces, StreamReset
from libmesh.net.muxed_stream import YamuxStream
from libmesh.net.outbound import COMPANY_TIME, SYN_TIME, Outbound
from libmesh.net.records import Channel, PlainChannel
from libmesh.net.session import Session
from libmesh.peers import PeerId

log = logging.getLogger(__name__)

TURN_BYTES = 512 * 1024
"""Bytes that are received before other tasks have a turn."""

SHORT_PATH = 0.001
"""Seconds of round trip below which the kernel's receive buffer is kept small; see `pipes.SHORT_BUFFER_BYTES`."""

CLOSE_TIME = 0.5
"""Seconds that `close` waits for what is queued to leave."""

Serve = Callable[[YamuxStream], None]
"""Takes over an inbound stream at once, with what has arrived on it. Must not block or raise."""


class YamuxConnection(IMuxedConn):
    """A connection to one peer and its streams, for `muxer_opt["/yamux/1.0.0"]`.

    Args:
        conn: the secure channel.
        peer_id: the peer, as authenticated by it.
        options: bounds and times.
        serve: gets each stream that the peer opens; what it does not want it gives to `hand_over`. Without it, all wait
            for `accept_stream`. The swarm's way to a handler, through its resource manager, notifees and two tasks, costs
            as much as all the rest of a short request.

    Attributes:
        peer_id: the peer, as authenticated by the secure channel.
        peer: the same, as text.
        secured_conn: the secure channel. Owned.
        nameless: inbound streams that have not named a protocol; counted by whoever serves them.
        on_close: awaited once, when the connection is over, however that came. Set by the swarm.
    """

    def __init__(
        self, conn: ISecureConn, peer_id: ID, options: Options | None = None, serve: Serve | None = None
    ) -> None:
        self.peer_id = peer_id
        self.peer = PeerId(str(peer_id))
        self.secured_conn = conn
        self.on_close: Callable[[], Awaitable[Any]] | None = None
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self._machine = Yamux(initiator=conn.is_initiator, now=trio.current_time(), options=options)
        self._channel: Channel = conn.channel if isinstance(conn, Session) else PlainChannel(conn)
        self._channel.heard = lambda: self._machine.alive(trio.current_time())
        self._streams: dict[int, YamuxStream] = {}
        self._serve = serve
        self.nameless = 0
        self._fresh: list[YamuxStream] = []  # opened by the peer just now
        self._held: dict[YamuxStream, Pieces] = {}  # what came in the read that is being handled
        self._inbound: deque[YamuxStream] = deque()
        self._acceptable = trio.lowlevel.ParkingLot()
        self._openable = trio.lowlevel.ParkingLot()
        self._over: str | None = None
        self._scope = trio.CancelScope()
        self._outbound = Outbound(self._machine, self._channel, self._fail)

    # ---- what py-libp2p and the adapter ask -------------------------------------------------------------------

    @property
    def is_initiator(self) -> bool:
        """Whether this side dialled."""
        return self.secured_conn.is_initiator

    @property
    def is_established(self) -> bool:
        """Whether streams can be opened."""
        return self.event_started.is_set() and self._over is None

    @property
    def is_closed(self) -> bool:
        """Whether the connection is over."""
        return self._over is not None

    @property
    def rtt(self) -> float | None:
        """Smoothed round-trip time in seconds, `None` until measured."""
        return self._machine.rtt

    @property
    def heard_at(self) -> float:
        """When the last sign of life came from the peer."""
        return self._machine.keepalive.heard_at

    @property
    def batches(self) -> int:
        """How often anything has been sent."""
        return self._outbound.batches

    @property
    def unacknowledged(self) -> int:
        """Streams opened here that the peer has not answered yet."""
        return self._machine.table.unacknowledged

    @property
    def streams(self) -> tuple[YamuxStream, ...]:
        """Those that are open."""
        return tuple(self._streams.values())

    @property
    def stream_count(self) -> int:
        """Streams that are known here, those included that wait for the peer to finish."""
        return len(self._machine.table.states)

    def check(self) -> None:
        """Ask the peer for a sign of life now."""
        if self._over is None:
            now = trio.current_time()
            self._machine.keepalive.check(now)
            self._handle(self._machine.tick(now))
            self._outbound.flush_soon()

    def give_up(self, reason: str) -> None:
        """End the connection without a word to the peer; its streams see `StreamReset`. Harmless to repeat."""
        self._fail(reason)

    def get_transport_addresses(self) -> list[Multiaddr]:
        """The addresses of the connection itself."""
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        """Direct or relayed."""
        return self.secured_conn.get_connection_type()

    def get_remote_address(self) -> tuple[str, int] | None:
        """The peer's address, if the connection has one."""
        return self.secured_conn.get_remote_address()

    async def open_stream(self, *, silent: bool = False) -> YamuxStream:
        """Open a stream. Costs no round trip; SYN travels with the first data, or alone a moment later.

        With `silent`, SYN may wait longer. This waits only while 256 streams are unacknowledged; what is sent next lets
        other tasks run. If cancelled, none was opened. Raises `MuxedConnUnavailable`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self._over is not None or self._machine.closing:
                raise MuxedConnUnavailable(self._over or "the peer takes no more streams")
            stream_id = self._machine.open(trio.current_time())
            if stream_id is not None:
                break
            await self._openable.park()
        stream = self._streams[stream_id] = YamuxStream(self, stream_id, self._outbound)
        self._outbound.flush_later(COMPANY_TIME if silent else SYN_TIME)
        return stream

    async def accept_stream(self) -> YamuxStream:
        """The next stream that the peer opened. Raises `MuxedConnUnavailable` when the connection is over."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._inbound:
            if self._over is not None:
                raise MuxedConnUnavailable(self._over)
            await self._acceptable.park()
        stream = self._inbound.popleft()
        self._machine.accept(stream.stream_id)
        self._outbound.flush_soon()
        await trio.lowlevel.cancel_shielded_checkpoint()
        return stream

    async def close(self) -> None:
        """Say goodbye and close. Streams that are open see `StreamReset` on both sides. Harmless to repeat."""
        if self.is_established:
            self._machine.shutdown()
            with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_TIME):
                await self._outbound.drain()
        self._fail("the connection was closed here")
        with trio.CancelScope(shield=True):
            await self._close_channel()
            if self.event_started.is_set():
                await self.event_closed.wait()
        self.event_closed.set()

    async def _close_channel(self) -> None:
        try:
            await self._channel.aclose()
        except StreamReset as exc:
            log.debug("closing the connection to %s: %s", self.peer_id, exc)

    # ---- the tasks --------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Run the connection until it is over. Never raises for what the network does."""
        if self.event_started.is_set():
            return
        self.event_started.set()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._outbound.run)
                    nursery.start_soon(self._outbound.run_late)
                    nursery.start_soon(self._keep_time)
                    nursery.start_soon(self._receive_loop)
        except* Exception:
            # A mistake of ours is to cost this connection only, not the host. It may come with a cancellation.
            log.exception("the connection to %s failed", self.peer_id)
        finally:
            self._fail("the connection was closed here")
            with trio.CancelScope(shield=True):
                await self._close_channel()
            self.event_closed.set()
        if self.on_close is not None:
            await self.on_close()

    async def _receive_loop(self) -> None:
        machine, receive = self._machine, self._channel.receive
        taken, shortened = 0, False
        reason = "the peer closed the connection"
        # First, what came behind the muxer's negotiation: a stream of the peer's, maybe, which waits for our answer.
        first = self.secured_conn.take_unread() if isinstance(self.secured_conn, Session) else b""
        records: Sequence[bytes | memoryview] = [first]
        try:
            while records or (records := await receive()):
                if self._over is not None:
                    return  # it ended while this was under way, and its streams are gone
                now = trio.current_time()
                alone = len(records) == 1
                for record in records:
                    self._handle(machine.receive(record, now), alone=alone)
                    taken += len(record)
                if self._held:
                    self._deliver_held()
                if machine.broken is not None:
                    return
                if machine.has_control:
                    self._outbound.flush_soon()
                if self._fresh:
                    self._serve_fresh()
                if not shortened and (machine.least_rtt or SHORT_PATH) < SHORT_PATH:
                    shortened = True
                    self._channel.shorten()
                if taken >= TURN_BYTES:
                    taken = 0
                    await trio.lowlevel.checkpoint()
                records = []
        except StreamReset as exc:
            reason = str(exc)
        self._fail(reason)

    async def _keep_time(self) -> None:
        while self._over is None:
            await trio.sleep_until(self._machine.deadline())
            if self._over is not None:
                return
            self._handle(self._machine.tick(trio.current_time()))
            self._outbound.flush_soon()

    # ---- events -----------------------------------------------------------------------------------------------

    def _handle(self, events: list[Event], *, alone: bool = False) -> None:
        streams, alone = self._streams, alone and len(events) == 1
        for event in events:
            if type(event) is Data:  # nearly all are, and a pattern costs three times as much
                streams[event.stream].arrive(event.data, None if alone else self._held)
                continue
            match event:
                case Writable(stream_id):
                    self._outbound.window_opened(streams[stream_id])
                case Opened(stream_id):
                    stream = streams[stream_id] = YamuxStream(self, stream_id, self._outbound)
                    if self._serve is not None:
                        self._fresh.append(stream)
                    else:
                        self.hand_over(stream)
                case Finished(stream_id):
                    stream = streams[stream_id]
                    stream.peer_finished()
                    if stream.both_finished:
                        del streams[stream_id]
                case Reset(stream_id, reason):
                    self._stream_was_reset(stream_id, reason)
                case OpenAllowed():
                    self._openable.unpark_all()
                case GoneAway(code):
                    log.debug("%s goes away, code %d", self.peer_id, code)
                    self._openable.unpark_all()
                case Broken(reason):
                    self._outbound.pump()
                    self._fail(reason)
                    return

    def _deliver_held(self) -> None:
        """Give what one read brought to the pumps that wait for it: to each in one piece, for one system call."""
        held, self._held = self._held, {}
        for stream, pieces in held.items():
            stream.deliver_all(pieces)

    def _serve_fresh(self) -> None:
        """Give the streams that have just come, and what came on them, to whom they are for."""
        fresh, self._fresh = self._fresh, []
        for stream in fresh:
            if self._serve is not None and not stream.is_closed:
                self._machine.accept(stream.stream_id)
                self._serve(stream)
        self._outbound.flush_later()

    def hand_over(self, stream: YamuxStream) -> None:
        """Let `accept_stream` return `stream`."""
        self._inbound.append(stream)
        self._acceptable.unpark()

    def _stream_was_reset(self, stream_id: int, reason: str) -> None:
        stream = self._streams.pop(stream_id)
        stream.peer_reset(reason)
        if stream in self._inbound or stream in self._fresh:
            waiting = self._fresh if stream in self._fresh else self._inbound
            waiting.remove(stream)
            self.consumed(stream_id, stream.unread)

    def _fail(self, reason: str) -> None:
        if self._over is not None:
            return
        self._over = reason
        for stream in self._streams.values():
            stream.peer_reset(reason)
        self._streams.clear()
        self._inbound.clear()
        self._outbound.stop()
        self._acceptable.unpark_all()
        self._openable.unpark_all()
        self._scope.cancel()

    # ---- what streams ask -------------------------------------------------------------------------------------

    def consumed(self, stream_id: int, count: int) -> None:
        """`count` received bytes were read or dropped."""
        if count and self._machine.consumed(stream_id, count, trio.current_time()):
            self._outbound.flush_soon()

    def finish(self, stream: YamuxStream, *, released: bool = False) -> None:
        """Send FIN behind the stream's data. With `released`, reset the stream if the peer never finishes."""
        if self._streams.get(stream.stream_id) is not stream:
            return  # it is over, and the peer may have used its number again
        linger_from = trio.current_time() if released else None
        self._outbound.append(self._machine.finish(stream.stream_id, linger_from=linger_from))
        if stream.both_finished:
            del self._streams[stream.stream_id]
            self._openable.unpark_all()
        self._outbound.end(stream)

    def abandon(self, stream: YamuxStream, unread: int) -> None:
        """The stream was closed here, with `unread` bytes in it."""
        if self._forget(stream):
            now = trio.current_time()
            self._outbound.append(self._machine.abandon(stream.stream_id, unread=unread > 0, now=now))
        self.consumed(stream.stream_id, unread)

    def reset_stream(self, stream: YamuxStream, unread: int) -> None:
        """The stream was reset here, with `unread` bytes in it."""
        if self._forget(stream):
            self._machine.reset(stream.stream_id)
        self.consumed(stream.stream_id, unread)

    def _forget(self, stream: YamuxStream) -> bool:
        """Whether it was there; a peer may use its number again after it is over."""
        if there := self._streams.get(stream.stream_id) is stream:
            del self._streams[stream.stream_id]
            self._openable.unpark_all()
            self._outbound.flush_soon()
        return there
