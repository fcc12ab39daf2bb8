"""A quantised model in several files, between the real programs: references name the file as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from libmesh_node.llama.engine import Engine
from libmesh_node.llama.rpc.weights import LearnedHashes, open_weights
from libmesh_node.models.demo import SMALL, write_model
from libmesh_node.models.reference import ModelFile, open_model

from tests.llama.rpc import ends

pytestmark = [pytest.mark.llama, pytest.mark.slow]

PARTS = 3


def in_parts(source: Path, folder: Path, kind: gguf.GGMLQuantizationType) -> ModelFile:
    """The model again, its matrices as `kind`, in `PARTS` files."""
    reader = gguf.GGUFReader(source)
    most = -(-len(reader.tensors) // PARTS)
    writer: Any = gguf.GGUFWriter(folder / "model.gguf", "llama", split_max_tensors=most)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            within = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], within)
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F16:
            packed = gguf.quants.quantize(tensor.data.astype(np.float32), kind)
            writer.add_tensor(tensor.name, packed, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_model(min(folder.glob("model-*.gguf")))


async def test_a_quantised_model_in_parts_is_split_without_its_weights_travelling(
    engine: Engine, tmp_path: Path
) -> None:
    write_model(whole := tmp_path / "whole.gguf", SMALL, 7)
    model = in_parts(whole, tmp_path, gguf.GGMLQuantizationType.Q8_0)
    assert len(model.parts) == PARTS
    async with ends.llama_server(engine, model.path) as (port, _):
        alone = await ends.complete(port)
    with open_weights(model.parts) as weights:
        async with ends.workers(engine, model.path, weights, LearnedHashes(None), 2) as borrowed:
            ports = [worker.port for worker in borrowed]
            async with ends.llama_server(engine, model.path, ports) as (port, _):
                loading = sum(worker.sent for worker in borrowed)
                assert await ends.complete(port) == alone
        assert not any(worker.lost.is_set() for worker in borrowed)
        assert sum(worker.spared for worker in borrowed) > 0.9 * model.size_bytes
        assert loading < 500_000
