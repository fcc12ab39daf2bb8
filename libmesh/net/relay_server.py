"""A relay: keeps places for peers that nobody can dial, and joins others to them (circuit relay v2, the hop side).

Source: libp2p/specs, relay/circuit-v2.md. What is granted to whom is decided in `core.relay_desk`, what a circuit may
carry in `core.shares`; here is what is said, and to whom.

Members only, unless it is opened to everybody: a stranger's stream is held until it has proved its membership and reset
when it has not, whatever it would have asked, so that it learns neither who is here nor that somebody is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import trio

from libmesh.core.relay_desk import Circuit, Refusal, RelayDesk, RelayLimits
from libmesh.errors import MeshError
from libmesh.framing import receive_frame
from libmesh.net import relay_wire as wire
from libmesh.net.base import Stream
from libmesh.net.negotiate import Libp2pStream
from libmesh.net.relay_pump import Carried, Turns, join_streams
from libmesh.net.relay_wire import Status
from libmesh.net.underlay import Underlay
from libmesh.peers import PeerId
from libmesh.wire_pieces import WireError

log = logging.getLogger(__name__)

REQUEST_LIMIT = 10.0
"""Seconds that a client has to say what it wants; then the stream is reset."""

STOP_LIMIT = 10.0
"""Seconds that a target has to agree to a circuit; then the source is told that it could not be reached."""

_STATUS = {Refusal.NOT_REACHABLE: Status.NO_RESERVATION, Refusal.FULL: Status.RESOURCE_LIMIT_EXCEEDED}


class RelayServer:
    """The relay of one node. `run` must run for as long as it serves.

    Args:
        underlay: the adapter.
        seed: this node's Ed25519 seed; signs vouchers.
        limits: what is given at most.
        addresses: this relay's own multiaddrs for clients to build circuits from, without `/p2p/…`; asked at each
            reservation.
        open_to_all: serve whoever comes, not members only.
        wall_clock: seconds since the epoch.
    """

    def __init__(
        self,
        underlay: Underlay,
        seed: bytes,
        limits: RelayLimits,
        *,
        addresses: Callable[[], tuple[str, ...]],
        open_to_all: bool = False,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._underlay, self._seed, self._limits = underlay, seed, limits
        self._addresses, self._wall_clock = addresses, wall_clock
        self._desk = RelayDesk(limits)
        self._turns = Turns(limits)
        self._scopes: dict[int, trio.CancelScope] = {}
        self._limit = wire.Limit(limits.duration, limits.data)
        self.carried_bytes = 0
        underlay.set_handler(wire.HOP, self._serve, admitted_only=not open_to_all)

    @property
    def circuits(self) -> tuple[Circuit, ...]:
        """Those that stand, oldest first."""
        return self._desk.circuits

    @property
    def reservations(self) -> int:
        """How many peers have a place here."""
        return self._desk.reservations

    def disconnected(self, peer: PeerId) -> None:
        """The last connection to `peer` is gone."""
        self._desk.gone(peer)

    async def run(self) -> None:
        """Give circuits their turns, until cancelled."""
        await self._turns.run()

    async def _serve(self, stream: Stream) -> None:
        assert isinstance(stream, Libp2pStream)
        try:
            with trio.fail_after(REQUEST_LIMIT):
                request = wire.decode_hop_request(await receive_frame(stream, wire.MAX_MESSAGE))
        except WireError as exc:
            log.debug("%s asked for no circuit and no reservation: %s", stream.peer, exc)
            await self._answer(stream, Status.MALFORMED_MESSAGE)
            return
        except trio.TooSlowError:
            stream.reset()
            return
        match request:
            case wire.Reserve():
                await self._reserve(stream)
            case wire.Connect(target):
                await self._connect(stream, target)

    @staticmethod
    async def _answer(stream: Stream, status: Status) -> None:
        await stream.send_all(wire.encode_hop_answer(wire.Answer(status)))

    async def _reserve(self, stream: Libp2pStream) -> None:
        if stream.relayed:  # nobody could be led back over a circuit that may end any moment
            await self._answer(stream, Status.PERMISSION_DENIED)
            return
        if self._underlay.path(stream.peer) is None:  # gone since it asked; `disconnected` comes only once
            stream.reset()
            return
        now = trio.current_time()
        ends = self._desk.reserve(stream.peer, now)
        if isinstance(ends, Refusal):
            await self._answer(stream, Status.RESERVATION_REFUSED)
            return
        expires = int(self._wall_clock() + ends - now)
        me = self._underlay.peer
        reservation = wire.Reservation(
            expires,
            tuple(f"{address}/p2p/{me}" for address in self._addresses()),
            wire.make_voucher(self._seed, stream.peer, expires),
        )
        await stream.send_all(wire.encode_hop_answer(wire.Answer(Status.OK, reservation, self._limit)))

    async def _connect(self, stream: Libp2pStream, target: PeerId) -> None:
        if stream.relayed:
            await self._answer(stream, Status.PERMISSION_DENIED)
            return
        refusal = self._desk.ask(stream.peer, target, trio.current_time())
        if refusal is not None:
            await self._answer(stream, _STATUS[refusal])
            return
        try:
            far = await self._open_stop(stream.peer, target)
        except BaseException:
            self._desk.settle(stream.peer)
            raise
        if far is None:
            self._desk.settle(stream.peer)
            await self._answer(stream, Status.CONNECTION_FAILED)
            return
        granted = self._desk.grant(stream.peer, target)
        if isinstance(granted, Refusal):
            far.reset()
            await self._answer(stream, _STATUS[granted])
            return
        if granted.evicted is not None and (scope := self._scopes.get(granted.evicted.number)) is not None:
            log.info("the circuit %s makes room for somebody with fewer", granted.evicted)
            scope.cancel()
        await self._run_circuit(granted.circuit, stream, far)

    async def _open_stop(self, source: PeerId, target: PeerId) -> Libp2pStream | None:
        """A stream to `target`, which has agreed to a circuit from `source`; `None` if it has not."""
        far: Stream | None = None
        try:
            with trio.fail_after(STOP_LIMIT):
                far = await self._underlay.open_stream(target, wire.STOP)
                await far.send_all(wire.encode_stop_request(wire.Connect(source, self._limit)))
                status = wire.decode_stop_answer(await receive_frame(far, wire.MAX_MESSAGE))
            if status == Status.OK and isinstance(far, Libp2pStream) and not far.relayed:
                return far
            reason = f"its answer was {status}"
        except (MeshError, trio.BrokenResourceError, trio.TooSlowError) as exc:
            reason = str(exc) or "it did not answer in time"
        except BaseException:
            if far is not None:
                far.reset()
            raise
        log.debug("no circuit from %s to %s: %s", source, target, reason)
        if far is not None:
            far.reset()
        return None

    async def _run_circuit(self, circuit: Circuit, near: Libp2pStream, far: Libp2pStream) -> None:
        """Serve a granted circuit until it ends; takes over both streams."""
        carried = Carried()
        try:
            with trio.CancelScope() as scope:
                self._scopes[circuit.number] = scope
                if self._limits.duration:
                    scope.deadline = trio.current_time() + self._limits.duration
                await near.send_all(wire.encode_hop_answer(wire.Answer(Status.OK, limit=self._limit)))
                await join_streams(
                    near,
                    far,
                    payer=circuit.source,
                    turns=self._turns,
                    carried=carried,
                    most=self._limits.data,
                )
        finally:
            near.reset()  # only what is not closed yet
            far.reset()
            del self._scopes[circuit.number]
            self._desk.end(circuit)
            self._turns.forget(circuit.source)
            self.carried_bytes += carried.forward + carried.back
        if carried.over:
            log.info("the circuit %s was ended: %s", circuit, carried.over)
