"""The frames that a yamux machine has to send by itself, until the driver takes them."""

from __future__ import annotations

from libmesh.core.yamux_frames import ACK, GO_AWAY, HEADER, PING, SYN, WINDOW_UPDATE

_MAX_PONGS = (
    16  # pings to be answered; more at once is a flood, and a lost answer costs the peer a measurement
)
_MAX_FRAMES = 65536  # for a peer that makes us answer and does not read the answers


class ControlQueue:
    """Control frames in order; grants are added up for each stream until they leave."""

    def __init__(self) -> None:
        self._frames: list[bytes] = []
        self._grants: dict[int, int] = {}
        self._pongs: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._frames or self._grants or self._pongs)

    @property
    def overfull(self) -> bool:
        """More waits than a peer that reads could have caused."""
        return len(self._frames) > _MAX_FRAMES

    def stream(self, flag: int, stream_id: int, grant: int = 0) -> None:
        """SYN, ACK or RST of a stream; the first two may carry a first grant."""
        self._frames.append(HEADER.pack(0, WINDOW_UPDATE, flag, stream_id, grant))

    def grant(self, stream_id: int, length: int) -> None:
        """Widen the peer's window."""
        self._grants[stream_id] = self._grants.get(stream_id, 0) + length

    def drop_grants(self, stream_id: int) -> None:
        """The stream is over."""
        self._grants.pop(stream_id, None)

    def ping(self, opaque: int) -> None:
        """Ask for an echo."""
        self._frames.append(HEADER.pack(0, PING, SYN, 0, opaque))

    def pong(self, opaque: int) -> None:
        """Echo, unless too many wait already."""
        if len(self._pongs) < _MAX_PONGS:
            self._pongs.append(opaque)

    def go_away(self, code: int) -> None:
        """Announce the end."""
        self._frames.append(HEADER.pack(0, GO_AWAY, 0, 0, code))

    def take(self) -> bytes:
        """All of it, and forget it."""
        frames = self._frames
        frames += [HEADER.pack(0, PING, ACK, 0, opaque) for opaque in self._pongs]
        frames += [HEADER.pack(0, WINDOW_UPDATE, 0, stream_id, n) for stream_id, n in self._grants.items()]
        self._frames, self._pongs = [], []
        self._grants.clear()
        return b"".join(frames)
