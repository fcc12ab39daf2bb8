"""Where trio and asyncio meet: the only file that knows both.

Two threads. The node decides in trio's, the main one. HTTP is served from one worker thread with an asyncio loop of
its own. Four things cross, and nothing else:

    snapshot   trio → HTTP   one immutable value, swapped whole; readers take the newest and never wait
    changed    trio → HTTP   a wake-up for those who watch; many swaps before a watcher runs are one wake-up
    commands   HTTP → trio   a coroutine function over `NodeCommands`, run as a task of its own, answered once
    asked      HTTP → trio   what clients ask for, told at most some times a second, and not answered

Bodies never cross: the proxy speaks to llama-server, or to the local end of a tunnel, over loopback sockets.

Either side may end first. A command whose trio side is gone fails with `CommandFailed("stopping")`; a command whose
caller is gone is cancelled. When the trio side is cancelled, the HTTP thread is asked to finish, and after
`STOP_PATIENCE` seconds is left behind: it is a daemon thread and cannot keep the process alive.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

import trio

from libmesh_node.asked import Asked
from libmesh_node.snapshot import NodeSnapshot

log = logging.getLogger("libmesh_node.http")

T = TypeVar("T")
V = TypeVar("V")

MAX_COMMANDS = 32
"""Commands under way at once. One more is refused with `CommandFailed("busy")`; people type these by hand."""

STOP_PATIENCE = 2.5
"""Seconds that the HTTP thread may take to end. The node promises to be gone 3 s after Ctrl-C."""


class CommandFailed(Exception):
    """The node did not do what was asked. The text is for the person who asked.

    Attributes:
        code: a word for programs: `invalid`, `denied`, `not_found`, `conflict`, `unreachable`, `busy`, `stopping` or
            `internal`. `http/console.py` gives each its HTTP status; an unknown one is a 500.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class NodeCommands(Protocol):
    """What the console may ask of the node. Called in trio, each in a task of its own, cancelled if the caller leaves.

    All raise `CommandFailed`. Anything else that they raise is logged and reaches the caller as `internal`.
    """

    async def join(self, token: str) -> str:
        """Join the mesh that `token` invites to and return its mesh id."""

    async def invite(self, scope: str, ttl: float) -> tuple[str, float]:
        """Make an invite for `ttl` seconds; `scope` is client, worker or invite.

        Returns the token and when it expires, in seconds since the epoch.
        """

    async def revoke(self, name: str) -> str:
        """Take back the invite, or the membership of the peer, that `name` names; say in words what was done."""

    async def stop(self) -> None:
        """Begin to end the node, and return at once."""

    async def expose(self, name: str, host: str, port: int, scope: str) -> None:
        """Offer the TCP service at `host:port` to the mesh as `name`, to members with at least `scope`."""

    async def connect(self, peer: str, name: str, port: int) -> int:
        """Forward a local TCP port to `name` at `peer` and return it. Port 0 lets the system choose."""

    async def tunnelled(self) -> Mapping[tuple[str, str], int]:
        """Bytes that tunnels have carried, by path and `sent` or `received`."""

    async def plan(self, model: str) -> dict[str, object]:
        """How a model, named as for `--model`, would be served now; see `planning.plan_json`."""

    async def load(self, model: str) -> dict[str, object]:
        """Serve a model, named as for `--model`, from now on; returns as soon as that has begun.

        `model` is its name, `status` a word of `snapshot.LocalModel`, `alone` whether this machine has room for all of it.
        """

    async def unload(self, name: str, *, forget: bool) -> dict[str, object]:
        """Serve a model no more, after the answers under way; `forget` it: want it no more, either.

        `model` is its name, `wanted` whether this node's operator still wants it of the mesh.
        """

    def asked(self, asked: tuple[Asked, ...]) -> None:
        """Clients of this node asked for models. Must neither block nor raise."""


