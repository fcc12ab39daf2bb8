"""py-libp2p's gossipsub, configured to behave and closed to strangers.

What its defaults do that we cannot live with (measured on 0.8.1): the heartbeat is 120 s; over 10 messages a second
are dropped, our own included; message numbers restart at the current second, so that after a restart they repeat;
a raising validator ends the service; a peer that unsubscribed from nothing yet is told all our topics at once. So:
a heartbeat of 1 s, no rate limit (only members get in), numbers from nanoseconds, no validators (what a message says
is checked above), and a peer is handed to gossipsub only when it was admitted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import trio
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb.rpc_pb2 import RPC
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.pubsub_notifee import PubsubNotifee
from libp2p.tools.anyio_service import background_trio_service

from libmesh.net.seen import SeenMessages

log = logging.getLogger(__name__)

PROTOCOLS = ("/meshsub/1.2.0", "/meshsub/1.1.0")

DEGREE, DEGREE_LOW, DEGREE_HIGH = 8, 6, 64
"""Mesh links per topic. The high mark is far up because py-libp2p's pruning above it tells the pruned peer nothing
and leaves it without messages; the full mesh of a few dozen members stays below it."""

WORTH_DECLINING_BYTES = 1024
"""Size from which others are told not to send a message that has come (IDONTWANT). go-libp2p's threshold is the same."""

Deliver = Callable[[str, ID, bytes], None]


class _SturdyPubsub(Pubsub):
    """One bad message is one message lost.

    py-libp2p takes in each message in a task of the service; what its check of the key and the signature raises for
    bytes that are none would end the service, and with it the host: one message of one guest, every peer.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._beginning: set[ID] = set()

    async def push_msg(self, msg_forwarder: ID, msg: Any) -> None:
        """As py-libp2p's own, but raises nothing because of what the message says."""
        try:
            await super().push_msg(msg_forwarder, msg)
        except Exception as exc:  # noqa: BLE001 - the boundary named above
            log.debug("ignored a message that the peer %s passed on: %r", msg_forwarder, exc)

    async def _handle_new_peer(self, peer_id: ID) -> None:
        """Open gossip's stream to a peer; once, and not over a connection that has ended meanwhile.

        py-libp2p's own looks whether there is one, and then waits. Two that begin at once leave the first one's queue,
        tasks and stream behind for ever; one whose peer goes while it waits is told of too late to be cleaned up, and
        keeps the next connection from being used.
        """
        if peer_id in self._beginning:
            return  # if that one fails, it tries again
        self._beginning.add(peer_id)
        try:
            await super()._handle_new_peer(peer_id)
        finally:
            self._beginning.discard(peer_id)
        stream: Any = self.peers.get(peer_id)
        if stream is not None and stream.muxed_conn.is_closed:
            self._handle_dead_peer(peer_id)


class _Router(GossipSub):
    """Nothing is published to nobody while somebody listens.

    py-libp2p sends to linked peers only, and a peer whose subscription comes in before our own stream to it is open is
    linked by the next heartbeat: what is said in that second, such as the goodbye of somebody who came for a moment,
    reaches none. Until a topic has its links, any peers subscribed to it take their place; the specification (gossipsub
    v1.1, flood publishing) has one's own messages go to all of them.

    And what py-libp2p sends beside each message to every linked peer is left out: its own signed addresses, which others
    have from identify and from announcements, and word of each small message that has come. In a mesh of thirty that
    was most of what a join costs everybody.
    """

    async def emit_control_message(self, control_msg: Any, to_peer: ID) -> None:
        """As py-libp2p's own, which begins with finding out all addresses."""
        self.send_rpc(to_peer, RPC(control=control_msg), priority=True)

    def send_rpc(self, peer_id: ID, rpc: Any, priority: bool = False) -> None:
        """As py-libp2p's own, without the record that whoever reads it verifies the signature of."""
        rpc.ClearField("senderRecord")
        super().send_rpc(peer_id, rpc, priority)

    async def _emit_idontwant_for_message(self, msg_id: bytes, topic_ids: Iterable[str]) -> None:
        message = self.mcache.get(msg_id)
        if message is None or len(message.data) >= WORTH_DECLINING_BYTES:
            await super()._emit_idontwant_for_message(msg_id, topic_ids)

    def _get_peers_to_send(
        self, topic_ids: Iterable[str], msg_forwarder: ID, origin: ID, msg_id: bytes | None = None
    ) -> Iterable[ID]:
        chosen = set(super()._get_peers_to_send(topic_ids, msg_forwarder, origin, msg_id))
        for topic in topic_ids:
            linked = self.mesh.get(topic, set())
            if len(linked) < DEGREE_LOW and self.pubsub is not None and topic in self.pubsub.peer_topics:
                missing = DEGREE - len(linked)
                chosen.update(self._get_in_topic_gossipsub_peers_from_minus(topic, missing, linked))
        return chosen - {msg_forwarder, origin}


