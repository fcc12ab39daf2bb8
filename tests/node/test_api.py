"""The real OpenAI client at a client node: every answer has crossed the mesh."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.node.conftest import Pair
from tests.node.nodes import PATIENCE, Json, llama, served, tokens_made, wait_for

pytestmark = pytest.mark.llama

MESSAGES: list[Any] = [{"role": "user", "content": "Who are you?"}]
NO_MESSAGES: Any = "not a list"


def test_client_lists_the_models_of_the_mesh(pair: Pair) -> None:
    with pair.client.openai() as client:
        (model,) = client.models.list().data
        assert (model.id, model.owned_by) == ("demo", "libmesh")
        assert model.model_extra is not None
        assert model.model_extra["nodes"] == [pair.server.node_id]
        assert model.model_extra["context_length"] == 8192
        assert client.models.retrieve("demo").id == "demo"


def test_chat_through_the_mesh_counts_its_tokens(pair: Pair) -> None:
    with pair.client.openai() as client:
        answer = client.chat.completions.create(model="demo", max_tokens=12, messages=MESSAGES)
    assert answer.model == "demo"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_answer_says_which_node_gave_it(pair: Pair) -> None:
    with pair.client.openai() as client:
        raw = client.chat.completions.with_raw_response.create(
            model="demo",
            max_tokens=2,
            messages=MESSAGES,
        )
    assert raw.headers["X-Libmesh-Node"] == pair.server.node_id


def test_stream_arrives_while_it_is_made(pair: Pair) -> None:
    """The first chunk comes while the server still works; a proxy that buffers shows nothing before the end."""
    busy_at_first: list[bool] = []
    chunks = 0
    usage = None
    with (
        pair.client.openai() as client,
        client.chat.completions.create(
            model="demo",
            max_tokens=4000,
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
        ) as stream,
    ):
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                chunks += 1
                if not busy_at_first:
                    slot_states = llama(pair.server, "/slots").json()
                    busy_at_first.append(any(slot["is_processing"] for slot in slot_states))
            usage = chunk.usage or usage
    assert usage is not None
    assert usage.completion_tokens == 4000
    assert chunks > 400
    assert busy_at_first == [True]


def test_plain_completion(pair: Pair) -> None:
    with pair.client.openai() as client:
        answer = client.completions.create(model="demo", prompt="Once upon", max_tokens=4)
    assert answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


def test_embeddings_differ_between_texts(pair: Pair) -> None:
    with pair.client.openai() as client:
        answer = client.embeddings.create(model="demo", input=["one text", "quite another"])
    first, second = (entry.embedding for entry in answer.data)
    assert len(first) == len(second) == 128
    assert first != second


def test_responses_endpoint(pair: Pair) -> None:
    with pair.client.openai() as client:
        answer = client.responses.create(model="demo", input="Hello?", max_output_tokens=6)
    assert answer.output_text
    assert answer.usage is not None
    assert answer.usage.output_tokens == 6


def test_responses_endpoint_streams(pair: Pair) -> None:
    with (
        pair.client.openai() as client,
        client.responses.create(model="demo", input="Hello?", max_output_tokens=6, stream=True) as stream,
    ):
        kinds = [event.type for event in stream]
    assert "response.output_text.delta" in kinds
    assert kinds[-1] == "response.completed"


def test_messages_endpoint_in_the_shape_of_anthropic(pair: Pair) -> None:
    body = {"model": "demo", "max_tokens": 6, "messages": MESSAGES}
    answer = httpx.post(f"{pair.client.api}/v1/messages", json=body, timeout=PATIENCE).json()
    assert answer["type"] == "message"
    assert answer["content"][0]["text"]
    assert answer["usage"]["output_tokens"] == 6
    refused = httpx.post(f"{pair.client.api}/v1/messages", json=body | {"model": "no"}, timeout=PATIENCE)
    assert refused.status_code == 404
    assert refused.json()["type"] == "error"
    assert refused.json()["error"]["type"] == "not_found_error"


def test_unknown_model_is_not_found_and_near_names_are_told(pair: Pair) -> None:
    with (
        pair.client.openai() as client,
        pytest.raises(openai.NotFoundError, match="Did you mean `demo`") as info,
    ):
        client.chat.completions.create(model="Demoo", messages=MESSAGES)
    assert info.value.code == "model_not_found"
    assert info.value.param == "model"


def test_bad_request_comes_back_as_the_server_said_it(pair: Pair) -> None:
    with pair.client.openai() as client, pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="demo", messages=NO_MESSAGES)


def test_same_answers_on_the_console_port(pair: Pair) -> None:
    models = httpx.get(f"{pair.client.console}/v1/models", timeout=PATIENCE).json()
    assert [model["id"] for model in models["data"]] == ["demo"]
    assert httpx.get(f"{pair.client.api}/health", timeout=PATIENCE).json() == {"status": "ok", "models": 1}


def test_client_that_leaves_ends_the_generation_on_the_other_node(pair: Pair) -> None:

    def busy() -> bool:
        return any(slot["is_processing"] for slot in llama(pair.server, "/slots").json())

    before = tokens_made(pair.server)
    body: Json = {"model": "demo", "max_tokens": 8000, "messages": MESSAGES, "stream": True}
    with httpx.stream(
        "POST", f"{pair.client.api}/v1/chat/completions", json=body, timeout=PATIENCE
    ) as response:
        pieces = response.iter_raw()  # kept: the response ends with its iterator
        next(pieces)
        assert busy()
    wait_for(lambda: not busy(), PATIENCE, "an idle server")
    assert tokens_made(pair.server) < before + body["max_tokens"], "it went on to the end"
    assert served(pair.client.status()) == {"demo"}
