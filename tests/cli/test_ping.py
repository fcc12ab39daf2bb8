"""`ping` shows the path to a peer and each change of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from libmesh_node.commands import ping
from libmesh_node.main import main

PEER = "12D3KooWGkY5hM1tWc9oPqRsTuVwXyZ1234567890abcdEfGhIjK"
DIRECT = {
    "id": PEER,
    "hostname": "attic",
    "state": "alive",
    "path": "direct",
    "address": "/ip4/1.2.3.4/tcp/1",
    "rtt_ms": 1.25,
}
RELAYED = {**DIRECT, "path": "relayed", "rtt_ms": 80.0, "why_not_direct": ["punch: no answer"], "path_since": 0}  # fmt: skip
GONE = {"id": PEER, "hostname": "attic", "state": "dead", "path": None}


class _Node:
    """Answers with one status after the other, the last one for ever."""

    def __init__(self, *entries: dict[str, Any]) -> None:
        self._statuses = [{"peers": [entry]} for entry in entries]

    def get(self, path: str) -> dict[str, Any]:
        return self._statuses.pop(0) if len(self._statuses) > 1 else self._statuses[0]


def pinged(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *entries: dict[str, Any],
    flags: tuple[str, ...] = (),
) -> tuple[int, list[str]]:
    monkeypatch.setattr(ping, "find_node", lambda *_: _Node(entries[0], *entries))
    monkeypatch.setattr(ping, "PAUSE", 0)
    status = main(["ping", "attic", "--count", str(len(entries)), *flags])
    return status, capsys.readouterr().out.splitlines()


def test_a_change_of_the_path_is_shown_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = pinged(monkeypatch, capsys, DIRECT, DIRECT, RELAYED, GONE, DIRECT)
    assert status == 0
    assert "attic: direct, 1.2 ms, /ip4/1.2.3.4/tcp/1" in lines[0]
    assert lines[1].endswith("attic: direct, 1.2 ms")
    assert "relayed, 80.0 ms" in lines[2]
    assert "(was direct)" in lines[2]
    assert lines[3].strip() == "not better, because punch: no answer"
    assert "no connection (dead)" in lines[4]
    assert "(was not connected)" in lines[5]


def test_a_reason_that_turns_up_later_is_shown_when_it_does_and_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    early, late = (
        {**RELAYED, "why_not_direct": []},
        {**RELAYED, "why_not_direct": ["punch: no answer", "x: refused"]},
    )
    _, lines = pinged(monkeypatch, capsys, early, RELAYED, RELAYED, late)
    assert [line.partition("because ")[2] for line in lines] == [
        "",
        "",
        "punch: no answer",
        "",
        "",
        "x: refused",
    ]


def test_a_peer_that_does_not_answer_now_is_not_shown_as_if_it_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, lines = pinged(monkeypatch, capsys, DIRECT, {**DIRECT, "state": "suspect"})
    assert lines[1].endswith("direct, 1.2 ms, and does not answer now")


def test_no_path_at_the_end_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pinged(monkeypatch, capsys, DIRECT, GONE)[0] == 1


@pytest.mark.parametrize("name", [PEER, PEER[-6:], f"…{PEER[-6:]}"])
def test_a_node_does_not_wait_for_a_path_to_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    status = {"node_id": PEER, "peers": []}
    monkeypatch.setattr(ping, "find_node", lambda *_: SimpleNamespace(get=lambda _: status))
    assert main(["ping", name]) == 1
    assert capsys.readouterr().err == f"libmesh-node: {name!r} is this node itself.\n"


def test_json_is_one_object_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, lines = pinged(monkeypatch, capsys, DIRECT, RELAYED, flags=("--json",))
    assert [json.loads(line)["path"] for line in lines] == ["direct", "relayed"]


def test_a_peers_words_cannot_move_the_cursor() -> None:
    entry = {**RELAYED, "hostname": "\x1b[2Jattic", "address": "\x1b", "why_not_direct": ["\x1b[1m"]}
    assert "\x1b" not in "".join(ping.lines_of(entry, {"path": "\x1b"}, 5.0))


@pytest.mark.parametrize("count", ["0", "-1", "x"])
def test_a_count_that_is_none_is_refused(count: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["ping", "attic", "--count", count, "--data-dir", str(tmp_path)])


def test_ctrl_c_ends_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("libmesh_node.commands.ping.time.sleep", interrupt)
    status, lines = pinged(monkeypatch, capsys, DIRECT, DIRECT)
    assert (status, len(lines)) == (0, 1)
