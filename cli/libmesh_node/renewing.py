"""The end of a node's membership: told in time, and put off where this node has been given a better invite.

A membership ends when the invite does that the node came with. From `SOON` before, the invites that the command line names
are looked at again, and with them the files that they came from: whoever writes a new invite there, such as a node with
`--invite-file` on a shared folder, keeps the others in. Where there is none, the log and `status` say so.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable
from functools import partial

import trio

from libmesh import InviteError, Mesh, MeshError, read_invite
from libmesh_node import options as opt
from libmesh_node.datadir import DataDir
from libmesh_node.errors import NodeError
from libmesh_node.membership import Membership, save_membership
from libmesh_node.options import NodeOptions

log = logging.getLogger(__name__)

SOON = 7 * 86400.0
"""Seconds before the end from which it is told; of shorter memberships, the second half."""

LOOK_EVERY = 30.0
"""Seconds between looks; less for memberships of minutes."""

SAY_EVERY = 86400.0
"""Seconds between lines in the log."""

ADVICE = "hand it a new invite in the web console, or start it again with --join"


class Renewal:
    """Looks after the end of one stay's membership. `run` until cancelled.

    Args:
        mesh: the mesh, open.
        folder: where the invite is kept for the next start.
        options: says which invites and files there are.
        invited: whether this node came with an invite. Who founded the mesh has all that there is.
        renewed: told that another invite holds.
        advice: what to do about a membership that ends, for the log.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        mesh: Mesh,
        folder: DataDir,
        options: NodeOptions,
        *,
        invited: bool,
        renewed: Callable[[], None] = lambda: None,
        advice: str = ADVICE,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._mesh, self._folder, self._options = mesh, folder, options
        self._invited, self._renewed, self._clock = invited, renewed, clock
        self._advice = advice
        self._soon = self._begin()
        self._refused: set[str] = set()
        self._said_at = -math.inf

    def _begin(self) -> float:
        return min(SOON, max(0.0, self._left()) / 2)

    def _left(self) -> float:
        end = self._mesh.expires_unix
        return math.inf if end is None else end - self._clock()

    @property
    def ended(self) -> bool:
        """Whether nobody takes this node for a member any more."""
        return self._left() < 0

    @property
    def notices(self) -> tuple[str, ...]:
        """What a person should know of the end, in a sentence or none."""
        if self.ended:
            return ("This node's membership has ended: join again with a new invite.",)
        if self._left() < self._soon:
            return (f"This node's membership ends on {self._date()}: join again with a new invite before.",)
        return ()

    def _date(self) -> str:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self._mesh.expires_unix))

    def gains(self, token: str) -> bool:
        """Whether an invite to this mesh gives more than what this node is in by. Raises `InviteError`."""
        return self._invited and gains(token, self._mesh, self._clock())

    async def by(self, token: str) -> None:
        """Go by this invite from now on, and at the next start. Raises what `Mesh.renew` raises."""
        await self._mesh.renew(token)
        self._soon, self._said_at = self._begin(), -math.inf
        log.info("this node is %s by another invite", self._mesh.scope.name.lower())
        try:
            save_membership(self._folder, Membership.invited(token))
        except NodeError as exc:
            log.warning("%s The next start will go by the former invite.", exc)
        self._renewed()

    async def run(self) -> None:
        """Look now and then."""
        while self._invited:
            if self._left() <= self._soon and not await self._renew():
                self._warn()
            await trio.sleep(min(LOOK_EVERY, max(1.0, self._soon / 8)))

    def _warn(self) -> None:
        if self._clock() - self._said_at >= SAY_EVERY:
            self._said_at = self._clock()
            when = "has ended" if self._left() <= 0 else f"ends on {self._date()}"
            log.warning("this node's membership %s: %s", when, self._advice)

    async def _renew(self) -> bool:
        """By what the command line names, the files last: one may lie on a share that does not answer."""
        for token in self._options.join:
            if await self._renew_by(token):
                return True
        for file in self._options.join_files:
            try:
                token = await _in_thread(partial(opt.invite, f"@{file}"))
            except argparse.ArgumentTypeError as exc:
                log.debug("%s", exc)
                continue
            if await self._renew_by(token):
                return True
        return False

    async def _renew_by(self, token: str) -> bool:
        try:
            if read_invite(token).mesh_id == self._mesh.mesh_id and self.gains(token):
                await self.by(token)
                return True
        except MeshError as exc:
            if token not in self._refused:
                log.warning("an invite that would renew this node's membership does not: %s", exc)
            self._refused.add(token)
        return False


async def _in_thread(read: Callable[[], str]) -> str:
    return await trio.to_thread.run_sync(read, abandon_on_cancel=True)


def gains(token: str, mesh: Mesh, now: float) -> bool:
    """Whether `token` lets its holder do more in `mesh`, or stay longer, than this node may. Raises `InviteError`."""
    info = read_invite(token)
    ours, theirs = (math.inf if end is None else end for end in (mesh.expires_unix, info.expires_unix))
    return theirs > now and (
        ours <= now or info.scope > mesh.scope or (info.scope == mesh.scope and theirs > ours)
    )


def newest(given: Membership, remembered: Membership | None, now: float) -> Membership:
    """`given`, or what is remembered of the same mesh if that holds still and `given` has ended: it was renewed since."""
    if given.token is None or remembered is None or remembered.token is None:
        return given
    if remembered.mesh_id != given.mesh_id or not _ended(given.token, now) or _ended(remembered.token, now):
        return given
    return remembered


def _ended(token: str, now: float) -> bool:
    try:
        end = read_invite(token).expires_unix
    except InviteError:
        return False  # and told so where it is used
    return end is not None and end <= now
