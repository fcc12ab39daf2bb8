"""Tokens, as the one who got them sees them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from libmesh import InviteExpired, InviteMalformed, Scope, read_invite
from libmesh.core.credentials import Authority, Invite, LinkKind
from libmesh.invites import check_invite, ways_in
from libmesh.peers import Path, PathKind, PeerState, PeerView, View
from libmesh.tokens import encode_invite
from tests.members import HOUR, MESH, NOW, peer, seed

CONTACTS = ((peer(1), ("/ip4/192.0.2.1/tcp/4001",)), (peer(2), ()))


def invite(scope: Scope = Scope.WORKER, end: int | None = NOW + HOUR) -> Invite:
    authority = MESH.delegate(scope=scope, not_after_unix=end, seed=seed(50))
    return Invite(authority=authority, contacts=CONTACTS)


def test_a_good_token_gives_its_invite() -> None:
    assert check_invite(encode_invite(invite()), now_unix=NOW) == invite()


def test_a_token_can_be_read_by_people() -> None:
    info = read_invite(encode_invite(invite()))
    assert (info.mesh_id, info.scope, info.expires_unix) == (MESH.mesh_id, Scope.WORKER, NOW + HOUR)
    assert info.contacts == (peer(1), peer(2))


def test_ones_own_invite_is_checked_without_tolerance_and_the_error_says_when_it_ended() -> None:
    token = encode_invite(invite(end=NOW))
    check_invite(token, now_unix=NOW)
    with pytest.raises(InviteExpired, match="2027-01-15 08:00 UTC") as caught:
        check_invite(token, now_unix=NOW + 0.001)
    assert caught.value.expired_unix == NOW
    assert read_invite(token).expires_unix == NOW


def test_an_invite_without_an_end_never_expires() -> None:
    check_invite(encode_invite(invite(end=None)), now_unix=2.0**40)


def test_a_typo_is_told_from_an_expiry() -> None:
    token = encode_invite(invite(end=NOW - HOUR))
    with pytest.raises(InviteExpired):
        check_invite(token, now_unix=NOW)
    with pytest.raises(InviteMalformed, match="mistyped"):
        check_invite(token[:50] + ("a" if token[50] != "a" else "b") + token[51:], now_unix=NOW)


def tampered(**changes: object) -> str:
    """A token whose last link was changed after it was signed, with a good checksum."""
    good = invite().authority
    link = replace(good.links[-1], **changes)  # type: ignore[arg-type]
    return encode_invite(Invite(authority=replace(good, links=(link,)), contacts=CONTACTS))


@pytest.mark.parametrize(
    "token",
    [
        tampered(scope=Scope.INVITE),
        tampered(not_after_unix=None),
        tampered(not_after_unix=NOW + 100 * HOUR),
        tampered(signature=bytes(64)),
        encode_invite(Invite(authority=replace(invite().authority, mesh_key=bytes(32)))),
    ],
    ids=["scope", "no end", "later end", "signature", "mesh"],
)
def test_a_token_that_was_tampered_with_is_found_out_before_anybody_is_asked(token: str) -> None:
    with pytest.raises(InviteMalformed, match="tampered"):
        check_invite(token, now_unix=NOW)


def test_the_mesh_key_itself_is_no_token() -> None:
    with pytest.raises(InviteMalformed):
        check_invite(encode_invite(Invite(authority=Authority.of_mesh(MESH.seed))), now_unix=NOW)


def test_a_credential_is_no_token() -> None:
    good = invite().authority
    link = replace(good.links[-1], kind=LinkKind.PEER)
    with pytest.raises(InviteMalformed):
        check_invite(encode_invite(Invite(authority=replace(good, links=(link,)))), now_unix=NOW)


@pytest.mark.parametrize("token", ["", "lm1", "lm2abc", "https://example.com", "lm1" + "A" * 100_000])
def test_other_texts_are_no_tokens(token: str) -> None:
    for use in (read_invite, lambda text: check_invite(text, now_unix=NOW)):
        with pytest.raises(InviteMalformed):
            use(token)


def seen(number: int, *addresses: str, connected: bool = True) -> PeerView:
    return PeerView(
        peer=peer(number), scope=Scope.CLIENT, state=PeerState.ALIVE, services=(), attributes=b"", addresses=addresses,
        path=Path(kind=PathKind.DIRECT, address="") if connected else None, since_unix=0.0, incarnation=1,
    )  # fmt: skip


def test_an_invite_names_its_maker_and_two_peers_those_first_that_are_reached_from_anywhere() -> None:
    near, public = "/ip4/192.168.1.7/tcp/1", "/ip4/8.8.8.8/tcp/1"
    circuit = f"{public}/p2p/{peer(3)}/p2p-circuit"
    peers = (
        seen(1, near),
        seen(2, public, connected=False),
        seen(3, public),
        seen(4, near, circuit),
        seen(5, public),
    )
    view = View(mesh_id=MESH.mesh_id, me=peer(9), scope=Scope.INVITE, peers=peers)
    reached = ((peer(3), (public,)), (peer(4), (circuit, near)), (peer(5), (public,)))
    assert ways_in(view, (near,), following=False) == ((peer(9), (near,)), *reached[:2])
    assert ways_in(view, (near,), following=True) == reached
    alone = View(mesh_id=MESH.mesh_id, me=peer(9), scope=Scope.INVITE, peers=())
    assert ways_in(alone, (near,), following=True) == ((peer(9), (near,)),)
