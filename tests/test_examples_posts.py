"""The chat room and the shared counter, as people would run them: two processes, and what they print."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


class Lines:
    """The lines that a process prints."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdout is not None
        self._stream, self._rest = process.stdout, b""

    async def until(self, wanted: str) -> str:
        """The first line that contains `wanted`; fails after 20 s."""
        with trio.fail_after(60):
            while True:
                line, newline, rest = self._rest.partition(b"\n")
                if newline:
                    self._rest = rest
                    if wanted in line.decode():
                        return line.decode()
                    continue
                more = await self._stream.receive_some()
                assert more, f"it ended before it printed {wanted!r}"
                self._rest += more


@asynccontextmanager
async def running(example: str, *arguments: str) -> AsyncIterator[tuple[Lines, trio.Process]]:
    async with trio.open_nursery() as nursery:
        run = partial(
            trio.run_process,
            [sys.executable, str(EXAMPLES / example), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        process = await nursery.start(run)
        yield Lines(process), process
        await process.stdin.aclose()


async def type_until_seen(sender: trio.Process, line: bytes, reader: Lines, wanted: str) -> None:
    """Say it each second until it is seen: posts are best effort, and gossip takes a moment to find its paths."""
    assert sender.stdin is not None
    async with trio.open_nursery() as nursery:

        async def repeat() -> None:
            while True:
                await sender.stdin.send_all(line)  # type: ignore[union-attr]
                await trio.sleep(1)

        nursery.start_soon(repeat)
        await reader.until(wanted)
        nursery.cancel_scope.cancel()


async def test_what_one_types_in_the_chat_room_the_other_sees() -> None:
    async with running("chat.py") as (alice, at_alice):
        token = await alice.until("lm1")
        async with running("chat.py", token) as (bob, at_bob):
            await bob.until("you are")
            await type_until_seen(at_alice, b"hello from alice\n", bob, "hello from alice")
            await type_until_seen(at_bob, b"hello from bob\n", alice, "hello from bob")


async def test_both_sides_of_the_counter_come_to_the_same_total_and_keep_it() -> None:
    async with running("counter.py") as (alice, at_alice):
        token = await alice.until("lm1")
        async with running("counter.py", token) as (bob, at_bob):
            assert at_alice.stdin is not None
            assert at_bob.stdin is not None
            await bob.until("total 0")
            await at_alice.stdin.send_all(b"\n\n")
            await bob.until("total 2")
            await at_bob.stdin.send_all(b"\n")
            await alice.until("total 3")
        await at_alice.stdin.send_all(b"\n")  # bob has gone, what he counted has not
        await alice.until("total 4")
