"""Followers and those whom they follow: peers that only use a mesh cost its gossip nothing, however many there are.

A peer that follows announces nothing, so nobody's table, digest or gossip knows of it but those whom it connects to. It
has the same table as everybody, and comes by it by asking one or two of its neighbours to tell it the news: a stream of
the very messages that others hear by gossip. It believes them no more than gossip: records carry their signatures, and of
a suspicion it convinces itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from libmesh import wire
from libmesh.core.announcement import Record
from libmesh.core.credentials import Revocation
from libmesh.core.membership import Membership
from libmesh.core.membership_io import Suspicion
from libmesh.core.summary import Digest
from libmesh.errors import MeshError
from libmesh.framing import frame, receive_frame
from libmesh.net.base import Network, Stream
from libmesh.peers import PeerId, PeerState
from libmesh.wire_pieces import WireError

log = logging.getLogger(__name__)

PROTOCOL = "/libmesh/follow/1.0.0"

SOURCES = 2
"""How many a follower asks at once: one may be slow, or lie by saying nothing."""

GATHER = 0.1
"""Seconds for which news are gathered before they are told."""

OPENING_LIMIT = 10.0
"""Seconds that a follower has to say what it knows."""

REST = 5.0
"""Seconds before one is asked again that did not answer or stopped telling."""

PIECE = 256 * 1024
"""Bytes of news encoded at a time; the rest is when those are on their way."""

PROBE_INTERVAL = 15.0
SYNC_INTERVAL = 60.0
"""Seconds between a follower's probes, and between its comparisons: a hundred of them must not be what a peer does all day.
News come without that, the muxer's pings find dead connections, and doubts are looked into at once."""

_DOUBTED = (PeerState.SUSPECT, PeerState.DEAD)


@dataclass(slots=True)
class _Inbox:
    """What one follower is still to be told: never more than a line for each peer, so that a slow one skips."""

    cancel: trio.CancelScope
    peers: dict[PeerId, None] = field(default_factory=dict)
    revocations: dict[bytes, Revocation] = field(default_factory=dict)
    filled: trio.Event = field(default_factory=trio.Event)


class Herald:
    """Tells followers the news. One stream of a peer; a further one takes its place.

    Args:
        membership: asked for records and states.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._inboxes: dict[PeerId, _Inbox] = {}
        self._told: dict[PeerId, tuple[Record, bool]] = {}

    def notice(self, peer: PeerId) -> None:
        """Something may have changed about `peer`, or about this node."""
        record = self._membership.record_of(peer)
        if record is None:
            self._told.pop(peer, None)
            return
        now = (record, self._membership.state_of(peer) in _DOUBTED)
        if self._told.get(peer) != now:
            self._told[peer] = now
            for inbox in self._inboxes.values():
                inbox.peers[peer] = None
                inbox.filled.set()

    def revoked(self, revocation: Revocation) -> None:
        """A link was taken back."""
        for inbox in self._inboxes.values():
            inbox.revocations[revocation.link_id + revocation.signer_key] = revocation
            inbox.filled.set()

    async def answer(self, stream: Stream) -> None:
        """Serve a follower until it ends the stream, or breaks the rules."""
        with trio.CancelScope() as scope:
            try:
                with trio.fail_after(OPENING_LIMIT):
                    known = wire.decode_digest(await receive_frame(stream, wire.MAX_DIGEST))
                inbox = _Inbox(scope)
                self._fill(inbox, known)
                if (former := self._inboxes.get(stream.peer)) is not None:
                    former.cancel.cancel()
                self._inboxes[stream.peer] = inbox
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_until_it_ends, stream, scope)
                    while True:
                        await inbox.filled.wait()
                        await trio.sleep(GATHER)
                        await self._tell(stream, inbox)
            except* (WireError, trio.BrokenResourceError, trio.TooSlowError) as group:
                log.debug("the follower %s is told no more: %s", stream.peer, group.exceptions[0])
            finally:
                if (mine := self._inboxes.get(stream.peer)) is not None and mine.cancel is scope:
                    del self._inboxes[stream.peer]
        stream.reset()

    def _fill(self, inbox: _Inbox, known: Digest) -> None:
        """What somebody who knows this much lacks: records, doubts and revocations."""
        for record in self._membership.newer_than(known):
            inbox.peers[record.announcement.peer] = None
        for peer in known.ages.keys() - known.dead:
            if self._membership.state_of(peer) in _DOUBTED:
                inbox.peers[peer] = None
        for revocation in self._membership.revoked:
            inbox.revocations[revocation.link_id + revocation.signer_key] = revocation
        inbox.filled.set()

    async def _tell(self, stream: Stream, inbox: _Inbox) -> None:
        inbox.filled = trio.Event()
        while inbox.peers or inbox.revocations:
            piece = bytearray()
            while inbox.revocations and len(piece) < PIECE:
                _, revocation = inbox.revocations.popitem()
                piece += frame(wire.encode_gossip(revocation))
            while inbox.peers and len(piece) < PIECE:
                peer = next(iter(inbox.peers))
                del inbox.peers[peer]
                piece += self._news_of(peer)
            await stream.send_all(piece)

    def _news_of(self, peer: PeerId) -> bytes:
        record = self._membership.record_of(peer)
        if record is None:
            return b""
        doubt = Suspicion(peer, *record.announcement.age)
        doubted = self._membership.state_of(peer) in _DOUBTED
        return frame(wire.encode_gossip(doubt if doubted else record))


async def _until_it_ends(stream: Stream, scope: trio.CancelScope) -> None:
    """A follower that has said what it knows has nothing more to say: whatever comes is the end."""
    await stream.receive_some(1)
    scope.cancel()


class Following:
    """Follows some of those that this node is connected to.

    Args:
        network: the transport.
        membership: says who may be asked, and what is known.
        hear: takes a message as gossip brings it, and who told it.
    """

    def __init__(
        self, network: Network, membership: Membership, hear: Callable[[bytes, PeerId], None]
    ) -> None:
        self._network, self._membership, self._hear = network, membership, hear
        self._asked: set[PeerId] = set()
        self._changed = trio.Event()

    @property
    def sources(self) -> frozenset[PeerId]:
        """Those who are asked now, or were a moment ago."""
        return frozenset(self._asked)

    def update(self) -> None:
        """Somebody came or went."""
        self._changed.set()

    async def run(self) -> None:
        """Follow until cancelled, or until this node takes part itself."""
        async with trio.open_nursery() as nursery:
            while self._membership.following:
                connected = self._membership.watched[2] - self._asked
                best = sorted(connected, key=lambda peer: (not self._membership.wanted(peer), peer))
                for peer in best[: max(0, SOURCES - len(self._asked))]:
                    self._asked.add(peer)
                    nursery.start_soon(self._follow, peer)
                self._changed = trio.Event()
                await self._changed.wait()
            nursery.cancel_scope.cancel()

    async def _follow(self, peer: PeerId) -> None:
        try:
            async with await self._network.open_stream(peer, PROTOCOL) as stream:
                await stream.send_all(frame(wire.encode_digest(self._membership.digest())))
                while True:
                    self._hear(await receive_frame(stream, wire.MAX_RECORD), peer)
        except (MeshError, trio.BrokenResourceError) as exc:
            log.debug("%s tells no news: %s", peer, exc)
        await trio.sleep(REST)
        self._asked.discard(peer)
        self._changed.set()
