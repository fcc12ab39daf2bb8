from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from libmesh_node.llama.process import GuardedProcess, Lines, ProgramNotStarted, open_guarded

from tests.llama.processes import is_running, parent_of, wait_until_gone

SLEEP = ["/bin/sleep", "300"]

NODE_LIKE_PARENT = textwrap.dedent("""
    import os, sys, trio
    from libmesh_node.llama.process import open_guarded

    async def main():
        async with open_guarded(sys.argv[1:], environment=os.environ) as process:
            print(process.pid, flush=True)
            await trio.sleep_forever()

    trio.run(main)
""")


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", NODE_LIKE_PARENT, *SLEEP]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def started_by(parent: subprocess.Popen[str]) -> int:
    assert parent.stdout is not None
    return int(parent.stdout.readline())


def test_program_and_guard_die_when_the_node_is_killed(parent: subprocess.Popen[str]) -> None:
    pid = started_by(parent)
    guard = parent_of(pid)
    parent.kill()
    wait_until_gone(pid)
    wait_until_gone(guard)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_program_dies_when_the_guard_is_killed_and_the_node_is_told(parent: subprocess.Popen[str]) -> None:
    pid = started_by(parent)
    os.kill(parent_of(pid), signal.SIGKILL)
    wait_until_gone(pid)
    assert parent.poll() is None


@pytest.mark.parametrize(
    "start", ["sleep 300 &", "setsid sleep 300 &", "(setsid sh -c 'sleep 300 & wait' &)"]
)
@pytest.mark.parametrize("ending", ["node killed", "program killed", "program ends"])
def test_no_descendant_outlives_the_program(start: str, ending: str, tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    text = f"{start}\nwhile [ ! -e {stop} ]; do /bin/sleep 0.01; done"
    command = [sys.executable, "-c", NODE_LIKE_PARENT, "/bin/sh", "-c", text]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid = started_by(parent)
        sleeping = sleeper_below(parent_of(pid))
        match ending:
            case "node killed":
                parent.kill()
            case "program killed":
                os.kill(pid, signal.SIGKILL)
            case "program ends":
                stop.touch()
        wait_until_gone(sleeping)
        wait_until_gone(pid)
        parent.kill()


def sleeper_below(guard: int) -> int:
    """The process `sleep 300` among the descendants of `guard`, once it is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        parents = {int(path.name): path for path in Path("/proc").iterdir() if path.name.isdigit()}
        for pid, path in parents.items():
            try:
                if (path / "cmdline").read_bytes() != b"sleep\x00300\x00":
                    continue
                above = pid
                while above > 1:
                    above = parent_of(above)
                    if above == guard:
                        return pid
            except (FileNotFoundError, ProcessLookupError):
                continue
    raise AssertionError("nobody sleeps")


def test_ctrl_c_in_the_terminal_does_not_reach_the_program(parent: subprocess.Popen[str]) -> None:
    pid = started_by(parent)
    assert os.getsid(pid) != os.getsid(parent.pid)


async def test_leaving_the_block_kills_the_program() -> None:
    async with open_guarded(SLEEP, environment=os.environ) as process:
        assert is_running(process.pid)
    assert not is_running(process.pid)


async def test_cancelling_kills_the_program() -> None:
    kept: list[GuardedProcess] = []
    with trio.CancelScope() as scope:
        async with open_guarded(SLEEP, environment=os.environ) as process:
            kept.append(process)
            scope.cancel()
            await trio.sleep_forever()
    assert not is_running(kept[0].pid)


async def test_error_in_the_block_passes_through_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_guarded(SLEEP, environment=os.environ):
            raise ZeroDivisionError


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -SEGV $$", -signal.SIGSEGV)]
)
async def test_status_is_the_programs_own(script: str, status: int) -> None:
    async with open_guarded(["/bin/sh", "-c", script], environment=os.environ) as process:
        assert await process.wait() == status
        assert await process.wait() == status


async def test_wait_survives_cancellation_and_serves_several_tasks() -> None:
    seen: list[int] = []

    async with open_guarded(SLEEP, environment=os.environ) as process, trio.open_nursery() as nursery:

        async def wait() -> None:
            seen.append(await process.wait())

        with trio.move_on_after(0.01):
            await process.wait()
        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await process.send_signal(signal.SIGTERM)
    assert seen == [-signal.SIGTERM] * 2


async def test_output_ends_with_the_program() -> None:
    async with open_guarded(
        ["/bin/sh", "-c", "echo out; echo err >&2; printf rest"], environment={}
    ) as process:
        lines = Lines(process.output)
        assert [await lines.receive() for _ in range(4)] == ["out", "err", "rest", None]


async def test_long_lines_come_in_pieces_and_garbage_is_replaced() -> None:
    script = r"head -c 10000 /dev/zero | tr '\0' x; printf '\nend\377\r\n'"
    async with open_guarded(["/bin/sh", "-c", script], environment=os.environ) as process:
        lines = Lines(process.output)
        received = []
        while (line := await lines.receive()) is not None:
            received.append(line)
    assert [len(line) for line in received[:3]] == [4096, 4096, 1808]
    assert received[3:] == ["end\N{REPLACEMENT CHARACTER}"]


async def test_program_gets_no_input_and_ignores_sigpipe() -> None:
    script = "import signal, sys; print(repr(sys.stdin.read()))"
    async with open_guarded([sys.executable, "-c", script], environment=os.environ) as process:
        assert await Lines(process.output).receive() == "''"
    show = ["/bin/sh", "-c", "grep SigIgn /proc/self/status"]
    async with open_guarded(show, environment=os.environ) as process:
        mask = int((await Lines(process.output).receive() or "").split()[1], 16)
    assert mask >> (signal.SIGPIPE - 1) & 1


@pytest.mark.parametrize(
    ("program", "reason"),
    [("/nowhere/at/all", "No such file"), ("/etc", "Permission"), (__file__, "Permission")],
)
async def test_program_that_cannot_run_is_named_with_the_reason(program: str, reason: str) -> None:
    with pytest.raises(ProgramNotStarted, match=reason) as caught:
        async with open_guarded([program], environment=os.environ):
            pass
    assert program in str(caught.value)


async def test_guard_that_cannot_start_is_no_riddle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("libmesh_node.llama.process._GUARD", tmp_path / "no-guard.py")
    with pytest.raises(ProgramNotStarted, match="its guard ended before it began"):
        async with open_guarded(SLEEP, environment=os.environ):
            pass
