from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from libmesh_node.llama.engine import Engine, installed_folder

pytestmark = pytest.mark.llama

PROGRAM = [sys.executable, "-m", "libmesh_node", "engine"]


def engine_command(cache: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(cache), "HOME": str(cache)}
    return subprocess.run(
        [*PROGRAM, *arguments], env=environment, text=True, timeout=60, **{"capture_output": True, **options}
    )


@pytest.fixture
def installed(engine: Engine, tmp_path: Path) -> Path:
    """A cache in which both programs are."""
    folder = installed_folder(tmp_path / "libmesh")
    folder.mkdir(parents=True)
    (folder / "llama-server").symlink_to(engine.require_llama_server().path)
    (folder / "ggml-rpc-server").symlink_to(engine.require_rpc_server().path)
    return tmp_path


def test_status_says_what_each_program_is(installed: Path) -> None:
    done = engine_command(installed, "status")
    first, second, devices = done.stdout.splitlines()[:3]
    assert done.returncode == 0
    assert first.startswith("llama-server ")
    assert "version " in first
    assert "RPC " in second
    assert first.endswith("from cache)")
    assert devices.startswith("computes on ")


def test_status_as_json(installed: Path) -> None:
    status = json.loads(engine_command(installed, "status", "--json").stdout)
    assert status["complete"] is True
    assert status["rpc_server"]["rpc_protocol"] == status["llama_server"]["rpc_protocol"] is not None


def test_missing_programs_are_a_failure_that_says_what_to_do(tmp_path: Path) -> None:
    done = engine_command(tmp_path, "status")
    assert done.returncode == 1
    assert done.stdout.split()[:4] == ["llama-server", "missing", "rpc-server", "missing"]
    assert "libmesh-node engine install" in done.stderr


def test_broken_program_is_listed(tmp_path: Path) -> None:
    (tmp_path / "rpc-server").write_text("#!/bin/sh\necho nope; exit 9\n")
    (tmp_path / "rpc-server").chmod(0o755)
    done = engine_command(tmp_path, "status", "--bin-dir", str(tmp_path))
    assert done.returncode == 1
    assert 'rpc-server: it ended with status 9: "nope"' in done.stdout


def test_install_of_what_is_there_is_quick_and_says_where(installed: Path) -> None:
    done = engine_command(installed, "install")
    assert done.returncode == 0
    assert "llama.cpp is in" in done.stderr
    assert "llama-server" in done.stdout


def test_failed_build_is_told_without_a_traceback(tmp_path: Path) -> None:
    tools = tmp_path / "libmesh" / "engine" / f"build-{installed_folder().name}" / "tools" / "bin"
    tools.mkdir(parents=True)
    (tools.parents[1] / "source").mkdir()
    for name, text in (
        ("cmake", "exit 0"),
        ("ninja", "for i in 1 2 3; do echo [$i/4] x; done; echo broken; exit 2"),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    done = engine_command(tmp_path, "install")
    assert done.returncode == 1
    assert "Compiling: step 3 of 4" in done.stderr
    assert "failed in step `compile`" in done.stderr
    assert "broken" in done.stderr
    assert "Traceback" not in done.stderr


def test_bar_is_drawn_on_a_terminal(installed: Path) -> None:
    ours, theirs = pty.openpty()
    done = engine_command(installed, "install", capture_output=False, stdout=subprocess.PIPE, stderr=theirs)
    drawn = os.read(ours, 65536)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0
    assert b"\x1b[" in drawn
    assert b"llama.cpp is in" in drawn


@pytest.mark.parametrize("arguments", [[], ["instal"], ["status", "--wrong"], ["install", "--bin-dir", "x"]])
def test_wrong_command_line_is_a_usage_error(tmp_path: Path, arguments: list[str]) -> None:
    done = engine_command(tmp_path, *arguments)
    assert done.returncode == 2
    assert "Try 'libmesh-node engine" in done.stderr
