"""Chains: what each rule of `credentials` lets through, and what it refuses, and with which word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libmesh import keys
from libmesh.core import credentials
from libmesh.core.credentials import (
    CLOCK_TOLERANCE,
    MAX_LINKS,
    MAX_REVOCATIONS,
    Authority,
    Credential,
    Link,
    LinkKind,
    Revocation,
    Revoked,
)
from libmesh.errors import InviteDenied
from libmesh.peers import Scope
from tests.members import HOUR, MESH, NOW, OTHER_MESH, credential, invited, seed

MEMBER = 1
MEMBER_KEY = keys.public_key(seed(MEMBER))


def reason(shown: Credential, *, now: float = NOW, **arguments: object) -> str | None:
    options: dict[str, object] = {"mesh_id": MESH.mesh_id, "peer_key": MEMBER_KEY, "now_unix": now}
    refusal = credentials.verify(shown, **(options | arguments))  # type: ignore[arg-type]
    return None if refusal is None else refusal.reason


def signed(
    issuer_seed: bytes,
    subject: bytes,
    kind: LinkKind = LinkKind.PEER,
    scope: Scope = Scope.CLIENT,
    not_after_unix: int | None = None,
) -> Link:
    """A link that is signed as it should be, whatever it says."""
    blank = Link(subject=subject, kind=kind, scope=scope, not_after_unix=not_after_unix, signature=b"")
    body = blank.signed_bytes(MESH.mesh_key, keys.public_key(issuer_seed))
    return replace(blank, signature=keys.sign(issuer_seed, body))


def chain(*links: Link) -> Credential:
    return Credential(mesh_key=MESH.mesh_key, links=links)


def public(number: int) -> bytes:
    return keys.public_key(seed(number))


INVITE, PEER = LinkKind.INVITE, LinkKind.PEER
MESH_SEED = MESH.seed

REFUSED: list[tuple[str, str, Callable[[], Credential]]] = [
    ("of another mesh", "wrong_mesh", lambda: credential(MEMBER, mesh=OTHER_MESH)),
    ("without links", "malformed", lambda: chain()),
    (
        "with nine links",
        "malformed",
        lambda: chain(
            signed(MESH_SEED, public(10), INVITE, Scope.INVITE),
            *(signed(seed(10 + n), public(11 + n), INVITE, Scope.INVITE) for n in range(7)),
            signed(seed(17), MEMBER_KEY),
        ),
    ),
    ("that ends in an invite", "malformed", lambda: chain(signed(MESH_SEED, MEMBER_KEY, INVITE))),
    (
        "with a peer in its middle",
        "malformed",
        lambda: chain(signed(MESH_SEED, public(10), PEER, Scope.INVITE), signed(seed(10), MEMBER_KEY)),
    ),
    ("of another peer", "not_yours", lambda: credential(2)),
    (
        "that widens its scope",
        "widened",
        lambda: chain(
            signed(MESH_SEED, public(10), INVITE, Scope.CLIENT),
            signed(seed(10), MEMBER_KEY, PEER, Scope.WORKER),
        ),
    ),
    (
        "that lasts longer than its parent",
        "widened",
        lambda: chain(
            signed(MESH_SEED, public(10), INVITE, not_after_unix=NOW + 1),
            signed(seed(10), MEMBER_KEY, not_after_unix=NOW + 2),
        ),
    ),
    (
        "without an end under a parent that has one",
        "widened",
        lambda: chain(
            signed(MESH_SEED, public(10), INVITE, not_after_unix=NOW + 1), signed(seed(10), MEMBER_KEY)
        ),
    ),
    (
        "invited by who may not invite",
        "widened",
        lambda: chain(
            signed(MESH_SEED, public(10), INVITE, Scope.WORKER),
            signed(seed(10), public(11), INVITE),
            signed(seed(11), MEMBER_KEY),
        ),
    ),
    ("that ended", "expired", lambda: invited(MEMBER, Scope.CLIENT, not_after_unix=NOW - HOUR)),
    (
        "signed by a key that is not above it",
        "forged",
        lambda: chain(signed(MESH_SEED, public(10), INVITE), signed(seed(11), MEMBER_KEY)),
    ),
    ("signed by itself", "forged", lambda: chain(signed(seed(MEMBER), MEMBER_KEY))),
    (
        "whose first link is signed for another mesh",
        "forged",
        lambda: replace(credential(MEMBER, mesh=OTHER_MESH), mesh_key=MESH.mesh_key),
    ),
]


@pytest.mark.parametrize(("word", "make"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED])
def test_a_credential_is_refused(word: str, make: Callable[[], Credential]) -> None:
    assert reason(make()) == word


def test_the_mesh_key_lets_a_peer_in_with_everything_and_for_ever() -> None:
    shown = credential(MEMBER)
    assert reason(shown) is None
    assert (shown.scope, shown.not_after_unix, shown.mesh_id) == (Scope.INVITE, None, MESH.mesh_id)


def test_the_longest_chain_is_accepted() -> None:
    shown = invited(MEMBER, *[Scope.INVITE] * (MAX_LINKS - 1))
    assert len(shown.links) == MAX_LINKS
    assert reason(shown) is None


def test_an_invite_that_would_make_the_chain_too_long_is_not_made() -> None:
    authority = MESH
    for number in range(MAX_LINKS - 1):
        authority = authority.delegate(scope=Scope.INVITE, not_after_unix=None, seed=seed(number))
    with pytest.raises(InviteDenied, match="8 in a row and at most 7"):
        authority.delegate(scope=Scope.INVITE, not_after_unix=None, seed=seed(99))


@pytest.mark.parametrize("scope", [Scope.CLIENT, Scope.WORKER])
def test_who_may_not_invite_cannot_make_an_invite(scope: Scope) -> None:
    authority = MESH.delegate(scope=scope, not_after_unix=None, seed=seed(1))
    with pytest.raises(InviteDenied, match=scope.name.lower()):
        authority.delegate(scope=Scope.CLIENT, not_after_unix=None, seed=seed(2))


def test_a_later_end_is_cut_to_that_of_the_inviter() -> None:
    parent = MESH.delegate(scope=Scope.INVITE, not_after_unix=NOW + HOUR, seed=seed(1))
    for wanted in (None, NOW + 2 * HOUR):
        assert parent.delegate(scope=Scope.CLIENT, not_after_unix=wanted, seed=seed(2)).not_after_unix == (
            NOW + HOUR
        )
    shorter = parent.delegate(scope=Scope.CLIENT, not_after_unix=NOW + 1, seed=seed(2))
    assert shorter.not_after_unix == NOW + 1


def test_an_end_is_tolerated_for_clocks_that_disagree_and_no_longer() -> None:
    shown = invited(MEMBER, Scope.CLIENT, not_after_unix=NOW)
    assert reason(shown, now=NOW + CLOCK_TOLERANCE - 0.001) is None
    assert reason(shown, now=NOW + CLOCK_TOLERANCE) == "expired"


@pytest.mark.parametrize(
    ("late", "words"),
    [
        (40, "40 seconds"),
        (119, "119 seconds"),
        (120, "2 minutes"),
        (3 * HOUR, "3 hours"),
        (72 * HOUR, "3 days"),
    ],
)
def test_an_expiry_is_told_in_words(late: int, words: str) -> None:
    shown = invited(MEMBER, Scope.CLIENT, not_after_unix=NOW)
    refusal = credentials.verify(shown, mesh_id=MESH.mesh_id, peer_key=MEMBER_KEY, now_unix=NOW + late)
    assert refusal is not None
    assert refusal.detail == f"it ended {words} ago"


def test_cheap_rules_come_before_any_signature_is_checked() -> None:
    checked: list[bytes] = []

    def count(key: bytes, data: bytes, signature: bytes) -> bool:
        checked.append(key)
        return keys.verify(key, data, signature)

    for _, word, make in REFUSED:
        if word != "forged":
            reason(make(), verify_signature=count)
    assert checked == []
    reason(invited(MEMBER, *[Scope.INVITE] * (MAX_LINKS - 1)), verify_signature=count)
    assert len(checked) == MAX_LINKS


def test_a_link_names_itself_by_its_signature() -> None:
    links = invited(MEMBER, Scope.INVITE, Scope.WORKER).links
    assert len({link.id for link in links}) == 3
    assert {len(link.id) for link in links} == {16}


def test_what_is_signed_has_the_layout_of_the_specification() -> None:
    link = signed(MESH_SEED, MEMBER_KEY, PEER, Scope.WORKER, NOW)
    assert link.signed_bytes(MESH.mesh_key, MESH.mesh_key) == (
        b"libmesh link 1\0"
        + MESH.mesh_key
        + MESH.mesh_key
        + MEMBER_KEY
        + b"\x02\x02"
        + NOW.to_bytes(8, "big")
    )
    endless = replace(link, not_after_unix=None)
    assert endless.signed_bytes(MESH.mesh_key, MESH.mesh_key)[-8:] == b"\xff" * 8


ENDS = st.one_of(st.none(), st.integers(NOW + 1, NOW + 10 * HOUR))


@given(st.lists(st.tuples(st.sampled_from(Scope), ENDS), max_size=MAX_LINKS - 1))
def test_whatever_invites_are_made_their_holder_is_let_in_and_never_with_more(
    wishes: list[tuple[Scope, int | None]],
) -> None:
    authority = MESH
    for number, (scope, end) in enumerate(wishes):
        if authority.links and authority.scope is not Scope.INVITE:
            break
        child = authority.delegate(scope=scope, not_after_unix=end, seed=seed(1000 + number))
        assert child.scope is scope
        assert child.scope <= authority.scope
        assert (child.not_after_unix or 2**64) <= (authority.not_after_unix or 2**64)
        authority = child
    assert reason(authority.admit(MEMBER_KEY)) is None


LINK_CHANGES: dict[str, Callable[[Link], Link]] = {
    "subject": lambda link: replace(link, subject=public(77)),
    "kind": lambda link: replace(link, kind=INVITE if link.kind is PEER else PEER),
    "narrower scope": lambda link: replace(link, scope=Scope.CLIENT),
    "wider scope": lambda link: replace(link, scope=Scope.INVITE),
    "sooner end": lambda link: replace(link, not_after_unix=NOW + 1),
    "no end": lambda link: replace(link, not_after_unix=None),
    "signature": lambda link: replace(link, signature=link.signature[::-1]),
}


@pytest.mark.parametrize("change", LINK_CHANGES)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_no_field_of_any_link_can_be_changed(position: int, change: str) -> None:
    shown = invited(MEMBER, Scope.INVITE, Scope.WORKER, not_after_unix=NOW + HOUR)
    links = list(shown.links)
    links[position] = LINK_CHANGES[change](links[position])
    if links[position] == shown.links[position]:
        return
    assert reason(replace(shown, links=tuple(links))) in {"forged", "malformed", "not_yours", "widened"}


def test_links_of_two_chains_cannot_be_mixed() -> None:
    one = MESH.delegate(scope=Scope.CLIENT, not_after_unix=None, seed=seed(1))
    two = MESH.delegate(scope=Scope.INVITE, not_after_unix=None, seed=seed(2))
    mixed = Credential(mesh_key=MESH.mesh_key, links=(two.links[0], one.admit(MEMBER_KEY).links[1]))
    assert reason(mixed) == "forged"


def test_an_authority_of_the_mesh_key_can_give_everything() -> None:
    authority = Authority.of_mesh(seed(5))
    assert (authority.scope, authority.not_after_unix, authority.links) == (Scope.INVITE, None, ())
    assert authority.mesh_id == keys.mesh_id_of(keys.public_key(seed(5)))


# ── revocations ──────────────────────────────────────────────────────────────────────────────────────────────────


def revoked(*revocations: Revocation) -> Revoked:
    known = Revoked()
    for revocation in revocations:
        assert known.add(revocation)
    return known


def authorities(*scopes: Scope) -> list[Authority]:
    """The mesh's authority and, below it, one for each scope."""
    above = [MESH]
    for number, scope in enumerate(scopes):
        above.append(above[-1].delegate(scope=scope, not_after_unix=None, seed=seed(1000 + number)))
    return above


