from __future__ import annotations

import fcntl
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import trio
from libmesh_node.llama import build, source
from libmesh_node.llama.build import BuildFailed, BuildProgress, install, parallel_jobs
from libmesh_node.llama.engine import SOURCE_VERSION, Engine, EngineError, installed_folder

from tests.llama.processes import eventually, wait_until_gone

PREFIX = f"llama_cpp_python-{SOURCE_VERSION}/"


@pytest.fixture(autouse=True)
def _empty_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def installed(cache: Path, engine: Engine) -> Path:
    """A cache as `install` leaves it."""
    folder = installed_folder(cache)
    folder.mkdir(parents=True)
    copy_programs(engine, folder)
    return folder


def copy_programs(engine: Engine, folder: Path) -> None:
    shutil.copy2(engine.require_llama_server().path, folder / "llama-server")
    shutil.copy2(engine.require_rpc_server().path, folder / "ggml-rpc-server")


def half_built(cache: Path, ninja: str, *, cmake: str = "exit 0") -> Path:
    """A work folder in which an earlier attempt got as far as the configuration, with tools that do as they are told."""
    work = cache / "engine" / f"build-{SOURCE_VERSION}"
    tools = work / "tools" / "bin"
    tools.mkdir(parents=True)
    (work / "source").mkdir()
    for name, text in (("cmake", cmake), ("ninja", ninja)):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    return work


def archive(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))
    return path


@pytest.mark.llama
async def test_what_is_there_is_not_built_again(installed: Path, cache: Path) -> None:
    seen: list[BuildProgress] = []
    engine = await install(report=seen.append, cache=cache)
    assert engine.require_llama_server().path == installed / "llama-server"
    assert engine.require_rpc_server().origin == "cache"
    assert [progress.step for progress in seen] == ["done"]


@pytest.mark.llama
async def test_second_attempt_goes_on_with_the_first_and_puts_both_programs_in_place(
    cache: Path, engine: Engine
) -> None:
    work = half_built(cache, "echo '[1/2] one'; echo '[2/2] two'")
    (work / "objects" / "bin").mkdir(parents=True)
    copy_programs(engine, work / "objects" / "bin")
    seen: list[BuildProgress] = []
    built = await install(report=seen.append, cache=cache)
    assert built.complete
    assert built.require_llama_server().path == installed_folder(cache) / "llama-server"
    steps = [(progress.step, progress.done, progress.total) for progress in seen]
    assert steps == [
        ("tools", 0, 0),
        ("configure", 0, 0),
        ("compile", 1, 2),
        ("compile", 2, 2),
        ("check", 0, 0),
        ("done", 0, 0),
    ]
    assert not work.exists()
    left = sorted(path.name for path in (cache / "engine").iterdir())
    assert left == sorted([SOURCE_VERSION, f"build-{SOURCE_VERSION}.log", "lock", "probes.json"])


@pytest.mark.llama
async def test_forced_build_replaces_what_is_there(cache: Path, installed: Path, engine: Engine) -> None:
    (installed / "old").touch()
    work = half_built(cache, "exit 0")
    (work / "objects" / "bin").mkdir(parents=True)
    copy_programs(engine, work / "objects" / "bin")
    assert (await install(report=lambda progress: None, cache=cache, force=True)).complete
    assert not (installed / "old").exists()


async def test_failed_step_is_named_with_its_last_lines_and_all_is_kept(cache: Path) -> None:
    many = "i=0; while [ $i -lt 50 ]; do echo line $i; i=$((i+1)); done; echo 'x.cpp:1: error: no'; exit 4"
    work = half_built(cache, many)
    with pytest.raises(BuildFailed) as caught:
        await install(report=lambda progress: None, cache=cache)
    assert caught.value.step == "compile"
    assert caught.value.lines[-2:] == ("line 49", "x.cpp:1: error: no")
    assert len(caught.value.lines) == 20
    assert "step `compile` (status 4)" in str(caught.value)
    assert str(caught.value.log) in str(caught.value)
    log = caught.value.log.read_text()
    assert "line 0\n" in log
    assert work.is_dir()
    assert not installed_folder(cache).exists()


async def test_programs_that_do_not_work_are_not_put_in_place(cache: Path) -> None:
    work = half_built(cache, "exit 0")
    (work / "objects" / "bin").mkdir(parents=True)
    for name in build.TARGETS:
        (work / "objects" / "bin" / name).write_text("#!/bin/sh\necho not built for this; exit 1")
        (work / "objects" / "bin" / name).chmod(0o755)
    with pytest.raises(BuildFailed, match="not built for this") as caught:
        await install(report=lambda progress: None, cache=cache)
    assert caught.value.step == "check"
    assert not installed_folder(cache).exists()


