"""The js peer of the examples, ready to run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.interop.npm import installed

ROOT = Path(__file__).resolve().parents[2]
JS_PEER = Path("examples") / "js-peer"


@pytest.fixture(scope="session")
def js_peer_command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What runs `main.js`, from a copy that has its packages and the .proto files where it looks for them."""
    packages = installed(ROOT / JS_PEER / "package.json")
    copy = tmp_path_factory.mktemp("js-peer")
    shutil.copytree(ROOT / JS_PEER, copy / JS_PEER, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copytree(ROOT / "proto", copy / "proto")
    (copy / JS_PEER / "node_modules").symlink_to(packages / "node_modules")
    return [str(packages / "node_modules" / ".bin" / "node"), str(copy / JS_PEER / "main.js")]
