"""An answer with reasoning, given once more by another server from its beginning: what of it the client has not. Pure.

As with `replay.py`, that is right where the request leaves nothing to chance. Here the text is compared, and not the events.
"""

from __future__ import annotations

from typing import Any


class Diverged(Exception):
    """What the next server generates is not what the client was sent already."""


class Retelling:
    """Takes from an answer what the client has: first its reasoning, and then its text."""

    def __init__(self, thought: str, text: str) -> None:
        self._left = {"reasoning_content": thought, "content": text}

    def trim(self, delta: dict[str, Any]) -> bool:
        """Take from `delta` what the client has; whether anything is left. Raises `Diverged`, and `TypeError`."""
        delta.pop("role", None)
        for key in self._left:
            said = (delta.pop(key, None) or "") + ""
            left = self._left[key]
            known = min(len(said), len(left))
            if said[:known] != left[:known] or (
                said and key == "content" and self._left["reasoning_content"]
            ):
                raise Diverged("another server thought otherwise")
            self._left[key] = left[known:]
            if said[known:]:
                if key == "reasoning_content" and self._left["content"]:
                    raise Diverged("another server thought longer")
                delta[key] = said[known:]
        return bool(delta)

    def end(self) -> None:
        """The answer ends. Raises `Diverged` if the client has more of it."""
        if any(self._left.values()):
            raise Diverged("another server said less")
