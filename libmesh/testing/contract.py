"""The contract of `Network` and `Stream` as checks that any implementation can be held to.

    async with make_pair() as (a, b):          # two networks, connected, each admitted by the other
        ...
    await check_network(make_pair)

Each check is named for the rule it holds; `RULES` has them all, so that a test can run them one by one. An
implementation that is known to break some (stock py-libp2p does) lists them, and then they must fail.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager, suppress

import trio
import trio.testing

from libmesh.errors import NetworkError, ServiceRefused
from libmesh.net.base import (
    AddressesChanged,
    Message,
    Network,
    NetworkEvent,
    PathChanged,
    PeerConnected,
    PeerDisconnected,
    Stream,
    StreamReset,
)
from libmesh.testing.bench import (
    PROTOCOL,
    Bench,
    cancelled_after,
    expect_reset,
    read_all,
    second_is_busy,
    send_and_finish,
    still_works,
    transfer,
    transfer_past_a_sink,
    transfer_until,
    turns,
)

MakePair = Callable[[], AbstractAsyncContextManager[tuple[Network, Network]]]


Check = Callable[[Bench], Awaitable[None]]
RULES: dict[str, Check] = {}


def _rule(check: Check) -> Check:
    RULES[check.__name__] = check
    return check


async def check_network(
    make_pair: MakePair,
    *,
    rules: Collection[str] | None = None,
    broken: Collection[str] = (),
    seed: int = 1,
    rounds: int = 200,
    pause: float = 0.3,
    limit: float = 60.0,
) -> None:
    """Hold an implementation to the contract, each rule with a fresh pair.

    Args:
        make_pair: yields two connected networks, each of which admits the other.
        rules: names out of `RULES`; all by default.
        broken: rules that the implementation is known to break. It is an error if it keeps one after all.
        seed: of everything random; named in the error.
        rounds: how often checks that draw lots do so.
        pause: seconds for which a reader stops reading.
        limit: seconds for one rule; a hang breaks it.

    Raises:
        AssertionError: naming the first rule that was broken, or kept unexpectedly.
    """
    for name in RULES if rules is None else rules:
        failure: BaseException | None = None
        async with make_pair() as (near, far):
            bench = Bench(near=near, far=far, seed=seed, rounds=rounds, pause=pause)
            try:
                with trio.fail_after(limit):
                    await RULES[name](bench)
            except Exception as exc:  # noqa: BLE001 - whatever an implementation does wrong is what we are to tell
                failure = exc
            bench.release()
        if failure is not None and name not in broken:
            raise AssertionError(f"{name} (seed {seed}) is broken: {failure!r}") from failure
        if failure is None and name in broken:
            raise AssertionError(f"{name} is listed as broken and holds")


# ---- the stream interface ---------------------------------------------------------------------------------------


@_rule
async def streams_are_trio_streams(bench: Bench) -> None:
    """`trio.testing`'s own checks."""
    await trio.testing.check_half_closeable_stream(bench.open, bench.open_clogged)


@_rule
async def end_of_file_leaves_the_other_direction_open(bench: Bench) -> None:
    """`send_eof` ends one direction; a megabyte still comes back."""
    near, far = await bench.open()
    await near.send_all(b"request")
    await near.send_eof()
    assert await read_all(far) == b"request"
    reply = random.Random(bench.seed).randbytes(1_000_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_and_finish, far, reply)
        assert await read_all(near) == reply


@_rule
async def reset_is_not_an_end_of_file(bench: Bench) -> None:
    """Each side sees the reset of the other as `StreamReset`."""
    near, far = await bench.open()
    near.reset()
    await expect_reset(far)
    near, far = await bench.open()
    far.reset()
    await expect_reset(near)


@_rule
async def what_arrived_before_a_reset_is_delivered(bench: Bench) -> None:
    """And only then comes `StreamReset`."""
    near, far = await bench.open()
    await near.send_all(b"x" * 1000)
    assert await far.receive_some(1) == b"x"  # one frame: the other 999 are there, too
    near.reset()
    await trio.testing.wait_all_tasks_blocked(0.05)
    got = b""
    with suppress(StreamReset):
        while data := await far.receive_some():
            got += data
    assert got == b"x" * 999
    await expect_reset(far)


