"""What `plan` answers on a node that takes no part in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from libmesh_node.announced import NodeStatus
from libmesh_node.options import NodeOptions
from libmesh_node.splits import Splits

from libmesh import PeerState, PeerView, Scope
from tests.placement.machines import GB, shape
from tests.placement.test_seen import MODEL, STATUS, peer, view

HAVING = replace(STATUS, memory_bytes=80 * GB, spare_bytes=80 * GB, bandwidth=20 * GB)


def plan(*peers: PeerView, client: bool, mine: NodeStatus, protocol: str = "") -> dict[str, Any]:
    equipment = SimpleNamespace(rpc_protocol=protocol, engine=object() if protocol else None)
    models: Any = SimpleNamespace(equipment=equipment, entries={})
    mesh: Any = SimpleNamespace(view=view(*peers))
    options = NodeOptions(data_dir=Path("/nowhere"), client=client)
    return Splits(mesh, models, options, lambda: mine).plan("m", shape())


def test_a_client_is_told_what_the_others_do_though_it_has_no_llama_cpp() -> None:
    found = plan(peer("a", HAVING), client=True, mine=NodeStatus(client=True))
    assert (found["possible"], found["host"]) == (True, "a")
    assert found["peers"] == []


def test_a_client_is_no_machine_itself() -> None:
    found = plan(client=True, mine=replace(NodeStatus(client=True), models=()))
    assert not found["possible"]
    assert found["missing"] == "no node of the mesh has it, or may serve it"


def test_a_node_with_another_llama_cpp_refuses_those_it_cannot_work_with() -> None:
    found = plan(
        peer("a", HAVING),
        client=False,
        mine=replace(HAVING, models=(MODEL,), spare_bytes=0),
        protocol="8.0.0",
    )
    assert not found["possible"]
    assert "7.0.0, this node 8.0.0" in found["missing"]


def test_a_node_that_does_not_serve_it_yet_knows_how_far_those_are_that_do() -> None:
    """It announces no distance to them, nor they one to it."""
    half = replace(HAVING, spare_bytes=30 * GB, distances=())
    found = plan(peer("a", half), client=False, mine=replace(half, models=()), protocol="7.0.0")
    assert (found["possible"], len(found["members"])) == (True, 2)
    assert found["peers"][0]["taken"]


def test_a_bystander_asks_those_who_can_serve_not_whoever_is_named_first() -> None:
    """A dead peer's llama.cpp, and that of one without the file, are nobody's measure."""
    old = replace(HAVING, rpc_protocol="6.0.0")
    dead, stranger = peer("a", old, state=PeerState.DEAD), peer("b", replace(old, models=()))
    client = peer("c", old, scope=Scope.CLIENT)
    found = plan(dead, stranger, client, peer("d", HAVING), client=True, mine=NodeStatus(client=True))
    assert (found["possible"], found["host"]) == (True, "d")


def test_of_two_kinds_of_llama_cpp_a_bystander_plans_with_the_one_that_can_serve() -> None:
    small = replace(HAVING, rpc_protocol="8.0.0", spare_bytes=GB)
    peers = peer("a", small), peer("b", small), peer("c", HAVING)
    found = plan(*peers, client=True, mine=NodeStatus(client=True))
    assert (found["possible"], found["host"]) == (True, "c")
    assert "8.0.0" in found["peers"][0]["why"]
    assert "7.0.0" in found["peers"][0]["why"]


def test_a_node_without_llama_cpp_has_the_plan_of_the_others() -> None:
    mine = replace(HAVING, models=(), rpc_protocol="")
    found = plan(peer("a", HAVING), client=False, mine=mine)
    assert (found["possible"], found["host"], len(found["members"])) == (True, "a", 1)
