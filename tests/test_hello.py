"""The first conversation: who is let in, who is told why not, and what is learned on both sides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from libmesh import hello, keys, syncing, wire
from libmesh.core import membership_io as io
from libmesh.core.credentials import Authority, Credential, Revoked
from libmesh.core.membership import Membership
from libmesh.errors import AdmissionRefused
from libmesh.framing import frame, receive_frame
from libmesh.hello import Greeting
from libmesh.net.base import Stream, StreamReset
from libmesh.peers import Scope
from libmesh.wire_pieces import WireError
from tests.members import (
    HOUR,
    MESH,
    NOW,
    OTHER_MESH,
    credential,
    invited,
    membership,
    memory_streams,
    peer,
    record,
    seed,
)


def greeting(number: int, shown: Credential | None = None, mesh: Authority = MESH) -> Greeting:
    machine = membership(number)
    machine.mesh_id = mesh.mesh_id
    return Greeting("test", shown or credential(number, mesh=mesh), machine, NOW)


async def meet(near: Greeting, far: Greeting) -> tuple[object, object]:
    """Both outcomes: a credential, or what was raised."""
    outcomes: dict[str, object] = {}

    async def side(name: str, coroutine: object) -> None:
        try:
            outcomes[name] = await coroutine  # type: ignore[misc]
        except (AdmissionRefused, WireError, StreamReset) as exc:
            outcomes[name] = exc

    async with memory_streams() as (one, two):

        async def dialler() -> None:
            await side("near", hello.greet(one, near))
            await one.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dialler)
            nursery.start_soon(side, "far", hello.answer(two, far))
    return outcomes["near"], outcomes["far"]


async def test_both_sides_get_the_others_credential() -> None:
    shown = invited(1, Scope.CLIENT, not_after_unix=NOW + HOUR)
    assert await meet(greeting(1, shown), greeting(2)) == (
        hello.Greeted(credential(2)),
        hello.Greeted(shown),
    )


async def test_who_follows_says_so_on_both_sides() -> None:
    one = replace(greeting(1), following=True, attributes=b"laptop")
    assert await meet(one, greeting(2)) == (
        hello.Greeted(credential(2)),
        hello.Greeted(credential(1), following=True, attributes=b"laptop"),
    )
    two = replace(greeting(2), following=True)
    near, _ = await meet(greeting(1), two)
    assert near == hello.Greeted(credential(2), following=True)


async def test_one_too_many_that_follows_is_told_to_come_again_and_others_are_let_in() -> None:
    full = replace(greeting(2), room=False)
    near, far = await meet(replace(greeting(1), following=True), full)
    assert isinstance(near, AdmissionRefused)
    assert isinstance(far, AdmissionRefused)
    assert (near.reason, far.reason) == ("busy", "busy")
    assert await meet(greeting(1), full) == (hello.Greeted(credential(2)), hello.Greeted(credential(1)))


@pytest.mark.parametrize(
    ("shown", "reason", "advice"),
    [
        (credential(1, mesh=OTHER_MESH), "wrong_mesh", "another mesh"),
        (credential(3), "not_yours", "another node"),
        (invited(1, Scope.CLIENT, not_after_unix=NOW - HOUR), "expired", "expired"),
        (
            Credential(mesh_key=MESH.mesh_key, links=credential(1, mesh=OTHER_MESH).links),
            "forged",
            "signatures",
        ),
    ],
)
async def test_a_joiner_without_a_good_credential_is_told_why(
    shown: Credential, reason: str, advice: str
) -> None:
    near, far = await meet(greeting(1, shown), greeting(2))
    for outcome, other in ((near, peer(2)), (far, peer(1))):
        assert isinstance(outcome, AdmissionRefused)
        assert (outcome.reason, outcome.peer) == (reason, other)
    assert advice in str(near)


async def test_a_revoked_joiner_is_refused() -> None:
    guest = MESH.delegate(scope=Scope.CLIENT, not_after_unix=None, seed=seed(50))
    far = greeting(2)
    far.membership.handle(io.RevocationHeard(MESH.revoke(guest.links), gossiped=True), NOW)
    near, _ = await meet(greeting(1, guest.admit(keys.public_key(seed(1)))), far)
    assert isinstance(near, AdmissionRefused)
    assert near.reason == "revoked"
    assert isinstance(far.membership.revoked, Revoked)


async def test_a_host_that_is_no_member_is_refused_by_the_joiner() -> None:
    """It may well accept us: whoever wants our announcements would."""
    impostor = greeting(2, credential(2, mesh=OTHER_MESH))
    near, far = await meet(greeting(1), impostor)
    assert isinstance(near, AdmissionRefused)
    assert (near.reason, near.peer) == ("wrong_mesh", peer(2))
    assert far == hello.Greeted(credential(1))


async def test_a_refusal_tells_nothing_but_its_word() -> None:
    async with memory_streams() as (one, two), trio.open_nursery() as nursery:

        async def refuse() -> None:
            with pytest.raises(AdmissionRefused):
                await hello.answer(two, greeting(2))

        nursery.start_soon(refuse)
        stranger = wire.Hello(agent="x", credential=credential(1, mesh=OTHER_MESH))
        await one.send_all(frame(wire.encode_hello(stranger)))
        said = await receive_frame(one, wire.MAX_HELLO)
        assert await one.receive_some() == b""
        await one.aclose()
    assert wire.decode_hello_reply(said) == wire.HelloReply(agent="test", refusal="wrong_mesh")
    assert said == b"\x0a\x04test\x12\x0awrong_mesh"


async def test_a_word_that_is_not_known_is_taken_for_malformed() -> None:
    async with memory_streams() as (one, two), trio.open_nursery() as nursery:

        async def answer() -> None:
            await receive_frame(two, wire.MAX_HELLO)
            await two.send_all(frame(wire.encode_hello_reply(wire.HelloReply(agent="", refusal="x" * 999))))

        nursery.start_soon(answer)
        with pytest.raises(AdmissionRefused, match="update both") as caught:
            await hello.greet(one, greeting(1))
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize(
    "said", [frame(b"\xff\xff"), b"\x80\x80\x80\x80", b"\x81\x20", b"GET / HTTP/1.1\r\n\r\n"]
)
@pytest.mark.parametrize("ours", [hello.greet, hello.answer])
async def test_garbage_is_an_error_on_either_side(said: bytes, ours: object) -> None:
    async with memory_streams() as (one, two):
        await two.send_all(said)
        await two.send_eof()
        with pytest.raises(WireError):
            await ours(one, greeting(1))  # type: ignore[operator]


async def test_a_refused_stranger_that_stays_is_left_after_a_second(autojump_clock: trio.abc.Clock) -> None:
    async with memory_streams() as (one, two):
        stranger = wire.Hello(agent="x", credential=credential(3))
        await one.send_all(frame(wire.encode_hello(stranger)))
        started = trio.current_time()
        with pytest.raises(AdmissionRefused):
            await hello.answer(two, greeting(2))
        assert trio.current_time() - started == pytest.approx(1)


# ── the exchange ─────────────────────────────────────────────────────────────────────────────────────────────────


def told(machine: Membership) -> hello.Tell:
    def tell(event: io.Event) -> None:
        machine.handle(event, NOW)

    return tell


async def swap(one: Stream, near: Membership, two: Stream, far: Membership) -> None:
    async def side(stream: Stream, machine: Membership, opener: bool) -> None:
        for event in await syncing.exchange(stream, machine, told(machine), opener=opener):
            machine.handle(event, NOW)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(side, one, near, True)
        nursery.start_soon(side, two, far, False)


async def test_after_an_exchange_both_know_the_same() -> None:
    near, far = membership(1), membership(2)
    for machine, others in ((near, (3, 4)), (far, (4, 5))):
        for other in others:
            machine.handle(io.RecordHeard(record(other), gossiped=True), NOW)
    far.handle(io.RecordHeard(record(4, sequence=9), gossiped=True), NOW)
    far.handle(io.RevocationHeard(MESH.revoke(credential(8).links), gossiped=True), NOW)
    async with memory_streams() as (one, two):
        await swap(one, near, two, far)
    assert near.digest() == far.digest()
    assert near.digest().ages.keys() == {peer(n) for n in range(1, 6)}
    assert near.digest().ages[peer(4)] == (1, 9)
    assert len(near.revoked) == 1


async def test_large_tables_on_both_sides_do_not_deadlock() -> None:
    near, far = membership(1), membership(2)
    for machine, start in ((near, 300), (far, 500)):
        for number in range(start, start + 40):
            machine.handle(io.RecordHeard(record(number, attributes=bytes(20_000)), gossiped=True), NOW)
    async with memory_streams() as (one, two):
        await swap(one, near, two, far)
    assert len(near.digest().ages) == len(far.digest().ages) == 82
