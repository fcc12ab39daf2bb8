"""The dialling side of multistream-select on a new connection, one or two round trips shorter than py-libp2p's own.

Source: multiformats/multistream-select. The header and the first proposal leave together, as go-libp2p's and js-libp2p's
do. py-libp2p waits for the other side's header before it proposes; through a relay that round trip is twice as long.

Nearly every peer has Noise, so its first message can leave with the proposal of it, too (`Proposed`). Whoever has not reads
that message as another proposal, and the connection is of no use any more: the dial has to be made anew, with patience.
Not so if the connection ends before the other side has said its header: then it was not cut for the proposal.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio
from libp2p.abc import IMultiselectCommunicator, IRawConnection
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.io.utils import read_exactly
from libp2p.protocol_muxer.exceptions import MultiselectClientError, MultiselectCommunicatorError
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.security.exceptions import HandshakeFailure

from libmesh.net.lines import HEADER, encode_line


class ProposalRefused(HandshakeFailure):
    """The other side did not take what was proposed before it could say so. The connection is of no use any more."""


class Proposed:
    """A raw connection on which `protocol` is spoken at once; the other side's consent is read before its first bytes.

    Its `read` raises `ProposalRefused` if what comes is not that consent, or nothing comes after the header.
    """

    def __init__(self, raw: IRawConnection, protocol: str) -> None:
        self._raw = raw
        self._first = encode_line(HEADER) + encode_line(protocol)
        self._consents = [encode_line(HEADER), encode_line(protocol)]

    async def write(self, data: bytes) -> None:
        """Send all of `data`, after the proposal."""
        first, self._first = self._first, b""
        await self._raw.write(first + data)

    async def read(self, n: int | None = None) -> bytes:
        """As the raw connection's, from after the consent on."""
        while self._consents:
            answered = len(self._consents) == 1
            expected = self._consents.pop(0)
            try:
                said = await read_exactly(self._raw, 1)
                if expected.startswith(said):
                    said += await read_exactly(self._raw, len(expected) - 1)
            except (IOException, OSError) as exc:
                if not answered:
                    raise
                raise ProposalRefused(f"no answer to the proposal of a protocol: {exc}") from exc
            if said != expected:
                raise ProposalRefused("the other side does not take the protocol that was proposed")
        return await self._raw.read(n)


def was_refused(exc: BaseException) -> bool:
    """Whether that is why a handshake failed."""
    cause: BaseException | None = exc
    while cause is not None and not isinstance(cause, ProposalRefused):
        cause = cause.__cause__
    return cause is not None


class EagerClient(MultiselectClient):
    """In place of `MultiselectClient` in a selector."""

    async def select_one_of(
        self,
        protocols: Sequence[TProtocol],
        communicator: IMultiselectCommunicator,
        negotiate_timeout: int = 30,
    ) -> TProtocol:
        """The first of `protocols` that the other side takes. Raises `MultiselectClientError`."""
        with trio.move_on_after(negotiate_timeout):
            try:
                await communicator.write(HEADER)
                for number, protocol in enumerate(protocols):
                    await communicator.write(protocol)
                    if number == 0 and (header := (await communicator.read()).strip()) != HEADER:
                        raise MultiselectClientError(f"the other side speaks {header!r}, not {HEADER}")
                    if (answer := (await communicator.read()).strip()) == protocol:
                        return protocol
                    if answer != "na":
                        raise MultiselectClientError(f"{protocol} was answered by {answer!r}")
            except (MultiselectCommunicatorError, UnicodeDecodeError) as exc:
                raise MultiselectClientError(f"negotiation failed: {exc}") from exc
            raise MultiselectClientError(f"none of {', '.join(protocols)} is known to the other side")
        raise MultiselectClientError(f"no answer within {negotiate_timeout} s")
