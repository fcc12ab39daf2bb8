"""Peers that are broken on purpose: each is our own peer with one mistake, and names the rule that must find it.

A mutant is a function that breaks something, before the peer is opened, by pytest's `monkeypatch`. The suite runs in the
same process; it shares the transport with the peer and nothing else, so that it does not make the same mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import trio
from google.protobuf.unknown_fields import UnknownFieldSet

from libmesh import Libp2pConfig, PeerId, Scope, framing, hello, probing, tunnel, wire, wire_pieces
from libmesh import admission as admission_module
from libmesh.core import credentials, membership, voice
from libmesh.core import membership_io as io
from libmesh.core.membership import Membership
from libmesh.core.roster import Digest
from libmesh.driver import Driver
from libmesh.mesh import Mesh
from libmesh.net.base import Stream
from libmesh.net.libp2p import Libp2pNetwork
from libmesh.probing import Prober
from libmesh.wire_pieces import WireError
from tests.conformance.peer import LISTEN

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Mutant:
    """A mistake, the rule that must find it, and part of what the rule must say."""

    rule: str
    says: str
    make: Callable[[Patch], None]
    listen: Libp2pConfig = LISTEN


MUTANTS: dict[str, Mutant] = {}


def mutant(
    rule: str, says: str, **settings: Any
) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def register(make: Callable[[Patch], None]) -> Callable[[Patch], None]:
        assert make.__name__ not in MUTANTS
        MUTANTS[make.__name__] = Mutant(rule, says, make, **settings)
        return make

    return register


# ── who is let in ────────────────────────────────────────────────────────────────────────────────────────────────


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


@mutant("hello.nine_links", "let a chain of nine in")
def accepts_long_chains(patch: Patch) -> None:
    patch.setattr(wire_pieces, "MAX_LINKS", 99)
    patch.setattr(credentials, "MAX_LINKS", 99)


@mutant("hello.admits", 'refused with "not_yours"')
def takes_everybody_for_somebody_else(patch: Patch) -> None:
    _verify_with(patch, lambda *_, **__: {"peer_key": bytes(32)})


@mutant("hello.unknown_fields", "reset")
def resets_on_unknown_fields(patch: Patch) -> None:
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


@mutant("hello.refusal_closes", "connection was left open")
def does_not_close_after_a_refusal(patch: Patch) -> None:
    async def stay(self: Any, peer: PeerId) -> None:
        await trio.lowlevel.checkpoint()

    patch.setattr(PeerNetwork, "disconnect", stay)


# ── before that ──────────────────────────────────────────────────────────────────────────────────────────────────


@mutant("closed.streams_reset", "told a stranger")
def answers_tunnels_before_admission(patch: Patch) -> None:
    async def proceed(self: Any, peer: PeerId, protocol: str) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    patch.setattr(PeerNetwork, "_may_proceed", proceed)


@mutant(
    "closed.streams_wait",
    "instead of holding it",
    listen=Libp2pConfig(hosts=("127.0.0.1",), admission_limit=0),
)
def does_not_hold_streams_for_the_hello(patch: Patch) -> None:
    pass


# ── what is believed ─────────────────────────────────────────────────────────────────────────────────────────────


@mutant("records.forged", "a wrong signature")
def believes_forged_records(patch: Patch) -> None:
    _patch_membership(patch, "_authentic", lambda *_, **__: True)


@mutant("records.whole", "signature is wrong")
def passes_on_records_with_wrong_signatures(patch: Patch) -> None:
    encode = wire.encode_records

    def garble(records: Any, revocations: Any = ()) -> bytes:
        return encode([replace(record, signature=bytes(64)) for record in records], revocations)

    patch.setattr(wire, "encode_records", garble)


@mutant("records.credential", "credential")
def believes_signed_records_of_strangers(patch: Patch) -> None:
    def signed(record: Any, **_: Any) -> bool:
        key = credentials.keys.public_key_of(record.announcement.peer)
        return credentials.keys.verify(key, wire.SIGNING_CONTEXT + record.body, record.signature)

    _patch_membership(patch, "_authentic", signed)


def _patch_membership(patch: Patch, name: str, value: Any) -> None:
    """Set an attribute of every machine that is made from now on."""
    make = Membership.__init__

    def make_broken(self: Membership, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        setattr(self, name, value)

    patch.setattr(Membership, "__init__", make_broken)


@mutant("records.older", "it holds")
def takes_whatever_came_last(patch: Patch) -> None:
    patch.setattr(membership, "_supersedes", lambda *_: True)


@mutant("records.newer", "after (2, 0)")
def compares_sequences_only(patch: Patch) -> None:
    def by_sequence(new: Any, entry: Any) -> bool:
        return bool(new.sequence > entry.announcement.sequence)

    patch.setattr(membership, "_supersedes", by_sequence)


@mutant("records.unchanged", "other bytes")
def encodes_records_anew(patch: Patch) -> None:
    encode = wire.encode_records

    def anew(records: Any, revocations: Any = ()) -> bytes:
        known = []
        for record in records:
            said = wire.pb.Announcement.FromString(record.body)
            said.DiscardUnknownFields()
            known.append(replace(record, body=said.SerializeToString(deterministic=True)))
        return encode(known, revocations)

    patch.setattr(wire, "encode_records", anew)


@mutant("records.bounds", "it believes")
def takes_any_number_of_services(patch: Patch) -> None:
    patch.setattr(wire, "MAX_SERVICES", 10_000)


@mutant("records.lacking", "those who have it")
def tells_everything_always(patch: Patch) -> None:
    tell = Membership.newer_than
    patch.setattr(Membership, "newer_than", lambda self, _: tell(self, Digest({})))


@mutant("digest.self", "not in its own digest")
def leaves_itself_out_of_its_digest(patch: Patch) -> None:
    digest = Membership.digest

    def of_others(self: Membership) -> Digest:
        whole = digest(self)
        return Digest({p: age for p, age in whole.ages.items() if p != self._id}, whole.dead)

    patch.setattr(Membership, "digest", of_others)


@mutant("digest.dead", "still")
def does_not_speak_up_when_called_dead(patch: Patch) -> None:
    _ignore(patch, io.DigestHeard)


@mutant("digest.no_verdict", "another's word")
def believes_that_others_are_dead(patch: Patch) -> None:
    handle = Membership.handle

    def gullible(self: Membership, event: io.Event, now: float) -> Any:
        effects = handle(self, event, now)
        if isinstance(event, io.DigestHeard):
            for peer in event.digest.dead & self._peers.keys():
                effects += self._end(peer, self._peers[peer], now)
        return effects

    patch.setattr(Membership, "handle", gullible)


def _ignore(patch: Patch, kind: type) -> None:
    handle = Membership.handle
    patch.setattr(
        Membership,
        "handle",
        lambda self, event, now: [] if isinstance(event, kind) else handle(self, event, now),
    )


# ── what is said to everybody ────────────────────────────────────────────────────────────────────────────────────


@mutant("gossip.refutes", "it is still")
def ignores_suspicion_of_itself(patch: Patch) -> None:
    _ignore(patch, io.SuspicionHeard)


@mutant("gossip.no_verdict", "did not probe")
def does_not_probe_suspects(patch: Patch) -> None:
    _ignore(patch, io.SuspicionHeard)


@mutant("gossip.refutes", "did not say so")
def keeps_its_announcements_to_itself(patch: Patch) -> None:
    patch.setattr(Driver, "_publish", lambda self, data: None)


@mutant("gossip.learned", "did not reach it")
def does_not_listen_to_gossip(patch: Patch) -> None:
    patch.setattr(Driver, "_hear", lambda self, data: None)


@mutant("gossip.forged", "wrong signature")
def believes_forged_gossip(patch: Patch) -> None:
    _patch_membership(patch, "_authentic", lambda *_, **__: True)


@mutant("survives.suspicion", "few are left")
def outbids_any_incarnation(patch: Patch) -> None:
    patch.setattr(voice, "FAR_AHEAD", 2**60)
    patch.setattr(wire, "decode_gossip", _lowered(wire.decode_gossip))


def _lowered(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Leaves room for one more, so that the peer lives on with what it was talked into."""

    def lower(data: bytes) -> Any:
        said = decode(data)
        return (
            replace(said, incarnation=min(said.incarnation, 2**64 - 9))
            if isinstance(said, io.Suspicion)
            else said
        )

    return lower


