"""What the command line asked of a node, checked and frozen, and the words that its values are written in."""

from __future__ import annotations

import argparse
import ipaddress
import math
import re
from dataclasses import dataclass
from pathlib import Path

from libmesh_node.datadir import default_data_dir
from libmesh_node.errors import UsageError

DEFAULT_API_PORT = 9337
DEFAULT_CONSOLE_PORT = 3131

LAN = "lan"
"""In place of an invite: look for a mesh on this LAN."""

_INVITE_FILE_LIMIT = 64 << 10
_LONGEST_TTL = 10 * 365 * 86400.0
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """Everything that `libmesh-node` without a subcommand can be told.

    Attributes:
        models: what `--model` said, in order: paths or names. Empty on a client.
        join: invite tokens, in order; files that held them have been read.
        join_files: the files that some of these were read from.
        join_lan: join only a mesh that has nodes on this LAN: of those invited to, or the one joined before.
        client: only use the mesh; serve nothing.
        api_port: 0 picks a free one, as do all ports here.
        bind_port: port on which peers connect; `None` picks a free one.
        bind_ws: port on which peers connect by WebSocket; `None` for none.
        listen_all: API and console listen on every interface, not only on loopback.
        bin_dir: where to look first for the llama.cpp programs.
        max_vram_gb: cap, in units of 1e9 bytes, on the memory that models may take; `None` for no cap.
        device: passed on to llama.cpp as it is.
        split: serve models together with other nodes even if they fit here.
        min_peers: wait for as many other nodes with a model before it is split.
        tensor_split: shares of the workers, nearest first, then of the host; empty follows memory.
        max_rtt_ms: workers farther away are not taken.
        draft: a small model that guesses ahead for the models served here; `None` for none.
        draft_max: guesses at once.
        idle_unload: seconds without a request after which a model's server is ended until the next one; `None`: never.
        data_dir: ignored with `ephemeral`.
        lan: find members on the LAN, and be found by them.
        map_port: ask the router to forward the port that peers connect to.
        announce_addresses: multiaddrs that peers are told to reach this node at, besides those found.
        offline: dial nobody but on private networks and at the addresses of invites, and ask no router for a port.
        relays: multiaddrs of the relays to be reached through, instead of those that members are.
        relay_rate: bytes a second that this node carries for other members as a relay; 0 to be none, `None` without a limit.
        invite_file: where to write an invite at start, mode 600.
    """

    models: tuple[str, ...] = ()
    join: tuple[str, ...] = ()
    join_files: tuple[Path, ...] = ()
    join_lan: bool = False
    client: bool = False
    api_port: int = DEFAULT_API_PORT
    console_port: int = DEFAULT_CONSOLE_PORT
    bind_port: int | None = None
    bind_ws: int | None = None
    listen_all: bool = False
    bin_dir: Path | None = None
    max_vram_gb: float | None = None
    device: str | None = None
    split: bool = False
    min_peers: int = 0
    tensor_split: tuple[float, ...] = ()
    max_rtt_ms: float = 80.0
    draft: Path | None = None
    draft_max: int = 8
    idle_unload: float | None = None
    data_dir: Path
    ephemeral: bool = False
    announce_addresses: tuple[str, ...] = ()
    map_port: bool = True
    lan: bool = True
    offline: bool = False
    relays: tuple[str, ...] = ()
    relay_rate: float | None = None
    invite_file: Path | None = None
    json_logs: bool = False
    verbose: bool = False


