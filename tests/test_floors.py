"""
The floors of the package: a module imports only from floors below its own, wherever in the file the
import stands. This table is the one of docs/architecture.md, executed.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tinkex"

#: From the ground up. Those of one row know nothing of each other.
FLOORS = [
    "_version types errors",
    "wire config batching custom_loss tokenizer waiting threads futures dataset console words "
    "options",
    "pacing answers retry connections",
    "transport",
    "polling auth telemetry embedded worker",
    "session",
    "completions download",
    "export",
    "sampling rest conformance",
    "training checkup listing",
    "restoring checkpoints doctor",
    "service stored",
    "__init__ finetune",
    "cli",
    "__main__ demo",
]

#: The server's own house. It stands on the two lowest floors of the other.
LOCAL_FLOORS = [
    "__init__ refusals home limits archive choosing scheduler losses optim tiny products lanes",
    "lora model",
    "answers keys head kvcache loading checkpoints store",
    "passes jobs journal",
    "scores",
    "sampler",
    "engine operations",
    "ledger",
    "exchange",
    "routes",
    "server",
]

#: All of the rest of the package that the server may use.
SHARED = {"_version", "types", "wire", "errors", "config"}

#: Part of the extra `local`, or slow to import: never at the top of a module outside it.
HEAVY = {
    "torch",
    "transformers",
    "safetensors",
    "starlette",
    "uvicorn",
    "google",
    "tokenizers",
    "cattrs",
    "asyncio",
}


def floor_of(table):
    return {name: floor for floor, row in enumerate(table) for name in row.split()}


def modules(folder):
    """Every module of *folder* as (name, its files); a package is one module."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py":
            yield path.stem, [path]
        elif (path / "__init__.py").exists() and path.name != "local":
            yield path.name, sorted(path.rglob("*.py"))


def imported(path):
    """Dotted names, inside the package, of what *path* imports."""
    home = ("tinkex", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1:] for a in node.names if a.name.startswith("tinkex."))
        elif isinstance(node, ast.ImportFrom):
            start = home[: len(home) - node.level + 1] if node.level else ()
            full = [*start, *(node.module.split(".") if node.module else [])]
            if full[:1] == ["tinkex"]:
                yield from ([*full[1:], a.name] for a in node.names)


def uses(files, below):
    """Names of the modules of the folder *below* that *files* import, other than their own."""
    for path in files:
        for parts in imported(path):
            if tuple(parts[: len(below)]) == below and len(parts) > len(below):
                yield parts[len(below)]


FLAT = list(modules(PACKAGE))
LOCAL = list(modules(PACKAGE / "local"))


@pytest.mark.parametrize("name, files", FLAT, ids=[name for name, _ in FLAT])
def test_a_module_imports_only_from_lower_floors(name, files):
    """So that each can be read, and tested, knowing only what is below it."""
    floors = floor_of(FLOORS)
    public = set(floors) | {"local"}
    used = {u if u in public else "__init__" for u in uses(files, ())} - {name, "local"}

    assert set() == {u for u in used if floors[u] >= floors[name]}


@pytest.mark.parametrize("name, files", LOCAL, ids=[name for name, _ in LOCAL])
def test_a_module_of_the_server_imports_only_from_lower_floors(name, files):
    floors = floor_of(LOCAL_FLOORS)
    used = {u for u in uses(files, ("local",)) if u in floors} - {name}

    assert set() == {u for u in used if floors[u] >= floors[name]}


@pytest.mark.parametrize("name, files", LOCAL, ids=[name for name, _ in LOCAL])
def test_the_server_shares_only_types_and_wire_with_the_sdk(name, files):
    """Two programs that meet on the wire: neither can lean on the other's inside."""
    outside = {u for u in uses(files, ()) if u != "local"}

    assert set() == outside - SHARED


@pytest.mark.parametrize("name, files", FLAT, ids=[name for name, _ in FLAT])
def test_only_the_command_line_knows_the_server(name, files):
    """It starts it; everybody else reaches it over HTTP. But merging weights is the server's."""
    if name not in ("cli", "export"):
        assert "local" not in set(uses(files, ()))


@pytest.mark.parametrize("name, files", FLAT, ids=[name for name, _ in FLAT])
def test_nothing_heavy_is_imported_at_the_top(name, files):
    """`import tinkex` is quick, and works where the extras are not installed."""
    found = set()
    for path in files:
        for node in _run_at_import(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])

    allowed = {"google"} if name == "wire" else set()  # wire/proto.py, imported when it is needed
    assert set() == (found & HEAVY) - allowed


def _run_at_import(tree):
    """The statements that run when the module is imported: not those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
            yield from _run_at_import(node)


def test_every_module_has_its_floor():
    assert {name for name, _ in FLAT} == set(floor_of(FLOORS))
    assert {name for name, _ in LOCAL} == set(floor_of(LOCAL_FLOORS))
