"""What clients that only follow cost a mesh, in virtual time: one line for none, one, and two hundred of them.

    python bench/followers.py             ten members, each of which says something new every ten seconds

Bytes are those of the protocols' own messages, without the transport's. What members say to each other, by gossip and
otherwise, should be the same in each line; what a follower costs is told by each of its few neighbours to it alone.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import trio
import trio.testing

from libmesh import Mesh, PeerState, Scope, SecretKey, open_mesh
from libmesh.peers import PeerId
from libmesh.testing.memory import MemoryHub, MemoryNetwork
from libmesh.testing.memory_streams import MemoryStream

MEMBERS = 10
FOLLOWERS = (0, 1, 200)
SECONDS = 60
NEWS_EVERY = 10.0
SETTLING = 30.0
WALL = 1_800_000_000


class CountingHub(MemoryHub):
    """Counts what is gossiped, and what goes over streams between members and to and from followers."""

    def __init__(self) -> None:
        super().__init__()
        self.followers: set[PeerId] = set()
        self.counts: Counter[str] = Counter()

    def publish(self, origin: PeerId, topic: str, data: bytes) -> None:
        """See `MemoryHub.publish`."""
        self.counts["messages"] += 1
        self.counts["gossip"] += len(data)
        super().publish(origin, topic, data)

    def open_stream(self, network: MemoryNetwork, peer: PeerId, protocol: str) -> MemoryStream:
        """See `MemoryHub.open_stream`."""
        near = super().open_stream(network, peer, protocol)
        kind = "followers" if self.followers & {network.peer, peer} else "members"
        self._count(near, kind)
        for link in self._networks[peer].links[network.peer]:
            for far in link.streams:
                if far._outgoing is near._incoming:
                    self._count(far, kind)
        return near

    def _count(self, stream: MemoryStream, kind: str) -> None:
        send = stream.send_all

        async def counted(data: Any) -> None:
            self.counts[kind] += len(data)
            await send(data)

        stream.send_all = counted  # type: ignore[method-assign]


async def measured(followers: int) -> Counter[str]:
    """The counts of `SECONDS`, once everybody knows everybody."""
    hub = CountingHub()

    def clock() -> float:
        return WALL + trio.current_time()

    async with AsyncExitStack() as stack:

        async def enter(number: int, **how: Any) -> Mesh:
            key = SecretKey(number.to_bytes(32, "big"))
            network = await stack.enter_async_context(hub.open_network(key.seed))
            opening = open_mesh(key, network=network, wall_clock=clock, rng=random.Random(number), **how)
            return await stack.enter_async_context(opening)

        members = [await enter(1, mesh_key=SecretKey(bytes(32)))]
        token = members[0].invite(scope=Scope.CLIENT, not_after_unix=None)
        members += [await enter(number, invite=token) for number in range(2, MEMBERS + 1)]
        for number in range(1000, 1000 + followers):
            guest = await enter(number, invite=token, follow=True)
            hub.followers.add(guest.peer)
        await trio.sleep(SETTLING)
        for mesh in members:
            known = [entry for entry in mesh.view.peers if entry.state is PeerState.ALIVE]
            assert len(known) == MEMBERS - 1, "a follower stands in a member's table"
        hub.counts.clear()
        async with trio.open_nursery() as nursery:
            for number, mesh in enumerate(members):
                nursery.start_soon(_speak, mesh, number)
            await trio.sleep(SECONDS)
            nursery.cancel_scope.cancel()
        return hub.counts.copy()


async def _speak(mesh: Mesh, number: int) -> None:
    await trio.sleep(number * NEWS_EVERY / MEMBERS)
    word = 0
    while True:
        word += 1
        mesh.announce(bytes(100) + word.to_bytes(4, "big"))
        await trio.sleep(NEWS_EVERY)


def main() -> None:
    """Print the lines."""
    print(f"{MEMBERS} members; per second")
    print(
        "followers | gossip: messages   bytes | members among themselves, bytes | with followers, bytes: all   each"
    )
    for count in FOLLOWERS:
        clock = trio.testing.MockClock(autojump_threshold=0)
        counts = trio.run(measured, count, clock=clock)
        each = counts["followers"] / SECONDS / count if count else 0.0
        print(
            f"{count:9} | {counts['messages'] / SECONDS:16.2f} {counts['gossip'] / SECONDS:7.0f} "
            f"| {counts['members'] / SECONDS:31.0f} | {counts['followers'] / SECONDS:26.0f} {each:6.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
