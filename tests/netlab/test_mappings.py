"""A real router (miniupnpd) forwards our port by each protocol that we speak, and stops when the port is given back."""

from __future__ import annotations

import pytest

from tests.netlab.children import ours
from tests.netlab.lab import PORT, Kind, Lab
from tests.netlab.test_lab import dial, refused

pytestmark = pytest.mark.slow


def test_a_port_is_forwarded_by_each_protocol_until_it_is_given_back(lab: Lab) -> None:
    office, home = lab.site(Kind.PUBLIC), lab.site(Kind.UPNP)
    with ours(home.host, 1) as peer:
        for protocol in ("PCP", "NAT-PMP", "UPnP IGD"):
            assert refused(office.host, home.public), protocol
            assert peer.do("map", by=protocol)["address"] == f"/ip4/{home.public}/tcp/{PORT}"
            dial(office.host, home.public).close()
            peer.do("unmap", by=protocol)
        assert refused(office.host, home.public)
