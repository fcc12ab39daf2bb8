"""Requests on connections of their own: what comes back, and what is left when it does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import aiohttp
import pytest
from libmesh_node.http import single
from libmesh_node.http.connections import Pool
from libmesh_node.http.single import SingleAnswer, ask, encode_post

POST = encode_post("host", "/v1/x", {"Accept": "*/*"}, b"body")
assert POST is not None


class Port:
    """Sends each connection the same, each time it is asked; then closes it, or leaves it to its other end."""

    def __init__(self, said: bytes, *, closes: bool, times: int, later: bytes) -> None:
        self.said, self.closes, self.times, self.later = said, closes, times, later
        self.go_on = asyncio.Event()  # with what comes later
        self.asked: list[bytes] = []
        self.open = 0
        self.left = asyncio.Event()
        self.was_reset = False

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            for _ in range(self.times):
                self.asked.append(await reader.readexactly(len(POST or b"")))
                writer.write(self.said)
            if self.later:
                await self.go_on.wait()
                writer.write(self.later)
            if not self.closes:
                try:
                    await reader.read()  # until it is closed
                except ConnectionResetError:
                    self.was_reset = True
        self.left.set()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        self.open -= 1


@asynccontextmanager
async def connections(
    said: bytes, *, closes: bool = False, times: int = 1, later: bytes = b""
) -> AsyncIterator[tuple[Port, Pool, int]]:
    port = Port(said, closes=closes, times=times, later=later)
    server = await asyncio.start_server(port.take, "127.0.0.1", 0)
    pool = Pool()
    async with server, asyncio.timeout(60):
        yield port, pool, server.sockets[0].getsockname()[1]
        pool.forget(())
        await asyncio.sleep(0.01)  # transports close in a turn of the loop
        while port.open:  # noqa: ASYNC110 - sockets tell nobody
            await asyncio.sleep(0.01)


async def asked(pool: Pool, port: int) -> SingleAnswer:
    assert POST is not None
    return await ask(await pool.take("127.0.0.1", port), POST, 1 << 18)


async def asked_again_and_again(pool: Pool, port: int) -> SingleAnswer:
    """With a connection that another request may have after this."""
    assert POST is not None
    connection = await pool.take("127.0.0.1", port)
    return await ask(connection, POST, 1 << 18, partial(pool.back, "127.0.0.1", port))


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


HEAD = b"HTTP/1.1 200 Fine\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\nContent-Length: 2\r\n"


@pytest.mark.parametrize(
    "before", [b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early\r\nX: 1\r\n\r\n"]
)
def test_answer_is_told_as_it_is_and_who_has_it_whole_closes_the_connection(before: bytes) -> None:
    async def main() -> None:
        async with connections(before + HEAD + b"\r\nok") as (port, pool, number):
            answer = await asked(pool, number)
            assert (answer.status, answer.reason, answer.content_length) == (200, "Fine", 2)
            assert answer.content_type == "text/event-stream"
            assert await answer.read() == b"ok"
            answer.close()
            await port.left.wait()
            assert port.asked == [
                b"POST /v1/x HTTP/1.1\r\nHost: host\r\nAccept: */*\r\nContent-Length: 4\r\n\r\nbody"
            ]
            answer.close()  # once more

    asyncio.run(main())


def test_who_closes_an_answer_closes_its_connection() -> None:
    async def main() -> None:
        async with connections(HEAD + b"\r\no") as (port, pool, number):
            answer = await asked(pool, number)
            assert await answer.content.readany() == b"o"
            answer.close()
            await port.left.wait()

    asyncio.run(main())


def test_who_gives_up_before_the_answer_resets_the_connection() -> None:
    async def main() -> None:
        async with connections(b"") as (port, pool, number):
            asking = asyncio.create_task(asked_again_and_again(pool, number))
            while not port.asked:  # noqa: ASYNC110 - sockets tell nobody
                await asyncio.sleep(0.01)
            asking.cancel()
            await port.left.wait()
            assert port.was_reset

    asyncio.run(main())


def test_client_that_cannot_ask_again_takes_no_used_connection() -> None:
    async def main() -> None:
        async with connections(STREAM + b"0\r\n\r\n", times=2) as (_, pool, number):
            answer = await asked_again_and_again(pool, number)
            assert await answer.read() == b"ok"
            answer.close()
            other = await pool.take("127.0.0.1", number, used=False)
            assert (other.used, pool.ready(url(number))) == (False, 1)
            other.close()

    asyncio.run(main())


STREAM = b"HTTP/1.1 200 Fine\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n"


def test_connection_of_a_whole_answer_serves_the_next_request() -> None:
    async def main() -> None:
        async with connections(STREAM + b"0\r\n\r\n", times=3) as (port, pool, number):
            for _ in range(3):
                answer = await asked_again_and_again(pool, number)
                assert await answer.read() == b"ok"
                assert pool.ready(url(number)) == 0  # while somebody has the answer
                answer.close()
                answer.close()
                assert pool.ready(url(number)) == 1
            assert (len(port.asked), port.open) == (3, 1)

    asyncio.run(main())


@pytest.mark.parametrize(
    "said",
    [
        STREAM,
        HEAD + b"Connection: close\r\n\r\nok",
        b"HTTP/1.0 200 Fine\r\nContent-Length: 2\r\n\r\nok",
    ],
)
def test_connection_of_an_answer_that_is_not_whole_or_the_last_serves_no_other(said: bytes) -> None:
    async def main() -> None:
        async with connections(said) as (port, pool, number):
            answer = await asked_again_and_again(pool, number)
            assert await answer.content.readany() == b"ok"
            answer.close()
            assert pool.ready(url(number)) == 0
            await port.left.wait()

    asyncio.run(main())


def test_connection_on_which_something_comes_that_nobody_asked_for_serves_no_other() -> None:
    async def main() -> None:
        async with connections(HEAD + b"\r\nok", later=HEAD + b"\r\nno") as (port, pool, number):
            answer = await asked_again_and_again(pool, number)
            assert await answer.read() == b"ok"
            answer.close()
            assert pool.ready(url(number)) == 1
            port.go_on.set()
            while pool.ready(url(number)):  # noqa: ASYNC110 - pools tell nobody
                await asyncio.sleep(0.01)
            await port.left.wait()

    asyncio.run(main())


def test_end_of_an_answer_of_which_nothing_more_is_wanted_is_waited_for() -> None:
    async def main() -> None:
        async with connections(STREAM, later=b"0\r\n\r\n") as (port, pool, number):
            answer = await asked_again_and_again(pool, number)
            assert await answer.content.readany() == b"ok"
            answer.finish()
            answer.close()
            assert pool.ready(url(number)) == 0
            port.go_on.set()
            while not pool.ready(url(number)):  # noqa: ASYNC110 - pools tell nobody
                await asyncio.sleep(0.01)
            assert not port.left.is_set()

    asyncio.run(main())


def test_end_that_does_not_come_is_not_waited_for_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(single, "END_LIMIT", 0.05)
        async with connections(STREAM) as (port, pool, number):
            answer = await asked_again_and_again(pool, number)
            assert await answer.content.readany() == b"ok"
            answer.finish()
            answer.close()
            await port.left.wait()
            assert pool.ready(url(number)) == 0

    asyncio.run(main())


def test_connection_to_a_server_that_is_gone_is_not_taken_back() -> None:
    async def main() -> None:
        async with connections(HEAD + b"\r\nok") as (port, pool, number):
            answer = await asked_again_and_again(pool, number)
            assert await answer.read() == b"ok"
            pool.forget(())  # and another one may have the port by now
            (await pool.take("127.0.0.1", number)).close()
            answer.close()
            assert pool.ready(url(number)) == 0
            await port.left.wait()

    asyncio.run(main())


def test_answer_that_ends_early_is_broken() -> None:
    async def main() -> None:
        async with connections(HEAD + b"\r\no", closes=True) as (_, pool, number):
            answer = await asked(pool, number)
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()
            answer.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", aiohttp.ServerDisconnectedError),
        (b"HTTP/1.1 200 Fi", aiohttp.ServerDisconnectedError),
        (b"220 this is no HTTP\r\n\r\n", aiohttp.ClientPayloadError),
    ],
)
def test_what_is_no_answer_is_an_error_of_the_client(said: bytes, error: type[Exception]) -> None:
    async def main() -> None:
        async with connections(said, closes=True) as (_, pool, number):
            with pytest.raises(error):
                await asked(pool, number)

    asyncio.run(main())


def test_cancelled_request_closes_its_connection() -> None:
    async def main() -> None:
        async with connections(b"") as (port, pool, number):
            asking = asyncio.create_task(asked(pool, number))
            while not port.asked:  # noqa: ASYNC110 - sockets tell nobody
                await asyncio.sleep(0.01)
            asking.cancel()
            await port.left.wait()
            assert (await asyncio.gather(asking, return_exceptions=True))[
                0
            ].__class__ is asyncio.CancelledError

    asyncio.run(main())


def test_connection_that_broke_before_it_was_used_is_an_error_of_the_client() -> None:
    async def main() -> None:
        async with connections(b"") as (_, pool, number):
            connection = await pool.take("127.0.0.1", number)
            connection.close()
            assert POST is not None
            with pytest.raises(aiohttp.ServerDisconnectedError):
                await ask(connection, POST, 1 << 18)

    asyncio.run(main())


@pytest.mark.parametrize("value", ["a\r\nX: 1", "a\nX: 1", "a\rX: 1", "a\0"])
def test_header_that_would_be_more_than_one_is_not_sent(value: str) -> None:
    assert encode_post("host", "/", {"Accept": value}, b"") is None
    assert encode_post("host", "/", {value: "a"}, b"") is None


def test_bytes_that_are_no_text_travel_in_headers_as_they_came() -> None:
    told = b"caf\xe9 \xc3\xa9".decode(errors="surrogateescape")
    assert b"User-Agent: caf\xe9 \xc3\xa9\r\n" in (encode_post("host", "/", {"User-Agent": told}, b"") or b"")
