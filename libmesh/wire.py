"""Values ⇄ bytes, for all that peers say to each other; `proto/libmesh/v1/mesh.proto` is its law.

Every `decode_*` takes bytes from strangers: it raises `WireError` on anything that the specification does not allow,
and nothing else. `encode_*` takes our own values and is `decode_*`'s inverse. Only this file, `tokens.py` and
`wire_pieces.py` see generated protobuf classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from libmesh import keys
from libmesh._pb import mesh_pb2 as pb
from libmesh.core.announcement import SIGNING_CONTEXT, Announcement, Record
from libmesh.core.credentials import MAX_REVOCATIONS, Credential, Revocation
from libmesh.core.membership_io import Suspicion
from libmesh.core.summary import BUCKETS, CUT, FINGERPRINT, Digest, Part, Summary
from libmesh.peers import PeerId, Service
from libmesh.wire_pieces import (
    WireError,
    addresses_from_pb,
    credential_from_pb,
    credential_to_pb,
    encode_address,
    exactly,
    link_to_pb,
    links_from_pb,
    parse,
    scope_from_pb,
    valid_service_name,
)

MAX_HELLO = 4 * 1024
MAX_FOLLOWER_ATTRIBUTES = 1024
MAX_DIGEST = 1024 * 1024
MAX_SUMMARY = 1024
MAX_RECORDS = 8 * 1024 * 1024
MAX_RECORD = 60 * 1024
MAX_PROBE = 1024
MAX_OPEN = 1024
MAX_POST = 60 * 1024
MAX_POST_DATA = 56 * 1024
MAX_ATTRIBUTES = 48 * 1024
MAX_SERVICES = 256
MAX_ADDRESSES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The dialler's first message. `attributes` only with `following`, and at most 1 KiB: more is sent as none."""

    agent: str
    credential: Credential
    following: bool = False
    attributes: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class HelloReply:
    """The answer: either `refusal`, a word, or `credential`. The rest as in `Hello`."""

    agent: str
    refusal: str | None = None
    credential: Credential | None = None
    following: bool = False
    attributes: bytes = b""


# ── hello ────────────────────────────────────────────────────────────────────────────────────────────────────────


def encode_hello(hello: Hello) -> bytes:
    """The bytes of a `Hello`."""
    message = pb.Hello(agent=hello.agent, credential=credential_to_pb(hello.credential))
    _say_following(message, hello)
    return message.SerializeToString()


def decode_hello(data: bytes) -> Hello:
    """The inverse of `encode_hello`."""
    message = parse(pb.Hello(), data, MAX_HELLO)
    credential = credential_from_pb(message.credential)
    return Hello(agent=message.agent[:128], credential=credential, **_following(message))


def encode_hello_reply(reply: HelloReply) -> bytes:
    """The bytes of a `HelloReply`."""
    message = pb.HelloReply(agent=reply.agent, refusal=reply.refusal)
    if reply.credential is not None:
        message.credential.CopyFrom(credential_to_pb(reply.credential))
    _say_following(message, reply)
    return message.SerializeToString()


def decode_hello_reply(data: bytes) -> HelloReply:
    """The inverse of `encode_hello_reply`."""
    message = parse(pb.HelloReply(), data, MAX_HELLO)
    if message.HasField("refusal"):
        return HelloReply(agent=message.agent[:128], refusal=message.refusal)
    credential = credential_from_pb(message.credential)
    return HelloReply(agent=message.agent[:128], credential=credential, **_following(message))


def _say_following(message: pb.Hello | pb.HelloReply, said: Hello | HelloReply) -> None:
    message.following = said.following
    if said.following and len(said.attributes) <= MAX_FOLLOWER_ATTRIBUTES:
        message.attributes = said.attributes


def _following(message: pb.Hello | pb.HelloReply) -> dict[str, Any]:
    known = message.following and len(message.attributes) <= MAX_FOLLOWER_ATTRIBUTES
    return {"following": message.following, "attributes": message.attributes if known else b""}


def encode_digest(digest: Digest) -> bytes:
    """The bytes of a `Digest`."""
    entries = [
        pb.Digest.Entry(
            peer_key=keys.public_key_of(peer),
            incarnation=incarnation,
            sequence=sequence,
            dead=peer in digest.dead,
        )
        for peer, (incarnation, sequence) in digest.ages.items()
    ]
    return pb.Digest(entries=entries, part=_part_to_pb(digest.part)).SerializeToString()


def decode_digest(data: bytes) -> Digest:
    """The inverse of `encode_digest`."""
    message = parse(pb.Digest(), data, MAX_DIGEST)
    ages: dict[PeerId, tuple[int, int]] = {}
    dead: set[PeerId] = set()
    for entry in message.entries:
        peer = keys.peer_id_of(exactly(keys.KEY_LENGTH, entry.peer_key, "a peer's key"))
        ages[peer] = (entry.incarnation, entry.sequence)
        if entry.dead:
            dead.add(peer)
    return Digest(ages, frozenset(dead), _part_from_pb(message.part) if message.HasField("part") else None)