# ── probes ───────────────────────────────────────────────────────────────────────────────────────────────────────


@mutant("probe.answered", "its answer is no")
def denies_that_it_is_there(patch: Patch) -> None:
    patch.setattr(wire, "encode_probe_answer", lambda _: b"")


@mutant("probe.answered", "left open")
def never_closes_a_probe(patch: Patch) -> None:
    answer = Prober.answer

    async def linger(self: Prober, stream: Stream) -> None:
        await answer(self, stream)
        await trio.sleep_forever()

    patch.setattr(Prober, "answer", linger)


@mutant("probe.unknown_target", "does not exist")
def vouches_for_everybody(patch: Patch) -> None:
    async def vouch(self: Prober, target: PeerId) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    patch.setattr(Prober, "_asked_for", vouch)


@mutant("probe.target", "without asking")
def vouches_for_whoever_is_connected(patch: Patch) -> None:
    async def vouch(self: Prober, target: PeerId) -> bool:
        await trio.lowlevel.checkpoint()
        return self._network.path(target) is not None

    patch.setattr(Prober, "_asked_for", vouch)


@mutant("probe.silent_target", "it took")
def waits_too_long_for_a_target(patch: Patch) -> None:
    async def patient(self: Prober, target: PeerId) -> bool:
        return self._network.path(target) is not None and await self._ask(target, None, 2.0)

    patch.setattr(Prober, "_asked_for", patient)


