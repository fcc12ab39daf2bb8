"""The bytes of a circuit: two streams joined at a relay, at the speed of the muxers, and in fair turns.

What crosses, exactly: bytes; an end of file in either direction while the other goes on; a reset, in both directions. The
relay sees ciphertext and copies none of it: what one connection has decrypted is sealed for the other one in the very
call that received it. A slow reader slows its own writer down and nobody else, as a stream's window says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from libmesh.core.relay_desk import RelayLimits
from libmesh.core.shares import Shares
from libmesh.errors import ServiceRefused
from libmesh.net.base import Pieces
from libmesh.net.negotiate import Libp2pStream
from libmesh.net.parking import Wakeup
from libmesh.peers import PeerId

TURN_BYTES = 512 * 1024
"""Bytes that one direction of a circuit moves before it waits for its next turn."""

_SLOW_TURN = 16
"""With a rate, a turn is at most one such part of a second of it, so that nobody waits long for a large one."""


class Turns:
    """Gives the flows of a relay their turns. See `core.shares`.

    Args:
        limits: the rates in it are kept.
    """

    def __init__(self, limits: RelayLimits) -> None:
        rates = [rate for rate in (limits.bandwidth, limits.bandwidth_per_peer) if rate]
        self.size = (
            max(1024, min(TURN_BYTES, *(int(rate / _SLOW_TURN) for rate in rates))) if rates else TURN_BYTES
        )
        self._shares: Shares[Wakeup] = Shares(
            rate=limits.bandwidth, peer_rate=limits.bandwidth_per_peer, now=trio.current_time()
        )
        self._rearm = trio.Event()

    async def next(self, peer: PeerId, size: int) -> None:
        """Wait for the next turn of one flow of `peer`, which has moved `size` bytes. If cancelled, they are paid for."""
        flow = Wakeup()
        self._shares.wait(peer, flow, size, trio.current_time())
        self._rearm.set()
        try:
            await flow.wait()
        except BaseException:
            self._shares.leave(peer, flow)
            raise

    def forget(self, peer: PeerId) -> None:
        """A circuit of `peer` has ended."""
        self._shares.forget(peer, trio.current_time())

    async def run(self) -> None:
        """Give turns until cancelled."""
        shares = self._shares
        while True:
            flows = shares.turns(trio.current_time())
            for flow in flows:
                flow.wake()
            if flows:
                await trio.lowlevel.checkpoint()  # they move now, and what they move counts for the next turn
                continue
            self._rearm = trio.Event()
            with trio.move_on_at(shares.deadline(trio.current_time())):
                await self._rearm.wait()


@dataclass(slots=True)
class Carried:
    """What a circuit has carried so far, in bytes. `over` says why it was ended here, if it was."""

    forward: int = 0
    back: int = 0
    over: str | None = None


async def join_streams(
    near: Libp2pStream, far: Libp2pStream, *, payer: PeerId, turns: Turns, carried: Carried, most: int = 0
) -> None:
    """Carry bytes between two streams of different connections until both directions have ended, or either is reset.

    Takes over both and closes them, also on error; cancelling resets both. Never raises for what either side does.

    Args:
        near: of the peer that asked for the circuit.
        far: of the peer at its other end.
        payer: whose turns it takes.
        turns: gives them.
        carried: kept up to date.
        most: bytes in each direction after which both are reset; 0 for no end.
    """
    ended = False

    def count_forward(size: int) -> int:
        carried.forward += size
        return carried.forward

    def count_back(size: int) -> int:
        carried.back += size
        return carried.back

    there = _Direction(near, far, payer, turns, count_forward, most)
    back = _Direction(far, near, payer, turns, count_back, most)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.run, nursery.cancel_scope)
            nursery.start_soon(back.run, nursery.cancel_scope)
        if there.finished and back.finished:
            ended = True
            await near.aclose()
            await far.aclose()
        elif there.spent or back.spent:
            carried.over = f"it has carried its {most} bytes"
    finally:
        if not ended:
            near.reset()
            far.reset()


class _Direction:
    def __init__(
        self,
        source: Libp2pStream,
        target: Libp2pStream,
        payer: PeerId,
        turns: Turns,
        count: Callable[[int], int],
        most: int,
    ) -> None:
        self._source, self._target = source, target
        self._payer, self._turns, self._count = payer, turns, count
        self._most = most or float("inf")
        self._moved = 0
        self.finished = False
        self.spent = False

    async def run(self, scope: trio.CancelScope) -> None:
        """Move bytes until the end of file has been passed on; otherwise cancel `scope`, for the other direction."""
        try:
            await self._move()
        except (trio.BrokenResourceError, trio.ClosedResourceError, ServiceRefused):
            scope.cancel()
        if not self.finished:
            scope.cancel()

    async def _move(self) -> None:
        source, target, turns = self._source, self._target, self._turns
        while not self.spent:
            if self._moved >= turns.size:
                moved, self._moved = self._moved, 0
                await turns.next(self._payer, moved)
            data = source.receive_nowait(TURN_BYTES)
            if data is None:
                await source.wait_receivable(self._push)
            elif not data:
                await target.send_eof()
                self.finished = True
                return
            else:
                self._book(len(data))
                sent = target.send_nowait(data)
                if sent < len(data):
                    await target.send_all(memoryview(data)[sent:])

    def _push(self, pieces: Pieces) -> int:
        """Pass on what arrives, at once. What makes trouble is left to `_move`, which meets it next."""
        taken = 0
        for piece in pieces:
            if self._moved >= self._turns.size or self.spent:
                break
            try:
                sent = self._target.send_nowait(piece)
            except (trio.BrokenResourceError, trio.ClosedResourceError, ServiceRefused):
                break
            self._book(sent)
            taken += sent
            if sent < len(piece):
                break
        return taken

    def _book(self, size: int) -> None:
        self._moved += size
        if self._count(size) > self._most:
            self.spent = True
