"""How a node ends when it is told to: by a signal or a command, within seconds, come what may."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import trio

log = logging.getLogger(__name__)

PATIENCE = 2.8
"""Seconds after the first signal, or `stop`, after which the process ends come what may. llama.cpp's processes cannot
outlive it: their guards see to that."""


async def end_on_signal(
    signals: AsyncIterator[int],
    end: Callable[[], Awaitable[None]],
    scope: trio.CancelScope,
    ending: trio.CancelScope,
) -> None:
    """At the first signal, `end`; at the second, or if `scope` is cancelled before the first, end the process.

    The second is listened for until `ending` is cancelled. `end` cancels `scope`.
    """
    async for _ in signals:
        if scope.cancel_called:
            os._exit(130)
        log.info("ending; once more to end at once")
        end_for_sure()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)
            with ending:
                async for _ in signals:
                    os._exit(130)


def end_for_sure() -> None:
    """Let the kernel end the process if it is still there after `PATIENCE`: whatever hangs, the promise holds."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
