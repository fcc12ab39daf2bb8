"""A node's own models while they come and go: what fails, and what fits. The servers are programs of the system, or none."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from libmesh_node import serving
from libmesh_node.datadir import DataDir
from libmesh_node.entries import Entry
from libmesh_node.errors import NodeError
from libmesh_node.llama.engine import Binary, Engine
from libmesh_node.llama.restart import RestartConfig, RestartPolicy
from libmesh_node.llama.server import plan_server
from libmesh_node.llama.supervisor import LlamaServer
from libmesh_node.models.reference import open_model
from libmesh_node.options import NodeOptions
from libmesh_node.serving import LocalModels


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
