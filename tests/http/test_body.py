"""The model is found in any JSON body, and no body holds the loop."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libmesh_node.http.body import (
    MAX_TOKENS,
    NotText,
    TooComplex,
    form_model,
    model_of,
    read_object,
    scan_model,
)


def scan(body: bytes) -> str | None:
    *pauses, found = scan_model(body)
    assert all(pause is None for pause in pauses)
    return found


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda parts: st.lists(parts) | st.dictionaries(st.text() | st.just("model"), parts),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), JSON), st.text(), st.booleans(), st.sampled_from([None, 2]))
def test_model_is_found_wherever_it_stands(
    rest: dict[str, Any], name: str, plain: bool, indent: int | None
) -> None:
    rest.pop("model", None)
    for body in ({"model": name} | rest, rest | {"model": name}):
        assert (
            scan(json.dumps(body, ensure_ascii=plain, indent=indent).encode("utf-8", "surrogatepass")) == name
        )
    assert scan(json.dumps(rest, ensure_ascii=plain, indent=indent).encode("utf-8", "surrogatepass")) is None


@given(st.binary() | st.text(alphabet='{}[]":,\\ model0').map(str.encode))
def test_garbage_gives_a_name_or_none_or_a_refusal(body: bytes) -> None:
    try:
        found = scan(body)
    except NotText:
        return
    assert found is None or isinstance(found, str)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (rb'{"model":"a","model":"b"}', "b"),
        (rb'{"mod\u0065l":"a"}', "a"),
        (rb'{"x":"\"model\":\"no\"","model":"yes"}', "yes"),
        (rb'{"x":{"model":"no"}}', None),
        (rb'{"model" : null}', None),
        (rb'["model","no"]', None),
        (rb'"model"', None),
        (rb'{"model":"\\"}', "\\"),
        (rb'{"model":"cut', None),
        (b"", None),
    ],
)
def test_table(body: bytes, found: str | None) -> None:
    assert scan(body) == found


@pytest.mark.parametrize("value", [b"5", b"true", b"{}", b'["a"]', b""])
def test_model_that_is_no_text_is_refused(value: bytes) -> None:
    with pytest.raises(NotText):
        scan(b'{"model":' + value + b"}")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"5", b"[" * 100_000, b'["stream","seed"]'])
def test_what_is_no_object_is_none(body: bytes) -> None:
    assert read_object(body) is None


@given(st.binary() | JSON.map(lambda value: json.dumps({"model": value}).encode()))
def test_who_reads_it_all_finds_the_model_that_the_scan_finds(body: bytes) -> None:
    if (request := read_object(body)) is None:
        return
    try:
        found = scan(body)
    except NotText:
        with pytest.raises(NotText):
            model_of(request)
    else:
        assert found == model_of(request)


@pytest.mark.parametrize("body", [b'{"a":' + b"[" * (MAX_TOKENS + 1), b"{" + b'"a",' * (MAX_TOKENS + 1)])
def test_scan_gives_up_on_a_body_of_too_many_parts_after_many_pauses(body: bytes) -> None:
    steps = scan_model(body)
    pauses: list[object] = []
    with pytest.raises(TooComplex):
        pauses.extend(steps)
    assert len(pauses) >= 20


def test_long_string_costs_next_to_nothing() -> None:
    image = b"A" * (60 << 20)
    assert scan(b'{"image":"' + image + b'","model":"m"}') == "m"


def test_string_of_backslashes_is_no_trap() -> None:
    assert scan(b'{"x":"' + b'\\"' * 200_000 + b'","model":"m"}') == "m"
    assert scan(b'{"x":"' + b"\\" * 2_000_000 + b'","model":"m"}') == "m"


def test_form_field_is_found() -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--x--\r\n'
    assert form_model(form) == "whisper"
    assert form_model(b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nmodel\r\n--x--') is None
