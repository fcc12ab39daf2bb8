"""What clients asked of one node a moment ago: how it crosses from the API to the node, and from a follower to a member."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Requests for one model.

    Attributes:
        digest: of the model. name: what the requests called it.
        requests: that came since the last report.
        waiting: of all that are under way, those that no server has yet.
    """

    digest: str
    name: str
    requests: int = 0
    waiting: int = 0
