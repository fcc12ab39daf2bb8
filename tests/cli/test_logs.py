from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from libmesh_node import logs
from libmesh_node.logs import logging_to

OURS = logging.getLogger("libmesh_node.node")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_people_get_calm_lines_and_warnings_that_say_so() -> None:
    stream = io.StringIO()
    with logging_to(stream=stream):
        OURS.info("Serving %s", "demo")
        OURS.warning("The disk is nearly full.")
        OURS.debug("not shown")
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d  Serving demo", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d  warning: The disk is nearly full\.", second)


def test_a_traceback_is_one_line_unless_verbose() -> None:
    for verbose in (False, True):
        stream = io.StringIO()
        with logging_to(stream=stream, verbose=verbose):
            try:
                raise ValueError("no\ngood")
            except ValueError:
                OURS.exception("It failed.")
        assert ("Traceback" in stream.getvalue()) is verbose
        if not verbose:
            assert stream.getvalue().endswith("error: It failed. (ValueError: no\ufffdgood)\n")


def test_others_are_heard_from_warnings_on_libp2p_not_at_all_and_with_verbose_both_from_info_on() -> None:
    for verbose, shown in ((False, ["warning"]), (True, ["info", "warning"])):
        stream = io.StringIO()
        with logging_to(stream=stream, json_logs=True, verbose=verbose):
            for name in ("libp2p.host", "aiohttp.server"):
                logging.getLogger(name).debug("d")
                logging.getLogger(name).info("i")
                logging.getLogger(name).warning("w")
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        assert [line["level"] for line in lines if line["logger"] == "libp2p.host"] == (
            shown if verbose else []
        )
        assert [line["level"] for line in lines if line["logger"] == "aiohttp.server"] == shown


def test_json_lines_are_one_object_each_whatever_is_in_the_message() -> None:
    stream = io.StringIO()
    with logging_to(stream=stream, json_logs=True):
        OURS.info("two\nlines and \x1b[31m %s", "ünïcödé")
        try:
            raise ValueError("no good")
        except ValueError:
            OURS.exception("failed")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first["message"] == "two\nlines and \x1b[31m ünïcödé"
    assert set(first) == {"time", "level", "logger", "message"}
    assert "ValueError: no good" in second["exception"]


def test_a_peers_words_can_neither_forge_a_line_nor_steer_the_terminal(tmp_path: Path) -> None:
    for stream in (io.StringIO(), Terminal()):
        with logging_to(stream=stream, file=tmp_path / "log"):
            OURS.info("Peer %s joined.", "x\n12:00:00  ERROR it burns\x1b[2J\x9b2J\u202egnp")
        written = (tmp_path / "log").read_text()
        for text in (stream.getvalue(), written):
            plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
            assert not set("\x1b\x9b\u202e") & set(plain)
        assert stream.getvalue().count("\n") == 1
    assert written.count("\n") == 2


def test_line_breaks_in_a_format_are_ours_and_stay() -> None:
    stream = io.StringIO()
    with logging_to(stream=stream):
        OURS.info(
            "next machine:\n\n    libmesh-node --join %s (%d, %.1f, %s)\n",
            "TOK\nEN",
            3,
            1.25,
            ValueError("a\nb"),
        )
        OURS.info("100 % done")
        OURS.info("%(name)s", {"name": "x"})
    assert "  next machine:\n\n    libmesh-node --join TOK\ufffdEN (3, 1.2, a\ufffdb)\n" in stream.getvalue()
    assert "  100 % done\n" in stream.getvalue()
    assert stream.getvalue().endswith("  x\n")


def test_a_terminal_gets_whole_lines_however_long() -> None:
    stream = Terminal()
    token = "x" * 500
    with logging_to(stream=stream):
        OURS.info("Invite: %s [bold]not markup[/bold] :smile:", token)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert f"Invite: {token} [bold]not markup[/bold] :smile:\n" in plain


def test_the_file_has_everything_but_what_is_private(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "node.log"
    stream = io.StringIO()
    with logging_to(stream=stream, file=file):
        OURS.info("Invite: %s", "SECRET", extra={"private": True})
        OURS.info("Serving demo")
        try:
            raise ValueError("no good")
        except ValueError:
            OURS.exception("It failed.")
    written = file.read_text()
    assert "SECRET" in stream.getvalue()
    assert "SECRET" not in written
    assert "libmesh_node.node: Serving demo" in written
    assert "Traceback" in written


def test_the_file_is_private_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LOG_FILE_BYTES", 1000)
    file = tmp_path / "node.log"
    before = os.umask(0)
    try:
        with logging_to(stream=io.StringIO(), file=file):
            for number in range(500):
                OURS.info("line %d", number)
    finally:
        os.umask(before)
    files = sorted(tmp_path.iterdir())
    assert len(files) == logs.LOG_FILES_KEPT + 1
    assert sum(each.stat().st_size for each in files) <= 1000 * len(files)
    assert {stat.S_IMODE(each.stat().st_mode) for each in files} == {0o600}
    assert file.read_text().splitlines()[-1].endswith("line 499")


class _Full(io.StringIO):
    """A file on a full disk."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_once_until_there_is_room_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream, file = io.StringIO(), tmp_path / "node.log"
    with logging_to(stream=stream, file=file):
        handler: Any = logging.getLogger().handlers[-1]
        for _ in range(2):
            kept, handler.stream = handler.stream, _Full()
            for number in range(50):
                OURS.info("line %d", number)
            handler.stream = kept
            OURS.info("room again")
        handler.stream.close()
        handler.stream = _Full()
        OURS.info("the last one")
    said = stream.getvalue()
    assert said.count(f"warning: cannot write {file}: No space left on device") == 3
    assert said.count("line ") == 100
    assert file.read_text().count("room again") == 2
    assert capsys.readouterr().err == ""


def test_logging_is_afterwards_as_it_was_before() -> None:
    names = ("", "libmesh", "libmesh_node", "libp2p")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    with logging_to(stream=io.StringIO(), verbose=True):
        pass
    assert [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers] == before


def test_a_log_file_that_cannot_be_opened_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    before = list(logging.getLogger().handlers)
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match="file"),
        logging_to(stream=io.StringIO(), file=tmp_path / "file" / "node.log"),
    ):
        pass
    assert logging.getLogger().handlers == before


def test_asyncio_does_not_flood_the_log_with_one_complaint() -> None:
    stream = io.StringIO()
    asyncios = logging.getLogger("asyncio")
    with logging_to(stream=stream):
        for number in range(1000):
            asyncios.error("socket.accept() out of system resource\nsocket: %d", number)
        asyncios.error("another")
    assert stream.getvalue().count("out of system resource") == 1
    assert "another" in stream.getvalue()
    assert not asyncios.filters