async def test_cancelling_kills_the_compilers(cache: Path, tmp_path: Path) -> None:
    half_built(cache, f"setsid sleep 300 & echo $! > {tmp_path}/pid; trap '' TERM; wait")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: install(report=lambda progress: None, cache=cache))
        await eventually(
            lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n")
        )
        nursery.cancel_scope.cancel()
    wait_until_gone(int((tmp_path / "pid").read_text()))


def hold_lock(path: str, held: object, release: object) -> None:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(str(os.getpid()))
        file.flush()
        held.set()  # type: ignore[attr-defined]
        release.wait()  # type: ignore[attr-defined]


@pytest.mark.llama
async def test_second_install_waits_for_the_first_and_takes_its_result(cache: Path, installed: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=hold_lock, args=(str(cache / "engine" / "lock"), held, release))
    other.start()
    await trio.to_thread.run_sync(held.wait)
    seen: list[BuildProgress] = []

    def report(progress: BuildProgress) -> None:
        seen.append(progress)
        release.set()

    with trio.fail_after(60):
        assert (await install(report=report, cache=cache, force=True)).complete
    other.join()
    assert seen[0].step == "wait"
    assert str(other.pid) in seen[0].message
    assert seen[-1].step == "done"


async def test_too_little_disk_is_said_before_anything_is_fetched(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_DISK_NEEDED", 1 << 60)
    with pytest.raises(EngineError, match="GB are free"):
        await install(report=lambda progress: None, cache=cache)


@pytest.mark.parametrize(
    ("cores", "memory", "jobs"), [(2, 64 * 10**9, 2), (64, 16 * 10**9, 16), (4, 10**8, 1), (8, 8 * 10**9, 8)]
)
def test_compilers_at_a_time(cores: int, memory: int, jobs: int) -> None:
    assert parallel_jobs(cores, memory) == jobs


async def test_only_llama_cpp_is_unpacked(tmp_path: Path) -> None:
    files = {
        PREFIX + "setup.py": "evil",
        PREFIX + "vendor/llama.cpp/CMakeLists.txt": "project(x)",
        PREFIX + "vendor/llama.cpp/src/a.cpp": "int a;",
        PREFIX + "vendor/other/b": "b",
    }
    destination = tmp_path / "source"
    await trio.to_thread.run_sync(source.unpack, archive(tmp_path / "a.tar.gz", files), destination)
    found = {str(path.relative_to(destination)) for path in destination.rglob("*") if path.is_file()}
    assert found == {"CMakeLists.txt", "src/a.cpp"}


@pytest.mark.parametrize("filters", [True, False])
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil"])
async def test_archive_that_reaches_outside_is_refused(
    tmp_path: Path, name: str, filters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not filters:
        monkeypatch.delattr(tarfile, "data_filter")
    files = {PREFIX + "vendor/llama.cpp/" + name: "x", PREFIX + "vendor/llama.cpp/CMakeLists.txt": ""}
    with pytest.raises(EngineError, match="is outside the destination"):
        await trio.to_thread.run_sync(
            source.unpack, archive(tmp_path / "a.tar.gz", files), tmp_path / "source"
        )
    assert not (tmp_path / "source").exists()
    assert not (tmp_path / "evil").exists()


async def test_archive_without_llama_cpp_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar.gz", {PREFIX + "setup.py": ""})
    with pytest.raises(EngineError, match=r"holds no llama\.cpp"):
        await trio.to_thread.run_sync(source.unpack, path, tmp_path / "source")


async def test_damaged_archive_unpacks_nothing(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar.gz", {PREFIX + "vendor/llama.cpp/CMakeLists.txt": "x" * 100_000})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(EngineError, match="cannot be unpacked"):
        await trio.to_thread.run_sync(source.unpack, path, tmp_path / "source")
    assert not (tmp_path / "source").exists()


def test_other_archive_is_not_genuine(tmp_path: Path) -> None:
    assert not source.is_genuine(tmp_path / "none")
    (tmp_path / "a").write_bytes(b"not it")
    assert not source.is_genuine(tmp_path / "a")


def test_stand_in_for_the_build_backend_does_what_pep_517_asks(tmp_path: Path) -> None:
    source.prepare_download(tmp_path)
    ask = "import scikit_build_core.build as b; print(b.prepare_metadata_for_build_wheel('.'))"
    environment = {"PYTHONPATH": str(tmp_path / "backend")}
    command = [sys.executable, "-S", "-c", ask]
    folder = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    metadata = (tmp_path / folder.strip() / "METADATA").read_text()
    assert f"Version: {SOURCE_VERSION}\n" in metadata
