"""Eight peers under random cancels, pauses, resets and kills: nothing may be corrupted, and nothing may leak.

The test runs for seconds. By hand, for as long as you like: `python -m tests.net.test_soak 1800`.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import random
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field

import pytest
import trio

from libmesh.errors import MeshError
from libmesh.net.base import Stream
from libmesh.net.libp2p import Libp2pConfig, Libp2pNetwork, open_libp2p_network

PEERS = 8
ECHO = "/soak/echo/1.0.0"
CONFIG = Libp2pConfig(hosts=("127.0.0.1",))


@dataclass
class Soak:
    """The peers, and what has happened to them."""

    seed: int
    lots: random.Random = field(init=False)
    networks: dict[int, Libp2pNetwork] = field(default_factory=dict)
    whole: int = 0
    cut: int = 0
    cancelled: int = 0
    killed: int = 0

    def __post_init__(self) -> None:
        self.lots = random.Random(self.seed)

    async def peer(self, index: int) -> None:
        """Keep one peer alive, with a life that ends now and then."""
        while True:
            async with AsyncExitStack() as stack:
                seed = bytes([index + 1]) * 32
                network = await stack.enter_async_context(open_libp2p_network(seed, CONFIG))
                network.set_handler(ECHO, self.echo, admitted_only=False)
                self.networks[index] = network
                try:
                    await trio.sleep(self.lots.uniform(1, 12))
                finally:
                    self.networks.pop(index, None)
            self.killed += 1

    async def echo(self, stream: Stream) -> None:
        try:
            while data := await stream.receive_some():
                if self.lots.random() < 0.01:
                    await trio.sleep(self.lots.uniform(0, 0.2))
                await stream.send_all(data)
            await stream.aclose()
        except trio.BrokenResourceError:
            return
        finally:
            stream.reset()  # also when this peer is killed: half an echo must not look like a whole one

    async def user(self) -> None:
        """Use random pairs of peers, cancelled at random."""
        while True:
            await trio.sleep(0.001)
            indices = list(self.networks)
            if len(indices) < 2:
                continue
            near, far = (self.networks[i] for i in self.lots.sample(indices, 2))
            limit = self.lots.choice((0.0005, 0.002, 0.01, 0.05, 5, 5, 5))
            with trio.move_on_after(limit) as scope:
                try:
                    await near.connect(far.peer, far.addresses())
                    await self.transfer(await near.open_stream(far.peer, ECHO))
                    self.whole += 1
                except (MeshError, trio.BrokenResourceError, trio.ClosedResourceError):
                    self.cut += 1
            self.cancelled += scope.cancelled_caught

    async def transfer(self, stream: Stream) -> None:
        lots = self.lots
        data = lots.randbytes(lots.choice((10, 1000, 50_000, 600_000)))
        ended = False
        try:
            got = hashlib.sha256()

            async def send() -> None:
                await stream.send_all(data)
                await stream.send_eof()

            async with collected(stream, send):
                while piece := await stream.receive_some():
                    got.update(piece)
            assert got.digest() == hashlib.sha256(data).digest(), f"corrupted (seed {self.seed})"
            ended = True
        finally:
            if ended or lots.random() < 0.5:
                with trio.CancelScope(shield=True):
                    await stream.aclose()
            else:
                stream.reset()


class collected:
    """Run `send` beside the body, and raise one plain error rather than a group."""

    def __init__(self, stream: Stream, send: Callable[[], Awaitable[None]]) -> None:
        self._stream, self._send = stream, send

    async def __aenter__(self) -> None:
        self._manager = trio.open_nursery()
        nursery = await self._manager.__aenter__()

        async def quietly() -> None:
            with suppress(MeshError, trio.BrokenResourceError, trio.ClosedResourceError):
                await self._send()

        nursery.start_soon(quietly)

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            await self._manager.__aexit__(kind, error, traceback)  # type: ignore[arg-type]
        except BaseExceptionGroup as group:
            if error is None or group.subgroup(lambda each: each is error) is None:
                raise
            raise error from None


def resources() -> tuple[int, int, int]:
    """Open files, tasks, and resident KiB."""
    gc.collect()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * 4
    return len(os.listdir("/proc/self/fd")), trio.lowlevel.current_statistics().tasks_living, resident


async def soak(seconds: float, seed: int, report: Callable[[str], None] = lambda _: None) -> None:
    state = Soak(seed)
    first: tuple[int, int, int] | None = None
    start = trio.current_time()
    while trio.current_time() - start < seconds:
        # Each round ends with everything closed, so that whatever is left over then has leaked.
        with trio.move_on_after(min(60.0, seconds / 4)):
            async with trio.open_nursery() as nursery:
                for index in range(PEERS):
                    nursery.start_soon(state.peer, index)
                for _ in range(2 * PEERS):
                    nursery.start_soon(state.user)
        await trio.sleep(0.5)
        now = resources()
        first = first or now
        report(
            f"{trio.current_time() - start:.0f} s: {state.whole} whole, {state.cut} cut off, {state.cancelled} cancelled, "
            f"{state.killed} peers killed; {now[0]} files, {now[1]} tasks, {now[2] // 1024} MiB"
        )
    last = resources()
    assert state.whole > 10
    assert state.cancelled > 10
    assert last[0] <= first[0] + 3, "files leaked"
    assert last[1] <= first[1] + 3, "tasks leaked"


@pytest.mark.slow
async def test_random_cancels_pauses_and_kills_corrupt_and_leak_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    await soak(24, seed=1)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    trio.run(soak, float(sys.argv[1]), 1, lambda text: print(text, flush=True))  # noqa: T201
