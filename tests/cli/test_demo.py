"""`libmesh-node demo`, as it is: two real nodes, a real llama-server, a real answer through the mesh."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from libmesh_node.llama.engine import Engine

pytestmark = [pytest.mark.slow, pytest.mark.llama]
PATIENCE = 120.0


def processes_of(folder: Path) -> list[str]:
    """Command lines of the running processes that have to do with `folder`, or whose folder or log it is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (process / "environ").read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        if f"TMPDIR={folder}\0" in environment:
            found.append(command)
    return found


@contextmanager
def demo(folder: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    argv = ["env", f"TMPDIR={folder}", sys.executable, "-m", "libmesh_node", "demo", *flags]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if word in line:
            return seen
    raise AssertionError(f"it ended before it said {word!r}:\n{seen}")


def assert_gone(folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def test_it_shows_an_answer_through_the_mesh_and_leaves_nothing_behind(
    tmp_path: Path, engine: Engine
) -> None:
    with demo(tmp_path, "--once") as process:
        shown, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, shown
    pieces = re.search(r"(\d+) pieces, the first after (\d+) ms, the last after (\d+) ms", shown)
    assert pieces, shown
    assert int(pieces[1]) > 1
    assert int(pieces[2]) < int(pieces[3])
    assert "nonsense" in shown
    assert shown.count("http://localhost:") == 4
    assert_gone(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_readme_shows_what_is_really_shown(tmp_path: Path, engine: Engine) -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    promised = re.search(r"<!-- demo output -->\n```\n(.*?)```", readme, re.DOTALL)
    assert promised
    with demo(tmp_path) as process:
        shown = read_until(process, "until Ctrl-C")
    numberless = [re.sub(r"[0-9][0-9.]*", "N", line) for line in shown.splitlines()]
    for line in promised[1].splitlines():
        if not line.endswith("…"):  # the answer, which is another one each time
            assert re.sub(r"[0-9][0-9.]*", "N", line) in numberless


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both_nodes_and_all_that_they_started(
    tmp_path: Path, engine: Engine, number: signal.Signals
) -> None:
    with demo(tmp_path) as process:
        read_until(process, "until Ctrl-C")
        assert len(processes_of(tmp_path)) >= 5  # the demo, two nodes, llama-server, and what guards them
        process.send_signal(number)
        assert process.wait(PATIENCE) == 0
        assert_gone(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_killing_it_ends_all_that_it_started(tmp_path: Path, engine: Engine) -> None:
    with demo(tmp_path) as process:
        read_until(process, "until Ctrl-C")
        process.kill()
        process.wait(PATIENCE)
        assert_gone(tmp_path)


def test_a_node_that_dies_ends_the_demo_with_its_last_words(tmp_path: Path, engine: Engine) -> None:
    with demo(tmp_path) as process:
        read_until(process, "until Ctrl-C")
        (pid_file,) = tmp_path.glob("libmesh-demo-*/client/node.lock")
        subprocess.run(["kill", "-9", pid_file.read_text().strip()], check=True)
        assert process.wait(PATIENCE) == 1
        assert process.stdout is not None
        assert "The client node ended by itself" in process.stdout.read()
        assert_gone(tmp_path)
