"""The peer that is held to the rules, and the peers that the suite plays to find out."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import trio
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from libmesh import keys, tokens
from libmesh._pb import mesh_pb2 as pb
from libmesh.errors import MeshError
from libmesh.net.base import Message, PeerDisconnected, Stream
from libmesh.net.libp2p import Libp2pConfig, Libp2pNetwork, open_libp2p_network
from libmesh.peers import PeerId
from libmesh.testing.conformance import chains
from libmesh.testing.conformance.chains import Identity, Signer
from libmesh.testing.conformance.rules import NotApplicable, RuleBroken, require
from libmesh.testing.conformance.streams import Ending, ending_of, frame, receive

HELLO = "/libmesh/hello/1.0.0"
SYNC = "/libmesh/sync/1.0.0"
PROBE = "/libmesh/probe/1.0.0"
TUNNEL = "/libmesh/tunnel/1.0.0"

AGENT = "libmesh-conformance"
KIB = 1024

HEARD_KEPT = 1024
"""Gossip messages that a guest keeps; later ones are dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The peer under test.

    Attributes:
        peer: its id.
        address: its multiaddr, without the id.
        signer: what the invite lets the suite sign.
        echo: the service that returns what is sent to it, if the peer offers it.
        patience: seconds that the peer gets where the specification names no time.
    """

    peer: PeerId
    address: str
    signer: Signer
    echo: str = "echo"
    patience: float = 5.0

    @property
    def key(self) -> bytes:
        """The peer's public key."""
        return keys.public_key_of(self.peer)


def read_target(multiaddr: str, token: str, *, echo: str = "echo", patience: float = 5.0) -> Target:
    """The peer at `multiaddr`, which ends in `/p2p/<peer id>`. Raises `ValueError` or `InviteMalformed`."""
    address, separator, peer = multiaddr.rpartition("/p2p/")
    if not separator:
        raise ValueError(f"{multiaddr!r} does not end in /p2p/<peer id>, which the handshake is to prove")
    try:
        Multiaddr(address)
    except (MultiaddrError, ValueError) as exc:
        raise ValueError(f"{address!r} is no multiaddr: {exc}") from exc
    keys.public_key_of(PeerId(peer))
    authority = tokens.decode_invite(token).authority
    credential = pb.Credential.FromString(tokens.encode_chain(authority.mesh_key, authority.links))
    signer = Signer(authority.mesh_key, tuple(credential.links), authority.seed)
    return Target(peer=PeerId(peer), address=address, signer=signer, echo=echo, patience=patience)


@dataclass(frozen=True, slots=True)
class Known:
    """What the peer told in an exchange: its digest by peer key, and the records that we lacked, by peer key."""

    digest: dict[bytes, pb.Digest.Entry]
    records: dict[bytes, pb.Record]
    revocations: list[pb.Revocation]

    def age(self, key: bytes) -> tuple[int, int] | None:
        """The incarnation and the sequence of what it holds of a peer."""
        entry = self.digest.get(key)
        return None if entry is None else (entry.incarnation, entry.sequence)


