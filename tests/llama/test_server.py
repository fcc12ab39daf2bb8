from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from libmesh_node.llama.cache import F16
from libmesh_node.llama.engine import Binary
from libmesh_node.llama.gguf import GgufHeader, read_header
from libmesh_node.llama.server import (
    DEMO_TOKENS,
    MAX_CONTEXT,
    MIN_CONTEXT,
    DraftPlan,
    ServerPlan,
    SplitPlan,
    child_environment,
    choose_context,
    plan_server,
    server_args,
)
from libmesh_node.models.reference import ModelFile

GB = 10**9


@pytest.fixture
def header(demo_path: Path) -> GgufHeader:
    """A 7B model with grouped heads: 128 KiB of cache a token, trained for 32,768."""
    known = read_header(demo_path)
    return replace(
        known, context_length=32_768, n_layers=32, kv_heads=(8,) * 32, key_length=128, value_length=128
    )


def model(header: GgufHeader, name: str = "m", size: int = 4 * GB, **others: bool) -> ModelFile:
    return ModelFile(name=name, parts=(Path("/m.gguf"),), size_bytes=size, header=header, **others)


def binary(*flags: str) -> Binary:
    return Binary(
        path=Path("/bin/llama-server"), version="", rpc_protocol=None, origin="PATH", flags=frozenset(flags)
    )


