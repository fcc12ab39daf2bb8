"""Rules of tunnels that outlive their connections. They are for peers that agree to it; others need not know of any."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from libmesh._pb import mesh_pb2 as pb
from libmesh.errors import ServiceRefused
from libmesh.net.base import Stream
from libmesh.testing.conformance.bench import KIB, TUNNEL, Bench, Guest
from libmesh.testing.conformance.rules import NotApplicable, require, rule
from libmesh.testing.conformance.streams import PIECE, Ending, exactly, frame, receive

RESUME = "/libmesh/tunnel-resume/1.0.0"
ACKS = "/libmesh/tunnel-acks/1.0.0"

MIB = KIB * KIB
KEPT = 4 * MIB
"""What an end keeps for the other one, at most."""

ON_THE_WAY = 256 * KIB
"""What an end may have read and not yet sent when it waits: some buffers."""


@dataclass(slots=True)
class Told:
    """What the peer said of its progress: the newest of each session, and whenever there is more."""

    newest: dict[bytes, pb.Progress] = field(default_factory=dict)
    more: trio.Event = field(default_factory=trio.Event)

    async def hear(self, stream: Stream) -> None:
        """Serve a stream of acknowledgements."""
        while True:
            progress = await receive(stream, pb.Progress, KIB)
            self.newest[progress.session] = progress
            self.more.set()
            self.more = trio.Event()

    async def until(self, session: bytes, received: int, *, ended: bool = False) -> None:
        """Wait until it has said to have that much of a session."""
        while True:
            newest = self.newest.get(session)
            if newest is not None and newest.received >= received and newest.ended >= ended:
                return
            await self.more.wait()


@dataclass(slots=True)
class Tunnel:
    """A tunnel to the echo, that the peer has agreed to resume."""

    guest: Guest
    session: bytes
    stream: Stream
    told: Told

    async def lose(self) -> None:
        """Lose the connection, and be let in over another."""
        await self.guest.network.disconnect(self.guest.target.peer)
        await self.guest.network.connect(self.guest.target.peer, [self.guest.target.address])
        await self.guest.enter()

    async def ask(self, received: int, *, ended: bool = False) -> tuple[Stream, pb.Resumed]:
        """Ask to go on behind what we have received."""
        return await ask(self.guest, self.session, received, ended=ended)


async def ask(
    guest: Guest, session: bytes, received: int = 0, *, ended: bool = False
) -> tuple[Stream, pb.Resumed]:
    """Send a Progress, and hear the answer. Raises `NotApplicable` if the peer knows nothing of this."""
    message = frame(pb.Progress(session=session, received=received, ended=ended))
    try:
        stream = await guest.say(RESUME, message)
        return stream, await receive(stream, pb.Resumed, KIB)
    except ServiceRefused as exc:
        raise NotApplicable("it resumes no tunnels") from exc


@asynccontextmanager
async def resumable(bench: Bench) -> AsyncIterator[Tunnel]:
    """A tunnel to the echo. Raises `NotApplicable` unless the peer agrees to resume it."""
    service = await bench.echo()
    told, session = Told(), os.urandom(16)
    async with bench.member() as guest:
        guest.network.set_handler(ACKS, told.hear)
        stream = await guest.say(TUNNEL, frame(pb.Open(service=service, session=session)))
        answer = await receive(stream, pb.Opened, KIB)
        require(not answer.HasField("refusal"), f'it refused with "{answer.refusal}"')
        if not answer.resumable:
            raise NotApplicable(f"it does not resume tunnels to its service {service!r}")
        yield Tunnel(guest, session, stream, told)
        stream.reset()


def refused(answer: pb.Resumed, what: str) -> None:
    """Raise `RuleBroken` unless it says that there is no such tunnel."""
    said = f'"{answer.refusal}"' if answer.HasField("refusal") else "yes"
    require(answer.refusal == "unknown", f"it answered {said} to {what}")


@rule(
    "resume.no_session",
    "A tunnel is not resumable unless its Open names a session.",
    place="Opened.resumable",
)
async def no_session(bench: Bench) -> None:
    """Open without one, and with one that is none."""
    service = await bench.echo()
    async with bench.member() as guest:
        for session in (b"", os.urandom(15), os.urandom(17)):
            stream = await guest.say(TUNNEL, frame(pb.Open(service=service, session=session)))
            answer = await receive(stream, pb.Opened, KIB)
            require(not answer.resumable, f"it would resume a tunnel with a session of {len(session)} bytes")
            stream.reset()


@rule(
    "resume.unknown",
    'A Progress of a tunnel that is not there is answered with "unknown", and the stream ends.',
    place="Resumed.refusal",
)
async def unknown(bench: Bench) -> None:
    """Ask for a session that nobody opened."""
    async with bench.member() as guest:
        stream, answer = await ask(guest, os.urandom(16))
        refused(answer, "a session that nobody opened")
        ending, more = await guest.ending(stream)
    require(ending is not Ending.OPEN and not more, f"the stream was {ending.value} after {more!r}")


@rule(
    "resume.bad_session",
    "A Progress whose session has not 16 bytes ends the stream with a reset.",
    place="Progress.session",
)
async def bad_session(bench: Bench) -> None:
    """Name none, one too short, and one too long."""
    async with bench.member() as guest:
        await ask(guest, os.urandom(16))
        for length in (0, 15, 17):
            stream = await guest.say(RESUME, frame(pb.Progress(session=os.urandom(length))))
            ending, said = await guest.ending(stream)
            require(
                ending is Ending.RESET and not said,
                f"a session of {length} bytes: the stream was {ending.value} after {said!r}",
            )


@rule(
    "resume.goes_on",
    "After the loss of the connection each end sends on from where the other had got, on another one.",
    place="Progress",
)
async def goes_on(bench: Bench) -> None:
    """Receive half of what was sent, lose the connection, and again; all must come back once, in order."""
    data = os.urandom(300 * KIB)
    async with resumable(bench) as tunnel:
        stream, sent, got = tunnel.stream, 0, b""
        for end in (100 * KIB, 200 * KIB, 300 * KIB):
            await stream.send_all(data[sent:end])
            got += await exactly(stream, end - 50 * KIB - len(got))
            await tunnel.lose()
            stream, answer = await tunnel.ask(len(got))
            require(not answer.HasField("refusal"), f'it refused to go on with "{answer.refusal}"')
            require(answer.received <= end, f"it has {answer.received} bytes of the {end} that were sent")
            sent = answer.received
        await stream.send_all(data[sent:])
        await stream.send_eof()
        got += await exactly(stream, len(data) - len(got))
        ending, more = await tunnel.guest.ending(stream)
    require(got == data, "what came back is not what was sent")
    require(ending is Ending.END and not more, f"the stream was {ending.value} after {len(more)} bytes more")


@rule(
    "resume.between_us",
    "A tunnel is resumed by the peer that opened it, and no other.",
    place="Resumed.refusal",
)
async def between_us(bench: Bench) -> None:
    """Let another member ask for it."""
    async with resumable(bench) as tunnel, bench.member() as other:
        _, answer = await ask(other, tunnel.session)
        refused(answer, "a member that asked for another's tunnel")
        await tunnel.stream.send_all(b"hello")
        require(await exactly(tunnel.stream, 5) == b"hello", "the tunnel that was asked for came to harm")


@rule(
    "resume.lie",
    'Who claims to have received more than was sent is answered with "unknown".',
    place="Resumed.refusal",
)
async def lie(bench: Bench) -> None:
    """Claim a gigabyte, and an end that was never sent."""
    for received, ended in ((2**30, False), (0, True)):
        async with resumable(bench) as tunnel:
            await tunnel.lose()
            _, answer = await tunnel.ask(received, ended=ended)
            refused(answer, f"a claim of {received} bytes{' and the end' * ended}")


@rule("resume.reset", "A reset ends a tunnel for good.", place="Progress")
async def reset(bench: Bench) -> None:
    """Reset it, and ask for it until the peer has noticed."""
    async with resumable(bench) as tunnel:
        tunnel.stream.reset()
        answer = pb.Resumed()
        with trio.move_on_after(tunnel.guest.target.patience):
            while not answer.HasField("refusal"):
                await trio.sleep(0.05)
                again, answer = await tunnel.ask(0)
                again.reset()
    refused(answer, "the session of a tunnel that was reset")


@rule(
    "resume.acknowledged",
    "An end says what it has received at least once for each mebibyte, and at the end.",
    place="Progress",
)
async def acknowledged(bench: Bench) -> None:
    """Send three mebibytes and the end, and listen to what it says of them."""
    async with resumable(bench) as tunnel, trio.open_nursery() as nursery:
        nursery.start_soon(drain, tunnel)
        for count in range(1, 4):
            await tunnel.stream.send_all(bytes(MIB))
            with trio.move_on_after(tunnel.guest.target.patience) as scope:
                await tunnel.told.until(tunnel.session, (count - 1) * MIB + 1)
            require(not scope.cancelled_caught, f"it says nothing of {count} MiB")
        await tunnel.stream.send_eof()
        with trio.move_on_after(tunnel.guest.target.patience) as scope:
            await tunnel.told.until(tunnel.session, 3 * MIB, ended=True)
        require(not scope.cancelled_caught, "it does not say that it has the end")
        nursery.cancel_scope.cancel()


async def drain(tunnel: Tunnel) -> None:
    """Read what comes back, and say so."""
    received = 0
    acks = await tunnel.guest.open(ACKS)
    while piece := await tunnel.stream.receive_some(PIECE):
        received += len(piece)
        await acks.send_all(frame(pb.Progress(session=tunnel.session, received=received)))


@rule(
    "resume.waits",
    "An end that has sent 4 MiB which the other has not said to have waits, and goes on when it is told.",
    place="Progress",
    limit=20.0,
)
async def waits(bench: Bench) -> None:
    """Read all that comes and say nothing of it, until it waits; then say so, and read the rest."""
    async with resumable(bench) as tunnel, trio.open_nursery() as nursery:
        nursery.start_soon(tunnel.stream.send_all, bytes(KEPT + 2 * MIB))
        received = 0
        while True:
            with trio.move_on_after(1) as scope:
                received += len(await tunnel.stream.receive_some(PIECE))
                require(received <= KEPT + ON_THE_WAY, f"it sent {received} bytes without being told of one")
            if scope.cancelled_caught:
                break
        require(received >= MIB, f"it waits after {received} bytes")
        acks = await tunnel.guest.open(ACKS)
        while received < KEPT + 2 * MIB:
            await acks.send_all(frame(pb.Progress(session=tunnel.session, received=received)))
            with trio.move_on_after(tunnel.guest.target.patience) as scope:
                received += len(await tunnel.stream.receive_some(PIECE))
            require(not scope.cancelled_caught, "it was told, and did not go on")
