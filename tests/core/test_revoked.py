"""Which revocations are kept when there are more than there is room for, and until when a credential is taken."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from libmesh.core.credentials import (
    CLOCK_TOLERANCE,
    MAX_BY_ONE_KEY,
    MAX_REVOCATIONS,
    Authority,
    Revocation,
    Revoked,
)
from libmesh.peers import Scope
from tests.members import HOUR, MESH, NOW, credential, invited, seed


def inviter(number: int) -> Authority:
    return MESH.delegate(scope=Scope.INVITE, not_after_unix=None, seed=seed(2000 + number))


@lru_cache(maxsize=1)
def by_inviter() -> Revocation:
    above = inviter(0)
    return above.revoke(above.admit(bytes(32)).links)


def like(revocation: Revocation, number: int, inviter_key: bytes | None = None) -> Revocation:
    """Another one, of another link, perhaps by another key. Its signatures are not looked at here."""
    *above, last = revocation.links
    if inviter_key is not None:
        above = [replace(above[0], subject=inviter_key)]
    return replace(revocation, links=(*above, replace(last, signature=number.to_bytes(64, "big"))))


def full_of_inviters() -> Revoked:
    known = Revoked()
    for number in range(MAX_REVOCATIONS):
        assert known.add(like(by_inviter(), number, number.to_bytes(32, "big")))
    return known


def test_one_inviter_cannot_fill_what_is_kept() -> None:
    known = Revoked()
    for number in range(MAX_BY_ONE_KEY):
        assert known.add(like(by_inviter(), number))
    assert not known.add(like(by_inviter(), MAX_BY_ONE_KEY))
    assert known.add(like(by_inviter(), MAX_BY_ONE_KEY, bytes(32)))


def test_when_all_is_full_the_mesh_key_still_has_its_word() -> None:
    known = full_of_inviters()
    expelled = credential(2)
    assert known.add(MESH.revoke(expelled.links))
    assert known.covers(expelled)
    assert len(known) == MAX_REVOCATIONS


def test_when_all_is_full_who_is_as_far_from_the_mesh_key_has_none() -> None:
    known = full_of_inviters()
    assert not known.add(like(by_inviter(), MAX_REVOCATIONS, b"z" * 32))
    assert len(known) == MAX_REVOCATIONS


def test_a_credential_is_taken_for_a_moment_longer_than_it_holds() -> None:
    assert (
        invited(2, Scope.CLIENT, not_after_unix=NOW + HOUR).taken_until_unix == NOW + HOUR + CLOCK_TOLERANCE
    )
    assert invited(2, Scope.CLIENT).taken_until_unix == float("inf")
