"""The dialling side of multistream-select on a new connection, a round trip shorter than py-libp2p's own.

Source: multiformats/multistream-select. The header and the first proposal leave together, as go-libp2p's and js-libp2p's
do. py-libp2p waits for the other side's header before it proposes; through a relay that round trip is twice as long.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio
from libp2p.abc import IMultiselectCommunicator
from libp2p.custom_types import TProtocol
from libp2p.protocol_muxer.exceptions import MultiselectClientError, MultiselectCommunicatorError
from libp2p.protocol_muxer.multiselect_client import MultiselectClient

HEADER = "/multistream/1.0.0"


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
