"""`MeshConfig`: all times and limits of a mesh, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field

from libmesh.admission import AdmissionConfig
from libmesh.core.liveness import LivenessConfig
from libmesh.core.membership_io import MembershipConfig
from libmesh.core.paths_io import PathsConfig
from libmesh.core.ranges import check_numbers
from libmesh.relays import RelayUse

_MAX_AGENT = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """How a mesh behaves. The defaults suit a handful to some dozens of peers on a LAN or a WAN.

    Attributes:
        agent: name and version of the application, shown to peers; at most 128 bytes.
        farewell: seconds given to our goodbye to get out before connections are closed; 0 to say none that is waited for.
        sync_interval: seconds between digest exchanges with a peer chosen at random, which repair what gossip lost.
        admission: times of hellos and of seeking the first peer.
        membership: times of the membership machine.
        liveness: times of probes.
        paths: times of the search for paths.
        relays: which relays are used, and whether this node is one.
        lan: find members on the LAN, and be found by them, by multicast DNS. What is told there names the mesh to those who
            know its id only.
        resume: seconds for which the TCP connections in tunnels outlive the connection to their peer, waiting for
            another one; 0 to let them end with it.
    """

    agent: str = "libmesh"
    farewell: float = 0.3
    sync_interval: float = 10.0
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    membership: MembershipConfig = field(default_factory=MembershipConfig)
    liveness: LivenessConfig = field(default_factory=LivenessConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    relays: RelayUse = field(default_factory=RelayUse)
    lan: bool = False
    resume: float = 15.0

    def __post_init__(self) -> None:
        """Raise `ValueError`, naming the field, when a value cannot work."""
        if not isinstance(self.agent, str) or len(self.agent.encode()) > _MAX_AGENT:
            raise ValueError(f"agent must be a text of at most {_MAX_AGENT} bytes, not {self.agent!r}")
        check_numbers(self, "sync_interval")
        check_numbers(self, "farewell", "resume", zero=True)
