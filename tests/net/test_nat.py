"""Keeps a port forwarded: against routers that are scripted, in virtual time. Real ones are in tests/netlab."""

from __future__ import annotations

from itertools import pairwise

import pytest
import trio
import trio.testing

from libmesh.net import nat
from libmesh.net.nat import DOUBT_GAP, LIFETIME, RENEW_AFTER, RETRY_MAX, RETRY_MIN, Mapping, PortMapper
from libmesh.net.nat_wire import Granted, Refused

OURS = "/ip4/11.0.2.2/tcp/4001"


class Router:
    """Answers as the script says: a mapping, an error, or its last answer for ever."""

    name = "Router"

    def __init__(self, *script: Mapping | Exception) -> None:
        self.script = list(script)
        self.asked: list[tuple[float, int]] = []
        self.given_back: list[int] = []

    async def ask(self, port: int, outside: int) -> Mapping:
        self.asked.append((trio.current_time(), outside))
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def give_back(self, port: int, outside: int) -> None:
        self.given_back.append(outside)


def granted(port: int = 4001, lifetime: float = LIFETIME) -> Mapping:
    return Mapping(f"/ip4/11.0.2.2/tcp/{port}", port, lifetime)


@pytest.fixture
def told() -> list[tuple[str, ...]]:
    return []


async def keep(
    told: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, seconds: float, *routers: Router
) -> PortMapper:
    monkeypatch.setattr(nat, "_methods", lambda: list(routers))
    mapper = PortMapper(told.append)
    with trio.move_on_after(seconds):
        await mapper.run(4001)
    return mapper


async def test_a_mapping_is_told_renewed_and_given_back(
    told: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    router, start = Router(granted(4002)), trio.current_time()
    mapper = await keep(told, monkeypatch, 2.5 * RENEW_AFTER, router)
    assert told == [("/ip4/11.0.2.2/tcp/4002",)]
    assert [(at - start, port) for at, port in router.asked] == [
        (0, 4001),
        (RENEW_AFTER, 4002),
        (2 * RENEW_AFTER, 4002),
    ]
    assert router.given_back == [4002]
    assert mapper.protocol == "Router"


async def test_a_short_lease_is_renewed_at_half_its_life(
    told: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    router, start = Router(granted(lifetime=60)), trio.current_time()
    await keep(told, monkeypatch, 100, router)
    assert [at - start for at, _ in router.asked] == [0, 30, 60, 90]


async def test_the_first_way_that_works_is_kept(
    told: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    deaf, good = Router(TimeoutError("no answer")), Router(granted())
    await keep(told, monkeypatch, RENEW_AFTER + 1, deaf, good)
    assert len(deaf.asked) == 1
    assert len(good.asked) == 2


async def test_a_router_that_fails_a_renewal_is_asked_anew_among_all(
    told: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    first, other = Router(granted(), TimeoutError("no answer")), Router(granted(4009))
    await keep(told, monkeypatch, RENEW_AFTER + 1, first, other)
    assert told == [(OURS,), ("/ip4/11.0.2.2/tcp/4009",)]


async def test_a_mapping_that_is_lost_is_told(
    told: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    mapper = await keep(told, monkeypatch, RENEW_AFTER + 1, Router(granted(), Refused("not authorised", 2)))
    assert told == [(OURS,), ()]
    assert mapper.protocol == ""
    assert "not authorised" in mapper.failure


async def test_where_no_router_helps_pauses_double(
    told: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    router = Router(TimeoutError("no answer"))
    await keep(told, monkeypatch, 10 * RETRY_MAX, router)
    times = [at for at, _ in router.asked]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps[:3] == pytest.approx([RETRY_MIN, 2 * RETRY_MIN, 4 * RETRY_MIN])
    assert max(gaps) == pytest.approx(RETRY_MAX)
    assert told == []


async def test_doubt_renews_at_once_but_not_all_the_time(
    told: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    router, start = Router(granted()), trio.current_time()
    monkeypatch.setattr(nat, "_methods", lambda: [router])
    mapper = PortMapper(told.append)
    mapper.doubt()  # of nothing
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mapper.run, 4001)
        await trio.sleep(1)
        for _ in range(5):
            mapper.doubt()
            await trio.sleep(1)
        await trio.sleep(DOUBT_GAP)
        mapper.doubt()
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert [at - start for at, _ in router.asked] == pytest.approx([0, 1, 6 + DOUBT_GAP])


async def test_in_another_network_all_routers_are_asked(
    told: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    routers = [Router(granted())]
    monkeypatch.setattr(nat, "_methods", lambda: list(routers))
    mapper = PortMapper(told.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mapper.run, 4001)
        await trio.sleep(1)
        routers[:] = [Router(granted(4005))]
        mapper.again()
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert told == [(OURS,), ("/ip4/11.0.2.2/tcp/4005",)]


def test_a_router_behind_another_one_is_of_no_use() -> None:
    with pytest.raises(Refused, match="another router behind it"):
        nat._mapping(Granted(4001, 3600, "192.168.0.2"))


async def test_a_router_that_never_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as deaf:
        await deaf.bind(("127.0.0.1", 0))
        monkeypatch.setattr("libmesh.net.nat_wire.PMP_PORT", deaf.getsockname()[1])
        with pytest.raises(TimeoutError):
            await nat.exchange("127.0.0.1", b"\0\0")
