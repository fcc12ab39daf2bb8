"""Getting in, and letting in: whom we are connected to with proof on both sides, and the ways to reach the others.

Drives the conversations of `hello.py` on both sides, drops whoever does not prove itself in time, and, while nobody
is connected, tries the contacts that our invite named.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from libmesh import hello, syncing
from libmesh.alarm import Alarm
from libmesh.core import membership_io as io
from libmesh.core.credentials import Credential
from libmesh.core.membership import Membership
from libmesh.core.ranges import check_counts, check_numbers
from libmesh.core.ways import is_private
from libmesh.errors import AdmissionRefused, MeshError, PeerUnreachable, ServiceRefused
from libmesh.net.base import Network, Stream
from libmesh.peers import Path, PeerId, PeerState, PeerView
from libmesh.refusals import Refusals
from libmesh.wire_pieces import WireError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """Times of admission, in seconds.

    Attributes:
        hello_limit: how long a hello may take, and how long a stranger may stay without one.
        seek_min, seek_max: between attempts to reach our invite's contacts while we know nobody; doubling.
        max_followers: peers that only follow and are connected to this one; more are refused as "busy", and go elsewhere.
        offline: dial only addresses of private networks, and those that our invite named. What others announce beyond
            that is passed over, and so are names, which somebody would have to be asked about.
    """

    hello_limit: float = 10.0
    seek_min: float = 0.5
    seek_max: float = 30.0
    max_followers: int = 1024
    offline: bool = False

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the field, when a value cannot work."""
        check_numbers(self, "hello_limit", "seek_min", "seek_max")
        check_counts(self, "max_followers", least=0)


