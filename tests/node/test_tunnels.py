"""TCP forwards through the mesh, as people ask for them on the command line."""

from __future__ import annotations

import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.node.conftest import Pair
from tests.node.nodes import PATIENCE, Machine, dial, wait_for

pytestmark = pytest.mark.llama

SIZE = 10 << 20


class Service:
    """A TCP service in this process: echoes, and tells how connections ended."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        service = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.settimeout(PATIENCE)
                try:
                    while data := self.request.recv(1 << 16):
                        self.request.sendall(data)
                    self.request.sendall(b"<end>")
                    service.ends.append("end")
                except ConnectionResetError:
                    service.ends.append("reset")
                except OSError as exc:
                    service.ends.append(type(exc).__name__)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            request_queue_size = 64

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @contextmanager
    def running(self) -> Iterator[Service]:
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()


@pytest.fixture
def service() -> Iterator[Service]:
    with Service().running() as service:
        yield service


def _read_all(connection: socket.socket) -> bytes:
    parts = []
    while data := connection.recv(1 << 16):
        parts.append(data)
    return b"".join(parts)


def _expose(pair: Pair, name: str, port: int) -> None:
    done = pair.server.run("tunnel", "expose", name, f"127.0.0.1:{port}")
    assert done.returncode == 0, done.stderr


def _connect(pair: Pair, name: str, *flags: str) -> int:
    """The local port; waits until the client has heard of the service."""

    def connected() -> str:
        done = pair.client.run("tunnel", "connect", pair.server.node_id, name, *flags)
        return done.stdout.strip() if done.returncode == 0 else ""

    host, _, port = wait_for(connected, PATIENCE, "the tunnel").rpartition(":")
    assert host == "127.0.0.1"
    return int(port)


@pytest.fixture
def tunnel(pair: Pair, service: Service, request: pytest.FixtureRequest) -> int:
    """A local port that leads to `service` through both nodes."""
    name = f"echo-{request.node.name}"
    _expose(pair, name, service.port)
    return _connect(pair, name)


def test_ten_megabytes_both_ways_and_a_half_close(tunnel: int) -> None:
    data = bytes(range(256)) * (SIZE // 256)
    with dial(tunnel) as connection:

        def send() -> None:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        answer = _read_all(connection)
        sender.join(PATIENCE)
    assert answer == data + b"<end>"


def test_port_serves_one_connection_after_the_other_and_many_at_once(tunnel: int) -> None:
    with suppress(OSError):
        for number in range(3):
            with dial(tunnel) as connection:
                connection.sendall(b"%d" % number)
                assert connection.recv(10) == b"%d" % number
    connections = [dial(tunnel) for _ in range(20)]
    for number, connection in enumerate(connections):
        connection.sendall(b"%d" % number)
    for number, connection in enumerate(connections):
        assert connection.recv(10) == b"%d" % number
        connection.close()


def test_reset_by_the_caller_reaches_the_service(tunnel: int, service: Service) -> None:
    with dial(tunnel) as connection:
        connection.sendall(b"hello")
        assert connection.recv(10) == b"hello"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: service.ends, PATIENCE, "the service hears of it")
    assert service.ends == ["reset"]


def test_service_that_is_gone_refuses_and_the_port_stays(tunnel: int, pair: Pair, service: Service) -> None:
    service._server.shutdown()
    service._server.server_close()
    with suppress(ConnectionResetError), dial(tunnel) as connection:
        assert connection.recv(10) == b""
    listed = pair.client.run("tunnel", "list")
    assert str(tunnel) in listed.stdout


@pytest.mark.slow
def test_port_outlives_a_restart_of_the_node_it_leads_to(machine: Machine, service: Service) -> None:
    server = machine.node(name="server").up()
    server.until(lambda status: status["mesh_id"])
    client = machine.node("--client", "--join", server.invite()).up()
    client.until(lambda status: status["peers"])
    pair = Pair(server, client, machine)
    _expose(pair, "echo", service.port)
    port = _connect(pair, "echo")
    server.ends(15)
    again = machine.node(name="server").up()
    again.until(
        lambda status: any(entry["state"] == "alive" for entry in status["peers"]), what="the client back"
    )
    _expose(Pair(again, client, machine), "echo", service.port)

    def echoed() -> bool:
        with suppress(OSError), dial(port) as connection:
            connection.sendall(b"again")
            return connection.recv(10) == b"again"
        return False

    wait_for(echoed, PATIENCE, "the same port leads there again")


def test_chosen_local_port_is_used(pair: Pair, service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    _expose(pair, "chosen", service.port)
    assert _connect(pair, "chosen", "--port", str(port)) == port
    taken = pair.client.run("tunnel", "connect", pair.server.node_id, "chosen", "--port", str(port))
    assert taken.returncode == 1
    assert str(port) in taken.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["connect", "nobody", "echo"], "no peer is called"),
        (["connect", "SERVER", "nothing-like-it"], "offers"),
        (["connect", "12D3KooWDZQGsyy81WpaWgwJr1n8AsxYtf5Y3XYqdsDxofi7Vdo3", "echo"], "peer"),
    ],
)
def test_unknown_peer_or_service_is_told(pair: Pair, arguments: list[str], words: str) -> None:
    server_id = pair.server.node_id
    done = pair.client.run("tunnel", *(server_id if word == "SERVER" else word for word in arguments))
    assert done.returncode == 1
    assert words in done.stderr.lower()
    assert "Internal" not in done.stderr


def test_name_is_exposed_once(pair: Pair, service: Service) -> None:
    _expose(pair, "once", service.port)
    done = pair.server.run("tunnel", "expose", "once", f"127.0.0.1:{service.port}")
    assert done.returncode == 1
    assert "already" in done.stderr
    done = pair.server.run("tunnel", "expose", "api/demo", f"127.0.0.1:{service.port}")
    assert done.returncode == 1
    assert "for models" in done.stderr


def test_scope_keeps_a_client_out(machine: Machine, pair: Pair, service: Service) -> None:
    done = pair.server.run("tunnel", "expose", "private", f"127.0.0.1:{service.port}", "--scope", "invite")
    assert done.returncode == 0, done.stderr
    guest = machine.node("--client", "--join", pair.server.invite("--scope", "client")).sees("demo")

    def refused() -> str:
        done = guest.run("tunnel", "connect", pair.server.node_id, "private")
        assert done.returncode == 1
        return done.stderr if "offers no" not in done.stderr else ""

    words = wait_for(refused, PATIENCE, "the guest hears of the service")
    assert "needs the scope invite" in words
    assert "invited as client" in words
    assert service.ends == []
