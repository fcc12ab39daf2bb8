"""How a client that follows tells a member what it is asked for; in virtual time."""

from __future__ import annotations

from functools import partial

import trio
import trio.testing
from libmesh_node.announced import encode_demand
from libmesh_node.asked import Asked
from libmesh_node.telling import MAX_MESSAGE, SERVICE, Teller, hear

from libmesh import Mesh, Stream
from tests.town import town, until

M, N = "ab" * 32, "cd" * 32
Heard = list[tuple[str, tuple[Asked, ...]]]


def asked(digest: str, requests: int, waiting: int = 0) -> Asked:
    return Asked(digest=digest, name="m", requests=requests, waiting=waiting)


async def listen(stream: Stream, heard: Heard) -> None:
    await hear(stream, lambda peer, told: heard.append((peer, told)))


async def sees(mesh: Mesh, *others: Mesh) -> None:
    def offers(other: Mesh) -> bool:
        entry = mesh.view.get(other.peer)
        return entry is not None and any(service.name == SERVICE for service in entry.services)

    await until(lambda: all(map(offers, others)))


async def test_requests_are_gathered_and_told_to_one_member(autojump_clock: trio.testing.MockClock) -> None:
    heard: Heard = []
    async with town() as place:
        one, two, three = await place.of(3)
        serve = partial(listen, heard=heard)
        with two.offer(SERVICE, serve), three.offer(SERVICE, serve):
            await sees(one, two, three)
            teller = Teller(one)
            async with trio.open_nursery() as nursery:
                teller.tell((asked(M, 1, 1),))
                teller.tell((asked(M, 2, 3), asked(N, 1)))
                nursery.start_soon(teller.run)
                await until(lambda: len(heard) == 1)
                teller.tell((asked(M, 1),))
                await until(lambda: len(heard) == 2)
                nursery.cancel_scope.cancel()
    assert heard == [(one.peer, (asked(M, 3, 3), asked(N, 1))), (one.peer, (asked(M, 1),))]


async def test_member_that_does_not_listen_is_passed_over(autojump_clock: trio.testing.MockClock) -> None:
    heard: Heard = []
    hung: list[Stream] = []

    async def hang(stream: Stream) -> None:
        hung.append(stream)
        await trio.sleep_forever()

    async with town() as place:
        one, two, three = sorted(await place.of(3), key=lambda mesh: mesh.peer)
        with two.offer(SERVICE, hang), three.offer(SERVICE, partial(listen, heard=heard)):
            await sees(one, two, three)
            teller = Teller(one)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(teller.run)
                teller.tell((asked(M, 1),))
                await until(lambda: bool(heard))
                teller.tell((asked(M, 2),))
                await until(lambda: len(heard) == 2)
                nursery.cancel_scope.cancel()
    assert len(hung) == 1


async def test_what_is_too_long_or_breaks_off_or_is_garbage_is_not_heard(
    autojump_clock: trio.testing.MockClock,
) -> None:
    heard: Heard = []
    async with town() as place:
        one, two = await place.of(2)
        with two.offer(SERVICE, partial(listen, heard=heard)):
            await sees(one, two)
            for message in (encode_demand((asked(M, 1),)) + bytes(MAX_MESSAGE), b"\xff", b""):
                stream = await one.open_service(two.peer, SERVICE)
                await stream.send_all(message)
                await stream.send_eof()
                await stream.receive_some(1)
                await stream.aclose()
            stream = await one.open_service(two.peer, SERVICE)
            await stream.send_all(encode_demand((asked(M, 1),)))
            stream.reset()
            await until(lambda: len(heard) == 2)
    assert [told for _, told in heard] == [(), ()]
