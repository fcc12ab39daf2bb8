"""The models of this node: found, identified, and each served by its own llama-server."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import trio

from libmesh_node.announced import AnnouncedModel
from libmesh_node.datadir import DataDir
from libmesh_node.errors import NodeError
from libmesh_node.hardware import Hardware, detect, memory_bandwidth
from libmesh_node.llama.engine import Binary, Engine, cache_root, find_engine
from libmesh_node.llama.gguf import GgufHeader, ModelError, read_header
from libmesh_node.llama.probe import list_devices
from libmesh_node.llama.server import MIN_CONTEXT, DraftPlan, ServerPlan, plan_server
from libmesh_node.llama.supervisor import LlamaServer
from libmesh_node.models.digest import model_digest
from libmesh_node.models.reference import ModelFile, model_folders, resolve
from libmesh_node.options import NodeOptions
from libmesh_node.placement.shape import ModelShape, shape_of
from libmesh_node.placement.splitting import needed
from libmesh_node.snapshot import Process

log = logging.getLogger(__name__)


@dataclass
class Entry:
    """One of this node's models.

    Attributes:
        headers: of all its parts.
        plan: how to serve it on this machine alone.
        alone: it is served so. If not, it takes other nodes with the same file.
        digest: empty until the file has been read; `identified` is set then, or when it could not be read.
        servers: the processes that serve it, the one that answers requests first. Two during a change of placement.
        workers: peers that the first one is split over, and `split_bytes` the memory of this machine that it takes.
    """

    model: ModelFile
    headers: tuple[GgufHeader, ...]
    plan: ServerPlan
    alone: bool
    digest: str = ""
    identified: trio.Event = field(default_factory=trio.Event)
    servers: list[LlamaServer] = field(default_factory=list)
    workers: tuple[str, ...] = ()
    split_bytes: int = 0

    @property
    def base_url(self) -> str | None:
        """Where it answers now; `None` if it does not."""
        return self.servers[0].base_url if self.servers else None

    @property
    def home_bytes(self) -> int:
        """Memory that it takes here if it is served alone."""
        return needed(self.shape) if self.alone else 0

    @property
    def shape(self) -> ModelShape:
        """What placement needs to know of it."""
        return shape_of(self.headers, self.digest, _least_context(self.model))


class LocalModels:
    """The models that `--model` named. `prepare` finds them, `run` keeps those served that fit this machine.

    Attributes:
        entries: by name, in the order of the command line.
        memory_bytes: memory for models on this machine; 0 on a client, and before `prepare`.
        bandwidth: of that memory, in bytes per second.
        engine: llama.cpp's programs; `None` on a client.
        own_devices: the GPUs that llama-server can use here, by its names for them.

    Args:
        options: the command line.
        folder: the data folder, for logs and models.
        on_change: called in trio's thread whenever a server's state or a digest changed.
    """

    def __init__(self, options: NodeOptions, folder: DataDir, on_change: Callable[[], None]) -> None:
        self._options, self._folder = options, folder
        self.entries: dict[str, Entry] = {}
        self.memory_bytes = 0
        self.bandwidth = 0
        self.engine: Engine | None = None
        self.own_devices: tuple[str, ...] = ()
        self.on_change = on_change
        self._told: dict[str, int | None] = {}

    @property
    def processes(self) -> tuple[Process, ...]:
        """The state of each server, in the order of the command line."""
        return tuple(server.process for entry in self.entries.values() for server in entry.servers)

    @property
    def announced(self) -> tuple[AnnouncedModel, ...]:
        """The models as other nodes are told of them, in the order of the command line."""
        return tuple(map(_announced, self.entries.values()))

    @property
    def spare_bytes(self) -> int:
        """Memory that no model takes which is served on this machine alone."""
        return max(0, self.memory_bytes - sum(entry.home_bytes for entry in self.entries.values()))

    @property
    def rpc_protocol(self) -> str:
        """Of the rpc-server that can be lent; empty if there is none."""
        binary = self.engine.rpc_server if self.engine is not None else None
        return (binary.rpc_protocol or "") if binary is not None else ""

    def base_url(self, name: str) -> str | None:
        """Where a model's server answers; `None` unless it is ready."""
        entry = self.entries.get(name)
        return entry.base_url if entry is not None else None

    async def prepare(self) -> None:
        """Find the engine and all models, and plan their servers; nothing runs yet.

        Raises `NodeError` for whatever is missing, saying what to do.
        """
        if self._options.client:
            return
        hardware = await trio.to_thread.run_sync(detect)
        cap = self._options.max_vram_gb
        self.memory_bytes = hardware.model_memory(max_vram_gb=cap)
        if not self._options.models:
            return
        self.engine = await trio.to_thread.run_sync(find_engine, self._options.bin_dir)
        for note in self.engine.notes:
            log.warning("%s", note)
        binary = self.engine.require_llama_server()
        devices = await trio.to_thread.run_sync(list_devices, binary.path)
        self.memory_bytes = hardware.model_memory(gpu_usable=bool(devices), max_vram_gb=cap)
        self._choose_devices(devices)
        self.bandwidth = await self._bandwidth(hardware)
        models = [await self._find(reference) for reference in self._options.models]
        budget = self.memory_bytes // max(1, len(models))
        draft, vocabulary = await trio.to_thread.run_sync(_draft, self._options)
        for model in models:
            if model.name in self.entries:
                raise NodeError(
                    f"Two models are named {model.name}. Requests could not tell them apart: rename one of the files."
                )
            plan = plan_server(model, memory_bytes=budget, device=self._options.device)
            if draft is not None and model.header.vocabulary == vocabulary:
                plan = replace(plan, draft=draft)
            elif draft is not None:
                log.warning(
                    "%s has another vocabulary than %s, which cannot guess for it", model.name, draft.path
                )
            headers = await trio.to_thread.run_sync(_headers, model)
            entry = Entry(model, headers, plan, alone=False)
            entry.alone = needed(entry.shape) <= self.spare_bytes and not self._options.split
            self.entries[model.name] = entry
            self._introduce(entry, binary)

    def _choose_devices(self, devices: Sequence[str]) -> None:
        names = [device.partition(":")[0] for device in devices]
        chosen = self._options.device
        if chosen is not None:
            wanted = {name.lower() for name in chosen.split(",")}
            names = [name for name in names if name.lower() in wanted]
        self.own_devices = tuple(names)

    async def _bandwidth(self, hardware: Hardware) -> int:
        if self.own_devices:
            return int(max((gpu.bandwidth for gpu in hardware.gpus), default=0.0))
        return int(await trio.to_thread.run_sync(memory_bandwidth, cache_root() / "hardware.json"))

    async def run(self) -> None:
        """Serve the models that fit until cancelled; then end their servers, within 2.5 s. Identify all."""
        async with trio.open_nursery() as nursery:
            for entry in self.entries.values():
                if entry.alone:
                    server = self._server(entry)
                    entry.servers.append(server)
                    nursery.start_soon(server.run)
                nursery.start_soon(self._identify, entry)

    async def _find(self, reference: str) -> ModelFile:
        find = partial(resolve, reference, model_folders(self._folder.path))
        return await trio.to_thread.run_sync(find)

    async def shape_of(self, reference: str) -> tuple[str, ModelShape]:
        """Name and shape of any model here. Reads it whole if its digest is not known yet. Raises `NodeError`, `OSError`."""
        model = await self._find(reference)
        headers = await trio.to_thread.run_sync(_headers, model)
        digest = await model_digest(model.parts)
        return model.name, shape_of(headers, digest, _least_context(model))

    def _server(self, entry: Entry) -> LlamaServer:
        assert self.engine is not None
        return LlamaServer(
            self.engine.require_llama_server(),
            entry.plan,
            log=self._folder.llama_log(entry.model.name),
            environment=os.environ,
            on_change=lambda process: self._changed(process),
        )

    def log_of(self, name: str) -> Path:
        """The file for the output of a model's llama-server."""
        return self._folder.llama_log(name)

    def _introduce(self, entry: Entry, binary: Binary) -> None:
        model, plan = entry.model, entry.plan
        log.info(
            "model      %s (%s, context %d), by llama-server %s",
            model.name,
            _size(model.size_bytes),
            _usable_context(plan),
            binary.version,
        )
        if model.is_demo:
            log.info("           it is a toy with random weights: what it says is nonsense, and meant to be")
        if not entry.alone and not self._options.split:
            log.info(
                "%s needs %s and this machine has %s left for models; it is served together with other nodes that have it",
                model.name,
                _size(needed(entry.shape)),
                _size(self.spare_bytes),
            )

    def _changed(self, process: Process) -> None:
        if process.status == "ready" and self._told.get(process.model) != process.pid:
            log.info("%s is ready", process.model)
            self._told[process.model] = process.pid
        self.on_change()

    async def _identify(self, entry: Entry) -> None:
        try:
            entry.digest = await model_digest(entry.model.parts)
        except OSError as exc:
            log.warning("cannot read %s to identify it: %s", entry.model.path, exc.strerror)
        entry.identified.set()
        self.on_change()


