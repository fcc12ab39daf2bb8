"""When a draft is given up: by counts and costs, and with the real llama-server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing
from libmesh_node import serving
from libmesh_node.datadir import DataDir
from libmesh_node.entries import Entry
from libmesh_node.llama import supervisor
from libmesh_node.llama.drafting import (
    LEAST_STEPS,
    DraftTrial,
    Guesses,
    StepCosts,
    _seconds_per_step,
    read_guesses,
    worth,
)
from libmesh_node.llama.engine import Binary, Engine
from libmesh_node.llama.gguf import read_header
from libmesh_node.llama.server import DraftPlan, ServerPlan, plan_server
from libmesh_node.models.reference import ModelFile, open_model
from libmesh_node.options import NodeOptions
from libmesh_node.snapshot import Process

METRICS = b"""# TYPE llamacpp:spec_decode_num_drafts_total counter
llamacpp:spec_decode_num_draft_tokens_total 231
llamacpp:spec_decode_num_accepted_tokens_total 200
llamacpp:spec_decode_num_drafts_total 31
llamacpp:spec_decode_num_accepted_tokens_per_pos_total{position="0"} 31
"""


def test_counts_are_read_where_the_server_tells_them() -> None:
    assert read_guesses(METRICS) == Guesses(31, 231, 200)
    assert read_guesses(METRICS.replace(b"drafts_total 31", b"drafts_total 3e+e")) is None
    assert read_guesses(b"llamacpp:requests_processing 1\n") is None
    assert read_guesses(b"") is None


@pytest.mark.parametrize(
    ("accepted", "plain", "drafted", "value"),
    [(0, 1.0, 1.5, 1 / 1.5), (500, 1.0, 1.5, 4.0), (100, 1.0, 2.0, 1.0), (0, 1.0, 1.0, 1.0)],
)
def test_worth_is_tokens_in_the_same_time(accepted: int, plain: float, drafted: float, value: float) -> None:
    assert worth(Guesses(100, 800, accepted), StepCosts(plain, drafted)) == pytest.approx(value)


def trial(steps: float, accepted: float, costs: StepCosts | None) -> DraftTrial:
    found = DraftTrial()
    found.saw(Guesses(1000, 9000, 5000))
    found.saw(Guesses(1000 + steps, 9000 + 4 * steps, 5000 + accepted))
    found.costs = costs
    return found


def test_no_verdict_before_enough_was_seen() -> None:
    assert not trial(LEAST_STEPS - 1, 0, StepCosts(1, 2)).due
    assert trial(LEAST_STEPS, 0, StepCosts(1, 2)).due


def test_a_draft_that_guesses_badly_is_given_up_and_it_is_said_why() -> None:
    why = trial(400, 160, StepCosts(0.1, 0.2)).verdict()
    assert why == "its draft guesses right 10 % of the time, which makes it 0.70 times as fast as without"


def test_a_good_draft_is_judged_again_by_what_follows() -> None:
    found = trial(400, 1200, StepCosts(0.1, 0.2))
    assert found.verdict() is None
    assert not found.due
    found.saw(Guesses(2000, 20000, 9000))
    found.saw(Guesses(2000 + LEAST_STEPS, 20000 + 8 * LEAST_STEPS, 9000))
    assert found.due
    assert found.verdict() is not None


def test_nothing_is_given_up_where_costs_are_not_known() -> None:
    found = trial(400, 0, StepCosts(0.1, 0.2))
    found.costs = None
    assert found.verdict() is None
    assert not found.due


def test_a_draft_whose_server_is_never_idle_is_given_up_where_next_to_nothing_is_right() -> None:
    bad, good, early = trial(800, 40, None), trial(800, 400, None), trial(799, 0, None)
    assert (bad.hopeless, good.hopeless, early.hopeless) == (True, False, False)
    assert bad.verdict() == "its draft guesses right 1 % of the time, which brings next to nothing"
    assert not bad.due


async def test_a_busy_server_is_asked_for_no_costs(
    tmp_path: Path, demo_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Its draft is given up all the same if it is hopeless, and stays for now if it is not."""

    async def never(_port: int, *, unsaid: bool = False) -> bool:
        return False

    monkeypatch.setattr(supervisor, "busy", never)
    plan = replace(plan_server(open_model(demo_path), memory_bytes=1 << 30), draft=DraftPlan(path=demo_path))
    binary = Binary(path=tmp_path / "none", version="", rpc_protocol=None, origin="PATH")
    server = supervisor.LlamaServer(binary, plan, log=tmp_path / "log", environment={})
    server.load = replace(server.load, busy=2)
    assert not await server._try_draft(trial(10_000, 2_000, None), b"", 1)
    assert await server._try_draft(trial(800, 40, None), b"", 1)
    assert server.plan.draft is None


