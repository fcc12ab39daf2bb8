"""Tunnels that outlive their connections: who asks for what was lost, and who tells what has arrived.

The protocol is in mesh.proto (`Progress`), the books of one end in `net.journal`. The opener of a tunnel gets it going
again; the other end waits for that, with its own socket open, for as long as both are configured to.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from libmesh import resume_wire, wire
from libmesh.errors import MeshError, NetworkError, PeerUnreachable, ServiceRefused
from libmesh.framing import frame, receive_frame
from libmesh.lasting import LastingStream
from libmesh.net.base import Network, Stream
from libmesh.net.journal import Journal, Lifeline
from libmesh.peers import PeerId
from libmesh.resume_wire import Progress
from libmesh.wire_pieces import WireError

log = logging.getLogger(__name__)

RESUME_PROTOCOL = "/libmesh/tunnel-resume/1.0.0"
ACKS_PROTOCOL = "/libmesh/tunnel-acks/1.0.0"

MAX_TUNNELS = 128
"""Tunnels of one node that can be resumed, each with up to 4 MiB kept. Further ones are carried like any, and end with
their connection."""

ANSWER_LIMIT = 5.0
"""Seconds that the other end may take to go on with a tunnel, or to name the one that it wants."""

GONE_AFTER = 1.0
"""Seconds for which a peer's machine says at all of its addresses that nobody listens, until we believe that the process has
ended, and its tunnels with it. A router that restarts may say so for a moment."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
_REFUSED = os.strerror(errno.ECONNREFUSED).lower()

_LOST = (MeshError, trio.BrokenResourceError, trio.ClosedResourceError, WireError)

Connect = Callable[[PeerId], Awaitable[None]]


@dataclass(slots=True)
class _Teller:
    """What one peer has still to be told: of each tunnel the newest only, so it is bounded by their number."""

    owed: dict[bytes, Progress] = field(default_factory=dict)
    changed: trio.Event = field(default_factory=trio.Event)
    stream: Stream | None = None  # on which it can be told at once, while nothing is being sent


