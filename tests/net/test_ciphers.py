"""The choice of a cipher within the Noise handshake, and the ciphers themselves."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

import pytest
import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
from libp2p.security.noise.transport import Transport as StockNoise

from libmesh.net import ciphers
from libmesh.net.base import StreamReset
from libmesh.net.ciphers import AES, CHACHA, Cipher, fast_ciphers
from libmesh.net.noise import Noise, NoiseSession
from libmesh.net.pipes import BufferPool, SocketPipe
from libmesh.net.records import BUFFER_BYTES, RecordChannel
from tests.net.pairs import KEYS, peer_of, raw_pair, socket_pair

KEY = bytes(range(32))


async def sessions(near: Sequence[str], far: Sequence[str]) -> tuple[NoiseSession, NoiseSession]:
    """Both ends of a handshake between hosts that offer these ciphers; the first one dialled."""
    raws = await raw_pair()
    done: dict[int, NoiseSession] = {}

    async def dial() -> None:
        done[0] = session = await Noise(KEYS[0], ciphers=near).secure_outbound(raws[0], peer_of(KEYS[1]))
        assert isinstance(session, NoiseSession)

    async def answer() -> None:
        done[1] = session = await Noise(KEYS[1], ciphers=far).secure_inbound(raws[1])
        assert isinstance(session, NoiseSession)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dial)
        nursery.start_soon(answer)
    return done[0], done[1]


def used(session: NoiseSession) -> str:
    channel = session.channel
    assert isinstance(channel, RecordChannel)
    return channel.cipher


@pytest.mark.parametrize(
    ("near", "far", "agreed"),
    [
        ([AES], [AES], AES),
        ([], [AES], CHACHA),
        ([AES], [], CHACHA),
        ([], [], CHACHA),
        (["unheard-of", AES], [AES, "unheard-of-too"], AES),
        ([AES] * 500, [AES], AES),
    ],
)
async def test_the_first_cipher_that_both_offer_is_used_both_ways(
    near: list[str], far: list[str], agreed: str
) -> None:
    one, two = await sessions(near, far)
    assert used(one) == used(two) == agreed
    for sender, receiver in ((one, two), (two, one)):
        await sender.write(b"x" * 70_000)
        got = b""
        while len(got) < 70_000:
            got += await receiver.read()
        assert got == b"x" * 70_000
    await one.close()
    await two.close()


async def test_stock_noise_neither_minds_the_offer_nor_makes_one() -> None:
    raws = await raw_pair()
    stock = StockNoise(KEYS[1], noise_privkey=create_x25519().private_key)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stock.secure_inbound, raws[1])
        session = await Noise(KEYS[0], ciphers=[AES]).secure_outbound(raws[0], peer_of(KEYS[1]))
    assert isinstance(session, NoiseSession)
    assert used(session) == CHACHA
    await session.close()
    await raws[1].close()


def test_only_what_we_have_is_offered() -> None:
    assert set(fast_ciphers()) <= {AES}


def test_an_unknown_cipher_is_named() -> None:
    with pytest.raises(ValueError, match="rot13"):
        Cipher("rot13", KEY)


def test_aes_is_as_the_wire_says() -> None:
    cipher = Cipher(AES, KEY)
    sealed = bytearray(5 + 16)
    cipher.encrypt_into(cipher.pack_nonce(0, 258), b"hello", None, sealed)
    derived = hmac.digest(KEY, b"libmesh aes-256-gcm", "sha256")
    assert bytes(sealed) == AESGCM(derived).encrypt(bytes(10) + b"\x01\x02", b"hello", None)
    cipher.renew()
    rekeyed = AESGCM(derived).encrypt(bytes(4) + b"\xff" * 8, bytes(32), None)[:32]
    cipher.encrypt_into(cipher.pack_nonce(0, 0), b"hello", None, sealed)
    assert bytes(sealed) == AESGCM(rekeyed).encrypt(bytes(12), b"hello", None)


async def test_both_sides_renew_the_key_after_as_many_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ciphers, "REKEY_EVERY", 3)
    near, far = await socket_pair()
    pool = BufferPool(BUFFER_BYTES)
    one, two = bytes(32), bytes([1]) * 32
    sender = RecordChannel(SocketPipe(near), one, two, pool, AES)
    receiver = RecordChannel(SocketPipe(far), two, one, pool, AES)
    pieces = [bytes([number]) * 9000 for number in range(10)]
    got = b""
    for first, end in ((0, 1), (1, 3), (3, 10)):
        sender.put(pieces[first:end])
        while not sender.flush_nowait():
            await sender.flush()
        while len(got) < end * 9000:
            got += b"".join(await receiver.receive())
    assert got == b"".join(pieces)
    sender.put([b"again"])
    assert sender.flush_nowait()
    record = await far.socket.recv(100)
    old = Cipher(AES, one)
    with pytest.raises(InvalidTag):  # it opens nothing any more
        old.decrypt(old.pack_nonce(0, len(pieces)), record[2:], None)
    await sender.aclose()
    await receiver.aclose()


async def test_a_message_out_of_place_ends_the_connection() -> None:
    near, far = await socket_pair()
    pool = BufferPool(BUFFER_BYTES)
    sender = RecordChannel(SocketPipe(near), bytes(32), bytes(32), pool, AES)
    receiver = RecordChannel(SocketPipe(far), bytes(32), bytes(32), pool, AES)
    sender.put([b"first"])
    sender.flush_nowait()
    await far.socket.recv(1000)
    sender.put([b"second"])
    sender.flush_nowait()
    with pytest.raises(StreamReset, match="damaged"):
        await receiver.receive()
    await sender.aclose()
    await receiver.aclose()
