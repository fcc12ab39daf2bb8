"""Real llama-servers, and the HTTP side of a node over hand-made snapshots: all but the mesh."""

from __future__ import annotations

import http.client
import json
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
import trio
from libmesh_node.asked import Asked
from libmesh_node.bridge import Bridge, CommandFailed
from libmesh_node.http import continuing, proxy
from libmesh_node.http.server import Listening, serve_http
from libmesh_node.llama.engine import find_engine
from libmesh_node.models.demo import SMALL, TINY, ModelShape, write_model
from libmesh_node.snapshot import Model, NodeSnapshot, Server

PATIENCE = 60.0
"""Seconds to wait for whatever is bound to happen, however busy the machine is."""


@dataclass(frozen=True)
class Llama:
    """A llama-server that answers."""

    process: subprocess.Popen[bytes]
    port: int
    model: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def server(self, peer: str = "peer-a", **changes: object) -> Server:
        return replace(Server(peer=peer, base_url=self.url, local=True, slots=2), **changes)

    def served(self, *servers: Server, name: str | None = None) -> Model:
        return Model(
            name=name or self.model,
            digest=f"digest-of-{self.model}",
            size_bytes=2_000_000,
            context_length=2048,
            servers=servers or (self.server(),),
        )

    def busy_slots(self) -> int:
        return sum(bool(slot["is_processing"]) for slot in get_json(self.port, "/slots"))


def get_json(port: int, path: str, **headers: str) -> object:
    return json.loads(call(port, "GET", path, headers=headers)[2])


