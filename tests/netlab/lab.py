"""A small internet on one machine: sites behind routers of every kind, joined by cables as long as asked.

    with open_lab() as lab:
        office, home = lab.site(Kind.PUBLIC), lab.site(Kind.CONE, hosts=2, delay=0.02)
        home.host.run("ping", "-c1", office.host.address)
        home.cable.cut(); home.cable.restore(); home.reboot(); home.renumber()

Each site hangs on its own cable (`link.py`) from one router in the middle, which drops what is for private addresses,
as providers do. Sites own 11.0.N.0/24: addresses that count as public everywhere, in namespaces that lead nowhere. Behind
every router is the same 192.168.1.0/24, as in most homes: `.1` is the router, hosts start at `.10`.

Routers are Linux: nftables masquerading with the source port kept where possible, so the mapping does not depend on
the other end, and a filter that does ("port restricted cone"); `SYMMETRIC` draws a random port per flow. Unsolicited
packets are dropped in silence. No router hairpins.

Sites with `v6` have IPv6, too: a /64 of public addresses on the cable, and behind a router another one, not translated,
with the same filter. `Host.six` is a host's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

from tests.netlab import link
from tests.netlab.namespaces import Family, Namespace, available, clear_orphans

PORT = 4001
"""Where peers listen; what `FORWARDED` forwards to each site's first host."""


class Kind(Enum):
    """How a site is attached."""

    PUBLIC = "public"  # a host with an address of its own, and no router
    FORWARDED = "forwarded"  # behind a router that forwards `PORT`
    UPNP = "upnp"  # behind a router that forwards what it is asked to, by UPnP IGD, NAT-PMP or PCP
    CONE = "cone"
    SYMMETRIC = "symmetric"
    UDP_BLOCKED = "udp-blocked"  # a cone that lets no UDP through
    ONLY_443 = "only-443"  # a cone that lets out nothing but TLS to port 443, and looks whether it is


class Cable:
    """What joins a site to the rest. Seconds one way; `loss` is a share of packets; `rate` in bytes per second."""

    def __init__(self, process: subprocess.Popen[str], number: int) -> None:
        self._process, self._number = process, number

    def set(self, **values: float) -> None:
        """Change `delay`, `jitter`, `loss`, `rate` (0: no limit) or `seed`."""
        self._order({"set": self._number, **values})

    def cut(self) -> None:
        """Lose everything from now on, in silence: neither end notices."""
        self._order({"set": self._number, "cut": True})

    def restore(self) -> None:
        """Carry packets again."""
        self._order({"set": self._number, "cut": False})

    def join(self, first: tuple[Namespace, str], second: tuple[Namespace, str]) -> None:
        """Make the two ends."""
        ends = [(namespace.file, device) for namespace, device in (first, second)]
        self._order({"add": self._number, "ends": ends})

    def _order(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(order)}\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the cables are gone"}')
        if "error" in answer:
            raise OSError(f"{order}: {answer['error']}")


