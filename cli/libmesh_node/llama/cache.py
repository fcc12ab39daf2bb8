"""What an attention cache is made of: the larger the model, the fewer bits each value gets.

A large model is seldom short of arithmetic and always of memory, and what its cache does not take, more context can have.
The steps are the first mesh's: f16 below 5 GB of weights, q8_0 below 50 GB, q4_0 from there on.
"""

from __future__ import annotations

from dataclasses import dataclass

from libmesh_node.llama.gguf import GgufHeader

BLOCK = 32
"""Values that are quantised together (`QK8_0`, `QK4_0` of ggml-common.h)."""

MEDIUM, LARGE = 5 * 10**9, 50 * 10**9
"""Bytes of weights from which on a model's cache is quantised, and from which on more so."""

_WITHOUT_FLASH_ATTENTION = frozenset({"grok"})  # llama.cpp forbids it there, and a quantised cache demands it


@dataclass(frozen=True, slots=True)
class CacheType:
    """A type of cache. `name`: as llama-server's `--cache-type-k` takes it. `block_bytes`: of `BLOCK` values."""

    name: str
    block_bytes: int


F16, Q8_0, Q4_0 = CacheType("f16", 64), CacheType("q8_0", 34), CacheType("q4_0", 18)


def choose_cache(header: GgufHeader, size_bytes: int) -> CacheType:
    """The type for a model with `size_bytes` of weights; f16 for one whose heads cannot be quantised."""
    if size_bytes < MEDIUM or header.architecture in _WITHOUT_FLASH_ATTENTION:
        return F16
    named = (f"{header.architecture}.attention.{which}_length" for which in ("key", "value"))
    lengths = [header.key_length, header.value_length]
    for name in named:
        lengths += [
            value for kind in ("_swa", "_mla") if isinstance(value := header.values.get(name + kind), int)
        ]
    if not all(length > 0 and length % BLOCK == 0 for length in lengths):
        return F16
    return Q8_0 if size_bytes < LARGE else Q4_0
