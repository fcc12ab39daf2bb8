"""Questions that are asked with their graph: the same answers as ever, sooner."""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.llama.rpc.ahead import Chain
from libmesh_node.llama.rpc.facts import Device, WorkerFacts
from libmesh_node.llama.rpc.frames import WHOLE, Command, Frame, FrameParser, ProtocolError, Reply, frame
from libmesh_node.llama.rpc.host import Effect, HostEnd, ToClient
from libmesh_node.llama.rpc.prefetch import MAX_QUESTIONS, MISSES_ALLOWED
from libmesh_node.llama.rpc.uploads import ToWorker
from libmesh_node.llama.rpc.weights import LearnedHashes, Weights, open_weights
from libmesh_node.models.demo import ModelShape, write_model

from tests.llama.rpc import messages

FACTS = WorkerFacts((7, 0, 3), (Device(64, 1 << 40, 100, 200, True),))
SIZES = (8, 12, 200, WHOLE + 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weights]:
    path = tmp_path_factory.mktemp("models") / "one.gguf"
    write_model(path, ModelShape(layers=1, width=64, heads=4, kv_heads=2, feed_forward=64, vocabulary=400), 3)
    with open_weights((path,)) as opened:
        yield opened


def again(device: int = 0) -> bytes:
    return frame(Command.GRAPH_RECOMPUTE, struct.pack("<I", device))


