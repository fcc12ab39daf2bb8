"""Rules that are checked last, because a peer that breaks one may not be there any more."""

from __future__ import annotations

import trio

from libmesh._pb import mesh_pb2 as pb
from libmesh.testing.conformance import chains
from libmesh.testing.conformance.bench import Bench
from libmesh.testing.conformance.gossiping import reaches
from libmesh.testing.conformance.rules import require, rule

HIGHEST = 2**64 - 1

SETTLED = 0.8
"""Seconds after which a peer has said what it has to say to a claim."""


async def unimpressed(bench: Bench) -> None:
    """Raise `RuleBroken` unless the peer is there and can still outlive a claim."""
    await trio.sleep(SETTLED)
    await bench.require_alive()
    async with bench.member() as guest:
        age = (await guest.sync()).age(bench.target.key)
    require(age is not None and age[0] < 2**63, f"its incarnation is {age and age[0]}: few are left")


@rule(
    "survives.suspicion",
    "A suspicion of an incarnation that a peer never had does not harm it.",
    place="Suspicion",
)
async def suspicion(bench: Bench) -> None:
    """The highest incarnation that there is."""
    async with bench.announced() as guest:
        await reaches(guest, 2)
        hint = pb.Suspicion(peer_key=bench.target.key, incarnation=HIGHEST, sequence=HIGHEST)
        await guest.publish(pb.Gossip(suspicion=hint))
        await reaches(guest, 3)
    await unimpressed(bench)


@rule(
    "survives.record",
    "A forged record of the highest incarnation does not harm the peer that it names.",
    place="Record",
)
async def record(bench: Bench) -> None:
    """Signed by us."""
    async with bench.member() as guest:
        known = await guest.sync()
        said = pb.Announcement.FromString(known.records[bench.target.key].body)
        said.incarnation = said.sequence = HIGHEST
        await bench.tell(chains.seal(said, guest.identity.seed))
    await unimpressed(bench)


@rule(
    "survives.digest",
    "A digest that claims the highest incarnation does not harm the peer that it names.",
    place="Digest",
)
async def digest(bench: Bench) -> None:
    """Dead at that."""
    entry = pb.Digest.Entry(peer_key=bench.target.key, incarnation=HIGHEST, sequence=HIGHEST, dead=True)
    async with bench.member() as guest:
        await guest.sync(digest=pb.Digest(entries=[entry]))
    await unimpressed(bench)


@rule("survives.all", "After all this the peer is there, and takes members.", place='"Protocols"')
async def all_of_it(bench: Bench) -> None:
    """Once more, from the beginning."""
    await bench.require_alive()
