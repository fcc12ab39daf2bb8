"""`python -m libmesh_node` is `libmesh-node`."""

import sys

from libmesh_node.main import main

sys.exit(main())
