"""Who may have a part in a split and who may not, and what coming and going changes: real nodes, real llama.cpp."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from libmesh_node.models.demo import SMALL, write_model

from tests.node.nodes import PATIENCE, Json, Machine, Node, wait_for
from tests.node.test_splits import named, servers_running

pytestmark = [pytest.mark.llama, pytest.mark.slow]

SHORT = "small is not served: need 0.07 GB, have 0.05 GB from 0 peers; "
ANOTHER = " refused: it has another file named small"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 MB; with its cache it takes 69."""
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    write_model(path, SMALL, 7)
    return path


def copy(model: Path, folder: Path) -> Path:
    """Another file of the same name."""
    folder.mkdir()
    return Path(shutil.copy(model, folder / model.name))


def flags(model: Path) -> tuple[str, ...]:
    return "--model", str(model), "--max-vram", "0.05", "--verbose"


def identified(node: Node, peers: int) -> Json:
    """Its status when it knows so many peers' models by their content."""
    return node.until(
        lambda status: (
            sum(bool(entry["models"]) for entry in status["peers"]) >= peers
            and all(entry["models"] for entry in status["peers"])
        ),
        what="peers known by what they have",
    )


def test_wrong_and_corrupt_files_of_the_same_name_have_no_part(
    machine: Machine, model: Path, tmp_path: Path
) -> None:
    """Nothing of them is loaded anywhere. A third node with the right file is all that was missing."""
    wrong, corrupt = copy(model, tmp_path / "wrong"), copy(model, tmp_path / "corrupt")
    write_model(wrong, SMALL, 8, name="small")
    with corrupt.open("r+b") as file:
        file.seek(-4096, 2)
        file.write(b"\x01")
    first = machine.node(*flags(model)).up()
    token = first.invite("--scope", "worker")
    bad = [machine.node(*flags(path), "--join", token).up() for path in (wrong, corrupt)]
    for node in (first, *bad):
        identified(node, 2)
        node.until(lambda status: any(map(_tells_all, status["notices"])), what="what is missing, and why")
    assert servers_running([first, *bad]) == 0
    assert not any(named(node.status(), "rpc-server") for node in (first, *bad))
    good = machine.node(*flags(model), "--join", token).up()
    good.sees("small", limit=2 * PATIENCE)
    statuses = [node.status()["node_status"] for node in (first, good)]
    assert sorted(statuses) == ["Serving (split)", "Worker (split)"]
    assert not any(named(node.status(), "rpc-server") for node in bad)
    for node in bad:
        assert "working for the peer" not in node.words


def test_who_is_not_needed_changes_nothing_by_coming_or_going(machine: Machine, model: Path) -> None:
    """The very same processes go on, three times over."""
    first = machine.node(*flags(model)).up()
    token = first.invite("--scope", "worker")
    second = machine.node(*flags(model), "--join", token).up()
    second.sees("small", limit=2 * PATIENCE)
    pair = [first, second]
    before = _pids(pair)
    for number in range(3):
        other = machine.node(*flags(model), "--join", token).up()
        other.sees("small")
        first.until(lambda status, count=number: len(status["peers"]) >= 2, what="the third one")  # type: ignore[misc]
        assert _pids(pair) == before
        assert servers_running([*pair, other]) == 1
        other.kill() if number == 1 else other.ends(15)
        wait_for(lambda: _alone(first), PATIENCE, "its end is known")
        assert _pids(pair) == before
    assert "small is ready" not in "".join(node.words.split("small is ready", 1)[-1] for node in pair)


def _tells_all(notice: str) -> bool:
    return notice.startswith(SHORT) and notice.count(ANOTHER) == 2


def _pids(nodes: list[Node]) -> list[int]:
    return sorted(process["pid"] for node in nodes for process in node.status()["processes"])


def _alone(node: Node) -> bool:
    states: list[str] = [entry.get("state", "alive") for entry in node.status()["peers"]]
    return states.count("alive") <= 1
