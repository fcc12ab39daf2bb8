"""Who waits for a server, in what order, and when it is more honest to say no."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from libmesh_node.http.errors import ApiError

PER_SLOT = 8
"""Requests that may wait for each slot of a model's servers. When full, further ones get 429. Batches are none of them for an
interactive one, which goes before them: however many there are, it is taken. So as many may wait besides."""

LOOK = 0.25
"""Seconds after which a waiting request looks again by itself: servers come without telling."""

USUAL = 5.0
"""Seconds of a request, as long as none has been measured."""


@dataclass(slots=True)
class _Line:
    """Those who wait for one model."""

    interactive: deque[asyncio.Future[None]] = field(default_factory=deque)
    batch: deque[asyncio.Future[None]] = field(default_factory=deque)
    seconds: float = USUAL

    def __len__(self) -> int:
        return len(self.interactive) + len(self.batch)

    def ahead(self, batch: bool) -> int:
        """Requests that go before a new one."""
        return len(self) if batch else len(self.interactive)

    def first(self) -> asyncio.Future[None] | None:
        return next(iter(self.interactive or self.batch), None)


class Queues:
    """A line for each model: interactive requests before batches, and first come, first served among equals."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}

    def waiting(self, model: str) -> int:
        """Requests in the line for `model`."""
        return len(self._lines.get(model, ()))

    async def turn(
        self,
        model: str,
        *,
        batch: bool,
        has_room: Callable[[], bool],
        slots: Callable[[], int],
        again: bool = False,
    ) -> None:
        """Wait until it is this request's turn and `has_room`.

        `slots` is how many requests the model's servers answer at once. Raises `ApiError` 429 if the line is full, with
        the time that it will take by the measured rate. One that had its turn, and whose server failed, comes `again`: it
        waits before its equals and is never refused. Cancelling leaves the line.
        """
        line = self._lines.setdefault(model, _Line())
        ahead = 0 if again else line.ahead(batch)
        if not ahead and has_room():
            return
        if not again:
            self._check_length(model, ahead, line.seconds, slots())
        mine = line.batch if batch else line.interactive
        try:
            with self._place(mine, again) as place:
                while not (line.first() is place[0] and has_room()):
                    await asyncio.wait(place, timeout=LOOK)
                    if place[0].done():
                        index = mine.index(place[0])
                        place[0] = mine[index] = asyncio.get_running_loop().create_future()
        finally:
            self.nudge(model)  # also if cancelled: who was told of the room and left passes the word on

    def check(self, model: str, *, has_room: Callable[[], bool], slots: Callable[[], int]) -> None:
        """Raise what `turn` would for any request, without knowing more of it: those refused are many, and are to cost little."""
        line = self._lines.get(model)
        if line is not None and (ahead := line.ahead(batch=False)) >= PER_SLOT and not has_room():
            self._check_length(model, ahead, line.seconds, slots())

    @property
    def lengths(self) -> dict[str, int]:
        """Requests that wait, by model; models for which none does may be left out."""
        return {model: len(line) for model, line in self._lines.items()}

    def took(self, model: str, seconds: float) -> None:
        """A request for `model` was answered in `seconds`: what the refused are told follows from it."""
        line = self._lines.setdefault(model, _Line())
        line.seconds += 0.2 * (seconds - line.seconds)

    def nudge(self, model: str) -> None:
        """There may be room now."""
        line = self._lines.get(model)
        place = line.first() if line is not None else None
        if place is not None and not place.done():
            place.set_result(None)

    @staticmethod
    @contextmanager
    def _place(line: deque[asyncio.Future[None]], again: bool) -> Iterator[list[asyncio.Future[None]]]:
        place = [asyncio.get_running_loop().create_future()]
        if again:
            line.appendleft(place[0])
        else:
            line.append(place[0])
        try:
            yield place
        finally:
            line.remove(place[0])

    @staticmethod
    def _check_length(model: str, ahead: int, seconds: float, slots: int) -> None:
        if ahead < PER_SLOT * max(slots, 1):
            return
        wait = math.ceil((ahead + 1) * seconds / max(slots, 1))
        message = (
            f"All servers of `{model}` are busy and {ahead} requests wait already; "
            f"by the present rate there is room in about {wait} s."
        )
        raise ApiError(429, "overloaded", message, retry_after=max(wait, 1))