@_rule
async def what_a_sink_leaves_is_received(bench: Bench) -> None:
    """With `receive_past` nothing is lost, doubled or moved, however much the sink takes, nor by a cancelled call."""
    await transfer_past_a_sink(*await bench.open(), bench.seed)


@_rule
async def closing_tells_a_blocked_writer(bench: Bench) -> None:
    """A writer whose reader closes gets an error instead of waiting for ever."""
    near, far = await bench.open()
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            try:
                while True:
                    await near.send_all(bytes(65536))
            except trio.BrokenResourceError:
                return

        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await far.aclose()


@_rule
async def one_task_sends_and_one_receives(bench: Bench) -> None:
    """A second sender or receiver gets `BusyResourceError`."""
    near, _ = await bench.open_clogged()
    await second_is_busy(lambda: near.send_all(bytes(65536)))
    near, _ = await bench.open()
    await second_is_busy(near.receive_some)


@_rule
async def unknown_protocols_are_refused(bench: Bench) -> None:
    """By `ServiceRefused`, though the request was sent already; the connection lives."""
    refused = False
    try:
        stream = await bench.near.open_stream(bench.far.peer, "/libmesh/nobody-serves-this/1.0.0")
        with suppress(StreamReset):
            await stream.send_all(b"a request that nobody wants")
        await stream.receive_some()
    except ServiceRefused as exc:
        refused = exc.reason == "unknown_protocol"
    assert refused
    await still_works(bench)


# ---- streams beside each other ----------------------------------------------------------------------------------


@_rule
async def a_paused_reader_stops_only_its_writer(bench: Bench) -> None:
    """Other streams go on, and afterwards nothing is missing."""
    near, far = await bench.open()
    data = random.Random(bench.seed).randbytes(20_000_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_and_finish, near, data)
        end = trio.current_time() + bench.pause
        while trio.current_time() < end:
            await still_works(bench)
            await trio.sleep(bench.pause / 10)
        assert await read_all(far) == data


@_rule
async def full_duplex_bulk_does_not_deadlock(bench: Bench) -> None:
    """Four streams full in both directions, and new ones beside them."""
    async with trio.open_nursery() as nursery:
        for index in range(4):
            near, far = await bench.open()
            nursery.start_soon(transfer, near, far, bench.seed + index, 4_000_000)
            nursery.start_soon(transfer, far, near, bench.seed - index, 4_000_000)
        for _ in range(20):
            await still_works(bench)


@_rule
async def streams_do_not_mix(bench: Bench) -> None:
    """Forty streams, both directions, each byte in its place."""
    async with trio.open_nursery() as nursery:
        for index in range(40):
            near, far = await bench.open()
            nursery.start_soon(transfer, near, far, bench.seed + index, 200_000)
            nursery.start_soon(transfer, far, near, bench.seed - index, 200_000)


@_rule
async def a_failing_handler_ends_only_its_stream(bench: Bench) -> None:
    """Its stream is reset; the next one works."""

    async def fail(stream: Stream) -> None:
        await stream.receive_some()
        raise ValueError("a handler that fails, on purpose")

    bench.far.set_handler(PROTOCOL + "/fail", fail)
    stream = await bench.near.open_stream(bench.far.peer, PROTOCOL + "/fail")
    await stream.send_all(b"go")
    await expect_reset(stream)
    await still_works(bench)


# ---- cancelling -------------------------------------------------------------------------------------------------


@_rule
async def a_cancelled_receive_loses_nothing(bench: Bench) -> None:
    """Cancelled at every point in turn."""
    near, far = await bench.open()
    lots = random.Random(bench.seed)
    data = lots.randbytes(256 * bench.rounds)
    got = bytearray()

    async def write() -> None:
        for start in range(0, len(data), 256):
            await near.send_all(data[start : start + 256])
            await turns(lots.randrange(4))
        await near.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        ended = False
        while not ended:
            async with cancelled_after(lots.randrange(6)):
                piece = await far.receive_some(lots.randrange(1, 600))
                got += piece
                ended = not piece
    assert bytes(got) == data


