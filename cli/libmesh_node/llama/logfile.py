"""A log file that cannot fill the disk."""

from __future__ import annotations

from collections import deque
from io import FileIO
from pathlib import Path

DEFAULT_LIMIT = 4 << 20


class BoundedLog:
    """Lines appended to `path`. When it is full, it becomes `path.1`, replacing the one before, and a new one begins.

    So at most twice `limit` bytes of disk. Keeps the last lines in memory too, for reasons of failures. A disk that
    cannot be written to loses lines, never the program: `.lost` counts them. So does a file that cannot be opened; each
    further line tries again.
    """

    def __init__(self, path: Path, *, limit: int = DEFAULT_LIMIT, tail: int = 20) -> None:
        self.path = path
        self.lost = 0
        self._limit = limit
        self._tail: deque[str] = deque(maxlen=tail)
        self._file: FileIO | None = None
        self._closed = False

    @property
    def tail(self) -> tuple[str, ...]:
        """The last lines since the last `mark`."""
        return tuple(self._tail)

    def mark(self, line: str) -> None:
        """Write a line of our own, and begin a new tail."""
        self.write(line)
        self._tail.clear()

    def write(self, line: str) -> None:
        """Append one line."""
        self._tail.append(line)
        try:
            file = self._open()
            if file.tell() >= self._limit:
                file = self._rotate()
            file.write(line.encode(errors="replace") + b"\n")
        except (OSError, ValueError):  # a full disk, too many open files, or closed
            self.lost += 1

    def _open(self) -> FileIO:
        if self._closed:
            raise ValueError("the log is closed")
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        return self._file

    def _rotate(self) -> FileIO:
        self._shut()
        self.path.replace(self.path.with_name(self.path.name + ".1"))
        return self._open()

    def _shut(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Close the file; further lines are lost."""
        self._shut()
        self._closed = True