class Gossip:
    """Publish and subscribe among admitted peers. Made by `open_gossip`."""

    def __init__(self, host: BasicHost, deliver: Deliver) -> None:
        router = _Router(
            protocols=[TProtocol(protocol) for protocol in PROTOCOLS],
            degree=DEGREE,
            degree_low=DEGREE_LOW,
            degree_high=DEGREE_HIGH,
            heartbeat_interval=1,
            do_px=False,
            spam_protection_enabled=False,
        )
        self._pubsub = _SturdyPubsub(host, router, strict_signing=True)
        self._pubsub.counter = time.time_ns()
        self._pubsub.seen_messages.stop()
        self._pubsub.seen_messages = cast(Any, SeenMessages())
        self._router = router
        self._deliver = deliver
        self._host = host
        self._topics: set[str] = set()
        self._tasks: trio.Nursery | None = None
        # Pubsub registered itself for every connection; we tell it of the admitted ones instead.
        network: Any = host.get_network()
        notifees = network.notifees
        self._notifee = next(n for n in notifees if isinstance(n, PubsubNotifee))
        notifees.remove(self._notifee)

    async def admitted(self, connection: Any) -> None:
        """Let gossip with the peer of `connection` begin."""
        await self._notifee.connected(self._host.get_network(), connection)

    def carries(self, stream: Any) -> bool:
        """Whether gossip goes over this stream of a muxer."""
        ours = (getattr(opened, "muxed_stream", None) for opened in self._pubsub.peers.values())
        return stream.protocol in PROTOCOLS or any(stream is own for own in ours)

    async def moved(self, peer: ID, best: Any) -> None:
        """Go on with `peer` over the connection `best`, which replaced the one that was used so far.

        What the peer has subscribed to stays known; `_handle_dead_peer` would forget it.
        """
        pubsub = self._pubsub
        stream: Any = pubsub.peers.get(peer)
        if stream is None or stream.muxed_conn is best.muxed_conn:
            return
        del pubsub.peers[peer]
        if (queue := pubsub.peer_queues.pop(peer, None)) is not None:
            queue.close()
        await self.admitted(best)
        with suppress(Exception):  # its connection may be gone, whatever py-libp2p says of that
            await stream.close()

    async def gone(self, connection: Any) -> None:
        """Tell that `connection` ended."""
        await self._notifee.disconnected(self._host.get_network(), connection)

    async def subscribe(self, topic: str) -> None:
        """Deliver the messages of `topic` from now on."""
        if topic in self._topics or self._tasks is None:
            return
        self._topics.add(topic)
        subscription = await self._pubsub.subscribe(topic)
        self._tasks.start_soon(self._read, topic, subscription)

    async def publish(self, topic: str, data: bytes) -> None:
        """Publish to whoever is reached."""
        await self._pubsub.publish(topic, data)

    async def _read(self, topic: str, subscription: Any) -> None:
        me = self._host.get_id()
        while True:
            message = await subscription.get()
            origin = ID(message.from_id)
            if origin != me:
                self._deliver(topic, origin, message.data)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the service for as long as the context lasts."""
        async with (
            background_trio_service(self._pubsub),
            background_trio_service(self._router),
            trio.open_nursery() as nursery,
        ):
            await self._pubsub.wait_until_ready()
            self._tasks = nursery
            try:
                yield
            finally:
                self._tasks = None
                nursery.cancel_scope.cancel()
