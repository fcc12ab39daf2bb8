"""What an application may ask of the mesh that it is in."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import trio

from libmesh import keys, tokens, tunnel, wire
from libmesh.core import membership_io as io
from libmesh.core.announcement import check_said
from libmesh.core.credentials import Authority, Invite, Link
from libmesh.driver import Driver
from libmesh.errors import (
    AdmissionRefused,
    InviteDenied,
    MeshClosed,
    PeerUnreachable,
    ServiceRefused,
)
from libmesh.invites import InviteInfo, check_invite, invites_in, ways_in
from libmesh.net.base import Stream
from libmesh.peers import MeshId, PathKind, PeerId, Reaching, Scope, Service, View
from libmesh.posts import Post, check_topic
from libmesh.resuming import NearTunnel, Resumption
from libmesh.tunnel import ServiceHandler

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Offer:
    service: Service
    handler: tunnel.RawHandler


class Mesh:
    """A mesh that this process is a member of. Obtained from `open_mesh`; use from its trio thread only.

    Once that context is over, it is `closed`: what was known last can still be read, everything else raises `MeshClosed`.
    """

    def __init__(self, driver: Driver, authority: Authority) -> None:
        self._driver, self._authority = driver, authority
        self._offers: dict[str, _Offer] = {}
        self._attributes = b""
        self._tunnelled: Counter[tuple[PathKind, str]] = Counter()
        self.closed = False
        driver.network.set_handler(tunnel.PROTOCOL, self._answer_open)

    # ── what applications ask ────────────────────────────────────────────────────────────────────────────────────

    @property
    def peer(self) -> PeerId:
        """This node's own id."""
        return self._driver.network.peer

    @property
    def mesh_id(self) -> MeshId:
        """The mesh's id."""
        return self._authority.mesh_id

    @property
    def scope(self) -> Scope:
        """What this node may do."""
        return self._driver.credential.scope

    @property
    def following(self) -> bool:
        """Whether this node only follows: see `open_mesh`."""
        return self._driver.membership.following

    @property
    def expires_unix(self) -> int | None:
        """When this node's membership ends; `None` never."""
        return self._driver.credential.not_after_unix

    @property
    def refusal(self) -> AdmissionRefused | None:
        """Why no contact lets this node in; `None` while anybody does, or where none answers."""
        return self._driver.admission.refusal

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs at which others may reach this node, best first."""
        return self._driver.network.addresses()

    @property
    def reaching(self) -> Reaching:
        """What is known of how others reach this node."""
        return self._driver.network.reaching()

    @property
    def view(self) -> View:
        """The mesh as this node sees it now."""
        return self._driver.view

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[trio.MemoryReceiveChannel[View]]:
        """Views as they change, the present one first.

            async with mesh.watch() as views:
                async for view in views: ...

        Keeps the newest view only: a slow reader skips, never lags. Ends when the mesh is closed.
        """
        async with self._open.watchers.watch() as views:
            yield views

    def announce(self, attributes: bytes) -> None:
        """Tell all peers this node's attributes: opaque bytes, at most 48 KiB (`ValueError` beyond that).

        Changes close together go out as one. Everybody is told again and again; keep it small and calm. Names of
        services count, too: all together must not exceed 56 KiB.

        While this node follows, only those that it connects to later are told, and no more than 1 KiB.
        """
        attributes = bytes(memoryview(attributes))  # what is no bytes must not get into announcements
        if (size := len(attributes)) > wire.MAX_ATTRIBUTES:
            raise ValueError(f"attributes of {size} bytes; at most {wire.MAX_ATTRIBUTES} are allowed")
        check_said(attributes, self._offers)
        self._attributes = attributes
        self._announce()

    @contextmanager
    def offer(
        self, name: str, handler: ServiceHandler, *, scope: Scope = Scope.CLIENT, lasting: bool = False
    ) -> Iterator[None]:
        """Offer the service `name` to members with `scope`, for as long as the context lasts.

        Streams that are open then live on until their handlers return. With `lasting`, those whose opener wants it outlive
        their connection: see `open_service`. Raises `ValueError` for a bad name or one that is offered already, and
        `TypeError` for what is no handler.
        """
        accepting = tunnel.accepting(handler, self.resumption if lasting else None)
        with self.offer_raw(name, accepting, scope=scope):
            yield

    @contextmanager
    def offer_raw(
        self, name: str, handler: tunnel.RawHandler, *, scope: Scope = Scope.CLIENT
    ) -> Iterator[None]:
        """As `offer`, for handlers that decide themselves: they call `accept()`, or raise `ServiceRefused` first."""
        tunnel.check_service(name)
        if name in self._offers:
            raise ValueError(f"the service {name!r} is offered already")
        if len(self._offers) >= wire.MAX_SERVICES:
            raise ValueError(f"at most {wire.MAX_SERVICES} services can be offered")
        check_said(self._attributes, (*self._offers, name))
        offer = _Offer(Service(name=name, scope=Scope(scope)), handler)
        self._open.take_part()
        self._offers[name] = offer
        self._announce()
        try:
            yield
        finally:
            del self._offers[name]
            if not self.closed:
                self._announce()

    async def publish(self, topic: str, data: bytes) -> None:
        """Send `data`, at most 56 KiB, to all members that subscribe to `topic` (1 to 255 bytes of text).

        Best effort: at most once, in no order, and lost where gossip is not keeping up. Signed by this node. Whoever
        needs more opens a stream. Raises `ValueError` for a bad topic or too much data.
        """
        check_topic(topic)
        if len(data := bytes(memoryview(data))) > wire.MAX_POST_DATA:
            raise ValueError(f"a message of {len(data)} bytes; at most {wire.MAX_POST_DATA} are allowed")
        await trio.lowlevel.checkpoint()  # py-libp2p may have none: a loop of these would starve all
        await self._open.take_part_now()
        await self._driver.posts.publish(topic, data)

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncIterator[trio.MemoryReceiveChannel[Post]]:
        """What other members publish on `topic` while the context lasts; one's own messages are not among it.

            async with mesh.subscribe("chat") as posts:
                async for post in posts: print(post.author, post.data)

        Holds up to 256 messages for a slow reader; the oldest go first when it falls behind. Ends when the mesh is closed.
        Raises as `publish`.
        """
        check_topic(topic)
        await self._open.take_part_now()
        async with self._driver.posts.subscribe(topic) as posts:
            yield posts

    async def open_service(
        self, peer: PeerId, service: str, *, wait: bool = True, lasting: bool = False
    ) -> Stream:
        """A stream to `service` of `peer`, connecting to the peer first if need be. The caller closes it.

        With `wait` it returns when the peer has accepted. Without, at once, so that the first bytes travel with the
        request; a refusal then comes from the first receive. A service that was exposed with a `Door` accepts only once
        first bytes have come, so it cannot be waited for: the stream is reset after two minutes. Raises `ServiceRefused`,
        `PeerUnreachable`, or, if the peer does not take us for a member, `AdmissionRefused`.

        With `lasting`, and if the peer offers the service so, the stream outlives its connection: it goes on over the next
        one, not a byte lost or doubled, if that comes within `MeshConfig.resume`; calls wait meanwhile. It is over at once
        if the peer leaves, or its process has ended. It keeps up to 4 MiB that the peer may ask for again. Both sides have
        to keep receiving or sending for it to go on; within one machine, and beyond 128 at a time, streams are plain.
        """
        if lasting:
            stream, lifeline = await self.open_tunnel(peer, service, wait=wait)
            if lifeline is not None and (not wait or lifeline.journal.kept):
                return self.resumption.lasting(stream, lifeline)
            if lifeline is not None:
                lifeline.end()
            return stream
        stream = await self._open_stream(peer, service)
        return await tunnel.request(stream, service, wait=wait)

    async def _open_stream(self, peer: PeerId, service: str) -> Stream:
        tunnel.check_service(service)
        await self._open.reach(peer)
        return await self._driver.network.open_stream(peer, tunnel.PROTOCOL)

    @property
    def resumption(self) -> Resumption:
        """The tunnels that outlive their connections; for `tunnel.py`."""
        return self._driver.resumption

    async def open_tunnel(
        self, peer: PeerId, service: str, *, wait: bool = False
    ) -> tuple[Stream, NearTunnel | None]:
        """As `open_service`, and with what the tunnel goes on by if its connection is lost."""
        stream = await self._open_stream(peer, service)
        lifeline = self.resumption.near(peer)
        try:
            return await tunnel.request(stream, service, wait=wait, lifeline=lifeline), lifeline
        except BaseException:
            if lifeline is not None:
                lifeline.end()
            raise

    @property
    def tunnelled(self) -> Mapping[tuple[PathKind, str], int]:
        """Bytes that `serve_tunnel` and `expose` have carried since the mesh was opened, by path and `sent` or `received`.

        Each connection counts when it is over, however that came, for the path to its peer when it began.
        """
        return self._tunnelled

    def tunnel_counter(self, peer: PeerId) -> Callable[[int, int], None]:
        """For `tunnel.py`, as a connection with `peer` begins: takes the bytes sent and received once it is over."""
        path = self._driver.network.path(peer)

        def count(sent: int, received: int) -> None:
            if path is not None:
                self._tunnelled[path.kind, "sent"] += sent
                self._tunnelled[path.kind, "received"] += received

        return count

    def invite(self, *, scope: Scope, not_after_unix: float | None) -> str:
        """A token that lets its holder join with `scope` until `not_after_unix` (cut to this node's own end).

        It names this node's addresses, and up to two connected peers', as ways in. Raises `InviteDenied` or `ValueError`.
        """
        if not_after_unix is not None and not math.isfinite(not_after_unix):
            raise ValueError(f"not_after_unix: {not_after_unix} is no time; `None` is for ever")
        end = None if not_after_unix is None else int(not_after_unix)
        authority = self._authority.delegate(scope=Scope(scope), not_after_unix=end, seed=os.urandom(32))
        return tokens.encode_invite(Invite(authority=authority, contacts=self._ways_in()))

    def _ways_in(self) -> tuple[tuple[PeerId, tuple[str, ...]], ...]:
        return ways_in(self._open.view, self.addresses, following=self.following)

    def admission_of(self, peer: PeerId) -> tuple[tuple[str, ...], int | None] | None:
        """How a peer came in: the ids of the invites from the mesh's key down to it, and when its membership ends.

        No invites: the mesh's key itself let it in. `None` if nothing is known of the peer.
        """
        if (credential := self._driver.credential_of(peer)) is None:
            return None
        return tuple(link.id.hex() for link in credential.links[:-1]), credential.not_after_unix

    def invites_of(self, peer: PeerId) -> tuple[InviteInfo, ...]:
        """The invites by which a peer came in, as `admission_of` orders them, for `revoke`; empty if it is not known."""
        credential = self._driver.credential_of(peer)
        return () if credential is None else invites_in(credential)

    def readdress(self, token: str) -> str:
        """The same invite as `token`, with the ways into this mesh that hold now. Raises `InviteMalformed`."""
        authority = tokens.decode_invite(token).authority
        return tokens.encode_invite(Invite(authority=authority, contacts=self._ways_in()))

    def revoke(self, chain: bytes) -> None:
        """Take back an invite (`InviteInfo.chain`), and with it the membership of everybody let in below it, for ever.

        Spread by gossip; connections and streams of those affected are cut at once, everywhere. Raises `InviteMalformed`
        if `chain` is none, `InviteDenied` unless this node made the invite or one that it came from, and when that many
        are kept already: 1,024, of which 64 by each inviter.
        """
        self._revoke(tokens.decode_chain(chain).links)

    def revoke_peer(self, peer: PeerId) -> None:
        """Take back the membership of one peer, under the invite that it came with. Another one lets it in again.

        Raises `InviteDenied` unless this node let it in, or whoever did; `PeerUnreachable` if the peer is not known.
        """
        credential = self._open.credential_of(peer)
        if credential is None:
            raise PeerUnreachable(f"nothing is known of a peer {peer}")
        self._revoke(credential.links)

    def _revoke(self, links: tuple[Link, ...]) -> None:
        revocation = self._authority.revoke(links)
        self._open.handle(io.RevocationHeard(revocation, gossiped=False))
        if revocation not in self._driver.membership.revoked:
            raise InviteDenied("it is not of this mesh, or the mesh keeps no more revocations by this node")

    @property
    def revocations(self) -> tuple[bytes, ...]:
        """All revocations that are known, to be kept and given to `open_mesh` next time."""
        return tuple(wire.encode_revocation(revocation) for revocation in self._driver.membership.revoked)

    def add_contacts(self, contacts: Iterable[tuple[PeerId, tuple[str, ...]]]) -> None:
        """Remember ways into the mesh (peers and their multiaddrs), tried whenever this node knows nobody."""
        self._open.admission.add_contacts(tuple(contacts), given=False)

    async def join(self, token: str) -> None:
        """Reach one of the contacts of an invite to *this* mesh. Returns when the first one has admitted us.

        Raises `InviteError` for a token that cannot be used, `AdmissionRefused` if every contact that was reached
        refused, `PeerUnreachable` if none was reached. The contacts are tried again in the background whenever this
        node knows nobody.
        """
        await self.enter(self._checked(token), wait=True)

    async def renew(self, token: str) -> None:
        """Be a member by another invite to *this* mesh from now on: with its scope, and until its end.

        Connections, streams and tunnels stay. Not undone by a failure: returns at once if somebody is connected, and else
        raises what `join` raises, and the contacts are tried on. Raises `InviteError` for a token that cannot be used and
        `AdmissionRefused` for another mesh's or a revoked one; then nothing has changed.
        """
        invite = self._checked(token)
        if self._driver.membership.revoked.covers(invite.authority.admit(keys.public_key_of(self.peer))):
            raise AdmissionRefused("the invite was revoked; ask for a new one", reason="revoked", peer="")
        self._authority = invite.authority
        self._driver.renew(invite.authority)
        await self.enter(invite, wait=not self._driver.admission.anybody)

    def _checked(self, token: str) -> Invite:
        invite = check_invite(token, now_unix=self._open.now())
        if invite.authority.mesh_id != self.mesh_id:
            words = f"the invite is for the mesh {invite.authority.mesh_id}, this is {self.mesh_id}"
            raise AdmissionRefused(words, reason="wrong_mesh", peer="")
        return invite

    async def enter(self, invite: Invite, *, wait: bool) -> None:
        """Use the contacts of a checked invite; with `wait`, return when one of them has admitted us."""
        self._driver.admission.add_contacts(invite.contacts)
        if wait:
            await self._driver.admission.seek()

    @property
    def _open(self) -> Driver:
        if self.closed:
            raise MeshClosed
        return self._driver

    def close(self) -> None:
        """For `open_mesh`, as it ends."""
        self.closed = True
        self._driver.watchers.close()
        self._driver.posts.close()

    # ── services ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _answer_open(self, stream: Stream) -> None:
        credential = self._driver.admission.credential_of(stream.peer)
        if credential is None:
            stream.reset()
            return

        def choose(service: str) -> tunnel.RawHandler:
            offer = self._offers.get(service)
            if offer is None:
                raise ServiceRefused(f"there is no service {service!r} here", reason="unknown_service")
            if credential.scope < offer.service.scope:
                raise ServiceRefused(f"{service!r} needs a wider scope", reason="scope")
            return offer.handler

        await tunnel.answer(stream, choose)

    def _announce(self) -> None:
        self._open.say(tuple(offer.service for offer in self._offers.values()), self._attributes)
