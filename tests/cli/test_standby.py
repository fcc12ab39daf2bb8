"""What a node tells of demand, and what its shelf holds. What is taken, and when, tests/node shows with real servers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import trio
import trio.testing
from libmesh_node import shelf as shelf_module
from libmesh_node.announced import Wish
from libmesh_node.asked import Asked
from libmesh_node.datadir import DataDir
from libmesh_node.equipment import Equipment
from libmesh_node.llama.engine import Engine
from libmesh_node.options import NodeOptions
from libmesh_node.serving import LocalModels
from libmesh_node.shelf import Shelf
from libmesh_node.standby import FORGET_WAITING, MAX_TELLERS, TOO_SOON, Standby

from libmesh import PeerId

M = "ab" * 32


def asked(requests: int = 1, waiting: int = 0) -> tuple[Asked, ...]:
    return (Asked(digest=M, name="m", requests=requests, waiting=waiting),)


@pytest.fixture
def standby(tmp_path: Path) -> Standby:
    options = NodeOptions(data_dir=tmp_path)
    models = LocalModels(options, DataDir(tmp_path), lambda: None)
    shelf = Shelf((), models.equipment, lambda: None)
    return Standby(PeerId("me"), models, shelf, options, lambda: None, lambda: None)


async def test_requests_count_and_those_that_wait_count_as_long_as_that_is_said(
    standby: Standby, autojump_clock: trio.testing.MockClock
) -> None:
    standby.told("", asked(3, waiting=3))
    standby.told("client", asked(1, waiting=2))
    assert standby.wishes() == (Wish(digest=M, name="m", requests=4.0, waiting=8),)
    await trio.sleep(FORGET_WAITING / 2)
    standby.told("", asked(0, waiting=1))
    await trio.sleep(FORGET_WAITING / 2)
    assert standby.wishes()[0].waiting == 1
    await trio.sleep(600)
    assert standby.wishes() == ()


async def test_client_that_tells_too_much_is_not_heard(
    standby: Standby, autojump_clock: trio.testing.MockClock
) -> None:
    for _ in range(100):
        standby.told("greedy", asked(1))
    assert standby.wishes()[0].requests == 1.0
    await trio.sleep(TOO_SOON)
    for number in range(10 * MAX_TELLERS):
        standby.told(f"client {number}", asked(0, waiting=1))
    assert standby.wishes()[0].waiting <= 2 * MAX_TELLERS
    await trio.sleep(60)
    standby.told("somebody else", asked(2))
    assert standby.wishes()[0].requests == 2.0


async def test_operator_may_have_requests_forgotten(
    standby: Standby, autojump_clock: trio.testing.MockClock
) -> None:
    standby.told("", asked(9))
    standby.forget(M)
    assert standby.wishes() == ()


@pytest.mark.llama
async def test_shelf_finds_models_and_passes_over_garbage(
    tmp_path: Path, demo_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf_module, "LOOK_EVERY", 0.01)
    (tmp_path / "garbage.gguf").write_bytes(b"GGUF" + bytes(100))
    shutil.copy(demo_path, tmp_path / "good.gguf")
    equipment = Equipment(NodeOptions(data_dir=tmp_path))
    await equipment.measure()
    changes: list[set[str]] = []
    shelf = Shelf(
        (tmp_path, tmp_path / "missing"),
        equipment,
        lambda: changes.append({held.model.name for held in shelf.models.values()}),
    )
    with trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shelf.run)
            while not changes:  # noqa: ASYNC110 - the disk is looked at
                await trio.sleep(0.01)
            (tmp_path / "good.gguf").unlink()
            while len(changes) < 2:  # noqa: ASYNC110
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert changes == [{"good"}, set()]


async def test_shelf_without_models_looks_for_no_engine(tmp_path: Path) -> None:
    equipment = Equipment(NodeOptions(data_dir=tmp_path, bin_dir=tmp_path / "nothing"))
    shelf = Shelf((tmp_path,), equipment, lambda: None)
    with trio.move_on_after(0.2):
        await shelf.run()
    assert equipment.engine is None
    assert shelf.models == {}
