"""What is in `tests/vectors`: valid and invalid messages, from fixed seeds.

The valid ones are encoded by `libmesh.wire`. The invalid ones, and those that are valid but not as we would write them, are
put together here by hand, so that they do not depend on what is to be tested.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from libmesh import keys, wire
from libmesh.core.announcement import SIGNING_CONTEXT, Record
from libmesh.core.credentials import MAX_LINKS, Invite
from libmesh.core.membership_io import Suspicion
from libmesh.core.summary import Digest, Part, Prints, Summary, fingerprint_of_revocations
from libmesh.peers import Scope, Service
from libmesh.resume_wire import Progress
from tests.handmade import chain, field, link, public, said, varint
from tests.members import HOUR, MESH, NOW, announcement, credential, invited, peer, record, seed
from tests.vector_form import CODECS, Codec, value_to_json

# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Case:
    """`value` for what we encode ourselves; `raw` for bytes made here; `reason` if they are to be refused."""

    name: str
    value: Any = None
    raw: bytes | str | None = None
    reason: str | None = None


PEER, INVITE = 2, 1
KEY_31 = public(1)[:31]
NINE_LINKS = [link()] * (MAX_LINKS + 1)

BAD_CREDENTIALS: list[tuple[str, str, bytes]] = [
    ("no credential", "a credential has at least one link", b""),
    ("a mesh key of 31 bytes", "a key has 32 bytes", chain(link(), mesh_key=MESH.mesh_key[:31])),
    ("no links", "a credential has at least one link", chain()),
    ("nine links", "a chain has at most 8 links", chain(*NINE_LINKS)),
    ("a subject of 31 bytes", "a key has 32 bytes", chain(link(subject=KEY_31))),
    ("a subject of 33 bytes", "a key has 32 bytes", chain(link(subject=public(1) + b"\0"))),
    ("a signature of 63 bytes", "a signature has 64 bytes", chain(link(signature=bytes(63)))),
    ("no signature", "a signature has 64 bytes", chain(link(signature=b""))),
    ("scope 0", "a scope is 1, 2 or 3", chain(link(scope=0))),
    ("scope 4", "a scope is 1, 2 or 3", chain(link(scope=4))),
    ("link kind 0", "a link's kind is 1 or 2", chain(link(kind=0))),
    ("link kind 3", "a link's kind is 1 or 2", chain(link(kind=3))),
]


def hello() -> Iterator[Case]:
    yield Case("let in by the mesh key", wire.Hello(agent="libmesh/0.1.0", credential=credential(1)))
    shown = invited(2, Scope.INVITE, Scope.WORKER, not_after_unix=NOW + HOUR)
    yield Case("through two invites, with an end", wire.Hello(agent="", credential=shown))
    longest = invited(3, *[Scope.INVITE] * (MAX_LINKS - 1), not_after_unix=NOW)
    yield Case("the longest chain", wire.Hello(agent="é" * 64, credential=longest))
    yield Case(
        "of one that follows", wire.Hello(agent="", credential=credential(1), following=True, attributes=b"x")
    )
    canonical = wire.encode_hello(wire.Hello(agent="a", credential=credential(1)))
    value = wire.Hello(agent="a", credential=credential(1))
    yield Case("with a field that we do not know", value, canonical + field(99, b"from the future"))
    yield Case("fields in another order", value, canonical[3:] + canonical[:3])
    yield Case("attributes of one that announces itself are dropped", value, canonical + field(4, "x"))
    follows = replace(value, following=True)
    yield Case("attributes over 1 KiB are dropped", follows, canonical + field(3, 1) + field(4, bytes(1025)))
    for name, reason, bad in BAD_CREDENTIALS:
        yield Case(name, raw=field(1, "a") + field(2, bad), reason=reason)
    yield Case("cut off", raw=canonical[:-1], reason="not a protobuf message")
    yield Case("an agent that is no UTF-8", raw=field(1, b"\xff") + canonical[3:], reason="a string is UTF-8")
    yield Case("over 4 KiB", raw=canonical + field(99, bytes(4096)), reason="a Hello has at most 4096 bytes")


def hello_reply() -> Iterator[Case]:
    yield Case("admitted", wire.HelloReply(agent="libmesh/0.1.0", credential=credential(1)))
    yield Case(
        "by one that follows",
        wire.HelloReply(agent="", credential=credential(1), following=True, attributes=b"x"),
    )
    yield Case("refused", wire.HelloReply(agent="libmesh/0.1.0", refusal="expired"))
    yield Case("refused with a word that is new", wire.HelloReply(agent="", refusal="tired"))
    both = field(2, "busy") + field(3, chain(link()))
    yield Case("both: the refusal counts", wire.HelloReply(agent="", refusal="busy"), both)
    for name, reason, bad in BAD_CREDENTIALS:
        yield Case(name, raw=field(3, bad), reason=reason)
    yield Case("neither", raw=b"", reason="either a refusal or a credential is set")
    yield Case("a refusal that is no UTF-8", raw=field(2, b"\xff"), reason="a string is UTF-8")


def digest() -> Iterator[Case]:
    yield Case("of nobody", Digest({}))
    ages = {peer(1): (1_800_000_000_000, 7), peer(2): (0, 0), peer(3): (2**64 - 1, 2**64 - 1)}
    yield Case("of three, one of them dead", Digest(ages, frozenset({peer(2)})))
    yield Case("of a part", Digest(ages, part=Part(frozenset({0, 7, 63}), revocations=True)))
    yield Case("of no part", Digest({}, part=Part(frozenset(), revocations=False)))
    twice = Digest({}, part=Part(frozenset({7}), revocations=False))
    yield Case("of one part twice", twice, field(2, field(1, b"\7\7")))
    yield Case("a bucket too many", raw=field(2, field(1, bytes([64]))), reason="a bucket is below 64")
    yield Case("a key of 31 bytes", raw=field(1, field(1, KEY_31)), reason="a key has 32 bytes")
    yield Case("no key", raw=field(1, field(2, 1)), reason="a key has 32 bytes")
    yield Case("not protobuf", raw=b"\xff\xff\xff", reason="not a protobuf message")


def summary() -> Iterator[Case]:
    prints = Prints()
    rows = {peer(number): (peer(number), (1_800_000_000_000, number), number == 2) for number in (1, 2, 3)}
    for known in rows:
        prints.touch(known)
    child = MESH.delegate(scope=Scope.INVITE, not_after_unix=None, seed=seed(50))
    revocations = fingerprint_of_revocations([MESH.revoke(child.links)])
    three = Summary(prints.all(rows.__getitem__), revocations)
    nothing = Summary(Prints().all(rows.__getitem__), fingerprint_of_revocations([]))
    yield Case("of nothing", (nothing.fingerprint, nothing))
    yield Case("of three peers, the second one dead, and a revocation", (three.fingerprint, three))
    yield Case("the fingerprint alone", (three.fingerprint, None))
    yield Case("no fingerprint", raw=b"", reason="a fingerprint has 16 bytes")
    whole, parts = field(1, three.fingerprint), b"".join(three.buckets) + revocations
    yield Case("parts that are too few", raw=whole + field(2, parts[8:]), reason="the parts have 520 bytes")
    lie = parts[:-1] + bytes([parts[-1] ^ 1])
    yield Case(
        "parts of something else", raw=whole + field(2, lie), reason="the fingerprint is that of the parts"
    )
    yield Case("over 1 KiB", raw=whole + field(99, bytes(1024)), reason="a Summary has at most 1024 bytes")


def records() -> Iterator[Case]:
    yield Case("nothing", ([], []))
    child = MESH.delegate(scope=Scope.INVITE, not_after_unix=None, seed=seed(50))
    yield Case("two records and a revocation", ([record(1), record(2)], [MESH.revoke(child.links)]))
    good = wire.encode_records([record(1)])
    yield Case("one bad among the good", raw=good + field(1, b"\x08"), reason="not a protobuf message")
    bad = field(1, chain(link(scope=9)))
    yield Case("an empty record", raw=field(1, b""), reason="a key has 32 bytes")
    yield Case(
        "a bad revocation", raw=good + field(2, bad), reason="a revocation's signer stands above its link"
    )


def gossip() -> Iterator[Case]:
    yield Case("an announcement", record(1))
    yield Case("a goodbye", record(1, leaving=True, services=(), attributes=b"", sequence=2))
    many = tuple(Service(name=f"api/{n:03}", scope=Scope(n % 3 + 1)) for n in range(wire.MAX_SERVICES))
    yield Case("as many services as there may be", record(1, services=many, attributes=b""))
    names = (Service(name="a"), Service(name="api/Qwen 3"), Service(name="é" * 127), Service(name="模型"))
    yield Case("services with all sorts of names", record(1, services=names))
    addresses = (
        "/ip4/192.0.2.1/tcp/4001",
        "/ip6/2001:db8::1/tcp/4001",
        "/dns/example.com/tcp/443",
        "/dns4/example.com/tcp/443/ws",
        "/ip4/192.0.2.9/tcp/4001/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA/p2p-circuit",
    )
    yield Case("all sorts of addresses", record(1, addresses=addresses))
    yield Case("nobody's services or addresses", record(1, services=(), addresses=(), attributes=b""))
    yield Case("the largest numbers", record(1, incarnation=2**64 - 1, sequence=2**64 - 1))
    child = MESH.delegate(scope=Scope.INVITE, not_after_unix=NOW, seed=seed(50))
    yield Case(
        "a revocation",
        child.revoke(child.delegate(scope=Scope.CLIENT, not_after_unix=0, seed=seed(51)).links),
    )
    yield Case("a suspicion", Suspicion(peer(1), 1_800_000_000_000, 3))
    yield Case("a kind that we do not know", None, field(99, b"from the future"))
    yield Case("nothing", None, b"")
    unsigned = announcement(1, services=(), addresses=(), attributes=b"", credential=credential(1))
    known = wire.seal(unsigned, seed(1))
    future = known.body + field(99, "from the future")
    later = type(known)(announcement=unsigned, body=future, signature=known.signature)
    yield Case("an unknown field in what was signed is passed on", later)
    yield from _records_with_strange_addresses()
    for name, reason, bad in BAD_CREDENTIALS:
        yield Case(f"a record with {name}", raw=field(1, said(shown=bad)), reason=reason)
    yield from _bad_records()
    yield Case("a suspicion of a short key", raw=field(3, field(1, KEY_31)), reason="a key has 32 bytes")
    yield Case("cut off", raw=wire.encode_gossip(record(1))[:-1], reason="not a protobuf message")


def _records_with_strange_addresses() -> Iterator[Case]:
    plain = announcement(1, services=(), addresses=("/ip4/127.0.0.1/tcp/4001",), attributes=b"")
    good = bytes.fromhex("047f000001060fa1")
    for name, strange in {
        "of a protocol that nobody knows": b"\xff\xff\x03abc",
        "that is cut off": good[:-1],
        "that is empty": b"",
        "that has no text": b"\x38\x02\xff\xff",
    }.items():
        body = wire.seal(replace(plain, addresses=()), seed(1)).body + field(7, strange) + field(7, good)
        signature = keys.sign(seed(1), SIGNING_CONTEXT + body)
        shown = Record(announcement=plain, body=body, signature=signature)
        yield Case(f"an address {name} is passed over", shown)


def _bad_records() -> Iterator[Case]:
    def bad(name: str, reason: str, **parts: Any) -> Case:
        return Case(name, raw=field(1, said(**parts)), reason=reason)

    yield bad("services out of order", "services are sorted by name", services=(("b", 1), ("a", 1)))
    yield bad("a service twice", "a service is named once", services=(("a", 1), ("a", 2)))
    named = "a service's name has 1 to 255 bytes, without control characters"
    yield bad("a service without a name", named, services=(("", 1),))
    yield bad("a name of 256 bytes", named, services=(("x" * 256, 1),))
    yield bad("a newline in a name", named, services=(("a\nb", 1),))
    yield bad("an escape in a name", named, services=(("\x1b[2J", 1),))
    yield bad("a name that is written backwards", named, services=(("\u202egnp", 1),))
    yield bad("a name that is no UTF-8", "a string is UTF-8", services=((b"\xff", 1),))
    yield bad("a service without a scope", "a scope is 1, 2 or 3", services=(("a", 0),))
    many = tuple((f"{n:03}", 1) for n in range(wire.MAX_SERVICES + 1))
    yield bad("257 services", "at most 256 services", services=many)
    address = bytes.fromhex("047f000001060fa1")
    yield bad("17 addresses", "at most 16 addresses", addresses=(address,) * 17)
    long = b"\x38" + varint(253) + b"x" * 253
    yield bad("an address of 256 bytes", "an address has at most 255 bytes", addresses=(long,))
    yield bad("a peer key of 31 bytes", "a key has 32 bytes", peer_key=KEY_31)
    yield bad("a signature of 65 bytes", "a signature has 64 bytes", signature=bytes(65))
    yield bad("a body that is cut off", "not a protobuf message", more=field(99, b"abc")[:-1])


def revocation() -> Iterator[Case]:
    child = MESH.delegate(scope=Scope.INVITE, not_after_unix=NOW + HOUR, seed=seed(50))
    yield Case("by the mesh key", MESH.revoke(child.links))
    yield Case("of a peer, by who let it in", child.revoke(child.admit(public(1)).links))
    head = field(1, MESH.mesh_key)
    one, above = field(2, link()), "a revocation's signer stands above its link"
    yield Case("no links", raw=head + field(4, bytes(64)), reason="a chain has at least one link")
    yield Case("nine links", raw=head + one * 9 + field(4, bytes(64)), reason="a chain has at most 8 links")
    yield Case("signed by the link itself", raw=head + one + field(3, 1) + field(4, bytes(64)), reason=above)
    yield Case("signer 2^32 - 1", raw=head + one + field(3, 2**32 - 1) + field(4, bytes(64)), reason=above)
    yield Case("no signature", raw=head + one, reason="a signature has 64 bytes")
    yield Case("no mesh key", raw=one + field(4, bytes(64)), reason="a key has 32 bytes")


def probe() -> Iterator[Case]:
    yield Case("are you there?", None)
    yield Case("is that peer there?", peer(1))
    yield Case("a target of 31 bytes", raw=field(1, KEY_31), reason="a key has 32 bytes")
    yield Case("an empty target", raw=field(1, b""), reason="a key has 32 bytes")
    yield Case("over 1 KiB", raw=field(99, bytes(1024)), reason="a Probe has at most 1024 bytes")


def probe_answer() -> Iterator[Case]:
    yield Case("heard", True)
    yield Case("not heard", False)
    yield Case("not protobuf", raw=b"\x08", reason="not a protobuf message")
    yield Case("over 1 KiB", raw=field(99, bytes(1024)), reason="a ProbeAnswer has at most 1024 bytes")


def open_() -> Iterator[Case]:
    yield Case("a service", "api/Qwen3-8B")
    yield Case("the longest name", "x" * 255)
    yield Case("not only ASCII", "模型")
    yield Case("with a field that we do not know", "echo", field(1, "echo") + field(99, 7))
    named = "a service's name has 1 to 255 bytes, without control characters"
    yield Case("no name", raw=b"", reason=named)
    yield Case("256 bytes", raw=field(1, "x" * 256), reason=named)
    yield Case("a control character", raw=field(1, "a\0b"), reason=named)
    yield Case("no UTF-8", raw=field(1, b"\xc3\x28"), reason="a string is UTF-8")
    yield Case(
        "over 1 KiB", raw=field(1, "a") + field(99, bytes(1024)), reason="an Open has at most 1024 bytes"
    )


def opened() -> Iterator[Case]:
    yield Case("accepted", None)
    for word in ("unknown_service", "scope", "busy", "unavailable"):
        yield Case(f"refused: {word}", word)
    yield Case("refused with an empty word", "")
    yield Case("with a field that we do not know", None, field(99, 7))
    yield Case("no UTF-8", raw=field(1, b"\xff"), reason="a string is UTF-8")
    yield Case("over 1 KiB", raw=field(1, "x" * 1024), reason="an Opened has at most 1024 bytes")


def progress() -> Iterator[Case]:
    session = bytes(range(16))
    yield Case("the beginning", Progress(session, 0, False))
    yield Case("far on", Progress(session, 2**63, False))
    yield Case("the end", Progress(session, 5, True))
    yield Case(
        "with a field that we do not know", Progress(session, 0, False), field(1, session) + field(99, 7)
    )
    yield Case("a short session", raw=field(1, session[:15]), reason="a session has 16 bytes")
    yield Case("no session", raw=field(2, 1), reason="a session has 16 bytes")
    yield Case(
        "over 1 KiB",
        raw=field(1, session) + field(99, bytes(1024)),
        reason="a Progress has at most 1024 bytes",
    )


def resumed() -> Iterator[Case]:
    yield Case("from the beginning", (None, 0, False))
    yield Case("only the end is missing", (None, 2**40, True))
    yield Case("refused", ("unknown", 0, False))
    yield Case("over 1 KiB", raw=field(1, "x" * 1024), reason="a Resumed has at most 1024 bytes")


def post() -> Iterator[Case]:
    yield Case("a line of a chat", ("chat", b"hello"))
    yield Case("nothing on a topic", ("模型", b""))
    named = "a topic has 1 to 255 bytes, without control characters"
    yield Case("no topic", raw=field(2, b"x"), reason=named)
    yield Case("a control character", raw=field(1, "a\nb"), reason=named)
    yield Case("not protobuf", raw=b"\x0a\x05a", reason="not a protobuf message")


def token(body: bytes, prefix: str = "lm1") -> str:
    data = body + hashlib.sha256(body).digest()[:4]
    return prefix + base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def invite() -> Iterator[Case]:
    child = MESH.delegate(scope=Scope.CLIENT, not_after_unix=NOW + HOUR, seed=seed(50))
    contacts = (
        (peer(1), ("/ip4/192.0.2.1/tcp/4001", "/ip6/2001:db8::1/tcp/4001")),
        (peer(2), ("/dns/example.com/tcp/443",)),
    )
    yield Case("with two contacts", Invite(authority=child, contacts=contacts))
    deep = MESH
    for number in range(MAX_LINKS - 1):
        deep = deep.delegate(scope=Scope.INVITE, not_after_unix=None, seed=seed(60 + number))
    yield Case("the longest chain, and nobody named", Invite(authority=deep))
    good = CODECS["invite"].encode(Invite(authority=child))
    assert isinstance(good, str)
    yield Case("broken into lines", Invite(authority=child), f"  {good[:60]}\n{good[60:]}\n")
    last = link(subject=public(50), kind=INVITE)
    body = field(1, MESH.mesh_key) + field(2, last) + field(3, seed(50))
    yield Case("nothing", raw="", reason="a token starts with lm1")
    yield Case("something else", raw="hello", reason="a token starts with lm1")
    yield Case("a later version", raw=token(body, "lm2"), reason="this is version 1")
    yield Case("no content", raw="lm1", reason="a token ends with 4 bytes of the hash of the rest")
    yield Case("cut off", raw=good[:-2], reason="a token ends with 4 bytes of the hash of the rest")
    swapped = good[:40] + ("A" if good[40] != "A" else "B") + good[41:]
    yield Case("mistyped", raw=swapped, reason="a token ends with 4 bytes of the hash of the rest")
    yield Case("a character that no token has", raw=good[:-1] + "!", reason="a token is URL-safe base64")
    yield Case("not ASCII", raw=good[:-1] + "é", reason="a token is URL-safe base64")
    foreign = body[:-1] + b"\0"
    yield Case("a seed that fits nothing", raw=token(foreign), reason="the seed is that of the last link")
    yield Case(
        "a seed of 31 bytes", raw=token(field(2, last) + field(3, bytes(31))), reason="a key has 32 bytes"
    )
    bare = field(1, MESH.mesh_key) + field(3, MESH.seed)
    yield Case("the mesh's own key", raw=token(bare), reason="a token has at least one link")
    yield Case("no mesh key", raw=token(field(2, last) + field(3, seed(50))), reason="a key has 32 bytes")
    short = body + field(4, field(1, KEY_31))
    yield Case("a contact with a short key", raw=token(short), reason="a key has 32 bytes")
    eight = field(1, MESH.mesh_key) + field(2, last) * 8 + field(3, seed(50))
    yield Case("eight links", raw=token(eight), reason="an invite has at most 7 links")
    ended = field(1, MESH.mesh_key) + field(2, link(subject=public(50))) + field(3, seed(50))
    yield Case("a peer link", raw=token(ended), reason="the links of an invite are invitations")
    yield Case("not protobuf", raw=token(b"\xff\xff"), reason="not a protobuf message")


TABLE = {
    "hello": hello,
    "hello_reply": hello_reply,
    "digest": digest,
    "summary": summary,
    "records": records,
    "gossip": gossip,
    "revocation": revocation,
    "probe": probe,
    "probe_answer": probe_answer,
    "open": open_,
    "opened": opened,
    "progress": progress,
    "resumed": resumed,
    "post": post,
    "invite": invite,
}


def vectors(message: str) -> str:
    """The content of the file of `message`."""
    return content_of(TABLE[message](), CODECS[message], partial(value_to_json, message))


def content_of(cases: Iterable[Case], codec: Codec, in_json: Callable[[Any], Any]) -> str:
    """The content of the file with these cases."""
    valid: list[dict[str, Any]] = []
    invalid: list[dict[str, Any]] = []
    for case in cases:
        data = codec.encode(case.value) if case.raw is None else case.raw
        coded = {"text": data} if isinstance(data, str) else {"hex": data.hex()}
        if case.reason is not None:
            invalid.append({"name": case.name, "reason": case.reason, **coded})
        else:
            as_written = {} if case.raw is None else {"canonical": False}
            valid.append({"name": case.name, **as_written, **coded, "value": in_json(case.value)})
    content = {"message": codec.about, "valid": valid, "invalid": invalid}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
