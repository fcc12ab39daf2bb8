"""Wait for a machine's deadline, which may move while one waits."""

from __future__ import annotations

from collections.abc import Callable

import trio


class Alarm:
    """The one clock of a machine's driver: `due` waits, `moved` makes it look again. For one waiter at a time."""

    def __init__(self) -> None:
        self._moved = trio.Event()

    def moved(self) -> None:
        """The deadline may be another one now. To be called after each event that the machine was given."""
        self._moved.set()

    async def due(
        self, deadline: Callable[[], float | None], now: Callable[[], float] = trio.current_time
    ) -> None:
        """Return once `deadline()` has come, by the clock `now`, in seconds; `None` never comes. May be cancelled.

        Always a checkpoint, so that a deadline which has passed holds up nobody.
        """
        while True:
            self._moved = trio.Event()
            at = deadline()
            with trio.move_on_after(float("inf") if at is None else max(0.0, at - now())):
                await self._moved.wait()
                continue
            return
