"""Keeps one llama-server running.

What a life looks like, in the words of `snapshot.Process.status`:

    starting ─▶ loading ─▶ ready ─▶ restarting ─▶ starting …
        └──────────┴─────────┴──▶ failed          (after a crash loop; `RestartPolicy` decides)
    any ─▶ stopping                               (the node cancels `run`)

*starting*: the process runs and does not answer. *loading*: it answers that it is loading (503). *ready*: it answers
200, and serves the right model under the right name. *restarting*: it ended, and waits for its next start.

Once ready, health is not asked again. What ends a server besides its own end is a stall (`stall.py`): health says "ok"
then, as before. Of those that load, only one whose HTTP is silent, too, is ended: to answer our own health checks takes
processor time, which is a sign of life, even if the load stands still. One whose draft model makes it slower
(`drafting.py`) is started again without, when it has nothing to do.
"""

from __future__ import annotations

import json
import logging
import math
import re
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import trio

from libmesh_node.llama.drafting import DraftTrial, measure_costs, read_guesses
from libmesh_node.llama.engine import Binary
from libmesh_node.llama.load import (
    IDLE,
    Abilities,
    FirstToken,
    Smoothed,
    read_abilities,
    read_load,
    read_work,
)
from libmesh_node.llama.logfile import BoundedLog
from libmesh_node.llama.process import GuardedProcess, ProgramNotStarted, open_guarded
from libmesh_node.llama.restart import Effect, Ended, GiveUp, Launch, Ready, RestartPolicy, Wake
from libmesh_node.llama.server import ServerPlan, child_environment, server_args
from libmesh_node.llama.stall import Progress, cpu_seconds
from libmesh_node.snapshot import Process

logger = logging.getLogger(__name__)

FIRST_POLL = 0.02
SLOWEST_POLL = 0.5
LOAD_POLL = 2.0
"""Seconds between two looks at a server's load. What it tells is announced, so it is coarse, too."""

POLL_LIMIT = 2.0
"""Seconds one health check may take."""

PROPS_TRIES = 3
"""Times that a server is asked what it takes before it counts as ready; after that it is asked now and then."""

STALLED_AFTER = 60.0
"""Seconds without any sign of life after which a server that computes on this machine only is ended."""

DRAIN_LIMIT = 120.0
"""Seconds that a server which is to be started again, or to be unloaded, may take to finish what it is answering."""

TERM_AGAIN_AFTER = 0.8
KILL_AFTER = 1.6
"""Seconds after the first SIGTERM. llama-server waits for its clients after one, exits at once after a second."""

LAST_WORDS_LIMIT = 0.5
"""Seconds to read on after the end, in case a stray grandchild holds the output open."""

LOG_PAUSE = 0.1
"""Seconds between two looks at what a server logs: a dozen lines for each request, most of them just before its first token."""

_ANSWER_LIMIT = 256 * 1024
_PORT_TAKEN = "couldn't bind"
_PREFIX = re.compile(r"^[\d.]+ [A-Z] ")  # of llama.cpp's log: time since the start, then the level
_ERROR = re.compile(r"^[\d.]+ E |.*(error|failed|assert)", re.IGNORECASE)


