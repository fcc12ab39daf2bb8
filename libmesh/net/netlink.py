"""What Linux tells over a netlink socket of links, addresses and routes, and which of it is a change of the network.

Much is not: a wireless card tells of each of its scans, and each advertisement of a router repeats the addresses that it
keeps alive. So links and addresses are remembered, and are news when they are others than before. Source of the layouts:
netlink(7), rtnetlink(7).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum

MAX_KNOWN = 4096
"""Links and addresses remembered. When full, all are forgotten, and each is news once more."""

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_LINK = struct.Struct("=BxHiII")  # family, device type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_ROUTE = struct.Struct(
    "=BBBBBBBBI"
)  # family, lengths of destination and source, tos, table, protocol, scope, type, flags
_ATTRIBUTE = struct.Struct("=HH")  # length, type

_LINK_STATE = 0x1 | 0x40 | 0x10000  # IFF_UP, IFF_RUNNING, IFF_LOWER_UP
_ADDRESS_STATE = 0x20 | 0x40  # IFA_F_DEPRECATED, IFA_F_TENTATIVE
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_MAIN_TABLE, _UNICAST = 254, 1


class _Kind(IntEnum):
    """RTM_NEWLINK, and so on."""

    NEW_LINK = 16
    DELETED_LINK = 17
    NEW_ADDRESS = 20
    DELETED_ADDRESS = 21
    NEW_ROUTE = 24
    DELETED_ROUTE = 25


class NetlinkNews:
    """Tells changes from repetitions."""

    def __init__(self) -> None:
        self._known: dict[object, int] = {}

    def told(self, data: bytes) -> bool:
        """Whether anything in what a netlink socket gave is a change. What makes no sense is one, to be safe."""
        try:
            changes = [
                kind for kind, body in _messages(data) if self._is_news(kind, body)
            ]  # all are remembered
        except (struct.error, ValueError):
            return True
        return bool(changes)

    def _is_news(self, kind: int, body: bytes) -> bool:
        match kind:
            case _Kind.NEW_LINK | _Kind.DELETED_LINK:
                _, _, index, flags, _ = _LINK.unpack_from(body)
                return self._differs(index, flags & _LINK_STATE, gone=kind == _Kind.DELETED_LINK)
            case _Kind.NEW_ADDRESS | _Kind.DELETED_ADDRESS:
                family, length, flags, _, index = _ADDRESS.unpack_from(body)
                found = dict(_attributes(body[_ADDRESS.size :]))
                address = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS, b""))
                key = (family, length, index, address)
                return self._differs(key, flags & _ADDRESS_STATE, gone=kind == _Kind.DELETED_ADDRESS)
            case _Kind.NEW_ROUTE | _Kind.DELETED_ROUTE:
                _, _, _, _, table, _, _, route, _ = _ROUTE.unpack_from(body)
                return (table, route) == (_MAIN_TABLE, _UNICAST)
        return False

    def _differs(self, key: object, state: int, *, gone: bool) -> bool:
        if gone:
            self._known.pop(key, None)
            return True
        before = self._known.get(key)
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[key] = state
        return before != state


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        length, kind, *_ = _HEADER.unpack_from(data)
        if not _HEADER.size <= length <= len(data):
            raise ValueError("a length that cannot be")
        yield kind, data[_HEADER.size : length]
        data = data[(length + 3) & ~3 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            raise ValueError("a length that cannot be")
        yield kind, data[_ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]
