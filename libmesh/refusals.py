"""Who refused whom at the door, so that it is neither logged nor tried again and again."""

from __future__ import annotations

import logging

from libmesh.errors import AdmissionRefused
from libmesh.peers import PeerId

log = logging.getLogger(__name__)

MAX_REFUSED = 256
"""Peers of whom it is remembered; with more, all are forgotten: they are logged once more, or asked once more."""

REST = 300.0
"""Seconds for which nobody is asked again who has told this node that it is revoked. That is for ever, but told by one peer
only, which may be a liar; and the others are asked meanwhile."""


class Refusals:
    """Those whom this node has refused, and those who have told it that it is revoked."""

    def __init__(self) -> None:
        self._told: dict[PeerId, str] = {}
        self._refusing: dict[PeerId, tuple[AdmissionRefused, float]] = {}

    def refused(self, peer: PeerId, why: str) -> None:
        """This node refused `peer`. Logged once: whoever does not know better comes again every few seconds, for ever."""
        log.log(logging.DEBUG if self._told.get(peer) == why else logging.INFO, "%s", why)
        if len(self._told) >= MAX_REFUSED:
            self._told.clear()
        self._told[peer] = why

    def refused_by(self, peer: PeerId, refusal: AdmissionRefused, now: float) -> None:
        """`peer` refused this node."""
        if refusal.reason != "revoked":
            return
        if len(self._refusing) >= MAX_REFUSED:
            self._refusing.clear()
        self._refusing[peer] = refusal, now + REST

    def check(self, peer: PeerId, now: float) -> None:
        """Raise what `peer` said, if it is not yet time to ask it again."""
        refusal, until = self._refusing.get(peer, (None, now))
        if refusal is not None and now < until:
            raise AdmissionRefused(str(refusal), reason=refusal.reason, peer=peer)

    def admitted(self, peer: PeerId) -> None:
        """`peer` and this node are members to each other, or it has another credential now."""
        self._told.pop(peer, None)
        self._refusing.pop(peer, None)

    def ask_again(self) -> None:
        """This node has another credential, or is told to try."""
        self._refusing.clear()
