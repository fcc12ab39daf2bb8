"""Every input that the fuzzer kept, and every seed, through its target. Without a fuzzer."""

from __future__ import annotations

import pytest

from tests.fuzz.targets import CORPUS, TARGETS, kept_inputs

MOST_BYTES = 200_000


@pytest.mark.parametrize("name", TARGETS)
def test_no_kept_input_breaks_its_rule(name: str) -> None:
    target = TARGETS[name]
    for data in (b"", *target.seeds(), *kept_inputs(name)):
        try:
            target.check(data)
        except Exception as exc:
            raise AssertionError(f"{data.hex()} breaks the rule: {target.rule}") from exc


def test_the_corpus_is_small_and_belongs_to_targets() -> None:
    files = list(CORPUS.iterdir())
    assert {path.name for path in files} <= {f"{name}.txt" for name in TARGETS}
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
