"""What passes between a client and a llama-server on somebody's machine, and what does not.

Clients may compute; they may not administer. llama-server mixes both on one port, and behind a mesh its port is open
to every member, so what changes a server, reads other people's conversations or lets it fetch for the caller is
refused here. Of a request's headers only the listed ones travel: an SDK sends its `Authorization` whatever the
address, and a key for some other provider is nobody else's business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from multidict import CIMultiDict

from libmesh_node.http.errors import ApiError

METHODS = ("GET", "HEAD", "POST", "OPTIONS")

_REFUSED = (
    ("POST", r"/slots/.*", "saving, restoring and erasing slots"),
    ("POST", r"/props", "changing a server's properties"),
    ("POST", r"/lora-adapters", "changing a server's adapters"),
    ("POST", r"(/v1)?/models(/.*)?", "loading and unloading models"),
    ("GET", r"(/v1)?/models/sse", "watching a server's models"),
    ("*", r"(/v1)?/chat/completions/control", "controlling somebody's generation"),
    ("*", r"(/v1)?/streams?(/.*)?", "reading stored streams"),
    ("*", r"/cors-proxy(/.*)?", "fetching through a server"),
    ("*", r"/(tools|mcp)(/.*)?", "a server's own tools"),
)
_REFUSED_COMPILED = tuple((method, re.compile(path), what) for method, path, what in _REFUSED)

_PLAIN_PATH = re.compile(r"(?:/[A-Za-z0-9_~@+:.-]+)+/?|/")
"""Paths that read the same to every parser. Others (`//`, encoded slashes, control characters) could mean one thing to
`check_endpoint` and another to llama-server, which decodes for itself."""

_FORWARDED = frozenset(
    {
        "accept",
        "accept-encoding",
        "accept-language",
        "anthropic-beta",
        "anthropic-version",
        "content-type",
        "openai-beta",
        "user-agent",
        "x-request-id",
    }
)

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""RFC 9110, 7.6.1, and what `Connection` itself names."""

_KEPT_BACK = _HOP_BY_HOP | {"server"}


@lru_cache(maxsize=64)  # nearly all requests call the same
def check_endpoint(method: str, path: str) -> None:
    """Raise `ApiError` unless clients of the mesh may call `method` on `path` (decoded, without the query)."""
    if method not in METHODS:
        raise ApiError(
            405, "method_not_allowed", f"{method[:20]} is not supported. Use {', '.join(METHODS)}."
        )
    if not _PLAIN_PATH.fullmatch(path) or "/./" in f"{path}/" or "/../" in f"{path}/":
        raise ApiError(404, "unknown_endpoint", "There is no such endpoint.")
    plain = path.rstrip("/")
    for refused_method, pattern, what in _REFUSED_COMPILED:
        if refused_method in ("*", method) and pattern.fullmatch(plain):
            message = f"{method} {plain} is not available through the mesh: {what} is up to the server's own machine."
            raise ApiError(403, "not_exposed", message)


def forwarded_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The request headers that travel to the server."""
    return {name: value for name, value in headers.items() if name.lower() in _FORWARDED}


def returned_headers(headers: Iterable[tuple[str, str]]) -> CIMultiDict[str]:
    """The response headers that travel to the client: all but those of the connection, of CORS, and what server it is."""
    returned: CIMultiDict[str] = CIMultiDict()
    named: set[str] = set()
    for name, value in headers:
        lower = name.lower()
        if lower == "connection":
            named.update(each.strip() for each in value.split(","))
        if lower not in _KEPT_BACK and not lower.startswith("access-control-"):
            returned.add(name, value)
    for name in named:
        returned.popall(name, None)
    return returned
