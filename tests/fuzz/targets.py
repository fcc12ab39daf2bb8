"""All fuzz targets, by name."""

from __future__ import annotations

from tests.fuzz.channels import CHANNELS
from tests.fuzz.connections import CONNECTIONS
from tests.fuzz.machines import MACHINES
from tests.fuzz.messages import DECODERS
from tests.fuzz.program import PROGRAM
from tests.fuzz.target import Target
from tests.fuzz.tls import TLS

TARGETS: dict[str, Target] = {
    target.name: target for target in (*MACHINES, *DECODERS, *CHANNELS, *TLS, *CONNECTIONS, *PROGRAM)
}
