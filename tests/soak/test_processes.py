"""Some seconds of the soak with real processes. By hand, for as long as you like: `python -m tests.soak.run 1800`."""

from __future__ import annotations

import pytest

from tests.soak.run import soak


@pytest.mark.slow
async def test_kills_pauses_and_cancels_leave_the_survivors_as_they_were() -> None:
    await soak(30, seed=1)
