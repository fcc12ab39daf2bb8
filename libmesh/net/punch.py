"""Hole punching: a direct TCP connection through the NATs of both sides (DCUtR).

Source: libp2p/specs, relay/DCUtR.md. Over the relayed connection both sides tell where they think that they are seen, and
agree on a moment. Then each dials the other *from the port that it listens on*: a router that keeps ports, or maps a port
to the same outside port for whoever it talks to, lets the other's SYN in because ours has gone out before. The two SYNs
make one connection that neither has accepted (RFC 9293, 3.5, "simultaneous open"), or one side's listener accepts. So who
starts the handshake is agreed on beforehand: the side that did not open the stream.

A SYN that meets the other's router before that side's own has left may be answered by RST; such a dial is repeated within
the attempt, as the one that is dropped in silence is by the kernel.

The side that starts the handshake chooses among several connections that came about, by ending the others. The other side
must not choose, too: each might end what the other one keeps.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from math import inf

import trio

from libmesh.core.ways import is_private
from libmesh.errors import MeshError, NetworkError
from libmesh.framing import receive_frame
from libmesh.net import relay_wire as wire
from libmesh.net import tcp
from libmesh.net.base import Stream
from libmesh.net.lines import HEADER, encode_line
from libmesh.net.relay_wire import PunchAddresses, PunchNow
from libmesh.net.underlay import Underlay
from libmesh.peers import Path, PathKind, PeerId
from libmesh.wire_pieces import WireError

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""The specification's: the first one may have measured a wrong round trip."""

DIAL_TIME = 4.0
"""Seconds of one attempt's dials and handshakes: two of the kernel's own repetitions of a SYN, after 1 and 3 s."""

SYNC_LIMIT = 5.0
"""Seconds that the other side has for each message."""

QUIET_TIME = 1.0
"""Seconds without a byte after which the side that should wait for the handshake starts it.

Our dial may have met the other side's listener, before its own dial left or because nothing is in its way. A listener that
knows of the punch starts the handshake (`take`). Any other one waits, in silence or with no more than multistream's
header. A side that means to start proposes at once, and is heard within a round trip."""

SETTLE_TIME = 1.0
"""Seconds that the side which does not choose leaves further connections after the first one."""

MAX_PUNCHES = 32
"""Punches at a time that others asked for. More are refused: each costs a burst of SYNs."""

_REPEAT = 0.1
_BETWEEN = 0.2  # seconds beyond a round trip: the other side's part of an attempt ends later than ours
_HEADER_LINE = encode_line(HEADER)
_REPEATED = {errno.ECONNREFUSED, errno.ECONNRESET, errno.EADDRNOTAVAIL, errno.EADDRINUSE}


@dataclass(slots=True)
class _Attempt:
    """One attempt under way: where its connections come from, and where accepted ones are put, and taken."""

    peer: PeerId
    initiator: bool
    addresses: Sequence[str]
    accepted: trio.MemorySendChannel[trio.SocketStream]
    taken: trio.MemoryReceiveChannel[trio.SocketStream]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    left: int = 0  # dials that have not ended
    failures: dict[str, str] = field(default_factory=dict)
    path: Path | None = None

    def end_soon(self) -> None:
        """Wait a little for what is under way, and for nothing else."""
        self.scope.deadline = min(self.scope.deadline, trio.current_time() + SETTLE_TIME)


@dataclass(slots=True)
class _Answer:
    """A punch under way that the other side asked for, and what its last attempt came to."""

    over: trio.Event = field(default_factory=trio.Event)
    failure: str = ""


class _Declined(NetworkError):
    """The other side does not take part in an attempt."""


