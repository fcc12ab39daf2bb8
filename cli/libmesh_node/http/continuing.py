"""Go on with an answer whose server broke off, on another server that has the same weights."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import aiohttp

from libmesh_node.http.errors import ApiError
from libmesh_node.http.replay import Replay
from libmesh_node.http.retelling import Diverged
from libmesh_node.http.transcript import Told, Transcript
from libmesh_node.snapshot import Model, Server

log = logging.getLogger("libmesh_node.http")

PATIENCE = 60.0
"""Seconds to find a server that goes on, while clients are kept with comments. A restart takes some of them."""

PAUSE = 0.25
"""Seconds between two looks at who serves the model."""

SAY_EVERY = 5.0
"""Seconds between two comments to a client that waits."""

PREPARATION = 20.0
"""Seconds that a server has to render the prompt. It takes milliseconds; one that hangs is passed over."""

Choose = Callable[[Collection[Server], Collection[str]], Server | None]
"""The best of some servers, leaving out those with these base URLs."""


class NobodyGoesOn(Exception):
    """No server with the same weights took the answer over in time."""


class Succession:
    """Finds the next server for one answer.

    Args:
        session: for requests to servers. What prepares an answer and the answer itself go over one of its connections, so
            that they wait for one turn at a server of another node (`door.py`), and not for one each.
        find: the model of the request, as it is served now.
        choose: how servers are chosen.
        digest: of the weights that the answer was begun with.
        path: of the request, to ask anew where nothing has begun.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        find: Callable[[], Model],
        choose: Choose,
        digest: str,
        path: str,
    ) -> None:
        self._session, self._find, self._choose = session, find, choose
        self._digest, self._path = digest, path

    async def next(
        self,
        transcript: Transcript | Replay,
        failed: str,
        say: Callable[[], Awaitable[object]],
        seat: Callable[[Server | None], object],
    ) -> tuple[Server, aiohttp.ClientResponse]:
        """A server, and its answer, which goes on where `transcript` ends. The caller closes the answer.

        Args:
            transcript: what the client has.
            failed: the base URL of the server that broke off: asked again only when all others have refused.
            say: awaited every few seconds while nobody goes on, to keep the client.
            seat: told of each server as it is asked, so that others which look for one at the same time see it taken, and
                `None` when it refused.

        Raises `NobodyGoesOn` if none is found for `PATIENCE` seconds, and what `say` raises. Cancelling leaves nothing
        behind.
        """
        loop = asyncio.get_running_loop()
        deadline, told = loop.time() + PATIENCE, loop.time()
        refused = {failed}
        while loop.time() < deadline:
            try:
                present = self._find().servers
            except ApiError:  # nobody has it at this moment
                present = ()
            same = [server for server in present if self._fits(server) or not transcript.begun]
            server = self._choose(same, refused)
            if server is None:
                refused.clear()
                await asyncio.sleep(PAUSE)
                if loop.time() - told >= SAY_EVERY:
                    told = loop.time()
                    await say()
                continue
            refused.add(server.base_url)
            seat(server)
            asked = await self._ask_while_saying(server, transcript, say)
            try:
                return server, asked.result()
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError) as exc:
                log.warning("%s did not go on with an answer: %s", server.peer, exc or type(exc).__name__)
                seat(None)
        raise NobodyGoesOn

    def _fits(self, server: Server) -> bool:
        return bool(self._digest) and server.digest == self._digest

    async def _ask_while_saying(
        self, server: Server, transcript: Transcript | Replay, say: Callable[[], Awaitable[object]]
    ) -> asyncio.Task[aiohttp.ClientResponse]:
        """What came of asking: a long prompt takes long to be computed again, too. Raises only what `say` does."""
        asking = asyncio.create_task(self._ask(server, transcript))
        try:
            while not (await asyncio.wait((asking,), timeout=SAY_EVERY))[0]:
                await say()
        except BaseException:
            asking.cancel()
            if (await asyncio.wait((asking,)))[0] and not asking.cancelled() and asking.exception() is None:
                asking.result().close()
            raise
        return asking

    async def _ask(self, server: Server, transcript: Transcript | Replay) -> aiohttp.ClientResponse:
        if not isinstance(transcript, Replay) and not transcript.starts_over:
            if (body := await self._prepare(server, transcript)) is not None:
                return await self._post(server, "/completion", body)
            if not transcript.can_resume:
                raise Diverged("a token of it is in no text")
        return await self._post(server, transcript.endpoint or self._path, transcript.restart())

    async def _prepare(self, server: Server, transcript: Transcript) -> bytes | None:
        """The request to go on with; `None` if it turns out that the answer `starts_over`."""
        async with asyncio.timeout(PREPARATION):
            transcript.doubt(await self._wrong(server, transcript.told))
            if transcript.starts_over:
                return None
            prompt = ""
            if (request := transcript.template_request) is not None:
                prompt = (await self._call(server, "/apply-template", request))["prompt"]
            spelled = {text: await self._tokens(server, text) for text in transcript.gaps}
        return transcript.resume(prompt, spelled)

    async def _post(self, server: Server, path: str, body: bytes) -> aiohttp.ClientResponse:
        # The last of its connection: llama-server closes after a stream, and a place at its node is given back at once.
        headers = _JSON | {"Connection": "close"}
        answer = await self._session.post(server.base_url + path, data=body, headers=headers)
        if answer.status == 200:
            return answer
        try:
            reason = (await answer.content.read(500)).decode(errors="replace")
        finally:
            answer.close()
        raise ValueError(f"{answer.status} {reason}")

    async def _tokens(self, server: Server, text: str) -> tuple[list[int], str]:
        body = json.dumps({"content": text, "add_special": False, "with_pieces": True}).encode()
        told = (await self._call(server, "/tokenize", body))["tokens"]
        pieces = [piece["piece"] for piece in told]
        raw = [bytes(p) if isinstance(p, list) else str(p).encode() for p in pieces]
        tokens, spelled = [int(piece["id"]) for piece in told], b"".join(raw).decode(errors="replace")
        if spelled == f" {text}" and raw[0] == b" ":  # SentencePiece begins every text with a space
            return tokens[1:], text
        return tokens, spelled

    async def _wrong(self, server: Server, told: list[Told]) -> frozenset[Told]:
        """Those of `told` whose tokens do not spell their text. Each at most ends its text, so none hides another's lack."""
        if not told:
            return frozenset()
        tokens = [token for ids, _ in told for token in ids]
        body = json.dumps({"tokens": tokens}).encode()
        if (await self._call(server, "/detokenize", body))["content"] == "".join(text for _, text in told):
            return frozenset()
        if len(told) == 1:
            return frozenset(told)
        half = len(told) // 2
        return await self._wrong(server, told[:half]) | await self._wrong(server, told[half:])

    async def _call(self, server: Server, path: str, body: bytes) -> Any:
        async with self._session.post(server.base_url + path, data=body, headers=_JSON) as answer:
            if answer.status != 200:
                raise ValueError(f"{path}: {answer.status}")
            return json.loads(await answer.read())


_JSON = {"Content-Type": "application/json"}
