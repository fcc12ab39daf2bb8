"""A console that answers as it is told, over real HTTP: what the commands meet before a real node is wired to them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass
class FakeConsole:
    """`answers` maps `"METHOD /path"` to (status, body); a `bytes` body is sent as it is. `requests` is what came."""

    port: int = 0
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    requests: list[tuple[str, Any]] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    on_request: Callable[[str], None] = lambda request: None


@contextmanager
def running_console(console: FakeConsole) -> Iterator[FakeConsole]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            request = f"{self.command} {self.path}"
            console.requests.append((request, body))
            if request == "GET /api/events" and console.events:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                for event in console.events:
                    self.wfile.write(
                        event if isinstance(event, bytes) else f"data: {json.dumps(event)}\n\n".encode()
                    )
                self.close_connection = True
                return
            status, answer = console.answers.get(
                request, (404, {"ok": False, "error": "nothing here", "code": "none"})
            )
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            console.on_request(request)

        do_GET = do_POST = handle_any

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    console.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield console
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def console() -> Iterator[FakeConsole]:
    with running_console(FakeConsole()) as running:
        yield running
