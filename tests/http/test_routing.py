"""Which model a request means."""

from __future__ import annotations

from dataclasses import replace

import pytest
from libmesh_node.http.errors import ApiError
from libmesh_node.http.routing import find_model, pick_model
from libmesh_node.http.wanted import Wanted
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


SIZES = [
    Model(name=name, digest="", size_bytes=size, context_length=context, servers=(server("a", speed=speed),))
    for name, size, context, speed in [
        ("huge", 90, 8192, 2.0),
        ("large", 40, 8192, 15.0),
        ("long", 10, 131072, 60.0),
    ]
]


@pytest.mark.parametrize(
    ("wanted", "picked"),
    [
        (Wanted(), "large"),
        (Wanted(prompt_tokens=20_000), "long"),
        (Wanted(prompt_tokens=8_000, max_tokens=500), "long"),
        (Wanted(prompt_tokens=10**9), "long"),
    ],
    ids=["largest that is fast", "long prompt", "long answer", "fits nowhere"],
)
def test_automatic_choice(wanted: Wanted, picked: str) -> None:
    assert pick_model([*SIZES, COLD], wanted).name == picked


ABLE = [
    *SIZES,
    Model(
        name="caller",
        digest="",
        size_bytes=20,
        context_length=4096,
        servers=(server("a", tools=True), server("b", speed=30.0)),
    ),
    Model(name="seer", digest="", size_bytes=5, context_length=4096, servers=(server("a", vision=True),)),
    Model(
        name="long-caller", digest="", size_bytes=1, context_length=8192, servers=(server("a", tools=True),)
    ),
]


@pytest.mark.parametrize(
    ("wanted", "picked"),
    [
        (Wanted(), "large"),
        (Wanted(tools=True), "caller"),
        (Wanted(vision=True), "seer"),
        (Wanted(tools=True, prompt_tokens=6000), "long-caller"),
        (Wanted(tools=True, prompt_tokens=10**6), "long-caller"),
    ],
    ids=["text", "tools", "pictures", "long with tools", "too long with tools"],
)
def test_automatic_choice_is_of_what_takes_all_that_the_request_brings(wanted: Wanted, picked: str) -> None:
    assert pick_model(ABLE, wanted).name == picked


def test_automatic_choice_says_what_nobody_takes() -> None:
    with pytest.raises(ApiError) as caught:
        pick_model(ABLE, Wanted(tools=True, vision=True))
    assert (caught.value.status, caught.value.code) == (400, "no_capable_model")
    assert "tools are taken by `caller`, `long-caller`; pictures are taken by `seer`" in str(caught.value)
    with pytest.raises(ApiError, match="pictures are taken by none"):
        pick_model(SIZES, Wanted(vision=True))


def test_automatic_choice_is_to_be_tried_again_while_a_model_is_coming_that_may_take_it() -> None:
    coming = replace(model("late"), coming=True)
    with pytest.raises(ApiError, match="`late` may") as caught:
        pick_model([*SIZES, coming], Wanted(vision=True))
    assert (caught.value.status, caught.value.code) == (503, "no_capable_model")
    assert caught.value.retry_after
    with pytest.raises(ApiError) as caught:
        pick_model([*SIZES, COLD], Wanted(vision=True))
    assert caught.value.status == 400


def test_automatic_choice_is_of_what_sleeps_if_nothing_that_is_served_will_do() -> None:
    asleep, dull = replace(model("asleep"), coming=True, tools=True), replace(model("dull"), coming=True)
    assert pick_model([COLD, dull], Wanted()) is dull
    assert pick_model([COLD, dull, asleep], Wanted(tools=True)) is asleep
    assert pick_model([*SIZES, asleep], Wanted(tools=True)) is asleep
    assert pick_model([*ABLE, asleep], Wanted(tools=True)).name == "caller"
    assert pick_model([*SIZES, asleep], Wanted()).name == "large"


def test_automatic_choice_is_of_what_lies_on_a_disk_if_there_is_nothing_else() -> None:
    small, large = (replace(model(name), standbys=1) for name in ("small", "large"))
    large = replace(large, size_bytes=2)
    asleep = replace(model("asleep"), coming=True)
    assert pick_model([COLD, small, large], Wanted()) is large
    assert pick_model([COLD, small, large, asleep], Wanted()) is asleep
    assert pick_model([*SIZES, replace(small, size_bytes=1000)], Wanted()).name == "large"
    with pytest.raises(ApiError, match="names one waits for it") as caught:
        pick_model([COLD, small], Wanted(tools=True))
    assert caught.value.status == 503


def test_automatic_choice_of_nothing_is_refused() -> None:
    with pytest.raises(ApiError, match="names one waits for it: `Mistral-7B`") as caught:
        pick_model([COLD], Wanted())
    assert (caught.value.status, caught.value.code) == (503, "no_models")
    with pytest.raises(ApiError, match=r"`Mistral-7B`\. It has too little memory\."):
        pick_model([COLD], Wanted(), ["It has too little memory."])


def test_without_models_the_error_tells_what_is_wrong_with_the_node() -> None:
    with pytest.raises(ApiError, match="Nobody in the mesh answers"):
        find_model((), "x", ("Nobody in the mesh answers; this node keeps trying.",))
    with pytest.raises(ApiError, match="libmesh-node --model"):
        find_model((), "x")
