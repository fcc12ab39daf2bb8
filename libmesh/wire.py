"""Values ⇄ bytes. The only file that sees generated protobuf classes; `proto/libmesh/v1/mesh.proto` is its law.

Every `decode_*` takes bytes from strangers: it raises `WireError` on anything that the specification does not allow,
and nothing else. `encode_*` takes our own values and is `decode_*`'s inverse.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtobufMessage
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from libmesh import keys
from libmesh._pb import mesh_pb2 as pb
from libmesh.core.announcement import SIGNING_CONTEXT, Announcement, Record
from libmesh.core.credentials import MAX_LINKS, Authority, Credential, Invite, Link, LinkKind, Revocation
from libmesh.core.membership_io import Suspicion
from libmesh.core.roster import Digest
from libmesh.errors import InviteMalformed, MeshError
from libmesh.peers import PeerId, Scope, Service

MAX_HELLO = 4 * 1024
MAX_DIGEST = 1024 * 1024
MAX_RECORDS = 8 * 1024 * 1024
MAX_RECORD = 60 * 1024
MAX_REVOCATIONS = 1024
MAX_PROBE = 1024
MAX_OPEN = 1024
MAX_ATTRIBUTES = 48 * 1024
MAX_SERVICES = 256
MAX_ADDRESSES = 16
MAX_CONTACTS = 4
MAX_CONTACT_ADDRESSES = 8

TOKEN_PREFIX = "lm1"
_CHECKSUM = 4

_M = TypeVar("_M", bound=ProtobufMessage)


class WireError(MeshError):
    """Bytes from a peer break the specification; the text says how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The dialler's first message."""

    agent: str
    credential: Credential


@dataclass(frozen=True, slots=True, kw_only=True)
class HelloReply:
    """The answer: either `refusal`, a word, or `credential`."""

    agent: str
    refusal: str | None = None
    credential: Credential | None = None


# ── pieces ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _exactly(length: int, data: bytes, what: str) -> bytes:
    if len(data) != length:
        raise WireError(f"{what} has {len(data)} bytes, not {length}")
    return data


def _scope(number: int) -> Scope:
    try:
        return Scope(number)
    except ValueError as exc:
        raise WireError(f"unknown scope {number}") from exc


def _link_to_pb(link: Link) -> pb.Link:
    return pb.Link(
        subject=link.subject,
        kind=pb.LinkKind.ValueType(link.kind),
        scope=pb.Scope.ValueType(link.scope),
        not_after=link.not_after_unix,
        signature=link.signature,
    )


def _link_from_pb(message: pb.Link) -> Link:
    try:
        kind = LinkKind(message.kind)
    except ValueError as exc:
        raise WireError(f"unknown link kind {message.kind}") from exc
    return Link(
        subject=_exactly(keys.KEY_LENGTH, message.subject, "a link's subject"),
        kind=kind,
        scope=_scope(message.scope),
        not_after_unix=message.not_after if message.HasField("not_after") else None,
        signature=_exactly(keys.SIGNATURE_LENGTH, message.signature, "a link's signature"),
    )


def _links_from_pb(messages: Iterable[pb.Link]) -> tuple[Link, ...]:
    links = list(messages)
    if len(links) > MAX_LINKS:
        raise WireError(f"a chain of {len(links)} links; at most {MAX_LINKS} are accepted")
    return tuple(_link_from_pb(link) for link in links)


def _credential_to_pb(credential: Credential) -> pb.Credential:
    return pb.Credential(mesh_key=credential.mesh_key, links=[_link_to_pb(link) for link in credential.links])


def _credential_from_pb(message: pb.Credential) -> Credential:
    links = _links_from_pb(message.links)
    if not links:
        raise WireError("a credential without links")
    return Credential(mesh_key=_exactly(keys.KEY_LENGTH, message.mesh_key, "a mesh key"), links=links)


def encode_address(address: str) -> bytes:
    """A multiaddr's binary form. Raises `ValueError` if `address` is none."""
    try:
        return bytes(Multiaddr(address).to_bytes())
    except (MultiaddrError, ValueError) as exc:
        raise ValueError(f"{address!r} is not a multiaddr, such as /ip4/192.0.2.1/tcp/4001: {exc}") from exc


def _address_from_bytes(data: bytes) -> str:
    if len(data) > 255:
        raise WireError(f"an address of {len(data)} bytes")
    try:
        return str(Multiaddr(data))
    # multiaddr lets its codecs' own errors through (struct.error, KeyError, …); all of them mean the same.
    except Exception as exc:
        raise WireError(f"an address that is no multiaddr: {exc}") from exc


def valid_service_name(name: str) -> bool:
    """Whether `name` may name a service: 1 to 255 bytes of UTF-8 without control characters."""
    return 1 <= len(name.encode()) <= 255 and not any(unicodedata.category(c).startswith("C") for c in name)