@dataclass(slots=True)
class Guest:
    """A peer that the suite plays, connected to the one under test. Made by `Bench`; ends with its context."""

    target: Target
    identity: Identity
    credential: pb.Credential
    network: Libp2pNetwork
    heard: list[Message] = field(default_factory=list)
    probed: trio.Event = field(default_factory=trio.Event)
    answers_probes: bool = True
    gone: trio.Event = field(default_factory=trio.Event)

    async def open(self, protocol: str) -> Stream:
        """A stream to the peer under test."""
        return await self.network.open_stream(self.target.peer, protocol)

    async def say(self, protocol: str, data: bytes) -> Stream:
        """A stream on which `data` was sent."""
        stream = await self.open(protocol)
        await stream.send_all(data)
        return stream

    async def hello(self, message: pb.Hello | None = None) -> tuple[Stream, pb.HelloReply]:
        """Say hello, and hear the reply."""
        stream = await self.say(HELLO, frame(message or self.greeting()))
        return stream, await receive(stream, pb.HelloReply, 4 * KIB)

    def greeting(self) -> pb.Hello:
        """The hello of a peer that keeps the rules."""
        return pb.Hello(agent=AGENT, credential=self.credential)

    async def enter(self, message: pb.Hello | None = None, records: Iterable[pb.Record] = ()) -> Known:
        """Say hello, be let in, and exchange digests. Raises `RuleBroken` if refused."""
        stream, reply = await self.hello(message)
        require(not reply.HasField("refusal"), f'it refused with "{reply.refusal}"')
        self.network.admit(self.target.peer)
        return await self.exchange(stream, records=records)

    async def exchange(
        self,
        stream: Stream,
        *,
        digest: pb.Digest | None = None,
        records: Iterable[pb.Record] = (),
        revocations: Iterable[pb.Revocation] = (),
    ) -> Known:
        """The turns of a digest exchange, as the opener, to the end of the stream."""
        await stream.send_all(frame(digest or pb.Digest()))
        theirs = await receive(stream, pb.Digest, KIB * KIB)
        told = await receive(stream, pb.Records, 8 * KIB * KIB)
        await stream.send_all(frame(pb.Records(records=records, revocations=revocations)))
        await stream.send_eof()
        ending, more = await self.ending(stream)
        require(
            ending is Ending.END and not more, f"after the exchange the stream was {ending.value}, {more!r}"
        )
        return Known(
            {entry.peer_key: entry for entry in theirs.entries},
            {pb.Announcement.FromString(record.body).peer_key: record for record in told.records},
            list(told.revocations),
        )

    async def sync(
        self,
        *records: pb.Record,
        digest: pb.Digest | None = None,
        revocations: Iterable[pb.Revocation] = (),
    ) -> Known:
        """A digest exchange on a stream of its own."""
        stream = await self.open(SYNC)
        return await self.exchange(stream, digest=digest, records=records, revocations=revocations)

    async def probe(self, target: bytes | None = None, message: bytes | None = None) -> bool:
        """Ask the peer, or the peer about `target`."""
        data = pb.Probe(target_key=target).SerializeToString() if message is None else message
        stream = await self.say(PROBE, frame(data))
        answer = await receive(stream, pb.ProbeAnswer, KIB)
        stream.reset()
        return answer.heard

    def announce(self, sequence: int, **fields: object) -> pb.Record:
        """A record of this guest, of incarnation 1, that is good if `fields` are."""
        return chains.seal(
            chains.announce(self.identity, self.credential, (1, sequence), **fields), self.identity.seed
        )

    async def publish(self, gossip: pb.Gossip | bytes) -> None:
        """Say something on the mesh's topic."""
        data = gossip if isinstance(gossip, bytes) else gossip.SerializeToString()
        await self.network.publish(topic_of(self.target), data)

    async def ending(self, stream: Stream, within: float | None = None) -> tuple[Ending, bytes]:
        """How the peer ends a stream within that many seconds (its patience by default), and what it says before."""
        return await ending_of(stream, self.target.patience if within is None else within)

    async def is_dropped(self, within: float | None = None) -> bool:
        """Whether the peer closes the connection within that many seconds (its patience by default)."""
        with trio.move_on_after(self.target.patience if within is None else within):
            await self.gone.wait()
        return self.gone.is_set()

    async def answer_probe(self, stream: Stream) -> None:
        """What the peer asks us, or through us; sets `probed`."""
        await receive(stream, pb.Probe, KIB)
        self.probed.set()
        if self.answers_probes:
            await stream.send_all(frame(pb.ProbeAnswer(heard=True)))
        else:
            await trio.sleep_forever()

    async def listen(self) -> None:
        """Keep what gossip brings."""
        async with self.network.events() as events:
            async for event in events:
                match event:
                    case Message() if len(self.heard) < HEARD_KEPT:
                        self.heard.append(event)
                    case PeerDisconnected():
                        self.gone.set()


