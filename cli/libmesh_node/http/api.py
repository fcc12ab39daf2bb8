"""The OpenAI-compatible API: what a request is for, and who answers it.

Three kinds of answers. `/v1/models` and `/health` come from the newest snapshot. What would administer somebody's
llama-server is refused. All else goes, untouched, to a server of the model that the request names.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Collection
from typing import Protocol
from urllib.parse import parse_qs

from aiohttp import web

from libmesh_node.asked import Asked
from libmesh_node.http.access import is_allowed_origin, is_private_host
from libmesh_node.http.answers import Told, told
from libmesh_node.http.asking import Asking
from libmesh_node.http.body import LONG, NotText, TooComplex, form_model, model_of, read_object, scan_model
from libmesh_node.http.errors import ApiError, encode_error, speaks_anthropic
from libmesh_node.http.exchange import Exchange
from libmesh_node.http.exposure import METHODS, check_endpoint
from libmesh_node.http.intake import Intake
from libmesh_node.http.metrics import Metrics
from libmesh_node.http.proxy import Proxy
from libmesh_node.http.routing import AUTO, RETRY_AFTER, find_model, is_available, nothing_served, pick_model
from libmesh_node.http.sse import encode_json
from libmesh_node.http.wanted import read_wanted
from libmesh_node.snapshot import Model, NodeSnapshot, Server

access_log = logging.getLogger("libmesh_node.http.access")
"""One line per request, at INFO. A logger of its own, so that a terminal can stay calm while the file has them."""

PREFLIGHT_SECONDS = 600

EXPOSED = "X-Request-Id, Request-Id, X-Libmesh-Model, X-Libmesh-Node, X-Libmesh-Attempts, Retry-After"
"""Headers of an answer that a page's script may read."""

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Snapshots(Protocol):
    """Anything with the newest snapshot: the bridge."""

    @property
    def snapshot(self) -> NodeSnapshot:
        """The newest."""


