"""What the doctor says of nodes in every situation, in words, and by its exit code."""

from __future__ import annotations

import json
from typing import Any

import pytest
from libmesh_node.commands import doctor as command
from libmesh_node.doctor import Finding, Grade, examine, healthy, why_not_direct
from libmesh_node.main import main

PEER = "12D3KooWPeerPeerPeerPeerPeerPeerPeerPeerPeerPeerPeerPe"
DIRECT = {
    "id": PEER,
    "hostname": "gpu",
    "state": "alive",
    "path": "direct",
    "address": "/ip4/11.0.0.1/tcp/1",
    "rtt_ms": 12.3,
}
WEB = "/dns4/mesh.example.org/tcp/443/wss"


def reach(**values: Any) -> dict[str, Any]:
    plain = {
        "standing": "unknown",
        "nat": "unknown",
        "observed": [],
        "addresses": [],
        "mapping": "",
        "mapping_failure": "x",
        "relays": [],
    }
    return {**plain, **values}


def relay(**values: Any) -> dict[str, Any]:
    return {
        "id": PEER,
        "address": "/ip4/11.0.0.1/tcp/1",
        "held": True,
        "rtt_ms": 12.3,
        "failure": "",
        **values,
    }


def candidate(source: str, reachable: bool | None) -> dict[str, Any]:
    return {"address": "/ip4/11.0.2.2/tcp/4001", "source": source, "reachable": reachable}


SHUT = relay(held=False, rtt_ms=None, failure="connection refused")


def finding(topic: str, **status: Any) -> Finding:
    """The first finding of that topic."""
    full = {"peers": [DIRECT], "addresses": ["/ip4/192.168.1.10/tcp/4001"], "reachability": reach(), **status}
    return next(found for found in examine(full) if found.topic == topic)


@pytest.mark.parametrize(
    ("topic", "status", "grade", "said"),
    [
        ("mesh", {}, Grade.GOOD, "1 other node is there, 1 connected"),
        ("mesh", {"peers": [{**DIRECT, "path": None}]}, Grade.BAD, "1 other node is known, and none is connected"),
        ("mesh", {"peers": []}, Grade.NOTE, "No other node"),
        ("mesh", {"peers": [], "notices": ["Nobody in the mesh answers."]}, Grade.BAD, "Nobody in the mesh"),
        ("address", {"reachability": reach(observed=["11.0.2.2"])}, Grade.GOOD, "11.0.2.2"),
        ("address", {"reachability": reach(observed=["11.0.2.2", "11.0.3.2"])}, Grade.NOTE, "several ways out"),
        ("address", {"addresses": []}, Grade.BAD, "no address"),
        ("address", {}, Grade.NOTE, "192.168.1.10"),
        ("port", {"reachability": reach(addresses=[candidate("seen", True)])}, Grade.GOOD, "Open"),
        ("port", {"reachability": reach(addresses=[candidate("announced", False)])}, Grade.BAD, "shut"),
        ("port", {"reachability": reach(addresses=[candidate("own", False)])}, Grade.NOTE, "public address"),
        ("port", {"reachability": reach(standing="private")}, Grade.NOTE, "cannot dial"),
        ("port", {}, Grade.NOTE, "Not known"),
        ("router", {"reachability": reach(nat="none")}, Grade.GOOD, "None"),
        ("router", {"reachability": reach(nat="keeps ports")}, Grade.GOOD, "cone"),
        ("router", {"reachability": reach(nat="changes ports")}, Grade.NOTE, "symmetric"),
        ("router", {}, Grade.NOTE, "not known"),
        ("router", {"peers": [{**DIRECT, "address": WEB}]}, Grade.NOTE, "by WebSocket only"),
        ("web", {"peers": [{**DIRECT, "address": WEB}]}, Grade.NOTE, "nothing but the web"),
        ("web", {"addresses": ["/ip4/11.0.0.1/tcp/1", "/ip4/11.0.0.1/tcp/80/ws"]}, Grade.GOOD, "/tcp/80/ws"),
        ("forwarding", {"reachability": reach(mapping="PCP", addresses=[candidate("mapped", None)])}, Grade.GOOD, "PCP"),
        ("forwarding", {}, Grade.NOTE, "No router"),
        ("forwarding", {"reachability": reach(mapping_failure="not asked for")}, Grade.NOTE, "--no-port-mapping"),
        ("relay", {"reachability": reach(relays=[relay()])}, Grade.GOOD, "erPeerPe at /ip4/11.0.0.1/tcp/1, 12 ms away"),
        ("relay", {"reachability": reach(relays=[relay(rtt_ms=900.0)])}, Grade.NOTE, "900 ms away"),
        ("relay", {"reachability": reach(relays=[SHUT])}, Grade.BAD, "No place at …erPeerPe at /ip4/11.0.0.1/tcp/1: connection refused"),
        ("relay", {"reachability": reach(relays=[SHUT], standing="public")}, Grade.NOTE, "connection refused"),
        ("relay", {"reachability": reach(relays=[SHUT, relay()])}, Grade.NOTE, "connection refused"),
        ("relay", {"reachability": reach(relays=[relay(held=False, rtt_ms=None)])}, Grade.NOTE, "None"),
        ("relay", {}, Grade.NOTE, "None"),
        ("peer gpu", {}, Grade.GOOD, "direct, 12 ms, /ip4/11.0.0.1/tcp/1"),
        ("peer gpu", {"peers": [{**DIRECT, "path": "relayed", "why_not_direct": ["punch: no answer"]}]}, Grade.NOTE, "punch: no answer"),
        ("peer gpu", {"peers": [DIRECT, {**DIRECT, "state": "dead"}]}, Grade.GOOD, "direct"),
    ],
)  # fmt: skip
def test_each_situation_has_its_words(topic: str, status: dict[str, Any], grade: Grade, said: str) -> None:
    found = finding(topic, **status)
    assert said in found.text
    assert found.grade is grade


