"""A node's own models while they come and go: what fails, and what fits. The servers are programs of the system, or none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import trio
import trio.testing
from libmesh_node import serving
from libmesh_node.commands.load import MAKING_ROOM
from libmesh_node.datadir import DataDir
from libmesh_node.entries import Entry, least_context
from libmesh_node.errors import NodeError
from libmesh_node.finishing import finish
from libmesh_node.llama.engine import Binary, Engine
from libmesh_node.llama.gguf import GgufHeader, TensorInfo
from libmesh_node.llama.load import IDLE, UNABLE, Abilities
from libmesh_node.llama.restart import RestartConfig, RestartPolicy
from libmesh_node.llama.server import MAX_CONTEXT, ServerPlan, plan_server
from libmesh_node.llama.supervisor import LlamaServer
from libmesh_node.models.reference import ModelFile, open_model
from libmesh_node.options import NodeOptions
from libmesh_node.placement.demand import Take
from libmesh_node.placement.shape import shape_of
from libmesh_node.placement.splitting import needed
from libmesh_node.runtime import Runtime, status_of
from libmesh_node.serving import LocalModels
from libmesh_node.snapshot import Process
from libmesh_node.standby import Standby

from libmesh import PeerId


def local_models(folder: Path, program: str) -> LocalModels:
    """Models whose llama-server is another program."""
    models = LocalModels(NodeOptions(data_dir=folder), DataDir(folder), lambda: None)
    binary = Binary(path=Path(program), version="", rpc_protocol=None, origin="PATH")
    models.equipment.engine = Engine(llama_server=binary, rpc_server=None)
    return models


def entry_of(models: LocalModels, path: Path) -> Entry:
    model = open_model(path)
    plan = plan_server(model, memory_bytes=1 << 30)
    entry = models.entries[model.name] = Entry(model, (model.header,), plan, alone=True)
    return entry


async def test_model_whose_server_failed_for_good_is_unloaded(
    tmp_path: Path, demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = partial(LlamaServer, policy=RestartPolicy(RestartConfig(failures=1)))
    monkeypatch.setattr(serving, "LlamaServer", once)
    models = local_models(tmp_path, "/bin/false")
    entry = entry_of(models, demo_path)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(models.run)
            await trio.testing.wait_all_tasks_blocked()
            await entry.servers[0].wait_settled()
            assert entry.failed
            assert [process.status for process in models.processes] == ["failed"]
            await models.unload(entry.name)
            nursery.cancel_scope.cancel()
    assert models.entries == {}


async def test_nothing_is_loaded_before_what_the_command_line_names(tmp_path: Path, demo_path: Path) -> None:
    models = local_models(tmp_path, "/bin/false")
    with pytest.raises(NodeError, match="still starting"):
        await models.load(open_model(demo_path), named=True)
    assert models.entries == {}


GB = 10**9


def large(name: str, size: int) -> ModelFile:
    """A model of 32 layers, with a cache of 128 KiB for each token."""
    tensors = tuple(TensorInfo(f"blk.{layer}.w", (1,), 0, 0, size // 32) for layer in range(32))
    header = GgufHeader(
        architecture="llama", name=name, context_length=131_072, n_layers=32, embedding_length=4096,
        vocabulary=1000, heads=32, kv_heads=(8,) * 32, key_length=128, value_length=128, quantisation="Q4",
        expert_count=0, pooling=None, has_chat_template=True, split_no=0, split_count=0, tensors=tensors, values={},
    )  # fmt: skip
    return ModelFile(name=name, parts=(Path(f"/{name}"),), size_bytes=size, header=header)


class Server:
    """In place of a llama-server: it runs at once, or after `loads` seconds, and has nothing to do before `busy_until`."""

    running: ClassVar[list[ServerPlan]] = []
    loads: ClassVar[float] = 0.0
    busy_until: ClassVar[dict[str, float]] = {}

    def __init__(self, _binary: object, plan: ServerPlan, **_: object) -> None:
        self.plan, self.load, self.abilities = plan, IDLE, UNABLE
        status = "loading" if self.loads else "ready"
        self.process = Process(name="llama-server", pid=1, port=1, model=plan.model.name, status=status)
        self._settled = trio.Event()

    @property
    def base_url(self) -> str | None:
        return "http://127.0.0.1:1" if self.process.status == "ready" else None

    async def is_busy(self) -> bool:
        return trio.current_time() < self.busy_until.get(self.plan.model.name, 0.0)

    async def wait_settled(self) -> Process:
        await self._settled.wait()
        return self.process

    def _becomes(self, status: str) -> None:
        self.process = replace(self.process, status=status)
        self._settled.set()

    async def run(self) -> None:
        self.running.append(self.plan)
        try:
            await trio.sleep(self.loads)
            self._becomes("ready")
            await trio.sleep_forever()
        finally:
            self._becomes("stopping")
            self.running.remove(self.plan)


@asynccontextmanager
async def sixteen_gb(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *named: ModelFile
) -> AsyncIterator[LocalModels]:
    """A machine that serves the models that `--model` named."""
    monkeypatch.setattr(serving, "LlamaServer", Server)
    models = local_models(folder, "/bin/false")
    models._options = replace(models._options, models=tuple(model.name for model in named))
    models.equipment.memory_bytes = 16 * GB

    async def ready(*_: object) -> None:
        await trio.lowlevel.checkpoint()

    async def find(reference: str) -> ModelFile:
        return next(model for model in named if model.name == reference)

    async def at_once(function: Callable[..., Any], *arguments: object, **_: object) -> Any:
        """The clock does not wait for threads."""
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)
    for what, how in (("measure", ready), ("set_up", ready)):
        monkeypatch.setattr(models.equipment, what, how)
    monkeypatch.setattr(models, "find", find)
    monkeypatch.setattr(models, "_identify", ready)
    await models.prepare()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(models.run)
        await trio.testing.wait_all_tasks_blocked()
        yield models
        nursery.cancel_scope.cancel()


def taken() -> int:
    """By weights and caches."""
    caches = ((plan, plan.model.header.kv_bytes_per_token(plan.cache.block_bytes)) for plan in Server.running)
    return sum(plan.model.size_bytes + plan.context * per_token for plan, per_token in caches)


async def test_one_model_has_a_long_context_and_gives_of_it_to_another_that_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    first, second = large("first", 5 * GB - 1), large("second", 5 * GB - 1)
    async with sixteen_gb(tmp_path, monkeypatch, first) as models:
        (alone,) = Server.running
        assert alone.context == MAX_CONTEXT
        need = await models.need_of(second)
        assert models.spare_bytes < need < models.room_bytes
        await models.squeeze(need)
        entry = await models.load(second, named=True)
        assert entry.alone
        await trio.sleep(1)
        assert {plan.model.name: plan.context < MAX_CONTEXT for plan in Server.running} == {
            "first": True,
            "second": True,
        }
        assert taken() <= 16 * GB


async def test_what_would_not_make_room_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with sixteen_gb(tmp_path, monkeypatch, large("first", 5 * GB - 1)) as models:
        before = list(Server.running)
        await models.squeeze(models.room_bytes + 1)
        await models.squeeze(models.spare_bytes)
        assert Server.running == before


@pytest.mark.parametrize(
    ("sizes", "fitting"),
    [((5, 5), 2), ((2, 11), 2), ((11, 2), 2), ((1, 1, 1, 9), 4), ((12, 5), 1), ((20, 5), 1)],
)
async def test_models_of_the_command_line_share_what_there_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
    sizes: tuple[int, ...],
    fitting: int,
) -> None:
    """All that fit by their needs are served, with what is left shared among them."""
    named = [large(f"m{at}", size * GB - 1) for at, size in enumerate(sizes)]
    async with sixteen_gb(tmp_path, monkeypatch, *named) as models:
        assert len(Server.running) == fitting
        assert taken() <= 16 * GB
        assert sum(entry.home_bytes for entry in models.entries.values()) <= 16 * GB


async def test_loading_never_takes_more_than_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """As a standby does: one after the other, until nothing fits."""
    async with sixteen_gb(tmp_path, monkeypatch) as models:
        for number in range(20):
            model = large(f"m{number}", 3 * GB)
            await models.squeeze(await models.need_of(model))
            with suppress(NodeError):  # it does not fit
                await models.load(model, named=False)
            await trio.sleep(1)
            assert taken() <= 16 * GB
            assert sum(entry.home_bytes for entry in models.entries.values()) <= 16 * GB
        assert len(models.entries) == len(Server.running) == 4


async def test_what_splits_have_of_a_machine_is_not_there_for_a_model_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Whoever hosts them. It is taken by nobody again when they have ended."""
    async with sixteen_gb(tmp_path, monkeypatch) as models:
        shared = await models.load(large("shared", 20 * GB), named=True)
        shared.split_bytes, shared.lent_bytes = 6 * GB, 4 * GB
        await models.squeeze(7 * GB)
        with pytest.raises(NodeError, match="does not fit into the memory that is left"):
            await models.load(large("m", 7 * GB), named=False)
        assert not (await models.load(large("named", 7 * GB), named=True)).alone
        assert (await models.load(large("less", 5 * GB), named=False)).alone
        shared.split_bytes = shared.lent_bytes = 0
        assert (await models.load(large("m", 7 * GB), named=False)).alone


