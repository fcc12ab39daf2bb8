from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.status_view import age, short_id, size, status_tables
from rich.console import Console

NOW = 1_000_000.0
ME, PEER = "12D3KooW" + "m" * 44, "12D3KooW" + "p" * 44
STATUS: dict[str, Any] = {
    "schema_version": 1,
    "node_id": ME,
    "mesh_id": "ab" * 16,
    "node_status": "Serving",
    "version": "0.1.0",
    "my_hostname": "attic",
    "scope": "invite",
    "api_port": 9337,
    "console_port": 3131,
    "my_vram_gb": 24.0,
    "addresses": ["/ip4/10.0.0.5/tcp/4001", "/ip4/203.0.113.7/tcp/4001"],
    "notices": ["The model 'demo' talks nonsense."],
    "peers": [
        {
            "id": PEER, "hostname": "cellar", "role": "Client", "scope": "client", "state": "alive", "path": "direct",
            "rtt_ms": 1.234, "vram_gb": 0, "models": ["m"], "inflight_requests": 3, "since": NOW - 125,
            "path_since": NOW - 61,
        },
    ],
    "models": [
        {
            "name": "demo", "digest": "0123456789abcdef", "size_bytes": 4_100_000, "context_length": 4096,
            "servers": [{"peer": ME, "in_flight": 2}, {"peer": PEER, "in_flight": 1}, {"peer": "1234567890"}],
            "asked": 12.0,
        },
        {"name": "wanted", "digest": "", "size_bytes": 17_200_000_000, "context_length": 0, "servers": []},
    ],
    "processes": [
        {"name": "llama-server", "pid": 7, "port": 8080, "model": "demo", "status": "failed", "failure": "out of memory"},
    ],
}  # fmt: skip


def shown(status: Any, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    console.print(status_tables(status, NOW, width))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def row(text: str, start: str) -> list[str]:
    return next(line for line in text.splitlines() if line.strip().startswith(start)).split()


def test_everything_that_a_person_asks_for_is_there() -> None:
    text = shown(STATUS)
    assert row(text, "node") == ["node", ME]
    assert "Serving on attic, version 0.1.0" in text
    assert "http://localhost:9337/v1" in text
    assert "/ip4/203.0.113.7/tcp/4001" in text
    assert "talks nonsense" in text
    assert row(text, short_id(PEER)) == (
        [
            short_id(PEER),
            "cellar",
            "Client",
            "client",
            "alive",
            "direct",
            "1",
            "min",
            "1.2",
            "ms",
            "–",
            "m",
            "3",
            "2",
            "min",
        ]
    )
    assert (
        " ".join(row(text, "demo")) == "demo warm 4.1 MB 4,096 3 12 this node, cellar, …34567890 0123456789ab"
    )
    assert " ".join(row(text, "wanted")) == "wanted cold 17 GB – 0 – nobody –"
    text = shown(STATUS | {"models": [{"name": "wanted", "wanted": True}, {"name": "near", "standbys": 1}]})
    assert "nobody, but it is wanted" in text
    assert "nobody; 1 node would" in text
    assert row(text, "llama-server") == [
        "llama-server",
        "demo",
        "failed",
        "7",
        "8080",
        "0",
        "out",
        "of",
        "memory",
    ]


def test_of_a_relayed_peer_it_is_told_since_when_and_why_there_is_no_better_path() -> None:
    peer = STATUS["peers"][0] | {
        "path": "relayed", "why_not_direct": ["/ip4/11.0.2.2/tcp/1: no answer", "punch: it changes ports"]
    }  # fmt: skip
    assert "not direct" not in shown(STATUS)
    for width in (200, 80):
        text = shown(STATUS | {"peers": [STATUS["peers"][0], peer]}, width)
        assert max(map(len, text.splitlines())) <= width
        _, _, told = text.partition("not direct")
        told = " ".join(told.partition("models")[0].split())
        assert f"{short_id(PEER)} cellar 1 min punch: it changes ports; /ip4/11.0.2.2/tcp/1: no" in told
        assert told.count(short_id(PEER)) == 1


def test_peers_on_hosts_of_one_name_are_told_apart_by_their_ids() -> None:
    status = STATUS | {"my_hostname": "cellar"}
    assert f"this node, {short_id(PEER)}, …34567890" in shown(status)


def test_a_lonely_node_says_that_there_is_nobody() -> None:
    text = shown({"node_id": ME})
    assert "peers: none" in text
    assert "models: none" in text


def test_a_narrow_terminal_leaves_out_what_matters_least_and_cuts_no_id() -> None:
    for width in (70, 80, 100):
        text = shown(STATUS, width)
        assert max(map(len, text.splitlines())) <= width
        assert short_id(PEER) in text
        assert "in flight" in text
        assert "digest" not in text
    assert shown(STATUS, 10)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(-1e12, 1e12) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(
    [*STATUS, *STATUS["peers"][0], *STATUS["models"][0], "in_flight", "peer", *STATUS["processes"][0]]
)
objects = st.dictionaries(fields, json_values, max_size=6)


@given(st.dictionaries(fields, json_values | st.lists(objects, max_size=3), max_size=8))
def test_nothing_that_a_node_says_makes_it_fail(status: dict[str, Any]) -> None:
    shown(status)


def test_markup_in_a_peers_words_is_shown_as_it_is() -> None:
    peer = {"id": PEER, "hostname": "[red]x[/red]", "state": "[/]"}
    text = shown({"peers": [peer], "notices": ["[/nonsense]"]})
    assert "[red]x[/red]" in text
    assert "[/nonsense]" in text


@pytest.mark.parametrize(
    ("gigabytes", "text"),
    [
        (17.2, "17 GB"),
        (1.24, "1.2 GB"),
        (0.82, "820 MB"),
        (0.0041, "4.1 MB"),
        (0, "–"),
        (None, "–"),
        ("x", "–"),
    ],
)
def test_sizes_are_short(gigabytes: object, text: str) -> None:
    assert size(gigabytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min"), (3599, "59 min"), (3600, "1 h"), (86400, "1 d"), (-5, "0 s")],
)
def test_ages_are_in_their_largest_unit(seconds: float, text: str) -> None:
    assert age(NOW - seconds, NOW) == text


def test_control_characters_of_a_peer_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in shown({"peers": [{"id": PEER, "hostname": "\x1b[2Jgone\x07"}]})
