"""From what a person typed after `--model` to a file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from libmesh_node.datadir import home
from libmesh_node.llama.gguf import GgufHeader, ModelError, read_header
from libmesh_node.models.demo import demo_model

DEMO = "demo"

_SPLIT = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_MAX_LISTED = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """A model on this machine.

    Attributes:
        name: what requests say in `model`: the file's stem, without the number of a part.
        parts: all files of the model, in order; the first is the one that llama-server is given.
        size_bytes: of all parts.
        header: of the first part. Its `tensors` are that part's only.
        is_demo: its text is nonsense, and endless.
    """

    name: str
    parts: tuple[Path, ...]
    size_bytes: int
    header: GgufHeader
    is_demo: bool = False

    @property
    def path(self) -> Path:
        """The file to give to llama-server."""
        return self.parts[0]


def model_folders(data_dir: Path) -> tuple[Path, ...]:
    """Where models are looked for by name: the data folder's `models`, then `~/.models`."""
    return data_dir / "models", home() / ".models"


def resolve(reference: str, folders: Sequence[Path], cache: Path | None = None) -> ModelFile:
    """Find the model that `reference` means: a path, `demo`, or the name of a GGUF file in one of `folders`.

    A name may leave out `.gguf` and the number of a part, and is otherwise exact; the first folder that has it wins. A
    name is never taken for a path unless it has a slash or ends in `.gguf`. Reads headers only.

    Raises `ModelError` if there is no such file, with the names that are near; if the file is no GGUF; if a part is missing.
    """
    if reference == DEMO:
        return open_model(demo_model(cache), is_demo=True)
    if not reference.strip():
        raise ModelError(f"No model is named: give a .gguf file, the name of one, or `{DEMO}`.")
    path = Path(reference).expanduser()
    if "/" in reference or reference.endswith(".gguf"):
        if path.is_file():
            return open_model(path.absolute())
        if "/" in reference:
            raise ModelError(
                f"{path} is a folder; name one of the .gguf files in it."
                if path.is_dir()
                else f"There is no file {path}."
            )
    available = available_models(folders)
    name = model_name(Path(reference.removesuffix(".gguf") + ".gguf"))
    if name in available:
        return open_model(available[name])
    near = difflib.get_close_matches(name, [*available, DEMO], cutoff=0.4)
    places = " and ".join(str(folder) for folder in folders)
    hint = f"Did you mean {' or '.join(near)}?" if near else "`--model demo` works everywhere."
    raise ModelError(f"There is no model named {name} in {places}. {hint}")


def available_models(folders: Sequence[Path]) -> dict[str, Path]:
    """Models by name, each with the path of its first part. At most 10,000 files of a folder are looked at."""
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            continue
        for path in sorted(folder.glob("*.gguf"))[:_MAX_LISTED]:
            part = _SPLIT.match(path.name)
            if part is None or int(part["number"]) == 1:
                found.setdefault(model_name(path), path)
    return found


def open_model(path: Path, *, is_demo: bool = False) -> ModelFile:
    """Read the header of `path` and find its other parts. Raises `ModelError`."""
    try:
        header = read_header(path)
        parts = model_parts(path, header)
        if parts[0] != path:
            header = read_header(parts[0])
        size = sum(part.stat().st_size for part in parts)
    except OSError as exc:
        raise ModelError(f"{path} cannot be read: {exc.strerror}.") from exc
    return ModelFile(name=model_name(path), parts=parts, size_bytes=size, header=header, is_demo=is_demo)


def model_name(path: Path) -> str:
    """The name that requests use: the file's stem, without the number of a part."""
    part = _SPLIT.match(path.name)
    return part["stem"] if part else path.name.removesuffix(".gguf")


def model_parts(path: Path, header: GgufHeader) -> tuple[Path, ...]:
    """All files of the model that `path` is a part of, in order. Raises `ModelError` if one is missing."""
    if header.split_count <= 1:
        return (path,)
    part = _SPLIT.match(path.name)
    if part is None or int(part["count"]) != header.split_count:
        raise ModelError(
            f"{path} says that it is one of {header.split_count} parts, but its name does not end in "
            f"-00001-of-{header.split_count:05}.gguf, so the others cannot be found."
        )
    numbers = range(1, header.split_count + 1)
    parts = tuple(path.with_name(f"{part['stem']}-{number:05}-of-{part['count']}.gguf") for number in numbers)
    for other in parts:
        if not other.is_file():
            raise ModelError(f"{path.name} is one of {header.split_count} parts, and {other} is missing.")
    return parts