def _part_to_pb(part: Part | None) -> pb.Part | None:
    return (
        None if part is None else pb.Part(buckets=bytes(sorted(part.buckets)), revocations=part.revocations)
    )


def _part_from_pb(message: pb.Part) -> Part:
    if any(bucket >= BUCKETS for bucket in message.buckets):
        raise WireError(f"a bucket that is not below {BUCKETS}")
    return Part(frozenset(message.buckets), message.revocations)


def encode_summary(fingerprint: bytes, summary: Summary | None) -> bytes:
    """The bytes of a `Summary`: the fingerprint of all, and, if wanted, those of the parts that it is made of."""
    parts = None if summary is None else b"".join(summary.buckets) + summary.revocations
    return pb.Summary(fingerprint=fingerprint, parts=parts).SerializeToString()


def decode_summary(data: bytes) -> tuple[bytes, Summary | None]:
    """The inverse of `encode_summary`. Parts that do not make the fingerprint are an error."""
    message = parse(pb.Summary(), data, MAX_SUMMARY)
    fingerprint = exactly(FINGERPRINT, message.fingerprint, "a fingerprint")
    if not message.HasField("parts"):
        return fingerprint, None
    parts = exactly((BUCKETS + 1) * CUT, message.parts, "the fingerprints of the parts")
    *buckets, revocations = (parts[start : start + CUT] for start in range(0, len(parts), CUT))
    summary = Summary(tuple(buckets), revocations)
    if summary.fingerprint != fingerprint:
        raise WireError("fingerprints of parts that are not those of the whole")
    return fingerprint, summary


# ── announcements ────────────────────────────────────────────────────────────────────────────────────────────────


def seal(announcement: Announcement, seed: bytes) -> Record:
    """Encode `announcement` and sign it with its peer's `seed`."""
    message = pb.Announcement(
        peer_key=keys.public_key_of(announcement.peer),
        credential=credential_to_pb(announcement.credential),
        incarnation=announcement.incarnation,
        sequence=announcement.sequence,
        leaving=announcement.leaving,
        services=[
            pb.Service(name=service.name, scope=pb.Scope.ValueType(service.scope))
            for service in announcement.services
        ],
        addresses=[encode_address(address) for address in announcement.addresses],
        attributes=announcement.attributes,
    )
    body = message.SerializeToString(deterministic=True)
    return Record(announcement=announcement, body=body, signature=keys.sign(seed, SIGNING_CONTEXT + body))


def encode_gossip(said: Record | Revocation | Suspicion) -> bytes:
    """The bytes of a `Gossip`."""
    message = pb.Gossip()
    match said:
        case Record():
            message.record.CopyFrom(pb.Record(body=said.body, signature=said.signature))
        case Revocation():
            message.revocation.CopyFrom(_revocation_to_pb(said))
        case Suspicion():
            message.suspicion.CopyFrom(
                pb.Suspicion(
                    peer_key=keys.public_key_of(said.peer),
                    incarnation=said.incarnation,
                    sequence=said.sequence,
                )
            )
    return message.SerializeToString()


def decode_gossip(data: bytes) -> Record | Revocation | Suspicion | None:
    """The inverse of `encode_gossip`; `None` for a kind that is not known. Signatures are not looked at."""
    message = parse(pb.Gossip(), data, MAX_RECORD)
    match message.WhichOneof("kind"):
        case "record":
            return _record_from_pb(message.record)
        case "revocation":
            return _revocation_from_pb(message.revocation)
        case "suspicion":
            hint = message.suspicion
            return Suspicion(
                keys.peer_id_of(exactly(keys.KEY_LENGTH, hint.peer_key, "a peer's key")),
                hint.incarnation,
                hint.sequence,
            )
        case _:
            return None


def _revocation_to_pb(revocation: Revocation) -> pb.Revocation:
    return pb.Revocation(
        mesh_key=revocation.mesh_key,
        links=[link_to_pb(link) for link in revocation.links],
        signer=revocation.signer,
        signature=revocation.signature,
    )


def _revocation_from_pb(message: pb.Revocation) -> Revocation:
    links = links_from_pb(message.links)
    if not links or message.signer >= len(links):
        raise WireError("a revocation whose signer does not stand above its link")
    return Revocation(
        mesh_key=exactly(keys.KEY_LENGTH, message.mesh_key, "a mesh key"),
        links=links,
        signer=message.signer,
        signature=exactly(keys.SIGNATURE_LENGTH, message.signature, "a revocation's signature"),
    )


def encode_revocation(revocation: Revocation) -> bytes:
    """The bytes of a `Revocation`, as kept on disk."""
    return _revocation_to_pb(revocation).SerializeToString()


