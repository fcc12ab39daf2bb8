"""What a node's stay in a mesh makes of its options."""

from __future__ import annotations

from pathlib import Path

import pytest
from libmesh_node.datadir import DataDir
from libmesh_node.options import NodeOptions
from libmesh_node.stays import Stays

from libmesh import RelayLimits
from tests.members import key


def nothing(*_: object) -> None:
    """Nobody asks."""


@pytest.mark.parametrize(
    ("rate", "limits"), [(None, RelayLimits()), (5e6, RelayLimits(bandwidth=5e6)), (0.0, None)]
)
def test_a_node_relays_as_much_as_it_was_told(
    rate: float | None, limits: RelayLimits | None, tmp_path: Path
) -> None:
    chosen = NodeOptions(data_dir=tmp_path, announce_addresses=("/ip4/8.8.8.8/tcp/1",), relay_rate=rate)
    stays = Stays(chosen, DataDir(tmp_path), key(1), opened=nothing, entered=nothing, closed=nothing)
    assert stays._listen().relay == limits
    use = stays._relays()
    assert use.offer == use.volunteer == (limits is not None)
