"""How soon two peers know that the other's cable was pulled, and whether losses alone make them think so.

Printed by `python -m tests.netlab --losses`: meshes of two, of which each has nobody else to ask, with a cable between
them that loses packets both ways, and is pulled at the end. Not asserted: the machine is what is measured, too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from datetime import datetime
from statistics import median

from tests.netlab.crowd import Forks, LabPeer
from tests.netlab.lab import Kind, Lab, Site

LOSS = 0.2
PAIRS = 10
SECONDS = 150.0
CALM = 12.0
"""Seconds without losses before the cables are pulled, and afterwards until the logs are read."""

_DEATH = re.compile(r"(\d\d:\d\d:\d\d\.\d+) peer \S+ is dead")


def tell_losses(lab: Lab, delay: float, say: Callable[[str], None]) -> None:
    """Measure, and say what came of it."""
    with Forks() as forks, ExitStack() as stack:
        pairs = [_pair(lab, forks, stack, delay) for _ in range(PAIRS)]
        time.sleep(CALM)
        for seed, (site, _) in enumerate(pairs, 1):
            site.cable.set(loss=LOSS, seed=seed)
        time.sleep(SECONDS)
        peers = [peer for _, pair in pairs for peer in pair]
        said = "".join(peer.words() for peer in peers)
        say(
            f"{PAIRS} meshes of two for {SECONDS:.0f} s, {LOSS:.0%} of packets lost each way: suspected"
            f" {said.count(' is suspect')} times, taken for dead {said.count(' is dead')} times"
        )
        for site, _ in pairs:
            site.cable.set(loss=0.0)
        time.sleep(CALM)
        before = [len(peer.words()) for peer in peers]
        pulled: list[datetime] = []
        for site, _ in pairs:
            site.cable.cut()
            pulled += [datetime.now()] * 2
        time.sleep(CALM)
        words = [peer.words()[start:] for peer, start in zip(peers, before, strict=True)]
        took = [_seconds(*one) for one in zip(words, pulled, strict=True)]
        known = [seconds for seconds in took if seconds is not None]
        say(
            f"cables pulled: known to {len(known)} of {len(took)} peers after {min(known):.1f} to"
            f" {max(known):.1f} s, median {median(known):.1f} s"
        )


Pair = tuple[LabPeer, LabPeer]


def _pair(lab: Lab, forks: Forks, stack: ExitStack, delay: float) -> tuple[Site, Pair]:
    here, there = lab.site(Kind.PUBLIC, delay=delay), lab.site(Kind.PUBLIC)
    founder = stack.enter_context(closing(LabPeer(forks, here.host, lab.folder))).up()
    other = LabPeer(forks, there.host, lab.folder, invite=founder.invite)
    member = stack.enter_context(closing(other)).up()
    founder.until("path", lambda path: path["kind"] is not None, peer=member.id)
    return here, (founder, member)


def _seconds(words: str, pulled: datetime) -> float | None:
    found = _DEATH.search(words)
    if found is None:
        return None
    at = datetime.strptime(found[1], "%H:%M:%S.%f")
    return (at.replace(year=pulled.year, month=pulled.month, day=pulled.day) - pulled).total_seconds()