def decode_revocation(data: bytes) -> Revocation:
    """The inverse of `encode_revocation`."""
    return _revocation_from_pb(parse(pb.Revocation(), data, MAX_HELLO))


def _record_from_pb(message: pb.Record) -> Record:
    body = parse(pb.Announcement(), message.body, MAX_RECORD)
    if len(body.services) > MAX_SERVICES or len(body.addresses) > MAX_ADDRESSES:
        raise WireError(f"{len(body.services)} services, {len(body.addresses)} addresses: too many")
    if len(body.attributes) > MAX_ATTRIBUTES:
        raise WireError(f"attributes of {len(body.attributes)} bytes; at most {MAX_ATTRIBUTES} are allowed")
    services = tuple(
        Service(name=service.name, scope=scope_from_pb(service.scope)) for service in body.services
    )
    names = [service.name for service in services]
    if names != sorted(set(names)) or not all(valid_service_name(name) for name in names):
        raise WireError("services are unsorted, repeated or misnamed")
    announcement = Announcement(
        peer=keys.peer_id_of(exactly(keys.KEY_LENGTH, body.peer_key, "a peer's key")),
        credential=credential_from_pb(body.credential),
        incarnation=body.incarnation,
        sequence=body.sequence,
        leaving=body.leaving,
        services=services,
        addresses=addresses_from_pb(body.addresses),
        attributes=body.attributes,
    )
    signature = exactly(keys.SIGNATURE_LENGTH, message.signature, "an announcement's signature")
    return Record(announcement=announcement, body=message.body, signature=signature)


def encode_records(records: Iterable[Record], revocations: Iterable[Revocation] = ()) -> bytes:
    """The bytes of a `Records`. What would go over its limit is left out; gossip brings it later."""
    message = pb.Records(revocations=[_revocation_to_pb(revocation) for revocation in revocations])
    size = message.ByteSize()
    for record in records:
        size += len(record.body) + 128
        if size > MAX_RECORDS:
            break
        message.records.add(body=record.body, signature=record.signature)
    return message.SerializeToString()


def decode_records(data: bytes) -> tuple[list[Record], list[Revocation]]:
    """The inverse of `encode_records`. One bad record spoils all: its sender is broken or lies."""
    message = parse(pb.Records(), data, MAX_RECORDS)
    if len(message.revocations) > MAX_REVOCATIONS:
        raise WireError(f"{len(message.revocations)} revocations; at most {MAX_REVOCATIONS} are allowed")
    records = [_record_from_pb(record) for record in message.records]
    return records, [_revocation_from_pb(revocation) for revocation in message.revocations]


# ── probes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def encode_probe(target: PeerId | None) -> bytes:
    """The bytes of a `Probe`; `None` asks whether the other side itself is there."""
    return pb.Probe(target_key=None if target is None else keys.public_key_of(target)).SerializeToString()


def decode_probe(data: bytes) -> PeerId | None:
    """The inverse of `encode_probe`."""
    message = parse(pb.Probe(), data, MAX_PROBE)
    if not message.HasField("target_key"):
        return None
    return keys.peer_id_of(exactly(keys.KEY_LENGTH, message.target_key, "a target's key"))


def encode_probe_answer(heard: bool) -> bytes:
    """The bytes of a `ProbeAnswer`."""
    return pb.ProbeAnswer(heard=heard).SerializeToString()


def decode_probe_answer(data: bytes) -> bool:
    """The inverse of `encode_probe_answer`."""
    return parse(pb.ProbeAnswer(), data, MAX_PROBE).heard


# ── tunnels ──────────────────────────────────────────────────────────────────────────────────────────────────────


def encode_open(service: str, session: bytes = b"") -> bytes:
    """The bytes of an `Open`."""
    return pb.Open(service=service, session=session).SerializeToString()


def decode_open(data: bytes) -> str:
    """The service that is asked for."""
    service = parse(pb.Open(), data, MAX_OPEN).service
    if not valid_service_name(service):
        raise WireError("an Open with a bad service name")
    return service


def encode_opened(refusal: str | None, *, resumable: bool = False) -> bytes:
    """The bytes of an `Opened`; `None` accepts."""
    return pb.Opened(refusal=refusal, resumable=resumable).SerializeToString()


def decode_opened(data: bytes) -> str | None:
    """The refusal's word, or `None`."""
    message = parse(pb.Opened(), data, MAX_OPEN)
    return message.refusal if message.HasField("refusal") else None


# ── applications' own messages ───────────────────────────────────────────────────────────────────────────────────


def encode_post(topic: str, data: bytes) -> bytes:
    """The bytes of a `Post`."""
    return pb.Post(topic=topic, data=data).SerializeToString()


def decode_post(data: bytes) -> tuple[str, bytes]:
    """The topic and the data."""
    post = parse(pb.Post(), data, MAX_POST)
    if not valid_service_name(post.topic):
        raise WireError("a post with a bad topic")
    return post.topic, post.data
