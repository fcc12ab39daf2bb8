from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from libmesh_node.llama import probe
from libmesh_node.llama.engine import Engine, EngineMissing, cache_root, find_engine, installed_folder
from libmesh_node.llama.probe import ProbeStore, list_devices, rpc_hello

pytestmark = pytest.mark.llama


@pytest.fixture(autouse=True)
def _empty_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What happens to be installed on this machine must not decide a test."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@pytest.fixture
def real(engine: Engine, tmp_path: Path) -> Path:
    """A folder with the real programs, named as a build from source names them."""
    folder = tmp_path / "build" / "bin"
    folder.mkdir(parents=True)
    (folder / "llama-server").symlink_to(engine.require_llama_server().path)
    (folder / "ggml-rpc-server").symlink_to(engine.require_rpc_server().path)
    return folder


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)
    return path


def test_programs_are_found_and_told_apart(real: Path, tmp_path: Path) -> None:
    engine = find_engine(real, tmp_path)
    server, rpc = engine.require_llama_server(), engine.require_rpc_server()
    assert engine.complete
    assert (engine.broken, engine.notes) == ((), ())
    assert (server.path, rpc.path) == (real / "llama-server", real / "ggml-rpc-server")
    assert (server.origin, rpc.origin) == ("--bin-dir", "--bin-dir")
    assert server.version
    assert rpc.rpc_protocol is not None
    assert server.rpc_protocol == rpc.rpc_protocol
    assert {"--model", "-m", "--alias", "--rpc", "--no-webui"} <= server.flags
    assert {"--port", "-H", "-c"} <= rpc.flags


def test_order_is_bin_dir_then_path_then_cache(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = installed_folder(tmp_path / "cache")
    cached.parent.mkdir(parents=True)
    cached.symlink_to(real)
    on_path = tmp_path / "on-path"
    on_path.symlink_to(real)
    cache = tmp_path / "cache"
    assert find_engine(None, cache).require_rpc_server().origin == "cache"
    monkeypatch.setenv("PATH", f":{tmp_path}/nowhere:{on_path}")
    assert find_engine(None, cache).require_rpc_server().path == on_path / "ggml-rpc-server"
    assert find_engine(real, cache).require_rpc_server().origin == "--bin-dir"


def test_what_bin_dir_lacks_is_taken_from_elsewhere_and_said(real: Path, tmp_path: Path) -> None:
    installed_folder(tmp_path).parent.mkdir(parents=True)
    installed_folder(tmp_path).symlink_to(real)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "llama-server").symlink_to(real / "llama-server")
    engine = find_engine(alone, tmp_path)
    assert engine.require_llama_server().origin == "--bin-dir"
    assert engine.require_rpc_server().origin == "cache"
    assert len(engine.notes) == 1
    assert "rpc-server comes from" in engine.notes[0]


def test_nothing_found_says_what_to_do(tmp_path: Path) -> None:
    engine = find_engine(None, tmp_path)
    assert not engine.complete
    for require in (engine.require_llama_server, engine.require_rpc_server):
        with pytest.raises(EngineMissing, match="libmesh-node engine install"):
            require()


