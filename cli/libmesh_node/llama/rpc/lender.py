"""Lends this machine's rpc-server: one fresh process per session, checked by `WorkerEnd`, gone when the session is.

Why a process per session: rpc-server serves one client at a time, never clears memory that it hands out, and is as good
as a shell for whoever reaches it. So nobody gets what another one used.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from libmesh import Stream
from libmesh_node.errors import NodeError
from libmesh_node.llama.engine import Binary
from libmesh_node.llama.rpc.fork import Doors, Neighbourhood, converse
from libmesh_node.llama.rpc.frames import (
    TOKEN,
    Link,
    ProtocolError,
    Reply,
    frame,
)
from libmesh_node.llama.rpc.fresh import START_LIMIT, ask_facts, fresh_rpc_server
from libmesh_node.llama.rpc.opening import (
    MAX_MESSAGE,
    Protocol,
    Refusal,
    SessionRequest,
    decode_request,
    encode_answer,
    is_fork,
    protocol_mismatch,
)
from libmesh_node.llama.rpc.passing import Passer, receive_results
from libmesh_node.llama.rpc.weights import open_weights
from libmesh_node.llama.rpc.worker import WorkerEnd
from libmesh_node.llama.rpc.working import ASK_LIMIT, Working, say
from libmesh_node.llama.server import child_environment
from libmesh_node.snapshot import Process

log = logging.getLogger(__name__)

MAX_SESSIONS = 16

_FAILURES = (NodeError, OSError, ProtocolError, trio.TooSlowError, trio.BrokenResourceError)


@dataclass(frozen=True, slots=True, kw_only=True)
class LentModel:
    """A model that a host may use here: its files and its digest."""

    name: str
    digest: str
    parts: tuple[Path, ...]


class Lender:
    """Answers hosts. `serve` handles one stream; the models are set from outside as they are identified.

    Args:
        binary: the rpc-server.
        memory: bytes that may be lent at this moment, asked anew for each session; those lent already are subtracted here.
        environment: the node's own.
        device: for rpc-server's `--device`; `None` for its choice.
        cpu: rpc-server computes on the processor.
        on_change: called when a session began or ended.
        open_stream: to another worker's lender, by its peer id, to pass results on; `None`: nothing is passed on.
        identify: the digest of files as they are now, asked before each session; `None`: they are trusted not to change.

    Attributes:
        models: by digest.
    """

    def __init__(
        self,
        binary: Binary,
        *,
        memory: Callable[[], int],
        environment: Mapping[str, str],
        device: str | None = None,
        cpu: bool = True,
        on_change: Callable[[], None] = lambda: None,
        open_stream: Callable[[str], Awaitable[Stream]] | None = None,
        identify: Callable[[Sequence[Path]], Awaitable[str]] | None = None,
    ) -> None:
        self._identify = identify
        self._open_stream = open_stream
        self._opened = trio.Event()
        self._neighbourhood, self._doors = Neighbourhood(open_stream), Doors()
        self._fillable: dict[bytes, tuple[str, Working]] = {}
        self.models: dict[str, LentModel] = {}
        self._binary, self._memory, self._device, self._cpu = binary, memory, device, cpu
        self._environment = child_environment(environment)
        self._on_change = on_change
        self._sessions: dict[object, _Lent] = {}

    @property
    def lent_bytes(self) -> int:
        """What running sessions were granted, all together."""
        return sum(lent.granted for lent in self._sessions.values())

    def granted_on(self, digest: str) -> int:
        """What those of one model were granted, all together."""
        return sum(lent.granted for lent in self._sessions.values() if lent.digest == digest)

    def lent_on(self, digest: str) -> int:
        """The same of those whose hosts can be reached."""
        sessions = [lent for lent in self._sessions.values() if lent.digest == digest]
        return sum(lent.granted for lent in sessions if not lent.stream.connection_lost)

    @property
    def processes(self) -> tuple[Process, ...]:
        """The rpc-servers that run."""
        return tuple(lent.process for lent in self._sessions.values() if lent.process.pid is not None)

    async def serve(self, stream: Stream) -> None:
        """One session, from its first frame to its end. Never raises for what the host does."""
        try:
            kind, said, rest = await _receive_first(stream)
            if kind == Link.PUSH_OPEN:
                await self._be_filled(stream, said, rest)
                return
            if kind == Link.REACH:
                await self._doors.serve(stream, said, rest)
                return
            request = decode_request(said)
        except (ProtocolError, trio.BrokenResourceError) as exc:
            log.info("the peer %s asked for a session and made no sense: %s", stream.peer, exc)
            stream.reset()
            return
        refusal = self._refusal(request)
        if refusal is not None and refusal.later and await self._end_severed(request.digest):
            refusal = self._refusal(request)
        if refusal is not None:
            log.info("refused a session to the peer %s: %s", stream.peer, refusal.reason)
            await say(stream, frame(Reply.OPENED, encode_answer(refusal)))
            return
        token, model = object(), self.models[request.digest]
        process = Process(name="rpc-server", pid=None, port=0, model=model.name, status="starting")
        lent = self._sessions[token] = _Lent(stream, request, process)
        self._on_change()
        try:
            with lent.scope:
                await self._run(stream, request, rest, model, lent)
        except* _FAILURES as group:
            why = str(group.exceptions[0]) or f"it did not answer within {START_LIMIT:g} s"
            log.warning("no session for the peer %s: %s", stream.peer, why)
            if lent.process.pid is None:  # the host knows of no session yet
                refusal = Refusal(f"its rpc-server does not run: {why}")
                await say(stream, frame(Reply.OPENED, encode_answer(refusal)))
            else:
                stream.reset()
        finally:
            del self._sessions[token]
            lent.over.set()
            self._on_change()

    async def _end_severed(self, digest: str) -> bool:
        """End sessions of a model whose hosts cannot be reached: another host has been elected. Whether there were any."""
        severed = [
            lent for lent in self._sessions.values() if lent.digest == digest and lent.stream.connection_lost
        ]
        for lent in severed:
            log.info(
                "the peer %s is not waited for any longer: another host works on its model", lent.stream.peer
            )
            lent.scope.cancel()
        for lent in severed:
            await lent.over.wait()
        return bool(severed)

    def _refusal(self, request: SessionRequest) -> Refusal | None:
        protocol = _numbers(self._binary.rpc_protocol)
        mismatch = protocol_mismatch(request.protocol, protocol)
        if mismatch is not None:
            return Refusal(mismatch)
        if request.digest not in self.models:
            return Refusal(
                f"it has not the same {request.model or 'model'}: no file here has the digest {request.digest[:16]}…"
            )
        if len(self._sessions) >= MAX_SESSIONS:
            return Refusal(f"it has {MAX_SESSIONS} sessions already", later=True)
        left = self._memory() - self.lent_bytes
        if request.memory_bytes > left:
            needed = (
                f"{request.memory_bytes / 1e9:.2f} GB are asked for, {max(0, left) / 1e9:.2f} GB are left"
            )
            return Refusal(f"its memory is taken: {needed}", later=True)
        return None

    async def _run(
        self, stream: Stream, request: SessionRequest, rest: bytes, model: LentModel, lent: _Lent
    ) -> None:
        if self._identify is not None and await self._identify(model.parts) != model.digest:
            await _refuse(stream, f"its copy of {model.name} is not what it was when it was identified")
            return
        with open_weights(model.parts) as weights:
            server = fresh_rpc_server(self._binary, self._environment, self._device)
            async with server as (child, sock, port):
                with trio.fail_after(START_LIMIT):
                    facts = await ask_facts(
                        sock, request.memory_bytes, cpu=self._cpu, protocol=request.protocol
                    )
                mismatch = protocol_mismatch(request.protocol, facts.protocol)
                if mismatch is not None:  # another program than the one that was asked before
                    await _refuse(stream, mismatch)
                    return
                granted = lent.granted
                lent.process = replace(lent.process, pid=child.pid, port=port, status="ready")
                self._on_change()
                log.info(
                    "working for the peer %s on %s, with %.2f GB", stream.peer, model.name, granted / 1e9
                )
                if not await say(stream, frame(Reply.OPENED, encode_answer(facts)), last=False):
                    return
                if is_fork(facts.protocol):
                    await sock.aclose()  # HELLO is said once on each connection, and now the host will say it
                    await self._pass_on(stream, request, rest, port)
                    return
                end = WorkerEnd(granted, len(facts.devices), weights.holds)
                session = Working(stream, sock, end, weights)
                if self._open_stream is not None and request.next:
                    session.passer = Passer(partial(self._open_stream, request.next), request.next_token)
                if request.token:
                    self._fillable[request.token] = request.previous, session
                    self._opened.set()
                    self._opened = trio.Event()
                try:
                    reason = await session.run(rest)
                finally:
                    self._fillable.pop(request.token, None)
                log.info("no longer working for the peer %s on %s: %s", stream.peer, model.name, reason)

    async def _pass_on(self, stream: Stream, request: SessionRequest, rest: bytes, port: int) -> None:
        """A session of the fork's."""
        async with (
            self._neighbourhood.open(stream.peer, request.token, request.neighbours),
            await trio.open_tcp_stream("127.0.0.1", port) as sock,
        ):
            rewriter = self._neighbourhood.rewriter(stream.peer)
            self._doors.add(request.token, request.neighbours, port)
            try:
                await converse(stream, sock, rewriter.from_host, rewriter.from_server, rest)
            except* ProtocolError as group:
                log.warning(
                    "the peer %s speaks to the fork's rpc-server and makes no sense: %s",
                    stream.peer,
                    group.exceptions[0],
                )
            finally:
                self._doors.remove(request.token, port)
                stream.reset()
        if rewriter.unknown:
            log.warning(
                "the peer %s named ports %s, which lead nowhere from here", stream.peer, rewriter.unknown
            )

    async def _be_filled(self, stream: Stream, token: bytes, data: bytes) -> None:
        """A stream from the worker before one of ours: results for the holes of that session, which may still be starting."""
        with trio.move_on_after(ASK_LIMIT):
            while token not in self._fillable:
                await self._opened.wait()
        previous, session = self._fillable.get(token, ("", None))
        if session is None or stream.peer != previous:
            raise ProtocolError("it knows no session here")
        await receive_results(stream, data, session.fill)


