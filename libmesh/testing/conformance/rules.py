"""Rules of the wire as data: what each one says, where the specification says it, and the check that holds it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from libmesh.testing.conformance.bench import Bench

Check = Callable[["Bench"], Awaitable[None]]
"""Returns if the rule is kept; raises `RuleBroken` or `NotApplicable`, and lets errors of the network through."""


class RuleBroken(AssertionError):
    """The peer does not keep the rule; the text says what it did instead."""


class NotApplicable(Exception):
    """The rule cannot be checked here; the text says what would have to be different."""


class Result(Enum):
    """What came of a rule."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "n/a"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One sentence of the specification that can be checked from outside.

    Attributes:
        id: names it, as `<part>.<rule>`. Stable.
        text: what a peer does that keeps it.
        place: where `mesh.proto` says so: a message, or `Message.field`, or the header's paragraph in quotes.
        limit: seconds that its check may take; a peer that needs longer breaks it.
        lasting: it leaves a revocation in the mesh, which nothing removes.
        check: holds a peer to it.
    """

    id: str
    text: str
    place: str
    limit: float
    lasting: bool
    check: Check


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A rule's result. `detail` says why, unless it passed; `seconds` is how long the check took."""

    rule: Rule
    result: Result
    detail: str
    seconds: float


RULES: dict[str, Rule] = {}
"""All rules by id, in the order in which they are checked. Filled as the modules of checks are imported."""


def rule(
    name: str, text: str, *, place: str, limit: float = 10.0, lasting: bool = False
) -> Callable[[Check], Check]:
    """Make the decorated check a rule."""

    def register(check: Check) -> Check:
        assert name not in RULES, name
        RULES[name] = Rule(id=name, text=text, place=place, limit=limit, lasting=lasting, check=check)
        return check

    return register


def require(kept: bool, otherwise: str) -> None:
    """Raise `RuleBroken` with this text unless `kept`."""
    if not kept:
        raise RuleBroken(otherwise)
