"""Eight peers in processes of their own; six of them are killed and paused at random, and all are cancelled all the time.

    python -m tests.soak.run SECONDS [SEED]

The first two are never touched: what they hold at the end, when all is quiet again, must be what they held at the start.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import trio

PEERS = 8
SURVIVORS = (0, 1)
PATIENCE = 120.0  # seconds that anything may take on a machine that is busy with something else
SLACK_FILES, SLACK_TASKS = 4, 8  # a dial of a dead peer may be under way
LONG = 600.0  # seconds from which on the memory is judged, too: before, caches fill and heaps settle
GROWTH_KIB = 8 * 1024
ROOT = Path(__file__).resolve().parents[2]

Held = dict[str, int]


@dataclass
class Process:
    """A running peer."""

    handle: trio.Process
    reports: list[Held] = field(default_factory=list)
    token: str = ""
    names: Held = field(default_factory=dict)
    news: trio.Event = field(default_factory=trio.Event)

    async def listen(self) -> None:
        """Take in its reports until it ends."""
        assert self.handle.stdout is not None
        unread = b""
        async for data in self.handle.stdout:
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                said = json.loads(line)
                self.token = said.pop("token", self.token)
                self.names = said.pop("names", self.names)
                if said:
                    self.reports.append(said)
                self.news.set()
                self.news = trio.Event()

    async def tell(self, word: str) -> None:
        assert self.handle.stdin is not None
        await self.handle.stdin.send_all(word.encode() + b"\n")

    async def until(self, holds: Callable[[Held], bool], what: str) -> Held:
        """The first report from now on that fulfils a condition."""
        seen = len(self.reports)
        try:
            with trio.fail_after(PATIENCE):
                while True:
                    for report in self.reports[seen:]:
                        if holds(report):
                            return report
                    seen = len(self.reports)
                    await self.news.wait()
        except trio.TooSlowError:
            raise AssertionError(f"{what}: never; at last {self.reports[-1:]}") from None


@dataclass
class Soak:
    """The processes, and what happened to them."""

    seed: int
    nursery: trio.Nursery
    say: Callable[[str], None]
    peers: dict[int, Process] = field(default_factory=dict)
    killed: int = 0
    paused: int = 0

    def __post_init__(self) -> None:
        self.lots = random.Random(self.seed)
        self.began = trio.current_time()

    async def start(self, number: int, *token: str) -> Process:
        command = [sys.executable, "-m", "tests.soak.peer", str(number), str(self.seed), *token]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        run = partial(trio.run_process, command, cwd=ROOT, check=False, **pipes)
        peer = self.peers[number] = Process(await self.nursery.start(run))
        self.nursery.start_soon(peer.listen)
        return peer

    async def torment(self, number: int) -> None:
        """Kill or pause one peer now and then, and start it again."""
        token, lots = self.peers[SURVIVORS[0]].token, self.lots
        while True:
            peer = await self.start(number, token)
            await peer.tell("work")
            try:
                for _ in range(lots.randrange(1, 4)):
                    await trio.sleep(lots.uniform(1, 15))
                    self.check(number, peer)
                    if lots.random() < 0.3:
                        self.paused += 1
                        peer.handle.send_signal(signal.SIGSTOP)
                        await trio.sleep(lots.choice((0.1, 1, 3, 20)))
                        peer.handle.send_signal(signal.SIGCONT)
            finally:
                peer.handle.send_signal(signal.SIGKILL)
            self.killed += 1
            await peer.handle.wait()

    def check(self, number: int, peer: Process) -> None:
        assert peer.handle.returncode is None, f"peer {number} ended with {peer.handle.returncode}"

    def total(self, word: str) -> int:
        return sum(self.peers[n].reports[-1].get(word, 0) for n in SURVIVORS)


async def soak(seconds: float, seed: int, say: Callable[[str], None] = lambda _: None) -> None:
    """Raises `AssertionError` for a leak, a corrupted byte, or a peer that ended by itself."""
    async with processes(seed, say) as state:
        first = await state.start(0)
        await first.until(lambda held: True, "the first peer starts")
        second = await state.start(1, first.token)
        before = {}
        for number, peer in enumerate((first, second)):
            before[number] = await peer.until(
                lambda held: held["alive"] == 1, "the survivors find each other"
            )
            await peer.tell("tasks")
            before[number] = await peer.until(lambda held: True, "and settle")
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                for number in range(len(SURVIVORS), PEERS):
                    nursery.start_soon(state.torment, number)
                for number in SURVIVORS:
                    await state.peers[number].tell("work")
                nursery.start_soon(_watch, state)
        for number in SURVIVORS:
            state.check(number, state.peers[number])
            await state.peers[number].tell("quiet")
        assert state.total("whole") > 10
        assert state.total("cancelled") > 10
        assert state.killed > 0
        for number in SURVIVORS:
            more = await _quiet_again(state.peers[number], before[number])
            say(f"peer {number} has more tasks: {more}")
            if seconds >= LONG:
                _judge_memory([report["resident"] for report in state.peers[number].reports])
        say(_line(state))


async def _quiet_again(peer: Process, before: Held) -> dict[str, int]:
    """Wait until the peer holds no more than before; the tasks that it has more of."""
    names = peer.names
    try:
        await peer.until(partial(_as_before, before), f"as at the start, {before}")
        failed = ""
    except AssertionError as exc:
        failed = str(exc)
    await peer.tell("tasks")
    await peer.until(lambda held: True, "it still answers")
    more = {name: count - names.get(name, 0) for name, count in peer.names.items()}
    more = {name: count for name, count in more.items() if count}
    assert not failed, f"{failed}; more tasks: {more}"
    return more


def _as_before(before: Held, now: Held) -> bool:
    return (
        now["files"] <= before["files"] + SLACK_FILES
        and now["tasks"] <= before["tasks"] + SLACK_TASKS
        and now["threads"] <= before["threads"] + 2
    )


def _judge_memory(resident: list[int]) -> None:
    """The last sixth of the time against the second quarter: what grows without end has grown by then."""
    count = len(resident)
    early, late = median(resident[count // 4 : count // 2]), median(resident[-count // 6 :])
    assert late <= early + GROWTH_KIB, f"resident memory went from {early} to {late} KiB"


async def _watch(state: Soak) -> None:
    while True:
        for number in SURVIVORS:
            state.check(number, state.peers[number])
        state.say(_line(state))
        await trio.sleep(30)


def _line(state: Soak) -> str:
    held = [state.peers[n].reports[-1] for n in SURVIVORS]
    words = ("resident", "tasks", "files", "threads", "objects", "alive")
    return (
        f"{trio.current_time() - state.began:.0f} s: {state.killed} killed, {state.paused} paused; survivors: "
        + ", ".join(f"{state.total(word)} {word}" for word in ("whole", "cut", "cancelled"))
        + "; "
        + " | ".join(" ".join(f"{word} {each[word]}" for word in words) for each in held)
    )


@asynccontextmanager
async def processes(seed: int, say: Callable[[str], None]) -> AsyncIterator[Soak]:
    """Processes that all end with the context."""
    async with trio.open_nursery() as nursery:
        state = Soak(seed, nursery, say)
        try:
            yield state
        finally:
            for peer in state.peers.values():
                if peer.handle.returncode is None:
                    peer.handle.send_signal(signal.SIGKILL)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(
        soak,
        float(sys.argv[1]),
        int(sys.argv[2]) if len(sys.argv) > 2 else 1,
        lambda text: print(text, flush=True),  # noqa: T201
    )
