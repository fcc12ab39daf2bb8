"""Inbound streams: from the muxer to their handlers, in the call that received them where that is possible.

A stream whose opener named a protocol in the first packet, as ours do, costs one task: the handler's. What is py-libp2p's
own (identify, ping, gossip) goes on through the swarm. So does nothing else: its way there, through semaphore, resource
manager, notifees and two tasks, costs more than all the rest of a short request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any, Protocol

import trio
from libp2p.custom_types import TProtocol
from libp2p.stream_muxer.exceptions import MuxedStreamError

from libmesh.net.base import Stream, StreamHandler, StreamReset
from libmesh.net.muxed_stream import YamuxStream
from libmesh.net.negotiate import NEGOTIATION_TIME, Answerer, Libp2pStream
from libmesh.peers import PeerId

log = logging.getLogger(__name__)

MAX_NAMELESS = 256
"""Streams of one connection that have not named a protocol yet. More are reset. As many as yamux itself lets wait."""


class Admission(Protocol):
    """What is known of a peer.

    Attributes:
        admitted: set once it may open anything.
        waiting: how many of its streams are held until then.
    """

    admitted: trio.Event
    waiting: int


class StreamServer:
    """Answers proposals of protocols, holds strangers back, and runs handlers.

    Args:
        host_handlers: py-libp2p's own, by protocol; they take a stream of the swarm's.
        for_members: those of them that need admission.
        admission: of a connected peer.
        admission_limit: seconds that a stream of a stranger is held.
        max_waiting: streams of one stranger that are held; more are reset.

    Attributes:
        handlers: ours, each with whether it needs admission.
        tasks: where handlers run, `None` while nothing is served: then streams are reset.
    """

    def __init__(
        self,
        host_handlers: Callable[[], dict[Any, Any]],
        for_members: Collection[str],
        admission: Callable[[PeerId], Admission],
        *,
        admission_limit: float,
        max_waiting: int,
    ) -> None:
        self.handlers: dict[str, tuple[StreamHandler, bool]] = {}
        self.tasks: trio.Nursery | None = None
        self._host_handlers = host_handlers
        self._for_members = for_members
        self._admission = admission
        self._admission_limit = admission_limit
        self._max_waiting = max_waiting

    def take(self, muxed: YamuxStream) -> None:
        """See `muxer.Serve`: agree on a protocol, and start the handler or hand over to the swarm."""
        if self.tasks is None:
            muxed.reset_nowait()
            return
        answerer = Answerer(muxed, self._known)
        try:
            protocol = answerer.step()
        except (StreamReset, trio.ClosedResourceError) as exc:
            self._give_up(muxed, exc, answerer)
            return
        if protocol is None:
            self.tasks.start_soon(self._serve_later, muxed, answerer)
        else:
            self._serve(self.tasks, muxed, protocol)

    def _known(self, protocol: str) -> bool:
        return protocol in self.handlers or protocol in self._host_handlers()

    @staticmethod
    def _give_up(muxed: YamuxStream, why: object, answerer: Answerer | None = None) -> None:
        log.debug("a stream of %s failed: %s", muxed.muxed_conn.peer, why)
        if answerer is None:
            muxed.reset_nowait()
        else:
            answerer.give_up()

    async def _serve_later(self, muxed: YamuxStream, answerer: Answerer) -> None:
        connection = muxed.muxed_conn
        if connection.nameless >= MAX_NAMELESS:
            self._give_up(muxed, "too many streams that name no protocol")
            return
        protocol: str | None = None
        connection.nameless += 1
        try:
            with trio.move_on_after(NEGOTIATION_TIME):
                while (protocol := answerer.step()) is None:  # first, as more may have come since `take`
                    await muxed.wait_receivable()
        except (StreamReset, trio.ClosedResourceError) as exc:
            self._give_up(muxed, exc, answerer)
            return
        except BaseException:
            muxed.reset_nowait()
            raise
        finally:
            connection.nameless -= 1
        if protocol is None:
            self._give_up(muxed, f"no protocol was named within {NEGOTIATION_TIME} s")
        elif self.tasks is None:
            muxed.reset_nowait()
        else:
            self._serve(self.tasks, muxed, protocol)

    def _serve(self, tasks: trio.Nursery, muxed: YamuxStream, protocol: str) -> None:
        handler, for_members = self.handlers.get(protocol, (None, protocol in self._for_members))
        peer = muxed.muxed_conn.peer
        if for_members and not self._admission(peer).admitted.is_set():
            tasks.start_soon(self._serve_when_admitted, muxed, protocol, handler)
        elif handler is None:
            self._hand_over(muxed, protocol)
        else:
            tasks.start_soon(self._run, handler, Libp2pStream(muxed, peer, protocol, agreed=True))

    async def _serve_when_admitted(
        self, muxed: YamuxStream, protocol: str, handler: StreamHandler | None
    ) -> None:
        """Hold a stream that needs admission until that is decided: the hello may still be under way."""
        peer = muxed.muxed_conn.peer
        entry = self._admission(peer)
        if entry.waiting >= self._max_waiting:
            self._give_up(muxed, "too many streams before admission")
            return
        entry.waiting += 1
        try:
            with trio.move_on_after(self._admission_limit):
                await entry.admitted.wait()
        except BaseException:
            muxed.reset_nowait()
            raise
        finally:
            entry.waiting -= 1
        if not entry.admitted.is_set():
            self._give_up(muxed, "not admitted")
        elif handler is None:
            self._hand_over(muxed, protocol)
        else:
            await self._run(handler, Libp2pStream(muxed, peer, protocol, agreed=True))

    @staticmethod
    async def _run(handler: StreamHandler, stream: Stream) -> None:
        try:
            await handler(stream)
            await stream.aclose()
        except trio.BrokenResourceError as exc:
            log.debug("a stream of %s broke: %s", stream.protocol, exc)
            stream.reset()
        except Exception:  # a handler that fails is to cost its stream only
            log.exception("the handler of %s failed", stream.protocol)
            stream.reset()
        except BaseException:  # cancelled: what was sent is not all, and must not look as if it were
            stream.reset()
            raise

    @staticmethod
    def _hand_over(muxed: YamuxStream, protocol: str) -> None:
        muxed.protocol = protocol
        muxed.muxed_conn.hand_over(muxed)

    async def serve_handed_over(self, net_stream: Any) -> None:
        """For the swarm, whose handler of inbound streams this is: run py-libp2p's handler of the agreed protocol.

        Whatever left here would end the whole swarm.
        """
        try:
            protocol = TProtocol(net_stream.muxed_stream.protocol)
            net_stream.set_protocol(protocol)
            await self._host_handlers()[protocol](net_stream)
            if protocol in self._for_members:  # gossip: at its end nobody else would end our side
                net_stream.muxed_stream.reset_nowait()
        except Exception as exc:  # noqa: BLE001 - the boundary named above; a bad stream must not end the host
            log.debug("a stream of %s failed: %r", net_stream.muxed_conn.peer_id, exc)
            try:
                await net_stream.reset()
            except MuxedStreamError as again:
                log.debug("and could not be reset: %r", again)
