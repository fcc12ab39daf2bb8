"""What routers are asked in and answer, byte for byte, from the RFCs' own layouts; and what is no answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libmesh.net import nat_wire as wire
from libmesh.net.nat_wire import Gateway, Granted, Refused

NONCE = bytes(range(12))
V4 = "00000000000000000000ffff"
DESCRIPTION = b"""<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><device><deviceList><device><serviceList>
<service><serviceType>urn:schemas-upnp-org:service:Layer3Forwarding:1</serviceType><controlURL>/no</controlURL></service>
<service><serviceType>urn:schemas-upnp-org:service:WANIPConnection:1</serviceType>
<controlURL>%s</controlURL></service></serviceList></device></deviceList></device></root>"""
LOCATION = "http://192.168.1.1:5000/rootDesc.xml"
SERVICE = "urn:schemas-upnp-org:service:WANIPConnection:1"


def test_nat_pmp_requests_are_as_in_rfc_6886() -> None:
    assert wire.pmp_address_request().hex() == "0000"
    assert wire.pmp_map_request(4001, 4002, 3600).hex() == "00020000" + "0fa1" + "0fa2" + "00000e10"


def test_nat_pmp_answers_are_read() -> None:
    assert wire.decode_pmp_address(bytes.fromhex("00800000" + "00000001" + "0b000202")) == "11.0.2.2"
    answer = bytes.fromhex("00820000" + "00000001" + "0fa1" + "0fa2" + "00000e10")
    assert wire.decode_pmp_map(answer, 4001) == Granted(4002, 3600)


def test_a_pcp_request_is_as_in_rfc_6887() -> None:
    request = wire.pcp_map_request("192.168.1.10", NONCE, 4001, 4002, 3600)
    assert request.hex() == (
        "02010000" + "00000e10" + V4 + "c0a8010a"
        + NONCE.hex() + "06000000" + "0fa1" + "0fa2" + V4 + "00000000"
    )  # fmt: skip


def test_a_pcp_answer_is_read() -> None:
    head = "02810000" + "00000e10" + "00000001" + "00" * 12
    answer = bytes.fromhex(head + NONCE.hex() + "06000000" + "0fa1" + "0fa2" + V4 + "0b000202")
    assert wire.decode_pcp_map(answer, NONCE, 4001) == Granted(4002, 3600, "11.0.2.2")
    with pytest.raises(ValueError, match="another request"):
        wire.decode_pcp_map(answer, bytes(12), 4001)
    with pytest.raises(ValueError, match="another request"):
        wire.decode_pcp_map(answer, NONCE, 4003)


@pytest.mark.parametrize(
    ("decode", "data", "said"),
    [
        (wire.decode_pmp_address, "00800002", "not authorised"),
        (lambda data: wire.decode_pmp_map(data, 1), "00820004", "out of resources"),
        (lambda data: wire.decode_pcp_map(data, NONCE, 1), "0281000200000000", "not authorised"),
        (lambda data: wire.decode_pcp_map(data, NONCE, 1), "0081000100000000", "unsupported version"),
        (lambda data: wire.decode_pcp_map(data, NONCE, 1), "028100ff00000000", "error 255"),
    ],
)
def test_a_refusal_says_why(decode: object, data: str, said: str) -> None:
    assert callable(decode)
    with pytest.raises(Refused, match=said):
        decode(bytes.fromhex(data))


def test_a_search_asks_the_lan_for_routers() -> None:
    request = wire.search_request(wire.SEARCHES[0])
    assert request.startswith(b"M-SEARCH * HTTP/1.1\r\n")
    assert request.endswith(b"\r\n\r\n")


def test_a_search_is_answered_with_the_router_s_own_address_only() -> None:
    answer = f"HTTP/1.1 200 OK\r\nST: x\r\nLocation: {LOCATION}\r\n\r\n".encode()
    assert wire.decode_search_answer(answer, "192.168.1.1") == LOCATION
    with pytest.raises(ValueError, match="not its own"):
        wire.decode_search_answer(answer, "192.168.1.66")
    with pytest.raises(ValueError, match="not an answer"):
        wire.decode_search_answer(b"NOTIFY * HTTP/1.1\r\n\r\n", "192.168.1.1")


@pytest.mark.parametrize("control", [b"/ctl/IPConn", b"http://192.168.1.1:5000/ctl/IPConn"])
def test_a_description_says_where_orders_are_taken(control: bytes) -> None:
    gateway = wire.decode_description(DESCRIPTION % control, LOCATION)
    assert gateway == Gateway("http://192.168.1.1:5000/ctl/IPConn", SERVICE)


@pytest.mark.parametrize(
    "text", [DESCRIPTION % b"http://10.0.0.9/", DESCRIPTION % b"file:///x", b"<root/>", b"<root", b""]
)
def test_a_description_that_leads_elsewhere_or_nowhere_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"elsewhere|forwards no ports|broken"):
        wire.decode_description(text, LOCATION)


def test_an_order_and_its_answer() -> None:
    headers, body = wire.soap_request(Gateway("http://h/c", SERVICE), "AddPortMapping", NewExternalPort=4001)
    assert headers["SOAPAction"] == f'"{SERVICE}#AddPortMapping"'
    assert b"<NewExternalPort>4001</NewExternalPort>" in body
    values = wire.decode_soap_answer(200, b"<a><NewExternalIPAddress>11.0.2.2</NewExternalIPAddress></a>")
    assert values["NewExternalIPAddress"] == "11.0.2.2"
    error = b"<a><errorCode>718</errorCode><errorDescription>Conflict</errorDescription></a>"
    with pytest.raises(Refused, match="Conflict") as refused:
        wire.decode_soap_answer(500, error)
    assert refused.value.code == 718
    with pytest.raises(ValueError, match="broken"):
        wire.decode_soap_answer(200, b"<a")


@given(st.binary(max_size=80))
def test_garbage_is_refused_as_such(data: bytes) -> None:
    for decode in (
        wire.decode_pmp_address,
        lambda data: wire.decode_pmp_map(data, 4001),
        lambda data: wire.decode_pcp_map(data, NONCE, 4001),
        lambda data: wire.decode_search_answer(data, "192.168.1.1"),
        lambda data: wire.decode_description(data, LOCATION),
        lambda data: wire.decode_soap_answer(200, data),
    ):
        with pytest.raises((ValueError, Refused)):
            decode(data)