class _Lent:
    """What one session has, as seen from outside.

    Attributes:
        scope: cancel it to end the session; then `over` is set.
    """

    def __init__(self, stream: Stream, request: SessionRequest, process: Process) -> None:
        self.stream, self.process = stream, process
        self.granted, self.digest = request.memory_bytes, request.digest
        self.scope, self.over = trio.CancelScope(), trio.Event()


async def _receive_first(stream: Stream) -> tuple[int, bytes, bytes]:
    """The first frame, and what came behind it. Raises `ProtocolError`, or as the stream."""
    data = b""
    with trio.move_on_after(ASK_LIMIT):
        while len(data) < 9 or len(data) < 9 + _first_size(data):
            received = await stream.receive_some(MAX_MESSAGE)
            if not received:
                raise ProtocolError("it ended before it asked")
            data += received
        end = 9 + _first_size(data)
        return data[0], data[9:end], data[end:]
    raise ProtocolError(f"it did not ask within {ASK_LIMIT:g} s")


def _first_size(data: bytes) -> int:
    kind, size = data[0], int.from_bytes(data[1:9], "little")
    by_token = kind in (Link.PUSH_OPEN, Link.REACH) and size == TOKEN
    if not by_token and not (kind == Link.OPEN and size <= MAX_MESSAGE):
        raise ProtocolError("its first frame is no request for a session")
    return size


async def _refuse(stream: Stream, reason: str) -> None:
    log.warning("refused a session to the peer %s: %s", stream.peer, reason)
    await say(stream, frame(Reply.OPENED, encode_answer(Refusal(reason))))


def _numbers(protocol: str | None) -> Protocol:
    numbers = [int(part) for part in (protocol or "0.0.0").split(".")]
    return numbers[0], numbers[1], numbers[2]
