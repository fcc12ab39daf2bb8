"""Answers of which not every token is told, given again from the beginning: what the client reads is one answer, or an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.http.retelling import Diverged
from libmesh_node.http.sse import EventReader, data_event, event_data
from libmesh_node.http.transcript import Transcript

from tests.http.test_transcript import SHELL, asked, chunk, spelled, told
from tests.http.test_transcript import read as read_plain

Json = dict[str, Any]


def answer(name: str, thoughts: list[str], words: list[str]) -> list[bytes]:
    """What the server `name` sends. Pieces of text as tokens make them; ids and times are its own."""
    own = {"id": name, "created": len(name)}
    said = [{"reasoning_content": thought} for thought in thoughts] + [{"content": word} for word in words]
    deltas: list[Json] = [{"role": "assistant", "content": None}, *said]
    ended = {"choices": [{"finish_reason": "stop", "index": 0, "delta": {}}], **own}
    usage = {"choices": [], **own, "usage": {"completion_tokens": len(said)}}
    parts = [{"choices": [{"finish_reason": None, "index": 0, "delta": delta}], **own} for delta in deltas]
    return [*map(data_event, [*parts, ended, usage]), b"data: [DONE]\n\n"]


def read(sent: bytes) -> tuple[str, str, int, list[str], Json | None, set[str]]:
    """Reasoning, text, roles, reasons, usage and ids."""
    thought, text, roles, reasons, usage, ids = "", "", 0, list[str](), None, set[str]()
    for event in EventReader().feed(sent):
        if (data := event_data(event)) in (b"", b"[DONE]"):
            continue
        value = json.loads(data)
        ids.add(value["id"])
        usage = value.get("usage") or usage
        for choice in value["choices"]:
            thought += choice["delta"].get("reasoning_content") or ""
            assert not (text and choice["delta"].get("reasoning_content"))
            text += choice["delta"].get("content") or ""
            roles += "role" in choice["delta"]
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    return thought, text, roles, reasons, usage, ids


pieces = st.lists(st.sampled_from(["a", " b", "\n", "é", "cc"]), max_size=6)


@given(pieces, pieces, st.lists(st.integers(1, 1500), max_size=4), st.integers(1, 80))
def test_broken_anywhere_any_number_of_times_it_reads_as_one_answer(
    thoughts: list[str], words: list[str], cuts: list[int], size: int
) -> None:
    transcript, sent = asked(), b""
    for number, cut in enumerate([*cuts, 10**6]):
        stream = b"".join(answer(str(number) * (number + 1), ["hm", *thoughts], words))[:cut]
        for start in range(0, len(stream), size):
            sent += transcript.feed(stream[start : start + size])
        if transcript.finished:
            break
        if transcript.begun and not transcript.starts_over:
            return  # it had not begun to reason: see `test_transcript.py`
        assert transcript.can_resume or not transcript.begun
        assert transcript.restart() == transcript.body
    assert transcript.finished
    *found, ids = read(sent)
    *expected, _ = read(b"".join(answer("x", ["hm", *thoughts], words)))
    assert found == expected
    assert len(ids) == 1
    assert sent.endswith(b"data: [DONE]\n\n")


def feed_all(transcript: Transcript, events: list[bytes]) -> None:
    for event in events:
        transcript.feed(event)


@pytest.mark.parametrize(
    ("thoughts", "words"),
    [(["ha"], ["a"]), (["h"], ["a"]), (["hmm"], ["a"]), (["hm"], ["b"]), ([], ["hm"])],
    ids=["other thought", "less", "more", "other word", "no thought"],
)
def test_server_that_thinks_or_says_something_else_is_found_out(
    thoughts: list[str], words: list[str]
) -> None:
    transcript = asked()
    transcript.feed(b"".join(answer("one", ["hm"], ["a"])[:3]))
    transcript.restart()
    with pytest.raises(Diverged):
        feed_all(transcript, answer("two", thoughts, words))


def test_server_that_says_less_is_found_out_at_its_end() -> None:
    transcript = asked()
    transcript.feed(b"".join(answer("one", ["hm"], ["a", "b"])[:4]))
    transcript.restart()
    with pytest.raises(Diverged):
        feed_all(transcript, answer("two", ["hm"], ["a"]))


@pytest.mark.parametrize(
    ("changes", "delta"),
    [
        ({"temperature": 0.5}, {"reasoning_content": "hm"}),
        ({"temperature": None}, {"reasoning_content": "hm"}),
        ({}, {"tool_calls": [{"index": 0}]}),
    ],
)
def test_what_is_left_to_chance_and_what_is_a_call_is_not_given_again(changes: Json, delta: Json) -> None:
    transcript = asked(**changes)
    transcript.feed(chunk({"role": "assistant", "content": None}))
    assert transcript.can_resume
    transcript.feed(chunk(delta))
    assert not transcript.can_resume


def test_seed_leaves_nothing_to_chance() -> None:
    transcript = asked(temperature=0.5, seed=7)
    transcript.feed(chunk({"reasoning_content": "hm"}))
    assert transcript.can_resume
    assert transcript.starts_over


def test_thought_after_text_is_not_given_again() -> None:
    transcript = asked()
    transcript.feed(chunk({"reasoning_content": "hm"}) + chunk({"content": "a"}))
    assert transcript.can_resume
    transcript.feed(chunk({"reasoning_content": "hm"}))
    assert not transcript.can_resume


@pytest.mark.parametrize("temperature", [0, 0.5])
def test_token_that_is_in_no_text_is_found_and_the_answer_given_again_if_it_can_be(
    temperature: float,
) -> None:
    """The mark before thinking of which nothing came, for one: who goes on without it goes on with something else."""
    transcript = asked(temperature=temperature)
    sent = transcript.feed(told(None, 6, role="assistant") + told("a", 0))
    spelled(transcript)
    assert transcript.starts_over
    assert transcript.can_resume == (temperature == 0)
    transcript.restart()
    rest = told(None, 6, role="assistant") + told("a", 0) + told(" b", 1) + chunk({}, "stop")
    sent += transcript.feed(
        rest + data_event({"choices": [], **SHELL, "usage": {"n": 1}}) + b"data: [DONE]\n\n"
    )
    assert read_plain(sent)[:2] == ("a b", ["stop"])
