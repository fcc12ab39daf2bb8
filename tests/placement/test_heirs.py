"""Who is left nothing, and until when."""

from __future__ import annotations

from libmesh_node.placement.heirs import NO_HEIR_FOR, PassedOver


def test_who_did_not_take_over_is_passed_over_for_a_while() -> None:
    peers = PassedOver()
    assert peers.deadline() is None
    peers.add("a", 5, 100.0)
    assert ("a" in peers, "b" in peers, peers.deadline()) == (True, False, 100.0 + NO_HEIR_FOR)
    peers.look({"a": 5}, 99.9 + NO_HEIR_FOR)
    assert "a" in peers
    peers.look({"a": 5}, 100.0 + NO_HEIR_FOR)
    assert "a" not in peers
    assert peers.deadline() is None


def test_a_restart_earns_one_more_try() -> None:
    peers = PassedOver()
    peers.add("a", 5, 0.0)
    peers.look({}, 1.0)  # it is gone
    assert "a" in peers
    peers.look({"a": 6}, 2.0)
    assert "a" not in peers
    peers.add("a", 6, 10.0)
    peers.look({"a": 7}, 11.0)
    assert "a" in peers
    assert peers.deadline() == 10.0 + NO_HEIR_FOR
    peers.look({"a": 7}, 10.0 + NO_HEIR_FOR)
    assert "a" not in peers
    peers.add("a", 7, 9999.0)
    peers.look({"a": 8}, 9999.0)
    assert "a" not in peers
