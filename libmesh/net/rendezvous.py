"""Both parts in libp2p's rendezvous: a point where peers leave word of where they are, and a client of such points.

Source: libp2p/specs, rendezvous/README.md. What is kept is decided in `core.rendezvous_desk`. py-libp2p's own service
(0.8.1) keeps what any peer says in any number of namespaces, without signatures, and even what is only asked for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import trio

from libmesh.core.rendezvous_desk import RendezvousDesk, RendezvousLimits
from libmesh.errors import MeshError, NetworkError
from libmesh.framing import receive_frame
from libmesh.net import rendezvous_wire as wire
from libmesh.net.base import Stream
from libmesh.net.rendezvous_wire import Discover, Discovered, Register, Registered, Status, Unregister
from libmesh.net.underlay import Underlay
from libmesh.peers import PeerId
from libmesh.wire_pieces import WireError

log = logging.getLogger(__name__)

MAX_REQUESTS = 32
"""Requests on one stream; then it is closed."""

REQUEST_LIMIT = 10.0
"""Seconds that a client has for each of its requests, and a point for each of its answers."""

MAX_FOUND = 64
"""Peers that a client takes from one point at a time; the rest it does not ask for."""


class RendezvousPoint:
    """The rendezvous point of one node.

    Args:
        underlay: the adapter.
        limits: what is kept at most.
        open_to_all: serve whoever comes, not members only.
    """

    def __init__(
        self, underlay: Underlay, limits: RendezvousLimits | None = None, *, open_to_all: bool = False
    ) -> None:
        self.desk = RendezvousDesk(limits)
        underlay.set_handler(wire.PROTOCOL, self._serve, admitted_only=not open_to_all)

    async def _serve(self, stream: Stream) -> None:
        try:
            for _ in range(MAX_REQUESTS):
                with trio.fail_after(REQUEST_LIMIT):
                    request = wire.decode_request(await receive_frame(stream, wire.MAX_REQUEST))
                    if (answer := self._answer(stream.peer, request)) is not None:
                        await stream.send_all(answer)
        except (WireError, trio.TooSlowError) as exc:  # also when the client is done
            log.debug("no more requests from %s: %s", stream.peer, str(exc) or "too slow")
            stream.reset()

    def _answer(self, peer: PeerId, request: Register | Unregister | Discover) -> bytes | None:
        now = trio.current_time()
        match request:
            case Register(namespace, record, lasts):
                return wire.encode_registered(self._register(peer, namespace, record, lasts, now))
            case Unregister(namespace):
                self.desk.unregister(peer, namespace)
                return None
            case Discover(namespace, limit, cookie):
                return self._discover(namespace, limit, cookie, now)

    def _register(self, peer: PeerId, namespace: str, record: bytes, lasts: int, now: float) -> Registered:
        if not wire.is_namespace(namespace):
            return Registered(Status.INVALID_NAMESPACE)
        try:
            signer, addresses = wire.open_record(record)
        except WireError as exc:
            log.debug("%s is not registered: %s", peer, exc)
            return Registered(Status.INVALID_RECORD)
        if signer != peer or not addresses:
            return Registered(Status.INVALID_RECORD)
        granted = self.desk.register(peer, namespace, record, lasts, now)
        return Registered(Status.UNAVAILABLE) if granted is None else Registered(Status.OK, int(granted))

    def _discover(self, namespace: str, limit: int, cookie: bytes, now: float) -> bytes:
        try:
            after = wire.decode_cookie(cookie)
        except WireError:
            return wire.encode_discovered(namespace, Discovered(Status.INVALID_COOKIE))
        if not wire.is_namespace(namespace):
            return wire.encode_discovered("", Discovered(Status.INVALID_NAMESPACE))
        found = self.desk.discover(namespace, limit, after, now)
        last = found[-1].number if found else after
        answer = Discovered(Status.OK, tuple(r.record for r in found), wire.encode_cookie(last))
        return wire.encode_discovered(namespace, answer, tuple(int(r.ends - now) for r in found))


class RendezvousClient:
    """Leaves word at points, and asks there.

    Args:
        underlay: the adapter.
        seed: this node's Ed25519 seed; signs what it says.
        wall_clock: seconds since the epoch, for the order of what it says.
    """

    def __init__(
        self, underlay: Underlay, seed: bytes, *, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._underlay, self._seed, self._wall_clock = underlay, seed, wall_clock

    async def register(self, point: PeerId, namespace: str, addresses: tuple[str, ...]) -> float:
        """See `Network.register`."""
        record = wire.make_record(self._seed, int(self._wall_clock() * 1000), addresses)
        try:
            with trio.fail_after(REQUEST_LIMIT):
                async with await self._underlay.open_stream(point, wire.PROTOCOL) as stream:
                    await stream.send_all(wire.encode_request(Register(namespace, record)))
                    answer = wire.decode_registered(await receive_frame(stream, wire.MAX_ANSWER))
        except (trio.TooSlowError, trio.BrokenResourceError, WireError) as exc:
            raise NetworkError(f"the rendezvous point did not answer: {str(exc) or 'too slow'}") from exc
        if answer.status != Status.OK:
            raise NetworkError(f"the rendezvous point refused: {answer.status}")
        return float(answer.lasts)

    async def discover(self, point: PeerId, namespace: str) -> dict[PeerId, tuple[str, ...]]:
        """See `Network.discover`."""
        found: dict[PeerId, tuple[str, ...]] = {}
        try:
            with trio.fail_after(REQUEST_LIMIT):
                async with await self._underlay.open_stream(point, wire.PROTOCOL) as stream:
                    cookie = b""
                    while len(found) < MAX_FOUND:
                        await stream.send_all(wire.encode_request(Discover(namespace, 0, cookie)))
                        answer = wire.decode_discovered(await receive_frame(stream, wire.MAX_ANSWER))
                        before = len(found)
                        found |= _readable(answer.records)
                        cookie = answer.cookie
                        if len(found) == before or not cookie:
                            break
        except (trio.TooSlowError, trio.BrokenResourceError, WireError) as exc:
            if not found:
                raise NetworkError(f"the rendezvous point did not answer: {str(exc) or 'too slow'}") from exc
        found.pop(self._underlay.peer, None)
        return dict(list(found.items())[:MAX_FOUND])


def _readable(records: tuple[bytes, ...]) -> dict[PeerId, tuple[str, ...]]:
    """What of an answer can be believed: what its peer has signed."""
    found: dict[PeerId, tuple[str, ...]] = {}
    for record in records:
        try:
            peer, addresses = wire.open_record(record)
        except MeshError as exc:
            log.debug("a rendezvous point passed on what nobody signed: %s", exc)
            continue
        found[peer] = addresses
    return found
