"""An empty lab for a test, where one can be built."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.netlab.crowd import Forks
from tests.netlab.lab import Lab, open_lab
from tests.netlab.namespaces import available


@pytest.fixture
def lab() -> Iterator[Lab]:
    if missing := available():
        pytest.skip(f"no lab can be built here: {missing}")
    with open_lab() as opened:
        yield opened
        for said in sorted(opened.folder.glob("*.log")):  # pytest shows it of a test that failed
            sys.stdout.write(f"── {said.name} ──\n{said.read_text(errors='replace')}\n")


@pytest.fixture(scope="package")
def forks() -> Iterator[Forks]:
    """Starts peers fast."""
    with Forks() as forks:
        yield forks
