"""The real `anthropic` client, which is what Claude Code speaks, against real llama-servers through the API."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.http.conftest import Llama, Node

pytestmark = pytest.mark.llama

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
GREEDY = {"temperature": 0}


@pytest.fixture
def client(two_models: Node) -> Iterator[anthropic.Anthropic]:
    url = f"http://127.0.0.1:{two_models.api_port}"
    with anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0) as made:
        yield made


def test_message_has_text_and_usage(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(model="tiny", max_tokens=8, messages=HELLO, system="Be brief.")
    assert answer.content[0].type == "text"
    assert answer.content[0].text
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == 8
    assert answer._request_id


def test_stream_gives_the_same_text_in_pieces(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(model="tiny", max_tokens=8, messages=HELLO, extra_body=GREEDY).content[0]
    assert whole.type == "text"
    with client.messages.stream(model="tiny", max_tokens=8, messages=HELLO, extra_body=GREEDY) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == whole.text
    assert len(pieces) > 1
    assert final.usage.output_tokens == 8


@pytest.mark.parametrize(
    ("system", "content"),
    [
        (anthropic.omit, "Hello"),
        ("Be brief.", [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]),
        (
            [
                {"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "x"},
            ],
            "Hi",
        ),
    ],
)
def test_plain_talk_streams_as_llama_server_itself_would_have_it(
    client: anthropic.Anthropic, llamas: dict[str, Llama], system: Any, content: Any
) -> None:
    """On its way it is a chat completion, so that another server could go on with it."""
    messages: list[Any] = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "So"},
        {"role": "user", "content": "?"},
    ]
    told: list[tuple[object, ...]] = []
    with anthropic.Anthropic(base_url=llamas["tiny"].url, api_key="x", max_retries=0) as direct:
        for asked in (direct, client):
            with asked.messages.stream(
                model="tiny", max_tokens=8, messages=messages, system=system, extra_body=GREEDY
            ) as stream:
                kinds = [event.type for event in stream]
                final = stream.get_final_message()
            read = final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0)
            told.append(
                (kinds, final.content, final.stop_reason, final.model, read, final.usage.output_tokens)
            )
    assert told[0] == told[1]


def test_tokens_are_counted_without_an_answer(client: anthropic.Anthropic) -> None:
    assert client.messages.count_tokens(model="other", messages=HELLO).input_tokens > 0


def test_errors_raise_the_clients_own_classes(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="Did you mean `tiny`") as missing:
        client.messages.create(model="tinny", max_tokens=8, messages=HELLO)
    assert missing.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="context size"):
        client.messages.create(
            model="tiny", max_tokens=8, messages=[{"role": "user", "content": "word " * 20_000}]
        )


def test_same_key_or_none_makes_no_difference(two_models: Node) -> None:
    """There are no keys here; `auth_token` is what Claude Code sends behind a gateway."""
    url = f"http://127.0.0.1:{two_models.api_port}"
    with anthropic.Anthropic(base_url=url, auth_token="anything", max_retries=0) as client:
        assert client.messages.create(model="other", max_tokens=2, messages=HELLO).content


TOOLS: list[Any] = [
    {
        "name": "read_file",
        "description": "Read a file.",
        "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    }
]
SYSTEM: list[Any] = [
    {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
    {"type": "text", "text": "Use tools."},
]
TURNS: list[Any] = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "Read a.txt", "cache_control": {"type": "ephemeral"}}],
    },
    {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "t1", "name": "read_file", "input": {"path": "a.txt"}}],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "hello"}]},
]


def test_request_of_an_agent_streams(client: anthropic.Anthropic) -> None:
    """As Claude Code asks: the beta endpoint, system blocks, cache marks, tools and their results, metadata."""
    with client.beta.messages.stream(
        model="tiny",
        max_tokens=16,
        system=SYSTEM,
        messages=TURNS,
        tools=TOOLS,
        metadata={"user_id": "somebody"},
        betas=["fine-grained-tool-streaming-2025-05-14"],
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert final.usage.output_tokens > 0
    assert final.stop_reason in ("max_tokens", "end_turn", "tool_use")