def _parse(message: _M, data: bytes, limit: int) -> _M:
    if len(data) > limit:
        raise WireError(f"a {type(message).__name__} of {len(data)} bytes; at most {limit} are allowed")
    try:
        message.ParseFromString(data)
    except DecodeError as exc:
        raise WireError(f"not a {type(message).__name__}: {exc}") from exc
    return message


# ── hello ────────────────────────────────────────────────────────────────────────────────────────────────────────


def encode_hello(hello: Hello) -> bytes:
    """The bytes of a `Hello`."""
    message = pb.Hello(agent=hello.agent, credential=_credential_to_pb(hello.credential))
    return message.SerializeToString()


def decode_hello(data: bytes) -> Hello:
    """The inverse of `encode_hello`."""
    message = _parse(pb.Hello(), data, MAX_HELLO)
    return Hello(agent=message.agent[:128], credential=_credential_from_pb(message.credential))


def encode_hello_reply(reply: HelloReply) -> bytes:
    """The bytes of a `HelloReply`."""
    message = pb.HelloReply(agent=reply.agent, refusal=reply.refusal)
    if reply.credential is not None:
        message.credential.CopyFrom(_credential_to_pb(reply.credential))
    return message.SerializeToString()


def decode_hello_reply(data: bytes) -> HelloReply:
    """The inverse of `encode_hello_reply`."""
    message = _parse(pb.HelloReply(), data, MAX_HELLO)
    if message.HasField("refusal"):
        return HelloReply(agent=message.agent[:128], refusal=message.refusal)
    return HelloReply(agent=message.agent[:128], credential=_credential_from_pb(message.credential))


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
    return pb.Digest(entries=entries).SerializeToString()


def decode_digest(data: bytes) -> Digest:
    """The inverse of `encode_digest`."""
    message = _parse(pb.Digest(), data, MAX_DIGEST)
    ages: dict[PeerId, tuple[int, int]] = {}
    dead: set[PeerId] = set()
    for entry in message.entries:
        peer = keys.peer_id_of(_exactly(keys.KEY_LENGTH, entry.peer_key, "a peer's key"))
        ages[peer] = (entry.incarnation, entry.sequence)
        if entry.dead:
            dead.add(peer)
    return Digest(ages, frozenset(dead))


# ── announcements ────────────────────────────────────────────────────────────────────────────────────────────────


