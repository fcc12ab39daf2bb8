"""Programs that never outlive the node: trio's side of `guard.py`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from libmesh_node.llama.engine import EngineError

_MUCH = 16 * 1024
"""Bytes of output at once, from which on nobody pauses before the next look: the pipe holds 64 KiB."""

_GUARD = Path(__file__).with_name("guard.py")
_ORDERS = {signal.SIGTERM: b"T", signal.SIGKILL: b"K", signal.SIGINT: b"I"}


class ProgramNotStarted(EngineError):
    """The operating system would not start a program. The text says which and why."""


class GuardedProcess:
    """A running program. Made by `open_guarded`.

    Attributes:
        pid: of the program itself, not of its guard.
        output: what it writes to standard output and standard error, in order. Somebody must read it: when the pipe is
            full (64 KiB on Linux) the program waits.
    """

    def __init__(self, pid: int, output: trio.abc.ReceiveStream, control: _Control) -> None:
        self.pid = pid
        self.output = output
        self._control = control
        self._waiting = trio.Lock()
        self._status: int | None = None

    async def wait(self) -> int:
        """Wait for the end. Returns the exit status, or minus the number of the signal that ended it.

        May be called by several tasks at once, cancelled and repeated.
        """
        async with self._waiting:
            if self._status is None:
                self._status = self._verdict(await self._control.receive_line())
            return self._status

    def lines(self, every: float) -> Lines:
        """Its output, looked at once in so many seconds at most; at the end at once."""

        async def pause() -> None:
            with trio.move_on_after(every):
                await self.wait()

        return Lines(self.output, pause)

    async def send_signal(self, signum: signal.Signals) -> None:
        """Send SIGTERM, SIGINT or SIGKILL to the program's process group. No error if it is gone."""
        await self._control.send(_ORDERS[signum])

    def _verdict(self, line: str) -> int:
        if line.startswith("exit "):
            return int(line.removeprefix("exit "))
        if sys.platform != "linux":  # there the kernel kills the program together with its guard
            _kill(self.pid)
        return -signal.SIGKILL


@asynccontextmanager
async def open_guarded(
    argv: Sequence[str], *, environment: Mapping[str, str], directory: Path | None = None
) -> AsyncIterator[GuardedProcess]:
    """Run the program `argv[0]`, an absolute path, for as long as the block lasts and not a moment longer.

    Leaving the block, also by cancellation, kills what still runs with SIGKILL and waits for its end. The program is in
    a session of its own, so a Ctrl-C in the terminal does not reach it, and programs that compute on the same cores share
    them in turns where Linux shares them out by session (sched(7), "autogroup"): in one session, three llama-servers on two
    cores gave a fifth of the answers (`bench/failover.py`).

    Raises `ProgramNotStarted`.
    """
    with _told_of(argv[0]):
        ours, theirs = socket.socketpair()
    with ours:
        with theirs, _told_of(argv[0]):
            guard = await trio.lowlevel.open_process(
                [sys.executable, "-I", "-S", str(_GUARD), *argv],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=directory,
                start_new_session=True,
            )
        output = guard.stdout
        assert output is not None
        control = _Control(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        try:
            process = GuardedProcess(await _started(argv[0], control), output, control)
            try:
                yield process
            finally:
                with trio.CancelScope(shield=True):
                    await process.send_signal(signal.SIGKILL)
                    await process.wait()
        finally:
            with trio.CancelScope(shield=True):
                await control.aclose()  # the end of file that kills the program, if anything above failed
                await guard.wait()
                await output.aclose()


@contextmanager
def _told_of(program: str) -> Iterator[None]:
    """What the system lacks for its guard, such as file descriptors, processes or memory, is told of the program."""
    try:
        yield
    except OSError as exc:
        raise ProgramNotStarted(f"{program} could not be started: {exc.strerror or exc}.") from exc


async def _started(program: str, control: _Control) -> int:
    line = await control.receive_line()
    if line.startswith("pid "):
        return int(line.removeprefix("pid "))
    reason = line.removeprefix("error ") or "its guard ended before it began"
    raise ProgramNotStarted(f"{program} could not be started: {reason}.")


class Lines:
    """A program's output, line by line.

    Lines end with a newline, and are cut at 4096 bytes: one longer than that comes in pieces. What is no UTF-8 is
    replaced. Cancelling loses nothing. `pause` is awaited before each look at what else there
    is, unless there was much.
    """

    _LIMIT = 4096

    def __init__(
        self, stream: trio.abc.ReceiveStream, pause: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._stream, self._pause = stream, pause
        self._last = 0  # bytes that came at once
        self._buffer = bytearray()

    async def receive(self) -> str | None:
        """The next line without its end, or `None` after the last. Does not always reach a checkpoint."""
        while (end := self._buffer.find(b"\n", 0, self._LIMIT)) < 0 and len(self._buffer) < self._LIMIT:
            if self._pause is not None and self._last < _MUCH:
                await self._pause()
            data = await self._stream.receive_some(65536)
            self._last = len(data)
            if not data:
                return self._take(len(self._buffer), 0) if self._buffer else None
            self._buffer += data
        return self._take(end, 1) if end >= 0 else self._take(self._LIMIT, 0)

    def _take(self, size: int, ending: int) -> str:
        line = self._buffer[:size].decode("utf-8", "replace").rstrip("\r")
        del self._buffer[: size + ending]
        return line


class _Control:
    """Lines over the control socket. One reader at a time; an end of file reads as an empty line."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = b""

    async def receive_line(self) -> str:
        while b"\n" not in self._buffer:
            try:
                data = await self._stream.receive_some(4096)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                return ""
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode("ascii", "replace")

    async def send(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError:  # the guard is gone, and the program with it
            return

    async def aclose(self) -> None:
        await self._stream.aclose()


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
