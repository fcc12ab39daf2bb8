"""`peers` tells how somebody came in, in words."""

from __future__ import annotations

from libmesh_node.commands.peers import admission

ADA = {"id": "12D3KooWada", "hostname": "ada", "invites": ["a" * 32]}
BOB = {"id": "12D3KooWbob", "hostname": "bob", "invites": ["a" * 32]}


def test_a_chain_of_invites_is_told_from_its_last_link() -> None:
    assert admission([], []) == "the mesh's key"
    assert admission(["a" * 32], []) == "invite aaaaaaaa of the mesh's key"
    assert admission(["a" * 32, "b" * 32], [ADA]) == "invite bbbbbbbb of ada"
    assert admission(["a" * 32, "b" * 32], [ADA, BOB]) == "invite bbbbbbbb of ada or bob"
    assert admission(["c" * 32, "b" * 32], [ADA]) == "invite bbbbbbbb of a holder of cccccccc"


def test_a_peers_name_cannot_move_the_cursor() -> None:
    liar = {"id": "x", "hostname": "\x1b[2J", "invites": ["a" * 32]}
    assert "\x1b" not in admission(["a" * 32, "b" * 32], [liar])
