"""Everything that libmesh raises.

    MeshError
    ├── InviteError            a token cannot be used
    │   ├── InviteMalformed    not a token, cut off, or mistyped
    │   ├── InviteExpired      it was valid once
    │   └── InviteDenied       this node has not the scope to make or use it
    ├── AdmissionRefused       the other side will not have us (or we will not have it); `.reason` says why
    ├── PeerUnreachable        no path worked; `.attempts` says why for each
    ├── ServiceRefused         the peer answered, but not with that service; `.reason` says why
    ├── MeshClosed             the context of `open_mesh` is over
    └── NetworkError           the transport beneath failed
        ├── AddressUnavailable a port is taken or an address is not ours
        └── StreamReset        a stream ended abruptly (in `net/base.py`, as it is trio's error too)

Streams also raise trio's own `BrokenResourceError`, `ClosedResourceError` and `BusyResourceError`, as
`trio.abc.HalfCloseableStream` prescribes; `StreamReset` is a `BrokenResourceError`.
"""

from __future__ import annotations


class MeshError(Exception):
    """Base of all that libmesh raises. The text tells a person what happened and what to do."""


class InviteError(MeshError):
    """An invite cannot be used."""


class InviteMalformed(InviteError):
    """The text is no invite: cut off, mistyped, or of an unknown version."""


class InviteExpired(InviteError):
    """The invite was valid once. `.expired_unix` is when it ended."""

    def __init__(self, message: str, expired_unix: float) -> None:
        super().__init__(message)
        self.expired_unix = expired_unix


class InviteDenied(InviteError):
    """This node's own scope does not allow what was asked."""


class AdmissionRefused(MeshError):
    """Membership was not proved. `.reason` is one of the words in `mesh.proto`, `.peer` the other side."""

    def __init__(self, message: str, *, reason: str, peer: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.peer = peer


class PeerUnreachable(MeshError):
    """No path to a peer worked. `.attempts` maps each address tried to what went wrong with it."""

    def __init__(self, message: str, attempts: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.attempts = dict(attempts or {})


class ServiceRefused(MeshError):
    """The peer was reached and declined. `.reason`: `unknown_service`, `scope`, `busy` or `unavailable`."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class MeshClosed(MeshError):
    """This node has left the mesh: the context of `open_mesh` is over."""

    def __init__(self) -> None:
        super().__init__(
            "this node has left the mesh; what is asked of it belongs inside `async with open_mesh(...)`"
        )


class NetworkError(MeshError):
    """The transport failed."""


class AddressUnavailable(NetworkError):
    """An address cannot be listened on."""
