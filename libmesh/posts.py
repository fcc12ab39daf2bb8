"""Applications' own messages to everybody: topics over one gossip topic of the mesh.

All of a mesh's application messages share one gossipsub topic, which every peer subscribes to before its first
connection. A gossipsub subscription made later is lost now and then (see `net/gossip.py`), and this way a new
`subscribe` costs nothing and works at once. The price is that members also carry what they do not want.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from libmesh import wire
from libmesh.net.base import Network
from libmesh.peers import MeshId, PeerId
from libmesh.wire_pieces import WireError, valid_service_name

log = logging.getLogger(__name__)

BACKLOG = 256
"""Messages held for one subscriber that does not read; then the oldest are dropped."""


@dataclass(frozen=True, slots=True)
class Post:
    """A message of another member. `author` signed it."""

    author: PeerId
    topic: str
    data: bytes


def check_topic(topic: str) -> None:
    """Raise `ValueError` for what is no topic of posts."""
    if not valid_service_name(topic):
        raise ValueError(f"{topic!r} is no topic: 1 to 255 bytes, without control characters")


class Posts:
    """Publishes and delivers the posts of one mesh.

    Args:
        network: the transport.
        mesh_id: names the gossip topic.
        is_member: whether a peer is known as a live member; others are not listened to.
    """

    def __init__(self, network: Network, mesh_id: MeshId, is_member: Callable[[PeerId], bool]) -> None:
        self._network, self._is_member = network, is_member
        self.gossip_topic = f"libmesh/1/{mesh_id}/app"
        self._subscribers: dict[
            trio.MemorySendChannel[Post], tuple[str, trio.MemoryReceiveChannel[Post]]
        ] = {}

    async def publish(self, topic: str, data: bytes) -> None:
        """See `Mesh.publish`."""
        await self._network.publish(self.gossip_topic, wire.encode_post(topic, data))

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncIterator[trio.MemoryReceiveChannel[Post]]:
        """See `Mesh.subscribe`."""
        send, receive = trio.open_memory_channel[Post](BACKLOG)
        self._subscribers[send] = (topic, receive)
        try:
            async with receive:
                yield receive
        finally:
            self._subscribers.pop(send, None)
            send.close()

    def close(self) -> None:
        """Nothing comes any more: subscribers read what there is, and then the end."""
        while self._subscribers:
            self._subscribers.popitem()[0].close()

    def deliver(self, author: PeerId, data: bytes) -> None:
        """Hand a message from gossip to whoever subscribes to its topic."""
        try:
            topic, content = wire.decode_post(data)
        except WireError as exc:
            log.debug("ignored a malformed post of %s: %s", author, exc)
            return
        if not self._is_member(author):
            log.debug("ignored a post of %s, who is no live member", author)
            return
        for send, (wanted, receive) in self._subscribers.items():
            if wanted == topic:
                _put(send, receive, Post(author, topic, content))


def _put(send: trio.MemorySendChannel[Post], receive: trio.MemoryReceiveChannel[Post], post: Post) -> None:
    try:
        send.send_nowait(post)
    except trio.WouldBlock:
        receive.receive_nowait()
        send.send_nowait(post)
    except trio.BrokenResourceError:
        log.debug("a subscriber has gone")
