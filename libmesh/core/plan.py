"""Who keeps a connection to whom, once the mesh is too large for everybody to everybody.

Theory of operation
-------------------
Imagine all peers on several rings, on each in another order: a peer's place on a ring is a hash of its id and the ring's
number. On the *near* ring each peer is connected to the few next to it on both sides; on each *far* ring to the one
next to it on both sides.

- Both ends come to the same answer from what they both know, without asking: if b is next to a, then a is next to b.
- Each ring is a cycle through everybody, so the graph hangs together by construction; several cycles in random orders
  make an expander, in which messages reach everybody in O(log n) hops (Law and Siu, "Distributed Construction of
  Random Expander Networks", INFOCOM 2003).
- The near ring makes triangles: those near a peer are connected to each other, too, so they can probe it for one
  another (a small world: Watts and Strogatz, Nature 393, 1998).
- Whoever comes or goes changes O(1) connections of its neighbours and nothing else.

The rejected alternative, the 24 lowest of a hash of each pair, needs the other's whole view to know what it wants, and
gives no triangles. Places can be ground: who makes peer ids by the thousand can sit around somebody. That takes an
invite, and buys the power to hide that peer's death, not to cause it.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import insort
from collections.abc import Iterable
from functools import lru_cache

from libmesh.peers import PeerId

_SPAN = 2**32
MAX_RINGS = 15


@lru_cache(maxsize=8192)
def places(peer: PeerId) -> tuple[int, ...]:
    """A peer's places on the rings, each below 2³², and a last number for lots."""
    return struct.unpack(">16I", hashlib.sha512(b"libmesh rings 1\0" + peer.encode()).digest())


def lot(one: PeerId, other: PeerId) -> float:
    """A number in [0, 1) that is fixed for a pair of peers and looks random otherwise."""
    return (places(one)[-1] ^ places(other)[-1]) / _SPAN


class Plan:
    """The neighbours that one peer should have among those that it is told of.

    Args:
        me: whose plan it is.
        connections: how many neighbours at most; half near, half far. At least 4.
    """

    def __init__(self, me: PeerId, connections: int) -> None:
        self.reach = connections // 4
        self._me = me
        mine = places(me)
        far = min((connections - 2 * self.reach) // 2, MAX_RINGS - 1)
        # (ring, our place on it, direction, how many) of each side on which we have neighbours
        self._sides = [(ring, mine[ring], way, self.reach if ring == 0 else 1)
                       for ring in range(1 + far) for way in (1, -1)]  # fmt: skip
        self._next: list[list[tuple[int, PeerId]]] = [[] for _ in self._sides]
        self._uses: dict[PeerId, int] = {}

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._uses

    @property
    def neighbours(self) -> frozenset[PeerId]:
        """All of them."""
        return frozenset(self._uses)

    @property
    def near(self) -> tuple[PeerId, ...]:
        """Those of the near ring in its order, with us in the middle.

        Each is connected to those up to `reach` places away.
        """
        after, before = ([peer for _, peer in side] for side in self._next[:2])
        return tuple(dict.fromkeys([*reversed(before), self._me, *after]))

    @property
    def beside(self) -> tuple[PeerId, ...]:
        """Who comes next after us on the near ring, and who before: each peer is the first of exactly one other."""
        return tuple(dict.fromkeys(side[0][1] for side in self._next[:2] if side))

    def add(self, peer: PeerId) -> list[PeerId]:
        """Somebody came. Those who became or ceased to be neighbours by it."""
        theirs = places(peer)
        changed: list[PeerId] = []
        for found, (ring, mine, way, room) in zip(self._next, self._sides, strict=True):
            distance = (theirs[ring] - mine) * way % _SPAN
            if len(found) < room:
                insort(found, (distance, peer))
            elif distance < found[-1][0]:
                insort(found, (distance, peer))
                changed += self._use(found.pop()[1], -1)
            else:
                continue
            changed += self._use(peer, 1)
        return changed

    def remove(self, peer: PeerId, others: Iterable[PeerId]) -> list[PeerId]:
        """Somebody went; `others` are all who remain. Those who became or ceased to be neighbours by it.

        Costs a look at each of the others if `peer` was a neighbour, and nothing if it was not.
        """
        if peer not in self._uses:
            return []
        remaining = list(others)
        changed: list[PeerId] = []
        for found, (ring, mine, way, room) in zip(self._next, self._sides, strict=True):
            kept = [item for item in found if item[1] != peer]
            if len(kept) == len(found):
                continue
            changed += self._use(peer, -1)
            present = {item[1] for item in kept}
            candidates = [
                ((places(other)[ring] - mine) * way % _SPAN, other)
                for other in remaining
                if other not in present
            ]
            found[:] = kept
            if candidates and len(kept) < room:
                found.append(min(candidates))
                changed += self._use(found[-1][1], 1)
        return changed

    def _use(self, peer: PeerId, by: int) -> list[PeerId]:
        before = self._uses.get(peer, 0)
        self._uses[peer] = before + by
        if before + by == 0:
            del self._uses[peer]
        return [peer] if 0 in (before, before + by) else []
