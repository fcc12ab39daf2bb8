from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from libmesh_node.llama.gguf import TensorInfo, read_header
from libmesh_node.models.demo import SMALL, write_model
from libmesh_node.placement.shape import shape_of


def test_every_tensor_is_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, SMALL, 1)
    header = read_header(path)
    shape = shape_of([header], "ab" * 32, 4096)
    assert shape.size == sum(tensor.size for tensor in header.tensors)
    assert len(shape.layers) == SMALL.layers
    assert len(set(shape.layers)) == 1
    assert shape.read == shape.layers
    assert shape.kv_per_token == (header.kv_bytes_per_token() // SMALL.layers,) * SMALL.layers
    assert shape.output == SMALL.vocabulary * SMALL.width * 2 + SMALL.width * 4
    assert not shape.recurrent


def test_tied_embeddings_are_needed_at_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, SMALL, 1)
    header = read_header(path)
    tied = replace(header, tensors=tuple(t for t in header.tensors if t.name != "output.weight"))
    shape = shape_of([tied], "ab" * 32, 4096)
    assert shape.output == shape.input + SMALL.width * 4


def test_a_token_touches_few_of_many_experts(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, SMALL, 1)
    header = read_header(path)
    experts = TensorInfo("blk.0.ffn_up_exps.weight", (1,), 0, 0, 8000)
    moe = replace(
        header,
        tensors=(experts,),
        expert_count=8,
        values={**header.values, f"{header.architecture}.expert_used_count": 2},
    )
    shape = shape_of([moe], "ab" * 32, 4096)
    assert (shape.layers[0], shape.read[0]) == (8000, 2000)


def test_a_large_model_has_a_smaller_cache(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, SMALL, 1)
    header = read_header(path)
    large = replace(header, tensors=(TensorInfo("blk.0.ffn_up.weight", (1,), 0, 0, 60 * 10**9),))
    small, saving = shape_of([header], "ab" * 32, 4096), shape_of([large], "ab" * 32, 4096)
    assert (small.cache.name, saving.cache.name) == ("f16", "q4_0")
    assert saving.kv * 64 == small.kv * 18


def test_a_model_with_a_state_is_known_by_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, SMALL, 1)
    header = read_header(path)
    state = replace(header, values={**header.values, "mamba.ssm.state_size": 16})
    assert shape_of([state], "ab" * 32, 4096).recurrent


@pytest.mark.parametrize("wide", [float("inf"), float("nan"), -1, "wide", (float("nan"), 1408, float("inf"))])
def test_a_width_that_is_no_number_counts_for_nothing(tmp_path: Path, wide: Any) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, SMALL, 1)
    header = read_header(path)
    key = f"{header.architecture}.feed_forward_length"
    strange = shape_of([replace(header, values={**header.values, key: wide})], "ab" * 32, 4096)
    known = {**header.values, key: 1408 if isinstance(wide, tuple) else 0}
    assert strange == shape_of([replace(header, values=known)], "ab" * 32, 4096)
