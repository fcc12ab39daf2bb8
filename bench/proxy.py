"""What the API costs: through a node's API against the same llama-server asked directly, interleaved in one run.

    python bench/proxy.py                 through two real nodes: the API of a client node, the model on the other
    python bench/proxy.py --direct-proxy  through the HTTP side of one node only, without a mesh

Prints added time to first token (p50 and p99, one request at a time) and the ratio of requests per second at 1, 8 and
64 parallel streams; every number compares rounds of both that alternate, so that a noisy machine hits both alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import aiohttp
import trio
from libmesh_node.bridge import Bridge
from libmesh_node.http.server import serve_http
from libmesh_node.llama.engine import find_engine
from libmesh_node.models.demo import TINY, write_model
from libmesh_node.snapshot import Model, NodeSnapshot, Server

MODEL = "bench"
PROMPT = {"model": MODEL, "prompt": "The mesh", "stream": True, "temperature": 0}


def main() -> None:
    """Set up what is compared, and compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--direct-proxy", action="store_true", help="only the proxy of one node, without a mesh"
    )
    parser.add_argument("--rounds", type=int, default=6, help="pairs of rounds per figure (default 6)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens per answer (default 16)")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="libmesh-bench-")))
        model = folder / f"{MODEL}.gguf"
        write_model(model, TINY, 1)
        if options.direct_proxy:
            direct = stack.enter_context(llama_server(model))
            through = stack.enter_context(only_proxy(direct))
        else:
            direct, through = stack.enter_context(two_nodes(model, folder))
        asyncio.run(measure(direct, through, options.rounds, options.tokens))


async def measure(direct: str, through: str, rounds: int, tokens: int) -> None:
    """Print every figure of `through` against `direct`."""
    async with AsyncExitStack() as stack:
        clients = {
            url: await stack.enter_async_context(Client.open(url, tokens)) for url in (direct, through)
        }
        for client in clients.values():
            await client.run(streams=4, requests=16)
        first: dict[str, list[float]] = {direct: [], through: []}
        for _ in range(rounds):
            for url, client in clients.items():
                first[url] += await client.run(streams=1, requests=40)
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            plain, proxied = (quantile(first[url], share) * 1000 for url in (direct, through))
            print(
                f"time to first token {name}: direct {plain:.2f} ms, API {proxied:.2f} ms, "
                f"added {proxied - plain:.2f} ms, ratio {proxied / plain:.2f}"
            )
        for streams in (1, 8, 64):
            rates: dict[str, list[float]] = {direct: [], through: []}
            for _ in range(rounds):
                for url, client in clients.items():
                    began = time.perf_counter()
                    count = max(40, 2 * streams)
                    await client.run(streams=streams, requests=count)
                    rates[url].append(count / (time.perf_counter() - began))
            plain, proxied = (statistics.median(rates[url]) for url in (direct, through))
            print(
                f"requests/s at {streams:2} streams: direct {plain:.0f}, API {proxied:.0f}, ratio {proxied / plain:.2f}"
            )


class Client:
    """Requests to one base URL, each on a connection of its own: llama-server closes after each stream."""

    def __init__(self, session: aiohttp.ClientSession, url: str, tokens: int) -> None:
        self._session = session
        self._url = f"{url}/v1/completions"
        self._body = json.dumps(PROMPT | {"max_tokens": tokens}).encode()

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, tokens: int) -> AsyncIterator[Client]:
        """A client for the server at `url`, asking for `tokens` tokens each time."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            yield cls(session, url, tokens)

    async def run(self, *, streams: int, requests: int) -> list[float]:
        """Make `requests` in `streams` parallel lines; return each one's seconds to the first byte of the body."""
        left = iter(range(requests))
        first: list[float] = []

        async def line() -> None:
            for _ in left:
                first.append(await self._one())

        async with asyncio.TaskGroup() as group:
            for _ in range(streams):
                group.create_task(line())
        return first

    async def _one(self) -> float:
        began = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self._url, data=self._body, headers=headers) as response:
            response.raise_for_status()
            data = await response.content.readany()
            first = time.perf_counter() - began
            while chunk := await response.content.readany():
                data += chunk
            if not data.rstrip().endswith(b"data: [DONE]"):
                raise RuntimeError(f"the answer of {self._url} is not complete: {data[-200:]!r}")
        return first


def quantile(values: list[float], share: float) -> float:
    """The value that `share` of `values` do not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, seconds: float = 60) -> None:
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
def llama_server(model: Path) -> Iterator[str]:
    """A llama-server of its own, with the options that matter as the node sets them."""
    binary = find_engine(None).llama_server
    if binary is None:
        sys.exit("llama-server is missing; run `libmesh-node engine install`")
    port = free_port()
    command = [str(binary.path), "-m", str(model), "-a", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "-np", "4", "-c", "8192", "-t", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextmanager
def only_proxy(direct: str) -> Iterator[str]:
    """The HTTP side of a node in a process of its own, over a snapshot with one server."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        trio.run(_serve_forever, direct, theirs)
        os._exit(1)
    os.close(theirs)
    try:
        with os.fdopen(ours) as told:
            yield f"http://127.0.0.1:{int(told.readline())}"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


async def _serve_forever(direct: str, report: int) -> None:
    server = Server(peer="me", base_url=direct, local=True, slots=4)
    model = Model(name=MODEL, digest="", size_bytes=0, context_length=2048, servers=(server,))
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
        # No command is ever given, so there is nobody to carry one out.
        bridge = Bridge(None, snapshot)  # type: ignore[arg-type]
        listening = await nursery.start(partial(serve_http, bridge, api=where, console=where))
        os.write(report, b"%d\n" % listening.api_port)


@contextmanager
def two_nodes(model: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Two `libmesh-node` processes, one with the model, one that only consumes.

    Gives the URL of the first one's llama-server and that of the second one's API.
    """
    program = shutil.which(
        "libmesh-node", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if program is None:
        sys.exit("libmesh-node is not installed here; --direct-proxy measures without it")
    invite = folder / "invite"
    host_console, client_api = free_port(), free_port()
    with ExitStack() as stack:

        def start(name: str, *options: str) -> None:
            command = [program, "--data-dir", str(folder / name), *options]
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            process = subprocess.Popen(command, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)

        start(
            "host",
            *("--model", str(model), "--invite-file", str(invite)),
            *("--port", str(free_port()), "--console", str(host_console)),
        )
        wait_for(f"http://127.0.0.1:{host_console}/api/status")
        while not invite.exists():
            time.sleep(0.05)
        start(
            "client",
            *("--client", "--join", invite.read_text().strip()),
            *("--port", str(client_api), "--console", str(free_port())),
        )
        wait_for(f"http://127.0.0.1:{client_api}/health")
        with urlopen(f"http://127.0.0.1:{host_console}/api/status") as answer:
            ports = [process["port"] for process in json.load(answer)["processes"]]
        yield f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{client_api}"


if __name__ == "__main__":
    main()
