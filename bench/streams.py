"""How fast tunnels and streams are, beside every peer program found on this machine: tables of ratios, and of costs.

    python bench/streams.py [--only tunnels|streams|costs]… [--peer NAME]… [--rounds 3] [--seconds 1.5] [--js DIR]

Three tables; all of them without `--only`. Runs are interleaved, so that what else the machine does falls on all alike;
figures are medians over the rounds, with the lowest and highest, and ×: our figure divided by the peer's.

tunnels: client → near end → far end → target, four processes over loopback. Ours is between two members of a mesh
    (`serve_tunnel`, `expose`), also with what it takes to outlive its connection. Peers: raw TCP, a bare two-hop relay,
    py-libp2p as it comes (Noise, TLS), iroh (where importable), js-libp2p (where DIR has it in `node_modules`), `ssh -L`
    and stunnel (where installed). iroh is the PyPI package, tuned: relays off, pieces of 1 MiB read and written, and one
    method of its generated binding replaced, which copies a buffer byte by byte (6 MiB/s with it; see `tune_iroh`).
streams: one stream alone, without TCP ends, and streams opened one after the other, each with 64 bytes and an answer;
    two processes. Peers: py-libp2p as it comes.
costs: memory and CPU of idle streams and connections, and what a small request waits beside bulk; ours only.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import streams_load  # noqa: E402

Results = dict[str, dict[str, list[float]]]
"""By peer and measure, a figure for each round."""

PYTHON_KINDS = ("stock", "stock-tls", "iroh")


def python_env() -> dict[str, str]:
    """For scripts that are to find what this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}


class Programs:
    """Child processes, ended together."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen] = []

    def start(self, *command: str, line: bool = True, **options) -> str:
        """Start a program and return its first line."""
        output = subprocess.PIPE if line else subprocess.DEVNULL
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL, text=True, **options)
        self._children.append(child)
        if not line:
            return ""
        first = child.stdout.readline().strip()
        if not first:
            raise RuntimeError(f"{' '.join(command)} said nothing")
        return first

    def python(self, script: str, *arguments: str) -> str:
        """Start one of the scripts beside this one."""
        return self.start(sys.executable, str(HERE / script), *arguments, env=python_env())

    def end(self) -> None:
        """Kill all of them."""
        for child in self._children:
            child.kill()
            child.wait()


def tunnel(programs: Programs, kind: str, target: str, js: str | None) -> int:
    """Start both ends of a tunnel; return the port of its near end."""
    if kind == "direct":
        return int(target)
    if kind == "relay":
        return int(
            programs.python(
                "streams_ends.py", kind, "near", programs.python("streams_ends.py", kind, "near", target)
            )
        )
    if kind in ("libmesh", "resumable"):
        more = ["--resumable"] if kind == "resumable" else []
        invite = programs.python("streams_mesh.py", "far", target, *more)
        return int(programs.python("streams_mesh.py", "near", invite))
    if kind in PYTHON_KINDS:
        return int(
            programs.python(
                "streams_ends.py", kind, "near", programs.python("streams_ends.py", kind, "far", target)
            )
        )
    if kind == "js":
        script = str(HERE / "streams_js.mjs")
        own = Path(str(js), "node_modules", ".bin", "node")
        node = str(own) if own.exists() else "node"
        env = {**os.environ, "JS_MODULES": str(js)}
        address = programs.start(node, script, "far", target, env=env)
        return int(programs.start(node, script, "near", address, env=env))
    if kind == "ssh":
        return ssh(programs, target)
    if kind == "stunnel":
        return stunnel(programs, target)
    raise ValueError(kind)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def wait_for(port: int) -> int:
    """The port, once somebody listens on it."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            streams_load.connect(port).close()
            return port
        time.sleep(0.05)
    raise RuntimeError(f"nobody listens on {port}")


def ssh(programs: Programs, target: str) -> int:
    """An sshd of our own, with keys of its own, and a client that forwards."""
    folder = tempfile.mkdtemp()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/{name}"], check=True)
    shutil.copy(f"{folder}/user.pub", f"{folder}/authorized")
    Path("/run/sshd").mkdir(exist_ok=True)
    port, local = free_port(), free_port()
    server = ["-D", "-p", str(port), "-h", f"{folder}/host", "-o", f"AuthorizedKeysFile={folder}/authorized"]
    programs.start(shutil.which("sshd"), *server, "-o", "StrictModes=no", "-o", "PidFile=none", line=False)
    wait_for(port)
    quiet = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-i", f"{folder}/user"]
    forward = ["-N", "-L", f"{local}:127.0.0.1:{target}", "-p", str(port), f"{getpass.getuser()}@127.0.0.1"]
    programs.start("ssh", *quiet, *forward, line=False)
    return wait_for(local)


