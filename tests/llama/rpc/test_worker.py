"""The worker's end against hosts that are not what they should be."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.llama.rpc.frames import (
    REFERENCE,
    SET_HEADER,
    Command,
    Link,
    ProtocolError,
    Reply,
    answer,
    frame,
)
from libmesh_node.llama.rpc.weights import Place
from libmesh_node.llama.rpc.worker import FileToServer, ToHost, ToServer, WorkerEnd

from tests.llama.rpc import messages
from tests.llama.rpc.messages import BASE, BUFFER, SIZE, tensor

GRANTED = 4 * SIZE


def fresh() -> WorkerEnd:
    return WorkerEnd(GRANTED, 1, lambda place: place.part == 0 and place.offset + place.size <= 1000)


def allocated() -> WorkerEnd:
    """An end whose host has one buffer, of `SIZE` bytes at `BASE`."""
    end = fresh()
    assert end.from_host(messages.allocate(SIZE)) == [ToServer(messages.allocate(SIZE))]
    asked = end.from_server(answer(struct.pack("<QQ", BUFFER, SIZE)))
    assert asked == [ToServer(frame(Command.BUFFER_GET_BASE, struct.pack("<Q", BUFFER)))]
    told = end.from_server(answer(struct.pack("<Q", BASE)))
    assert told == [ToHost(frame(Reply.ANSWER, struct.pack("<QQQ", BUFFER, SIZE, BASE)))]
    return end


def reference(place: Place, about: bytes | None = None) -> bytes:
    header = (about or tensor(kind=24)) + bytes(9)
    return frame(Link.REFERENCE, REFERENCE.pack(header, place.part, place.offset, place.size))


def test_a_reference_becomes_an_upload_from_the_file() -> None:
    place = Place(0, 10, 100)
    head, body = allocated().from_host(reference(place, tensor(b"w", kind=24, shape=(100, 1, 1, 1))))
    assert isinstance(head, ToServer)
    assert head.data[:9] == struct.pack("<BQ", Command.SET_TENSOR, SET_HEADER + 100)
    assert body == FileToServer(place)


def test_a_packed_graph_reaches_the_server_as_it_was() -> None:
    graph = messages.graph(tensor())
    assert allocated().from_host(packed(graph)) == [ToServer(graph)]


def test_what_was_not_granted_is_answered_as_out_of_memory() -> None:
    end = fresh()
    assert end.from_host(messages.allocate(GRANTED + 1)) == [ToHost(frame(Reply.ANSWER, bytes(24)))]
    assert end.from_host(messages.allocate((1 << 64) - 1)) == [ToHost(frame(Reply.ANSWER, bytes(24)))]
    assert end.from_host(messages.allocate(GRANTED)) == [ToServer(messages.allocate(GRANTED))]


def test_a_freed_buffer_may_be_had_again_and_not_be_used() -> None:
    end = allocated()
    end.from_host(frame(Command.FREE_BUFFER, struct.pack("<Q", BUFFER)))
    assert end.from_host(messages.allocate(GRANTED)) == [ToServer(messages.allocate(GRANTED))]
    with pytest.raises(ProtocolError):
        allocated_and_freed().from_host(messages.set_tensor(b"x"))


def allocated_and_freed() -> WorkerEnd:
    end = allocated()
    end.from_host(frame(Command.FREE_BUFFER, struct.pack("<Q", BUFFER)))
    return end


def packed(graph: bytes) -> bytes:
    return frame(Link.PACKED, zlib.compress(graph[9:]))


HOSTILE = {
    "upload beyond its buffer": messages.set_tensor(
        bytes(100), tensor(kind=24, data=BASE + SIZE - 99, shape=(1, 1, 1, 1))
    ),
    "upload with an offset that wraps": messages.set_tensor(b"x", offset=(1 << 64) - 1),
    "upload before its buffer": messages.set_tensor(b"x", tensor(data=BASE - 8)),
    "upload to no buffer": messages.set_tensor(b"x", tensor(buffer=1)),
    "upload for the cache": messages.set_tensor(b"x", cache=1),
    "upload of 2^63": struct.pack("<BQ", Command.SET_TENSOR, 1 << 63),
    "large upload beyond its buffer": messages.set_tensor(
        bytes(70_000), tensor(kind=24, data=BASE + SIZE - 8)
    ),
    "upload beyond its tensor": messages.set_tensor(bytes(65), tensor()),
    "read beyond its tensor": messages.get_tensor(4, offset=61),
    "fill beyond its tensor": frame(Command.MEMSET_TENSOR, tensor() + struct.pack("<QQB", 0, 65, 0)),
    "read beyond the buffer": messages.get_tensor(SIZE + 1),
    "read of 2^63": messages.get_tensor(1 << 63),
    "read of a tensor larger than its buffer": messages.get_tensor(4, tensor(shape=(SIZE, 1, 1, 1))),
    "strides that wrap": messages.get_tensor(4, tensor(shape=(2**32 - 1,) * 4, strides=(2**32 - 1,) * 4)),
    "unknown type": messages.get_tensor(4, tensor(kind=99)),
    "unknown operation": messages.graph(tensor(op=9999)),
    "graph outside of the buffer": messages.graph(tensor(data=BASE + SIZE)),
    "graph of a pointer without a buffer": messages.graph(tensor(buffer=0)),
    "graph with more nodes than bytes": messages.graph(tensor(), nodes=1 << 31),
    "graph with more tensors than bytes": messages.graph(tensor(), count=1 << 31),
    "graph of an unknown type": messages.graph(tensor(kind=63)),
    "graph that overflows": messages.graph(tensor(shape=(2**32 - 1,) * 4, strides=(2**32 - 1,) * 4)),
    "graph on another device": messages.graph(tensor(), device=1),
    "unknown operation, packed": packed(messages.graph(tensor(op=9999))),
    "packed graph that is too short": frame(Link.PACKED, zlib.compress(bytes(8))),
    "packed nonsense": frame(Link.PACKED, b"nonsense"),
    "recompute without a graph": frame(Command.GRAPH_RECOMPUTE, bytes(4)),
    "free of a stranger": frame(Command.FREE_BUFFER, bytes(8)),
    "clear of a stranger": frame(Command.BUFFER_CLEAR, bytes(9)),
    "second hello": frame(Command.HELLO, bytes(24)),
    "hash": messages.set_hash(tensor(), 1),
    "unknown command": frame(18),
    "command of the fork": frame(19, bytes(612)),
    "reference beyond the file": reference(Place(0, 901, 100)),
    "reference to another file": reference(Place(1, 0, 1)),
    "reference beyond its tensor": reference(Place(0, 0, 1000), tensor()),
    "reference beyond the buffer": reference(Place(0, 0, 1000), tensor(kind=24, data=BASE + SIZE - 999)),
    "a second opening": frame(Link.OPEN),
}


@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_no_host_needs_never_reaches_the_server(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        allocated().from_host(message)
    end = allocated()
    passed: list[object] = []

    def bytewise() -> None:
        for byte in message[:2000]:
            passed.extend(end.from_host(bytes([byte])))

    with pytest.raises(ProtocolError):
        bytewise()
    assert passed == []


def test_the_honest_things_pass() -> None:
    end = allocated()
    for message in (
        messages.set_tensor(b"abc"),
        messages.set_tensor(bytes(100), tensor(kind=24, data=BASE + SIZE - 100, shape=(100, 1, 1, 1))),
        messages.graph(tensor(), tensor(buffer=0, data=0)),
        frame(Command.GRAPH_RECOMPUTE, bytes(4)),
        messages.get_tensor(64),
    ):
        assert end.from_host(message) == [ToServer(message)]
    assert end.from_server(answer(bytes(64))) == [ToHost(frame(Reply.ANSWER, bytes(64)))]


def test_a_server_that_answers_another_size_is_not_believed() -> None:
    end = allocated()
    end.from_host(messages.get_tensor(64))
    with pytest.raises(ProtocolError):
        end.from_server(answer(bytes(65)))
    with pytest.raises(ProtocolError):
        allocated().from_server(answer(b""))


@given(st.lists(st.binary(min_size=296, max_size=296), min_size=1, max_size=3))
def test_no_graph_of_random_tensors_breaks_the_check(tensors: list[bytes]) -> None:
    end = allocated()
    try:
        effects = end.from_host(messages.graph(*tensors))
    except ProtocolError:
        return
    assert len(effects) == 1


@given(
    st.integers(0, 43),
    st.tuples(*[st.integers(0, 2**32 - 1)] * 4),
    st.tuples(*[st.integers(0, 2**32 - 1)] * 4),
    st.integers(0, 2**64 - 1),
)
def test_the_quick_check_and_the_thorough_one_agree(
    kind: int, shape: tuple[int, int, int, int], strides: tuple[int, int, int, int], data: int
) -> None:
    about = tensor(kind=kind, shape=shape, strides=strides, data=data)

    def refuses(message: bytes) -> bool:
        try:
            allocated().from_host(message)
        except ProtocolError:
            return True
        return False

    if refuses(messages.graph(about)):
        assert refuses(frame(Command.INIT_TENSOR, about))