@_rule
async def cancelling_harms_no_other_stream(bench: Bench) -> None:
    """Opens, sends, receives and closes, cancelled anywhere, beside transfers that must stay whole."""
    lots = random.Random(bench.seed)
    async with trio.open_nursery() as nursery:
        stop = trio.Event()
        for index in range(3):
            near, far = await bench.open()
            nursery.start_soon(transfer_until, near, far, bench.seed + index, stop)
            nursery.start_soon(transfer_until, far, near, bench.seed - index, stop)
        for _ in range(bench.rounds):
            async with cancelled_after(lots.randrange(12)):
                await bench.misbehave(lots)
        stop.set()
    await still_works(bench)


@_rule
async def a_dead_connection_fails_every_stream(bench: Bench) -> None:
    """With `StreamReset` on both sides, but for what had been finished."""
    pairs = [await bench.open() for _ in range(5)]
    await pairs[0][0].send_eof()
    await bench.near.disconnect(bench.far.peer)
    for near, far in pairs:
        await expect_reset(near)
        with suppress(StreamReset):
            assert await far.receive_some() == b"", "only what was finished may end"
        if far is not pairs[0][1]:
            await expect_reset(far)


@_rule
async def a_loss_is_heard_of_while_nobody_receives(bench: Bench) -> None:
    """By whoever asked, and before or after it happens. An end of file is no loss."""
    near, far = await bench.open()
    with trio.CancelScope() as late:
        if not far.when_lost(late):
            return
        await near.send_eof()
        await trio.testing.wait_all_tasks_blocked(0.05)
        await trio.lowlevel.checkpoint()
        near.reset()
        await trio.sleep_forever()
    with trio.CancelScope() as early:
        far.when_lost(early)
        await trio.sleep_forever()
    near, far = await bench.open()
    with trio.CancelScope() as dead, trio.CancelScope() as forgotten:
        near.when_lost(forgotten)
        near.when_lost(dead)
        await bench.near.disconnect(bench.far.peer)
        await trio.sleep_forever()
    assert late.cancelled_caught
    assert early.cancelled_caught
    assert dead.cancelled_caught
    assert not forgotten.cancel_called


# ---- paths ------------------------------------------------------------------------------------------------------


@_rule
async def another_dial_is_another_way_and_harms_none(bench: Bench) -> None:
    """`dial` tells its path, streams that are open live on, and what the peer is told of fits together."""
    near, far = bench.near, bench.far
    here, there = await bench.open()
    if not await _dialled(near, far):
        return
    assert near.path(far.peer) is not None
    await here.send_all(b"over the connection that it began on")
    assert await there.receive_some() == b"over the connection that it began on"
    await still_works(bench)
    await near.disconnect(far.peer)
    assert near.path(far.peer) is None, "all connections are gone"
    await expect_reset(here)
    told: list[NetworkEvent] = []
    async with near.events() as events:
        async for event in events:
            if not isinstance(event, Message | AddressesChanged) and event.peer == far.peer:
                told.append(event)
            if isinstance(event, PeerDisconnected) and event.peer == far.peer:
                break
    assert isinstance(told[0], PeerConnected), told
    assert all(isinstance(event, PathChanged) for event in told[1:-1]), told


@_rule
async def a_dial_that_fails_or_is_given_up_leaves_what_there_was(bench: Bench) -> None:
    """`NetworkError` in words, no connection more, and the path as it was."""
    near, far = bench.near, bench.far
    before = near.path(far.peer)
    assert before is not None
    for address in ("/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/udp/1/quic-v1", "nonsense", ""):
        said = ""
        try:
            await near.dial(far.peer, address)
        except NetworkError as exc:
            said = str(exc)
        assert said, f"{address!r} is no way, and it is said why"
    lots = random.Random(bench.seed)
    for _ in range(min(bench.rounds, 50)):
        async with cancelled_after(lots.randrange(30)):
            await _dialled(near, far)
    after = near.path(far.peer)
    assert after is not None
    assert after.kind is before.kind
    await still_works(bench)


async def _dialled(near: Network, far: Network) -> bool:
    """Whether there is another connection now. A transport that cannot dial by address is free to say so."""
    for address in far.addresses():
        try:
            path = await near.dial(far.peer, address)
        except NetworkError:
            continue
        assert path.address == address, "the path is the one that was asked for"
        return True
    return False
