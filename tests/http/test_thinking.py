"""A model that thinks before it speaks, on real llama-servers, one of which dies in the middle of a thought or of the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http.conftest import Llama, call, llama_server, running_node
from tests.http.test_takeover import way

pytestmark = pytest.mark.llama

PATH = "/v1/chat/completions"

TEMPLATE = """{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['role'] == 'assistant' and message['reasoning_content'] -%}
{{- '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- message['content'] + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|><think>\\n' -}}{%- endif -%}"""

ASK: dict[str, Any] = {
    "model": "tiny",
    "stream": True,
    "max_tokens": 30,
    "messages": [{"role": "user", "content": "Hello?"}],
    "stream_options": {"include_usage": True},
}


@pytest.fixture(scope="module")
def thinker(
    llama_binary: Path, model_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Llama]:
    template = tmp_path_factory.mktemp("template") / "thinking.jinja"
    template.write_text(TEMPLATE)
    with llama_server(llama_binary, model_files["tiny"], "--chat-template-file", str(template)) as llama:
        yield llama


def thoughts(stream: bytes) -> tuple[str, int]:
    """The reasoning, and how many tokens were counted."""
    thought, tokens = "", 0
    for line in stream.splitlines():
        if line.startswith(b"data: {"):
            value = json.loads(line.removeprefix(b"data: "))
            tokens = (value.get("usage") or {}).get("completion_tokens", tokens)
            for choice in value.get("choices", ()):
                thought += choice["delta"].get("reasoning_content") or ""
    return thought, tokens


def ask_with_a_death(thinker: Llama, request: dict[str, Any], after: int) -> bytes:
    with way(thinker.port, after) as dying, way(thinker.port) as good:
        servers = (
            thinker.server("dying", base_url=dying.url, digest="d", rtt=0.001, local=False),
            thinker.server("good", base_url=good.url, digest="d", rtt=9.0, local=False),
        )
        with running_node(thinker.served(*servers)) as node:
            _, headers, body = call(node.api_port, "POST", PATH, request)
    assert (headers["x-libmesh-node"], good.taken) == ("dying", 1)
    return body


def test_thought_goes_on_where_nothing_is_left_to_chance(thinker: Llama) -> None:
    request = ASK | {"temperature": 0}
    unbroken = call(thinker.port, "POST", PATH, request)[2]
    thought, tokens = thoughts(unbroken)
    assert thought
    body = ask_with_a_death(thinker, request, len(unbroken) // 2)
    assert thoughts(body) == (thought, tokens)
    assert body.rstrip().endswith(b"data: [DONE]")
