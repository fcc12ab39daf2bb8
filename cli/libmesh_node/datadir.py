"""A node's data folder: what lies in it, who holds it, and how secrets are written.

    identity.key         the node's Ed25519 key; makes its peer id                     0600
    mesh.key             the key of the mesh that this node founded                    0600
    membership           the invite with which this node was let in, if it was         0600
    invite               the invite that this node shows                               0600
    mesh.json            of its mesh: invites made, revocations, peers to come back by 0600
    p2p-port             where it accepted peers last time                             0600
    node.json            pid and ports of the running node; absent while none runs     0600
    node.lock            held (flock) by the running node; its text is that node's pid 0600
    logs/                node.log and one llama-<model>.log per model, rotated by their writers
    models/              .gguf files that `--model NAME` finds by name

The lock is the truth about whether a node runs: the kernel drops it with the process, however that ends. `node.json`
is believed only while the lock is held.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from libmesh_node.errors import DataDirBusy, NodeError

_LOCK_PATIENCE = 0.5
"""Seconds for which a starting node tries again to get the lock: a `status` that looks whether the lock is held holds
it for some microseconds itself."""

_SECRET_LIMIT = 1 << 20
"""Bytes. No secret of ours is near it; a larger file is not one of ours, and is refused."""


def home() -> Path:
    """The user's home folder; `/` where the system knows of none, as for a service's account that is made when it starts."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")


def default_data_dir() -> Path:
    """The user's own data folder for this program: `$XDG_DATA_HOME/libmesh`, or what the platform uses.

    A relative `$XDG_DATA_HOME` is ignored, as the XDG Base Directory Specification demands.
    """
    if sys.platform == "darwin":
        return home() / "Library" / "Application Support" / "libmesh"
    base = Path(os.environ.get("XDG_DATA_HOME", ""))
    return (base if base.is_absolute() else home() / ".local" / "share") / "libmesh"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeInfo:
    """What a running node says of itself in `node.json`. Ports are those in use, never 0."""

    pid: int
    api_port: int
    console_port: int
    version: str
    started_unix: float


@dataclass(frozen=True, slots=True)
class DataDir:
    """The names in a data folder, and reading and writing them. Creates nothing until something is written."""

    path: Path

    @property
    def identity_key(self) -> Path:
        """The node's Ed25519 key."""
        return self.path / "identity.key"

    @property
    def mesh_key(self) -> Path:
        """The key of the mesh that this node founded."""
        return self.path / "mesh.key"

    @property
    def membership(self) -> Path:
        """The invite with which this node was let into the mesh that it is in."""
        return self.path / "membership"

    @property
    def invite(self) -> Path:
        """The invite that this node shows."""
        return self.path / "invite"

    @property
    def kept(self) -> Path:
        """What `kept.py` keeps of the mesh."""
        return self.path / "mesh.json"

    @property
    def node_json(self) -> Path:
        """Pid and ports of the running node."""
        return self.path / "node.json"

    @property
    def node_lock(self) -> Path:
        """Held by the running node."""
        return self.path / "node.lock"

    @property
    def models(self) -> Path:
        """Where `--model NAME` looks."""
        return self.path / "models"

    @property
    def logs(self) -> Path:
        """The folder of all logs."""
        return self.path / "logs"

    @property
    def node_log(self) -> Path:
        """The node's own log."""
        return self.logs / "node.log"

    def llama_log(self, model: str) -> Path:
        """The log of the llama-server for `model`; characters that do not belong in a file name become `_`."""
        return self.logs / f"llama-{re.sub(r'[^A-Za-z0-9._-]', '_', model)[:100]}.log"

    def read_secret(self, file: Path) -> bytes | None:
        """The bytes of one of this folder's secrets, or `None` if it does not exist.

        If others could read it, its mode is set to 0600 first. Raises `NodeError` if it cannot be read or is larger
        than 1 MiB.
        """
        try:
            with file.open("rb") as opened:
                if os.fstat(opened.fileno()).st_mode & 0o077:
                    os.fchmod(opened.fileno(), 0o600)
                data = opened.read(_SECRET_LIMIT + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise NodeError(f"Cannot read {file}: {error.strerror}.") from error
        if len(data) > _SECRET_LIMIT:
            raise NodeError(f"{file} is no file of this program: it is larger than 1 MiB.")
        return data

    def write_secret(self, file: Path, data: bytes) -> None:
        """Replace `file` by `data` at once and for good, mode 0600; a crash leaves the old or the new one whole."""
        try:
            write_private(file, data)
        except OSError as error:
            raise NodeError(f"Cannot write {file}: {error.strerror}.") from error

    def write_info(self, info: NodeInfo) -> None:
        """Tell the other commands where the running node listens. Call with the lock held."""
        self.write_secret(self.node_json, json.dumps(asdict(info)).encode() + b"\n")

    def read_info(self) -> NodeInfo | None:
        """What the node that holds this folder's lock said of itself; `None` if none runs or it has not yet said it."""
        if not self.in_use():
            return None
        try:
            found = json.loads(self.node_json.read_bytes())
            values = {field.name: found[field.name] for field in fields(NodeInfo)}
            ports_and_pid = (values["pid"], values["api_port"], values["console_port"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return NodeInfo(**values) if all(type(value) is int for value in ports_and_pid) else None

    def in_use(self) -> bool:
        """Whether a node holds this folder now."""
        try:
            descriptor = os.open(self.node_lock, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def holder(self) -> int | None:
        """The process id of the node that holds this folder; `None` if none does."""
        if not self.in_use():
            return None
        with suppress(OSError, ValueError):
            return int(self.node_lock.read_text())
        return None


def write_private(file: Path, data: bytes) -> None:
    """Write `data` to `file` atomically and durably, readable by its owner only. Makes the folder, mode 0700.

    Raises `OSError`; then `file` is what it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = file.with_name(f".{file.name}.{secrets.token_hex(6)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def held_data_dir(path: Path) -> Iterator[DataDir]:
    """Make the folder if it is missing, hold its lock while inside, and take `node.json` away at the end.

    A folder that is made gets mode 0700; the mode of one that exists is its owner's business, all that we write into
    it is private by itself. Raises `DataDirBusy` if a node holds it, `NodeError` if it cannot be made or written.
    """
    data_dir = DataDir(path)
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(data_dir.node_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        _lock(descriptor, data_dir)
        try:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            yield data_dir
        finally:
            data_dir.node_json.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _unusable(path: Path, error: OSError) -> NodeError:
    why = "it is a file" if isinstance(error, FileExistsError) else error.strerror
    return NodeError(f"Cannot use the data folder {path}: {why}. Choose another --data-dir.")


def _lock(descriptor: int, data_dir: DataDir) -> None:
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            pid = data_dir.holder()
            raise DataDirBusy(
                f"A node already runs on {data_dir.path}" + (f" (pid {pid})" if pid else "") + ". "
                "Stop it with `libmesh-node stop`, or start this one with another --data-dir.",
                pid=pid,
            ) from None
        else:
            return


@contextmanager
def ephemeral_data_dir() -> Iterator[DataDir]:
    """A fresh folder, held like any other, that is removed at the end with all keys in it."""
    path = Path(tempfile.mkdtemp(prefix="libmesh-"))
    try:
        with held_data_dir(path) as data_dir:
            yield data_dir
    finally:
        shutil.rmtree(path, ignore_errors=True)
