"""The console's commands: from a JSON object to a call of the node, and its answer as JSON.

`COMMANDS` is the table of them. Each takes the bridge and the arguments and returns the fields of the answer; it raises
`Refusal` for arguments that make no sense, before the node hears of them, and lets `CommandFailed` pass.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping

from libmesh_node.bridge import Bridge

Command = Callable[[Bridge, Mapping[str, object]], Awaitable[dict[str, object]]]

SCOPES = ("client", "worker", "invite")

MAX_TTL = 10 * 365 * 86400.0
"""Seconds that an invite may hold: ten years."""

MAX_TEXT = 32 << 10


class Refusal(Exception):
    """A request to the console that is not carried out. `status` is HTTP's, `code` a word for programs."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


async def join(bridge: Bridge, arguments: Mapping[str, object]) -> dict[str, object]:
    """`{"token"}` → `{"mesh_id"}`."""
    token = _text(arguments, "token").strip()
    return {"mesh_id": await bridge.call(lambda node: node.join(token))}


async def invite(bridge: Bridge, arguments: Mapping[str, object]) -> dict[str, object]:
    """`{"scope", "ttl_s"}` → `{"token", "scope", "expires_unix"}`."""
    scope = _one_of(arguments, "scope", SCOPES, default="client")
    ttl = _number(arguments, "ttl_s", default=7 * 86400.0)
    if not 1 <= ttl <= MAX_TTL:
        raise _invalid("`ttl_s` must be between 1 second and ten years.")
    token, expires_unix = await bridge.call(lambda node: node.invite(scope, ttl))
    return {"token": token, "scope": scope, "expires_unix": expires_unix}


async def revoke(bridge: Bridge, arguments: Mapping[str, object]) -> dict[str, object]:
    """`{"name"}`, an invite's id or the beginning of it, or a peer → `{"done"}`, in words."""
    name = _text(arguments, "name").strip()
    return {"done": await bridge.call(lambda node: node.revoke(name))}


async def stop(bridge: Bridge, arguments: Mapping[str, object]) -> dict[str, object]:
    """`{}` → `{}`; the node ends right after."""
    await bridge.call(lambda node: node.stop())
    return {}


async def tunnel(bridge: Bridge, arguments: Mapping[str, object]) -> dict[str, object]:
    """`{"direction": "expose", "name", "target", "scope"}` or `{"direction": "connect", "peer", "name", "port"}`.

    Both answer `{"port"}`: the port exposed, or the local one that leads there.
    """
    name = _text(arguments, "name")
    if _one_of(arguments, "direction", ("expose", "connect")) == "expose":
        host, port = _target(_text(arguments, "target"))
        scope = _one_of(arguments, "scope", SCOPES, default="client")
        await bridge.call(lambda node: node.expose(name, host, port, scope))
        return {"port": port}
    peer = _text(arguments, "peer")
    wanted = _port(_number(arguments, "port", default=0), lowest=0)
    return {"port": await bridge.call(lambda node: node.connect(peer, name, wanted))}


async def plan(bridge: Bridge, arguments: Mapping[str, object]) -> dict[str, object]:
    """`{"model"}` → how it would be served now; the fields are those of `planning.plan_json`."""
    model = _text(arguments, "model")
    return await bridge.call(lambda node: node.plan(model))


async def load(bridge: Bridge, arguments: Mapping[str, object]) -> dict[str, object]:
    """`{"model"}`, named as for `--model` → `{"model", "status", "alone"}`, as `NodeCommands.load` says."""
    model = _text(arguments, "model")
    return await bridge.call(lambda node: node.load(model))


async def unload(bridge: Bridge, arguments: Mapping[str, object]) -> dict[str, object]:
    """`{"model", "forget"}` → `{"model", "wanted"}`, as `NodeCommands.unload` says."""
    name = _text(arguments, "model")
    forget = arguments.get("forget", False)
    if not isinstance(forget, bool):
        raise _invalid("`forget` must be true or false.")
    return await bridge.call(lambda node: node.unload(name, forget=forget))


COMMANDS: Mapping[str, Command] = {
    "/api/join": join,
    "/api/invite": invite,
    "/api/revoke": revoke,
    "/api/stop": stop,
    "/api/tunnels": tunnel,
    "/api/plan": plan,
    "/api/runtime/models": load,
}
"""By path, for POST."""

REMOVALS: Mapping[str, Command] = {
    "/api/runtime/models": unload,
}
"""By path, for DELETE."""


def _invalid(message: str) -> Refusal:
    return Refusal(400, "invalid", message)


def _text(arguments: Mapping[str, object], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not value or len(value) > MAX_TEXT:
        raise _invalid(f"`{name}` must be a non-empty text.")
    return value


def _one_of(
    arguments: Mapping[str, object], name: str, allowed: tuple[str, ...], default: str | None = None
) -> str:
    value = arguments.get(name, default)
    if value not in allowed:
        raise _invalid(f"`{name}` must be one of {', '.join(allowed)}.")
    return str(value)


def _number(arguments: Mapping[str, object], name: str, default: float) -> float:
    value = arguments.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _invalid(f"`{name}` must be a number.")
    return value


def _target(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    if not port.isascii() or not port.isdigit():
        raise _invalid("`target` must be HOST:PORT.")
    return host, _port(int(port[:6]), lowest=1)


def _port(value: float, *, lowest: int) -> int:
    if value != int(value) or not lowest <= value <= 65535:
        raise _invalid(f"A port is a whole number from {lowest} to 65535.")
    return int(value)
