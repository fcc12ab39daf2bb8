"""Tokens per second of a split model: through the mesh against llama.cpp's own `--rpc` over bare TCP, side by side.

    python bench/split_decode.py                             0, 5 and 20 ms one way; 1, 2 and 3 workers
    python bench/split_decode.py --model medium --delays 20 --workers 2

Every machine is a network namespace, joined by cables that delay (tests/netlab), so it needs root on Linux. The worker's
programs, the model, llama-server's flags and the machine's load are the same for both: both run all the time, and are asked
in turn. Speeds are llama-server's own `timings`. `load` is the time until llama-server is healthy. The ratio is the mesh's
speed to bare TCP's, the median of the rounds' own ratios, more is better; for loading, bare TCP's time to the mesh's.

With no delay the model is one of 500 MB: what the mesh costs is time of a processor, whose share of a token depends on what
else a token takes. With delays it is one of 40 MB, as what is compared there is how often a token waits for the network.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libmesh_node.llama.engine import find_engine
from libmesh_node.models.demo import MEDIUM, SMALL, write_model

from tests.netlab.lab import Host, Kind, Lab, open_lab

ENDS = Path(__file__).with_name("split_ends.py")
PORT = 40404
ASK = """
import json, sys, urllib.request
body = json.dumps({"prompt": "Once upon a time", "n_predict": int(sys.argv[2]), "temperature": 0, "cache_prompt": False})
asked = urllib.request.Request(sys.argv[1] + "/completion", body.encode(), {"Content-Type": "application/json"})
print(urllib.request.urlopen(asked, timeout=600).read().decode())
"""
HEALTHY = """
import sys, time, urllib.request
while True:
    try:
        urllib.request.urlopen(sys.argv[1] + "/health", timeout=5)
        break
    except OSError:
        time.sleep(0.01)
"""


@contextmanager
def running(host: Host, *argv: str, **how: Any) -> Iterator[subprocess.Popen[Any]]:
    process = host.popen(*argv, stdin=subprocess.PIPE, **how)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def first_line(process: subprocess.Popen[Any]) -> dict[str, Any]:
    assert process.stdout is not None
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


@contextmanager
def bare(host: Host, workers: Sequence[Host], model: Path) -> Iterator[list[str]]:
    """rpc-servers that listen for everybody."""
    server = str(find_engine().require_rpc_server().path)
    processes = [
        worker.popen(
            server,
            "-H",
            worker.address,
            "-p",
            str(PORT),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for worker in workers
    ]
    try:
        time.sleep(0.5)
        yield [f"{worker.address}:{PORT}" for worker in workers]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def meshed(host: Host, workers: Sequence[Host], model: Path) -> Iterator[list[str]]:
    """Members of a mesh."""
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}

    def argv(role: str, at: Host, **options: Any) -> list[str]:
        told = json.dumps({"model": str(model), "address": at.address, **options})
        return [sys.executable, str(ENDS), role, told]

    lent: list[subprocess.Popen[Any]] = []
    told: list[list[str]] = []
    try:
        for worker in workers:
            options = argv("worker", worker, contacts=told[:1])
            lent.append(worker.popen(*options, stdin=subprocess.PIPE, **quiet))
            known = first_line(lent[-1])
            told.append([known["peer"], known["address"]])
        with running(host, *argv("host", host, workers=told), **quiet) as end:
            yield [f"127.0.0.1:{port}" for port in first_line(end)["ports"]]
    finally:
        for process in lent:
            process.kill()
            process.wait()


def llama_server_argv(endpoints: Sequence[str], model: Path, port: int = PORT + 1) -> list[str]:
    argv = [str(find_engine().require_llama_server().path), "--rpc", ",".join(endpoints), "-m", str(model)]
    argv += ["--host", "127.0.0.1", "--port", str(port), "-ngl", "99", "-c", "1024", "-np", "1"]
    return [*argv, "-fit", "off", "-cram", "0", "-ts", ",".join("1" * len(endpoints))]


@dataclass
class Server:
    """A llama-server on the host's machine, and what was measured of it: seconds to load, and tokens per second."""

    host: Host
    url: str
    load: float
    speeds: list[float] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)

    def ask(self, tokens: int, *, counted: bool = True) -> None:
        """Have it generate; `counted`: what it takes and says counts."""
        answer = json.loads(self.host.run(sys.executable, "-c", ASK, self.url, str(tokens), limit=600).stdout)
        if counted:
            self.speeds.append(float(answer["timings"]["predicted_per_second"]))
            self.texts.add(str(answer["content"]))

    @property
    def speed(self) -> float:
        """The median."""
        return statistics.median(self.speeds)


@contextmanager
def serving(host: Host, endpoints: Sequence[str], model: Path, port: int) -> Iterator[Server]:
    url = f"http://127.0.0.1:{port}"
    argv = llama_server_argv(endpoints, model, port)
    started = time.monotonic()
    with running(host, *argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        host.run(sys.executable, "-c", HEALTHY, url, limit=600)
        yield Server(host, url, time.monotonic() - started)


def compare(lab: Lab, model: Path, delay: float, count: int, rounds: int, tokens: int) -> str:
    """A row of the table."""
    sites = [lab.site(Kind.PUBLIC, delay=delay / 2) for _ in range(count + 1)]
    host, *workers = (site.host for site in sites)
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for at, (name, way) in enumerate((("bare", bare), ("mesh", meshed))):
            endpoints = stack.enter_context(way(host, workers, model))
            servers[name] = stack.enter_context(serving(host, endpoints, model, PORT + 1 + at))
        for server in servers.values():
            server.ask(8, counted=False)
        for _ in range(rounds):
            for server in servers.values():
                server.ask(tokens)
    ours, stock = servers["mesh"], servers["bare"]
    ratio = statistics.median(mesh / bare for mesh, bare in zip(ours.speeds, stock.speeds, strict=True))
    return (
        f"{delay * 1000:8.0f} {count:8} {ours.speed:10.2f} {stock.speed:10.2f} {ratio:7.2f}"
        f" {ours.load:10.2f} {stock.load:10.2f} {stock.load / ours.load:7.2f}"
        f"   {'same text' if len(ours.texts | stock.texts) == 1 else 'TEXTS DIFFER'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("small", "medium"), help="of 40 or 500 MB, for all rows")
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 5, 20], help="milliseconds one way")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and so the lab is taken down
    with tempfile.TemporaryDirectory() as folder:
        models = {"small": Path(folder) / "small.gguf", "medium": Path(folder) / "medium.gguf"}
        sizes = {chosen.model or ("small" if delay else "medium") for delay in chosen.delays}
        for size in sizes:
            write_model(models[size], {"small": SMALL, "medium": MEDIUM}[size], 7)
        print(f"{'':17}{'decode, tokens per second':^29}{'load, seconds':^29}")
        heads = ("ms", "workers", "mesh", "bare TCP", "ratio", "mesh", "bare TCP", "ratio")
        print(
            "".join(
                f"{head:>{width + 1}}"
                for head, width in zip(heads, (7, 8, 10, 10, 7, 10, 10, 7), strict=True)
            )
        )
        for delay in chosen.delays:
            for count in chosen.workers:
                size = chosen.model or ("small" if delay else "medium")
                with open_lab() as lab:
                    row = compare(lab, models[size], delay / 1000, count, chosen.rounds, chosen.tokens)
                print(f"{row}, {size} model", flush=True)


if __name__ == "__main__":
    main()
