"""The real program as a real process: what a person at a terminal can count on, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from libmesh_node.datadir import DataDir, NodeInfo
from libmesh_node.llama.engine import Engine

BARE = [sys.executable, "-m", "libmesh_node"]
PATIENCE = 60.0


def run(*argv: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*BARE, *argv], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == expect, done.stderr
    assert "Traceback" not in done.stderr
    return done


def wait_for_info(folder: Path, node: subprocess.Popen[Any]) -> NodeInfo:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if (info := DataDir(folder).read_info()) is not None:
            return info
        assert node.poll() is None, node.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("the node did not come up")


@contextmanager
def node(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], NodeInfo]]:
    argv = [*BARE, "--data-dir", str(folder), "--port", "0", "--console", "0", *flags]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, wait_for_info(folder, process)
        finally:
            process.kill()
            process.communicate()


def settled(folder: Path) -> dict[str, Any]:
    """The status of the running node once it is in a mesh; it answers before."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        status: dict[str, Any] = json.loads(run("status", "--json", "--data-dir", str(folder)).stdout)
        if status["mesh_id"] and status["token"]:
            return status
    raise AssertionError("the node is in no mesh")


def identity(folder: Path) -> tuple[str, str]:
    """The ids of the running node and of its mesh."""
    status = settled(folder)
    return status["node_id"], status["mesh_id"]


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, NodeInfo]]:
    folder = tmp_path_factory.mktemp("idle")
    with node(folder) as (_, info):
        settled(folder)
        yield folder, info


def test_status_finds_the_node_by_its_folder_and_by_its_port(idle: tuple[Path, NodeInfo]) -> None:
    folder, info = idle
    by_folder = json.loads(run("status", "--json", "--data-dir", str(folder)).stdout)
    by_port = json.loads(run("status", "--json", "--console", str(info.console_port)).stdout)
    assert by_folder["node_id"] == by_port["node_id"]
    assert by_folder["node_status"] == "Idle"
    assert by_folder["node_id"] in run("status", "--data-dir", str(folder)).stdout


def test_a_second_node_on_the_folder_names_the_first(idle: tuple[Path, NodeInfo]) -> None:
    folder, info = idle
    done = run("--data-dir", str(folder), "--port", "0", "--console", "0", expect=1)
    assert f"pid {info.pid}" in done.stderr
    assert "--data-dir" in done.stderr


def test_a_taken_port_is_named_with_its_flag(idle: tuple[Path, NodeInfo], tmp_path: Path) -> None:
    api, console = str(idle[1].api_port), str(idle[1].console_port)
    for flags, flag in (
        (("--port", api, "--console", "0"), "--port"),
        (("--port", "0", "--console", console), "--console"),
    ):
        done = run("--data-dir", str(tmp_path), *flags, expect=1)
        assert flag in done.stderr


def test_an_invite_that_is_none_ends_the_start_with_words(tmp_path: Path) -> None:
    done = run("--data-dir", str(tmp_path), "--join", "nonsense", "--port", "0", "--console", "0", expect=1)
    assert "invite" in done.stderr.splitlines()[-1]


def test_a_model_that_is_not_there_ends_the_start_with_words(tmp_path: Path, engine: Engine) -> None:
    done = run(
        "--data-dir", str(tmp_path), "--model", "/none.gguf", "--port", "0", "--console", "0", expect=1
    )
    assert "/none.gguf" in done.stderr.splitlines()[-1]


def test_an_unusable_data_folder_ends_the_start_with_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "--data-dir" in run("--data-dir", str(tmp_path / "file"), expect=1).stderr


def test_invites_carry_what_was_asked_for(idle: tuple[Path, NodeInfo]) -> None:
    asked = time.time()
    made = json.loads(
        run("invite", "--scope", "client", "--ttl", "12h", "--json", "--data-dir", str(idle[0])).stdout
    )
    assert made["scope"] == "client"
    assert asked + 43190 < made["expires_unix"] < time.time() + 43210
    assert run("invite", "--data-dir", str(idle[0])).stdout.strip() != made["token"]


def test_stop_ends_the_node_with_0_and_leaves_no_trace_of_running(tmp_path: Path) -> None:
    with node(tmp_path) as (process, _):
        run("stop", "--data-dir", str(tmp_path))
        assert process.wait(PATIENCE) == 0
        assert "Traceback" not in process.communicate()[1]
    assert not DataDir(tmp_path).node_json.exists()
    assert "No node runs" in run("stop", "--data-dir", str(tmp_path), expect=1).stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_node_with_0(tmp_path: Path, number: signal.Signals) -> None:
    with node(tmp_path) as (process, _):
        process.send_signal(number)
        assert process.wait(PATIENCE) == 0
        assert "Traceback" not in process.communicate()[1]


def test_a_terminal_that_is_closed_ends_the_node_as_it_should(tmp_path: Path) -> None:
    """It says goodbye, though nobody can read what it says of it, and though it is told more than once."""
    master, terminal = os.openpty()
    argv = ["setsid", "--ctty", *BARE, "--data-dir", str(tmp_path), "--port", "0", "--console", "0"]
    with subprocess.Popen(argv, stdin=terminal, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        try:
            wait_for_info(tmp_path, process)
            os.close(master)
            process.send_signal(signal.SIGHUP)  # as its shell does
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    assert not DataDir(tmp_path).node_json.exists()
    assert "Traceback" not in DataDir(tmp_path).node_log.read_text()


def test_under_nohup_a_terminal_that_is_closed_ends_nothing(tmp_path: Path) -> None:
    argv = ["nohup", *BARE, "--data-dir", str(tmp_path), "--port", "0", "--console", "0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_info(tmp_path, process)
            process.send_signal(signal.SIGHUP)
            assert identity(tmp_path)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
            process.communicate()


def test_identity_survives_a_restart_until_the_key_is_rotated(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []
    for _ in range(2):
        with node(tmp_path):
            seen.append(identity(tmp_path))
            run("rotate-key", "--data-dir", str(tmp_path), expect=1)
    run("rotate-key", "--data-dir", str(tmp_path))
    with node(tmp_path):
        node_id, mesh_id = identity(tmp_path)
    assert seen[0] == seen[1]
    assert node_id != seen[0][0]
    assert mesh_id != seen[0][1]


def test_an_ephemeral_node_is_another_one_each_time_and_leaves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    argv = [*BARE, "--ephemeral", "--port", "0", "--console", "0", "--json-logs"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        lines = [json.loads(process.stderr.readline()) for _ in range(3)]
        assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert list(tmp_path.iterdir()) == []


def test_logs_go_to_the_data_folder_without_the_invite(tmp_path: Path) -> None:
    with node(tmp_path) as (process, _):
        token = settled(tmp_path)["token"]
        process.send_signal(signal.SIGINT)
        shown = process.communicate()[1]
    written = DataDir(tmp_path).node_log.read_text()
    assert token in shown
    assert token not in written
    assert "console" in written


def test_the_api_of_an_idle_node_says_what_to_do(idle: tuple[Path, NodeInfo]) -> None:
    with socket.create_connection(("127.0.0.1", idle[1].api_port), timeout=PATIENCE) as connection:
        body = b'{"model": "x", "messages": []}'
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30\r\n\r\n" + body
        )
        answer = connection.recv(65536).decode()
    assert answer.startswith("HTTP/1.1 503")
    assert "libmesh-node" in answer
    assert '"error"' in answer