@pytest.mark.parametrize(
    ("notice", "advised"),
    [
        ("Nobody in the mesh answers; this node keeps trying.", True),
        ("The mesh refused this node: the invite was revoked; ask for a new one.", False),
        ("This node's membership has ended: join again with a new invite.", False),
    ],
)
def test_only_where_nobody_answers_it_is_asked_whether_somebody_is_there(notice: str, advised: bool) -> None:
    found = finding("mesh", peers=[], notices=[notice])
    assert (found.grade, found.text) == (Grade.BAD, notice)
    assert bool(found.advice) is advised


def test_circuits_through_web_relays_are_no_websockets_of_this_node() -> None:
    circuit = f"{WEB}/p2p/{PEER}/p2p-circuit"
    found = examine({"peers": [{**DIRECT, "path": "relayed", "address": circuit}], "addresses": [circuit]})
    assert not any(each.topic == "web" for each in found)


def test_a_slow_relay_is_told() -> None:
    assert "--relay" in finding("relay", reachability=reach(relays=[relay(rtt_ms=900.0)])).advice


@pytest.mark.parametrize(
    ("reasons", "told"),
    [
        ([], "a direct path is being looked for"),
        (["/ip4/11.0.5.2/tcp/1: no answer", "punch: declined"], "punch: declined; /ip4/11.0.5.2/tcp/1: no answer"),
        (
            [
                "/ip4/192.168.1.10/tcp/1: this node itself answered",
                f"punch: /ip4/11.0.5.2/tcp/1: no answer; /ip4/192.168.1.10/tcp/1: another peer answered, {PEER}",
                "/ip6/::1/tcp/1: connection refused",
            ],
            "punch: /ip4/11.0.5.2/tcp/1: no answer",
        ),
        (["/ip4/192.168.1.10/tcp/1: this node itself answered"], "/ip4/192.168.1.10/tcp/1: this node itself answered"),
        (["/ip4/192.168.1.10/tcp/1: no answer"], "/ip4/192.168.1.10/tcp/1: no answer"),
        (["/dns4/x/tcp/1: a", "/dns4/x/tcp/2: b", "/dns4/x/tcp/3: c", "/dns4/x/tcp/4: d"], "/dns4/x/tcp/1: a; /dns4/x/tcp/2: b; /dns4/x/tcp/3: c"),
    ],
)  # fmt: skip
def test_of_many_reasons_those_that_tell_something_are_told(reasons: list[str], told: str) -> None:
    assert why_not_direct({"why_not_direct": reasons}) == told


@pytest.mark.parametrize(
    ("standing", "advice"), [("public", "--bind-ws"), ("private", "port"), ("unknown", "port")]
)
def test_who_is_reached_through_a_relay_comes_with_what_would_make_it_direct(
    standing: str, advice: str
) -> None:
    relayed = {**DIRECT, "path": "relayed", "why_not_direct": []}
    assert advice in finding("peer gpu", peers=[relayed], reachability=reach(standing=standing)).advice


def test_relays_that_were_not_asked_for_a_place_are_not_told_of() -> None:
    spare = relay(held=False, rtt_ms=None)
    found = examine({"reachability": reach(relays=[relay(), spare, spare])})
    assert [each.grade for each in found if each.topic == "relay"] == [Grade.GOOD]


@pytest.mark.parametrize(("clock_set", "grade"), [(True, Grade.GOOD), (False, Grade.NOTE)])
def test_the_clock_is_looked_at(clock_set: bool, grade: Grade) -> None:
    assert [f.grade for f in examine({}, clock_set) if f.topic == "clock"] == [grade]
    assert command.clock_set() in (True, False, None)


@pytest.mark.parametrize("status", [{}, {"reachability": 3, "peers": "x", "addresses": None}])
def test_an_older_node_is_examined_as_far_as_it_tells(status: dict[str, Any]) -> None:
    assert examine(status)


class _Node:
    def __init__(self, status: dict[str, Any]) -> None:
        self._status = status

    def get(self, path: str) -> dict[str, Any]:
        assert path == "/api/status"
        return self._status


@pytest.mark.parametrize(("path", "code"), [("direct", 0), (None, 1)])
def test_the_exit_code_tells_whether_something_is_wrong(
    path: str | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = {
        "peers": [{**DIRECT, "path": path}],
        "addresses": ["/ip4/1.2.3.4/tcp/1"],
        "reachability": reach(),
    }
    monkeypatch.setattr(command, "find_node", lambda *_: _Node(status))
    assert main(["doctor", "--console", "1"]) == code
    assert "gpu" in capsys.readouterr().out
    assert main(["doctor", "--json", "--console", "1"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is (code == 0)
    assert {"topic", "grade", "text", "advice"} == set(found["findings"][0])


def test_the_words_of_a_peer_cannot_move_the_cursor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        command, "find_node", lambda *_: _Node({"peers": [{**DIRECT, "hostname": "\x1b[2J"}]})
    )
    main(["doctor", "--console", "1"])
    assert "\x1b" not in capsys.readouterr().out


def test_a_node_with_nothing_wrong_is_healthy() -> None:
    assert healthy([Finding("a", Grade.GOOD, ""), Finding("b", Grade.NOTE, "")])
    assert not healthy([Finding("a", Grade.BAD, "")])
