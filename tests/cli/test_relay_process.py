"""`libmesh-node relay` as a process: what it prints, whom it serves, how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from libmesh import Libp2pConfig, PathKind, Scope, open_libp2p_network, open_mesh
from libmesh.net.relay_client import split_relay
from tests.members import key, seed

PATIENCE = 120.0
HOSTS = ("127.0.0.1",)


class RelayProcess:
    def __init__(self, *argv: str, folder: Path) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "libmesh_node",
                "relay",
                "--bind-port",
                "0",
                "--data-dir",
                str(folder),
                *argv,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def address(self) -> str:
        """The first address that it prints with 127.0.0.1 in it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("/ip4/127.0.0.1/"):
                return line.strip()
        raise AssertionError(self.process.stderr and self.process.stderr.read())

    def end(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said


@contextmanager
def relay_process(*argv: str, folder: Path) -> Iterator[RelayProcess]:
    relay = RelayProcess(*argv, folder=folder)
    try:
        yield relay
    finally:
        if relay.process.poll() is None:
            relay.process.kill()
        relay.process.communicate()


async def test_an_open_relay_prints_where_it_is_and_relays_for_whoever_comes(tmp_path: Path) -> None:
    with relay_process("--open", folder=tmp_path) as relay, trio.fail_after(PATIENCE):
        where = await trio.to_thread.run_sync(relay.address)
        listen = Libp2pConfig(hosts=HOSTS)
        async with (
            open_libp2p_network(seed(1), listen) as target,
            open_libp2p_network(seed(2), listen) as source,
        ):
            target.set_relays([where])
            while not target.relaying.circuits():  # noqa: ASYNC110 - told in an event that nobody takes here
                await trio.sleep(0.05)
            path = await source.dial(target.peer, target.relaying.circuits()[0])
            assert path.kind is PathKind.RELAYED
        code, said = await trio.to_thread.run_sync(relay.end)
        assert code == 0
        assert "relaying for everybody" in said
        assert "ending" in said


@pytest.mark.slow
async def test_a_relay_of_a_mesh_is_a_member_keeps_its_identity_and_needs_its_invite_once(
    tmp_path: Path,
) -> None:
    peers: list[str] = []
    async with open_mesh(key(1), mesh_key=key(100), listen=Libp2pConfig(hosts=HOSTS)) as founder:
        token = founder.invite(scope=Scope.CLIENT, not_after_unix=None)
        for argv in (("--join", token), ()):
            with relay_process(*argv, folder=tmp_path) as relay, trio.fail_after(PATIENCE):
                where = await trio.to_thread.run_sync(relay.address)
                peers.append(split_relay(where)[0])
                async with founder.watch() as views:
                    async for view in views:
                        offered = {service.name for entry in view.peers for service in entry.services}
                        if any(entry.path for entry in view.peers) and "libmesh/relay" in offered:
                            break
                assert (await trio.to_thread.run_sync(relay.end))[0] == 0
    assert peers[0] == peers[1]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ((), 2, "for whom to relay"),
        (("--open", "--join", "lm1x"), 2, "exclude each other"),
        (("--join", "lm1nonsense"), 1, "mistyped"),
        (("--open", "--bandwidth", "-1"), 2, "no rate"),
        (("--open", "--max-peers", "0"), 2, "no number"),
    ],
)
def test_what_cannot_work_is_said_in_words(
    argv: tuple[str, ...], code: int, words: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "libmesh_node",
            "relay",
            "--bind-port",
            "0",
            "--data-dir",
            str(tmp_path),
            *argv,
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with relay_process("--open", folder=tmp_path / "one") as relay:
        port = relay.address().split("/")[4]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "libmesh_node", "relay", "--open", "--bind-port", port),
                *("--data-dir", str(tmp_path / "two")),
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 1
        assert f"port {port} is already in use" in done.stderr
