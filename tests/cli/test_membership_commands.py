"""`invite --list`, `invite revoke` and `peers`: what they ask a node, and what they make of its answer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from libmesh_node.datadir import NodeInfo, held_data_dir
from libmesh_node.main import main

from tests.cli.conftest import FakeConsole

INVITES = [
    {"id": "a1" * 16, "scope": "client", "created_unix": 0, "expires_unix": 86400 * 365, "revoked": False},
    {"id": "b2" * 16, "scope": "invite", "created_unix": 0, "expires_unix": None, "revoked": True},
]
PEERS = [
    {"id": "12D3KooWAAAA", "hostname": "attic", "scope": "invite", "state": "alive", "invites": ["b2" * 16]},
    {"id": "12D3KooWBBBB", "hostname": "", "scope": "client", "state": "dead", "invites": ["b2" * 16, "c3" * 16]},
    {"id": "12D3KooWCCCC", "hostname": "root\x1b[2J", "scope": "invite", "state": "alive", "invites": []},
]  # fmt: skip


@pytest.fixture
def data_dir(tmp_path: Path, console: FakeConsole) -> Iterator[str]:
    """The data folder of a node that seems to run here, with `console` as its console."""
    console.answers = {"GET /api/status": (200, {"node_id": "x", "invites": INVITES, "peers": PEERS})}
    with held_data_dir(tmp_path) as folder:
        folder.write_info(
            NodeInfo(pid=os.getpid(), api_port=1, console_port=console.port, version="", started_unix=0)
        )
        yield str(tmp_path)


def test_the_list_tells_scope_end_and_what_was_taken_back(
    data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["invite", "--list", "--data-dir", data_dir]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["a1" * 6, "client"]
    assert "revoked" not in first
    assert second.split()[:2] == ["b2" * 6, "invite"]
    assert "for ever" in second
    assert second.rstrip().endswith("revoked")


def test_the_list_as_json_is_what_the_node_said(data_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["invite", "--list", "--json", "--data-dir", data_dir]) == 0
    assert json.loads(capsys.readouterr().out) == INVITES


def test_an_empty_list_is_told(
    console: FakeConsole, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.answers = {"GET /api/status": (200, {"node_id": "x", "invites": [], "peers": []})}
    assert main(["invite", "--list", "--data-dir", data_dir]) == 0
    assert "no invites" in capsys.readouterr().out
    assert main(["peers", "--data-dir", data_dir]) == 0
    assert "no other peers" in capsys.readouterr().out


def test_what_is_to_be_taken_back_is_told_to_the_node(
    console: FakeConsole, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.answers = {"POST /api/revoke": (200, {"ok": True, "done": "It is revoked."})}
    assert main(["invite", "revoke", "a1a1a1a1", "--data-dir", data_dir]) == 0
    assert console.requests == [("POST /api/revoke", {"name": "a1a1a1a1"})]
    assert capsys.readouterr().out == "It is revoked.\n"


def test_to_take_back_nothing_makes_no_sense(
    console: FakeConsole, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["invite", "revoke", "--data-dir", data_dir]) == 2
    assert "invite --list" in capsys.readouterr().err
    assert console.requests == []


def test_peers_tells_who_let_whom_in(data_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["peers", "--data-dir", data_dir]) == 0
    _, attic, nameless, root = capsys.readouterr().out.splitlines()
    assert "invite b2b2b2b2 of the mesh's key" in attic
    assert "invite c3c3c3c3 of attic" in nameless
    assert "the mesh's key" in root
    assert "\x1b" not in root


def test_peers_as_json_has_the_whole_chain(data_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["peers", "--json", "--data-dir", data_dir]) == 0
    assert [peer["invites"] for peer in json.loads(capsys.readouterr().out)] == [
        peer["invites"] for peer in PEERS
    ]
