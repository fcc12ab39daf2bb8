"""A node that only relays: opens a network, and a mesh if it belongs to one, and waits for a signal."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

import libmesh
from libmesh import (
    Libp2pConfig,
    Libp2pNetwork,
    MeshConfig,
    MeshError,
    RelayLimits,
    RelayUse,
    SecretKey,
    open_libp2p_network,
    open_mesh,
)
from libmesh_node.datadir import DataDir, held_data_dir
from libmesh_node.ending import open_ending_signals
from libmesh_node.errors import NodeError, UsageError, sentence
from libmesh_node.logs import logging_to
from libmesh_node.membership import Membership, load_membership, save_membership, secret_key
from libmesh_node.options import FileToken, NodeOptions
from libmesh_node.renewing import Renewal, newest
from libmesh_node.terminal import say

log = logging.getLogger(__name__)

REPORT_EVERY = 600.0
"""Seconds between two lines in the log about what is relayed, when there is something to tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayOptions:
    """What the command line asked of a relay.

    Attributes:
        token: an invite to the mesh whose members are served; `None` for the one that was joined before.
        open_to_all: serve everybody, and be a member of nothing.
        port: to listen at; 0 for a free one.
        websocket_port: likewise, for those who come by WebSocket; `None` for none.
        announce: multiaddrs that others reach it at besides its own.
        max_peers: reservations at a time.
        max_circuits: at a time.
        bandwidth: bytes a second for all; 0 for no limit.
        bandwidth_per_peer: bytes a second for each; 0 for no limit.
        data_dir: holds identity and membership.
    """

    token: str | None
    open_to_all: bool
    port: int
    websocket_port: int | None
    announce: tuple[str, ...]
    max_peers: int
    max_circuits: int
    bandwidth: float
    bandwidth_per_peer: float
    data_dir: Path
    json_logs: bool = False
    verbose: bool = False


async def run_relay(options: RelayOptions) -> None:
    """Relay until SIGINT, SIGTERM or SIGHUP. Raises `NodeError` or `MeshError` for what keeps it from starting."""
    with (
        open_ending_signals() as signals,
        held_data_dir(options.data_dir) as folder,
        logging_to(json_logs=options.json_logs, verbose=options.verbose),
    ):
        failures: list[Exception] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_signal, signals, nursery.cancel_scope)
            try:
                await _relay(options, folder)
            except* (NodeError, MeshError, OSError) as group:
                failures += _flat(group)
            nursery.cancel_scope.cancel()
        if failures:
            raise failures[0]


def _flat(group: BaseExceptionGroup[Exception]) -> list[Exception]:
    found: list[Exception] = []
    for exc in group.exceptions:
        found += _flat(exc) if isinstance(exc, BaseExceptionGroup) else [exc]
    return found


async def _end_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        log.info("ending")
        scope.cancel()


async def _relay(options: RelayOptions, folder: DataDir) -> None:
    key = secret_key(folder, "identity")
    limits = RelayLimits(
        reservations=options.max_peers,
        circuits=options.max_circuits,
        bandwidth=options.bandwidth,
        bandwidth_per_peer=options.bandwidth_per_peer,
    )
    try:
        listen = Libp2pConfig(
            port=options.port,
            websocket_port=options.websocket_port,
            announce=options.announce,
            relay=limits,
            relay_open=options.open_to_all,
        )
    except ValueError as exc:
        raise UsageError(sentence(str(exc))) from exc
    async with open_libp2p_network(key.seed, listen) as network:
        if options.open_to_all:
            await _serve(network, "everybody")
        async with _member(options, folder, key, network):
            await _serve(network, "the members of its mesh")


@asynccontextmanager
async def _member(
    options: RelayOptions, folder: DataDir, key: SecretKey, network: Libp2pNetwork
) -> AsyncIterator[None]:
    """Be a member of the mesh for which this relay is, and tell its members of it."""
    membership = _membership(options, folder)
    config = MeshConfig(
        agent=f"libmesh-node-relay/{libmesh.__version__}", relays=RelayUse(keep=False, offer=True)
    )
    async with (
        open_mesh(
            key, invite=membership.token, network=network, config=config, wait=options.token is not None
        ) as mesh,
        trio.open_nursery() as nursery,
    ):
        save_membership(folder, membership)
        files = (options.token.file,) if isinstance(options.token, FileToken) else ()
        renewal = Renewal(
            mesh,
            folder,
            NodeOptions(data_dir=options.data_dir, join_files=files),
            invited=True,
            advice="start the relay again with --join and a new invite",
        )
        nursery.start_soon(renewal.run)
        yield
        nursery.cancel_scope.cancel()


def _membership(options: RelayOptions, folder: DataDir) -> Membership:
    """By the invite that was given, or by the one that this relay is in by. Raises `UsageError` if there is none."""
    if options.token is not None:
        remembered = None
        with suppress(NodeError):  # damaged, and not needed
            remembered = load_membership(folder)
        return newest(Membership.invited(options.token), remembered, time.time())
    remembered = load_membership(folder)
    if remembered is None:
        raise UsageError(
            "Say for whom to relay: --join TOKEN for the members of a mesh, or --open for everybody."
        )
    return remembered


async def _serve(network: Libp2pNetwork, whom: str) -> None:
    """Say where, and stay until cancelled."""
    log.info("relaying for %s", whom)
    for address in network.addresses():
        say(f"{address}/p2p/{network.peer}")
    told = (0, 0, 0)
    while True:
        await trio.sleep(REPORT_EVERY)
        now = network.relay_load()
        if now != told:
            log.info("%d peers have a place here, %d circuits, %.1f GB relayed", now[0], now[1], now[2] / 1e9)
            told = now
