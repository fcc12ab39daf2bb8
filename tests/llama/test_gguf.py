from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from libmesh_node.llama.gguf import TENSOR_TYPES, GgufHeader, ModelError, read_header

Pairs = list[tuple[str, int, bytes]]
Tensors = list[tuple[str, tuple[int, ...], int, int]]


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def string(key: str, value: str) -> tuple[str, int, bytes]:
    return key, 8, text(value)


def u32(key: str, value: int) -> tuple[str, int, bytes]:
    return key, 4, struct.pack("<I", value)


def array(key: str, kind: int, values: list[bytes]) -> tuple[str, int, bytes]:
    return key, 9, struct.pack("<IQ", kind, len(values)) + b"".join(values)


def make(
    pairs: Pairs,
    tensors: Tensors | None = None,
    *,
    data: int = 0,
    version: int = 3,
) -> bytes:
    """A GGUF file; `data` bytes of zeros follow the header."""
    tensors = tensors or []
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    for key, kind, value in pairs:
        out += text(key) + struct.pack("<I", kind) + value
    for name, shape, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return out + bytes(-len(out) % 32) + bytes(data)


def read(tmp_path: Path, content: bytes) -> GgufHeader:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return read_header(path)


def test_demo_header_agrees_with_the_gguf_package(demo_path: Path) -> None:
    header = read_header(demo_path)
    reader = gguf.GGUFReader(demo_path)
    assert (header.architecture, header.name, header.quantisation) == ("llama", "demo", "F16")
    assert (header.context_length, header.n_layers, header.embedding_length) == (8192, 4, 128)
    assert (header.heads, header.kv_heads, header.key_length, header.vocabulary) == (4, (2, 2, 2, 2), 32, 512)
    assert header.has_chat_template
    assert not header.is_embedding_model
    assert header.kv_bytes_per_token() == 4 * 2 * (32 + 32) * 2
    theirs = [(t.name, tuple(map(int, t.shape)), int(t.data_offset), int(t.n_bytes)) for t in reader.tensors]
    assert [(t.name, t.shape, t.offset, t.size) for t in header.tensors] == theirs


def test_block_sizes_agree_with_the_gguf_package() -> None:
    theirs = {int(kind): tuple(sizes) for kind, sizes in gguf.constants.GGML_QUANT_SIZES.items()}
    assert theirs == TENSOR_TYPES


def test_every_kind_of_value_is_read_or_stepped_over(tmp_path: Path) -> None:
    numbers: list[tuple[int, str, Any]] = [
        (0, "B", 7), (1, "b", -7), (2, "H", 700), (3, "h", -700), (4, "I", 7), (5, "i", -7), (6, "f", 0.5),
        (7, "?", True), (10, "Q", 1 << 40), (11, "q", -1 << 40), (12, "d", 0.25),
    ]  # fmt: skip
    pairs: Pairs = [(f"n{kind}", kind, struct.pack("<" + form, value)) for kind, form, value in numbers]
    pairs += [array(f"a{kind}", kind, [struct.pack("<" + form, value)] * 3) for kind, form, value in numbers]
    nested = struct.pack("<IQ", 8, 1) + text("inner")
    pairs += [array("texts", 8, [text("ab"), text("")]), array("nested", 9, [nested, nested])]
    pairs += [string("general.architecture", "last")]
    header = read(tmp_path, make(pairs))
    assert header.architecture == "last"
    for kind, _, value in numbers:
        assert header.values[f"n{kind}"] == value
        assert header.values[f"a{kind}"] == (value,) * 3


def test_heads_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    pairs = [
        string("general.architecture", "x"),
        u32("x.block_count", 3),
        u32("x.embedding_length", 64),
        u32("x.attention.head_count", 4),
        array("x.attention.head_count_kv", 4, [struct.pack("<I", count) for count in (4, 0, 2)]),
        u32("x.attention.key_length", 8),
    ]
    header = read(tmp_path, make(pairs))
    assert (header.kv_heads, header.key_length, header.value_length) == ((4, 0, 2), 8, 16)
    assert header.kv_bytes_per_token() == 6 * 24 * 2


