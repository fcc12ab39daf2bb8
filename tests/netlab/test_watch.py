"""The kernel tells of changes of the network; here of a real one."""

from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from libmesh.net import watch
from tests.netlab.lab import Kind, Lab

LIMIT = 60.0


@pytest.mark.slow
async def test_the_kernel_tells_of_a_new_address(lab: Lab) -> None:
    host = lab.site(Kind.PUBLIC).host
    with host.namespace.inside():  # the socket that is made below stays there
        sock = trio.socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    changed = trio.Event()
    with pytest.MonkeyPatch.context() as patch, trio.fail_after(LIMIT):
        patch.setattr("libmesh.net.watch.trio.socket.socket", lambda *_: sock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch._watch_netlink, changed.set)
            await trio.testing.wait_all_tasks_blocked()
            host.namespace.ip(f"addr add 11.9.9.9/24 dev {host.device}")
            await changed.wait()
            nursery.cancel_scope.cancel()