def test_whoever_stands_above_a_link_can_revoke_it() -> None:
    above = authorities(Scope.INVITE, Scope.INVITE, Scope.CLIENT)
    links = above[-1].admit(MEMBER_KEY).links
    for signer, authority in enumerate(above):
        revocation = authority.revoke(links)
        assert revocation.signer == signer
        assert revocation.link_id == links[-1].id
        assert revocation.is_valid(MESH.mesh_id)
        assert (
            reason(Credential(mesh_key=MESH.mesh_key, links=links), revoked=revoked(revocation)) == "revoked"
        )


def test_nobody_below_or_beside_a_link_can_revoke_it() -> None:
    mesh, inviter, invitee = authorities(Scope.INVITE, Scope.INVITE)
    beside = mesh.delegate(scope=Scope.INVITE, not_after_unix=None, seed=seed(7))
    for authority in (inviter, invitee, beside):
        with pytest.raises(InviteDenied, match="let it in"):
            authority.revoke(inviter.links)


REVOCATION_CHANGES: dict[str, Callable[[Revocation], Revocation]] = {
    "of another mesh": lambda good: replace(good, mesh_key=OTHER_MESH.mesh_key),
    "without links": lambda good: replace(good, links=()),
    "with too many links": lambda good: replace(good, links=good.links * MAX_LINKS),
    "of another link": lambda good: replace(good, links=good.links[:1], signer=0),
    "by another signer": lambda good: replace(good, signer=0),
    "by nobody above": lambda good: replace(good, signer=len(good.links)),
    "by a negative signer": lambda good: replace(good, signer=-1),
    "with another signature": lambda good: replace(good, signature=bytes(64)),
    "of a link that nobody signed": lambda good: replace(
        good, links=(replace(good.links[0], signature=bytes(64)), *good.links[1:])
    ),
    "of a link that widens": lambda good: replace(
        good, links=(replace(good.links[0], scope=Scope.CLIENT), *good.links[1:])
    ),
}


