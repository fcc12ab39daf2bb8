"""What the benches of the API start and ask: nodes, llama-servers, nginx, LiteLLM's proxy, and clients. Not run by itself."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp
import trio
from libmesh_node.bridge import Bridge
from libmesh_node.http.server import serve_http
from libmesh_node.llama.engine import cache_root, find_engine
from libmesh_node.snapshot import Model, NodeSnapshot, Server

# ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────────


KEY = f"sk-{secrets.token_hex(32)}"
"""Sent with each request: LiteLLM's proxy takes none without. Nobody else looks at it."""


class Incomplete(RuntimeError):
    """An answer that ended without its end, or with an error in it."""


@dataclass(frozen=True)
class Answer:
    """What came of one streamed request. Seconds to the first bytes, and the longest between two pieces.

    `node` is who answered, if that is told.
    """

    first: float
    gap: float
    body: bytes
    node: str = ""

    @property
    def text(self) -> str:
        """What was said."""
        lines = [line[6:] for line in self.body.splitlines() if line.startswith(b"data: {")]
        deltas = [choice["delta"] for line in lines for choice in json.loads(line)["choices"]]
        return "".join(delta.get("content") or "" for delta in deltas)


class Client:
    """Chats streamed from one base URL, each on a connection of its own: llama-server closes after each stream."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = f"{url}/v1/chat/completions"

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str) -> AsyncIterator[Client]:
        """A client for the server at `url`."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers={"Authorization": f"Bearer {KEY}"}
        ) as session:
            yield cls(session, url)

    async def ask(self, request: dict[str, Any]) -> Answer:
        """One answer. Raises `Incomplete`, or `aiohttp.ClientError`, of which a refusal is one."""
        began = last = time.perf_counter()
        first, gap, body = None, 0.0, b""
        async with self._session.post(self._url, json=request | {"stream": True}) as response:
            response.raise_for_status()
            node = response.headers.get("X-Libmesh-Node", "")
            while chunk := await response.content.readany():
                now = time.perf_counter()
                if first is None:
                    first = now - began
                elif b"data: " in chunk:
                    gap = max(gap, now - last)
                last, body = now, body + chunk
        if not body.rstrip().endswith(b"data: [DONE]") or b'data: {"error"' in body:
            raise Incomplete(f"the answer of {self._url} is not complete: {body[-200:]!r}")
        return Answer(first or 0.0, gap, body, node)


