"""Finds out where others reach this node: asks peers what they see, has them dial back, and asks routers for a port.

What is believed of all that is decided in `core.reachability`; router ports are `nat`'s, dials on others' behalf
`dial_back`'s.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from libmesh.alarm import Alarm
from libmesh.core import reachability as core
from libmesh.core.reachability import Reachability, ReachConfig, Standing
from libmesh.core.ways import ip_of, is_websocket
from libmesh.errors import MeshError
from libmesh.framing import receive_frame
from libmesh.net import reach_wire as wire
from libmesh.net import tcp
from libmesh.net.base import NetworkEvent, PathChanged, PeerConnected, PeerDisconnected, Stream
from libmesh.net.dial_back import DialBack
from libmesh.net.nat import PortMapper
from libmesh.net.reach_wire import Verdict
from libmesh.net.underlay import Underlay
from libmesh.peers import Path, PathKind, PeerId, Reaching
from libmesh.wire_pieces import WireError

log = logging.getLogger(__name__)

MAX_WATCHED = 16
"""Peers that are asked what they see. A few honest ones suffice; with a thousand connections each would cost a stream."""

ASK_LIMIT = 25.0
"""Seconds that a peer has to dial us back: more than it takes for that."""

LOOK_LIMIT = 5.0
"""Seconds that a peer has to say where it sees us."""

TRUST_STEPS = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Pauses between looks at whether a newcomer has been admitted. One that has not been by then is left alone."""


class Ground(Underlay, Protocol):
    """What is needed of the adapter beyond `Underlay`."""

    def local_port(self, peer: PeerId) -> int | None:
        """Where the best connection to `peer` leaves this node; `None` if the peer made it."""

    def own_addresses(self) -> tuple[str, ...]:
        """The multiaddrs of this machine's interfaces."""

    def addresses_changed(self) -> None:
        """Told when `Reach.addresses` are others."""


@dataclass(slots=True)
class _Pending:
    address: str
    arrived: bool = False


