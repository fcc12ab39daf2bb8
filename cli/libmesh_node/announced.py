"""What nodes tell each other: `NodeStatus` in an announcement's attributes, as values. See node.proto.

Decoding takes bytes from other members, of any version: what cannot be read is an empty status, never an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from google.protobuf.message import DecodeError

from libmesh_node._pb import node_pb2 as pb
from libmesh_node.asked import Asked

SERVICE_PREFIX = "api/"
"""A model's service is this and the model's name."""

MAX_MODELS = 64
MAX_DISTANCES = 64
MAX_WORKERS = 16
MAX_WISHES = 64
MAX_ON_DISK = 64
MAX_TOLD = 1000
REMEMBERED = 1024
"""Announcements whose meaning is remembered: each is looked at again whenever anything changes. Then the oldest go."""

_MAX_TEXT = 200
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnouncedModel:
    """A model of a node; the fields are those of `ModelStatus` in node.proto."""

    name: str
    digest: str = ""
    size_bytes: int = 0
    context_length: int = 0
    slots: int = 1
    ready: bool = False
    workers: tuple[str, ...] = ()
    busy: int = 0
    speed: float = 0.0  # tokens per second
    coming: bool = False
    tools: bool = False
    vision: bool = False
    first: float = 0.0  # seconds
    split_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a peer is; the fields are those of `Distance` in node.proto. `rtt` in seconds."""

    peer: str
    rtt: float
    relayed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a node asks of the mesh; the fields are those of `Wish` in node.proto. `requests` are whole ones."""

    digest: str
    name: str = ""
    requests: float = 0.0
    waiting: int = 0
    named: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDisk:
    """A model that a node could serve; the fields are those of `OnDisk` in node.proto."""

    digest: str
    name: str
    size_bytes: int = 0
    needed_bytes: int = 0
    context_length: int = 0
    refused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """What a node says of itself; the fields are those of `NodeStatus` in node.proto."""

    version: str = ""
    hostname: str = ""
    client: bool = False
    memory_bytes: int = 0
    models: tuple[AnnouncedModel, ...] = ()
    node_status: str = ""
    spare_bytes: int = 0
    bandwidth: int = 0
    accelerated: bool = False
    rpc_protocol: str = ""
    distances: tuple[Distance, ...] = ()
    wishes: tuple[Wish, ...] = ()
    on_disk: tuple[OnDisk, ...] = ()
    rests: bool = False

    def given(self, digest: str = "") -> int:
        """Bytes of its spare ones that splits have which are not of this model."""
        return sum(model.split_bytes for model in self.models if not digest or model.digest != digest)


def encode_status(status: NodeStatus) -> bytes:
    """The attributes to announce."""
    message = pb.NodeStatus(
        version=status.version,
        hostname=status.hostname,
        client=status.client,
        memory_bytes=status.memory_bytes,
        node_status=status.node_status,
        spare_bytes=status.spare_bytes,
        bandwidth=status.bandwidth,
        accelerated=status.accelerated,
        rpc_protocol=status.rpc_protocol,
        distances=[
            pb.Distance(peer=far.peer, rtt_us=min(round(far.rtt * 1e6), 0xFFFFFFFF), relayed=far.relayed)
            for far in status.distances[:MAX_DISTANCES]
        ],
        rests=status.rests,
        wishes=[
            pb.Wish(
                digest=wish.digest,
                name=wish.name,
                centi_requests=min(round(wish.requests * 100), 0xFFFFFFFF),
                waiting=wish.waiting,
                named=wish.named,
            )
            for wish in status.wishes[:MAX_WISHES]
        ],
        on_disk=[
            pb.OnDisk(
                name=held.name,
                digest=held.digest,
                size_bytes=held.size_bytes,
                needed_bytes=held.needed_bytes,
                context_length=held.context_length,
                refused=held.refused,
            )
            for held in status.on_disk[:MAX_ON_DISK]
        ],
        models=[
            pb.ModelStatus(
                name=model.name,
                digest=model.digest,
                size_bytes=model.size_bytes,
                context_length=model.context_length,
                slots=model.slots,
                busy=model.busy,
                milli_speed=round(model.speed * 1000),
                ready=model.ready,
                coming=model.coming,
                workers=model.workers[:MAX_WORKERS],
                tools=model.tools,
                vision=model.vision,
                first_ms=min(round(model.first * 1000), 0xFFFFFFFF),
                split_bytes=model.split_bytes,
            )
            for model in status.models[:MAX_MODELS]
        ],
    )
    return message.SerializeToString(deterministic=True)


@lru_cache(maxsize=REMEMBERED)
def decode_status(attributes: bytes) -> NodeStatus:
    """A peer's status. Texts are cut to 200 characters and stripped of control characters."""
    message = pb.NodeStatus()
    try:
        message.ParseFromString(attributes)
    except DecodeError:
        return NodeStatus()
    models = {
        model.name: AnnouncedModel(
            name=model.name,
            digest=model.digest if _DIGEST.fullmatch(model.digest) else "",
            size_bytes=model.size_bytes,
            context_length=model.context_length,
            slots=max(1, min(model.slots, 4096)),
            busy=min(model.busy, 65536),
            speed=model.milli_speed / 1000,
            ready=model.ready,
            coming=model.coming,
            workers=tuple(map(_clean, model.workers[:MAX_WORKERS])),
            tools=model.tools,
            vision=model.vision,
            first=model.first_ms / 1000,
            split_bytes=model.split_bytes,
        )
        for model in message.models[:MAX_MODELS]
        if model.name and model.name == _clean(model.name)
    }
    return NodeStatus(
        version=_clean(message.version),
        hostname=_clean(message.hostname),
        client=message.client,
        memory_bytes=message.memory_bytes,
        models=tuple(models.values()),
        node_status=_clean(message.node_status),
        spare_bytes=min(message.spare_bytes, message.memory_bytes),
        bandwidth=message.bandwidth,
        accelerated=message.accelerated,
        rpc_protocol=_clean(message.rpc_protocol),
        distances=tuple(
            Distance(_clean(far.peer), far.rtt_us / 1e6, far.relayed)
            for far in message.distances[:MAX_DISTANCES]
        ),
        rests=message.rests,
        wishes=tuple(map(_wish, filter(_identified, message.wishes[:MAX_WISHES]))),
        on_disk=tuple(map(_on_disk, filter(_identified, message.on_disk[:MAX_ON_DISK]))),
    )


