"""Machines with a part in splits of several models: what one has of them is not there for another. All nodes reckon alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from libmesh_node import split_host, splits
from libmesh_node.announced import AnnouncedModel, Distance, NodeStatus
from libmesh_node.llama.engine import Binary
from libmesh_node.llama.rpc.frames import Link, Reply, frame
from libmesh_node.llama.rpc.opening import Refusal, SessionRequest, decode_answer, encode_request
from libmesh_node.options import NodeOptions
from libmesh_node.placement.electing import elect
from libmesh_node.placement.rows import row_of
from libmesh_node.placement.seen import machines_with
from libmesh_node.placement.splitting import Placement, Shortage, SplitRules

from libmesh import PeerId, View
from tests.llama.rpc.test_hostile import Host, lent
from tests.placement.hosting import DIGESTS, TRAINED, Machine, World, world
from tests.placement.machines import GB, shape
from tests.placement.test_seen import peer, view

TURN = 60.0
BOTH = ("m", "n")


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def idle(_server: object) -> bool:
        return False

    monkeypatch.setattr(split_host, "_is_busy", idle)


# ── what is announced ────────────────────────────────────────────────────────────────────────────────────────────────


def told(spare: int, given: Mapping[str, int]) -> NodeStatus:
    """Of a node with all models, whose splits have so many GB of it."""
    models = (
        AnnouncedModel(name=name, digest=digest, split_bytes=given.get(name, 0) * GB)
        for name, digest in DIGESTS.items()
    )
    far = tuple(Distance(name, 0.001) for name in "abc")
    return NodeStatus(
        memory_bytes=spare * GB, spare_bytes=spare * GB, models=tuple(models), bandwidth=20 * GB, rpc_protocol="7.0.0", distances=far
    )  # fmt: skip


def as_seen_by(me: str, statuses: Mapping[str, NodeStatus]) -> View:
    others = (peer(name, status) for name, status in statuses.items() if name != me)
    return replace(view(*others), me=PeerId(me))


def outcome(me: str, name: str, statuses: Mapping[str, NodeStatus]) -> Placement | Shortage:
    seen = as_seen_by(me, statuses)
    machines = machines_with(DIGESTS[name], seen, statuses[me], name=name, protocol="7.0.0", refused={})
    return elect(replace(shape(), digest=DIGESTS[name]), machines, SplitRules())


def test_a_placement_has_what_another_models_split_leaves_the_same_on_every_node() -> None:
    statuses = {"a": told(40, {"m": 30}), "b": told(40, {"m": 20}), "c": told(40, {})}
    (second,) = {outcome(me, "n", statuses) for me in "abc"}
    assert isinstance(second, Placement)
    shares = {share.peer: share.granted for share in (*second.workers, second.home)}
    assert sum(shares.values()) >= 44 * GB
    assert all(size <= {"a": 10, "b": 20, "c": 40}[peer] * GB for peer, size in shares.items())
    (first,) = {outcome(me, "m", statuses) for me in "abc"}
    assert isinstance(first, Placement)
    assert first.home.granted + first.workers[0].granted >= 44 * GB
    assert len(first.workers) == 1


def test_who_has_too_little_because_of_other_splits_is_told_so() -> None:
    statuses = {"a": told(40, {"m": 30}), "b": told(40, {"m": 30})}
    short = outcome("a", "n", statuses)
    assert str(short) == "need 44.0 GB, have 20.0 GB from 1 peer, where splits of other models have 60.0 GB"


def test_who_says_that_its_splits_have_more_than_it_has_offers_nothing() -> None:
    statuses = {"a": told(40, {"m": 90}), "b": told(40, {}), "c": told(40, {})}
    placed = outcome("b", "n", statuses)
    assert isinstance(placed, Placement)
    assert "a" not in [share.peer for share in (*placed.workers, placed.home) if share.layers]


def test_a_standby_has_nothing_to_spare_of_what_splits_have() -> None:
    assert row_of("a", told(40, {"m": 30, "n": 4}), works=True).spare == 6 * GB
    assert row_of("a", told(40, {"m": 30, "n": 40}), works=True).spare == 0


# ── who grants it ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("asked", "why", "told"),
    [
        (11 * GB, "its memory is taken: 11.00 GB are asked for, 10.00 GB are left", []),
        (10 * GB, "its rpc-server does not run: ", [10 * GB, 0]),
    ],
)
async def test_a_worker_lends_nothing_of_what_its_own_splits_have(
    tmp_path: Path, asked: int, why: str, told: list[int]
) -> None:
    """What it lends it tells as soon as it has promised it."""
    news: list[int] = []
    rpc_server = Binary(path=tmp_path / "none", version="", rpc_protocol="7.0.0", origin="here")
    entry = SimpleNamespace(split_bytes=30 * GB)
    models: Any = SimpleNamespace(
        equipment=SimpleNamespace(engine=SimpleNamespace(rpc_server=rpc_server), own_devices=()),
        entries={"m": entry}, spare_bytes=40 * GB,
        on_change=lambda: news.append(lender.granted_on(DIGESTS["n"])),
    )  # fmt: skip
    mesh: Any = None
    lender: Any = splits._lender(mesh, models, NodeOptions(data_dir=tmp_path))
    lender._identify = None
    lender.models[DIGESTS["n"]] = splits.LentModel(name="n", digest=DIGESTS["n"], parts=())
    request = SessionRequest(digest=DIGESTS["n"], memory_bytes=asked, protocol=(7, 0, 0), model="n")
    async with lent(lender) as open_stream:
        answer = await Host(await open_stream()).ask(frame(Link.OPEN, encode_request(request)))
    assert answer.kind == Reply.OPENED
    refusal = decode_answer(answer.payload)
    assert isinstance(refusal, Refusal)
    assert refusal.reason.startswith(why)
    assert news == told


# ── two models over the same machines ────────────────────────────────────────────────────────────────────────────────


def parts(place: World) -> dict[str, int]:
    """Servers that answer, by digest."""
    return {digest: sum(run.digest == digest for run in place.serving) for digest in DIGESTS.values()}


async def test_two_splits_never_have_more_of_a_machine_than_it_has(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Whichever was there first stays, and the other one is served when there is a machine for it."""
    async with world(force=True) as place:
        for name in "ab":
            place.join(name, Machine(40, models=BOTH))
        await trio.sleep(TURN)
        (first,) = place.serving
        notices = [notice for node in place.nodes.values() for notice in node.splits.notices]
        assert notices
        assert all("GB from 1 peer, where splits of other models have 44." in notice for notice in notices)
        place.join("c", Machine(40, models=BOTH))
        await trio.sleep(TURN)
        assert place.serving[0] is first
        assert parts(place) == dict.fromkeys(DIGESTS.values(), 1)
    assert (place.outages, place.crowded) == ([], set())


