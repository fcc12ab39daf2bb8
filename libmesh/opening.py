"""The front door: `open_mesh`."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from libmesh.config import MeshConfig
from libmesh.core.credentials import Authority
from libmesh.driver import Driver
from libmesh.errors import MeshError
from libmesh.identity import SecretKey
from libmesh.invites import check_invite
from libmesh.lan import lan_of
from libmesh.mesh import Mesh
from libmesh.net.base import Network
from libmesh.net.libp2p import Libp2pConfig, open_libp2p_network
from libmesh.relays import relays_of


@asynccontextmanager
async def open_mesh(
    key: SecretKey,
    *,
    mesh_key: SecretKey | None = None,
    invite: str | None = None,
    network: Network | None = None,
    listen: Libp2pConfig | None = None,
    config: MeshConfig | None = None,
    wait: bool = True,
    follow: bool = False,
    revocations: Iterable[bytes] = (),
    wall_clock: Callable[[], float] = time.time,
    rng: random.Random | None = None,
) -> AsyncIterator[Mesh]:
    """Be a member of a mesh for as long as the context lasts.

    Args:
        key: this node's identity; makes its peer id.
        mesh_key: the mesh's own key, for whoever founds it or holds it. Exactly one of this and `invite`.
        invite: a token. It also says where the mesh can be reached.
        network: the transport to use. By default a libp2p network made from `key` and `listen`, and closed at the end.
        listen: where that one listens; all interfaces and a free port by default.
        config: times and limits.
        wait: with an invite, return only when a contact has admitted us. Without, keep trying in the background.
        follow: use the mesh without being announced in it. It costs the others nothing per follower but a connection to a
            few of them; only those show it, in `View.followers`. This node sees the mesh like everybody. The first `offer`,
            `publish` or `subscribe` makes it a peer like any other.
        revocations: what `Mesh.revocations` told before. Those that are damaged or of another mesh are left out.
        wall_clock: seconds since the epoch; read once.
        rng: for what is left to chance, such as whom to probe next; not for keys.

    Raises:
        InviteError: the token cannot be used.
        AddressUnavailable: the port is taken.
        AdmissionRefused, PeerUnreachable: with `wait`, no contact let us in.

    Leaving says goodbye, then ends all streams and connections. There is a trio nursery inside, so an error of the body
    comes out in an exception group; the errors above do not. From then on the mesh raises `MeshClosed`.
    """
    if (mesh_key is None) == (invite is None):
        raise ValueError("exactly one of mesh_key and invite is needed")
    _check_kinds(key=(key, SecretKey), mesh_key=(mesh_key, SecretKey), listen=(listen, Libp2pConfig))
    _check_kinds(network=(network, Network), config=(config, MeshConfig))
    revocations = [bytes(memoryview(revocation)) for revocation in revocations]
    opened = check_invite(invite, now_unix=wall_clock()) if invite is not None else None
    authority = opened.authority if opened is not None else Authority.of_mesh(_seed_of(mesh_key))
    config, rng = config or MeshConfig(), rng or random.Random()

    opening, leave = trio.Event(), trio.Event()
    mesh: Mesh | None = None
    kept_out: MeshError | None = None

    async def stay() -> None:
        # Shielded, so that a goodbye can still be said when the caller is cancelled; bounded by `farewell` and by the
        # network's own closing. Not begun by `nursery.start`, which, when cancelled, waits for the end of what it began:
        # nobody would be left to set `leave`.
        nonlocal mesh, kept_out
        with trio.CancelScope(shield=True):
            try:
                async with AsyncExitStack() as stack:
                    transport = network
                    if transport is None:
                        transport = await stack.enter_async_context(open_libp2p_network(key.seed, listen))
                    driver = Driver(
                        transport, key, authority, config, wall_clock=wall_clock, rng=rng, follow=follow
                    )
                    await stack.enter_async_context(driver.running())
                    driver.recall(revocations)
                    mesh = Mesh(driver, authority)
                    stack.callback(mesh.close)
                    await stack.enter_async_context(relays_of(mesh, driver, config.relays))
                    await stack.enter_async_context(lan_of(mesh, driver, config.lan))
                    opening.set()
                    await leave.wait()
            except MeshError as exc:
                if mesh is not None:
                    raise
                kept_out = exc
                opening.set()

    async with trio.open_nursery() as nursery:
        try:
            nursery.start_soon(stay)
            await opening.wait()
            try:
                if mesh is not None and opened is not None:
                    await mesh.enter(opened, wait=wait)
            except MeshError as exc:
                kept_out = exc
            if mesh is not None and kept_out is None:
                yield mesh
        finally:
            leave.set()
    if kept_out is not None:
        raise kept_out


def _check_kinds(**given: tuple[object, type]) -> None:
    for name, (value, kind) in given.items():
        if not isinstance(value, kind) and (value is not None or name == "key"):
            raise TypeError(f"{name} is a {kind.__name__}, not {type(value).__name__}")


def _seed_of(key: SecretKey | None) -> bytes:
    assert key is not None
    return key.seed
