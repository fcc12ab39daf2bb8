"""What routers are asked for a port in: NAT-PMP (RFC 6886), PCP (RFC 6887) and UPnP IGD, as bytes. No I/O.

`decode_*` raise `ValueError` for what is not an answer to what was asked; a refusal is an answer (`Refused`).
"""

from __future__ import annotations

import ipaddress
import re
import struct
import xml.etree.ElementTree as tree
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

PMP_PORT = 5351
SSDP_ADDRESS = ("239.255.255.250", 1900)

_TCP = 6
_PMP_WORDS = {1: "unsupported version", 2: "not authorised", 3: "network failure", 4: "out of resources"}
_PCP_WORDS = {
    1: "unsupported version", 2: "not authorised", 3: "malformed request", 4: "unsupported opcode", 7: "network failure",
    8: "out of resources", 9: "unsupported protocol", 10: "quota exceeded", 11: "cannot provide that port",
    12: "the request's address is not the sender's", 13: "too many mappings of that peer",
}  # fmt: skip
_SERVICES = (
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
)
SEARCHES = (
    "urn:schemas-upnp-org:device:InternetGatewayDevice:1",
    "urn:schemas-upnp-org:device:InternetGatewayDevice:2",
)


class Refused(Exception):
    """The router answered, and will not. The text says why; `code` is the protocol's number for it."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Granted:
    """A port of the router's that leads to us. `ip` is empty where the protocol does not say; `lifetime` in seconds."""

    port: int
    lifetime: int
    ip: str = ""


# ── NAT-PMP ──────────────────────────────────────────────────────────────────────────────────────────────────────


def pmp_address_request() -> bytes:
    """Asks for the router's outside address."""
    return b"\0\0"


def decode_pmp_address(data: bytes) -> str:
    """The outside address."""
    version, op, result = struct.unpack_from("!BBH", _at_least(4, data))
    if version != 0 or op != 128:
        raise ValueError("not an answer to a request for the address")
    if result:
        raise Refused(_PMP_WORDS.get(result, f"error {result}"), result)
    return str(ipaddress.IPv4Address(_at_least(12, data)[8:12]))


def pmp_map_request(internal: int, external: int, lifetime: int) -> bytes:
    """Asks for TCP port `external`, or another one, to lead to our `internal`. A lifetime of 0 gives it back."""
    return struct.pack("!BBHHHI", 0, 2, 0, internal, external, lifetime)


def decode_pmp_map(data: bytes, internal: int) -> Granted:
    """The port given."""
    version, op, result = struct.unpack_from("!BBH", _at_least(4, data))
    if version != 0 or op != 130:
        raise ValueError("not an answer to a request for a mapping")
    if result:
        raise Refused(_PMP_WORDS.get(result, f"error {result}"), result)
    ours, port, lifetime = struct.unpack_from("!HHI", _at_least(16, data), 8)
    if ours != internal:
        raise ValueError("an answer about another port")
    return Granted(port, lifetime)


# ── PCP ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def pcp_map_request(client: str, nonce: bytes, internal: int, external: int, lifetime: int) -> bytes:
    """As `pmp_map_request`, in PCP. `client` is our own address; `nonce`, 12 bytes, must be the same for each renewal."""
    head = struct.pack("!BBHI16s", 2, 1, 0, lifetime, _mapped(client))
    return head + struct.pack(
        "!12sB3xHH16s", nonce, _TCP, internal, external, _mapped("0.0.0.0" if "." in client else "::")
    )


def decode_pcp_map(data: bytes, nonce: bytes, internal: int) -> Granted:
    """The port given, with the outside address."""
    version, op, _, result, lifetime = struct.unpack_from("!BBBBI", _at_least(8, data))
    if version != 2:
        raise Refused(_PCP_WORDS[1], 1)  # a router that speaks NAT-PMP only answers in that
    if op != 0x81:
        raise ValueError("not an answer to a request for a mapping")
    if result:
        raise Refused(_PCP_WORDS.get(result, f"error {result}"), result)
    theirs, protocol, ours, port, outside = struct.unpack_from("!12sB3xHH16s", _at_least(60, data), 24)
    if theirs != nonce or protocol != _TCP or ours != internal:
        raise ValueError("an answer to another request")
    ip = ipaddress.IPv6Address(outside)
    return Granted(port, lifetime, str(ip.ipv4_mapped or ip))


def _mapped(ip: str) -> bytes:
    address = ipaddress.ip_address(ip)
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def _at_least(length: int, data: bytes) -> bytes:
    if len(data) < length:
        raise ValueError(f"an answer of {len(data)} bytes")
    return data


# ── UPnP ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Gateway:
    """Where a router takes orders: an URL on its own address, and the service's name."""

    control: str
    service: str


def search_request(target: str) -> bytes:
    """Asks the LAN who is `target`; SSDP, UPnP Device Architecture 1.1, section 1.3.2."""
    lines = (
        "M-SEARCH * HTTP/1.1",
        "HOST: 239.255.255.250:1900",
        'MAN: "ssdp:discover"',
        "MX: 1",
        f"ST: {target}",
    )
    return "\r\n".join((*lines, "", "")).encode("ascii")


def decode_search_answer(data: bytes, sender: str) -> str:
    """The URL of a router's description. It must be on the address that sent it: others would have us talk to anyone."""
    head = data.decode("latin-1")
    match = re.search(r"^location:[ \t]*(http://\S+)", head, re.IGNORECASE | re.MULTILINE)
    if not head.startswith("HTTP/1.") or match is None:
        raise ValueError("not an answer to a search")
    if urlsplit(match[1]).hostname != sender:
        raise ValueError("a description that is not its own")
    return match[1]


def decode_description(text: bytes, location: str) -> Gateway:
    """Where the router that describes itself so takes orders."""
    try:
        root = tree.fromstring(text)
    except tree.ParseError as exc:
        raise ValueError(f"a broken description: {exc}") from exc
    services: dict[str, str] = {}
    for element in root.iter():
        if _name(element) == "service":
            parts = {_name(child): (child.text or "").strip() for child in element}
            services.setdefault(parts.get("serviceType", ""), parts.get("controlURL", ""))
    for service in _SERVICES:
        if services.get(service):
            control = urljoin(location, services[service])
            if urlsplit(control).netloc != urlsplit(location).netloc or not control.startswith("http://"):
                raise ValueError("a router that wants its orders sent elsewhere")
            return Gateway(control, service)
    raise ValueError("a device that forwards no ports")


def _name(element: tree.Element) -> str:
    return element.tag.rpartition("}")[2]


def soap_request(gateway: Gateway, action: str, **arguments: object) -> tuple[dict[str, str], bytes]:
    """Headers and body of an order. The arguments are ours, and need no escaping."""
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in arguments.items())
    body = (
        '<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
        f'<u:{action} xmlns:u="{gateway.service}">{inner}</u:{action}></s:Body></s:Envelope>'
    )
    headers = {"SOAPAction": f'"{gateway.service}#{action}"', "Content-Type": 'text/xml; charset="utf-8"'}
    return headers, body.encode("ascii")


def decode_soap_answer(status: int, text: bytes) -> dict[str, str]:
    """What the router returned, by name. Raises `Refused` with UPnP's error."""
    try:
        values = {_name(element): (element.text or "").strip() for element in tree.fromstring(text).iter()}
    except tree.ParseError as exc:
        raise ValueError(f"a broken answer: {exc}") from exc
    if status != 200:
        code = values.get("errorCode", "0")
        words = values.get("errorDescription", "") or f"error {code}"
        raise Refused(f"{words} ({code})", int(code) if code.isdecimal() else 0)
    return values
