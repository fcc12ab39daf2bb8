"""`make lab`, or `python -m tests.netlab [SITE ...] [--delay MS]`: real nodes behind real routers, to play with.

Each SITE is a kind of `Kind`, with `x2` behind it for two hosts on one LAN; the first must be public and founds the mesh.
Ctrl-C takes everything down.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.netlab.figures import tell_figures
from tests.netlab.lab import PORT, Host, Kind, Lab, Site, open_lab
from tests.netlab.losses import tell_losses

_DEFAULT = ("public", "upnp", "conex2", "cone", "symmetric")
_PATIENCE = 60.0


def main() -> int:
    """Build it, say how to enter, and wait for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tests.netlab", description=__doc__)
    kinds = ", ".join(kind.value for kind in Kind)
    parser.add_argument("sites", nargs="*", default=_DEFAULT, metavar="SITE", help=f"any of {kinds}")
    parser.add_argument(
        "--delay", type=float, default=10.0, metavar="MS", help="of each site's cable, one way"
    )
    parser.add_argument(
        "--figures", action="store_true", help="measure how fast peers reach each other, and end"
    )
    parser.add_argument(
        "--losses",
        action="store_true",
        help="measure how soon a pulled cable is known, and end (four minutes)",
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with open_lab() as lab:
            if args.figures:
                tell_figures(lab, args.delay / 1000, _say)
                return 0
            if args.losses:
                tell_losses(lab, args.delay / 1000, _say)
                return 0
            _populate(lab, args.sites, args.delay / 1000)
            _say("\nCtrl-C ends all of it.")
            threading.Event().wait()
    except KeyboardInterrupt:
        return 0
    return 0


def _populate(lab: Lab, sites: list[str], delay: float) -> None:
    invite = lab.folder / "invite"
    for text in sites:
        kind, _, count = text.partition("x")
        site = lab.site(Kind(kind), hosts=int(count or 1), delay=delay)
        for number, host in enumerate(site.hosts):
            start_node(host, lab.folder, invite, PORT + number)
            _tell(site, host, lab.folder)


def start_node(host: Host, folder: Path, invite: Path, port: int = PORT) -> subprocess.Popen[bytes]:
    """A node on the host: the founder if there is no invite yet, else a member. It ends with the lab.

    Several behind one router need ports of their own, as they have unless told otherwise: to all others they have one address.
    """
    founds = not invite.exists()
    with (folder / f"{host.name}.log").open("wb") as said:
        process: subprocess.Popen[bytes] = host.popen(
            "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host.name,
            sys.executable, "-m", "libmesh_node", "--data-dir", str(folder / host.name), "--bind-port", str(port),
            *(("--invite-file", str(invite)) if founds else ("--join", f"@{invite}")),
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + _PATIENCE
    while founds and not invite.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise OSError(f"the founder did not start: {(folder / f'{host.name}.log').read_text()}")
        time.sleep(0.05)
    return process


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _tell(site: Site, host: Host, folder: Path) -> None:
    where = f"seen as {site.public}" if site.router else "public"
    _say(f"{host.name:<12} {host.address:<14} {where}")
    program = Path(sys.executable).with_name("libmesh-node")
    where = f"nsenter --net={host.namespace.file} {program}"
    _say(f"             {where} status --data-dir {folder / host.name}   (or: doctor)")


if __name__ == "__main__":
    sys.exit(main())
