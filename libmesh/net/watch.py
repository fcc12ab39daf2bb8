"""Notices that this machine's network is another one now: an address came or went, a cable was pulled, it slept.

Linux tells of addresses, links and routes over a netlink socket; elsewhere the interfaces are looked at every few seconds.
That the machine slept shows in a clock that went on meanwhile.
"""

from __future__ import annotations

import errno
import logging
import socket
import sys
import time
from collections.abc import Callable

import trio

from libmesh.net import tcp
from libmesh.net.netlink import NetlinkNews

log = logging.getLogger(__name__)

SETTLE = 0.3
"""Seconds without further news before a change is told: interfaces come up in many small steps."""

LOOK_EVERY = 5.0
"""Seconds between looks where the system does not tell."""

CLOCK_EVERY, SLEPT = 2.0, 5.0
"""Seconds between looks at the clocks, and by how much they must disagree for the machine to have slept."""

_LINK, _IPV4_ADDRESS, _IPV4_ROUTE, _IPV6_ADDRESS = 1, 0x10, 0x40, 0x100  # RTMGRP_…, rtnetlink(7)


async def watch_network(changed: Callable[[], None]) -> None:
    """Call `changed` after every change of the network, and when the machine has slept, until cancelled."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch_clock, changed)
        if sys.platform == "linux":
            nursery.start_soon(_watch_netlink, changed)
        else:
            nursery.start_soon(_watch_interfaces, changed)


async def _watch_netlink(changed: Callable[[], None]) -> None:
    try:
        sock = trio.socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        with sock:
            await sock.bind((0, _LINK | _IPV4_ADDRESS | _IPV4_ROUTE | _IPV6_ADDRESS))
            news = NetlinkNews()
            while True:
                await _change(sock, news)
                quiet = False
                while not quiet:
                    with trio.move_on_after(SETTLE) as scope:
                        await _change(sock, news)
                    quiet = scope.cancelled_caught
                changed()
    except OSError as exc:  # a sandbox without netlink
        log.debug("the system does not tell of its network: %s", exc)
        await _watch_interfaces(changed)


async def _change(sock: trio.socket.SocketType, news: NetlinkNews) -> None:
    """Wait for the next change."""
    try:
        while not news.told(await sock.recv(65536)):
            pass
    except OSError as exc:
        if exc.errno != errno.ENOBUFS:  # more than the socket holds: there must be one among it
            raise


async def _watch_interfaces(changed: Callable[[], None]) -> None:
    before: list[str] | None = None
    while True:
        try:
            now = tcp.interface_hosts()
        except OSError:  # out of file descriptors; the next look tells
            now = before or []
        if before is not None and now != before:
            changed()
        before = now
        await trio.sleep(LOOK_EVERY)


async def _watch_clock(changed: Callable[[], None]) -> None:
    """The clock of the date goes on while a machine sleeps, the monotonic one stands still."""
    while True:
        ahead = time.time() - time.monotonic()
        await trio.sleep(CLOCK_EVERY)
        if time.time() - time.monotonic() - ahead > SLEPT:
            log.info("this machine slept, or its clock was set")
            changed()