class Api:
    """Answers requests on the API's port, and those under `/v1/` on the console's.

    `any_host` turns the check of `Host` off, for a node that listens on all addresses and cannot know its names.
    `origins` are web pages, beyond this machine's own, that may use the API; `*` allows all. `tell` hears what is asked for.
    """

    def __init__(
        self,
        source: Snapshots,
        proxy: Proxy,
        *,
        any_host: bool = False,
        origins: Collection[str] = (),
        tell: Callable[[tuple[Asked, ...]], None] = lambda asked: None,
    ) -> None:
        self._source = source
        self._proxy = proxy
        self._intake = Intake()
        self._asking = Asking(tell)
        self._any_host = any_host
        self._origins = frozenset(origins)
        self._started_unix = int(time.time())
        self.metrics = Metrics()
        self._looked_at: NodeSnapshot | None = None

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request. Never raises except when cancelled, which is how a client's departure shows."""
        name = request_id(request.headers.get("X-Request-Id", ""))
        ids = {"X-Request-Id": name} | ({"Request-Id": name} if speaks_anthropic(request.path) else {})
        exchange = Exchange(
            request=request,
            id=name,
            body=b"",
            headers=ids,
            began=time.perf_counter(),
            home=self._source.snapshot.node_id,
        )
        status = 499  # as nginx logs it: the client left
        try:
            response = await self._answer(exchange)
            status = response.status
            return response
        except ApiError as error:
            status = error.status
            return refuse(error, request.path, exchange.headers | exchange.labels())
        finally:
            self._note(exchange, status)

    def _note(self, exchange: Exchange, status: int) -> None:
        """Count a request at its end, and log it."""
        spent = time.perf_counter() - exchange.began
        path, server, metrics = exchange.request.path.rstrip("/"), exchange.server, self.metrics
        metrics.answered(
            path,
            status,
            spent,
            model=exchange.model,
            attempts=exchange.attempts,
            resumed=exchange.resumed,
        )
        said = Told()
        if server is not None:
            metrics.carried(self._way(server), sent=len(exchange.body), received=exchange.received)
            said = told(exchange.tail)
            metrics.generated(exchange.model, said)
        first = None if exchange.first is None else exchange.first - exchange.began
        if first is not None:
            metrics.started(exchange.model, first)
        if not access_log.isEnabledFor(logging.INFO):
            return
        fields = {
            "id": exchange.id,
            "method": exchange.request.method,
            "path": exchange.request.path,
            "status": status,
            "seconds": round(spent, 4),
            "first_byte_seconds": None if first is None else round(first, 4),
            "model": exchange.model,
            "node": server.peer if server else "",
            "attempts": exchange.attempts,
            "resumed": exchange.resumed,
            "sent": len(exchange.body),
            "received": exchange.received,
            "tokens": said.completion,
        }
        access_log.info(
            "%s %s %d %.1f ms model=%s node=%s attempts=%d id=%s",
            exchange.request.method,
            exchange.request.path,
            status,
            spent * 1000,
            exchange.model or "-",
            server.peer if server else "-",
            exchange.attempts,
            exchange.id,
            extra={"fields": fields},
        )

    def _way(self, server: Server) -> str:
        if server.local:
            return "local"
        return next(
            (peer.path or "none" for peer in self._source.snapshot.peers if peer.id == server.peer), "none"
        )

    async def _answer(self, exchange: Exchange) -> web.StreamResponse:
        request = exchange.request
        exchange.headers |= self._check_page(request)
        method, path = request.method, request.path.rstrip("/")
        if method == "OPTIONS":
            return _preflight(request, exchange.headers | exchange.labels())
        if method in ("GET", "HEAD") and (answer := self._own_answer(path)) is not None:
            status, value = answer
            headers = {"Retry-After": str(RETRY_AFTER)} if status == 503 else {}
            return _json(status, value, exchange.headers | exchange.labels() | headers)
        check_endpoint(method, request.path)
        if (snapshot := self._source.snapshot) is not self._looked_at:
            self._looked_at = snapshot
            self._proxy.forget_gone(snapshot.models)
        with self._intake.hold() as held:
            exchange.body = await held.read(request)
            name = await _wanted_model(exchange)
            if name == AUTO and all(model.name != AUTO for model in self._source.snapshot.models):
                name = await self._pick(exchange)
            if method != "POST":
                return await self._proxy.forward(exchange, lambda: self._find(name, reads_only=True))
            model = self._find(name, reads_only=False)
            exchange.model = model.name
            with self._asking.counted(exchange, model):
                return await self._proxy.forward(exchange, lambda: self._find(name, reads_only=False))

    async def _pick(self, exchange: Exchange) -> str:
        """Choose a model for a request that says `auto`, and say so in its body: the server's answer names it."""
        snapshot, headers = self._source.snapshot, exchange.request.headers
        said = exchange.said or await asyncio.to_thread(read_object, exchange.body)
        wanted = await asyncio.to_thread(read_wanted, said or {}, headers)
        name = exchange.model = pick_model(snapshot.models, wanted, snapshot.notices).name
        if said is not None:
            exchange.said = said | {"model": name}
            exchange.body = await asyncio.to_thread(encode_json, exchange.said)
        return name

    def _check_page(self, request: web.BaseRequest) -> dict[str, str]:
        """Refuse pages that have no business here; the CORS headers for those that have."""
        host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
        if not self._any_host and not is_private_host(host, self._source.snapshot.hostname):
            message = "This API answers on this machine only. Ask for it as localhost or by address."
            raise ApiError(403, "host_refused", message)
        if origin is None:
            return {}
        if not is_allowed_origin(origin, host, self._origins):
            message = f"Web pages of {origin[:100]} may not use this API. Pages served from this machine may."
            raise ApiError(403, "origin_refused", message)
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": EXPOSED,
            "Vary": "Origin",
        }

    def _own_answer(self, path: str) -> tuple[int, object] | None:
        snapshot = self._source.snapshot
        match path.removeprefix("/v1"):
            case "/models":
                listed = [model for model in snapshot.models if model.wanted or is_available(model)]
                entries = [self._entry(model) for model in listed]
                return 200, {"object": "list", "data": entries}
            case "/health":
                if is_healthy(snapshot):
                    served = sum(bool(model.servers) for model in snapshot.models)
                    return 200, {"status": "ok", "models": served}
                return 503, json.loads(encode_error(nothing_served(snapshot.models, snapshot.notices), path))
            case "" if path == "":
                return 200, {"service": "libmesh-node", "version": snapshot.version, "api": "/v1"}
            case other if other.startswith("/models/") and other != "/models/sse":
                return 200, self._entry(find_model(snapshot.models, other.removeprefix("/models/")))
        return None

    def _find(self, name: str | None, *, reads_only: bool) -> Model:
        snapshot = self._source.snapshot
        models = snapshot.models
        if reads_only and not name:
            # Asking how some server is doing, without saying which, gets the first; nothing is computed by a wrong one.
            models = tuple(model for model in models if model.servers)[:1] or models
        return find_model(models, name, snapshot.notices)

    def _entry(self, model: Model) -> dict[str, object]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._started_unix,
            "owned_by": "libmesh",
            "context_length": model.context_length,
            "size": model.size_bytes,
            "digest": model.digest,
            "nodes": sorted({server.peer for server in model.servers}),
            "status": {"value": "loaded" if model.servers else "unloaded"},
            "meta": {
                "n_ctx": model.context_length,
                "size": model.size_bytes,
                "tools": model.tools or any(server.tools for server in model.servers),
                "vision": model.vision or any(server.vision for server in model.servers),
            },
        }


