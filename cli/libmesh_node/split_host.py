"""Hosting one model: when the election says so, its split is started, replaced, and ended.

Make before break: a better placement is started beside the running one, which finishes what it is answering when that
takes over, and is taken up again if that ends before. Only where memory does not allow both, the running one as it is and
the better one as it will be, does the running one end first, whoever is to host the better one: when it has nothing to
do. Requests wait meanwhile in the nodes that took them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import trio

from libmesh import Mesh
from libmesh_node.announced import NodeStatus
from libmesh_node.entries import Entry
from libmesh_node.llama.supervisor import LlamaServer
from libmesh_node.options import NodeOptions
from libmesh_node.placement import seen
from libmesh_node.placement.electing import elect_at, hosted_by, predict
from libmesh_node.placement.heirs import PassedOver
from libmesh_node.placement.machine import Machine, held_of, memory_of, short
from libmesh_node.placement.splitting import Placement, Shortage
from libmesh_node.placement.steering import Abandon, Adopt, Broken, Looked, Steering, same
from libmesh_node.planning import in_words, rules_of
from libmesh_node.serving import LocalModels
from libmesh_node.split_run import SplitFailed, SplitRun, SplitSetting, fits_beside, setting_of

log = logging.getLogger(__name__)

REFUSED_FOR = 20.0
"""Seconds for which a peer that refused is not asked again; one that was lost after it had worked, for less at first."""

FIRST_PAUSE, USED_PAUSE, LONGEST_PAUSE, HEALTHY_AFTER = 0.5, 2.0, 30.0, 60.0
"""Seconds until the next try after a split that failed; doubled with each failure, forgotten after `HEALTHY_AFTER`. No longer than
`USED_PAUSE` after one that had answered: however often its processes die, it is back in 10 s and the time to load."""

OWN_FAILURES = 3
UNABLE_FOR = 300.0
"""A node whose own llama-server failed so often in a row offers no memory for so many seconds: others shall be elected."""

DRAIN_LIMIT = 120.0
"""Seconds that a replaced server may take to finish what it is answering; one that makes room for a better split, to be idle."""

HEIR_LIMIT = 30.0
"""Seconds without a sign that the peer, which is there, loads what this node ended its split for; then that is taken back."""

Launch = Callable[[SplitSetting, Placement, dict[str, int], dict[str, int], Callable[[], None]], SplitRun]


class SplitHost:
    """Hosts one model whenever the election says so.

    Args:
        lent: bytes of this machine's memory that work for other hosts of a model, by its digest.
    """

    def __init__(
        self,
        mesh: Mesh,
        models: LocalModels,
        entry: Entry,
        options: NodeOptions,
        status: Callable[[], NodeStatus],
        launch: Launch,
        lent: Callable[[str], int],
    ) -> None:
        self._launch, self._lent = launch, lent
        self.name, self.entry = entry.name, entry
        self.scope = trio.CancelScope()
        self.missing = ""
        self.served = False
        self._mesh, self._models, self._status = mesh, models, status
        self._rules = rules_of(options)
        self._steering = Steering()
        self._run: SplitRun | None = None
        self._coming: SplitRun | None = None
        self._refused: dict[str, tuple[str, float]] = {}
        self._replaced: list[SplitRun] = []  # each finishes what it is answering
        self._no_heirs = PassedOver()
        self._taken: set[str] = set()  # those whose memory another host's split may have
        self._elsewhere = False
        self._heir: tuple[str, float] | None = None  # for whom the split here ends, and until when
        self._pause, self._not_before = FIRST_PAUSE, 0.0
        self._own_failures, self.unable_until = 0, 0.0
        self._news = trio.Event()

    def look(self) -> None:
        """Something changed. Never blocks."""
        self._news.set()

    async def run(self) -> None:
        """Host until cancelled, by `scope` or from outside; then nothing of it is left."""
        with self.scope:
            await self.entry.identified.wait()
            if not self.entry.digest:
                return
            try:
                async with trio.open_nursery() as nursery:
                    while True:
                        self._news = trio.Event()
                        if not self.entry.leaving:
                            self._step(nursery)
                        with trio.move_on_at(self._wake_at()):
                            await self._news.wait()
            finally:
                self.entry.servers.clear()
                self.entry.workers, self.entry.split_bytes, self.entry.left = (), 0, False

    # ── deciding ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _wake_at(self) -> float:
        times = [self._steering.deadline(), self._no_heirs.deadline()]
        times += [until for _, until in self._refused.values()]
        times += [] if self._heir is None else [self._heir[1]]
        times += [self._not_before] if self._not_before > trio.current_time() else []
        known = [time for time in times if time is not None]
        return max(min(known, default=float("inf")), trio.current_time() + 0.05)

    def _step(self, nursery: trio.Nursery) -> None:
        now = trio.current_time()
        elsewhere = seen.host_elsewhere(self.entry.digest, self._mesh.view)
        self._notice(elsewhere is not None, now)
        self._take_up_again(elsewhere is not None)
        self.entry.left = self._run is None and self._heir is not None
        machines = seen.machines_with(
            self.entry.digest,
            self._mesh.view,
            self._status(),
            name=self.name,
            protocol=self._models.equipment.rpc_protocol,
            refused={peer: why for peer, (why, _) in self._refused.items()},
        )
        shape = self.entry.shape
        best = elect_at(self._mesh.view.me, shape, machines, self._rules)
        if elsewhere is None and isinstance(best, Placement) and best.host in self._no_heirs:
            # Hosted here while nobody serves: the others wait for one of whom this node alone knows better.
            best = hosted_by(self._mesh.view.me, shape, machines, self._rules) or best
        self.served = elsewhere is not None or (self._run is not None and self._run.ready)
        self._tell(best)
        self._yield_to(best, elsewhere[0] if elsewhere is not None else None, nursery)
        if self._run is not None and not self._ends_for(best, self._run):
            self._heir = None
        if self._coming is not None or now < self._not_before:
            return
        running: float | None = None
        if self._run is not None:
            running = predict(shape, self._run.placement, machines)
        elif elsewhere is not None:
            self._steering.current = there = seen.placement_elsewhere(*elsewhere)
            if (running := predict(shape, there, machines)) is None:
                return  # it says that it serves; if that is over, it will say so, or fall silent
        for effect in self._steering.handle(Looked(best, running, lives=self._run is not None), now):
            match effect:
                case Adopt(placement) if self._may_start(placement, machines):
                    self._start(placement, machines, nursery)
                case Adopt(placement):  # another one's, or for later; ours ends when that answers, or before
                    self._steering.current = self._run.placement if self._run is not None else None
                    if self._run is not None and not self._fits(placement, machines, self._run.taken):
                        if running is None and placement.host == self._mesh.view.me:
                            self._make_room(self._run, now)
                        else:
                            self._leave_to(placement.host, self._run, now, nursery)
                case Abandon(why):
                    log.warning("%s cannot be served any more: %s", self.name, why)
                    self._stop(self._run)

    def _notice(self, elsewhere: bool, now: float) -> None:
        """What has changed of what this node alone knows."""
        if self._elsewhere and not elsewhere:  # what that split had is free now
            for peer in self._taken:
                self._refused.pop(peer, None)
            self._taken.clear()
            self._pause, self._not_before = FIRST_PAUSE, 0.0
        self._elsewhere = elsewhere
        self._refused = {peer: entry for peer, entry in self._refused.items() if entry[1] > now}
        self._no_heirs.look(self._incarnations(), now)
        if self._heir is None or self._run is not None:
            return
        heir, until = self._heir
        if elsewhere:
            self._heir = None
        elif seen.is_coming(heir, self.entry.digest, self._mesh.view):
            self._heir = heir, now + HEIR_LIMIT
        elif now >= until or not seen.is_there(heir, self._mesh.view):
            log.warning("%s: the peer %s did not take over, and is left nothing now", self.name, short(heir))
            self._bar(heir, now)

    def _bar(self, heir: str, now: float) -> None:
        """It did not take over."""
        self._heir = None
        self._no_heirs.add(heir, self._incarnations().get(heir, 0), now)

    def _incarnations(self) -> dict[str, int]:
        return {peer.peer: peer.incarnation for peer in self._mesh.view.peers}

    def _may_start(self, placement: Placement, machines: list[Machine]) -> bool:
        """Whether it is this node's to start, and there is room beside what serves, as far as this node knows."""
        if placement.host != self._mesh.view.me or (self._run is None and not self._elsewhere):
            return placement.host == self._mesh.view.me
        return self._heir is None and self._fits(placement, machines, self._held(machines))

    def _fits(self, placement: Placement, machines: list[Machine], held: dict[str, int]) -> bool:
        context = seen.context_now(self.entry.digest, self._mesh.view, self._status())
        return fits_beside(self.entry.shape, placement, memory_of(machines), held, context)

    def _held(self, machines: list[Machine]) -> dict[str, int]:
        """What splits of this model have of each machine: those of this node, drained ones too, and what the others tell of.

        Nothing while none serves: what a dead host had, its workers give to whoever asks them.
        """
        if self._run is None and not self._elsewhere:
            return {}
        held = Counter({str(self._mesh.view.me): self._lent(self.entry.digest)})
        for run in (self._run, *self._replaced):
            held.update(run.taken if run is not None else {})
        return held_of(self._mesh.view.me, machines, held)

    def _ends_for(self, best: Placement | Shortage, run: SplitRun) -> bool:
        """Whether it is still for the best placement that `run` makes room."""
        if self._heir is None or not isinstance(best, Placement) or best.host != self._heir[0]:
            return False
        return not same(best, run.placement)

    def _tell(self, best: Placement | Shortage) -> None:
        missing = str(best) if isinstance(best, Shortage) else ""
        if missing and missing != self.missing and not self.served:
            log.info("%s waits: %s", self.name, missing)
        self.missing = missing

    def _yield_to(self, best: Placement | Shortage, elsewhere: str | None, nursery: trio.Nursery) -> None:
        """Two hosts of one model: the one that would be elected stays, once it answers. Here nothing new is taken then."""
        run = self._run
        if run is None or not run.ready or elsewhere is None:
            return
        if isinstance(best, Placement) and best.host == elsewhere:
            log.info("%s is served by the peer %s now", self.name, short(elsewhere))
            self._run, self.entry.workers = None, ()
            if run.server in self.entry.servers:
                self.entry.servers.remove(run.server)
            self._replaced.append(run)
            nursery.start_soon(self._drain, run)
            self._models.on_change()

    def _take_up_again(self, elsewhere: bool) -> None:
        """What replaced the split here has ended, and the memory that would be needed anew works for the old one still."""
        run = self._replaced[-1] if self._replaced else None
        if elsewhere or self._heir or self._run is not None or run is None or not run.ready:
            return
        log.info("%s: the split that was replaced here goes on", self.name)
        self._replaced.remove(run)
        self._steering.current = run.placement
        self._serve_by(run)
        self._models.on_change()

    # ── acting ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, placement: Placement, machines: list[Machine], nursery: trio.Nursery) -> None:
        log.info("%s: %s", self.name, in_words(placement, self._rules))
        about = self._setting(), placement, memory_of(machines), self._held(machines)
        self._coming = run = self._launch(*about, partial(self._changed, nursery))
        self._note_memory()
        nursery.start_soon(self._live, run, nursery)

    def _setting(self) -> SplitSetting:
        return setting_of(self._mesh, self._models.equipment, self.entry, self._models.log_of(self.name))

    async def _live(self, run: SplitRun, nursery: trio.Nursery) -> None:
        failure = await run.run()
        if run.server in self.entry.servers:
            self.entry.servers.remove(run.server)
        if run in self._replaced:
            self._replaced.remove(run)
        if failure is not None and run in (self._run, self._coming):
            self._failed(run, failure, nursery)
        if run.server is not None and run.server.plan.draft is None:
            self.entry.plan = replace(self.entry.plan, draft=None)  # given up, and not to be tried again
        if run is self._coming:
            self._coming = None
        if run is self._run:
            self._run, self.entry.workers = None, ()
            if self._heir is not None and self._heir[0] == self._mesh.view.me:
                self._heir = None
                self._steering.handle(Broken(), trio.current_time())
        self._note_memory()
        self.entry.left = self._run is None and self._heir is not None
        self._models.on_change()
        self.look()
        await trio.sleep_until(self.unable_until)
        self._models.on_change()

    def _failed(self, run: SplitRun, failure: SplitFailed, nursery: trio.Nursery) -> None:
        now = trio.current_time()
        who = f"the peer {short(failure.peer)}: " if failure.peer else ""
        how = "ended" if run is self._run else "failed"
        log.warning("%s: the split %s: %s%s", self.name, how, who, failure)
        if failure.later and self._run is not None and failure.peer in self._run.placement.members:
            self._steering.current = self._run.placement
            self._leave_to(self._mesh.view.me, self._run, now, nursery)
            return
        self._own_failures += not failure.peer and run.ready_since is None
        if self._own_failures >= OWN_FAILURES:
            log.warning("%s: this node leaves it to others for %g s", self.name, UNABLE_FOR)
            self._own_failures, self.unable_until = 0, now + UNABLE_FOR
        if failure.later:
            self._taken.add(failure.peer)
        lasted = run.ready_since is not None and now - run.ready_since >= HEALTHY_AFTER
        longest = LONGEST_PAUSE if run.ready_since is None else USED_PAUSE
        self._pause = FIRST_PAUSE if lasted else min(self._pause * 2, longest)
        if failure.peer:
            lasting = run.ready_since is None and not failure.later
            seconds = REFUSED_FOR if lasting else min(REFUSED_FOR, 4 * self._pause)
            self._refused[failure.peer] = str(failure), now + seconds
        self._not_before = now + (0.0 if run.ready_since is not None and failure.peer else self._pause)
        if run is self._run or self._run is None:
            self._steering.handle(Broken(), now)
        else:
            self._steering.current = self._run.placement

    def _make_room(self, run: SplitRun, now: float) -> None:
        """A member of `run` is silent, so that nothing can be expected of it, and its memory here is needed at once."""
        log.info("%s: the split here has lost a member; ending it for another one", self.name)
        self._stop(run)
        self._steering.handle(Broken(), now)

    def _leave_to(self, heir: str, run: SplitRun, now: float, nursery: trio.Nursery) -> None:
        """A better split, of another host or of this one, has no room beside `run`, which ends as soon as it is idle."""
        if self._heir is None:
            who = "this node" if heir == self._mesh.view.me else f"the peer {short(heir)}"
            log.info("%s: %s serves it better once the split here is idle and has ended", self.name, who)
            self._heir = heir, now + DRAIN_LIMIT + HEIR_LIMIT
            nursery.start_soon(self._end_for_heir, run)

    async def _end_for_heir(self, run: SplitRun) -> None:
        """End it when it is idle. If it never is, it stays, rather than that answers break off; steering asks again."""
        with trio.move_on_after(DRAIN_LIMIT) as waited:
            while (  # noqa: ASYNC110 - another process is asked
                self._heir is not None and run.server is not None and await _is_busy(run.server)
            ):
                await trio.sleep(0.2)
        if self._heir is None or run is not self._run:
            return
        if waited.cancelled_caught:
            log.info("%s: the split here is never idle, and stays for now", self.name)
            self._heir = None
            self.look()
        else:
            self._heir = self._heir[0], trio.current_time() + HEIR_LIMIT
            self._stop(run)

    def _changed(self, nursery: trio.Nursery) -> None:
        """A server's state changed: when the coming one answers, it takes over."""
        coming = self._coming
        if coming is not None and coming.server is not None and coming.server not in self.entry.servers:
            self.entry.servers.append(coming.server)
        if coming is not None and coming.ready and coming.server is not None:
            old, self._coming = self._run, None
            if old is None and self._heir is not None:
                self._bar(self._heir[0], trio.current_time())
            coming.ready_since, self._own_failures = trio.current_time(), 0
            if old is not None:
                self._replaced.append(old)
                nursery.start_soon(self._drain, old)
            self._serve_by(coming)
        self._models.on_change()

    def _serve_by(self, run: SplitRun) -> None:
        assert run.server is not None
        self._run = run
        if run.server in self.entry.servers:
            self.entry.servers.remove(run.server)
        self.entry.servers.insert(0, run.server)
        self.entry.workers = tuple(share.peer for share in run.placement.workers)
        self._note_memory()

    def _note_memory(self) -> None:
        runs = [run for run in (self._run, self._coming, *self._replaced) if run is not None]
        self.entry.split_bytes = sum(run.home_bytes for run in runs)

    async def _drain(self, run: SplitRun) -> None:
        """End a replaced run when it has answered what it was asked, unless it is taken up again."""
        with trio.move_on_after(DRAIN_LIMIT):
            while run in self._replaced and run.server is not None and await _is_busy(run.server):  # noqa: ASYNC110 - a process is asked
                await trio.sleep(0.2)
        if run in self._replaced:
            self._replaced.remove(run)
            self._stop(run)

    def _stop(self, run: SplitRun | None) -> None:
        if run is not None:
            run.scope.cancel()


async def _is_busy(server: LlamaServer) -> bool:
    return await server.is_busy()
