"""Bytes that cross between host and workers while a split model loads: stock RPC over TCP against the mesh.

    python bench/split_load.py                 1 and 2 workers, the model of 500 MB; first load, and one more

Counted on the host's network device, so all headers and encryption are in it, in both directions; from the start of
llama-server to its first `/health`. With the mesh also what opening the sessions took. Needs root on Linux.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from libmesh_node.models.demo import MEDIUM, SMALL, write_model

from bench.split_decode import HEALTHY, PORT, bare, llama_server_argv, meshed, running
from tests.netlab.lab import Host, Kind, open_lab


def crossed(host: Host) -> int:
    """Bytes that its device has sent and received."""
    (device,) = json.loads(host.run("ip", "-s", "-j", "link", "show", host.device).stdout)
    return int(device["stats64"]["rx"]["bytes"]) + int(device["stats64"]["tx"]["bytes"])


def load(host: Host, endpoints: list[str], model: Path) -> tuple[int, float]:
    """Bytes and seconds."""
    before, started = crossed(host), time.monotonic()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with running(host, *llama_server_argv(endpoints, model), **quiet):
        host.run(sys.executable, "-c", HEALTHY, f"http://127.0.0.1:{PORT + 1}", limit=600)
        return crossed(host) - before, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="the model of 40 MB")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and so the lab is taken down
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.gguf"
        write_model(model, SMALL if chosen.small else MEDIUM, 7)
        size = model.stat().st_size
        for count in chosen.workers:
            with open_lab() as lab:
                host, *workers = (lab.site(Kind.PUBLIC).host for _ in range(count + 1))
                with bare(host, workers, model) as endpoints:
                    stock, stock_seconds = load(host, endpoints, model)
                before = crossed(host)
                with meshed(host, workers, model) as endpoints:
                    opening = crossed(host) - before
                    results = [load(host, endpoints, model) for _ in range(2)]
            for name, (ours, seconds) in zip(("first", "again"), results, strict=True):
                print(
                    f"{count} worker{'s' * (count > 1)}, {name}: {ours:>9} bytes = {ours / size:.4%} of the model in "
                    f"{seconds:.1f} s (opening: {opening}), stock {stock} = {stock / size:.1%} in {stock_seconds:.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
