"""Where a node's log lines go: calm lines for a person on stderr, everything in a bounded file.

Three renderings of the same records:

- stderr, for people: `21:04:07  message`; a warning says so. Tracebacks only with `--verbose`.
- stderr, with `--json-logs`: one JSON object a line, `{"time", "level", "logger", "message"}`, for a request
  its facts one by one (`http/api.py`), and, where there was one, `"exception"`. `time` is in seconds since the epoch.
- the file, if there is one: date, level, logger, message, traceback.

In the first and the last, control characters in the arguments of a message become U+FFFD: much of what is logged was
said by peers.

A record logged with `extra={"private": True}` (an invite token, say) is shown on stderr and kept out of the file.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any, TextIO

from libmesh_node.terminal import harmless

OURS = ("libmesh", "libmesh_node")

LOG_FILE_BYTES = 5_000_000
LOG_FILES_KEPT = 3
"""The log never takes more than `LOG_FILE_BYTES * (LOG_FILES_KEPT + 1)` bytes; when full, the oldest file goes."""


FLOOD_PAUSE = 10.0
"""Seconds for which a complaint of asyncio's is not repeated. Out of file descriptors it has thousands a second, which
would drive everything else out of the log."""

_UNSHOWN = {"_srcfile": None, "logThreads": False, "logProcesses": False, "logMultiprocessing": False}
"""Settings of `logging` without which it finds out, for each record, what none of our renderings shows: a third of the
calls that a line takes (Python's Logging HOWTO, "Optimization")."""


class _Seldom(logging.Filter):
    """Passes each message once in `FLOOD_PAUSE`, by its first line. Remembers 64, then begins anew."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        what = record.getMessage().partition("\n")[0]
        if record.created - self._last.get(what, float("-inf")) < FLOOD_PAUSE:
            return False
        if len(self._last) >= 64:
            self._last.clear()
        self._last[what] = record.created
        return True


@contextmanager
def logging_to(
    *, stream: TextIO = sys.stderr, file: Path | None = None, json_logs: bool = False, verbose: bool = False
) -> Iterator[None]:
    """Set up logging for the process while inside; then close the file and put the loggers back as they were.

    Our own loggers speak from INFO, with `verbose` from DEBUG; all others from WARNING, with `verbose` from INFO; libp2p's
    only with `verbose`.
    Enter it after libp2p has been imported: importing that takes its logger out of the tree. Raises `OSError` if the
    file cannot be opened.
    """
    handlers = [_stream_handler(stream, json_logs=json_logs, verbose=verbose)]
    if file is not None:
        handlers.append(_file_handler(file, handlers[0]))
    levels = {"": logging.INFO if verbose else logging.WARNING}
    levels |= dict.fromkeys(OURS, logging.DEBUG if verbose else logging.INFO)
    loggers = {name: logging.getLogger(name) for name in levels}
    before = {name: logger.level for name, logger in loggers.items()}
    libp2p = logging.getLogger("libp2p")
    libp2p_before = (libp2p.level, libp2p.propagate)
    libp2p.propagate = True
    # Each connection that ends early is an error to it, with several lines; what matters of that, we say ourselves.
    libp2p.setLevel(logging.NOTSET if verbose else logging.CRITICAL)
    root = loggers[""]
    for name, logger in loggers.items():
        logger.setLevel(levels[name])
    for handler in handlers:
        root.addHandler(handler)
    seldom = _Seldom()
    logging.getLogger("asyncio").addFilter(seldom)
    facts = {name: getattr(logging, name) for name in _UNSHOWN}
    for name, off in _UNSHOWN.items():
        setattr(logging, name, off)
    try:
        yield
    finally:
        for name, fact in facts.items():
            setattr(logging, name, fact)
        logging.getLogger("asyncio").removeFilter(seldom)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        for name, logger in loggers.items():
            logger.setLevel(before[name])
        libp2p.level, libp2p.propagate = libp2p_before
        libp2p.setLevel(libp2p_before[0])


def _stream_handler(stream: TextIO, *, json_logs: bool, verbose: bool) -> logging.Handler:
    if json_logs:
        handler: logging.Handler = logging.StreamHandler(stream)
        handler.setFormatter(JsonFormatter())
    elif stream.isatty():
        handler = _TerminalHandler(stream)
        handler.setFormatter(CalmFormatter(tracebacks=verbose))
    else:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(CalmFormatter(tracebacks=verbose))
    return handler


def _file_handler(file: Path, beside: logging.Handler) -> logging.Handler:
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handler = _PrivateRotatingFileHandler(
        file, maxBytes=LOG_FILE_BYTES, backupCount=LOG_FILES_KEPT, encoding="utf-8", errors="backslashreplace"
    )
    handler.beside = beside
    handler.setFormatter(_FileFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    handler.addFilter(lambda record: not getattr(record, "private", False))
    return handler


class CalmFormatter(logging.Formatter):
    """`21:04:07  message`, with the level in front of the message where it is WARNING or worse."""

    def __init__(self, *, tracebacks: bool) -> None:
        super().__init__("%(message)s")
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        """One line for a calm record; the traceback below it only if asked for."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))}  {level}{_message(record)}"
        if not record.exc_info:
            return text
        if self._tracebacks:
            return f"{text}\n{self.formatException(record.exc_info)}"
        error = record.exc_info[1]
        return f"{text} ({harmless(f'{type(error).__name__}: {error}')})"


def _message(record: logging.LogRecord) -> str:
    """The message with harmless arguments, made once for all handlers. Line breaks in the format are ours, and stay."""
    said: str | None = getattr(record, "harmless", None)
    if said is None:
        said = record.__dict__["harmless"] = _made_harmless(record)
    return said


def _made_harmless(record: logging.LogRecord) -> str:
    if not isinstance(record.args, tuple) or not record.args:
        return record.getMessage()
    args = (arg if isinstance(arg, (int, float)) else harmless(str(arg)) for arg in record.args)
    return str(record.msg) % tuple(args)


class _FileFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _message(record)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object, ASCII only, without a line break."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's time, level, logger and message, what else its `fields` name and, if any, its exception."""
        fields: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class _TerminalHandler(logging.Handler):
    """Writes with rich, which copes with narrow terminals, `NO_COLOR` and Windows; never wraps, so tokens copy."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__()
        from rich.console import Console

        self._console = Console(file=stream, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def emit(self, record: logging.LogRecord) -> None:
        from rich.text import Text

        try:
            text = Text(self.format(record))
            text.stylize("dim", 0, 8)
            if record.levelno >= logging.WARNING:
                text.stylize("red" if record.levelno >= logging.ERROR else "yellow", 8)
            self._console.print(text)
        except (OSError, ValueError, UnicodeError):  # the terminal went away, or cannot show it
            self.handleError(record)


class _PrivateRotatingFileHandler(RotatingFileHandler):
    """Each file is readable by its owner only, from its first byte on.

    There is a line for each request, so it is made once and not, as by `logging`'s own, once more to see how long it is; nor is
    the file looked at each time. What cannot be written, as on a full disk, is left out; that is said once, by `beside`, until
    writing works again.
    """

    beside: logging.Handler
    _size = 0
    _failing = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, to a new file if it fits this one no more."""
        try:
            line = self.format(record) + self.terminator
            size = len(line.encode(errors="backslashreplace"))
            if self._size and self._size + size > self.maxBytes:
                self.doRollover()
            stream: IO[str] | None = self.stream
            if stream is None:  # closed by a rollover that failed
                self.stream = stream = self._open()  # type: ignore[assignment]
            stream.write(line)
            stream.flush()
            self._size += size
            self._failing = False
        except OSError as exc:
            if not self._failing:
                self._failing = True
                self._say("cannot write %s: %s; lines are left out until that works", exc)
        except Exception:  # noqa: BLE001 - as `logging` does: a log must not end the node
            self.handleError(record)

    def close(self) -> None:
        """Close the file; what could not be written is lost."""
        with suppress(OSError):
            super().close()

    def _say(self, message: str, error: OSError) -> None:
        args = (self.baseFilename, error.strerror or str(error))
        self.beside.handle(logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, args, None))

    def _open(self) -> IO[str]:  # type: ignore[override]
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(descriptor).st_size
        return open(descriptor, self.mode, encoding=self.encoding, errors=self.errors)
