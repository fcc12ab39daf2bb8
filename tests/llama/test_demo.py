from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from libmesh_node.llama.engine import Engine
from libmesh_node.llama.gguf import read_header
from libmesh_node.llama.server import DEMO_TOKENS, plan_server
from libmesh_node.llama.supervisor import LlamaServer
from libmesh_node.models.demo import MEDIUM, SMALL, TINY, ModelShape, demo_model, write_model
from libmesh_node.models.reference import open_model

from tests.llama.processes import request

DEMO_SHA256 = "10e2079256bc757319e77847628ed611c2d04aa52e6f0cf85feec5fcd91a0ee7"
"""Two nodes that each made the demo model share requests only if it is the same; so this changes only on purpose."""


def test_demo_model_is_the_same_everywhere(tmp_path: Path) -> None:
    path = demo_model(tmp_path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == DEMO_SHA256
    assert path.stat().st_size < 4_000_000


def test_demo_model_is_made_once(tmp_path: Path) -> None:
    path = demo_model(tmp_path)
    before = path.stat()
    assert demo_model(tmp_path).stat() == before
    assert [file.name for file in path.parent.iterdir()] == ["demo.gguf"]


def test_seed_makes_another_model(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_model(tmp_path / f"{name}.gguf", TINY, seed, name="same")
    a, b, c = ((tmp_path / f"{name}.gguf").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("shape", [TINY, SMALL])
def test_header_tells_the_shape(tmp_path: Path, shape: ModelShape) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, shape, 1)
    header = read_header(path)
    assert (header.n_layers, header.embedding_length, header.vocabulary) == (
        shape.layers,
        shape.width,
        shape.vocabulary,
    )
    last = header.tensors[-1]
    assert last.offset + last.size <= path.stat().st_size < last.offset + last.size + 32


@pytest.mark.slow
def test_medium_model_has_tensors_that_rpc_treats_as_large(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, MEDIUM, 1)
    large = [tensor for tensor in read_header(path).tensors if tensor.size > 10 << 20]
    assert path.stat().st_size > 400_000_000
    assert len(large) >= 16


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"kv_heads": 3}, {"vocabulary": 399}, {"vocabulary": 4097}])
def test_impossible_shape_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="|".join(map(str, wrong.values()))):
        replace(TINY, **wrong)


@pytest.mark.llama
class TestServed:
    """By the real llama-server."""

    @pytest.fixture
    async def url(self, engine: Engine, demo_path: Path, tmp_path: Path) -> Any:
        model = open_model(demo_path, is_demo=True)
        plan = replace(plan_server(model, memory_bytes=1 << 30), threads=1)
        binary = engine.require_llama_server()
        server = LlamaServer(binary, plan, log=tmp_path / "log", environment=os.environ)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            with trio.fail_after(60):
                await server.wait_settled()
            yield server.base_url
            nursery.cancel_scope.cancel()

    async def test_text_is_readable_at_any_temperature(self, url: str) -> None:
        for temperature in (0, 0.8, 5):
            body = {"prompt": "tell me", "max_tokens": 400, "temperature": temperature}
            body |= {"top_k": 0, "top_p": 1, "min_p": 0, "seed": 1}
            answer = await trio.to_thread.run_sync(request, f"{url}/v1/completions", body)
            said = answer["choices"][0]["text"]
            assert said.isascii()
            assert said.isprintable()
            assert " " in said
            assert answer["usage"]["completion_tokens"] == 400

    async def test_answer_without_a_limit_ends(self, url: str) -> None:
        body = {"messages": [{"role": "user", "content": "Hello, wörld ☃"}]}
        answer = await trio.to_thread.run_sync(request, f"{url}/v1/chat/completions", body)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == DEMO_TOKENS

    async def test_same_request_has_the_same_greedy_answer(self, url: str) -> None:
        body = {"prompt": "again", "max_tokens": 50, "temperature": 0, "cache_prompt": False}
        answers = [await trio.to_thread.run_sync(request, f"{url}/v1/completions", body) for _ in range(2)]
        assert answers[0]["choices"][0]["text"] == answers[1]["choices"][0]["text"]

    async def test_embeddings_are_there_too(self, url: str) -> None:
        body = {"model": "demo", "input": ["one", "another"]}
        answer = await trio.to_thread.run_sync(request, f"{url}/v1/embeddings", body)
        first, second = (entry["embedding"] for entry in answer["data"])
        assert len(first) == len(second) == TINY.width
        assert first != second
