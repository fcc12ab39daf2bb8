"""Finds the llama.cpp programs, and says what each of them is.

A binary is believed only after it has been run (`probe.py`): a build for another processor, a missing shared library
or a stub shows at once, and is then named with its reason instead of being passed over in silence.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from libmesh_node.datadir import home
from libmesh_node.errors import NodeError
from libmesh_node.llama.probe import (
    Facts,
    ProbeStore,
    Unusable,
    examine_llama_server,
    examine_pair,
    examine_rpc_server,
)

SOURCE_VERSION = "0.3.36"
"""Version of the llama-cpp-python source distribution whose llama.cpp `build.install` builds."""

_Examination = Callable[[Path], Facts]

LLAMA_SERVER_NAMES = ("llama-server",)
RPC_SERVER_NAMES = ("rpc-server", "ggml-rpc-server")


class EngineError(NodeError):
    """Something about the llama.cpp programs. The text says what to do."""


class EngineMissing(EngineError):
    """A program that is needed was not found, or does not work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """One program that runs.

    Attributes:
        version: what it says of itself, for people; empty if it says nothing (rpc-server has no such switch).
        rpc_protocol: `major.minor.patch`; `None` if it speaks none. For llama-server: that of the rpc-server that was
            found with it, after the two were seen to agree.
        origin: where it was found: `--bin-dir`, `PATH` or `cache`.
        flags: the command-line options that its help names, with their dashes. Options come and go with versions.
    """

    path: Path
    version: str
    rpc_protocol: str | None
    origin: str
    flags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A file of the right name that does not work, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What was found. The first working file wins. `notes` are sentences that a person should read."""

    llama_server: Binary | None
    rpc_server: Binary | None
    broken: tuple[Broken, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Both programs are there."""
        return self.llama_server is not None and self.rpc_server is not None

    def require_llama_server(self) -> Binary:
        """The working llama-server. Raises `EngineMissing`, saying what is broken and what to do."""
        return self.llama_server or self._missing("llama-server")

    def require_rpc_server(self) -> Binary:
        """The working rpc-server. Raises `EngineMissing`, saying what is broken and what to do."""
        return self.rpc_server or self._missing("rpc-server")

    def _missing(self, what: str) -> Binary:
        found = "".join(f" {broken.path} does not work: {broken.reason}." for broken in self.broken)
        raise EngineMissing(
            f"No working {what} was found.{found} Build one with `libmesh-node engine install`, "
            "or name the folder of your own build with --bin-dir."
        )


def cache_root() -> Path:
    """The folder for what can be made again: `$XDG_CACHE_HOME/libmesh`, or in the system's usual place for caches."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(
        configured
    ):  # XDG Base Directory Specification: relative paths are invalid, to be ignored
        return Path(configured) / "libmesh"
    if sys.platform == "darwin":
        return home() / "Library" / "Caches" / "libmesh"
    return home() / ".cache" / "libmesh"


def installed_folder(cache: Path | None = None) -> Path:
    """Where `build.install` leaves the two programs."""
    return (cache or cache_root()) / "engine" / SOURCE_VERSION


def find_engine(bin_dir: Path | None = None, cache: Path | None = None) -> Engine:
    """Look for the programs in `bin_dir`, on PATH, then in the cache, running each candidate that was never seen.

    Blocks: usually 0.1 s for a new candidate, at most 20 s; milliseconds for known ones. Never raises because of what
    it finds: that is in `Engine.broken`.
    """
    probes = ProbeStore((cache or cache_root()) / "engine" / "probes.json")
    places = list(_places(bin_dir, cache))
    broken: list[Broken] = []

    def first(names: tuple[str, ...], examine: _Examination) -> Binary | None:
        for origin, path in ((origin, folder / name) for origin, folder in places for name in names):
            if not path.is_file():
                continue
            try:
                return _binary(path, origin, probes.get(path, examine))
            except Unusable as exc:
                broken.append(Broken(path=path, reason=str(exc)))
        return None

    llama = first(LLAMA_SERVER_NAMES, examine_llama_server)
    rpc = first(RPC_SERVER_NAMES, examine_rpc_server)
    notes = [
        f"{what} comes from {binary.path}, as {bin_dir} has none that works."
        for what, binary in (("llama-server", llama), ("rpc-server", rpc))
        if bin_dir is not None and binary is not None and binary.origin != "--bin-dir"
    ]
    if llama is not None and rpc is not None:
        beside = rpc.path
        verdict = probes.get(llama.path, lambda path: examine_pair(path, beside), beside=beside)
        if verdict.get("agree"):
            llama = replace(llama, rpc_protocol=rpc.rpc_protocol)
        else:
            notes.append(f"{llama.path} and {rpc.path} do not work together: {verdict.get('reason')}.")
    probes.save()
    return Engine(llama_server=llama, rpc_server=rpc, broken=tuple(broken), notes=tuple(notes))


def _places(bin_dir: Path | None, cache: Path | None) -> Iterator[tuple[str, Path]]:
    if bin_dir is not None:
        yield "--bin-dir", bin_dir.expanduser().absolute()
    for entry in os.get_exec_path():
        if entry:
            yield "PATH", Path(entry).absolute()
    yield "cache", installed_folder(cache)


def _binary(path: Path, origin: str, facts: Facts) -> Binary:
    protocol, flags = facts.get("rpc_protocol"), facts.get("flags")
    return Binary(
        path=path,
        version=str(facts.get("version", "")),
        rpc_protocol=protocol if isinstance(protocol, str) else None,
        origin=origin,
        flags=frozenset(map(str, flags)) if isinstance(flags, list) else frozenset(),
    )
