from __future__ import annotations

from pathlib import Path

import pytest
from libmesh_node.llama.gguf import ModelError
from libmesh_node.models.reference import available_models, model_folders, model_name, resolve

from tests.llama.test_gguf import make, string, u32


def put(path: Path, *, parts: int = 0, padding: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = [string("general.architecture", "llama"), *([u32("split.count", parts)] if parts else [])]
    path.write_bytes(make(pairs) + bytes(padding))
    return path


def test_demo_needs_no_file(tmp_path: Path) -> None:
    model = resolve("demo", [], tmp_path)
    assert (model.name, model.is_demo, model.parts) == ("demo", True, (model.path,))
    assert model.size_bytes == model.path.stat().st_size


def test_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "Some-Model-Q4_K_M.gguf")
    monkeypatch.chdir(tmp_path)
    for reference in (str(path), "./Some-Model-Q4_K_M.gguf", "Some-Model-Q4_K_M.gguf"):
        model = resolve(reference, [])
        assert (model.name, model.path) == ("Some-Model-Q4_K_M", path)
        assert not model.is_demo


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = put(tmp_path / ".models" / "a.gguf")
    assert resolve("~/.models/a.gguf", []).path == path
    assert resolve("a", model_folders(tmp_path / "data")).path == path


def test_name_is_found_with_or_without_ending_and_first_folder_wins(tmp_path: Path) -> None:
    folders = [tmp_path / "absent", tmp_path / "one", tmp_path / "two"]
    one, two = put(tmp_path / "one" / "a.gguf"), put(tmp_path / "two" / "a.gguf")
    b = put(tmp_path / "two" / "b.gguf")
    assert resolve("a", folders).path == one != two
    assert resolve("b.gguf", folders).path == b


def test_parts_are_one_model(tmp_path: Path) -> None:
    parts = [put(tmp_path / f"big-{n:05}-of-00003.gguf", parts=3, padding=n) for n in (1, 2, 3)]
    size = sum(path.stat().st_size for path in parts)
    for reference in ("big", str(parts[0]), str(parts[2]), "big-00002-of-00003"):
        model = resolve(reference, [tmp_path])
        assert (model.name, model.parts, model.size_bytes) == ("big", tuple(parts), size)
    assert available_models([tmp_path]) == {"big": parts[0]}


def test_missing_part_is_named(tmp_path: Path) -> None:
    put(tmp_path / "big-00001-of-00002.gguf", parts=2)
    with pytest.raises(ModelError, match=r"big-00002-of-00002\.gguf is missing"):
        resolve("big", [tmp_path])


def test_renamed_part_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not end in"):
        resolve(str(put(tmp_path / "big.gguf", parts=2)), [])


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("llama-3.2-1b", "Did you mean Llama-3.2-1B-Q4"),
        ("dem", "Did you mean demo"),
        ("xyzzy", "--model demo"),
        ("/nowhere/x.gguf", "There is no file /nowhere/x.gguf"),
        ("nowhere.gguf", "no model named nowhere"),
        ("", "No model is named"),
        ("/", "/ is a folder"),
    ],
)
def test_unknown_name_is_told_with_the_near_ones(tmp_path: Path, reference: str, says: str) -> None:
    put(tmp_path / "Llama-3.2-1B-Q4_K_M.gguf")
    with pytest.raises(ModelError, match=says):
        resolve(reference, [tmp_path])


def test_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_text("<html>Not found</html>")
    with pytest.raises(ModelError, match="does not begin with GGUF"):
        resolve(str(path), [])


def test_folder_with_the_name_of_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").mkdir()
    with pytest.raises(ModelError, match=r"a\.gguf"):
        resolve("a", [tmp_path])


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("a.gguf", "a"),
        ("a-00001-of-00002.gguf", "a"),
        ("a-1-of-2.gguf", "a-1-of-2"),
        ("a.b.gguf", "a.b"),
        ("a", "a"),
    ],
)
def test_model_name(file: str, name: str) -> None:
    assert model_name(Path(file)) == name
