"""What the program raises for a person to read; `main` prints the text on one line and ends with `exit_code`.

NodeError              the command failed (exit 1)
├── UsageError         the command line makes no sense (exit 2)
├── DataDirBusy        another node holds the data folder; `.pid` is its process, if it said so
├── NodeNotRunning     there is no node to talk to
└── NodeRefused        a running node said no; `.code` is its word for why, `.status` the HTTP status
"""

from __future__ import annotations


class NodeError(Exception):
    """Base of the program's own errors. The text says what happened and what to do about it."""

    exit_code = 1


class UsageError(NodeError):
    """The command line cannot be carried out as it was typed."""

    exit_code = 2


class DataDirBusy(NodeError):
    """A data folder is in use by another node. `.pid` is that node's process id, `None` if unreadable."""

    def __init__(self, message: str, *, pid: int | None) -> None:
        super().__init__(message)
        self.pid = pid


class NodeNotRunning(NodeError):
    """No node answers where one was expected."""


class NodeRefused(NodeError):
    """A running node answered a command with a refusal."""

    def __init__(self, message: str, *, code: str, status: int) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


def sentence(text: str) -> str:
    """`text`, as an exception has it, as a sentence for a person."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def words(error: Exception) -> str:
    """What went wrong, for a person: the operating system's errors without number and quotation marks."""
    if not isinstance(error, OSError):
        return str(error)
    return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
