"""More is asked for than there is room: at the servers, in line, or in a server's context."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from libmesh_node.http import continuing
from libmesh_node.http.proxy import BACKLOG
from libmesh_node.http.queue import PER_SLOT

from tests.http.conftest import asking, call, read_comments, running_node, wait_until
from tests.http.test_dying import (
    HEAD,
    PATH,
    PLAIN,
    STREAM,
    WHOLE,
    chunk,
    event,
    hesitating_server,
    model,
    scripts,
    whole,
)

CROWD = 10


def test_ten_times_too_many_are_answered_or_told_when_to_come_back() -> None:
    told = threading.Event()
    answers: list[tuple[int, dict[str, str], bytes]] = []
    with hesitating_server(whole("200 OK", b'{"choices":[]}'), told) as server:
        let_in = server.slots + BACKLOG + PER_SLOT * server.slots
        asked = CROWD * server.slots + let_in
        with (
            running_node(replace(model(), servers=(server,))) as node,
            ThreadPoolExecutor(asked) as pool,
        ):
            for _ in range(asked):
                pool.submit(lambda: answers.append(call(node.api_port, "POST", PATH, PLAIN)))
            wait_until(lambda: len(answers) >= asked - let_in)
            told.set()
        counted = Counter(status for status, _, _ in answers)
        waits = [int(headers["retry-after"]) for status, headers, _ in answers if status == 429]
    assert counted == {200: let_in, 429: asked - let_in}
    assert min(waits) >= 1
    assert {headers["x-libmesh-model"] for _, headers, _ in answers} == {"m"}


OVERLOADED = whole("429 Too Many Requests\r\nRetry-After: 9", b'{"error":{"message":"too many"}}')


def test_node_that_is_refused_at_one_server_asks_another_and_passes_the_last_refusal_on() -> None:
    with scripts(first=[OVERLOADED], second=[WHOLE]) as (full, free), running_node(model(full, free)) as node:
        status, headers, _ = call(node.api_port, "POST", PATH, PLAIN)
        assert (status, headers["x-libmesh-node"]) == (200, "second")
        node.publish(model(full))
        status, headers, _ = call(node.api_port, "POST", PATH, PLAIN)
        assert (status, headers["retry-after"]) == (429, "9")


def test_request_too_long_for_one_server_is_asked_of_a_larger_one() -> None:
    refusal = {"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error"}}
    small = [whole("400 Bad Request", json.dumps(refusal).encode())]
    with scripts(first=small, second=[WHOLE]) as (one, other):
        servers = replace(one.server, context_length=1000), replace(other.server, context_length=2000)
        with running_node(replace(model(), servers=servers)) as node:
            status, headers, _ = call(node.api_port, "POST", PATH, PLAIN)
            assert (status, headers["x-libmesh-node"], headers["x-libmesh-attempts"]) == (200, "second", "2")
            node.publish(replace(model(), servers=servers[:1]))
            assert call(node.api_port, "POST", PATH, PLAIN)[0] == 400


def test_client_hears_once_what_is_waited_for_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuing, "SAY_EVERY", 0.1)
    monkeypatch.setattr(continuing, "PATIENCE", 60.0)
    cut = HEAD + chunk(event("Hel"))
    with (
        scripts(first=[cut, b""]) as (only,),
        running_node(model(only)) as node,
        asking(node.api_port, PATH, STREAM) as answer,
    ):
        body = read_comments(answer, 3)
    comments = [line for line in body.splitlines() if line.startswith(b":")]
    assert re.fullmatch(rb": .* up to 60 s .*", comments[0])
    assert set(comments[1:]) == {b": "}
