"""Dialling as happy eyeballs do, with every attempt's start told to the hundredth of a second, and listening."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import trio
import trio.testing

from libmesh.errors import AddressUnavailable
from libmesh.net import tcp
from libmesh.net.tcp import DIAL_LIMIT, STAGGER, first_success

Script = dict[str, tuple[float, Exception | None]]
"""What each address does: after how many seconds, and what it raises; `None` succeeds."""

FOREVER = float("inf")


class Attempts:
    """Plays a script and notes when each attempt started and how it ended."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.started: dict[str, float] = {}
        self.cancelled: set[str] = set()

    async def __call__(self, address: str) -> None:
        self.started[address] = round(trio.current_time() - self.origin, 2)
        delay, failure = self._script[address]
        try:
            await trio.sleep(delay)
        except trio.Cancelled:
            self.cancelled.add(address)
            raise
        if failure is not None:
            raise failure

    async def play(self) -> tuple[str | None, dict[str, str], float]:
        self.origin = trio.current_time()
        winner, failures = await first_success(list(self._script), self)
        return winner, failures, round(trio.current_time() - self.origin, 2)


REFUSED = ConnectionRefusedError(111, "Connection refused")


@pytest.mark.parametrize(
    ("script", "winner", "started", "took"),
    [
        ({"a": (0.1, None), "b": (0, None)}, "a", {"a": 0}, 0.1),
        ({"a": (FOREVER, None), "b": (0.01, None)}, "b", {"a": 0, "b": STAGGER}, STAGGER + 0.01),
        (
            {"a": (FOREVER, None), "b": (FOREVER, None), "c": (0.01, None)},
            "c",
            {"a": 0, "b": STAGGER, "c": 2 * STAGGER},
            2 * STAGGER + 0.01,
        ),
        ({"a": (0.05, REFUSED), "b": (0.02, None)}, "b", {"a": 0, "b": 0.05}, 0.07),
        (
            {"a": (0, REFUSED), "b": (0, REFUSED), "c": (0.5, None), "d": (0.1, None)},
            "d",
            {"a": 0, "b": 0, "c": 0, "d": STAGGER},
            STAGGER + 0.1,
        ),
        ({"slow": (0.25, None), "slower": (1, None)}, "slow", {"slow": 0, "slower": STAGGER}, 0.25),
    ],
    ids=["first", "dead first", "two dead first", "refused first", "refusals do not wait", "late first wins"],
)
async def test_attempts_start_one_after_the_other_or_as_soon_as_one_failed(
    autojump_clock: trio.testing.MockClock,
    script: Script,
    winner: str,
    started: dict[str, float],
    took: float,
) -> None:
    attempts = Attempts(script)
    found, _, duration = await attempts.play()
    assert (found, attempts.started, duration) == (winner, started, pytest.approx(took))


async def test_the_first_success_cancels_the_others(autojump_clock: trio.testing.MockClock) -> None:
    attempts = Attempts({"a": (FOREVER, None), "b": (FOREVER, None), "c": (0, None), "d": (0, None)})
    await attempts.play()
    assert attempts.cancelled == {"a", "b"}
    assert "d" not in attempts.started


async def test_when_all_fail_each_says_why(autojump_clock: trio.testing.MockClock) -> None:
    wrapped = RuntimeError("the upgrade failed")
    wrapped.__cause__ = ExceptionGroup("tasks", [ValueError("another peer answered")])
    attempts = Attempts(
        {"a": (1, REFUSED), "b": (FOREVER, None), "c": (0, wrapped), "d": (0, RuntimeError())}
    )
    assert await attempts.play() == (
        None,
        {
            "a": "connection refused",
            "b": f"no answer within {DIAL_LIMIT:.0f} s",
            "c": "another peer answered",
            "d": "RuntimeError",
        },
        STAGGER + DIAL_LIMIT,
    )


async def test_without_addresses_nothing_is_tried() -> None:
    assert await Attempts({}).play() == (None, {}, 0)


async def test_cancelling_cancels_every_attempt(autojump_clock: trio.testing.MockClock) -> None:
    attempts = Attempts({"a": (FOREVER, None), "b": (FOREVER, None)})
    with trio.move_on_after(1):
        await attempts.play()
    assert attempts.cancelled == {"a", "b"}


