"""Targets for the machines of `core/`: any use by us, any events from peers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache

from libmesh import keys, wire
from libmesh.core import liveness
from libmesh.core import membership_io as io
from libmesh.core.announcement import Record
from libmesh.core.credentials import Revocation
from libmesh.core.liveness import Liveness
from libmesh.core.membership import MAX_PEERS, Membership
from libmesh.core.summary import Digest
from libmesh.core.yamux import Yamux
from libmesh.core.yamux_frames import (
    DATA,
    HEADER,
    PING,
    SPEC_WINDOW,
    SYN,
    WINDOW_UPDATE,
    Data,
    Event,
    Options,
)
from libmesh.peers import PeerId, Scope, Service
from libmesh.wire_pieces import WireError
from tests.fuzz.target import Lots, Target
from tests.members import HOUR, MESH, NOW, credential, membership, peer, record, seed

SMALL = Options(
    max_inbound=8, backlog=4, max_unacknowledged=4, max_unread=2 * SPEC_WINDOW, window_budget=SPEC_WINDOW
)
MOST_CONTROL = 2 * 1024 * 1024  # bytes of control frames: what a peer that never reads can pile up
LENGTHS = (0, 1, 2, 100, 65535, SPEC_WINDOW - 1, SPEC_WINDOW, SPEC_WINDOW + 1, 2**31, 2**32 - 1)


# ── yamux ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _yamux_bytes(data: bytes) -> None:
    lots = Lots(data)
    initiator, step = bool(lots.below(2)), 1 + lots.number()
    whole, cut = (Yamux(initiator=initiator, now=0.0, options=SMALL) for _ in range(2))
    for machine in (whole, cut):
        machine.open(0.0)
        machine.take_control()
    rest = lots.rest()
    at_once = whole.receive(rest, 0.0)
    in_pieces = [
        event for start in range(0, len(rest), step) for event in cut.receive(rest[start : start + step], 0.0)
    ]
    assert _joined(at_once) == _joined(in_pieces)
    for machine in (whole, cut):
        _bounded(machine)
    assert whole.take_control() == cut.take_control()


def _joined(events: list[Event]) -> tuple[list[Event], dict[int, bytes]]:
    got: dict[int, bytes] = {}
    others: list[Event] = []
    for event in events:
        if isinstance(event, Data):
            got[event.stream] = got.get(event.stream, b"") + event.data
        else:
            others.append(event)
    return others, got


def _bounded(machine: Yamux) -> None:
    table = machine.table
    assert 0 <= table.windows.unread <= SMALL.max_unread
    assert 0 <= table.unaccepted <= SMALL.backlog
    assert 0 <= table.unacknowledged <= SMALL.max_unacknowledged
    assert 0 <= table.inbound <= SMALL.max_inbound
    for stream in table.states.values():
        assert stream.receive_window >= 0
        assert 0 <= stream.send_window < 2**32


def _yamux_use(data: bytes) -> None:
    """Calls of a driver's, in any order a driver could make them, between frames of a peer's."""
    lots = Lots(data)
    machine = Yamux(initiator=bool(lots.below(2)), now=0.0, options=SMALL)
    now = 0.0
    unread: dict[int, int] = {}
    released: set[int] = set()
    while lots:
        stream_id = lots.below(16)
        match lots.below(13):
            case 0 | 1 | 2 | 3:
                kind, flags = lots.one_of((DATA, WINDOW_UPDATE, DATA, WINDOW_UPDATE, PING, 3)), lots.below(16)
                body = lots.piece() if kind == DATA else b""
                length = len(body) if kind == DATA and lots.below(4) else lots.one_of(LENGTHS)
                for event in machine.receive(HEADER.pack(0, kind, flags, stream_id, length) + body, now):
                    if isinstance(event, Data):
                        unread[event.stream] = unread.get(event.stream, 0) + len(event.data)
            case 4:
                if not machine.closing:
                    machine.open(now)
            case 5:
                machine.accept(stream_id)
            case 6:
                machine.consumed(stream_id, unread.pop(stream_id, 0), now)
            case 7:
                machine.finish(stream_id, linger_from=now if lots.below(2) else None)
            case 8:
                if stream_id not in released:
                    left = unread.pop(stream_id, 0)
                    machine.abandon(stream_id, unread=left > 0, now=now)
                    machine.consumed(stream_id, left, now)
            case 9:
                machine.reset(stream_id)
            case 10:
                header, count = machine.data(stream_id, 1 + lots.one_of(LENGTHS))
                assert count == (HEADER.unpack(header)[4] if header else 0)
                machine.writable(stream_id)
            case 11:
                now = max(now, min(machine.deadline(), 1e9)) + lots.number() / 16
                machine.tick(now)
                assert machine.broken is not None or machine.deadline() > now
            case 12:
                assert len(machine.take_control()) < MOST_CONTROL
        _bounded(machine)


def _yamux_seeds() -> Iterator[bytes]:
    syn = HEADER.pack(0, WINDOW_UPDATE, SYN, 1, 0)
    yield b"\0\5" + syn + HEADER.pack(0, DATA, 0, 1, 5) + b"hello" + HEADER.pack(0, WINDOW_UPDATE, 4, 1, 0)
    yield b"\1\1" + HEADER.pack(0, WINDOW_UPDATE, 2, 1, 0) + HEADER.pack(0, PING, SYN, 0, 7)
    yield b"\0\x0b" + b"".join(HEADER.pack(0, WINDOW_UPDATE, SYN, 1 + 2 * n, 0) for n in range(20))
    yield b"\0\1" + HEADER.pack(0, 3, 0, 0, 0) + syn


# ── membership ───────────────────────────────────────────────────────────────────────────────────────────────────

PEERS = 8


@lru_cache(maxsize=4096)
def _record(number: int, incarnation: int, sequence: int, leaving: bool, expires: bool) -> Record:
    chain = credential(number)
    if expires:
        invite = MESH.delegate(scope=Scope.CLIENT, not_after_unix=NOW + HOUR, seed=seed(300 + number))
        chain = invite.admit(keys.public_key(seed(number)))
    return record(number, credential=chain, incarnation=incarnation, sequence=sequence, leaving=leaving)


@lru_cache(maxsize=16)
def _revocation(number: int) -> Revocation:
    return MESH.revoke(_record(number, 1, 1, False, True).announcement.credential.links)


def _event(lots: Lots) -> io.Event | None:
    """What a peer, or the network, can make happen."""
    number = 1 + lots.below(PEERS)
    match lots.below(13):
        case 0 | 1:
            made = _record(number, lots.below(4), lots.below(8), lots.below(8) == 7, lots.below(4) == 3)
            return io.RecordHeard(made, gossiped=bool(lots.below(2)))
        case 2:
            return io.RevocationHeard(_revocation(number), gossiped=bool(lots.below(2)))
        case 3:
            return io.SuspicionHeard(io.Suspicion(peer(number), lots.number(8), lots.number(8)))
        case 4:
            ages = {peer(1 + n): (lots.number(), lots.number()) for n in range(PEERS) if lots.below(2)}
            return io.DigestHeard(Digest(ages, frozenset(p for p in ages if lots.below(2))))
        case 5:
            return io.PeerSilent(peer(number))
        case 6:
            return io.PeerHeard(peer(number))
        case 7:
            return io.Connected(peer(number))
        case 8:
            return io.Disconnected(peer(number))
        case 9:
            return io.DialFailed(peer(number))
        case 10:
            return io.SelfChanged(
                tuple(Service(name=name) for name in "ab"[: lots.below(3)]), (), lots.piece()
            )
        case 11:
            return _rare(lots.below(32), lots)
        case _:
            return _said(lots.piece())


def _rare(lot: int, lots: Lots) -> io.Event:
    """What happens to a node seldom."""
    match lot:
        case 31:
            return io.Leave()
        case 30:
            return io.TakePart()
        case 29:
            return io.Renewed(credential(1))
        case 28:
            return io.Slept(float(lots.number(2)))
        case 27:
            return io.ContactNamed(peer(1 + lots.below(PEERS)), ("/ip4/192.0.2.9/tcp/1",))
    return io.Wake()


def _said(data: bytes) -> io.Event | None:
    try:
        said = wire.decode_gossip(data)
    except WireError:
        return None
    match said:
        case Record():
            return io.RecordHeard(said, gossiped=True)
        case Revocation():
            return io.RevocationHeard(said, gossiped=True)
        case io.Suspicion():
            return io.SuspicionHeard(said)
    return None


def _membership(data: bytes) -> None:
    lots, machine, now = Lots(data), membership(1), float(NOW)
    left = False
    while lots:
        event = io.Wake() if lots.below(4) == 0 else _event(lots)
        if event is None:
            continue
        if isinstance(event, io.Wake):
            due = machine.deadline()
            now = max(now, min(due or now, now + 1000)) if lots.below(2) else now + lots.number() / 16
        if isinstance(event, io.Slept):
            now += event.seconds
        effects = machine.handle(event, now)
        left = left or isinstance(event, io.Leave)
        if isinstance(event, io.Wake):
            assert left or (machine.deadline() or 0) > now
        for effect in effects:
            assert getattr(effect, "peer", None) != peer(1), f"it does something to itself: {effect}"
            if isinstance(effect, io.Publish):
                wire.decode_gossip(wire.encode_gossip(effect.said))
        _sound(machine)


def _sound(machine: Membership) -> None:
    view = machine.view(lambda _: None)
    assert len(view.peers) <= MAX_PEERS
    digest = machine.digest()
    assert wire.decode_digest(wire.encode_digest(digest)) == digest
    assert all(p != peer(1) for p in machine.watched[0])
    assert not machine.newer_than(digest)


# ── liveness ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _liveness(data: bytes) -> None:
    lots, now = Lots(data), 0.0
    machine = Liveness(rng=random.Random(1))
    everybody = [peer(number) for number in range(2, 8)]
    watched: frozenset[PeerId] = frozenset()

    def some() -> frozenset[PeerId]:
        chosen = lots.number()
        return frozenset(p for bit, p in enumerate(everybody) if chosen >> bit & 1)

    while lots:
        event: liveness.Event
        match lots.below(4):
            case 0:
                watched = some()
                nearby = {p: tuple(some()) for p in some()} if lots.below(2) else None
                event = liveness.Watch(watched, some(), some() if lots.below(2) else None, nearby)
            case 1:
                event = liveness.Doubt(lots.one_of(everybody))
            case 2:
                event = liveness.Answered(lots.one_of(everybody))
            case _:
                due = machine.deadline()
                now = max(now, due if due is not None and lots.below(2) else now + lots.number() / 16)
                event = liveness.Wake()
        effects = machine.handle(event, now)
        if isinstance(event, liveness.Wake):
            due = machine.deadline()
            assert due is None or due > now
        for effect in effects:
            assert effect.peer in watched
            if isinstance(effect, liveness.PingThrough):
                assert effect.peer not in effect.helpers


MACHINES = (
    Target("yamux", "any bytes, cut anywhere, mean the same and raise nothing", _yamux_bytes, _yamux_seeds),
    Target("yamux_use", "any use beside any frames raises nothing and keeps every bound", _yamux_use),
    Target("membership", "any events raise nothing, and waking moves the deadline on", _membership),
    Target("liveness", "any events raise nothing, and only the watched are probed", _liveness, longest=512),
)
