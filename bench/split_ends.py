"""One end of a split, as a process of its own: for `split_decode.py` and `split_load.py`.

    python bench/split_ends.py worker '{"model": PATH, "address": IP, "contacts": [[PEER, MULTIADDR], ...]}'
    python bench/split_ends.py host '{"model": PATH, "address": IP, "workers": [[PEER, MULTIADDR], ...]}'

Both are members of one mesh, whose key is fixed, over the real transport. Each prints one line of JSON: a worker its peer id
and address, a host the local ports for llama-server's `--rpc`. A host answers each line on stdin with a line that counts
the bytes between it and its workers. Both end with their stdin.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import trio
from libmesh_node.llama.engine import find_engine
from libmesh_node.llama.rpc.ahead import Chain
from libmesh_node.llama.rpc.borrower import Borrowed
from libmesh_node.llama.rpc.frames import TOKEN
from libmesh_node.llama.rpc.lender import Lender, LentModel
from libmesh_node.llama.rpc.opening import SessionRequest, read_protocol
from libmesh_node.llama.rpc.weights import LearnedHashes, open_weights
from libmesh_node.models.digest import model_digest
from libmesh_node.placement.seen import SERVICE

from libmesh import Libp2pConfig, Mesh, PeerId, Scope, SecretKey, open_mesh

MESH_SEED = bytes(range(32))


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


async def end_with_stdin(answer: Any = None) -> None:
    lines = trio.lowlevel.FdStream(os.dup(0))
    while await lines.receive_some(4096):
        if answer is not None:
            say(**answer())


async def worker(options: dict[str, Any], mesh: Mesh) -> None:
    model = Path(options["model"])
    engine = find_engine()
    lender = Lender(
        engine.require_rpc_server(),
        memory=lambda: 1 << 40,
        environment=os.environ,
        open_stream=lambda peer: mesh.open_service(PeerId(peer), SERVICE),
    )
    mesh.add_contacts([(PeerId(peer), (address,)) for peer, address in options["contacts"]])
    digest = await model_digest((model,))
    lender.models[digest] = LentModel(name=model.stem, digest=digest, parts=(model,))
    with mesh.offer(SERVICE, lender.serve, scope=Scope.WORKER, lasting=True):
        say(peer=mesh.peer, address=mesh.addresses[0])
        await end_with_stdin()


async def host(options: dict[str, Any], mesh: Mesh) -> None:
    model, workers = Path(options["model"]), options["workers"]
    mesh.add_contacts([(PeerId(peer), (address,)) for peer, address in workers[:1]])  # it knows the others
    async with mesh.watch() as views:
        async for view in views:
            if sum(peer.path is not None for peer in view.peers) >= len(workers):
                break
    digest = await model_digest((model,))
    protocol = read_protocol(find_engine().require_rpc_server().rpc_protocol or "")
    chain = Chain(len(workers)) if len(workers) > 1 else None
    tokens = [os.urandom(TOKEN) for _ in workers]
    borrowed: list[Borrowed] = []
    with ExitStack() as stack:
        weights = stack.enter_context(open_weights((model,)))
        for place, (peer, _) in enumerate(workers):
            last = place + 1 == len(workers)
            asked = SessionRequest(
                digest=digest,
                memory_bytes=1 << 34,
                protocol=protocol,
                model=model.stem,
                token=tokens[place] if place else b"",
                previous=workers[place - 1][0] if place else "",
                next="" if last else workers[place + 1][0],
                next_token=b"" if last else tokens[place + 1],
            )
            opener = partial(mesh.open_service, PeerId(peer), SERVICE, lasting=True)
            borrowed.append(Borrowed(opener, asked, weights, LearnedHashes(None), chain, place))

        def count() -> dict[str, Any]:
            return {
                "crossed": sum(each.sent + each.received for each in borrowed),
                "hits": chain.hits if chain is not None else 0,
                "misses": chain.misses if chain is not None else 0,
            }

        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as opening:
                for each in borrowed:
                    opening.start_soon(each.open)
            for each in borrowed:
                await each.listen(nursery)
            say(ports=[each.port for each in borrowed])
            await end_with_stdin(count)
            nursery.cancel_scope.cancel()


async def main() -> None:
    role, options = sys.argv[1], json.loads(sys.argv[2])
    listen = Libp2pConfig(hosts=(options["address"],))
    async with open_mesh(SecretKey.generate(), mesh_key=SecretKey(MESH_SEED), listen=listen) as mesh:
        await {"worker": worker, "host": host}[role](options, mesh)


if __name__ == "__main__":
    trio.run(main)
