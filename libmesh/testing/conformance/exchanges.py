"""Rules of digests and records: what a peer tells, and what it believes."""

from __future__ import annotations

from typing import Any

import trio

from libmesh._pb import mesh_pb2 as pb
from libmesh.testing.conformance import chains
from libmesh.testing.conformance.bench import Bench, Guest
from libmesh.testing.conformance.chains import Identity, Signer
from libmesh.testing.conformance.rules import require, rule

HOUR = 3600


@rule(
    "records.whole", "Every record that it passes on is well-formed, signed, and of a member.", place="Record"
)
async def whole(bench: Bench) -> None:
    """Check all that it knows."""
    async with bench.announced() as guest:
        known = await guest.sync()
    require(bench.target.key in known.records, "it told no record of itself")
    for record in known.records.values():
        why = chains.why_not_whole(record, mesh_key=bench.signer.mesh_key, now_unix=bench.now_unix)
        require(why is None, f"it passes on a record that is bad: {why}")


@rule("digest.self", "A peer's digest names itself, as old as the record that it tells.", place="Digest")
async def names_itself(bench: Bench) -> None:
    """Compare the two."""
    async with bench.member() as guest:
        known = await guest.sync()
    require(bench.target.key in known.digest, "it is not in its own digest")
    said = pb.Announcement.FromString(known.records[bench.target.key].body)
    require(
        known.age(bench.target.key) == (said.incarnation, said.sequence),
        f"its digest has {known.age(bench.target.key)}, its record {(said.incarnation, said.sequence)}",
    )
    require(not known.digest[bench.target.key].dead, "it says of itself that it is dead")


@rule(
    "records.lacking",
    "Records that the other side lacks or has older are told; others are not.",
    place="Records",
)
async def lacking(bench: Bench) -> None:
    """Claim to know all of it, then a little less."""
    key = bench.target.key
    async with bench.member() as guest:
        for back, told in ((0, False), (1, True)):
            age, known = (0, 0), await guest.sync()
            while known.age(key) != age:  # it may have spoken in between
                age = known.age(key) or (0, 0)
                entry = pb.Digest.Entry(peer_key=key, incarnation=age[0] - back, sequence=age[1] + back)
                known = await guest.sync(digest=pb.Digest(entries=[entry]))
            have = "have it" if back == 0 else "have an older one"
            require(
                (key in known.records) is told,
                f"it {'does not tell' if told else 'tells'} it to those who {have}",
            )


@rule(
    "records.learned", "A good record is believed, and told to others, by whomever it came.", place="Record"
)
async def learned(bench: Bench) -> None:
    """Tell of ourselves, and of a peer that is elsewhere."""
    elsewhere = Identity.fresh()
    record = chains.seal(chains.announce(elsewhere, bench.credential(elsewhere), (1, 1)), elsewhere.seed)
    async with bench.announced() as guest:
        await guest.sync(record)
        known = await guest.sync()
        require(known.age(guest.identity.key) == (1, 1), "it does not know a member that announced itself")
        require(known.age(elsewhere.key) == (1, 1), "it ignores what a member tells of another")
        await farewell(guest, elsewhere)


async def farewell(guest: Guest, *others: Identity) -> None:
    """Let peers that we made up leave, so that nobody looks for them."""
    await guest.sync(
        *(
            chains.seal(
                chains.announce(other, guest.target.signer.admit(other.key), (2**40, 1), leaving=True),
                other.seed,
            )
            for other in others
        )
    )


@rule(
    "records.unchanged",
    "Records are passed on byte by byte, with fields that it does not know.",
    place="Record",
)
async def unchanged(bench: Bench) -> None:
    """An unknown field, fields in an odd order, and an address of an unknown protocol."""
    async with bench.announced() as guest:
        said = chains.announce(guest.identity, guest.credential, (1, 2))
        head = pb.Announcement(attributes=b"first", addresses=[b"\xff\xff\x03new"]).SerializeToString()
        body = b"\xc2\x3e\x03new" + head + said.SerializeToString()
        record = chains.seal(body, guest.identity.seed)
        await guest.sync(record)
        known = await guest.sync()
    require(known.age(guest.identity.key) == (1, 2), "it ignores a record with a field that it does not know")
    told = known.records.get(guest.identity.key)
    require(told is not None and told == record, "it passes the record on with other bytes")


