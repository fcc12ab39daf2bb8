"""Ways into a mesh, and the words of those who are kept out."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.node.conftest import Pair
from tests.node.nodes import PATIENCE, Machine, Node, chat, served, wait_for

pytestmark = pytest.mark.llama


def _tampered(token: str) -> str:
    middle = len(token) // 2
    return token[:middle] + ("A" if token[middle] != "A" else "B") + token[middle + 1 :]


def _refused(node: Node, token: str) -> str:
    """The words of a console that does not join with `token`; they tell nothing of it."""
    answer = node.post("/api/join", {"token": token})
    assert 400 <= answer.status_code < 500, answer.text
    body = answer.json()
    assert body["ok"] is False
    assert token not in answer.text
    assert len(body["error"]) < 400
    return str(body["error"])


def test_idle_node_says_what_to_do(machine: Machine) -> None:
    node = machine.node().up()
    refused = chat(node)
    assert refused.status_code == 503
    assert refused.headers["Retry-After"].isdigit()
    error = refused.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "--model demo" in error["message"]
    assert "--join" in error["message"]
    assert httpx.get(f"{node.api}/health", timeout=PATIENCE).status_code == 503
    assert httpx.get(f"{node.api}/v1/models", timeout=PATIENCE).json()["data"] == []
    assert node.status()["node_status"] == "Idle"
    assert "idle: nothing is served" in node.words


def test_idle_node_joins_over_its_console(machine: Machine, pair: Pair) -> None:
    node = machine.node().up()
    answer = node.post("/api/join", {"token": pair.machine.invite_file.read_text()})
    assert answer.json() == {"ok": True, "mesh_id": pair.server.status()["mesh_id"]}, answer.text
    node.sees("demo")
    assert chat(node).status_code == 200
    node.ends(lambda: node.run("stop"))


def test_ephemeral_node_keeps_nothing(machine: Machine) -> None:
    node = machine.node("--ephemeral")
    wait_for(lambda: " addresses " in node.words, PATIENCE, "the mesh")
    (lock,) = [Path(file.path) for file in psutil.Process(node.pid).open_files() if "node.lock" in file.path]
    assert lock.parent.is_dir()
    node.ends(signal.SIGTERM)
    assert not lock.parent.exists()


def test_kept_out_over_the_console(machine: Machine, pair: Pair) -> None:
    node = machine.node().up()
    mesh_id = node.until(lambda status: status["mesh_id"])["mesh_id"]
    token = pair.server.invite("--scope", "client", "--ttl", "1s")
    assert "no invite" in _refused(node, "garbage").lower()
    assert "mistyped" in _refused(node, _tampered(token)).lower()
    time.sleep(1.5)  # until it has ended
    assert "expired" in _refused(node, token).lower()
    status = node.until(lambda status: status["mesh_id"] == mesh_id, what="back in its own mesh")
    assert status["peers"] == []
    assert served(status) == set()


def test_kept_out_at_the_start(machine: Machine, pair: Pair) -> None:
    token = pair.server.invite("--ttl", "1s")
    garbage = machine.node("--client", "--join", "garbage")
    tampered = machine.node("--client", "--join", _tampered(token))
    assert "invite" in garbage.fails()
    assert "mistyped" in tampered.fails()
    time.sleep(0.5)  # until it has ended; the two above took longer than the rest of it
    expired = machine.node("--client", "--join", token)
    assert "expired" in (words := expired.fails())
    assert "ask for a new one" in words
    for node in (garbage, tampered, expired):
        assert "Internal error" not in node.words
        assert token not in node.words
        assert not (node.folder / "membership").exists()


@pytest.mark.slow
def test_invite_of_a_mesh_that_is_no_more_is_refused(machine: Machine) -> None:
    """The node that it leads to is in another mesh now, and says so."""
    node = machine.node(name="founder").up()
    node.until(lambda status: status["mesh_id"])
    token = node.invite()
    node.ends(15)
    (node.folder / "mesh.key").unlink()
    other = machine.node(name="founder").up()
    other.until(lambda status: status["mesh_id"])
    stranger = machine.node("--client", "--join", token)
    assert "mesh" in stranger.fails()
    idle = machine.node().up()
    idle.until(lambda status: status["mesh_id"])
    assert "mesh" in _refused(idle, token)
    assert other.status()["peers"] == []


def test_first_invite_that_works_wins(machine: Machine, pair: Pair) -> None:
    token = pair.server.invite()
    node = machine.node("--client", "--join", "garbage", "--join", token).sees("demo")
    assert node.status()["mesh_id"] == pair.server.status()["mesh_id"]


def test_invite_as_json_holds_a_short_token(pair: Pair) -> None:
    made = json.loads(pair.server.invite("--scope", "client", "--ttl", "1h", "--json"))
    assert made["scope"] == "client"
    assert abs(made["expires_unix"] - time.time() - 3600) < 60
    assert len(made["token"]) < 600
    assert len(pair.machine.invite_file.read_text().strip()) < 600
    assert pair.machine.invite_file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("scope", ["client", "worker"])
def test_guest_cannot_invite(machine: Machine, pair: Pair, scope: str) -> None:
    guest = machine.node("--client", "--join", pair.server.invite("--scope", scope)).sees("demo")
    status = guest.status()
    assert (status["scope"], status["token"]) == (scope, "")
    done = guest.run("invite")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "scope" in done.stderr
    assert "Internal" not in done.stderr


def test_guest_with_the_scope_invites_the_next(machine: Machine, pair: Pair) -> None:
    guest = machine.node("--client", "--join", pair.server.invite("--scope", "invite")).sees("demo")
    token = guest.invite("--scope", "client")
    assert len(token) < 1000
    third = machine.node("--client", "--join", token).sees("demo")
    assert third.status()["scope"] == "client"
    assert chat(third).status_code == 200


def test_joined_node_starts_again_without_a_token(machine: Machine, pair: Pair) -> None:
    token = pair.server.invite("--scope", "client")
    node = machine.node("--client", "--join", token, name="again").sees("demo")
    node_id = node.node_id
    node.ends(15)
    again = machine.node("--client", name="again").sees("demo")
    assert again.node_id == node_id


@pytest.mark.slow
def test_membership_that_was_remembered_and_has_ended_keeps_no_node_from_starting(
    machine: Machine, pair: Pair, tmp_path: Path
) -> None:
    token = pair.server.invite("--scope", "client", "--ttl", "20s")
    end = time.time() + 20
    node = machine.node("--client", "--join", token, name="again").sees("demo")
    node.ends(15)
    time.sleep(max(0.0, end + 1 - time.time()))
    again = machine.node("--client", name="again").up()
    wait_for(lambda: "its own" in again.words, 60, "it is in its own mesh")
    assert again.status()["mesh_id"] != pair.server.status()["mesh_id"]
    assert "expired" in again.words


@pytest.mark.slow
def test_node_that_was_let_in_late_remembers_it(machine: Machine) -> None:
    """Nobody answers when it starts; it goes on trying, and once it is in, the next start needs no token."""
    founder = machine.node(name="founder").up()
    mesh_id = founder.until(lambda status: status["mesh_id"])["mesh_id"]
    token = founder.invite("--scope", "client")
    founder.ends(signal.SIGTERM)
    late = machine.node("--client", "--join", token, name="late").up()
    status = late.until(lambda status: status["notices"])
    assert "keeps trying" in status["notices"][0]
    assert not (late.folder / "membership").exists()
    founder = machine.node(name="founder").up()
    late.until(lambda status: status["peers"], what="the founder")
    wait_for((late.folder / "membership").exists, PATIENCE, "the membership")
    late.ends(signal.SIGTERM)
    again = machine.node("--client", name="late").up()
    again.until(lambda status: status["mesh_id"] == mesh_id and status["peers"], what="back in the mesh")


def test_failed_join_leaves_the_node_where_it_was(machine: Machine) -> None:
    elsewhere = machine.node().up()
    elsewhere.until(lambda status: status["mesh_id"])
    token = elsewhere.invite()
    elsewhere.kill()
    node = machine.node().up()
    mesh_id = node.until(lambda status: status["mesh_id"] and status["token"])["mesh_id"]
    answer = node.post("/api/join", {"token": token})
    assert answer.status_code in (502, 503, 504), answer.text
    assert "cannot reach" in answer.json()["error"].lower()
    node.until(lambda status: status["mesh_id"] == mesh_id and status["token"], what="back in its own mesh")
    assert "back in the mesh" in node.words
    assert not (node.folder / "membership").exists()


def test_better_invite_to_the_same_mesh_replaces_the_old_one(machine: Machine, pair: Pair) -> None:
    """Wider or longer: taken, remembered, and not given up again for a smaller one."""
    small, large = (
        pair.server.invite("--scope", "client", "--ttl", "1h"),
        pair.server.invite("--scope", "worker"),
    )
    guest = machine.node("--client", "--join", small).sees("demo")
    assert guest.status()["scope"] == "client"
    assert guest.post("/api/join", {"token": large}).status_code == 200
    guest.until(lambda status: status["scope"] == "worker", what="the wider scope")
    guest.sees("demo")
    assert large in (guest.folder / "membership").read_text()
    assert guest.post("/api/join", {"token": small}).status_code == 200
    assert guest.status()["scope"] == "worker"


@pytest.mark.slow
def test_ended_membership_is_told_and_renewed_by_a_new_invite(machine: Machine, pair: Pair) -> None:
    token = pair.server.invite("--scope", "client", "--ttl", "20s")
    guest = machine.node("--client", "--join", token).sees("demo")
    status = guest.until(lambda status: status["notices"], 60, "the end is told")
    assert "membership ends on" in status["notices"][0]
    guest.until(lambda status: "has ended" in status["notices"][0], 60, "that it has ended is told")
    assert guest.post("/api/join", {"token": pair.server.invite("--scope", "client")}).status_code == 200
    guest.sees("demo")
    assert guest.status()["notices"] == []


@pytest.mark.slow
def test_newer_invite_in_the_file_that_one_came_from_is_taken_in_time(
    machine: Machine, pair: Pair, tmp_path: Path
) -> None:
    file = tmp_path / "shared"
    file.write_text(pair.server.invite("--scope", "client", "--ttl", "30s"))
    guest = machine.node("--client", "--join", f"@{file}").sees("demo")
    file.write_text(newer := pair.server.invite("--scope", "client"))
    wait_for(lambda: "by another invite" in guest.words, 60, "the other invite")
    pair.server.until(
        lambda status: any(
            peer["id"] == guest.node_id and peer["expires_unix"] > time.time() + 3600
            for peer in status["peers"]
        ),
        60,
        "the server knows",
    )
    assert guest.status()["notices"] == []
    assert newer in (guest.folder / "membership").read_text()
    assert "no longer served" not in guest.words
    assert chat(guest).status_code == 200
