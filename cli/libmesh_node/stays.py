"""Which mesh this node is in, and how it gets from one to another: one stay after the other.

A node starts with the invites that it was given, or with the mesh that last let it in, or with its own. Later a person
may hand it an invite to another mesh: it leaves, tries that one, and comes back if nobody there lets it in.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import trio

import libmesh
from libmesh import (
    AddressUnavailable,
    AdmissionConfig,
    AdmissionRefused,
    InviteError,
    Libp2pConfig,
    Mesh,
    MeshConfig,
    MeshError,
    PeerUnreachable,
    RelayLimits,
    RelayUse,
    SecretKey,
    look_around,
    open_mesh,
)
from libmesh_node.datadir import DataDir, write_private
from libmesh_node.errors import NodeError, UsageError
from libmesh_node.kept import load_kept
from libmesh_node.membership import Membership, load_membership, save_membership, secret_key
from libmesh_node.options import NodeOptions
from libmesh_node.renewing import newest

log = logging.getLogger(__name__)

_PORT_FILE = "p2p-port"

Dwell = Callable[[Mesh, Membership, trio.Nursery], None]
"""Told that a mesh is open, before anybody let us in: starts what shall run there, in the nursery of this stay."""


class Stays:
    """The stays of one node, one at a time.

    Args:
        options: the command line.
        folder: the data folder.
        key: the node's identity.
        opened: told of each stay's beginning.
        entered: told when the mesh has let us in, or is our own.
        closed: told that the stay is over.
    """

    def __init__(
        self,
        options: NodeOptions,
        folder: DataDir,
        key: SecretKey,
        *,
        opened: Dwell,
        entered: Callable[[Mesh, Membership], None],
        closed: Callable[[], None],
    ) -> None:
        self._options, self._folder, self._key = options, folder, key
        self._opened, self._entered, self._closed = opened, entered, closed
        self._switch: _Switch | None = None
        self._scope: trio.CancelScope | None = None

    def first(self) -> list[Membership]:
        """The meshes to try, in order. Raises `NodeError` or `InviteError` if there is none to try."""
        if self._options.join:
            remembered = self._remembered()
            return [newest(given, remembered, time.time()) for given in _usable(self._options.join)]
        remembered = load_membership(self._folder)
        if remembered is not None:
            return [remembered]
        return [self._own()]

    def _remembered(self) -> Membership | None:
        with suppress(NodeError):  # damaged: told when nothing else is given
            return load_membership(self._folder)
        return None

    def _own(self) -> Membership:
        return Membership(secret_key(self._folder, "mesh").mesh_id)

    async def run(self, first: list[Membership]) -> None:
        """Stay somewhere until cancelled. Raises a `MeshError` if none of `first` can be entered, now or later."""
        if self._options.join_lan:
            first = await _on_lan(first)
        try:
            current = await self._enter_first_or_own(first)
        except AddressUnavailable as exc:
            flag = "--bind-ws" if "WebSocket" in str(exc) else "--bind-port"
            raise NodeError(f"{_sentence(exc)}; choose another with {flag} PORT.") from exc
        while True:
            if (switch := self._switch) is None:
                current = await self._come_back(current)
                continue
            try:
                await self._stay(switch.to, must_enter=True, entered=partial(self._arrive, switch))
                current = switch.to
            except MeshError as exc:
                log.info("did not get into the mesh %s: %s", switch.to.mesh_id, exc)
                self._switch = None
                switch.fail(exc)

    async def _come_back(self, current: Membership) -> Membership:
        """Stay on in a mesh that this node was in before, by the invite that it was renewed with since, if any."""
        remembered = self._remembered()
        if current.token is not None and remembered is not None and remembered.mesh_id == current.mesh_id:
            current = remembered
        try:
            await self._stay(current, must_enter=False)
        except InviteError as exc:
            log.warning(
                "there is no way back into the mesh %s: %s; this node is in its own", current.mesh_id, exc
            )
            current = self._own()
        return current

    def _arrive(self, switch: _Switch) -> None:
        self._switch = None
        switch.succeed()

    async def _enter_first_or_own(self, memberships: list[Membership]) -> Membership:
        """As `_enter_first`; but a mesh that was only remembered, and lets us in no more, keeps no node from starting."""
        try:
            return await self._enter_first(memberships)
        except (InviteError, AdmissionRefused) as exc:
            if self._options.join or memberships[0].token is None:
                raise
            log.warning(
                "this node was a member of the mesh %s, but %s; it is in its own mesh until it joins again",
                memberships[0].mesh_id,
                exc,
            )
        own = self._own()
        await self._stay(own, must_enter=False)
        return own

    async def _enter_first(self, memberships: list[Membership]) -> Membership:
        """Stay in the first mesh that lets us in; if none answers, keep trying the first of those that may yet."""
        failures: list[tuple[Membership, MeshError]] = []
        for membership in memberships:
            try:
                await self._stay(membership, must_enter=True)
            except (InviteError, AdmissionRefused, PeerUnreachable) as exc:
                if len(memberships) > 1:  # one alone is told when it ends the node
                    log.warning("%s", exc)
                failures.append((membership, exc))
            else:
                return membership
        for membership, failure in failures:
            if isinstance(failure, PeerUnreachable):
                await self._stay(membership, must_enter=False)
                return membership
        raise failures[0][1]

    async def _stay(
        self, membership: Membership, *, must_enter: bool, entered: Callable[[], None] = lambda: None
    ) -> None:
        """One stay in one mesh, until `switch`. With `must_enter`, raises if nobody lets us in at once."""
        failure: MeshError | None = None
        own = secret_key(self._folder, "mesh") if membership.token is None else None
        kept = load_kept(self._folder, membership.mesh_id)
        opened = open_mesh(
            self._key,
            mesh_key=own,
            invite=membership.token,
            listen=self._listen(),
            config=MeshConfig(
                agent=f"libmesh-node/{libmesh.__version__}",
                relays=self._relays(),
                lan=self._options.lan,
                admission=AdmissionConfig(offline=self._options.offline),
            ),
            wait=False,
            follow=self._options.client and membership.token is not None,
            revocations=kept.revocations,
        )
        async with opened as mesh:
            try:
                async with trio.open_nursery() as nursery:
                    self._scope = nursery.cancel_scope
                    if self._switch is not None and self._switch.to is not membership:
                        self._scope.cancel()  # wished for while this mesh was being opened
                        await trio.lowlevel.checkpoint()
                    self._remember_port(mesh.addresses)
                    mesh.add_contacts(kept.contacts)
                    self._opened(mesh, membership, nursery)
                    try:
                        if membership.token is not None:
                            await mesh.join(membership.token)
                    except MeshError as exc:
                        if must_enter:
                            failure = exc
                            nursery.cancel_scope.cancel()
                        else:
                            log.warning("nobody in the mesh answers yet, trying on: %s", exc)
                            nursery.start_soon(self._settle_later, mesh, membership)
                    else:
                        entered()
                        self._settle(mesh, membership)
            finally:
                self._closed()  # while the mesh can still be asked
        if failure is not None:
            raise failure

    def _settle(self, mesh: Mesh, membership: Membership) -> None:
        if membership.token is not None:
            try:
                save_membership(self._folder, membership)
            except NodeError as exc:
                log.warning("%s The next start will not know this mesh.", exc)
        self._entered(mesh, membership)

    async def _settle_later(self, mesh: Mesh, membership: Membership) -> None:
        """Settle when somebody has let us in after all; the mesh itself keeps trying its contacts."""
        async with mesh.watch() as views:
            async for view in views:
                if any(peer.path is not None for peer in view.peers):
                    self._settle(mesh, membership)
                    return

    async def switch(self, to: Membership) -> None:
        """Leave this mesh for another one. Raises what kept us out of it; then we are back, or on the way back."""
        if self._switch is not None:
            raise MeshError("this node is joining a mesh right now; try again when that is done")
        self._switch = switch = _Switch(to)
        if self._scope is not None:
            self._scope.cancel()
        await switch.outcome()

    def _relays(self) -> RelayUse:
        """Whoever has an address told to it is reachable there, and relays for those who are not."""
        return RelayUse(
            known=self._options.relays,
            offer=bool(self._options.announce_addresses) and self._options.relay_rate != 0,
            volunteer=not self._options.client and self._options.relay_rate != 0,
        )

    def _listen(self) -> Libp2pConfig:
        rate = self._options.relay_rate
        try:
            return Libp2pConfig(
                port=self._port(),
                websocket_port=self._options.bind_ws,
                announce=self._options.announce_addresses,
                relay=None if rate == 0 else RelayLimits(bandwidth=rate or 0.0),
                map_port=self._options.map_port and not self._options.offline,
                private_only=self._options.offline,
            )
        except ValueError as exc:
            raise UsageError(_sentence(exc)) from exc

    def _port(self) -> int:
        """The port for peers: the one asked for, or last time's if it is free, so that old invites lead here."""
        if self._options.bind_port is not None:
            return self._options.bind_port
        with suppress(OSError, ValueError):
            port = int((self._folder.path / _PORT_FILE).read_text())
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("0.0.0.0", port))
            return port
        return 0

    def _remember_port(self, addresses: Sequence[str]) -> None:
        own = [address for address in addresses if address not in self._options.announce_addresses]
        if own:
            write_private(self._folder.path / _PORT_FILE, own[0].rpartition("/")[2].encode() + b"\n")


