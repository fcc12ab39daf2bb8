"""`/metrics` of the console: what the node has done, in Prometheus' text format (version 0.0.4). No I/O.

Counters start at 0 with the node. Every label has a bounded number of values: endpoints beyond the known ones and models
beyond `MOST_MODELS` are counted as `other`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping

from libmesh_node.http.answers import Told
from libmesh_node.snapshot import NodeSnapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

MOST_MODELS = 100

ENDPOINTS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/rerank",
        "/v1/responses",
        "/health",
        "/tokenize",
    }
)

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SPEEDS = (1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
"""Upper ends of buckets: seconds, and tokens per second."""

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Counts values in buckets, for each set of labels."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts: dict[Labels, list[int]] = {}
        self.sums: Counter[Labels] = Counter()

    def add(self, value: float, **labels: str) -> None:
        """Count one value."""
        key = tuple(labels.items())
        self.counts.setdefault(key, [0] * (len(self.bounds) + 1))[bisect_left(self.bounds, value)] += 1
        self.sums[key] += value  # type: ignore[assignment]  # Counter counts any number

    def lines(self, name: str) -> Iterable[str]:
        """The samples, without their heading."""
        for key, counts in self.counts.items():
            total = 0
            for bound, count in zip((*self.bounds, None), counts, strict=True):
                total += count
                le = "+Inf" if bound is None else f"{bound:g}"
                yield _sample(f"{name}_bucket", (*key, ("le", le)), total)
            yield _sample(f"{name}_sum", key, self.sums[key])
            yield _sample(f"{name}_count", key, total)


class Metrics:
    """What was counted since the node started. Belongs to the HTTP thread."""

    def __init__(self) -> None:
        self._requests: Counter[Labels] = Counter()
        self._tokens: Counter[Labels] = Counter()
        self._bytes: Counter[Labels] = Counter()
        self._retries = self._failovers = self._resumed = 0
        self._seconds = Histogram(SECONDS)
        self._first = Histogram(SECONDS)
        self._speed = Histogram(SPEEDS)
        self._models: set[str] = set()

    def answered(
        self, path: str, status: int, seconds: float, *, model: str = "", attempts: int = 0, resumed: int = 0
    ) -> None:
        """A request came to its end.

        `attempts` servers were asked, the last of which answered if `status` is below 500; `resumed` more went on with
        its answer.
        """
        endpoint = path if path in ENDPOINTS else "other"
        self._requests[("endpoint", endpoint), ("model", self._model(model)), ("status", str(status))] += 1
        self._seconds.add(seconds, endpoint=endpoint)
        self._retries += max(attempts - 1, 0)
        self._failovers += attempts > 1 and status < 500
        self._resumed += resumed

    def started(self, model: str, seconds: float) -> None:
        """The first bytes of a stream came, so long after its request."""
        self._first.add(seconds, model=self._model(model))

    def generated(self, model: str, told: Told) -> None:
        """A server's answer told this of itself."""
        named = ("model", self._model(model))
        for kind, count in (
            ("completion", told.completion),
            ("prompt", told.prompt),
            ("cached", told.cached),
        ):
            if count is not None:
                self._tokens[named, ("kind", kind)] += count
        if told.speed is not None and told.completion and told.completion > 1:
            self._speed.add(told.speed, model=self._model(model))

    def carried(self, way: str, *, sent: int, received: int) -> None:
        """So many bytes of bodies went to a server and came from it. `way`: `local`, or the path's kind."""
        for direction, count in (("sent", sent), ("received", received)):
            if count:
                self._bytes[("direction", direction), ("path", way)] += count

    def _model(self, name: str) -> str:
        if name in self._models or not name:
            return name
        if len(self._models) >= MOST_MODELS:
            return "other"
        self._models.add(name)
        return name

    def text(
        self,
        snapshot: NodeSnapshot,
        in_flight: Mapping[str, int],
        waiting: int,
        queued: Mapping[str, int],
        tunnelled: Mapping[tuple[str, str], int],
    ) -> str:
        """All of it, with what `snapshot` shows now.

        `in_flight` counts requests by base URL, `waiting` those that a server has not begun to answer, and `queued` those
        that no server has room for, by model. `tunnelled` are bytes by path and direction.
        """
        lines: list[str] = []

        def tell(name: str, kind: str, about: str, samples: Iterable[str]) -> None:
            lines.extend((f"# HELP {name} {about}", f"# TYPE {name} {kind}", *samples))

        def count(name: str, about: str, found: Mapping[Labels, float]) -> None:
            tell(name, "counter", about, (_sample(name, key, value) for key, value in found.items()))

        def gauge(name: str, about: str, found: Mapping[Labels, float]) -> None:
            tell(name, "gauge", about, (_sample(name, key, value) for key, value in found.items()))

        gauge("libmesh_info", "This node.", {(("version", snapshot.version), ("node", snapshot.node_id)): 1})
        count("libmesh_requests_total", "Requests answered; 499: the client left.", self._requests)
        tell(
            "libmesh_request_seconds",
            "histogram",
            "From a request's head to the end of its answer.",
            self._seconds.lines("libmesh_request_seconds"),
        )
        tell(
            "libmesh_first_token_seconds",
            "histogram",
            "From a request's head to the first bytes of a streamed answer.",
            self._first.lines("libmesh_first_token_seconds"),
        )
        tell(
            "libmesh_tokens_per_second",
            "histogram",
            "Speed of generation of each answer, as its server measured it.",
            self._speed.lines("libmesh_tokens_per_second"),
        )
        count("libmesh_tokens_total", "Tokens, as servers counted them.", self._tokens)
        count("libmesh_retries_total", "Further servers asked for a request.", {(): self._retries})
        count(
            "libmesh_failovers_total",
            "Requests answered by another server than the first.",
            {(): self._failovers},
        )
        count(
            "libmesh_streams_resumed_total",
            "Times that another server went on with a stream that had broken off.",
            {(): self._resumed},
        )
        count("libmesh_server_bytes_total", "Bytes of bodies to and from servers, by path.", self._bytes)
        carried: dict[Labels, float] = {
            (("direction", direction), ("path", path)): count
            for (path, direction), count in tunnelled.items()
        }
        count("libmesh_tunnel_bytes_total", "Bytes of ended connections in tunnels, by path.", carried)
        gauge("libmesh_requests_in_flight", "Requests under way by server.", _by_server(snapshot, in_flight))
        gauge("libmesh_requests_waiting", "Requests without a byte of an answer yet.", {(): waiting})
        lines_by_model: Counter[Labels] = Counter({(("model", model.name),): 0 for model in snapshot.models})
        for model, length in queued.items():
            lines_by_model[(("model", self._model(model)),)] += length
        gauge("libmesh_requests_queued", "Requests that no server has room for.", lines_by_model)
        gauge("libmesh_peers", "Other nodes by state and path.", _peers(snapshot))
        gauge("libmesh_servers", "Servers by model.", _servers(snapshot))
        restarts: dict[Labels, float] = {(("process", one.name),): one.restarts for one in snapshot.processes}
        count("libmesh_process_restarts_total", "Restarts of this node's llama.cpp processes.", restarts)
        return "\n".join(lines) + "\n"


def _by_server(snapshot: NodeSnapshot, in_flight: Mapping[str, int]) -> dict[Labels, float]:
    return {
        (("model", model.name), ("node", server.peer)): in_flight.get(server.base_url, 0)
        for model in snapshot.models
        for server in model.servers
    }


def _peers(snapshot: NodeSnapshot) -> Mapping[Labels, float]:
    return Counter((("state", peer.state), ("path", peer.path or "none")) for peer in snapshot.peers)


def _servers(snapshot: NodeSnapshot) -> dict[Labels, float]:
    return {(("model", model.name),): len(model.servers) for model in snapshot.models}


def _sample(name: str, labels: Labels, value: float) -> str:
    named = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
    return f"{name}{{{named}}} {value:.10g}" if named else f"{name} {value:.10g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
