"""Views for whoever watches the mesh: the newest one only, so that a slow reader skips and never lags."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from libmesh.peers import View


class Watchers:
    """Those who watch one mesh.

    Args:
        view: draws the mesh as it is now.
    """

    def __init__(self, view: Callable[[], View]) -> None:
        self._view = view
        self._watchers: dict[trio.MemorySendChannel[View], trio.MemoryReceiveChannel[View]] = {}

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[trio.MemoryReceiveChannel[View]]:
        """See `Mesh.watch`."""
        send, receive = trio.open_memory_channel[View](1)
        send.send_nowait(self._view())
        self._watchers[send] = receive
        try:
            async with receive:
                yield receive
        finally:
            self._watchers.pop(send, None)
            send.close()

    def close(self) -> None:
        """Nothing changes any more: whoever watches reads the last view, and then the end."""
        while self._watchers:
            self._watchers.popitem()[0].close()

    def tell(self) -> None:
        """The mesh is another one now."""
        view = self._view()
        for send, receive in self._watchers.items():
            try:
                send.send_nowait(view)
            except trio.WouldBlock:
                receive.receive_nowait()
                send.send_nowait(view)
            except trio.BrokenResourceError:
                continue
