"""Fuzz one target with atheris (`make fuzz`, or `pip install atheris`): libFuzzer, guided by coverage.

    python tests/fuzz/run.py TARGET --seconds 600      what it finds stays in .fuzz/TARGET; a crash in .fuzz/crash-*
    python tests/fuzz/run.py TARGET --keep             distil .fuzz/TARGET into tests/fuzz/corpus/TARGET.txt
    python tests/fuzz/run.py TARGET --replay FILE …    run inputs once, without a fuzzer
    python tests/fuzz/run.py --list

The tests replay the corpus on every run (`test_corpus.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import subprocess
import sys
import tempfile
from itertools import accumulate
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOUND = ROOT / ".fuzz"
KEPT_BYTES = 7000
"""Of each target's distilled corpus; the smallest inputs first."""

sys.path[0] = str(ROOT)  # instead of this folder


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description="Fuzz one target.")
    parser.add_argument("target", nargs="?")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--keep", action="store_true", help="distil what was found into the repository")
    parser.add_argument("--replay", nargs="+", type=Path, help="run these inputs once")
    parser.add_argument("--list", action="store_true", help="name the targets")
    parser.add_argument(
        "--program", default=sys.argv[0], help=argparse.SUPPRESS
    )  # what libFuzzer starts again
    parser.add_argument("--flags", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # libFuzzer's own
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if options.list or options.target is None:
        from tests.fuzz.targets import TARGETS

        for target in TARGETS.values():
            print(f"{target.name:16}{target.rule}")  # noqa: T201
    elif options.replay:
        _replay(options.target, options.replay)
    elif options.keep:
        _keep(options.target)
    else:
        _fuzz(options.target, options.seconds, options.program, options.flags)


def _replay(name: str, paths: list[Path]) -> None:
    from tests.fuzz.targets import TARGETS

    for path in paths:
        TARGETS[name].check(path.read_bytes())
        print(f"{path}: holds")  # noqa: T201


def _fuzz(name: str, seconds: int, program: str, flags: list[str] | None) -> None:
    try:
        import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError:
        sys.exit("atheris is not installed: run `make fuzz`, or `pip install atheris`")
    with atheris.instrument_imports(include=["libmesh", "libmesh_node"]):
        from tests.fuzz.targets import TARGETS, kept_inputs
    target = TARGETS[name]
    work = FOUND / name
    work.mkdir(parents=True, exist_ok=True)
    if flags is None:
        for data in (*target.seeds(), *kept_inputs(name)):
            (work / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)
        flags = [f"-max_total_time={seconds}", "-print_final_stats=1", "-len_control=20", str(work)]
    limits = [f"-max_len={target.longest}", "-timeout=60", "-rss_limit_mb=2048"]

    def check(data: bytes) -> None:
        target.check(data)

    atheris.Setup([program, f"-artifact_prefix={FOUND}/crash-{name}-", *limits, *flags], check)
    atheris.Fuzz()


def _keep(name: str) -> None:
    """Merge by coverage. libFuzzer starts its own program again and again for that, so it gets one."""
    from tests.fuzz.targets import keep_inputs

    with tempfile.TemporaryDirectory() as folder:
        program, distilled = Path(folder) / "fuzz", Path(folder) / "distilled"
        program.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{name}" --program "$0" --flags "$@"\n'
        )
        program.chmod(0o755)
        distilled.mkdir()
        command = [sys.executable, __file__, name, "--program", str(program), "--flags", "-merge=1"]
        subprocess.run(
            [*command, str(distilled), str(FOUND / name)], check=True, capture_output=True, timeout=1800
        )
        found = sorted(
            (path.read_bytes() for path in distilled.iterdir()), key=lambda data: (len(data), data)
        )
    kept = [data for data, size in zip(found, accumulate(map(len, found)), strict=True) if size <= KEPT_BYTES]
    keep_inputs(name, kept)
    print(f"{name}: kept {len(kept)} of {len(found)} inputs")  # noqa: T201


if __name__ == "__main__":
    main()
