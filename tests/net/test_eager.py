"""The dialling side of multistream-select on a connection, against scripts."""

from __future__ import annotations

import pytest
from libp2p.custom_types import TProtocol
from libp2p.protocol_muxer.exceptions import MultiselectClientError, MultiselectCommunicatorError

from libmesh.net.eager import HEADER, EagerClient

NOISE, TLS = TProtocol("/noise"), TProtocol("/tls/1.0.0")


class Script:
    """The other side: its lines, handed out one by one. Notes how much had been written when a line was first waited for."""

    def __init__(self, *lines: str) -> None:
        self._lines = list(lines)
        self.written: list[str] = []
        self.written_before_reading: int | None = None

    async def write(self, line: str) -> None:
        self.written.append(line)

    async def read(self) -> str:
        if self.written_before_reading is None:
            self.written_before_reading = len(self.written)
        if not self._lines:
            raise MultiselectCommunicatorError("the end")
        return f"{self._lines.pop(0)}\n"


async def selected(script: Script) -> TProtocol:
    return await EagerClient().select_one_of((NOISE, TLS), script)


async def test_the_first_proposal_does_not_wait_for_the_header() -> None:
    script = Script(HEADER, NOISE)
    assert await selected(script) == NOISE
    assert script.written == [HEADER, NOISE]
    assert script.written_before_reading == 2


async def test_the_next_one_is_proposed_when_the_first_is_refused() -> None:
    script = Script(HEADER, "na", TLS)
    assert await selected(script) == TLS
    assert script.written == [HEADER, NOISE, TLS]


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("HTTP/1.1 400 Bad Request",),
        (HEADER,),
        (HEADER, "na", "na"),
        (HEADER, "/other"),
        (HEADER, HEADER),
    ],
)
async def test_anything_else_ends_it(lines: tuple[str, ...]) -> None:
    with pytest.raises(MultiselectClientError):
        await selected(Script(*lines))
