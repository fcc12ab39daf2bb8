from __future__ import annotations

import errno
import os
import pwd
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from libmesh_node import datadir
from libmesh_node.datadir import DataDir, NodeInfo, ephemeral_data_dir, held_data_dir, write_private
from libmesh_node.errors import DataDirBusy, NodeError
from libmesh_node.main import main

INFO = NodeInfo(pid=os.getpid(), api_port=9337, console_port=3131, version="0.1.0", started_unix=1.5)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datadir, "_LOCK_PATIENCE", 0.0)


def test_the_default_follows_xdg_and_ignores_a_relative_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert datadir.default_data_dir() == Path("/data/libmesh")
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_DATA_HOME", unusable)
        assert datadir.default_data_dir() == Path("/home/me/.local/share/libmesh")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert datadir.default_data_dir() == Path("/home/me/Library/Application Support/libmesh")


def test_an_account_without_a_home_is_no_reason_not_to_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(_: int) -> object:
        raise KeyError("as for a service's account that is made when it starts")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(SystemExit) as ending:
        main(["relay", "--help"])
    assert ending.value.code == 0
    assert "/.local/share/libmesh/relay" in capsys.readouterr().out


def test_folder_and_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with held_data_dir(tmp_path / "d") as folder:
            folder.write_secret(folder.identity_key, b"secret")
            folder.write_info(INFO)
            assert mode(folder.path) == 0o700
            assert {mode(file) for file in folder.path.iterdir()} == {0o600}
    finally:
        os.umask(before)


def test_a_secret_that_others_could_read_is_made_private_when_it_is_read(tmp_path: Path) -> None:
    folder = DataDir(tmp_path)
    folder.identity_key.write_bytes(b"secret")
    folder.identity_key.chmod(0o644)
    assert folder.read_secret(folder.identity_key) == b"secret"
    assert mode(folder.identity_key) == 0o600


def test_a_missing_secret_is_none_and_an_unreadable_or_huge_one_an_error(tmp_path: Path) -> None:
    folder = DataDir(tmp_path)
    assert folder.read_secret(folder.mesh_key) is None
    folder.mesh_key.mkdir()
    with pytest.raises(NodeError, match=r"mesh\.key"):
        folder.read_secret(folder.mesh_key)
    folder.identity_key.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(NodeError, match="larger than 1 MiB"):
        folder.read_secret(folder.identity_key)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    write_private(file, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NodeError, match="No space left"):
        DataDir(tmp_path).write_secret(file, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]
    assert file.read_bytes() == b"old"


def test_a_second_node_is_refused_and_told_which_process_holds_the_folder(tmp_path: Path) -> None:
    with held_data_dir(tmp_path) as folder:
        with pytest.raises(DataDirBusy, match="--data-dir") as refused, held_data_dir(tmp_path):
            pass
        assert refused.value.pid == os.getpid()
        assert folder.in_use()
        assert folder.holder() == os.getpid()
    assert not folder.in_use()
    assert folder.holder() is None
    with held_data_dir(tmp_path):
        pass


def test_a_waiting_start_gets_the_lock_that_a_look_held_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datadir, "_LOCK_PATIENCE", 60.0)
    holder = held_data_dir(tmp_path)
    holder.__enter__()
    monkeypatch.setattr(time, "sleep", lambda seconds: holder.__exit__(None, None, None))
    with held_data_dir(tmp_path) as folder:
        assert folder.in_use()


def test_the_lock_of_a_killed_node_is_free_and_its_node_json_not_believed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from libmesh_node.datadir import *\n"
        "with held_data_dir(Path(sys.argv[1])) as d:\n"
        "    d.write_info(NodeInfo(pid=1, api_port=2, console_port=3, version='x', started_unix=0))\n"
        "    print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as node:
        assert node.stdout is not None
        assert node.stdout.readline() == b"held\n"
        folder = DataDir(tmp_path)
        assert folder.holder() == node.pid
        assert folder.read_info() == NodeInfo(pid=1, api_port=2, console_port=3, version="x", started_unix=0)
        node.send_signal(signal.SIGKILL)
    assert folder.node_json.exists()
    assert folder.read_info() is None
    with held_data_dir(tmp_path):
        pass


def test_node_json_says_where_the_running_node_listens_and_goes_with_it(tmp_path: Path) -> None:
    with held_data_dir(tmp_path) as folder:
        assert folder.read_info() is None
        folder.write_info(INFO)
        assert folder.read_info() == INFO
    assert folder.read_info() is None
    assert not folder.node_json.exists()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b"null", b'{"pid": 1}', b"3"])
def test_a_broken_node_json_is_none(tmp_path: Path, content: bytes) -> None:
    with held_data_dir(tmp_path) as folder:
        folder.node_json.write_bytes(content)
        assert folder.read_info() is None


def test_ports_that_are_no_numbers_are_not_believed(tmp_path: Path) -> None:
    with held_data_dir(tmp_path) as folder:
        folder.write_info(INFO)
        folder.node_json.write_bytes(folder.node_json.read_bytes().replace(b"3131", b'"3131"'))
        assert folder.read_info() is None


def test_an_ephemeral_folder_is_fresh_and_leaves_nothing_behind() -> None:
    with ephemeral_data_dir() as first, ephemeral_data_dir() as second:
        assert first.path != second.path
        assert mode(first.path) == 0o700
        first.write_secret(first.identity_key, b"secret")
        assert first.in_use()
    assert not first.path.exists()
    assert not second.path.exists()


def test_an_unusable_folder_is_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NodeError, match="--data-dir"), held_data_dir(tmp_path / "file" / "d"):
        pass
    with (
        pytest.raises(NodeError, match=r"file: it is a file\. Choose another"),
        held_data_dir(tmp_path / "file"),
    ):
        pass


def test_a_folder_on_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(NodeError, match=f"{tmp_path}: No space left"), held_data_dir(tmp_path):
        pass
    monkeypatch.undo()
    with held_data_dir(tmp_path):  # the lock was given back
        pass


def test_a_models_log_stays_in_the_log_folder_whatever_its_name(tmp_path: Path) -> None:
    folder = DataDir(tmp_path)
    assert folder.llama_log("demo") == tmp_path / "logs" / "llama-demo.log"
    for name in ("../../etc/passwd", "a/b", "x" * 500, "\0", ""):
        assert folder.llama_log(name).parent == folder.logs
        assert len(folder.llama_log(name).name) < 200
