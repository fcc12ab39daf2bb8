"""Rules of probes."""

from __future__ import annotations

import trio

from libmesh._pb import mesh_pb2 as pb
from libmesh.testing.conformance.bench import KIB, PROBE, Bench
from libmesh.testing.conformance.chains import Identity
from libmesh.testing.conformance.rules import require, rule
from libmesh.testing.conformance.streams import Ending, frame, receive


@rule("probe.answered", "A probe is answered with yes; then the stream ends.", place="Probe")
async def answered(bench: Bench) -> None:
    """Ask whether it is there."""
    async with bench.member() as guest:
        stream = await guest.say(PROBE, frame(pb.Probe()))
        answer = await receive(stream, pb.ProbeAnswer, KIB)
        require(answer.heard, "its answer is no")
        await stream.send_eof()
        ending, more = await guest.ending(stream)
    require(ending is Ending.END and not more, f"after its answer the stream was {ending.value}, {more!r}")


@rule(
    "probe.unknown_target",
    "A probe for a peer without a connection is answered with no.",
    place="Probe.target_key",
)
async def unknown_target(bench: Bench) -> None:
    """Ask for somebody that nobody has met."""
    async with bench.member() as guest:
        require(not await guest.probe(Identity.fresh().key), "it heard a peer that does not exist")


@rule(
    "probe.target",
    "A probe for a connected peer is answered with yes if that peer answers.",
    place="ProbeAnswer",
)
async def target(bench: Bench) -> None:
    """Ask one guest about the other."""
    async with bench.announced() as far, bench.member() as near:
        far.probed = trio.Event()
        require(await near.probe(far.identity.key), "it did not hear a peer that answers")
        require(far.probed.is_set(), "it said yes without asking")


@rule(
    "probe.silent_target",
    "A probe for a connected peer that does not answer is answered with no, after 0.6 s.",
    place="ProbeAnswer",
)
async def silent_target(bench: Bench) -> None:
    """The other guest takes probes and says nothing. Nearly a second more is allowed for the way."""
    async with bench.announced() as far, bench.member() as near:
        far.answers_probes = False
        started = trio.current_time()
        heard = await near.probe(far.identity.key)
        took = trio.current_time() - started
    require(not heard, "it heard a peer that does not answer")
    require(took < 1.5, f"it took {took:.1f} s to say so")
