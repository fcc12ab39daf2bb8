"""Our own peer keeps every rule of the suite. This is also how another implementation's tests use it."""

from __future__ import annotations

from libmesh.testing.conformance.cases import test_rule

__all__ = ["test_rule"]
