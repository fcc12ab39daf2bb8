"""What it is worth that a conversation goes back to where its beginning is in memory, over four servers.

    python bench/affinity.py              24 conversations of 6 turns, four at a time, over four llama-servers

The peer program is nginx, which gives each request to the next server in turn. Both have the same servers, restarted
between the two, and the same conversations. A turn counts as warm if its server had at least nine tenths of the turn
before, prompt and answer, in its cache (`cached_tokens`, as llama-server tells); first turns do not count.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from libmesh_node.models.demo import SMALL, write_model
from proxy_ends import Client, llama_server, nginx, only_proxy, usage

SERVERS = 4
LANES = 4


def main() -> None:
    """Ask both, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=24, help="in all (default 24)")
    parser.add_argument("--turns", type=int, default=6, help="of each (default 6)")
    options = parser.parse_args()
    results: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory(prefix="libmesh-bench-") as folder:
        model = Path(folder) / "small.gguf"
        write_model(model, SMALL, 2)
        for way in ("mesh", "nginx"):
            with ExitStack() as stack:
                servers = [stack.enter_context(llama_server(model))[0] for _ in range(SERVERS)]
                front = only_proxy(model, servers) if way == "mesh" else nginx(servers)
                if (url := stack.enter_context(front)) is None:
                    continue
                results[way] = asyncio.run(measure(url, options.conversations, options.turns))
            warm, first = results[way]
            print(
                f"{way:5} {warm:.1%} of turns warm; time to first token of later turns p50 {first * 1000:.1f} ms"
            )
    if len(results) == 2:
        ratio = results["nginx"][1] / results["mesh"][1]
        print(f"time to first token, nginx / mesh: {ratio:.2f}")


async def measure(url: str, conversations: int, turns: int) -> tuple[float, float]:
    """The share of later turns that were warm, and their median seconds to the first token."""
    warm: list[bool] = []
    first: list[float] = []
    left = iter(range(conversations))
    async with Client.open(url) as client:

        async def lane() -> None:
            for number in left:
                await converse(client, random.Random(number), turns, warm, first)

        async with asyncio.TaskGroup() as group:
            for _ in range(LANES):
                group.create_task(lane())
    return sum(warm) / len(warm), statistics.median(first)


async def converse(
    client: Client, rng: random.Random, turns: int, warm: list[bool], first: list[float]
) -> None:
    """One conversation; what is learned of its later turns goes to `warm` and `first`."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": words(rng, 60)}]
    before = 0
    for turn in range(turns):
        messages.append({"role": "user", "content": words(rng, 40)})
        request = {"model": "small", "messages": messages, "max_tokens": 24, "temperature": 0}
        answer = await client.ask(request | {"stream_options": {"include_usage": True}})
        told = usage(answer)
        if turn:
            cached = (told.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            warm.append(cached >= 0.9 * before)
            first.append(answer.first)
        before = told["prompt_tokens"] + told["completion_tokens"]
        messages.append({"role": "assistant", "content": answer.text})


def words(rng: random.Random, count: int) -> str:
    """Text that no other conversation has."""
    return " ".join("".join(rng.choices("aeioklmnrstv", k=5)) for _ in range(count))


if __name__ == "__main__":
    main()
