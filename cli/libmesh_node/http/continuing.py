"""Go on with an answer whose server broke off, on another server that has the same weights."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Collection
from typing import Any

import aiohttp

from libmesh_node.http.transcript import Transcript
from libmesh_node.snapshot import Model, Server

log = logging.getLogger("libmesh_node.http")

PATIENCE = 60.0
"""Seconds to find a server that goes on, while clients are kept with comments. A restart takes some of them."""

PAUSE = 0.25
"""Seconds between two looks at who serves the model."""

PREPARATION = 20.0
"""Seconds that a server has to render the prompt. It takes milliseconds; one that hangs is passed over."""

Choose = Callable[[Collection[Server], Collection[str]], Server | None]
"""The best of some servers, leaving out those with these base URLs."""


class NobodyGoesOn(Exception):
    """No server with the same weights took the answer over in time."""


class Succession:
    """Finds the next server for one answer.

    Args:
        session: for requests to servers.
        find: the model of the request, as it is served now.
        choose: how servers are chosen.
        digest: of the weights that the answer was begun with.
    """

    def __init__(
        self, session: aiohttp.ClientSession, find: Callable[[], Model], choose: Choose, digest: str
    ) -> None:
        self._session, self._find, self._choose, self._digest = session, find, choose, digest

    async def next(
        self, transcript: Transcript, failed: str, say: Callable[[], Any]
    ) -> tuple[Server, aiohttp.ClientResponse]:
        """A server, and its answer, which goes on where `transcript` ends. The caller closes the answer.

        Args:
            transcript: what the client has.
            failed: the base URL of the server that broke off: asked again only when all others have refused.
            say: awaited every few seconds while nobody goes on, to keep the client.

        Raises `NobodyGoesOn` after `PATIENCE` seconds. Cancelling leaves nothing behind.
        """
        loop = asyncio.get_running_loop()
        deadline, told = loop.time() + PATIENCE, loop.time()
        refused = {failed}
        while loop.time() < deadline:
            same = [server for server in self._find().servers if server.digest == self._digest]
            server = self._choose(same, refused)
            if server is None:
                refused.clear()
                await asyncio.sleep(PAUSE)
                if loop.time() - told >= 5:
                    told = loop.time()
                    await say()
                continue
            refused.add(server.base_url)
            try:
                return server, await self._ask(server, transcript)
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError) as exc:
                log.warning("%s did not go on with an answer: %s", server.peer, exc or type(exc).__name__)
        raise NobodyGoesOn

    async def _ask(self, server: Server, transcript: Transcript) -> aiohttp.ClientResponse:
        async with asyncio.timeout(PREPARATION):
            prompt = ""
            if (request := transcript.template_request) is not None:
                prompt = (await self._call(server, "/apply-template", request))["prompt"]
            spelled = {text: await self._tokens(server, text) for text in transcript.gaps}
        body = transcript.resume(prompt, spelled)
        answer = await self._session.post(f"{server.base_url}/completion", data=body, headers=_JSON)
        if answer.status != 200:
            reason = (await answer.content.read(500)).decode(errors="replace")
            answer.close()
            raise ValueError(f"{answer.status} {reason}")
        return answer

    async def _tokens(self, server: Server, text: str) -> tuple[list[int], str]:
        body = json.dumps({"content": text, "add_special": False, "with_pieces": True}).encode()
        told = (await self._call(server, "/tokenize", body))["tokens"]
        pieces = [piece["piece"] for piece in told]
        raw = b"".join(bytes(p) if isinstance(p, list) else str(p).encode() for p in pieces)
        return [int(piece["id"]) for piece in told], raw.decode(errors="replace")

    async def _call(self, server: Server, path: str, body: bytes) -> Any:
        async with self._session.post(server.base_url + path, data=body, headers=_JSON) as answer:
            if answer.status != 200:
                raise ValueError(f"{path}: {answer.status}")
            return json.loads(await answer.read())


_JSON = {"Content-Type": "application/json"}
