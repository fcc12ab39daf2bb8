"""Generates the protobuf code that is checked in, or with `--check` tells whether it is stale.

proto/<package>/v1/*.proto becomes <package's folder>/_pb/*_pb2.py and .pyi. protoc derives the place of a generated
module from the place of its file; ours go into `_pb` instead, so imports between them are rewritten.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"libmesh": ROOT / "libmesh" / "_pb", "libmesh_node": ROOT / "cli" / "libmesh_node" / "_pb"}
INIT = '"""Generated from proto/ by `make proto`; do not edit."""\n'


def generated(package: str) -> dict[str, str]:
    """The files that belong into the package's `_pb`, by name."""
    sources = sorted((ROOT / "proto" / package).rglob("*.proto"))
    plugin = Path(sysconfig.get_path("scripts")) / "protoc-gen-mypy"
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "grpc_tools.protoc", f"--plugin=protoc-gen-mypy={plugin}"]
        command += [
            f"-I{ROOT / 'proto'}",
            f"--python_out={out}",
            f"--mypy_out=quiet:{out}",
            *map(str, sources),
        ]
        subprocess.run(command, check=True)
        files = {path.name: path.read_text() for path in Path(out).rglob("*_pb2.py*")}
    for name, text in files.items():
        for other in PACKAGES:
            text = text.replace(f"from {other}.v1 import ", f"from {other}._pb import ")
            text = text.replace(f"import {other}.v1.", f"import {other}._pb.")
        files[name] = text
    return {"__init__.py": INIT, **files} if files else {}


def main() -> int:
    """Write the files; with `--check` only compare, and return 1 if one differs, is missing or is left over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if something would change")
    check = parser.parse_args().check
    stale: list[Path] = []
    for package, folder in PACKAGES.items():
        wanted = generated(package)
        found = {path.name: path.read_text() for path in folder.glob("*.py*")} if folder.is_dir() else {}
        stale += [folder / name for name in sorted(wanted | found) if wanted.get(name) != found.get(name)]
        if not check:
            folder.mkdir(exist_ok=True)
            for name in found.keys() - wanted.keys():
                (folder / name).unlink()
            for name, text in wanted.items():
                (folder / name).write_text(text)
    for path in stale:
        sys.stdout.write(f"{'stale' if check else 'wrote'}: {path.relative_to(ROOT)}\n")
    if check and stale:
        sys.stdout.write("Run `make proto` and commit what it changes.\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
