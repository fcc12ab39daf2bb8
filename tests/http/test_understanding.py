"""What is kept of a request to go on with its answer."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from libmesh_node.http.exchange import Exchange
from libmesh_node.http.understanding import understand
from libmesh_node.http.wanted import Wanted


@pytest.mark.parametrize("deep", [False, True])
async def test_a_request_that_cannot_be_written_again_goes_as_it_came(*, deep: bool) -> None:
    inner: list[Any] = []
    for _ in range(sys.getrecursionlimit() if deep else 1):
        inner = [inner]
    request: Any = SimpleNamespace(
        method="POST", content_type="application/json", path="/v1/chat/completions", headers={}
    )
    exchange = Exchange(request=request, id="", body=b"as it came", headers={}, began=0.0)
    exchange.said = {"stream": True, "messages": [{"role": "user", "content": "Hi"}], "other": inner}
    await understand(exchange)
    assert (exchange.transcript is None) == deep
    assert (exchange.body == b"as it came") == deep


async def test_what_a_request_wants_is_found_out_when_first_asked_for() -> None:
    request: Any = SimpleNamespace(
        method="POST", content_type="application/json", path="/v1/embeddings", headers={}
    )
    exchange = Exchange(request=request, id="", body=b"", headers={}, began=0.0)
    exchange.said = {"user": "somebody", "max_tokens": 7}
    await understand(exchange)
    assert not isinstance(exchange.wants, Wanted)
    assert (exchange.wanted.session, exchange.wanted.max_tokens) == ("somebody", 0)
