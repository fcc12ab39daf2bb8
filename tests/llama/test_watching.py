"""Real llama-servers that go on running and are of no use: one that stands still, one whose draft makes it slower."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
import trio
from libmesh_node.llama import drafting, supervisor
from libmesh_node.llama.engine import Engine
from libmesh_node.llama.server import DraftPlan, ServerPlan, plan_server
from libmesh_node.llama.supervisor import LlamaServer
from libmesh_node.models.demo import SMALL, write_model
from libmesh_node.models.reference import open_model

from tests.llama.processes import eventually, request

pytestmark = [pytest.mark.llama, pytest.mark.slow]


@pytest.fixture
def plan(tmp_path: Path) -> ServerPlan:
    path = tmp_path / "small.gguf"
    write_model(path, SMALL, 7)
    return replace(plan_server(open_model(path), memory_bytes=1 << 30), threads=1)


def server(
    engine: Engine, plan: ServerPlan, folder: Path, stalled_after: float = supervisor.STALLED_AFTER
) -> LlamaServer:
    return LlamaServer(
        engine.require_llama_server(),
        plan,
        log=folder / "log",
        environment=os.environ,
        stalled_after=stalled_after,
    )


async def test_a_server_that_stands_still_is_replaced(
    engine: Engine, plan: ServerPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process lives, and its port is open: nothing but the lack of any sign of life tells."""
    monkeypatch.setattr(supervisor, "LOAD_POLL", 0.05)
    monkeypatch.setattr(supervisor, "POLL_LIMIT", 0.5)
    running = server(engine, plan, tmp_path, stalled_after=4.0)
    seen: list[str] = []
    running._on_change = lambda process: seen.append(process.failure)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(running.run)
        await running.wait_settled()
        first = running.process.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        await eventually(
            lambda: running.process.status == "ready" and running.process.pid not in (None, first)
        )
        nursery.cancel_scope.cancel()
    assert "it stood still for 4 s, and was ended" in seen


async def test_a_draft_that_makes_a_server_slower_is_given_up(
    engine: Engine, plan: ServerPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft is as large as the model, and never right."""
    monkeypatch.setattr(supervisor, "LOAD_POLL", 0.05)
    monkeypatch.setattr(drafting, "LEAST_STEPS", 20)
    other = tmp_path / "other.gguf"
    write_model(other, SMALL, 9)
    running = server(engine, replace(plan, draft=DraftPlan(path=other)), tmp_path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(running.run)
        await running.wait_settled()
        first = running.process.pid
        asked = {"prompt": "Once", "n_predict": 60, "temperature": 0, "cache_prompt": False}
        answers: list[Any] = []
        with trio.fail_after(120):
            while not answers or running.process.pid == first:
                with suppress(OSError, HTTPException):  # it may be ended between two answers
                    url = f"http://127.0.0.1:{running.process.port}/completion"
                    answers.append(await trio.to_thread.run_sync(request, url, asked))
                with suppress(trio.TooSlowError):  # it tries out what steps cost when nobody asks
                    await eventually(lambda: running.process.pid != first, limit=5)
        await eventually(
            lambda: running.process.status == "ready" and running.process.pid not in (None, first)
        )
        again = await trio.to_thread.run_sync(request, f"{running.base_url}/completion", asked)
        nursery.cancel_scope.cancel()
    assert "draft_n" not in again["timings"]
    assert answers[0]["timings"]["draft_n"] > 0
    assert again["content"] == answers[0]["content"]
    assert running.process.restarts == 0
