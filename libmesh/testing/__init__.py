"""For tests of what is built on libmesh, and of networks and peers that others write.

    hub = MemoryHub()
    async with hub.open_network(seed) as network: ...     # a `libmesh.Network` without sockets
    await check_network(make_pair)                        # holds any `libmesh.Network` to the contract

The simulator of whole meshes is in `simulator`, the suite for peers of other implementations in `conformance`.
"""

from libmesh.testing.contract import RULES, check_network
from libmesh.testing.memory import MemoryHub

__all__ = ["RULES", "MemoryHub", "check_network"]