def operator(models: LocalModels, *on_disk: ModelFile) -> tuple[Standby, Runtime]:
    """Who takes models for the mesh, and who does as the operator says; both know the models of the disk."""

    async def find(reference: str) -> ModelFile:
        return next(model for model in on_disk if model.name == reference)

    models.find = find  # type: ignore[method-assign]
    shelf: Any = SimpleNamespace(models={model.name: held(model, models) for model in on_disk})
    standby = Standby(PeerId("me"), models, shelf, models._options, lambda: None, lambda: None)
    return standby, Runtime(models, shelf, standby, models._options)


def held(model: ModelFile, models: LocalModels) -> SimpleNamespace:
    need = needed(shape_of((model.header,), "", least_context(model)))
    return SimpleNamespace(model=model, digest=model.name, needed=need, context=1)


async def test_a_model_that_made_room_while_it_was_loading_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(Server, "loads", 30.0)
    taken_, loaded = large("taken", 3 * GB - 1), large("loaded", 8 * GB - 1)
    async with sixteen_gb(tmp_path, monkeypatch) as models, trio.open_nursery() as nursery:
        standby, runtime = operator(models, taken_, loaded)
        nursery.start_soon(standby._take, Take("taken", (), urgent=True))
        await trio.sleep(5)
        first = models.entries["taken"].servers[0]
        await runtime.load("loaded")
        await trio.sleep(300)
        assert models.entries["taken"].servers[0] is not first
        assert [model.ready for model in models.announced] == [True, True]
        assert not any(one.refused for one in standby.on_disk())


