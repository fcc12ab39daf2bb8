"""One split, of which this machine's own part fails. The workers are not real, the rest is; tests/node has all of it real."""

from __future__ import annotations

import errno
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from libmesh_node import split_run
from libmesh_node.llama.engine import Binary
from libmesh_node.llama.gguf import read_header
from libmesh_node.models.demo import SMALL, write_model
from libmesh_node.models.digest import model_digest
from libmesh_node.models.reference import ModelFile
from libmesh_node.placement.shape import ModelShape, shape_of
from libmesh_node.placement.splitting import Placement, Share
from libmesh_node.split_run import SplitFailed, SplitRun, SplitSetting


class Worker:
    """In place of `Borrowed`: it is there, and this machine has no port for it."""

    def __init__(self, *_: object) -> None:
        self.lost = trio.Event()

    async def open(self) -> None:
        await trio.lowlevel.checkpoint()

    async def listen(self, _nursery: trio.Nursery) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    def close(self) -> None:
        pass


async def failure_of(tmp_path: Path, demo_path: Path, protocol: str | None) -> SplitFailed | None:
    """Of a split over another node, where this one's llama-server works with rpc-servers of `protocol`."""
    header = read_header(demo_path)
    model = ModelFile(name="m", parts=(demo_path,), size_bytes=1, header=header)
    mesh: Any = SimpleNamespace(open_service=print)
    setting = SplitSetting(
        mesh=mesh,
        binary=Binary(path=tmp_path / "none", version="", rpc_protocol=protocol, origin="PATH"),
        model=model,
        shape=shape_of([header], await model_digest(model.parts), 4096),
        log=tmp_path / "log",
        own_devices=(),
        slots=4,
    )
    home, worker = (Share(peer=peer, layers=2, weights=1, granted=1 << 30) for peer in ("home", "worker"))
    placement = Placement(host="home", home=home, workers=(worker,), tokens_per_second=1.0)
    return await SplitRun(setting, placement, {"home": 1 << 30, "worker": 1 << 30}, {}, lambda: None).run()


async def test_split_that_gets_no_port_fails_and_says_why(
    tmp_path: Path, demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(split_run, "Borrowed", Worker)
    failure = await failure_of(tmp_path, demo_path, "7.0.0")
    assert isinstance(failure, SplitFailed)
    assert "Too many open files" in str(failure)
    assert not failure.peer


async def test_a_host_whose_programs_do_not_work_together_blames_itself(
    tmp_path: Path, demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it leaves the model to another host after a few tries; the workers' refusal would be theirs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(split_run, "Borrowed", Worker)
    failure = await failure_of(tmp_path, demo_path, None)
    assert str(failure) == "this machine's llama-server does not work together with its rpc-server"
    assert failure is not None
    assert not failure.peer


def test_a_long_context_has_room_for_what_llama_server_computes_with_it(tmp_path: Path) -> None:
    """Measured with RPC protocol 7.0.0: llama.cpp took 44 MB besides weights and cache at 32768 tokens, and 19 were asked for."""
    path, context = tmp_path / "small.gguf", 32768
    write_model(path, SMALL, 7)
    shape = shape_of([read_header(path)], "", 4096)
    cache = sum(shape.kv_per_token[:4])
    share = Share(peer="worker", layers=4, weights=sum(shape.layers[:4]), granted=0, kv_per_token=cache)
    asked = split_run._memory(share, context, shape)
    assert asked >= share.weights + cache * context + 44_314_624
    setting, placement = split_of(path, shape, share)
    context_of = partial(split_run.reckon, setting, placement, held={})
    assert context_of({"home": 1 << 40, "worker": 2 * asked})[1]["worker"] == asked
    assert context_of({"home": 1 << 40, "worker": 2 * asked})[0] == context
    assert context_of({"home": 1 << 40, "worker": 2 * asked - 2})[0] == context - 256


def test_a_split_for_which_half_of_a_machine_is_enough_leaves_the_other_half(tmp_path: Path) -> None:
    """To the one that replaces it; one that needs more has all of it."""
    write_model(path := tmp_path / "small.gguf", SMALL, 7)
    shape = shape_of([read_header(path)], "", 4096)
    share = Share(peer="worker", layers=4, weights=1, granted=0, kv_per_token=sum(shape.kv_per_token[:4]))
    least = split_run._memory(share, 4096, shape)
    setting, placement = split_of(path, shape, share)
    context, taken = split_run.reckon(setting, placement, {"home": 1 << 40, "worker": 2 * least}, {})
    assert (context, taken["worker"]) == (4096, least)
    context, taken = split_run.reckon(setting, placement, {"home": 1 << 40, "worker": 2 * least - 2}, {})
    assert context > 6144
    assert 1.5 * least < taken["worker"] < 2 * least


def split_of(path: Path, shape: ModelShape, share: Share) -> tuple[Any, Placement]:
    """Over a worker, and a home that is like it."""
    setting = SimpleNamespace(model=SimpleNamespace(header=read_header(path)), shape=shape, slots=4)
    home = replace(share, peer="home")
    return setting, Placement(host="home", home=home, workers=(share,), tokens_per_second=1.0)


def test_a_split_beside_another_has_what_that_leaves_or_waits(tmp_path: Path) -> None:
    """It waits unless a request may have as long a context as now, or as it would have with all memory."""
    write_model(path := tmp_path / "small.gguf", SMALL, 7)
    shape = shape_of([read_header(path)], "", 4096)
    share = Share(peer="worker", layers=4, weights=1, granted=0, kv_per_token=sum(shape.kv_per_token[:4]))
    least = split_run._memory(share, 4096, shape)
    setting, placement = split_of(path, shape, share)
    memory = {"home": 1 << 40, "worker": 8 * least}
    room = partial(split_run.fits_beside, shape, placement, memory)
    whole, taken = split_run.reckon(setting, placement, memory, {})
    assert 3 * least < taken["worker"] <= 4 * least
    squeezed, taken = split_run.reckon(setting, placement, memory, {"worker": 6 * least})
    assert 4096 < squeezed < whole
    assert taken["worker"] <= 2 * least
    assert room({}, whole)
    assert room({"worker": 7 * least, "another": 1 << 50}, 4096)
    assert split_run.reckon(setting, placement, memory, {"worker": 7 * least})[1]["worker"] == least
    assert not room({"worker": 7 * least + 1}, 4096)
    assert room({"worker": 6 * least}, squeezed)
    assert not room({"worker": 6 * least}, whole)
    assert not room({"worker": 6 * least}, 1 << 40)
    assert room({"worker": 4 * least}, 1 << 40)