async def _on_lan(memberships: list[Membership]) -> list[Membership]:
    """Those whose mesh has nodes on this LAN, the most first. Raises `NodeError` if none has, saying what there is."""
    invited = [membership for membership in memberships if membership.token is not None]
    nearby = await look_around([membership.mesh_id for membership in invited])
    for mesh_id, count in nearby.known.items():
        log.info("on this LAN: %s of the mesh %s", _nodes(count), mesh_id)
    if nearby.others:
        log.info("on this LAN: %s of meshes that there is no invite for here", _nodes(nearby.others))
    found = [membership for membership in invited if membership.mesh_id in nearby.known]
    if not found:
        there = f"{_nodes(nearby.others)} of other meshes" if nearby.others else "no node of any mesh"
        what = "the mesh of the invite has none" if invited else "an invite is needed: add --join TOKEN"
        raise NodeError(f"There is {there} on this LAN; {what}.")
    return sorted(found, key=lambda membership: -nearby.known[membership.mesh_id])


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]


class _Switch:
    """A wish to go to another mesh, and how that came out."""

    def __init__(self, to: Membership) -> None:
        self.to = to
        self._done = trio.Event()
        self._failure: MeshError | None = None

    def succeed(self) -> None:
        self._done.set()

    def fail(self, failure: MeshError) -> None:
        self._failure = failure
        self._done.set()

    async def outcome(self) -> None:
        await self._done.wait()
        if self._failure is not None:
            raise self._failure


def _usable(tokens: Sequence[str]) -> list[Membership]:
    """The memberships that `tokens` stand for. Raises the first one's `InviteError` if none can be read."""
    found: list[Membership] = []
    failures: list[InviteError] = []
    for token in tokens:
        try:
            found.append(Membership.invited(token))
        except InviteError as exc:
            if len(tokens) > 1:  # one alone is told when it ends the node
                log.warning("%s", exc)
            failures.append(exc)
    if not found:
        raise failures[0]
    return found
