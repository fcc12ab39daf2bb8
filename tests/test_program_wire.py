"""What the program adds to the wire, held against its golden bytes."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.llama.rpc.frames import ProtocolError

from tests.program_vectors import CODECS, TABLE, value_from_json, value_to_json, vectors
from tests.vector_form import FOLDER

PROTO = Path(__file__).resolve().parents[1] / "proto" / "libmesh_node" / "v1"


def load(message: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{message}.json").read_text())  # type: ignore[no-any-return]


def entries(which: str) -> list[Any]:
    return [
        pytest.param(message, entry, id=f"{message}: {entry['name']}")
        for message in TABLE
        for entry in load(message)[which]
    ]


@pytest.mark.parametrize(("message", "entry"), entries("valid"))
def test_a_valid_message_means_its_value(message: str, entry: dict[str, Any]) -> None:
    value = value_from_json(message, entry["value"])
    assert value_to_json(message, value) == entry["value"]
    assert CODECS[message].decode(bytes.fromhex(entry["hex"])) == value
    if entry.get("canonical", True):
        assert CODECS[message].encode(value) == bytes.fromhex(entry["hex"])


@pytest.mark.parametrize(("message", "entry"), entries("invalid"))
def test_an_invalid_message_is_refused(message: str, entry: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        CODECS[message].decode(bytes.fromhex(entry["hex"]))


@pytest.mark.parametrize("message", TABLE)
def test_the_vectors_are_those_that_the_cases_make(message: str) -> None:
    assert json.loads(vectors(message)) == load(message), "stale; run `python tools/make_vectors.py`"


def test_every_message_of_the_specification_has_vectors() -> None:
    """Those that are only part of another are seen in it."""
    lines = [line.split("//")[0] for path in PROTO.glob("*.proto") for line in path.read_text().splitlines()]
    named = {line.split()[1] for line in lines if line.startswith("message ")}
    parts = {word for line in lines if "=" in line for word in re.findall(r"\w+", line)}
    covered = {"".join(word.title() for word in message.split("_")) for message in CODECS}
    assert named - parts == covered


@pytest.mark.parametrize("message", TABLE)
@given(data=st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(message: str, data: bytes) -> None:
    with suppress(ProtocolError):
        CODECS[message].decode(data)
