"""What is read of an agent's request: marks that move on, what tools returned, and how long all of it is."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from libmesh_node.http.wanted import BLOCK, Wanted, read_wanted
from libmesh_node.http.wanted import MARK as MARK_NAME

MARK = {"cache_control": {"type": "ephemeral"}}
TOOLS = [{"name": "read_file", "input_schema": {"type": "object"}}]
SYSTEM = [{"type": "text", "text": "You are an agent.", **MARK}]


def read(**request: object) -> Wanted:
    return read_wanted(request, {}, marked=MARK_NAME in json.dumps(request))


def marked(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text, **MARK}]}


def result(**mark: object) -> dict[str, Any]:
    inner = [{"type": "text", "text": "hello"}]
    return {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "t1", "content": inner, **mark}],
    }


USE = {
    "role": "assistant",
    "content": [{"type": "tool_use", "id": "t1", "name": "read_file", "input": {"path": "a.txt"}}],
}


def test_conversation_stays_the_same_while_the_marks_of_its_newest_turns_move_on() -> None:
    """As Claude Code asks: what has no mark any more is plain text again."""
    plain = {"role": "user", "content": "Read a.txt"}
    turns = [
        [marked("user", "Read a.txt")],
        [plain, USE, result(**MARK)],
        [plain, USE, result(), {"role": "assistant", "content": "It says hello."}, marked("user", "Thanks")],
    ]
    first, second, third = (read(tools=TOOLS, system=SYSTEM, messages=messages) for messages in turns)
    assert first.prefixes[0] in second.prefixes
    assert second.prefixes[0] in third.prefixes
    assert (
        read(tools=TOOLS, system=SYSTEM, messages=[marked("user", "Read b.txt")]).prefixes[0]
        not in second.prefixes
    )


def test_what_is_nested_too_deep_to_be_named_counts_as_not_there() -> None:
    deep: list[Any] = []
    for _ in range(sys.getrecursionlimit()):
        deep = [deep]
    messages = [{"role": "user", "content": "Hi", "other": deep}]
    wanted = read_wanted({"tools": [deep], "messages": messages}, {})
    assert wanted.tools
    assert len(wanted.prefixes) == 1


def test_user_of_anthropics_api_names_the_conversation() -> None:
    assert read(messages=[], metadata={"user_id": "u_session_1"}).session == "u_session_1"
    assert read(messages=[], metadata={"user_id": "u"}, session_id="s").session == "s"
    assert read(messages=[], metadata="u").session == ""


LONG = "x" * 3000


@pytest.mark.parametrize(
    "request_body",
    [
        {"messages": [], "system": LONG},
        {"messages": [], "system": [{"type": "text", "text": LONG}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": LONG}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [{"text": LONG}]}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": LONG}}]}]},
        {"input": LONG},
        {"input": [LONG[:1000], LONG[:2000]]},
        {"input": "", "instructions": LONG},
        {"input": [{"type": "function_call_output", "output": LONG}]},
        {"prompt": LONG},
        {"prompt": [7] * 1000},
        {"prompt": [[7] * 1000]},
    ],
)
def test_all_that_a_model_must_read_counts(request_body: dict[str, Any]) -> None:
    assert read(**request_body).prompt_tokens == 1000


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{LONG}"}},
        {"type": "image", "source": {"type": "base64", "data": LONG}},
        {"type": "input_audio", "input_audio": {"data": LONG}},
    ],
)
def test_what_is_shown_does_not_count_by_its_bytes(part: dict[str, Any]) -> None:
    shown = read(messages=[{"role": "user", "content": [part]}]).prompt_tokens
    returned = [{"role": "user", "content": [{"type": "tool_result", "content": [part]}]}]
    assert shown == read(messages=returned).prompt_tokens == 500


def test_picture_that_a_tool_returned_is_one() -> None:
    part = {"type": "image", "source": {"type": "base64", "data": "…"}}
    assert read(messages=[{"role": "user", "content": [{"type": "tool_result", "content": [part]}]}]).vision
    assert not read(messages=[result()]).vision


@pytest.mark.parametrize("kind", [[], {}, None, 5])
def test_kind_that_is_no_text_is_no_trouble(kind: object) -> None:
    assert read(messages=[{"role": "user", "content": [{"type": kind, "text": "x" * BLOCK}]}]).prefixes
