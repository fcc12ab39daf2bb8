"""`python -m libmesh.testing.conformance`: the same as `libmesh conformance`."""

import sys

from libmesh.testing.command import main

sys.exit(main(["conformance", *sys.argv[1:]]))
