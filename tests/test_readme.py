"""What the README says can be done: its commands parse, its targets exist, its program runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from libmesh_node.main import COMMANDS, command_parser, node_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_every_command_line_parses(tmp_path: Path) -> None:
    lines = [line.removeprefix("$ ") for line in README.splitlines() if line.startswith("$ libmesh-node")]
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line)[1:]
        args = node_parser().parse_args(words)
        if args.command:
            command_parser(args.command[0]).parse_args(args.command)


def test_every_command_and_every_flag_that_is_named_exists() -> None:
    for name in re.findall(r"`libmesh-node ([a-z][a-z-]*)", README):
        assert name in COMMANDS
    flags = node_parser().format_help() + "".join(_help_of(name) for name in COMMANDS)
    for flag in set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]+)", README)):
        assert flag in flags, f"{flag} is in the README only"


def test_every_flag_of_a_node_is_named() -> None:
    for flag in set(
        re.findall(r"--[a-z][a-z-]+", node_parser().format_usage() + node_parser().format_help())
    ):
        assert flag in README or flag in ("--help", "--version", "--scope", "--ttl"), (
            f"{flag} is not in the README"
        )


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^    )make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"there is no make {target}"


def test_the_example_of_the_library_runs() -> None:
    example = re.search(r"<!-- runs in the tests -->\n```python\n(.*?)```", README, re.DOTALL)
    assert example
    done = subprocess.run(
        [sys.executable, "-c", example[1]], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+ leads to the other one's port 8000\n", done.stdout)


def test_every_error_that_is_explained_is_really_said() -> None:
    source = "".join(path.read_text() for path in (ROOT / "cli").rglob("*.py"))
    for said in re.findall(
        r"^\| `([^`…]+?) ?…?`[^|]*\|", README.partition("When something is wrong")[2], re.MULTILINE
    ):
        fixed = re.split(r" \d+ | the data folder", said)[0]
        assert fixed.split(" 9337")[0] in source, f"nothing says {said!r}"


def _help_of(name: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "libmesh_node", name, "--help"], capture_output=True, text=True, check=True
    )
    nested = re.findall(r"^    ([a-z]+)  ", done.stdout, re.MULTILINE)
    more = (
        subprocess.run(
            [sys.executable, "-m", "libmesh_node", name, word, "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        for word in nested
        if name in ("tunnel", "engine")
    )
    return done.stdout + "".join(each.stdout for each in more)
