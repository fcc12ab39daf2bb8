"""One of a node's models: its file, how it is served here, and what the others are told of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from libmesh_node.announced import AnnouncedModel
from libmesh_node.door import Door
from libmesh_node.llama.gguf import GgufHeader, read_header
from libmesh_node.llama.load import IDLE, UNABLE, Abilities, coarse
from libmesh_node.llama.server import MIN_CONTEXT, ServerPlan
from libmesh_node.llama.supervisor import LlamaServer
from libmesh_node.models.reference import ModelFile
from libmesh_node.placement.shape import ModelShape, shape_of


@dataclass(eq=False)
class Entry:
    """One of this node's models.

    Attributes:
        headers: of all its parts.
        plan: how to serve it on this machine alone.
        alone: it is served so. If not, it takes other nodes with the same file.
        needed: bytes that it takes at the least.
        digest: empty until the file has been read; `identified` is set then, or when it could not be read.
        servers: the processes that serve it, the one that answers requests first. Two during a change of placement.
        workers: peers that the first one is split over.
        split_bytes: memory of this machine that its splits take, those that are being loaded among them.
        lent_bytes: memory of this machine that works for splits of it which other nodes host.
        life: ends the server of one that is served alone; `None` while it has none.
        leaving: its server finishes what it is answering, and gets nothing new.
        unloading: it is going to be no model of this node any more.
        abilities: of its last server, which still hold while it sleeps.
        asleep: it had nothing to do and was ended; it is started again when a request waits for it.
        left: its split here has ended, so that another node's can begin, which it is now waited for.
        door: what other nodes' requests for it come by; `None` while it is offered to nobody.
    """

    model: ModelFile
    headers: tuple[GgufHeader, ...]
    plan: ServerPlan
    alone: bool
    needed: int = 0
    digest: str = ""
    identified: trio.Event = field(default_factory=trio.Event)
    servers: list[LlamaServer] = field(default_factory=list)
    workers: tuple[str, ...] = ()
    split_bytes: int = 0
    lent_bytes: int = 0
    life: trio.CancelScope | None = None
    leaving: bool = False
    unloading: bool = False
    asleep: bool = False
    abilities: Abilities = UNABLE
    left: bool = False
    door: Door | None = None

    @property
    def name(self) -> str:
        """What requests call it."""
        return self.model.name

    @property
    def base_url(self) -> str | None:
        """Where requests for it go now; `None` if nowhere."""
        return self.servers[0].base_url if self.servers and not self.leaving else None

    @property
    def coming(self) -> bool:
        """Whether it will answer soon, or as soon as it is asked: it is being loaded or restarted, or sleeps.

        So it is while it finishes what it is answering, to be started again with less memory; and while another node is
        about to serve it, or to be passed over for that.
        """
        if self.unloading or self.base_url is not None:
            return False
        return self.asleep or self.left or any(server.process.status not in _OVER for server in self.servers)

    @property
    def failed(self) -> bool:
        """Whether its server could not be kept running."""
        return bool(self.servers) and all(server.process.status == "failed" for server in self.servers)

    @property
    def home_bytes(self) -> int:
        """Memory that is kept for it here if it is served alone: more than it needs, if its context is longer than the least."""
        return self.bytes_with(self.plan) if self.alone else 0

    def bytes_with(self, plan: ServerPlan) -> int:
        """Memory that it takes if it is served by `plan`, on this machine alone."""
        longer = plan.context > least_context(self.model)
        return max(self.needed, plan.memory_bytes) if longer else self.needed

    @property
    def shape(self) -> ModelShape:
        """What placement needs to know of it."""
        return shape_of(self.headers, self.digest, least_context(self.model))


_OVER = ("failed", "stopping")


def announced(entry: Entry) -> AnnouncedModel:
    """What the other nodes are told of it."""
    server = entry.servers[0] if entry.servers else None
    plan, load = (server.plan, server.load) if server else (entry.plan, IDLE)
    able = (server.abilities if server else None) or entry.abilities
    return AnnouncedModel(
        name=entry.model.name,
        digest=entry.digest,
        size_bytes=entry.model.size_bytes,
        context_length=usable_context(plan),
        slots=plan.slots,
        ready=entry.base_url is not None,
        coming=entry.coming,
        workers=entry.workers if entry.base_url is not None else (),
        busy=coarse(load.busy + (entry.door.turns.waiting if entry.door else 0)) if server else 0,
        speed=load.speed,
        first=load.first,
        tools=able.tools,
        vision=able.vision,
        split_bytes=entry.split_bytes + entry.lent_bytes,
    )


def read_headers(model: ModelFile) -> tuple[GgufHeader, ...]:
    """The headers of all parts. Raises `ModelError`."""
    return (model.header, *(read_header(part) for part in model.parts[1:]))


def least_context(model: ModelFile) -> int:
    """Tokens of cache without which it makes no useful server."""
    return min(MIN_CONTEXT, model.header.context_length or MIN_CONTEXT)


def usable_context(plan: ServerPlan) -> int:
    """Tokens that one request may have: the slots share the cache, and no model goes beyond its training."""
    return min(plan.context, plan.model.header.context_length or plan.context)


def bytes_in_words(size: int) -> str:
    """For people: `1.2 GB`, `820.0 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
