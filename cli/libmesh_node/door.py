"""The way in to a llama-server of this node for the rest of the mesh: nodes take turns at it.

Each request comes by here, and holds a place until it is answered; a stream carries one after the other (`http_framing.py`).
While nothing is asked on it a stream holds no place, so some can be kept in stock (`http/connections.py`). Who asks what
nobody can tell the end of holds a place of its own share with it, and of nobody else's. This node's own requests do not
come by here; there are never more of them at the server than its slots and a few.
"""

from __future__ import annotations

import logging
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial

import h11
import trio

from libmesh import PeerId, ServiceRefused
from libmesh_node.http.errors import ApiError, encode_error
from libmesh_node.turns import LineFull, Turns

log = logging.getLogger(__name__)

SPARE = 2
"""Requests that the server is given beyond its slots, so that none of them is ever idle. Further ones wait here."""

PER_SLOT = 8
"""Requests of one node that may wait for each slot. Further ones are answered with 429."""

REFUSAL_LIMIT = 10.0
"""Seconds that a refused request may take to end; then it is cut off."""


MAX_REFUSALS = 64
"""Requests that are refused with words at a time; the streams of further ones are refused without."""


class Door:
    """Lets requests to a server with `slots` slots through (`libmesh.Door`); those of a node with too many get 429.

    `run` must run meanwhile. Cancelling a request that waits, or the end of one, hands its place on.
    """

    def __init__(self, name: str, slots: int) -> None:
        self._name = name
        self.turns: Turns[trio.Event] = Turns(slots + SPARE, PER_SLOT * slots)
        self._refusals: tuple[str, int] | None = None
        self._wait = 1  # seconds that the refused are told
        self._refusing = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer those who are refused, until cancelled. Raises `OSError` if there is no port for that."""
        serve = partial(trio.serve_tcp, self._refuse, 0, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            listeners: list[trio.SocketListener] = await nursery.start(serve)
            self._refusals = listeners[0].socket.getsockname()[:2]
            task_status.started()

    def __call__(self, peer: PeerId) -> AbstractAsyncContextManager[tuple[str, int] | None]:
        """Wait for a turn of `peer`, and hold it until the end of the block."""
        return _Place(self, peer)

    def refusing(self, peer: PeerId, full: LineFull) -> tuple[str, int]:
        """Where a request of `peer` is refused with words. Raises `ServiceRefused`; else to be followed by `refused`."""
        log.debug("the peer %s asks %s for too much: %s", peer, self._name, full)
        if self._refusals is None or self._refusing >= MAX_REFUSALS:
            raise ServiceRefused(f"too many requests for {self._name}", reason="busy")
        self._wait = full.wait
        self._refusing += 1
        return self._refusals

    def refused(self) -> None:
        """One that was refused has ended."""
        self._refusing -= 1

    async def _refuse(self, stream: trio.SocketStream) -> None:
        """Answer one request with 429, and take the rest of it, so that its sender reads the answer before the end."""
        connection = h11.Connection(h11.SERVER)
        with trio.move_on_after(REFUSAL_LIMIT), suppress(h11.ProtocolError, trio.BrokenResourceError):
            while not isinstance(event := connection.next_event(), h11.Request):
                if event is not h11.NEED_DATA:
                    return
                connection.receive_data(await stream.receive_some())
            await stream.send_all(self._refusal(connection, event))
            await stream.send_eof()
            while await stream.receive_some():
                pass

    def _refusal(self, connection: h11.Connection, request: h11.Request) -> bytes:
        message = (
            f"The server of `{self._name}` has as many requests of your node waiting as it takes; "
            f"by the present rate there is room in about {self._wait} s."
        )
        body = encode_error(ApiError(429, "overloaded", message), request.target.decode("latin-1"))
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Retry-After", str(self._wait)),
            ("Connection", "close"),
        ]
        pieces = (
            connection.send(h11.Response(status_code=429, reason=b"Too Many Requests", headers=headers)),
            connection.send(h11.Data(b"" if request.method == b"HEAD" else body)),
            connection.send(h11.EndOfMessage()),
        )
        return b"".join(piece or b"" for piece in pieces)


class _Place:
    """What one request enters. No generator: it is on the way of each request, to which that adds a dozen calls."""

    def __init__(self, door: Door, peer: PeerId) -> None:
        self._door, self._peer = door, peer
        self._began: float | None = None  # a place is held since then; without one, it was refused

    async def __aenter__(self) -> tuple[str, int] | None:
        turns, peer, ticket = self._door.turns, self._peer, trio.Event()
        try:
            admitted = turns.ask(peer, ticket)
        except LineFull as full:
            return self._door.refusing(peer, full)
        _wake(admitted)
        if not ticket.is_set():  # whose turn it is already does not lose one of the scheduler's
            try:
                await ticket.wait()
            except BaseException:
                _wake(turns.done(peer) if ticket.is_set() else turns.leave(peer, ticket))
                raise
        self._began = trio.current_time()
        return None

    async def __aexit__(self, *_: object) -> None:
        if self._began is None:
            self._door.refused()
        else:
            _wake(self._door.turns.done(self._peer, trio.current_time() - self._began))


def _wake(tickets: list[trio.Event]) -> None:
    for ticket in tickets:
        ticket.set()