def encode_demand(asked: Iterable[Asked]) -> bytes:
    """What a client tells a member; see `Demand` in node.proto."""
    wishes = [
        pb.Wish(
            digest=one.digest,
            name=one.name,
            centi_requests=min(one.requests, MAX_TOLD) * 100,
            waiting=min(one.waiting, 65536),
        )
        for one in asked
    ]
    return pb.Demand(wishes=wishes[:MAX_WISHES]).SerializeToString(deterministic=True)


def decode_demand(data: bytes) -> tuple[Asked, ...]:
    """What a client told; nothing if it cannot be read."""
    message = pb.Demand()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return ()
    wishes = map(_wish, filter(_identified, message.wishes[:MAX_WISHES]))
    return tuple(
        Asked(
            digest=wish.digest,
            name=wish.name,
            requests=min(int(wish.requests), MAX_TOLD),
            waiting=wish.waiting,
        )
        for wish in wishes
    )


def _identified(message: pb.Wish | pb.OnDisk) -> bool:
    return _DIGEST.fullmatch(message.digest) is not None


def _wish(message: pb.Wish) -> Wish:
    return Wish(
        digest=message.digest,
        name=_clean(message.name),
        requests=message.centi_requests / 100,
        waiting=min(message.waiting, 65536),
        named=message.named,
    )


def _on_disk(message: pb.OnDisk) -> OnDisk:
    return OnDisk(
        digest=message.digest,
        name=_clean(message.name),
        size_bytes=message.size_bytes,
        needed_bytes=message.needed_bytes,
        context_length=message.context_length,
        refused=message.refused,
    )


def _clean(text: str) -> str:
    return "".join(c for c in text[:_MAX_TEXT] if c.isprintable())