def call(
    port: int, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """One request on a connection of its own: status, headers in lower case, body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


@contextmanager
def asking(port: int, path: str, body: object) -> Iterator[http.client.HTTPResponse]:
    """One request, whose answer is read as it comes; what nobody has read of it by the end of the block is left."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            yield response
    finally:
        connection.close()


def read_comments(response: http.client.HTTPResponse, count: int) -> bytes:
    """What comes until so many comments have."""
    received = b""
    while sum(line.startswith(b":") for line in received.splitlines(keepends=True)) < count:
        data = response.read1()
        assert data, f"it ended: {received!r}"
        received += data
    return received


def wait_until(condition: Callable[[], bool], limit: float = PATIENCE, every: float = 0.01) -> None:
    """Poll a real process until `condition()` holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit, "it never came true"
        time.sleep(every)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse after a moment what would wait for a server that is being started: none is, unless a test says so."""
    monkeypatch.setattr(proxy, "PATIENCE", 0.3)
    monkeypatch.setattr(continuing, "PATIENCE", 1.0)


@contextmanager
def llama_server(binary: Path, model: Path, *options: str) -> Iterator[Llama]:
    """Run llama-server on a free port until the end of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(binary),
        "-m",
        str(model),
        "-a",
        model.stem,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "-np",
        "2",
        "-c",
        "8192",
    ]
    command += [
        "-ngl",
        "99",
        "--embeddings",
        "--pooling",
        "mean",
        "--jinja",
        "--slots",
        "--metrics",
        "-t",
        "1",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers() -> bool:
        assert process.poll() is None, "llama-server ended at once"
        try:
            return call(port, "GET", "/health")[0] == 200
        except OSError:
            return False

    try:
        wait_until(answers)
        yield Llama(process, port, model.stem)
    finally:
        process.kill()
        process.wait()


class Commands:
    """A node's commands that remember what was asked. `fail_with` makes the next ones fail; `hold` makes them wait."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.asked_for: list[Asked] = []
        self.fail_with: Exception | None = None
        self.hold = False
        self.cancelled = 0

    async def _note(self, *call: object) -> None:
        self.calls.append(call)
        if self.fail_with is not None:
            raise self.fail_with
        if self.hold:
            try:
                await trio.sleep_forever()
            finally:
                self.cancelled += 1

    def asked(self, asked: tuple[Asked, ...]) -> None:
        self.asked_for += asked

    async def join(self, token: str) -> str:
        await self._note("join", token)
        return "0" * 32

    async def invite(self, scope: str, ttl: float) -> tuple[str, float]:
        await self._note("invite", scope, ttl)
        return f"token-for-{scope}", 1_900_000_000.0

    async def revoke(self, name: str) -> str:
        return f"revoked {name}"

    async def tunnelled(self) -> dict[tuple[str, str], int]:
        return {("relayed", "sent"): 7}

    async def stop(self) -> None:
        await self._note("stop")

    async def expose(self, name: str, host: str, port: int, scope: str) -> None:
        await self._note("expose", name, host, port, scope)

    async def load(self, model: str) -> dict[str, object]:
        await self._note("load", model)
        return {"model": model, "status": "loading", "alone": True}

    async def unload(self, name: str, *, forget: bool) -> dict[str, object]:
        await self._note("unload", name, forget)
        return {"model": name, "wanted": not forget}

    async def connect(self, peer: str, name: str, port: int) -> int:
        await self._note("connect", peer, name, port)
        if peer == "nobody":
            raise CommandFailed("not_found", "no such peer")
        return port or 40_000


@dataclass
class Node:
    """The HTTP side of a node, running in a thread of its own as it does in the program."""

    bridge: Bridge
    commands: Commands
    listening: Listening
    token: trio.lowlevel.TrioToken
    stop: trio.Event
    thread: threading.Thread = field(repr=False)

    @property
    def api_port(self) -> int:
        return self.listening.api_port

    @property
    def console_port(self) -> int:
        return self.listening.console_port

    def publish(self, *models: Model, **changes: object) -> None:
        snapshot = replace(self.bridge.snapshot, models=models, **changes)
        trio.from_thread.run_sync(self.bridge.publish, snapshot, trio_token=self.token)

    def end(self) -> None:
        with suppress(trio.RunFinishedError):  # a test may have ended it before
            self.token.run_sync_soon(self.stop.set)
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


def snapshot_of(*models: Model, **changes: object) -> NodeSnapshot:
    made = NodeSnapshot(
        node_id="me",
        mesh_id="1" * 32,
        version="0.0.1",
        hostname="box.example.net",
        node_status="Serving" if models else "Idle",
        is_client=False,
        scope="invite",
        token="an-invite",
        api_port=9337,
        console_port=3131,
        my_vram_gb=8.0,
        models=models,
    )
    return replace(made, **changes)


@contextmanager
def running_node(*models: Model, listen_all: bool = False, origins: tuple[str, ...] = ()) -> Iterator[Node]:
    """Serve HTTP on two free ports until the end of the block."""
    made: queue.SimpleQueue[Node | BaseException] = queue.SimpleQueue()
    commands = Commands()

    async def main() -> None:
        bridge = Bridge(commands, snapshot_of(*models))
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            listening = await nursery.start(
                partial(
                    serve_http,
                    bridge,
                    api=("127.0.0.1", 0),
                    console=("127.0.0.1", 0),
                    listen_all=listen_all,
                    origins=origins,
                )
            )
            token = trio.lowlevel.current_trio_token()
            made.put(Node(bridge, commands, listening, token, stop, threading.current_thread()))
            await stop.wait()
            nursery.cancel_scope.cancel()

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as exc:  # noqa: BLE001  for the test's own thread
            made.put(exc)

    threading.Thread(target=run, daemon=True).start()
    node = made.get(timeout=PATIENCE)
    if isinstance(node, BaseException):
        raise node
    try:
        yield node
    finally:
        node.end()


@pytest.fixture(scope="session")
def llama_binary() -> Path:
    found = find_engine(None).llama_server
    assert found is not None, "llama-server is missing: run `libmesh-node engine install`"
    return found.path


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    shapes: dict[str, tuple[ModelShape, int]] = {"tiny": (TINY, 1), "other": (TINY, 2), "small": (SMALL, 3)}
    for name, (shape, seed) in shapes.items():
        write_model(folder / f"{name}.gguf", shape, seed)
    return {name: folder / f"{name}.gguf" for name in shapes}


@pytest.fixture(scope="session")
def llamas(llama_binary: Path, model_files: dict[str, Path]) -> Iterator[dict[str, Llama]]:
    """One llama-server per model. Tests that kill one start their own."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(llama_server(llama_binary, path)) for name, path in model_files.items()
        }


@pytest.fixture(scope="session")
def two_models(llamas: dict[str, Llama]) -> Iterator[Node]:
    """A node of a mesh with two models, for tests that only ask."""
    with running_node(llamas["tiny"].served(), llamas["other"].served()) as node:
        yield node


@pytest.fixture(scope="session")
def one_model(llamas: dict[str, Llama]) -> Iterator[Node]:
    """A node of a mesh with one model, not the fastest."""
    with running_node(llamas["small"].served()) as node:
        yield node
