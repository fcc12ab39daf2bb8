"""The conformance suite: the whole protocol of `mesh.proto`, held against a live peer of any implementation.

    libmesh conformance /ip4/192.0.2.1/tcp/4001/p2p/12D3KooW… --invite lm1…

The suite speaks the wire by itself: its messages, frames, chains and signatures are made here from the specification,
and only what libp2p specifies (Noise, yamux, gossipsub) is libmesh's own. It plays peers of its own making, which leave
at the end; all that it leaves in the mesh are two revocations, of peers that it made up (`lasting=False` for none).

For pytest::

    from libmesh.testing.conformance.cases import *  # noqa: F403

    @pytest.fixture
    def conformance_target() -> Target:
        return read_target(multiaddr, token)
"""

from libmesh.testing.conformance import (  # noqa: I001 - the order in which rules are checked
    handshake as handshake,
    hellos as hellos,
    strangers as strangers,
    exchanges as exchanges,
    comparing as comparing,
    gossiping as gossiping,
    probing as probing,
    tunnels as tunnels,
    resuming as resuming,
    limits as limits,
    revoking as revoking,
    survival as survival,
)
from libmesh.testing.conformance.bench import Target, read_target
from libmesh.testing.conformance.rules import RULES, Result, Rule, Verdict
from libmesh.testing.conformance.runner import Report, check_rule, chosen, run_conformance

__all__ = [
    "RULES",
    "Report",
    "Result",
    "Rule",
    "Target",
    "Verdict",
    "check_rule",
    "chosen",
    "read_target",
    "run_conformance",
]
