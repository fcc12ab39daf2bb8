"""The host's end, between a llama-server and a worker that are played by hand."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.llama.gguf import read_header
from libmesh_node.llama.rpc.facts import Device, WorkerFacts
from libmesh_node.llama.rpc.frames import (
    REFERENCE,
    SET_HEADER,
    WHOLE,
    Command,
    Link,
    ProtocolError,
    Reply,
    answer,
    frame,
    frame_head,
)
from libmesh_node.llama.rpc.host import Effect, HostEnd, ToClient
from libmesh_node.llama.rpc.opening import UNSAID
from libmesh_node.llama.rpc.packing import unpack
from libmesh_node.llama.rpc.uploads import FromFile, ToWorker
from libmesh_node.llama.rpc.weights import LearnedHashes, Weights, open_weights
from libmesh_node.models.demo import ModelShape, write_model

from tests.llama.rpc import messages
from tests.llama.rpc.messages import BASE, BUFFER, tensor

SHAPE = ModelShape(layers=1, width=512, heads=4, kv_heads=2, feed_forward=256, vocabulary=400)
FACTS = WorkerFacts((7, 0, 3), (Device(64, 1 << 40, 100, 200, True), Device(128, 1 << 40, 1, 2, False)))
LARGE = "blk.0.attn_q.weight"  # 512 KiB
SMALL = "blk.0.attn_norm.weight"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "one.gguf"
    write_model(path, SHAPE, 3)
    return path


@pytest.fixture(scope="module")
def weights(path: Path) -> Iterator[Weights]:
    with open_weights((path,)) as opened:
        yield opened


def bytes_of(path: Path, name: str) -> bytes:
    found = next(entry for entry in read_header(path).tensors if entry.name == name)
    return path.read_bytes()[found.offset : found.offset + found.size]


def upload(name: str, data: bytes, *, offset: int = 0) -> bytes:
    return messages.set_tensor(
        data, tensor(name.encode(), kind=24, shape=(len(data), 1, 1, 1)), offset=offset
    )


def to_worker(effects: list[Effect]) -> bytes:
    return b"".join(effect.data for effect in effects if isinstance(effect, ToWorker))


def to_client(effects: list[Effect]) -> bytes:
    return b"".join(effect.data for effect in effects if isinstance(effect, ToClient))


def referred(effects: list[Effect]) -> tuple[int, int, int]:
    (effect,) = effects
    assert isinstance(effect, ToWorker)
    assert effect.data[:9] == frame_head(Link.REFERENCE, REFERENCE.size)
    _, part, offset, size = REFERENCE.unpack(effect.data[9:])
    return part, offset, size


def test_what_the_worker_told_is_answered_here(weights: Weights) -> None:
    end = HostEnd(FACTS, weights, LearnedHashes(None))
    asked = [
        (frame(Command.HELLO, bytes(24)), bytes([7, 0, 3, 0]) + bytes(24)),
        (frame(Command.DEVICE_COUNT), struct.pack("<I", 2)),
        (frame(Command.GET_ALIGNMENT, struct.pack("<I", 1)), struct.pack("<Q", 128)),
        (frame(Command.GET_MAX_SIZE, struct.pack("<I", 0)), struct.pack("<Q", 1 << 40)),
        (frame(Command.GET_DEVICE_MEMORY, struct.pack("<I", 0)), struct.pack("<QQ", 100, 200)),
    ]
    for request, expected in asked:
        assert end.from_client(request) == [ToClient(answer(expected))]
    assert not end.engaged
    with pytest.raises(ProtocolError):
        end.from_client(frame(Command.GET_ALIGNMENT, struct.pack("<I", 2)))


def test_capabilities_are_never_passed_on(weights: Weights) -> None:
    """Otherwise two builds with RDMA would leave the stream."""
    (told,) = HostEnd(FACTS, weights, LearnedHashes(None)).from_client(frame(Command.HELLO, b"\xff" * 24))
    assert isinstance(told, ToClient)
    assert told.data[-24:] == bytes(24)


def test_a_graph_crosses_packed_if_the_worker_unpacks(weights: Weights) -> None:
    graph = messages.graph(*[tensor(b"node %d" % number) for number in range(20)])
    plain = HostEnd(FACTS, weights, LearnedHashes(None)).from_client(graph)
    assert plain == [ToWorker(graph)]
    said = to_worker(HostEnd(replace(FACTS, unpacks=True), weights, LearnedHashes(None)).from_client(graph))
    assert said[0] == Link.PACKED
    assert unpack(said[9:]) == graph[9:]


@pytest.mark.parametrize("name", [SMALL, LARGE])
def test_weights_become_a_reference(path: Path, weights: Weights, name: str) -> None:
    data = bytes_of(path, name)
    end = HostEnd(FACTS, weights, LearnedHashes(None))
    whole = upload(name, data)
    effects = [
        effect for at in range(0, len(whole), 7000) for effect in end.from_client(whole[at : at + 7000])
    ]
    part, offset, size = referred(effects)
    assert (part, size) == (0, len(data))
    assert path.read_bytes()[offset : offset + size] == data
    assert end.spared == len(data)


@pytest.mark.parametrize("name", [SMALL, LARGE])
@pytest.mark.parametrize("at", [0, 1000, -1])
def test_one_other_byte_and_all_of_it_is_sent(path: Path, weights: Weights, name: str, at: int) -> None:
    data = bytearray(bytes_of(path, name))
    data[at] ^= 1
    whole = upload(name, bytes(data))
    end = HostEnd(FACTS, weights, LearnedHashes(None))
    sent = b""
    for start in range(0, len(whole), 9000):
        for effect in end.from_client(whole[start : start + 9000]):
            assert not isinstance(effect, ToClient)
            if isinstance(effect, FromFile):
                sent += weights.read(effect.place, 0, effect.size)
            else:
                sent += effect.data
    assert sent == whole
    assert end.spared == 0


def test_a_slice_under_the_whole_tensors_name_passes_unharmed(path: Path, weights: Weights) -> None:
    data = bytes_of(path, LARGE)[1024:3072]
    whole = upload(LARGE, data)
    assert to_worker(HostEnd(FACTS, weights, LearnedHashes(None)).from_client(whole)) == whole
    assert referred(
        HostEnd(FACTS, weights, LearnedHashes(None)).from_client(upload(LARGE, data, offset=1024))
    )


def test_a_hash_is_learned_once_and_then_spares_the_upload(path: Path, weights: Weights) -> None:
    data, hashes = bytes_of(path, LARGE), LearnedHashes(None)
    about = tensor(LARGE.encode(), kind=24, shape=(len(data), 1, 1, 1))
    first = HostEnd(FACTS, weights, hashes)
    assert first.from_client(messages.set_hash(about, 77)) == [ToClient(answer(b"\x00"))]
    first.from_client(upload(LARGE, data))
    second = HostEnd(FACTS, weights, hashes)
    reference, told = second.from_client(messages.set_hash(about, 77))
    assert told == ToClient(answer(b"\x01"))
    assert referred([reference])[2] == len(data)
    assert second.from_client(messages.set_hash(about, 78)) == [ToClient(answer(b"\x00"))]


def test_a_hash_of_what_differs_is_not_learned(path: Path, weights: Weights) -> None:
    data, hashes = bytearray(bytes_of(path, LARGE)), LearnedHashes(None)
    data[5] ^= 1
    about = tensor(LARGE.encode(), kind=24, shape=(len(data), 1, 1, 1))
    for _ in range(2):
        end = HostEnd(FACTS, weights, hashes)
        assert end.from_client(messages.set_hash(about, 77)) == [ToClient(answer(b"\x00"))]
        end.from_client(upload(LARGE, bytes(data)))


def allocated(weights: Weights) -> HostEnd:
    end = HostEnd(FACTS, weights, LearnedHashes(None))
    end.from_client(messages.allocate(100))
    told = end.from_worker(frame(Reply.ANSWER, struct.pack("<QQQ", BUFFER, 128, BASE)))
    assert told == [ToClient(answer(struct.pack("<QQ", BUFFER, 128)))]
    return end


def test_a_buffers_base_comes_with_it(weights: Weights) -> None:
    end = allocated(weights)
    asked = frame(Command.BUFFER_GET_BASE, struct.pack("<Q", BUFFER))
    assert end.from_client(asked) == [ToClient(answer(struct.pack("<Q", BASE)))]


def test_sizes_are_answered_for_processors_and_asked_for_elsewhere(weights: Weights) -> None:
    about = tensor(shape=(10, 3, 1, 1), buffer=0, data=0) + bytes(10 * 296)
    end = allocated(weights)
    here = end.from_client(frame(Command.GET_ALLOC_SIZE, struct.pack("<I", 0) + about))
    assert here == [ToClient(answer(struct.pack("<Q", 120)))]
    elsewhere = frame(Command.GET_ALLOC_SIZE, struct.pack("<I", 1) + about)
    assert end.from_client(elsewhere) == [ToWorker(elsewhere)]


def test_only_small_uploads_may_wait_for_what_follows(path: Path, weights: Weights) -> None:
    end = allocated(weights)
    (small,) = end.from_client(messages.set_tensor(bytes(100)))
    assert isinstance(small, ToWorker)
    assert small.early
    large = end.from_client(messages.set_tensor(bytes(WHOLE + 1)))
    known = end.from_client(upload(LARGE, bytes_of(path, LARGE)))  # the worker reads its file meanwhile
    asked = end.from_client(messages.get_tensor(8))
    assert not any(isinstance(effect, ToWorker) and effect.early for effect in (*large, *known, *asked))


def test_answers_keep_the_order_of_the_requests(weights: Weights) -> None:
    end = allocated(weights)
    end.from_client(messages.get_tensor(8) + frame(Command.DEVICE_COUNT) + messages.get_tensor(WHOLE + 1))
    assert to_client(end.from_worker(frame(Reply.ANSWER, b"12345678"))) == answer(b"12345678") + answer(
        struct.pack("<I", 2)
    )
    large = frame(Reply.ANSWER, bytes(WHOLE + 1))
    got = to_client(end.from_worker(large[:100]))
    assert end.from_client(frame(Command.DEVICE_COUNT)) == []
    got += to_client(end.from_worker(large[100:]))
    assert got == answer(bytes(WHOLE + 1)) + answer(struct.pack("<I", 2))


@pytest.mark.parametrize(
    "reply",
    [
        frame(Reply.ANSWER, b"x"),
        frame(Reply.LOST, b"it fell over"),
        frame(Reply.OPENED),
        frame(99),
        frame_head(Reply.ANSWER, 1 << 62),
    ],
)
def test_a_worker_that_makes_no_sense_is_not_believed(weights: Weights, reply: bytes) -> None:
    with pytest.raises(ProtocolError):
        allocated(weights).from_worker(reply)


@pytest.mark.parametrize(
    ("said", "told"),
    [(b"it fell over", "it fell over"), (b"", UNSAID), (b"\x1b[2J\nit is \xff", "[2Jit is \ufffd")],
)
def test_why_a_session_is_over_is_told_and_fit_to_print(weights: Weights, said: bytes, told: str) -> None:
    with pytest.raises(ProtocolError) as failure:
        allocated(weights).from_worker(frame(Reply.LOST, said))
    assert str(failure.value) == told


def test_an_allocation_that_is_denied_is_noticed(weights: Weights) -> None:
    end = HostEnd(FACTS, weights, LearnedHashes(None))
    end.from_client(messages.allocate(12345))
    assert to_client(end.from_worker(frame(Reply.ANSWER, bytes(24)))) == answer(bytes(16))
    assert end.denied == 12345


@given(st.lists(st.binary(max_size=400), max_size=8), st.lists(st.binary(max_size=100), max_size=8))
def test_garbage_from_either_side_is_an_error_and_nothing_else(
    path: Path, client: list[bytes], worker: list[bytes]
) -> None:
    with open_weights((path,)) as weights:
        end = HostEnd(FACTS, weights, LearnedHashes(None))
        try:
            for data in client:
                end.from_client(data)
            for data in worker:
                end.from_worker(data)
        except ProtocolError:
            pass


def test_headers_are_cut_where_llama_cpp_cuts_them() -> None:
    assert SET_HEADER == 305
