"""The models that lie in this machine's folders: found, identified, and so ready to be served when the mesh wants one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from libmesh_node.announced import MAX_ON_DISK
from libmesh_node.entries import least_context, read_headers
from libmesh_node.equipment import Equipment
from libmesh_node.errors import NodeError
from libmesh_node.models.digest import model_digest
from libmesh_node.models.reference import ModelFile, available_models, open_model
from libmesh_node.placement.shape import shape_of
from libmesh_node.placement.splitting import needed

log = logging.getLogger(__name__)

LOOK_EVERY = 30.0
"""Seconds between two looks into the folders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelved:
    """A model in a folder. `needed`: bytes of memory that it takes; `context`: tokens that a request has at least."""

    model: ModelFile
    digest: str
    needed: int
    context: int


class Shelf:
    """Looks into the folders now and then. At most `MAX_ON_DISK` models, by name; further ones are not looked at.

    A model is read whole, once, to be identified; one that cannot ever fit this machine is not.

    Args:
        folders: where models lie; the first that has a name wins.
        equipment: set up when the first model is found. Without llama.cpp's programs the shelf stays empty.
        on_change: called in trio's thread when `models` changed.

    Attributes:
        models: by digest.
    """

    def __init__(self, folders: Sequence[Path], equipment: Equipment, on_change: Callable[[], None]) -> None:
        self.models: dict[str, Shelved] = {}
        self._folders, self._equipment, self._on_change = folders, equipment, on_change
        self._known: dict[tuple[Path, int, int], Shelved | None] = {}
        self._complained = ""

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self._look()
            await trio.sleep(LOOK_EVERY)

    async def _look(self) -> None:
        files = await trio.to_thread.run_sync(_files, self._folders)
        self._known = {file: known for file, known in self._known.items() if file in files}
        if files and not await self._can_serve():
            return
        for file in files:
            if file not in self._known:
                self._known[file] = await self._open(file[0])
                self._publish()
        self._publish()

    def _publish(self) -> None:
        found = {known.digest: known for known in self._known.values() if known is not None}
        if found != self.models:
            self.models = found
            self._on_change()

    async def _can_serve(self) -> bool:
        try:
            await self._equipment.set_up()
        except NodeError as exc:
            if self._complained != (text := str(exc)):
                self._complained = text
                log.info("the models on this machine's disk cannot be served: %s", text)
            return False
        return True

    async def _open(self, path: Path) -> Shelved | None:
        try:
            model = await trio.to_thread.run_sync(open_model, path)
            headers = await trio.to_thread.run_sync(read_headers, model)
            context = least_context(model)
            need = needed(shape_of(headers, "", context))
            if need > self._equipment.memory_bytes:
                return None
            digest = await model_digest(model.parts)
        except (NodeError, OSError) as exc:
            log.debug("%s is no model to be served: %s", path, exc)
            return None
        return Shelved(model=model, digest=digest, needed=need, context=context)


def _files(folders: Sequence[Path]) -> list[tuple[Path, int, int]]:
    """The first parts of the models there, with their size and time of change."""
    found: list[tuple[Path, int, int]] = []
    for _, path in sorted(available_models(folders).items())[:MAX_ON_DISK]:
        try:
            status = path.stat()
        except OSError:
            continue
        found.append((path, status.st_size, status.st_mtime_ns))
    return found