@dataclass(slots=True)
class _Watched:
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Reach:
    """The reachability parts of one adapter. `run` must run for as long as it shall know.

    Args:
        ground: the adapter.
        announced: multiaddrs that a person gave.
        map_port: ask the router to forward the port.
        open_to_all: dial back whoever asks, not admitted peers only.
        private_only: dial back nothing beyond private networks.
        trusted: peers whose word counts though they are not members: relays in use.
        config: times and numbers of what is believed.
    """

    def __init__(
        self,
        ground: Ground,
        *,
        announced: Sequence[str] = (),
        map_port: bool = False,
        open_to_all: bool = False,
        private_only: bool = False,
        trusted: Callable[[PeerId], bool] = lambda peer: False,
        config: ReachConfig | None = None,
    ) -> None:
        self._ground, self._announced, self._trusted = ground, tuple(announced), trusted
        self._machine = Reachability(config or ReachConfig(), rng=random.Random())
        self._server = DialBack(ground, open_to_all=open_to_all, private_only=private_only)
        self._mapper = PortMapper(self._mapped) if map_port else None
        self._watched: dict[PeerId, _Watched] = {}
        self._others: dict[PeerId, None] = {}  # direct peers that are not watched, oldest first
        self._nonces: dict[int, _Pending] = {}
        self._alarm = Alarm()
        self._tasks: trio.Nursery | None = None
        ground.set_handler(wire.DIAL_BACK, self._take_dial_back, admitted_only=False)

    # ── what is known ────────────────────────────────────────────────────────────────────────────────────────────

    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs to tell others besides those of our interfaces."""
        return self._machine.addresses()

    def guesses(self) -> tuple[str, ...]:
        """Where a hole punch may meet us."""
        return self._machine.guesses()

    @property
    def public(self) -> bool:
        """Whether others reach us without help, for all that is known."""
        return self._machine.standing is Standing.PUBLIC

    def picture(self) -> Reaching:
        """All that is known now."""
        return Reaching(
            standing=self._machine.standing.value,
            nat=self._machine.nat.value,
            observed=self._machine.observed,
            addresses=tuple((a, source.value, reached) for a, source, reached in self._machine.verdicts()),
            mapping="" if self._mapper is None else self._mapper.protocol,
            mapping_failure="not asked for" if self._mapper is None else self._mapper.failure,
        )

    # ── what happens ─────────────────────────────────────────────────────────────────────────────────────────────

    def heard(self, event: NetworkEvent) -> None:
        """The adapter tells of a connection."""
        match event:
            case PeerConnected(peer, path) | PathChanged(peer, path):
                if path.kind is PathKind.RELAYED or is_websocket(path.address) or ip_of(path.address) is None:
                    self._leave(peer)
                else:
                    self._others.pop(peer, None)
                    self._others[peer] = None
                    self._watch_more()
            case PeerDisconnected(peer):
                if self._leave(peer) and self._mapper is not None:
                    self._mapper.doubt()

    def moved(self) -> None:
        """This machine may be in another network now."""
        self._refresh()
        self._handle(core.Moved())
        for watched in list(self._watched):
            self._leave(watched)
            self._others[watched] = None
        if self._mapper is not None:
            self._mapper.again()
        self._watch_more()

    def _mapped(self, addresses: tuple[str, ...]) -> None:
        self._handle(core.MappedAre(addresses))

    def _refresh(self) -> None:
        self._handle(core.HereIs(self._ground.port, self._ground.own_addresses(), self._announced))

    def _leave(self, peer: PeerId) -> bool:
        self._others.pop(peer, None)
        watched = self._watched.pop(peer, None)
        if watched is None:
            return False
        watched.scope.cancel()
        self._handle(core.Gone(peer))
        self._watch_more()
        return True

    def _watch_more(self) -> None:
        while self._tasks is not None and self._others and len(self._watched) < MAX_WATCHED:
            peer = next(iter(self._others))
            del self._others[peer]
            self._watched[peer] = watched = _Watched()
            self._tasks.start_soon(self._watch, peer, watched)

    async def _watch(self, peer: PeerId, watched: _Watched) -> None:
        """Ask a newcomer what it sees, once it has been admitted. A stranger's word counts for nothing."""
        with watched.scope:
            for pause in TRUST_STEPS:
                await trio.sleep(pause)
                if self._ground.admitted(peer) or self._trusted(peer):
                    await self._look(peer)
                    return
            if self._watched.get(peer) is watched:  # makes room for others
                del self._watched[peer]
                self._watch_more()

    async def _look(self, peer: PeerId) -> None:
        with trio.move_on_after(LOOK_LIMIT):
            try:
                stream = await self._ground.open_stream(peer, wire.IDENTIFY)
                try:
                    observed = wire.observed_address(await receive_frame(stream, wire.MAX_IDENTIFY))
                finally:
                    stream.reset()
                if observed is not None:
                    host, port = tcp.host_and_port(observed)
                    self._handle(core.Seen(peer, host, port, self._ground.local_port(peer)))
            except (MeshError, trio.BrokenResourceError, ValueError) as exc:
                log.debug("%s does not say where it sees us: %s", peer, exc)

    # ── dials back ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _ask(self, peer: PeerId, address: str) -> None:
        reached: bool | None = None
        with trio.move_on_after(ASK_LIMIT):
            try:
                reached = await self.ask(peer, address)
            except (MeshError, trio.BrokenResourceError, ValueError) as exc:
                log.debug("%s did not dial %s back: %s", peer, address, exc)
        log.debug("%s dialled %s back: %s", peer, address, reached)
        self._handle(core.Answered(peer, address, reached))

    async def ask(self, peer: PeerId, address: str) -> bool | None:
        """Have `peer` dial `address`: whether that arrived here; `None` if it would not. Raises `MeshError`."""
        nonce = random.SystemRandom().getrandbits(64)
        self._nonces[nonce] = pending = _Pending(address)
        try:
            stream = await self._ground.open_stream(peer, wire.DIAL_REQUEST)
            try:
                await stream.send_all(wire.encode(wire.Request((address,), nonce)))
                answer = await self._answer(stream)
            finally:
                stream.reset()
        finally:
            del self._nonces[nonce]
        if answer is Verdict.REACHED:
            return True if pending.arrived else None  # who claims it and was not here has no say
        return False if answer is Verdict.NOT_REACHED else None

    async def _answer(self, stream: Stream) -> Verdict:
        answer = wire.decode(await receive_frame(stream, wire.MAX_MESSAGE))
        if isinstance(answer, wire.DataWanted):
            if answer.size > wire.MAX_DATA:
                return Verdict.REFUSED
            piece = wire.encode(wire.Data(bytes(wire.MAX_PIECE)))
            for _ in range(0, answer.size, wire.MAX_PIECE):
                await stream.send_all(piece)
            answer = wire.decode(await receive_frame(stream, wire.MAX_MESSAGE))
        return answer.verdict if isinstance(answer, wire.Response) else Verdict.BROKEN

    async def _take_dial_back(self, stream: Stream) -> None:
        with trio.move_on_after(LOOK_LIMIT):
            try:
                nonce = wire.decode_dial_back(await receive_frame(stream, wire.MAX_MESSAGE))
            except WireError:
                stream.reset()
                return
            pending = self._nonces.get(nonce)
            path: Path | None = self._ground.path(stream.peer)
            if pending is None or path is None or path.kind is PathKind.RELAYED:
                stream.reset()
                return
            pending.arrived = True
            await stream.send_all(wire.encode_dial_back_taken())

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Find out, until cancelled; then give mapped ports back."""
        async with trio.open_nursery() as nursery:
            self._tasks = nursery
            try:
                self._refresh()
                if self._mapper is not None:
                    nursery.start_soon(self._mapper.run, self._ground.port)
                self._watch_more()
                await self._keep_time()
            finally:
                self._tasks = None

    async def _keep_time(self) -> None:
        while True:
            await self._alarm.due(self._machine.deadline)
            self._handle(core.Wake())

    def _handle(self, event: core.Event) -> None:
        if self._tasks is None:
            return
        for effect in self._machine.handle(event, trio.current_time()):
            match effect:
                case core.Ask(peer, address):
                    self._tasks.start_soon(self._ask, peer, address)
                case core.Changed():
                    self._tell()
        self._alarm.moved()

    def _tell(self) -> None:
        log.info("reachable from afar: %s %s", self._machine.standing.value, " ".join(self.addresses()))
        self._ground.addresses_changed()
