"""Both ends around the real llama-server and rpc-server."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from libmesh_node.llama.engine import Engine
from libmesh_node.llama.rpc.ahead import Chain
from libmesh_node.llama.rpc.borrower import SessionRefused, borrow
from libmesh_node.llama.rpc.weights import LearnedHashes, open_weights
from libmesh_node.models.demo import SMALL, write_model

from tests.llama.rpc import ends

pytestmark = pytest.mark.llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    write_model(path, SMALL, 7)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("count", "cache"), [(1, "f16"), (2, "f16"), (2, "q4_0")])
async def test_a_split_answers_as_one_machine_does(
    engine: Engine, model: Path, count: int, cache: str
) -> None:
    flags = ("-ctk", cache, "-ctv", cache)
    async with ends.llama_server(engine, model, (), *flags) as (port, _):
        alone = await ends.complete(port)
    hashes = LearnedHashes(None)
    with open_weights((model,)) as weights:
        for _ in range(2):  # the second time, hashes are known
            async with ends.workers(engine, model, weights, hashes, count) as borrowed:
                ports = [worker.port for worker in borrowed]
                async with ends.llama_server(engine, model, ports, *flags) as (port, _):
                    loading = sum(worker.sent for worker in borrowed)
                    assert await ends.complete(port) == alone
            assert not any(worker.lost.is_set() for worker in borrowed)
            assert (
                sum(worker.spared for worker in borrowed) > 37_000_000
            )  # all but the embeddings, which stay at home
            assert loading < 500_000  # graphs and inputs, whatever the size of the weights


@pytest.mark.slow
async def test_results_go_straight_to_the_next_worker(engine: Engine, model: Path) -> None:
    count = 3
    async with ends.llama_server(engine, model) as (port, _):
        alone = await ends.complete(port, tokens=100)
    chain = Chain(count)
    with open_weights((model,)) as weights:
        async with ends.workers(engine, model, weights, LearnedHashes(None), count, chain=chain) as borrowed:
            ports = [worker.port for worker in borrowed]
            async with ends.llama_server(engine, model, ports) as (port, _):
                assert await ends.complete(port, tokens=100) == alone
    assert chain.hits > 0.85 * 100 * (count - 1), (chain.hits, chain.misses)
    assert chain.misses <= 2 * count


async def test_another_file_is_refused_before_anything_is_loaded(engine: Engine, model: Path) -> None:
    with open_weights((model,)) as weights:
        async with ends.lent(ends.lender(engine, model)) as port:

            async def open_stream() -> ends.SocketStream:
                return ends.SocketStream(await trio.open_tcp_stream("127.0.0.1", port))

            other = ends.request(engine, digest="cd" * 32)
            with pytest.raises(SessionRefused, match="not the same model"):
                async with borrow(open_stream, other, weights, LearnedHashes(None)):
                    pass
