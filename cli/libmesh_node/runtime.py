"""`load`, `unload` and `drop`: what an operator changes about this node's models while it runs."""

from __future__ import annotations

from libmesh_node.bridge import CommandFailed
from libmesh_node.entries import Entry
from libmesh_node.errors import NodeError, sentence
from libmesh_node.options import NodeOptions
from libmesh_node.serving import LocalModels
from libmesh_node.shelf import Shelf
from libmesh_node.snapshot import LocalModel
from libmesh_node.standby import Standby


class Runtime:
    """Carries the commands out. All raise `CommandFailed`.

    Args:
        models: this node's own.
        shelf: what lies on its disk.
        standby: what it takes by itself.
        options: the command line.
    """

    def __init__(self, models: LocalModels, shelf: Shelf, standby: Standby, options: NodeOptions) -> None:
        self._models, self._shelf, self._standby, self._options = models, shelf, standby, options

    async def load(self, reference: str) -> dict[str, object]:
        """See `NodeCommands.load`."""
        if self._options.client:
            raise CommandFailed(
                "denied", "This node is a client and serves nothing; start it without --client."
            )
        try:
            model = await self._models.find(reference)
        except (NodeError, OSError) as exc:
            raise CommandFailed("not_found", sentence(str(exc))) from exc
        try:
            if model.name not in self._models.entries:
                await self._make_room(await self._models.need_of(model))
            entry = await self._models.load(model, named=True)
        except (NodeError, OSError) as exc:
            raise CommandFailed("conflict", sentence(str(exc))) from exc
        self._standby.accept(model.name)
        return {"model": entry.name, "status": status_of(entry), "alone": entry.alone}

    async def _make_room(self, need: int) -> None:
        """What the operator names goes before long contexts, and before what this node has taken by itself."""
        models = self._models
        if need > models.equipment.memory_bytes:
            await self._make_half()
            return
        await models.squeeze(need)
        taken = [entry for entry in models.entries.values() if entry.alone and entry.name not in models.named]
        for entry in sorted(taken, key=lambda entry: (not entry.asleep, entry.home_bytes)):
            if need <= models.free_bytes:
                return
            await models.unload(entry.name)
            await models.squeeze(need)
        if need > models.room_bytes:
            await self._make_half()

    async def _make_half(self) -> None:
        """Room for a model that will be split: half of what the others can do without."""
        await self._models.squeeze((self._models.spare_bytes + self._models.room_bytes) // 2)

    async def unload(self, name: str, *, forget: bool) -> dict[str, object]:
        """See `NodeCommands.unload`."""
        entry = self._models.entries.get(name)
        if entry is None and not (forget and name in self._models.named):
            have = ", ".join(self._models.entries) or "none"
            raise CommandFailed("not_found", f"This node has no part in a model named {name}; it has {have}.")
        digest = entry.digest if entry is not None else self._models.named.get(name, "")
        self._standby.decline(name)
        if forget:
            self._models.named.pop(name, None)
            self._standby.forget(digest)
        if entry is not None:
            await self._models.unload(name)
        return {"model": name, "wanted": name in self._models.named}

    def local(self) -> tuple[LocalModel, ...]:
        """This node's models, those that it has a part in first, then what lies on its disk besides."""
        named, entries = self._models.named, self._models.entries
        found = [
            LocalModel(
                name=entry.name,
                digest=entry.digest,
                size_bytes=entry.model.size_bytes,
                status=status_of(entry),
                named=entry.name in named,
            )
            for entry in entries.values()
        ]
        for held in self._shelf.models.values():
            if held.model.name not in entries:
                found.append(
                    LocalModel(
                        name=held.model.name,
                        digest=held.digest,
                        size_bytes=held.model.size_bytes,
                        status="on disk",
                        named=held.model.name in named,
                    )
                )
        return tuple(found)


def status_of(entry: Entry) -> str:
    """The word for what a model of this node is doing; see `snapshot.LocalModel`."""
    if entry.unloading:
        return "unloading"
    if entry.asleep:
        return "asleep"
    if entry.base_url is not None:
        return "ready"
    if entry.leaving:
        return "restarting"
    return entry.servers[0].process.status if entry.servers else "waiting"
