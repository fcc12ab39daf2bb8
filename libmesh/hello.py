"""The first conversation on a connection: both sides prove their membership, then tell what the other has missed.

The rules are in `mesh.proto`. A stranger costs at most one message of 4 KiB and one check of a chain, and is told
nothing but the reason of its refusal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import trio

from libmesh import keys, wire
from libmesh.core import credentials
from libmesh.core import membership_io as io
from libmesh.core.credentials import Credential, Refusal
from libmesh.core.membership import Membership
from libmesh.errors import AdmissionRefused
from libmesh.framing import frame, receive_frame
from libmesh.net.base import Stream
from libmesh.peers import PeerId
from libmesh.wire_pieces import NotAMessage, WireError

PROTOCOL = "/libmesh/hello/1.0.0"

Tell = Callable[[io.Event], None]
"""Passes an event to the membership machine, and does what it asks."""

_ADVICE = {
    "wrong_mesh": "the invite is for another mesh",
    "expired": "the invite has expired; ask for a new one",
    "revoked": "the invite was revoked; ask for a new one",
    "forged": "the invite's signatures are wrong; ask for a new one",
    "widened": "the invite gives more than its maker had; ask for a new one",
    "not_yours": "the credential belongs to another node; join again with an invite",
    "busy": "the other node has no room now; try again later",
    "malformed": "the other node did not understand ours; update both",
}


@dataclass(frozen=True, slots=True)
class Greeting:
    """What both sides of a hello need.

    Attributes:
        agent: name and version, for people.
        credential: ours.
        membership: says which mesh this is, and what was revoked in it; not changed here.
        now_unix: the time, for expiry.
        following: we announce nothing ourselves.
        attributes: what we would say, if we follow.
        room: whether we take the peer if it follows.
    """

    agent: str
    credential: Credential
    membership: Membership
    now_unix: float
    following: bool = False
    attributes: bytes = b""
    room: bool = True

    def check(self, peer: PeerId, shown: Credential) -> Refusal | None:
        """Whether `peer` may be in our mesh with what it showed."""
        try:
            peer_key = keys.public_key_of(peer)
        except ValueError as exc:
            return Refusal("malformed", str(exc))
        return credentials.verify(
            shown,
            mesh_id=self.membership.mesh_id,
            peer_key=peer_key,
            now_unix=self.now_unix,
            revoked=self.membership.revoked,
        )


@dataclass(frozen=True, slots=True)
class Greeted:
    """What the other side showed and said: its credential, checked, and, if it follows, its `attributes`."""

    credential: Credential
    following: bool = False
    attributes: bytes = b""


async def greet(stream: Stream, greeting: Greeting) -> Greeted:
    """Say hello first; return what the other side showed.

    Raises `AdmissionRefused` if they refuse us, or we them; `WireError` or a stream error if they make no sense.
    """
    hello = wire.Hello(
        agent=greeting.agent,
        credential=greeting.credential,
        following=greeting.following,
        attributes=greeting.attributes,
    )
    await stream.send_all(frame(wire.encode_hello(hello)))
    reply = wire.decode_hello_reply(await receive_frame(stream, wire.MAX_HELLO))
    if reply.refusal is not None or reply.credential is None:
        reason = reply.refusal if reply.refusal in _ADVICE else "malformed"
        raise AdmissionRefused(
            f"the mesh refused this node: {_ADVICE[reason]}", reason=reason, peer=stream.peer
        )
    if (refusal := greeting.check(stream.peer, reply.credential)) is not None:
        raise AdmissionRefused(
            f"the peer {stream.peer} is not a member of this mesh: {refusal.detail}",
            reason=refusal.reason,
            peer=stream.peer,
        )
    return Greeted(reply.credential, reply.following, reply.attributes)


async def answer(stream: Stream, greeting: Greeting) -> Greeted:
    """Take a hello; return what the other side showed, with our own sent to it.

    Raises `AdmissionRefused` after telling them so, `WireError` or a stream error if they make no sense.
    """
    said = await receive_frame(stream, wire.MAX_HELLO)
    try:
        hello = wire.decode_hello(said)
    except NotAMessage:
        raise
    except WireError as exc:
        await _refuse(stream, greeting, Refusal("malformed", str(exc)))
    if (refusal := greeting.check(stream.peer, hello.credential)) is not None:
        await _refuse(stream, greeting, refusal)
    if hello.following and not greeting.room:
        await _refuse(stream, greeting, Refusal("busy", "as many follow as there is room for"))
    reply = wire.HelloReply(
        agent=greeting.agent,
        credential=greeting.credential,
        following=greeting.following,
        attributes=greeting.attributes,
    )
    await stream.send_all(frame(wire.encode_hello_reply(reply)))
    return Greeted(hello.credential, hello.following, hello.attributes)


async def _refuse(stream: Stream, greeting: Greeting, refusal: Refusal) -> NoReturn:
    reply = wire.HelloReply(agent=greeting.agent, refusal=refusal.reason)
    await stream.send_all(frame(wire.encode_hello_reply(reply)))
    await stream.send_eof()
    await _wait_until_read(stream)
    raise AdmissionRefused(
        f"refused the peer {stream.peer}: {refusal.detail}", reason=refusal.reason, peer=stream.peer
    )


async def _wait_until_read(stream: Stream) -> None:
    """Leave the other side a second to read a refusal before its connection is closed."""
    with trio.move_on_after(1):
        while await stream.receive_some():
            pass
