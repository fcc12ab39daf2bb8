"""The suite finds what is broken: each mutant is caught by the rule that names its mistake, for that reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from libmesh import SecretKey
from libmesh.testing.conformance import RULES, Result, check_rule, read_target
from tests.conformance.mutants import MUTANTS, Patch, PeerNetwork
from tests.conformance.peer import open_peer

LIMIT = 8.0
"""Seconds for one rule, where it has not less."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if mutant.slow else []) for name, mutant in MUTANTS.items()],
)
async def test_the_rule_that_names_a_mistake_finds_it(name: str, monkeypatch: Patch) -> None:
    mutant = MUTANTS[name]
    key = SecretKey.generate()
    mutant.make(monkeypatch)
    network = PeerNetwork(key.seed, mutant.listen)
    async with network.running(), open_peer(key, network) as (_, address, token):
        rule = replace(RULES[mutant.rule], limit=min(RULES[mutant.rule].limit, LIMIT))
        verdict = await check_rule(rule, read_target(address, token, patience=mutant.patience))
    assert verdict.result is Result.FAILED
    assert mutant.says in verdict.detail


def test_there_are_mutants_of_every_part() -> None:
    assert {mutant.rule.split(".")[0] for mutant in MUTANTS.values()} >= {
        "hello",
        "closed",
        "records",
        "digest",
        "compare",
        "follow",
        "gossip",
        "probe",
        "tunnel",
        "resume",
        "frame",
        "revocation",
        "survives",
    }
