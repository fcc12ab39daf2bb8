"""What a mesh tells of its members, what they offer each other, and what liars can do. All in virtual time."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import trio
import trio.testing

from libmesh import (
    Mesh,
    PeerState,
    PeerUnreachable,
    Scope,
    ServiceRefused,
    Stream,
    View,
    wire,
)
from libmesh.core import membership_io as io
from libmesh.core.summary import Digest
from libmesh.net.base import StreamReset
from tests.members import peer, record
from tests.town import settled, town, until

# ── what is announced ────────────────────────────────────────────────────────────────────────────────────────────


async def nothing(stream: Stream) -> None:
    await stream.receive_some()


async def test_services_and_attributes_are_seen_by_all_and_their_end_too(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        one, two, three = await place.of(3)

        def seen(mesh: Mesh) -> tuple[list[str], bytes]:
            entry = mesh.view.get(one.peer)
            assert entry is not None
            return [service.name for service in entry.services], entry.attributes

        with one.offer("b", nothing), one.offer("a", nothing, scope=Scope.WORKER):
            one.announce(b"opaque")
            await until(lambda: seen(two) == seen(three) == (["a", "b"], b"opaque"))
        await until(lambda: seen(two) == seen(three) == ([], b"opaque"))


async def test_what_is_announced_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        founder = await place.found()
        founder.announce(bytes(wire.MAX_ATTRIBUTES))
        with pytest.raises(ValueError, match="at most 49152"):
            founder.announce(bytes(wire.MAX_ATTRIBUTES + 1))
        with ExitStack() as stack:
            for number in range(wire.MAX_SERVICES):
                stack.enter_context(founder.offer(f"{number}", nothing))
            with pytest.raises(ValueError, match="at most 256"), founder.offer("one more", nothing):
                pass


async def test_a_service_is_offered_once_and_with_a_good_name(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        founder = await place.found()
        with (
            founder.offer("a", nothing),
            pytest.raises(ValueError, match="already"),
            founder.offer("a", nothing),
        ):
            pass
        for name in ("", "x" * 256, "a\nb"):
            with pytest.raises(ValueError, match="no service name"), founder.offer(name, nothing):
                pass
        with founder.offer("a", nothing):
            pass


async def test_a_watcher_gets_the_present_view_and_then_the_newest_however_slow_it_is(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with town() as place:
        one, two = await place.of(2)
        async with one.watch() as views:
            assert await views.receive() == one.view
            for number in range(50):
                two.announce(b"%d" % number)
                await trio.sleep(0.2)
            newest: View = await views.receive()
            entry = newest.get(two.peer)
            assert entry is not None
            assert entry.attributes == b"49"
            with pytest.raises(trio.WouldBlock):
                views.receive_nowait()
        two.announce(b"nobody watches any more")
        await trio.sleep(1)


# ── services ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("has", "needs", "allowed"), [(has, needs, has >= needs) for has in Scope for needs in Scope]
)
async def test_a_service_is_for_those_with_its_scope(
    autojump_clock: trio.testing.MockClock, has: Scope, needs: Scope, allowed: bool
) -> None:
    async with town() as place:
        founder = await place.found()
        guest = await place.join(2, founder.invite(scope=has, not_after_unix=None))
        assert guest.scope is has
        with founder.offer("it", nothing, scope=needs):
            if allowed:
                await (await guest.open_service(founder.peer, "it")).aclose()
            else:
                with pytest.raises(ServiceRefused) as caught:
                    await guest.open_service(founder.peer, "it")
                assert caught.value.reason == "scope"


async def test_a_service_that_is_not_offered_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        founder, guest = await place.of(2)
        with pytest.raises(ServiceRefused) as caught:
            await guest.open_service(founder.peer, "nope")
        assert caught.value.reason == "unknown_service"


async def test_a_service_of_nobody_is_unreachable(autojump_clock: trio.testing.MockClock) -> None:
    async with town() as place:
        (founder,) = await place.of(1)
        with pytest.raises(PeerUnreachable):
            await founder.open_service(peer(9), "echo")


async def test_open_streams_live_on_when_the_offer_ends_and_fail_when_the_handler_does(
    autojump_clock: trio.testing.MockClock,
) -> None:
    release = trio.Event()

    async def wait_and_fail(stream: Stream) -> None:
        await stream.send_all(b"ready")
        await release.wait()
        raise ValueError("on purpose")

    async with town() as place:
        founder, guest = await place.of(2)
        with founder.offer("it", wait_and_fail):
            stream = await guest.open_service(founder.peer, "it")
            assert await stream.receive_some() == b"ready"
        release.set()
        with pytest.raises(StreamReset):
            await stream.receive_some()
        await settled([founder, guest])


# ── liars ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [2**64 - 1, 2**63, 10**15])
@pytest.mark.parametrize("how", ["suspicion", "digest", "record"])
async def test_a_member_that_claims_absurd_things_of_another_does_not_hurt_it(
    autojump_clock: trio.testing.MockClock, number: int, how: str
) -> None:
    """The numbers are 64 bits on the wire: an answer that counts on from there could not be sent any more."""
    async with town() as place:
        one, two = await place.of(2)
        events = {
            "suspicion": io.SuspicionHeard(io.Suspicion(one.peer, number, number)),
            "digest": io.DigestHeard(Digest({one.peer: (number, number)}, frozenset({one.peer}))),
            "record": io.RecordHeard(record(2, peer=one.peer, incarnation=number), gossiped=True),
        }
        for _ in range(3):
            one._driver.handle(events[how])
            await trio.sleep(1)
        entry = two.view.get(one.peer)
        assert entry is not None
        assert entry.state is PeerState.ALIVE
        assert entry.incarnation < 2**62
