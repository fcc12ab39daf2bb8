"""Waiting for many sockets in one task, which reads them, too.

trio's way to wait for a socket is a task of its own that is woken, reads, and tells the kernel again that it waits: about as
much as all else that a tunnel does with a small message. Here one task waits for an epoll that knows all the sockets,
and calls for each that has something a function that takes it at once. Only what cannot be dealt with at once wakes
the socket's own task. A socket is with the epoll exactly while its task waits, so one that nobody reads costs nothing.

Where there is no epoll, each task waits by itself.
"""

from __future__ import annotations

import select
from collections.abc import Callable

import trio

from libmesh.net.parking import Wakeup

MOST_AT_ONCE = 64
"""Sockets that are served before other tasks have a turn; the kernel keeps the order of the rest."""

Pull = Callable[[], bool]
"""Takes what a socket has. False if the socket's own task must go on. Must not block."""


class Readable:
    """One socket that a task waits for.

    Args:
        number: its descriptor. It must not be closed while somebody waits.
    """

    __slots__ = ("_failure", "_number", "_pull", "_waiters", "_wakeup")

    def __init__(self, number: int) -> None:
        self._number = number
        self._waiters = _waiters_of_this_run()
        self._wakeup = Wakeup()
        self._pull: Pull | None = None
        self._failure: Exception | None = None

    async def wait(self, pull: Pull) -> None:
        """Wait until the socket has something, or its end, that `pull` does not deal with.

        `pull` is called each time that there is something, by another task; what it raises is raised here. It may also
        not be called at all. If cancelled, nothing was missed.
        """
        if self._waiters is None:
            await trio.lowlevel.wait_readable(self._number)
            return
        self._pull = pull
        self._waiters.add(self._number, self)
        try:
            await self._wakeup.wait()
        except BaseException:
            self._pull = None
            self._waiters.remove(self._number)
            raise
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    async def wait_broken(self) -> None:
        """After its end was read: wait until the connection has failed, or for `release`.

        Returns at once where there is no epoll. If cancelled, nothing was missed.
        """
        if self._waiters is not None:
            self._waiters.add(self._number, self, 0)  # an error is always told
            try:
                await self._wakeup.wait()
            finally:
                self._waiters.remove(self._number)

    def release(self) -> None:
        """End `wait_broken`. Nothing happens if nobody waits there."""
        self._wakeup.wake()

    def has_something(self) -> bool:
        """Have it taken. False if the task goes on, and does not wait any more."""
        try:
            if self._wakeup.waiting and self._pull is not None and self._pull():
                return True
        except Exception as exc:  # noqa: BLE001 - it belongs to the task that waits, and must not end this one
            self._failure = exc
        self._pull = None
        self._wakeup.wake()
        return False


class _Waiters:
    """All that wait in one run of trio."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._waiting: dict[int, Readable] = {}

    def add(self, number: int, waiter: Readable, events: int = select.EPOLLIN) -> None:
        self._epoll.register(number, events)
        self._waiting[number] = waiter

    def remove(self, number: int) -> None:
        """Harmless to repeat: who was cancelled may also have been served before it could run."""
        if self._waiting.pop(number, None) is not None:
            self._epoll.unregister(number)

    async def run(self) -> None:
        epoll, waiting = self._epoll, self._waiting
        with epoll:
            while True:
                await trio.lowlevel.wait_readable(epoll.fileno())
                for number, _ in epoll.poll(0, MOST_AT_ONCE):
                    waiter = waiting.get(number)
                    if waiter is not None and not waiter.has_something():
                        self.remove(number)


_OF_RUN: trio.lowlevel.RunVar[_Waiters] = trio.lowlevel.RunVar("libmesh sockets")


def _waiters_of_this_run() -> _Waiters | None:
    if not hasattr(select, "epoll"):
        return None
    try:
        return _OF_RUN.get()
    except LookupError:
        waiters = _Waiters()
        _OF_RUN.set(waiters)
        trio.lowlevel.spawn_system_task(waiters.run)
        return waiters
