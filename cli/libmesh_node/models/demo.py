"""Makes small models whose text is nonsense, so that the whole path can be tried on any machine, offline.

The files are complete GGUF models of the llama architecture: f16 weights, a SentencePiece-like tokenizer, a chat
template. The weights are random, so the words mean nothing; but they are words, and they never stop by themselves:
a request runs to its `max_tokens`.

How the text is kept readable. Bytes, control tokens and the unknown token must never be chosen, at any temperature.
The first embedding dimension is a constant for every token, and no layer writes to it. After the last norm it is still
positive, so a large negative weight in that dimension of the output matrix pushes exactly those tokens out of reach.

How the bytes stay the same everywhere. Only the raw integers of numpy's PCG64 are used, whose stream numpy guarantees,
and exact conversions; so the same version of the `gguf` package makes the same file, with the same digest, on every
machine, and two nodes that each made their own share requests.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from libmesh_node.llama.engine import cache_root

DEMO_SEED = 2026
"""Also in the path of the cached file: whoever changes how the model is made, changes the seed with it."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

_BYTE_TOKENS = 256
_SPECIAL = ("<unk>", "<s>", "</s>")
_SPACE = "\u2581"  # SentencePiece's mark for a space
_SINGLE_TOKENS = (_SPACE, *map(chr, range(0x21, 0x7F)))
_CHUNK = 1 << 20  # values made at a time: 2 MB
_OUT_OF_REACH = -500.0
_SELDOM = -8.0  # for single characters, so that most of the text is syllables


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The size of a model. `width` is divisible by `heads`, `heads` by `kv_heads`; head size is even.

    `vocabulary` counts all tokens: at least 400, at most 4,096.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    context_length: int = 8192

    def __post_init__(self) -> None:
        if self.width % self.heads or self.heads % self.kv_heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"width {self.width}, heads {self.heads} and kv_heads {self.kv_heads} do not divide"
            )
        if not 400 <= self.vocabulary <= 4096:
            raise ValueError(f"vocabulary is {self.vocabulary}, not 400 to 4096")

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor, in the order of the file; the slowest-changing dimension first."""
        kv_width = self.width // self.heads * self.kv_heads
        yield "token_embd.weight", (self.vocabulary, self.width)
        for layer in range(self.layers):
            prefix = f"blk.{layer}"
            yield f"{prefix}.attn_norm.weight", (self.width,)
            yield f"{prefix}.attn_q.weight", (self.width, self.width)
            yield f"{prefix}.attn_k.weight", (kv_width, self.width)
            yield f"{prefix}.attn_v.weight", (kv_width, self.width)
            yield f"{prefix}.attn_output.weight", (self.width, self.width)
            yield f"{prefix}.ffn_norm.weight", (self.width,)
            yield f"{prefix}.ffn_gate.weight", (self.feed_forward, self.width)
            yield f"{prefix}.ffn_up.weight", (self.feed_forward, self.width)
            yield f"{prefix}.ffn_down.weight", (self.width, self.feed_forward)
        yield "output_norm.weight", (self.width,)
        yield "output.weight", (self.vocabulary, self.width)


TINY = ModelShape(layers=4, width=128, heads=4, kv_heads=2, feed_forward=384, vocabulary=512)
"""2 MB. The demo model."""

SMALL = ModelShape(layers=6, width=512, heads=8, kv_heads=4, feed_forward=1408, vocabulary=2048)
"""40 MB."""

MEDIUM = ModelShape(layers=5, width=2048, heads=16, kv_heads=8, feed_forward=5632, vocabulary=4096)
"""About 500 MB; most of it in tensors larger than 10 MiB, which llama.cpp's RPC treats in a way of their own."""


def demo_model(cache: Path | None = None) -> Path:
    """The demo model's file, made on first use. Two processes may make it at once; both get the same bytes."""
    path = (cache or cache_root()) / "models" / f"demo-{DEMO_SEED}" / "demo.gguf"
    if not path.is_file():
        write_model(path, TINY, DEMO_SEED, name="demo")
    return path


