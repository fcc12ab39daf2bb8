"""The real `openai` client against real llama-servers through the API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from tests.http.conftest import Llama, Node, call, running_node

pytestmark = pytest.mark.llama


@pytest.fixture
def client(two_models: Node) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{two_models.api_port}/v1", api_key="secret", max_retries=0
    ) as made:
        yield made


def ask(client: openai.OpenAI, model: str, **options: object) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=8, temperature=0, **options
    )


def test_all_models_are_listed_with_their_nodes(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"tiny", "other"}
    assert models["tiny"].owned_by == "libmesh"
    extra = models["tiny"].model_extra
    assert extra is not None
    assert extra["context_length"] == 2048
    assert extra["nodes"] == ["peer-a"]
    assert client.models.retrieve("other").id == "other"


def test_chat_gives_text_and_usage(client: openai.OpenAI) -> None:
    answer = ask(client, "tiny")
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_stream_gives_the_same_text_in_pieces_and_usage_at_the_end(client: openai.OpenAI) -> None:
    whole = ask(client, "tiny").choices[0].message.content
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == whole
    assert len([piece for piece in pieces if piece]) >= 4
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert "length" in [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]


def test_each_model_answers_for_itself(client: openai.OpenAI, llamas: dict[str, Llama]) -> None:
    texts = {}
    for name in ("tiny", "other"):
        direct = openai.OpenAI(base_url=f"{llamas[name].url}/v1", api_key="x")
        with direct:
            texts[name] = ask(direct, name).choices[0].message.content
        for _ in range(5):
            answer = ask(client, name)
            assert answer.model == name
            assert answer.choices[0].message.content == texts[name]
    assert texts["tiny"] != texts["other"]


def test_completions_embeddings_and_responses_work(client: openai.OpenAI) -> None:
    assert client.completions.create(model="tiny", prompt="Hello", max_tokens=4).choices[0].text
    vectors = client.embeddings.create(model="other", input=["one", "two"])
    assert [len(item.embedding) for item in vectors.data] == [128, 128]
    answer = client.responses.create(model="tiny", input="Hello", max_output_tokens=8)
    assert answer.output_text
    events = list(client.responses.create(model="tiny", input="Hello", max_output_tokens=8, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")


@pytest.mark.parametrize(
    "asked",
    ["Hello", [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]],
    ids=["words", "items"],
)
def test_streamed_response_is_the_same_as_a_whole_one_and_its_events_are_numbered(
    client: openai.OpenAI, asked: Any
) -> None:
    greedy = {"temperature": 0}
    ask: Any = {"model": "tiny", "input": asked, "max_output_tokens": 8, "extra_body": greedy}
    whole = client.responses.create(**ask)
    with client.responses.stream(**ask) as stream:
        numbers = [event.sequence_number for event in stream]
        final = stream.get_final_response()
    assert numbers == list(range(len(numbers)))
    assert final.output_text == whole.output_text
    assert final.status == whole.status
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.total_tokens == whole.usage.total_tokens


def test_unknown_model_is_not_found_and_near_names_are_told(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, "tinny")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "Did you mean `tiny`?" in caught.value.message


def test_missing_model_is_a_bad_request_that_lists_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="`tiny`, `other`"):
        ask(client, "")


def test_servers_own_errors_pass_as_they_are(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.post("/chat/completions", body={"model": "tiny"}, cast_to=object)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "word " * 20_000}], max_tokens=4
        )
    assert caught.value.type == "exceed_context_size_error"


def test_known_model_without_server_is_unavailable_for_now(llamas: dict[str, Llama]) -> None:
    with (
        running_node(replace(llamas["tiny"].served(), servers=(), wanted=True)) as node,
        openai.OpenAI(base_url=f"http://127.0.0.1:{node.api_port}/v1", api_key="x", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.InternalServerError) as caught:
            ask(client, "tiny")
        assert caught.value.status_code == 503
        assert caught.value.code == "no_server"
        assert int(caught.value.response.headers["retry-after"]) > 0


def test_idle_node_says_what_to_do() -> None:
    with running_node() as node:
        with (
            openai.OpenAI(
                base_url=f"http://127.0.0.1:{node.api_port}/v1", api_key="x", max_retries=0
            ) as client,
            pytest.raises(openai.InternalServerError, match="libmesh-node --join TOKEN") as caught,
        ):
            ask(client, "anything")
        assert caught.value.status_code == 503
        assert call(node.api_port, "GET", "/health")[0] == 503
        assert call(node.api_port, "GET", "/v1/models")[0] == 200


def test_only_model_needs_no_name(one_model: Node) -> None:
    status, headers, body = call(
        one_model.api_port, "POST", "/v1/completions", {"prompt": "Hi", "max_tokens": 2}
    )
    assert status == 200, body
    assert headers["x-libmesh-node"] == "peer-a"
    assert headers["x-libmesh-attempts"] == "1"


def test_anthropic_messages_and_errors_have_anthropics_shape(two_models: Node) -> None:
    message = {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}]}
    status, _, body = call(two_models.api_port, "POST", "/v1/messages", message)
    assert status == 200
    assert json.loads(body)["type"] == "message"
    status, _, body = call(two_models.api_port, "POST", "/v1/messages/count_tokens", message)
    assert json.loads(body)["input_tokens"] > 0
    status, _, body = call(two_models.api_port, "POST", "/v1/messages", message | {"model": "nope"})
    assert status == 404
    assert json.loads(body)["type"] == "error"
    assert json.loads(body)["error"]["type"] == "not_found_error"


def test_other_endpoints_of_the_server_are_reached_by_model(two_models: Node) -> None:
    port = two_models.api_port
    for name in ("tiny", "other"):
        status, _, body = call(port, "GET", f"/props?model={name}")
        assert status == 200
        assert json.loads(body)["model_path"].endswith(f"{name}.gguf")
    status, _, body = call(port, "POST", "/tokenize", {"model": "tiny", "content": "Hello"})
    assert json.loads(body)["tokens"]
    assert call(port, "POST", "/tokenize?model=other", {"content": "Hello"})[0] == 200
    assert call(port, "POST", "/tokenize", {"content": "Hello"})[0] == 400
