"""Both ends of the tunnel over plain sockets, around the real programs."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import trio
from libmesh_node.llama.engine import Engine
from libmesh_node.llama.process import GuardedProcess, Lines, open_guarded
from libmesh_node.llama.rpc.ahead import Chain
from libmesh_node.llama.rpc.borrower import Borrowed
from libmesh_node.llama.rpc.lender import Lender, LentModel
from libmesh_node.llama.rpc.opening import SessionRequest
from libmesh_node.llama.rpc.weights import LearnedHashes, Weights
from libmesh_node.llama.server import child_environment
from libmesh_node.llama.supervisor import free_port
from libmesh_node.models.reference import open_model

from libmesh import PeerId, Stream

DIGEST = "ab" * 32
PATIENCE = 60.0


class SocketStream(Stream):
    """A stream of the mesh, as far as the ends can tell, over a socket."""

    def __init__(self, inner: trio.SocketStream) -> None:
        self.inner = inner
        self.peer, self.protocol = PeerId("peer"), "test"

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.inner.receive_some(max_bytes)

    async def send_eof(self) -> None:
        await self.inner.send_eof()

    async def aclose(self) -> None:
        await self.inner.aclose()

    def reset(self) -> None:
        self.inner.socket.close()


def lender(
    engine: Engine,
    model: Path,
    memory: int = 1 << 33,
    open_stream: Callable[[str], Awaitable[Stream]] | None = None,
) -> Lender:
    """Lends the rpc-server for one model."""
    lending = Lender(
        engine.require_rpc_server(), memory=lambda: memory, environment=os.environ, open_stream=open_stream
    )
    lending.models[DIGEST] = LentModel(name="model", digest=DIGEST, parts=open_model(model).parts)
    return lending


@asynccontextmanager
async def lent(lending: Lender) -> AsyncIterator[int]:
    """The port where `lending` answers streams."""

    async def serve(sock: trio.SocketStream) -> None:
        await lending.serve(SocketStream(sock))

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def request(engine: Engine, memory: int = 1 << 32, digest: str = DIGEST) -> SessionRequest:
    """What a host with the same programs asks for."""
    numbers = (engine.require_rpc_server().rpc_protocol or "").split(".")
    major, minor, patch = map(int, numbers)
    return SessionRequest(digest=digest, memory_bytes=memory, protocol=(major, minor, patch), model="model")


def chained(engine: Engine, names: Sequence[str], *, previous: str | None = None) -> list[SessionRequest]:
    """What each of several workers is asked, so that they pass results on; `previous` if streams do not tell who is there."""
    tokens = [os.urandom(16) for _ in names]
    asked = [request(engine) for _ in names]
    for at in range(1, len(names)):
        asked[at] = replace(asked[at], token=tokens[at], previous=previous or names[at - 1])
        asked[at - 1] = replace(asked[at - 1], next=names[at], next_token=tokens[at])
    return asked


@asynccontextmanager
async def workers(
    engine: Engine,
    model: Path,
    weights: Weights,
    hashes: LearnedHashes,
    count: int,
    *,
    chain: Chain | None = None,
    between: Callable[[int], AbstractAsyncContextManager[int]] = nullcontext,
) -> AsyncIterator[list[Borrowed]]:
    """`count` workers, each with a port for llama-server.

    `chain` lets them pass results on. `between` stands in front of each worker: it takes a port and gives the one to use.
    """
    async with AsyncExitStack() as stack:
        borrowed: list[Borrowed] = []
        ports: list[int] = []

        async def open_stream(name: str) -> Stream:
            return SocketStream(await trio.open_tcp_stream("127.0.0.1", ports[int(name)]))

        for _ in range(count):
            lending = lender(engine, model, open_stream=open_stream)
            ports.append(
                await stack.enter_async_context(between(await stack.enter_async_context(lent(lending))))
            )
        names = [str(place) for place in range(count)]
        requests = chained(engine, names, previous="peer") if chain is not None else [request(engine)] * count
        for place, asked in enumerate(requests):
            worker = Borrowed(partial(open_stream, str(place)), asked, weights, hashes, chain, place)
            await worker.open()
            borrowed.append(worker)
        async with trio.open_nursery() as nursery:
            for worker in borrowed:
                await worker.listen(nursery)
            yield borrowed
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def llama_server(
    engine: Engine, model: Path, rpc: Sequence[int] = (), *flags: str
) -> AsyncIterator[tuple[int, GuardedProcess]]:
    """A llama-server that answers, with all layers on the rpc-servers at these ports."""
    port = free_port()
    argv = [str(engine.require_llama_server().path)]
    if rpc:
        argv += ["--rpc", ",".join(f"127.0.0.1:{number}" for number in rpc), "-fit", "off", "-cram", "0"]
    argv += [
        "-m",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "-ngl",
        "99",
        "-c",
        "512",
        "-np",
        "1",
    ]
    said: list[str] = []
    environment = child_environment(os.environ)
    async with (
        open_guarded([*argv, *flags], environment=environment) as process,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(_listen, process, said)
        with trio.fail_after(PATIENCE):
            while not await trio.to_thread.run_sync(_healthy, port):
                with trio.move_on_after(0.05):
                    raise AssertionError(f"it ended with {await process.wait()}: {said[-20:]}")
        yield port, process
        nursery.cancel_scope.cancel()


async def _listen(process: GuardedProcess, said: list[str]) -> None:
    lines = Lines(process.output)
    while (line := await lines.receive()) is not None:
        said.append(line)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


async def complete(port: int, prompt: str = "Once upon a time", tokens: int = 32) -> str:
    """Greedy text from a llama-server."""
    answer = await trio.to_thread.run_sync(_complete, port, prompt, tokens)
    return str(answer["content"])


def _complete(port: int, prompt: str, tokens: int) -> Any:
    body = json.dumps(
        {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": False}
    ).encode()
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=PATIENCE) as answered:
        return json.load(answered)
