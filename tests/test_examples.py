"""The examples, run as their own words say."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

LIMIT = 60
"""Seconds; starting Python with py-libp2p takes two of them, or five on a busy machine."""


class Example:
    """A running example whose lines can be waited for."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._text = b""

    async def line(self) -> str:
        """The next line that it prints."""
        assert self._process.stdout is not None
        with trio.fail_after(LIMIT):
            while b"\n" not in self._text:
                data = await self._process.stdout.receive_some()
                assert data, f"it ended with {await self._process.wait()}"
                self._text += data
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()

    async def interrupt(self) -> tuple[int, str]:
        """As Ctrl-C does; see `ended`."""
        self._process.send_signal(signal.SIGINT)
        return await self.ended()

    async def ended(self) -> tuple[int, str]:
        """Its exit status, and what it printed to stderr."""
        assert self._process.stderr is not None
        with trio.fail_after(LIMIT):
            complaint = b"".join([data async for data in self._process.stderr])
            return await self._process.wait(), complaint.decode()


@asynccontextmanager
async def running(name: str, *arguments: str) -> AsyncIterator[Example]:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = await trio.lowlevel.open_process(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    try:
        yield Example(process)
    finally:
        with trio.CancelScope(shield=True):
            if process.poll() is None:
                process.kill()
            await process.wait()
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None
                await pipe.aclose()


async def test_echo_comes_back_from_another_process() -> None:
    async with running("echo", "serve") as server:
        token = await server.line()
        async with running("echo", "call", token, "hello, mesh") as client:
            assert await client.line() == "hello, mesh"
        assert await server.interrupt() == (0, "")


async def test_forward_carries_a_connection_to_the_port_behind_it() -> None:
    async def shout(stream: trio.SocketStream) -> None:
        """Answers only after the end of the request, so that a half-close must get through."""
        await stream.send_all(b"".join([data async for data in stream]).upper())

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, shout, 0)
        target = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        async with running("forward", "expose", target) as near:
            async with running("forward", "connect", await near.line()) as far:
                port = int(await far.line())
                for text in (b"hello", b"again" * 100_000):
                    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                        nursery.start_soon(send, stream, text)
                        assert b"".join([data async for data in stream]) == text.upper()
                assert await far.interrupt() == (0, "")
            assert await near.interrupt() == (0, "")
        nursery.cancel_scope.cancel()


async def send(stream: trio.SocketStream, data: bytes) -> None:
    await stream.send_all(data)
    await stream.send_eof()


async def test_watch_tells_who_comes_and_who_goes() -> None:
    async with running("watch", "found") as founder:
        token = await founder.line()
        async with running("watch", "join", token, "Ada") as ada:
            assert re.fullmatch(r"12D3KooW\w+ is alive", await ada.line())  # the founder has no name
            assert re.fullmatch(r"(Ada|12D3KooW\w+) is alive", await founder.line())
            assert await ada.interrupt() == (0, "")
            assert re.fullmatch(r"(Ada|12D3KooW\w+) is left", await founder.line())
        assert await founder.interrupt() == (0, "")


@pytest.mark.parametrize(
    "arguments", [("echo", "call", "lm1nonsense", "x"), ("watch", "join", "nothing", "x")]
)
async def test_a_token_that_is_none_is_told_in_words(arguments: tuple[str, ...]) -> None:
    async with running(*arguments) as example:
        status, complaint = await example.ended()
    assert status == 1
    assert "Traceback" not in complaint
    assert "invite" in complaint
