"""`libmesh-node relay`: runs nothing but a relay, on a machine that everybody can reach."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from libmesh_node import options
from libmesh_node.datadir import default_data_dir
from libmesh_node.errors import UsageError

DEFAULT_PORT = 4001
"""libp2p's usual port."""


def add_parser(subparsers: Any) -> None:
    """Add `relay` to the commands."""
    parser = subparsers.add_parser(
        "relay",
        help="relay for nodes that cannot reach each other",
        description=(
            "Runs a relay and nothing else: no models, no API, no console. Nodes behind routers are reached through "
            "it by the others, until they find a direct way. It cannot read what it passes on. It also keeps word of "
            "where nodes are, for members whose addresses have all changed. It needs a machine that "
            "can be reached from outside at --bind-port. It prints the addresses that a node's --relay takes; members "
            "of the mesh that it joins find it by themselves."
        ),
    )
    whom = parser.add_argument_group("for whom")
    whom.add_argument(
        "--join", type=options.invite, metavar="TOKEN",
        help="relay for the members of this invite's mesh (needed at the first start; remembered afterwards)",
    )  # fmt: skip
    whom.add_argument(
        "--open", action="store_true", help="relay for everybody who knows its address, whatever their mesh"
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--bind-port", type=options.port, default=DEFAULT_PORT, metavar="PORT",
        help="accept peers at this port (default: %(default)s; 0 for any free one)",
    )  # fmt: skip
    where.add_argument(
        "--bind-ws", type=options.port, metavar="PORT",
        help="accept peers by WebSocket, too, at this port, for those whom nothing but the web is open to",
    )  # fmt: skip
    where.add_argument(
        "--announce-addr", action="append", default=[], type=options.multiaddr, metavar="MULTIADDR",
        help="where others reach it, if that is not an address of this machine (repeatable)",
    )  # fmt: skip
    limits = parser.add_argument_group("how much")
    limits.add_argument(
        "--max-peers", type=_count, default=1024, metavar="N", help="peers that can be reached through it (%(default)s)"
    )  # fmt: skip
    limits.add_argument(
        "--max-circuits", type=_count, default=1024, metavar="N", help="connections through it at a time (%(default)s)"
    )  # fmt: skip
    limits.add_argument(
        "--bandwidth", type=_megabits, default=0.0, metavar="MBIT", help="Mbit/s for all together (default: no limit)"
    )  # fmt: skip
    limits.add_argument(
        "--peer-bandwidth", type=_megabits, default=0.0, metavar="MBIT", help="Mbit/s for each peer (default: no limit)"
    )  # fmt: skip
    keeps = parser.add_argument_group("what it keeps and says")
    keeps.add_argument(
        "--data-dir", type=options.path, metavar="DIR", default=argparse.SUPPRESS,
        help=f"identity and membership (default: {default_data_dir() / 'relay'})",
    )  # fmt: skip
    keeps.add_argument("--json-logs", action="store_true", help="log lines on stderr as JSON objects")
    keeps.add_argument(
        "--verbose", action="store_true", default=argparse.SUPPRESS, help="log what is otherwise left out"
    )


def run(args: argparse.Namespace) -> int:
    """Relay until SIGINT, SIGTERM or SIGHUP; 0. Raises `UsageError`, and `NodeError` for what keeps it from starting."""
    if args.open and args.join is not None:
        raise UsageError(
            "--open and --join exclude each other: the one is for everybody, the other for members."
        )
    import trio

    from libmesh_node.relay_node import RelayOptions, run_relay

    chosen = RelayOptions(
        token=args.join,
        open_to_all=args.open,
        port=args.bind_port,
        websocket_port=args.bind_ws,
        announce=tuple(dict.fromkeys(args.announce_addr)),
        max_peers=args.max_peers,
        max_circuits=args.max_circuits,
        bandwidth=args.bandwidth,
        bandwidth_per_peer=args.peer_bandwidth,
        data_dir=args.data_dir or default_data_dir() / "relay",
        json_logs=args.json_logs,
        verbose=bool(args.verbose),
    )
    trio.run(partial(run_relay, chosen))
    return 0


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 100000")
    return int(text)


def _megabits(text: str) -> float:
    """Bytes a second, from Mbit/s."""
    if not (value := options.rate(text)):
        raise argparse.ArgumentTypeError("0 is no rate for a relay; leave the flag out for no limit")
    return value