class Bridge:
    """Made in trio's thread. `publish`, `run` belong to trio; `snapshot` to everybody; the rest to the HTTP thread."""

    def __init__(self, commands: NodeCommands, snapshot: NodeSnapshot) -> None:
        self._commands = commands
        self._state = (1, snapshot)  # replaced whole, so that a reader never sees a torn pair
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._stopped = False
        self._wake_pending = False
        self._watchers: set[asyncio.Event] = set()
        self._trio: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._under_way = 0

    @property
    def snapshot(self) -> NodeSnapshot:
        """The newest snapshot. Never waits; from any thread."""
        return self._state[1]

    # trio's side

    def publish(self, snapshot: NodeSnapshot) -> None:
        """Let all readers see `snapshot` from now on. Never blocks. An equal one wakes nobody."""
        version, newest = self._state
        if snapshot == newest:
            return
        self._state = (version + 1, snapshot)
        loop = self._loop
        if loop is not None and not self._wake_pending:
            self._wake_pending = True
            with suppress(RuntimeError):  # it closed just now; nobody is left to wake
                loop.call_soon_threadsafe(self._wake)

    async def run(
        self,
        main: Callable[[Callable[[T], None], asyncio.Event], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[T] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run the asyncio function `main(started, stop)` in a thread, and serve its commands, until cancelled.

        `main` calls `started(value)` once it serves; `value` goes to `task_status`. It should return soon after
        `stop` is set. What it raises is raised here, as is a `RuntimeError` if it returns unasked. Call it once.

        Cancellation: commands under way are cancelled, `stop` is set, and the thread has `STOP_PATIENCE` seconds
        to end, shielded.
        """
        token = trio.lowlevel.current_trio_token()
        ended = trio.Event()
        failure: list[BaseException] = []

        def started(value: T) -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(task_status.started, value)

        def thread_main() -> None:
            try:
                asyncio.run(self._in_loop(main, started))
            except BaseException as exc:  # noqa: BLE001  carried over to trio's thread and raised there
                failure.append(exc)
            finally:
                with suppress(trio.RunFinishedError):
                    token.run_sync_soon(ended.set)

        self._trio = token
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                threading.Thread(target=thread_main, name="http", daemon=True).start()
                await ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._nursery = None
            self._stop_loop()
            with trio.move_on_after(STOP_PATIENCE, shield=True):
                await ended.wait()
            if not ended.is_set():
                log.error("the HTTP thread did not end within %g s; leaving it behind", STOP_PATIENCE)
        raise failure[0] if failure else RuntimeError("the HTTP thread ended although nobody asked it to")

    async def _in_loop(
        self,
        main: Callable[[Callable[[T], None], asyncio.Event], Awaitable[None]],
        started: Callable[[T], None],
    ) -> None:
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if self._stopped:
            return
        try:
            await main(started, self._stop)
        finally:
            self._loop = None

    def _stop_loop(self) -> None:
        self._stopped = True
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None:
            with suppress(RuntimeError):  # it closed just now
                loop.call_soon_threadsafe(stop.set)

    def _begin(self, act: Callable[[NodeCommands], Awaitable[T]], reply: _Reply[T]) -> None:
        if self._nursery is None:
            reply.fail(CommandFailed("stopping", "the node is stopping"))
        elif self._under_way >= MAX_COMMANDS:
            reply.fail(CommandFailed("busy", f"{MAX_COMMANDS} commands are under way; try again in a moment"))
        else:
            self._under_way += 1
            self._nursery.start_soon(self._serve, act, reply)

    async def _serve(self, act: Callable[[NodeCommands], Awaitable[T]], reply: _Reply[T]) -> None:
        try:
            with reply.scope:
                reply.succeed(await act(self._commands))
        except CommandFailed as failure:
            reply.fail(failure)
        except Exception:  # a task boundary: one failed command must not end the node
            log.exception("a command from the console failed")
            reply.fail(CommandFailed("internal", "the node failed at this; its log says why"))
        finally:
            self._under_way -= 1
            reply.fail(CommandFailed("stopping", "the node is stopping"))

    # the HTTP side

    async def call(self, act: Callable[[NodeCommands], Awaitable[T]]) -> T:
        """Run `act` over the node's commands in trio and return what it returns. Raises `CommandFailed`.

        If cancelled, so is the command; how far it came is not known.
        """
        reply: _Reply[T] = _Reply()
        try:
            if self._trio is None:
                raise trio.RunFinishedError
            self._trio.run_sync_soon(self._begin, act, reply)
        except trio.RunFinishedError:
            raise CommandFailed("stopping", "the node is stopping") from None
        try:
            return await reply.future
        except asyncio.CancelledError:
            with suppress(trio.RunFinishedError):
                self._trio.run_sync_soon(reply.scope.cancel)
            raise

    def tell(self, asked: tuple[Asked, ...]) -> None:
        """Tell the node what clients asked for. Returns at once; a node that is ending hears of it no more."""
        if self._trio is not None:
            with suppress(trio.RunFinishedError):
                self._trio.run_sync_soon(self._commands.asked, asked)

    async def watch(self, silence: float) -> AsyncGenerator[NodeSnapshot | None]:
        """Yield the newest snapshot at once and after each change, and `None` after `silence` seconds without one.

        A slow reader skips, never lags. Close it (`contextlib.aclosing`) when done.
        """
        changed = asyncio.Event()
        self._watchers.add(changed)
        seen = 0
        try:
            while True:
                changed.clear()
                version, snapshot = self._state
                if version != seen:
                    seen = version
                    yield snapshot
                    continue
                try:
                    async with asyncio.timeout(silence):
                        await changed.wait()
                except TimeoutError:
                    yield None
        finally:
            self._watchers.discard(changed)

    def _wake(self) -> None:
        self._wake_pending = False
        for changed in self._watchers:
            changed.set()


class _Reply(Generic[T]):
    """The way back of one command: a future of the HTTP thread's loop, settled once, from trio's thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self._loop.create_future()
        self.scope = trio.CancelScope()

    def succeed(self, value: T) -> None:
        self._settle(self.future.set_result, value)

    def fail(self, failure: CommandFailed) -> None:
        self._settle(self.future.set_exception, failure)

    def _settle(self, settle: Callable[[V], None], value: V) -> None:
        def unless_done() -> None:
            if not self.future.done():
                settle(value)

        with suppress(RuntimeError):  # the loop is closed, so the caller is gone
            self._loop.call_soon_threadsafe(unless_done)