def topic_of(target: Target) -> str:
    """The gossip topic of the mesh's members."""
    return f"libmesh/1/{target.signer.mesh_id}/peers"


@dataclass(slots=True, kw_only=True)
class Bench:
    """What a check works with.

    Attributes:
        target: the peer under test.
        now_unix: seconds since the epoch, when the check began.
    """

    target: Target
    now_unix: float = field(default_factory=time.time)

    @property
    def signer(self) -> Signer:
        """What the invite lets us sign."""
        return self.target.signer

    def credential(self, identity: Identity) -> pb.Credential:
        """A good credential for a peer that we play."""
        return self.signer.admit(identity.key)

    @asynccontextmanager
    async def stranger(
        self, identity: Identity | None = None, credential: pb.Credential | None = None
    ) -> AsyncIterator[Guest]:
        """A guest that is connected and has said nothing yet."""
        identity = identity or Identity.fresh()
        async with open_libp2p_network(identity.seed, Libp2pConfig(hosts=("127.0.0.1",))) as network:
            guest = Guest(self.target, identity, credential or self.credential(identity), network)
            network.set_handler(PROBE, guest.answer_probe)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.listen)
                await network.subscribe(topic_of(self.target))
                await network.connect(self.target.peer, [self.target.address])
                yield guest
                nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def member(self, credential: pb.Credential | None = None) -> AsyncIterator[Guest]:
        """A guest that was let in. It has announced nothing; others do not know of it."""
        async with self.stranger(credential=credential) as guest:
            await guest.enter()
            yield guest

    @asynccontextmanager
    async def announced(
        self, identity: Identity | None = None, credential: pb.Credential | None = None
    ) -> AsyncIterator[Guest]:
        """A guest that was let in and is known as a member. Says goodbye at the end, so that nobody looks for it."""
        async with self.stranger(identity, credential) as guest:
            await guest.enter(records=[guest.announce(1)])
            yield guest
            if not guest.gone.is_set():
                goodbye = chains.announce(guest.identity, guest.credential, (2**40, 1), leaving=True)
                await guest.sync(chains.seal(goodbye, guest.identity.seed))

    async def tell(self, *records: pb.Record, revocations: Iterable[pb.Revocation] = ()) -> None:
        """Let a guest tell what is wrong. A peer may reset the stream for that, and hang up on liars."""
        async with self.member() as guest:
            with suppress(RuleBroken, MeshError, trio.BrokenResourceError):
                await guest.sync(*records, revocations=revocations)

    async def require_alive(self) -> None:
        """Raise `RuleBroken` unless the peer lets a member in and answers a probe."""
        try:
            async with self.member() as guest:
                require(await guest.probe(), "it is there, but its answer to a probe is no")
        except (MeshError, trio.BrokenResourceError) as exc:
            raise RuleBroken(f"after that it takes no member any more: {exc}") from exc

    async def services(self) -> list[pb.Service]:
        """What the peer offers."""
        async with self.member() as guest:
            record = (await guest.sync()).records.get(self.target.key)
        require(record is not None, "it tells nothing of itself")
        assert record is not None
        return list(pb.Announcement.FromString(record.body).services)

    async def echo(self) -> str:
        """The echo service's name. Raises `NotApplicable` if there is none that we may open."""
        for service in await self.services():
            if service.name == self.target.echo:
                if service.scope > self.signer.scope:
                    raise NotApplicable(f"the invite's scope does not allow the service {service.name!r}")
                return service.name
        raise NotApplicable(f"it offers no service {self.target.echo!r} that returns what is sent to it")

    def inviter(self) -> Signer:
        """The invite, if it may sign further ones. Raises `NotApplicable` otherwise."""
        if self.signer.scope < pb.SCOPE_INVITE:
            raise NotApplicable("the invite's scope is not 'invite'")
        return self.signer