def node_options(args: argparse.Namespace) -> NodeOptions:
    """The options that parsed arguments stand for. Raises `UsageError` where they contradict each other."""
    serving = {
        "--model": args.model,
        "--split": args.split,
        "--min-peers": args.min_peers,
        "--tensor-split": args.tensor_split,
        "--draft": args.draft,
        "--max-vram": args.max_vram,
        "--idle-unload": args.idle_unload,
    }
    about_serving = next((flag for flag, given in serving.items() if given), None)
    if args.client and about_serving is not None:
        raise UsageError(
            f"--client and {about_serving} exclude each other: a client only uses what others serve. Drop one of them."
        )
    if args.ephemeral and args.data_dir is not None:
        raise UsageError(
            "--ephemeral and --data-dir exclude each other: an ephemeral node keeps nothing. Drop one of them."
        )
    ports = [port for port in (args.port, console_port(args), args.bind_port, args.bind_ws) if port]
    if len(set(ports)) < len(ports):
        raise UsageError("--port, --console, --bind-port and --bind-ws must be different ports.")
    return NodeOptions(
        models=tuple(dict.fromkeys(args.model)),
        join=tuple(dict.fromkeys(token for token in args.join if token != LAN)),
        join_files=tuple(dict.fromkeys(token.file for token in args.join if isinstance(token, FileToken))),
        join_lan=LAN in args.join,
        client=args.client,
        api_port=args.port,
        console_port=console_port(args),
        bind_port=args.bind_port or None,
        bind_ws=args.bind_ws,
        listen_all=args.listen_all,
        bin_dir=args.bin_dir,
        max_vram_gb=args.max_vram,
        device=args.device,
        split=args.split,
        min_peers=args.min_peers,
        tensor_split=args.tensor_split,
        max_rtt_ms=args.max_rtt,
        draft=None if args.no_draft else args.draft,
        draft_max=args.draft_max,
        idle_unload=args.idle_unload,
        data_dir=data_dir(args),
        ephemeral=args.ephemeral,
        map_port=not args.no_port_mapping,
        lan=not args.no_lan,
        announce_addresses=tuple(dict.fromkeys(args.announce_addr)),
        offline=args.offline,
        relays=tuple(dict.fromkeys(args.relay)),
        relay_rate=args.relay_bandwidth,
        invite_file=args.invite_file,
        json_logs=args.json_logs,
        verbose=args.verbose,
    )


def data_dir(args: argparse.Namespace) -> Path:
    """The data folder that `args` names, or the user's own."""
    chosen: Path | None = args.data_dir
    return default_data_dir() if chosen is None else chosen


def console_port(args: argparse.Namespace) -> int:
    """The port at which a node's console shall listen; 0 is a choice, not an absence."""
    chosen: int | None = args.console
    return DEFAULT_CONSOLE_PORT if chosen is None else chosen


def add_node_choice(parser: argparse.ArgumentParser) -> None:
    """The flags that say which node a command is about; without them, the one on the user's own data folder.

    They have no default, so that the same flags in front of the command count.
    """
    which = parser.add_argument_group("which node")
    which.add_argument(
        "--data-dir", type=path, metavar="DIR", default=argparse.SUPPRESS,
        help=f"the one on this data folder (default: {default_data_dir()})",
    )  # fmt: skip
    which.add_argument(
        "--console", type=fixed_port, metavar="PORT", default=argparse.SUPPRESS,
        help="the one whose web console is at this port",
    )  # fmt: skip
    which.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def port(text: str) -> int:
    """A TCP port. 0 asks for any free one."""
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number from 0 (any free one) to 65535")
    return int(text)


def fixed_port(text: str) -> int:
    """A TCP port that something listens on, so not 0."""
    if port(text) == 0:
        raise argparse.ArgumentTypeError("0 is no port to reach something at; give a number from 1 to 65535")
    return int(text)


def duration(text: str) -> float:
    """Seconds, from `30s`, `15m`, `12h`, `7d` or `52w`. A unit is required; at most ten years."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([smhdw])", text.strip().lower(), re.ASCII)
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0 < seconds <= _LONGEST_TTL:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write 30s, 15m, 12h, 7d or 52w")
    return seconds


def seconds(text: str) -> float:
    """Seconds as a plain number, or a duration with a unit."""
    try:
        value = float(text)
    except ValueError:
        return duration(text)
    if not 0 < value <= _LONGEST_TTL:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; give seconds, such as 600, or 10m")
    return value


def gigabytes(text: str) -> float:
    """A positive number of gigabytes (1e9 bytes), with or without `GB` behind it."""
    try:
        value = float(re.sub(r"\s*gb?$", "", text.strip(), flags=re.IGNORECASE))
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; give gigabytes, such as 8 or 0.5")
    return value


def rate(text: str) -> float:
    """Bytes a second, from Mbit/s; 0 is none at all."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; give Mbit/s, such as 100 or 2.5")
    return value * 1e6 / 8


