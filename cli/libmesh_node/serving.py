"""The models of this node: found, identified, and each served by its own llama-server."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial

import trio

from libmesh_node.announced import AnnouncedModel
from libmesh_node.datadir import DataDir
from libmesh_node.errors import NodeError
from libmesh_node.hardware import detect
from libmesh_node.llama.engine import Binary, find_engine
from libmesh_node.llama.probe import list_devices
from libmesh_node.llama.server import ServerPlan, plan_server
from libmesh_node.llama.supervisor import LlamaServer
from libmesh_node.models.digest import model_digest
from libmesh_node.models.reference import ModelFile, model_folders, resolve
from libmesh_node.options import NodeOptions
from libmesh_node.snapshot import Process

log = logging.getLogger(__name__)


class LocalModels:
    """The models that `--model` named. `prepare` finds them, `run` keeps them served.

    Attributes:
        memory_bytes: memory for models on this machine; 0 on a client, and before `prepare`.

    Args:
        options: the command line.
        folder: the data folder, for logs and models.
        on_change: called in trio's thread whenever a server's state or a digest changed.
    """

    def __init__(self, options: NodeOptions, folder: DataDir, on_change: Callable[[], None]) -> None:
        self._options, self._folder = options, folder
        self.memory_bytes = 0
        self._on_change = on_change
        self._servers: dict[str, LlamaServer] = {}
        self._digests: dict[str, str] = {}

    @property
    def processes(self) -> tuple[Process, ...]:
        """The state of each server, in the order of the command line."""
        return tuple(server.process for server in self._servers.values())

    @property
    def announced(self) -> tuple[AnnouncedModel, ...]:
        """The models as other nodes are told of them, in the order of the command line."""
        return tuple(self._announced(server) for server in self._servers.values())

    def base_url(self, name: str) -> str | None:
        """Where a model's server answers; `None` unless it is ready."""
        server = self._servers.get(name)
        return server.base_url if server is not None else None

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
        engine = await trio.to_thread.run_sync(find_engine, self._options.bin_dir)
        for note in engine.notes:
            log.warning("%s", note)
        binary = engine.require_llama_server()
        devices = await trio.to_thread.run_sync(list_devices, binary.path)
        self.memory_bytes = hardware.model_memory(gpu_usable=bool(devices), max_vram_gb=cap)
        models = [await self._find(reference) for reference in self._options.models]
        budget = self.memory_bytes // max(1, len(models))
        for model in models:
            if model.name in self._servers:
                raise NodeError(
                    f"Two models are named {model.name}. Requests could not tell them apart: rename one of the files."
                )
            plan = plan_server(model, memory_bytes=budget, device=self._options.device)
            self._servers[model.name] = self._server(binary, plan)
            self._introduce(model, plan, binary)

    async def run(self) -> None:
        """Serve all models until cancelled; then end their servers, within 2.5 s."""
        async with trio.open_nursery() as nursery:
            for server in self._servers.values():
                nursery.start_soon(server.run)
                nursery.start_soon(self._identify, server.plan.model)

    async def _find(self, reference: str) -> ModelFile:
        find = partial(resolve, reference, model_folders(self._folder.path))
        return await trio.to_thread.run_sync(find)

    def _server(self, binary: Binary, plan: ServerPlan) -> LlamaServer:
        return LlamaServer(
            binary,
            plan,
            log=self._folder.llama_log(plan.model.name),
            environment=os.environ,
            on_change=lambda process: self._changed(process),
        )

    def _introduce(self, model: ModelFile, plan: ServerPlan, binary: Binary) -> None:
        log.info(
            "model      %s (%s, context %d), by llama-server %s",
            model.name,
            _size(model.size_bytes),
            _usable_context(plan),
            binary.version,
        )
        if model.is_demo:
            log.info("           it is a toy with random weights: what it says is nonsense, and meant to be")
        if model.size_bytes * 1.1 > self.memory_bytes:
            log.warning(
                "%s needs about %.1f GB and this machine has %.1f GB for models; it may fail or be very slow",
                model.name,
                model.size_bytes * 1.1 / 1e9,
                self.memory_bytes / 1e9,
            )

    def _changed(self, process: Process) -> None:
        if process.status == "ready":
            log.info("%s is ready", process.model)
        self._on_change()

    async def _identify(self, model: ModelFile) -> None:
        try:
            self._digests[model.name] = await model_digest(model.parts)
        except OSError as exc:
            log.warning("cannot read %s to identify it: %s", model.path, exc.strerror)
        self._on_change()

    def _announced(self, server: LlamaServer) -> AnnouncedModel:
        plan = server.plan
        return AnnouncedModel(
            name=plan.model.name,
            digest=self._digests.get(plan.model.name, ""),
            size_bytes=plan.model.size_bytes,
            context_length=_usable_context(plan),
            slots=plan.slots,
            ready=server.base_url is not None,
        )


def _usable_context(plan: ServerPlan) -> int:
    """Tokens that one request may have: the slots share the cache, and no model goes beyond its training."""
    return min(plan.context, plan.model.header.context_length or plan.context)


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
