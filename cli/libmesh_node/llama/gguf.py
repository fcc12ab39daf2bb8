"""Reads what a GGUF file says of itself, without reading the model.

The `gguf` package's reader builds a numpy object for every token of the vocabulary: seconds for 150,000. This one steps
over arrays and keeps scalars, and is done in hundredths of a second. The file is not mapped but read, since a mapped
file that somebody truncates meanwhile kills the process.

Layout: ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from libmesh_node.errors import NodeError

MAX_HEADER_BYTES = 512 << 20
"""A header larger than this is refused. The largest vocabularies of 2026 take 20 MB."""

MAX_STRING_BYTES = 16 << 20
"""A single text longer than this is refused; the longest in use are chat templates, of tens of KB."""

MAX_TENSORS = 1 << 18
MAX_KEYS = 1 << 16
MAX_DEPTH = 4  # of arrays of arrays

_READ_AHEAD = 1 << 20
_STRING, _ARRAY = 8, 9
_UNKNOWN = -1
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_SCALAR_SIZES = {kind: struct.calcsize(form) for kind, form in _SCALARS.items()}
_KEPT_ARRAY = 4096  # arrays of numbers up to this length are kept; per-layer values are among them

# ggml type number: values in a block, bytes of a block (ggml.h and ggml-common.h)
TENSOR_TYPES: dict[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip

# llama.h, `llama_ftype`
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS",
    20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M",
    28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
    39: "NVFP4", 40: "Q1_0",
}  # fmt: skip

Value = int | float | bool | str | tuple[int | float | bool, ...]


class ModelError(NodeError):
    """A model cannot be used. The text says which file and why."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: its place in the file, from the file's start, and its size, both in bytes.

    `shape` is as GGUF has it, the fastest-changing dimension first.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What the header tells. Numbers that it leaves out are 0, texts are empty.

    Attributes:
        context_length: tokens that the model was trained for.
        kv_heads: key and value heads of each layer; length `n_layers`; 0 in layers without attention.
        key_length: values per head in a key; `value_length` in a value.
        quantisation: `Q4_K_M`, `F16` …; `type N` if unknown.
        expert_count: 0 for a model that is no mixture of experts.
        pooling: llama.cpp's pooling type; more than 0 only in models made for embeddings; `None` if not given.
        split_no: number of this file among `split_count`, from 0; 0 of 0 for a model in one file.
        tensors: of this file, in its order.
        values: every key of the header whose value is a number, a text or a short array of numbers.
    """

    architecture: str
    name: str
    context_length: int
    n_layers: int
    embedding_length: int
    vocabulary: int
    heads: int
    kv_heads: tuple[int, ...]
    key_length: int
    value_length: int
    quantisation: str
    expert_count: int
    pooling: int | None
    has_chat_template: bool
    split_no: int
    split_count: int
    tensors: tuple[TensorInfo, ...]
    values: dict[str, Value]

    @property
    def is_embedding_model(self) -> bool:
        """Made for embeddings only: it has a pooling type of its own, or is an encoder."""
        return bool(self.pooling) or self.architecture in _ENCODERS

    def kv_bytes_per_token(self, block_bytes: int = 64) -> int:
        """Memory that one token takes in an attention cache whose values take `block_bytes` for 32; f16 takes 64."""
        return sum(self.kv_heads) * (self.key_length + self.value_length) * block_bytes // 32


_ENCODERS = frozenset({"bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "neo-bert", "eurobert", "gemma-embedding"})  # fmt: skip


def read_header(path: Path) -> GgufHeader:
    """Read the header of one file. Raises `ModelError` for what is not a whole, sane GGUF, `OSError` as `open` does.

    Every count and length is checked against the file's size before it is used, so garbage costs nothing.
    """
    with path.open("rb", buffering=0) as file:
        cursor = _Cursor(file, os.fstat(file.fileno()).st_size)
        try:
            return _parse(cursor)
        except (_Garbage, UnicodeDecodeError, OverflowError) as exc:
            raise ModelError(f"{path} is not a usable GGUF file: {exc}.") from exc


class _Garbage(Exception):
    pass


class _Cursor:
    """A position in the file, and as much of the file as was needed so far."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size = size
        self.data = bytearray()
        self.position = 0

    def need(self, count: int) -> None:
        """Have `count` bytes from the position on in `data`."""
        end = self.position + count
        if end > self.size:
            raise _Garbage(f"the header ends in the middle, at byte {self.size}")
        if end > MAX_HEADER_BYTES:
            raise _Garbage(f"its header is larger than {MAX_HEADER_BYTES >> 20} MiB")
        while len(self.data) < end:
            chunk = self._file.read(max(end - len(self.data), _READ_AHEAD))
            if not chunk:
                raise _Garbage("it became shorter while being read")
            self.data += chunk

    def skip(self, count: int) -> None:
        self.need(count)
        self.position += count

    def number(self, form: str, size: int) -> int:
        self.need(size)
        (value,) = struct.unpack_from(form, self.data, self.position)
        self.position += size
        return value  # type: ignore[no-any-return]

    def u32(self) -> int:
        return self.number("<I", 4)

    def u64(self) -> int:
        return self.number("<Q", 8)

    def text(self) -> str:
        length = self.u64()
        if length > MAX_STRING_BYTES:
            raise _Garbage(f"a text of {length} bytes")
        self.need(length)
        raw = self.data[self.position : self.position + length]
        self.position += length
        return raw.decode("utf-8", "replace")

    def skip_texts(self, count: int) -> None:
        """Step over `count` texts. The hot loop: 300,000 rounds in a large model."""
        if count > (self.size - self.position) // 8:
            raise _Garbage(f"an array of {count} texts")
        unpack = struct.Struct("<Q").unpack_from
        data, position, end = self.data, self.position, len(self.data) - 8
        for _ in range(count):
            if position > end:
                self.position = position
                self.need(8)
                end = len(data) - 8
            (length,) = unpack(data, position)
            position += 8 + length
        self.position = position
        self.need(0)


