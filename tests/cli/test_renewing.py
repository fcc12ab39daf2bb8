"""The end of a node's membership is told in time, and put off by a better invite. In a real mesh, in virtual time.

Days are short here, so that a month is not half a million probes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from libmesh_node import options, relay_node, renewing
from libmesh_node.datadir import DataDir
from libmesh_node.membership import Membership, load_membership
from libmesh_node.options import NodeOptions
from libmesh_node.relay_node import RelayOptions
from libmesh_node.renewing import Renewal, newest

from libmesh import Mesh, Scope, open_mesh
from tests.members import NOW, key
from tests.town import clock, town

DAY = 10
"""Seconds."""

WEEK = 7

IN_THREAD = renewing._in_thread


@pytest.fixture(autouse=True)
def _short_days(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewing, "SOON", float(WEEK * DAY))
    monkeypatch.setattr(renewing, "SAY_EVERY", float(DAY))
    monkeypatch.setattr(renewing, "LOOK_EVERY", DAY / 10)


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual time does not wait for them."""

    async def read_here(read: Callable[[], str]) -> str:
        return read()

    monkeypatch.setattr(renewing, "_in_thread", read_here)


class Guest:
    """A node that came with an invite which ends after `days`, and looks after that."""

    def __init__(self, founder: Mesh, mesh: Mesh, folder: Path, chosen: NodeOptions) -> None:
        self.founder, self.mesh, self.folder = founder, mesh, DataDir(folder)
        self.renewals = 0
        self.renewal = Renewal(mesh, self.folder, chosen, invited=True, renewed=self._renewed, clock=clock)

    def _renewed(self) -> None:
        self.renewals += 1

    def token(self, days: float | None, scope: Scope = Scope.CLIENT) -> str:
        return invite(self.founder, days, scope)


def invite(founder: Mesh, days: float | None, scope: Scope = Scope.CLIENT) -> str:
    return founder.invite(scope=scope, not_after_unix=None if days is None else NOW + days * DAY)


@asynccontextmanager
async def guest(
    tmp_path: Path, days: float, *more: float, join_files: tuple[Path, ...] = ()
) -> AsyncIterator[Guest]:
    async with town() as place:
        founder = await place.found()
        mesh = await place.join(2, first := invite(founder, days))
        chosen = NodeOptions(
            data_dir=tmp_path, join=(first, *(invite(founder, one) for one in more)), join_files=join_files
        )
        node = Guest(founder, mesh, tmp_path, chosen)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.renewal.run)
            yield node
            nursery.cancel_scope.cancel()


def assert_told(node: Guest, words: str) -> None:
    (told,) = node.renewal.notices
    assert words in told


async def day(number: float) -> None:
    await trio.sleep(NOW + number * DAY - clock())


@contextmanager
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    said: list[str] = []
    with caplog.at_level(logging.WARNING, "libmesh_node.renewing"):
        yield said
    said += [r.getMessage() for r in caplog.records if r.name == "libmesh_node.renewing"]


