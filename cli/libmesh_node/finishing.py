"""What a node does between being told to end and ending: it takes nothing new, and finishes what will soon be done.

What is not done by then is handed over: who asked keeps each request until its last byte, and goes on with it on another
server of the same model (`http/continuing.py`).
"""

from __future__ import annotations

import logging

import trio

from libmesh_node.llama.supervisor import busy
from libmesh_node.serving import LocalModels

log = logging.getLogger(__name__)

LIMIT = 0.8
"""Seconds for what is being answered. The whole end has 3, and servers, goodbyes and HTTP need their part."""

_LOOK = 0.05


async def finish(models: LocalModels) -> None:
    """Withdraw all models, and return when their servers have nothing left to do, within `LIMIT`."""
    for entry in models.entries.values():
        entry.unloading = entry.leaving = True
    models.on_change()
    with trio.move_on_after(LIMIT) as limit:
        if not await _is_busy(models):
            return
        log.info("finishing what is being answered; what takes longer goes on elsewhere")
        while await _is_busy(models):  # noqa: ASYNC110 - another process is asked
            await trio.sleep(_LOOK)
    if limit.cancelled_caught:
        log.info("not all is finished; other nodes that serve the same models go on with it")


async def _is_busy(models: LocalModels) -> bool:
    ports = [server.process.port for entry in models.entries.values() for server in entry.servers[:1]]
    for port in ports:
        if await busy(port):
            return True
    return False