@pytest.mark.parametrize("change", REVOCATION_CHANGES)
def test_a_revocation_is_not_valid(change: str) -> None:
    _, inviter, invitee = authorities(Scope.INVITE, Scope.INVITE)
    good = inviter.revoke(invitee.links)
    assert good.is_valid(MESH.mesh_id)
    assert not REVOCATION_CHANGES[change](good).is_valid(MESH.mesh_id)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_revoking_any_link_cuts_off_what_is_below_and_nothing_else(position: int) -> None:
    shown, beside = invited(MEMBER, Scope.INVITE, Scope.WORKER), credential(MEMBER)
    known = revoked(MESH.revoke(shown.links[: position + 1]))
    assert reason(shown, revoked=known) == "revoked"
    assert reason(beside, revoked=known) is None


def test_a_revocation_by_a_key_that_is_not_above_in_this_chain_counts_for_nothing() -> None:
    """Somebody puts a link that he did not sign into a chain of his own: `is_valid` sees it, and so does `covers`."""
    victim, attacker = (
        invited(MEMBER, Scope.INVITE),
        MESH.delegate(scope=Scope.INVITE, not_after_unix=None, seed=seed(66)),
    )
    claimed = attacker.revoke((*attacker.links, victim.links[1]))
    assert not claimed.is_valid(MESH.mesh_id)
    assert reason(victim, revoked=revoked(claimed)) is None


def test_revocations_are_known_once_and_counted() -> None:
    _, inviter, invitee = authorities(Scope.INVITE, Scope.INVITE)
    known = Revoked()
    by_mesh, by_inviter = MESH.revoke(invitee.links), inviter.revoke(invitee.links)
    assert [known.add(each) for each in (by_mesh, by_inviter, by_mesh)] == [True, True, False]
    assert len(known) == 2
    assert list(known) == [by_mesh, by_inviter]


def test_no_more_revocations_are_kept_than_the_bound() -> None:
    known = Revoked()
    (link,) = credential(MEMBER).links
    one = MESH.revoke((link,))
    for number in range(MAX_REVOCATIONS):
        assert known.add(replace(one, links=(replace(link, signature=number.to_bytes(64, "big")),)))
    assert not known.add(one)
    assert len(known) == MAX_REVOCATIONS
