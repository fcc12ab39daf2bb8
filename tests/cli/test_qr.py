"""What `invite --qr` prints is a QR code of the token: another program, which reads codes from pictures, reads it back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import zxingcpp
from libmesh_node.datadir import NodeInfo, held_data_dir
from libmesh_node.main import main

from libmesh.core.credentials import Invite
from libmesh.peers import Scope
from libmesh.tokens import encode_invite
from tests.cli.conftest import FakeConsole
from tests.members import MESH, NOW, peer, seed

LIGHT = {"█": (1, 1), "▀": (1, 0), "▄": (0, 1), " ": (0, 0)}
"""Upper and lower half of a character on a dark terminal."""

PIXELS = 4  # a side of a module


def picture(printed: list[str]) -> memoryview:
    rows: list[bytes] = []
    for line in printed:
        for half in (0, 1):
            row = b"".join(bytes([255 * LIGHT[sign][half]]) * PIXELS for sign in line)
            rows += [row] * PIXELS
    return memoryview(b"".join(rows)).cast("B", (len(rows), len(rows[0])))


@pytest.mark.parametrize("addresses", [1, 2])
def test_the_printed_code_is_read_back_as_the_token(
    addresses: int, console: FakeConsole, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = tuple(f"/ip4/192.0.2.{n}/tcp/4001" for n in range(addresses))
    authority = MESH.delegate(scope=Scope.WORKER, not_after_unix=NOW, seed=seed(1))
    token = encode_invite(Invite(authority=authority, contacts=((peer(1), known),)))
    console.answers = {
        "POST /api/invite": (200, {"ok": True, "token": token, "scope": "client", "expires_unix": 0})
    }
    with held_data_dir(tmp_path) as folder:
        folder.write_info(
            NodeInfo(pid=os.getpid(), api_port=1, console_port=console.port, version="", started_unix=0)
        )
        assert main(["invite", "--qr", "--data-dir", str(tmp_path)]) == 0
    first, *code = capsys.readouterr().out.splitlines()
    assert first == token
    (found,) = zxingcpp.read_barcodes(picture(code))
    assert found.format == zxingcpp.BarcodeFormat.QRCode
    assert found.text == token
    assert max(map(len, code)) <= 100  # columns