def seal(announcement: Announcement, seed: bytes) -> Record:
    """Encode `announcement` and sign it with its peer's `seed`."""
    message = pb.Announcement(
        peer_key=keys.public_key_of(announcement.peer),
        credential=_credential_to_pb(announcement.credential),
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
    message = _parse(pb.Gossip(), data, MAX_RECORD)
    match message.WhichOneof("kind"):
        case "record":
            return _record_from_pb(message.record)
        case "revocation":
            return _revocation_from_pb(message.revocation)
        case "suspicion":
            hint = message.suspicion
            return Suspicion(
                keys.peer_id_of(_exactly(keys.KEY_LENGTH, hint.peer_key, "a peer's key")),
                hint.incarnation,
                hint.sequence,
            )
        case _:
            return None


def _revocation_to_pb(revocation: Revocation) -> pb.Revocation:
    return pb.Revocation(
        mesh_key=revocation.mesh_key,
        links=[_link_to_pb(link) for link in revocation.links],
        signer=revocation.signer,
        signature=revocation.signature,
    )


def _revocation_from_pb(message: pb.Revocation) -> Revocation:
    links = _links_from_pb(message.links)
    if not links or message.signer >= len(links):
        raise WireError("a revocation whose signer does not stand above its link")
    return Revocation(
        mesh_key=_exactly(keys.KEY_LENGTH, message.mesh_key, "a mesh key"),
        links=links,
        signer=message.signer,
        signature=_exactly(keys.SIGNATURE_LENGTH, message.signature, "a revocation's signature"),
    )


def encode_revocation(revocation: Revocation) -> bytes:
    """The bytes of a `Revocation`, as kept on disk."""
    return _revocation_to_pb(revocation).SerializeToString()


def decode_revocation(data: bytes) -> Revocation:
    """The inverse of `encode_revocation`."""
    return _revocation_from_pb(_parse(pb.Revocation(), data, MAX_HELLO))


def _record_from_pb(message: pb.Record) -> Record:
    body = _parse(pb.Announcement(), message.body, MAX_RECORD)
    if len(body.services) > MAX_SERVICES or len(body.addresses) > MAX_ADDRESSES:
        raise WireError(f"{len(body.services)} services, {len(body.addresses)} addresses: too many")
    if len(body.attributes) > MAX_ATTRIBUTES:
        raise WireError(f"attributes of {len(body.attributes)} bytes; at most {MAX_ATTRIBUTES} are allowed")
    services = tuple(Service(name=service.name, scope=_scope(service.scope)) for service in body.services)
    names = [service.name for service in services]
    if names != sorted(set(names)) or not all(valid_service_name(name) for name in names):
        raise WireError("services are unsorted, repeated or misnamed")
    announcement = Announcement(
        peer=keys.peer_id_of(_exactly(keys.KEY_LENGTH, body.peer_key, "a peer's key")),
        credential=_credential_from_pb(body.credential),
        incarnation=body.incarnation,
        sequence=body.sequence,
        leaving=body.leaving,
        services=services,
        addresses=tuple(_address_from_bytes(address) for address in body.addresses),
        attributes=body.attributes,
    )
    signature = _exactly(keys.SIGNATURE_LENGTH, message.signature, "an announcement's signature")
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
    message = _parse(pb.Records(), data, MAX_RECORDS)
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
    message = _parse(pb.Probe(), data, MAX_PROBE)
    if not message.HasField("target_key"):
        return None
    return keys.peer_id_of(_exactly(keys.KEY_LENGTH, message.target_key, "a target's key"))


def encode_probe_answer(heard: bool) -> bytes:
    """The bytes of a `ProbeAnswer`."""
    return pb.ProbeAnswer(heard=heard).SerializeToString()


def decode_probe_answer(data: bytes) -> bool:
    """The inverse of `encode_probe_answer`."""
    return _parse(pb.ProbeAnswer(), data, MAX_PROBE).heard


# ── tunnels ──────────────────────────────────────────────────────────────────────────────────────────────────────


def encode_open(service: str) -> bytes:
    """The bytes of an `Open`."""
    return pb.Open(service=service).SerializeToString()


def decode_open(data: bytes) -> str:
    """The service that is asked for."""
    service = _parse(pb.Open(), data, MAX_OPEN).service
    if not valid_service_name(service):
        raise WireError("an Open with a bad service name")
    return service


def encode_opened(refusal: str | None) -> bytes:
    """The bytes of an `Opened`; `None` accepts."""
    return pb.Opened(refusal=refusal).SerializeToString()


def decode_opened(data: bytes) -> str | None:
    """The refusal's word, or `None`."""
    message = _parse(pb.Opened(), data, MAX_OPEN)
    return message.refusal if message.HasField("refusal") else None


# ── tokens and what is kept on disk ──────────────────────────────────────────────────────────────────────────────


def encode_invite(invite: Invite) -> str:
    """An invite as a token: `lm1` and URL-safe base64, 300 to 600 characters with two addresses."""
    message = pb.Invite(
        mesh_key=invite.authority.mesh_key,
        links=[_link_to_pb(link) for link in invite.authority.links],
        seed=invite.authority.seed,
        contacts=[
            pb.Contact(
                peer_key=keys.public_key_of(peer),
                addresses=[encode_address(address) for address in addresses[:MAX_CONTACT_ADDRESSES]],
            )
            for peer, addresses in invite.contacts[:MAX_CONTACTS]
        ],
    )
    body = message.SerializeToString(deterministic=True)
    data = body + hashlib.sha256(body).digest()[:_CHECKSUM]
    return TOKEN_PREFIX + base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def decode_invite(token: str) -> Invite:
    """The inverse of `encode_invite`. Raises `InviteMalformed`; does not check times or signatures."""
    text = "".join(token.split())
    if not text.startswith("lm"):
        raise InviteMalformed(f"this is no invite: a token starts with '{TOKEN_PREFIX}'")
    if not text.startswith(TOKEN_PREFIX):
        raise InviteMalformed(
            f"this invite is of a version ({text[:3]}) that this program does not know; update it"
        )
    encoded = text[len(TOKEN_PREFIX) :]
    try:
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as exc:
        raise InviteMalformed("the invite has characters that no token has; copy it again, whole") from exc
    body, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:]
    if len(data) <= _CHECKSUM or hashlib.sha256(body).digest()[:_CHECKSUM] != checksum:
        raise InviteMalformed("the invite is mistyped or cut off; copy it again, whole")
    try:
        return _invite_from_pb(_parse(pb.Invite(), body, MAX_HELLO))
    except WireError as exc:
        raise InviteMalformed(f"the invite is broken: {exc}") from exc


def _invite_from_pb(message: pb.Invite) -> Invite:
    links = _links_from_pb(message.links)
    seed = _exactly(keys.KEY_LENGTH, message.seed, "an invite's seed")
    if not links or keys.public_key(seed) != links[-1].subject:
        raise WireError("its key does not belong to its last link")
    contacts = [
        (
            keys.peer_id_of(_exactly(keys.KEY_LENGTH, contact.peer_key, "a contact's key")),
            tuple(_address_from_bytes(address) for address in contact.addresses[:MAX_CONTACT_ADDRESSES]),
        )
        for contact in message.contacts[:MAX_CONTACTS]
    ]
    mesh_key = _exactly(keys.KEY_LENGTH, message.mesh_key, "a mesh key")
    authority = Authority(mesh_key=mesh_key, links=links, seed=seed)
    return Invite(authority=authority, contacts=tuple(contacts))