class Puncher:
    """Punches holes from one node, and answers others who do.

    Args:
        underlay: the adapter.
        guesses: multiaddrs at which others may see this node though it is not known to be reachable there: with its
            router's outside address. Told to the other side before those of `Underlay.addresses`.
        private_only: dial nothing beyond private networks.
    """

    def __init__(
        self,
        underlay: Underlay,
        *,
        guesses: Callable[[], Sequence[str]] = lambda: (),
        private_only: bool = False,
    ) -> None:
        self._underlay, self._private_only = underlay, private_only
        self.guesses = guesses
        self._running: dict[PeerId, trio.Event] = {}
        self._answering: dict[PeerId, _Answer] = {}
        self._attempts: list[_Attempt] = []
        underlay.set_handler(wire.DCUTR, self._serve)

    def take(self, stream: trio.SocketStream) -> bool:
        """Offer a connection that the listener accepted. Whether it belongs to a punch, which then owns it."""
        if not self._attempts:
            return False
        address = tcp.remote_address(stream)
        for attempt in self._attempts:
            if address in attempt.addresses:
                try:
                    attempt.accepted.send_nowait(stream)
                except (trio.WouldBlock, trio.BrokenResourceError):
                    return False
                return True
        return False

    # ── the side that asks ───────────────────────────────────────────────────────────────────────────────────────

    async def punch(self, peer: PeerId) -> Path:
        """See `Network.punch`. One at a time for each peer; who asks meanwhile waits for the outcome."""
        if (running := self._running.get(peer)) is not None:
            await running.wait()
            return self._direct(peer) or self._give_up("the punch under way came to nothing")
        event = self._running[peer] = trio.Event()
        try:
            return await self._punch(peer)
        finally:
            del self._running[peer]
            event.set()

    async def _punch(self, peer: PeerId) -> Path:
        failure, declined = "", ""
        for _ in range(ATTEMPTS):
            if failure:
                known = self._underlay.path(peer)
                await trio.sleep((known.rtt if known and known.rtt else 0.0) + _BETWEEN)
            if (path := self._direct(peer)) is not None:
                return path
            try:
                stream = await self._underlay.open_stream(peer, wire.DCUTR, kind=PathKind.RELAYED)
            except MeshError as exc:
                reason = failure or declined or f"there is no relayed connection to punch over: {exc}"
                raise NetworkError(reason) from exc
            try:
                return await self._punch_once(peer, stream)
            except _Declined as exc:
                declined = str(exc)
                log.debug("hole punch to %s: %s", peer, exc)
            except NetworkError as exc:
                failure = str(exc)
                log.debug("hole punch to %s: %s", peer, exc)
            finally:
                stream.reset()
            if (answering := self._answering.get(peer)) is not None:  # it refused because it asks itself
                await answering.over.wait()
                failure = answering.failure or failure
        return self._direct(peer) or self._give_up(failure or declined)  # what dials came to says more

    async def _punch_once(self, peer: PeerId, stream: Stream) -> Path:
        try:
            with trio.fail_after(SYNC_LIMIT):
                started = trio.current_time()
                await stream.send_all(wire.encode_punch(PunchAddresses(self._own_addresses())))
                answer = wire.decode_punch(await receive_frame(stream, wire.MAX_MESSAGE))
                round_trip = trio.current_time() - started
                if not isinstance(answer, PunchAddresses):
                    raise WireError("no addresses")
        except trio.TooSlowError as exc:
            raise NetworkError("the peer did not answer in time") from exc
        except (MeshError, trio.BrokenResourceError) as exc:
            raise _Declined(f"the peer does not take part: {exc}") from exc

        async def give_the_sign() -> None:
            with suppress(
                MeshError, trio.BrokenResourceError
            ):  # without it nothing will come; that is told then
                await stream.send_all(wire.encode_punch(PunchNow()))
            await trio.sleep(min(round_trip / 2, DIAL_TIME / 2))

        with self._attempt(peer, answer.addresses, initiator=False) as attempt:
            return await self._meet(attempt, begin=give_the_sign)

    # ── the side that is asked ───────────────────────────────────────────────────────────────────────────────────

    async def _serve(self, stream: Stream) -> None:
        peer = stream.peer
        # Both ask at once: the one with the lower id goes on, and the other one finds its request refused.
        ours_goes_on = peer in self._running and self._underlay.peer < peer
        if ours_goes_on or peer in self._answering or len(self._answering) >= MAX_PUNCHES:
            stream.reset()
            return
        answering = self._answering[peer] = _Answer()
        try:
            with trio.fail_after(SYNC_LIMIT) as syncing:
                request = wire.decode_punch(await receive_frame(stream, wire.MAX_MESSAGE))
                if not isinstance(request, PunchAddresses):
                    raise WireError("no addresses")
                # The other side's dial may be here before its sign, which comes by another way.
                with self._attempt(peer, request.addresses, initiator=True) as attempt:
                    await stream.send_all(wire.encode_punch(PunchAddresses(self._own_addresses())))
                    if not isinstance(
                        wire.decode_punch(await receive_frame(stream, wire.MAX_MESSAGE)), PunchNow
                    ):
                        raise WireError("no sign to start")
                    syncing.deadline = inf
                    try:
                        await self._meet(attempt)
                    except NetworkError as exc:
                        answering.failure = str(exc)
                        raise
        except (WireError, NetworkError, trio.BrokenResourceError, trio.TooSlowError) as exc:
            log.debug("hole punch of %s: %s", peer, str(exc) or "too slow")
            stream.reset()
        finally:
            del self._answering[peer]
            answering.over.set()

    # ── both ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _own_addresses(self) -> tuple[str, ...]:
        found = dict.fromkeys((*self.guesses(), *self._underlay.addresses()))
        return tuple(a for a in found if "/p2p-circuit" not in a)[: wire.MAX_PUNCH_ADDRESSES]

    def _direct(self, peer: PeerId) -> Path | None:
        path = self._underlay.path(peer)
        return path if path is not None and path.kind is not PathKind.RELAYED else None

    @staticmethod
    def _give_up(reason: str) -> Path:
        raise NetworkError(reason or "no address to punch to")

    @contextmanager
    def _attempt(self, peer: PeerId, addresses: Sequence[str], *, initiator: bool) -> Iterator[_Attempt]:
        """What the listener accepts from `addresses` belongs to the attempt, until the end of the block."""
        targets = _dialable(addresses, self._underlay.addresses())
        if self._private_only:
            targets = tuple(address for address in targets if is_private(address))
        send, receive = trio.open_memory_channel[trio.SocketStream](len(targets))
        attempt = _Attempt(peer, initiator, targets, send, receive)
        self._attempts.append(attempt)
        try:
            yield attempt
        finally:
            self._attempts.remove(attempt)
            send.close()
            for stream in _rest(receive):
                stream.socket.close()

    async def _meet(
        self, attempt: _Attempt, begin: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
    ) -> Path:
        """Dial all addresses at once from our own port after `begin`, and take what our listener accepts from them."""
        if not attempt.addresses:
            raise NetworkError("the peer names no address that could be dialled")
        with trio.move_on_after(DIAL_TIME):
            async with trio.open_nursery() as nursery:
                attempt.scope = nursery.cancel_scope
                nursery.start_soon(self._take_accepted, attempt, nursery)
                await begin()
                attempt.left = len(attempt.addresses)
                for address in attempt.addresses:
                    nursery.start_soon(self._dial, attempt, address)
        if (path := attempt.path or self._direct(attempt.peer)) is not None:
            return path
        reasons = (
            f"{address}: {attempt.failures.get(address, 'no answer')}" for address in attempt.addresses
        )
        raise NetworkError("; ".join(reasons))

    async def _take_accepted(self, attempt: _Attempt, nursery: trio.Nursery) -> None:
        async for stream in attempt.taken:
            finish = partial(self._finish, starts=attempt.initiator)
            nursery.start_soon(finish, attempt, stream, tcp.remote_address(stream))

    async def _dial(self, attempt: _Attempt, address: str) -> None:
        while True:
            try:
                stream = await tcp.dial_from(self._underlay.port, address)
            except (OSError, ValueError) as exc:
                attempt.failures[address] = _words(exc)
                if not isinstance(exc, OSError) or exc.errno not in _REPEATED:
                    break
                await trio.sleep(_REPEAT)
            else:
                starts = attempt.initiator or not await _is_spoken_to(stream)
                await self._finish(attempt, stream, address, starts=starts)
                break
        attempt.left -= 1
        if not attempt.left:  # nothing more can come of it but what is accepted soon
            attempt.end_soon()

    async def _finish(
        self, attempt: _Attempt, stream: trio.SocketStream, address: str, *, starts: bool
    ) -> None:
        try:
            path = await self._underlay.adopt(
                stream,
                peer=attempt.peer,
                initiator=starts,
                address=address,
                kind=PathKind.PUNCHED,
            )
        except NetworkError as exc:
            attempt.failures[address] = str(exc)
            return
        attempt.path = attempt.path or path
        if attempt.initiator:
            attempt.scope.cancel()
        else:
            attempt.end_soon()