_STARTING = ("starting", "loading", "restarting")


def is_healthy(snapshot: NodeSnapshot) -> bool:
    """Whether requests should be sent to this node.

    A model that sleeps or lies ready on a disk comes when a request waits for it; if that made a node unhealthy, who asks before
    sending would never send the request. One that this node is loading is waited for by asking again, as of llama-server.
    """
    starting = {model.name for model in snapshot.local_models if model.status in _STARTING}
    return any(
        model.servers or (is_available(model) and model.name not in starting) for model in snapshot.models
    )


def request_id(asked: str) -> str:
    """The client's own name for its request, if it can be one, or a new one."""
    return asked if _REQUEST_ID.fullmatch(asked) else f"req-{secrets.token_hex(12)}"


def refuse(error: ApiError, path: str, headers: dict[str, str]) -> web.Response:
    """The response that says `error`, in the shape of the protocol of `path`."""
    headers = dict(headers)
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 405:
        headers["Allow"] = ", ".join(METHODS)
    body = encode_error(error, path)
    response = web.Response(status=error.status, body=body, content_type="application/json", headers=headers)
    if error.status in (408, 413, 417):
        response.force_close()  # the rest of the request is not read
    return response


async def _wanted_model(exchange: Exchange) -> str | None:
    request, body = exchange.request, exchange.body
    name: str | None = None
    if body:
        if request.content_type == "multipart/form-data":
            name = form_model(body)
        else:
            exchange.said = read_object(body) if len(body) <= LONG else None
            try:
                name = await _scan(body) if exchange.said is None else model_of(exchange.said)
            except NotText:
                raise ApiError(400, "invalid_model", "`model` must be text.", param="model") from None
    return name or next(iter(parse_qs(request.rel_url.raw_query_string).get("model", ())), None)


async def _scan(body: bytes) -> str | None:
    name: str | None = None
    try:
        for name in scan_model(body):
            if name is None and len(body) > 100_000:
                await asyncio.sleep(0)
    except TooComplex:
        message = "The body has more parts than any sensible request; it was not looked through."
        raise ApiError(400, "request_too_complex", message) from None
    return name


def _preflight(request: web.BaseRequest, cors: dict[str, str]) -> web.Response:
    headers = dict(cors)
    headers["Allow"] = ", ".join(METHODS)
    if cors:
        headers["Access-Control-Allow-Methods"] = ", ".join(METHODS)
        headers["Access-Control-Allow-Headers"] = request.headers.get("Access-Control-Request-Headers", "*")
        headers["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)
        if request.headers.get("Access-Control-Request-Private-Network") == "true":
            headers["Access-Control-Allow-Private-Network"] = "true"
    return web.Response(status=204, headers=headers)


def _json(status: int, value: object, headers: dict[str, str]) -> web.Response:
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)
