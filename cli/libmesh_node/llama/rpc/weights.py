"""A model's tensors in its files, as both ends of the tunnel look at them.

The host's end asks which bytes of its files an upload could be, and compares; the worker's end is told where the bytes
lie and sends them from its own files. A name proves nothing: slices come under the whole tensor's name, and a draft may
share names with its model. Only equal bytes count.

Files are read, not mapped: a mapped file that somebody truncates meanwhile kills the process.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from libmesh_node.llama.gguf import read_header

NAME_BYTES = 63
"""Of a tensor's name, as many travel: ggml's GGML_MAX_NAME less the terminating zero."""

_HASHES_LIMIT = 4 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a model: `size` of them from `offset` on in file number `part`."""

    part: int
    offset: int
    size: int


class Weights:
    """The tensors of a model's files. Obtained from `open_weights`."""

    def __init__(self, files: Sequence[int], sizes: Sequence[int], places: dict[bytes, list[Place]]) -> None:
        self._files, self._sizes, self._places = files, sizes, places

    def candidates(self, name: bytes, offset: int, size: int) -> Iterator[Place]:
        """Where `size` bytes from `offset` on in a tensor called `name` lie, for each tensor of that name."""
        for place in self._places.get(name, ()):
            if offset + size <= place.size:
                yield Place(place.part, place.offset + offset, size)

    def whole(self, name: bytes) -> Sequence[Place]:
        """Where all of each tensor called `name` lies."""
        return self._places.get(name, ())

    def read(self, place: Place, start: int, size: int) -> bytes:
        """`size` bytes of `place` from `start` on; fewer if the file has become shorter. Raises `OSError`."""
        return os.pread(self._files[place.part], size, place.offset + start)

    def holds(self, place: Place) -> bool:
        """Whether there is such a place in these files."""
        return 0 <= place.part < len(self._files) and place.offset + place.size <= self._sizes[place.part]

    def file(self, part: int) -> int:
        """The descriptor of a part, to send from; its position means nothing."""
        return self._files[part]


@contextmanager
def open_weights(parts: Sequence[Path]) -> Iterator[Weights]:
    """Index and hold open the files of a model. Raises `ModelError` or `OSError`."""
    files: list[int] = []
    places: dict[bytes, list[Place]] = {}
    try:
        for part, path in enumerate(parts):
            for tensor in read_header(path).tensors:
                name = tensor.name.encode()[:NAME_BYTES]
                places.setdefault(name, []).append(Place(part, tensor.offset, tensor.size))
            files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        yield Weights(files, [os.fstat(file).st_size for file in files], places)
    finally:
        for file in files:
            os.close(file)


class LearnedHashes:
    """llama.cpp's hashes of a model's large tensors, learned while it was uploaded, so that they are never computed.

    Kept in a JSON file per model; one that cannot be read counts as empty, one that cannot be written is done without.

    Args:
        path: the file; `None` keeps them in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, int] = {}
        self._changed = False
        if path is not None:
            with suppress(OSError, ValueError):
                found = json.loads(path.read_bytes()[:_HASHES_LIMIT])
                if isinstance(found, dict):
                    self._known = {name: value for name, value in found.items() if isinstance(value, int)}

    def get(self, name: bytes, place: Place) -> int | None:
        """The hash of the whole tensor at `place`, if it was ever seen."""
        return self._known.get(_key(name, place))

    def learn(self, name: bytes, place: Place, value: int) -> None:
        """Remember that the tensor at `place`, all of it, has this hash."""
        if self._known.get(key := _key(name, place)) != value:
            self._known[key] = value
            self._changed = True

    def save(self) -> None:
        """Write what is new. Blocks for a small file."""
        if not self._changed or self._path is None:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump(self._known, file)
            os.replace(file.name, self._path)
        self._changed = False


def _key(name: bytes, place: Place) -> str:
    return f"{place.part}:{place.offset}:{place.size}:{name.decode('utf-8', 'replace')}"
