"""How long it takes, in the lab: to the first byte over a relay, and to the direct path after that.

Printed by `python -m tests.netlab --figures`. Not asserted: the machine is what is measured, too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from statistics import median

from tests.netlab.crowd import Forks, LabPeer
from tests.netlab.lab import Kind, Lab, Site

REPEATS = 9

PAIRS = (
    (Kind.PUBLIC, Kind.PUBLIC),
    (Kind.CONE, Kind.PUBLIC),
    (Kind.PUBLIC, Kind.CONE),
    (Kind.CONE, Kind.CONE),
    (Kind.SYMMETRIC, Kind.SYMMETRIC),
)

GOAL = "goal at 40 ms: first byte over the relay within 1.0 s, direct 3 s after that"


def tell_figures(lab: Lab, delay: float, say: Callable[[str], None]) -> None:
    """Measure pairs of kinds, one pair at a time, and say what came of it."""
    say(f"round trip between any two sites: {4000 * delay:.0f} ms; {GOAL}")
    say(
        f"{'from':<12}{'to':<12}{'first byte: median':>20}{'worst':>9}   {'direct path after: median':>26}{'worst':>9}"
    )
    with Forks() as forks:
        for pair in PAIRS:
            with ExitStack() as stack:
                _tell_pair(lab, forks, stack, pair, delay, say)


def _tell_pair(
    lab: Lab,
    forks: Forks,
    stack: ExitStack,
    pair: tuple[Kind, Kind],
    delay: float,
    say: Callable[[str], None],
) -> None:
    office, here, there = (lab.site(kind, delay=delay) for kind in (Kind.PUBLIC, *pair))

    def start(site: Site, invite: str = "") -> LabPeer:
        peer = LabPeer(forks, site.host, lab.folder, invite=invite, relay=not invite)
        return stack.enter_context(closing(peer)).up()

    founder = start(office)
    one, other = start(here, founder.invite), start(there, founder.invite)
    for peer, seen_by in ((one, other), (other, one)):
        peer.until("state", lambda state: state["nat"] != "unknown")
        if pair[0] is not Kind.PUBLIC or pair[1] is not Kind.PUBLIC:
            seen_by.until("path", lambda path: path["addresses"], peer=peer.id)
    one.until("echo", lambda answer: "error" not in answer, peer=other.id)
    punchable = Kind.SYMMETRIC not in pair
    first, direct = [], []
    for _ in range(REPEATS):
        got = one.ask("climb" if punchable else "connect", peer=other.id)
        if "error" in got:
            say(f"{pair[0].value} → {pair[1].value}: {got['error']}")
            return
        first.append(got["first_byte"])
        direct.append(got.get("direct_after", 0.0))
    after = (
        f"{median(direct) * 1000:>23.0f} ms{max(direct) * 1000:>6.0f} ms" if punchable else f"{'none':>26}"
    )
    say(
        f"{pair[0].value:<12}{pair[1].value:<12}{median(first) * 1000:>17.0f} ms{max(first) * 1000:>6.0f} ms   {after}"
    )
