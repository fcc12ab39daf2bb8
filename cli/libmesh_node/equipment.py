"""What this machine serves models with: llama.cpp's programs, the devices they see, and memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import trio

from libmesh_node.errors import NodeError
from libmesh_node.hardware import Hardware, detect, memory_bandwidth
from libmesh_node.llama.engine import Binary, Engine, cache_root, find_engine
from libmesh_node.llama.gguf import ModelError, read_header
from libmesh_node.llama.probe import list_devices
from libmesh_node.llama.server import DraftPlan, ServerPlan, plan_server
from libmesh_node.models.reference import ModelFile
from libmesh_node.options import NodeOptions

log = logging.getLogger(__name__)

_PROCESSOR = {"cpu", "none"}


class Equipment:
    """`measure` at the start; `set_up` before the first model, which takes longer and which an idle node does without.

    Attributes:
        memory_bytes: memory for models; 0 on a client, and before `measure`.
        bandwidth: of that memory, in bytes per second; 0 before `set_up`, as all that follows is empty before it.
        engine: llama.cpp's programs; `None` on a client.
        own_devices: the GPUs that llama-server can use here, by its names for them.
    """

    def __init__(self, options: NodeOptions) -> None:
        self._options = options
        self.memory_bytes = 0
        self.bandwidth = 0
        self.engine: Engine | None = None
        self.own_devices: tuple[str, ...] = ()
        self._hardware: Hardware | None = None
        self._draft: DraftPlan | None = None
        self._vocabulary = 0
        self._setting_up = trio.Lock()

    @property
    def rpc_protocol(self) -> str:
        """Of the rpc-server that can be lent; empty if there is none."""
        binary = self.engine.rpc_server if self.engine is not None else None
        return (binary.rpc_protocol or "") if binary is not None else ""

    async def measure(self) -> None:
        """Find out how much memory there is."""
        self._hardware = await trio.to_thread.run_sync(detect)
        self.memory_bytes = self._hardware.model_memory(max_vram_gb=self._options.max_vram_gb)

    async def set_up(self) -> Binary:
        """Find the engine, its devices and the draft model, the first time; llama-server.

        Raises `NodeError` for whatever is missing, saying what to do; the next call looks again.
        """
        async with self._setting_up:
            if self.engine is not None:
                return self.engine.require_llama_server()
            if self._hardware is None:
                raise NodeError("The node is still starting; try again in a moment.")
            engine = await trio.to_thread.run_sync(find_engine, self._options.bin_dir)
            binary = engine.require_llama_server()
            for note in engine.notes:
                log.warning("%s", note)
            devices = await trio.to_thread.run_sync(list_devices, binary.path)
            draft, vocabulary = await trio.to_thread.run_sync(_draft, self._options)
            chosen = self._chosen(devices)
            self.memory_bytes = self._hardware.model_memory(
                devices=chosen, max_vram_gb=self._options.max_vram_gb
            )
            self.own_devices = tuple(map(_name_of, chosen))
            self.bandwidth = await self._bandwidth(self._hardware, chosen)
            self._draft, self._vocabulary, self.engine = draft, vocabulary, engine
            return binary

    def plan(self, model: ModelFile, memory_bytes: int) -> ServerPlan:
        """How to serve a model here alone, with so much memory."""
        plan = plan_server(model, memory_bytes=memory_bytes, device=self._options.device)
        if self._draft is not None and model.header.vocabulary == self._vocabulary:
            return replace(plan, draft=self._draft)
        if self._draft is not None:
            log.warning(
                "%s has another vocabulary than %s, which cannot guess for it", model.name, self._draft.path
            )
        return plan

    def _chosen(self, devices: Sequence[str]) -> tuple[str, ...]:
        if self._options.device is None:
            return tuple(devices)
        wanted = {name.strip().lower() for name in self._options.device.split(",")} - _PROCESSOR
        chosen = tuple(device for device in devices if _name_of(device).lower() in wanted)
        if missing := wanted - {_name_of(device).lower() for device in chosen}:
            have = ", ".join(map(_name_of, devices)) or "none"
            raise NodeError(
                f"There is no device {', '.join(sorted(missing))} for --device. Besides cpu, llama-server has: {have}."
            )
        return chosen

    async def _bandwidth(self, hardware: Hardware, chosen: Sequence[str]) -> int:
        """Of GPUs as their driver tells. Apple's share the processor's memory, whose speed can be measured."""
        if chosen and not any(gpu.kind == "apple" for gpu in hardware.gpus):
            named = [gpu for gpu in hardware.gpus if any(gpu.name in device for device in chosen)]
            return int(max((gpu.bandwidth for gpu in named or hardware.gpus), default=0.0))
        return int(await trio.to_thread.run_sync(memory_bandwidth, cache_root() / "hardware.json"))


def _name_of(device: str) -> str:
    """`CUDA0` of `CUDA0: NVIDIA …`."""
    return device.partition(":")[0]


def _draft(options: NodeOptions) -> tuple[DraftPlan | None, int]:
    """The model that guesses, and the size of its vocabulary. Raises `ModelError` for a file that is none."""
    if options.draft is None or not options.draft_max:
        return None, 0
    if not options.draft.is_file():
        raise ModelError(f"There is no file {options.draft}, which --draft names.")
    return DraftPlan(path=options.draft, tokens=options.draft_max), read_header(options.draft).vocabulary
