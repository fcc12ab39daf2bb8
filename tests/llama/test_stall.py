from __future__ import annotations

import os

from libmesh_node.llama.stall import Progress, cpu_seconds


def test_any_sign_of_life_is_enough() -> None:
    progress = Progress(10.0)
    assert not progress.stalled(0.0, 1, 5, 0.1)
    assert not progress.stalled(10.0, 1, 5, 0.1)
    assert progress.stalled(10.1, 1, 5, 0.1)
    for at, signs in ((10.2, (2, 5, 0.1)), (20.0, (2, 6, 0.1)), (30.0, (2, 6, 0.2))):
        assert not progress.stalled(at, *signs)
    assert progress.stalled(40.1, 2, 6, 0.2)


def test_processor_time_grows_with_work_and_is_unknown_for_who_is_gone() -> None:
    before = cpu_seconds(os.getpid())
    assert before is not None
    while cpu_seconds(os.getpid()) == before:
        sum(range(10_000))
    assert cpu_seconds(2**22 + 1) is None
