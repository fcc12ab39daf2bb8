"""The RPC-aware ends of the tunnel between a host's llama-server and a worker's rpc-server.

    llama-server ─TCP─ host end ═══ stream of the mesh ═══ worker end ─TCP─ rpc-server
                       host.py        (frames.py)          worker.py

Both ends are machines without I/O; `ends.py` moves their bytes. What they are for:

- Weights never travel. The host's end compares what llama-server uploads with its own file and sends a reference; the
  worker's end sends those bytes to its rpc-server from its own copy. Both files are proven equal before.
- What can be known is answered on the spot, so that no round trip is spent on it.
- rpc-server is as good as a shell: the worker's end lets through only what a host needs, within what it was granted.
"""
