"""An empty lab for a test, where one can be built."""

from __future__ import annotations

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


@pytest.fixture(scope="package")
def forks() -> Iterator[Forks]:
    """Starts peers fast."""
    with Forks() as forks:
        yield forks
