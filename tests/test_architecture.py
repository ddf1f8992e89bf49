"""
The structure of the package, executed: floors, borders, and no use of another's private names.

A module imports only from floors below its own, wherever in the file the import stands. This is the
table of docs/architecture.md.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tinkex"

#: From the ground up. A name ending in "/" is a folder that is one floor as a whole: its modules
#: may import one another, without cycles. Modules of one row do not import one another.
FLOORS = [
    "_version types/ errors config",
    "wire/ futures text/ runtime/executor cli/progress cli/formatting checkpoints/archive",
    "runtime/interpreter_exit runtime/queue_state runtime/wait_log runtime/tracing "
    "runtime/log_setup runtime/exchange_limits",
    "runtime/batching runtime/custom_loss runtime/http_adapter runtime/operation_log "
    "runtime/pending runtime/responses data/",
    "runtime/retry runtime/http_session runtime/sample_stream",
    "runtime/transport runtime/rate_limit",
    "runtime/polling runtime/worker runtime/auth runtime/telemetry runtime/embedded "
    "runtime/heartbeat",
    "runtime/connection",
    "runtime/session",
    "runtime/ending",
    "runtime/sample_watch runtime/model_queue runtime/new_model checkpoints/download",
    "runtime/restore runtime/sample_queue",
    "engine/",
    "checkpoints/formats server/",
    "checkpoints/card",
    "checkpoints/export",
    "sampling rest",
    "conformance/",
    "training diagnostics/ auth",
    "service",
    "recipes/",
    "__init__",
    "cli/",
    "__main__",
]

#: The server and the client meet on the wire alone.
ENGINE_MAY_USE = {"engine", "types", "errors", "text", "config"}
SERVER_MAY_USE = {"server", "engine", "types", "errors", "wire", "text", "config", "_version"}

#: Part of the extra `local`, or slow to import: never at the top of a module outside of engine/ and
#: server/.
HEAVY = {
    "torch",
    "transformers",
    "safetensors",
    "starlette",
    "uvicorn",
    "google",
    "tokenizers",
    "asyncio",
}
#: The protobuf modules are imported when they are first needed.
HEAVY_ALLOWED = {"wire.proto_messages": {"google"}}

#: Private names of other packages, each in one module behind a check that has a way back.
FOREIGN = {
    "engine.int8": {"_weight_int8pack_mm"},
    "engine.matmul": {"_linear_pointwise"},
    "runtime.interpreter_exit": {"_run_exitfuncs"},
    "runtime.http_adapter": {"_get_conn", "_put_conn", "_validate_conn"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FLOOR = {name: number for number, row in enumerate(FLOORS) for name in row.split()}


@cache
def tree_of(module: str) -> ast.Module:
    """What the file of *module* says."""
    return ast.parse(FILES[module].read_text())


def place(module: str) -> str:
    """The entry of the table that *module* belongs to: its own, or that of its folder."""
    path = module.replace(".", "/")
    if path in FLOOR:
        return path
    folder = f"{path.split('/')[0]}/"
    return folder if folder in FLOOR else ""


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of tinkex that *module* imports, anywhere in its file."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("tinkex.") for a in node.names if "tinkex." in a.name}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tinkex":
            base = (node.module or "").removeprefix("tinkex").removeprefix(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                found.add(full if full in FILES else base or "__init__")
    return frozenset(found - {module})


def is_package_of(folder: str, module: str) -> bool:
    return module.startswith(f"{folder}.")


def in_every_module(faults_of: Callable[[str], object]) -> Callable[[], None]:
    """A test that a rule finds no fault in any module; one for all, as there are hundreds."""

    def test() -> None:
        assert {} == {module: faults for module in FILES if (faults := faults_of(module))}

    test.__name__, test.__doc__ = faults_of.__name__, faults_of.__doc__
    return test


@in_every_module
def test_every_module_has_its_floor(module):
    """An empty package file (a docstring alone) stands on no floor."""
    is_marker = FILES[module].name == "__init__.py" and len(tree_of(module).body) <= 1
    return not (place(module) or is_marker)


@in_every_module
def test_a_module_imports_only_from_lower_floors(module):
    """So that each can be read, and tested, knowing only what is below it."""
    here = place(module)
    return {
        used
        for used in imports(module)
        if place(used) and place(used) != here and FLOOR[place(used)] >= FLOOR.get(here, -1)
    }


def test_no_module_imports_itself_by_a_detour():
    """Inside a folder, too: a cycle makes two modules one."""
    graph = {module: imports(module) & set(FILES) for module in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            raise AssertionError(f"import cycle: {' -> '.join((*path, module))}")
        if module not in done:
            for used in sorted(graph[module]):
                # A module of a package may be imported by the package's own __init__.
                if not is_package_of(used, module):
                    visit(used, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@in_every_module
def test_the_engine_and_the_server_do_not_use_the_client(module):
    """Two programs that meet on the wire: neither can lean on the other's inside."""
    allowed = {"engine": ENGINE_MAY_USE, "server": SERVER_MAY_USE}.get(module.split(".")[0])
    if allowed is None:
        return set()
    return {used for used in imports(module) if used.split(".")[0] not in allowed}


