"""A web server's front door on a host of the lab: ends TLS on port 443 and hands on what is inside, as nginx would.

stunnel does it, a program of its own, so that what is tested is what people run. Its certificate names the site's address;
whoever is to believe it points SSL_CERT_FILE at `Door.trusted`.
"""

from __future__ import annotations

import datetime
import ipaddress
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from tests.netlab.crowd import wait_for
from tests.netlab.lab import Host

WEB_PORT = 443

_CONFIG = """
foreground = yes
pid =
debug = warning
syslog = no
[websockets]
accept = {address}:{port}
connect = 127.0.0.1:{inside}
cert = {certificate}
key = {key}
TIMEOUTclose = 0
"""


@dataclass(frozen=True, slots=True)
class Door:
    """A running front door.

    Attributes:
        address: the multiaddr to reach what is behind it.
        trusted: a file that makes its certificate trusted.
    """

    address: str
    trusted: Path


@contextmanager
def open_door(host: Host, inside: int, folder: Path) -> Iterator[Door]:
    """Lead TLS connections to port 443 of a public host on to its port `inside`, for as long as the context lasts."""
    program = shutil.which("stunnel")
    if program is None:
        raise OSError("stunnel is missing")
    trusted, key = folder / f"{host.name}.pem", folder / f"{host.name}.key"
    _certify(host.address, trusted, key)
    config = folder / f"{host.name}.stunnel"
    config.write_text(
        _CONFIG.format(address=host.address, port=WEB_PORT, inside=inside, certificate=trusted, key=key)
    )
    log = folder / f"{host.name}.stunnel.log"
    with log.open("wb") as said:
        process = host.popen(program, str(config), stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    try:
        wait_for(lambda: _listens(host), f"{host.name}'s front door", lambda: log.read_text(errors="replace"))
        yield Door(f"/ip4/{host.address}/tcp/{WEB_PORT}/wss", trusted)
    finally:
        process.kill()
        process.wait()


def _listens(host: Host) -> bool:
    with host.namespace.inside():
        probe = socket.socket()
    with probe:
        return probe.connect_ex((host.address, WEB_PORT)) == 0


def _certify(address: str, trusted: Path, key_file: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, address)])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, SHA256())
    )
    trusted.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    how = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key_file.write_bytes(key.private_bytes(*how))
