"""What `libmesh-node doctor` finds, from a node's status: findings in plain words, and what to do about each. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

Json = Mapping[str, Any]

BAD_RTT_MS = 400.0
"""Above this a relay is slow enough to be felt in every request."""


class Grade(Enum):
    """How a finding weighs."""

    GOOD = "ok"
    NOTE = "note"  # worth knowing; things work
    BAD = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: in a word or two.
        text: what was found, in a sentence.
        advice: what to do; empty if nothing.
    """

    topic: str
    grade: Grade
    text: str
    advice: str = ""


def examine(status: Json, clock_set: bool | None = None) -> list[Finding]:
    """All findings, in the order in which a person wants them.

    Args:
        status: what `/api/status` says.
        clock_set: whether the system says that its clock is kept right; `None` if it does not say.
    """
    reach = _object(status, "reachability")
    peers = [peer for peer in _objects(status, "peers") if peer.get("state") in ("alive", "suspect")]
    return [
        _mesh(status, peers),
        _address(status, reach),
        _port(reach),
        _router(reach, only_web=_only_web(peers)),
        _mapping(reach),
        *_web(status, peers),
        *_relays(reach),
        *_clock(clock_set),
        *(_peer(peer, public=reach.get("standing") == "public") for peer in peers),
    ]


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing is wrong."""
    return all(finding.grade is not Grade.BAD for finding in findings)


def _mesh(status: Json, peers: list[Json]) -> Finding:
    connected = [peer for peer in peers if peer.get("path")]
    if connected:
        return Finding(
            "mesh", Grade.GOOD, f"{_are(len(peers), 'other node')} there, {len(connected)} connected."
        )
    if peers:
        text = f"{_are(len(peers), 'other node')} known, and none is connected."
        return Finding("mesh", Grade.BAD, text, "See the reasons below; a relay helps most (--relay).")
    notices = [str(notice) for notice in status.get("notices") or []]
    if notices:
        if "invite" in notices[0]:  # says itself what to do
            return Finding("mesh", Grade.BAD, notices[0])
        advice = (
            "Is one of the others running, and can this machine reach it? Where nothing but the web gets out, that takes "
            "one of them, or a relay, with --bind-ws behind port 443, and an invite that names it."
        )
        return Finding("mesh", Grade.BAD, notices[0], advice)
    return Finding(
        "mesh",
        Grade.NOTE,
        "No other node is in the mesh yet.",
        "Invite one: `libmesh-node invite`, then `libmesh-node --join TOKEN` on the other machine.",
    )


def _are(count: int, noun: str) -> str:
    return f"1 {noun} is" if count == 1 else f"{count} {noun}s are"


def _address(status: Json, reach: Json) -> Finding:
    own = [str(address) for address in status.get("addresses") or []]
    observed = [str(ip) for ip in reach.get("observed") or []]
    if observed:
        text = f"Others see this node come from {' and '.join(observed[:3])}."
        if len(observed) > 1:
            return Finding("address", Grade.NOTE, text + " Its connections take several ways out.")
        return Finding("address", Grade.GOOD, text)
    if not own:
        return Finding(
            "address", Grade.BAD, "This node has no address.", "Is this machine connected to a network?"
        )
    return Finding(
        "address", Grade.NOTE, f"Nobody far away has told how they see this node. Its own first: {own[0]}."
    )


def _port(reach: Json) -> Finding:
    addresses = _objects(reach, "addresses")
    open_ones = [str(entry.get("address")) for entry in addresses if entry.get("reachable") is True]
    shut = [entry for entry in addresses if entry.get("reachable") is False]
    if open_ones:
        return Finding("port", Grade.GOOD, f"Open: others reach this node at {open_ones[0]}.")
    announced = [entry for entry in shut if entry.get("source") == "announced"]
    if announced:
        text = f"Announced and shut: nobody gets here by {announced[0].get('address')}."
        return Finding(
            "port",
            Grade.BAD,
            text,
            "Check the port forwarding on the router and the firewall of this machine.",
        )
    if any(entry.get("source") == "own" for entry in shut):
        return Finding(
            "port",
            Grade.NOTE,
            "This machine has a public address, but its port is shut.",
            "Let TCP to the port of --bind-port through its firewall.",
        )
    if reach.get("standing") == "private":
        return Finding(
            "port",
            Grade.NOTE,
            "Shut: others cannot dial this node; it dials them, punches holes, or is relayed.",
            "For direct paths with everybody, forward a port on the router: --bind-port PORT here, and "
            "--announce-addr /ip4/YOUR.PUBLIC.IP/tcp/PORT.",
        )
    return Finding(
        "port", Grade.NOTE, "Not known yet: no member far away has tried to dial this node.", "Wait a moment."
    )


def _router(reach: Json, *, only_web: bool) -> Finding:
    nat = reach.get("nat")
    if nat == "none":
        return Finding("router", Grade.GOOD, "None in between: this machine has the address that others see.")
    if nat == "keeps ports":
        return Finding(
            "router", Grade.GOOD, "It keeps ports, so holes can be punched to most other routers (cone)."
        )
    if nat == "changes ports":
        return Finding(
            "router",
            Grade.NOTE,
            "It changes ports (symmetric), so holes can hardly be punched.",
            "Forward a port on it, or rely on nodes that can be dialled and on relays.",
        )
    why = "who is reached by WebSocket only cannot tell" if only_web else "nobody far away is connected"
    return Finding("router", Grade.NOTE, f"Its kind is not known: {why}.")


def _mapping(reach: Json) -> Finding:
    if protocol := reach.get("mapping"):
        mapped = [str(e.get("address")) for e in _objects(reach, "addresses") if e.get("source") == "mapped"]
        return Finding(
            "forwarding", Grade.GOOD, f"The router forwards {' '.join(mapped) or 'a port'} ({protocol})."
        )
    failure = str(reach.get("mapping_failure") or "not tried yet")
    if failure == "not asked for":
        return Finding(
            "forwarding", Grade.NOTE, "No router is asked for a port: --no-port-mapping or --offline."
        )
    tell = reach.get("standing") != "public" and failure != "not tried yet"
    advice = "Switch UPnP on in the router's settings if it may." if tell else ""
    return Finding("forwarding", Grade.NOTE, f"No router forwards a port by itself ({failure}).", advice)


def _is_web(address: str) -> bool:
    return "/p2p-circuit" not in address and bool({"ws", "wss"} & set(address.split("/")[5:]))


def _only_web(peers: list[Json]) -> bool:
    """Whether all that this node is connected to without a relay it is connected to by WebSocket."""
    ways = [str(peer.get("address") or "") for peer in peers if peer.get("path") in ("direct", "punched")]
    return bool(ways) and all(map(_is_web, ways))


def _web(status: Json, peers: list[Json]) -> list[Finding]:
    if _only_web(peers):
        text = "All direct connections are WebSockets: as it seems, nothing but the web gets out of this network."
        advice = "Others are reached through a relay with --bind-ws; let outgoing TCP through the firewall for more."
        return [Finding("web", Grade.NOTE, text, advice)]
    own = [address for address in map(str, status.get("addresses") or []) if _is_web(address)]
    if own:
        return [Finding("web", Grade.GOOD, f"WebSockets are accepted, at {own[0]} first.")]
    return []


def _relays(reach: Json) -> list[Finding]:
    relays, public = _objects(reach, "relays"), reach.get("standing") == "public"
    alone = not public and not any(relay.get("held") is True for relay in relays)
    findings = [
        _relay(relay, alone=alone) for relay in relays if relay.get("held") is True or relay.get("failure")
    ]
    if alone and not findings:
        findings.append(
            Finding(
                "relay",
                Grade.NOTE,
                "None: a node that nobody can dial is reached only by those that it connects to itself.",
                "Any member that can be dialled relays for the others; or run `libmesh-node relay` on a server.",
            )
        )
    return findings


def _relay(relay: Json, *, alone: bool) -> Finding:
    """One at which there is a place, or should be; `alone`: there is none at any, and nobody can dial this node."""
    rtt, where = relay.get("rtt_ms"), f"…{str(relay.get('id', ''))[-8:]} at {relay.get('address')}"
    if relay.get("held") is True:
        far = f", {rtt:.0f} ms away" if isinstance(rtt, int | float) else ""
        text = f"This node can be reached through {where}{far}."
        if isinstance(rtt, int | float) and rtt > BAD_RTT_MS:
            return Finding("relay", Grade.NOTE, text, "Name a nearer one with --relay.")
        return Finding("relay", Grade.GOOD, text)
    text = f"No place at {where}: {_shortened(str(relay.get('failure')))}."
    if alone:
        advice = (
            "Others cannot reach this node now. Is the relay running, and is its address right (--relay)?"
        )
        return Finding("relay", Grade.BAD, text, advice)
    return Finding("relay", Grade.NOTE, text)


def _clock(clock_set: bool | None) -> list[Finding]:
    if clock_set is None:
        return []
    if clock_set:
        return [Finding("clock", Grade.GOOD, "The system keeps it right.")]
    text = "The system does not say that it keeps it right. Invites and memberships end by it."
    return [Finding("clock", Grade.NOTE, text, "Let the system set it from the network (NTP).")]


def _peer(peer: Json, *, public: bool) -> Finding:
    name = str(peer.get("hostname") or "") or f"…{str(peer.get('id', ''))[-8:]}"
    topic, path, rtt = f"peer {name}", peer.get("path"), peer.get("rtt_ms")
    far = f", {rtt:.0f} ms" if isinstance(rtt, int | float) else ""
    if path in ("direct", "punched"):
        return Finding(topic, Grade.GOOD, f"{path}{far}, {peer.get('address') or 'address unknown'}")
    if path == "relayed":
        advice = "If nothing but the web gets out of its network: --bind-ws on this node." if public else ""
        return Finding(
            topic,
            Grade.NOTE,
            f"relayed{far}. Not direct because: {why_not_direct(peer)}",
            advice or "It takes a port that can be dialled, of this node (see `port`) or of that one.",
        )
    return Finding(topic, Grade.NOTE, "not connected; this node connects when it needs to")


def why_not_direct(peer: Json) -> str:
    """Of a peer that is reached through a relay: why each better way failed, a hole punch first, three at most.

    Its private addresses at which somebody else answers here are left out where more is known: they are another network's.
    """
    why = peer.get("why_not_direct")
    reasons = [str(reason) for reason in why] if isinstance(why, list | tuple) else []
    reasons.sort(key=lambda reason: not reason.startswith("punch"))
    tried = list(dict.fromkeys(each for reason in reasons for each in _attempts(reason)))
    telling = [each for each in tried if not _is_elsewhere(each)] or tried
    return "; ".join(map(_shortened, telling[:3])) or "a direct path is being looked for"


def _attempts(reason: str) -> list[str]:
    """Those that a reason tells of: a hole punch tries several addresses."""
    way, _, outcome = reason.partition(": ")
    return [f"punch: {each}" for each in outcome.split("; ")] if way == "punch" else [reason]


def _is_elsewhere(attempt: str) -> bool:
    found = re.search(r"/ip[46]/([0-9a-fA-F.:]+)/", attempt)
    try:
        ip = ipaddress.ip_address(found[1] if found else "")
    except ValueError:
        return False
    return ip.is_loopback or (not ip.is_global and "answered" in attempt)


def _shortened(reason: str) -> str:
    """With peer ids cut to their ends, which tell peers apart."""
    return re.sub(r"\b12D3Koo[1-9A-HJ-NP-Za-km-z]{36,}([1-9A-HJ-NP-Za-km-z]{8})\b", r"…\1", reason)


def _object(source: Json, name: str) -> Json:
    found = source.get(name)
    return found if isinstance(found, Mapping) else {}


def _objects(source: Json, name: str) -> list[Json]:
    found = source.get(name)
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list | tuple) else []