@in_every_module
def test_the_client_does_not_use_the_engine_or_the_server(module):
    """It reaches them over HTTP. `tinkex serve` starts one, and merging weights is the engine's."""
    if module.split(".")[0] in ("engine", "server", "cli") or module in (
        "checkpoints.export",
        "checkpoints.formats",
    ):
        return set()
    return {used for used in imports(module) if used.split(".")[0] in ("engine", "server")}


@in_every_module
def test_nothing_heavy_is_imported_at_the_top(module):
    """`import tinkex` is quick, and works where the extras are not installed."""
    if module.split(".")[0] in ("engine", "server"):
        return set()
    found = set()
    for node in run_at_import(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])

    return (found & HEAVY) - HEAVY_ALLOWED.get(module, set())


def run_at_import(tree):
    """The statements that run when the module is imported: not those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
            yield from run_at_import(node)


@in_every_module
def test_no_module_touches_the_private_names_of_another(module):
    """
    What a module keeps to itself is its own to change.

    `x._name` is allowed where this module itself defines `_name`: on `self`, in another instance of
    its own class, in its own subclass.
    """
    tree = tree_of(module)
    own = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
    touched = {
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.endswith("__")
        and node.attr not in own | FOREIGN.get(module, set())
        and ast.unparse(node) != "os._exit"  # documented, whatever its name looks like
    }
    return touched | {
        f"line {node.lineno}: from {node.module} import {alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinkex")
        for alias in node.names
        if alias.name.startswith("_") and alias.name not in ("_version", "__version__")
    }


def test_no_folder_of_one_file():
    """A folder is a border; a border around one module is none."""
    folders = {path.parent for path in FILES.values()} - {PACKAGE}
    lonely = [
        folder.relative_to(PACKAGE).as_posix()
        for folder in sorted(folders)
        if len([*folder.glob("*.py")]) < 3 and (folder / "__main__.py") not in folder.iterdir()
    ]

    assert [] == lonely


def test_the_top_level_is_what_a_user_holds():
    assert 12 >= len(
        [m for m in FILES if "." not in m and FILES[m].parent == PACKAGE and m[0] != "_"]
    )


#: A function reads well up to this many lines, without its signature and docstring.
LONGEST_FUNCTION = 50
#: A module beyond this many lines has one subject and gives the reason in its docstring.
LONGEST_MODULE = 500


@in_every_module
def test_a_long_module_says_why_it_is_one(module):
    lines = FILES[module].read_text().count("\n")
    reason = " ".join((ast.get_docstring(tree_of(module)) or "").split())
    if lines <= LONGEST_MODULE or re.search(
        r"Long, because|One subject in one module|One long module", reason
    ):
        return None
    return f"{lines} lines: split it, or say in its docstring why it is one"


@in_every_module
def test_functions_are_short(module):
    long = {}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (node.end_lineno - body[0].lineno + 1) if body else 0
            if lines > LONGEST_FUNCTION:
                long[node.name] = lines
    return long
