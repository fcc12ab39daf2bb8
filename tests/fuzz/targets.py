"""All fuzz targets, by name, and the inputs that were kept of each: lines of base64 in `corpus/NAME.txt`."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

from tests.fuzz.channels import CHANNELS
from tests.fuzz.connections import CONNECTIONS
from tests.fuzz.machines import MACHINES
from tests.fuzz.messages import DECODERS
from tests.fuzz.program import PROGRAM
from tests.fuzz.rpc import RPC
from tests.fuzz.target import Target
from tests.fuzz.tls import TLS

TARGETS: dict[str, Target] = {
    target.name: target for target in (*MACHINES, *DECODERS, *CHANNELS, *TLS, *CONNECTIONS, *PROGRAM, *RPC)
}

CORPUS = Path(__file__).resolve().parent / "corpus"


def kept_inputs(name: str) -> list[bytes]:
    """The inputs that were kept of a target; none at first."""
    path = CORPUS / f"{name}.txt"
    return [base64.b64decode(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep_inputs(name: str, inputs: Iterable[bytes]) -> None:
    """Replace the inputs that are kept of a target."""
    CORPUS.mkdir(exist_ok=True)
    lines = [base64.b64encode(data).decode() for data in inputs if data]
    (CORPUS / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
