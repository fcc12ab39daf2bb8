"""A model as placement sees it: bytes per layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from libmesh_node.llama.cache import BLOCK, F16, CacheType, choose_cache
from libmesh_node.llama.gguf import GgufHeader

BATCH = 512
"""Tokens that llama.cpp computes at once, by default."""

_LAYER = re.compile(r"blk\.(\d+)\.")
_EXPERTS = re.compile(r"_exps\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a model needs, all in bytes unless said otherwise.

    Attributes:
        digest: of its files.
        layers: weights of each layer; `read`: the part of them that one token touches, which is less with experts.
        kv_per_token: attention cache of each layer for one token.
        input: the token embeddings, which stay in the host's main memory.
        output: what turns the last layer into logits. llama.cpp counts it as one more layer.
        embedding_length, vocabulary: counts.
        context: tokens that the cache shall hold at least.
        compute: memory that each machine of a split takes for what it computes, whatever its share.
        cache: of what the attention cache is made.
        recurrent: it has a state that every token changes, so nothing may be computed twice.
    """

    digest: str
    layers: tuple[int, ...]
    read: tuple[int, ...]
    kv_per_token: tuple[int, ...]
    input: int
    output: int
    embedding_length: int
    vocabulary: int
    context: int
    compute: int = 0
    cache: CacheType = F16
    recurrent: bool = False

    @property
    def size(self) -> int:
        """All weights."""
        return sum(self.layers) + self.input + self.output

    @property
    def kv(self) -> int:
        """The whole cache, at `context`."""
        return sum(self.kv_per_token) * self.context


def shape_of(headers: Sequence[GgufHeader], digest: str, context: int) -> ModelShape:
    """The shape of the model whose parts have these headers, in order. All numbers are those of the first."""
    first = headers[0]
    count = max(1, first.n_layers)
    layers, experts, home, output, embeddings = [0] * count, [0] * count, 0, 0, 0
    for tensor in (tensor for header in headers for tensor in header.tensors):
        layer = _LAYER.match(tensor.name)
        if layer is not None and int(layer[1]) < count:
            layers[int(layer[1])] += tensor.size
            experts[int(layer[1])] += tensor.size if _EXPERTS.search(tensor.name) else 0
        elif tensor.name.startswith("output"):
            output += tensor.size
        else:
            home += tensor.size
            embeddings += tensor.size if tensor.name == "token_embd.weight" else 0
    weights = output
    if not any(tensor.name == "output.weight" for header in headers for tensor in header.tensors):
        output += embeddings  # tied: llama.cpp loads them once more for the last layer
    used, total = first.values.get(f"{first.architecture}.expert_used_count", 0), first.expert_count
    share = used / total if isinstance(used, int) and 0 < used < total else 1.0
    cache = choose_cache(first, sum(layers) + home + weights)
    per_head = (first.key_length + first.value_length) * cache.block_bytes // BLOCK
    heads = first.kv_heads[:count] or (0,) * count
    return ModelShape(
        digest=digest,
        layers=tuple(layers),
        read=tuple(whole - round(part * (1 - share)) for whole, part in zip(layers, experts, strict=True)),
        kv_per_token=tuple(heads[min(at, len(heads) - 1)] * per_head for at in range(count)),
        input=home,
        output=output,
        embedding_length=first.embedding_length,
        vocabulary=first.vocabulary,
        context=context,
        compute=_compute(first),
        cache=cache,
        recurrent=any(".ssm." in key or ".wkv." in key or "shortconv" in key for key in first.values),
    )


def _compute(header: GgufHeader) -> int:
    """What a batch of `BATCH` tokens takes in f32: a few copies of the activation and of the widest layer's inside.

    An estimate from above for dense models: 60 MB where llama.cpp took 45 to 53.
    """
    inside = header.values.get(f"{header.architecture}.feed_forward_length", 0)
    widths = inside if isinstance(inside, tuple) else (inside,)
    wide = max(
        (int(width) for width in widths if isinstance(width, int | float) and 0 <= width < 1 << 53), default=0
    )
    return BATCH * 4 * (6 * header.embedding_length + 3 * wide)
