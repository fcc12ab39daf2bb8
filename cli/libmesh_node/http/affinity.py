"""Where the beginning of a conversation is warm: llama-server keeps the keys and values of the prompts it saw. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

MAX_ENTRIES = 4096
"""Prefixes remembered. When full, those used longest ago are forgotten."""

LIFETIME = 1200.0
"""Seconds after which a prefix is taken to be cold: slots are few, and others have used them since."""


class Affinity:
    """Remembers which peer answered which prefix of which model."""

    def __init__(self) -> None:
        self._peers: OrderedDict[tuple[str, bytes], tuple[str, float]] = OrderedDict()

    def warm(self, model: str, prefixes: Sequence[bytes], session: str, now: float) -> str | None:
        """The peer that answered the longest of `prefixes`, or else this session, within `LIFETIME`."""
        for key in self._keys(model, prefixes, session):
            peer, when = self._peers.get(key, ("", 0.0))
            if peer and now - when <= LIFETIME:
                return peer
        return None

    def learn(self, model: str, prefixes: Sequence[bytes], session: str, peer: str, now: float) -> None:
        """`peer` has just answered a request with these prefixes. Only successes are to be learned."""
        for key in reversed(self._keys(model, prefixes[:1], session)):
            self._peers[key] = (peer, now)
            self._peers.move_to_end(key)
        while len(self._peers) > MAX_ENTRIES:
            self._peers.popitem(last=False)

    @staticmethod
    def _keys(model: str, prefixes: Sequence[bytes], session: str) -> list[tuple[str, bytes]]:
        return [(model, prefix) for prefix in prefixes] + (
            [(model, session.encode(errors="surrogatepass"))] if session else []
        )