# ── addresses ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/ip4/192.0.2.1/tcp/4001", ("192.0.2.1", 4001)),
        ("/ip6/2001:db8::1/tcp/1", ("2001:db8::1", 1)),
        ("/dns/example.com/tcp/443", ("example.com", 443)),
        ("/dns4/example.com/tcp/443", ("example.com", 443)),
        (
            "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA",
            ("192.0.2.1", 4001),
        ),
    ],
)
def test_a_tcp_address_can_be_dialled(address: str, expected: tuple[str, int]) -> None:
    assert tcp.host_and_port(address) == expected


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/",
        "nonsense",
        "/tcp/4001",
        "/ip4/192.0.2.1",
        "/ip4/192.0.2.1/udp/4001",
        "/ip4/192.0.2.1/udp/4001/quic-v1",
        "/ip4/192.0.2.1/tcp/443/ws",
        "/unix/tmp",
        "/ip6zone/\x06\x06\x06\x06\x06\x06/tcp/1542/tcp/1542",  # multiaddr raises TypeError
        "/ip4/1.2.3.4/tcp/1/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA/p2p-circuit",
    ],
)
def test_other_addresses_are_refused_in_words(address: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        tcp.host_and_port(address)


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_an_address_gives_its_multiaddr_and_back(host: str) -> None:
    assert tcp.host_and_port(tcp.multiaddr_of(host, 4001)) == (host, 4001)


def test_of_private_addresses_the_one_that_leads_outward_comes_first() -> None:
    hosts = ["172.17.0.1", "127.0.0.1", "fd00::1", "192.168.1.5", "10.8.0.1", "8.8.8.8", "169.254.1.1"]
    rest = ["10.8.0.1", "172.17.0.1", "fd00::1", "127.0.0.1"]
    assert tcp.in_order(hosts, "192.168.1.5") == ["8.8.8.8", "192.168.1.5", *rest]
    assert tcp.in_order(hosts, "") == [
        "8.8.8.8",
        "10.8.0.1",
        "172.17.0.1",
        "192.168.1.5",
        "fd00::1",
        "127.0.0.1",
    ]


def test_this_machines_addresses_end_with_loopback_and_none_is_unspecified() -> None:
    hosts = tcp.interface_hosts()
    assert "127.0.0.1" in hosts
    assert not {"0.0.0.0", "::"} & set(hosts)
    loopback = [host.startswith("127.") or host == "::1" for host in hosts]
    assert loopback == sorted(loopback)


# ── listening ────────────────────────────────────────────────────────────────────────────────────────────────────


async def closed(listeners: list[trio.SocketListener]) -> None:
    for listener in listeners:
        await listener.aclose()


async def test_a_port_that_is_taken_is_an_error_that_names_it() -> None:
    first = tcp.open_listeners(["127.0.0.1"], 0)
    port = first[0].socket.getsockname()[1]
    for hosts in (["127.0.0.1"], ["0.0.0.0"], ["127.0.0.1", "127.0.0.2"]):
        with pytest.raises(AddressUnavailable, match=f"port {port} is already in use"):
            tcp.open_listeners(hosts, port)
    await closed(first)
    await closed(tcp.open_listeners(["127.0.0.1"], port))


async def test_all_hosts_get_the_same_port() -> None:
    listeners = tcp.open_listeners(["127.0.0.1", "127.0.0.2"], 0)
    assert len({listener.socket.getsockname()[1] for listener in listeners}) == 1
    await closed(listeners)


async def test_a_host_that_is_not_ours_is_passed_over_unless_it_is_the_only_one() -> None:
    listeners = tcp.open_listeners(["203.0.113.1", "127.0.0.1"], 0)
    assert len(listeners) == 1
    await closed(listeners)
    with pytest.raises(AddressUnavailable, match="cannot be used"):
        tcp.open_listeners(["203.0.113.1"], 0)
    with pytest.raises(AddressUnavailable, match="none of"):
        tcp.open_listeners(["203.0.113.1", "203.0.113.2"], 0)


async def test_dialled_sockets_have_keepalive_and_no_delay() -> None:
    listeners = tcp.open_listeners(["127.0.0.1"], 0)
    stream = await tcp.dial(tcp.multiaddr_of("127.0.0.1", listeners[0].socket.getsockname()[1]))
    async with stream:
        assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    await closed(listeners)


class Listener:
    """Fails as the script says, then hands out `streams`."""

    def __init__(self, outcomes: list[object]) -> None:
        self.outcomes, self.closed = outcomes, False

    async def accept(self) -> object:
        await trio.lowlevel.checkpoint()
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def __aenter__(self) -> Listener:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closed = True


async def test_a_process_out_of_files_accepts_again_when_it_can(
    autojump_clock: trio.testing.MockClock,
) -> None:
    taken: list[object] = []
    full = OSError(24, "Too many open files")
    listener = Listener([full, "one", full, full, "two", OSError(9, "Bad file descriptor")])
    take: Callable[[object], None] = taken.append
    with pytest.raises(OSError, match="Bad file"):
        await tcp.accept_all(listener, take)  # type: ignore[arg-type]
    assert taken == ["one", "two"]
    assert listener.closed


# ── connecting to what is near ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_what_listens_nearby_is_connected_to(host: str) -> None:
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server((host, 0), family=family))
        connected = stack.enter_context(await tcp.connect(host, server.getsockname()[1], 5))
        accepted = stack.enter_context(server.accept()[0])
        await connected.send(b"x")
        assert accepted.recv(10) == b"x"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_port_that_nobody_listens_on_is_an_error(host: str) -> None:
    with socket.create_server((host, 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(OSError, match=r"[Rr]efused|failed"):
        await tcp.connect(host, port, 5)


async def test_a_connection_that_nobody_accepts_can_be_cancelled_and_leaves_no_socket() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        with trio.move_on_after(0.2) as scope:
            for _ in range(16):  # more than wait to be accepted
                stack.enter_context(await tcp.connect("127.0.0.1", server.getsockname()[1], 60))
        assert scope.cancelled_caught


async def test_a_connection_that_nobody_accepts_in_time_is_an_error() -> None:
    async def connect_often(port: int) -> None:
        for _ in range(16):  # more than wait to be accepted
            stack.enter_context(await tcp.connect("127.0.0.1", port, 0.2))

    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        with pytest.raises(TimeoutError, match=r"no connection within 0\.2 s"):
            await connect_often(server.getsockname()[1])


async def test_what_cannot_be_the_name_of_a_host_is_an_error() -> None:
    with pytest.raises(OSError, match="cannot be the name of a host"):
        await tcp.connect("a" * 64 + ".example", 9, 5)
