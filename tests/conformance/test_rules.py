"""The rules as data: each says what it holds and where that is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from libmesh.testing.conformance import RULES, Rule, chosen

SPECIFICATION = Path(__file__).resolve().parents[2] / "proto" / "libmesh" / "v1" / "mesh.proto"


def places() -> set[str]:
    """Messages, enumerations and their fields, and the paragraphs of the header in quotes."""
    found: set[str] = set()
    inside: list[str] = []
    for line in SPECIFICATION.read_text().splitlines():
        if paragraph := re.match(r"// ([A-Z][a-z]+)\.", line):
            found.add(f'"{paragraph[1]}"')
        elif opened := re.match(r"\s*(?:message|enum|oneof) (\w+) {", line):
            inside.append(opened[1])
            found.add(".".join(inside))
        elif re.match(r"\s*}", line):
            inside.pop()
        elif inside and (field := re.match(r"\s*(?:optional |repeated )?[\w.]+ (\w+) = \d+;", line)):
            found.add(".".join([*inside, field[1]]))
    return found


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.id)
def test_each_rule_names_a_place_in_the_specification(rule: Rule) -> None:
    assert rule.place in places()


def test_a_rule_is_a_sentence_and_named_for_its_part() -> None:
    for name, rule in RULES.items():
        assert name == rule.id
        assert re.fullmatch(r"[a-z]+(\.[a-z0-9_]+)+", rule.id)
        assert rule.text[0].isupper()
        assert rule.text.endswith(".")
        assert 0 < rule.limit <= 20


def test_every_part_of_the_protocol_has_rules() -> None:
    parts = {rule.id.split(".")[0] for rule in RULES.values()}
    assert parts == {
        *("transport", "hello", "closed", "records", "digest", "compare", "follow", "gossip"),
        *("probe", "tunnel", "resume", "frame", "limits", "revocation", "survives"),
    }


def test_rules_can_be_chosen_by_the_start_of_their_ids() -> None:
    assert [rule.id for rule in chosen(["probe.a", "survives.all"])] == ["probe.answered", "survives.all"]
    assert chosen() == list(RULES.values())


def test_what_leaves_something_behind_can_be_left_out() -> None:
    assert {rule.id for rule in chosen()} - {rule.id for rule in chosen(lasting=False)} == {
        "revocation.cuts_off",
        "revocation.cuts_off_the_silent",
    }