def _parse(cursor: _Cursor) -> GgufHeader:
    cursor.need(4)
    magic = bytes(cursor.data[:4])
    if magic != b"GGUF":
        raise _Garbage("it does not begin with GGUF")
    cursor.position = 4
    version = cursor.u32()
    if version not in (2, 3):
        raise _Garbage(
            f"version {version} is neither 2 nor 3" + (" (big-endian?)" if version & 0xFFFF == 0 else "")
        )
    tensors, keys = cursor.u64(), cursor.u64()
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise _Garbage(f"it claims {tensors} tensors and {keys} keys")
    values: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    for _ in range(keys):
        key = cursor.text()
        value, length = _value(cursor, cursor.u32(), 0)
        lengths[key] = length
        if value is not None:
            values[key] = value
    infos = [_tensor(cursor) for _ in range(tensors)]
    return _header(values, lengths, _placed(cursor, infos, values))


def _value(cursor: _Cursor, kind: int, depth: int) -> tuple[Value | None, int]:
    """A value, `None` if it is an array that is not kept, and the array's length."""
    if kind == _STRING:
        return cursor.text(), 0
    if kind != _ARRAY:
        if kind not in _SCALARS:
            raise _Garbage(f"a value of unknown type {kind}")
        return cursor.number(_SCALARS[kind], _SCALAR_SIZES[kind]), 0
    kind, count = cursor.u32(), cursor.u64()
    if kind == _STRING:
        cursor.skip_texts(count)
    elif kind == _ARRAY:
        if depth == MAX_DEPTH or count > _KEPT_ARRAY:
            raise _Garbage("arrays within arrays, too many")
        for _ in range(count):
            _value(cursor, _ARRAY, depth + 1)
    elif kind in _SCALARS:
        cursor.need(count * _SCALAR_SIZES[kind])
        kept: Value | None = None
        if count <= _KEPT_ARRAY:
            kept = struct.unpack_from(f"<{count}{_SCALARS[kind][1]}", cursor.data, cursor.position)
        cursor.skip(count * _SCALAR_SIZES[kind])
        return kept, count
    else:
        raise _Garbage(f"an array of unknown type {kind}")
    return None, count


