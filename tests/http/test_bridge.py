"""The bridge alone: one trio run, one asyncio thread, and what happens when either ends."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import aclosing
from functools import partial

import pytest
import trio
from libmesh_node import bridge as bridge_module
from libmesh_node.bridge import MAX_COMMANDS, Bridge, CommandFailed
from libmesh_node.http.server import PortTaken, serve_http

from tests.http.conftest import Commands, snapshot_of

Started = Callable[[object], None]


async def run_until_done(main: Callable[[Started, asyncio.Event], object], bridge: Bridge) -> object:
    """Run `main` over `bridge` until it calls `started` with its result, then end it."""
    async with trio.open_nursery() as nursery:
        result = await nursery.start(partial(bridge.run, main))
        nursery.cancel_scope.cancel()
    return result


async def test_command_answers_with_its_result() -> None:
    bridge = Bridge(Commands(), snapshot_of())

    async def main(started: Started, stop: asyncio.Event) -> None:
        started(await bridge.call(lambda node: node.invite("client", 1.0)))
        await stop.wait()

    assert await run_until_done(main, bridge) == ("token-for-client", 1.9e9)


async def test_one_command_too_many_is_refused_and_the_others_go_on() -> None:
    commands = Commands()
    commands.hold = True
    bridge = Bridge(commands, snapshot_of())

    async def main(started: Started, stop: asyncio.Event) -> None:
        held = [asyncio.ensure_future(bridge.call(lambda node: node.stop())) for _ in range(MAX_COMMANDS)]
        await asyncio.sleep(0)
        with pytest.raises(CommandFailed) as caught:
            await bridge.call(lambda node: node.stop())
        under_way = sum(not one.done() for one in held)
        for one in held:
            one.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        while commands.cancelled < MAX_COMMANDS:  # noqa: ASYNC110  on their way to the other thread
            await asyncio.sleep(0)
        commands.hold = False
        await bridge.call(lambda node: node.stop())
        started((caught.value.code, under_way))
        await stop.wait()

    assert await run_until_done(main, bridge) == ("busy", MAX_COMMANDS)
    assert commands.cancelled == MAX_COMMANDS


async def test_command_after_the_end_of_trio_fails_instead_of_waiting() -> None:
    bridge = Bridge(Commands(), snapshot_of())
    codes: list[str] = []

    async def main(started: Started, stop: asyncio.Event) -> None:
        started(None)
        await stop.wait()
        with pytest.raises(CommandFailed) as caught:
            await bridge.call(lambda node: node.stop())
        codes.append(caught.value.code)

    await run_until_done(main, bridge)
    assert codes == ["stopping"]


async def test_watcher_skips_to_the_newest_and_hears_of_silence() -> None:
    bridge = Bridge(Commands(), snapshot_of())
    ready = threading.Event()
    go_on = threading.Event()

    async def main(started: Started, stop: asyncio.Event) -> None:
        seen: list[object] = []
        async with aclosing(bridge.watch(silence=0.01)) as changes:
            async for snapshot in changes:
                seen.append(snapshot and snapshot.version)
                if len(seen) == 1:
                    ready.set()
                    await asyncio.to_thread(go_on.wait)
                if snapshot is None:
                    break
        started(seen)
        await stop.wait()

    async with trio.open_nursery() as nursery:

        async def publish() -> None:
            await trio.to_thread.run_sync(ready.wait)
            for version in ("a", "b", "c", "c"):
                bridge.publish(snapshot_of(version=version))
            go_on.set()

        nursery.start_soon(publish)
        assert await nursery.start(partial(bridge.run, main)) == ["0.0.1", "c", None]
        nursery.cancel_scope.cancel()


async def test_failure_of_the_thread_ends_the_node() -> None:
    async def main(started: Started, stop: asyncio.Event) -> None:
        started(None)
        raise ZeroDivisionError

    bridge = Bridge(Commands(), snapshot_of())
    with pytest.raises(ZeroDivisionError):
        await bridge.run(main)


async def test_return_of_the_thread_unasked_is_a_failure() -> None:
    async def main(started: Started, stop: asyncio.Event) -> None:
        started(None)

    with pytest.raises(RuntimeError, match="nobody asked"):
        await Bridge(Commands(), snapshot_of()).run(main)


async def test_thread_that_will_not_end_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_module, "STOP_PATIENCE", 0.05)
    release = threading.Event()

    async def main(started: Started, stop: asyncio.Event) -> None:
        started(None)
        release.wait(60)  # blocks the whole loop, as a bug might

    await run_until_done(main, Bridge(Commands(), snapshot_of()))
    assert not release.is_set()
    release.set()


async def test_bridge_cancelled_before_its_thread_runs_ends() -> None:
    async def main(started: Started, stop: asyncio.Event) -> None:
        await stop.wait()

    with trio.move_on_after(60) as limit:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Bridge(Commands(), snapshot_of()).run, main)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert not limit.cancelled_caught


@pytest.mark.parametrize(("flag", "which"), [("--port", "api"), ("--console", "console")])
async def test_port_in_use_is_named_with_the_flag_that_chooses_another(flag: str, which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where = {"api": ("127.0.0.1", 0), "console": ("127.0.0.1", 0)} | {which: ("127.0.0.1", port)}
        bridge = Bridge(Commands(), snapshot_of())
        expected = pytest.RaisesExc(PortTaken, match=f"port {port} is in use.*{flag} PORT")
        with pytest.RaisesGroup(expected) as caught:
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(serve_http, bridge, **where))
    (failure,) = caught.value.exceptions
    assert isinstance(failure, OSError)
    assert failure.port == port