async def test_a_model_that_does_not_fit_beside_the_others_has_half_of_what_they_can_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """As one has that does not fit the machine: it will be split, and this node's part in it is of that half."""
    first, second = large("first", 4 * GB - 1), large("second", 11 * GB - 1)
    async with sixteen_gb(tmp_path, monkeypatch, first) as models:
        half = (models.spare_bytes + models.room_bytes) // 2
        assert models.spare_bytes < half
        _, runtime = operator(models, second)
        answer = await runtime.load("second")
        assert not answer["alone"]
        assert models.spare_bytes >= half


async def test_a_model_that_has_nothing_to_give_is_not_started_again_to_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """There would be room if another one, which is being unloaded, were gone."""
    least, leaves = large("least", 5 * GB - 1), large("leaves", 5 * GB - 1)
    async with sixteen_gb(tmp_path, monkeypatch, least, leaves) as models, trio.open_nursery() as nursery:
        await models.squeeze(models.room_bytes)
        assert all(entry.home_bytes == entry.needed for entry in models.entries.values())
        entry = models.entries["leaves"]
        entry.plan = models.equipment.plan(leaves, entry.needed + models.spare_bytes)
        monkeypatch.setitem(Server.busy_until, "leaves", trio.current_time() + 100)
        nursery.start_soon(models.unload, "leaves")
        await trio.sleep(0.1)
        (before,) = models.entries["least"].servers
        assert models.spare_bytes < models.room_bytes
        await models.squeeze(models.room_bytes)
        assert models.entries["least"].servers == [before]


async def test_a_model_that_makes_room_is_coming_while_it_finishes_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with sixteen_gb(tmp_path, monkeypatch, large("first", 5 * GB - 1)) as models:
        monkeypatch.setitem(Server.busy_until, "first", trio.current_time() + 100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(models.squeeze, models.room_bytes)
            await trio.sleep(50)
            (told,) = models.announced
            assert not told.ready
            assert told.coming
            assert status_of(models.entries["first"]) == "restarting"
        assert models.announced[0].ready


async def test_several_that_make_room_finish_their_answers_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """So that whoever asked for a model is not left without an answer: `load` waits `MAKING_ROOM` seconds for it."""
    names = ("first", "second", "third")
    async with sixteen_gb(tmp_path, monkeypatch, *(large(name, 2 * GB - 1) for name in names)) as models:
        for name in names:
            monkeypatch.setitem(Server.busy_until, name, trio.current_time() + 10_000)
        need, before = models.room_bytes, trio.current_time()
        await models.squeeze(need)
        assert trio.current_time() - before < MAKING_ROOM
        assert models.spare_bytes >= need


async def test_a_model_of_a_node_that_ends_is_not_coming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with sixteen_gb(tmp_path, monkeypatch, large("first", 5 * GB - 1)) as models:
        await finish(models)
        (told,) = models.announced
        assert not told.ready
        assert not told.coming


async def test_a_model_that_is_about_to_sleep_is_loaded_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with sixteen_gb(tmp_path, monkeypatch, first := large("first", 5 * GB - 1)) as models:
        entry = models.entries["first"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(models.rest, entry)
            await trio.sleep(0.5)
            assert entry.leaving
            assert await models.load(first, named=True) is entry
        await trio.sleep(1)
        assert status_of(entry) == "ready"


async def test_what_a_model_takes_is_known_while_it_sleeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with sixteen_gb(tmp_path, monkeypatch, large("first", 5 * GB - 1)) as models:
        entry = models.entries["first"]
        entry.servers[0].abilities = Abilities(tools=True)
        assert await models.rest(entry)
        (told,) = models.announced
        assert (told.ready, told.coming, told.tools, told.vision) == (False, True, True, False)
