"""Generate the protobuf modules from proto/, or check that the ones checked in are up to date.

    python tools/generate_protobuf.py           writes libmesh/_pb and cli/libmesh_node/_pb
    python tools/generate_protobuf.py --check   exits 1 and names the stale files instead
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {
    "libmesh/v1/mesh.proto": ROOT / "libmesh/_pb",
    "libmesh_node/v1/node.proto": ROOT / "cli/libmesh_node/_pb",
}
INIT = '"""Generated from proto/ by `make proto`; do not edit."""\n'


def generate(source: str, folder: Path) -> dict[str, str]:
    """The generated files for `source`: name → content."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["protoc", f"-I{ROOT / 'proto'}", f"--python_out={scratch}", f"--mypy_out={scratch}", source]
        if protoc.main(arguments) != 0:
            raise SystemExit(f"protoc failed on {source}")
        made = (Path(scratch) / source).parent
        return {"__init__.py": INIT} | {path.name: path.read_text() for path in sorted(made.iterdir())}


def main() -> int:
    """Write or check; the exit code."""
    check = "--check" in sys.argv[1:]
    stale = []
    for source, folder in TARGETS.items():
        for name, content in generate(source, folder).items():
            target = folder / name
            if target.exists() and target.read_text() == content:
                continue
            stale.append(str(target.relative_to(ROOT)))
            if not check:
                folder.mkdir(parents=True, exist_ok=True)
                target.write_text(content)
    if check and stale:
        sys.stderr.write(f"stale: {', '.join(stale)}; run `make proto` and commit the result\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
