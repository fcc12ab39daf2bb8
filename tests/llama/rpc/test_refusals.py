"""Sessions that must not come to be: another protocol, another file, a copy that has changed."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
from libmesh_node.llama.engine import Binary, Engine
from libmesh_node.llama.rpc.borrower import Borrowed, SessionRefused, borrow
from libmesh_node.llama.rpc.facts import Device, WorkerFacts
from libmesh_node.llama.rpc.frames import Reply, frame
from libmesh_node.llama.rpc.lender import Lender, LentModel
from libmesh_node.llama.rpc.opening import SessionRequest, encode_answer
from libmesh_node.llama.rpc.weights import LearnedHashes, open_weights
from libmesh_node.models.demo import TINY, write_model
from libmesh_node.models.digest import model_digest
from libmesh_node.snapshot import Process

from tests.llama.rpc import ends

pytestmark = pytest.mark.llama

OLD_SERVER = """
    import socket, struct, sys
    listener = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("-p") + 1])))
    while True:
        connection, _ = listener.accept()
        with connection:
            while len(head := connection.recv(9, socket.MSG_WAITALL)) == 9:
                command, size = struct.unpack("<BQ", head)
                connection.recv(size, socket.MSG_WAITALL) if size else b""
                said = {14: bytes([6, 1, 0, 0]) + bytes(24), 15: struct.pack("<I", 1), 1: struct.pack("<Q", 64),
                        2: struct.pack("<Q", 1 << 40), 11: struct.pack("<QQ", 1 << 33, 1 << 33)}[command]
                connection.sendall(struct.pack("<Q", len(said)) + said)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_model(path, TINY, 7)
    return path


class Worker:
    """A lender with one model, and how many programs it started for its sessions."""

    def __init__(
        self,
        binary: Binary,
        model: Path,
        digest: str,
        identify: Callable[[tuple[Path, ...]], Awaitable[str]] | None = None,
    ) -> None:
        self.seen: list[Process] = []
        self.lender = Lender(
            binary,
            memory=lambda: 1 << 33,
            environment=os.environ,
            on_change=lambda: self.seen.extend(self.lender.processes),
            identify=identify,  # type: ignore[arg-type]
        )
        self.lender.models[digest] = LentModel(name="model", digest=digest, parts=(model,))

    async def refusal(self, request: SessionRequest, model: Path) -> str:
        """What a host is told that asks for a session."""
        with open_weights((model,)) as weights:
            async with ends.lent(self.lender) as port:

                async def open_stream() -> ends.SocketStream:
                    return ends.SocketStream(await trio.open_tcp_stream("127.0.0.1", port))

                with trio.fail_after(ends.PATIENCE), pytest.raises(SessionRefused) as refused:
                    async with borrow(open_stream, request, weights, LearnedHashes(None)):
                        pass
        assert self.seen == [], "a program was started for a session that was refused"
        return str(refused.value)


def old_server(folder: Path, says: str) -> Binary:
    """An rpc-server of protocol 6.1.0, which is known as one that speaks `says`."""
    path = folder / "rpc-server"
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(OLD_SERVER)}")
    path.chmod(0o755)
    return Binary(path=path, version="", rpc_protocol=says, origin="PATH")


@pytest.mark.parametrize("known", [True, False], ids=["known beforehand", "told by HELLO only"])
async def test_another_protocol_is_refused_with_both_versions(
    engine: Engine, model: Path, tmp_path: Path, known: bool
) -> None:
    """Also if the program was replaced after it had been asked."""
    ours = engine.require_rpc_server().rpc_protocol or ""
    worker = Worker(old_server(tmp_path, "6.1.0" if known else ours), model, ends.DIGEST)
    told = await worker.refusal(ends.request(engine), model)
    assert f"the host speaks llama.cpp's RPC protocol {ours}, the worker 6.1.0" in told


async def test_a_worker_whose_program_ends_at_once_says_so(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rpc-server"
    path.write_text("#!/bin/sh\nexit 3\n")
    path.chmod(0o755)
    ours = engine.require_rpc_server().rpc_protocol
    broken = Binary(path=path, version="", rpc_protocol=ours, origin="PATH")
    told = await Worker(broken, model, ends.DIGEST).refusal(ends.request(engine), model)
    assert "its rpc-server does not run: the worker's rpc-server ended with 3 at once" in told


async def test_a_host_believes_its_own_eyes(engine: Engine, model: Path) -> None:
    """A worker that lends to anybody, whatever they speak."""
    facts = WorkerFacts((6, 1, 0), (Device(64, 1 << 40, 1 << 30, 1 << 30, True),))

    async def lend(stream: trio.SocketStream) -> None:
        await stream.receive_some(4096)
        await stream.send_all(frame(Reply.OPENED, encode_answer(facts)))

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, lend, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]

        async def open_stream() -> ends.SocketStream:
            return ends.SocketStream(await trio.open_tcp_stream("127.0.0.1", port))

        with open_weights((model,)) as weights, pytest.raises(SessionRefused, match=r"the worker 6\.1\.0"):
            await Borrowed(open_stream, ends.request(engine), weights, LearnedHashes(None)).open()
        nursery.cancel_scope.cancel()


async def test_the_same_name_with_other_weights_is_refused(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "model.gguf"
    other.parent.mkdir()
    write_model(other, TINY, 8)
    worker = Worker(engine.require_rpc_server(), other, await model_digest((other,), tmp_path), model_digest)
    asked = replace(ends.request(engine), digest=await model_digest((model,), tmp_path))
    assert "it has not the same model" in await worker.refusal(asked, model)


async def test_a_copy_that_was_damaged_since_is_refused(engine: Engine, model: Path, tmp_path: Path) -> None:
    digest = await model_digest((model,), tmp_path)
    copy = tmp_path / "copy.gguf"
    shutil.copy(model, copy)
    worker = Worker(engine.require_rpc_server(), copy, digest, model_digest)
    with copy.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(8))
    asked = replace(ends.request(engine), digest=digest)
    assert "not what it was when it was identified" in await worker.refusal(asked, model)
