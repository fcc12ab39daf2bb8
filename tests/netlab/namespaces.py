"""Network namespaces of one lab: made, entered, and cleared away, those of labs that died too.

A namespace is called `lmlab.PID.START.NAME` after the process whose lab it belongs to and that process's start time, so
whoever comes later can tell which are orphans. Needs root and iproute2.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_RUN = Path("/run/netns")
_OURS = re.compile(r"lmlab\.(\d+)\.(\d+)\.")


def available() -> str:
    """Empty if labs can be built here, else what is missing, in words."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    for program in ("ip", "nft", "nsenter"):
        if shutil.which(program) is None:
            return f"{program} is missing"
    if not Path("/dev/net/tun").exists():
        return "/dev/net/tun is missing"
    return ""


def run(*argv: str, given: str | None = None) -> str:
    """What a command says on stdout. Raises with what it said on stderr if it fails."""
    done = subprocess.run(argv, input=given, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise OSError(f"{' '.join(argv)}: {done.stderr.strip()}{f' (given {given})' if given else ''}")
    return done.stdout


class Namespace:
    """One network namespace with loopback up. Made by `Family.add`."""

    def __init__(self, name: str) -> None:
        self.name = name
        run("ip", "netns", "add", name)
        self.ip("link set lo up")

    @property
    def file(self) -> str:
        """What `nsenter --net=` takes."""
        return str(_RUN / self.name)

    def ip(self, *lines: str) -> None:
        """Commands of `ip`, without the word itself."""
        run("ip", "-n", self.name, "-batch", "-", given="\n".join(lines))

    def nft(self, rules: str) -> None:
        """Apply nftables rules."""
        run("nsenter", f"--net={self.file}", "nft", "-f", "-", given=rules)

    def sysctl(self, **values: str | int) -> None:
        """Set what is under `/proc/sys/net`; `__` in a name stands for a slash."""
        with self.inside():
            for name, value in values.items():
                Path("/proc/sys/net", *name.split("__")).write_text(str(value))

    def forget_flows(self) -> None:
        """Lose all of connection tracking's state, translations included."""
        subsystem, delete, request_and_ack = 1, 2, 0x0001 | 0x0004
        message = struct.pack("=IHHII", 20, subsystem << 8 | delete, request_and_ack, 1, 0) + bytes(4)
        with self.inside(), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netlink:
            netlink.send(message)
            _, _, _, _, _, error = struct.unpack_from("=IHHIIi", netlink.recv(4096))
            if error:
                raise OSError(-error, os.strerror(-error))

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread is in the namespace for as long as the context lasts; sockets made in it stay in it.

        Not across an await: other tasks of the thread would be in it, too.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        away = os.open(self.file, os.O_RDONLY)
        try:
            if libc.setns(away, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.file}")
            yield
        finally:
            if libc.setns(home, _CLONE_NEWNET):
                os._exit(70)  # nothing that follows would be where it believes to be
            os.close(home)
            os.close(away)

    def command(self, *argv: str) -> list[str]:
        """The command line that runs `argv` in here. It becomes the process; there is none in between."""
        return ["nsenter", f"--net={self.file}", *argv]

    def remove(self) -> None:
        """End every process in it, and delete it."""
        _remove(self.name)


class Family:
    """The namespaces of one lab, and a folder for its files."""

    def __init__(self) -> None:
        pid = os.getpid()
        self._prefix = f"lmlab.{pid}.{_started(pid)}."
        self._count = 0
        self.folder = Path(tempfile.mkdtemp(prefix=self._prefix))
        self.members: list[Namespace] = []

    def add(self, name: str) -> Namespace:
        """A new namespace whose name ends in `name`."""
        while (_RUN / f"{self._prefix}{name}").exists():  # another lab of this process
            self._count += 1
            name = f"{name.partition('~')[0]}~{self._count}"
        self.members.append(Namespace(f"{self._prefix}{name}"))
        return self.members[-1]

    def close(self) -> None:
        """Remove all of them, with what runs in them."""
        _remove_all(member.name for member in self.members)
        self.members.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def clear_orphans() -> None:
    """Remove what labs left whose process has ended without doing so."""
    with suppress(FileNotFoundError):
        _remove_all(name for name in os.listdir(_RUN) if _is_orphan(name))
    for folder in Path(tempfile.gettempdir()).glob("lmlab.*"):
        if _is_orphan(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _is_orphan(name: str) -> bool:
    match = _OURS.match(name)
    return match is not None and _started(int(match[1])) != match[2]


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _remove_all(names: Iterable[str]) -> None:
    for name in names:
        with suppress(OSError):  # another process clears up, too
            _remove(name)


def _remove(name: str) -> None:
    _end(_inhabitants(name))
    run("ip", "netns", "delete", name)


def _inhabitants(name: str) -> list[int]:
    return [int(pid) for pid in run("ip", "netns", "pids", name).split()]


def _end(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while any(_started(pid) and not _is_zombie(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
