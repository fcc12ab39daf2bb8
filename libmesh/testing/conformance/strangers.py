"""Rules for those who have not proved that they are members: what they can do, and what they are told."""

from __future__ import annotations

import trio

from libmesh._pb import mesh_pb2 as pb
from libmesh.errors import ServiceRefused
from libmesh.testing.conformance.bench import PROBE, SYNC, TUNNEL, Bench, Guest
from libmesh.testing.conformance.rules import RuleBroken, require, rule
from libmesh.testing.conformance.streams import Ending, ending_of, exactly, frame, receive

IDENTIFY = "/ipfs/id/1.0.0"
PING = "/ipfs/ping/1.0.0"
GOSSIP = "/meshsub/1.1.0"

HOLD = 5.0
"""Seconds that a stream is held for a hello, at most."""


@rule(
    "closed.streams_reset",
    "Streams that a stranger opens are reset after at most 5 s, unanswered.",
    place='"Protocols"',
    limit=15,
)
async def streams_reset(bench: Bench) -> None:
    """Ask for everything, without a hello. A second is allowed for the way."""
    asked = {
        TUNNEL: frame(pb.Open(service=bench.target.echo)),
        PROBE: frame(b""),
        SYNC: frame(pb.Digest()),
        GOSSIP: b"",
    }

    async with bench.stranger() as guest, trio.open_nursery() as nursery:
        for protocol, data in asked.items():
            nursery.start_soon(_is_reset, guest, protocol, data)


async def _is_reset(guest: Guest, protocol: str, data: bytes) -> None:
    stream = await guest.say(protocol, data)
    try:
        ending, said = await ending_of(stream, HOLD + 1)
    except ServiceRefused:
        require(protocol == GOSSIP, f"it does not know {protocol}")
        return
    require(not said, f"{protocol} told a stranger {len(said)} bytes")
    require(ending is Ending.RESET, f"{protocol} was {ending.value} for a stranger")


@rule(
    "closed.streams_wait",
    "Streams that were opened before the hello are served once it has succeeded.",
    place='"Protocols"',
)
async def streams_wait(bench: Bench) -> None:
    """Probe first, and say hello half a second later."""
    async with bench.stranger() as guest:
        stream = await guest.say(PROBE, frame(b""))
        ending, said = await ending_of(stream, 0.5)
        require(not said, "it answered a stranger's probe")
        require(ending is Ending.OPEN, f"it {ending.value} the stream instead of holding it")
        await guest.enter()
        require((await receive(stream, pb.ProbeAnswer, 1024)).heard, "its answer to a probe is no")


@rule(
    "closed.refused_stay_strangers",
    "A peer that was refused gets nothing more.",
    place='"Protocols"',
)
async def refused_stay_strangers(bench: Bench) -> None:
    """Probe right after a refusal, before the connection is closed."""
    async with bench.stranger() as guest:
        stranger = pb.Hello(credential=guest.credential)
        stranger.credential.links[-1].signature = bytes(64)
        _, reply = await guest.hello(stranger)
        require(reply.HasField("refusal"), "it let in whom it should refuse")
        try:
            stream = await guest.say(PROBE, frame(b""))
            _, said = await ending_of(stream, HOLD + 1)
        except trio.BrokenResourceError:
            return
        require(not said, "it answered the probe of a peer that it had refused")


@rule("closed.identify_ping", "Identify and ping need no hello.", place='"Protocols"')
async def identify_ping(bench: Bench) -> None:
    """Ask for both as a stranger."""
    async with bench.stranger() as guest:
        ending, said = await ending_of(await guest.say(IDENTIFY, b""), 4)
        require(len(said) > 32, f"identify was {ending.value} after {len(said)} bytes")
        stream = await guest.say(PING, bytes(range(32)))
        require(await exactly(stream, 32) == bytes(range(32)), "its pong is not our ping")


@rule(
    "closed.identify_tells_nothing",
    "Identify tells a stranger nothing of the mesh.",
    place='"Protocols"',
)
async def identify_tells_nothing(bench: Bench) -> None:
    """Look for the mesh's key and id in what identify says."""
    async with bench.stranger() as guest:
        _, said = await ending_of(await guest.say(IDENTIFY, b""), 4)
    mesh_id = bench.signer.mesh_id
    for secret in (bench.signer.mesh_key, mesh_id.encode(), bytes.fromhex(mesh_id)):
        if secret in said:
            raise RuleBroken("identify names the mesh")
