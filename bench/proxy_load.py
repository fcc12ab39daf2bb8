"""The load for `proxy.py` and `overload.py`: streamed chats over plain sockets, asked by one thread. No libmesh here.

It shares the machine with what it measures, so it must cost little: a fifth of what aiohttp's client takes. Also here: what
everybody else costs, in CPU time, which says nearly the same on a busy machine as on a quiet one.
"""

from __future__ import annotations

import json
import re
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import psutil

SILENCE = 60.0
"""Seconds without a byte for anybody after which the load gives up."""

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_LAST_CHUNK = b"0\r\n\r\n"
_DONE = b"data: [DONE]"
_END = 256  # bytes at the end of an answer in which `_DONE` must stand


@dataclass(slots=True)
class Tally:
    """What came of some requests.

    Attributes:
        statuses: how many got which; `broken` is an answer that ended early or had an error in it.
        first: seconds from each request that was answered to the first byte of its answer's body.
        ended: seconds from the beginning to when each of these was complete.
        seconds: how long it took in all.
    """

    statuses: Counter[object] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Load:
    """The same chat, asked of the server at `url` again and again; `key` goes along.

    Each stream has a connection of its own, as llama-server closes after one. Who is refused keeps it for the next.
    """

    def __init__(self, url: str, request: Mapping[str, Any], key: str = "") -> None:
        parts = urlsplit(url)
        self._where = parts.hostname or "", parts.port or 80
        body = json.dumps({**request, "stream": True}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: */*\r\n"
            f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._said = head.encode() + body
        self._under_way: dict[int, _Request] = {}
        self._idle: dict[int, socket.socket] = {}

    def lanes(self, count: int, *, requests: int | None = None, seconds: float = float("inf")) -> Tally:
        """With `count` under way at any time: so many `requests`, or for as many `seconds`."""
        until = time.perf_counter() + seconds
        asked = 0

        def due(now: float) -> int:
            nonlocal asked
            left = count if requests is None else requests - asked
            new = min(count - len(self._under_way), left) if now < until else 0
            asked += new
            return new

        return self._run(due, SILENCE)

    def rate(self, rate: float, seconds: float) -> Tally:
        """So many requests a second, whatever becomes of them; and wait for all."""
        began = time.perf_counter()
        asked = 0

        def due(now: float) -> int:
            nonlocal asked
            new = int(min(now - began, seconds) * rate) - asked
            asked += new
            return new

        return self._run(due, 0.005, began + seconds)

    def _run(self, due: Callable[[float], int], pause: float, until: float = 0.0) -> Tally:
        """Ask for as many more as are `due` at a time, until `until` and until none is under way."""
        tally, began = Tally(), time.perf_counter()
        with select.epoll() as poll:
            try:
                while True:
                    now = time.perf_counter()
                    for _ in range(due(now)):
                        self._ask(poll)
                    if not self._under_way and now >= until:
                        tally.seconds = now - began
                        return tally
                    found = poll.poll(pause if now < until else SILENCE)
                    if not found and now >= until:
                        raise TimeoutError(f"nothing came for {SILENCE:g} s")
                    for number, _ in found:
                        self._hear(number, tally, began)
            finally:
                for sock in [*self._idle.values(), *(one.sock for one in self._under_way.values())]:
                    sock.close()
                self._idle.clear()
                self._under_way.clear()

    def _ask(self, poll: select.epoll) -> None:
        if self._idle:
            number, sock = self._idle.popitem()
        else:
            sock = socket.create_connection(self._where, timeout=SILENCE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number = sock.fileno()
            poll.register(number, select.EPOLLIN)
        self._under_way[number] = _Request(sock)
        sock.sendall(self._said)

    def _hear(self, number: int, tally: Tally, began: float) -> None:
        if number in self._idle:  # it was closed
            self._idle.pop(number).close()
            return
        request = self._under_way[number]
        try:
            data = request.sock.recv(1 << 16)
        except OSError:
            data = b""
        if data and not request.feed(data):
            return
        del self._under_way[number]
        if request.is_whole:
            tally.first.append(request.first - request.asked)
            tally.ended.append(time.perf_counter() - began)
        refused = bool(data) and request.status != 200
        tally.statuses[request.status if refused or request.is_whole else "broken"] += 1
        if refused:
            self._idle[number] = request.sock
        else:
            request.sock.close()


class _Request:
    """One on its way."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.asked = time.perf_counter()
        self.first = 0.0
        self.status = 0
        self._head = self._end = b""
        self._left: int | None = None
        self._failed = False

    def feed(self, data: bytes) -> bool:
        """More came; whether that was all."""
        if not self.status:
            self._head, blank, data = (self._head + data).partition(b"\r\n\r\n")
            if not blank:
                return False
            status, length = _STATUS.match(self._head), _LENGTH.search(self._head)
            self.status = int(status[1]) if status else -1
            self._left = int(length[1]) if length else None
        if data and not self.first:
            self.first = time.perf_counter()
        if self._left is not None:
            self._left -= len(data)
            return self._left <= 0
        self._failed = self._failed or b'data: {"error"' in data
        self._end = (self._end + data)[-_END:]
        return self._end.endswith(_LAST_CHUNK)

    @property
    def is_whole(self) -> bool:
        """Whether it is an answer, complete, and without an error in it."""
        return (
            self.status == 200 and not self._failed and _DONE in self._end and self._end.endswith(_LAST_CHUNK)
        )


# ── what the others cost ─────────────────────────────────────────────────────────────────────────────────────────────


def serving(url: str) -> psutil.Process:
    """The process that listens at `url`: of several that share the port, the parent."""
    port = urlsplit(url).port
    found = [
        psutil.Process(one.pid)
        for one in psutil.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid is not None
    ]
    return min(found, key=lambda process: process.create_time())


def cpu_seconds(process: psutil.Process, *, family: bool) -> float:
    """What a process has used so far, with its children if `family`."""
    members = [process, *(process.children(recursive=True) if family else ())]
    times = [member.cpu_times() for member in members]
    return sum(time.user + time.system for time in times)
