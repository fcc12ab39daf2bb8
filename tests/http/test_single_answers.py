"""Answers as their bytes come: what is taken for a whole one, what for none, and how much of it is read."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from libmesh_node.http.connections import Connection
from libmesh_node.http.single import SingleAnswer, ask

from tests.http.test_single import HEAD, POST, STREAM


class Raw(asyncio.Transport):
    """Keeps what is done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.closing, self.done = False, list[str]()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.done.append("write")

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True
        self.done.append("abort")

    def get_extra_info(self, name: str, default: object = None) -> socket.socket:
        with socket.socket() as closed:
            return closed

    def pause_reading(self) -> None:
        self.done.append("pause")

    def resume_reading(self) -> None:
        self.done.append("resume")


@asynccontextmanager
async def fed(
    *pieces: bytes, buffer: int = 1 << 18, back: list[Connection] | None = None
) -> AsyncIterator[tuple[SingleAnswer, Connection, Raw]]:
    """The answer that `pieces` are, one after the other."""
    connection, transport = Connection(), Raw()
    connection.connection_made(transport)
    assert POST is not None
    asking = asyncio.create_task(
        ask(connection, POST, buffer, None if back is None else back.append, lambda answer: answer.status)
    )
    await asyncio.sleep(0)
    for piece in pieces:
        connection.data_received(piece)
    async with asyncio.timeout(5):
        answer = await asking
        try:
            yield answer, connection, transport
        finally:
            answer.close()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_answer_is_the_same_however_its_bytes_arrive(size: int) -> None:
    said = (
        b"HTTP/1.1 103 Hm\r\nX: 0\r\n\r\n"
        + STREAM.replace(b"Fine", b"Fi ne")
        + b"3\r\n!!!\r\n0\r\nX: 1\r\n\r\n"
    )

    async def main() -> None:
        back: list[Connection] = []
        pieces = [said[start : start + size] for start in range(0, len(said), size)]
        async with fed(*pieces, back=back) as (answer, connection, _):
            assert (answer.status, answer.reason) == (200, "Fi ne")
            assert list(answer.headers.items()) == [("Transfer-Encoding", "chunked")]
            assert await answer.read() == b"ok!!!"
            assert answer.at_eof()
            assert await answer.readany() == b""
        assert back == [connection]

    asyncio.run(main())


@pytest.mark.parametrize("coding", [b"", b"Transfer-Encoding: chunked, gzip\r\n"])
def test_answer_without_a_length_ends_with_its_connection(coding: bytes) -> None:
    async def main() -> None:
        back: list[Connection] = []
        async with fed(b"HTTP/1.1 200 OK\r\n" + coding + b"\r\nhalf", back=back) as (answer, connection, _):
            assert await answer.readany() == b"half"
            assert not answer.at_eof()
            connection.data_received(b" and whole")
            connection.connection_lost(None)
            assert await answer.read() == b" and whole"
        assert not back

    asyncio.run(main())


def test_answer_without_a_length_whose_connection_breaks_is_not_whole() -> None:
    async def main() -> None:
        async with fed(b"HTTP/1.1 200 OK\r\n\r\nhalf") as (answer, connection, _):
            connection.connection_lost(ConnectionResetError(104, "reset"))
            assert await answer.readany() == b"half"  # what came before is not lost
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.readany()

    asyncio.run(main())


def test_answer_that_is_not_read_stops_its_server_and_reading_lets_it_go_on() -> None:
    async def main() -> None:
        long = b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n" + b"a" * 11
        async with fed(long, buffer=10) as (answer, connection, transport):
            connection.data_received(b"a" * 5)
            assert transport.done == ["write", "pause"]
            assert await answer.readany() == b"a" * 16
            assert transport.done == ["write", "pause", "resume"]

    asyncio.run(main())


def test_second_answer_that_nobody_asked_for_is_no_part_of_the_first_and_spoils_the_connection() -> None:
    async def main() -> None:
        back: list[Connection] = []
        async with fed(HEAD + b"\r\nok" + HEAD + b"\r\nno", back=back) as (answer, connection, _):
            assert (await answer.read(), answer.reason) == (b"ok", "Fine")
            assert not connection.is_usable
        assert not back

    asyncio.run(main())


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 20_000,
        b"HTTP/1.1 200 OK\r\nX: " + b"1" * 100_000,
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 000 Nothing\r\nContent-Length: 2\r\n\r\nok",
    ],
)
def test_head_that_is_none_fails_the_request_and_resets_the_connection(said: bytes) -> None:
    async def main() -> None:
        pieces = [said[start : start + 4096] for start in range(0, len(said), 4096)]
        with pytest.raises(aiohttp.ClientPayloadError):
            async with fed(*pieces):
                pass

    asyncio.run(main())


@pytest.mark.parametrize("endless", [b"0\r\n" + b"X: 1\r\n" * 20_000, b"2;" + b"x" * 100_000])
def test_framing_without_end_breaks_the_answer(endless: bytes) -> None:
    async def main() -> None:
        async with fed(STREAM) as (answer, connection, _):
            for start in range(0, len(endless), 4096):
                connection.data_received(endless[start : start + 4096])
            assert await answer.readany() == b"ok"
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.readany()

    asyncio.run(main())


@pytest.mark.parametrize("body", [b"", b"o", b"ok"])
def test_failure_of_who_hears_of_the_head_fails_the_request(body: bytes) -> None:
    async def main() -> None:
        connection, transport = Connection(), Raw()
        connection.connection_made(transport)
        assert POST is not None
        asking = asyncio.create_task(ask(connection, POST, 10, None, lambda _: 1 // 0))
        await asyncio.sleep(0)
        connection.data_received(HEAD + b"\r\n" + body)
        with pytest.raises(ZeroDivisionError):
            await asking
        assert transport.done == ["write", "abort"]

    asyncio.run(main())


def test_who_waits_for_more_hears_of_a_failure_and_may_give_up() -> None:
    async def main() -> None:
        async with fed(STREAM) as (answer, _, _):
            assert await answer.readany() == b"ok"
            waiting = asyncio.create_task(answer.readany())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            waiting = asyncio.create_task(answer.readany())
            await asyncio.sleep(0)
            answer.set_exception(TimeoutError("nothing came"))
            with pytest.raises(TimeoutError, match="nothing came"):
                await waiting

    asyncio.run(main())


def test_connection_that_is_not_read_any_more_serves_no_other_request() -> None:
    async def main() -> None:
        back: list[Connection] = []
        async with fed(STREAM, buffer=1, back=back) as (answer, connection, transport):
            assert transport.done == ["write", "pause"]
            answer.finish()
            connection.data_received(b"0\r\n\r\n")
        assert not back
        assert transport.closing

    asyncio.run(main())


def test_body_of_which_nothing_more_is_wanted_is_not_kept() -> None:
    async def main() -> None:
        back: list[Connection] = []
        async with fed(STREAM, buffer=10, back=back) as (answer, connection, transport):
            assert await answer.readany() == b"ok"
            answer.finish()
            connection.data_received(b"40\r\n" + b"a" * 64 + b"\r\n0\r\n\r\n")
            assert transport.done == ["write"]
        assert back == [connection]

    asyncio.run(main())


@pytest.mark.parametrize("said", [STREAM + b"no length\r\n", STREAM + b"0\r\n\r\nmore"])
def test_connection_that_brings_nonsense_is_read_no_more(said: bytes) -> None:
    async def main() -> None:
        async with fed(said) as (answer, connection, transport):
            assert transport.closing
            assert await answer.readany() == b"ok"
            connection.connection_lost(None)

    asyncio.run(main())
