"""Rules of what is said to everybody: announcements and suspicions on the mesh's topic."""

from __future__ import annotations

from contextlib import suppress

import trio
from google.protobuf.message import DecodeError

from libmesh._pb import mesh_pb2 as pb
from libmesh.errors import MeshError
from libmesh.testing.conformance import chains
from libmesh.testing.conformance.bench import Bench, Guest, topic_of
from libmesh.testing.conformance.chains import Identity
from libmesh.testing.conformance.exchanges import farewell
from libmesh.testing.conformance.rules import RuleBroken, require, rule

PROBE_TIME = 0.9
"""Seconds within which a doubted peer is probed: less than the pause between probes in turn, which is 1 s in libmesh."""


async def reaches(guest: Guest, sequence: int) -> int:
    """Announce this guest by gossip, with `sequence` or more, until the peer knows; the sequence that it knows.

    Gossip needs a moment after a connection until it flows, and is allowed to lose messages.
    """
    patience = guest.target.patience
    with trio.move_on_after(patience):
        while True:
            await guest.publish(pb.Gossip(record=guest.announce(sequence)))
            for _ in range(5):
                await trio.sleep(0.04)
                if ((await guest.sync()).age(guest.identity.key) or (0, 0)) >= (1, sequence):
                    return sequence
            sequence += 1
    raise RuleBroken(
        f"a record that was published on {topic_of(guest.target)} did not reach it in {patience:.0f} s"
    )


@rule("gossip.learned", "An announcement on the topic is heard and believed.", place="Gossip")
async def learned(bench: Bench) -> None:
    """Announce ourselves, by gossip only."""
    async with bench.member() as guest:
        await reaches(guest, 1)
        await _leave(guest)


async def _leave(guest: Guest) -> None:
    goodbye = chains.announce(guest.identity, guest.credential, (2**40, 1), leaving=True)
    await guest.sync(chains.seal(goodbye, guest.identity.seed))


@rule(
    "gossip.relayed",
    "A member's message on the topic reaches the other members through the peer.",
    place='"Protocols"',
)
async def relayed(bench: Bench) -> None:
    """Two guests that know only the peer."""
    async with bench.announced() as near, bench.announced() as far:
        with trio.move_on_after(bench.target.patience):
            sequence = 1
            while not any(message.origin == near.identity.peer for message in far.heard):
                sequence += 1
                await near.publish(pb.Gossip(record=near.announce(sequence)))
                await trio.sleep(0.1)
            return
    raise RuleBroken(f"nothing came through in {bench.target.patience:.0f} s")


@rule("gossip.forged", "A forged or replayed record on the topic is ignored.", place="Record.signature")
async def forged(bench: Bench) -> None:
    """A forgery in another's name and an old announcement of our own, each between two good ones.

    A peer may hang up on the one who forged.
    """
    other = Identity.fresh()
    async with bench.announced() as guest, bench.member() as liar:
        sequence, before = await reaches(guest, 2), await reaches(liar, 1)
        good = chains.seal(chains.announce(other, bench.credential(other), (1, 1)), other.seed)
        await liar.publish(pb.Gossip(record=pb.Record(body=good.body, signature=bytes(64))))
        with suppress(RuleBroken, MeshError, trio.BrokenResourceError):
            await reaches(liar, before + 1)
        await guest.publish(pb.Gossip(record=guest.announce(1)))
        last = await reaches(guest, sequence + 1)
        known = await guest.sync()
        await farewell(guest, liar.identity)
    require(other.key not in known.digest, "it believes a record with a wrong signature")
    require(known.age(guest.identity.key) == (1, last), "a replayed announcement displaced a newer one")


@rule(
    "gossip.unknown",
    "A kind of gossip that is not known, and bytes that are no gossip, are ignored.",
    place="Gossip",
)
async def unknown(bench: Bench) -> None:
    """Field 1000 of Gossip, an empty one, garbage, and a record of garbage; then a good announcement."""
    async with bench.announced() as guest:
        sequence = await reaches(guest, 2)
        for nonsense in (
            b"\xc2\x3e\x03new",
            b"",
            b"\xff\xff\xff",
            pb.Gossip(record=pb.Record(body=b"\xff\xff\xff", signature=bytes(64))).SerializeToString(),
            pb.Gossip(suspicion=pb.Suspicion(peer_key=b"short")).SerializeToString(),
            pb.Gossip(revocation=pb.Revocation(signer=9)).SerializeToString(),
        ):
            await guest.publish(nonsense)
        await reaches(guest, sequence + 1)
        require(await guest.probe(), "its answer to a probe is no")


@rule(
    "gossip.refutes",
    "A peer that is suspected announces itself anew, unless the suspicion is older than its announcement.",
    place="Suspicion",
    limit=15,
)
async def refutes(bench: Bench) -> None:
    """Suspect the peer. What it then announces must be newer, and come by gossip, signed by it."""
    key = bench.target.key
    async with bench.announced() as guest:
        await reaches(guest, 2)
        guest.heard.clear()
        age = (await guest.sync()).age(key)
        assert age is not None
        hint = pb.Suspicion(peer_key=key, incarnation=age[0], sequence=age[1])
        await guest.publish(pb.Gossip(suspicion=hint))
        with trio.move_on_after(bench.target.patience):
            while True:
                for message in guest.heard:
                    if (found := _announced(message.data, key)) is not None and found > age:
                        require(message.origin == bench.target.peer, f"{message.origin} published it")
                        return
                await trio.sleep(0.05)
        after = (await guest.sync()).age(key)
    require(after is not None and after > age, f"{bench.target.patience:.0f} s later it is still {age}")
    raise RuleBroken(
        f"it is {after} now, but did not say so on the topic within {bench.target.patience:.0f} s"
    )


def _announced(data: bytes, key: bytes) -> tuple[int, int] | None:
    try:
        said = pb.Announcement.FromString(pb.Gossip.FromString(data).record.body)
    except DecodeError:  # others' nonsense, or our own of a moment ago
        return None
    return (said.incarnation, said.sequence) if said.peer_key == key else None


@rule(
    "gossip.no_verdict",
    "A suspicion ends nobody: who hears one probes the suspect, and believes what it finds.",
    place="Suspicion",
    limit=20,
)
async def no_verdict(bench: Bench) -> None:
    """Suspect a member right after it was probed, and see it probed again at once, and believed in after that."""
    async with bench.announced() as suspect, bench.announced() as liar:
        await reaches(liar, 2)
        suspect.probed = trio.Event()
        with trio.move_on_after(bench.target.patience):
            await suspect.probed.wait()
        suspect.probed = trio.Event()
        hint = pb.Suspicion(peer_key=suspect.identity.key, incarnation=1, sequence=1)
        await liar.publish(pb.Gossip(suspicion=hint))
        with trio.move_on_after(PROBE_TIME):
            await suspect.probed.wait()
        require(suspect.probed.is_set(), f"it did not probe the suspect within {PROBE_TIME} s")
        entry = (await liar.sync()).digest.get(suspect.identity.key)
        require(entry is not None and not entry.dead, "it takes a suspicion for a death")