class Admission:
    """Who is admitted, and how that comes about.

    Attributes:
        attributes: what this node says of itself in a hello.
        refusal: why no contact has let this node in; `None` while somebody does, or where none was reached.

    Args:
        network: the transport.
        membership: read for digests and addresses.
        credential: ours.
        agent: name and version of the application.
        config: the times.
        now: seconds since the epoch.
        tell: passes an event to the membership machine.
        connect: finds a path to a peer.
    """

    def __init__(
        self,
        network: Network,
        membership: Membership,
        *,
        credential: Credential,
        agent: str,
        config: AdmissionConfig,
        now: Callable[[], float],
        tell: Callable[[io.Event], None],
        connect: Callable[[PeerId, Sequence[str]], Awaitable[object]],
    ) -> None:
        self._network, self._membership, self._credential = network, membership, credential
        self._find_path = connect
        self._agent, self._config, self._now, self._tell = agent, config, now, tell
        self._contacts: dict[PeerId, tuple[str, ...]] = {}
        self._admitted: dict[PeerId, Credential] = {}
        self._followers: dict[PeerId, tuple[hello.Greeted, float]] = {}
        self._ending = Alarm()
        self.attributes = b""
        self.refusal: AdmissionRefused | None = None
        self._refusals = Refusals()
        self._lonely = trio.Event()
        self._answering: dict[PeerId, trio.Lock] = {}
        self._waiting: dict[PeerId, trio.CancelScope] = {}
        self._connecting: dict[PeerId, trio.Lock] = {}

    def credential_of(self, peer: PeerId) -> Credential | None:
        """What an admitted, connected peer has shown; `None` for all others."""
        return self._admitted.get(peer)

    def followers(self, path_of: Callable[[PeerId], Path | None]) -> tuple[PeerView, ...]:
        """The connected peers that only follow, sorted: nobody else's table has them."""
        return tuple(
            PeerView(
                peer=peer,
                scope=said.credential.scope,
                state=PeerState.ALIVE,
                services=(),
                attributes=said.attributes,
                addresses=(),
                path=path_of(peer),
                since_unix=since,
                incarnation=0,
            )
            for peer, (said, since) in sorted(self._followers.items())
            if not self._membership.believes(peer)
        )

    @property
    def anybody(self) -> bool:
        """Whether any peer is connected and admitted."""
        return bool(self._admitted)

    def allowed(self, peer: PeerId, addresses: Sequence[str]) -> tuple[str, ...]:
        """Those of a peer's addresses that may be dialled: all, unless this node is offline."""
        given = self._contacts.get(peer, ())
        return tuple(a for a in addresses if not self._config.offline or a in given or is_private(a))

    def add_contacts(self, contacts: Sequence[tuple[PeerId, tuple[str, ...]]], *, given: bool = True) -> None:
        """Remember ways into the mesh. `given`: by a person, so that they may be dialled whatever they are."""
        for peer, addresses in contacts:
            if isinstance(addresses, str):
                raise TypeError(f"addresses are a tuple of texts, not the text {addresses!r}")
            if peer != self._network.peer:
                addresses = addresses if given else self.allowed(peer, addresses)
                self._contacts[peer] = addresses
                self._tell(io.ContactNamed(peer, addresses))
        self._lonely.set()

    def admitted_with(self, kind: Callable[[Credential], bool]) -> list[PeerId]:
        """The admitted peers whose credential is of this kind."""
        return [peer for peer, credential in self._admitted.items() if kind(credential)]

    def renew(self, credential: Credential) -> None:
        """Show this one from now on."""
        self._refusals.ask_again()
        self._credential = credential

    def learned(self, peer: PeerId, credential: Credential) -> None:
        """`peer` announces itself with `credential` now, which is good: it may be another one than it came in with."""
        self._refusals.admitted(peer)
        if peer in self._admitted:
            self._admitted[peer] = credential
            self._ending.moved()

    def slept(self) -> None:
        """The date has jumped: memberships may have ended."""
        self._ending.moved()

    def revoke(self, peer: PeerId) -> None:
        """Treat `peer` as a stranger from now on."""
        self._admitted.pop(peer, None)
        self._followers.pop(peer, None)

    def disconnected(self, peer: PeerId) -> None:
        """The last connection to `peer` is gone."""
        if (scope := self._waiting.pop(peer, None)) is not None:
            scope.cancel()
        self._admitted.pop(peer, None)
        self._followers.pop(peer, None)
        self._tell(io.Disconnected(peer))
        if not self._admitted:
            self._lonely.set()

    def _greeting(self, peer: PeerId) -> hello.Greeting:
        return hello.Greeting(
            self._agent,
            self._credential,
            self._membership,
            self._now(),
            following=self._membership.following,
            attributes=self.attributes,
            room=peer in self._followers or len(self._followers) < self._config.max_followers,
        )

    async def connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Connect to `peer` and be admitted. Raises `PeerUnreachable` or `AdmissionRefused`.

        Whoever asks while that is under way waits for its outcome: the other side takes one hello of a peer at a time, and
        a second one would end the connection for the first. If cancelled within a hello, the connection is closed.
        Once our own membership has ended, nobody is bothered any more; nor is, for a while, who has told us that it is revoked.
        """
        if peer == self._network.peer:
            raise PeerUnreachable(f"the peer {peer} is this node itself")
        self._check_not_ended(peer)
        self._refusals.check(peer, self._now())
        async with _turn(self._connecting, peer):
            await self._find_path(peer, self.allowed(peer, addresses))
            if peer not in self._admitted:
                await self._say_hello(peer)

    def _check_not_ended(self, peer: PeerId) -> None:
        end = self._credential.not_after_unix
        if end is not None and self._now() > end:
            raise AdmissionRefused(
                "this node's membership has ended; ask for a new invite", reason="expired", peer=peer
            )

    async def _say_hello(self, peer: PeerId) -> None:
        known, opened, shown = peer in self._admitted, None, self._credential
        try:
            with trio.fail_after(self._config.hello_limit):
                opened = await self._network.open_stream(peer, hello.PROTOCOL)
                async with opened as stream:
                    await self._admit(stream, await hello.greet(stream, self._greeting(peer)), dialled=True)
        except AdmissionRefused as exc:
            if shown is self._credential:
                self._refusals.refused_by(peer, exc, self._now())
            await self._network.disconnect(peer)
            raise
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await self._network.disconnect(peer)
            raise
        except (ServiceRefused, WireError, trio.BrokenResourceError, trio.TooSlowError) as exc:
            if not (known and opened is not None and opened.connection_lost):
                await self._network.disconnect(peer)
            why = "it did not answer in time" if isinstance(exc, trio.TooSlowError) else str(exc)
            raise PeerUnreachable(
                f"the peer {peer} was reached, but the hello failed: {why}", {"hello": why}
            ) from exc

    async def answer_hello(self, stream: Stream) -> None:
        """Serve an inbound hello; one of a peer at a time.

        Another one waits, for it may overtake the last words of the one before; a third is reset.
        """
        lock = self._answering.get(stream.peer)
        if lock is not None and lock.statistics().tasks_waiting:
            stream.reset()
            return
        async with _turn(self._answering, stream.peer):
            await self._answer(stream)

    async def _answer(self, stream: Stream) -> None:
        known = stream.peer in self._admitted
        try:
            with trio.fail_after(self._config.hello_limit):
                await self._admit(
                    stream, await hello.answer(stream, self._greeting(stream.peer)), dialled=False
                )
        except AdmissionRefused as exc:
            self._refusals.refused(stream.peer, str(exc))
            await self._network.disconnect(stream.peer)
        except (WireError, trio.BrokenResourceError, trio.TooSlowError) as exc:
            log.info("the peer %s failed to say hello: %s", stream.peer, str(exc) or "too slow")
            if not (known and stream.connection_lost):
                await self._network.disconnect(stream.peer)

    async def _admit(self, stream: Stream, said: hello.Greeted, *, dialled: bool) -> None:
        peer = stream.peer
        if peer not in self._admitted and (path := self._network.path(peer)) is not None:
            log.info("path to %s: %s %s", peer, path.kind.value, path.address)
        self._admitted[peer] = said.credential
        self._refusals.admitted(peer)
        self.refusal = None
        if said.following:
            self._followers[peer] = (said, self._now())
        self._ending.moved()
        self._network.admit(peer)
        events = await syncing.exchange(stream, self._membership, self._tell, opener=dialled)
        self._tell(io.Connected(peer))
        for event in events:
            self._tell(event)
        syncing.require_good_faith(events, self._membership)

    async def expect_hello(self, peer: PeerId) -> None:
        """Drop an inbound connection whose peer does not say hello in time."""
        with trio.CancelScope() as scope:
            self._waiting[peer] = scope
            await trio.sleep(self._config.hello_limit)
        if self._waiting.get(peer) is scope:
            del self._waiting[peer]
        if scope.cancelled_caught:
            return
        if peer not in self._admitted and self._network.path(peer) is not None:
            log.info("dropping the peer %s: it said no hello", peer)
            await self._network.disconnect(peer)

    async def dial(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Do what the membership machine's `Dial` asks."""
        try:
            await self.connect(peer, addresses)
        except MeshError as exc:
            log.debug("%s", exc)
            self._tell(io.DialFailed(peer))

    async def greet_again(self) -> None:
        """Show our credential to all who are connected. Those that do not take it are connected no more."""
        for peer in list(self._admitted):
            await self.greet(peer)

    async def greet(self, peer: PeerId) -> None:
        """Say hello once more to a peer that may take us for a member no longer. Nothing if we do not know it either.

        One at a time, like `connect`. If the connection that carries it is lost and there is another one, it is said over
        that, once.
        """
        async with _turn(self._connecting, peer):
            for _ in range(2):
                if peer not in self._admitted or self._network.path(peer) is None:
                    return
                try:
                    await self._say_hello(peer)
                except MeshError as exc:
                    log.info("%s", exc)
                else:
                    return

    async def expire_loop(self) -> None:
        """Cut off whoever's membership ends. No table has those who only follow, so nothing else would."""
        while True:
            await self._ending.due(
                lambda: min((c.taken_until_unix for c in self._admitted.values()), default=None), self._now
            )
            for peer in self.admitted_with(lambda credential: credential.taken_until_unix <= self._now()):
                log.info("dropping the peer %s: its membership has ended", peer)
                self.revoke(peer)
                await self._network.disconnect(peer)

    async def seek(self) -> None:
        """Try each contact once, until one admits us. Raises what `join` raises if none does."""
        self._refusals.ask_again()
        await self._seek()

    async def _seek(self) -> None:
        refused: MeshError | None = None
        for peer, addresses in list(self._contacts.items()):
            try:
                await self.connect(peer, addresses)
            except AdmissionRefused as exc:
                refused = exc
            except MeshError as exc:
                refused = refused or exc
            else:
                return
        self.refusal = refused if isinstance(refused, AdmissionRefused) and not self._admitted else None
        if refused is not None:
            raise refused

    async def seek_loop(self) -> None:
        """While nobody is connected, try the contacts, with back-off."""
        delay = self._config.seek_min
        told = ""
        while True:
            await self._lonely.wait()
            if self._admitted or not self._contacts:
                self._lonely = trio.Event()
                delay = self._config.seek_min
                continue
            await trio.sleep(delay)
            delay = min(2 * delay, self._config.seek_max)
            if self._admitted:
                continue
            try:
                await self._seek()
            except MeshError as exc:
                log.log(logging.DEBUG if str(exc) == told else logging.INFO, "still alone: %s", exc)
                told = str(exc)


@asynccontextmanager
async def _turn(locks: dict[PeerId, trio.Lock], peer: PeerId) -> AsyncIterator[None]:
    """Be the only one who does something with `peer`; keeps no lock that nobody uses."""
    lock = locks.setdefault(peer, trio.Lock())
    try:
        async with lock:
            yield
    finally:
        use = lock.statistics()
        if not use.locked and not use.tasks_waiting:
            locks.pop(peer, None)
