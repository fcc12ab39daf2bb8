"""Runs a llama.cpp program once to learn what it is, and remembers the answer.

The RPC protocol has no command-line switch: the one way to learn it is to start the server and say HELLO. Its exit
status cannot be trusted (0 for a port that is taken), so only an answered HELLO counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

Facts = dict[str, object]
"""What one examination found; JSON."""

_RUN_LIMIT = 20.0
"""Seconds that a binary has to answer. Builds for GPUs initialise their devices first, which can take several."""

_STORE_LIMIT = 64
"""Binaries remembered. When full, the ones asked for longest ago are forgotten, and run again when needed."""

_HELLO = 14
_FLAG = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")


class Unusable(Exception):
    """The file does not do what its name says. The text is the reason, without a full stop."""


class ProbeStore:
    """Facts by path, size and time of change, kept in a JSON file. An unreadable file counts as empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries = _read(path)
        self._changed = False

    def get(self, binary: Path, examine: Callable[[Path], Facts], beside: Path | None = None) -> Facts:
        """The facts of `binary`, by `examine` if they are not known.

        `beside` is a second file that the answer depends on. Raises `Unusable` as `examine` does; that is not
        remembered, as the reason may lie outside the file.
        """
        key = " + ".join(_stamp(path) for path in (binary, beside) if path is not None)
        facts = self._entries.pop(key, None)
        if facts is None:
            facts = examine(binary)
            self._changed = True
        self._entries[key] = facts  # last is newest
        return facts

    def save(self) -> None:
        """Write what changed. A folder that cannot be written to only costs the next run its time."""
        if not self._changed:
            return
        kept = dict(list(self._entries.items())[-_STORE_LIMIT:])
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump(kept, file)
            os.replace(file.name, self._path)
        self._changed = False


def examine_llama_server(path: Path) -> Facts:
    """Version and options of a llama-server. Raises `Unusable`."""
    found = re.search(r"^version: *(.+)$", _run(path, "--version"), re.MULTILINE)
    if found is None:
        raise Unusable("it does not tell its version, so it is not llama.cpp's llama-server")
    lines = (line for line in _run(path, "--help").splitlines() if line.startswith("-"))
    return {
        "version": found[1].strip(),
        "flags": sorted({flag for line in lines for flag in _FLAG.findall(line)}),
    }


def examine_rpc_server(path: Path) -> Facts:
    """Protocol and options of an rpc-server, by starting it on a free loopback port. Raises `Unusable`."""
    flags = sorted(set(_FLAG.findall(_run(path, "--help"))))
    with _running_rpc_server(path) as port:
        return {"rpc_protocol": _ask(port), "flags": flags}


def examine_pair(llama_server: Path, rpc_server: Path) -> Facts:
    """Whether `llama_server` accepts `rpc_server`: `{"agree": bool, "reason": str}`. Raises nothing."""
    try:
        with _running_rpc_server(rpc_server) as port:
            _ask(port)
            listing = _run(llama_server, "--rpc", f"127.0.0.1:{port}", "--list-devices")
    except Unusable as exc:
        return {"agree": False, "reason": str(exc)}
    if f"RPC0[127.0.0.1:{port}]" in listing or re.search(r"^ *RPC0\b", listing, re.MULTILINE):
        return {"agree": True, "reason": ""}
    return {"agree": False, "reason": "llama-server does not list the rpc-server's device"}


def list_devices(llama_server: Path) -> tuple[str, ...]:
    """The devices besides the CPU that this build can compute on, as it describes them; e.g. `CUDA0: NVIDIA …`.

    Asked anew each time, as devices come and go. Blocks, up to seconds with GPUs. Raises `Unusable`.
    """
    _, _, listing = _run(llama_server, "--list-devices").partition("Available devices:")
    lines = (line.strip() for line in listing.splitlines())
    return tuple(line for line in lines if re.match(r"\w+: ", line))


def rpc_hello(host: str, port: int, timeout: float) -> str:
    """Ask an rpc-server for its protocol. Returns `major.minor.patch`.

    Occupies the server's only place for a moment. Raises `OSError` if no HELLO comes back within `timeout` seconds.

    Layout: ggml-rpc.cpp, `rpc_msg_hello_req` and `_rsp`. The request carries 24 bytes of connection capabilities, here
    all zero; servers of older protocols take no payload, and hang up on one.
    """
    try:
        return _say_hello(host, port, timeout, bytes(24))
    except ConnectionError:
        return _say_hello(host, port, timeout, b"")


def _say_hello(host: str, port: int, timeout: float, payload: bytes) -> str:
    with socket.create_connection((host, port), timeout) as connection:
        connection.sendall(struct.pack("<BQ", _HELLO, len(payload)) + payload)
        (size,) = struct.unpack("<Q", _receive(connection, 8))
        if not 3 <= size <= 256:
            raise OSError(f"an answer of {size} bytes is no HELLO")
        answer = _receive(connection, size)
        return f"{answer[0]}.{answer[1]}.{answer[2]}"


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionResetError("it closed the connection")
        data += part
    return data


@contextlib.contextmanager
def _running_rpc_server(path: Path) -> Iterator[int]:
    """Start `path` on a free port; yields the port once something listens there. Killed on leaving."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    with (
        tempfile.TemporaryFile() as output,
        _start(path, "-H", "127.0.0.1", "-p", str(port), output=output.fileno()) as process,
    ):
        try:
            deadline = time.monotonic() + _RUN_LIMIT
            while not _listens(port):
                if process.poll() is not None:
                    output.seek(0)
                    raise Unusable(_reason(process.returncode, output.read(65536).decode(errors="replace")))
                if time.monotonic() > deadline:
                    raise Unusable(f"it did not listen within {_RUN_LIMIT:.0f} s")
                time.sleep(0.02)
            yield port
        finally:
            process.kill()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _ask(port: int) -> str:
    try:
        return rpc_hello("127.0.0.1", port, _RUN_LIMIT)
    except OSError as exc:
        raise Unusable(f"it does not speak llama.cpp's RPC protocol: {exc}") from exc


def _run(path: Path, *arguments: str) -> str:
    """Standard output and error of one run. Raises `Unusable` unless it ends well in time."""
    with tempfile.TemporaryFile() as output, _start(path, *arguments, output=output.fileno()) as process:
        try:
            process.wait(_RUN_LIMIT)
        except subprocess.TimeoutExpired as exc:
            raise Unusable(f"`{' '.join(arguments)}` took longer than {_RUN_LIMIT:.0f} s") from exc
        finally:
            process.kill()
        output.seek(0)
        text = output.read(1 << 20).decode(errors="replace")
    if process.returncode != 0:
        raise Unusable(_reason(process.returncode, text))
    return text


def _start(path: Path, *arguments: str, output: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    try:
        return subprocess.Popen(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    except OSError as exc:
        raise Unusable(f"it cannot be run: {exc.strerror}") from exc


def _reason(status: int, text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = f': "{lines[-1][:200]}"' if lines else " without a word"
    ended = f"it ended by {signal.Signals(-status).name}" if status < 0 else f"it ended with status {status}"
    return ended + said


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def _read(path: Path) -> dict[str, Facts]:
    try:
        with path.open() as file:
            entries = json.loads(file.read(4 << 20))
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {key: facts for key, facts in entries.items() if isinstance(facts, dict)}
