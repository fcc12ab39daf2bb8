"""Rules of tunnels: who gets a service, and what comes through."""

from __future__ import annotations

import hashlib
import os

import trio

from libmesh._pb import mesh_pb2 as pb
from libmesh.net.base import Stream
from libmesh.testing.conformance.bench import KIB, TUNNEL, Bench
from libmesh.testing.conformance.chains import Identity
from libmesh.testing.conformance.rules import NotApplicable, require, rule
from libmesh.testing.conformance.streams import Ending, ending_of, exactly, frame, receive

BULK = 2 * KIB * KIB


def asking(service: str) -> bytes:
    """The first message for this service."""
    return frame(pb.Open(service=service))


async def opened(stream: Stream) -> None:
    """Hear that the service was opened."""
    answer = await receive(stream, pb.Opened, KIB)
    require(not answer.HasField("refusal"), f'it refused with "{answer.refusal}"')


@rule(
    "tunnel.unknown_service",
    'A service that is not offered is refused with "unknown_service".',
    place="Opened.refusal",
)
async def unknown_service(bench: Bench) -> None:
    """Ask for a name that nobody would choose."""
    async with bench.member() as guest:
        stream = await guest.say(TUNNEL, asking(f"no such service {os.urandom(8).hex()}"))
        answer = await receive(stream, pb.Opened, KIB)
    require(answer.refusal == "unknown_service", f'it answered "{answer.refusal}"')


@rule(
    "tunnel.refusal_ends",
    "After a refusal the stream ends and what the opener sent is dropped.",
    place="Opened",
)
async def refusal_ends(bench: Bench) -> None:
    """Send on after asking for nothing."""
    async with bench.member() as guest:
        stream = await guest.say(TUNNEL, asking(f"no such service {os.urandom(8).hex()}") + b"early")
        await receive(stream, pb.Opened, KIB)
        ending, more = await guest.ending(stream)
        require(ending is not Ending.OPEN and not more, f"the stream was {ending.value} after {more!r}")
        require(await guest.probe(), "its answer to a probe is no")


@rule("tunnel.scope", 'A service that needs a wider scope is refused with "scope".', place="Opened.refusal")
async def scope(bench: Bench) -> None:
    """Come as a client, and ask for a service for more than clients."""
    services = [service for service in await bench.services() if service.scope > pb.SCOPE_CLIENT]
    if not services:
        raise NotApplicable("it offers no service that needs more than the scope 'client'")
    who = Identity.fresh()
    async with bench.stranger(who, bench.signer.admit(who.key, scope=pb.SCOPE_CLIENT)) as guest:
        await guest.enter()
        stream = await guest.say(TUNNEL, asking(services[0].name))
        answer = await receive(stream, pb.Opened, KIB)
    require(answer.refusal == "scope", f'of {services[0].name!r} it answered a client "{answer.refusal}"')


@rule("tunnel.opened_first", "The service's bytes come after Opened, and Opened at once.", place="Opened")
async def opened_first(bench: Bench) -> None:
    """Ask, hear the answer before anything is sent, then talk."""
    service = await bench.echo()
    async with bench.member() as guest:
        stream = await guest.say(TUNNEL, asking(service))
        await opened(stream)
        await stream.send_all(b"hello")
        require(await exactly(stream, 5) == b"hello", "what came back is not what was sent")


@rule("tunnel.early_data", "The opener's bytes may follow Open without waiting for the answer.", place="Open")
async def early_data(bench: Bench) -> None:
    """Send both in one piece; and Open in pieces of one byte, with data close behind."""
    service = await bench.echo()
    async with bench.member() as guest:
        stream = await guest.say(TUNNEL, asking(service) + b"early")
        await opened(stream)
        require(await exactly(stream, 5) == b"early", "early data did not come back as it was sent")
        stream = await guest.open(TUNNEL)
        for byte in asking(service) + b"late":
            await stream.send_all(bytes([byte]))
        await opened(stream)
        require(await exactly(stream, 4) == b"late", "data behind a slow Open did not come back")


@rule(
    "tunnel.half_close",
    "The end of one direction passes through and leaves the other one open.",
    place='"Protocols"',
)
async def half_close(bench: Bench) -> None:
    """End our direction; all must come back, then the end."""
    service = await bench.echo()
    async with bench.member() as guest:
        stream = await guest.say(TUNNEL, asking(service) + b"last words")
        await stream.send_eof()
        await opened(stream)
        ending, data = await guest.ending(stream)
    require(data == b"last words", f"after the end of our direction {data!r} came back")
    require(ending is Ending.END, f"its direction was {ending.value} in the end")


@rule("tunnel.bulk", "Two MiB come through whole, both ways at once.", place='"Protocols"')
async def bulk(bench: Bench) -> None:
    """Send and receive at the same time."""
    service = await bench.echo()
    data = os.urandom(BULK)
    async with bench.member() as guest:
        stream = await guest.say(TUNNEL, asking(service))
        await opened(stream)

        async def send() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            ending, echoed = await ending_of(stream, 8, most=BULK + 1)
    require(ending is Ending.END, f"the stream was {ending.value} after {len(echoed)} bytes")
    require(hashlib.sha256(echoed).digest() == hashlib.sha256(data).digest(), "other bytes came back")


@rule(
    "tunnel.bad_name",
    "A service name that cannot be one ends the stream with a reset, or is unknown.",
    place="Service.name",
)
async def bad_name(bench: Bench) -> None:
    """No name, too long a name, and one with a control character."""
    async with bench.member() as guest:
        for name in ("", "x" * 256, "a\x1b[2J"):
            stream = await guest.say(TUNNEL, asking(name))
            ending, said = await guest.ending(stream)
            require(ending is not Ending.OPEN, f"the stream was left open for {name!r}")
            refusal = pb.Opened.FromString(said[1:]).refusal if said else "reset"
            require(refusal in ("reset", "unknown_service"), f'{name!r} was answered "{refusal}"')
        require(await guest.probe(), "its answer to a probe is no")
