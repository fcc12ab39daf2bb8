"""Whether a program still gets on. Health checks do not tell: llama-server answers them while its work stands still.

Three signs of life are enough, each alone: it answered a question that its main loop has to answer, it said something, it
used the processor. A program without any of them for long waits for something that does not come. Where the system does not
tell of the processor time of others, nothing is ever taken for stalled: to kill what works would be worse.
"""

from __future__ import annotations

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


class Progress:
    """Looks at signs of life. `limit`: seconds without any."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._signs: object = None
        self._since = 0.0

    def stalled(self, now: float, *signs: object) -> bool:
        """Whether nothing of `signs` has changed for longer than the limit."""
        if signs != self._signs:
            self._signs, self._since = signs, now
        return now - self._since > self._limit


def cpu_seconds(pid: int) -> float | None:
    """Processor time that a process has used, all threads together; `None` if the system does not tell.

    proc(5), /proc/pid/stat: fields 14 and 15, counted behind the name, which may contain anything.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS
    except (OSError, ValueError, IndexError):
        return None
