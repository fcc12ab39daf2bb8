"""Peers that are broken on purpose; see `base`."""

from tests.conformance.mutants import admission as admission
from tests.conformance.mutants import beliefs as beliefs
from tests.conformance.mutants import comparing as comparing
from tests.conformance.mutants import resuming as resuming
from tests.conformance.mutants import streams as streams
from tests.conformance.mutants.base import MUTANTS, Patch, PeerNetwork

__all__ = ["MUTANTS", "Patch", "PeerNetwork"]
