"""The models of this node: found, identified, each served by its own llama-server, loaded and unloaded while it runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from libmesh_node.announced import AnnouncedModel
from libmesh_node.datadir import DataDir
from libmesh_node.entries import Entry, announced, bytes_in_words, least_context, read_headers, usable_context
from libmesh_node.equipment import Equipment
from libmesh_node.errors import NodeError
from libmesh_node.llama.server import ServerPlan
from libmesh_node.llama.supervisor import DRAIN_LIMIT, LlamaServer
from libmesh_node.models.digest import model_digest
from libmesh_node.models.reference import ModelFile, model_folders, resolve
from libmesh_node.options import NodeOptions
from libmesh_node.placement.shape import ModelShape, shape_of
from libmesh_node.placement.splitting import needed
from libmesh_node.snapshot import Process

log = logging.getLogger(__name__)

MAX_ENTRIES = 64
"""Models that a node has a part in at once: as many as it may announce. One more is refused."""

_HEARD = 1.0
"""Seconds until all have heard that a server gets nothing new. What they sent before is finished."""


class LocalModels:
    """This node's models. `prepare` finds those that `--model` named, `run` keeps those served that fit this machine.

    Attributes:
        entries: by name, in the order in which they came.
        named: models that the operator named, by name, with their digests (empty while unknown): the mesh wants them
            always, whether this node has a part in them or not.
        equipment: what they are served with.

    Args:
        options: the command line.
        folder: the data folder, for logs and models.
        on_change: called in trio's thread whenever a server's state or a digest changed.
    """

    def __init__(self, options: NodeOptions, folder: DataDir, on_change: Callable[[], None]) -> None:
        self._options, self._folder = options, folder
        self.equipment = Equipment(options)
        self.entries: dict[str, Entry] = {}
        self.named: dict[str, str] = {}
        self.on_change = on_change
        self._told: dict[str, int | None] = {}
        self._tasks: trio.Nursery | None = None
        self._loading = trio.Lock()

    @property
    def processes(self) -> tuple[Process, ...]:
        """The state of each server, in the order in which the models came."""
        return tuple(server.process for entry in self.entries.values() for server in entry.servers)

    @property
    def announced(self) -> tuple[AnnouncedModel, ...]:
        """The models as other nodes are told of them, in the order in which they came."""
        return tuple(map(announced, self.entries.values()))

    @property
    def spare_bytes(self) -> int:
        """Memory that no model takes which is served on this machine alone."""
        taken = sum(entry.home_bytes for entry in self.entries.values())
        return max(0, self.equipment.memory_bytes - taken)

    @property
    def free_bytes(self) -> int:
        """Memory that nothing takes: of the spare, what splits have is not there for a model that is to be served alone."""
        return max(0, self.spare_bytes - self._split_bytes)

    @property
    def _split_bytes(self) -> int:
        return sum(entry.split_bytes + entry.lent_bytes for entry in self.entries.values())

    @property
    def room_bytes(self) -> int:
        """Memory that no such model needs: what `squeeze` can make room for."""
        needed = sum(entry.needed for entry in self.entries.values() if entry.alone)
        return max(0, self.equipment.memory_bytes - needed)

    @property
    def offered_bytes(self) -> int:
        """Memory that the others may count on: for a model that this node may take, or for its part in those it shares."""
        shares = any(not entry.alone for entry in self.entries.values())
        return self.spare_bytes if shares else self.room_bytes

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
        await self.equipment.measure()
        if not self._options.models:
            return
        await self.equipment.set_up()
        models = [await self.find(reference) for reference in self._options.models]
        needs = [await self.need_of(model) for model in models]
        beyond = _shared(needs, self.equipment.memory_bytes)
        for model, need in zip(models, needs, strict=True):
            await self._enter(model, need + beyond, named=True)

    async def run(self) -> None:
        """Serve the models that fit until cancelled; then end their servers, within 2.5 s. Identify all."""
        async with trio.open_nursery() as nursery:
            self._tasks = nursery
            try:
                for entry in self.entries.values():
                    nursery.start_soon(self._identify, entry)
                    if entry.alone:
                        self._serve(entry)
                await trio.sleep_forever()
            finally:
                self._tasks = None

    # ── loading and unloading ────────────────────────────────────────────────────────────────────────────────────

    async def load(self, model: ModelFile, *, named: bool, digest: str = "") -> Entry:
        """Serve a model from now on; returns as soon as that has begun. Nothing is changed if it is served already.

        One that does not fit is served together with other nodes that have it, if it is `named`. `digest` is the model's,
        if it is known. Raises `NodeError`, also while `prepare` is at work: a model that came in between could keep the node from
        starting.
        """
        self._running()
        await self.equipment.set_up()
        async with self._loading:
            entry = self.entries.get(model.name)
            if entry is None:
                entry = await self._enter(model, None, named=named)
                entry.digest = digest
                self._running().start_soon(self._identify, entry)
                if entry.alone:
                    self._serve(entry)
                self.on_change()
                return entry
        if entry.model.parts != model.parts:
            raise NodeError(
                f"Another model named {model.name} is served here. Unload it first, or rename one file."
            )
        while entry.leaving and not entry.unloading:  # noqa: ASYNC110 - it makes room, or goes to sleep
            await trio.sleep(0.05)
        if entry.leaving:
            raise NodeError(f"{model.name} is being unloaded; try again in a moment.")
        if entry.asleep or entry.failed:
            self._serve(entry)
        if named:
            self.named.setdefault(model.name, entry.digest)
        self.on_change()
        return entry

    async def unload(self, name: str) -> None:
        """Serve a model no more, after its server has finished what it is answering, within `DRAIN_LIMIT`.

        If cancelled, it is unloaded all the same. Raises `NodeError` if this node has no part in it.
        """
        entry = self.entries.get(name)
        if entry is None:
            have = ", ".join(self.entries) or "none"
            raise NodeError(f"This node serves no model named {name}; it has {have}.")
        tasks = self._running()
        if not entry.unloading:
            entry.unloading = entry.leaving = True
            self.on_change()
            tasks.start_soon(self._unload, entry)
        while self.entries.get(name) is entry:  # noqa: ASYNC110 - one of two tasks may be the one that waits
            await trio.sleep(0.05)

    def _running(self) -> trio.Nursery:
        if self._tasks is None:
            raise NodeError("The node is still starting; try again in a moment.")
        return self._tasks

    async def _unload(self, entry: Entry) -> None:
        await self._drain(entry)
        if self.entries.get(entry.name) is entry:
            del self.entries[entry.name]
        log.info("%s is unloaded", entry.name)
        self.on_change()

    async def _drain(self, entry: Entry) -> None:
        """End a server that gets nothing new, when it has finished what it is answering, within `DRAIN_LIMIT`."""
        if entry.servers and not entry.failed:
            with trio.move_on_after(DRAIN_LIMIT):
                await trio.sleep(_HEARD)
                while await self._is_busy(entry):  # noqa: ASYNC110 - another process is asked
                    await trio.sleep(0.2)
        await self._end(entry)

    async def squeeze(self, need: int) -> None:
        """Make room for `need` more bytes, if shorter contexts do: servers with more than they need are started again so.

        As few as will do, those with the most first; all of these finish at the same time what they are answering, within
        `DRAIN_LIMIT`. Nothing is changed if there is room enough, or `room_bytes` are not. If cancelled, they are started
        again all the same. Raises `NodeError` while the node starts or ends.
        """
        tasks = self._running()
        async with self._loading:
            lacking = need - self.free_bytes
            if lacking <= 0 or need > self.room_bytes - self._split_bytes:
                return
            entries = [entry for entry in self.entries.values() if entry.alone and not entry.leaving]
            waiting = []
            for entry in sorted(entries, key=lambda entry: entry.needed - entry.home_bytes):
                budget = max(entry.needed, entry.home_bytes - lacking)
                plan = self.equipment.plan(entry.model, budget)
                given = entry.home_bytes - entry.bytes_with(plan)
                if lacking > 0 and given > 0:
                    waiting.append(done := trio.Event())
                    tasks.start_soon(self._restart, entry, plan, done)
                    lacking -= given
            for done in waiting:
                await done.wait()

    async def _restart(self, entry: Entry, plan: ServerPlan, done: trio.Event) -> None:
        """Serve a model by another plan from now on."""
        log.info("%s goes on with a cache of %d tokens, to make room", entry.name, plan.context)
        if entry.servers:
            entry.leaving = True
            self.on_change()
            await self._drain(entry)
            entry.leaving = entry.unloading
        entry.plan = plan if entry.plan.draft is not None else replace(plan, draft=None)
        if not entry.servers and not entry.asleep and not entry.unloading:
            self._serve(entry)
        self.on_change()
        done.set()

    async def rest(self, entry: Entry) -> bool:
        """End the server of a model that has nothing to do until `wake`; False if it has something to do after all."""
        entry.leaving = True
        self.on_change()
        await trio.sleep(_HEARD)
        idle = not await self._is_busy(entry)
        if idle and not entry.unloading:
            entry.asleep = True
            await self._end(entry)
        entry.leaving = entry.unloading
        self.on_change()
        return idle

    def wake(self, digest: str) -> None:
        """A request waits for a model: if its server sleeps here, start it again."""
        for entry in self.entries.values():
            if entry.digest == digest and entry.asleep and not entry.leaving:
                log.info("%s is asked for again", entry.name)
                self._serve(entry)
                self.on_change()

    async def _is_busy(self, entry: Entry) -> bool:
        return bool(entry.servers) and await entry.servers[0].is_busy()

    async def _end(self, entry: Entry) -> None:
        """End the server of a model that is served alone. That of a split ends when its entry is `leaving`."""
        if entry.life is not None:
            entry.life.cancel()
        if entry.failed and entry.alone:  # its life is over, and it stays to be seen until now
            entry.servers.clear()
        while entry.servers and entry.alone:  # noqa: ASYNC110 - ends within 2.5 s
            await trio.sleep(0.02)

    def _serve(self, entry: Entry) -> None:
        if self._tasks is None:  # the node is ending
            return
        assert self.equipment.engine is not None
        server = LlamaServer(
            self.equipment.engine.require_llama_server(),
            entry.plan,
            log=self.log_of(entry.name),
            environment=os.environ,
            on_change=self._changed,
        )
        entry.servers[:] = [server]
        entry.asleep = False
        entry.life = trio.CancelScope()
        self._tasks.start_soon(self._live, entry, server, entry.life)

    async def _live(self, entry: Entry, server: LlamaServer, life: trio.CancelScope) -> None:
        with life:
            await server.run()
        entry.abilities = server.abilities or entry.abilities
        if server.plan.draft is None:
            entry.plan = replace(entry.plan, draft=None)  # given up, and not tried again after a sleep
        if life.cancel_called:
            entry.servers.remove(server)
        self.on_change()

    # ── finding ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def find(self, reference: str) -> ModelFile:
        """The model that `reference` means, as for `--model`. Raises `ModelError`."""
        folders = model_folders(self._folder.path)
        return await trio.to_thread.run_sync(partial(resolve, reference, folders))

    async def shape_of(self, reference: str) -> tuple[str, ModelShape]:
        """Name and shape of any model here. Reads it whole if its digest is not known yet. Raises `NodeError`, `OSError`."""
        model = await self.find(reference)
        headers = await trio.to_thread.run_sync(read_headers, model)
        digest = await model_digest(model.parts)
        if not self._options.client:
            with suppress(NodeError):  # who has no llama.cpp still has the others' plan
                await self.equipment.set_up()
        return model.name, shape_of(headers, digest, least_context(model))

    async def need_of(self, model: ModelFile) -> int:
        """Bytes that a model takes here. Raises `NodeError`."""
        await self.equipment.set_up()
        headers = await trio.to_thread.run_sync(read_headers, model)
        return needed(shape_of(headers, "", least_context(model)))

    def log_of(self, name: str) -> Path:
        """The file for the output of a model's llama-server."""
        return self._folder.llama_log(name)

    async def _enter(self, model: ModelFile, budget: int | None, *, named: bool) -> Entry:
        """Make the entry of a model and plan its server. Without a budget, half of what the others leave, or what it needs."""
        headers = await trio.to_thread.run_sync(read_headers, model)
        if model.name in self.entries:
            raise NodeError(
                f"Two models are named {model.name}. Requests could not tell them apart: rename one of the files."
            )
        if len(self.entries) >= MAX_ENTRIES:
            raise NodeError(f"This node has {MAX_ENTRIES} models, which is all it takes; unload one.")
        need = needed(shape_of(headers, "", least_context(model)))
        if budget is None:
            budget = max(need, self.free_bytes // 2)
        entry = Entry(model, headers, self.equipment.plan(model, budget), alone=False, needed=need)
        entry.alone = need <= self.free_bytes and not self._options.split
        if not entry.alone and not named:
            raise NodeError(f"{model.name} does not fit into the memory that is left.")
        self.entries[model.name] = entry
        if named:
            self.named[model.name] = ""
        self._introduce(entry)
        return entry

    def _introduce(self, entry: Entry) -> None:
        model, engine = entry.model, self.equipment.engine
        assert engine is not None
        log.info(
            "model      %s (%s, context %d), by llama-server %s",
            model.name,
            bytes_in_words(model.size_bytes),
            usable_context(entry.plan),
            engine.require_llama_server().version,
        )
        if model.is_demo:
            log.info("           it is a toy with random weights: what it says is nonsense, and meant to be")
        if not entry.alone and not self._options.split:
            log.info(
                "%s needs %s and this machine has %s left for models; it is served by others, or together with them",
                model.name,
                bytes_in_words(entry.needed),
                bytes_in_words(self.free_bytes),
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
        if entry.name in self.named and self.entries.get(entry.name) is entry:
            self.named[entry.name] = entry.digest
        entry.identified.set()
        self.on_change()


def _shared(needs: Sequence[int], memory: int) -> int:
    """What each of these models gets beyond its need; one that does not fit beside those before it has it for its split."""
    left = memory
    for need in needs:
        left -= need if need <= left else 0
    return left // len(needs)
