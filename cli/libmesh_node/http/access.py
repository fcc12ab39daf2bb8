"""Which web pages may use the API and the console. Pure.

There are no API keys: whoever reaches the port may ask. That is meant for programs on this machine, and not for
any web page that a browser on this machine happens to show. A browser tells in `Origin` which page is asking and in
`Host` which name it looked up, so:

- `Host` must be a name that no stranger can own: an address, localhost, a name without dots or under .local,
  .localhost or .internal, or this machine's own. Otherwise a stranger's name that resolves to 127.0.0.1 ("DNS
  rebinding") would make his page same-origin with us. Ollama holds to the same list.
- `Origin`, if there is one, must be a page of this machine, of this very server, or no web page at all (an editor or
  a browser extension), or be listed by the operator.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from functools import lru_cache
from urllib.parse import urlsplit

_PRIVATE_SUFFIXES = (".localhost", ".local", ".internal")


@lru_cache(maxsize=64)  # each request asks, nearly all of the same name
def is_private_host(host: str, own_name: str = "") -> bool:
    """Whether the `Host` header names this machine in a way that a stranger's page cannot. Empty means HTTP/1.0."""
    if not host:
        return True
    name = _host_name(f"//{host}")
    if name is None:
        return False
    if "." not in name and ":" not in name:
        return True
    own = own_name != "" and name == own_name.casefold()
    return own or name.endswith(_PRIVATE_SUFFIXES) or _is_address(name)


def is_allowed_origin(origin: str, host: str, also: Collection[str] = ()) -> bool:
    """Whether a page of `origin` may use us. `also` lists further origins, or has `*` for all."""
    if origin in also or "*" in also:
        return True
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    if parts.scheme not in ("http", "https"):
        return (
            parts.scheme != ""
        )  # no web page has these; `null`, which any sandboxed frame has, has no scheme
    name = _host_name(origin)
    if name is None:
        return False
    return is_loopback(name) or name == "localhost" or name.endswith(".localhost") or parts.netloc == host


def is_loopback(address: str) -> bool:
    """Whether a numeric address is one of this machine's loopback addresses."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def _host_name(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        _ = parts.port
        return parts.hostname.casefold() if parts.hostname else None
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
