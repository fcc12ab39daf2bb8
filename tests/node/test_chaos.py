"""Nodes are killed while they answer. Who asks a node that stays notices nothing but a pause."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from libmesh_node.models import demo

from tests.node.nodes import PATIENCE, Machine, Node, wait_for

pytestmark = pytest.mark.llama

STREAMS = 32
TOKENS = 120
SERVERS = 3
SECONDS = 60.0
KILL_EVERY = 6.0


def question(model: str, number: int, tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "stream": True,
        "temperature": 0,
        "max_tokens": tokens,
        "messages": [{"role": "user", "content": f"Question {number}: what is {number} times {number}?"}],
        "stream_options": {"include_usage": True},
    }


def ask(
    node: Node,
    model: str,
    number: int,
    tokens: int,
    at_chunk: Callable[[int, str], None] = lambda count, server: None,
) -> str:
    """One streamed answer, whole and well-formed, or an assertion. `at_chunk` is told each chunk and who began it."""
    text, ids, roles, reasons, usage, done = "", set(), 0, [], None, False
    request = question(model, number, tokens)
    with httpx.stream("POST", f"{node.api}/v1/chat/completions", json=request, timeout=180) as answer:
        assert answer.status_code == 200, answer.read()
        for count, line in enumerate(answer.iter_lines()):
            at_chunk(count, answer.headers["X-Libmesh-Node"])
            if not line.startswith("data: "):
                assert line == "" or line.startswith(":"), line
                continue
            assert not done
            if line == "data: [DONE]":
                done = True
                continue
            value = json.loads(line.removeprefix("data: "))
            assert "error" not in value, value
            ids.add(value["id"])
            usage = value.get("usage") or usage
            for choice in value["choices"]:
                roles += "role" in choice["delta"]
                text += choice["delta"].get("content") or ""
                reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert done, "the stream ended without its end"
    assert (len(ids), roles, len(reasons)) == (1, 1, 1)
    assert usage is not None
    assert usage["completion_tokens"] <= tokens
    return text


def test_greedy_text_that_went_on_elsewhere_is_the_unbroken_one(machine: Machine, tmp_path: Path) -> None:
    """One stream at a time: llama.cpp rounds otherwise when it computes several together."""
    path, tokens = (
        tmp_path / "slow.gguf",
        60,
    )  # a model so large that its server is still at it when it is killed
    demo.write_model(path, demo.MEDIUM, seed=3, name="slow")
    invite = ("--invite-file", str(machine.invite_file))
    first = machine.node("--model", str(path), *invite, name="first").ready()
    second = machine.joining("--model", str(path), name="second").ready()
    client = machine.joining("--client", name="client").sees("slow")
    client.until(lambda status: status["mesh_models"][0]["node_count"] == 2)
    unbroken = ask(client, "slow", 1, tokens)
    by_id = {node.node_id: node for node in (first, second)}

    def kill(count: int, server: str) -> None:
        if count == 10:
            by_id[server].kill()

    assert ask(client, "slow", 1, tokens, kill) == unbroken
    assert "looking for a server that goes on" in client.words


@pytest.mark.slow
def test_node_that_is_told_to_end_hands_its_answers_over(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "steady.gguf"
    demo.write_model(path, demo.SMALL, seed=4, name="steady")
    invite = ("--invite-file", str(machine.invite_file))
    first = machine.node("--model", str(path), *invite, name="first").ready()
    second = machine.joining("--model", str(path), name="second").ready()
    client = machine.joining("--client", name="client").sees("steady")
    client.until(lambda status: status["mesh_models"][0]["node_count"] == 2)
    by_id = {node.node_id: node for node in (first, second)}
    ended: list[Node] = []

    def end(count: int, server: str) -> None:
        if count == 10:
            ended.append(by_id[server])
            threading.Thread(target=by_id[server].ends, args=[signal.SIGTERM]).start()

    ask(client, "steady", 1, 800, end)
    wait_for(lambda: ended[0].process.poll() is not None, PATIENCE, "the end")
    assert "finishing what is being answered" in ended[0].words
    assert "looking for a server that goes on" in client.words


@pytest.mark.slow
def test_streams_survive_the_death_of_one_server_after_another(machine: Machine) -> None:
    names = [f"server{index}" for index in range(SERVERS)]
    first = machine.serving(name=names[0])
    servers = {names[0]: first}
    for name in names[1:]:
        servers[name] = machine.joining("--model", "demo", name=name)
    client = machine.joining("--client", name="client").sees("demo")
    client.until(lambda status: status["mesh_models"][0]["node_count"] == SERVERS)
    stop = threading.Event()
    answers: list[str] = []

    def stream(lane: int) -> None:
        number = lane
        while not stop.is_set():
            answers.append(ask(client, "demo", number, TOKENS))
            number += 1

    with ThreadPoolExecutor(STREAMS) as pool:
        lanes = [pool.submit(stream, lane) for lane in range(STREAMS)]
        try:
            deadline, victim = time.monotonic() + SECONDS, 0
            while time.monotonic() < deadline:
                time.sleep(KILL_EVERY)
                name = names[victim % SERVERS]
                servers[name].kill()
                servers[name] = machine.node("--model", "demo", name=name)
                servers[name].ready()
                victim += 1
        finally:
            stop.set()
        for lane in lanes:
            lane.result()
    assert victim >= 3
    assert len(answers) >= STREAMS
    assert "looking for a server that goes on" in client.words
