"""The dialling side of multistream-select on a connection, against scripts."""

from __future__ import annotations

from functools import partial

import pytest
import trio
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.protocol_muxer.exceptions import MultiselectClientError, MultiselectCommunicatorError

from libmesh.errors import NetworkError
from libmesh.net import swarm
from libmesh.net.eager import HEADER, EagerClient, ProposalRefused, Proposed, was_refused
from libmesh.net.libp2p import open_libp2p_network
from libmesh.net.lines import encode_line
from libmesh.net.tls import PROTOCOL_ID as TLS_ID
from libmesh.peers import PathKind
from tests.members import peer, seed
from tests.net.hosts import LOCAL

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


class Bytes:
    """The other side: its bytes, as far as they go. Notes each write."""

    def __init__(self, said: bytes) -> None:
        self._said = said
        self.written: list[bytes] = []

    async def write(self, data: bytes) -> None:
        self.written.append(data)

    async def read(self, n: int | None = None) -> bytes:
        data, self._said = self._said[:n], self._said[n:] if n is not None else b""
        return data


HELLO = encode_line(HEADER) + encode_line(NOISE)


async def test_what_is_proposed_is_spoken_at_once_and_read_after_the_consent() -> None:
    raw = Bytes(HELLO + b"their words")
    proposed = Proposed(raw, NOISE)  # type: ignore[arg-type]
    await proposed.write(b"our words")
    await proposed.write(b"more")
    assert raw.written == [HELLO + b"our words", b"more"]
    assert await proposed.read(5) == b"their"
    assert await proposed.read(100) == b" words"


@pytest.mark.parametrize(
    "said",
    [
        encode_line(HEADER),
        HELLO[:-1],
        encode_line(HEADER) + encode_line("na"),
        b"HTTP/1.1 400 Bad Request",
        b"\xff" * 200,
        bytes(50),
    ],
)
async def test_anything_but_consent_is_a_refusal(said: bytes) -> None:
    proposed = Proposed(Bytes(said), NOISE)  # type: ignore[arg-type]
    await proposed.write(b"")
    with pytest.raises(ProposalRefused) as failed:
        await proposed.read(1)
    assert was_refused(failed.value)


@pytest.mark.parametrize("said", [b"", encode_line(HEADER)[:-1]])
async def test_an_end_before_the_header_is_no_refusal(said: bytes) -> None:
    proposed = Proposed(Bytes(said), NOISE)  # type: ignore[arg-type]
    await proposed.write(b"")
    with pytest.raises(IOException):
        await proposed.read(1)


async def test_a_dial_that_is_cut_in_the_handshake_is_made_once() -> None:
    accepted = list[trio.SocketStream]()

    async def cut(stream: trio.SocketStream) -> None:
        accepted.append(stream)
        await stream.aclose()

    async with trio.open_nursery() as nursery, open_libp2p_network(seed(1), LOCAL) as network:
        listeners = await nursery.start(partial(trio.serve_tcp, cut, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        with trio.fail_after(60), pytest.raises(NetworkError):
            await network.dial(peer(2), f"/ip4/127.0.0.1/tcp/{port}")
        nursery.cancel_scope.cancel()
    assert len(accepted) == 1


def test_other_failures_are_no_refusals() -> None:
    failed = ValueError()
    failed.__cause__ = OSError()
    assert not was_refused(failed)


async def test_a_peer_without_noise_is_dialled_once_more_and_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_libp2p_network(seed(1), LOCAL) as one:
        monkeypatch.setattr(swarm, "SECURITY", tuple(each for each in swarm.SECURITY if each[0] == TLS_ID))
        async with open_libp2p_network(seed(2), LOCAL) as other:
            assert (await one.connect(other.peer, other.addresses())).kind is PathKind.DIRECT
