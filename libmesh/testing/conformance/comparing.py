"""Rules of what is compared instead of whole digests, and of the news for peers that only follow.

A peer need speak neither protocol: then these rules do not apply to it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

import trio

from libmesh._pb import mesh_pb2 as pb
from libmesh.errors import ServiceRefused
from libmesh.net.base import Stream
from libmesh.testing.conformance.bench import KIB, Bench, Guest, Known
from libmesh.testing.conformance.chains import link_id
from libmesh.testing.conformance.rules import NotApplicable, RuleBroken, require, rule
from libmesh.testing.conformance.streams import Ending, frame, parsed, receive, receive_frame

COMPARE = "/libmesh/compare/1.0.0"
FOLLOW = "/libmesh/follow/1.0.0"

BUCKETS = 64
CUT = 8
UNKNOWN = bytes(16)
"""A fingerprint that nobody has."""

TRIES = 20
"""A peer may hear something between two questions; then both are asked again, at most so often."""


def bucket_of(key: bytes) -> int:
    """The bucket of a peer's row."""
    return hashlib.sha256(key).digest()[0] % BUCKETS


def fingerprint(rows: Iterable[bytes]) -> bytes:
    """Of one bucket, or of the revocations."""
    found = sorted(rows)
    return hashlib.sha256(b"".join(found)).digest()[:CUT] if found else bytes(CUT)


def parts_of(known: Known) -> bytes:
    """`Summary.parts` of somebody who knows this."""
    rows: list[list[bytes]] = [[] for _ in range(BUCKETS)]
    for key, entry in known.digest.items():
        row = key + struct.pack(">QQB", entry.incarnation, entry.sequence, entry.dead)
        rows[bucket_of(key)].append(row)
    revoked = []
    for revocation in known.revocations:
        signers = [revocation.mesh_key, *(link.subject for link in revocation.links)]
        revoked.append(link_id(revocation.links[-1]) + signers[revocation.signer])
    return b"".join(map(fingerprint, [*rows, revoked]))


async def ask(guest: Guest, shown: bytes) -> pb.Summary:
    """The answer to a summary with this fingerprint."""
    stream = await open_optional(guest, COMPARE, frame(pb.Summary(fingerprint=shown)))
    answer = await receive_optional(stream, pb.Summary)
    stream.reset()
    return answer


async def open_optional(guest: Guest, protocol: str, data: bytes) -> Stream:
    """A stream of a protocol that the peer need not speak, on which `data` was sent."""
    try:
        return await guest.say(protocol, data)
    except ServiceRefused as exc:
        raise NotApplicable(f"it does not speak {protocol}") from exc


async def receive_optional(stream: Stream, kind: type[pb.Summary]) -> pb.Summary:
    """The first message of its answer. Without waiting, a refusal of the protocol shows only here."""
    try:
        return await receive(stream, kind, KIB)
    except ServiceRefused as exc:
        raise NotApplicable(f"it does not speak {stream.protocol}") from exc


@rule(
    "compare.parts",
    "Another fingerprint is answered with those of all parts; the peer's own is over them.",
    place="Summary",
)
async def parts(bench: Bench) -> None:
    """Show one that it cannot have."""
    async with bench.member() as guest:
        answer = await ask(guest, UNKNOWN)
    require(len(answer.fingerprint) == 16, f"its fingerprint has {len(answer.fingerprint)} bytes")
    require(answer.HasField("parts"), "it tells no parts to somebody who knows something else")
    require(len(answer.parts) == CUT * (BUCKETS + 1), f"its parts have {len(answer.parts)} bytes")
    whole = hashlib.sha256(answer.parts).digest()[:16]
    require(answer.fingerprint == whole, "its fingerprint is not over its parts")


@rule("compare.same", "The same fingerprint is answered without parts.", place="Summary.parts")
async def same(bench: Bench) -> None:
    """Show it its own."""
    async with bench.member() as guest:
        shown = UNKNOWN
        for _ in range(TRIES):
            answer = await ask(guest, shown)
            if answer.fingerprint == shown:
                require(not answer.HasField("parts"), "it tells its parts to somebody who knows the same")
                return
            shown = answer.fingerprint
    raise RuleBroken(f"{TRIES} times in turn it had another fingerprint")


