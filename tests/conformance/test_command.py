"""`libmesh conformance`, as a person or a build runs it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
import trio

from libmesh import Scope
from libmesh.testing.command import main
from libmesh.testing.conformance import RULES
from tests.conformance.mutants import MUTANTS, Patch
from tests.conformance.peer import open_peer

Run = subprocess.CompletedProcess[str]


def conformance(*arguments: str) -> Run:
    command = [sys.executable, "-m", "libmesh.testing.conformance", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_table_tells_each_rule_its_place_and_its_result(conformance_peer: tuple[str, str]) -> None:
    address, token = conformance_peer
    done = conformance(address, "--invite", token, "--only", "probe", "--only", "tunnel.scope")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split(maxsplit=2)[:2] == ["result", "rule"]
    for name in ("probe.answered", "probe.silent_target", "tunnel.scope"):
        (line,) = [line for line in lines if f" {name} " in line]
        assert line.startswith("passed")
        assert RULES[name].place in line
        assert RULES[name].text[:40] in line
    assert lines[-1].startswith("5 passed, 0 failed, 0 not applicable")


async def test_a_broken_peer_ends_it_with_1_and_the_reason(monkeypatch: Patch) -> None:
    MUTANTS["denies_that_it_is_there"].make(monkeypatch)
    async with open_peer() as (_, address, token):
        asked = (address, "--invite", token, "--only", "probe.answered", "--json")
        done = await trio.to_thread.run_sync(conformance, *asked)
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert (told["passed"], told["failed"], told["not_applicable"]) == (0, 1, 0)
    assert told["rules"][0]["detail"] == "its answer is no"
    assert told["rules"][0]["text"] == RULES["probe.answered"].text


async def test_what_the_invite_does_not_allow_is_not_applicable() -> None:
    async with open_peer() as (mesh, address, _):
        token = mesh.invite(scope=Scope.CLIENT, not_after_unix=None)
        asked = (address, "--invite", token, "--only", "hello.eight")
        done = await trio.to_thread.run_sync(conformance, *asked)
    assert done.returncode == 0
    assert "n/a     hello.eight_links" in done.stdout
    assert "→ the invite's scope is not 'invite'" in done.stdout


def test_it_ends_with_2_where_nobody_listens(conformance_peer: tuple[str, str]) -> None:
    address, token = conformance_peer
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}/p2p/{address.rpartition('/')[2]}"
        done = conformance(nobody, "--invite", token)
    assert done.returncode == 2
    assert "cannot reach the peer" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("multiaddr", "token", "more", "says"),
    [
        ("/ip4/127.0.0.1/tcp/1", None, (), "/p2p/"),
        ("nonsense/p2p/12D3KooW", None, (), "no multiaddr"),
        ("/ip4/127.0.0.1/tcp/1/p2p/QmNoEd25519", None, (), "peer id"),
        (None, "lm1AAAA", (), "mistyped"),
        (None, None, ("--only", "nothing"), "no rule"),
    ],
)
def test_it_ends_with_2_when_called_wrongly(
    conformance_peer: tuple[str, str],
    multiaddr: str | None,
    token: str | None,
    more: tuple[str, ...],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address, invite = conformance_peer
    assert main(["conformance", multiaddr or address, "--invite", token or invite, *more]) == 2
    assert says in capsys.readouterr().err
