"""The console's port: the page, `/api/…` for people and for the command line, `/metrics`, and the API under `/v1/`.

Reading is open to whoever reaches the port. Changing anything is for programs and pages of this machine: the caller
must come from a loopback address, name this machine as `Host`, send `application/json` (which no page of a stranger
can without asking first, and nobody here grants that), and be of the same origin if it is a page.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from functools import cache
from importlib.resources import files

from aiohttp import web

from libmesh_node.bridge import Bridge, CommandFailed
from libmesh_node.http.access import is_loopback, is_private_host
from libmesh_node.http.api import Api, refuse
from libmesh_node.http.commands import COMMANDS, REMOVALS, Command, Refusal
from libmesh_node.http.errors import ApiError
from libmesh_node.http.metrics import CONTENT_TYPE
from libmesh_node.http.proxy import Proxy
from libmesh_node.http.status import local_models_json, status_json, tunnels_json

log = logging.getLogger("libmesh_node.http")

MAX_COMMAND_BODY = 64 << 10
"""Bytes of a command. The longest is a token of a few KiB."""

BODY_LIMIT = 10.0
"""Seconds that a command may take to arrive."""

MAX_WATCHERS = 64
"""Event streams at once; one more gets 503. A browser tab is one."""

KEEPALIVE = 15.0
"""Seconds between comments on a quiet event stream, so that proxies and browsers know it lives."""

UPDATE_PAUSE = 0.2
"""Seconds between two statuses on one stream at the least. What changed meanwhile is in the next one."""

STATUS_OF = {
    "invalid": 400,
    "denied": 403,
    "not_found": 404,
    "conflict": 409,
    "unreachable": 502,
    "busy": 503,
    "stopping": 503,
    "internal": 500,
}
"""HTTP status of each `CommandFailed.code`."""

_TABLES = {"POST": COMMANDS, "DELETE": REMOVALS}

_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_ASSETS = {
    "/": ("index.html", "text/html"),
    "/console.css": ("console.css", "text/css"),
    "/console.js": ("console.js", "text/javascript"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}


class Console:
    """Answers requests on the console's port. `any_host` is for a node that listens on all addresses."""

    def __init__(self, bridge: Bridge, api: Api, proxy: Proxy, *, any_host: bool = False) -> None:
        self._bridge = bridge
        self._api = api
        self._proxy = proxy
        self._any_host = any_host
        self._watchers = 0
        self._reads: dict[str, Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]] = {
            "/api/status": self._status,
            "/api/events": self._events,
            "/api/tunnels": self._tunnels,
            "/api/runtime/models": self._models,
            "/metrics": self._metrics,
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request. Never raises except when cancelled."""
        path = request.path
        if path.startswith("/v1/"):
            return await self._api.handle(request)
        try:
            if not self._any_host and not self._names_us(request):
                raise Refusal(
                    403, "host_refused", "This console answers on this machine only: use localhost."
                )
            if (table := _TABLES.get(request.method)) is not None and path in table:
                return await self._command(request, table[path])
            allowed = self._methods(path)
            if not allowed:
                raise Refusal(404, "unknown", "There is no such page or command.")
            if request.method not in allowed:
                raise Refusal(405, "method_not_allowed", f"{path} takes {', '.join(allowed)} only.")
            return _asset(path) if path in _ASSETS else await self._reads[path](request)
        except Refusal as refusal:
            response = _reply(refusal.status, {"ok": False, "error": str(refusal), "code": refusal.code})
            if refusal.status == 405:
                response.headers["Allow"] = ", ".join(self._methods(path))
            return response
        except ApiError as error:
            return refuse(error, path, {})

    def _methods(self, path: str) -> list[str]:
        reads = ["GET", "HEAD"] if path in self._reads or path in _ASSETS else []
        return reads + [method for method, table in _TABLES.items() if path in table]

    async def _status(self, request: web.BaseRequest) -> web.StreamResponse:
        return _reply(200, self._document(request))

    async def _tunnels(self, request: web.BaseRequest) -> web.StreamResponse:
        return _reply(200, {"tunnels": tunnels_json(self._bridge.snapshot.tunnels)})

    async def _models(self, request: web.BaseRequest) -> web.StreamResponse:
        return _reply(200, {"models": local_models_json(self._bridge.snapshot.local_models)})

    async def _metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        proxy = self._proxy
        tunnelled: Mapping[tuple[str, str], int] = {}
        with suppress(CommandFailed, TimeoutError):  # a busy node tells the rest
            async with asyncio.timeout(1):
                tunnelled = await self._bridge.call(lambda commands: commands.tunnelled())
        text = self._api.metrics.text(
            self._bridge.snapshot, proxy.in_flight, proxy.waiting, proxy.queues.lengths, tunnelled
        )
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})

    async def _events(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._watchers >= MAX_WATCHERS:
            raise Refusal(503, "busy", f"{MAX_WATCHERS} event streams are open already.")
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
        )
        self._watchers += 1
        try:
            await response.prepare(request)
            if request.method == "GET":
                await self._stream_status(request, response)
        except ConnectionError:
            log.debug("a watcher of /api/events left")
        finally:
            self._watchers -= 1
        return response

    async def _stream_status(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        async with aclosing(self._bridge.watch(silence=KEEPALIVE)) as changes:
            async for snapshot in changes:
                if snapshot is None:
                    await response.write(b": keepalive\n\n")
                else:
                    await response.write(b"data: " + _encode(self._document(request)) + b"\n\n")
                    await asyncio.sleep(UPDATE_PAUSE)

    async def _command(self, request: web.BaseRequest, command: Command) -> web.StreamResponse:
        self._check_commander(request)
        try:
            arguments = json.loads(await _short_body(request) or b"{}")
        except ValueError:
            raise Refusal(400, "invalid", "The body is not JSON.") from None
        if not isinstance(arguments, dict):
            raise Refusal(400, "invalid", "The body must be a JSON object.")
        try:
            answer = await command(self._bridge, arguments)
        except CommandFailed as failure:
            raise Refusal(STATUS_OF.get(failure.code, 500), failure.code, str(failure)) from failure
        log.info("%s %s done", request.method, request.path)
        return _reply(200, {"ok": True, **answer})

    def _check_commander(self, request: web.BaseRequest) -> None:
        if not is_loopback(request.remote or "") or not self._names_us(request):
            raise Refusal(403, "denied", "Commands are taken from this machine only.")
        origin = request.headers.get("Origin")
        if origin is not None and origin != f"http://{request.headers.get('Host', '')}":
            raise Refusal(403, "denied", "Commands are taken from the console's own page only.")
        if request.content_type != "application/json":
            raise Refusal(415, "invalid", "Send the command as application/json.")

    def _names_us(self, request: web.BaseRequest) -> bool:
        return is_private_host(request.headers.get("Host", ""), self._bridge.snapshot.hostname)

    def _document(self, request: web.BaseRequest) -> dict[str, object]:
        trusted = is_loopback(request.remote or "") and self._names_us(request)
        return status_json(self._bridge.snapshot, self._proxy.in_flight, with_token=trusted)


async def _short_body(request: web.BaseRequest) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_LIMIT):
            while chunk := await request.content.readany():
                body += chunk
                if len(body) > MAX_COMMAND_BODY:
                    raise Refusal(413, "invalid", f"A command has at most {MAX_COMMAND_BODY >> 10} KiB.")
    except TimeoutError:
        raise Refusal(408, "invalid", f"The command did not arrive within {BODY_LIMIT:.0f} s.") from None
    return bytes(body)


def _reply(status: int, value: object) -> web.Response:
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
    response = web.Response(
        status=status, body=_encode(value), content_type="application/json", headers=headers
    )
    if status in (408, 413):
        response.force_close()  # the rest of the request is not read
    return response


def _encode(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _asset(path: str) -> web.Response:
    name, content_type = _ASSETS[path]
    return web.Response(
        body=_read_asset(name), content_type=content_type, charset="utf-8", headers=_PAGE_HEADERS
    )


@cache
def _read_asset(name: str) -> bytes:
    return (files("libmesh_node.http") / "static" / name).read_bytes()
