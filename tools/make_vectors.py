"""Makes `tests/vectors/*.json` anew from `tests/vector_cases.py` and `tests/program_vectors.py`: the same bytes each time.

    python tools/make_vectors.py            write them
    python tools/make_vectors.py --check    only tell whether they are stale

Their form is told in `tests/vector_form.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import program_vectors, vector_cases
from tests.vector_form import FOLDER


def main() -> int:
    """Write or check all files; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only tell whether the files are stale")
    arguments = parser.parse_args()
    stale = []
    made = {message: of.vectors(message) for of in (vector_cases, program_vectors) for message in of.TABLE}
    for message, content in made.items():
        path = FOLDER / f"{message}.json"
        if arguments.check and (not path.exists() or path.read_text() != content):
            stale.append(path.name)
        elif not arguments.check:
            FOLDER.mkdir(exist_ok=True)
            path.write_text(content)
    if stale:
        sys.stderr.write(f"stale: {', '.join(stale)}; run `python tools/make_vectors.py`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
