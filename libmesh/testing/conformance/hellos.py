"""Rules of the hello: who is let in, who is refused with which word, and what a refusal tells."""

from __future__ import annotations

from contextlib import suppress

import trio

from libmesh._pb import mesh_pb2 as pb
from libmesh.testing.conformance import chains
from libmesh.testing.conformance.bench import HELLO, KIB, Bench
from libmesh.testing.conformance.chains import Identity, Signer
from libmesh.testing.conformance.rules import require, rule
from libmesh.testing.conformance.streams import Ending, ending_of, frame, receive, receive_frame

HOUR = 3600
WORDS = "HelloReply.refusal"


async def refused(bench: Bench, who: Identity, shown: pb.Credential, word: str) -> None:
    """Show a credential; the refusal must be this word."""
    async with bench.stranger(who, shown) as guest:
        _, reply = await guest.hello()
    said = f'refused it with "{reply.refusal}"' if reply.HasField("refusal") else "let it in"
    require(reply.refusal == word, f"it {said}")


@rule(
    "hello.admits", "A peer that shows a good credential is let in and shown a good one.", place="HelloReply"
)
async def admits(bench: Bench) -> None:
    """Say hello as a member does."""
    async with bench.stranger() as guest:
        _, reply = await guest.hello()
    require(not reply.HasField("refusal"), f'it refused with "{reply.refusal}"')
    require(reply.HasField("credential"), "it shows no credential")
    why = chains.why_bad(
        reply.credential,
        mesh_key=bench.signer.mesh_key,
        peer_key=bench.target.key,
        now_unix=bench.now_unix,
    )
    require(why is None, f"the credential that it shows is bad: {why}")
    require(len(reply.agent.encode()) <= 128, f"its agent has {len(reply.agent.encode())} bytes")


@rule("hello.narrower", "A peer may sign itself in with less than its invite gives.", place="Link.scope")
async def narrower(bench: Bench) -> None:
    """The narrowest scope, and an end in an hour."""
    who = Identity.fresh()
    end = min(int(bench.now_unix) + HOUR, bench.signer.end or chains.NO_END)
    shown = bench.signer.admit(who.key, scope=pb.SCOPE_CLIENT, end=end)
    async with bench.stranger(who, shown) as guest:
        await guest.enter()


@rule("hello.eight_links", "A chain of eight links is accepted.", place="Credential")
async def eight_links(bench: Bench) -> None:
    """Delegate until the chain is full."""
    await _with_links(bench, 8)


@rule("hello.nine_links", "A chain of more than eight links is not accepted.", place="Credential")
async def nine_links(bench: Bench) -> None:
    """One link too many. Whether it is refused or cannot be decoded is the peer's choice."""
    who = Identity.fresh()
    async with bench.stranger(who, _chain(bench.inviter(), 9).admit(who.key)) as guest:
        stream = await guest.say(HELLO, frame(guest.greeting()))
        _, data = await guest.ending(stream)
    reply = pb.HelloReply.FromString(data[1:]) if data and data[0] == len(data) - 1 else None
    require(not data or (reply is not None and reply.HasField("refusal")), "it let a chain of nine in")


async def _with_links(bench: Bench, count: int) -> None:
    who = Identity.fresh()
    async with bench.stranger(who, _chain(bench.inviter(), count).admit(who.key)) as guest:
        await guest.enter()


def _chain(signer: Signer, count: int) -> Signer:
    """One whose peers have `count` links."""
    while len(signer.links) < count - 1:
        signer = signer.delegate()
    return signer


@rule(
    "hello.unknown_fields",
    "Unknown fields, in a hello or in a link, are ignored.",
    place='"Framing"',
)
async def unknown_fields(bench: Bench) -> None:
    """Field 1000 everywhere."""
    unknown = b"\xc2\x3e\x03new"
    async with bench.stranger() as guest:
        links = [pb.Link.FromString(link.SerializeToString() + unknown) for link in guest.credential.links]
        credential = pb.Credential(mesh_key=guest.credential.mesh_key, links=links)
        shown = pb.Credential.FromString(credential.SerializeToString() + unknown)
        hello = pb.Hello(agent="x", credential=shown).SerializeToString() + unknown
        await guest.enter(pb.Hello.FromString(hello))


