"""Connections made in advance: given out once, whole, and never to anybody else's server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from libmesh_node.http import connections
from libmesh_node.http.connections import READY, Pool
from libmesh_node.http.single import ask as ask_once
from libmesh_node.http.single import encode_post
from yarl import URL


class Port:
    """Answers one request on each connection, and counts both."""

    def __init__(self) -> None:
        self.writers: list[asyncio.StreamWriter] = []
        self.asked = 0
        self.url = ""

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            return
        self.asked += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        writer.close()


@asynccontextmanager
async def port_and_connections() -> AsyncIterator[tuple[Port, Pool, Callable[[], Awaitable[str]]]]:
    """A port, connections to it, and a request over them."""
    port = Port()
    server = await asyncio.start_server(port.take, "127.0.0.1", 0)
    number = server.sockets[0].getsockname()[1]
    port.url = f"http://127.0.0.1:{number}"
    pool = Pool()
    async with server:

        async def ask() -> str:
            url, request = URL(port.url), encode_post("host", "/x", {}, b"")
            assert request is not None
            async with asyncio.timeout(60):
                answer = await ask_once(await pool.take("127.0.0.1", url.port or 0), request, 1 << 18)
                try:
                    return (await answer.read()).decode()
                finally:
                    answer.close()

        yield port, pool, ask
        pool.forget(())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - sockets tell nobody
            await asyncio.sleep(0.01)


def test_request_takes_a_connection_that_was_made_before_and_leaves_the_other() -> None:
    async def main() -> None:
        async with port_and_connections() as (port, pool, ask):
            pool.prepare(port.url)
            pool.prepare(port.url)
            await until(lambda: pool.ready(port.url) == READY and len(port.writers) == READY)
            assert await ask() == "ok"
            assert (len(port.writers), port.asked, pool.ready(port.url)) == (READY, 1, READY - 1)
            for _ in range(READY):
                assert await ask() == "ok"
            assert (len(port.writers), pool.ready(port.url)) == (READY + 1, 0)

    asyncio.run(main())


def test_connection_that_broke_while_it_waited_is_given_to_nobody() -> None:
    async def main() -> None:
        async with port_and_connections() as (port, pool, ask):
            pool.prepare(port.url)
            await until(lambda: len(port.writers) == READY == pool.ready(port.url))
            for writer in port.writers:
                writer.transport.abort()
            await until(lambda: pool.ready(port.url) == 0)
            assert await ask() == "ok"
            assert port.asked == 1

    asyncio.run(main())


def test_connections_to_servers_that_are_gone_are_closed() -> None:
    async def main() -> None:
        async with port_and_connections() as (port, pool, _):
            pool.prepare(port.url)
            pool.forget(())  # while they are being made
            await until(lambda: pool.ready(port.url) == 0 and all(w.is_closing() for w in port.writers))
            await until(lambda: pool.prepare(port.url) is None and pool.ready(port.url) == READY)
            pool.forget([port.url])
            assert pool.ready(port.url) == READY
            pool.forget(["http://127.0.0.1:1"])
            assert pool.ready(port.url) == 0
            await until(lambda: all(writer.is_closing() for writer in port.writers))

    asyncio.run(main())


def test_connection_that_nobody_needs_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(connections, "READY_FOR", 0.05)
        async with port_and_connections() as (port, pool, _):
            pool.prepare(port.url)
            await until(lambda: len(port.writers) == READY)
            await until(lambda: all(writer.is_closing() for writer in port.writers))
            assert pool.ready(port.url) == 0

    asyncio.run(main())


def test_port_that_nobody_listens_at_fails_the_request_and_not_the_preparation() -> None:
    async def main() -> None:
        async with port_and_connections() as (port, pool, ask):
            url, port.url = port.url, "http://127.0.0.1:1"
            pool.prepare(port.url)
            with pytest.raises(aiohttp.ClientConnectorError):
                await ask()
            await until(lambda: not pool.ready(port.url))
            port.url = url
            assert await ask() == "ok"

    asyncio.run(main())
