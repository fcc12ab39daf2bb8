"""How a node ends when it is told to: by a signal or a command, within seconds, come what may."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager

import trio

log = logging.getLogger(__name__)

PATIENCE = 2.8
"""Seconds after the first signal, or `stop`, after which the process ends come what may. llama.cpp's processes cannot
outlive it: their guards see to that."""


def open_ending_signals() -> AbstractContextManager[AsyncIterator[int]]:
    """Receive what tells a process to end: SIGINT, SIGTERM, and SIGHUP, which says that its terminal was closed.

    Who started it with `nohup` has SIGHUP ignored, and so it stays.
    """
    hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    return trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, *hangup)


async def end_on_signal(
    signals: AsyncIterator[int],
    end: Callable[[], Awaitable[None]],
    scope: trio.CancelScope,
    ending: trio.CancelScope,
) -> None:
    """At the first signal, `end`; at the second, or if `scope` is cancelled before the first, end the process.

    The second is listened for until `ending` is cancelled. `end` cancels `scope`. A closed terminal counts as the first only: the
    shell and the kernel each tell of it.
    """
    async for number in signals:
        if scope.cancel_called:
            _end_at_once(number)
            continue
        log.info("ending; once more to end at once")
        end_for_sure()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)
            with ending:
                async for number in signals:
                    _end_at_once(number)


def _end_at_once(number: int) -> None:
    if number != signal.SIGHUP:
        os._exit(130)


def end_for_sure() -> None:
    """Let the kernel end the process if it is still there after `PATIENCE`: whatever hangs, the promise holds."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