@rule(
    "records.newer",
    "Of two announcements the one with the higher (incarnation, sequence) holds.",
    place="Announcement",
)
async def newer(bench: Bench) -> None:
    """Each one newer than the one before, by the first number or the second."""
    async with bench.announced() as guest:
        for age in ((1, 2), (1, 9), (2, 0), (2, 1)):
            await guest.sync(_aged(guest, age))
            found = (await guest.sync()).age(guest.identity.key)
            require(found == age, f"after {age} it holds {found}")


@rule(
    "records.older",
    "An announcement that is not newer than the one that holds is ignored.",
    place="Announcement",
)
async def older(bench: Bench) -> None:
    """Replay, go back, and say something else at the same age."""
    async with bench.announced() as guest:
        first, last = _aged(guest, (5, 4)), _aged(guest, (5, 5))
        await guest.sync(first, last)
        for record in (first, _aged(guest, (4, 99)), _aged(guest, (5, 5), attributes=b"other")):
            await guest.sync(record)
            known = await guest.sync()
            found = known.age(guest.identity.key)
            require(found == (5, 5), f"it holds {found}, not (5, 5)")
            require(known.records[guest.identity.key] == last, "it took another announcement of the same age")


def _aged(guest: Guest, age: tuple[int, int], **fields: Any) -> pb.Record:
    said = chains.announce(guest.identity, guest.credential, age, **fields)
    return chains.seal(said, guest.identity.seed)


async def ignored(bench: Bench, who: Identity, records: dict[str, pb.Record]) -> None:
    """Tell records of a peer that nobody knows; each has a name for what is wrong with it. None must be believed."""
    async with bench.member() as witness:
        for wrong, record in records.items():
            await bench.tell(record)
            require(who.key not in (await witness.sync()).digest, f"it believes {wrong}")


@rule("records.forged", "A record with a wrong signature is ignored.", place="Record.signature")
async def forged(bench: Bench) -> None:
    """One bit of the signature, then one byte of the body."""
    who = Identity.fresh()
    good = chains.seal(chains.announce(who, bench.credential(who), (1, 1), attributes=b"1"), who.seed)
    bad = good.signature[:-1] + bytes([good.signature[-1] ^ 1])
    wrong = {
        "a wrong signature": pb.Record(body=good.body, signature=bad),
        "a changed body": pb.Record(body=good.body[:-1] + b"2", signature=good.signature),
        "a short signature": pb.Record(body=good.body, signature=good.signature[:-1]),
    }
    await ignored(bench, who, wrong)


@rule(
    "records.by_another",
    "Nobody can announce another: the signature is by the key in the body.",
    place="Record",
)
async def by_another(bench: Bench) -> None:
    """Sign for somebody else with our own key."""
    who = Identity.fresh()
    said = chains.announce(who, bench.credential(who), (1, 1))
    await ignored(bench, who, {"a member that signs for another": chains.seal(said, Identity.fresh().seed)})


@rule(
    "records.credential",
    "A record whose credential is not good for its peer is ignored.",
    place="Announcement.credential",
)
async def credential(bench: Bench) -> None:
    """Another peer's credential, another mesh's, an expired one, a forged one, a widened one."""
    who = Identity.fresh()
    narrow = (
        bench.signer.delegate(scope=pb.SCOPE_CLIENT) if bench.signer.scope > pb.SCOPE_WORKER else bench.signer
    )
    self_signed = Signer(bench.signer.mesh_key, bench.signer.links, who.seed)
    wrong = {
        "the credential of another peer": bench.credential(Identity.fresh()),
        "the credential of another mesh": Signer.of_mesh(Identity.fresh().seed).admit(who.key),
        "an expired credential": bench.signer.admit(who.key, end=int(bench.now_unix) - HOUR),
        "a forged credential": self_signed.admit(who.key),
        "a widened credential": narrow.admit(who.key, scope=narrow.scope + 1),
        "no credential": pb.Credential(),
    }
    records = {
        why: chains.seal(chains.announce(who, shown, (1, 1)), who.seed) for why, shown in wrong.items()
    }
    await ignored(bench, who, records)