def test_a_server_that_does_not_count_is_never_judged() -> None:
    found = DraftTrial()
    for _ in range(3):
        found.saw(None)
    assert not found.due


@pytest.mark.parametrize(
    ("timings", "tokens", "seconds"),
    [
        (b'{"predicted_n": 2, "predicted_ms": 40}', 2, 0.04),
        (b'{"predicted_n": 16, "predicted_ms": 300, "draft_n": 20, "draft_n_accepted": 12}', 16, 0.1),
        (b'{"predicted_n": 16, "predicted_ms": 300, "draft_n": 20, "draft_n_accepted": 15}', 16, None),
        (b'{"predicted_n": 16, "predicted_ms": 300}', 16, None),
        (b'{"predicted_n": 1, "predicted_ms": 40}', 2, None),
        (b'{"predicted_n": 2, "predicted_ms": 0}', 2, None),
        (b'{"predicted_n": "x"}', 2, None),
        (b"[]", 2, None),
        (b"{", 2, None),
    ],
)
def test_a_try_counts_only_if_it_was_what_it_should_be(
    timings: bytes, tokens: int, seconds: float | None
) -> None:
    answer = b'HTTP/1.0 200 OK\r\n\r\n{"timings": ' + timings + b"}"
    assert _seconds_per_step(answer, tokens) == (None if seconds is None else pytest.approx(seconds))


class Sleeper:
    """A server that gives up its draft while it runs."""

    def __init__(self, _binary: object, plan: ServerPlan, **_: object) -> None:
        self.plan, self.base_url, self.abilities = plan, None, None
        self.process = Process(name="llama-server", pid=None, port=0, model="m", status="stopping")

    async def is_busy(self) -> bool:
        return False

    async def run(self) -> None:
        self.plan = replace(self.plan, draft=None)
        await trio.sleep_forever()


async def test_a_draft_that_was_given_up_is_not_tried_again_after_a_sleep(
    tmp_path: Path, demo_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(serving, "LlamaServer", Sleeper)
    models = serving.LocalModels(NodeOptions(data_dir=tmp_path), DataDir(tmp_path), lambda: None)
    models.equipment.engine = Engine(
        llama_server=Binary(path=demo_path, version="", rpc_protocol=None, origin="PATH"), rpc_server=None
    )
    header = read_header(demo_path)
    model = ModelFile(name="m", parts=(demo_path,), size_bytes=1, header=header)
    plan = ServerPlan(model=model, context=4096, draft=DraftPlan(path=demo_path))
    entry = models.entries["m"] = Entry(model, (header,), plan, alone=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(models.run)
        await entry.identified.wait()
        assert await models.rest(entry)
        models.wake(entry.digest)
        assert entry.servers[0].plan.draft is None
        nursery.cancel_scope.cancel()


async def test_a_server_that_gives_up_its_draft_is_waited_for_within_a_limit(
    tmp_path: Path, demo_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    asked: list[bool] = []

    async def always(_port: int, *, unsaid: bool = False) -> bool:
        asked.append(unsaid)
        return True

    monkeypatch.setattr(supervisor, "busy", always)
    plan = plan_server(open_model(demo_path), memory_bytes=1 << 30)
    binary = Binary(path=tmp_path / "none", version="", rpc_protocol=None, origin="PATH")
    server = supervisor.LlamaServer(
        binary, replace(plan, draft=DraftPlan(path=demo_path)), log=tmp_path / "log", environment={}
    )
    began = trio.current_time()
    assert await server._try_draft(trial(400, 0, StepCosts(0.1, 0.2)), b"", 1)
    assert trio.current_time() - began == pytest.approx(supervisor.DRAIN_LIMIT)
    assert all(asked)
    assert server.plan.draft is None