def count(text: str) -> int:
    """A whole number from 0 to 4096."""
    if not (text.isascii() and text.isdigit()) or int(text) > 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; give a whole number from 0 to 4096")
    return int(text)


def milliseconds(text: str) -> float:
    """A positive number of milliseconds, with or without `ms` behind it."""
    try:
        value = float(text.strip().removesuffix("ms"))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; give milliseconds, such as 80")
    return value


def ratios(text: str) -> tuple[float, ...]:
    """Two to 17 shares that are not negative, separated by commas, with at least one above zero."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not 2 <= len(values) <= 17 or not all(0 <= value < math.inf for value in values) or not sum(values):
        raise argparse.ArgumentTypeError(f"{text!r} are no shares; write them like 3,1")
    return values


def path(text: str) -> Path:
    """A path, with `~` resolved, absolute, so that it stays right wherever it is used."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # what pathlib raises for `~nobody`
        raise argparse.ArgumentTypeError(f"{text!r} names the home of a user who does not exist") from error


def model(text: str) -> str:
    """A model for the running node, which looks from another folder: a file that is here by its whole path, or a name."""
    file = path(text)
    try:
        return str(file) if file.is_file() else text
    except OSError:  # too long to be a file's name
        return text


def target(text: str) -> str:
    """`HOST:PORT`, or `[IPV6]:PORT`, of something that listens."""
    host, colon, number = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not bracketed) or any(c.isspace() or c == "/" for c in host):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:5432 or [::1]:5432")
    fixed_port(number)
    return text


def multiaddr(text: str) -> str:
    """A multiaddr with a host and a port, as others can dial it; its details are checked when it is used."""
    match = re.fullmatch(r"/(ip4|ip6|dns|dns4|dns6)/([^/\s]+)/(tcp|udp)/(\d{1,5})(/[^\s]+)?", text, re.ASCII)
    if match is None or int(match[4]) > 65535 or not _is_host(match[1], match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no multiaddr, such as /ip4/203.0.113.7/tcp/4001")
    return text


def _is_host(kind: str, host: str) -> bool:
    try:
        return kind.startswith("dns") or ipaddress.ip_address(host).version == int(kind[2])
    except ValueError:
        return False


def relay(text: str) -> str:
    """The multiaddr of a relay, with its peer id."""
    multiaddr(text)
    if not re.fullmatch(r".+/p2p/[1-9A-HJ-NP-Za-km-z]{40,64}", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"{text!r} does not name its relay; it ends in /p2p/ and a peer id, as `libmesh-node relay` prints it"
        )
    return text


class FileToken(str):
    """An invite token with the file that it was read from, which may hold a newer one later."""

    __slots__ = ("file",)
    file: Path


def invite(text: str) -> str:
    """An invite token, from the text itself or from the file that `@FILE` or a path names.

    `lan` stands for itself. Only looks at where the token comes from; whether it is valid is for the mesh to say. A file may hold at most
    64 KiB; the token is its first line that is not blank.
    """
    if text.strip().lower() == LAN:
        return LAN
    named = text.startswith("@")
    if not named and not _looks_like_a_path(text):
        return text.strip()
    file = path(text[1:] if named else text)
    try:
        with file.open("rb") as opened:
            content = opened.read(_INVITE_FILE_LIMIT + 1)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read the invite file {file}: {error.strerror}") from error
    lines = content.decode("utf-8", "replace").split()
    if len(content) > _INVITE_FILE_LIMIT or len(lines) != 1:
        raise argparse.ArgumentTypeError(f"{file} is no invite file: it must hold one token and nothing else")
    token = FileToken(lines[0])
    token.file = file
    return token


def _looks_like_a_path(text: str) -> bool:
    """Tokens have no separator and no dot at the front; a short name may still be that of a file right here."""
    if text.startswith((".", "/", "~")):
        return True
    try:
        return len(text) < 255 and Path(text).is_file()
    except (OSError, ValueError):
        return False