@rule("records.bounds", "A record beyond the limits of its fields is not believed.", place="Announcement")
async def bounds(bench: Bench) -> None:
    """Too many services, addresses or attributes; services out of order; a name that garbles terminals."""
    who = Identity.fresh()
    good = bench.credential(who)
    client = pb.SCOPE_CLIENT
    beyond: dict[str, dict[str, Any]] = {
        "257 services": {"services": [pb.Service(name=f"{n:03}", scope=client) for n in range(257)]},
        "unsorted services": {"services": [pb.Service(name=n, scope=client) for n in "ba"]},
        "repeated services": {"services": [pb.Service(name=n, scope=client) for n in "aa"]},
        "a service without a name": {"services": [pb.Service(name="", scope=client)]},
        "a control character in a name": {"services": [pb.Service(name="a\x1b", scope=client)]},
        "17 addresses": {"addresses": [b"\x04\x7f\x00\x00\x01\x06\x00" + bytes([n]) for n in range(17)]},
        "attributes of more than 48 KiB": {"attributes": bytes(48 * 1024 + 1)},
    }
    records = {
        why: chains.seal(chains.announce(who, good, (1, 1), **fields), who.seed)
        for why, fields in beyond.items()
    }
    await ignored(bench, who, records)


@rule(
    "digest.dead",
    "A peer that a digest calls dead raises its incarnation above that.",
    place="Digest.Entry.dead",
)
async def called_dead(bench: Bench) -> None:
    """Take the peer for dead, at its own age. It may gather several such claims before it speaks."""
    key = bench.target.key
    async with bench.member() as guest:
        age = (await guest.sync()).age(key)
        assert age is not None
        entry = pb.Digest.Entry(peer_key=key, incarnation=age[0], sequence=age[1], dead=True)
        await guest.sync(digest=pb.Digest(entries=[entry]))
        ends = trio.current_time() + bench.target.patience
        after = age
        while after[0] <= age[0] and trio.current_time() < ends:
            after = (await guest.sync()).age(key) or age
    require(after[0] > age[0], f"{bench.target.patience:.0f} s later its incarnation is still {age[0]}")


@rule(
    "digest.no_verdict",
    "A digest in which another peer is dead ends nobody.",
    place="Announcement",
)
async def no_verdict(bench: Bench) -> None:
    """Call a member dead that is there."""
    async with bench.announced() as witness, bench.member() as liar:
        key = witness.identity.key
        entry = pb.Digest.Entry(peer_key=key, incarnation=1, sequence=1, dead=True)
        await liar.sync(digest=pb.Digest(entries=[entry]))
        known = await liar.sync()
    require(key in known.digest and not known.digest[key].dead, "it takes another's word for a death")


@rule(
    "records.of_itself",
    "A forged record of the peer itself is not believed, nor passed on.",
    place="Record.signature",
)
async def of_itself(bench: Bench) -> None:
    """Let it leave, with our signature. It may speak up against that."""
    async with bench.member() as guest:
        before = (await guest.sync()).records[bench.target.key]
        said = pb.Announcement.FromString(before.body)
        said.incarnation += 1
        said.leaving = True
        await bench.tell(chains.seal(said, guest.identity.seed))
        after = (await guest.sync()).records.get(bench.target.key)
    require(after is not None, "it tells nothing of itself any more")
    assert after is not None
    why = chains.why_not_whole(after, mesh_key=bench.signer.mesh_key, now_unix=bench.now_unix)
    require(why is None, f"of itself it tells a record that is bad: {why}")
    require(not pb.Announcement.FromString(after.body).leaving, "it says that it leaves")
