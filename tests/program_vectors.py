"""Golden bytes of what `libmesh-node` adds to the wire: what nodes announce, and how one borrows another's rpc-server.

Files, and what they mean, are as in `tests/vector_form.py`; besides, a field that is absent from a value has its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from libmesh_node.announced import (
    AnnouncedModel,
    Distance,
    NodeStatus,
    OnDisk,
    Wish,
    decode_demand,
    decode_status,
    encode_demand,
    encode_status,
)
from libmesh_node.asked import Asked
from libmesh_node.llama.rpc.facts import Device, WorkerFacts
from libmesh_node.llama.rpc.opening import (
    MAX_DEVICES,
    MAX_MESSAGE,
    UNSAID,
    Neighbour,
    Refusal,
    SessionRequest,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)

from tests.handmade import field
from tests.vector_cases import Case, content_of
from tests.vector_form import Codec, from_json

Outcome = tuple[Refusal | None, WorkerFacts | None]

HOST, WORKER = (
    "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA",
    "12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X",
)
DIGEST = "ab" * 32


def _encode_outcome(outcome: Outcome) -> bytes:
    refusal, facts = outcome
    said = refusal or facts
    assert said is not None
    return encode_answer(said)


def _decode_outcome(data: bytes) -> Outcome:
    outcome = decode_answer(data)
    return (outcome, None) if isinstance(outcome, Refusal) else (None, outcome)


CODECS: dict[str, Codec] = {
    "node_status": Codec(encode_status, decode_status, NodeStatus, "NodeStatus"),
    "demand": Codec(encode_demand, decode_demand, tuple[Asked, ...], "Demand: requests are whole ones"),
    "session_request": Codec(encode_request, decode_request, SessionRequest, "SessionRequest"),
    "session_answer": Codec(
        _encode_outcome, _decode_outcome, Outcome, "SessionAnswer: the refusal, or what the worker has"
    ),
}


def node_status() -> Iterator[Case]:
    yield Case("nothing", NodeStatus())
    yield Case("a client", NodeStatus(version="0.1.0", hostname="laptop", client=True, node_status="Client"))
    model = AnnouncedModel(
        name="Qwen3-8B", digest=DIGEST, size_bytes=5_027_783_488, context_length=40960, slots=4, ready=True,
        workers=(WORKER,), busy=2, speed=12.5, tools=True, vision=True, first=0.384,
    )  # fmt: skip
    host = NodeStatus(
        version="0.1.0", hostname="desk", memory_bytes=24 * 10**9, models=(model,), node_status="Serving (split)",
        spare_bytes=10**9, bandwidth=936 * 10**9, accelerated=True, rpc_protocol="7.0.0",
        distances=(Distance(WORKER, 0.0023), Distance(HOST, 0.41, relayed=True)),
    )  # fmt: skip
    yield Case("a host", host)
    standby = NodeStatus(
        version="0.1.0", hostname="attic", memory_bytes=16 * 10**9, node_status="Standby", spare_bytes=10**10, rests=True,
        models=(AnnouncedModel(name="small", digest="cd" * 32, coming=True),),
        wishes=(
            Wish(digest=DIGEST, name="Qwen3-8B", requests=1.5, waiting=2), Wish(digest="cd" * 32, named=True),
        ),
        on_disk=(
            OnDisk(digest=DIGEST, name="Qwen3-8B", size_bytes=5_027_783_488, needed_bytes=6 * 10**9, context_length=4096),
            OnDisk(digest="ef" * 32, name="broken", refused=True),
        ),
    )  # fmt: skip
    yield Case("a standby", standby)
    lent = AnnouncedModel(name="Qwen3-8B", digest=DIGEST, split_bytes=6 * 10**9)
    yield Case("a worker", NodeStatus(memory_bytes=16 * 10**9, spare_bytes=10**10, models=(lent,)))
    unnamed = field(12, field(2, "m") + field(3, 100)) + field(13, field(1, "AB" * 32))
    yield Case("wishes and files without a digest are left out", NodeStatus(), unnamed)
    several = tuple(AnnouncedModel(name=name) for name in ("a", "模型", "x" * 200))
    yield Case("models that are not identified yet", NodeStatus(models=several))
    yield Case("with a field that we do not know", NodeStatus(client=True), field(3, 1) + field(99, b"new"))
    yield Case("what cannot be read says nothing", NodeStatus(), b"\xff\xff")
    yield Case("text that is no UTF-8 says nothing", NodeStatus(), field(3, 1) + field(1, b"\xff"))
    yield Case("control characters are dropped", NodeStatus(hostname="[2Ja"), field(2, "\x1b[2Ja\n"))
    yield Case("text is cut at 200 characters", NodeStatus(hostname="x" * 200), field(2, "x" * 201))
    odd = (
        field(5, field(1, "a\nb")) + field(5, field(2, DIGEST)) + field(5, field(1, "good") + field(2, "AB"))
    )
    yield Case(
        "a model whose name cannot be said is left out, a digest that is none counts as unknown",
        NodeStatus(models=(AnnouncedModel(name="good"),)),
        odd,
    )
    yield Case(
        "more to spare than there is", NodeStatus(memory_bytes=5, spare_bytes=5), field(4, 5) + field(7, 6)
    )


def demand() -> Iterator[Case]:
    yield Case("nothing", ())
    one = Asked(digest=DIGEST, name="Qwen3-8B", requests=3, waiting=1)
    yield Case("two models", (one, Asked(digest="cd" * 32, name="small", waiting=7)))
    yield Case("what cannot be read says nothing", (), b"\xff\xff")
    many = field(1, field(1, DIGEST) + field(3, 100_000_000) + field(4, 2**31))
    yield Case("more than anybody asks", (Asked(digest=DIGEST, name="", requests=1000, waiting=65536),), many)


def session_request() -> Iterator[Case]:
    alone = SessionRequest(digest=DIGEST, memory_bytes=3 << 30, protocol=(7, 0, 0), model="Qwen3-8B")
    yield Case("the only worker", alone)
    first = dataclasses.replace(alone, next=WORKER, next_token=bytes(range(16)))
    yield Case("the first of two", first)
    yield Case("the second of two", dataclasses.replace(alone, previous=HOST, token=bytes(range(16))))
    known = (Neighbour(50001, HOST, bytes(16)), Neighbour(65535, WORKER, bytes(range(16))))
    yield Case("the fork's, and all of its host's workers",
               SessionRequest(digest=DIGEST, memory_bytes=1, protocol=(4, 1, 0), token=bytes(16), neighbours=known))  # fmt: skip
    yield Case(
        "the largest numbers", SessionRequest(digest=DIGEST, memory_bytes=2**64 - 1, protocol=(255,) * 3)
    )
    head, version = field(1, DIGEST), field(3, "7.0.0")
    yield Case("with a field that we do not know", SessionRequest(digest=DIGEST, memory_bytes=0, protocol=(7, 0, 0)),
               head + version + field(99, 1))  # fmt: skip
    yield Case(
        "a digest in capitals",
        raw=field(1, "AB" * 32) + version,
        reason="a digest is 64 lower-case hex digits",
    )
    yield Case("no digest", raw=version, reason="a digest is 64 lower-case hex digits")
    for name, text in {
        "no protocol": "",
        "two numbers": "7.0",
        "a number above 255": "7.0.256",
        "words": "seven",
    }.items():
        yield Case(name, raw=head + field(3, text), reason="a protocol is major.minor.patch, each 0 to 255")
    for number in (5, 8):
        yield Case(f"field {number} of 15 bytes", raw=head + version + field(number, bytes(15)),
                   reason="a token has 16 bytes")  # fmt: skip
    for name, inner in {
        "no port": field(3, bytes(16)),
        "a port above 65535": field(1, 65536) + field(3, bytes(16)),
        "a token of 15 bytes": field(1, 1) + field(3, bytes(15)),
    }.items():
        yield Case(f"a neighbour with {name}", raw=head + version + field(9, inner),
                   reason="a neighbour has a port from 1 to 65535 and a token of 16 bytes")  # fmt: skip
    yield Case("over 4 KiB", raw=head + version + field(99, bytes(MAX_MESSAGE)), reason="at most 4096 bytes")
    yield Case("not protobuf", raw=b"\xff\xff", reason="not a protobuf message")


def session_answer() -> Iterator[Case]:
    device = Device(64, 1 << 40, 3 << 30, 64 << 30, True)
    yield Case("one processor", (None, WorkerFacts((7, 0, 0), (device,))))
    cards = tuple(Device(256, 2**64 - 1, n << 30, 24 << 30, False) for n in range(MAX_DEVICES))
    yield Case("packed graphs, too", (None, WorkerFacts((7, 0, 0), (device,), unpacks=True)))
    yield Case("as many devices as there may be", (None, WorkerFacts((7, 255, 3), cards)))
    yield Case("refused", (Refusal("it has not the same Qwen3-8B"), None))
    yield Case("refused for now", (Refusal("its memory is taken", later=True), None))
    yield Case("refused in what cannot be printed", (Refusal(UNSAID), None), field(1, "\n\x1b"))
    one, version = field(4, field(1, 64)), field(3, "7.0.0")
    yield Case(
        "refused, with devices: the refusal counts", (Refusal("no"), None), field(1, "no") + version + one
    )
    yield Case("nothing", raw=b"", reason="either a refusal or 1 to 16 devices")
    yield Case("no devices", raw=version, reason="either a refusal or 1 to 16 devices")
    yield Case("17 devices", raw=version + one * 17, reason="either a refusal or 1 to 16 devices")
    yield Case("no alignment", raw=version + field(4, field(2, 1)), reason="an alignment is a power of two")
    yield Case(
        "an alignment of 48", raw=version + field(4, field(1, 48)), reason="an alignment is a power of two"
    )
    yield Case("no protocol", raw=one, reason="a protocol is major.minor.patch, each 0 to 255")
    yield Case("over 4 KiB", raw=field(1, "x" * MAX_MESSAGE), reason="at most 4096 bytes")


TABLE: dict[str, Callable[[], Iterator[Case]]] = {
    "node_status": node_status,
    "demand": demand,
    "session_request": session_request,
    "session_answer": session_answer,
}


def value_to_json(_message: str, value: Any) -> Any:
    """The JSON form of a value, without what has its default."""
    match value:
        case bytes():
            return value.hex()
        case tuple():
            return [value_to_json("", item) for item in value]
        case None | bool() | int() | float() | str():
            return value
        case _:
            return {
                entry.name: value_to_json("", getattr(value, entry.name))
                for entry in dataclasses.fields(value)
                if getattr(value, entry.name) != entry.default
            }


def value_from_json(message: str, data: Any) -> Any:
    """The inverse of `value_to_json`."""
    return from_json(CODECS[message].shape, data)


def vectors(message: str) -> str:
    """The content of the file of `message`."""
    return content_of(TABLE[message](), CODECS[message], partial(value_to_json, message))