# ── tunnels ──────────────────────────────────────────────────────────────────────────────────────────────────────


@mutant("tunnel.unknown_service", "unavailable")
def calls_an_unknown_service_unavailable(patch: Patch) -> None:
    encode = wire.encode_opened
    patch.setattr(
        wire, "encode_opened", lambda word: encode("unavailable" if word == "unknown_service" else word)
    )


@mutant("tunnel.scope", 'answered a client ""')
def does_not_check_the_scope_of_an_opener(patch: Patch) -> None:
    of = admission_module.Admission.credential_of

    def generous(self: Any, peer: PeerId) -> Any:
        shown = of(self, peer)
        if shown is None:
            return None
        return replace(shown, links=(*shown.links[:-1], replace(shown.links[-1], scope=Scope.INVITE)))

    patch.setattr(admission_module.Admission, "credential_of", generous)


@mutant("tunnel.early_data", "")
def forgets_early_data(patch: Patch) -> None:
    answer = tunnel.answer

    async def forgetful(stream: Stream, choose: Any) -> None:
        def choose_and_forget(service: str) -> Any:
            handler = choose(service)

            async def drop_first(stream: Stream, accept: Any) -> None:
                await stream.receive_some()
                await handler(stream, accept)

            return drop_first

        await answer(stream, choose_and_forget)

    patch.setattr(tunnel, "answer", forgetful)


@mutant("tunnel.opened_first", "")
def does_not_say_that_it_opened(patch: Patch) -> None:
    frame = tunnel.frame
    patch.setattr(tunnel, "frame", lambda data: frame(data) if data else b"")


@mutant("tunnel.half_close", "")
def ends_both_directions_with_one(patch: Patch) -> None:
    make = Mesh.offer

    def offer(self: Mesh, name: str, handler: Any, **given: Any) -> Any:
        async def impatient(stream: Stream) -> None:
            await handler(stream)
            stream.reset()

        return make(self, name, impatient, **given)

    patch.setattr(Mesh, "offer", offer)


# ── frames ───────────────────────────────────────────────────────────────────────────────────────────────────────


@mutant("frame.five_bytes.probe", "it answered")
def accepts_five_byte_lengths(patch: Patch) -> None:
    patch.setattr(framing, "_LONGEST_PREFIX", 5)


@mutant("frame.too_long.open", "left open")
def waits_for_whatever_was_promised(patch: Patch) -> None:
    for module in (tunnel, probing, hello):
        patch.setattr(module, "receive_frame", lambda stream, limit: framing.receive_frame(stream, 2**30))


@mutant("frame.garbage.probe", "it answered")
def takes_garbage_for_a_probe(patch: Patch) -> None:
    patch.setattr(wire, "decode_probe", lambda _: None)


@mutant("frame.garbage.open", "ended")
def ends_bad_tunnels_politely(patch: Patch) -> None:
    answer = tunnel.answer

    async def polite(stream: Stream, choose: Any) -> None:
        patch.setattr(stream, "reset", lambda: None, raising=False)
        await answer(stream, choose)

    patch.setattr(tunnel, "answer", polite)


@mutant("frame.cut_off.probe", "")
def answers_half_a_probe(patch: Patch) -> None:
    async def lenient(stream: Stream, limit: int) -> bytes:
        try:
            return await framing.receive_frame(stream, limit)
        except WireError:
            return b""

    patch.setattr(probing, "receive_frame", lenient)


@mutant("frame.longest", "")
def allows_less_than_the_limit(patch: Patch) -> None:
    patch.setattr(wire, "MAX_PROBE", 1023)


# ── revocations ──────────────────────────────────────────────────────────────────────────────────────────────────


@mutant("revocation.cuts_off", "still connected")
def ignores_revocations(patch: Patch) -> None:
    _ignore(patch, io.RevocationHeard)


@mutant("revocation.forged", "")
def believes_forged_revocations(patch: Patch) -> None:
    patch.setattr(credentials.Revocation, "is_valid", lambda self, *_: True)


class PeerNetwork(Libp2pNetwork):
    """Stands for the peer's network, so that the suite's own is left whole."""
