"""`libmesh-node` without a command: runs a node until it is stopped."""

from __future__ import annotations

import argparse
from functools import partial

from libmesh_node import options
from libmesh_node.datadir import default_data_dir


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of a node, in groups, as `--help` shows them."""
    serving = parser.add_argument_group("models")
    serving.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="PATH|NAME",
        help="serve this model: a .gguf file, the name of one in a models folder, or 'demo' (repeatable: all that fit are "
        "served here, the rest are wanted by the mesh)",
    )
    serving.add_argument(
        "--idle-unload",
        type=options.seconds,
        metavar="SECONDS",
        help="end the server of a model that nobody has asked for so long; the next request starts it again, and waits",
    )
    serving.add_argument("--client", action="store_true", help="serve nothing; only use what others serve")
    serving.add_argument(
        "--max-vram", type=options.gigabytes, metavar="GB", help="take at most this much memory for models"
    )
    serving.add_argument(
        "--device", metavar="NAME", help="the device that llama.cpp shall use (default: its choice)"
    )
    serving.add_argument(
        "--bin-dir",
        type=options.path,
        metavar="DIR",
        help="where llama-server is, if neither on PATH nor installed by 'libmesh-node engine install'",
    )

    splitting = parser.add_argument_group("models too large for one machine")
    splitting.add_argument(
        "--split", action="store_true", help="serve models together with other nodes even if they fit here"
    )
    splitting.add_argument(
        "--min-peers",
        type=options.count,
        default=0,
        metavar="N",
        help="split a model only once N other nodes have it",
    )
    splitting.add_argument(
        "--tensor-split",
        type=options.ratios,
        default=(),
        metavar="R,R",
        help="shares of the workers, nearest first, then of the host (default: by memory)",
    )
    splitting.add_argument(
        "--max-rtt",
        type=options.milliseconds,
        default=80.0,
        metavar="MS",
        help="take no workers whose round trip is longer (default: %(default)g)",
    )
    splitting.add_argument(
        "--draft",
        type=options.path,
        metavar="PATH",
        help="a small model with the same vocabulary that guesses ahead for the models served here",
    )
    splitting.add_argument("--no-draft", action="store_true", help="guess nothing ahead")
    splitting.add_argument(
        "--draft-max",
        type=options.count,
        default=8,
        metavar="N",
        help="tokens to guess at once (default: %(default)s)",
    )

    mesh = parser.add_argument_group("mesh")
    mesh.add_argument(
        "--join",
        action="append",
        default=[],
        type=options.invite,
        metavar="TOKEN",
        help="join the mesh of this invite: the token, or @FILE that holds it (repeatable; the first that works wins). "
        "'lan' tells which meshes are on this LAN, and joins one of them that an invite is given for",
    )
    mesh.add_argument(
        "--invite-file",
        type=options.path,
        metavar="PATH",
        help="write an invite to this mesh there, mode 600",
    )
    mesh.add_argument(
        "--bind-port",
        type=options.port,
        metavar="PORT",
        help="accept peers at this port (default: a free one)",
    )
    mesh.add_argument(
        "--bind-ws",
        type=options.port,
        metavar="PORT",
        help="accept peers by WebSocket, too, at this port; 0 for any free one. A proxy that ends TLS may stand before "
        "it: --announce-addr /dns4/HOST/tcp/443/wss",
    )
    mesh.add_argument(
        "--announce-addr",
        action="append",
        default=[],
        type=options.multiaddr,
        metavar="MULTIADDR",
        help="tell peers that this node is reachable there too, e.g. behind a port forwarding (repeatable)",
    )
    mesh.add_argument(
        "--no-port-mapping",
        action="store_true",
        help="do not ask the router to forward the port that peers connect to",
    )
    mesh.add_argument(
        "--no-lan",
        action="store_true",
        help="do not look for members on this LAN, nor be found by them there",
    )
    mesh.add_argument(
        "--offline",
        action="store_true",
        help="use nothing beyond this LAN but the addresses in invites: no public servers, no names, no port of the router's",
    )
    mesh.add_argument(
        "--relay",
        action="append",
        default=[],
        type=options.relay,
        metavar="MULTIADDR",
        help="be reached through this relay, and not through those of members (repeatable)",
    )
    mesh.add_argument(
        "--relay-bandwidth",
        type=options.rate,
        metavar="MBIT",
        help="carry at most so many Mbit/s for members that cannot reach each other, where this node can be dialled; 0 to carry nothing "
        "(default: no limit)",
    )

    serves = parser.add_argument_group("API and console")
    serves.add_argument(
        "--port",
        type=options.port,
        default=options.DEFAULT_API_PORT,
        metavar="PORT",
        help="port of the OpenAI-compatible API (default: %(default)s; 0 for any free one)",
    )
    serves.add_argument(
        "--console",
        type=options.port,
        metavar="PORT",
        help=f"port of the web console (default: {options.DEFAULT_CONSOLE_PORT}; 0 for any free one)",
    )
    serves.add_argument(
        "--listen-all",
        action="store_true",
        help="let other machines use the API and the console too (default: only this machine)",
    )

    keeps = parser.add_argument_group("what it keeps and says")
    keeps.add_argument(
        "--data-dir",
        type=options.path,
        metavar="DIR",
        help=f"identity, keys, logs; one node at a time (default: {default_data_dir()})",
    )
    keeps.add_argument(
        "--ephemeral", action="store_true", help="keep nothing: a new identity that ends with the node"
    )
    keeps.add_argument("--json-logs", action="store_true", help="log lines on stderr as JSON objects")
    keeps.add_argument("--verbose", action="store_true", help="log what is otherwise left out")


def run(args: argparse.Namespace) -> int:
    """Run a node until Ctrl-C, SIGTERM, SIGHUP or `libmesh-node stop`; its exit status.

    Raises `UsageError` for options that contradict each other.
    """
    chosen = options.node_options(args)
    # Late, so that --help and the other commands need not wait for libp2p and aiohttp to load.
    import trio

    from libmesh_node.starting import run_node

    return trio.run(partial(run_node, chosen))
