"""libmesh: authenticated peer-to-peer meshes on py-libp2p and trio."""

__version__ = "0.1.0"