def usage(answer: Answer) -> dict[str, Any]:
    """The usage that the last chunk tells."""
    lines = [line[6:] for line in answer.body.splitlines() if line.startswith(b"data: {")]
    found: dict[str, Any] = json.loads(lines[-1]).get("usage") or {}
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of `values` do not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, seconds: float = 120) -> None:
    """Return when `url` answers; raise its error after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urlopen(url, timeout=5):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextmanager
def process(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child, asked to end at the end of the block, and then made to."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
    child = subprocess.Popen(command, **(silent | options))
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextmanager
def llama_server(model: Path, slots: int = 4) -> Iterator[tuple[str, int]]:
    """A llama-server with one thread, and the options that matter as the node sets them: its URL and its process id."""
    binary = find_engine(None).llama_server
    if binary is None:
        sys.exit("llama-server is missing; run `libmesh-node engine install`")
    port = free_port()
    command = [
        str(binary.path),
        "-m",
        str(model),
        "-a",
        model.stem,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    options = ["-np", str(slots), "-c", str(2048 * slots), "-t", "1", "--jinja", "--metrics"]
    with process([*command, *options]) as child:
        wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}", child.pid


class Machine:
    """`libmesh-node` processes with data folders under `folder`, the first of which founds a mesh."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        found = shutil.which(
            "libmesh-node", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        )
        if found is None:
            sys.exit("libmesh-node is not installed here")
        self._program = found
        self.consoles: dict[str, int] = {}
        self.apis: dict[str, str] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *options: str) -> str:
        """Start a node, again on the same ports if it was there before; the URL of its API."""
        first = not self.consoles
        port = int(self.apis[name].rpartition(":")[2]) if name in self.apis else free_port()
        console = self.consoles.setdefault(name, free_port())
        self.apis[name] = f"http://127.0.0.1:{port}"
        invite = self._folder / "invite"
        if first:
            options = (*options, "--invite-file", str(invite))
        elif not (self._folder / name).exists():
            options = (*options, "--join", f"@{invite}")
        where = ("--data-dir", str(self._folder / name), "--port", str(port), "--console", str(console))
        log = self._stack.enter_context((self._folder / f"{name}.log").open("ab"))
        child = process([self._program, *where, *options], stdout=log, stderr=log)
        self.processes[name] = self._stack.enter_context(child)
        if first:
            self._wait_until_up(name)
            while not invite.exists():
                time.sleep(0.05)
        return self.apis[name]

    def _wait_until_up(self, name: str) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                self.status(name)
                return
            except OSError:
                if self.processes[name].poll() is not None or time.monotonic() > deadline:
                    sys.exit((self._folder / f"{name}.log").read_text() or f"{name} did not start")
                time.sleep(0.05)

    def kill(self, name: str) -> None:
        """Kill -9."""
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def status(self, name: str) -> dict[str, Any]:
        """What a node's console answers."""
        with urlopen(f"http://127.0.0.1:{self.consoles[name]}/api/status", timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def wait_for_servers(self, name: str, model: str, count: int) -> None:
        """Return when `count` nodes serve `model`, as far as the node `name` knows."""
        self._wait_until_up(name)
        while True:
            models = {entry["name"]: entry["node_count"] for entry in self.status(name)["mesh_models"]}
            if models.get(model) == count:
                return
            time.sleep(0.1)

    def llama_urls(self, name: str) -> dict[str, str]:
        """The llama-servers of a node, by their models."""
        return {one["model"]: f"http://127.0.0.1:{one['port']}" for one in self.status(name)["processes"]}


@contextmanager
def only_proxy(model: Path, servers: Sequence[str], slots: int = 4) -> Iterator[str]:
    """The HTTP side of a node in a process of its own, over a snapshot with these servers."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        trio.run(_serve_forever, model.stem, servers, slots, theirs)
        os._exit(1)
    os.close(theirs)
    try:
        with os.fdopen(ours) as told:
            yield f"http://127.0.0.1:{int(told.readline())}"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


async def _serve_forever(name: str, urls: Sequence[str], slots: int, report: int) -> None:
    servers = tuple(
        Server(peer=f"peer{number}", base_url=url, local=True, slots=slots) for number, url in enumerate(urls)
    )
    model = Model(name=name, digest="", size_bytes=0, context_length=2048, servers=servers)
    snapshot = NodeSnapshot(
        node_id="me",
        mesh_id="",
        version="",
        hostname="",
        node_status="Serving",
        is_client=False,
        scope="client",
        token="",
        api_port=0,
        console_port=0,
        my_vram_gb=0,
        models=(model,),
    )
    where = ("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        bridge = Bridge(_Nobody(), snapshot)  # type: ignore[arg-type]
        listening = await nursery.start(partial(serve_http, bridge, api=where, console=where))
        os.write(report, b"%d\n" % listening.api_port)


class _Nobody:
    """Carries out no command, for none is ever given."""

    def asked(self, asked: object) -> None:
        """See `NodeCommands.asked`."""


# ── the others ───────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def nginx(servers: Sequence[str], *, most: int = 0) -> Iterator[str | None]:
    """Nginx as a reverse proxy over `servers`, one after the other, not buffering; `None` if it is not installed here.

    With `most`, requests beyond so many at a time get 429.
    """
    program = shutil.which("nginx", path=f"/usr/sbin{os.pathsep}{os.environ['PATH']}")
    if program is None:
        print("nginx is not installed here (apt-get install nginx-light): left out")
        yield None
        return
    port = free_port()
    upstreams = "".join(f"server {url.removeprefix('http://')};" for url in servers)
    with tempfile.TemporaryDirectory(prefix="libmesh-bench-") as folder:
        paths = "".join(
            f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        text = f"""
            daemon off; pid {folder}/pid; error_log /dev/null; worker_processes 1; user root;
            events {{ worker_connections 4096; }}
            http {{
                access_log off; {paths}
                upstream servers {{ {upstreams} }}
                {f"limit_conn_zone $server_port zone=all:1m; limit_conn all {most}; limit_conn_status 429;" if most else ""}
                server {{
                    listen 127.0.0.1:{port};
                    location / {{
                        proxy_pass http://servers; proxy_http_version 1.1; proxy_buffering off;
                        proxy_read_timeout 300s; proxy_set_header Connection "";
                    }}
                }}
            }}"""
        (Path(folder) / "conf").write_text(text)
        with process([program, "-p", folder, "-c", "conf"]):
            wait_for(f"http://127.0.0.1:{port}/health")
            yield f"http://127.0.0.1:{port}"


@contextmanager
def litellm(models: dict[str, str]) -> Iterator[str | None]:
    """LiteLLM's proxy over servers by model, in an environment of its own in the cache; `None` if it cannot be had."""
    home = cache_root() / "bench" / "litellm"
    program = home / "bin" / "litellm"
    if not program.exists():
        print("installing LiteLLM's proxy, once ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        install = [
            str(home / "bin" / "pip"),
            "install",
            "-qq",
            "--disable-pip-version-check",
            "litellm[proxy]",
        ]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"LiteLLM's proxy cannot be installed here: left out. {done.stderr.strip()[-300:]}")
            yield None
            return
    port = free_port()
    entries = [
        {
            "model_name": name,
            "litellm_params": {"model": f"openai/{name}", "api_base": f"{url}/v1", "api_key": "x"},
        }
        for name, url in models.items()
    ]
    environment = os.environ | {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_MASTER_KEY": KEY,
    }
    with tempfile.TemporaryDirectory(prefix="libmesh-bench-") as folder:
        config = Path(folder) / "config.yaml"
        settings = {"telemetry": False, "drop_params": True}
        config.write_text(json.dumps({"model_list": entries, "litellm_settings": settings}))
        command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        with process(command, env=environment):
            wait_for(f"http://127.0.0.1:{port}/health/liveliness")
            yield f"http://127.0.0.1:{port}"
