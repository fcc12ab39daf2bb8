"""The js peer of the examples keeps every rule of the conformance suite, as a member that invited nobody.

It was let in by a peer of ours, and the suite's own peers come with an invite of the same mesh. It resumes no tunnels,
which a peer need not; the rules of that must say so.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import trio

from libmesh.testing.conformance import RULES, Result, Rule, Target, check_rule, read_target

pytestmark = pytest.mark.slow

Lines = subprocess.Popen[str]


@pytest.fixture(scope="session")
def conformance_target(js_peer_command: list[str]) -> Iterator[Target]:
    founder = [sys.executable, "-m", "tests.conformance.peer"]
    with subprocess.Popen(founder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            _, token = _line(process), _line(process)
            command = [*js_peer_command, token, "--expose-to-workers", "for workers=127.0.0.1:9"]
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ) as js:
                try:
                    while not (line := _line(js)).startswith("you are"):
                        pass
                    yield read_target(line.split()[-1], token)
                finally:
                    js.kill()
        finally:
            process.kill()


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.id)
def test_rule(rule: Rule, conformance_target: Target) -> None:
    verdict = trio.run(check_rule, rule, conformance_target)
    resuming = rule.id.startswith("resume.") and rule.id != "resume.no_session"
    expected = Result.NOT_APPLICABLE if resuming else Result.PASSED
    assert verdict.result is expected, f"{rule.text} ({rule.place}): {verdict.detail}"


def _line(process: Lines) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "it ended"
    return line.strip()