def option(arguments: list[str], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


@pytest.mark.parametrize(
    ("free", "slots", "context"),
    [
        (100 * GB, 4, MAX_CONTEXT),
        (100 * GB, 1, 32_768),
        (5 * GB, 4, 34_048),
        (2 * GB, 4, 11_008),
        (0, 4, MIN_CONTEXT),
        (-GB, 4, MIN_CONTEXT),
    ],
)
def test_context_is_what_the_memory_holds(header: GgufHeader, free: int, slots: int, context: int) -> None:
    assert choose_context(header, free, slots) == context


@pytest.mark.parametrize(
    ("size", "kind", "tokens"), [(4 * GB, "f16", 11_008), (5 * GB, "q8_0", 20_992), (50 * GB, "q4_0", 39_680)]
)
def test_large_models_have_a_smaller_cache_and_so_more_context(
    header: GgufHeader, size: int, kind: str, tokens: int
) -> None:
    plan = plan_server(model(header, size=size), memory_bytes=size + 2 * GB)
    assert (plan.cache.name, plan.context) == (kind, tokens)
    arguments = server_args(binary(), plan, 1)
    given = None if kind == "f16" else kind
    assert (option(arguments, "--cache-type-k"), option(arguments, "--cache-type-v")) == (given, given)


@pytest.mark.parametrize(
    "others",
    [
        {"key_length": 80},
        {"value_length": 40},
        {"architecture": "grok"},
        {"architecture": "x", "values": {"x.attention.value_length_swa": 72}},
    ],
)
def test_heads_that_cannot_be_quantised_keep_their_cache(header: GgufHeader, others: dict[str, Any]) -> None:
    assert plan_server(model(replace(header, **others), size=80 * GB), memory_bytes=0).cache is F16


def test_context_never_exceeds_what_the_model_can_use(header: GgufHeader) -> None:
    short = replace(header, context_length=2048)
    assert choose_context(short, 100 * GB, 4) == 8192
    assert choose_context(short, 0, 4) == 2048
    silent = replace(header, context_length=0, kv_heads=())
    assert choose_context(silent, 100 * GB, 1) == MIN_CONTEXT


def test_prompt_cache_takes_a_small_part_of_what_is_left(header: GgufHeader) -> None:
    assert plan_server(model(header), memory_bytes=20 * GB).prompt_cache_mib == 953
    assert plan_server(model(header), memory_bytes=3 * GB).prompt_cache_mib == 0
    assert plan_server(model(header), memory_bytes=900 * GB).prompt_cache_mib == 8192


def test_server_listens_on_loopback_only_and_bears_the_models_name(header: GgufHeader) -> None:
    arguments = server_args(binary(), ServerPlan(model=model(header), context=4096), 1234)
    assert arguments[0] == "/bin/llama-server"
    assert option(arguments, "--host") == "127.0.0.1"
    assert option(arguments, "--port") == "1234"
    assert option(arguments, "--alias") == "m"
    assert option(arguments, "--n-gpu-layers") == "99"
    assert option(arguments, "--n-predict") is None


def test_options_that_a_build_does_not_know_are_left_out(header: GgufHeader) -> None:
    plan = ServerPlan(model=model(header), context=4096)
    assert "--no-webui" not in server_args(binary(), plan, 1)
    arguments = server_args(binary("--no-webui", "--cache-ram", "--embeddings", "--pooling"), plan, 1)
    assert {"--no-webui", "--embeddings"} <= set(arguments)
    assert option(arguments, "--cache-ram") == "512"
    assert option(arguments, "--pooling") == "mean"


def test_model_made_for_embeddings_keeps_its_own_pooling(header: GgufHeader) -> None:
    plan = ServerPlan(model=model(replace(header, pooling=2)), context=4096)
    assert "--pooling" not in server_args(binary("--embeddings", "--pooling"), plan, 1)


def test_demo_answers_end(header: GgufHeader) -> None:
    plan = ServerPlan(model=model(header, is_demo=True), context=4096)
    assert option(server_args(binary(), plan, 1), "--n-predict") == str(DEMO_TOKENS)


@pytest.mark.parametrize(
    ("device", "given"), [(None, None), ("CUDA1", "CUDA1"), ("cpu", "none"), ("CPU", "none")]
)
def test_device_is_passed_on(header: GgufHeader, device: str | None, given: str | None) -> None:
    plan = plan_server(model(header), memory_bytes=0, device=device)
    assert option(server_args(binary(), plan, 1), "--device") == given


def test_comma_in_a_name_makes_no_second_name(header: GgufHeader) -> None:
    plan = ServerPlan(model=model(header, name="a,b"), context=4096)
    assert option(server_args(binary(), plan, 1), "--alias") == plan.alias == "a_b"


def test_environment_loses_what_would_change_the_server() -> None:
    parent = {"LLAMA_ARG_HOST": "0.0.0.0", "LLAMA_API_KEY": "k", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1"}
    expected = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1", "GGML_NO_BACKTRACE": "1"}
    assert child_environment(parent) == expected


def test_rpc_comes_before_the_devices_that_it_makes(header: GgufHeader) -> None:
    split = SplitPlan(ports=(11, 12), layers=(20, 13), home_layers=0)
    plan = ServerPlan(model=model(header), context=4096, split=split, prompt_cache_mib=512)
    arguments = server_args(binary("--cache-ram"), plan, 1234)
    assert arguments[1:3] == ["--rpc", "127.0.0.1:11,127.0.0.1:12"]
    assert option(arguments, "--device") == "RPC0,RPC1"
    assert option(arguments, "--tensor-split") == "20,13"
    assert option(arguments, "--n-gpu-layers") == "33"
    assert option(arguments, "--cache-ram") == "0"
    assert option(arguments, "--fit") == "off"


def test_a_processor_keeps_the_first_layers_and_a_gpu_the_last(header: GgufHeader) -> None:
    home = SplitPlan(ports=(11,), layers=(25,), home_layers=8, logits_home=True)
    arguments = server_args(binary(), ServerPlan(model=model(header), context=4096, split=home), 1234)
    assert option(arguments, "--n-gpu-layers") == "25"
    assert option(arguments, "--override-tensor") == "^(output|token_embd)\\.weight=CPU"
    assert option(arguments, "--tensor-split") is None
    gpu = SplitPlan(ports=(11,), layers=(10, 23), own_devices=("CUDA0",))
    arguments = server_args(binary(), ServerPlan(model=model(header), context=4096, split=gpu), 1234)
    assert option(arguments, "--device") == "RPC0,CUDA0"
    assert option(arguments, "--n-gpu-layers") == "33"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ("--spec-type", "--spec-draft-n-max", "--device-draft"),
            "--spec-type draft-simple --spec-draft-n-max 4 --device-draft none",
        ),
        (("--draft-max", "-devd"), "--draft-max 4 -devd none"),
        ((), ""),
    ],
)
def test_a_draft_stays_at_home_in_the_words_of_the_build(
    header: GgufHeader, flags: tuple[str, ...], expected: str
) -> None:
    plan = ServerPlan(model=model(header), context=4096, draft=DraftPlan(path=Path("/d.gguf"), tokens=4))
    arguments = server_args(binary(*flags), plan, 1234)
    at = arguments.index("--model-draft")
    assert arguments[at + 1] == "/d.gguf"
    assert " ".join(arguments[at + 2 : at + 2 + len(expected.split())]) == expected
