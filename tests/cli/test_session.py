"""What a session offers to the mesh, in a real one, in virtual time."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from libmesh_node import session as session_module
from libmesh_node.announced import NodeStatus
from libmesh_node.datadir import DataDir
from libmesh_node.door import Door
from libmesh_node.entries import Entry
from libmesh_node.llama.load import IDLE, UNABLE
from libmesh_node.llama.server import plan_server
from libmesh_node.models.reference import open_model
from libmesh_node.options import NodeOptions
from libmesh_node.serving import LocalModels
from libmesh_node.session import RETRY_AFTER, Session

from tests.town import town, until


class Ready:
    """In place of a llama-server that answers."""

    def __init__(self, plan: Any) -> None:
        self.plan, self.load, self.base_url = plan, IDLE, "http://127.0.0.1:1"
        self.abilities = UNABLE


async def test_model_that_could_not_be_offered_for_want_of_a_port_is_offered_later(
    tmp_path: Path, demo_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    run, tries = Door.run, []

    async def first_without_a_port(self: Door, *, task_status: trio.TaskStatus[None]) -> None:
        tries.append(trio.current_time())
        if len(tries) <= 2:
            raise OSError(errno.EMFILE, "Too many open files")
        await run(self, task_status=task_status)

    monkeypatch.setattr(session_module.Door, "run", first_without_a_port)
    options = NodeOptions(data_dir=tmp_path)
    models = LocalModels(options, DataDir(tmp_path), lambda: None)
    model = open_model(demo_path)
    entry = Entry(model, (model.header,), plan_server(model, memory_bytes=1 << 30), alone=True)
    entry.servers[:] = [Ready(entry.plan)]  # type: ignore[list-item]
    models.entries[model.name] = entry
    async with town() as place:
        ours, other = await place.of(2)
        session = Session(ours, models, options, lambda: None, NodeStatus, lambda _who, _what: None)

        def offered() -> bool:
            peer = other.view.get(ours.peer)
            return peer is not None and f"api/{model.name}" in {service.name for service in peer.services}

        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            await until(offered)
            nursery.cancel_scope.cancel()
    assert [later - tries[0] for later in tries] == pytest.approx([0, RETRY_AFTER, 2 * RETRY_AFTER])