BROKEN = {
    "fails": ("import sys; print('no such device'); sys.exit(3)", 'status 3: "no such device"'),
    "dies": ("import os; os.abort()", "SIGABRT without a word"),
    "is something else": ("print('hello')", "does not tell its version"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_server_is_named_with_the_reason_and_passed_over(
    case: str, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, reason = BROKEN[case]
    broken = script(tmp_path / "bad" / "llama-server", text)
    monkeypatch.setenv("PATH", str(real))
    engine = find_engine(tmp_path / "bad", tmp_path)
    assert engine.require_llama_server().path == real / "llama-server"
    assert [item.path for item in engine.broken] == [broken]
    assert reason in engine.broken[0].reason


def test_server_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_RUN_LIMIT", 0.1)
    script(tmp_path / "bad" / "llama-server", "import time; time.sleep(60)")
    assert "took longer than" in find_engine(tmp_path / "bad", tmp_path).broken[0].reason


def test_build_for_another_processor_is_named(engine: Engine, tmp_path: Path) -> None:
    cut = tmp_path / "bad" / "rpc-server"
    cut.parent.mkdir()
    cut.write_bytes(b"\x7fELF" + bytes(1000))
    cut.chmod(0o755)
    found = find_engine(cut.parent, tmp_path)
    assert found.rpc_server is None
    assert "cannot be run: Exec format error" in found.broken[0].reason
    with pytest.raises(EngineMissing, match="does not work: it cannot be run"):
        found.require_rpc_server()


def test_rpc_server_that_ends_with_status_zero_is_broken_all_the_same(tmp_path: Path) -> None:
    script(tmp_path / "bad" / "rpc-server", "print('address in use')")
    assert 'status 0: "address in use"' in find_engine(tmp_path / "bad", tmp_path).broken[0].reason


def test_pair_that_disagrees_is_noted(real: Path, tmp_path: Path) -> None:
    newer = script(
        tmp_path / "mixed" / "rpc-server",
        "import socket, struct, sys\n"
        "if '--help' in sys.argv: sys.exit()\n"
        "listener = socket.create_server(('127.0.0.1', int(sys.argv[sys.argv.index('-p') + 1])))\n"
        "while True:\n"
        "    connection, _ = listener.accept()\n"
        "    if connection.recv(9): connection.sendall(struct.pack('<Q4B24x', 28, 99, 0, 0, 0))\n",
    )
    (newer.parent / "llama-server").symlink_to(real / "llama-server")
    engine = find_engine(newer.parent, tmp_path)
    assert engine.require_rpc_server().rpc_protocol == "99.0.0"
    assert engine.require_llama_server().rpc_protocol is None
    assert "do not work together" in engine.notes[0]


def test_known_binary_is_not_run_again_until_it_changes(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    server = script(
        tmp_path / "bin" / "llama-server",
        f"open({str(runs)!r}, 'a').write('x')\nprint('version: 1 (abc)')",
    )
    for _ in range(3):
        assert find_engine(server.parent, tmp_path).require_llama_server().version == "1 (abc)"
    assert runs.read_text() == "xx"  # --version and --help
    server.write_text(server.read_text() + "# changed")
    find_engine(server.parent, tmp_path)
    assert runs.read_text() == "xxxx"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"x": 3}', b"{" * 100_000])
def test_garbage_in_the_probe_file_is_ignored(content: bytes, real: Path, tmp_path: Path) -> None:
    store = tmp_path / "engine" / "probes.json"
    store.parent.mkdir()
    store.write_bytes(content)
    assert find_engine(real, tmp_path).complete


def test_full_probe_file_forgets_the_oldest(tmp_path: Path) -> None:
    store = ProbeStore(tmp_path / "probes.json")
    for number in range(100):
        (tmp_path / f"{number}").touch()
        store.get(tmp_path / f"{number}", lambda path: {"version": path.name})
    store.save()
    again = ProbeStore(tmp_path / "probes.json")
    assert again.get(tmp_path / "99", lambda path: {})["version"] == "99"
    assert again.get(tmp_path / "0", lambda path: {"version": "forgotten"})["version"] == "forgotten"


@contextmanager
def answering(*answers: bytes | None) -> Iterator[int]:
    """A server that answers one connection after the other; `None` hangs up, and so does the end of the list."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection, suppress(ConnectionError):
                    connection.recv(9)
                    if answer is not None:
                        connection.sendall(answer)
                        while connection.recv(100):
                            pass

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def test_old_protocol_without_capabilities_is_recognised() -> None:
    with answering(None, struct.pack("<Q3B", 3, 2, 0, 0)) as port:
        assert rpc_hello("127.0.0.1", port, 5) == "2.0.0"


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", struct.pack("<Q", 1 << 62), struct.pack("<Q", 0)]
)
def test_garbage_is_no_hello(answer: bytes) -> None:
    with answering(answer) as port, pytest.raises(OSError, match="no HELLO"):
        rpc_hello("127.0.0.1", port, 5)


def test_silence_is_no_hello() -> None:
    with answering(b"") as port, pytest.raises(TimeoutError):
        rpc_hello("127.0.0.1", port, 0.05)


def test_devices_are_listed_by_the_program_itself(engine: Engine) -> None:
    devices = list_devices(engine.require_llama_server().path)
    assert all(": " in device for device in devices)


@pytest.mark.parametrize(
    ("configured", "expected"),
    [("/x", "/x/libmesh"), ("relative", "HOME/.cache/libmesh"), ("", "HOME/.cache/libmesh")],
)
@pytest.mark.skipif(sys.platform == "darwin", reason="another place on macOS")
def test_cache_is_where_the_user_wants_it(
    configured: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", configured)
    assert str(cache_root()) == expected.replace("HOME", str(tmp_path))


def test_probing_leaves_no_process_behind(real: Path, tmp_path: Path) -> None:
    find_engine(real, tmp_path)
    listing = subprocess.run(["/bin/ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(real) not in listing
