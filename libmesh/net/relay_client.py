"""The other two parts in circuit relay v2: to reach a peer through a relay, and to be reached through one.

Source: libp2p/specs, relay/circuit-v2.md. When to ask which relay for a place is decided in `core.reservations`; here
is what is said. A circuit's bytes go to the adapter, which makes of them a connection like any other: proof of the
peer's key by Noise end to end, so that the relay can neither read nor pretend.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence

import trio

from libmesh.alarm import Alarm
from libmesh.core import reservations as core
from libmesh.core.reservations import MAX_RELAYS, ReservationConfig, Reservations
from libmesh.core.ways import is_websocket
from libmesh.errors import MeshError, NetworkError, ServiceRefused
from libmesh.framing import receive_frame
from libmesh.net import relay_wire as wire
from libmesh.net import tcp
from libmesh.net.base import Approach, Stream, StreamReset
from libmesh.net.negotiate import Libp2pStream
from libmesh.net.relay_wire import Status
from libmesh.net.underlay import Underlay
from libmesh.net.websocket import target_of
from libmesh.peers import PathKind, PeerId, RelayView
from libmesh.wire_pieces import WireError

log = logging.getLogger(__name__)

ANSWER_LIMIT = 15.0
"""Seconds that a relay has to answer: longer than it gives a target itself."""

ASK_LIMIT = 10.0
"""Seconds to connect to a relay and get a place there."""

WATCH_EVERY = 1.5
"""Seconds between pings to a relay at which there is a place."""

WATCH_LIMIT = 3.0
"""Seconds without an echo after which a relay is given up: the muxer notices 15 s after a cable was pulled, and for so long
nobody could reach us. With the pause before it that is less than 5 s."""

MAX_INBOUND = 256
"""Circuits to this node that are being set up or stand. More are refused: each is a connection with its tasks."""

MAX_WAY = 128
"""Bytes of an address that a relay names of itself; longer ones are left out. With what a circuit adds it must fit into an
announcement: otherwise a relay could keep us from announcing anything."""

MAX_WAYS = 3
"""Addresses of each relay that others are told: one of each kind of network at most. An announcement has few places."""

CIRCUIT = "/p2p-circuit"
PING = "/ipfs/ping/1.0.0"
_LOOPBACK = ("/ip4/127.", "/ip6/::1/")
_PING_BYTES = 32  # libp2p/specs, ping/ping.md


def split_relay(address: str) -> tuple[PeerId, str]:
    """A relay's multiaddr as its peer id and its address: `/ip4/…/tcp/…/p2p/RELAY`, with or without `/p2p-circuit…`.

    Raises `ValueError`, in words, if it names no relay.
    """
    way = address.partition(CIRCUIT)[0]
    direct, found, peer = way.rpartition("/p2p/")
    if not found or not direct or "/" in peer or not peer:
        raise ValueError(f"{address!r} names no relay: it must be like /ip4/192.0.2.1/tcp/4001/p2p/12D3Koo…")
    return PeerId(peer), direct


def _is_way(address: str) -> bool:
    """Whether an address that a relay names may be told to others: one that can be dialled."""
    try:
        if is_websocket(address):
            target_of(address)
        else:
            tcp.host_and_port(address)
    except ValueError:
        return False
    return "/p2p/" not in address and len(address.encode()) <= MAX_WAY


class RelayClient:
    """Circuits from and to one node. `run` must run for it to be reached by any.

    Args:
        underlay: the adapter.
        changed: called when other circuits lead here than before.
        config: how places are kept.
        rng: for pauses.
        wall_clock: seconds since the epoch.
    """

    def __init__(
        self,
        underlay: Underlay,
        *,
        changed: Callable[[], None] = lambda: None,
        config: ReservationConfig | None = None,
        rng: random.Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._underlay, self._changed, self._wall_clock = underlay, changed, wall_clock
        self._machine = Reservations(config, rng=rng or random.Random())
        self._ways: dict[PeerId, tuple[str, ...]] = {}  # of the relays that we are told of
        self._granted: dict[PeerId, tuple[str, ...]] = {}  # what each relay says of itself
        self._failures: dict[PeerId, str] = {}  # of the relays that we are told of
        self._approach: Approach | None = None
        self._watches: dict[PeerId, trio.CancelScope] = {}
        self._inbound = 0
        self._alarm = Alarm()
        self._tasks: trio.Nursery | None = None
        underlay.set_handler(wire.STOP, self._serve_stop, admitted_only=False)

    # ── to be reached ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def relays(self) -> tuple[PeerId, ...]:
        """Those at which there is a place now, best first."""
        return self._machine.held

    def circuits(self) -> tuple[str, ...]:
        """The multiaddrs by which this node can be reached through its relays, up to `/p2p-circuit`, best first.

        For each relay the address that works for us, then those that it names itself, then those that we were told;
        `MAX_WAYS` at most, and none that only leads to the relay's own machine unless it has no other.
        """
        found: list[str] = []
        for relay in self._machine.held:
            ways = list(dict.fromkeys((*self._granted.get(relay, ()), *self._ways.get(relay, ()))))
            far = [way for way in ways if not way.startswith(_LOOPBACK)] or ways
            found += [f"{way}/p2p/{relay}{CIRCUIT}" for way in far[:MAX_WAYS]]
        return tuple(found)

    def views(self) -> tuple[RelayView, ...]:
        """The relays that may be used, best first."""
        return tuple(self._view(relay, ways) for relay, ways in list(self._ways.items())[:MAX_RELAYS])

    def _view(self, relay: PeerId, ways: tuple[str, ...]) -> RelayView:
        path, held = self._underlay.path(relay), relay in self._machine.held
        return RelayView(
            relay=relay,
            address=path.address if path is not None and path.address in ways else ways[0],
            held=held,
            rtt=path.rtt if path is not None else None,
            failure="" if held else self._failures.get(relay, ""),
        )

    def set_relays(self, relays: Sequence[str], approach: Approach | None = None) -> None:
        """See `Network.set_relays`. Raises `ValueError` for one that names no relay."""
        self._approach = approach
        ways: dict[PeerId, list[str]] = {}
        for address in relays:
            relay, way = split_relay(address)
            if relay != self._underlay.peer:
                ways.setdefault(relay, []).append(way)
        self._ways = {relay: tuple(dict.fromkeys(found)) for relay, found in ways.items()}
        self._granted = {relay: said for relay, said in self._granted.items() if relay in self._ways}
        self._failures = {relay: why for relay, why in self._failures.items() if relay in self._ways}
        self._handle(core.SetRelays(tuple(self._ways)))

    def disconnected(self, peer: PeerId) -> None:
        """The last connection to `peer` is gone."""
        if peer in self._machine.held:
            self._failures[peer] = "the connection was lost"
        self._handle(core.Lost(peer))

    def _handle(self, event: core.Event) -> None:
        if self._tasks is None:  # not yet, or no more: `run` starts with what is known then
            return
        for effect in self._machine.handle(event, trio.current_time()):
            match effect:
                case core.Ask(relay):
                    self._tasks.start_soon(self._ask, relay)
                case core.Held(relays):
                    log.info("relays through which others reach this node: %s", ", ".join(relays) or "none")
                    self._watch(relays)
                    self._changed()
        self._alarm.moved()

    async def run(self) -> None:
        """Keep places until cancelled."""
        async with trio.open_nursery() as nursery:
            self._tasks = nursery
            self._handle(core.SetRelays(tuple(self._ways)))
            try:
                while True:
                    await self._alarm.due(self._machine.deadline)
                    self._handle(core.Wake())
            finally:
                self._tasks = None

    async def _ask(self, relay: PeerId) -> None:
        try:
            with trio.fail_after(ASK_LIMIT):
                ways = self._ways.get(relay, ())
                if self._approach is not None:
                    await self._approach(relay, ways)
                await self._underlay.connect(relay, ways)
                lasts = await self._reserve(relay)
        except (MeshError, trio.BrokenResourceError, trio.TooSlowError) as exc:
            reason = str(exc) or "it did not answer in time"
            log.debug("no place at the relay %s: %s", relay, reason)
            if relay in self._ways:
                self._failures[relay] = reason
            self._handle(core.Failed(relay))
        else:
            self._failures.pop(relay, None)
            self._handle(core.Reserved(relay, lasts))

    def _watch(self, relays: Sequence[PeerId]) -> None:
        """Watch over these relays, and no others."""
        for relay in set(self._watches) - set(relays):
            self._watches.pop(relay).cancel()
        for relay in set(relays) - set(self._watches):
            scope = self._watches[relay] = trio.CancelScope()
            assert self._tasks is not None
            self._tasks.start_soon(self._watch_over, relay, scope)

    async def _watch_over(self, relay: PeerId, scope: trio.CancelScope) -> None:
        with scope:
            while self._underlay.path(relay) is not None:
                try:
                    await self._ping(relay)
                except trio.TooSlowError:
                    log.info("the relay %s does not answer any more", relay)
                    self._failures[relay] = "it does not answer any more"
                    self._handle(core.Lost(relay))
                    return
                except ServiceRefused:
                    return  # it knows no ping; the muxer notices later
                except (MeshError, trio.BrokenResourceError):
                    await trio.sleep(WATCH_EVERY)

    async def _ping(self, relay: PeerId) -> None:
        """Ping until that fails: with `trio.TooSlowError` if there is no echo."""
        async with await self._underlay.open_stream(relay, PING) as stream:
            while True:
                with trio.fail_after(WATCH_LIMIT):
                    await stream.send_all(bytes(_PING_BYTES))
                    missing = _PING_BYTES
                    while missing:
                        echo = await stream.receive_some(missing)
                        if not echo:
                            raise StreamReset("the relay ended the ping")
                        missing -= len(echo)
                await trio.sleep(WATCH_EVERY)

    async def _reserve(self, relay: PeerId) -> float:
        """Ask a connected relay for a place. For how many seconds it is granted."""
        answer = await self._request(relay, wire.Reserve())
        if isinstance(answer, wire.Answer) and answer.status == Status.OK and answer.reservation is not None:
            addresses = [a.removesuffix(f"/p2p/{relay}") for a in answer.reservation.addresses]
            reachable = [address for address in addresses if _is_way(address)]
            self._granted[relay] = (*self._used(relay), *reachable)
            # A relay with a wrong clock grants what looks long past, or for ever; renewing does no harm.
            return min(max(answer.reservation.expires_unix - self._wall_clock(), 60.0), 3600.0)
        raise NetworkError(wire.WORDS.get(answer.status, f"the relay answered {answer.status}"))

    def _used(self, relay: PeerId) -> tuple[str, ...]:
        """The address of the relay that works for us, if we dialled it."""
        path = self._underlay.path(relay)
        return (path.address,) if path is not None and path.address in self._ways.get(relay, ()) else ()

    async def _request(self, relay: PeerId, request: wire.Reserve | wire.Connect) -> wire.Answer:
        async with await self._underlay.open_stream(relay, wire.HOP) as stream:
            return await self._ask_on(stream, request)

    @staticmethod
    async def _ask_on(stream: Stream, request: wire.Reserve | wire.Connect) -> wire.Answer:
        await stream.send_all(wire.encode_hop_request(request))
        return wire.decode_hop_answer(await receive_frame(stream, wire.MAX_MESSAGE))

    async def _serve_stop(self, stream: Stream) -> None:
        """A relay leads somebody here. Only those that we are told to use may."""
        assert isinstance(stream, Libp2pStream)
        try:
            with trio.fail_after(ANSWER_LIMIT):
                request = wire.decode_stop_request(await receive_frame(stream, wire.MAX_MESSAGE))
        except (WireError, trio.TooSlowError) as exc:
            log.debug("%s led nobody here: %s", stream.peer, str(exc) or "too slow")
            stream.reset()
            return
        relay = stream.peer
        if relay not in self._ways or self._inbound >= MAX_INBOUND:
            status = Status.RESOURCE_LIMIT_EXCEEDED if relay in self._ways else Status.PERMISSION_DENIED
            await stream.send_all(wire.encode_stop_answer(status))
            return
        await stream.send_all(wire.encode_stop_answer(Status.OK))
        path = self._underlay.path(relay)
        address = f"{path.address if path else ''}/p2p/{relay}{CIRCUIT}"
        self._inbound += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    stream.wait_closed
                )  # the stream is the connection's now, and open as long as that
                try:
                    await self._underlay.adopt(
                        stream, peer=request.peer, initiator=False, address=address, kind=PathKind.RELAYED
                    )
                except NetworkError as exc:
                    log.debug("a circuit from %s came to nothing: %s", request.peer, exc)
                    nursery.cancel_scope.cancel()
        finally:
            self._inbound -= 1

    # ── to reach ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def open_circuit(self, peer: PeerId, address: str) -> Stream:
        """A stream whose bytes are those of `peer`, by a circuit address (`…/p2p/RELAY/p2p-circuit`). The caller's.

        Connects to the relay first if need be. Raises `NetworkError` or `ValueError`, saying what went wrong.
        """
        relay, way = split_relay(address)
        if relay == self._underlay.peer:
            raise NetworkError("this node is that relay")
        try:
            await self._underlay.connect(relay, [way])
        except MeshError as exc:
            raise NetworkError(f"the relay is not to be reached: {exc}") from exc
        stream: Stream | None = None
        try:
            with trio.fail_after(ANSWER_LIMIT):
                stream = await self._underlay.open_stream(relay, wire.HOP)
                answer = await self._ask_on(stream, wire.Connect(peer))
            if answer.status == Status.OK:
                return stream
            raise NetworkError(wire.WORDS.get(answer.status, f"the relay answered {answer.status}"))
        except BaseException as exc:
            if stream is not None:
                stream.reset()
            if isinstance(exc, trio.TooSlowError):
                raise NetworkError("the relay did not answer in time") from exc
            if isinstance(exc, (trio.BrokenResourceError, WireError)):
                raise NetworkError(f"the relay ended the request: {exc}") from exc
            raise
