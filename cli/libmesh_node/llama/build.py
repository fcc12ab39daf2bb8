"""Builds llama-server and rpc-server from source into the cache.

    <cache>/engine/lock                 held while building; names who builds
    <cache>/engine/build-<version>/     work: source, tools, objects; kept until the build has succeeded, so that the
                                        next attempt goes on where this one stopped
    <cache>/engine/build-<version>.log  all that every step wrote, last attempt only
    <cache>/engine/<version>/           the two programs; appears in one rename, complete and tried out

About 7 minutes on two cores, 1.2 GB of disk while building, 20 MB afterwards. At most one compiler a core and a GB of
memory, all at low priority, because the machine is somebody's desk.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from libmesh_node.llama import source
from libmesh_node.llama.engine import (
    SOURCE_VERSION,
    Engine,
    EngineError,
    cache_root,
    find_engine,
    installed_folder,
)
from libmesh_node.llama.process import Lines, open_guarded

TARGETS = ("llama-server", "ggml-rpc-server")
TOOLS = ("cmake>=3.28,<5", "ninja>=1.11,<2")

CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DGGML_RPC=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # otherwise the build downloads one
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
)

_NINJA_STEP = re.compile(r"^\[(\d+)/(\d+)\] ")
_LAST_LINES = 20
_DISK_NEEDED = 1_200_000_000
_LOCK_POLL = 0.5
_END_PATIENCE = 1.0  # seconds for ninja to end by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildProgress:
    """How far an installation is.

    Attributes:
        step: `wait`, `tools`, `fetch`, `unpack`, `configure`, `compile`, `check` or `done`, in this order.
        done: steps of `compile` that are finished; 0 in the others.
        total: steps of `compile` in all, as ninja counts them: less when it goes on with an earlier attempt. 0 in others.
        message: the step in words.
    """

    step: str
    message: str
    done: int = 0
    total: int = 0


class BuildFailed(EngineError):
    """A step failed. `.step` is as in `BuildProgress`, `.lines` the last that it wrote, `.log` where all of it is."""

    def __init__(self, step: str, status: int, lines: Sequence[str], log: Path) -> None:
        said = "\n".join(f"    {line}" for line in lines)
        super().__init__(
            f"Building llama.cpp failed in step `{step}` (status {status}). Its last lines:\n{said}\n"
            f"The whole log is in {log}. What was built is kept: `libmesh-node engine install` goes on from there."
        )
        self.step = step
        self.lines = tuple(lines)
        self.log = log


Report = Callable[[BuildProgress], None]


async def install(*, report: Report, cache: Path | None = None, force: bool = False) -> Engine:
    """Build both programs into the cache, unless they are there and work, and return what is there then.

    With `force`, build them anew. If another installation is under way, waits for it and takes its result.
    Cancelling ends the compilers within a second and keeps what they finished; so does the death of this process.

    Raises `BuildFailed`; `OSError` if the cache cannot be written to.
    """
    cache = cache or cache_root()
    folder = installed_folder(cache)
    await trio.Path(folder.parent).mkdir(parents=True, exist_ok=True)
    async with _exclusive(folder.parent / "lock", report) as waited:
        engine = await trio.to_thread.run_sync(_installed, cache)
        if engine is None or (force and not waited):
            await _Build(cache, report).run()
            engine = await trio.to_thread.run_sync(_installed, cache)
            assert engine is not None
    report(BuildProgress(step="done", message=f"llama.cpp is in {folder}"))
    return engine


def _installed(cache: Path) -> Engine | None:
    """What is in the cache, if both programs are there and work together."""
    engine = find_engine(installed_folder(cache), cache)
    server, rpc = engine.llama_server, engine.rpc_server
    if server is None or rpc is None or not _is_whole(engine):
        return None
    return replace(
        engine, llama_server=replace(server, origin="cache"), rpc_server=replace(rpc, origin="cache")
    )


def _is_whole(engine: Engine) -> bool:
    """Both programs come from the folder that was asked for, and agreed to work together."""
    server, rpc = engine.llama_server, engine.rpc_server
    if server is None or rpc is None:
        return False
    return server.origin == rpc.origin == "--bin-dir" and server.rpc_protocol is not None


class _Build:
    """One attempt, step by step. Every step is skipped or quick if an earlier attempt has done it."""

    def __init__(self, cache: Path, report: Report) -> None:
        self._cache = cache
        self._report = report
        self._work = cache / "engine" / f"build-{SOURCE_VERSION}"
        self._log_path = Path(f"{self._work}.log")
        self._bin = self._work / "tools" / "bin"

    async def run(self) -> None:
        free = shutil.disk_usage(self._work.parent).free
        if free < _DISK_NEEDED:
            raise EngineError(
                f"Building llama.cpp needs {_DISK_NEEDED / 1e9:.1f} GB in {self._work.parent}; {free / 1e9:.1f} GB are free."
            )
        self._work.mkdir(exist_ok=True)
        with self._log_path.open("w") as log:
            self._log = log
            await self._prepare_tools()
            await self._fetch()
            await self._compile()
            await self._put_in_place()
        await trio.to_thread.run_sync(shutil.rmtree, self._work)

    async def _prepare_tools(self) -> None:
        self._report(BuildProgress(step="tools", message="Getting cmake and ninja"))
        if (self._bin / "cmake").is_file() and (self._bin / "ninja").is_file():
            return
        await self._step("tools", [sys.executable, "-m", "venv", "--clear", str(self._work / "tools")])
        await self._step("tools", [str(self._bin / "python"), "-m", "pip", "install", *TOOLS])

    async def _fetch(self) -> None:
        archive, tree = self._work / source.ARCHIVE_NAME, self._work / "source"
        if tree.is_dir():
            return
        if not await trio.to_thread.run_sync(source.is_genuine, archive):
            self._report(BuildProgress(step="fetch", message="Fetching llama.cpp's source, 77 MB"))
            arguments = source.prepare_download(self._work)
            await self._step(
                "fetch",
                [str(self._bin / "python"), "-m", "pip", *arguments],
                {"PYTHONPATH": str(self._work / "backend")},
            )
            if not await trio.to_thread.run_sync(source.is_genuine, archive):
                raise EngineError(f"{archive} has not the expected SHA-256. Remove it and try again.")
        self._report(BuildProgress(step="unpack", message="Unpacking it"))
        await trio.to_thread.run_sync(source.unpack, archive, tree)

    async def _compile(self) -> None:
        self._report(BuildProgress(step="configure", message="Configuring"))
        objects = str(self._work / "objects")
        ninja = str(self._bin / "ninja")
        tree = str(self._work / "source")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        await self._step(
            "configure", [str(self._bin / "cmake"), *generator, "-S", tree, "-B", objects, *CMAKE_FLAGS]
        )

        def on_line(line: str) -> None:
            if step := _NINJA_STEP.match(line):
                done, total = int(step[1]), int(step[2])
                self._report(BuildProgress(step="compile", message="Compiling", done=done, total=total))

        jobs = str(parallel_jobs(_cores(), _memory_bytes()))
        await self._step(
            "compile", [ninja, "-C", objects, "-j", jobs, *TARGETS], {"NINJA_STATUS": "[%f/%t] "}, on_line
        )

    async def _put_in_place(self) -> None:
        """Copy the programs beside their final place, try them out there, and rename."""
        self._report(BuildProgress(step="check", message="Trying out the programs"))
        folder = installed_folder(self._cache)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{SOURCE_VERSION}.") as temporary:
            fresh, old = Path(temporary) / "fresh", Path(temporary) / "old"
            fresh.mkdir()
            for name in TARGETS:
                shutil.copy2(self._work / "objects" / "bin" / name, fresh / name)
            engine = await trio.to_thread.run_sync(find_engine, fresh, Path(temporary))
            if not _is_whole(engine):
                reasons = [*(f"{item.path.name}: {item.reason}" for item in engine.broken), *engine.notes]
                raise BuildFailed("check", 0, reasons, self._log_path)
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)

    async def _step(
        self,
        step: str,
        argv: Sequence[str],
        environment: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        """Run one program to its end, its output into the log. Raises `BuildFailed`."""
        last: deque[str] = deque(maxlen=_LAST_LINES)
        self._log.write(f"$ {' '.join(argv)}\n")
        nice = shutil.which("nice")
        full = [nice, "-n", "10", *argv] if nice else list(argv)
        async with open_guarded(
            full, environment={**os.environ, **(environment or {})}, directory=self._work
        ) as process:
            try:
                lines = Lines(process.output)
                while (line := await lines.receive()) is not None:
                    self._log.write(line + "\n")
                    self._log.flush()
                    last.append(line)
                    if on_line is not None:
                        on_line(line)
                status = await process.wait()
            except trio.Cancelled:
                # ninja then ends its compilers and removes what they left half written.
                with trio.move_on_after(_END_PATIENCE, shield=True):
                    await process.send_signal(signal.SIGTERM)
                    await process.wait()
                raise
        if status != 0:
            raise BuildFailed(step, status, last, self._log_path)


def parallel_jobs(cores: int, memory_bytes: int) -> int:
    """Compilers at a time: one a core, but no more than one for each GB; the largest file of llama.cpp takes 0.9 GB."""
    return max(1, min(cores, memory_bytes // 10**9))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@asynccontextmanager
async def _exclusive(lock: Path, report: Report) -> AsyncIterator[bool]:
    """Hold the lock file. Yields whether somebody else held it first. The kernel frees it when its holder dies."""
    waited = False
    with lock.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read(32).strip() or "another process"
                report(BuildProgress(step="wait", message=f"Waiting for process {holder}, which is building"))
                waited = True
                await trio.sleep(_LOCK_POLL)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield waited
        finally:
            file.truncate(0)
