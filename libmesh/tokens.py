"""Invite tokens ⇄ values: `lm1` and URL-safe base64 of the message `Invite` in mesh.proto, with a checksum."""

from __future__ import annotations

import base64
import binascii
import hashlib

from libmesh import keys
from libmesh._pb import mesh_pb2 as pb
from libmesh.core.credentials import MAX_LINKS, Authority, Credential, Invite, Link, LinkKind
from libmesh.errors import InviteMalformed
from libmesh.wire_pieces import (
    WireError,
    addresses_from_pb,
    credential_from_pb,
    encode_address,
    exactly,
    link_to_pb,
    links_from_pb,
    parse,
)

MAX_CONTACTS = 4
MAX_CONTACT_ADDRESSES = 8
MAX_INVITE = 4 * 1024

TOKEN_PREFIX = "lm1"
_CHECKSUM = 4


def encode_invite(invite: Invite) -> str:
    """An invite as a token: `lm1` and URL-safe base64, 300 to 600 characters with two addresses."""
    message = pb.Invite(
        mesh_key=invite.authority.mesh_key,
        links=[link_to_pb(link) for link in invite.authority.links],
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
    if not isinstance(token, str):
        raise TypeError(f"an invite is a text, not {type(token).__name__}")
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
        return _invite_from_pb(parse(pb.Invite(), body, MAX_INVITE))
    except WireError as exc:
        raise InviteMalformed(f"the invite is broken: {exc}") from exc


def _invite_from_pb(message: pb.Invite) -> Invite:
    links = links_from_pb(message.links)
    seed = exactly(keys.KEY_LENGTH, message.seed, "an invite's seed")
    if not links or keys.public_key(seed) != links[-1].subject:
        raise WireError("its key does not belong to its last link")
    if len(links) >= MAX_LINKS or any(link.kind is not LinkKind.INVITE for link in links):
        raise WireError(f"its links are not 1 to {MAX_LINKS - 1} invitations")
    contacts = [
        (
            keys.peer_id_of(exactly(keys.KEY_LENGTH, contact.peer_key, "a contact's key")),
            addresses_from_pb(contact.addresses[:MAX_CONTACT_ADDRESSES]),
        )
        for contact in message.contacts[:MAX_CONTACTS]
    ]
    mesh_key = exactly(keys.KEY_LENGTH, message.mesh_key, "a mesh key")
    authority = Authority(mesh_key=mesh_key, links=links, seed=seed)
    return Invite(authority=authority, contacts=tuple(contacts))


def encode_chain(mesh_key: bytes, links: tuple[Link, ...]) -> bytes:
    """The public part of an invite or a credential: what is needed to revoke its last link."""
    return pb.Credential(mesh_key=mesh_key, links=[link_to_pb(link) for link in links]).SerializeToString()


def decode_chain(data: bytes) -> Credential:
    """The inverse of `encode_chain`; its last link may be an invite's or a peer's. Raises `InviteMalformed`."""
    try:
        return credential_from_pb(parse(pb.Credential(), data, MAX_INVITE))
    except WireError as exc:
        raise InviteMalformed(f"this names no invite: {exc}") from exc
