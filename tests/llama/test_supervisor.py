from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
import trio
from libmesh_node.llama import process as process_module
from libmesh_node.llama import supervisor
from libmesh_node.llama.engine import Binary, Engine
from libmesh_node.llama.restart import RestartConfig, RestartPolicy
from libmesh_node.llama.server import ServerPlan, plan_server
from libmesh_node.llama.supervisor import PROPS_TRIES, LlamaServer
from libmesh_node.models.reference import open_model
from libmesh_node.snapshot import Process

from tests.llama.processes import eventually, is_running, parent_of, request, wait_until_gone

pytestmark = pytest.mark.llama

FAST = RestartConfig(first_delay=0.01, max_delay=0.01)


@dataclass
class Running:
    server: LlamaServer
    seen: list[Process] = field(default_factory=list)

    def states(self) -> list[str]:
        """Each state once for as long as it lasted."""
        words = [process.status for process in self.seen]
        return [word for place, word in enumerate(words) if place == 0 or words[place - 1] != word]

    async def until(self, status: str, restarts: int = 0) -> Process:
        server = self.server
        await eventually(lambda: server.process.status == status and server.process.restarts >= restarts)
        return server.process


@pytest.fixture
def plan(demo_path: Path) -> ServerPlan:
    model = open_model(demo_path, is_demo=True)
    return replace(plan_server(model, memory_bytes=1 << 30), threads=1)


