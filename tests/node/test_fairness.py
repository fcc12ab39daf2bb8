"""Two nodes ask one server. One of them asks for all that it can get."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from libmesh_node.models import demo

from tests.node.nodes import PATIENCE, Machine, Node

pytestmark = [pytest.mark.llama, pytest.mark.slow]

LANES = 24
TURNS = 6


def ask(node: Node, tokens: int) -> int:
    """The status of one request."""
    body = {"model": "shared", "prompt": "Once", "max_tokens": tokens}
    return httpx.post(f"{node.api}/v1/completions", json=body, timeout=3 * PATIENCE).status_code


def test_modest_node_is_served_while_a_greedy_one_takes_all_it_can(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "shared.gguf"
    demo.write_model(path, demo.SMALL, seed=5, name="shared")
    machine.node("--model", str(path), "--invite-file", str(machine.invite_file), name="server").ready()
    greedy, modest = machine.joining("--client", name="greedy"), machine.joining("--client", name="modest")
    for client in (greedy, modest):
        client.sees("shared")
    stop = threading.Event()
    taken: Counter[int] = Counter()

    def take(_: int) -> None:
        while not stop.is_set():
            taken[ask(greedy, 40)] += 1

    with ThreadPoolExecutor(LANES) as pool:
        lanes = [pool.submit(take, lane) for lane in range(LANES)]
        try:
            while taken.total() < LANES:
                stop.wait(0.1)
            begun = taken.total()
            assert {ask(modest, 40) for _ in range(TURNS)} == {200}
            meanwhile = taken.total() - begun
        finally:
            stop.set()
        for lane in lanes:
            lane.result()
    assert set(taken) <= {200, 429}
    # The modest one waits for what is at the server when it comes, and not for what waits before it.
    assert meanwhile < LANES * TURNS
