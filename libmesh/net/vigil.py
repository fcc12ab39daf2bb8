"""Looks after all connections of the adapter: which of them give no sign of life. What that is, is decided in `core.pulse`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from libmesh.core.pulse import LOOK_EVERY, Pulse, Seen
from libmesh.net.muxer import YamuxConnection


class Vigil:
    """One timer for all connections.

    Args:
        changed: called with a connection that has come to be doubted, or is so no more.
        silent: called at each look with one that has been silent for long.
    """

    def __init__(self, changed: Callable[[Any], None], silent: Callable[[Any], None]) -> None:
        self._changed, self._silent = changed, silent
        self._pulses: dict[Any, Pulse] = {}
        self._doubted: set[Any] = set()

    def watch(self, connection: Any) -> None:
        """Look after a swarm's connection from now on. One with a muxer that is not ours is left alone."""
        if isinstance(connection.muxed_conn, YamuxConnection):
            self._pulses[connection] = Pulse()

    def forget(self, connection: Any) -> None:
        """It is over."""
        self._pulses.pop(connection, None)
        self._doubted.discard(connection)

    def doubts(self, connection: Any) -> bool:
        """Whether it was asked for a sign of life and has given none."""
        return connection in self._doubted

    def ask(self, connection: Any) -> None:
        """There is a reason to think that it is dead: ask it."""
        if (pulse := self._pulses.get(connection)) is not None:
            pulse.asked(trio.current_time())
            connection.muxed_conn.check()

    def ask_all(self) -> None:
        """There is a reason to think that all are dead."""
        for connection in list(self._pulses):
            self.ask(connection)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            before = trio.current_time()
            await trio.sleep(LOOK_EVERY)
            now = trio.current_time()
            if (late := now - before - LOOK_EVERY) > LOOK_EVERY:  # let what has come meanwhile be read
                for pulse in self._pulses.values():
                    pulse.postpone(late)
                await trio.lowlevel.checkpoint()
            for connection, pulse in list(self._pulses.items()):
                self._look(connection, pulse, now)

    def _look(self, connection: Any, pulse: Pulse, now: float) -> None:
        muxer: YamuxConnection = connection.muxed_conn
        if muxer.is_closed:
            self.forget(connection)
            return
        seen = pulse.look(
            sent=muxer.batches,
            heard_at=muxer.heard_at,
            waiting=muxer.unacknowledged > 0,
            rtt=muxer.rtt,
            now=now,
        )
        if seen is Seen.ASK:
            muxer.check()
        if (seen is Seen.DOUBTED) != (connection in self._doubted):
            self._doubted ^= {connection}
            self._changed(connection)
        if connection in self._doubted and pulse.gone(rtt=muxer.rtt, now=now):
            self._silent(connection)
