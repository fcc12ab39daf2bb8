"""Anti-entropy: two peers compare what they know, and tell each other what the other lacks. Repairs what gossip lost.

The rules are in `mesh.proto`: fingerprints first, then a digest of what differs, then its records.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

import trio

from libmesh import wire
from libmesh.core import membership_io as io
from libmesh.core.membership import Membership
from libmesh.core.summary import Part
from libmesh.errors import MeshError, ServiceRefused
from libmesh.framing import frame, receive_frame
from libmesh.hello import Tell
from libmesh.net.base import Network, Stream
from libmesh.peers import PeerId
from libmesh.wire_pieces import WireError

log = logging.getLogger(__name__)

PROTOCOL = "/libmesh/sync/1.0.0"

COMPARE_PROTOCOL = "/libmesh/compare/1.0.0"

LIMIT = 10.0
"""Seconds that a comparison may take, both conversations of it."""


HURRY = 1.0
"""Seconds until the next comparison after one that found a difference, doubling as long as they do: gossip lost more than
one message, or a partition has just healed."""


class Lie(WireError):
    """A peer told what nobody can have believed in good faith."""


class Syncing:
    """Compares, and answers those who compare.

    Args:
        network: the transport.
        membership: asked for summaries, digests and records.
        tell: passes an event to the membership machine.
    """

    def __init__(self, network: Network, membership: Membership, tell: Tell) -> None:
        self._network, self._membership, self._tell = network, membership, tell

    async def compare(self, peer: PeerId) -> bool:
        """Find out what `peer` and this node know apart, and tell each other; whether there was something.

        Whatever goes wrong is left to the next one.
        """
        try:
            with trio.fail_after(LIMIT):
                part = await self._difference(peer)
                if differed := part is None or bool(part.buckets) or part.revocations:
                    async with await self._network.open_stream(peer, PROTOCOL) as stream:
                        await self._exchange(stream, opener=True, part=part)
                return differed and part is not None
        except (MeshError, trio.BrokenResourceError, trio.TooSlowError) as exc:
            log.debug("no digest exchange with %s: %s", peer, str(exc) or "too slow")
        return False

    async def _difference(self, peer: PeerId) -> Part | None:
        """The part in which the two differ; `None` if that cannot be told, so that all must be compared."""
        mine = self._membership.summary().fingerprint
        try:
            async with await self._network.open_stream(peer, COMPARE_PROTOCOL) as stream:
                await stream.send_all(frame(wire.encode_summary(mine, None)))
                theirs, parts = wire.decode_summary(await receive_frame(stream, wire.MAX_SUMMARY))
        except ServiceRefused:
            return None
        if theirs == mine:
            return Part(frozenset(), revocations=False)
        return None if parts is None else self._membership.summary().difference(parts)

    async def answer_compare(self, stream: Stream) -> None:
        """Serve an inbound comparison of fingerprints."""
        try:
            with trio.fail_after(LIMIT):
                theirs, _ = wire.decode_summary(await receive_frame(stream, wire.MAX_SUMMARY))
                mine = self._membership.summary()
                parts = None if mine.fingerprint == theirs else mine
                await stream.send_all(frame(wire.encode_summary(mine.fingerprint, parts)))
        except (WireError, trio.BrokenResourceError, trio.TooSlowError) as exc:
            log.debug("no comparison with %s: %s", stream.peer, str(exc) or "too slow")
            stream.reset()

    async def answer(self, stream: Stream) -> None:
        """Serve an inbound exchange."""
        try:
            with trio.fail_after(LIMIT):
                await self._exchange(stream, opener=False)
        except (WireError, trio.BrokenResourceError, trio.TooSlowError) as exc:
            log.debug("no digest exchange with %s: %s", stream.peer, str(exc) or "too slow")
            stream.reset()

    async def _exchange(self, stream: Stream, *, opener: bool, part: Part | None = None) -> None:
        events = await exchange(stream, self._membership, self._tell, opener=opener, part=part)
        for event in events:
            self._tell(event)
        try:
            require_good_faith(events, self._membership)
        except Lie as exc:
            log.info("dropping the peer %s: %s", stream.peer, exc)
            await self._network.disconnect(stream.peer)
            raise


async def exchange(
    stream: Stream, membership: Membership, tell: Tell, *, opener: bool, part: Part | None = None
) -> list[io.Event]:
    """Swap digests, then what the other lacks. Returns the events of what we lacked.

    The sides take turns, the opener first, so that neither waits for the other to read. The digest is told to the
    machine at once, for it may change what we have to say of ourselves. The opener says of which part of what is known;
    `None`: of all.
    """
    if opener:
        await stream.send_all(frame(wire.encode_digest(membership.digest(part))))
    theirs = wire.decode_digest(await receive_frame(stream, wire.MAX_DIGEST))
    tell(io.DigestHeard(theirs))
    part = part if opener else theirs.part
    revocations = membership.revoked if part is None or part.revocations else ()
    lacking = frame(wire.encode_records(membership.newer_than(replace(theirs, part=part)), revocations))
    if opener:
        records, learned = wire.decode_records(await receive_frame(stream, wire.MAX_RECORDS))
        await stream.send_all(lacking)
        await stream.send_eof()
    else:
        await stream.send_all(frame(wire.encode_digest(membership.digest(part))) + lacking)
        records, learned = wire.decode_records(await receive_frame(stream, wire.MAX_RECORDS))
    return [
        *(io.RevocationHeard(revocation, gossiped=False) for revocation in learned),
        *(io.RecordHeard(record, gossiped=False) for record in records),
    ]


def require_good_faith(events: Iterable[io.Event], membership: Membership) -> None:
    """Raise `Lie` unless these, of which the machine was told, may have been said by somebody who believed them."""
    for event in events:
        match event:
            case io.RecordHeard(record) if membership.is_lie(record):
                raise Lie("it tells an announcement that was never good")
            case io.RevocationHeard(revocation) if membership.is_lie(revocation):
                raise Lie("it tells a revocation that was never good")
