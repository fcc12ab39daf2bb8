"""What a fuzz target is, and how one makes decisions out of bytes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """A rule that must hold for every input.

    Attributes:
        name: as on the command line, and of its folder in `corpus`.
        rule: the invariant, in a sentence.
        check: raises for an input that breaks it.
        seeds: inputs to begin with.
        longest: bytes; longer inputs find nothing more.
    """

    name: str
    rule: str
    check: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]] = tuple
    longest: int = 4096


class Lots:
    """Draws decisions from an input, front to back; zeros when it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    def __bool__(self) -> bool:
        return self._position < len(self._data)

    def take(self, count: int) -> bytes:
        """The next bytes; fewer at the end."""
        taken = self._data[self._position : self._position + count]
        self._position += len(taken)
        return taken

    def number(self, size: int = 1) -> int:
        """An unsigned number of that many bytes."""
        return int.from_bytes(self.take(size), "big")

    def below(self, bound: int) -> int:
        return self.number() % bound

    def one_of(self, choices: list[T] | tuple[T, ...]) -> T:
        return choices[self.below(len(choices))]

    def piece(self) -> bytes:
        """Some bytes, with their count in front."""
        return self.take(self.number())

    def rest(self) -> bytes:
        return self.take(len(self._data))


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    coroutine.close()
    raise AssertionError("it waits, and nothing will ever come")
