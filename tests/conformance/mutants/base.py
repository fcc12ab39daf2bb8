"""What a mutant is: our own peer with one mistake, which names the rule that must find it.

It is a function that breaks something, before the peer is opened, by pytest's `monkeypatch`. The suite runs in the same
process; it shares the transport with the peer and nothing else, so that it does not make the same mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from libmesh import Libp2pConfig
from libmesh.core.membership import Membership
from libmesh.net.libp2p import Libp2pNetwork
from tests.conformance.peer import LISTEN

Patch = pytest.MonkeyPatch


class PeerNetwork(Libp2pNetwork):
    """Stands for the peer's network, so that the suite's own is left whole."""


@dataclass(frozen=True)
class Mutant:
    """A mistake, the rule that must find it, and part of what the rule must say. Slow: it takes over a second.

    The patience is in seconds, and enough for a peer on this machine.
    """

    rule: str
    says: str
    make: Callable[[Patch], None]
    listen: Libp2pConfig = LISTEN
    slow: bool = False
    patience: float = 1.5


MUTANTS: dict[str, Mutant] = {}

Make = Callable[[Patch], None]


def mutant(rule: str, says: str, **settings: Any) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        assert make.__name__ not in MUTANTS
        MUTANTS[make.__name__] = Mutant(rule, says, make, **settings)
        return make

    return register


def ignore(patch: Patch, kind: type) -> None:
    """Let every membership machine be deaf to this kind of event."""
    handle = Membership.handle
    patch.setattr(
        Membership,
        "handle",
        lambda self, event, now: [] if isinstance(event, kind) else handle(self, event, now),
    )
