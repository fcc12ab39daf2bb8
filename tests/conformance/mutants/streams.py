"""Peers that answer wrongly, or read what they should not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import trio

from libmesh import PeerId, Scope, framing, hello, probing, tunnel, wire
from libmesh import admission as admission_module
from libmesh.mesh import Mesh
from libmesh.net.base import Stream
from libmesh.probing import Prober
from libmesh.wire_pieces import WireError
from tests.conformance.mutants.base import Patch, mutant

# ── probes ────────────────────────────────────────────────────────────────────────────────────────────────────


@mutant("probe.answered", "its answer is no")
def denies_that_it_is_there(patch: Patch) -> None:
    patch.setattr(wire, "encode_probe_answer", lambda _: b"")


@mutant("probe.answered", "left open", slow=True)
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


@mutant("probe.silent_target", "it took", slow=True)
def waits_too_long_for_a_target(patch: Patch) -> None:
    async def patient(self: Prober, target: PeerId) -> bool:
        return self._network.path(target) is not None and await self._ask(target, None, 2.0)

    patch.setattr(Prober, "_asked_for", patient)


# ── tunnels ───────────────────────────────────────────────────────────────────────────────────────────────────


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


@mutant("tunnel.early_data", "", slow=True)
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


@mutant("tunnel.opened_first", "", slow=True)
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


# ── frames ────────────────────────────────────────────────────────────────────────────────────────────────────


@mutant("frame.five_bytes.probe", "it answered")
def accepts_five_byte_lengths(patch: Patch) -> None:
    patch.setattr(framing, "_LONGEST_PREFIX", 5)


@mutant("frame.too_long.open", "left open", slow=True)
def waits_for_whatever_was_promised(patch: Patch) -> None:
    patch.setattr(tunnel, "FrameReader", lambda stream, limit: framing.FrameReader(stream, 2**30))
    for module in (probing, hello):
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