def test_split_experts_and_pooling_are_told(tmp_path: Path) -> None:
    pairs = [
        string("general.architecture", "qwen3moe"),
        u32("qwen3moe.expert_count", 128),
        u32("qwen3moe.pooling_type", 3),
        ("split.no", 2, struct.pack("<H", 1)),
        ("split.count", 2, struct.pack("<H", 4)),
        u32("general.file_type", 15),
    ]
    header = read(tmp_path, make(pairs))
    assert (header.expert_count, header.split_no, header.split_count) == (128, 1, 4)
    assert (header.quantisation, header.is_embedding_model) == ("Q4_K_M", True)


def test_tensor_type_of_the_future_is_measured_by_its_neighbours(tmp_path: Path) -> None:
    tensors: Tensors = [("a", (10,), 999, 0), ("b", (8,), 0, 64), ("c", (5,), 998, 96)]
    header = read(tmp_path, make([], tensors, data=128))
    assert [tensor.size for tensor in header.tensors] == [64, 32, 32]


def test_vocabulary_of_a_large_model_is_not_kept(tmp_path: Path) -> None:
    words = [text(f"token{number}") for number in range(150_000)]
    pairs = [array("tokenizer.ggml.tokens", 8, words), array("tokenizer.ggml.merges", 8, words)]
    header = read(tmp_path, make([*pairs, string("general.architecture", "x")]))
    assert (header.vocabulary, header.architecture) == (150_000, "x")
    assert list(header.values) == ["general.architecture"]


HUGE = 1 << 62
BAD = {
    "nothing": (b"", "ends in the middle"),
    "other": (b"PK\3\4" + bytes(100), "does not begin with GGUF"),
    "old": (make([], version=1), "version 1"),
    "big-endian": (b"GGUF\0\0\0\3" + bytes(16), "big-endian"),
    "counts": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, HUGE), "claims"),
    "long key": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, HUGE), "a text of"),
    "key past the end": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1000), "ends in the middle"),
    "unknown type": (make([("k", 77, b"")]), "unknown type 77"),
    "unknown element": (make([("k", 9, struct.pack("<IQ", 77, 1))]), "unknown type 77"),
    "many texts": (make([("k", 9, struct.pack("<IQ", 8, HUGE))]), "an array of"),
    "many numbers": (make([("k", 9, struct.pack("<IQ", 4, HUGE))]), "ends in the middle"),
    "text too far": (make([("k", 9, struct.pack("<IQQ", 8, 1, HUGE))]), "ends in the middle"),
    "deep": (make([("k", 9, struct.pack("<IQ", 9, 1) * 40)]), "arrays within arrays"),
    "dimensions": (make([], [("t", (1,) * 5, 0, 0)]), "5 dimensions"),
    "rows": (make([], [("t", (33,), 2, 0)], data=99), "no whole blocks"),
    "cut off": (make([], [("t", (100,), 0, 0)], data=399), "cut off"),
    "offset": (make([], [("t", (1,), 0, HUGE)], data=32), "cut off"),
    "alignment": (make([u32("general.alignment", 0)]), "alignment"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_in_words(tmp_path: Path, case: str) -> None:
    content, reason = BAD[case]
    with pytest.raises(ModelError, match=reason) as caught:
        read(tmp_path, content)
    assert "model.gguf" in str(caught.value)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_file_is_read_or_refused_and_nothing_else(
    data: st.DataObject, tmp_path: Path, demo_path: Path
) -> None:
    content = bytearray(demo_path.read_bytes()[:20_000])
    size = demo_path.stat().st_size
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(content) - 9))
        width = data.draw(st.sampled_from([1, 4, 8]))
        content[place : place + width] = data.draw(st.binary(min_size=width, max_size=width))
    path = tmp_path / "fuzzed.gguf"
    with path.open("wb") as file:
        file.write(content[: data.draw(st.integers(0, len(content)))])
        if data.draw(st.booleans()):
            file.truncate(size)  # a whole file of which only the header is damaged
    try:
        header = read_header(path)
    except ModelError:
        return
    assert all(tensor.offset + tensor.size <= path.stat().st_size for tensor in header.tensors)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=400))
def test_garbage_behind_the_magic_is_harmless(content: bytes, tmp_path: Path) -> None:
    try:
        read(tmp_path, b"GGUF\3\0\0\0" + content)
    except ModelError:
        return
