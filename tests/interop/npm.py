"""Packages from npm, installed once for each version of a `package.json`, and programs that run on them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest


def installed(package_json: Path) -> Path:
    """A folder whose `node_modules` has what this file names, in the user's cache. Without npm or a registry: skip."""
    text = package_json.read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "libmesh-tests" / f"js-{hashlib.sha256(text).hexdigest()[:16]}"
    if not (folder / "ready").exists():
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_bytes(text)
        command = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            pytest.skip(f"npm could not install the packages: {done.stderr[-300:]}")
        (folder / "ready").touch()
    return folder
