"""libmesh: authenticated peer-to-peer meshes on py-libp2p and trio.

    import libmesh, trio

    async def main():
        async with libmesh.open_mesh(libmesh.SecretKey.generate(), mesh_key=libmesh.SecretKey.generate()) as mesh:
            print(mesh.invite(scope=libmesh.Scope.CLIENT, not_after_unix=None))
            await libmesh.expose(mesh, "web", "127.0.0.1", 8000)

    trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)

With that argument Ctrl-C is a cancellation of `main`, and the mesh hears a goodbye. Without it, it may strike in any task
that runs at the moment, those of the mesh too, and the others take this node for dead.

What is exported here is the public API; everything else may change without notice.
"""

from libmesh.admission import AdmissionConfig
from libmesh.config import MeshConfig
from libmesh.core.intercept import FrameRewriter, Interceptor, PassThrough
from libmesh.core.liveness import LivenessConfig
from libmesh.core.membership_io import MembershipConfig
from libmesh.core.paths_io import PathsConfig
from libmesh.core.relay_desk import RelayLimits
from libmesh.doors import Door
from libmesh.errors import (
    AddressUnavailable,
    AdmissionRefused,
    InviteDenied,
    InviteError,
    InviteExpired,
    InviteMalformed,
    MeshClosed,
    MeshError,
    NetworkError,
    PeerUnreachable,
    ServiceRefused,
)
from libmesh.exchanges import Framing
from libmesh.identity import SecretKey
from libmesh.invites import InviteInfo, read_invite
from libmesh.lan import Nearby, look_around
from libmesh.mesh import Mesh
from libmesh.net.base import Network, Stream, StreamReset
from libmesh.net.libp2p import Libp2pConfig, Libp2pNetwork, open_libp2p_network
from libmesh.opening import open_mesh
from libmesh.peers import (
    Attempt,
    MeshId,
    Path,
    PathKind,
    PeerId,
    PeerState,
    PeerView,
    Reaching,
    RelayView,
    Scope,
    Service,
    View,
)
from libmesh.posts import Post
from libmesh.relays import RelayUse
from libmesh.tunnel import ServiceHandler, expose, serve_tunnel

__version__ = "0.1.0"

__all__ = [
    "AddressUnavailable",
    "AdmissionConfig",
    "AdmissionRefused",
    "Attempt",
    "Door",
    "FrameRewriter",
    "Framing",
    "Interceptor",
    "InviteDenied",
    "InviteError",
    "InviteExpired",
    "InviteInfo",
    "InviteMalformed",
    "Libp2pConfig",
    "Libp2pNetwork",
    "LivenessConfig",
    "MembershipConfig",
    "Mesh",
    "MeshClosed",
    "MeshConfig",
    "MeshError",
    "MeshId",
    "Nearby",
    "Network",
    "NetworkError",
    "PassThrough",
    "Path",
    "PathKind",
    "PathsConfig",
    "PeerId",
    "PeerState",
    "PeerUnreachable",
    "PeerView",
    "Post",
    "Reaching",
    "RelayLimits",
    "RelayUse",
    "RelayView",
    "Scope",
    "SecretKey",
    "Service",
    "ServiceHandler",
    "ServiceRefused",
    "Stream",
    "StreamReset",
    "View",
    "expose",
    "look_around",
    "open_libp2p_network",
    "open_mesh",
    "read_invite",
    "serve_tunnel",
]
