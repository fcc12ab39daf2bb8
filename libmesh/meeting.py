"""Members whose addresses have all changed find each other at a relay: each leaves word there, and who is alone asks.

A relay that is a member tells all it knows anyway. One that serves everybody knows nothing of the mesh; it only keeps what
members have signed, under a name that says nothing to those who do not know the mesh's id (rendezvous.proto).
"""

from __future__ import annotations

import hashlib
import logging
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from libmesh.core.ways import relay_of, to_announce
from libmesh.errors import MeshError, ServiceRefused
from libmesh.peers import MeshId, PeerId

if TYPE_CHECKING:
    from libmesh.driver import Driver
    from libmesh.mesh import Mesh

log = logging.getLogger(__name__)

MAX_ADDRESSES = 8
"""Addresses that a relay is told of: as many as others try."""

LOOK_EVERY = 5.0
"""Seconds between looks at whether there is something to tell or to ask."""

AGAIN, RETRY, NO_POINT = 300.0, 30.0, 3600.0
"""Seconds until word is left anew: if nothing changed, if it was refused, and if the relay knows no rendezvous."""

ASK_ALONE, ASK_LEAST, ASK_IN_COMPANY = 4.0, 60.0, 300.0
"""Seconds between questions: at first while alone, then doubling up to the next, and in company, for a mesh may be parted."""

MAX_TRIED = 8
"""Peers that are tried after one question, by lot. Anybody who knows the mesh's id may have left word, and of any address: what
a member can be made to dial so is bounded by this, one address in five seconds."""

TRY_LIMIT = 15.0
"""Seconds for each of them."""


def namespace_of(mesh_id: MeshId) -> str:
    """What a mesh is called at rendezvous points."""
    return hashlib.sha256(b"libmesh rendezvous" + mesh_id.encode("ascii")).hexdigest()


@dataclass(slots=True)
class _Told:
    """What a relay has been told, and when to tell it again."""

    addresses: tuple[str, ...]
    again: float


async def meet_at_relays(mesh: Mesh, driver: Driver) -> None:
    """Leave word at the relays at which this node has a place, and ask there for others, until cancelled.

    While this node follows, it leaves no word: others shall not look for it.
    """
    namespace = namespace_of(mesh.mesh_id)
    told: dict[PeerId, _Told] = {}
    pause, ask_at = ASK_ALONE, trio.current_time()
    while True:
        relays = _relays(driver)
        if relays and not mesh.following:
            await _tell(driver, namespace, relays, told)
        now, alone = trio.current_time(), not driver.admission.anybody
        if relays and now >= ask_at:
            await _ask(driver, namespace, relays)
            pause = min(2 * pause, ASK_LEAST) if alone else ASK_ALONE
            ask_at = trio.current_time() + (pause if alone else ASK_IN_COMPANY)
        elif alone:
            ask_at = min(ask_at, now + pause)
        await trio.sleep(LOOK_EVERY)


def _relays(driver: Driver) -> tuple[PeerId, ...]:
    found = (relay_of(address) for address in driver.network.addresses())
    return tuple(dict.fromkeys(relay[0] for relay in found if relay is not None))


async def _tell(
    driver: Driver, namespace: str, relays: tuple[PeerId, ...], told: dict[PeerId, _Told]
) -> None:
    for gone in told.keys() - set(relays):
        del told[gone]
    addresses = to_announce(driver.network.addresses(), MAX_ADDRESSES)
    for relay in relays:
        before, now = told.get(relay), trio.current_time()
        if (
            before is not None
            and now < before.again
            and (before.addresses == addresses or not before.addresses)
        ):
            continue
        try:
            lasts = await driver.network.register(relay, namespace, addresses)
        except MeshError as exc:
            log.debug("no word left at the relay %s: %s", relay, exc)
            told[relay] = _Told((), now + (NO_POINT if isinstance(exc, ServiceRefused) else RETRY))
        else:
            told[relay] = _Told(addresses, now + min(AGAIN, lasts / 2))


async def _ask(driver: Driver, namespace: str, relays: tuple[PeerId, ...]) -> None:
    found: dict[PeerId, tuple[str, ...]] = {}
    for relay in relays:
        try:
            found |= await driver.network.discover(relay, namespace)
        except MeshError as exc:
            log.debug("the relay %s tells of nobody: %s", relay, exc)
    strangers = [peer for peer in found if not driver.membership.believes(peer)]
    random.shuffle(strangers)
    for peer in strangers[:MAX_TRIED]:
        with trio.move_on_after(TRY_LIMIT):
            try:
                await driver.admission.connect(peer, found[peer][:MAX_ADDRESSES])
            except MeshError as exc:
                log.debug("%s left word at a relay, and cannot be reached: %s", peer, exc)
            else:
                log.info("found %s, which left word at a relay", peer)
