"""Rules of revocations. Two of them leave one in the mesh for ever; it revokes a peer that the suite made up."""

from __future__ import annotations

from libmesh._pb import mesh_pb2 as pb
from libmesh.testing.conformance.bench import PROBE, Bench, Guest
from libmesh.testing.conformance.chains import Identity, Signer, link_id
from libmesh.testing.conformance.rules import require, rule
from libmesh.testing.conformance.streams import Ending

MOST_LINKS = 8
"""Of a chain."""


@rule("revocation.forged", "A revocation that nobody above the link signed is ignored.", place="Revocation")
async def forged(bench: Bench) -> None:
    """A wrong signature, one by the revoked peer itself, and a chain that is not the mesh's."""
    async with bench.announced() as guest:
        links, own, number = guest.credential.links, guest.identity.seed, len(bench.signer.links)
        wrong = bench.signer.revoke(links, signer=number)
        wrong.signature = bytes(64)
        unsigned = bench.signer.revoke(links, signer=number)
        unsigned.links[0].signature = bytes(64)
        by_itself = bench.signer.revoke(links, signer=len(links), seed=own)
        in_place = bench.signer.revoke(links, signer=number, seed=own)
        for revocation in (wrong, unsigned, by_itself, in_place):
            await bench.tell(revocations=[revocation])
        require(not await guest.is_dropped(0.5), "it dropped a peer whose revocation was forged")
        require(await guest.probe(), "its answer to a probe is no")
        held = {link_id(revocation.links[-1]) for revocation in (await guest.sync()).revocations}
        require(link_id(links[-1]) not in held, "it passes on a forged revocation")


@rule(
    "revocation.cuts_off",
    "A revoked peer is cut off at once, streams included, and refused from then on.",
    place="Revocation",
    lasting=True,
    limit=20,
)
async def cuts_off(bench: Bench) -> None:
    """Revoke a member that has announced itself, while it holds a stream open."""
    signer, who = revoker(bench), Identity.fresh()
    async with bench.announced(who, signer.admit(who.key)) as guest, bench.member() as other:
        await _is_cut_off(bench, signer, guest, other)
        held = (await other.sync()).revocations
        ids = {link_id(revocation.links[-1]) for revocation in held}
        require(link_id(guest.credential.links[-1]) in ids, "it does not pass the revocation on")


def revoker(bench: Bench) -> Signer:
    """A fresh key that may revoke what it signs, if the invite allows one: peers keep so many revocations of each."""
    may_invite = bench.signer.scope == pb.SCOPE_INVITE and len(bench.signer.links) < MOST_LINKS - 1
    return bench.signer.delegate() if may_invite else bench.signer


@rule(
    "revocation.cuts_off_the_silent",
    "That holds as well for a revoked peer that has announced nothing.",
    place="Revocation",
    lasting=True,
    limit=20,
)
async def cuts_off_the_silent(bench: Bench) -> None:
    """Revoke a member of which nothing but its hello is known."""
    signer, who = revoker(bench), Identity.fresh()
    async with bench.stranger(who, signer.admit(who.key)) as guest, bench.member() as other:
        await guest.enter()
        await _is_cut_off(bench, signer, guest, other)


async def _is_cut_off(bench: Bench, signer: Signer, guest: Guest, other: Guest) -> None:
    held = await guest.say(PROBE, b"\x05")
    revocation = signer.revoke(guest.credential.links, signer=len(signer.links))
    await other.sync(revocations=[revocation])
    require(await guest.is_dropped(3), "3 s after its revocation a peer is still connected")
    ending, _ = await guest.ending(held, 1)
    require(ending is Ending.RESET, f"a stream of the revoked peer was {ending.value}")
    async with bench.stranger(guest.identity, guest.credential) as again:
        _, reply = await again.hello()
        said = f'refused it with "{reply.refusal}"' if reply.HasField("refusal") else "let it in again"
        require(reply.refusal == "revoked", f"it {said}")
    fresh = Identity.fresh()
    async with bench.stranger(fresh) as another:
        await another.enter()
