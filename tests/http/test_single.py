"""Requests on connections of their own: what comes back, and what is left when it does not."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import aiohttp
import pytest
from libmesh_node.http import single
from libmesh_node.http.connections import Connection, Pool
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


# ── what comes ───────────────────────────────────────────────────────────────────────────────────────────────────


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
