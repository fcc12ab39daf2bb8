from __future__ import annotations

from pathlib import Path

from libmesh_node.llama.logfile import BoundedLog


def test_full_log_replaces_the_one_before(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "logs" / "a.log", limit=100)
    for number in range(100):
        log.write(f"line {number:04}")
    log.close()
    assert sorted(path.name for path in log.path.parent.iterdir()) == ["a.log", "a.log.1"]
    newest = (log.path.with_name("a.log.1").read_text() + log.path.read_text()).splitlines()
    assert newest == [f"line {number:04}" for number in range(100 - len(newest), 100)]
    assert all(path.stat().st_size <= 110 for path in log.path.parent.iterdir())


def test_log_of_an_earlier_run_is_continued(tmp_path: Path) -> None:
    for word in ("one", "two"):
        log = BoundedLog(tmp_path / "log")
        log.write(word)
        log.close()
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


def test_tail_begins_anew_at_a_mark(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", tail=2)
    for line in ("a", "b", "c"):
        log.write(line)
    assert list(log.tail) == ["b", "c"]
    log.mark("$ again")
    log.write("d")
    assert list(log.tail) == ["d"]
    log.close()


def test_full_disk_loses_lines_and_nothing_else() -> None:
    log = BoundedLog(Path("/dev/full"))
    log.write("lost")
    assert log.lost == 1
    assert list(log.tail) == ["lost"]
    log.close()
    log.write("closed")
    assert log.lost == 2


def test_file_that_cannot_be_opened_loses_lines_until_it_can(tmp_path: Path) -> None:
    (tmp_path / "in the way").write_text("")
    log = BoundedLog(tmp_path / "in the way" / "log")
    log.write("lost")
    assert (log.lost, log.tail) == (1, ("lost",))
    (tmp_path / "in the way").unlink()
    log.write("kept")
    log.close()
    assert log.path.read_text() == "kept\n"


def test_what_is_no_unicode_is_written_all_the_same(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log")
    log.write("path \udcff")
    log.close()
    assert (tmp_path / "log").read_text() == "path ?\n"
