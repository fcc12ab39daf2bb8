"""Targets for what `libmesh-node` reads: model files, bodies of requests, arguments of commands."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from libmesh_node.http.body import NotText, TooComplex, form_model, scan_model
from libmesh_node.http.commands import COMMANDS, Refusal
from libmesh_node.http.errors import ApiError
from libmesh_node.http.routing import find_model
from libmesh_node.llama.gguf import ModelError, read_header
from libmesh_node.snapshot import Model

from tests.fuzz.target import Target

# ── model files ──────────────────────────────────────────────────────────────────────────────────────────────────


def _gguf(data: bytes) -> None:
    number = os.memfd_create("fuzz.gguf")
    try:
        os.write(number, data)
        header = read_header(Path(f"/proc/self/fd/{number}"))
    except ModelError as exc:
        assert str(exc)  # noqa: PT017 - refused in words, or read
        return
    finally:
        os.close(number)
    for tensor in header.tensors:
        assert 0 <= tensor.offset <= tensor.offset + tensor.size <= len(data)
    assert header.kv_bytes_per_token() >= 0
    assert header.is_embedding_model in (True, False)


def _text(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


def _gguf_seeds() -> Iterator[bytes]:
    def key(name: str, kind: int, value: bytes) -> bytes:
        return _text(name) + kind.to_bytes(4, "little") + value

    keys = [
        key("general.architecture", 8, _text("llama")),
        key("llama.block_count", 4, (2).to_bytes(4, "little")),
        key("llama.attention.head_count_kv", 9, b"\5\0\0\0" + (2).to_bytes(8, "little") + bytes(8)),
        key("tokenizer.ggml.tokens", 9, b"\x08\0\0\0" + (2).to_bytes(8, "little") + _text("a") + _text("b")),
        key("general.alignment", 4, (32).to_bytes(4, "little")),
    ]
    tensor = _text("w") + b"\1\0\0\0" + (8).to_bytes(8, "little") + b"\0\0\0\0" + bytes(8)
    for count in (0, 1, len(keys)):
        head = (
            b"GGUF\3\0\0\0" + (1).to_bytes(8, "little") + count.to_bytes(8, "little") + b"".join(keys[:count])
        )
        yield head + tensor + bytes(-len(head + tensor) % 32 + 32)


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _scanned(body: bytes) -> str | None:
    *_, model = scan_model(body)
    return model


def _http_body(body: bytes) -> None:
    form_model(body)
    try:
        found: str | type[Exception] | None = _scanned(body)
    except (NotText, TooComplex) as exc:
        found = type(exc)
    try:
        text = body.decode("utf-8")
        document = json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return  # not JSON: any answer will do, as llama-server has the last word
    model = document.get("model") if isinstance(document, dict) else None
    if (
        isinstance(document, dict)
        and "model" in document
        and model is not None
        and not isinstance(model, str)
    ):
        assert found is NotText
    elif found is not NotText:  # it may be of an earlier `model` than the last one
        assert found == model


def _no_json(word: str) -> None:
    raise ValueError(word)


class Node:
    """In place of the bridge: takes any command whose arguments passed."""

    async def call(self, command: Any) -> Any:
        await command(self)
        answers = {"invite": ("token", 1), "plan": {}, "load": {}}
        return answers.get(self.asked, 1)

    def __getattr__(self, name: str) -> Any:
        async def take(*arguments: object) -> None:
            self.asked = name
            for argument in arguments:
                assert not isinstance(argument, str) or len(argument) <= 32 << 10
                assert not isinstance(argument, int) or 0 <= argument <= 65535 or name == "invite"

        return take


async def _commanded(name: str, arguments: dict[str, object]) -> None:
    node: Any = Node()
    try:
        assert isinstance(await COMMANDS[name](node, arguments), dict)
    except Refusal as exc:
        assert str(exc)  # noqa: PT017 - refused in words, or done


def _commands(data: bytes) -> None:
    try:
        arguments = json.loads(data[1:])
    except (ValueError, RecursionError):
        return
    if data and isinstance(arguments, dict):
        name = sorted(COMMANDS)[data[0] % len(COMMANDS)]
        coroutine = _commanded(name, arguments)
        try:
            coroutine.send(None)
        except StopIteration:
            return
        asyncio.run(coroutine)


def _command_seeds() -> Iterator[bytes]:
    arguments: dict[str, dict[str, object]] = {
        "/api/join": {"token": "lm1abc"},
        "/api/invite": {"scope": "worker", "ttl_s": 60},
        "/api/revoke": {"name": "ab"},
        "/api/runtime/models": {"model": "demo"},
        "/api/tunnels": {"direction": "expose", "name": "x", "target": "[::1]:80", "scope": "client"},
    }
    for number, name in enumerate(sorted(COMMANDS)):
        yield bytes([number]) + json.dumps(arguments.get(name, {})).encode()
    yield (
        bytes([sorted(COMMANDS).index("/api/tunnels")])
        + b'{"direction":"connect","peer":"p","name":"x","port":1}'
    )


def _routing(data: bytes) -> None:
    lots = random.Random(len(data))
    parts = data.decode("utf-8", "replace").split("\n")
    models = [Model(name=name, digest=name[::-1], size_bytes=0, context_length=0) for name in parts[1:20]]
    lots.shuffle(models)
    try:
        found = find_model(models, parts[0] or None, parts[20:])
    except ApiError as exc:
        assert exc.status in (400, 404, 503)  # noqa: PT017 - refused, or that very model
    else:
        assert not parts[0] or parts[0] in (found.name, found.digest)


PROGRAM = (
    Target("gguf", "a model file is read or refused in words, whatever it claims", _gguf, _gguf_seeds, 2048),
    Target("http_body", "the model is found where a JSON parser would find it", _http_body,
           lambda: [b'{"model":"a","messages":[{"content":"\\"model\\":"}]}', b'{"model": null}', b'[{"model":1}]',
                    b'{"\\u006dodel":"x","a":{"model":2}}', b'name="model"\r\n\r\nwhisper\r\n'], 512),
    Target("commands", "arguments are refused in words or passed on within bounds", _commands, _command_seeds, 512),
    Target("routing", "a name finds that model or none", _routing, lambda: [b"a\na\nb", b"", b"\nonly", b"q\nqq"], 512),
)  # fmt: skip
