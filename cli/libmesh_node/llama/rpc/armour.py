"""What a worker lets a host do with its rpc-server: a model of the server's buffers, and a check of each request.

rpc-server trusts its client. A size of 2^63 makes it abort, an announced gigabyte is committed before it arrives, a
tensor outside of its buffer ends the process, an unknown operation as well. So every request is held against what this
session was granted and has allocated. What is left, the arithmetic of a graph's operations, is not checked: a host that
is let in must be trusted with the session's process, and with nothing else, for the process is the session's own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from libmesh_node.llama.gguf import TENSOR_TYPES
from libmesh_node.llama.rpc.frames import TENSOR, ProtocolError

MAX_BUFFERS = 4096
"""Buffers in one session. llama-server needs three per device and model."""

OPERATIONS = 101
"""GGML_OP_COUNT of protocol 7.0; later 7.x may have more, and are then refused here."""

_TYPES = {**TENSOR_TYPES, 42: (64, 18)}  # Q2_0, which the gguf package does not know yet
_DTYPE = np.dtype(
    {
        "names": ["type", "buffer", "ne", "nb", "op", "data"],
        "formats": ["<u4", "<u8", ("<u4", 4), ("<u4", 4), "<u4", "<u8"],
        "offsets": [8, 12, 20, 36, 52, 220],
        "itemsize": TENSOR,
    }
)
_ONE = struct.Struct("<8xI8x8I")  # type, ne, nb
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_BLOCKS = np.zeros(64, np.float64)
_BLOCK_BYTES = np.zeros(64, np.float64)
for _number, (_values, _bytes) in _TYPES.items():
    _BLOCKS[_number], _BLOCK_BYTES[_number] = _values, _bytes
_LARGEST = float(1 << 52)  # sums of products stay exact in a double below this


@dataclass(slots=True)
class _Buffer:
    base: int
    size: int


class Armour:
    """The buffers of one session, and what may be done to them.

    Each check raises `ProtocolError`. Nothing is taken from a request before it is checked, and no arithmetic overflows.

    Args:
        granted: bytes that the session may allocate in all.
        devices: how many the rpc-server has.
    """

    def __init__(self, granted: int, devices: int) -> None:
        self._left, self._devices = granted, devices
        self._buffers: dict[int, _Buffer] = {}
        self._graphs: set[int] = set()

    @property
    def is_empty(self) -> bool:
        """Whether there is no buffer."""
        return not self._buffers

    def reserve(self, device: int, size: int) -> bool:
        """Whether a buffer of `size` bytes may be allocated. If so it is counted until `allocated`."""
        self.check_device(device)
        if size > self._left or len(self._buffers) >= MAX_BUFFERS:
            return False
        self._left -= size
        return True

    def allocated(self, asked: int, pointer: int, size: int, base: int) -> None:
        """What became of a reservation of `asked` bytes; pointer 0: nothing."""
        self._left += asked
        if pointer:
            self._left -= size
            self._buffers[pointer] = _Buffer(base, size)

    def freed(self, pointer: int) -> None:
        """A buffer is given back, and with it all that was stored to be run again."""
        self.check_buffer(pointer)
        self._left += self._buffers.pop(pointer).size
        self._graphs.clear()

    def check_device(self, device: int) -> None:
        """A device that exists."""
        if device >= self._devices:
            raise ProtocolError(f"device {device} of {self._devices}")

    def check_buffer(self, pointer: int) -> None:
        """A buffer of this session."""
        if pointer not in self._buffers:
            raise ProtocolError("a buffer that was not allocated")

    def check_range(self, tensor: bytes, offset: int, size: int) -> None:
        """`size` bytes from `offset` on in a tensor that lies in a buffer, and end there as well: rpc-server aborts if not."""
        whole, pointer, op = (
            tensor_bytes(tensor),
            _U64.unpack_from(tensor, 12)[0],
            _U32.unpack_from(tensor, 52)[0],
        )
        held = self._buffers.get(pointer)
        if whole is None or op >= OPERATIONS or held is None:
            raise ProtocolError("a tensor of unknown type, of an unknown operation or in no buffer")
        data, end = int.from_bytes(tensor[220:228], "little"), held.base + held.size
        if data < held.base or data + whole > end or data + offset >= end:
            raise ProtocolError("bytes outside of their buffer")
        if offset + size > whole:
            raise ProtocolError("bytes outside of their tensor")

    def check_tensors(self, tensors: bytes, count: int) -> None:
        """`count` tensors, each either in a buffer and wholly inside, or nowhere."""
        table = np.frombuffer(tensors, _DTYPE, count)
        kinds = np.minimum(table["type"], 63)
        blocks = _BLOCKS[kinds]
        if not blocks.all():
            raise ProtocolError("a tensor of unknown type")
        if (table["op"] >= OPERATIONS).any():
            raise ProtocolError("an unknown operation")
        lengths, strides = table["ne"].astype(np.float64), table["nb"].astype(np.float64)
        sizes = _sizes(lengths, strides, blocks, _BLOCK_BYTES[kinds])
        if (sizes >= _LARGEST).any():
            raise ProtocolError("a tensor larger than any memory")
        for buffer, size, data in zip(
            table["buffer"].tolist(), sizes.tolist(), table["data"].tolist(), strict=True
        ):
            held = self._buffers.get(buffer)
            if held is None:
                if data:
                    raise ProtocolError("a tensor in no buffer")
            elif data < held.base or data + int(size) > held.base + held.size:
                raise ProtocolError("a tensor outside of its buffer")

    def check_graph(self, payload: bytes) -> None:
        """A GRAPH_COMPUTE: its counts agree with its size, and all of its tensors are sound."""
        device, nodes = (int.from_bytes(payload[at : at + 4], "little") for at in (0, 4))
        self.check_device(device)
        start = 8 + 8 * nodes
        if len(payload) < start + 4:
            raise ProtocolError("a graph shorter than its nodes")
        count = int.from_bytes(payload[start : start + 4], "little")
        if len(payload) != start + 4 + TENSOR * count:
            raise ProtocolError("a graph whose size is not that of its tensors")
        self.check_tensors(payload[start + 4 :], count)
        self._graphs.add(device)

    def check_recompute(self, device: int) -> None:
        """There is a graph to run again."""
        if device not in self._graphs:
            raise ProtocolError("a graph to run again where there is none")


def tensor_bytes(tensor: bytes) -> int | None:
    """`ggml_nbytes` of a packed tensor; `None` if its type is not known."""
    kind, n0, n1, n2, n3, b0, b1, b2, b3 = _ONE.unpack_from(tensor)
    block, block_bytes = _TYPES.get(kind, (0, 0))
    if not block:
        return None
    if not (n0 and n1 and n2 and n3):
        return 0
    first = block_bytes + (n0 - 1) * b0 if block == 1 else n0 * b0 // block
    return int(first + (n1 - 1) * b1 + (n2 - 1) * b2 + (n3 - 1) * b3)


_Numbers = npt.NDArray[np.float64]


def _sizes(lengths: _Numbers, strides: _Numbers, blocks: _Numbers, block_bytes: _Numbers) -> _Numbers:
    """`ggml_nbytes` of each tensor. Rounded above 2^53, where the result is refused anyway."""
    rest = ((lengths[:, 1:] - 1) * strides[:, 1:]).sum(axis=1)
    plain = block_bytes + (lengths[:, 0] - 1) * strides[:, 0]
    first = np.where(blocks == 1, plain, lengths[:, 0] * strides[:, 0] / blocks)
    empty = (lengths == 0).any(axis=1)
    return np.where(empty, 0.0, np.ceil(first + rest))
