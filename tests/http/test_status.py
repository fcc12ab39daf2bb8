"""The status document keeps to its schema, and the schema names all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from libmesh_node.http.status import SCHEMA_VERSION, status_json
from libmesh_node.snapshot import Model, NodeSnapshot, Peer, Process, Server, Tunnel

from tests.http.conftest import snapshot_of

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "status.schema.json").read_text())

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


def complaints(value: Any, schema: dict[str, Any], where: str = "status") -> list[str]:
    """What of `value` breaks `schema`: the part of JSON Schema that the file uses, and unknown fields besides."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    found = []
    allowed = schema.get("type", [])
    names = [allowed] if isinstance(allowed, str) else allowed
    is_bool = isinstance(value, bool)
    if names and not any(isinstance(value, TYPES[name]) and (name == "boolean") == is_bool for name in names):
        return [f"{where} is {value!r}, not {names}"]
    if "const" in schema and value != schema["const"]:
        found.append(f"{where} is {value!r}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where} is {value!r}, not one of {schema['enum']}")
    if isinstance(value, int | float) and not schema.get("minimum", value) <= value <= schema.get(
        "maximum", value
    ):
        found.append(f"{where} is {value!r}, out of range")
    if isinstance(value, dict):
        properties = schema["properties"]
        found += [f"{where}.{name} is missing" for name in schema["required"] if name not in value]
        found += [f"{where}.{name} is not in the schema" for name in value if name not in properties]
        for name, part in value.items():
            found += complaints(part, properties.get(name, {}), f"{where}.{name}")
    if isinstance(value, list) and "items" in schema:
        for index, part in enumerate(value):
            found += complaints(part, schema["items"], f"{where}[{index}]")
    return found


def full_snapshot() -> NodeSnapshot:
    here = Server(peer="me", base_url="http://127.0.0.1:1", local=True, slots=4)
    there = Server(peer="peer-b", base_url="http://127.0.0.1:2", local=False, rtt=0.0123456)
    return snapshot_of(
        Model(name="cold", digest="d0", size_bytes=5, context_length=0),
        Model(name="warm", digest="d1", size_bytes=4_700_000_000, context_length=4096, servers=(here, there)),
        addresses=("/ip4/192.0.2.1/tcp/4001",),
        peers=(
            Peer(
                id="peer-b",
                hostname="b",
                role="Host",
                scope="worker",
                state="alive",
                since_unix=1.7e9,
                version="0.1.0",
                vram_gb=24.0,
                models=("warm", "cold"),
                serving=("warm",),
                path="direct",
                address="/ip4/192.0.2.2/tcp/4001",
                rtt_ms=12.3456,
                inflight=3,
            ),
            Peer(
                id="peer-c",
                hostname="",
                role="Client",
                scope="client",
                state="dead",
                since_unix=0.0,
                version="",
                vram_gb=0.0,
                models=(),
                serving=(),
                path=None,
                address="",
                rtt_ms=None,
            ),
        ),
        processes=(
            Process(
                name="llama", pid=None, port=1, model="warm", status="restarting", failure="out of memory"
            ),
        ),
        tunnels=(Tunnel(direction="expose", name="ssh", target="127.0.0.1:22"),),
        notices=("read this",),
    )


@pytest.mark.parametrize("snapshot", [full_snapshot(), snapshot_of()], ids=["full", "idle"])
def test_document_keeps_to_the_schema(snapshot: NodeSnapshot) -> None:
    document = json.loads(json.dumps(status_json(snapshot, {"http://127.0.0.1:2": 2})))
    assert complaints(document, SCHEMA) == []
    assert document["schema_version"] == SCHEMA_VERSION == SCHEMA["properties"]["schema_version"]["const"]


def test_the_check_itself_finds_what_is_wrong() -> None:
    document = status_json(full_snapshot(), {})
    document |= {"node_status": "Dancing", "api_port": 70_000, "is_host": 1, "more": 1}
    del document["token"]
    wrong = "\n".join(complaints(document, SCHEMA))
    for name in ("node_status", "api_port", "is_host", "more", "token"):
        assert f"status.{name} is" in wrong


def test_first_meshs_fields_keep_their_meaning() -> None:
    document = status_json(full_snapshot(), {"http://127.0.0.1:2": 2})
    assert document["is_host"] is True
    assert document["llama_ready"] is True
    assert document["model_name"] == "warm"
    assert document["model_size_gb"] == 4.7
    assert document["mesh_models"] == [
        {"name": "cold", "status": "cold", "node_count": 0, "size_gb": 0.0},
        {"name": "warm", "status": "warm", "node_count": 2, "size_gb": 4.7},
    ]
    assert document["inflight_requests"] == 2
    assert status_json(full_snapshot(), {}, with_token=False)["token"] == ""


def test_model_that_is_still_loading_is_named_but_not_ready() -> None:
    loading = Process(name="llama", pid=1, port=1, model="big", status="loading")
    document = status_json(snapshot_of(processes=(loading,)), {})
    assert document["model_name"] == "big"
    assert document["llama_ready"] is False
