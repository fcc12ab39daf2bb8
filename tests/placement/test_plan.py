"""What `plan` answers on a node that takes no part in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from libmesh_node.announced import NodeStatus
from libmesh_node.options import NodeOptions
from libmesh_node.splits import Splits

from libmesh import PeerView
from tests.placement.machines import GB, shape
from tests.placement.test_seen import MODEL, STATUS, peer, view

HAVING = replace(STATUS, memory_bytes=80 * GB, spare_bytes=80 * GB, bandwidth=20 * GB)


def plan(*peers: PeerView, client: bool, mine: NodeStatus, protocol: str = "") -> dict[str, Any]:
    models: Any = SimpleNamespace(equipment=SimpleNamespace(rpc_protocol=protocol), entries={})
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
