"""Sessions whose connection is cut while llama-server generates: it notices nothing. A real loss it notices at once."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
from libmesh_node.llama.engine import Engine
from libmesh_node.llama.rpc.ahead import Chain
from libmesh_node.llama.rpc.borrower import Borrowed
from libmesh_node.llama.rpc.lender import Lender
from libmesh_node.llama.rpc.weights import LearnedHashes, open_weights
from libmesh_node.models.demo import SMALL, write_model
from libmesh_node.placement.seen import SERVICE

from libmesh import Mesh, PeerId, Scope, Stream
from tests.llama.rpc import ends
from tests.town import Town, settled, town

pytestmark = [pytest.mark.llama, pytest.mark.slow]

TOKENS = 100


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    write_model(path, SMALL, 7)
    return path


class Split:
    """A host and its workers, members of one mesh in this process, around the real programs."""

    def __init__(self, place: Town, host: Mesh, workers: list[Mesh], other: Mesh) -> None:
        self.place, self.host, self.workers, self.other = place, host, workers, other
        self.borrowed: list[Borrowed] = []
        self.lenders: list[Lender] = []

    @property
    def meshes(self) -> list[Mesh]:
        return [self.host, *self.workers]

    async def cut_now_and_then(self, lots: random.Random, times: int) -> None:
        """Each cut takes the streams of a split with it; the peers connect again by themselves."""
        for _ in range(times):
            await trio.sleep(lots.uniform(0.02, 0.3))
            one, other = lots.sample(self.meshes, 2)
            self.place.hub.cut(one.peer, other.peer)


@asynccontextmanager
async def split(engine: Engine, model: Path, count: int) -> AsyncIterator[Split]:
    async with town() as place:
        host = await place.found(1)
        token = host.invite(scope=Scope.WORKER, not_after_unix=None)
        workers = [await place.join(2 + at, token) for at in range(count)]
        other = await place.join(9, token)
        await settled([host, *workers, other])
        chain = Chain(count) if count > 1 else None
        requests = ends.chained(engine, [mesh.peer for mesh in workers])
        async with trio.open_nursery() as nursery:
            with open_weights((model,)) as weights:
                made = Split(place, host, workers, other)
                for at, mesh in enumerate(workers):
                    opener = partial(_open, mesh)
                    lending = ends.lender(engine, model, open_stream=opener)
                    made.lenders.append(lending)
                    await nursery.start(_lend, mesh, lending)
                    far = partial(host.open_service, mesh.peer, SERVICE, lasting=True)
                    borrowed = Borrowed(far, requests[at], weights, LearnedHashes(None), chain, at)
                    await borrowed.open()
                    made.borrowed.append(borrowed)
                for borrowed in made.borrowed:
                    await borrowed.listen(nursery)
                try:
                    yield made
                finally:
                    nursery.cancel_scope.cancel()


async def _open(mesh: Mesh, peer: str) -> Stream:
    return await mesh.open_service(PeerId(peer), SERVICE)


async def _lend(
    mesh: Mesh, lending: Lender, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with mesh.offer(SERVICE, lending.serve, scope=Scope.WORKER, lasting=True):
        task_status.started()
        await trio.sleep_forever()


@pytest.mark.parametrize("count", [1, 2])
async def test_connections_cut_in_mid_generation_change_nothing(
    engine: Engine, model: Path, count: int
) -> None:
    async with ends.llama_server(engine, model) as (port, _):
        alone = await ends.complete(port, tokens=TOKENS)
    async with split(engine, model, count) as made, trio.open_nursery() as nursery:
        nursery.start_soon(made.cut_now_and_then, random.Random(count), 4)  # while it loads
        ports = [borrowed.port for borrowed in made.borrowed]
        with trio.fail_after(4 * ends.PATIENCE):
            async with ends.llama_server(engine, model, ports) as (port, _):
                nursery.start_soon(made.cut_now_and_then, random.Random(count + 1), 8)  # while it generates
                pids = [lending.processes[0].pid for lending in made.lenders]
                assert await ends.complete(port, tokens=TOKENS) == alone
                assert [lending.processes[0].pid for lending in made.lenders] == pids
                assert not any(borrowed.lost.is_set() for borrowed in made.borrowed)
        nursery.cancel_scope.cancel()


async def test_an_rpc_server_that_ends_is_a_loss_at_once(engine: Engine, model: Path) -> None:
    async with split(engine, model, 1) as made:
        (borrowed,), (lending,) = made.borrowed, made.lenders
        async with ends.llama_server(engine, model, [borrowed.port]) as (port, process):
            assert lending.processes[0].pid is not None
            os.kill(lending.processes[0].pid, signal.SIGKILL)
            with trio.fail_after(ends.PATIENCE):
                await borrowed.lost.wait()
                assert borrowed.why == "the worker's rpc-server has ended"
                with suppress(OSError):
                    await ends.complete(port)  # what makes llama-server notice: it asks only then
                assert await process.wait() != 0


async def test_a_worker_that_stays_away_is_a_loss_and_its_rpc_server_ends(
    engine: Engine, model: Path
) -> None:
    async with split(engine, model, 1) as made:
        (borrowed,), (lending,) = made.borrowed, made.lenders
        for mesh in made.meshes:
            mesh.resumption.limit = 0.5
        async with ends.llama_server(engine, model, [borrowed.port]):
            made.place.hub.partition({made.host.peer}, {made.workers[0].peer})
            with trio.fail_after(ends.PATIENCE):
                await borrowed.lost.wait()
                assert "was found again within 0.5 s" in borrowed.why
                while lending.processes:  # noqa: ASYNC110 - a process ends
                    await trio.sleep(0.02)


async def test_a_host_that_cannot_be_reached_makes_room_for_the_next_one(engine: Engine, model: Path) -> None:
    async with split(engine, model, 1) as made:
        (worker,), (lending,) = made.workers, made.lenders
        lending._memory = lambda: 1 << 32  # for one session
        (first,) = lending.processes
        made.place.hub.partition({made.host.peer}, {worker.peer, made.other.peer})
        with trio.fail_after(ends.PATIENCE), open_weights((model,)) as weights:
            far = partial(made.other.open_service, worker.peer, SERVICE, lasting=True)
            borrowed = Borrowed(far, ends.request(engine), weights, LearnedHashes(None))
            await borrowed.open()
            (second,) = lending.processes
            assert second.pid != first.pid
            borrowed.close()
