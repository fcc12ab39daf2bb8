"""For the patched llama.cpp of the first mesh: its REGISTER_PEER names another worker by an address of the host's machine.

The fork's host tells each worker where the others are, as `127.0.0.1:PORT`, where PORT is the host's own end of the tunnel
to that worker. On the worker's machine that leads nowhere, so the address is replaced by the worker's own end of a tunnel to
the same peer. Ports alone do not name a peer: two hosts may use the same one, so the map is keyed by host and port.

The fork's numbers mean other commands in stock llama.cpp. Only a server whose HELLO says 4.x, from 4.1 on, is the fork;
with any other nothing is rewritten. Until the answer to HELLO has passed, nothing needs to be: it is the first exchange.

    REGISTER_PEER, command 18: u32 peer id, char[128] endpoint, zero-terminated; 132 bytes. Answer: u8.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from libmesh import FrameRewriter
from libmesh_node.llama.rpc.frames import ProtocolError
from libmesh_node.llama.rpc.opening import is_fork

REGISTER_PEER = 18
SIZE = 132
_ENDPOINT = 128
_HEAD = 9
_HELLO = 14
MAX_PAYLOAD = 1 << 40

PortMap = Mapping[tuple[str, int], int]
"""From a host's peer id and the port of its tunnel to a worker, to the port of this machine's tunnel to the same worker."""


class RegisterPeerRewriter:
    """Both directions of one connection between a host and this machine's rpc-server.

    `from_host` and `from_server` take bytes in any pieces and return what is to be passed on. Only a REGISTER_PEER of the
    fork's is held back until it is whole. Both raise `ProtocolError`; close the connection then.

    Args:
        host: peer id of the host.
        ports: read anew for each message, so that tunnels may come and go.

    Attributes:
        unknown: ports that were named and are not in the map; these messages passed as they were.
    """

    def __init__(self, host: str, ports: PortMap) -> None:
        self._host, self._ports = host, ports
        self._filter = FrameRewriter(_HEAD, self._size, self._wanted, self._rewrite, limit=SIZE)
        self._hello = b""  # the server's first answer, until it has told its version
        self._version: tuple[int, int] | None = None
        self.unknown: list[int] = []

    def from_host(self, data: bytes) -> bytes:
        """The host sent `data`."""
        return self._filter.feed(data)

    def from_server(self, data: bytes) -> bytes:
        """rpc-server sent `data`. Nothing of it is changed or held back."""
        if self._version is None:
            self._hello += data[: 16 - len(self._hello)]
            if len(self._hello) >= 8 + 3:
                self._version = self._hello[8], self._hello[9]
        return data

    @property
    def is_fork(self) -> bool:
        """Whether the server has said that it is the fork."""
        return self._version is not None and is_fork(self._version)

    def close(self) -> bytes:
        """At the host's end of file: a message that was cut off passes as far as it came."""
        return self._filter.close()

    def _size(self, head: bytes) -> int:
        command, size = struct.unpack("<BQ", head)
        if size > MAX_PAYLOAD or (self._wanted(head, size) and size != SIZE):
            raise ProtocolError(f"a command {command} of {size} bytes")
        return int(size)

    def _wanted(self, head: bytes, _size: int) -> bool:
        return head[0] == REGISTER_PEER and self.is_fork

    def _rewrite(self, head: bytes, payload: bytes) -> bytes:
        return head + self._rewritten(payload)

    def _rewritten(self, payload: bytes) -> bytes:
        endpoint = payload[4:].split(b"\0", 1)[0].decode("ascii", "replace")
        name, _, port = endpoint.rpartition(":")
        if not name or not (port.isascii() and port.isdigit()):
            raise ProtocolError("a REGISTER_PEER without an address")
        own = self._ports.get((self._host, int(port)))
        if own is None:
            self.unknown.append(int(port))
            del self.unknown[:-16]
            return payload
        return payload[:4] + f"127.0.0.1:{own}".encode().ljust(_ENDPOINT, b"\0")
