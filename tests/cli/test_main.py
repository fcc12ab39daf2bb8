from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from libmesh_node import main as main_module
from libmesh_node.commands import run as run_module
from libmesh_node.errors import NodeError
from libmesh_node.main import COMMANDS, command_parser, main, node_parser

BARE = [sys.executable, "-m", "libmesh_node"]


def usage_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the program says on stderr when it refuses the command line; it must exit with 2."""
    try:
        code: object = main(argv)
    except SystemExit as left:
        code = left.code
    assert code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--clinet"], "did you mean --client"),
        (["--modle", "x"], "did you mean --model?\n"),
        (["--mod", "x"], "did you mean --model?"),
        (["stauts"], "did you mean status?"),
        (["rotate_key"], "did you mean rotate-key?"),
        (["frobnicate"], "there is no command 'frobnicate'\n"),
        (["status", "--jsn"], "libmesh-node status: unknown argument '--jsn'; did you mean --json?"),
        (["status", "extra"], "unknown argument 'extra'"),
        (["tunnel"], "ACTION"),
        (["tunnel", "connect"], "PEER, NAME"),
        (["tunnel", "expose", "a", "b:1", "--scop", "x"], "did you mean --scope?"),
        (["tunnel", "expose", "a", "5432"], "HOST:PORT"),
        (["invite", "--ttl", "7"], "write 30s, 15m, 12h, 7d or 52w"),
        (["invite", "--scope", "root"], "client"),
        (["--port", "x"], "is no port"),
        (["--port"], "expected one argument"),
        (["--client", "status"], "--client in front of 'status' does nothing"),
        (["--port", "9999", "status"], "--port in front of 'status' does nothing"),
        (["--client", "--model", "demo"], "--client and --model exclude each other"),
        (["--client", "--split"], "--client and --split exclude each other"),
        (["--client", "--min-peers", "1"], "--client and --min-peers exclude each other"),
        (["--client", "--tensor-split", "1,1"], "--client and --tensor-split exclude each other"),
        (["--client", "--draft", "x.gguf"], "--client and --draft exclude each other"),
        (["--client", "--max-vram", "4"], "--client and --max-vram exclude each other"),
        (["--client", "--idle-unload", "60"], "--client and --idle-unload exclude each other"),
        (["--join", "@/nowhere/at/all"], "cannot read the invite file"),
        (["--console", "0", "--console"], "expected one argument"),
        ([""], "there is no command ''"),
    ],
)
def test_a_command_line_that_makes_no_sense_says_what_to_do_and_exits_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    printed = usage_error(capsys, *argv)
    assert says in printed
    assert "--help'" in printed.splitlines()[-1]


def test_flags_of_the_same_name_mean_different_things_to_a_node_and_to_a_command() -> None:
    assert node_parser().parse_args(["--port", "1"]).port == 1
    args = command_parser("tunnel").parse_args(["tunnel", "connect", "peer", "name", "--port", "2"])
    assert args.local_port == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_ends_with_0(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert f"usage: libmesh-node {name}" in capsys.readouterr().out


def test_help_names_every_command_and_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    flags = (
        "model join client port console bind-port bind-ws listen-all bin-dir max-vram device data-dir ephemeral announce-addr "
        "relay relay-bandwidth invite-file json-logs verbose version split min-peers tensor-split max-rtt draft no-draft draft-max"
    )
    for flag in flags.split():
        assert f"--{flag}" in shown
    for command in COMMANDS:
        assert f"\n  {command} " in shown


def test_a_node_flag_reaches_run_node(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    async def run_node(options: object) -> int:
        seen.append(options)
        return 7

    fake = types.ModuleType("libmesh_node.starting")
    fake.run_node = run_node  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "libmesh_node.starting", fake)
    assert main(["--client", "--port", "0", "--ephemeral"]) == 7
    assert seen[0].client  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (NodeError("It is\n  broken."), 1, "libmesh-node: It is broken.\n"),
        (
            FileNotFoundError(2, "No such file or directory", "/x"),
            1,
            "libmesh-node: No such file or directory: /x\n",
        ),
        (OSError("odd"), 1, "libmesh-node: odd\n"),
        (OSError(30, "Read-only file system", "/cache"), 1, "libmesh-node: Read-only file system: /cache\n"),
        (ZeroDivisionError("by zero"), 1, "Internal error (ZeroDivisionError: by zero)"),
        (KeyboardInterrupt(), 130, ""),
        (BaseExceptionGroup("", [BaseExceptionGroup("", [KeyboardInterrupt()])]), 130, ""),
        (ExceptionGroup("two", [ValueError("a"), ValueError("b")]), 1, "Internal error (ExceptionGroup: two"),
    ],
)
def test_whatever_goes_wrong_is_one_line_and_an_exit_code(
    error: BaseException,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(run_module, "run", fail)
    assert main([]) == code
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == (1 if says else 0)
    assert printed.out == ""


def test_verbose_shows_where_an_error_happened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(run_module, "run", fail)
    assert main(["--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_with_json_logs_the_last_word_is_json_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise NodeError("Port 9337 is in use.")

    monkeypatch.setattr(run_module, "run", fail)
    assert main(["--json-logs"]) == 1
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["message"]) == ("error", "Port 9337 is in use.")


def test_an_error_of_libmesh_carries_its_own_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from libmesh import MeshError

    def fail(args: object) -> int:
        raise MeshError("The invite has expired. Ask for another.")

    monkeypatch.setattr(run_module, "run", fail)
    assert main([]) == 1
    assert capsys.readouterr().err == "libmesh-node: The invite has expired. Ask for another.\n"


def test_a_reader_that_leaves_early_is_no_error_worth_a_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*BARE, "rotate-key", "--help"], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert b"Traceback" not in done.stderr


def test_the_module_and_the_script_are_the_same_program(tmp_path: Path) -> None:
    done = subprocess.run([*BARE, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("libmesh-node 0.")
    done = subprocess.run(
        [*BARE, "status", "--data-dir", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1


def test_help_and_version_load_nothing_heavy() -> None:
    heavy = (
        "trio",
        "libp2p",
        "aiohttp",
        "rich",
        "numpy",
        "gguf",
        "google.protobuf",
        "asyncio",
        "libmesh.mesh",
    )
    code = (
        "import sys; from libmesh_node.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_near_names_are_only_given_when_they_are_near() -> None:
    assert main_module.suggestion("xyzzy", ["status", "stop"]) == ""
    assert main_module.suggestion("stats", ["status", "stop"]) == "; did you mean status?"
