"""What llama-server uploads, and what of it the worker has already.

An upload is compared with the host's own file while it arrives, and not kept: what is equal to the end becomes a reference,
and from the first difference on it is sent as it is, what was equal before coming from the file. The client's hashes of
large tensors are learned on the way; where name and hash are known, the client is told that the data is there already.
"""

from __future__ import annotations

from dataclasses import dataclass

from libmesh_node.llama.rpc.frames import (
    REFERENCE,
    SET_HEADER,
    TENSOR,
    Command,
    FramePiece,
    FrameStart,
    Link,
    frame,
    frame_head,
)
from libmesh_node.llama.rpc.weights import LearnedHashes, Place, Weights

LEAST_REFERENCE = 256
"""Smaller data is sent as it is: a reference takes 20 bytes itself."""


@dataclass(frozen=True, slots=True)
class ToWorker:
    """Send these bytes to the worker's end; if they are `early`, with the next ones that are not.

    Early is a small upload: the worker has nothing to do about it before a command that uses it follows.
    """

    data: bytes
    early: bool = False


@dataclass(frozen=True, slots=True)
class FromFile:
    """Send the first `size` bytes of `place` of the model's files to the worker's end."""

    place: Place
    size: int


Effects = list[ToWorker | FromFile]


class _Upload:
    """A large SET_TENSOR under way: while it equals one of the candidates, nothing of it has been sent."""

    def __init__(self, header: bytes, size: int, candidates: list[Place], value: int | None) -> None:
        self.header, self.size = header, size
        self.candidates, self.hash = candidates, value
        self.position = 0


class Uploads:
    """The uploads of one connection.

    Attributes:
        spared: bytes that were replaced by references.
    """

    def __init__(self, weights: Weights, hashes: LearnedHashes) -> None:
        self._weights, self._hashes = weights, hashes
        self._upload: _Upload | None = None
        self._asked: tuple[bytes, int, int] | None = None
        self.spared = 0

    def hash(self, payload: bytes) -> tuple[bool, Effects]:
        """A SET_TENSOR_HASH: whether the data is there, and what the worker must be sent if so."""
        name, offset = _name(payload), int.from_bytes(payload[TENSOR : TENSOR + 8], "little")
        value = int.from_bytes(payload[TENSOR + 8 :], "little")
        for place in self._weights.whole(name) if offset == 0 else ():
            if self._hashes.get(name, place) == value:
                return True, [self._refer(payload[:TENSOR] + bytes(9), place)]
        self._asked = (name, offset, value)
        return False, []

    def whole(self, payload: bytes) -> Effects:
        """A SET_TENSOR that has arrived whole."""
        header, data = payload[:SET_HEADER], payload[SET_HEADER:]
        for place in self._candidates(header, len(data)):
            if self._weights.read(place, 0, len(data)) == data:
                return [self._refer(header, place)]
        return [ToWorker(frame(Command.SET_TENSOR, _uncached(header) + data), early=True)]

    def begin(self, start: FrameStart) -> Effects:
        """The beginning of a large SET_TENSOR."""
        asked, self._asked = self._asked, None
        about = (_name(start.head), _offset(start.head))
        value = asked[2] if asked is not None and asked[:2] == about else None
        upload = _Upload(start.head, start.size, self._candidates(start.head, start.size), value)
        self._upload = upload
        return [] if upload.candidates else [ToWorker(_set_head(upload))]

    def go_on(self, piece: FramePiece) -> Effects:
        """The next bytes of it."""
        upload = self._upload
        assert upload is not None
        if piece.last:
            self._upload = None
        return self._compare(upload, piece) if upload.candidates else [ToWorker(piece.data)]

    def _compare(self, upload: _Upload, piece: FramePiece) -> Effects:
        before, position = upload.candidates, upload.position
        upload.candidates = equal = [
            place for place in before if self._weights.read(place, position, len(piece.data)) == piece.data
        ]
        upload.position += len(piece.data)
        if not equal:
            return [ToWorker(_set_head(upload)), FromFile(before[0], position), ToWorker(piece.data)]
        if not piece.last:
            return []
        name = _name(upload.header)
        if upload.hash is not None and equal[0] in self._weights.whole(name):
            self._hashes.learn(name, equal[0], upload.hash)
        return [self._refer(upload.header, equal[0])]

    def _candidates(self, header: bytes, size: int) -> list[Place]:
        if size < LEAST_REFERENCE:
            return []
        return list(self._weights.candidates(_name(header), _offset(header), size))

    def _refer(self, header: bytes, place: Place) -> ToWorker:
        self.spared += place.size
        reference = REFERENCE.pack(_uncached(header), place.part, place.offset, place.size)
        return ToWorker(frame(Link.REFERENCE, reference))


def _name(header: bytes) -> bytes:
    return header[228:292].split(b"\0", 1)[0]


def _offset(header: bytes) -> int:
    return int.from_bytes(header[TENSOR + 1 : SET_HEADER], "little")


def _uncached(header: bytes) -> bytes:
    """The header with `cache_flag` 0: nothing is to stay behind on the worker."""
    return header[:TENSOR] + b"\0" + header[TENSOR + 1 :]


def _set_head(upload: _Upload) -> bytes:
    return frame_head(Command.SET_TENSOR, SET_HEADER + upload.size) + _uncached(upload.header)
