"""The rules as pytest cases, for the tests of an implementation: `from …conformance.cases import *`.

The importing module defines a fixture `conformance_target` that returns a `Target`, of any scope. Its peer must run in
another process or thread, as each case runs an event loop of its own. Needs pytest.
"""

from __future__ import annotations

import pytest
import trio

from libmesh.testing.conformance import RULES, Result, Rule, Target, check_rule

__all__ = ["test_rule"]


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.id)
def test_rule(rule: Rule, conformance_target: Target) -> None:
    """The peer keeps the rule, as far as it can be checked here."""
    verdict = trio.run(check_rule, rule, conformance_target)
    if verdict.result is Result.NOT_APPLICABLE:
        pytest.skip(verdict.detail)
    assert verdict.result is Result.PASSED, f"{rule.text} ({rule.place}): {verdict.detail}"
