"""libmesh-node: an OpenAI-compatible API on every machine of a mesh, whichever machine holds the model."""
