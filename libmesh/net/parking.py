"""A place where one task waits to be woken, without an event object for each wait."""

from __future__ import annotations

import trio


class Wakeup:
    """One task at a time may `wait`; `wake` lets it go on. A wake that nobody waits for is lost.

    So the waiter looks at the state it waits for, finds it wanting, and waits, with no await between. This is the
    cheapest wait that trio has: a stream that receives a message costs two calls, where an event costs an allocation
    and a set of tasks.
    """

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None

    @property
    def waiting(self) -> bool:
        """Whether a task waits here."""
        return self._task is not None

    async def wait(self) -> None:
        """Wait for `wake`. If cancelled, nothing was missed."""
        self._task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def wake(self) -> None:
        """Let the waiting task go on, if there is one."""
        task = self._task
        if task is not None:
            self._task = None
            trio.lowlevel.reschedule(task)
