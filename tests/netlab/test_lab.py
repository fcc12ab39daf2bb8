"""The lab is what it says: routers translate and filter as their kind does, and cables delay, lose and break."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from tests.netlab.lab import PORT, Host, Kind, Lab, open_lab

pytestmark = pytest.mark.slow

DELAY = 0.02


def listen(host: Host) -> socket.socket:
    with host.namespace.inside():
        listener = socket.create_server(("0.0.0.0", PORT))
    listener.settimeout(60)
    return listener


def dial(host: Host, address: str, *, source: int = 0, limit: float = 60.0) -> socket.socket:
    with host.namespace.inside():
        sock = socket.socket()
    sock.settimeout(limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(("0.0.0.0", source))
        sock.connect((address, PORT))
    except OSError:
        sock.close()
        raise
    return sock


def refused(host: Host, address: str) -> bool:
    """Whether a connection comes to nothing; what a filter drops in silence takes a while to be believed."""
    try:
        dial(host, address, limit=1.5).close()
    except TimeoutError:
        return True
    return False


def seen_from(host: Host, server: Host) -> tuple[str, int]:
    """Where the server sees the host's connection come from."""
    with (
        listen(server) as listener,
        dial(host, server.address, source=PORT),
        listener.accept()[0] as accepted,
    ):
        address, port = accepted.getpeername()
        return str(address), int(port)


def test_a_cone_keeps_the_port_and_lets_nobody_in(lab: Lab) -> None:
    public, home = lab.site(Kind.PUBLIC), lab.site(Kind.CONE)
    assert seen_from(home.host, public.host) == (home.public, PORT)
    with listen(home.host):
        assert refused(public.host, home.public)


def test_a_symmetric_router_draws_another_port_each_time(lab: Lab) -> None:
    servers = [lab.site(Kind.PUBLIC) for _ in range(3)]
    home = lab.site(Kind.SYMMETRIC)
    seen = [seen_from(home.host, server.host) for server in servers]
    assert {address for address, _ in seen} == {home.public}
    assert len({port for _, port in seen}) > 1


def test_a_forwarded_port_leads_to_the_first_host(lab: Lab) -> None:
    public, home = lab.site(Kind.PUBLIC), lab.site(Kind.FORWARDED, hosts=2)
    with listen(home.host) as listener, dial(public.host, home.public), listener.accept()[0] as accepted:
        assert accepted.getpeername()[0] == public.public


def test_nothing_but_tls_to_port_443_gets_out_of_a_strict_network(lab: Lab) -> None:
    public, office = lab.site(Kind.PUBLIC), lab.site(Kind.ONLY_443)
    with listen(public.host):
        assert refused(office.host, public.public)
    assert office.host.run("ping", "-c", "1", "-W", "1", public.public).returncode
    with public.host.namespace.inside():
        listener = socket.create_server(("0.0.0.0", 443))
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.bind(("0.0.0.0", 443))
    with listener, datagrams:
        datagrams.settimeout(0.5)
        with office.host.namespace.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"\x16\x03\x01", (public.public, 443))
        with pytest.raises(TimeoutError):
            datagrams.recv(8)
        assert said(office.host, public.public, listener, b"\x16\x03\x01 and whatever follows")
        assert not said(office.host, public.public, listener, b"\x13/multistream/1.0.0\n")


def said(host: Host, address: str, listener: socket.socket, first: bytes) -> bool:
    """Whether the first bytes of a connection to port 443 arrive."""
    with host.namespace.inside():
        sock = socket.socket()
    sock.settimeout(60)
    with sock:
        sock.connect((address, 443))
        with listener.accept()[0] as accepted:
            sock.sendall(first)
            accepted.settimeout(1.5)
            try:
                return accepted.recv(100) == first
            except TimeoutError:
                return False


