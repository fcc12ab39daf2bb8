"""Who is in a mesh of real nodes: taken back, given up, and come back without tokens or the founder."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.node.nodes import Machine, Node, peer, wait_for

pytestmark = [pytest.mark.llama, pytest.mark.slow]


def member(machine: Machine, name: str, *flags: str) -> Node:
    """A node that sees somebody in its mesh."""
    node = machine.node(*flags, name=name).up()
    node.until(lambda status: any(one["state"] == "alive" for one in status["peers"]), what="company")
    return node


def sees(node: Node, other: str, *states: str | None) -> None:
    node.until(lambda status: peer(status, other).get("state") in states, what=f"{other} is {states}")


def _holds(file: Path, text: str) -> bool:
    return file.exists() and text in file.read_text()


def test_an_invite_is_taken_back_by_who_stands_above_for_good(machine: Machine) -> None:
    founder = machine.node(name="founder").up()
    ada = member(machine, "ada", "--join", founder.invite("--scope", "invite"))
    token = ada.invite("--scope", "worker")
    bob = member(machine, "bob", "--join", token)
    bob_id = bob.node_id
    sees(founder, bob_id, "alive")
    *_, by_ada = peer(founder.status(), bob_id)["invites"]
    made = json.loads(ada.run("invite", "--list", "--json").stdout)
    assert by_ada in [one["id"] for one in made]
    done = founder.run("invite", "revoke", by_ada[:8])
    assert (done.returncode, by_ada[:8] in done.stdout) == (0, True), done.stderr
    for node in (founder, ada):
        sees(node, bob_id, "dead", None)
    ada.ends(signal.SIGTERM)
    founder.ends(signal.SIGTERM)
    machine.node(name="founder").up().until(lambda status: status["mesh_id"])  # nobody can tell it anew
    late = machine.node("--client", "--join", token, name="late")
    wait_for(lambda: "revoked" in late.words, 60, "the refusal")


def test_a_mesh_comes_back_without_tokens_and_without_its_founder(machine: Machine) -> None:
    founder = machine.node(name="founder").up()
    guests = {name: member(machine, name, "--join", founder.invite()) for name in ("ada", "bob")}
    ids = {name: node.node_id for name, node in guests.items()}
    for name, other in (("ada", "bob"), ("bob", "ada")):
        kept = guests[name].folder / "mesh.json"
        remembers = partial(_holds, kept, ids[other])
        wait_for(remembers, 60, f"{name} remembers {other}")
    founder.kill()
    for node in guests.values():
        node.ends(signal.SIGTERM)
    again = {name: machine.node(name=name).up() for name in guests}
    sees(again["ada"], ids["bob"], "alive")
    sees(again["bob"], ids["ada"], "alive")


def test_a_node_that_gave_up_its_identity_comes_back_as_another(machine: Machine) -> None:
    founder = machine.node(name="founder").up()
    ada = member(machine, "ada", "--join", founder.invite())
    before = ada.status()
    ada.ends(signal.SIGTERM)
    done = ada.run("rotate-key")
    assert done.returncode == 0, done.stderr
    assert before["mesh_id"] in done.stdout
    after = member(machine, "ada").status()
    assert after["mesh_id"] == before["mesh_id"]
    assert after["node_id"] != before["node_id"]
    sees(founder, after["node_id"], "alive")
    sees(founder, before["node_id"], "left", "dead")
