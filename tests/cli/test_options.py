from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from libmesh_node import options
from libmesh_node.datadir import default_data_dir
from libmesh_node.errors import UsageError
from libmesh_node.main import node_parser

RELAY = "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"


def parse(*argv: str) -> options.NodeOptions:
    return options.node_options(node_parser().parse_args(argv))


def test_no_arguments_are_an_idle_node_on_the_users_own_data_folder() -> None:
    assert parse() == options.NodeOptions(data_dir=default_data_dir(), api_port=9337, console_port=3131)


def test_every_flag_reaches_the_node(tmp_path: Path) -> None:
    chosen = parse(
        *(
            "--model",
            "demo",
            "--model",
            "b.gguf",
            "--join",
            "AAA",
            "--join",
            "BBB",
            "--port",
            "1",
            "--console",
            "2",
        ),
        *(
            "--bind-port",
            "3",
            "--bind-ws",
            "4",
            "--listen-all",
            "--bin-dir",
            "bin",
            "--max-vram",
            "1.5",
            "--device",
            "CUDA0",
        ),
        *("--data-dir", str(tmp_path), "--announce-addr", "/ip4/1.2.3.4/tcp/5", "--invite-file", "~/i"),
        *("--relay", RELAY, "--relay", RELAY, "--relay-bandwidth", "8"),
        *("--split", "--min-peers", "2", "--tensor-split", "3,1", "--max-rtt", "20ms"),
        *("--draft", "~/d.gguf", "--draft-max", "4"),
        *("--json-logs", "--verbose"),
    )
    assert chosen == options.NodeOptions(
        models=("demo", "b.gguf"),
        join=("AAA", "BBB"),
        api_port=1,
        console_port=2,
        bind_port=3,
        bind_ws=4,
        listen_all=True,
        bin_dir=Path.cwd() / "bin",
        max_vram_gb=1.5,
        device="CUDA0",
        split=True,
        min_peers=2,
        tensor_split=(3.0, 1.0),
        max_rtt_ms=20.0,
        draft=Path.home() / "d.gguf",
        draft_max=4,
        data_dir=tmp_path,
        announce_addresses=("/ip4/1.2.3.4/tcp/5",),
        relays=(RELAY,),
        relay_rate=1e6,
        invite_file=Path.home() / "i",
        json_logs=True,
        verbose=True,
    )
    assert parse("--client", "--ephemeral").client
    assert parse("--client", "--ephemeral").ephemeral


@pytest.mark.parametrize("text", ["1", "1,x", "-1,2", "0,0", "1,inf", ",".join("1" * 18)])
def test_shares_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(SystemExit):
        parse("--tensor-split", text)


def test_no_draft_beats_a_draft() -> None:
    assert parse("--draft", "d.gguf", "--no-draft").draft is None


def test_zero_is_a_port_of_the_systems_choice_and_not_an_absent_one() -> None:
    chosen = parse("--port", "0", "--console", "0", "--bind-port", "0")
    assert (chosen.api_port, chosen.console_port, chosen.bind_port) == (0, 0, None)


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (("--client", "--model", "demo"), "--client and --model"),
        (("--ephemeral", "--data-dir", "x"), "--ephemeral and --data-dir"),
        (("--port", "5000", "--console", "5000"), "different ports"),
        (("--bind-port", "9337"), "different ports"),
        (("--bind-port", "5000", "--bind-ws", "5000"), "different ports"),
    ],
)
def test_contradictions_are_named(argv: tuple[str, ...], names: str) -> None:
    with pytest.raises(UsageError, match=names):
        parse(*argv)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("15m", 900),
        ("12h", 43200),
        ("7d", 604800),
        ("52w", 31449600),
        ("1.5H", 5400),
        (" 1d ", 86400),
    ],
)
def test_durations_have_a_unit(text: str, seconds: float) -> None:
    assert options.duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "7", "d", "-1d", "0s", "1y", "1d12h", "nan", "infs", "522w", "9999999w", "٣d", "1e3s"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="7d"):
        options.duration(text)


@given(st.text())
@example("~nobody-at-all/x")
@example("@~nobody-at-all")
@example("@\0")
@example("@")
@example("/")
def test_no_text_makes_a_value_parser_raise_anything_but_its_refusal(text: str) -> None:
    for parser in (
        options.port,
        options.fixed_port,
        options.duration,
        options.gigabytes,
        options.target,
        options.multiaddr,
        options.invite,
        options.path,
    ):
        with suppress(argparse.ArgumentTypeError):
            parser(text)


@pytest.mark.parametrize("text", ["127.0.0.1:5432", "localhost:1", "[::1]:80", "db.example:65535"])
def test_targets_are_host_and_port(text: str) -> None:
    assert options.target(text) == text


@pytest.mark.parametrize(
    "text", ["5432", ":80", "host:", "host:0", "host:70000", "::1:80", "http://x:80", "a b:80"]
)
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        options.target(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "lots", ""])
def test_memory_must_be_a_positive_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="gigabytes"):
        options.gigabytes(text)


def test_memory_may_carry_its_unit() -> None:
    assert options.gigabytes("8GB") == options.gigabytes("8 g") == options.gigabytes("8") == 8.0


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "x", ""])
def test_a_rate_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no rate"):
        options.rate(text)


def test_nothing_at_all_is_a_rate() -> None:
    assert options.rate("0") == 0


def test_a_relay_is_named_with_its_peer_id() -> None:
    assert options.relay(RELAY) == RELAY
    for text in (
        "/ip4/192.0.2.1/tcp/4001",
        "/ip4/192.0.2.1/tcp/4001/p2p/0OIl",
        RELAY + "/p2p-circuit",
        "relay",
    ):
        with pytest.raises(argparse.ArgumentTypeError):
            options.relay(text)


def test_multiaddrs_need_a_host_and_a_port() -> None:
    assert options.multiaddr("/dns4/example.org/tcp/4001") == "/dns4/example.org/tcp/4001"
    bad_hosts = ("/ip4/1.2.3.999/tcp/1", "/ip4/::1/tcp/1", "/ip6/1.2.3.4/tcp/1", "/ip4/1.2.3.4/tcp/65536")
    for text in ("203.0.113.7:4001", "/ip4/203.0.113.7", "/tcp/4001", "/ip4/1.2.3.4/tcp/x", *bad_hosts):
        with pytest.raises(argparse.ArgumentTypeError):
            options.multiaddr(text)


def test_an_invite_is_read_from_the_file_that_at_or_a_path_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "invite"
    file.write_text("\n  TOKEN \n")
    assert options.invite(f"@{file}") == options.invite(str(file)) == "TOKEN"
    assert options.invite(" TOKEN\n") == "TOKEN"
    monkeypatch.chdir(tmp_path)
    assert options.invite("invite") == options.invite("./invite") == "TOKEN"


@pytest.mark.parametrize("content", [b"", b"two tokens", b"x" * 70_000, b"\n \n"])
def test_a_file_that_does_not_hold_one_token_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(argparse.ArgumentTypeError, match="one token"):
        options.invite(f"@{tmp_path / 'f'}")


def test_an_invite_file_that_is_missing_is_named(tmp_path: Path) -> None:
    for text in (f"@{tmp_path / 'none'}", str(tmp_path / "none"), str(tmp_path)):
        with pytest.raises(argparse.ArgumentTypeError, match="cannot read the invite file"):
            options.invite(text)