def _tensor(cursor: _Cursor) -> TensorInfo:
    """One tensor; its offset counts from the start of the data, as in the file."""
    name, dimensions = cursor.text(), cursor.u32()
    if dimensions > 4:
        raise _Garbage(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(cursor.u64() for _ in range(dimensions))
    kind, offset = cursor.u32(), cursor.u64()
    if (
        kind not in TENSOR_TYPES
    ):  # newer than this table: llama-server will know; the size shows in the next offset
        return TensorInfo(name, shape, kind, offset, _UNKNOWN)
    block, size = TENSOR_TYPES[kind]
    if shape and shape[0] % block:
        raise _Garbage(f"tensor {name!r} has rows of {shape[0]} values, which are no whole blocks")
    return TensorInfo(name, shape, kind, offset, math.prod(shape) // block * size)


def _placed(cursor: _Cursor, infos: list[TensorInfo], values: dict[str, Value]) -> tuple[TensorInfo, ...]:
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise _Garbage(f"an alignment of {alignment}")
    start = -(-cursor.position // alignment) * alignment
    offsets = sorted({info.offset for info in infos} | {cursor.size - start})
    following = dict(pairwise(offsets))

    def size(info: TensorInfo) -> int:
        return following.get(info.offset, info.offset) - info.offset if info.size == _UNKNOWN else info.size

    placed = tuple(replace(info, offset=start + info.offset, size=size(info)) for info in infos)
    end = max((info.offset + info.size for info in placed), default=0)
    if end > cursor.size:
        raise _Garbage(f"it is cut off: {cursor.size} bytes of {end}")
    return placed


def _header(values: dict[str, Value], lengths: dict[str, int], tensors: tuple[TensorInfo, ...]) -> GgufHeader:
    def text(key: str) -> str:
        value = values.get(key, "")
        return value if isinstance(value, str) else ""

    def number(key: str, otherwise: int = 0) -> int:
        value = values.get(key, otherwise)
        return value if isinstance(value, int) and 0 <= value < 1 << 53 else otherwise

    architecture = text("general.architecture")
    embedding, heads = (
        number(f"{architecture}.embedding_length"),
        number(f"{architecture}.attention.head_count"),
    )
    layers = min(number(f"{architecture}.block_count"), MAX_TENSORS)
    per_layer = values.get(f"{architecture}.attention.head_count_kv", heads)
    if isinstance(per_layer, tuple):
        kv_heads = tuple(int(count) for count in per_layer if math.isfinite(count))
    else:
        kv_heads = (int(per_layer) if isinstance(per_layer, int) else heads,) * layers
    head_size = embedding // heads if heads else 0
    file_type, pooling = values.get("general.file_type"), values.get(f"{architecture}.pooling_type")
    return GgufHeader(
        architecture=architecture,
        name=text("general.name"),
        context_length=number(f"{architecture}.context_length"),
        n_layers=layers,
        embedding_length=embedding,
        vocabulary=lengths.get("tokenizer.ggml.tokens", 0),
        heads=heads,
        kv_heads=kv_heads,
        key_length=number(f"{architecture}.attention.key_length", head_size),
        value_length=number(f"{architecture}.attention.value_length", head_size),
        quantisation=_FILE_TYPES.get(file_type, f"type {file_type}") if isinstance(file_type, int) else "",
        expert_count=number(f"{architecture}.expert_count"),
        pooling=pooling if isinstance(pooling, int) else None,
        has_chat_template=bool(text("tokenizer.chat_template")),
        split_no=number("split.no"),
        split_count=number("split.count"),
        tensors=tensors,
        values=values,
    )