def test_hosts_of_one_lan_reach_each_other_and_private_addresses_lead_nowhere_else(lab: Lab) -> None:
    home, other = lab.site(Kind.CONE, hosts=2), lab.site(Kind.PUBLIC)
    with listen(home.host):
        dial(home.hosts[1], home.host.address).close()
        assert refused(other.host, home.host.address)


def test_a_cable_takes_its_time_both_ways(lab: Lab) -> None:
    first, second = lab.site(Kind.PUBLIC, delay=DELAY), lab.site(Kind.PUBLIC, delay=DELAY)
    with listen(first.host):
        start = time.monotonic()
        dial(second.host, first.public).close()
        assert time.monotonic() - start >= 4 * DELAY


def test_a_cut_cable_carries_nothing_until_it_is_restored(lab: Lab) -> None:
    first, second = lab.site(Kind.PUBLIC), lab.site(Kind.PUBLIC)
    with (
        listen(first.host) as listener,
        dial(second.host, first.public) as there,
        listener.accept()[0] as here,
    ):
        first.cable.cut()
        there.sendall(b"x")
        here.settimeout(0.5)
        with pytest.raises(TimeoutError):
            here.recv(1)
        first.cable.restore()
        here.settimeout(60)
        assert here.recv(1) == b"x"


def test_a_lossy_cable_loses_packets_and_tcp_mends_that(lab: Lab) -> None:
    first, second = lab.site(Kind.PUBLIC), lab.site(Kind.PUBLIC, delay=0.001, loss=0.02)
    sent = os.urandom(1 << 20)
    with (
        listen(first.host) as listener,
        dial(second.host, first.public) as there,
        listener.accept()[0] as here,
    ):
        here.settimeout(60)
        there.setblocking(False)
        view, got = memoryview(sent), bytearray()
        while len(got) < len(sent):
            with suppress(BlockingIOError):
                view = view[there.send(view) :] if view else view
            got += here.recv(1 << 16, socket.MSG_DONTWAIT) if not view else _some(here)
        assert bytes(got) == sent


def _some(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 16, socket.MSG_DONTWAIT)
    except BlockingIOError:
        time.sleep(0.001)
        return b""


def test_a_router_that_reboots_forgets_its_flows(lab: Lab) -> None:
    public, home = lab.site(Kind.PUBLIC), lab.site(Kind.CONE)
    with (
        listen(public.host) as listener,
        dial(home.host, public.public) as there,
        listener.accept()[0] as here,
    ):
        home.reboot()
        there.sendall(b"x")
        here.settimeout(0.5)
        with pytest.raises(TimeoutError):
            here.recv(1)
    with listen(public.host):
        dial(home.host, public.public).close()


def test_a_site_gets_another_address(lab: Lab) -> None:
    public, home = lab.site(Kind.PUBLIC), lab.site(Kind.CONE)
    before = home.public
    assert home.renumber() != before
    assert seen_from(home.host, public.host) == (home.public, PORT)


def test_what_a_killed_lab_left_is_removed_by_the_next(lab: Lab) -> None:
    script = (
        "import os, signal, subprocess\n"
        "from tests.netlab.lab import *\n"
        "with open_lab() as lab:\n"
        "    sleeper = lab.site(Kind.PUBLIC).host.popen('sleep', '1000', stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "    print(sleeper.pid, lab.folder, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, folder = done.stdout.split()
    prefix = os.path.basename(folder).rpartition(".")[0]
    assert any(name.startswith(prefix) for name in os.listdir("/run/netns"))
    with open_lab():
        assert not any(name.startswith(prefix) for name in os.listdir("/run/netns"))
        assert not os.path.exists(folder)
        with pytest.raises(ProcessLookupError):
            _probe(int(pid))


def _probe(pid: int) -> None:
    """Raises `ProcessLookupError` once the process is gone or merely waits to be reaped by its new parent."""
    with open(f"/proc/{pid}/stat") as file:
        if file.read().rpartition(")")[2].split()[0] == "Z":
            raise ProcessLookupError
