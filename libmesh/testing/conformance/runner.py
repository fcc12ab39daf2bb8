"""Runs the rules against a peer, one after the other, each with connections of its own."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

import trio
from google.protobuf.message import DecodeError

from libmesh.errors import MeshError
from libmesh.testing.conformance.bench import Bench, Target
from libmesh.testing.conformance.rules import RULES, NotApplicable, Result, Rule, RuleBroken, Verdict

WHOLE_LIMIT = 300.0
"""Seconds for all rules. Those that are not reached have failed."""

WHAT_PEERS_CAUSE = (MeshError, trio.BrokenResourceError, trio.ClosedResourceError, DecodeError, OSError)
"""Errors that a peer can bring about in a check; all others are mistakes of the suite and are raised."""


async def check_rule(rule: Rule, target: Target) -> Verdict:
    """Hold the peer to one rule. Never raises for what the peer does."""
    started = time.monotonic()
    result, detail = await _result(rule, target)
    return Verdict(rule=rule, result=result, detail=detail, seconds=time.monotonic() - started)


async def _result(rule: Rule, target: Target) -> tuple[Result, str]:
    try:
        with trio.fail_after(rule.limit):
            await rule.check(Bench(target=target))
    except trio.TooSlowError:
        return Result.FAILED, f"nothing was decided within {rule.limit:.0f} s"
    except Exception as exc:
        cause = _first(exc)
        if isinstance(cause, NotApplicable):
            return Result.NOT_APPLICABLE, str(cause)
        if isinstance(cause, RuleBroken):
            return Result.FAILED, str(cause)
        if isinstance(cause, WHAT_PEERS_CAUSE):
            return Result.FAILED, f"{type(cause).__name__}: {cause}"
        raise
    return Result.PASSED, ""


def _first(exc: BaseException) -> BaseException:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


def chosen(only: Iterable[str] = (), *, lasting: bool = True) -> list[Rule]:
    """The rules whose ids start with any of `only`, or all; without `lasting` those that leave nothing behind."""
    wanted = tuple(only)
    return [
        rule
        for rule in RULES.values()
        if (not wanted or rule.id.startswith(wanted)) and (lasting or not rule.lasting)
    ]


async def check_all(
    target: Target, *, rules: Iterable[Rule] | None = None, limit: float = WHOLE_LIMIT
) -> AsyncIterator[Verdict]:
    """Hold the peer to `rules`, all by default, in turn, for at most `limit` seconds. Verdicts come as they are made."""
    ends = trio.current_time() + limit
    for rule in chosen() if rules is None else rules:
        if trio.current_time() >= ends:
            yield Verdict(
                rule=rule, result=Result.FAILED, detail=f"not reached in {limit:.0f} s", seconds=0.0
            )
        else:
            yield await check_rule(rule, target)


async def is_reachable(target: Target) -> str | None:
    """Why there is no connection to the peer; `None` if there is one."""
    try:
        with trio.fail_after(15):
            async with Bench(target=target).stranger():
                return None
    except trio.TooSlowError:
        return f"the peer {target.peer} did not answer within 15 s"
    except Exception as exc:
        cause = _first(exc)
        if not isinstance(cause, (MeshError, RuleBroken)):
            raise
        return str(cause)


@dataclass(frozen=True, slots=True)
class Report:
    """The verdicts of a run, in the order of the rules."""

    target: Target
    verdicts: tuple[Verdict, ...]

    def count(self, result: Result) -> int:
        """How many rules had this result."""
        return sum(verdict.result is result for verdict in self.verdicts)

    @property
    def kept(self) -> bool:
        """Whether no rule failed."""
        return self.count(Result.FAILED) == 0


async def run_conformance(
    target: Target,
    *,
    rules: Iterable[Rule] | None = None,
    limit: float = WHOLE_LIMIT,
    tell: Callable[[Verdict], None] = lambda _: None,
) -> Report:
    """Hold the peer to all rules; `tell` hears each verdict as it is made."""
    verdicts = []
    async for verdict in check_all(target, rules=rules, limit=limit):
        verdicts.append(verdict)
        tell(verdict)
    return Report(target, tuple(verdicts))
