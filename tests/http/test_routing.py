"""Which model, which server: tables and properties."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.http.errors import ApiError
from libmesh_node.http.routing import choose_server, find_model
from libmesh_node.snapshot import Model, Server


def server(peer: str, **changes: object) -> Server:
    return Server(**({"peer": peer, "base_url": f"http://{peer}", "local": False, "slots": 4} | changes))


def model(name: str, *servers: Server, digest: str = "") -> Model:
    return Model(name=name, digest=digest or f"d-{name}", size_bytes=1, context_length=1, servers=servers)


QWEN = model("Qwen3-8B-Q4_K_M", server("a"))
LLAMA = model("Llama-3.2-3B-Instruct-Q4_K_M", server("b"))
COLD = model("Mistral-7B")


def test_exact_name_or_whole_digest_finds_a_model() -> None:
    assert find_model((QWEN, LLAMA), LLAMA.name) is LLAMA
    assert find_model((QWEN, LLAMA), QWEN.digest) is QWEN
    assert find_model((QWEN, COLD), COLD.name) is COLD


@pytest.mark.parametrize(
    "name", ["qwen3-8b-q4_k_m", "Qwen3-8B", "Qwen3-8B-Q4_K_M ", "Qwen3-8B-Q4_K_M.gguf", "d-"]
)
def test_similar_name_is_never_taken_for_a_model(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        find_model((QWEN, LLAMA), name)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")


def test_near_names_are_told_whatever_their_case() -> None:
    with pytest.raises(ApiError, match="Did you mean `Qwen3-8B-Q4_K_M`"):
        find_model((QWEN, LLAMA), "qwen3-8b-q4_k_m")
    with pytest.raises(ApiError, match="It has `Qwen3-8B-Q4_K_M`, `Llama"):
        find_model((QWEN, LLAMA), "zzz")


def test_long_names_and_long_lists_are_cut_in_the_answer() -> None:
    with pytest.raises(ApiError) as caught:
        find_model([model(f"m{i}") for i in range(500)], "x" * 1_000_000)
    assert len(str(caught.value)) < 1000
    assert "and 480 more" in str(caught.value)


def test_without_a_name_the_only_served_model_is_meant() -> None:
    assert find_model((QWEN, COLD), None) is QWEN
    assert find_model((QWEN, COLD), "") is QWEN
    assert find_model((COLD,), None) is COLD
    with pytest.raises(ApiError, match="`Qwen3-8B-Q4_K_M`, `Llama-") as caught:
        find_model((QWEN, LLAMA, COLD), None)
    assert caught.value.status == 400


def test_of_two_files_with_one_name_the_served_one_is_meant() -> None:
    assert find_model((model("m", digest="1"), model("m", server("a"), digest="2")), "m").digest == "2"


def test_without_any_model_nothing_is_found_for_now() -> None:
    with pytest.raises(ApiError) as caught:
        find_model((), "m")
    assert caught.value.status == 503
    assert caught.value.retry_after


@pytest.mark.parametrize(
    ("servers", "in_flight", "tried", "chosen"),
    [
        ((server("a", rtt=0.010), server("b", rtt=0.001)), {}, (), "b"),
        ((server("a", rtt=0.010), server("b", rtt=0.001)), {"http://b": 1}, (), "a"),
        ((server("a", local=True), server("b", rtt=0.0001)), {}, (), "a"),
        ((server("a", slots=1), server("b", slots=8, rtt=0.2)), {"http://a": 1, "http://b": 7}, (), "b"),
        ((server("a"), server("b", rtt=0.5)), {}, (), "b"),
        ((server("a", rtt=0.010), server("b", rtt=0.001)), {}, ("http://b",), "a"),
        ((server("a", slots=0),), {"http://a": 5}, (), "a"),
    ],
    ids=["nearest", "least loaded", "local", "per slot", "measured", "untried", "only one"],
)
def test_choice(
    servers: tuple[Server, ...], in_flight: dict[str, int], tried: tuple[str, ...], chosen: str
) -> None:
    for seed in range(10):
        found = choose_server(servers, in_flight, tried, random.Random(seed))
        assert found is not None
        assert found.peer == chosen


def test_when_all_are_tried_none_is_chosen() -> None:
    assert choose_server((server("a"),), {}, ("http://a",), random.Random(0)) is None
    assert choose_server((), {}, (), random.Random(0)) is None


@given(
    st.lists(
        st.tuples(st.integers(1, 8), st.sampled_from([None, 0.001, 0.0012, 0.2])), min_size=1, max_size=6
    ),
    st.integers(0, 99),
)
def test_load_stays_in_proportion_to_slots(shapes: list[tuple[int, float | None]], seed: int) -> None:
    servers = [server(f"p{i}", slots=slots, rtt=rtt) for i, (slots, rtt) in enumerate(shapes)]
    in_flight: Counter[str] = Counter()
    for _ in range(50):
        chosen = choose_server(servers, in_flight, (), random.Random(seed))
        assert chosen is not None
        in_flight[chosen.base_url] += 1
    loads = [in_flight[each.base_url] / each.slots for each in servers]
    assert max(loads) - min(loads) <= 1


def test_without_models_the_error_tells_what_is_wrong_with_the_node() -> None:
    with pytest.raises(ApiError, match="Nobody in the mesh answers"):
        find_model((), "x", ("Nobody in the mesh answers; this node keeps trying.",))
    with pytest.raises(ApiError, match="libmesh-node --model"):
        find_model((), "x")