@asynccontextmanager
async def running(
    binary: Binary, plan: ServerPlan, log: Path, *, config: RestartConfig = FAST
) -> AsyncIterator[Running]:
    observed: list[Process] = []
    server = LlamaServer(
        binary, plan, log=log, environment=os.environ, on_change=observed.append, policy=RestartPolicy(config)
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        yield Running(server, observed)
        nursery.cancel_scope.cancel()


def script(tmp_path: Path, text: str) -> Binary:
    path = tmp_path / "llama-server"
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
    path.chmod(0o755)
    return Binary(path=path, version="", rpc_protocol=None, origin="PATH")


async def test_life_from_launch_to_clean_end(engine: Engine, plan: ServerPlan, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "llama-demo.log"
    async with running(engine.require_llama_server(), plan, log) as run:
        with trio.fail_after(60):
            process = await run.server.wait_settled()
        assert run.server.base_url == f"http://127.0.0.1:{process.port}"
        assert process.pid is not None
        models = await trio.to_thread.run_sync(request, f"{run.server.base_url}/v1/models")
        assert models["data"][0]["id"] == "demo"
    assert [state for state in run.states() if state != "loading"] == ["starting", "ready", "stopping"]
    assert run.server.base_url is None
    assert run.server.process.pid is None
    assert not is_running(process.pid)
    assert "listening" in log.read_text()


async def test_killed_server_is_replaced_and_the_reason_told(
    engine: Engine, plan: ServerPlan, tmp_path: Path
) -> None:
    async with running(engine.require_llama_server(), plan, tmp_path / "log") as run:
        first = await run.until("ready")
        assert first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
        second = await run.until("ready", restarts=1)
    assert second.pid != first.pid
    assert (second.restarts, second.failure) == (1, "")
    waiting = next(process for process in run.seen if process.status == "restarting")
    assert "SIGKILL" in waiting.failure
    assert waiting.pid is None


def test_node_killed_while_serving_leaves_no_server(demo_path: Path, engine: Engine, tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import os, sys, trio
        from pathlib import Path
        from libmesh_node.llama.engine import find_engine
        from libmesh_node.llama.server import plan_server
        from libmesh_node.llama.supervisor import LlamaServer
        from libmesh_node.models.reference import open_model

        async def main():
            plan = plan_server(open_model(Path(sys.argv[1])), memory_bytes=1 << 30)
            binary = find_engine().require_llama_server()
            server = LlamaServer(binary, plan, log=Path(sys.argv[2]), environment=os.environ)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.run)
                print((await server.wait_settled()).pid, flush=True)

        trio.run(main)
    """)
    command = [sys.executable, "-c", program, str(demo_path), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as node:
        assert node.stdout is not None
        pid = int(node.stdout.readline())
        assert is_running(pid)
        node.kill()
        wait_until_gone(pid)


async def test_server_killed_with_its_guard_is_replaced(
    engine: Engine, plan: ServerPlan, tmp_path: Path
) -> None:
    async with running(engine.require_llama_server(), plan, tmp_path / "log") as run:
        first = await run.until("ready")
        assert first.pid is not None
        os.kill(parent_of(first.pid), signal.SIGKILL)
        second = await run.until("ready", restarts=1)
        assert not is_running(first.pid)
        assert second.pid is not None


async def test_stop_is_quick_while_a_request_runs(engine: Engine, plan: ServerPlan, tmp_path: Path) -> None:
    done = threading.Event()

    def endless(url: str) -> None:
        body = {"prompt": "on and on", "max_tokens": 1_000_000, "stream": True}
        try:
            request(f"{url}/v1/completions", body)
        except (OSError, HTTPException, ValueError):  # cut off, or not one JSON value: all as they should be
            done.set()

    async with running(engine.require_llama_server(), plan, tmp_path / "log") as run:
        await run.until("ready")
        url = run.server.base_url
        assert url is not None
        threading.Thread(target=endless, args=(url,), daemon=True).start()
        await eventually(lambda: any(slot["is_processing"] for slot in request(f"{url}/slots")))
    assert await trio.to_thread.run_sync(done.wait, 60)


async def test_deaf_server_is_killed_in_time(plan: ServerPlan, tmp_path: Path) -> None:
    deaf = script(
        tmp_path,
        """
        import signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("no ears", flush=True)
        while True: time.sleep(60)
        """,
    )
    async with running(deaf, plan, tmp_path / "log") as run:
        await eventually(lambda: "no ears" in (tmp_path / "log").read_text())
        pid = run.server.process.pid
        assert pid is not None
    assert not is_running(pid)


async def test_crash_loop_ends_in_failed_with_the_servers_own_words(
    engine: Engine, plan: ServerPlan, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(plan.model.path.read_bytes()[:100_000])
    bad = replace(plan, model=replace(plan.model, parts=(broken,)))
    async with running(engine.require_llama_server(), bad, tmp_path / "log") as run:
        with trio.fail_after(60):
            process = await run.server.wait_settled()
    assert process.status == "failed"
    assert process.restarts == FAST.failures - 1
    assert "failed 5 times" in process.failure
    assert "corrupted or incomplete" in process.failure or "failed to load model" in process.failure
    assert run.server.process == process  # cancelling afterwards does not hide the verdict


async def test_program_that_cannot_be_started_fails_with_the_reason(plan: ServerPlan, tmp_path: Path) -> None:
    nothing = Binary(path=tmp_path / "none", version="", rpc_protocol=None, origin="PATH")
    async with running(nothing, plan, tmp_path / "log") as run:
        with trio.fail_after(60):
            process = await run.server.wait_settled()
    assert process.status == "failed"
    assert "No such file" in process.failure


async def test_want_of_file_descriptors_is_a_failure_like_any_other(
    plan: ServerPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the port, for the way to the guard, and for the guard; then there are some again."""
    wants = ["port", "way", "guard"]

    def short_of(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*about: Any, **more: Any) -> Any:
            if wants[:1] == [what]:
                raise OSError(errno.EMFILE, f"no {wants.pop(0)}")
            return real(*about, **more)

        return act

    monkeypatch.setattr(supervisor, "free_port", short_of("port", supervisor.free_port))
    monkeypatch.setattr(process_module.socket, "socketpair", short_of("way", socket.socketpair))
    monkeypatch.setattr(
        process_module.trio.lowlevel, "open_process", short_of("guard", trio.lowlevel.open_process)
    )
    patient = script(tmp_path, "import time; time.sleep(300)")
    async with running(patient, plan, tmp_path / "log") as run:
        await eventually(lambda: run.server.process.pid is not None)
    told = [seen.failure for seen in run.seen if seen.status == "restarting"]
    assert [words.split()[-1] for words in told] == ["port", "way", "guard"]


@pytest.fixture
def occupied() -> Iterator[int]:
    """A port with a web server that says 200 to everything, and is not ours."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    connection.recv(65536)
                    connection.sendall(b'HTTP/1.0 200 OK\r\n\r\n{"data": [{"id": "another"}]}')

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


async def test_port_lost_in_a_race_is_replaced_at_once(
    engine: Engine, plan: ServerPlan, tmp_path: Path, occupied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = [occupied, occupied]
    choose = supervisor.free_port
    monkeypatch.setattr(supervisor, "free_port", lambda: ports.pop() if ports else choose())
    patient = RestartConfig(first_delay=1000, max_delay=1000)
    async with running(engine.require_llama_server(), plan, tmp_path / "log", config=patient) as run:
        process = await run.until("ready")
    assert process.port != occupied
    assert "ready" not in [seen.status for seen in run.seen if seen.port == occupied]


async def test_stranger_at_the_port_is_not_taken_for_the_server(
    plan: ServerPlan, tmp_path: Path, occupied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "free_port", lambda: occupied)
    silent = script(tmp_path, "import time; time.sleep(300)")
    async with running(silent, plan, tmp_path / "log") as run:
        await trio.sleep(0.3)
        assert run.server.process.status == "starting"


async def test_server_that_stands_still_while_it_loads_is_ended(plan: ServerPlan, tmp_path: Path) -> None:
    still = script(tmp_path, "import time; time.sleep(300)")
    async with running(still, plan, tmp_path / "log", config=RestartConfig(failures=1)) as run:
        run.server._stalled_after = 0.5
        process = await run.until("failed")
    assert "it stood still for 0.5 s, and was ended" in process.failure


async def test_server_that_takes_nothing_new_is_asked_whether_it_is_busy(
    plan: ServerPlan, tmp_path: Path
) -> None:
    """As while it gives up its draft. One that does not answer counts as busy, one that loads has nothing to do."""
    still = script(tmp_path, "import time; time.sleep(300)")
    async with running(still, plan, tmp_path / "log") as run:
        await eventually(lambda: run.server.process.pid is not None)
        assert not await run.server.is_busy()
        run.server._change("restarting")
        assert await run.server.is_busy()
        run.server._change("restarting", pid=None)
        assert not await run.server.is_busy()


async def test_output_without_end_fills_no_disk(plan: ServerPlan, tmp_path: Path) -> None:
    loud = script(tmp_path, "import sys\nwhile True: sys.stdout.write('x' * 5000 + '\\n')")
    async with running(loud, plan, tmp_path / "log"):
        await eventually((tmp_path / "log.1").exists)
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("log*")}  # noqa: ASYNC240
    assert sorted(sizes) == ["log", "log.1"]
    assert max(sizes.values()) < 5 << 20


async def test_environment_cannot_change_the_command_line(
    engine: Engine, plan: ServerPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    monkeypatch.setenv("LLAMA_ARG_ALIAS", "other")
    async with running(engine.require_llama_server(), plan, tmp_path / "log") as run:
        await run.until("ready")
        answer: Any = await trio.to_thread.run_sync(
            request, f"{run.server.base_url}/v1/embeddings", {"model": "demo", "input": "words"}
        )
    assert len(answer["data"][0]["embedding"]) == plan.model.header.embedding_length


@pytest.mark.parametrize("unsaid", [PROPS_TRIES - 1, PROPS_TRIES], ids=["before it is ready", "later"])
async def test_a_server_that_does_not_say_at_once_what_it_takes_is_asked_again(
    engine: Engine, plan: ServerPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unsaid: int
) -> None:
    get, asked = supervisor._get, []

    async def slow(port: int, path: str) -> bytes:
        if path != "/props":
            return await get(port, path)
        asked.append(path)
        return b"" if len(asked) <= unsaid else b"HTTP/1.1 200 OK\r\n\r\n{}"

    monkeypatch.setattr(supervisor, "_get", slow)
    monkeypatch.setattr(supervisor, "LOAD_POLL", 0.05)
    async with running(engine.require_llama_server(), plan, tmp_path / "log") as node:
        await node.until("ready")
        if unsaid < PROPS_TRIES:
            assert node.server.abilities is not None
        await eventually(lambda: node.server.abilities is not None)
        assert len(asked) == unsaid + 1
