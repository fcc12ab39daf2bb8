"""Rules of frames and limits, one set for each protocol, and what a peer must survive."""

from __future__ import annotations

from collections.abc import Callable

import trio
import trio.lowlevel

from libmesh._pb import mesh_pb2 as pb
from libmesh.testing.conformance.bench import HELLO, KIB, PROBE, SYNC, TUNNEL, Bench, Guest
from libmesh.testing.conformance.handshake import raw_connection
from libmesh.testing.conformance.rules import Check, require, rule
from libmesh.testing.conformance.streams import Ending, frame, prefix, receive, send

STREAMS = 1000

LONGEST = {HELLO: 4 * KIB, SYNC: KIB * KIB, PROBE: KIB, TUNNEL: KIB}
"""Bytes of each protocol's first message, at most."""

FIRST = {HELLO: "Hello", SYNC: "Digest", PROBE: "Probe", TUNNEL: "Open"}


def good(bench: Bench, guest: Guest, protocol: str) -> bytes:
    """The first message of a peer that keeps the rules."""
    messages: dict[str, pb.Hello | pb.Digest | pb.Probe | pb.Open] = {
        HELLO: guest.greeting(),
        SYNC: pb.Digest(),
        PROBE: pb.Probe(),
        TUNNEL: pb.Open(service="no such service"),
    }
    return messages[protocol].SerializeToString()


Bad = Callable[[bytes, int], tuple[bytes, bool]]
"""From a good message and its limit: what to send instead, and whether to end our direction after it."""


def too_long(data: bytes, limit: int) -> tuple[bytes, bool]:
    """Only the length: the peer is not to wait for the rest."""
    return prefix(limit + 1) + data, False


def five_bytes(data: bytes, limit: int) -> tuple[bytes, bool]:
    """A good message, its length written in five bytes."""
    return prefix(len(data), 5) + data, False


def garbage(data: bytes, limit: int) -> tuple[bytes, bool]:
    """A frame that is no protobuf: a field whose length goes beyond the end."""
    return frame(b"\x0a\xff\x01"), False


def cut_off(data: bytes, limit: int) -> tuple[bytes, bool]:
    """Half a message, and the end."""
    padded = data + b"\xc2\x3e\x08" + bytes(8)
    return frame(padded)[:-4], True


KINDS: dict[str, tuple[str, str, Bad]] = {
    "too_long": ("A message {} that is longer than allowed ends the stream with a reset.", "{}", too_long),
    "five_bytes": (
        "A message {} whose length is written in five bytes ends the stream with a reset.",
        '"Framing"',
        five_bytes,
    ),
    "garbage": ("Bytes that are no message {} end the stream with a reset.", '"Framing"', garbage),
    "cut_off": ("A message {} that is cut off is not answered, and its stream ends.", '"Framing"', cut_off),
}


def checking(protocol: str, name: str, bad: Bad) -> Check:
    """The check of one kind of bad frame in one protocol."""

    async def check(bench: Bench) -> None:
        async with bench.stranger() as guest:
            if protocol != HELLO:
                await guest.enter()
            data, end = bad(good(bench, guest, protocol), LONGEST[protocol])
            stream = await guest.open(protocol)
            await send(stream, data, end=end)
            ending, said = await guest.ending(stream)
            require(not said, f"it answered with {len(said)} bytes")
            if name == "cut_off":
                require(ending is not Ending.OPEN, "the stream was left open")
            else:
                require(ending is Ending.RESET, f"the stream was {ending.value}")
            if protocol != HELLO:
                require(await guest.probe(), "other streams of the connection do not work after that")
                return
        await bench.require_alive()

    return check


def _register() -> dict[str, Check]:
    return {
        f"{protocol} {name}": rule(
            f"frame.{name}.{first.lower()}", text.format(first), place=place.format(first)
        )(checking(protocol, name, bad))
        for name, (text, place, bad) in KINDS.items()
        for protocol, first in FIRST.items()
    }


FRAME_CHECKS = _register()


@rule("frame.longest", "A message may be exactly as long as its limit.", place='"Framing"')
async def longest(bench: Bench) -> None:
    """Fill each one up with a field that the peer does not know."""
    async with bench.stranger() as guest:
        await guest.enter(pb.Hello.FromString(filled(good(bench, guest, HELLO), LONGEST[HELLO])))
        require(await guest.probe(message=filled(b"", LONGEST[PROBE])), "its answer to a long Probe is no")
        stream = await guest.say(TUNNEL, frame(filled(good(bench, guest, TUNNEL), LONGEST[TUNNEL])))
        require(
            (await receive(stream, pb.Opened, KIB)).HasField("refusal"), "it offers a service of that name"
        )
        await guest.sync(digest=pb.Digest.FromString(filled(b"", LONGEST[SYNC])))


def filled(data: bytes, size: int) -> bytes:
    """`data` and an unknown field, `size` bytes together."""
    rest = size - len(data)
    for overhead in (3, 4, 5):
        field = b"\xc2\x3e" + prefix(rest - overhead) + bytes(rest - overhead)
        if len(field) == rest:
            return data + field
    raise ValueError(f"{size} bytes cannot be filled")


@rule("frame.pieces", "It does not matter in which pieces a message arrives.", place='"Framing"')
async def pieces(bench: Bench) -> None:
    """Byte by byte."""
    async with bench.member() as guest:
        stream = await guest.open(PROBE)
        for byte in frame(filled(b"", 200)):
            await stream.send_all(bytes([byte]))
            await trio.lowlevel.checkpoint()
        require((await receive(stream, pb.ProbeAnswer, KIB)).heard, "its answer to a probe is no")


@rule(
    "limits.streams",
    "A thousand streams that are opened and reset at once cost the others nothing.",
    place='"Protocols"',
)
async def streams(bench: Bench) -> None:
    """Half of them are in the middle of a message then. One that was opened before must still be good."""
    async with bench.member() as guest:
        kept = await guest.open(PROBE)
        for number in range(STREAMS):
            stream = await guest.open(PROBE if number % 3 else TUNNEL)
            await stream.send_all(b"\x05\x00" if number % 2 else b"\x00")
            stream.reset()
        await kept.send_all(frame(b""))
        require((await receive(kept, pb.ProbeAnswer, KIB)).heard, "its answer to a probe is no")
        require(await guest.probe(), "its answer to another probe is no")


@rule(
    "limits.strangers", "A hundred strangers that say nothing keep nobody out.", place='"Transport"', limit=15
)
async def strangers(bench: Bench) -> None:
    """Raw connections, held open."""
    async with trio.open_nursery() as nursery:

        async def hold() -> None:
            async with raw_connection(bench):
                await trio.sleep_forever()

        for _ in range(100):
            nursery.start_soon(hold)
        await trio.sleep(0.3)
        await bench.require_alive()
        nursery.cancel_scope.cancel()
