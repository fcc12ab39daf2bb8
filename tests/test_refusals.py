"""Who refused whom is remembered for a while, of so many and no more."""

from __future__ import annotations

import pytest

from libmesh import AdmissionRefused
from libmesh.peers import PeerId
from libmesh.refusals import MAX_REFUSED, REST, Refusals

PEER = PeerId("peer")


def refusal(reason: str) -> AdmissionRefused:
    return AdmissionRefused(f"it is {reason}", reason=reason, peer=PEER)


def test_who_says_revoked_is_asked_again_after_a_rest() -> None:
    refusals = Refusals()
    refusals.refused_by(PEER, refusal("revoked"), 100.0)
    with pytest.raises(AdmissionRefused, match="it is revoked") as caught:
        refusals.check(PEER, 100.0 + REST - 1)
    assert (caught.value.reason, caught.value.peer) == ("revoked", PEER)
    refusals.check(PEER, 100.0 + REST)
    refusals.check(PeerId("another"), 100.0)


@pytest.mark.parametrize("reason", ["busy", "expired", "wrong_mesh", "malformed"])
def test_who_says_what_may_change_is_asked_again_at_once(reason: str) -> None:
    refusals = Refusals()
    refusals.refused_by(PEER, refusal(reason), 100.0)
    refusals.check(PEER, 100.0)


def test_who_admits_us_after_all_is_asked_like_everybody() -> None:
    refusals = Refusals()
    refusals.refused_by(PEER, refusal("revoked"), 100.0)
    refusals.admitted(PEER)
    refusals.check(PEER, 100.0)


def test_more_than_can_be_remembered_are_forgotten() -> None:
    refusals = Refusals()
    for number in range(MAX_REFUSED + 1):
        refusals.refused_by(PeerId(str(number)), refusal("revoked"), 100.0)
        refusals.refused(PeerId(str(number)), "it is revoked")
    refusals.check(PeerId("0"), 100.0)
    with pytest.raises(AdmissionRefused):
        refusals.check(PeerId(str(MAX_REFUSED)), 100.0)
    assert len(refusals._refusing) == len(refusals._told) == 1
