"""The one loop: turns what happens into events of the machines, and their effects into deeds.

Everything that is decided is decided in `core/`; everything that moves bytes is behind `net/`; this file only carries
between the two.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import trio

from libmesh import following, hello, probing, syncing, wire
from libmesh.admission import Admission
from libmesh.alarm import Alarm
from libmesh.clock import Clock
from libmesh.config import MeshConfig
from libmesh.core import membership as core
from libmesh.core import membership_io as io
from libmesh.core.announcement import Announcement, Record
from libmesh.core.credentials import Authority, Credential, Revocation
from libmesh.core.ways import is_circuit, to_announce
from libmesh.errors import AdmissionRefused, PeerUnreachable, ServiceRefused
from libmesh.following import Following, Herald
from libmesh.identity import SecretKey
from libmesh.net import base as net
from libmesh.net.base import Network
from libmesh.pathing import Pathing
from libmesh.peers import PeerId, PeerState, Service, View
from libmesh.posts import Posts
from libmesh.probing import Prober
from libmesh.resuming import Resumption
from libmesh.syncing import Syncing
from libmesh.watching import Watchers
from libmesh.wire_pieces import WireError

log = logging.getLogger(__name__)

_MAX_FOREIGN = 256
"""Relays that are remembered not to be members; then they are asked anew."""


class Driver:
    """Runs the machines of one peer over a network.

    Args:
        network: the transport, running.
        key: this peer's identity.
        authority: what lets us be a member.
        config: times and limits.
        follow: announce nothing; see `Driver.take_part`.
        wall_clock: seconds since the epoch; read once.
        rng: for everything that is left to chance.
    """

    def __init__(
        self,
        network: Network,
        key: SecretKey,
        authority: Authority,
        config: MeshConfig,
        *,
        follow: bool = False,
        wall_clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self.network = network
        self._config, self._rng, self._key = config, rng, key
        self._clock = Clock(wall_clock)
        self.now = self._clock.now
        self.credential = authority.admit(key.public)
        self.membership = core.Membership(
            Announcement(
                peer=key.peer,
                credential=self.credential,
                incarnation=int(self.now() * 1000),
                sequence=0,
                addresses=to_announce(network.addresses(), wire.MAX_ADDRESSES),
            ),
            mesh_id=authority.mesh_id,
            seal=partial(wire.seal, seed=key.seed),
            config=config.membership,
            following=follow,
        )
        self.pathing = Pathing(
            network,
            addresses_of=self._ways_to,
            approach=self.approach,
            changed=lambda _: self.watchers.tell(),
            wall_clock=self.now,
            config=config.paths,
            rng=rng,
        )
        self.admission = Admission(
            network,
            self.membership,
            credential=self.credential,
            agent=config.agent,
            config=config.admission,
            now=self.now,
            tell=self.handle,
            connect=self.pathing.connect,
        )
        pace = replace(config.liveness, interval=following.PROBE_INTERVAL) if follow else config.liveness
        self._prober = Prober(network, self.membership, self.handle, pace, rng, self._ways_to)
        self._syncing = Syncing(network, self.membership, self.handle)
        self._herald = Herald(self.membership)
        self._following = Following(network, self.membership, self._hear)
        self.resumption = Resumption(network, self.reach, config.resume)
        self.posts = Posts(network, authority.mesh_id, self._is_live_member)
        self._topic = f"libmesh/1/{authority.mesh_id}/peers"
        self._said: tuple[tuple[Service, ...], bytes] = ((), b"")
        self.watchers = Watchers(lambda: self.view)
        self._foreign: set[PeerId] = set()
        self._alarm = Alarm()
        self._tasks: trio.Nursery
        self._outbox, self._outgoing = trio.open_memory_channel[bytes](256)

    @property
    def view(self) -> View:
        """The mesh as this peer sees it now."""
        return replace(
            self.membership.view(self.pathing.path), followers=self.admission.followers(self.pathing.path)
        )

    def say(self, services: tuple[Service, ...], attributes: bytes) -> None:
        """What this peer says of itself from now on, with the addresses that it has then."""
        self._said = (services, attributes)
        self.admission.attributes = attributes
        addresses = to_announce(self.network.addresses(), wire.MAX_ADDRESSES)
        self.handle(io.SelfChanged(services, addresses, attributes))

    def renew(self, authority: Authority) -> None:
        """Be a member by this authority from now on. Gossip tells the others, or, if we follow, another hello."""
        self.credential = authority.admit(self._key.public)
        self.admission.renew(self.credential)
        self.handle(io.Renewed(self.credential))
        if self.membership.following:
            self._tasks.start_soon(self.admission.greet_again)
        self.watchers.tell()

    def recall(self, revocations: Iterable[bytes]) -> None:
        """Take in revocations that were kept."""
        for data in revocations:
            try:
                self.handle(io.RevocationHeard(wire.decode_revocation(data), gossiped=True))
            except WireError as exc:
                log.warning("a kept revocation is damaged: %s", exc)

    def handle(self, event: io.Event) -> None:
        """Tell the membership machine, and do what it asks."""
        if slept := self._clock.woke():
            log.info("this machine slept for %.0f s", slept)
            self.admission.slept()
            self.handle(io.Slept(slept))
        changed = isinstance(event, io.Connected | io.Disconnected)
        for effect in self.membership.handle(event, self.now()):
            match effect:
                case io.Publish(said):
                    self._publish(said)
                case io.Question(peer):
                    self._prober.doubt(peer)
                case io.Revoked(revocation):
                    log.info("a membership was revoked: %s", revocation.link_id.hex())
                    self._herald.revoked(revocation)
                    self._drop_revoked()
                case io.Dial(peer, addresses):
                    self._tasks.start_soon(self.admission.dial, peer, addresses)
                case io.Drop(peer, reason):
                    log.info("dropping the peer %s: %s", peer, reason)
                    self.admission.revoke(peer)
                    self._tasks.start_soon(self.network.disconnect, peer)
                case io.Release(peer):
                    if self.network.idle(peer):
                        log.debug("closing the connection to %s, which is of no more use", peer)
                        self._tasks.start_soon(self.network.disconnect, peer)
                case io.Changed(peer, before, state, reason):
                    changed = True
                    self._herald.notice(peer)
                    self.pathing.peer_moved(peer)
                    if state is PeerState.LEFT:
                        self.resumption.peer_left(peer)
                    if before is not state:
                        _log_change(peer, state, reason)
        if isinstance(event, io.RecordHeard):
            heard = event.record.announcement
            if self.membership.record_of(heard.peer) is event.record:
                self.admission.learned(heard.peer, heard.credential)
        if changed:
            self._prober.update()
            self._following.update()
            self.watchers.tell()
        self._alarm.moved()

    def _drop_revoked(self) -> None:
        """Cut off whoever was admitted with a link that is revoked now, also those who never announced themselves."""
        for peer in self.admission.admitted_with(self.membership.revoked.covers):
            self.admission.revoke(peer)
            self._tasks.start_soon(self.network.disconnect, peer)

    def _publish(self, said: Record | Revocation | io.Suspicion) -> None:
        if isinstance(said, Record) and said.announcement.peer == self.network.peer:
            self._herald.notice(self.network.peer)
        if self.membership.following:
            for peer in self._following.sources:  # they tell the others
                self._tasks.start_soon(self._syncing.compare, peer)
            return
        try:
            self._outbox.send_nowait(wire.encode_gossip(said))
        except trio.WouldBlock:
            log.debug("gossip is not keeping up; an announcement was left to the next digest exchange")

    async def _publish_loop(self) -> None:
        async for data in self._outgoing:
            await self.network.publish(self._topic, data)

    async def _timer_loop(self) -> None:
        while True:
            await self._alarm.due(self.membership.deadline, self.now)
            self.handle(io.Wake())

    async def _event_loop(self, events: trio.MemoryReceiveChannel[net.NetworkEvent]) -> None:
        async for event in events:
            if isinstance(event, net.PeerConnected | net.PathChanged | net.PathSilent | net.PeerDisconnected):
                self.pathing.heard(event)
            match event:
                case net.AddressesChanged():
                    self.say(*self._said)
                    self.pathing.here_changed()
                case net.PeerConnected(peer, _, inbound):
                    if inbound:
                        self._tasks.start_soon(self.admission.expect_hello, peer)
                case net.PathChanged(peer, _, True):
                    self._tasks.start_soon(self.admission.greet, peer)
                case net.PeerDisconnected(peer):
                    self.admission.disconnected(peer)
                case net.Message(topic, author, data) if topic == self._topic:
                    self._hear(data, author)
                case net.Message(topic, author, data) if topic == self.posts.gossip_topic:
                    self.posts.deliver(author, data)

    async def reach(self, peer: PeerId) -> None:
        """Make sure that `peer` is connected and takes us for a member. Raises what `Admission.connect` raises."""
        if self.admission.credential_of(peer) is None:
            await self.admission.connect(peer, self.membership.addresses_of(peer))

    async def approach(self, relay: PeerId, addresses: tuple[str, ...]) -> None:
        """Connect to a relay. One that is a member carries only members, so it is told that we are one."""
        if member := self.membership.believes(relay):
            self._foreign.discard(relay)  # it may not have known of us then
        if relay in self._foreign:
            return
        if member:
            known = self.membership.addresses_of(relay)
            addresses = (*addresses, *(address for address in known if not is_circuit(address)))
        try:
            await self.admission.connect(relay, addresses)
        except (AdmissionRefused, PeerUnreachable) as exc:
            if isinstance(exc, PeerUnreachable) and not isinstance(exc.__cause__, ServiceRefused):
                raise
            if len(self._foreign) >= _MAX_FOREIGN:
                self._foreign.clear()
            self._foreign.add(relay)  # no member, and not to be asked again; it may relay for everybody

    def credential_of(self, peer: PeerId) -> Credential | None:
        """What a peer has announced as its proof of membership, or, if it only follows, shown to us."""
        return self.membership.credential_of(peer) or self.admission.credential_of(peer)

    def _ways_to(self, peer: PeerId) -> tuple[str, ...]:
        return self.admission.allowed(peer, self.membership.addresses_of(peer))

    def _is_live_member(self, peer: PeerId) -> bool:
        return self.membership.believes(peer)

    def _hear(self, data: bytes, teller: PeerId) -> None:
        try:
            said = wire.decode_gossip(data)
        except WireError as exc:
            log.debug("ignored malformed gossip: %s", exc)
            return
        match said:
            case Record():
                self.handle(io.RecordHeard(said, gossiped=True))
            case Revocation():
                self.handle(io.RevocationHeard(said, gossiped=True))
            case io.Suspicion():
                self.handle(io.SuspicionHeard(said))
        if said is not None and self.membership.is_lie(said):
            log.info("dropping the peer %s: it tells what was never good", teller)
            self._tasks.start_soon(self.network.disconnect, teller)

    async def _sync_loop(self) -> None:
        """Anti-entropy: now and then compare with somebody what is known. Also tells of addresses that changed."""
        soon, differed = syncing.HURRY, False
        while True:
            calm = following.SYNC_INTERVAL if self.membership.following else self._config.sync_interval
            await trio.sleep((min(soon, calm) if differed else calm) * self._rng.uniform(0.8, 1.2))
            self.say(*self._said)
            soon = 2 * soon if differed else syncing.HURRY
            connected = [entry.peer for entry in self.view.peers if entry.path is not None]
            differed = bool(connected) and await self._syncing.compare(self._rng.choice(connected))

    def take_part(self) -> None:
        """Follow no longer: announce this node, and hear and be heard like everybody. Harmless to repeat."""
        if self.membership.following:
            self._tasks.start_soon(self.take_part_now)

    async def take_part_now(self) -> None:
        """As `take_part`; returns when gossip is heard."""
        if not self.membership.following:
            return
        await self._subscribe()
        if not self.membership.following:
            return
        self._prober.pace(self._config.liveness)
        self.handle(io.TakePart())
        self._following.update()
        self.say(*self._said)
        for entry in self.view.peers:  # gossip takes a moment to learn of a late subscriber
            if entry.path is not None:
                self._tasks.start_soon(self._syncing.compare, entry.peer)

    async def _subscribe(self) -> None:
        await self.network.subscribe(self._topic)
        await self.network.subscribe(self.posts.gossip_topic)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take part for as long as the context lasts; say goodbye if it ends without an error."""
        self.network.set_handler(hello.PROTOCOL, self.admission.answer_hello, admitted_only=False)
        self.network.set_handler(syncing.PROTOCOL, self._syncing.answer)
        self.network.set_handler(syncing.COMPARE_PROTOCOL, self._syncing.answer_compare)
        self.network.set_handler(following.PROTOCOL, self._herald.answer)
        self.network.set_handler(probing.PROTOCOL, self._prober.answer)
        async with self.network.events() as events, trio.open_nursery() as nursery:
            self._tasks = nursery
            await nursery.start(self.pathing.run)
            await nursery.start(self.resumption.run)
            if not self.membership.following:
                await self._subscribe()
            nursery.start_soon(self._event_loop, events)
            for task in (
                self._publish_loop,
                self._timer_loop,
                self._sync_loop,
                self._prober.run,
                self._following.run,
                self.admission.seek_loop,
                self.admission.expire_loop,
            ):
                nursery.start_soon(task)
            try:
                yield
                if self.admission.anybody:
                    self.handle(io.Leave())
                    await trio.sleep(self._config.farewell)
            finally:
                nursery.cancel_scope.cancel()


def _log_change(peer: PeerId, state: PeerState | None, reason: str) -> None:
    log.info("peer %s is %s: %s", peer, "forgotten" if state is None else state.value, reason)
