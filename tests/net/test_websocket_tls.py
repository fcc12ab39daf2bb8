"""WebSockets inside TLS: through a proxy that ends it, and with certificates that do not fit."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from libmesh.errors import NetworkError
from libmesh.net.libp2p import open_libp2p_network
from tests.members import seed
from tests.net.hosts import PROTOCOL, echo
from tests.net.test_websocket import LOCAL, port_of, web


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, ssl.SSLContext]:
    """A file that trusts a fresh certificate of 127.0.0.1, and a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "proxy")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    trusted, secret = tmp_path / "trusted.pem", tmp_path / "secret.pem"
    trusted.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(trusted, secret)
    return trusted, context


@asynccontextmanager
async def proxy(context: ssl.SSLContext, target: int) -> AsyncIterator[int]:
    """A proxy that ends TLS, and its port."""

    async def pump(source: trio.abc.ReceiveStream, sink: trio.abc.SendStream) -> None:
        while data := await source.receive_some(65536):
            await sink.send_all(data)

    async def serve(stream: trio.SSLStream[trio.SocketStream]) -> None:
        try:
            await stream.do_handshake()
            # Other servers send session tickets at once, by themselves; trio keeps them until there is something to say.
            tickets, stream._delayed_outgoing = stream._delayed_outgoing, None
            assert tickets is not None
            await stream.transport_stream.send_all(tickets)
            await trio.testing.wait_all_tasks_blocked(0.02)  # so that they are read before the rest comes
            async with (
                await trio.open_tcp_stream("127.0.0.1", target) as inner,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(pump, stream, inner)
                await pump(inner, stream)
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        start = partial(trio.serve_ssl_over_tcp, serve, 0, context, host="127.0.0.1", https_compatible=True)
        listeners = await nursery.start(start)
        yield listeners[0].transport_listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("form", ["wss", "tls/ws", "tls/sni/127.0.0.1/ws"])
async def test_peer_is_reached_through_a_proxy_that_ends_tls(
    form: str, certificate: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    async with open_libp2p_network(seed(1), LOCAL) as a, open_libp2p_network(seed(2), LOCAL) as b:
        b.set_handler(PROTOCOL, echo, admitted_only=False)
        async with proxy(certificate[1], port_of(b)) as port:
            address = f"/ip4/127.0.0.1/tcp/{port}/{form}"
            assert (await a.connect(b.peer, [address])).address == address
            data = bytes(range(256)) * 4096
            async with await a.open_stream(b.peer, PROTOCOL) as stream, trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, data)
                got = b""
                while len(got) < len(data):
                    got += await stream.receive_some()
            assert got == data


async def test_certificate_that_nobody_trusts_is_told_in_words(
    certificate: tuple[Path, ssl.SSLContext],
) -> None:
    async with open_libp2p_network(seed(1), LOCAL) as a, proxy(certificate[1], port_of(a)) as port:
        with pytest.raises(NetworkError, match="TLS: self-signed certificate"):
            await a.dial(a.peer, f"/ip4/127.0.0.1/tcp/{port}/wss")


async def test_server_without_tls_is_told_in_words() -> None:
    async with open_libp2p_network(seed(1), LOCAL) as a:
        with pytest.raises(NetworkError, match="TLS: "):
            await a.dial(a.peer, web(a).removesuffix("ws") + "wss")