def stunnel(programs: Programs, target: str) -> int:
    """TLS in C on both sides."""
    folder = Path(tempfile.mkdtemp())
    key, middle, local = str(folder / "key.pem"), free_port(), free_port()
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=bench"]
    subprocess.run([*make, "-keyout", key, "-out", f"{key}.crt"], check=True, capture_output=True)
    for name, client, accept, to in (("far", "no", middle, target), ("near", "yes", local, middle)):
        text = (
            f"foreground=yes\npid=\n[t]\nclient={client}\naccept=127.0.0.1:{accept}\nconnect=127.0.0.1:{to}\n"
        )
        text += "" if client == "yes" else f"cert={key}.crt\nkey={key}\n"
        (folder / name).write_text(text)
        programs.start("stunnel", str(folder / name), line=False)
        wait_for(accept)
    return local


def available(js: str | None) -> Iterator[str]:
    """Names of the peers that can be had here."""
    yield from ("direct", "relay", "libmesh", "resumable", "stock", "stock-tls")
    with contextlib.suppress(ImportError):
        import iroh  # noqa: F401

        yield "iroh"
    if js and Path(js, "node_modules", "libp2p").is_dir():
        yield "js"
    if shutil.which("sshd") and shutil.which("ssh"):
        yield "ssh"
    if shutil.which("stunnel"):
        yield "stunnel"


def show(results: Results, names: list[str]) -> None:
    """Medians, ranges, and the ratio of libmesh to each peer."""
    ours = results.get("libmesh", {})
    print(f"{'':12}" + "".join(f"{name:>34}" for name in names))
    for kind, measures in results.items():
        cells = ""
        for name in names:
            values = measures.get(name)
            if not values:
                cells += f"{'–':>34}"
                continue
            middle = statistics.median(values)
            ratio = statistics.median(ours[name]) / middle if ours.get(name) else float("nan")
            cells += f"{middle:>10,.0f} ({min(values):,.0f}–{max(values):,.0f}) ×{ratio:.2f}".rjust(34)
        print(f"{kind:12}{cells}")


def tunnels(programs: Programs, kinds: list[str], arguments: argparse.Namespace) -> Results:
    """Whole tunnels."""
    target = programs.python("streams_load.py")
    ports: dict[str, int] = {}
    for kind in kinds:
        try:
            ports[kind] = tunnel(programs, kind, target, arguments.js)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as exc:
            print(f"{kind}: left out, {exc}", file=sys.stderr)
    results: Results = {kind: defaultdict(list) for kind in ports}
    for _ in range(arguments.rounds):
        for name, (measure, _) in streams_load.MEASURES.items():
            for kind, port in ports.items():
                try:
                    results[kind][name].append(measure(port, arguments.seconds))
                except (OSError, RuntimeError) as exc:
                    print(f"{kind}, {name}: {exc!r}", file=sys.stderr)
    return results


def streams(programs: Programs, kinds: list[str], arguments: argparse.Namespace) -> Results:
    """Streams alone."""
    fars = {
        kind: programs.python("streams_ends.py", kind, "far", "0")
        for kind in kinds
        if kind in ("libmesh", "stock", "stock-tls")
    }
    results: Results = {kind: defaultdict(list) for kind in fars}
    for _ in range(arguments.rounds):
        for kind, far in fars.items():
            for name, value in json.loads(programs.python("streams_ends.py", kind, "source", far)).items():
                results[kind][name].append(value)
    return results


def costs() -> dict[str, float]:
    """What is there when nothing moves."""
    command = [sys.executable, str(HERE / "streams_costs.py")]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=python_env()).stdout)


TABLES = {"tunnels": tunnels, "streams": streams}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=[*TABLES, "costs"], help="only these tables")
    parser.add_argument("--peer", action="append", help="only these (libmesh is always among them)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="for one measure of a tunnel in one round")
    parser.add_argument("--js", help="a folder in which js-libp2p was installed by npm")
    arguments = parser.parse_args()
    kinds = [
        kind for kind in available(arguments.js) if not arguments.peer or kind in [*arguments.peer, "libmesh"]
    ]
    for table, measure in TABLES.items():
        if arguments.only and table not in arguments.only:
            continue
        programs = Programs()
        try:
            results = measure(programs, kinds, arguments)
        finally:
            programs.end()
        names = list(dict.fromkeys(name for measures in results.values() for name in measures))
        print(f"\n{table}")
        show(results, names)
    if not arguments.only or "costs" in arguments.only:
        print("\ncosts")
        for name, value in costs().items():
            print(f"{value:>10,.1f} {name}")


if __name__ == "__main__":
    main()