class LlamaServer:
    """One supervised llama-server. `run` is its life; everything else looks at it.

    Attributes:
        process: its state now. A new value at each change.
        load: how busy it is, as it said a moment ago.
        abilities: what it takes besides text, since it was ready; `None` until it has said so.
        used_at: when it was last seen at work, by trio's clock; its start, if it never was.
    """

    def __init__(
        self,
        binary: Binary,
        plan: ServerPlan,
        *,
        log: Path,
        environment: Mapping[str, str],
        on_change: Callable[[Process], None] | None = None,
        policy: RestartPolicy | None = None,
        stalled_after: float = STALLED_AFTER,
    ) -> None:
        """Prepare, and start nothing yet.

        Args:
            binary: the llama-server to run.
            plan: what to serve, and how.
            log: file for the server's output; at most 8 MiB together with its predecessor.
            environment: the node's own; see `child_environment`.
            on_change: called with each new state, in trio's thread. Must neither block nor raise.
            policy: when to restart.
            stalled_after: seconds without a sign of life before it is ended: more where it may have to wait for others.
        """
        self.plan = plan
        self.process = Process(
            name="llama-server", pid=None, port=0, model=plan.model.name, status="starting"
        )
        self._binary = binary
        self._log_path = log
        self.load = IDLE
        self.abilities: Abilities | None = None
        self._first, self._speeds = FirstToken(), Smoothed()
        self.used_at = -math.inf
        self._done: float | None = None
        self._environment = child_environment(environment)
        self._on_change = on_change
        self._policy = policy or RestartPolicy()
        self._settled = trio.Event()
        self._stalled_after = stalled_after
        self._lines = 0
        self._cause = ""
        self._again = False

    @property
    def base_url(self) -> str | None:
        """Where requests go; `None` unless it is ready."""
        return f"http://127.0.0.1:{self.process.port}" if self.process.status == "ready" else None

    async def is_busy(self) -> bool:
        """Whether it is answering requests, also while it gets no new ones because it is to be started again.

        One too busy to say so is; whoever asks again and again has a limit.
        """
        takes_or_took = self.process.pid is not None and self.process.status in ("ready", "restarting")
        return takes_or_took and await busy(self.process.port, unsaid=True)

    async def wait_settled(self) -> Process:
        """Wait until the server is ready, has failed for good or is being ended, the first time. Returns its state then."""
        await self._settled.wait()
        return self.process

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the server running until cancelled, or until it has failed for good.

        `task_status.started` is called when supervision has begun, long before the server is ready. When cancelled,
        ends the server within 2.5 s: SIGTERM, once more, then SIGKILL. Whatever ends the node, kill -9 included, ends
        the server too. A server that cannot be kept running is no exception but the state `failed`.
        """
        log = BoundedLog(self._log_path)
        try:
            task_status.started()
            effects: list[Effect] = [Launch()]
            while True:
                match effects:
                    case [Launch()]:
                        self._cause, self._again = "", False
                        ended = await self._live(log)
                        if not self._again:
                            effects = self._policy.handle(ended, trio.current_time())
                    case [GiveUp(reason=reason)]:
                        logger.error(
                            "llama-server for %s: %s. Its log: %s", self.plan.model.name, reason, log.path
                        )
                        self._change("failed", pid=None, failure=reason)
                        return
                    case _:
                        self._change("restarting", pid=None, restarts=self.process.restarts + 1)
                        await trio.sleep_until(self._policy.deadline() or 0)
                        effects = self._policy.handle(Wake(), trio.current_time())
        finally:
            if self.process.status != "failed":
                self._change("stopping", pid=None)
            log.close()

    async def _live(self, log: BoundedLog) -> Ended:
        """One life of the server, from launch to end."""
        try:
            port = free_port()
            argv = server_args(self._binary, self.plan, port)
            log.mark(f"$ {' '.join(argv)}")
            self._change("starting", pid=None, port=port)
            async with open_guarded(argv, environment=self._environment) as process:
                self._change("starting", pid=process.pid)
                status = await self._attend(process, port, log)
        except (ProgramNotStarted, OSError) as exc:  # without a port
            return self._ended(str(exc).rstrip("."), False)
        said = [line for line in log.tail if line.strip()]
        return self._ended(self._cause or _in_words(status, said), any(_PORT_TAKEN in line for line in said))

    async def _attend(self, process: GuardedProcess, port: int, log: BoundedLog) -> int:
        """Log and watch the process until it has ended, and end it when cancelled. Returns as `wait` does."""
        async with trio.open_nursery() as nursery:
            # Shielded: a server that nobody listens to any more stalls as soon as the pipe is full, also while ending.
            copying = trio.CancelScope(shield=True)
            nursery.start_soon(self._copy_output, process, log, copying)
            nursery.start_soon(self._watch, process, port)
            try:
                return await process.wait()
            except trio.Cancelled:
                self._change("stopping")
                with trio.CancelScope(shield=True):
                    await _end(process)
                raise
            finally:
                copying.deadline = trio.current_time() + LAST_WORDS_LIMIT
                nursery.cancel_scope.cancel()

    async def _copy_output(self, process: GuardedProcess, log: BoundedLog, scope: trio.CancelScope) -> None:
        with scope:
            lines = process.lines(LOG_PAUSE)
            while (line := await lines.receive()) is not None:
                self._lines += 1
                self._first.saw(line)
                log.write(line)

    def _ended(self, reason: str, port_taken: bool) -> Ended:
        logger.log(
            logging.INFO if self._again else logging.WARNING,
            "llama-server for %s: %s",
            self.plan.model.name,
            reason,
        )
        self.process = replace(self.process, pid=None, failure=reason)
        return Ended(reason, port_taken)

    async def _watch(self, process: GuardedProcess, port: int) -> None:
        progress, answers = Progress(self._stalled_after), 0
        if not await self._wait_ready(process, port, progress):
            return
        trial = DraftTrial() if self.plan.draft is not None else None
        while True:
            metrics = await _get(port, "/metrics")
            answers += bool(metrics)
            if await self._end_stalled(process, progress, answers):
                return
            load, done = read_load(metrics, self.load, self._speeds), read_work(metrics)
            load = replace(load, first=self._first.told)
            if self.abilities is None and metrics:
                self.abilities = read_abilities(await _get(port, "/props"))
                if self.abilities is not None:
                    self._tell()
            if load.busy or done != self._done:
                self.used_at, self._done = trio.current_time(), done
            if load != self.load:
                self.load = load
                self._tell()
            if trial is not None and metrics and await self._try_draft(trial, metrics, port):
                await _end(process)
                return
            await trio.sleep(LOAD_POLL)

    async def _end_stalled(self, process: GuardedProcess, progress: Progress, answers: int) -> bool:
        """Whether it stands still; then it is ended."""
        now, used = trio.current_time(), cpu_seconds(process.pid)
        stalled = progress.stalled(now, answers, self._lines, now if used is None else used)
        if stalled:
            self._cause = f"it stood still for {self._stalled_after:g} s, and was ended"
            await process.send_signal(signal.SIGKILL)
        return stalled

    async def _try_draft(self, trial: DraftTrial, metrics: bytes, port: int) -> bool:
        """Whether the server is to be started again without its draft; it has nothing to do then."""
        trial.saw(read_guesses(metrics))
        if not trial.due or (self.load.busy and not trial.hopeless):
            return False
        if trial.costs is None and not self.load.busy:
            trial.costs = await measure_costs(port)
        why = trial.verdict()
        if why is None:
            return False
        self._cause, self._again = f"{why}; it goes on without", True
        self.plan = replace(self.plan, draft=None)
        self._change("restarting")  # nothing new comes; what came in the meantime is answered
        with trio.move_on_after(DRAIN_LIMIT):
            while await busy(port, unsaid=True):  # noqa: ASYNC110 - another process is asked
                await trio.sleep(0.2)
        return True

    async def _wait_ready(self, process: GuardedProcess, port: int, progress: Progress) -> bool:
        """Ask until it serves, for as long as it gets on with loading; False if it did not, and was ended."""
        pause = FIRST_POLL
        while True:
            status = await _get_status(port, "/health")
            if status == 200 and await _serves(port, self.plan.alias):
                self._policy.handle(Ready(), trio.current_time())
                self.used_at, self._done = trio.current_time(), 0.0
                for _ in range(PROPS_TRIES):
                    if (abilities := read_abilities(await _get(port, "/props"))) is not None:
                        self.abilities = abilities
                        break
                self._change("ready", failure="")
                return True
            if status == 503 and self.process.status == "starting":
                self._change("loading")
            if await self._end_stalled(process, progress, 0):
                return False
            await trio.sleep(pause)
            pause = min(pause * 1.5, SLOWEST_POLL)

    def _change(self, status: str, **others: object) -> None:
        changed = replace(self.process, status=status, **others)  # type: ignore[arg-type]
        if changed == self.process:
            return
        self.process = changed
        self.load = replace(self.load, busy=0)
        self._tell()
        if status in ("ready", "failed", "stopping"):
            self._settled.set()

    def _tell(self) -> None:
        if self._on_change is not None:
            self._on_change(self.process)


async def _end(process: GuardedProcess) -> None:
    """Ask twice, then kill. At most `KILL_AFTER` and the moment that the kernel takes."""
    for signum, patience in (
        (signal.SIGTERM, TERM_AGAIN_AFTER),
        (signal.SIGTERM, KILL_AFTER - TERM_AGAIN_AFTER),
    ):
        await process.send_signal(signum)
        with trio.move_on_after(patience):
            await process.wait()
            return
    await process.send_signal(signal.SIGKILL)
    await process.wait()


async def _serves(port: int, alias: str) -> bool:
    """Whether the server at `port` is ours: another program may have taken the port just before."""
    _, _, body = (await _get(port, "/v1/models")).partition(b"\r\n\r\n")
    try:
        return any(model["id"] == alias for model in json.loads(body)["data"])
    except (ValueError, LookupError, TypeError):
        return False


async def busy(port: int, *, unsaid: bool = False) -> bool:
    """Whether the llama-server at `port` is answering requests. `unsaid`: what to take one for that does not say in time."""
    metrics = await _get(port, "/metrics")
    if b"llamacpp:requests_processing " not in metrics:
        return unsaid
    found = re.search(rb"^llamacpp:requests_(?:processing|deferred) [1-9]", metrics, re.MULTILINE)
    return found is not None


async def _get_status(port: int, path: str) -> int | None:
    """The HTTP status of one request; `None` if there was no answer in time."""
    words = (await _get(port, path)).split(b" ", 2)
    return (
        int(words[1]) if len(words) == 3 and words[0].startswith(b"HTTP/1.") and words[1].isdigit() else None
    )


async def _get(port: int, path: str) -> bytes:
    """The whole answer to one request, cut at 256 KiB; empty if there was none in time."""
    answer = bytearray()
    request = f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    with trio.move_on_after(POLL_LIMIT):
        try:
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(request)
                while len(answer) < _ANSWER_LIMIT and (data := await stream.receive_some(65536)):
                    answer += data
        except (OSError, trio.BrokenResourceError):
            return b""
    return bytes(answer)


def free_port() -> int:
    """A loopback port that was free a moment ago. Somebody else may take it first; the caller must cope."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


def _in_words(status: int, said: Sequence[str]) -> str:
    """Why it ended, as far as it can be told: what it said of errors, else its last lines."""
    if status == -signal.SIGKILL:
        return "it was killed (SIGKILL): by hand, or because memory ran out"
    ended = (
        f"it was ended by {signal.Signals(-status).name}" if status < 0 else f"it exited with status {status}"
    )
    words = [line for line in said if _ERROR.match(line)] or list(said[-2:])
    texts = [_PREFIX.sub("", line).strip()[:300] for line in words[-3:]]
    return f"{ended}: {' / '.join(texts)}" if texts else f"{ended} without a word"
