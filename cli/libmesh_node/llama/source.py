"""Fetches llama.cpp's source: the copy that the llama-cpp-python source distribution on PyPI carries.

pip does the fetching, so that every mirror, proxy and certificate that a person has set up for pip works here too. pip
has no "download only": for a source distribution it calls the package's build backend for metadata, which would install
that backend and run it. `backend/` is a stand-in for it (PEP 517 names it by import path, and `--no-build-isolation`
imports it from PYTHONPATH), so nothing of what was fetched is run before its hash has been checked, and nothing else is
installed.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any

import trio

from libmesh_node.llama.engine import SOURCE_VERSION, EngineError

SOURCE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

ARCHIVE_NAME = f"llama_cpp_python-{SOURCE_VERSION}.tar.gz"
_PREFIX = f"llama_cpp_python-{SOURCE_VERSION}/vendor/llama.cpp/"

_BACKEND = f'''"""Tells pip the name and version of the package, and builds nothing."""
import os

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = "llama_cpp_python-{SOURCE_VERSION}.dist-info"
    os.makedirs(os.path.join(metadata_directory, folder))
    with open(os.path.join(metadata_directory, folder, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: {SOURCE_VERSION}\\n")
    return folder
'''


def prepare_download(folder: Path) -> list[str]:
    """Write what `pip download` needs into `folder`. Returns pip's arguments, to be run there.

    PYTHONPATH must then be `folder / "backend"`. The archive arrives as `folder / ARCHIVE_NAME`.
    """
    package = folder / "backend" / "scikit_build_core"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / "build.py").write_text(_BACKEND)
    requirement = f"llama-cpp-python=={SOURCE_VERSION} --hash=sha256:{SOURCE_SHA256}\n"
    (folder / "requirements.txt").write_text(requirement)
    options = [
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
        "--require-hashes",
        "--no-cache-dir",
    ]
    return ["download", *options, "--progress-bar", "off", "--dest", ".", "-r", "requirements.txt"]


def is_genuine(archive: Path) -> bool:
    """Whether the file is there and has the pinned SHA-256."""
    try:
        with archive.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == SOURCE_SHA256
    except FileNotFoundError:
        return False


def unpack(archive: Path, destination: Path) -> None:
    """Unpack llama.cpp, and nothing else, so that `destination` appears complete or not at all.

    Runs in a worker thread of trio; cancelling is noticed from file to file, and the next call starts over. Raises
    `EngineError` if the archive is damaged, or reaches outside, or the disk is full.
    """
    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _extract(archive, partial)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as exc:
        raise EngineError(f"{archive} cannot be unpacked: {exc}.") from exc
    if not (partial / "CMakeLists.txt").is_file():
        raise EngineError(f"{archive} holds no llama.cpp.")
    partial.rename(destination)


def _extract(archive: Path, destination: Path) -> None:
    # Python before 3.11.4 has no filters; the check of the name is the part of them that matters for a pinned archive.
    checked: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archive) as tar:
        for member in tar:
            trio.from_thread.check_cancelled()
            if not member.name.startswith(_PREFIX):
                continue
            member.name = member.name.removeprefix(_PREFIX)
            if member.name.startswith("/") or ".." in member.name.split("/"):
                raise tarfile.ExtractError(f"{member.name} is outside the destination")
            tar.extract(member, destination, **checked)
