"""Who is let through to an exposed service, and when."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from libmesh.peers import PeerId

Door = Callable[[PeerId], AbstractAsyncContextManager[tuple[str, int] | None]]
"""Entered for each stream to an exposed service, or for each exchange on it (`Framing`), once its first bytes have come, with
the peer that opened it, and left when both directions have ended, or the exchange has. So it is for services that say nothing
before they are asked, and a stream that was opened before it is needed holds no place. A stream without a framing is accepted
after that: whoever opens one must not wait for the answer before it says anything (`Mesh.open_service` with `wait=False`, as
tunnels do), or it is reset after `IDLE_LIMIT`.

It may wait, so that peers take turns, and is cancelled if the stream is lost meanwhile. It yields the host and port to connect
to, or `None` for those that are exposed. Raises `ServiceRefused` to turn the stream away."""

IDLE_LIMIT = 120.0
"""Seconds that a stream to a service with a door, or with a framing, may say nothing; then it is reset. Openers keep some in
stock."""