def _words(exc: Exception) -> str:
    if (
        isinstance(exc, OSError) and exc.errno == errno.EADDRNOTAVAIL
    ):  # the same four numbers cannot be used twice
        return "this node has another connection to there"
    return tcp.reason(exc)


async def _is_spoken_to(stream: trio.SocketStream) -> bool:
    """Whether the other side begins to negotiate within `QUIET_TIME`. Closes the stream if cancelled."""
    try:
        with trio.move_on_after(QUIET_TIME):
            while True:
                said = await stream.socket.recv(len(_HEADER_LINE) + 1, socket.MSG_PEEK)
                if not said or len(said) > len(_HEADER_LINE) or not _HEADER_LINE.startswith(said):
                    return True  # or it has hung up: the handshake will tell
                await trio.sleep(_REPEAT)
    except OSError:
        return True
    except BaseException:
        stream.socket.close()
        raise
    return False


def _rest(channel: trio.MemoryReceiveChannel[trio.SocketStream]) -> list[trio.SocketStream]:
    """What nobody has taken out of the channel, which is closed."""
    rest: list[trio.SocketStream] = []
    while True:
        try:
            rest.append(channel.receive_nowait())
        except (trio.WouldBlock, trio.EndOfChannel):
            channel.close()
            return rest


def _dialable(addresses: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    """Those of `addresses` that a dial from our own port may lead somewhere: TCP, by IP address, and not our own.

    Loopback addresses only when we have nothing else ourselves: they would lead to this machine.
    """
    ours = {where for where in map(_ip_and_port, own) if where is not None}
    only_loopback = all(ipaddress.ip_address(host).is_loopback for host, _ in ours)
    versions = {ipaddress.ip_address(host).version for host, _ in ours}
    found: dict[str, None] = {}
    for address in addresses[: wire.MAX_PUNCH_ADDRESSES]:
        where = _ip_and_port(address)
        if where is None or where in ours or not 0 < where[1] < 65536:
            continue
        ip = ipaddress.ip_address(where[0])
        # The unspecified address leads to this machine, and an IPv4 address in IPv6's clothes wherever that one does.
        if ip.is_multicast or ip.is_unspecified or getattr(ip, "ipv4_mapped", None) is not None:
            continue
        if ip.version in versions and (only_loopback or not ip.is_loopback):
            found[tcp.multiaddr_of(*where)] = None
    return tuple(found)


def _ip_and_port(address: str) -> tuple[str, int] | None:
    try:
        host, port = tcp.host_and_port(address)
        return str(ipaddress.ip_address(host)), port
    except ValueError:
        return None
