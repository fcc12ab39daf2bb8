"""One request on its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

from libmesh_node.http.answers import TAIL
from libmesh_node.http.replay import Replay
from libmesh_node.http.transcript import Transcript
from libmesh_node.http.wanted import NOTHING, Wanted
from libmesh_node.snapshot import Server


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One request on its way. What has a default is filled in as it goes, for the log, the headers and the metrics.

    Attributes:
        id: names the request in the log, at the server and to the client.
        headers: for the answer: the id, and CORS; `labels` has the others that every answer has.
        home: peer id of this node, which gives the answers for which no server is needed, and refusals.
        began: when its head had been read, by `time.perf_counter`.
        said: its body, if that is a JSON object, from when it was read until it is understood.
        wants: what it says of itself, or how that is found out: see `wanted`.
        transcript: of its answer, if that could be continued.
        attempts: servers that were asked.
        resumed: servers that went on with its answer.
        seeking: whether it waits for a server.
        broken: whether its answer broke off, and the client was told so.
        first: when the first bytes of a streamed answer came, by the same clock as `began`.
        heading: headers for the answer, of the server that was asked last and of `labels`.
        response: the answer, if it was begun before there was a server (`waiting.py`), and `labelled` its labels.
        received: bytes of the answer so far, and `tail` the last of them.
    """

    request: web.BaseRequest
    id: str
    body: bytes
    headers: dict[str, str]
    began: float
    home: str = ""
    said: dict[str, Any] | None = None
    wants: Wanted | Callable[[], Wanted] = NOTHING
    transcript: Transcript | Replay | None = None
    attempts: int = 0
    resumed: int = 0
    seeking: bool = True
    broken: bool = False
    model: str = ""
    server: Server | None = None
    first: float | None = None
    heading: CIMultiDict[str] = field(default_factory=CIMultiDict)
    response: web.StreamResponse | None = None
    labelled: dict[str, str] = field(default_factory=dict)
    received: int = 0
    tail: bytes = b""

    @property
    def wanted(self) -> Wanted:
        """What it says of itself. Found out when first asked for: where there is one server, it has been asked by then."""
        if not isinstance(self.wants, Wanted):
            self.wants = self.wants()
        return self.wants

    def labels(self, node: str = "") -> dict[str, str]:
        """Who answers, as headers: `node`, or this one; how many servers were asked so far, and for which model."""
        labels = {"X-Libmesh-Node": node or self.home, "X-Libmesh-Attempts": str(self.attempts)}
        return labels | ({"X-Libmesh-Model": self.model} if self.model else {})

    def saw(self, data: bytes) -> None:
        """More of the answer came."""
        self.received += len(data)
        self.tail = (self.tail + data[-TAIL:])[-TAIL:]