async def test_two_splits_share_machines_that_have_room_for_both(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with world(force=True, heads=55) as place:
        for name in "abc":
            place.join(name, Machine(60, models=BOTH))
        for _ in range(10):
            await trio.sleep(TURN)
            assert parts(place) == dict.fromkeys(DIGESTS.values(), 1)
    assert (place.launched, place.outages, place.crowded) == (2, [], set())


# ── a split beside the one that it replaces ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("heads", "outages"), [(16, 0), (27, 1)], ids=["enough context", "too little"])
async def test_a_split_that_needs_more_than_half_of_a_machine_starts_beside_one_that_leaves_enough(
    autojump_clock: trio.testing.MockClock, heads: int, outages: int
) -> None:
    """Enough for requests as long as they may be now, or the old one ends first."""
    async with world(force=True, heads=heads) as place:
        place.join("a", Machine(60))
        place.join("b", Machine(60))
        await trio.sleep(TURN)
        (old,) = place.serving
        assert max(old.taken.values()) < 30 * GB
        place.join("c", Machine(24, bandwidth=1000, rtt=0.0005))
        await trio.sleep(TURN)
        (new,) = place.serving
        assert "c" in new.placement.members
        assert max(new.taken.values()) > 30 * GB
        assert TRAINED <= new.context <= old.context
        assert (new.context < old.context) == (outages == 0)
    assert (place.launched, len(place.outages), place.crowded) == (2, outages, set())


async def test_a_split_that_finishes_its_last_answers_still_has_its_memory(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for two, and a third one waits until the first has ended; the second goes on meanwhile."""
    busy: list[object] = []

    async def is_busy(server: object) -> bool:
        return any(server is one for one in busy)

    monkeypatch.setattr(split_host, "_is_busy", is_busy)
    async with world(force=True) as place:
        place.join("a", Machine(60, bandwidth=100, rtt=0.0001))
        place.join("b", Machine(60))
        await trio.sleep(TURN)
        busy.append(place.serving[0].server)
        place.join("c", Machine(60, bandwidth=100, rtt=0.0005))
        await trio.sleep(TURN)
        assert len(place.serving) == 2
        second = place.serving[1]
        place.join("d", Machine(60, bandwidth=1000, rtt=0.0003))
        await trio.sleep(TURN)
        assert second in place.serving
        assert place.launched == 2
        busy.clear()
        await trio.sleep(2 * TURN)
        assert place.launched == 3
        assert "d" in place.serving[0].placement.members
    assert (place.outages, place.crowded) == ([], set())
