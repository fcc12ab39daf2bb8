"""Verdicts for people, and for programs."""

from __future__ import annotations

import textwrap
from typing import Any

from libmesh.testing.conformance.rules import RULES, Result, Verdict
from libmesh.testing.conformance.runner import Report

TEXT_WIDTH = 80
_MARGIN = 8


def heading() -> str:
    """The table's first two lines."""
    return f"{_line('result', 'rule', 'place in mesh.proto', 'text')}\n{_line('──────', '────', '───────────────────', '────')}"


def row(verdict: Verdict) -> str:
    """The lines of one verdict: the rule's text, and under it why it was not kept."""
    said = textwrap.wrap(verdict.rule.text, TEXT_WIDTH)
    if verdict.detail:
        said += textwrap.wrap(f"→ {verdict.detail}", TEXT_WIDTH, subsequent_indent="  ")[:6]
    first = _line(verdict.result.value, verdict.rule.id, verdict.rule.place, said[0])
    return "\n".join([first, *(_line("", "", "", more) for more in said[1:])])


def _line(result: str, name: str, place: str, text: str) -> str:
    widest = max(len(rule_id) for rule_id in RULES)
    places = max(len("place in mesh.proto"), *(len(rule.place) for rule in RULES.values()))
    return f"{result:<{_MARGIN}}{name:<{widest}}  {place:<{places}}  {text}".rstrip()


def summary(report: Report) -> str:
    """One line."""
    took = sum(verdict.seconds for verdict in report.verdicts)
    return (
        f"{report.count(Result.PASSED)} passed, {report.count(Result.FAILED)} failed, "
        f"{report.count(Result.NOT_APPLICABLE)} not applicable, in {took:.1f} s"
    )


def as_json(report: Report) -> dict[str, Any]:
    """All of it, for `json.dumps`."""
    return {
        "peer": report.target.peer,
        "address": report.target.address,
        "passed": report.count(Result.PASSED),
        "failed": report.count(Result.FAILED),
        "not_applicable": report.count(Result.NOT_APPLICABLE),
        "rules": [
            {
                "id": verdict.rule.id,
                "text": verdict.rule.text,
                "place": verdict.rule.place,
                "result": verdict.result.value,
                "detail": verdict.detail,
                "seconds": round(verdict.seconds, 3),
            }
            for verdict in report.verdicts
        ],
    }
