"""Peers that compare wrongly, or keep their followers in the dark."""

from __future__ import annotations

from typing import Any

from libmesh import hello, wire
from libmesh.core import summary
from libmesh.core.membership import Membership
from libmesh.core.summary import Part
from libmesh.following import Herald
from tests.conformance.mutants.base import Patch, mutant


@mutant("compare.parts", "it tells no parts")
def agrees_with_everybody(patch: Patch) -> None:
    encode = wire.encode_summary
    patch.setattr(wire, "encode_summary", lambda fingerprint, parts: encode(fingerprint, None))


@mutant("compare.same", "it tells its parts")
def never_agrees(patch: Patch) -> None:
    encode = wire.encode_summary

    def always_parts(fingerprint: bytes, parts: Any) -> bytes:
        return encode(fingerprint, parts or summary.Summary((bytes(8),) * 64, bytes(8)))

    patch.setattr(wire, "encode_summary", always_parts)


@mutant("compare.rows", "are not those of its digest")
def spreads_rows_by_another_hash(patch: Patch) -> None:
    bucket_of = summary.bucket_of
    patch.setattr(summary, "bucket_of", lambda peer: (bucket_of(peer) + 1) % 64)


@mutant("digest.part", "that was not asked for")
def answers_with_all_of_its_rows(patch: Patch) -> None:
    digest = Membership.digest

    def whole(self: Membership, part: Part | None = None) -> summary.Digest:
        return digest(self)

    patch.setattr(Membership, "digest", whole)


@mutant("follow.lacking", "it did not tell that")
def tells_followers_nothing(patch: Patch) -> None:
    patch.setattr(Herald, "_news_of", lambda self, peer: b"")


@mutant("follow.news", "it did not tell that")
def tells_followers_only_what_was(patch: Patch) -> None:
    patch.setattr(Herald, "notice", lambda self, peer: None)


@mutant("follow.unlisted", "it lists one")
def lists_its_followers(patch: Patch) -> None:
    encode = wire.encode_digest
    followers = []
    answer = hello.answer

    async def remember(stream: Any, greeting: Any) -> Any:
        greeted = await answer(stream, greeting)
        if greeted.following:
            followers.append(stream.peer)
        return greeted

    def with_them(digest: summary.Digest) -> bytes:
        ages = dict(digest.ages) | dict.fromkeys(followers, (1, 1))
        return encode(summary.Digest(ages, digest.dead, digest.part))

    patch.setattr(hello, "answer", remember)
    patch.setattr(wire, "encode_digest", with_them)