def _announced(entry: Entry) -> AnnouncedModel:
    plan = entry.servers[0].plan if entry.servers else entry.plan
    return AnnouncedModel(
        name=entry.model.name,
        digest=entry.digest,
        size_bytes=entry.model.size_bytes,
        context_length=_usable_context(plan),
        slots=plan.slots,
        ready=entry.base_url is not None,
        workers=entry.workers if entry.base_url is not None else (),
        busy=entry.servers[0].load.busy if entry.servers else 0,
        speed=entry.servers[0].load.speed if entry.servers else 0.0,
    )


def _draft(options: NodeOptions) -> tuple[DraftPlan | None, int]:
    """The model that guesses, and the size of its vocabulary. Raises `ModelError` for a file that is none."""
    if options.draft is None or not options.draft_max:
        return None, 0
    if not options.draft.is_file():
        raise ModelError(f"There is no file {options.draft}, which --draft names.")
    return DraftPlan(path=options.draft, tokens=options.draft_max), read_header(options.draft).vocabulary


def _least_context(model: ModelFile) -> int:
    return min(MIN_CONTEXT, model.header.context_length or MIN_CONTEXT)


def _headers(model: ModelFile) -> tuple[GgufHeader, ...]:
    return (model.header, *(read_header(part) for part in model.parts[1:]))


def _usable_context(plan: ServerPlan) -> int:
    """Tokens that one request may have: the slots share the cache, and no model goes beyond its training."""
    return min(plan.context, plan.model.header.context_length or plan.context)


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