def write_model(path: Path, shape: ModelShape, seed: int, *, name: str | None = None) -> None:
    """Write a model of `shape` to `path`, in one rename. Same arguments, same bytes.

    Uses a few MB of memory, whatever the size of the model. Makes about 200 MB a second.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as folder:
        partial = Path(folder) / "model"
        _write(partial, shape, seed, name or path.stem)
        os.replace(partial, path)


def _write(path: Path, shape: ModelShape, seed: int, name: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_description("Random weights: the text is nonsense")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    _add_tokenizer(writer, shape.vocabulary)
    for tensor, dimensions in shape.tensors():
        kind = np.dtype(np.float32 if len(dimensions) == 1 else np.float16)
        writer.add_tensor_info(tensor, dimensions, kind, int(np.prod(dimensions)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    files = writer.fout
    assert files is not None
    writer.write_padding(files[0], files[0].tell())
    random = np.random.PCG64(seed)
    for tensor, dimensions in shape.tensors():
        for chunk in _values(tensor, dimensions, shape, random):
            files[0].write(chunk.tobytes())
        writer.write_padding(files[0], files[0].tell())
    writer.close()


def _add_tokenizer(writer: Any, size: int) -> None:
    tokens = list(_tokens(size))
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * _BYTE_TOKENS
    kinds += [gguf.TokenType.NORMAL] * (size - len(kinds))
    # Longer pieces score higher, so that text is cut into as few tokens as there can be.
    scores = [
        0.0 if kind is not gguf.TokenType.NORMAL else float(len(token)) - 10
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _tokens(size: int) -> Iterator[str]:
    made = 0
    for made, token in enumerate(_all_tokens(), 1):
        yield token
        if made == size:
            return
    raise ValueError(f"there are only {made} tokens")


def _all_tokens() -> Iterator[str]:
    yield from _SPECIAL
    yield from (f"<0x{byte:02X}>" for byte in range(_BYTE_TOKENS))
    yield from _SINGLE_TOKENS
    pairs = [consonant + vowel for vowel, consonant in product("aeiou", "tnsrldkmpbvg")]
    yield from pairs
    yield from (_SPACE + pair for pair in pairs)
    for first, second in product(pairs, pairs):
        yield first + second
        yield _SPACE + first + second


def _values(
    tensor: str, dimensions: tuple[int, ...], shape: ModelShape, random: np.random.PCG64
) -> Iterator[npt.NDArray[Any]]:
    """The tensor's values, in pieces of whole rows."""
    if len(dimensions) == 1:
        yield np.ones(dimensions, np.float32)
        return
    rows, columns = dimensions
    scale = _scale(tensor, shape)
    writes_stream = tensor.endswith(("attn_output.weight", "ffn_down.weight"))
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        chunk = _uniform(random, count * columns).reshape(count, columns)
        chunk *= np.float32(scale)
        if tensor == "token_embd.weight":
            chunk[:, 0] = 1
        elif tensor == "output.weight":
            unreadable = len(_SPECIAL) + _BYTE_TOKENS
            chunk[:, 0] = 0
            chunk[: max(0, unreadable + len(_SINGLE_TOKENS) - start), 0] = _SELDOM
            chunk[: max(0, unreadable - start)] = 0
            chunk[: max(0, unreadable - start), 0] = _OUT_OF_REACH
        elif writes_stream and start == 0:
            chunk[0] = 0
        yield chunk.astype(np.float16)


def _scale(tensor: str, shape: ModelShape) -> float:
    """Half-width of the uniform distribution; keeps activations near 1 whatever the width."""
    if tensor == "token_embd.weight":
        return 1.0
    if tensor == "output.weight":
        return 8.0 / math.sqrt(shape.width)  # spread of the logits: a few likely tokens rather than noise
    columns = shape.feed_forward if tensor.endswith("ffn_down.weight") else shape.width
    return 2.0 / math.sqrt(columns)


def _uniform(random: np.random.PCG64, count: int) -> npt.NDArray[np.float32]:
    """`count` values in [-1, 1), each a multiple of 2^-15, from the generator's raw integers."""
    raw = random.random_raw(-(-count // 4)).astype("<u8").view("<u2")[:count]
    return raw.astype(np.float32) / np.float32(1 << 15) - np.float32(1)