@rule("hello.wrong_mesh", 'A credential of another mesh is refused with "wrong_mesh".', place=WORDS)
async def wrong_mesh(bench: Bench) -> None:
    """Found a mesh of our own."""
    who = Identity.fresh()
    await refused(bench, who, Signer.of_mesh(Identity.fresh().seed).admit(who.key), "wrong_mesh")


@rule(
    "hello.not_yours", 'A credential that was made for another key is refused with "not_yours".', place=WORDS
)
async def not_yours(bench: Bench) -> None:
    """Show another peer's."""
    await refused(bench, Identity.fresh(), bench.credential(Identity.fresh()), "not_yours")


@rule("hello.forged_signature", 'A link with a wrong signature is refused with "forged".', place=WORDS)
async def forged_signature(bench: Bench) -> None:
    """A peer link that the peer signed itself."""
    who = Identity.fresh()
    link = bench.signer.sign(who.key)
    own = Signer(bench.signer.mesh_key, bench.signer.links, who.seed).sign(who.key)
    link.signature = own.signature
    await refused(bench, who, bench.signer.show(link), "forged")


@rule("hello.forged_fields", "A link's signature covers its end and its scope.", place="Link")
async def forged_fields(bench: Bench) -> None:
    """Change one after signing."""
    who = Identity.fresh()
    soon = min(int(bench.now_unix) + HOUR, bench.signer.end or chains.NO_END)
    later = bench.signer.sign(who.key, scope=pb.SCOPE_CLIENT, end=soon)
    later.not_after -= 1
    await refused(bench, who, bench.signer.show(later), "forged")
    if bench.signer.scope > pb.SCOPE_CLIENT:
        wider = bench.signer.sign(who.key, scope=pb.SCOPE_CLIENT)
        wider.scope = pb.SCOPE_WORKER
        await refused(bench, who, bench.signer.show(wider), "forged")


@rule("hello.forged_above", "The signatures of all links are checked, not only the last one's.", place="Link")
async def forged_above(bench: Bench) -> None:
    """Put a link of our own making where the mesh's first one was."""
    who, founder = Identity.fresh(), Identity.fresh()
    impostor = Signer(bench.signer.mesh_key, (), founder.seed).delegate(scope=pb.SCOPE_INVITE)
    await refused(bench, who, impostor.admit(who.key), "forged")


@rule(
    "hello.widened_scope",
    'A link with a wider scope than the one above is refused with "widened".',
    place=WORDS,
)
async def widened_scope(bench: Bench) -> None:
    """Take one scope more."""
    who, signer = Identity.fresh(), bench.signer
    if signer.scope == pb.SCOPE_INVITE:
        signer = signer.delegate(scope=pb.SCOPE_CLIENT)
    await refused(bench, who, signer.admit(who.key, scope=signer.scope + 1), "widened")


@rule(
    "hello.widened_end", 'A link that ends later than the one above is refused with "widened".', place=WORDS
)
async def widened_end(bench: Bench) -> None:
    """Take an hour more, and take no end at all."""
    who, signer = Identity.fresh(), bench.signer
    if signer.end is None:
        signer = bench.inviter().delegate(end=int(bench.now_unix) + HOUR)
    assert signer.end is not None
    await refused(bench, who, signer.admit(who.key, end=signer.end + HOUR), "widened")
    await refused(bench, who, signer.show(signer.sign_endless(who.key)), "widened")


@rule(
    "hello.widened_invite",
    'An invite that was made without the scope "invite" is refused with "widened".',
    place="Scope",
)
async def widened_invite(bench: Bench) -> None:
    """Invite somebody as a client."""
    who, signer = Identity.fresh(), bench.signer
    if signer.scope == pb.SCOPE_INVITE:
        signer = signer.delegate(scope=pb.SCOPE_CLIENT)
    await refused(bench, who, signer.delegate().admit(who.key), "widened")


@rule("hello.expired", 'A link that has ended is refused with "expired".', place=WORDS)
async def expired(bench: Bench) -> None:
    """An end an hour ago."""
    who = Identity.fresh()
    await refused(bench, who, bench.signer.admit(who.key, end=int(bench.now_unix) - HOUR), "expired")