class Server:
    """An rpc-server whose answers depend on everything that was said before, and on the question."""

    def __init__(self) -> None:
        self._state = hashlib.blake2b()
        self._parser = FrameParser(lambda kind, size: None, {})

    def said(self, data: bytes) -> list[bytes]:
        answers = []
        for event in self._parser.feed(data):
            assert isinstance(event, Frame)
            if event.kind == Command.GET_TENSOR:
                seed = hashlib.blake2b(self._state.digest() + event.payload).digest()
                size = struct.unpack("<Q", event.payload[-8:])[0]
                answers.append((seed * (size // len(seed) + 1))[:size])
            elif event.kind == Command.ALLOC_BUFFER:
                answers.append(struct.pack("<QQ", messages.BUFFER, 128))
            else:
                self._state.update(event.kind.to_bytes(1, "little") + event.payload)
        return answers


class Pair:
    """A host's end and the worker that it speaks to; what the worker says may wait."""

    def __init__(self, weights: Weights, chain: Chain | None = None, place: int = 0) -> None:
        self.end = HostEnd(FACTS, weights, LearnedHashes(None), chain, place)
        self.server = Server()
        self.heard: list[bytes] = []
        self.told = b""
        self.late: deque[bytes] = deque()

    def say(self, data: bytes) -> None:
        self._apply(self.end.from_client(data))

    def arrive(self) -> None:
        """One answer of the worker's arrives."""
        if self.late:
            self._apply(self.end.from_worker(self.late.popleft()))

    def settle(self) -> None:
        while self.late:
            self.arrive()

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, ToClient):
                self.told += effect.data
                continue
            assert isinstance(effect, ToWorker)
            self.heard.append(effect.data)
            base = bytes(8) if effect.data[0] == Command.ALLOC_BUFFER else b""
            self.late += [frame(Reply.ANSWER, answer + base) for answer in self.server.said(effect.data)]


def token(*questions: bytes) -> bytes:
    return messages.set_tensor(bytes(8)) + again() + b"".join(questions)


def steady(weights: Weights, *questions: bytes) -> Pair:
    """A pair in the middle of generation."""
    pair = Pair(weights)
    for step in (messages.graph(messages.tensor()) + b"".join(questions), token(*questions)):
        pair.say(step)
        pair.settle()
    pair.heard.clear()
    pair.told = b""
    return pair


def test_questions_leave_with_their_graph_and_are_answered_here(weights: Weights) -> None:
    questions = [messages.get_tensor(8), messages.get_tensor(12, offset=4)]
    pair = steady(weights, *questions)
    pair.say(again())
    assert pair.heard == [again(), *questions]
    pair.settle()
    assert not pair.told
    pair.say(b"".join(questions))
    assert len(pair.told) == 8 + 8 + 8 + 12
    assert pair.heard == [again(), *questions]
    assert not pair.end.waiting


def test_a_question_asked_before_its_answer_came_waits_for_that(weights: Weights) -> None:
    pair = steady(weights, messages.get_tensor(8))
    pair.say(token(messages.get_tensor(8)))
    assert not pair.told
    assert pair.end.waiting
    pair.arrive()
    assert len(pair.told) == 8 + 8
    assert not pair.late


@pytest.mark.parametrize("between", [messages.set_tensor(bytes(4)), messages.graph(messages.tensor())])
def test_what_was_fetched_is_forgotten_when_anything_else_is_said(weights: Weights, between: bytes) -> None:
    question = messages.get_tensor(8)
    pair = steady(weights, question)
    pair.say(again())
    pair.settle()
    pair.say(between + question)
    assert pair.heard[-1] == question
    assert not pair.told
    pair.arrive()
    assert len(pair.told) == 16


def test_an_allocation_waits_until_nothing_is_owed(weights: Weights) -> None:
    """The worker's end refuses one while answers are to come."""
    pair = steady(weights, messages.get_tensor(8))
    pair.say(again() + messages.allocate(128))
    assert pair.heard[-1] == messages.get_tensor(8)
    with pytest.raises(ProtocolError):
        pair.end.from_client(messages.get_tensor(8))
    pair = steady(weights, messages.get_tensor(8))
    pair.say(again() + messages.allocate(128))
    pair.settle()
    assert pair.heard[-1] == messages.allocate(128)
    assert len(pair.told) == 8 + 16


def test_nothing_is_asked_about_a_buffer_that_was_freed(weights: Weights) -> None:
    pair = steady(weights, messages.get_tensor(8))
    pair.say(frame(Command.FREE_BUFFER, struct.pack("<Q", messages.BUFFER)) + again())
    assert pair.heard[-1] == again()


def test_large_answers_and_more_than_a_few_are_left_to_llama_server(weights: Weights) -> None:
    pair = steady(weights, messages.get_tensor(8), messages.get_tensor(WHOLE + 1), messages.get_tensor(12))
    pair.say(again())
    assert pair.heard == [again(), messages.get_tensor(8)]
    many = [messages.get_tensor(8, offset=at) for at in range(MAX_QUESTIONS + 5)]
    pair = steady(weights, *many)
    pair.say(again())
    assert pair.heard == [again(), *many[:MAX_QUESTIONS]]


def test_who_asks_something_else_each_time_is_not_anticipated(weights: Weights) -> None:
    pair = steady(weights)
    for at in range(3 * MISSES_ALLOWED):
        pair.say(token(messages.get_tensor(8, offset=at)))
        pair.settle()
    pair.heard.clear()
    pair.say(again())
    assert pair.heard == [again()]


def test_the_first_worker_of_a_chain_is_asked_by_the_chain(weights: Weights) -> None:
    pair = Pair(weights, Chain(2), 0)
    for _ in range(4):
        pair.say(token(messages.get_tensor(8)))
        pair.settle()
    pair.heard.clear()
    pair.say(again())
    assert pair.heard == [again()]


def test_a_fetched_answer_of_another_size_is_not_believed(weights: Weights) -> None:
    pair = steady(weights, messages.get_tensor(8))
    pair.say(again())
    with pytest.raises(ProtocolError):
        pair.end.from_worker(frame(Reply.ANSWER, bytes(9)))
    pair = steady(weights, messages.get_tensor(8))
    pair.say(again())
    with pytest.raises(ProtocolError):
        pair.end.from_worker(frame(Reply.ANSWER, bytes(WHOLE + 1)))


WORDS = st.one_of(
    st.just(again()),
    st.just(again()),
    st.just(messages.graph(messages.tensor())),
    st.builds(
        lambda size, at: messages.get_tensor(size, offset=at), st.sampled_from(SIZES), st.integers(0, 1)
    ),
    st.builds(lambda n: messages.set_tensor(bytes([n])), st.integers(0, 2)),
    st.just(messages.allocate(128)),
    st.just(b""),  # an answer arrives
)


@given(st.lists(st.lists(WORDS, max_size=6), max_size=6), st.integers(1, 4))
def test_every_answer_is_the_one_that_llama_server_would_have_got(
    weights: Weights, phrases: list[list[bytes]], repeated: int
) -> None:
    """Each phrase is said a few times, as generation is; whenever the worker's answers come, the client's are the same."""
    pair, direct, expected = Pair(weights), Server(), b""
    for phrase in phrases * repeated:
        for word in phrase:
            if not word:
                pair.arrive()
                continue
            pair.say(word)
            expected += b"".join(struct.pack("<Q", len(told)) + told for told in direct.said(word))
            if word[0] == Command.ALLOC_BUFFER:
                pair.settle()  # llama-server says nothing more before it has its buffer
    pair.settle()
    assert pair.told == expected
    assert not pair.end.waiting