class Resumption:
    """All resumable tunnels of one node.

    Args:
        network: the transport.
        connect: makes sure that there is a connection to a peer that takes us for a member.
        limit: seconds for which a tunnel waits to go on; 0 to let every tunnel end with its connection.
    """

    def __init__(self, network: Network, connect: Connect, limit: float) -> None:
        self.network, self.connect, self.limit = network, connect, limit
        self.tunnels: dict[tuple[PeerId, bytes], Tunnel] = {}
        self._tellers: dict[PeerId, _Teller] = {}
        self._tasks: trio.Nursery | None = None

    def near(self, peer: PeerId) -> NearTunnel | None:
        """The lifeline of a tunnel that is being opened to `peer`; `None` if it shall not be resumed.

        It has begun, so that its place is taken while the peer is asked; whoever gives up has to `end` it.
        """
        path = self.network.path(peer)
        if path is None or path.address.startswith(("/ip4/127.", "/ip6/::1/")):
            return None  # within one machine a connection is lost when a process is
        if not self._room():
            return None
        tunnel = NearTunnel(self, peer, os.urandom(resume_wire.SESSION_BYTES))
        tunnel.begin()
        return tunnel

    def far(self, peer: PeerId, session: bytes | None) -> FarTunnel | None:
        """The lifeline of a tunnel that `peer` opens; `None` if it shall not be resumed."""
        if session is None or not self._room() or (peer, session) in self.tunnels:
            return None
        return FarTunnel(self, peer, session)

    def lasting(self, stream: Stream, lifeline: Tunnel) -> LastingStream:
        """`stream`, so that it outlives its connection; while `run` does."""
        assert self._tasks is not None
        return LastingStream(stream, lifeline, self._tasks)

    def peer_left(self, peer: PeerId) -> None:
        """`peer` said goodbye: nobody there knows its tunnels any more."""
        for tunnel in self._with(peer):
            tunnel.forsake()

    def _room(self) -> bool:
        return self.limit > 0 and self._tasks is not None and len(self.tunnels) < MAX_TUNNELS

    # ── what the other end has ───────────────────────────────────────────────────────────────────────────────────

    def tell(self, peer: PeerId, progress: Progress) -> None:
        """Tell `peer` how far a tunnel with it has got: with what leaves next, once there is a stream for that."""
        if self._tasks is None:
            return
        if (teller := self._tellers.get(peer)) is None:
            teller = self._tellers[peer] = _Teller()
            self._tasks.start_soon(self._tell_until_over, peer, teller)
        stream = teller.stream
        if stream is None or stream.connection_lost or teller.owed or not stream.post(_line(progress)):
            teller.owed[progress.session] = progress
            teller.changed.set()

    async def _tell_until_over(self, peer: PeerId, teller: _Teller) -> None:
        try:
            while teller.owed or self._with(peer):
                with suppress(*_LOST):
                    async with await self.network.open_stream(peer, ACKS_PROTOCOL) as stream:
                        await self._tell_over(peer, teller, stream)
                if not self._with(peer):
                    break
                await trio.sleep(_FIRST_PAUSE)
        finally:
            del self._tellers[peer]

    def _with(self, peer: PeerId) -> list[Tunnel]:
        return [tunnel for (other, _), tunnel in self.tunnels.items() if other == peer]

    async def _tell_over(self, peer: PeerId, teller: _Teller, stream: Stream) -> None:
        """Tell on one stream, until there is nothing more to be told on it or its connection is lost."""
        for tunnel in self._with(peer):  # what was told on an earlier stream may be lost
            teller.owed.setdefault(tunnel.session, tunnel.progress())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_at_end, stream, nursery.cancel_scope)
            while teller.owed or self._with(peer):
                teller.changed, teller.stream = trio.Event(), None
                lines, teller.owed = teller.owed, {}
                try:
                    await stream.send_all(b"".join(map(_line, lines.values())))
                except BaseException as exc:  # also if cancelled: of a tunnel that is over nobody tells again
                    teller.owed = {**lines, **teller.owed}
                    if not isinstance(exc, _LOST):
                        raise
                    break
                teller.stream = stream
                with trio.move_on_after(self.limit):
                    await teller.changed.wait()
            nursery.cancel_scope.cancel()
        teller.stream = None

    async def answer_acks(self, stream: Stream) -> None:
        """Serve `/libmesh/tunnel-acks`."""
        try:
            while True:
                progress = resume_wire.decode_progress(await receive_frame(stream, wire.MAX_OPEN))
                if (tunnel := self.tunnels.get((stream.peer, progress.session))) is not None:
                    tunnel.journal.acknowledge(progress.received, progress.ended)
        except (WireError, ValueError, trio.BrokenResourceError) as exc:
            log.debug("no more news of tunnels from %s: %s", stream.peer, exc)
            stream.reset()

    # ── going on ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def answer_resume(self, stream: Stream) -> None:
        """Serve `/libmesh/tunnel-resume`: hand the stream to the tunnel that it names."""
        try:
            with trio.fail_after(ANSWER_LIMIT):
                progress = resume_wire.decode_progress(await receive_frame(stream, wire.MAX_OPEN))
            tunnel = self.tunnels.get((stream.peer, progress.session))
            if isinstance(tunnel, FarTunnel) and tunnel.takes(progress):
                await tunnel.hand_over(stream)
                return
            await stream.send_all(frame(resume_wire.encode_resumed("unknown", 0, False)))
            await stream.aclose()
        except (WireError, trio.TooSlowError, trio.BrokenResourceError) as exc:
            log.debug("the peer %s resumed no tunnel: %s", stream.peer, str(exc) or "too slow")
            stream.reset()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve tunnels until cancelled."""
        self.network.set_handler(RESUME_PROTOCOL, self.answer_resume)
        self.network.set_handler(ACKS_PROTOCOL, self.answer_acks)
        async with trio.open_nursery() as nursery:
            self._tasks = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._tasks = None


def _line(progress: Progress) -> bytes:
    return frame(resume_wire.encode_progress(progress))


async def _cancel_at_end(stream: Stream, scope: trio.CancelScope) -> None:
    with suppress(*_LOST):
        await stream.receive_some()
    scope.cancel()


class Tunnel(Lifeline):
    """One end of one tunnel."""

    def __init__(self, all_of_them: Resumption, peer: PeerId, session: bytes) -> None:
        super().__init__()
        self._all, self.peer, self.session = all_of_them, peer, session
        self._forsaken = False
        self._patience = trio.CancelScope()

    def begin(self) -> None:
        """See `Lifeline.begin`: it can be found."""
        self._all.tunnels[self.peer, self.session] = self

    def end(self) -> None:
        """See `Lifeline.end`."""
        if self._all.tunnels.get((self.peer, self.session)) is self:
            del self._all.tunnels[self.peer, self.session]

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *_: object) -> None:
        self.end()

    def forsake(self) -> None:
        """The peer has left: do not wait for it, now or later."""
        self._forsaken = True
        self._patience.cancel()

    def _wait(self) -> trio.CancelScope:
        """For as long as is waited for another stream."""
        self._patience = trio.move_on_after(0.0 if self._forsaken else self._all.limit)
        return self._patience

    def _given_up(self, why: str) -> NetworkError:
        if self._forsaken:
            return NetworkError(f"the peer {self.peer} has left the mesh")
        return NetworkError(f"{why} within {self._all.limit:g} s")

    def progress(self) -> Progress:
        """What this end has."""
        return Progress(self.session, self.journal.received, self.journal.received_end)

    def tell(self) -> None:
        """See `Lifeline.tell`."""
        self._all.tell(self.peer, self.progress())

    async def finished(self, stream: Stream) -> bool:
        """See `Lifeline.finished`. After the limit nothing more can be done."""
        with trio.move_on_after(self._all.limit):
            while not self.journal.complete:
                if self.is_lost(stream):
                    return False
                with trio.move_on_after(_LONGEST_PAUSE):
                    await self.journal.wait_changed()
        return True


class NearTunnel(Tunnel):
    """The end that opened it."""

    opened = False
    """Whether the other end has agreed to the tunnel."""

    def agreed(self, *, resumable: bool) -> None:
        """The other end has taken the tunnel."""
        self.opened = True
        if not resumable:
            self.journal.give_up()

    async def again(self) -> Stream:
        """See `Lifeline.again`."""
        pause, refused_since = _FIRST_PAUSE, float("inf")
        with self._wait():
            while True:
                try:
                    with trio.fail_after(ANSWER_LIMIT):
                        await self._all.connect(self.peer)
                        return await self._ask()
                except ServiceRefused:
                    raise
                except (*_LOST, trio.TooSlowError) as exc:
                    log.debug("a tunnel to %s waits: %s", self.peer, str(exc) or "too slow")
                    if not _nobody_there(exc):
                        refused_since = float("inf")
                    elif refused_since == float("inf"):
                        refused_since = trio.current_time()
                    elif trio.current_time() >= refused_since + GONE_AFTER:
                        raise NetworkError(f"the peer {self.peer} has ended: {exc}") from exc
                await trio.sleep_until(min(trio.current_time() + pause, refused_since + GONE_AFTER))
                pause = min(2 * pause, _LONGEST_PAUSE)
        raise self._given_up(f"no way to the peer {self.peer} was found again")

    async def _ask(self) -> Stream:
        stream = await self._all.network.open_stream(self.peer, RESUME_PROTOCOL)
        try:
            await stream.send_all(_line(self.progress()))
            refusal, received, ended = resume_wire.decode_resumed(await receive_frame(stream, wire.MAX_OPEN))
            if refusal is not None:
                raise ServiceRefused(
                    f"the peer {self.peer} does not know the tunnel any more", reason=refusal
                )
            _acknowledge(self.journal, received, ended=ended)
        except BaseException:
            stream.reset()
            raise
        return stream


class FarTunnel(Tunnel):
    """The end that was opened to."""

    def __init__(self, all_of_them: Resumption, peer: PeerId, session: bytes) -> None:
        super().__init__(all_of_them, peer, session)
        self._stream: Stream | None = None
        self._next: tuple[Stream, trio.Event] | None = None
        self._offered = trio.Event()
        self._over: trio.Event | None = None  # of the stream in use, if it was handed over

    def carried_by(self, stream: Stream) -> None:
        """The stream that the tunnel began on."""
        self._stream = stream

    def takes(self, progress: Progress) -> bool:
        """Whether what the opener has still to get is there. If so, it is noted."""
        try:
            _acknowledge(self.journal, progress.received, ended=progress.ended)
        except NetworkError as exc:
            log.debug("the peer %s cannot resume a tunnel: %s", self.peer, exc)
            return False
        return self.journal.kept

    async def hand_over(self, stream: Stream) -> None:
        """Go on over `stream`, and return when it is done with. The old one is given up, dead or not."""
        over = trio.Event()
        if self._next is not None:
            self._next[1].set()
        self._next = stream, over
        self._offered.set()
        if self._stream is not None:
            self._stream.reset()
        await over.wait()

    def is_lost(self, stream: Stream) -> bool:
        """See `Lifeline.is_lost`; also if the opener has noticed first."""
        return super().is_lost(stream) or (self.journal.kept and self._next is not None)

    async def again(self) -> Stream:
        """See `Lifeline.again`."""
        with self._wait():
            while True:
                await self._offered.wait()
                if (stream := await self._agree()) is not None:
                    return stream
        raise self._given_up(f"the peer {self.peer} did not go on with a tunnel")

    async def _agree(self) -> Stream | None:
        """Take the stream that was offered; `None` if it is lost again."""
        assert self._next is not None
        if self._over is not None:
            self._over.set()
        (self._stream, self._over), self._next, self._offered = self._next, None, trio.Event()
        answer = resume_wire.encode_resumed(None, self.journal.received, self.journal.received_end)
        try:
            await self._stream.send_all(frame(answer))
        except _LOST:
            return None
        return self._stream

    def end(self) -> None:
        """See `Lifeline.end`; lets go of the streams that were handed over."""
        super().end()
        if self._over is not None:
            self._over.set()
        if self._next is not None:
            self._next[1].set()


def _acknowledge(journal: Journal, received: int, *, ended: bool) -> None:
    try:
        journal.acknowledge(received, ended)
        if received < journal.has:
            raise ValueError(f"the other end had {journal.has} bytes, and now has {received}")
    except ValueError as exc:
        raise NetworkError(str(exc)) from exc


def _nobody_there(exc: Exception) -> bool:
    """Whether the peer's machine answers at all addresses, and says that nobody listens."""
    return isinstance(exc, PeerUnreachable) and {*exc.attempts.values()} == {_REFUSED}
