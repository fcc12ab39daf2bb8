"""Peers that let in whom they should not, or tell them too much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import trio
from google.protobuf.unknown_fields import UnknownFieldSet
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport

from libmesh import Libp2pConfig, PeerId, framing, hello, syncing, wire, wire_pieces
from libmesh.core import credentials
from libmesh.core import membership_io as io
from libmesh.core.membership import Membership
from libmesh.net.base import Stream
from libmesh.net.muxed_stream import YamuxStream
from libmesh.net.negotiate import Libp2pStream
from libmesh.net.serving import StreamServer
from libmesh.wire_pieces import WireError
from tests.conformance.mutants.base import Patch, PeerNetwork, ignore, mutant

# ── who is let in ─────────────────────────────────────────────────────────────────────────────────────────────


def _verify_with(patch: Patch, change: Callable[..., dict[str, Any]]) -> None:
    verify = credentials.verify
    patch.setattr(
        credentials, "verify", lambda shown, **given: verify(shown, **(given | change(shown, **given)))
    )


@mutant("hello.expired", "let it in")
def accepts_expired_chains(patch: Patch) -> None:
    _verify_with(patch, lambda *_, **__: {"now_unix": 0.0})


@mutant("hello.widened_scope", "let it in")
def does_not_check_narrowing(patch: Patch) -> None:
    patch.setattr(credentials, "_narrowing_broken", lambda _: None)


@mutant("hello.widened_end", "let it in")
def checks_the_narrowing_of_scopes_only(patch: Patch) -> None:
    broken = credentials._narrowing_broken

    def scopes(links: Any) -> str | None:
        return broken(tuple(replace(link, not_after_unix=None) for link in links))

    patch.setattr(credentials, "_narrowing_broken", scopes)


@mutant("hello.widened_invite", "let it in")
def lets_clients_invite(patch: Patch) -> None:
    broken = credentials._narrowing_broken

    def but_that(links: Any) -> str | None:
        why = broken(links)
        return None if why is not None and "used to make another" in why else why

    patch.setattr(credentials, "_narrowing_broken", but_that)


@mutant("hello.forged_signature", "let it in")
def does_not_check_signatures_of_links(patch: Patch) -> None:
    _verify_with(patch, lambda *_, **__: {"verify_signature": lambda *_: True})


@mutant("hello.forged_above", "let it in")
def checks_the_last_signature_only(patch: Patch) -> None:
    def change(shown: Any, **given: Any) -> dict[str, Any]:
        last = shown.links[-1].signature
        check = credentials.keys.verify
        return {"verify_signature": lambda key, data, sig: sig != last or check(key, data, sig)}

    _verify_with(patch, change)


@mutant("hello.not_yours", "let it in")
def accepts_a_peer_link_for_another_key(patch: Patch) -> None:
    _verify_with(patch, lambda shown, **_: {"peer_key": shown.links[-1].subject})


@mutant("hello.wrong_mesh", "let it in")
def accepts_every_mesh(patch: Patch) -> None:
    _verify_with(patch, lambda shown, **_: {"mesh_id": shown.mesh_id})


@mutant("hello.no_peer_link", "let it in")
def accepts_an_invite_in_place_of_a_credential(patch: Patch) -> None:
    verify = credentials.verify

    def lenient(shown: Any, **given: Any) -> Any:
        refusal = verify(shown, **given)
        return None if refusal is not None and "followed by one peer" in refusal.detail else refusal

    patch.setattr(credentials, "verify", lenient)


@mutant("hello.eight_links", "it")
def accepts_short_chains_only(patch: Patch) -> None:
    patch.setattr(wire_pieces, "MAX_LINKS", 4)


@mutant("hello.nine_links", "let a chain of nine in", slow=True)
def accepts_long_chains(patch: Patch) -> None:
    patch.setattr(wire_pieces, "MAX_LINKS", 99)
    patch.setattr(credentials, "MAX_LINKS", 99)


@mutant("hello.admits", 'refused with "not_yours"')
def takes_everybody_for_somebody_else(patch: Patch) -> None:
    _verify_with(patch, lambda *_, **__: {"peer_key": bytes(32)})


@mutant("hello.unknown_fields", "malformed")
def takes_unknown_fields_for_errors(patch: Patch) -> None:
    parse = wire.parse

    def strict(message: Any, data: bytes, limit: int) -> Any:
        parsed = parse(message, data, limit)
        if len(UnknownFieldSet(parsed)):
            raise WireError("a field that is not known")
        return parsed

    patch.setattr(wire, "parse", strict)


@mutant("hello.refusal_tells_nothing", "shows its credential")
def shows_its_credential_to_those_it_refuses(patch: Patch) -> None:
    encode = wire.encode_hello_reply

    def tell_all(reply: wire.HelloReply) -> bytes:
        return encode(reply) + (b"\x1a\x02\x0a\x00" if reply.refusal else b"")

    patch.setattr(wire, "encode_hello_reply", tell_all)


@mutant("hello.refusal_tells_nothing", "names the mesh")
def tells_its_mesh_id_in_refusals(patch: Patch) -> None:
    check = hello.Greeting.check

    def remember(self: hello.Greeting, peer: PeerId, shown: Any) -> Any:
        refusal = check(self, peer, shown)
        object.__setattr__(self, "agent", f"of {self.membership.mesh_id}")
        return refusal

    patch.setattr(hello.Greeting, "check", remember)


@mutant("hello.refusal_closes", "connection was left open", slow=True)
def does_not_close_after_a_refusal(patch: Patch) -> None:
    async def stay(self: Any, peer: PeerId) -> None:
        await trio.lowlevel.checkpoint()

    patch.setattr(PeerNetwork, "disconnect", stay)


@mutant("hello.exchange", "did not wait")
def does_not_wait_for_its_turn(patch: Patch) -> None:
    async def eager(stream: Stream, membership: Membership, tell: hello.Tell, **how: Any) -> list[io.Event]:
        await stream.send_all(framing.frame(wire.encode_digest(membership.digest())))
        return await exchange(stream, membership, tell, **how)

    exchange = syncing.exchange
    patch.setattr(syncing, "exchange", eager)


@mutant("transport.ed25519_only", "let it in")
def lets_everybody_in(patch: Patch) -> None:
    patch.setattr(hello.Greeting, "check", lambda *_: None)


@mutant("transport.no_plaintext", "agreed to /plaintext")
def speaks_in_clear_if_asked(patch: Patch) -> None:
    make = PeerNetwork.__init__

    def make_open(self: PeerNetwork, seed: bytes, config: Libp2pConfig) -> None:
        make(self, seed, config)
        clear = InsecureTransport(create_new_key_pair(seed))
        self._swarm.upgrader.security_multistream.add_transport(PLAINTEXT_PROTOCOL_ID, clear)

    patch.setattr(PeerNetwork, "__init__", make_open)


@mutant("limits.streams", "", slow=True)
def has_streams_for_a_while_only(patch: Patch) -> None:
    take, served = StreamServer.take, 0

    def take_some(self: StreamServer, muxed: YamuxStream) -> None:
        nonlocal served
        served += 1
        if served <= 500:
            take(self, muxed)

    patch.setattr(StreamServer, "take", take_some)


# ── before that ───────────────────────────────────────────────────────────────────────────────────────────────


@mutant("closed.streams_reset", "told a stranger")
def answers_tunnels_before_admission(patch: Patch) -> None:
    async def at_once(self: Any, muxed: Any, protocol: str, handler: Any) -> None:
        await self._run(handler, Libp2pStream(muxed, muxed.muxed_conn.peer, protocol, agreed=True))

    patch.setattr(StreamServer, "_serve_when_admitted", at_once)


@mutant(
    "closed.streams_wait",
    "instead of holding it",
    listen=Libp2pConfig(hosts=("127.0.0.1",), admission_limit=0),
)
def does_not_hold_streams_for_the_hello(patch: Patch) -> None:
    pass


# ── revocations ───────────────────────────────────────────────────────────────────────────────────────────────


@mutant("revocation.cuts_off", "still connected", slow=True)
def ignores_revocations(patch: Patch) -> None:
    ignore(patch, io.RevocationHeard)


@mutant("revocation.forged", "")
def believes_forged_revocations(patch: Patch) -> None:
    patch.setattr(credentials.Revocation, "is_valid", lambda self, *_: True)
