from __future__ import annotations

from dataclasses import replace

from libmesh_node.announced import AnnouncedModel, Distance, NodeStatus, decode_status, encode_status
from libmesh_node.placement.seen import SERVICE, distances, host_elsewhere, machines_with

from libmesh import MeshId, Path, PathKind, PeerId, PeerState, PeerView, Scope, Service, View

DIGEST = "ab" * 32
MODEL = AnnouncedModel(name="m", digest=DIGEST, size_bytes=1)
STATUS = NodeStatus(
    memory_bytes=100,
    spare_bytes=90,
    bandwidth=7,
    accelerated=True,
    rpc_protocol="7.0.0",
    models=(MODEL,),
    distances=(Distance("me", 0.01), Distance("far", 0.02, True)),
)


def peer(name: str, status: NodeStatus = STATUS, **changes: object) -> PeerView:
    view = PeerView(
        peer=PeerId(name),
        scope=Scope.WORKER,
        state=PeerState.ALIVE,
        services=(Service(name=SERVICE, scope=Scope.WORKER),),
        attributes=encode_status(status),
        addresses=(),
        path=Path(kind=PathKind.DIRECT, address="", rtt=0.01),
        since_unix=0.0,
        incarnation=1,
    )
    return replace(view, **changes)  # type: ignore[arg-type]


def view(*peers: PeerView) -> View:
    return View(mesh_id=MeshId("0" * 32), me=PeerId("me"), scope=Scope.WORKER, peers=peers)


def machines(*peers: PeerView, protocol: str = "7.0.0", **refused: str) -> dict[str, str]:
    found = machines_with(DIGEST, view(*peers), STATUS, name="m", protocol=protocol, refused=refused)
    return {machine.peer: machine.excluded for machine in found}


def test_what_is_announced_comes_back() -> None:
    assert decode_status(encode_status(STATUS)) == STATUS


def test_those_with_the_file_are_machines_and_nobody_else() -> None:
    other = replace(STATUS, models=(AnnouncedModel(name="other", digest="cd" * 32),))
    gone = peer("gone", state=PeerState.DEAD)
    assert machines(peer("a"), peer("b", other), gone) == {"a": "", "me": ""}


def test_what_their_llama_cpp_speaks_is_known() -> None:
    newer = peer("a", replace(STATUS, rpc_protocol="7.1.0"))
    found = machines_with(DIGEST, view(newer), STATUS, name="m", protocol="7.0.0", refused={})
    assert {machine.peer: machine.protocol for machine in found} == {"a": "7.1.0", "me": "7.0.0"}


def test_who_has_another_file_of_that_name_takes_no_part_and_is_told_why() -> None:
    other = replace(STATUS, models=(replace(MODEL, digest="cd" * 32),))
    unread = replace(STATUS, models=(replace(MODEL, digest=""),))
    elsewhere = replace(STATUS, models=(replace(MODEL, name="same file"),))
    assert machines(peer("a", other), peer("b", unread), peer("c", elsewhere)) == {
        "a": "it has another file named m",
        "b": "its file is still being identified",
        "c": "",
        "me": "",
    }


def test_a_machine_is_what_its_node_says() -> None:
    (found, _) = machines_with(DIGEST, view(peer("a")), STATUS, name="m", protocol="7.0.0", refused={})
    assert (found.memory, found.bandwidth, found.accelerated, found.lends) == (90, 7.0, True, True)
    assert found.rtts == {"me": 0.01, "far": 0.02}
    assert found.relayed == frozenset({"far"})


def test_who_cannot_take_part_is_told_why() -> None:
    guest = peer("a", scope=Scope.CLIENT)
    assert machines(guest)["a"] == "its invite does not let it work for others"
    older = peer("a", replace(STATUS, rpc_protocol="6.1.0"))
    assert machines(older)["a"] == "it speaks llama.cpp's RPC protocol 6.1.0, this node 7.0.0"
    assert machines(peer("a"), a="its memory is taken")["a"] == "its memory is taken"
    silent = peer("a", services=())
    (found, _) = machines_with(DIGEST, view(silent), STATUS, name="m", protocol="7.0.0", refused={})
    assert not found.lends


def test_a_host_elsewhere_is_one_that_answers() -> None:
    ready = replace(STATUS, models=(replace(MODEL, ready=True, workers=("w",)),))
    assert host_elsewhere(DIGEST, view(peer("a"), peer("b", ready))) == ("b", ready.models[0])
    assert host_elsewhere(DIGEST, view(peer("a"), peer("b", ready, scope=Scope.CLIENT))) is None


def test_a_distance_is_told_anew_only_when_it_matters() -> None:
    def told(
        rtt: float | None, before: tuple[Distance, ...], kind: PathKind = PathKind.DIRECT
    ) -> tuple[Distance, ...]:
        path = Path(kind=kind, address="", rtt=rtt)
        return distances(view(peer("a", path=path)), [DIGEST], before)

    first = told(0.01, ())
    assert first == (Distance("a", 0.01),)
    assert told(0.0119, first) == first
    assert told(0.0130, first) == (Distance("a", 0.013),)
    assert told(0.01, first, PathKind.RELAYED) == (Distance("a", 0.01, True),)
    assert told(None, ()) == ()
    assert distances(view(peer("a")), ["cd" * 32], ()) == ()


def test_a_lost_connection_is_no_other_distance() -> None:
    first = (Distance("a", 0.01),)
    away = replace(peer("a"), path=None)
    assert distances(view(away), [DIGEST], first) == first
    assert distances(view(away), [DIGEST], ()) == ()
    assert distances(view(replace(away, state=PeerState.DEAD)), [DIGEST], first) == ()