@rule("compare.rows", "The fingerprints are over the rows that its digest has.", place="Summary")
async def rows(bench: Bench) -> None:
    """Make them from its digest and its revocations."""
    async with bench.announced() as guest:
        for _ in range(TRIES):
            before = await ask(guest, UNKNOWN)
            known = await guest.sync()
            if (await ask(guest, UNKNOWN)).fingerprint == before.fingerprint:
                mine = parts_of(known)
                differ = [
                    n for n in range(BUCKETS + 1) if mine[n * CUT :][:CUT] != before.parts[n * CUT :][:CUT]
                ]
                require(not differ, f"the fingerprints of the parts {differ[:8]} are not those of its digest")
                return
    raise RuleBroken(f"{TRIES} times in turn it had another fingerprint after an exchange")


@rule(
    "compare.malformed",
    "A fingerprint of any length but 16 bytes ends the stream with a reset.",
    place="Summary.fingerprint",
)
async def malformed(bench: Bench) -> None:
    """One byte less."""
    async with bench.member() as guest:
        await ask(guest, UNKNOWN)
        stream = await guest.say(COMPARE, frame(pb.Summary(fingerprint=bytes(15))))
        ending, said = await guest.ending(stream)
        require(ending is Ending.RESET, f"the stream was {ending.value} after {len(said)} bytes")
        require(await guest.probe(), "its answer to a probe is no")


@rule(
    "digest.part",
    "Of a digest with a part, only rows of that part are answered, and only their records told.",
    place="Digest.part",
)
async def part(bench: Bench) -> None:
    """Ask for the bucket of the peer, then for all others. One that does not know of parts answers with all: too much."""
    key = bench.target.key
    own = bucket_of(key)
    others = bytes(n for n in range(BUCKETS) if n != own)
    async with bench.member() as guest:
        await ask(guest, UNKNOWN)
        known = await guest.sync(digest=pb.Digest(part=pb.Part(buckets=bytes([own]))))
        require(key in known.digest and key in known.records, "it leaves out the row that was asked for")
        require(
            all(bucket_of(each) == own for each in known.digest),
            "its digest has rows that were not asked for",
        )
        require(not known.revocations, "it tells revocations that were not asked for")
        known = await guest.sync(digest=pb.Digest(part=pb.Part(buckets=others, revocations=True)))
        require(key not in known.digest, "its digest has a row that was not asked for")
        require(key not in known.records, "it tells a record that was not asked for")


async def next_news(stream: Stream) -> pb.Gossip:
    """The next of the news on a stream."""
    try:
        return parsed(pb.Gossip, await receive_frame(stream, "Gossip", 60 * KIB))
    except ServiceRefused as exc:
        raise NotApplicable(f"it does not speak {FOLLOW}") from exc


async def until_told(guest: Guest, stream: Stream, key: bytes, age: tuple[int, int]) -> None:
    """Wait for the news of an announcement that is as new as `age`."""
    with trio.move_on_after(guest.target.patience):
        while True:
            news = await next_news(stream)
            if news.WhichOneof("kind") == "record":
                said = pb.Announcement.FromString(news.record.body)
                if said.peer_key == key and (said.incarnation, said.sequence) >= age:
                    return
    raise RuleBroken(f"it did not tell that within {guest.target.patience:.0f} s")


@rule(
    "follow.lacking",
    "A follower is told first what its digest lacks.",
    place='"Protocols"',
)
async def told_at_first(bench: Bench) -> None:
    """Follow with nothing known."""
    async with bench.stranger() as guest:
        await guest.enter(following(guest))
        stream = await open_optional(guest, FOLLOW, frame(pb.Digest()))
        await until_told(guest, stream, bench.target.key, (0, 0))


def following(guest: Guest) -> pb.Hello:
    """The hello of one that follows."""
    hello = guest.greeting()
    hello.following = True
    return hello


@rule("follow.news", "A follower is told the news, as others hear them by gossip.", place='"Protocols"')
async def news(bench: Bench) -> None:
    """Follow, and let somebody else announce itself anew."""
    async with bench.stranger() as follower, bench.announced() as guest:
        known = await follower.enter(following(follower))
        stream = await open_optional(follower, FOLLOW, frame(pb.Digest(entries=list(known.digest.values()))))
        await guest.sync(guest.announce(7))
        await until_told(follower, stream, guest.identity.key, (1, 7))


@rule("follow.unlisted", "One that follows stands in nobody's digest.", place="Hello.following")
async def unlisted(bench: Bench) -> None:
    """Follow, and look."""
    async with bench.stranger() as follower, bench.member() as guest:
        await follower.enter(following(follower))
        require(
            follower.identity.key not in (await guest.sync()).digest, "it lists one that announced nothing"
        )