class Host:
    """A machine: a namespace with one address besides loopback."""

    def __init__(self, namespace: Namespace, address: str, device: str, six: str = "") -> None:
        self.namespace, self.address, self.device, self.six = namespace, address, device, six

    @property
    def name(self) -> str:
        """As in `public1`, `cone2`, `cone2b`."""
        return self.namespace.name.rpartition(".")[2]

    def popen(self, *argv: str, **how: Any) -> subprocess.Popen[Any]:
        """Start a process there. `how` goes to `Popen`."""
        return subprocess.Popen(self.namespace.command(*argv), **how)

    def run(self, *argv: str, limit: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Run a process there to its end."""
        return subprocess.run(
            self.namespace.command(*argv), capture_output=True, text=True, timeout=limit, check=False
        )


class Site:
    """Hosts on one LAN behind a router, or one public host. Made by `Lab.site`.

    Attributes:
        cable: to the rest of the world.
        hosts: at least one.
        router: `None` at a public site.
        public: the address that the world sees.
    """

    def __init__(self, family: Family, kind: Kind, number: int, v6: bool) -> None:
        self.kind, self.number, self.v6 = kind, number, v6
        self.public = f"11.0.{number}.2"
        self.hosts: list[Host] = []
        self.router: Namespace | None = None
        self.cable: Cable
        self._family = family
        self._device = "wan0"
        self._upnp: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> Host:
        """The first host."""
        return self.hosts[0]

    @property
    def edge(self) -> Namespace:
        """Where the cable ends: the router or the public host."""
        return self.router or self.host.namespace

    def build(self, cable: Cable, middle: Namespace, hosts: int) -> None:
        """Make everything."""
        name, gateway = f"{self.kind.value}{self.number}", f"11.0.{self.number}.1"
        self.cable = cable
        edge = self._family.add(name if self.kind is Kind.PUBLIC else f"{name}-router")
        self._settle(edge)
        cable.join((middle, f"site{self.number}"), (edge, self._device))
        middle.ip(f"link set site{self.number} up", f"addr add {gateway}/24 dev site{self.number}")
        if self.v6:
            middle.ip(f"addr add {self._six(0, 1)}/64 dev site{self.number} nodad")
        if self.kind is Kind.PUBLIC:
            self.hosts.append(Host(edge, self.public, self._device, self._six(0, 2) if self.v6 else ""))
            self._attach()
            self._attach_six()
            return
        self.router = edge
        edge.ip("link add br0 type bridge stp_state 0 forward_delay 0", "link set br0 up")
        edge.ip("addr add 192.168.1.1/24 dev br0")
        self._attach()
        self._attach_six()
        if self.v6:
            edge.ip(f"addr add {self._six(1, 1)}/64 dev br0 nodad")
            edge.sysctl(ipv6__conf__all__forwarding=1)
            middle.ip(f"route add {self._six(1, 0)}/64 via {self._six(0, 2)}")
        for index in range(hosts):
            self.add_host(f"{name}{chr(ord('a') + index) if index else ''}")
        edge.sysctl(ipv4__ip_forward=1)
        edge.nft(_rules(self.kind))
        edge.sysctl(netfilter__nf_conntrack_tcp_loose=0)
        if self.kind is Kind.UPNP:
            self._start_upnp()

    def _attach(self) -> None:
        self.edge.ip(
            f"link set {self._device} up",
            f"addr add {self.public}/24 dev {self._device}",
            f"route add default via 11.0.{self.number}.1",
        )

    def _six(self, network: int, host: int) -> str:
        return str(IPv6Address(f"2a0e:{self.number:x}:{network:x}::{host:x}"))

    def _attach_six(self) -> None:
        if self.v6:
            self.edge.ip(
                f"addr add {self._six(0, 2)}/64 dev {self._device} nodad",
                f"route add default via {self._six(0, 1)}",
            )

    def _settle(self, namespace: Namespace) -> None:
        _quiet(namespace, v6=self.v6)

    def add_host(self, name: str) -> Host:
        """One more machine on the LAN."""
        assert self.router is not None
        namespace = self._family.add(name)
        self._settle(namespace)
        address, port = f"192.168.1.{10 + len(self.hosts)}", f"port{len(self.hosts)}"
        self.router.ip(f"link add {port} type veth peer name eth0 netns {namespace.name}")
        self.router.ip(f"link set {port} master br0 up")
        namespace.ip(
            "link set eth0 up", f"addr add {address}/24 dev eth0", "route add default via 192.168.1.1"
        )
        six = self._six(1, 10 + len(self.hosts)) if self.v6 else ""
        if six:
            namespace.ip(f"addr add {six}/64 dev eth0 nodad", f"route add default via {self._six(1, 1)}")
        self.hosts.append(Host(namespace, address, "eth0", six))
        return self.hosts[-1]

    def reboot(self) -> None:
        """The router forgets all flows, and mappings that it was asked for."""
        assert self.router is not None
        if self._upnp is not None:
            self._upnp.kill()
            self._upnp.wait()
        self.router.nft(f"delete table inet lab\n{_rules(self.kind)}")
        self.router.forget_flows()
        if self._upnp is not None:
            self._start_upnp()

    def block(self, other: Site) -> None:
        """The router drops all that comes from and goes to another site, until `unblock`."""
        assert self.router is not None
        drop = f"ip saddr {other.public} drop\nadd rule inet lab blocked ip daddr {other.public} drop"
        self.router.nft(f"add rule inet lab blocked {drop}")

    def unblock(self) -> None:
        """Let everybody through again."""
        assert self.router is not None
        self.router.nft("flush chain inet lab blocked")

    def renumber(self) -> str:
        """The provider gives the site another public address; the new one."""
        old = self.public
        self.public = f"11.0.{self.number}.{int(old.rpartition('.')[2]) + 1}"
        self.edge.ip(f"addr del {old}/24 dev {self._device}")
        self._attach()
        if self.router is not None:
            self.router.forget_flows()
        else:
            self.host.address = self.public
        return self.public

    def _start_upnp(self) -> None:
        assert self.router is not None
        config = self._family.folder / f"{self.router.name}.conf"
        config.write_text(_UPNP.format(device=self._device, serial=self.number))
        with config.with_suffix(".log").open("wb") as said:
            self._upnp = subprocess.Popen(
                self.router.command("miniupnpd", "-d", "-f", str(config), "-P", f"{config}.pid"),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )

    def close(self) -> None:
        """Reap what was started for it."""
        if self._upnp is not None:
            self._upnp.kill()
            self._upnp.wait()


class Lab:
    """Sites and what is between them. Obtained from `open_lab`."""

    def __init__(self, family: Family, cables: subprocess.Popen[str]) -> None:
        self.sites: list[Site] = []
        self.folder = family.folder
        self._family, self._cables = family, cables
        self._middle = family.add("internet")
        _quiet(self._middle, v6=True)
        self._middle.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
        private = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
        self._middle.ip(*(f"route add blackhole {network}" for network in private))

    def site(
        self, kind: Kind, *, hosts: int = 1, delay: float = 0.0, v6: bool = False, **cable: float
    ) -> Site:
        """Build a site. The round trip between two is twice the sum of their delays; for `cable` see `Cable.set`."""
        number = len(self.sites) + 1
        site = Site(self._family, kind, number, v6)
        self.sites.append(site)
        site.build(Cable(self._cables, number), self._middle, hosts)
        site.cable.set(delay=delay, **cable)
        return site

    def close(self) -> None:
        """End every process in every namespace, and remove them all."""
        self._family.close()
        for site in self.sites:
            site.close()


@contextmanager
def open_lab() -> Iterator[Lab]:
    """An empty lab. Removed at the end, with all processes in it; if not even that comes, by the next lab.

    Raises `OSError` where none can be built.
    """
    if missing := available():
        raise OSError(f"no lab can be built here: {missing}")
    clear_orphans()
    with ExitStack() as stack:
        family = Family()
        stack.callback(family.close)
        cables = subprocess.Popen(
            [sys.executable, "-I", str(Path(link.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the lab, which takes it down in order
        )
        stack.enter_context(cables)
        stack.callback(cables.kill)
        lab = Lab(family, cables)
        stack.callback(lab.close)
        yield lab


def _quiet(namespace: Namespace, *, v6: bool) -> None:
    """IPv4 only where nothing else is wanted, and no address that nobody gave, so that nothing is sent but what is meant."""
    off = 0 if v6 else 1
    namespace.sysctl(ipv6__conf__all__disable_ipv6=off, ipv6__conf__default__disable_ipv6=off)
    namespace.sysctl(ipv6__conf__default__accept_ra=0, ipv6__conf__default__accept_dad=0)


def _rules(kind: Kind) -> str:
    forward, prerouting, how = "", "", ""
    if kind is Kind.UDP_BLOCKED:
        forward += 'oifname "wan0" meta l4proto udp drop\n'
    if kind is Kind.ONLY_443:
        forward += _ONLY_TLS
    if kind is Kind.FORWARDED:
        prerouting = f'iifname "wan0" tcp dport {PORT} dnat ip to 192.168.1.10\n'
    if kind is Kind.UPNP:
        prerouting = "jump prerouting_miniupnpd\n"
    if kind is Kind.SYMMETRIC:
        how = "fully-random"
    return f"""
table inet lab {{
    chain miniupnpd {{ }}
    chain blocked {{ }}
    chain prerouting_miniupnpd {{ }}
    chain postrouting_miniupnpd {{ }}
    chain input {{
        type filter hook input priority 0
        meta l4proto ipv6-icmp accept
        iifname "wan0" ct state new,invalid drop
    }}
    chain forward {{
        type filter hook forward priority 0
        jump blocked
        ct state invalid drop
        {forward}
        iifname "wan0" ct state new ct status dnat accept
        iifname "wan0" ct state new drop
    }}
    chain prerouting {{
        type nat hook prerouting priority dstnat
        {prerouting}
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat
        oifname "wan0" meta nfproto ipv4 masquerade {how}
    }}
}}
"""


# The first bytes that leave must be those of a TLS handshake (type 22, version 3.x), or else nothing of the flow gets out.
_ONLY_TLS = """
        oifname "wan0" meta l4proto != tcp drop
        oifname "wan0" tcp dport != 443 drop
        oifname "wan0" ct mark != 1 @ih,0,16 0x1603 ct mark set 1
        oifname "wan0" ct mark != 1 @ih,0,8 >= 0 drop
"""

_UPNP = """
ext_ifname={device}
listening_ip=br0
port=5000
enable_natpmp=yes
enable_upnp=yes
secure_mode=yes
system_uptime=yes
notify_interval=60
min_lifetime=10
max_lifetime=86400
upnp_table_name=lab
upnp_nat_table_name=lab
upnp_forward_chain=miniupnpd
upnp_nat_chain=prerouting_miniupnpd
upnp_nat_postrouting_chain=postrouting_miniupnpd
uuid=0f6ad2de-4f6a-4a6f-9d2b-6c1e3b0000{serial:02x}
allow 1024-65535 192.168.1.0/24 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""
