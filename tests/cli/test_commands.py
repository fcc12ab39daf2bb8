from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from libmesh_node.commands import stop as stop_module
from libmesh_node.datadir import DataDir, NodeInfo, held_data_dir
from libmesh_node.main import main
from libmesh_node.membership import Membership, save_membership

from libmesh import Scope
from libmesh.core.credentials import Invite
from libmesh.tokens import encode_invite
from tests.cli.conftest import FakeConsole
from tests.members import MESH

PEER = "12D3KooWGkY5hM1tWc9oPqRsTuVwXyZ1234567890abcdEfGhIjK"
OTHER = "12D3KooWAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
STATUS = {
    "node_id": PEER,
    "mesh_id": "ab" * 16,
    "node_status": "Idle",
    "peers": [{"id": PEER, "hostname": "attic"}, {"id": OTHER, "hostname": "twin"}, {"id": "B" + OTHER, "hostname": "twin"}],
}  # fmt: skip


@pytest.fixture
def data_dir(tmp_path: Path, console: FakeConsole) -> Iterator[str]:
    """The data folder of a node that seems to run here, with `console` as its console."""
    with held_data_dir(tmp_path) as folder:
        folder.write_info(
            NodeInfo(pid=os.getpid(), api_port=1, console_port=console.port, version="", started_unix=0)
        )
        yield str(tmp_path)


