"""The rules of the house that a machine can check: who may import whom, how long a file may be, what is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FILE = 400

LIBRARY = ROOT / "libmesh"
PROGRAM = ROOT / "cli" / "libmesh_node"
STANDARD_LIBRARY_THAT_ACTS = {
    *(
        "asyncio",
        "concurrent",
        "logging",
        "multiprocessing",
        "os",
        "pathlib",
        "selectors",
        "signal",
        "socket",
        "ssl",
    ),
    *(
        "subprocess",
        "sys",
        "threading",
        "time",
        "urllib",
        "http",
        "secrets",
        "tempfile",
        "shutil",
        "io",
        "datetime",
    ),
}
"""What waits, reads a clock, draws randomness or does I/O; core/ gets all of that as arguments."""

CORE_MAY_IMPORT = ("libmesh.core", "libmesh.peers", "libmesh.errors", "libmesh.keys")


def sources(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*.py")
        if not {"_pb", "__pycache__", "node_modules", ".venv"} & set(path.relative_to(ROOT).parts)
    )


EVERYTHING = [
    path
    for folder in ("libmesh", "cli", "tests", "examples", "bench", "tools")
    for path in sources(ROOT / folder)
]


def module_of(path: Path) -> str:
    base = ROOT / "cli" if path.is_relative_to(PROGRAM) else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, source: str | None = None) -> Iterator[tuple[str, str | None]]:
    """Each import of a file as (absolute module, name taken from it or `None`), those within functions too.

    `from package import name` is told as it is written; whether `name` is a module is for the rule to decide.
    """
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text() if source is None else source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def without_type_imports(source: str) -> str:
    """The source without its `if TYPE_CHECKING:` blocks, which are not there when it runs."""
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if not (
            isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        )
    ]
    return ast.unparse(tree)


def importers_of(paths: Iterable[Path], *packages: str, at_runtime: bool = False) -> list[str]:
    found = (
        (path, module)
        for path in sorted(paths)
        for module, _ in imports(path, without_type_imports(path.read_text()) if at_runtime else None)
        if within(module, *packages)
    )
    return [f"{named(path)} imports {module}" for path, module in found]


def named(path: Path, line: int = 1) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_core_imports_what_decides_and_never_awaits() -> None:
    wrong: list[str] = []
    for path in sources(LIBRARY / "core"):
        for module, name in imports(path):
            taken = f"{module}.{name}" if module == "libmesh" else module
            top = module.split(".")[0]
            if top == "libmesh":
                allowed = within(taken, *CORE_MAY_IMPORT)
            else:
                allowed = top in sys.stdlib_module_names and top not in STANDARD_LIBRARY_THAT_ACTS
            if not allowed:
                wrong.append(f"{named(path)} imports {taken}")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Await, ast.AsyncFor, ast.AsyncWith)):
                wrong.append(f"{named(path, node.lineno)} awaits")
    assert wrong == []


def test_only_net_imports_libp2p() -> None:
    built_on_it = {*sources(LIBRARY), *sources(PROGRAM), *sources(ROOT / "examples")}
    assert importers_of(built_on_it - set(sources(LIBRARY / "net")), "libp2p") == []


def test_only_http_imports_aiohttp_and_only_bridge_knows_both_loops() -> None:
    http, bridge = set(sources(PROGRAM / "http")), {PROGRAM / "bridge.py"}
    shipped = {*sources(LIBRARY), *sources(PROGRAM)}
    assert importers_of(shipped - http, "aiohttp") == []
    assert importers_of(shipped - http - bridge, "asyncio") == []
    assert importers_of(http, "trio", at_runtime=True) == []


def test_the_library_has_never_heard_of_the_program_or_of_models() -> None:
    assert importers_of(sources(LIBRARY), "libmesh_node", "gguf", "aiohttp", "rich") == []


def test_whoever_builds_on_the_library_uses_its_public_names_only() -> None:
    public = {*importlib.import_module("libmesh").__all__, "__version__"}
    wrong: list[str] = []
    for path in (*sources(PROGRAM), *sources(ROOT / "examples")):
        for module, name in imports(path):
            if module == "libmesh" and name is not None and name not in public:
                wrong.append(f"{named(path)} takes {name}, which libmesh does not export")
            elif module.startswith("libmesh."):
                wrong.append(f"{named(path)} imports {module}, which is not public")
    assert wrong == []


def test_a_file_is_short_enough_to_be_read() -> None:
    lengths = {named(path): len(path.read_text().splitlines()) for path in EVERYTHING}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_no_name_says_nothing() -> None:
    wrong: list[str] = []
    for path in (*sources(LIBRARY), *sources(PROGRAM)):
        if {"utils", "util", "common", "misc", "helpers", "manager"} & set(
            path.relative_to(ROOT).with_suffix("").parts
        ):
            wrong.append(named(path))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Manager", "Helper", "Utils")):
                wrong.append(f"{named(path, node.lineno)} {node.name}")
    assert wrong == []


def test_every_file_and_every_public_class_says_what_it_is_for() -> None:
    wrong: list[str] = []
    for path in (*sources(LIBRARY), *sources(PROGRAM)):
        tree = ast.parse(path.read_text())
        if tree.body and not ast.get_docstring(tree):
            wrong.append(named(path))
        for node in tree.body:
            if (
                isinstance(node, ast.ClassDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                wrong.append(f"{named(path, node.lineno)} {node.name}")
    assert wrong == []


def test_every_public_name_of_the_library_exists_and_is_documented() -> None:
    libmesh = importlib.import_module("libmesh")
    assert sorted(set(libmesh.__all__), key=str.casefold) == sorted(libmesh.__all__, key=str.casefold)
    for name in libmesh.__all__:
        value = getattr(libmesh, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"libmesh.{name} has no docstring"


def test_importing_does_nothing_that_can_be_seen() -> None:
    wrong: list[str] = []
    for path in (*sources(LIBRARY), *sources(PROGRAM)):
        for node in ast.parse(path.read_text()).body:
            acts = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            if acts and path.name != "__main__.py":
                wrong.append(named(path, node.lineno))
    assert wrong == []


def test_the_rules_see_what_they_are_there_for() -> None:
    """Guards the guard: every way to write an import is found."""
    source = (
        "import libp2p.host as h\ndef f():\n    from libp2p import x\nfrom . import y\nfrom ..core import z\n"
    )
    file = LIBRARY / "net" / "imaginary.py"
    assert list(imports(file, source)) == [
        ("libp2p.host", None),
        ("libmesh.net", "y"),
        ("libmesh.core", "z"),
        ("libp2p", "x"),
    ]
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import trio\n"
    assert [module for module, _ in imports(file, without_type_imports(typed))] == ["typing"]
    assert within("libp2p.host", "libp2p")
    assert not within("libp2p_like", "libp2p")
