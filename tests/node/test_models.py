"""Several models on several nodes: each reachable from everywhere, none ever mistaken for another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from libmesh_node.models.demo import demo_model

from tests.node.conftest import HeldServer
from tests.node.nodes import PATIENCE, Machine, chat, llama, served, tokens_made

pytestmark = pytest.mark.llama


def test_two_models_on_two_nodes_are_never_confused(machine: Machine, small_model: Path) -> None:
    first = machine.serving()
    second = machine.joining("--model", str(small_model)).ready()
    owners = {"demo": first, "second": second}
    ids = {name: node.node_id for name, node in owners.items()}
    for node in (first, second):
        node.sees("demo", "second")
    assert llama(first, "/props").json()["model_path"].endswith("demo.gguf")
    assert llama(second, "/props").json()["model_path"] == str(small_model)

    questions = [(node, name) for _ in range(5) for node in (first, second) for name in owners]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda question: chat(*question), questions))
    for (_, name), answer in zip(questions, answers, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == name
        assert answer.headers["X-Libmesh-Node"] == ids[name]

    before = tokens_made(first)
    for node in (first, second):
        assert chat(node, "second", tokens=7).json()["usage"]["completion_tokens"] == 7
    assert tokens_made(first) == before, "the first model's server took part in requests for the second"


def test_model_of_two_nodes_outlives_one_of_them(machine: Machine) -> None:
    """The same bytes are the same model: requests go on at the node that stays."""
    first = machine.serving()
    second = machine.joining("--model", "demo").ready()
    status = second.until(lambda status: status["mesh_models"][0]["node_count"] == 2)
    assert len({server["peer"] for server in status["models"][0]["servers"]}) == 2
    second_id = second.node_id
    first.ends(lambda: first.run("stop"))
    answer = chat(second)
    assert answer.status_code == 200
    assert answer.headers["X-Libmesh-Node"] == second_id


def test_joiner_answers_through_the_mesh_before_its_own_model_is_loaded(
    machine: Machine, small_model: Path, held_server: HeldServer
) -> None:
    machine.serving()
    joiner = machine.joining("--model", str(small_model), "--bin-dir", str(held_server.folder)).sees("demo")
    assert chat(joiner).status_code == 200
    status = joiner.status()
    assert served(status) == {"demo"}
    assert status["llama_ready"] is False
    held_server.open()
    joiner.sees("demo", "second")
    assert chat(joiner, "second", tokens=1).json()["model"] == "second"


def test_request_for_a_model_that_is_still_loading_waits_for_it(
    machine: Machine, small_model: Path, held_server: HeldServer
) -> None:
    node = machine.node("--model", str(small_model), "--bin-dir", str(held_server.folder)).up()
    node.until(lambda status: any(model["coming"] for model in status["models"]))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(chat, node, "second")
        (model,) = node.until(lambda status: status["models"][0]["waiting"])["models"]
        assert (model["servers"], model["wanted"]) == ([], True)
        held_server.open()
        assert answer.result(PATIENCE).status_code == 200


def test_a_draft_changes_the_speed_and_not_the_answer(machine: Machine) -> None:
    """The demo model guesses for itself, so all that it guesses is right."""
    plain = machine.serving()
    drafted = machine.node("--model", "demo", "--draft", str(demo_model()), "--draft-max", "4").ready()
    answers = [
        httpx.post(
            f"{node.api}/v1/chat/completions",
            json={
                "model": "demo",
                "max_tokens": 20,
                "temperature": 0,
                "messages": [{"role": "user", "content": "Hello?"}],
            },
            timeout=60,
        ).json()
        for node in (plain, drafted)
    ]
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts[0] == texts[1]
    assert answers[1]["timings"]["draft_n"] > 0
    assert answers[1]["timings"]["draft_n_accepted"] > 0


def test_a_draft_that_does_not_exist_is_named(machine: Machine) -> None:
    node = machine.node("--model", "demo", "--draft", "/nowhere/d.gguf")
    assert "There is no file /nowhere/d.gguf" in node.fails()
