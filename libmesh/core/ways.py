"""The ways to a peer in the order in which they are tried: near before far, and circuits apart.

A peer announces what it has, and most of it may be of no use from here: private addresses of another network, loopback
ones of another machine. Nothing is left out for that, as a guess may be wrong; it only comes later.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from libmesh.peers import PeerId

PUNCH = "punch"
"""The way that is no address: a hole punch over the relayed connection that there is."""

MAX_WAYS = 32
"""Ways to one peer that are tried in a round, the circuits included; those beyond are left out."""

CIRCUIT = "/p2p-circuit"


@dataclass(frozen=True, slots=True)
class Ways:
    """What can be dialled, best first: `direct` addresses, and `circuits` through relays.

    `near` and `far` say what there is hope for: that some of `direct` are on a network which we seem to share, and that
    some are public ones or names. Where there is neither, they are of other networks or machines.
    """

    direct: tuple[str, ...]
    circuits: tuple[str, ...]
    near: bool = False
    far: bool = False


def is_circuit(address: str) -> bool:
    """Whether an address leads through a relay."""
    return CIRCUIT in address


def is_websocket(address: str) -> bool:
    """Whether an address leads through a WebSocket: directly, not as that of a relay."""
    parts = address.split("/")
    return not is_circuit(address) and ("ws" in parts[5:] or "wss" in parts[5:])


def relay_of(address: str) -> tuple[PeerId, str] | None:
    """The relay of a circuit and its own address, which ends in `/p2p/…`; `None` if the circuit names none."""
    before, _, _ = address.partition(CIRCUIT)
    head, _, relay = before.rpartition("/p2p/")
    return (PeerId(relay), head) if relay and "/" not in relay else None


def ways_to(peer: PeerId, addresses: Iterable[str], *, me: PeerId, mine: Sequence[str]) -> Ways:
    """Sort the addresses of `peer`, as seen from a node `me` whose own addresses are `mine`.

    Addresses on a network that we seem to share come first, then public ones and names, then private ones of other
    networks, then loopback ones. IPv6 and IPv4 alternate within each (RFC 8305, section 4), and WebSockets come after
    those, as they cost more. Circuits through us, or through the peer itself, are none; nor is what does not look like
    a multiaddr.
    """
    unique = list(dict.fromkeys(address for address in addresses if address.startswith("/")))[:MAX_WAYS]
    circuits = [address for address in unique if is_circuit(address)]
    direct = [address for address in unique if not is_circuit(address)]
    theirs = [ip_of(address) for address in direct]
    ours = [ip_of(address) for address in mine if not is_circuit(address)]
    classes: tuple[list[str], ...] = ([], [], [], [])
    shared = {ip for ip in theirs if ip is not None and not ip.is_loopback and ip in ours}
    one_network = any(ip.is_global for ip in shared)  # one router's outer address
    one_machine = any(not ip.is_global for ip in shared)
    for address, ip in zip(direct, theirs, strict=True):
        if ip is None or ip.is_global:
            classes[1].append(address)
        elif ip.is_loopback:
            classes[0 if one_machine else 3].append(address)
        else:
            near = one_network or any(_neighbours(ip, own) for own in ours)
            classes[0 if near else 2].append(address)
    through = [
        address
        for address in circuits
        if (relay := relay_of(address)) is not None and relay[0] not in (me, peer)
    ]
    direct_first = tuple(chain.from_iterable(map(_in_order, classes)))
    return Ways(direct_first, tuple(through), near=bool(classes[0]), far=bool(classes[1]))


def to_announce(addresses: Sequence[str], limit: int) -> tuple[str, ...]:
    """The `limit` best of our own addresses in their order, among which circuits have a quarter of the places for sure.

    Whom nobody can dial is reached by circuits only, and they come last.
    """
    circuits = [address for address in addresses if is_circuit(address)]
    direct = [address for address in addresses if not is_circuit(address)]
    kept = direct[: limit - min(len(circuits), limit // 4)]
    return (*kept, *circuits[: limit - len(kept)])


def to_invite(addresses: Sequence[str], limit: int) -> tuple[str, ...]:
    """The `limit` best of a peer's addresses, given best first, for somebody who may be anywhere.

    Public ones and names, then circuits, then those of its LAN. One of each kind has a place before a second of any: a
    machine has many addresses of one kind, such as those of IPv6 or of its containers, and its reader may use none of them.
    """
    kinds: tuple[list[str], ...] = ([], [], [])
    for address in dict.fromkeys(addresses):
        kinds[1 if is_circuit(address) else 2 if is_private(address) else 0].append(address)
    kept = [*(found[0] for found in kinds if found), *(address for found in kinds for address in found[1:])][
        :limit
    ]
    return tuple(address for found in kinds for address in found if address in kept)


_Ip = ipaddress.IPv4Address | ipaddress.IPv6Address


def ip_of(address: str) -> _Ip | None:
    """The IP address in a multiaddr; `None` for a name or anything else."""
    parts = address.split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
        return None
    try:
        return ipaddress.ip_address(parts[2])
    except ValueError:
        return None


def is_private(address: str) -> bool:
    """Whether it is an IP address of a private network or of this machine, and no name."""
    ip = ip_of(address)
    return ip is not None and not ip.is_global


def _neighbours(one: _Ip, other: _Ip | None) -> bool:
    """Whether two private addresses look like those of one network: the sizes that home routers use."""
    if other is None or one.version != other.version or other.is_loopback or other.is_global:
        return False
    prefix = 24 if one.version == 4 else 64
    return other in ipaddress.ip_network((one, prefix), strict=False)


def _in_order(addresses: list[str]) -> list[str]:
    websockets = [address for address in addresses if is_websocket(address)]
    return _interleaved([a for a in addresses if a not in websockets]) + _interleaved(websockets)


def _interleaved(addresses: list[str]) -> list[str]:
    six = [address for address in addresses if address.startswith(("/ip6/", "/dns6/"))]
    four = [address for address in addresses if address not in six]
    return [address for pair in zip_longest(six, four) for address in pair if address is not None]
