"""Models of other kinds between the real programs: quantised, in several files, with tied embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from libmesh_node.llama.engine import Engine
from libmesh_node.llama.rpc.weights import LearnedHashes, open_weights
from libmesh_node.llama.server import SplitPlan, _split_args
from libmesh_node.models.demo import SMALL, write_model
from libmesh_node.models.reference import ModelFile, open_model
from libmesh_node.placement.shape import shape_of

from tests.llama.rpc import ends

pytestmark = [pytest.mark.llama, pytest.mark.slow]

PARTS = 3


def rewritten(
    source: Path, writer: Any, *, kind: gguf.GGMLQuantizationType | None = None, tied: bool = False
) -> None:
    """Write the model again: its matrices as `kind`, or with the output for its embeddings as well."""
    reader = gguf.GGUFReader(source)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            within = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], within)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if tied:
        tensors["token_embd.weight"] = tensors.pop("output.weight")
    for name, tensor in tensors.items():
        if kind is not None and tensor.tensor_type == gguf.GGMLQuantizationType.F16:
            packed = gguf.quants.quantize(tensor.data.astype(np.float32), kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
        else:
            writer.add_tensor(name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "whole.gguf"
    write_model(path, SMALL, 7)
    return path


async def spared_by(engine: Engine, model: ModelFile, count: int, *flags: str) -> int:
    """Bytes of weights that a split over so many workers lets lie, if it says what one machine says."""
    async with ends.llama_server(engine, model.path) as (port, _):
        alone = await ends.complete(port)
    with open_weights(model.parts) as weights:
        async with ends.workers(engine, model.path, weights, LearnedHashes(None), count) as borrowed:
            ports = [worker.port for worker in borrowed]
            async with ends.llama_server(engine, model.path, ports, *flags) as (port, _):
                loading = sum(worker.sent for worker in borrowed)
                assert await ends.complete(port) == alone
        assert not any(worker.lost.is_set() for worker in borrowed)
        assert loading < 500_000
        return sum(worker.spared for worker in borrowed)


async def test_a_quantised_model_in_parts_is_split_without_its_weights_travelling(
    engine: Engine, whole: Path, tmp_path: Path
) -> None:
    most = -(-len(open_model(whole).header.tensors) // PARTS)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=most)
    rewritten(whole, writer, kind=gguf.GGMLQuantizationType.Q8_0)
    model = open_model(tmp_path / f"model-00001-of-{PARTS:05}.gguf")
    assert len(model.parts) == PARTS
    assert await spared_by(engine, model, 2) > 0.9 * model.size_bytes


async def test_the_output_stays_at_home_where_it_is_the_embeddings_too(
    engine: Engine, whole: Path, tmp_path: Path
) -> None:
    """The placement grants the worker no memory for it."""
    rewritten(whole, gguf.GGUFWriter(path := tmp_path / "tied.gguf", "llama"), tied=True)
    model = open_model(path)
    shape = shape_of([model.header], "", 512)
    split = SplitPlan(ports=(1,), layers=(6,), logits_home=True)
    flags = _split_args(split, model.header.n_layers)
    where = flags.index("--override-tensor")
    spared = await spared_by(engine, model, 1, *flags[where : where + 2])
    assert sum(shape.layers) <= spared < sum(shape.layers) + shape.input
