"""Many alarms, the next of which is cheap to know: a heap from which what was changed is dropped when it comes up."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

K = TypeVar("K", bound=str)

INFINITY = float("inf")


class Timers(Generic[K]):
    """One alarm per key. Setting costs O(log n), asking for the next one O(1) on average.

    A changed alarm leaves its old place in the heap until that comes up, or until the heap holds twice as many places
    as there are alarms (and then some), when it is built anew.
    """

    def __init__(self) -> None:
        self._times: dict[K, float] = {}
        self._heap: list[tuple[float, K]] = []

    def set(self, key: K, time: float) -> None:
        """Ring for `key` at `time` instead of whenever it was set to; never, if that is infinite."""
        if time == self._times.get(key, INFINITY):
            return
        if time == INFINITY:
            del self._times[key]
            return
        self._times[key] = time
        heapq.heappush(self._heap, (time, key))
        if len(self._heap) > 2 * len(self._times) + 64:
            self._heap = [(time, key) for key, time in self._times.items()]
            heapq.heapify(self._heap)

    def next(self) -> float:
        """When the first one rings; infinite if none is set."""
        heap, times = self._heap, self._times
        while heap and times.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else INFINITY

    def pop_due(self, now: float) -> list[K]:
        """The keys that have rung, earliest first. They are not set any more."""
        due: list[K] = []
        while self.next() <= now:
            key = heapq.heappop(self._heap)[1]
            del self._times[key]
            due.append(key)
        return due
