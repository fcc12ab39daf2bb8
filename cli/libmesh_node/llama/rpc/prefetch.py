"""What llama-server fetches after a graph, asked for together with that graph.

Each GET_TENSOR is a round trip of its own: an answer with several outputs, such as the embeddings of several texts or what
sampling on the worker yields, waits for them one after the other. When the same graph runs again (GRAPH_RECOMPUTE), the same
questions follow, as a rule; so they are sent with it. An answer is used only for a question that is the same to the byte, and
only while nothing else was said to the worker: so it is what llama-server would have got. With a single question the round
trip is the same, but it leaves in the graph's own record, and one wake-up fewer is on a token's way.
"""

from __future__ import annotations

from collections import deque

from libmesh_node.llama.rpc.frames import TENSOR, WHOLE, Command

MAX_QUESTIONS = 16
"""Asked after one graph. What follows beyond them, or behind a large answer, is asked when llama-server asks."""

MAX_DEVICES = 16
"""Of one connection; llama-server knows as many backends. With more, all is learned anew."""

MISSES_ALLOWED = 8
"""Questions asked in vain; beyond this, and beyond a quarter of the others, nothing is fetched any more on this connection."""


class Fetch:
    """A question that was sent before llama-server asked it.

    Attributes:
        payload: of the GET_TENSOR.
        size: bytes of its answer.
        answer: once it has come.
        asked: llama-server waits for it. dropped: it does not, and never will.
    """

    __slots__ = ("answer", "asked", "dropped", "payload", "size")

    def __init__(self, payload: bytes) -> None:
        self.payload, self.size = payload, _size(payload)
        self.answer: bytes | None = None
        self.asked = self.dropped = False


class Prefetch:
    """The questions of one connection. Each request that goes to the worker is told to one of the three methods.

    Attributes:
        hits, misses: questions that were asked, and those that were not.
    """

    def __init__(self) -> None:
        self.hits = self.misses = 0
        self._after: dict[bytes, list[bytes]] = {}  # by device, the questions after its last graph
        self._learning: list[bytes] | None = None
        self._ahead: deque[Fetch] = deque()

    @property
    def pending(self) -> bool:
        """Whether something was fetched that llama-server has not asked for, and may yet."""
        return bool(self._ahead)

    def graph(self, device: bytes, *, again: bool) -> list[Fetch]:
        """A graph is sent to a device; `again`, the same as the last. Returns what to ask behind it."""
        self.other()
        known = self._after.pop(device, []) if again else []
        if len(self._after) >= MAX_DEVICES:
            self._after.clear()
        self._learning = self._after[device] = []
        if self.misses > MISSES_ALLOWED + self.hits // 4:
            return []
        self._ahead.extend(map(Fetch, known))
        return list(self._ahead)

    def question(self, payload: bytes) -> Fetch | None:
        """llama-server asks. Returns what was fetched for it; `None` if this is to be sent."""
        if self._learning is not None and len(self._learning) < MAX_QUESTIONS and _size(payload) <= WHOLE:
            self._learning.append(payload)
        else:
            self._learning = None
        if self._ahead and self._ahead[0].payload == payload:
            self.hits += 1
            return self._ahead.popleft()
        self._drop()
        return None

    def other(self, command: int | None = None) -> None:
        """Something else is sent."""
        self._learning = None
        self._drop()
        if command == Command.FREE_BUFFER:
            self._after.clear()  # a question about it would be an offence

    def _drop(self) -> None:
        self.misses += len(self._ahead)
        for fetch in self._ahead:
            fetch.dropped, fetch.answer = True, None
        self._ahead.clear()


def _size(payload: bytes) -> int:
    return int.from_bytes(payload[TENSOR + 8 : TENSOR + 16], "little")
