"""Every input that the fuzzer kept, and every seed, through its target. Without a fuzzer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
MOST_BYTES = 200_000


@pytest.mark.parametrize("name", TARGETS)
def test_no_kept_input_breaks_its_rule(name: str) -> None:
    target = TARGETS[name]
    kept = sorted((CORPUS / name).glob("*")) if (CORPUS / name).is_dir() else []
    inputs = [(path.name, path.read_bytes()) for path in kept]
    inputs += [(f"seed {number}", data) for number, data in enumerate(target.seeds())]
    for title, data in [("nothing", b""), *inputs]:
        try:
            target.check(data)
        except Exception as exc:
            raise AssertionError(f"{title} breaks the rule: {target.rule}") from exc


def test_the_corpus_is_small_and_belongs_to_targets() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= set(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < MOST_BYTES