async def test_the_end_is_told_a_week_before_and_daily(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings(caplog) as said:
        async with guest(tmp_path, days=30) as node:
            await day(30 - WEEK - 0.1)
            assert node.renewal.notices == ()
            await day(30 - WEEK + 0.1)
            assert_told(node, "membership ends on")
            await day(29.9)
            assert not node.renewal.ended
            await day(31)
            assert node.renewal.ended
            assert_told(node, "has ended")
    assert len([line for line in said if "ends on" in line]) == WEEK
    assert "has ended" in said[WEEK]
    assert "has ended" in said[-1]


async def test_of_a_short_membership_the_second_half_is_told(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with guest(tmp_path, days=1) as node:
        await day(0.4)
        assert node.renewal.notices == ()
        await day(0.6)
        assert_told(node, "membership ends on")


async def test_a_file_that_holds_a_newer_invite_by_then_renews(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    file = tmp_path / "shared"
    async with guest(tmp_path, days=30, join_files=(file,)) as node:
        await day(20)
        file.write_text(newer := node.token(60))
        await day(22.9)
        assert node.renewals == 0
        await day(23.1)
        assert (node.renewals, node.mesh.expires_unix) == (1, NOW + 60 * DAY)
        assert node.renewal.notices == ()
        assert load_membership(node.folder) == Membership(node.mesh.mesh_id, newer)
        await day(59)
        assert_told(node, "membership ends on")
        assert node.renewals == 1


async def test_a_relay_stays_in_its_mesh_by_a_newer_invite_in_its_file(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_node, "open_mesh", partial(open_mesh, wall_clock=clock))
    monkeypatch.setattr(relay_node, "Renewal", partial(Renewal, clock=clock))
    file = tmp_path / "shared"
    async with town() as place:
        founder = await place.found()
        file.write_text(invite(founder, 30))
        chosen = RelayOptions(
            token=options.invite(f"@{file}"), open_to_all=False, port=0, websocket_port=None, announce=(), max_peers=1,
            max_circuits=1, bandwidth=0, bandwidth_per_peer=0, data_dir=tmp_path,
        )  # fmt: skip
        network = await place.network(2)
        async with relay_node._member(chosen, DataDir(tmp_path), key(2), network):  # type: ignore[arg-type]
            await day(20)
            file.write_text(newer := invite(founder, 60))
            await day(31)
            admission = founder.admission_of(network.peer)
            assert admission is not None
            assert admission[1] == NOW + 60 * DAY
    kept = load_membership(DataDir(tmp_path))
    assert kept is not None
    assert kept.token == newer
    assert relay_node._membership(replace(chosen, token=None), DataDir(tmp_path)) == kept


async def test_another_invite_of_the_command_line_renews(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with guest(tmp_path, 2, 4, 30) as node:
        await day(1.9)
        assert node.mesh.expires_unix == NOW + 4 * DAY
        await day(3.9)
        assert node.mesh.expires_unix == NOW + 30 * DAY


@pytest.mark.parametrize("content", ["garbage", "lm1broken", "two tokens", ""])
async def test_a_file_of_no_use_is_passed_over(
    autojump_clock: trio.testing.MockClock,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    content: str,
) -> None:
    file = tmp_path / "shared"
    file.write_text(content)
    with warnings(caplog) as said:
        async with guest(tmp_path, days=1, join_files=(file, tmp_path / "missing")) as node:
            await day(2)
            assert node.renewals == 0
    assert len(said) <= 3


async def test_a_file_that_cannot_be_read_to_its_end_stops_nothing(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a share whose server is gone. The invite of the command line counts meanwhile."""
    monkeypatch.setattr(renewing, "_in_thread", IN_THREAD)
    file = tmp_path / "shared"
    os.mkfifo(file)
    async with guest(tmp_path, 2, 4, join_files=(file,)) as node:
        await day(3.9)
        assert node.renewals == 1
        assert_told(node, "membership ends on")
    os.close(os.open(file, os.O_RDWR))  # lets the thread go


async def test_an_invite_to_another_mesh_in_the_file_moves_nobody(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    file = tmp_path / "shared"
    async with town() as place:
        file.write_text(invite(await place.found(5, mesh_key=key(200)), None))
    async with guest(tmp_path, days=1, join_files=(file,)) as node:
        await day(0.9)
        assert node.renewals == 0
        assert not node.renewal.ended


async def test_what_gives_more_is_told_from_what_gives_less(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with guest(tmp_path, days=10) as node:
        gains = node.renewal.gains
        assert gains(node.token(11))
        assert gains(node.token(None))
        assert gains(node.token(1, Scope.WORKER))
        assert not gains(node.token(9))
        await node.renewal.by(node.token(5, Scope.WORKER))
        assert not gains(node.token(None))
        assert node.mesh.scope is Scope.WORKER


async def test_a_renewed_invite_is_taken_at_the_next_start_in_place_of_one_that_ended(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with town() as place:
        founder = await place.found()
        old, new = (Membership.invited(invite(founder, days)) for days in (1, 30))
        assert newest(old, new, NOW + 2 * DAY) == new
        assert newest(old, new, NOW) == old, "the command line has the word while it holds"
        assert newest(old, new, NOW + 31 * DAY) == old
        assert newest(old, None, NOW + 2 * DAY) == old
        assert newest(old, replace(new, mesh_id=Membership("other").mesh_id), NOW + 2 * DAY) == old  # type: ignore[arg-type]


def test_the_file_that_a_token_came_from_is_known(tmp_path: Path) -> None:
    file = tmp_path / "invite"
    file.write_text("TOKEN\n")
    token = options.invite(f"@{file}")
    assert isinstance(token, options.FileToken)
    assert token.file == file
    assert not isinstance(options.invite("TOKEN"), options.FileToken)
