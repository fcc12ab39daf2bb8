"""The times of membership: what is refused, and that the presets fit each other."""

from __future__ import annotations

import pytest

from libmesh.core.liveness import LivenessConfig
from libmesh.core.membership_io import MembershipConfig


@pytest.mark.parametrize("field", ["refresh", "suspicion", "tombstone", "dial_max"])
def test_times_must_be_positive(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be greater than 0"):
        MembershipConfig(**{field: -1})


def test_a_plan_needs_connections() -> None:
    with pytest.raises(ValueError, match="connections must be at least 4, not 3"):
        MembershipConfig(connections=3)


@pytest.mark.parametrize(
    ("membership", "liveness", "limit"),
    [
        (MembershipConfig.lan(), LivenessConfig.lan(), 5.0),
        (MembershipConfig.wan(), LivenessConfig.wan(), 15.0),
    ],
    ids=["lan", "wan"],
)
def test_a_preset_forgives_a_pause_of_two_seconds_and_finds_a_death_in_time(
    membership: MembershipConfig, liveness: LivenessConfig, limit: float
) -> None:
    assert liveness.timeout + liveness.indirect_timeout + membership.suspicion > 2.0
    assert membership.suspicion > 2.0  # also when a connection was lost in the pause
    beyond_the_full_mesh = membership.refute + membership.reach + membership.suspicion / 4
    rest = membership.hush + max(membership.suspicion, membership.stall, beyond_the_full_mesh)
    noticed = (
        2 * liveness.interval + liveness.timeout + liveness.indirect_timeout
    )  # of a machine that vanished
    assert noticed + rest <= limit
    assert liveness.interval + liveness.timeout + membership.alone <= limit
    assert membership.alone > 2.0
