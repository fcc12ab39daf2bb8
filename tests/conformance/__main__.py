"""`python -m tests.conformance [ours] [js]`: the tables of the conformance suite, of our own peer and of the js peer.

Each peer is a process of its own, and the suite is run as anybody would run it: `libmesh conformance ADDRESS --invite
TOKEN`. The exit code is that of the last one that failed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from libmesh.testing.command import main as libmesh
from tests.interop.npm import installed

ROOT = Path(__file__).resolve().parents[2]
JS_PEER = Path("examples") / "js-peer"


@contextmanager
def _process(*command: str) -> Iterator[Callable[[str], str]]:
    """Run it until the context ends; what is returned gives its next line that begins so."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    ) as process:

        def line(begins: str) -> str:
            assert process.stdout is not None
            for said in process.stdout:
                if said.startswith(begins):
                    return said.strip()
            raise SystemExit(f"{command} ended")

        try:
            yield line
        finally:
            process.kill()


def _ours(stack: ExitStack) -> tuple[str, str]:
    line = stack.enter_context(_process(sys.executable, "-m", "tests.conformance.peer"))
    return line("/"), line("lm")


def _js(stack: ExitStack) -> tuple[str, str]:
    """A member that our own peer let in, from a copy that has its packages and the .proto files where it looks."""
    _, token = _ours(stack)
    packages = installed(ROOT / JS_PEER / "package.json") / "node_modules"
    copy = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    shutil.copytree(ROOT / JS_PEER, copy / JS_PEER, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copytree(ROOT / "proto", copy / "proto")
    (copy / JS_PEER / "node_modules").symlink_to(packages)
    program = [str(packages / ".bin" / "node"), str(copy / JS_PEER / "main.js")]
    line = stack.enter_context(_process(*program, token, "--expose-to-workers", "for workers=127.0.0.1:9"))
    return line("you are").split()[-1], token


PEERS = {"ours": _ours, "js": _js}


def main() -> int:
    """Print them."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("peers", nargs="*", choices=[[], *PEERS], help="ours, js (both if left out)")
    worst = 0
    for name in parser.parse_args().peers or PEERS:
        with ExitStack() as stack:
            address, token = PEERS[name](stack)
            sys.stdout.write(f"\n{name}\n")
            sys.stdout.flush()
            worst = libmesh(["conformance", address, "--invite", token]) or worst
    return worst


if __name__ == "__main__":
    sys.exit(main())
