"""Fair turns for many flows, and a limit on what they carry: whose turn it is, and when. No clock: times are arguments.

Theory of operation
-------------------
Each flow belongs to a peer. A flow moves some bytes, then reports them and waits for its next turn. Turns are given peer
by peer, and in each peer's queue flow by flow, so that a peer with a hundred flows gets as much as one with a single one
(Nagle, "On Packet Switches With Infinite Storage", RFC 970, section "Fairness"; here per turn, because a turn is bounded).

Rates are token buckets that may go into debt: a flow moves first and pays later. That needs no knowledge of how much a
flow is going to move, and overshoots by one turn of each flow at most. A bucket holds `BURST` seconds of its rate.

Without any rate, everybody who waits gets a turn at each call, one flow of each peer.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from libmesh.peers import PeerId

INFINITY = float("inf")

BURST = 0.25
"""Seconds of a rate that a bucket holds: what was not used earlier than that is lost."""

Flow = TypeVar("Flow")


@dataclass(slots=True)
class _Bucket:
    """Tokens at a time; below 0 it is in debt. A rate of 0 is no limit."""

    rate: float
    tokens: float
    updated: float

    def fill(self, now: float) -> None:
        """Add what has accrued since."""
        self.tokens = min(self.rate * BURST, self.tokens + self.rate * (now - self.updated))
        self.updated = now

    def ready_at(self) -> float:
        """When it is out of debt."""
        return (
            self.updated if self.tokens > 0 or not self.rate else self.updated + (1 - self.tokens) / self.rate
        )

    def spend(self, size: int) -> None:
        """Take `size` bytes' worth."""
        if self.rate:
            self.tokens -= size


class Shares(Generic[Flow]):
    """Turns and rates for flows of any hashable kind.

    Args:
        rate: bytes a second for all together; 0 without limit.
        peer_rate: bytes a second for all flows of one peer; 0 without limit.
        now: seconds of any one clock.
    """

    def __init__(self, *, rate: float, peer_rate: float, now: float) -> None:
        self._total = _Bucket(rate, rate * BURST, now)
        self._peer_rate = peer_rate
        self._buckets: dict[PeerId, _Bucket] = {}
        self._waiting: OrderedDict[PeerId, deque[Flow]] = OrderedDict()

    def wait(self, peer: PeerId, flow: Flow, size: int, now: float) -> None:
        """`flow` of `peer` has moved `size` bytes and waits for its next turn."""
        self._total.fill(now)
        self._total.spend(size)
        if self._peer_rate:
            bucket = self._buckets.get(peer)
            if bucket is None:
                bucket = self._buckets[peer] = _Bucket(self._peer_rate, self._peer_rate * BURST, now)
            bucket.fill(now)
            bucket.spend(size)
        self._waiting.setdefault(peer, deque()).append(flow)

    def leave(self, peer: PeerId, flow: Flow) -> None:
        """`flow` waits no more. Harmless if it does not."""
        queue = self._waiting.get(peer)
        if queue is not None and flow in queue:
            queue.remove(flow)
            if not queue:
                del self._waiting[peer]

    def forget(self, peer: PeerId, now: float) -> None:
        """A circuit of `peer` has ended: free what is kept of it, unless it is in debt, and of all that have used nothing of late.

        Who comes back finds the debt that it left, or a bucket as full as the one that was freed.
        """
        for other, bucket in list(self._buckets.items()):
            bucket.fill(now)
            spare = bucket.tokens > 0 if other == peer else bucket.tokens >= bucket.rate * BURST
            if spare and other not in self._waiting:
                del self._buckets[other]

    def turns(self, now: float) -> list[Flow]:
        """Those whose turn it is, at most one of each peer, in order. They wait no more."""
        self._total.fill(now)
        if self._total.ready_at() > now:
            return []
        taken: list[Flow] = []
        # With a rate, one turn at a call: what the next one may do depends on what this one moves.
        for peer in list(self._waiting):
            if (bucket := self._buckets.get(peer)) is not None:
                bucket.fill(now)
                if bucket.ready_at() > now:
                    continue
            queue = self._waiting[peer]
            taken.append(queue.popleft())
            if queue:
                self._waiting.move_to_end(peer)
            else:
                del self._waiting[peer]
            if self._total.rate:
                break
        return taken

    def deadline(self, now: float) -> float:
        """When `turns` has something to give next; infinite while nobody waits."""
        if not self._waiting:
            return INFINITY
        ready = self._total.ready_at()
        peers = min((self._buckets[p].ready_at() if p in self._buckets else now) for p in self._waiting)
        return max(now, ready, peers)
