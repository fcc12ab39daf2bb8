"""Does what the liveness machine asks: probes, directly and through others, and answers those of others."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence

import trio

from libmesh import wire
from libmesh.alarm import Alarm
from libmesh.core import liveness
from libmesh.core import membership_io as io
from libmesh.core.liveness import Liveness, LivenessConfig
from libmesh.core.membership import Membership
from libmesh.core.ways import is_circuit
from libmesh.errors import MeshError
from libmesh.framing import frame, receive_frame
from libmesh.net.base import Network, Stream
from libmesh.peers import PeerId
from libmesh.wire_pieces import WireError

log = logging.getLogger(__name__)

PROTOCOL = "/libmesh/probe/1.0.0"

PATIENCE = 5.0
"""Seconds after which a probe's stream is given up; the machine has drawn its conclusions long before."""

MAX_ANEW = 8
"""Attempts at new connections to silent peers, all together, each a socket. When full, no further one is begun."""

WAYS_ANEW = 2
"""Addresses of one peer that are tried at once, unless it is known which is the right one."""


class Prober:
    """Drives one `Liveness` machine over a network.

    Args:
        network: the transport. Only peers that are connected can be probed directly.
        membership: says whom to watch.
        tell: passes an event to the membership machine.
        config: the times.
        rng: orders the rounds.
        addresses_of: where a peer may be dialled.
    """

    def __init__(
        self,
        network: Network,
        membership: Membership,
        tell: Callable[[io.Event], None],
        config: LivenessConfig,
        rng: random.Random,
        addresses_of: Callable[[PeerId], Sequence[str]],
    ) -> None:
        self._network, self._membership, self._tell = network, membership, tell
        self._addresses_of = addresses_of
        self._anew = 0
        self._machine = Liveness(config, rng=rng)
        self._watched = membership.watched
        self._alarm = Alarm()
        self._tasks: trio.Nursery | None = None

    def update(self) -> None:
        """Watch whoever the membership machine believes in now. Cheap when that has not changed."""
        watched = self._membership.watched
        if watched != self._watched:
            self._watched = watched
            self._handle(liveness.Watch(*watched))

    def pace(self, config: LivenessConfig) -> None:
        """Go by these times from now on."""
        self._machine.config = config

    def doubt(self, peer: PeerId) -> None:
        """Probe `peer` now."""
        self._handle(liveness.Doubt(peer))

    async def run(self) -> None:
        """Probe until cancelled."""
        async with trio.open_nursery() as nursery:
            self._tasks = nursery
            while True:
                await self._alarm.due(self._machine.deadline)
                self._handle(liveness.Wake())

    def _handle(self, event: liveness.Event) -> None:
        if self._tasks is None:
            return
        for effect in self._machine.handle(event, trio.current_time()):
            match effect:
                case liveness.Ping(peer):
                    self._tasks.start_soon(self._ping, peer)
                case liveness.PingThrough(peer, helpers):
                    for helper in helpers:
                        self._tasks.start_soon(self._ping, helper, peer)
                case liveness.Reach(peer):
                    for address in self._ways_to(peer)[: MAX_ANEW - self._anew]:
                        self._anew += 1
                        self._tasks.start_soon(self._reach, peer, address)
                case liveness.Silent(peer):
                    self._tell(io.PeerSilent(peer))
                case liveness.Heard(peer):
                    self._tell(io.PeerHeard(peer))
        self._alarm.moved()

    async def _ping(self, peer: PeerId, target: PeerId | None = None) -> None:
        if await self._ask(peer, target, PATIENCE):
            self._handle(liveness.Answered(target or peer))

    def _ways_to(self, peer: PeerId) -> Sequence[str]:
        """The address by which it is connected, if that can be dialled, or else its first direct ones."""
        addresses = [address for address in self._addresses_of(peer) if not is_circuit(address)]
        path = self._network.path(peer)
        return [path.address] if path is not None and path.address in addresses else addresses[:WAYS_ANEW]

    async def _reach(self, peer: PeerId, address: str) -> None:
        """The handshake proves that it is there, whichever connection is used afterwards."""
        try:
            with trio.move_on_after(PATIENCE):
                await self._network.dial(peer, address)
                self._handle(liveness.Answered(peer))
        except MeshError as exc:
            log.debug("%s at %s: %s", peer, address, exc)
        finally:
            self._anew -= 1

    async def _ask(self, peer: PeerId, target: PeerId | None, limit: float) -> bool:
        with trio.move_on_after(limit):
            try:
                stream = await self._network.open_stream(peer, PROTOCOL)
                try:
                    await stream.send_all(frame(wire.encode_probe(target)))
                    answer = await receive_frame(stream, wire.MAX_PROBE)
                    return wire.decode_probe_answer(answer)
                finally:
                    stream.reset()
            except (MeshError, trio.BrokenResourceError):
                return False
        return False

    async def answer(self, stream: Stream) -> None:
        """Serve an inbound probe. Asks nobody to whom there is no connection."""
        with trio.move_on_after(PATIENCE):
            try:
                target = wire.decode_probe(await receive_frame(stream, wire.MAX_PROBE))
                heard = target is None or await self._asked_for(target)
                await stream.send_all(frame(wire.encode_probe_answer(heard)))
            except (WireError, trio.BrokenResourceError):
                stream.reset()

    async def _asked_for(self, target: PeerId) -> bool:
        if self._network.path(target) is None:
            return False
        return await self._ask(target, None, self._machine.config.timeout)