def test_invite_prints_the_token_alone_on_stdout(
    console: FakeConsole, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.answers = {
        "POST /api/invite": (200, {"ok": True, "token": "TOK", "scope": "client", "expires_unix": 0})
    }
    assert main(["invite", "--scope", "client", "--ttl", "12h", "--data-dir", data_dir]) == 0
    assert console.requests == [("POST /api/invite", {"scope": "client", "ttl_s": 43200.0})]
    printed = capsys.readouterr()
    assert printed.out == "TOK\n"
    assert "libmesh-node --client --join TOKEN" in printed.err
    assert "until 1970-01-0" in printed.err


def test_invite_as_json_is_json_and_nothing_else(
    console: FakeConsole, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.answers = {
        "POST /api/invite": (200, {"ok": True, "token": "TOK", "scope": "worker", "expires_unix": 9})
    }
    assert main(["--data-dir", data_dir, "invite", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"token": "TOK", "scope": "worker", "expires_unix": 9}
    assert printed.err == ""


def test_a_refusal_is_one_line_and_exit_1(
    console: FakeConsole, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.answers = {
        "POST /api/invite": (403, {"ok": False, "error": "This node may not invite.", "code": "denied"})
    }
    assert main(["invite", "--data-dir", data_dir]) == 1
    assert capsys.readouterr().err == "libmesh-node: This node may not invite.\n"


def test_a_command_without_a_node_says_where_it_looked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["status"], ["invite"], ["stop"], ["tunnel", "list"]):
        assert main([*command, "--data-dir", str(tmp_path)]) == 1
        assert f"No node runs on the data folder {tmp_path}" in capsys.readouterr().err


def test_status_as_json_is_what_the_node_said(
    console: FakeConsole, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.answers = {"GET /api/status": (200, STATUS)}
    assert main(["status", "--json", "--data-dir", data_dir]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS
    assert main(["status", "--json", "--console", str(console.port)]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_status_into_a_pipe_is_plain_and_unbroken(
    console: FakeConsole, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.answers = {"GET /api/status": (200, STATUS)}
    assert main(["status", "--data-dir", data_dir]) == 0
    printed = capsys.readouterr().out
    assert f"node   {PEER}" in printed
    assert "attic" in printed
    assert "\x1b" not in printed
    assert not [line for line in printed.splitlines() if line != line.rstrip()]


def test_watch_as_json_is_a_line_for_each_change_and_ends_with_the_node(
    console: FakeConsole, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.events = [{"n": 1}, {"n": 2}]
    assert main(["status", "--watch", "--json", "--data-dir", data_dir]) == 1
    printed = capsys.readouterr()
    assert [json.loads(line) for line in printed.out.splitlines()] == [{"n": 1}, {"n": 2}]
    assert printed.err == "The node has ended.\n"


def test_watch_into_a_pipe_shows_each_change(
    console: FakeConsole, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.events = [STATUS, STATUS | {"node_status": "Serving"}]
    assert main(["status", "--watch", "--data-dir", data_dir]) == 1
    printed = capsys.readouterr().out
    assert printed.index("Idle") < printed.index("Serving")


def test_tunnel_expose_tells_the_node_and_the_next_command(
    console: FakeConsole, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.answers = {"POST /api/tunnels": (200, {"ok": True, "port": 0}), "GET /api/status": (200, STATUS)}
    argv = ["tunnel", "expose", "db", "localhost:5432", "--scope", "worker", "--data-dir", data_dir]
    assert main(argv) == 0
    expected = {"direction": "expose", "name": "db", "target": "localhost:5432", "scope": "worker"}
    assert console.requests[0] == ("POST /api/tunnels", expected)
    assert f"tunnel connect …{PEER[-8:]} db" in capsys.readouterr().err


@pytest.mark.parametrize("named", [PEER, f"…{PEER[-8:]}", PEER[-8:], "ATTIC"])
def test_tunnel_connect_takes_any_name_of_the_peer(
    console: FakeConsole, data_dir: str, capsys: pytest.CaptureFixture[str], named: str
) -> None:
    console.answers = {
        "POST /api/tunnels": (200, {"ok": True, "port": 40001}),
        "GET /api/status": (200, STATUS),
    }
    assert main(["tunnel", "connect", named, "db", "--port", "40001", "--data-dir", data_dir]) == 0
    expected = {"direction": "connect", "peer": PEER, "name": "db", "port": 40001}
    assert console.requests[-1] == ("POST /api/tunnels", expected)
    assert capsys.readouterr().out == "127.0.0.1:40001\n"


@pytest.mark.parametrize(
    ("named", "says"),
    [("twin", "could be"), ("AAAAAAAA", "could be"), ("nobody", "Known:"), ("IjK", "Known:")],
)
def test_tunnel_connect_refuses_a_name_that_means_no_peer_or_several(
    console: FakeConsole, data_dir: str, capsys: pytest.CaptureFixture[str], named: str, says: str
) -> None:
    console.answers = {"GET /api/status": (200, STATUS)}
    assert main(["tunnel", "connect", named, "db", "--data-dir", data_dir]) == 1
    assert says in capsys.readouterr().err


def test_tunnel_list_shows_both_directions(
    console: FakeConsole, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tunnels = [
        {"direction": "expose", "name": "db", "target": "localhost:5432", "peer": "", "port": 0},
        {"direction": "connect", "name": "web", "target": "", "peer": PEER, "port": 4000},
    ]
    console.answers = {"GET /api/tunnels": (200, {"tunnels": tunnels})}
    assert main(["tunnel", "list", "--data-dir", data_dir]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["db", "the", "mesh", "localhost:5432"]
    assert printed[2].split() == ["web", "127.0.0.1:4000", "peer", f"…{PEER[-8:]}"]
    assert main(["tunnel", "list", "--json", "--data-dir", data_dir]) == 0
    assert json.loads(capsys.readouterr().out) == tunnels
    console.answers = {"GET /api/tunnels": (200, {"tunnels": []})}
    assert main(["tunnel", "list", "--data-dir", data_dir]) == 0
    assert capsys.readouterr().out == "No tunnels.\n"


def node_process(folder: Path, console_port: int) -> subprocess.Popen[bytes]:
    """A process that holds the folder as a node does, and ends on SIGTERM."""
    code = (
        "import os, sys, time; from pathlib import Path; from libmesh_node.datadir import *\n"
        "with held_data_dir(Path(sys.argv[1])) as d:\n"
        "    d.write_info(NodeInfo(pid=os.getpid(), api_port=1, console_port=int(sys.argv[2]), version='', started_unix=0))\n"
        "    print('held', flush=True); time.sleep(600)"
    )  # fmt: skip
    argv = [sys.executable, "-c", code, str(folder), str(console_port)]
    node = subprocess.Popen(argv, stdout=subprocess.PIPE)
    assert node.stdout is not None
    assert node.stdout.readline() == b"held\n"
    return node


def test_stop_returns_when_the_node_has_gone(
    console: FakeConsole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with node_process(tmp_path, console.port) as node:
        console.answers = {"POST /api/stop": (200, {"ok": True})}
        console.on_request = lambda request: node.kill()
        assert main(["stop", "--data-dir", str(tmp_path)]) == 0
        assert not DataDir(tmp_path).in_use()
    assert capsys.readouterr().out == "The node has ended.\n"


def test_stop_signals_a_node_whose_console_does_not_answer(console: FakeConsole, tmp_path: Path) -> None:
    console.answers = {"POST /api/stop": (200, b"garbage")}
    with node_process(tmp_path, console.port) as node:
        assert main(["stop", "--data-dir", str(tmp_path)]) == 0
        assert node.wait() == -signal.SIGTERM


def test_stop_does_not_signal_a_node_that_refused(
    console: FakeConsole, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.answers = {"POST /api/stop": (403, {"ok": False, "error": "Not from here.", "code": "origin"})}
    assert main(["stop", "--data-dir", data_dir]) == 1
    assert "Not from here." in capsys.readouterr().err


def test_stop_says_so_when_the_node_does_not_end(
    console: FakeConsole, data_dir: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_module, "PATIENCE", 0.0)
    console.answers = {"POST /api/stop": (200, {"ok": True}), "GET /api/status": (200, {})}
    assert main(["stop", "--data-dir", data_dir]) == 1
    assert f"pid {os.getpid()}" in capsys.readouterr().err
    assert main(["stop", "--console", str(console.port)]) == 1
    assert "still runs" in capsys.readouterr().err


def test_rotate_key_removes_what_the_node_is_known_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = DataDir(tmp_path)
    for file in (folder.identity_key, folder.mesh_key, folder.membership, folder.invite, folder.kept):
        folder.write_secret(file, b"x")
    (tmp_path / "models").mkdir()
    assert main(["rotate-key", "--data-dir", str(tmp_path)]) == 0
    assert "identity.key" in capsys.readouterr().out
    assert {entry.name for entry in tmp_path.iterdir()} == {"models", "node.lock"}
    assert main(["rotate-key", "--data-dir", str(tmp_path)]) == 0
    assert "no keys yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ends", "flags", "stays"), [(60, [], True), (-60, [], False), (None, [], True), (60, ["--leave"], False)]
)
def test_rotated_member_keeps_the_invite_that_lets_it_in_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ends: int | None, flags: list[str], stays: bool
) -> None:
    folder = DataDir(tmp_path)
    end = None if ends is None else int(time.time()) + ends
    authority = MESH.delegate(scope=Scope.CLIENT, not_after_unix=end, seed=bytes(32))
    save_membership(folder, Membership.invited(encode_invite(Invite(authority=authority))))
    folder.write_secret(folder.identity_key, b"x")
    folder.write_secret(folder.kept, b"{}")
    assert main(["rotate-key", *flags, "--data-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert not folder.identity_key.exists()
    assert (folder.membership.exists(), folder.kept.exists()) == (stays, stays)
    assert (str(MESH.mesh_id) in said) is stays


def test_rotate_key_refuses_while_the_node_runs(data_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = DataDir(Path(data_dir))
    folder.write_secret(folder.identity_key, b"x")
    assert main(["rotate-key", "--data-dir", data_dir]) == 1
    assert "already runs" in capsys.readouterr().err
    assert folder.identity_key.exists()


def test_rotate_key_makes_no_folder_where_there_was_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rotate-key", "--data-dir", str(tmp_path / "none")]) == 1
    assert "no data folder" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