@rule(
    "hello.no_peer_link",
    'A chain that does not end in a peer link, or goes on after one, is refused with "malformed".',
    place="LinkKind",
)
async def no_peer_link(bench: Bench) -> None:
    """An invite in place of a credential; then a peer that signs the next one in."""
    who = Identity.fresh()
    await refused(bench, who, bench.signer.show(), "malformed")
    between = Identity.fresh()
    first = bench.signer.sign(between.key)
    second = Signer(bench.signer.mesh_key, (first,), between.seed).sign(who.key)
    await refused(bench, who, bench.signer.show(first, second), "malformed")


@rule(
    "hello.unknown_scope", 'A link with a scope that is not known is refused with "malformed".', place="Scope"
)
async def unknown_scope(bench: Bench) -> None:
    """Scope 7, and none."""
    who = Identity.fresh()
    for scope in (0, 7):
        await refused(bench, who, bench.signer.admit(who.key, scope=scope), "malformed")


@rule("hello.refusal_closes", "After a refusal the stream ends, and the connection is closed.", place=WORDS)
async def refusal_closes(bench: Bench) -> None:
    """Be refused, and look what follows."""
    async with bench.stranger(credential=bench.credential(Identity.fresh())) as guest:
        stream, _ = await guest.hello()
        ending, more = await guest.ending(stream)
        require(not more, f"{len(more)} bytes follow its refusal")
        require(ending is not Ending.OPEN, "the stream was left open")
        with suppress(trio.BrokenResourceError):
            await stream.send_eof()
        require(await guest.is_dropped(), "the connection was left open")


@rule(
    "hello.refusal_tells_nothing",
    "A refusal tells nothing of the mesh: not its id, its members or their number.",
    place=WORDS,
)
async def refusal_tells_nothing(bench: Bench) -> None:
    """Look for anything but an agent and a word, and for what must be kept from strangers in every byte."""
    async with bench.member() as guest:
        members = list((await guest.sync()).digest)
    mesh_id = bench.signer.mesh_id
    secrets = [bench.signer.mesh_key, mesh_id.encode(), bytes.fromhex(mesh_id), *members]
    foreign = Identity.fresh()
    bad = (
        Signer.of_mesh(Identity.fresh().seed).admit(foreign.key),
        bench.credential(Identity.fresh()),
        bench.signer.admit(foreign.key, end=int(bench.now_unix) - HOUR),
    )
    for shown in bad:
        async with bench.stranger(foreign, shown) as guest:
            stream = await guest.say(HELLO, frame(guest.greeting()))
            data = await receive_frame(stream, "HelloReply", 4 * KIB)
        reply = pb.HelloReply.FromString(data)
        plain = pb.HelloReply(agent=reply.agent, refusal=reply.refusal).SerializeToString()
        require(reply.HasField("refusal"), "it let in whom it should refuse")
        require(not reply.HasField("credential"), "its refusal shows its credential")
        require(len(data) == len(plain), "its refusal has fields besides the agent and the word")
        require(len(data) <= 2 + 128 + 2 + 32, f"its refusal has {len(data)} bytes")
        require(not any(secret in data for secret in secrets), "its refusal names the mesh or a member")


@rule(
    "hello.exchange",
    "After the reply digests and records are exchanged in turns; then both end the stream.",
    place='"Protocols"',
)
async def exchange(bench: Bench) -> None:
    """Read what comes in each turn, no more."""
    async with bench.stranger() as guest:
        stream, _ = await guest.hello()
        early, data = await ending_of(stream, 0.2)
        require(early is Ending.OPEN and not data, "it did not wait for the dialler's Digest")
        await stream.send_all(frame(pb.Digest()))
        digest = await receive(stream, pb.Digest, KIB * KIB)
        records = await receive(stream, pb.Records, 8 * KIB * KIB)
        await stream.send_all(frame(pb.Records()))
        await stream.send_eof()
        ending, more = await guest.ending(stream)
    require(ending is Ending.END and not more, f"the stream was {ending.value}, after {more!r}")
    require(
        any(entry.peer_key == bench.target.key for entry in digest.entries), "it is not in its own digest"
    )
    require(len(records.records) > 0, "it told no record to somebody who knows nothing")
