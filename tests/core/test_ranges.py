"""Numbers that cannot work are refused by name, wherever a configuration has them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from libmesh import (
    AdmissionConfig,
    Libp2pConfig,
    LivenessConfig,
    MembershipConfig,
    MeshConfig,
    PathsConfig,
    RelayLimits,
)

CONFIGS: list[Any] = [
    AdmissionConfig,
    Libp2pConfig,
    LivenessConfig,
    MembershipConfig,
    MeshConfig,
    PathsConfig,
    RelayLimits,
]
NUMBERS = [
    (config, field.name, field.type)
    for config in CONFIGS
    for field in dataclasses.fields(config)
    if field.type in ("int", "float", "int | None")
]


@pytest.mark.parametrize(("config", "name", "kind"), NUMBERS)
def test_no_number_can_be_less_than_nothing_or_none_at_all(config: Any, name: str, kind: str) -> None:
    wrongs: list[object] = [-1, "1", float("nan"), float("inf")]
    for wrong in wrongs if kind == "int | None" else [*wrongs, None]:
        with pytest.raises(ValueError, match=name):
            config(**{name: wrong})


@pytest.mark.parametrize("name", ["farewell", "resume"])
def test_what_may_be_left_out_may_be_nothing(name: str) -> None:
    nothing: dict[str, Any] = {name: 0}
    assert getattr(MeshConfig(**nothing), name) == 0


@pytest.mark.parametrize("agent", ["x" * 129, "ü" * 65, None])
def test_an_agent_is_a_short_text(agent: Any) -> None:
    with pytest.raises(ValueError, match="agent must be a text of at most 128 bytes"):
        MeshConfig(agent=agent)


def test_a_part_of_a_peer_is_no_count() -> None:
    with pytest.raises(ValueError, match=r"connections must be a whole number, not 4\.5"):
        MembershipConfig(connections=4.5)  # type: ignore[arg-type]
